"""A rehearsal of the benchmark of training an autoencoder on small shapes, and the evaluation of its results."""

import json
import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import __main__ as main
from benchmarks import autoencoder, autoencoder_loss_curve, profile, tables, targets
from benchmarks import autoencoder_training as benchmark
from benchmarks.autoencoder_workloads import (
    LOSS_WORKLOADS,
    RECIPES,
    TRAINING_REHEARSAL,
    TRAINING_WORKLOADS,
    LossWorkload,
    TrainingWorkload,
)
from benchmarks.ceilings import Ceilings
from benchmarks.workloads import Workload
from dcae_fast.models.autoencoder import DCAE, CoderConfig, DCAEConfig
from dcae_fast.models.zoo import autoencoder_config

CPU = torch.device("cpu")
CEILINGS = Ceilings(tflops=1.0, copy=1.0)
UNPATCHED = ("eager", "eager channels-last")  # for most tests: the operators are slow in the interpreter
FULL, ADAPTATION, DECODER = (TrainingWorkload("small", recipe, 2, 8, UNPATCHED) for recipe in RECIPES)


@pytest.fixture(scope="module", autouse=True)
def small_model():
    encoder = CoderConfig((16, 32), (1, 1), ("ResBlock", "EViTGLU"), ("rms", "rms"), ("silu", "silu"))
    decoder = replace(encoder, norm=("batch", "rms"))
    config = DCAEConfig(latent_channels=16, encoder=encoder, decoder=decoder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DCAE, "from_name", classmethod(lambda cls, name: cls(config)))
        patch.setattr(benchmark, "WARM_UP", 1)
        patch.setattr(benchmark, "STEPS", 2)
        yield


def measured(workload: TrainingWorkload) -> dict:
    *_, record = benchmark.records(workload, CPU, CEILINGS)
    return json.loads(json.dumps(record))


@pytest.fixture(scope="module")
def records(small_model) -> list[dict]:
    full = replace(FULL, contenders=("eager", "patched + CUDA graphs"))
    return [measured(workload) for workload in (full, ADAPTATION, DECODER)]


def test_every_contender_is_checked_and_timed(records):
    for workload, record in zip((FULL, ADAPTATION, DECODER), records, strict=True):
        assert record["workload"] == workload.name and len(record["contenders"]) == 2 and record["drift"] > 0
        for row in record["contenders"].values():
            assert "failure" not in row and 0 < row["error"] < 0.2 and 0 < row["loss_error"] < 1e-2
            assert 0 < row["ms_low"] <= row["ms"] <= row["ms_high"] and row["first_s"] > 0
            assert row["images_per_s"] == pytest.approx(2e3 / row["ms"])
            assert row["mfu"] == pytest.approx(record["floor_ms"] / row["ms"])


@pytest.fixture
def rival(monkeypatch):
    """rival(prepare) returns the row of a contender that `prepare` makes from the model."""

    def row(prepare) -> dict:
        monkeypatch.setattr(benchmark.dcae_fast, "patch", prepare)
        record = measured(replace(FULL, contenders=("eager", "patched channels-last")))
        return record["contenders"]["patched channels-last"]

    return row


@pytest.mark.parametrize("factor", [1.2, float("nan")])
def test_wrong_gradients_are_not_timed(rival, factor):
    def scale(model):
        for parameter in model.parameters():
            parameter.register_hook(lambda gradient: factor * gradient)

    row = rival(scale)
    assert row["failure"] == "wrong" and "ms" not in row


def test_a_parameter_without_gradient_is_wrong(rival):
    row = rival(lambda model: model.encoder.project_out.register_forward_hook(lambda m, args, out: out.detach()))
    assert row["failure"] == "wrong"


def test_out_of_memory_does_not_stop_the_others(rival):
    def fail(model):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    assert rival(fail) == {"failure": "out of memory"}


def process_id(row: dict) -> dict:
    return row | {"process": os.getpid()}


