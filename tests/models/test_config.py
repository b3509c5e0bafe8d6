"""Configurations: an unsupported value is refused with the name of its field, in Python and in any config.json."""

import copy
import json
import pickle
from dataclasses import asdict, replace

import numpy as np
import pytest

from dcae_fast.models import convert, diffusion_zoo, zoo
from dcae_fast.models.autoencoder import DCAE
from dcae_fast.models.config import CoderConfig, DCAEConfig, DiTConfig, UViTConfig
from dcae_fast.models.diffusion_zoo import DPM_SOLVER, DiffusionConfig
from dcae_fast.models.fields import FieldError
from dcae_fast.models.weights import CheckpointError

STAGES = {"width": (32, 32), "depth": (1, 1), "norm": ("rms",) * 2, "act": ("silu",) * 2}
CODER = CoderConfig(**STAGES, block=("ResBlock", "EViTGLU"))
CONFIG = DCAEConfig(8, CODER, CODER, scaling_factor=0.5)
UVIT = {"in_channels": 8, "input_size": 4, "depth": 2, "hidden_size": 32, "num_heads": 2}
NETWORK = UViTConfig(**UVIT)
DIFFUSION = DiffusionConfig(network=NETWORK, autoencoder="dc-ae-tiny", scaling_factor=0.5, **DPM_SOLVER)
NO_NUMBER = (True, "16", None, [16], {}, float("nan"))
NO_SIZE = (*NO_NUMBER, -16, 0, 16.5, 16.0, 10**9, 10**400, float("inf"))
NO_SCALE = (*(value for value in NO_NUMBER if value is not None), 0, 0.0, -1.0, 1e300, 10**400, float("inf"))
NO_WORD = ("GroupNorm", 1, None, ["silu", 2], {}, True)


def refused(build, field: str) -> None:
    with pytest.raises(FieldError) as caught:
        build()
    assert str(caught.value).startswith(f"{field}="), str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # as between the ranks of torchrun


@pytest.mark.parametrize("value", NO_SIZE, ids=repr)
def test_sizes_from_python(value):
    refused(lambda: replace(CODER, width=(32, value)), "width[1]")
    if value != 0:  # the first and the last stage may be empty
        refused(lambda: replace(CODER, depth=(value, 1)), "depth[0]")
    refused(lambda: replace(CONFIG, latent_channels=value), "latent_channels")
    for field in (*UVIT, "patch_size", "num_classes"):
        refused(lambda field=field: replace(NETWORK, **{field: value}), field)
        refused(lambda field=field: DiTConfig(**UVIT | {field: value}), field)
    refused(lambda: replace(DIFFUSION, num_inference_steps=value), "num_inference_steps")


@pytest.mark.parametrize("value", NO_SCALE, ids=repr)
def test_scales_from_python(value):
    refused(lambda: replace(CONFIG, scaling_factor=value), "scaling_factor")
    refused(lambda: replace(DIFFUSION, scaling_factor=value), "scaling_factor")


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"width": 32}, "width"),
        ({"width": ()}, "width"),
        ({"width": (32,), "depth": (0,), "block": ("ResBlock",), "norm": ("rms",), "act": ("silu",)}, "depth[0]"),
        ({"width": (32,) * 17}, "width"),
        ({"depth": (1,)}, "depth"),
        ({"depth": (1, 10**7)}, "depth[1]"),
        ({"norm": ("rms", "layer")}, "norm[1]"),
        ({"norm": "rms"}, "norm"),
        ({"norm": ("rms", "batch")}, "norm[1]"),
        ({"act": ("silu", None)}, "act[1]"),
        ({"block": ("ResBlock", "ViT")}, "block[1]"),
        ({"block": ("EViTGLU", "ResBlock"), "width": (16, 32)}, "width[0]"),
        ({"resample": "bicubic"}, "resample"),
        ({"shortcut": 1}, "shortcut"),
        ({"head_act": ["relu"]}, "head_act"),
    ],
)
def test_coders_from_python(changes, field):
    refused(lambda: replace(CODER, **changes), field)


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"encoder": replace(CODER, resample="interpolate")}, "encoder.resample"),
        ({"decoder": replace(CODER, resample="conv")}, "decoder.resample"),
        ({"decoder": asdict(CODER)}, "decoder"),
        ({"latent_channels": 5}, "encoder.width[1]"),
        ({"decoder": replace(CODER, width=(20, 32))}, "decoder.width[1]"),
        ({"encoder": replace(CODER, width=(32, 64, 32), **{k: 3 * (v[0],) for k, v in STAGES.items() if k != "width"},
                             block=("ResBlock",) * 3)}, "decoder.width"),
        ({"adaptive": True}, "encoder.shortcut"),
        ({"adaptive": "yes"}, "adaptive"),
    ],
)  # fmt: skip
def test_autoencoders_from_python(changes, field):
    refused(lambda: replace(CONFIG, **changes), field)


