// Matrix products with a fused epilogue through cuBLASLt. Python chooses the fastest of a product's candidates, and
// remembers the choice (dcae_fast/ops/_plans.py).
#pragma once

#include <cublasLt.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace dcae_fast {

// The step after the product L·R, computed in fp32 before the result is rounded:
//   none, bias, gelu, gelu_bias     adds a bias [columns], then applies GELU in its tanh form, as the name says
//   gelu_aux, gelu_aux_bias         as gelu, gelu_bias; also gives GELU's argument, the preactivation [rows, columns]
//   bgrad                           also gives the sums of L over the depth [rows]
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

// L [rows, depth] times R [depth, columns], summed in fp32. Both are dense in row-major order; left_transposed and
// right_transposed: whether memory holds the transpose. out_dtype: of result, residual, preactivation and sums.
//
// The last four fields are for L and R in float8; right_transposed must be true and left_transposed false. scaling: what
// in L and R has a scale in fp32, by which the product is multiplied before the epilogue: each row of L and each column
// of R, or the whole matrices. is_fast: the matrix units may sum with fewer bits than fp32. bias_dtype: bfloat16 if
// out_dtype is fp32 or float8, else out_dtype. A result in float8 is multiplied by a number in fp32 after the epilogue.
enum class Scaling { kNone, kRows, kWhole };

struct ProductShape {
  cudaDataType_t dtype, out_dtype;
  int64_t rows, columns, depth;
  bool left_transposed, right_transposed;
  Epilogue epilogue;
  cudaDataType_t right_dtype = dtype, bias_dtype = out_dtype;
  Scaling scaling = Scaling::kNone;
  bool is_fast = false;

  bool is_result_scaled() const { return out_dtype == CUDA_R_8F_E4M3; }
};

// Device pointers, aligned to 16 bytes. The residual, which is added before the epilogue, may be null. preactivation
// and vector (the bias or the sums) belong to the epilogue. The scales, and the factor of a result in float8, are null
// unless the product is scaled.
struct ProductPointers {
  const void *left, *right, *residual;
  void *out, *preactivation, *vector;
  const void *left_scale = nullptr, *right_scale = nullptr, *out_factor = nullptr;
};

// One way to compute a product. Several threads may call `run` at once.
class ProductPlan {
 public:
  ProductPlan(const ProductShape& shape, const cublasLtMatmulHeuristicResult_t& candidate)
      : shape_(shape), candidate_(candidate) {}

  const ProductShape& shape() const { return shape_; }
  int64_t workspace_size() const { return static_cast<int64_t>(candidate_.workspaceSize); }

  // Throws std::runtime_error if cuBLASLt reports an error.
  void run(cublasLtHandle_t handle, const ProductPointers& pointers, void* workspace, cudaStream_t stream) const;

 private:
  ProductShape shape_;
  cublasLtMatmulHeuristicResult_t candidate_;
};

// Candidates that are deterministic, sum in fp32, and have clusters of at most four blocks; cuBLASLt's guess of the
// fastest comes first. There may be none, for example for a small product.
std::vector<ProductPlan> find_product_plans(cublasLtHandle_t handle, const ProductShape& shape);

// Whether this version of cuBLASLt has products with Scaling::kRows: from 12.9.
bool has_scaled_products();

// cuBLASLt's handle for `device`, which must be the current device. It is created once and lives until the process
// ends.
cublasLtHandle_t cublaslt_handle(int device);

}  // namespace dcae_fast