def test_the_end_of_a_process_does_not_stop_the_others(monkeypatch):
    """On a GPU an illegal access to memory, for example, makes a process useless."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with benchmark.Isolated() as isolated:
        first, again = isolated(process_id, {"ms": 1.0}), isolated(process_id, {"ms": 1.0})
        assert first["process"] == again["process"] != os.getpid(), "contenders share a process"
        assert isolated(os._exit, 1)["failure"].startswith("BrokenProcessPool")
        assert isolated(process_id, {"failure": "wrong"})["process"] != first["process"]
        last = isolated(process_id, {"ms": 1.0})
    assert last["ms"] == 1.0 and last["process"] not in (first["process"], os.getpid())


def test_contenders_take_the_same_step():
    """The weights after a step are those of AdamW on the loss, for the contender that is captured on a GPU too."""
    weights = []
    for name in ("eager", "patched + CUDA graphs"):
        in_training = benchmark.prepared(name, FULL, CPU)
        step = benchmark.stepper(name, in_training, benchmark.images_of(FULL, CPU))
        before = [parameter.clone() for parameter in in_training.model.network.parameters()]
        step()
        after = list(in_training.model.network.parameters())
        assert all(parameter.grad is None for parameter in after)
        assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        weights.append(torch.cat([parameter.detach().flatten() for parameter in after]))
    torch.testing.assert_close(*weights, rtol=0, atol=3 * benchmark.LR)


def test_an_adversarial_step():
    """Both networks take a step, and the work of LPIPS and the discriminator counts."""
    workload = replace(FULL, size=32, adversarial=True)
    record = measured(workload)
    assert record["flops"] > 2 * sum(benchmark.flops_of(replace(workload, adversarial=False)).values())
    assert all("failure" not in row and row["ms"] > 0 for row in record["contenders"].values())
    in_training = benchmark.prepared("eager", workload, CPU)
    networks = in_training.model.network, in_training.critic.network
    before = [[parameter.clone() for parameter in network.parameters()] for network in networks]
    benchmark.stepper("eager", in_training, benchmark.images_of(workload, CPU))()
    for network, weights in zip(networks, before, strict=True):
        assert not all(torch.equal(a, b) for a, b in zip(network.parameters(), weights, strict=True))


@pytest.mark.parametrize("workload", [ADAPTATION, DECODER], ids=lambda workload: workload.recipe)
def test_frozen_modules(workload):
    """The gradients of trained parameters are those of the whole model; batch norms of frozen modules do not change."""
    model, images = benchmark.fresh(workload, CPU), benchmark.images_of(workload, CPU)
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    F.l1_loss(model(images), images).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert 0 < sum(gradient is not None for gradient in found.values()) < len(found)
    changed = [not torch.equal(statistics[name], buffer) for name, buffer in model.named_buffers() if "run" in name]
    assert changed and set(changed) == {workload is DECODER}

    model.zero_grad()
    model.requires_grad_(True)
    F.l1_loss(model(images), images).backward()
    for name, parameter in model.named_parameters():
        if found[name] is not None:
            torch.testing.assert_close(parameter.grad, found[name])

    exact = benchmark.exact_gradients(workload, images)
    eager, patched = (
        benchmark.checked(name, benchmark.prepared(name, workload, CPU), images, exact)["error"]
        for name in ("eager", "patched channels-last")
    )
    assert patched < 2 * eager


def test_flops_of_released_models(monkeypatch):
    """Training everything costs three forward passes. Frozen weights save a gradient, a frozen encoder saves two."""
    monkeypatch.setattr(DCAE, "from_name", classmethod(lambda cls, name: cls(autoencoder_config(name))))
    full, adaptation, decoder = (
        benchmark.flops_of(TrainingWorkload("dc-ae-f32c32-in-1.0", recipe, 1, 512)) for recipe in RECIPES
    )
    coders = {
        direction: sum(autoencoder.flops_of(Workload("dc-ae-f32c32-in-1.0", direction, 1, 512)).values())
        for direction in ("encode", "decode")
    }
    encode, decode = coders["encode"], coders["decode"]
    assert sum(full.values()) == pytest.approx(3 * (encode + decode), rel=1e-3)
    assert sum(decoder.values()) == pytest.approx(encode + 3 * decode, rel=1e-3)
    assert sum(adaptation.values()) == pytest.approx(encode + 2 * decode, rel=1e-3)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_flops_of_the_gradient_of_a_convolution(groups, transposed):
    """Each gradient takes as many multiplications as the forward."""
    layer = (nn.ConvTranspose2d if transposed else nn.Conv2d)(8, 12, 3, padding=1, groups=groups)
    mapping = {torch.ops.aten.convolution_backward: benchmark.convolution_backward_flops}
    with benchmark.FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        layer(torch.randn(2, 8, 6, 6, requires_grad=True)).sum().backward()
    forward, backward = counter.get_flop_counts()["Global"].values()
    assert forward == 2 * 2 * 36 * 9 * 8 * 12 // groups and backward == 2 * forward


def test_workloads():
    names = [workload.name for workload in TRAINING_WORKLOADS]
    assert len(names) == len(set(names))
    for workload in (*TRAINING_WORKLOADS, *TRAINING_REHEARSAL):
        assert set(workload.contenders) <= benchmark.CONTENDERS.keys() and workload.contenders[0] == "eager"
        assert set(workload.contenders) <= set(main.CONTENDERS)


def test_contenders_are_chosen():
    (workload,) = main.chosen(
        TRAINING_REHEARSAL, lambda name: "full" in name, ["patched channels-last", "torch.compile"]
    )
    assert workload.recipe == "full" and workload.contenders == ("eager", "patched channels-last")


@pytest.fixture
def times() -> dict[str, dict]:
    times = {"eager": 6.0, "eager channels-last": 5.0, "torch.compile": 4.0, "torch.compile, reduce-overhead": 3.0}
    times |= {"patched channels-last": 3.5, "patched + CUDA graphs": 2.0}
    rows = {name: {"ms": ms, "peak_gib": 2 * ms, "error": 0.01} for name, ms in times.items()}
    return rows | {"patched + torch.compile": {"failure": "wrong", "error": 0.5}}


def test_fastest_contenders_are_compared(times):
    record = {"workload": TRAINING_WORKLOADS[0].name, "floor_ms": 1.0, "contenders": times}
    record |= {"model": "dc-ae-x", "recipe": "full", "batch": 16, "size": 256, "adversarial": False}
    row = "| x full, 16 × 256 px | 5.00 | 3.00 | 2.00 | 1.00 | 2.50× | 1.50× |"
    assert row in tables.autoencoder_training_table([record])
    found = {outcome.target.quantity: outcome for outcome in tables.outcomes({"autoencoder-training": [record]})}
    assert found["error"].value == 1.0 and found["error"].verdict == "met"
    outcomes = tables.outcomes({"autoencoder-training": [record]})
    values = {o.target.quantity: o.value for o in outcomes if o.target.workload == record["workload"]}
    assert values == {"ms": 1.5, "peak_gib": 0.5}


def test_table_without_patched(times):
    rows = {"eager": times["eager"], "torch.compile": {"failure": "out of memory"}}
    record = {"model": "dc-ae-x", "recipe": "full", "batch": 1, "size": 8, "floor_ms": 1.0, "contenders": rows}
    record["adversarial"] = True
    row = "| x full, 1 × 8 px, adversarial | 6.00 | out of memory | – | 1.00 | – | – |"
    assert row in tables.autoencoder_training_table([record])
    assert targets.with_fastest([record]) == [record]


def test_report(records, tmp_path, monkeypatch):
    """The report of a machine on which only the training of autoencoders was measured."""
    pytest.importorskip("matplotlib")
    from benchmarks import report, results

    for record in records:
        results.merge(tmp_path / "results" / "gpu.json", "autoencoder-training", record | {"ceilings": vars(CEILINGS)})
    (tmp_path / "README.md").write_text(f"{report.START}{report.END}")
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "PAGES", tmp_path / "docs" / "benchmarks")
    report.main()
    assert "| small full, 2 × 8 px |" in (tmp_path / "README.md").read_text()
    page = (tmp_path / "docs" / "benchmarks" / "gpu.md").read_text()
    assert "\n## Training steps of autoencoders\n" in page and "| small-full-b2-8 | patched + CUDA graphs |" in page
    plot = tmp_path / "docs" / "benchmarks" / "gpu_autoencoder_training.png"
    assert 5_000 < plot.stat().st_size < 150_000


def test_profile_accounts_for_the_step():
    record = profile.profile(FULL, "eager", CPU, CEILINGS)
    assert record["kinds"]["convolution"]["ms"] > 0 and record["kinds"]["convolution"]["floor_ms"] > 0
    assert {"optimizer", "batch norm", "matrix product"} <= record["kinds"].keys()


def test_a_line_for_the_terminal(records):
    for record in records:
        assert tables.line("autoencoder-training", record).startswith(record["workload"])


def test_losses_of_patched_and_eager_are_compared(monkeypatch):
    monkeypatch.setattr(autoencoder_loss_curve, "STEPS", 6)
    monkeypatch.setattr(autoencoder_loss_curve, "WINDOW", 3)
    monkeypatch.setattr(LossWorkload, "config", lambda workload: DCAE.from_name("small").config)
    record = autoencoder_loss_curve.benchmark(LossWorkload("small", 1, 1, 8), CPU, CEILINGS)
    assert all(len(row["losses"]) == 2 for row in record["contenders"].values())
    eager, patched, other = (row["difference"] for row in record["contenders"].values())
    assert eager == 0 < patched < min(0.01, other)


def test_the_model_of_the_loss_curve_is_narrow():
    config = LOSS_WORKLOADS[0].config()
    assert config.encoder.width == (32, 64, 128, 128, 256, 256) and config.decoder.depth == (0, 5, 10, 2, 2, 2)
