"""Imports follow the layers and have no cycles, and importing the package has no side effects."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {  # folder → allowed imports, besides the folder itself and the standard library
    "kernels/src": ["torch", "triton"],
    "dcae_fast/models": ["torch", "dcae_fast.errors"],
    "dcae_fast/sampling": ["torch"],
    "dcae_fast/ops": ["torch", "dcae_fast.kernels", "dcae_fast._C", "dcae_fast.models.functional"],
    "dcae_fast/fast": ["torch", "dcae_fast.ops", "dcae_fast.models"],
    "dcae_fast/training/engine": [
        "torch", "numpy", "safetensors", "PIL", "tqdm", "wandb", "dcae_fast.data.sampler", "dcae_fast.distributed",
        "dcae_fast.errors", "dcae_fast.files", "dcae_fast.images", "dcae_fast.interruption", "dcae_fast.lock",
        "dcae_fast.memory", "dcae_fast.ops._private", "dcae_fast.workers",
    ],
    "dcae_fast/__init__.py": ["dcae_fast.fast"],
}  # fmt: skip
EXCEPTIONS = {
    "dcae_fast/ops/_plans.py": ["dcae_fast.files"],
    "dcae_fast/fast/pictures.py": ["dcae_fast.images"],
    "dcae_fast/fast/scales.py": ["safetensors", "dcae_fast.errors", "dcae_fast.files"],
    "dcae_fast/models/finder.py": ["huggingface_hub"],
    "dcae_fast/models/weights.py": ["safetensors", "dcae_fast.files"],
    "dcae_fast/sampling/flow.py": ["torchdiffeq"],
}
SOURCES = [
    (path, rule)
    for rule in MAY_IMPORT
    for path in ([ROOT / rule] if rule.endswith(".py") else sorted((ROOT / rule).rglob("*.py")))
]


def package_of(folder: Path) -> str:
    """The package of the modules in a folder."""
    name = folder.relative_to(ROOT).as_posix()
    return name.replace("kernels/src", "dcae_fast/kernels").replace("/", ".")


def imports(path: Path) -> Iterator[str]:
    """All imports of a file, also in functions, as absolute dotted names: `from .a import b` gives "package.a.b"."""
    return names_imported(ast.walk(ast.parse(path.read_text())), package_of(path.parent))


def names_imported(nodes: Iterable[ast.AST], package: str) -> Iterator[str]:
    """The imported names of the import statements among the nodes. package: of the file with these statements."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) + 1 - node.level] if node.level else []
            module = [*base, *([node.module] if node.module else [])]
            yield from (".".join([*module, alias.name]) for alias in node.names)


def run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The statements of a file that run when it is imported: not those in functions or below `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        is_for_types = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
        if not is_for_types and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from run_at_import(child)


def graph(folder: str, nodes: Callable[[ast.AST], Iterable[ast.AST]]) -> dict[str, set[str]]:
    """Module → the imported modules of the same folder. nodes: selects the nodes of a file's tree to search."""
    paths = {module_of(path): path for path in (ROOT / folder).rglob("*.py")}
    imported = {
        module: names_imported(nodes(ast.parse(path.read_text())), package_of(path.parent))
        for module, path in paths.items()
    }
    found = {
        module: {name if name in paths else name.rpartition(".")[0] for name in imported[module]} for module in paths
    }
    return {module: names & paths.keys() - {module} for module, names in found.items()}


def module_of(path: Path) -> str:
    package = package_of(path.parent)
    return package if path.name == "__init__.py" else f"{package}.{path.stem}"


@pytest.mark.parametrize(
    "folder, nodes",
    [("dcae_fast/models", ast.walk), ("dcae_fast/sampling", ast.walk), ("dcae_fast", run_at_import)],
    ids=["models, in functions too", "sampling, in functions too", "all, when imported"],
)
def test_no_circular_imports(folder, nodes):
    modules = graph(folder, nodes)
    assert any(modules.values())
    try:
        tuple(TopologicalSorter(modules).static_order())
    except CycleError as error:
        pytest.fail(f"circular imports: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("path, rule", SOURCES, ids=[path.relative_to(ROOT).as_posix() for path, _ in SOURCES])
def test_imports_only_what_its_layer_may(path, rule):
    own = [] if rule.endswith(".py") else [package_of(ROOT / rule)]
    allowed = MAY_IMPORT[rule] + EXCEPTIONS.get(path.relative_to(ROOT).as_posix(), []) + own
    forbidden = [
        name
        for name in imports(path)
        if name.split(".")[0] not in sys.stdlib_module_names
        and not any(f"{name}.".startswith(f"{prefix}.") for prefix in allowed)
    ]
    assert not forbidden, f"{path.relative_to(ROOT)} imports {forbidden}; it may import {allowed}"


def test_importing_changes_nothing():
    """The import loads no optional package and changes no global state of Python or PyTorch."""
    program = """
import logging, os, random, sys, warnings
import torch
import torch.nn.functional as F

def state():
    return {
        "environment": dict(os.environ),
        "path": list(sys.path),
        "warnings": list(warnings.filters),
        "logging": (logging.root.level, list(logging.root.handlers)),
        "random": (random.getstate(), torch.get_rng_state().tolist()),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "matmul": torch.get_float32_matmul_precision(),
        "functions": [(owner, name, id(value)) for owner in (F, torch.nn, torch.nn.Module, torch.Tensor)
                      for name, value in vars(owner).items()],
    }

before, modules = state(), set(sys.modules)
import dcae_fast
assert dcae_fast.patch and dcae_fast.Report  # loads PyTorch and all operators
after = state()
changed = [name for name in before if before[name] != after[name]]
assert not changed, f"changed by the import: {changed}"
optional = {
    "diffusers", "transformers", "peft", "PIL", "tyro", "tqdm", "skimage", "sklearn", "flash_attn", "torchdiffeq",
    "matplotlib", "scipy", "torchmetrics", "torch_fidelity", "torchvision",
}
imported = optional & (set(sys.modules) - modules)
assert not imported, f"optional packages were imported: {imported}"

import dcae_fast.diffusion, dcae_fast.reconstruction, dcae_fast.sample  # needed by most commands
slow = {"torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo", "torch._inductor", "sympy", "triton"}
slow &= set(sys.modules) - modules
assert not slow, f"slow packages were imported: {slow}"
"""
    run(program)


def run(program: str) -> None:
    """Runs a program in a new process, and fails if the program fails."""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_help_and_the_list_of_models_do_not_wait_for_pytorch():
    run("""
import contextlib, io, sys
from dcae_fast import cli

recipes = ["train-diffusion", "uvit-h-f64"], ["train-autoencoder", "full"]
for command in ([], *([name] for name in cli.COMMANDS), *recipes):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        with contextlib.suppress(SystemExit):
            cli.main([*command, "--help"])
    assert "usage: dcae-fast" in text.getvalue(), text.getvalue()
    slow = {"torch", "numpy", "huggingface_hub", "safetensors"} & set(sys.modules)
    assert not slow, f"{command} --help imports {slow}"
with contextlib.redirect_stdout(io.StringIO()) as text:
    assert cli.main(["models"]) == 0
assert "dc-ae-tiny" in text.getvalue() and "torch" not in sys.modules
""")
