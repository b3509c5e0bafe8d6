"""Calibration of 8-bit layers on a few pictures: the scales of their inputs, and which layers stay exact.

The scale of a layer's input is the clipping value / 127 that loses least:

    argmin_scale Σ (x - scale · clamp(round(x / scale), -127, 127))²

over the inputs x in all pictures, by a histogram of |x|. Pictures with more contrast than those given would be clipped,
which costs more than rounding; therefore the sum includes each picture with CONTRAST times its contrast, and the
negative of that, with the weight WEIGHT. Then each layer runs in 8 bit with all others exact. The
layers of the decoder, and those of the encoder, are taken to 8 bit in the order of the squared error that this causes
per multiplication, as many as the error budget allows.

Errors are PSNR = 10 log10(4 / mean squared error) of pictures in [-1, 1], of the worst picture.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from . import int8

BINS = 2**13
LEAST_SCALE = 2.0**-100  # 1 / scale must be a number in fp32; smaller inputs count as zeros
CONTRAST, WEIGHT = 3.0, 0.1
CLIPS = 2.0 ** -(torch.arange(33, dtype=torch.float64) / 8)  # clipping values, in units of the largest input
Pictures = list[torch.Tensor]  # batches [B, 3, H, W]


@dataclass(frozen=True)
class ErrorBudget:
    """What 8 bit may change, for every calibration picture. Raises ValueError for negative values and no numbers.

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
    """scale: of the input. psnr: in dB from exact if only this layer is in 8 bit. share: of the autoencoder's
    multiplications, for diffusers' attention without those of keys and values. in_int8: whether the layer computes in
    8 bit.
    """

    scale: float
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
    scales, shares = observe(autoencoder, layers, pictures)
    encode, decode = autoencoder.encoder, autoencoder.decoder
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
    layers: dict[str, tuple[nn.Module, float, float]],
    run: Callable[[], Pictures],
    exact: Pictures,
    originals: Pictures,
    least: float,
    loss: float,
) -> tuple[dict[str, float], set[str], Quality]:
    """The PSNR with each layer of an encoder or decoder in 8 bit, the layers that the budget allows, and their quality.

    layers: name → (layer, scale, share of the multiplications).
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
def _in_int8(layers: Iterator[tuple[nn.Module, float]]) -> Iterator[None]:
    layers = list(layers)
    for layer, scale in layers:
        int8.mark(layer, scale)
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
    autoencoder: nn.Module, layers: dict[str, nn.Module], pictures: Pictures
) -> tuple[dict[str, float], dict[str, float]]:
    """The scales of the inputs of these layers, and the layers' shares of the multiplications, by name.

    Raises ValueError if an input is not finite.
    """
    largest, multiplications = dict.fromkeys(layers, 0.0), {}
    counts: dict[str, torch.Tensor | float] = dict.fromkeys(layers, 0.0)

    def measure(name: str, layer: nn.Module, x: torch.Tensor, y: torch.Tensor, weight: float) -> None:
        multiplications[name] = multiplications.get(name, 0) + y.numel() * layer.weight[0].numel()
        if name in layers:
            most = x.abs().max().item()
            if not math.isfinite(most):
                raise ValueError(f"calibration: the input of {name} is not finite")
            largest[name] = max(largest[name], most)

    def count(name: str, layer: nn.Module, x: torch.Tensor, y: torch.Tensor, weight: float) -> None:
        if name in layers:
            counts[name] = counts[name] + weight * _histogram(x, largest[name]).double()

    contrasts = [(x * CONTRAST).clamp(-1, 1) for x in pictures]
    seen = [(x, 1.0) for x in pictures] + [(y, WEIGHT) for x in contrasts for y in (x, -x)]
    for see in (measure, count):
        for x, weight in seen:
            with _watched(autoencoder, functools.partial(see, weight=weight)):
                autoencoder.decoder(autoencoder.encoder(x))
    total = sum(multiplications.values())
    scales = {name: scale_of_least_error(counts[name], largest[name]) for name in layers}
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


def _histogram(x: torch.Tensor, largest: float) -> torch.Tensor:
    """How many |x| are 0, and how many are in each of BINS equal intervals up to `largest`: [BINS + 1] int64."""
    places = (x.abs().float() * (BINS / largest if largest else 0)).ceil().clamp(max=BINS)
    return torch.bincount(places.flatten().long(), minlength=BINS + 1)


def scale_of_least_error(counts: torch.Tensor, largest: float) -> float:
    """The scale that loses least; see the head of this file. counts: of `_histogram`, float64. 1 for zeros only."""
    if largest / 127 * CLIPS[-1] < LEAST_SCALE:
        return 1.0
    scales = CLIPS[:, None] * largest / 127
    values = (torch.arange(BINS, dtype=torch.float64) + 0.5) * largest / BINS
    rounded = (values / scales).round().clamp(max=127) * scales
    errors = (rounded - values).square() @ counts[1:].cpu()
    return scales[errors.argmin()].item()
