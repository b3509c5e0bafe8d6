"""Small functions that replace the pretrained networks, and a launcher for several ranks that use these functions."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dcae_fast import cli
from dcae_fast.evaluation import networks
from dcae_fast.evaluation.moments import Moments


def features(pictures: torch.Tensor) -> torch.Tensor:
    """[n, 6]: mean and standard deviation of each channel, in the range 0 to 255."""
    flat = pictures.double().flatten(2)
    return torch.cat([flat.mean(2), flat.std(2)], 1).float()


def logits(pictures: torch.Tensor) -> torch.Tensor:
    return features(pictures)[:, [0, 4, 2, 3, 5]] / 20


def embeddings(pictures: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(features(pictures))


def difference(pictures: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    return (pictures.double() - reference.double()).abs().mean((1, 2, 3)) / 255


def brightness(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.double().mean((1, 2, 3)) / 255


STAND_INS = {"fid": features, "inception_score": logits, "cmmd": embeddings}
STAND_INS |= {"lpips": difference, "clip_iqa": brightness}


def use(*names: str) -> dict[str, Callable]:
    """Loaders for `networks.LOADERS`: stand-ins with these names, or all if none are given. Others raise OSError."""

    def absent(device: torch.device):
        raise OSError("no such file")

    loaders = {name: lambda device, network=network: network for name, network in STAND_INS.items()}
    loaders = {name: loader if not names or name in names else absent for name, loader in loaders.items()}
    return {"ssim": networks.LOADERS["ssim"], **loaders}


def real_pictures() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (9, 3, 8, 8), generator=generator).to(torch.uint8)


def save_references(folder: Path, prefix: str = "") -> list[str]:
    """Writes the files of reference-stats for `real_pictures`. Returns the options that pass them to eval-diffusion."""
    fid, pr, cmmd = folder / "fid.npz", folder / "pr.npy", folder / "cmmd.npy"
    Moments.of(features(real_pictures())).save(fid)
    np.save(pr, features(real_pictures()).numpy())
    np.save(cmmd, embeddings(real_pictures()).numpy())
    return [f"--{prefix}fid", f"{fid}", f"--{prefix}precision-recall", f"{pr}", f"--{prefix}cmmd", f"{cmmd}"]


def eval_diffusion(model: Path, out: Path, samples: int) -> dict[str, float]:
    """The figures of eval-diffusion with the default settings of evaluation in training."""
    settings = ["--samples", f"{samples}", "--cfg", "1.5", "--device", "cpu", "--no-patch", *save_references(out)]
    assert cli.main(["eval-diffusion", "--model", f"{model}", "--out", f"{out}/samples", *settings]) == 0
    return json.loads((out / "samples" / "results.json").read_text())["figures"]


def _rank(rank: int, ranks: int, port: int, command: list[str], status: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(ranks)}
    torch.set_num_threads(1)
    networks.LOADERS.update(use())
    assert cli.main(command) == status


def run_ranks(ranks: int, command: list[str], status: int = 0) -> None:
    """Runs the command with the stand-ins on `ranks` ranks, started as torchrun starts them."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    torch.multiprocessing.start_processes(_rank, (ranks, port, command, status), ranks, start_method="fork")
