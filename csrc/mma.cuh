// Matrix products of a warp on tensor cores, m16n8k16 in half precision, and their operands from shared memory.
#pragma once

#include <cstdint>

#include "pairs.cuh"

__device__ inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// c += a b with a [16, 16], b [16, 8] in half precision and c [16, 8] in fp32.
template <typename T>
__device__ void multiply_add(float (&c)[4], const Pair (&a)[4], const Pair (&b)[2]);

template <>
__device__ inline void multiply_add<__nv_bfloat16>(float (&c)[4], const Pair (&a)[4], const Pair (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ inline void multiply_add<__half>(float (&c)[4], const Pair (&a)[4], const Pair (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices: each thread names a row of 16 bytes, those of eight threads make a matrix; word i of a thread is
// its share of matrix i, the pair at row lane / 4 and columns 2 (lane % 4).
__device__ inline void load_matrices(Pair (&to)[4], const Pair* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
