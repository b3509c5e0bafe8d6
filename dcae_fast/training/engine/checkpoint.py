"""Checkpoints of a training: whole or absent, the last few are kept, and any number of ranks can read them.

    latest.txt                the name of the newest checkpoint
    step-000001000/           is written as .step-000001000.part and renamed
        progress.json         {"step": ..., "scalers": the state of the gradient scaler of each network, by name}
        state/                by torch.distributed.checkpoint: {NETWORK: {"network": weights, "optimizer": ...}}
        ema/                  the exported network with its moving average for weights, by `State.export`; if it has one
        hashes.json           the hash of each of these files

Nothing else is saved: learning rates, the data order and all random numbers are functions of the seed and the step.
"""

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor

from dcae_fast import distributed
from dcae_fast.files import fsync, writing, written_atomically
from dcae_fast.memory import is_out_of_memory

from .config import TrainingError
from .hashes import FILE as HASHES
from .hashes import find_damage, save_hashes
from .state import State, Trained

LATEST = "latest.txt"


class Checkpoints:
    """The checkpoints in a folder. `save` removes all but the newest `keep`."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def newest_first(self) -> list[Path]:
        """All checkpoints. The one that latest.txt names comes first; the user may have named an earlier one."""
        steps = sorted(self.folder.glob("step-*"), reverse=True)
        named = [step for step in steps if step.name == self._latest()]
        return named + [step for step in steps if step not in named]

    def _latest(self) -> str | None:
        """The content of latest.txt."""
        file = self.folder / LATEST
        return file.read_text(errors="replace").strip() if file.is_file() else None

    def save(self, state: State) -> Path:
        """Called by all ranks. Until latest.txt is replaced, a run resumes from the former checkpoint.

        Raises WriteError, and leaves the former checkpoints unchanged.
        """
        folder = self._path(state.step)
        part = folder.with_name(f".{folder.name}.part")
        distributed.on_main(lambda: self._begin(part, state))
        try:
            with writing(folder), _first_failure(), _is_only_process() as alone:
                dcp.save(_tensors(state), checkpoint_id=part / "state", no_dist=alone)
            if state.average is not None:
                export(state, part / "ema")
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
            scalers = {name: trained.scaler.state_dict() for name, trained in state.networks.items()}
            progress = {"step": state.step, "scalers": scalers}
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
        """Keeps the last few up to this one. Later ones exist if the run was taken back to an earlier step."""
        steps = sorted(self.folder.glob("step-*"))
        up_to = [folder for folder in steps if folder.name <= newest.name]
        for folder in set(steps) - set(up_to[-self.keep :]):
            _remove(folder)

    def load_newest(self, state: State) -> Path | None:
        """Loads the newest whole checkpoint into the state and returns its folder; None if there is no checkpoint.

        Called by all ranks. Names damaged checkpoints and passes them over. TrainingError if all are damaged.
        """
        candidates, latest = distributed.on_main(lambda: (self.newest_first(), self._latest()))
        if candidates and candidates[0].name != latest:
            problem = "does not exist" if latest is None else f"names {latest[:80]!r}, which does not exist"
            distributed.print_main(f"{self.folder / LATEST} {problem}; looking for the newest checkpoint", error=True)
        for folder in candidates:
            problem = find_damage(folder) or self._try_to_load(folder, state)
            if problem is None:
                return folder
            distributed.print_main(f"{folder} is damaged and is not used: {problem}", error=True)
        if candidates:
            raise TrainingError(f"{self.folder} has no whole checkpoint; choose another folder, or remove this one")
        return None

    def _try_to_load(self, folder: Path, state: State) -> str | None:
        """Loads a checkpoint; if it has no hashes, returns why it cannot be loaded, else raises TrainingError."""
        problem = None
        try:
            self.load(folder, state)
        except TrainingError as error:
            if (folder / HASHES).exists():
                raise
            problem = str(error)
        return next(filter(None, distributed.all_gather(problem)), None)

    def load(self, folder: Path, state: State) -> None:
        """Loads a checkpoint into the state. Called by all ranks. Raises TrainingError."""
        try:
            progress = json.loads((folder / "progress.json").read_text())
            tensors = _tensors(state)
            with _first_failure(), _is_only_process() as alone:
                dcp.load(tensors, checkpoint_id=folder / "state", no_dist=alone)
            for name, trained in state.networks.items():
                trained.network.load_state_dict(tensors[name]["network"])
                set_optimizer_state_dict(trained.network, trained.optimizer, tensors[name]["optimizer"])
                trained.scaler.load_state_dict(progress["scalers"][name])
            if state.average is not None:
                state.average.load(folder / "ema" / state.export.file, state.export.prefix)
            state.step = _step(progress)
        except Exception as error:  # a damaged file can make its reader raise anything
            if is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0] or repr(error)
            raise TrainingError(f"{folder}: not a checkpoint of this training: {reason}") from error


def export(state: State, folder: Path) -> None:
    """Writes the exported network by `State.export`, with the average, if there is one, for weights.

    Called by all ranks. Raises WriteError.
    """
    tensors = state.exported.state_dict() | ({} if state.average is None else state.average.average)
    whole = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if distributed.is_main():
            whole[name] = tensor.cpu()
    distributed.on_main(lambda: state.export.save(whole, folder))


def _tensors(state: State) -> dict[str, Any]:
    return {
        name: {"network": trained.network.state_dict(), "optimizer": _optimizer_state(trained)}
        for name, trained in state.networks.items()
    }


def _optimizer_state(trained: Trained) -> dict[str, Any]:
    """The optimizer's state, by the names of parameters.

    PyTorch initialises the state of an optimizer that has taken no step by a step with zero gradients, and counts it.
    The count is set back to 0, so that saving a checkpoint does not alter later steps.
    """
    if not trained.optimizer.state:
        get_optimizer_state_dict(trained.network, trained.optimizer)
        for values in trained.optimizer.state.values():
            if "step" in values:
                values["step"].zero_()
    return get_optimizer_state_dict(trained.network, trained.optimizer)


def _step(progress: dict[str, Any]) -> int:
    step = progress["step"]
    if type(step) is not int or step < 0:
        raise ValueError(f"its step is {step!r}; expected an integer of at least 0")
    return step


@contextlib.contextmanager
def _first_failure() -> Iterator[None]:
    """Raises the first rank's error if a distributed checkpoint fails, not PyTorch's report of all tracebacks."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


@contextlib.contextmanager
def _is_only_process() -> Iterator[bool]:
    """Whether this process is the only one; PyTorch's warning about that is silenced."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield not distributed.is_distributed()


def _remove(folder: Path) -> None:
    """Removes a folder. It is renamed first, so that a folder half removed is not taken for a checkpoint."""
    if folder.is_dir():
        shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.old.part")))
