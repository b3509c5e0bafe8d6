"""python -m benchmarks.report: writes the README's tables, docs/benchmarks and the plots from benchmarks/results.

Measures nothing.
"""

import textwrap
from collections.abc import Iterable
from pathlib import Path

from dcae_fast.files import written_atomically

from . import plots, tables
from .autoencoder_workloads import TRAINING_WORKLOADS
from .network_workloads import NETWORK_WORKLOADS
from .results import RESULTS, ROOT, read
from .targets import FP8, headline
from .workloads import WORKLOADS

README = ROOT / "README.md"
PAGES = ROOT / "docs" / "benchmarks"
START, END = "<!-- benchmark -->", "<!-- /benchmark -->"
Results = dict[str, list[dict]]  # part → records

PLOTS = {  # name of the file → part, what draws it, title
    "speed": ("autoencoder", plots.speed, "Time of each contender against the floor"),
    "memory": ("memory", plots.memory, "Peak memory and time against the size of the image"),
    "transformer": ("transformer", plots.networks, "Diffusion transformers, forward: share of the ceiling"),
    "training": ("training", plots.networks, "Diffusion transformers, training step: share of the ceiling"),
    "autoencoder_training": (
        "autoencoder-training",
        plots.networks,
        "Autoencoders, training step: share of the ceiling",
    ),
    "loss": ("loss-curve", plots.losses, "Training loss of a small transformer"),
    "autoencoder_loss": ("autoencoder-loss-curve", plots.losses, "Training loss of a small autoencoder"),
}
SECTIONS = {  # heading → part, table
    "All contenders": ("autoencoder", tables.contender_table),
    "Memory": ("memory", tables.memory_table),
    "First calls": ("first-call", tables.first_call_table),
    "Many shapes": ("shapes", tables.shapes_table),
    "Operators": ("operators", tables.operator_table),
    "Training steps of autoencoders": ("autoencoder-training", tables.network_table),
    "Diffusion transformers": ("transformer", tables.network_table),
    "Training steps": ("training", tables.network_table),
    "Sampling": ("sampling", tables.network_table),
    "SANA's transformer": ("sana", tables.network_table),
    "Softmax attention": ("attention", tables.attention_table),
    "Loss of a transformer in training": ("loss-curve", tables.loss_table),
    "Loss of an autoencoder in training": ("autoencoder-loss-curve", tables.loss_table),
    "Commands": ("pipeline", tables.pipeline_table),
}
PARTS_IN_8_BIT = "autoencoder", "transformer", "training", "sampling", "sana"
SETTING = """Measured on one {gpu} in bf16 with random weights: torch {torch}, cuDNN {cudnn}, triton {triton}, {date}.
Times are median milliseconds of a call. For eager and torch.compile, the tables show the fastest memory format and
compile mode that was measured, with torch.backends.cudnn.benchmark switched on. The floor is the time of the plain
model's arithmetic at the speed of a large matrix product in the same run. patched is `patch(model)` without options;
the last two columns give its speedup. A dash stands for a contender without a measurement."""
NETWORKS = """Transformers run under autocast to bf16. A training step is forward, backward and AdamW. A step of
sampling is one call of the network with guidance, and the solver's update."""
IN_8_BIT = """8 bit is an option with an error. Autoencoders compute in int8, with scales from random input; in
inference, weights are frozen. patched is the fastest form in bf16, and the speedup is over the fastest torch.compile in
bf16. Errors are relative to fp32: of the result, or of the gradients for a training step."""
AUTOENCODER_TRAINING = """A training step of an autoencoder is forward under autocast to bf16, L1 loss, backward and
fused AdamW, with torch.backends.cudnn.benchmark for all contenders. Of eager, torch.compile and patched, the table
shows the fastest form that was measured: memory format, compile mode, CUDA graphs."""
HEADLINE = """The paper's headline is the throughput of UViT-H on DC-AE's f64 latents, divided by the throughput on
Stable Diffusion's f8 latents with patch size 2. The paper measured on one H100. Here every column is divided by eager
on f8, and in the rows "over patched" by the patched network in bf16 on f8. Training computes every block again in the
backward pass, but for the rows "not checkpointed", whose batches are smaller."""
PAGE_SETTING = """A large matrix product runs at {rate} TFLOP/s on this machine. Commits: {commit}."""
UNFAIR = """Rows with † are older: eager and torch.compile ran without torch.backends.cudnn.benchmark."""
PAGE_EXPLANATION = """The contenders take turns. eager is the model as loaded. torch.compile, patched + CUDA graphs,
patched + torch.compile and every contender with channels-last in its name have channels-last weights and input. An
error is the relative L2 error against fp32 (against TF32 under Memory). Peak GiB is the most memory that one call
allocates; weights and the memory that a captured graph keeps do not count. "of ceiling" is the share of the measured
bandwidth of a copy; for convolutions and linear layers, the share of the matrix product's rate. Under First calls,
every call is the first of a fresh process. In the other tables, the time of a first call includes only the compilation
and the choice of kernels that no earlier contender had done."""
SHAPES_EXPLANATION = """Under Many shapes, each contender is called on single images of many sizes in turns. The very
first pass also chooses the kernels that no earlier contender has chosen. "each shape once" is the time of a later pass,
with a new copy of the model. "again" is the mean of four more passes with that copy. Held is the memory that the passes
leave reserved beyond the weights."""
NETWORK_EXPLANATION = """Diffusion transformers run under autocast to bf16 with random fp32 weights. eager is the
original's forward, which casts q, k and v up and down again. torch.compile compiles this forward block by block.
plain is this project's network, without these casts. "over eager" and "over compile" compare with the fastest form of
each. MFU is the arithmetic of the plain network, divided by the time of a call and by the measured ceiling; a training
step counts as three forward passes. Errors are relative to fp32: of the result, or of the gradients for a training
step. Peak GiB of a training step includes weights and optimizer. In training, each contender has the GPU's memory to
itself, so the contenders do not take turns; eager, measured again after the others, took {drift} of its first time.
A step of sampling is one call of the network on both halves of the guidance, and the update. samples are all steps and
the decoder; the decoder's arithmetic is not counted."""
AUTOENCODER_TRAINING_EXPLANATION = """latent-adaptation trains only encoder.project_out and decoder.project_in; decoder
trains the decoder. There, no contender computes gradients of frozen weights, and whatever lies before all trained
modules computes without gradients. The floor and MFU count only the arithmetic that is left. "patched + CUDA graphs"
captures the whole step as one graph. An adversarial step also has LPIPS, with random weights, and the step of a
discriminator; torch.compile compiles both too. Errors are of the gradients, relative to fp32. Peak GiB includes
weights, gradients, optimizer and captured graphs. Each contender has the GPU's memory to itself; eager, measured again
after the others, took {drift} of its first time."""
PIPELINE_EXPLANATION = """Commands run as a user starts them, on random pictures, latents and weights. Their names give
the batch of each GPU. Scaling is the throughput divided by the throughput of one GPU times the number of GPUs. "GPU
waited" is the share of the time in which the GPU had no data."""


