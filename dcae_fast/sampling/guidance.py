"""Classifier-free guidance (arXiv 2207.12598), optionally in an interval of time only (arXiv 2404.07724)."""

import torch

from .arguments import Model, Network, check_guidance


def guided(
    network: Model,
    labels: torch.Tensor,
    null_label: int | torch.Tensor,
    scale: float = 1.0,
    interval: tuple[float, float] | None = None,
) -> Network:
    """Make a network(x, t) for the samplers from a network(x, t [B], labels [B]) in evaluation mode.

        out = null + scale * (conditional - null)

    for the first C channels, where x is [B, C, h, w]. Other channels (the variance in GaussianDiffusion) are taken from
    the conditional output. Both outputs come from one batch of size 2B, [labels, null_label]. At scale 1, and at times
    outside `interval`, the network runs only on the B labels.

    labels: [B] integers. null_label: the label that means no class, num_classes in the original's networks, or one
    such label per sample, [B]. interval: (lo, hi), guidance only if lo <= t <= hi, in the network's time: in DPM_Solver
    1000 is pure noise and 1 is data, in GaussianDiffusion 999 and 0, in the ODE and SDE samplers 0 and 1. Without an
    interval, t may also be a tensor [], whose value is not read. Raises TypeError or ValueError unless scale is a
    finite number and lo <= hi.
    """
    check_guidance(scale, interval)
    with_null = torch.cat([labels, torch.zeros_like(labels) + null_label])

    def call(x: torch.Tensor, t: float | torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        tensor = isinstance(t, torch.Tensor)
        times = t.to(x.dtype).repeat(len(y)) if tensor else torch.full(y.shape, t, dtype=x.dtype, device=x.device)
        return network(x, times, y).to(x.dtype)

    def guided_network(x: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
        if scale == 1 or not (interval is None or interval[0] <= t <= interval[1]):
            return call(x, t, labels)
        conditional, null = call(torch.cat([x, x]), t, with_null).chunk(2)
        channels = x.shape[1]
        combined = null[:, :channels] + scale * (conditional - null)[:, :channels]
        return torch.cat([combined, conditional[:, channels:]], dim=1)

    return guided_network
