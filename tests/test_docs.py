"""README, docs and the other pages: links lead to files, Python examples are valid, commands and options exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RECIPES = {"train-diffusion": "uvit-h-f64", "train-autoencoder": "full"}  # one of each command
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_are_valid(page):
    for example in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        compile(example, page.name, "exec")


def help_of(*arguments: str) -> str:
    run = [sys.executable, "-m", "dcae_fast", *arguments, "--help"]
    return subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_commands_and_options_exist():
    text = "\n".join(page.read_text() for page in PAGES if page.name != "CHANGELOG.md").replace("\\\n", " ")
    options: dict[str, set[str]] = {}
    for command, rest in re.findall(r"(?:dcae-fast|-m dcae_fast) ([a-z-]+)([^`|\n]*)", text):
        options.setdefault(command, set()).update(re.findall(r"--[a-z-]+", rest))
    assert {"reconstruct", "train-diffusion", "eval-diffusion"} <= options.keys()
    for command, used in options.items():
        helps = help_of(command) + (help_of(command, RECIPES[command]) if command in RECIPES else "")
        assert used <= {"--help", *re.findall(r"--[a-z-]+", helps)}, command
