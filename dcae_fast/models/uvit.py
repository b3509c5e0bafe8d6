"""UViT (arXiv 2209.12152) in the latent space of DC-AE, and USiT: the same network, trained as a flow."""

import torch
import torch.nn.functional as F
from torch import nn

from .config import UViTConfig
from .transformer import (
    Attention,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    check_inputs,
    sinusoidal_embedding,
    unpatchify,
)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). With skip, first x = linear([x, skip]). Tokens [B, N, D]."""

    def __init__(self, hidden_size: int, num_heads: int, skip: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size)
        self.attn = Attention(hidden_size, num_heads, qkv_bias=False)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.mlp = Mlp(hidden_size, approximate="none")
        self.skip_linear = nn.Linear(2 * hidden_size, hidden_size) if skip else None

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """A transformer over [label, time, patches ...] whose later blocks also see the earlier blocks' outputs.

    UViT predicts noise, at times 1 ... 1000; USiT predicts data - noise, at times 0 (noise) ... 1 (data).
    """

    def __init__(self, config: UViTConfig):
        super().__init__()
        self.config = config
        width, heads, half = config.hidden_size, config.num_heads, config.depth // 2
        self.patch_embed = PatchEmbed(config.in_channels, width, config.patch_size)
        self.label_emb = LabelEmbedder(config.num_classes, width, config.class_dropout_prob)
        self.pos_embed = nn.Parameter(torch.empty(1, 2 + config.tokens, width))
        self.in_blocks = nn.ModuleList(Block(width, heads) for _ in range(half))
        self.mid_block = Block(width, heads)
        self.out_blocks = nn.ModuleList(Block(width, heads, skip=True) for _ in range(half))
        self.norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, config.patch_size**2 * config.in_channels)
        self._initialise()

    def _initialise(self) -> None:
        """Linear layers and position table N(0, 0.02), biases 0; the rest as in PyTorch, so that labels are N(0, 1)."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Scaled latents, times and labels → the prediction, [B, C, h, w] as x.

        x: [B, C, input_size, input_size]; C = in_channels, or from 1 to in_channels if adaptive. t: [B], real.
        y: [B], integers from 0 to num_classes; num_classes means no class. The values are not checked here
        (nn.Embedding raises IndexError on a CPU). Raises TypeError or ValueError for inputs of another type or shape.
        """
        in_channels, patch_size = self.config.in_channels, self.config.patch_size
        check_inputs(self.config, x, t, y, fewest_channels=1 if self.config.adaptive else in_channels)
        channels = x.shape[1]
        if channels < in_channels:  # absent channels are zeros; predictions for them are cut off below
            x = F.pad(x, (0, 0, 0, 0, 0, in_channels - channels))
        time = sinusoidal_embedding(t, self.config.hidden_size).to(self.pos_embed.dtype)
        x = torch.cat([self.label_emb(y)[:, None], time[:, None], self.patch_embed(x)], dim=1)
        x = x + self.pos_embed
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        x = self.decoder_pred(self.norm(x))
        return unpatchify(x[:, 2:, : channels * patch_size**2], patch_size)
