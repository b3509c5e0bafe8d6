"""The example that trains a LoRA on SANA, with random weights."""

import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dcae_fast import cli

for package in ("diffusers", "accelerate", "peft"):
    pytest.importorskip(package)


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    import train_sana_lora

    return train_sana_lora


def run(example, monkeypatch, *options) -> None:
    monkeypatch.setattr("sys.argv", ["train_sana_lora.py", *map(str, options)])
    example.main()


def test_the_tiny_form_learns(example, monkeypatch, tmp_path, capsys):
    options = "--steps", 1, "--batch", 1, "--rank", 2, "--checkpoint-activations"
    run(example, monkeypatch, "--tiny", "--out", tmp_path, *options)
    output = capsys.readouterr().out
    assert "SanaTransformerBlock          2" in output and "step 1: loss " in output
    weights = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert len(weights) == 2 * 2 * 8 and any(value.any() for name, value in weights.items() if "lora_B" in name)
    transformer = example.tiny()[0]
    transformer.load_lora_adapter(weights, prefix="transformer")
    assert [config.r for config in transformer.peft_config.values()] == [2]


def test_cached_latents_with_captions(example, monkeypatch, tmp_path, capsys):
    """Latents in buckets. The weights of the transformer are random, and the texts were embedded before."""
    for number, size in enumerate([(300, 90), (300, 90), (64, 64)]):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", size).save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "photos" / "0.txt").write_text("a wide picture")
    settings = "--resolution 128 --model dc-ae-tiny --scale 0.5 --device cpu --no-patch --workers 0 --buckets".split()
    assert cli.main(["cache-latents", str(tmp_path / "photos"), "--out", str(tmp_path / "latents"), *settings]) == 0
    buckets = example.read(tmp_path / "latents")
    assert [bucket.captions for bucket in buckets] == [["a wide picture", ""], [""]]
    texts = {"a wide picture": torch.ones(3, 16), "": torch.zeros(2, 16)}
    for z, y, mask in (next(example.batches(buckets, texts, 2, 0.0, random.Random(seed))) for seed in range(9)):
        assert z.shape[1:] in ((64, 2, 8), (64, 4, 4)) and y.shape[:2] == mask.shape and len(z) == 2
        assert torch.equal(mask.sum(1) == 3, y[:, 0, 0] == 1) and not y[~mask].any()
    (tmp_path / "out").mkdir()
    save_file(texts, tmp_path / "out" / "texts.safetensors")
    network = example.SanaTransformer2DModel(
        64, 64, num_layers=1, num_attention_heads=1, attention_head_dim=32, num_cross_attention_heads=1,
        cross_attention_head_dim=32, cross_attention_dim=32, caption_channels=16, sample_size=4,
    )  # fmt: skip
    monkeypatch.setattr(example.SanaTransformer2DModel, "from_pretrained", lambda *_, **__: network)
    options = "--latents", tmp_path / "latents", "--out", tmp_path / "out", "--steps", 1, "--batch", 2
    run(example, monkeypatch, "--model", "some/model", *options)
    assert (
        "step 1: loss " in capsys.readouterr().out and (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()
    )


def test_without_weights_or_options(example, monkeypatch, tmp_path, capsys):
    def fail(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr(example, "read", lambda folder: [example.Bucket([], ["a"])])
    monkeypatch.setattr(example.SanaPipeline, "from_pretrained", fail)
    with pytest.raises(SystemExit, match=r"offline\n.*hf download some/model --local-dir FOLDER"):
        run(example, monkeypatch, "--model", "some/model", "--latents", tmp_path, "--out", tmp_path / "out")
    with pytest.raises(SystemExit):
        run(example, monkeypatch, "--model", "some/model")
    assert "expected --model, --latents and --out, or --tiny" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, words",
    [
        (["--tiny", "--steps", 0], "--steps 0: expected at least 1"),
        (["--tiny", "--drop", 1.5], "--drop 1.5: expected a number from 0 to 1"),
        (["--latents", "l"], "expected --model, --latents and --out, or --tiny"),
        (["--model", "m", "--latents", "absent", "--out", "o"], "--latents: absent: no such folder"),
    ],
)
def test_wrong_options(example, monkeypatch, tmp_path, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run(example, monkeypatch, *options)
    assert words in f"{capsys.readouterr().err}{ended.value}"
