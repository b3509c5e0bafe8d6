"""Patched pipelines of SANA draw the pictures of unpatched ones, also with what diffusers offers beside the call."""

import json

import pytest
import torch
from small_models import DEVICE
from torch import nn

import dcae_fast
from dcae_fast.fast.module import is_fast

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
from accelerate import cpu_offload
from diffusers import (
    AutoencoderDC,
    FlowMatchEulerDiscreteScheduler,
    SanaControlNetModel,
    SanaControlNetPipeline,
    SanaPAGPipeline,
    SanaPipeline,
    SanaTransformer2DModel,
)

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_cross_attention_heads": 2}
HEADS |= {"cross_attention_head_dim": 16, "cross_attention_dim": 32}
TRANSFORMER = HEADS | {"in_channels": 4, "out_channels": 4, "num_layers": 2, "caption_channels": 8, "mlp_ratio": 1.5}
CODER = {"block_types": ("ResBlock", "EfficientViTBlock"), "block_out_channels": (8, 8), "layers_per_block": (1, 1)}
CODER |= {"qkv_multiscales": ((), ())}
TARGETS = ["attn1.to_q", "attn2.to_out.0", "ff.conv_inverted"]


def build(cls: type = SanaPipeline, **components) -> SanaPipeline:
    """A pipeline with random weights, always the same."""
    torch.manual_seed(0)
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in CODER.items()}
    samplers = {"upsample_block_type": "interpolate", "downsample_block_type": "stride_conv"}
    parts = {
        "tokenizer": None,
        "text_encoder": None,
        "vae": AutoencoderDC(latent_channels=4, attention_head_dim=8, **sides, **samplers).eval(),
        "transformer": SanaTransformer2DModel(**TRANSFORMER, sample_size=4).eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }
    pipeline = cls(**parts, **components).to(DEVICE)
    pipeline.vae_scale_factor = 8  # pretended, for small latents: 4 × 4
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline() -> SanaPipeline:
    """A patched pipeline."""
    pipeline = build()
    dcae_fast.patch(pipeline)
    return pipeline


def draw(pipeline: SanaPipeline, **others) -> torch.Tensor:
    """A picture, with classifier-free guidance."""
    generator = torch.Generator().manual_seed(3)
    texts = {name: torch.randn(1, 5, 8, generator=generator) for name in ("prompt_embeds", "negative_prompt_embeds")}
    masks = {"prompt_attention_mask": [[1, 1, 1, 1, 0]], "negative_prompt_attention_mask": [[1, 1, 0, 0, 0]]}
    options = {"height": 32, "width": 32, "num_inference_steps": 1, "use_resolution_binning": False}
    return pipeline(
        negative_prompt=None,
        generator=generator,
        output_type="pt",
        **{name: value.to(DEVICE) for name, value in texts.items()},
        **{name: torch.tensor(value, device=DEVICE) for name, value in masks.items()},
        **options | others,
    ).images


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert want.isfinite().all() and want.std() > 0.01
    assert (got - want).norm() <= 1e-5 * want.norm()


def count(module: nn.Module) -> int:
    return sum(map(is_fast, module.modules()))


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    """What the unpatched pipeline draws."""
    return draw(build())


def test_patch_and_unpatch(pipeline, picture):
    seen = []

    def callback(pipeline, step, time, tensors):
        seen.append(step)
        return tensors

    assert_same(draw(pipeline, callback_on_step_end=callback), picture)
    assert seen == [0] and count(pipeline.vae) and count(pipeline.transformer)
    report = dcae_fast.patch(pipeline)
    assert report.components.keys() == {"vae", "transformer"}
    assert report.components["transformer"].replaced == {
        "GLUMBConv": 2, "SanaModulatedNorm": 1, "SanaTransformerBlock": 2
    }  # fmt: skip
    dcae_fast.unpatch(pipeline)
    assert not count(pipeline.vae) + count(pipeline.transformer) and torch.equal(draw(pipeline), picture)


def offload_model(pipeline: SanaPipeline) -> None:
    pipeline.enable_model_cpu_offload(device=DEVICE)


def offload_leaves(pipeline: SanaPipeline) -> None:
    pipeline.enable_group_offload(torch.device(DEVICE), torch.device("cpu"), "leaf_level")


def offload_blocks(pipeline: SanaPipeline) -> None:
    """Without the autoencoder, whose first layers diffusers loads in AutoencoderDC.forward but not in decode."""
    pipeline.enable_group_offload(
        torch.device(DEVICE), torch.device("cpu"), "block_level", num_blocks_per_group=1, exclude_modules="vae"
    )


