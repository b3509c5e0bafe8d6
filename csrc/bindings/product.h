// A plan of cuBLASLt with what is needed to call it with torch tensors; see product.cpp.
#pragma once

#include <vector>

#include "bindings.h"
#include "plans/product.h"

namespace dcae_fast {

struct BoundProductPlan {
  ProductPlan plan;
  at::ScalarType dtype, out_dtype;

  // The result; then the preactivation or the sums that the epilogue gives. If it is not transposed, left may have any
  // number of dimensions before its last, which the results have too.
  std::vector<at::Tensor> operator()(const at::Tensor& left, const at::Tensor& right, const MaybeTensor& bias,
                                     const MaybeTensor& residual) const;
};

}  // namespace dcae_fast
