"""`patch(model, precision="fp8")` and "int8": transformers whose linear layers compute in 8 bit."""

import copy
import pickle

import pytest
import torch
from small_models import DEVICE
from torch import nn

import dcae_fast
from dcae_fast import ops
from dcae_fast.fast import operands, rows8
from dcae_fast.models import DiT, DiTConfig, UViT, UViTConfig
from dcae_fast.models.autoencoder import DCAE, CoderConfig, DCAEConfig

SIZES = {"in_channels": 8, "input_size": 4, "depth": 2, "hidden_size": 128, "num_heads": 2, "num_classes": 10}
INFERENCE = ["fp8", "int8"]
NETWORKS = {"uvit": (UViT, UViTConfig, 13), "dit": (DiT, DiTConfig, 8)}  # and the number of layers in 8 bit

pytestmark = pytest.mark.skipif(not rows8.runs_on(torch.device(DEVICE)), reason="needs Hopper, or the interpreter")


def network(name: str = "uvit", dtype: torch.dtype = torch.float32, **sizes) -> nn.Module:
    torch.manual_seed(0)
    cls, config, _ = NETWORKS[name]
    model = cls(config(**SIZES | sizes)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return model.to(DEVICE, dtype)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    x = torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    return x, torch.tensor([1.0, 400.5, 999.0], device=DEVICE), torch.tensor([0, 3, 10], device=DEVICE)


@torch.no_grad()
def call(model: nn.Module, autocast: bool = True) -> torch.Tensor:
    """The result under autocast to bf16, or in the dtype of the weights."""
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        return model(*inputs(next(model.parameters()).dtype)).float()


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got - exact).norm() / exact.norm()).item()


def calls_of(model: nn.Module, monkeypatch, **options) -> list[str]:
    """The 8-bit operators that a call runs, and `linear` and the halves of blocks in half precision."""
    called = []
    names = (
        "linear_rows",
        "layer_norm_rows",
        "concatenate_rows",
        "quantize_rows",
        "bounded_linear_gelu",
        "linear",
        "norm_attention",
        "norm_mlp",
    )
    with monkeypatch.context() as patch:
        for name in names:
            run = getattr(ops, name)
            patch.setattr(ops, name, lambda *args, run=run, name=name, **kw: called.append(name) or run(*args, **kw))
        call(model, **options)
    return called


@pytest.mark.parametrize("precision, limit", [("fp8", 0.1), ("int8", 0.03)])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_error_is_that_of_8_bit(name, precision, limit):
    plain, layers = network(name), NETWORKS[name][2]
    fast = copy.deepcopy(plain)
    report = dcae_fast.patch(fast, precision=precision)
    assert (report.in_int8, report.in_float8) == (precision == "int8", precision == "fp8")
    assert f"{precision}: {layers} of {layers} linear layers compute in 8 bit" in str(report)
    exact, in_bf16 = plain(*inputs()).detach(), error(call(plain), plain(*inputs()).detach())
    assert in_bf16 / 2 < error(call(fast), exact) < limit
    assert error(call(fast.to(torch.bfloat16), autocast=False), exact) < limit
    assert in_bf16 / 2 < error(call(fast.to(torch.float16), autocast=False), exact) < limit


@pytest.mark.parametrize("precision", INFERENCE)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_product_of_a_block_is_in_8_bit(name, precision, monkeypatch):
    fast, layers = network(name), NETWORKS[name][2]
    dcae_fast.patch(fast, precision=precision)
    called = calls_of(fast, monkeypatch)
    assert called.count("linear_rows") == layers
    assert called.count("linear") == (name == "dit")  # the last layer
    assert "norm_attention" not in called and "norm_mlp" not in called
    blocks = 3 if name == "uvit" else 2
    assert called.count("layer_norm_rows") == 2 * blocks and called.count("concatenate_rows") == blocks - 2
    assert called.count("quantize_rows") == 2 * blocks + layers  # attention, GELU, and each weight


