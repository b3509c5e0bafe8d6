"""8-bit models in bounded memory, as CUDA graphs, compiled, and in DDP."""

import os

import pytest
import torch
import torch.distributed as dist
from graph_tape import CAPTURED, REPLAYED, SEEN, counts
from small_models import DEVICE, build, build_block, image
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dcae_fast
from dcae_fast.fast import int8
from dcae_fast.models.blocks import OpSequential

EVERYTHING = dcae_fast.ErrorBudget(decoding=0, encoding=0, loss=float("inf"))
START = "spawn" if DEVICE == "cuda" else "fork"  # CUDA does not work after a fork


def int8_model(**options) -> nn.Module:
    model = build("strided")
    dcae_fast.patch(
        model, precision="int8", calibration=image(1, 3, 8, 8).cpu().clamp(-1, 1), error_budget=EVERYTHING, **options
    )
    return model


@torch.no_grad()
def test_bands_have_the_same_result(int8_calls, compare):
    z = image(1, 8, 32, 4)
    expected = int8_model().decoder(z)
    banded = int8_model(max_memory=1).decoder
    assert banded.plan(z) is not None
    int8_calls.clear()
    compare("whole", banded(z), expected, 1e-5)
    assert int8_calls["conv2d_int8"] > 20


@torch.no_grad()
def test_graphs(int8_calls, tape):
    model, x = int8_model(cuda_graphs=True), image(1, 3, 8, 8)
    assert tape.captures == 0, "the calibration captures nothing"
    expected = model.encoder(x)
    assert counts(model.encoder, x) == CAPTURED
    assert counts(model.encoder, x) == REPLAYED
    assert torch.equal(model.encoder(x), expected)
    plain = build("strided")
    model.load_state_dict(plain.state_dict())
    assert counts(model.encoder, x) == SEEN, "the model is exact again"
    torch.testing.assert_close(model.encoder(x), plain.encoder(x), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_compiles_whole():
    if not int8.runs_on(torch.device(DEVICE)):
        pytest.skip("8-bit convolutions need a Hopper GPU")
    (first, x), (second, _) = build_block("ResBlock"), build_block("ResBlock-batch")
    stage = OpSequential([first, second]).eval()
    dcae_fast.patch(stage, frozen=True)
    exact = stage(x)
    for layer in (each.conv for block in (first, second) for each in (block.main.conv1, block.main.conv2)):
        int8.mark(layer, [0.05] * layer.in_channels)
    expected = stage(x)
    assert not torch.equal(expected, exact)
    stage.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(stage(x), expected, atol=1e-5, rtol=1e-5)


def infer(rank: int, folder: str, model: nn.Module, x: torch.Tensor) -> None:
    """Runs in a separate process: destroying the group of DDP may wait forever."""
    torch.backends.cudnn.allow_tf32 = False  # as conftest.py sets it in the process of the tests
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=1)
    with torch.no_grad():
        torch.save(DistributedDataParallel(model)(x).cpu(), f"{folder}/result.pt")
    os._exit(0)


@pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not built")
def test_inference_with_ddp(int8_calls, tmp_path):
    model, x = int8_model(), image(1, 3, 8, 8)
    with torch.no_grad():
        expected = model(x).cpu()
    torch.multiprocessing.start_processes(infer, (str(tmp_path), model, x), 1, start_method=START)
    assert torch.equal(torch.load(tmp_path / "result.pt"), expected)
