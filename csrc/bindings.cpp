// The Python module dcae_fast._C: each function checks its arguments, allocates the result, and launches.

#include "bindings.h"

#include <climits>
#include <optional>
#include <tuple>
#include <vector>

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "checks.h"
#include "ops.h"

namespace {

DType dtype_of(const char* name, const at::Tensor& x) {
  require_type(x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16, name,
               " must be float16 or bfloat16, got ", x.scalar_type());
  return x.scalar_type() == at::kHalf ? DType::kFloat16 : DType::kBFloat16;
}

// Checks that `tensor` is a dense parameter of the given shape on x's device; returns it in x's dtype.
at::Tensor parameter(const char* name, const at::Tensor& tensor, const at::Tensor& x, at::IntArrayRef shape) {
  require_value(tensor.sizes() == shape, name, " must have shape ", shape, ", got ", tensor.sizes());
  require_type(tensor.scalar_type() == x.scalar_type() || tensor.scalar_type() == at::kFloat, name, " must be ",
               x.scalar_type(), " as x or Float, got ", tensor.scalar_type());
  require_value(tensor.device() == x.device(), name, " must be on ", x.device(), ", got ", tensor.device());
  require_value(tensor.is_contiguous(), name, " must be contiguous");
  require_value(is_aligned(tensor), name, " must be aligned to 16 bytes");
  return tensor.to(x.scalar_type());
}

// Checks that `tensor` is dense in channels-last and aligned; returns where it starts.
const void* channels_last(const char* name, const at::Tensor& tensor) {
  on_cuda(name, tensor);
  require_value(tensor.dim() == 4 && tensor.is_contiguous(at::MemoryFormat::ChannelsLast), name,
                " must be dense in channels-last memory format");
  require_value(is_aligned(tensor), name, " must be aligned to 16 bytes");
  return tensor.const_data_ptr();
}

void require_int_sizes(const at::Tensor& x) {
  require_value(x.size(1) <= INT_MAX / 2 && x.size(2) <= INT_MAX / 2 && x.size(3) <= INT_MAX / 2,
                "x is too large along one dimension: ", x.sizes());
}

at::Tensor empty_channels_last(const at::Tensor& like, int64_t channels) {
  return at::empty({like.size(0), channels, like.size(2), like.size(3)}, like.options(),
                   at::MemoryFormat::ChannelsLast);
}

// The arguments of the convolution, checked, on the current device while this lives.
struct DepthwiseConvolution {
  const void* x;
  c10::cuda::CUDAGuard guard;
  DType dtype;
  int64_t batch;
  int height, width, channels;  // channels: of the result
  at::Tensor weight, bias;      // bias: may be undefined

  DepthwiseConvolution(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias)
      : x(channels_last("x", x)), guard(x.device()), dtype(dtype_of("x", x)), batch(x.size(0)) {
    require_value(x.size(1) > 0 && x.size(1) % 16 == 0,
                  "x must have shape [B, 2M, H, W] with M a positive multiple of 8, got ", x.sizes());
    require_int_sizes(x);
    height = static_cast<int>(x.size(2));
    width = static_cast<int>(x.size(3));
    channels = static_cast<int>(x.size(1) / 2);
    this->weight = parameter("weight", weight, x, {x.size(1), 1, 3, 3});
    if (bias) this->bias = parameter("bias", *bias, x, {x.size(1)});
  }

