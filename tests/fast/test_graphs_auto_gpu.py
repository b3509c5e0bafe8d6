"""`patch(model, cuda_graphs="auto")` on a GPU: what calls compute, and what graphs hold.

Here every call counts as short, so that other processes may use the GPU too. test_judgement_gpu.py tests the judgement.
"""

import gc
import math
import threading

import pytest
import small_diffusion
import torch
from graph_pairs import assert_right_in_threads, graphs_of, reserved_memory, settle, with_and_without_graphs
from small_models import MODELS, build, image
from test_interference import CHANGES

import dcae_fast
from dcae_fast.fast import judge

pytestmark = pytest.mark.gpu
GIB = 2**30
FINISH = judge.Timing.finish


@pytest.fixture(autouse=True)
def every_call_is_short(monkeypatch):
    monkeypatch.setattr(judge, "SHORT", math.inf)
    monkeypatch.setattr(judge.Timing, "finish", finish)


def finish(timing: judge.Timing) -> None:
    """`Timing.finish` as if the GPU had been idle before the call."""
    FINISH(timing)
    timing.is_late = False


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", MODELS)
def test_a_small_model_is_captured(name, mode):
    model, plain = with_and_without_graphs(build(name), "auto")
    with mode():
        x = image(1, 3, 32, 16)
        z = plain.encoder(x)
        settle(model.encoder, x)
        settle(model.decoder, z)
        assert len(graphs_of(model.encoder)) == len(graphs_of(model.decoder)) == 1
        for seed in range(3):
            x = image(1, 3, 32, 16, seed=seed)
            z = model.encoder(x)
            assert torch.equal(z, plain.encoder(x)) and torch.equal(model.decoder(z), plain.decoder(z))


@pytest.mark.parametrize("frozen", [False, True])
@torch.no_grad()
def test_one_picture_fits_into_the_memory(large, frozen, record_property):
    """Encoder and decoder of one picture of 512 px get graphs with the default graph_memory."""
    dcae_fast.patch(large, cuda_graphs=False, frozen=frozen)
    x = torch.randn(1, 3, 512, 512, device="cuda", dtype=torch.bfloat16)
    z = large.encoder(x)
    y = large.decoder(z)
    dcae_fast.patch(large, cuda_graphs="auto", frozen=frozen)
    settle(large.encoder, x)
    settle(large.decoder, z)
    assert len(graphs_of(large.encoder)) == len(graphs_of(large.decoder)) == 1
    assert torch.equal(large.encoder(x), z) and torch.equal(large.decoder(z), y)
    held = graphs_of(large.encoder)._budget.held()
    record_property("bytes held", held)
    assert 2**20 < held <= GIB


@torch.no_grad()
def test_memory_is_bounded(large, monkeypatch):
    """20 shapes in turn. What is reserved beyond the memory without graphs stays within graph_memory."""
    monkeypatch.setattr("dcae_fast.ops._convolution_plans.WORTH_A_SEARCH", math.inf)  # 20 searches would take minutes
    dcae_fast.patch(large, cuda_graphs=False)
    inputs = [torch.randn(1, 3, 256, 128 + 32 * k, device="cuda", dtype=torch.bfloat16) for k in range(20)]
    expected = [large.encoder(x) for x in inputs]
    before = reserved_memory()
    bound = GIB // 4
    dcae_fast.patch(large, cuda_graphs="auto", graph_memory=bound)
    for _ in range(8):
        for x, want in zip(inputs, expected, strict=True):
            assert torch.equal(large.encoder(x), want)
    held = graphs_of(large.encoder)._budget.held()
    assert 0 < held <= bound and reserved_memory() - before <= held + 2**25
    dcae_fast.unpatch(large)
    gc.collect()
    assert reserved_memory() - before <= 2**25


@pytest.mark.parametrize("repetitions", [1, 2])
@torch.no_grad()
def test_changing_shapes(repetitions):
    model, plain = with_and_without_graphs(build("strided"), "auto")
    for k in range(20):
        x = image(1, 3, 16, 16 + 8 * k)
        for _ in range(repetitions):
            assert torch.equal(model.encoder(x), plain.encoder(x))
    assert len(graphs_of(model.encoder)) == 0


def test_streams_and_threads():
    assert_right_in_threads(*with_and_without_graphs(build("shuffled"), "auto"))


@pytest.mark.parametrize("calls", [0, 1, 2, 4])
@torch.no_grad()
def test_a_users_own_capture(calls):
    """The user captures a call at any state of the judgement."""
    model, plain = with_and_without_graphs(build("strided"), "auto")
    x = image(1, 3, 16, 16)
    plain.encoder(x)
    settle(model.encoder, x, calls=calls)
    if calls == 0:  # kernels must be compiled before a capture
        with dcae_fast.patched(model, cuda_graphs=False):
            model.encoder(x)
    had, graph, static = len(graphs_of(model.encoder)), torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        out = model.encoder(static)
    assert len(graphs_of(model.encoder)) == had
    static.copy_(2 * x)
    graph.replay()
    torch.testing.assert_close(out, plain.encoder(2 * x), atol=1e-4, rtol=1e-4)
    settle(model.encoder, x)
    assert torch.equal(model.encoder(x), plain.encoder(x)) and len(graphs_of(model.encoder)) == 1


