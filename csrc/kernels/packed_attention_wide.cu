// Softmax attention of more than kMostWarpTokens, forward and backward, through products of warpgroups. See ops.h for
// the formulas and the layout.
//
// A block computes one head of one image. It copies the right factors of the products to shared memory at once: forward
// k and v, backward all. A warpgroup processes 64 rows at a time, the left factors, and loops over the other tokens by
// 64, then by 16. Scores stay in its registers, where they become the left factor of the next product. Forward, the
// rows are queries, with a running softmax over the keys. Backward, the rows are either keys, which give dk and dv, or
// queries, which give dq: scores are computed twice, and no warpgroup waits for the other.

#include <type_traits>

#include "packed_attention.cuh"
#include "warpgroup.cuh"

namespace dcae_fast {

namespace {

constexpr int kRows = 64;  // of a warpgroup
constexpr int kWarps = 8;  // of a block: two warpgroups
constexpr int kThreads = 32 * kWarps;
constexpr int kStageBytes = kWarps * kTile * kRow;

template <int kDim>
constexpr int kSteps = (kDim + 15) / 16;  // of 16 channels

template <int kDim>
using Factor = Pair[kSteps<kDim>][4];  // a warp's 16 rows of a left factor [64, kDim]

// Bytes from one chunk of a row to the next: a multiple of 16 rows and one more, so that the chunks lie in different
// banks.
__host__ __device__ constexpr int step_of(int tokens) { return 16 * (round_up(tokens) + 1); }

// Copies all rows of two arrays to shared memory, with zeros after the last row. The copies go through registers, since
// asynchronous copies write scattered chunks one by one.
template <typename T, int kDim>
struct TwoArrays {
  static constexpr int kRounds = (kMaxAttentionTokens * kChunks<kDim> + kThreads - 1) / kThreads;
  uint4 chunks[2][kRounds];

  __device__ void fetch(const T* first, int first_stride, const T* second, int second_stride, int rows) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int i = round * kThreads + threadIdx.x, row = i / kChunks<kDim>, column = i % kChunks<kDim> * 8;
      chunks[0][round] = row < rows ? load_chunk(first + row * first_stride + column) : uint4{};
      chunks[1][round] = row < rows ? load_chunk(second + row * second_stride + column) : uint4{};
    }
  }

  __device__ void place(const ChunkedMatrix& first, const ChunkedMatrix& second, int rows) const {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int i = round * kThreads + threadIdx.x, row = i / kChunks<kDim>, chunk = i % kChunks<kDim>;
      if (row >= round_up(rows)) break;
      store_chunk(first.chunk(row, chunk), chunks[0][round]);
      store_chunk(second.chunk(row, chunk), chunks[1][round]);
    }
  }
};

// Computes the statistics of all queries, with four threads a query.
template <typename T, int kDim>
struct AllStatistics {
  static constexpr int kRounds = kMaxAttentionTokens * 4 / kThreads, kEach = (kChunks<kDim> + 3) / 4;
  uint4 out[kRounds][kEach];
  float lse[kRounds];  // in base 2

  __device__ void fetch(const T* outs, int stride, const float* lses, int tokens) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int row = (round * kThreads + threadIdx.x) / 4;
      lse[round] = row < tokens ? __ldg(lses + row) * kLog2E : kInfinity;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int chunk = 4 * i + threadIdx.x % 4;
        const bool exists = row < tokens && chunk < kChunks<kDim>;
        out[round][i] = exists ? load_chunk(outs + row * stride + 8 * chunk) : uint4{};
      }
    }
  }

  // dout: in shared memory.
  __device__ void place(Statistics* statistics, const ChunkedMatrix& dout, int tokens) const {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int row = (round * kThreads + threadIdx.x) / 4;
      if (row >= round_up(tokens)) break;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int chunk = min(4 * i + static_cast<int>(threadIdx.x) % 4,
                              kChunks<kDim> - 1);  // chunks of out beyond the last are zero
        sum = dot<T>(read_chunk(dout.chunk(row, chunk)), out[round][i], sum);
      }
      sum = row_sum(sum);
      if (threadIdx.x % 4 == 0) statistics[row] = {lse[round], sum};
    }
  }
};

