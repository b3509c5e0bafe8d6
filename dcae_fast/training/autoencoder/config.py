"""The options of training an autoencoder, and its recipes. PyTorch is not imported.

The recipes follow decoupled high-resolution adaptation (arXiv 2410.10733, section 3.2). The original's code for it is
not public. Learning rates, betas, weight decay and loss weights of the three phases are second-hand: reported, not
taken from the paper's code. Batch sizes, numbers of steps, crops, the average and the recipe "decoder" are this
project's choice.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dcae_fast.training.engine.config import Recipe, Run, check_least, check_update


@dataclass(frozen=True, kw_only=True)
class Adversarial:
    """The discriminator (PatchGAN) and the losses that it gives. Without gan_weight there is no discriminator."""

    gan_weight: float = 0.0
    """weight of the adversarial loss; 0 trains without a discriminator"""
    gan_loss: Literal["hinge", "non-saturating"] = "hinge"
    """adversarial loss"""
    gan_start: int = 0
    """number of steps before the discriminator begins to train and to count"""
    gan_adaptive: bool = True
    """multiply the adversarial loss by the ratio of the two gradient norms at the decoder's last convolution"""
    gan_clamp: float = 1e4
    """largest value of that ratio"""
    r1: float = 0.0
    """weight of the discriminator's R1 gradient penalty; 0 for none"""
    lecam: float = 0.0
    """weight of the discriminator's LeCam regularisation; 0 for none"""
    lecam_decay: float = 0.999
    """decay of the averages of the logits, for LeCam"""
    discriminator_layers: int = 3
    """number of layers of the discriminator that halve the resolution, 3 to 5"""
    discriminator_width: int = 64
    """number of channels of the discriminator's first layer"""
    discriminator_norm: Literal["batch", "spectral"] = "batch"
    """normalisation in the discriminator"""
    discriminator_lr: float | None = None
    """learning rate of the discriminator; None: that of the autoencoder"""

    def __post_init__(self):
        check_least(self, dict.fromkeys(("gan_weight", "gan_start", "r1", "lecam"), 0))
        check_least(self, {"discriminator_width": 1})
        if not self.gan_clamp > 0:
            raise ValueError(f"gan_clamp={self.gan_clamp}; expected more than 0")
        if not 3 <= self.discriminator_layers <= 5:
            raise ValueError(f"discriminator_layers={self.discriminator_layers}; expected 3, 4 or 5")
        if not 0 <= self.lecam_decay < 1:
            raise ValueError(f"lecam_decay={self.lecam_decay}; expected at least 0, and less than 1")
        if self.discriminator_lr is not None:
            check_least(self, {"discriminator_lr": 0})


