// Shared code of the kernels for softmax attention: the arithmetic of a warp, which holds 16 rows of scores in the
// fragments of tensor_cores.cuh, and the output of results. Rows are queries and columns keys, or the reverse.
#pragma once

#include <climits>
#include <cmath>

#include "launch.h"
#include "ops.h"
#include "tensor_cores.cuh"

namespace dcae_fast {

constexpr int kTile = 16;          // rows of a warp
constexpr int kStride = 72;        // elements between rows in shared memory, without bank conflicts in loads
constexpr int kRow = 2 * kStride;  // kStride in bytes
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = INFINITY;

template <int kDim>
constexpr int kChunks = kDim / 8;  // 16-byte chunks of a row

__host__ __device__ constexpr int round_up(int tokens) { return (tokens + kTile - 1) / kTile * kTile; }

__device__ inline float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <int kDim>
__device__ float log2_scale() {  // exp(x / sqrt(kDim)) = exp2(x * log2_scale)
  return kLog2E * (kDim == 64 ? 0.125f : 0.11785113019775793f);
}

__device__ inline uint4 load_chunk(const void* from) { return __ldg(static_cast<const uint4*>(from)); }

// Starts the copy of a chunk to shared memory.
__device__ inline void copy_chunk(unsigned to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(to), "l"(from) : "memory");
}

__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ inline void store_chunk(unsigned to, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

__device__ inline uint4 read_chunk(unsigned from) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(from)
               : "memory");
  return x;
}

// Sets the scores of columns from the `keys`th on to -inf. These columns, which are keys, are among the last 16.
template <int kBlocks>
__device__ void mask(float (&scores)[kBlocks][4], int keys) {
  if (keys >= 8 * kBlocks) return;
#pragma unroll
  for (int i = kBlocks - 2; i < kBlocks; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (8 * i + threadIdx.x % 4 * 2 + e % 2 >= keys) scores[i][e] = -kInfinity;
    }
  }
}

// The maximum and the sum of x over the four threads of a row.
__device__ inline float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ inline float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// sum + x · y for vectors of eight elements.
template <typename T>
__device__ float dot(uint4 x, uint4 y, float sum) {
  const Pair xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 a = widen<T>(xs[j]), b = widen<T>(ys[j]);
    sum = fmaf(a.x, b.x, fmaf(a.y, b.y, sum));
  }
  return sum;
}

// The running softmax of 16 queries, the rows, over the keys so far. out and sum are scaled by exp2(-top).
template <int kDim>
struct Softmax {
  float out[kDim / 8][4] = {};
  float top[2] = {-kInfinity, -kInfinity}, sum[2] = {};  // of rows g and g + 8; sum: this thread's share

  // Turns the scores p of further keys into weights.
  template <int kBlocks>
  __device__ void weigh(float (&p)[kBlocks][4]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float largest = -kInfinity;
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) largest = fmaxf(largest, fmaxf(p[i][2 * r], p[i][2 * r + 1]));
      const float before = top[r];
      top[r] = fmaxf(before, row_max(largest) * log2_scale<kDim>());
      const float shrink = exp2_approximate(before - top[r]);
      sum[r] *= shrink;
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          p[i][e] = exp2_approximate(fmaf(p[i][e], log2_scale<kDim>(), -top[r]));
          sum[r] += p[i][e];
        }
      }
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i) out[i][2 * r] *= shrink, out[i][2 * r + 1] *= shrink;
    }
  }

  // Writes the first `rows` rows of lse, and sets `scale` to the factors that `out` must be multiplied by.
  __device__ void finish(float* lse, int rows, float (&scale)[2]) const {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float total = row_sum(sum[r]);
      scale[r] = __fdividef(1.0f, total);
      if (threadIdx.x % 4 == 0 && g + 8 * r < rows) lse[g + 8 * r] = (top[r] + __log2f(total)) * kLn2;
    }
  }
};

// Statistics of a query for the gradients: lse in base 2, and dout · out; {inf, 0} beyond the last token.
using Statistics = float2;

// weigh_rows turns scores p into weights; differentiate_rows turns ds, the gradient of the weights, into the gradient
// of the scores. Queries are rows. of: the statistics of rows g and g + 8.
template <int kDim, int kBlocks>
__device__ void weigh_rows(float (&p)[kBlocks][4], const Statistics (&of)[2]) {
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) p[i][e] = exp2_approximate(fmaf(p[i][e], log2_scale<kDim>(), -of[e / 2].x));
  }
}
template <int kBlocks>
__device__ void differentiate_rows(float (&ds)[kBlocks][4], const float (&p)[kBlocks][4], const Statistics (&of)[2]) {
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) ds[i][e] = p[i][e] * (ds[i][e] - of[e / 2].y);
  }
}

