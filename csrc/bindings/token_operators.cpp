// Operators of tokens: softmax attention of packed q, k and v, layer norm, GELU's gradient.

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <climits>
#include <vector>

#include "bindings.h"
#include "checks.h"

namespace dcae_fast {

namespace {

// The checked arguments of softmax attention. Makes their device the current one while it exists.
struct PackedAttention {
  c10::cuda::CUDAGuard guard;
  DType dtype;
  int64_t batch;
  int tokens, heads, head_dim;

  PackedAttention(const at::Tensor& qkv, int64_t num_heads)
      : guard(on_cuda("qkv", qkv)), dtype(dtype_of("qkv", qkv.scalar_type())) {
    require_dense("qkv", qkv, qkv.sizes(), qkv.scalar_type(), qkv.device());
    require_value(qkv.dim() == 3 && num_heads > 0 && qkv.size(2) % (3 * num_heads) == 0,
                  "qkv must have shape [B, N, 3 * num_heads * D], got ", qkv.sizes());
    const int64_t dim = qkv.size(2) / (3 * num_heads);
    require_value(dim == 64 || dim == 72, "qkv must have 64 or 72 channels a head, got ", std::to_string(dim));
    require_value(qkv.size(1) > 0 && qkv.size(1) <= kMaxAttentionTokens, "qkv must have 1 to ",
                  std::to_string(kMaxAttentionTokens), " tokens, got ", std::to_string(qkv.size(1)));
    require_value(qkv.size(1) * qkv.size(2) <= INT_MAX / 2, "qkv is too large along one dimension: ", qkv.sizes());
    batch = qkv.size(0);
    tokens = static_cast<int>(qkv.size(1));
    heads = static_cast<int>(num_heads);
    head_dim = static_cast<int>(dim);
  }

