"""Registration of operators with torch.library.

An operator is a reference in plain PyTorch and a launcher with the same signature. The reference runs on every device
and is the fake implementation, unless the operator has another. The launcher runs for CUDA tensors that it accepts, and
for CPU tensors under TRITON_INTERPRET=1. Results are always channels-last.
"""

import functools
import importlib
import importlib.util
import operator
import os
import warnings
from collections.abc import Callable, Iterable

import torch

from ._private import (
    AUTOCAST_KEYS,
    VIEW_KEYS,
    FakeTensor,
    OpOverload,
    constant_in_compile,
    count_dispatch_modes,
    has_zero_mark,
    in_dual_level,
    in_transform,
    intercept_calls,
    is_profiling,
    is_tracing,
    make_known_to_inductor,
    takes_list,
    tree_flatten,
    tree_leaves,
    tree_unflatten,
    without_dispatch_keys,
)

NAMESPACE = "dcae_fast"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
HALVES = (torch.bfloat16, torch.float16)
KERNEL_DTYPES = (torch.float32, *HALVES)
MOST_SIGNATURES = 512  # of an operator that are kept
LEAST_CAPABILITY = (7, 5)  # the oldest GPUs that kernels are compiled for: Turing
HAS_TRITON = importlib.util.find_spec("triton") is not None
EXTENSION_IS_BUILT = importlib.util.find_spec(f"{NAMESPACE}._C") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
ORDINARY = frozenset({torch.Tensor, torch.nn.Parameter})  # types of tensors, without subclasses


def has_kernels(x: torch.Tensor) -> bool:
    """Whether operators run as kernels, rather than as plain PyTorch, for tensors of the device and dtype of x."""
    if INTERPRETED:
        return x.dtype in KERNEL_DTYPES and not x.is_meta
    return x.dtype in KERNEL_DTYPES and HAS_TRITON and x.is_cuda and is_supported(x.device)


def is_ordinary(tensor: torch.Tensor | None) -> bool:
    """Whether a tensor is of no subclass, such as a distributed or quantised tensor.

    The non-strict mode of torch.export calls modules with fake tensors in place of ordinary ones.
    """
    return type(tensor) in ORDINARY or (type(tensor) is FakeTensor and torch.compiler.is_compiling())


@functools.cache
def launcher(operator: str, function: str) -> Callable:
    """`function` of dcae_fast.kernels.<operator>, imported at the first use."""
    return getattr(importlib.import_module(f"{NAMESPACE}.kernels.{operator}"), function)


@functools.cache
def cuda_extension():
    """The module dcae_fast._C; None if it was not built. If it does not load, a warning says so once."""
    if not EXTENSION_IS_BUILT:
        return None
    try:
        return importlib.import_module(f"{NAMESPACE}._C")
    except ImportError as error:
        warnings.warn(f"dcae_fast._C is built but does not load: {error}", stacklevel=2)
        return None


def __getattr__(name: str) -> bool:
    """HAS_EXTENSION: whether dcae_fast._C is built and loads. It is an attribute because torch.compile reads attributes
    of a module without tracing, but would trace a function.
    """
    if name != "HAS_EXTENSION":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = has_extension = cuda_extension() is not None
    return has_extension