def test_layers_that_are_kept(monkeypatch):
    exact, errors = network()(*inputs()).detach(), {}
    for keep in ((), ("fc2",), ("qkv", "fc1"), ("skip_linear", "proj"), ("mid_block.mlp.fc1",)):
        fast = network()
        report = dcae_fast.patch(fast, precision="fp8", keep=keep)
        marked = {n for n, layer in fast.named_modules() if operands.ROWS8 in vars(layer)}
        assert not any(n.endswith(keep) for n in marked) if keep else len(marked) == 13
        assert ("stay exact: asked for" in str(report)) == bool(keep)
        errors[keep] = error(call(fast), exact)
    assert max(errors.values()) <= 1.1 * errors[()] and errors[("fc2",)] < errors[()]


def test_where_it_computes_without_8_bit(monkeypatch):
    fast = network()
    dcae_fast.patch(fast, precision="fp8")
    in_8_bit = "linear_rows"
    assert in_8_bit not in calls_of(fast, monkeypatch, autocast=False)  # float32
    assert in_8_bit in calls_of(fast, monkeypatch)
    hook = fast.mid_block.mlp.fc1.register_forward_hook(lambda *args: None)
    assert calls_of(fast, monkeypatch).count(in_8_bit) == 9  # a block with a hook runs its own forward
    hook.remove()
    fast.train()
    assert in_8_bit in calls_of(fast, monkeypatch)


@pytest.mark.parametrize("precision", INFERENCE)
def test_other_devices(precision, monkeypatch):
    monkeypatch.setattr(rows8, "runs_on", lambda device: False)
    fast = network()
    report = dcae_fast.patch(fast, precision=precision)
    assert f"{precision} needs a Hopper GPU" in str(report) and not (report.in_float8 or report.in_int8)
    assert "linear_rows" not in calls_of(fast, monkeypatch)


def test_other_widths():
    report = dcae_fast.patch(network(hidden_size=72), precision="fp8")
    assert "0 of 13 linear layers" in str(report) and "their channels are no multiples of 16" in str(report)


@pytest.mark.parametrize("precision", INFERENCE)
def test_numbers_that_are_not_finite(precision):
    fast = network()
    dcae_fast.patch(fast, precision=precision)
    x, t, y = inputs()
    x[1, 0, 0, 0] = torch.inf
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        out = fast(x, t, y)
    assert out.isfinite().flatten(1).all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("precision", INFERENCE)
def test_copies_pickles_and_loading_keep_it(precision):
    fast = network()
    dcae_fast.patch(fast, precision=precision)
    expected, state = call(fast), fast.state_dict()
    assert not any("fast" in name for name in state)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(call(other), expected)
    fast.load_state_dict({name: 2 * value if "fc1" in name else value for name, value in state.items()})
    changed = call(fast)
    assert not torch.equal(changed, expected)
    fast.load_state_dict({name: value / 2 if "fc1" in name else value for name, value in fast.state_dict().items()})
    assert torch.equal(call(fast), expected)


@pytest.mark.parametrize("precision", INFERENCE)
def test_unpatching_and_patching_again(precision):
    fast, plain = network(), network()
    in_bf16 = copy.deepcopy(plain)
    dcae_fast.patch(in_bf16)
    dcae_fast.patch(fast, precision=precision)
    in_8_bit = call(fast)
    with dcae_fast.patched(fast):
        assert torch.equal(call(fast), call(in_bf16))
    assert torch.equal(call(fast), in_8_bit)
    dcae_fast.patch(fast)
    assert torch.equal(call(fast), call(in_bf16))
    with dcae_fast.patched(fast, precision=precision, keep=["fc2"]):
        assert not torch.equal(call(fast), call(in_bf16))
    assert torch.equal(call(fast), call(in_bf16))
    dcae_fast.patch(fast, precision=precision)
    dcae_fast.unpatch(fast)
    assert torch.equal(call(fast), call(plain))
    assert not any("fast" in key for module in fast.modules() for key in vars(module))


