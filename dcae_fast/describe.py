"""Tables about autoencoders: what they cost and what they are made of. No weights are needed."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from .models.autoencoder import DCAE, DCAEConfig
from .models.zoo import autoencoder_config, autoencoder_names


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows, the first of them the heading, as columns; numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if cell.replace(".", "").isdigit() else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def cost(config: DCAEConfig, size: int = 512) -> tuple[int, int]:
    """Parameters, and the floating point operations of encoding and decoding one picture of size x size.

    Counted are convolutions and matrix products, a multiplication and an addition as two. Nothing is computed.
    """
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        model = DCAE(config).eval()
        model(torch.empty(1, 3, size, size))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops()


def models_table() -> str:
    """All autoencoders of the zoo."""
    rows = [("name", "ratio", "latent channels", "parameters (M)", "GFLOP at 512 px")]
    for name in autoencoder_names():
        config = autoencoder_config(name)
        parameters, flops = cost(config)
        ratio = 2 ** (len(config.encoder.depth) - 1)
        row = (name, ratio, config.latent_channels, f"{parameters / 1e6:.1f}", f"{flops / 1e9:.0f}")
        rows.append(tuple(map(str, row)))
    return table(rows)


def config_table(config: DCAEConfig) -> str:
    """An autoencoder's stages, from full resolution to the latent, and what is not said by them."""
    ratio = 2 ** (len(config.encoder.depth) - 1)
    lines = [f"{ratio}x{ratio} pixels to one position of {config.latent_channels} channels"]
    if config.adaptive:
        lines[0] += ", of which the first ones can be used alone"
    lines.append(f"scaling factor: {config.scaling_factor or 'not known'}")
    for name, coder in (("encoder", config.encoder), ("decoder", config.decoder)):
        rows = [("stage", "1/size", "width", "blocks", "kind", "norm", "activation")]
        for stage, depth in enumerate(coder.depth):
            if depth:
                kind = (coder.block[stage], coder.norm[stage], coder.act[stage])
                rows.append((str(stage), str(2**stage), str(coder.width[stage]), str(depth), *kind))
        lines += ["", f"{name}, resampling: {coder.resample}", table(rows)]
    return "\n".join(lines)
