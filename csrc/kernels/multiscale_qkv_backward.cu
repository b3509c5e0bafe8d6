// Gradients of multiscale_qkv by its input and by its weights. See ops.h for the layout.
//
// The first kernel computes the gradient of the input in one pass over memory, in the manner of multiscale_qkv.cu.
// Tensor cores multiply two rows of a warp's columns and their halo by the transposed matrices. This gives the gradient
// of the depthwise result. The transposed depthwise convolution follows.
//
// The second kernel sums the gradients of the weights. Both are linear in
//
//     product[tap][o, c] = sum over pixels p of dout[p, o] x[p + tap, c]    for o and c of one group,
//     ddepthwise[c, tap] = sum over o of grouped[o, c] product[tap][o, c],
//     dgrouped[o, c]     = sum over taps of depthwise[c, tap] product[tap][o, c],
//
// so that tensor cores compute all sums over pixels. A block computes a group of channels on a part of the tiles. A warp
// computes eight channels of x. Its products stay in registers.

#include <algorithm>
#include <climits>

#include "multiscale_qkv.cuh"
#include "ops.h"

namespace dcae_fast {

namespace {

// Rounds a pointer to shared memory up to a multiple of `alignment` bytes.
__device__ Pair* aligned(Pair* pointer, unsigned alignment) {
  return pointer + (-shared_address(pointer) & (alignment - 1)) / sizeof(Pair);
}

constexpr int kMaxWarps = 4;     // of a block
constexpr int kWarpsPerSM = 16;  // as many as 128 registers a thread allow
constexpr int kStages = 3;       // of the ring
constexpr int kLine = 1024;      // bytes after which the accelerator's arrangement of 128 bytes of a pixel repeats

template <typename T>
__global__ void __launch_bounds__(32 * kMaxWarps, kWarpsPerSM / kMaxWarps)
    multiscale_qkv_input_backward_kernel(const __grid_constant__ CUtensorMap dout, const Pair* __restrict__ depthwise,
                                         const Pair* __restrict__ grouped, Pair* __restrict__ dx, const Cut cut) {
  extern __shared__ Pair memory[];  // [stage][row][column with halo][pair]
  __shared__ __align__(16) Pair matrices[2 * kGroup][kFilterSize], pixels[kMaxWarps][kPixels][kPixelSize];
  __shared__ uint64_t full[kStages];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row_columns = cut.warps * kColumns + 2 * kHalo, step_size = kRows * row_columns * kPairs;
  const int first_pair = blockIdx.x * kPairs, first_strip = blockIdx.y;

  Ring ring(cut, aligned(memory, kLine), step_size, full,
            [&](const Pair* to, const Strip& from, int row, uint64_t* barrier) {
              bring(to, &dout, first_pair, from.column - kHalo, row, from.image, barrier);
            });
  ring.start(first_strip);

  const int pair = first_pair + lane;
  float taps[2][kTaps] = {};
  if (pair < cut.pairs) load_weights<T>(taps, depthwise, pair, 1.0f);
  auto& transposed = reinterpret_cast<uint16_t (&)[2 * kGroup][2 * kFilterSize]>(matrices);
  for (int i = threadIdx.x; i < kGroup * kGroup; i += 32 * cut.warps) {  // pairs of the two matrices
    const int filter = i / (kGroup / 2), word = i % (kGroup / 2), row = filter / kGroup * kGroup + 2 * word;
    const bool exists = first_pair + filter / 2 < cut.pairs;
    const Pair two = exists ? grouped[(2LL * first_pair + filter) * (kGroup / 2) + word] : 0;
    transposed[row][filter % kGroup] = two & 0xffff, transposed[row + 1][filter % kGroup] = two >> 16;
  }
  __syncthreads();  // the barriers and the matrices are ready

  // the accelerator stores 16 bytes i of pixel p of a step as 16 bytes i ^ (p % 8)
  const int pixel = lane % 16 / 8 * row_columns + warp * kColumns + lane % 8;
  for (int index = first_strip; index < cut.strips; index += cut.lanes) {
    const Strip to = strip(cut, index);
    const int column = to.column + warp * kColumns;
    const int columns = pair < cut.pairs ? cut.width - column : 0;  // that this thread writes
    Pair* target = dx + first_pixel(cut, to, column) * cut.pairs + pair;
    float sums[kSize - 1][kColumns][2] = {};
#pragma unroll 1
    for (int step = 0; step < cut.steps; ++step) {
      const unsigned row = shared_address(ring.next(to, index, step) + pixel * kPairs);
      multiply_groups<T>(pixels[warp], matrices, [&](int i) { return row + 16 * (i ^ pixel % 8); });
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float in[kColumns + 2 * kHalo][2], done[kColumns][2];
#pragma unroll
        for (int i = 0; i < kColumns + 2 * kHalo; ++i) {
          const float2 two = widen<T>(pixels[warp][r * kPixels / kRows + i][lane]);
          in[i][0] = two.x, in[i][1] = two.y;
        }
        add_row<true>(in, taps, sums, done);
        if (!within(to.halo_row + step * kRows + r - kHalo - to.row, to.rows)) continue;  // the completed row
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          if (j < columns) target[static_cast<int64_t>(j) * cut.pairs] = narrow<T>(done[j][0], done[j][1]);
        }
        target += static_cast<int64_t>(cut.width) * cut.pairs;
      }
    }
  }
}

