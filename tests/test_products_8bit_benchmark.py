"""A rehearsal of the benchmark of 8-bit linear layers, and the errors of 8 bit."""

import json
import sys

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import error_8bit, gradients_8bit, networks, products_8bit
from benchmarks.network_workloads import NetworkWorkload


def test_gradients(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gradients_8bit, "WIDTH", 32)
    monkeypatch.setattr(gradients_8bit, "HIDDEN", 64)
    out = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["gradients_8bit", "--seconds", "0.01", "--out", str(out)])
    products_8bit.main(gradients_8bit.__doc__, gradients_8bit.records)
    records = json.loads(out.read_text())["products-8bit"]
    errors = [(record["contender"], record["error"]) for record in records if "error" in record]
    assert len(errors) == 6 and all(error < (0.01 if name == "bf16" else 0.06) for name, error in errors)
    assert len(capsys.readouterr().out.splitlines()) == len(records) == 14


def test_every_line_is_printed_and_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(products_8bit, "WIDTH", 32)
    monkeypatch.setattr(products_8bit, "ROWS", {"small": 32})
    monkeypatch.setattr(products_8bit, "LAYERS", {"fc2": (64, 32, True)})
    out = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["products_8bit", "--seconds", "0.01", "--out", str(out)])
    products_8bit.main()
    records = json.loads(out.read_text())["products-8bit"]
    layers = {record["contender"]: record["error"] for record in records if "error" in record}
    assert layers["bf16"] < 0.01 < layers["float8"] < 0.06 and 0.003 < layers["int8"] < 0.02
    assert len(capsys.readouterr().out.splitlines()) == len(records) and len(records) > 15


@torch.inference_mode()
def test_errors_of_8_bit_by_layer():
    cpu = torch.device("cpu")
    model = networks.new_network("uvit-tiny-f64", cpu)
    inputs = networks.inputs_of(NetworkWorkload("uvit-tiny-f64", "forward", 2), cpu)
    found = error_8bit.errors_by_layer(model, [inputs], ("bf16", "e4m3", "int8"))
    assert list(found) == [*error_8bit.KINDS, "all"]
    for in_bf16, in_float8, in_int8 in found.values():
        assert 0 < in_bf16 < in_int8 < in_float8 < 0.1
    assert found["all"][1] >= max(found[kind][1] for kind in error_8bit.KINDS)
    assert torch.equal(model(*inputs), networks.new_network("uvit-tiny-f64", cpu)(*inputs))  # nothing stays rounded
