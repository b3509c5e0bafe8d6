"""DiT (arXiv 2212.09748) in the latent space of DC-AE, and SiT (arXiv 2401.08740), the same trained as a flow."""

import torch
from torch import nn

from .config import DiTConfig
from .transformer import (
    Attention,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    check_inputs,
    sinusoidal_embedding,
    unpatchify,
)


def position_table(hidden_size: int, side: int) -> torch.Tensor:
    """The fixed position embedding for a square of side² tokens, row by row: [1, side², D], float32.

    [sin(col · ω), cos(col · ω), sin(row · ω), cos(row · ω)],    ω_j = 10000^(-j / (D / 4)),    j = 0 ... D / 4 - 1
    """
    quarter = hidden_size // 4
    frequencies = 10000 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, D / 2]
    return torch.cat([line.repeat(side, 1), line.repeat_interleave(side, dim=0)], dim=1)[None].float()


class TimestepEmbedder(nn.Module):
    """Times [B] → [B, D]: 256 sines and cosines, then an MLP."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return self.mlp(sinusoidal_embedding(t, 256).to(self.mlp[0].weight.dtype))


class DiTBlock(nn.Module):
    """adaLN-Zero: attention and MLP, each on a norm shifted and scaled by the condition, and gated by it.

    x + gate · f(norm(x) · (1 + scale) + shift),    tokens x: [B, N, D], condition: [B, D]
    """

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, approximate="tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        modulation = self.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)  # of [B, 1, D] each
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    """linear(norm(x) · (1 + scale) + shift): tokens [B, N, D] and the condition [B, D] → [B, N, out_features]."""

    def __init__(self, hidden_size: int, out_features: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class DiT(nn.Module):
    """A transformer over patches, conditioned on time and label through its norms.

    DiT predicts noise and variance, at times 0 ... 999; SiT predicts data - noise, at times 0 (noise) ... 1 (data).
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        width, patch_size = config.hidden_size, config.patch_size
        self.out_channels = config.in_channels * (2 if config.learn_sigma else 1)
        self.x_embedder = PatchEmbed(config.in_channels, width, patch_size)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(config.num_classes, width, config.class_dropout_prob)
        self.pos_embed = nn.Parameter(position_table(width, config.input_size // patch_size), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(width, config.num_heads) for _ in range(config.depth))
        self.final_layer = FinalLayer(width, patch_size**2 * self.out_channels)
        self._initialise()

    def _initialise(self) -> None:
        """Xavier for linear layers and patches, N(0, 0.02) for times and labels; zero modulation, output and biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        for module in (self.t_embedder.mlp[0], self.t_embedder.mlp[2], self.y_embedder.embedding_table):
            nn.init.normal_(module.weight, std=0.02)
        for module in (*self.blocks, self.final_layer):
            nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Scaled latents, times and labels → the prediction, [B, C, h, w] as x; with learn_sigma, [B, 2C, h, w].

        With learn_sigma the first C channels are the noise, the others the variance; samplers may use only the first.
        x: [B, in_channels, input_size, input_size]. t: [B], real. y: [B], integers from 0 to num_classes; num_classes
        means no class. The values of y are not checked here (nn.Embedding raises IndexError on a CPU).
        Raises TypeError or ValueError for inputs of another type or shape.
        """
        check_inputs(self.config, x, t, y, fewest_channels=self.config.in_channels)
        x = self.x_embedder(x) + self.pos_embed
        condition = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, condition)
        return unpatchify(self.final_layer(x, condition), self.config.patch_size)
