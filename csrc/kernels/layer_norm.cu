// Layer norm of tokens, after adding a gated branch to them if there is one, and its gradient. See ops.h for the
// formulas.
//
// A warp computes whole tokens, so that a token is read once and its sums need no other warp. The gradient's sums over
// tokens stay in registers until the block adds up the sums of its warps. One or two such blocks fill the registers of
// a multiprocessor.

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "launch.h"
#include "ops.h"
#include "pairs.cuh"

namespace dcae_fast {

namespace {

constexpr int kForwardWarps = 4;
constexpr int kChunk = 128;    // channels that a warp of the gradient processes at once, four a lane
constexpr int kWarps = 8;      // of a block of the gradient
constexpr int kMostWaves = 8;  // of blocks
constexpr int blocks_at_once(int width) { return width <= 512 ? 2 : 1; }  // blocks of the gradient on a multiprocessor

__device__ float4 load4(const float* from) { return __ldg(reinterpret_cast<const float4*>(from)); }

template <typename T>
__device__ float4 load4(const T* from) {
  const uint2 pairs = __ldg(reinterpret_cast<const uint2*>(from));
  const float2 low = widen<T>(pairs.x), high = widen<T>(pairs.y);
  return {low.x, low.y, high.x, high.y};
}

__device__ void store4(float* to, float4 x) { *reinterpret_cast<float4*>(to) = x; }

template <typename T>
__device__ void store4(T* to, float4 x) {
  *reinterpret_cast<uint2*>(to) = {narrow<T>(x.x, x.y), narrow<T>(x.z, x.w)};
}

__device__ float sum(float4 x) { return (x.x + x.y) + (x.z + x.w); }
__device__ float dot(float4 x, float4 y) { return fmaf(x.x, y.x, x.y * y.y) + fmaf(x.z, y.z, x.w * y.w); }
__device__ float4 operator*(float4 x, float4 y) { return {x.x * y.x, x.y * y.y, x.z * y.z, x.w * y.w}; }
__device__ float4 operator*(float4 x, float y) { return {x.x * y, x.y * y, x.z * y, x.w * y}; }
__device__ float4 operator+(float4 x, float4 y) { return {x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w}; }
__device__ float4 operator+(float4 x, float y) { return {x.x + y, x.y + y, x.z + y, x.w + y}; }

// x after rounding to X.
template <typename X>
__device__ float4 rounded(float4 x) {
  if constexpr (std::is_same_v<X, float>) {
    return x;
  } else {
    const float2 low = widen<X>(narrow<X>(x.x, x.y)), high = widen<X>(narrow<X>(x.z, x.w));
    return {low.x, low.y, high.x, high.y};
  }
}

// The sum of x over the lanes of a warp.
__device__ float sum_of(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

// A lane's share of 256 channels in the forward pass: eight neighbouring channels.
struct Channels {
  float4 low, high;
};

__device__ Channels load8(const float* from) { return {load4(from), load4(from + 4)}; }

template <typename T>
__device__ Channels load8(const T* from) {
  const uint4 words = __ldg(reinterpret_cast<const uint4*>(from));
  const float2 a = widen<T>(words.x), b = widen<T>(words.y), c = widen<T>(words.z), d = widen<T>(words.w);
  return {{a.x, a.y, b.x, b.y}, {c.x, c.y, d.x, d.y}};
}

__device__ void store8(float* to, Channels x) {
  store4(to, x.low);
  store4(to + 4, x.high);
}

template <typename T>
__device__ void store8(T* to, Channels x) {
  *reinterpret_cast<uint4*>(to) = {narrow<T>(x.low.x, x.low.y), narrow<T>(x.low.z, x.low.w),
                                   narrow<T>(x.high.x, x.high.y), narrow<T>(x.high.z, x.high.w)};
}

// The least number of blocks of the forward pass on a multiprocessor. Where all images share the scale, as many as the
// registers allow; else 0, which sets no limit.
template <typename S>
constexpr int forward_blocks(bool of_image, int most) {
  return of_image ? 0 : most > 5 ? 4 : std::is_same_v<S, float> ? 6 : 5;
}

// For tokens of at most kMost * 256 channels. Everything that comes from memory is loaded before the first sum;
// parameters, which are in the cache, after the last sum. Lanes beyond the width read its last channels again and write
// nothing.
template <typename X, typename T, typename S, bool kOfImage, bool kBranch, int kMost>
__global__ void __launch_bounds__(32 * kForwardWarps, forward_blocks<S>(kOfImage, kMost))
    layer_norm_kernel(const X* __restrict__ x, const S* __restrict__ scale, const S* __restrict__ shift,
                      const T* __restrict__ branch, const T* __restrict__ gate, X* __restrict__ total,
                      T* __restrict__ y, int64_t rows, int tokens, int width, float eps) {
  const int64_t row = int64_t{blockIdx.x} * kForwardWarps + threadIdx.x / 32;
  if (row >= rows) return;
  const int64_t token = row * width, of = kOfImage ? row / tokens * width : 0;
  const auto column = [&](int i) { return static_cast<int>(threadIdx.x % 32 * 8 + i * 256); };
  const auto inside = [&](int i) { return min(column(i), width - 8); };
  Channels s[kMost], factor[kMost], addend[kMost];
  const auto load_scale_and_shift = [&](int i) {
    factor[i] = load8(scale + of + inside(i));
    addend[i] = load8(shift + of + inside(i));
  };

#pragma unroll
  for (int i = 0; i < kMost; ++i) s[i] = load8(x + token + inside(i));
  if constexpr (kBranch) {
    Channels b[kMost];
#pragma unroll
    for (int i = 0; i < kMost; ++i) b[i] = load8(branch + token + inside(i));
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const Channels g = load8(gate + of + inside(i));
      s[i] = {rounded<X>(s[i].low + g.low * b[i].low), rounded<X>(s[i].high + g.high * b[i].high)};
      if (column(i) < width) store8(total + token + column(i), s[i]);
    }
  }
  if constexpr (kOfImage) {
#pragma unroll
    for (int i = 0; i < kMost; ++i) load_scale_and_shift(i);
  }
  float mean = 0.0f, variance = 0.0f;
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    if (column(i) < width) mean += sum(s[i].low) + sum(s[i].high);
  }
  mean = sum_of(mean) / width;
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    s[i] = {s[i].low + -mean, s[i].high + -mean};
    if (column(i) < width) variance += dot(s[i].low, s[i].low) + dot(s[i].high, s[i].high);
  }
  const float rstd = rsqrtf(sum_of(variance) / width + eps), one = kOfImage ? 1.0f : 0.0f;
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    if (!kOfImage) load_scale_and_shift(i);
    const Channels out = {s[i].low * rstd * (factor[i].low + one) + addend[i].low,
                          s[i].high * rstd * (factor[i].high + one) + addend[i].high};
    if (column(i) < width) store8(y + token + column(i), out);
  }
}

