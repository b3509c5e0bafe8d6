"""Trains a LoRA of SANA's transformer on cached latents and cached text embeddings.

    pip install -e '.[diffusers]' transformers accelerate peft
    dcae-fast cache-latents photos/ --model MODEL/vae --resolution 1024 --buckets --format safetensors --out latents/
    python examples/train_sana_lora.py --model MODEL --latents latents/ --out lora/        # or: accelerate launch ...
    python examples/train_sana_lora.py --tiny                          # random weights and data, some seconds on a CPU

MODEL is a folder of weights: hf download Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers --local-dir MODEL
Captions are in .txt files beside the photographs. The first run computes their embeddings, and keeps them in
lora/texts.safetensors. Then `pipeline.load_lora_weights("lora/")` takes the result.
"""

import argparse
import inspect
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import SanaPipeline, SanaTransformer2DModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import dcae_fast
from dcae_fast.data.captions import load_captions
from dcae_fast.data.latents import LatentDataset
from dcae_fast.data.manifest import load_manifest
from dcae_fast.errors import DataError
from dcae_fast.files import written_atomically

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
SHIFT = 3.0  # of the noise, towards more noise, as in SANA's sampler
EMPTY = ""  # the caption of unconditional samples
Texts = dict[str, torch.Tensor]  # caption → its embedding [length, channels]


@dataclass
class Bucket:
    """Latents of one size, as items (latent [c, h, w], label), and their captions."""

    latents: Sequence
    captions: list[str]


def read(folder: Path) -> list[Bucket]:
    """The latents of cache-latents, with or without --buckets. A latent without a caption gets the empty one.

    Raises DataError.
    """
    manifest = load_manifest(folder)
    names = manifest.buckets if manifest and manifest.settings.buckets else [""]
    buckets = []
    for name in names:
        data, captions = LatentDataset(folder / name), load_captions(folder / name)
        buckets.append(Bucket(data, [captions.get(data.key(index), EMPTY) for index in range(len(data))]))
    if not buckets:
        raise DataError(f"{folder}: expected a folder written by `dcae-fast cache-latents`, found no latents")
    return buckets


@torch.no_grad()
def embed(model: str, captions: set[str], path: Path, device: torch.device) -> Texts:
    """The embeddings of the captions and of the empty one, from the file or, where it lacks some, from the model."""
    texts = load_file(path) if path.exists() else {}
    missing = sorted({*captions, EMPTY} - texts.keys())
    if missing:
        pipeline = SanaPipeline.from_pretrained(model, transformer=None, vae=None, torch_dtype=torch.bfloat16)
        pipeline.to(device)
        instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
        for text in missing:
            y, mask, *_ = pipeline.encode_prompt(
                text, do_classifier_free_guidance=False, device=device, complex_human_instruction=instruction
            )
            texts[text] = y[0, mask[0].bool()].cpu()
        with written_atomically(path) as temporary:
            save_file(texts, temporary)
    return texts


def batches(buckets: list[Bucket], texts: Texts, size: int, drop: float, rng: random.Random) -> Iterator[tuple]:
    """Endless batches (latents, texts padded with zeros, mask of the texts), each from one bucket. drop: captions."""
    while True:
        bucket = rng.choices(buckets, [len(each.captions) for each in buckets])[0]
        chosen = rng.choices(range(len(bucket.captions)), k=size)
        captions = [EMPTY if rng.random() < drop else bucket.captions[index] for index in chosen]
        y = torch.nn.utils.rnn.pad_sequence([texts[caption] for caption in captions], batch_first=True)
        lengths = torch.tensor([len(texts[caption]) for caption in captions])
        yield (
            torch.stack([bucket.latents[index][0] for index in chosen]),
            y,
            torch.arange(y.shape[1]) < lengths[:, None],
        )