def test_frozen_weights_are_rounded_once(monkeypatch):
    fast = network()
    dcae_fast.patch(fast, precision="fp8", frozen=True)
    expected, exact = call(fast), network()(*inputs()).detach()
    rounded = copy.deepcopy(fast)
    dcae_fast.patch(rounded, precision="fp8")
    assert error(expected, exact) < 1.1 * error(call(rounded), exact)  # though the MLPs have scales from bounds
    called = calls_of(fast, monkeypatch)
    assert called.count("quantize_rows") == 3 == called.count("bounded_linear_gelu")  # of attention; no weight
    for changed in (fast.mid_block.mlp.fc2, fast.mid_block.mlp.fc1, fast.mid_block.norm2):
        expected = call(fast)
        with torch.no_grad():
            changed.weight.mul_(2)  # is noticed
        assert not torch.equal(call(fast), expected)


@pytest.mark.parametrize(
    "name, block, precision",
    [("uvit", "out_blocks.0", "fp8"), ("uvit", "out_blocks.0", "int8"), ("dit", "blocks.0", "fp8")],
)
def test_a_block_compiles_as_one_graph(name, block, precision):
    fast = network(name)
    dcae_fast.patch(fast, precision=precision)
    tokens = torch.randn(2, 18, 128, device=DEVICE)
    args = tokens, tokens.flip(0) if name == "uvit" else tokens[:, 0]
    compiled = torch.compile(fast.get_submodule(block), fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        assert error(compiled(*args), fast.get_submodule(block)(*args)) < 1e-2


def test_compiled_code_follows_patch():
    """What was compiled before is compiled again for another precision, and for other layers that stay exact."""
    fast = network("dit")
    block, compiled = fast.blocks[0], torch.compile(fast.blocks[0], backend="eager")
    tokens = torch.randn(2, 18, 128, device=DEVICE)
    for options in {}, {"precision": "fp8"}, {"precision": "int8"}, {"precision": "fp8", "keep": ["fc2"]}, {}:
        dcae_fast.patch(fast, **options)
        for with_gradients in (False,) if "int8" in options.values() else (False, True):
            with torch.set_grad_enabled(with_gradients), torch.autocast(DEVICE, torch.bfloat16):
                assert error(compiled(tokens, tokens[:, 0]), block(tokens, tokens[:, 0])) < 1e-3


def test_blocks_of_the_original(monkeypatch):
    original, ours = network(), network()
    for module in original.modules():
        cls = type(module)
        if cls.__module__ == "dcae_fast.models.uvit":
            module.__class__ = type(cls.__name__, (cls,), {"__module__": "dc_gen.c2icore.diffusioncore.models.uvit"})
    assert "13 of 13 linear layers" in str(dcae_fast.patch(original, precision="fp8"))
    dcae_fast.patch(ours, precision="fp8")
    assert torch.equal(call(original), call(ours))


def test_what_a_pipeline_and_other_models_say():
    coder = CoderConfig((8, 16), (1, 1), ("ResBlock",) * 2, ("rms",) * 2, ("silu",) * 2)
    autoencoder = DCAE(DCAEConfig(latent_channels=8, encoder=coder, decoder=coder))

    class Pipeline:
        components = {"transformer": network(), "vae": autoencoder, "scheduler": None}

    report = dcae_fast.patch(Pipeline(), precision="fp8")
    assert report.in_float8 and report.components["transformer"].in_float8
    assert not report.components["vae"].in_float8 and report.components["vae"].precision == ""
    with pytest.raises(ValueError, match="precision='fp8': the model has no block of UViT"):
        dcae_fast.patch(copy.deepcopy(autoencoder), precision="fp8")


def test_refusals():
    model = network()
    with pytest.raises(ValueError, match="expected one of \\('exact', 'int8', 'fp8'"):
        dcae_fast.patch(model, precision="fp4")
    with pytest.raises(ValueError, match="there is no layer fc3; expected full names, or some of \\['fc1', 'fc2'"):
        dcae_fast.patch(model, precision="fp8", keep=["fc2", "fc3"])
    assert not any("fast" in key for module in model.modules() for key in vars(module))
    with pytest.raises(ValueError, match="keep is for a precision of 8 bit, and precision is 'exact'"):
        dcae_fast.patch(model, keep=["fc2"])
    with pytest.raises(TypeError, match="keep='fc2'; expected names of layers"):
        dcae_fast.patch(model, precision="fp8", keep="fc2")
    with pytest.raises(ValueError, match="calibration and error_budget are for precision='int8'"):
        dcae_fast.patch(model, precision="fp8", calibration="photo.png")
