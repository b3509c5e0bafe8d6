// Gradients of a depthwise 3x3 convolution by its input, weight and bias in one pass over memory. See ops.h.
//
//     dx[p] = sum over taps of weight[tap] dconv[p - tap],    dweight[tap] = sum over p of x[p] dconv[p - tap]
//
// A thread has two channels at four columns (strips.cuh). It reads a row of dconv and one of x once: dconv is added to
// three rows of dx, of which two wait in registers; the sums take products of this row and the one before.

#include "ops.h"
#include "strips.cuh"

namespace dcae_fast {

namespace {

constexpr int kSums = 10;        // nine taps, then the bias
constexpr int kMaxWarps = 8;     // of a block; measured, as the stages
constexpr int kStages = 3;       // of the ring; a step fills one
constexpr int kWarpsPerSM = 16;  // as many as 128 registers for each thread allow

template <typename T>
__global__ void __launch_bounds__(32 * kMaxWarps, kWarpsPerSM / kMaxWarps)
    depthwise_glu_backward_kernel(const __grid_constant__ CUtensorMap dconv, const __grid_constant__ CUtensorMap x,
                                  const Pair* __restrict__ weight, Pair* __restrict__ dx, float2* __restrict__ partial,
                                  const Cut cut) {
  extern __shared__ __align__(128) Pair ring[];  // [stage]: dconv [row][column with halo][pair], x [row][column][pair]
  __shared__ uint64_t full[kStages];
  __shared__ float2 warp_sums[kMaxWarps][kSums][kPairs];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int x_row_size = cut.warps * kColumns * kPairs, row_size = x_row_size + 2 * kPairs;
  const int stage_size = kRows * (row_size + x_row_size);
  const int first_pair = blockIdx.x * kPairs, first_strip = blockIdx.y;

  const auto bring_step = [&](int stage, const Strip& of, int index, int step) {
    start_step(cut, of, index, step, [&](const Strip& from, int row) {
      const Pair* to = ring + stage * stage_size;
      expect(&full[stage], stage_size * sizeof(Pair));
      bring(to, &dconv, first_pair, from.column - 1, row, from.image, &full[stage]);
      bring(to + kRows * row_size, &x, first_pair, from.column, row, from.image, &full[stage]);
    });
  };
  if (threadIdx.x == 0) {
    initialize(full);
    const Strip first = strip(cut, first_strip);
    for (int step = 0; step < kStages - 1; ++step) bring_step(step, first, first_strip, step);
  }

  const int pair = first_pair + lane;
  float taps[2][9] = {}, sums[2][kSums] = {};
  if (pair < cut.pairs) load_weights<T>(taps, weight, pair, 1.0f);
  __syncthreads();  // the barriers are ready

  int stage = 0;
  unsigned parity = 0;
  for (int index = first_strip; index < cut.strips; index += cut.lanes) {
    const Strip to = strip(cut, index);
    const int column = to.column + warp * kColumns;
    const int columns = pair < cut.pairs ? cut.width - column : 0;  // that this thread may write
    const int64_t first_pixel = (static_cast<int64_t>(to.image) * cut.height + to.row) * cut.width + column;
    Pair* target = dx + first_pixel * cut.pairs + pair;
    float above[kColumns][2] = {}, level[kColumns][2] = {};  // dx so far: above the coming row, and level with it
    float d_before[kColumns + 2][2] = {}, x_before[kColumns][2] = {};
#pragma unroll 1
    for (int step = 0; step < cut.steps; ++step) {
      wait(&full[stage], parity);
      __syncthreads();  // all are through with the step before
      if (threadIdx.x == 0) bring_step(stage == 0 ? kStages - 1 : stage - 1, to, index, step + kStages - 1);
      const Pair* rows = ring + stage * stage_size + warp * kColumns * kPairs + lane;
      if (++stage == kStages) stage = 0, parity ^= 1;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int row = to.halo_row + step * kRows + r - to.row;  // counted from the strip's first
        const bool own = within(row, to.rows);                    // sums are over the strip's rows of x
        float d[kColumns + 2][2], done[kColumns][2];
#pragma unroll
        for (int i = 0; i < kColumns + 2; ++i) {
          const float2 two = widen<T>(rows[r * row_size + i * kPairs]);
          d[i][0] = two.x, d[i][1] = two.y;
        }
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const float2 two = widen<T>(own ? rows[kRows * row_size + r * x_row_size + j * kPairs] : 0);
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float in = c == 0 ? two.x : two.y;
            float dx_rows[3] = {above[j][c], level[j][c], 0.0f};
#pragma unroll
            for (int tap = 0; tap < 9; ++tap) {
              const int i = j + 2 - tap % 3;
              dx_rows[tap / 3] = fmaf(d[i][c], taps[c][tap], dx_rows[tap / 3]);
              sums[c][tap] = fmaf(tap < 6 ? d[i][c] : d_before[i][c], tap < 3 ? x_before[j][c] : in, sums[c][tap]);
            }
            done[j][c] = dx_rows[0], above[j][c] = dx_rows[1], level[j][c] = dx_rows[2];
            x_before[j][c] = in;
            if (own) sums[c][9] += d[j + 1][c];
          }
        }
#pragma unroll
        for (int i = 0; i < kColumns + 2; ++i) d_before[i][0] = d[i][0], d_before[i][1] = d[i][1];
        if (within(row - 1, to.rows)) {  // else the row above is not this strip's
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
            if (j < columns) target[static_cast<int64_t>(j) * cut.pairs] = narrow<T>(done[j][0], done[j][1]);
          }
          target += static_cast<int64_t>(cut.width) * cut.pairs;
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kSums; ++i) warp_sums[warp][i][lane] = {sums[0][i], sums[1][i]};
  __syncthreads();
  for (int i = warp; i < kSums; i += cut.warps) {
    float2 sum = {};
    for (int w = 0; w < cut.warps; ++w) sum.x += warp_sums[w][i][lane].x, sum.y += warp_sums[w][i][lane].y;
    if (pair < cut.pairs) partial[(static_cast<int64_t>(first_strip) * kSums + i) * cut.pairs + pair] = sum;
  }
}

template <typename T>
cudaError_t launch(const void* dconv, const void* x, const void* weight, void* dx, void* sums, const Cut& cut,
                   int64_t batch, cudaStream_t stream) {
  CUtensorMap dconv_map, x_map;
  const int columns = cut.warps * kColumns;
  if (const auto error = describe(&dconv_map, dconv, batch, cut, 1, columns + 2)) return error;
  if (const auto error = describe(&x_map, x, batch, cut, 1, columns)) return error;
  const int bytes = kStages * kRows * (2 * columns + 2) * kPairs * static_cast<int>(sizeof(Pair));
  const auto kernel = depthwise_glu_backward_kernel<T>;
  if (const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return error;
  kernel<<<dim3(cut.pair_blocks, cut.lanes), 32 * cut.warps, bytes, stream>>>(
      dconv_map, x_map, static_cast<const Pair*>(weight), static_cast<Pair*>(dx), static_cast<float2*>(sums), cut);
  return cudaGetLastError();
}

}  // namespace

cudaError_t depthwise_glu_backward_splits(int64_t batch, int height, int width, int channels, int* splits) {
  Cut cut;
  if (const auto error = cut_into_strips(&cut, batch, height, width, channels / 2, kMaxWarps, kWarpsPerSM, 1)) {
    return error;
  }
  *splits = cut.lanes;
  return cudaSuccess;
}

cudaError_t launch_depthwise_glu_backward(const void* dconv, const void* x, const void* weight, void* dx, void* sums,
                                          int64_t batch, int height, int width, int channels, DType dtype,
                                          cudaStream_t stream) {
  Cut cut;
  if (const auto error = cut_into_strips(&cut, batch, height, width, channels / 2, kMaxWarps, kWarpsPerSM, 1)) {
    return error;
  }
  const auto f = dtype == DType::kFloat16 ? launch<__half> : launch<__nv_bfloat16>;
  return f(dconv, x, weight, dx, sums, cut, batch, stream);
}

}  // namespace dcae_fast
