"""CUDA graphs of whole calls on a GPU.

Results with and without graphs are bit-identical, whatever happens between the calls.
"""

import pytest
import torch
from graph_pairs import assert_right_in_threads, reserved_memory, with_and_without_graphs
from small_models import MODELS, build, image
from test_interference import CHANGES
from torch.utils.flop_counter import FlopCounterMode

import dcae_fast
from dcae_fast.fast import graphs
from dcae_fast.fast.graphs import Captured, Pool

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_results_are_bit_equal(name, dtype, mode):
    model, plain = with_and_without_graphs(build(name).to(dtype))
    ratio = model.spatial_compression_ratio
    with mode():
        channels = plain.encoder(image(1, 3, 16, 16).to(dtype)).shape[1]
        for coder, twin, shape in (
            (model.encoder, plain.encoder, (2, 3, 32, 16)),
            (model.decoder, plain.decoder, (2, channels, 32 // ratio, 16 // ratio)),
        ):
            for seed, memory_format in enumerate([torch.contiguous_format, torch.channels_last] * 3):
                x = image(*shape, seed=seed).to(dtype, memory_format=memory_format)
                got, expected = coder(x), twin(x)
                assert torch.equal(got, expected) and got.stride() == expected.stride()
                assert got.is_inference() == expected.is_inference() and not got.requires_grad
            assert len(coder.fast_options.graphs) == 1


@torch.no_grad()
def test_results_are_kept():
    """Later calls do not overwrite a result. The caller may overwrite an input as soon as the call returns."""
    model, plain = with_and_without_graphs(build("adaptive"))
    inputs = [image(1, 3, 64, 32 * (1 + seed % 2), seed=seed) for seed in range(10)]
    expected = [plain.encoder(x) for x in inputs]
    results = []
    for x in inputs:
        scratch = x.clone()
        results.append(model.encoder(scratch))
        scratch.fill_(torch.nan)
    for got, want in zip(results, expected, strict=True):
        assert torch.equal(got, want)
    for latent, want in zip(model.encoder(inputs[0], [3, 5]), plain.encoder(inputs[0], [3, 5]), strict=True):
        assert torch.equal(latent, want)
    assert len(model.encoder.fast_options.graphs) == 2


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", ["strided", "diffusers-strided"])
def test_changed_weights(name, change):
    model, plain = with_and_without_graphs(build(name))
    x = image(1, 3, 16, 16)
    with torch.no_grad():
        for _ in range(3):
            before = model.encoder(x), model.decoder(plain.encoder(x))
    for each in (model, plain):
        change(each)
    x = x.to(next(plain.parameters()).dtype)
    with torch.no_grad():
        for _ in range(3):
            z = plain.encoder(x)
            assert torch.equal(model.encoder(x), z)
            y = plain.decoder(z)
            assert torch.equal(model.decoder(z), y)
    assert not torch.equal(y, before[1].to(y.dtype)) or change in (CHANGES["half and back"], CHANGES["cast"])


def test_modes():
    """Runs calls that cannot be replayed between calls that are replayed."""
    model, plain = with_and_without_graphs(build("strided"))
    x = image(1, 3, 16, 16)

    def check():
        with torch.no_grad():
            for _ in range(2):
                assert torch.equal(model.encoder(x), plain.encoder(x))

    check()
    check()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(model.encoder(x), plain.encoder(x))
    check()
    assert model.encoder(x).requires_grad
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        static = x.clone()
        with torch.cuda.graph(graph):
            out = model.encoder(static)
        static.copy_(2 * x)
        graph.replay()
        assert torch.equal(out, plain.encoder(2 * x))
    check()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.encoder(x)
    assert counter.get_total_flops() > 0
    assert len(model.encoder.fast_options.graphs) == 1


@pytest.mark.parametrize("change", ["nothing", "weights", "unpatched", "options"])
@torch.no_grad()
def test_a_users_own_capture(change):
    """The user captures a call of a model that already has graphs.

    Some changes drop the model's graphs. During the user's capture nothing is waited for and nothing is freed.
    """
    model, x = build("strided"), image(1, 3, 16, 16)
    dcae_fast.patch(model, cuda_graphs=True)
    for _ in range(3):
        expected = model.encoder(x)
    if change == "weights":
        for parameter in model.parameters():
            parameter.data = parameter.data * 1.0  # at a new address
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        if change == "unpatched":
            dcae_fast.unpatch(model)
        elif change == "options":
            dcae_fast.patch(model, cuda_graphs=True)
        out = model.encoder(x)
    graph.replay()
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    dcae_fast.patch(model, cuda_graphs=True)
    for _ in range(3):
        assert torch.equal(model.encoder(x), expected)


@torch.no_grad()
def test_a_trace():
    model, x = build("strided"), image(1, 3, 16, 16)
    dcae_fast.patch(model, cuda_graphs=True)
    for _ in range(3):
        model.encoder(x)
    traced, other = torch.jit.trace(model.encoder, x, check_trace=False), image(1, 3, 16, 16, seed=1)
    torch.testing.assert_close(traced(other), model.encoder(other))


def test_streams_and_threads():
    assert_right_in_threads(*with_and_without_graphs(build("shuffled")))


@torch.no_grad()
def test_memory_comes_back():
    model, x = build("shuffled"), image(4, 3, 512, 512)
    dcae_fast.patch(model, cuda_graphs=False)
    model(x)
    before = reserved_memory()
    dcae_fast.patch(model, cuda_graphs=True)
    for _ in range(3):
        model(x)
    held = reserved_memory() - before
    assert held > 2**23
    dcae_fast.unpatch(model)
    assert reserved_memory() - before < held / 4


@torch.no_grad()
def test_dropped_graphs(monkeypatch):
    """Alternates between more input shapes than a module can have graphs."""
    monkeypatch.setattr(graphs, "LIMIT", 2)
    model, plain = with_and_without_graphs(build("adaptive"))
    inputs = [image(1, 3, 16, 16 * width) for width in (1, 2, 3, 4)]
    for order in ([0, 0, 1, 1], [2, 2, 3, 3], [0, 0, 3, 3, 1, 1, 0, 0], [0, 1, 2, 3] * 2):
        for k in order:
            assert torch.equal(model.encoder(inputs[k]), plain.encoder(inputs[k]))
    assert len(model.encoder.fast_options.graphs) <= 2


@torch.no_grad()
def test_failed_captures(monkeypatch):
    """A call that synchronises cannot be captured. The next capture succeeds."""
    model, x = build("adaptive"), image(1, 3, 16, 16)
    dcae_fast.patch(model, cuda_graphs=True)
    expected = model.encoder(x)
    original = Captured.__init__

    def synchronising(self, pool, casts, channels_last, function, args, kwargs):
        def bad(x, *rest, **kwargs):
            torch.ones(1, device=x.device).item()
            return function(x, *rest, **kwargs)

        original(self, pool, casts, channels_last, bad, args, kwargs)

    with monkeypatch.context() as patch, pytest.warns(RuntimeWarning, match="no CUDA graph"):
        patch.setattr(Captured, "__init__", synchronising)
        assert torch.equal(model.encoder(x), expected)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    for _ in range(3):
        assert torch.equal(model.encoder(x), expected)
    assert len(model.encoder.fast_options.graphs) == 0
    other = image(2, 3, 16, 16)
    first = model.encoder(other)
    for _ in range(2):
        assert torch.equal(model.encoder(other), first)
    assert len(model.encoder.fast_options.graphs) == 1


@torch.no_grad()
def test_tiling_of_diffusers():
    model, x = build("diffusers-shuffled"), image(1, 3, 48, 40)
    model.enable_tiling(16, 16, 12, 12)
    model, plain = with_and_without_graphs(model)
    expected = plain.encode(x).latent
    for _ in range(3):
        z = model.encode(x).latent
        assert torch.equal(z, expected)
        assert torch.equal(model.decode(z).sample, plain.decode(z).sample)
    assert 0 < len(model.encoder.fast_options.graphs) <= 8


@torch.no_grad()
def test_pool_waits_for_its_replays():
    pool = Pool(torch.device("cuda", torch.cuda.current_device()))
    pool.wait()  # nothing was replayed
    pool.replayed.record()
    pool.wait()
    assert pool.replayed.query()
