// Products and loads of fragments. The threads of a warp hold a fragment together.
//
// With g = lane / 4 and t = lane % 4, a thread holds
//   of a product c [16, 8]: rows g and g + 8, at columns 2t and 2t + 1;
//   of a left factor a [16, 16]: the same elements, then the elements 8 columns further;
//   of a right factor b [16, 8]: column g, at rows 2t and 2t + 1, then at the rows 8 further.
#pragma once

#include <type_traits>

#include "pairs.cuh"

namespace dcae_fast {

// c += a b, with a [16, 16], b [16, 8] in half precision and c [16, 8] in fp32.
template <typename T>
__device__ inline void multiply_add(float (&c)[4], const Pair (&a)[4], const Pair (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// The same with a [16, 8] and b [8, 8].
template <typename T>
__device__ inline void multiply_add(float (&c)[4], const Pair (&a)[2], Pair b) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
  }
}

// Loads matrices [8, 8] from shared memory. Lane 8i + r gives the address of row r of matrix i. A thread gets columns
// 2t and 2t + 1 of row g of each matrix; transposed: rows 2t and 2t + 1 of column g.
__device__ inline void load_matrices(Pair& m0, Pair& m1, Pair& m2, Pair& m3, unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m0), "=r"(m1), "=r"(m2), "=r"(m3)
               : "r"(address)
               : "memory");
}

__device__ inline void load_matrices(Pair& m0, Pair& m1, unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(m0), "=r"(m1)
               : "r"(address)
               : "memory");
}

__device__ inline void load_transposed(Pair& m0, Pair& m1, Pair& m2, Pair& m3, unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m0), "=r"(m1), "=r"(m2), "=r"(m3)
               : "r"(address)
               : "memory");
}

__device__ inline void load_transposed(Pair& m0, Pair& m1, unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(m0), "=r"(m1)
               : "r"(address)
               : "memory");
}

}  // namespace dcae_fast
