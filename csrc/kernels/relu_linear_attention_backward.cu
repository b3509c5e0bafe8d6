// The gradient of ReLU linear attention in one pass over memory. See ops.h for the formula and the layout.
//
// With S = sum of relu(k) vᵀ and z = sum of relu(k) over the positions, and at each position w = S dout and
// r = 1 / (relu(q) . z + eps), the gradients are
//
//     dq = r w + f z,    f = -r² relu(q) . w,    dS = sum of relu(q) (r dout)ᵀ,    dz = sum of f relu(q),
//     dk = dS v + dz,    dv = dSᵀ relu(k),
//
// where dq and dk are zero if q and k are not positive. A cluster of blocks computes one head of one image, in three
// steps: it sums S and z, computes dq and sums dS and dz, and computes dk and dv. Tensor cores multiply bfloat16. S, dS
// and r dout are split into two terms in bfloat16, so that their products have 16 bits of precision. The order of
// positions and channels within fragments is that of relu_linear_attention.cu.

#include <algorithm>

#include "launch.h"
#include "ops.h"
#include "relu_linear_attention.cuh"

namespace dcae_fast {

namespace {

using T = __nv_bfloat16;
constexpr int kUnroll = 2;      // groups that a warp reads at a time
constexpr int kMostWarps = 6;   // of a block
constexpr int kWarpsPerSM = 12;  // as many as 168 registers a thread allow

// A sum of two pairs that is close to a pair of fp32.
struct Split {
  Pair high, low;
};

__device__ Split split(float first, float second) {
  const Pair high = narrow<T>(first, second);
  const float2 rounded = widen<T>(high);
  return {high, narrow<T>(first - rounded.x, second - rounded.y)};
}

// A matrix [32, 32], the right factor of a product: [channel k / 16][column / 8], fragments of both terms.
struct Factor {
  Pair high[2][4][2], low[2][4][2];
};

// Row k and column n of a thread's fragments are channels 8t + ... and n; value(k, n): the matrix.
template <typename Value>
__device__ void load_factor(Factor& factor, int g, int t, const Value& value) {
#pragma unroll
  for (int s = 0; s < 2; ++s) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int k = 8 * t + 4 * s + 2 * h, n = g / 2 * 8 + 2 * j + g % 2;
        const Split two = split(value(k, n), value(k + 1, n));
        factor.high[s][j][h] = two.high, factor.low[s][j][h] = two.low;
      }
    }
  }
}

// product = rows factor. rows: channels 8t to 8t + 7 of rows g and g + 8. product[j]: channels 8t + 2j and 8t + 2j + 1
// of row g, then of row g + 8.
__device__ void multiply(float (&product)[4][4], const Pair (&rows)[2][4], const Factor& factor) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    product[j][0] = product[j][1] = product[j][2] = product[j][3] = 0.0f;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const Pair a[4] = {rows[0][2 * s], rows[1][2 * s], rows[0][2 * s + 1], rows[1][2 * s + 1]};
      multiply_add<T>(product[j], a, factor.high[s][j]);
      multiply_add<T>(product[j], a, factor.low[s][j]);
    }
  }
}

