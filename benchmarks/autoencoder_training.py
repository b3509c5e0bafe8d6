"""One training step of an autoencoder: forward under autocast to bf16, loss, backward, fused AdamW.

The model is the one of `dcae-fast train-autoencoder`: frozen modules are in evaluation mode, and whatever lies before
all trained modules computes without gradients, for all contenders. On a GPU the contenders of a workload run one after
another in another process, where cuDNN's algorithms are timed once for all of them; a failed contender costs only this
process. Each contender has the memory to itself. Eager is timed again at the end. An adversarial step adds LPIPS and
the step of a discriminator.
"""

import math
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

import dcae_fast
from dcae_fast.training.autoencoder.network import PartlyTrained
from dcae_fast.training.engine.parallel import apply_compile
from dcae_fast.training.engine.state import Trained, autocast

from . import contenders
from .autoencoder import FP32_ERROR, reason, release
from .autoencoder_losses import Losses, with_optimizer
from .autoencoder_workloads import RECIPES, TrainingWorkload
from .ceilings import Ceilings
from .timing import alone, seconds, with_peak_memory
from .training import Exact, gradient_error, trained
from .transformer import add_rates, times_of

LR = 1e-5
WARM_UP = 3  # steps; torch.compile captures its CUDA graphs in the second or third
STEPS = 10  # timed steps
if not torch.cuda.is_available():
    WARM_UP, STEPS = 1, 2
Run = Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """How a step is computed. channels_last: memory format of weights and images. mode: of torch.compile.

    captured: the whole step (forward, backward, optimizer) is captured as one CUDA graph.
    """

    patched: bool = False
    channels_last: bool = False
    compiled: bool = False
    mode: str | None = None
    captured: bool = False


CONTENDERS = {
    "eager": Contender(),
    "eager channels-last": Contender(channels_last=True),
    "torch.compile": Contender(compiled=True, channels_last=True),
    "torch.compile, reduce-overhead": Contender(compiled=True, mode="reduce-overhead", channels_last=True),
    "patched channels-last": Contender(patched=True, channels_last=True),
    "patched + torch.compile": Contender(patched=True, compiled=True, channels_last=True),
    "patched + CUDA graphs": Contender(patched=True, captured=True, channels_last=True),
}


def records(workload: TrainingWorkload, device: torch.device, ceilings: Ceilings) -> Iterator[dict]:
    """The record of a workload, after each contender and at the end, so that an interrupted run loses one contender.

    peak_gib: weights, gradients, optimizer, activations and captured graphs. error: relative error of the gradients of
    the trained parameters against fp32. A contender is wrong if its error is more than twice the error of eager.
    loss_error: relative error of the loss. flops: of the unpatched step, without the gradients that the recipe does not
    need. drift: the time of eager at the end divided by its time at the start.
    """
    flops = sum(flops_of(workload).values())
    record = {
        "workload": workload.name, "model": workload.model, "recipe": workload.recipe, "batch": workload.batch,
        "size": workload.size, "adversarial": workload.adversarial, "flops": flops, "floor_ms": ceilings.floor(flops),
    }  # fmt: skip
    rows, limit = {}, math.inf
    with tempfile.TemporaryDirectory() as folder, Isolated() as isolated:
        exact = Path(folder) / "exact.pt"
        torch.save(exact_gradients(workload, images_of(workload, device)), exact)
        release()  # the other process needs the memory
        for name in workload.contenders:
            rows[name] = isolated(trial, name, workload, device, exact, limit)
            if name == "eager":
                limit = max(2 * rows[name].get("error", math.inf), FP32_ERROR)
            add_rates(rows, workload.batch, flops, ceilings)
            yield record | {"contenders": rows}
        if "ms" in rows["eager"]:
            again = isolated(trial, "eager", workload, device, None, math.inf)
            drift = {"drift": again["ms"] / rows["eager"]["ms"]} if "ms" in again else {}
            yield record | {"contenders": rows} | drift


class Isolated:
    """Calls functions that return a row. On a machine with a GPU, they run in another process.

    If the function or the process fails, the row has a "failure", and the next function gets a new process: after an
    illegal access to memory, for example, a process cannot use the GPU any more.
    """

    def __enter__(self) -> "Isolated":
        self._pool = None
        return self

    def __exit__(self, *_) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def __call__(self, function: Callable[..., dict], *args) -> dict[str, float | str]:
        if not torch.cuda.is_available():
            return function(*args)
        self._pool = self._pool or ProcessPoolExecutor(1, get_context("spawn"))
        try:
            row = self._pool.submit(function, *args).result()
        except Exception as failure:
            row = {"failure": reason(failure)}
        if "failure" in row:
            self.__exit__()
        return row


def images_of(workload: TrainingWorkload, device: torch.device) -> torch.Tensor:
    """Random images [B, 3, H, W], fp32."""
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(workload.batch, 3, workload.size, workload.size, generator=generator, device=device)


def fresh(workload: TrainingWorkload, device: torch.device) -> PartlyTrained:
    """An fp32 model to train, with the same random weights every time."""
    contenders.random_model.cache_clear()  # frees its memory
    model = contenders.new_model(workload.model, device, PartlyTrained)
    model.choose(RECIPES[workload.recipe])
    return model


@dataclass
class InTraining:
    """critic: the discriminator with its optimizer, if there is one."""

    model: Trained
    losses: Losses
    critic: Trained | None


def prepared(name: str, workload: TrainingWorkload, device: torch.device) -> InTraining:
    """A new model made into the contender of that name, with its losses and optimizers."""
    contender, model, losses = CONTENDERS[name], fresh(workload, device), Losses(workload.adversarial, device)
    if contender.channels_last:
        model.to(memory_format=torch.channels_last)
    if contender.patched:
        dcae_fast.patch(model)
        losses.patch()
    if contender.compiled:
        apply_compile([model], contender.mode)
        losses.compile(contender.mode)
    critic = with_optimizer(losses.critic, LR, contender.captured) if losses.critic else None
    return InTraining(with_optimizer(model, LR, contender.captured), losses, critic)