def test_numbers_of_numpy_are_numbers():
    assert replace(CODER, width=tuple(np.array([32, 32]))) == CODER
    assert replace(CONFIG, scaling_factor=np.float64(0.5)) == CONFIG


def edited(given: dict, path: str, value) -> dict:
    """The configuration with another value at a path such as encoder.width_list.1."""
    *parents, last = path.split(".")
    given = copy.deepcopy(given)
    inner = given
    for part in parents:
        inner = inner[int(part) if isinstance(inner, list) else part]
    inner[int(last) if isinstance(inner, list) else last] = value
    return given


def name_of(path: str) -> str:
    parent, _, last = path.rpartition(".")
    return f"{parent}[{last}]" if last.isdigit() else path


ORIGINAL, DIFFUSERS = convert.config_to_original(CONFIG), convert.config_to_diffusers(CONFIG)
JSON = diffusion_zoo.config_to_json(DIFFUSION)
SIZES = [
    (convert.config_from_original, ORIGINAL, "latent_channels"),
    (convert.config_from_original, ORIGINAL, "encoder.width_list.1"),
    (convert.config_from_original, ORIGINAL, "decoder.depth_list.1"),
    (convert.config_from_diffusers, DIFFUSERS, "latent_channels"),
    (convert.config_from_diffusers, DIFFUSERS, "decoder_block_out_channels.1"),
    (convert.config_from_diffusers, DIFFUSERS, "encoder_layers_per_block.0"),
    *((diffusion_zoo.config_from_json, JSON, f"network.{field}") for field in (*UVIT, "patch_size", "num_classes")),
    (diffusion_zoo.config_from_json, JSON, "num_inference_steps"),
]
SCALES = [(read, given, "scaling_factor") for read, given, _ in (SIZES[0], SIZES[3], SIZES[-1])]
WORDS = [
    *((convert.config_from_original, ORIGINAL, f"encoder.{name}") for name in ("block_type.0", "norm", "act")),
    *((convert.config_from_original, ORIGINAL, f"decoder.{name}") for name in ("upsample_block_type", "out_act")),
    *((convert.config_from_diffusers, DIFFUSERS, f"decoder_{name}") for name in ("norm_types.1", "act_fns.0")),
    *((convert.config_from_diffusers, DIFFUSERS, name) for name in ("encoder_block_types.0", "downsample_block_type")),
    *((diffusion_zoo.config_from_json, JSON, name) for name in ("model", "train_scheduler", "eval_scheduler")),
]
OTHERS = [
    (convert.config_from_original, ORIGINAL, "encoder", 1),
    (convert.config_from_original, ORIGINAL, "encoder.width_list", 32),
    (convert.config_from_original, ORIGINAL, "encoder.depth_list", [1]),
    (convert.config_from_original, ORIGINAL, "encoder.norm", ["trms2d"]),
    (convert.config_from_original, ORIGINAL, "scalingfactor", 0.5),
    (convert.config_from_original, ORIGINAL, "decoder.norms", "trms2d"),
    (convert.config_from_original, ORIGINAL, "use_quant_conv", True),
    (convert.config_from_diffusers, DIFFUSERS, "encoder_qkv_multiscales", 5),
    (convert.config_from_diffusers, DIFFUSERS, "encoder_qkv_multiscales", [[]]),
    (convert.config_from_diffusers, DIFFUSERS, "encoder_qkv_multiscales.1", 5),
    (convert.config_from_diffusers, DIFFUSERS, "encoder_out_shortcut", "yes"),
    (convert.config_from_diffusers, DIFFUSERS, "sample_size", 512),
    (convert.config_from_diffusers, DIFFUSERS, "attention_head_dim", 64),
    (diffusion_zoo.config_from_json, JSON, "network", [1]),
    (diffusion_zoo.config_from_json, JSON, "network.heads", 2),
    (diffusion_zoo.config_from_json, JSON, "network.adaptive", 1),
    (diffusion_zoo.config_from_json, JSON, "network.class_dropout_prob", 1.5),
    (diffusion_zoo.config_from_json, JSON, "autoencoder", 3),
    (diffusion_zoo.config_from_json, JSON, "cfg", 6.0),
]
CASES = [
    *((*case, value) for case in SIZES for value in NO_SIZE if not (value == 0 and "layers_per" in case[2])
      if not (value == 0 and "depth_list" in case[2])),
    *((*case, value) for case in SCALES for value in NO_SCALE),
    *((*case, value) for case in WORDS for value in NO_WORD if not isinstance(value, list)),
    *OTHERS,
]  # fmt: skip


