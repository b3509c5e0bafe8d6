"""The stored costs of the models equal freshly counted ones."""

import pytest

from dcae_fast import costs, describe
from dcae_fast.models.diffusion_zoo import diffusion_config, diffusion_names
from dcae_fast.models.zoo import autoencoder_config, autoencoder_names


def test_every_model_has_a_stored_cost():
    assert list(costs.AUTOENCODERS) == autoencoder_names()
    assert list(costs.DIFFUSION_MODELS) == diffusion_names()


@pytest.mark.parametrize("name", ["dc-ae-tiny", "dc-ae-f32c32-sana-1.1"])
def test_stored_costs_of_autoencoders(name):
    assert costs.AUTOENCODERS[name] == describe.cost(autoencoder_config(name))


@pytest.mark.parametrize(
    "name",
    [
        "dc-ae-tiny-uvit-digits",
        "dc-ae-f32c32-in-1.0-uvit-s-in-512px",
        "dc-ae-f64c128-in-1.0-uvit-h-in-512px",
        "dc-ae-f32c32-in-1.0-dit-xl-in-512px",
        "dc-ae-f32c32-in-1.0-sit-xl-in-512px",
    ],
)
def test_stored_costs_of_diffusion_models(name):
    assert costs.DIFFUSION_MODELS[name] == describe.diffusion_cost(diffusion_config(name))
