"""Encoding and decoding: eager, channels-last, torch.compile and patched, of this project's class and of diffusers'."""

import copy
from collections.abc import Callable, Iterator

import torch
from torch.utils.flop_counter import FlopCounterMode

import dcae_fast
from dcae_fast.models import convert
from dcae_fast.models.autoencoder import DCAE

from .ceilings import Ceilings
from .timing import measure

CHANNELS_LAST = ("eager channels-last", "torch.compile", "patched channels-last")  # weights and input
WRONG = 2e-2  # relative L2 error against fp32 above which a contender is reported as wrong and not timed


def random_model(name: str, device: torch.device) -> DCAE:
    """A model with random weights and batch norm statistics, fp32, on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = DCAE.from_name(name)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
            elif buffer_name.endswith("running_mean"):
                buffer.normal_(std=0.1)
    return model.eval().requires_grad_(False)


def diffusers_twin(model: DCAE) -> torch.nn.Module:
    """The same model as diffusers' AutoencoderDC."""
    from diffusers import AutoencoderDC

    twin = AutoencoderDC(**convert.config_to_diffusers(model.config)).to(next(model.parameters()).device)
    twin.load_state_dict(convert.state_dict_to_diffusers(model.state_dict()))
    return twin.eval().requires_grad_(False)


def contenders(reference: DCAE, dtype: torch.dtype, with_diffusers: bool, compiled: bool) -> dict[str, torch.nn.Module]:
    plain = copy.deepcopy(reference).to(dtype)
    models = {"eager": plain, "eager channels-last": copy.deepcopy(plain).to(memory_format=torch.channels_last)}
    if compiled:
        model = copy.deepcopy(models["eager channels-last"])
        model.encoder.compile(dynamic=False)
        model.decoder.compile(dynamic=False)
        models["torch.compile"] = model
    models["patched"] = copy.deepcopy(plain)
    models["patched channels-last"] = copy.deepcopy(models["eager channels-last"])
    dcae_fast.patch(models["patched"])
    dcae_fast.patch(models["patched channels-last"])
    if with_diffusers:
        models["diffusers patched"] = diffusers_twin(reference).to(dtype)
        dcae_fast.patch(models["diffusers patched"])
    return models


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def workloads(
    batch: int, size: int, reference: DCAE, device: torch.device
) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """(direction, input, exact result): the exact one in fp32 without TF32, image by image."""
    ratio = reference.spatial_compression_ratio
    x = torch.randn(batch, 3, size, size, device=device)
    z = torch.randn(batch, reference.config.latent_channels, size // ratio, size // ratio, device=device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.inference_mode():
        latents = torch.cat([reference.encoder(image[None]) for image in x])
        images = torch.cat([reference.decoder(latent[None]) for latent in z])
    return [("encode", x, latents), ("decode", z, images)]


def caller(model: torch.nn.Module, direction: str, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    half = model.encoder if direction == "encode" else model.decoder

    @torch.inference_mode()
    def run() -> torch.Tensor:
        return half(x)

    return run


def benchmark(
    name: str,
    batches: list[int],
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    ceilings: Ceilings,
    with_diffusers: bool = True,
    compiled: bool = True,
) -> Iterator[dict]:
    """One row for each workload and contender."""
    reference = random_model(name, device)
    models = contenders(reference, dtype, with_diffusers, compiled)
    for batch in batches:
        for direction, x, exact in workloads(batch, size, reference, device):
            runs, errors = {}, {}
            for contender, model in models.items():
                layout = torch.channels_last if contender in CHANNELS_LAST else torch.contiguous_format
                run = caller(model, direction, x.to(dtype, memory_format=layout))
                errors[contender] = relative_error(run(), exact)
                if errors[contender] < WRONG:
                    runs[contender] = run
            with FlopCounterMode(display=False) as counter:
                caller(models["eager"], direction, x.to(dtype))()
            floor = ceilings.floor(counter.get_total_flops(), 0)
            timings = measure(runs)
            for contender, error in errors.items():
                row = {
                    "workload": f"{name} {direction}", "batch": batch, "size": size, "dtype": str(dtype).split(".")[1],
                    "contender": contender, "error": error, "floor_ms": floor,
                }  # fmt: skip
                if contender in timings:
                    timing = timings[contender]
                    row |= {
                        "ms": timing.median, "ms_low": timing.low, "ms_high": timing.high,
                        "peak_gib": timing.peak_memory, "tflops": counter.get_total_flops() / timing.median / 1e9,
                    }  # fmt: skip
                yield row
