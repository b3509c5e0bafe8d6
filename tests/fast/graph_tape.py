"""A substitute for CUDA graphs on machines without a GPU. Counts captures and replays."""

import torch

from dcae_fast import ops


class Tape:
    """Substitute for a captured graph. A replay calls the function again.

    Counts captures, replays and casts of weights. size: bytes that a graph seems to take.
    """

    captures = replays = casts = size = 0

    def __init__(self, pool, casts, layout, function, args, kwargs):
        Tape.captures += 1
        self.copies, self.device, self.function, self.kwargs = casts, args[0].device, function, kwargs
        with casts.once(self.device):
            function(*args, **kwargs)

    def replay(self, args, cast):
        Tape.replays += 1
        if cast:
            Tape.casts += 1
            self.copies.refresh()
        with self.copies.once(self.device):
            return self.function(*args, **self.kwargs)


class NoPool:
    def __init__(self, device):
        self.device = device

    def reserved(self):
        return 0

    def is_done(self):
        return True

    def wait(self):
        assert not torch.cuda.is_current_stream_capturing(), "that would spoil the capture"


def can_graph(x: torch.Tensor) -> bool:
    return x.numel() > 0 and ops.has_kernels(x) and not torch.cuda.is_current_stream_capturing()


SEEN, CAPTURED, REPLAYED = (0, 0), (1, 1), (0, 1)


def counts(function, *args, **kwargs) -> tuple[int, int]:
    """Number of captures and number of replays in one call."""
    before = Tape.captures, Tape.replays
    function(*args, **kwargs)
    return Tape.captures - before[0], Tape.replays - before[1]


def not_captured(function, *args, **kwargs) -> None:
    for _ in range(3):
        assert counts(function, *args, **kwargs) == SEEN
