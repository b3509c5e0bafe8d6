"""The options of training a diffusion transformer, and the recipes of the original. PyTorch is not imported."""

import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dcae_fast.models.config import DiTConfig, UViTConfig
from dcae_fast.models.diffusion_zoo import DIFFUSION_MODELS, DPM_SOLVER, FLOW, GAUSSIAN, SIZES, DiffusionConfig
from dcae_fast.models.zoo import autoencoder_config
from dcae_fast.training.engine.config import Recipe, Run, check_least, check_update

if TYPE_CHECKING:
    from dcae_fast.data.latents import LatentDataset

FP8 = "fp8", "fp8-all"  # precisions in which blocks compute in 8 bit


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The network, except for the number of channels and the size of the latents, which the data determine."""

    kind: Literal["uvit", "dit"]
    """architecture: uvit for UViT and USiT, dit for DiT and SiT"""
    depth: int = SIZES["h"]["depth"]
    """number of blocks; a UViT has one more, in the middle"""
    hidden_size: int = SIZES["h"]["hidden_size"]
    """width of a token"""
    num_heads: int = SIZES["h"]["num_heads"]
    """number of attention heads"""
    patch_size: int = 1
    """side of a token, in latent pixels"""
    num_classes: int = 1000
    """number of classes, not counting the null class"""
    class_dropout_prob: float = 0.1
    """probability that a training label is replaced by the null class"""

    def __post_init__(self):
        check_least(self, dict.fromkeys(("depth", "hidden_size", "num_heads", "patch_size", "num_classes"), 1))
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size}; expected a multiple of num_heads={self.num_heads}")
        if not 0 <= self.class_dropout_prob < 1:
            raise ValueError(f"class_dropout_prob={self.class_dropout_prob}; expected at least 0, and less than 1")


@dataclass(frozen=True, kw_only=True)
class DiffusionRecipe(Recipe):
    """The options that decide the weights. Of these, only `steps` may change when a run is resumed."""

    network: Architecture
    train_scheduler: Literal["DPM_Solver", "SiTSampler", "GaussianDiffusion"]
    """training objective, by its name in the original"""
    eval_scheduler: Literal["DPM_Solver", "ODE_dopri5", "ODE_heun2", "SDE", "GaussianDiffusion"]
    """default sampler of the trained model; must fit the objective"""
    num_inference_steps: int
    """number of steps of that sampler"""
    autoencoder: str
    """autoencoder that made the latents; not used if the data folder has a manifest.json, which names it"""
    batch: int = 1024
    """latents per step, summed over all ranks and accumulated parts"""
    steps: int = 500_000
    """number of steps of the whole training; may change when a run is resumed"""
    lr: float = 1e-4
    """learning rate of AdamW"""
    betas: tuple[float, float] = (0.9, 0.999)
    """betas of AdamW"""
    weight_decay: float = 0.0
    """weight decay of AdamW; as in the original, biases and the last norm of UViT have none"""
    warmup_steps: int = 0
    """steps over which the learning rate rises linearly from warmup_lr to lr"""
    warmup_lr: float = 6.4e-6
    """learning rate at the start of the warm-up"""
    clip_grad: float | None = None
    """largest norm of the gradient; None: do not clip"""
    precision: Literal["float32", "bfloat16", "float16", "fp8", "fp8-all"] = "bfloat16"
    """precision of matrix products, by autocast; weights are float32. float16 uses loss scaling. fp8: on a Hopper GPU,
    the blocks compute linear layers and the gradients of their inputs in 8 bit, all else in bfloat16; fp8-all: also the
    gradients of their weights. int8 is for inference only"""
    ema_decay: float | None = 0.9999
    """decay of the moving average of the weights, smaller in the first steps; None: no average"""

    def __post_init__(self):
        super().__post_init__()
        if self.precision == "int8":
            raise ValueError(f"precision='int8' is for inference only; expected one of {FP8} to train in 8 bit")
        names = "num_inference_steps", "lr", "weight_decay", "warmup_steps", "warmup_lr"
        check_least(self, dict.fromkeys(names, 0) | {"num_inference_steps": 1})
        check_update(self)

    @property
    def of_blocks(self) -> str:
        """The argument `precision` of `patch`."""
        return self.precision if self.precision in FP8 else "exact"

    @property
    def autocast(self) -> str:
        """The precision of everything that is not computed in 8 bit."""
        return "bfloat16" if self.precision in FP8 else self.precision

    def diffusion_config(self, data: "LatentDataset") -> DiffusionConfig:
        """The configuration of the model that is trained on these latents. ValueError if the two do not fit."""
        channels, height, width = data.shape
        if height != width:
            raise ValueError(f"{data.folder}: latents of {height}x{width}; expected squares")
        if len(data.classes) > self.network.num_classes:
            raise ValueError(
                f"num_classes={self.network.num_classes}; expected at least {len(data.classes)}, the number of classes "
                f"in {data.folder}"
            )
        options = asdict(self.network) | {"in_channels": channels, "input_size": height}
        if options.pop("kind") == "uvit":
            network = UViTConfig(**options)
        else:
            network = DiTConfig(**options, learn_sigma=self.train_scheduler == "GaussianDiffusion")
        autoencoder, scaling_factor = self._source(data)
        config = DiffusionConfig(
            network=network,
            autoencoder=autoencoder,
            scaling_factor=scaling_factor,
            train_scheduler=self.train_scheduler,
            eval_scheduler=self.eval_scheduler,
            num_inference_steps=self.num_inference_steps,
        )
        return replace(config, name=next((name for name, known in DIFFUSION_MODELS.items() if known == config), None))

    def _source(self, data: "LatentDataset") -> tuple[str, float]:
        """The autoencoder that made the latents, and the scaling factor that they are multiplied by."""
        if data.manifest is not None:
            settings = data.manifest.settings
            source = os.path.abspath(settings.model) if os.path.exists(settings.model) else settings.model
            return source, settings.scaling_factor
        autoencoder, channels = autoencoder_config(self.autoencoder), data.shape[0]
        if autoencoder.latent_channels != channels:
            raise ValueError(
                f"{data.folder}: latents of {channels} channels; expected {autoencoder.latent_channels}, as "
                f"autoencoder={self.autoencoder!r} makes them"
            )
        if autoencoder.scaling_factor is None:
            raise ValueError(
                f"{data.folder}: expected a manifest.json with the scaling factor, which is not known for "
                f"autoencoder={self.autoencoder!r}; make the latents with `dcae-fast cache-latents`"
            )
        return self.autoencoder, autoencoder.scaling_factor


@dataclass(frozen=True, kw_only=True)
class DiffusionRun(Run):
    """Where and how to compute a recipe. All of these except `out` may change when a run is resumed."""

    data: Path
    """folder of latents, written by `dcae-fast cache-latents` or by the original"""
    cuda_graphs: bool = False
    """replay the compiled network as CUDA graphs, without Python overhead: for small networks and batches on one GPU"""
    sample_cfg: float = 1.5
    """guidance scale of the pictures of samples, and of the samples compared with real pictures"""
    eval_data: Path | None = None
    """folder of held-out latents; evaluations compute the loss on them"""

    def __post_init__(self):
        super().__post_init__()
        if not math.isfinite(self.sample_cfg):
            raise ValueError(f"sample_cfg={self.sample_cfg}; expected a finite number")
        if self.cuda_graphs and (not self.compile or self.accumulate > 1):
            raise ValueError("cuda_graphs: expected together with compile and without accumulate")


def _recipe(
    kind: Literal["uvit", "dit"], schedulers: dict[str, Any], autoencoder: str, **options: Any
) -> DiffusionRecipe:
    return DiffusionRecipe(network=Architecture(kind=kind), autoencoder=autoencoder, **schedulers, **options)


F32, F64 = "dc-ae-f32c32-in-1.0", "dc-ae-f64c128-in-1.0"
UVIT: dict[str, Any] = {"betas": (0.99, 0.99), "warmup_steps": 5000}
DIT: dict[str, Any] = {"precision": "float16", "steps": 3_000_000}
RECIPES = {
    "uvit-h-f64": _recipe("uvit", DPM_SOLVER, F64, lr=2e-4, weight_decay=0.03, **UVIT),
    "usit-h-f32": _recipe("uvit", FLOW, F32, **UVIT),
    "dit-xl-f32": _recipe("dit", GAUSSIAN, F32, batch=256, **DIT),
    "dit-xl-f32-batch1024": _recipe("dit", GAUSSIAN, F32, lr=2e-4, **DIT),
}
DESCRIPTIONS = {
    "uvit-h-f64": "UViT-H on 64 tokens of dc-ae-f64c128-in-1.0",
    "usit-h-f32": "USiT-H on 256 tokens of dc-ae-f32c32-in-1.0",
    "dit-xl-f32": "DiT-XL on 256 tokens of dc-ae-f32c32-in-1.0",
    "dit-xl-f32-batch1024": "DiT-XL on 256 tokens of dc-ae-f32c32-in-1.0, with a batch of 1024",
}
