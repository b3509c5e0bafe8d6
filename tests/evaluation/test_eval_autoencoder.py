"""`dcae-fast eval-autoencoder` with the bundled model and stand-ins for the pretrained networks."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from stand_ins import brightness, difference, features, run_ranks

import dcae_fast
from dcae_fast import cli, images
from dcae_fast.evaluation import autoencoder
from dcae_fast.evaluation.autoencoder import COLUMNS
from dcae_fast.evaluation.metrics import frechet_distance
from dcae_fast.evaluation.moments import Moments
from dcae_fast.models.autoencoder import DCAE


def command(source, out, *argv, patch: bool = False) -> list[str]:
    settings = ["--model", "dc-ae-tiny", "--resolution", "64", "--batch", "2", "--workers", "0", "--device", "cpu"]
    settings += [] if patch else ["--no-patch"]
    return ["eval-autoencoder", str(source), "--out", str(out), *settings, *map(str, argv)]


def results(out) -> dict:
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def expected(photographs) -> dict[str, float]:
    """The expected figures, computed picture by picture with only the model and torchmetrics."""
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    model, rows, x, y, z = DCAE.from_pretrained("dc-ae-tiny"), [], [], [], []
    for path in sorted(photographs.iterdir()):
        with Image.open(path) as image:
            picture = images.to_tensor(images.centre_crop(image.convert("RGB"), 64, 64))
        with torch.inference_mode():
            latent = model.encode(picture)
            x.append(images.to_uint8(picture))
            y.append(images.to_uint8(model.decode(latent)))
            z.append(latent.double().numpy())
        mse = np.square(x[-1].double().numpy() - y[-1].double().numpy()).mean()
        similarity = ssim(y[-1].float(), x[-1].float(), data_range=(0.0, 255.0)).item()
        rows.append((10 * math.log10(255**2 / mse), similarity))
    x, y, z = torch.cat(x), torch.cat(y), np.concatenate(z)
    figures = dict(zip(("psnr", "ssim"), np.mean(rows, 0), strict=True))
    figures |= {"lpips": difference(y, x).mean().item(), "clip_iqa": brightness(y).mean().item()}
    figures["rfid"] = frechet_distance(Moments.of(features(y)), Moments.of(features(x)))
    return figures | {"mean": z.mean(), "rms": math.sqrt(np.square(z).mean()), "std": z.std(ddof=1)}


def test_all_metrics(photographs, tmp_path, stand_ins, expected, capsys):
    assert cli.main(command(photographs, tmp_path)) == 0
    content = results(tmp_path)
    figures = content["models"]["dc-ae-tiny"]
    assert list(figures) == list(COLUMNS) and content["settings"]["images"] == 6
    for name in COLUMNS:  # batches of two round differently, which may change a grey level
        assert figures[name] == pytest.approx(expected[name], rel=1e-3), name
    heading, row = (line.split() for line in capsys.readouterr().out.splitlines()[:2])
    assert heading == "model latent mean rms std rFID PSNR SSIM LPIPS CLIP-IQA".split()
    assert row == ["dc-ae-tiny", *(f"{figures[name]:.4f}" for name in COLUMNS)]


def test_example_pictures(photographs, tmp_path, stand_ins):
    assert cli.main(command(photographs, tmp_path)) == 0
    with Image.open(tmp_path / "examples.png") as sheet:
        assert sheet.height == 3 * (64 + 64) and sheet.width >= 2 * 64


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_agree(photographs, tmp_path, stand_ins, ranks):
    """Means over pictures agree to the last bit; sums of features agree in float64 precision."""
    run_ranks(ranks, command(photographs, tmp_path / "many"))
    assert cli.main(command(photographs, tmp_path / "one")) == 0
    many, one = (results(tmp_path / name)["models"]["dc-ae-tiny"] for name in ("many", "one"))
    assert many.pop("rfid") == pytest.approx(one.pop("rfid"), rel=1e-9)
    assert many == one


def test_more_ranks_than_batches(photographs, tmp_path, stand_ins):
    run = command(photographs, tmp_path, "--batch", "4")
    run_ranks(3, run)
    assert results(tmp_path)["settings"]["images"] == 6


def test_against_another_model(photographs, tmp_path, stand_ins):
    other = tmp_path / "other"
    model = DCAE.from_pretrained("dc-ae-tiny")
    for parameter in model.decoder.parameters():
        parameter.data.mul_(0.9)
    model.save_pretrained(other)
    assert cli.main(command(photographs, tmp_path / "a", "--against", other)) == 0
    figures = results(tmp_path / "a")["models"]
    assert list(figures) == ["dc-ae-tiny", str(other)]
    assert figures["dc-ae-tiny"]["psnr"] > figures[str(other)]["psnr"]
    assert figures["dc-ae-tiny"]["mean"] == figures[str(other)]["mean"]


def test_against_eager(photographs, tmp_path, stand_ins, monkeypatch, capsys):
    """Only the first model is patched. `patch` is a stand-in: kernels would take minutes under TRITON_INTERPRET."""

    def patch(model: DCAE, **options) -> None:
        model.encoder.register_forward_hook(lambda module, args, z: 2 * z)

    monkeypatch.setattr(dcae_fast, "patch", patch)
    assert cli.main(command(photographs, tmp_path, "--against", "eager", patch=True)) == 0
    figures = results(tmp_path)["models"]
    assert list(figures) == ["dc-ae-tiny", "eager"]
    assert figures["dc-ae-tiny"]["rms"] == pytest.approx(2 * figures["eager"]["rms"], rel=1e-6)
    for against in (["--against", "eager"], ["--against", "dc-ae-tiny"]):
        assert cli.main(command(photographs, tmp_path / "c", *against)) == 2
        assert "--against" in capsys.readouterr().err


def test_a_reference_file(photographs, tmp_path, stand_ins, expected):
    stats = tmp_path / "stats.npz"
    reference = ["reference-stats", str(photographs), "--fid", str(stats), "--resolution", "64", "--device", "cpu"]
    assert cli.main([*reference, "--workers", "0"]) == 0
    assert cli.main(command(photographs, tmp_path, "--reference", stats)) == 0
    assert results(tmp_path)["models"]["dc-ae-tiny"]["rfid"] == pytest.approx(expected["rfid"], rel=1e-3)


def test_missing_networks_and_broken_pictures(photographs, tmp_path, stand_ins, capsys):
    """The other figures are computed, and the exit status is 1."""
    stand_ins("clip_iqa")
    assert cli.main(command(photographs, tmp_path)) == 1
    assert list(results(tmp_path)["models"]["dc-ae-tiny"]) == ["mean", "rms", "std", "psnr", "ssim", "clip_iqa"]
    output = capsys.readouterr()
    assert output.out.splitlines()[1].split()[4] == "-"
    assert "missing: lpips" in output.err and "missing: fid" in output.err and ".pth" in output.err
    stand_ins()
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("a.png", "b.png"):
        (broken / name).write_bytes((photographs / name).read_bytes())
    (broken / "c.png").write_bytes((photographs / "a.png").read_bytes()[:300])
    assert cli.main(command(broken, tmp_path)) == 1
    assert results(tmp_path)["settings"]["images"] == 2 and "failed: c.png" in capsys.readouterr().err


def test_a_single_picture(tmp_path, stand_ins):
    """A single picture has no rFID, and one of two ranks has nothing to do."""
    photographs = images.demo_photograph().parent
    run_ranks(2, command(photographs, tmp_path))
    assert list(results(tmp_path)["models"]["dc-ae-tiny"]) == [name for name in COLUMNS if name != "rfid"]


def test_pictures_that_are_reproduced_exactly(photographs, tmp_path, stand_ins, monkeypatch, capsys):
    """An infinite PSNR becomes null in results.json."""
    reconstruct = autoencoder.reconstruct

    def exactly(model: DCAE, pixels: torch.Tensor) -> autoencoder.Reconstructed:
        result = reconstruct(model, pixels)
        return result._replace(y=result.x)

    monkeypatch.setattr(autoencoder, "reconstruct", exactly)
    assert cli.main(command(photographs, tmp_path)) == 0
    assert "Infinity" not in (tmp_path / "results.json").read_text()
    figures = results(tmp_path)["models"]["dc-ae-tiny"]
    assert figures["psnr"] is None and figures["ssim"] == 1 and figures["lpips"] == 0
    assert capsys.readouterr().out.splitlines()[1].split()[5] == "inf"


def test_no_picture_can_be_read(tmp_path, stand_ins, capsys):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"no picture")
    assert cli.main(command(tmp_path / "pictures", tmp_path / "out")) == 1
    errors = capsys.readouterr().err
    assert "no picture could be measured" in errors and "failed: a.png" in errors


def test_max_pixels(photographs, tmp_path, stand_ins, capsys):
    assert cli.main(command(photographs, tmp_path, "--max-pixels", "10000")) == 1
    whole, b = sorted(line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: "))[::-1]
    assert whole == "failed: whole.png: has more than 10000 pixels; --max-pixels raises the limit"
    assert b.startswith("failed: b.png")
    assert json.loads((tmp_path / "results.json").read_text())["settings"]["images"] == 4


def test_invalid_requests(photographs, tmp_path, stand_ins, capsys):
    Moments.of(torch.rand(5, 3)).save(tmp_path / "short.npz")
    assert cli.main(command(photographs, tmp_path / "short", "--reference", tmp_path / "short.npz")) == 2
    assert not any((tmp_path / "short").iterdir())
    assert "--reference: has features of length 3; expected 6" in capsys.readouterr().err
    for argv in (["--resolution", "50"], ["--batch", "0"], ["--reference", tmp_path / "absent.npz"]):
        assert cli.main(command(photographs, tmp_path / "out", *argv)) == 2
        assert str(argv[1]) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_made(photographs, tmp_path, stand_ins, monkeypatch, capsys):
    """Nothing is computed if the output folder cannot be made."""
    monkeypatch.setattr(autoencoder, "evaluate", None)
    (tmp_path / "file").touch()
    assert cli.main(command(photographs, tmp_path / "file" / "out")) == 2
    assert "file" in capsys.readouterr().err
    assert cli.main(command(photographs, tmp_path / "out", "--workers", "-1")) == 2
    assert "--workers -1" in capsys.readouterr().err
