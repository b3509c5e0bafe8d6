"""The interfaces of PyTorch that are not public: each does what dcae_fast uses it for.

A newer PyTorch fails test_versions_tried until somebody has run all tests with it and extended TRIED.
"""

import ast
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dcae_fast.ops import _private

ROOT = Path(__file__).parents[2]


def test_versions_tried():
    installed = tuple(map(int, torch.__version__.split(".")[:2]))
    oldest, newest = (tuple(map(int, version.split("."))) for version in (_private.TRIED[0], _private.TRIED[-1]))
    assert oldest <= installed, f"torch {torch.__version__} is older than {_private.TRIED[0]}, the oldest supported"
    assert installed <= newest, (
        f"torch {torch.__version__} is newer than {_private.TRIED[-1]}, the newest that dcae_fast/ops/_private.py was "
        "tried with: run tests/ops/test_private.py and then all tests, also on a GPU; when they pass, extend TRIED in "
        "dcae_fast/ops/_private.py and raise the upper bound of torch in pyproject.toml"
    )


def test_no_private_interface_elsewhere():
    """Modules, functions and attributes of torch whose names begin with an underscore."""
    private = re.compile(
        r"torch(\.\w+)*\._[a-z]\w*|\._(dynamo_marked|forward_|backward_|compiled_|conv_forward|cdata|schema|current_level)"
    )
    for path in sorted((ROOT / "dcae_fast").rglob("*.py")):
        if path != Path(_private.__file__):
            code = ast.unparse(ast.parse(path.read_text()))  # without comments
            assert not (found := private.search(code)), f"{path} uses {found[0]}; it belongs into ops/_private.py"


def test_constant_in_compile():
    answers = []

    @_private.constant_in_compile
    def ask() -> bool:
        answers.append(torch.compiler.is_compiling())
        return sys.flags.verbose >= 0  # Dynamo would trace the append

    def function(x):
        return x + 1 if ask() else x

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    for _ in range(2):
        assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))
    assert len(answers) == 1


def test_operators_with_lists():
    assert _private.takes_list(torch.ops.dcae_fast.relu_linear_attention.default)
    assert not _private.takes_list(torch.ops.dcae_fast.linear.default)
    assert isinstance(torch.ops.dcae_fast.linear.default, _private.OpOverload)


def test_intercept_calls():
    """A compiled function calls the overload from Python, too."""
    library = torch.library.Library("dcae_fast_test", "FRAGMENT")
    library.define("double(Tensor x) -> Tensor")
    library.impl("double", lambda x: 2 * x, "CompositeExplicitAutograd")
    torch.library.register_fake("dcae_fast_test::double", torch.clone, lib=library)
    overload, seen = torch.ops.dcae_fast_test.double.default, []
    dispatch = _private.intercept_calls(overload, lambda x: seen.append(x) or dispatch(x))
    compiled = torch.compile(lambda x: overload(x), backend="aot_eager", fullgraph=True)
    for function in (overload, compiled):
        seen.clear()
        assert function(torch.ones(2)).tolist() == [2, 2]
        assert type(seen[-1]) is torch.Tensor


def test_make_known_to_inductor(monkeypatch):
    lowering = pytest.importorskip("torch._inductor.lowering")
    library = torch.library.Library("dcae_fast_test_private", "FRAGMENT")
    library.define("f(Tensor x) -> Tensor")
    overload = torch.ops.dcae_fast_test_private.f.default
    monkeypatch.setattr(_private, "_VERSION", (2, 12))
    monkeypatch.setattr(lowering, "lowerings", {**lowering.lowerings})
    made = []
    monkeypatch.setattr(lowering, "make_fallback", lambda *args: made.append(args))
    _private.make_known_to_inductor(overload)
    ((known, constraint),) = made
    assert known is overload and callable(constraint)
    lowering.lowerings[overload] = None
    _private.make_known_to_inductor(overload)
    assert len(made) == 1


def test_without_autocast_keys():
    a = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        with _private.without_dispatch_keys(_private.AUTOCAST_KEYS):
            assert (a @ a).dtype == torch.float32


def test_without_view_keys():
    """The result of a custom Function that returns a view can be changed in place."""

    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            with _private.without_dispatch_keys(_private.VIEW_KEYS):
                return x[:1]

        @staticmethod
        def backward(ctx, dy):
            return torch.cat([dy, torch.zeros_like(dy)])

    x = torch.ones(2, requires_grad=True)
    Half.apply(x * 1).mul_(3).sum().backward()
    assert x.grad.tolist() == [3, 0]


def test_modes():
    before = _private.count_dispatch_modes()
    with FlopCounterMode(display=False):
        assert _private.count_dispatch_modes() == before + 1
    assert _private.count_dispatch_modes() == before
    with torch.device("cpu"):
        assert [type(mode) for mode in _private.function_modes()] == [_private.DeviceContext]
    assert not _private.function_modes()


def test_has_zero_mark():
    assert _private.has_zero_mark(torch._efficientzerotensor(2)) and not _private.has_zero_mark(torch.zeros(2))


def test_in_transform():
    seen = []

    def function(x):
        seen.append(_private.in_transform())
        return x.sin().sum()

    x = torch.ones(2, requires_grad=True)
    function(x)
    torch.func.grad(function)(x.detach())
    torch.func.vmap(function)(x.detach())
    with torch.autograd.forward_ad.dual_level():
        function(x)
    y = x * torch.ones(1)
    y.register_hook(lambda dy: seen.append(_private.in_transform()))
    torch.autograd.grad(y, x, torch.ones(3, 2), is_grads_batched=True)
    assert seen == [False, True, True, True, True]
    assert not _private.in_transform()


