// A plan of cuBLASLt that takes torch tensors; see product.cpp.
#pragma once

#include <vector>

#include "bindings.h"
#include "plans/product.h"

namespace dcae_fast {

struct BoundProductPlan {
  ProductPlan plan;
  at::ScalarType dtype, out_dtype;

  // Returns the result, then the preactivation or the sums that the epilogue gives. If left is not transposed, it may
  // have any number of dimensions before its last; the results have them too.
  std::vector<at::Tensor> operator()(const at::Tensor& left, const at::Tensor& right, const MaybeTensor& bias,
                                     const MaybeTensor& residual) const;
};

}  // namespace dcae_fast
