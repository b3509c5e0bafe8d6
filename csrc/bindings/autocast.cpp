// Casts of weights that autocast keeps.
//
// This file uses no CUDA, so that it can be compiled and tested without a GPU.

#include <ATen/autocast_mode.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <mutex>
#include <unordered_map>

#include "bindings.h"

namespace dcae_fast {

namespace {

constexpr size_t kMost = 1 << 16;  // weights that are remembered
constexpr int64_t kTrained = -1;   // in place of a version: a training step has used the weight since its cast

// A weight when it was cast, and what it was cast to.
struct State {
  const void *copy, *data;
  int64_t version;

  bool operator==(const State&) const = default;
};

State state_of(const at::Tensor& weight, const at::Tensor& copy) {
  return {copy.unsafeGetTensorImpl(), weight.const_data_ptr(), weight._version()};
}

// Whether autocast keeps the copy of a weight. The dispatch keys do not tell: torch.compile's code switches autocast off
// while it runs. Inference tensors do not count their changes. On other streams than the default one nothing is kept,
// because CUDA graphs are captured and warmed up there, whose memory is used again for other tensors.
bool is_kept(const at::Tensor& weight) {
  if (!weight.requires_grad() || !weight.is_leaf() || weight.is_inference()) return false;
  if (!at::autocast::is_autocast_cache_enabled()) return false;
  const bool is_inside = at::autocast::increment_nesting() > 1;
  at::autocast::decrement_nesting();
  if (!is_inside) return false;
  const at::Device device = weight.device();
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device) == c10::Stream(c10::Stream::DEFAULT, device);
}

std::mutex mutex;
std::unordered_map<const void*, State> states;  // of the weights that were cast

}  // namespace

at::Tensor autocast_cast(const at::Tensor& weight, at::ScalarType dtype, bool trains) {
  if (weight.scalar_type() == dtype) return weight;
  if (trains) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = states.find(weight.unsafeGetTensorImpl());
    if (found != states.end()) found->second.version = kTrained;
    return weight.to(dtype);
  }
  if (!is_kept(weight)) return weight.to(dtype);
  const auto cast = [&] {
    const c10::InferenceMode off(false);  // autocast keeps no copies in it
    return at::autocast::cached_cast(dtype, weight, weight.device().type());
  };
  at::Tensor copy = cast();
  const std::lock_guard<std::mutex> lock(mutex);
  const bool is_full = states.size() >= kMost;
  if (is_full) states.clear();
  State& before = states.try_emplace(weight.unsafeGetTensorImpl(), state_of(weight, copy)).first->second;
  State now = state_of(weight, copy);
  if (is_full || (before.copy == now.copy && before != now)) {  // a weight may have changed, or this one has
    at::autocast::clear_cache();
    copy = cast();
    now = state_of(weight, copy);
  }
  before = now;
  return copy.scalar_type() == dtype ? copy : weight.to(dtype);  // an autocast around this one may have another dtype
}

void bind_autocast(pybind11::module_& module) {
  namespace py = pybind11;
  // Releases the GIL: a thread that clears autocast's cache holds the cache's lock while it waits for the GIL.
  module.def("autocast_cast", &autocast_cast, py::arg("weight"), py::arg("dtype"), py::arg("trains") = false,
             py::call_guard<py::gil_scoped_release>(),
             "weight in `dtype`. Inside autocast a parameter is cast once, and the copy is kept until autocast ends or "
             "the parameter changes, as far as autograd's version counter shows. trains: nothing is kept, and a copy "
             "is not used any more, because fused optimizers of PyTorch 2.11 do not count their changes.");
}

}  // namespace dcae_fast
