"""What a training is: the recipe, which decides the weights, and the run, which says where and how it is computed."""

import math
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dcae_fast.models.config import DiTConfig, UViTConfig
from dcae_fast.models.diffusion_zoo import DIFFUSION_MODELS, DPM_SOLVER, FLOW, GAUSSIAN, SIZES, DiffusionConfig
from dcae_fast.models.zoo import autoencoder_config
from dcae_fast.workers import default_workers

if TYPE_CHECKING:
    from dcae_fast.data.latents import LatentDataset


class TrainingError(RuntimeError):
    """A training that cannot begin or go on; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The network, but for the latents' channels and size, which the data tell."""

    kind: Literal["uvit", "dit"]
    """UViT / USiT, or DiT / SiT"""
    depth: int = SIZES["h"]["depth"]
    """blocks; of a UViT without the middle one"""
    hidden_size: int = SIZES["h"]["hidden_size"]
    """width of a token"""
    num_heads: int = SIZES["h"]["num_heads"]
    """number of attention heads"""
    patch_size: int = 1
    """side of a token, in latent pixels"""
    num_classes: int = 1000
    """number of classes, without the one for no class"""
    class_dropout_prob: float = 0.1
    """share of the training labels that become no class"""

    def __post_init__(self):
        _check_least(self, dict.fromkeys(("depth", "hidden_size", "num_heads", "patch_size", "num_classes"), 1))
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size}; expected a multiple of num_heads={self.num_heads}")
        if not 0 <= self.class_dropout_prob < 1:
            raise ValueError(f"class_dropout_prob={self.class_dropout_prob}; expected at least 0, and less than 1")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the weights. A run is resumed only with the same recipe, apart from `steps`."""

    network: Architecture
    train_scheduler: Literal["DPM_Solver", "SiTSampler", "GaussianDiffusion"]
    """the objective, by the original's name"""
    eval_scheduler: Literal["DPM_Solver", "ODE_dopri5", "ODE_heun2", "SDE", "GaussianDiffusion"]
    """the sampler that the model will have, one that fits the objective"""
    num_inference_steps: int
    """steps of that sampler"""
    autoencoder: str
    """whose latents these are, where the folder has no manifest.json that says so"""
    batch: int = 1024
    """latents of a step, over all ranks and accumulated parts"""
    steps: int = 500_000
    """at which to stop; the only field that may change when a run is resumed"""
    lr: float = 1e-4
    """learning rate of AdamW"""
    betas: tuple[float, float] = (0.9, 0.999)
    """of AdamW"""
    weight_decay: float = 0.0
    """of AdamW; for biases and UViT's last norm it is 0, as in the original"""
    warmup_steps: int = 0
    """steps over which the learning rate rises linearly from warmup_lr"""
    warmup_lr: float = 6.4e-6
    """learning rate from which it rises"""
    clip_grad: float | None = None
    """largest norm of the gradient"""
    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """of the products (autocast); weights are float32. float16 scales the loss"""
    ema_decay: float | None = 0.9999
    """of the moving average of the weights, lower in the beginning; none without it"""
    seed: int = 0
    """of initial weights, data order, times, noise and dropped labels"""

    def __post_init__(self):
        least = {
            "batch": 1,
            "num_inference_steps": 1,
            "steps": 0,
            "lr": 0,
            "weight_decay": 0,
            "warmup_steps": 0,
            "warmup_lr": 0,
            "seed": 0,
        }
        _check_least(self, least)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas}; expected two numbers of at least 0, and less than 1")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise ValueError(f"clip_grad={self.clip_grad}; expected more than 0, or none")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay}; expected between 0 and 1, or none")

    def part(self, ranks: int, accumulate: int) -> int:
        """Latents that a rank computes at once. ValueError if the batch cannot be divided."""
        if self.batch % (ranks * accumulate):
            raise ValueError(f"batch={self.batch} is not a multiple of {ranks} ranks x accumulate={accumulate}")
        return self.batch // (ranks * accumulate)

    def diffusion_config(self, data: "LatentDataset") -> DiffusionConfig:
        """The model that will come of these latents. ValueError for latents or options that do not fit."""
        channels, height, width = data.shape
        if height != width:
            raise ValueError(f"{data.folder}: latents of {height}x{width}; expected squares")
        if len(data.classes) > self.network.num_classes:
            raise ValueError(f"num_classes={self.network.num_classes}; {data.folder} has {len(data.classes)} classes")
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
        """The autoencoder of the latents and what they were multiplied by."""
        if data.manifest is not None:
            settings = data.manifest.settings
            source = os.path.abspath(settings.model) if os.path.exists(settings.model) else settings.model
            return source, settings.scaling_factor
        autoencoder, channels = autoencoder_config(self.autoencoder), data.shape[0]
        if autoencoder.latent_channels != channels:
            raise ValueError(
                f"{data.folder}: latents of {channels} channels, but those of autoencoder={self.autoencoder!r} have "
                f"{autoencoder.latent_channels}"
            )
        if autoencoder.scaling_factor is None:
            raise ValueError(
                f"the scaling factor of autoencoder={self.autoencoder!r} is not known, and {data.folder} has no "
                "manifest.json that tells it; make the latents with `dcae-fast cache-latents`"
            )
        return self.autoencoder, autoencoder.scaling_factor


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where and how a recipe is computed; all of it may change when a run is resumed, `out` aside."""

    data: Path
    """folder of latents, of `dcae-fast cache-latents` or the original"""
    out: Path
    """output folder; resumes the run it contains, if any"""
    device: str | None = None
    """a PyTorch device; by default CUDA if there is any, else the CPU. Under torchrun each rank takes its own"""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """of several ranks: weights replicated (DDP), or sharded with gradients, optimizer and average (FSDP2)"""
    accumulate: int = 1
    """parts that a rank's share of the batch is computed in, one after another"""
    patch: bool = True
    """use the fast operators"""
    compile: bool = False
    """torch.compile: the network, with several ranks its blocks, whose gradients can then leave early"""
    cuda_graphs: bool = False
    """replay the compiled network as CUDA graphs, which need no Python: for small networks and batches, on one GPU"""
    checkpoint_activations: bool = False
    """compute each block again in the backward pass rather than keep what it needs"""
    workers: int = field(default_factory=default_workers)
    """processes of each rank that read latents"""
    log_steps: int = 50
    """steps from one line of the log to the next"""
    save_steps: int = 1000
    """steps from one checkpoint to the next"""
    keep: int = 2
    """checkpoints that are kept"""
    sample_steps: int = 20_000
    """steps from one grid of samples to the next, which needs the autoencoder; 0 for none"""
    sample_cfg: float = 1.5
    """scale of the guidance of these samples, and of those that are compared with real pictures"""
    eval_data: Path | None = None
    """folder of held-out latents, for the loss on them"""
    eval_steps: int = 20_000
    """steps from one evaluation to the next"""
    tensorboard: bool = False
    """also log to TensorBoard, in the run's folder"""
    wandb: str | None = None
    """also log to this project of Weights & Biases"""

    def __post_init__(self):
        least = {"accumulate": 1, "log_steps": 1, "save_steps": 1, "keep": 1, "eval_steps": 1}
        _check_least(self, least | {"workers": 0, "sample_steps": 0})
        if self.workers > 4096:
            raise ValueError(f"workers={self.workers}; expected at most 4096")
        if not math.isfinite(self.sample_cfg):
            raise ValueError(f"sample_cfg={self.sample_cfg}; expected a finite number")
        if self.cuda_graphs and (not self.compile or self.accumulate > 1):
            raise ValueError("cuda_graphs: expected together with compile and without accumulate")


def _check_least(settings: Architecture | Recipe | Run, least: dict[str, int]) -> None:
    for name, bound in least.items():
        value = getattr(settings, name)
        most, told = (2**63, "less than 2**63") if isinstance(value, int) else (math.inf, "a finite number")
        if not bound <= value < most:
            raise ValueError(f"{name}={value}; expected {told if value > bound else f'at least {bound}'}")


def _recipe(kind: Literal["uvit", "dit"], schedulers: dict[str, Any], autoencoder: str, **options: Any) -> Recipe:
    return Recipe(network=Architecture(kind=kind), autoencoder=autoencoder, **schedulers, **options)


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
    "dit-xl-f32-batch1024": "the same with a batch of 1024",
}
