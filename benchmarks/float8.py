"""Contenders that train in 8 bit: "patched, fp8-all", and torchao's recipes under torch.compile.

torchao is optional. The names of its contenders do not contain "torch.compile", so that they do not count as forms of
torch.compile.
"""

import importlib.util
from collections.abc import Callable, Iterable
from functools import cache

from torch import nn

import dcae_fast
from dcae_fast.models.dit import DiT
from dcae_fast.models.uvit import UViT
from dcae_fast.training.diffusion.network import blocks_of
from dcae_fast.training.engine.parallel import apply_compile

from .network_workloads import NetworkWorkload


def patched_everything(model: UViT | DiT, workload: NetworkWorkload) -> None:
    dcae_fast.patch(model, precision="fp8-all")


def torchao(contender: str) -> Callable[[UViT | DiT, NetworkWorkload], None]:
    """What converts the linear layers that this project computes in 8 bit, and compiles the blocks.

    contender: "torchao RECIPE".
    """

    def prepare(model: UViT | DiT, workload: NetworkWorkload) -> None:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = Float8LinearConfig.from_recipe_name(contender.removeprefix("torchao "))
        for block in blocks_of(model):
            convert_to_float8_training(block, module_filter_fn=_is_converted, config=config)
        apply_compile(blocks_of(model))

    return prepare


def _is_converted(module: nn.Linear, name: str) -> bool:
    return "adaLN_modulation" not in name and module.in_features % 16 == module.out_features % 16 == 0


@cache
def _is_missing(package: str) -> bool:
    """Whether a package is not installed; says so once."""
    if importlib.util.find_spec(package) is not None:
        return False
    print(f"{package} is not installed: its contenders are left out", flush=True)
    return True


def present(contenders: Iterable[str]) -> list[str]:
    """The contenders whose packages are installed."""
    return [name for name in contenders if not (name.startswith("torchao") and _is_missing("torchao"))]
