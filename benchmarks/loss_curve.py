"""The training loss of a small UViT on latents of photographs: eager, patched, in 8 bit, and eager with another seed.

All contenders but "eager, other seed" have the same initial weights, latents and noise. The other seed shows how much
the loss depends on chance. A loss in 8 bit includes the error of the forward pass that computes it. So the trained
weights are also evaluated in bf16.
"""

import torch
from torch import nn

import dcae_fast
from dcae_fast.models.autoencoder import DCAE
from dcae_fast.sampling import OBJECTIVES

from . import networks
from .autoencoder import release
from .autoencoder_loss_curve import Crops
from .autoencoder_workloads import LossWorkload
from .ceilings import Ceilings
from .network_workloads import NetworkWorkload

STEPS, WINDOW = 1000, 50
AUTOENCODER, SIZE = "dc-ae-tiny", 256  # pixels
ENCODED = 64  # crops at a time
BATCHES = 64  # of latents; on a CPU one
EVALUATED = 20  # batches on which trained weights are compared


def benchmark(workload: NetworkWorkload, device: torch.device, ceilings: Ceilings) -> dict:
    """The record: losses, means over windows of steps; difference, the largest relative difference from eager; end, the
    relative difference of the mean over the last fifth of the steps; evaluated, the relative difference of the loss of
    the trained weights in bf16, over the same draws for all.
    """
    z, rows = latents(workload.batch, device), {}
    for name in workload.contenders:
        seed = networks.CONTENDERS[name].seed
        model = networks.prepared(name, workload, networks.new_network(workload.network, device, seed)).train()
        rows[name] = {"losses": losses(model, z, workload.batch, seed)}
        dcae_fast.unpatch(model)
        rows[name]["evaluated"] = evaluation(model, z, workload.batch)
        del model
        release()
    expected, evaluated = rows["eager"]["losses"], rows["eager"]["evaluated"]
    last = max(1, len(expected) // 5)
    for row in rows.values():
        row["difference"] = max(abs(a - b) / b for a, b in zip(row["losses"], expected, strict=True))
        row["end"] = sum(row["losses"][-last:]) / sum(expected[-last:]) - 1
        row["evaluated"] = row["evaluated"] / evaluated - 1
    return {"workload": workload.name, "window": WINDOW, "contenders": rows}


@torch.no_grad()
def latents(batch: int, device: torch.device) -> torch.Tensor:
    """Scaled latents of random crops of photographs, [N, 64, 8, 8], by the bundled autoencoder in fp32."""
    autoencoder = DCAE.from_pretrained(AUTOENCODER).to(device).eval()
    count = batch * (BATCHES if device.type == "cuda" else 1)
    at_once = min(ENCODED, count)
    crops = Crops(LossWorkload(AUTOENCODER, 1, at_once, SIZE), 0, device)
    z = torch.cat([autoencoder.encode(crops.draw()) for _ in range(0, count, at_once)])[:count]
    return z * autoencoder.config.scaling_factor


def losses(model: nn.Module, latents: torch.Tensor, batch: int, seed: int) -> list[float]:
    """The mean losses of each window."""
    generator = torch.Generator(latents.device).manual_seed(seed + 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, fused=True)
    found = []
    for _ in range(STEPS):
        loss = loss_of_batch(model, latents, batch, generator)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found).view(-1, WINDOW).mean(dim=1).tolist()


@torch.no_grad()
def evaluation(model: nn.Module, latents: torch.Tensor, batch: int) -> float:
    """The mean loss over some batches, the same for all models."""
    generator = torch.Generator(latents.device).manual_seed(1)
    return sum(loss_of_batch(model, latents, batch, generator).item() for _ in range(EVALUATED)) / EVALUATED


def loss_of_batch(model: nn.Module, latents: torch.Tensor, batch: int, generator: torch.Generator) -> torch.Tensor:
    """The loss of a random batch, under autocast to bf16."""
    device, objective = latents.device, OBJECTIVES["DPM_Solver"]
    z = latents[torch.randint(0, len(latents), (batch,), generator=generator, device=device)]
    noise = torch.randn(z.shape, generator=generator, device=device)
    t, labels = objective.draw_time(batch, device, generator), torch.zeros(batch, dtype=torch.int64, device=device)
    with networks.autocast(device):
        return objective.loss(model, z, labels, t, noise)
