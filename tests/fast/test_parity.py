"""Results of a patched model, compared with the original implementation and with the unpatched model."""

import copy
import math

import pytest
import torch
from small_models import (
    DEVICE,
    GRADIENT,
    MODELS,
    OUTPUT,
    assert_as_accurate,
    build,
    image,
    operators_called,
    reconstruct,
    step,
    step_errors,
)

import dcae_fast
from dcae_fast.models import blocks, convert
from dcae_fast.models.autoencoder import DCAE


def patched_model_of(case) -> DCAE:
    model = DCAE(convert.config_from_original(case.file_meta["config"]))
    model.load_state_dict(case.tensors("state"))
    dcae_fast.patch(model)
    return model.eval().to(DEVICE)


@pytest.mark.cases("ae_*_f32" if DEVICE == "cuda" else "ae_[1s]*_f32", "small")  # the interpreter is slow on large ones
@torch.no_grad()
def test_original_evaluation(case, compare):
    model, tensors = patched_model_of(case), case.tensors(case.name)
    compare(case.file, model.encode(tensors["image"].to(DEVICE)), tensors["latent"], OUTPUT, "latent")
    compare(case.file, model.decode(tensors["latent"].to(DEVICE)), tensors["recon"], OUTPUT, "reconstruction")


@pytest.mark.cases("ae_1_5_f32", "partial")
@torch.no_grad()
def test_original_partial_latents(case, compare):
    model, tensors, channels = patched_model_of(case), case.tensors("partial"), case.meta["latent_channels"]
    latents = model.encode(case.tensors("small")["image"].to(DEVICE), channels)
    for n, latent in zip(channels, latents, strict=True):
        assert latent.is_contiguous()
        compare(case.file, latent, tensors[f"latent_c{n}"], OUTPUT, f"latent, {n} channels")
    n, latent = channels[0], latents[0]
    compare(case.file, model.decode(latent), tensors[f"recon_c{n}"], OUTPUT, f"reconstruction, {n} channels")


@pytest.mark.cases("ae_in_f32", "train")
def test_original_training(case, compare):
    """Outputs, norms of all gradients, running statistics, and the gradients that the fixture contains in full."""
    model, tensors = patched_model_of(case).train(), case.tensors("train")
    picture = tensors["image"].to(DEVICE)
    reconstruction = model(picture)
    (reconstruction - picture).abs().mean().backward()
    compare(case.file, reconstruction, tensors["recon"], OUTPUT, "reconstruction")
    for name, parameter in model.named_parameters():
        norm = torch.tensor(case.meta["grad_l2"][name])
        compare(case.file, parameter.grad.norm(), norm, GRADIENT, f"{name}, norm")
        if f"grad/{name}" in tensors:
            compare(case.file, parameter.grad, tensors[f"grad/{name}"], GRADIENT, name)
    total = math.sqrt(sum(parameter.grad.square().sum().item() for parameter in model.parameters()))
    assert total == pytest.approx(case.meta["total_grad_l2"], rel=GRADIENT)
    for name, expected in case.tensors("train/stats").items():
        torch.testing.assert_close(model.get_buffer(name).cpu(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_step(name, train, same_step):
    model = build(name).train(train)
    expected = step(copy.deepcopy(model), image())
    dcae_fast.patch(model)
    same_step(step(model, image()), expected)


@pytest.mark.parametrize("name", ["strided", "diffusers-strided"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(name, dtype):
    """The error against float64 is at most twice the unpatched model's.

    Triton's interpreter truncates instead of rounding.
    """
    model = build(name, wide=True).to(dtype)
    double, pictures = copy.deepcopy(model).double(), [image(1, 3, 16, 12, seed=seed).to(dtype) for seed in range(8)]
    exact = [step(double, x.double()) for x in pictures]
    eager = [step_errors(step(model, x), want) for x, want in zip(pictures, exact, strict=True)]
    dcae_fast.patch(model)
    got = step(model, pictures[0])
    assert all(value.dtype == dtype for name, value in got.items() if name.startswith(("output", "gradient")))
    assert_as_accurate(step_errors(got, exact[0]), eager)


@pytest.mark.parametrize("name", ["shuffled", "diffusers-shuffled"])
def test_double_precision_is_left_alone(name):
    model, x = build(name).double(), image().double()
    expected = reconstruct(model, x)
    dcae_fast.patch(model)
    assert torch.equal(reconstruct(model, x), expected)


EVERY = (
    "bias_act rms_norm depthwise_glu multiscale_qkv relu_linear_attention unshuffle_average_add duplicate_shuffle_add "
    "fold_batch_norm res_block"
)


@pytest.mark.parametrize(
    "name, operators",
    [
        ("strided", f"{EVERY} transposed_weights"),
        ("adaptive", "res_block rms_norm unshuffle_average_add duplicate_shuffle_add"),
        ("diffusers-strided", f"{EVERY} transposed_weights"),
    ],
)
def test_kernels_are_used(name, operators):
    model = build(name)
    dcae_fast.patch(model)
    assert set(operators_called(reconstruct, model, image())) == set(operators.split())


@pytest.mark.parametrize("name", ["strided", "diffusers-strided"])
def test_training_under_autocast(name):
    """Kernels compute the gradients of both parts of multi-scale attention, although the weights are float32."""
    eager, x = build(name, wide=True).train(), image(1, 3, 16, 12)
    double, fast = copy.deepcopy(eager).double(), copy.deepcopy(eager)
    dcae_fast.patch(fast)

    def train(model, picture):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=model is not double):
            return step(model, picture)

    called = operators_called(train, fast, x)
    assert called["multiscale_qkv"] == called["multiscale_qkv_backward"] > 0
    pictures = [image(1, 3, 16, 12, seed=seed) for seed in range(4)]
    exact = [train(double, picture.double()) for picture in pictures]
    errors = [step_errors(train(eager, picture), want) for picture, want in zip(pictures, exact, strict=True)]
    assert_as_accurate(step_errors(train(fast, pictures[0]), exact[0]), errors)


@pytest.mark.parametrize("name", ["adaptive", "diffusers-shuffled"])
@torch.no_grad()
def test_memory_format(name, compare):
    model = build(name)
    twice_as_wide = image(1, 3, 8, 16)
    inputs = {
        "contiguous": image(2, 3, 8, 8),
        "channels_last": image(2, 3, 8, 8).contiguous(memory_format=torch.channels_last),
        "strided": twice_as_wide[..., ::2],
        "transposed": image(1, 3, 8, 8).mT,
        "expanded": image(1, 1, 8, 8).expand(1, 3, 8, 8),
    }
    expected = {layout: reconstruct(model, x) for layout, x in inputs.items()}
    dcae_fast.patch(model)
    for layout, x in inputs.items():
        y = reconstruct(model, x)
        compare("eager", y, expected[layout], OUTPUT, layout)
        assert y.is_contiguous() == (layout != "channels_last")
        assert y.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


def test_calls_without_a_batch():
    """Kernels do not support images without a batch dimension; the original forward runs."""
    layer, x = blocks.ConvLayer(3, 8, act="silu").to(DEVICE), image(3, 4, 4)
    alone = layer(x)
    dcae_fast.patch(layer)
    assert torch.equal(layer(x), alone)
