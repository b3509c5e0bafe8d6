"""Loading and saving diffusion models: the original's files, all kinds of sources, and every error."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_diffusion import AUTOENCODER, DIT, FLOW, UVIT, assert_same, build

from dcae_fast.diffusion import DCAEDiffusion
from dcae_fast.models import diffusion_checkpoint, diffusion_zoo, zoo
from dcae_fast.models.autoencoder import DCAE
from dcae_fast.models.diffusion_zoo import diffusion_config
from dcae_fast.models.weights import PICKLES, CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
load = DCAEDiffusion.from_pretrained


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved model with its autoencoder."""
    build().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def state_of(model: DCAEDiffusion, prefix: str = "", without: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    state = model.diffusion_model.state_dict()
    return {prefix + name: tensor for name, tensor in state.items() if name not in without}


def other_weights(model: DCAEDiffusion) -> DCAEDiffusion:
    for parameter in model.diffusion_model.parameters():
        parameter.data.add_(1.0)
    return model


# What can be loaded.


@pytest.mark.parametrize("config", [UVIT, FLOW, DIT], ids=["uvit", "flow", "dit"])
def test_round_trip(config, tmp_path):
    model = build(config)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["autoencoder", "config.json", "model.safetensors"]
    assert all(name.startswith("diffusion_model.") for name in load_file(tmp_path / "model.safetensors"))
    loaded = load(tmp_path)
    assert_same(loaded, model)
    assert not loaded.training
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in loaded.named_parameters()} == trained
    assert_same(load(tmp_path / "model.safetensors"), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_become_float32(dtype, tmp_path):
    model = build().to(dtype)
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    assert_same(load(tmp_path), model.float())


def test_released_models_are_saved_by_name_and_load_their_autoencoder_by_name(folder, tmp_path, monkeypatch):
    """As in the original's repositories, without an autoencoder inside."""
    monkeypatch.setitem(diffusion_zoo.DIFFUSION_MODELS, "dc-ae-test-uvit", replace(UVIT, autoencoder="dc-ae-test"))
    monkeypatch.setitem(zoo.AUTOENCODERS, "dc-ae-test", AUTOENCODER)
    monkeypatch.setitem(zoo.BUNDLED, "dc-ae-test", folder / "autoencoder")
    model = build(diffusion_config("dc-ae-test-uvit"))
    model.save_pretrained(tmp_path / "named", autoencoder=False)
    assert json.loads((tmp_path / "named" / "config.json").read_text()) == {"model_name": "dc-ae-test-uvit"}
    assert not (tmp_path / "named" / "autoencoder").exists()
    loaded = load(tmp_path / "named")
    assert_same(loaded, model)
    loaded.config = replace(loaded.config, scaling_factor=2.0)  # no longer that model
    loaded.save_pretrained(tmp_path / "named")
    assert load(tmp_path / "named").config == loaded.config


def test_bundled_models_are_read_from_the_package(folder, monkeypatch):
    monkeypatch.setitem(diffusion_zoo.BUNDLED, "small", folder)
    assert "small" in diffusion_zoo.diffusion_names() and diffusion_config("small") == UVIT
    assert_same(load("small"), build())


def test_the_autoencoder_asked_for_comes_first(folder, tmp_path):
    other = build()
    other.autoencoder.decoder.project_in.main.conv.bias.data += 1
    other.autoencoder.save_pretrained(tmp_path / "other", "diffusers")
    assert_same(load(folder, autoencoder=tmp_path / "other"), other)


def test_given_config_comes_first(folder):
    assert load(folder, config=replace(UVIT, scaling_factor=2.0)).scaling_factor == 2.0


# What the original's trainer writes.


@pytest.mark.parametrize("averages", ["ema", "ema_model_state_dict"])
@pytest.mark.parametrize("suffix", PICKLES)
def test_trainer_checkpoints(averages, suffix, folder):
    """Loads the moving average, or with ema=False the weights."""
    written = {
        "global_step": 7,
        "model_state_dict": state_of(other_weights(build()), "0."),
        averages: {0.9999: state_of(build(), "0.")},
        "random_states": [{"python": [3, [1, 2], None], "torch": torch.zeros(4, dtype=torch.uint8)}],
        "best_metric": None,
    }
    torch.save(written, folder / f"step_7{suffix}")
    assert_same(load(folder / f"step_7{suffix}"), build())
    assert_same(load(folder / f"step_7{suffix}", ema=False), other_weights(build()))
    del written[averages]
    torch.save(written, folder / f"step_8{suffix}")
    assert_same(load(folder / f"step_8{suffix}"), other_weights(build()))


def test_folder_of_the_trainer(folder):
    """A checkpoint.pt without a config.json. It does not contain DiT's fixed position table."""
    model = build(DIT)
    model.diffusion_model.pos_embed.data = DIT.build().pos_embed.data
    model.autoencoder = build().autoencoder
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    torch.save({"model_state_dict": state_of(model, "0.", without=("pos_embed",))}, folder / "checkpoint.pt")
    loaded = load(folder, config=DIT)
    assert_same(loaded, model)
    assert not loaded.diffusion_model.pos_embed.requires_grad


@pytest.mark.parametrize("prefix", ["", *diffusion_checkpoint.PREFIXES])
@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state}], ids=["plain", "wrapped"])
def test_names_and_wrappings_of_pickles(prefix, wrap, folder):
    torch.save(wrap(state_of(build(), prefix)), folder / "weights.pth")
    assert_same(load(folder / "weights.pth"), build())


