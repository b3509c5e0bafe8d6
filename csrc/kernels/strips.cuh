// Cuts a channels-last tensor into strips, and fetches the rows of strips to shared memory.
//
// A strip is a rectangle of an image with 64 of its channels, or 64 channels of each part where the channels have two
// parts. A block walks down strips of the same channels, one after the other, two rows a step. A warp computes four
// columns, each of its threads two channels of them. The tensor memory accelerator fetches the rows to a ring in shared
// memory, some steps before they are needed, with zeros outside the image.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <cstdint>

#include "launch.h"
#include "pairs.cuh"

namespace dcae_fast {

constexpr int kPairs = 32;   // of channels of a strip: one a lane, 128 bytes of a pixel
constexpr int kColumns = 4;  // of a warp
constexpr int kRows = 2;     // of a step

struct Cut {
  int height, width, pairs;        // of the tensor; pairs: of one part
  int rows, warps;                 // of a strip
  int column_blocks, row_blocks;   // of an image; strips of the same channels are numbered by (image, row, column)
  int strips, lanes, pair_blocks;  // strips of the same channels, blocks that share them; sets of channels
  int halo;                        // rows and columns that a pixel depends on, on each side of it
  int steps;                       // of a strip
};

// Where a strip starts, its number of rows, and the first row of the image that they depend on.
struct Strip {
  int column, row, image, rows, halo_row;
};

__device__ inline Strip strip(const Cut& cut, int index) {
  Strip strip;
  strip.column = index % cut.column_blocks * cut.warps * kColumns;
  index /= cut.column_blocks;
  strip.row = index % cut.row_blocks * cut.rows;
  strip.image = index / cut.row_blocks;
  strip.rows = min(cut.rows, cut.height - strip.row);
  strip.halo_row = max(strip.row - cut.halo, 0);
  return strip;
}

// The index of the pixel in a column of the image where the strip starts, counted over all images.
__device__ inline int64_t first_pixel(const Cut& cut, const Strip& of, int column) {
  return (static_cast<int64_t>(of.image) * cut.height + of.row) * cut.width + column;
}

// Chooses the height of strips that minimises the time, with all blocks running at once.
//
// rows_below: whether the steps of a strip include the rows below it also at the bottom of the image, where they are
// zero.
inline cudaError_t cut_into_strips(Cut* cut, int64_t batch, int height, int width, int pairs, int max_warps,
                                   int warps_per_processor, int halo, bool rows_below = true) {
  int processors;
  if (const auto error = count_processors(&processors)) return error;
  const int64_t warps = std::min<int64_t>(max_warps, divide_up(width, kColumns));
  const int64_t pair_blocks = divide_up(pairs, kPairs), column_blocks = divide_up(width, warps * kColumns);
  const int64_t lanes = std::max<int64_t>(1, warps_per_processor / warps * processors / pair_blocks);
  int64_t shortest = INT64_MAX, rows = 0, row_blocks = 0, strips = 0;
  for (int cuts = 1; cuts <= std::min(height, 64); ++cuts) {
    const int64_t cut_rows = divide_up(height, cuts), cut_blocks = divide_up(height, cut_rows);
    const int64_t cut_strips = batch * column_blocks * cut_blocks;
    const int64_t time = divide_up(cut_strips, lanes) * (cut_rows + 2 * halo);
    if (time < shortest) shortest = time, rows = cut_rows, row_blocks = cut_blocks, strips = cut_strips;
  }
  if (strips > INT_MAX) return cudaErrorInvalidConfiguration;
  const int64_t steps = divide_up(std::min<int64_t>(rows + 2 * halo, height + halo * int64_t{rows_below}), kRows);
  *cut = {height,
          width,
          pairs,
          static_cast<int>(rows),
          static_cast<int>(warps),
          static_cast<int>(column_blocks),
          static_cast<int>(row_blocks),
          static_cast<int>(strips),
          static_cast<int>(std::min(strips, lanes)),
          static_cast<int>(pair_blocks),
          halo,
          static_cast<int>(steps)};
  return cudaSuccess;
}

// Describes a tensor [batch, height, width, parts, 2 * pairs] of 16-bit elements to the tensor memory accelerator, for
// boxes [rows, columns, parts, channels].
struct Boxes {
  int rows, columns, channels;
  CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_NONE;
};
inline cudaError_t describe(CUtensorMap* map, const void* x, int64_t batch, int height, int width, int parts, int pairs,
                            const Boxes& boxes) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  using Size = cuuint64_t;
  const Size part = sizeof(Pair) * static_cast<Size>(pairs), pixel = part * parts;
  const Size sizes[] = {Size(2 * pairs), Size(parts), Size(width), Size(height), Size(batch)};
  const Size strides[] = {part, pixel, pixel * width, pixel * width * height};
  const cuuint32_t box[] = {cuuint32_t(boxes.channels), cuuint32_t(parts), cuuint32_t(boxes.columns),
                            cuuint32_t(boxes.rows), 1};
  const cuuint32_t every[] = {1, 1, 1, 1, 1};
  const CUresult result = encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 5, const_cast<void*>(x), sizes, strides, box,
                                 every, CU_TENSOR_MAP_INTERLEAVE_NONE, boxes.swizzle,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// The same for boxes of one step of strips, [kRows, columns, parts, 64].
inline cudaError_t describe(CUtensorMap* map, const void* x, int64_t batch, const Cut& cut, int parts, int columns,
                            CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_NONE) {
  return describe(map, x, batch, cut.height, cut.width, parts, cut.pairs, {kRows, columns, 2 * kPairs, swizzle});
}

// Initializes the barriers of a ring. The block must synchronize before any other thread waits for them.
template <int kStages>
__device__ void initialize(uint64_t (&barriers)[kStages]) {
  for (uint64_t& barrier : barriers) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barrier)) : "memory");
  }
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Makes the current phase of a barrier wait for so many bytes.
__device__ inline void expect(uint64_t* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Starts to copy a box of a described tensor to shared memory.
__device__ inline void bring(const Pair* to, const CUtensorMap* x, int pair, int column, int row, int image,
                             uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, 0, %3, %4, %5}], [%6];" ::"r"(shared_address(to)),
      "l"(x), "r"(2 * pair), "r"(column), "r"(row), "r"(image), "r"(shared_address(barrier))
      : "memory");
}

