"""A cache-latents run that is killed and restarted gives the same files as an uninterrupted run."""

import multiprocessing
import signal
import time

import pytest
from small_pictures import arguments, contents, save_noise

from dcae_fast import cli
from dcae_fast.data.store import ShardStore


@pytest.mark.parametrize("format", ["npy", "safetensors"])
def test_killed_at_any_moment(tmp_path, monkeypatch, format):
    monkeypatch.setattr(ShardStore, "unit", 4)
    for seed in range(36):
        save_noise(tmp_path / "pictures" / f"{seed % 3}" / f"{seed}.png", 64, 70, seed)
    command = [*arguments(tmp_path / "pictures", tmp_path / "out"), "--format", format]
    process = multiprocessing.get_context("fork").Process(target=cli.main, args=(command,))
    process.start()
    while sum(1 for _ in (tmp_path / "out").rglob(f"*.{format}")) < 3:
        assert process.is_alive(), "it was over too soon to be killed"
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = contents(tmp_path / "out")
    assert cli.main(command) == 0
    assert cli.main([*arguments(tmp_path / "pictures", tmp_path / "whole"), "--format", format]) == 0
    whole = contents(tmp_path / "whole")
    assert contents(tmp_path / "out") == whole
    assert len(left) < len(whole) and all(whole[name] == left[name] for name in left if name.endswith(format))
