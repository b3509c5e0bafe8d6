"""Pixel losses and LPIPS against their formulas and torchmetrics; published layouts of weights, and missing files."""

from urllib.error import URLError

import pytest
import torch
from torch import nn

import dcae_fast
from dcae_fast.models.functional import feature_distance
from dcae_fast.training.autoencoder import losses
from dcae_fast.training.autoencoder.losses import LPIPS, perceptual_loss, pixel_loss
from dcae_fast.training.engine.config import TrainingError

CPU = torch.device("cpu")
VGG16_FILE = "vgg16-397923af.pth"
PUBLISHED_HEADS = losses.HEADS
FORMULAS = {
    "l1": lambda d: d.abs().mean(),
    "l2": lambda d: (d**2).mean(),
    "charbonnier": lambda d: (d**2 + 1e-6).sqrt().mean(),
}


def pair(*shape: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype) * 2 - 1 for _ in range(2)]


@pytest.fixture(scope="module")
def network() -> LPIPS:
    """LPIPS with random features and heads."""
    torch.manual_seed(0)
    lpips = LPIPS()
    for head in lpips.heads:
        head.uniform_()
    return lpips


@pytest.mark.parametrize("kind", FORMULAS)
def test_pixel_loss_is_its_formula(kind):
    x, y = pair(2, 3, 5, 7)
    loss = pixel_loss(kind)
    torch.testing.assert_close(loss(x, y), FORMULAS[kind](x - y), rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(loss, (x.requires_grad_(), y))


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pixel_loss_of_half_precision_is_computed_in_float32(kind, dtype):
    x, y = pair(2, 3, 64, 64, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss = pixel_loss(kind)(x.requires_grad_(), y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), FORMULAS[kind](x.double() - y.double()), rtol=1e-5, atol=0)
    loss.backward()
    assert x.grad.dtype == dtype and x.grad.isfinite().all()


def test_charbonnier_has_a_gradient_where_nothing_differs():
    x = torch.zeros(1, 3, 4, 4, requires_grad=True)
    pixel_loss("charbonnier")(x, torch.zeros(1, 3, 4, 4)).backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_bad_arguments_are_named(network):
    with pytest.raises(ValueError, match="kind='huber'; expected one of l1, l2, charbonnier"):
        pixel_loss("huber")
    for loss in (pixel_loss("l1"), network):
        with pytest.raises(
            ValueError, match=r"reconstruction has shape \[1, 3, 16, 16\]; target has shape \[3, 16, 16"
        ):
            loss(torch.zeros(1, 3, 16, 16), torch.zeros(3, 16, 16))
    with pytest.raises(ValueError, match=r"reconstruction has shape \[1, 1, 16, 16\]; expected \[B, 3, H, W\]"):
        network(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16))


def test_patched_lpips_is_lpips():
    torch.manual_seed(0)
    loss, pictures = LPIPS(), torch.randn(2, 2, 3, 16, 24)
    for module in loss.features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)

    def run():
        y = pictures[0].clone().requires_grad_()
        value = loss(y, pictures[1])
        return value, *torch.autograd.grad(value, y)

    expected = run()
    assert dcae_fast.patch(loss).replaced == {"LPIPS": 1}
    for got, want in zip(run(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="expected equal shapes"):
        loss(pictures[0], pictures[1][:, :, :8])


def test_feature_distance_is_its_formula():
    (a, b), head = pair(2, 4, 3, 5), torch.tensor([0.5, 0.0, 2.0, 1.0], dtype=torch.float64)
    unit_a, unit_b = (x / (x**2).sum(1, keepdim=True).add(1e-8).sqrt() for x in (a, b))
    expected = sum(head[c] * (unit_a - unit_b)[:, c] ** 2 for c in range(4)).mean()
    torch.testing.assert_close(feature_distance(a, b, head), expected, rtol=1e-13, atol=0)
    assert torch.autograd.gradcheck(feature_distance, (a.requires_grad_(), b, head))


def test_lpips_agrees_with_torchmetrics(network, monkeypatch):
    theirs = pytest.importorskip("torchmetrics.functional.image.lpips")
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda *args: network.features)  # torchvision's layout
    reference = theirs._LPIPS(pretrained=False, net="vgg")
    for number, head in enumerate(network.heads):
        reference.lins[number].model[1].weight.copy_(head[None, :, None, None])
    x, y = pair(2, 3, 48, 64, dtype=torch.float32)
    x.requires_grad_()
    loss, expected = network(x, y), reference(x, y).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in (loss, expected)), rtol=1e-4, atol=1e-9)


