"""Calibration of 8-bit layers: scales, the error budget, the report, files of scales, pictures."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from small_models import DEVICE, build
from torch import nn

import dcae_fast
from dcae_fast.errors import CheckpointError
from dcae_fast.fast import calibration, int8, pictures, precisions, scales

EVERYTHING = dcae_fast.ErrorBudget(decoding=0, encoding=0, loss=math.inf)
NOTHING = dcae_fast.ErrorBudget(decoding=math.inf, encoding=math.inf)


@pytest.fixture
def model(int8_calls) -> nn.Module:
    return build("strided")


def some_pictures(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1


def calibrated(model: nn.Module, budget: dcae_fast.ErrorBudget = EVERYTHING, seed: int = 0) -> dcae_fast.Report:
    return dcae_fast.patch(model, precision="int8", calibration=some_pictures(seed), error_budget=budget)


def test_scales_of_channels():
    """No value is clipped. Weak channels have room for larger ones."""
    scales = torch.tensor(calibration.scales_of(torch.tensor([127.0, 12.7, 1e-9, 0.0], dtype=torch.float64)))
    torch.testing.assert_close(scales, torch.tensor([1.0, 0.1**0.75, 2**-5.25, 2**-5.25]))
    assert scales.tolist() == list(calibration.scales_of(torch.tensor([127.0, 12.7, 0.5, 0.0], dtype=torch.float64)))


@pytest.mark.parametrize("largest", [0.0, 1e-44, 1e-30])
def test_the_scales_of_zeros(largest):
    """Also of numbers so small that 1 / scale would overflow."""
    assert calibration.scales_of(torch.tensor([largest, 0.0], dtype=torch.float64)) == (1.0, 1.0)


@torch.no_grad()
def test_scales_from_what_a_module_is_called_with(model):
    """The decoder by itself, on two latents: the largest values of each channel, also of linear layers."""
    dcae_fast.patch(model)
    decoder, z = model.decoder, torch.randn(2, 8, 4, 4).to(DEVICE)
    layers, seen = dict(int8.candidates(decoder)), {}
    scales, shares = calibration.observe(decoder, layers, lambda: [decoder(z[:1]), decoder(z[1:])])
    assert scales.keys() == shares.keys() == layers.keys() and 0 < sum(shares.values()) < 1
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    decoder(z)
    for name, x in seen.items():
        x = x if isinstance(layers[name], nn.Linear) else x.movedim(1, -1)
        largest = x.flatten(0, -2).abs().amax(0).double().cpu()
        torch.testing.assert_close(torch.tensor(scales[name]), torch.tensor(calibration.scales_of(largest)))


def budget_of(
    errors: list[float], least: float, loss: float = math.inf, shares: list[float] | None = None
) -> tuple[list[str], calibration.Quality]:
    """The layers that are taken, and their quality, if layer i adds errors[i] to a white picture's black exact one."""
    layers = {f"layer{i}": (nn.Linear(1, 1), (1.0,), 1.0 if shares is None else shares[i]) for i in range(len(errors))}

    def run() -> list[torch.Tensor]:
        total = sum(e for e, (layer, *_) in zip(errors, layers.values(), strict=True) if int8.is_marked(layer))
        return [torch.full((1, 3, 2, 2), total - 1)]

    exact, originals = [torch.full((1, 3, 2, 2), -1.0)], [torch.full((1, 3, 2, 2), -1.1)]
    psnrs, taken, quality = calibration._choose(layers, run, exact, originals, least, loss)
    for name, error in zip(layers, errors, strict=True):
        assert psnrs[name] == pytest.approx(20 * math.log10(2 / error), abs=1e-3)
    assert not int8.is_marked(*(layer for layer, *_ in layers.values()))
    return sorted(taken), quality


def test_the_error_budget():
    errors = [0.02, 0.004, 0.001, 0.002]
    assert budget_of(errors, least=0)[0] == ["layer0", "layer1", "layer2", "layer3"]
    taken, quality = budget_of(errors, least=45)  # an error of 0.01125
    assert taken == ["layer1", "layer2", "layer3"]
    assert quality.psnr == pytest.approx(20 * math.log10(2 / 0.007), abs=1e-3)
    assert budget_of(errors, least=55)[0] == ["layer2", "layer3"]
    assert budget_of(errors, least=math.inf) == ([], calibration.Quality(math.inf, 0.0))


