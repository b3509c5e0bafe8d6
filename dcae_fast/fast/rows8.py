"""Linear layers and 1×1 convolutions of diffusion transformers that compute in 8 bit: which can, which do, and their
forward.

A layer computes in 8 bit if it has the attribute `operands.ROWS8`, the name of a precision. `patch` sets it. Copies
and pickles of the layer keep it, and so does `load_state_dict`, since nothing is calibrated; it is no part of
`state_dict`. The layer's input is rounded by the kernel that produces the input, with one scale for each token; its
weight is rounded with one scale for each output channel. See ops/quantize_rows.py and ops/linear_rows.py. int8.py has
the layers of autoencoders, which compute with the scales of a calibration.

8 bit needs a Hopper GPU, half precision or autocast, channels in multiples of 16, and a layer without hooks. Elsewhere
the layer computes as `patch(model)` lets it. int8 is for inference only.
"""

from collections.abc import Collection, Iterator

import torch
from torch import nn

from dcae_fast import ops
from dcae_fast.ops._library import HALVES, HAS_TRITON, INTERPRETED, is_hopper

from . import operands
from .fusion import autocasts
from .module import FastModule, check_inference, plain

INT8 = "int8"
EVERYTHING = "fp8-all"  # in training, the gradients of weights are 8-bit products too
TYPES = {INT8: torch.int8, "fp8": torch.float8_e4m3fn, EVERYTHING: torch.float8_e4m3fn}  # precision → of the rows
MULTIPLE = 16  # of the channels
Rows = tuple[torch.Tensor, torch.Tensor]  # 8-bit rows and their scales
Product = nn.Linear | nn.Conv2d  # see `is_product`


def runs_on(device: torch.device) -> bool:
    return INTERPRETED or (HAS_TRITON and is_hopper(device))


def candidates(model: nn.Module) -> Iterator[tuple[str, Product]]:
    """(name, layer) of the layers of a patched model that a fast forward can compute in 8 bit, whatever their shape."""
    names = {id(module): name for name, module in model.named_modules()}
    for module in model.modules():
        if isinstance(module, FastModule):
            yield from ((names[id(layer)], layer) for layer in module.rows8_layers() if is_product(layer))


def is_product(layer: nn.Module | None) -> bool:
    """Whether this is a linear layer, of tokens or of the channels of an image."""
    if type(layer) is nn.Conv2d:
        return layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0) and layer.groups == 1
    return type(layer) is nn.Linear


def mark(layers: dict[str, Product], precision: str, keep: Collection[str]) -> dict[str, str]:
    """Let these `candidates` compute in 8 bit. Returns name → reason of the layers that stay exact.

    keep: names of layers that stay exact, in full, or their `last_part`, such as "fc2".
    """
    exact = {}
    for name, layer in layers.items():
        if any(is_named(name, kept) for kept in keep):
            exact[name] = "asked for"
        elif any(channels % MULTIPLE for channels in layer.weight.shape[:2]):
            exact[name] = f"their channels are no multiples of {MULTIPLE}"
        else:
            layer.__dict__[operands.ROWS8] = precision
    return exact


def is_named(name: str, asked: str) -> bool:
    return asked in (name, last_part(name))


def last_part(name: str) -> str:
    """The last part of a layer's name, such as "fc2"; two parts for a number or "conv", as in "to_out.0"."""
    *_, parent, last = "", *name.split(".")
    return f"{parent}.{last}".lstrip(".") if last.isdigit() or last == "conv" else last


