"""Pictures from labels: a diffusion transformer, its sampler, and the autoencoder that decodes its latents."""

import os
from collections.abc import Callable
from numbers import Integral

import torch
from torch import nn

from .captured_steps import CapturedSteps
from .models import diffusion_checkpoint
from .models.autoencoder import DCAE
from .models.diffusion_zoo import DiffusionConfig, diffusion_config
from .models.dit import DiT
from .models.uvit import UViT
from .models.weights import CheckpointError
from .sampling import SAMPLERS, guided
from .sampling.arguments import check_guidance


class DCAEDiffusion(nn.Module):
    """`diffusion_model`, the transformer, and `autoencoder`, whose latents times `scaling_factor` it models.

        z = model.generate(labels, cfg_scale=6.0, generator=generator)
        x = model.decode(z)

    ValueError if the latents of one are not those of the other.
    """

    def __init__(self, config: DiffusionConfig, diffusion_model: UViT | DiT, autoencoder: DCAE):
        super().__init__()
        channels, expected = autoencoder.config.latent_channels, config.network.in_channels
        if channels != expected:
            raise ValueError(f"the autoencoder's latents have {channels} channels, the diffusion model's {expected}")
        self.config = config
        self.diffusion_model = diffusion_model
        self.autoencoder = autoencoder

    @classmethod
    def from_name(cls, name: str) -> "DCAEDiffusion":
        """The architectures of that name (`diffusion_zoo.diffusion_names`) with random weights."""
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
        """A trained model on the CPU: float32 parameters whatever the file's type, evaluation mode.

        source: a folder or weight file, also one of the original's trainer (.pt), a name of the zoo, or a Hugging Face
        repository; the first of these that it can be. revision, cache_dir, local_files_only: as in huggingface_hub, the
        latter two for the autoencoder's repository as well. config: instead of the checkpoint's own. autoencoder: what
        `DCAE.from_pretrained` takes, instead of the checkpoint's own or the one that its configuration names.
        ema: of a trainer's file, the moving average of the weights, if it has one, instead of the weights.
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
        """The transformer's weights and config.json in a folder, for `from_pretrained` and for the original.

        autoencoder: save it too, in a folder "autoencoder" inside. The original does not, and loads it by its name.
        Every file is replaced at once or not at all.
        """
        if autoencoder:
            self.autoencoder.save_pretrained(os.path.join(folder, diffusion_checkpoint.AUTOENCODER))
        diffusion_checkpoint.save(self.config, self.diffusion_model, folder)

    @property
    def scaling_factor(self) -> float:
        return self.config.scaling_factor

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] → the latents that the transformer models, [B, C, H / f, W / f]."""
        return self.autoencoder.encode(x) * self.scaling_factor

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """The inverse of `encode`, in the dtype of the autoencoder's weights whatever that of z."""
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
        """Samples latents [B, C, h, w], float32, for `decode`. The model must be in evaluation mode.

        labels: [B] integers from 0 to num_classes, which means no class; null_labels: [B], num_classes by default.
        cfg_scale, interval: classifier-free guidance and the times to which it is limited, see `sampling.guided`.
        generator: of the initial noise, drawn at once for the whole batch, and of what SDE and GaussianDiffusion add
        on the way (for which the original takes the global one); on the device of the model.
        channels: of adaptive models, to sample fewer. sampler, steps: by default those of the configuration.
        progress: called after each call of the network.

        The sampler computes in float32 and the transformer in the dtype of its weights, or of an autocast around this.
        Raises TypeError or ValueError for arguments that do not fit.
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
            raise ValueError(f"{len(null_labels)} null_labels for {len(labels)} labels")
        check_guidance(cfg_scale, interval, name="cfg_scale")
        _check_generator(generator, weight.device)
        channels = network.in_channels if channels is None else self._check_channels(channels)
        shape = (len(labels), channels, network.input_size, network.input_size)
        noise = torch.randn(shape, generator=generator, dtype=torch.float32, device=weight.device)
        if not len(labels):  # adaptive solvers find no step without an error to measure
            return noise

        def call(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.diffusion_model(x.to(weight.dtype), t, y)

        def followed(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            out = call(x, t, y)
            if progress:
                progress()
            return out

        steps = self.config.num_inference_steps if steps is None else steps
        guidance = labels, null_labels, cfg_scale, interval
        run = CapturedSteps(self.diffusion_model, call, *guidance, progress)
        return SAMPLERS[sampler](guided(followed, *guidance), noise, steps, generator, run)

    def _check_labels(self, labels: torch.Tensor, name: str) -> torch.Tensor:
        """The labels, where the model is; reads their values, as a wrong one would be fatal in a kernel."""
        null_label = self.config.network.num_classes
        if not isinstance(labels, torch.Tensor):
            raise TypeError(f"{name} is a {type(labels).__name__}; expected a tensor [B] of integers")
        if labels.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} are {labels.dtype}; expected integers from 0 to {null_label}, no class")
        if labels.dim() != 1:
            raise ValueError(f"{name} have shape {list(labels.shape)}; expected [B]")
        if len(labels) and not (0 <= labels.min() and labels.max() <= null_label):
            raise ValueError(f"{name}={labels.tolist()}; expected from 0 to {null_label}, no class")
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
        raise ValueError(f"generator is on {generator.device}; expected one on {device}, where the model is")
