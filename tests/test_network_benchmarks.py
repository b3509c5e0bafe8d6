"""A rehearsal of the diffusion transformers' benchmarks on small shapes, and the evaluation of their results."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import loss_curve, networks, profile, sampling, tables, targets, training, transformer
from benchmarks.__main__ import NETWORK_PARTS
from benchmarks.ceilings import Ceilings
from benchmarks.network_workloads import NETWORK_REHEARSAL, NETWORK_WORKLOADS, NetworkWorkload
from dcae_fast.models.transformer import Attention
from dcae_fast.ops._library import Kernels

CPU = torch.device("cpu")
CEILINGS = Ceilings(tflops=1.0, copy=1.0)
FORWARD, TRAINING, STEP, LOSS = (NETWORK_REHEARSAL[part][0] for part in NETWORK_PARTS)
MEASURED = NETWORK_REHEARSAL | {"training": NETWORK_REHEARSAL["training"][::3]}  # UViT, and DiT with checkpointing


def measured(part: str) -> list[dict]:
    return [NETWORK_PARTS[part](workload, CPU, CEILINGS) for workload in MEASURED[part]]


@pytest.fixture(scope="module", autouse=True)
def references():
    """Operators compute by their references, not in the interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernels, "_choose", lambda self, args: self.plain)
        yield


@pytest.fixture(scope="module")
def records(references) -> dict[str, list[dict]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_curve, "STEPS", 8)
        patch.setattr(loss_curve, "WINDOW", 2)
        return json.loads(json.dumps({part: measured(part) for part in NETWORK_PARTS}))


@pytest.mark.parametrize("part", ["transformer", "training", "sampling"])
def test_every_contender_is_checked_and_timed(records, part):
    for workload, record in zip(MEASURED[part], records[part], strict=True):
        assert record["workload"] == workload.name and tuple(record["contenders"]) == workload.contenders
        for name, row in record["contenders"].items():
            assert 0 < row["error"] < (0.1 if networks.CONTENDERS[name].in_8_bit else 2e-2)
            assert "failure" not in row and row["ms_low"] <= row["ms"] <= row["ms_high"]
            assert row["images_per_s"] == pytest.approx(1e3 * workload.batch / row["ms"])
            assert row["mfu"] == pytest.approx(record["floor_ms"] / row["ms"])
        if part == "training":
            assert record["drift"] > 0 and record["contenders"]["patched"]["loss_error"] < 1e-2


@pytest.fixture
def rival(monkeypatch):
    """rival(benchmark, workload, prepare) returns the row of a contender that `prepare` makes from the network."""

    def row(benchmark, workload: NetworkWorkload, prepare) -> dict:
        contender = networks.Contender(lambda model, workload: prepare(model))
        monkeypatch.setitem(networks.CONTENDERS, "rival", contender)
        return benchmark(replace(workload, contenders=("eager", "rival")), CPU, CEILINGS)["contenders"]["rival"]

    return row


WORK = {"forward": (transformer, FORWARD), "training": (training, TRAINING), "step": (sampling, STEP)}


@pytest.mark.parametrize("module, workload", WORK.values(), ids=WORK)
@pytest.mark.parametrize("factor", [1.2, float("nan")])
def test_a_wrong_contender_is_not_timed(rival, module, workload, factor):
    row = rival(
        module.benchmark, workload, lambda model: model.register_forward_hook(lambda m, args, out: factor * out)
    )
    assert row["failure"] == "wrong" and "ms" not in row


@pytest.mark.parametrize("work", ["forward", "step"])
def test_a_contender_that_repeats_its_first_result_is_wrong(rival, work):
    module, workload = WORK[work]
    results = []

    def repeat(module, args, out):
        results.append(out)
        return results[0]

    assert rival(module.benchmark, workload, lambda model: model.register_forward_hook(repeat))["failure"] == "wrong"


@pytest.mark.parametrize("module, workload", WORK.values(), ids=WORK)
def test_out_of_memory_does_not_stop_the_others(rival, module, workload):
    def fail(model):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    assert rival(module.benchmark, workload, fail) == {"failure": "out of memory"}


def test_training_without_memory_for_eager(monkeypatch):
    """The others are checked against eager on a few samples, for which the memory suffices."""
    step, seen = training.stepper, []

    def stepper(model, inputs):
        seen.append(model)
        if len(seen) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(model, inputs)

    monkeypatch.setattr(training, "stepper", stepper)
    record = training.benchmark(TRAINING, CPU, CEILINGS)
    assert record["contenders"]["eager"]["failure"] == "out of memory"
    assert record["contenders"]["patched"]["ms"] > 0 and "drift" not in record


