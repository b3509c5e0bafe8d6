"""`DCAEDiffusion`: generated latents equal the original's, and arguments are checked."""

import json
from dataclasses import replace

import pytest
import torch
from small_diffusion import AUTOENCODER, DIT, FLOW, TRAINING, UVIT, build

import dcae_fast
from dcae_fast.diffusion import DCAEDiffusion
from dcae_fast.models.autoencoder import DCAE
from dcae_fast.models.diffusion_zoo import DIFFUSION_MODELS, DiffusionConfig
from dcae_fast.models.dit import DiTConfig
from dcae_fast.models.uvit import UViTConfig
from dcae_fast.sampling import SAMPLERS, guided

SAMPLES, EXACT = 2e-5, 5e-3
LABELS = torch.tensor([3, 1, 4])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def of_case(case) -> DCAEDiffusion:
    """The network of the fixtures with a small autoencoder."""
    sampler = case.meta["eval_scheduler"]
    options = {k: v for k, v in case.file_meta["config"].items() if k != "train_scheduler"}
    config = DiffusionConfig(
        network={"UViT": UViTConfig, "DiT": DiTConfig}[case.file_meta["model"]](**options),
        autoencoder="small",
        scaling_factor=0.5,
        train_scheduler=TRAINING[sampler],
        eval_scheduler=sampler,
        num_inference_steps=case.meta["steps"],
    )
    network = config.build()
    network.load_state_dict(case.tensors("state"))
    return DCAEDiffusion(config, network, DCAE(AUTOENCODER)).eval()


@pytest.mark.cases("diffusion_*", "generate_*")
def test_generate(case, compare, monkeypatch):
    """Compares with the original's noise; for dopri5, whose steps may differ, compares only the solution."""
    dopri5 = case.meta["eval_scheduler"] == "ODE_dopri5"
    if dopri5:
        pytest.importorskip("torchdiffeq")
    model, given = of_case(case), case.tensors(case.name)
    null = torch.full_like(given["labels"], model.config.network.num_classes)
    for scale in case.meta["scales"]:
        recorded = case.tensors(f"{case.name}/scale{scale}")
        draws = iter([given["noise"], *recorded.get("step_noise", [])])
        monkeypatch.setattr(torch, "randn", lambda shape, draws=draws, **_: next(draws))
        samples = model.generate(given["labels"], null, float(scale))
        expected, limit = (recorded["exact"], EXACT) if dopri5 else (recorded["samples"], SAMPLES)
        compare(case.file, samples, expected, limit, f"samples, scale {scale}")


@pytest.mark.parametrize("config", [UVIT, FLOW, DIT], ids=["uvit", "flow", "dit"])
def test_seeds(config):
    model = build(config)
    first = model.generate(LABELS, cfg_scale=2.0, generator=seeded())
    assert first.shape == (3, 8, 4, 4) and first.dtype == torch.float32 and not first.requires_grad
    assert torch.equal(model.generate(LABELS, cfg_scale=2.0, generator=seeded()), first)
    assert not torch.equal(model.generate(LABELS, cfg_scale=2.0, generator=seeded(1)), first)


def test_noise_depends_on_the_position_and_not_on_the_label():
    """The noise is drawn once per batch, so a sample depends only on its label and its position."""
    model = build()
    first = model.generate(LABELS, cfg_scale=2.0, generator=seeded())
    other = model.generate(torch.tensor([3, 9, 0]), cfg_scale=2.0, generator=seeded())
    torch.testing.assert_close(other[0], first[0])
    assert not torch.allclose(other[1], first[1])
    noise = torch.randn(3, 8, 4, 4, generator=seeded())
    alone = SAMPLERS["DPM_Solver"](guided(model.diffusion_model, LABELS[1:2], 10, 2.0), noise[1:2], 6)
    torch.testing.assert_close(alone[0], first[1])


def test_null_labels():
    model = build()
    default = model.generate(LABELS, cfg_scale=2.0, generator=seeded())
    for dtype in (torch.int32, torch.int64):
        null = torch.full((3,), 10, dtype=dtype)
        assert torch.equal(model.generate(LABELS.to(dtype), null, 2.0, seeded()), default)
    other = model.generate(LABELS, torch.tensor([10, 0, 0]), 2.0, seeded())
    torch.testing.assert_close(other[0], default[0])
    assert not torch.allclose(other[1:], default[1:])


def test_everything_overridden():
    model, calls = build(FLOW), []
    model.diffusion_model.register_forward_hook(lambda module, args, out: calls.append((args[1][0].item(), len(out))))
    passed = []
    options = {"interval": (0.3, 0.7), "sampler": "SDE", "steps": 5, "progress": lambda: passed.append(len(calls))}
    samples = model.generate(LABELS, None, 3.0, seeded(), **options)
    assert [batch for _, batch in calls] == [3, 3, 6, 3, 3] and passed == [1, 2, 3, 4, 5]
    assert calls[2][0] == pytest.approx(0.48)
    generator = seeded()
    noise = torch.randn(3, 8, 4, 4, generator=generator)
    network = guided(model.diffusion_model, LABELS, 10, 3.0, (0.3, 0.7))
    assert torch.equal(samples, SAMPLERS["SDE"](network, noise, 5, generator))


