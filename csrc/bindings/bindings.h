// Declarations that the files of the Python module dcae_fast._C share.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <tuple>

namespace dcae_fast {

using MaybeTensor = std::optional<at::Tensor>;
using FiveTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

void bind_autocast(pybind11::module_& module);
void bind_block_halves(pybind11::module_& module);
void bind_convolution(pybind11::module_& module);
void bind_image_operators(pybind11::module_& module);
void bind_product(pybind11::module_& module);
void bind_scaled_product(pybind11::module_& module);
void bind_signature(pybind11::module_& module);
void bind_token_operators(pybind11::module_& module);

// In autocast.cpp; block_halves.cpp calls it too.
at::Tensor autocast_cast(const at::Tensor& weight, at::ScalarType dtype, bool trains);

// Operators of token_operators.cpp, which block_halves.cpp calls too.
std::tuple<at::Tensor, at::Tensor> packed_attention(const at::Tensor& qkv, int64_t num_heads);
at::Tensor packed_attention_backward(const at::Tensor& dout, const at::Tensor& qkv, const at::Tensor& out,
                                     const at::Tensor& lse, int64_t num_heads);
std::tuple<at::Tensor, at::Tensor> layer_norm(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift,
                                              double eps, const MaybeTensor& branch, const MaybeTensor& gate,
                                              at::ScalarType dtype);
std::tuple<at::Tensor, at::Tensor, at::Tensor> gelu_backward(const at::Tensor& dg, const at::Tensor& h,
                                                             const std::string& act, bool wants_g);

}  // namespace dcae_fast
