"""A small DCAEDiffusion with random weights; its configurations fit the small networks of the fixtures."""

from dataclasses import replace

import torch

from dcae_fast.diffusion import DCAEDiffusion
from dcae_fast.models.autoencoder import DCAE, CoderConfig, DCAEConfig
from dcae_fast.models.diffusion_zoo import SAMPLERS_AFTER, DiffusionConfig
from dcae_fast.models.dit import DiTConfig
from dcae_fast.models.uvit import UViTConfig

CODER = CoderConfig((8, 16), (1, 1), ("ResBlock",) * 2, ("rms",) * 2, ("silu",) * 2)
AUTOENCODER = DCAEConfig(latent_channels=8, encoder=CODER, decoder=CODER, scaling_factor=0.5)
SIZES = {"in_channels": 8, "input_size": 4, "depth": 2, "hidden_size": 32, "num_heads": 2, "num_classes": 10}
UVIT = DiffusionConfig(
    network=UViTConfig(**SIZES),
    autoencoder="someone/small",
    scaling_factor=0.4,
    train_scheduler="DPM_Solver",
    eval_scheduler="DPM_Solver",
    num_inference_steps=6,
)
FLOW = replace(UVIT, train_scheduler="SiTSampler", eval_scheduler="ODE_heun2")
GAUSSIAN = {"train_scheduler": "GaussianDiffusion", "eval_scheduler": "GaussianDiffusion"}
DIT = replace(UVIT, network=DiTConfig(**SIZES), **GAUSSIAN)
TRAINING = {sampler: training for training, samplers in SAMPLERS_AFTER.items() for sampler in samplers}


def build(config: DiffusionConfig = UVIT) -> DCAEDiffusion:
    """A model without zero parameters: with zeros, DiT's output would not depend on its input."""
    torch.manual_seed(0)
    model = DCAEDiffusion(config, config.build(), DCAE(AUTOENCODER)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def assert_same(model: DCAEDiffusion, expected: DCAEDiffusion) -> None:
    assert model.config == expected.config and model.autoencoder.config == expected.autoencoder.config
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), atol=0, rtol=0)
