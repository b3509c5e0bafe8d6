"""The cost of a training, estimated before it begins: without computing anything."""

from typing import NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from dcae_fast.describe import table
from dcae_fast.models.config import DCAEConfig
from dcae_fast.ops._private import FakeTensorMode, storage_id
from dcae_fast.training.engine.parallel import apply_activation_checkpointing
from dcae_fast.training.engine.state import autocast

from .config import AutoencoderRecipe
from .network import PartlyTrained, draw_channels, with_gradient
from .task import AutoencoderTask


class Work(NamedTuple):
    """kept: bytes stored for the backward pass, weights aside. flops: of the forward and the backward pass."""

    kept: int
    flops: int


def describe(task: AutoencoderTask, ranks: int) -> str:
    """A table of the data, the network, the work of a step, and the memory that each rank needs."""
    recipe, run, network = task.recipe, task.run, task.network
    parameters = list(network.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in parameters) - trained
    part, pictures = recipe.part(ranks, run.accumulate), len(task.pictures.items)
    channels = draw_channels(task.channels, recipe.num_sample_latent_channels, torch.Generator())
    work = work_of_a_part(network.config, recipe, channels, run.checkpoint_activations, part)
    average = bool(recipe.ema_decay)
    weights = 4 * (4 * trained + frozen + average * (trained + frozen))  # weight, gradient, two moments; average
    weights //= ranks if run.parallel == "fsdp" else 1
    rows = [
        ("data", f"{run.data}: {_pictures(pictures)}, and {len(task.pictures.failed)} skipped"),
        ("network", f"{recipe.source or recipe.model}"),
        ("trained", f"{trained / 1e6:.4g} M parameters: {', '.join(recipe.train)}"),
        ("frozen", f"{frozen / 1e6:.4g} M parameters"),
        ("channels", f"{', '.join(map(str, task.channels))} of the latent" if channels else "all of the latent"),
        ("batch", f"{recipe.batch} crops of {recipe.resolution} px: ranks {ranks}, parts {run.accumulate} of {part}"),
        ("length", f"{recipe.steps} steps, {recipe.steps * recipe.batch / pictures:.1f} crops of each picture"),
        ("work", f"{work.flops * ranks * run.accumulate / 1e12:.4g} TFLOP per step of the autoencoder"),
        ("memory", f"{_size(weights)} for weights, gradients, optimizer{' and average' if average else ''}"),
        ("", f"{_size(work.kept)} kept for the backward pass, neither patched nor compiled"),
        ("", f"{_size(weights + work.kept)} per rank, without temporary tensors, LPIPS and discriminator"),
    ]
    return table(rows)


def work_of_a_part(
    config: DCAEConfig, recipe: AutoencoderRecipe, channels: tuple[int, ...], checkpointed: bool, batch: int
) -> Work:
    """The work of the autoencoder, neither patched nor compiled, on a part of `batch` crops."""
    few, more = (_work(config, recipe, channels, checkpointed, size) for size in (2, 3))
    return Work(*(at_few + (batch - 2) * (at_more - at_few) for at_few, at_more in zip(few, more, strict=True)))


def _work(
    config: DCAEConfig, recipe: AutoencoderRecipe, channels: tuple[int, ...], checkpointed: bool, batch: int
) -> Work:
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[storage_id(tensor)] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        network = PartlyTrained(config)
        network.choose(recipe.train)
        if checkpointed:
            apply_activation_checkpointing(with_gradient(network))
        x = torch.empty(batch, 3, recipe.resolution, recipe.resolution)
        with saved_tensors_hooks(pack, lambda tensor: tensor), autocast(x.device, recipe.precision):
            y = network(x, channels)
        y.float().mean().backward()
    for parameter in network.parameters():
        kept.pop(storage_id(parameter), None)
    return Work(sum(storage.nbytes() for storage in kept.values()), counter.get_total_flops())


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count} pictures"


def _size(amount: float) -> str:
    return f"{amount / 2**30:.2f} GiB"
