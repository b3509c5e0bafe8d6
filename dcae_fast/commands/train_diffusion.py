"""dcae-fast train-diffusion: a diffusion transformer on cached latents."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from dcae_fast.memory import out_of_memory_as
from dcae_fast.training.config import DESCRIPTIONS, RECIPES, Run, TrainingError

from .common import UsageError, make_folder

if TYPE_CHECKING:
    import torch

    from dcae_fast.training.evaluation import Comparison

Named = tyro.extras.subcommand_type_from_defaults(RECIPES, DESCRIPTIONS, prefix_names=False)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Samples of the average, compared with real pictures every eval_steps, where one of the files is given.

    Their inception score is computed along with it.
    """

    eval_fid: Path | None = None
    """.npz file of reference-stats, for FID"""
    eval_precision_recall: Path | None = None
    """.npy file of reference-stats, for precision and recall"""
    eval_cmmd: Path | None = None
    """.npy file of reference-stats, for CMMD"""
    eval_samples: int = 5000
    """how many; of fewer samples the FID is higher"""

    def comparison(self, run: Run, device: "torch.device") -> "Comparison | None":
        from dcae_fast.evaluation.generation import References
        from dcae_fast.training.evaluation import Comparison

        files = self.eval_fid, self.eval_precision_recall, self.eval_cmmd
        return Comparison(References.load(*files), self.eval_samples, run, device) if any(files) else None


def train_diffusion(recipe: Named, run: Run, compared: Compared, *, dry_run: bool = False) -> int:
    """Train a diffusion transformer on cached latents by one of the original's recipes; under torchrun on several GPUs.

    SIGTERM and Ctrl-C end a run after the step, with a checkpoint; the same command resumes it. All options may also
    stand in a YAML, TOML or JSON file, which is named with an @ among them: `train-diffusion uvit-h-f64 @my.yaml
    --lr 1e-4`; the later of two counts.

    Args:
        dry_run: print the network's size, the cost of a step, the memory needed and the data found, and train nothing
    """
    import torch

    from dcae_fast import distributed
    from dcae_fast.data.latents import LatentDataset
    from dcae_fast.data.manifest import DataError
    from dcae_fast.reconstruction import choose_device
    from dcae_fast.training.estimate import describe
    from dcae_fast.training.loop import train

    advice = "try --accumulate, --checkpoint-activations or, on several GPUs, --parallel fsdp"
    too_large = UsageError(f"a part of the batch does not fit in memory; {advice}")
    try:
        place, _ = choose_device(run.device, recipe.precision)
        with out_of_memory_as(too_large), distributed.process_group(place) as device:
            if dry_run:
                distributed.print_main(describe(recipe, run, LatentDataset(run.data), distributed.world_size()))
                return 0
            torch.set_float32_matmul_precision("high")  # as the original: TF32 for what autocast leaves
            warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # whose result nobody changes in place
            comparison = compared.comparison(run, device)
            make_folder(run.out)
            model = train(recipe, run, device, comparison)
            distributed.print_main(f"The model is in {model.resolve()}")
    except (DataError, TrainingError, ValueError) as error:
        raise UsageError(str(error)) from error
    return 0
