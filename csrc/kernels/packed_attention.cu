// Softmax attention of up to kMostWarpTokens, forward and backward, through products of warps. See ops.h for the
// formulas and the layout. With more tokens, reads of shared memory would limit these products;
// packed_attention_wide.cu reads less of it.
//
// A block computes one head of one image, which it copies to shared memory at once. A warp computes 16 rows at a time
// on tensor cores: scores of a few groups of 16 keys stay in its registers, where they become a factor of the next
// product. Forward, the rows are queries, with a running softmax over the keys. Backward, the rows are either queries,
// which give dq, or keys, which give dk and dv: scores are computed twice, and no warp waits for the scores of another.

#include "packed_attention.cuh"

namespace dcae_fast {

namespace {

// Groups of keys that a warp scores at a time, as many as fit into its registers: forward; forward if these are all
// groups; for the gradient of queries. For the gradients of keys and values it is one group of queries.
constexpr int kForwardGroups = 4, kMostGroups = 5, kQueryGroups = 2;
constexpr int kForwardThreads = 320, kBackwardThreads = 512;  // upper bounds, which limit the registers

// Starts the copy of rows to shared memory, from kArrays arrays `from_step` elements apart to arrays `to_step` bytes
// apart.
template <int kDim, int kArrays, typename T>
__device__ void load_rows(unsigned to, int to_step, const T* from, int from_step, int stride, int rows) {
  for (int i = threadIdx.x; i < rows * kChunks<kDim>; i += blockDim.x) {
    const int row = i / kChunks<kDim>, column = i % kChunks<kDim> * 8;
#pragma unroll
    for (int j = 0; j < kArrays; ++j) {
      copy_chunk(to + row * kRow + 2 * column + j * to_step, from + row * stride + column + j * from_step);
    }
  }
}

template <int kDim>
__device__ void clear_rows(unsigned to, int rows) {
  for (int i = threadIdx.x; i < rows * kChunks<kDim>; i += blockDim.x) {
    store_chunk(to + i / kChunks<kDim> * kRow + i % kChunks<kDim> * 16, uint4{});
  }
}

__device__ void wait_for_rows() {
  wait_for_copies();
  __syncthreads();
}

// The offset of a lane's row when its warp loads 16 × 16 elements. by_rows: as a left factor or, transposed, as a right
// factor; by_columns: as a right factor whose transpose lies in memory.
__device__ unsigned by_rows() { return threadIdx.x % 16 * kRow + threadIdx.x % 32 / 16 * 16; }
__device__ unsigned by_columns() {
  return (threadIdx.x % 8 + threadIdx.x % 32 / 16 * 8) * kRow + threadIdx.x / 8 % 2 * 16;
}

// c = x yᵀ, with 16 rows x and 16 * kGroups rows y in shared memory.
template <typename T, int kDim, int kGroups>
__device__ void multiply_rows(float (&c)[2 * kGroups][4], unsigned x, unsigned y) {
  const unsigned left = x + by_rows(), right = y + by_columns();
#pragma unroll
  for (int i = 0; i < 2 * kGroups; ++i) c[i][0] = c[i][1] = c[i][2] = c[i][3] = 0.0f;
#pragma unroll
  for (int k = 0; k + 16 <= kDim; k += 16) {
    Pair a[4];
    load_matrices(a[0], a[1], a[2], a[3], left + 2 * k);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      Pair b[2][2];
      load_matrices(b[0][0], b[0][1], b[1][0], b[1][1], right + i * kTile * kRow + 2 * k);
      multiply_add<T>(c[2 * i], a, b[0]);
      multiply_add<T>(c[2 * i + 1], a, b[1]);
    }
  }
  if constexpr (kDim % 16 != 0) {
    constexpr int k = kDim / 16 * 16;
    Pair a[2];
    load_matrices(a[0], a[1], left + 2 * k);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      Pair b[2];
      load_matrices(b[0], b[1], y + by_rows() + i * kTile * kRow + 2 * k);
      multiply_add<T>(c[2 * i], a, b[0]);
      multiply_add<T>(c[2 * i + 1], a, b[1]);
    }
  }
}

