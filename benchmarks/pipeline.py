"""Benchmarks cache-latents, train-diffusion and train-autoencoder as a user runs them: images/s, and the GPU's waiting.

Pictures, latents and weights are random. A row is a command with its options, on one GPU or, under torchrun, on all
GPUs of the machine. The batch is per GPU.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from dcae_fast.data.manifest import Manifest, Settings
from dcae_fast.models.autoencoder import DCAE
from dcae_fast.models.zoo import BUNDLED

from .first_call import ROOT
from .workloads import F32

LATENT_SHAPE, CLASSES = (128, 8, 8), 1000  # f64 at 512 pixels
REPORT = re.compile(r"([\d.]+) images/s; the device waited (\d+) %")
Options = tuple[str, ...]


@dataclass(frozen=True)
class Pipeline:
    """model: only part of the workload's name; the options give the command its model. options: of all contenders.

    one_gpu, all_gpus: contender → its options, for runs on one GPU and on all GPUs.
    """

    model: str
    command: str
    batch: int
    options: Options
    one_gpu: dict[str, Options]
    all_gpus: dict[str, Options]

    @property
    def name(self) -> str:
        return f"{self.model}-{self.command}-b{self.batch}"

    def rows(self, gpus: int) -> Iterator[tuple[str, int, Options]]:
        """Yields contender, number of GPUs and options."""
        for contender, options in self.one_gpu.items():
            yield contender, 1, (*self.options, *options)
        for contender, options in self.all_gpus.items() if gpus > 1 else ():
            yield f"{contender}, {gpus} GPUs", gpus, (*self.options, *options)


TRAIN, TRAIN_AUTOENCODER, CACHE = "train-diffusion", "train-autoencoder", "cache-latents"
EAGER, GRAPHS = ("--no-patch",), ("--compile", "--cuda-graphs")
PATCHED: dict[str, Options] = {"patched": ()}
PAIR = {"eager": EAGER} | PATCHED
COMPILED = PAIR | {
    "torch.compile": (*EAGER, "--compile"),
    "torch.compile + CUDA graphs": (*EAGER, *GRAPHS),
    "patched + torch.compile + CUDA graphs": GRAPHS,
}
SPREAD = PAIR | {"patched, FSDP2": ("--parallel", "fsdp")}
SMALL = ("--depth", "12", "--hidden-size", "512", "--num-heads", "8")
STEP_GRAPHS = PAIR | {"patched + CUDA graphs": ("--cuda-graphs",)}
TINY = ("--depth", "2", "--hidden-size", "32", "--num-heads", "2")
PIPELINES = [
    Pipeline("uvit-s-f64", TRAIN, 256, SMALL, COMPILED, PATCHED),
    Pipeline("uvit-h-f64", TRAIN, 512, (), PAIR, SPREAD),
    Pipeline(F32, CACHE, 32, (), PAIR, PATCHED),
    Pipeline(F32, TRAIN_AUTOENCODER, 16, ("--model", F32), PAIR, PATCHED),
    Pipeline("dc-ae-tiny", TRAIN_AUTOENCODER, 32, ("--model", "dc-ae-tiny"), STEP_GRAPHS, PATCHED),
]
REHEARSAL = [
    Pipeline("uvit-tiny-f64", TRAIN, 4, TINY, PAIR, PATCHED),
    Pipeline("dc-ae-tiny", CACHE, 2, (), PAIR, PATCHED),
    Pipeline("dc-ae-tiny", TRAIN_AUTOENCODER, 2, ("--model", "dc-ae-tiny"), PAIR, PATCHED),
]


def pipelines() -> list[Pipeline]:
    return PIPELINES if torch.cuda.is_available() else REHEARSAL


def benchmark(pipeline: Pipeline) -> Iterator[dict]:
    """Yields the record: images_per_s and the waited fraction of the time of each contender, or a failure.

    The record is yielded again after each contender, which may take minutes, so that an interrupted run loses little.
    """
    measure = {TRAIN: training, TRAIN_AUTOENCODER: autoencoder_training, CACHE: caching}[pipeline.command]
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        run = measure(pipeline.batch, Path(folder))
        for contender, gpus, options in pipeline.rows(torch.cuda.device_count()):
            try:
                rows[contender] = {"gpus": gpus} | run(gpus, options)
            except subprocess.CalledProcessError as failure:
                rows[contender] = {"failure": error_line(failure.stderr)}
            yield {"workload": pipeline.name, "contenders": dict(rows)}


def error_line(stderr: str) -> str:
    """The line with the error among the other output of torchrun and Python."""
    lines = stderr.strip().splitlines() or ["no message"]
    return next((line for line in lines if line.startswith("dcae-fast: ") or "Error" in line), lines[-1])[:200]


def dcae_fast(gpus: int, *words: object) -> str:
    """Runs dcae-fast on the first `gpus` GPUs; returns its output."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"] if gpus > 1 else []
    words = [sys.executable, *launch, "-m", "dcae_fast", *map(str, words)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    first = {"CUDA_VISIBLE_DEVICES": ",".join(visible.split(",")[:gpus])}
    return subprocess.run(words, cwd=ROOT, env=os.environ | first, capture_output=True, text=True, check=True).stdout


def training(batch: int, folder: Path) -> Callable[[int, Options], dict]:
    """train-diffusion on cached latents."""
    make_latents(folder / "latents", 20_000 if torch.cuda.is_available() else 64)
    return late_steps(folder, batch, (TRAIN, "uvit-h-f64", "--data", folder / "latents"))


def autoencoder_training(batch: int, folder: Path) -> Callable[[int, Options], dict]:
    """train-autoencoder, all weights, without the perceptual loss, whose weights may be missing."""
    size, pictures = (256, 2000) if torch.cuda.is_available() else (32, 4)
    make_pictures(folder / "pictures", size, pictures)
    words = TRAIN_AUTOENCODER, "full", "--data", folder / "pictures", "--resolution", size, "--perceptual", "none"
    return late_steps(folder, batch, (*words, "--workers", 8 if torch.cuda.is_available() else 0))


def late_steps(folder: Path, batch: int, words: tuple) -> Callable[[int, Options], dict]:
    """Measures the second half of a training run; the first half compiles and times kernels."""
    steps, every = (100, 10) if torch.cuda.is_available() else (8, 2)

    def run(gpus: int, options: Options) -> dict:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            dcae_fast(
                gpus, *words, "--out", out, "--steps", steps, "--batch", batch * gpus, "--log-steps", every,
                "--save-steps", steps, "--sample-steps", 0, *options,
            )  # fmt: skip
            lines = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
        late = [line for line in lines if line["step"] > steps // 2 and "images_per_second" in line]
        rate = statistics.median(line["images_per_second"] for line in late)
        return {"images_per_s": rate, "waited": statistics.mean(line["waited"] for line in late)}

    return run


def caching(batch: int, folder: Path) -> Callable[[int, Options], dict]:
    """Measures the second of two runs; the first run compiles and times kernels."""
    on_gpu = torch.cuda.is_available()
    size, pictures = (512, 3000) if on_gpu else (32, 6)
    make_pictures(folder / "pictures", size, pictures)
    model = folder / "autoencoder" if on_gpu else BUNDLED["dc-ae-tiny"]
    if on_gpu:
        torch.manual_seed(0)
        DCAE.from_name(F32).save_pretrained(model)

    def run(gpus: int, options: Options) -> dict:
        for _ in range(2):
            with tempfile.TemporaryDirectory(dir=folder) as out:
                printed = dcae_fast(
                    gpus, "cache-latents", folder / "pictures", "--out", out, "--model", model, "--scale", 0.3,
                    "--batch", batch, "--resolution", size, "--dtype", "bfloat16", "--format", "safetensors",
                    *options,
                )  # fmt: skip
        rate, waited = REPORT.search(printed).groups()
        return {"images_per_s": float(rate), "waited": float(waited) / 100}

    return run


def make_latents(folder: Path, items: int) -> None:
    """Writes latents of normal noise in the format of `cache-latents`."""
    folder.mkdir()
    latents = {"latents": torch.randn(items, *LATENT_SHAPE), "classes": torch.arange(items) * CLASSES // items}
    save_file(latents, folder / "latents-000000.safetensors")
    settings = Settings("dc-ae-f64c128-in-1.0", "float32", 512, 0.2889, "safetensors", "", LATENT_SHAPE)
    classes = tuple(f"{number:03d}" for number in range(CLASSES))
    Manifest(settings, classes, items, items).save(folder)


def make_pictures(folder: Path, size: int, count: int) -> None:
    with ProcessPoolExecutor() as pool:
        list(pool.map(partial(make_picture, folder, size), range(count), chunksize=16))


def make_picture(folder: Path, size: int, number: int) -> None:
    """Writes a JPEG file with a colour gradient and noise, up to a quarter larger than `size`."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(number)
    height, width = rng.integers(size, 5 * size // 4, 2)
    slope = np.linspace(0, 1, width)[None, :, None] * rng.uniform(-100, 100, 3)
    pixels = 128 + slope + rng.normal(0, 25, (height, width, 3))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:06d}.jpg", quality=90)