def without_autocast(function):
    """Switches autocast off for a function: operands already have the dtypes to compute in."""

    @functools.wraps(function)
    def run(*args):
        with without_dispatch_keys(AUTOCAST_KEYS):
            return function(*args)

    return run


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU; (0, 0) for other devices."""
    if device not in _CAPABILITIES:
        _CAPABILITIES[device] = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return _CAPABILITIES[device]


_CAPABILITIES: dict[torch.device, tuple[int, int]] = {}  # PyTorch's own function takes longer than some kernels


@constant_in_compile
def is_supported(device: torch.device) -> bool:
    """Whether the device is a GPU for which kernels are compiled."""
    return (_CAPABILITIES.get(device) or capability(device)) >= LEAST_CAPABILITY


@constant_in_compile
def is_hopper(device: torch.device) -> bool:
    """Whether the device is a GPU of compute capability 9."""
    return capability(device)[0] == 9


def are_aligned(tensors: Iterable[torch.Tensor], *dtypes: torch.dtype) -> bool:
    """Whether all tensors have one of these dtypes and start at a multiple of 16 bytes."""
    return all(tensor.dtype in dtypes and tensor.data_ptr() % 16 == 0 for tensor in tensors)


def halves_on_hopper(*tensors: torch.Tensor) -> bool:
    """Whether the CUDA extension takes the tensors: one dtype of half precision, aligned to 16 bytes, on Hopper."""
    return tensors[0].dtype in HALVES and are_aligned(tensors, tensors[0].dtype) and is_hopper(tensors[0].device)


def as_x_or_float32(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether the CUDA extension takes these tensors beside x: in x's dtype or float32 (autocast), and aligned."""
    return are_aligned(others, x.dtype, torch.float32)


def signature(args: tuple) -> bytes | None:
    """A key that determines which kernel an operator runs for these arguments, and how: see bindings/signature.cpp.

    None if a kernel cannot take the arguments as they are, and always without the CUDA extension.
    """
    extension = cuda_extension()
    return None if extension is None else extension.signature(args)


class Operator:
    """A registered operator.

    A call on plain CUDA tensors bypasses torch's dispatcher, which takes longer than most kernels. It runs the kernel
    or, with gradients, `function`: the operator's autograd.Function, if there is one. In a transform (torch.func,
    forward-mode AD, vmap of gradients) the reference runs, because PyTorch can transform it.

    dense_kernel: the kernel for arguments that are dense, as `as_channels_last` makes them, and on the current device.
    Operators that consist of others call it.
    """

    def __init__(self, overload: OpOverload, reference: Callable, kernels: "Kernels"):
        self.overload, self.reference, self.kernel, self.dense_kernel = overload, reference, kernels, kernels.dense
        self.function: type[torch.autograd.Function] | None = None

    def __call__(self, *args):
        if not torch.compiler.is_compiling():
            run = self.kernel.known(args)
            if run is not None:
                return run(*args)
        if (
            not HAS_TRITON
            or torch.compiler.is_compiling()
            or count_dispatch_modes()
            or in_transform()
            or is_tracing()
            or not _are_plain(tensors := _tensors(args))
        ):
            return self._dispatch(args)
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
            return self.kernel(*args)
        return self.overload(*args) if self.function is None else self.function.apply(*args)

    def _dispatch(self, args):
        if torch.compiler.is_compiling() or is_tracing():  # a trace replaces integers by tensors
            return self.overload(*args)
        if in_transform():
            return self.reference(*args)
        devices = {str(tensor.device) for tensor in _tensors(args)}
        if len(devices) > 1:
            raise RuntimeError(f"{self.overload.name()} got tensors on {sorted(devices)}; expected one device")
        return self.overload(*args)