__device__ float sum_of_four(float x) {  // over the threads of a row
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

__device__ void load_row(Pair (&to)[4], const T* from, bool exists) {
  const uint4 four = exists ? __ldg(reinterpret_cast<const uint4*>(from)) : uint4{};
  to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}

__device__ void store_row(T* to, const Pair (&from)[4]) {
  __stwb(reinterpret_cast<uint4*>(to), uint4{from[0], from[1], from[2], from[3]});
}

__device__ float2 pair_of(const float (&row)[kDim], int channel) {
  return *reinterpret_cast<const float2*>(&row[channel]);
}

// 0 where relu(x) is 0, else dx.
__device__ float relu_backward(float relu_of_x, float dx) { return relu_of_x <= 0.0f ? 0.0f : dx; }

// One head of one image.
struct Head {
  const T *dout, *qkv;
  T* dqkv;
  int positions, stride, out_channels;  // stride: elements of qkv from a position to the next
};

// Computes dq of a group of positions, and adds the group's dS and dz to the warp's sums: products as in sum_group,
// totals of channels 4g to 4g + 3 over the thread's positions.
__device__ void query_group(const Head& head, int group, const Factor& factor, const float (&z)[kDim], float eps,
                            float (&products)[2][4][4], float (&totals)[4]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int first_position = group * kGroup;
  const auto exists = [&](int row) { return first_position + row < head.positions; };
  const auto offset = [&](int row) { return static_cast<int64_t>(first_position + row) * head.stride; };
  const auto out_offset = [&](int row) { return static_cast<int64_t>(first_position + row) * head.out_channels; };
  float scales[2], gradients[2];  // r and f of rows g and g + 8
  {
    Pair q[2][4], dout[2][4];
    float w[4][4];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = g + 8 * r;
      load_row(q[r], head.qkv + offset(row) + 8 * t, exists(row));
      load_row(dout[r], head.dout + out_offset(row) + 8 * t, exists(row));
    }
    multiply(w, dout, factor);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float denominator = 0.0f, product = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 two = widen<T>(q[r][j] = relu<T>(q[r][j])), total = pair_of(z, 8 * t + 2 * j);
        denominator = fmaf(two.x, total.x, fmaf(two.y, total.y, denominator));
        product = fmaf(two.x, w[j][2 * r], fmaf(two.y, w[j][2 * r + 1], product));
      }
      denominator = sum_of_four(denominator), product = sum_of_four(product);
      scales[r] = exists(g + 8 * r) ? 1.0f / (denominator + eps) : 0.0f;
      gradients[r] = -(product * scales[r]) * scales[r];
      Pair dq[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 two = widen<T>(q[r][j]), total = pair_of(z, 8 * t + 2 * j);
        const float first = fmaf(scales[r], w[j][2 * r], gradients[r] * total.x);
        const float second = fmaf(scales[r], w[j][2 * r + 1], gradients[r] * total.y);
        dq[j] = narrow<T>(relu_backward(two.x, first), relu_backward(two.y, second));
      }
      if (exists(g + 8 * r)) store_row(head.dqkv + offset(g + 8 * r) + 8 * t, dq);
    }
  }

  Pair a[2][4];
  Split b[4][2];
#pragma unroll
  for (int p = 0; p < 2; ++p) {  // rows 2t + 8p and 2t + 8p + 1
    uint2 q[2];
    float in[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = 2 * t + i + 8 * p;
      const T* from_q = head.qkv + offset(row) + 4 * g;
      const T* from_dout = head.dout + out_offset(row) + 4 * g;
      q[i] = exists(row) ? __ldg(reinterpret_cast<const uint2*>(from_q)) : uint2{};
      const uint2 dout = exists(row) ? __ldg(reinterpret_cast<const uint2*>(from_dout)) : uint2{};
      q[i] = {relu<T>(q[i].x), relu<T>(q[i].y)};
      const float scale = __shfl_sync(~0u, scales[p], 4 * (2 * t + i));
      const float gradient = __shfl_sync(~0u, gradients[p], 4 * (2 * t + i));
      const float2 q0 = widen<T>(q[i].x), q1 = widen<T>(q[i].y), d0 = widen<T>(dout.x), d1 = widen<T>(dout.y);
      totals[0] = fmaf(q0.x, gradient, totals[0]), totals[1] = fmaf(q0.y, gradient, totals[1]);
      totals[2] = fmaf(q1.x, gradient, totals[2]), totals[3] = fmaf(q1.y, gradient, totals[3]);
      in[i][0] = d0.x * scale, in[i][1] = d0.y * scale, in[i][2] = d1.x * scale, in[i][3] = d1.y * scale;
    }
    a[0][2 * p] = first(q[0].x, q[1].x), a[0][2 * p + 1] = second(q[0].x, q[1].x);
    a[1][2 * p] = first(q[0].y, q[1].y), a[1][2 * p + 1] = second(q[0].y, q[1].y);
#pragma unroll
    for (int j = 0; j < 4; ++j) b[j][p] = split(in[0][j], in[1][j]);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const Pair high[2] = {b[j][0].high, b[j][1].high}, low[2] = {b[j][0].low, b[j][1].low};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      multiply_add<T>(products[i][j], a[i], high);
      multiply_add<T>(products[i][j], a[i], low);
    }
  }
}

