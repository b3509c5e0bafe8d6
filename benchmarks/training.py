"""One training step of a diffusion transformer: forward under autocast, backward, fused AdamW.

There is memory for one contender at a time, so that they cannot take turns: each is timed alone, and eager a second
time after all others, which shows how far the machine has drifted.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import networks
from .autoencoder import FP32_ERROR, reason, release
from .ceilings import Ceilings
from .network_workloads import NetworkWorkload
from .timing import alone, with_peak_memory
from .transformer import CHECKED, record_of, times_of

Exact = tuple[float, list[torch.Tensor]]  # loss and gradients


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.block, *args, use_reentrant=False)


def checkpoint_blocks(model: nn.Module) -> None:
    for blocks, index in list(networks.blocks_of(model)):
        blocks[index] = Checkpointed(blocks[index])
    if hasattr(model, "mid_block"):
        model.mid_block = Checkpointed(model.mid_block)


def loss_of(model: nn.Module, inputs: networks.Inputs, samples: int | None = None) -> torch.Tensor:
    """Mean square of (the first C channels + x), over the first `samples` of the batch."""
    x = inputs[0][:samples]
    return F.mse_loss(model(*inputs)[:samples, : x.shape[1]].float(), -x)


def benchmark(workload: NetworkWorkload, device: torch.device, ceilings: Ceilings) -> dict:
    """The record of a workload; peak_gib counts everything that is allocated, weights and optimizer included.

    error: relative error against fp32 of the gradients of a loss over the first samples; a contender is wrong if it is
    more than twice eager's on these samples alone. drift: eager's time at the end in proportion to that at the start.
    """
    torch.compiler.reset()
    inputs = networks.inputs_of(workload, device)
    first = tuple(each[:CHECKED] for each in inputs)
    exact = exact_gradients(workload, first)
    eagers, _ = errors(networks.prepared("eager", workload, fresh(workload, device)), first, exact)
    limit = max(2 * eagers, FP32_ERROR)
    rows = {name: trial(name, workload, inputs, exact, limit) for name in workload.contenders}
    record = record_of(workload, rows, 3 * networks.flops_of(workload.network, workload.batch), ceilings)
    if "ms" in rows["eager"]:
        again = trial("eager", workload, inputs, None, math.inf)
        record |= {"drift": again["ms"] / rows["eager"]["ms"]} if "ms" in again else {}
    return record


def fresh(workload: NetworkWorkload, device: torch.device) -> nn.Module:
    """A network to train, the same every time."""
    networks.random_network.cache_clear()  # makes room for it
    return networks.new_network(workload.network, device).train()


def exact_gradients(workload: NetworkWorkload, inputs: networks.Inputs) -> Exact:
    """In fp32; on the CPU, to leave the device to those that are measured."""
    model = fresh(workload, inputs[0].device)
    loss = loss_of(model, inputs)
    gradients = torch.autograd.grad(loss, trained(model), materialize_grads=True)
    result = loss.item(), [gradient.cpu() for gradient in gradients]
    del model, gradients, loss
    release()
    return result


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def trial(
    name: str, workload: NetworkWorkload, inputs: networks.Inputs, exact: Exact | None, limit: float
) -> dict[str, float | str]:
    """The row of a contender, which is built, checked, timed and thrown away; without `exact` it is not checked."""
    row = {}
    try:
        model = networks.prepared(name, workload, fresh(workload, inputs[0].device))
        if workload.checkpointed:
            checkpoint_blocks(model)
        if exact is not None:
            row["error"], row["loss_error"] = errors(model, inputs, exact)
            if not row["error"] <= limit:
                return row | {"failure": "wrong"}
        step = stepper(model, inputs)
        step()
        resident = resident_gib(inputs[0].device)
        timing, peak = with_peak_memory(lambda: alone(step))
        row |= times_of(timing) | {"peak_gib": resident + peak}
    except Exception as failure:
        row = {"failure": reason(failure)}
    finally:
        model = step = None
        release()
    return row


def errors(model: nn.Module, inputs: networks.Inputs, exact: Exact) -> tuple[float, float]:
    """Relative errors of all gradients together, and of the loss. The batch is whole: of a kind with what is timed."""
    with networks.autocast(inputs[0].device):
        loss = loss_of(model, inputs, CHECKED)
    loss.backward()
    squares = norms = 0.0
    for parameter, gradient in zip(trained(model), exact[1], strict=True):
        gradient = gradient.to(parameter.device)
        difference = gradient if parameter.grad is None else parameter.grad - gradient
        squares += difference.double().square().sum()
        norms += gradient.double().square().sum()
    model.zero_grad()
    return (squares / norms).sqrt().item(), abs(loss.item() - exact[0]) / exact[0]


def stepper(model: nn.Module, inputs: networks.Inputs) -> Callable[[], torch.Tensor]:
    optimizer = torch.optim.AdamW(trained(model), lr=1e-5, fused=True)

    def step() -> torch.Tensor:
        with networks.autocast(inputs[0].device):
            loss = loss_of(model, inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def resident_gib(device: torch.device) -> float:
    return torch.cuda.memory_allocated() / 2**30 if device.type == "cuda" else 0.0