def test_fewer_channels_of_adaptive_models():
    model = build(replace(UVIT, network=replace(UVIT.network, adaptive=True)))
    assert model.generate(LABELS, generator=seeded(), channels=5).shape == (3, 5, 4, 4)
    with pytest.raises(ValueError, match="channels=5; expected 8"):
        build().generate(LABELS, channels=5)


@pytest.mark.parametrize("sampler", TRAINING)
def test_no_labels(sampler):
    model = build({"DPM_Solver": UVIT, "SiTSampler": FLOW, "GaussianDiffusion": DIT}[TRAINING[sampler]])
    assert model.generate(LABELS[:0], cfg_scale=2.0, sampler=sampler).shape == (0, 8, 4, 4)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "weights"])
@torch.no_grad()
def test_half_precision(autocast):
    model = build()
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    exact, picture = model.generate(LABELS, generator=seeded()), model.decode(model.encode(x))
    if not autocast:
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        samples = model.generate(LABELS, generator=seeded())
    assert samples.dtype == torch.float32 and not torch.equal(samples, exact)
    assert (samples - exact).norm() < 2e-2 * exact.norm()
    if not autocast:
        decoded = model.decode(model.encode(x.bfloat16()).float())
        assert decoded.dtype == torch.bfloat16
        assert (decoded - picture).norm() < 5e-2 * picture.norm()


@torch.no_grad()
def test_latents_are_scaled():
    model, x = build(), torch.rand(2, 3, 8, 8) * 2 - 1
    torch.testing.assert_close(model.encode(x), model.autoencoder.encode(x) * 0.4)
    torch.testing.assert_close(model.decode(model.encode(x)), model.autoencoder(x))


def test_patched():
    model = build()
    plain = model.generate(LABELS, cfg_scale=2.0, generator=seeded())
    with torch.no_grad():
        picture = model.decode(plain)
    assert dcae_fast.patch(model).replaced
    with torch.no_grad():
        torch.testing.assert_close(model.decode(plain), picture)
    torch.testing.assert_close(model.generate(LABELS, cfg_scale=2.0, generator=seeded()), plain)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (
            {"labels": torch.tensor([0.0])},
            TypeError,
            "labels has dtype torch.float32; expected int32 or int64, from 0 to 10",
        ),
        ({"labels": torch.tensor([0, 11])}, ValueError, r"labels=\[0, 11\]; expected 0 to 10, where 10 means no class"),
        ({"labels": torch.tensor([-1])}, ValueError, r"labels=\[-1\]"),
        ({"labels": torch.tensor(3)}, ValueError, r"labels has shape \[\]; expected \[B\]"),
        ({"null_labels": torch.tensor([10, 11, 0])}, ValueError, "null_labels="),
        ({"null_labels": torch.tensor([10]).expand(2)}, ValueError, "null_labels has 2 entries; expected 3"),
        ({"sampler": "SDE"}, ValueError, "sampler 'SDE'; the model was trained for DPM_Solver"),
        ({"labels": [3, 1, 4]}, TypeError, r"labels is a list; expected a tensor \[B\] of integers"),
        ({"null_labels": 10}, TypeError, "null_labels is a int; expected a tensor"),
        ({"cfg_scale": float("nan")}, ValueError, "cfg_scale=nan; expected a finite number"),
        ({"cfg_scale": -float("inf")}, ValueError, "cfg_scale=-inf; expected a finite number"),
        ({"cfg_scale": "6"}, TypeError, "cfg_scale='6'; expected a number"),
        ({"steps": 0}, ValueError, "steps=0; expected 1 to 100000"),
        ({"steps": 10**30}, ValueError, "steps=10{30}; expected 1 to 100000"),
        ({"steps": 2.5}, TypeError, "steps=2.5; expected an integer"),
        ({"interval": (1, 0)}, ValueError, r"interval=\(1, 0\)"),
        ({"interval": (0, float("nan"))}, ValueError, r"interval=\(0, nan\)"),
        ({"interval": 0.5}, TypeError, r"interval=0.5; expected two numbers \(lo, hi\)"),
        ({"channels": 0}, ValueError, "channels=0; expected 8"),
        ({"generator": 0}, TypeError, "generator is a int; expected a torch.Generator"),
    ],
)
def test_invalid_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        build().generate(**{"labels": LABELS, "cfg_scale": 2.0} | arguments)


def test_a_generator_of_another_device():
    with pytest.raises(ValueError, match="generator is on cpu; expected a generator on meta, as the model is"):
        build().to("meta").generate(LABELS, generator=seeded())


def test_an_autoencoder_of_other_latents():
    with pytest.raises(ValueError, match="the autoencoder has 4 latent channels; the diffusion model expects 8"):
        DCAEDiffusion(UVIT, UVIT.build(), DCAE(replace(AUTOENCODER, latent_channels=4)))


@pytest.mark.parametrize("name", DIFFUSION_MODELS)
def test_from_name(name, reference):
    entry = json.loads((reference / "diffusion_models.json").read_text())[name]
    with torch.device("meta"):
        model = DCAEDiffusion.from_name(name)
    assert (model.config.name, model.scaling_factor) == (name, entry["scaling_factor"])
    assert model.autoencoder.config.name == entry["autoencoder"]
    assert sum(parameter.numel() for parameter in model.diffusion_model.parameters()) == entry["parameters"]
    assert model.autoencoder.spatial_compression_ratio * model.config.network.input_size == entry["resolution"]
