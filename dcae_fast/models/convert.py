"""Convert between the two layouts of DC-AE checkpoints. Pure functions.

original    DC-Gen and efficientvit: names as in this package's modules; a nested configuration
diffusers   `AutoencoderDC`: other names, attention's 1×1 convolutions as matrices, qkv in three parts; a flat
            configuration
"""

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from . import fields
from .config import ACTIVATIONS, HEAD_DIM, CoderConfig, DCAEConfig

if TYPE_CHECKING:
    import torch

    State = dict[str, torch.Tensor]

RENAMES = [
    (r"\b(main|op_list)\.", ""),
    (r"^encoder\.stages\.", "encoder.down_blocks."),
    (r"^decoder\.stages\.", "decoder.up_blocks."),
    (r"\bcontext_module\.", "attn."),
    (r"\blocal_module\.", "conv_out."),
    (r"\baggreg\.(\d+)\.0\.", r"to_qkv_multiscale.\1.proj_in."),
    (r"\baggreg\.(\d+)\.1\.", r"to_qkv_multiscale.\1.proj_out."),
    (r"\bproj\.conv\.", "to_out."),
    (r"\bproj\.norm\.", "norm_out."),
    (r"\b(inverted|depth|point)_conv\.conv\.", r"conv_\1."),
    (r"\b(conv1|conv2)\.conv\.", r"\1."),
    (r"\b(point_conv|conv2)\.norm\.", "norm."),
    (r"(_blocks\.\d+\.\d+)\.conv\.conv\.", r"\1.conv."),
    (r"\bproject_in\.conv\.", "conv_in."),
    (r"^encoder\.project_out\.0\.conv\.", "encoder.conv_out."),
    (r"^decoder\.project_out\.0\.", "decoder.norm_out."),
    (r"^decoder\.project_out\.2\.conv\.", "decoder.conv_out."),
]
LAYOUTS = {"original": r"(en|de)coder\.stages\.", "diffusers": r"(en|de)coder\.(down|up)_blocks\."}
QKV, PROJECTION = ".qkv.conv.weight", ".proj.conv.weight"


def state_dict_layout(names: Iterable[str]) -> str:
    """The layout of a state dict with these names: "original" or "diffusers". ValueError if neither."""
    names = list(names)
    for layout, pattern in LAYOUTS.items():
        if any(re.match(pattern, name) for name in names):
            return layout
    raise ValueError(f"not the weights of a DC-AE autoencoder; found {', '.join(names[:5]) or 'nothing'}")


def state_dict_to_diffusers(state: "State") -> "State":
    """Convert a state dict from the original layout to that of diffusers; the tensors are views.

    to_q, to_k, to_v are consecutive thirds of the rows of qkv, not queries, keys and values: diffusers concatenates
    them again before it separates the heads.
    """
    converted = {}
    for name, tensor in state.items():
        renamed = _diffusers_name(name)
        if name.endswith(QKV):
            converted |= zip(_qkv_names(renamed), tensor.flatten(1).chunk(3), strict=True)
        else:
            converted[renamed] = tensor.flatten(1) if name.endswith(PROJECTION) else tensor
    return converted


def state_dict_from_diffusers(state: "State", names: Iterable[str]) -> "State":
    """Convert a state dict from diffusers' layout to the original one. names: the tensors to return, original names."""
    import torch

    converted = {}
    for name in names:
        renamed = _diffusers_name(name)
        if name.endswith(QKV):
            converted[name] = torch.cat([state[part] for part in _qkv_names(renamed)])[..., None, None]
        else:
            converted[name] = state[renamed][..., None, None] if name.endswith(PROJECTION) else state[renamed]
    return converted


