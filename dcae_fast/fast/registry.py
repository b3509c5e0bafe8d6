"""The classes that `patch` knows. Each file in families/ registers the classes of one family.

A class is known by its qualified name below a package root (names.py), so that no library has to be imported and
copies of a library are recognised.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from .module import FastModule, original_class
from .names import below_roots

if TYPE_CHECKING:
    from .layers import Layer, Survey

Describe = Callable[[nn.Module, "Survey"], list["Layer"]]

# By qualified name below a root.
_MIXINS: dict[str, type[FastModule]] = {}
_PLAIN: dict[str, Describe | None] = {}


def register(
    module: str, classes: dict[str, type[FastModule]], plain: dict[str, Describe | None] | None = None
) -> None:
    """Classes of a module, which is named below a root, like "models.nn.ops".

    classes: name → the mixin that makes the class fast. plain: classes that have no fast forward, but consist of
    PyTorch's functions and of their submodules, so that they accept images of any memory format; name → the function
    that describes the class's layers for bounded memory, or None.
    """
    _MIXINS.update({f"{module}.{name}": mixin for name, mixin in classes.items()})
    _PLAIN.update({f"{module}.{name}": describe for name, describe in (plain or {}).items()})


def mixin_of(cls: type[nn.Module]) -> type[FastModule] | None:
    """The mixin that makes modules of exactly this class fast; None if the class is unknown."""
    return next((_MIXINS[path] for path in below_roots(cls) if path in _MIXINS), None)


def is_plain(cls: type[nn.Module]) -> bool:
    """Whether the class was registered as one without a fast forward."""
    return any(path in _PLAIN for path in below_roots(cls))


def describe_of(module: nn.Module) -> Describe | None:
    """The function that describes a module's layers for bounded memory, whether the module is patched or not."""
    cls = original_class(module)
    mixin = mixin_of(cls)
    if mixin is not None:
        return getattr(mixin, "describe", None)
    return next((_PLAIN[path] for path in below_roots(cls) if path in _PLAIN), None)


def is_of_known_module(cls: type[nn.Module]) -> bool:
    """Whether the class is defined in the same Python module as known ones."""
    known = {path.rpartition(".")[0] for path in (*_MIXINS, *_PLAIN)}
    return any(path.rpartition(".")[0] in known for path in below_roots(cls))


def unlike(mixin: type[FastModule], module: nn.Module) -> str:
    """How a module's attributes differ from the attributes that a mixin expects; empty if they do not."""
    missing = [name for name in mixin.attributes if not hasattr(module, name)]
    if missing:
        return f"it has no {', '.join(missing)}"
    known = {*mixin.attributes, *mixin.optional}
    others = [name for name, child in module.named_children() if name not in known] if known else []
    return f"it also has {', '.join(others)}" if others else ""


def resemblance(cls: type[nn.Module], module: nn.Module) -> str:
    """Why `patch` skips a module of an unknown class that resembles a DC-AE's; empty if it does not resemble one.

    A class that is defined in the same Python module as known ones is no stranger: it has no fast forward.
    """
    if is_of_known_module(cls):
        return ""
    named = [mixin for path, mixin in _MIXINS.items() if path.rpartition(".")[2] == cls.__name__]
    if any(len(mixin.attributes) > 1 and not unlike(mixin, module) for mixin in named):
        how = "" if below_roots(cls) else ": see dcae_fast.register_root"
        return f"{cls.__module__} is no known module of a DC-AE{how}"
    known = next((base for base in cls.__mro__ if mixin_of(base) is not None), None)
    return "" if known is None else f"it derives from {known.__name__}, and may do something else"
