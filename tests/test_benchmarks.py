"""A rehearsal of the benchmarks on small shapes, and the evaluation of results."""

import json
import re
import subprocess
import sys

import pytest
import torch

import benchmarks.__main__ as command_line
from benchmarks import (
    autoencoder,
    contenders,
    first_call,
    operator_cases,
    operators,
    profile,
    results,
    tables,
    targets,
    timing,
)
from benchmarks.autoencoder_workloads import TrainingWorkload
from benchmarks.ceilings import Ceilings, measure_ceilings
from benchmarks.workloads import COMPILED, WORKLOADS, Workload, parse
from dcae_fast.models.autoencoder import DCAE, CoderConfig, DCAEConfig
from dcae_fast.models.zoo import autoencoder_config

CPU = torch.device("cpu")
CEILINGS = Ceilings(tflops=1.0, copy=1.0)
NAMES = ("eager", "eager channels-last", "patched", "patched channels-last")
TINY = Workload("small", "decode", 1, 8, NAMES)


@pytest.fixture(scope="module", autouse=True)
def small_model():
    coder = CoderConfig((32, 32), (1, 1), ("ResBlock", "ResBlock"), ("rms", "rms"), ("silu", "silu"))
    config = DCAEConfig(latent_channels=16, encoder=coder, decoder=coder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DCAE, "from_name", classmethod(lambda cls, name: cls(config)))
        yield
    contenders.random_model.cache_clear()


def measured(workload: Workload) -> dict:
    return autoencoder.benchmark(workload, CPU, CEILINGS)


@pytest.fixture(scope="module")
def records(small_model):
    return [measured(Workload("small", direction, 1, 8, NAMES)) for direction in ("encode", "decode")]


@pytest.fixture
def contend(monkeypatch):
    """contend(prepare) returns the row of a contender that `prepare` prepares."""

    def row(prepare) -> dict:
        monkeypatch.setitem(contenders.CONTENDERS, "rival", contenders.Contender(lambda half, workload: prepare(half)))
        return measured(Workload("small", "decode", 1, 8, ("eager", "rival")))["contenders"]["rival"]

    return row


def test_every_contender_is_checked_and_timed(records):
    for record in records:
        assert tuple(record["contenders"]) == NAMES
        for row in record["contenders"].values():
            assert 0 <= row["error"] < 1e-4 and 0 < row["ms_low"] <= row["ms"] <= row["ms_high"]


def test_a_wrong_contender_is_not_timed(contend):
    row = contend(lambda half: half.register_forward_hook(lambda module, args, out: 1.001 * out))
    assert row["failure"] == "wrong" and row["error"] == pytest.approx(1e-3, rel=0.1) and "ms" not in row


def test_nan_is_wrong(contend):
    row = contend(lambda half: half.register_forward_hook(lambda module, args, out: out * float("nan")))
    assert row["failure"] == "wrong" and "ms" not in row


def test_a_contender_that_repeats_its_first_result_is_wrong(contend):
    results = []

    def repeat(module, args, out):
        results.append(out)
        return results[0]

    assert contend(lambda half: half.register_forward_hook(repeat))["failure"] == "wrong"


@pytest.mark.parametrize(
    "error, failure",
    [(torch.OutOfMemoryError("CUDA out of memory."), "out of memory"), (TypeError("no\nmore"), "TypeError: no")],
)
def test_a_contender_that_fails_does_not_stop_the_others(contend, error, failure):
    def fail(half):
        raise error

    assert contend(fail) == {"failure": failure}


@pytest.mark.parametrize("name", contenders.CONTENDERS)
def test_unpatched_contenders_time_the_algorithms_of_cudnn(name):
    flags = []
    contenders.caller(name, lambda x: flags.append(torch.backends.cudnn.benchmark), torch.zeros(1))()
    assert flags == ["patched" not in name] and not torch.backends.cudnn.benchmark


def test_ratios_compare_with_the_fastest_form():
    times = {"eager": 4.0, "eager channels-last": 3.0, "torch.compile": 2.5, "torch.compile, reduce-overhead": 2.0}
    rows = {name: {"ms": ms} for name, ms in times.items()} | {"patched + torch.compile": {"ms": 0.5}}
    rows["patched channels-last"] = {"ms": 1.0}
    assert tables.ratio(rows, "eager") == "3.00×" and tables.ratio(rows, "torch.compile") == "2.00×"
    target = targets.faster("small", "patched channels-last", "torch.compile", 2.1)
    assert target.value({"contenders": rows}) == 2.0 and not target.met(2.0)


def test_diffusers_twin_is_the_same_model():
    pytest.importorskip("diffusers")
    record = measured(Workload("small", "decode", 1, 8, ("eager", "diffusers patched")))
    assert record["contenders"]["diffusers patched"]["error"] < 1e-4