def load(path: Path) -> Results:
    """A results file, workloads in the registry's order."""
    results = read(path)
    for part, workloads in (WORKLOADS | NETWORK_WORKLOADS | {"autoencoder-training": TRAINING_WORKLOADS}).items():
        order = {workload.name: index for index, workload in enumerate(workloads)}
        results.get(part, []).sort(key=lambda record: order.get(record["workload"], len(order)))
    return results


def paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def stamps(results: Results, name: str) -> str:
    """All values that the records' stamps have under a name."""
    values = [record["stamp"].get(name) for records in results.values() for record in records]
    return ", ".join(dict.fromkeys(str(value) for value in values if value))


def setting(results: Results) -> str:
    """Machine, versions and what the tables show."""
    date = max(record["stamp"]["date"] for records in results.values() for record in records)[:10]
    versions = {name: stamps(results, name) for name in ("gpu", "torch", "cudnn", "triton")}
    return paragraph(SETTING.format(date=date, **versions))


def page_setting(results: Results) -> str:
    rates = sorted({f"{record['ceilings']['tflops']:.0f}" for records in results.values() for record in records})
    rate = " to ".join(dict.fromkeys((rates[0], rates[-1])))
    is_fair = all(map(tables.is_fair, results.get("autoencoder", [])))
    text = PAGE_SETTING.format(rate=rate, commit=stamps(results, "commit"))
    return paragraph(text if is_fair else f"{text} {UNFAIR}")


def errors(results: Results) -> str:
    """The largest errors of the autoencoders; empty if none was measured."""
    worst = []
    for name, contender in (("patched", "patched channels-last"), ("eager", "eager")):
        rows = tables.rows_of(results.get("autoencoder", []), contender)
        found = [row["error"] for row in rows if row.get("error")]
        worst += [f"{max(found):.1e} {name}"] if found else []
    return f"Largest relative error of an autoencoder against fp32: {', '.join(worst)}." if worst else ""


def plots_of(results: Results) -> list[str]:
    """Names of the plots for which there are results; a curve needs two sizes."""
    sizes = {record["size"] for record in results.get("memory", [])}
    return [plot for plot, (part, *_) in PLOTS.items() if results.get(part) and (part != "memory" or len(sizes) > 1)]


def images(results: Results, folder: str) -> list[str]:
    return [f"![{PLOTS[plot][2]}]({folder}_{plot}.png)" for plot in plots_of(results)]


