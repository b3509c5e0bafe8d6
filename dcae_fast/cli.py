"""The command line: dcae-fast with one of the `commands` of `main`."""

import io
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Union

import tyro
from tqdm import tqdm

import dcae_fast

from .commands.cache_latents import cache_latents
from .commands.common import (
    Compute,
    UsageError,
    check_cfg,
    check_integer,
    check_seed,
    make_folder,
    make_place,
    pixel_limit,
)
from .commands.eval_autoencoder import eval_autoencoder
from .commands.eval_diffusion import eval_diffusion
from .commands.option_files import with_files
from .commands.reference_stats import reference_stats
from .commands.train_diffusion import train_diffusion
from .errors import CheckpointError, DeviceError, NotFiniteError, OtherKindError, print_failure, report_failure
from .interruption import sigterm_interrupts
from .models import diffusion_zoo
from .models.zoo import AUTOENCODERS

if TYPE_CHECKING:
    from .diffusion import DCAEDiffusion
    from .models.autoencoder import DCAE
    from .reconstruction import Reconstruction

Fit = Literal["crop", "pad"]
Sampler = Literal["DPM_Solver", "ODE_dopri5", "ODE_heun2", "SDE", "GaussianDiffusion"]
Paths = tyro.conf.Positional[tuple[Path, ...]]


def reconstruct(
    photos: Paths = (),
    *,
    model: str = "dc-ae-tiny",
    out: Path = Path("outputs"),
    fit: Fit = "crop",
    max_pixels: int | None = None,
    compute: Compute,
) -> int:
    """Encode and decode photographs, and show them beside the originals.

    Args:
        photos: files or folders; the bundled photograph if there is none
        model: a name from `dcae-fast models`, a Hugging Face repository, a folder or a weight file
        out: folder for the pictures
        fit: crop the centre, or pad and cut the padding away again, where a side is no multiple of the model's ratio
        max_pixels: photographs with more pixels are named and left out; by default Pillow's limit, 178956970
    """
    from . import images
    from .reconstruction import reconstruct as reconstruct_photograph

    if not photos:
        photos = (images.demo_photograph(),)
        print(f"No photograph given; taking the bundled one, {photos[0].name}.")
    limit = pixel_limit(max_pixels)
    files, network = _files(photos, images.picture_suffixes()), compute.load_plain(model)

    def one(path: Path, stem: str) -> str:
        result = reconstruct_photograph(path, network, fit, compute.patch, limit, compute.max_bytes)
        _save_pictures(result, path, out / stem, model)
        height, width = result.original.shape[-2:]
        line = f"{path} -> {stem}-*.png: {width}x{height} ({fit}), PSNR {result.psnr:.2f} dB, {result.seconds:.3f} s"
        if result.difference is not None:
            line += "; patched against plain: largest difference {:.1e}, relative {:.1e}".format(*result.difference)
        return line

    return _for_each(files, one, out, "Reconstructions and comparisons")


def _save_pictures(result: "Reconstruction", path: Path, stem: Path, model: str) -> None:
    from . import images

    original, picture = images.to_image(result.original), images.to_image(result.picture)
    captions = [(original, "original"), (picture, f"reconstruction, PSNR {result.psnr:.2f} dB")]
    title = f"{path.name}, {model}, {picture.width}x{picture.height}"
    images.save_png(picture, stem.with_name(f"{stem.name}-reconstruction.png"))
    images.save_png(images.side_by_side(captions, title), stem.with_name(f"{stem.name}-compared.png"))


