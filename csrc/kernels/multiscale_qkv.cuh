// The code that multiscale_qkv.cu and multiscale_qkv_backward.cu share: products of pixels with the matrices of their
// groups, and a depthwise 5x5 convolution that takes one row at a time.
#pragma once

#include "strips.cuh"
#include "tensor_cores.cuh"

namespace dcae_fast {

constexpr int kSize = 5, kHalo = kSize / 2, kTaps = kSize * kSize;
constexpr int kGroup = 32;    // channels of a group; a strip has two groups
constexpr int kPixels = 16;   // multiplied at a time
constexpr int kPixelSize = kPairs + 4, kFilterSize = kGroup / 2 + 4;  // in pairs; padded against bank conflicts

// Multiplies 16 pixels by the matrices of their two groups: to[p][n] = sum over k of from[p][k] matrix[n][k].
//
// address(i): where pairs 4i to 4i + 3 of pixel lane % 16 lie in shared memory. The pixels may lie in `to`.
template <typename T, typename Address>
__device__ void multiply_groups(Pair (&to)[kPixels][kPixelSize], const Pair (&matrices)[2 * kGroup][kFilterSize],
                                const Address& address) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int group = 0; group < 2; ++group) {
    Pair a[2][4];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      load_matrices(a[s][0], a[s][1], a[s][2], a[s][3], address(group * 4 + 2 * s + lane / 16));
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kGroup / 8; ++i) {
      Pair b[2][2];
      float c[4] = {};
      const Pair* row = &matrices[group * kGroup + 8 * i + lane % 8][lane / 8 * 4];
      load_matrices(b[0][0], b[0][1], b[1][0], b[1][1], shared_address(row));
      multiply_add<T>(c, a[0], b[0]);
      multiply_add<T>(c, a[1], b[1]);
      Pair* product = &to[lane / 4][(group * kGroup + 8 * i) / 2 + lane % 4];
      product[0] = narrow<T>(c[0], c[1]);
      product[8 * kPixelSize] = narrow<T>(c[2], c[3]);
    }
  }
  __syncwarp();
}

// Adds an input row, with its halo, to the output rows that depend on it. sums: of the output rows from two above the
// input row to one below it; after the call, of the rows from one above it to two below it. done: the row that the
// input row completes. kFlip: of the transposed convolution.
template <bool kFlip>
__device__ void add_row(const float (&in)[kColumns + 2 * kHalo][2], const float (&taps)[2][kTaps],
                        float (&sums)[kSize - 1][kColumns][2], float (&done)[kColumns][2]) {
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float of_rows[kSize] = {sums[0][j][c], sums[1][j][c], sums[2][j][c], sums[3][j][c], 0.0f};
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        float& sum = of_rows[kSize - 1 - tap / kSize];
        sum = fmaf(in[j + tap % kSize][c], taps[c][kFlip ? kTaps - 1 - tap : tap], sum);
      }
      done[j][c] = of_rows[0];
#pragma unroll
      for (int i = 1; i < kSize; ++i) sums[i - 1][j][c] = of_rows[i];
    }
  }
}

}  // namespace dcae_fast