def test_layers_with_many_multiplications_come_first():
    """The squared error counts for each of them."""
    errors = [0.02, 0.004, 0.001, 0.002]
    assert budget_of(errors, least=39, shares=[500, 1, 1, 1])[0] == ["layer0", "layer2"]
    assert budget_of(errors, least=39, shares=[50, 1, 1, 1])[0] == ["layer2", "layer3"]


def test_the_loss_against_the_originals():
    taken, quality = budget_of([0.02, 0.1], least=0, loss=2.0)  # pictures at -1 are clamped; originals at -1.1 are -1
    assert (taken, quality) == ([], calibration.Quality(math.inf, 0.0))


def test_what_stays_exact_is_reported(model):
    report = calibrated(model, NOTHING)
    layers = report.calibration.layers
    assert layers and not any(layer.in_int8 for layer in layers.values())
    assert "8 bit: 0 of" in str(report) and all(name in str(report) for name in layers)
    assert report.precision.endswith("No layer computes in 8 bit: the model computes exactly.") and not report.in_int8
    plain = build("strided")
    dcae_fast.patch(plain)
    with torch.no_grad():
        x = some_pictures().to(DEVICE)
        assert torch.equal(model(x), plain(x))


def test_budgets_are_kept(model):
    """Layers of the decoder stay exact until its error fits, first those with the most error per multiplication."""
    everything = calibrated(model).calibration
    least = everything.decoding.psnr + 3
    found = calibrated(model, dcae_fast.ErrorBudget(decoding=least, encoding=0, loss=math.inf)).calibration
    of_decoder = {name: layer for name, layer in found.layers.items() if name.startswith("decoder.")}
    harm = {name: 10 ** (-layer.psnr / 10) / layer.share for name, layer in of_decoder.items()}
    taken = [harm[name] for name, layer in of_decoder.items() if layer.in_int8]
    rest = [harm[name] for name, layer in of_decoder.items() if not layer.in_int8]
    assert found.decoding.psnr >= least and rest and min(rest) >= max(taken)
    assert found.encoding == everything.encoding
    with torch.no_grad():
        x = some_pictures().to(DEVICE)
        got = model.decoder(build("strided").encoder(x))
    exact = build("strided")(x).detach()
    assert min(calibration.psnrs([got], [exact])) == pytest.approx(found.decoding.psnr, abs=0.05)


def test_models_without_wide_layers(int8_calls):
    report = calibrated(build("adaptive"))
    assert not report.in_int8 and "no layer that can compute in 8 bit" in str(report)


def test_deterministic(model):
    assert calibrated(model).calibration == calibrated(model).calibration


def test_scales_in_a_file(model, tmp_path):
    report = calibrated(model)
    x = some_pictures(1).to(DEVICE)
    with torch.no_grad():
        expected = model(x)
    path = tmp_path / "scales.safetensors"
    report.save_scales(path)
    other = build("strided")
    again = dcae_fast.patch(other, precision="int8", calibration=path)
    assert again == report and str(again) == str(report)
    with torch.no_grad():
        assert torch.equal(other(x), expected)
    assert scales.hash_of(other.bfloat16()) == again.calibration.weights


def test_components_that_are_the_same_module(model, tmp_path, monkeypatch):
    class Pipeline:
        components = {"vae": model, "decoder": model}

    calibrate, calls = precisions.calibrate, []
    monkeypatch.setattr(precisions, "calibrate", lambda *args: calls.append(args) or calibrate(*args))
    report = calibrated(Pipeline())
    assert len(calls) == 1 and report.components["vae"] is report.components["decoder"]
    assert report.replaced == report.components["vae"].replaced
    report.save_scales(tmp_path / "scales.safetensors")
    assert report.in_int8 and int8.is_marked(*(layer for _, layer in int8.candidates(model)))


def test_layers_that_encoder_and_decoder_share(model):
    """They stay exact: an error budget is for one of both."""
    shared = model.encoder.stages[0].op_list[0]
    model.decoder.stages[0].op_list.append(shared)
    report = calibrated(model)
    names = {id(module): name for name, module in model.named_modules()}
    assert report.calibration.layers and not report.calibration.layers.keys() & {
        names[id(module)] for module in shared.modules()
    }