  std::vector<int64_t> out_shape() const { return {batch, tokens, int64_t{heads} * head_dim}; }
  std::vector<int64_t> lse_shape() const { return {batch, heads, tokens}; }
};

const void* data_of(const MaybeTensor& x) { return x ? x->const_data_ptr() : nullptr; }

// Checks the tensors of a layer norm, and returns its shape. tokens: x, or its sum with the branch; half: the dtype of
// all tensors that are not in float32.
LayerNormShape layer_norm_shape(const char* name, const at::Tensor& tokens, const at::Tensor& scale,
                                const MaybeTensor& branch, const MaybeTensor& gate, at::ScalarType half) {
  const at::Device device = tokens.device();
  const DType dtype = dtype_of("dtype", half);
  const bool tokens_in_float32 = tokens.scalar_type() == at::kFloat;
  require_dense(name, tokens, tokens.sizes(), tokens_in_float32 ? at::kFloat : half, device);
  const int64_t width = tokens.size(2);
  const bool of_image = scale.dim() == 2, has_branch = branch.has_value();
  const std::vector<int64_t> of_each = {tokens.size(0), width}, of_all = {width};
  const bool scale_in_float32 = !of_image && scale.scalar_type() == at::kFloat;
  require_dense("scale", scale, of_image ? of_each : of_all, scale_in_float32 ? at::kFloat : half, device);
  require_value(has_branch == gate.has_value() && (of_image || !has_branch),
                "branch and gate: expected both, with a scale of each image, or neither");
  if (has_branch) {
    require_dense("branch", *branch, tokens.sizes(), half, device);
    require_dense("gate", *gate, of_each, half, device);
  }
  const int64_t images = of_image ? tokens.size(0) : 1;
  const int64_t tokens_of_each = of_image ? tokens.size(1) : tokens.size(0) * tokens.size(1);
  require_value(images <= INT_MAX && tokens_of_each <= INT_MAX / 2, name, " is too large: ", tokens.sizes());
  return {static_cast<int>(images),
          static_cast<int>(tokens_of_each),
          static_cast<int>(width),
          tokens_in_float32,
          scale_in_float32,
          of_image,
          dtype};
}

FiveTensors layer_norm_backward(const at::Tensor& dy, const MaybeTensor& dsum, const at::Tensor& total,
                                const at::Tensor& scale, const MaybeTensor& branch, const MaybeTensor& gate, double eps,
                                at::ScalarType dtype) {
  const at::Device device = on_cuda("dy", dy);
  const c10::cuda::CUDAGuard guard(device);
  dtype_of("dy", dy.scalar_type());
  require_value(total.dim() == 3 && has_layer_norm_gradient(total.size(2)) && total.numel() > 0,
                "total must have shape [B, N, 512 or 1152] and not be empty, got ", total.sizes());
  require_type(dtype == dy.scalar_type() || dtype == at::kFloat, "dtype must be ", dy.scalar_type(),
               " as dy or Float, got ", dtype);
  require_dense("dy", dy, total.sizes(), dy.scalar_type(), device);
  require_dense("total", total, total.sizes(), dtype, device);
  if (dsum) require_dense("dsum", *dsum, total.sizes(), dtype, device);
  const LayerNormShape shape = layer_norm_shape("total", total, scale, branch, gate, dy.scalar_type());

  int splits;
  C10_CUDA_CHECK(layer_norm_backward_splits(shape, &splits));
  const auto none = [&] { return at::empty({0}, total.options()); };
  at::Tensor dx = at::empty_like(total), dbranch = branch ? at::empty_like(*branch) : none();
  const at::Tensor partial =
      at::empty({branch ? 3 : 2, shape.images, splits, shape.width}, dy.options().dtype(at::kFloat));
  C10_CUDA_CHECK(launch_layer_norm_backward(
      {dy.const_data_ptr(), data_of(dsum), total.const_data_ptr(), scale.const_data_ptr(), data_of(branch),
       data_of(gate), dx.mutable_data_ptr(), dbranch.mutable_data_ptr(), partial.mutable_data_ptr<float>()},
      shape, splits, static_cast<float>(eps), c10::cuda::getCurrentCUDAStream()));
  const auto sum_like = [&](const at::Tensor& vector, int64_t place) {
    return partial.select(0, place).sum(1).view(vector.sizes()).to(vector.scalar_type());
  };
  return {dx, sum_like(scale, 0), sum_like(scale, 1), dbranch, branch ? sum_like(*gate, 2) : none()};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> packed_attention(const at::Tensor& qkv, int64_t num_heads) {
  const PackedAttention of(qkv, num_heads);
  at::Tensor out = at::empty(of.out_shape(), qkv.options());
  at::Tensor lse = at::empty(of.lse_shape(), qkv.options().dtype(at::kFloat));
  if (of.batch > 0) {
    C10_CUDA_CHECK(launch_packed_attention(qkv.const_data_ptr(), out.mutable_data_ptr(), lse.mutable_data_ptr<float>(),
                                           of.batch, of.tokens, of.heads, of.head_dim, of.dtype,
                                           c10::cuda::getCurrentCUDAStream()));
  }
  return {out, lse};
}

at::Tensor packed_attention_backward(const at::Tensor& dout, const at::Tensor& qkv, const at::Tensor& out,
                                     const at::Tensor& lse, int64_t num_heads) {
  const PackedAttention of(qkv, num_heads);
  require_dense("dout", dout, of.out_shape(), qkv.scalar_type(), qkv.device());
  require_dense("out", out, of.out_shape(), qkv.scalar_type(), qkv.device());
  require_dense("lse", lse, of.lse_shape(), at::kFloat, qkv.device());
  at::Tensor dqkv = at::empty_like(qkv);
  if (of.batch > 0) {
    C10_CUDA_CHECK(launch_packed_attention_backward(dout.const_data_ptr(), qkv.const_data_ptr(), out.const_data_ptr(),
                                                    lse.const_data_ptr<float>(), dqkv.mutable_data_ptr(), of.batch,
                                                    of.tokens, of.heads, of.head_dim, of.dtype,
                                                    c10::cuda::getCurrentCUDAStream()));
  }
  return dqkv;
}

std::tuple<at::Tensor, at::Tensor> layer_norm(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift,
                                              double eps, const MaybeTensor& branch, const MaybeTensor& gate,
                                              at::ScalarType dtype) {
  const c10::cuda::CUDAGuard guard(on_cuda("x", x));
  require_value(x.dim() == 3 && x.size(2) > 0 && x.size(2) % 8 == 0 && x.size(2) <= kLayerNormMostChannels,
                "x must have shape [B, N, D] with D a positive multiple of 8, at most ",
                std::to_string(kLayerNormMostChannels), ", got ", x.sizes());
  const LayerNormShape shape = layer_norm_shape("x", x, scale, branch, gate, dtype);
  require_dense("shift", shift, scale.sizes(), scale.scalar_type(), x.device());
  at::Tensor total = branch ? at::empty_like(x) : at::empty({0}, x.options());
  at::Tensor y = at::empty(x.sizes(), x.options().dtype(dtype));
  if (x.numel() > 0) {
    C10_CUDA_CHECK(launch_layer_norm({x.const_data_ptr(), scale.const_data_ptr(), shift.const_data_ptr(),
                                      data_of(branch), data_of(gate), total.mutable_data_ptr(), y.mutable_data_ptr()},
                                     shape, static_cast<float>(eps), c10::cuda::getCurrentCUDAStream()));
  }
  return {total, y};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> gelu_backward(const at::Tensor& dg, const at::Tensor& h,
                                                             const std::string& act, bool wants_g) {
  const at::Device device = on_cuda("h", h);
  const c10::cuda::CUDAGuard guard(device);
  const DType dtype = dtype_of("h", h.scalar_type());
  require_dense("h", h, h.sizes(), h.scalar_type(), device);
  require_dense("dg", dg, h.sizes(), h.scalar_type(), device);
  require_value(h.dim() > 0 && h.size(-1) > 0 && h.size(-1) % 8 == 0 && h.size(-1) <= INT_MAX / 2,
                "h must have a positive multiple of 8 columns, got ", h.sizes());
  require_value(act == "gelu" || act == "gelu_tanh", "act must be gelu or gelu_tanh, got ", act);
  const auto columns = static_cast<int>(h.size(-1));
  const int64_t rows = h.numel() / columns;
  int splits;
  C10_CUDA_CHECK(gelu_backward_splits(rows, columns, &splits));
  at::Tensor dh = at::empty_like(h), g = wants_g ? at::empty_like(h) : at::empty({0}, h.options());
  const at::Tensor sums = at::empty({splits, columns}, h.options().dtype(at::kFloat));
  C10_CUDA_CHECK(launch_gelu_backward(dg.const_data_ptr(), h.const_data_ptr(), dh.mutable_data_ptr(),
                                      wants_g ? g.mutable_data_ptr() : nullptr, sums.mutable_data_ptr<float>(), rows,
                                      columns, splits, act == "gelu_tanh", dtype, c10::cuda::getCurrentCUDAStream()));
  return {dh, g, sums.sum(0)};
}

void bind_token_operators(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("packed_attention", &packed_attention, py::arg("qkv"), py::arg("num_heads"),
             "Softmax attention of packed q, k and v, and the logarithm of the softmax's denominator.");
  module.def("packed_attention_backward", &packed_attention_backward, py::arg("dout"), py::arg("qkv"), py::arg("out"),
             py::arg("lse"), py::arg("num_heads"), "The gradient of packed_attention by qkv.");
  module.def("layer_norm", &layer_norm, py::arg("x"), py::arg("scale"), py::arg("shift"), py::arg("eps"),
             py::arg("branch"), py::arg("gate"), py::arg("dtype"),
             "x + gate * branch, or an empty tensor without a branch; and the sum's layer norm, scaled and shifted, in "
             "`dtype`.");
  module.def("layer_norm_backward", &layer_norm_backward, py::arg("dy"), py::arg("dsum"), py::arg("total"),
             py::arg("scale"), py::arg("branch"), py::arg("gate"), py::arg("eps"), py::arg("dtype"),
             "The gradients of x, scale, shift, branch and gate. `dtype`: of total and of the gradient of x.");
  module.def("gelu_backward", &gelu_backward, py::arg("dg"), py::arg("h"), py::arg("act"), py::arg("wants_g"),
             "The gradient of h from that of gelu(h); gelu(h), empty unless it is wanted; sums of the gradient over "
             "rows, in fp32.");
}

}  // namespace dcae_fast
