// The operators that make packed weights, and that use one by itself: torch.ops.inferneo.{weight_memory, packed_bytes,
// pack_linear, packed_rows, packed_linear}.
#include "../tensor_args.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <vector>

#include "linear.h"
#include "linear_args.h"

namespace inferneo {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;

// uint8 [num_bytes] that begins on a huge page, of huge pages where the system gives them; touched on use.
Tensor weight_memory(int64_t num_bytes) {
  check(num_bytes >= 1, "num_bytes is ", num_bytes, "; it is at least 1");
  const auto size = static_cast<size_t>(round_up(num_bytes, kHugePage));
  void* memory = std::aligned_alloc(kHugePage, size);
  if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  madvise(memory, size, MADV_HUGEPAGE);  // a hint: huge pages are worth a tenth of a decode step
#endif
  return torch::stable::from_blob(memory, {num_bytes}, {1}, torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  ScalarType::Byte, std::free);
}

Format format_named(const std::string& name) {
  for (int i = 0; i < kNumFormats; ++i) {
    if (name == kFormats[i].name) return static_cast<Format>(i);
  }
  throw std::runtime_error("UnsupportedModel: CpuOps has no kernels for weights of type " + name);
}

ScalarType stored_dtype(Format format) {
  switch (format) {
    case Format::kBF16:
      return ScalarType::BFloat16;
    case Format::kFP16:
      return ScalarType::Half;
    case Format::kFP32:
      return ScalarType::Float;
    default:
      return ScalarType::Byte;
  }
}

std::vector<std::string> split_names(const std::string& names) {
  std::vector<std::string> parts;
  std::istringstream stream(names);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

// What pack_linear is given, checked; `kept` holds the tensors that the pointers point into.
struct Source {
  std::vector<Tensor> kept;
  std::vector<SourceSegment> segments;
};

Source checked_source(const std::vector<Tensor>& data_list, const std::string& types,
                      const std::vector<Tensor>& row_orders, int64_t in_features) {
  const std::vector<std::string> names = split_names(types);
  check(!names.empty() && names.size() <= kMaxSegments, "a weight has ", names.size(), " segments; it has 1 to ",
        kMaxSegments);
  check(data_list.size() == names.size() && row_orders.size() == names.size(),
        "data, types and row_orders differ in length");
  check(in_features >= 1, "in_features is ", in_features, "; it is at least 1");
  Source source;
  for (size_t i = 0; i < names.size(); ++i) {
    const Format format = format_named(names[i]);
    const FormatTraits& f = traits(format);
    check(in_features % f.type_columns == 0, "in_features is ", in_features, "; ", f.name, " needs a multiple of ",
          f.type_columns);
    const int64_t row_bytes = in_features / f.type_columns * f.type_bytes;
    const int64_t row_elements = is_dense(format) ? in_features : row_bytes;
    const Tensor rows = checked("a segment", data_list[i], stored_dtype(format), {-1, row_elements});
    const Tensor order = checked("row_order", row_orders[i], ScalarType::Long, {-1});
    const int64_t num_rows = rows.size(0);
    check(num_rows >= 1, "a segment has no rows");
    const bool in_order = order.size(0) == 0;
    check(in_order || order.size(0) == num_rows, "row_order has ", order.size(0), " rows; its segment has ", num_rows);
    const auto* places = data<int64_t>(order);
    for (int64_t row = 0; row < order.size(0); ++row) {
      check(places[row] >= 0 && places[row] < num_rows, "row_order[", row, "] is ", places[row], "; it is in [0, ",
            num_rows, ")");
    }
    source.segments.push_back({data<uint8_t>(rows), num_rows, row_bytes, in_order ? nullptr : places, format});
    source.kept.push_back(rows);
    source.kept.push_back(order);
  }
  return source;
}

int64_t packed_bytes(const std::vector<Tensor>& data_list, const std::string& types,
                     const std::vector<Tensor>& row_orders, int64_t in_features, bool has_bias, bool keeps_rows) {
  const Source source = checked_source(data_list, types, row_orders, in_features);
  const auto num_segments = static_cast<int64_t>(source.segments.size());
  return plan_linear(source.segments.data(), num_segments, in_features, has_bias, keeps_rows).num_bytes;
}

// Packs into `out`, uint8 [packed_bytes or more], 64-byte aligned.
void pack_linear(const std::vector<Tensor>& data_list, const std::string& types, const std::vector<Tensor>& row_orders,
                 int64_t in_features, const std::optional<Tensor>& bias, bool keeps_rows, const Tensor& out) {
  const Source source = checked_source(data_list, types, row_orders, in_features);
  const auto num_segments = static_cast<int64_t>(source.segments.size());
  const PackedLinear plan =
      plan_linear(source.segments.data(), num_segments, in_features, bias.has_value(), keeps_rows);
  check(out.is_contiguous() && out.scalar_type() == ScalarType::Byte && out.numel() >= plan.num_bytes,
        "out must be contiguous uint8 of at least ", plan.num_bytes, " elements");
  auto* packed = mutable_data<std::byte>(out);
  check(reinterpret_cast<uintptr_t>(packed) % 64 == 0, "out must begin on a multiple of 64 bytes");
  std::memcpy(packed, &plan, sizeof plan);
  for (int64_t i = 0; i < num_segments; ++i) {
    const int64_t groups = (plan.segments[i].num_rows + kGroupRows - 1) / kGroupRows;
    torch::stable::parallel_for(0, groups, 64, [&](int64_t begin, int64_t end) {
      pack_groups(source.segments[i], plan.segments[i], in_features, begin, end, packed);
    });
  }
  if (bias) {
    const Tensor values = checked("bias", *bias, ScalarType::Float, {plan.out_features});
    std::memcpy(packed + plan.bias_offset, values.const_data_ptr(), plan.out_features * sizeof(float));
  }
}

// fp32 [num_ids, in_features]: rows of a packed weight.
Tensor packed_rows(const Tensor& packed, const Tensor& ids) {
  const PackedLinear& linear = packed_linear_of(packed);
  check_keeps_rows(linear);
  const Tensor rows = checked("ids", ids, ScalarType::Long, {-1});
  const auto* row_ids = data<int64_t>(rows);
  for (int64_t i = 0; i < rows.size(0); ++i) {
    check(row_ids[i] >= 0 && row_ids[i] < linear.out_features, "ids[", i, "] is ", row_ids[i], "; it is in [0, ",
          linear.out_features, ")");
  }
  Tensor out = torch::stable::empty({rows.size(0), linear.in_features}, ScalarType::Float);
  unpack_rows(linear, row_ids, rows.size(0), mutable_data<float>(out));
  return out;
}

// fp32 [num_tokens, out_features]: one product by itself, split into `lanes` on torch's threads.
Tensor packed_linear(const Tensor& x, const Tensor& packed, int64_t lanes) {
  const PackedLinear& linear = packed_linear_of(packed);
  const Tensor rows = checked("x", x, ScalarType::Float, {-1, linear.in_features});
  check(lanes >= 1 && lanes <= kMaxLanes, "lanes is ", lanes, "; it is in [1, ", kMaxLanes, "]");
  const LinearKernels& kernels = linear_kernels(cpu_isa());
  const int64_t num_tokens = rows.size(0);
  Tensor out = torch::stable::empty({num_tokens, linear.out_features}, ScalarType::Float);
  if (num_tokens == 0) return out;
  const int64_t num_bytes = round_up(prepared_bytes(linear, num_tokens), 64);
  const Tensor space = weight_memory(num_bytes);
  auto* prepared = mutable_data<std::byte>(space);
  auto* y = mutable_data<float>(out);
  const auto for_lanes = [&](auto&& f) {
    torch::stable::parallel_for(0, lanes, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(Lane{static_cast<int>(i), static_cast<int>(lanes)});
    });
  };
  for_lanes([&](Lane lane) {
    const Share quads = share(quads_in(num_tokens), 1, lane);
    const float* first = data<float>(rows) + quads.begin * kQuad * linear.in_features;
    prepare_rows(kernels, linear, first, num_tokens, prepared, quads);
  });
  for_lanes([&](Lane lane) {
    const Share mine = share(linear.out_features, row_granule, lane);
    const int64_t slab = slab_tokens(linear);
    for (int64_t begin = 0; begin < num_tokens; begin += slab) {
      const Share tokens{begin, begin + slab < num_tokens ? begin + slab : num_tokens};
      linear_rows(kernels, linear, prepared, num_tokens, tokens, mine, y, linear.out_features);
    }
  });
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(inferneo, m) {
  m.def("weight_memory(int num_bytes) -> Tensor");
  m.def(
      "packed_bytes(Tensor[] data, str types, Tensor[] row_orders, int in_features, bool has_bias, bool keeps_rows) -> "
      "int");
  m.def(
      "pack_linear(Tensor[] data, str types, Tensor[] row_orders, int in_features, Tensor? bias, bool keeps_rows, "
      "Tensor(a!) out) -> ()");
  m.def("packed_rows(Tensor packed, Tensor ids) -> Tensor");
  m.def("packed_linear(Tensor x, Tensor packed, int lanes) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(inferneo, CPU, m) {
  m.impl("packed_bytes", TORCH_BOX(&packed_bytes));
  m.impl("pack_linear", TORCH_BOX(&pack_linear));
  m.impl("packed_rows", TORCH_BOX(&packed_rows));
  m.impl("packed_linear", TORCH_BOX(&packed_linear));
}

STABLE_TORCH_LIBRARY_IMPL(inferneo, CompositeExplicitAutograd, m) {
  m.impl("weight_memory", TORCH_BOX(&weight_memory));
}

}  // namespace
}  // namespace inferneo
