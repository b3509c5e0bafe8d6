"""Small autoencoders and single blocks with random weights, and helpers for the tests of `patch`."""

import copy
import io
import pickle
import threading
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

from dcae_fast.models import blocks, convert
from dcae_fast.models.autoencoder import DCAE, CoderConfig, DCAEConfig, down_sample, stage_block, up_sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU the Triton kernels run in the interpreter
OUTPUT, GRADIENT = 5e-6, 1e-4

SHUFFLED = CoderConfig((8, 8, 32), (0, 1, 1), ("ResBlock",) * 2 + ("EViTGLU",), ("rms",) * 3, ("silu",) * 3)
ADAPTIVE = CoderConfig((8, 8), (0, 1), ("ResBlock",) * 2, ("rms",) * 2, ("silu",) * 2, shortcut=False)
CONFIGS = {
    "strided": DCAEConfig(
        latent_channels=8,
        encoder=CoderConfig((16, 32), (1, 1), ("ResBlock", "EViTS5GLU"), ("rms",) * 2, ("silu",) * 2, "conv"),
        decoder=CoderConfig(
            (16, 32), (1, 1), ("ResBlock", "EViTGLU"), ("batch", "rms"), ("relu", "silu"), "interpolate"
        ),
    ),
    "shuffled": DCAEConfig(8, SHUFFLED, SHUFFLED),
    "adaptive": DCAEConfig(8, ADAPTIVE, ADAPTIVE, adaptive=True),
}
MODELS = ["strided", "shuffled", "adaptive", "diffusers-strided", "diffusers-shuffled"]


@torch.no_grad()
def as_if_trained(model: nn.Module) -> nn.Module:
    """The model in evaluation mode on DEVICE, with changed weights.

    The weights are large enough to matter, and no norm is the identity.
    """
    torch.manual_seed(0)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor + 0.2 * torch.rand_like(tensor) if tensor.dim() == 1 else 1.5 * tensor)
    return model.eval().to(DEVICE)


def narrow(model: nn.Module) -> nn.Module:
    """Reduces gated convolutions to a quarter of their channels. Triton's interpreter spends the most time on them."""
    for block in model.modules():
        if type(block) is blocks.EfficientViTBlock:
            block.local_module.main = blocks.GLUMBConv(32, expand_ratio=1)
        elif type(block).__name__ == "EfficientViTBlock":
            block.conv_out = diffusers_block("GLUMBConv", 32, 32, expand_ratio=1, norm_type="rms_norm")
    return model


def build(name: str, wide: bool = False) -> nn.Module:
    """This project's model of CONFIGS[name]. If the name starts with "diffusers-", the same model in diffusers.

    wide: keeps all channels of the gated convolutions, which takes twice the time.
    """
    library, _, name = name.rpartition("-")
    torch.manual_seed(0)
    fit = narrow if not wide else lambda model: model
    model = as_if_trained(fit(DCAE(CONFIGS[name])))
    if not library:
        return model
    twin = fit(pytest.importorskip("diffusers").AutoencoderDC(**convert.config_to_diffusers(model.config)))
    twin.load_state_dict(convert.state_dict_to_diffusers(model.state_dict()))
    return twin.eval().to(DEVICE)


def attention_block() -> nn.Module:
    """The second scale uses 3×3 kernels instead of 5×5. The interpreter then needs half the time."""
    block = blocks.EfficientViTBlock(32)
    block.context_module.main = blocks.LiteMLA(16, head_dim=16, scales=(3,))
    block.local_module.main = blocks.GLUMBConv(16, expand_ratio=1)
    return block


def diffusers_attention_block() -> nn.Module:
    options = {"attention_head_dim": 16, "qkv_multiscales": (3,), "norm_type": "rms_norm"}
    block = diffusers_block("EfficientViTBlock", 16, **options)
    block.conv_out = diffusers_block("GLUMBConv", 16, 16, expand_ratio=1, norm_type="rms_norm")
    return block


def diffusers_block(name: str, *args, **kwargs) -> nn.Module:
    pytest.importorskip("diffusers")
    from diffusers.models.autoencoders import autoencoder_dc

    return getattr(autoencoder_dc, name)(*args, **kwargs)


