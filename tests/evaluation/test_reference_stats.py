"""`dcae-fast reference-stats`: the files that it writes, from folders and from .npz files."""

import errno
import logging
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from stand_ins import embeddings, features, run_ranks

from dcae_fast import cli, images
from dcae_fast.evaluation import networks
from dcae_fast.evaluation.moments import Moments

NAMES = ("fid.npz", "pr.npy", "cmmd.npy")


def command(source, out) -> list[str]:
    files = [str(out / name) for name in NAMES]
    wanted = ["--fid", files[0], "--precision-recall", files[1], "--cmmd", files[2]]
    settings = ["--resolution", "64", "--batch", "2", "--workers", "0", "--device", "cpu"]
    return ["reference-stats", str(source), *wanted, *settings]


def crops(folder) -> torch.Tensor:
    pictures = []
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            pictures.append(torch.from_numpy(np.array(images.centre_crop(image.convert("RGB"), 64, 64))))
    return torch.stack(pictures)


def check(out, pixels: torch.Tensor) -> None:
    pictures = pixels.permute(0, 3, 1, 2)
    expected = features(pictures)
    assert np.array_equal(np.load(out / "pr.npy"), expected.numpy())
    assert np.array_equal(np.load(out / "cmmd.npy"), embeddings(pictures).numpy())
    stats = Moments.load(out / "fid.npz")
    np.testing.assert_allclose(stats.mu, expected.double().mean(0).numpy(), rtol=1e-12)
    np.testing.assert_allclose(stats.sigma, np.cov(expected.double().numpy().T), rtol=1e-9)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_folder(photographs, tmp_path, stand_ins, ranks):
    run = command(photographs, tmp_path)
    assert cli.main(run) == 0 if ranks == 1 else run_ranks(ranks, run) is None
    check(tmp_path, crops(photographs))


@pytest.mark.parametrize("save, ranks", [(np.savez, 1), (np.savez_compressed, 1), (np.savez, 3)])
def test_a_reference_batch(tmp_path, stand_ins, save, ranks):
    """Five pictures in batches of two, since whole files of ADM would not fit in memory."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 12, 3), np.uint8)
    save(tmp_path / "VIRTUAL_small.npz", arr_0=pixels)
    run = command(tmp_path / "VIRTUAL_small.npz", tmp_path)
    assert cli.main(run) == 0 if ranks == 1 else run_ranks(ranks, run) is None
    check(tmp_path, torch.from_numpy(pixels))


def test_a_missing_network(photographs, tmp_path, stand_ins, capsys):
    """The other files are written, and the message says which weight file to put where."""
    stand_ins("cmmd")
    assert cli.main(command(photographs, tmp_path)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cmmd.npy"]
    error = capsys.readouterr().err
    assert networks.INCEPTION_FILE in error and torch.hub.get_dir() in error and "no such file" in error
    stand_ins("fid")
    assert cli.main(command(photographs, tmp_path)) == 1
    assert networks.CLIP_336 in capsys.readouterr().err


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    def silent(url):
        raise ConnectionError(url)

    monkeypatch.setattr(networks, "get_hf_file_metadata", silent)
    assert networks._source(networks.CLIP) == {"local_files_only": True}
    monkeypatch.setattr(networks, "get_hf_file_metadata", lambda url: url)
    assert networks._source(networks.CLIP) == {}


def test_a_missing_package(monkeypatch):
    def loader(device):
        raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")

    monkeypatch.setitem(networks.LOADERS, "lpips", loader)
    reason = r"lpips: package torchvision is not installed: pip install 'dcae_fast\[eval\]'"
    with pytest.raises(networks.MissingNetwork, match=reason):
        networks.load("lpips", torch.device("cpu"))


def test_libraries_are_quiet(monkeypatch, recwarn, caplog):
    """Warnings are suppressed only while the libraries are loaded."""
    log = logging.getLogger("library")

    def loader(device):
        warnings.warn("deprecated", DeprecationWarning, stacklevel=1)
        log.warning("falling back")
        return features

    monkeypatch.setitem(networks.LOADERS, "fid", loader)
    assert networks.load("fid", torch.device("cpu"))(torch.zeros(1, 3, 4, 4)).shape == (1, 6)
    assert not recwarn.list and not caplog.records
    log.warning("heard")
    assert caplog.messages == ["heard"]


def test_invalid_requests(photographs, tmp_path, stand_ins, capsys):
    def refused(*argv) -> str:
        assert cli.main(["reference-stats", *map(str, argv), "--device", "cpu"]) == 2
        return capsys.readouterr().err

    fid = tmp_path / "fid.npz"
    assert "--fid" in refused(photographs)
    assert "fid.txt" in refused(photographs, "--fid", tmp_path / "fid.txt")
    assert "absent" in refused(tmp_path / "absent", "--fid", fid)
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((2, 4, 4, 3)))
    np.savez(tmp_path / "names.npz", pictures=np.zeros((2, 4, 4, 3), np.uint8))
    np.savez(tmp_path / "one.npz", arr_0=np.zeros((1, 4, 4, 3), np.uint8))
    (tmp_path / "torn.npz").write_bytes((tmp_path / "floats.npz").read_bytes()[:200])
    for name, reason in {"floats": "uint8", "names": "arr_0", "torn": "torn.npz", "one": "1 pictures"}.items():
        assert reason in refused(tmp_path / f"{name}.npz", "--fid", fid)
    assert not fid.exists()


def test_a_network_without_weights_that_cannot_be_loaded(monkeypatch):
    def no_folder(device):
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setitem(networks.LOADERS, "ssim", no_folder)
    with pytest.raises(networks.MissingNetwork, match=r"^ssim: .*No usable temporary directory found$"):
        networks.load("ssim", torch.device("cpu"))
