"""python -m benchmarks.report: the README's table, a page with everything that was measured, and the plots.

All of it comes from benchmarks/results; nothing is measured.
"""

import textwrap
from pathlib import Path

from dcae_fast.files import written_atomically

from . import plots, tables
from .network_workloads import NETWORK_WORKLOADS
from .results import RESULTS, ROOT, read
from .targets import VERDICTS, headline
from .workloads import WORKLOADS

README = ROOT / "README.md"
PAGES = ROOT / "docs" / "benchmarks"
START, END = "<!-- benchmark -->", "<!-- /benchmark -->"
Results = dict[str, list[dict]]  # part → records

PLOTS = {  # name of the file → part, what draws it, title
    "speed": ("autoencoder", plots.speed, "Time of each contender against the floor"),
    "memory": ("memory", plots.memory, "Peak memory and time against the size of the image"),
    "transformer": ("transformer", plots.networks, "Transformer, forward: share of the ceiling"),
    "training": ("training", plots.networks, "Transformer, training step: share of the ceiling"),
    "loss": ("loss-curve", plots.losses, "Loss of a small transformer in training"),
}
SECTIONS = {  # heading → part, table
    "All contenders": ("autoencoder", tables.contender_table),
    "Memory": ("memory", tables.memory_table),
    "First calls": ("first-call", tables.first_call_table),
    "Operators": ("operators", tables.operator_table),
    "Diffusion transformers": ("transformer", tables.network_table),
    "Training steps": ("training", tables.network_table),
    "Sampling": ("sampling", tables.network_table),
    "Loss of a training": ("loss-curve", tables.loss_table),
    "Commands": ("pipeline", tables.pipeline_table),
}
EXPLANATION = """bf16, random weights; a large matrix product runs at {rate} TFLOP/s. """
AUTOENCODER_EXPLANATION = """Milliseconds of one call, medians over calls in which the contenders take turns. eager
is the model as loaded; torch.compile and patched have channels-last weights and input. eager and torch.compile run with
torch.backends.cudnn.benchmark. The floor is the plain model's arithmetic at the rate of a large matrix product in the
same run. The last two columns compare the faster patched contender with the fastest form of eager and of torch.compile
that was measured, whatever the memory format and the mode."""
UNFAIR = " Rows with † were measured earlier, without that flag."
PAGE_EXPLANATION = """An error is the relative L2 error against fp32 (TF32 under Memory). Peak GiB is what one call
allocates at the most; weights and the memory that a captured graph keeps do not count. "of ceiling" is the share of the
measured copy's bandwidth, for convolutions of the matrix product's rate. Under First calls every call is the first of a
fresh process; in the other tables a first call compiles and chooses what no contender before it did."""
NETWORK_EXPLANATION = """Diffusion transformers run under autocast to bf16 over random fp32 weights. eager is as the
original runs them, which casts q, k and v up and down again; torch.compile is that, compiled block by block; plain is
this project's network without these casts. "over eager" and "over compile" compare with the fastest of each. MFU is
the plain network's arithmetic in the time of a call, three times the forward's for a training step, as a share of the
measured ceiling. Errors are relative to fp32: of the result, for a training step of its gradients. Peak GiB of a
training step counts everything, weights and optimizer included. In training one contender has the memory to itself,
so that they do not take turns; eager measured again after the others took {drift} of its time. A step of sampling is
one call of the network on both halves of the guidance, and the update; samples are all steps, and the decoder, of
which the arithmetic is not counted."""
PIPELINE_EXPLANATION = """Commands run as a user starts them, on random pictures, latents and weights, with the batch of
each GPU in their names. Scaling is the share of as many times the images/s of one GPU. Waited is the share of the time
in which the GPU had no data."""


def load(path: Path) -> Results:
    """A results file, workloads in the registry's order."""
    results = read(path)
    for part, workloads in (WORKLOADS | NETWORK_WORKLOADS).items():
        order = {workload.name: index for index, workload in enumerate(workloads)}
        results.get(part, []).sort(key=lambda record: order.get(record["workload"], len(order)))
    return results


def paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def stamps(results: Results, name: str) -> str:
    """What the stamps of the records say under that name."""
    values = [record["stamp"].get(name) for records in results.values() for record in records]
    return ", ".join(dict.fromkeys(str(value) for value in values if value))


def setting(results: Results) -> str:
    """Machine, versions and what the figures mean."""
    records = [record for records in results.values() for record in records]
    date = max(record["stamp"]["date"] for record in records)[:10]
    rates = sorted({f"{record['ceilings']['tflops']:.0f}" for record in records})
    versions = ", ".join(f"{name} {stamps(results, name.lower())}" for name in ("torch", "cuDNN", "triton", "commit"))
    rate = " to ".join(dict.fromkeys((rates[0], rates[-1])))
    explained, autoencoders = EXPLANATION.format(rate=rate), results.get("autoencoder", [])
    explained += AUTOENCODER_EXPLANATION if autoencoders else ""
    explained += "" if all(map(tables.is_fair, autoencoders)) else UNFAIR
    return paragraph(f"One {stamps(results, 'gpu')}, {versions}, {date}; {explained}")


def verdict(results: Results, link: str) -> str:
    """Errors, and how many of the targets are met."""
    verdicts = [outcome.verdict for outcome in tables.outcomes(results)]
    counts = ", ".join(f"{verdicts.count(kind)} {kind}" for kind in VERDICTS if kind in verdicts)
    worst = [
        f"{max(errors):.1e} {name}"
        for name in ("patched channels-last", "eager")
        if (
            errors := [row["error"] for row in tables.rows_of(results.get("autoencoder", []), name) if row.get("error")]
        )
    ]
    errors = f"Relative error against fp32: at most {', '.join(worst)}. " if worst else ""
    return paragraph(
        f"{errors}Of the project's targets: {counts}. "
        f"[Everything that was measured]({link}): all contenders, memory, first calls, operators, targets, profiles."
    )


def plots_of(results: Results) -> list[str]:
    """Those of PLOTS that there are results for; a curve needs two sizes."""
    sizes = {record["size"] for record in results.get("memory", [])}
    return [plot for plot, (part, *_) in PLOTS.items() if results.get(part) and (part != "memory" or len(sizes) > 1)]


def images(results: Results, folder: str) -> list[str]:
    return [f"![{PLOTS[plot][2]}]({folder}_{plot}.png)" for plot in plots_of(results)]


def speed(results: Results) -> list[str]:
    return [tables.speed_table(results["autoencoder"])] if results.get("autoencoder") else []


def ratios(results: Results) -> list[str]:
    """The paper's headline, where it was measured."""
    records = headline(results)
    return [tables.headline_table(records)] if records else []


def network_explanation(results: Results) -> list[str]:
    records = [record for part in NETWORK_WORKLOADS for record in results.get(part, [])]
    drifts = [record["drift"] for record in records if "drift" in record]
    drift = f"{min(drifts):.0%} to {max(drifts):.0%}" if drifts else "(not measured)"
    return [paragraph(NETWORK_EXPLANATION.format(drift=drift))] if records else []


def summary(results: Results, name: str) -> str:
    """What the README says of one machine."""
    path = f"{PAGES.relative_to(README.parent).as_posix()}/{name}"
    ours = [*speed(results), *ratios(results), *images(results, path), verdict(results, f"{path}.md")]
    return "\n\n".join([setting(results), *ours])


def page(results: Results, name: str) -> str:
    """Everything that was measured on one machine."""
    parts = [f"# Benchmarks on {stamps(results, 'gpu')}", "Written by `make bench-report`.", setting(results)]
    parts += [*speed(results), *images(results, name), paragraph(PAGE_EXPLANATION)]
    parts += [*network_explanation(results), *ratios(results)]
    parts += [paragraph(PIPELINE_EXPLANATION)] if results.get("pipeline") else []
    parts += ["## Targets", tables.target_table(results)]
    for heading, (part, table) in SECTIONS.items():
        if results.get(part):
            parts += [f"## {heading}", table(results[part])]
    for record in results.get("profile", []):
        parts += [f"## Profile of {record['workload']}, {record['contender']}"]
        parts += [tables.profile_table(record), tables.kernel_table(record)]
    return "\n\n".join(parts) + "\n"


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
