// The code that relu_linear_attention.cu and relu_linear_attention_backward.cu share: sums over the positions of a head
// of an image, added up over the warps of a cluster of blocks.
#pragma once

#include <cooperative_groups.h>

#include "tensor_cores.cuh"

namespace dcae_fast {

namespace cg = cooperative_groups;

constexpr int kDim = 32;                  // channels of q, k and v of a head
constexpr int kSums = (kDim + 1) * kDim;  // of relu(k) vᵀ, then of relu(k)
constexpr int kGroup = 16;                // positions of a tensor core fragment
constexpr int kMaxWarps = 8;              // of a block
constexpr int kMaxCluster = 8;            // blocks

template <typename T>
__device__ Pair relu(Pair pair);

template <>
__device__ inline Pair relu<__nv_bfloat16>(Pair pair) {
  const auto y = __hmax2_nan(reinterpret_cast<const __nv_bfloat162&>(pair), __nv_bfloat162{});
  return reinterpret_cast<const Pair&>(y);
}

template <>
__device__ inline Pair relu<__half>(Pair pair) {
  const auto y = __hmax2_nan(reinterpret_cast<const __half2&>(pair), __half2{});
  return reinterpret_cast<const Pair&>(y);
}

// A pair of the first elements of two pairs, and a pair of the second elements.
__device__ inline Pair first(Pair a, Pair b) { return __byte_perm(a, b, 0x5410); }
__device__ inline Pair second(Pair a, Pair b) { return __byte_perm(a, b, 0x7632); }

__device__ inline float4 operator+(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }

// Adds relu(k) vᵀ and relu(k) of a group to the warp's sums. A thread passes channels 4g to 4g + 3 of k and v at
// positions 2t, 2t + 1, 2t + 8 and 2t + 9. products: rows g and g + 8 of tile i are channels 4g + 2i and 4g + 2i + 1 of
// k; column n of tile j is channel 4n + j of v. totals: the same rows, all columns equal.
template <typename T>
__device__ void sum_group(const uint2 (&k)[4], const uint2 (&v)[4], float (&products)[2][4][4], float (&totals)[2][4]) {
  Pair a[2][4], b[4][2];
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    const uint2 k0 = {relu<T>(k[2 * p].x), relu<T>(k[2 * p].y)};
    const uint2 k1 = {relu<T>(k[2 * p + 1].x), relu<T>(k[2 * p + 1].y)};
    const uint2 v0 = v[2 * p], v1 = v[2 * p + 1];
    a[0][2 * p] = first(k0.x, k1.x), a[0][2 * p + 1] = second(k0.x, k1.x);
    a[1][2 * p] = first(k0.y, k1.y), a[1][2 * p + 1] = second(k0.y, k1.y);
    b[0][p] = first(v0.x, v1.x), b[1][p] = second(v0.x, v1.x);
    b[2][p] = first(v0.y, v1.y), b[3][p] = second(v0.y, v1.y);
  }
  const Pair ones[2] = {narrow<T>(1.0f, 1.0f), narrow<T>(1.0f, 1.0f)};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) multiply_add<T>(products[i][j], a[i], b[j]);
    multiply_add<T>(totals[i], a[i], ones);
  }
}

// Stores the thread's share of its warp's sums, channels 4g to 4g + 3 of k by channels 8t to 8t + 7 of v.
__device__ inline void store_sums(float4 (&to)[kSums / 4], const float (&products)[2][4][4],
                                  const float (&totals)[2][4], int g, int t) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int d = 4 * g + 2 * i + r;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = 2 * r + e;
        to[d * kDim / 4 + 2 * t + e] = {products[i][0][c], products[i][1][c], products[i][2][c], products[i][3][c]};
      }
      if (t == 0) reinterpret_cast<float*>(&to[kDim * kDim / 4])[d] = totals[i][2 * r];
    }
  }
}

// Adds up the sums of a cluster's blocks. Each block adds up a share of the sums and writes the result to all blocks.
__device__ inline void add_up_blocks(const cg::cluster_group& cluster, float4 (&block_sums)[kSums / 4],
                                     float4 (&sums)[kSums / 4]) {
  const int blocks = cluster.num_blocks(), rank = cluster.block_rank();
  cluster.sync();
  for (int i = rank + threadIdx.x * blocks; i < kSums / 4; i += static_cast<int>(blockDim.x) * blocks) {
    float4 parts[kMaxCluster];
#pragma unroll
    for (int r = 0; r < kMaxCluster; ++r) parts[r] = *cluster.map_shared_rank(&block_sums[i], r < blocks ? r : rank);
    float4 sum = parts[0];
#pragma unroll
    for (int r = 1; r < kMaxCluster; ++r) {
      if (r < blocks) sum = sum + parts[r];
    }
    for (int r = 0; r < blocks; ++r) *cluster.map_shared_rank(&sums[i], r) = sum;
  }
  cluster.sync();
}

// Adds up the sums of a cluster's warps. The block must have read earlier `sums`.
__device__ inline void add_up(const cg::cluster_group& cluster, const float4 (&warp_sums)[kMaxWarps][kSums / 4],
                              float4 (&block_sums)[kSums / 4], float4 (&sums)[kSums / 4]) {
  const int warps = blockDim.x / 32, blocks = cluster.num_blocks();
  __syncthreads();
  for (int i = threadIdx.x; i < kSums / 4; i += 32 * warps) {
    float4 sum = warp_sums[0][i];
#pragma unroll
    for (int w = 1; w < kMaxWarps; ++w) {
      if (w < warps) sum = sum + warp_sums[w][i];
    }
    (blocks == 1 ? sums : block_sums)[i] = sum;
  }
  if (blocks == 1) {
    __syncthreads();
  } else {
    add_up_blocks(cluster, block_sums, sums);
  }
}

// Adds the sums of a warp's positions: groups `first_group`, `first_group + every` and so on, kUnroll of them read at a
// time. qkv: of the head at the image's first position; stride: elements from a position to the next.
template <typename T, int kUnroll>
__device__ void sum_keys_and_values(const T* __restrict__ qkv, int stride, int positions, int first_group, int every,
                                    float (&products)[2][4][4], float (&totals)[2][4]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, groups = (positions + kGroup - 1) / kGroup;
  for (int group = first_group; group < groups; group += kUnroll * every) {
    uint2 k[kUnroll][4], v[kUnroll][4];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        const int position = (group + u * every) * kGroup + 2 * t + p % 2 + p / 2 * 8;
        const bool valid = position < positions;
        const T* from = qkv + static_cast<int64_t>(position) * stride + 4 * g;
        k[u][p] = valid ? __ldg(reinterpret_cast<const uint2*>(from + kDim)) : uint2{};
        v[u][p] = valid ? __ldg(reinterpret_cast<const uint2*>(from + 2 * kDim)) : uint2{};
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) sum_group<T>(k[u], v[u], products, totals);
  }
}

}  // namespace dcae_fast
