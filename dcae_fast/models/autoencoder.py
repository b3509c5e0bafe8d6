"""The deep compression autoencoder (DC-AE, arXiv 2410.10733; 1.5: arXiv 2508.00413), readable from top to bottom."""

import os

import torch
from torch import nn

from . import blocks, checkpoint, kinds, zoo
from .config import CoderConfig, DCAEConfig

DOWN_SAMPLERS = {
    "pixel": blocks.ConvPixelUnshuffleDownSampleLayer,
    "conv": lambda in_channels, out_channels: blocks.ConvLayer(in_channels, out_channels, stride=2),
}
UP_SAMPLERS = {
    "pixel": blocks.ConvPixelShuffleUpSampleLayer,
    "interpolate": blocks.InterpolateConvUpSampleLayer,
}


def stage_block(config: CoderConfig, stage: int) -> nn.Module:
    block, width = config.block[stage], config.width[stage]
    if block == "ResBlock":
        return blocks.ResidualBlock(blocks.ResBlock(width, config.norm[stage], config.act[stage]), nn.Identity())
    return blocks.EfficientViTBlock(width, scales={"EViTGLU": (), "EViTS5GLU": (5,)}[block])


def down_sample(resample: str, in_channels: int, out_channels: int) -> nn.Module:
    shortcut = blocks.PixelUnshuffleChannelAveragingDownSampleLayer(in_channels, out_channels, factor=2)
    return blocks.ResidualBlock(DOWN_SAMPLERS[resample](in_channels, out_channels), shortcut)


def up_sample(resample: str, in_channels: int, out_channels: int) -> nn.Module:
    shortcut = blocks.ChannelDuplicatingPixelShuffleUpSampleLayer(in_channels, out_channels, factor=2)
    return blocks.ResidualBlock(UP_SAMPLERS[resample](in_channels, out_channels), shortcut)


