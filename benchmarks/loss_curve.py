"""The training loss of a small UViT, patched and eager, with the same initial weights, data and noise."""

import copy

import torch
from torch import nn

from dcae_fast.sampling import OBJECTIVES

from . import networks
from .ceilings import Ceilings
from .network_workloads import NetworkWorkload

STEPS, WINDOW = 500, 50
CLASSES = 10


def benchmark(workload: NetworkWorkload, device: torch.device, ceilings: Ceilings) -> dict:
    """The record: losses, means over windows of steps; difference, the largest relative difference from eager."""
    reference = networks.random_network(workload.network, device)
    rows = {}
    for name in workload.contenders:
        model = networks.prepared(name, workload, copy.deepcopy(reference)).train()
        rows[name] = {"losses": losses(model, workload.batch, device)}
    expected = rows["eager"]["losses"]
    for row in rows.values():
        row["difference"] = max(abs(a - b) / b for a, b in zip(row["losses"], expected, strict=True))
    return {"workload": workload.name, "window": WINDOW, "contenders": rows}


def losses(model: nn.Module, batch: int, device: torch.device) -> list[float]:
    """The mean losses of each window. Latents are a pattern per class plus noise, so that the model can learn."""
    config, objective = model.config, OBJECTIVES["DPM_Solver"]
    generator = torch.Generator(device).manual_seed(2)
    patterns = torch.randn(
        CLASSES, config.in_channels, config.input_size, config.input_size, generator=generator, device=device
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, fused=True)
    found = []
    for _ in range(STEPS):
        labels = torch.randint(0, CLASSES, (batch,), generator=generator, device=device)
        z, noise = (torch.randn(batch, *patterns.shape[1:], generator=generator, device=device) for _ in range(2))
        z = patterns[labels] + 0.3 * z
        t = objective.draw_time(batch, device, generator)
        with networks.autocast(device):
            loss = objective.loss(model, z, labels, t, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found).view(-1, WINDOW).mean(dim=1).tolist()
