"""Classifier-free guidance against the original implementation, and within an interval."""

import pytest
import torch
from networks import build

from dcae_fast.sampling import guided

FORWARD, ORIGINAL = 2e-6, 5e-6


@pytest.mark.parametrize("which", ["uvit", "usit", "dit", "sit"])
@pytest.mark.parametrize("scale", [1.5, 6.0])
@torch.no_grad()
def test_guided(which, scale, open_case, compare):
    """In float64 against the original; in float32 at most twice the error of the formula by hand.

    The fixture has another time for each label, and states in the second half that must be ignored.
    """
    case = open_case(f"diffusion_{which}", "cfg")
    tensors, null_label = case.tensors("cfg"), case.file_meta["config"]["num_classes"]
    labels = tensors["y"][: len(tensors["y"]) // 2]

    def by_hand(model, label, x, t):
        with_label, without = (model(x, torch.tensor([t], dtype=x.dtype), y) for y in (label, 0 * label + null_label))
        guided_channels = without + scale * (with_label - without)
        return torch.cat([guided_channels[:, : x.shape[1]], with_label[:, x.shape[1] :]], dim=1)

    def ours(model, label, x, t):
        return guided(model, label, null_label, scale)(x, t)

    def run(function, dtype: torch.dtype) -> torch.Tensor:
        model = build(case).to(dtype)
        each = zip(labels, tensors["x"], tensors["t"], strict=False)
        return torch.cat([function(model, label[None], x[None].to(dtype), t.item()) for label, x, t in each])

    exact, eager = run(ours, torch.float64), run(by_hand, torch.float32)
    compare(case.file, tensors[f"out_scale{scale}"][: len(labels)], exact, ORIGINAL, f"the original's, scale {scale}")
    eagers_error = ((eager - exact).norm() / exact.norm()).item()
    compare(case.file, run(ours, torch.float32), exact, max(FORWARD, 2 * eagers_error), f"out, scale {scale}")


def record(calls: list):
    """A network whose output depends on the label and has one more channel. Records the batches of its calls."""

    def network(x, t, y):
        calls.append((x, t, y))
        return y.view(-1, 1, 1, 1).float().expand(-1, x.shape[1] + 1, 2, 2)

    return network


def test_scale_1_runs_the_conditional_network_alone():
    calls, x = [], torch.zeros(2, 3, 2, 2)
    out = guided(record(calls), torch.tensor([4, 5]), null_label=10)(x, 7.5)
    ((seen, t, y),) = calls
    assert seen is x and t.tolist() == [7.5, 7.5] and t.dtype == torch.float32 and y.tolist() == [4, 5]
    assert out[:, 0, 0, 0].tolist() == [4, 5]


def test_both_halves_in_one_batch_and_conditional_further_channels():
    calls, x = [], torch.randn(2, 3, 2, 2)
    out = guided(record(calls), torch.tensor([4, 5]), null_label=10, scale=2)(x, 7.5)
    ((seen, t, y),) = calls
    assert torch.equal(seen, torch.cat([x, x])) and t.tolist() == [7.5] * 4 and y.tolist() == [4, 5, 10, 10]
    assert out[:, :3].flatten(1).tolist() == [[-2.0] * 12, [0.0] * 12]
    assert out[:, 3:].flatten(1).tolist() == [[4.0] * 4, [5.0] * 4]


def test_interval():
    calls = []
    network = guided(record(calls), torch.tensor([4]), null_label=10, scale=2, interval=(0.2, 0.8))
    guided_at = {t: network(torch.zeros(1, 3, 2, 2), t)[0, 0, 0, 0].item() for t in (0.0, 0.19, 0.2, 0.8, 0.81)}
    assert guided_at == {0.0: 4, 0.19: 4, 0.2: -2, 0.8: -2, 0.81: 4}
    assert [len(x) for x, _, _ in calls] == [1, 1, 2, 2, 1]


def test_half_precision_network():
    """The guided output has the dtype of the sampler's state."""
    network = guided(lambda x, t, y: x.bfloat16(), torch.tensor([4, 5]), null_label=10, scale=1.5)
    assert network(torch.randn(2, 3, 2, 2), 1.0).dtype == torch.float32


def test_wrong_interval():
    with pytest.raises(ValueError, match=r"interval=\(0.8, 0.2\)"):
        guided(lambda x, t, y: x, torch.tensor([0]), null_label=10, scale=2, interval=(0.8, 0.2))
