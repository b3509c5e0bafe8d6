// Depthwise 3x3 convolution and gated linear unit in one pass over memory. See ops.h for the formula and the layout.

#include "depthwise_glu.cuh"

namespace dcae_fast {

cudaError_t launch_depthwise_glu(const void* x, const void* weight, const void* bias, void* out,
                                 const float* out_factor, int64_t batch, int height, int width, int channels,
                                 DType dtype, cudaStream_t stream) {
  return with_element(dtype, [&](auto element) {
    using T = decltype(element);
    const auto launch = out_factor == nullptr ? launch_glu<T, false> : launch_glu<T, false, uint16_t>;
    return launch(x, weight, bias, nullptr, out, out_factor, batch, height, width, channels, stream);
  });
}

}  // namespace dcae_fast