template <typename T>
cudaError_t launch_input(const void* dout, const void* depthwise, const void* grouped, void* dx, int64_t batch,
                         int height, int width, int channels, cudaStream_t stream) {
  static_assert(kRows * (kColumns + 2 * kHalo) == kPixels);
  static_assert(kRows * kColumns * kPairs * sizeof(Pair) == kLine && 2 * kHalo == kColumns);  // steps are aligned
  Cut cut;
  if (const auto error = cut_into_strips(&cut, batch, height, width, channels / 2, kMaxWarps, kWarpsPerSM, kHalo)) {
    return error;
  }
  CUtensorMap map;
  const int columns = cut.warps * kColumns + 2 * kHalo;
  if (const auto error = describe(&map, dout, batch, cut, 1, columns, CU_TENSOR_MAP_SWIZZLE_128B)) return error;
  const int bytes = kStages * kRows * columns * kPairs * static_cast<int>(sizeof(Pair)) + kLine;
  multiscale_qkv_input_backward_kernel<T><<<dim3(cut.pair_blocks, cut.lanes), 32 * cut.warps, bytes, stream>>>(
      map, static_cast<const Pair*>(depthwise), static_cast<const Pair*>(grouped), static_cast<Pair*>(dx), cut);
  return cudaGetLastError();
}

// The part of the work that a block of the second kernel has: every `splits`th tile of one group of channels.
struct Tiles {
  int rows, columns;      // of a tile, multiples of 2 and 8
  int down, across, all;  // tiles of an image's column, of its row, of all images
  int groups, splits;
};

constexpr int kSumWarps = kGroup / 8;  // of a block, eight channels of x each
constexpr int kSumBlocksPerSM = 2;     // as many as the registers allow
constexpr int kSumStages = 2;
constexpr int kPixelBytes = kGroup * 2;
constexpr int kSumLine = 512;  // bytes after which the accelerator's arrangement of 64 bytes of a pixel repeats

// The number of pixels of a tile, and of the pixels of x that they depend on.
__host__ __device__ inline int tile_pixels(const Tiles& tiles) { return tiles.rows * tiles.columns; }
__host__ __device__ inline int halo_pixels(const Tiles& tiles) {
  return (tiles.rows + 2 * kHalo) * (tiles.columns + 2 * kHalo);
}

