"""The PatchGAN discriminator: layers, names of taming-transformers, initial weights, norms, bad arguments."""

import pytest
import torch
from torch import nn

from dcae_fast.training.autoencoder.discriminator import PatchDiscriminator

TAMING = {  # NLayerDiscriminator(n_layers=3, ndf=64): the shapes of its weights
    "main.0.weight": (64, 3, 4, 4),
    "main.0.bias": (64,),
    "main.2.weight": (128, 64, 4, 4),
    "main.5.weight": (256, 128, 4, 4),
    "main.8.weight": (512, 256, 4, 4),
    "main.11.weight": (1, 512, 4, 4),
    "main.11.bias": (1,),
} | {
    f"main.{number}.{name}": () if name == "num_batches_tracked" else (width,)
    for number, width in ((3, 128), (6, 256), (9, 512))
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
}


def convolutions(network: nn.Module) -> list[nn.Conv2d]:
    return [module for module in network.main if isinstance(module, nn.Conv2d)]


def test_names_and_shapes_are_those_of_taming_transformers():
    shapes = {name: tuple(tensor.shape) for name, tensor in PatchDiscriminator().state_dict().items()}
    assert shapes == TAMING


@pytest.mark.parametrize("layers, sees", [(3, 70), (4, 142), (5, 286)])
@pytest.mark.parametrize("norm", ["batch", "spectral"])
def test_layers_widths_and_patches(layers, sees, norm):
    network = PatchDiscriminator(layers, 4, norm, in_channels=2).eval()
    found = convolutions(network)
    assert [conv.out_channels for conv in found] == [4, *(4 * min(2**n, 8) for n in range(1, layers + 1)), 1]
    assert [conv.stride[0] for conv in found] == [2] * layers + [1, 1]
    assert [module.negative_slope for module in network.main if isinstance(module, nn.LeakyReLU)] == [0.2] * (
        layers + 1
    )
    x = torch.randn(1, 2, 8 * network.smallest, 9 * network.smallest + 1, requires_grad=True)
    logits = network(x)
    assert logits.shape == (1, 1, *(size // 2**layers - 2 for size in x.shape[2:]))
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    rows, columns = (x.grad.abs().sum((0, 1, dim)).count_nonzero() for dim in (3, 2))
    assert rows == columns == sees


@pytest.mark.parametrize("norm", ["batch", "spectral"])
def test_smallest_picture(norm):
    network = PatchDiscriminator(3, 4, norm)
    assert network(torch.zeros(2, 3, 24, 31)).shape == (2, 1, 1, 1)
    with pytest.raises(ValueError, match="pictures of 23 x 31 pixels; expected at least 24"):
        network(torch.zeros(2, 3, 23, 31))


def test_initial_weights():
    torch.manual_seed(0)
    network = PatchDiscriminator()
    for conv in convolutions(network)[:-1]:
        assert abs(conv.weight.std() - 0.02) < 1e-3 and abs(conv.weight.mean()) < 1e-3
    norms = [module for module in network.main if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        assert abs(norm.weight.mean() - 1) < 1e-2 and abs(norm.weight.std() - 0.02) < 5e-3
        assert not norm.bias.any()


def test_spectral_norm_makes_the_largest_singular_value_1():
    torch.manual_seed(0)
    network = PatchDiscriminator(3, 8, "spectral")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert all(conv.bias is not None for conv in convolutions(network))
    x = torch.randn(2, 3, 32, 32)
    for _ in range(30):
        network(x)
    network.eval()
    for conv in convolutions(network):
        largest = torch.linalg.matrix_norm(conv.weight.flatten(1), 2)
        assert abs(largest - 1) < 2e-2


@pytest.mark.parametrize("norm", ["batch", "spectral"])
def test_state_dict_round_trip(norm):
    one, other = PatchDiscriminator(4, 4, norm), PatchDiscriminator(4, 4, norm)
    x = torch.randn(2, 3, 64, 64)
    one(x)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.eval()(x), other.eval()(x))


@pytest.mark.parametrize("norm", ["batch", "spectral"])
def test_real_and_fake_in_two_calls(norm):
    """The second call in training mode leaves the graph of the first intact."""
    network = PatchDiscriminator(3, 4, norm)
    real, fake = torch.randn(2, 2, 3, 32, 32)
    (network(fake).mean() - network(real).mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"layers": 2}, ValueError, "layers=2; expected 3 to 5"),
        ({"layers": 6}, ValueError, "layers=6; expected 3 to 5"),
        ({"layers": 3.0}, TypeError, "layers=3.0; expected an integer"),
        ({"width": 0}, ValueError, "width=0; expected at least 1"),
        ({"width": True}, TypeError, "width=True; expected an integer"),
        ({"in_channels": 0}, ValueError, "in_channels=0; expected at least 1"),
        ({"norm": "layer"}, ValueError, "norm='layer'; expected one of batch, spectral"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        PatchDiscriminator(**arguments)
