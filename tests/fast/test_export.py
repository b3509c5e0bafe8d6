"""torch.export and AOTInductor: patched models are exported, loaded in another process, and compute the same."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import DEVICE, OUTPUT, build, image
from test_transformer import inputs, pair
from torch import nn
from torch.export import Dim, ExportedProgram, export

import dcae_fast
from dcae_fast.fast import int8
from dcae_fast.ops import _library

PARTS = ["encoder", "decoder"]
with_aot_inductor = pytest.mark.skipif(
    torch.__version__.startswith("2.11."),
    reason="compiled packages of PyTorch 2.11 pass wrong dtypes to operators (pytorch/pytorch#169157)",
)

# Loads a package in a process of its own, computes each of the inputs, and saves the results. If the package has
# operators of dcae_fast, it is also loaded before dcae_fast is imported, and the error is printed.
SERVE = """
import sys
import traceback
import torch

torch.backends.cudnn.allow_tf32 = False
kind, has_operators, folder = sys.argv[1], sys.argv[2] == "True", sys.argv[3]

def load():
    if kind == "export":
        return torch.export.load(f"{folder}/model.pt2").module()
    return torch._inductor.aoti_load_package(f"{folder}/model.pt2")

if has_operators:
    try:
        load()
    except Exception:
        traceback.print_exc()
    import dcae_fast.ops
model = load()
with torch.no_grad():
    torch.save([model(*each) for each in torch.load(f"{folder}/inputs.pt")], f"{folder}/results.pt")
assert has_operators == ("dcae_fast" in sys.modules)
"""


def coder(name: str, part: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[tuple], tuple[dict]]:
    """A patched encoder or decoder, inputs of several sizes, and the dynamic dimensions.

    The sizes have fewer and more positions of latents than the attention has channels in a head.
    """
    model = build(name).to(dtype, memory_format=torch.channels_last)
    assert dcae_fast.patch(model).replaced
    ratio, channels = (model.spatial_compression_ratio, 3) if part == "encoder" else (1, 8)
    sizes = (2, 2, 4), (1, 4, 9), (3, 3, 2)
    several = [(image(b, channels, ratio * h, ratio * w, seed=b).to(dtype),) for b, h, w in sizes]
    return getattr(model, part), several, ({0: Dim("b"), 2: ratio * Dim("h"), 3: ratio * Dim("w")},)


@torch.no_grad()
def exported(model: nn.Module, example: tuple, dynamic: tuple | None = None, strict: bool = False) -> ExportedProgram:
    return export(model, example, dynamic_shapes=dynamic, strict=strict)


def operators(program: ExportedProgram) -> int:
    """How many calls of dcae_fast's operators a program makes."""
    return sum(str(node.target).startswith("dcae_fast.") for node in program.graph.nodes)


def package(kind: str, program: ExportedProgram, folder: Path) -> None:
    """Writes folder/model.pt2: the program, or what AOTInductor compiles it to."""
    if kind == "export":
        torch.export.save(program, folder / "model.pt2")
    else:
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))


def served(kind: str, folder: Path, several: list[tuple], has_operators: bool = True) -> tuple[list[torch.Tensor], str]:
    """What the package folder/model.pt2 computes for the inputs in another process, and what the process reports."""
    torch.save(several, folder / "inputs.pt")
    command = [sys.executable, "-c", SERVE, kind, str(has_operators), str(folder)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return torch.load(folder / "results.pt"), process.stderr


@torch.no_grad()
def assert_right(results: list[torch.Tensor], model: nn.Module, several: list[tuple]) -> None:
    """Asserts that results are as accurate as the results of the model that was exported."""
    exact = copy.deepcopy(model).double()
    for got, each in zip(results, several, strict=True):
        want = exact(*(x.double() if x.is_floating_point() else x for x in each))
        eager = model(*each)
        assert got.dtype == eager.dtype and got.shape == eager.shape
        error, of_eager = (((y.double() - want).norm() / want.norm()).item() for y in (got, eager))
        assert error <= max(2 * of_eager, OUTPUT if got.dtype == torch.float32 else 0)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "name, sizes, mode",
    [
        ("strided", "static", "non-strict"),
        ("strided", "dynamic", "non-strict"),
        ("diffusers-shuffled", "dynamic", "non-strict"),
        ("diffusers-shuffled", "dynamic", "strict"),
    ],
)
def test_exported_program_calls_the_operators(name, sizes, mode, part):
    model, several, dims = coder(name, part)
    several = several if sizes == "dynamic" else several[:1]
    program = exported(model, several[0], dims if sizes == "dynamic" else None, mode == "strict")
    assert operators(program) >= 10
    with torch.no_grad():
        results = [program.module()(*each) for each in several]
        assert [y.stride() for y in results] == [model(*each).stride() for each in several]
    assert_right(results, model, several)


