"""Trains dc-ae-tiny-uvit-digits, the bundled diffusion model, from scratch: about five minutes on one H200.

    python examples/train_tiny_diffusion.py --out dc-ae-tiny-uvit-digits

The model is a class-conditional UViT on the latents of dc-ae-tiny. The pictures show the handwritten digits of
scikit-learn, which must be installed; see tiny_digits.py. Writes model.safetensors (float16), config.json and a model
card to the folder, and dc-ae-tiny-uvit-digits.png beside the folder: two samples per digit and guidance scale.
"""

from dataclasses import replace

import torch
from tiny_digits import CLASSES, Digits, Judge
from tiny_training import device_name, parse_options, train, whole_folder
from tqdm import tqdm

from dcae_fast.diffusion import DCAEDiffusion
from dcae_fast.images import grid, save_png, to_uint8
from dcae_fast.models import DCAE, UViT, UViTConfig, diffusion_checkpoint
from dcae_fast.models.diffusion_zoo import DPM_SOLVER, DiffusionConfig
from dcae_fast.sampling import OBJECTIVES

SIZE = 256  # of the pictures; 8x8 latents
CONFIG = DiffusionConfig(
    network=UViTConfig(
        in_channels=64, input_size=SIZE // 32, depth=6, hidden_size=192, num_heads=3, num_classes=CLASSES
    ),
    autoencoder="dc-ae-tiny",
    scaling_factor=1.0,  # replaced when the latents are known
    **DPM_SOLVER,
)
SCALES = (1.0, 3.0, 6.0)  # guidance scales in the model card


@torch.no_grad()
def encode(autoencoder: DCAE, digits: Digits, count: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unscaled latents [count, 64, 8, 8] and labels [count] of random pictures."""
    latents, labels = [], []
    for _ in tqdm(range(0, count, batch), desc="encoding", unit="batch"):
        x, y = digits.draw(batch)
        latents.append(autoencoder.encode(x))
        labels.append(y)
    return torch.cat(latents)[:count], torch.cat(labels)[:count]


def train_transformer(
    network: UViT, latents: torch.Tensor, labels: torch.Tensor, batch: int, minutes: float
) -> tuple[UViT, int]:
    """Trains `network` in place on scaled latents; returns the moving average of its weights and the step count."""
    objective, device = OBJECTIVES[CONFIG.train_scheduler], latents.device

    def draw_loss() -> torch.Tensor:
        chosen = torch.randint(len(latents), (batch,), device=device)
        z, t = latents[chosen], objective.draw_time(batch, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return objective.loss(network, z, labels[chosen], t, torch.randn_like(z))

    return train(network.train(), draw_loss, minutes)


@torch.inference_mode()
def draw(model: DCAEDiffusion, count: int, scale: float, steps: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` samples of each class, as pictures [B, 3, H, W] on the model's device, and their labels. Seed 0."""
    device = next(model.parameters()).device
    labels = torch.arange(CLASSES, device=device).repeat(count)
    z = model.generate(labels, cfg_scale=scale, generator=torch.Generator(device).manual_seed(0), steps=steps)
    return torch.cat([model.decode(part) for part in z.split(64)]), labels


CARD = """# dc-ae-tiny-uvit-digits

For demonstration only: a class-conditional UViT with {parameters:.2f} M parameters on the latents of dc-ae-tiny, to
try sampling without a download. Label n gives the digit n, on {size}x{size} pixels. It was trained from
scratch by `examples/train_tiny_diffusion.py` for {minutes:g} minutes ({steps} steps of {batch}) on {device},
on {pictures} pictures of {digits} handwritten digits of 8x8 pixels: enlarged, slightly rotated and stretched, in a
light colour on a dark one. It draws only digits, and they are as smooth as enlarged small digits.

Weights are stored as float16. The table gives the fraction of pictures that a classifier recognises as the
intended digit. The classifier is a support vector machine, trained on the shapes in such pictures. The model runs in
float32 with the weights as stored.

| pictures | recognised |
|---|---|
| held-out digits after dc-ae-tiny | {held_out:.1%} of {judged} |
{rows}

The digits come with scikit-learn: E. Alpaydin and C. Kaynak, *Optical Recognition of Handwritten Digits*, 1998, UCI
Machine Learning Repository, https://doi.org/10.24432/C50P49, under CC BY 4.0
(https://creativecommons.org/licenses/by/4.0/), changed as described above.
"""


def evaluate(model: DCAEDiffusion, device: torch.device, count: int, batches: int) -> dict[str, object]:
    """The quality for the card: accuracies of a judge, trained on `batches` batches, on `count` samples per class."""
    judge = Judge(Digits(SIZE, device), batches)
    x, labels = Digits(SIZE, device, held_out=True).draw(count * CLASSES)
    with torch.inference_mode():
        x = torch.cat([model.autoencoder(part) for part in x.split(64)])
    rows = [
        f"| samples, guidance {scale:g} | {judge.accuracy(*draw(model, count, scale)):.1%} of {count * CLASSES} |"
        for scale in SCALES
    ]
    return {"held_out": judge.accuracy(x, labels), "judged": len(labels), "rows": "\n".join(rows)}


def main() -> None:
    options = parse_options(__doc__, "minutes", 4.0, "training time")
    device, on_cuda = options.device, options.device.type == "cuda"
    pictures, batch = (49152, 512) if on_cuda else (64, 8)  # on a CPU, a rehearsal
    torch.manual_seed(0)

    digits, autoencoder = Digits(SIZE, device), DCAE.from_pretrained(CONFIG.autoencoder).to(device)
    latents, labels = encode(autoencoder, digits, pictures, min(batch, 128))
    config = replace(CONFIG, scaling_factor=round(1 / latents.square().mean().sqrt().item(), 4))
    network, steps = train_transformer(
        config.build().to(device), latents * config.scaling_factor, labels, batch, options.minutes
    )
    network = network.half().float()
    model = DCAEDiffusion(config, network, autoencoder).eval()
    facts = {"minutes": options.minutes, "steps": steps, "batch": batch, "pictures": pictures, "size": SIZE}
    facts |= {"digits": len(digits.labels), "parameters": sum(p.numel() for p in network.parameters()) / 1e6}
    facts |= evaluate(model, device, *((50, 100) if on_cuda else (1, 2)))
    text = CARD.format(**facts, device=device_name(device))
    sheet = torch.cat([draw(model, 2, scale)[0] for scale in SCALES])
    with whole_folder(options.out) as folder:
        diffusion_checkpoint.save(config, network.half(), folder)
        (folder / "README.md").write_text(text, encoding="utf-8")
    save_png(grid(to_uint8(sheet), CLASSES), options.out.with_name(f"{options.out.name}.png"))
    print(text)


if __name__ == "__main__":
    main()
