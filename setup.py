"""The part of the build that pyproject.toml cannot express: the folder of the kernels, and the extension dcae_fast._C.

The CUDA extension is built if the installed torch is a CUDA build and a matching nvcc is found. Without such an nvcc,
but with a Hopper GPU, pip installs the compiler from PyPI for the build. Otherwise the extension is skipped, and one
line gives the reason. DCAE_FAST_BUILD_CUDA=1 installs the compiler also without a GPU, and makes a skipped extension an
error. DCAE_FAST_BUILD_CUDA=0 skips the extension.
"""

import contextlib
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
OLDEST = 12, 5  # oldest supported release of nvcc
ASKED = os.environ.get("DCAE_FAST_BUILD_CUDA")


def find_torch() -> Path | None:
    """The folder of torch in the target environment. pip's isolated builds hide torch only from imports."""
    spec = importlib.util.find_spec("torch")
    folder = Path(spec.origin).parent if spec else Path(sysconfig.get_path("platlib"), "torch")
    return folder if (folder / "version.py").is_file() else None


def find_cuda() -> tuple[int, int] | None:
    """(major, minor) of the CUDA version that torch was built with; None if torch is not a CUDA build."""
    cuda = runpy.run_path(str(TORCH / "version.py"))["cuda"] if TORCH else None
    return tuple(map(int, cuda.split(".")[:2])) if cuda else None


def find_nvccs() -> dict[str, tuple[int, int]]:
    """Path → release (major, minor) of the nvccs in CUDA_HOME, in PATH, and in PyPI's packages for torch's CUDA."""
    folders = [f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin", os.environ.get("PATH", "")]
    folders += [f"{site}/nvidia/cu{CUDA[0]}/bin" for site in (*sys.path, sysconfig.get_path("platlib")) if CUDA]
    found = {}
    for nvcc in filter(None, (shutil.which("nvcc", path=folder) for folder in folders)):
        with contextlib.suppress(OSError):  # an nvcc that does not run on this machine
            output = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
            if release := re.search(r"release (\d+)\.(\d+)", output):
                found[nvcc] = tuple(map(int, release.groups()))
    return found


def fits(release: tuple[int, int]) -> bool:
    """Whether an nvcc fits torch: nvcc's CUDA runtime needs a driver of its major version, and torch's is installed."""
    return CUDA is not None and release[0] == CUDA[0] and release >= OLDEST


def has_hopper() -> bool:
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    return shutil.which(query[0]) is not None and "9.0" in subprocess.run(query, capture_output=True, text=True).stdout


def missing_compiler() -> list[str]:
    """Packages that pip must install for the build. PyPI has no nvcc older than CUDA 13."""
    if ASKED == "0" or NVCC or CUDA is None or CUDA[0] < 13 or not (ASKED == "1" or has_hopper()):
        return []
    return [f"cuda-toolkit[cccl,crt,cudart,nvcc]=={CUDA[0]}.{CUDA[1]}.*"]


def reason_without_cuda() -> str | None:
    """The reason why the CUDA extension is skipped; None if it is built."""
    if ASKED == "0":
        return "DCAE_FAST_BUILD_CUDA=0"
    if TORCH is None:
        return "torch is not installed"
    if CUDA is None:
        return "the installed torch is not a CUDA build"
    if NVCC is None:
        found = ", ".join(f"{nvcc} of CUDA {major}.{minor}" for nvcc, (major, minor) in NVCCS.items())
        oldest = "{}.{}".format(*max(OLDEST, (CUDA[0], 0)))
        needed = f"torch was built with CUDA {CUDA[0]}, which needs nvcc {oldest} or newer of CUDA {CUDA[0]}"
        return f"{needed}; CUDA_HOME and PATH contain {found or 'none'}"
    return None


class BuildPython(build_py):
    def run(self):
        if REASON:
            print(f"dcae_fast: CUDA extension skipped, Triton kernels are used instead: {REASON}", file=sys.stderr)
        super().run()


class BuildCUDA(build_ext):
    def build_extension(self, ext):
        build = Path(self.build_temp).resolve() / "cmake"
        configure = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DTORCH={TORCH}",
            f"-DCMAKE_CUDA_COMPILER={NVCC}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={Path(self.get_ext_fullpath(ext.name)).resolve().parent}",
        ]
        # --fresh: the ninja of an earlier build may be gone with pip's isolated environment
        subprocess.run(["cmake", "--fresh", "-G", "Ninja", "-S", ROOT, "-B", build, *configure], check=True)
        subprocess.run(["cmake", "--build", build], check=True)


TORCH = find_torch()
CUDA = find_cuda()
NVCCS = find_nvccs()
NVCC = next((nvcc for nvcc, release in NVCCS.items() if fits(release)), None)
REASON = reason_without_cuda()
# pip queries build requirements with this command; in other commands setuptools would download them itself
COMPILER = missing_compiler() if "egg_info" in sys.argv else []
if REASON and ASKED == "1" and not COMPILER:
    sys.exit(f"dcae_fast: the CUDA extension cannot be built: {REASON}")

setup(
    packages=[*find_packages(include=["dcae_fast", "dcae_fast.*"]), "dcae_fast.kernels"],
    package_dir={"dcae_fast.kernels": "kernels/src"},
    ext_modules=[] if REASON else [Extension("dcae_fast._C", sources=[])],
    setup_requires=COMPILER,
    cmdclass={"build_py": BuildPython, "build_ext": BuildCUDA},
)