def test_an_unchecked_contender_has_no_error(monkeypatch):
    monkeypatch.setattr(autoencoder, "exact_result", lambda *args: None)
    record = measured(Workload("small", "decode", 1, 8, ("eager",)))
    assert record["contenders"]["eager"]["error"] is None
    assert "not checked" in tables.contender_table([record])


def test_flops_of_the_released_model(monkeypatch):
    monkeypatch.setattr(DCAE, "from_name", classmethod(lambda cls, name: cls(autoencoder_config(name))))
    flops = autoencoder.flops_of(parse("dc-ae-f32c32-in-1.0-decode-b8-512"))
    assert sum(flops.values()) / 8e9 == pytest.approx(2769, rel=1e-3)


def test_ceilings_and_floor():
    ceilings = measure_ceilings(CPU)
    assert ceilings.tflops > 0 and ceilings.copy > 0
    assert Ceilings(tflops=2.0, copy=1.0).floor(flops=4e12, bytes_moved=1e12) == pytest.approx(2000)
    assert Ceilings(tflops=2.0, copy=1.0).floor(flops=4e12, bytes_moved=3e12) == pytest.approx(3000)


def test_names_of_workloads_are_parsed():
    for workload in (workload for part in WORKLOADS.values() for workload in part):
        again = parse(workload.name)
        assert (again.model, again.direction, again.batch, again.size) == (
            workload.model, workload.direction, workload.batch, workload.size,
        )  # fmt: skip
        assert set(workload.contenders) <= set(contenders.CONTENDERS)
        assert workload.contenders[0] == "eager" or workload in WORKLOADS["first-call"]
    with pytest.raises(ValueError, match="expected MODEL-DIRECTION-bBATCH-SIZE"):
        parse("dc-ae-f32c32-in-1.0-decode-8-512")


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda target: f"{target.workload} {tables.sentence(target)}")
def test_every_target_is_measured(target):
    found = targets.contenders_of(target.part)
    taking_part = [names for workload, names in found.items() if target.workload in (None, workload)]
    assert taking_part
    for names in taking_part:
        assert target.contender in names
        assert target.against in (None, "floor") or targets.forms(dict.fromkeys(names), target.against)


def outcome(target: targets.Target, *rows: dict[str, dict]) -> tuple[float | None, str]:
    """The value and verdict of a target on records with these rows (contender → row)."""
    records = [{"workload": f"w{index}", "flops": 790e9, "contenders": row} for index, row in enumerate(rows)]
    found = targets.evaluate(target, {"p": records})
    return found.value, found.verdict


def test_targets_are_evaluated():
    faster = targets.faster("w0", "ours", "theirs", 1.5, part="p")
    assert outcome(faster, {"ours": {"ms": 2.0}, "theirs": {"ms": 3.0}}) == (1.5, "met")
    assert outcome(faster, {"ours": {"ms": 2.0}, "theirs": {"ms": 2.9}}) == (1.45, "missed")
    assert outcome(faster, {"ours": {"failure": "wrong", "error": 1.0}, "theirs": {"ms": 3.0}}) == (None, "missed")
    assert outcome(faster, {"ours": {"ms": 2.0}, "theirs": {"failure": "no"}}) == (None, "not measured")
    assert outcome(faster, {"theirs": {"ms": 3.0}}) == (None, "not measured")
    floor = targets.Target("p", "w0", "ours", "ms", "floor", 1.2)
    assert outcome(floor, {"ours": {"ms": 1.1}}) == (pytest.approx(1.1), "met")
    assert outcome(floor, {"ours": {"ms": 1.3}}) == (pytest.approx(1.3), "missed")
    assert outcome(targets.Target("p", "w0", "ours", "cold_s", None, 20), {"ours": {"cold_s": 19.0}}) == (19.0, "met")
    errors = [{"ours": {"error": error}, "theirs": {"error": 2.0}} for error in (1.0, 3.0, 2.0)]
    assert outcome(targets.Target("p", None, "ours", "error", "theirs", 1.0), *errors) == (1.5, "missed")


def test_operators_are_checked_and_timed(monkeypatch):
    monkeypatch.setattr(operators, "SHAPES", [(name, (1, 96, 16, 16)) for name in operator_cases.CASES])
    monkeypatch.setattr(operators, "CALLS", 1)
    rows = list(operators.benchmark(CPU, CEILINGS, lambda name: "rms" in name or "conv" in name))
    assert {row["operator"] for row in rows} == {
        name for name in operator_cases.CASES if "rms" in name or "conv" in name
    }
    for row in rows:
        assert row["error"] < 1e-2 and row["ms"] > 0 and row["eager_ms"] > 0 and row["floor_ms"] > 0
    for name in operator_cases.CASES:
        assert operators.error_of(operator_cases.case(name, (1, 96, 4, 4), CPU)) < 1e-2
    monkeypatch.setattr(operators, "error_of", lambda case: 1.0)
    assert all("ms" not in row for row in operators.benchmark(CPU, CEILINGS, lambda name: name == "rms_norm"))


