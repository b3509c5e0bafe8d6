"""Benchmarks diffusers' SANA: the transformer's forward, a training step, and a whole pipeline, with random weights.

Forward and pipeline compute with weights in bf16; "forward" has guidance, so that a picture counts twice in the batch.
The training step has fp32 weights, autocast to bf16, and fused AdamW. Contenders are checked against fp32.
"""

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dcae_fast
from dcae_fast.training.engine.parallel import apply_compile

from . import contenders, networks, training
from .autoencoder import FP32_ERROR
from .ceilings import Ceilings
from .sana_workloads import BY_BLOCK, FP8, FROZEN, GRAPHS, INT8, REDUCED, SanaWorkload
from .transformer import add_rates, interleaved

TOKENS, STEPS = 300, 20  # of a text; of a pipeline's sampler
TINY = {"num_layers": 1, "num_attention_heads": 2, "num_cross_attention_heads": 2, "caption_channels": 16}
TINY |= {"cross_attention_head_dim": 32, "cross_attention_dim": 64, "mlp_ratio": 1}
TINY |= {"in_channels": 64, "out_channels": 64}
SIZES = {  # of the transformer; the first is that of SANA 1.0 with 1.6 billion weights, diffusers' default
    "1600m": {},
    "tiny": TINY,
}
AUTOENCODERS = {"1600m": "dc-ae-f32c32-sana-1.1", "tiny": "dc-ae-tiny"}

Run = Callable[[], torch.Tensor]


def compiled(model: nn.Module) -> None:
    """Block by block."""
    apply_compile(model.transformer.transformer_blocks)
    if "vae" in model._modules:
        model.vae.decoder.compile(dynamic=False)


def compiled_with_graphs(model: nn.Module) -> None:
    model.transformer.compile(dynamic=False, mode="reduce-overhead")


def patched_and_compiled(model: nn.Module) -> None:
    dcae_fast.patch(model)
    compiled(model)


PREPARE: dict[str, Callable[[nn.Module], object]] = {
    "eager": lambda model: None,
    BY_BLOCK: compiled,
    REDUCED: compiled_with_graphs,
    "patched": dcae_fast.patch,
    "patched + torch.compile": patched_and_compiled,
    GRAPHS: lambda model: dcae_fast.patch(model, cuda_graphs=True),
    FROZEN: lambda model: dcae_fast.patch(model, cuda_graphs=True, frozen=True),
    FP8: lambda model: dcae_fast.patch(model, precision="fp8", frozen=True),
    INT8: lambda model: dcae_fast.patch(model, precision="int8"),
}


class Transformer(nn.Module):
    """The transformer as a function of tensors only: latent, text, mask of the text, time → prediction."""

    def __init__(self, network: str):
        super().__init__()
        from diffusers import SanaTransformer2DModel

        self.transformer = SanaTransformer2DModel(**SIZES[network])

    def forward(self, x, text, mask, time):
        return self.transformer(x, text, time, encoder_attention_mask=mask, return_dict=False)[0]


class Pipeline(nn.Module):
    """A pipeline as a function of tensors only: noise, text, mask of the text → picture."""

    def __init__(self, network: str, device: torch.device):
        super().__init__()
        self.transformer = Transformer(network).transformer
        self.vae = contenders.diffusers_twin(contenders.random_model(AUTOENCODERS[network], device))
        self.pipeline = None

    def forward(self, x, text, mask):
        if self.pipeline is None:
            from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline

            self.pipeline = SanaPipeline(None, None, self.vae, self.transformer, FlowMatchEulerDiscreteScheduler())
            self.pipeline.set_progress_bar_config(disable=True)
        height, width = (side * self.pipeline.vae_scale_factor for side in x.shape[2:])
        return self.pipeline(
            latents=x, height=height, width=width, prompt_embeds=text, prompt_attention_mask=mask,
            negative_prompt=None, negative_prompt_embeds=-text, negative_prompt_attention_mask=mask,
            num_inference_steps=STEPS, use_resolution_binning=False, output_type="pt",
        ).images  # fmt: skip


def new_model(workload: SanaWorkload, device: torch.device) -> nn.Module:
    """The model with the same random weights every time, fp32, in evaluation mode."""
    torch.manual_seed(0)
    with torch.device(device):
        if workload.work == "pipeline":
            return Pipeline(workload.network, device).eval()
        return Transformer(workload.network).eval()


