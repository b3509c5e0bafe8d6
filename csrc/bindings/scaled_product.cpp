// dcae_fast._C.ScaledProduct and ScaledProductPlan: products in float8 with scales, of torch tensors through cuBLASLt.
// See dcae_fast/ops/linear_rows.py and bounded_mlp.py.

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <vector>

#include "bindings.h"
#include "checks.h"
#include "plans/product.h"

namespace dcae_fast {

namespace {

cudaDataType_t type_of(const char* name, at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat8_e4m3fn: return CUDA_R_8F_E4M3;
    case at::kFloat8_e5m2: return CUDA_R_8F_E5M2;
    case at::kHalf: return CUDA_R_16F;
    case at::kBFloat16: return CUDA_R_16BF;
    case at::kFloat: return CUDA_R_32F;
    default: throw pybind11::type_error(text(name) + " has type " + text(dtype) + ", which cuBLASLt does not take");
  }
}

at::ScalarType bias_type(at::ScalarType out_dtype) {
  return out_dtype == at::kHalf ? at::kHalf : at::kBFloat16;
}

struct ScaledProductPlan {
  ProductPlan plan;
  at::ScalarType dtype, weight_dtype, out_dtype;

  // x: [..., depth], x_scale: [..., 1]; weight: [columns, depth], weight_scale: [columns, 1]; residual: [..., columns].
  // Both scales are [1] unless rows have scales of their own. out_factor: [1], of a result in float8.
  at::Tensor operator()(const at::Tensor& x, const at::Tensor& x_scale, const at::Tensor& weight,
                        const at::Tensor& weight_scale, const MaybeTensor& bias, const MaybeTensor& residual,
                        const MaybeTensor& out_factor) const {
    const ProductShape& shape = plan.shape();
    const at::Device device = x.device();
    require_value(x.dim() > 0 && x.numel() == shape.rows * shape.depth, "x must have ", std::to_string(shape.rows),
                  " rows of ", std::to_string(shape.depth), ", got ", x.sizes());
    const bool by_row = shape.scaling == Scaling::kRows;
    std::vector<int64_t> x_sizes = x.sizes().vec(), out_sizes = x_sizes, scale_sizes{1}, weight_scale_sizes{1};
    x_sizes.back() = shape.depth;
    out_sizes.back() = shape.columns;
    if (by_row) {
      scale_sizes = x_sizes;
      scale_sizes.back() = 1;
      weight_scale_sizes = {shape.columns, 1};
    }
    require_dense("x", x, x_sizes, dtype, device);
    require_dense("x_scale", x_scale, scale_sizes, at::kFloat, device);
    require_dense("weight", weight, {shape.columns, shape.depth}, weight_dtype, device);
    require_dense("weight_scale", weight_scale, weight_scale_sizes, at::kFloat, device);
    require_value(out_factor.has_value() == shape.is_result_scaled(), "out_factor: expected one for float8 only");
    if (out_factor) require_dense("out_factor", *out_factor, 1, at::kFloat, device);
    require_value(bias.has_value() == shape.epilogue.takes_bias(), "bias: expected one if the plan has one");
    if (bias) require_dense("bias", *bias, shape.columns, bias_type(out_dtype), device);
    if (residual) require_dense("residual", *residual, out_sizes, out_dtype, device);

    const c10::cuda::CUDAGuard guard(device);
    const at::Tensor out = at::empty(out_sizes, x.options().dtype(out_dtype));
    const at::Tensor workspace = at::empty(plan.workspace_size(), x.options().dtype(at::kByte));
    plan.run(cublaslt_handle(x.get_device()),
             {x.data_ptr(), weight.data_ptr(), residual ? residual->data_ptr() : nullptr, out.data_ptr(), nullptr,
              bias ? bias->data_ptr() : nullptr, x_scale.data_ptr(), weight_scale.data_ptr(),
              out_factor ? out_factor->data_ptr() : nullptr},
             workspace.data_ptr(), c10::cuda::getCurrentCUDAStream(x.get_device()));
    return out;
  }
};

struct ScaledProduct {
  std::vector<ProductPlan> plans;
  at::ScalarType dtype, weight_dtype, out_dtype;

  static ScaledProduct make(const at::Tensor& x, const at::Tensor& weight, at::ScalarType out_dtype,
                            const std::string& epilogue, bool is_fast, bool by_row) {
    on_cuda("x", x);
    require_value(x.dim() > 0 && weight.dim() == 2 && x.numel() > 0 && weight.size(0) > 0 &&
                      x.size(-1) == weight.size(1),
                  "x and weight must be [..., K] and [M, K] and not be empty, got ", x.sizes(), ", ", weight.sizes());
    const ProductShape shape{type_of("x", x.scalar_type()),
                             type_of("the result", out_dtype),
                             x.numel() / x.size(-1),
                             weight.size(0),
                             weight.size(1),
                             false,
                             true,
                             Epilogue(epilogue),
                             type_of("weight", weight.scalar_type()),
                             type_of("bias", bias_type(out_dtype)),
                             by_row ? Scaling::kRows : Scaling::kWhole,
                             is_fast};
    const c10::cuda::CUDAGuard guard(x.device());
    return {find_product_plans(cublaslt_handle(x.get_device()), shape), x.scalar_type(), weight.scalar_type(),
            out_dtype};
  }

  ScaledProductPlan build(int64_t candidate) const { return {plans.at(candidate), dtype, weight_dtype, out_dtype}; }
};

}  // namespace

void bind_scaled_product(pybind11::module_& module) {
  namespace py = pybind11;
  if (!has_scaled_products()) return;
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<ScaledProductPlan>(module, "ScaledProductPlan", "A way to compute a product. Threads may share it.")
      .def_property_readonly("workspace_size", [](const ScaledProductPlan& self) { return self.plan.workspace_size(); })
      .def("__call__", &ScaledProductPlan::operator(), py::arg("x"), py::arg("x_scale"), py::arg("weight"),
           py::arg("weight_scale"), py::arg("bias"), py::arg("residual"), py::arg("out_factor") = std::nullopt, no_gil);
  py::class_<ScaledProduct>(module, "ScaledProduct",
                            "epilogue((x · weightᵀ) · x_scale · weight_scaleᵀ + residual) for tensors of these shapes "
                            "and dtypes; x and weight in float8. by_row: each row has a scale; else the whole tensor. "
                            "A result in float8 is multiplied by out_factor.")
      .def(py::init(&ScaledProduct::make), py::arg("x"), py::arg("weight"), py::arg("dtype"), py::arg("epilogue"),
           py::arg("is_fast"), py::arg("by_row"), no_gil)
      .def("__len__", [](const ScaledProduct& self) { return self.plans.size(); })
      .def("build", &ScaledProduct::build, py::arg("candidate"), no_gil);
}

}  // namespace dcae_fast
