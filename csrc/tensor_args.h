// Checks of what an operator is given. An error begins with the name of the class in inferneo_core/errors.py that
// CpuOps raises it as.
#pragma once

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"  // in torch's own headers
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#pragma GCC diagnostic pop

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace inferneo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "ShapeError: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A contiguous CPU tensor of this type and shape (-1: any size); a strided one is copied.
inline Tensor checked(const char* name, const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> shape) {
  check(tensor.is_cpu(), name, " is not on the CPU; CpuOps takes CPU tensors");
  check(tensor.scalar_type() == dtype, name, " has dtype ", torch::headeronly::toString(tensor.scalar_type()),
        "; it must be ", torch::headeronly::toString(dtype));
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t dim = 0;
  for (const int64_t size : shape) {
    same = same && (size < 0 || tensor.size(dim) == size);
    ++dim;
  }
  if (!same) {
    std::ostringstream shapes;
    shapes << "[";
    for (int64_t i = 0; i < tensor.dim(); ++i) shapes << (i > 0 ? ", " : "") << tensor.size(i);
    shapes << "]; it must be [";
    for (const int64_t* size = shape.begin(); size != shape.end(); ++size) {
      shapes << (size != shape.begin() ? ", " : "") << (*size < 0 ? "any" : std::to_string(*size));
    }
    check(false, name, " has shape ", shapes.str(), "]");
  }
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace inferneo
