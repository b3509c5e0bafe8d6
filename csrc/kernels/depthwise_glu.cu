// Depthwise 3x3 convolution and gated linear unit in one pass over memory. See ops.h for the formula and the layout.

#include "depthwise_glu.cuh"

namespace dcae_fast {

cudaError_t launch_depthwise_glu(const void* x, const void* weight, const void* bias, void* out, int64_t batch,
                                 int height, int width, int channels, DType dtype, cudaStream_t stream) {
  const auto launch = dtype == DType::kFloat16 ? launch_glu<__half, false> : launch_glu<__nv_bfloat16, false>;
  return launch(x, weight, bias, nullptr, out, batch, height, width, channels, stream);
}

}  // namespace dcae_fast
