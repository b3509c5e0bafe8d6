// The launch functions of the extension. They take raw pointers and a stream, return an error code, and know no torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace dcae_fast {

enum class DType { kFloat16, kBFloat16 };

// All tensors are dense and aligned to 16 bytes. The tensors of a function have one dtype unless its comment says
// otherwise. Sums are accumulated in fp32.

// out = c[:, :M] * silu(c[:, M:]) with c = depthwise_conv3x3(x, weight) + bias, padding 1.
//
// x: [batch, height, width, 2M]; weight: [2M, 3, 3]; bias: [2M] or null; out: [batch, height, width, M]; M = channels a
// positive multiple of 8. If out_factor, [M], is not null, out is int8: the result times out_factor.
cudaError_t launch_depthwise_glu(const void* x, const void* weight, const void* bias, void* out,
                                 const float* out_factor, int64_t batch, int height, int width, int channels,
                                 DType dtype, cudaStream_t stream);

// The gradients of depthwise_glu, computed from dout, the gradient of out.
//
// dconv, the gradient of c, and dx have x's shape. sums: [splits, 10, 2M] in fp32, partial sums of dweight for each of
// the nine taps, then of dbias. The caller adds up the splits; depthwise_glu_backward_splits computes their number.
cudaError_t depthwise_glu_backward_splits(int64_t batch, int height, int width, int channels, int* splits);
cudaError_t launch_depthwise_glu_backward(const void* dout, const void* x, const void* weight, const void* bias,
                                          void* dconv, void* dx, void* sums, int64_t batch, int height, int width,
                                          int channels, DType dtype, cudaStream_t stream);

// out_i = sum_j v_j (k_j . q_i) / (sum_j k_j . q_i + eps) over the positions of an image, with relu(q) and relu(k).
//
// qkv: [batch, positions, heads, 3, 32]; out: [batch, positions, out_channels], of which the first 32 * heads channels
// are written. If out_factor, [32 * heads], is not null, out is int8: the result times out_factor.
cudaError_t launch_relu_linear_attention(const void* qkv, void* out, const float* out_factor, int64_t batch,
                                         int positions, int heads, int out_channels, float eps, DType dtype,
                                         cudaStream_t stream);

// The gradient of relu_linear_attention: dqkv, computed from dout, the gradient of out, of which the first 32 * heads
// channels are read. All tensors are in bfloat16. The result is deterministic.
cudaError_t launch_relu_linear_attention_backward(const void* dout, const void* qkv, void* dqkv, int64_t batch,
                                                  int positions, int heads, int out_channels, float eps,
                                                  cudaStream_t stream);

// out[o] = sum over c in the group of o of grouped[o, c] * depthwise_conv5x5(x, depthwise)[c], padding 2, groups of 32.
//
// x, out: [batch, height, width, channels], channels a positive multiple of 32; depthwise: [channels, 5, 5];
// grouped: [channels, 32]. The depthwise result is rounded to x's dtype.
cudaError_t launch_multiscale_qkv(const void* x, const void* depthwise, const void* grouped, void* out, int64_t batch,
                                  int height, int width, int channels, DType dtype, cudaStream_t stream);

// The gradients of multiscale_qkv, computed from dout, the gradient of out.
//
// dx has x's shape. sums: null, or partial sums in fp32, for each split first of ddepthwise, [channels, 5, 5], then of
// dgrouped, [channels, 32]. The caller adds up the splits; multiscale_qkv_backward_splits computes their number. The
// gradient of the depthwise result is rounded to x's dtype for dx only. The result is deterministic.
cudaError_t multiscale_qkv_backward_splits(int64_t batch, int height, int width, int channels, int* splits);
cudaError_t launch_multiscale_qkv_backward(const void* dout, const void* x, const void* depthwise, const void* grouped,
                                           void* dx, float* sums, int64_t batch, int height, int width, int channels,
                                           DType dtype, cudaStream_t stream);

