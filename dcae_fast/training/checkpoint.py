"""Checkpoints of a training: whole or absent, the last few kept, readable on another number of ranks.

    latest.txt                the name of the newest checkpoint
    step-000001000/           is written as .step-000001000.part and renamed
        progress.json         the step, and the state of the gradient scaler
        state/                weights and optimizer, by torch.distributed.checkpoint
        ema/                  the moving average as `DCAEDiffusion.from_pretrained` reads it, float32
        hashes.json           of these files

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
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor

from dcae_fast import distributed
from dcae_fast.files import fsync, writing, written_atomically
from dcae_fast.memory import is_out_of_memory
from dcae_fast.models import diffusion_checkpoint
from dcae_fast.models.diffusion_zoo import DiffusionConfig

from .config import TrainingError
from .hashes import FILE as HASHES
from .hashes import find_damage, save_hashes
from .state import State

LATEST = "latest.txt"


class Checkpoints:
    """Those in a folder, of which the newest `keep` stay."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def newest_first(self) -> list[Path]:
        """All checkpoints; first the one that latest.txt names, which may be an earlier one by the user's will."""
        steps = sorted(self.folder.glob("step-*"), reverse=True)
        named = [step for step in steps if step.name == self._latest()]
        return named + [step for step in steps if step not in named]

    def _latest(self) -> str | None:
        """What latest.txt says."""
        file = self.folder / LATEST
        return file.read_text(errors="replace").strip() if file.is_file() else None

    def save(self, state: State) -> Path:
        """Called by all ranks. Until latest.txt is replaced, a run resumes from the former checkpoint.

        Raises WriteError, and leaves the former checkpoints as they were.
        """
        folder = self._path(state.step)
        part = folder.with_name(f".{folder.name}.part")
        distributed.on_main(lambda: self._begin(part, state))
        try:
            with writing(folder), _first_failure(), _alone_or_not() as alone:
                dcp.save(_tensors(state), checkpoint_id=part / "state", no_dist=alone)
            if state.average is not None:
                export(state.config, state.average.average, part / "ema")
            save_hashes(part)
            distributed.on_main(lambda: self._finish(part, folder))
        except BaseException:
            if distributed.is_main():
                shutil.rmtree(part, ignore_errors=True)
            raise
        return folder

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}"

    def _begin(self, part: Path, state: State) -> None:
        for leftover in self.folder.glob(".step-*.part"):
            shutil.rmtree(leftover)
        with writing(part):
            part.mkdir(parents=True)
            progress = {"step": state.step, "scaler": state.scaler.state_dict()}
            (part / "progress.json").write_text(json.dumps(progress, indent=2) + "\n")

    def _finish(self, part: Path, folder: Path) -> None:
        fsync(*part.rglob("*"), part)
        _remove(folder)
        part.rename(folder)
        with written_atomically(self.folder / LATEST) as temporary:
            temporary.write_text(folder.name + "\n")
        fsync(self.folder / LATEST, self.folder)
        self._remove_others(folder)

    def _remove_others(self, newest: Path) -> None:
        """All but the last few up to this one; later ones are of a run that was taken back to an earlier step."""
        steps = sorted(self.folder.glob("step-*"))
        up_to = [folder for folder in steps if folder.name <= newest.name]
        for folder in set(steps) - set(up_to[-self.keep :]):
            _remove(folder)

    def load_newest(self, state: State) -> Path | None:
        """The state becomes what `save` was given for the newest whole checkpoint, which is returned; None without any.

        Called by all ranks. Damaged checkpoints are named and passed over. TrainingError if none is whole.
        """
        candidates, latest = distributed.on_main(lambda: (self.newest_first(), self._latest()))
        if candidates and candidates[0].name != latest:
            there = "is not there" if latest is None else f"names {latest[:80]!r}, which is not there"
            distributed.print_main(f"{self.folder / LATEST} {there}; looking for the newest checkpoint", error=True)
        for folder in candidates:
            problem = find_damage(folder) or self._try_to_load(folder, state)
            if problem is None:
                return folder
            distributed.print_main(f"{folder} is damaged and is not used: {problem}", error=True)
        if candidates:
            raise TrainingError(f"{self.folder} has no whole checkpoint; take another folder, or remove this one")
        return None

    def _try_to_load(self, folder: Path, state: State) -> str | None:
        """What is wrong with a checkpoint without hashes, None if nothing is. With hashes, raises TrainingError."""
        problem = None
        try:
            self.load(folder, state)
        except TrainingError as error:
            if (folder / HASHES).exists():
                raise
            problem = str(error)
        return next(filter(None, distributed.all_gather(problem)), None)

    def load(self, folder: Path, state: State) -> None:
        """Called by all ranks; the state becomes what `save` was given. Raises TrainingError."""
        try:
            progress = json.loads((folder / "progress.json").read_text())
            tensors = _tensors(state)
            with _first_failure(), _alone_or_not() as alone:
                dcp.load(tensors, checkpoint_id=folder / "state", no_dist=alone)
            state.network.load_state_dict(tensors["network"])
            set_optimizer_state_dict(state.network, state.optimizer, tensors["optimizer"])
            if state.average is not None:
                state.average.load(folder / "ema" / diffusion_checkpoint.FILES[0], diffusion_checkpoint.PREFIX)
            state.scaler.load_state_dict(progress["scaler"])
            state.step = _step(progress)
        except Exception as error:  # a damaged file can make its reader raise anything
            if is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0] or repr(error)
            raise TrainingError(f"{folder}: not a checkpoint of this training: {reason}") from error


def _step(progress: dict[str, Any]) -> int:
    step = progress["step"]
    if type(step) is not int or step < 0:
        raise ValueError(f"its step is {step!r}; expected an integer of at least 0")
    return step


@contextlib.contextmanager
def _first_failure() -> Iterator[None]:
    """Raises what made a part of a distributed checkpoint fail, rather than a report of all ranks' tracebacks."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


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
    distributed.on_main(lambda: diffusion_checkpoint.save_state(config, whole, folder))


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
