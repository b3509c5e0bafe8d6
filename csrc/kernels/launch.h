// Helpers of the launch functions: the number of multiprocessors, and the element type of a dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "ops.h"

namespace dcae_fast {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Counts the multiprocessors of the current device.
inline cudaError_t count_processors(int* processors) {
  int device;
  if (const auto error = cudaGetDevice(&device)) return error;
  return cudaDeviceGetAttribute(processors, cudaDevAttrMultiProcessorCount, device);
}

// Calls `call` with a value of the dtype's element type.
template <typename Call>
cudaError_t with_element(DType dtype, Call call) {
  return dtype == DType::kFloat16 ? call(__half{}) : call(__nv_bfloat16{});
}

}  // namespace dcae_fast
