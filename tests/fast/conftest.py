from collections import Counter

import graph_tape
import pytest
import torch
from small_models import DEVICE, GRADIENT, OUTPUT

from dcae_fast.fast import graphs, int8
from dcae_fast.models.autoencoder import DCAE
from dcae_fast.models.zoo import autoencoder_config
from dcae_fast.ops import _library


@pytest.fixture
def same_step(compare):
    """same_step(got, expected, what): asserts that two results of `step` agree to float32 accuracy."""

    def check(got: dict, expected: dict, what: str = "") -> None:
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            limit = GRADIENT if name.startswith("gradient") else OUTPUT
            assert got[name].dtype == value.dtype, f"{what} {name}"
            compare("eager", got[name], value, limit, f"{what} {name}")

    return check


@pytest.fixture
def tape(monkeypatch) -> type[graph_tape.Tape]:
    """Replaces CUDA graphs with `Tape` during a test, so that calls are captured on any machine."""
    monkeypatch.setattr(graphs, "Captured", graph_tape.Tape)
    monkeypatch.setattr(graphs, "Pool", graph_tape.NoPool)
    monkeypatch.setattr(graphs, "can_graph", graph_tape.can_graph)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    graph_tape.Tape.captures = graph_tape.Tape.replays = graph_tape.Tape.casts = 0
    return graph_tape.Tape


@pytest.fixture(scope="module")
def large() -> DCAE:
    """A model of usual size."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = DCAE(autoencoder_config("dc-ae-f32c32-in-1.0")).bfloat16().eval()
    return model.to(memory_format=torch.channels_last)


@pytest.fixture
def int8_calls(monkeypatch) -> Counter[str]:
    """How often each operator was called, for tests of 8 bit. On a CPU the operators run their references, which are
    faster than the interpreter.
    """
    if not int8.runs_on(torch.device(DEVICE)):
        pytest.skip("8-bit convolutions need a Hopper GPU")
    calls, call = Counter(), _library.Operator.__call__

    def count(self, *args):
        calls[self.overload.name().partition("::")[2]] += 1
        return call(self, *args) if DEVICE == "cuda" else _library.as_channels_last(self.reference(*args))

    monkeypatch.setattr(_library.Operator, "__call__", count)
    return calls
