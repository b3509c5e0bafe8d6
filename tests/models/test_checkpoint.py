"""Loading and saving autoencoders: both layouts, all kinds of sources, exchange with diffusers, errors."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoints import ADAPTIVE, CONFIG, LAYOUTS, assert_same, build, edit_weights

from dcae_fast.diffusion import DCAEDiffusion
from dcae_fast.models import checkpoint, convert, weights, zoo
from dcae_fast.models.autoencoder import DCAE
from dcae_fast.models.checkpoint import CheckpointError

# What can be loaded.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("config", [CONFIG, ADAPTIVE], ids=["attention", "adaptive"])
def test_round_trip(config, layout, tmp_path):
    model = build(config)
    model.save_pretrained(tmp_path, layout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", checkpoint.WEIGHTS[layout][0]]
    partial_latents = {"original": config.adaptive, "diffusers": False}[layout]
    loaded = DCAE.from_pretrained(tmp_path)
    model.config = replace(config, adaptive=partial_latents)
    assert_same(loaded, model)
    assert not loaded.training and all(parameter.requires_grad for parameter in loaded.parameters())
    assert_same(DCAE.from_pretrained(tmp_path / checkpoint.WEIGHTS[layout][0]), model)


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state, "step": 3}])
@pytest.mark.parametrize("suffix", weights.PICKLES)
def test_pickles(wrap, suffix, tmp_path):
    torch.save(wrap(build().state_dict()), tmp_path / f"weights{suffix}")
    assert_same(DCAE.from_pretrained(tmp_path / f"weights{suffix}", config=CONFIG), build())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_become_float32(dtype, tmp_path):
    model = build().to(dtype)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["decoder.project_in.main.conv.bias"].dtype == dtype
    assert_same(DCAE.from_pretrained(tmp_path), model.float())


def test_given_config_comes_first(folder):
    given = replace(CONFIG, scaling_factor=2.0)
    assert DCAE.from_pretrained(folder, config=given).scaling_factor == 2.0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_config_decides_which_layout_of_a_folder(layout, tmp_path):
    for number, saved in enumerate([*(set(LAYOUTS) - {layout}), layout], 1):
        model = build(replace(CONFIG, scaling_factor=float(number)))
        model.decoder.project_in.main.conv.bias.data += number
        model.save_pretrained(tmp_path, saved)
    assert_same(DCAE.from_pretrained(tmp_path), model)


def test_zoo_models_are_saved_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(zoo.AUTOENCODERS, "dc-ae-test", CONFIG)
    DCAE.from_name("dc-ae-test").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_name": "dc-ae-test"}
    loaded = DCAE.from_pretrained(tmp_path)
    assert loaded.config == CONFIG and loaded.config.name == "dc-ae-test"
    loaded.config = replace(loaded.config, scaling_factor=3.0)  # no longer that model
    loaded.save_pretrained(tmp_path)
    assert DCAE.from_pretrained(tmp_path).config == loaded.config


def test_bundled_models_are_read_from_the_package(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(zoo.BUNDLED, "dc-ae-tiny", folder)
    assert DCAE.from_name("dc-ae-tiny").config == CONFIG
    loaded = DCAE.from_pretrained("dc-ae-tiny")
    assert_same(loaded, build())
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == (folder / "config.json").read_text()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_tell_the_config_of_a_file_alone(layout, tmp_path, monkeypatch):
    monkeypatch.setitem(zoo.AUTOENCODERS, "dc-ae-test", CONFIG)
    model = build()
    model.save_pretrained(tmp_path, layout)
    alone = shutil.move(tmp_path / checkpoint.WEIGHTS[layout][0], tmp_path / "alone.safetensors")
    (tmp_path / "config.json").unlink()
    assert_same(DCAE.from_pretrained(alone), model)
    assert DCAE.from_pretrained(alone).config.name == "dc-ae-test"
    monkeypatch.setitem(zoo.AUTOENCODERS, "dc-ae-twin", replace(CONFIG, scaling_factor=1.0))
    ambiguous = DCAE.from_pretrained(alone).config
    assert (ambiguous.name, ambiguous.scaling_factor) == (None, None)


@pytest.mark.parametrize("name", ["ae_in_f32", "ae_sana_f32", "ae_in_f64"])
def test_diffusers_twins(name, reference, tmp_path):
    """The original's weights, saved with diffusers' names, load as the original's weights."""
    meta = json.loads((reference / "fixtures" / f"{name}.json").read_text())
    shutil.copy(reference / "fixtures" / f"{name}_diffusers.safetensors", tmp_path / "weights.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderDC", **meta["diffusers_config"]}))
    state = {k[6:]: v for k, v in load_file(reference / "fixtures" / f"{name}.safetensors").items() if "state/" in k}
    expected = DCAE(convert.config_from_original(meta["config"]))
    expected.load_state_dict(state)
    loaded = DCAE.from_pretrained(tmp_path / "weights.safetensors")
    assert replace(loaded.config, scaling_factor=None) == expected.config
    torch.testing.assert_close(loaded.state_dict(), expected.state_dict(), atol=0, rtol=0)


