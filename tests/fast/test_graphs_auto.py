"""Which calls `patch(model, cuda_graphs="auto")` captures. Needs no GPU: graphs and the GPU's time are simulated."""

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import small_diffusion
import torch
from graph_pairs import with_and_without_graphs
from graph_tape import CAPTURED, REPLAYED, SEEN, NoPool, Tape, counts, not_captured
from small_models import DEVICE, build, duplicates, image, step
from test_graphs import STRUCTURE, users_capture
from torch import nn

import dcae_fast
from dcae_fast.fast import graphs, judge

MIB = 2**20
PATIENCE = 4  # instead of judge.PATIENCE, so that fewer calls are needed


class Gpu:
    """An event. milliseconds: GPU time of each timed call. is_done: whether the GPU has finished these calls."""

    milliseconds, is_done, events = 0.0, True, 0

    def __init__(self):
        self.is_start = Gpu.events % 2 == 0
        Gpu.events += 1

    def query(self) -> bool:
        return self.is_start or Gpu.is_done

    def elapsed_time(self, end: "Gpu") -> float:
        return Gpu.milliseconds


@pytest.fixture
def gpu(tape, monkeypatch) -> type[Gpu]:
    monkeypatch.setattr(graphs, "recorded_event", lambda device: Gpu())
    monkeypatch.setattr(graphs, "free_memory", lambda device: 2**40)
    monkeypatch.setattr(judge, "PATIENCE", PATIENCE)
    Gpu.milliseconds, Gpu.is_done, Gpu.events = 0.0, True, 0
    return Gpu


@pytest.fixture
def encoder(gpu) -> nn.Module:
    model = build("adaptive")
    dcae_fast.patch(model, cuda_graphs="auto")
    return model.encoder


def several(encoder: nn.Module, x: torch.Tensor, calls: int) -> int:
    """Number of captures in so many calls."""
    return sum(counts(encoder, x)[0] for _ in range(calls))


