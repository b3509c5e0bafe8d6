"""Shared by all tests: reference cases, comparison with them, a table of the errors, and the `gpu` marker.

The reference folder contains fixtures computed with the original implementation. Its path is DCAE_FAST_REFERENCE or, by
default, ../shared/reference beside the repository. Without the folder, tests that need it are skipped.
"""

import contextlib
import json
import math
import os
import resource
import signal
from collections import defaultdict
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported
torch.set_num_threads(1)  # for small tests, several processes are faster than several threads
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.backends.cudnn.allow_tf32 = False  # tests of float32 expect its accuracy, also of PyTorch's convolutions

REFERENCE = Path(os.environ.get("DCAE_FAST_REFERENCE", Path(__file__).parents[2] / "shared" / "reference"))
NO_REFERENCE = pytest.mark.skipif(
    not (REFERENCE / "fixtures").is_dir(), reason=f"no reference fixtures at {REFERENCE}: set DCAE_FAST_REFERENCE"
)


@cache
def load_json(path: Path) -> dict:
    return json.loads(path.read_text())


@cache
def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


@dataclass(frozen=True)
class Case:
    """One case of a fixture file. `meta` describes the case; `file_meta` describes the file."""

    file: str
    name: str

    @property
    def file_meta(self) -> dict:
        return load_json(REFERENCE / "fixtures" / f"{self.file}.json")

    @property
    def meta(self) -> dict:
        return self.file_meta["cases"][self.name]

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """The file's tensors whose names start with "<prefix>/". Keys are the names without this prefix."""
        everything = load_tensors(REFERENCE / "fixtures" / f"{self.file}.safetensors")
        return {k[len(prefix) + 1 :]: v for k, v in everything.items() if k.startswith(f"{prefix}/")}


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU")
    config.addinivalue_line("markers", "cases(files, *names, but=()): once for each matching reference case, as `case`")


def pytest_generate_tests(metafunc):
    """`@pytest.mark.cases("blocks_*", "core_*", but=["*_float32"])`: globs for files, cases and excluded cases."""
    marker = metafunc.definition.get_closest_marker("cases")
    if marker is None:
        return
    files, *names = marker.args
    but = marker.kwargs.get("but", [])
    cases = [
        Case(path.stem, name)
        for path in sorted((REFERENCE / "fixtures").glob(f"{files}.json"))
        for name in load_json(path).get("cases", [])
        if any(fnmatch(name, glob) for glob in names or ["*"]) and not any(fnmatch(name, glob) for glob in but)
    ]
    missing = [pytest.param(None, marks=NO_REFERENCE)]
    metafunc.parametrize("case", cases or missing, ids=[f"{case.file}-{case.name}" for case in cases] or ["missing"])


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session", autouse=True)
def fast_interpreter():
    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
        import triton_interpreter

        triton_interpreter.accelerate()


@pytest.fixture(scope="session")
def reference() -> Path:
    """The reference folder."""
    if not (REFERENCE / "fixtures").is_dir():
        pytest.skip(NO_REFERENCE.kwargs["reason"])
    return REFERENCE


@pytest.fixture
def open_case(reference) -> type[Case]:
    """open_case(file, name) opens one reference case."""
    return Case


@pytest.fixture
def compare(record_property):
    """compare(file, got, expected, limit, what=""): asserts ‖got - expected‖ / ‖expected‖ <= limit, in float64.

    scale: replaces ‖expected‖. For each file, the error closest to its limit is printed at the end of the run.
    """

    def check(file: str, got: torch.Tensor, expected: torch.Tensor, limit: float, what: str = "", scale=None) -> None:
        assert got.shape == expected.shape, f"{what}: shape {list(got.shape)}, expected {list(expected.shape)}"
        got, expected = got.detach().cpu().double(), expected.cpu().double()
        scale = expected.norm() if scale is None else scale
        error = ((got - expected).norm() / scale).item() if (got != expected).any() else 0.0
        record_property("reference_error", (file, error, limit))
        assert error <= limit, f"{what}: relative L2 error {error:.2e} against {file}, limit {limit:.0e}"

    return check


@pytest.fixture
def compare_gradients(compare):
    """compare_gradients(case, gradients, limit) compares gradients by parameter name, and their total norm, to a case.

    Large gradients have only 80 elements and the norm in the fixture; their error is relative to the whole gradient.
    """

    def check(case: Case, gradients: dict[str, torch.Tensor], limit: float) -> None:
        tensors, norms = case.tensors(case.name), case.meta["grad_l2"]
        assert gradients.keys() == norms.keys()
        for name, gradient in gradients.items():
            gradient = gradient.flatten()
            compare(case.file, gradient.norm(), torch.tensor(norms[name]), limit, f"{name}, norm")
            if f"grad/{name}" in tensors:
                compare(case.file, gradient, tensors[f"grad/{name}"].flatten(), limit, name)
                continue
            evenly = torch.linspace(0, gradient.numel() - 1, 64).round().long()
            for which, at in {"first16": torch.arange(16), "sample64": evenly}.items():
                scale = norms[name] * math.sqrt(len(at) / gradient.numel())
                compare(case.file, gradient[at], tensors[f"grad_{which}/{name}"], limit, f"{name}, {which}", scale)
        total = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))
        assert total == pytest.approx(case.meta["total_grad_l2"], rel=limit)

    return check


@pytest.fixture
def full_disk():
    """Limits the size of files to 4 KiB, so that writing a larger file fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def lock_holder(tmp_path):
    """lock_holder(folder) starts a process that holds the folder's lock and has a child; returns its process id."""
    from dcae_fast.lock import locked

    processes = []

    def hold(folder: Path) -> int:
        read, write = os.pipe()
        process = os.fork()
        if not process:
            with locked(folder):
                child = os.fork()
                if child:
                    os.write(write, f"{child}\n".encode())
                signal.pause()
        processes.extend((process, int(os.read(read, 20))))
        return process

    yield hold
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    for process in processes[::2]:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process, 0)


def pytest_terminal_summary(terminalreporter):
    errors = defaultdict(list)
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == "reference_error" and report.when == "call":
                    file, error, limit = value
                    errors[file].append((error, limit))
    if errors:
        terminalreporter.section("largest relative L2 error per fixture file, in proportion to its limit")
    for file, pairs in sorted(errors.items()):
        error, limit = max(pairs, key=lambda pair: pair[0] / pair[1])
        terminalreporter.write_line(f"{file:<24} {error:.2e}  (limit {limit:.0e}, {len(pairs)} comparisons)")
