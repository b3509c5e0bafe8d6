"""The loss of training an autoencoder on crops of photographs: patched, eager, and eager with other random draws.

The autoencoder is f32c32-in-1.0 at a quarter of its width. "eager, other seed" draws other initial weights and other
crops: its difference from eager shows how much the loss depends on chance. On a GPU every step is a replay of a CUDA
graph, for all contenders.
"""

import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import dcae_fast
from dcae_fast.images import demo_photograph, to_tensor
from dcae_fast.training.autoencoder.network import PartlyTrained

from .autoencoder import release
from .autoencoder_losses import Losses, with_optimizer
from .autoencoder_training import InTraining, captured, passes
from .autoencoder_workloads import LOSS_CONTENDERS, LossWorkload
from .ceilings import Ceilings

STEPS, WINDOW = 1000, 50
LR = 1e-4
SEEDS = dict.fromkeys(LOSS_CONTENDERS, 0) | {"eager, other seed": 1}


def benchmark(workload: LossWorkload, device: torch.device, ceilings: Ceilings) -> dict:
    """The record: losses, means over windows of steps; difference, the largest relative difference from eager."""
    rows = {name: {"losses": losses(name, workload, device)} for name in workload.contenders}
    expected = rows["eager"]["losses"]
    for row in rows.values():
        row["difference"] = max(abs(a - b) / b for a, b in zip(row["losses"], expected, strict=True))
    return {"workload": workload.name, "window": WINDOW, "contenders": rows}


def losses(name: str, workload: LossWorkload, device: torch.device) -> list[float]:
    """The mean L1 losses of each window."""
    crops = Crops(workload, SEEDS[name], device)
    torch.manual_seed(SEEDS[name])
    with torch.device(device):
        model = PartlyTrained(workload.config())
    model.choose(("encoder", "decoder"))
    model.to(memory_format=torch.channels_last)
    if name == "patched":
        dcae_fast.patch(model)
    in_training = InTraining(with_optimizer(model, LR, capturable=True), Losses(False, device), None)
    images = crops.draw()
    gradients = passes(in_training, images)

    def step() -> torch.Tensor:
        loss, _ = gradients()
        in_training.model.update(LR)
        return loss

    step, found = captured(step), []
    for _ in range(STEPS):
        found.append(step().clone())
        images.copy_(crops.draw())
    release()
    return torch.stack(found).view(-1, WINDOW).mean(dim=1).tolist()


class Crops:
    """Batches of crops of three photographs, at random places and mirrored at random, on the device."""

    def __init__(self, workload: LossWorkload, seed: int, device: torch.device):
        self.batch, self.size = workload.batch, workload.size
        self.generator = torch.Generator().manual_seed(seed)
        photographs = [*map(Image.fromarray, load_sample_images().images), Image.open(demo_photograph())]
        self.photographs = [to_tensor(photograph.convert("RGB")).to(device) for photograph in photographs]

    def draw(self) -> torch.Tensor:
        """Crops [B, 3, size, size] in [-1, 1], channels-last."""
        crops = torch.cat([self._crop() for _ in range(self.batch)])
        return crops.contiguous(memory_format=torch.channels_last)

    def _crop(self) -> torch.Tensor:
        which, top, left, mirrored = torch.rand(4, generator=self.generator).tolist()
        photograph = self.photographs[int(which * len(self.photographs))]
        rows, columns = (length - self.size + 1 for length in photograph.shape[2:])
        top, left = int(top * rows), int(left * columns)
        crop = photograph[:, :, top : top + self.size, left : left + self.size]
        return crop.flip(3) if mirrored < 0.5 else crop
