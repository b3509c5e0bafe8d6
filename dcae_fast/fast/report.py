"""What `patch` did, and what this machine lacks for the full speed."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dcae_fast.ops._library import EXTENSION_IS_BUILT, HAS_TRITON, INTERPRETED, cuda_extension, is_hopper

from . import scales
from .calibration import Calibration


@dataclass
class Report:
    """What `patch` did. replaced: class name → number of modules; skipped: (path, class name, reason); note: one line.

    graphs: what cuda_graphs="auto" means; empty for other values.
    calibration: of 8-bit layers, with precision="int8"; precision: which layers compute in 8 bit, as text. in_int8,
    in_float8: whether layers compute in int8, or in 8-bit floating point, on the present device.
    components: for a pipeline, name → report of the component; `replaced` and `skipped` then cover all components.
    """

    replaced: Counter[str] = field(default_factory=Counter)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    note: str = ""
    components: dict[str, "Report"] = field(default_factory=dict)
    graphs: str = ""
    calibration: Calibration | None = None
    precision: str = ""
    in_int8: bool = False
    in_float8: bool = False

    @classmethod
    def of_components(cls, reports: dict[str, "Report"]) -> "Report":
        distinct = {id(report): report for report in reports.values()}.values()
        replaced = sum((report.replaced for report in distinct), Counter())
        skipped = [
            (f"{name}.{path}".rstrip("."), *rest) for name, report in reports.items() for path, *rest in report.skipped
        ]
        in_int8, in_float8 = (
            any(getattr(each, name) for each in reports.values()) for name in ("in_int8", "in_float8")
        )
        return cls(replaced, skipped, components=reports, in_int8=in_int8, in_float8=in_float8)

    def __str__(self) -> str:
        if self.components:
            return "\n\n".join(f"{name}:\n{report}" for name, report in self.components.items())
        if not self.replaced and not self.skipped:
            return self.note
        rows = [("module", "patched", "left as it is, because")]
        rows += [(name, str(count), "") for name, count in sorted(self.replaced.items())]
        reasons = Counter((name, reason) for _, name, reason in self.skipped)
        rows += [(name, "", f"{reason} ({count})") for (name, reason), count in sorted(reasons.items())]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        table = [f"{name:<{widths[0]}}  {count:>{widths[1]}}  {reason}".rstrip() for name, count, reason in rows]
        return "\n".join([*table, *filter(None, (self.precision, self.graphs, self.note))])

    def save_scales(self, path: str | Path) -> None:
        """Write the calibration to a .safetensors file, for `patch(model, precision="int8", calibration=path)`.

        The file is refused for a model with other weights. Raises ValueError unless there is exactly one calibration,
        and unless the name ends in .safetensors; raises `files.WriteError`.
        """
        reports = (self, *self.components.values())  # two components may be the same module
        found = {id(each.calibration): each.calibration for each in reports if each.calibration is not None}
        if len(found) != 1:
            raise ValueError(f"the report has {len(found)} calibrations; expected one, of patch(precision='int8')")
        scales.save(*found.values(), path)


def about_auto(graph_memory: int) -> str:
    """What cuda_graphs="auto" means, in one line."""
    return (
        "CUDA graphs: automatic. A repeated inference call is captured if the GPU computes it about as fast as Python "
        f"issues it; all graphs together hold at most {graph_memory / 2**30:.3g} GiB."
    )


def missing() -> str:
    """What this machine or installation lacks, in one line; empty if nothing is missing."""
    if not torch.cuda.is_available() and not INTERPRETED:
        return "No CUDA device: on a CPU the modules' own forwards run."
    if not HAS_TRITON:
        return "Triton is not installed: the modules' own forwards run."
    if torch.cuda.is_available() and cuda_extension() is None:
        state = "does not load" if EXTENSION_IS_BUILT else "is not built"
        return f"dcae_fast._C {state}: convolutions, linear layers and attention are torch's{_how_to_build()}."
    libraries = {"Convolution": "cuDNN: convolutions are torch's", "Product": "cuBLASLt: linear layers are torch's"}
    absent = [words for name, words in libraries.items() if not hasattr(cuda_extension(), name)]
    if torch.cuda.is_available() and absent:
        return f"dcae_fast._C is built without {'; without '.join(absent)}."
    return ""


def _how_to_build() -> str:
    """How to build the extension, on a GPU that it supports. PyPI has no nvcc for CUDA 12."""
    if not is_hopper(torch.device("cuda", torch.cuda.current_device())):
        return ""
    if torch.version.cuda.startswith("12."):
        return "; pip install -e . in the source folder builds it, with nvcc 12.5 or newer from a CUDA 12 toolkit"
    return "; pip install -e '.[cuda]' in the source folder builds it"
