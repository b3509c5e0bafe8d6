"""patch, unpatch, patched: they change only the classes of modules. Also the report, saving, copying and pickling."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_models import MODELS, build, duplicates, image, operators_called, reconstruct, step
from torch import nn
from torch.optim.swa_utils import AveragedModel

import dcae_fast
from dcae_fast.fast.call import WholeCall
from dcae_fast.fast.families.uvit_dit import Block
from dcae_fast.fast.module import FastModule
from dcae_fast.fast.patch import OPERATORS


@pytest.fixture(params=MODELS)
def model(request) -> nn.Module:
    return build(request.param)


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def fast_count(model: nn.Module) -> int:
    return sum(issubclass(cls, FastModule) for cls in classes(model))


def test_patch_changes_classes_and_nothing_else(model):
    before, original = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}, classes(model)
    attributes = [dict(vars(module)) for module in model.modules()]
    report = dcae_fast.patch(model)
    assert fast_count(model) == report.replaced.total() > 0
    assert all(issubclass(cls, base) for cls, base in zip(classes(model), original, strict=True))
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == before
    for module, found in zip(model.modules(), attributes, strict=True):
        options = {"fast_options"} if isinstance(module, WholeCall) else set()
        assert vars(module).keys() - found.keys() == options and vars(module) | found == vars(module)
    dcae_fast.unpatch(model)
    assert classes(model) == original
    assert [dict(vars(module)) for module in model.modules()] == attributes


def test_patching_again(model):
    original = classes(model)
    first = dcae_fast.patch(model)
    fast = classes(model)
    assert dcae_fast.patch(model) == first and classes(model) == fast
    dcae_fast.unpatch(model)
    dcae_fast.unpatch(model)
    assert classes(model) == original
    assert dcae_fast.patch(model) == first and classes(model) == fast


def test_patched_is_for_a_scope(model):
    original = classes(model)
    with dcae_fast.patched(model) as report:
        assert fast_count(model) == report.replaced.total() > 0
    assert classes(model) == original
    with pytest.raises(KeyError), dcae_fast.patched(model):
        raise KeyError
    assert classes(model) == original
    with pytest.raises(ValueError), dcae_fast.patched(model, disable="nothing"):
        pass
    assert classes(model) == original


def test_patched_leaves_a_patched_model_patched(model):
    dcae_fast.patch(model)
    fast = classes(model)
    with dcae_fast.patched(model):
        assert classes(model) == fast
    with dcae_fast.patched(model, disable="all"):
        assert fast_count(model) == 0
    assert classes(model) == fast


def test_a_part_can_be_patched():
    model = build("adaptive")
    dcae_fast.patch(model.decoder)
    assert fast_count(model.encoder) == 0 < fast_count(model.decoder)


# The report.


def test_report():
    model = build("adaptive")
    report = dcae_fast.patch(model)
    counts = {"ConvLayer": 6, "Decoder": 1, "Encoder": 1, "OpSequential": 5, "RMSNorm2d": 3, "ResBlock": 2}
    samplers = {"ConvPixelUnshuffleDownSampleLayer": 1, "ConvPixelShuffleUpSampleLayer": 1}
    assert report.replaced == counts | samplers | {"ResidualBlock": 2}
    adaptive = "op_list.0: no fast forward for AdaptiveOutputConvLayer"
    assert report.skipped == [("encoder.project_out", "OpSequential", adaptive)]
    header, *rows = str(report).splitlines()
    assert header.split()[:2] == ["module", "patched"]
    assert [row.split() for row in rows[:2]] == [["ConvLayer", "6"], ["ConvPixelShuffleUpSampleLayer", "1"]]
    assert report.note == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_report_without_kernels(monkeypatch):
    monkeypatch.setattr("dcae_fast.fast.report.INTERPRETED", False)
    report = dcae_fast.patch(build("adaptive"))
    assert report.note == str(report).splitlines()[-1] == "No CUDA device: on a CPU the modules' own forwards run."


class WithoutCublaslt:
    Convolution = None


@pytest.mark.parametrize(
    "built, extension, note",
    [
        (False, None, "_C is not built"),
        (True, None, "_C does not load"),
        (True, object(), "_C is built without cuDNN: convolutions are torch's; without cuBLASLt"),
        (True, WithoutCublaslt, "_C is built without cuBLASLt: linear layers are torch's."),
    ],
)
def test_report_without_the_extension(monkeypatch, built, extension, note):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("dcae_fast.fast.report.EXTENSION_IS_BUILT", built)
    monkeypatch.setattr("dcae_fast.fast.report.cuda_extension", lambda: extension)
    monkeypatch.setattr("dcae_fast.fast.report.is_hopper", lambda device: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert note in dcae_fast.patch(build("adaptive")).note


@pytest.mark.parametrize("cuda, brings", [("13.0", "pip install -e '.[cuda]'"), ("12.6", "from a CUDA 12 toolkit")])
def test_report_says_what_brings_the_extension(monkeypatch, cuda, brings):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr("dcae_fast.fast.report.cuda_extension", lambda: None)
    monkeypatch.setattr("dcae_fast.fast.report.is_hopper", lambda device: True)
    (line,) = dcae_fast.patch(build("adaptive")).note.splitlines()
    assert "dcae_fast._C" in line and brings in line


def test_report_of_what_was_left_out():
    model = build("adaptive")
    layer = model.encoder.stages[1].op_list[0].main.conv1
    layer.forward = layer.forward
    report = dcae_fast.patch(model, disable=["duplicate_shuffle_add", "unshuffle_average_add"])
    replaced = ("encoder.stages.1.op_list.0.main.conv1", "ConvLayer", "its forward was replaced on the instance")
    assert replaced in report.skipped
    rows = [row.split(maxsplit=1) for row in str(report).splitlines()]
    assert ["ResidualBlock", "duplicate_shuffle_add, unshuffle_average_add disabled (2)"] in rows


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))])
def test_nothing_to_patch(model):
    report = dcae_fast.patch(model)
    assert report.replaced.total() == 0
    assert str(report).endswith(
        f"{type(model).__name__} has no module of a DC-AE that is known here: nothing was patched."
    )


# Switches.


@pytest.mark.parametrize("library", ["", "diffusers-"])
@pytest.mark.parametrize(
    "operator", [name for name in OPERATORS if name not in (*Block.operators, "feature_distance", "gated_sum")]
)
@torch.no_grad()
def test_disabled_operator_is_not_called(library, operator, compare):
    name = "shuffled" if operator == "conv2d_unshuffle" else "strided"  # a model whose blocks call the operator
    model, x = build(library + name), image(1, 3, 8, 4)
    expected = reconstruct(model, x)
    report = dcae_fast.patch(model, disable=operator)
    assert report.skipped and all(operator in reason for *_, reason in report.skipped)
    assert operator not in operators_called(lambda: compare("eager", reconstruct(model, x), expected, 5e-6, operator))
    assert operator not in operators_called(reconstruct, model.half(), x.half())


def test_disabled_by_the_environment(monkeypatch):
    monkeypatch.setenv("DCAE_FAST_DISABLE", "rms_norm, bias_act")
    model, twin = build("strided"), build("strided")
    by_environment = dcae_fast.patch(model)
    monkeypatch.delenv("DCAE_FAST_DISABLE")
    assert by_environment == dcae_fast.patch(twin, disable=("bias_act", "rms_norm"))
    assert classes(model) == classes(twin)
    monkeypatch.setenv("DCAE_FAST_DISABLE", "all")
    report = dcae_fast.patch(model)
    assert fast_count(model) == 0 == report.replaced.total()
    assert {reason for *_, reason in report.skipped} == {"everything is disabled"}


def test_unknown_operator(monkeypatch):
    model = build("adaptive")
    with pytest.raises(
        ValueError, match="disable: unknown operators .'flash', 'rmsnorm'.; expected 'all' or .*rms_norm"
    ):
        dcae_fast.patch(model, disable=["rmsnorm", "bias_act", "flash"])
    monkeypatch.setenv("DCAE_FAST_DISABLE", "rmsnorm")
    with pytest.raises(ValueError, match="rmsnorm"):
        dcae_fast.patch(model)
    assert fast_count(model) == 0


@pytest.mark.parametrize("model", [None, "dc-ae", [nn.Linear(2, 2)], nn.Linear, {"vae": nn.Linear(2, 2)}])
@pytest.mark.parametrize(
    "function", [dcae_fast.patch, dcae_fast.unpatch, lambda model: next(dcae_fast.patched(model).gen)]
)
def test_what_is_no_model(function, model):
    with pytest.raises(TypeError, match="model is .*; expected an nn.Module, or a pipeline"):
        function(model)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cuda_graphs": "yes"}, "cuda_graphs='yes'; expected True, False or 'auto'"),
        ({"cuda_graphs": 1}, "cuda_graphs=1; expected True, False or 'auto'"),
        ({"max_memory": "4GB"}, "max_memory='4GB'; expected a number of bytes, an integer or None"),
        ({"max_memory": 2.0**30}, "max_memory=1073741824.0; expected a number of bytes"),
        ({"max_memory": True}, "max_memory=True; expected a number of bytes"),
        ({"graph_memory": None}, "graph_memory=None; expected a number of bytes, an integer"),
        ({"frozen": "auto"}, "frozen='auto'; expected True or False"),
        ({"disable": 3}, "disable=3; expected names of operators"),
        ({"disable": None}, "disable=None; expected names of operators"),
        ({"disable": ["rms_norm", 3]}, "disable=.'rms_norm', 3.; expected names of operators"),
    ],
)
def test_options_of_another_type(options, message):
    model = build("adaptive")
    with pytest.raises(TypeError, match=message):
        dcae_fast.patch(model, **options)
    assert fast_count(model) == 0


# Pipelines.


def test_a_pipeline():
    """Every component that is a module is patched and reported; other components are ignored."""
    vae, text_encoder = build("strided"), nn.Linear(2, 2)
    pipeline = SimpleNamespace(
        components={"vae": vae, "text_encoder": text_encoder, "tokenizer": object(), "none": None}
    )
    report = dcae_fast.patch(pipeline, disable="rms_norm")
    alone = dcae_fast.patch(vae, disable="rms_norm")
    assert report.components.keys() == {"vae", "text_encoder"} and report.components["vae"] == alone
    assert report.replaced == alone.replaced and fast_count(vae) == alone.replaced.total()
    assert report.skipped == [(f"vae.{path}", name, reason) for path, name, reason in alone.skipped]
    nothing = "Linear has no module of a DC-AE that is known here: nothing was patched."
    assert str(report) == f"vae:\n{alone}\n\ntext_encoder:\n{nothing}"
    dcae_fast.unpatch(pipeline)
    assert fast_count(vae) == 0
    with dcae_fast.patched(pipeline) as report:
        assert fast_count(vae) == report.replaced.total() > 0
    assert fast_count(vae) == 0


def test_a_pipeline_without_modules():
    report = dcae_fast.patch(SimpleNamespace(components={"tokenizer": None}))
    assert not report.replaced and str(report).endswith("no component that is a module: nothing was patched.")


def test_a_pipeline_of_diffusers():
    pytest.importorskip("diffusers")
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel

    sizes = {"in_channels": 8, "out_channels": 8, "num_layers": 1, "caption_channels": 8, "sample_size": 4}
    heads = {"num_attention_heads": 1, "attention_head_dim": 8, "num_cross_attention_heads": 1}
    transformer = SanaTransformer2DModel(**sizes, **heads, cross_attention_head_dim=8, cross_attention_dim=8)
    parts = {"tokenizer": None, "text_encoder": None, "scheduler": FlowMatchEulerDiscreteScheduler()}
    pipeline = SanaPipeline(vae=build("diffusers-strided").cpu(), transformer=transformer, **parts)
    report = dcae_fast.patch(pipeline)
    counts = [report.components[name].replaced for name in ("vae", "transformer")]
    assert report.replaced == counts[0] + counts[1] and not report.skipped
    assert counts[0]["Decoder"] == counts[1]["SanaTransformerBlock"] == 1
    assert [fast_count(pipeline.vae), fast_count(transformer)] == [count.total() for count in counts]


# Invalid inputs.


@pytest.mark.parametrize("shape", [(1, 3, 9, 7), (1, 3, 8, 7), (1, 3, 1, 1), (1, 4, 8, 8), (3, 8, 8), (1, 3, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_images_of_another_shape(model, dtype, shape):
    """A patched model raises the same error as the unpatched model."""
    model, errors = model.to(dtype), []
    for _ in range(2):
        with pytest.raises(Exception) as refusal:
            model.encode(image(*shape).to(dtype))
        errors.append((refusal.type, str(refusal.value)))
        dcae_fast.patch(model)
    assert errors[0] == errors[1]


@pytest.mark.parametrize("value", [[[0.0]], np.zeros((1, 3, 8, 8), np.float32), None], ids=["list", "array", "None"])
@torch.no_grad()
def test_values_that_are_no_tensors(model, value):
    """A patched model raises the same error as the unpatched model."""
    errors = []
    for _ in range(2):
        with pytest.raises((TypeError, AttributeError)) as refusal:
            model.encoder(value)
        errors.append((refusal.type, str(refusal.value)))
        dcae_fast.patch(model)
    assert errors[0] == errors[1]


# Saving and copying.


@pytest.mark.parametrize("name", ["adaptive", "diffusers-strided"])
def test_save_and_load(name, tmp_path):
    model = build(name, wide=True)
    dcae_fast.patch(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert fast_count(loaded) == 0
    torch.save(model.state_dict(), tmp_path / "state.pt")
    for state in (loaded.state_dict(), torch.load(tmp_path / "state.pt")):
        torch.testing.assert_close(state, model.state_dict(), atol=0, rtol=0, check_device=False)


@duplicates
@pytest.mark.parametrize("name", ["adaptive", "diffusers-shuffled"])
def test_copies_are_patched_too(name, duplicate):
    model, x = build(name), image(1, 3, 8, 4)
    original = classes(model)
    dcae_fast.patch(model)
    twin = duplicate(model)
    assert classes(twin) == classes(model)
    assert not {id(tensor) for tensor in twin.parameters()} & {id(tensor) for tensor in model.parameters()}
    torch.testing.assert_close(step(twin, x), step(model, x), atol=0, rtol=0)
    dcae_fast.unpatch(twin)
    assert classes(twin) == original != classes(model)


def test_moving_average_follows():
    model = build("adaptive")
    dcae_fast.patch(model)
    average = AveragedModel(model)
    average.update_parameters(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    average.update_parameters(model)
    for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mean, parameter * 2 / 3)
    assert average(image()).shape == image().shape
