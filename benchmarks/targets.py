"""The project's speed and memory targets on one H200, and whether results meet them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from .autoencoder_workloads import LOSS_WORKLOADS, TRAINING_WORKLOADS
from .network_workloads import NETWORK_WORKLOADS
from .sana_workloads import BY_BLOCK, FROZEN, REDUCED, SANA_WORKLOADS
from .workloads import DIRECTIONS, F32, F64, F128, SANA, SHAPES_WORKLOADS, WORKLOADS

NOMINAL = 790  # TFLOP/s of a large bf16 matrix product; defines the floors in targets
PATCHED, GRAPHS, BOUNDED = "patched channels-last", "patched + CUDA graphs", "patched, bounded memory"
WITHOUT, IN_8_BIT = "patched, without graphs", "patched, 8 bit"
FASTEST = "patched, fastest"  # see `with_fastest`
FP8, FP8_ALL, TORCHAO = "patched, fp8", "patched, fp8-all", "torchao fp8, by row"
LOSS_CURVES = "loss-curve", "autoencoder-loss-curve"  # parts


@dataclass(frozen=True)
class Target:
    """A bound on a quantity of a contender, or on its ratio to the same quantity of `against` in the same run.

    part, workload: select the record; workload None means the worst record of the part. against: another contender (for
    times, the fastest of its `forms`), "floor" (FLOPs at the nominal rate), or None for the quantity itself.
    faster: the bound is a minimum of against / contender (of the quantity itself without `against`); otherwise, it is a
    maximum of contender / against.
    """

    part: str
    workload: str | None
    contender: str
    quantity: str
    against: str | None
    bound: float
    faster: bool = False

    def value(self, record: dict) -> float | None:
        """The quantity or ratio of one record; None if it was not measured or the contender failed."""
        own = record["contenders"].get(self.contender, {})
        if "failure" in own or own.get(self.quantity) is None:
            return None
        if self.against is None:
            return own[self.quantity]
        if self.against == "floor":
            other = record["flops"] / (NOMINAL * 1e9)
        elif self.quantity == "ms":
            other = fastest(record["contenders"], forms(record["contenders"], self.against))
        else:
            other = record["contenders"].get(self.against, {}).get(self.quantity)
        if not other:
            return None
        return other / own[self.quantity] if self.faster else own[self.quantity] / other

    def failed(self, record: dict) -> bool:
        return "failure" in record["contenders"].get(self.contender, {})

    def met(self, value: float) -> bool:
        return value >= self.bound if self.faster else value <= self.bound


def forms(rows: dict[str, dict], contender: str) -> list[str]:
    """The forms of an unpatched contender: eager or torch.compile in any memory format and mode, torchao's recipes; or
    itself.
    """
    return [name for name in rows if name == contender or (contender in name and "patched" not in name)]


def fastest(rows: dict[str, dict], names: Iterable[str]) -> float | None:
    """The milliseconds of the fastest of these contenders; None if none has a time."""
    return min((ms for name in names if (ms := rows.get(name, {}).get("ms"))), default=None)


def faster(workload: str, contender: str, against: str, bound: float, part: str = "autoencoder") -> Target:
    return Target(part, workload, contender, "ms", against, bound, faster=True)


def network(part: str, workload: str, over_eager: float, over_compile: float | None = None) -> list[Target]:
    """Targets of a patched transformer: minimum speedups over eager and over torch.compile."""
    bounds = {"eager": over_eager, "torch.compile": over_compile}
    return [faster(workload, "patched", other, bound, part) for other, bound in bounds.items() if bound]


def autoencoder_training(workload: str, over_compile: float) -> list[Target]:
    """Targets of the fastest patched contender: minimum speedup over torch.compile, and no more memory."""
    part = "autoencoder-training"
    return [
        faster(workload, FASTEST, "torch.compile", over_compile, part),
        Target(part, workload, FASTEST, "peak_gib", "torch.compile", 1.0),
    ]


def in_8_bit(workload: str, decode: float, encode: float, contender: str = IN_8_BIT) -> list[Target]:
    """Minimum speedups of 8-bit decoding and encoding over torch.compile. workload: with {} for the direction."""
    bounds = {"decode": decode, "encode": encode}
    return [faster(workload.format(name), contender, "torch.compile", bound) for name, bound in bounds.items()]


def in_fp8(workload: str, over_compile: float) -> list[Target]:
    """A forward in 8-bit floating point: minimum speedups over torch.compile and torchao, and no larger error."""
    return [
        faster(workload, FP8, "torch.compile", over_compile, "transformer"),
        faster(workload, FP8, "torchao", 1.1, "transformer"),
        Target("transformer", workload, FP8, "error", TORCHAO, 1.0),
    ]


def near_floor(workload: str, contender: str, bound: float) -> Target:
    return Target("autoencoder", workload, contender, "ms", "floor", bound)


TARGETS = [
    faster(f"{F32}-decode-b8-512", PATCHED, "torch.compile", 1.30),
    near_floor(f"{F32}-decode-b8-512", PATCHED, 1.12),
    faster(f"{F32}-encode-b8-512", PATCHED, "torch.compile", 1.27),
    near_floor(f"{F32}-encode-b8-512", PATCHED, 1.15),
    *[faster(f"{F32}-{direction}-b1-512", GRAPHS, "torch.compile", 1.5) for direction in DIRECTIONS],
    *[faster(f"{F32}-{direction}-b1-512", PATCHED, "torch.compile", 1.15) for direction in DIRECTIONS],
    *[
        faster(f"{SANA}-{direction}-{shape}", PATCHED, "torch.compile", 1.5)
        for shape, direction in product(("b1-1024", "b2-512"), DIRECTIONS)
    ],
    *[faster(f"{SANA}-{direction}-b8-512", PATCHED, "torch.compile", 1.35) for direction in DIRECTIONS],
    *in_8_bit(f"{F32}-{{}}-b8-512", decode=1.65, encode=1.55),
    *in_8_bit(f"{F64}-{{}}-b8-512", decode=1.6, encode=1.5),
    *in_8_bit(f"{F128}-{{}}-b8-512", decode=1.6, encode=1.5),
    *in_8_bit(f"{SANA}-{{}}-b8-512", decode=2.0, encode=1.85),
    *in_8_bit(f"{F32}-{{}}-b1-512", decode=1.7, encode=1.7, contender=f"{IN_8_BIT} + CUDA graphs"),
    *[
        faster(f"{model}-{direction}-b8-512", PATCHED, "torch.compile", 1.30)
        for model, direction in product((F64, F128), DIRECTIONS)
    ],
    Target("memory", f"{F32}-decode-b1-4096", BOUNDED, "peak_gib", "eager", 1 / 3),
    faster(f"{F32}-decode-b1-4096", BOUNDED, "eager", 1.0, part="memory"),
    Target("first-call", f"{F32}-decode-b8-512", "patched", "cold_s", None, 20),
    Target("first-call", f"{F32}-decode-b8-512", "patched", "warm_s", None, 2),
    *[
        Target("first-call", f"{F32}-decode-b8-512", "patched + torch.compile", seconds, "torch.compile", 1.0)
        for seconds in ("cold_s", "warm_s")
    ],
    *[Target("shapes", each.name, PATCHED, "ms", WITHOUT, 1.02) for each in SHAPES_WORKLOADS],
    *[Target("shapes", each.name, PATCHED, "held_gib", None, 1.0) for each in SHAPES_WORKLOADS],
    Target("autoencoder", None, PATCHED, "error", "eager", 1.0),
    *autoencoder_training(f"{F32}-full-b16-256", 1.30),
    *autoencoder_training(f"{SANA}-full-b16-256", 1.50),
    *autoencoder_training(f"{F64}-full-b16-256", 1.30),
    *autoencoder_training(f"{F32}-full-b4-512", 1.30),
    *autoencoder_training(f"{SANA}-full-b4-512", 1.50),
    *autoencoder_training(f"{F32}-latent-adaptation-b4-1024", 1.40),
    *autoencoder_training(f"{F32}-decoder-b8-512", 1.40),
    *autoencoder_training(f"{F32}-full-b16-256-adversarial", 1.20)[:1],
    Target("autoencoder-training", None, FASTEST, "error", "eager", 1.0),
    *network("transformer", "uvit-h-f64-forward-b2048", 1.9, 1.5),
    Target("transformer", "uvit-h-f64-forward-b2048", "patched", "mfu", None, 0.84, faster=True),
    *network("transformer", "uvit-h-f32-forward-b512", 1.9, 1.5),
    *network("transformer", "dit-xl-f32-forward-b512", 1.7, 1.3),
    *in_fp8("uvit-h-f64-forward-b2048", 1.75),
    *in_fp8("uvit-h-f32-forward-b512", 1.75),
    *in_fp8("dit-xl-f32-forward-b512", 1.6),
    faster("uvit-h-f64-step-b16", f"{FP8} + CUDA graphs", GRAPHS, 1.3, part="sampling"),
    *network("training", "uvit-h-f64-training-b1024", 2.0, 1.3),
    *network("training", "uvit-h-f64-training-b512", 2.0, 1.3),
    *network("training", "uvit-h-f64-training-b4096-checkpointed", 1.9),
    *network("training", "dit-xl-f32-training-b128", 1.6, 1.3),
    faster("uvit-h-f64-step-b16", GRAPHS, "eager", 3.5, part="sampling"),
    faster("uvit-h-f64-step-b16", "patched", "eager", 2.3, part="sampling"),
    faster("uvit-h-f64-step-b16", "patched", GRAPHS, 1.0, part="sampling"),
    faster("uvit-h-f64-step-b16", "patched + torch.compile", "torch.compile", 1.3, part="sampling"),
    faster("dit-xl-f64-step-b16", "patched + torch.compile", "torch.compile", 1.3, part="sampling"),
    faster("sana-1600m-forward-b2-1024px", "patched", BY_BLOCK, 1.5, part="sana"),
    faster("sana-1600m-forward-b2-1024px", "patched", REDUCED, 1.15, part="sana"),
    faster("sana-1600m-forward-b8-1024px", "patched", BY_BLOCK, 1.22, part="sana"),
    faster("sana-1600m-forward-b2-4096px", "patched", BY_BLOCK, 1.25, part="sana"),
    faster("sana-1600m-forward-b8-1024px", FP8, BY_BLOCK, 1.65, part="sana"),
    faster("sana-1600m-forward-b2-4096px", FP8, BY_BLOCK, 1.7, part="sana"),
    faster("sana-1600m-training-b8-1024px", "patched", BY_BLOCK, 1.25, part="sana"),
    Target("sana", "sana-1600m-training-b8-1024px", "patched", "peak_gib", BY_BLOCK, 1.0),
    faster("sana-1600m-pipeline-b1-1024px", FROZEN, BY_BLOCK, 1.5, part="sana"),
    Target("sana", None, "patched", "error", "eager", 1.0),
    Target("headline", "sampling", "patched", "ratio", None, 34, faster=True),
    Target("headline", "sampling", FP8, "ratio", None, 40, faster=True),
    Target("headline", "training", "patched", "ratio", None, 34, faster=True),
    Target("headline", "training", FP8, "ratio", None, 34, faster=True),
    faster("uvit-h-f64-training-b1024", FP8, "torch.compile", 1.4, part="training"),
    faster("uvit-h-f64-training-b1024", FP8, "torchao", 1.1, part="training"),
    faster("uvit-h-f64-training-b1024", FP8_ALL, "torch.compile", 1.5, part="training"),
    faster("dit-xl-f32-training-b128", FP8, "torch.compile", 1.35, part="training"),
    *[Target("loss-curve", None, contender, "difference", None, 0.01) for contender in (FP8, FP8_ALL)],
    *[Target(part, None, "patched", "error", "eager", 1.0) for part in ("transformer", "training")],
    *[Target(part, None, "patched", "difference", None, 0.01) for part in LOSS_CURVES],
]
PAPER = {"sampling": 19.1, "training": 17.9}  # the throughput ratios in the DC-AE paper, on one H100


class Ratio(NamedTuple):
    """A ratio of images/s: of each contender on DC-AE's latents over one contender on Stable Diffusion's latents."""

    part: str
    base: str
    ours: str
    over: str = "eager"


_SAMPLING = Ratio("transformer", "uvit-h-f8p2-forward-b128", "uvit-h-f64-forward-b2048")
_TRAINING = Ratio("training", "uvit-h-f8p2-training-b256-checkpointed", "uvit-h-f64-training-b4096-checkpointed")
_UNCHECKPOINTED = Ratio("training", "uvit-h-f8p2-training-b64", "uvit-h-f64-training-b1024")
HEADLINE = {  # the paper's two ratios, and the same with less favourable denominators
    "sampling": _SAMPLING,
    "training": _TRAINING,
    "sampling, over patched": _SAMPLING._replace(over="patched"),
    "training, over patched": _TRAINING._replace(over="patched"),
    "training, not checkpointed": _UNCHECKPOINTED,
    "training, not checkpointed, over patched": _UNCHECKPOINTED._replace(over="patched"),
}


def headline(results: dict[str, list[dict]]) -> list[dict]:
    """Records of the ratios in `HEADLINE`.

    A record has a row with "ratio" for each contender on DC-AE's latents, and for the paper.
    """
    records = []
    for name, (part, base, ours, over) in HEADLINE.items():
        found = {record["workload"]: record["contenders"] for record in results.get(part, [])}
        rate = found.get(base, {}).get(over, {}).get("images_per_s")
        rows = {"paper": {"ratio": PAPER[name]}} if name in PAPER else {}
        for contender, row in found.get(ours, {}).items() if rate else ():
            rows[contender] = row | {"ratio": row["images_per_s"] / rate} if "images_per_s" in row else row
        if rows.keys() - {"paper"}:
            records.append({"workload": name, "contenders": rows})
    return records


def fastest_patched(rows: dict[str, dict]) -> dict | None:
    """The row of the fastest patched contender; a failed one if all failed, None if none was run."""
    found = [row for name, row in rows.items() if "patched" in name]
    return min(found, key=lambda row: row.get("ms", math.inf), default=None)


def with_fastest(records: list[dict]) -> list[dict]:
    """The records with one more row, FASTEST: a copy of the row of the fastest patched contender, if any was run."""
    rows = [(record, fastest_patched(record["contenders"])) for record in records]
    return [
        record if row is None else record | {"contenders": record["contenders"] | {FASTEST: row}}
        for record, row in rows
    ]


def contenders_of(part: str) -> dict[str, tuple[str, ...]]:
    """The contenders of each workload of a part."""
    if part == "headline":
        workloads = {workload.name: workload.contenders for each in NETWORK_WORKLOADS.values() for workload in each}
        return {name: workloads[ratio.ours] for name, ratio in HEADLINE.items()}
    if part == "autoencoder-loss-curve":
        return {workload.name: workload.contenders for workload in LOSS_WORKLOADS}
    if part == "autoencoder-training":
        return {workload.name: (*workload.contenders, FASTEST) for workload in TRAINING_WORKLOADS}
    if part == "shapes":
        return {workload.name: workload.contenders for workload in SHAPES_WORKLOADS}
    if part == "sana":
        return {workload.name: workload.contenders for workload in SANA_WORKLOADS}
    return {workload.name: workload.contenders for workload in (WORKLOADS | NETWORK_WORKLOADS)[part]}


VERDICTS = ("met", "missed", "not measured")


@dataclass(frozen=True)
class Outcome:
    """verdict: one of `VERDICTS`. value: the measured quantity or ratio; None if there is none."""

    target: Target
    value: float | None
    verdict: str


def evaluate(target: Target, results: dict[str, list[dict]]) -> Outcome:
    """The outcome of a target. A contender that failed or was wrong misses its target."""
    records = [
        record
        for record in results.get(target.part, [])
        if target.workload in (None, record["workload"]) and target.contender in record["contenders"]
    ]
    if any(target.failed(record) for record in records):
        return Outcome(target, None, "missed")
    values = [value for value in map(target.value, records) if value is not None]
    if not values:
        return Outcome(target, None, "not measured")
    worst = min(values) if target.faster else max(values)
    return Outcome(target, worst, "met" if target.met(worst) else "missed")