def inputs_of(workload: SanaWorkload, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Random latents and texts, and masks for texts of several lengths; except for a pipeline, also times."""
    config = {"in_channels": 32, "caption_channels": 2304} | SIZES[workload.network]
    batch, side = workload.batch, workload.size // 32
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(batch, config["in_channels"], side, side, generator=generator, device=device)
    text = torch.randn(batch, TOKENS, config["caption_channels"], generator=generator, device=device)
    lengths = torch.randint(10, TOKENS, (batch, 1), generator=generator, device=device)
    mask = (torch.arange(TOKENS, device=device) < lengths).long()
    times = () if workload.work == "pipeline" else (torch.linspace(900, 100, batch, device=device),)
    return x.to(dtype), text.to(dtype), mask, *times


def benchmark(workload: SanaWorkload, device: torch.device, ceilings: Ceilings) -> dict:
    """The record of a workload, as of a workload of the other transformers: see transformer.py and training.py."""
    torch.compiler.reset()
    if workload.work == "training":
        found = training_rows(workload, device)
    else:
        found = {"contenders": inference_rows(workload, device)}
    flops = (3 if workload.work == "training" else 1) * sum(flops_by_operator(workload).values())
    add_rates(found["contenders"], workload.batch, flops, ceilings)
    return {
        "workload": workload.name, "network": f"sana-{workload.network}", "work": workload.work,
        "batch": workload.batch, "size": workload.size, "checkpointed": workload.work == "training",
        "flops": flops, "floor_ms": ceilings.floor(flops), **found,
    }  # fmt: skip


def inference_rows(workload: SanaWorkload, device: torch.device) -> dict[str, dict]:
    exact_model = new_model(workload, device)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = exact_model(*inputs_of(workload, device, torch.float32))
    reference, (x, *rest) = exact_model.to(torch.bfloat16), inputs_of(workload, device, torch.bfloat16)

    def prepare(name: str) -> tuple[Run, Run]:
        model = networks.sharing_weights(reference)
        PREPARE[name](model)
        return caller(model, (-x, *rest)), caller(model, (x, *rest))

    return interleaved(workload, prepare, exact)


def caller(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Run:
    @torch.no_grad()
    def run() -> torch.Tensor:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            return model(*inputs)

    return run


def trained(name: str, workload: SanaWorkload, device: torch.device) -> nn.Module:
    """A new model to train, made into the contender of that name."""
    model = new_model(workload, device).train()
    PREPARE[name](model)
    model.transformer.enable_gradient_checkpointing()
    return model


def training_rows(workload: SanaWorkload, device: torch.device) -> dict:
    """Contenders and drift. Each contender has the memory to itself."""
    inputs = inputs_of(workload, device, torch.float32)
    first = tuple(each[: training.CHECKED] for each in inputs)

    def build(name: str = "eager") -> nn.Module:
        return trained(name, workload, device)

    exact = training.exact_gradients(build, first)
    limit = max(2 * training.errors(build(), first, exact)[0], FP32_ERROR)
    rows = {name: training.trial(name, build, inputs, exact, limit) for name in workload.contenders}
    return {"contenders": rows} | training.drift(rows, build, inputs)


def call_of(workload: SanaWorkload, contender: str, device: torch.device) -> Run:
    """One call of a contender, to be profiled."""
    if workload.work == "training":
        inputs = inputs_of(workload, device, torch.float32)
        return training.stepper(trained(contender, workload, device), inputs)
    model = new_model(workload, device).to(torch.bfloat16)
    PREPARE[contender](model)
    return caller(model, inputs_of(workload, device, torch.bfloat16))


def flops_by_operator(workload: SanaWorkload) -> dict[str, int]:
    """FLOPs of the forward of the transformer, in all calls of a pipeline; not of the autoencoder."""
    calls = workload.batch * (2 * STEPS if workload.work == "pipeline" else 1)  # 2: guidance
    return {op: calls * n for op, n in _flops_of_one_call(workload.network, workload.size).items()}


@functools.cache
def _flops_of_one_call(network: str, size: int) -> dict[str, int]:
    """For one latent, neither patched nor compiled, counted without computing anything."""
    counter = FlopCounterMode(display=False)
    workload, cpu = SanaWorkload(network, "forward", 1, size, ()), torch.device("cpu")
    with FakeTensorMode(), counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        new_model(workload, cpu)(*inputs_of(workload, cpu, torch.float32))
    return {op.__name__: flops for op, flops in counter.get_flop_counts()["Global"].items()}
