"""dcae_fast._C.autocast_cast: copies of weights live as long as autocast, and follow changes that autograd counts."""

import threading

import pytest
import torch

_C = pytest.importorskip("dcae_fast._C")
DEVICE, BF16 = "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16


def cast(weight, dtype=BF16):
    return _C.autocast_cast(weight, dtype)


def autocast(**options):
    return torch.autocast(DEVICE, BF16, **options)


@pytest.fixture
def weight():
    return torch.nn.Parameter(torch.randn(8, 8, device=DEVICE))


def replace(weight):
    weight.data = torch.randn_like(weight)


CHANGES = {
    "in place": lambda weight: weight.mul_(2),
    "load_state_dict": lambda weight: weight.copy_(torch.randn_like(weight)),
    "an optimizer": lambda weight: torch._foreach_add_([weight], 1),
    "other storage": replace,
}
MODES = [torch.no_grad, torch.inference_mode]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_copies_are_kept_until_the_weight_changes(weight, change, mode):
    other = torch.nn.Parameter(torch.randn(8, device=DEVICE))
    with autocast():
        for _ in range(2):
            with mode():
                copy = cast(weight)
                assert torch.equal(copy, weight.to(BF16))
                assert cast(weight) is copy and cast(other) is cast(other)
            with torch.no_grad():
                change(weight)


@pytest.mark.parametrize("mode", MODES)
def test_copies_are_dropped_when_autocast_ends(weight, mode):
    for _ in range(3):
        with mode(), autocast():
            assert torch.equal(cast(weight), weight.to(BF16))
        weight.data.add_(1)  # which autograd does not count


def test_code_that_switches_autocast_off_while_it_runs(weight):
    """As torch.compile's code does."""
    with torch.no_grad(), autocast():
        copy = cast(weight)
        with torch._C._DisableAutocast():
            assert cast(weight) is copy


def test_what_is_not_kept(weight):
    with torch.no_grad():
        assert cast(weight) is not cast(weight)
        with autocast(cache_enabled=False):
            assert cast(weight) is not cast(weight)
        with autocast():
            assert cast(weight, torch.float16) is not cast(weight, torch.float16), "not the type of the autocast"
            for other in (weight.detach(), weight[1:], weight.half()):
                assert torch.equal(cast(other), other.to(BF16))
                assert cast(other) is not cast(other)
            assert cast(weight, torch.float32) is weight


def test_an_autocast_inside_another_has_its_own_type(weight):
    with torch.no_grad(), autocast():
        for dtype in (BF16, torch.float16):
            with torch.autocast(DEVICE, dtype):
                assert torch.equal(cast(weight, dtype), weight.to(dtype))


def test_a_type_that_autocast_leaves_as_it_is():
    weight = torch.nn.Parameter(torch.randn(8, device=DEVICE, dtype=torch.float64))
    with torch.no_grad(), autocast():
        assert torch.equal(cast(weight), weight.to(BF16))


def test_parameters_that_count_no_changes():
    with torch.inference_mode(), autocast():
        weight = torch.nn.Parameter(torch.randn(8, device=DEVICE))
        cast(weight)
        weight.add_(1)
        assert torch.equal(cast(weight), weight.to(BF16))


def test_a_change_after_many_other_weights(weight):
    """Only 2¹⁶ weights are remembered."""
    others = [torch.nn.Parameter(torch.empty(1, device=DEVICE)) for _ in range(2**16)]
    with torch.no_grad(), autocast():
        cast(weight)
        for other in others[:-1]:
            cast(other)
        weight.add_(1)
        cast(others[-1])
        assert torch.equal(cast(weight), weight.to(BF16))


def test_a_training_step_in_between(weight):
    """Fused optimizers of PyTorch 2.11 do not count their changes on a GPU."""
    with torch.no_grad(), autocast():
        copy = cast(weight)
        assert torch.equal(_C.autocast_cast(weight, BF16, trains=True), copy)
        weight.data.add_(1)
        changed = cast(weight)
        assert torch.equal(changed, weight.to(BF16)) and cast(weight) is changed


def test_the_gradient(weight):
    with autocast():
        cast(weight).sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_threads_that_change_weights_side_by_side():
    """All threads share the cache of autocast."""
    finished = []

    def run():
        weights = [torch.nn.Parameter(torch.randn(16, 16, device=DEVICE)) for _ in range(20)]
        for _ in range(50):
            with torch.no_grad(), autocast():
                for weight in weights:
                    cast(weight)
                    weight.add_(1)
                    assert torch.equal(cast(weight), weight.to(BF16))
        finished.append(weights)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "they wait for each other"
    assert len(finished) == len(threads)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
def test_on_another_stream_nothing_is_kept(weight):
    with torch.no_grad(), autocast():
        copy = cast(weight)
        with torch.cuda.stream(torch.cuda.Stream()):
            assert cast(weight) is not cast(weight)
        assert cast(weight) is copy
