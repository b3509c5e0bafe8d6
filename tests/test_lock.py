"""Only one process at a time works in a folder."""

import errno
import os
import signal

import pytest

from dcae_fast.files import WriteError
from dcae_fast.lock import LockedError, is_unused, locked


def test_the_error_of_a_second_process_names_the_first(lock_holder, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/bin/dcae-fast", "cache-latents", "my photos"])
    holder, command = lock_holder(tmp_path / "run"), "dcae-fast cache-latents 'my photos'"
    with pytest.raises(LockedError, match=rf"/run is in use by process {holder} on .* since .*: {command}; wait"):
        with locked(tmp_path / "run"):
            raise AssertionError


def test_a_killed_process_releases_the_lock(lock_holder, tmp_path):
    """Even if a child of the killed process is still running."""
    holder = lock_holder(tmp_path / "run")
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert is_unused(tmp_path / "run") and list((tmp_path / "run").iterdir())
    with locked(tmp_path / "run"):
        assert str(os.getpid()) in (tmp_path / "run" / ".lock").read_text()
    assert not list((tmp_path / "run").iterdir())


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", lockf)
    with locked(tmp_path):
        assert f"{tmp_path}: the file system does not support locks" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="file/run"), locked(tmp_path / "file" / "run"):
        raise AssertionError


def test_a_full_disk_leaves_no_lock(tmp_path, monkeypatch):
    def write(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dcae_fast.lock.os.write", write)
    with locked(tmp_path):
        assert (tmp_path / ".lock").exists()
    assert not list(tmp_path.iterdir())


def test_unused(tmp_path):
    assert is_unused(tmp_path / "absent") and is_unused(tmp_path)
    (tmp_path / "picture.png").touch()
    assert not is_unused(tmp_path)