  const void* weight_data() const { return weight.const_data_ptr(); }
  const void* bias_data() const { return bias.defined() ? bias.const_data_ptr() : nullptr; }
};

at::Tensor depthwise_glu(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const DepthwiseConvolution conv(x, weight, bias);
  at::Tensor out = empty_channels_last(x, conv.channels);
  if (out.numel() > 0) {
    C10_CUDA_CHECK(launch_depthwise_glu(conv.x, conv.weight_data(), conv.bias_data(), out.mutable_data_ptr(),
                                        conv.batch, conv.height, conv.width, conv.channels, conv.dtype,
                                        c10::cuda::getCurrentCUDAStream()));
  }
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> depthwise_glu_backward(const at::Tensor& dout, const at::Tensor& x,
                                                                      const at::Tensor& weight,
                                                                      const at::Tensor& bias, bool parameters) {
  const DepthwiseConvolution conv(x, weight, bias);
  const void* dout_data = channels_last("dout", dout);
  const std::vector<int64_t> shape = {x.size(0), conv.channels, x.size(2), x.size(3)};
  require_value(dout.sizes() == shape, "dout must have shape ", shape, ", got ", dout.sizes());
  require_type(dout.scalar_type() == x.scalar_type(), "dout must be ", x.scalar_type(), " as x, got ",
               dout.scalar_type());
  require_value(dout.device() == x.device(), "dout must be on ", x.device(), ", got ", dout.device());

  at::Tensor dx = empty_channels_last(x, x.size(1));
  const auto none = [&] { return at::empty({0}, x.options()); };
  if (x.numel() == 0) {
    return {dx, parameters ? at::zeros_like(weight) : none(), parameters ? at::zeros_like(bias) : none()};
  }
  const auto channels = static_cast<int>(x.size(1));
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  int splits;
  C10_CUDA_CHECK(depthwise_backward_splits(conv.batch, conv.height, conv.width, channels, &splits));
  const at::Tensor dconv = at::empty_like(dx);
  const at::Tensor partial = at::empty({splits, 10, channels}, x.options().dtype(at::kFloat));
  C10_CUDA_CHECK(launch_depthwise_glu_gate_backward(dout_data, conv.x, conv.weight_data(), conv.bias_data(),
                                                    dconv.mutable_data_ptr(), conv.batch, conv.height, conv.width,
                                                    conv.channels, conv.dtype, stream));
  C10_CUDA_CHECK(launch_depthwise_backward(dconv.const_data_ptr(), conv.x, conv.weight_data(), dx.mutable_data_ptr(),
                                           partial.mutable_data_ptr(), conv.batch, conv.height, conv.width, channels,
                                           conv.dtype, stream));
  if (!parameters) return {dx, none(), none()};
  const at::Tensor sums = partial.sum(0);
  at::Tensor dweight = at::empty_like(weight);
  dweight.view({channels, 9}).copy_(sums.narrow(0, 0, 9).t());
  return {dx, dweight, sums.select(0, 9).to(bias.scalar_type())};
}

at::Tensor relu_linear_attention(const std::vector<at::Tensor>& qkvs, int64_t head_dim, double eps) {
  constexpr int kHeadDim = 32;
  require_value(head_dim == kHeadDim, "head_dim must be 32, got ", std::to_string(head_dim));
  require_value(!qkvs.empty(), "qkvs is empty; expected at least one packed qkv tensor");
  const at::Tensor& first = qkvs[0];
  int64_t channels = 0;
  for (const at::Tensor& qkv : qkvs) {
    channels_last("qkv", qkv);
    require_type(qkv.scalar_type() == first.scalar_type(), "qkv must be ", first.scalar_type(), " as the first, got ",
                 qkv.scalar_type());
    require_value(qkv.device() == first.device(), "qkv must be on ", first.device(), ", got ", qkv.device());
    require_value(qkv.size(0) == first.size(0) && qkv.sizes().slice(2) == first.sizes().slice(2) &&
                      qkv.size(1) % (3 * kHeadDim) == 0,
                  "qkv must have the first one's batch and size and a multiple of 96 channels, got ", qkv.sizes());
    channels += qkv.size(1) / 3;
  }
  const DType dtype = dtype_of("qkv", first);
  const int64_t positions = first.size(2) * first.size(3);
  require_value(positions <= INT_MAX / 2 && channels <= INT_MAX / 3, "qkv is too large: ", first.sizes());

  const c10::cuda::CUDAGuard guard(first.device());
  at::Tensor out = empty_channels_last(first, channels);
  auto* target = static_cast<uint16_t*>(out.mutable_data_ptr());
  for (const at::Tensor& qkv : qkvs) {
    if (qkv.numel() == 0) continue;
    const int heads = static_cast<int>(qkv.size(1) / (3 * kHeadDim));
    C10_CUDA_CHECK(launch_relu_linear_attention(qkv.const_data_ptr(), target, qkv.size(0), static_cast<int>(positions),
                                                heads, static_cast<int>(channels), static_cast<float>(eps), dtype,
                                                c10::cuda::getCurrentCUDAStream()));
    target += heads * kHeadDim;
  }
  return out;
}

at::Tensor multiscale_qkv(const at::Tensor& x, const at::Tensor& depthwise, const at::Tensor& grouped) {
  constexpr int kGroup = 32, kSize = 5;
  const void* x_data = channels_last("x", x);
  const c10::cuda::CUDAGuard guard(x.device());
  const DType dtype = dtype_of("x", x);
  require_value(x.size(1) > 0 && x.size(1) % kGroup == 0,
                "x must have shape [B, C, H, W] with C a positive multiple of 32, got ", x.sizes());
  require_int_sizes(x);
  const at::Tensor taps = parameter("depthwise", depthwise, x, {x.size(1), 1, kSize, kSize});
  const at::Tensor matrices = parameter("grouped", grouped, x, {x.size(1), kGroup, 1, 1});
  at::Tensor out = empty_channels_last(x, x.size(1));
  if (out.numel() > 0) {
    C10_CUDA_CHECK(launch_multiscale_qkv(x_data, taps.const_data_ptr(), matrices.const_data_ptr(),
                                         out.mutable_data_ptr(), x.size(0), static_cast<int>(x.size(2)),
                                         static_cast<int>(x.size(3)), static_cast<int>(x.size(1)), dtype,
                                         c10::cuda::getCurrentCUDAStream()));
  }
  return out;
}

// The arguments of softmax attention, checked, on the current device while this lives.
struct PackedAttention {
  c10::cuda::CUDAGuard guard;
  DType dtype;
  int64_t batch;
  int tokens, heads, head_dim;

  PackedAttention(const at::Tensor& qkv, int64_t num_heads) : guard(on_cuda("qkv", qkv)), dtype(dtype_of("qkv", qkv)) {
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

using FiveTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

FiveTensors layer_norm_backward(const at::Tensor& dy, const std::optional<at::Tensor>& dsum, const at::Tensor& total,
                                const at::Tensor& scale, const std::optional<at::Tensor>& branch,
                                const std::optional<at::Tensor>& gate, double eps, at::ScalarType dtype) {
  const at::Device device = on_cuda("dy", dy);
  const c10::cuda::CUDAGuard guard(device);
  const DType half = dtype_of("dy", dy);
  require_value(total.dim() == 3 && total.size(2) == kLayerNormWidth && total.numel() > 0,
                "total must have shape [B, N, ", std::to_string(kLayerNormWidth), "] and not be empty, got ",
                total.sizes());
  require_type(dtype == dy.scalar_type() || dtype == at::kFloat, "dtype must be ", dy.scalar_type(),
               " as dy or Float, got ", dtype);
  require_dense("dy", dy, total.sizes(), dy.scalar_type(), device);
  require_dense("total", total, total.sizes(), dtype, device);
  if (dsum) require_dense("dsum", *dsum, total.sizes(), dtype, device);
  const bool of_image = scale.dim() == 2, has_branch = branch.has_value();
  const std::vector<int64_t> of_each = {total.size(0), kLayerNormWidth}, of_all = {kLayerNormWidth};
  const bool scale_in_float32 = !of_image && scale.scalar_type() == at::kFloat;
  require_dense("scale", scale, of_image ? of_each : of_all, scale_in_float32 ? at::kFloat : dy.scalar_type(), device);
  require_value(has_branch == gate.has_value() && (of_image || !has_branch),
                "branch and gate: expected both, with a scale of each image, or neither");
  if (has_branch) {
    require_dense("branch", *branch, total.sizes(), dy.scalar_type(), device);
    require_dense("gate", *gate, of_each, dy.scalar_type(), device);
  }
  const int64_t images = of_image ? total.size(0) : 1, tokens = total.size(0) * total.size(1) / images;
  require_value(images <= INT_MAX && tokens <= INT_MAX / 2, "total is too large: ", total.sizes());

  const LayerNormShape shape{static_cast<int>(images), static_cast<int>(tokens), dtype == at::kFloat,
                             scale_in_float32,         of_image,                 half};
  int splits;
  C10_CUDA_CHECK(layer_norm_backward_splits(shape, &splits));
  const auto none = [&] { return at::empty({0}, total.options()); };
  at::Tensor dx = at::empty_like(total), dbranch = has_branch ? at::empty_like(*branch) : none();
  const at::Tensor partial =
      at::empty({has_branch ? 3 : 2, images, splits, kLayerNormWidth}, dy.options().dtype(at::kFloat));
  C10_CUDA_CHECK(launch_layer_norm_backward(
      {dy.const_data_ptr(), dsum ? dsum->const_data_ptr() : nullptr, total.const_data_ptr(), scale.const_data_ptr(),
       has_branch ? branch->const_data_ptr() : nullptr, has_branch ? gate->const_data_ptr() : nullptr,
       dx.mutable_data_ptr(), dbranch.mutable_data_ptr(), partial.mutable_data_ptr<float>()},
      shape, splits, static_cast<float>(eps), c10::cuda::getCurrentCUDAStream()));
  const auto sum_like = [&](const at::Tensor& vector, int64_t place) {
    return partial.select(0, place).sum(1).view(vector.sizes()).to(vector.scalar_type());
  };
  return {dx, sum_like(scale, 0), sum_like(scale, 1), dbranch, has_branch ? sum_like(*gate, 2) : none()};
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.def("depthwise_glu", &depthwise_glu, pybind11::arg("x"), pybind11::arg("weight"), pybind11::arg("bias"),
             "c[:, :M] * silu(c[:, M:]) with c the depthwise 3x3 convolution of x, in channels-last.");
  module.def("depthwise_glu_backward", &depthwise_glu_backward, pybind11::arg("dout"), pybind11::arg("x"),
             pybind11::arg("weight"), pybind11::arg("bias"), pybind11::arg("parameters") = true,
             "The gradients of depthwise_glu by x, weight and bias; without `parameters` the last two are empty.");
  module.def("packed_attention", &packed_attention, pybind11::arg("qkv"), pybind11::arg("num_heads"),
             "Softmax attention of packed q, k and v, and the logarithm of its denominator.");
  module.def("packed_attention_backward", &packed_attention_backward, pybind11::arg("dout"), pybind11::arg("qkv"),
             pybind11::arg("out"), pybind11::arg("lse"), pybind11::arg("num_heads"),
             "The gradient of packed_attention by qkv.");
  module.def("layer_norm_backward", &layer_norm_backward, pybind11::arg("dy"), pybind11::arg("dsum"),
             pybind11::arg("total"), pybind11::arg("scale"), pybind11::arg("branch"), pybind11::arg("gate"),
             pybind11::arg("eps"), pybind11::arg("dtype"),
             "The gradients of x, in `dtype` as total is, of scale, shift, branch and gate: of a layer norm of tokens, "
             "and of a gated branch that was added before it.");
  module.def("relu_linear_attention", &relu_linear_attention, pybind11::arg("qkvs"), pybind11::arg("head_dim"),
             pybind11::arg("eps"), "ReLU linear attention of packed qkv tensors in channels-last, side by side.");
  module.def("multiscale_qkv", &multiscale_qkv, pybind11::arg("x"), pybind11::arg("depthwise"),
             pybind11::arg("grouped"), "Grouped 1x1 convolution of the depthwise 5x5 one of x, in channels-last.");
#ifdef DCAE_FAST_CUDNN
  bind_convolution(module);
#endif
#ifdef DCAE_FAST_CUBLASLT
  bind_linear(module);
#endif
}
