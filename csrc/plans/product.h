// Matrix products with a fused epilogue through cuBLASLt: the mechanism alone. Which of a product's candidates is the
// fastest, and how that is remembered, is decided in Python (dcae_fast/ops/_plans.py).
#pragma once

#include <cublasLt.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace dcae_fast {

// What follows the product L·R, in fp32 before the result is rounded:
//   none, bias, gelu, gelu_bias     adds a bias [columns], applies GELU in its tanh form
//   gelu_aux, gelu_aux_bias         the same, and gives GELU's argument, the preactivation [rows, columns]
//   bgrad                           gives the sums of L over the depth [rows]
class Epilogue {
 public:
  // Throws std::invalid_argument on other names.
  explicit Epilogue(const std::string& name);

  cublasLtEpilogue_t code() const { return code_; }
  bool takes_bias() const { return code_ & 4; }
  bool gives_preactivation() const { return code_ & 128; }
  bool sums_left() const { return code_ == CUBLASLT_EPILOGUE_BGRADB; }

 private:
  cublasLtEpilogue_t code_;
};

// L [rows, depth] times R [depth, columns], summed in fp32; in memory each is dense, in row-major order, and transposed
// if the flag says so. out_dtype: of the result, the residual, the bias, the preactivation and the sums.
struct ProductShape {
  cudaDataType_t dtype, out_dtype;
  int64_t rows, columns, depth;
  bool left_transposed, right_transposed;
  Epilogue epilogue;
};

// Device pointers, aligned to 16 bytes. The residual, added before the epilogue, may be null; preactivation and vector
// (the bias or the sums) are those of the epilogue.
struct ProductPointers {
  const void *left, *right, *residual;
  void *out, *preactivation, *vector;
};

// One way to compute a product. `run` may be called from several threads at once.
class ProductPlan {
 public:
  ProductPlan(const ProductShape& shape, const cublasLtMatmulHeuristicResult_t& candidate)
      : shape_(shape), candidate_(candidate) {}

  const ProductShape& shape() const { return shape_; }
  int64_t workspace_size() const { return static_cast<int64_t>(candidate_.workspaceSize); }

  // Throws std::runtime_error if cuBLASLt refuses.
  void run(cublasLtHandle_t handle, const ProductPointers& pointers, void* workspace, cudaStream_t stream) const;

 private:
  ProductShape shape_;
  cublasLtMatmulHeuristicResult_t candidate_;
};

// Candidates that give the same result each time, keep to fp32 sums and have clusters of four blocks at the most; those
// that cuBLASLt thinks the fastest first. There may be none: of a small product, for example.
std::vector<ProductPlan> find_product_plans(cublasLtHandle_t handle, const ProductShape& shape);

// cuBLASLt's handle for the current device, which is this one: made once, kept until the process ends.
cublasLtHandle_t cublaslt_handle(int device);

}  // namespace dcae_fast
