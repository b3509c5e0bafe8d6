"""Weight files that are damaged or contain something else."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_checkpoints import assert_same, build, edit_weights

from dcae_fast.models import zoo
from dcae_fast.models.autoencoder import DCAE
from dcae_fast.models.checkpoint import CheckpointError


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_truncated_file(folder, suffix):
    whole = folder / "model.safetensors"
    if suffix == ".pt":
        torch.save(load_file(whole), folder / "whole.pt")
        whole = folder / "whole.pt"
    content = whole.read_bytes()
    for length in (0, 4, len(content) // 2, len(content) - 1):
        cut = folder / f"cut{suffix}"
        cut.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="not a readable"):
            DCAE.from_pretrained(cut)


def header(content: dict) -> bytes:
    """The start of a safetensors file."""
    written = json.dumps(content).encode()
    return struct.pack("<Q", len(written)) + written


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile",)


@pytest.mark.parametrize(
    "content, message",
    [
        (Hostile(), r"refused, since reading it would run code: it contains \w+\.mkdir"),
        (torch.nn.Linear(2, 2), "refused.*it contains torch.nn.modules.linear.Linear"),
        ([torch.zeros(1)], "holds a list; expected a state dict"),
        ({"model": {}, "ema": {}, "step": 3}, "no plain tensors at model, ema, step"),
        ({"state_dict": {"model": {}}}, "no plain tensors at model"),
        ({3: torch.zeros(1)}, "no plain tensors at 3"),
        ({"a": torch.zeros(2, 2).to_sparse(), "b": torch.zeros(1, device="meta")}, "no plain tensors at a, b"),
    ],
)
def test_pickle_of_something_else(content, message, folder, monkeypatch):
    monkeypatch.chdir(folder)
    torch.save(content, "weights.pt")
    with pytest.raises(CheckpointError, match=message) as error:
        DCAE.from_pretrained("weights.pt")
    assert not Path("hostile").exists() and "weights_only" not in str(error.value)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.safetensors", b"", "it is empty"),
        ("a.pt", b"", "it is empty"),
        ("a.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "`git lfs pull` downloads the file"),
        ("a.safetensors", b"<!DOCTYPE html>", "a web page"),
        ("a.pt", b"no pickle at all", "its 16 bytes are truncated, damaged or not weights"),
        ("a.safetensors", header({"a": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}), "damaged"),
        ("a.safetensors", header({"a": {"dtype": "F99", "shape": [0], "data_offsets": [0, 0]}}), "damaged"),
    ],
)
def test_files_of_something_else(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        DCAE.from_pretrained(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}: not a readable") and words in str(error.value)
    assert "\n" not in str(error.value) and "long long" not in str(error.value)


def test_torchscript(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "program.pt")
    with pytest.raises(CheckpointError, match="program.pt: a TorchScript program; expected the file of a state dict$"):
        DCAE.from_pretrained(tmp_path / "program.pt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int32])
def test_counters_that_were_cast_with_the_rest(dtype, folder):
    """As when PyTorch loads them, the batch norm's number of batches becomes an integer again."""
    edit_weights(folder / "model.safetensors", lambda tensors: {
        name: tensor.to(dtype) if "num_batches" in name else tensor for name, tensor in tensors.items()
    })  # fmt: skip
    assert_same(DCAE.from_pretrained(folder), build())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8, torch.bool])
def test_weights_that_are_no_real_numbers(dtype, folder):
    edit_weights(folder / "model.safetensors", lambda tensors: {k: v.to(dtype) for k, v in tensors.items()})
    with pytest.raises(CheckpointError, match=f"unfit: encoder.project_in.conv.weight {dtype} instead of torch.fl"):
        DCAE.from_pretrained(folder)


def test_a_complex_counter(folder):
    name = "decoder.stages.0.op_list.1.main.conv2.norm.num_batches_tracked"
    edit_weights(folder / "model.safetensors", lambda tensors: tensors | {name: tensors[name].to(torch.complex64)})
    with pytest.raises(CheckpointError, match=f"{name} torch.complex64 instead of torch.int64"):
        DCAE.from_pretrained(folder)


def test_a_bundled_model_without_its_config(folder, monkeypatch):
    monkeypatch.setitem(zoo.BUNDLED, "dc-ae-tiny", folder)
    (folder / "config.json").unlink()
    for load in (DCAE.from_pretrained, DCAE.from_name):
        with pytest.raises(CheckpointError, match="config.json: this file of dcae_fast is missing.*install"):
            load("dc-ae-tiny")


def test_unknown_kind_of_file(folder):
    (folder / "weights.onnx").touch()
    with pytest.raises(CheckpointError, match="unknown file type"):
        DCAE.from_pretrained(folder / "weights.onnx")


@pytest.mark.parametrize(
    "index, message",
    [
        ({"weight_map": {"a": "gone.safetensors"}}, "the shard gone.safetensors is missing"),
        ({"weight_map": {"a": "../model.safetensors"}}, "files beside it"),
        ({"metadata": {}}, "expected a weight_map"),
        ({"weight_map": {"a": "model.safetensors.index.json"}}, "'model.safetensors.index.json' as a shard; expected"),
        ({"weight_map": {"a": ".."}}, "'..' as a shard; expected .safetensors or .pt"),
        ({"weight_map": {"a": ["b"]}}, "files beside it"),
    ],
)
def test_broken_index(folder, index, message):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        DCAE.from_pretrained(folder)
