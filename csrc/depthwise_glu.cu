// Depthwise 3x3 convolution and gated linear unit in one pass over memory. See ops.h for the formula and the layout.
//
// A block owns 64 value channels, the 64 gate channels that belong to them, 16 columns, and walks down its rows. Each
// row of input (18 columns with the halo, zeros outside the image) is brought to shared memory once by 16-byte
// asynchronous copies, three rows ahead of the arithmetic. A thread owns 4 + 4 channels at two neighbouring columns:
// their 72 weights stay in registers as fp32, and so do the partial sums of the two output rows that an input row
// does not complete, so that a thread reads a row from shared memory once and never again.

#include <algorithm>
#include <climits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ops.h"

namespace {

using Quad = uint2;  // four neighbouring channels in 16 bits each

constexpr int kQuads = 16;       // of a block in each half: 128 bytes of a pixel
constexpr int kColumns = 16;     // output columns of a block
constexpr int kThreads = 128;    // 16 quads x 8 pairs of columns
constexpr int kStages = 4;       // input rows in shared memory
constexpr int kBlocksPerSM = 3;  // as many as the registers allow
constexpr int kMinRows = 8;      // output rows of a block, unless the image has fewer: it reads two more

template <typename T>
__device__ float2 widen(unsigned pair);

template <>
__device__ float2 widen<__nv_bfloat16>(unsigned pair) {  // two instructions; __bfloat1622float2 takes three
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

template <>
__device__ float2 widen<__half>(unsigned pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

template <typename T>
__device__ void widen(Quad quad, float (&to)[4]) {
  const float2 low = widen<T>(quad.x), high = widen<T>(quad.y);
  to[0] = low.x, to[1] = low.y, to[2] = high.x, to[3] = high.y;
}

template <typename T>
__device__ unsigned narrow(float low, float high);

template <>
__device__ unsigned narrow<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const unsigned&>(pair);
}

template <>
__device__ unsigned narrow<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const unsigned&>(pair);
}

// x / (1 + exp(-x)) with the hardware's exp2 and reciprocal: a relative error of a few 2^-22 for x above -80.
__device__ float silu(float x) {
  float power, reciprocal;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(1.0f + power));
  return x * reciprocal;
}

// Starts to copy 16 bytes to shared memory, or writes zeros there and reads nothing.
__device__ void copy_async(unsigned to, const Quad* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

__device__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ bool within(int index, int size) { return static_cast<unsigned>(index) < static_cast<unsigned>(size); }

// quads: those of one half of x's channels. Blocks count over (quads, columns, rows, batch), the first fastest.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    depthwise_glu_kernel(const Quad* __restrict__ x, const Quad* __restrict__ weight, const Quad* __restrict__ bias,
                         Quad* __restrict__ out, int height, int width, int quads, int rows, int quad_blocks,
                         int column_blocks, int row_blocks) {
  struct alignas(16) Row {
    Quad quads[2][kColumns + 2][kQuads];  // value and gate
  };
  __shared__ Row tile[kStages];

  int block = blockIdx.x;
  const int first_quad = block % quad_blocks * kQuads;
  block /= quad_blocks;
  const int first_column = block % column_blocks * kColumns;
  block /= column_blocks;
  const int first_row = block % row_blocks * rows;
  const int64_t image = block / row_blocks;
  const int steps = min(rows, height - first_row) + 2;  // input rows: one above and one below the output rows
  const int64_t row_quads = static_cast<int64_t>(width) * quads;

  // Copying: 8 threads bring the 128 bytes of one pixel and half; 16 threads come again for the last two columns.
  const int copy_quad = threadIdx.x % 8 * 2;
  const int copy_column = threadIdx.x / 8;
  const int image_column = first_column - 1 + copy_column;
  const bool has_quad = first_quad + copy_quad < quads;
  const bool inside = has_quad && within(image_column, width);
  const bool inside_last = has_quad && within(image_column + kColumns, width);
  const Quad* source = x + ((image * height + first_row - 1) * width + image_column) * 2 * quads + first_quad + copy_quad;
  const auto copy_to = static_cast<unsigned>(__cvta_generic_to_shared(&tile[0].quads[0][copy_column][copy_quad]));
  constexpr unsigned kGate = sizeof(Row) / 2, kLast = kColumns * kQuads * sizeof(Quad);
  const auto copy_row = [&](int step) {
    if (step < steps) {
      const bool valid = within(first_row - 1 + step, height);
      const unsigned to = copy_to + step % kStages * sizeof(Row);
      copy_async(to, source, valid && inside);
      copy_async(to + kGate, source + quads, valid && inside);
      if (copy_column < 2) {
        const Quad* last = source + static_cast<int64_t>(quads) * 2 * kColumns;
        copy_async(to + kLast, last, valid && inside_last);
        copy_async(to + kLast + kGate, last + quads, valid && inside_last);
      }
      source += 2 * row_quads;
    }
    commit_copies();
  };
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) copy_row(step);

  // Computing: neighbouring threads take neighbouring quads.
  const int lane = threadIdx.x % kQuads;
  const int column = threadIdx.x / kQuads * 2;
  const int quad = first_quad + lane;
  const bool active = quad < quads && first_column + column < width;
  const bool has_second_column = first_column + column + 1 < width;
  float taps[2][4][9] = {}, start[2][4] = {};
  if (active) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t index = static_cast<int64_t>(half) * quads + quad;