def exact_gradients(workload: TrainingWorkload, images: torch.Tensor) -> Exact:
    """The loss and its gradients in fp32 without TF32. The gradients are moved to the CPU, to free memory."""
    model, losses = fresh(workload, images.device), Losses(workload.adversarial, images.device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        loss = losses(model(images), images)
        gradients = torch.autograd.grad(loss, trained(model), materialize_grads=True)
    result = loss.item(), [gradient.cpu() for gradient in gradients]
    del model, losses, gradients, loss
    release()
    return result


def trial(
    name: str, workload: TrainingWorkload, device: torch.device, exact: Path | None, limit: float
) -> dict[str, float | str]:
    """The row of a contender, which is built, checked, timed and discarded.

    exact: file with the exact loss and gradients; None: the contender is not checked.
    """
    release()
    before = reserved_gib()
    row, images = {}, images_of(workload, device)
    try:
        in_training = prepared(name, workload, device)
        if exact is not None:
            row |= checked(name, in_training, images, torch.load(exact))
            if not row["error"] <= limit:
                return row | {"failure": "wrong"}
        row |= timed(stepper(name, in_training, images), before)
    except Exception as failure:
        row = {"failure": reason(failure)}
    finally:
        in_training = None
        torch.compiler.reset()  # frees compiled code and its CUDA graphs
        release()
    return row


def checked(name: str, in_training: InTraining, images: torch.Tensor, exact: Exact) -> dict[str, float]:
    """Errors of the gradients and the loss. first_s: seconds of the first pass, with compilation and choice of kernels.

    A captured contender is captured for the check too, without the optimizer.
    """
    run = passes(in_training, laid_out(name, images))
    first_s = seconds(run)
    run = captured(run) if CONTENDERS[name].captured else run
    loss = run()[0].item()
    error = gradient_error(in_training.model.network, exact[1])
    in_training.model.optimizer.zero_grad()
    return {"first_s": first_s, "error": error, "loss_error": abs(loss - exact[0]) / exact[0]}


def timed(step: Run, before: float) -> dict[str, float]:
    """Times and peak memory of a step. The memory that captured graphs keep counts, although a replay allocates none.

    Such memory stays reserved when all unused memory is returned to the device. before: GiB that were reserved before.
    """
    for _ in range(WARM_UP):
        step()
    release()
    kept = reserved_gib() - before
    resident = torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    _, peak = with_peak_memory(step)
    return times_of(alone(step, STEPS)) | {"peak_gib": max(kept, resident + peak)}


def reserved_gib() -> float:
    return torch.cuda.memory_reserved() / 2**30 if torch.cuda.is_available() else 0.0


def passes(in_training: InTraining, images: torch.Tensor) -> Run:
    """A function that sets the model's gradients to the gradients of the loss; it returns loss and reconstructions."""
    model, losses = in_training.model, in_training.losses

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        model.optimizer.zero_grad()
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            with autocast(images.device, "bfloat16"):
                y = model.called(images)
                loss = losses(y, images)
            model.backward(loss)
        return loss.detach(), y.detach().float()  # a copy, since compiled modules with CUDA graphs overwrite y

    return run


def laid_out(name: str, images: torch.Tensor) -> torch.Tensor:
    """The images in the memory format of the contender with that name."""
    layout = torch.channels_last if CONTENDERS[name].channels_last else torch.contiguous_format
    return images.to(memory_format=layout)


def stepper(name: str, in_training: InTraining, images: torch.Tensor) -> Run:
    """A training step of the contender with that name, as a function without arguments, which returns the loss."""
    images, critic = laid_out(name, images), in_training.critic
    gradients = passes(in_training, images)

    def step() -> torch.Tensor:
        loss, y = gradients()
        in_training.model.update(LR)
        if critic is not None:
            with torch.backends.cudnn.flags(enabled=True, benchmark=True):
                with autocast(images.device, "bfloat16"):
                    of_critic = in_training.losses.of_critic(y, images)
                critic.backward(of_critic)
            critic.update(LR)
        return loss

    return captured(step) if CONTENDERS[name].captured else step


def captured(run: Run) -> Run:
    """The function as a replay of a CUDA graph; unchanged on a CPU."""
    if not torch.cuda.is_available():
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    release()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


def flops_of(workload: TrainingWorkload) -> dict[str, int]:
    """FLOPs of the unpatched forward and backward pass by operator, counted on fake tensors.

    The gradients of frozen weights, and of everything before the first trained module, are not computed.
    """
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: convolution_backward_flops}
    )
    with FakeTensorMode(), counter:
        model, losses = PartlyTrained.from_name(workload.model), Losses(workload.adversarial, torch.device("cpu"))
        model.choose(RECIPES[workload.recipe])
        images = torch.empty(workload.batch, 3, workload.size, workload.size)
        y = model(images)
        losses(y, images).backward()
        if losses.critic is not None:
            losses.of_critic(y, images).backward()
    return {op.__name__: flops for op, flops in counter.get_flop_counts()["Global"].items()}


def convolution_backward_flops(gradient, x, weight, *options, out_shape) -> int:
    """The FLOPs of the forward pass for each of the two gradients that is computed.

    PyTorch's own formula counts the gradient of the weights of a grouped convolution as if it were not grouped.
    """
    transposed, output_mask = options[4], options[7]
    return sum(output_mask[:2]) * conv_flop_count(x, weight, gradient, transposed)
