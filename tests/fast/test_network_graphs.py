"""CUDA graphs of transformers and of sampling steps: which calls are captured or replayed. Graphs are simulated."""

import functools
import warnings

import pytest
import torch
from graph_pairs import with_and_without_graphs
from graph_tape import CAPTURED, REPLAYED, SEEN, counts, not_captured
from small_diffusion import DIT, FLOW, UVIT, build
from small_models import DEVICE, duplicates
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import dcae_fast
from dcae_fast.fast.casts import Casts
from dcae_fast.models import uvit

CONFIGS = {"uvit": UVIT, "flow": FLOW, "dit": DIT}
LABELS = torch.tensor([3, 1, 10])


def inputs(batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, t = torch.randn(batch, 8, 4, 4, generator=generator), torch.rand(batch, generator=generator)
    return x.to(DEVICE), t.to(DEVICE), torch.randint(0, 11, (batch,), generator=generator).to(DEVICE)


@pytest.fixture(params=["uvit", "dit"])
def pair(request) -> tuple[nn.Module, nn.Module]:
    """A patched transformer with CUDA graphs, and a patched copy without graphs."""
    return with_and_without_graphs(build(CONFIGS[request.param]).diffusion_model.to(DEVICE))


@torch.no_grad()
def test_times_and_labels_are_inputs(tape, pair):
    network, twin = pair
    network(*inputs())
    assert counts(network, *inputs(seed=1)) == CAPTURED
    for seed in range(3):
        assert counts(network, *inputs(seed=seed)) == REPLAYED
        assert torch.equal(network(*inputs(seed=seed)), twin(*inputs(seed=seed)))


@torch.no_grad()
def test_kinds_of_calls(tape, pair):
    network, _ = pair
    x, t, y = inputs()

    def settle(*args):
        assert [counts(network, *args) for _ in range(3)] == [SEEN, CAPTURED, REPLAYED]

    settle(x, t, y)
    settle(*inputs(batch=3))
    settle(x, t.double(), y)
    settle(x, t, y.int())
    settle(x.to(memory_format=torch.channels_last), t, y)
    settle(x, t[:1].expand(2), y)
    with torch.autocast(DEVICE, torch.bfloat16):
        settle(x, t, y)
    with torch.autocast(DEVICE, torch.float16):
        settle(x, t, y)
    assert counts(network, x, t, y) == REPLAYED


@torch.no_grad()
def test_calls_with_keywords(tape, pair):
    """Keyword arguments, in any order, and positional arguments share one graph. Wrong arguments raise TypeError."""
    network, twin = pair
    x, t, y = inputs()
    assert [counts(network, x, t=t, y=y) for _ in range(3)] == [SEEN, CAPTURED, REPLAYED]
    for given, named in [((x, t), {"y": y}), ((x,), {"y": y, "t": t}), ((), {"t": t, "y": y, "x": x}), ((x, t, y), {})]:
        assert counts(network, *given, **named) == REPLAYED
        assert torch.equal(network(*given, **named), twin(x, t, y))
    for given, named in [((x, t, y), {"y": y}), ((x,), {"t": t}), ((x, t), {"labels": y})]:
        with pytest.raises(TypeError, match="argument"):
            network(*given, **named)


@torch.no_grad()
def test_what_attention_may_run_as(tape, pair):
    """A graph is valid only for the set of attention backends that was allowed at its capture."""
    network, _ = pair
    fused = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)
    for choice in ([SDPBackend.MATH], *([SDPBackend.MATH, backend] for backend in fused)):
        assert [counts(network, *inputs()) for _ in range(3)][-1] == REPLAYED
        with sdpa_kernel(choice):
            assert [counts(network, *inputs()) for _ in range(3)] == [SEEN, CAPTURED, REPLAYED]


def test_calls_that_are_left_alone(tape, pair):
    network, _ = pair
    x, t, y = inputs()
    not_captured(network, x, t, y)
    assert network(x, t, y).requires_grad
    with torch.no_grad():
        not_captured(network, x[:0], t[:0], y[:0])
        network.train()
        not_captured(network, x, t, y)
    network.eval().requires_grad_(False)
    not_captured(network, x, t.requires_grad_(), y)
    with pytest.raises(ValueError, match="t has shape"), torch.no_grad():
        network(x, t[:1], y)


