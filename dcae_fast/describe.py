"""Tables of the models' costs and structures. No weights are needed."""

from typing import TYPE_CHECKING

from . import costs
from .models.config import DCAEConfig
from .models.diffusion_zoo import DiffusionConfig, diffusion_config, diffusion_names
from .models.zoo import autoencoder_config, autoencoder_names

if TYPE_CHECKING:
    from .diffusion import DCAEDiffusion
    from .models.autoencoder import DCAE


def table(rows: list[tuple[str, ...]]) -> str:
    """Formats rows, the first of which is the heading, as aligned columns. Numbers are right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if cell.replace(".", "").isdigit() else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _giga(flops: int) -> str:
    return f"{flops / 1e9:.{0 if flops >= 1e10 else 2}f}"


def cost(config: DCAEConfig, size: int = 512) -> tuple[int, int]:
    """The number of parameters, and the FLOPs to encode and decode one picture of size x size pixels.

    Counts convolutions and matrix products; a multiply-add is two operations. Runs on fake tensors.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from .models.autoencoder import DCAE
    from .ops._private import FakeTensorMode

    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        model = DCAE(config).eval()
        model(torch.empty(1, 3, size, size))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops()


def models_table() -> str:
    """The table of all autoencoders in the zoo."""
    rows = [("name", "ratio", "latent channels", "parameters (M)", "GFLOP at 512 px")]
    for name in autoencoder_names():
        config = autoencoder_config(name)
        parameters, flops = costs.AUTOENCODERS[name]
        ratio = 2 ** (len(config.encoder.depth) - 1)
        row = (name, ratio, config.latent_channels, f"{parameters / 1e6:.1f}", _giga(flops))
        rows.append(tuple(map(str, row)))
    return table(rows)


def diffusion_cost(config: DiffusionConfig) -> tuple[int, int]:
    """The number of parameters, and the FLOPs of one call with one latent, counted as in `cost`."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    network = config.network
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = config.build().eval()
        x = torch.empty(1, network.in_channels, network.input_size, network.input_size)
        model(x, torch.empty(1), torch.zeros(1, dtype=torch.int64))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops()


def diffusion_models_table() -> str:
    """The table of all diffusion models in the zoo."""
    rows = [("name", "tokens", "parameters (M)", "GFLOP per call", "sampler", "steps")]
    for name in diffusion_names():
        config = diffusion_config(name)
        parameters, flops = costs.DIFFUSION_MODELS[name]
        costs_of_model = (f"{parameters / 1e6:.1f}", _giga(flops))
        rows.append(
            (name, str(config.network.tokens), *costs_of_model, config.eval_scheduler, str(config.num_inference_steps))
        )
    return table(rows)


def model_tables(model: "DCAE | DCAEDiffusion") -> str:
    """The structure of an autoencoder, or of a diffusion model: first its transformer, then its autoencoder."""
    from .models.autoencoder import DCAE

    if isinstance(model, DCAE):
        return config_table(model.config)
    return f"{diffusion_config_table(model.config)}\n\n{config_table(model.autoencoder.config)}"


def diffusion_config_table(config: DiffusionConfig) -> str:
    """The latents, network, training and sampling of a diffusion model."""
    network = config.network
    parameters, _ = diffusion_cost(config)
    latents = f"{network.in_channels}x{network.input_size}x{network.input_size}, scaling factor {config.scaling_factor}"
    size = f"depth {network.depth}, width {network.hidden_size}, {network.num_heads} heads"
    rows = [
        ("autoencoder", config.autoencoder),
        ("latents", latents),
        ("transformer", f"{size}, {network.tokens} tokens, {parameters / 1e6:.1f} M parameters"),
        ("classes", f"{network.num_classes}, and one for no class"),
        ("training", config.train_scheduler),
        ("sampler", f"{config.eval_scheduler}, {config.num_inference_steps} steps"),
    ]
    return table(rows)


def config_table(config: DCAEConfig) -> str:
    """The stages of an autoencoder, from full resolution to the latent, its ratio, channels and scaling factor."""
    ratio = 2 ** (len(config.encoder.depth) - 1)
    lines = [f"{ratio}x{ratio} pixels become one latent position with {config.latent_channels} channels"]
    if config.adaptive:
        lines[0] += "; the first channels can be used without the others"
    lines.append(f"scaling factor: {config.scaling_factor or 'unknown'}")
    for name, coder in (("encoder", config.encoder), ("decoder", config.decoder)):
        rows = [("stage", "1/size", "width", "blocks", "block type", "norm", "activation")]
        for stage, depth in enumerate(coder.depth):
            if depth:
                names = (coder.block[stage], coder.norm[stage], coder.act[stage])
                rows.append((str(stage), str(2**stage), str(coder.width[stage]), str(depth), *names))
        lines += ["", f"{name}, resampling: {coder.resample}", table(rows)]
    return "\n".join(lines)
