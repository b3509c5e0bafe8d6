"""The diffusion transformers that are measured, and the contenders: ways to compute one network with random weights.

Every contender computes under autocast to bf16 with fp32 weights, as the original does. The contenders of a workload
share their weights if the workload does not change them.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor import config as inductor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dcae_fast
from dcae_fast.models import diffusion_zoo
from dcae_fast.models.dit import DiT, DiTConfig
from dcae_fast.models.transformer import Attention, TransformerConfig
from dcae_fast.models.uvit import UViT
from dcae_fast.training.diffusion.network import blocks_of
from dcae_fast.training.engine.parallel import apply_compile

from . import contenders, float8
from .network_workloads import TRAINED_IN_8_BIT, NetworkWorkload

LATENTS = {  # for pictures of 512 pixels: Stable Diffusion's autoencoder with tokens of 2 × 2, and two DC-AEs
    "f8p2": {"in_channels": 4, "input_size": 64, "patch_size": 2},
    "f32": {"in_channels": 32, "input_size": 16},
    "f64": {"in_channels": 128, "input_size": 8},
    "f32c64": {"in_channels": 64, "input_size": 8},  # dc-ae-tiny, pictures of 256 pixels
}
SIZES = diffusion_zoo.SIZES | {"tiny": {"depth": 2, "hidden_size": 32, "num_heads": 2}}  # tiny: for the rehearsal
TIMES = 1000

IN_8_BIT = {"qkv", "proj", "fc1", "fc2", "skip_linear"}  # linear layers, by the last part of their names

# Contenders share the code of a block, and each compiles it for several types. Beyond the limit it runs uncompiled.
torch._dynamo.config.recompile_limit = 64
INDUCTOR = inductor.save_config()

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # x, t, y


class OriginalAttention(Attention):
    """Attention as the original computes it: q, k and v are cast to fp32, and under autocast back to bf16.

    Only the benchmarks use it, in the contenders "eager" and "torch.compile".
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).float().unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


def as_original(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is Attention:
            module.__class__ = OriginalAttention


def compiled(model: UViT | DiT, workload: NetworkWorkload, mode: str | None = None) -> None:
    """Compiles block by block. Blocks of the same kind share compiled code, so this takes seconds, not minutes."""
    apply_compile(blocks_of(model), mode)


def autotuned(model: UViT | DiT, workload: NetworkWorkload) -> None:
    compiled(model, workload, "max-autotune-no-cudagraphs")


def patched_and_compiled(model: UViT | DiT, workload: NetworkWorkload) -> None:
    contenders.patched(model, workload)
    compiled(model, workload)


def patched_in_8_bit(
    model: UViT | DiT, workload: NetworkWorkload, precision: str = "fp8", cuda_graphs: bool | str = "auto"
) -> None:
    """In inference, with 8-bit weights that are rounded once, as torchao's are."""
    frozen = workload.work not in ("training", "loss")
    dcae_fast.patch(model, precision=precision, frozen=frozen, cuda_graphs=cuda_graphs)


def torchao(model: UViT | DiT, workload: NetworkWorkload, granularity: str) -> None:
    """torchao's dynamic float8 for the same layers that `patch(precision="fp8")` computes in 8 bit, then compiled.

    torchao scales rows of bf16 only, so these layers get bf16 weights of their own. It sets options of Inductor.
    """
    from torchao import quantization

    named = [item for block in blocks_of(model) for item in block.named_modules()]
    layers = [layer for name, layer in named if name.rpartition(".")[2] in IN_8_BIT]
    for layer in layers:
        for name, parameter in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(parameter.detach().to(torch.bfloat16), requires_grad=False))
    scheme = quantization.Float8DynamicActivationFloat8WeightConfig(granularity=getattr(quantization, granularity)())
    quantization.quantize_(model, scheme, filter_fn=lambda module, name: any(module is layer for layer in layers))
    compiled(model, workload)


@dataclass(frozen=True)
class Contender:
    """prepare: changes a copy of the network in place. original: attention computes as in the original. in_8_bit: the
    error may be as large as that of 8 bit. seed: of the initial weights and of the draws in a loss curve.

    A contender named "plain" is this project's network, whose attention computes in the dtype of the autocast.
    """

    prepare: Callable[[nn.Module, NetworkWorkload], None]
    original: bool = False
    in_8_bit: bool = False
    seed: int = 0


def patched_in(precision: str, cuda_graphs: bool | str = "auto") -> Contender:
    prepare = functools.partial(patched_in_8_bit, precision=precision, cuda_graphs=cuda_graphs)
    return Contender(prepare, in_8_bit=True)


