"""Operands: a layer's weights as kernels read them.

An operand has the dtype of the product, is channels-last if it is the weight of a convolution, starts at a multiple of
16 bytes, and may have a batch norm folded in. Every call derives its operands again, because code may write to weights
in ways that nothing shows: through `.data`, for example. `patch(model, frozen=True)` promises that nobody does. Then a
layer keeps its operands in `Operands` until one of the tensors that they were derived from changes, as far as
autograd's version counter shows. On a GPU, PyTorch 2.11 does not count the writes of fused optimizers; therefore a
frozen module also drops its operands when it is called with gradients on.

Operators take finished operands. They check them, and run their reference if an operand does not fit.
"""

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from dcae_fast import ops
from dcae_fast.ops._private import version_of

from .casts import cast, without_cache

LAYERS = (nn.Conv2d, nn.Linear)  # that can keep operands
ATTRIBUTE = "fast_operands"  # of such a layer; it is there if the layer is frozen
FROZEN = "fast_frozen"  # attribute of a fast module with such layers
INT8 = "fast_int8"  # attribute of a layer that computes in 8 bit; see int8.py
ROWS8 = "fast_rows8"  # attribute of a layer of a transformer that computes in 8 bit; see rows8.py

Operand = Any  # a tensor, or a tuple of tensors and None


def mark_of(layer: nn.Module, name: str) -> Any:
    """The value of INT8 or ROWS8 of a layer; None if the layer has no such attribute.

    Compiled code is compiled again after `patch` has changed the attribute: Dynamo guards getattr, but no `__dict__`.
    """
    return getattr(layer, name, None) if torch.compiler.is_compiling() else layer.__dict__.get(name)


class Operands:
    """The operands that one frozen layer keeps. Copies and pickles of the layer are frozen and start with none."""

    def __init__(self):
        self._kept: dict[Hashable, tuple[list[tuple], Operand]] = {}  # by name: states of the sources, operand

    def __deepcopy__(self, memo: dict) -> "Operands":
        return Operands()

    def __reduce__(self):
        return Operands, ()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, sources: tuple[torch.Tensor, ...], make: Callable[[], Operand]) -> Operand:
        """The operand `key`, which `make` derives from `sources`. It is derived again if a source was removed, replaced
        or moved, or written to, as far as autograd counts writes.
        """
        kept = self._kept.get(key)
        if kept is not None and len(kept[0]) == len(sources) and all(map(_is_unchanged, kept[0], sources)):
            return kept[1]
        if _capturing(sources[0]) or any(map(torch.Tensor.is_inference, sources)):  # the latter count no versions
            return make()
        with torch.inference_mode(False), torch.no_grad(), without_cache(sources[0].device):
            operand = make()
        if sources[0].is_cuda:
            torch.cuda.current_stream(sources[0].device).synchronize()  # other streams may read the operand from now on
        self._kept[key] = [_state(source) for source in sources], operand
        return operand

    def tensors(self) -> Iterator[torch.Tensor]:
        """All tensors that are kept."""
        for _, operand in self._kept.values():
            operands = operand if isinstance(operand, tuple) else (operand,)
            yield from (tensor for tensor in operands if tensor is not None)


def _state(source: torch.Tensor) -> tuple[weakref.ref, int, int, bool]:
    """What shows that a tensor has changed. peft merges adapters through `.data`, but it also freezes the layers."""
    return weakref.ref(source), version_of(source), source.data_ptr(), source.requires_grad


def _is_unchanged(state: tuple[weakref.ref, int, int, bool], source: torch.Tensor) -> bool:
    reference, version, address, requires_grad = state
    return (
        reference() is source
        and version_of(source) == version
        and source.data_ptr() == address
        and source.requires_grad == requires_grad
    )


