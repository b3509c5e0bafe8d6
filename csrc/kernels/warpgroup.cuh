// Products of a warpgroup (wgmma, Hopper): 64 rows of a left factor in registers times a right factor in shared memory.
//
// A warp holds 16 rows of the left factor and of the result, in the fragments of tensor_cores.cuh. A matrix in shared
// memory is a list of columns of 16-byte chunks: chunk j of row i lies at address + j * step + 16 * i. Eight rows of a
// chunk are a core matrix, whether these rows are columns or rows of the right factor.
#pragma once

#include <cstdint>
#include <type_traits>

#include "pairs.cuh"

namespace dcae_fast {

struct ChunkedMatrix {
  unsigned address;  // in shared memory
  unsigned step;     // bytes from one chunk of a row to the next

  __device__ unsigned chunk(int row, int place) const { return address + place * step + 16 * row; }
};

// Describes to a product where its right factor [16, n] lies, without swizzling. leading, stride: bytes between core
// matrices along the factor's rows, of which there are two, and along its columns.
__device__ inline uint64_t describe(unsigned address, unsigned leading, unsigned stride) {
  const auto encoded = [](unsigned bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
  return encoded(address) | encoded(leading) << 16 | encoded(stride) << 32;
}

// The right factor [16, n] whose columns are n rows of y, starting with `row`, and whose rows are channels, starting
// with chunk `place`.
__device__ inline uint64_t rows_as_columns(const ChunkedMatrix& y, int row, int place) {
  return describe(y.chunk(row, place), y.step, 128);
}

// The same for a left factor whose last eight columns are zero. The zeros are multiplied by chunk `place` again, since
// the memory after the chunk may hold NaN. If the chunk holds an infinity, the result is NaN.
__device__ inline uint64_t rows_as_half_columns(const ChunkedMatrix& y, int row, int place) {
  return describe(y.chunk(row, place), 0, 128);
}

// The right factor [16, n] that consists of 16 rows of y.
__device__ inline uint64_t rows_as_rows(const ChunkedMatrix& y, int row) {
  return describe(y.chunk(row, 0), 128, y.step);
}

// Products start in groups and run asynchronously. begin_products orders them after earlier writes to registers.
// wait_for_products waits until at most kPending groups are still running; c is a result of a completed group.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void end_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending, int kBlocks>
__device__ inline void wait_for_products(float (&c)[kBlocks][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {  // keeps the compiler from reading them earlier
    asm volatile("" : "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])::"memory");
  }
}

// Makes this thread's writes to shared memory visible to products that start after a barrier.
__device__ inline void publish_shared_memory() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#define FOUR(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define MULTIPLY(COLUMNS, TYPES, RESULT, A0, A1, A2, A3, B, ADD, AS_ROWS, ...)                                 \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ADD ", 0;\n"                                              \
               "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPES " {" RESULT "}, "                  \
               "{%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, %" #AS_ROWS ";\n}"                  \
               : __VA_ARGS__                                                                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)), "n"(kAsRows))
#define RESULT_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define RESULT_64                                                                                               \
  RESULT_16 ", %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, " \
            "%27, %28, %29, %30, %31"
#define RESULT_72 RESULT_64 ", %32, %33, %34, %35"

// Starts c [64, 8 * kBlocks] = a b, or c += a b if `add`, with a [64, 16] and b [16, 8 * kBlocks] in half precision.
// kAsRows: whether rows_as_rows described b.
template <typename T, bool kAsRows, int kBlocks>
__device__ inline void start_product(float (&c)[kBlocks][4], const Pair (&a)[4], uint64_t b, bool add) {
  static_assert(kBlocks == 2 || kBlocks == 8 || kBlocks == 9);
  constexpr bool kHalf = std::is_same_v<T, __half>;
  if constexpr (kBlocks == 2 && kHalf) {
    MULTIPLY(16, "f16.f16", RESULT_16, 8, 9, 10, 11, 12, 13, 14, FOUR(0), FOUR(1));
  } else if constexpr (kBlocks == 2) {
    MULTIPLY(16, "bf16.bf16", RESULT_16, 8, 9, 10, 11, 12, 13, 14, FOUR(0), FOUR(1));
  } else if constexpr (kBlocks == 8 && kHalf) {
    MULTIPLY(64, "f16.f16", RESULT_64, 32, 33, 34, 35, 36, 37, 38, FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5),
             FOUR(6), FOUR(7));
  } else if constexpr (kBlocks == 8) {
    MULTIPLY(64, "bf16.bf16", RESULT_64, 32, 33, 34, 35, 36, 37, 38, FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4),
             FOUR(5), FOUR(6), FOUR(7));
  } else if constexpr (kHalf) {
    MULTIPLY(72, "f16.f16", RESULT_72, 36, 37, 38, 39, 40, 41, 42, FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5),
             FOUR(6), FOUR(7), FOUR(8));
  } else {
    MULTIPLY(72, "bf16.bf16", RESULT_72, 36, 37, 38, 39, 40, 41, 42, FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4),
             FOUR(5), FOUR(6), FOUR(7), FOUR(8));
  }
}

#undef FOUR
#undef MULTIPLY
#undef RESULT_16
#undef RESULT_64
#undef RESULT_72

}  // namespace dcae_fast
