"""Calibration of 8-bit layers on a few pictures: the scales of their inputs, and which layers stay exact.

Each channel of a layer's input has a scale:

    scale_c = share_c^POWER · most / 127,    share_c = max |x_c| / most, at least LEAST_SHARE,    most = max |x|

So no value that the calibration sees is clipped: clipping costs more than rounding. With POWER 1, each channel would
have the finest steps that do not clip. A smaller POWER leaves room for larger values in channels that are weak in the
calibration pictures but not in others. Pictures with more contrast than those given would be clipped too; therefore the
calibration also sees each picture with CONTRAST times its contrast, and the negative of that.

Then the error of each layer is measured: this layer computes in 8 bit, all others exactly. The layers of the decoder,
and then the layers of the encoder, are taken to 8 bit in the order of their squared error per multiplication, as many
as the error budget allows.

Errors are PSNR = 10 log10(4 / mean squared error) of pictures in [-1, 1], of the worst picture.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from . import int8

LEAST_SCALE = 2.0**-100  # 1 / scale must be a number in fp32; smaller inputs count as zeros
POWER, LEAST_SHARE = 0.75, 2.0**-7
CONTRAST = 3.0
Pictures = list[torch.Tensor]  # batches [B, 3, H, W]


@dataclass(frozen=True)
class ErrorBudget:
    """What 8 bit may change, for every calibration picture. Raises ValueError unless all are numbers of at least 0.

    decoding: least PSNR, in dB, of decoded exact latents against their exact decoding. encoding: the same of the exact
    decoding of 8-bit latents. loss: dB of PSNR against the originals that either may lose.
    """

    decoding: float = 45.0
    encoding: float = 45.0
    loss: float = 0.05

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise ValueError(f"error budget: {name} is {value!r}; expected a number of dB, at least 0")


DEFAULT_BUDGET = ErrorBudget()


@dataclass(frozen=True)
class CalibratedLayer:
    """scales: of the channels of the input. psnr: in dB from exact if only this layer is in 8 bit. share: of the
    autoencoder's multiplications, for diffusers' attention without those of keys and values. in_int8: whether the layer
    computes in 8 bit.
    """

    scales: tuple[float, ...] = field(repr=False)
    psnr: float
    share: float
    in_int8: bool


@dataclass(frozen=True)
class Quality:
    """psnr: in dB from exact. loss: dB of PSNR against the originals."""

    psnr: float
    loss: float


@dataclass(frozen=True)
class Calibration:
    """What a calibration has found. layers: by name; weights: the hash of the weights (`scales.hash_of`)."""

    layers: dict[str, CalibratedLayer]
    decoding: Quality
    encoding: Quality
    pictures: int
    weights: str = field(repr=False)

    @property
    def summary(self) -> str:
        """How much computes in 8 bit, and how far the results are from exact."""
        if not self.layers:
            return "8 bit: the model has no layer that can compute in 8 bit."
        taken = [layer for layer in self.layers.values() if layer.in_int8]
        lines = [
            f"8 bit: {len(taken)} of {len(self.layers)} layers, {sum(layer.share for layer in taken):.1%} of the "
            f"multiplications. Measured on {self.pictures} picture{'s' * (self.pictures != 1)}:"
        ]
        for name, quality in (("decoding", self.decoding), ("encoding", self.encoding)):
            lines.append(f"  {name}: {quality.psnr:.1f} dB from exact, PSNR loss {round(quality.loss, 3) + 0:.3f} dB")
        return "\n".join(lines)

    def __str__(self) -> str:
        """The summary, and the layers that stay exact."""
        lines = [self.summary]
        rest = {name: layer for name, layer in self.layers.items() if not layer.in_int8}
        width = max(map(len, rest), default=0)
        if rest:
            lines.append(f"  {'stays exact':<{width}}  8 bit only there  multiplications")
        for name, layer in sorted(rest.items(), key=lambda item: item[1].psnr):
            lines.append(f"  {name:<{width}}  {layer.psnr:>13.1f} dB  {layer.share:>15.1%}")
        return "\n".join(lines)


@torch.no_grad()
def calibrate(autoencoder: nn.Module, pictures: Pictures, budget: ErrorBudget, weights: str) -> Calibration:
    """Calibrate a patched autoencoder, which computes exactly, and leave it as it is.

    autoencoder: has the modules `encoder` and `decoder`. Raises ValueError if an activation or a result is not finite.
    """
    layers = dict(int8.candidates(autoencoder))
    encode, decode = autoencoder.encoder, autoencoder.decoder
    contrasts = [(x * CONTRAST).clamp(-1, 1) for x in pictures]

    def run_all() -> None:
        for x in (*pictures, *contrasts, *(-x for x in contrasts)):
            decode(encode(x))

    scales, shares = observe(autoencoder, layers, run_all)
    latents = [encode(x) for x in pictures]
    exact = [decode(z) for z in latents]
    if not all(y.isfinite().all() for y in exact):
        raise ValueError("calibration: the exact result of the decoder is not finite")
    runs = {
        "decoder.": (lambda: [decode(z) for z in latents], budget.decoding),
        "encoder.": (lambda: [decode(encode(x)) for x in pictures], budget.encoding),
    }
    found, qualities = {}, []
    for prefix, (run, least) in runs.items():
        part = {name: (layer, scales[name], shares[name]) for name, layer in layers.items() if name.startswith(prefix)}
        psnrs, taken, quality = _choose(part, run, exact, pictures, least, budget.loss)
        qualities.append(quality)
        for name, psnr in psnrs.items():
            found[name] = CalibratedLayer(scales[name], psnr, shares[name], name in taken)
    return Calibration(found, *qualities, sum(map(len, pictures)), weights)


def _choose(
    layers: dict[str, tuple[nn.Module, tuple[float, ...], float]],
    run: Callable[[], Pictures],
    exact: Pictures,
    originals: Pictures,
    least: float,
    loss: float,
) -> tuple[dict[str, float], set[str], Quality]:
    """The PSNR with each layer of an encoder or decoder in 8 bit, the layers that the budget allows, and their quality.

    layers: name → (layer, scales, share of the multiplications).
    """
    psnr_of_exact = psnrs(exact, originals)

    def quality(names: list[str]) -> Quality:
        with _in_int8(layers[name][:2] for name in names):
            y = run()
        pairs = zip(psnr_of_exact, psnrs(y, originals), strict=True)
        losses = [0.0 if before == after else before - after for before, after in pairs]  # both may be infinite
        return Quality(min(psnrs(y, exact)), max(losses))

    alone = {name: quality([name]).psnr for name in layers}
    harm = {name: 10 ** (-alone[name] / 10) / share for name, (_, _, share) in layers.items()}
    order = sorted(layers, key=lambda name: (harm[name], name))
    known = {0: Quality(math.inf, 0.0)}

    def fits(count: int) -> bool:
        if count not in known:
            known[count] = quality(order[:count])
        return known[count].psnr >= least and known[count].loss <= loss

    taken, most = (len(order), len(order)) if fits(len(order)) else (0, len(order))
    while most - taken > 1:  # the first `taken` layers fit, the first `most` do not
        middle = (taken + most) // 2
        taken, most = (middle, most) if fits(middle) else (taken, middle)
    return alone, set(order[:taken]), known[taken]


@contextlib.contextmanager
def _in_int8(layers: Iterator[tuple[nn.Module, tuple[float, ...]]]) -> Iterator[None]:
    layers = list(layers)
    for layer, scales in layers:
        int8.mark(layer, scales)
    try:
        yield
    finally:
        for layer, _ in layers:
            int8.unmark(layer)


def psnrs(pictures: Pictures, references: Pictures) -> list[float]:
    """PSNR of each picture in dB; infinite for equal pictures, -infinite for a picture with NaN."""
    pairs = zip(pictures, references, strict=True)
    errors = [(a.double().clamp(-1, 1) - b.double().clamp(-1, 1)).square().mean((1, 2, 3)) for a, b in pairs]
    errors = torch.cat(errors).tolist()
    return [-math.inf if math.isnan(e) else 10 * math.log10(4 / e) if e else math.inf for e in errors]


def observe(
    module: nn.Module, layers: dict[str, nn.Module], run: Callable[[], object]
) -> tuple[dict[str, tuple[float, ...]], dict[str, float]]:
    """The scales of the inputs of these layers, and the layers' shares of the multiplications, by name.

    module: a patched autoencoder, encoder or decoder. run: calls the module with the inputs to observe. Raises
    ValueError if an input of a layer is not finite.
    """
    largest: dict[str, torch.Tensor] = {}
    multiplications: Counter[str] = Counter()

    def see(name: str, layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
        multiplications[name] += y.numel() * layer.weight[0].numel()
        if name in layers:
            x = x if type(layer) is nn.Linear else x.movedim(1, -1)
            found = x.flatten(0, -2).abs().amax(0).double()
            if not found.isfinite().all():
                raise ValueError(f"calibration: the input of {name} is not finite")
            largest[name] = torch.maximum(found, largest.get(name, found))

    with _watched(module, see):
        run()
    total = multiplications.total()
    scales = {name: scales_of(largest[name].cpu()) for name in layers}
    return scales, {name: multiplications[name] / total for name in layers}


@contextlib.contextmanager
def _watched(module: nn.Module, see: Callable) -> Iterator[None]:
    """Calls see(name, layer, input, output) after each call of a convolution or linear layer."""
    handles = [
        layer.register_forward_hook(lambda layer, args, y, name=name: see(name, layer, args[0], y))
        for name, layer in module.named_modules()
        if type(layer) in (nn.Conv2d, nn.Linear)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def scales_of(largest: torch.Tensor) -> tuple[float, ...]:
    """The scales of channels, exact in fp32; see the head of this file. largest: |x| of each, [C] float64.

    All are 1 for zeros only.
    """
    most = largest.max()
    if most / 127 * LEAST_SHARE < LEAST_SCALE:
        return (1.0,) * len(largest)
    share = (largest / most).clamp(min=LEAST_SHARE)
    return tuple((share**POWER * most / 127).float().tolist())
