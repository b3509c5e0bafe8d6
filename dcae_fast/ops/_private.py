"""All interfaces of PyTorch that are not public and that dcae_fast uses.

TRIED lists the versions they were tried with: 2.11 on a GPU, 2.13 on a CPU. For a newer PyTorch, run
tests/ops/test_private.py, then all tests, also on a GPU; then extend TRIED and raise the bound in pyproject.toml.

A function of PyTorch gets a name here rather than a wrapper, since most are called in every operator call. Only
nn.Module's dictionaries _parameters, _buffers and _modules are read elsewhere, under their own names.
"""

import contextlib
import functools
import operator
import sys
from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext as DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_unflatten as tree_unflatten

TRIED = "2.11", "2.13"
_VERSION = tuple(map(int, torch.__version__.split(".")[:2]))


# Compilation


def constant_in_compile(function: Callable) -> Callable:
    """Make torch.compile call a function while it traces and take the result for a constant.

    The same as torch.compiler.assume_constant_result, without the second that it takes to import Dynamo.
    """
    function._dynamo_marked_constant = True
    return function


OpOverload = torch._ops.OpOverload  # the type of torch.ops.dcae_fast.conv2d.default


def takes_list(overload: OpOverload) -> bool:
    """Whether an operator has an argument that is a list of tensors."""
    return any("List[Tensor]" in str(argument.type) for argument in overload._schema.arguments)


def intercept_calls(overload: OpOverload, function: Callable) -> Callable:
    """Make calls of an overload from Python, also those in Inductor's code, call `function`. Returns what the overload
    called so far: PyTorch's dispatcher. To be called before anything looks up the overload in a dictionary.
    """
    dispatch, overload._op = overload._op, function
    return dispatch


def is_profiling() -> bool:
    """Whether torch.profiler or torch.autograd.profiler records operators."""
    return torch.autograd.profiler._is_profiler_enabled


def make_known_to_inductor(overload: OpOverload) -> None:
    """Register an operator with Inductor, if Inductor is loaded, as Inductor itself does when it first meets one.

    Before 2.13 Inductor also logs a description of all that the arguments were computed from. The description doubles
    in length with every residual connection. No effect from 2.13 on.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    if _VERSION < (2, 13) and lowering is not None and overload not in lowering.lowerings:
        tag = torch._library.utils.get_layout_constraint_tag(overload, with_default=True)
        lowering.make_fallback(overload, lowering.tag_to_layout_constraint(tag))


# The dispatcher, modes and transforms

_KEY, _KEYS = torch._C.DispatchKey, torch._C.DispatchKeySet
AUTOCAST_KEYS = _KEYS(_KEY.AutocastCPU) | _KEYS(_KEY.AutocastCUDA)
VIEW_KEYS = _KEYS(_KEY.ADInplaceOrView)  # without them, results are no views of inputs and can be changed in place
_VMAP_OF_GRADIENTS = torch._C._parse_dispatch_key("VmapMode")

without_dispatch_keys = torch._C._ExcludeDispatchKeyGuard  # a context manager; its argument is a set of keys
is_tracing = torch._C._is_tracing  # whether torch.jit.trace is at work
count_dispatch_modes = torch._C._len_torch_dispatch_stack
function_modes = _get_current_function_mode_stack  # a list of the active TorchFunctionModes
has_zero_mark = torch.Tensor._is_zerotensor  # of a tensor that is zero whatever its memory holds


def in_dual_level() -> bool:
    """Whether forward-mode AD is active."""
    return forward_ad._current_level >= 0


@constant_in_compile  # Dynamo compiles again for another stack of transforms or level of forward-mode AD
def in_transform() -> bool:
    """Whether torch.func, forward-mode AD or a vmap of gradients is active. Custom operators take no part in these."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or in_dual_level()
        or torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_OF_GRADIENTS)
    )


# Modules

convolve = nn.Conv2d._conv_forward  # (module, x, weight, bias)
WRAPPERS = ("torch.distributed.algorithms._checkpoint.", "torch._dynamo.")  # of modules; the packages of their classes
has_global_hooks = _has_any_global_hook
hooks_of = operator.attrgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_observed(module: nn.Module) -> bool:
    """Whether a module has hooks, or a forward of its own on the instance."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def unobserved(*modules: nn.Module | None) -> bool:
    """Whether computing these modules without calling them goes unnoticed: no hooks, no forward on the instance, not
    compiled in place by module.compile().
    """
    if has_global_hooks():
        return False
    for module in modules:  # a loop without calls, since this is asked several times in every call
        if module is not None and (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in (state := module.__dict__)
            or state.get("_compiled_call_impl") is not None
        ):
            return False
    return True


# Numerics

uses_deterministic_algorithms = torch._C._get_deterministic_algorithms
is_cudnn_deterministic = torch._C._get_cudnn_deterministic
attention_order = torch._C._get_sdp_priority_order  # the backends of scaled_dot_product_attention, as a list

# Functions without arguments that return the settings which change the results of PyTorch's functions.
_PRECISIONS = ("generic", "all"), ("cuda", "all"), ("cuda", "conv"), ("cuda", "matmul")
SETTINGS = [functools.partial(torch._C._get_fp32_precision_getter, *name) for name in _PRECISIONS] + [
    getattr(torch._C, f"_{name}")
    for name in (
        "get_deterministic_algorithms",
        "get_deterministic_algorithms_warn_only",
        "get_cudnn_enabled",
        "get_cudnn_benchmark",
        "get_cudnn_deterministic",
        "get_cudnn_depthwise_kernel",
        "get_cublas_allow_bf16_reduced_precision_reduction",
        "get_cublas_allow_fp16_reduced_precision_reduction",
        "get_cublas_allow_fp16_accumulation",
        "get_blas_preferred_backend",
        "get_sm_carveout_experimental",
        "cuda_tunableop_is_enabled",
        "get_flash_sdp_enabled",
        "get_fa3_sdp_enabled",
        "get_mem_efficient_sdp_enabled",
        "get_math_sdp_enabled",
        "get_math_sdp_allow_fp16_bf16_reduction",
        "get_cudnn_sdp_enabled",
        "get_overrideable_sdp_enabled",
    )
    if hasattr(torch._C, f"_{name}")  # not every version has all
]


# Operators

addmm_activation = torch._addmm_activation  # gelu(bias + a @ b) with use_gelu=True, else relu
scaled_product = torch._scaled_mm  # a · b in float8, scaled; (a, b, scale_a, scale_b, bias=, out_dtype=, ...)
version_of = operator.attrgetter("_version")  # of a tensor: how many in-place changes autograd has counted
copy_each = torch._foreach_copy_  # (targets, sources): lists of tensors
CAST_OPERATOR = torch.ops.aten._to_copy.default  # the operator that tensor.to(dtype) becomes


# Memory and time of a GPU; the functions of torch._C exist in CUDA builds only

sleep_on_gpu = torch.cuda._sleep  # (clock cycles)


def clear_cublas_workspaces() -> None:
    """Make cuBLAS allocate its workspaces again when it next needs them."""
    torch._C._cuda_clearCublasWorkspaces()


def abandon_capture(device_index: int, pool: tuple[int, int]) -> None:
    """Release the memory pool of a failed capture, whose end PyTorch may have missed."""
    with contextlib.suppress(RuntimeError):  # PyTorch has noticed the end
        torch._C._cuda_endAllocateToPool(device_index, pool)
        torch._C._cuda_releasePool(device_index, pool)


def storage_id(tensor: torch.Tensor) -> int:
    """A number that tensors on the same storage share, fake tensors too."""
    return tensor.untyped_storage()._cdata
