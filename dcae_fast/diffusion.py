"""Class labels to pictures: a diffusion transformer, its sampler, and the autoencoder that decodes the latents."""

import os
from collections.abc import Callable
from numbers import Integral

import torch
from torch import nn

from .captured_steps import CapturedSteps
from .models import diffusion_checkpoint, kinds
from .models.autoencoder import DCAE
from .models.diffusion_zoo import DiffusionConfig, diffusion_config
from .models.dit import DiT
from .models.uvit import UViT
from .models.weights import CheckpointError
from .sampling import SAMPLERS, guided
from .sampling.arguments import check_guidance


class DCAEDiffusion(nn.Module):
    """A transformer, `diffusion_model`, that models the latents of `autoencoder`, multiplied by `scaling_factor`.

        z = model.generate(labels, cfg_scale=6.0, generator=generator)
        x = model.decode(z)

    Raises ValueError if transformer and autoencoder have different numbers of latent channels.
    """

    def __init__(self, config: DiffusionConfig, diffusion_model: UViT | DiT, autoencoder: DCAE):
        super().__init__()
        channels, expected = autoencoder.config.latent_channels, config.network.in_channels
        if channels != expected:
            raise ValueError(f"the autoencoder has {channels} latent channels; the diffusion model expects {expected}")
        self.config = config
        self.diffusion_model = diffusion_model
        self.autoencoder = autoencoder

    @classmethod
    def from_name(cls, name: str) -> "DCAEDiffusion":
        """The architectures with this name (see `diffusion_zoo.diffusion_names`), with random weights."""
        kinds.check_name(kinds.DIFFUSION_MODEL, name)
        config = diffusion_config(name)
        return cls(config, config.build(), DCAE.from_name(config.autoencoder))

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        config: DiffusionConfig | None = None,
        autoencoder: str | os.PathLike | None = None,
        ema: bool = True,
    ) -> "DCAEDiffusion":
        """A trained model on the CPU, in evaluation mode, with float32 parameters whatever the dtype in the file.

        source: interpreted as the first that applies of: a folder or weight file (also a .pt file of DC-Gen's trainer),
        a name in the zoo, a Hugging Face repository. revision, cache_dir, local_files_only: as in huggingface_hub;
        cache_dir and local_files_only also apply to the autoencoder's repository. config: replaces the checkpoint's
        configuration. autoencoder: a source for `DCAE.from_pretrained`; replaces the autoencoder in the checkpoint or
        in its configuration. ema: from a trainer's file, load the moving average of the weights, if there is one.
        Raises `weights.CheckpointError`.
        """
        parts = diffusion_checkpoint.load(
            source,
            config=config,
            autoencoder=autoencoder,
            ema=ema,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        try:
            return cls(*parts).eval()
        except ValueError as error:
            raise CheckpointError(f"{os.fspath(source)}: {error}") from error

    def save_pretrained(self, folder: str | os.PathLike, autoencoder: bool = True) -> None:
        """Writes the transformer's weights and config.json to a folder that `from_pretrained` and DC-Gen can load.

        autoencoder: also save the autoencoder, in the subfolder "autoencoder". DC-Gen ignores this subfolder and loads
        the autoencoder by its name. Every file is replaced atomically.
        """
        if autoencoder:
            self.autoencoder.save_pretrained(os.path.join(folder, diffusion_checkpoint.AUTOENCODER))
        diffusion_checkpoint.save(self.config, self.diffusion_model, folder)

    @property
    def scaling_factor(self) -> float:
        return self.config.scaling_factor

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] → scaled latents [B, C, H / f, W / f], as the transformer models them."""
        return self.autoencoder.encode(x) * self.scaling_factor

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Scaled latents → pictures, the inverse of `encode`. Computes in the dtype of the autoencoder's weights."""
        weight = next(self.autoencoder.parameters())
        return self.autoencoder.decode((z / self.scaling_factor).to(weight.dtype))

    @torch.no_grad()
    def generate(
        self,
        labels: torch.Tensor,
        null_labels: torch.Tensor | None = None,
        cfg_scale: float = 1.0,
        generator: torch.Generator | None = None,
        channels: int | None = None,
        *,
        interval: tuple[float, float] | None = None,
        sampler: str | None = None,
        steps: int | None = None,
        progress: Callable[[], object] | None = None,
    ) -> torch.Tensor:
        """Samples float32 latents [B, C, h, w] for `decode`. The model must be in evaluation mode.

        labels: [B] integers from 0 to num_classes, where num_classes means no class. null_labels: [B], the labels of
        the unguided branch; num_classes by default. cfg_scale, interval: scale of classifier-free guidance, and the
        times to which guidance is limited; see `sampling.guided`. generator: draws the initial noise, all at once for
        the batch, and the noise that SDE and GaussianDiffusion add per step (DC-Gen draws the latter from the global
        generator); must be on the device of the model. channels: adaptive models can sample fewer channels. sampler,
        steps: None means the values in the configuration. progress: called after each call of the network.

        The sampler computes in float32; the transformer computes in the dtype of its weights or of an active autocast.
        Raises TypeError or ValueError for invalid arguments.
        """
        sampler = sampler or self.config.eval_scheduler
        self.config.check_sampler(sampler)
        network, weight = self.config.network, next(self.diffusion_model.parameters())
        labels = self._check_labels(labels, "labels")
        if null_labels is None:
            null_labels = torch.full_like(labels, network.num_classes)
        else:
            null_labels = self._check_labels(null_labels, "null_labels")
        if len(null_labels) != len(labels):
            raise ValueError(f"null_labels has {len(null_labels)} entries; expected {len(labels)}, as labels has")
        check_guidance(cfg_scale, interval, name="cfg_scale")
        _check_generator(generator, weight.device)
        channels = network.in_channels if channels is None else self._check_channels(channels)
        shape = (len(labels), channels, network.input_size, network.input_size)
        noise = torch.randn(shape, generator=generator, dtype=torch.float32, device=weight.device)
        if not len(labels):  # an adaptive solver cannot choose a step size for an empty batch
            return noise

        def call(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.diffusion_model(x.to(weight.dtype), t, y)

        def call_with_progress(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            out = call(x, t, y)
            if progress:
                progress()
            return out

        steps = self.config.num_inference_steps if steps is None else steps
        guidance = labels, null_labels, cfg_scale, interval
        run = CapturedSteps(self.diffusion_model, call, *guidance, progress)
        return SAMPLERS[sampler](guided(call_with_progress, *guidance), noise, steps, generator, run)

    def _check_labels(self, labels: torch.Tensor, name: str) -> torch.Tensor:
        """The labels, on the model's device. Checks their values, since an invalid label would crash a CUDA kernel."""
        null_label = self.config.network.num_classes
        if not isinstance(labels, torch.Tensor):
            raise TypeError(f"{name} is a {type(labels).__name__}; expected a tensor [B] of integers")
        if labels.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} has dtype {labels.dtype}; expected int32 or int64, from 0 to {null_label}")
        if labels.dim() != 1:
            raise ValueError(f"{name} has shape {list(labels.shape)}; expected [B]")
        if len(labels) and not (0 <= labels.min() and labels.max() <= null_label):
            raise ValueError(f"{name}={labels.tolist()}; expected 0 to {null_label}, where {null_label} means no class")
        return labels.to(next(self.diffusion_model.parameters()).device)

    def _check_channels(self, channels: int) -> int:
        most = self.config.network.in_channels
        least = 1 if getattr(self.config.network, "adaptive", False) else most
        if not isinstance(channels, Integral) or not least <= channels <= most:
            raise ValueError(f"channels={channels!r}; expected {most if least == most else f'{least} to {most}'}")
        return channels


def _check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is a {type(generator).__name__}; expected a torch.Generator")
    if generator.device.type != device.type:
        raise ValueError(f"generator is on {generator.device}; expected a generator on {device}, as the model is")