@torch.no_grad()
def test_changes(tape, pair):
    """Replays use weights that were changed in place. Any other change of the network drops its graphs."""
    network, twin = pair
    for _ in range(2):
        network(*inputs())
    for each in pair:
        for parameter in each.parameters():
            parameter.mul_(1.5)
    assert counts(network, *inputs()) == REPLAYED
    assert torch.equal(network(*inputs()), twin(*inputs()))
    for each in pair:
        blocks = getattr(each, "in_blocks", None) or each.blocks
        blocks[0].norm1.eps = 0.5
    assert torch.equal(network(*inputs()), twin(*inputs()))
    assert len(network.fast_options.graphs) == 0
    for _ in range(2):
        network(*inputs())
    network.register_module("hooked", nn.Identity())
    network.hooked.register_forward_hook(lambda *_: None)
    not_captured(network, *inputs())


@torch.no_grad()
def test_options_come_and_go(tape):
    model = build()
    attributes = [set(vars(module)) for module in model.modules()]
    report = dcae_fast.patch(model, cuda_graphs=True, max_memory=2**40)
    assert report.replaced["UViT"] == 1 and model.diffusion_model.fast_options.max_memory is None
    dcae_fast.patch(model, cuda_graphs=False)
    assert [set(vars(module)) for module in model.modules()] == attributes
    with dcae_fast.patched(model, cuda_graphs=True):
        assert "fast_options" in vars(model.diffusion_model)
    dcae_fast.patch(model, disable="all")
    assert type(model.diffusion_model).__name__ == "UViT"


@torch.no_grad()
def test_a_forward_replaced_while_patched(tape, pair):
    """Activation checkpointing and torch.compile replace a module's forward in this way."""
    network, twin = pair
    network.forward = functools.partial(network.forward)
    expected = twin(*inputs())
    assert [counts(network, *inputs()) for _ in range(3)] == [SEEN, CAPTURED, REPLAYED]
    assert not dcae_fast.patch(network).skipped and torch.equal(network(*inputs()), expected)
    dcae_fast.unpatch(network)
    dcae_fast.unpatch(twin)
    assert torch.equal(network(*inputs()), twin(*inputs()))


@duplicates
@torch.no_grad()
def test_copies_have_no_graphs(duplicate, tape, pair):
    network, _ = pair
    for _ in range(2):
        network(*inputs())
    twin = duplicate(network)
    assert len(network.fast_options.graphs) == 1 and len(twin.fast_options.graphs) == 0
    assert [counts(twin, *inputs()) for _ in range(3)] == [SEEN, CAPTURED, REPLAYED]


# Casts of weights under autocast.


