// Operators of images, channels-last. Each function checks its arguments, allocates the result, and launches the
// kernels.

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <climits>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "checks.h"
#include "kernels/ops.h"

namespace dcae_fast {

namespace {

// Checks that `tensor` is a dense parameter of the given shape on x's device. Returns it in x's dtype.
at::Tensor parameter(const char* name, const at::Tensor& tensor, const at::Tensor& x, at::IntArrayRef shape) {
  require_value(tensor.sizes() == shape, name, " must have shape ", shape, ", got ", tensor.sizes());
  require_type(tensor.scalar_type() == x.scalar_type() || tensor.scalar_type() == at::kFloat, name, " must be ",
               x.scalar_type(), " as x or Float, got ", tensor.scalar_type());
  require_value(tensor.device() == x.device(), name, " must be on ", x.device(), ", got ", tensor.device());
  require_value(tensor.is_contiguous(), name, " must be contiguous");
  require_value(is_aligned(tensor), name, " must be aligned to 16 bytes");
  return tensor.to(x.scalar_type());
}

// Checks that `tensor` is dense in channels-last memory format, and aligned. Returns the address of its data.
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

at::Tensor empty_channels_last(const at::Tensor& like, int64_t channels, bool as_int8 = false) {
  const auto options = as_int8 ? like.options().dtype(at::kChar) : like.options();
  return at::empty({like.size(0), channels, like.size(2), like.size(3)}, options, at::MemoryFormat::ChannelsLast);
}

// Checks the factors of the channels of an int8 result. Returns the address of their data, null without factors.
const float* factors(const MaybeTensor& out_factor, const at::Tensor& x, int64_t channels) {
  if (!out_factor) return nullptr;
  require_dense("out_factor", *out_factor, channels, at::kFloat, x.device());
  return out_factor->const_data_ptr<float>();
}

// Checks dout, the gradient of a result of this shape. Returns the address of its data.
const void* gradient(const at::Tensor& dout, const at::Tensor& x, at::IntArrayRef shape) {
  const void* data = channels_last("dout", dout);
  require_value(dout.sizes() == shape, "dout must have shape ", shape, ", got ", dout.sizes());
  require_type(dout.scalar_type() == x.scalar_type(), "dout must be ", x.scalar_type(), " as x, got ",
               dout.scalar_type());
  require_value(dout.device() == x.device(), "dout must be on ", x.device(), ", got ", dout.device());
  return data;
}

// The checked arguments of the depthwise convolution. Makes their device the current one while it exists.
struct DepthwiseConvolution {
  const void* x;
  c10::cuda::CUDAGuard guard;
  DType dtype;
  int64_t batch;
  int height, width, channels;  // channels: of the gated unit's result
  at::Tensor weight, bias;      // bias may be undefined