@torch.no_grad()
def test_8_bit_stays_in_a_program():
    if not int8.runs_on(torch.device(DEVICE)):
        pytest.skip("8-bit convolutions need a Hopper GPU")
    decoder, z = build("strided").decoder, image(2, 8, 4, 3)
    dcae_fast.patch(decoder, frozen=True, cuda_graphs=False)
    for _, layer in int8.candidates(decoder):
        int8.mark(layer, [0.05] * layer.in_channels)
    program = exported(decoder, (z,), ({0: Dim("b"), 2: Dim("h"), 3: Dim("w")},))
    targets = {str(node.target) for node in program.graph.nodes}
    assert {f"dcae_fast.{name}.default" for name in ("conv2d_int8", "upsample_conv2d_int8")} <= targets
    assert torch.equal(program.module()(z), decoder(z))


@pytest.mark.parametrize("part", [pytest.param("encoder", marks=pytest.mark.gpu), "decoder"])  # slow without a GPU
def test_loaded_in_another_process(part, tmp_path):
    model, several, dims = coder("diffusers-shuffled", part, torch.bfloat16)
    package("export", exported(model, several[0], dims), tmp_path)
    results, report = served("export", tmp_path, several)
    assert_right(results, model, several)
    assert "failed to resolve torch.ops.dcae_fast" in report


@with_aot_inductor
@pytest.mark.parametrize(
    "name, part, dtype",
    [
        pytest.param("strided", "encoder", "float32", marks=pytest.mark.gpu),  # slow without a GPU
        ("strided", "decoder", "bfloat16"),
    ],
)
def test_aot_inductor(name, part, dtype, tmp_path):
    model, several, dims = coder(name, part, getattr(torch, dtype))
    package("aoti", exported(model, several[0], dims), tmp_path)
    results, report = served("aoti", tmp_path, several)
    assert_right(results, model, several)
    assert "Could not find schema for dcae_fast::" in report


@pytest.mark.gpu
@with_aot_inductor
@pytest.mark.parametrize("part", PARTS)
def test_aot_inductor_on_another_stream(part, tmp_path):
    model, several, dims = coder("diffusers-shuffled", part, torch.bfloat16)
    package("aoti", exported(model, several[0], dims), tmp_path)
    loaded, stream = torch._inductor.aoti_load_package(str(tmp_path / "model.pt2")), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        results = [loaded(*each) for each in several]
    stream.synchronize()
    assert_right(results, model, several)


@pytest.mark.parametrize(
    "name, kind", [("uvit", "export"), pytest.param("dit", "aoti", marks=[pytest.mark.gpu, with_aot_inductor])]
)
def test_transformer(name, kind, tmp_path):
    _, model = pair(name)
    example = inputs()
    several = [example, tuple(each[:1] for each in example), tuple(torch.cat([each, each[:2]]) for each in example)]
    program = exported(model, example, ({0: Dim("batch")},) * 3)
    assert operators(program)
    package(kind, program, tmp_path)
    results, _ = served(kind, tmp_path, several)
    assert_right(results, model, several)


def test_options_of_patch_do_not_change_the_program():
    model, several, dims = coder("strided", "decoder", torch.bfloat16)
    program = exported(model, several[0], dims)
    for options in ({"frozen": True}, {"cuda_graphs": True}, {"max_memory": 10**4}):
        dcae_fast.patch(model, **options)
        with torch.no_grad():
            model(*several[0])
        assert operators(exported(model, several[0], dims)) == operators(program), options


def test_program_of_pytorch_only_loads_without_dcae_fast(monkeypatch, tmp_path):
    """An unpatched model, and a patched model on a CPU, have the same program."""
    model, several, dims = coder("strided", "encoder")
    monkeypatch.setattr(_library, "INTERPRETED", False)
    model, several = model.cpu(), [(x.cpu(),) for (x,) in several]
    on_a_cpu = exported(model, several[0], dims)
    dcae_fast.unpatch(model)
    program = exported(model, several[0], dims)
    assert program.graph_module.code == on_a_cpu.graph_module.code and not operators(program)
    package("export", program, tmp_path)
    results, _ = served("export", tmp_path, several, has_operators=False)
    assert_right(results, model, several)