def loss_of(transformer: torch.nn.Module, z: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The error of the velocity noise - z at (1 - s) z + s noise, for a random s of each sample."""
    s = torch.randn(len(z), device=z.device).sigmoid()
    s = SHIFT * s / (1 + (SHIFT - 1) * s)
    noise, weight = torch.randn_like(z), s[:, None, None, None]
    x = ((1 - weight) * z + weight * noise).to(next(transformer.parameters()).dtype)
    velocity = transformer(x, text.to(x.dtype), timestep=1000 * s, encoder_attention_mask=mask.to(x.dtype)).sample
    return F.mse_loss(velocity.float(), noise - z)


def tiny() -> tuple[SanaTransformer2DModel, list[Bucket], Texts]:
    """A network with random weights, random latents of two sizes, and random texts."""
    heads = {"num_attention_heads": 2, "attention_head_dim": 32, "num_cross_attention_heads": 2}
    sizes = {"cross_attention_head_dim": 32, "cross_attention_dim": 64, "caption_channels": 16, "sample_size": 2}
    transformer = SanaTransformer2DModel(4, 4, num_layers=2, **heads, **sizes)
    buckets = [Bucket([(torch.randn(4, *size), 0)] * 4, ["red", "blue"] * 2) for size in ((2, 3), (3, 2))]
    return transformer, buckets, {"red": torch.randn(3, 16), "blue": torch.randn(5, 16), EMPTY: torch.randn(1, 16)}


def load(options: argparse.Namespace, device: torch.device) -> tuple[SanaTransformer2DModel, list[Bucket], Texts]:
    """The network, the latents and the texts. Ends the program with an explanation if one of them cannot be had."""
    try:
        buckets = read(options.latents)
    except DataError as error:
        raise SystemExit(f"--latents: {error}") from error
    captions = {caption for bucket in buckets for caption in bucket.captions}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        texts = embed(options.model, captions, options.out / "texts.safetensors", device)
        transformer = SanaTransformer2DModel.from_pretrained(options.model, subfolder="transformer", torch_dtype=dtype)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"cannot load {options.model}: {error}\nWithout a network, download the model elsewhere (hf download "
            f"{options.model} --local-dir FOLDER), copy the folder to this machine, and pass --model FOLDER."
        ) from error
    return transformer, buckets, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="repository or folder of SANA, in the layout of diffusers")
    parser.add_argument("--latents", type=Path, help="folder written by cache-latents")
    parser.add_argument("--out", type=Path, help="folder for the LoRA and the embeddings of the captions")
    parser.add_argument("--tiny", action="store_true", help="try the program on random weights and data")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="latents per step and process (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate of AdamW (default: %(default)s)")
    parser.add_argument("--drop", type=float, default=0.1, help="share of captions left out (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--checkpoint-activations", action="store_true", help="compute each block again, for memory")
    options = parser.parse_args()
    if not options.tiny and None in (options.model, options.latents, options.out):
        parser.error("expected --model, --latents and --out, or --tiny")
    for name in ("rank", "batch", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: expected at least 1")
    if not 0 <= options.drop <= 1:
        parser.error(f"--drop {options.drop}: expected a number from 0 to 1")
    options.out = options.out or Path(tempfile.mkdtemp())
    options.out.mkdir(parents=True, exist_ok=True)
    train(options)


def train(options: argparse.Namespace) -> None:
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    torch.manual_seed(options.seed + accelerator.process_index)
    with accelerator.main_process_first():  # which computes the embeddings
        transformer, buckets, texts = tiny() if options.tiny else load(options, accelerator.device)
    transformer.requires_grad_(False).train()
    transformer.add_adapter(LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=TARGETS))
    cast_training_params(transformer)  # the adapter in float32
    if options.checkpoint_activations:
        transformer.enable_gradient_checkpointing()
    accelerator.print(dcae_fast.patch(transformer))
    weights = [weight for weight in transformer.parameters() if weight.requires_grad]
    model, optimizer = accelerator.prepare(transformer, torch.optim.AdamW(weights, options.lr))
    rng = random.Random(options.seed + accelerator.process_index)
    data = batches(buckets, texts, options.batch, options.drop, rng)
    for step in range(1, options.steps + 1):
        with accelerator.autocast():
            loss = loss_of(model, *(tensor.to(accelerator.device) for tensor in next(data)))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == options.steps:
            accelerator.print(f"step {step}: loss {loss.item():.4f}")
    if accelerator.is_main_process:
        SanaPipeline.save_lora_weights(options.out, get_peft_model_state_dict(transformer))
        print(f"the LoRA is in {options.out}")


if __name__ == "__main__":
    main()