def _capturing(tensor: torch.Tensor) -> bool:
    """Whether a CUDA graph is being captured: what is made now exists only when the graph is replayed."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def freeze(module: nn.Module) -> None:
    """Let the layers of a fast module keep operands."""
    module.__dict__[FROZEN] = True
    for layer in _layers(module):
        layer.__dict__[ATTRIBUTE] = Operands()


def unfreeze(module: nn.Module) -> None:
    """Drop the operands of all layers in a module. From now on every call derives its operands; no layer is 8-bit."""
    for submodule in module.modules():
        for name in (FROZEN, ATTRIBUTE, INT8, ROWS8):
            submodule.__dict__.pop(name, None)


def drop(module: nn.Module) -> None:
    """Drop the operands that a module's layers keep; the layers stay frozen.

    The next call makes them again. The layers get new `Operands`, by which captured graphs notice.
    """
    for layer in _layers(module):
        if layer.__dict__.get(ATTRIBUTE):
            layer.__dict__[ATTRIBUTE] = Operands()


def forget(module: nn.Module) -> None:
    """`drop`, and compute exactly: other weights were loaded, for which the scales of 8-bit layers are wrong."""
    drop(module)
    for layer in _layers(module):
        layer.__dict__.pop(INT8, None)


def kept_by(modules: Iterable[nn.Module]) -> list[torch.Tensor] | None:
    """The tensors that frozen layers among these modules keep; None if no layer is frozen."""
    frozen = [module.__dict__[ATTRIBUTE] for module in modules if ATTRIBUTE in module.__dict__]
    return [tensor for each in frozen for tensor in each.tensors()] if frozen else None


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    return (layer for layer in module.modules() if type(layer) in LAYERS)


def _operand(
    layer: nn.Module, key: Hashable, sources: tuple[torch.Tensor | None, ...], make: Callable[[], Operand]
) -> Operand:
    """make(), or what it made before for a frozen layer in inference."""
    kept = layer.__dict__.get(ATTRIBUTE)
    if kept is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return make()
    return kept.get(key, tuple(source for source in sources if source is not None), make)


def of_convolution(conv: nn.Conv2d, dtype: torch.dtype) -> torch.Tensor:
    """The weight in this dtype, channels-last."""
    weight = conv._parameters["weight"]
    if weight.dtype == dtype and _is_channels_last(weight):
        return weight
    return _operand(conv, ("weight", dtype), (weight,), lambda: _channels_last(cast(weight, dtype)))


def of_bias(conv: nn.Conv2d, dtype: torch.dtype) -> torch.Tensor | None:
    """The bias of a convolution in this dtype."""
    bias = conv._parameters["bias"]
    if bias is None or bias.dtype == dtype:
        return bias
    return _operand(conv, ("bias", dtype), (bias,), lambda: cast(bias, dtype))


def of_convolution_and_norm(
    conv: nn.Conv2d, norm: nn.BatchNorm2d, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of one convolution that does the work of conv, which has no bias, and of the batch norm."""
    sources = conv.weight, norm.bias, norm.weight, norm.running_mean, norm.running_var
    return _operand(conv, ("folded", dtype), sources, lambda: ops.fold_batch_norm(*sources, norm.eps, dtype))


def of_upsampling_convolution(conv: nn.Conv2d, dtype: torch.dtype) -> torch.Tensor:
    """What `ops.upsample_conv2d` reads."""
    return _operand(conv, ("subpixel", dtype), (conv.weight,), lambda: ops.subpixel_weights(conv.weight, dtype))


