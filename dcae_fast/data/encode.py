"""Batches of pictures through an encoder: uploads, computation and downloads of several batches at a time."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from dcae_fast.memory import is_out_of_memory
from dcae_fast.models.autoencoder import DCAE

from .pictures import Crops

LARGEST, ON_CPU = 32, 8  # pictures at once
BYTES = 2**11  # that the encoder's tensors have for a pixel and byte of the dtype, at most
SHARE = 0.8  # of the free memory, which they may fill
DEPTH = 3  # batches that are under way besides the newest


def automatic_batch(model: DCAE, resolution: int) -> int:
    """How many pictures of resolution² pixels to encode at once: what the free memory holds, within reason."""
    weight = next(model.parameters())
    if not weight.is_cuda:
        return ON_CPU
    free, _ = torch.cuda.mem_get_info(weight.device)
    fitting = int(SHARE * free / (BYTES * weight.itemsize * resolution**2))
    return max(1, min(LARGEST, fitting))


class BatchEncoder:
    """Pixels [n, h, w, 3] from 0 to 255 → scaled latents [n, c, h / f, w / f] float32, in calls of `batch` pictures.

    A short batch is filled up with its last picture: one shape means one choice of kernels, so that a latent does not
    depend on how the pictures fell into batches. `batch` is halved where it does not fit in memory.
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
            self.batch //= 2  # outside of the handler, which keeps the failed call's tensors alive
            torch.cuda.empty_cache()

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        n = len(pixels)
        if n < self.batch:
            pixels = torch.cat([pixels, pixels[-1:].expand(self.batch - n, -1, -1, -1)])
        x = (pixels.permute(0, 3, 1, 2) / 255).mul_(2).sub_(1)  # float32, channels-last
        return self.model.encode(x.to(self.dtype))[:n].float().contiguous() * self.scaling_factor


class Done(NamedTuple):
    """A batch that is finished: what was read, what `finish` returned, and how long the device computed."""

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
    """Calls finish(numbers, latents of `dtype` on the CPU) for each batch, in threads that take the batches in order.

    Several batches are under way, so that neither the device nor the threads wait for each other.
    """
    with ThreadPoolExecutor(threads) as pool:
        under_way: deque[tuple[Crops, Future]] = deque()
        launch = Launcher(encode, dtype)
        for crops in batches:
            under_way.append((crops, pool.submit(_finish, launch(crops.pixels), crops.indices, finish)))
            if len(under_way) > DEPTH:
                yield _done(*under_way.popleft())
        while under_way:
            yield _done(*under_way.popleft())


Latents = Callable[[], tuple[torch.Tensor, float]]  # waits for them; with the seconds that they took


class Launcher:
    """Starts to encode a batch; on CUDA without waiting for anything, the upload beside the batch before."""

    def __init__(self, encode: BatchEncoder, dtype: torch.dtype):
        self.encode, self.dtype = encode, dtype
        self.device = next(encode.model.parameters()).device
        self._upload = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def __call__(self, pixels: torch.Tensor) -> Latents:
        if len(pixels) == 0:
            return lambda: (torch.empty(0, 0, 0, 0, dtype=self.dtype), 0.0)
        if self._upload is None:
            begin = time.perf_counter()
            latents = self.encode(pixels.to(self.device)).to(self.dtype).cpu()
            seconds = time.perf_counter() - begin
            return lambda: (latents, seconds)
        return self._launch_on_cuda(pixels)

    def _launch_on_cuda(self, pixels: torch.Tensor) -> Latents:
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


def _finish(wait: Latents, indices: list[int], finish: Callable[[list[int], torch.Tensor], Any]) -> tuple[Any, float]:
    latents, seconds = wait()
    return finish(indices, latents), seconds


def _done(crops: Crops, future: Future) -> Done:
    return Done(crops, *future.result())