def _diffusers_name(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _qkv_names(renamed: str) -> list[str]:
    return [renamed.replace("qkv.conv", part) for part in ("to_q", "to_k", "to_v")]


# This package's term: (the original's term, diffusers' term).
NORMS = {"rms": ("trms2d", "rms_norm"), "batch": ("bn2d", "batch_norm")}
RESAMPLES = {
    "encoder": {"pixel": ("ConvPixelUnshuffle", "pixel_unshuffle"), "conv": ("Conv", "conv")},
    "decoder": {"pixel": ("ConvPixelShuffle", "pixel_shuffle"), "interpolate": ("InterpolateConv", "interpolate")},
}
# The original's term, also used in this package: (diffusers' block type, its scales).
BLOCKS = {
    "ResBlock": ("ResBlock", ()),
    "EViTGLU": ("EfficientViTBlock", ()),
    "EViTS5GLU": ("EfficientViTBlock", (5,)),
}
SAME_ACTIVATIONS = {act: act for act in ACTIVATIONS}
# Fields that the original's configurations may have, with the only values supported; fields about sources of weights.
ORIGINAL_DEFAULTS = {
    "": {"use_quant_conv": False},
    "encoder": {"downsample_match_channel": True, "double_latent": False},
    "decoder": {"upsample_match_channel": True},
}
ORIGINAL_SOURCES = ("pretrained_path", "pretrained_source", "pretrained_ema")
# Fields of CoderConfig: their names in the original's configuration, and in that of diffusers.
ORIGINAL_NAMES = {
    side: {"width": "width_list", "depth": "depth_list", "block": "block_type", "shortcut": shortcut}
    for side, shortcut in (("encoder", "out_shortcut"), ("decoder", "in_shortcut"))
}
DIFFUSERS_NAMES = {
    side: {
        "width": f"{side}_block_out_channels",
        "depth": f"{side}_layers_per_block",
        "block": f"{side}_block_types",
        "norm": f"{side}_norm_types",
        "act": f"{side}_act_fns",
        "shortcut": shortcut,
        "head_act": "decoder_conv_act_fn",
    }
    for side, shortcut in (("encoder", "encoder_out_shortcut"), ("decoder", "decoder_in_shortcut"))
}
DIFFUSERS_FIELDS = (
    *("in_channels", "latent_channels", "attention_head_dim", "scaling_factor"),
    *("downsample_block_type", "upsample_block_type", "decoder_norm_types", "decoder_act_fns"),
    *("encoder_out_shortcut", "decoder_in_shortcut", "decoder_conv_act_fn"),
    *(
        f"{side}_{name}"
        for side in ("encoder", "decoder")
        for name in ("block_types", "block_out_channels", "layers_per_block", "qkv_multiscales")
    ),
)


def config_to_original(config: DCAEConfig) -> dict:
    """The original's nested configuration, ready for JSON. A value that is the same in all stages is written once."""
    channels = {"in_channels": 3, "latent_channels": config.latent_channels}
    encoder = {
        **_coder_to_original(config.encoder),
        "downsample_block_type": RESAMPLES["encoder"][config.encoder.resample][0],
        "downsample_shortcut": "averaging",
        "out_norm": None,
        "out_act": None,
        "out_block_type": "AdaptiveOutputConvLayer" if config.adaptive else "ConvLayer",
        "out_shortcut": "averaging" if config.encoder.shortcut else None,
    }
    decoder = {
        "in_block_type": "AdaptiveInputConvLayer" if config.adaptive else "ConvLayer",
        "in_shortcut": "duplicating" if config.decoder.shortcut else None,
        **_coder_to_original(config.decoder),
        "upsample_block_type": RESAMPLES["decoder"][config.decoder.resample][0],
        "upsample_shortcut": "duplicating",
        "out_norm": "trms2d",
        "out_act": config.decoder.head_act,
    }
    coders = {"encoder": channels | encoder, "decoder": channels | decoder}
    return {**channels, **coders, "scaling_factor": config.scaling_factor}


def _coder_to_original(coder: CoderConfig) -> dict:
    return {
        "width_list": list(coder.width),
        "depth_list": list(coder.depth),
        "block_type": fields.once(list(coder.block)),
        "norm": fields.once([NORMS[norm][0] for norm in coder.norm]),
        "act": fields.once(list(coder.act)),
    }


def config_from_original(given: Mapping) -> DCAEConfig:
    """The inverse of `config_to_original`. Unsupported values raise ValueError, which names the field."""
    whole = fields.Section(given)
    encoder, decoder = (fields.Section(whole[side], f"{side}.") for side in ("encoder", "decoder"))
    with fields.renamed(_in_whole(ORIGINAL_NAMES, "{side}.{name}")):
        config = DCAEConfig(
            latent_channels=whole["latent_channels"],
            encoder=_coder_from_original(
                encoder,
                "encoder",
                resample=encoder.word("downsample_block_type", _by_word(RESAMPLES["encoder"])),
                shortcut=encoder["out_shortcut"] is not None,
            ),
            decoder=_coder_from_original(
                decoder,
                "decoder",
                resample=decoder.word("upsample_block_type", _by_word(RESAMPLES["decoder"])),
                shortcut=decoder["in_shortcut"] is not None,
                head_act=decoder.word("out_act", SAME_ACTIVATIONS),
            ),
            adaptive=encoder["out_block_type"] == "AdaptiveOutputConvLayer",
            scaling_factor=whole.get("scaling_factor", None),
        )
    written = config_to_original(config)
    sides = {side: written.pop(side) for side in ("encoder", "decoder")}
    whole.only([*written, *sides, *ORIGINAL_DEFAULTS[""], *ORIGINAL_SOURCES])
    whole.same(written | ORIGINAL_DEFAULTS[""])
    for side, section in (("encoder", encoder), ("decoder", decoder)):
        expected = sides[side] | ORIGINAL_DEFAULTS[side]
        section.only(expected)
        section.same(expected)
    return config


def _coder_from_original(given: fields.Section, side: str, **options) -> CoderConfig:
    width = given.values("width_list")
    stages = len(width) if isinstance(width, tuple) else 1
    block = given.words("block_type", {block: block for block in BLOCKS}, stages)
    norm = given.words("norm", _by_word(NORMS), stages)
    act = given.words("act", SAME_ACTIVATIONS, stages)
    with fields.renamed(ORIGINAL_NAMES[side], f"{side}."):
        return CoderConfig(width, given.values("depth_list"), block, norm, act, **options)


def config_to_diffusers(config: DCAEConfig) -> dict:
    """Keyword arguments of diffusers' `AutoencoderDC`, ready for JSON; without `adaptive`, which it does not know.

    An unknown scaling factor is left out. Raises ValueError for an encoder that `AutoencoderDC` does not support: with
    other norms than RMS norm, other activations than SiLU, or a strided convolution as its first layer.
    """
    encoder, decoder = config.encoder, config.decoder
    if set(encoder.norm) != {"rms"} or set(encoder.act) != {"silu"}:
        raise ValueError(f"diffusers' encoder supports only RMS norm and SiLU, not {encoder.norm}, {encoder.act}")
    if encoder.resample == "conv" and encoder.depth[0] == 0:
        raise ValueError("a strided convolution as the encoder's first layer is not supported in diffusers' layout")
    given = {
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "attention_head_dim": HEAD_DIM,
        "downsample_block_type": RESAMPLES["encoder"][encoder.resample][1],
        "upsample_block_type": RESAMPLES["decoder"][decoder.resample][1],
        "decoder_norm_types": [NORMS[norm][1] for norm in decoder.norm],
        "decoder_act_fns": list(decoder.act),
        "encoder_out_shortcut": encoder.shortcut,
        "decoder_in_shortcut": decoder.shortcut,
        "decoder_conv_act_fn": decoder.head_act,
    }
    for side, coder in (("encoder", encoder), ("decoder", decoder)):
        given[f"{side}_block_types"] = [BLOCKS[block][0] for block in coder.block]
        given[f"{side}_block_out_channels"] = list(coder.width)
        given[f"{side}_layers_per_block"] = list(coder.depth)
        given[f"{side}_qkv_multiscales"] = [list(BLOCKS[block][1]) for block in coder.block]
    return given if config.scaling_factor is None else given | {"scaling_factor": config.scaling_factor}


def config_from_diffusers(given: Mapping) -> DCAEConfig:
    """The inverse of `config_to_diffusers`. Unsupported values raise ValueError, which names the field.

    The two shortcuts and the head's activation may be absent, as in older configurations.
    """
    whole = fields.Section(given)
    whole.only(DIFFUSERS_FIELDS)
    whole.same({"in_channels": 3, "attention_head_dim": HEAD_DIM})
    with fields.renamed(_in_whole(DIFFUSERS_NAMES, "{name}")):
        return DCAEConfig(
            latent_channels=whole["latent_channels"],
            encoder=_coder_from_diffusers(
                whole,
                "encoder",
                resample=whole.word("downsample_block_type", _by_word(RESAMPLES["encoder"])),
                shortcut=whole.get("encoder_out_shortcut", True),
            ),
            decoder=_coder_from_diffusers(
                whole,
                "decoder",
                resample=whole.word("upsample_block_type", _by_word(RESAMPLES["decoder"])),
                shortcut=whole.get("decoder_in_shortcut", True),
                head_act=whole.word("decoder_conv_act_fn", SAME_ACTIVATIONS, default="relu"),
            ),
            scaling_factor=whole.get("scaling_factor", None),
        )


def _coder_from_diffusers(given: fields.Section, side: str, **options) -> CoderConfig:
    width = given.values(f"{side}_block_out_channels")
    stages = len(width) if isinstance(width, tuple) else 1
    types = given.words(f"{side}_block_types", {type_: type_ for type_, _ in BLOCKS.values()}, stages)
    scales, blocks = f"{side}_qkv_multiscales", []
    for type_, (name, value) in zip(types, fields.entries(scales, given[scales], len(types)), strict=True):
        value = () if type_ == "ResBlock" else tuple(each for _, each in fields.entries(name, value))
        block = {known: block for block, known in BLOCKS.items()}.get((type_, value))
        if block is None:
            raise fields.FieldError(name, list(value), "[] or [5]")
        blocks.append(block)
    norm, act = ("rms",) * stages, ("silu",) * stages
    if side == "decoder":
        norm = given.words("decoder_norm_types", _by_word(NORMS), stages)
        act = given.words("decoder_act_fns", SAME_ACTIVATIONS, stages)
    with fields.renamed(DIFFUSERS_NAMES[side]):
        return CoderConfig(width, given.values(f"{side}_layers_per_block"), tuple(blocks), norm, act, **options)


def _by_word(table: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """The original's or diffusers' term → this package's term."""
    return {word: ours for ours, words in table.items() for word in words}


def _in_whole(names: Mapping[str, Mapping[str, str]], form: str) -> dict[str, str]:
    """The coders' fields in `DCAEConfig`, as "encoder.width" → their names in the file."""
    return {
        f"{side}.{ours}": form.format(side=side, name=name)
        for side, of_side in names.items()
        for ours, name in of_side.items()
    }
