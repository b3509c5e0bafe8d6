"""UViT, USiT, DiT and SiT: this project's and the original's.

Residual sums are as precise as in the modules' own forwards. Everything between two sums is computed in the dtype of
the weights or of autocast, including softmax attention.

Submodules and parameters are read from `_modules` and `_parameters`. Reading them as attributes takes longer, for a
whole block, than launching its kernels.
"""

import torch
import torch.nn.functional as F
from torch import nn

from dcae_fast import ops
from dcae_fast.models.transformer import check_inputs, unpatchify
from dcae_fast.ops._private import unobserved

from .. import operands, rows8
from ..call import Network
from ..fusion import autocasts, compute_dtype
from ..module import FastModule, has_ordinary_weights, kind, plain
from ..registry import register

GELU = {"none": "gelu", "tanh": "gelu_tanh"}  # PyTorch's names for forms of GELU → the operators' names


class PatchEmbed(FastModule):
    """This project's patch embedding, computed as a linear layer on patches: its convolution reads every pixel once.

    cuDNN's convolution would convert the layout of the image twice and add the bias in a separate pass.
    """

    attributes = ("proj",)

    @staticmethod
    def reason_not_fast(embedding: nn.Module) -> str:
        return "" if type(embedding.proj) is nn.Conv2d else f"its convolution is {type(embedding.proj).__name__}"

    def fast_forward(self, x: torch.Tensor) -> torch.Tensor:
        proj = self._modules["proj"]
        if self.reason_not_fast(self) or not plain(proj) or not has_dtype(proj, x):
            return self.eager(x)
        weight, bias = operands.of_layer(proj, compute_dtype(x))
        patches = (
            F.pixel_unshuffle(x, proj.kernel_size[0]).flatten(2).transpose(1, 2)
        )  # in the order of the weight's [C, p, p]
        return F.linear(patches.contiguous(), weight.flatten(1), bias)  # adds the bias within the product


class TransformerBlock(FastModule):
    dims = 3
    operators = ("layer_norm", "linear", "mlp", "packed_attention")  # by themselves or within the halves of a block

    def rows8_layers(self) -> tuple[nn.Module | None, ...]:
        attn, feed, skip_linear = map(self._modules.get, ("attn", "mlp", "skip_linear"))
        return skip_linear, *map(attn._modules.get, ("qkv", "proj")), *map(feed._modules.get, ("fc1", "fc2"))


class Block(TransformerBlock):
    """A block of UViT."""

    operators = (*TransformerBlock.operators, "concatenate")
    attributes = ("norm1", "attn", "norm2", "mlp")
    optional = ("skip_linear",)

    @staticmethod
    def reason_not_fast(block: nn.Module) -> str:
        norms = block._modules["norm1"], block._modules["norm2"]
        return unknown_block(block) or ("" if all(map(is_affine, norms)) else "a norm has no weight or no bias")

    def fast_forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        modules = self._modules
        norm1, norm2, skip_linear = modules["norm1"], modules["norm2"], modules.get("skip_linear")
        if self.reason_not_fast(self) or not may_fuse(self) or not unobserved(skip_linear):
            return self.eager(x, skip)
        if skip_linear is not None:
            x = long_skip(skip_linear, x, skip)
        _, x = attention(modules["attn"], x, *parameters_of(norm1), norm1.eps, residual=True)
        return mlp(modules["mlp"], x, *parameters_of(norm2), norm2.eps, residual=True)[1]


