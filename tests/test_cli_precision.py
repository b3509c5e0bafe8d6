"""The option --precision of the commands that run a transformer."""

import pytest
import torch
from small_diffusion import build

from dcae_fast import cli
from dcae_fast.commands.common import Compute
from dcae_fast.fast import operands, precisions, rows8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMMANDS = {"sample": ["--labels", "3", "--steps", "2"], "eval-diffusion": ["--samples", "2", "--steps", "2"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    build().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_the_transformer_computes_in_8_bit(precision, model, monkeypatch):
    monkeypatch.setattr(rows8, "runs_on", lambda device: True)
    network, computed = Compute(device=DEVICE).load_diffusion(model, precision)
    assert computed == f"exact, transformer {precision}"
    marked = [name for name, module in network.named_modules() if operands.ROWS8 in vars(module)]
    assert len(marked) == 13 and all(name.startswith("diffusion_model.") for name in marked)
    assert Compute(device=DEVICE).load_diffusion(model)[1] == "exact"


@pytest.mark.parametrize("command, precision", [("sample", "fp8"), ("eval-diffusion", "int8")])
def test_a_device_without_8_bit_says_so(command, precision, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rows8, "runs_on", lambda device: False)
    options = ["--model", model, "--device", DEVICE, "--out", str(tmp_path / "out.png"), *COMMANDS[command]]
    if command == "eval-diffusion":  # whose status is 1, since a metric is missing
        options += ["--save", "npz"]
    assert cli.main([command, *options, "--precision", precision]) == (command == "eval-diffusion")
    assert f"--precision: {precision} needs a Hopper GPU" in capsys.readouterr().err


def test_int8_of_the_autoencoder_leaves_the_transformer_exact(model, monkeypatch):
    """--int8 and --precision are independent of each other."""
    calibrated = []
    monkeypatch.setattr(precisions, "calibration_of", lambda autoencoder, *args: calibrated.append(autoencoder))
    network, _ = Compute(device=DEVICE, int8=()).load_diffusion(model)
    assert set(calibrated) == {network.autoencoder}
    assert not any(operands.ROWS8 in vars(module) for module in network.modules())


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("options, message", [
    (["--no-patch"], "--precision fp8 --no-patch: only a patched model has 8 bit"),
    (["--dtype", "float32"], "--precision fp8 --dtype float32: 8 bit is for half precision"),
])  # fmt: skip
def test_options_that_do_not_fit(command, options, message, model, tmp_path, capsys):
    common = ["--model", model, "--device", DEVICE, "--out", str(tmp_path / "out.png"), *COMMANDS[command]]
    assert cli.main([command, *common, "--precision", "fp8", *options]) == 2
    assert message in capsys.readouterr().err