// Calls `call` with kOfImage and kBranch as types. All images share a scale of another type than T.
template <typename T, typename S, typename Call>
cudaError_t with_form(bool of_image, bool has_branch, Call call) {
  if constexpr (std::is_same_v<S, T>) {
    if (has_branch) return call(std::true_type{}, std::true_type{});
    if (of_image) return call(std::true_type{}, std::false_type{});
  }
  return call(std::false_type{}, std::false_type{});
}

template <int kMost, typename X, typename T, typename S>
cudaError_t launch_forward(const LayerNormPointers& p, const LayerNormShape& shape, float eps, cudaStream_t stream) {
  const int64_t rows = int64_t{shape.images} * shape.tokens;
  return with_form<T, S>(shape.scale_is_of_image, p.branch != nullptr, [&](auto of_image, auto branch) {
    const auto kernel = layer_norm_kernel<X, T, S, of_image.value, branch.value, kMost>;
    kernel<<<static_cast<unsigned>(divide_up(rows, kForwardWarps)), 32 * kForwardWarps, 0, stream>>>(
        static_cast<const X*>(p.x), static_cast<const S*>(p.scale), static_cast<const S*>(p.shift),
        static_cast<const T*>(p.branch), static_cast<const T*>(p.gate), static_cast<X*>(p.total), static_cast<T*>(p.y),
        rows, shape.tokens, shape.width, eps);
    return cudaGetLastError();
  });
}