@torch.no_grad()
def test_original_attention_is_the_same_in_fp32(monkeypatch):
    torch.manual_seed(0)
    plain, x = Attention(32, 2, qkv_bias=True), torch.randn(2, 5, 32)
    original = networks.sharing_weights(nn.ModuleList([plain]))
    networks.as_original(original)
    assert type(original[0]) is networks.OriginalAttention and original[0].qkv.weight is plain.qkv.weight
    assert type(plain) is Attention and torch.equal(original[0](x), plain(x))
    seen, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: seen.append(q.dtype) or attention(q, k, v))
    with networks.autocast(CPU):
        assert original[0](x).dtype == torch.bfloat16
    assert seen == [torch.float32]


def test_checkpointed_blocks_have_the_same_gradients():
    inputs = networks.inputs_of(TRAINING, CPU)
    gradients = []
    for checkpointed in (False, True):
        model = training.prepared("eager", replace(TRAINING, checkpointed=checkpointed), CPU)
        training.loss_of(model, inputs).backward()
        gradients.append([parameter.grad for parameter in training.trained(model)])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "network, gflops", [("uvit-h-f64", 66.5), ("uvit-h-f32", 266.4), ("uvit-h-f8p2", 1164.7), ("dit-xl-f32", 237.3)]
)
def test_flops(network, gflops):
    """The FLOPs computed by hand; for UViT-H: 2 · tokens · weights of linear layers + 4 · tokens² · width · blocks."""
    assert networks.flops_of(network, 2) / 2e9 == pytest.approx(gflops, rel=1e-3)


def test_workloads_can_be_built():
    names = [workload.name for part in NETWORK_WORKLOADS.values() for workload in part]
    assert len(names) == len(set(names))
    for workload in (workload for part in NETWORK_WORKLOADS.values() for workload in part):
        assert networks.config_of(workload.network).class_dropout_prob == 0
        assert set(workload.contenders) <= networks.CONTENDERS.keys() and workload.contenders[0] == "eager"
        if workload.work == "samples":
            released, measured = sampling.config_of(workload).network, networks.config_of(workload.network)
            assert replace(released, class_dropout_prob=0.0) == measured


def test_pictures_are_sampled_and_decoded(monkeypatch):
    config = sampling.config_of(NetworkWorkload("uvit-h-f64", "samples", 2))
    small = replace(config, network=networks.config_of("uvit-tiny-f64"), num_inference_steps=3)
    decoded = []
    monkeypatch.setattr(sampling, "config_of", lambda workload: small)
    monkeypatch.setattr(sampling.DCAE, "from_name", classmethod(lambda cls, name: small_autoencoder()))
    monkeypatch.setattr(sampling.DCAEDiffusion, "decode", lambda self, z: decoded.append(len(z)))
    workload = NetworkWorkload("uvit-tiny-f64", "samples", 2, ("eager", "patched + CUDA graphs"))
    record = sampling.benchmark(workload, CPU, CEILINGS)
    assert all(row["ms"] > 0 and row["error"] < 5e-2 for row in record["contenders"].values())
    assert set(decoded) == {2} and record["flops"] == 3 * networks.flops_of("uvit-tiny-f64", 4)


def small_autoencoder():
    from dcae_fast.models.autoencoder import DCAE, CoderConfig, DCAEConfig

    coder = CoderConfig((128,), (1,), ("ResBlock",), ("rms",), ("silu",))
    return DCAE(DCAEConfig(128, coder, coder))


def test_losses_are_compared(records):
    (record,) = records["loss-curve"]
    rows = record["contenders"]
    for name, row in rows.items():
        assert len(row["losses"]) == 4 and row["losses"][-1] < row["losses"][0] and abs(row["end"]) <= row["difference"]
        assert row["difference"] < (0.1 if name == "eager, other seed" else 1e-2)
    assert rows["eager"]["difference"] == 0 < min(rows[name]["difference"] for name in rows.keys() - {"eager"})
    assert rows["patched, fp8"]["losses"] != rows["patched, fp8-all"]["losses"] != rows["patched"]["losses"]
    table = tables.loss_table([record])
    assert "| largest difference | 0.00% |" in table and "| last fifth | +0.00% |" in table
    assert "| trained weights, evaluated in bf16 | +0.00% |" in table