@pytest.mark.parametrize("read", {case[0] for case in CASES}, ids=lambda read: read.__name__)
def test_files(read):
    for reader, given, path, value in CASES:
        if reader is read:
            refused(lambda given=given, path=path, value=value: read(edited(given, path, value)), name_of(path))


@pytest.mark.parametrize(
    "read, given, path",
    [
        (convert.config_from_original, ORIGINAL, "encoder.width_list"),
        (convert.config_from_diffusers, DIFFUSERS, "decoder_layers_per_block"),
        (diffusion_zoo.config_from_json, JSON, "network.depth"),
        (diffusion_zoo.config_from_json, JSON, "scaling_factor"),
    ],
)
def test_absent_fields(read, given, path):
    given = copy.deepcopy(given)
    *parents, last = path.split(".")
    del (given[parents[0]] if parents else given)[last]
    with pytest.raises(ValueError, match=f"'{path}' is absent"):
        read(given)


def test_remarks_and_the_sources_of_weights_are_read_over():
    remarks = {"_commit": 1, "pretrained_path": "a.pt", "pretrained_source": "dc-ae", "use_quant_conv": False}
    assert convert.config_from_original(ORIGINAL | remarks) == CONFIG
    assert convert.config_from_diffusers(DIFFUSERS | {"_diffusers_version": "0.32.0"}) == CONFIG


def test_nothing_that_a_name_decides_stands_beside_it():
    for read, name in ((zoo_config, "dc-ae-f32c32-in-1.0"), (diffusion_zoo.config_from_json, "dc-ae-tiny-uvit-digits")):
        with pytest.raises(FieldError, match="scaling_factor=2.0; expected nothing beside model_name"):
            read({"model_name": name, "scaling_factor": 2.0})


def zoo_config(given: dict) -> DCAEConfig:
    return zoo.autoencoder_config(zoo.only_name(given, DCAEConfig.__annotations__))


@pytest.mark.parametrize("value", [-16, 16.5, "16", None, 10**9])
def test_the_file_is_named(value, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(edited(ORIGINAL, "encoder.width_list.1", value)))
    with pytest.raises(CheckpointError) as caught:
        DCAE.from_pretrained(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value) and "encoder.width_list[1]=" in str(caught.value)