// c += x y, with x [16, 16 * kGroups], a product, rounded, and 16 * kGroups rows y in shared memory.
template <typename T, int kDim, int kGroups>
__device__ void accumulate(float (&c)[kDim / 8][4], const float (&x)[2 * kGroups][4], unsigned y) {
  const unsigned right = y + by_rows();
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    Pair a[4], b[2][2];
    as_factor<T>(a, x, i);
#pragma unroll
    for (int j = 0; j < kDim / 16; ++j) {
      load_transposed(b[0][0], b[0][1], b[1][0], b[1][1], right + i * kTile * kRow + 32 * j);
      multiply_add<T>(c[2 * j], a, b[0]);
      multiply_add<T>(c[2 * j + 1], a, b[1]);
    }
    if constexpr (kDim % 16 != 0) {
      load_transposed(b[0][0], b[0][1], right + i * kTile * kRow + kDim / 16 * 32);
      multiply_add<T>(c[kDim / 8 - 1], a, b[0]);
    }
  }
}

// kAtOnce: scores all keys at once, for kMostGroups groups of keys, 65 to 80 tokens.
template <typename T, int kDim, bool kAtOnce>
__global__ void __launch_bounds__(kForwardThreads, 2)
    packed_attention_kernel(const T* __restrict__ qkv, T* __restrict__ out, float* __restrict__ lse, int tokens,
                            int heads) {
  extern __shared__ uint4 shared[];
  const int width = heads * kDim, stride = 3 * width, tiles = round_up(tokens) / kTile;
  const int64_t first = static_cast<int64_t>(blockIdx.x / heads) * tokens;
  const int head = blockIdx.x % heads;
  qkv += first * stride + head * kDim;

  // Reads past the end of q and k return the data behind them; their scores are masked. Rows past the end of v are
  // cleared: they are multiplied by zero, and NaN would remain.
  const unsigned q = shared_address(shared), k = q + tokens * kRow, v = k + tokens * kRow;
  load_rows<kDim, 3>(q, tokens * kRow, qkv, width, stride, tokens);
  clear_rows<kDim>(v + tokens * kRow, tiles * kTile - tokens);
  wait_for_rows();

  for (int tile = threadIdx.x / 32; tile < tiles; tile += blockDim.x / 32) {
    Softmax<kDim> softmax;
    int done = 0;
    const auto add = [&](auto groups) {
      const int at = done * kTile * kRow;
      float p[2 * groups.value][4];
      multiply_rows<T, kDim, groups.value>(p, q + tile * kTile * kRow, k + at);
      mask(p, tokens - done * kTile);
      softmax.weigh(p);
      accumulate<T, kDim, groups.value>(softmax.out, p, v + at);
      done += groups.value;
    };
    if constexpr (kAtOnce) {
      add(std::integral_constant<int, kMostGroups>{});
    } else {
      while (tiles - done >= kForwardGroups) add(std::integral_constant<int, kForwardGroups>{});
      switch (tiles - done) {
        case 3: add(std::integral_constant<int, 3>{}); break;
        case 2: add(std::integral_constant<int, 2>{}); break;
        case 1: add(std::integral_constant<int, 1>{}); break;
      }
    }

    const int rows = min(kTile, tokens - tile * kTile);
    float scale[2];
    softmax.finish(lse + static_cast<int64_t>(blockIdx.x) * tokens + tile * kTile, rows, scale);
    T* const to = out + (first + tile * kTile) * width + head * kDim;
    store_tile<T, kDim>(to, width, rows, softmax.out, scale[0], scale[1],
                        reinterpret_cast<T*>(shared) + tile * kTile * kStride);
  }
}