// out = softmax(q kᵀ / sqrt(head_dim)) v for each head, and lse, the logarithm of the softmax's denominator.
//
// qkv: [batch, tokens, 3, heads, head_dim]; out: [batch, tokens, heads, head_dim]; lse: [batch, heads, tokens] in fp32;
// tokens from 1 to kMaxAttentionTokens; head_dim 64 or 72.
constexpr int kMaxAttentionTokens = 320;
cudaError_t launch_packed_attention(const void* qkv, void* out, float* lse, int64_t batch, int tokens, int heads,
                                    int head_dim, DType dtype, cudaStream_t stream);

// The gradient of packed_attention: dqkv, computed from dout, the gradient of out. The result is deterministic.
cudaError_t launch_packed_attention_backward(const void* dout, const void* qkv, const void* out, const float* lse,
                                             void* dqkv, int64_t batch, int tokens, int heads, int head_dim,
                                             DType dtype, cudaStream_t stream);

// y = norm(s) · scale + shift where all images share scale and shift, norm(s) · (1 + scale) + shift where each image
// has its own. s = x + gate · branch if there is a branch, else s = x. See dcae_fast/ops/layer_norm.py.
//
// x, branch, total (s), y: [images, tokens, width]; scale, shift, gate: [images, width] if each image has its own. If
// all images share them, scale and shift are [width], and all tokens count as tokens of one image. width:
// a positive multiple of 8, at most kLayerNormMostChannels. Without a branch, branch, gate and total are null.
constexpr int kLayerNormMostChannels = 2048;
struct LayerNormPointers {
  const void *x, *scale, *shift, *branch, *gate;
  void *total, *y;
};
struct LayerNormShape {
  int images, tokens, width;  // positive, images * tokens at most 2^33
  bool tokens_in_float32;     // x and total, in the gradient also dsum and dx, are in fp32 rather than in dtype
  bool scale_in_float32;      // scale and shift are in fp32 rather than in dtype; only if all images share them
  bool scale_is_of_image;     // each image has its own scale and shift; a branch requires this
  DType dtype;                // of all other tensors
};
cudaError_t launch_layer_norm(const LayerNormPointers& pointers, const LayerNormShape& shape, float eps,
                              cudaStream_t stream);

// The gradients of layer_norm, computed from dy and dsum, the gradients of y and s. has_layer_norm_gradient names the
// supported widths. An image has at most INT_MAX / 2 tokens.
//
// dsum may be null, and so may branch with gate and dbranch. sums: [2 or 3, images, splits, width] in fp32, partial
// sums of dscale, of dshift and, if there is a branch, of dgate. The caller adds up the splits;
// layer_norm_backward_splits computes their number. The result is deterministic.
constexpr bool has_layer_norm_gradient(int64_t width) { return width == 512 || width == 1152; }
struct LayerNormGradientPointers {
  const void *dy, *dsum, *total, *scale, *branch, *gate;
  void *dx, *dbranch;
  float* sums;
};
cudaError_t layer_norm_backward_splits(const LayerNormShape& shape, int* splits);
cudaError_t launch_layer_norm_backward(const LayerNormGradientPointers& pointers, const LayerNormShape& shape,
                                       int splits, float eps, cudaStream_t stream);

// dh = dg * gelu'(h) and, unless g is null, g = gelu(h).
//
// dg, h, dh, g: [rows, columns], columns a positive multiple of 8; tanh: GELU in its tanh form, else with erf. sums:
// [splits, columns] in fp32, partial sums of dh over the rows. The caller adds up the splits; gelu_backward_splits
// computes their number. The result is deterministic.
cudaError_t gelu_backward_splits(int64_t rows, int columns, int* splits);
cudaError_t launch_gelu_backward(const void* dg, const void* h, void* dh, void* g, float* sums, int64_t rows,
                                 int columns, int splits, bool tanh, DType dtype, cudaStream_t stream);

}  // namespace dcae_fast
