"""For the training programs of the tiny models: options, whole folders, and a training loop with a time limit."""

import argparse
import copy
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

LEARNING_RATE = 1e-3
WARM_UP = 0.05  # fraction of the time
EMA_DECAY = 0.999


def learning_rate(progress: float) -> float:
    """Linear warm-up, then cosine decay to zero. progress: from 0 to 1."""
    return LEARNING_RATE * min(progress / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * progress))


def clock(seconds: float) -> Iterator[float]:
    """Yields the elapsed fraction of `seconds` until the time is over, and shows a progress bar."""
    start = time.perf_counter()
    with tqdm(total=round(seconds), unit="s", bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} s{postfix}") as bar:
        while (passed := time.perf_counter() - start) < seconds:
            if int(passed) > bar.n:
                bar.update(int(passed) - bar.n)
            yield passed / seconds


def train(model: nn.Module, draw_loss: Callable[[], torch.Tensor], minutes: float) -> tuple[nn.Module, int]:
    """Trains `model` in place; returns the moving average of its weights and the number of steps.

    draw_loss: computes the loss of the model on a new batch. Raises RuntimeError if the loss is not finite.
    """
    average = copy.deepcopy(model)
    weights, average_weights = list(model.parameters()), list(average.parameters())
    optimizer = torch.optim.AdamW(weights, LEARNING_RATE, betas=(0.9, 0.99), fused=weights[0].is_cuda)
    step = 0
    for progress in clock(60 * minutes):
        optimizer.param_groups[0]["lr"] = learning_rate(progress)
        loss = draw_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        with torch.no_grad():
            decay = min(EMA_DECAY, step / (step + 10))
            torch._foreach_lerp_(average_weights, weights, 1 - decay)
        if step % 100 == 1 and not math.isfinite(value := loss.item()):
            raise RuntimeError(f"training diverged: the loss is {value} at step {step}")
        elif step % 100 == 1:
            tqdm.write(f"step {step}: loss {value:.4f}")
    return average, step


def parse_options(description: str, length: str, default: float, meaning: str) -> argparse.Namespace:
    """Parses --out, --device, and the option `length`, with its default and its meaning for the help."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="output folder; must not exist")
    parser.add_argument(f"--{length}", type=type(default), default=default, help=f"{meaning} (default: %(default)s)")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"--out {options.out}: exists already; expected a new folder")
    options.out.absolute().parent.mkdir(parents=True, exist_ok=True)
    return options


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yields a new temporary folder, which becomes `out` if the block ends without an error."""
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    part.rename(out)