def test_first_calls_use_separate_caches(monkeypatch):
    assert 0 < first_call.first_call(TINY, "eager", CPU) < 60
    seen = []

    def in_fresh_process(workload, contender, environment):
        seen.append(environment["TRITON_CACHE_DIR"])
        if contender == "patched":
            raise subprocess.CalledProcessError(1, [], stderr="Traceback\nRuntimeError: no")
        return float(len(seen))

    monkeypatch.setattr(first_call, "in_fresh_process", in_fresh_process)
    record = first_call.benchmark(Workload("small", "decode", 1, 8, ("torch.compile", "patched")))
    assert record["contenders"]["torch.compile"] == {"cold_s": 1.0, "warm_s": 2.0}
    assert record["contenders"]["patched"] == {"failure": "RuntimeError: no"}
    assert seen[0] == seen[1] != seen[2]


def test_first_call_in_a_fresh_process():
    assert first_call.in_fresh_process(Workload("dc-ae-tiny", "decode", 1, 32), "eager", {}) > 0


@pytest.mark.parametrize(
    "kernel, kind",
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_cudnn", "convolution"),
        ("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, ...>", "copy"),
        ("void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda...>", "copy"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "matrix product"),
        ("_rms_norm_forward_kernel", "this project's operators"),
        ("depthwise_glu_kernel(Quad const*, ...)", "this project's operators"),
        ("triton_poi_fused_convolution_relu_2", "Inductor"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel...>", "other"),
    ],
)
def test_kernels_have_kinds(kernel, kind):
    assert profile.kind_of(kernel) == kind


def test_profile_accounts_for_the_call():
    record = profile.profile(TINY, "eager", CPU, CEILINGS)
    assert record["kinds"]["convolution"]["ms"] > 0 and record["kinds"]["convolution"]["floor_ms"] > 0
    assert sum(row["ms"] for row in record["kinds"].values()) >= sum(kernel["ms"] for kernel in record["kernels"]) > 0
    assert "| convolution |" in tables.profile_table(record) and "aten::" in tables.kernel_table(record)


def test_a_record_replaces_the_same_record(tmp_path):
    path = tmp_path / "new" / "gpu.json"
    for part, name, value in (("a", "x", 1), ("a", "y", 2), ("b", "x", 3), ("a", "x", 4)):
        results.merge(path, part, {"workload": name, "value": value})
    found = results.read(path)
    assert [(record["workload"], record["value"]) for record in found["a"]] == [("x", 4), ("y", 2)]
    assert [record["value"] for record in found["b"]] == [3]
    assert found["a"][0]["stamp"].keys() >= {"gpu", "torch", "triton", "commit", "date"}


@pytest.fixture
def written(records, tmp_path, monkeypatch):
    """A folder with a report on results of every part; one contender ran out of memory."""
    pytest.importorskip("matplotlib")
    from benchmarks import report

    memory = json.loads(json.dumps(records)) + json.loads(json.dumps(records))
    for record in memory:
        record["contenders"] = {name: record["contenders"][name] | {"peak_gib": 2.0} for name in ("eager", "patched")}
    for record in memory[2:]:
        record |= {"size": 16, "workload": record["workload"].replace("8", "16")}
        record["contenders"]["eager"] = {"failure": "out of memory"}
    calls = {"workload": TINY.name, "contenders": {"patched": {"cold_s": 9.0, "warm_s": 1.25}}}
    operator = {"operator": "rms_norm", "shape": [1, 2, 3, 4], "bytes": 4e9, "flops": 0, "error": 0.0}
    operator |= {"ms": 1.0, "eager_ms": 3.0, "floor_ms": 0.8}
    parts = {"autoencoder": records, "memory": memory, "first-call": [calls], "operators": [operator]}
    parts["profile"] = [profile.profile(TINY, "eager", CPU, CEILINGS)]
    for part, rows in parts.items():
        for row in rows:
            results.merge(tmp_path / "results" / "gpu.json", part, row | {"ceilings": vars(CEILINGS)})
    (tmp_path / "README.md").write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "PAGES", tmp_path / "docs" / "benchmarks")
    report.main()
    return tmp_path


