"""dcae-fast reference-stats: what generated pictures are compared with."""

from pathlib import Path

import tyro

from dcae_fast.memory import out_of_memory_as
from dcae_fast.workers import default_workers

from .common import UsageError, check_integer, check_workers, make_place, pixel_limit, report_problems


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
    """Write statistics and features of real pictures, for eval-diffusion and eval-autoencoder; under torchrun too.

    The exit status is 1 if a network was missing, and what needs it was not written, or if pictures were unreadable.

    Args:
        images: folder of pictures, of class folders or of .tar shards; or an .npz file of pictures, as ADM's VIRTUAL_*
        fid: .npz file to write, of the mean and covariance of Inception's features
        precision_recall: .npy file to write, of Inception's features; as many pictures as fit in memory
        cmmd: .npy file to write, of CLIP's embeddings
        resolution: of the centre crops of a folder's pictures, in pixels; those of an .npz file are taken as they are
        batch: pictures at once
        workers: processes of each rank that read pictures; by default its share of the cores
        max_pixels: pictures with more pixels are named and left out; by default Pillow's limit, 178956970
        device: a PyTorch device; by default CUDA if there is any, else the CPU
    """
    from dcae_fast import distributed
    from dcae_fast.data.find import find_pictures
    from dcae_fast.data.manifest import DataError
    from dcae_fast.evaluation import networks
    from dcae_fast.evaluation.pictures import FolderBatches, NpzBatches
    from dcae_fast.evaluation.references import Wanted, write_references
    from dcae_fast.reconstruction import choose_device

    wanted = Wanted(fid, precision_recall, cmmd)
    if not wanted.networks:
        raise UsageError("name at least one file to write: --fid, --precision-recall or --cmmd")
    files = {"--fid": (fid, ".npz"), "--precision-recall": (precision_recall, ".npy"), "--cmmd": (cmmd, ".npy")}
    for option, (path, suffix) in files.items():
        if path is not None and path.suffix != suffix:
            raise UsageError(f"{option} {path}: expected a name that ends in {suffix}")
    check_integer("--resolution", resolution, least=1)
    check_integer("--batch", batch, least=1)
    check_workers(workers)
    limit = pixel_limit(max_pixels)
    for option, (path, _) in files.items():
        if path is not None:
            make_place(path, option)
    too_large = UsageError(f"--batch {batch}: does not fit in memory")
    with out_of_memory_as(too_large), distributed.process_group(choose_device(device, "float32")[0]) as place:
        try:
            if images.suffix == ".npz":
                batches = NpzBatches(images, batch)
            else:
                pictures = distributed.broadcast(find_pictures(images) if distributed.is_main() else None)
                workers = default_workers() if workers is None else workers
                batches = FolderBatches(pictures, resolution, batch, workers, limit)
            found, missing = networks.load_all(wanted.networks, place)
            written = write_references(batches, wanted, found, place)
        except DataError as error:
            raise UsageError(str(error)) from error
        failed = [each for part in distributed.all_gather(batches.failed) for each in part]
        for path in written:
            distributed.print_main(f"{batches.count - len(failed)} pictures -> {path.resolve()}")
        return report_problems(failed, missing)
