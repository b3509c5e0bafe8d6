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
WIDTH, HEADS, HEIGHT, LENGTH, TEXT, TEXT_WIDTH = 64, 2, 4, 6, 5, 32


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


class MultiHeadCrossVallinaAttention(MultiHeadCrossAttention):
    pass


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
        cross_attention = MultiHeadCrossVallinaAttention if with_norms else MultiHeadCrossAttention
        self.norm1, self.norm2, self.attn = norm(), norm(), LiteLA(with_norms)
        self.cross_attn, self.mlp, self.drop_path = cross_attention(with_norms), GLUMBConv(), nn.Identity()
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
        if t.dim() == 3:  # [B, frames, C], for videos
            frames, times = self.norm_final(x).unflatten(1, (t.shape[1], -1)), t[:, :, None]
            y = modulated(frames, *(times + row for row in self.scale_shift_table))
            return self.linear(y.flatten(1, 2))
        return self.linear(
            modulated(self.norm_final(x), *(self.scale_shift_table[:, None] + t[:, None, None]).unbind(1))
        )


class SanaMS(nn.Module):
    """Two blocks and the last layer, for a picture of 4 channels. Blocks may be checkpointed, as in the original."""

    def __init__(self, with_norms: bool, embeds_scale: bool = False):
        super().__init__()
        self.x_embedder, self.y_embedder = nn.Conv2d(4, WIDTH, 1), nn.Linear(TEXT_WIDTH, WIDTH)
        self.t_embedder, self.cfg_embedder = nn.Linear(1, WIDTH), nn.Linear(1, WIDTH) if embeds_scale else None
        self.blocks = nn.ModuleList(SanaMSBlock(with_norms) for _ in range(2))
        self.final_layer, self.t_block = T2IFinalLayer(), nn.Linear(WIDTH, 6 * WIDTH)
        self.h = self.w = 0
        self.use_pe = self.checkpoints = False

    def forward(self, x, timestep, y, mask=None, data_info=None, return_logvar=False, **kwargs):
        self.h, self.w = x.shape[2:]
        x, time = self.x_embedder(x).flatten(2).transpose(1, 2), self.t_embedder(timestep[:, None])
        if self.cfg_embedder is not None:
            time = time + self.cfg_embedder(data_info["cfg_scale"][:, None])
        given = self.y_embedder(y), self.t_block(time), mask, (self.h, self.w), None
        for block in self.blocks:
            if self.checkpoints:
                x = checkpoint(block, x, *given, use_reentrant=False)
            else:
                x = block(x, *given, use_reentrant=False)
        out = self.final_layer(x, time).transpose(1, 2).unflatten(2, (self.h, self.w))
        return (out, "variance") if return_logvar else out

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)


class SanaMSCM(SanaMS):
    def forward(self, x, timestep, y, data_info=None, return_logvar=False, **kwargs):
        return super().forward(x, timestep.sin(), y, data_info=data_info, return_logvar=return_logvar, **kwargs)


for module, classes in {
    "basic_modules": (ConvLayer, GLUMBConv),
    "sana_blocks": (LiteLA, MultiHeadCrossAttention, MultiHeadCrossVallinaAttention, T2IFinalLayer),
    "sana_multi_scale": (SanaMSBlock, SanaMS, SanaMSCM),
}.items():
    for cls in classes:
        cls.__module__ = f"{NETS}.{module}"


def build(with_norms: bool = False, dtype: torch.dtype = torch.float32, network=SanaMS, **options) -> nn.Module:
    torch.manual_seed(0)
    return network(with_norms, **options).to(DEVICE, dtype).eval()


def inputs(dtype: torch.dtype = torch.float32, seed: int = 1, size: tuple[int, int] = (HEIGHT, LENGTH)) -> tuple:
    """A picture, times, texts and their mask."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, 4, *size), (2,), (2, 1, TEXT, TEXT_WIDTH)
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
    assert report.replaced == {"SanaMS": 1, "SanaMSBlock": 2, "T2IFinalLayer": 1} and not report.skipped
    check(network, given, expected)
    network.checkpoints = True
    check(network, given, expected)
    called = operators_called(network, *given)
    assert called["layer_norm"] == 5 and called["relu_linear_attention"] == called["depthwise_glu"] == 2
    dcae_fast.unpatch(network)
    assert not operators_called(network, *given)


@torch.no_grad()
def test_a_time_for_each_frame():
    """The last layer is also the last one of videos."""
    layer, x, time = T2IFinalLayer().to(DEVICE), torch.randn(2, 6, WIDTH), torch.randn(2, 2, WIDTH)
    expected = layer(x.to(DEVICE), time.to(DEVICE))
    assert dcae_fast.patch(layer).replaced == {"T2IFinalLayer": 1}
    assert torch.equal(layer(x.to(DEVICE), time.to(DEVICE)), expected)


@pytest.mark.parametrize("mask", [None, [3, 5]])
def test_other_masks(mask):
    """Packed texts, as with xformers, take the cross-attention's own forward."""
    network, (x, time, text, _) = build(), inputs()
    if mask:
        text = torch.cat([each[0, :length] for each, length in zip(text, mask, strict=True)])[None]
    expected = results(network, (x, time, text, mask))
    dcae_fast.patch(network)
    check(network, (x, time, text, mask), expected)
    assert operators_called(network, x, time, text, mask)["layer_norm"] == 5


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
        ("", "mlp", None, "mlp is NoneType"),
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
