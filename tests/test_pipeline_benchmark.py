"""A rehearsal of the commands' benchmark on a CPU, and its table."""

from dataclasses import replace

import pytest
import torch

from benchmarks import pipeline, tables
from benchmarks.pipeline import PIPELINES, REHEARSAL

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal for machines without a GPU")


@on_cpu
@pytest.mark.parametrize("workload", REHEARSAL, ids=lambda w: w.name)
def test_rehearsal(workload, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # set for the tests; the commands run without it
    wrong_option = ("--data" if workload.command == "train-diffusion" else "--model", "absent")
    first, record = pipeline.benchmark(replace(workload, one_gpu={"patched": (), "wrong": wrong_option}))
    assert first["workload"] == record["workload"] == workload.name
    assert list(first["contenders"]) == ["patched"] and list(record["contenders"]) == ["patched", "wrong"]
    row, wrong = record["contenders"].values()
    assert row["gpus"] == 1 and row["images_per_s"] > 0 and 0 <= row["waited"] <= 1
    assert wrong.keys() == {"failure"} and "absent" in wrong["failure"]
    assert f"| {workload.name} | wrong | {wrong['failure']} |" in tables.pipeline_table([record])
    assert "images/s" in tables.line("pipeline", record)


def test_rows_of_several_gpus():
    train = PIPELINES[1]
    assert [name for name, *_ in train.rows(1)] == ["eager", "patched"]
    rows = {name: (gpus, options) for name, gpus, options in train.rows(2)}
    assert rows["eager, 2 GPUs"] == (2, ("--no-patch",))
    assert rows["patched, FSDP2, 2 GPUs"] == (2, ("--parallel", "fsdp"))


def test_table():
    rows = {
        "eager": {"gpus": 1, "images_per_s": 100.0, "waited": 0.0},
        "patched": {"gpus": 1, "images_per_s": 150.0, "waited": 0.01},
        "eager, 2 GPUs": {"gpus": 2, "images_per_s": 180.0, "waited": 0.0},
        "patched, 2 GPUs": {"gpus": 2, "images_per_s": 270.0, "waited": 0.02},
    }
    lines = tables.pipeline_table([{"workload": "some", "contenders": rows}]).splitlines()[2:]
    assert lines == [
        "| some | eager | 100 | 1.00× | – | 0.0% |",
        "| some | patched | 150 | 1.50× | – | 1.0% |",
        "| some | eager, 2 GPUs | 180 | 1.00× | 90% | 0.0% |",
        "| some | patched, 2 GPUs | 270 | 1.50× | 90% | 2.0% |",
    ]