template <typename T>
__global__ void __launch_bounds__(32 * kSumWarps, kSumBlocksPerSM)
    multiscale_qkv_weight_backward_kernel(const __grid_constant__ CUtensorMap dout,
                                          const __grid_constant__ CUtensorMap x, const T* __restrict__ depthwise,
                                          const Pair* __restrict__ grouped, float* __restrict__ partial,
                                          const Tiles tiles) {
  extern __shared__ Pair memory[];  // [stage]: dout [row][column][pair], x [row with halo][column with halo][pair]
  __shared__ uint64_t full[kSumStages];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int group = blockIdx.x, split = blockIdx.y;
  const int dout_bytes = tile_pixels(tiles) * kPixelBytes, bytes = dout_bytes + halo_pixels(tiles) * kPixelBytes;
  const Pair* stages = aligned(memory, kSumLine);

  const auto fetch = [&](int stage, int tile) {  // by one thread; nothing past the last tile
    if (tile >= tiles.all) return;
    const int column = tile % tiles.across * tiles.columns, row = tile / tiles.across % tiles.down * tiles.rows;
    const int image = tile / (tiles.across * tiles.down), pair = group * kGroup / 2;
    const Pair* to = stages + stage * bytes / sizeof(Pair);
    expect(&full[stage], bytes);
    bring(to, &dout, pair, column, row, image, &full[stage]);
    bring(to + dout_bytes / sizeof(Pair), &x, pair, column - kHalo, row - kHalo, image, &full[stage]);
  };
  if (threadIdx.x == 0) {
    initialize(full);
    for (int stage = 0; stage < kSumStages; ++stage) fetch(stage, split + stage * tiles.splits);
  }
  __syncthreads();  // the barriers are ready

  // Where a thread's row of the matrices lies, for the first 16 pixels of a tile: two rows of eight columns. Matrices
  // of dout: the two rows, each with eight channels and the next eight. Matrices of x: four rows. The accelerator stores
  // 16 bytes i of pixel p as 16 bytes i ^ (p / 2 % 4).
  const auto arranged = [](unsigned offset) { return offset ^ offset >> 3 & 0x30; };
  const int x_columns = tiles.columns + 2 * kHalo, i = lane / 8;
  const unsigned dout_row = arranged((i / 2 * tiles.columns + lane % 8) * kPixelBytes + i % 2 * 16);
  unsigned x_rows[kSize];
#pragma unroll
  for (int shift = 0; shift < kSize; ++shift) {
    x_rows[shift] = dout_bytes + arranged((i * x_columns + lane % 8 + shift) * kPixelBytes + warp * 16);
  }

  float products[kTaps][2][4] = {};  // [tap][o / 16]; rows: o, columns: c
  int stage = 0;
  unsigned parity = 0;
  for (int tile = split; tile < tiles.all; tile += tiles.splits) {
    wait(&full[stage], parity);
    const unsigned start = shared_address(stages + stage * bytes / sizeof(Pair));
    for (int row = 0; row < tiles.rows; row += 2) {
#pragma unroll 1
      for (int column = 0; column < tiles.columns; column += 8) {
        Pair a[2][4];
        const unsigned from = start + (row * tiles.columns + column) * kPixelBytes + dout_row;
        load_transposed(a[0][0], a[0][1], a[0][2], a[0][3], from);
        load_transposed(a[1][0], a[1][1], a[1][2], a[1][3], from ^ 32);
#pragma unroll
        for (int shift = 0; shift < kSize; ++shift) {
          Pair rows[kSize + 1];
          const unsigned from = start + (row * x_columns + column) * kPixelBytes + x_rows[shift];
          load_transposed(rows[0], rows[1], rows[2], rows[3], from);
          load_transposed(rows[4], rows[5], from + 4 * x_columns * kPixelBytes);
#pragma unroll
          for (int down = 0; down < kSize; ++down) {
            const Pair b[2] = {rows[down], rows[down + 1]};
            multiply_add<T>(products[down * kSize + shift][0], a[0], b);
            multiply_add<T>(products[down * kSize + shift][1], a[1], b);
          }
        }
      }
    }
    __syncthreads();  // all threads have read the stage
    if (threadIdx.x == 0) fetch(stage, tile + kSumStages * tiles.splits);
    if (++stage == kSumStages) stage = 0, parity ^= 1;
  }

  // A thread has rows o = 8k + g for k < 4, and columns c and c + 1.
  const int c = group * kGroup + warp * 8 + 2 * t;
  const int64_t channels = static_cast<int64_t>(tiles.groups) * kGroup;
  float* const ddepthwise = partial + split * channels * (kTaps + kGroup);
  float* const dgrouped = ddepthwise + channels * kTaps;
  float2 factors[4], of_grouped[4] = {};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    factors[k] = widen<T>(grouped[(static_cast<int64_t>(group) * kGroup + 8 * k + g) * (kGroup / 2) + warp * 4 + t]);
  }
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    const float first = depthwise[c * kTaps + tap], second = depthwise[(c + 1) * kTaps + tap];
    float2 sum = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float* two = &products[tap][k / 2][k % 2 * 2];
      of_grouped[k].x = fmaf(first, two[0], of_grouped[k].x), of_grouped[k].y = fmaf(second, two[1], of_grouped[k].y);
      sum.x = fmaf(factors[k].x, two[0], sum.x), sum.y = fmaf(factors[k].y, two[1], sum.y);
    }
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) {
      sum.x += __shfl_xor_sync(~0u, sum.x, distance), sum.y += __shfl_xor_sync(~0u, sum.y, distance);
    }
    if (g == tap % 8) ddepthwise[c * kTaps + tap] = sum.x, ddepthwise[(c + 1) * kTaps + tap] = sum.y;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int64_t o = group * kGroup + 8 * k + g;
    *reinterpret_cast<float2*>(dgrouped + o * kGroup + warp * 8 + 2 * t) = of_grouped[k];
  }
}

