"""cache-latents on two and three ranks, started as torchrun starts them, gives the same folder as on one."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from small_pictures import BROKEN, SIZES, arguments, contents

from dcae_fast import cli, distributed
from dcae_fast.data import store


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run_ranks(function, ranks: int, *args) -> None:
    """Runs function(rank, ranks, *args) in `ranks` forked processes, which need no imports."""
    torch.multiprocessing.start_processes(function, (ranks, *args), ranks, start_method="fork")


def start(rank: int, ranks: int, port: int, log: Path, commands: list[list[str]]) -> None:
    """Runs the commands in each process; writes its output and the exit statuses to the log folder."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(ranks)}
    written = []
    for each in (store.NpyStore, store.ShardStore):

        def write(self, indices, latents, plain=each.write):
            written.extend(indices)
            plain(self, indices, latents)

        each.write = write
    statuses = [cli.main(command) for command in commands]
    (log / f"{ranks}-{rank}.json").write_text(json.dumps({"written": written, "statuses": statuses}))


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_same_folder(pictures, tmp_path, monkeypatch, ranks):
    monkeypatch.setattr(store.ShardStore, "unit", 3)
    commands = {f: [*arguments(pictures, tmp_path / f), "--format", f] for f in ("npy", "safetensors")}
    run_ranks(start, ranks, free_port(), tmp_path, list(commands.values()))
    logs = [json.loads((tmp_path / f"{ranks}-{rank}.json").read_text()) for rank in range(ranks)]
    assert all(log["statuses"] == [1, 1] for log in logs)
    assert all(log["written"] for log in logs), "a rank had nothing to do"
    expected = [index for index, name in enumerate(sorted([*SIZES, BROKEN])) if name != BROKEN]
    assert sorted(index for log in logs for index in log["written"]) == sorted(2 * expected)
    for format in commands:
        assert cli.main([*arguments(pictures, tmp_path / "one" / format), "--format", format]) == 1
        assert contents(tmp_path / format) == contents(tmp_path / "one" / format)


def exchange(rank: int, ranks: int, port: int, log: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with distributed.process_group(torch.device("cpu")) as device:
        assert device == torch.device("cpu") and distributed.is_distributed()
        assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (rank, ranks, rank == 0)
        x = torch.tensor([0.1 * (rank + 1), rank], dtype=torch.float64)
        before = x.clone()
        assert torch.equal(distributed.all_sum(x), torch.tensor([0.1 + 0.2, 1], dtype=torch.float64))
        assert torch.equal(x, before)
        assert distributed.all_gather({"rank": rank}) == [{"rank": each} for each in range(ranks)]
        assert distributed.broadcast(f"from {rank}") == "from 0"
        shares = distributed.all_gather(distributed.share(7))
        assert [index for share in shares for index in share] == list(range(7))
        distributed.print_main(f"only one line, from rank {rank}")
        distributed.barrier()
    assert not distributed.is_distributed()


def test_exchange(tmp_path, capfd):
    run_ranks(exchange, 2, free_port(), tmp_path)
    lines = capfd.readouterr().out.splitlines()  # gloo may print lines, too
    assert [line for line in lines if "only one line" in line] == ["only one line, from rank 0"]


def test_a_single_process(capsys):
    with distributed.process_group(torch.device("cpu")):
        x = torch.ones(2)
        assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
        assert torch.equal(distributed.all_sum(x), x) and distributed.all_gather(3) == [3]
        assert distributed.broadcast(4) == 4 and distributed.share(5) == range(5)
        distributed.barrier()
        distributed.print_main("a fault", error=True)
    assert capsys.readouterr().err == "a fault\n"