def test_the_calibration_of_another_report(model):
    report, other = calibrated(model), build("strided")
    assert dcae_fast.patch(other, precision="int8", calibration=report.calibration) == report
    with torch.no_grad():
        next(other.parameters())[0] += 0.1
    with pytest.raises(CheckpointError, match="calibration: the scales were calibrated for other weights"):
        dcae_fast.patch(other, precision="int8", calibration=report.calibration)


def test_scales_that_are_refused(model, tmp_path):
    path = tmp_path / "scales.safetensors"
    calibrated(model).save_scales(path)
    with safe_open(path, "pt") as file:
        content = json.loads(file.metadata()[scales.KEY])
    layer = next(iter(content["layers"].values()))
    wrong = {"psnr": ("40", None), "share": ([],), "in_int8": (1,)}
    with torch.no_grad():
        next(model.parameters())[0] += 0.1
    with pytest.raises(CheckpointError, match="calibrated for other weights"):
        dcae_fast.patch(model, precision="int8", calibration=str(path))
    path.write_bytes(path.read_bytes()[:100])
    missing, others, altered = (tmp_path / f"{name}.safetensors" for name in ("missing", "others", "altered"))
    save_file({"weight": torch.zeros(1)}, others)
    reasons = {path: "", missing: "No such file", others: "expected a file that"}
    os.mkfifo(pipe := tmp_path / "pipe.safetensors")
    reasons[pipe] = "not a regular file"
    for broken, reason in reasons.items():
        with pytest.raises(CheckpointError, match=f"cannot be read as scales .*{reason}"):
            dcae_fast.patch(model, precision="int8", calibration=broken)
    for name, values in wrong.items():
        for value in values:
            changed = content | {"layers": {"some": layer | {name: value}}}
            save_file({"some": torch.ones(1)}, altered, {scales.KEY: json.dumps(changed)})
            with pytest.raises(CheckpointError, match="8-bit layers: .* is (not a|neither)"):
                dcae_fast.patch(model, precision="int8", calibration=altered)
    metadata = {scales.KEY: json.dumps(content | {"layers": {"some": layer}})}
    for value in (-1.0, 0.0, 2.0**-126, math.nan, math.inf, 1e39):  # the last is infinite in float32
        save_file({"some": torch.tensor([1.0, value], dtype=torch.float64)}, altered, metadata)
        with pytest.raises(CheckpointError, match="a scale is not a positive number"):
            dcae_fast.patch(model, precision="int8", calibration=altered)
    for tensors in ({}, {"some": torch.tensor(1.0)}, {"other": torch.ones(1)}):
        save_file(tensors, altered, metadata)
        with pytest.raises(CheckpointError, match="cannot be read as scales"):
            dcae_fast.patch(model, precision="int8", calibration=altered)
    save_file({}, altered, {scales.FORMER_KEY: "{}"})
    with pytest.raises(CheckpointError, match="one scale for each layer.*: calibrate again"):
        dcae_fast.patch(model, precision="int8", calibration=altered)
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        calibrated(model).save_scales(tmp_path / "scales.bin")