# diffusers on the other side.


@pytest.mark.parametrize("config", [CONFIG, ADAPTIVE], ids=["attention", "adaptive"])
@pytest.mark.parametrize("shard", ["1GB", "100KB"])
def test_diffusers_reads_ours_and_we_read_theirs(config, shard, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model, x = build(config), torch.randn(1, 3, 16, 16)
    model.save_pretrained(tmp_path / "ours", "diffusers")
    theirs, info = diffusers.AutoencoderDC.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).sample, model(x), atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    assert (tmp_path / "theirs" / checkpoint.WEIGHTS["diffusers"][1]).exists() == (shard == "100KB")
    loaded = DCAE.from_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), atol=0, rtol=0)
    next(loaded.parameters()).data += 1
    loaded.save_pretrained(tmp_path / "theirs", "diffusers")  # over shards: they must not be found any more
    theirs = diffusers.AutoencoderDC.from_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(theirs.state_dict(), convert.state_dict_to_diffusers(loaded.state_dict()))


def test_old_and_loose_diffusers_configs():
    given = convert.config_to_diffusers(CONFIG)
    for key in ("encoder_out_shortcut", "decoder_in_shortcut", "decoder_conv_act_fn"):
        del given[key]
    given |= {"downsample_block_type": "Conv", "decoder_act_fns": "silu", "_diffusers_version": "0.32.0"}
    assert convert.config_from_diffusers(given) == CONFIG


# What cannot be loaded.


@pytest.mark.parametrize(
    "source, message",
    [
        ("dc-ae-f32c32-in1.0", "did you mean 'dc-ae-f32c32-in-1.0'.*Known: .*dc-ae-tiny"),
        ("weights/model.safetensors", "no such file or folder: weights/model.safetensors"),
        ("./nowhere", "no such file or folder: ./nowhere"),
        (
            "dc-ae-tiny-uvit-digits",
            "is a diffusion model; load it with DCAEDiffusion.from_pretrained, or use dcae-fast sample",
        ),
        ("mit-han-lab/dc-ae-f32c32-in-1.0-dit-xl-in-512px", "is a diffusion model; load it with DCAEDiffusion"),
        (Path("/nowhere/at/all"), "no such file or folder: /nowhere/at/all"),
    ],
)
def test_no_such_source(source, message):
    with pytest.raises(CheckpointError, match=message):
        DCAE.from_pretrained(source)


@pytest.mark.parametrize("load", [DCAE.from_pretrained, DCAEDiffusion.from_pretrained])
def test_arguments_of_another_type(load, folder):
    for source in (None, 3, b"model", ["model"]):
        with pytest.raises(TypeError, match="source=.*; expected a name, a path or a repository"):
            load(source)
    with pytest.raises(TypeError, match="config is dict; expected D.*Config"):
        load(folder, config={})


@pytest.mark.parametrize("load", [DCAE.from_name, DCAEDiffusion.from_name])
@pytest.mark.parametrize("name", [None, 3, ["dc-ae-tiny"], Path("dc-ae-tiny")])
def test_names_of_another_type(load, name):
    with pytest.raises(TypeError, match="name=.*; expected the name of"):
        load(name)


@pytest.mark.parametrize(
    "load, name",
    [(DCAE.from_name, "dc-ae-f32c32-in-1.0-uvit-s-in-512px"), (DCAEDiffusion.from_name, "dc-ae-f32c32-in-1.0")],
)
def test_names_of_the_other_kind(load, name):
    with pytest.raises(ValueError, match=f"'{name}' is an? .*; load it with DCAE.*from_pretrained"):
        load(name)


