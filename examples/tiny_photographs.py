"""Training pictures of dc-ae-tiny: a few free photographs, and random augmented crops of them, computed on the GPU."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tiny_training import whole_folder
from tqdm import tqdm

from dcae_fast.images import to_image, to_tensor


@dataclass(frozen=True)
class Photograph:
    """A file in an installed package. weight: relative frequency in training, 0 if held out."""

    package: str
    path: str
    credit: str
    weight: float

    def open(self) -> Image.Image:
        with as_file(files(self.package) / self.path) as path, Image.open(path) as image:
            return image.convert("RGB")

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2].partition(".")[0]

    @property
    def is_held_out(self) -> bool:
        return self.weight == 0


PHOTOGRAPHS = (
    Photograph("skimage", "data/chelsea.png", "Stéfan van der Walt, CC0", 0),
    Photograph("skimage", "data/rocket.jpg", "SpaceX, public domain", 0),
    Photograph("skimage", "data/astronaut.png", "NASA, public domain", 1),
    Photograph("skimage", "data/coffee.png", "Rachel Michetti, courtesy of Pikolo Espresso Bar, CC0", 1),
    Photograph("sklearn", "datasets/images/china.jpg", "danielbuechele (Flickr), CC BY 2.0", 1),
    Photograph("sklearn", "datasets/images/flower.jpg", "vultilion (Flickr), CC BY 2.0", 1),
    Photograph("skimage", "data/hubble_deep_field.jpg", "NASA, public domain", 0.4),
    Photograph("skimage", "data/retina.jpg", "Mikael Häggström, CC0", 0.4),
    Photograph("skimage", "data/ihc.png", "Center for Microscopy And Molecular Imaging, no known restrictions", 0.3),
    Photograph("skimage", "data/camera.png", "Lav Varshney, CC0", 0.6),
    Photograph("skimage", "data/coins.png", "Brooklyn Museum, no known restrictions", 0.3),
    Photograph("skimage", "data/brick.png", "CC0Textures, CC0", 0.2),
    Photograph("skimage", "data/grass.png", "linolafett (DeviantArt), CC0", 0.2),
    Photograph("skimage", "data/gravel.png", "CC0Textures, CC0", 0.2),
)


def write_held_out(folder: Path) -> None:
    """Writes the held-out photographs to a folder, as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for photograph in PHOTOGRAPHS:
        if photograph.is_held_out:
            photograph.open().save(folder / f"{photograph.name}.png")


def write_pictures(folder: Path, size: int, count: int, device: torch.device) -> None:
    """Writes augmented crops of the photographs that are not held out, as JPEG files, to a new folder. Seed 0.

    JPEG files with full chroma and high quality are read several times as fast as PNG files.
    """
    torch.manual_seed(0)
    crops = Crops([photograph for photograph in PHOTOGRAPHS if not photograph.is_held_out], size, device)
    with whole_folder(folder) as part, ThreadPoolExecutor() as threads:

        def save(number: int, x: torch.Tensor) -> None:
            to_image(x[None]).save(part / f"{number:06d}.jpg", quality=95, subsampling=0)

        for first in tqdm(range(0, count, 16), desc=folder.name, unit="batch"):
            numbers = range(first, min(first + 16, count))
            list(threads.map(save, numbers, crops.draw(len(numbers)).cpu()))


def uniform(count: int, low: float, high: float, device: torch.device) -> torch.Tensor:
    """[count, 1, 1, 1] draws from [low, high), one for each picture of a batch."""
    return torch.empty(count, 1, 1, 1, device=device).uniform_(low, high)


def chance(count: int, probability: float, device: torch.device) -> torch.Tensor:
    """[count, 1, 1, 1] booleans, true with the given probability."""
    return uniform(count, 0, 1, device) < probability


