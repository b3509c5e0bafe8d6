// The Python module dcae_fast._C. The functions that call cuDNN or cuBLASLt are built only where the headers of that
// library are found.

#include "bindings.h"

PYBIND11_MODULE(_C, module) {
  dcae_fast::bind_autocast(module);
  dcae_fast::bind_image_operators(module);
  dcae_fast::bind_signature(module);
  dcae_fast::bind_token_operators(module);
#ifdef DCAE_FAST_CUDNN
  dcae_fast::bind_convolution(module);
#endif
#ifdef DCAE_FAST_CUBLASLT
  dcae_fast::bind_product(module);
  dcae_fast::bind_scaled_product(module);
  dcae_fast::bind_block_halves(module);
#endif
}
