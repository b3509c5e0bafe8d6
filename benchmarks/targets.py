"""What the project aims at on one H200, as data, and whether results meet it."""

from dataclasses import dataclass
from itertools import product

from .workloads import DIRECTIONS, F32, F64, F128, SANA

NOMINAL = 790  # TFLOP/s of a large bf16 matrix product, for the floors that targets refer to
PATCHED, GRAPHS, BOUNDED = "patched channels-last", "patched + CUDA graphs", "patched, bounded memory"


@dataclass(frozen=True)
class Target:
    """A bound on a quantity of a contender, as a ratio to that of `against`, both from one run.

    part, workload: which record; workload None stands for all of the part, of which the worst counts. against: another
    contender, "floor" (the arithmetic at the nominal rate) or None, for the quantity itself. faster: the bound is on
    against / contender, from below; otherwise on contender / against, from above.
    """

    part: str
    workload: str | None
    contender: str
    quantity: str
    against: str | None
    bound: float
    faster: bool = False

    def value(self, record: dict) -> float | None:
        """The figure of one record, None where it was not measured or has failed."""
        own = record["contenders"].get(self.contender, {})
        if "failure" in own or own.get(self.quantity) is None:
            return None
        if self.against is None:
            return own[self.quantity]
        if self.against == "floor":
            other = record["flops"] / (NOMINAL * 1e9)
        else:
            other = record["contenders"].get(self.against, {}).get(self.quantity)
        if not other:
            return None
        return other / own[self.quantity] if self.faster else own[self.quantity] / other

    def failed(self, record: dict) -> bool:
        return "failure" in record["contenders"].get(self.contender, {})

    def met(self, value: float) -> bool:
        return value >= self.bound if self.faster else value <= self.bound


def faster(workload: str, contender: str, against: str, bound: float, part: str = "autoencoder") -> Target:
    return Target(part, workload, contender, "ms", against, bound, faster=True)


def near_floor(workload: str, contender: str, bound: float) -> Target:
    return Target("autoencoder", workload, contender, "ms", "floor", bound)


TARGETS = [
    faster(f"{F32}-decode-b8-512", PATCHED, "torch.compile", 1.30),
    near_floor(f"{F32}-decode-b8-512", PATCHED, 1.12),
    faster(f"{F32}-encode-b8-512", PATCHED, "torch.compile", 1.27),
    near_floor(f"{F32}-encode-b8-512", PATCHED, 1.15),
    *[faster(f"{F32}-{direction}-b1-512", GRAPHS, "torch.compile", 1.5) for direction in DIRECTIONS],
    *[faster(f"{SANA}-{direction}-b8-512", PATCHED, "torch.compile", 1.35) for direction in DIRECTIONS],
    *[
        faster(f"{model}-{direction}-b8-512", PATCHED, "torch.compile", 1.30)
        for model, direction in product((F64, F128), DIRECTIONS)
    ],
    Target("memory", f"{F32}-decode-b1-4096", BOUNDED, "peak_gib", "eager", 1 / 3),
    faster(f"{F32}-decode-b1-4096", BOUNDED, "eager", 1.0, part="memory"),
    Target("first-call", f"{F32}-decode-b8-512", "patched", "cold_s", None, 20),
    Target("first-call", f"{F32}-decode-b8-512", "patched", "warm_s", None, 2),
    Target("autoencoder", None, PATCHED, "error", "eager", 1.0),
]


VERDICTS = ("met", "missed", "not measured")


@dataclass(frozen=True)
class Outcome:
    """verdict: one of VERDICTS; value: the figure, None if there is none."""

    target: Target
    value: float | None
    verdict: str


def evaluate(target: Target, results: dict[str, list[dict]]) -> Outcome:
    """The outcome of a target; a contender that failed or was wrong has missed it."""
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
