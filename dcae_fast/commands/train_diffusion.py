"""dcae-fast train-diffusion: a diffusion transformer on cached latents."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from dcae_fast.training.diffusion.config import DESCRIPTIONS, RECIPES, DiffusionRun

from .common import make_folder
from .training import training_process

if TYPE_CHECKING:
    import torch

    from dcae_fast.training.diffusion.evaluation import Comparison

NamedRecipe = tyro.extras.subcommand_type_from_defaults(RECIPES, DESCRIPTIONS, prefix_names=False)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Compare samples of the averaged weights with real pictures every eval_steps, if at least one file is given.

    The inception score of the samples is computed too.
    """

    eval_fid: Path | None = None
    """.npz file of reference-stats, for FID"""
    eval_precision_recall: Path | None = None
    """.npy file of reference-stats, for precision and recall"""
    eval_cmmd: Path | None = None
    """.npy file of reference-stats, for CMMD"""
    eval_samples: int = 5000
    """number of samples; with fewer samples FID is higher"""

    def comparison(self, run: DiffusionRun, device: "torch.device") -> "Comparison | None":
        from dcae_fast.evaluation.generation import References
        from dcae_fast.training.diffusion.evaluation import Comparison

        files = self.eval_fid, self.eval_precision_recall, self.eval_cmmd
        return Comparison(References.load(*files), self.eval_samples, run, device) if any(files) else None


def train_diffusion(recipe: NamedRecipe, run: DiffusionRun, compared: Compared, *, dry_run: bool = False) -> int:
    """Train a diffusion transformer on cached latents by a recipe of the original; under torchrun on several GPUs.

    After SIGTERM or Ctrl-C the command finishes the step, saves a checkpoint and ends; the same command resumes the
    training. A YAML, TOML or JSON file can contain options, also together with options on the command line:
    `train-diffusion uvit-h-f64 @my.yaml --lr 1e-4`. If an option is given twice, the later one counts.

    Args:
        dry_run: print the size of the network, the cost of a step, the memory needed and the data found, and exit
    """
    from dcae_fast import distributed
    from dcae_fast.data.latents import LatentDataset
    from dcae_fast.training.diffusion.estimate import describe
    from dcae_fast.training.diffusion.task import train

    with training_process(run, recipe.autocast) as device:
        if dry_run:
            distributed.print_main(describe(recipe, run, LatentDataset(run.data), distributed.world_size()))
            return 0
        comparison = compared.comparison(run, device)
        make_folder(run.out)
        model = train(recipe, run, device, comparison)
        distributed.print_main(f"The model is in {model.resolve()}")
    return 0
