"""Small autoencoders and helpers for the tests of checkpoints."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dcae_fast.models import checkpoint
from dcae_fast.models.autoencoder import DCAE, CoderConfig, DCAEConfig

STAGES = {"width": (32, 32), "depth": (1, 1), "norm": ("rms",) * 2, "act": ("silu",) * 2}
CONFIG = DCAEConfig(
    latent_channels=8,
    encoder=CoderConfig(**STAGES, block=("ResBlock", "EViTS5GLU"), resample="conv"),
    decoder=CoderConfig(**STAGES | {"norm": ("batch", "rms")}, block=("ResBlock", "EViTGLU"), resample="interpolate"),
    scaling_factor=0.5,
)
ADAPTIVE = DCAEConfig(
    latent_channels=8,
    encoder=CoderConfig(**STAGES | {"depth": (0, 1)}, block=("ResBlock",) * 2, shortcut=False),
    decoder=CoderConfig(**STAGES | {"depth": (0, 1)}, block=("ResBlock",) * 2, shortcut=False, head_act="silu"),
    adaptive=True,
)
LAYOUTS = list(checkpoint.WEIGHTS)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def build(config: DCAEConfig = CONFIG) -> DCAE:
    torch.manual_seed(0)
    model = DCAE(config).eval()
    for tensor in model.state_dict().values():  # so that no two tensors, buffers too, are the same
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) * 0.1 + 0.01)
    return model


def assert_same(model: DCAE, expected: DCAE) -> None:
    assert model.config == expected.config
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), atol=0, rtol=0)


def edit_weights(path: Path, edit) -> None:
    """Replace the tensors in a safetensors file by edit(tensors)."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(edit(tensors), path)