class DiTBlock(TransformerBlock):
    """A gated sum, its norm and the modulation are one pass. The last sum of a block is left to the next norm."""

    attributes = ("norm1", "attn", "norm2", "mlp", "adaLN_modulation")

    @staticmethod
    def reason_not_fast(block: nn.Module) -> str:
        if vars(block).get("post_norm"):
            return "its norms come after attention and MLP (post_norm)"
        norms = block._modules["norm1"], block._modules["norm2"]
        return unknown_block(block) or ("a norm has weights" if any(norm.elementwise_affine for norm in norms) else "")

    def fast_forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        if not self.fuses():
            return self.eager(x, condition)
        x, branch, gate = self.run(x, None, None, condition)
        return x + gate[:, None] * branch

    def fuses(self) -> bool:
        return not self.reason_not_fast(self) and may_fuse(self)

    def run(self, x, branch, gate, condition) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The block applied to x + gate · branch, or to x. Returns the result in the same form."""
        modules = self._modules
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(self, condition, 6)
        x, branch = attention(modules["attn"], x, scale1, shift1, modules["norm1"].eps, branch, gate)
        return *mlp(modules["mlp"], x, scale2, shift2, modules["norm2"].eps, branch, gate1), gate2


class FinalLayer(TransformerBlock):
    """The last layer of DiT: modulated norm and linear layer. It stays exact if other layers compute in 8 bit."""

    operators = ("layer_norm", "linear")
    attributes = ("norm_final", "linear", "adaLN_modulation")

    @staticmethod
    def reason_not_fast(layer: nn.Module) -> str:
        norm = layer._modules["norm_final"]
        known = type(norm) is nn.LayerNorm and not norm.elementwise_affine
        return "" if known else "its norm is not a LayerNorm without weights"

    def fast_forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return self.run(x, None, None, condition) if self.fuses() else self.eager(x, condition)

    def rows8_layers(self) -> tuple[nn.Module | None, ...]:
        return ()

    def fuses(self) -> bool:
        modules = self._modules
        return not self.reason_not_fast(self) and unobserved(modules["norm_final"], modules["linear"])

    def run(self, x, branch, gate, condition) -> torch.Tensor:
        """The layer applied to x + gate · branch, or to x."""
        shift, scale = modulation(self, condition, 2)
        dtype = input_dtype(self.linear, x)
        _, y = ops.layer_norm(x, scale, shift, self.norm_final.eps, branch, gate, dtype)
        return linear(self.linear, y)


class DiT(Network):
    """This project's DiT. Each block leaves its last sum to the norm of the next block."""

    attributes = ("config", "x_embedder", "t_embedder", "y_embedder", "pos_embed", "blocks", "final_layer")

    def fast_forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        check_inputs(self.config, x, t, y, fewest_channels=self.config.in_channels)
        table, layers = self.pos_embed, (*self.blocks, self.final_layer)
        if not ops.is_ordinary(table) or not all(
            isinstance(layer, DiTBlock | FinalLayer) and plain(layer) and layer.fuses() for layer in layers
        ):
            return self.eager(x, t, y)
        tokens = self.x_embedder(x) + table
        condition = self.t_embedder(t) + self.y_embedder(y)
        branch = gate = None
        for block in self.blocks:
            tokens, branch, gate = block.run(tokens, branch, gate, condition)
        return unpatchify(self.final_layer.run(tokens, branch, gate, condition), self.config.patch_size)


class OriginalNetwork(FastModule):
    """The original's UViT, DiT or SiT. Its forward is the training loss. The network itself is another method, which
    makes a table of frequencies on the CPU, so that it cannot be captured as a CUDA graph.
    """

    @staticmethod
    def reason_not_fast(network: nn.Module) -> str:
        return "only its blocks are fast; for cuda_graphs, DCAEDiffusion.from_pretrained loads its checkpoint"


def input_dtype(layer: nn.Module, x: torch.Tensor) -> torch.dtype:
    """The dtype in which a norm passes its result to a layer. A layer that is called gets the plain norm's dtype."""
    if is_linear(layer, x):
        return compute_dtype(x)
    return torch.float32 if autocasts(x) else x.dtype