// Chooses tiles, and the number of splits that minimises the time.
cudaError_t tile(Tiles* tiles, int64_t batch, int height, int width, int channels) {
  constexpr int kMostSplits = 32, kSide = 16;
  constexpr int kOverhead = 64;  // of a block, in pixels
  int processors;
  if (const auto error = count_processors(&processors)) return error;
  const int rows = height < kSide ? height + height % 2 : kSide, columns = width <= kSide / 2 ? kSide / 2 : kSide;
  const int64_t down = divide_up(height, rows), across = divide_up(width, columns), all = batch * down * across;
  if (all > INT_MAX / 2) return cudaErrorInvalidConfiguration;
  const int counts[] = {static_cast<int>(down), static_cast<int>(across), static_cast<int>(all)};
  *tiles = {rows, columns, counts[0], counts[1], counts[2], channels / kGroup, 1};
  int64_t shortest = INT64_MAX;
  for (int splits = 1; splits <= std::min<int64_t>(all, kMostSplits); ++splits) {
    const int64_t waves = divide_up(int64_t{tiles->groups} * splits, kSumBlocksPerSM * processors);
    const int64_t time = waves * (divide_up(all, splits) * rows * columns + kOverhead);
    if (time < shortest) shortest = time, tiles->splits = splits;
  }
  return cudaSuccess;
}

template <typename T>
cudaError_t launch_weight(const void* dout, const void* x, const void* depthwise, const void* grouped, float* sums,
                          int64_t batch, int height, int width, int channels, cudaStream_t stream) {
  Tiles tiles;
  if (const auto error = tile(&tiles, batch, height, width, channels)) return error;
  const auto describe_as = [&](CUtensorMap* map, const void* data, int halo) {
    const Boxes boxes = {tiles.rows + halo, tiles.columns + halo, kGroup, CU_TENSOR_MAP_SWIZZLE_64B};
    return describe(map, data, batch, height, width, 1, channels / 2, boxes);
  };
  CUtensorMap dout_map, x_map;
  if (const auto error = describe_as(&dout_map, dout, 0)) return error;
  if (const auto error = describe_as(&x_map, x, 2 * kHalo)) return error;
  const int bytes = kSumStages * (tile_pixels(tiles) + halo_pixels(tiles)) * kPixelBytes + kSumLine;
  const auto kernel = multiscale_qkv_weight_backward_kernel<T>;
  if (const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return error;
  kernel<<<dim3(tiles.groups, tiles.splits), 32 * kSumWarps, bytes, stream>>>(
      dout_map, x_map, static_cast<const T*>(depthwise), static_cast<const Pair*>(grouped), sums, tiles);
  return cudaGetLastError();
}

}  // namespace

cudaError_t multiscale_qkv_backward_splits(int64_t batch, int height, int width, int channels, int* splits) {
  Tiles tiles;
  if (const auto error = tile(&tiles, batch, height, width, channels)) return error;
  *splits = tiles.splits;
  return cudaSuccess;
}

cudaError_t launch_multiscale_qkv_backward(const void* dout, const void* x, const void* depthwise, const void* grouped,
                                           void* dx, float* sums, int64_t batch, int height, int width, int channels,
                                           DType dtype, cudaStream_t stream) {
  return with_element(dtype, [&](auto element) {
    using T = decltype(element);
    const auto error = launch_input<T>(dout, depthwise, grouped, dx, batch, height, width, channels, stream);
    if (error != cudaSuccess || sums == nullptr) return error;
    return launch_weight<T>(dout, x, depthwise, grouped, sums, batch, height, width, channels, stream);
  });
}

}  // namespace dcae_fast