def test_convolve():
    conv, x = nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="reflect"), torch.randn(1, 3, 6, 6)
    assert torch.equal(_private.convolve(conv, x, conv.weight, conv.bias), conv(x))


def test_wrappers():
    wrapped = checkpoint_wrapper(nn.Linear(1, 1)), torch.compile(nn.Linear(1, 1), backend="eager")
    for module, package in zip(wrapped, _private.WRAPPERS, strict=True):
        assert type(module).__module__.startswith(package)


HOOKS = [
    nn.Module.register_forward_hook,
    nn.Module.register_forward_pre_hook,
    nn.Module.register_full_backward_hook,
    nn.Module.register_full_backward_pre_hook,
]


@pytest.mark.parametrize("register", HOOKS)
def test_hooks(register):
    module = nn.Linear(1, 1)
    assert not _private.is_observed(module) and _private.unobserved(module, None)
    hook = register(module, lambda *args: None)
    assert _private.is_observed(module) and not _private.unobserved(module, None)
    assert list(map(len, _private.hooks_of(module))) == [int(each is register) for each in HOOKS]
    hook.remove()
    assert _private.unobserved(module)


def test_hooks_of_all_modules():
    assert not _private.has_global_hooks()
    hook = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert _private.has_global_hooks() and not _private.unobserved()
    finally:
        hook.remove()


def test_modules_with_another_forward():
    module = nn.Linear(1, 1)
    module.forward = lambda x: x
    assert _private.is_observed(module)
    module = nn.Linear(1, 1)
    module.compile(backend="eager")
    assert not _private.is_observed(module) and not _private.unobserved(module)


def test_dictionaries_of_modules():
    module = nn.BatchNorm2d(1)
    assert set(module._parameters) == {"weight", "bias"} and "running_mean" in module._buffers
    assert nn.Sequential(module)._modules == {"0": module}


def test_determinism():
    before = [setting() for setting in _private.SETTINGS]
    assert not _private.uses_deterministic_algorithms() and not _private.is_cudnn_deterministic()
    torch._C._set_deterministic_algorithms(True)  # the public function imports Inductor
    torch.backends.cudnn.deterministic = True
    try:
        assert _private.uses_deterministic_algorithms() and _private.is_cudnn_deterministic()
        assert [setting() for setting in _private.SETTINGS] != before
    finally:
        torch._C._set_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
    assert [setting() for setting in _private.SETTINGS] == before


CHANGED = [
    (torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    (torch.backends.cudnn.conv, "fp32_precision", "ieee"),
    (torch.backends.cudnn, "enabled", False),
    (torch.backends.cudnn, "benchmark", True),
    (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
    (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False),
]


@pytest.mark.parametrize("owner, name, value", CHANGED, ids=[name for _, name, _ in CHANGED])
def test_settings(owner, name, value):
    before, usual = [setting() for setting in _private.SETTINGS], getattr(owner, name)
    setattr(owner, name, value)
    try:
        assert [setting() for setting in _private.SETTINGS] != before
    finally:
        setattr(owner, name, usual)
    assert [setting() for setting in _private.SETTINGS] == before


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION])
def test_settings_of_attention(backend):
    before = [setting() for setting in _private.SETTINGS]
    with sdpa_kernel([backend]):
        assert [setting() for setting in _private.SETTINGS] != before
    assert [setting() for setting in _private.SETTINGS] == before


def test_attention_order():
    order = _private.attention_order()
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], set_priority=True):
        assert order != _private.attention_order()[:2] == [SDPBackend.MATH.value, SDPBackend.FLASH_ATTENTION.value]
    assert _private.attention_order() == order


def test_addmm_activation():
    a, b, bias = torch.randn(3, 4), torch.randn(4, 5), torch.randn(5)
    got = _private.addmm_activation(bias, a, b, use_gelu=True)
    want = nn.functional.gelu(bias + a @ b)
    torch.testing.assert_close(got, want, atol=2e-3, rtol=0)


def test_copy_each():
    targets = [torch.zeros(2), torch.zeros(3, dtype=torch.bfloat16)]
    _private.copy_each(targets, [torch.ones(2), torch.ones(3)])
    assert all(
        target.dtype == dtype and target.eq(1).all()
        for target, dtype in zip(targets, (torch.float32, torch.bfloat16), strict=True)
    )


def test_cast_operator():
    """What a TorchDispatchMode sees where autocast casts a weight."""
    seen = []

    class Mode(_private.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((func, set(kwargs or {})))
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16), Mode():
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert seen.count((_private.CAST_OPERATOR, {"dtype"})) == 2


def test_modules_see_fake_tensors_during_a_non_strict_export():
    class Module(torch.nn.Linear):
        def forward(self, x):
            types.update(map(type, (x, self.weight)))
            return super().forward(x)

    types = set()
    torch.export.export(Module(3, 2), (torch.ones(1, 3),), strict=False)
    assert types == {_private.FakeTensor}


def test_storage_id():
    with _private.FakeTensorMode():
        x = torch.empty(2, 3)
        assert _private.storage_id(x) == _private.storage_id(x[1:]) != _private.storage_id(torch.empty(2, 3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_functions_of_the_gpu():
    _private.sleep_on_gpu(1000)
    _private.clear_cublas_workspaces()
    _private.abandon_capture(torch.cuda.current_device(), torch.cuda.graph_pool_handle())  # an unknown pool: no error


def test_an_abandoned_capture_that_pytorch_has_ended(monkeypatch):
    def fail(*args):
        raise RuntimeError("no such pool")

    monkeypatch.setattr(_private.torch, "_C", SimpleNamespace(_cuda_endAllocateToPool=fail))
    _private.abandon_capture(0, (0, 1))