def precision_of(layer: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> str | None:
    """The precision in which a layer computes for tokens like x, None for that of the model. dtype: of the result.

    Raises RuntimeError for int8 in training mode and where gradients are on.
    """
    precision = operands.mark_of(layer, operands.ROWS8)
    if precision == INT8:
        check_inference(layer)
    if precision is None or dtype not in HALVES or not runs_on(x.device) or x.numel() == 0 or not plain(layer):
        return None
    return precision if layer.weight.dtype == x.dtype or autocasts(x) else None


def type_of(layer: nn.Module) -> torch.dtype:
    """The type of the rows of a layer that computes in 8 bit."""
    return TYPES[operands.mark_of(layer, operands.ROWS8)]


def infers(layer: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a layer computes in 8 bit for tokens like x, without gradients."""
    return precision_of(layer, x, dtype) is not None and not torch.is_grad_enabled()


def trains(layer: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> str | None:
    """The precision in which a layer computes for tokens like x, with gradients; None for that of the model."""
    return precision_of(layer, x, dtype) if torch.is_grad_enabled() else None


def both_train(first: nn.Module, second: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> tuple[str | None, bool]:
    """`trains` of the first layer, and whether it is the same for the second."""
    precision = trains(first, x, dtype)
    return precision, trains(second, x, dtype) == precision


def linear(
    layer: Product,
    x: torch.Tensor | Rows,
    dtype: torch.dtype,
    residual: torch.Tensor | None = None,
    act: str = "none",
) -> torch.Tensor:
    """layer(act(x)) + residual for a layer that `infers`. x: tokens, or 8-bit rows, which have no activation.

    dtype: of the result without a residual; with one the result has the type of the residual.
    """
    rows = x if isinstance(x, tuple) else ops.quantize_rows(x, act, type_of(layer))
    dtype = dtype if residual is None else residual.dtype
    of_bias = dtype if dtype in HALVES else torch.bfloat16
    weight, weight_scale, bias = operands.of_rows8(layer, rows[0].dtype, of_bias)
    return ops.linear_rows(*rows, weight, weight_scale, bias, residual, dtype)


def knows_bounds(fc1: nn.Linear, fc2: nn.Linear, x: torch.Tensor, scale: torch.Tensor, branch, dtype) -> bool:
    """Whether `bounded_mlp` computes an MLP: both layers infer in float8, and all images have the same norm weights.

    The bounds of ops/bounded_mlp.py take some small kernels, so they must be kept.
    """
    if scale.dim() != 1 or branch is not None or not (operands.is_kept(fc1) and ops.multiplies_within_bounds()):
        return False
    return infers(fc1, x, dtype) and infers(fc2, x, dtype) and {type_of(fc1), type_of(fc2)} == {torch.float8_e4m3fn}


def bounded_mlp(
    fc1: nn.Linear, fc2: nn.Linear, x, weight, bias, eps: float, dtype: torch.dtype, residual: torch.Tensor | None
) -> torch.Tensor:
    """fc2(gelu(fc1(norm(x)))) + residual with the scales of ops/bounded_mlp.py. weight, bias: of the norm."""
    y_scale, w1, w1_scale, g_scale, y_factor, g_factor, b1 = operands.of_bounded_mlp(fc1, weight, bias)
    y = ops.bounded_layer_norm(x, weight, bias, eps, y_factor)
    g = ops.bounded_linear_gelu(y, y_scale, w1, w1_scale, b1, g_factor)
    return linear(fc2, (g, g_scale.expand(*g.shape[:-1], 1).contiguous()), dtype, residual)


def joined(layers: tuple[nn.Linear, ...], rows: Rows, dtype: torch.dtype, heads: int) -> torch.Tensor:
    """The results of several linear layers that all `infer`, in the order of `operands.of_joined_layers`."""
    weight, weight_scale, bias = operands.of_joined_rows8(layers, rows[0].dtype, dtype, heads)
    return ops.linear_rows(*rows, weight, weight_scale, bias, None, dtype)


def norm(layer: Product, x, scale, shift, eps: float, branch, gate, dtype: torch.dtype):
    """(s, y) as `ops.layer_norm` gives them; y as 8-bit rows if the layer behind the norm `infers`."""
    if not infers(layer, x, dtype):
        return ops.layer_norm(x, scale, shift, eps, branch, gate, dtype)
    s, *rows = ops.layer_norm_rows(x, scale, shift, eps, branch, gate, type_of(layer))
    return s, tuple(rows)
