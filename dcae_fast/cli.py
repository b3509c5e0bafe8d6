"""The command line `dcae-fast`: its short commands, and `main`, which runs any command and sets the exit status."""

import io
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from tqdm import tqdm

import dcae_fast

from .commands.cache_latents import cache_latents
from .commands.calibrate import calibrate
from .commands.common import (
    Compute,
    Precision,
    Sampler,
    UsageError,
    check_cfg,
    check_integer,
    check_seed,
    make_folder,
    make_parent_folder,
    pixel_limit,
)
from .commands.eval_autoencoder import eval_autoencoder
from .commands.eval_diffusion import eval_diffusion
from .commands.parse import parse
from .commands.reference_stats import reference_stats
from .commands.train_autoencoder import train_autoencoder
from .commands.train_diffusion import train_diffusion
from .errors import (
    CheckpointError,
    DataError,
    DeviceError,
    NotFiniteError,
    OtherKindError,
    print_failure,
)
from .interruption import sigterm_interrupts
from .models import diffusion_zoo
from .models.zoo import AUTOENCODERS

if TYPE_CHECKING:
    from .diffusion import DCAEDiffusion
    from .models.autoencoder import DCAE
    from .reconstruction import Reconstruction

Fit = Literal["crop", "pad"]
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
    """Encode and decode photographs; save each reconstruction, and a comparison with the original.

    Args:
        photos: picture files or folders of pictures; without any, the bundled photograph is used
        model: model name (see `dcae-fast models`), Hugging Face repository, folder or weight file
        out: output folder
        fit: crop or pad the sides to multiples of the model's compression ratio; decoded pictures lose the padding
        max_pixels: skip and report photographs with more pixels; None means Pillow's limit, 178956970
    """
    from . import images
    from .reconstruction import reconstruct as reconstruct_photograph

    if not photos:
        _check_that_int8_took_none(compute)
        photos = (images.demo_photograph(),)
        print(f"No photograph given; using the bundled photograph {photos[0].name}.")
    limit = pixel_limit(max_pixels)
    files, network = _picture_files(photos, compute), compute.load(model)

    def reconstruct_file(path: Path, stem: str) -> str:
        result = reconstruct_photograph(path, network, fit, limit)
        _save_pictures(result, path, out / stem, model)
        height, width = result.original.shape[-2:]
        line = f"{path} -> {stem}-*.png: {width}x{height} ({fit}), PSNR {result.psnr:.2f} dB, {result.seconds:.3f} s"
        if result.difference is not None:
            line += "; patched vs. unpatched: largest difference {:.1e}, relative {:.1e}".format(*result.difference)
        return line

    return _process_files(files, reconstruct_file, out, "Reconstructions and comparisons")


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
    """Encode photographs to latents, one .safetensors file per photograph.

    The latents are not multiplied by the scaling factor.

    Args:
        photos: picture files or folders of pictures
        model: model name (see `dcae-fast models`), Hugging Face repository, folder or weight file
        out: output folder
        fit: crop or pad the sides to multiples of the model's compression ratio; `decode` removes the padding
        max_pixels: skip and report photographs with more pixels; None means Pillow's limit, 178956970
    """
    import torch

    from .finite import check_finite
    from .latent_files import Latent, save_latent
    from .reconstruction import load_photograph

    limit = pixel_limit(max_pixels)
    files, network = _picture_files(photos, compute), compute.load(model)

    @torch.inference_mode()
    def encode_file(path: Path, stem: str) -> str:
        x, size = load_photograph(path, network, fit, limit)
        z = network.encode(x)
        check_finite(z, ["the latent"], z.dtype)
        save_latent(Latent(z, model, network.scaling_factor, size, fit), out / f"{stem}.safetensors")
        return f"{path} -> {stem}.safetensors: {list(z.shape)}"

    return _process_files(files, encode_file, out, "Latents")


