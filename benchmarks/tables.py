"""Markdown tables of results, and one line for each record while the benchmarks run."""

import math

from .targets import (
    GRAPHS,
    LOSS_CURVES,
    NOMINAL,
    PATCHED,
    TARGETS,
    VERDICTS,
    Outcome,
    Target,
    evaluate,
    fastest,
    fastest_patched,
    forms,
    headline,
    with_fastest,
)

MAIN = ("eager", "torch.compile", "patched", GRAPHS)  # columns of the README's tables, see `best`
IN_8_BIT = {  # precision → contenders
    "int8": ("patched, 8 bit", "patched, 8 bit + CUDA graphs", "patched, int8", "patched, int8 + CUDA graphs"),
    "fp8": ("patched, fp8", "patched, fp8 + CUDA graphs"),
    "fp8-all": ("patched, fp8-all",),
}


UNITS = {
    "ms": "ms", "again_ms": "ms again", "images_per_s": "images/s", "peak_gib": "GiB", "held_gib": "GiB held",
    "first_s": "s first", "cold_s": "s cold", "warm_s": "s warm",
}  # fmt: skip
QUANTITIES = {
    "ms": "time", "peak_gib": "peak memory", "held_gib": "memory held", "error": "error", "cold_s": "first call",
    "warm_s": "first call",
    "mfu": "share of the ceiling", "ratio": "images/s over eager's on f8, patch 2",
    "difference": "difference of losses",
}  # fmt: skip


def table(rows: list[list[str]]) -> str:
    """Markdown; the first row is the heading."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def label(record: dict) -> str:
    return f"{record['model'].removeprefix('dc-ae-')} {record['direction']}, {record['batch']} × {record['size']} px"


def is_fair(record: dict) -> bool:
    """Whether eager and torch.compile ran with torch.backends.cudnn.benchmark: since first calls are recorded."""
    return "first_s" in record["contenders"].get("eager", {})


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def cell(row: dict | None, quantity: str = "ms", digits: int = 2) -> str:
    """A contender's figure, or why there is none."""
    if not row:
        return "–"
    return row["failure"] if "failure" in row else number(row.get(quantity), digits)


def rows_of(records: list[dict], contender: str) -> list[dict]:
    return [record["contenders"][contender] for record in records if contender in record["contenders"]]


def network_label(record: dict) -> str:
    checkpointed = ", checkpointed" if record["checkpointed"] else ""
    size = f", {record['size']} px" if "size" in record else ""
    return f"{record['network']} {record['work']}, batch {record['batch']}{size}{checkpointed}"


def best(rows: dict[str, dict], column: str) -> dict | None:
    """The row to show in a column of MAIN: the fastest memory format and compile mode; None if there is no row.

    A contender that failed counts as the slowest.
    """
    names = {"patched": ("patched", PATCHED), GRAPHS: (GRAPHS,)}.get(column) or forms(rows, column)
    found = [rows[name] for name in names if name in rows]
    return min(found, key=lambda row: row.get("ms", math.inf), default=None)


def ratio(rows: dict[str, dict], other: str) -> str:
    """How many times faster `patch(model)` without options is than the fastest form of another contender."""
    ours, theirs = fastest(rows, ("patched", PATCHED)), fastest(rows, forms(rows, other))
    return f"{theirs / ours:.2f}×" if ours and theirs else "–"


def speed_table(records: list[dict]) -> str:
    """A row for each workload: ms of the main contenders, the floor, and the speedups."""
    networks = "network" in records[0]
    rows = [["transformer" if networks else "autoencoder", *MAIN, "floor", "over eager", "over compile"]]
    for record in records:
        contenders = record["contenders"]
        times = [cell(best(contenders, column)) for column in MAIN]
        ratios = [ratio(contenders, name) for name in ("eager", "torch.compile")]
        name = network_label(record) if networks else label(record) + ("" if is_fair(record) else " †")
        rows.append([name, *times, number(record["floor_ms"]), *ratios])
    return table(rows)


