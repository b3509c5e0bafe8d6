"""The log of a training, by the main rank: a progress bar, log.jsonl, and TensorBoard or Weights & Biases."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from dcae_fast import distributed
from dcae_fast.files import append_line, writing, written_atomically

from .config import Run, TrainingError

LOG = "log.jsonl"


class Log:
    """log.jsonl has lines {"step": ..., name: number, ...}.

    step: the step after which the run resumes; lines of later steps, which no checkpoint contains, are removed. steps:
    of the whole training. settings: for Weights & Biases.
    """

    def __init__(self, run: Run, step: int, steps: int, settings: dict[str, Any]):
        self.closing: list[Callable[[], object]] = []
        self.backends: list[Any] = []
        self.file = run.out / LOG
        distributed.on_main(lambda: self._open(run, step, steps, settings))

    def _open(self, run: Run, step: int, steps: int, settings: dict[str, Any]) -> None:
        _forget_after(self.file, step)
        self.bar = tqdm(total=steps, initial=step, unit="step", disable=None)
        self.closing.append(self.bar.close)
        if run.tensorboard:
            self.backends.append(TensorBoard(run.out / "tensorboard", step))
        if run.wandb:
            self.backends.append(Wandb(run.wandb, run.out, settings))
        self.closing += [backend.close for backend in self.backends]

    def step_taken(self) -> None:
        if distributed.is_main():
            self.bar.update()

    def numbers(self, step: int, **values: float) -> None:
        """Writes a line. Called by all ranks, like all methods. Raises WriteError."""
        distributed.on_main(lambda: self._write(step, values))

    def _write(self, step: int, values: dict[str, float]) -> None:
        append_line(self.file, json.dumps({"step": step, **values}))
        text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.bar.set_postfix_str(text)
        if self.bar.disable:  # there is no terminal
            print(f"step {step}: {text}", flush=True)
        for backend in self.backends:
            backend.numbers(step, values)

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        for backend in self.backends:
            backend.picture(step, name, picture)

    def close(self) -> None:
        for close in self.closing:
            close()


def _forget_after(file: Path, step: int) -> None:
    """Removes the lines of later steps, and torn lines."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):  # torn when the former run was killed
            continue
    with written_atomically(file) as temporary:
        temporary.write_text("".join(kept))


class TensorBoard:
    def __init__(self, folder: Path, step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrainingError("tensorboard is not installed: pip install 'dcae_fast[log]'") from error
        self.folder = folder
        with writing(folder):
            self.writer = SummaryWriter(folder, purge_step=step + 1)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        with writing(self.folder):
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        with writing(self.folder):
            self.writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        with writing(self.folder):
            self.writer.close()


class Wandb:
    def __init__(self, project: str, folder: Path, settings: dict[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise TrainingError("wandb is not installed: pip install 'dcae_fast[log]'") from error
        same_run = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self.run = wandb.init(
            project=project, name=folder.name, id=same_run, resume="allow", dir=folder, config=settings
        )
        self.image, self.close = wandb.Image, self.run.finish

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        self.run.log({name: self.image(picture)}, step=step)
