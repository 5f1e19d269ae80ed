// Pointers out of torch's tensors, and the choice of a scalar type.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace stablekern {

template <class T>
const T* data(const torch::stable::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
const T* data(const std::optional<torch::stable::Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}
template <class T>
T* mutable_data(torch::stable::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// f(double{}) or f(float{}).
template <class F>
void for_dtype(const torch::stable::Tensor& like, const F& f) {
  like.scalar_type() == torch::headeronly::ScalarType::Double ? f(double{}) : f(float{});
}

}  // namespace stablekern
