"""The classes of NVlabs/Sana. Stand-ins have their qualified names, attributes and results."""

import pytest
import torch
import torch.nn.functional as F
from small_models import DEVICE, operators_called
from torch import nn
from torch.utils.checkpoint import checkpoint

import dcae_fast
from dcae_fast.fast.module import is_fast

NETS = "diffusion.model.nets"
WIDTH, HEADS, HEIGHT, LENGTH, TEXT = 64, 2, 4, 6, 5


def modulated(x, shift, scale):
    return x * (1 + scale) + shift


def norm():
    return nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)


class LiteLA(nn.Module):
    def __init__(self, with_norms: bool):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = (nn.RMSNorm(WIDTH) if with_norms else nn.Identity() for _ in range(2))
        self.kernel_func, self.attn_drop, self.proj_drop = nn.ReLU(), nn.Dropout(0.5), nn.Dropout(0.5)  # unused dropout
        self.heads, self.dim, self.eps = HEADS, WIDTH // HEADS, 1e-8

    def forward(self, x, mask=None, HW=None, rotary_emb=None):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        heads = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2).float() for part in (self.q_norm(q), self.k_norm(k), v)
        )
        q, k, v = heads
        q, k = self.kernel_func(q), self.kernel_func(k)
        out = q @ (k.transpose(-1, -2) @ v) / (q @ k.sum(-2, keepdim=True).transpose(-1, -2) + self.eps)
        return self.proj(out.transpose(1, 2).flatten(2).to(x.dtype))


class MultiHeadCrossAttention(nn.Module):
    def __init__(self, with_norms: bool):
        super().__init__()
        self.q_linear, self.kv_linear = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.proj, self.attn_drop, self.proj_drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0), nn.Dropout(0.0)
        self.q_norm, self.k_norm = (nn.RMSNorm(WIDTH) if with_norms else nn.Identity() for _ in range(2))
        self.num_heads = HEADS

    def forward(self, x, cond, mask=None):
        if isinstance(mask, list):  # packed texts
            return torch.cat([self(*pair) for pair in zip(x[:, None], cond[0].split(mask), strict=True)])
        k, v = self.kv_linear(cond).reshape(len(x), -1, 2 * WIDTH).chunk(2, dim=-1)
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in (self.q_norm(self.q_linear(x)), self.k_norm(k), v)
        )
        hidden = None if mask is None else (mask != 0)[:, None, None]
        return self.proj_drop(self.proj(F.scaled_dot_product_attention(q, k, v, hidden).transpose(1, 2).flatten(2)))


class ConvLayer(nn.Module):
    def __init__(self, *args, act=None, **kwargs):
        super().__init__()
        self.dropout, self.conv, self.norm, self.act = None, nn.Conv2d(*args, **kwargs), None, act

    def forward(self, x):
        return self.conv(x) if self.act is None else self.act(self.conv(x))


