// The halves of a transformer's block, each in one call, made of the same parts as in dcae_fast/ops/block_halves.py,
// which has the formulas: a call of each part from Python takes longer than a small batch takes to compute.

#include <tuple>

#include <c10/cuda/CUDAGuard.h>

#include "checks.h"
#include "product.h"

namespace dcae_fast {

namespace {

at::Tensor operand(const at::Tensor& x, at::ScalarType dtype) {
  const at::Tensor converted = x.to(dtype);
  return is_aligned(converted) ? converted : converted.clone();
}

// What a plan gives for y · weightᵀ, with weight and bias in the types that it takes.
std::vector<at::Tensor> layer(const BoundProductPlan& plan, const at::Tensor& y, const at::Tensor& weight,
                              const MaybeTensor& bias, const MaybeTensor& residual = std::nullopt) {
  MaybeTensor vector;
  if (bias) vector = operand(*bias, plan.out_dtype);
  return plan(y, operand(weight, plan.dtype), vector, residual);
}

using SixTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// out, s if there is a branch, and what is kept for the gradient.
SixTensors norm_attention(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift, double eps,
                          const MaybeTensor& branch, const MaybeTensor& gate, at::ScalarType dtype,
                          const at::Tensor& w_qkv, const MaybeTensor& b_qkv, const at::Tensor& w_proj,
                          const MaybeTensor& b_proj, int64_t num_heads, bool residual,
                          const BoundProductPlan& qkv_plan, const BoundProductPlan& proj_plan) {
  const auto [total, y] = layer_norm(x, scale, shift, eps, branch, gate, dtype);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor qkv = layer(qkv_plan, y, w_qkv, b_qkv)[0];
  const auto [attended, lse] = packed_attention(qkv, num_heads);
  const MaybeTensor added = residual ? MaybeTensor(branch ? total : x) : std::nullopt;
  return {layer(proj_plan, attended, w_proj, b_proj, added)[0], total, y, qkv, attended, lse};
}

using FourTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The same of the other half; without a plan that gives the preactivation nothing is kept.
FourTensors norm_mlp(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift, double eps,
                     const MaybeTensor& branch, const MaybeTensor& gate, at::ScalarType dtype, const at::Tensor& w1,
                     const MaybeTensor& b1, const at::Tensor& w2, const MaybeTensor& b2, bool residual,
                     const BoundProductPlan& first_plan, const BoundProductPlan& second_plan) {
  const auto [total, y] = layer_norm(x, scale, shift, eps, branch, gate, dtype);
  const c10::cuda::CUDAGuard guard(x.device());
  const std::vector<at::Tensor> hidden = layer(first_plan, y, w1, b1);
  const MaybeTensor added = residual ? MaybeTensor(branch ? total : x) : std::nullopt;
  const at::Tensor out = layer(second_plan, hidden[0], w2, b2, added)[0];
  if (hidden.size() == 2) return {out, total, y, hidden[1]};
  return {out, total, y.new_empty(0), y.new_empty(0)};
}

at::Tensor as_rows(const at::Tensor& x) { return x.reshape({-1, x.size(-1)}); }

// Of a layer's weight, and of its bias, empty without one, from dy and the layer's x. The plan sums dy for a bias.
std::tuple<at::Tensor, at::Tensor> parameter_gradients(const BoundProductPlan& plan, const at::Tensor& dy,
                                                       const at::Tensor& x, const MaybeTensor& bias) {
  const std::vector<at::Tensor> found = plan(as_rows(dy), as_rows(x), std::nullopt, std::nullopt);
  return {found[0], bias ? found[1].to(bias->scalar_type()) : found[0].new_empty(0)};
}

at::Tensor input_gradient(const BoundProductPlan& plan, const at::Tensor& dy, const at::Tensor& weight) {
  return plan(dy, operand(weight, plan.dtype), std::nullopt, std::nullopt)[0];
}

// The gradients of y, the result of the norm, and of both layers' weights and biases; those of no bias are empty.
FiveTensors norm_attention_backward(const at::Tensor& dout, const at::Tensor& y, const at::Tensor& qkv,
                                     const at::Tensor& attended, const at::Tensor& lse, const at::Tensor& w_qkv,
                                     const MaybeTensor& b_qkv, const at::Tensor& w_proj, const MaybeTensor& b_proj,
                                     int64_t num_heads, const BoundProductPlan& qkv_plan,
                                     const BoundProductPlan& w_qkv_plan, const BoundProductPlan& proj_plan,
                                     const BoundProductPlan& w_proj_plan) {
  const c10::cuda::CUDAGuard guard(y.device());
  const at::Tensor dy = operand(dout, y.scalar_type());
  const at::Tensor dattended = input_gradient(proj_plan, dy, w_proj);
  const auto [dw_proj, db_proj] = parameter_gradients(w_proj_plan, dy, attended, b_proj);
  const at::Tensor dqkv = packed_attention_backward(dattended, qkv, attended, lse, num_heads);
  const auto [dw_qkv, db_qkv] = parameter_gradients(w_qkv_plan, dqkv, y, b_qkv);
  return {input_gradient(qkv_plan, dqkv, w_qkv), dw_qkv, db_qkv, dw_proj, db_proj};
}

// The same of the other half; gelu(h) is computed again, and the first layer's bias has its gradient from there.
FiveTensors norm_mlp_backward(const at::Tensor& dout, const at::Tensor& y, const at::Tensor& h, const at::Tensor& w1,
                               const MaybeTensor& b1, const at::Tensor& w2, const MaybeTensor& b2,
                               const std::string& act, const BoundProductPlan& first_plan,
                               const BoundProductPlan& w1_plan, const BoundProductPlan& second_plan,
                               const BoundProductPlan& w2_plan) {
  const c10::cuda::CUDAGuard guard(y.device());
  const at::Tensor dy = operand(dout, y.scalar_type());
  auto [dh, g, sums] = gelu_gradient(input_gradient(second_plan, dy, w2), h, act, true);
  const auto [dw2, db2] = parameter_gradients(w2_plan, dy, g, b2);
  g.reset();  // as large as dh
  const auto [dw1, none] = parameter_gradients(w1_plan, dh, y, std::nullopt);
  return {input_gradient(first_plan, dh, w1), dw1, b1 ? sums.to(b1->scalar_type()) : none, dw2, db2};
}

}  // namespace

void bind_block_halves(pybind11::module_& module) {
  namespace py = pybind11;
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  module.def("norm_attention", &norm_attention, py::arg("x"), py::arg("scale"), py::arg("shift"), py::arg("eps"),
             py::arg("branch"), py::arg("gate"), py::arg("dtype"), py::arg("w_qkv"), py::arg("b_qkv"),
             py::arg("w_proj"), py::arg("b_proj"), py::arg("num_heads"), py::arg("residual"), py::arg("qkv_plan"),
             py::arg("proj_plan"), "A block's half with attention, through plans for its linear layers.", no_gil);
  module.def("norm_mlp", &norm_mlp, py::arg("x"), py::arg("scale"), py::arg("shift"), py::arg("eps"),
             py::arg("branch"), py::arg("gate"), py::arg("dtype"), py::arg("w1"), py::arg("b1"), py::arg("w2"),
             py::arg("b2"), py::arg("residual"), py::arg("first_plan"), py::arg("second_plan"),
             "A block's half with the MLP, through plans for its linear layers.", no_gil);
  module.def("norm_attention_backward", &norm_attention_backward, py::arg("dout"), py::arg("y"), py::arg("qkv"),
             py::arg("attended"), py::arg("lse"), py::arg("w_qkv"), py::arg("b_qkv"), py::arg("w_proj"),
             py::arg("b_proj"), py::arg("num_heads"), py::arg("qkv_plan"), py::arg("w_qkv_plan"),
             py::arg("proj_plan"), py::arg("w_proj_plan"),
             "The gradients of the norm's result and of both layers' parameters, each from its plan.", no_gil);
  module.def("norm_mlp_backward", &norm_mlp_backward, py::arg("dout"), py::arg("y"), py::arg("h"), py::arg("w1"),
             py::arg("b1"), py::arg("w2"), py::arg("b2"), py::arg("act"), py::arg("first_plan"), py::arg("w1_plan"),
             py::arg("second_plan"), py::arg("w2_plan"),
             "The gradients of the norm's result and of both layers' parameters, each from its plan.", no_gil);
}

}  // namespace dcae_fast
