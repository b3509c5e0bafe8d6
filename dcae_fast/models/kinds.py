"""The two kinds of models, autoencoders and diffusion models, told apart by their names and configurations."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

AUTOENCODER, DIFFUSION_MODEL = "autoencoder", "diffusion model"
TAKEN_BY = {
    AUTOENCODER: "an autoencoder: DCAE.from_pretrained takes it, and dcae-fast reconstruct, encode, convert and others",
    DIFFUSION_MODEL: "a diffusion model: DCAEDiffusion.from_pretrained takes it, and dcae-fast sample, eval-diffusion",
}


def of_name(name: Any) -> str | None:
    """The kind of the zoos' model of that name, or in that repository."""
    from . import diffusion_zoo, zoo

    if name in (*diffusion_zoo.diffusion_names(), *map(diffusion_zoo.diffusion_hub_id, diffusion_zoo.DIFFUSION_MODELS)):
        return DIFFUSION_MODEL
    return AUTOENCODER if name in (*zoo.autoencoder_names(), *map(zoo.autoencoder_hub_id, zoo.AUTOENCODERS)) else None


def of_config(given: Mapping[str, Any]) -> str | None:
    """The kind of a model by its config.json."""
    if "model_name" in given:
        return of_name(given["model_name"])
    if "network" in given:
        return DIFFUSION_MODEL
    return AUTOENCODER if "encoder" in given or given.get("_class_name") == "AutoencoderDC" else None


def of_weights(names: Iterable[str]) -> str | None:
    """The kind of a model by the names of its tensors."""
    if any(name.startswith("diffusion_model.") for name in names):
        return DIFFUSION_MODEL
    return AUTOENCODER if any(name.startswith(("encoder.", "decoder.")) for name in names) else None


def of_other_kind(wanted: str, name: str) -> str | None:
    """What to say of a name of the other kind."""
    kind = of_name(name)
    return None if kind in (None, wanted) else f"{name!r} is {TAKEN_BY[kind]}"


def check_name(kind: str, name: Any, names: list[str]) -> None:
    """TypeError or ValueError unless the name is one of these."""
    if not isinstance(name, str):
        raise TypeError(f"name={name!r}; expected the name of {'an' if kind == AUTOENCODER else 'a'} {kind}")
    if name not in names:
        raise ValueError(unknown_name(kind, name, names))


def unknown_name(kind: str, name: str, names: list[str]) -> str:
    """What to say of a name that is none of these; kind: what they are names of."""
    other = of_other_kind(kind, name)
    if other:
        return other
    close = get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown {kind} {name!r}; {hint}Known: {', '.join(names)}"