def test_all_misfits_are_named(folder):
    def edit(tensors):
        tensors["encoder.stages.9.extra"] = tensors.pop("encoder.stages.0.op_list.0.main.conv1.conv.bias")
        tensors["decoder.project_out.op_list.0.bias"] = torch.zeros(7)
        tensors["decoder.project_out.op_list.0.weight"] = torch.zeros(32, dtype=torch.int8)
        return tensors

    edit_weights(folder / "model.safetensors", edit)
    with pytest.raises(CheckpointError) as error:
        DCAE.from_pretrained(folder)
    assert str(error.value).splitlines() == [
        f"{folder / 'model.safetensors'} does not fit the model:",
        "  1 missing: encoder.stages.0.op_list.0.main.conv1.conv.bias",
        "  1 unexpected: encoder.stages.9.extra",
        "  2 unfit: decoder.project_out.op_list.0.weight torch.int8 instead of torch.float32, "
        "decoder.project_out.op_list.0.bias [7] instead of [32]",
    ]


def test_long_lists_are_cut(folder):
    edit_weights(folder / "model.safetensors", lambda tensors: {k: v for k, v in tensors.items() if "stages.0" in k})
    with pytest.raises(CheckpointError, match=r"\d+ missing: (\S+, ){9}\S+ and \d+ more$"):
        DCAE.from_pretrained(folder)


@pytest.mark.parametrize(
    "rename, message",
    [
        ("diffusion_model.{}", "weights of a diffusion model; load it with DCAEDiffusion.from_pretrained"),
        ("other.{}", "not the weights of a DC-AE autoencoder; found other."),
    ],
)
def test_names_of_something_else(folder, rename, message):
    edit_weights(folder / "model.safetensors", lambda tensors: {rename.format(k): v for k, v in tensors.items()})
    with pytest.raises(CheckpointError, match=message):
        DCAE.from_pretrained(folder)


def test_no_tensors_at_all(folder):
    edit_weights(folder / "model.safetensors", lambda tensors: {})
    with pytest.raises(CheckpointError, match="found nothing"):
        DCAE.from_pretrained(folder)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not readable JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "expected a JSON object"),
        ('{"model_name": "dc-ae-f9"}', "unknown autoencoder 'dc-ae-f9'"),
        (
            '{"model_name": "dc-ae-tiny-uvit-digits"}',
            "config.json: the configuration of a diffusion model; load it with DCAEDiffusion",
        ),
        (
            '{"model": "uvit", "network": {}}',
            "config.json: the configuration of a diffusion model; load it with DCAEDiffusion",
        ),
        ('{"_class_name": "AutoencoderKL", "in_channels": 3}', "_class_name='AutoencoderKL'; expected 'AutoencoderDC'"),
        ("[" * 100_000, "not readable JSON"),
        ('{"model_name": ["dc-ae"]}', "not the configuration of a DC-AE"),
        ('{"model_type": "bert"}', "not the configuration of a DC-AE autoencoder: 'encoder' is absent"),
        ('{"encoder": 1, "decoder": 2}', "not the configuration of a DC-AE"),
        ('{"_class_name": "AutoencoderDC"}', "'latent_channels' is absent"),
    ],
)
def test_config_that_is_none(folder, content, message):
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        DCAE.from_pretrained(folder)


