"""The cost of a training, estimated before it begins: without computing anything or allocating weights."""

import torch
from torch.autograd.graph import saved_tensors_hooks

from dcae_fast.data.latents import LatentDataset
from dcae_fast.describe import diffusion_cost, table
from dcae_fast.models.diffusion_zoo import DiffusionConfig
from dcae_fast.ops._private import FakeTensorMode, storage_id
from dcae_fast.training.engine.batches import BatchOrder
from dcae_fast.training.engine.parallel import apply_activation_checkpointing
from dcae_fast.training.engine.state import autocast

from .config import DiffusionRecipe, DiffusionRun
from .network import blocks_of


def describe(recipe: DiffusionRecipe, run: DiffusionRun, data: LatentDataset, ranks: int) -> str:
    """A table of the data, the network, the work of a step, and the memory that each rank needs.

    ValueError if the recipe does not fit the data or the number of ranks.
    """
    config = recipe.diffusion_config(data)
    network, manifest = config.network, data.manifest
    parameters, flops = diffusion_cost(config)
    flops *= recipe.batch * (4 if run.checkpoint_activations else 3)
    part = recipe.part(ranks, run.accumulate)
    epoch = BatchOrder(len(data), recipe.batch, ranks, recipe.seed, range(0), 0, ranks).batches
    copies = 4 * (5 if recipe.ema_decay else 4)  # bytes: weight, gradient, two moments, average
    weights = copies * parameters / (ranks if run.parallel == "fsdp" else 1)
    kept = kept_bytes(config, recipe.autocast, run.checkpoint_activations, part)
    rows = [
        ("data", f"{len(data)} latents {'x'.join(map(str, data.shape))} in {data.folder}"),
        ("classes", f"{len(data.classes) or 1} of {network.num_classes}"),
        ("made by", f"{config.autoencoder}; scaled by {config.scaling_factor}"),
        ("network", f"{recipe.network.kind}, depth {network.depth}, width {network.hidden_size}"),
        ("size", f"{parameters / 1e6:.1f} M parameters, {network.tokens} tokens"),
        ("objective", f"{recipe.train_scheduler}, {recipe.precision}"),
        ("batch", f"{recipe.batch}: ranks {ranks}, parts {run.accumulate} of {part}"),
        ("length", f"{recipe.steps} steps, {recipe.steps / epoch:.1f} epochs of {epoch}"),
        ("work", f"{flops / 1e12:.4g} TFLOP per step, summed over the ranks"),
        ("memory", f"{_size(weights)} for weights, gradients, optimizer{' and average' if recipe.ema_decay else ''}"),
        ("", f"{_size(kept)} kept for the backward pass, neither patched nor compiled"),
        ("", f"{_size(weights + kept)} per rank, without temporary tensors"),
    ]
    if manifest is not None and manifest.mean is not None:
        rows.insert(3, ("statistics", f"mean {manifest.mean:.4f}, rms {manifest.rms:.4f}, std {manifest.std:.4f}"))
    return table(rows)


def kept_bytes(config: DiffusionConfig, precision: str, checkpointed: bool, batch: int) -> int:
    """Bytes that the network, neither patched nor compiled, stores for the backward pass of a batch; weights aside."""
    few, more = (_kept_bytes(config, precision, checkpointed, size) for size in (2, 3))
    return few + (batch - 2) * (more - few)


def _kept_bytes(config: DiffusionConfig, precision: str, checkpointed: bool, batch: int) -> int:
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[storage_id(tensor)] = tensor.untyped_storage()
        return tensor

    size = config.network.input_size
    with torch.device("meta"):
        network = config.build().train()
    with FakeTensorMode(allow_non_fake_inputs=True), saved_tensors_hooks(pack, lambda tensor: tensor):
        network.to_empty(device="cpu")
        if checkpointed:
            apply_activation_checkpointing(blocks_of(network))
        z, labels = torch.empty(batch, config.network.in_channels, size, size), torch.zeros(batch, dtype=torch.int64)
        with autocast(z.device, precision):
            network(z, torch.empty(batch), labels)
        for parameter in network.parameters():
            kept.pop(storage_id(parameter), None)
    return sum(storage.nbytes() for storage in kept.values())


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
