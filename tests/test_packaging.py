"""The wheel and the editable install: one top-level package, all kernels and assets, the console script."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_COPIED = shutil.ignore_patterns(".*", "build", "dist", "outputs", "*.egg-info", "_C*", "__pycache__")


def build(kind: str, folder: Path) -> zipfile.ZipFile:
    """Builds a "wheel" or "editable" wheel from a copy of the sources in folder / "source"."""
    source = shutil.copytree(ROOT, folder / "source", ignore=NOT_COPIED)
    program = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
    environment = os.environ | {"DCAE_FAST_BUILD_CUDA": "0"}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=source, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    with build("wheel", tmp_path_factory.mktemp("wheel")) as archive:
        yield archive


def files_under(folder: Path, pattern: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob(pattern) if path.is_file()}


def test_wheel_has_one_top_level_package(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dcae_fast"}


@pytest.mark.parametrize("package, folder", [("dcae_fast/", "dcae_fast"), ("dcae_fast/kernels/", "kernels/src")])
def test_wheel_has_every_module(wheel, package, folder):
    expected = {package + name for name in files_under(ROOT / folder, "*.py")}
    assert expected and expected <= set(wheel.namelist())


def test_wheel_has_every_asset(wheel):
    expected = {f"dcae_fast/assets/{name}" for name in files_under(ROOT / "dcae_fast" / "assets", "*")}
    assert expected and expected <= set(wheel.namelist())


def test_editable_install_finds_the_kernels_and_the_command(tmp_path):
    with build("editable", tmp_path) as archive:
        archive.extractall(tmp_path / "site")
    (entry_points,) = (tmp_path / "site").glob("*.dist-info/entry_points.txt")
    assert "dcae-fast = dcae_fast.cli:main" in entry_points.read_text()
    program = f"""
import importlib.util, site, sys
site.addsitedir({str(tmp_path / "site")!r})
sys.path += {sys.path!r}
print(importlib.util.find_spec("dcae_fast.kernels").origin)
"""
    command = [sys.executable, "-S", "-c", program]  # -S: ignores other packages installed in editable mode
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert found.stdout.strip() == str(tmp_path / "source" / "kernels" / "src" / "__init__.py"), found.stderr


def test_the_folder_kernels_is_not_importable():
    """transformers and diffusers import a package with this name, also when run from the root of this repository."""
    program = "import importlib.util; spec = importlib.util.find_spec('kernels'); print(spec and spec.origin)"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not found.stdout.startswith(str(ROOT))


@pytest.mark.parametrize(
    "package, module", [("torch", "dcae_fast.ops._private"), ("triton", "dcae_fast.kernels.launch")]
)
def test_bounds_are_the_versions_tried(package, module):
    """pyproject.toml bounds the versions of packages whose private interfaces are used."""
    pytest.importorskip(package)
    tried = importlib.import_module(module).TRIED
    major, minor = map(int, tried[-1].split("."))
    bounds = f"{package}>={tried[0]},<{major}.{minor + 1}"
    (found,) = re.findall(rf'"({package}[<>=].*?)[;"]', (ROOT / "pyproject.toml").read_text())
    assert found == bounds, f"pyproject.toml has {found}; the TRIED of {module} is for {bounds}"


def test_make_installs_the_newest_torch_tried():
    from dcae_fast.ops._private import TRIED

    assert f"TORCH ?= torch=={TRIED[-1]}." in (ROOT / "Makefile").read_text()
