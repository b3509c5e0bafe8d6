"""The two kinds of models, autoencoders and diffusion models, told apart by their names and configurations."""

from collections.abc import Iterable, Mapping
from typing import Any

from . import diffusion_zoo, zoo

AUTOENCODER, DIFFUSION_MODEL = "autoencoder", "diffusion model"
TAKEN_BY = {
    AUTOENCODER: "an autoencoder: DCAE.from_pretrained takes it, and dcae-fast reconstruct, encode, convert and others",
    DIFFUSION_MODEL: "a diffusion model: DCAEDiffusion.from_pretrained takes it, and dcae-fast sample, eval-diffusion",
}


def of_name(name: Any) -> str | None:
    """The kind of the model with that name, or in that repository; None if no model of the zoos has it."""
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
    """The text of an error about the name of a model of the other kind; None for any other name."""
    kind = of_name(name)
    return None if kind in (None, wanted) else f"{name!r} is {TAKEN_BY[kind]}"


def check_name(wanted: str, name: Any) -> None:
    """ValueError for the name of a model of the other kind."""
    text = other_kind(wanted, name)
    if text:
        raise ValueError(text)
