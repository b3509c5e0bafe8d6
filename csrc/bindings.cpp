// The Python module dcae_fast._C: each function checks its arguments, allocates the result, and launches.

#include "bindings.h"

#include <climits>
#include <optional>

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "checks.h"
#include "ops.h"

namespace {

DType dtype_of(const at::Tensor& x) {
  require_type(x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16,
               "x must be float16 or bfloat16, got ", x.scalar_type());
  return x.scalar_type() == at::kHalf ? DType::kFloat16 : DType::kBFloat16;
}

// Checks that `tensor` is a dense parameter of x's dtype and device with the given shape; returns where it starts.
const void* parameter(const char* name, const at::Tensor& tensor, const at::Tensor& x, at::IntArrayRef shape) {
  require_value(tensor.sizes() == shape, name, " must have shape ", shape, ", got ", tensor.sizes());
  require_type(tensor.scalar_type() == x.scalar_type(), name, " must be ", x.scalar_type(), " as x, got ",
               tensor.scalar_type());
  require_value(tensor.device() == x.device(), name, " must be on ", x.device(), ", got ", tensor.device());
  require_value(tensor.is_contiguous(), name, " must be contiguous");
  require_value(is_aligned(tensor), name, " must be aligned to 16 bytes");
  return tensor.const_data_ptr();
}

at::Tensor depthwise_glu(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  require_value(x.is_cuda(), "x must be on a CUDA device, got ", x.device());
  require_value(x.dim() == 4 && x.size(1) > 0 && x.size(1) % 16 == 0,
                "x must have shape [B, 2M, H, W] with M a positive multiple of 8, got ", x.sizes());
  require_value(x.is_contiguous(at::MemoryFormat::ChannelsLast), "x must be dense in channels-last memory format");
  require_value(is_aligned(x), "x must be aligned to 16 bytes");
  require_value(x.size(1) <= INT_MAX && x.size(2) <= INT_MAX / 2 && x.size(3) <= INT_MAX / 2,
                "x is too large along one dimension: ", x.sizes());
  const int64_t channels = x.size(1) / 2;
  const DType dtype = dtype_of(x);
  const void* weight_data = parameter("weight", weight, x, {2 * channels, 1, 3, 3});
  const void* bias_data = bias ? parameter("bias", *bias, x, {2 * channels}) : nullptr;

  const c10::cuda::CUDAGuard guard(x.device());
  at::Tensor out = at::empty({x.size(0), channels, x.size(2), x.size(3)}, x.options(), at::MemoryFormat::ChannelsLast);
  if (out.numel() > 0) {
    C10_CUDA_CHECK(launch_depthwise_glu(x.const_data_ptr(), weight_data, bias_data, out.mutable_data_ptr(), x.size(0),
                                        static_cast<int>(x.size(2)), static_cast<int>(x.size(3)),
                                        static_cast<int>(channels), dtype, c10::cuda::getCurrentCUDAStream()));
  }
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.def("depthwise_glu", &depthwise_glu, pybind11::arg("x"), pybind11::arg("weight"), pybind11::arg("bias"),
             "c[:, :M] * silu(c[:, M:]) with c the depthwise 3x3 convolution of x, in channels-last; inference alone.");
#ifdef DCAE_FAST_CUDNN
  bind_convolution(module);
#endif
}
