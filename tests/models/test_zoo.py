"""Every autoencoder of the zoo against the original's registry: architecture, names, shapes, configurations."""

import json

import pytest
import torch

from dcae_fast.models import convert, zoo
from dcae_fast.models.autoencoder import DCAE


@pytest.fixture(params=zoo.AUTOENCODERS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def registry(reference) -> dict:
    return json.loads((reference / "autoencoders.json").read_text())


def manifest(registry: dict, name: str, key: str) -> dict[str, list[int]]:
    entry = registry[name][key]
    return registry[entry["same_as"]][key] if "same_as" in entry else entry


def build(name: str) -> DCAE:
    with torch.device("meta"):
        return DCAE.from_name(name)


def shapes(state: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in state.items()}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_and_state_dicts(name, registry):
    model, entry = build(name), registry[name]
    assert (count(model.encoder), count(model.decoder)) == (entry["encoder_parameters"], entry["decoder_parameters"])
    assert count(model) == entry["parameters"]
    assert shapes(model.state_dict()) == manifest(registry, name, "state_dict")
    converted = convert.state_dict_to_diffusers(model.state_dict())
    assert shapes(converted) == manifest(registry, name, "diffusers_state_dict")
    assert convert.state_dict_layout(model.state_dict()) == "original"
    assert convert.state_dict_layout(converted) == "diffusers"


def test_facts(name, registry):
    config, entry = zoo.autoencoder_config(name), registry[name]
    assert config.name == name
    assert config.latent_channels == entry["latent_channels"]
    assert config.adaptive == entry["adaptive_latent_channels"]
    assert config.scaling_factor == entry["scaling_factor"]
    assert build(name).spatial_compression_ratio == entry["spatial_compression_ratio"]
    assert zoo.autoencoder_hub_id(name) == entry["hub"]


def test_configurations(name, registry):
    config, entry = zoo.autoencoder_config(name), registry[name]
    original = entry["config"] | {"scaling_factor": entry["scaling_factor"]}
    assert convert.config_to_original(config) == original
    assert convert.config_from_original(original) == config
    assert convert.config_to_diffusers(config) == entry["diffusers_config"]
    without_partial_latents = convert.config_from_diffusers(entry["diffusers_config"])
    assert convert.config_to_diffusers(without_partial_latents) == entry["diffusers_config"]
    assert (without_partial_latents == config) == (not config.adaptive)


def test_same_shapes_mean_same_architecture():
    """So a weight file without a configuration never gets a wrong one."""
    found = {}
    for name in zoo.AUTOENCODERS:
        config = convert.config_to_original(zoo.autoencoder_config(name)) | {"scaling_factor": None}
        assert found.setdefault(json.dumps(shapes(build(name).state_dict())), config) == config


@pytest.mark.parametrize("lookup", [zoo.autoencoder_config, zoo.autoencoder_hub_id, DCAE.from_name])
def test_unknown_name(lookup):
    with pytest.raises(ValueError, match="did you mean 'dc-ae-f32c32-in-1.0'.*Known: .*dc-ae-tiny"):
        lookup("dc-ae-f32c32-in1.0")


def test_bundled():
    assert "dc-ae-tiny" in zoo.autoencoder_names()
    assert zoo.autoencoder_hub_id("dc-ae-tiny") is None
