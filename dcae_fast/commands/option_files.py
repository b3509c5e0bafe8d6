"""Options in files: an argument @options.yaml stands for the options in that file."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dcae_fast.files import check_regular

from .common import UsageError

OPTIONAL_VALUES = {"int8"}  # options that take values or none: true stands for none, --no-int8 for the option's absence
NAME = re.compile(r"[A-Za-z][\w-]*")


def with_files(arguments: Sequence[str]) -> list[str]:
    """The arguments, with each @file.yaml, .toml or .json replaced by the options in the file. Raises UsageError.

    {"lr": 1e-4, "betas": [0.9, 0.99], "patch": false, "network": {"depth": 12}} becomes --lr 1e-4 --betas 0.9 0.99
    --no-patch --depth 12. Inner mappings only group options; their names are ignored. For an option in
    `OPTIONAL_VALUES`, such as "int8", --no-int8, false and null undo every --int8 before them.
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
    for name in OPTIONAL_VALUES:
        expanded = _undone(expanded, f"--{name}", f"--no-{name}")
    return expanded


def _undone(arguments: list[str], option: str, off: str) -> list[str]:
    """The arguments without `off`, and without each `option`, together with its values, before the last `off`.

    If no `option` is left, `option None` is added: a command without the option then refuses it.
    """
    if off not in arguments:
        return arguments
    last = len(arguments) - 1 - arguments[::-1].index(off)
    kept, is_value = [], False
    for argument in arguments[:last]:
        if argument.startswith("--"):
            is_value = argument == option
        if not is_value and argument != off and not argument.startswith(f"{option}="):
            kept.append(argument)
    rest = arguments[last + 1 :]
    if any(argument.partition("=")[0] == option for argument in rest):
        return kept + rest
    end = len(rest) if "--" not in rest else rest.index("--")  # after which all arguments are positional
    return [*kept, *rest[:end], option, "None", *rest[end:]]


def _read(path: Path) -> dict[str, Any]:
    kind = path.suffix.lower()
    if kind not in (".yaml", ".yml", ".json", ".toml"):
        raise UsageError("expected a file name that ends in .yaml, .yml, .toml or .json")
    try:
        check_regular(path)
        if kind == ".toml":
            import tomllib  # needs Python 3.11

            content = tomllib.loads(path.read_text("utf-8"))
        else:  # YAML includes JSON
            content = yaml.safe_load(path.read_text("utf-8"))
    except ImportError as error:
        raise UsageError("TOML files need Python 3.11 or later; use a YAML or JSON file") from error
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"not a valid {kind[1:]} file: {error}") from error
    if not isinstance(content, dict):
        raise UsageError("expected a mapping of option names to values, such as `lr: 1e-4`")
    return content


def _options(content: dict[str, Any], depth: int = 0) -> list[str]:
    if depth > 8:  # with aliases, a YAML mapping can contain itself
        raise UsageError("mappings are nested too deeply; expected at most 8 levels")
    options = []
    for name, value in content.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise UsageError(f"{name!r}: expected the name of an option, such as lr")
        flag = name.replace("_", "-")
        if isinstance(value, dict):
            options += _options(value, depth + 1)
        elif isinstance(value, bool) or (value is None and flag in OPTIONAL_VALUES):
            options.append(f"--{flag}" if value else f"--no-{flag}")
        elif not isinstance(value, list):
            options += [f"--{flag}", str(value)]
        elif any(isinstance(each, dict | list) for each in value):
            raise UsageError(f"{name}: expected a value or a list of values, not {value}")
        else:
            options += [f"--{flag}", *map(str, value)]
    return options
