"""Finding the files of a checkpoint on the hub: in its cache, and without a connection."""

import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from small_checkpoints import COMMIT, CONFIG, assert_same, build

from dcae_fast.models import checkpoint, zoo
from dcae_fast.models.autoencoder import DCAE
from dcae_fast.models.checkpoint import CheckpointError


@pytest.fixture
def hub(tmp_path, folder) -> Path:
    """A Hugging Face cache with one repository, someone/model, at revision `main` and `v1`."""
    repository = tmp_path / "hub" / "models--someone--model"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    for revision in ("main", "v1"):
        (repository / "refs" / revision).write_text(COMMIT)
    return tmp_path / "hub"


@pytest.mark.parametrize("revision", [None, "v1", COMMIT])
def test_repository_in_the_cache(hub, revision):
    options = {"revision": revision, "cache_dir": hub, "local_files_only": True}
    assert_same(DCAE.from_pretrained("someone/model", **options), build())


def test_name_of_the_zoo_in_the_cache(hub, monkeypatch):
    monkeypatch.setitem(zoo.AUTOENCODERS, "dc-ae-test", CONFIG)
    (hub / "models--someone--model").rename(hub / "models--mit-han-lab--dc-ae-test")
    assert_same(DCAE.from_pretrained("dc-ae-test", cache_dir=hub, local_files_only=True), build())


@pytest.mark.parametrize(
    "source, revision, message",
    [
        ("someone/else", None, "someone/else: not in the local cache"),
        ("someone/model", "v2", "someone/model: not in the local cache"),
        ("dc-ae-f32c32-in-1.0", None, "mit-han-lab/dc-ae-f32c32-in-1.0: not in the local cache"),
        ("not a/repository", None, "not a/repository: no such file or folder, and not a valid name of a repository"),
    ],
)
def test_not_in_the_cache(hub, source, revision, message):
    with pytest.raises(CheckpointError, match=message):
        DCAE.from_pretrained(source, revision=revision, cache_dir=hub, local_files_only=True)


def test_offline_mode(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_same(DCAE.from_pretrained("someone/model", cache_dir=hub), build())
    with pytest.raises(CheckpointError, match="someone/else: not in the local cache"):
        DCAE.from_pretrained("someone/else", cache_dir=hub)


def test_repository_without_weights(hub):
    next(hub.rglob("model.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="someone/model: not in the local cache.*needed is model.safetensors"):
        DCAE.from_pretrained("someone/model", cache_dir=hub, local_files_only=True)
    for file in checkpoint.WEIGHTS["original"]:  # known not to be there
        (hub / "models--someone--model" / ".no_exist" / COMMIT).mkdir(parents=True, exist_ok=True)
        (hub / "models--someone--model" / ".no_exist" / COMMIT / file).touch()
    with pytest.raises(CheckpointError, match="someone/model: no weights; looked for model.safetensors"):
        DCAE.from_pretrained("someone/model", cache_dir=hub, local_files_only=True)


@pytest.fixture
def answers(monkeypatch) -> list[Exception]:
    """The server's answers to requests for a file's metadata; no other request is allowed."""
    given: list[Exception] = []

    def ask(url, **options):
        assert len(given) == 1, "asked twice"
        raise given.pop()

    def download(name, file, **options):
        try:
            return hf_hub_download(name, file, **options | {"local_files_only": True})
        except LocalEntryNotFoundError:
            assert options["local_files_only"], "not asked first whether there is a connection"
            raise

    monkeypatch.setattr("dcae_fast.models.finder.get_hf_file_metadata", ask)
    monkeypatch.setattr("dcae_fast.models.finder.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return given


def test_without_a_connection_nothing_is_tried_twice(hub, answers):
    """The error contains the command to get the weights."""
    answers.append(ConnectionError("no route to host"))
    with pytest.raises(CheckpointError) as error:
        DCAE.from_pretrained("dc-ae-f32c32-in-1.0", cache_dir=hub)
    assert "huggingface.co cannot be reached (no route to host)" in str(error.value)
    command = "hf download mit-han-lab/dc-ae-f32c32-in-1.0 --local-dir dc-ae-f32c32-in-1.0\n"
    assert command in str(error.value) and "name ./dc-ae-f32c32-in-1.0 in place of dc-ae-f32c32-in-1.0" in str(
        error.value
    )


def test_a_file_that_is_not_cached_of_a_model_that_is(hub, answers):
    (next(hub.rglob("snapshots/*")) / "model.safetensors").unlink()
    answers.append(TimeoutError())
    with pytest.raises(CheckpointError, match=r"cannot be reached \(TimeoutError\); needed is model.safetensors"):
        DCAE.from_pretrained("someone/model", cache_dir=hub)


@pytest.mark.parametrize(
    "error, words",
    [
        (GatedRepoError, "a gated repository: accept its terms"),
        (RepositoryNotFoundError, "no repository at https://huggingface.co, or a private one: `hf auth login`"),
        (RevisionNotFoundError, "the repository has no revision 'v9'"),
        (ConnectionResetError, "config.json cannot be downloaded: reset"),
    ],
)
def test_answers_of_the_hub(error, words, tmp_path, monkeypatch):
    def download(*args, **options):
        raise error("reset\nrequest 1f", **({"response": response} if issubclass(error, HfHubHTTPError) else {}))

    response = Mock(headers={}, request=None)
    monkeypatch.setattr("dcae_fast.models.finder.get_hf_file_metadata", lambda url: None)
    monkeypatch.setattr("dcae_fast.models.finder.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError) as caught:
        DCAE.from_pretrained("someone/model", revision="v9", cache_dir=tmp_path)
    assert words in str(caught.value) and "request" not in str(caught.value)
