"""A module becomes fast when its class is replaced by a subclass of a mixin and of its own class."""

import functools
import inspect
from typing import Any

import torch
from torch import nn

from dcae_fast import ops
from dcae_fast.ops._library import ORDINARY
from dcae_fast.ops._private import FakeTensor, constant_in_compile, unobserved

from . import operands
from .names import cache_by_class, is_known


class FastModule:
    """Mixin with a fast forward. It adds no state: parameters, buffers and hooks stay as they are.

    operators: names of the operators that the fast forward calls. dims: dimensions of the input. attributes: what a
    module must have to be of the class that the mixin is written for; optional: what the module may have in addition.
    A module with other submodules is of another class.
    """

    operators: tuple[str, ...] = ()
    dims = 4
    attributes: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    @staticmethod
    def reason_not_fast(module: nn.Module) -> str:
        """Why a module, patched or not, can never take its fast forward; empty if it can.

        The answer depends on what the module is made of, not on what may change with the next call, such as hooks and
        training mode.
        """
        return ""

    @staticmethod
    def rests_on(module: nn.Module) -> dict[str, nn.Module]:
        """Submodules of which at least one must be patched for this module to gain anything. Empty: it always gains."""
        return {}

    def int8_layers(self) -> tuple[nn.Module, ...]:
        """The module's own layers that its fast forward can compute in 8 bit, if they have the shapes for it."""
        return ()

    def rows8_layers(self) -> tuple[nn.Module | None, ...]:
        """The module's own layers that its fast forward can compute with 8-bit rows; None for an absent one."""
        return ()

    def dispatch(self, *args, **kwargs):
        """The fast forward, or the module's own where the fast one cannot take these arguments."""
        if kwargs or not args or not self.takes(*args):
            return self.eager(*args, **kwargs)
        return self.fast_forward(*args)

    def takes(self, x: torch.Tensor, *others) -> bool:
        """Whether the operators have kernels for these inputs and for the module's own weights.

        They have none for subclasses of torch.Tensor, such as distributed or quantised tensors: the module's own
        forward computes what those mean.
        """
        if not ops.is_ordinary(x) or x.dim() != self.dims or not ops.has_kernels(x) or ops.in_transform():
            return False
        for other in others:
            if isinstance(other, torch.Tensor) and not ops.is_ordinary(other):
                return False
        return not (self._parameters or self._buffers) or has_ordinary_weights(self)

    def fast_forward(self, *args):
        raise NotImplementedError

    def eager(self, *args, **kwargs):
        """The module's own forward."""
        return super().forward(*args, **kwargs)

    def _get_name(self) -> str:
        """The name in `repr`."""
        return "Fast" + super()._get_name()

    def _apply(self, *args, **kwargs):
        """`to`, `cuda`, `half` and the like also drop the operands that layers keep, and so free their memory."""
        operands.drop(self)
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        operands.forget(self)
        return super()._load_from_state_dict(*args, **kwargs)

    def _replicate_for_data_parallel(self) -> nn.Module:
        """A replica, of nn.DataParallel, has tensors as attributes rather than parameters: it is not fast."""
        replica = super()._replicate_for_data_parallel()
        change_class(replica, original_class(replica))
        return replica

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        """Pickled as (mixin, original class): the combined class is made at run time and has no importable name."""
        reduced = super().__reduce_ex__(protocol)
        if not _is_fast_class(type(self)):  # another library has derived a class from it
            return reduced
        return _new, type(self).__bases__, *reduced[2:]