@pytest.mark.parametrize("cuda_graphs", [False, "auto"])
@pytest.mark.parametrize("mode", ["thread_local", "global"])
@torch.no_grad()
def test_a_capture_of_another_thread(mode, cuda_graphs):
    """Another thread captures a graph of its own while a call is timed. cuda_graphs=False shows what works anyway."""
    model, x = build("strided"), image(1, 3, 16, 16)
    dcae_fast.patch(model, cuda_graphs=cuda_graphs)
    for _ in range(3):
        with dcae_fast.patched(model, cuda_graphs=False):
            expected = model.encoder(x)  # so that the memory of a call is cached
    settle(model.encoder, x, calls=1)
    capturing, timed, errors = threading.Event(), threading.Event(), []
    static, graph = torch.ones(8, device="cuda"), torch.cuda.CUDAGraph()

    def capture() -> None:
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode=mode):
                out = static + 1
                capturing.set()
                timed.wait(30)
            graph.replay()
            assert out.tolist() == [2.0] * 8
        except Exception as error:
            errors.append(error)
        finally:
            capturing.set()

    thread = threading.Thread(target=capture)
    thread.start()
    capturing.wait(30)
    try:
        got = model.encoder(x)
    finally:
        timed.set()
        thread.join()
    assert torch.equal(got, expected) and not errors
    settle(model.encoder, x, calls=20)
    assert cuda_graphs is False or len(graphs_of(model.encoder)) == 1


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights(change):
    model, plain = with_and_without_graphs(build("strided"), "auto")
    x = image(1, 3, 16, 16)
    with torch.no_grad():
        settle(model.encoder, x)
    for each in (model, plain):
        change(each)
    x = x.to(next(plain.parameters()).dtype)
    with torch.no_grad():
        for _ in range(6):
            assert torch.equal(model.encoder(x), plain.encoder(x))


@torch.no_grad()
def test_weights_that_move_to_a_cpu_and_back():
    """As diffusers' model offloading does. Weights on the CPU leave no memory of their own on the GPU."""
    model, plain = with_and_without_graphs(build("strided"), "auto")
    x = image(1, 3, 16, 16)
    expected = plain.encoder(x)
    for _ in range(40):
        model.to("cuda")
        assert torch.equal(model.encoder(x), expected)
        model.to("cpu")
    model.to("cuda")
    settle(model.encoder, x, calls=100)
    assert torch.equal(model.encoder(x), expected) and len(graphs_of(model.encoder)) == 1


@pytest.mark.parametrize("library", ["accelerate", "diffusers"])
@torch.no_grad()
def test_offloading_hooks(library):
    name = "diffusers-strided" if library == "diffusers" else "strided"
    model, plain = with_and_without_graphs(build(name), "auto")
    if library == "accelerate":
        pytest.importorskip("accelerate").cpu_offload(model, torch.device("cuda"))
    else:
        apply = pytest.importorskip("diffusers.hooks").apply_group_offloading
        cuda, cpu = torch.device("cuda"), torch.device("cpu")
        apply(model, onload_device=cuda, offload_device=cpu, offload_type="leaf_level", use_stream=True)
    x = image(1, 3, 16, 16)
    expected = plain.encoder(x)
    for _ in range(40):
        torch.testing.assert_close(model.encoder(x), expected, atol=1e-4, rtol=1e-4)
    torch.cuda.synchronize()
    assert library == "diffusers" or all(weight.device.type == "meta" for weight in model.encoder.parameters())
    assert len(graphs_of(model.encoder)) == 0


@torch.no_grad()
def test_unpatch_frees_everything():
    model, x = build("shuffled"), image(4, 3, 256, 256)
    dcae_fast.patch(model, cuda_graphs=False)
    model(x)
    before = reserved_memory()
    dcae_fast.patch(model, cuda_graphs="auto", graph_memory=8 * GIB)
    settle(model, x)
    dcae_fast.unpatch(model)
    gc.collect()
    assert reserved_memory() - before <= 2**22


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_inside_torch_compile():
    model, plain = with_and_without_graphs(build("strided"), "auto")
    torch._dynamo.reset()
    compiled, x = torch.compile(model.encoder, fullgraph=True), image(1, 3, 16, 16)
    for _ in range(5):
        torch.testing.assert_close(compiled(x), plain.encoder(x), atol=1e-4, rtol=1e-4)
    assert len(graphs_of(model.encoder)) == 0


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["UVIT", "FLOW", "DIT"])
def test_sampling(name, autocast):
    model = small_diffusion.build(getattr(small_diffusion, name)).cuda()
    models, labels = with_and_without_graphs(model, "auto"), torch.tensor([3, 1, 10, 0])
    for seed in range(3):
        samples = []
        for each in models:
            generator = torch.Generator("cuda").manual_seed(seed)
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                samples.append(each.generate(labels, None, 2.0, generator, steps=12))
        assert torch.equal(*samples)
        for each in models:
            for parameter in each.diffusion_model.parameters():
                parameter.data.mul_(1.01)
    assert len(graphs_of(models[0].diffusion_model)) > 0


@torch.no_grad()
def test_two_devices():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model, plain = with_and_without_graphs(build("strided").to("cuda:1"), "auto")
    x = image(1, 3, 16, 16).to("cuda:1")
    settle(model.encoder, x)
    assert torch.equal(model.encoder(x), plain.encoder(x))