// Loads 16 rows from `address` on. Rows are `row_bytes` apart, the chunks of a row `step` bytes.
template <int kDim>
__device__ void load_factor(Factor<kDim>& a, unsigned address, unsigned row_bytes, unsigned step) {
  const unsigned lane = threadIdx.x % 32, at = address + lane % 16 * row_bytes;
#pragma unroll
  for (int s = 0; s < kDim / 16; ++s) {
    load_matrices(a[s][0], a[s][1], a[s][2], a[s][3], at + (2 * s + lane / 16) * step);
  }
  if constexpr (kDim % 16 != 0) {
    constexpr int s = kDim / 16;
    load_matrices(a[s][0], a[s][1], at + 2 * s * step);
    a[s][2] = a[s][3] = 0;
  }
}

// Loads rows from `first` on. Rows beyond the last token have undefined values.
template <int kDim>
__device__ void load_factor(Factor<kDim>& a, const ChunkedMatrix& x, int first) {
  load_factor<kDim>(a, x.chunk(first, 0), 16, x.step);
}

template <typename T, int kBlocks>
__device__ void as_factors(Pair (&a)[kBlocks / 2][4], const float (&x)[kBlocks][4]) {
#pragma unroll
  for (int i = 0; i < kBlocks / 2; ++i) as_factor<T>(a[i], x, i);
}

// Starts c = a yᵀ, with as many rows of y, from `first` on, as c has columns.
template <typename T, int kDim, int kBlocks>
__device__ void start_scores(float (&c)[kBlocks][4], const Factor<kDim>& a, const ChunkedMatrix& y, int first) {
  begin_products();
#pragma unroll
  for (int s = 0; s < kDim / 16; ++s) start_product<T, false>(c, a[s], rows_as_columns(y, first, 2 * s), s > 0);
  if constexpr (kDim % 16 != 0) {
    constexpr int s = kDim / 16;
    start_product<T, false>(c, a[s], rows_as_half_columns(y, first, 2 * s), true);
  }
  end_group();
}

// Starts c += a y, with rows of y from `first` on.
template <typename T, int kDim, int kGroups>
__device__ void start_sum(float (&c)[kDim / 8][4], const Pair (&a)[kGroups][4], const ChunkedMatrix& y, int first) {
  begin_products();
#pragma unroll
  for (int i = 0; i < kGroups; ++i) start_product<T, true>(c, a[i], rows_as_rows(y, first + kTile * i), true);
  end_group();
}

