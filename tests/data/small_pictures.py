"""Small pictures, their crops, the command cache-latents for them, and the contents of folders."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from dcae_fast import cli
from dcae_fast.data.pictures import CropDataset, Crops, Pictures, collate

SIZES = {"cat/a.png": (64, 64), "cat/b.b.jpg": (150, 70), "cat/c.png": (40, 50), "dog/a.png": (64, 90)}
SIZES |= {"dog/d.jpg": (80, 64), "dog/e.webp": (130, 140), "emu/f.png": (65, 64)}
BROKEN = "dog/b.jpg"


def save_noise(path: Path, width: int, height: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def save_pictures(folder: Path) -> None:
    """Three classes, sizes above and below 64, and one truncated file."""
    for seed, (name, size) in enumerate(SIZES.items()):
        save_noise(folder / name, *size, seed)
    whole = (folder / "dog/d.jpg").read_bytes()
    (folder / BROKEN).write_bytes(whole[: len(whole) // 2])


def arguments(pictures: Path, out: Path) -> list[str]:
    """A cache-latents command: on the CPU, with the bundled model at 64 px, batches of two, and no worker processes.

    The model is not patched, since the kernels would take minutes under TRITON_INTERPRET.
    """
    settings = "--model dc-ae-tiny --resolution 64 --scale 0.5 --device cpu --no-patch --batch 2 --workers 0"
    return ["cache-latents", str(pictures), "--out", str(out), *settings.split()]


def run(pictures: Path, out: Path, *options) -> int:
    """The exit status of the command, with more options."""
    return cli.main([*arguments(pictures, out), *map(str, options)])


def crops(pictures: Pictures) -> Crops:
    """All pictures as one batch of crops of 64 px."""
    return collate(list(CropDataset(pictures, range(len(pictures.items)), 64)))


def png(width: int = 8, height: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    return file.getvalue()


def save_shard(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
