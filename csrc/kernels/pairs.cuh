// Two neighbouring channels in half precision as one 32-bit word, converted to fp32 and back, or to int8; and addresses
// in shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace dcae_fast {

using Pair = unsigned;

template <typename T>
__device__ float2 widen(Pair pair);

template <>
__device__ inline float2 widen<__nv_bfloat16>(Pair pair) {  // two instructions; __bfloat1622float2 takes three
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

template <>
__device__ inline float2 widen<__half>(Pair pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

template <typename T>
__device__ Pair narrow(float low, float high);

template <>
__device__ inline Pair narrow<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const Pair&>(pair);
}

template <>
__device__ inline Pair narrow<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const Pair&>(pair);
}

// The lowest two bytes are the numbers as int8, rounded half to even, between -127 and 127. The sum with 1.5 * 2^23 has
// the rounded number in its lowest byte.
__device__ inline unsigned quantize(float low, float high) {
  const auto rounded = [](float x) { return __float_as_uint(fminf(fmaxf(x, -127.0f), 127.0f) + 12582912.0f); };
  return __byte_perm(rounded(low), rounded(high), 0x0040);
}

__device__ inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

}  // namespace dcae_fast
