"""Checkpoints that are damaged are named and passed over; a full disk leaves the former ones."""

import json
import os
import shutil

import pytest
from trainings import assert_equal, everything
from two_networks import FILE, RECIPE, TwoNetworks, exported, run_in

from dcae_fast.files import WriteError
from dcae_fast.training.engine.checkpoint import Checkpoints
from dcae_fast.training.engine.config import TrainingError
from dcae_fast.training.engine.loop import train

STATE = "state/__0_0.distcp"
AVERAGE = f"ema/{FILE}"


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """The state of a training that has not begun; tests load into it."""
    return TwoNetworks(RECIPE, run_in(tmp_path_factory.mktemp("unused"))).build()


@pytest.fixture
def folder(finished, tmp_path):
    """A folder with checkpoints after 8 and 12 steps."""
    return shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def empty(file):
    file.write_bytes(b"")


def remove(file):
    file.unlink()


@pytest.mark.parametrize("damage", [cut, flip, empty, remove])
@pytest.mark.parametrize("file", [STATE, "state/.metadata", "progress.json", AVERAGE, "ema/config.json"])
def test_a_damaged_file(state, folder, capsys, file, damage):
    damage(folder / "step-000000012" / file)
    assert Checkpoints(folder, 2).load_newest(state) == folder / "step-000000008" and state.step == 8
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{folder}/step-000000012 is damaged and is not used: {file} ")


@pytest.mark.parametrize("damage", [cut, empty])
@pytest.mark.parametrize("file", [STATE, "state/.metadata", "progress.json", AVERAGE])
def test_a_damaged_file_of_an_earlier_version(state, folder, capsys, file, damage):
    """Which wrote no hashes."""
    for step in folder.glob("step-*"):
        (step / "hashes.json").unlink()
    damage(folder / "step-000000012" / file)
    assert Checkpoints(folder, 2).load_newest(state) == folder / "step-000000008" and state.step == 8
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{folder}/step-000000012 is damaged")


@pytest.mark.parametrize("step", ["12", -12, 12.5, True, None])
def test_a_wrong_step_of_an_earlier_version(state, folder, capsys, step):
    (folder / "step-000000012" / "hashes.json").unlink()
    progress = folder / "step-000000012" / "progress.json"
    progress.write_text(json.dumps(json.loads(progress.read_text()) | {"step": step}))
    assert Checkpoints(folder, 2).load_newest(state) == folder / "step-000000008" and state.step == 8
    assert f"its step is {step!r}; expected an integer" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [cut, lambda file: file.write_text("{}")])
def test_damaged_hashes(state, folder, capsys, damage):
    damage(folder / "step-000000012" / "hashes.json")
    assert Checkpoints(folder, 2).load_newest(state) == folder / "step-000000008"
    assert "hashes.json is unreadable" in capsys.readouterr().err


def test_what_is_loaded_is_what_was_saved(state, folder, finished):
    loaded = {}
    for step in (12, 8):
        (folder / "latest.txt").write_text(f"step-{step:09d}\n")
        assert Checkpoints(folder, 2).load_newest(state) == folder / f"step-{step:09d}" and state.step == step
        average = exported(folder / f"step-{step:09d}" / "ema")
        assert_equal(state.average.average, {name: average[name] for name in state.average.average})
        loaded[step] = everything(state)
    assert all(not loaded[8][name].equal(loaded[12][name]) for name in loaded[8] if "weight" in name)


@pytest.mark.parametrize("content", ["step-000000007\n", "", "\0\0", "../checkpoints", None])
def test_latest_that_names_no_checkpoint(state, folder, capsys, content):
    latest = folder / "latest.txt"
    latest.unlink() if content is None else latest.write_text(content)
    assert Checkpoints(folder, 2).load_newest(state) == folder / "step-000000012"
    assert f"{latest} " in capsys.readouterr().err


def test_none_is_whole(finished, tmp_path, capsys):
    run = run_in(shutil.copytree(finished, tmp_path / "run"))
    for step in (8, 12):
        flip(run.out / "checkpoints" / f"step-{step:09d}" / STATE)
    with pytest.raises(TrainingError, match="checkpoints has no whole checkpoint"):
        train(TwoNetworks(RECIPE, run))
    errors = capsys.readouterr().err
    assert all(f"step-{step:09d} is damaged and is not used: {STATE}" in errors for step in (8, 12))


def test_training_resumes_from_the_whole_one(finished, tmp_path):
    run = run_in(shutil.copytree(finished, tmp_path / "run"))
    flip(run.out / "checkpoints" / "step-000000012" / STATE)
    train(TwoNetworks(RECIPE, run))
    assert_equal(exported(run.out / "model"), exported(finished / "model"))
    assert {path.name for path in run.out.glob("checkpoints/*")} == {"latest.txt", "step-000000008", "step-000000012"}


def test_no_checkpoint(state, tmp_path):
    assert Checkpoints(tmp_path / "absent", 2).load_newest(state) is None


def test_a_full_disk(state, folder, full_disk):
    """A checkpoint that does not fit leaves nothing behind, and the former ones."""
    before = sorted(folder.rglob("*"))
    state.step = 13
    with pytest.raises(WriteError, match="/checkpoints/step-000000013.*: not written: "):
        Checkpoints(folder, 2).save(state)
    assert sorted(folder.rglob("*")) == before and (folder / "latest.txt").read_text() == "step-000000012\n"
