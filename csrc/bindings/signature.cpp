// dcae_fast._C.signature: what the choice of a kernel depends on, as the key of a dictionary.
//
// This file uses no CUDA, so that it can be compiled and tested without a GPU.

#include <ATen/Context.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <cstring>
#include <optional>

#include "bindings.h"

namespace dcae_fast {

namespace {

// Bytes that differ for two calls if a kernel, its grid or its constants may differ.
class Signature {
 public:
  // Whether something other than a kernel must see the calls of operators: a mode, a transform or a trace. All of them
  // but torch.jit.trace add a dispatch key to the calls of this thread.
  static bool is_observed() {
    const c10::DispatchKeySet added = c10::impl::tls_local_dispatch_key_set().included_ - c10::default_included_set;
    return !added.empty() || torch::jit::tracer::isTracing();
  }

  // Adds an argument. False if kernels cannot read it as it is.
  bool add(PyObject* arg) {
    if (arg == Py_None) return put('0');
    if (THPVariable_CheckExact(arg)) return add_tensor(THPVariable_Unpack(arg));
    if (PyBool_Check(arg)) return put('b') && put(arg == Py_True);
    if (PyLong_CheckExact(arg)) {
      int overflow;
      const long long value = PyLong_AsLongLongAndOverflow(arg, &overflow);
      return overflow == 0 && put('i') && put(value);
    }
    if (PyFloat_CheckExact(arg)) return put('f') && put(PyFloat_AS_DOUBLE(arg));
    if (PyUnicode_CheckExact(arg)) return add_text(arg);
    if (THPDtype_Check(arg)) return put('d') && put(reinterpret_cast<THPDtype*>(arg)->scalar_type);
    if (PyList_CheckExact(arg) || PyTuple_CheckExact(arg)) return add_each(arg);
    return false;
  }

  // Adds the items of a list or tuple.
  bool add_each(PyObject* args) {
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(args);
    if (!put('l') || !put(count)) return false;
    for (Py_ssize_t i = 0; i < count; ++i) {
      if (!add(PySequence_Fast_GET_ITEM(args, i))) return false;
    }
    return true;
  }

  // Adds settings that choose among kernels. False unless all tensors are on the current device.
  bool add_settings() {
    if (!device_ || c10::impl::VirtualGuardImpl(device_->type()).getDevice() != *device_) return false;
    const at::Context& context = at::globalContext();
    put(device_->type());
    put(device_->index());
    return put(context.deterministicAlgorithms()) && put(context.deterministicCuDNN()) &&
           put(context.userEnabledCuDNN());
  }

  PyObject* bytes() const { return PyBytes_FromStringAndSize(bytes_, static_cast<Py_ssize_t>(size_)); }

 private:
  static constexpr size_t kMost = 1024;

  // False if there is no more room.
  template <typename Value>
  bool put(const Value& value) {
    return put(&value, sizeof value);
  }

  bool put(const void* values, size_t size) {
    if (size_ + size > kMost) return false;
    std::memcpy(bytes_ + size_, values, size);
    size_ += size;
    return true;
  }

  bool add_text(PyObject* text) {
    Py_ssize_t size;
    const char* characters = PyUnicode_AsUTF8AndSize(text, &size);
    return characters && put('s') && put(size) && put(characters, static_cast<size_t>(size));
  }

  // A tensor that is dense, channels-last if it has four dimensions, and needs no gradient.
  bool add_tensor(const at::Tensor& x) {
    static constexpr c10::DispatchKeySet kUnreadable{
        c10::DispatchKey::Negative,         c10::DispatchKey::Conjugate,            c10::DispatchKey::ZeroTensor,
        c10::DispatchKey::Python,           c10::DispatchKey::Functionalize,        c10::DispatchKey::Batched,
        c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::NestedTensor};
    if (!x.defined() || x.layout() != c10::kStrided || !(x.is_cuda() || x.is_cpu())) return false;
    if (x.key_set().has_any(kUnreadable)) return false;
    if (requires_grad_ && x.requires_grad()) return false;
    if (!x.is_contiguous(x.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous)) return false;
    if (device_ && *device_ != x.device()) return false;
    device_ = x.device();
    const bool is_aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
    return put('t') && put(x.scalar_type()) && put(is_aligned) && put(x.dim()) &&
           put(x.sizes().data(), x.dim() * sizeof(int64_t));
  }

  const bool requires_grad_ = c10::GradMode::is_enabled();
  std::optional<at::Device> device_;
  char bytes_[kMost];
  size_t size_ = 0;
};

PyObject* signature(PyObject* /*module*/, PyObject* args) {
  HANDLE_TH_ERRORS
  Signature found;
  if (Signature::is_observed() || !PyTuple_CheckExact(args) || !found.add_each(args) || !found.add_settings()) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  return found.bytes();
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"signature", signature, METH_O,
     "Bytes that differ for two tuples of arguments if an operator may choose different kernels for them. None if a "
     "kernel cannot take the arguments as they are: unless all tensors are ordinary, dense, on the current device and "
     "without gradients, and no mode, transform or trace is active."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_signature(pybind11::module_& module) {
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw pybind11::error_already_set();
}

}  // namespace dcae_fast
