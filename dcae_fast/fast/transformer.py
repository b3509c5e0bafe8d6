"""Fast forwards for the blocks of diffusion transformers: UViT's and DiT's, this project's and the original's.

Residual sums are as precise as in the modules' own forwards, everything between them is in the dtype of the weights or
of an autocast, softmax attention too.
"""

import torch
from torch import nn

from dcae_fast import ops
from dcae_fast.models.transformer import check_inputs, unpatchify

from .fusion import autocasts
from .module import FastModule, kind, plain
from .network import Network

GELU = {"none": "gelu", "tanh": "gelu_tanh"}  # what the operators call the forms that PyTorch knows


class TransformerBlock(FastModule):
    dims = 3
    operators = ("layer_norm", "linear", "mlp", "packed_attention")  # alone, or in the halves of a block


class Block(TransformerBlock):
    """UViT's."""

    def fast_forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        if not (can_fuse(self, x) and is_affine(self.norm1) and is_affine(self.norm2) and plain(self.skip_linear)):
            return self.eager(x, skip)
        if self.skip_linear is not None:
            x = long_skip(self.skip_linear, x, skip)
        _, x = attention(self.attn, x, self.norm1.weight, self.norm1.bias, self.norm1.eps, residual=True)
        return mlp(self.mlp, x, self.norm2.weight, self.norm2.bias, self.norm2.eps, residual=True)[1]


class DiTBlock(TransformerBlock):
    """A gated sum, the norm of it and its modulation are one pass; the block's last sum waits for the next norm."""

    def fast_forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        if not self.fuses(x):
            return self.eager(x, condition)
        x, branch, gate = self.run(x, None, None, condition)
        return x + gate[:, None] * branch

    def fuses(self, x: torch.Tensor) -> bool:
        affine = self.norm1.elementwise_affine or self.norm2.elementwise_affine
        return can_fuse(self, x) and not affine and not getattr(self, "post_norm", False)

    def run(self, x, branch, gate, condition) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The block on x + gate · branch, or on x; its result in the same form."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(self, condition, 6)
        x, branch = attention(self.attn, x, scale1, shift1, self.norm1.eps, branch, gate)
        return *mlp(self.mlp, x, scale2, shift2, self.norm2.eps, branch, gate1), gate2


class FinalLayer(TransformerBlock):
    """DiT's: modulated norm and linear layer."""

    operators = ("layer_norm", "linear")

    def fast_forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return self.run(x, None, None, condition) if self.fuses(x) else self.eager(x, condition)

    def fuses(self, x: torch.Tensor) -> bool:
        norm = self.norm_final
        known = is_ordinary(x) and type(norm) is nn.LayerNorm and not norm.elementwise_affine
        return known and plain(norm, self.linear)

    def run(self, x, branch, gate, condition) -> torch.Tensor:
        """The layer on x + gate · branch, or on x."""
        shift, scale = modulation(self, condition, 2)
        dtype = input_dtype(self.linear, x)
        _, y = ops.layer_norm(x, scale, shift, self.norm_final.eps, branch, gate, dtype)
        return linear(self.linear, y)


class DiT(Network):
    """This project's, whose blocks leave their last sums to the norms of the next ones."""

    def fast_forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        check_inputs(self.config, x, t, y, fewest_channels=self.config.in_channels)
        tokens, layers = self.x_embedder(x) + self.pos_embed, (*self.blocks, self.final_layer)
        if not all(
            isinstance(layer, DiTBlock | FinalLayer) and plain(layer) and layer.fuses(tokens) for layer in layers
        ):
            return self.eager(x, t, y)
        condition = self.t_embedder(t) + self.y_embedder(y)
        branch = gate = None
        for block in self.blocks:
            tokens, branch, gate = block.run(tokens, branch, gate, condition)
        return unpatchify(self.final_layer.run(tokens, branch, gate, condition), self.config.patch_size)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Of the products: autocast's, or x's, which the weights must have then."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def input_dtype(layer: nn.Module, x: torch.Tensor) -> torch.dtype:
    """In which a norm of x is handed to a layer; to one that is called, as the plain norm hands it over."""
    if is_linear(layer, x):
        return compute_dtype(x)
    return torch.float32 if autocasts(x) else x.dtype


def is_ordinary(tensor: torch.Tensor) -> bool:
    """Whether this is of no subclass: of one that is distributed or quantised, for example."""
    return type(tensor) in (nn.Parameter, torch.Tensor)