// Adds up the sums of a block's warps, and writes the result.
template <int kChunks>
__device__ void write_sums(float* to, const float4 (&sums)[kChunks]) {
  constexpr int kWidth = kChunks * kChunk;
  __shared__ __align__(16) float shared[kWarps][kWidth];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kChunks; ++i) store4(&shared[warp][i * kChunk + 4 * lane], sums[i]);
  __syncthreads();
  for (int channel = threadIdx.x; channel < kWidth; channel += 32 * kWarps) {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) total += shared[i][channel];
    to[channel] = total;
  }
}

// The grid is (images, splits of an image's tokens). If all images share the scale, all tokens count as tokens of
// one image.
template <int kChunks, typename X, typename T, typename S, bool kOfImage, bool kBranch>
__global__ void __launch_bounds__(32 * kWarps, blocks_at_once(kChunks* kChunk))
    layer_norm_backward_kernel(const T* __restrict__ dy, const X* __restrict__ dsum, const X* __restrict__ total,
                               const S* __restrict__ scale, const T* __restrict__ branch, const T* __restrict__ gate,
                               X* __restrict__ dx, T* __restrict__ dbranch, float* __restrict__ sums, int tokens,
                               float eps) {
  constexpr int kWidth = kChunks * kChunk;
  const auto mean_of = [](float x) { return sum_of(x) * (1.0f / kWidth); };
  const int warp = threadIdx.x / 32, column = threadIdx.x % 32 * 4;
  const int image = blockIdx.x, split = blockIdx.y, splits = gridDim.y;
  scale += int64_t{image} * kWidth + column;
  if (kBranch) gate += int64_t{image} * kWidth + column;
  float4 dscale[kChunks] = {}, dshift[kChunks] = {}, dgate[kBranch ? kChunks : 1] = {};

#pragma unroll 1
  for (int token = split * kWarps + warp; token < tokens; token += splits * kWarps) {
    const int64_t at = (int64_t{image} * tokens + token) * kWidth + column;
    float4 x[kChunks], g[kChunks];  // x: centred, then normalised; g: gradient of the norm
#pragma unroll
    for (int i = 0; i < kChunks; ++i) x[i] = load4(total + at + i * kChunk);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) g[i] = load4(dy + at + i * kChunk);
    float mean = 0.0f, variance = 0.0f;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) mean += sum(x[i]);
    mean = mean_of(mean);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      x[i] = x[i] + -mean;
      variance += dot(x[i], x[i]);
    }
    const float rstd = rsqrtf(mean_of(variance) + eps);
    float along = 0.0f, across = 0.0f;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      x[i] = x[i] * rstd;
      dscale[i] = dscale[i] + g[i] * x[i];
      dshift[i] = dshift[i] + g[i];
      g[i] = g[i] * (load4(scale + i * kChunk) + (kOfImage ? 1.0f : 0.0f));
      along += dot(g[i], x[i]);
      across += sum(g[i]);
    }
    along = mean_of(along);
    across = mean_of(across);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      float4 d = (g[i] + -across + x[i] * -along) * rstd;
      if (dsum != nullptr) d = d + load4(dsum + at + i * kChunk);
      store4(dx + at + i * kChunk, d);
      if constexpr (kBranch) {
        dgate[i] = dgate[i] + d * load4(branch + at + i * kChunk);
        store4(dbranch + at + i * kChunk, d * load4(gate + i * kChunk));
      }
    }
  }

  const int64_t size = int64_t{gridDim.x} * splits * kWidth;
  sums += (int64_t{image} * splits + split) * kWidth;
  write_sums(sums, dscale);
  write_sums(sums + size, dshift);
  if constexpr (kBranch) write_sums(sums + 2 * size, dgate);
}

