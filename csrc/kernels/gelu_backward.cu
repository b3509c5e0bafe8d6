// GELU and its gradient in one pass over a matrix, and sums of the gradient down its columns. See ops.h.
//
// A warp computes 256 columns, eight a lane. Their sums stay in registers until the block adds up the sums of its
// warps.

#include <algorithm>
#include <cstdint>

#include "launch.h"
#include "ops.h"
#include "pairs.cuh"

namespace dcae_fast {

namespace {

constexpr int kWarps = 4;
constexpr int kColumns = 256;  // of a block
constexpr int kBlocks = 12;    // on a multiprocessor at once
constexpr int kPairs = 4;      // of a lane in one row

struct Value {
  float slope, gelu;  // gelu'(h) and gelu(h)
};

// (1 + tanh(z)) / 2 is sigmoid(2 z).
template <bool kTanh>
__device__ Value gelu(float h) {
  if constexpr (kTanh) {
    constexpr float kTwice = 1.5957691216f, kCubic = 0.044715f;  // 2 sqrt(2 / pi)
    const float cdf = __fdividef(1.0f, 1.0f + __expf(-h * kTwice * (1.0f + h * h * kCubic)));
    return {cdf + h * cdf * (1.0f - cdf) * kTwice * (1.0f + h * h * (3.0f * kCubic)), h * cdf};
  } else {
    // Abramowitz & Stegun, 26.2.17: error below 7.5e-8; shares the exponential with the density.
    const float density = 0.3989422804f * __expf(-0.5f * h * h);
    const float t = __fdividef(1.0f, 1.0f + 0.2316419f * fabsf(h));
    const float series =
        0.319381530f + t * (-0.356563782f + t * (1.781477937f + t * (-1.821255978f + t * 1.330274429f)));
    const float tail = density * t * series, cdf = h < 0.0f ? tail : 1.0f - tail;
    return {cdf + h * density, h * cdf};
  }
}

// The grid is (blocks of columns, splits of the rows). All blocks run at once, so that there is no half-empty last
// wave.
template <typename T, bool kTanh, bool kGelu>
__global__ void __launch_bounds__(32 * kWarps, kBlocks)
    gelu_backward_kernel(const T* __restrict__ dg, const T* __restrict__ h, T* __restrict__ dh, T* __restrict__ g,
                         float* __restrict__ sums, int64_t rows, int columns) {
  __shared__ __align__(16) float shared[kWarps][kColumns];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = blockIdx.x * kColumns + 8 * lane;
  float total[2 * kPairs] = {};
  if (column < columns) {
#pragma unroll 1
    for (int64_t row = int64_t{blockIdx.y} * kWarps + warp; row < rows; row += int64_t{gridDim.y} * kWarps) {
      const int64_t at = row * columns + column;
      const uint4 of_dg = __ldg(reinterpret_cast<const uint4*>(dg + at));
      const uint4 of_h = __ldg(reinterpret_cast<const uint4*>(h + at));
      const Pair dgs[kPairs] = {of_dg.x, of_dg.y, of_dg.z, of_dg.w}, hs[kPairs] = {of_h.x, of_h.y, of_h.z, of_h.w};
      Pair dhs[kPairs], gs[kPairs];
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const float2 upstream = widen<T>(dgs[i]), x = widen<T>(hs[i]);
        const Value low = gelu<kTanh>(x.x), high = gelu<kTanh>(x.y);
        dhs[i] = narrow<T>(upstream.x * low.slope, upstream.y * high.slope);
        gs[i] = narrow<T>(low.gelu, high.gelu);
        const float2 rounded = widen<T>(dhs[i]);
        total[2 * i] += rounded.x;
        total[2 * i + 1] += rounded.y;
      }
      *reinterpret_cast<uint4*>(dh + at) = {dhs[0], dhs[1], dhs[2], dhs[3]};
      if constexpr (kGelu) *reinterpret_cast<uint4*>(g + at) = {gs[0], gs[1], gs[2], gs[3]};
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * kPairs; ++i) shared[warp][8 * lane + i] = total[i];
  __syncthreads();
  for (int i = threadIdx.x; i < kColumns && blockIdx.x * kColumns + i < columns; i += 32 * kWarps) {
    float sum = 0.0f;
#pragma unroll
    for (int from = 0; from < kWarps; ++from) sum += shared[from][i];
    sums[int64_t{blockIdx.y} * columns + blockIdx.x * kColumns + i] = sum;
  }
}

}  // namespace

cudaError_t gelu_backward_splits(int64_t rows, int columns, int* splits) {
  int processors;
  if (const auto error = count_processors(&processors)) return error;
  const int64_t fit = std::max<int64_t>(kBlocks * processors / divide_up(columns, kColumns), 1);
  *splits = static_cast<int>(std::clamp<int64_t>(divide_up(rows, kWarps), 1, fit));
  return cudaSuccess;
}

cudaError_t launch_gelu_backward(const void* dg, const void* h, void* dh, void* g, float* sums, int64_t rows,
                                 int columns, int splits, bool tanh, DType dtype, cudaStream_t stream) {
  return with_element(dtype, [&](auto half) {
    using T = decltype(half);
    const auto run = [&](auto kernel) {
      kernel<<<dim3(static_cast<unsigned>(divide_up(columns, kColumns)), splits), 32 * kWarps, 0, stream>>>(
          static_cast<const T*>(dg), static_cast<const T*>(h), static_cast<T*>(dh), static_cast<T*>(g), sums, rows,
          columns);
      return cudaGetLastError();
    };
    if (g == nullptr) return run(tanh ? gelu_backward_kernel<T, true, false> : gelu_backward_kernel<T, false, false>);
    return run(tanh ? gelu_backward_kernel<T, true, true> : gelu_backward_kernel<T, false, true>);
  });
}

}  // namespace dcae_fast