def autoencoder_training_table(records: list[dict]) -> str:
    """A row for each workload: ms of the fastest forms of eager, torch.compile and patched, the floor, the speedups."""
    rows = [["training step", "eager", "torch.compile", "patched", "floor", "over eager", "over compile"]]
    for record in records:
        contenders = record["contenders"]
        shown = [best(contenders, name) for name in ("eager", "torch.compile")] + [fastest_patched(contenders)]
        times = [row["ms"] if row and "ms" in row else None for row in shown]
        ratios = [f"{other / times[2]:.2f}×" if other and times[2] else "–" for other in times[:2]]
        name = f"{record['model'].removeprefix('dc-ae-')} {record['recipe']}, {record['batch']} × {record['size']} px"
        name += ", adversarial" if record["adversarial"] else ""
        rows.append([name, *map(cell, shown), number(record["floor_ms"]), *ratios])
    return table(rows)


def with_8_bit(records: list[dict]) -> list[tuple[dict, str, dict]]:
    """(record, precision, row of the fastest contender with this precision) for whatever was timed in 8 bit."""
    found = []
    for record in records:
        timed = {name: row for name, row in record["contenders"].items() if "ms" in row and "failure" not in row}
        for precision, names in IN_8_BIT.items():
            if rows := [timed[name] for name in names if name in timed]:
                found.append((record, precision, min(rows, key=lambda row: row["ms"])))
    return found


def table_in_8_bit(records: list[dict]) -> str:
    """A row for each workload and precision: ms, the speedup, and the errors against fp32."""
    rows = [["in 8 bit", "precision", "torch.compile", "patched", "8 bit", "over compile", "error patched", "in 8 bit"]]
    for record, precision, row in with_8_bit(records):
        contenders = record["contenders"]
        compiled = best(contenders, "torch.compile")
        plain = [each for name in MAIN[2:] if (each := best(contenders, name)) and "ms" in each]
        plain = min(plain, key=lambda row: row["ms"], default=None)
        speedup = f"{compiled['ms'] / row['ms']:.2f}×" if compiled and "ms" in compiled else "–"
        errors = [f"{each['error']:.1e}" if each and each.get("error") else "–" for each in (plain, row)]
        name = network_label(record) if "network" in record else label(record)
        rows.append([name, precision, cell(compiled), cell(plain), cell(row), speedup, *errors])
    return table(rows)


def contender_table(records: list[dict]) -> str:
    """A row for each workload and contender: everything that was measured."""
    rows = [["workload", "contender", "ms", "10–90 %", "TFLOP/s", "of floor", "error", "peak GiB", "first call, s"]]
    for record in records:
        for name, row in record["contenders"].items():
            cells = [cell(row), "–", "–", "–"]
            if "ms" in row:
                cells[1:] = [
                    f"{row['ms_low']:.2f}–{row['ms_high']:.2f}",
                    f"{record['flops'] / row['ms'] / 1e9:.0f}",
                    f"{row['ms'] / record['floor_ms']:.2f}×",
                ]
            error = row.get("error")
            checked = "not checked" if "peak_gib" in row and error is None else "–" if error is None else f"{error:.1e}"
            rest = number(row.get("peak_gib")), number(row.get("first_s"), 1)
            rows.append([label(record), name, *cells, checked, *rest])
        rate = f"{record['flops'] / record['floor_ms'] / 1e9:.0f}"
        rows.append([label(record), "floor", number(record["floor_ms"]), "–", rate, "1.00×", "–", "–", "–"])
    return table(rows)


def memory_table(records: list[dict]) -> str:
    """A row for each workload: ms and peak GiB of each contender."""
    names = list(dict.fromkeys(name for record in records for name in record["contenders"]))
    rows = [["autoencoder", *[f"{name}: {what}" for name in names for what in ("ms", "GiB")]]]
    for record in records:
        cells = [
            cell(record["contenders"].get(name), *column) for name in names for column in (("ms", 1), ("peak_gib", 2))
        ]
        rows.append([label(record), *cells])
    return table(rows)


def first_call_table(records: list[dict]) -> str:
    rows = [["workload", "contender", "caches empty, s", "caches filled, s"]]
    for record in records:
        for name, row in record["contenders"].items():
            rows.append([record["workload"], name, cell(row, "cold_s", 1), cell(row, "warm_s", 1)])
    return table(rows)


def shapes_table(records: list[dict]) -> str:
    rows = [["workload", "contender", "very first pass, s", "each shape once, ms", "again, ms", "held, GiB", "error"]]
    for record in records:
        for name, row in record["contenders"].items():
            error = "–" if row.get("error") is None else f"{row['error']:.1e}"
            times = cell(row, digits=1), number(row.get("again_ms"), 1)
            rows.append(
                [record["workload"], name, number(row.get("first_s"), 1), *times, number(row.get("held_gib")), error]
            )
    return table(rows)