def encode(
    photos: Paths,
    *,
    model: str = "dc-ae-tiny",
    out: Path = Path("outputs"),
    fit: Fit = "crop",
    max_pixels: int | None = None,
    compute: Compute,
) -> int:
    """Encode photographs to latents, one .safetensors file each, not multiplied by the scaling factor.

    Args:
        photos: files or folders
        model: a name from `dcae-fast models`, a Hugging Face repository, a folder or a weight file
        out: folder for the latents
        fit: crop the centre, or pad (and `decode` cuts the padding away), where a side is no multiple of the ratio
        max_pixels: photographs with more pixels are named and left out; by default Pillow's limit, 178956970
    """
    import torch

    from . import images
    from .finite import check_finite
    from .latent_files import Latent, save_latent
    from .reconstruction import load_photograph

    limit = pixel_limit(max_pixels)
    files, network = _files(photos, images.picture_suffixes()), compute.load(model)

    @torch.inference_mode()
    def one(path: Path, stem: str) -> str:
        x, size = load_photograph(path, network, fit, limit)
        z = network.encode(x)
        check_finite(z, ["the latent"], z.dtype)
        save_latent(Latent(z, model, network.scaling_factor, size, fit), out / f"{stem}.safetensors")
        return f"{path} -> {stem}.safetensors: {list(z.shape)}"

    return _for_each(files, one, out, "Latents")


def decode(latents: Paths, *, model: str | None = None, out: Path = Path("outputs"), compute: Compute) -> int:
    """Decode latents that `encode`, `cache-latents` or the original wrote to PNG pictures.

    Args:
        latents: files or folders
        model: in place of the one that a file or manifest.json names; needed for the original's .npy files
        out: folder for the pictures
    """
    import torch

    from . import images
    from .data.manifest import DataError
    from .finite import check_finite
    from .latent_files import LatentError, find_latents

    loads = {}
    for path in _some(latents):
        try:
            loads |= find_latents(path)
        except DataError as error:
            raise UsageError(str(error)) from error

    load = cache(compute.load)

    if model is not None:
        load(model)

    @torch.inference_mode()
    def one(path: Path, stem: str) -> str:
        latent = loads[path]()
        name = model or latent.model
        if name is None:
            raise LatentError(f"{path}: no manifest.json tells which model made it; name one with --model")
        network = load(name)
        weight = next(network.parameters())
        try:
            z = latent.unscaled(network.scaling_factor)
            y = network.decode(z.to(weight.device, weight.dtype, memory_format=torch.channels_last))
        except (LatentError, TypeError, ValueError) as error:  # of another shape than the model's
            raise LatentError(f"{path}: {error}") from error
        check_finite(y, ["the picture"], y.dtype)
        picture = images.to_image(latent.crop(y))
        images.save_png(picture, out / f"{stem}-decoded.png")
        return f"{path} -> {stem}-decoded.png: {picture.width}x{picture.height}"

    return _for_each(list(loads), one, out, "Pictures")


def sample(
    *,
    model: str = diffusion_zoo.TINY,
    labels: tuple[int, ...] = (),
    cfg: float = 6.0,
    seed: int = 0,
    sampler: Sampler | None = None,
    steps: int | None = None,
    out: Path = Path("outputs/samples.png"),
    latents: Path | None = None,
    compute: Compute,
) -> int:
    """Draw pictures of the given classes with a diffusion model, into one grid.

    Args:
        model: a name from `dcae-fast models`, a Hugging Face repository, a folder or a weight file
        labels: a class for each picture; by default sixteen, the original's demonstration for ImageNet
        cfg: scale of the classifier-free guidance; 1 is without
        seed: of the noise; the same seed and labels give the same pictures
        sampler: by default the model's own
        steps: by default the model's own
        out: PNG file for the grid
        latents: safetensors file for the latents too
    """
    from . import images
    from . import sample as sampling
    from .memory import out_of_memory_as

    if out.suffix.lower() != ".png":
        raise UsageError(f"--out {out}: expected a name that ends in .png")
    check_cfg(cfg)
    check_seed("--seed", seed)
    check_integer("--steps", steps, least=1)
    make_place(out, "--out")
    if latents is not None:
        make_place(latents, "--latents")
        if latents.suffix.lower() != ".safetensors":
            raise UsageError(f"--latents {latents}: expected a name that ends in .safetensors")
    network = compute.load_diffusion(model)
    config = network.config
    for label in labels:
        check_integer("--labels", label, least=0, most=config.network.num_classes)
    labels = labels or sampling.default_labels(config.network.num_classes)
    steps = config.num_inference_steps if steps is None else steps
    request = sampling.Request(labels, cfg, seed, sampler or config.eval_scheduler, steps)
    try:
        with out_of_memory_as(UsageError(f"--labels: {len(labels)} pictures do not fit in memory; ask for fewer")):
            z = sampling.sample(network, request)
            pictures = sampling.decode(network, z)
    except (ImportError, ValueError) as error:  # without torchdiffeq; another sampler's steps
        raise UsageError(str(error)) from error
    if latents is not None:
        sampling.save_latents(z, request, model, latents)
        print(f"Latents are in {latents.resolve()}")
    images.save_png(images.grid(pictures, request.columns), out)
    print(f"{request}\nThe pictures are in {out.resolve()}")
    return 0


