"""`patch(model, precision="int8")` of transformers: inference only, and together with autoencoders."""

import copy

import pytest
import torch
from small_diffusion import build
from test_rows8 import DEVICE, call, calls_of, error, inputs, network

import dcae_fast
from dcae_fast.fast import operands, precisions, rows8

pytestmark = pytest.mark.skipif(not rows8.runs_on(torch.device(DEVICE)), reason="needs Hopper, or the interpreter")
FOR_INFERENCE = "precision='int8'\\) is for inference"


def marks(model) -> set[str]:
    return {vars(module).get(operands.ROWS8) for module in model.modules()} - {None}


@pytest.mark.parametrize("name", ["uvit", "dit"])
def test_it_rounds_less_than_fp8(name):
    exact, errors = network(name)(*inputs()).detach(), {}
    for precision in ("fp8", "int8"):
        fast = network(name)
        dcae_fast.patch(fast, precision=precision)
        errors[precision] = error(call(fast), exact)
    assert errors["int8"] < errors["fp8"] / 2


def test_gradients_and_training_mode_are_refused():
    fast = network()
    dcae_fast.patch(fast, precision="int8")
    with pytest.raises(RuntimeError, match=FOR_INFERENCE):
        fast(*inputs())
    with torch.autocast(DEVICE, torch.bfloat16), pytest.raises(RuntimeError, match=FOR_INFERENCE):
        fast.mid_block(torch.randn(2, 18, 128, device=DEVICE))
    fast.train()
    with pytest.raises(RuntimeError, match="call model.eval\\(\\)"):
        call(fast)
    with pytest.raises(ValueError, match="is for inference, and the model is in training mode"):
        dcae_fast.patch(fast, precision="int8")
    dcae_fast.patch(fast)
    fast(*inputs()).sum().backward()
    assert fast.mid_block.mlp.fc1.weight.grad is not None


def test_weights_are_rounded_once(monkeypatch):
    """int8 implies frozen."""
    fast = network()
    dcae_fast.patch(fast, precision="int8")
    expected = call(fast)
    assert calls_of(fast, monkeypatch).count("quantize_rows") == 6  # attention and GELU, no weight
    with torch.no_grad():
        fast.mid_block.mlp.fc2.weight.mul_(2)  # is noticed
    assert not torch.equal(call(fast), expected)


def test_layers_that_are_kept():
    fast = network()
    report = dcae_fast.patch(fast, precision="int8", keep=["fc2", "mid_block.attn.qkv"])
    assert "int8: 9 of 13 linear layers" in str(report) and "3 fc2 stay exact: asked for" in str(report)
    with pytest.raises(ValueError, match="there is no layer fc3; expected full names, or some of \\['fc1', 'fc2'"):
        dcae_fast.patch(fast, precision="int8", keep=["fc3"])


@pytest.fixture
def calibrated(monkeypatch) -> list:
    """The autoencoders that would be calibrated, and on what."""
    asked = []
    monkeypatch.setattr(precisions, "calibration_of", lambda found, source, _: asked.append((found, source)))
    return asked


def test_a_model_with_both_parts(calibrated):
    """The autoencoder is calibrated, the transformer needs no calibration."""
    model = build().to(DEVICE)
    report = dcae_fast.patch(model, precision="int8", keep=["fc2"])
    assert calibrated == [(model.autoencoder, None)]
    assert marks(model.diffusion_model) == {"int8"} and not marks(model.autoencoder)
    assert report.in_int8 and not report.in_float8 and "int8: 10 of 13 linear layers" in report.precision
    z = model.to(torch.bfloat16).generate(torch.tensor([1, 2], device=DEVICE), steps=2)
    assert z.isfinite().all()


def test_a_pipeline(calibrated):
    parts = build().to(DEVICE)

    class Pipeline:
        components = {"transformer": parts.diffusion_model, "vae": parts.autoencoder, "scheduler": None}

    report = dcae_fast.patch(Pipeline(), precision="int8", calibration="photo.png")
    assert calibrated == [(parts.autoencoder, "photo.png")]
    of_transformer, of_autoencoder = (report.components[name] for name in ("transformer", "vae"))
    assert report.in_int8 and of_transformer.in_int8 and "int8: 13 of 13" in of_transformer.precision
    assert "linear layers" not in of_autoencoder.precision
    dcae_fast.unpatch(Pipeline())
    assert not any("fast" in key for module in parts.modules() for key in vars(module))


def test_an_autoencoder_by_itself(calibrated):
    model = build().autoencoder
    dcae_fast.patch(model, precision="int8")
    assert len(calibrated) == 1 and not marks(model)
    with pytest.raises(ValueError, match="there is no layer fc2; expected full names, or some of \\[\\]"):
        dcae_fast.patch(model, precision="int8", keep=["fc2"])


def test_refusals():
    model = network()
    for options in {"calibration": "photo.png"}, {"error_budget": dcae_fast.ErrorBudget(loss=1)}:
        with pytest.raises(ValueError, match="are for a DC-AE with encoder and decoder: found none"):
            dcae_fast.patch(model, precision="int8", **options)
    assert not any("fast" in key for module in model.modules() for key in vars(module))
    with pytest.raises(ValueError, match="the model has no DC-AE .*, and no block of UViT"):
        dcae_fast.patch(torch.nn.Linear(4, 4), precision="int8")


@pytest.mark.gpu
def test_a_graph_computes_the_same():
    fast = network(dtype=torch.bfloat16)
    dcae_fast.patch(fast, precision="int8", cuda_graphs=False)
    expected = call(fast, autocast=False)
    captured = copy.deepcopy(fast)
    dcae_fast.patch(captured, precision="int8", cuda_graphs=True)
    for _ in range(3):
        assert torch.equal(call(captured, autocast=False), expected)
