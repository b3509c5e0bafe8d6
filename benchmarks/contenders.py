"""The contenders: a random model, unchanged, channels-last, compiled, patched, or converted to diffusers' class."""

import copy
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import dcae_fast
from dcae_fast.fast import int8
from dcae_fast.fast.calibration import observe
from dcae_fast.models import convert
from dcae_fast.models.autoencoder import DCAE

from .workloads import Workload


def leave(half: nn.Module, workload: Workload) -> None:
    pass


def compiled(half: nn.Module, workload: Workload) -> None:
    half.compile(dynamic=False)


def compiled_with_graphs(half: nn.Module, workload: Workload) -> None:
    half.compile(dynamic=False, mode="reduce-overhead")


def patched(half: nn.Module, workload: Workload) -> None:
    dcae_fast.patch(half)


def patched_without_graphs(half: nn.Module, workload: Workload) -> None:
    dcae_fast.patch(half, cuda_graphs=False)


def patched_with_graphs(half: nn.Module, workload: Workload) -> None:
    dcae_fast.patch(half, cuda_graphs=True)


def patched_and_compiled(half: nn.Module, workload: Workload) -> None:
    patched(half, workload)
    compiled(half, workload)


def patched_and_compiled_with_graphs(half: nn.Module, workload: Workload) -> None:
    patched(half, workload)
    compiled_with_graphs(half, workload)


def patched_and_bounded(half: nn.Module, workload: Workload) -> None:
    dcae_fast.patch(half, max_memory=workload.max_memory)


def patched_in_8_bit(model: DCAE, workload: Workload, cuda_graphs: bool | str = "auto") -> None:
    """All layers that can, with scales from the input that is timed: for speed. `patch` calibrates within an error
    budget, which random weights do not keep.
    """
    dcae_fast.patch(model, frozen=True, cuda_graphs=cuda_graphs)
    half, weight = half_of(model, workload), next(model.parameters())
    layers = dict(int8.candidates(half))
    x = example(workload, model, weight.device).to(weight.dtype, memory_format=torch.channels_last)
    with torch.no_grad():
        scales, _ = observe(half, layers, lambda: half(x))
    for name, layer in layers.items():
        int8.mark(layer, scales[name])


def patched_in_8_bit_with_graphs(model: DCAE, workload: Workload) -> None:
    patched_in_8_bit(model, workload, cuda_graphs=True)


@dataclass(frozen=True)
class Contender:
    """How to prepare and call the encoder or decoder.

    prepare: changes a copy of the encoder or decoder, or of the whole model if in_8_bit. channels_last: memory format
    of weights and input. diffusers: use diffusers' AutoencoderDC with the same weights. times_cudnn: set
    torch.backends.cudnn.benchmark, so that PyTorch times cuDNN's algorithms in the first call with a shape; a patched
    model times them without this flag.
    """

    prepare: Callable[[nn.Module, Workload], None]
    channels_last: bool = False
    diffusers: bool = False
    times_cudnn: bool = False
    in_8_bit: bool = False


CONTENDERS = {
    "eager": Contender(leave, times_cudnn=True),
    "eager channels-last": Contender(leave, channels_last=True, times_cudnn=True),
    "torch.compile": Contender(compiled, channels_last=True, times_cudnn=True),
    "torch.compile, reduce-overhead": Contender(compiled_with_graphs, channels_last=True, times_cudnn=True),
    "patched": Contender(patched),
    "patched channels-last": Contender(patched, channels_last=True),
    "patched, without graphs": Contender(patched_without_graphs, channels_last=True),
    "patched + CUDA graphs": Contender(patched_with_graphs, channels_last=True),
    "patched + torch.compile": Contender(patched_and_compiled, channels_last=True),
    "patched + torch.compile, reduce-overhead": Contender(patched_and_compiled_with_graphs, channels_last=True),
    "patched, 8 bit": Contender(patched_in_8_bit, channels_last=True, in_8_bit=True),
    "patched, 8 bit + CUDA graphs": Contender(patched_in_8_bit_with_graphs, channels_last=True, in_8_bit=True),
    "patched, bounded memory": Contender(patched_and_bounded),
    "diffusers patched": Contender(patched, diffusers=True),
}


def is_available(name: str) -> bool:
    return not CONTENDERS[name].diffusers or importlib.util.find_spec("diffusers") is not None


def new_model(name: str, device: torch.device, cls: type[DCAE] = DCAE) -> DCAE:
    """An fp32 model on the device, with the same random weights and random batch norm statistics every time."""
    torch.manual_seed(0)
    with torch.device(device):
        model = cls.from_name(name)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
            elif buffer_name.endswith("running_mean"):
                buffer.normal_(std=0.1)
    return model


@functools.lru_cache(maxsize=1)
def random_model(name: str, device: torch.device) -> DCAE:
    """The model of which the contenders are copies."""
    return new_model(name, device).eval().requires_grad_(False)


def diffusers_twin(model: DCAE) -> nn.Module:
    """The model converted to diffusers' AutoencoderDC."""
    from diffusers import AutoencoderDC

    with torch.device(next(model.parameters()).device):
        twin = AutoencoderDC(**convert.config_to_diffusers(model.config))
    twin.load_state_dict(convert.state_dict_to_diffusers(model.state_dict()))
    return twin.eval().requires_grad_(False)


def half_of(model: nn.Module, workload: Workload) -> nn.Module:
    return model.encoder if workload.direction == "encode" else model.decoder


def input_shape(workload: Workload, model: DCAE) -> tuple[int, int, int, int]:
    if workload.direction == "encode":
        return workload.batch, 3, workload.size, workload.size
    side = workload.size // model.spatial_compression_ratio
    return workload.batch, model.config.latent_channels, side, side


def example(workload: Workload, model: DCAE, device: torch.device) -> torch.Tensor:
    """A random fp32 input: images, or latents of the size that such images have."""
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(input_shape(workload, model), generator=generator, device=device)


def prepared(name: str, workload: Workload, device: torch.device) -> tuple[nn.Module, torch.Tensor]:
    """The contender with this name, as a prepared copy of the encoder or decoder, and its input."""
    contender = CONTENDERS[name]
    layout = torch.channels_last if contender.channels_last else torch.contiguous_format
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    reference = random_model(workload.model, device)
    model = diffusers_twin(reference) if contender.diffusers else reference
    changed = copy.deepcopy(model if contender.in_8_bit else half_of(model, workload)).to(dtype, memory_format=layout)
    contender.prepare(changed, workload)
    half = half_of(changed, workload) if contender.in_8_bit else changed
    return half, example(workload, reference, device).to(dtype, memory_format=layout)


def caller(name: str, half: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A function without arguments that calls half(x) in inference mode, with the contender's cuDNN flag."""
    times_cudnn = CONTENDERS[name].times_cudnn

    @torch.inference_mode()
    def run() -> torch.Tensor:
        with torch.backends.cudnn.flags(enabled=True, benchmark=times_cudnn):
            return half(x)

    return run