def convert(
    source: tyro.conf.Positional[str],
    destination: tyro.conf.Positional[Path],
    layout: Literal["original", "diffusers"],
) -> int:
    """Write a checkpoint in another layout, as float32.

    Args:
        source: a name from `dcae-fast models`, a Hugging Face repository, a folder or a weight file
        destination: folder to write to
        layout: of DC-Gen and efficientvit (original), or of diffusers' AutoencoderDC
    """
    from .models.autoencoder import DCAE
    from .models.checkpoint import WEIGHTS

    others = {file for files in WEIGHTS.values() for file in files}.difference(WEIGHTS[layout])
    if any((destination / file).exists() for file in others):  # whose config.json would be replaced
        raise UsageError(f"{destination} holds a checkpoint in another layout; take another folder")
    model = DCAE.from_pretrained(source)
    make_folder(destination, "destination")
    try:
        model.save_pretrained(destination, layout)
    except ValueError as error:
        raise UsageError(str(error)) from error
    print(f"{source} -> {destination.resolve()}, {layout} layout")
    return 0


def models() -> int:
    """List the autoencoders and the diffusion models with their size and cost."""
    from . import describe

    print(describe.models_table(), describe.diffusion_models_table(), sep="\n\n")
    return 0


def info(model: tyro.conf.Positional[str]) -> int:
    """Show what a model is made of, and what patching it replaces.

    Args:
        model: a name from `dcae-fast models`, a Hugging Face repository, a folder or a weight file
    """
    import torch

    from . import describe
    from .diffusion import DCAEDiffusion
    from .models.autoencoder import DCAE

    if model in (*diffusion_zoo.DIFFUSION_MODELS, *AUTOENCODERS):  # the architecture is enough: nothing to download
        with torch.device("meta"):
            network = (DCAE if model in AUTOENCODERS else DCAEDiffusion).from_name(model)
    elif model in diffusion_zoo.BUNDLED:
        network = DCAEDiffusion.from_pretrained(model)
    else:
        network = _of_either_kind(model)
    print(describe.model_tables(network), dcae_fast.patch(network), sep="\n\n")
    return 0


def _of_either_kind(source: str) -> "DCAE | DCAEDiffusion":
    from .diffusion import DCAEDiffusion
    from .models.autoencoder import DCAE

    try:
        return DCAE.from_pretrained(source)
    except OtherKindError:
        return DCAEDiffusion.from_pretrained(source)


def _some(paths: Sequence[Path]) -> Sequence[Path]:
    if not paths:
        raise UsageError("name at least one file or folder")
    return paths


def _files(paths: Sequence[Path], suffixes: frozenset[str]) -> list[Path]:
    """The paths, with each folder replaced by the files in it that have one of the suffixes."""
    files = []
    for path in _some(paths):
        if path.is_dir():
            found = sorted(child for child in path.iterdir() if child.suffix.lower() in suffixes)
            if not found:
                raise UsageError(f"{path}: nothing to read in this folder")
            files += found
        else:
            files.append(path)
    return files