def decode(latents: Paths, *, model: str | None = None, out: Path = Path("outputs"), compute: Compute) -> int:
    """Decode latents to PNG pictures. Reads latents written by `encode`, by `cache-latents` and by DC-Gen.

    Args:
        latents: latent files or folders of latents
        model: decoding model; None means the one named in the latent file or manifest.json; DC-Gen's files name none
        out: output folder
    """
    import torch

    from . import images
    from .finite import check_finite
    from .latent_files import LatentError, find_latents

    loaders = {}
    for path in _at_least_one(latents, compute):
        try:
            loaders |= find_latents(path)
        except DataError as error:
            raise UsageError(str(error)) from error

    load_model = cache(compute.load)
    if model is not None:
        load_model(model)

    @torch.inference_mode()
    def decode_file(path: Path, stem: str) -> str:
        latent = loaders[path]()
        name = model or latent.model
        if name is None:
            raise LatentError(f"{path}: found no manifest.json that names the model; name the model with --model")
        network = load_model(name)
        weight = next(network.parameters())
        try:
            z = latent.unscaled(network.scaling_factor)
            y = latent.crop(network.decode(z.to(weight.device, weight.dtype, memory_format=torch.channels_last)))
        except (LatentError, TypeError, ValueError) as error:  # the latent has another shape than the model's latents
            raise LatentError(f"{path}: {error}") from error
        check_finite(y, ["the picture"], y.dtype)
        picture = images.to_image(y)
        images.save_png(picture, out / f"{stem}-decoded.png")
        return f"{path} -> {stem}-decoded.png: {picture.width}x{picture.height}"

    return _process_files(list(loaders), decode_file, out, "Pictures")


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
    precision: Precision = "exact",
    compute: Compute,
) -> int:
    """Generate pictures of the given classes with a diffusion model, and save them as one grid.

    Args:
        model: model name (see `dcae-fast models`), Hugging Face repository, folder or weight file
        labels: a class per picture; by default 16 classes: for ImageNet those of DC-Gen's demo, else 0, 1, 2, ...
        cfg: scale of classifier-free guidance; 1 turns guidance off
        seed: random seed of the noise; the same seed and labels give the same pictures
        sampler: sampling method; None means the method in the model's configuration
        steps: number of sampling steps; None means the number in the model's configuration
        out: PNG file for the grid of pictures
        latents: .safetensors file for the latents; None saves no latents
        precision: fp8 or int8 lets the transformer compute in 8 bit, on a Hopper GPU
    """
    from . import images
    from . import sample as sampling
    from .memory import out_of_memory_as

    if out.suffix.lower() != ".png":
        raise UsageError(f"--out {out}: expected a file name that ends in .png")
    check_cfg(cfg)
    check_seed("--seed", seed)
    check_integer("--steps", steps, least=1)
    make_parent_folder(out, "--out")
    if latents is not None:
        make_parent_folder(latents, "--latents")
        if latents.suffix.lower() != ".safetensors":
            raise UsageError(f"--latents {latents}: expected a file name that ends in .safetensors")
    network, _ = compute.load_diffusion(model, precision)
    config = network.config
    for label in labels:
        check_integer("--labels", label, least=0, most=config.network.num_classes)
    labels = labels or sampling.default_labels(config.network.num_classes)
    steps = config.num_inference_steps if steps is None else steps
    request = sampling.Request(labels, cfg, seed, sampler or config.eval_scheduler, steps)
    try:
        too_many = UsageError(f"--labels: {len(labels)} pictures do not fit in memory; give fewer labels")
        with out_of_memory_as(too_many):
            z = sampling.sample(network, request)
            pictures = sampling.decode(network, z)
    except (ImportError, ValueError) as error:  # torchdiffeq is not installed; the sampler cannot take so many steps
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
    """Convert an autoencoder checkpoint to another layout, in float32.

    Args:
        source: model name (see `dcae-fast models`), Hugging Face repository, folder or weight file
        destination: output folder
        layout: original is the layout of DC-Gen and efficientvit; diffusers is the layout of diffusers' AutoencoderDC
    """
    from .models.autoencoder import DCAE
    from .models.checkpoint import WEIGHTS

    other_files = {file for files in WEIGHTS.values() for file in files}.difference(WEIGHTS[layout])
    if any((destination / file).exists() for file in other_files):  # its config.json would be overwritten
        raise UsageError(f"destination {destination}: contains a checkpoint in another layout; choose another folder")
    model = DCAE.from_pretrained(source)
    make_folder(destination, "destination")
    try:
        model.save_pretrained(destination, layout)
    except ValueError as error:
        raise UsageError(str(error)) from error
    print(f"{source} -> {destination.resolve()}, {layout} layout")
    return 0


def models() -> int:
    """List the autoencoders and the diffusion models with their sizes and costs."""
    from . import describe

    print(describe.models_table(), describe.diffusion_models_table(), sep="\n\n")
    return 0


def info(model: tyro.conf.Positional[str]) -> int:
    """Show the structure of a model, and the modules that patching replaces.

    Args:
        model: model name (see `dcae-fast models`), Hugging Face repository, folder or weight file
    """
    import torch

    from . import describe
    from .diffusion import DCAEDiffusion
    from .models.autoencoder import DCAE

    if model in (*diffusion_zoo.DIFFUSION_MODELS, *AUTOENCODERS):  # only the architecture is needed: no download
        with torch.device("meta"):
            network = (DCAE if model in AUTOENCODERS else DCAEDiffusion).from_name(model)
    elif model in diffusion_zoo.BUNDLED:
        network = DCAEDiffusion.from_pretrained(model)
    else:
        network = _load_autoencoder_or_diffusion(model)
    print(describe.model_tables(network), dcae_fast.patch(network), sep="\n\n")
    return 0


