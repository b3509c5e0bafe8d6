// See product.h, and cuBLASLt's documentation. cuBLASLt is column-major: it sees a dense row-major matrix as its
// transpose, and computes Rᵀ·Lᵀ. Its A is our R, its B our L, and its rows are our columns.

#include "product.h"

#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

namespace dcae_fast {

namespace {

constexpr int kMostSuggestions = 32;
constexpr size_t kMostCandidates = 8;
constexpr size_t kMostWorkspace = size_t{32} << 20;  // what NVIDIA recommends for Hopper
constexpr uint32_t kAlignment = 16;                  // bytes

void check(cublasStatus_t status) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw std::runtime_error(std::string("cuBLASLt: ") + cublasLtGetStatusString(status));
}

// The descriptors of a product, with the pointers of its epilogue.
struct Descriptors {
  cublasLtMatmulDescOpaque_t product;
  cublasLtMatrixLayoutOpaque_t a, b, residual, out;

  // Reads of the pointers only those that the epilogue and the scales need.
  Descriptors(const ProductShape& shape, const ProductPointers& pointers) {
    const void *preactivation = pointers.preactivation, *vector = pointers.vector;
    check(cublasLtMatmulDescInit(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    set(CUBLASLT_MATMUL_DESC_TRANSA, shape.right_transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_TRANSB, shape.left_transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, shape.epilogue.code());
    if (vector != nullptr) {
      set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, vector);
      set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, shape.bias_dtype);
    }
    if (preactivation != nullptr) {
      set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, preactivation);
      set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, shape.columns);
    }
    if (shape.is_fast) set(CUBLASLT_MATMUL_DESC_FAST_ACCUM, int8_t{1});
    if (shape.scaling != Scaling::kNone) {
      set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, pointers.right_scale);
      set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, pointers.left_scale);
    }
#if CUBLAS_VERSION >= 120900
    if (shape.scaling == Scaling::kRows) {
      const auto by_row = static_cast<int32_t>(CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F);
      set(CUBLASLT_MATMUL_DESC_A_SCALE_MODE, by_row);
      set(CUBLASLT_MATMUL_DESC_B_SCALE_MODE, by_row);
    }
#endif
    if (shape.is_result_scaled()) set(CUBLASLT_MATMUL_DESC_D_SCALE_POINTER, pointers.out_factor);
    layout(a, shape.right_dtype, shape.columns, shape.depth, shape.right_transposed);
    layout(b, shape.dtype, shape.depth, shape.rows, shape.left_transposed);
    layout(residual, shape.is_result_scaled() ? CUDA_R_16BF : shape.out_dtype, shape.columns, shape.rows, false);
    layout(out, shape.out_dtype, shape.columns, shape.rows, false);
  }

 private:
  template <typename T>
  void set(cublasLtMatmulDescAttributes_t name, const T& value) {
    check(cublasLtMatmulDescSetAttribute(&product, name, &value, sizeof(value)));
  }

  // Describes a matrix that is [rows, columns], stored as its transpose if `transposed`.
  static void layout(cublasLtMatrixLayoutOpaque_t& matrix, cudaDataType_t dtype, int64_t rows, int64_t columns,
                     bool transposed) {
    if (transposed) std::swap(rows, columns);
    check(cublasLtMatrixLayoutInit(&matrix, dtype, static_cast<uint64_t>(rows), static_cast<uint64_t>(columns), rows));
  }
};

// Requirements of candidates.
struct Preference {
  cublasLtMatmulPreferenceOpaque_t preference;

  Preference() {
    check(cublasLtMatmulPreferenceInit(&preference));
    set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kMostWorkspace);
    // no partial sums in half precision
    set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
    for (const auto name : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
      set(name, kAlignment);
    }
  }

 private:
  template <typename T>
  void set(cublasLtMatmulPreferenceAttributes_t name, const T& value) {
    check(cublasLtMatmulPreferenceSetAttribute(&preference, name, &value, sizeof(value)));
  }
};

