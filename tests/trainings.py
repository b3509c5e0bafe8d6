"""Shared by the tests of all trainings: a run that ends early, what it writes, and all of its state."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from dcae_fast.training.engine.loop import Training
from dcae_fast.training.engine.state import State


def run_until(step: int, training: Training) -> State:
    """The state of a run that is killed after so many steps: it writes no checkpoint at the end, and no result."""
    training.steps = range(training.state.step, step)
    training.run_all()
    training.log.close()
    return training.state


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that a training exports at the end."""
    return load_file(folder / "model" / "model.safetensors")


def everything(state: State) -> dict[str, torch.Tensor]:
    """All tensors and numbers of a state, by name."""
    tensors = {}
    if state.average is not None:
        tensors |= {f"average.{name}": tensor for name, tensor in state.average.average.items()}
    for network, trained in state.networks.items():
        tensors |= {f"{network}.{name}": tensor for name, tensor in trained.network.state_dict().items()}
        for number, values in trained.optimizer.state_dict()["state"].items():
            tensors |= {f"{network}.optimizer.{number}.{name}": value for name, value in values.items()}
        for name, value in trained.scaler.state_dict().items():
            tensors[f"{network}.scaler.{name}"] = torch.tensor(value)
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different
