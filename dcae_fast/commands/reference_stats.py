"""dcae-fast reference-stats: writes the reference data of the metrics, from real pictures."""

from pathlib import Path

import tyro

from dcae_fast.errors import DataError
from dcae_fast.memory import out_of_memory_as
from dcae_fast.workers import default_workers

from .common import UsageError, check_integer, check_workers, make_parent_folder, pixel_limit, report_problems


def reference_stats(
    images: tyro.conf.Positional[Path],
    *,
    fid: Path | None = None,
    precision_recall: Path | None = None,
    cmmd: Path | None = None,
    resolution: int = 512,
    batch: int = 32,
    workers: int | None = None,
    max_pixels: int | None = None,
    device: str | None = None,
) -> int:
    """Compute the reference data of the metrics from real pictures. Under torchrun, uses several GPUs.

    The files are inputs of `eval-diffusion` and `eval-autoencoder`. If the network of a metric is missing, the metric's
    file is not written. The exit status is 1 if a network is missing, or if any picture could not be read.

    Args:
        images: folder of pictures, of class folders or of .tar shards; or .npz file of pictures, as ADM's VIRTUAL_*
        fid: .npz file to write: mean and covariance of Inception features
        precision_recall: .npy file to write: Inception features of all pictures, which must fit in memory
        cmmd: .npy file to write: CLIP embeddings
        resolution: side of the square centre crops, in pixels; pictures of an .npz file are not cropped
        batch: number of pictures per batch
        workers: picture-reading processes per rank; None means the rank's share of the CPU cores
        max_pixels: skip and report pictures with more pixels; None means Pillow's limit, 178956970
        device: PyTorch device, such as cuda:1; None means CUDA if available, else the CPU
    """
    from dcae_fast import distributed
    from dcae_fast.data.find import find_pictures
    from dcae_fast.evaluation import networks
    from dcae_fast.evaluation.pictures import FolderBatches, NpzBatches
    from dcae_fast.evaluation.references import OutputFiles, write_references
    from dcae_fast.reconstruction import choose_device

    outputs = OutputFiles(fid, precision_recall, cmmd)
    if not outputs.networks:
        raise UsageError("no output file given; expected at least one of --fid, --precision-recall or --cmmd")
    files = {"--fid": (fid, ".npz"), "--precision-recall": (precision_recall, ".npy"), "--cmmd": (cmmd, ".npy")}
    for option, (path, suffix) in files.items():
        if path is not None and path.suffix != suffix:
            raise UsageError(f"{option} {path}: expected a file name that ends in {suffix}")
    check_integer("--resolution", resolution, least=1)
    check_integer("--batch", batch, least=1)
    check_workers(workers)
    limit = pixel_limit(max_pixels)
    for option, (path, _) in files.items():
        if path is not None:
            make_parent_folder(path, option)
    too_large = UsageError(f"--batch {batch}: does not fit in memory; try a smaller batch")
    with out_of_memory_as(too_large), distributed.process_group(choose_device(device, "float32")[0]) as place:
        try:
            if images.suffix == ".npz":
                batches = NpzBatches(images, batch)
            else:
                pictures = distributed.broadcast(find_pictures(images) if distributed.is_main() else None)
                workers = default_workers() if workers is None else workers
                batches = FolderBatches(pictures, resolution, batch, workers, limit)
            found, missing = networks.load_all(outputs.networks, place)
            written = write_references(batches, outputs, found, place)
        except DataError as error:
            raise UsageError(str(error)) from error
        failed = [each for part in distributed.all_gather(batches.failed) for each in part]
        for path in written:
            distributed.print_main(f"{batches.count - len(failed)} pictures -> {path.resolve()}")
        return report_problems(failed, missing)
