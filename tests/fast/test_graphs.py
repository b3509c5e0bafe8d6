"""Which whole calls are captured as CUDA graphs, replayed, or run without a graph.

Needs no GPU: `Tape` replaces the CUDA graphs and calls the function again.
"""

import contextlib
import copy
import warnings
import weakref

import pytest
import torch
from graph_tape import CAPTURED, REPLAYED, SEEN, Tape, counts, not_captured
from small_models import DEVICE, build, build_block, duplicates, image, step
from test_interference import CHANGES
from torch import nn
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

import dcae_fast
from dcae_fast.fast import graphs


@pytest.fixture
def encoder() -> nn.Module:
    model = build("adaptive")
    dcae_fast.patch(model, cuda_graphs=True)
    return model.encoder


# Which calls share a graph.


@torch.no_grad()
def test_captured_the_second_time(tape, encoder):
    x = image(1, 3, 8, 8)
    expected = encoder(x)
    assert counts(encoder, x) == CAPTURED
    assert counts(encoder, x) == REPLAYED
    assert torch.equal(encoder(x), expected)


@torch.no_grad()
def test_kinds_of_calls(tape, encoder, monkeypatch):
    def settle(*args, **kwargs):
        assert counts(encoder, *args, **kwargs) == SEEN
        assert counts(encoder, *args, **kwargs) == CAPTURED
        assert counts(encoder, *args, **kwargs) == REPLAYED

    x = image(1, 3, 8, 8)
    settle(x)
    settle(image(2, 3, 8, 8))
    settle(x, 3)
    settle(x, latent_channels=[3, 5])
    settle(x, [5, 3])
    for latent, channels in zip(encoder(x, [5, 3]), [5, 3], strict=True):
        assert latent.shape[1] == channels
    assert counts(encoder, x.contiguous(memory_format=torch.channels_last)) == REPLAYED
    assert counts(encoder, x.mT.contiguous().mT) == REPLAYED
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark)
    settle(x)
    encoder.requires_grad_(False)
    with torch.enable_grad():
        settle(x)


@contextlib.contextmanager
def deterministic():
    torch._C._set_deterministic_algorithms(True)  # the public function imports Inductor, which takes seconds
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(False)


SETTINGS = {
    "deterministic": deterministic,
    "cudnn disabled": lambda: torch.backends.cudnn.flags(enabled=False),
    "cudnn deterministic": lambda: torch.backends.cudnn.flags(enabled=True, deterministic=True),
    "attention": lambda: sdpa_kernel([SDPBackend.MATH]),
    "order of attention": lambda: sdpa_kernel([*_BACKENDS[1:], _BACKENDS[0]], set_priority=True),
}
_BACKENDS = _cur_sdpa_kernel_backends(with_priority=True)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_a_graph_for_each_setting_that_changes_results(setting, tape):
    def key():
        return graphs.call_key((image(1, 3, 8, 8),), {}, network=False, under_autocast=False)

    usual = key()
    with setting():
        assert key() == key() != usual
    assert key() == usual is not None


@torch.no_grad()
def test_the_least_recently_used_is_dropped(tape, encoder, monkeypatch):
    monkeypatch.setattr(graphs, "LIMIT", 2)
    a, b, c = (image(1, 3, 8, width) for width in (8, 12, 16))
    for x in (a, b):
        encoder(x)
        encoder(x)
    assert counts(encoder, a) == REPLAYED
    encoder(c)
    assert counts(encoder, c) == CAPTURED and len(encoder.fast_options.graphs) == 2
    assert counts(encoder, a) == REPLAYED
    assert counts(encoder, b)[0] == 1
    assert len(encoder.fast_options.graphs) == 2


@torch.no_grad()
def test_calls_that_are_left_alone(tape, encoder):
    x = image(1, 3, 8, 8)
    encoder(x)
    encoder(x)
    with torch.autocast(DEVICE, torch.bfloat16):
        not_captured(encoder, x)
    with FlopCounterMode(display=False):
        not_captured(encoder, x)
    not_captured(encoder, x[:0])
    not_captured(encoder.double(), x.double())


@torch.no_grad()
def test_the_first_input_by_name(tape, encoder):
    x = image(1, 3, 8, 8)
    for expected in (SEEN, CAPTURED, REPLAYED):
        assert counts(encoder, x=x) == expected
    assert counts(encoder, x) == REPLAYED


