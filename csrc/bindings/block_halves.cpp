// The halves of a transformer block: one call for the forward of each, and one for its backward from out to y. The same
// steps as in NormAttention and NormMlp, in dcae_fast/ops/norm_attention.py and norm_mlp.py, which have the formulas:
// calls of the single operators from Python take longer than a small batch takes to compute.

#include <c10/cuda/CUDAGuard.h>

#include <tuple>

#include "checks.h"
#include "product.h"

namespace dcae_fast {

namespace {

using FourTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using SixTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// y · weightᵀ with the plan's epilogue. Weight and bias are converted to the types that the plan takes. Autocast keeps
// the copies in inference.
std::vector<at::Tensor> linear(const BoundProductPlan& plan, const at::Tensor& y, const at::Tensor& weight,
                               const MaybeTensor& bias, const MaybeTensor& residual, bool trains) {
  const MaybeTensor vector = bias ? MaybeTensor(autocast_cast(*bias, plan.out_dtype, trains)) : bias;
  return plan(y, autocast_cast(weight, plan.dtype, trains), vector, residual);
}

at::Tensor linear_backward_input(const BoundProductPlan& plan, const at::Tensor& dy, const at::Tensor& weight) {
  return plan(dy, weight.to(plan.dtype), std::nullopt, std::nullopt)[0];
}

at::Tensor as_rows(const at::Tensor& x) { return x.reshape({-1, x.size(-1)}); }

// The gradients of weight and bias. The plan also sums dy if there is a bias; without one its gradient is empty.
std::tuple<at::Tensor, at::Tensor> linear_backward_weight(const BoundProductPlan& plan, const at::Tensor& dy,
                                                          const at::Tensor& x, const MaybeTensor& bias) {
  const std::vector<at::Tensor> found = plan(as_rows(dy), as_rows(x), std::nullopt, std::nullopt);
  return {found[0], bias ? found[1].to(bias->scalar_type()) : found[0].new_empty(0)};
}

SixTensors norm_attention(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift, double eps,
                          const MaybeTensor& branch, const MaybeTensor& gate, at::ScalarType dtype,
                          const at::Tensor& w_in, const MaybeTensor& b_in, const at::Tensor& w_out,
                          const MaybeTensor& b_out, bool residual, int64_t num_heads, bool trains,
                          const BoundProductPlan& in_plan, const BoundProductPlan& out_plan) {
  const auto [total, y] = layer_norm(x, scale, shift, eps, branch, gate, dtype);
  const MaybeTensor added = residual ? MaybeTensor(branch ? total : x) : std::nullopt;
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor qkv = linear(in_plan, y, w_in, b_in, std::nullopt, trains)[0];
  const auto [attended, lse] = packed_attention(qkv, num_heads);
  const at::Tensor out = linear(out_plan, attended, w_out, b_out, added, trains)[0];
  return {out, total, y, qkv, attended, lse};
}

FiveTensors norm_attention_backward(const at::Tensor& dout, const at::Tensor& y, const at::Tensor& qkv,
                                    const at::Tensor& attended, const at::Tensor& lse, const at::Tensor& w_in,
                                    const MaybeTensor& b_in, const at::Tensor& w_out, const MaybeTensor& b_out,
                                    int64_t num_heads, const BoundProductPlan& in_plan,
                                    const BoundProductPlan& w_in_plan, const BoundProductPlan& out_plan,
                                    const BoundProductPlan& w_out_plan) {
  const c10::cuda::CUDAGuard guard(y.device());
  const at::Tensor dhalf = dout.to(y.scalar_type());
  const at::Tensor dattended = linear_backward_input(out_plan, dhalf, w_out);
  const auto [dw_out, db_out] = linear_backward_weight(w_out_plan, dhalf, attended, b_out);
  const at::Tensor dqkv = packed_attention_backward(dattended, qkv, attended, lse, num_heads);
  const auto [dw_in, db_in] = linear_backward_weight(w_in_plan, dqkv, y, b_in);
  return {linear_backward_input(in_plan, dqkv, w_in), dw_in, db_in, dw_out, db_out};
}

// The activation is part of in_plan.
FourTensors norm_mlp(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift, double eps,
                     const MaybeTensor& branch, const MaybeTensor& gate, at::ScalarType dtype, const at::Tensor& w_in,
                     const MaybeTensor& b_in, const at::Tensor& w_out, const MaybeTensor& b_out, bool residual,
                     const std::string& /*act*/, bool trains, const BoundProductPlan& in_plan,
                     const BoundProductPlan& out_plan) {
  const auto [total, y] = layer_norm(x, scale, shift, eps, branch, gate, dtype);
  const MaybeTensor added = residual ? MaybeTensor(branch ? total : x) : std::nullopt;
  const c10::cuda::CUDAGuard guard(x.device());
  // gelu(h), and h if it is kept
  const std::vector<at::Tensor> hidden = linear(in_plan, y, w_in, b_in, std::nullopt, trains);
  const at::Tensor out = linear(out_plan, hidden[0], w_out, b_out, added, trains)[0];
  if (trains) return {out, total, y, hidden.at(1)};
  return {out, total, y.new_empty(0), y.new_empty(0)};
}

FiveTensors norm_mlp_backward(const at::Tensor& dout, const at::Tensor& y, const at::Tensor& h, const at::Tensor& w_in,
                              const MaybeTensor& b_in, const at::Tensor& w_out, const MaybeTensor& b_out,
                              const std::string& act, const BoundProductPlan& in_plan,
                              const BoundProductPlan& w_in_plan, const BoundProductPlan& out_plan,
                              const BoundProductPlan& w_out_plan) {
  const c10::cuda::CUDAGuard guard(y.device());
  const at::Tensor dhalf = dout.to(y.scalar_type());
  auto [dh, g, sums] = gelu_backward(linear_backward_input(out_plan, dhalf, w_out), h, act, true);
  const auto [dw_out, db_out] = linear_backward_weight(w_out_plan, dhalf, g, b_out);
  g.reset();  // as large as dh
  const auto [dw_in, none] = linear_backward_weight(w_in_plan, dh, y, std::nullopt);
  const at::Tensor db_in = b_in ? sums.to(b_in->scalar_type()) : none;
  return {linear_backward_input(in_plan, dh, w_in), dw_in, db_in, dw_out, db_out};
}

}  // namespace

// Called by dcae_fast/ops only, with all arguments by place.
void bind_block_halves(pybind11::module_& module) {
  const auto no_gil = pybind11::call_guard<pybind11::gil_scoped_release>();
  module.def("norm_attention", &norm_attention, "out, s if there is a branch, y, qkv, attended and lse.", no_gil);
  module.def("norm_attention_backward", &norm_attention_backward,
             "The gradients of y, w_in, b_in, w_out and b_out; empty for a bias that is None.", no_gil);
  module.def("norm_mlp", &norm_mlp, "out, s if there is a branch, y and h; the last two only if `trains`.", no_gil);
  module.def("norm_mlp_backward", &norm_mlp_backward,
             "The gradients of y, w_in, b_in, w_out and b_out; empty for a bias that is None.", no_gil);
}

}  // namespace dcae_fast