def attention_table(records: list[dict]) -> str:
    """A row for each workload: ms of every implementation that was measured in some workload, and the floor."""
    names = list(dict.fromkeys(name for record in records for name in record["contenders"]))
    rows = [["attention", *names, "floor"]]
    for record in records:
        times = [cell(record["contenders"].get(name), digits=3) for name in names]
        rows.append([record["workload"], *times, number(record["floor_ms"], 3)])
    return table(rows)


def operator_table(records: list[dict]) -> str:
    rows = [["operator", "shape", "ms", "rate", "of ceiling", "faster than eager"]]
    for record in records:
        cells = ["wrong", "–", "–", "–"]
        if "ms" in record:
            gb_per_s, tflops = record["bytes"] / record["ms"] / 1e6, record["flops"] / record["ms"] / 1e9
            cells = [
                f"{record['ms']:.3f}",
                f"{tflops:.0f} TFLOP/s" if record["flops"] else f"{gb_per_s:.0f} GB/s",
                f"{record['floor_ms'] / record['ms']:.0%}",
                f"{record['eager_ms'] / record['ms']:.1f}×",
            ]
        rows.append([record["operator"], "×".join(map(str, record["shape"])), *cells])
    return table(rows)


def profile_table(record: dict) -> str:
    """GPU time by kind of kernel, the most expensive first."""
    idle = record["idle_ms"]
    total = sum(row["ms"] for row in record["kinds"].values()) + idle
    rows = [["kind", "ms", "share", "kernels", "floor, ms"]]
    for kind, row in sorted(record["kinds"].items(), key=lambda item: -item[1]["ms"]):
        calls, floor = f"{row['calls']:.0f}", number(row["floor_ms"])
        rows.append([kind, number(row["ms"]), f"{row['ms'] / total:.0%}", calls, floor])
    rows.append(["idle", number(idle), f"{idle / total:.0%}", "–", "–"])
    return table(rows)


def kernel_table(record: dict) -> str:
    rows = [["kernel", "kind", "ms", "calls"]]
    for kernel in record["kernels"]:
        name = kernel["name"].replace("|", "\\|")
        rows.append([f"`{name}`", kernel["kind"], number(kernel["ms"], 3), f"{kernel['calls']:.0f}"])
    return table(rows)


def network_table(records: list[dict]) -> str:
    """A row for each workload of a transformer and contender."""
    heading = ["workload", "contender", "ms", "10–90 %", "images/s", "MFU", "over eager", "over compile", "error"]
    rows = [[*heading, "peak GiB", "first call, s"]]
    for record in records:
        found = record["contenders"]
        others = [fastest(found, forms(found, other)) for other in ("eager", "torch.compile")]
        for name, row in found.items():
            cells = [cell(row), "–", "–", "–", "–", "–"]
            if "ms" in row:
                cells[1:4] = [
                    f"{row['ms_low']:.2f}–{row['ms_high']:.2f}",
                    f"{row['images_per_s']:.0f}",
                    f"{row['mfu']:.0%}",
                ]
                cells[4:] = [f"{other / row['ms']:.2f}×" if other else "–" for other in others]
            error = "–" if row.get("error") is None else f"{row['error']:.1e}"
            rest = number(row.get("peak_gib")), number(row.get("first_s"), 1)
            rows.append([record["workload"], name, *cells, error, *rest])
    return table(rows)


def headline_table(records: list[dict], columns: tuple[str, ...] = ()) -> str:
    """DC-AE's headline: images/s on f64 latents, over images/s on Stable Diffusion's f8 latents, patch size 2.

    columns: "paper" and some contenders; by default all contenders.
    """
    names = columns or list(dict.fromkeys(name for record in records for name in record["contenders"]))
    rows = [["UViT-H, f64 over eager f8 with patch size 2", *names]]
    for record in records:
        found = record["contenders"]
        shown = [best(found, name) if columns else found.get(name) for name in names]
        ratios = [f"{row['ratio']:.1f}×" if row and "ratio" in row else cell(row) for row in shown]
        rows.append([record["workload"], *ratios])
    return table(rows)


