// See convolution.h. cuDNN documents the attributes with its backend descriptor types.

#include "convolution.h"

#include <optional>
#include <stdexcept>

namespace dcae_fast {

namespace {

void check(cudnnStatus_t status) {
  if (status == CUDNN_STATUS_SUCCESS) return;
  char details[512] = "";
  cudnnGetLastErrorString(details, sizeof(details));
  throw std::runtime_error(std::string("cuDNN: ") + cudnnGetErrorString(status) + ": " + details);
}

std::vector<int64_t> channels_last_strides(const std::array<int64_t, 4>& sizes) {
  return {sizes[1] * sizes[2] * sizes[3], 1, sizes[1] * sizes[3], sizes[1]};
}

Descriptor tensor(int64_t id, cudnnDataType_t dtype, const std::array<int64_t, 4>& sizes, bool is_virtual = false) {
  Descriptor result(CUDNN_BACKEND_TENSOR_DESCRIPTOR);
  result.set(CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, id)
      .set(CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, dtype)
      .set(CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, std::vector<int64_t>(sizes.begin(), sizes.end()))
      .set(CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, channels_last_strides(sizes))
      .set(CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, int64_t{16})
      .set(CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, is_virtual);
  return result.finalize();
}

Descriptor convolution(const ConvolutionShape& shape, const Descriptor& x, const Descriptor& weight,
                       const Descriptor& y) {
  Descriptor kind(CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR);
  const auto& [top, left, bottom, right] = shape.padding;
  kind.set(CUDNN_ATTR_CONVOLUTION_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, CUDNN_DATA_FLOAT)
      .set(CUDNN_ATTR_CONVOLUTION_CONV_MODE, CUDNN_TYPE_CONVOLUTION_MODE, CUDNN_CROSS_CORRELATION)
      .set(CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS, CUDNN_TYPE_INT64, int64_t{2})
      .set(CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES, CUDNN_TYPE_INT64, std::vector<int64_t>(2, shape.stride))
      .set(CUDNN_ATTR_CONVOLUTION_DILATIONS, CUDNN_TYPE_INT64, std::vector<int64_t>(2, 1))
      .set(CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS, CUDNN_TYPE_INT64, std::vector<int64_t>{top, left})
      .set(CUDNN_ATTR_CONVOLUTION_POST_PADDINGS, CUDNN_TYPE_INT64, std::vector<int64_t>{bottom, right})
      .finalize();
  Descriptor operation(CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR);
  operation.set(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC, kind)
      .set(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X, x)
      .set(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W, weight)
      .set(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y, y)
      .set(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_ALPHA, CUDNN_TYPE_FLOAT, 1.0f)
      .set(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_BETA, CUDNN_TYPE_FLOAT, 0.0f);
  return operation.finalize();
}

cudnnPointwiseMode_t pointwise_mode(const std::string& step) {
  if (step == "bias" || step == "residual" || step == "operand_bias") return CUDNN_POINTWISE_ADD;
  if (step == "relu") return CUDNN_POINTWISE_RELU_FWD;
  if (step == "silu") return CUDNN_POINTWISE_SWISH_FWD;
  if (step == "relu_backward") return CUDNN_POINTWISE_RELU_BWD;
  if (step == "silu_backward") return CUDNN_POINTWISE_SWISH_BWD;
  throw std::invalid_argument("unknown step of an epilogue: " + step);
}

bool is_gradient(const std::string& step) { return step == "relu_backward" || step == "silu_backward"; }

Descriptor pointwise(const std::string& step, const Descriptor& x, const Descriptor* operand, const Descriptor& y) {
  Descriptor kind(CUDNN_BACKEND_POINTWISE_DESCRIPTOR);
  kind.set(CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, pointwise_mode(step))
      .set(CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_TYPE_DATA_TYPE, CUDNN_DATA_FLOAT)
      .finalize();
  Descriptor operation(CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);
  operation.set(CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, kind);
  if (is_gradient(step)) {
    operation.set(CUDNN_ATTR_OPERATION_POINTWISE_XDESC, *operand)
        .set(CUDNN_ATTR_OPERATION_POINTWISE_DYDESC, x)
        .set(CUDNN_ATTR_OPERATION_POINTWISE_DXDESC, y);
  } else {
    operation.set(CUDNN_ATTR_OPERATION_POINTWISE_XDESC, x).set(CUDNN_ATTR_OPERATION_POINTWISE_YDESC, y);
    if (operand != nullptr) operation.set(CUDNN_ATTR_OPERATION_POINTWISE_BDESC, *operand);
  }
  return operation.finalize();
}

// Whether an engine is deterministic and does not trade precision for speed.
bool is_exact(const Descriptor& config) {
  Descriptor engine(CUDNN_BACKEND_ENGINE_DESCRIPTOR);
  cudnnBackendDescriptor_t raw = engine.raw();
  config.get(CUDNN_ATTR_ENGINECFG_ENGINE, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &raw);
  std::vector<cudnnBackendNumericalNote_t> notes(CUDNN_NUMERICAL_NOTE_TYPE_COUNT);
  notes.resize(engine.get(CUDNN_ATTR_ENGINE_NUMERICAL_NOTE, CUDNN_TYPE_NUMERICAL_NOTE,
                          static_cast<int64_t>(notes.size()), notes.data()));
  for (const auto note : notes) {
    if (note != CUDNN_NUMERICAL_NOTE_TENSOR_CORE && note != CUDNN_NUMERICAL_NOTE_STRICT_NAN_PROP) return false;
  }
  return true;
}

// cuDNN's suggestions for an operation graph, best first.
std::vector<Descriptor> engine_configs(const Descriptor& graph) {
  Descriptor heuristics(CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR);
  heuristics.set(CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, graph)
      .set(CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, CUDNN_HEUR_MODE_A)
      .finalize();
  const auto results = [&](int64_t capacity, cudnnBackendDescriptor_t* raw) {
    return heuristics.get(CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR, capacity, raw);
  };
  std::vector<Descriptor> configs;
  std::vector<cudnnBackendDescriptor_t> raw;
  for (int64_t count = results(0, nullptr); count > 0; --count) {
    raw.push_back(configs.emplace_back(CUDNN_BACKEND_ENGINECFG_DESCRIPTOR).raw());
  }
  const int64_t found = raw.empty() ? 0 : results(static_cast<int64_t>(raw.size()), raw.data());
  configs.erase(configs.begin() + found, configs.end());
  return configs;
}

}  // namespace

Descriptor::Descriptor(cudnnBackendDescriptorType_t type) {
  cudnnBackendDescriptor_t raw;
  check(cudnnBackendCreateDescriptor(type, &raw));
  descriptor_ = std::shared_ptr<void>(raw, cudnnBackendDestroyDescriptor);
}

Descriptor& Descriptor::set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t count,
                            const void* values) {
  check(cudnnBackendSetAttribute(raw(), name, type, count, values));
  return *this;
}

