"""dcae-fast train-autoencoder: an autoencoder on photographs."""

import warnings

import tyro

from dcae_fast.memory import out_of_memory_as
from dcae_fast.training.autoencoder.config import DESCRIPTIONS, RECIPES, AutoencoderRun
from dcae_fast.training.engine.config import TrainingError

from .common import UsageError, make_folder

NamedRecipe = tyro.extras.subcommand_type_from_defaults(RECIPES, DESCRIPTIONS, prefix_names=False)


def train_autoencoder(recipe: NamedRecipe, run: AutoencoderRun, *, dry_run: bool = False) -> int:
    """Train or fine-tune an autoencoder on photographs; under torchrun on several GPUs.

    The recipes follow decoupled high-resolution adaptation, the three phases of DC-AE's training. The original's code
    for it is not public: default learning rates, betas, weight decay and loss weights of the phases are second-hand;
    all other defaults are this project's choice.

    After SIGTERM or Ctrl-C the command finishes the step, saves a checkpoint and ends; the same command resumes the
    training. A YAML, TOML or JSON file can contain options, also together with options on the command line:
    `train-autoencoder decoder @my.yaml --lr 1e-5`. If an option is given twice, the later one counts.

    Args:
        dry_run: print the parameters, the cost of a step, the memory needed and the photographs found, and exit
    """
    import torch

    from dcae_fast import distributed
    from dcae_fast.errors import DataError
    from dcae_fast.reconstruction import choose_device
    from dcae_fast.training.autoencoder.estimate import describe
    from dcae_fast.training.autoencoder.task import AutoencoderTask, train

    advice = "try --accumulate, --checkpoint-activations or, on several GPUs, --parallel fsdp"
    too_large = UsageError(f"a part of the batch does not fit in memory; {advice}")
    try:
        place, _ = choose_device(run.device, recipe.precision)
        with out_of_memory_as(too_large), distributed.process_group(place) as device:
            if dry_run:
                distributed.print_main(describe(AutoencoderTask(recipe, run, device), distributed.world_size()))
                return 0
            torch.set_float32_matmul_precision("high")  # TF32 for products outside autocast
            warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # nobody changes its result in place
            distributed.on_main(lambda: make_folder(run.out))
            model = train(recipe, run, device)
            distributed.print_main(f"The model is in {model.resolve()}; its README.md has the figures")
    except (DataError, TrainingError, ValueError) as error:
        raise UsageError(str(error)) from error
    return 0
