"""Options in files: @options.yaml among the arguments of a command."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .common import UsageError


def with_files(arguments: Sequence[str]) -> list[str]:
    """The arguments, each @file.yaml, .toml or .json replaced by the options that it holds. UsageError.

    {"lr": 1e-4, "betas": [0.9, 0.99], "patch": false, "network": {"depth": 12}} is --lr 1e-4 --betas 0.9 0.99
    --no-patch --depth 12; the names of inner mappings only group options.
    """
    expanded = []
    for argument in arguments:
        if not argument.startswith("@"):
            expanded.append(argument)
            continue
        try:
            expanded += _options(_read(Path(argument[1:])))
        except UsageError as error:
            raise UsageError(f"{argument}: {error}") from error
    return expanded


def _read(path: Path) -> dict[str, Any]:
    if path.suffix not in (".yaml", ".yml", ".json", ".toml"):
        raise UsageError("expected the name of a .yaml, .toml or .json file")
    try:
        if path.suffix == ".toml":
            import tomllib  # from Python 3.11 on

            content = tomllib.loads(path.read_text())
        else:  # JSON is YAML, too
            content = yaml.safe_load(path.read_text())
    except ImportError as error:
        raise UsageError("reading TOML needs Python 3.11; YAML and JSON do not") from error
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"is no valid {path.suffix[1:]} file: {error}") from error
    if not isinstance(content, dict):
        raise UsageError("expected options by name, as in `lr: 1e-4`")
    return content


def _options(content: dict[str, Any], depth: int = 0) -> list[str]:
    if depth > 8:  # YAML's aliases can make a mapping that holds itself
        raise UsageError("mappings within mappings are nested too deeply")
    options = []
    for name, value in content.items():
        flag = str(name).replace("_", "-")
        if isinstance(value, dict):
            options += _options(value, depth + 1)
        elif isinstance(value, bool):
            options.append(f"--{flag}" if value else f"--no-{flag}")
        elif not isinstance(value, list):
            options += [f"--{flag}", str(value)]
        elif any(isinstance(each, dict | list) for each in value):
            raise UsageError(f"{name}: expected a value or a list of values, not {value}")
        else:
            options += [f"--{flag}", *map(str, value)]
    return options