@torch.no_grad()
def test_nothing_is_kept_of_weights_that_are_gone(tape, encoder):
    """Replaced weights and their graphs are freed even if the next call cannot be captured."""
    x = image(1, 3, 8, 8)
    for _ in range(2):
        encoder(x)
    former = weakref.ref(next(encoder.parameters()))
    encoder.load_state_dict({name: value.clone() for name, value in encoder.state_dict().items()}, assign=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        encoder(x)
    assert len(encoder.fast_options.graphs) == 0 and former() is None


@torch.no_grad()
def test_calls_of_transforms(tape, encoder):
    x = image(1, 3, 8, 8)
    not_captured(torch.func.vmap(encoder), x[None])
    with torch.autograd.forward_ad.dual_level():
        not_captured(encoder, x)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated:DeprecationWarning")
@torch.no_grad()
def test_a_trace_meets_no_graph(tape, encoder):
    """A trace records the operators that run, not the output that a graph left in memory."""
    x, other = image(1, 3, 8, 8), image(1, 3, 8, 8, seed=1)
    for _ in range(2):
        encoder(x)
    before = tape.captures, tape.replays
    traced = torch.jit.trace(encoder, x, check_trace=False)
    assert (tape.captures, tape.replays) == before
    torch.testing.assert_close(traced(other), encoder(other))


@contextlib.contextmanager
def users_capture(monkeypatch):
    """Simulates a CUDA graph capture by the user. `NoPool.wait` fails during this capture."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        yield


@pytest.mark.parametrize("change", ["new address", "unpatched"])
@torch.no_grad()
def test_nothing_is_waited_for_in_a_capture(change, tape, encoder, monkeypatch):
    x = image(1, 3, 8, 8)
    for _ in range(2):
        expected = encoder(x)
    graph = weakref.ref(next(iter(encoder.fast_options.graphs._graphs.values())))
    with users_capture(monkeypatch):
        not_captured(encoder, x)
        if change == "unpatched":
            dcae_fast.unpatch(encoder)
        else:
            for parameter in encoder.parameters():
                parameter.data = -parameter.data
        assert torch.allclose(encoder(x), expected, atol=1e-5) == (change == "unpatched")
        assert graph() is not None
    dcae_fast.patch(encoder, cuda_graphs=True)
    encoder(x)
    assert graph() is None, "freed when nobody captures any more"


def test_default_device(tape, encoder):
    """A default device is a mode of PyTorch that changes no operator."""
    with torch.no_grad(), torch.device(DEVICE):
        x = image(1, 3, 8, 8)
        encoder(x)
        assert counts(encoder, x) == CAPTURED


def test_gradients_are_never_lost(tape, encoder):
    x = image(1, 3, 8, 8)
    not_captured(encoder, x)
    assert encoder(x).requires_grad
    with torch.no_grad():
        encoder(x)
        encoder(x)
        assert counts(encoder, x.clone().requires_grad_()) == REPLAYED
    assert encoder(x).requires_grad
    encoder.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    encoder(x)
    encoder(x)
    assert counts(encoder, x) == REPLAYED
    not_captured(encoder, leaf)
    assert torch.autograd.grad(encoder(leaf).sum(), leaf)[0].isfinite().all()
    next(encoder.parameters()).requires_grad_()
    assert encoder(x).requires_grad


def test_training_is_left_alone(tape):
    model, x = build("strided"), image(1, 3, 8, 8)
    dcae_fast.patch(model, cuda_graphs=True)
    decoder = model.decoder.train()
    with torch.no_grad():
        z = model.encoder(x)
        not_captured(decoder, z)
        before = [buffer.clone() for buffer in decoder.buffers()]
        decoder(z)
        changed = [not torch.equal(a, b) for a, b in zip(before, decoder.buffers(), strict=True)]
        assert changed and all(changed)
        decoder.eval()
        decoder(z)
        assert counts(decoder, z) == CAPTURED
    step(model, x)


@torch.no_grad()
def test_parts_are_not_captured(tape):
    model, x = build("adaptive"), image(1, 3, 64, 8)
    dcae_fast.patch(model, cuda_graphs=True, max_memory=1)
    not_captured(model.encoder, x)


# Changes to the model after a capture.


@pytest.mark.parametrize("change", ["edited in place", "loaded", "optimizer", "running statistics"])
def test_weights_written_in_place_need_no_new_graph(change, tape, compare):
    model, twin, z = build("strided"), build("strided"), image(1, 8, 4, 4)
    dcae_fast.patch(model, cuda_graphs=True)
    with torch.no_grad():
        model.decoder(z)
        before = model.decoder(z)
    for each in (model, twin):
        CHANGES[change](each)
    with torch.no_grad():
        assert counts(model.decoder, z) == REPLAYED
        compare("eager", model.decoder(z), twin.decoder(z), 5e-6)
        assert not torch.equal(model.decoder(z), before)


def hooked(coder: nn.Module) -> None:
    coder.stages[1].op_list[0].main.conv1.act.register_forward_hook(lambda module, args, output: 2 * output)


def own_forward(coder: nn.Module) -> None:
    act = coder.stages[1].op_list[0].main.conv1.act
    act.forward = lambda x: x.sin()


def parametrised(coder: nn.Module) -> None:
    conv = coder.stages[1].op_list[0].main.conv1.conv
    parametrizations.weight_norm(conv)
    conv.parametrizations.weight.original0.mul_(2)


STRUCTURE = {
    **{name: CHANGES[name] for name in ("assigned", "half and back", "replaced")},
    "replaced activation": lambda coder: setattr(coder.stages[1].op_list[0].main.conv1, "act", nn.ReLU()),
    "removed layer": lambda coder: coder.stages[1].op_list.__delitem__(0),
    "attribute": lambda coder: setattr(coder.stages[1].op_list[0].main.conv2.norm, "eps", 10.0),
    "class": lambda coder: setattr(coder.stages[1].op_list[0].main.conv1.act, "__class__", nn.ReLU),
    "hook": hooked,
    "own forward": own_forward,
    "parametrisation": parametrised,
    "unpatched part": lambda coder: dcae_fast.unpatch(coder.stages),
    "new address": lambda coder: [setattr(p, "data", 2 * p.data) for p in coder.parameters()],
    "training": lambda coder: coder.stages.train(),
}


@pytest.mark.parametrize("change", STRUCTURE.values(), ids=STRUCTURE)
@torch.no_grad()
def test_other_changes_drop_the_graph(change, tape, encoder, compare):
    """The first call after a change runs without a graph. The first call and later calls give the correct result."""
    twin, x = copy.deepcopy(encoder), image(1, 3, 8, 8)
    dcae_fast.unpatch(twin)
    for _ in range(2):
        encoder(x)
    change(encoder)
    change(twin)
    expected, got = twin(x), encoder(x)
    compare("eager", got, expected, 5e-6)
    assert len(encoder.fast_options.graphs) == 0
    for _ in range(2):
        compare("eager", encoder(x), expected, 5e-6)


@torch.no_grad()
def test_after_a_hook_is_removed(tape, encoder):
    x = image(1, 3, 8, 8)
    handle = encoder.stages[1].register_forward_hook(lambda *_: None)
    not_captured(encoder, x)
    handle.remove()
    encoder(x)
    assert counts(encoder, x) == CAPTURED
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        not_captured(encoder, x)
    finally:
        handle.remove()
    assert counts(encoder, x) == REPLAYED


@torch.no_grad()
def test_hooks_of_the_coder_run_around_the_graph(tape, encoder):
    x, seen = image(1, 3, 8, 8), []
    encoder.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    for _ in range(3):
        encoder(x)
    assert tape.replays == 2 and len(seen) == 3


@torch.no_grad()
def test_unknown_modules_are_left_alone(tape, encoder):
    class Doubled(nn.ReLU):
        def forward(self, x):
            return 2 * super().forward(x)

    encoder.stages[1].op_list[0].main.conv1.act = Doubled()
    not_captured(encoder, image(1, 3, 8, 8))


@torch.no_grad()
def test_weights_of_somebody_else(tape, encoder):
    """functional_call uses other tensors as weights in each call.

    No graph is captured for these calls, and each call uses the given weights.
    """
    x = image(1, 3, 8, 8)
    for _ in range(2):
        expected = encoder(x)
    for factor in (1.0, 2.0, 0.5):
        weights = {name: factor * p for name, p in encoder.named_parameters()}
        before = tape.captures
        got = torch.func.functional_call(encoder, weights, x)
        assert tape.captures == before
        assert torch.equal(got, expected) == (factor == 1.0)
    assert torch.equal(encoder(x), expected)


# Which modules have graphs.


def test_options_come_and_go(tape):
    model, x = build("adaptive"), image(1, 3, 8, 8)
    attributes = [set(vars(module)) for module in model.modules()]
    keys = model.state_dict().keys()
    dcae_fast.patch(model, cuda_graphs=True, max_memory=2**40)
    assert model.state_dict().keys() == keys
    with torch.no_grad():
        for _ in range(2):
            model(x)
    assert tape.captures == 2
    captured = weakref.ref(next(iter(model.encoder.fast_options.graphs._graphs.values())))
    dcae_fast.patch(model, cuda_graphs=False, max_memory=2**30)
    assert captured() is None, "graphs are freed at once"
    assert model.encoder.fast_options.graphs is None and model.encoder.fast_options.max_memory == 2**30
    dcae_fast.patch(model, cuda_graphs=False)
    assert [set(vars(module)) for module in model.modules()] == attributes
    dcae_fast.patch(model, cuda_graphs=True)
    dcae_fast.patch(model, disable="all", cuda_graphs=True)
    assert [set(vars(module)) for module in model.modules()] == attributes
    dcae_fast.patch(model, cuda_graphs=True)
    with torch.no_grad():
        for _ in range(2):
            model(x)
    captured = weakref.ref(next(iter(model.decoder.fast_options.graphs._graphs.values())))
    dcae_fast.unpatch(model)
    assert captured() is None
    assert [set(vars(module)) for module in model.modules()] == attributes


@pytest.mark.parametrize("bound", [0, -1])
def test_bad_bound(bound):
    model = build("adaptive")
    with pytest.raises(ValueError, match=f"max_memory={bound}; expected a positive number"):
        dcae_fast.patch(model, max_memory=bound)
    with pytest.raises(ValueError), dcae_fast.patched(model, max_memory=bound):
        pass
    assert not any("fast_options" in vars(module) for module in model.modules())


@torch.no_grad()
def test_options_of_a_scope(tape, encoder):
    x, outer = image(1, 3, 8, 8), encoder.fast_options
    for _ in range(2):
        encoder(x)
    with dcae_fast.patched(encoder, cuda_graphs=False, max_memory=2**30):
        assert encoder.fast_options.max_memory == 2**30
        not_captured(encoder, x)
    assert encoder.fast_options is outer
    assert counts(encoder, x) == REPLAYED
    with pytest.raises(ValueError), dcae_fast.patched(encoder, disable="nothing", cuda_graphs=True):
        pass
    assert encoder.fast_options is outer
    dcae_fast.unpatch(encoder)
    with dcae_fast.patched(encoder, cuda_graphs=True):
        encoder(x)
        assert counts(encoder, x) == CAPTURED
    assert "fast_options" not in vars(encoder)


@duplicates
@torch.no_grad()
def test_copies_have_options_but_no_graphs(duplicate, tape):
    model, x = build("adaptive"), image(1, 3, 8, 8)
    dcae_fast.patch(model, cuda_graphs=True, max_memory=2**40)
    for _ in range(2):
        expected = model(x)
    twin = duplicate(model)
    assert twin.encoder.fast_options.max_memory == 2**40
    assert len(model.encoder.fast_options.graphs) == 1 and len(twin.encoder.fast_options.graphs) == 0
    for parameter in twin.parameters():
        parameter.mul_(2)
    for _ in range(3):
        assert not torch.equal(twin(x), expected)
        assert torch.equal(model(x), expected)
    assert len(twin.encoder.fast_options.graphs) == 1


@torch.no_grad()
def test_a_failed_capture_is_not_tried_again(tape, encoder, monkeypatch):
    a, b = image(1, 3, 8, 8), image(2, 3, 8, 8)
    expected = encoder(a)

    def fail(self, *args):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    with monkeypatch.context() as patch, pytest.warns(RuntimeWarning) as caught:
        patch.setattr(Tape, "__init__", fail)
        assert torch.equal(encoder(a), expected)
    reason = "no CUDA graph for an input of shape [1, 3, 8, 8]: operation not permitted"
    assert [str(warning.message) for warning in caught] == [reason]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        not_captured(encoder, a)
        encoder(b)
        assert counts(encoder, b) == CAPTURED


@torch.no_grad()
def test_compiled_models_have_no_graphs(tape, encoder):
    x = image(1, 3, 8, 8)
    torch._dynamo.reset()
    not_captured(torch.compile(encoder, fullgraph=True, backend="eager"), x)


def test_blocks_alone_have_no_options():
    block, x = build_block("ResBlock")
    dcae_fast.patch(block, cuda_graphs=True, max_memory=1)
    assert not any("fast_options" in vars(module) for module in block.modules())
    assert block(x).shape == x.shape