class Encoder(nn.Module):
    """Image [B, 3, H, W] → latent [B, c, H / f, W / f]. The stages run from full resolution down.

    If stage 0 has no blocks, the stem maps directly to the width and resolution of stage 1, without a shortcut.
    """

    def __init__(self, config: DCAEConfig):
        super().__init__()
        coder, latent = config.encoder, config.latent_channels
        if coder.depth[0] > 0:
            self.project_in = blocks.ConvLayer(3, coder.width[0])
        else:
            self.project_in = DOWN_SAMPLERS[coder.resample](3, coder.width[1])
        stages = []
        for stage, depth in enumerate(coder.depth):
            ops = [stage_block(coder, stage) for _ in range(depth)]
            if depth > 0 and stage + 1 < len(coder.depth):
                ops.append(down_sample(coder.resample, coder.width[stage], coder.width[stage + 1]))
            stages.append(blocks.OpSequential(ops))
        self.stages = nn.ModuleList(stages)
        conv = blocks.AdaptiveOutputConvLayer if config.adaptive else blocks.ConvLayer
        self.project_out = blocks.OpSequential([conv(coder.width[-1], latent)])
        if coder.shortcut:
            shortcut = blocks.PixelUnshuffleChannelAveragingDownSampleLayer(coder.width[-1], latent, factor=1)
            self.project_out = blocks.ResidualBlock(self.project_out, shortcut)

    def forward(
        self, x: torch.Tensor, latent_channels: int | list[int] | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        x = self.project_in(x)
        for stage in self.stages:
            x = stage(x)
        return self.project_out(x) if latent_channels is None else self.partial_latents(x, latent_channels)

    def partial_latents(self, x: torch.Tensor, latent_channels: int | list[int]) -> torch.Tensor | list[torch.Tensor]:
        """The first channels of the latent, or a list of latents for a list of numbers. x: the stages' output."""
        head = self.project_out.op_list[0]
        if isinstance(latent_channels, int):
            return head(x, latent_channels)
        return [head(x, channels) for channels in latent_channels]


class Decoder(nn.Module):
    """Latent [B, c, h, w] → image [B, 3, h * f, w * f]. The stages are numbered as in the encoder and run in reverse.

    If stage 0 has no blocks, the head is an up-sampling layer from the width of stage 1, without a shortcut.
    """

    def __init__(self, config: DCAEConfig):
        super().__init__()
        coder, latent = config.decoder, config.latent_channels
        conv = blocks.AdaptiveInputConvLayer if config.adaptive else blocks.ConvLayer
        self.project_in = conv(latent, coder.width[-1])
        if coder.shortcut:
            shortcut = blocks.ChannelDuplicatingPixelShuffleUpSampleLayer(latent, coder.width[-1], factor=1)
            self.project_in = blocks.ResidualBlock(self.project_in, shortcut)
        stages = []
        for stage, depth in enumerate(coder.depth):
            ops = [stage_block(coder, stage) for _ in range(depth)]
            if depth > 0 and stage + 1 < len(coder.depth):
                ops.insert(0, up_sample(coder.resample, coder.width[stage + 1], coder.width[stage]))
            stages.append(blocks.OpSequential(ops))
        self.stages = nn.ModuleList(stages)
        width = coder.width[0] if coder.depth[0] > 0 else coder.width[1]
        head = blocks.ConvLayer(width, 3) if coder.depth[0] > 0 else UP_SAMPLERS[coder.resample](width, 3)
        self.project_out = blocks.OpSequential([blocks.RMSNorm2d(width), blocks.ACTIVATIONS[coder.head_act](), head])

    def forward(self, z: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(z, list):
            return [self.forward(latent) for latent in z]
        z = self.project_in(z)
        for stage in reversed(self.stages):
            z = stage(z)
        return self.project_out(z)


class DCAE(nn.Module):
    """A deterministic autoencoder: `encode` returns the latent, not a distribution.

    Images are in [-1, 1]. Neither `encode` nor `decode` applies `scaling_factor`. Diffusion models see
    `encode(x) * scaling_factor`.
    """

    def __init__(self, config: DCAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @classmethod
    def from_name(cls, name: str) -> "DCAE":
        """The architecture with this name (see `zoo.autoencoder_names`), with random weights."""
        kinds.check_name(kinds.AUTOENCODER, name)
        return cls(zoo.autoencoder_config(name))

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        config: DCAEConfig | None = None,
    ) -> "DCAE":
        """Load a trained model: on the CPU, in evaluation mode, with float32 parameters whatever the file's dtype.

        source: a folder or weight file, a model name (see `zoo.autoencoder_names`), or a Hugging Face repository, tried
        in this order. revision, cache_dir, local_files_only: as in huggingface_hub, for repositories only. config:
        replaces the checkpoint's configuration. Raises `weights.CheckpointError`.
        """
        return checkpoint.load(
            cls, source, config=config, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only
        )

    def save_pretrained(self, folder: str | os.PathLike, layout: str = "original") -> None:
        """Write weights and config.json to a folder, for `from_pretrained` and the library that uses the layout.

        layout: "original" (DC-Gen, efficientvit) or "diffusers" (`AutoencoderDC`, which has no partial latents).
        Each file is replaced atomically. Raises ValueError if the layout cannot describe this model.
        """
        checkpoint.save(self, folder, layout)

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels of the image per position of the latent, along each side."""
        return 2 ** (len(self.config.encoder.depth) - 1)

    @property
    def scaling_factor(self) -> float | None:
        return self.config.scaling_factor

    def encode(
        self, x: torch.Tensor, latent_channels: int | list[int] | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """Image [B, 3, H, W] in [-1, 1] → latent [B, c, H / f, W / f].

        latent_channels: for adaptive models only; n for the first n channels, or a list for one latent per number.
        Raises TypeError unless x is floating point, ValueError unless it is [B, 3, H, W] with H and W multiples of f.
        """
        ratio = self.spatial_compression_ratio
        self._check(x, "x", channels=(3, 3))
        if x.shape[2] % ratio or x.shape[3] % ratio:
            raise ValueError(f"x is {x.shape[2]}x{x.shape[3]} pixels; both sides must be multiples of {ratio}")
        if latent_channels is not None:
            asked = [latent_channels] if isinstance(latent_channels, int) else latent_channels
            self._check_latent_channels(asked)
        return self.encoder(x, latent_channels)

    def decode(self, z: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        """Latent [B, c, h, w] → image [B, 3, h * f, w * f]. Adaptive models also take fewer channels than c.

        z: a latent, or a list of latents, as `encode` returns for a list of channels. A list gives a list of images.
        Raises TypeError unless each is floating point, ValueError unless each has that shape.
        """
        most = self.config.latent_channels
        for latent in z if isinstance(z, list) else [z]:
            self._check(latent, "z", channels=(1 if self.config.adaptive else most, most))
        return self.decoder(z)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """decode(encode(x)): the reconstruction of x."""
        return self.decode(self.encode(x))

    def _check(self, x: torch.Tensor, name: str, channels: tuple[int, int]) -> None:
        low, high = channels
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} is of type {type(x).__name__}; expected a floating point tensor")
        if not x.is_floating_point():
            raise TypeError(f"{name} is {x.dtype}; expected a floating point tensor")
        if x.dim() != 4 or not low <= x.shape[1] <= high:
            expected = str(high) if low == high else f"{low} to {high}"
            raise ValueError(f"{name} has shape {list(x.shape)}; expected [B, {expected}, height, width]")
        if 0 in x.shape[2:]:
            raise ValueError(f"{name} has shape {list(x.shape)}; expected a height and width of at least 1")

    def _check_latent_channels(self, asked: list[int]) -> None:
        most = self.config.latent_channels
        if not self.config.adaptive:
            raise ValueError(f"latent_channels={asked}; latents of this model always have {most} channels")
        if not all(0 < n <= most for n in asked):
            raise ValueError(f"latent_channels={asked}; expected numbers from 1 to {most}")
