"""dcae-fast eval-autoencoder: measures the reconstruction quality of an autoencoder."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from dcae_fast.errors import DataError
from dcae_fast.files import written_atomically
from dcae_fast.memory import out_of_memory_as
from dcae_fast.workers import default_workers

from .common import Compute, UsageError, check_integer, check_workers, make_folder, pixel_limit, report_problems

if TYPE_CHECKING:
    import torch

    from dcae_fast.evaluation.autoencoder import Result
    from dcae_fast.models.autoencoder import DCAE

HEADINGS = ("latent mean", "rms", "std", "rFID", "PSNR", "SSIM", "LPIPS", "CLIP-IQA")


def eval_autoencoder(
    images: tyro.conf.Positional[Path],
    *,
    model: str,
    against: str | None = None,
    compare: bool = False,
    out: Path = Path("outputs/autoencoder"),
    resolution: int = 512,
    reference: Path | None = None,
    batch: int = 16,
    workers: int | None = None,
    max_pixels: int | None = None,
    compute: Compute,
) -> int:
    """Measure the reconstruction quality and the latents of an autoencoder. Under torchrun, uses several GPUs.

    Writes results.json and examples.png. An infinite PSNR is written as null. The exit status is 1 if the network of a
    metric is missing, or if any picture could not be read.

    Args:
        images: folder of pictures, of class folders, or of WebDataset .tar shards
        model: model name (see `dcae-fast models`), Hugging Face repository, folder or weight file
        against: a second model to measure; "eager" means the same model without the fast operators
        compare: with --int8, also measure the exact model, and the error of the 8-bit model's latents
        out: output folder
        resolution: side of the square centre crop of each picture, in pixels
        reference: .npz file of `reference-stats`, for rFID; None means the statistics of the given pictures
        batch: number of pictures per batch
        workers: picture-reading processes per rank; None means the rank's share of the CPU cores
        max_pixels: skip and report pictures with more pixels; None means Pillow's limit, 178956970
    """
    from dcae_fast import distributed
    from dcae_fast import images as pictures
    from dcae_fast.data.find import find_pictures
    from dcae_fast.evaluation import autoencoder, networks
    from dcae_fast.evaluation.moments import Moments
    from dcae_fast.evaluation.pictures import FolderBatches
    from dcae_fast.reconstruction import choose_device

    check_integer("--resolution", resolution, least=1)
    check_integer("--batch", batch, least=1)
    check_workers(workers)
    limit = pixel_limit(max_pixels)
    if against == "eager" and not compute.patch:
        raise UsageError("--against eager --no-patch: compares the model with itself; remove one of the options")
    if compare and (compute.int8 is None or against is not None):
        raise UsageError("--compare: compares --int8 with the exact model; give --int8, and no --against")
    place, dtype = choose_device(compute.device, compute.dtype)
    too_large = UsageError(f"--batch {batch}: does not fit in memory; try a smaller batch")
    with out_of_memory_as(too_large), distributed.process_group(place) as device:
        try:
            moments = None if reference is None else Moments.load(reference)
            models, precision = _load(model, against, compare, compute, device, dtype)
            _check_resolution(resolution, models)
            found_pictures = distributed.broadcast(find_pictures(images) if distributed.is_main() else None)
            workers = default_workers() if workers is None else workers
            batches = FolderBatches(found_pictures, resolution, batch, workers, limit)
            if distributed.is_main():
                make_folder(out)
            found, missing = networks.load_all(autoencoder.NETWORKS, device, resolution)
            results = autoencoder.evaluate(batches, models, found, moments, "exact" if compare else None)
        except DataError as error:
            raise UsageError(str(error)) from error
        failed = [each for part in distributed.all_gather(batches.failed) for each in part]
        if not results:
            distributed.print_main("no picture could be measured; results.json was not written", error=True)
        elif distributed.is_main():
            settings = {"resolution": resolution, "dtype": str(dtype).removeprefix("torch."), "patch": compute.patch}
            settings |= {"precision": precision, "int8": None if compute.int8 is None else list(map(str, compute.int8))}
            settings |= {"images": len(next(iter(results.values())).psnr)}
            settings |= {"reference": None if reference is None else str(reference)}
            _save(results, settings, out)
            pictures.save_png(
                autoencoder.examples(batches, models, next(iter(results.values())).psnr), out / "examples.png"
            )
            print(_table(results), f"results.json and examples.png are in {out.resolve()}", sep="\n")
        return report_problems(failed, missing)


def _load(
    model: str, against: str | None, compare: bool, compute: Compute, device: "torch.device", dtype: "torch.dtype"
) -> tuple[dict[str, "DCAE"], str]:
    """The models to measure, by their names in the results, and the precision of the first, see `patch_model`.

    Raises UsageError if the comparison is that of a model with itself.
    """
    import torch

    from dcae_fast.models.autoencoder import DCAE

    exactly = replace(compute, int8=None)
    sources = {model: (model, compute)}
    if against == "eager":
        sources["eager"] = (model, replace(exactly, patch=False, max_memory=None))
    elif compare:
        sources["exact"] = (model, exactly)
    elif against == model:
        raise UsageError(f"--against {against}: is the same model as --model; expected another model, or eager")
    elif against is not None:
        sources[against] = (against, exactly)
    models, precisions = {}, []
    for name, (source, how) in sources.items():
        models[name] = DCAE.from_pretrained(source).to(device, dtype, memory_format=torch.channels_last)
        precisions.append(how.patch_model(models[name]))
    if compare and precisions[0] == "exact":
        raise UsageError("--compare: no layer computes in 8 bit, so both models are exact")
    return models, precisions[0]


def _check_resolution(resolution: int, models: dict[str, "DCAE"]) -> None:
    for name, model in models.items():
        ratio = model.spatial_compression_ratio
        if resolution % ratio:
            raise UsageError(
                f"--resolution {resolution}: expected a multiple of {ratio}, the compression ratio of {name}"
            )


def _save(results: dict[str, "Result"], settings: dict, out: Path) -> None:
    """Writes results.json. A figure that is not finite, such as the PSNR of equal pictures, becomes null."""
    models = {
        name: {column: figure if math.isfinite(figure) else None for column, figure in result.figures.items()}
        for name, result in results.items()
    }
    content = {"settings": settings, "models": models}
    with written_atomically(out / "results.json") as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def _table(results: dict[str, "Result"]) -> str:
    from dcae_fast.describe import table
    from dcae_fast.evaluation import autoencoder

    columns, headings = autoencoder.COLUMNS, HEADINGS
    if any(autoencoder.LATENT_ERROR in result.figures for result in results.values()):
        columns, headings = (*columns, autoencoder.LATENT_ERROR), (*headings, "latent error")
    rows = [("model", *headings)]
    for name, result in results.items():
        figures = [result.figures.get(column) for column in columns]
        rows.append((name, *("-" if figure is None else f"{figure:.4f}" for figure in figures)))
    return table(rows)
