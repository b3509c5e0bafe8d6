// ReLU linear attention in one pass over memory. See ops.h for the formula and the layout.
//
// A cluster of blocks computes one head of one image. Groups of 16 positions are distributed over its warps. First each
// warp sums relu(k) vᵀ and relu(k) over its positions on tensor cores. Then the cluster adds up the sums through
// distributed shared memory. Then each warp multiplies relu(q) of its positions by the sums. The order of positions and
// channels within a fragment of the tensor cores is free, as long as both factors agree. It is chosen such that each
// thread reads and writes neighbouring channels, directly from and to memory.

#include <cooperative_groups.h>

#include <algorithm>
#include <climits>

#include "launch.h"
#include "ops.h"
#include "tensor_cores.cuh"

namespace dcae_fast {

namespace {

namespace cg = cooperative_groups;

constexpr int kDim = 32;                  // channels of q, k and v of a head
constexpr int kSums = (kDim + 1) * kDim;  // of relu(k) vᵀ, then of relu(k)
constexpr int kGroup = 16;                // positions of a tensor core fragment
constexpr int kUnroll = 2;                // groups that a warp reads at a time
constexpr int kWarps = 8;                 // of a block
constexpr int kThreads = 32 * kWarps;
constexpr int kBlocksPerSM = 2;  // as many as the registers allow
constexpr int kMaxCluster = 8;   // blocks

template <typename T>
__device__ Pair relu(Pair pair);

template <>
__device__ Pair relu<__nv_bfloat16>(Pair pair) {
  const auto y = __hmax2_nan(reinterpret_cast<const __nv_bfloat162&>(pair), __nv_bfloat162{});
  return reinterpret_cast<const Pair&>(y);
}

template <>
__device__ Pair relu<__half>(Pair pair) {
  const auto y = __hmax2_nan(reinterpret_cast<const __half2&>(pair), __half2{});
  return reinterpret_cast<const Pair&>(y);
}

// A pair of the first elements of two pairs, and a pair of the second elements.
__device__ Pair first(Pair a, Pair b) { return __byte_perm(a, b, 0x5410); }
__device__ Pair second(Pair a, Pair b) { return __byte_perm(a, b, 0x7632); }

// c += a b on tensor cores, with a [16, 8] and b [8, 8] in TF32, which represents half precision exactly.
__device__ void multiply_add_tf32(float (&c)[4], const float (&a)[4], const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(b[0]), "r"(b[1]));
}

__device__ unsigned round_to_tf32(float x) {
  unsigned y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

__device__ float4 operator+(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }

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
__device__ void store_sums(float4 (&to)[kSums / 4], const float (&products)[2][4][4], const float (&totals)[2][4],
                           int g, int t) {
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
__device__ void add_up(const cg::cluster_group& cluster, float4 (&block_sums)[kSums / 4], float4 (&sums)[kSums / 4]) {
  const int blocks = cluster.num_blocks(), rank = cluster.block_rank();
  cluster.sync();
  for (int i = rank + threadIdx.x * blocks; i < kSums / 4; i += kThreads * blocks) {
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

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    relu_linear_attention_kernel(const T* __restrict__ qkv, T* __restrict__ out, int positions, int heads,
                                 int out_channels, float eps) {
  __shared__ float4 warp_sums[kWarps][kSums / 4], block_sums[kSums / 4], sums[kSums / 4];
  const cg::cluster_group cluster = cg::this_cluster();
  const int blocks = cluster.num_blocks();
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int pair = blockIdx.x / blocks, head = pair % heads;
  const int64_t first_position = static_cast<int64_t>(pair / heads) * positions;
  const int stride = heads * 3 * kDim;  // of a position
  qkv += first_position * stride + head * 3 * kDim;
  out += first_position * out_channels + head * kDim;
  const int every = blocks * kWarps, groups = (positions + kGroup - 1) / kGroup;
  const int first_group = cluster.block_rank() * kWarps + warp;

  float products[2][4][4] = {}, totals[2][4] = {};
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

  uint4 q[kUnroll][2];  // rows g and g + 8 of a group, channels 8t to 8t + 7
  const auto load_q = [&](int group) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int position = (group + u * every) * kGroup + g + 8 * r;
        const T* from = qkv + static_cast<int64_t>(position) * stride + 8 * t;
        q[u][r] = position < positions ? __ldg(reinterpret_cast<const uint4*>(from)) : uint4{};
      }
    }
  };
  load_q(first_group);

  store_sums(warp_sums[warp], products, totals, g, t);
  __syncthreads();
  for (int i = threadIdx.x; i < kSums / 4; i += kThreads) {
    float4 sum = warp_sums[0][i];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum = sum + warp_sums[w][i];
    (blocks == 1 ? sums : block_sums)[i] = sum;
  }
  if (blocks == 1) {
    __syncthreads();
  } else {
    add_up(cluster, block_sums, sums);
  }

  // In fragments of q, columns t and t + 4 of step s are channels 8t + 2s and 8t + 2s + 1. In fragments of the result,
  // column 2t + e of tile j is channel 8t + 2j + e.
  const auto& state = reinterpret_cast<const float (&)[kDim + 1][kDim]>(sums);
  unsigned factor[4][4][2], total[4][2];
#pragma unroll
  for (int s = 0; s < 4; ++s) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int d = 8 * t + 2 * s + h;
#pragma unroll
      for (int j = 0; j < 4; ++j) factor[s][j][h] = round_to_tf32(state[d][g / 2 * 8 + 2 * j + g % 2]);
      total[s][h] = round_to_tf32(state[kDim][d]);
    }
  }
  for (int group = first_group; group < groups; group += kUnroll * every) {
    if (group != first_group) load_q(group);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int position = (group + u * every) * kGroup + g;
      float numerator[4][4] = {}, denominator[4] = {};
      const Pair words[2][4] = {{q[u][0].x, q[u][0].y, q[u][0].z, q[u][0].w},
                                {q[u][1].x, q[u][1].y, q[u][1].z, q[u][1].w}};
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const float2 low = widen<T>(relu<T>(words[0][s])), high = widen<T>(relu<T>(words[1][s]));
        const float a[4] = {low.x, high.x, low.y, high.y};
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply_add_tf32(numerator[j], a, factor[s][j]);
        multiply_add_tf32(denominator, a, total[s]);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float scale = 1.0f / (denominator[2 * r] + eps);
        Pair y[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) y[j] = narrow<T>(numerator[j][2 * r] * scale, numerator[j][2 * r + 1] * scale);
        if (position + 8 * r < positions) {
          T* to = out + static_cast<int64_t>(position + 8 * r) * out_channels + 8 * t;
          *reinterpret_cast<uint4*>(to) = {y[0], y[1], y[2], y[3]};
        }
      }
    }
  }
}

}  // namespace

cudaError_t launch_relu_linear_attention(const void* qkv, void* out, int64_t batch, int positions, int heads,
                                         int out_channels, float eps, DType dtype, cudaStream_t stream) {
  int processors;
  if (const auto error = count_processors(&processors)) return error;
  const int64_t pairs = batch * heads;
  int cluster = 1;  // more blocks where processors would be idle and every warp still has kUnroll groups
  while (cluster < kMaxCluster && 2 * cluster * pairs <= kBlocksPerSM * processors &&
         2 * cluster * kWarps * kUnroll * kGroup <= positions) {
    cluster *= 2;
  }
  if (pairs * cluster > INT_MAX) return cudaErrorInvalidConfiguration;

  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = static_cast<unsigned>(pairs * cluster);
  config.blockDim = kThreads;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return with_element(dtype, [&](auto element) {
    using T = decltype(element);
    return cudaLaunchKernelEx(&config, relu_linear_attention_kernel<T>, static_cast<const T*>(qkv),
                              static_cast<T*>(out), positions, heads, out_channels, eps);
  });
}

}  // namespace dcae_fast
