"""The autoencoder in training: which parameters train, its layers in order, and how it is computed."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

import dcae_fast
from dcae_fast import distributed, ops
from dcae_fast.fast.layout import is_channels_last, is_indifferent, layout_of, to_channels_last
from dcae_fast.models.autoencoder import DCAE
from dcae_fast.training.engine.config import TrainingError
from dcae_fast.training.engine.parallel import (
    apply_activation_checkpointing,
    apply_compile,
    apply_ddp,
    apply_fsdp,
)
from dcae_fast.training.engine.settings import FILE as SETTINGS

from .config import AutoencoderRecipe, AutoencoderRun


class PartlyTrained(DCAE):
    """A DC-AE of which some parameters train. Frozen modules stay in evaluation mode, also in training."""

    def choose(self, prefixes: tuple[str, ...]) -> None:
        """Trains the parameters whose names begin with one of the prefixes, such as "decoder.project_out".

        Freezes all others. ValueError for a prefix that no name begins with.
        """
        names = [name for name, _ in self.named_parameters()]
        for prefix in prefixes:
            if not any(begins_with(name, prefix) for name in names):
                parts = dict.fromkeys(".".join(name.split(".")[:2]) for name in names)
                raise ValueError(f"train: no parameter's name begins with {prefix}; expected one of {', '.join(parts)}")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(any(begins_with(name, prefix) for prefix in prefixes))
        self.train()

    def train(self, mode: bool = True) -> "PartlyTrained":
        super().train(mode)
        for module in self.modules():
            if not is_trained(module):
                module.training = False
        return self

    def forward(self, x: torch.Tensor, channels: tuple[int, ...] = ()) -> torch.Tensor:
        """The reconstructions of x [B, 3, H, W].

        channels: for adaptive models, numbers of latent channels: one reconstruction of x for each, one batch after
        another. What lies before all trained modules runs without autograd, and so takes the inference path.

        The blocks of a patched model would each make contiguous images channels-last, and their results contiguous:
        that is done here once.
        """
        if not ops.has_kernels(x) or is_channels_last(x) or not is_indifferent(self):
            return through([self.decoder.project_out], self.trunk(x, channels))
        return layout_of(through([self.decoder.project_out], self.trunk(to_channels_last(x), channels)), x)

    def trunk(self, x: torch.Tensor, channels: tuple[int, ...]) -> torch.Tensor:
        """The input of decoder.project_out."""
        encoder, decoder = self.encoder, self.decoder
        head, stem = encoder.project_out, decoder.project_in
        x = through([encoder.project_in, *encoder_blocks(self)], x)
        if channels:
            z = compute(lambda x: torch.cat(encoder.partial_latents(x, list(channels)), dim=1), x, head)
            x = compute(lambda z: torch.cat([stem(part) for part in z.split(channels, dim=1)]), z, stem)
        else:
            x = through([head, stem], x)
        return through(decoder_blocks(self), x)


def begins_with(name: str, prefix: str) -> bool:
    """Whether a parameter's name begins with the prefix, part by part."""
    return f"{name}.".startswith(f"{prefix.rstrip('.')}.")


def is_trained(module: nn.Module) -> bool:
    """Whether a module has a parameter that trains."""
    return any(parameter.requires_grad for parameter in module.parameters())


