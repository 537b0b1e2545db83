// A tape: the verbs of a forward pass, recorded once and replayed for any number of tokens by all lanes of a team.
//
// A verb is a node; what goes from node to node is a value, [num_tokens, width] fp32. Values live in slots of an arena
// that grows with the number of tokens; a slot is used again once the last reader of its value has run. Every node ends
// at a barrier, so a node may read what any lane of an earlier one wrote.
//
// Where the last node takes some rows of its input only, each the last token of a sequence, nothing else is computed
// once the last keys and values are stored: nearly all of a prompt's last layer is left out.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "linear.h"
#include "row_kernels.h"
#include "step.h"
#include "team.h"

namespace inferneo {

// Nanoseconds of a clock that never goes back.
int64_t now_ns();

// Memory that grows and is never initialised.
class Arena {
 public:
  // At least `bytes` bytes, 64-byte aligned; what was there before is lost if it has to grow.
  std::byte* reserve(int64_t bytes);

 private:
  struct Free {
    void operator()(std::byte* bytes) const;
  };
  std::unique_ptr<std::byte, Free> bytes_;
  int64_t size_ = 0;
};

// One replay, as its nodes see it.
struct Frame {
  Team& team;
  const LinearKernels& linear;
  const RowKernels& rows;
  const StepInput& step;
  float* const* values;               // where each value lies
  std::byte* shared;                  // shared_bytes of the node that runs
  std::byte* const* private_scratch;  // by lane: lane_bytes of the node that runs
  std::atomic<int64_t>* tickets;      // one a node, 0 at first

  std::byte* scratch(Lane lane) const { return private_scratch[lane.index]; }
};

class Node {
 public:
  virtual ~Node() = default;
  // A lane's share of the work. May use barriers, the same ones on every lane.
  virtual void run(const Frame& frame, int64_t index, Lane lane) const = 0;
  virtual int64_t shared_bytes(const StepInput& step) const;
  virtual int64_t lane_bytes(const StepInput& step) const;
  virtual bool stores() const { return false; }      // to the cache
  virtual bool takes_rows() const { return false; }  // of its input only StepInput.rows; every node before it, all

  std::vector<int> inputs;  // values
  int replaces = -1;        // the input whose slot the output may take: each element is read before it is written
  int output = -1;          // value
};

class Tape {
 public:
  // A value that the caller provides at each replay.
  int add_input(int64_t width);
  // Records a node; returns the value that it gives.
  int add_node(std::unique_ptr<Node> node, int64_t width);

  int64_t num_values() const { return static_cast<int64_t>(values_.size()); }
  int64_t num_nodes() const { return static_cast<int64_t>(nodes_.size()); }
  int64_t num_inputs() const { return static_cast<int64_t>(inputs_.size()); }
  int64_t width(int64_t value) const { return values_[value].width; }
  int64_t input_width(int64_t input) const { return width(inputs_[input]); }

  // Whether replays note how long each node takes: one look at the clock a node, on lane 0.
  void time_nodes(bool on);
  // Nanoseconds of each node since this was last asked, its barrier included, over all replays; empty if untimed.
  std::vector<int64_t> take_node_ns();

  // Runs every node. inputs: by number, [num_tokens, width] each; output: where the last node's value goes.
  void replay(Team& team, Isa isa, const StepInput& step, float* const* inputs, float* output);

 private:
  struct Value {
    int64_t width;
    int slot;  // -1: the caller's
  };

  void assign_slots();
  void find_cut();
  // Gives each value with a slot its place, and those that cross the cut another behind it, if `rest` is not `step`;
  // returns where scratch memory begins.
  std::byte* place_values(const StepInput& step, const StepInput& rest, int64_t scratch_bytes);
  void take_rows(const StepInput& step, Lane lane) const;

  std::vector<std::unique_ptr<Node>> nodes_;
  std::vector<Value> values_;
  std::vector<int> inputs_;    // values
  bool has_slots_ = false;     // whether assign_slots has run since the last add_node
  int64_t cut_ = -1;           // the node behind which only rows are needed, or -1
  std::vector<int> crossing_;  // values made before the cut and read behind it
  RowsStep rows_step_;
  std::vector<int64_t> slot_widths_;    // floats a token
  std::vector<float*> slot_places_;     // in this replay
  std::vector<float*> addresses_;       // of values
  std::vector<float*> rest_addresses_;  // the same behind the cut
  std::vector<std::byte*> scratch_;     // by lane
  std::unique_ptr<std::atomic<int64_t>[]> tickets_;
  bool is_timed_ = false;
  std::vector<int64_t> node_ns_;
  Arena arena_;
};

}  // namespace inferneo
