"""Tell the two kinds of models apart, autoencoders and diffusion models, by name, configuration or weights."""

from collections.abc import Iterable, Mapping
from typing import Any

from . import diffusion_zoo, zoo

AUTOENCODER, DIFFUSION_MODEL = "autoencoder", "diffusion model"
LOADED_BY = {
    AUTOENCODER: "an autoencoder; load it with DCAE.from_pretrained, or use dcae-fast reconstruct, encode, convert",
    DIFFUSION_MODEL: "a diffusion model; load it with DCAEDiffusion.from_pretrained, or use dcae-fast sample",
}


def of_name(name: Any) -> str | None:
    """The kind of the released model with this name or Hugging Face repository; None if there is no such model."""
    if name in (*diffusion_zoo.diffusion_names(), *map(diffusion_zoo.diffusion_hub_id, diffusion_zoo.DIFFUSION_MODELS)):
        return DIFFUSION_MODEL
    return AUTOENCODER if name in (*zoo.autoencoder_names(), *map(zoo.autoencoder_hub_id, zoo.AUTOENCODERS)) else None


def of_config(given: Mapping[str, Any]) -> str | None:
    """The kind of the model that has this config.json; None if unknown."""
    if "model_name" in given:
        return of_name(given["model_name"])
    if "network" in given:
        return DIFFUSION_MODEL
    return AUTOENCODER if "encoder" in given or given.get("_class_name") == "AutoencoderDC" else None


def of_weights(names: Iterable[str]) -> str | None:
    """The kind of the model whose tensors have these names; None if unknown."""
    if any(name.startswith("diffusion_model.") for name in names):
        return DIFFUSION_MODEL
    return AUTOENCODER if any(name.startswith(("encoder.", "decoder.")) for name in names) else None


def other_kind(wanted: str, name: Any) -> str | None:
    """The error message if the name is that of a model of the other kind; else None."""
    kind = of_name(name)
    return None if kind in (None, wanted) else f"{name!r} is {LOADED_BY[kind]}"


def check_name(wanted: str, name: Any) -> None:
    """Raise ValueError if the name is that of a model of the other kind."""
    text = other_kind(wanted, name)
    if text:
        raise ValueError(text)