def compared(results: Results) -> list[dict]:
    """Records of transformers for which torch.compile was measured."""
    parts = [part for part in NETWORK_WORKLOADS if part != "loss-curve"] + ["sana"]
    records = [record for part in parts for record in results.get(part, [])]
    return [record for record in records if tables.best(record["contenders"], "torch.compile")]


def with_drift(explanation: str, results: Results, parts: Iterable[str]) -> list[str]:
    """The explanation of these parts, with the drift of eager that was measured in them; empty without records."""
    records = [record for part in parts for record in results.get(part, [])]
    drifts = [record["drift"] for record in records if "drift" in record]
    drift = f"{min(drifts):.0%} to {max(drifts):.0%}" if drifts else "(not measured)"
    return [paragraph(explanation.format(drift=drift))] if records else []


def autoencoder_training(results: Results) -> list[str]:
    """The table of training an autoencoder, with its introduction; empty without records."""
    records = results.get("autoencoder-training")
    return [paragraph(AUTOENCODER_TRAINING), tables.autoencoder_training_table(records)] if records else []


def in_8_bit(results: Results) -> list[str]:
    """The table of what was timed in 8 bit, with its introduction; empty without such a record."""
    records = [record for part in PARTS_IN_8_BIT for record in results.get(part, [])]
    return [paragraph(IN_8_BIT), tables.table_in_8_bit(records)] if tables.with_8_bit(records) else []


def summary(results: Results, name: str) -> str:
    """The README's text about one machine."""
    link = f"{PAGES.relative_to(README.parent).as_posix()}/{name}.md"
    autoencoders, networks = list(filter(tables.is_fair, results.get("autoencoder", []))), compared(results)
    parts = [setting(results)]
    parts += [tables.speed_table(autoencoders)] if autoencoders else []
    parts += autoencoder_training(results)
    parts += [paragraph(NETWORKS), tables.speed_table(networks)] if networks else []
    parts += in_8_bit(results)
    if records := headline(results):
        fp8 = (FP8,) if any(FP8 in record["contenders"] for record in records) else ()
        parts += [paragraph(HEADLINE), tables.headline_table(records, ("paper", *tables.MAIN[:3], *fp8))]
    parts.append(errors(results))
    parts.append(f"[All results]({link}): every contender, memory, first calls, operators, profiles.")
    return "\n\n".join(filter(None, parts))


def page(results: Results, name: str) -> str:
    """Everything that was measured on one machine."""
    parts = [f"# Benchmarks on {stamps(results, 'gpu')}", "Written by `make bench-report`."]
    parts += [setting(results), page_setting(results)]
    for records in (results.get("autoencoder"), compared(results)):
        parts += [tables.speed_table(records)] if records else []
    parts += autoencoder_training(results) + in_8_bit(results)
    parts += [*images(results, name), paragraph(PAGE_EXPLANATION), errors(results)]
    parts += [paragraph(SHAPES_EXPLANATION)] if results.get("shapes") else []
    parts += with_drift(AUTOENCODER_TRAINING_EXPLANATION, results, ["autoencoder-training"])
    parts += with_drift(NETWORK_EXPLANATION, results, NETWORK_WORKLOADS)
    if records := headline(results):
        parts += [paragraph(HEADLINE), tables.headline_table(records)]
    parts += [paragraph(PIPELINE_EXPLANATION)] if results.get("pipeline") else []
    outcomes = tables.outcomes(results)
    parts += ["## Targets", f"The project's own targets: {tables.target_counts(outcomes)}."]
    parts += [tables.target_table(outcomes)]
    for heading, (part, table) in SECTIONS.items():
        if results.get(part):
            parts += [f"## {heading}", table(results[part])]
    for record in results.get("profile", []):
        parts += [f"## Profile of {record['workload']}, {record['contender']}"]
        parts += [tables.profile_table(record), tables.kernel_table(record)]
    return "\n\n".join(filter(None, parts)) + "\n"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(path) as part:
        part.write_text(text)


def write_readme(text: str) -> None:
    """Put `text` between the README's markers."""
    before, rest = README.read_text().split(START)
    write(README, f"{before}{START}\n{text}\n{END}{rest.split(END)[1]}")


def main() -> None:
    summaries = []
    for path in sorted(RESULTS.glob("*.json")):
        results, name = load(path), path.stem
        write(PAGES / f"{name}.md", page(results, name))
        for plot in plots_of(results):
            part, draw, _ = PLOTS[plot]
            draw(results[part], PAGES / f"{name}_{plot}.png")
        summaries.append(summary(results, name))
    write_readme("\n\n".join(summaries))


if __name__ == "__main__":
    main()