  DepthwiseConvolution(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias)
      : x(channels_last("x", x)), guard(x.device()), dtype(dtype_of("x", x.scalar_type())), batch(x.size(0)) {
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

// out_factor: of an int8 result; none for a result in x's dtype.
at::Tensor gated_unit(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias,
                      const MaybeTensor& out_factor) {
  const DepthwiseConvolution conv(x, weight, bias);
  const float* factor = factors(out_factor, x, conv.channels);
  at::Tensor out = empty_channels_last(x, conv.channels, factor != nullptr);
  if (out.numel() > 0) {
    C10_CUDA_CHECK(launch_depthwise_glu(conv.x, conv.weight_data(), conv.bias_data(), out.mutable_data_ptr(), factor,
                                        conv.batch, conv.height, conv.width, conv.channels, conv.dtype,
                                        c10::cuda::getCurrentCUDAStream()));
  }
  return out;
}

at::Tensor depthwise_glu(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias) {
  return gated_unit(x, weight, bias, std::nullopt);
}

at::Tensor depthwise_glu_int8(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias,
                              const at::Tensor& out_factor) {
  return gated_unit(x, weight, bias, out_factor);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> depthwise_glu_backward(const at::Tensor& dout, const at::Tensor& x,
                                                                      const at::Tensor& weight, const at::Tensor& bias,
                                                                      bool parameters) {
  const DepthwiseConvolution conv(x, weight, bias);
  const void* dout_data = gradient(dout, x, {x.size(0), conv.channels, x.size(2), x.size(3)});
  at::Tensor dx = empty_channels_last(x, x.size(1));
  const auto none = [&] { return at::empty({0}, x.options()); };
  if (x.numel() == 0) {
    return {dx, parameters ? at::zeros_like(weight) : none(), parameters ? at::zeros_like(bias) : none()};
  }
  const auto channels = static_cast<int>(x.size(1));
  int splits;
  C10_CUDA_CHECK(depthwise_glu_backward_splits(conv.batch, conv.height, conv.width, conv.channels, &splits));
  const at::Tensor dconv = at::empty_like(dx);
  const at::Tensor partial = at::empty({splits, 10, channels}, x.options().dtype(at::kFloat));
  C10_CUDA_CHECK(launch_depthwise_glu_backward(dout_data, conv.x, conv.weight_data(), conv.bias_data(),
                                               dconv.mutable_data_ptr(), dx.mutable_data_ptr(),
                                               partial.mutable_data_ptr(), conv.batch, conv.height, conv.width,
                                               conv.channels, conv.dtype, c10::cuda::getCurrentCUDAStream()));
  if (!parameters) return {dx, none(), none()};
  const at::Tensor sums = partial.sum(0);
  at::Tensor dweight = at::empty_like(weight);
  dweight.view({channels, 9}).copy_(sums.narrow(0, 0, 9).t());
  return {dx, dweight, sums.select(0, 9).to(bias.scalar_type())};
}

// The checked arguments of the attention.
struct Attention {
  static constexpr int kHeadDim = 32;

  DType dtype;
  int positions, channels;  // channels: of the result

  Attention(const std::vector<at::Tensor>& qkvs, int64_t head_dim) {
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
    dtype = dtype_of("qkv", first.scalar_type());
    const int64_t positions = first.size(2) * first.size(3);
    require_value(positions <= INT_MAX / 2 && channels <= INT_MAX / 3, "qkv is too large: ", first.sizes());
    this->positions = static_cast<int>(positions);
    this->channels = static_cast<int>(channels);
  }

  static int heads(const at::Tensor& qkv) { return static_cast<int>(qkv.size(1) / (3 * kHeadDim)); }
};

// out_factor: of an int8 result; none for a result in the qkvs' dtype.
at::Tensor attend(const std::vector<at::Tensor>& qkvs, int64_t head_dim, double eps, const MaybeTensor& out_factor) {
  const Attention args(qkvs, head_dim);
  const c10::cuda::CUDAGuard guard(qkvs[0].device());
  const float* factor = factors(out_factor, qkvs[0], args.channels);
  at::Tensor out = empty_channels_last(qkvs[0], args.channels, factor != nullptr);
  auto* target = static_cast<char*>(out.mutable_data_ptr());
  for (const at::Tensor& qkv : qkvs) {
    if (qkv.numel() == 0) continue;
    const int heads = Attention::heads(qkv);
    C10_CUDA_CHECK(launch_relu_linear_attention(qkv.const_data_ptr(), target, factor, qkv.size(0), args.positions,
                                                heads, args.channels, static_cast<float>(eps), args.dtype,
                                                c10::cuda::getCurrentCUDAStream()));
    target += heads * Attention::kHeadDim * out.element_size();
    if (factor != nullptr) factor += heads * Attention::kHeadDim;
  }
  return out;
}

at::Tensor relu_linear_attention(const std::vector<at::Tensor>& qkvs, int64_t head_dim, double eps) {
  return attend(qkvs, head_dim, eps, std::nullopt);
}

at::Tensor relu_linear_attention_int8(const std::vector<at::Tensor>& qkvs, int64_t head_dim, double eps,
                                      const at::Tensor& out_factor) {
  return attend(qkvs, head_dim, eps, out_factor);
}

std::vector<at::Tensor> relu_linear_attention_backward(const at::Tensor& dout, const std::vector<at::Tensor>& qkvs,
                                                       int64_t head_dim, double eps) {
  const Attention args(qkvs, head_dim);
  const at::Tensor& first = qkvs[0];
  require_type(args.dtype == DType::kBFloat16, "qkv must be bfloat16, got ", first.scalar_type());
  const auto* from = static_cast<const uint16_t*>(
      gradient(dout, first, {first.size(0), args.channels, first.size(2), first.size(3)}));
  const c10::cuda::CUDAGuard guard(first.device());
  std::vector<at::Tensor> dqkvs;
  for (const at::Tensor& qkv : qkvs) {
    dqkvs.push_back(empty_channels_last(qkv, qkv.size(1)));
    if (qkv.numel() == 0) continue;
    const int heads = Attention::heads(qkv);
    C10_CUDA_CHECK(launch_relu_linear_attention_backward(from, qkv.const_data_ptr(), dqkvs.back().mutable_data_ptr(),
                                                         qkv.size(0), args.positions, heads, args.channels,
                                                         static_cast<float>(eps),
                                                         c10::cuda::getCurrentCUDAStream()));
    from += heads * Attention::kHeadDim;
  }
  return dqkvs;
}

// The checked arguments of multiscale_qkv. Makes their device the current one while it exists.
struct MultiscaleQkv {
  static constexpr int kGroup = 32, kSize = 5;

  const void* x;
  c10::cuda::CUDAGuard guard;
  DType dtype;
  int64_t batch;
  int height, width, channels;
  at::Tensor depthwise, grouped;  // in x's dtype

  MultiscaleQkv(const at::Tensor& x, const at::Tensor& depthwise, const at::Tensor& grouped)
      : x(channels_last("x", x)), guard(x.device()), dtype(dtype_of("x", x.scalar_type())), batch(x.size(0)) {
    require_value(x.size(1) > 0 && x.size(1) % kGroup == 0,
                  "x must have shape [B, C, H, W] with C a positive multiple of 32, got ", x.sizes());
    require_int_sizes(x);
    channels = static_cast<int>(x.size(1));
    height = static_cast<int>(x.size(2));
    width = static_cast<int>(x.size(3));
    this->depthwise = parameter("depthwise", depthwise, x, {channels, 1, kSize, kSize});
    this->grouped = parameter("grouped", grouped, x, {channels, kGroup, 1, 1});
  }
};

at::Tensor multiscale_qkv(const at::Tensor& x, const at::Tensor& depthwise, const at::Tensor& grouped) {
  const MultiscaleQkv args(x, depthwise, grouped);
  at::Tensor out = empty_channels_last(x, args.channels);
  if (out.numel() > 0) {
    C10_CUDA_CHECK(launch_multiscale_qkv(args.x, args.depthwise.const_data_ptr(), args.grouped.const_data_ptr(),
                                         out.mutable_data_ptr(), args.batch, args.height, args.width, args.channels,
                                         args.dtype, c10::cuda::getCurrentCUDAStream()));
  }
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> multiscale_qkv_backward(const at::Tensor& dout, const at::Tensor& x,
                                                                       const at::Tensor& depthwise,
                                                                       const at::Tensor& grouped, bool parameters) {
  const MultiscaleQkv args(x, depthwise, grouped);
  const void* dout_data = gradient(dout, x, x.sizes());
  at::Tensor dx = empty_channels_last(x, args.channels);
  const auto none = [&] { return at::empty({0}, x.options()); };
  if (x.numel() == 0) {
    return {dx, parameters ? at::zeros_like(depthwise) : none(), parameters ? at::zeros_like(grouped) : none()};
  }
  const int64_t of_depthwise = depthwise.numel(), of_grouped = grouped.numel();
  at::Tensor sums;
  if (parameters) {
    int splits;
    C10_CUDA_CHECK(multiscale_qkv_backward_splits(args.batch, args.height, args.width, args.channels, &splits));
    sums = at::empty({splits, of_depthwise + of_grouped}, x.options().dtype(at::kFloat));
  }
  C10_CUDA_CHECK(launch_multiscale_qkv_backward(
      dout_data, args.x, args.depthwise.const_data_ptr(), args.grouped.const_data_ptr(), dx.mutable_data_ptr(),
      parameters ? sums.mutable_data_ptr<float>() : nullptr, args.batch, args.height, args.width, args.channels,
      args.dtype, c10::cuda::getCurrentCUDAStream()));
  if (!parameters) return {dx, none(), none()};
  return {dx, sums.narrow(1, 0, of_depthwise).sum(0).view(depthwise.sizes()).to(depthwise.scalar_type()),
          sums.narrow(1, of_depthwise, of_grouped).sum(0).view(grouped.sizes()).to(grouped.scalar_type())};
}

}  // namespace

void bind_image_operators(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("depthwise_glu", &depthwise_glu, py::arg("x"), py::arg("weight"), py::arg("bias"),
             "c[:, :M] * silu(c[:, M:]) with c the depthwise 3x3 convolution of x, channels-last.");
  module.def("depthwise_glu_int8", &depthwise_glu_int8, py::arg("x"), py::arg("weight"), py::arg("bias"),
             py::arg("out_factor"), "depthwise_glu times out_factor, as int8.");
  module.def("depthwise_glu_backward", &depthwise_glu_backward, py::arg("dout"), py::arg("x"), py::arg("weight"),
             py::arg("bias"), py::arg("parameters") = true,
             "The gradients of depthwise_glu by x, weight and bias. Without `parameters` the last two are empty.");
  module.def(
      "relu_linear_attention", &relu_linear_attention, py::arg("qkvs"), py::arg("head_dim"), py::arg("eps"),
      "ReLU linear attention of packed qkv tensors, channels-last; the results are concatenated along channels.");
  module.def("relu_linear_attention_int8", &relu_linear_attention_int8, py::arg("qkvs"), py::arg("head_dim"),
             py::arg("eps"), py::arg("out_factor"), "relu_linear_attention times out_factor, as int8.");
  module.def("relu_linear_attention_backward", &relu_linear_attention_backward, py::arg("dout"), py::arg("qkvs"),
             py::arg("head_dim"), py::arg("eps"), "The gradients of relu_linear_attention by each qkv, in bfloat16.");
  module.def("multiscale_qkv", &multiscale_qkv, py::arg("x"), py::arg("depthwise"), py::arg("grouped"),
             "Depthwise 5x5 convolution of x, then grouped 1x1 convolution, channels-last.");
  module.def("multiscale_qkv_backward", &multiscale_qkv_backward, py::arg("dout"), py::arg("x"), py::arg("depthwise"),
             py::arg("grouped"), py::arg("parameters"),
             "The gradients of multiscale_qkv by x, depthwise, grouped. Without `parameters` the last two are empty.");
}

}  // namespace dcae_fast