@dataclass(frozen=True, kw_only=True)
class AutoencoderRecipe(Recipe):
    """The options that decide the weights. Of these, only `steps` may change when a run is resumed."""

    source: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """model name, Hugging Face repository, folder or weight file to start from, or the --out of another training"""
    model: str | None = None
    """in place of --from: name of a model (see `dcae-fast models`) to start from with random weights"""
    train: tuple[str, ...] = ("encoder", "decoder")
    """beginnings of the names of the parameters to train, such as encoder.project_out; all others are frozen"""
    resolution: int = 256
    """side of the square crops, in pixels"""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """smallest and largest side of a crop, relative to the picture's shorter side; at least the resolution"""
    flip: bool = True
    """mirror half of the crops horizontally"""
    small: Literal["skip", "enlarge"] = "skip"
    """what to do with pictures whose shorter side is smaller than the resolution"""
    batch: int = 64
    """crops per step, summed over all ranks and accumulated parts"""
    steps: int = 100_000
    """number of steps of the whole training; may change when a run is resumed"""
    pixel: Literal["l1", "l2", "charbonnier"] = "l1"
    """loss of the pixels, with weight 1"""
    perceptual: Literal["lpips", "none"] = "lpips"
    """perceptual loss"""
    perceptual_weight: float = 0.25
    """weight of the perceptual loss"""
    gan: Adversarial = field(default_factory=Adversarial)
    lr: float = 6.4e-5
    """learning rate of AdamW"""
    betas: tuple[float, float] = (0.9, 0.999)
    """betas of AdamW"""
    weight_decay: float = 0.1
    """weight decay of AdamW; biases have none"""
    warmup_steps: int = 0
    """steps over which the learning rate rises linearly from 0 to lr"""
    clip_grad: float | None = None
    """largest norm of the autoencoder's gradient; None: do not clip"""
    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """precision of matrix products and convolutions, by autocast; weights are float32. float16 uses loss scaling"""
    ema_decay: float | None = 0.999
    """decay of the moving average of the weights, smaller in the first steps; None: no average"""
    adaptive_latent_channels: tuple[int, ...] = ()
    """DC-AE 1.5: the numbers of latent channels to train; by default the multiples of an eighth of all channels"""
    num_sample_latent_channels: int = 1
    """DC-AE 1.5: a step trains the smallest number of latent channels, the largest, and so many drawn at random"""

    def __post_init__(self):
        super().__post_init__()
        check_least(self, {"resolution": 1, "num_sample_latent_channels": 0})
        check_least(self, dict.fromkeys(("perceptual_weight", "lr", "weight_decay", "warmup_steps"), 0))
        if not self.train:
            raise ValueError("train: expected at least one beginning of a parameter's name, such as decoder")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale={self.crop_scale}; expected two rising numbers, above 0 and up to 1")
        check_update(self)

    @property
    def critic_lr(self) -> float:
        """The learning rate of the discriminator."""
        return self.lr if self.gan.discriminator_lr is None else self.gan.discriminator_lr


@dataclass(frozen=True, kw_only=True)
class AutoencoderRun(Run):
    """Where and how to compute a recipe. All of these except `out` may change when a run is resumed."""

    data: Path
    """photographs to train on: a folder, a folder of class folders, or WebDataset .tar shards"""
    eval_data: Path | None = None
    """held-out photographs, to measure the reconstructions; None: at most 1000 of the training photographs"""
    max_pixels: int | None = None
    """skip photographs with more pixels; None means Pillow's limit, 178956970"""
    cuda_graphs: bool = False
    """replay whole steps, with backward pass and optimizer, as CUDA graphs: without Python overhead, on one GPU"""
    sample_steps: int = 1000
    """steps between two pictures that compare originals with reconstructions; 0 for none"""
    eval_steps: int = 5000
    """steps between two evaluations"""
    licence: str = "unknown"
    """licence of the trained weights, for the model card"""

    def __post_init__(self):
        super().__post_init__()
        if self.max_pixels is not None:
            check_least(self, {"max_pixels": 1})


ADAPTED = {"train": ("encoder.project_out", "decoder.project_in"), "lr": 1.6e-5, "weight_decay": 1e-3}
REFINED = {"train": ("decoder.project_out",), "lr": 5.4e-5, "betas": (0.5, 0.9)}
RECIPES = {
    "full": AutoencoderRecipe(),
    "latent-adaptation": AutoencoderRecipe(resolution=512, batch=16, steps=20_000, **ADAPTED),
    "local-refinement": AutoencoderRecipe(steps=20_000, gan=Adversarial(gan_weight=0.1), **REFINED),
    "decoder": AutoencoderRecipe(train=("decoder",), batch=16, steps=10_000, lr=1.6e-5, weight_decay=1e-3),
}
DESCRIPTIONS = {
    "full": "phase 1 at 256 px: encoder and decoder (default rates and weights are second-hand)",
    "latent-adaptation": "phase 2 at 512 px: the layers around the latent (default rates are second-hand)",
    "local-refinement": "phase 3 at 256 px: the decoder's last layers, with a discriminator (second-hand)",
    "decoder": "fine-tune the decoder on your own photographs; encoder and latents stay unchanged",
}
