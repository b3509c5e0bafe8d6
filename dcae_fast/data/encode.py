"""Encodes batches of pictures; uploads, computation and downloads of several batches overlap."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from dcae_fast.memory import is_out_of_memory
from dcae_fast.models.autoencoder import DCAE

from .pictures import Crops

MAX_BATCH, CPU_BATCH = 32, 8
BYTES_PER_PIXEL = 2**11  # upper bound on the encoder's tensors, per pixel and per byte of the dtype
MEMORY_FRACTION = 0.8  # of the free memory
QUEUED_BATCHES = 3  # in progress at once, besides the newest


def automatic_batch(model: DCAE, pixels: int) -> int:
    """The number of pictures with so many pixels that fit in the free memory, at least 1, at most `MAX_BATCH`."""
    weight = next(model.parameters())
    if not weight.is_cuda:
        return CPU_BATCH
    free, _ = torch.cuda.mem_get_info(weight.device)
    fitting = int(MEMORY_FRACTION * free / (BYTES_PER_PIXEL * weight.itemsize * pixels))
    return max(1, min(MAX_BATCH, fitting))


class BatchEncoder:
    """Pixels [n, h, w, 3] in 0 … 255 → scaled latents [n, c, h / f, w / f] float32, `batch` pictures per model call.

    A short batch is padded with copies of its last picture, so that all calls have one shape and use the same kernels:
    a latent does not depend on the batch its picture is in. After an out-of-memory error, `batch` is halved.
    """

    def __init__(self, model: DCAE, scaling_factor: float, batch: int):
        if batch < 1:
            raise ValueError(f"batch={batch}; expected at least 1")
        self.model, self.scaling_factor, self.batch = model, scaling_factor, batch
        self.dtype = next(model.parameters()).dtype

    @torch.inference_mode()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        while True:
            try:
                return torch.cat([self._encode(part) for part in pixels.split(self.batch)])
            except (RuntimeError, MemoryError) as error:
                if self.batch == 1 or not is_out_of_memory(error):
                    raise
            self.batch //= 2  # outside the handler, which keeps the failed call's tensors alive
            torch.cuda.empty_cache()

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        n = len(pixels)
        if n < self.batch:
            pixels = torch.cat([pixels, pixels[-1:].expand(self.batch - n, -1, -1, -1)])
        x = (pixels.permute(0, 3, 1, 2) / 255).mul_(2).sub_(1)  # float32, channels-last
        return self.model.encode(x.to(self.dtype))[:n].float().contiguous() * self.scaling_factor


class Done(NamedTuple):
    """A finished batch. result: returned by `finish`; seconds: in which the device computed."""

    crops: Crops
    result: Any
    seconds: float


def encode_batches(
    batches: Iterable[Crops],
    encode: BatchEncoder,
    dtype: torch.dtype,
    finish: Callable[[list[int], torch.Tensor], Any],
    threads: int,
) -> Iterator[Done]:
    """Encodes each batch and calls finish(picture numbers, latents in `dtype` on the CPU) in worker threads, in order.

    Several batches are in progress at once, so that the device and the threads do not wait for each other.
    """
    with ThreadPoolExecutor(threads) as pool:
        queue: deque[tuple[Crops, Future]] = deque()
        launch = Launcher(encode, dtype)
        for crops in batches:
            queue.append((crops, pool.submit(_finish, launch(crops.pixels), crops.indices, finish)))
            if len(queue) > QUEUED_BATCHES:
                yield _done(*queue.popleft())
        while queue:
            yield _done(*queue.popleft())


PendingLatents = Callable[[], tuple[torch.Tensor, float]]  # waits; returns the latents and the seconds of the device


class Launcher:
    """Starts to encode a batch. On CUDA it does not wait, and the upload overlaps with the computation before."""

    def __init__(self, encode: BatchEncoder, dtype: torch.dtype):
        self.encode, self.dtype = encode, dtype
        self.device = next(encode.model.parameters()).device
        self._upload = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def __call__(self, pixels: torch.Tensor) -> PendingLatents:
        if len(pixels) == 0:
            return lambda: (torch.empty(0, 0, 0, 0, dtype=self.dtype), 0.0)
        if self._upload is None:
            begin = time.perf_counter()
            latents = self.encode(pixels.to(self.device)).to(self.dtype).cpu()
            seconds = time.perf_counter() - begin
            return lambda: (latents, seconds)
        return self._launch_on_cuda(pixels)

    def _launch_on_cuda(self, pixels: torch.Tensor) -> PendingLatents:
        compute = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._upload):
            x = pixels.to(self.device, non_blocking=True)
        compute.wait_stream(self._upload)
        x.record_stream(compute)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(compute)
        z = self.encode(x).to(self.dtype)
        latents = torch.empty(z.shape, dtype=z.dtype, pin_memory=True)
        latents.copy_(z, non_blocking=True)
        end.record(compute)

        def wait() -> tuple[torch.Tensor, float]:
            end.synchronize()
            return latents, begin.elapsed_time(end) / 1000

        return wait


def _finish(
    wait: PendingLatents, indices: list[int], finish: Callable[[list[int], torch.Tensor], Any]
) -> tuple[Any, float]:
    latents, seconds = wait()
    return finish(indices, latents), seconds


def _done(crops: Crops, future: Future) -> Done:
    return Done(crops, *future.result())