def can_fuse(block: nn.Module, x: torch.Tensor) -> bool:
    """Whether norms, attention and MLP are those of a UViT or DiT, and nobody would miss a call of them."""
    attn, feed = block.attn, block.mlp
    return (
        is_ordinary(x)
        and kind(attn) == "Attention"
        and kind(feed) == "Mlp"
        and type(feed.act) is nn.GELU
        and getattr(attn, "scale", None) in (None, (x.shape[-1] // attn.num_heads) ** -0.5)
        and all(type(norm) is nn.LayerNorm and len(norm.normalized_shape) == 1 for norm in (block.norm1, block.norm2))
        and has_no_more(attn, "qkv", "proj")
        and has_no_more(feed, "fc1", "act", "fc2")
        and plain(attn, feed, block.norm1, block.norm2, *attn.children(), *feed.children())
    )


def is_linear(layer: nn.Module, x: torch.Tensor) -> bool:
    """Whether this is a linear layer with weights of its own in the dtype of x, or of any where autocast is on."""
    return type(layer) is nn.Linear and is_ordinary(layer.weight) and (autocasts(x) or layer.weight.dtype == x.dtype)


def are_linear(first: nn.Module, second: nn.Module, x: torch.Tensor) -> bool:
    return is_linear(first, x) and is_linear(second, x)


def is_affine(norm: nn.Module) -> bool:
    """Whether this is a layer norm with weight and bias."""
    return type(norm) is nn.LayerNorm and norm.weight is not None and norm.bias is not None


def has_no_more(module: nn.Module, *names: str) -> bool:
    """Whether all children but those of these names do nothing: dropout that is off, identities."""
    return all(
        name in names or type(child) is nn.Identity or (type(child) is nn.Dropout and not (child.training and child.p))
        for name, child in module.named_children()
    )


def long_skip(layer: nn.Module, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    """layer([x, skip]) in one product: of two the first would be rounded. [x, skip] has the dtype of the product."""
    if not is_linear(layer, x):
        return layer(torch.cat([x, skip], dim=-1))
    dtype, width = compute_dtype(x), x.shape[-1]
    if torch.is_grad_enabled():
        return linear(layer, torch.cat([x.to(dtype), skip.to(dtype)], dim=-1))
    both = x.new_empty(*x.shape[:-1], 2 * width, dtype=dtype)
    both[..., :width], both[..., width:] = x, skip
    return linear(layer, both)


def modulation(module: nn.Module, condition: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
    """What adaLN makes of the condition [B, D]: `parts` tensors [B, D]."""
    return module.adaLN_modulation(condition).unflatten(1, (parts, -1)).transpose(0, 1).contiguous().unbind(0)


def weight_of(layer: nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """As operators take it: in the dtype of the product, or in float32, so that its gradient is not rounded either."""
    trains = torch.is_grad_enabled() and layer.weight.dtype == torch.float32
    return layer.weight if trains else layer.weight.to(dtype)


def linear(layer: nn.Module, y: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """layer(y) + residual. A layer of another kind is called: LoRA's, a quantised one."""
    if is_linear(layer, y):
        dtype = compute_dtype(y)
        return ops.linear(y.to(dtype), weight_of(layer, dtype), layer.bias, residual)
    y = layer(y)
    return y if residual is None else y + residual


def attention(
    attn: nn.Module, x, scale, shift, eps: float, branch=None, gate=None, residual: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(s, attn(norm(s))), with s added to it if `residual`, where s is x + gate · branch, or x."""
    dtype = input_dtype(attn.qkv, x)
    dim = attn.qkv.out_features // (3 * attn.num_heads)
    if are_linear(attn.qkv, attn.proj, x) and ops.is_for_few_tokens(dtype, x.shape[1], dim, x.device):
        layers = weight_of(attn.qkv, dtype), attn.qkv.bias, weight_of(attn.proj, dtype), attn.proj.bias, attn.num_heads
        return ops.norm_attention(x, scale, shift, eps, *layers, branch, gate, dtype, residual)
    s, y = ops.layer_norm(x, scale, shift, eps, branch, gate, dtype)
    y = ops.packed_attention(linear(attn.qkv, y), attn.num_heads)
    return s, linear(attn.proj, y, s if residual else None)


def mlp(
    feed: nn.Module, x, scale, shift, eps: float, branch=None, gate=None, residual: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(s, feed(norm(s))) in the same way."""
    dtype = input_dtype(feed.fc1, x)
    if are_linear(feed.fc1, feed.fc2, x):
        layers = weight_of(feed.fc1, dtype), feed.fc1.bias, weight_of(feed.fc2, dtype), feed.fc2.bias
        return ops.norm_mlp(x, scale, shift, eps, *layers, branch, gate, dtype, residual, GELU[feed.act.approximate])
    s, y = ops.layer_norm(x, scale, shift, eps, branch, gate, dtype)
    return s, linear(feed.fc2, feed.act(linear(feed.fc1, y)), s if residual else None)
