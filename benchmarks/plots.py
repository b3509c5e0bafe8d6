"""Plots of the results as PNG files. matplotlib comes with the extra `bench`."""

from pathlib import Path

from .tables import MAIN, best, cell, label
from .workloads import DIRECTIONS

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator
except ImportError as error:
    raise ImportError("plots need matplotlib, which is not installed: pip install -e '.[bench]'") from error

COLOURS = {
    "eager": "#b8bec6",
    "eager channels-last": "#9aa2ac",
    "eager, other seed": "#55708f",
    "torch.compile": "#7d93b2",
    "torch.compile, reduce-overhead": "#55708f",
    "plain + torch.compile": "#5b7fa6",
    "plain + torch.compile, max-autotune": "#3c5f86",
    "patched": "#e08e45",
    "patched channels-last": "#c9762e",
    "patched + CUDA graphs": "#b4432f",
    "patched, bounded memory": "#b4432f",
    "patched + torch.compile": "#e6c35c",
    "patched, fp8": "#6a9f58",
    "patched, fp8-all": "#3f7a4a",
    "patched, int8": "#8b6bb1",
}
GREY = "#444444"
STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.edgecolor": "#777777", "legend.frameon": False,
    "xtick.color": GREY, "ytick.color": GREY,
}  # fmt: skip


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG without version metadata, so that the same results give the same bytes."""
    figure.savefig(path, dpi=110, metadata={"Software": None})


@matplotlib.rc_context(STYLE)
def speed(records: list[dict], path: Path) -> None:
    """Bars for each workload and main contender: time in multiples of the floor, for encoding and decoding."""
    columns = [[record for record in records if record["direction"] == direction] for direction in DIRECTIONS]
    figure = Figure(figsize=(10, 1 + 0.6 * max(map(len, columns))), layout="constrained")
    most = max(in_floors(record, name) for record in records for name in MAIN)
    for axes, column, direction in zip(figure.subplots(1, 2, sharex=True), columns, DIRECTIONS, strict=True):
        draw_bars(axes, column)
        labels = [label(record).replace(f" {direction}, ", "\n") for record in column]
        axes.set(title=direction, xlim=(0, most * 1.12), xlabel="time in multiples of the floor; figures in ms")
        axes.set(yticks=range(len(column)), yticklabels=labels, ylim=(len(column) - 0.5, -0.6))
        axes.tick_params(axis="y", length=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(MAIN) + 1)
    save(figure, path)


def draw_bars(axes, records: list[dict]) -> None:
    """A group of bars for each record, labelled with milliseconds or the failure, and a line at the floor."""
    height = 0.8 / len(MAIN)
    for index, name in enumerate(MAIN):
        places = [row + (index - (len(MAIN) - 1) / 2) * height for row in range(len(records))]
        lengths = [in_floors(record, name) for record in records]
        axes.barh(places, lengths, height, color=COLOURS[name], label=name)
        for place, length, record in zip(places, lengths, records, strict=True):
            if row := best(record["contenders"], name):
                text = cell(row, digits=1)
                axes.text(length + 0.03, place, text, va="center", fontsize=6.5, color=GREY)
    axes.axvline(1, color="black", linewidth=0.8, label="floor")


def in_floors(record: dict, name: str) -> float:
    """The time of a main contender in multiples of the floor; 0 if it has no time."""
    return (best(record["contenders"], name) or {}).get("ms", 0) / record["floor_ms"]


@matplotlib.rc_context(STYLE)
def memory(records: list[dict], path: Path) -> None:
    """Peak memory (top) and time (bottom) over the side of the image, for encoding and decoding."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    for row, quantity in zip(panels, ("peak_gib", "ms"), strict=True):
        for axes, direction in zip(row, DIRECTIONS, strict=True):
            column = [record for record in records if record["direction"] == direction]
            draw_lines(axes, column, quantity)
            sizes = sorted({record["size"] for record in column})
            axes.set(xscale="log", yscale="log", xticks=sizes, xticklabels=sizes)
            axes.xaxis.minorticks_off()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.minorticks_off()
            axes.yaxis.set_major_formatter("{x:g}")
            axes.grid(color="#e5e5e5", linewidth=0.6)
    for axes, direction in zip(panels[0], DIRECTIONS, strict=True):
        axes.set_title(f"{direction}, batch 1")
    for axes in panels[1]:
        axes.set_xlabel("side of the image, pixels")
    panels[0][0].set_ylabel("peak memory, GiB")
    panels[1][0].set_ylabel("time, ms")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=len(COLOURS))
    save(figure, path)


def draw_lines(axes, records: list[dict], quantity: str) -> None:
    """A line for each contender; a cross at the upper edge, with the reason, marks a failure."""
    for name in dict.fromkeys(name for record in records for name in record["contenders"]):
        rows = {record["size"]: record["contenders"][name] for record in records if name in record["contenders"]}
        points = {size: row[quantity] for size, row in rows.items() if row.get(quantity) is not None}
        axes.plot(list(points), list(points.values()), marker="o", markersize=4, color=COLOURS[name], label=name)
        for size, row in rows.items():
            if "failure" in row:
                place = {"color": COLOURS[name], "transform": axes.get_xaxis_transform()}
                axes.plot(size, 0.97, "x", **place)
                axes.text(size * 0.95, 0.97, row["failure"][:24], ha="right", va="center", fontsize=7, **place)


@matplotlib.rc_context(STYLE)
def networks(records: list[dict], path: Path) -> None:
    """Bars for each workload and contender: fraction of the ceiling, labelled with images/s."""
    names = [name for name in COLOURS if any(name in record["contenders"] for record in records)]
    bars = [(record, name) for record in records for name in names if name in record["contenders"]]
    figure = Figure(figsize=(10, 1 + 0.2 * len(bars) + 0.2 * len(records)), layout="constrained")
    axes, place, ticks = figure.subplots(), 0.0, []
    for record in records:
        rows = [(name, record["contenders"][name]) for name in names if name in record["contenders"]]
        ticks.append(place + (len(rows) - 1) / 2)
        for name, row in rows:
            share = row.get("mfu", 0.0)
            text = row.get("failure") or f"{row['images_per_s']:.0f} images/s"
            axes.barh(place, share, 0.85, color=COLOURS[name], label=name)
            axes.text(share + 0.005, place, text, va="center", fontsize=6.5, color=GREY)
            place += 1
        place += 1
    axes.set(yticks=ticks, yticklabels=[record["workload"] for record in records], ylim=(place - 1, -1), xlim=(0, 1.1))
    axes.set(xlabel="the plain network's arithmetic in the time, as a share of the measured ceiling")
    axes.axvline(1, color="black", linewidth=0.8, label="ceiling")
    axes.tick_params(axis="y", length=0)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=min(4, len(handles)))
    save(figure, path)


@matplotlib.rc_context(STYLE)
def losses(records: list[dict], path: Path) -> None:
    """The loss of each contender over the training steps."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for record in records:
        for name, row in record["contenders"].items():
            steps = [(index + 1) * record["window"] for index in range(len(row["losses"]))]
            style = "-" if name == "eager" else "--"
            axes.plot(steps, row["losses"], style, color=COLOURS[name], label=f"{record['workload']}, {name}")
    axes.set(xlabel="training step", ylabel="loss, mean over a window", yscale="log")
    axes.legend()
    save(figure, path)
