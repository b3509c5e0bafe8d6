// dcae_fast._C.Product and ProductPlan: matrix products of torch tensors through cuBLASLt.

#include "product.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "checks.h"

namespace dcae_fast {

namespace {

cudaDataType_t dtype_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf: return CUDA_R_16F;
    case at::kBFloat16: return CUDA_R_16BF;
    case at::kFloat: return CUDA_R_32F;
    default: throw pybind11::type_error("expected float16, bfloat16 or float32, got " + text(dtype));
  }
}

// A product for tensors of certain shapes and dtypes.
struct BoundProduct {
  std::vector<ProductPlan> plans;
  at::ScalarType dtype, out_dtype;

  static BoundProduct make(const at::Tensor& left, const at::Tensor& right, bool left_transposed, bool right_transposed,
                           bool out_in_float32, const std::string& epilogue) {
    on_cuda("left", left);
    require_value(left.dim() == 2 && right.dim() == 2 && left.numel() > 0 && right.numel() > 0,
                  "left and right must have two dimensions and not be empty, got ", left.sizes(), ", ", right.sizes());
    const int64_t depth = left.size(left_transposed ? 0 : 1);
    require_value(right.size(right_transposed ? 1 : 0) == depth, "left and right do not fit together: ", left.sizes(),
                  ", ", right.sizes());
    const at::ScalarType out_dtype = out_in_float32 ? at::kFloat : left.scalar_type();
    const ProductShape shape{dtype_of(left.scalar_type()),
                             dtype_of(out_dtype),
                             left.size(left_transposed ? 1 : 0),
                             right.size(right_transposed ? 0 : 1),
                             depth,
                             left_transposed,
                             right_transposed,
                             Epilogue(epilogue)};
    const c10::cuda::CUDAGuard guard(left.device());
    return {find_product_plans(cublaslt_handle(left.get_device()), shape), left.scalar_type(), out_dtype};
  }

  BoundProductPlan build(int64_t candidate) const { return {plans.at(candidate), dtype, out_dtype}; }
};

}  // namespace

std::vector<at::Tensor> BoundProductPlan::operator()(const at::Tensor& left, const at::Tensor& right,
                                                     const MaybeTensor& bias, const MaybeTensor& residual) const {
  const ProductShape& shape = plan.shape();
  const Epilogue& epilogue = shape.epilogue;
  const auto check = [&](const char* name, const MaybeTensor& x, bool is_wanted, at::IntArrayRef sizes) {
    require_value(x.has_value() == is_wanted, name, is_wanted ? " is missing" : " is not taken by this epilogue");
    if (x) require_dense(name, *x, sizes, out_dtype, left.device());
  };
  const auto sizes = [](int64_t first, int64_t second, bool transposed) {
    return transposed ? std::vector<int64_t>{second, first} : std::vector<int64_t>{first, second};
  };
  auto left_sizes = sizes(shape.rows, shape.depth, shape.left_transposed);
  std::vector<int64_t> out_sizes{shape.rows, shape.columns};
  if (!shape.left_transposed && left.dim() > 0 && left.numel() == shape.rows * shape.depth) {
    left_sizes = out_sizes = left.sizes().vec();
    left_sizes.back() = shape.depth;
    out_sizes.back() = shape.columns;
  }
  require_dense("left", left, left_sizes, dtype, left.device());
  require_dense("right", right, sizes(shape.depth, shape.columns, shape.right_transposed), dtype, left.device());
  check("bias", bias, epilogue.takes_bias(), shape.columns);
  check("residual", residual, residual.has_value(), out_sizes);

  const c10::cuda::CUDAGuard guard(left.device());
  const auto options = left.options().dtype(out_dtype);
  std::vector<at::Tensor> results{at::empty(out_sizes, options)};
  if (epilogue.gives_preactivation()) results.push_back(at::empty(out_sizes, options));
  if (epilogue.sums_left()) results.push_back(at::empty(shape.rows, options));
  at::Tensor workspace;  // many plans need none
  if (plan.workspace_size() > 0) workspace = at::empty(plan.workspace_size(), options.dtype(at::kByte));

  ProductPointers pointers{left.data_ptr(), right.data_ptr(), nullptr, results[0].data_ptr(), nullptr, nullptr};
  if (residual) pointers.residual = residual->data_ptr();
  if (epilogue.gives_preactivation()) pointers.preactivation = results[1].data_ptr();
  if (bias) pointers.vector = bias->data_ptr();
  if (epilogue.sums_left()) pointers.vector = results[1].data_ptr();
  plan.run(cublaslt_handle(left.get_device()), pointers, workspace.defined() ? workspace.data_ptr() : nullptr,
           c10::cuda::getCurrentCUDAStream(left.get_device()));
  return results;
}

void bind_product(pybind11::module_& module) {
  namespace py = pybind11;
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  module.def("cublaslt_version", &cublasLtGetVersion);
  py::class_<BoundProductPlan>(module, "ProductPlan", "A way to compute a product. Threads may share it.")
      .def_property_readonly("workspace_size", [](const BoundProductPlan& self) { return self.plan.workspace_size(); })
      .def("__call__", &BoundProductPlan::operator(), py::arg("left"), py::arg("right"), py::arg("bias") = std::nullopt,
           py::arg("residual") = std::nullopt, no_gil);
  py::class_<BoundProduct>(module, "Product",
                           "epilogue(left · right + residual) for matrices of these shapes and dtypes; those that are "
                           "said to be are transposed in memory. epilogue: a name, see csrc/plans/product.h.")
      .def(py::init(&BoundProduct::make), py::arg("left"), py::arg("right"), py::arg("left_transposed"),
           py::arg("right_transposed"), py::arg("out_in_float32"), py::arg("epilogue"), no_gil)
      .def("__len__", [](const BoundProduct& self) { return self.plans.size(); })
      .def("build", &BoundProduct::build, py::arg("candidate"), no_gil);
}

}  // namespace dcae_fast
