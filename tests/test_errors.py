"""The message of a failed command, in a single process and under torchrun."""

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from dcae_fast import cli


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
