"""Find the files of a checkpoint: in a folder, in this package, or in a Hugging Face repository."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import (
    _CACHED_NO_EXIST,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from dcae_fast.errors import CheckpointError, NotDownloadedError, OtherKindError

from . import kinds, zoo

CONFIG = "config.json"
PICKLES = (".pt", ".pth", ".ckpt", ".bin")

Finder = Callable[[str], Path | None]


@dataclass(frozen=True)
class Names:
    """Models that have names. kind: see `kinds`; bundled: name → folder; hub_ids: name → Hugging Face repository."""

    kind: str
    bundled: Mapping[str, Path]
    hub_ids: Mapping[str, str]


def finder(source: str | os.PathLike, names: Names, **hub: Any) -> Finder:
    """A function file name → path of the file in the source, or None if the source has no such file.

    source: a folder, a model name, or a Hugging Face repository, tried in this order. hub: revision, cache_dir and
    local_files_only, as in `hf_hub_download`. `finder` and the function raise CheckpointError; the function raises
    NotDownloadedError for a file that is not in the local cache and cannot be downloaded.
    """
    name = os.fspath(source)
    if os.path.isdir(name):
        return _in_folder(Path(name))
    if name in names.bundled:
        folder = names.bundled[name]
        if not (folder / CONFIG).is_file():
            raise CheckpointError(f"{folder / CONFIG}: this file of dcae_fast is missing; install the package again")
        return _in_folder(folder)
    if name in names.hub_ids:
        return _in_repository(names.hub_ids[name], **hub)
    other = kinds.other_kind(names.kind, name)
    if other:
        raise OtherKindError(other)
    if os.path.isabs(name) or name.startswith(".") or name.endswith((".safetensors", ".json", *PICKLES)):
        raise CheckpointError(f"no such file or folder: {name}")
    if name.count("/") != 1:
        unknown = zoo.unknown_name(names.kind, name, [*names.hub_ids, *names.bundled])
        raise CheckpointError(f"no such file or folder, and not a Hugging Face repository: {unknown}")
    return _in_repository(name, **hub)


def check_arguments(source: Any, config: Any, expected: type) -> None:
    """Raise TypeError for arguments of from_pretrained with a wrong type. expected: the class of the configuration."""
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source={source!r}; expected a name, a path or a repository")
    if not isinstance(config, expected | None):
        raise TypeError(f"config is {type(config).__name__}; expected {expected.__name__}")


@contextmanager
def advised(source: str | os.PathLike, how_to_get: Callable[[str], str]) -> Iterator[None]:
    """Turn a NotDownloadedError raised inside into a CheckpointError with advice how to get the source's files."""
    try:
        yield
    except NotDownloadedError as error:
        raise CheckpointError(f"{error}\n{how_to_get(os.fspath(source))}") from error


def find_first(find: Finder, files: list[str], source: str | os.PathLike) -> Path:
    """The path of the first of the files that the source has. CheckpointError if it has none of them."""
    not_downloaded = []
    for file in files:
        try:
            path = find(file)
        except NotDownloadedError as error:  # the repository may or may not have this file
            not_downloaded.append(error)
        else:
            if path is not None:
                return path
    if not_downloaded:
        raise not_downloaded[0]
    raise CheckpointError(f"{os.fspath(source)}: no weights; looked for {', '.join(files)}{_inside(Path(source))}")


def _inside(folder: Path) -> str:
    """The question "did you mean ...?", with the paths of other weight files in a folder (for example in half
    precision) and of models inside it (for example of a training); empty without any.
    """
    if not folder.is_dir():
        return ""
    found = [path for path in folder.iterdir() if path.suffix in (".safetensors", *PICKLES) and path.is_file()]
    found += [path.parent for path in folder.glob(f"*/{CONFIG}")]
    return f"; did you mean {' or '.join(map(str, sorted(found)[:3]))}?" if found else ""


def _in_folder(folder: Path) -> Finder:
    return lambda file: folder / file if (folder / file).is_file() else None


def _in_repository(name: str, revision: str | None = None, **cache: Any) -> Finder:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise CheckpointError(f"{name}: no such file or folder, and not a valid name of a repository") from error
    unreachable = _reachability(name, revision)

    def find(file: str) -> Path | None:
        there = try_to_load_from_cache(name, file, cache.get("cache_dir"), revision)
        why = None if isinstance(there, str) else _why_not_online(cache) or unreachable()
        if why and there is _CACHED_NO_EXIST:
            return None
        # without a connection, huggingface_hub would retry for half a minute
        options = cache | ({"local_files_only": True} if why else {})
        try:
            return Path(hf_hub_download(name, file, revision=revision, **options))
        except LocalEntryNotFoundError as error:
            why = why or "the connection was lost"
            what = f"{name}: not in the local cache, and cannot be downloaded: {why}"
            raise NotDownloadedError(f"{what}; needed is {file}") from error
        except EntryNotFoundError:
            return None
        except Exception as error:  # versions of huggingface_hub use several HTTP libraries
            raise CheckpointError(f"{name}: {_failure(file, revision, error)}") from error

    return find


def _why_not_online(cache: Mapping[str, Any]) -> str | None:
    if cache.get("local_files_only"):
        return "local_files_only is set"
    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else None


def _reachability(name: str, revision: str | None) -> Callable[[], str | None]:
    """A function that returns why the server cannot be reached, or None. It asks the server once, without retries."""

    @cache
    def unreachable() -> str | None:
        try:
            get_hf_file_metadata(hf_hub_url(name, CONFIG, revision=revision))
        except HfHubHTTPError:  # an answer
            return None
        except Exception as error:
            return f"{constants.ENDPOINT} cannot be reached ({_first_line(error)})"
        return None

    return unreachable


def _failure(file: str, revision: str | None, error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return "a gated repository: accept its terms on its page, and log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return f"no local folder, and no repository at {constants.ENDPOINT}, or a private one: `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"the repository has no revision {revision!r}"
    return f"{file} cannot be downloaded: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