def test_shapes_tell_the_config_of_a_file_alone(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(diffusion_zoo, "DIFFUSION_MODELS", {"a": UVIT, "dit": DIT})
    alone = shutil.copy(folder / "model.safetensors", tmp_path / "alone.safetensors")
    assert load(alone, autoencoder=folder / "autoencoder").config == UVIT
    diffusion_zoo.DIFFUSION_MODELS["b"] = UVIT
    assert load(alone, autoencoder=folder / "autoencoder").config == UVIT
    diffusion_zoo.DIFFUSION_MODELS["flow"] = FLOW
    with pytest.raises(CheckpointError, match="its shapes are those of a, b, flow; put its config.json there"):
        load(alone)
    diffusion_zoo.DIFFUSION_MODELS.clear()
    with pytest.raises(CheckpointError, match="its shapes are those of no known model; put its config.json there"):
        load(alone)


# The hub, through its cache.


@pytest.fixture
def hub(folder, tmp_path) -> Path:
    """A Hugging Face cache with two repositories: someone/model and its autoencoder, someone/small."""
    for name, source in (("small", folder / "autoencoder"), ("model", folder)):
        repository = tmp_path / "hub" / f"models--someone--{name}"
        shutil.copytree(source, repository / "snapshots" / COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
    shutil.rmtree(tmp_path / "hub" / "models--someone--model" / "snapshots" / COMMIT / "autoencoder")
    return tmp_path / "hub"


def test_repositories_in_the_cache(hub):
    assert_same(load("someone/model", cache_dir=hub, local_files_only=True), build())


def test_repository_with_its_own_autoencoder(folder, hub):
    snapshot = hub / "models--someone--model" / "snapshots" / COMMIT
    shutil.copytree(folder / "autoencoder", snapshot / "autoencoder")
    shutil.rmtree(hub / "models--someone--small")
    assert_same(load("someone/model", revision=COMMIT, cache_dir=hub, local_files_only=True), build())


def test_autoencoder_not_in_the_cache(hub):
    shutil.rmtree(hub / "models--someone--small")
    with pytest.raises(CheckpointError, match="someone/small: not in the local cache") as error:
        load("someone/model", cache_dir=hub, local_files_only=True)
    assert "hf download someone/model --local-dir model\n" in str(error.value)


def test_autoencoder_of_a_folder_not_in_the_cache(hub, folder):
    shutil.rmtree(folder / "autoencoder")
    shutil.rmtree(hub / "models--someone--small")
    with pytest.raises(CheckpointError, match="someone/small: not in the local cache") as error:
        load(folder, cache_dir=hub, local_files_only=True)
    assert "hf download someone/small" in str(error.value) and str(folder / "autoencoder") in str(error.value)


@pytest.mark.parametrize("name", diffusion_zoo.DIFFUSION_MODELS)
def test_released_models_and_their_repositories(name, reference, tmp_path):
    entry = json.loads((reference / "diffusion_models.json").read_text())[name]
    assert diffusion_zoo.diffusion_hub_id(name) == entry["hub"]
    assert diffusion_checkpoint.PREFIX == entry["hub_key_prefix"]
    with pytest.raises(CheckpointError, match=f"{entry['hub']}: not in the local cache"):
        load(name, cache_dir=tmp_path, local_files_only=True)


# What cannot be loaded.


def test_unknown_name():
    with pytest.raises(CheckpointError, match="unknown diffusion model 'dc-ae-f32c32-in-1.0-uvit-x'; did you mean"):
        load("dc-ae-f32c32-in-1.0-uvit-x")


def test_an_autoencoder_in_place_of_a_diffusion_model(folder):
    words = "an autoencoder; load it with DCAE.from_pretrained, or use dcae-fast reconstruct"
    for source in ("dc-ae-tiny", "mit-han-lab/dc-ae-f32c32-in-1.0", folder / "autoencoder"):
        with pytest.raises(CheckpointError, match=words):
            load(source)
    (folder / "autoencoder" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=f"model.safetensors: the weights of {words}"):
        load(folder / "autoencoder" / "model.safetensors")


def test_all_misfits_are_named(folder):
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["diffusion_model.extra"] = tensors.pop("diffusion_model.norm.bias")
    tensors["diffusion_model.norm.weight"] = torch.zeros(7)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load(folder)
    assert str(error.value).splitlines() == [
        f"{folder / 'model.safetensors'} does not fit the model:",
        "  1 missing: norm.bias",
        "  1 unexpected: extra",
        "  1 unfit: norm.weight [7] instead of [32]",
    ]


def test_weights_of_something_else(folder):
    with pytest.raises(CheckpointError, match="does not fit the model:\n.*missing: pos_embed"):
        load(folder / "autoencoder" / "model.safetensors", config=UVIT)


@pytest.mark.parametrize(
    "content, message",
    [
        ([1], "holds a list; expected a state dict"),
        ({"model_state_dict": {}, "ema": {0.9999: {"step": 3}}}, "no plain tensors at step"),
        ({"optimizer": {}, "step": 3}, "no plain tensors at optimizer, step"),
    ],
)
def test_pickle_of_something_else(content, message, folder):
    torch.save(content, folder / "weights.pt")
    with pytest.raises(CheckpointError, match=message):
        load(folder / "weights.pt")


def edited(**changes) -> str:
    return json.dumps(diffusion_zoo.config_to_json(UVIT) | changes)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not readable JSON"),
        ('{"model_name": "dc-ae-f9-uvit"}', "unknown diffusion model 'dc-ae-f9-uvit'"),
        ('{"model_name": ["dc-ae"]}', "not the configuration of a diffusion model"),
        ('{"model": 1, "decoder": 2}', "not the configuration of a diffusion model: model=1; expected one of uvit"),
        (edited(model="mmdit"), "model='mmdit'; expected one of uvit, dit"),
        (edited(network={"depth": 3}), "'network.in_channels' is absent"),
        (edited(unknown=1), "unknown=1; expected no field but network, autoencoder"),
        (edited(train_scheduler="DDIM"), "train_scheduler='DDIM'; expected one of DPM_Solver"),
        (edited(eval_scheduler="SDE"), "eval_scheduler='SDE'; expected one of DPM_Solver"),
    ],
)
def test_config_that_is_none(content, message, folder):
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_autoencoder_of_other_latents(folder, tmp_path):
    DCAE(replace(AUTOENCODER, latent_channels=4)).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="has 4 latent channels; the diffusion model expects 8"):
        load(folder, autoencoder=tmp_path / "other")


def test_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights; looked for model.safetensors, .*, checkpoint.pt"):
        load(folder)


def test_truncated_file(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load(folder)
