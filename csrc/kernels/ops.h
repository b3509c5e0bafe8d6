// The launchers of this extension: raw pointers and a stream in, an error code out, no torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace dcae_fast {

enum class DType { kFloat16, kBFloat16 };

// In all of these, tensors are dense, of one dtype unless it says so, and aligned to 16 bytes; sums are accumulated in
// fp32.

// out = c[:, :M] * silu(c[:, M:]) with c = depthwise_conv3x3(x, weight) + bias, padding 1.
//
// x: [batch, height, width, 2M]; weight: [2M, 3, 3]; bias: [2M] or null; out: [batch, height, width, M]; M = channels a
// positive multiple of 8.
cudaError_t launch_depthwise_glu(const void* x, const void* weight, const void* bias, void* out, int64_t batch,
                                 int height, int width, int channels, DType dtype, cudaStream_t stream);

// The gradients of c, x, weight and bias, from the gradient of out, dout. dconv, the gradient of c, and dx have x's
// shape.
//
// sums: [splits, 10, 2M] in fp32, partial sums of dweight for each of the nine taps, then of dbias. The caller adds up
// the splits; depthwise_glu_backward_splits gives their number.
cudaError_t depthwise_glu_backward_splits(int64_t batch, int height, int width, int channels, int* splits);
cudaError_t launch_depthwise_glu_backward(const void* dout, const void* x, const void* weight, const void* bias,
                                          void* dconv, void* dx, void* sums, int64_t batch, int height, int width,
                                          int channels, DType dtype, cudaStream_t stream);

// out_i = sum_j v_j (k_j . q_i) / (sum_j k_j . q_i + eps) over the positions of an image, with relu(q) and relu(k).
//
// qkv: [batch, positions, heads, 3, 32]; out: the first 32 * heads of out_channels, [batch, positions, out_channels].
cudaError_t launch_relu_linear_attention(const void* qkv, void* out, int64_t batch, int positions, int heads,
                                         int out_channels, float eps, DType dtype, cudaStream_t stream);

// out[o] = sum over c in the group of o of grouped[o, c] * depthwise_conv5x5(x, depthwise)[c], padding 2, groups of 32.
//
// x, out: [batch, height, width, channels], channels a positive multiple of 32; depthwise: [channels, 5, 5];
// grouped: [channels, 32]. The depthwise result is rounded to x's dtype.
cudaError_t launch_multiscale_qkv(const void* x, const void* depthwise, const void* grouped, void* out, int64_t batch,
                                  int height, int width, int channels, DType dtype, cudaStream_t stream);

// out = softmax(q kᵀ / sqrt(head_dim)) v for each head, and lse, the logarithm of the softmax's denominator.
//
// qkv: [batch, tokens, 3, heads, head_dim]; out: [batch, tokens, heads, head_dim]; lse: [batch, heads, tokens] in fp32;
// tokens from 1 to kMaxAttentionTokens; head_dim 64 or 72.
constexpr int kMaxAttentionTokens = 320;
cudaError_t launch_packed_attention(const void* qkv, void* out, float* lse, int64_t batch, int tokens, int heads,
                                    int head_dim, DType dtype, cudaStream_t stream);

// The gradient of qkv, dqkv, from that of out, dout. No atomics: the same twice.
cudaError_t launch_packed_attention_backward(const void* dout, const void* qkv, const void* out, const float* lse,
                                             void* dqkv, int64_t batch, int tokens, int heads, int head_dim,
                                             DType dtype, cudaStream_t stream);

// y = norm(s) · scale + shift, or norm(s) · (1 + scale) + shift with an image's own scale and shift, with
// s = x + gate · branch if there is a branch, else x; see dcae_fast/ops/layer_norm.py.
//
// x, branch, total (that is s), y: [images, tokens, width]; scale, shift, gate: [width], of all images, which count as
// one then, or [images, width]; width a positive multiple of 8, at most kLayerNormMostChannels. branch, gate and total
// are null if there is no branch.
constexpr int kLayerNormMostChannels = 2048;
struct LayerNormPointers {
  const void *x, *scale, *shift, *branch, *gate;
  void *total, *y;
};
struct LayerNormShape {
  int images, tokens, width;  // positive, images * tokens at most 2^33
  bool tokens_in_float32;     // x and total, for the gradient dsum and dx; else they have the dtype
  bool scale_in_float32;      // with shift, only if they are of all images; else they have the dtype
  bool scale_is_of_image;     // as with a branch it must be
  DType dtype;                // of the rest
};
cudaError_t launch_layer_norm(const LayerNormPointers& pointers, const LayerNormShape& shape, float eps,
                              cudaStream_t stream);

// The gradients, from those of y, dy, and of s, dsum, for widths that has_layer_norm_gradient names, and at most
// INT_MAX / 2 tokens.
//
// dsum, and branch with gate and dbranch, may be null. sums: parts of dscale, dshift and, if there is a branch, dgate,
// in fp32 [2 or 3, images, splits, width], to be added up; layer_norm_backward_splits says how many splits there are.
// No atomics: the same twice.
constexpr bool has_layer_norm_gradient(int64_t width) { return width == 512 || width == 1152; }
struct LayerNormGradientPointers {
  const void *dy, *dsum, *total, *scale, *branch, *gate;
  void *dx, *dbranch;
  float* sums;
};
cudaError_t layer_norm_backward_splits(const LayerNormShape& shape, int* splits);
cudaError_t launch_layer_norm_backward(const LayerNormGradientPointers& pointers, const LayerNormShape& shape,
                                       int splits, float eps, cudaStream_t stream);

// dh = dg * gelu'(h), and g = gelu(h) unless it is null: dg, h, dh, g: [rows, columns], columns a positive multiple of
// 8; tanh: GELU's form with it, else the one with erf.
//
// sums: of dh over the rows, in fp32 [splits, columns], to be added up; gelu_gradient_splits says how many splits there
// are. No atomics: the same twice.
cudaError_t gelu_gradient_splits(int64_t rows, int columns, int* splits);
cudaError_t launch_gelu_gradient(const void* dg, const void* h, void* dh, void* g, float* sums, int64_t rows,
                                 int columns, int splits, bool tanh, DType dtype, cudaStream_t stream);

}  // namespace dcae_fast