class Kernels:
    """How an operator computes on a GPU; for the arguments see `define`.

    Which kernel computes depends on the signature of the arguments only. So the first call with a signature decides,
    and `_ready` keeps a function for all later ones: a kernel of the extension, the result of `prepare` or
    `run_and_prepare`, the launcher, or the reference.
    """

    def __init__(
        self,
        name: str,
        reference: Callable,
        accepts: Callable[..., bool],
        launch: Callable | str,
        cuda_accepts: Callable[..., bool] | None,
        prepare: Callable[..., Callable | None] | None,
    ):
        self._name, self._reference, self._accepts, self._launch = name, reference, accepts, launch
        self._cuda_accepts, self._prepare = cuda_accepts, prepare
        self._ready: dict[bytes, Callable] = {}

    def __call__(self, *args):
        key = signature(args)
        if key is not None:
            run = self._ready.get(key)
            return self._first(key, args) if run is None else run(*args)
        first = args[0]
        device = (first if isinstance(first, torch.Tensor) else _tensors(args)[0]).device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return self.dense(*_dense(args))
        with torch.cuda.device(device):
            return self.dense(*_dense(args))

    def known(self, args):
        """The function for these arguments, if a call with their signature was made before."""
        return None if in_dual_level() else self._ready.get(signature(args))

    def plain(self, *args):
        """By the reference."""
        return as_channels_last(self._reference(*args))

    def dense(self, *args):
        """For arguments that are dense, as `as_channels_last` makes them, and on the current device."""
        return self._choose(args)(*args)

    def _choose(self, args):
        if not self._accepts(*args):
            return self.plain
        if self._cuda_accepts and _tensors(args)[0].is_cuda and cuda_extension() and self._cuda_accepts(*args):
            return getattr(cuda_extension(), self._name)
        return self._run

    def _run(self, *args):
        try:
            return self._launcher()(*args)
        except launcher("launch", "Unfit"):
            return self.plain(*args)

    def _launcher(self):
        return launcher(self._launch, f"launch_{self._name}") if isinstance(self._launch, str) else self._launch

    def _first(self, key, args):
        """The result of the first call with a signature."""
        run, prepared = self._choose(args), None
        if run == self._run and isinstance(self._launch, str):
            try:
                result, prepared = launcher("launch", "run_and_prepare")(self._launcher(), args)
            except launcher("launch", "Unfit"):
                run = self.plain
                result = run(*args)
        else:
            result = run(*args)
            if run == self._run and self._prepare is not None:
                prepared = self._prepare(*args)
        if len(self._ready) >= MOST_SIGNATURES:
            self._ready.clear()
        self._ready[key] = prepared or run
        return result


