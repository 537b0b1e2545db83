#include "tape.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <new>
#include <utility>

namespace inferneo {
namespace {

constexpr int64_t kAlignment = 128;

}  // namespace

int64_t now_ns() { return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void Arena::Free::operator()(std::byte* bytes) const { std::free(bytes); }

std::byte* Arena::reserve(int64_t bytes) {
  if (bytes > size_) {
    bytes_.reset();
    size_ = 0;
    const int64_t rounded = round_up(bytes, kAlignment);
    bytes_.reset(static_cast<std::byte*>(std::aligned_alloc(kAlignment, rounded)));
    if (bytes_ == nullptr) throw std::bad_alloc();
    size_ = rounded;
  }
  return bytes_.get();
}

int64_t Node::shared_bytes(const StepInput&) const { return 0; }
int64_t Node::lane_bytes(const StepInput&) const { return 0; }

int Tape::add_input(int64_t width) {
  inputs_.push_back(static_cast<int>(values_.size()));
  values_.push_back({width, -1});
  return inputs_.back();
}

int Tape::add_node(std::unique_ptr<Node> node, int64_t width) {
  node->output = static_cast<int>(values_.size());
  values_.push_back({width, -1});
  nodes_.push_back(std::move(node));
  has_slots_ = false;
  return nodes_.back()->output;
}

// Gives every value but the last a slot, in the order of their making, each from those that are free by then.
void Tape::assign_slots() {
  std::vector<int64_t> last_reader(values_.size(), -1);
  for (int64_t i = 0; i < num_nodes(); ++i) {
    for (const int value : nodes_[i]->inputs) last_reader[value] = i;
  }
  slot_widths_.clear();
  std::vector<int> free_slots;
  for (int64_t i = 0; i + 1 < num_nodes(); ++i) {
    const Node& node = *nodes_[i];
    Value& output = values_[node.output];
    const bool replaces = node.replaces >= 0 && values_[node.replaces].slot >= 0 && last_reader[node.replaces] == i;
    const auto fitting = std::find_if(free_slots.begin(), free_slots.end(),
                                      [&](int slot) { return slot_widths_[slot] == output.width; });
    if (replaces) {
      output.slot = values_[node.replaces].slot;
    } else if (fitting != free_slots.end()) {
      output.slot = *fitting;
      free_slots.erase(fitting);
    } else {
      output.slot = static_cast<int>(slot_widths_.size());
      slot_widths_.push_back(output.width);
    }
    for (const int value : node.inputs) {
      if (last_reader[value] != i || values_[value].slot < 0 || (replaces && value == node.replaces)) continue;
      free_slots.push_back(values_[value].slot);
      last_reader[value] = -1;  // a value that is read twice here is freed once
    }
  }
  find_cut();
  addresses_.resize(values_.size());
  tickets_ = std::make_unique<std::atomic<int64_t>[]>(nodes_.size());
  has_slots_ = true;
}

void Tape::time_nodes(bool on) {
  is_timed_ = on;
  node_ns_.assign(on ? nodes_.size() : 0, 0);
}

std::vector<int64_t> Tape::take_node_ns() { return std::exchange(node_ns_, std::vector<int64_t>(node_ns_.size())); }

void Tape::find_cut() {
  cut_ = -1;
  crossing_.clear();
  if (nodes_.empty() || !nodes_.back()->takes_rows()) return;
  for (int64_t i = 0; i < num_nodes(); ++i) {
    if (nodes_[i]->stores()) cut_ = i;
  }
  std::vector<bool> is_behind(values_.size(), false);
  for (int64_t i = cut_ + 1; i < num_nodes(); ++i) {
    if (nodes_[i]->inputs.empty()) {  // made of the step's ids, which its rows alone do not have
      cut_ = -1;
      return crossing_.clear();
    }
    for (const int value : nodes_[i]->inputs) {
      const bool is_known = std::find(crossing_.begin(), crossing_.end(), value) != crossing_.end();
      if (!is_behind[value] && !is_known) crossing_.push_back(value);
    }
    is_behind[nodes_[i]->output] = true;
  }
}

std::byte* Tape::place_values(const StepInput& step, const StepInput& rest, int64_t scratch_bytes) {
  const auto bytes_of = [](int64_t num_tokens, int64_t width) {
    return round_up(num_tokens * width * static_cast<int64_t>(sizeof(float)), kAlignment);
  };
  const bool is_cut = &rest != &step;
  int64_t bytes = 0;
  for (const int64_t width : slot_widths_) bytes += bytes_of(step.num_tokens, width);
  for (const int value : crossing_) bytes += is_cut ? bytes_of(rest.num_tokens, values_[value].width) : 0;
  std::byte* place = arena_.reserve(bytes + scratch_bytes);
  const auto take = [&](int64_t num_tokens, int64_t width) {
    std::byte* const here = std::exchange(place, place + bytes_of(num_tokens, width));
    return reinterpret_cast<float*>(here);
  };
  slot_places_.clear();
  for (const int64_t width : slot_widths_) slot_places_.push_back(take(step.num_tokens, width));
  for (size_t value = 0; value < values_.size(); ++value) {
    const int slot = values_[value].slot;
    if (slot >= 0) addresses_[value] = slot_places_[slot];
  }
  rest_addresses_ = addresses_;
  for (const int value : crossing_) {
    if (is_cut) rest_addresses_[value] = take(rest.num_tokens, values_[value].width);
  }
  return place;
}

void Tape::take_rows(const StepInput& step, Lane lane) const {
  const Share rows = share(step.num_rows, 1, lane);
  for (const int value : crossing_) {
    const int64_t width = values_[value].width;
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      std::copy_n(addresses_[value] + step.rows[i] * width, width, rest_addresses_[value] + i * width);
    }
  }
}

void Tape::replay(Team& team, Isa isa, const StepInput& step, float* const* inputs, float* output) {
  if (!has_slots_) assign_slots();
  const bool is_cut = cut_ >= 0 && rows_step_.take(step);
  const StepInput& rest = is_cut ? rows_step_.step() : step;
  const int64_t end = is_cut && step.num_rows == 0 ? cut_ + 1 : num_nodes();
  int64_t shared = 0, each = 0;
  for (int64_t i = 0; i < end; ++i) {
    shared = std::max(shared, round_up(nodes_[i]->shared_bytes(i > cut_ ? rest : step), kAlignment));
    each = std::max(each, round_up(nodes_[i]->lane_bytes(i > cut_ ? rest : step), kAlignment));
  }
  for (size_t i = 0; i < inputs_.size(); ++i) addresses_[inputs_[i]] = inputs[i];
  addresses_.back() = output;
  std::byte* const scratch = place_values(step, rest, shared + team.count() * each);
  scratch_.resize(team.count());
  for (int lane = 0; lane < team.count(); ++lane) scratch_[lane] = scratch + shared + lane * each;
  for (int64_t i = 0; i < num_nodes(); ++i) tickets_[i] = 0;

  const auto frame_of = [&](const StepInput& some, const std::vector<float*>& addresses) {
    return Frame{team,    linear_kernels(isa), row_kernels(isa), some, addresses.data(),
                 scratch, scratch_.data(),     tickets_.get()};
  };
  const Frame whole = frame_of(step, addresses_), behind_cut = frame_of(rest, rest_addresses_);
  int64_t ended_ns = is_timed_ ? now_ns() : 0;  // the last node; lane 0's alone
  const auto note = [&](int64_t node) {
    const int64_t now = now_ns();
    node_ns_[node] += now - ended_ns;
    ended_ns = now;
  };
  team.run([&](Lane lane) {
    for (int64_t i = 0; i < end; ++i) {
      nodes_[i]->run(i > cut_ ? behind_cut : whole, i, lane);
      if (i + 1 < end) team.barrier(lane);  // the end of the task is a barrier, too
      if (is_cut && i == cut_ && i + 1 < end) {
        take_rows(step, lane);
        team.barrier(lane);
      }
      if (is_timed_ && lane.index == 0) note(i);
    }
  });
  if (is_timed_) note(end - 1);
}

}  // namespace inferneo
