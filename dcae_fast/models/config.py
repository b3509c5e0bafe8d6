"""Configurations of the models: what a network is made of, in plain numbers and names. PyTorch is not imported."""

from dataclasses import dataclass, field

ACTIVATIONS = ("relu", "silu")


@dataclass(frozen=True)
class CoderConfig:
    """One half of the autoencoder; every tuple has one entry per stage, stage 0 at full resolution.

    width, depth: channels and number of blocks. block: "ResBlock", "EViTGLU" (linear attention + gated convolution) or
    "EViTS5GLU" (the same with a 5×5 scale). norm: "rms" or "batch"; act: "relu" or "silu" (both of ResBlocks alone).
    resample: "pixel" (pixel-shuffle), "conv" (stride-2 convolution, encoder) or "interpolate" (decoder).
    shortcut: whether the encoder's head or the decoder's stem has one. head_act: before the decoder's last convolution.
    """

    width: tuple[int, ...]
    depth: tuple[int, ...]
    block: tuple[str, ...]
    norm: tuple[str, ...]
    act: tuple[str, ...]
    resample: str = "pixel"
    shortcut: bool = True
    head_act: str = "relu"

    def __post_init__(self):
        if len({len(self.width), len(self.depth), len(self.block), len(self.norm), len(self.act)}) != 1:
            raise ValueError(f"width, depth, block, norm and act need one entry for each stage: {self}")
        if any(block != "ResBlock" and norm != "rms" for block, norm in zip(self.block, self.norm, strict=True)):
            raise ValueError(f"attention blocks have RMS norm alone: {self}")


@dataclass(frozen=True)
class DCAEConfig:
    """encoder, decoder: `CoderConfig`; adaptive: latents may use the first channels only (DC-AE 1.5).

    scaling_factor: what latents are multiplied by before a diffusion model sees them, about 1 / rms; None if unknown.
    name: the model's name where it is one of `zoo.AUTOENCODERS`; it says nothing about the architecture.
    """

    latent_channels: int
    encoder: CoderConfig
    decoder: CoderConfig
    adaptive: bool = False
    scaling_factor: float | None = None
    name: str | None = field(default=None, compare=False)

    def __post_init__(self):
        if self.adaptive and (self.encoder.shortcut or self.decoder.shortcut):
            raise ValueError("adaptive autoencoders have no shortcut at the encoder's head or the decoder's stem")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """in_channels, input_size: the latent's channels and its side; patch_size: the side of a token, in latent pixels.

    depth, hidden_size, num_heads: blocks, width, attention heads; the hidden layer of an MLP is 4 * hidden_size wide.
    num_classes: also the null label, "no class", which replaces a training label with class_dropout_prob.
    """

    in_channels: int
    input_size: int
    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int = 1
    num_classes: int = 1000
    class_dropout_prob: float = 0.1

    def __post_init__(self):
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size={self.input_size} is not a multiple of patch_size={self.patch_size}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of 4, as sines and cosines need")
        if not 0 <= self.class_dropout_prob <= 1:
            raise ValueError(f"class_dropout_prob={self.class_dropout_prob} is not in [0, 1]")

    @property
    def tokens(self) -> int:
        """Patches of a latent."""
        return (self.input_size // self.patch_size) ** 2


@dataclass(frozen=True, kw_only=True)
class UViTConfig(TransformerConfig):
    """depth: without the middle block, half on either side of it; adaptive: latents may have fewer channels (1.5)."""

    adaptive: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.depth % 2:
            raise ValueError(f"depth={self.depth} is odd; every block before the middle needs one after it")


@dataclass(frozen=True, kw_only=True)
class DiTConfig(TransformerConfig):
    """learn_sigma: whether C further output channels tell the variance of the reverse process (DiT), or not (SiT)."""

    learn_sigma: bool = True
