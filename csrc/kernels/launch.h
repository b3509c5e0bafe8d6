// Helpers of the launch functions: the number of multiprocessors, the element type of a dtype, launches in clusters.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <climits>
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

// Launches a kernel in `clusters` clusters of `blocks` blocks each.
template <typename... Parameters>
cudaError_t launch_clusters(void (*kernel)(Parameters...), int64_t clusters, int blocks, int threads,
                            cudaStream_t stream, Parameters... parameters) {
  if (clusters * blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = static_cast<unsigned>(clusters * blocks);
  config.blockDim = static_cast<unsigned>(threads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, parameters...);
}

}  // namespace dcae_fast
