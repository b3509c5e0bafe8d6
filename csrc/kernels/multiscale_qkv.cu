// Depthwise 5x5 and grouped 1x1 convolution in one pass over memory. See ops.h for the formula and the layout.
//
// A thread computes two channels at four columns (strips.cuh). Their 50 taps stay in registers as fp32, and so do the
// partial sums of the four output rows that an input row does not complete. Four completed rows of a warp, 16 pixels,
// form the rows of a tensor core fragment. Tensor cores multiply the strip's two groups of channels by their matrices.

#include "multiscale_qkv.cuh"
#include "ops.h"

namespace dcae_fast {

namespace {

constexpr int kMaxWarps = 4;     // of a block
constexpr int kWarpsPerSM = 12;  // as many as the registers allow
constexpr int kStages = 3;       // of the ring
constexpr int kBatch = kPixels / kColumns;  // rows multiplied at a time

template <typename T>
__global__ void __launch_bounds__(32 * kMaxWarps, kWarpsPerSM / kMaxWarps)
    multiscale_qkv_kernel(const __grid_constant__ CUtensorMap x, const Pair* __restrict__ depthwise,
                          const Pair* __restrict__ grouped, Pair* __restrict__ out, const Cut cut) {
  extern __shared__ __align__(128) Pair steps[];  // [stage][row][column with halo][pair]
  __shared__ __align__(16) Pair filters[2 * kGroup][kFilterSize], pixels[kMaxWarps][kPixels][kPixelSize];
  __shared__ uint64_t full[kStages];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row_size = (cut.warps * kColumns + 2 * kHalo) * kPairs, step_size = kRows * row_size;
  const int first_pair = blockIdx.x * kPairs, first_strip = blockIdx.y;

  Ring ring(cut, steps, step_size, full, [&](const Pair* to, const Strip& from, int row, uint64_t* barrier) {
    bring(to, &x, first_pair, from.column - kHalo, row, from.image, barrier);
  });
  ring.start(first_strip);

  const int pair = first_pair + lane;
  float taps[2][kTaps] = {};
  if (pair < cut.pairs) load_weights<T>(taps, depthwise, pair, 1.0f);
  for (int i = threadIdx.x; i < kGroup * kGroup; i += 32 * cut.warps) {  // pairs of the two matrices
    const int filter = i / (kGroup / 2), word = i % (kGroup / 2);
    const bool exists = first_pair + filter / 2 < cut.pairs;
    filters[filter][word] = exists ? grouped[(2LL * first_pair + filter) * (kGroup / 2) + word] : 0;
  }
  __syncthreads();  // the barriers and the filters are ready

  for (int index = first_strip; index < cut.strips; index += cut.lanes) {
    const Strip to = strip(cut, index);
    // a thread writes four pairs of one column at a time
    const int column = to.column + warp * kColumns + lane / 8, four = first_pair + lane % 8 * 4;
    const bool writes = column < cut.width && four < cut.pairs;
    Pair* target = out + first_pixel(cut, to, column) * cut.pairs + four;
    float sums[kSize - 1][kColumns][2] = {};  // of output rows, from two above the next row to one below it
#pragma unroll 1
    for (int step = 0; step < cut.steps; ++step) {
      const Pair* rows = ring.next(to, index, step) + warp * kColumns * kPairs + lane;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float in[kColumns + 2 * kHalo][2], done[kColumns][2];
#pragma unroll
        for (int i = 0; i < kColumns + 2 * kHalo; ++i) {
          const float2 two = widen<T>(rows[r * row_size + i * kPairs]);
          in[i][0] = two.x, in[i][1] = two.y;
        }
        add_row<false>(in, taps, sums, done);
        const int row = to.halo_row + step * kRows + r - kHalo - to.row;  // completed, relative to the strip's first
        if (!within(row, to.rows)) continue;
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          pixels[warp][row % kBatch * kColumns + j][lane] = narrow<T>(done[j][0], done[j][1]);
        }
        if (row % kBatch < kBatch - 1 && row < to.rows - 1) continue;
        multiply_groups<T>(pixels[warp], filters,
                           [&](int i) { return shared_address(&pixels[warp][lane % 16][4 * i]); });
        for (int i = 0; i <= row % kBatch; ++i) {
          const Pair* from = &pixels[warp][i * kColumns + lane / 8][lane % 8 * 4];
          if (writes) *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(from);
          target += static_cast<int64_t>(cut.width) * cut.pairs;
        }
        __syncwarp();  // all lanes have read the pixels
      }
    }
  }
}

template <typename T>
cudaError_t launch(const void* x, const void* depthwise, const void* grouped, void* out, int64_t batch, int height,
                   int width, int channels, cudaStream_t stream) {
  Cut cut;
  if (const auto error = cut_into_strips(&cut, batch, height, width, channels / 2, kMaxWarps, kWarpsPerSM, kHalo)) {
    return error;
  }
  CUtensorMap map;
  const int columns = cut.warps * kColumns + 2 * kHalo;
  if (const auto error = describe(&map, x, batch, cut, 1, columns)) return error;
  const int bytes = kStages * kRows * columns * kPairs * static_cast<int>(sizeof(Pair));
  multiscale_qkv_kernel<T><<<dim3(cut.pair_blocks, cut.lanes), 32 * cut.warps, bytes, stream>>>(
      map, static_cast<const Pair*>(depthwise), static_cast<const Pair*>(grouped), static_cast<Pair*>(out), cut);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_multiscale_qkv(const void* x, const void* depthwise, const void* grouped, void* out, int64_t batch,
                                  int height, int width, int channels, DType dtype, cudaStream_t stream) {
  const auto f = dtype == DType::kFloat16 ? launch<__half> : launch<__nv_bfloat16>;
  return f(x, depthwise, grouped, out, batch, height, width, channels, stream);
}

}  // namespace dcae_fast