// Whether clusters have at most four blocks. On Hopper, kernels of cuBLAS 13 with larger clusters (192x104_64x5_4x2)
// have stopped with an illegal instruction while several processes shared the GPU.
bool has_small_clusters(const cublasLtMatmulAlgo_t& algo) {
  uint16_t shape = CUBLASLT_CLUSTER_SHAPE_AUTO;
  size_t written = 0;
  check(cublasLtMatmulAlgoConfigGetAttribute(&algo, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, &shape, sizeof(shape),
                                             &written));
  switch (shape) {
    case CUBLASLT_CLUSTER_SHAPE_AUTO:
    case CUBLASLT_CLUSTER_SHAPE_1x1x1:
    case CUBLASLT_CLUSTER_SHAPE_2x1x1:
    case CUBLASLT_CLUSTER_SHAPE_1x2x1:
    case CUBLASLT_CLUSTER_SHAPE_2x2x1:
    case CUBLASLT_CLUSTER_SHAPE_4x1x1:
    case CUBLASLT_CLUSTER_SHAPE_1x4x1: return true;
    default: return false;
  }
}

cublasLtEpilogue_t code_of(const std::string& name) {
  if (name == "none") return CUBLASLT_EPILOGUE_DEFAULT;
  if (name == "bias") return CUBLASLT_EPILOGUE_BIAS;
  if (name == "gelu") return CUBLASLT_EPILOGUE_GELU;
  if (name == "gelu_bias") return CUBLASLT_EPILOGUE_GELU_BIAS;
  if (name == "gelu_aux") return CUBLASLT_EPILOGUE_GELU_AUX;
  if (name == "gelu_aux_bias") return CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
  if (name == "bgrad") return CUBLASLT_EPILOGUE_BGRADB;
  throw std::invalid_argument("unknown epilogue: " + name);
}

}  // namespace

Epilogue::Epilogue(const std::string& name) : code_(code_of(name)) {}

void ProductPlan::run(cublasLtHandle_t handle, const ProductPointers& pointers, void* workspace,
                      cudaStream_t stream) const {
  Descriptors descriptors(shape_, pointers);
  const float alpha = 1.0f, beta = pointers.residual != nullptr ? 1.0f : 0.0f;
  const bool has_none = shape_.is_result_scaled();  // a result in float8 is no valid residual, not even with beta = 0
  const void* residual = pointers.residual != nullptr || has_none ? pointers.residual : pointers.out;
  check(cublasLtMatmul(handle, &descriptors.product, &alpha, pointers.right, &descriptors.a, pointers.left,
                       &descriptors.b, &beta, residual, &descriptors.residual, pointers.out, &descriptors.out,
                       &candidate_.algo, workspace, candidate_.workspaceSize, stream));
}

std::vector<ProductPlan> find_product_plans(cublasLtHandle_t handle, const ProductShape& shape) {
  // A stand-in for the pointers of later calls: the heuristic only looks at their alignment.
  auto* const anywhere = reinterpret_cast<void*>(uintptr_t{kAlignment});
  const auto& epilogue = shape.epilogue;
  const bool has_vector = epilogue.takes_bias() || epilogue.sums_left();
  void* const preactivation = epilogue.gives_preactivation() ? anywhere : nullptr;
  Descriptors descriptors(shape, {anywhere, anywhere, nullptr, anywhere, preactivation, has_vector ? anywhere : nullptr,
                                  anywhere, anywhere, anywhere});
  Preference preference;
  std::vector<cublasLtMatmulHeuristicResult_t> found(kMostSuggestions);
  int count = 0;
  const auto status = cublasLtMatmulAlgoGetHeuristic(
      handle, &descriptors.product, &descriptors.a, &descriptors.b, &descriptors.residual, &descriptors.out,
      &preference.preference, kMostSuggestions, found.data(), &count);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED) return {};
  check(status);
  std::vector<ProductPlan> plans;
  for (int i = 0; i < count && plans.size() < kMostCandidates; ++i) {
    const bool is_usable = found[i].state == CUBLAS_STATUS_SUCCESS && has_small_clusters(found[i].algo);
    if (is_usable) plans.emplace_back(shape, found[i]);
  }
  return plans;
}

bool has_scaled_products() { return CUBLAS_VERSION >= 120900 && cublasLtGetVersion() >= 120900; }

cublasLtHandle_t cublaslt_handle(int device) {
  static std::mutex mutex;
  static std::map<int, cublasLtHandle_t> handles;
  const std::lock_guard<std::mutex> lock(mutex);
  cublasLtHandle_t& handle = handles[device];
  if (handle == nullptr) {
    // cublasLtCreate may allocate memory, which is otherwise forbidden while this thread captures a stream
    auto mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    const auto status = cublasLtCreate(&handle);
    cudaThreadExchangeStreamCaptureMode(&mode);
    check(status);
  }
  return handle;
}

}  // namespace dcae_fast
