"""Fast forwards for the blocks of diffusion transformers: UViT's and DiT's, this project's and the original's.

Residual sums are as precise as in the modules' own forwards, everything between them is in the dtype of the weights or
of an autocast, softmax attention too, which the original computes in float32.
"""

import torch
from torch import nn

from dcae_fast import ops

from .fusion import autocasts
from .module import FastModule, kind, plain

GELU = {"none": "gelu", "tanh": "gelu_tanh"}  # what the operators call the forms that PyTorch knows


class TransformerBlock(FastModule):
    dims = 3
    operators = ("layer_norm", "linear", "mlp", "packed_attention")


class Block(TransformerBlock):
    """UViT's. The long skip is the second half of a product, so that [x, skip] is never put together."""

    def fast_forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        dtype = compute_dtype(x)
        norms, layers = (self.norm1, self.norm2), (self.skip_linear,) if self.skip_linear is not None else ()
        if not (can_fuse(self, x) and all(norm.elementwise_affine for norm in norms) and are_layers(layers, x)):
            return self.eager(x, skip)
        if self.skip_linear is not None:
            of_x, of_skip = self.skip_linear.weight.to(dtype).split(x.shape[-1], dim=1)
            x = ops.linear(x.to(dtype), of_x, self.skip_linear.bias)
            x = ops.linear(skip.to(dtype), of_skip, residual=x)
        x, y = affine_norm(self.norm1, x, dtype)
        x = attention(self.attn, y, residual=x)
        x, y = affine_norm(self.norm2, x, dtype)
        return mlp(self.mlp, y, residual=x)


class DiTBlock(TransformerBlock):
    """The gated sum after the attention, the norm of it and its modulation are one pass."""

    def fast_forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        dtype, norms = compute_dtype(x), (self.norm1, self.norm2)
        if not can_fuse(self, x) or any(norm.elementwise_affine for norm in norms) or getattr(self, "post_norm", False):
            return self.eager(x, condition)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(self, condition, 6)
        x, y = ops.layer_norm(x, scale1, shift1, self.norm1.eps, dtype=dtype)
        branch = attention(self.attn, y)
        x, y = ops.layer_norm(x, scale2, shift2, self.norm2.eps, branch, gate1, dtype)
        return torch.addcmul(x, gate2[:, None], mlp(self.mlp, y))


class FinalLayer(TransformerBlock):
    """DiT's: modulated norm and linear layer."""

    operators = ("layer_norm", "linear")

    def fast_forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        norm, layer = self.norm_final, self.linear
        if type(norm) is not nn.LayerNorm or norm.elementwise_affine or not are_layers((layer,), x) or not plain(norm):
            return self.eager(x, condition)
        dtype = compute_dtype(x)
        shift, scale = modulation(self, condition, 2)
        _, y = ops.layer_norm(x, scale, shift, norm.eps, dtype=dtype)
        return ops.linear(y, layer.weight.to(dtype), layer.bias)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Of the products: autocast's, or x's, which the weights must have then."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def can_fuse(block: nn.Module, x: torch.Tensor) -> bool:
    """Whether norms, attention and MLP are those of a UViT or DiT, and nobody would miss a call of them."""
    attn, feed = block.attn, block.mlp
    return (
        kind(attn) == "Attention"
        and kind(feed) == "Mlp"
        and type(feed.act) is nn.GELU
        and getattr(attn, "scale", None) in (None, (x.shape[-1] // attn.num_heads) ** -0.5)
        and all(type(norm) is nn.LayerNorm and len(norm.normalized_shape) == 1 for norm in (block.norm1, block.norm2))
        and are_layers((attn.qkv, attn.proj, feed.fc1, feed.fc2), x)
        and has_no_more(attn, "qkv", "proj")
        and has_no_more(feed, "fc1", "act", "fc2")
        and plain(attn, feed, block.norm1, block.norm2, *attn.children(), *feed.children())
    )


def are_layers(layers: tuple[nn.Module, ...], x: torch.Tensor) -> bool:
    """Whether these are linear layers with weights of their own in the dtype of x, or of any where autocast is on."""
    return all(
        type(layer) is nn.Linear
        and type(layer.weight) in (nn.Parameter, torch.Tensor)
        and (autocasts(x) or layer.weight.dtype == x.dtype)
        and plain(layer)
        for layer in layers
    )


def has_no_more(module: nn.Module, *names: str) -> bool:
    """Whether all children but those of these names do nothing: dropout that is off, identities."""
    return all(
        name in names or type(child) is nn.Identity or (type(child) is nn.Dropout and not (child.training and child.p))
        for name, child in module.named_children()
    )


def affine_norm(norm: nn.LayerNorm, x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.layer_norm(x, norm.weight, norm.bias, norm.eps, dtype=dtype)


def modulation(module: nn.Module, condition: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
    """What adaLN makes of the condition [B, D]: `parts` tensors [B, D]."""
    return module.adaLN_modulation(condition).unflatten(1, (parts, -1)).transpose(0, 1).contiguous().unbind(0)


def attention(attn: nn.Module, y: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    qkv = ops.linear(y, attn.qkv.weight.to(y.dtype), attn.qkv.bias)
    out = ops.packed_attention(qkv, attn.num_heads)
    return ops.linear(out, attn.proj.weight.to(y.dtype), attn.proj.bias, residual)


def mlp(feed: nn.Module, y: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    w1, w2 = (layer.weight.to(y.dtype) for layer in (feed.fc1, feed.fc2))
    return ops.mlp(y, w1, feed.fc1.bias, w2, feed.fc2.bias, residual, GELU[feed.act.approximate])
