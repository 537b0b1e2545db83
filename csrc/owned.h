// C++ objects that tensors own: how the operators hand them to Python, whose last reference ends them.
#pragma once

#include <memory>

#include "tensor_args.h"

namespace inferneo {

// What a tensor made by `own` holds. T::kMagic tells it from other tensors.
template <class T>
struct Owned {
  uint64_t magic;
  std::unique_ptr<T> object;
};

// A tensor that owns `object` and stands for it.
template <class T>
Tensor own(std::unique_ptr<T> object) {
  auto* owned = new Owned<T>{T::kMagic, std::move(object)};
  return torch::stable::from_blob(owned, {static_cast<int64_t>(sizeof *owned)}, {1},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Byte,
                                  [](void* bytes) { delete static_cast<Owned<T>*>(bytes); });
}

template <class T>
T& owned(const char* name, const Tensor& tensor) {
  const bool fits = tensor.is_cpu() && tensor.scalar_type() == ScalarType::Byte && tensor.numel() == sizeof(Owned<T>);
  const auto* held = fits ? static_cast<const Owned<T>*>(tensor.const_data_ptr()) : nullptr;
  check(fits && held->magic == T::kMagic, name, " is not what its own constructor made");
  return *held->object;
}

}  // namespace inferneo
