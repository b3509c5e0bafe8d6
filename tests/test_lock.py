"""One process at a time in a folder."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from dcae_fast.files import WriteError
from dcae_fast.lock import LockedError, is_unused, locked

HOLDER = """
import os, sys, time
from pathlib import Path
from dcae_fast.lock import locked
with locked(Path(sys.argv[1])):
    if not os.fork():
        time.sleep(60)  # as a worker that outlives its parent
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of a folder, and has a child."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_second_process_is_told_who_works_there(holder, tmp_path):
    with pytest.raises(LockedError, match=rf"/run is in use by process {holder.pid} on .* since .*: -c .*/run; wait"):
        with locked(tmp_path / "run"):
            raise AssertionError


def test_a_killed_process_locks_nobody_out(holder, tmp_path):
    holder.kill()
    holder.wait()
    assert is_unused(tmp_path / "run") and list((tmp_path / "run").iterdir())
    with locked(tmp_path / "run"):
        assert str(os.getpid()) in (tmp_path / "run" / ".lock").read_text()
    assert not list((tmp_path / "run").iterdir())


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", lockf)
    with locked(tmp_path):
        assert f"{tmp_path}: cannot be locked here" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="file/run"), locked(tmp_path / "file" / "run"):
        raise AssertionError


def test_unused(tmp_path):
    assert is_unused(tmp_path / "absent") and is_unused(tmp_path)
    (tmp_path / "picture.png").touch()
    assert not is_unused(tmp_path)
