"""Configurations of the models: their structure in plain numbers and names. Does not import PyTorch."""

from dataclasses import dataclass, field
from itertools import pairwise

from . import fields

BLOCKS = ("ResBlock", "EViTGLU", "EViTS5GLU")
NORMS = ("rms", "batch")
ACTIVATIONS = ("relu", "silu")
RESAMPLES = {"encoder": ("pixel", "conv"), "decoder": ("pixel", "interpolate")}
HEAD_DIM = 32  # of the autoencoder's attention
# Upper bounds: larger numbers in a configuration are mistakes that would fill the memory.
STAGES, WIDEST, DEEPEST, LARGEST_LATENT, MOST_CLASSES = 16, 2**16, 256, 1024, 10**7
SCALES = (1e-6, 1e6)


@dataclass(frozen=True)
class CoderConfig:
    """The encoder or the decoder. Every tuple has one entry per stage; stage 0 is at full resolution.

    width, depth: channels and number of blocks. block: "ResBlock", "EViTGLU" (linear attention + gated convolution) or
    "EViTS5GLU" (the same with a 5×5 scale). norm: "rms" or "batch"; act: "relu" or "silu" (both for ResBlocks only).
    resample: "pixel" (pixel-shuffle), "conv" (stride-2 convolution, encoder) or "interpolate" (decoder).
    shortcut: whether the encoder's head or the decoder's stem has a shortcut. head_act: the activation before the
    decoder's last convolution.
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
        for name, width in fields.entries("width", self.width):
            fields.whole(name, width, 1, WIDEST)
        stages = len(self.width)
        if not 1 <= stages <= STAGES:
            raise fields.FieldError("width", self.width, f"1 to {STAGES} entries, one for each stage")
        for stage, (name, depth) in enumerate(fields.entries("depth", self.depth, stages)):
            fields.whole(name, depth, 0 if stages > 1 and stage in (0, stages - 1) else 1, DEEPEST)
        for field_, known in (("block", BLOCKS), ("norm", NORMS), ("act", ACTIVATIONS)):
            for name, value in fields.entries(field_, getattr(self, field_), stages):
                fields.word(name, value, known)
        fields.word("resample", self.resample, ("pixel", "conv", "interpolate"))
        fields.flag("shortcut", self.shortcut)
        fields.word("head_act", self.head_act, ACTIVATIONS)
        for stage, block in enumerate(self.block):
            if block != "ResBlock" and self.norm[stage] != "rms":
                raise fields.FieldError(f"norm[{stage}]", self.norm[stage], f"rms, as attention blocks ({block}) have")
            if block != "ResBlock" and self.width[stage] % HEAD_DIM:
                raise fields.FieldError(f"width[{stage}]", self.width[stage], f"a multiple of {HEAD_DIM} for {block}")


@dataclass(frozen=True)
class DCAEConfig:
    """encoder, decoder: `CoderConfig`. adaptive: latents may have only their first channels (DC-AE 1.5).

    scaling_factor: diffusion models see latents multiplied by this factor, about 1 / rms; None if unknown.
    name: the model's name, if it is one of `zoo.AUTOENCODERS`; not part of the architecture.
    """

    latent_channels: int
    encoder: CoderConfig
    decoder: CoderConfig
    adaptive: bool = False
    scaling_factor: float | None = None
    name: str | None = field(default=None, compare=False)

    def __post_init__(self):
        fields.whole("latent_channels", self.latent_channels, 1, WIDEST)
        fields.flag("adaptive", self.adaptive)
        if self.scaling_factor is not None:
            fields.number("scaling_factor", self.scaling_factor, *SCALES)
        for side in ("encoder", "decoder"):
            coder = getattr(self, side)
            if not isinstance(coder, CoderConfig):
                raise fields.FieldError(side, coder, "a CoderConfig")
            fields.word(f"{side}.resample", coder.resample, RESAMPLES[side])
            if self.adaptive and coder.shortcut:
                raise fields.FieldError(f"{side}.shortcut", True, "false, as adaptive autoencoders have no shortcut")
            self._check_widths(side, coder)
        if len(self.decoder.width) != len(self.encoder.width):
            stages = len(self.encoder.width)
            raise fields.FieldError("decoder.width", self.decoder.width, f"{stages} entries, as the encoder has")

    def _check_widths(self, side: str, coder: CoderConfig) -> None:
        """Raise FieldError if shortcuts or pixel-unshuffling cannot connect stages with these widths."""
        last = len(coder.width) - 1
        if coder.shortcut and coder.width[last] % self.latent_channels:
            expected = f"a multiple of latent_channels={self.latent_channels}"
            raise fields.FieldError(f"{side}.width[{last}]", coder.width[last], expected)
        for stage, (width, deeper) in enumerate(pairwise(coder.width)):
            name = f"{side}.width[{stage + 1}]"
            if coder.depth[stage] and 4 * width % deeper:
                raise fields.FieldError(name, deeper, f"a divisor of 4 times the width before it, {width}")
            if side == "encoder" and coder.resample == "pixel" and deeper % 4:
                raise fields.FieldError(name, deeper, "a multiple of 4, for pixel-unshuffling")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """in_channels, input_size: channels and side of the latent. patch_size: side of a token, in latent pixels.

    depth, hidden_size, num_heads: number of blocks, width, attention heads. The hidden layer of an MLP has width
    4 * hidden_size. num_classes is also the null label, "no class". In training, the null label replaces a label with
    probability class_dropout_prob.
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
        fields.whole("in_channels", self.in_channels, 1, WIDEST)
        fields.whole("input_size", self.input_size, 1, LARGEST_LATENT)
        fields.whole("depth", self.depth, 1, DEEPEST)
        fields.whole("hidden_size", self.hidden_size, 1, WIDEST)
        fields.whole("num_heads", self.num_heads, 1, WIDEST)
        fields.whole("patch_size", self.patch_size, 1, LARGEST_LATENT)
        fields.whole("num_classes", self.num_classes, 1, MOST_CLASSES)
        fields.number("class_dropout_prob", self.class_dropout_prob, 0, 1)
        if self.input_size % self.patch_size:
            raise fields.FieldError("input_size", self.input_size, f"a multiple of patch_size={self.patch_size}")
        if self.hidden_size % self.num_heads:
            raise fields.FieldError("hidden_size", self.hidden_size, f"a multiple of num_heads={self.num_heads}")
        if self.hidden_size % 4:
            raise fields.FieldError("hidden_size", self.hidden_size, "a multiple of 4, as sines and cosines need")

    @property
    def tokens(self) -> int:
        """Number of patches of a latent."""
        return (self.input_size // self.patch_size) ** 2


@dataclass(frozen=True, kw_only=True)
class UViTConfig(TransformerConfig):
    """depth: blocks besides the middle one, half before, half after it. adaptive: latents may have fewer channels."""

    adaptive: bool = False

    def __post_init__(self):
        super().__post_init__()
        fields.flag("adaptive", self.adaptive)
        if self.depth % 2:
            raise fields.FieldError(
                "depth", self.depth, "an even number, as many blocks after the middle one as before it"
            )


@dataclass(frozen=True, kw_only=True)
class DiTConfig(TransformerConfig):
    """learn_sigma: whether C more output channels predict the variance of the reverse process (DiT), or not (SiT)."""

    learn_sigma: bool = True

    def __post_init__(self):
        super().__post_init__()
        fields.flag("learn_sigma", self.learn_sigma)
