"""Results as JSON, stamped with machine, versions and commit, and as Markdown tables.

`python -m benchmarks.report` writes the README's tables from benchmarks/results.
"""

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

from dcae_fast.files import written_atomically

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- benchmark -->", "<!-- /benchmark -->"


def stamp() -> dict:
    cuda = torch.cuda.is_available()
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "triton": triton_version,
        "commit": commit or os.environ.get("DCAE_FAST_COMMIT"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write(results: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(path) as part:
        part.write_text(json.dumps(results, indent=1) + "\n")


def table(rows: list[list[str]]) -> str:
    """Markdown; the first row is the heading."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def autoencoder_table(rows: list[dict]) -> str:
    """One line per workload, one column per contender: ms, and how many times faster than eager."""
    names = list(dict.fromkeys(row["contender"] for row in rows))
    groups: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        groups.setdefault((row["workload"], row["batch"], row["size"]), {})[row["contender"]] = row
    lines = [["workload", "batch, size", *names, "floor"]]
    for (workload, batch, size), cells in groups.items():
        eager = cells["eager"].get("ms")
        line = [workload, f"{batch}, {size}"]
        for name in names:
            ms = cells[name].get("ms")
            line.append(f"{ms:.2f} ({eager / ms:.2f}×)" if ms else f"wrong: {cells[name]['error']:.0e}")
        lines.append([*line, f"{cells['eager']['floor_ms']:.2f}"])
    return table(lines)


def quality_table(rows: list[dict]) -> str:
    """Error against fp32 and memory of each contender."""
    lines = [["workload", "batch, size", "contender", "relative error", "peak GiB", "TFLOP/s"]]
    for row in rows:
        lines.append([
            row["workload"], f"{row['batch']}, {row['size']}", row["contender"], f"{row['error']:.2e}",
            f"{row['peak_gib']:.2f}" if "ms" in row else "-", f"{row['tflops']:.0f}" if "ms" in row else "-",
        ])  # fmt: skip
    return table(lines)


def operator_table(rows: list[dict]) -> str:
    lines = [["operator", "shape", "ms", "GB/s", "of copy", "faster than eager"]]
    for row in rows:
        cells = ["wrong"] * 4
        if "ms" in row:
            cells = [
                f"{row['ms']:.3f}", f"{row['gb_per_s']:.0f}", f"{row['of_copy']:.0%}",
                f"{row['eager_ms'] / row['ms']:.1f}×",
            ]  # fmt: skip
        lines.append([row["operator"], "×".join(map(str, row["shape"])), *cells])
    return table(lines)


def summary(results: dict) -> str:
    """What the README says of one machine's results."""
    ceilings = results["ceilings"]
    worst = {name: max(row["error"] for row in results["autoencoder"] if row["contender"] == name)
             for name in ("eager", "patched")}  # fmt: skip
    return "\n".join([
        f"One {results['gpu']}, torch {results['torch']}, triton {results['triton']}, commit {results['commit']}, "
        f"{results['date'][:10]}; bf16, random weights, median milliseconds of one call, in brackets how many times "
        "faster than eager. The floor is the model's arithmetic at the rate of a large matrix product "
        f"({ceilings['tflops']:.0f} TFLOP/s here).",
        "",
        autoencoder_table(results["autoencoder"]),
        "",
        f"Relative error against fp32: at most {worst['patched']:.1e} patched, {worst['eager']:.1e} eager. The "
        f"operators, in bytes that must be moved per second, against the {ceilings['copy']:.2f} TB/s of a copy:",
        "",
        operator_table(results["operators"]),
    ])  # fmt: skip


def write_readme(text: str) -> None:
    """Put `text` between the README's markers."""
    readme = README.read_text()
    before, rest = readme.split(START)
    with written_atomically(README) as part:
        part.write_text(f"{before}{START}\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    write_readme("\n\n".join(summary(json.loads(path.read_text())) for path in sorted(RESULTS.glob("*.json"))))
