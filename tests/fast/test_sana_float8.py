"""`patch(model, precision="fp8")` and "int8" of diffusers' SANA transformer."""

import copy

import pytest
import torch
from small_models import DEVICE
from torch import nn

import dcae_fast
from dcae_fast import ops
from dcae_fast.fast import rows8

pytest.importorskip("diffusers")
from peft import LoraConfig
from test_sana import build, error, predict, results

pytestmark = pytest.mark.skipif(not rows8.runs_on(torch.device(DEVICE)), reason="needs Hopper, or the interpreter")
OPERATORS = ("linear_rows", "layer_norm_rows", "quantize_rows", "linear", "linear_fp8")


@pytest.fixture
def called(monkeypatch):
    """called(network, function): how often each of these operators runs in a call of the function under autocast."""

    def count(network: nn.Module, function=predict) -> dict[str, int]:
        names = []
        with monkeypatch.context() as patch, torch.autocast(DEVICE, torch.bfloat16):
            for name in OPERATORS:
                run = getattr(ops, name)
                patch.setattr(ops, name, lambda *args, run=run, name=name, **kw: names.append(name) or run(*args, **kw))
            with torch.set_grad_enabled(function is results):
                function(network)
        return {name: names.count(name) for name in names}

    return count


@pytest.mark.parametrize(
    "name, precision", [("sana", "fp8"), ("sprint", "fp8"), ("other", "fp8"), ("sana", "int8"), ("sprint", "int8")]
)
def test_every_product_of_a_block_is_in_8_bit(name, precision, called):
    """Queries, keys and values of the self-attention are one product, unless they have norms."""
    plain, fast = build(name)
    report = dcae_fast.patch(fast.eval(), precision=precision)
    listed = "1 conv_inverted, 1 conv_point, 2 to_k, 2 to_out.0, 2 to_q, 2 to_v"
    assert report.in_int8 if precision == "int8" else report.in_float8
    assert f"{precision}: 10 of 10 linear layers compute in 8 bit ({listed})" in str(report)
    with torch.no_grad():
        exact = predict(plain)
        with torch.autocast(DEVICE, torch.bfloat16):
            in_bf16, in_8_bit = error(predict(plain), exact), error(predict(fast), exact)
        assert in_bf16 < in_8_bit < 0.1
        assert error(predict(fast.to(torch.bfloat16)), exact) < 0.1
    counts, products = called(fast), 10 if name == "sprint" else 8
    assert counts["linear_rows"] == products and counts["layer_norm_rows"] == 2 and "linear" not in counts
    # results of both attentions and of the gated convolution, the input of the queries, the text; and each weight
    assert counts["quantize_rows"] == 5 + (products if precision == "fp8" else 0)


def test_layers_that_are_kept(called):
    for keep, products in {("conv_point",): 7, ("attn1.to_k",): 8, ("to_out.0", "conv_inverted"): 5}.items():
        plain, fast = build("sana")
        keep = [f"transformer_blocks.0.{name}" if name.startswith("attn") else name for name in keep]
        dcae_fast.patch(fast, precision="fp8", keep=keep)
        assert called(fast)["linear_rows"] == products - (keep == ["transformer_blocks.0.attn1.to_k"])
        with torch.no_grad():
            exact = predict(plain)
            assert error(predict(fast.to(torch.bfloat16)), exact) < 0.1


def test_training(called):
    """Gradients in 8 bit, within the error of 8 bit; the same layers compute in 8 bit as in inference."""
    plain, fast = build("sana")
    dcae_fast.patch(fast, precision="fp8")
    assert called(fast, results)["linear_fp8"] == 8
    expected = results(plain)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = results(fast)
    names = [name for name in expected if name != "result"]
    of_all = [torch.cat([each[name].float().flatten() for name in names]) for each in (got, expected)]
    assert error(got["result"], expected["result"]) < 0.1 and 1e-3 < error(*of_all) < 0.15


def test_frozen_weights_are_rounded_once(called):
    _, fast = build("sana")
    dcae_fast.patch(fast, precision="fp8", frozen=True)
    first = called(fast)["quantize_rows"]
    assert called(fast)["quantize_rows"] == 5 < first


def test_adapters_stay_exact(called):
    plain, fast = build("sana")
    dcae_fast.patch(fast, precision="fp8")
    for network in (plain, fast):
        torch.manual_seed(1)
        network.add_adapter(LoraConfig(r=2, target_modules=["to_k", "conv_inverted"], init_lora_weights=False))
    counts = called(fast)
    assert counts["linear_rows"] == 6  # queries, values and to_out of both attentions
    with torch.no_grad():
        exact = predict(plain)
        assert error(predict(fast.to(torch.bfloat16)), exact) < 0.1


def test_copies_and_unpatching(called):
    _, fast = build("sana")
    dcae_fast.patch(fast, precision="fp8")
    assert called(copy.deepcopy(fast))["linear_rows"] == 8
    dcae_fast.patch(fast)
    assert "linear_rows" not in called(fast)