@pytest.mark.parametrize("count", [0, 5, 33])
def test_scales_for_another_number_of_channels(model, tmp_path, count):
    path = tmp_path / "scales.safetensors"
    calibrated(model).save_scales(path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = next(iter(tensors))
    save_file(tensors | {name: torch.ones(count)}, path, metadata)
    with pytest.raises(CheckpointError, match=f"{count} scales for {name}; expected one for each"):
        dcae_fast.patch(model, precision="int8", calibration=path)


def test_a_pipeline(model, tmp_path):
    class Pipeline:
        components = {"vae": model, "scheduler": object(), "other": nn.Linear(1, 1)}

    report = calibrated(Pipeline())
    assert report.components["vae"].calibration is not None and "vae:" in str(report) and report.in_int8
    report.save_scales(tmp_path / "scales.safetensors")
    dcae_fast.patch(build("strided"), precision="int8", calibration=tmp_path / "scales.safetensors")


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("path", ["encoder.project_in.conv", "decoder.project_out.op_list.2.conv"])
def test_activations_and_results_that_are_not_finite(model, path, value):
    with torch.no_grad():
        model.get_submodule(path).bias.fill_(value)
    with pytest.raises(ValueError, match="is not finite"):
        calibrated(model)


def test_nan_fits_no_budget():
    picture = torch.zeros(1, 3, 2, 2)
    assert calibration.psnrs([picture * math.nan, picture], [picture] * 2) == [-math.inf, math.inf]


def test_pictures_that_the_exact_model_reproduces():
    layer, picture = nn.Linear(1, 1), torch.zeros(1, 3, 2, 2)
    quality = calibration._choose({"layer": (layer, (1.0,), 1.0)}, lambda: [picture], [picture], [picture], 45, 0.05)[2]
    assert quality == calibration.Quality(math.inf, 0.0)


@pytest.mark.parametrize("budget", [{"decoding": math.nan}, {"encoding": "45"}, {"loss": -0.1}])
def test_bad_error_budgets(budget):
    with pytest.raises(ValueError, match=f"error budget: {next(iter(budget))} is"):
        dcae_fast.ErrorBudget(**budget)


def test_bad_options(model):
    with pytest.raises(TypeError, match="error_budget=45; expected a dcae_fast.ErrorBudget"):
        dcae_fast.patch(model, precision="int8", error_budget=45)
    for forgotten in ({"calibration": "photos"}, {"error_budget": EVERYTHING}):
        with pytest.raises(ValueError, match="are for precision='int8'"):
            dcae_fast.patch(model, **forgotten)
    with pytest.raises(ValueError, match="the encoder or decoder cannot be patched"):
        dcae_fast.patch(model, disable="all", precision="int8")
    with pytest.raises(ValueError, match="patch the model, then offload it"):
        dcae_fast.patch(model.to("meta"), precision="int8")


def test_scales_of_layers_that_are_not_patched(model, tmp_path):
    path = tmp_path / "scales.safetensors"
    calibrated(model).save_scales(path)
    report = dcae_fast.patch(model, disable=["bias_act"], precision="int8", calibration=path)
    assert "13 of the 13 8-bit layers compute exactly: not patched, or with hooks" in str(report)
    assert not report.in_int8


def save_picture(path: Path, size: tuple[int, int]) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, "grey").save(path)
    return path


def test_kinds_of_pictures(tmp_path):
    files = [save_picture(tmp_path / "some" / f"{number:02}.png", (8 + number, 9)) for number in range(20)]
    assert [x.shape[3] for x in pictures.load(files[3], 4)] == [8]
    from_folder = [x.shape for x in pictures.load(tmp_path / "some", 1)]
    assert from_folder == [(1, 3, 9, 8 + 20 * index // 8) for index in range(8)]
    both = pictures.load([str(files[0]), torch.zeros(9, 3, 5, 7), torch.zeros(3, 8, 8)], 4)
    assert [tuple(x.shape) for x in both] == [(2, 3, 8, 8), (8, 3, 4, 4), (1, 3, 4, 4)], "a batch for each size"
    large = save_picture(tmp_path / "large.png", (1100, 40))
    assert pictures.load(large, 32)[0].shape == (1, 3, 32, 512)
    assert pictures.load(None, 32)[0].shape == (1, 3, 288, 448)


@pytest.mark.parametrize(
    "bad, reason",
    [
        (torch.zeros(1, 4, 8, 8), "expected finite pictures"),
        (torch.full((1, 3, 8, 8), math.nan), "expected finite pictures"),
        (torch.full((1, 3, 8, 8), 255.0), r"in \[-1, 1\]"),
        ([], "no picture"),
        (torch.zeros(0, 3, 8, 8), "no picture"),
        (torch.zeros(1, 3, 2, 8), "calibration: 8x2 pixels; expected at least 4x4"),
    ],
)
def test_bad_pictures(bad, reason):
    with pytest.raises(ValueError, match=reason):
        pictures.load(bad, 4)


def test_bad_sources(tmp_path):
    with pytest.raises(ValueError, match="small.png: 3x8 pixels"):
        pictures.load(save_picture(tmp_path / "other" / "small.png", (3, 8)), 4)
    (tmp_path / "other" / "small.png").unlink()
    (tmp_path / "other").rmdir()
    with pytest.raises(ValueError, match=f"{tmp_path}: holds no picture"):
        pictures.load([torch.zeros(1, 3, 4, 4), tmp_path], 4)
    with pytest.raises(ValueError, match="cannot be read"):
        pictures.load(tmp_path / "missing.png", 4)
    with pytest.raises(TypeError, match="expected pictures"):
        pictures.load([3], 4)
    with pytest.raises(ValueError, match="a file of scales stands for the whole calibration"):
        pictures.load([torch.zeros(1, 3, 4, 4), "scales.safetensors"], 4)
