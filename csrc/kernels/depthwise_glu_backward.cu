// Gradients of depthwise_glu by its input, weight and bias. See ops.h for the layout.
//
// The kernel of depthwise_glu.cuh computes dconv, the gradient of the convolution's result. The kernel below then
// computes the gradients of the convolution in one pass over memory:
//
//     dx[p] = sum over taps of weight[tap] dconv[p - tap],    dweight[tap] = sum over p of x[p] dconv[p - tap]
//
// A thread computes two channels at four columns (strips.cuh). It reads each row of dconv and of x once: a row of dconv
// is added to three rows of dx, of which two wait in registers; the sums take products of this row and the one before.

#include "depthwise_glu.cuh"

namespace dcae_fast {

namespace {

constexpr int kSums = 10;     // nine taps, then the bias
constexpr int kMaxWarps = 8;  // of a block; chosen by measurement, as is the number of stages
constexpr int kStages = 3;    // of the ring

template <typename T>
__global__ void __launch_bounds__(32 * kMaxWarps, kWarpsPerSM / kMaxWarps)
    depthwise_glu_backward_kernel(const __grid_constant__ CUtensorMap dconv, const __grid_constant__ CUtensorMap x,
                                  const Pair* __restrict__ weight, Pair* __restrict__ dx, float2* __restrict__ partial,
                                  const Cut cut) {
  extern __shared__ __align__(128) Pair steps[];  // [stage]: dconv [row][column with halo][pair], x [row][column][pair]
  __shared__ uint64_t full[kStages];
  __shared__ float2 warp_sums[kMaxWarps][kSums][kPairs];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int x_row_size = cut.warps * kColumns * kPairs, row_size = x_row_size + 2 * kPairs;
  const int step_size = kRows * (row_size + x_row_size);
  const int first_pair = blockIdx.x * kPairs, first_strip = blockIdx.y;

  Ring ring(cut, steps, step_size, full, [&](const Pair* to, const Strip& from, int row, uint64_t* barrier) {
    bring(to, &dconv, first_pair, from.column - 1, row, from.image, barrier);
    bring(to + kRows * row_size, &x, first_pair, from.column, row, from.image, barrier);
  });
  ring.start(first_strip);

  const int pair = first_pair + lane;
  float taps[2][9] = {}, sums[2][kSums] = {};
  if (pair < cut.pairs) load_weights<T>(taps, weight, pair, 1.0f);
  __syncthreads();  // the barriers are ready

  for (int index = first_strip; index < cut.strips; index += cut.lanes) {
    const Strip to = strip(cut, index);
    const int column = to.column + warp * kColumns;
    const int columns = pair < cut.pairs ? cut.width - column : 0;  // that this thread writes
    Pair* target = dx + first_pixel(cut, to, column) * cut.pairs + pair;
    float above[kColumns][2] = {}, level[kColumns][2] = {};  // partial sums of dx: above the next row, level with it
    float d_before[kColumns + 2][2] = {}, x_before[kColumns][2] = {};
#pragma unroll 1
    for (int step = 0; step < cut.steps; ++step) {
      const Pair* rows = ring.next(to, index, step) + warp * kColumns * kPairs + lane;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int row = to.halo_row + step * kRows + r - to.row;  // relative to the strip's first
        const bool own = within(row, to.rows);                    // only the strip's own rows of x enter the sums
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
        if (within(row - 1, to.rows)) {  // the row above is in this strip
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

// channels: of x and dconv.
cudaError_t cut_for(Cut* cut, int64_t batch, int height, int width, int channels) {
  return cut_into_strips(cut, batch, height, width, channels / 2, kMaxWarps, kWarpsPerSM, 1);
}

template <typename T>
cudaError_t launch_convolution_backward(const void* dconv, const void* x, const void* weight, void* dx, void* sums,
                                        int64_t batch, int height, int width, int channels, cudaStream_t stream) {
  Cut cut;
  if (const auto error = cut_for(&cut, batch, height, width, channels)) return error;
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
  if (const auto error = cut_for(&cut, batch, height, width, 2 * channels)) return error;
  *splits = cut.lanes;
  return cudaSuccess;
}

cudaError_t launch_depthwise_glu_backward(const void* dout, const void* x, const void* weight, const void* bias,
                                          void* dconv, void* dx, void* sums, int64_t batch, int height, int width,
                                          int channels, DType dtype, cudaStream_t stream) {
  return with_element(dtype, [&](auto element) {
    using T = decltype(element);
    const auto error =
        launch_glu<T, true>(x, weight, bias, dout, dconv, nullptr, batch, height, width, channels, stream);
    if (error != cudaSuccess) return error;
    return launch_convolution_backward<T>(dconv, x, weight, dx, sums, batch, height, width, 2 * channels, stream);
  });
}

}  // namespace dcae_fast
