"""dcae-fast train-autoencoder: an autoencoder on photographs."""

import tyro

from dcae_fast.training.autoencoder.config import DESCRIPTIONS, RECIPES, AutoencoderRun

from .common import make_folder
from .training import training_process

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
    from dcae_fast import distributed
    from dcae_fast.training.autoencoder.estimate import describe
    from dcae_fast.training.autoencoder.task import AutoencoderTask, train

    with training_process(run, recipe.precision) as device:
        if dry_run:
            distributed.print_main(describe(AutoencoderTask(recipe, run, device), distributed.world_size()))
            return 0
        distributed.on_main(lambda: make_folder(run.out))
        model = train(recipe, run, device)
        distributed.print_main(f"The model is in {model.resolve()}; its README.md has the figures")
    return 0
