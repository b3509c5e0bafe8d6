"""Benchmarks sampling: one guided sampler step, and complete sampling with decoding."""

from functools import partial

import torch
from torch import nn

from dcae_fast.captured_steps import CapturedSteps
from dcae_fast.diffusion import DCAEDiffusion
from dcae_fast.models import diffusion_zoo
from dcae_fast.models.autoencoder import DCAE
from dcae_fast.models.dit import DiT
from dcae_fast.sampling import dpm_solver, gaussian, guided
from dcae_fast.sampling.steps import Step, linear_steps

from . import networks
from .ceilings import Ceilings
from .network_workloads import NetworkWorkload
from .transformer import Run, interleaved, record_of

SCALE = 6.0
DECODE_BATCH = 8


def benchmark(workload: NetworkWorkload, device: torch.device, ceilings: Ceilings) -> dict:
    """The record of a workload. It counts the FLOPs of the network, with twice the pictures because of guidance."""
    torch.compiler.reset()
    if workload.work == "step":
        rows, calls = step_rows(workload, device), 1
    else:
        rows, calls = sample_rows(workload, device), config_of(workload).num_inference_steps
    return record_of(workload, rows, calls * networks.flops_of(workload.network, 2 * workload.batch), ceilings)


def step_rows(workload: NetworkWorkload, device: torch.device) -> dict[str, dict]:
    """Rows for one sampler step: a network call, and the update of DPM-Solver (order 1) or of Gaussian diffusion."""
    reference = networks.random_network(workload.network, device)
    x, _, labels = networks.inputs_of(workload, device)
    noise = (torch.randn_like(x),) if isinstance(reference, DiT) else ()
    step = step_of(reference, x)

    def runner(model: nn.Module, x: torch.Tensor) -> Run:
        guidance = labels, torch.full_like(labels, model.config.num_classes), SCALE, None
        network, run = guided(model, *guidance), CapturedSteps(model, model, *guidance, None)
        return torch.no_grad()(partial(run, network, step, x, *noise))

    def prepare(name: str) -> tuple[Run, Run]:
        model = networks.prepared(name, workload, networks.sharing_weights(reference))
        return runner(model, -x), runner(model, x)

    exact = runner(reference, x)()
    with networks.autocast(device):  # around all steps, as in sampling: autocast caches its casts
        return interleaved(workload, prepare, exact)


def step_of(model: nn.Module, x: torch.Tensor) -> Step:
    if isinstance(model, DiT):
        tables = gaussian.tables(gaussian.TIMES, x.dtype, x.device)
        return Step(gaussian.ancestral, (500.0,), torch.stack(tables, dim=1)[500])
    update = partial(dpm_solver.update, points=dpm_solver.grid(30), i=15, order=1)
    return linear_steps([update], x)[0]


def config_of(workload: NetworkWorkload) -> diffusion_zoo.DiffusionConfig:
    """The configuration of the released model with this network and latent."""
    family, size, latent = workload.network.split("-")
    names = (name for name in diffusion_zoo.DIFFUSION_MODELS if name.startswith(f"dc-ae-{latent}"))
    return diffusion_zoo.diffusion_config(next(name for name in names if f"-{family}-{size}-" in name))


def sample_rows(workload: NetworkWorkload, device: torch.device) -> dict[str, dict]:
    """Rows for labels to pictures: the sampler of the released model, and the decoder in bf16."""
    config = config_of(workload)
    torch.manual_seed(0)
    with torch.device(device):
        autoencoder = DCAE.from_name(config.autoencoder).eval()
        reference = DCAEDiffusion(config, networks.without_zeros(config.build()), autoencoder).eval()
    autoencoder.to(torch.bfloat16, memory_format=torch.channels_last)
    labels = networks.inputs_of(workload, device)[2]

    def runner(model: DCAEDiffusion, seed: int, enabled: bool = True) -> Run:
        @torch.no_grad()
        def run() -> torch.Tensor:
            generator = torch.Generator(device).manual_seed(seed)
            with torch.autocast(device.type, torch.bfloat16, enabled):
                z = model.generate(labels, cfg_scale=SCALE, generator=generator)
            for part in z.split(DECODE_BATCH):
                model.decode(part)
            return z

        return run

    def prepare(name: str) -> tuple[Run, Run]:
        model = networks.prepared(name, workload, networks.sharing_weights(reference))
        return runner(model, 1), runner(model, 0)

    return interleaved(workload, prepare, runner(reference, 0, enabled=False)())