#pragma unroll
      for (int i = 0; i < 9; ++i) {
        float four[4];
        widen<T>(weight[index * 9 + i], four);
#pragma unroll
        for (int j = 0; j < 4; ++j) taps[half][(4 * i + j) / 9][(4 * i + j) % 9] = four[j];
      }
      if (bias != nullptr) widen<T>(bias[index], start[half]);
    }
  }
  Quad* target = out + ((image * height + first_row) * width + first_column + column) * quads + quad;

  // What the input rows so far add to two output rows: the one above the coming input row, and the one level with it.
  float above[2][2][4] = {}, level[2][2][4] = {};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // this row has come, and the row before it is no longer needed
    copy_row(step + kStages - 1);
    if (!active) continue;

    float done[2][2][4];
    const Row& row = tile[step % kStages];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float in[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) widen<T>(row.quads[half][column + i][lane], in[i]);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float sums[3] = {start[half][c], level[half][j][c], above[half][j][c]};
#pragma unroll
          for (int tap = 0; tap < 9; ++tap) {
            sums[tap / 3] = fmaf(in[j + tap % 3][c], taps[half][c][tap], sums[tap / 3]);
          }
          level[half][j][c] = sums[0], above[half][j][c] = sums[1], done[half][j][c] = sums[2];
        }
      }
    }
    if (step < 2) continue;  // the row just completed is above this block's

#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float y[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) y[c] = done[0][j][c] * silu(done[1][j][c]);
      if (j == 0 || has_second_column) target[j * quads] = {narrow<T>(y[0], y[1]), narrow<T>(y[2], y[3])};
    }
    target += row_quads;
  }
}

}  // namespace

cudaError_t launch_depthwise_glu(const void* x, const void* weight, const void* bias, void* out, int64_t batch,
                                 int height, int width, int channels, DType dtype, cudaStream_t stream) {
  int device, processors;
  if (const auto error = cudaGetDevice(&device)) return error;
  if (const auto error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return error;

  const auto divide_up = [](int a, int b) { return (a + b - 1) / b; };
  const int quads = channels / 4;
  const int quad_blocks = divide_up(quads, kQuads);
  const int column_blocks = divide_up(width, kColumns);
  const auto blocks = [&](int rows) { return batch * quad_blocks * column_blocks * divide_up(height, rows); };
  int rows = height;  // fewer where that leaves the processors idle
  while (rows > kMinRows && blocks(rows) < 2 * kBlocksPerSM * processors) rows = std::max(kMinRows, divide_up(rows, 2));
  if (blocks(rows) > INT_MAX) return cudaErrorInvalidConfiguration;

  const auto kernel =
      dtype == DType::kFloat16 ? depthwise_glu_kernel<__half> : depthwise_glu_kernel<__nv_bfloat16>;
  kernel<<<static_cast<unsigned>(blocks(rows)), kThreads, 0, stream>>>(
      static_cast<const Quad*>(x), static_cast<const Quad*>(weight), static_cast<const Quad*>(bias),
      static_cast<Quad*>(out), height, width, quads, rows, quad_blocks, column_blocks, divide_up(height, rows));
  return cudaGetLastError();
}