def headline_results() -> dict[str, list[dict]]:
    def record(workload: str, **rows) -> dict:
        return {"workload": workload, "contenders": rows}

    part, base, ours, _ = targets.HEADLINE["sampling"]
    slow = {"images_per_s": 10.0}
    rows = {"eager": {"images_per_s": 180.0}, "patched": {"images_per_s": 350.0}, "torch.compile": {"failure": "wrong"}}
    return {part: [record(base, eager=slow), record(ours, **rows)]}


def test_headline():
    found = targets.headline(headline_results())
    assert [record["workload"] for record in found] == ["sampling"]
    assert {name: row.get("ratio") for name, row in found[0]["contenders"].items()} == {
        "paper": 19.1, "eager": 18.0, "patched": 35.0, "torch.compile": None,
    }  # fmt: skip
    assert "| sampling | 19.1× | 18.0× | 35.0× | wrong |" in tables.headline_table(found)
    found = (o for o in tables.outcomes(headline_results()) if o.target.part == "headline")
    outcomes = {o.target.workload: o for o in found if o.target.contender == "patched"}
    assert outcomes["sampling"].verdict == "met" and outcomes["sampling"].value == 35
    assert outcomes["training"].verdict == "not measured"
    assert targets.headline({}) == []


def test_headline_over_our_own_network():
    results = headline_results()
    results["transformer"][0]["contenders"]["patched"] = {"images_per_s": 14.0}
    sampling, over_patched = targets.headline(results)
    assert sampling["contenders"].keys() - over_patched["contenders"].keys() == {"paper"}
    assert over_patched["workload"] == "sampling, over patched" and over_patched["contenders"]["patched"]["ratio"] == 25
    workloads = {workload.name: workload for part in NETWORK_WORKLOADS.values() for workload in part}
    for ratio in targets.HEADLINE.values():
        assert ratio.over in workloads[ratio.base].contenders and ratio.ours in workloads


def test_report(records, tmp_path, monkeypatch):
    """The report of a machine on which only the transformers were measured."""
    pytest.importorskip("matplotlib")
    from benchmarks import report, results

    path = tmp_path / "results" / "gpu.json"
    for part, rows in records.items():
        for row in rows:
            results.merge(path, part, row | {"ceilings": vars(CEILINGS)})
    failed = json.loads(json.dumps(records["transformer"][0])) | {"workload": "large", "ceilings": vars(CEILINGS)}
    failed["contenders"]["eager"] = {"failure": "out of memory"}
    results.merge(path, "transformer", failed)
    (tmp_path / "README.md").write_text(f"{report.START}{report.END}")
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "PAGES", tmp_path / "docs" / "benchmarks")
    report.main()
    page = (tmp_path / "docs" / "benchmarks" / "gpu.md").read_text()
    for heading in ("Diffusion transformers", "Training steps", "Sampling", "Loss of a transformer in training"):
        assert f"\n## {heading}\n" in page
    assert "| large | eager | out of memory |" in page and "| uvit-tiny-f64-step-b2 | patched + CUDA graphs |" in page
    for plot in ("transformer", "training", "loss"):
        assert 5_000 < (tmp_path / "docs" / "benchmarks" / f"gpu_{plot}.png").stat().st_size < 150_000


@pytest.mark.parametrize("workload", [FORWARD, TRAINING, replace(TRAINING, checkpointed=True)], ids=lambda w: w.name)
def test_profile_accounts_for_the_call(workload):
    record = profile.profile(workload, "eager", CPU, CEILINGS)
    assert record["workload"] == workload.name and record["kinds"]["matrix product"]["floor_ms"] > 0
    assert "| attention |" in tables.profile_table(record) and record["kinds"]["attention"]["floor_ms"] > 0


def test_a_profile_counts_no_kernel_twice():
    """The annotation of an optimizer step, which spans its kernels, is not counted."""
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    kernels, span = profile.kernels_of(torch.optim.AdamW([weight]).step, CPU)
    names = [kernel["name"] for kernel in kernels]
    assert "aten::add_" in names and not any("Optimizer" in name for name in names)
    assert span >= sum(kernel["ms"] for kernel in kernels) > 0


@pytest.mark.parametrize("part", NETWORK_PARTS)
def test_a_line_for_the_terminal(records, part):
    for record in records[part]:
        assert tables.line(part, record).startswith(record["workload"])