__global__ void __launch_bounds__(32 * kMostWarps, kWarpsPerSM / kMostWarps)
    relu_linear_attention_backward_kernel(const T* __restrict__ dout, const T* __restrict__ qkv, T* __restrict__ dqkv,
                                          int positions, int heads, int out_channels, float eps) {
  __shared__ float4 warp_sums[kMaxWarps][kSums / 4], block_sums[kSums / 4], sums[kSums / 4];
  const cg::cluster_group cluster = cg::this_cluster();
  const int blocks = cluster.num_blocks(), warps = blockDim.x / 32;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int pair = blockIdx.x / blocks, number = pair % heads;
  const int64_t first_position = static_cast<int64_t>(pair / heads) * positions;
  const int stride = heads * 3 * kDim;
  const int64_t start = first_position * stride + number * 3 * kDim;
  const Head head = {dout + first_position * out_channels + number * kDim, qkv + start, dqkv + start, positions, stride,
                     out_channels};
  const int every = blocks * warps, groups = (positions + kGroup - 1) / kGroup;
  const int first_group = cluster.block_rank() * warps + warp;
  const auto& state = reinterpret_cast<const float (&)[kDim + 1][kDim]>(sums);

  {
    float products[2][4][4] = {}, totals[2][4] = {};
    sum_keys_and_values<T, kUnroll>(head.qkv, stride, positions, first_group, every, products, totals);
    store_sums(warp_sums[warp], products, totals, g, t);
  }
  add_up(cluster, warp_sums, block_sums, sums);
  {
    Factor factor;
    load_factor(factor, g, t, [&](int k, int n) { return state[n][k]; });
    float products[2][4][4] = {}, totals[4] = {};
    for (int group = first_group; group < groups; group += every) {
      query_group(head, group, factor, state[kDim], eps, products, totals);
    }
    float rows[2][4];  // of all positions of the warp, as store_sums takes them
#pragma unroll
    for (int i = 0; i < 4; ++i) rows[i / 2][i % 2 * 2] = sum_of_four(totals[i]);
    store_sums(warp_sums[warp], products, rows, g, t);
  }
  add_up(cluster, warp_sums, block_sums, sums);

  Factor of_value, of_key;
  load_factor(of_value, g, t, [&](int k, int n) { return state[n][k]; });
  load_factor(of_key, g, t, [&](int k, int n) { return state[k][n]; });
  for (int group = first_group; group < groups; group += every) {
    Pair k[2][4], v[2][4], result[4];
    float product[4][4];
    const int first_row = group * kGroup + g;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const T* from = head.qkv + static_cast<int64_t>(first_row + 8 * r) * stride + 8 * t;
      load_row(k[r], from + kDim, first_row + 8 * r < positions);
      load_row(v[r], from + 2 * kDim, first_row + 8 * r < positions);
#pragma unroll
      for (int j = 0; j < 4; ++j) k[r][j] = relu<T>(k[r][j]);
    }
    T* to = head.dqkv + static_cast<int64_t>(first_row) * stride + 8 * t;
    multiply(product, v, of_value);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 two = widen<T>(k[r][j]), dz = pair_of(state[kDim], 8 * t + 2 * j);
        const float first = product[j][2 * r] + dz.x, second = product[j][2 * r + 1] + dz.y;
        result[j] = narrow<T>(relu_backward(two.x, first), relu_backward(two.y, second));
      }
      if (first_row + 8 * r < positions) store_row(to + 8 * r * stride + kDim, result);
    }
    multiply(product, k, of_key);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int j = 0; j < 4; ++j) result[j] = narrow<T>(product[j][2 * r], product[j][2 * r + 1]);
      if (first_row + 8 * r < positions) store_row(to + 8 * r * stride + 2 * kDim, result);
    }
  }
}

}  // namespace

cudaError_t launch_relu_linear_attention_backward(const void* dout, const void* qkv, void* dqkv, int64_t batch,
                                                  int positions, int heads, int out_channels, float eps,
                                                  cudaStream_t stream) {
  int processors;
  if (const auto error = count_processors(&processors)) return error;
  const int64_t pairs = batch * heads, groups = divide_up(positions, kGroup);
  // small blocks where there are many heads, so that more of them run at a time
  const int most = pairs * kMostWarps > kWarpsPerSM * processors ? kMostWarps / 2 : kMostWarps;
  const int warps = static_cast<int>(std::min<int64_t>(most, groups));
  int cluster = 1;  // more blocks where processors would be idle and every warp still has kUnroll groups
  while (cluster < kMaxCluster && 2 * cluster * pairs * warps <= kWarpsPerSM * processors &&
         2 * cluster * warps * kUnroll <= groups) {
    cluster *= 2;
  }
  return launch_clusters(relu_linear_attention_backward_kernel, pairs, cluster, 32 * warps, stream,
                         static_cast<const T*>(dout), static_cast<const T*>(qkv), static_cast<T*>(dqkv), positions,
                         heads, out_channels, eps);
}

}  // namespace dcae_fast
