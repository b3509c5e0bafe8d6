"""The halves of a block in one call of dcae_fast._C, as the operators call them, give the same bits as their parts."""

import pytest
import torch
from cuda_extension import CEILINGS, NEEDED, check_in_a_graph, random, relative_error

from dcae_fast import ops
from dcae_fast.ops._block_half import Half
from dcae_fast.ops.norm_attention import norm_attention_op
from dcae_fast.ops.norm_mlp import norm_mlp_op

pytestmark = NEEDED

HEADS, DIM, TOKENS = 4, 72, 66
WIDTH = HEADS * DIM


def make(half, form, dtype, tokens_dtype=torch.float32, weight_dtype=None, bias=True):
    """A call of the operator, without arguments, and its tensors."""
    torch.manual_seed(0)
    hidden = 3 * WIDTH if half == "attention" else 4 * WIDTH
    of = (WIDTH,) if form == "parameters" else (8, WIDTH)
    x, scale, shift = random(tokens_dtype, 8, TOKENS, WIDTH), *(random(dtype, *of) for _ in range(2))
    shapes = (hidden, WIDTH), (hidden,), (WIDTH, hidden // 3 if half == "attention" else hidden), (WIDTH,)
    weights = [0.05 * random(weight_dtype or dtype, *shape) for shape in shapes]
    if not bias:
        weights[1] = weights[3] = None
    stream = {"residual": form == "parameters"}
    if form == "branch":
        stream |= {"branch": random(dtype, 8, TOKENS, WIDTH), "gate": random(dtype, 8, WIDTH)}
    tensors = [t for t in (x, scale, shift, *weights, stream.get("branch"), stream.get("gate")) if t is not None]

    def call():
        if half == "attention":
            return ops.norm_attention(x, scale, shift, 1e-6, *weights, HEADS, dtype=dtype, **stream)
        return ops.norm_mlp(x, scale, shift, 1e-6, *weights, dtype=dtype, **stream)

    return call, tensors


@pytest.fixture
def in_parts(monkeypatch):
    """Calls a function while halves are made of their parts."""

    def run(call):
        with monkeypatch.context() as patch:
            for name in ("forward_keys", "backward_plans"):
                patch.setattr(Half, name, lambda *_: None)
            for op in (norm_attention_op, norm_mlp_op):
                patch.setattr(op.kernel, "_ready", {})  # fused calls are kept for later
            return call()

    return run


@pytest.fixture
def fused(monkeypatch):
    """Calls a function that must call these of dcae_fast._C, or must not if not `is_fused`.

    The parts must have been called before, so that all plans are there.
    """
    from dcae_fast import _C

    def run(call, *names, is_fused=True):
        called = []
        with monkeypatch.context() as patch:
            for name in names:
                half = getattr(_C, name)
                patch.setattr(_C, name, lambda *args, name=name, half=half: called.append(name) or half(*args))
            result = call()
        assert called == ([*names] if is_fused else [])
        return result

    return run


@pytest.mark.parametrize("half", ["attention", "mlp"])
@pytest.mark.parametrize("form", ["parameters", "of_image", "branch"])
@pytest.mark.parametrize("dtype", CEILINGS, ids=str)
@pytest.mark.parametrize("options", [{}, {"weight_dtype": torch.float32}, {"bias": False}], ids=str)
@pytest.mark.parametrize("stream", ["float32", "half"])
def test_the_same_bits(in_parts, fused, half, form, dtype, options, stream):
    call, tensors = make(half, form, dtype, torch.float32 if stream == "float32" else dtype, **options)
    expected = in_parts(call)
    assert all(map(torch.equal, fused(call, f"norm_{half}"), expected))
    for tensor in tensors:
        tensor.requires_grad_()

    def train():
        results = call()
        loss = sum(result.float().square().mean() for result in results)
        return [*results, *torch.autograd.grad(loss, tensors)]

    expected = in_parts(train)
    assert all(map(torch.equal, fused(train, f"norm_{half}", f"norm_{half}_backward"), expected))


@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_frozen_parameters(in_parts, half):
    """What is not wanted is not computed, in parts then; the rest has the same bits."""
    call, tensors = make(half, "parameters", torch.bfloat16, weight_dtype=torch.float32)
    for frozen in (3, 4, 5, 6):
        for place, tensor in enumerate(tensors):
            tensor.requires_grad_(place != frozen)
        wanted = [tensor for tensor in tensors if tensor.requires_grad]

        def train(wanted=wanted):
            return torch.autograd.grad(call()[1].square().mean(), wanted)

        expected = in_parts(train)
        assert all(map(torch.equal, train(), expected))


@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_unaligned_weights(in_parts, fused, half):
    """Views into a flat buffer, as some optimizers and loaders make them: PyTorch computes their products."""
    call, tensors = make(half, "parameters", torch.bfloat16)
    expected = in_parts(call)
    weights = tensors[3:]
    for unaligned in range(len(weights)):
        for place, tensor in enumerate(weights):
            flat = torch.empty(tensor.numel() + 8, dtype=tensor.dtype, device="cuda")
            offset = 1 if place == unaligned else 0
            tensor.set_(flat[offset : offset + tensor.numel()].view(tensor.shape).copy_(tensor))
            assert bool(tensor.data_ptr() % 16) == (place == unaligned)
        for got, want in zip(fused(call, f"norm_{half}", is_fused=False), expected, strict=True):
            assert relative_error(got, want.double()) <= CEILINGS[torch.bfloat16]


@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_runs_in_a_graph(in_parts, half):
    call, _ = make(half, "branch", torch.bfloat16)
    in_parts(call)
    check_in_a_graph(lambda: call()[1])