@torch.no_grad()
def test_captured_the_third_time(gpu, encoder):
    x = image(1, 3, 8, 8)
    expected = encoder(x)
    assert gpu.events == 0, "the first call compiles kernels"
    assert counts(encoder, x) == SEEN and gpu.events == 2
    assert counts(encoder, x) == CAPTURED
    assert counts(encoder, x) == REPLAYED and gpu.events == 2
    assert torch.equal(encoder(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["auto", True])
def test_a_move_frees_graphs_without_another_call(gpu, mode):
    model = build("adaptive")
    dcae_fast.patch(model, cuda_graphs=mode)
    x = image(1, 3, 8, 8)
    assert several(model.encoder, x, 3) == 1
    model.to(x.device), model.float()
    assert len(model.encoder.fast_options.graphs) == 1, "nothing has moved"
    model.double()
    assert len(model.encoder.fast_options.graphs) == 0 and model.encoder.fast_options.graphs._watch is None
    model.float()
    assert counts(model.encoder, x) == SEEN and several(model.encoder, x, 6) == 1


@torch.no_grad()
def test_long_calls_are_timed_once(gpu, encoder):
    gpu.milliseconds = 1e6
    x = image(1, 3, 8, 8)
    assert several(encoder, x, 6) == 0 and gpu.events == 2
    gpu.milliseconds = 0.0
    assert several(encoder, image(2, 3, 8, 8), 3) == 1, "another shape is judged by itself"
    assert several(encoder, x, 3) == 0


@torch.no_grad()
def test_the_host_never_waits(gpu, encoder):
    x = image(1, 3, 8, 8)
    gpu.is_done = False
    not_captured(encoder, x)
    not_captured(encoder, x)
    gpu.is_done = True
    assert several(encoder, x, 2) == 1


@torch.no_grad()
def test_changing_shapes(encoder):
    for width in range(4, 24):
        for _ in range(1 + width % 2):
            assert counts(encoder, image(1, 3, 8, 2 * width)) == SEEN
    assert len(encoder.fast_options.graphs) == 0


@torch.no_grad()
def test_more_shapes_than_graphs_in_turn(encoder, monkeypatch):
    """The first shapes keep their graphs. Nothing is captured, dropped and captured again."""
    monkeypatch.setattr(graphs, "LIMIT", 2)
    inputs = [image(1, 3, 8, 8 + 4 * k) for k in range(4)]
    captures = sum(counts(encoder, x)[0] for _ in range(PATIENCE + 8) for x in inputs)
    assert captures == 2 == len(encoder.fast_options.graphs)
    unused = inputs[2:]
    assert sum(several(encoder, x, 8 * PATIENCE) for x in unused) == 2, "they replace graphs that are not used"


def held(module: nn.Module) -> float:
    return module.fast_options.graphs._budget.held()


@torch.no_grad()
def test_a_call_too_large_for_the_memory(gpu, monkeypatch):
    model = build("adaptive")
    dcae_fast.patch(model, cuda_graphs="auto", graph_memory=10 * MIB)
    monkeypatch.setattr(Tape, "size", 11 * MIB)
    x = image(1, 3, 8, 8)
    assert several(model.encoder, x, 4 * PATIENCE) == 1, "tried once"
    assert len(model.encoder.fast_options.graphs) == 0 and held(model.encoder) == 0


@torch.no_grad()
def test_shapes_that_do_not_fit_together(gpu, monkeypatch):
    model = build("adaptive")
    dcae_fast.patch(model, cuda_graphs="auto", graph_memory=10 * MIB)
    monkeypatch.setattr(Tape, "size", 6 * MIB)
    encoder, a, b = model.encoder, image(1, 3, 8, 8), image(1, 3, 8, 12)
    captures = 0
    for _ in range(4 * PATIENCE):
        captures += counts(encoder, a)[0] + counts(encoder, b)[0]
        assert held(encoder) <= 10 * MIB and len(encoder.fast_options.graphs) <= 1
    assert captures == 3, "a; b, which does not fit; a again"
    assert counts(encoder, a) == REPLAYED
    several(encoder, b, 12 * PATIENCE)
    assert counts(encoder, b) == REPLAYED, "nobody uses the graph of a"


@torch.no_grad()
def test_modules_share_the_memory(gpu, monkeypatch):
    model, x = build("adaptive"), image(1, 3, 8, 8)
    dcae_fast.patch(model, cuda_graphs="auto", graph_memory=10 * MIB)
    monkeypatch.setattr(Tape, "size", 6 * MIB)
    for _ in range(4):
        model(x)
    assert len(model.encoder.fast_options.graphs) == 1 and len(model.decoder.fast_options.graphs) == 0
    assert held(model.decoder) == 6 * MIB
    dcae_fast.patch(model, cuda_graphs="auto")
    for _ in range(4):
        model(x)
    assert len(model.encoder.fast_options.graphs) == len(model.decoder.fast_options.graphs) == 1


@torch.no_grad()
def test_half_of_the_free_memory(encoder, monkeypatch):
    monkeypatch.setattr(graphs, "free_memory", lambda device: 10 * MIB)
    monkeypatch.setattr(NoPool, "reserved", lambda self: 6 * MIB)
    assert several(encoder, image(1, 3, 8, 8), PATIENCE + 2) == 1 and len(encoder.fast_options.graphs) == 0
    monkeypatch.setattr(graphs, "free_memory", lambda device: 20 * MIB)
    assert several(encoder, image(1, 3, 8, 8), 2 * PATIENCE) == 1 and len(encoder.fast_options.graphs) == 1


@pytest.mark.parametrize("change", STRUCTURE.values(), ids=STRUCTURE)
@torch.no_grad()
def test_changes_drop_the_graph(change, encoder, compare):
    twin, x = copy.deepcopy(encoder), image(1, 3, 8, 8)
    dcae_fast.unpatch(twin)
    assert several(encoder, x, 3) == 1
    change(encoder)
    change(twin)
    expected = twin(x)
    compare("eager", encoder(x), expected, 5e-6)
    assert len(encoder.fast_options.graphs) == 0
    for _ in range(6):
        compare("eager", encoder(x), expected, 5e-6)


@torch.no_grad()
def test_graphs_are_dropped_without_waiting(encoder, monkeypatch):
    """A graph that the GPU still uses is freed in a later call."""
    x = image(1, 3, 8, 8)
    several(encoder, x, 3)
    graph = weakref.ref(next(iter(encoder.fast_options.graphs._graphs.values())))
    with monkeypatch.context() as patch:
        patch.setattr(NoPool, "is_done", lambda self: False)
        patch.setattr(NoPool, "wait", lambda self: pytest.fail("waits for the GPU"))
        encoder.stages[1].register_forward_hook(lambda *_: None)
        for _ in range(3):
            encoder(x)
        assert graph() is not None
    encoder(x)
    assert graph() is None


@pytest.mark.parametrize("is_replaced", [False, True])
@torch.no_grad()
def test_weights_that_move_in_every_call(is_replaced, encoder):
    """Offloading moves weights in every call. Nothing is captured, and former weights are not kept alive."""
    x, expected = image(1, 3, 8, 8), None
    for _ in range(4 * PATIENCE):
        former = [weakref.ref(tensor if is_replaced else tensor.data) for tensor in encoder.parameters()]
        for module in encoder.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and is_replaced:
                    module._parameters[name] = nn.Parameter(parameter.detach().clone())
                elif parameter is not None:
                    parameter.data = parameter.data.clone()
        del parameter
        assert all(tensor() is None for tensor in former)
        before = Tape.captures
        got = encoder(x)
        expected = got if expected is None else expected
        assert torch.equal(got, expected) and Tape.captures == before
    assert several(encoder, x, 16 * PATIENCE) == 1, "captured when the weights stay"


@torch.no_grad()
def test_weights_that_move_now_and_then(encoder):
    x, captures = image(1, 3, 8, 8), 0
    for _ in range(40):
        for parameter in encoder.parameters():
            parameter.data = parameter.data.clone()
        captures += several(encoder, x, 4)
    assert captures <= 8, "each change doubles the number of calls before the next capture"


@torch.no_grad()
def test_hooks_inside(encoder):
    x, seen = image(1, 3, 8, 8), []
    handle = encoder.stages[1].register_forward_hook(lambda *_: seen.append(1))
    assert several(encoder, x, 10) == 0 and len(seen) == 10
    assert encoder.fast_options.graphs._watch is None
    handle.remove()
    assert several(encoder, x, 3 * PATIENCE) == 1


@pytest.mark.parametrize("name", ["strided", "diffusers-strided"])
@torch.no_grad()
def test_offloading_with_accelerate(name, gpu):
    accelerate = pytest.importorskip("accelerate")
    model, x = build(name), image(1, 3, 8, 8)
    expected = model.encoder(x)
    dcae_fast.patch(model, cuda_graphs="auto")
    accelerate.cpu_offload(model, torch.device(DEVICE))
    for _ in range(2 * PATIENCE):
        torch.testing.assert_close(model.encoder(x), expected, atol=1e-4, rtol=1e-4)
        assert all(parameter.is_meta for parameter in model.encoder.parameters())
    assert Tape.captures == 0 and model.encoder.fast_options.graphs._watch is None


@torch.no_grad()
def test_adapters(gpu):
    """LoRA layers drop the graphs. Their results are right in every call, also after a merge."""
    peft = pytest.importorskip("peft")
    network = small_diffusion.build().diffusion_model.to(DEVICE)
    x, t, y = torch.randn(2, 8, 4, 4, device=DEVICE), torch.rand(2, device=DEVICE), torch.tensor([1, 3], device=DEVICE)
    twin = copy.deepcopy(network)
    dcae_fast.patch(network, cuda_graphs="auto")
    for _ in range(4):
        network(x, t, y)
    assert len(network.fast_options.graphs) == 1
    targets = [name for name, module in twin.named_modules() if isinstance(module, nn.Linear)][:3]
    for each in (network, twin):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        peft.inject_adapter_in_model(config, each)
    for is_merged in (False, True):
        for each in (network, twin):
            for module in each.modules():
                if is_merged and isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
                    module.merge()
        for _ in range(6):
            torch.testing.assert_close(network(x, t, y), twin(x, t, y), atol=1e-4, rtol=1e-4)
        assert len(network.fast_options.graphs) == 0


@torch.no_grad()
def test_the_callers_own_capture(gpu, encoder, monkeypatch):
    x = image(1, 3, 8, 8)
    encoder(x)
    with users_capture(monkeypatch):
        not_captured(encoder, x)
        assert gpu.events == 0
    encoder(x)
    with users_capture(monkeypatch):
        not_captured(encoder, x)
    assert counts(encoder, x) == CAPTURED


def test_training_is_neither_timed_nor_captured(gpu, encoder):
    x = image(1, 3, 8, 8)
    not_captured(encoder, x)
    assert encoder(x).requires_grad and gpu.events == 0
    step(encoder, x)
    with torch.no_grad():
        assert several(encoder, x, 3) == 1
        encoder.train()(x)
        not_captured(encoder, x)


@duplicates
@torch.no_grad()
def test_copies_judge_by_themselves(duplicate, gpu):
    model, x = build("adaptive"), image(1, 3, 8, 8)
    dcae_fast.patch(model, cuda_graphs="auto", graph_memory=20 * MIB)
    for _ in range(3):
        model(x)
    twin = duplicate(model)
    options, of_twin = model.encoder.fast_options, twin.encoder.fast_options
    assert len(options.graphs) == 1 and len(of_twin.graphs) == 0
    assert of_twin.graphs._budget is twin.decoder.fast_options.graphs._budget is not options.graphs._budget
    assert of_twin.graphs._budget.limit == 20 * MIB
    for _ in range(3):
        assert torch.equal(twin(x), model(x))
    assert len(of_twin.graphs) == 1


@torch.no_grad()
def test_unpatch_frees_graphs_and_timings(gpu, encoder, monkeypatch):
    x = image(1, 3, 8, 8)
    several(encoder, x, 3)
    monkeypatch.setattr(Gpu, "is_done", False)
    several(encoder, image(1, 3, 8, 12), 2)
    held_graphs = encoder.fast_options.graphs
    known = [weakref.ref(held_graphs), weakref.ref(next(iter(held_graphs._graphs.values())))]
    del held_graphs
    dcae_fast.unpatch(encoder)
    gc.collect()
    assert all(reference() is None for reference in known) and "fast_options" not in vars(encoder)


@torch.no_grad()
def test_a_scope(encoder):
    x = image(1, 3, 8, 8)
    several(encoder, x, 3)
    with dcae_fast.patched(encoder, cuda_graphs="auto", graph_memory=MIB):
        assert encoder.fast_options.graphs._budget.limit == MIB
        assert several(encoder, x, 3) == 1
    assert counts(encoder, x) == REPLAYED


@torch.no_grad()
def test_a_failed_capture_is_not_tried_again(encoder, monkeypatch):
    x = image(1, 3, 8, 8)

    def fail(self, *args):
        raise RuntimeError("operation not permitted")

    several(encoder, x, 2)
    with monkeypatch.context() as patch, pytest.warns(RuntimeWarning, match="no CUDA graph") as caught:
        patch.setattr(Tape, "__init__", fail)
        for _ in range(4):
            encoder(x)
    assert len(caught) == 1 and several(encoder, x, 4 * PATIENCE) == 0


@torch.no_grad()
def test_compiled_models_have_no_graphs(gpu, encoder):
    torch._dynamo.reset()
    not_captured(torch.compile(encoder, fullgraph=True, backend="eager"), image(1, 3, 8, 8))
    assert gpu.events == 0


@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_transformers(autocast, gpu):
    network, twin = with_and_without_graphs(small_diffusion.build().diffusion_model.to(DEVICE), "auto")
    x, t, y = torch.randn(2, 8, 4, 4, device=DEVICE), torch.rand(2, device=DEVICE), torch.tensor([1, 3], device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        assert [counts(network, x, t, y) for _ in range(4)] == [SEEN, SEEN, CAPTURED, REPLAYED]
        assert torch.equal(network(x, t, y), twin(x, t, y))


def test_sampling(gpu):
    model, plain = with_and_without_graphs(small_diffusion.build().to(DEVICE), "auto")
    labels, samples = torch.tensor([3, 1, 10]), []
    for each in (model, plain):
        for seed in range(2):
            samples.append(each.generate(labels, None, 2.0, torch.Generator(DEVICE).manual_seed(seed), steps=12))
    assert torch.equal(samples[0], samples[2]) and torch.equal(samples[1], samples[3])
    assert Tape.captures == len(model.diffusion_model.fast_options.graphs) > 0 and Tape.replays > Tape.captures


def test_the_report_says_what_auto_means():
    model = build("adaptive")
    words = "CUDA graphs: automatic. A repeated inference call is captured"
    assert words in str(dcae_fast.patch(model, cuda_graphs="auto"))
    assert "hold at most 0.5 GiB" in str(dcae_fast.patch(model, cuda_graphs="auto", graph_memory=2**29))
    for value in (False, True):
        assert "CUDA graphs" not in str(dcae_fast.patch(model, cuda_graphs=value))
    assert "CUDA graphs" not in str(dcae_fast.patch(model, cuda_graphs="auto", disable="all"))
    with pytest.raises(ValueError, match="graph_memory=0; expected a positive number of bytes"):
        dcae_fast.patch(model, cuda_graphs="auto", graph_memory=0)


def test_the_numbers_are_stated():
    words = " ".join(dcae_fast.patch.__doc__.split())
    assert f"at most {judge.SHORT} times" in words
    assert f"after {judge.PATIENCE} more calls" in words and f"to {judge.LONGEST}." in words


def test_a_replay_without_memory_for_its_results_is_waited_for(monkeypatch):
    """The GPU computes, although the call fails: the memory of the graph is in use until then."""
    recorded = []
    captured = object.__new__(graphs.Captured)
    captured._pool = SimpleNamespace(replayed=SimpleNamespace(record=recorded.append))
    captured._inputs, captured._graph = [torch.ones(1)], SimpleNamespace(replay=lambda: None)
    captured._results = [None]
    stream = SimpleNamespace(wait_event=lambda event: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)

    def no_memory(self, out, like):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(graphs.Captured, "_copy", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        captured.replay((torch.zeros(1),), cast=False)
    assert recorded == [stream]
