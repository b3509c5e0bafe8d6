"""Checkpoints of a training: whole or absent, the last few kept, readable on another number of ranks.

    latest.txt                the name of the newest checkpoint
    step-000001000/           is written as .step-000001000.part and renamed
        progress.json         the step, and the state of the gradient scaler
        state/                weights and optimizer, by torch.distributed.checkpoint
        ema/                  the moving average as `DCAEDiffusion.from_pretrained` reads it, float32

The learning rate, the order of the data and all random draws are functions of the seed and the step.
"""

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor

from dcae_fast import distributed
from dcae_fast.files import fsync, written_atomically
from dcae_fast.models import diffusion_checkpoint
from dcae_fast.models.diffusion_zoo import DiffusionConfig

from .config import TrainingError
from .state import State

LATEST = "latest.txt"
BROKEN = (CheckpointException, SafetensorError)  # what the two kinds of files raise


class Checkpoints:
    """Those in a folder, of which the newest `keep` stay."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def latest(self) -> Path | None:
        file = self.folder / LATEST
        if not file.is_file():
            return None
        folder = self.folder / file.read_text().strip()
        if not folder.is_dir():
            raise TrainingError(f"{file} names {folder.name}, which is not there; name another checkpoint in it")
        return folder

    def save(self, state: State) -> None:
        """Called by all ranks. Until latest.txt is replaced, the former checkpoint is the one to go on from."""
        folder = self.folder / f"step-{state.step:09d}"
        part = folder.with_name(f".{folder.name}.part")
        if distributed.is_main():
            for leftover in self.folder.glob(".step-*.part"):
                shutil.rmtree(leftover)
            part.mkdir(parents=True)
            progress = {"step": state.step, "scaler": state.scaler.state_dict()}
            (part / "progress.json").write_text(json.dumps(progress, indent=2) + "\n")
        distributed.barrier()
        with _alone_or_not() as alone:
            dcp.save(_tensors(state), checkpoint_id=part / "state", no_dist=alone)
        if state.average is not None:
            export(state.config, state.average.average, part / "ema")
        distributed.barrier()
        if distributed.is_main():
            fsync(*part.rglob("*"), part)
            _remove(folder)
            part.rename(folder)
            with written_atomically(self.folder / LATEST) as temporary:
                temporary.write_text(folder.name + "\n")
            fsync(self.folder / LATEST, self.folder)
            self._remove_others(folder)
        distributed.barrier()

    def _remove_others(self, newest: Path) -> None:
        """All but the last few up to this one; later ones are of a run that was taken back to an earlier step."""
        steps = sorted(self.folder.glob("step-*"))
        up_to = [folder for folder in steps if folder.name <= newest.name]
        for folder in set(steps) - set(up_to[-self.keep :]):
            _remove(folder)

    def load(self, folder: Path, state: State) -> None:
        """Called by all ranks; the state becomes what `save` was given. Raises TrainingError."""
        try:
            progress = json.loads((folder / "progress.json").read_text())
            tensors = _tensors(state)
            with _alone_or_not() as alone:
                dcp.load(tensors, checkpoint_id=folder / "state", no_dist=alone)
            state.network.load_state_dict(tensors["network"])
            set_optimizer_state_dict(state.network, state.optimizer, tensors["optimizer"])
            if state.average is not None:
                state.average.load(folder / "ema" / diffusion_checkpoint.FILES[0], diffusion_checkpoint.PREFIX)
            state.scaler.load_state_dict(progress["scaler"])
            state.step = progress["step"]
        except (*BROKEN, OSError, ValueError, KeyError, RuntimeError) as error:
            raise TrainingError(f"{folder}: not a checkpoint of this training: {error}") from error


def _tensors(state: State) -> dict[str, Any]:
    optimizer = get_optimizer_state_dict(state.network, state.optimizer)
    return {"network": state.network.state_dict(), "optimizer": optimizer}


def export(config: DiffusionConfig, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Weights or their average, by name, as `DCAEDiffusion.from_pretrained` reads them. Called by all ranks."""
    whole = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if distributed.is_main():
            whole[name] = tensor.cpu()
    if distributed.is_main():
        diffusion_checkpoint.save_state(config, whole, folder)


@contextlib.contextmanager
def _alone_or_not() -> Iterator[bool]:
    """Whether this process is the only one, of which torch need not warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield not distributed.is_distributed()


def _remove(folder: Path) -> None:
    """At once, as far as the name goes: what is half removed has another one."""
    if folder.is_dir():
        shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.old.part")))
