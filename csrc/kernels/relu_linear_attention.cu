// ReLU linear attention in one pass over memory. See ops.h for the formula and the layout.
//
// A cluster of blocks computes one head of one image. Groups of 16 positions are distributed over its warps. First each
// warp sums relu(k) vᵀ and relu(k) over its positions on tensor cores. Then the cluster adds up the sums through
// distributed shared memory. Then each warp multiplies relu(q) of its positions by the sums. The order of positions and
// channels within a fragment of the tensor cores is free, as long as both factors agree. It is chosen such that each
// thread reads and writes neighbouring channels, directly from and to memory.

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "launch.h"
#include "ops.h"
#include "relu_linear_attention.cuh"

namespace dcae_fast {

namespace {

constexpr int kUnroll = 2;  // groups that a warp reads at a time
constexpr int kWarps = kMaxWarps;  // of a block
constexpr int kThreads = 32 * kWarps;
constexpr int kBlocksPerSM = 2;  // as many as the registers allow

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

// Out: T or int8_t.
template <typename T, typename Out>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    relu_linear_attention_kernel(const T* __restrict__ qkv, Out* __restrict__ out, const float* __restrict__ out_factor,
                                 int positions, int heads, int out_channels, float eps) {
  constexpr bool is_int8 = sizeof(Out) == 1;
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
  sum_keys_and_values<T, kUnroll>(qkv, stride, positions, first_group, every, products, totals);

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
  add_up(cluster, warp_sums, block_sums, sums);

  // In fragments of q, columns t and t + 4 of step s are channels 8t + 2s and 8t + 2s + 1. In fragments of the result,
  // column 2t + e of tile j is channel 8t + 2j + e.
  const auto& state = reinterpret_cast<const float (&)[kDim + 1][kDim]>(sums);
  unsigned factor[4][4][2], total[4][2];
  float scale_of_column[4];  // of the result: column g of tile j is channel g / 2 * 8 + 2j + g % 2
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    scale_of_column[j] = is_int8 ? out_factor[head * kDim + g / 2 * 8 + 2 * j + g % 2] : 1.0f;
  }
#pragma unroll
  for (int s = 0; s < 4; ++s) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int d = 8 * t + 2 * s + h;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        factor[s][j][h] = round_to_tf32(state[d][g / 2 * 8 + 2 * j + g % 2] * scale_of_column[j]);
      }
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
        unsigned y[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float low = numerator[j][2 * r] * scale, high = numerator[j][2 * r + 1] * scale;
          y[j] = is_int8 ? quantize(low, high) : narrow<T>(low, high);
        }
        if (position + 8 * r < positions) {
          Out* to = out + static_cast<int64_t>(position + 8 * r) * out_channels + 8 * t;
          if constexpr (is_int8) {
            *reinterpret_cast<uint2*>(to) = {__byte_perm(y[0], y[1], 0x5410), __byte_perm(y[2], y[3], 0x5410)};
          } else {
            *reinterpret_cast<uint4*>(to) = {y[0], y[1], y[2], y[3]};
          }
        }
      }
    }
  }
}

}  // namespace

cudaError_t launch_relu_linear_attention(const void* qkv, void* out, const float* out_factor, int64_t batch,
                                         int positions, int heads, int out_channels, float eps, DType dtype,
                                         cudaStream_t stream) {
  int processors;
  if (const auto error = count_processors(&processors)) return error;
  const int64_t pairs = batch * heads;
  int cluster = 1;  // more blocks where processors would be idle and every warp still has kUnroll groups
  while (cluster < kMaxCluster && 2 * cluster * pairs <= kBlocksPerSM * processors &&
         2 * cluster * kWarps * kUnroll * kGroup <= positions) {
    cluster *= 2;
  }
  return with_element(dtype, [&](auto element) {
    using T = decltype(element);
    const auto launch = [&](auto* typed_out) {
      using Out = std::remove_pointer_t<decltype(typed_out)>;
      return launch_clusters(relu_linear_attention_kernel<T, Out>, pairs, cluster, kThreads, stream,
                             static_cast<const T*>(qkv), typed_out, out_factor, positions, heads, out_channels, eps);
    };
    return out_factor == nullptr ? launch(static_cast<T*>(out)) : launch(static_cast<int8_t*>(out));
  });
}

}  // namespace dcae_fast
