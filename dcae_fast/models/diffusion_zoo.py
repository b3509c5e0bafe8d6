"""The released diffusion models: name → network, autoencoder, training objective, sampler; and their repositories.

All of them generate pictures of 512 x 512 pixels in 1000 classes. Schedulers and samplers have their names from the
original (DC-Gen).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import fields, zoo
from .config import SCALES, DiTConfig, UViTConfig

if TYPE_CHECKING:
    from .dit import DiT
    from .uvit import UViT

RESOLUTION = 512
MOST_STEPS = 100_000  # of a sampler
NETWORKS = {"uvit": UViTConfig, "dit": DiTConfig}
SAMPLERS_AFTER = {  # training → samplers for it
    "DPM_Solver": ("DPM_Solver",),
    "SiTSampler": ("ODE_dopri5", "ODE_heun2", "SDE"),
    "GaussianDiffusion": ("GaussianDiffusion",),
}


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """network: configuration of the network. autoencoder: a name in `zoo` or a Hugging Face repository.

    scaling_factor: the network sees the autoencoder's latents multiplied by this factor. train_scheduler: "DPM_Solver",
    "GaussianDiffusion" (both predict noise) or "SiTSampler" (flow). eval_scheduler, num_inference_steps: the default
    sampler, one of `SAMPLERS_AFTER[train_scheduler]`, and its number of steps. name: the model's name, if it is one of
    `DIFFUSION_MODELS`.
    """

    network: UViTConfig | DiTConfig
    autoencoder: str
    scaling_factor: float
    train_scheduler: str
    eval_scheduler: str
    num_inference_steps: int
    name: str | None = field(default=None, compare=False)

    def __post_init__(self):
        if not isinstance(self.network, UViTConfig | DiTConfig):
            raise fields.FieldError("network", self.network, "a UViTConfig or a DiTConfig")
        fields.text("autoencoder", self.autoencoder)
        fields.number("scaling_factor", self.scaling_factor, *SCALES)
        fields.word("train_scheduler", self.train_scheduler, SAMPLERS_AFTER)
        fields.word("eval_scheduler", self.eval_scheduler, SAMPLERS_AFTER[self.train_scheduler])
        fields.whole("num_inference_steps", self.num_inference_steps, 1, MOST_STEPS)

    def check_sampler(self, sampler: str) -> None:
        """Raise ValueError unless the sampler fits the training."""
        fitting = SAMPLERS_AFTER[self.train_scheduler]
        if sampler not in fitting:
            raise ValueError(f"sampler {sampler!r}; the model was trained for {' or '.join(fitting)}")

    def build(self) -> "UViT | DiT":
        """The network with random weights."""
        from .dit import DiT
        from .uvit import UViT

        return UViT(self.network) if isinstance(self.network, UViTConfig) else DiT(self.network)


def config_to_json(config: DiffusionConfig) -> dict[str, Any]:
    """The content of config.json: {"model_name": ...} for a released model, as in the original; else all fields."""
    if config == DIFFUSION_MODELS.get(config.name):
        return {"model_name": config.name}
    written = {"model": "uvit" if isinstance(config.network, UViTConfig) else "dit", **asdict(config)}
    del written["name"]
    return written


def config_from_json(given: Mapping[str, Any]) -> DiffusionConfig:
    """The inverse of `config_to_json`. Unsupported values raise ValueError, which names the field."""
    if "model_name" in given:
        return diffusion_config(zoo.only_name(given, DiffusionConfig.__annotations__))
    section = fields.Section(given)
    fields.word("model", section["model"], NETWORKS)
    network = fields.Section(section["network"], "network.").build(NETWORKS[given["model"]])
    options = {key: value for key, value in given.items() if key != "model"}
    return fields.Section(options | {"network": network}).build(DiffusionConfig)


SIZES = {
    "s": {"depth": 12, "hidden_size": 512, "num_heads": 8},
    "h": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
    "xl": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
    "2b": {"depth": 28, "hidden_size": 2048, "num_heads": 32},
    "3b": {"depth": 56, "hidden_size": 2048, "num_heads": 32},
}
DPM_SOLVER = {"train_scheduler": "DPM_Solver", "eval_scheduler": "DPM_Solver", "num_inference_steps": 30}
GAUSSIAN = {"train_scheduler": "GaussianDiffusion", "eval_scheduler": "GaussianDiffusion", "num_inference_steps": 250}
FLOW = {"train_scheduler": "SiTSampler", "eval_scheduler": "ODE_dopri5", "num_inference_steps": 250}


def _model(network: type, autoencoder: str, size: str, schedulers: dict, **options) -> DiffusionConfig:
    latents = zoo.AUTOENCODERS[autoencoder]
    input_size = RESOLUTION // 2 ** (len(latents.encoder.depth) - 1)
    sizes = {"in_channels": latents.latent_channels, "input_size": input_size, **SIZES[size]}
    return DiffusionConfig(
        network=network(**sizes, **options),
        autoencoder=autoencoder,
        scaling_factor=latents.scaling_factor,
        **schedulers,
    )


def _uvit(autoencoder: str, size: str) -> DiffusionConfig:
    return _model(UViTConfig, autoencoder, size, DPM_SOLVER)


def _usit(autoencoder: str, size: str) -> DiffusionConfig:
    return _model(UViTConfig, autoencoder, size, FLOW, adaptive=zoo.AUTOENCODERS[autoencoder].adaptive)


def _dit(autoencoder: str, size: str) -> DiffusionConfig:
    return _model(DiTConfig, autoencoder, size, GAUSSIAN)


def _sit(autoencoder: str, size: str) -> DiffusionConfig:
    return _model(DiTConfig, autoencoder, size, FLOW, learn_sigma=False)


DIFFUSION_MODELS = {
    "dc-ae-f32c32-in-1.0-dit-xl-in-512px": _dit("dc-ae-f32c32-in-1.0", "xl"),
    "dc-ae-f32c32-in-1.0-dit-xl-in-512px-trainbs1024": _dit("dc-ae-f32c32-in-1.0", "xl"),
    "dc-ae-f32c32-in-1.0-uvit-s-in-512px": _uvit("dc-ae-f32c32-in-1.0", "s"),
    "dc-ae-f32c32-in-1.0-uvit-h-in-512px": _uvit("dc-ae-f32c32-in-1.0", "h"),
    "dc-ae-f32c32-in-1.0-uvit-2b-in-512px": _uvit("dc-ae-f32c32-in-1.0", "2b"),
    "dc-ae-f32c32-in-1.0-usit-h-in-512px": _usit("dc-ae-f32c32-in-1.0", "h"),
    "dc-ae-f32c32-in-1.0-usit-2b-in-512px": _usit("dc-ae-f32c32-in-1.0", "2b"),
    "dc-ae-f64c128-in-1.0-uvit-h-in-512px": _uvit("dc-ae-f64c128-in-1.0", "h"),
    "dc-ae-f64c128-in-1.0-uvit-h-in-512px-train2000k": _uvit("dc-ae-f64c128-in-1.0", "h"),
    "dc-ae-f64c128-in-1.0-uvit-2b-in-512px": _uvit("dc-ae-f64c128-in-1.0", "2b"),
    "dc-ae-f64c128-in-1.0-uvit-2b-in-512px-train2000k": _uvit("dc-ae-f64c128-in-1.0", "2b"),
    "dc-ae-f32c32-in-1.0-sit-xl-in-512px": _sit("dc-ae-f32c32-in-1.0", "xl"),
    "dc-ae-f64c128-1.5-usit-2b-in-512px": _usit("dc-ae-f64c128-1.5", "2b"),
    "dc-ae-f64c128-1.5-usit-3b-in-512px": _usit("dc-ae-f64c128-1.5", "3b"),
}


ASSETS = Path(__file__).parents[1] / "assets"
TINY = "dc-ae-tiny-uvit-digits"
BUNDLED = {TINY: ASSETS / TINY}


def diffusion_names() -> list[str]:
    """All names that `diffusion_config` knows. Those in `BUNDLED` are in this package, others are downloaded."""
    return [*DIFFUSION_MODELS, *BUNDLED]


def diffusion_config(name: str) -> DiffusionConfig:
    """The configuration of a diffusion model of the zoo. ValueError, which lists all names, for an unknown one."""
    zoo.check_name("diffusion model", name, diffusion_names())
    if name in BUNDLED:
        return config_from_json(zoo.bundled_config(BUNDLED[name]))
    return replace(DIFFUSION_MODELS[name], name=name)


def diffusion_hub_id(name: str) -> str:
    """The Hugging Face repository with the original weights of one of `DIFFUSION_MODELS`."""
    return f"mit-han-lab/{name}"


def how_to_get(source: str) -> str:
    """Advice how to get a diffusion model, of the zoo or of a repository, that cannot be downloaded now."""
    folder = source.split("/")[-1]
    repository, autoencoder = source, "AUTOENCODER"  # explained below
    if source in DIFFUSION_MODELS:
        repository, autoencoder = diffusion_hub_id(source), zoo.autoencoder_hub_id(diffusion_config(source).autoencoder)
    return f"""Weights are downloaded on first use. On a machine with an internet connection, run

    hf download {repository} --local-dir {folder}
    hf download {autoencoder} --local-dir {folder}/autoencoder

Copy the folder to this machine, and name ./{folder} in place of {source}. The folder contains

    config.json                     the model's name, or its configuration, which names its AUTOENCODER
    model.safetensors               the transformer's weights, names with prefix "diffusion_model."
    autoencoder/config.json         the autoencoder's name or configuration
    autoencoder/model.safetensors   the autoencoder's weights

Instead of model.safetensors it may contain checkpoint.pt, written by the original trainer."""
