"""Encoding and decoding in bounded memory: bands of an image give the same result as the whole image."""

import contextlib
import copy
import inspect
import weakref
from collections.abc import Iterator
from itertools import groupby

import pytest
import torch
from small_models import DEVICE, MODELS, OUTPUT, build, image, operators_called, reconstruct, step
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dcae_fast
from dcae_fast.fast import bands, plan
from dcae_fast.fast.bands import Bands
from dcae_fast.fast.call import Coder
from dcae_fast.fast.layers import Layer, Survey
from dcae_fast.fast.module import original_class
from dcae_fast.models import DCAE

EXACT = 1e-6  # limit in float64; diffusers' norms compute their statistics in float32


def latent(model: nn.Module, *size: int) -> torch.Tensor:
    channels = model.encoder(image(1, 3, 16, 16).to(next(model.parameters()).dtype)).shape[1]
    return image(size[0], channels, *size[1:])


def coders(model: nn.Module, batch: int, height: int, width: int) -> list[tuple[nn.Module, torch.Tensor]]:
    """Encoder and decoder, each with an input for images of this size."""
    ratio = model.spatial_compression_ratio
    dtype = next(model.parameters()).dtype
    z = latent(model, batch, height // ratio, width // ratio)
    return [(model.encoder, image(batch, 3, height, width).to(dtype)), (model.decoder, z.to(dtype))]


def banded_steps(coder: nn.Module, x: torch.Tensor) -> list[Bands]:
    found = coder.plan(x)
    return [] if found is None else [step for step in found.steps if isinstance(step, Bands)]


# The same result.


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_least_memory_same_result(name, compare):
    """In float64, the modules' own forwards run. The smallest images cannot be cut; others have many bands."""
    model, cut = build(name).double(), 0
    for height in (8, 16, 40, 64, 136):
        for coder, x in coders(model, 2, height, 8):
            dcae_fast.unpatch(coder)
            expected = coder(x)
            dcae_fast.patch(coder, max_memory=1)
            assert coder.plan(x).images == 1
            got = coder(x)
            compare("whole", got, expected, EXACT, f"{type(coder).__name__}, {height} rows")
            assert got.dtype == expected.dtype and got.is_contiguous()
            cut += len(banded_steps(coder, x))
    assert cut >= 6


@pytest.mark.parametrize("name, height", [("strided", 32), ("diffusers-shuffled", 72)])  # both coders cut these
@torch.no_grad()
def test_least_memory_with_kernels(name, height, compare):
    model = build(name)
    for coder, x in coders(model, 1, height, 8):
        results = []
        dcae_fast.patch(coder)
        called = operators_called(lambda coder=coder, x=x, results=results: results.append(coder(x)))
        dcae_fast.patch(coder, max_memory=1)
        assert banded_steps(coder, x)
        again = operators_called(lambda coder=coder, x=x, results=results: results.append(coder(x)))
        expected, got = results
        compare("whole", got, expected, OUTPUT, type(coder).__name__)
        assert set(again) == set(called)


def local_runs(coder: nn.Module, x: torch.Tensor) -> Iterator[tuple[list[Layer], torch.Tensor]]:
    """Each run of local layers, and the input of the run."""
    layers, x = coder.layers(Survey(x)), coder.start(x)
    for local, group in groupby(layers, lambda layer: layer.before is not None):
        run = list(group)
        if local:
            yield run, x
        for layer in run:
            x = layer.run(x)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_any_size_of_band(name, compare):
    """Cuts each run of local layers, also without its first or last layer, into bands of several sizes.

    A halo with one row less gives a wrong result.
    """
    model = build(name).double()
    for coder, picture in coders(model, 1, 48, 8):
        dcae_fast.patch(coder)
        for run, x in local_runs(coder, picture):
            check_bands(run, x, compare)
            if len(run) > 1:
                check_bands(run[:-1], x, compare)
                check_bands(run[1:], run[0].run(x), compare)


def check_bands(layers: list[Layer], x: torch.Tensor, compare) -> None:
    expected = x
    for layer in layers:
        expected = layer.run(expected)
    halos, rows = bands.halos(layers), x.shape[2] // bands.coarsest(layers)
    for size in {2 * halos[0] + 1, 2 * halos[0] + 2, 3 * halos[0] + 2, rows - 1}:
        if 2 * halos[0] < size < rows:
            compare("whole", Bands(layers, size, halos)(x), expected, EXACT, f"{size} of {rows} rows")
    if 0 < halos[0] < rows / 4:
        fewer = tuple(min(halo, halos[0] - 1) for halo in halos)
        y = Bands(layers, rows // 2 + halos[0], fewer)(x)
        assert (y - expected).norm() > 1e-5 * expected.norm(), "a smaller halo would do"


@pytest.mark.parametrize("rows", [5, 12, 31])
@pytest.mark.parametrize("halo", [0, 1, 2])
def test_bands_cover_the_rows(rows, halo):
    for size in range(2 * halo + 1, rows):
        cuts = list(bands.bands(rows, size, halo))
        assert cuts[0][0] == 0 and cuts[-1][1] == rows
        assert all(top < bottom and after <= bottom for (top, bottom), (after, _) in zip(cuts, cuts[1:], strict=False))
        heights = [min(rows, bottom + halo) - max(0, top - halo) for top, bottom in cuts]
        assert set(heights) == {size}


@pytest.mark.parametrize("name, height", [("adaptive", 32), ("diffusers-shuffled", 24)])
@torch.no_grad()
def test_memory_format_of_parts(name, height):
    model = build(name)
    for coder, x in coders(model, 2, height, 8):
        dcae_fast.patch(coder, max_memory=1)
        for like in (x, x.contiguous(memory_format=torch.channels_last)):
            y = coder(like)
            assert y.is_contiguous() == like.is_contiguous()
            assert y.is_contiguous(memory_format=torch.channels_last) != like.is_contiguous()


@pytest.mark.parametrize("name", ["adaptive", "diffusers-shuffled"])
@torch.no_grad()
def test_the_first_input_by_name(name, monkeypatch):
    monkeypatch.setattr(Coder, "in_parts", lambda self, plan, *args, **kwargs: "in parts")
    for coder, x in coders(build(name), 2, 32, 8):
        dcae_fast.patch(coder, max_memory=1)
        _, first, *_ = inspect.signature(original_class(coder).forward).parameters
        assert coder(x) == "in parts" == coder(**{first: x})


@torch.no_grad()
def test_partial_latents_in_bands(compare):
    model, x = build("adaptive").double(), image(2, 3, 64, 8).double()
    expected = [*model.encode(x, [3, 8]), model.encode(x, 5), model.encode(x)]
    dcae_fast.patch(model, max_memory=1)
    assert all(model.encoder.plan(x, **kwargs) for kwargs in ({}, {"latent_channels": 5}))
    got = [*model.encode(x, [3, 8]), model.encoder(x, latent_channels=5), model.encoder(x, None)]
    for part, whole in zip(got, expected, strict=True):
        compare("whole", part, whole, EXACT)


@torch.no_grad()
def test_autocast_in_bands():
    """Bands give the same dtype as the whole image, and at most twice the error against float32."""
    model = build("strided")
    for coder, x in coders(model, 1, 32, 8):
        dcae_fast.patch(coder)
        exact = coder(x)
        with torch.autocast(DEVICE, torch.bfloat16):
            whole = coder(x)
            dcae_fast.patch(coder, max_memory=1)
            assert banded_steps(coder, x)
            got = coder(x)
        assert got.dtype == whole.dtype
        assert (got - exact).norm() <= 2 * (whole - exact).norm()


@torch.no_grad()
def test_some_images_at_a_time(compare):
    model = build("strided").double()
    for coder, x in coders(model, 7, 16, 8):
        dcae_fast.patch(coder)
        layers, expected = coder.layers(Survey(x)), coder(x)
        result = expected.numel() * 8
        need = max(plan.Planner(layers, x.shape, 8, 0).needs)
        dcae_fast.patch(coder, max_memory=int((3.5 * need + result) / 0.9))
        assert coder.plan(x).images == 3 and not banded_steps(coder, x)
        compare("whole", coder(x), expected, EXACT)


# Inputs that are not cut.


def test_enough_memory_or_none_known():
    model = build("adaptive")
    with torch.no_grad():
        for coder, x in coders(model, 1, 32, 8):
            dcae_fast.patch(coder)
            assert coder.plan(x) is None
            dcae_fast.patch(coder, max_memory=2**40)
            assert coder.plan(x) is None
            assert coder.plan(x[:0]) is None
            dcae_fast.patch(coder, max_memory=1)
            assert coder.plan(x) is not None
            assert coder.plan(x[:0]) is None


def test_gradients_are_never_lost(same_step):
    model, x = build("shuffled"), image(1, 3, 16, 8)
    expected = step(copy.deepcopy(model), x)
    dcae_fast.patch(model, max_memory=1)
    same_step(step(model, x), expected)
    assert model(x).requires_grad and model.encoder.plan(x) is None
    model.requires_grad_(False)
    assert model.encoder.plan(x) is not None and model.encoder.plan(x.clone().requires_grad_()) is None
    with torch.inference_mode():
        assert model.encoder.plan(x) is not None


def replaced(model: nn.Module) -> None:
    model.encoder.stages[0].op_list[0].main.conv1.act = nn.GELU()


def circular(model: nn.Module) -> None:
    model.encoder.stages[0].op_list[0].main.conv1.conv.padding_mode = "circular"


def forward_replaced(model: nn.Module) -> None:
    stage = model.encoder.stages[0]
    stage.forward = stage.forward


NO_PARTS = {
    "hook": lambda model: model.encoder.stages[0].op_list[0].main.conv2.norm.register_forward_hook(lambda *_: None),
    "forward": forward_replaced,
    "activation": replaced,
    "padding": circular,
    "training": lambda model: model.train(),
}


@pytest.mark.parametrize("change", NO_PARTS.values(), ids=NO_PARTS)
@torch.no_grad()
def test_no_parts(change):
    """Cases in which a coder computes the whole batch at once despite max_memory.

    A hook or a replaced forward would see bands. A module or its padding is not supported. A batch norm in training
    mode needs the statistics of the whole batch.
    """
    model, x = build("strided"), image(1, 3, 32, 8)
    model.encoder.stages[0].op_list[0].main.conv2.norm = nn.BatchNorm2d(16).eval().to(DEVICE)
    dcae_fast.patch(model, max_memory=1)
    assert model.encoder.plan(x) is not None
    change(model)
    assert model.encoder.plan(x) is None
    if change is not forward_replaced:
        assert model.encoder(x).isfinite().all()


@torch.no_grad()
def test_hooks_of_the_coder_see_whole_images():
    model, x, seen = build("adaptive"), image(1, 3, 64, 8), []
    dcae_fast.patch(model, max_memory=1)
    model.encoder.register_forward_hook(lambda module, args, output: seen.append((args[0].shape, output.shape)))
    z = model.encoder(x)
    assert banded_steps(model.encoder, x) and seen == [(x.shape, z.shape)]


# Memory.


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live tensors that operators returned, and the elements of the largest tensor."""

    def __init__(self, *known: torch.Tensor):
        super().__init__()
        self.now = self.peak = self.elements = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
                self.now += storage.nbytes()
                self.elements = max(self.elements, tensor.numel())
                self.peak = max(self.peak, self.now)
        return out

    def free(self, key: int, size: int) -> None:
        self.known.remove(key)
        self.now -= size


@torch.no_grad()
def peak_of(coder: nn.Module, x: torch.Tensor) -> LiveBytes:
    with LiveBytes(x, *coder.parameters(), *coder.buffers()) as live:
        coder(x)
    return live


@pytest.fixture(params=["kernels", "plain"])
def as_if_on_gpu(request, monkeypatch):
    """Models on the meta device, which has no storage, run the fast forwards or the modules' own forwards."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # meta has no autocast
    monkeypatch.setattr("dcae_fast.ops.has_kernels", lambda x: request.param == "kernels")
    return request.param


def on_meta(name: str) -> DCAE:
    with torch.device("meta"):
        return DCAE.from_name(name).to(torch.bfloat16).eval()


def meta_inputs(model: DCAE, pixels: int) -> list[tuple[nn.Module, torch.Tensor]]:
    size = pixels // model.spatial_compression_ratio
    shapes = {model.encoder: (1, 3, pixels, pixels), model.decoder: (1, model.config.latent_channels, size, size)}
    return [(coder, torch.empty(shape, device="meta", dtype=torch.bfloat16)) for coder, shape in shapes.items()]


@pytest.mark.parametrize("name", ["dc-ae-f32c32-in-1.0", "dc-ae-f32c32-sana-1.0", "dc-ae-f64c128-1.5"])
@torch.no_grad()
def test_memory_is_bounded(name, as_if_on_gpu):
    """Real models at real sizes: memory stays within the bound and close to the bound. Few rows are computed twice."""
    model, gib = on_meta(name), 2**30
    for pixels, bound in [(2048, 2 * gib), (4096, 6 * gib), (8192, 24 * gib)]:
        for coder, x in meta_inputs(model, pixels):
            dcae_fast.patch(coder, max_memory=bound)
            live = peak_of(coder, x)
            assert live.peak <= bound
            if as_if_on_gpu == "kernels":  # the attention's own forward concatenates its scales
                assert live.elements <= plan.MAX_ELEMENTS
            assert live.peak > 0.4 * bound or live.elements > 0.8 * plan.MAX_ELEMENTS
            for part in banded_steps(coder, x):
                assert part.size > (8 if as_if_on_gpu == "kernels" else 6) * part.halos[0]  # own forwards need more


@torch.no_grad()
def test_memory_of_a_large_picture(as_if_on_gpu):
    """A patched coder can run in a third of the memory that the unpatched coder needs.

    With a bound of twice that memory, the patched coder does not cut the image.
    """
    model = on_meta("dc-ae-f32c32-in-1.0")
    for coder, x in meta_inputs(model, 4096):
        dcae_fast.unpatch(coder)
        eager = peak_of(coder, x).peak
        dcae_fast.patch(coder, max_memory=eager // 3)
        assert peak_of(coder, x).peak <= eager / 3
        dcae_fast.patch(coder, max_memory=2 * eager)
        assert coder.plan(x) is None


@torch.no_grad()
def test_tensors_too_large_for_32_bits(as_if_on_gpu):
    model = on_meta("dc-ae-f32c32-in-1.0")
    for coder, x in meta_inputs(model, 8192):
        dcae_fast.unpatch(coder)
        assert peak_of(coder, x).elements > plan.MAX_ELEMENTS
        dcae_fast.patch(coder, max_memory=2**50)
        assert peak_of(coder, x).elements <= plan.MAX_ELEMENTS


def test_impossible_bounds_end_in_sensible_bands(as_if_on_gpu):
    model = on_meta("dc-ae-f32c32-in-1.0")
    with torch.no_grad():
        for coder, x in meta_inputs(model, 4096):
            dcae_fast.patch(coder, max_memory=1)
            for part in banded_steps(coder, x):
                assert part.size >= 4 * part.halos[0]


def test_an_allocator_without_statistics(monkeypatch):
    def none(device):
        raise RuntimeError("CUDAPluggableAllocator does not yet support getDeviceStats.")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 9))
    stats = {"reserved_bytes": {"all": {"current": 5}}, "allocated_bytes": {"all": {"current": 3}}}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: stats)
    assert plan.free_memory(torch.device("cuda")) == 7 + 5 - 3
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", none)
    assert plan.free_memory(torch.device("cuda")) == 7


@torch.no_grad()
def test_tiling_of_diffusers():
    """The patched coders compute the tiles of diffusers. These tiles need no further cuts."""
    model = build("diffusers-shuffled")
    model.enable_tiling(16, 16, 12, 12)
    x = image(1, 3, 24, 16)
    z = model.encode(x).latent
    expected = model.decode(z).sample
    dcae_fast.patch(model, max_memory=1)
    assert (model.encode(x).latent - z).norm() <= OUTPUT * z.norm()
    assert (model.decode(z).sample - expected).norm() <= OUTPUT * expected.norm()
    assert reconstruct(model, x).shape == x.shape