@functools.cache
def fast_class(mixin: type[FastModule], base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` that runs the forward of `mixin`, with the signature of `base.forward`.

    It has the name and module of `base`, since libraries write them into files (diffusers' model_index.json), and
    compare them with names of their own (accelerate's _no_split_modules). Only `repr` of a module says "Fast".
    """
    signature = inspect.signature(base.forward)
    parameters = list(signature.parameters.values())[1:]
    positional = tuple(each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD)

    def forward(self, *args, **kwargs):
        if not isinstance(self, FastModule):  # a wrapper kept this forward, and the module was unpatched
            return type(self).forward(self, *args, **kwargs)
        if kwargs:
            args, kwargs = by_position(positional, args, kwargs)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and operands.FROZEN in self.__dict__:
            operands.drop(self)  # a training: an optimizer may write to the weights without counting
        return self.dispatch(*args, **kwargs)

    forward.__signature__ = signature  # torch.export, for example, finds dynamic shapes by it
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (mixin, base), names | {"forward": forward})


def _new(mixin: type[FastModule], base: type[nn.Module]) -> nn.Module:
    cls = fast_class(mixin, base)
    return cls.__new__(cls)


def is_fast(module: nn.Module) -> bool:
    return isinstance(module, FastModule)


def _is_fast_class(cls: type[nn.Module]) -> bool:
    return len(cls.__bases__) == 2 and issubclass(cls.__bases__[0], FastModule)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that the library of a module gave it, before `patch` and others derived new classes.

    fully_shard, replicate and parametrizations of PyTorch give an instance a new class, derived from its class.
    """
    cls = class_in_use(module)
    return cls.__bases__[1] if _is_fast_class(cls) else cls


def class_in_use(module: nn.Module) -> type[nn.Module]:
    """The fast class of a module, or else its original class, before others derived classes from it."""
    cls = type(module)
    fast = next(filter(_is_fast_class, cls.__mro__), None)
    while fast is None and cls.__module__.startswith("torch."):
        bases = (base for base in cls.__bases__ if issubclass(base, nn.Module))
        derived_from = next((base for base in bases if not base.__module__.startswith("torch.")), None)
        if derived_from is None:
            return cls
        cls = derived_from
    return fast or cls


def change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Replace `class_in_use(module)` by cls. Classes that others derived from the former are derived from cls."""
    module.__class__ = _derived_anew(type(module), class_in_use(module), cls)


def _derived_anew(cls: type, old: type, new: type) -> type:
    """cls with `new` instead of `old` among its direct and indirect bases.

    Raises RuntimeError if methods of cls call super(), which would still refer to the former class.
    """
    if cls is old or old is new:
        return new if cls is old else cls
    codes = (getattr(value, "__code__", None) for value in vars(cls).values())
    if any("__class__" in code.co_freevars for code in codes if code is not None):
        name = f"{cls.__module__}.{cls.__qualname__}"
        raise RuntimeError(
            f"{name} is derived from the class that `patch` made of {new.__name__}: undo that before unpatch or patch"
        )
    bases = tuple(_derived_anew(base, old, new) if issubclass(base, old) else base for base in cls.__bases__)
    content = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, content)


def check_inference(layer: nn.Module) -> None:
    """Raises RuntimeError in training mode and where gradients are on. layer: one that computes in int8."""
    if torch.is_grad_enabled() or layer.training:
        raise RuntimeError(
            "patch(model, precision='int8') is for inference: call model.eval(), and the model under torch.no_grad();"
            " patch(model) computes exactly, with gradients"
        )


def kind(module: nn.Module) -> str:
    """The name of a module's class before `patch`, without its package; empty if the package is unknown."""
    return _kind_of(type(module))


@constant_in_compile
def _kind_of(cls: type[nn.Module]) -> str:
    if cls not in _KINDS:
        original = cls.__bases__[1] if _is_fast_class(cls) else cls
        _KINDS[cls] = original.__name__ if is_known(original) else ""
    return _KINDS[cls]


_KINDS: dict[type[nn.Module], str] = cache_by_class()  # asked in every call


def member(module: nn.Module, name: str) -> Any:
    """module.name if it is a submodule or an attribute of the instance, else None. Unlike getattr, this raises no
    exception internally.
    """
    return module._modules[name] if name in module._modules else module.__dict__.get(name)


def by_position(names: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Moves keyword arguments to their positions, up to the first parameter that is missing."""
    for name in names[len(args) :]:
        if name not in kwargs:
            break
        args, kwargs = (*args, kwargs[name]), {other: value for other, value in kwargs.items() if other != name}
    return args, kwargs


def has_ordinary_weights(module: nn.Module) -> bool:
    """Whether a module's own parameters and buffers are ordinary tensors, of no subclass."""
    parameters, buffers = module._parameters, module._buffers
    return (not parameters or WEIGHTS.issuperset(map(type, parameters.values()))) and (
        not buffers or WEIGHTS.issuperset(map(type, buffers.values()))
    )


WEIGHTS = ORDINARY | {type(None), FakeTensor}  # torch.export's non-strict mode replaces weights by fake tensors


def plain(*modules: nn.Module | None) -> bool:
    """`unobserved`, and the modules' own weights are ordinary tensors, which operators can read."""
    for module in modules:
        if module is not None and (module._parameters or module._buffers) and not has_ordinary_weights(module):
            return False
    return unobserved(*modules)
