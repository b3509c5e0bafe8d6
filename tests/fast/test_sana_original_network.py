"""NVlabs/Sana's network: CUDA graphs of whole calls (simulated), and 8 bit."""

import copy
import sys
import types

import pytest
import torch
from graph_tape import CAPTURED, REPLAYED, SEEN, counts, not_captured
from small_models import DEVICE
from test_sana_original import NETS, SanaMS, SanaMSCM, build, inputs, results

import dcae_fast
from dcae_fast import ops
from dcae_fast.fast import rows8
from dcae_fast.fast.module import is_fast

in_8_bit = pytest.mark.skipif(not rows8.runs_on(torch.device(DEVICE)), reason="needs Hopper, or the interpreter")


def pair(**options) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A network, and a patched one with CUDA graphs."""
    plain = build(**options)
    fast = copy.deepcopy(plain)
    dcae_fast.patch(fast, cuda_graphs=True)
    return plain, fast


def agree(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((got - expected).norm() <= 1e-5 * expected.norm())


@torch.no_grad()
@pytest.mark.parametrize("network", [SanaMS, SanaMSCM])
def test_calls_are_captured(tape, network):
    """Sizes may take turns, although the network remembers the last one. What the network does not read is no input."""
    plain, fast = pair(network=network)
    sizes = (2, 3), (3, 2)
    for size in sizes:
        x, time, text, mask = inputs(size=size)
        for expected in (SEEN, CAPTURED, REPLAYED):
            assert counts(fast, x, time, text, mask=mask, data_info={"img_hw": torch.ones(2, 2)}) == expected
    for size in sizes:
        x, time, text, mask = inputs(seed=2, size=size)
        assert counts(fast, x, timestep=time, y=text, mask=mask, return_logvar=False) == REPLAYED
        assert agree(fast(x, time, text, mask=mask), plain(x, time, text, mask=mask))


@torch.no_grad()
@pytest.mark.parametrize("network", [SanaMS, SanaMSCM])
def test_the_scale_of_guidance_is_an_input(tape, network):
    plain, fast = pair(network=network, embeds_scale=True)
    x, time, text, mask = inputs()
    for scale in (1.0, 2.0, 3.0, 4.0):
        given = (x, time, text), {"data_info": {"cfg_scale": torch.full((2,), scale, device=DEVICE)}, "mask": mask}
        assert agree(fast(*given[0], **given[1]), plain(*given[0], **given[1]))
    assert counts(fast, *given[0], **given[1]) == REPLAYED
    with pytest.raises(KeyError, match="cfg_scale"):
        fast(x, time, text, mask=mask, data_info={})


@torch.no_grad()
def test_other_calls_are_left_alone(tape):
    plain, fast = pair()
    x, time, text, mask = inputs()
    not_captured(fast, x, time, text, mask, None, True)
    assert fast(x, time, text, mask, return_logvar=True)[1] == "variance"
    not_captured(fast, x, time, text, mask, something=1)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'y'"):
        fast(x, time, mask=mask)
    fast.blocks[0].attn.forward = lambda x, HW: x  # as perturbed-attention guidance does
    plain.blocks[0].attn.forward = fast.blocks[0].attn.forward
    not_captured(fast, x, time, text, mask)
    assert agree(fast(x, time, text, mask), plain(x, time, text, mask))


@pytest.mark.parametrize("which", ["positions", "xformers"])
def test_networks_that_are_not_captured(monkeypatch, which):
    """The report says why. The blocks are fast."""
    network, module = build(), types.ModuleType(f"{NETS}.sana_multi_scale")
    network.use_pe, module._xformers_available = which == "positions", which == "xformers"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    report = dcae_fast.patch(network)
    reasons = {"positions": "it makes positions on the CPU", "xformers": "for xformers it reads the lengths"}
    assert reasons[which] in str(report) and not is_fast(network) and is_fast(network.blocks[0])
    assert not dcae_fast.patch(network, cuda_graphs=False).skipped


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got - exact).norm() / exact.norm()).item()


@in_8_bit
@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("precision, frozen", [("fp8", False), ("fp8", True), ("int8", True)])
def test_every_product_of_a_block_is_in_8_bit(with_norms, precision, frozen, monkeypatch):
    plain, given, called = build(with_norms).eval(), inputs(), []
    fast = copy.deepcopy(plain)
    report = dcae_fast.patch(fast, precision=precision, frozen=frozen)
    listed = "2 inverted_conv.conv, 2 kv_linear, 2 point_conv.conv, 4 proj, 2 q_linear, 2 qkv"
    assert report.in_int8 if precision == "int8" else report.in_float8
    assert f"{precision}: 14 of 14 linear layers compute in 8 bit ({listed})" in str(report)
    for name in ("linear_rows", "linear"):
        run = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, run=run, name=name: called.append(name) or run(*args))
    with torch.no_grad():
        exact = plain(*given)
        with torch.autocast(DEVICE, torch.bfloat16):
            in_bf16, got = error(plain(*given), exact), error(fast(*given), exact)
        assert in_bf16 < got < 0.1
        assert called.count("linear_rows") == 14 and called.count("linear") == 1  # of the last layer
        if frozen:
            with torch.autocast(DEVICE, torch.bfloat16):
                assert error(fast(*given), exact) == got
        of_half = inputs(torch.bfloat16)
        assert error(fast.to(torch.bfloat16)(*of_half), exact) < 0.1


@in_8_bit
def test_layers_that_are_kept():
    fast = build()
    report = dcae_fast.patch(fast, precision="fp8", keep=["inverted_conv.conv", "blocks.0.attn.qkv"])
    assert "11 of 14" in str(report)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        assert error(fast(*inputs()), build()(*inputs())) < 0.1


@in_8_bit
@pytest.mark.parametrize("precision", ["fp8", "fp8-all"])
def test_training_in_8_bit(precision):
    plain = build()
    fast = copy.deepcopy(plain)
    dcae_fast.patch(fast, precision=precision)
    expected = results(plain, inputs())
    with torch.autocast(DEVICE, torch.bfloat16):
        got = results(fast, inputs())
    of_all = [torch.cat([each[name].flatten() for name in expected if name != "result"]) for each in (got, expected)]
    assert 0 < error(*of_all) < 0.15


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("network", [SanaMS, SanaMSCM])
def test_real_graphs(network):
    """Replays give what the same kernels give without graphs."""
    fast = build(network=network, dtype=torch.bfloat16, embeds_scale=True)
    twin = copy.deepcopy(fast)
    dcae_fast.patch(fast, cuda_graphs=True)
    dcae_fast.patch(twin, cuda_graphs=False)
    for seed in range(4):
        for size in ((4, 6), (6, 4)):
            x, time, text, mask = inputs(torch.bfloat16, seed, size)
            info = {"cfg_scale": torch.full((2,), 1.0 + seed, device=DEVICE, dtype=torch.bfloat16)}
            expected = twin(x, time, text, mask=mask, data_info=info)
            assert torch.equal(fast(x, time, text, mask=mask, data_info=info), expected)
    assert len(fast.fast_options.graphs) == 2