def through(layers: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        x = compute(layer, x, layer)
    return x


def compute(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """function(x), without autograd if neither x nor the layer that the function computes needs a gradient."""
    if x.requires_grad or is_trained(layer):
        return function(x)
    with torch.no_grad():
        return function(x)


def encoder_blocks(network: DCAE) -> list[nn.Module]:
    return [block for stage in network.encoder.stages for block in stage.op_list]


def decoder_blocks(network: DCAE) -> list[nn.Module]:
    return [block for stage in reversed(network.decoder.stages) for block in stage.op_list]


def blocks_of(network: DCAE) -> list[nn.Module]:
    """The residual and resampling blocks of encoder and decoder, in the order of computation."""
    return [*encoder_blocks(network), *decoder_blocks(network)]


def load_source(recipe: AutoencoderRecipe) -> PartlyTrained:
    """The autoencoder to start from, on the CPU. Its trained parameters are chosen. Seeds PyTorch's generators.

    Raises CheckpointError, TrainingError and ValueError.
    """
    if (recipe.source is None) == (recipe.model is None):
        raise ValueError(
            "expected either --from, an autoencoder to start from, or --model, to start from random weights"
        )
    if recipe.source is not None:
        network = PartlyTrained.from_pretrained(_weights_of(recipe.source))
    else:
        torch.manual_seed(recipe.seed)
        network = PartlyTrained.from_name(recipe.model)
    network.choose(recipe.train)
    if recipe.source is None and not all(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError(f"model={recipe.model}: frozen parameters would keep random weights; expected --from")
    if recipe.resolution % network.spatial_compression_ratio:
        ratio = network.spatial_compression_ratio
        raise ValueError(
            f"resolution={recipe.resolution}; expected a multiple of {ratio}, the autoencoder's compression ratio"
        )
    return network


def _weights_of(source: str) -> str | Path:
    """The source, or its folder with the result if the source is the output folder of a training."""
    folder = Path(source)
    if not (folder / SETTINGS).is_file():
        return source
    if not (folder / "model" / "config.json").is_file():
        raise TrainingError(f"--from {folder}: this training has not ended and has no model; let it finish first")
    return folder / "model"


def allowed_channels(recipe: AutoencoderRecipe, network: DCAE) -> tuple[int, ...]:
    """The numbers of latent channels that a step may train, rising; none unless the model is adaptive. ValueError."""
    asked, most = sorted(set(recipe.adaptive_latent_channels)), network.config.latent_channels
    if not network.config.adaptive:
        if asked:
            raise ValueError(f"adaptive_latent_channels={asked}; the latents of this model always have {most} channels")
        return ()
    if not asked:
        step = math.ceil(most / 8)
        return tuple(range(most, 0, -step))[::-1]
    if asked[0] < 1 or asked[-1] > most:
        raise ValueError(f"adaptive_latent_channels={asked}; expected numbers from 1 to {most}")
    return tuple(asked)


def draw_channels(allowed: tuple[int, ...], count: int, generator: torch.Generator) -> tuple[int, ...]:
    """The smallest and the largest of the allowed numbers, and `count` others, drawn without replacement; rising."""
    between = allowed[1:-1]
    drawn = torch.randperm(len(between), generator=generator)[:count].tolist()
    return tuple(sorted({*allowed[:1], *allowed[-1:], *(between[number] for number in drawn)}))


def with_gradient(network: PartlyTrained) -> list[nn.Module]:
    """The blocks that keep activations: all from the first module that trains."""
    encoder, decoder, blocks = network.encoder, network.decoder, blocks_of(network)
    ends = encoder.project_out, decoder.project_in
    layers = [encoder.project_in, *encoder_blocks(network), *ends, *decoder_blocks(network), decoder.project_out]
    first = next(number for number, layer in enumerate(layers) if is_trained(layer))
    return [layer for layer in layers[first:] if any(layer is block for block in blocks)]


def batch_norms(module: nn.Module) -> Iterator[nn.BatchNorm2d]:
    return (each for each in module.modules() if isinstance(each, nn.BatchNorm2d))


def parallelize(network: PartlyTrained, recipe: AutoencoderRecipe, run: AutoencoderRun) -> nn.Module:
    """The module to call in training: the network, which is changed in place, or DDP around it.

    One rank compiles the whole network. If the adversarial loss has adaptive weights, it compiles only the trunk: those
    weights need gradients of the last layer, without the other layers. Several ranks compile each block that keeps
    activations on its own.
    """
    ranks, blocks = distributed.world_size(), with_gradient(network)
    if run.patch:
        dcae_fast.patch(network)
    if run.compile and ranks > 1:
        apply_compile(blocks)
    if run.checkpoint_activations:
        for norm in (norm for block in blocks for norm in batch_norms(block)):
            # a norm sees each batch twice; two steps of this momentum are one step of the former
            norm.momentum = 1 - math.sqrt(1 - norm.momentum)
        apply_activation_checkpointing(blocks)
    if run.compile and ranks == 1:
        if recipe.gan.gan_weight and recipe.gan.gan_adaptive:
            network.trunk = torch.compile(network.trunk, dynamic=False)
        else:
            apply_compile([network])
    if not distributed.is_distributed():
        return network
    return apply_ddp(network) if run.parallel == "ddp" else apply_fsdp(network, blocks_of(network))
