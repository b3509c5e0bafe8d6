"""dcae-fast eval-diffusion: how close a diffusion model's pictures are to real ones."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dcae_fast.files import written_atomically
from dcae_fast.memory import out_of_memory_as

from .common import Compute, UsageError, check_cfg, check_integer, check_seed, make_folder, report_problems

if TYPE_CHECKING:
    import torch

    from dcae_fast.diffusion import DCAEDiffusion
    from dcae_fast.evaluation.generation import References, SampleFolder, Settings

Sampler = Literal["DPM_Solver", "ODE_dopri5", "ODE_heun2", "SDE", "GaussianDiffusion"]
LABELS = {
    "fid": "FID",
    "inception_score": "inception score",
    "inception_score_std": "its deviation",
    "precision": "precision",
    "recall": "recall",
    "cmmd": "CMMD",
}


def eval_diffusion(
    *,
    model: str,
    out: Path = Path("outputs/diffusion"),
    samples: int = 50000,
    cfg: float = 1.0,
    seed: int = 0,
    class_seed: int = 0,
    sampler: Sampler | None = None,
    steps: int | None = None,
    batch: int = 32,
    fid: Path | None = None,
    precision_recall: Path | None = None,
    cmmd: Path | None = None,
    save: Literal["png", "npz", "none"] = "none",
    compute: Compute,
) -> int:
    """Sample pictures of random classes and compare them with real ones, into results.json; under torchrun too.

    Resumes a run that was ended; all ranks see the same folder. The samples do not depend on the number
    of ranks, but on the batch. The exit status is 1 if a metric lacked its network.

    Args:
        model: a name from `dcae-fast models`, a Hugging Face repository, a folder or a weight file
        out: folder for the samples' features and the results
        samples: how many
        cfg: scale of the classifier-free guidance; 1 is without
        seed: of the noise
        class_seed: of the classes, which are the original's
        sampler: by default the model's own
        steps: by default the model's own
        batch: pictures at once
        fid: .npz file of reference-stats, for FID
        precision_recall: .npy file of reference-stats, for precision and recall
        cmmd: .npy file of reference-stats, for CMMD
        save: keep the pictures too, as PNG files or in samples.npz
    """
    from dcae_fast import distributed
    from dcae_fast.evaluation import networks
    from dcae_fast.evaluation.generation import References, SampleFolder, generate
    from dcae_fast.lock import locked
    from dcae_fast.reconstruction import choose_device

    check_integer("--samples", samples, least=1, most=10**8)
    check_integer("--batch", batch, least=1)
    check_integer("--steps", steps, least=1)
    check_cfg(cfg)
    check_seed("--seed", seed)
    check_seed("--class-seed", class_seed)
    place, _ = choose_device(compute.device, compute.dtype)
    too_large = UsageError(f"--batch {batch}: does not fit in memory")
    with out_of_memory_as(too_large), distributed.process_group(place) as device:
        try:
            references = References.load(fid, precision_recall, cmmd)
            network = replace(compute, device=str(device)).load_diffusion(model)
            options = {"samples": samples, "batch": batch, "cfg": cfg, "seed": seed, "class_seed": class_seed}
            settings = _settings(network, model, compute.patch, sampler, steps, options)
            folder = SampleFolder(out, settings, network.config.network.num_classes, save)
            network.config.check_sampler(settings.sampler)
            found, missing = networks.load_all(references.networks, device)
            if missing and not found and save == "none":
                distributed.print_main("nothing to measure samples with: none are drawn", error=True)
                return report_problems([], missing)
            references.check(found, device, samples)
            make_folder(out)
            with locked(out):
                kept = generate(network, folder, found)
                results = distributed.on_main(lambda: _results(folder, references, set(found), device, kept))
            distributed.print_main(results)
        except (ImportError, ValueError) as error:  # without torchdiffeq; settings or references that do not fit
            raise UsageError(str(error)) from error
        return report_problems([], missing)


def _settings(
    network: "DCAEDiffusion", model: str, patch: bool, sampler: str | None, steps: int | None, options: dict
) -> "Settings":
    """Those of the samples; the main process hashes the weights."""
    from dcae_fast import distributed
    from dcae_fast.data.manifest import weights_hash
    from dcae_fast.evaluation.generation import Settings

    config, weight = network.config, next(network.autoencoder.parameters())
    return Settings(
        model=model,
        weights=distributed.broadcast(weights_hash(network) if distributed.is_main() else None),
        dtype=str(weight.dtype).removeprefix("torch."),
        patch=patch,
        sampler=sampler or config.eval_scheduler,
        steps=config.num_inference_steps if steps is None else steps,
        **options,
    )


def _results(
    folder: "SampleFolder", references: "References", names: set[str], device: "torch.device", kept: int
) -> str:
    """Writes results.json, and samples.npz if asked for; what to print."""
    from dcae_fast.evaluation.generation import figures

    results = figures(folder, references, names, device)
    content = {"settings": asdict(folder.settings), "figures": results}
    with written_atomically(folder.folder / "results.json") as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
    lines = [f"{kept} of {folder.batches} batches were there already"] if kept else []
    lines += [f"{LABELS[name]:<16}{value:.6f}" for name, value in results.items()]
    if folder.save == "png":
        lines.append(f"Samples are in {(folder.folder / 'samples').resolve()}")
    if folder.save == "npz":
        lines.append(f"Samples are in {folder.write_npz().resolve()}")
    return "\n".join([*lines, f"results.json is in {folder.folder.resolve()}"])