def _stems(files: Sequence[Path]) -> list[str]:
    """A name for the output of each file: its own without the suffix, with -2, -3, ... where that is taken.

    It is cut to 200 bytes, so that an ending can follow where names have 255 at most.
    """
    stems: dict[str, None] = {}
    for path in files:
        own = path.stem
        while len(os.fsencode(own)) > 200:
            own = own[:-1]
        stem, number = own, 1
        while stem in stems:
            number += 1
            stem = f"{own}-{number}"
        stems[stem] = None
    return list(stems)


def _for_each(files: Sequence[Path], work: Callable[[Path, str], str], out: Path, results: str) -> int:
    """Prints work(file, name for its output) for every file, and where the results are.

    Returns 1 if any file failed, which is named on stderr, else 0.
    """
    from .data.manifest import DataError
    from .images import PhotographError
    from .latent_files import LatentError
    from .memory import is_out_of_memory

    make_folder(out)
    failed = 0
    for path, stem in tqdm(list(zip(files, _stems(files), strict=True)), unit="file", disable=None):
        try:
            tqdm.write(work(path, stem))
        except (PhotographError, LatentError, DataError, CheckpointError, NotFiniteError) as error:
            failed += 1  # CheckpointError: latents name a model of their own
            named = f"{path}: " if isinstance(error, (CheckpointError, NotFiniteError)) else ""
            tqdm.write(f"failed: {named}{error}", file=sys.stderr)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failed += 1
            tqdm.write(f"failed: {path}: does not fit in memory", file=sys.stderr)
    if failed < len(files):
        print(f"{results} are in {out.resolve()}")
    return 1 if failed else 0


COMMANDS = {
    command.__name__.replace("_", "-"): command
    for command in [
        reconstruct,
        encode,
        decode,
        sample,
        cache_latents,
        train_diffusion,
        reference_stats,
        eval_autoencoder,
        eval_diffusion,
        convert,
        models,
        info,
    ]
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; the exit status is 0, 1 if some files failed, 2 if the request could not be met at all, 130
    after Ctrl-C, or 143 after SIGTERM.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        with sigterm_interrupts():
            return _parse(sys.argv[1:] if argv is None else argv)()
    except NotFiniteError as error:
        return _failed(error, 1)
    except (UsageError, DeviceError, CheckpointError) as error:
        return _failed(error, 2)
    except OSError as error:
        return _failed(f"{error.filename}: {error.strerror}" if error.filename else error, 2)
    except (RuntimeError, MemoryError) as error:
        from .memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        return _failed("there is not enough memory for the model", 2)
    except KeyboardInterrupt as error:
        exec("")  # or `python -m` would die of a signal that came within an exec of text, as imports have them
        return _failed(str(error) or "interrupted", 128 + getattr(error, "signum", signal.SIGINT))


def _parse(arguments: Sequence[str]) -> Callable[[], int]:
    """The command with its options; UsageError or SystemExit, with a message, where they cannot be read."""

    def deferred(command: Callable[..., int]) -> Callable[..., Callable[[], int]]:
        return wraps(command)(lambda *args, **options: partial(command, *args, **options))

    commands = tuple(Annotated[deferred(command), tyro.conf.subcommand(name)] for name, command in COMMANDS.items())

    def choose(options: Union[commands]) -> Callable[[], int]:  # noqa: UP007  tyro names `options` in its messages
        return options

    expanded = with_files(arguments)
    try:
        return tyro.cli(
            choose,
            prog="dcae-fast",
            description="Deep compression autoencoders, fast.",
            args=expanded,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.CascadeSubcommandArgs),
        )
    except SystemExit as error:
        files = [argument for argument in arguments if argument.startswith("@")]
        if error.code and files:
            print(f"dcae-fast: with {', '.join(files)} the arguments are: {shlex.join(expanded)}", file=sys.stderr)
        if error.code:
            report_failure("dcae-fast: the options cannot be read; the reason stands above, once for each rank")
        raise


def _failed(reason: object, status: int) -> int:
    print_failure(f"dcae-fast: {reason}")
    return status