// A head in shared memory. The number of rows is a multiple of 16; rows beyond the last token are zero.
struct Head {
  unsigned q, k, v, dout;
  const Statistics* statistics;  // of each query
};

// Computes the statistics of all queries, with four threads a row.
template <typename T, int kDim>
__device__ void load_statistics(Statistics* statistics, const T* dout, const T* out, const float* lse, int stride,
                                int tokens) {
  for (int row = threadIdx.x / 4; row < round_up(tokens); row += blockDim.x / 4) {
    const float base = row < tokens ? __ldg(lse + row) * kLog2E : kInfinity;
    constexpr int kEach = (kChunks<kDim> + 3) / 4;
    uint4 x[kEach] = {}, y[kEach] = {};
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int column = 8 * (4 * i + threadIdx.x % 4);
      if (row < tokens && column < kDim) {
        x[i] = load_chunk(dout + row * stride + column);
        y[i] = load_chunk(out + row * stride + column);
      }
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) sum = dot<T>(x[i], y[i], sum);
    sum = row_sum(sum);
    if (threadIdx.x % 4 == 0) statistics[row] = {base, sum};
  }
}

// Adds to dq of 16 queries the terms of kGroups groups of keys, starting with group `first`.
template <typename T, int kDim, int kGroups>
__device__ void add_query_gradient(float (&dq)[kDim / 8][4], const Head& head, int tile, int first, int tokens) {
  const int from = tile * kTile * kRow, at = first * kTile * kRow, g = threadIdx.x % 32 / 4;
  float p[2 * kGroups][4], ds[2 * kGroups][4];
  multiply_rows<T, kDim, kGroups>(p, head.q + from, head.k + at);
  multiply_rows<T, kDim, kGroups>(ds, head.dout + from, head.v + at);
  mask(p, tokens - first * kTile);
  const Statistics of[2] = {head.statistics[tile * kTile + g], head.statistics[tile * kTile + g + 8]};
  weigh_rows<kDim>(p, of);
  differentiate_rows(ds, p, of);
  accumulate<T, kDim, kGroups>(dq, ds, head.k + at);
}

