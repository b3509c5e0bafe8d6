"""The two layouts of DC-AE checkpoints, and the way from one to the other. Pure functions.

original    DC-Gen and efficientvit: the names of this package's own modules; a nested configuration
diffusers   `AutoencoderDC`: other names, attention's 1×1 convolutions as matrices, qkv in three; a flat configuration
"""

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from .config import ACTIVATIONS, CoderConfig, DCAEConfig

if TYPE_CHECKING:
    from .weights import State

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
    """The layout ("original", "diffusers") that the names of a state dict are of; ValueError if of neither."""
    names = list(names)
    for layout, pattern in LAYOUTS.items():
        if any(re.match(pattern, name) for name in names):
            return layout
    if any(name.startswith("diffusion_model.") for name in names):
        raise ValueError("these are the weights of a diffusion model; its autoencoder is a checkpoint of its own")
    raise ValueError(f"not the weights of a DC-AE autoencoder; found {', '.join(names[:5]) or 'nothing'}")


def state_dict_to_diffusers(state: "State") -> "State":
    """A state dict of the original layout in diffusers'; tensors are views.

    to_q, to_k, to_v are the consecutive thirds of qkv's rows, not queries, keys and values: diffusers concatenates
    them again before it takes the heads apart.
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
    """The tensors of that original names (a model's own) from a state dict of diffusers' layout."""
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


# This package's word: (the original's, diffusers').
NORMS = {"rms": ("trms2d", "rms_norm"), "batch": ("bn2d", "batch_norm")}
RESAMPLES = {
    "encoder": {"pixel": ("ConvPixelUnshuffle", "pixel_unshuffle"), "conv": ("Conv", "conv")},
    "decoder": {"pixel": ("ConvPixelShuffle", "pixel_shuffle"), "interpolate": ("InterpolateConv", "interpolate")},
}
# The original's word, which is ours: diffusers' type and scales.
BLOCKS = {
    "ResBlock": ("ResBlock", ()),
    "EViTGLU": ("EfficientViTBlock", ()),
    "EViTS5GLU": ("EfficientViTBlock", (5,)),
}
# What configurations of the original may also say, and must say then.
ORIGINAL_DEFAULTS = {
    "encoder": {"downsample_match_channel": True, "double_latent": False},
    "decoder": {"upsample_match_channel": True},
}


def config_to_original(config: DCAEConfig) -> dict:
    """The original's nested configuration, ready for JSON; what is the same in every stage is written once."""
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
        "block_type": _once(list(coder.block)),
        "norm": _once([NORMS[norm][0] for norm in coder.norm]),
        "act": _once(list(coder.act)),
    }


def config_from_original(given: Mapping) -> DCAEConfig:
    """The reverse of `config_to_original`: KeyError for an absent key, ValueError for what these models do not have."""
    encoder, decoder = given["encoder"], given["decoder"]
    config = DCAEConfig(
        latent_channels=given["latent_channels"],
        encoder=_coder_from_original(
            encoder,
            resample=_find(RESAMPLES["encoder"], encoder["downsample_block_type"]),
            shortcut=encoder["out_shortcut"] is not None,
        ),
        decoder=_coder_from_original(
            decoder,
            resample=_find(RESAMPLES["decoder"], decoder["upsample_block_type"]),
            shortcut=decoder["in_shortcut"] is not None,
            head_act=_known(ACTIVATIONS, decoder["out_act"]),
        ),
        adaptive=encoder["out_block_type"] == "AdaptiveOutputConvLayer",
        scaling_factor=given.get("scaling_factor"),
    )
    written = config_to_original(config)
    for side, defaults in ORIGINAL_DEFAULTS.items():
        for key, value in given[side].items():
            expected = (written[side] | defaults).get(key)
            if _once(value) != _once(expected):
                raise ValueError(f"{side}.{key} = {value!r} is not supported; expected {expected!r}")
    return config