CONTENDERS = {
    "eager": Contender(contenders.leave, original=True),
    "torch.compile": Contender(compiled, original=True),
    "plain + torch.compile": Contender(compiled),
    "plain + torch.compile, max-autotune": Contender(autotuned),
    "patched": Contender(contenders.patched),
    "patched + torch.compile": Contender(patched_and_compiled),
    "patched, without graphs": Contender(contenders.patched_without_graphs),
    "patched + CUDA graphs": Contender(contenders.patched_with_graphs),
    "patched, fp8": patched_in("fp8"),
    "patched, fp8 + CUDA graphs": patched_in("fp8", cuda_graphs=True),
    "patched, int8": patched_in("int8"),
    "patched, int8 + CUDA graphs": patched_in("int8", cuda_graphs=True),
    "torchao fp8, by row": Contender(functools.partial(torchao, granularity="PerRow"), in_8_bit=True),
    "torchao fp8, by tensor": Contender(functools.partial(torchao, granularity="PerTensor"), in_8_bit=True),
    "patched, fp8-all": Contender(float8.patched_everything, in_8_bit=True),
    **{name: Contender(float8.torchao(name), in_8_bit=True) for name in TRAINED_IN_8_BIT if "torchao" in name},
    "eager, other seed": Contender(contenders.leave, original=True, seed=1),
}


def config_of(name: str) -> TransformerConfig:
    """The configuration of a network FAMILY-SIZE-LATENT, like uvit-h-f64. Training drops no labels at random."""
    family, size, latent = name.split("-")
    return diffusion_zoo.NETWORKS[family](**LATENTS[latent], **SIZES[size], class_dropout_prob=0.0)


def class_of(config: TransformerConfig) -> type[UViT] | type[DiT]:
    return DiT if isinstance(config, DiTConfig) else UViT


def new_network(name: str, device: torch.device, seed: int = 0) -> UViT | DiT:
    """A network with the same random weights every time, fp32, in evaluation mode. No parameter is all zeros."""
    torch.manual_seed(seed)
    with torch.device(device):
        config = config_of(name)
        model = class_of(config)(config)
    return without_zeros(model).eval()


@functools.lru_cache(maxsize=1)
def random_network(name: str, device: torch.device) -> UViT | DiT:
    """The network whose weights the contenders share."""
    return new_network(name, device)


@torch.no_grad()
def without_zeros(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
    return model


def sharing_weights(model: nn.Module) -> nn.Module:
    """A copy of a module. The parameters are not copied but shared."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def prepared(name: str, workload: NetworkWorkload, model: nn.Module) -> nn.Module:
    """Makes `model` the contender of that name, in place; returns it."""
    contender = CONTENDERS[name]
    inductor.load_config(INDUCTOR)  # which torchao changes for the contenders that follow
    if contender.original:
        as_original(model)
    contender.prepare(model, workload)
    return model


def inputs_of(workload: NetworkWorkload, device: torch.device) -> Inputs:
    """Random latents, times and labels."""
    config, batch = config_of(workload.network), workload.batch
    generator = torch.Generator(device).manual_seed(1)
    shape = batch, config.in_channels, config.input_size, config.input_size
    x = torch.randn(shape, generator=generator, device=device)
    t = TIMES * torch.rand(batch, generator=generator, device=device)
    return x, t, torch.randint(0, config.num_classes, (batch,), generator=generator, device=device)


@contextlib.contextmanager
def autocast(device: torch.device) -> Iterator[None]:
    """Autocast to bf16. PyTorch times cuDNN's algorithms for the only convolution, the patch embedding."""
    with torch.autocast(device.type, torch.bfloat16), torch.backends.cudnn.flags(enabled=True, benchmark=True):
        yield


def flops_of(network: str, batch: int) -> int:
    """FLOPs of the forward pass of the network, neither patched nor compiled."""
    return sum(flops_by_operator(network, batch).values())


def flops_by_operator(network: str, batch: int) -> dict[str, int]:
    """FLOPs by operator ("convolution", "addmm", and "bmm" for attention), counted without computing anything."""
    config = config_of(network)
    uninitialised = type("Uninitialised", (class_of(config),), {"_initialise": lambda self: None})
    counter = FlopCounterMode(display=False)
    with FakeTensorMode(), counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # whose products the counter knows
        model = uninitialised(config).eval()
        x = torch.empty(1, config.in_channels, config.input_size, config.input_size)
        model(x, torch.empty(1), torch.zeros(1, dtype=torch.long))
    return {op.__name__: batch * flops for op, flops in counter.get_flop_counts()["Global"].items()}