// The same where queries are columns. statistics: of all columns.
template <int kDim, int kBlocks>
__device__ void weigh_columns(float (&p)[kBlocks][4], const Statistics* statistics) {
  const auto* const pairs = reinterpret_cast<const float4*>(statistics) + threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    const float4 of = pairs[4 * i];  // of columns 8i + 2t and 8i + 2t + 1
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      p[i][e] = exp2_approximate(fmaf(p[i][e], log2_scale<kDim>(), -(e % 2 ? of.z : of.x)));
    }
  }
}
template <int kBlocks>
__device__ void differentiate_columns(float (&ds)[kBlocks][4], const float (&p)[kBlocks][4],
                                      const Statistics* statistics) {
  const auto* const pairs = reinterpret_cast<const float4*>(statistics) + threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    const float4 of = pairs[4 * i];
#pragma unroll
    for (int e = 0; e < 4; ++e) ds[i][e] = p[i][e] * (ds[i][e] - (e % 2 ? of.w : of.y));
  }
}

// The i-th group of 16 columns, rounded, as a left factor.
template <typename T, int kBlocks>
__device__ void as_factor(Pair (&a)[4], const float (&x)[kBlocks][4], int i) {
  const float (&low)[4] = x[2 * i], (&high)[4] = x[2 * i + 1];
  a[0] = narrow<T>(low[0], low[1]), a[1] = narrow<T>(low[2], low[3]);
  a[2] = narrow<T>(high[0], high[1]), a[3] = narrow<T>(high[2], high[3]);
}

// Writes the first `rows` of 16 rows, scaled. `stage`, 16 rows of shared memory, lets threads write whole chunks.
template <typename T, int kDim>
__device__ void store_tile(T* to, int stride, int rows, const float (&c)[kDim / 8][4], float scale_g, float scale_g8,
                           T* stage) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) {
    T* at = stage + g * kStride + 8 * i + 2 * t;
    if (g < rows) *reinterpret_cast<Pair*>(at) = narrow<T>(c[i][0] * scale_g, c[i][1] * scale_g);
    if (g + 8 < rows) {
      *reinterpret_cast<Pair*>(at + 8 * kStride) = narrow<T>(c[i][2] * scale_g8, c[i][3] * scale_g8);
    }
  }
  __syncwarp();
#pragma unroll 1
  for (int i = lane; i < rows * kChunks<kDim>; i += 32) {
    const int row = i / kChunks<kDim>, column = i % kChunks<kDim> * 8;
    *reinterpret_cast<uint4*>(to + row * stride + column) =
        *reinterpret_cast<const uint4*>(stage + row * kStride + column);
  }
}

// Launches a kernel with one block for each head of each image.
template <typename Kernel, typename... Args>
cudaError_t launch(Kernel kernel, int64_t blocks, int warps, int shared_bytes, cudaStream_t stream, Args... args) {
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  if (const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes)) {
    return error;
  }
  kernel<<<static_cast<unsigned>(blocks), 32 * warps, shared_bytes, stream>>>(args...);
  return cudaGetLastError();
}

// Calls `call` with a value of the element type, and the channels of a head as a type.
template <typename Call>
cudaError_t with_types(DType dtype, int head_dim, Call call) {
  return with_element(dtype, [&](auto element) {
    return head_dim == 64 ? call(element, std::integral_constant<int, 64>{})
                          : call(element, std::integral_constant<int, 72>{});
  });
}

// In packed_attention_wide.cu, for more tokens than kMostWarpTokens.
constexpr int kMostWarpTokens = 128;
cudaError_t launch_packed_attention_wide(const void* qkv, void* out, float* lse, int64_t batch, int tokens, int heads,
                                         int head_dim, DType dtype, cudaStream_t stream);
cudaError_t launch_packed_attention_wide_backward(const void* dout, const void* qkv, const void* out, const float* lse,
                                                  void* dqkv, int64_t batch, int tokens, int heads, int head_dim,
                                                  DType dtype, cudaStream_t stream);

}  // namespace dcae_fast
