"""Options in files: an argument @options.yaml stands for the options in that file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .common import UsageError

OPTIONAL_VALUES = {"int8"}  # options that take values or none: true stands for none, false for the option's absence


def with_files(arguments: Sequence[str]) -> list[str]:
    """The arguments, with each @file.yaml, .toml or .json replaced by the options in the file. Raises UsageError.

    {"lr": 1e-4, "betas": [0.9, 0.99], "patch": false, "network": {"depth": 12}} becomes --lr 1e-4 --betas 0.9 0.99
    --no-patch --depth 12. Inner mappings only group options; their names are ignored. For
    `OPTIONAL_VALUES`, such as "int8", false becomes --int8 None.
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
        raise UsageError("expected a file name that ends in .yaml, .yml, .toml or .json")
    try:
        if path.suffix == ".toml":
            import tomllib  # needs Python 3.11

            content = tomllib.loads(path.read_text())
        else:  # YAML includes JSON
            content = yaml.safe_load(path.read_text())
    except ImportError as error:
        raise UsageError("TOML files need Python 3.11 or later; use a YAML or JSON file") from error
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"not a valid {path.suffix[1:]} file: {error}") from error
    if not isinstance(content, dict):
        raise UsageError("expected a mapping of option names to values, such as `lr: 1e-4`")
    return content


def _options(content: dict[str, Any], depth: int = 0) -> list[str]:
    if depth > 8:  # with aliases, a YAML mapping can contain itself
        raise UsageError("mappings are nested too deeply; expected at most 8 levels")
    options = []
    for name, value in content.items():
        flag = str(name).replace("_", "-")
        if isinstance(value, dict):
            options += _options(value, depth + 1)
        elif isinstance(value, bool):
            off = [f"--{flag}", "None"] if flag in OPTIONAL_VALUES else [f"--no-{flag}"]
            options += [f"--{flag}"] if value else off
        elif not isinstance(value, list):
            options += [f"--{flag}", str(value)]
        elif any(isinstance(each, dict | list) for each in value):
            raise UsageError(f"{name}: expected a value or a list of values, not {value}")
        else:
            options += [f"--{flag}", *map(str, value)]
    return options
