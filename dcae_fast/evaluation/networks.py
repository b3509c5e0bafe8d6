"""The pretrained networks that metrics need, as functions of uint8 pictures [n, 3, H, W].

`load` loads a network by name. If a package or a weight file is missing, MissingNetwork explains what to install.
"""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.constants import HF_HUB_CACHE

from dcae_fast import distributed

Network = Callable[..., torch.Tensor]
CLIP, CLIP_336 = "openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14-336"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
ALEXNET_FILE = "alexnet-owt-7be5be79.pth"


class MissingNetwork(RuntimeError):
    """A network is not available. The message names the missing package or file, and where to put it."""


def _source(name: str) -> dict[str, bool]:
    """Options of `from_pretrained`: only the local cache if the hub does not answer, which avoids long retries."""
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"))
    except Exception:  # offline mode, or an error of any HTTP library
        return {"local_files_only": True}
    return {}


def _ssim(device: torch.device) -> Network:
    """Structural similarity of each picture to its reference, [n], with torchmetrics' defaults. Needs no weights."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    def ssim(pictures: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        pictures, reference = pictures.float(), reference.float()
        return structural_similarity_index_measure(
            pictures, reference, data_range=(0.0, 255.0), reduction="none"
        ).flatten()

    return ssim


def _lpips(device: torch.device) -> Network:
    """LPIPS distance of each picture to its reference, [n], with AlexNet."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    net = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).net.to(device)

    def lpips(pictures: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        return net(pictures.float() / 255, reference.float() / 255, normalize=True).flatten()

    return lpips


def _clip_iqa(device: torch.device) -> Network:
    """CLIP-IQA as in torchmetrics: the probability of "Good photo." against "Bad photo.", [n].

    torchmetrics itself is not used: it only supports transformers before version 5.
    """
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    source = _source(CLIP)
    model = CLIPModel.from_pretrained(CLIP, **source).eval().to(device)
    processor = CLIPImageProcessor.from_pretrained(CLIP, **source)
    tokenizer = CLIPTokenizer.from_pretrained(CLIP, **source)
    prompts = tokenizer(["Good photo.", "Bad photo."], return_tensors="pt", padding=True).to(device)

    def clip_iqa(pictures: torch.Tensor) -> torch.Tensor:
        pixels = processor(images=list(pictures.cpu()), return_tensors="pt")["pixel_values"].to(device)
        out = model(pixel_values=pixels, **prompts)
        return (100 * out.image_embeds @ out.text_embeds.T).softmax(-1)[:, 0]

    return clip_iqa


def _inception(device: torch.device, *features: str):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    return FeatureExtractorInceptionV3("inception", list(features)).to(device)


def _fid(device: torch.device) -> Network:
    """The 2048 Inception features for FID, precision and recall.

    The network is torch-fidelity's, with the same weights as pytorch-fid's. Pictures are resized as in pytorch-fid and
    DC-Gen: bilinear with half-pixel centres. torch-fidelity would resize with TensorFlow's corner alignment.
    """
    import scipy.linalg  # noqa: F401  `frechet_distance` needs SciPy: fail before any picture is computed

    layers = dict(_inception(device, "2048").named_children())
    last = list(layers).index("AvgPool") + 1
    trunk = torch.nn.Sequential(*list(layers.values())[:last])

    def features(pictures: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(pictures.float() / 255, (299, 299), mode="bilinear", align_corners=False)
        return trunk(2 * x - 1).flatten(1)

    return features


def _inception_score(device: torch.device) -> Network:
    """Inception logits without bias, as in torch-fidelity."""
    network = _inception(device, "logits_unbiased")
    return lambda pictures: network(pictures)[0]


def _cmmd(device: torch.device) -> Network:
    """CLIP embeddings of unit length for CMMD. Pictures are resized to 336 pixels, bicubic without antialiasing."""
    from transformers import CLIPVisionModelWithProjection

    model = CLIPVisionModelWithProjection.from_pretrained(CLIP_336, **_source(CLIP_336)).eval().to(device)
    mean, std = (torch.tensor(each, device=device)[:, None, None] for each in (CLIP_MEAN, CLIP_STD))

    def embeddings(pictures: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(pictures.float() / 255, (336, 336), mode="bicubic", align_corners=False)
        return F.normalize(model(pixel_values=(x - mean) / std).image_embeds)

    return embeddings


LOADERS: dict[str, Callable[[torch.device], Network]] = {
    "ssim": _ssim,
    "lpips": _lpips,
    "clip_iqa": _clip_iqa,
    "fid": _fid,
    "inception_score": _inception_score,
    "cmmd": _cmmd,
}
INCEPTION = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
WEIGHTS = {
    "lpips": f"https://download.pytorch.org/models/{ALEXNET_FILE}",
    "clip_iqa": CLIP,
    "fid": INCEPTION,
    "inception_score": INCEPTION,
    "cmmd": CLIP_336,
}
SMALLEST = {"ssim": 11, "lpips": 31}  # pixels: the window of SSIM; the layers of AlexNet


def load(name: str, device: torch.device) -> Network:
    """Loads a network of `LOADERS` on a device. It computes without gradients. Raises MissingNetwork."""
    try:
        with _quiet():
            return torch.no_grad()(LOADERS[name](device))
    except ImportError as error:
        package = error.name or ("torchvision" if "torchvision" in str(error) else "that it needs")
        raise MissingNetwork(f"{name}: package {package} is not installed: pip install 'dcae_fast[eval]'") from error
    except (OSError, RuntimeError) as error:  # OSError includes URLError; RuntimeError: a broken download
        reason = str(error).partition("\n")[0]
        problem = f"cannot load the weights: {reason}\n  {_how_to_get(name)}" if name in WEIGHTS else reason
        raise MissingNetwork(f"{name}: {problem}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses warnings and log messages of the loaded libraries. Errors are still raised."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _how_to_get(name: str) -> str:
    """Instructions to get the weights of a network."""
    source = WEIGHTS[name]
    if source.startswith("https:"):
        return f"download {source}\n  into {Path(torch.hub.get_dir()) / 'checkpoints'}"
    folder = f"models--{source.replace('/', '--')}"
    return f"with internet access, run: hf download {source}\n  then copy {folder} from its cache into {HF_HUB_CACHE}"


def load_all(
    names: Iterable[str], device: torch.device, side: int | None = None
) -> tuple[dict[str, Network], dict[str, str]]:
    """The networks that all ranks can load, by name, and the reasons why the others are missing, by name.

    side: of square pictures, in pixels. Networks that cannot measure such small pictures are missing.
    The main process loads first, so that only one process downloads. The other ranks skip what the main process lacks.
    """
    too_small = {
        name: f"{name}: crops of {side} px; expected at least {SMALLEST[name]}"
        for name in names
        if side is not None and side < SMALLEST.get(name, 0)
    }
    names = [name for name in names if name not in too_small]
    found, missing = _load_each(names, device) if distributed.is_main() else ({}, {})
    missing = distributed.broadcast(missing)
    if not distributed.is_main():
        found, missing_here = _load_each([name for name in names if name not in missing], device)
        missing = missing | missing_here
    missing = {name: reason for each in distributed.all_gather(missing) for name, reason in each.items()}
    return {name: network for name, network in found.items() if name not in missing}, missing | too_small


def _load_each(names: Iterable[str], device: torch.device) -> tuple[dict[str, Network], dict[str, str]]:
    found, missing = {}, {}
    for name in names:
        try:
            found[name] = load(name, device)
        except MissingNetwork as error:
            missing[name] = str(error)
    return found, missing
