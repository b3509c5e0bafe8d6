"""Results as JSON: one file per GPU, with a list of records per part. Every record has a stamp."""

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

from dcae_fast.files import written_atomically
from dcae_fast.ops._library import cuda_extension

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
KEYS = ("workload", "contender", "operator", "shape")  # two records of a part are the same if these are equal


def default_path() -> Path:
    """benchmarks/results/<gpu>.json; without a GPU, outputs/benchmarks/cpu.json."""
    if torch.cuda.is_available():
        return RESULTS / f"{torch.cuda.get_device_name().replace(' ', '_').lower()}.json"
    return ROOT / "outputs" / "benchmarks" / "cpu.json"


@functools.cache
def machine() -> dict:
    """The machine, the versions and the commit, for the stamps of records."""
    cuda = torch.cuda.is_available()
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": ".".join(map(str, cudnn_version())) if cuda else None,
        "triton": version("triton"),
        "diffusers": version("diffusers"),
        "extension": cuda_extension() is not None,
        "commit": os.environ.get("DCAE_FAST_COMMIT") or commit,
    }


def cudnn_version() -> tuple[int, int, int]:
    number = torch.backends.cudnn.version()
    return number // 10000, number // 100 % 100, number % 100


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def read(path: Path) -> dict[str, list[dict]]:
    """Part → records; empty if there is no file."""
    return json.loads(path.read_text()) if path.exists() else {}


def merge(path: Path, part: str, record: dict) -> None:
    """Adds a stamped record to its part of the file, or replaces the same record of an earlier run."""
    results = read(path)
    record = record | {"stamp": machine() | {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}}
    record = json.loads(json.dumps(record))
    records = results.setdefault(part, [])
    same = [index for index, other in enumerate(records) if key(other) == key(record)]
    if same:
        records[same[0]] = record
    else:
        records.append(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(path) as part_file:
        part_file.write_text(json.dumps(results, indent=1) + "\n")


def key(record: dict) -> tuple:
    return tuple(str(record.get(name)) for name in KEYS)
