"""`dcae-fast eval-diffusion` with a small model of random weights and stand-ins for the networks."""

import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_diffusion import DIT, UVIT, build
from stand_ins import embeddings, features, logits, real_pictures, run_ranks, save_references

from dcae_fast import cli, images
from dcae_fast.diffusion import DCAEDiffusion
from dcae_fast.evaluation import metrics, networks
from dcae_fast.evaluation.labels import class_labels
from dcae_fast.evaluation.moments import Moments
from dcae_fast.models.diffusion_zoo import DIFFUSION_MODELS


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Folders with models of 10 classes and pictures of 8x8 pixels."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in {"uvit": UVIT, "dit": DIT}.items():
        build(config).save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("uvit", "dit")}


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> list[str]:
    return save_references(tmp_path_factory.mktemp("references"))


def command(model: str, out, *argv) -> list[str]:
    """Eleven samples in batches of two; the last batch has one sample."""
    settings = ["--samples", "11", "--batch", "2", "--device", "cpu", "--no-patch"]
    return ["eval-diffusion", "--model", model, "--out", str(out), *settings, *map(str, argv)]


def figures(out) -> dict[str, float]:
    return json.loads((out / "results.json").read_text())["figures"]


def load_npz(out) -> np.ndarray:
    with np.load(out / "samples.npz") as file:
        assert file["arr_1"].tolist() == class_labels(11, 10, 0).tolist()
        return file["arr_0"]


def test_samples_and_figures(models, references, tmp_path, stand_ins, capsys):
    """The samples equal the model's samples of the classes; the figures equal the metrics of these samples."""
    assert cli.main(command(models["uvit"], tmp_path, "--save", "npz", "--cfg", "2", *references)) == 0
    pixels = load_npz(tmp_path)
    assert pixels.shape == (11, 8, 8, 3) and pixels.dtype == np.uint8
    model, labels = DCAEDiffusion.from_pretrained(models["uvit"]), class_labels(11, 10, 0)
    for number in range(6):
        seed = int(np.random.SeedSequence((0, number)).generate_state(1, np.uint64)[0] >> 1)
        generator = torch.Generator().manual_seed(seed)
        part = slice(2 * number, 2 * number + 2)
        with torch.inference_mode():
            z = model.generate(labels[part], cfg_scale=2.0, generator=generator)
            expected = images.to_uint8(model.decode(z)).permute(0, 2, 3, 1)
        assert np.array_equal(pixels[part], expected.numpy())
    samples, real = torch.from_numpy(pixels).permute(0, 3, 1, 2), real_pictures()
    got = figures(tmp_path)
    fid = metrics.frechet_distance(Moments.of(features(samples)), Moments.of(features(real)))
    assert got["fid"] == pytest.approx(fid, rel=1e-9)
    score = metrics.inception_score(logits(samples))
    assert (got["inception_score"], got["inception_score_std"]) == pytest.approx(score, rel=1e-6)
    shares = metrics.precision_recall(features(samples), features(real))
    assert (got["precision"], got["recall"]) == shares
    assert got["cmmd"] == pytest.approx(metrics.maximum_mean_discrepancy(embeddings(samples), embeddings(real)))
    assert f"FID             {fid:.6f}" in capsys.readouterr().out


def test_too_few_samples_for_an_inception_score(models, references, tmp_path, stand_ins):
    assert cli.main(command(models["uvit"], tmp_path, "--samples", "9", *references)) == 0
    assert list(figures(tmp_path)) == ["fid", "precision", "recall", "cmmd"]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_agree(models, references, tmp_path, stand_ins, ranks):
    run_ranks(ranks, command(models["uvit"], tmp_path / "many", "--save", "npz", *references))
    assert cli.main(command(models["uvit"], tmp_path / "one", "--save", "npz", *references)) == 0
    assert np.array_equal(load_npz(tmp_path / "many"), load_npz(tmp_path / "one"))
    assert figures(tmp_path / "many") == figures(tmp_path / "one")


def slowly(run: list[str], batches, last: int) -> None:
    """Runs the command, which never finishes its last batch, until the test kills it."""

    def features_or_wait(pictures: torch.Tensor) -> torch.Tensor:
        if len(list(batches.glob("[0-9]*"))) >= last:
            time.sleep(600)
        return features(pictures)

    networks.LOADERS["fid"] = lambda device: features_or_wait
    cli.main(run)


