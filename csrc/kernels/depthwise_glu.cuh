// The kernel that depthwise_glu.cu and depthwise_glu_backward.cu share: a depthwise 3x3 convolution, then the gated
// linear unit or the gradient of the convolution's result.
//
// A thread computes two value and two gate channels at four columns (strips.cuh). Their 36 weights stay in registers as
// fp32, and so do the partial sums of the two output rows that an input row does not complete. A thread therefore reads
// each row once.
#pragma once

#include "ops.h"
#include "strips.cuh"

namespace dcae_fast {

// The weights of the gate are multiplied by -log2(e) and, in the forward pass, the weights of the value by -ln(2), so
// that value * silu(gate) is value * gate / (1 + exp2(gate)).
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

template <bool kBackward>
constexpr int kGluMaxWarps = kBackward ? 8 : 4;  // of a block; chosen by measurement, as is kGluStages
template <bool kBackward>
constexpr int kGluStages = kBackward ? 2 : 3;  // of the ring
constexpr int kWarpsPerSM = 16;                // as many as 128 registers a thread allow

// 1 / (1 + exp2(x)) with the hardware's exp2 and reciprocal: a relative error of a few 2^-22 for x below 115.
__device__ inline float sigmoid2(float x) {
  float power, reciprocal;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(1.0f + power));
  return reciprocal;
}

// Forward: out is the result [.., M], two channels an Out: Pair, or uint16_t for the result times out_factor [M] as
// int8. Backward: out is the gradient of the convolution's result [.., 2M], dout the gradient of the gated unit's result.
template <typename T, bool kBackward, typename Out>
__global__ void __launch_bounds__(32 * kGluMaxWarps<kBackward>, kWarpsPerSM / kGluMaxWarps<kBackward>)
    depthwise_glu_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap dout,
                         const Pair* __restrict__ weight, const Pair* __restrict__ bias, Out* __restrict__ out,
                         const float2* __restrict__ out_factor, const Cut cut) {
  constexpr int kParts = kBackward ? 2 : 1;
  //   // [stage]: x [row][column with halo][half][pair]; backward then dout [row][column][pair]
  extern __shared__ __align__(128) Pair steps[];
  __shared__ uint64_t full[kGluStages<kBackward>];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int dout_row_size = cut.warps * kColumns * kPairs, row_size = 2 * (dout_row_size + 2 * kPairs);
  const int step_size = kRows * (row_size + kBackward * dout_row_size);
  const int first_pair = blockIdx.x * kPairs, first_strip = blockIdx.y;

  Ring ring(cut, steps, step_size, full, [&](const Pair* to, const Strip& from, int row, uint64_t* barrier) {
    bring(to, &x, first_pair, from.column - 1, row, from.image, barrier);
    if (kBackward) bring(to + kRows * row_size, &dout, first_pair, from.column, row - 1, from.image, barrier);
  });
  ring.start(first_strip);

  const int pair = first_pair + lane;
  float taps[2][2][9] = {}, start[2][2] = {};
  if (pair < cut.pairs) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float scale = half == 1 ? -kLog2E : kBackward ? 1.0f : -kLn2;
      const int64_t index = static_cast<int64_t>(half) * cut.pairs + pair;
      load_weights<T>(taps[half], weight, index, scale);
      if (bias != nullptr) {
        const float2 two = widen<T>(bias[index]);
        start[half][0] = two.x * scale, start[half][1] = two.y * scale;
      }
    }
    if constexpr (sizeof(Out) != sizeof(Pair)) {  // the value has the factors of the result
      const float2 two = out_factor[pair];
#pragma unroll
      for (int tap = 0; tap < 9; ++tap) taps[0][0][tap] *= two.x, taps[0][1][tap] *= two.y;
      start[0][0] *= two.x, start[0][1] *= two.y;
    }
  }
  __syncthreads();  // the barriers are ready

  for (int index = first_strip; index < cut.strips; index += cut.lanes) {
    const Strip to = strip(cut, index);
    const int column = to.column + warp * kColumns;
    const int columns = pair < cut.pairs ? cut.width - column : 0;  // that this thread writes
    Out* target = out + first_pixel(cut, to, column) * kParts * cut.pairs + pair;
    int written = 0;  // rows
    const auto write_row = [&](const float (&conv)[2][kColumns][2], const Pair* incoming) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        float y[kParts][2];
        const float2 dy = widen<T>(kBackward ? incoming[j * kPairs] : 0);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float value = conv[0][j][c], gate = conv[1][j][c], sigmoid = sigmoid2(gate);
          if constexpr (kBackward) {
            const float silu = gate * -kLn2 * sigmoid, d = c == 0 ? dy.x : dy.y;
            y[0][c] = d * silu;
            y[1][c] = d * value * (sigmoid + fmaf(silu, -sigmoid, silu));
          } else {
            y[0][c] = value * (gate * sigmoid);
          }
        }
        if (j < columns) {
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            Out& to = target[static_cast<int64_t>(j * kParts + part) * cut.pairs];
            if constexpr (sizeof(Out) == sizeof(Pair)) {
              to = narrow<T>(y[part][0], y[part][1]);
            } else {
              to = static_cast<Out>(quantize(y[part][0], y[part][1]));
            }
          }
        }
      }
      target += static_cast<int64_t>(cut.width) * kParts * cut.pairs;
      ++written;
    };

    // Partial sums of two output rows: the row above the next input row, and the row level with it.
    float above[2][kColumns][2] = {}, level[2][kColumns][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) level[half][j][0] = start[half][0], level[half][j][1] = start[half][1];
    }
