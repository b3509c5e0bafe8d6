"""The message of a failed command, in a single process and under torchrun."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from dcae_fast import cli, distributed
from dcae_fast.errors import DeviceError


def report(file) -> str:
    """The text that torchrun prints for a process that ended with this error file."""
    return str(ChildFailedError("dcae-fast", {0: ProcessFailure(0, 1234, 2, str(file))}))


@pytest.mark.parametrize("rank", ["0", "1"])
def test_under_torchrun(tmp_path, monkeypatch, capsys, rank):
    """Only the main process prints the message, and torchrun's report ends with the same line."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("RANK", rank)
    assert cli.main(["decode", str(tmp_path / "absent.safetensors"), "--out", "/dev/null/out"]) == 2
    printed = capsys.readouterr().err
    assert ("/dev/null" in printed) == (rank == "0")
    assert "traceback : dcae-fast: " in report(tmp_path / "error.json") and "/dev/null" in report(
        tmp_path / "error.json"
    )


def test_wrong_options_under_torchrun(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit):
        cli.main(["sample", "--steps", "many"])
    assert "--steps" in capsys.readouterr().err
    assert "traceback : dcae-fast: invalid options; each rank" in report(tmp_path / "error.json")


def test_a_single_process(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    assert cli.main(["decode", str(tmp_path / "absent.safetensors"), "--out", "/dev/null/out"]) == 2
    assert capsys.readouterr().err.startswith("dcae-fast: ")


def run(command: str, folder, **environment) -> tuple[int, str]:
    """Exit status and standard error of a shell command."""
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )
    return done.returncode, done.stderr


def test_an_unknown_operator_in_the_environment(monkeypatch, capsys):
    monkeypatch.setenv("DCAE_FAST_DISABLE", "rms_norm, nope")
    assert cli.main(["models"]) == 2
    assert "dcae-fast: DCAE_FAST_DISABLE: unknown operators ['nope']; expected 'all'" in capsys.readouterr().err
    monkeypatch.setenv("DCAE_FAST_DISABLE", "rms_norm,")
    assert cli.main(["models"]) == 0


def test_nobody_reads_the_output(tmp_path):
    """As after `| head`: the command ends without a word."""
    command = f"{sys.executable} -m dcae_fast models | true; exit ${{PIPESTATUS[0]}}"
    status, errors = run(command, tmp_path)
    assert status in (0, 128 + signal.SIGPIPE) and not errors


def test_half_of_the_variables_of_torchrun(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    expected = "the environment has RANK or LOCAL_RANK, as torchrun sets them, .*MASTER_ADDR expected, but not set"
    with pytest.raises(DeviceError, match=expected), distributed.process_group(torch.device("cpu")):
        pass