@pytest.mark.parametrize("model", ["uvit", "dit"])  # dit also draws noise in each step
def test_a_killed_run_is_resumed(models, references, tmp_path, stand_ins, capsys, model):
    """After kill -9 and a damaged file, two ranks finish the run with the same samples and figures."""
    options = ["--save", "png", "--seed", "3", *references]
    run, batches = command(models[model], tmp_path / "killed", *options), tmp_path / "killed" / "batches"
    process = multiprocessing.get_context("fork").Process(target=slowly, args=(run, batches, 3))
    process.start()
    for _ in range(600):
        if len(list(batches.glob("[0-9]*"))) >= 3:
            break
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(list(batches.glob("[0-9]*"))) == 3 and not (tmp_path / "killed" / "results.json").exists()
    (batches / "000001.safetensors").write_bytes(b"torn")
    (tmp_path / "killed" / "samples" / f"000000_{class_labels(11, 10, 0)[0]}.png").unlink()
    kept = (batches / "000002.safetensors").stat().st_mtime_ns
    run_ranks(2, run)
    assert (batches / "000002.safetensors").stat().st_mtime_ns == kept
    assert cli.main(command(models[model], tmp_path / "whole", *options)) == 0
    assert figures(tmp_path / "killed") == figures(tmp_path / "whole")
    pictures = sorted((tmp_path / "whole" / "samples").iterdir())
    assert [path.name for path in pictures] == [f"{i:06d}_{c}.png" for i, c in enumerate(class_labels(11, 10, 0))]
    for path in pictures:
        with Image.open(path) as one, Image.open(tmp_path / "killed" / "samples" / path.name) as other:
            assert np.array_equal(np.asarray(one), np.asarray(other))
    capsys.readouterr()
    assert cli.main(run) == 0
    assert "6 of 6 batches existed already" in capsys.readouterr().out


def test_damaged_samples_are_generated_again(models, references, tmp_path, stand_ins, capsys):
    """Damaged batches and pictures are replaced, and temporary files of killed processes are removed."""
    run = command(models["uvit"], tmp_path, "--save", "png", *references)
    assert cli.main(run) == 0
    whole = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    batch, cut, changed = tmp_path / "batches" / "000003.safetensors", *sorted((tmp_path / "samples").iterdir())[:3:2]
    for path in (batch, changed):
        content = bytearray(whole[path])
        content[-20] ^= 1
        path.write_bytes(content)
    os.truncate(cut, 60)
    for name in ("batches/.000003.safetensors.0123.part", "samples/.000001_2.png.0123.part", "batches/.tmpA1b2C3"):
        (tmp_path / name).touch()
    capsys.readouterr()
    assert cli.main(run) == 0
    assert "3 of 6 batches existed already" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == whole


def test_batches_of_earlier_versions_are_kept(models, tmp_path, stand_ins, capsys):
    """Their files contain no hash."""
    assert cli.main(command(models["uvit"], tmp_path)) == 0
    for path in (tmp_path / "batches").iterdir():
        save_file(load_file(path), path)
    capsys.readouterr()
    assert cli.main(command(models["uvit"], tmp_path)) == 0
    assert "6 of 6 batches existed already" in capsys.readouterr().out


def test_two_evaluations_in_one_folder(models, tmp_path, stand_ins, capsys, lock_holder):
    holder = lock_holder(tmp_path / "out")
    assert cli.main(command(models["uvit"], tmp_path / "out")) == 2
    assert f"out is in use by process {holder} " in capsys.readouterr().err
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert cli.main(command(models["uvit"], tmp_path / "out")) == 0


def test_a_full_disk(models, references, tmp_path, stand_ins, capsys, full_disk):
    """The error names the file, and no file is incomplete."""
    assert cli.main(command(models["uvit"], tmp_path, "--save", "npz", "--samples", 48, *references)) == 2
    assert f"dcae-fast: {tmp_path}/samples.npz: not written: File too large" in capsys.readouterr().err
    assert not list(tmp_path.rglob(".*")) and not (tmp_path / "samples.npz").exists()