@pytest.mark.parametrize("first", ["patch", "offload"])
@pytest.mark.parametrize("offload", [offload_model, offload_leaves, offload_blocks])
def test_offloading(picture, offload, first):
    pipeline = build()
    for act in (dcae_fast.patch, offload) if first == "patch" else (offload, dcae_fast.patch):
        act(pipeline)
    assert_same(draw(pipeline), picture)
    assert count(pipeline.transformer) == (5 if first == "patch" or offload is offload_model else 3)


@pytest.mark.parametrize("first", ["patch", "offload"])
@torch.no_grad()
def test_sequential_offloading(first):
    """By component: on a CPU, where the weights go to the meta device, whole pipelines of diffusers fail."""
    x, text = torch.ones(1, 4, 2, 2, device=DEVICE), torch.ones(1, 3, 8, device=DEVICE)
    results = []
    for patched in (False, True):
        pipeline = build()
        for act in ("patch", "offload") if first == "patch" else ("offload", "patch"):
            if act == "patch" and patched:
                dcae_fast.patch(pipeline)
            elif act == "offload":
                for part in (pipeline.transformer, pipeline.vae):
                    cpu_offload(part, torch.device(DEVICE))
        results.append(pipeline.vae.decode(pipeline.transformer(x, text, torch.ones(1, device=DEVICE)).sample).sample)
    assert_same(results[1], results[0])


def test_tiling_and_slicing(picture):
    pictures, pipeline = [], build()
    pipeline.vae.enable_tiling(4, 4, 2, 2)
    pipeline.vae.enable_slicing()
    pictures.append(draw(pipeline))
    dcae_fast.patch(pipeline)
    pictures.append(draw(pipeline))
    assert_same(pictures[1], pictures[0])
    assert (pictures[0] - picture).norm() > 1e-3 * picture.norm()


def test_lora(pipeline, picture):
    """Weights of LoRA are loaded, merged and removed again."""
    shapes = {}
    for name, layer in pipeline.transformer.named_modules():
        if name.endswith(tuple(TARGETS)):
            shapes[f"transformer.{name}.lora_A.weight"] = (2, layer.weight.shape[1], *layer.weight.shape[2:])
            shapes[f"transformer.{name}.lora_B.weight"] = (layer.weight.shape[0], 2, *layer.weight.shape[2:])
    torch.manual_seed(1)
    weights = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    pictures = []
    for each in (build(), pipeline):
        each.load_lora_weights(dict(weights), adapter_name="style")
        pictures.append([draw(each, attention_kwargs={"scale": 0.5}), draw(each)])
        each.fuse_lora()
        pictures[-1].append(draw(each))
        each.unfuse_lora()
        each.unload_lora_weights()
    for got, want in zip(*pictures, strict=True):
        assert_same(got, want)
    assert (pictures[0][0] - pictures[0][1]).norm() > 1e-3 * picture.norm()
    assert_same(draw(pipeline), picture)


def test_from_pipe(pipeline, picture):
    """Another pipeline takes the patched components. Its processors (PAG) are used for its calls only."""
    pictures = []
    for each in (build(), pipeline):
        guided = SanaPAGPipeline.from_pipe(each)
        guided.vae_scale_factor = 8
        pictures.append(draw(guided, pag_scale=3.0))
    assert_same(pictures[1], pictures[0])
    assert_same(draw(pipeline), picture)
    assert (pictures[0] - picture).norm() > 1e-3 * picture.norm()


def test_saved_pipelines_name_the_classes_of_diffusers(picture, tmp_path):
    """Also if the pipeline is put together from a patched transformer."""
    first = build()
    dcae_fast.patch(first.transformer, cuda_graphs=True)
    assert is_fast(first.transformer)
    pipeline = SanaPipeline(None, None, first.vae, first.transformer, first.scheduler)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "SanaTransformer2DModel"]
    assert index["vae"] == ["diffusers", "AutoencoderDC"]
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "SanaTransformer2DModel"
    again = SanaPipeline.from_pretrained(tmp_path, tokenizer=None, text_encoder=None).to(DEVICE)
    again.vae_scale_factor = 8
    again.set_progress_bar_config(disable=True)
    assert_same(draw(again), picture)


def test_control_network():
    pictures = []
    for patched in (False, True):
        torch.manual_seed(1)
        control = SanaControlNetModel(**TRANSFORMER | {"num_layers": 1}).eval()
        for parameter in control.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        pipeline = build(SanaControlNetPipeline, controlnet=control)
        if patched:
            report = dcae_fast.patch(pipeline)
            assert report.components["controlnet"].replaced == {"GLUMBConv": 1, "SanaTransformerBlock": 1}
        pipeline.vae_scale_factor = 2
        pictures.append(draw(pipeline, control_image=torch.ones(1, 3, 32, 32, device=DEVICE), guidance_scale=1.0))
    assert_same(pictures[1], pictures[0])