def unknown_block(block: nn.Module) -> str:
    """How norms, attention or MLP of a block differ from the blocks of UViT and DiT; empty if they do not."""
    attn, feed, *norms = map(block._modules.get, ("attn", "mlp", "norm1", "norm2"))
    if not all(type(norm) is nn.LayerNorm and len(norm.normalized_shape) == 1 for norm in norms):
        return "a norm is not a LayerNorm over channels"
    if kind(attn) != "Attention" or kind(feed) != "Mlp":
        return f"attention and MLP are {type(attn).__name__} and {type(feed).__name__}"
    if type(feed._modules.get("act")) is not nn.GELU:
        return f"its activation is {type(feed._modules.get('act')).__name__}"
    if vars(attn).get("scale") not in (None, (norms[0].normalized_shape[0] // attn.num_heads) ** -0.5):
        return "its attention has another scale"
    known = has_no_more(attn, "qkv", "proj") and has_no_more(feed, "fc1", "act", "fc2")
    if attn._parameters or attn._buffers or not known:
        return "its attention or MLP has additional layers or parameters"
    return ""


def may_fuse(block: nn.Module) -> bool:
    """Whether the submodules of a block may be computed without being called: no hooks and no active dropout."""
    attn, feed, *norms = map(block._modules.get, ("attn", "mlp", "norm1", "norm2"))
    inner = *attn._modules.values(), *feed._modules.values()
    dropout = (each for each in inner if type(each) is nn.Dropout)
    return unobserved(attn, feed, *norms, *inner) and not any(each.training and each.p for each in dropout)


def is_linear(layer: nn.Module, x: torch.Tensor) -> bool:
    """Whether this is a linear layer that satisfies `has_dtype`."""
    return type(layer) is nn.Linear and has_dtype(layer, x)


def has_dtype(layer: nn.Module, x: torch.Tensor) -> bool:
    """Whether the layer has a weight that is an ordinary tensor in the dtype of x, or in any dtype under autocast."""
    weight = layer._parameters.get("weight")  # None if it is computed, as by a parametrization
    return weight is not None and (weight.dtype == x.dtype or autocasts(x)) and has_ordinary_weights(layer)


def are_linear(first: nn.Module, second: nn.Module, x: torch.Tensor) -> bool:
    return is_linear(first, x) and is_linear(second, x)


def is_affine(norm: nn.Module) -> bool:
    """Whether this is a LayerNorm with weight and bias."""
    return type(norm) is nn.LayerNorm and all(map(ops.is_ordinary, parameters_of(norm)))


def has_no_more(module: nn.Module, *names: str) -> bool:
    """Whether all children with other names are identities or dropout."""
    others = (type(child) for name, child in module._modules.items() if name not in names)
    return {nn.Identity, nn.Dropout, type(None)}.issuperset(others)


def long_skip(layer: nn.Module, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    """layer([x, skip]) in one product: with two products the first would be rounded."""
    if not is_linear(layer, x):
        return layer(torch.cat([x, skip], dim=-1))
    dtype = compute_dtype(x)
    if rows8.infers(layer, x, dtype):
        return rows8.linear(layer, ops.concatenate_rows(x, skip, rows8.type_of(layer)), dtype)
    return linear(layer, ops.concatenate(x, skip, dtype))


def modulation(module: nn.Module, condition: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
    """The `parts` tensors [B, D] that adaLN computes from the condition [B, D].

    Compiled code calls the operator of the linear layer in inference, so that autocast keeps the casts of its weight.
    """
    layers = module._modules["adaLN_modulation"]
    if torch.compiler.is_compiling() and not torch.is_grad_enabled() and is_silu_and_linear(layers):
        y = linear(layers[1], F.silu(condition))
    else:
        y = layers(condition)
    return y.unflatten(1, (parts, -1)).transpose(0, 1).contiguous().unbind(0)


def is_silu_and_linear(layers: nn.Module) -> bool:
    """Whether these are SiLU and a linear layer, one after the other, which may be computed without calling them."""
    parts = tuple(layers._modules.values())
    return type(layers) is nn.Sequential and [*map(type, parts)] == [nn.SiLU, nn.Linear] and unobserved(layers, *parts)


def parameters_of(layer: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Weight and bias."""
    return layer._parameters.get("weight"), layer._parameters.get("bias")


def linear(layer: nn.Module, y: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """layer(y) + residual. A layer that is not a plain linear layer, such as LoRA's or a quantised one, is called.

    With gradients, a layer that trains in 8 bit computes so.
    """
    if is_linear(layer, y):
        dtype = compute_dtype(y)
        weight, bias = operands.of_layer(layer, dtype, None if residual is None else residual.dtype)
        if precision := rows8.trains(layer, y, dtype):
            return ops.linear_fp8(y.to(dtype), weight, bias, residual, precision == rows8.EVERYTHING)
        return ops.linear(y.to(dtype), weight, bias, residual)
    y = layer(y)
    return y if residual is None else y + residual


def linear_of(
    layer: nn.Module, y: torch.Tensor | rows8.Rows, dtype: torch.dtype, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """`linear`, in 8 bit if the layer computes so. y: tokens of this dtype, or 8-bit rows if the layer takes them."""
    if isinstance(y, tuple) or rows8.infers(layer, y, dtype):
        return rows8.linear(layer, y, dtype, residual)
    return linear(layer, y, residual)


def mlp_of(fc2: nn.Module, act: nn.GELU, h: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """fc2(act(h)) + residual, in 8 bit if fc2 computes so."""
    if rows8.infers(fc2, h, h.dtype):
        return rows8.linear(fc2, h, h.dtype, residual, GELU[act.approximate])
    return linear(fc2, act(h), residual)


def attention(
    attn: nn.Module, x, scale, shift, eps: float, branch=None, gate=None, residual: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(s, attn(norm(s))) for s = x + gate · branch, or s = x. residual: adds s to the second."""
    qkv, proj, num_heads = attn._modules["qkv"], attn._modules["proj"], attn.num_heads
    fuses = are_linear(qkv, proj, x)
    dtype = compute_dtype(x) if fuses else input_dtype(qkv, x)
    if rows8.infers(qkv, x, dtype) or rows8.infers(proj, x, dtype):
        s, y = rows8.norm(qkv, x, scale, shift, eps, branch, gate, dtype)
        y = ops.packed_attention(linear_of(qkv, y, dtype), num_heads)
        return s, linear_of(proj, y, dtype, s if residual else None)
    few = fuses and ops.is_for_few_tokens(dtype, x.shape[1], qkv.out_features // (3 * num_heads), x.device)
    precision, same = rows8.both_train(qkv, proj, x, dtype)
    if few and same:
        layers = *operands.of_layer(qkv, dtype), *operands.of_layer(proj, dtype, x.dtype if residual else None)
        options = num_heads, branch, gate, dtype, residual
        if precision:
            everything = precision == rows8.EVERYTHING
            return ops.norm_attention_fp8(x, scale, shift, eps, *layers, *options, everything)
        return ops.norm_attention(x, scale, shift, eps, *layers, *options)
    s, y = ops.layer_norm(x, scale, shift, eps, branch, gate, dtype)
    y = ops.packed_attention(linear(qkv, y), num_heads)
    return s, linear(proj, y, s if residual else None)


def mlp(
    feed: nn.Module, x, scale, shift, eps: float, branch=None, gate=None, residual: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(s, feed(norm(s))), as in `attention`."""
    fc1, act, fc2 = map(feed._modules.get, ("fc1", "act", "fc2"))
    fuses = are_linear(fc1, fc2, x)
    dtype = compute_dtype(x) if fuses else input_dtype(fc1, x)
    if rows8.knows_bounds(fc1, fc2, x, scale, branch, dtype):
        return x, rows8.bounded_mlp(fc1, fc2, x, scale, shift, eps, dtype, x if residual else None)
    if rows8.infers(fc1, x, dtype) or rows8.infers(fc2, x, dtype):
        s, y = rows8.norm(fc1, x, scale, shift, eps, branch, gate, dtype)
        return s, mlp_of(fc2, act, linear_of(fc1, y, dtype), s if residual else None)
    precision, same = rows8.both_train(fc1, fc2, x, dtype)
    if fuses and same:
        layers = *operands.of_layer(fc1, dtype), *operands.of_layer(fc2, dtype, x.dtype if residual else None)
        options = branch, gate, dtype, residual, GELU[act.approximate]
        if precision:
            return ops.norm_mlp_fp8(x, scale, shift, eps, *layers, *options, precision == rows8.EVERYTHING)
        return ops.norm_mlp(x, scale, shift, eps, *layers, *options)
    s, y = ops.layer_norm(x, scale, shift, eps, branch, gate, dtype)
    return s, linear(fc2, act(linear(fc1, y)), s if residual else None)


UVIT, DIT = {"Block": Block}, {"DiTBlock": DiTBlock, "FinalLayer": FinalLayer}

# this project
register("models.transformer", {"PatchEmbed": PatchEmbed})
register("models.uvit", UVIT | {"UViT": Network})
register("models.dit", DIT | {"DiT": DiT})
# the original
for package in ("c2icore.diffusioncore", "diffusioncore"):
    register(f"{package}.models.uvit", UVIT | {"UViT": OriginalNetwork})
    register(f"{package}.models.dit", DIT | {"DiT": OriginalNetwork})
