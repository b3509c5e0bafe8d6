"""Small autoencoders of every style against the original implementation and against diffusers."""

import pytest
import torch

from dcae_fast.models import convert
from dcae_fast.models.autoencoder import DCAE

OUTPUT, GRADIENT, STATISTICS = 5e-6, 1e-4, 1e-4


def build(case) -> DCAE:
    model = DCAE(convert.config_from_original(case.file_meta["config"]))
    model.load_state_dict(case.tensors("state"))
    return model.eval()


@pytest.mark.cases("ae_*", "small", "large")
def test_evaluation(case, compare):
    model, tensors = build(case), case.tensors(case.name)
    assert sum(parameter.numel() for parameter in model.parameters()) == case.file_meta["parameters"]
    assert model.spatial_compression_ratio == case.file_meta["spatial_compression_ratio"]
    with torch.no_grad():
        compare(case.file, model.encode(tensors["image"]), tensors["latent"], OUTPUT, "latent")
        compare(case.file, model.decode(tensors["latent"]), tensors["recon"], OUTPUT, "reconstruction of the latent")
        compare(case.file, model(tensors["image"]), tensors["recon"], OUTPUT, "reconstruction")


@pytest.mark.cases("ae_*", "partial")
@torch.no_grad()
def test_partial_latents(case, compare):
    model, tensors, channels = build(case), case.tensors("partial"), case.meta["latent_channels"]
    image = case.tensors("small")["image"]
    latents = model.encode(image, channels)
    for n, latent in zip(channels, latents, strict=True):
        assert torch.equal(model.encode(image, n), latent)
        compare(case.file, latent, tensors[f"latent_c{n}"], OUTPUT, f"latent, {n} channels")
        compare(case.file, model.decode(latent), tensors[f"recon_c{n}"], OUTPUT, f"reconstruction, {n} channels")


def training_step(case, dtype: torch.dtype) -> tuple[DCAE, torch.Tensor, torch.Tensor, torch.Tensor]:
    model, image = build(case).train().to(dtype), case.tensors("train")["image"].to(dtype)
    latent = model.encode(image, case.meta["latent_channels"])
    reconstruction = model.decode(latent)
    return model, latent, reconstruction, (reconstruction - image).abs().mean()


@pytest.mark.cases("ae_*", "train*")
@torch.no_grad()
def test_training_outputs(case, compare):
    tensors = case.tensors(case.name)
    model, latent, reconstruction, loss = training_step(case, torch.float32)
    compare(case.file, latent, tensors["latent"], OUTPUT, "latent")
    compare(case.file, reconstruction, tensors["recon"], OUTPUT, "reconstruction")
    compare(case.file, loss, torch.tensor(case.meta["loss_float64"]), OUTPUT, "loss")
    buffers = dict(model.named_buffers())
    for name, expected in case.tensors(f"{case.name}/stats").items():
        torch.testing.assert_close(buffers[name], expected, atol=STATISTICS, rtol=0)


@pytest.mark.cases("ae_*", "train*")
def test_training_gradients(case, compare_gradients):
    """In float64: on a CPU, a float32 convolution may sum its bias's gradient sequentially, with an error of 1e-4."""
    model, _, _, loss = training_step(case, torch.float64)
    loss.backward()
    compare_gradients(case, {name: parameter.grad for name, parameter in model.named_parameters()}, GRADIENT)


@pytest.mark.cases("ae_*", "small")
def test_against_diffusers(case, compare):
    """diffusers' AutoencoderDC computes the same with our converted weights and configuration."""
    diffusers = pytest.importorskip("diffusers")
    model, image = build(case), case.tensors("small")["image"]
    twin = diffusers.AutoencoderDC(**convert.config_to_diffusers(model.config)).eval()
    twin.load_state_dict(convert.state_dict_to_diffusers(model.state_dict()))
    with torch.no_grad():
        latent = model.encode(image)
        compare(f"{case.file} (diffusers)", twin.encode(image).latent, latent, OUTPUT, "latent")
        compare(f"{case.file} (diffusers)", twin.decode(latent).sample, model.decode(latent), OUTPUT, "reconstruction")


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda model: model.encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)), TypeError, "x is torch.uint8"),
        (lambda model: model.encode([[0.0]]), TypeError, "x is of type list; expected a floating point tensor"),
        (lambda model: model.encode(torch.zeros(3, device="cpu").numpy()), TypeError, "x is of type ndarray"),
        (lambda model: model.encode(torch.zeros(3, 64, 64)), ValueError, r"x has shape \[3, 64, 64\]"),
        (lambda model: model.encode(torch.zeros(1, 4, 64, 64)), ValueError, r"expected \[B, 3, height, width\]"),
        (lambda model: model.encode(torch.zeros(1, 3, 64, 80)), ValueError, "64x80 pixels; .* multiples of 32"),
        (lambda model: model.encode(torch.zeros(1, 3, 0, 64)), ValueError, "height and width of at least 1"),
        (lambda model: model.encode(torch.zeros(1, 3, 64, 64), 16), ValueError, "always have 32 channels"),
        (lambda model: model.decode(torch.zeros(1, 31, 2, 2)), ValueError, r"expected \[B, 32, height, width\]"),
        (lambda model: model.decode(torch.zeros(1, 32, 2, 2).long()), TypeError, "z is torch.int64"),
    ],
)
def test_inputs_that_do_not_fit(call, error, message):
    with torch.device("meta"):
        model = DCAE.from_name("dc-ae-f32c32-in-1.0")
        with pytest.raises(error, match=message):
            call(model)


def test_partial_latents_out_of_range():
    with torch.device("meta"):
        model = DCAE.from_name("dc-ae-f32c128-1.5")
        with pytest.raises(ValueError, match="numbers from 1 to 128"):
            model.encode(torch.zeros(1, 3, 64, 64), [64, 129])
        with pytest.raises(ValueError, match=r"expected \[B, 1 to 128, height, width\]"):
            model.decode(torch.zeros(1, 129, 2, 2))
        assert model.decode(model.encode(torch.zeros(2, 3, 64, 96), 16)).shape == (2, 3, 64, 96)
