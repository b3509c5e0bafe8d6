"""The example that draws with SANA, with a stand-in for the pipeline."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")


class Pipeline:
    """Draws pictures of the asked size in the colour of its seed."""

    components = {}

    def to(self, device: str) -> "Pipeline":
        return self

    def __call__(self, text, num_inference_steps, generator, height, width):
        return SimpleNamespace(images=[Image.new("L", (width, height), generator.initial_seed())])


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    import sana

    return sana


def test_a_picture_is_drawn(example, monkeypatch, tmp_path, capsys):
    out = tmp_path / "picture.png"
    monkeypatch.setattr(example.SanaPipeline, "from_pretrained", lambda model, torch_dtype: Pipeline())
    monkeypatch.setattr("sys.argv", ["sana.py", "a cat", "--size", "32", "--seed", "7", "--out", str(out)])
    example.main()
    assert Image.open(out).getpixel((31, 31)) == 7
    assert {"unpatched:", "patched:"} <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize("error", [OSError("offline"), ValueError("offline")])
def test_without_weights(example, monkeypatch, error):
    def fail(model, torch_dtype):
        assert torch_dtype is torch.bfloat16
        raise error

    monkeypatch.setattr(example.SanaPipeline, "from_pretrained", fail)
    with pytest.raises(SystemExit, match=r"offline\n.*hf download some/model --local-dir FOLDER"):
        example.load("some/model")


@pytest.mark.parametrize(
    "options, reason", [(["--size", "1000"], "multiple of 32"), (["--out", "no/a.png"], "no folder")]
)
def test_bad_options_are_refused_before_the_weights_are_loaded(example, monkeypatch, capsys, options, reason):
    monkeypatch.setattr("sys.argv", ["sana.py", "a cat", *options])
    with pytest.raises(SystemExit):
        example.main()
    assert reason in capsys.readouterr().err