// Loops over the tokens, 64 at a time, then 16 at a time. Calls `call` with the first token of each group and, as a
// type, the number of blocks of 8 columns in the group.
template <typename Call>
__device__ void for_all_tokens(int tokens, Call call) {
  int first = 0;
#pragma unroll 1
  for (; first + kRows <= round_up(tokens); first += kRows) call(first, std::integral_constant<int, kRows / 8>{});
#pragma unroll 1
  for (; first < tokens; first += kTile) call(first, std::integral_constant<int, kTile / 8>{});
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 2)
    packed_attention_wide_kernel(const T* __restrict__ qkv, T* __restrict__ out, float* __restrict__ lse, int tokens,
                                 int heads) {
  extern __shared__ uint4 shared[];
  const int width = heads * kDim, stride = 3 * width, offset = blockIdx.x % heads * kDim, warp = threadIdx.x / 32;
  const int64_t first = static_cast<int64_t>(blockIdx.x / heads) * tokens;
  qkv += first * stride + offset;
  out += first * width + offset;
  lse += static_cast<int64_t>(blockIdx.x) * tokens;

  T* const stage = reinterpret_cast<T*>(shared) + warp * kTile * kStride;
  const unsigned start = shared_address(shared) + kStageBytes, step = step_of(tokens);
  const ChunkedMatrix k{start, step}, v{start + kChunks<kDim> * step, step};
  {
    TwoArrays<T, kDim> keys_and_values;
    keys_and_values.fetch(qkv + width, stride, qkv + 2 * width, stride, tokens);
    keys_and_values.place(k, v, tokens);
  }
  publish_shared_memory();
  __syncthreads();

#pragma unroll 1
  for (int row = warp / 4 * kRows; row < tokens; row += kWarps / 4 * kRows) {
    const int mine = row + warp % 4 * kTile, rows = min(max(tokens - mine, 0), kTile);
    __syncwarp();  // all lanes have read the stage
    for (int i = threadIdx.x % 32; i < rows * kChunks<kDim>; i += 32) {
      const int r = i / kChunks<kDim>, chunk = i % kChunks<kDim>;
      copy_chunk(shared_address(stage) + r * kRow + 16 * chunk, qkv + (mine + r) * stride + 8 * chunk);
    }
    wait_for_copies();
    __syncwarp();
    Factor<kDim> q;
    load_factor<kDim>(q, shared_address(stage), kRow, 16);

    Softmax<kDim> softmax;
    for_all_tokens(tokens, [&](int key, auto blocks) {
      float p[blocks.value][4];
      Pair weights[blocks.value / 2][4];
      start_scores<T, kDim>(p, q, k, key);
      wait_for_products<0>(p);
      mask(p, tokens - key);
      softmax.weigh(p);
      as_factors<T>(weights, p);
      start_sum<T, kDim>(softmax.out, weights, v, key);
      wait_for_products<0>(softmax.out);
    });
    float scale[2];
    softmax.finish(lse + mine, rows, scale);
    store_tile<T, kDim>(out + mine * width, width, rows, softmax.out, scale[0], scale[1], stage);
  }
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    packed_attention_wide_backward_kernel(const T* __restrict__ dout, const T* __restrict__ qkv,
                                          const T* __restrict__ out, const float* __restrict__ lse,
                                          T* __restrict__ dqkv, int tokens, int heads) {
  extern __shared__ uint4 shared[];
  const int width = heads * kDim, stride = 3 * width, offset = blockIdx.x % heads * kDim, warp = threadIdx.x / 32;
  const int64_t first = static_cast<int64_t>(blockIdx.x / heads) * tokens;
  qkv += first * stride + offset;
  dqkv += first * stride + offset;
  dout += first * width + offset;
  out += first * width + offset;
  lse += static_cast<int64_t>(blockIdx.x) * tokens;

  // Left factors and statistics are also read for rows beyond the last token, whose results are not stored. Reads past
  // the end of the statistics return data of the matrices, and reads past the last matrix data of the stages, which
  // other warps may be writing.
  auto* const statistics = reinterpret_cast<Statistics*>(shared);
  char* const matrices = reinterpret_cast<char*>(statistics + round_up(tokens));
  const unsigned start = shared_address(matrices), step = step_of(tokens), bytes = kChunks<kDim> * step;
  const ChunkedMatrix q{start, step}, k{start + bytes, step}, v{start + 2 * bytes, step}, g{start + 3 * bytes, step};
  T* const stage = reinterpret_cast<T*>(matrices + 4 * bytes) + warp * kTile * kStride;
  {
    TwoArrays<T, kDim> arrays;
    AllStatistics<T, kDim> of_queries;
    arrays.fetch(qkv, stride, dout, width, tokens);
    of_queries.fetch(out, width, lse, tokens);
    arrays.place(q, g, tokens);
    arrays.fetch(qkv + width, stride, qkv + 2 * width, stride, tokens);
    __syncthreads();
    of_queries.place(statistics, g, tokens);
    arrays.place(k, v, tokens);
  }
  publish_shared_memory();
  __syncthreads();

  const float scale = log2_scale<kDim>() * kLn2;
  const int tiles = (tokens + kRows - 1) / kRows;
#pragma unroll 1
  for (int item = warp / 4; item < 2 * tiles; item += kWarps / 4) {
    const int mine = item % tiles * kRows + warp % 4 * kTile, rows = min(max(tokens - mine, 0), kTile);
    T* const to = dqkv + mine * stride;
    if (item < tiles) {
      Factor<kDim> keys, values;
      load_factor<kDim>(keys, k, mine);
      load_factor<kDim>(values, v, mine);
      float dk[kDim / 8][4] = {}, dv[kDim / 8][4] = {};
      for_all_tokens(tokens, [&](int query, auto blocks) {
        float p[blocks.value][4], ds[blocks.value][4];
        Pair weights[blocks.value / 2][4], gradients[blocks.value / 2][4];
        start_scores<T, kDim>(p, keys, q, query);
        start_scores<T, kDim>(ds, values, g, query);
        wait_for_products<1>(p);
        weigh_columns<kDim>(p, statistics + query);
        as_factors<T>(weights, p);
        start_sum<T, kDim>(dv, weights, g, query);
        wait_for_products<1>(ds);
        differentiate_columns(ds, p, statistics + query);
        as_factors<T>(gradients, ds);
        start_sum<T, kDim>(dk, gradients, q, query);
        wait_for_products<0>(dv);
        wait_for_products<0>(dk);
      });
      store_tile<T, kDim>(to + width, stride, rows, dk, scale, scale, stage);
      store_tile<T, kDim>(to + 2 * width, stride, rows, dv, 1.0f, 1.0f, stage);
    } else {
      Factor<kDim> queries, douts;
      load_factor<kDim>(queries, q, mine);
      load_factor<kDim>(douts, g, mine);
      const Statistics* const at = statistics + mine + threadIdx.x % 32 / 4;
      const Statistics of[2] = {at[0], at[8]};
      float dq[kDim / 8][4] = {};
      for_all_tokens(tokens, [&](int key, auto blocks) {
        float p[blocks.value][4], ds[blocks.value][4];
        Pair gradients[blocks.value / 2][4];
        start_scores<T, kDim>(p, queries, k, key);
        start_scores<T, kDim>(ds, douts, v, key);
        wait_for_products<1>(p);
        mask(p, tokens - key);
        weigh_rows<kDim>(p, of);
        wait_for_products<0>(ds);
        differentiate_rows(ds, p, of);
        as_factors<T>(gradients, ds);
        start_sum<T, kDim>(dq, gradients, k, key);
        wait_for_products<0>(dq);
      });
      store_tile<T, kDim>(to, stride, rows, dq, scale, scale, stage);
    }
  }
}

}  // namespace