class Crops:
    """Batches of augmented crops of the photographs, drawn on the device that holds them.

    One tall sheet contains all photographs, each at several sizes, so that a batch needs only one `grid_sample`.
    """

    ZOOMS = (1.0, 0.7, 0.5, 0.35)
    MARGIN = 3  # repeated pixels around each photograph, for the bicubic filter

    def __init__(self, photographs: list[Photograph], size: int, device: torch.device):
        self.size, self.device = size, device
        tiles, weights = [], []
        for photograph in photographs:
            image = photograph.open()
            sizes = [(round(image.width * zoom), round(image.height * zoom)) for zoom in self.ZOOMS]
            sizes = [wh for wh in sizes if min(wh) >= size // 2]
            for wh in sizes:
                tile = to_tensor(image.resize(wh, Image.Resampling.LANCZOS))
                tiles.append(F.pad(tile, [self.MARGIN] * 4, mode="replicate"))
                weights.append(photograph.weight / len(sizes))
        width = max(tile.shape[3] for tile in tiles)
        boxes, top = [], 0
        for tile in tiles:
            inner = (tile.shape[3] - 2 * self.MARGIN, tile.shape[2] - 2 * self.MARGIN)
            boxes.append((self.MARGIN, top + self.MARGIN, *inner))
            top += tile.shape[2]
        self.sheet = torch.cat([F.pad(tile, (0, width - tile.shape[3])) for tile in tiles], dim=2).to(device)
        self.boxes = torch.tensor(boxes, dtype=torch.float32, device=device)
        self.weights = torch.tensor(weights, device=device)

    def draw(self, count: int) -> torch.Tensor:
        """Random pictures [count, 3, size, size] in [-1, 1]."""
        x = (self.cut(count) * 0.5 + 0.5).clamp(0, 1)
        x = collage(x)
        x = torch.where(chance(count, 0.6, self.device), recolour(x), x)
        return x * 2 - 1

    def cut(self, count: int) -> torch.Tensor:
        """Crops with random position, scale, stretch, rotation and mirroring; reflected beyond the photograph."""
        box = self.boxes[torch.multinomial(self.weights, count, replacement=True)]
        corner, extent = box[:, None, None, :2], box[:, None, None, 2:]
        step = torch.exp(uniform(count, math.log(0.75), math.log(1.3), self.device))  # source pixels per pixel
        stretch = torch.exp(uniform(count, -0.15, 0.15, self.device))
        turn = torch.randint(4, (count, 1, 1, 1), device=self.device) * (math.pi / 2)
        turn = turn + torch.where(chance(count, 0.3, self.device), uniform(count, -0.3, 0.3, self.device), 0)
        mirror = torch.where(chance(count, 0.5, self.device), 1, -1)
        line = torch.arange(self.size, device=self.device) - (self.size - 1) / 2
        v, u = torch.meshgrid(line, line, indexing="ij")
        u, v = u[None, :, :, None] * step * stretch * mirror, v[None, :, :, None] * step / stretch
        offset = torch.cat([turn.cos() * u - turn.sin() * v, turn.sin() * u + turn.cos() * v], dim=3)
        slack = (extent - self.size * step).clamp_min(0)
        point = extent / 2 + slack * (torch.rand(count, 1, 1, 2, device=self.device) - 0.5) + offset
        point = point.abs() % (2 * extent)
        point = corner + torch.minimum(point, 2 * extent - point)
        sides = torch.tensor([self.sheet.shape[3], self.sheet.shape[2]], device=self.device)
        grid = (point / sides * 2 - 1).reshape(1, count * self.size, self.size, 2)
        x = F.grid_sample(self.sheet, grid, mode="bicubic", padding_mode="border", align_corners=False)
        return x.view(3, count, self.size, self.size).transpose(0, 1)


def collage(x: torch.Tensor) -> torch.Tensor:
    """Fills an ellipse or half-plane in a third of the pictures with another picture or with a pattern."""
    count, device = len(x), x.device
    u, v = coordinates(x)
    turn = uniform(count, 0, 2 * math.pi, device)
    a = u * turn.cos() + v * turn.sin() - uniform(count, -0.6, 0.6, device)
    b = v * turn.cos() - u * turn.sin() - uniform(count, -0.6, 0.6, device)
    ellipse = 1 - (a / uniform(count, 0.15, 1, device)).square() - (b / uniform(count, 0.15, 1, device)).square()
    inside = torch.where(chance(count, 0.5, device), ellipse, a)
    softness = torch.exp(uniform(count, math.log(0.005), math.log(0.2), device))
    filling = torch.where(chance(count, 0.5, device), x.roll(1, 0), pattern(x))
    strength = torch.where(chance(count, 0.7, device), 1, uniform(count, 0, 1, device))
    composed = torch.lerp(x, filling, strength * torch.sigmoid(inside / softness))
    return torch.where(chance(count, 1 / 3, device), composed, x)


def pattern(x: torch.Tensor) -> torch.Tensor:
    """A colour gradient with a sine grating, for each picture of x."""
    count, device = len(x), x.device
    u, v = coordinates(x)
    base, slope_u, slope_v, wave = torch.rand(4, count, 3, 1, 1, device=device)
    cycles = torch.exp(uniform(count, math.log(1), math.log(x.shape[-1] / 6), device))
    turn, phase = uniform(count, 0, 2 * math.pi, device), uniform(count, 0, 2 * math.pi, device)
    grating = torch.sin(math.pi * cycles * (u * turn.cos() + v * turn.sin()) + phase)
    grating = grating * torch.where(chance(count, 0.5, device), uniform(count, 0, 0.4, device), 0)
    return (base + (slope_u - 0.5) * u + (slope_v - 0.5) * v + wave * grating).clamp(0, 1)


def recolour(x: torch.Tensor) -> torch.Tensor:
    """Randomly permutes channels, changes gamma, contrast, brightness and saturation, and inverts a tenth of x."""
    count, device = len(x), x.device
    order = torch.rand(count, 3, device=device).argsort(1)
    shuffled = x[torch.arange(count, device=device)[:, None], order]
    x = torch.where(chance(count, 0.5, device), shuffled, x)
    x = x.clamp_min(1e-3) ** torch.exp(torch.empty(count, 3, 1, 1, device=device).uniform_(-0.4, 0.4))
    middle = x.mean(dim=(1, 2, 3), keepdim=True)
    x = (x - middle) * uniform(count, 0.6, 1.4, device) + middle + uniform(count, -0.2, 0.2, device)
    grey = x.mean(dim=1, keepdim=True)
    x = torch.lerp(grey, x, uniform(count, 0, 1.6, device)).clamp(0, 1)
    return torch.where(chance(count, 0.1, device), 1 - x, x)


def coordinates(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns [1, 1, 1, W] and rows [1, 1, H, 1] from -1 to 1."""
    height, width = x.shape[-2:]
    u = torch.linspace(-1, 1, width, device=x.device).view(1, 1, 1, width)
    return u, torch.linspace(-1, 1, height, device=x.device).view(1, 1, height, 1)
