// Checks of arguments, and their messages. Messages are built without streams: streams of a statically linked C++
// library and of torch's C++ library do not mix.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/utils/pybind.h>

#include <string>

#include "kernels/ops.h"

namespace dcae_fast {

inline std::string text(const char* words) { return words; }
inline std::string text(const std::string& words) { return words; }
inline std::string text(at::ScalarType dtype) { return c10::toString(dtype); }
inline std::string text(at::Device device) { return device.str(); }
inline std::string text(at::IntArrayRef shape) {
  std::string numbers;
  for (const int64_t size : shape) numbers += (numbers.empty() ? "" : ", ") + std::to_string(size);
  return "[" + numbers + "]";
}

template <typename... Parts>
void require_value(bool satisfied, const Parts&... message) {
  if (!satisfied) throw pybind11::value_error((text(message) + ...));
}

template <typename... Parts>
void require_type(bool satisfied, const Parts&... message) {
  if (!satisfied) throw pybind11::type_error((text(message) + ...));
}

inline DType dtype_of(const char* name, at::ScalarType dtype) {
  require_type(dtype == at::kHalf || dtype == at::kBFloat16, name, " must be float16 or bfloat16, got ", dtype);
  return dtype == at::kHalf ? DType::kFloat16 : DType::kBFloat16;
}

// Checks that x is on a CUDA device, and returns the device.
inline at::Device on_cuda(const char* name, const at::Tensor& x) {
  require_value(x.is_cuda(), name, " must be on a CUDA device, got ", x.device());
  return x.device();
}

inline bool is_aligned(const at::Tensor& x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0; }

// Checks that x has this shape, dtype and device, is dense in row-major order, and aligned.
inline void require_dense(const char* name, const at::Tensor& x, at::IntArrayRef sizes, at::ScalarType dtype,
                          at::Device device) {
  require_value(x.sizes() == sizes, name, " must have shape ", sizes, ", got ", x.sizes());
  require_type(x.scalar_type() == dtype, name, " must be ", dtype, ", got ", x.scalar_type());
  require_value(x.device() == device, name, " must be on ", device, ", got ", x.device());
  require_value(x.is_contiguous(), name, " must be contiguous");
  require_value(is_aligned(x), name, " must be aligned to 16 bytes");
}

}  // namespace dcae_fast