def test_lpips_is_frozen_and_its_gradient_flows_to_the_reconstruction(network):
    x, y = (picture.requires_grad_() for picture in pair(1, 3, 32, 32, dtype=torch.float32))
    assert network.train()(y, y) == 0
    network(x, y).backward()
    assert x.grad.norm() > 0 and y.grad is None
    assert all(not p.requires_grad and p.grad is None for p in network.parameters())


def test_lpips_runs_under_autocast(network):
    x, y = pair(1, 3, 32, 32, dtype=torch.float32)
    exact = network(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        loss = network(x.bfloat16().requires_grad_(), y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=3e-2, atol=0)


def test_features_of_zero_have_a_finite_gradient():
    features = torch.zeros(1, 4, 2, 2, requires_grad=True)
    feature_distance(features, torch.ones(1, 4, 2, 2), torch.ones(4)).backward()
    assert features.grad.isfinite().all()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The folder of torch.hub's checkpoints, and the folder of a package with the heads; both are empty."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(losses, "HEADS", (("package_of_heads", "models/vgg.pth"),))

    def unreachable(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.syspath_prepend(tmp_path)
    checkpoints, package = tmp_path / "hub" / "checkpoints", tmp_path / "package_of_heads"
    checkpoints.mkdir(parents=True)
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('imported')")
    return checkpoints, package / "models"


def save_heads(network: LPIPS, folder) -> None:
    heads = {f"lin{n}.model.1.weight": head[None, :, None, None] for n, head in enumerate(network.heads)}
    torch.save(heads, folder / "vgg.pth")


def test_perceptual_loss_loads_the_published_layouts(network, folders):
    checkpoints, models = folders
    save_heads(network, models)
    features = {f"features.{name}": tensor for name, tensor in network.features.state_dict().items()}
    layers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # the convolutions of torchvision's VGG16
    assert features.keys() == {f"features.{layer}.{name}" for layer in layers for name in ("weight", "bias")}
    torch.save(features | {"classifier.6.bias": torch.zeros(1000)}, checkpoints / VGG16_FILE)
    loaded = perceptual_loss(CPU)
    assert loaded.features[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(p.requires_grad for p in loaded.parameters())
    expected = network.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    x, y = pair(1, 3, 32, 32, dtype=torch.float32)
    torch.testing.assert_close(loaded(x, y), network(x, y), rtol=1e-5, atol=0)


def test_published_heads_are_found(network, folders, monkeypatch):
    pytest.importorskip("torchmetrics")
    monkeypatch.setattr(losses, "HEADS", PUBLISHED_HEADS)
    features = {f"features.{name}": tensor for name, tensor in network.features.state_dict().items()}
    torch.save(features, folders[0] / VGG16_FILE)
    heads = perceptual_loss(CPU).heads
    assert [len(head) for head in heads] == [64, 128, 256, 512, 512]
    assert all(head.min() >= 0 and 0 < head.max() < 10 for head in heads)


def test_missing_heads_are_named(folders):
    with pytest.raises(TrainingError, match=r"models/vgg.pth of the package package_of_heads\n.*pip install"):
        perceptual_loss(CPU)


def test_missing_features_are_named(network, folders):
    checkpoints, models = folders
    save_heads(network, models)
    with pytest.raises(TrainingError) as caught:
        perceptual_loss(CPU)
    lines = str(caught.value).split("\n  ")
    assert "no network" in lines[0]
    assert lines[1:] == [f"download {losses.VGG16_URL}", f"into {checkpoints}", "or pass --perceptual none"]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"], ids=["empty", "text"])
def test_damaged_features_are_named(network, folders, content):
    checkpoints, models = folders
    save_heads(network, models)
    (checkpoints / VGG16_FILE).write_bytes(content)
    with pytest.raises(TrainingError, match=f"cannot read the weights of LPIPS from {checkpoints}/{VGG16_FILE}"):
        perceptual_loss(CPU)


def test_features_of_another_network_are_named(network, folders):
    checkpoints, models = folders
    save_heads(network, models)
    torch.save({"features.0.weight": torch.zeros(64, 3, 11, 11)}, checkpoints / VGG16_FILE)
    with pytest.raises(TrainingError, match=f"{VGG16_FILE} or .*vgg.pth has other tensors than LPIPS"):
        perceptual_loss(CPU)