def _coder_from_original(given: Mapping, **options) -> CoderConfig:
    stages = len(given["width_list"])
    return CoderConfig(
        width=tuple(given["width_list"]),
        depth=tuple(given["depth_list"]),
        block=tuple(_known(BLOCKS, block) for block in _spread(given["block_type"], stages)),
        norm=tuple(_find(NORMS, norm) for norm in _spread(given["norm"], stages)),
        act=tuple(_known(ACTIVATIONS, act) for act in _spread(given["act"], stages)),
        **options,
    )


def config_to_diffusers(config: DCAEConfig) -> dict:
    """Keyword arguments of diffusers' `AutoencoderDC`, ready for JSON; without `adaptive`, for which it has no word.

    An unknown scaling factor is left out. ValueError for what `AutoencoderDC` does not have: other than RMS norm and
    SiLU in the encoder, and an encoder that begins with a strided convolution.
    """
    encoder, decoder = config.encoder, config.decoder
    if set(encoder.norm) != {"rms"} or set(encoder.act) != {"silu"}:
        raise ValueError(f"diffusers' encoder has RMS norm and SiLU alone, not {encoder.norm}, {encoder.act}")
    if encoder.resample == "conv" and encoder.depth[0] == 0:
        raise ValueError("a strided convolution as the encoder's first layer is not supported in diffusers' layout")
    given = {
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "attention_head_dim": 32,
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
    """The reverse of `config_to_diffusers`: KeyError for an absent key, ValueError for what these models do not have.

    The two shortcuts and the head's activation may be absent, as in configurations older than these keys.
    """
    if given["in_channels"] != 3 or given["attention_head_dim"] != 32:
        raise ValueError("only in_channels = 3 and attention_head_dim = 32 are supported")
    stages = len(given["decoder_block_out_channels"])
    return DCAEConfig(
        latent_channels=given["latent_channels"],
        encoder=_coder_from_diffusers(
            given,
            "encoder",
            norm=("rms",) * len(given["encoder_block_out_channels"]),
            act=("silu",) * len(given["encoder_block_out_channels"]),
            resample="pixel" if given["downsample_block_type"] == "pixel_unshuffle" else "conv",
            shortcut=given.get("encoder_out_shortcut", True),
        ),
        decoder=_coder_from_diffusers(
            given,
            "decoder",
            norm=tuple(_find(NORMS, norm) for norm in _spread(given["decoder_norm_types"], stages)),
            act=tuple(_known(ACTIVATIONS, act) for act in _spread(given["decoder_act_fns"], stages)),
            resample="interpolate" if given["upsample_block_type"] == "interpolate" else "pixel",
            shortcut=given.get("decoder_in_shortcut", True),
            head_act=_known(ACTIVATIONS, given.get("decoder_conv_act_fn", "relu")),
        ),
        scaling_factor=given.get("scaling_factor"),
    )


def _coder_from_diffusers(given: Mapping, side: str, **options) -> CoderConfig:
    width = tuple(given[f"{side}_block_out_channels"])
    kinds = _spread(given[f"{side}_block_types"], len(width))
    names = {name: block for block, name in BLOCKS.items()}
    blocks = []
    for kind, scales in zip(kinds, given[f"{side}_qkv_multiscales"], strict=True):
        name = (kind, () if kind == "ResBlock" else tuple(scales))
        if name not in names:
            raise ValueError(f"{kind} with scales {list(scales)} is not supported")
        blocks.append(names[name])
    return CoderConfig(width=width, depth=tuple(given[f"{side}_layers_per_block"]), block=tuple(blocks), **options)


def _once(values):
    """A list of equal values as that value; anything else as it is."""
    return values[0] if isinstance(values, list) and values and values.count(values[0]) == len(values) else values


def _spread(value, stages: int) -> tuple:
    return tuple(value) if isinstance(value, list | tuple) else (value,) * stages


def _known(known: Iterable[str], value: str) -> str:
    if value not in known:
        raise ValueError(f"{value!r} is not supported; expected one of {', '.join(known)}")
    return value


def _find(table: Mapping[str, tuple[str, str]], value: str) -> str:
    for key, names in table.items():
        if value in names:
            return key
    raise ValueError(f"{value!r} is not supported; expected one of {', '.join(sum(table.values(), ()))}")