template <int kChunks, typename X, typename T, typename S>
cudaError_t launch_backward(const LayerNormGradientPointers& p, const LayerNormShape& shape, int splits, float eps,
                            cudaStream_t stream) {
  return with_form<T, S>(shape.scale_is_of_image, p.branch != nullptr, [&](auto of_image, auto branch) {
    const auto kernel = layer_norm_backward_kernel<kChunks, X, T, S, of_image.value, branch.value>;
    kernel<<<dim3(shape.images, splits), 32 * kWarps, 0, stream>>>(
        static_cast<const T*>(p.dy), static_cast<const X*>(p.dsum), static_cast<const X*>(p.total),
        static_cast<const S*>(p.scale), static_cast<const T*>(p.branch), static_cast<const T*>(p.gate),
        static_cast<X*>(p.dx), static_cast<T*>(p.dbranch), p.sums, shape.tokens, eps);
    return cudaGetLastError();
  });
}

// The number of splits that takes the least time if so many blocks run at once. A block takes one unit of time for each
// token of a warp, and two units for its sums.
int best_splits(const LayerNormShape& shape, int blocks) {
  int best = 1;
  int64_t least = INT64_MAX;
  for (int64_t waves = 1; waves <= kMostWaves; ++waves) {
    const int64_t splits = std::clamp<int64_t>(waves * blocks / shape.images, 1, divide_up(shape.tokens, kWarps));
    const int64_t cost = divide_up(shape.images * splits, blocks) * (divide_up(shape.tokens, splits * kWarps) + 2);
    if (cost < least) least = cost, best = static_cast<int>(splits);
  }
  return best;
}

// Calls `call` with values of the element types of x (or total), of y (or dy), and of scale.
template <typename Call>
cudaError_t with_elements(const LayerNormShape& shape, Call call) {
  return with_element(shape.dtype, [&](auto half) {
    const auto with_tokens = [&](auto token) {
      return shape.scale_in_float32 ? call(token, half, 0.0f) : call(token, half, half);
    };
    return shape.tokens_in_float32 ? with_tokens(0.0f) : with_tokens(half);
  });
}

}  // namespace

cudaError_t launch_layer_norm(const LayerNormPointers& pointers, const LayerNormShape& shape, float eps,
                              cudaStream_t stream) {
  return with_elements(shape, [&](auto token, auto half, auto scale) {
    using X = decltype(token);
    using T = decltype(half);
    using S = decltype(scale);
    if (shape.width <= 512) return launch_forward<2, X, T, S>(pointers, shape, eps, stream);
    if (shape.width <= 768) return launch_forward<3, X, T, S>(pointers, shape, eps, stream);
    if (shape.width <= 1280) return launch_forward<5, X, T, S>(pointers, shape, eps, stream);
    return launch_forward<kLayerNormMostChannels / 256, X, T, S>(pointers, shape, eps, stream);
  });
}

cudaError_t layer_norm_backward_splits(const LayerNormShape& shape, int* splits) {
  int processors;
  if (const auto error = count_processors(&processors)) return error;
  *splits = best_splits(shape, processors * blocks_at_once(shape.width));
  return cudaSuccess;
}

cudaError_t launch_layer_norm_backward(const LayerNormGradientPointers& pointers, const LayerNormShape& shape,
                                       int splits, float eps, cudaStream_t stream) {
  return with_elements(shape, [&](auto token, auto half, auto scale) {
    using X = decltype(token);
    using T = decltype(half);
    using S = decltype(scale);
    if (shape.width == 512) return launch_backward<512 / kChunk, X, T, S>(pointers, shape, splits, eps, stream);
    return launch_backward<1152 / kChunk, X, T, S>(pointers, shape, splits, eps, stream);
  });
}

}  // namespace dcae_fast