def test_report(written):
    readme = (written / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old" not in readme
    assert "| small encode, 1 × 8 px |" in readme and "not measured" not in readme
    for link in re.findall(r"\]\((.*?)\)", readme):
        assert (written / link).stat().st_size > 0, link
    page = (written / "docs" / "benchmarks" / "gpu.md").read_text()
    assert "| rms_norm | 1×2×3×4 | 1.000 | 4000 GB/s | 80% | 3.0× |" in page
    assert f"| {TINY.name} | patched | 9.0 | 1.2 |" in page and "out of memory" in page
    for plot in ("speed", "memory"):
        picture = written / "docs" / "benchmarks" / f"gpu_{plot}.png"
        assert 10_000 < picture.stat().st_size < 150_000


def test_the_table_of_8_bit():
    record = {"model": "dc-ae-x", "direction": "decode", "batch": 1, "size": 8}
    rows = {"eager": 9.0, "torch.compile": 6.0, "patched + CUDA graphs": 4.0, "patched, 8 bit": 3.0}
    rows = {name: {"ms": ms, "error": 0.01} for name, ms in rows.items()}
    rows["patched, 8 bit + CUDA graphs"] = {"failure": "wrong"}
    assert tables.with_8_bit([record | {"contenders": {"eager": rows["eager"]}}]) == []
    *_, last = tables.table_in_8_bit([record | {"contenders": rows}]).splitlines()
    assert last == "| x decode, 1 × 8 px | int8 | 6.00 | 4.00 | 3.00 | 2.00× | 1.0e-02 | 1.0e-02 |"


def test_the_committed_report_matches_the_committed_results():
    pytest.importorskip("matplotlib")
    from benchmarks import report

    summaries = []
    for path in sorted(results.RESULTS.glob("*.json")):
        loaded = report.load(path)
        assert (report.PAGES / f"{path.stem}.md").read_text() == report.page(loaded, path.stem), "make bench-report"
        summaries.append(report.summary(loaded, path.stem))
    text = report.README.read_text().split(report.START)[1].split(report.END)[0]
    assert text == "\n" + "\n\n".join(summaries) + "\n", "make bench-report"


def test_caches_of_torch_compile_are_filled_first(monkeypatch):
    compiled = []
    monkeypatch.setattr(first_call, "in_fresh_process", lambda workload, name, *rest: compiled.append((workload, name)))
    workload = Workload("small", "decode", 1, 8, COMPILED)
    training = TrainingWorkload("small", "full", 1, 8, ("eager", "patched + torch.compile"))
    first_call.fill_caches([TINY, workload, training], 1)
    assert compiled == [(workload, "torch.compile"), (training, "patched + torch.compile")]


def test_a_slow_first_call_does_not_shorten_the_rounds(monkeypatch):
    """`patch` may capture a CUDA graph in the call that is timed first."""
    taken = []

    def times(run, calls):
        taken.append(calls)
        return [400.0, *[5.0] * (calls - 1)] if len(taken) == 1 else [5.0] * calls

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(timing, "_times", times)
    assert timing.measure({"patched": lambda: None}, rounds=2, seconds=0.1)["patched"].median == 5.0
    assert taken == [timing.FIRST, 20, 20]


@pytest.mark.parametrize("options", ["--only nothing --part shapes", "--part shapess", "--contenders patchd"])
def test_a_misspelt_name_is_an_error(options, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command_line, "measure_ceilings", lambda device: CEILINGS)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--out", str(tmp_path / "results.json"), *options.split()])
    with pytest.raises(SystemExit) as caught:
        command_line.main()
    text = capsys.readouterr().err
    assert caught.value.code == 2 and f"error: {'' if 'only' in options else 'argument '}--" in text
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    "part", [part for part in command_line.PARTS if command_line.contenders_of(part, lambda _: True)]
)
def test_contenders_of_another_part_are_an_error(part, monkeypatch, tmp_path, capsys):
    known = command_line.contenders_of(part, lambda _: True)
    other = next(name for name in command_line.CONTENDERS if name not in known)
    options = ["--out", str(tmp_path / "results.json"), "--part", part, "--contenders", other]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *options])
    with pytest.raises(SystemExit) as caught:
        command_line.main()
    text = capsys.readouterr().err
    assert caught.value.code == 2 and f"error: --contenders {other}: {part} has " in text
    assert all(name in text for name in known)


def test_workloads_without_the_contenders_are_left_out(capsys):
    first, second = (Workload("dc-ae-x", "encode", batch, 64, ("eager", name)) for batch, name in ((1, "a"), (2, "b")))
    assert command_line.chosen([first, second], lambda _: True, ["b", "c"]) == [second]
    assert capsys.readouterr().out == f"{first.name} is left out: it has none of these contenders\n"
