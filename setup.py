"""Adds to pyproject.toml what it cannot say: where the kernels lie, and the CUDA extension dcae_fast._C.

The extension is built where nvcc and a CUDA build of torch are found; otherwise one line says why it is left out.
DCAE_FAST_BUILD_CUDA=1 makes that an error, DCAE_FAST_BUILD_CUDA=0 leaves it out.
"""

import importlib.util
import os
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


def find_torch() -> Path | None:
    """The torch of the environment installed into: pip's isolated builds hide it from imports, not from this path."""
    spec = importlib.util.find_spec("torch")
    folder = Path(spec.origin).parent if spec else Path(sysconfig.get_path("platlib"), "torch")
    return folder if (folder / "version.py").is_file() else None


def find_nvcc() -> str | None:
    home, path = os.environ.get("CUDA_HOME", "/usr/local/cuda"), os.environ.get("PATH", "")
    return shutil.which("nvcc", path=os.pathsep.join([f"{home}/bin", path]))


def reason_without_cuda() -> str | None:
    """Why the CUDA extension cannot or shall not be built; None if it will be."""
    if os.environ.get("DCAE_FAST_BUILD_CUDA") == "0":
        return "DCAE_FAST_BUILD_CUDA=0"
    if TORCH is None:
        return "torch is not installed"
    if runpy.run_path(str(TORCH / "version.py"))["cuda"] is None:
        return "the installed torch is no CUDA build"
    if NVCC is None:
        return "nvcc was not found (PATH, CUDA_HOME)"
    return None


class BuildPython(build_py):
    def run(self):
        if REASON:
            print(f"dcae_fast: CUDA extension left out, Triton does its work: {REASON}", file=sys.stderr)
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
        # --fresh: an earlier build's ninja may have gone with pip's isolated environment
        subprocess.run(["cmake", "--fresh", "-G", "Ninja", "-S", ROOT, "-B", build, *configure], check=True)
        subprocess.run(["cmake", "--build", build], check=True)


TORCH, NVCC = find_torch(), find_nvcc()
REASON = reason_without_cuda()
if REASON and os.environ.get("DCAE_FAST_BUILD_CUDA") == "1":
    sys.exit(f"dcae_fast: the CUDA extension cannot be built: {REASON}")

setup(
    packages=[*find_packages(include=["dcae_fast", "dcae_fast.*"]), "dcae_fast.kernels"],
    package_dir={"dcae_fast.kernels": "kernels/src"},
    ext_modules=[] if REASON else [Extension("dcae_fast._C", sources=[])],
    cmdclass={"build_py": BuildPython, "build_ext": BuildCUDA},
)
