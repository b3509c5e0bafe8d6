// dcae_fast._C.Convolution and ConvolutionPlan: convolutions of torch tensors through cuDNN's graphs.

#include "plans/convolution.h"

#include <ATen/cudnn/Handle.h>
#include <c10/cuda/CUDAGuard.h>

#include "bindings.h"
#include "checks.h"

namespace dcae_fast {

namespace {

using Epilogue = std::vector<std::pair<std::string, MaybeTensor>>;

cudnnDataType_t dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kHalf: return CUDNN_DATA_HALF;
    case at::kBFloat16: return CUDNN_DATA_BFLOAT16;
    case at::kFloat: return CUDNN_DATA_FLOAT;
    default: throw pybind11::type_error("expected float16, bfloat16 or float32, got " + text(x.scalar_type()));
  }
}

void check_operand(const char* name, const at::Tensor& x, at::IntArrayRef sizes, at::Device device) {
  require_value(x.sizes() == sizes, name, " must have shape ", sizes, ", got ", x.sizes());
  require_value(x.device() == device, name, " must be on ", device, ", got ", x.device());
  require_value(x.dim() == 4 ? x.is_contiguous(at::MemoryFormat::ChannelsLast) : x.is_contiguous(), name,
                " must be dense, in channels-last memory format if it has four dimensions");
  require_value(is_aligned(x), name, " must be aligned to 16 bytes");
}

std::array<int64_t, 4> sizes_of(const char* name, const at::Tensor& x) {
  require_value(x.dim() == 4 && x.numel() > 0, name, " must have four dimensions and not be empty, got ", x.sizes());
  return {x.size(0), x.size(1), x.size(2), x.size(3)};
}

// A plan, with the shapes and dtypes that its arguments must have.
struct BoundPlan {
  ConvolutionPlan plan;
  ConvolutionShape shape;
  std::vector<EpilogueStep> epilogue;

  at::Tensor operator()(const at::Tensor& x, const at::Tensor& weight, const std::vector<at::Tensor>& operands,
                        const MaybeTensor& out) const {
    const auto y_sizes = shape.output();
    check_operand("x", x, shape.x, x.device());
    check_operand("weight", weight, shape.weight, x.device());
    const c10::cuda::CUDAGuard guard(x.device());
    const at::Tensor y = out ? *out : at::empty(y_sizes, x.options(), at::MemoryFormat::ChannelsLast);
    check_operand("out", y, y_sizes, x.device());
    require_type(dtype_of(x) == shape.dtype && dtype_of(weight) == shape.dtype && dtype_of(y) == shape.dtype,
                 "x, weight and out must have the dtype that the plan was made for");
    std::vector<void*> pointers{x.data_ptr(), weight.data_ptr(), y.data_ptr()};
    auto operand = operands.begin();
    for (const auto& step : epilogue) {
      if (!has_operand(step.name)) continue;
      require_value(operand != operands.end(), "too few operands for the epilogue");
      const char* name = step.name.c_str();
      const bool whole = has_whole_operand(step.name);
      check_operand(name, *operand, whole ? at::IntArrayRef(y_sizes) : at::IntArrayRef(y_sizes[1]), x.device());
      require_type(dtype_of(*operand) == step.dtype, name, " must have the dtype that the plan was made for");
      pointers.push_back((operand++)->data_ptr());
    }
    at::Tensor workspace;  // many plans need none
    if (plan.workspace_size() > 0) workspace = at::empty(plan.workspace_size(), x.options().dtype(at::kByte));
    plan.run(at::native::getCudnnHandle(), pointers, workspace.defined() ? workspace.data_ptr() : nullptr);
    return y;
  }
};

// A convolution for tensors of certain shapes and dtypes.
struct BoundConvolution {
  ConvolutionShape shape;
  std::vector<EpilogueStep> epilogue;
  at::Device device;
  Convolution convolution;

  static BoundConvolution make(const at::Tensor& x, const at::Tensor& weight, int64_t stride,
                               const std::array<int64_t, 4>& padding, const Epilogue& steps) {
    on_cuda("x", x);
    require_type(x.scalar_type() == weight.scalar_type(), "weight must be ", x.scalar_type(), " as x, got ",
                 weight.scalar_type());
    const ConvolutionShape shape{dtype_of(x), sizes_of("x", x), sizes_of("weight", weight), stride, padding};
    require_value(shape.x[1] == shape.weight[1], "x has ", std::to_string(shape.x[1]), " channels, weight is for ",
                  std::to_string(shape.weight[1]));
    std::vector<EpilogueStep> epilogue;
    for (const auto& [name, operand] : steps) {
      epilogue.push_back({name, operand ? dtype_of(*operand) : CUDNN_DATA_FLOAT});
    }
    const c10::cuda::CUDAGuard guard(x.device());
    return {shape, epilogue, x.device(), {at::native::getCudnnHandle(), shape, epilogue}};
  }

  BoundPlan build(int64_t candidate) const {
    const c10::cuda::CUDAGuard guard(device);
    return {convolution.build(at::native::getCudnnHandle(), candidate), shape, epilogue};
  }
};

}  // namespace

void bind_convolution(pybind11::module_& module) {
  namespace py = pybind11;
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<BoundPlan>(module, "ConvolutionPlan", "A compiled way to run a convolution. Threads may share it.")
      .def_property_readonly("workspace_size", [](const BoundPlan& self) { return self.plan.workspace_size(); })
      .def("__call__", &BoundPlan::operator(), py::arg("x"), py::arg("weight"), py::arg("operands"),
           py::arg("out") = std::nullopt, no_gil);
  py::class_<BoundConvolution>(module, "Convolution",
                               "epilogue(conv(x, weight)) in channels-last for tensors of these shapes and dtypes. "
                               "epilogue: (step, its operand or None) in order; padding: top, left, bottom, right.")
      .def(py::init(&BoundConvolution::make), py::arg("x"), py::arg("weight"), py::arg("stride"), py::arg("padding"),
           py::arg("epilogue"), no_gil)
      .def("__len__", [](const BoundConvolution& self) { return self.convolution.candidates(); })
      .def("build", &BoundConvolution::build, py::arg("candidate"), no_gil);
}

}  // namespace dcae_fast
