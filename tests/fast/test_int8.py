"""patch(model, precision="int8"): which layers compute in 8 bit, their results, and what ends 8 bit."""

import math

import pytest
import torch
from small_models import DEVICE, build, duplicates, image, reconstruct
from torch import nn

import dcae_fast
from dcae_fast import ops
from dcae_fast.fast import calibration, int8, operands, pictures
from dcae_fast.images import psnr, to_uint8
from dcae_fast.models.autoencoder import DCAE

EVERYTHING = dcae_fast.ErrorBudget(decoding=0, encoding=0, loss=math.inf)
PICTURES = torch.sin(3 * image(2, 3, 16, 16)).cpu()
FIRST_AND_LAST = ("project_in", "project_out", "conv_in", "conv_out")

pytestmark = pytest.mark.usefixtures("int8_calls")


def patched_model(name: str = "strided", **options) -> tuple[nn.Module, dcae_fast.Report]:
    model = build(name)
    options = {"calibration": PICTURES, "error_budget": EVERYTHING} | options
    return model, dcae_fast.patch(model, precision="int8", **options)


@torch.no_grad()
def result(model: nn.Module, x: torch.Tensor = PICTURES) -> torch.Tensor:
    weight = next(model.parameters())
    return reconstruct(model, x.to(weight.device, weight.dtype))


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def int8_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if operands.INT8 in vars(module)}


def rounded(layer: nn.Module, factor: torch.Tensor) -> None:
    """Lets a plain layer round its weight and its input as an 8-bit layer does."""
    is_linear, shape = isinstance(layer, nn.Linear), (1, -1, 1, 1)
    weight = layer.weight[:, :, None, None] if is_linear else layer.weight
    q, scales = ops.quantize_weight(weight / factor.view(shape))
    layer.weight.copy_((q * scales.view(-1, 1, 1, 1) * factor.view(shape)).view_as(layer.weight))

    def round_input(_, args):
        x = args[0].movedim(-1, 1) if is_linear else args[0]
        x = ops.quantize(x, factor) / factor.view(shape)
        return (x.movedim(1, -1) if is_linear else x,)

    layer.register_forward_pre_hook(round_input)


@pytest.mark.parametrize("name", ["strided", "diffusers-strided"])
def test_results_are_those_of_rounded_weights_and_inputs(name, int8_calls):
    model, report = patched_model(name)
    layers = int8_layers(model)
    assert report.calibration.layers.keys() == layers.keys() and len(layers) > 8
    assert not any(path.split(".")[1] in FIRST_AND_LAST for path in layers)
    up = next(path for path in layers if "decoder" in path and path.endswith(("main.conv.conv", "up_blocks.0.0.conv")))
    int8.unmark(layers.pop(up))  # its 8-bit weights are sums of weights
    int8_calls.clear()
    got, plain = result(model), build(name)
    assert int8_calls["conv2d_int8"] == len(layers) and int8_calls["upsample_conv2d_int8"] == 0
    exact = result(plain)
    with torch.no_grad():
        for path, layer in layers.items():
            factor, plain_layer = vars(layer)[operands.INT8].factor, plain.get_submodule(path)
            rounded(plain_layer, factor)
            if path.endswith("to_q"):
                for other in ("to_k", "to_v"):
                    rounded(plain.get_submodule(path.removesuffix("to_q") + other), factor)
    expected = result(plain)
    error = relative(exact, expected)
    assert 1e-4 < error < 0.1
    assert relative(got, expected) < 0.1 * error


@pytest.mark.parametrize("name, passes", [("strided", 4), ("diffusers-strided", 2)])
def test_passes_that_only_quantise(name, passes, int8_calls):
    """Kernels write int8 for the next layer, also of the next block: of a stage, or in diffusers of a whole model.

    The model has two residual blocks, two attentions and gated convolutions, and an up-sampling block.
    """
    model, _ = patched_model(name)
    int8_calls.clear()
    result(model)
    assert int8_calls["upsample_conv2d_int8"] == 1
    assert int8_calls["depthwise_glu"] == int8_calls["relu_linear_attention"] == int8_calls["conv2d"] == 0
    assert int8_calls["quantize"] == passes


def test_hooks_of_blocks_see_images(int8_calls):
    """No copy in 8 bit passes a block with a hook, nor the inside of one."""
    model, _ = patched_model()
    expected, seen = result(model), []
    attention, up = model.decoder.stages[1].op_list[0], model.decoder.stages[0].op_list[0]
    for block in (attention, attention.local_module, up):
        block.register_forward_hook(lambda _, args, y: seen.extend((args[0].dtype, y.dtype)))
    int8_calls.clear()
    # kernels that write one result or two may round the last bit of float32 differently
    torch.testing.assert_close(result(model), expected, atol=1e-6, rtol=1e-6)
    assert seen == 6 * [torch.float32] and int8_calls["quantize"] > 4


def test_half_precision_and_autocast():
    reference = build("strided")
    exact = result(reference)
    model = build("strided").bfloat16()
    report = dcae_fast.patch(model, precision="int8", calibration=PICTURES, error_budget=EVERYTHING)
    assert result(model).dtype == torch.bfloat16
    assert relative(result(model), exact) < 0.1
    model, _ = patched_model()
    with torch.autocast(DEVICE, torch.bfloat16):
        got = result(model)
    assert relative(got, exact) < 0.1
    assert len(int8_layers(model)) == len(report.calibration.layers)