def of_layer(
    layer: nn.Linear | nn.Conv2d, dtype: torch.dtype, sum_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a product in this dtype.

    sum_dtype: of the residual that is added within the product; the bias has it then. Where gradients are on, float32
    parameters stay float32: the product rounds them, and their gradients are not rounded. They stay float32 in compiled
    code too, because that would cast them in each call, while the product lets autocast keep the casts.
    """
    parameters = layer._parameters
    weight, bias = parameters["weight"], parameters["bias"]
    if weight.dtype == torch.float32 and (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        return _aligned(weight), bias
    bias_dtype = sum_dtype or dtype
    if weight.dtype == dtype and (bias is None or bias.dtype == bias_dtype) and _is_aligned(weight):
        return weight, bias
    return _operand(
        layer,
        (dtype, bias_dtype),
        (weight, bias),
        lambda: (_aligned(cast(weight, dtype)), None if bias is None else cast(bias, bias_dtype)),
    )


def of_joined_layers(
    layers: tuple[nn.Linear, ...], dtype: torch.dtype, heads: int = 1
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weights [M_1 + M_2 + ..., K] and the biases of linear layers, joined; None if the layers have no biases.

    Either all layers have biases, or none of them. With heads, the outputs for the first head of each layer come first,
    then the outputs for the second head. Where gradients are on, float32 parameters stay float32, as in `of_layer`.
    """
    weights, biases = _parameters_of(layers)
    if torch.is_grad_enabled() and all(weight.dtype == torch.float32 for weight in weights):
        dtype = torch.float32

    def make() -> Operand:
        return _by_heads(weights, heads, dtype), _by_heads(biases, heads, dtype)

    return _operand(layers[0], ("joined", dtype, heads), (*weights, *biases), make)


def _parameters_of(layers: tuple[nn.Linear, ...]) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """The weights and the biases of layers; no biases if the first layer has none."""
    biases = tuple(layer.bias for layer in layers)
    return tuple(layer.weight for layer in layers), () if biases[0] is None else biases


def _by_heads(tensors: tuple[torch.Tensor, ...], heads: int, dtype: torch.dtype) -> torch.Tensor | None:
    """The weights or the biases of joined layers: first all rows of the first head. None if there are no tensors."""
    parts = [cast(tensor, dtype).unflatten(0, (heads, -1)) for tensor in tensors]
    return torch.cat(parts, dim=1).flatten(0, 1) if parts else None


def of_packed_layer(
    layer: nn.Linear, dtype: torch.dtype, parts: int, heads: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`of_joined_layers` of a layer whose weight has `parts` layers one after the other."""
    weight, bias = layer.weight, layer.bias
    if torch.is_grad_enabled() and weight.dtype == torch.float32:
        dtype = torch.float32

    def make() -> Operand:
        return _parts_by_heads(weight, parts, heads, dtype), _parts_by_heads(bias, parts, heads, dtype)

    return _operand(layer, ("by heads", dtype, heads), (weight, bias), make)


def _parts_by_heads(tensor: torch.Tensor | None, parts: int, heads: int, dtype: torch.dtype) -> torch.Tensor | None:
    """`_by_heads` of the parts of one tensor."""
    if tensor is None:
        return None
    return cast(tensor, dtype).unflatten(0, (parts, heads, -1)).transpose(0, 1).flatten(0, 2)


def of_factor(layer: nn.Conv2d | nn.Linear, factor: torch.Tensor) -> torch.Tensor:
    """The factors of the input of an 8-bit layer, on the device of the layer."""
    device = layer.weight.device
    if factor.device == device:
        return factor
    return _operand(layer, "factor", (layer.weight, factor), lambda: factor.to(device))


def of_int8(
    layers: tuple[nn.Conv2d | nn.Linear, ...],
    factor: torch.Tensor,
    norm: nn.BatchNorm2d | None = None,
    upsamples: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Weight, scales and bias as the 8-bit convolutions read them. Linear layers are 1×1 convolutions.

    layers: whose filters lie one after the other; several have no biases. factor: of their input, whose scales
    become part of the weight. norm: is folded in; the layer has no bias then. upsamples: for
    `ops.upsample_conv2d_int8`.
    """
    first = layers[0]
    weights = tuple(layer.weight for layer in layers)
    of_norm = () if norm is None else (norm.bias, norm.weight, norm.running_mean, norm.running_var)

    def make() -> Operand:
        weight, bias = torch.cat(weights) if len(weights) > 1 else weights[0], first.bias
        weight = weight if weight.dim() == 4 else weight[:, :, None, None]
        if norm is not None:
            weight, bias = ops.fold_batch_norm(weight, *of_norm, norm.eps, torch.float32)
        if upsamples:
            weight = ops.subpixel_weights(weight, torch.float32)
        return *ops.quantize_weight(weight.float() / factor.view(-1, 1, 1)), bias

    return _operand(first, ("int8", upsamples), (factor, *weights, *of_norm, first.bias), make)


def of_rows8(
    layer: nn.Linear | nn.Conv2d, rows_dtype: torch.dtype, bias_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Weight, scales and bias as `ops.linear_rows` reads them. The weight is rounded once, from its own dtype."""
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]

    def make() -> Operand:
        return *ops.quantize_rows(weight.flatten(1), dtype=rows_dtype), None if bias is None else cast(bias, bias_dtype)

    return _operand(layer, ("rows8", rows_dtype, bias_dtype), (weight, bias), make)


def of_bounded_mlp(
    layer: nn.Linear, norm_weight: torch.Tensor, norm_bias: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """What `ops.mlp_bounds` returns for the first layer of an MLP and the norm in front of it, 1 / y_scale, 1 / g_scale
    and the bias.
    """
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]

    def make() -> Operand:
        y_scale, q_weight, weight_scale, g_scale = ops.mlp_bounds(norm_weight, norm_bias, weight, bias)
        factors = 1 / y_scale, 1 / g_scale
        return y_scale, q_weight, weight_scale, g_scale, *factors, None if bias is None else cast(bias, torch.bfloat16)

    return _operand(layer, "bounded", (weight, bias, norm_weight, norm_bias), make)


def is_kept(layer: nn.Linear) -> bool:
    """Whether a layer keeps its operands in this call."""
    return ATTRIBUTE in layer.__dict__ and not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def of_joined_rows8(
    layers: tuple[nn.Linear, ...], rows_dtype: torch.dtype, bias_dtype: torch.dtype, heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`of_rows8` of layers that are joined as by `of_joined_layers`."""
    weights, biases = _parameters_of(layers)

    def make() -> Operand:
        weight = _by_heads(weights, heads, weights[0].dtype)
        return *ops.quantize_rows(weight, dtype=rows_dtype), _by_heads(biases, heads, bias_dtype)

    return _operand(layers[0], ("joined rows8", rows_dtype, bias_dtype, heads), (*weights, *biases), make)


def of_packed_rows8(
    layer: nn.Linear, rows_dtype: torch.dtype, bias_dtype: torch.dtype, parts: int, heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`of_rows8` of a layer that is packed as by `of_packed_layer`."""
    weight, bias = layer.weight, layer.bias

    def make() -> Operand:
        rows = ops.quantize_rows(_parts_by_heads(weight, parts, heads, weight.dtype), dtype=rows_dtype)
        return *rows, _parts_by_heads(bias, parts, heads, bias_dtype)

    return _operand(layer, ("packed rows8", rows_dtype, bias_dtype, heads), (weight, bias), make)


def _is_channels_last(weight: torch.Tensor) -> bool:
    return torch.compiler.is_compiling() or weight.is_contiguous(memory_format=torch.channels_last)


def _channels_last(weight: torch.Tensor) -> torch.Tensor:
    return weight if _is_channels_last(weight) else ops.channels_last(weight)


def _is_aligned(tensor: torch.Tensor) -> bool:
    return torch.compiler.is_compiling() or tensor.data_ptr() % 16 == 0


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that starts at a multiple of 16 bytes, which views into larger buffers may not."""
    return tensor if _is_aligned(tensor) else tensor.clone()
