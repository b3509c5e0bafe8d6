"""Everything that a training changes: networks with their optimizers, the moving average, the number of steps."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .ema import MovingAverage
from .optimizer import gradient_norm
from .parallel import gathered


@dataclass
class Trained:
    """A network in training, with an optimizer and a gradient scaler.

    network: the bare network, whose parameter names checkpoints use. called: the module to call in training, the bare
    network or DDP around it. scaler: disabled unless the precision is float16.
    """

    network: nn.Module
    called: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    def gradient(self, loss: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The gradient of a scalar loss, scaled by the scaler, by x."""
        with torch.autograd.set_multithreading_enabled(False):  # Python functions take longer in another thread
            return torch.autograd.grad(self.scaler.scale(loss), x)[0]

    def backward(self, y: torch.Tensor, gradient: torch.Tensor | None = None) -> None:
        """Adds gradients to the gradients of the parameters.

        y: a scalar loss, which the scaler scales; or any tensor, with the gradient of a scaled loss by it.
        """
        with torch.autograd.set_multithreading_enabled(False):
            if gradient is None:
                self.scaler.scale(y).backward()
            else:
                y.backward(gradient.to(y.dtype))

    def update(
        self, lr: float | torch.Tensor, clip_grad: float | None = None, want_norm: bool = False
    ) -> torch.Tensor | None:
        """Takes a step of the optimizer with this learning rate and discards the gradients.

        clip_grad: the largest norm of the gradient. Returns the norm before clipping, on the device, if it is wanted or
        clipped. A step whose scaled gradients overflow changes only the scale.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        norm = gradient_norm(self.network.parameters()) if want_norm or clip_grad else None
        if clip_grad:
            torch.nn.utils.clip_grads_with_norm_(self.network.parameters(), clip_grad, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return norm


@dataclass(frozen=True)
class Export:
    """Which network is the result of a training, and how its weights are stored for programs that load them.

    network: its name in `State.networks`. save(tensors, folder): writes its weights, by parameter name, whole and on
    the CPU; called by the main rank. file: the name of the safetensors file that `save` writes into the folder.
    prefix: what `save` puts before each parameter name.
    """

    network: str
    save: Callable[[dict[str, torch.Tensor], Path], None]
    file: str
    prefix: str


@dataclass
class State:
    """networks: by name. average: of the weights of the exported network, if any. step: how many steps were taken."""

    networks: dict[str, Trained]
    export: Export
    average: MovingAverage | None
    step: int = 0

    @property
    def exported(self) -> nn.Module:
        return self.networks[self.export.network].network


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast to "bfloat16" or "float16"; none for "float32".

    It does not cache the weights that it casts: a forward pass uses each once, and blocks need not keep them.
    """
    return torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32", cache_enabled=False)


@contextlib.contextmanager
def averaged(state: State) -> Iterator[None]:
    """Within the block the exported network has its average for weights, is in evaluation mode, and is not compiled.

    Each rank has all of its weights, and PyTorch records no gradients. Called by all ranks.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if state.average is not None:
            stack.enter_context(state.average.in_place_of_weights(state.exported))
        stack.enter_context(gathered(state.exported))
        state.exported.eval()
        try:
            yield
        finally:
            state.exported.train()