cudaError_t launch_packed_attention_wide(const void* qkv, void* out, float* lse, int64_t batch, int tokens, int heads,
                                         int head_dim, DType dtype, cudaStream_t stream) {
  return with_types(dtype, head_dim, [&](auto element, auto dim) {
    using T = decltype(element);
    const int shared_bytes = kStageBytes + 2 * kChunks<dim.value> * step_of(tokens);
    return launch(packed_attention_wide_kernel<T, dim.value>, batch * heads, kWarps, shared_bytes, stream,
                  static_cast<const T*>(qkv), static_cast<T*>(out), lse, tokens, heads);
  });
}

cudaError_t launch_packed_attention_wide_backward(const void* dout, const void* qkv, const void* out, const float* lse,
                                                  void* dqkv, int64_t batch, int tokens, int heads, int head_dim,
                                                  DType dtype, cudaStream_t stream) {
  return with_types(dtype, head_dim, [&](auto element, auto dim) {
    using T = decltype(element);
    const int statistics_bytes = round_up(tokens) * static_cast<int>(sizeof(Statistics));
    const int shared_bytes = statistics_bytes + 4 * kChunks<dim.value> * step_of(tokens) + kStageBytes;
    return launch(packed_attention_wide_backward_kernel<T, dim.value>, batch * heads, kWarps, shared_bytes, stream,
                  static_cast<const T*>(dout), static_cast<const T*>(qkv), static_cast<const T*>(out), lse,
                  static_cast<T*>(dqkv), tokens, heads);
  });
}

}  // namespace dcae_fast
