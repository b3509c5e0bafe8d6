"""Options in files: the arguments that they become, and the errors for files with other contents."""

import os
import sys
from pathlib import Path

import pytest

import dcae_fast
from dcae_fast import cli
from dcae_fast.commands.option_files import with_files


def test_files_of_options(tmp_path):
    yaml, toml = tmp_path / "a.yaml", tmp_path / "b.toml"
    yaml.write_text("network: {depth: 12}\nbetas: [0.9, 0.95]\nclip_grad: null\npatch: false\nlr: 1.0e-4\n")
    expected = ["--depth", "12", "--betas", "0.9", "0.95", "--clip-grad", "None", "--no-patch", "--lr", "0.0001"]
    assert with_files(["x", f"@{yaml}", "y"]) == ["x", *expected, "y"]
    toml.write_text("[network]\nhidden_size = 64\n[run]\ncompile = true\n")
    if sys.version_info >= (3, 11):
        assert with_files([f"@{toml}"]) == ["--hidden-size", "64", "--compile"]


@pytest.mark.parametrize("value, expected", [("false", "--int8 None"), ("null", "--int8 None"), ("true", "--int8")])
def test_an_option_with_or_without_a_value(tmp_path, value, expected):
    (tmp_path / "a.YML").write_text(f"int8: {value}\n")
    assert with_files([f"@{tmp_path}/a.YML"]) == expected.split()


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("x --no-int8 y", "x y --int8 None"),
        ("x --int8 a b --fit pad --no-int8 y", "x --fit pad y --int8 None"),
        ("x --int8=a y --no-int8 -- --z", "x y --int8 None -- --z"),
        ("x --int8 --no-int8 --out o --int8 b", "x --out o --int8 b"),
        ("x --int8 a @off.yaml p.png", "x --fit pad p.png --int8 None"),
    ],
)
def test_an_option_that_is_undone(tmp_path, monkeypatch, arguments, expected):
    """--no-int8 takes back every --int8 before it, with the values; what follows it is no value."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "off.yaml").write_text("fit: pad\nint8: false\n")
    assert with_files(arguments.split()) == expected.split()


def test_no_int8_of_the_command_line(tmp_path, capsys):
    photo = Path(dcae_fast.__file__).parent / "assets/photographs/chelsea.png"
    out = "--out", str(tmp_path), "--device", "cpu"
    assert cli.main(["encode", "--int8", "--no-int8", str(photo), *out]) == 0
    assert "8 bit" not in capsys.readouterr().err and (tmp_path / "chelsea.safetensors").exists()
    with pytest.raises(SystemExit):
        cli.main(["models", "--no-int8"])
    assert "--int8" in capsys.readouterr().err


def test_null_is_no_path(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("out: null\n")
    with pytest.raises(SystemExit):
        cli.main(["encode", "x.png", "@a.yaml"])
    assert "--out: expected a file or folder, found None" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.yaml", "{", "not a valid yaml file"),
        ("a.yaml", "!!python/object/apply:os.getcwd []", "not a valid yaml file"),
        ("a.json", "[1]", "expected a mapping of option names"),
        ("a.yaml", "", "expected a mapping of option names"),
        ("a.yaml", "a: &a {b: *a}", "nested too deeply"),
        ("a.yaml", "1: 2", "1: expected the name of an option"),
        ("a.yaml", "--out: x", "'--out': expected the name of an option"),
        ("a.yaml", "betas: [{a: 1}]", "betas: expected a value or a list of values"),
        ("a.txt", "a: 1", "expected a file name that ends in .yaml, .yml, .toml or .json"),
        ("a.yaml", b"\xff\xfe\x00", "not a valid yaml file"),
        ("a.yaml", None, "cannot be read: No such file"),
    ],
)
def test_invalid_option_files(tmp_path, capsys, name, text, words):
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert cli.main(["models", f"@{path}"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"dcae-fast: @{path}: ") and words in errors


def test_a_pipe_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(path := tmp_path / "options.yaml")
    assert cli.main(["models", f"@{path}"]) == 2
    assert capsys.readouterr().err == f"dcae-fast: @{path}: cannot be read: not a regular file\n"


def test_a_wrong_option_in_a_file(tmp_path, capsys):
    """The error names the file and the option."""
    path = tmp_path / "options.yaml"
    path.write_text("steps: many\n")
    with pytest.raises(SystemExit) as caught:
        cli.main(["sample", f"@{path}"])
    errors = capsys.readouterr().err
    assert caught.value.code == 2 and "--steps" in errors
    assert f"@{path}: the arguments become: sample --steps many" in errors