DIFFUSERS_CODER = {"latent_channels": 4, "block_out_channels": (8,), "layers_per_block": (1,)}
BLOCKS: dict[str, tuple[int, Callable[[], nn.Module]]] = {  # input channels, function that builds the block
    "ResBlock": (16, lambda: stage_block(CONFIGS["strided"].encoder, 0)),
    "ResBlock-batch": (16, lambda: stage_block(CONFIGS["strided"].decoder, 0)),
    "EfficientViTBlock": (16, attention_block),
    "down-pixel": (8, lambda: down_sample("pixel", 8, 16)),
    "down-conv": (8, lambda: down_sample("conv", 8, 16)),
    "up-pixel": (16, lambda: up_sample("pixel", 16, 8)),
    "up-interpolate": (16, lambda: up_sample("interpolate", 16, 8)),
    "stem": (3, lambda: DCAE(CONFIGS["adaptive"]).encoder.project_in),
    "head": (8, lambda: DCAE(CONFIGS["adaptive"]).decoder.project_out),
    "diffusers-ResBlock": (8, lambda: diffusers_block("ResBlock", 8, 8, "rms_norm", "silu")),
    "diffusers-ResBlock-batch": (8, lambda: diffusers_block("ResBlock", 8, 8, "batch_norm", "relu")),
    "diffusers-EfficientViTBlock": (16, diffusers_attention_block),
    "diffusers-down": (8, lambda: diffusers_block("DCDownBlock2d", 8, 16, downsample=True)),
    "diffusers-up": (16, lambda: diffusers_block("DCUpBlock2d", 16, 8)),
    "diffusers-encoder": (3, lambda: diffusers_block("Encoder", 3, **DIFFUSERS_CODER)),
    "diffusers-decoder": (4, lambda: diffusers_block("Decoder", 3, **DIFFUSERS_CODER)),
}


def build_block(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A block of BLOCKS and an input for it.

    Batch norms get two images. With one channels-last image and a backward hook on the norm, PyTorch computes a wrong
    gradient on a CPU.
    """
    channels, block = BLOCKS[name]
    torch.manual_seed(0)
    return as_if_trained(block()), image(2 if "batch" in name else 1, channels, 2, 4)


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (1, 3, 8, 12), generator=generator, device="cpu").to(DEVICE)


def reconstruct(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y.sample


def step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output of the model, gradients of a loss, and buffers after the step.

    The gradients are for the input and for all parameters that require a gradient.
    """
    x = x.detach().clone().requires_grad_()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    y = reconstruct(model, x)
    loss = (y.float() * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum()
    dx, *gradients = torch.autograd.grad(loss, [x, *parameters.values()])
    return {
        "output": y.detach(),
        "gradient of the input": dx,
        **{f"gradient of {name}": gradient for name, gradient in zip(parameters, gradients, strict=True)},
        **{name: buffer.clone() for name, buffer in model.named_buffers()},
    }


def step_errors(got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Relative errors of a step's output, and of all its gradients as one vector."""

    def vector(tensors: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
        return torch.cat([tensor.double().flatten() for name, tensor in tensors.items() if name.startswith(kind)])

    pairs = [(vector(got, kind), vector(exact, kind)) for kind in ("output", "gradient")]
    of_output, of_gradients = (((value - want).norm() / want.norm()).item() for value, want in pairs)
    return of_output, of_gradients


def assert_as_accurate(errors: tuple[float, float], eager: list[tuple[float, float]]) -> None:
    """Asserts that errors are at most twice the plain model's `step_errors`. eager: these errors for several images.

    The error of the output is compared on the same image, the first in eager. The error of the gradients is compared
    with the largest error on any image. In half precision, the error of the gradients can change tenfold from image to
    image, because rounding changes which values a ReLU sets to zero.
    """
    of_output, of_gradients = errors
    assert of_output <= 2 * eager[0][0]
    assert of_gradients <= 2 * max(of_gradients for _, of_gradients in eager)


def operators_called(function: Callable, *args) -> Counter[str]:
    """How often function(*args) calls each operator of dcae_fast."""
    calls = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "dcae_fast":
                calls[func._schema.name.split("::")[1]] += 1
            return func(*args, **(kwargs or {}))

    with Count():
        function(*args)
    return calls


def in_threads(work: Callable[[int], None], count: int = 4) -> None:
    """Calls work(0), work(1), ... at the same time, each in a thread."""
    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


duplicates = pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), by_torch_save, lambda m: AveragedModel(m).module],
    ids=["deepcopy", "pickle", "torch.save", "moving average"],
)