// Waits until the phase of this parity is complete.
__device__ inline void wait(uint64_t* barrier, unsigned parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
      "@!complete bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// A block's ring of kStages steps in shared memory, of `size` pairs each. The block calls `next` for each step of its
// strips. Meanwhile the ring fetches later steps, also steps of the block's next strip.
//
// bring_rows(to, strip, row, barrier) starts the copy of a step whose first row is this row of the image.
template <int kStages, typename BringRows>
struct Ring {
  const Cut& cut;
  Pair* steps;
  const int size;
  uint64_t (&full)[kStages];  // barriers in shared memory
  const BringRows bring_rows;
  int stage = 0;
  unsigned parity = 0;

  __device__ Ring(const Cut& cut, Pair* steps, int size, uint64_t (&full)[kStages], const BringRows& bring_rows)
      : cut(cut), steps(steps), size(size), full(full), bring_rows(bring_rows) {}

  // Starts the first steps of strip `index`. All threads must synchronize before the first call of `next`.
  __device__ void start(int index) const {
    if (threadIdx.x != 0) return;
    initialize(full);
    const Strip first = strip(cut, index);
    for (int step = 0; step < kStages - 1; ++step) fetch(step, first, index, step);
  }

  // Waits for a step of strip `index`, which is `of`, and returns its rows.
  __device__ const Pair* next(const Strip& of, int index, int step) {
    wait(&full[stage], parity);
    __syncthreads();  // all threads have finished the step before
    if (threadIdx.x == 0) fetch(stage == 0 ? kStages - 1 : stage - 1, of, index, step + kStages - 1);
    const Pair* rows = steps + stage * size;
    if (++stage == kStages) stage = 0, parity ^= 1;
    return rows;
  }

 private:
  // Starts a step of strip `index`. A step past the strip's last is a step of the block's next strip, if there is one.
  __device__ void fetch(int stage, const Strip& of, int index, int step) const {
    const int later = index + step / cut.steps * cut.lanes;
    if (later >= cut.strips) return;
    const Strip from = later == index ? of : strip(cut, later);
    expect(&full[stage], size * sizeof(Pair));
    bring_rows(steps + stage * size, from, from.halo_row + step % cut.steps * kRows, &full[stage]);
  }
};

__device__ inline bool within(int index, int size) {
  return static_cast<unsigned>(index) < static_cast<unsigned>(size);
}

// Loads the weights of both channels of a pair, times scale.
template <typename T, int kTaps>
__device__ void load_weights(float (&to)[2][kTaps], const Pair* weight, int64_t pair, float scale) {
#pragma unroll
  for (int i = 0; i < kTaps; ++i) {
    const float2 two = widen<T>(weight[pair * kTaps + i]);
    to[2 * i / kTaps][2 * i % kTaps] = two.x * scale, to[(2 * i + 1) / kTaps][(2 * i + 1) % kTaps] = two.y * scale;
  }
}

}  // namespace dcae_fast
