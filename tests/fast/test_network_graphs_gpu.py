"""CUDA graphs of transformers and of sampling steps on a GPU: results are bit-identical to results without graphs."""

import contextlib

import pytest
import torch
from graph_pairs import reserved_memory, with_and_without_graphs
from small_diffusion import DIT, FLOW, UVIT, build
from small_models import in_threads

import dcae_fast
from dcae_fast.captured_steps import CapturedSteps
from dcae_fast.sampling.steps import Step, linear

pytestmark = pytest.mark.gpu
LABELS = torch.tensor([3, 1, 10, 0])
SAMPLERS = [(UVIT, "DPM_Solver"), (FLOW, "ODE_heun2"), (FLOW, "SDE"), (FLOW, "ODE_dopri5"), (DIT, "GaussianDiffusion")]


def inputs(batch: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    x, t = (torch.rand(shape, generator=generator, device="cuda") for shape in ((batch, 8, 4, 4), (batch,)))
    return x, 1000 * t, torch.randint(0, 11, (batch,), generator=generator, device="cuda")


def pair(config=UVIT, dtype: torch.dtype = torch.float32):
    return with_and_without_graphs(build(config).to("cuda", dtype))


def context(mode: str):
    return torch.autocast("cuda", torch.bfloat16) if mode == "autocast" else contextlib.nullcontext()


def order(x: torch.Tensor) -> list[int]:
    """Dimensions by decreasing stride. Strides may differ: UViT without graphs returns part of a larger tensor."""
    return sorted(range(x.dim()), key=x.stride, reverse=True)


@pytest.mark.parametrize("mode", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("config", [UVIT, DIT], ids=["uvit", "dit"])
@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
def test_calls_are_bit_equal(config, mode, inference):
    model, plain = pair(config, torch.bfloat16 if mode == "bfloat16" else torch.float32)
    network, twin = model.diffusion_model, plain.diffusion_model
    with inference():
        for seed in range(5):
            for batch in (2, 4):
                x, t, y = inputs(batch, seed)
                x = x.to(next(twin.parameters()).dtype)
                with context(mode):
                    got = network(x, t, y)
                with context(mode):
                    expected = twin(x, t, y)
                assert torch.equal(got, expected) and order(got) == order(expected)
                assert got.dtype == expected.dtype and got.is_inference() == expected.is_inference()
            for each in (network, twin):
                for parameter in each.parameters():
                    parameter.data.mul_(1.02)
    assert len(network.fast_options.graphs) == 2


@pytest.mark.parametrize("mode", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("config, sampler", SAMPLERS, ids=[sampler for _, sampler in SAMPLERS])
def test_samples_are_bit_equal(config, sampler, mode):
    if sampler == "ODE_dopri5":
        pytest.importorskip("torchdiffeq")
    models = pair(config, torch.bfloat16 if mode == "bfloat16" else torch.float32)
    for seed in range(3):
        samples = []
        for model in models:
            generator = torch.Generator("cuda").manual_seed(seed)
            with context(mode):
                samples.append(model.generate(LABELS, None, 2.0, generator, sampler=sampler, steps=12))
        assert torch.equal(*samples)
        for model in models:
            for parameter in model.diffusion_model.parameters():
                parameter.data.mul_(1.01)
    assert len(models[0].diffusion_model.fast_options.graphs) > 0


def test_eager_calls_within_one_autocast():
    """Graphs do not use autocast's cache, and eager calls do not use casts made by graphs."""
    model, plain = pair()
    network, twin = model.diffusion_model, plain.diffusion_model
    with torch.autocast("cuda", torch.bfloat16):
        for seed in range(4):
            arguments = inputs(3, seed)
            with torch.no_grad():
                assert torch.equal(network(*arguments), twin(*arguments))
            assert torch.equal(network(*arguments), twin(*arguments)) and network(*arguments).requires_grad
            with torch.no_grad():
                assert torch.equal(network.eager(*arguments), twin(*arguments))
    assert len(network.fast_options.graphs) == 1


def test_nothing_waits_for_the_gpu():
    """Replaying a captured step does not synchronise with the GPU."""
    model, _ = pair()
    labels, x = LABELS.cuda(), torch.randn(4, 8, 4, 4, device="cuda")
    run = CapturedSteps(
        model.diffusion_model, model.diffusion_model, labels, torch.full_like(labels, 10), 2.0, None, None
    )
    step = Step(linear, (500.0,), torch.tensor([[0.5, 0.5]], device="cuda"))
    with torch.no_grad():
        for _ in range(2):
            run(None, step, x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(None, step, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(model.diffusion_model.fast_options.graphs) == 1


def test_threads():
    model, plain = pair(FLOW)
    expected = [
        plain.generate(LABELS, None, 2.0, torch.Generator("cuda").manual_seed(seed), steps=6) for seed in range(4)
    ]
    torch.cuda.synchronize()
    errors = []

    def work(offset: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for index in range(12):
                seed = (offset + index) % 4
                got = model.generate(LABELS, None, 2.0, torch.Generator("cuda").manual_seed(seed), steps=6)
                torch.cuda.current_stream().synchronize()
                if not torch.equal(got, expected[seed]):
                    errors.append((offset, index))

    in_threads(work)
    assert not errors


def test_memory_comes_back():
    model, _ = pair()
    dcae_fast.patch(model, cuda_graphs=False)
    with torch.autocast("cuda", torch.bfloat16):
        model.generate(LABELS, cfg_scale=2.0, steps=12)
    before = reserved_memory()
    dcae_fast.patch(model, cuda_graphs=True)
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            model.generate(LABELS, cfg_scale=2.0, steps=12)
    dcae_fast.unpatch(model)
    assert reserved_memory() <= before + 2**22