// Adds to dk and dv of 16 keys the terms of 16 queries. keys, queries: tiles.
template <typename T, int kDim>
__device__ void add_key_gradients(float (&dk)[kDim / 8][4], float (&dv)[kDim / 8][4], const Head& head, int keys,
                                  int queries) {
  const int from = keys * kTile * kRow, at = queries * kTile * kRow;
  float p[2][4], ds[2][4];
  multiply_rows<T, kDim, 1>(p, head.k + from, head.q + at);
  multiply_rows<T, kDim, 1>(ds, head.v + from, head.dout + at);
  weigh_columns<kDim>(p, head.statistics + queries * kTile);
  differentiate_columns(ds, p, head.statistics + queries * kTile);
  accumulate<T, kDim, 1>(dv, p, head.dout + at);
  accumulate<T, kDim, 1>(dk, ds, head.q + at);
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    packed_attention_backward_kernel(const T* __restrict__ dout, const T* __restrict__ qkv, const T* __restrict__ out,
                                     const float* __restrict__ lse, T* __restrict__ dqkv, int tokens, int heads) {
  extern __shared__ uint4 shared[];
  const int width = heads * kDim, stride = 3 * width, padded = round_up(tokens), tiles = padded / kTile;
  const int64_t first = static_cast<int64_t>(blockIdx.x / heads) * tokens;
  const int offset = blockIdx.x % heads * kDim, warp = threadIdx.x / 32;
  qkv += first * stride + offset;
  dout += first * width + offset;
  out += first * width + offset;
  lse += static_cast<int64_t>(blockIdx.x) * tokens;

  auto* const statistics = reinterpret_cast<Statistics*>(shared);
  T* const stage = reinterpret_cast<T*>(statistics + padded) + warp * kTile * kStride;
  Head head;
  head.statistics = statistics;
  head.q = shared_address(statistics + padded) + blockDim.x / 32 * kTile * kRow;
  head.k = head.q + padded * kRow;
  head.v = head.k + padded * kRow;
  head.dout = head.v + padded * kRow;
  load_rows<kDim, 3>(head.q, padded * kRow, qkv, width, stride, tokens);
  load_rows<kDim, 1>(head.dout, 0, dout, 0, width, tokens);
  for (const unsigned rows : {head.q, head.k, head.v, head.dout}) {
    clear_rows<kDim>(rows + tokens * kRow, padded - tokens);
  }
  load_statistics<T, kDim>(statistics, dout, out, lse, width, tokens);
  wait_for_rows();

  const float scale = log2_scale<kDim>() * kLn2;
  for (int item = warp; item < 2 * tiles; item += blockDim.x / 32) {
    const int tile = item % tiles, rows = min(kTile, tokens - tile * kTile);
    T* const to = dqkv + (first + tile * kTile) * stride + offset;
    if (item < tiles) {
      float dk[kDim / 8][4] = {}, dv[kDim / 8][4] = {};
#pragma unroll 1
      for (int i = 0; i < tiles; ++i) add_key_gradients<T, kDim>(dk, dv, head, tile, i);
      store_tile<T, kDim>(to + width, stride, rows, dk, scale, scale, stage);
      store_tile<T, kDim>(to + 2 * width, stride, rows, dv, 1.0f, 1.0f, stage);
    } else {
      float dq[kDim / 8][4] = {};
      int done = 0;
      for (; done + kQueryGroups <= tiles; done += kQueryGroups) {
        add_query_gradient<T, kDim, kQueryGroups>(dq, head, tile, done, tokens);
      }
      for (; done < tiles; ++done) {
        add_query_gradient<T, kDim, 1>(dq, head, tile, done, tokens);
      }
      store_tile<T, kDim>(to, stride, rows, dq, scale, scale, stage);
    }
  }
}

}  // namespace

cudaError_t launch_packed_attention(const void* qkv, void* out, float* lse, int64_t batch, int tokens, int heads,
                                    int head_dim, DType dtype, cudaStream_t stream) {
  if (tokens > kMostWarpTokens) {
    return launch_packed_attention_wide(qkv, out, lse, batch, tokens, heads, head_dim, dtype, stream);
  }
  const int padded = round_up(tokens), warps = padded / kTile;
  return with_types(dtype, head_dim, [&](auto element, auto dim) {
    using T = decltype(element);
    const auto kernel = padded == kMostGroups * kTile ? packed_attention_kernel<T, dim.value, true>
                                                      : packed_attention_kernel<T, dim.value, false>;
    return launch(kernel, batch * heads, warps, (2 * tokens + padded) * kRow, stream, static_cast<const T*>(qkv),
                  static_cast<T*>(out), lse, tokens, heads);
  });
}

cudaError_t launch_packed_attention_backward(const void* dout, const void* qkv, const void* out, const float* lse,
                                             void* dqkv, int64_t batch, int tokens, int heads, int head_dim,
                                             DType dtype, cudaStream_t stream) {
  if (tokens > kMostWarpTokens) {
    return launch_packed_attention_wide_backward(dout, qkv, out, lse, dqkv, batch, tokens, heads, head_dim, dtype,
                                                 stream);
  }
  const int padded = round_up(tokens), warps = padded / kTile;
  const int shared_bytes = (4 * padded + warps * kTile) * kRow + padded * static_cast<int>(sizeof(Statistics));
  return with_types(dtype, head_dim, [&](auto element, auto dim) {
    using T = decltype(element);
    return launch(packed_attention_backward_kernel<T, dim.value>, batch * heads, warps, shared_bytes, stream,
                  static_cast<const T*>(dout), static_cast<const T*>(qkv), static_cast<const T*>(out), lse,
                  static_cast<T*>(dqkv), tokens, heads);
  });
}

}  // namespace dcae_fast
