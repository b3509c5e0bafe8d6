"""The pretrained networks that metrics need, from kept libraries: functions of uint8 pictures [n, 3, H, W].

Each is loaded by name with `load`; where a package or a weight file is absent, MissingNetwork says what to do.
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
    """A network that cannot be had; the message says which package or file is missing, and where it goes."""


def _source(name: str) -> dict[str, bool]:
    """Options of `from_pretrained`: if the hub does not answer, the cache alone instead of a minute of asking again."""
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"))
    except Exception:  # of whichever library it uses, or because it is told to be offline
        return {"local_files_only": True}
    return {}


def _ssim(device: torch.device) -> Network:
    """Structural similarity of each picture and its reference, [n], with torchmetrics' defaults; it has no weights."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    def ssim(pictures: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        pictures, reference = pictures.float(), reference.float()
        return structural_similarity_index_measure(
            pictures, reference, data_range=(0.0, 255.0), reduction="none"
        ).flatten()

    return ssim


def _lpips(device: torch.device) -> Network:
    """LPIPS of each picture and its reference, [n], by AlexNet."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    net = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).net.to(device)

    def lpips(pictures: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        return net(pictures.float() / 255, reference.float() / 255, normalize=True).flatten()

    return lpips


def _clip_iqa(device: torch.device) -> Network:
    """The probability of "Good photo." against "Bad photo.", [n], as torchmetrics computes CLIP-IQA.

    Not by torchmetrics, which reads the outputs of transformers before version 5.
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
    """Inception's 2048 features, for FID, precision and recall.

    torch-fidelity's network, on pictures resized as pytorch-fid and the original do: bilinear with half-pixel centres,
    where torch-fidelity's own resizing has TensorFlow's corners. Weights are the same file, by another name.
    """
    import scipy.linalg  # noqa: F401  for the distance: better missing now than after all the pictures

    layers = dict(_inception(device, "2048").named_children())
    last = list(layers).index("AvgPool") + 1
    trunk = torch.nn.Sequential(*list(layers.values())[:last])

    def features(pictures: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(pictures.float() / 255, (299, 299), mode="bilinear", align_corners=False)
        return trunk(2 * x - 1).flatten(1)

    return features


def _inception_score(device: torch.device) -> Network:
    """Inception's logits without bias, as torch-fidelity computes them."""
    network = _inception(device, "logits_unbiased")
    return lambda pictures: network(pictures)[0]


def _cmmd(device: torch.device) -> Network:
    """CLIP's embeddings of unit length, for CMMD: bicubic to 336 without antialiasing."""
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


def load(name: str, device: torch.device) -> Network:
    """One of `LOADERS` on a device, without gradients. Raises MissingNetwork."""
    try:
        with _quiet():
            return torch.no_grad()(LOADERS[name](device))
    except ImportError as error:
        package = error.name or ("torchvision" if "torchvision" in str(error) else "for it")
        raise MissingNetwork(f"{name}: no package {package}: pip install 'dcae_fast[eval]'") from error
    except (OSError, RuntimeError) as error:  # URLError is an OSError; RuntimeError: a broken download
        reason = str(error).partition("\n")[0]
        what = f"its weights cannot be loaded: {reason}\n  {_where(name)}" if name in WEIGHTS else reason
        raise MissingNetwork(f"{name}: {what}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings and log messages of libraries that are imported; what matters is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _where(name: str) -> str:
    source = WEIGHTS[name]
    if source.startswith("https:"):
        return f"put {source}\n  into {Path(torch.hub.get_dir()) / 'checkpoints'}"
    folder = f"models--{source.replace('/', '--')}"
    return f"with a connection run: hf download {source}\n  and copy {folder} from its cache into {HF_HUB_CACHE}"


def load_all(names: Iterable[str], device: torch.device) -> tuple[dict[str, Network], dict[str, str]]:
    """Those networks that all ranks have, and of the others what `MissingNetwork` says.

    The main process comes first, so that only one downloads, and the others do not look for what it did not find.
    """
    found, missing = _load_each(names, device) if distributed.is_main() else ({}, {})
    missing = distributed.broadcast(missing)
    if not distributed.is_main():
        found, lacking = _load_each([name for name in names if name not in missing], device)
        missing = missing | lacking
    missing = {name: reason for each in distributed.all_gather(missing) for name, reason in each.items()}
    return {name: network for name, network in found.items() if name not in missing}, missing


def _load_each(names: Iterable[str], device: torch.device) -> tuple[dict[str, Network], dict[str, str]]:
    found, missing = {}, {}
    for name in names:
        try:
            found[name] = load(name, device)
        except MissingNetwork as error:
            missing[name] = str(error)
    return found, missing