#pragma unroll 1
    for (int step = 0; step < cut.steps; ++step) {
      const Pair* rows = ring.next(to, index, step) + lane;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const Pair* row = rows + r * row_size + warp * kColumns * 2 * kPairs;
        float done[2][kColumns][2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float in[kColumns + 2][2];
#pragma unroll
          for (int i = 0; i < kColumns + 2; ++i) {
            const float2 two = widen<T>(row[(2 * i + half) * kPairs]);
            in[i][0] = two.x, in[i][1] = two.y;
          }
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              float sums[3] = {start[half][c], level[half][j][c], above[half][j][c]};
#pragma unroll
              for (int tap = 0; tap < 9; ++tap) {
                sums[tap / 3] = fmaf(in[j + tap % 3][c], taps[half][c][tap], sums[tap / 3]);
              }
              level[half][j][c] = sums[0], above[half][j][c] = sums[1], done[half][j][c] = sums[2];
            }
          }
        }
        if (within(to.halo_row + step * kRows + r - 1 - to.row, to.rows)) {  // the row above is in this strip
          write_row(done, rows + kRows * row_size + r * dout_row_size + warp * kColumns * kPairs);
        }
      }
    }
    if constexpr (!kBackward) {
      if (written < to.rows) write_row(above, nullptr);  // the last row of the image
    }
  }
}

template <typename T, bool kBackward, typename Out = Pair>
cudaError_t launch_glu(const void* x, const void* weight, const void* bias, const void* dout, void* out,
                       const float* out_factor, int64_t batch, int height, int width, int channels,
                       cudaStream_t stream) {
  Cut cut;
  const int pairs = channels / 2;
  if (const auto error =
          cut_into_strips(&cut, batch, height, width, pairs, kGluMaxWarps<kBackward>, kWarpsPerSM, 1, kBackward)) {
    return error;
  }
  CUtensorMap map, dout_map;
  const int columns = cut.warps * kColumns;
  if (const auto error = describe(&map, x, batch, cut, 2, columns + 2)) return error;
  if (const auto error = describe(&dout_map, kBackward ? dout : x, batch, cut, 1, columns)) return error;
  const int row_pixels = 2 * (columns + 2) + kBackward * columns;
  const int bytes = kGluStages<kBackward> * kRows * row_pixels * kPairs * static_cast<int>(sizeof(Pair));
  const auto kernel = depthwise_glu_kernel<T, kBackward, Out>;
  if (const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return error;
  kernel<<<dim3(cut.pair_blocks, cut.lanes), 32 * cut.warps, bytes, stream>>>(
      map, dout_map, static_cast<const Pair*>(weight), static_cast<const Pair*>(bias), static_cast<Out*>(out),
      reinterpret_cast<const float2*>(out_factor), cut);
  return cudaGetLastError();
}

}  // namespace dcae_fast