def pipeline_table(records: list[dict]) -> str:
    """Scaling: images/s on several GPUs as a share of as many times those of the same contender on one."""
    rows = [["command", "contender", "images/s", "over eager", "scaling", "GPU waited"]]
    for record in records:
        found = record["contenders"]
        for name, row in found.items():
            cells = [cell(row, "images_per_s", 0), "–", "–", "–"]
            if "images_per_s" in row:
                gpus, rate = row["gpus"], row["images_per_s"]
                suffix = f", {gpus} GPUs" if gpus > 1 else ""
                eager = found.get(f"eager{suffix}", {}).get("images_per_s")
                one = found.get(name.removesuffix(suffix), {}).get("images_per_s") if suffix else None
                cells[1:] = [
                    f"{rate / eager:.2f}×" if eager else "–",
                    f"{rate / one / gpus:.0%}" if one else "–",
                    f"{row['waited']:.1%}",
                ]
            rows.append([record["workload"], name, *cells])
    return table(rows)


def loss_table(records: list[dict]) -> str:
    """The loss, averaged over windows of steps, of each contender."""
    rows = []
    for record in records:
        names = list(record["contenders"])
        rows += [[f"{record['workload']}, steps", *names]] if not rows else []
        for index, losses in enumerate(zip(*(row["losses"] for row in record["contenders"].values()), strict=True)):
            rows.append([str((index + 1) * record["window"]), *(f"{loss:.4f}" for loss in losses)])
        rows.append(["largest difference", *(f"{row['difference']:.2%}" for row in record["contenders"].values())])
        for name, label in (("end", "last fifth"), ("evaluated", "trained weights, evaluated in bf16")):
            if all(name in row for row in record["contenders"].values()):
                rows.append([label, *(f"{row[name]:+.2%}" for row in record["contenders"].values())])
    return table(rows)


def sentence(target: Target) -> str:
    """What a target asks for, in words."""
    caches = {"cold_s": ", caches empty", "warm_s": ", caches filled"}.get(target.quantity, "")
    if target.against is None:
        unit = f" s{caches}" if caches else " GiB" if target.quantity.endswith("_gib") else ""
        return f"{QUANTITIES[target.quantity]} {'≥' if target.faster else '≤'} {target.bound:g}{unit}"
    if target.faster:
        return f"≥ {target.bound:.2f}× as fast as the fastest {target.against}"
    against = f"the floor at {NOMINAL} TFLOP/s" if target.against == "floor" else f"{target.against}'s"
    return f"{QUANTITIES[target.quantity]} ≤ {target.bound:.2f} × {against}{caches}"


def outcomes(results: dict[str, list[dict]]) -> list[Outcome]:
    """The outcomes of the targets of all parts that were measured."""
    results = results | {"headline": headline(results)}
    results["autoencoder-training"] = with_fastest(results.get("autoencoder-training", []))
    return [evaluate(target, results) for target in TARGETS if results.get(target.part)]


def target_table(outcomes: list[Outcome]) -> str:
    rows = [["workload", "contender", "target", "measured", "verdict"]]
    for outcome in outcomes:
        target = outcome.target
        workload = target.workload or f"all of {target.part}"
        value = number(outcome.value, digits=4 if target.quantity == "difference" else 2)
        rows.append([workload, target.contender, sentence(target), value, outcome.verdict])
    return table(rows)


def target_counts(outcomes: list[Outcome]) -> str:
    verdicts = [outcome.verdict for outcome in outcomes]
    return ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in VERDICTS if verdict in verdicts)


def line(part: str, record: dict) -> str:
    """One record on one line, for the terminal."""
    if part == "operators":
        shape = "×".join(map(str, record["shape"]))
        ms = f"{record['ms']:.3f} ms, eager {record['eager_ms']:.3f}" if "ms" in record else "wrong"
        return f"{record['operator']} {shape}: {ms}"
    if part in LOSS_CURVES:
        differences = {name: f"{row['difference']:.2%}" for name, row in record["contenders"].items()}
        evaluated = {n: f"{row['evaluated']:+.2%}" for n, row in record["contenders"].items() if "evaluated" in row}
        text = f"{record['workload']}: largest difference of the loss {differences}"
        return f"{text}; of trained weights in bf16 {evaluated}" if evaluated else text
    cells, rows = [], list(record["contenders"].items())
    for name, row in rows[-1:] if part == "autoencoder-training" else rows:  # such a record grows row by row
        figures = [f"{row[key]:.2f} {unit}" for key, unit in UNITS.items() if row.get(key) is not None]
        cells.append(f"  {name}: {row.get('failure') or ', '.join(figures)}")
    return "\n".join([record["workload"], *cells])