@pytest.mark.parametrize(
    "side, key, value, message",
    [
        ("encoder", "norm", "ln2d", r"encoder.norm='ln2d'; expected one of trms2d"),
        ("encoder", "block_type", "ViTGLU", "encoder.block_type='ViTGLU'; expected one of ResBlock"),
        ("decoder", "norm", "bn2d", r"decoder.norm\[1\]='batch'; expected rms"),
        ("decoder", "out_act", "gelu", "decoder.out_act='gelu'; expected one of relu, silu"),
        ("encoder", "depth_list", [1, 1, 1], r"encoder.depth_list=\(1, 1, 1\); expected 2 entries"),
        ("encoder", "double_latent", True, "encoder.double_latent=True; expected False"),
        ("encoder", "upsampling", "cubic", "encoder.upsampling='cubic'; expected no field but"),
        ("decoder", "in_channels", 4, "decoder.in_channels=4; expected 3"),
        ("decoder", "in_block_type", "AdaptiveInputConvLayer", "decoder.in_block_type"),
        ("encoder", "out_block_type", "AdaptiveOutputConvLayer", "encoder.out_shortcut=True; expected false"),
    ],
)
def test_original_config_with_unknown_options(folder, side, key, value, message):
    config = convert.config_to_original(CONFIG)
    config[side][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        DCAE.from_pretrained(folder)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("in_channels", 4, "in_channels=4; expected 3"),
        ("encoder_qkv_multiscales", [[], [3]], r"encoder_qkv_multiscales\[1\]=\[3\]; expected"),
        ("decoder_norm_types", "layer_norm", "decoder_norm_types='layer_norm'; expected one of trms2d, rms_norm"),
        ("decoder_act_fns", "gelu", "decoder_act_fns='gelu'; expected one of relu"),
    ],
)
def test_diffusers_config_with_unknown_options(key, value, message):
    with pytest.raises(ValueError, match=message):
        convert.config_from_diffusers(convert.config_to_diffusers(CONFIG) | {key: value})


def test_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights; looked for model.safetensors"):
        DCAE.from_pretrained(folder)


@pytest.mark.parametrize("wrapper", ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "{}"])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_names_of_wrapped_models(folder, file, wrapper):
    """What is saved of a model in DistributedDataParallel or after torch.compile."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    wrapped = {wrapper.format(name).replace("encoder.", "encoder._orig_mod."): value for name, value in state.items()}
    (save_file if file.endswith("s") else torch.save)(wrapped, folder / file)
    loaded = DCAE.from_pretrained(folder).state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


def test_weights_of_a_variant_are_named(folder):
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    with pytest.raises(CheckpointError, match=f"did you mean {folder}/model.fp16.safetensors\\?"):
        DCAE.from_pretrained(folder)
    DCAE.from_pretrained(folder / "model.fp16.safetensors")


def test_folder_that_contains_models(folder, tmp_path):
    """The output folder of a training, or a pipeline of diffusers."""
    shutil.copytree(folder, tmp_path / "run" / "model")
    shutil.copytree(folder, tmp_path / "run" / "model-diffusers")
    expected = f"did you mean {tmp_path}/run/model or {tmp_path}/run/model-diffusers\\?"
    with pytest.raises(CheckpointError, match=f"no weights; looked for .*; {expected}"):
        DCAE.from_pretrained(tmp_path / "run")


def test_file_alone_of_unknown_shape(folder):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no config.json beside it.*pass config="):
        DCAE.from_pretrained(folder / "model.safetensors")
    assert_same(DCAE.from_pretrained(folder, config=CONFIG), build())


# Saving.


@pytest.mark.parametrize("fails", ["dcae_fast.models.weights.save_file", "os.replace"])
def test_failing_save_leaves_the_old_file(folder, fails, monkeypatch):
    def fail(*args, **options):
        Path(args[1] if fails.endswith("save_file") else args[0]).write_bytes(b"half")
        raise OSError("disk full")

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(fails, fail)
    other = build()
    other.decoder.project_in.main.conv.bias.data.zero_()
    with pytest.raises(OSError, match="disk full"):
        other.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_saving_over_the_file_a_model_was_loaded_from(folder):
    """Loaded weights may be a view of the file; replacing it must not change them."""
    model = DCAE.from_pretrained(folder)
    other = build()
    for parameter in other.parameters():
        parameter.data.zero_()
    other.save_pretrained(folder)
    assert_same(model, build())


@pytest.mark.parametrize(
    "config, layout, message",
    [
        (CONFIG, "onnx", "layout 'onnx'; expected one of original, diffusers"),
        (
            replace(ADAPTIVE, encoder=replace(ADAPTIVE.encoder, act=("relu",) * 2)),
            "diffusers",
            "only RMS norm and SiLU",
        ),
        (replace(ADAPTIVE, encoder=replace(ADAPTIVE.encoder, resample="conv")), "diffusers", "strided convolution"),
    ],
)
def test_layout_without_a_word_for_it(config, layout, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(config).save_pretrained(tmp_path / "new", layout)
    assert not (tmp_path / "new").exists()


def test_channels_last_weights_are_saved(tmp_path):
    build().to(memory_format=torch.channels_last).save_pretrained(tmp_path)
    assert_same(DCAE.from_pretrained(tmp_path), build())
