"""Classifier-free guidance (arXiv 2207.12598), within an interval of time if wanted (arXiv 2404.07724)."""

import torch

from .arguments import Model, Network, check_guidance


def guided(
    network: Model,
    labels: torch.Tensor,
    null_label: int | torch.Tensor,
    scale: float = 1.0,
    interval: tuple[float, float] | None = None,
) -> Network:
    """A network(x, t) for the samplers from a network(x, t [B], labels [B]) in evaluation mode.

        out = null + scale * (conditional - null)

    on the first C channels, where x is [B, C, h, w]; further ones (the variance of GaussianDiffusion) are the
    conditional ones. Both come from one batch of 2B, [labels, null_label]. At scale 1, and at times outside
    `interval`, the network runs on the B labels alone.

    labels: [B] integers; null_label: the label for none, num_classes in the original's networks, or one for each, [B].
    interval: (lo, hi), guidance where lo <= t <= hi, with t the network's own time: in DPM_Solver 1000 is pure noise
    and 1 data, in GaussianDiffusion 999 and 0, in the ODE and SDE samplers 0 and 1. Without an interval t may also be a
    tensor [], whose value is not read. TypeError or ValueError unless scale is a finite number and lo <= hi.
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