def define(
    schema: str,
    reference: Callable,
    accepts: Callable[..., bool],
    launch: Callable | str,
    cuda_accepts: Callable[..., bool] | None = None,
    fake: Callable | None = None,
    prepare: Callable[..., Callable | None] | None = None,
) -> Operator:
    """Register dcae_fast::<schema>.

    reference: computes the result in plain PyTorch. accepts: whether the kernel takes these arguments, which are
    channels-last (4-D tensors) or contiguous (other tensors) by then. launch: a function that calls the kernel, or the
    name of the Triton kernel's file, whose launch_<operator> is called. cuda_accepts: the same for the function
    <operator> of the CUDA extension, which is preferred if it is built. fake: an empty result, for tensors without
    data; by default the reference computes it. prepare: from arguments for which `launch` has run, a faster function
    for all arguments with the same signature; None if there is none.

    The results of accepts, cuda_accepts and prepare must depend only on the signature of the arguments.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    kernels = Kernels(name, reference, accepts, launch, cuda_accepts, prepare)
    LIBRARY.impl(name, kernels.plain, "CompositeExplicitAutograd")
    if HAS_TRITON:
        LIBRARY.impl(name, kernels.__call__, "CUDA")
    if INTERPRETED:
        LIBRARY.impl(name, kernels.__call__, "CPU")
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default

    def call(*args, **kwargs):  # a profiler sees only operators that are called through the dispatcher
        run = None if kwargs or is_profiling() else kernels.known(args)
        return dispatch(*args, **kwargs) if run is None else run(*args)

    dispatch = intercept_calls(overload, call)

    def without_data(*args):
        make_known_to_inductor(overload)
        return kernels.plain(*args) if fake is None else fake(*args)

    torch.library.register_fake(f"{NAMESPACE}::{name}", without_data, lib=LIBRARY)
    return Operator(overload, reference, kernels)


def differentiable(op: Operator, backward: Callable, setup_context: Callable) -> None:
    """Register the gradient of an operator."""
    torch.library.register_autograd(op.overload.name(), backward, setup_context=setup_context, lib=LIBRARY)

    def forward(ctx, *args):
        with without_dispatch_keys(VIEW_KEYS):  # as below the dispatcher, so that results can be changed in place
            output = op.kernel(*args)
        setup_context(ctx, args, output)
        return output

    if not takes_list(op.overload):  # apply does not see the tensors in a list
        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        op.function = type(op.overload.name(), (torch.autograd.Function,), methods)


def differentiable_as(op: Operator, reference: Callable) -> None:
    """Register a gradient that runs `reference` again in the backward pass, for gradients that are seldom needed.

    The gradient is differentiable to any order.
    """

    def setup_context(ctx, inputs, output):
        leaves, ctx.structure = tree_flatten(list(inputs))
        ctx.save_for_backward(*(leaf if isinstance(leaf, torch.Tensor) else None for leaf in leaves))
        ctx.constants = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]

    def gradient(ctx, *grads):
        again = torch.is_grad_enabled()  # a gradient of the gradient is wanted
        with torch.enable_grad():
            # views, so that a tensor that was passed twice has a gradient in each place
            tensors = [
                t if t is None else t.view_as(t) if again else t.detach().requires_grad_(t.requires_grad)
                for t in ctx.saved_tensors
            ]
            leaves = [c if t is None else t for t, c in zip(tensors, ctx.constants, strict=True)]
            outputs = tree_leaves(reference(*tree_unflatten(leaves, ctx.structure)))
            pairs = zip(outputs, tree_leaves(grads), strict=True)
            pairs = [(y, dy) for y, dy in pairs if dy is not None and y.requires_grad]
            outputs, grads = [y for y, _ in pairs], [dy for _, dy in pairs]
            wanted = [t is not None and t.requires_grad for t in tensors]
            inputs = [t for t, wants in zip(tensors, wanted, strict=True) if wants]
            found = iter(torch.autograd.grad(outputs, inputs, grads, allow_unused=True, create_graph=again))
        gradients = tree_unflatten([next(found) if wants else None for wants in wanted], ctx.structure)
        return tuple(None if all(leaf is None for leaf in tree_leaves(part)) else part for part in gradients)

    differentiable(op, gradient, setup_context)


def _dense(args: tuple) -> list:
    """The arguments, with `as_channels_last` applied to each; most tensors are dense already."""
    dense = list(args)
    for place, value in enumerate(args):
        if isinstance(value, torch.Tensor):
            if value.is_contiguous(memory_format=torch.channels_last if value.dim() == 4 else torch.contiguous_format):
                continue
        elif not (isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor)):
            continue
        dense[place] = as_channels_last(value)
    return dense


def as_channels_last(value):
    """The value with dense tensors: 4-D tensors channels-last, others contiguous, also inside a list or tuple."""
    if isinstance(value, torch.Tensor):
        if value.dim() != 4:
            return value.contiguous()
        if _is_weight(value) and not value.is_contiguous(memory_format=torch.channels_last):
            return launcher("weight_layout", "launch_weight_layout")(value)
        return value.contiguous(memory_format=torch.channels_last)
    if type(value) in (list, tuple) and value and isinstance(value[0], torch.Tensor):
        return type(value)(map(as_channels_last, value))
    return value


def _is_weight(value: torch.Tensor) -> bool:
    """Whether a 4-D tensor looks like the weight of a convolution, which PyTorch converts to channels-last slowly."""
    on_gpu = HAS_TRITON and value.is_cuda and type(value) in ORDINARY
    return on_gpu and value.is_contiguous() and 1 < value.shape[2] * value.shape[3] <= 16


def _are_plain(tensors: list[torch.Tensor]) -> bool:
    """Whether kernels can read these tensors in memory: ordinary tensors on the device of the kernels, without marks of
    PyTorch for lazily negated or zero values. The loops are in C, since this runs before every kernel.
    """
    return (
        ORDINARY.issuperset(map(type, tensors))
        and (not any(map(_IS_META, tensors)) if INTERPRETED else all(map(_IS_CUDA, tensors)))
        and not any(map(torch.Tensor.is_neg, tensors))
        and not any(map(has_zero_mark, tensors))
    )


_IS_CUDA, _IS_META = operator.attrgetter("is_cuda"), operator.attrgetter("is_meta")


def _tensors(args) -> list[torch.Tensor]:
    """The tensors among the arguments of an operator, including those in lists."""
    found = []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            found.append(arg)
        elif isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], torch.Tensor):
            found += arg
    return found
