"""The peak rates of the machine, measured in the same run: the basis of the lower bounds ("floors") on times."""

from dataclasses import dataclass

import torch

from .timing import measure


@dataclass(frozen=True)
class Ceilings:
    """tflops: TFLOP/s of a large bf16 matrix product. copy: TB/s of a large copy on the device, reads plus writes."""

    tflops: float
    copy: float

    def floor(self, flops: float, bytes_moved: float = 0) -> float:
        """A lower bound on the time of the work, in milliseconds."""
        return max(flops / (self.tflops * 1e9), bytes_moved / (self.copy * 1e9))


def measure_ceilings(device: torch.device) -> Ceilings:
    size, elements = (8192, 2**30) if device.type == "cuda" else (256, 2**20)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(0, 2**15, (elements,), device=device, dtype=torch.int16)
    target = torch.empty_like(source)
    runs = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    for run in (*runs.values(), *runs.values()):  # warm-up
        run()
    times = measure(runs, seconds=0.2)
    copied = 2 * source.numel() * source.element_size()
    return Ceilings(2 * size**3 / times["product"].median / 1e9, copied / times["copy"].median / 1e9)
