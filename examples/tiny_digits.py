"""Training pictures of dc-ae-tiny-uvit-digits, enlarged and coloured handwritten digits, and a classifier for them.

    python examples/tiny_digits.py --out digits

writes such pictures as PNG files, 2000 to digits/train and 200 of other handwritten digits to digits/held-out.

Digits suit the tiny autoencoder, which keeps broad shapes and colours and blurs fine detail. Everybody can tell the ten
classes apart. Each class has many handwritings, so that samples are new digits rather than copies. A classifier can
measure how many samples show the requested digit.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from dcae_fast.images import save_png, to_image

CLASSES = 10
HELD_OUT = 5  # every fifth digit is held out


def uniform(shape: tuple[int, ...], low: float, high: float, device: torch.device) -> torch.Tensor:
    return torch.empty(shape, device=device).uniform_(low, high)


class Digits:
    """Random batches of scikit-learn's digits (8x8, 16 shades), drawn on a device; held-out digits or all others."""

    def __init__(self, size: int, device: torch.device, held_out: bool = False):
        shades, labels = load_digits(return_X_y=True)
        chosen = (torch.arange(len(labels)) % HELD_OUT == 0) == held_out
        self.size, self.device = size, device
        self.shades = torch.from_numpy(shades).float().view(-1, 1, 8, 8)[chosen].to(device) / 16
        self.labels = torch.from_numpy(labels)[chosen].to(device)

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures [count, 3, size, size] in [-1, 1] and their labels [count].

        Each digit has a random light colour on a random dark background. Dark digits or shading would make the shapes
        much harder to learn for a small network.
        """
        chosen = torch.randint(len(self.labels), (count,), device=self.device)
        paper = uniform((count, 3, 1, 1), 0, 0.4, self.device)
        pen = uniform((count, 3, 1, 1), 0.75, 1, self.device)
        x = torch.lerp(paper, pen, self.enlarge(self.shades[chosen]))
        return x * 2 - 1, self.labels[chosen]

    def enlarge(self, shades: torch.Tensor) -> torch.Tensor:
        """[B, 1, 8, 8] → ink [B, 1, size, size] in [0, 1], randomly rotated, shifted and stretched by small amounts."""
        count, device = len(shades), self.device
        turn = uniform((count, 1, 1), -0.12, 0.12, device)
        zoom = torch.exp(uniform((count, 1, 1), math.log(1.1), math.log(1.35), device))
        stretch = torch.exp(uniform((count, 1, 1), -0.12, 0.12, device))
        line = torch.linspace(-1, 1, self.size, device=device)
        v, u = torch.meshgrid(line, line, indexing="ij")
        u, v = u * zoom * stretch, v * zoom / stretch
        place = torch.stack([turn.cos() * u - turn.sin() * v, turn.sin() * u + turn.cos() * v], dim=3)
        place = place + uniform((count, 1, 1, 2), -0.12, 0.12, device)
        smooth = F.grid_sample(shades, place, mode="bicubic", align_corners=False)
        return torch.sigmoid(20 * (smooth - 0.5))


class Judge:
    """A classifier of these pictures that sees only the shape: a support vector machine on 16x16 maps of the ink."""

    def __init__(self, digits: Digits, batches: int, batch: int = 100):
        maps, labels = [], []
        for _ in range(batches):
            x, y = digits.draw(batch)
            maps.append(self.ink(x))
            labels.append(y.cpu().numpy())
        self.machine = SVC().fit(np.concatenate(maps), np.concatenate(labels))

    def accuracy(self, x: torch.Tensor, labels: torch.Tensor) -> float:
        """The fraction of the pictures [B, 3, H, W] that are classified as their labels [B]."""
        return self.machine.score(self.ink(x), labels.cpu().numpy())

    @staticmethod
    def ink(x: torch.Tensor) -> np.ndarray:
        """Pictures [B, 3, H, W] → maps of the ink [B, 256]. Ink is lighter than middle grey."""
        light = (x.float().mean(dim=1, keepdim=True) > 0).float()
        return F.adaptive_avg_pool2d(light, 16).flatten(1).cpu().numpy()


def write_pictures(folder: Path, count: int, size: int, held_out: bool) -> None:
    """Writes random pictures as PNG files. Seed 0."""
    torch.manual_seed(0)
    digits = Digits(size, torch.device("cpu"), held_out)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        save_png(to_image(digits.draw(1)[0]), folder / f"{number:04d}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes pictures of handwritten digits.")
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--count", type=int, default=2000, help="pictures to train on (default: %(default)s)")
    options = parser.parse_args()
    write_pictures(options.out / "train", options.count, 256, held_out=False)
    write_pictures(options.out / "held-out", max(1, options.count // 10), 256, held_out=True)


if __name__ == "__main__":
    main()