Descriptor& Descriptor::set(cudnnBackendAttributeName_t name, const Descriptor& value) {
  const cudnnBackendDescriptor_t raw_value = value.raw();
  return set(name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &raw_value);
}

Descriptor& Descriptor::set(cudnnBackendAttributeName_t name, const std::vector<Descriptor>& values) {
  std::vector<cudnnBackendDescriptor_t> raw_values;
  for (const auto& value : values) raw_values.push_back(value.raw());
  return set(name, CUDNN_TYPE_BACKEND_DESCRIPTOR, raw_values);
}

const Descriptor& Descriptor::finalize() const {
  check(cudnnBackendFinalize(raw()));
  return *this;
}

int64_t Descriptor::get(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t capacity,
                        void* values) const {
  int64_t count = 0;
  check(cudnnBackendGetAttribute(raw(), name, type, capacity, &count, values));
  return count;
}

ConvolutionPlan::ConvolutionPlan(cudnnHandle_t handle, const Descriptor& config)
    : plan_(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR) {
  plan_.set(CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, handle)
      .set(CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, config)
      .finalize();
  plan_.get(CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1, &workspace_size_);
}

void ConvolutionPlan::run(cudnnHandle_t handle, const std::vector<void*>& pointers, void* workspace) const {
  std::vector<int64_t> ids(pointers.size());
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int64_t>(i);
  Descriptor arguments(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR);
  arguments.set(CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, ids)
      .set(CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, pointers)
      .set(CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, workspace)
      .finalize();
  check(cudnnBackendExecute(handle, plan_.raw(), arguments.raw()));
}

bool has_operand(const std::string& step) { return step != "relu" && step != "silu"; }

bool has_whole_operand(const std::string& step) { return step == "residual" || is_gradient(step); }

std::array<int64_t, 4> ConvolutionShape::output() const {
  const auto side = [&](int axis) { return (x[axis] + padding[axis - 2] + padding[axis] - weight[axis]) / stride + 1; };
  return {x[0], weight[0], side(2), side(3)};
}

Convolution::Convolution(cudnnHandle_t handle, const ConvolutionShape& shape,
                         const std::vector<EpilogueStep>& epilogue) {
  const auto y_sizes = shape.output();
  const std::array<int64_t, 4> vector_sizes{1, y_sizes[1], 1, 1};
  const auto y = tensor(2, shape.dtype, y_sizes);
  int64_t next_operand = 3, next_virtual = 3 + static_cast<int64_t>(epilogue.size());
  const auto result = [&](bool is_last) {
    return is_last ? y : tensor(next_virtual++, CUDNN_DATA_FLOAT, y_sizes, true);
  };

  std::vector<Descriptor> operations;
  std::optional<Descriptor> operand_bias;
  Descriptor value = result(epilogue.empty());
  operations.push_back(
      convolution(shape, tensor(0, shape.dtype, shape.x), tensor(1, shape.dtype, shape.weight), value));
  for (size_t i = 0; i < epilogue.size(); ++i) {
    const auto& [name, dtype] = epilogue[i];
    std::optional<Descriptor> operand;
    if (has_operand(name)) operand = tensor(next_operand++, dtype, has_whole_operand(name) ? y_sizes : vector_sizes);
    if (name == "operand_bias") {
      operand_bias = operand;
      continue;
    }
    if (operand_bias) {
      const Descriptor sum = result(false);
      operations.push_back(pointwise("operand_bias", operand.value(), &*operand_bias, sum));
      operand = sum;
      operand_bias.reset();
    }
    const Descriptor next = result(i + 1 == epilogue.size());
    operations.push_back(pointwise(name, value, operand ? &*operand : nullptr, next));
    value = next;
  }

  Descriptor graph(CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
  graph.set(CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, handle)
      .set(CUDNN_ATTR_OPERATIONGRAPH_OPS, operations)
      .finalize();
  for (const auto& config : engine_configs(graph)) {
    if (is_exact(config)) configs_.push_back(config);
  }
}

}  // namespace dcae_fast