def test_other_settings_need_another_folder(models, tmp_path, stand_ins, capsys):
    assert cli.main(command(models["uvit"], tmp_path)) == 0
    for argv, words in (
        (["--cfg", "3"], "cfg 1.0, now 3.0"),
        (["--steps", "5"], "steps 6, now 5"),
        (["--seed", "1"], "seed 0, now 1"),
    ):
        assert cli.main(command(models["uvit"], tmp_path, *argv)) == 2
        assert words in capsys.readouterr().err
    assert cli.main(command(models["dit"], tmp_path)) == 2
    assert "weights" in capsys.readouterr().err
    path = tmp_path / "samples.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"precision": "int8"}))
    assert cli.main(command(models["uvit"], tmp_path)) == 2
    assert "precision int8, now exact" in capsys.readouterr().err
    content.pop("precision")  # as in earlier versions
    path.write_text(json.dumps(content))
    assert cli.main(command(models["uvit"], tmp_path)) == 0
    (tmp_path / "samples.json").unlink()
    assert cli.main(command(models["uvit"], tmp_path)) == 2
    assert "not empty" in capsys.readouterr().err


def test_a_network_that_is_installed_later(models, references, tmp_path, stand_ins, capsys):
    stand_ins("cmmd")
    run = command(models["uvit"], tmp_path / "one", *references)
    assert cli.main(run) == 1
    assert list(figures(tmp_path / "one")) == ["cmmd"]
    error = capsys.readouterr().err
    assert "missing: inception_score" in error and "missing: fid" in error and networks.INCEPTION_FILE in error
    stand_ins()
    assert cli.main(run) == 0
    assert cli.main(command(models["uvit"], tmp_path / "two", *references)) == 0
    assert figures(tmp_path / "one") == figures(tmp_path / "two")
    assert list(figures(tmp_path / "two"))[0] == "fid" and len(figures(tmp_path / "two")) == 6


def test_a_released_model_without_a_connection(tmp_path, stand_ins, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    name = next(iter(DIFFUSION_MODELS))
    assert cli.main(command(name, tmp_path)) == 2
    error = capsys.readouterr().err
    assert "HF_HUB_OFFLINE is set" in error and f"hf download mit-han-lab/{name} --local-dir" in error


def test_without_networks_nothing_is_sampled(models, tmp_path, stand_ins, capsys):
    stand_ins("lpips")
    assert cli.main(command(models["uvit"], tmp_path / "out")) == 1
    assert networks.INCEPTION_FILE in capsys.readouterr().err and not list(tmp_path.glob("out/batches/*"))
    assert cli.main(command(models["uvit"], tmp_path / "out", "--save", "npz")) == 1
    assert len(load_npz(tmp_path / "out")) == 11


def test_invalid_requests(models, tmp_path, stand_ins, capsys):
    np.save(tmp_path / "wrong.npy", np.zeros((5, 4), np.float32))
    np.save(tmp_path / "flat.npy", np.zeros(5, np.float32))
    for rows in (0, 3, 4):
        np.save(tmp_path / f"{rows}.npy", np.zeros((rows, 6), np.float32))
    Moments.of(torch.rand(5, 6)).save(tmp_path / "fid.npz")
    for argv, words in (
        (["--samples", "0"], "--samples 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--steps", "0"], "steps"),
        (["--fid", tmp_path / "absent.npz"], "absent.npz"),
        (["--cmmd", tmp_path / "flat.npy"], "flat.npy"),
        (["--cmmd", tmp_path / "wrong.npy"], "--cmmd: has features of length 4; expected 6"),
        (["--precision-recall", tmp_path / "wrong.npy"], "--precision-recall: has features of length 4; expected 6"),
        (["--precision-recall", tmp_path / "3.npy"], "--precision-recall: has 3 pictures; expected at least 4"),
        (["--cmmd", tmp_path / "0.npy"], "--cmmd: has 0 pictures; expected at least 1"),
        (["--precision-recall", tmp_path / "4.npy", "--samples", "3"], "--samples 3: expected at least 4 for --prec"),
        (["--fid", tmp_path / "fid.npz", "--samples", "1"], "--samples 1: expected at least 2 for --fid"),
    ):
        assert cli.main(command(models["uvit"], tmp_path / "out", *argv)) == 2, argv
        assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("out/batches/*"))
    least = ["--samples", "4", "--precision-recall", tmp_path / "4.npy"]
    assert cli.main(command(models["uvit"], tmp_path / "least", *least)) == 0