class GLUMBConv(nn.Module):
    def __init__(self):
        super().__init__()
        hidden = 3 * WIDTH
        self.glu_act = nn.SiLU()
        self.inverted_conv = ConvLayer(WIDTH, hidden, 1, act=nn.SiLU())
        self.depth_conv = ConvLayer(hidden, hidden, 3, padding=1, groups=hidden)
        self.point_conv = ConvLayer(hidden // 2, WIDTH, 1, bias=False)

    def forward(self, x, HW):
        y = self.depth_conv(self.inverted_conv(x.transpose(1, 2).unflatten(2, HW)))
        value, gate = y.chunk(2, dim=1)
        return self.point_conv(value * self.glu_act(gate)).flatten(2).transpose(1, 2)


class SanaMSBlock(nn.Module):
    def __init__(self, with_norms: bool):
        super().__init__()
        self.norm1, self.norm2, self.attn = norm(), norm(), LiteLA(with_norms)
        self.cross_attn, self.mlp, self.drop_path = MultiHeadCrossAttention(with_norms), GLUMBConv(), nn.Identity()
        self.scale_shift_table = nn.Parameter(torch.randn(6, WIDTH))

    def forward(self, x, y, t, mask=None, HW=None, image_rotary_emb=None, **kwargs):
        rows = (self.scale_shift_table + t.unflatten(-1, (6, -1))).unsqueeze(2).unbind(1)
        x = x + self.drop_path(rows[2] * self.attn(modulated(self.norm1(x), *rows[:2]), HW=HW))
        x = x + self.cross_attn(x, y, mask)
        return x + self.drop_path(rows[5] * self.mlp(modulated(self.norm2(x), *rows[3:5]), HW=HW))


class T2IFinalLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_final, self.linear = norm(), nn.Linear(WIDTH, 4)
        self.scale_shift_table = nn.Parameter(torch.randn(2, WIDTH))

    def forward(self, x, t):
        return self.linear(
            modulated(self.norm_final(x), *(self.scale_shift_table[:, None] + t[:, None, None]).unbind(1))
        )


class SanaMS(nn.Module):
    """Two blocks and the last layer. Blocks may be checkpointed, as in the original."""

    def __init__(self, with_norms: bool):
        super().__init__()
        self.blocks = nn.ModuleList(SanaMSBlock(with_norms) for _ in range(2))
        self.final_layer, self.t_block = T2IFinalLayer(), nn.Linear(WIDTH, 6 * WIDTH)
        self.checkpoints = False

    def forward(self, x, text, time, mask):
        given = text, self.t_block(time), mask, (HEIGHT, LENGTH), None
        for block in self.blocks:
            if self.checkpoints:
                x = checkpoint(block, x, *given, use_reentrant=False)
            else:
                x = block(x, *given, use_reentrant=False)
        return self.final_layer(x, time)


for module, classes in {
    "basic_modules": (ConvLayer, GLUMBConv),
    "sana_blocks": (LiteLA, MultiHeadCrossAttention, T2IFinalLayer),
    "sana_multi_scale": (SanaMSBlock, SanaMS),
}.items():
    for cls in classes:
        cls.__module__ = f"{NETS}.{module}"


def build(with_norms: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return SanaMS(with_norms).to(DEVICE, dtype).eval()


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = (2, HEIGHT * LENGTH, WIDTH), (2, 1, TEXT, WIDTH), (2, WIDTH)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.int16, device=DEVICE)
    return *(torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes), mask


def results(network: nn.Module, given: tuple) -> dict[str, torch.Tensor]:
    x = given[0].clone().requires_grad_()
    out = network(x, *given[1:])
    weights = {"x": x} | dict(network.named_parameters())
    gradients = torch.autograd.grad(out.square().mean(), list(weights.values()))
    return {"result": out.detach()} | dict(zip(weights, gradients, strict=True))


def check(network: nn.Module, given: tuple, expected: dict[str, torch.Tensor]) -> None:
    got = results(network, given)
    total = torch.stack([value.norm() for name, value in expected.items() if name != "result"]).norm()
    for name, value in expected.items():  # the gradient of the keys' bias is zero up to rounding
        assert (got[name] - value).norm() <= 1e-5 * value.norm() + 1e-7 * total, name


@pytest.mark.parametrize("with_norms", [False, True])
def test_results_and_gradients(with_norms):
    network, given = build(with_norms), inputs()
    expected = results(network, given)
    report = dcae_fast.patch(network)
    assert report.replaced == {"SanaMSBlock": 2, "T2IFinalLayer": 1} and not report.skipped
    check(network, given, expected)
    network.checkpoints = True
    check(network, given, expected)
    called = operators_called(network, *given)
    assert called["layer_norm"] == 5 and called["relu_linear_attention"] == called["depthwise_glu"] == 2
    dcae_fast.unpatch(network)
    assert not operators_called(network, *given)


@pytest.mark.parametrize("mask", [None, [3, 5]])
def test_other_masks(mask):
    """Packed texts, as with xformers, take the cross-attention's own forward."""
    network, (x, text, time, _) = build(), inputs()
    if mask:
        text = torch.cat([each[0, :length] for each, length in zip(text, mask, strict=True)])[None]
    expected = results(network, (x, text, time, mask))
    dcae_fast.patch(network)
    check(network, (x, text, time, mask), expected)
    assert operators_called(network, x, text, time, mask)["layer_norm"] == 5


@torch.no_grad()
def test_half_precision_and_frozen_weights():
    given = inputs()
    exact = build()(*given)
    half, of_half = build(dtype=torch.bfloat16), inputs(torch.bfloat16)
    error = (half(*of_half) - exact).norm()
    dcae_fast.patch(half, frozen=True)
    for _ in range(2):
        assert (half(*of_half) - exact).norm() <= (2 if DEVICE == "cuda" else 4) * error


@pytest.mark.parametrize(
    "path, name, value, reason",
    [
        ("", "drop_path", nn.Dropout(0.1), "it drops paths"),
        ("", "norm1", nn.LayerNorm(WIDTH), "a norm is not a LayerNorm without weights"),
        ("", "attn", nn.Identity(), "attn is Identity"),
        ("mlp", "glu_act", nn.ReLU(), "mlp has other activations"),
        ("mlp.point_conv", "norm", nn.BatchNorm2d(WIDTH), "mlp has norms or dropout"),
        (
            "mlp.depth_conv",
            "conv",
            nn.Conv2d(192, 192, 5, padding=2, groups=192),
            "mlp has another depthwise convolution",
        ),
    ],
)
def test_reasons(path, name, value, reason):
    network = build()
    block = network.blocks[0]
    setattr(block.get_submodule(path), name, value)
    assert ("blocks.0", "SanaMSBlock", reason) in dcae_fast.patch(network).skipped
    assert not is_fast(block) and is_fast(network.blocks[1])


@pytest.mark.parametrize("path", ["attn", "attn.qkv", "cross_attn", "mlp.depth_conv", "mlp.inverted_conv.conv"])
def test_hooks_and_replaced_forwards_are_called(path):
    network, given, calls = build(), inputs(), []
    module = network.blocks[1].get_submodule(path)
    module.register_forward_hook(lambda *_: calls.append("hook"))
    expected = results(network, given)
    dcae_fast.patch(network)
    calls.clear()
    check(network, given, expected)
    assert calls == ["hook"]
