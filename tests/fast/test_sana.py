"""diffusers' SANA transformer, patched and unpatched: results, gradients, dtypes, options, hooks, LoRA, graphs."""

import copy
import json

import pytest
import torch
from graph_tape import CAPTURED, REPLAYED, SEEN, counts
from peft import LoraConfig
from small_models import DEVICE
from torch import nn

import dcae_fast
from dcae_fast import ops
from dcae_fast.fast import operands
from dcae_fast.fast.module import is_fast

pytest.importorskip("diffusers")
from diffusers import SanaControlNetModel, SanaTransformer2DModel
from diffusers.models import attention_processor

SIZES = {"in_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "mlp_ratio": 1.5}
SIZES |= {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32}
SIZES |= {"caption_channels": 8, "sample_size": 4, "norm_eps": 1e-4}
SPRINT = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
CONFIGS = {
    "sana": {},
    "sprint": SPRINT,
    "other": {"norm_elementwise_affine": True, "attention_bias": True, "patch_size": 2, "interpolation_scale": 1},
    "layer-norm": {"qk_norm": "layer_norm_across_heads", "dropout": 0.3},
}
BLOCK = "SanaTransformerBlock"


def build(name: str, cls: type[nn.Module] = SanaTransformer2DModel, layers: int = 1) -> tuple[nn.Module, nn.Module]:
    """An unpatched network without zero parameters, and a patched copy."""
    torch.manual_seed(0)
    plain = cls(**SIZES | {"out_channels": 4, "num_layers": layers} | CONFIGS[name]).eval()
    for parameter in plain.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    plain.to(DEVICE)
    fast = copy.deepcopy(plain)
    report = dcae_fast.patch(fast)
    assert report.replaced[BLOCK] == len(plain.transformer_blocks) and not report.skipped
    return plain, fast


@pytest.fixture(params=CONFIGS)
def networks(request) -> tuple[nn.Module, nn.Module]:
    return build(request.param)


@pytest.fixture
def sana() -> tuple[nn.Module, nn.Module]:
    return build("sana")


def inputs(network: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    given = {
        "hidden_states": torch.randn(2, 4, 4, 6, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 8, generator=generator),
        "timestep": torch.tensor([3.0, 700.0]),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
    }
    if getattr(network.config, "guidance_embeds", False):
        given["guidance"] = torch.tensor([0.4, 0.45])
    halves = ("hidden_states", "encoder_hidden_states")
    return {name: value.to(DEVICE, dtype if name in halves else None) for name, value in given.items()}


def predict(network: nn.Module, **others) -> torch.Tensor:
    return network(**inputs(network, network.dtype), **others).sample


def results(network: nn.Module) -> dict[str, torch.Tensor]:
    """The prediction, and the gradient of each parameter that requires one, and of the latent."""
    given = inputs(network, network.dtype)
    x = given["hidden_states"].requires_grad_()
    torch.manual_seed(2)  # of dropout
    out = network(**given).sample
    weights = {name: weight for name, weight in network.named_parameters() if weight.requires_grad} | {"latent": x}
    gradients = torch.autograd.grad(out.float().square().mean(), list(weights.values()))
    return {"result": out.detach()} | dict(zip(weights, gradients, strict=True))


def assert_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Each tensor to 1e-5. Gradients that are zero up to rounding, such as that of the keys' bias, to 1e-8 of all."""
    assert got.keys() == want.keys()
    total = torch.stack([value.norm() for name, value in want.items() if name != "result"]).norm()
    for name, value in want.items():
        assert (got[name] - value).norm() <= 1e-5 * value.norm() + 1e-8 * total, name


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


def launches(network: nn.Module, monkeypatch) -> list[str]:
    """Names of the operators that one call of the network runs."""
    called = []
    with monkeypatch.context() as patch, torch.no_grad():
        for name in ("layer_norm", "linear", "relu_linear_attention", "depthwise_glu", "rms_norm"):
            run = getattr(ops, name)
            patch.setattr(
                ops, name, lambda *args, run=run, name=name, **kwargs: called.append(name) or run(*args, **kwargs)
            )
        predict(network)
    return called


def test_results_and_gradients(networks):
    plain, fast = networks
    assert_equal(results(fast), results(plain))


def test_training_mode():
    plain, fast = build("layer-norm")
    assert_equal(results(fast.train()), results(plain.train()))


def test_blocks_run_their_operators(monkeypatch):
    for name, norms in (("sana", 0), ("sprint", 4)):
        plain, fast = build(name)
        called = launches(fast, monkeypatch)
        assert called.count("layer_norm") == 3 and called.count("rms_norm") == norms
        assert called.count("relu_linear_attention") == called.count("depthwise_glu") == 1
        assert called.count("linear") == (8 if norms else 6)
        assert not launches(plain, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["sana", "sprint"])
@torch.no_grad()
def test_half_precision(name, dtype):
    """At most twice the unpatched network's error, with weights in half precision and under autocast; four times for
    Triton's interpreter, which truncates instead of rounding.
    """
    plain, fast = build(name)
    exact, slack = predict(plain), 2 if DEVICE == "cuda" else 4
    if dtype == torch.bfloat16 or DEVICE == "cuda":
        with torch.autocast(DEVICE, dtype):
            got, eager = predict(fast), predict(plain)
        assert got.dtype == eager.dtype and error(got, exact) <= slack * error(eager, exact)
    got, eager = predict(fast.to(dtype)), predict(plain.to(dtype))
    assert got.dtype == eager.dtype and error(got, exact) <= slack * error(eager, exact)


@torch.no_grad()
def test_values_beyond_float16_are_clipped():
    blocks = [network.half().transformer_blocks[0] for network in build("sana")]
    x, text, time = (torch.ones(shape, dtype=torch.half, device=DEVICE) for shape in [(1, 6, 32), (1, 5, 32), (1, 192)])
    for block in blocks:
        block.attn1.to_out[0].weight.mul_(2.0**16)
        block.scale_shift_table[2] = -1 + 2.0**-10  # a small gate
    want, got = (block(x, None, text, None, time, 2, 3) for block in blocks)
    assert blocks[0].attn1(x).abs().max() == 65504
    assert got.isfinite().all() and error(got, want) <= 1e-2


def test_without_a_mask_and_with_keywords(tape, sana):
    plain, fast = sana
    given = list(inputs(plain).values())[:3]
    dcae_fast.patch(fast, cuda_graphs=True)
    with torch.no_grad():
        want = plain(*given).sample
        assert error(fast(*given, None, None, None, None, None, False)[0], want) <= 1e-5
        assert error(fast(*given[:2], return_dict=False, timestep=given[2])[0], want) <= 1e-5


@pytest.mark.parametrize("wrong", [{}, {"timestep": None, "depth": 3}, {"hidden_states": 0}], ids=str)
def test_wrong_arguments_raise_the_same_error(sana, wrong):
    given, errors = list(inputs(sana[0]).values())[:2], []
    dcae_fast.patch(sana[1], cuda_graphs=True)
    for network in sana:
        with pytest.raises(TypeError) as refusal:
            network(*given, **wrong)
        errors.append(str(refusal.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "inference"])
def test_compiles_whole(gradients):
    _, fast = build("sana" if gradients else "sprint")
    compiled = copy.deepcopy(fast)
    dcae_fast.patch(compiled, cuda_graphs=True)
    torch._dynamo.reset()
    compiled.compile(fullgraph=True, backend="aot_eager")
    if gradients:
        assert_equal(results(compiled), results(fast))
    else:
        with torch.no_grad():
            torch.testing.assert_close(predict(compiled), predict(fast))


@torch.no_grad()
def test_hooks_see_what_they_would(sana):
    plain, fast = sana
    for path in ("attn1", "attn1.to_k", "attn2.to_out.0", "norm2", "ff.conv_depth", "ff"):
        seen = {}
        for name, network in (("plain", plain), ("fast", fast)):
            part = network.transformer_blocks[0].get_submodule(path)
            handle = part.register_forward_hook(lambda _, args, out, name=name, seen=seen: seen.setdefault(name, out))
            predict(network)
            handle.remove()
        torch.testing.assert_close(seen["fast"], seen["plain"])


def test_gradient_checkpointing(sana, monkeypatch):
    plain, fast = sana
    want = results(plain)
    fast.enable_gradient_checkpointing()
    assert_equal(results(fast), want)


def test_lora(sana, monkeypatch):
    """Layers of LoRA are called; the rest stays fast. The scale arrives also if all arguments are passed by name."""
    targets = ["to_q", "to_v", "to_out.0", "conv_inverted", "conv_point", "linear_1"]
    dcae_fast.patch(sana[1], cuda_graphs=True)
    for network in sana:
        torch.manual_seed(1)
        network.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    plain, fast = sana
    assert launches(fast, monkeypatch).count("relu_linear_attention") == 1
    assert_equal(results(fast), results(plain))
    with torch.no_grad():
        scaled = {"guidance": None, "attention_mask": None, "attention_kwargs": {"scale": 0.5}}
        want = predict(plain, **scaled)
        assert error(predict(fast, **scaled), want) <= 1e-5 < error(predict(plain), want)


def test_other_processors(sana, monkeypatch):
    """A processor that is set after `patch` is used. `patch` names the processors that it does not know."""
    plain, fast = sana
    for network in sana:
        network.transformer_blocks[0].attn1.set_processor(attention_processor.PAGIdentitySanaLinearAttnProcessor2_0())
    assert "relu_linear_attention" not in launches(fast, monkeypatch)
    with torch.no_grad():
        torch.testing.assert_close(predict(fast), predict(plain))
    reason = "attn1 has the processor PAGIdentitySanaLinearAttnProcessor2_0"
    assert dcae_fast.patch(fast).skipped == [("transformer_blocks.0", BLOCK, reason)]


def test_reasons():
    changes = {
        "attn2 scales its result": lambda block: setattr(block.attn2, "rescale_output_factor", 2.0),
        "a norm is not a LayerNorm": lambda block: setattr(block, "norm2", nn.Identity()),
        "norm1 has weights": lambda block: setattr(block, "norm1", nn.LayerNorm(32)),
        "attn1 is Identity": lambda block: setattr(block, "attn1", nn.Identity()),
    }
    for reason, change in changes.items():
        network = SanaTransformer2DModel(**SIZES, num_layers=1)
        change(network.transformer_blocks[0])
        assert dcae_fast.patch(network).skipped == [("transformer_blocks.0", BLOCK, reason)]
    network = SanaTransformer2DModel(**SIZES, num_layers=1)
    assert dcae_fast.patch(network, disable="gated_sum").skipped == [
        ("transformer_blocks.0", BLOCK, "gated_sum disabled")
    ]
    network.norm_out.norm = nn.LayerNorm(32)
    assert "without weights" in dcae_fast.patch(network).skipped[-1][2]


@torch.no_grad()
def test_control_networks():
    plain, fast = build("sana", layers=2)
    pair, samples = build("sana", SanaControlNetModel), []
    for network in pair:
        condition = torch.ones(2, 4, 4, 6, device=DEVICE)
        samples.append(network(**inputs(network), controlnet_cond=condition, return_dict=False)[0])
    for got, want in zip(*samples, strict=True):
        torch.testing.assert_close(got, want)
    got, want = (predict(network, controlnet_block_samples=samples[0]) for network in (fast, plain))
    assert error(got, want) <= 1e-5


@torch.no_grad()
def test_graphs(tape, sana):
    """Calls as the pipelines make them are captured; calls with a scale for LoRA are not."""
    _, fast = sana
    want, given = predict(fast), inputs(fast)
    dcae_fast.patch(fast, cuda_graphs=True)
    assert [counts(fast, **given, return_dict=False) for _ in range(3)] == [SEEN, CAPTURED, REPLAYED]
    assert torch.equal(fast(**given, return_dict=False, attention_kwargs=None)[0], want) and tape.replays == 3
    assert counts(fast, **given, return_dict=False, attention_kwargs={"scale": 1.0}) == SEEN


@pytest.mark.gpu
@torch.no_grad()
def test_replayed_results(sana):
    _, fast = sana
    want, given = predict(fast), inputs(fast)
    dcae_fast.patch(fast, cuda_graphs=True)
    for _ in range(3):
        result = fast(**given)
        assert type(result).__name__ == "Transformer2DModelOutput" and torch.equal(result.sample, want)
        assert torch.equal(fast(**given, return_dict=False)[0], want)
    assert len(fast.fast_options.graphs) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("qk_norm", [None, "rms_norm_across_heads"])
def test_a_block_of_full_size(qk_norm):
    """In bf16: result and gradients have at most twice eager's error against fp32."""
    torch.manual_seed(0)
    exact = SanaTransformer2DModel(num_layers=1, qk_norm=qk_norm).cuda()
    given = {
        "hidden_states": torch.randn(2, 32, 32, 32, device="cuda"),
        "encoder_hidden_states": torch.randn(2, 300, 2304, device="cuda"),
        "timestep": torch.tensor([3.0, 700.0], device="cuda"),
        "encoder_attention_mask": (
            torch.arange(300, device="cuda") < torch.tensor([[40], [270]], device="cuda")
        ).long(),
    }

    def step(network: nn.Module) -> list[torch.Tensor]:
        halves = {name: value.to(network.dtype) if value.dim() > 2 else value for name, value in given.items()}
        out = network(**halves).sample
        gradients = torch.autograd.grad(out.float().square().mean(), list(network.parameters()))
        return [out, torch.cat([gradient.float().flatten() for gradient in gradients])]

    plain, fast = copy.deepcopy(exact).bfloat16(), copy.deepcopy(exact).bfloat16()
    dcae_fast.patch(fast)
    for got, eager, want in zip(step(fast), step(plain), step(exact), strict=True):
        assert error(got, want) <= 2 * error(eager, want)


@torch.no_grad()
def test_frozen_networks_keep_joined_projections(sana):
    plain, fast = sana
    dcae_fast.patch(fast, frozen=True)
    for _ in range(2):
        assert error(predict(fast), predict(plain)) <= 1e-5
    assert operands.kept_by(fast.modules())
    for network in sana:
        network.transformer_blocks[0].attn1.to_k.weight.mul_(1.5)
    assert error(predict(fast), predict(plain)) <= 1e-5
    dcae_fast.unpatch(fast)
    assert not any(map(is_fast, fast.modules())) and torch.equal(predict(fast), predict(plain))


def test_configurations_name_the_class_of_diffusers(sana, tmp_path):
    """Without graphs the network itself keeps its class, since diffusers compares classes of components."""
    plain, fast = sana
    dcae_fast.patch(fast, cuda_graphs=False)
    assert type(fast) is SanaTransformer2DModel
    assert dcae_fast.patch(fast, cuda_graphs=True).replaced["SanaTransformer2DModel"] == 1 and is_fast(fast)
    fast.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "SanaTransformer2DModel"
    assert_equal(results(SanaTransformer2DModel.from_pretrained(tmp_path).to(DEVICE)), results(plain))
    dcae_fast.patch(fast, cuda_graphs=False)
    assert type(fast) is SanaTransformer2DModel and "fast_options" not in vars(fast)