def test_trained_weights():
    """Calibrated on one part of the bundled photograph, judged on other parts. It takes some seconds: each of the 46
    layers is measured.
    """
    model = DCAE.from_pretrained("dc-ae-tiny").to(DEVICE)
    photograph = pictures.load(None, 32)[0].to(DEVICE)
    seen = photograph[..., 96:160, 192:256]
    others = torch.cat([photograph[..., 96:160, left : left + 64] for left in (0, 96, 288, 384)])
    with torch.no_grad():
        exact = model(others)
    budget = dcae_fast.ErrorBudget(decoding=60, encoding=60)
    found = dcae_fast.patch(model, precision="int8", calibration=seen, error_budget=budget).calibration
    assert len(found.layers) == 46
    assert sum(layer.share for layer in found.layers.values() if layer.in_int8) > 0.8
    for quality in (found.decoding, found.encoding):
        assert quality.psnr >= 60 and quality.loss <= 0.05
    got = result(model, others)  # with the errors of encoder and decoder
    assert min(calibration.psnrs([got], [exact])) >= 50
    before, after = (psnr(*[to_uint8(torch.cat(list(each), 2)[None]) for each in (y, others)]) for y in (exact, got))
    assert after.item() >= before.item() - 0.05


def test_gradients_and_training_are_refused():
    model, _ = patched_model()
    with pytest.raises(RuntimeError, match=r"is for inference: call model.eval\(\)"):
        model(PICTURES.to(DEVICE))
    with pytest.raises(RuntimeError, match="for inference"):
        model.decoder.stages[0].op_list[1](image(1, 16, 4, 4))
    model.train()
    with pytest.raises(RuntimeError, match="for inference"), torch.no_grad():
        model(PICTURES.to(DEVICE))
    with pytest.raises(ValueError, match="is in training mode"):
        dcae_fast.patch(model, precision="int8")


@duplicates
def test_copies_compute_in_8_bit(duplicate):
    model, _ = patched_model()
    copy = duplicate(model)
    assert torch.equal(result(copy), result(model)) and int8_layers(copy).keys() == int8_layers(model).keys()


def load(model: nn.Module) -> nn.Module:
    model.load_state_dict(build("strided").state_dict())
    return model


def unpatch(model: nn.Module) -> nn.Module:
    dcae_fast.unpatch(model)
    return model


def patch(model: nn.Module) -> nn.Module:
    dcae_fast.patch(model)
    return model


ENDS = {"load_state_dict": load, "unpatch": unpatch, "patch": patch, "to(dtype)": lambda model: model.bfloat16()}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_what_ends_8_bit(end, int8_calls):
    model, _ = patched_model()
    model = end(model)
    int8_calls.clear()
    got = result(model)
    assert int8_calls["conv2d_int8"] == 0
    assert relative(got, result(build("strided"))) < (2e-2 if got.dtype == torch.bfloat16 else 1e-5)


def test_what_does_not_end_8_bit():
    model, _ = patched_model()
    before, names = result(model), build("strided").state_dict().keys()
    assert model.state_dict().keys() == names
    model.to(DEVICE, memory_format=torch.channels_last)
    assert torch.equal(result(model), before)
    with dcae_fast.patched(model):
        assert not int8_layers(model)
    assert int8_layers(model) and torch.equal(result(model), before)


def test_factors_follow_the_weights_to_another_device():
    layer = nn.Linear(4, 4)
    int8.mark(layer, [0.5, 1.0, 2.0, 4.0])
    factor = vars(layer)[operands.INT8].factor
    assert factor.tolist() == [2.0, 1.0, 0.5, 0.25] and operands.of_factor(layer, factor) is factor
    assert operands.of_factor(layer.to("meta"), factor).is_meta


def test_layers_with_hooks_compute_exactly(int8_calls):
    model, _ = patched_model()
    int8_calls.clear()
    result(model)
    all_layers, seen = int8_calls["conv2d_int8"], []
    block = model.encoder.stages[0].op_list[0].main
    block.conv2.conv.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    int8_calls.clear()
    result(model)
    assert int8_calls["conv2d_int8"] == all_layers - 1 and seen == [torch.float32]
    report = dcae_fast.patch(model, precision="int8", calibration=PICTURES, error_budget=EVERYTHING)
    found = {id(model.get_submodule(name)) for name in report.calibration.layers}
    assert found and id(block.conv2.conv) not in found, "the report does not count it"


def test_other_devices_compute_exactly(monkeypatch, int8_calls):
    model = build("strided")
    with monkeypatch.context() as patch:
        patch.setattr(int8, "runs_on", lambda device: False)
        report = dcae_fast.patch(model, precision="int8")
        assert report.calibration is None and "needs a Hopper GPU" in str(report)
        with pytest.raises(ValueError, match="absent.png: cannot be read as a photograph"):
            dcae_fast.patch(model, precision="int8", calibration="absent.png")
        with pytest.raises(ValueError, match="has 0 calibrations"):
            report.save_scales("scales.safetensors")
        int8_calls.clear()
        assert relative(result(model), result(build("strided"))) < 1e-5 and int8_calls["conv2d_int8"] == 0


def test_models_without_an_autoencoder():
    with pytest.raises(ValueError, match="no DC-AE with encoder and decoder"):
        dcae_fast.patch(build("strided").decoder, precision="int8")
    with pytest.raises(ValueError, match="several autoencoders"):
        dcae_fast.patch(nn.ModuleList([build("strided"), build("shuffled")]), precision="int8")
    with pytest.raises(ValueError, match="precision='int4'"):
        dcae_fast.patch(build("strided"), precision="int4")
