"""dcae_fast._C.signature: two calls share a signature only if the same kernel computes both."""

import itertools

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

_C = pytest.importorskip("dcae_fast._C")
DEVICE, NHWC = "cuda" if torch.cuda.is_available() else "cpu", torch.channels_last


def tensor(*shape, dtype=torch.bfloat16):
    x = torch.zeros(shape, dtype=dtype, device=DEVICE)
    return x.contiguous(memory_format=NHWC) if len(shape) == 4 else x


def misaligned(size):
    return tensor(size + 1)[1:]


def signature(*args):
    return _C.signature(args)


X = tensor(2, 8, 4, 6)
DIFFERENT = [
    *((X,), (tensor(2, 4, 8, 6),), (tensor(16, 24),), (tensor(384),), (X, X), ([X],), ([X, X],), ([X], X)),
    *((X.half(),), (X.float(),), (tensor(8),), (misaligned(8),)),
    *((X, None), (X, 0), (X, 1), (X, True), (X, False), (X, 0.0), (X, 1.0), (X, 2**40), (X, -1)),
    *((X, ""), (X, "silu"), (X, "relu"), (X, "si", "lu"), (X, torch.float32), (X, torch.float16)),
    *((X, [1, 1]), (X, [1], 1), (X, 1, [1]), (X, [1, 2])),
]


def test_different_calls():
    found = [signature(*args) for args in DIFFERENT]
    assert None not in found
    for a, b in itertools.combinations(range(len(found)), 2):
        assert found[a] != found[b], (DIFFERENT[a], DIFFERENT[b])


def test_equal_calls():
    weight = torch.nn.Parameter(tensor(8), requires_grad=False)
    expected = signature(X, weight, 1e-5, "silu", [1, 1])
    assert signature(torch.ones_like(X), tensor(8), 1e-5, "silu", (1, 1)) == expected


@pytest.mark.parametrize(
    "context",
    [
        torch.inference_mode,
        lambda: torch.autocast(DEVICE, torch.bfloat16),
        lambda: torch.device("meta"),
        torch.autograd.detect_anomaly,
        torch.autograd.graph.save_on_cpu,
        torch.profiler.profile,
    ],
    ids=["inference", "autocast", "device", "anomaly", "save_on_cpu", "profile"],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_what_does_not_change_a_signature(context):
    expected = signature(X)
    with context():
        assert signature(X) == expected
        assert signature(X.clone()) == expected


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "args",
    [
        (),
        (1,),
        (X, object()),
        (X, 2**70),
        (X.contiguous(),),
        (tensor(4, 6).t(),),
        (X.to("meta"),),
        (X.as_subclass(Subclass),),
        (torch._neg_view(X),),
        (torch._efficientzerotensor(8, device=DEVICE),),
        (torch._to_functional_tensor(X),),
        (torch.nested.nested_tensor([tensor(2, 3), tensor(4, 3)]),),
        ([X] * 100,),
        *([(X, torch.zeros(8))] if DEVICE == "cuda" else []),
    ],
    ids=range(14 if DEVICE == "cuda" else 13),
)
def test_what_a_kernel_cannot_take(args):
    assert signature(*args) is None


def test_long_calls():
    """Calls of almost as many bytes as a signature holds differ, too."""
    texts = ["a" * length for length in range(900, 1024)]
    pairs = [(signature(X, text, [None]), signature(X, text, [], None)) for text in texts]
    assert pairs[0][0] is not None and pairs[-1] == (None, None)
    assert all(one is None or one != other for one, other in pairs)


def test_gradients():
    weight = torch.nn.Parameter(tensor(8))
    assert signature(X, weight) is None
    with torch.no_grad():
        assert signature(X, weight) is not None


def test_settings():
    expected = signature(X)
    with torch.backends.cudnn.flags(enabled=False):
        assert signature(X) not in (None, expected)
    with torch.backends.cudnn.flags(deterministic=True):
        assert signature(X) not in (None, expected)
    torch.use_deterministic_algorithms(True)
    try:
        assert signature(X) not in (None, expected)
    finally:
        torch.use_deterministic_algorithms(False)
    assert signature(X) == expected


def test_modes_and_transforms():
    seen = []

    def see(x):
        seen.append(signature(X))
        return x

    with FlopCounterMode(display=False):
        see(X)
    torch.func.vmap(see)(X)
    torch.func.grad(lambda x: see(x).sum())(X.float())
    torch.func.functionalize(see)(X)
    torch.jit.trace(see, (X,), check_trace=False)
    make_fx(see, pre_dispatch=True)(X)
    assert len(seen) >= 6 and set(seen) == {None}
    assert signature(X) is not None
