"""Classes are recognised by their qualified name below a package root: dc_gen.models.nn.ops.ResBlock by the part after
dc_gen, wherever dc_gen stands in the name.
"""

from dcae_fast.ops._private import constant_in_compile

# The original under its names, this project, diffusers, and the package of NVlabs/Sana; copies inside other packages
# keep one of these names.
ROOTS = {"dc_ai", "dc_gen", "dcae_fast", "diffusers", "diffusion.model", "efficientvit"}
PACKAGES = ("timm", "torch")  # packages whose classes the fast forwards know by name


def register_root(root: str) -> None:
    """Make `patch` recognise the classes of another copy of DC-Gen, efficientvit, diffusers or this project.

    root: the package as it is imported, with dots if it lies inside another one: "my_fork" for a class
    my_fork.models.nn.ops.ResBlock. Below the root, modules and classes must have the names that the original has;
    `patch` checks attributes and leaves a class alone that has others. Raises TypeError unless root is a string, and
    ValueError unless it is the name of a package.
    """
    if not isinstance(root, str):
        raise TypeError(f"root is {root!r}; expected the name of a package, as in 'my_fork'")
    if not all(part.isidentifier() for part in root.split(".")):
        raise ValueError(f"root={root!r}; expected the name of a package, as in 'my_fork' or 'my_project.vendored'")
    ROOTS.add(root)
    for cache in _CACHES:
        cache.clear()


_CACHES: list[dict] = []


def cache_by_class() -> dict:
    """A dictionary for answers about classes, which `register_root` empties."""
    _CACHES.append({})
    return _CACHES[-1]


def qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def below_roots(cls: type) -> list[str]:
    """The parts of a class's qualified name after a root; one for each root in the name."""
    parts = qualified_name(cls).split(".")
    cuts = [(".".join(["", *parts[:k]]), ".".join(parts[k:])) for k in range(1, len(parts))]
    return [rest for package, rest in cuts if any(package.endswith(f".{root}") for root in ROOTS)]


@constant_in_compile
def is_known(cls: type) -> bool:
    """Whether a class lies below a root or in one of PACKAGES."""
    if cls not in _KNOWN:
        _KNOWN[cls] = cls.__module__.split(".")[0] in PACKAGES or bool(below_roots(cls))
    return _KNOWN[cls]


_KNOWN: dict[type, bool] = cache_by_class()  # asked in every call