def _load_autoencoder_or_diffusion(source: str) -> "DCAE | DCAEDiffusion":
    from .diffusion import DCAEDiffusion
    from .models.autoencoder import DCAE

    try:
        return DCAE.from_pretrained(source)
    except OtherKindError:
        return DCAEDiffusion.from_pretrained(source)


def _at_least_one(paths: Sequence[Path], compute: Compute) -> Sequence[Path]:
    if not paths:
        _check_that_int8_took_none(compute)
        raise UsageError("PATH: expected at least one file or folder")
    return paths


def _check_that_int8_took_none(compute: Compute) -> None:
    """Raises UsageError if the only files stand behind --int8, which takes all that follow."""
    if compute.int8 and compute.scales is None:
        raise UsageError(
            f"--int8 {shlex.join(map(str, compute.int8))}: calibrates on these; give other files before it"
        )


def _picture_files(paths: Sequence[Path], compute: Compute) -> list[Path]:
    """The paths, with each folder replaced by the picture files in it. Raises UsageError for a folder without any."""
    from .images import picture_suffixes

    files = []
    for path in _at_least_one(paths, compute):
        if path.is_dir():
            found = sorted(child for child in path.iterdir() if child.suffix.lower() in picture_suffixes())
            if not found:
                raise UsageError(f"{path}: expected pictures in this folder, found no file that Pillow can read")
            files += found
        else:
            files.append(path)
    return files


def _output_stems(files: Sequence[Path]) -> list[str]:
    """A unique name for the output of each file: the file's name without its suffix, and -2, -3, ... for duplicates.

    Names are cut to 200 bytes, which leaves room for an ending: file systems limit names to 255 bytes.
    """
    stems: dict[str, None] = {}
    for path in files:
        base = path.stem
        while len(os.fsencode(base)) > 200:
            base = base[:-1]
        stem, number = base, 1
        while stem in stems:
            number += 1
            stem = f"{base}-{number}"
        stems[stem] = None
    return list(stems)


def _process_files(files: Sequence[Path], process: Callable[[Path, str], str], out: Path, results: str) -> int:
    """Calls process(file, stem of its output) for every file, and prints the line that it returns.

    results: what `process` writes, for the last line, which names the output folder.
    Returns the exit status: 1 if any file failed, else 0. Failed files and the reasons are printed to stderr.
    """
    from .images import PhotographError
    from .latent_files import LatentError
    from .memory import is_out_of_memory

    make_folder(out)
    failed = 0
    for path, stem in tqdm(list(zip(files, _output_stems(files), strict=True)), unit="file", disable=None):
        try:
            tqdm.write(process(path, stem))
        except (PhotographError, LatentError, DataError, CheckpointError, NotFiniteError) as error:
            failed += 1  # CheckpointError: each latent file names its model
            prefix = f"{path}: " if isinstance(error, (CheckpointError, NotFiniteError)) else ""
            tqdm.write(f"failed: {prefix}{error}", file=sys.stderr)
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
        train_autoencoder,
        reference_stats,
        eval_autoencoder,
        eval_diffusion,
        calibrate,
        convert,
        models,
        info,
    ]
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status.

    0: success; 1: some files failed; 2: the request could not be met at all; 130: Ctrl-C; 141: nobody reads the output;
    143: SIGTERM.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name may contain bytes that are not text
    try:
        with sigterm_interrupts():
            command = parse(COMMANDS, sys.argv[1:] if argv is None else argv)
            _check_environment()
            return command()
    except NotFiniteError as error:
        return _failed(error, 1)
    except (UsageError, DeviceError, CheckpointError) as error:
        return _failed(error, 2)
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes the rest
        return 128 + signal.SIGPIPE
    except OSError as error:
        return _failed(f"{error.filename}: {error.strerror}" if error.filename else error, 2)
    except (RuntimeError, MemoryError) as error:
        from .memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        return _failed("not enough memory for the model", 2)
    except KeyboardInterrupt as error:
        exec("")  # else `python -m` kills itself if the signal came during an exec of text, as in some imports
        return _failed(str(error) or "interrupted", 128 + getattr(error, "signum", signal.SIGINT))


def _check_environment() -> None:
    """Raises UsageError for a value of an environment variable that `patch` would refuse."""
    if os.environ.get("DCAE_FAST_DISABLE"):
        from .fast.patch import disabled_by_environment

        try:
            disabled_by_environment()
        except ValueError as error:
            raise UsageError(str(error)) from error


def _failed(reason: object, status: int) -> int:
    print_failure(f"dcae-fast: {reason}")
    return status
