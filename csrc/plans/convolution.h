// Convolutions with a fused epilogue through cuDNN's graph API. Python chooses the fastest of a convolution's
// candidates, and remembers the choice (dcae_fast/ops/_plans.py).
#pragma once

#include <cudnn.h>

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace dcae_fast {

// A backend descriptor of cuDNN: reference-counted, untyped, finalised once.
class Descriptor {
 public:
  explicit Descriptor(cudnnBackendDescriptorType_t type);

  template <typename T>
  Descriptor& set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, const std::vector<T>& values) {
    return set(name, type, static_cast<int64_t>(values.size()), values.data());
  }
  template <typename T>
  Descriptor& set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, const T& value) {
    return set(name, type, 1, &value);
  }
  Descriptor& set(cudnnBackendAttributeName_t name, const Descriptor& value);
  Descriptor& set(cudnnBackendAttributeName_t name, const std::vector<Descriptor>& values);
  const Descriptor& finalize() const;

  // Copies up to `capacity` values to `values`. Returns the number of values that exist.
  int64_t get(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t capacity, void* values) const;

  cudnnBackendDescriptor_t raw() const { return descriptor_.get(); }

 private:
  Descriptor& set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t count,
                  const void* values);

  std::shared_ptr<void> descriptor_;
};

// One way to run a convolution: a compiled kernel of cuDNN. Several threads may call `run` at once.
class ConvolutionPlan {
 public:
  ConvolutionPlan(cudnnHandle_t handle, const Descriptor& config);

  int64_t workspace_size() const { return workspace_size_; }

  // Device pointers: input, weight, output, then the operands of the epilogue in order.
  void run(cudnnHandle_t handle, const std::vector<void*>& pointers, void* workspace) const;

 private:
  Descriptor plan_;
  int64_t workspace_size_;
};

// y = epilogue(conv(x, weight)): x [n, c, h, w], weight [k, c, r, s], y [n, k, p, q], all channels-last and of one
// dtype. Computed and accumulated in fp32.
struct ConvolutionShape {
  cudnnDataType_t dtype;
  std::array<int64_t, 4> x, weight;
  int64_t stride;
  std::array<int64_t, 4> padding;  // top, left, bottom, right

  std::array<int64_t, 4> output() const;
};

// One step after the convolution, for the value v so far. dtype: of the operand.
//   "bias"           v + operand, an operand [k]
//   "residual"       v + operand, here and below an operand of y's shape
//   "relu", "silu"   act(v); no operand
//   "relu_backward", "silu_backward"   v * act'(operand)
//   "operand_bias"   leaves v, and adds its operand [k] to the operand of the next step
struct EpilogueStep {
  std::string name;
  cudnnDataType_t dtype;
};

// Whether a step takes an operand, and whether this operand has y's shape.
bool has_operand(const std::string& step);
bool has_whole_operand(const std::string& step);

class Convolution {
 public:
  // Throws std::runtime_error if cuDNN has no such graph.
  Convolution(cudnnHandle_t handle, const ConvolutionShape& shape, const std::vector<EpilogueStep>& epilogue);

  // The number of candidates. All are deterministic and sum in fp32; cuDNN's guess of the fastest comes first.
  int64_t candidates() const { return static_cast<int64_t>(configs_.size()); }

  // Compiles a candidate, which can take half a second. Throws std::runtime_error if cuDNN cannot run it.
  ConvolutionPlan build(cudnnHandle_t handle, int64_t candidate) const { return {handle, configs_.at(candidate)}; }

 private:
  std::vector<Descriptor> configs_;
};

}  // namespace dcae_fast
