"""One training step of a diffusion transformer: forward under autocast, backward, fused AdamW.

The memory holds one contender at a time, so the contenders cannot take turns. Each is timed by itself, and eager a
second time at the end, which shows how much the speed of the machine has drifted.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from dcae_fast.training.diffusion.network import blocks_of
from dcae_fast.training.engine.optimizer import build_optimizer
from dcae_fast.training.engine.parallel import apply_activation_checkpointing
from dcae_fast.training.engine.state import Trained

from . import float8, networks
from .autoencoder import ERROR_IN_8_BIT, FP32_ERROR, reason, release
from .ceilings import Ceilings
from .network_workloads import NetworkWorkload
from .timing import alone, with_peak_memory
from .transformer import CHECKED, record_of, times_of

Exact = tuple[float, list[torch.Tensor]]  # loss and gradients
Build = Callable[[str], nn.Module]  # the contender with this name


def loss_of(model: nn.Module, inputs: networks.Inputs, samples: int | None = None) -> torch.Tensor:
    """Mean square of (the first C channels + x), over the first `samples` of the batch."""
    x = inputs[0][:samples]
    return F.mse_loss(model(*inputs)[:samples, : x.shape[1]].float(), -x)


def benchmark(workload: NetworkWorkload, device: torch.device, ceilings: Ceilings) -> dict:
    """The record of a workload. peak_gib: all allocated memory, weights and optimizer included.

    error: relative error of the gradients of a loss over the first samples, against fp32. A contender is wrong if its
    error is more than twice the error of eager on a batch of these samples, in 8 bit more than ERROR_IN_8_BIT. drift:
    see `drift`.
    """
    torch.compiler.reset()
    inputs = networks.inputs_of(workload, device)
    first = tuple(each[:CHECKED] for each in inputs)
    exact = exact_gradients(lambda: fresh(workload, device), first)
    eager_error, _ = errors(networks.prepared("eager", workload, fresh(workload, device)), first, exact)
    limit = max(2 * eager_error, FP32_ERROR)

    def build(name: str) -> nn.Module:
        return prepared(name, workload, device)

    rows = {
        name: trial(name, build, inputs, exact, ERROR_IN_8_BIT if networks.CONTENDERS[name].in_8_bit else limit)
        for name in float8.present(workload.contenders)
    }
    record = record_of(workload, rows, 3 * networks.flops_of(workload.network, workload.batch), ceilings)
    return record | drift(rows, build, inputs)


def drift(rows: dict[str, dict], build: Build, inputs: networks.Inputs) -> dict[str, float]:
    """The time of eager, measured again, divided by its time in `rows`; empty if it has none."""
    if "ms" not in rows["eager"]:
        return {}
    again = trial("eager", build, inputs, None, math.inf)
    return {"drift": again["ms"] / rows["eager"]["ms"]} if "ms" in again else {}


def fresh(workload: NetworkWorkload, device: torch.device) -> nn.Module:
    """A network to train, the same every time."""
    networks.random_network.cache_clear()  # frees its memory
    return networks.new_network(workload.network, device).train()


def prepared(name: str, workload: NetworkWorkload, device: torch.device) -> nn.Module:
    """A new network made into the contender of that name, with activation checkpointing if the workload has it."""
    model = networks.prepared(name, workload, fresh(workload, device))
    if workload.checkpointed:
        apply_activation_checkpointing(blocks_of(model))
    return model


def exact_gradients(build: Callable[[], nn.Module], inputs: networks.Inputs) -> Exact:
    """The loss and its gradients in fp32. The gradients are moved to the CPU, to free memory for the contenders."""
    model = build()
    loss = loss_of(model, inputs)
    gradients = torch.autograd.grad(loss, trained(model), materialize_grads=True)
    result = loss.item(), [gradient.cpu() for gradient in gradients]
    del model, gradients, loss
    release()
    return result


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def trial(
    name: str, build: Build, inputs: networks.Inputs, exact: Exact | None, limit: float
) -> dict[str, float | str]:
    """The row of a contender, which is built, checked, timed and discarded. Without `exact` it is not checked."""
    row = {}
    try:
        model = build(name)
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
    """Relative errors of the gradients and of the loss.

    The loss is over the first samples, but the network computes the whole batch, as in the step that is timed.
    """
    with networks.autocast(inputs[0].device):
        loss = loss_of(model, inputs, CHECKED)
    loss.backward()
    error = gradient_error(model, exact[1])
    model.zero_grad()
    return error, abs(loss.item() - exact[0]) / exact[0]


def gradient_error(model: nn.Module, exact: list[torch.Tensor]) -> float:
    """Relative error of all gradients of the model together. exact: the gradients of its trained parameters."""
    squares = norms = 0.0
    for parameter, gradient in zip(trained(model), exact, strict=True):
        gradient = gradient.to(parameter.device)
        difference = gradient if parameter.grad is None else parameter.grad - gradient
        squares += difference.double().square().sum()
        norms += gradient.double().square().sum()
    return (squares / norms).sqrt().item()


def stepper(model: nn.Module, inputs: networks.Inputs) -> Callable[[], torch.Tensor]:
    """A training step as a function without arguments, which returns the loss."""
    device, lr = inputs[0].device, 1e-5
    optimizer = build_optimizer(model, lr, betas=(0.9, 0.999), weight_decay=0.01)
    in_training = Trained(model, model, optimizer, torch.amp.GradScaler(device.type, enabled=False))

    def step() -> torch.Tensor:
        with networks.autocast(device):
            loss = loss_of(model, inputs)
        in_training.backward(loss)
        in_training.update(lr)
        return loss.detach()

    return step


def resident_gib(device: torch.device) -> float:
    return torch.cuda.memory_allocated() / 2**30 if device.type == "cuda" else 0.0
