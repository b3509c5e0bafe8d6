"""Draws a picture from a text with SANA, and tells how long it takes, patched and unpatched.

    pip install -e '.[diffusers]' transformers
    python examples/sana.py "a lighthouse in a storm, oil on canvas" --out lighthouse.png

The weights come from the Hugging Face hub at the first run. In bf16 they take 9 GB of memory.
"""

import argparse
import time
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, SanaPipeline

import dcae_fast
from dcae_fast.images import save_png

MODEL = "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"


def load(model: str) -> DiffusionPipeline:
    """The pipeline in bf16. Ends the program with an explanation if its weights cannot be had."""
    try:
        return SanaPipeline.from_pretrained(model, torch_dtype=torch.bfloat16)
    except (OSError, ValueError) as error:  # ValueError: no such folder, and no name of a repository
        raise SystemExit(
            f"cannot load {model}: {error}\nWithout a network, download the model elsewhere (hf download {model}"
            " --local-dir FOLDER), copy the folder to this machine, and pass --model FOLDER."
        ) from error


def draw(pipeline: DiffusionPipeline, options: argparse.Namespace):
    """A picture, and the seconds that it took."""
    generator = torch.Generator().manual_seed(options.seed)
    size = {"height": options.size, "width": options.size}
    start = time.perf_counter()
    picture = pipeline(options.text, num_inference_steps=options.steps, generator=generator, **size).images[0]
    return picture, time.perf_counter() - start  # the picture is on the CPU, so the GPU has finished


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="what to draw")
    parser.add_argument("--model", default=MODEL, help="repository or folder (default: %(default)s)")
    parser.add_argument("--size", type=int, default=1024, help="height and width in pixels (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps of the sampler (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("sana.png"), help="PNG file (default: %(default)s)")
    options = parser.parse_args()
    if options.size <= 0 or options.size % 32:
        parser.error(f"--size {options.size}: expected a multiple of 32")
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: expected at least 1")
    if not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: no folder {options.out.parent}")
    pipeline = load(options.model).to("cuda" if torch.cuda.is_available() else "cpu")
    draw(pipeline, options)  # chooses kernels
    print(f"unpatched: {draw(pipeline, options)[1]:.2f} s")
    print(dcae_fast.patch(pipeline, cuda_graphs=True, frozen=True))
    for _ in range(2):  # compile and choose kernels, then capture CUDA graphs
        draw(pipeline, options)
    picture, seconds = draw(pipeline, options)
    print(f"patched: {seconds:.2f} s")
    save_png(picture, options.out)
    print(f"the picture is in {options.out}")


if __name__ == "__main__":
    main()