@torch.no_grad()
def test_weights_are_cast_once_and_anew(pair):
    _, network = pair
    casts = Casts(network)
    with torch.autocast(DEVICE, torch.bfloat16):
        expected = network(*inputs())
        with casts.once(torch.device(DEVICE)):
            assert torch.equal(network(*inputs()), expected)
            copies = dict(casts._copies)
            linear = [m.weight for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
            assert {id(weight) for weight in linear} <= {weight for weight, _ in copies}
            network(*inputs())
        for parameter in network.parameters():
            parameter.mul_(1.5)
        torch.clear_autocast_cache()
        changed = network(*inputs())
        casts.refresh()
        with casts.once(torch.device(DEVICE)):
            assert torch.equal(network(*inputs()), changed) and not torch.equal(changed, expected)
    assert casts._copies.keys() == copies.keys()
    assert all(casts._copies[key] is copy for key, copy in copies.items())


def test_casts_leave_gradients_alone(pair):
    _, network = pair
    casts = Casts(network)
    with torch.autocast(DEVICE, torch.bfloat16), casts.once(torch.device(DEVICE)):
        network(*inputs()).sum().backward()
    assert not casts._copies and all(p.grad is not None for p in network.parameters() if p.requires_grad)


def test_autocast_keeps_no_casts_of_a_call_before_its_capture(tape, monkeypatch):
    """Cached casts would take memory in addition to the graphs' casts until the autocast ends."""
    network, keeps, embedding = build(UVIT).diffusion_model.to(DEVICE), [], uvit.sinusoidal_embedding
    dcae_fast.patch(network, cuda_graphs=True)

    def record(*args):
        keeps.append(torch.is_autocast_cache_enabled())
        return embedding(*args)

    monkeypatch.setattr(uvit, "sinusoidal_embedding", record)
    with torch.autocast(DEVICE, torch.bfloat16):
        network(*inputs())
        with torch.no_grad():
            assert counts(network, *inputs()) == SEEN
        assert keeps == [True, False] and torch.is_autocast_cache_enabled()


# Sampling.


def generate(model, seed: int = 0, **options) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return model.generate(LABELS, cfg_scale=2.0, generator=generator, **options)


@pytest.mark.parametrize(
    "which, sampler, steps, kinds",
    [
        ("uvit", "DPM_Solver", 11, 2),
        ("uvit", "DPM_Solver", 12, 3),
        ("flow", "ODE_heun2", 6, 1),
        ("flow", "SDE", 6, 2),
        ("dit", "GaussianDiffusion", 6, 2),
    ],
)
def test_steps_are_captured(tape, which, sampler, steps, kinds):
    """Samples are bit-identical to samples without graphs. Only whole steps are captured, not network calls."""
    model, plain = with_and_without_graphs(build(CONFIGS[which]).to(DEVICE))
    options = {"sampler": sampler, "steps": steps}
    for seed in range(2):
        assert torch.equal(generate(model, seed, **options), generate(plain, seed, **options))
    assert tape.captures == len(model.diffusion_model.fast_options.graphs) == kinds
    calls, replays = [], tape.replays
    generate(model, progress=lambda: calls.append(1), **options)
    alone = []
    generate(plain, progress=lambda: alone.append(1), **options)
    assert len(calls) == len(alone) and tape.captures == kinds and tape.replays > replays


def test_the_scale_and_the_labels(tape):
    model, plain = with_and_without_graphs(build().to(DEVICE))
    generate(model)
    captures = tape.captures
    for labels in (LABELS, LABELS.flip(0)):
        for scale in (2.0, 1.0, 3.0):
            options = {"generator": torch.Generator(DEVICE).manual_seed(1), "cfg_scale": scale}
            got = model.generate(labels, **options)
            options["generator"] = torch.Generator(DEVICE).manual_seed(1)
            assert torch.equal(got, plain.generate(labels, **options))
    assert tape.captures > captures


def test_guidance_within_an_interval(tape):
    """Steps inside and outside the interval use different graphs. A step across an end of the interval uses none."""
    model, plain = with_and_without_graphs(build().to(DEVICE))
    for _ in range(2):
        options = {"interval": (250.0, 700.0), "steps": 15}
        assert torch.equal(generate(model, **options), generate(plain, **options))
    assert tape.replays > 0


def test_adaptive_solvers_replay_the_network(tape):
    pytest.importorskip("torchdiffeq")
    model, plain = with_and_without_graphs(build(FLOW).to(DEVICE))
    options = {"sampler": "ODE_dopri5"}
    assert torch.equal(generate(model, **options), generate(plain, **options))
    assert tape.captures == 1


def test_sampling_under_autocast(tape):
    """Each sampling that replays graphs casts the current weights once."""
    model, plain = with_and_without_graphs(build().to(DEVICE))
    for _ in range(3):
        casts = tape.casts
        with torch.autocast(DEVICE, torch.bfloat16):
            got = generate(model)
        with torch.autocast(DEVICE, torch.bfloat16):
            assert torch.equal(got, generate(plain))
        for each in (model, plain):
            for parameter in each.diffusion_model.parameters():
                parameter.data.mul_(1.1)
    assert tape.casts == casts + 1


def test_hooks_of_the_network_see_every_call(tape):
    model, seen = build().to(DEVICE), []
    dcae_fast.patch(model, cuda_graphs=True)
    model.diffusion_model.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    generate(model, steps=6)
    assert seen == [6] * 6


def test_nothing_is_captured_without_graphs(tape):
    model = build().to(DEVICE)
    dcae_fast.patch(model, cuda_graphs=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        not_captured(generate, model)
