"""The time that each layer saves in 8 bit."""

import pytest
import torch
from small_models import DEVICE, build

import dcae_fast
from dcae_fast.fast import int8, timings
from dcae_fast.models.autoencoder import DCAE

EVERYTHING = dcae_fast.ErrorBudget(decoding=0, encoding=0, loss=float("inf"))


@pytest.fixture
def x() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1).to(DEVICE)


def calibrated(model: torch.nn.Module, x: torch.Tensor) -> dcae_fast.Report:
    return dcae_fast.patch(model, precision="int8", calibration=x, error_budget=EVERYTHING)


@pytest.mark.parametrize("name", ["strided", "diffusers-strided"])
def test_only_the_layer_in_question_changes(int8_calls, monkeypatch, x, name):
    """With a time of 10 for an exact call and 1 for each 8-bit product of the block."""
    model = build(name)
    report = calibrated(model, x)
    layers = dict(int8.candidates(model))
    seen = []

    def time_of(call) -> float:
        int8_calls.clear()
        call()
        seen.append(sum(map(int8.is_marked, layers.values())))
        products = int8_calls["conv2d_int8"] + int8_calls["upsample_conv2d_int8"]
        return 10 - products

    monkeypatch.setattr(timings, "_gpu_milliseconds", time_of)
    before = {name: dict(vars(layer)) for name, layer in layers.items()}
    times = timings.saved(model, report.calibration, x)
    assert times == dict.fromkeys(layers, 1.0)
    assert seen == len(layers) * [len(layers) - 1, len(layers)]
    assert all(vars(layers[name]) == attributes for name, attributes in before.items())


def test_inputs_of_blocks_are_in_8_bit_already(int8_calls, monkeypatch, x):
    model, counts = build("strided"), []
    report = calibrated(model, x)

    def time_of(call) -> float:
        int8_calls.clear()
        call()
        counts.append(int8_calls["quantize"])
        return 0.0

    monkeypatch.setattr(timings, "_gpu_milliseconds", time_of)
    timings.saved(model, report.calibration, x)
    assert counts and not any(counts[1::2])


@pytest.mark.gpu
def test_times_on_a_gpu():
    if not int8.runs_on(torch.device("cuda")):
        pytest.skip("8 bit needs a Hopper GPU")
    model = DCAE.from_pretrained("dc-ae-tiny").eval().to("cuda", torch.bfloat16)
    x = torch.rand(1, 3, 256, 256, device="cuda", dtype=torch.bfloat16) * 2 - 1
    report = calibrated(model, x)
    times = timings.saved(model, report.calibration, x)
    assert times.keys() == report.calibration.layers.keys() and all(abs(time) < 10 for time in times.values())
