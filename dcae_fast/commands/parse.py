"""Parses the command line: options in files, and rules for the values of options."""

import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Union

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

import dcae_fast
from dcae_fast.errors import report_failure

from .option_files import with_files

CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.CascadeSubcommandArgs)


def parse(commands: dict[str, Callable[..., int]], arguments: Sequence[str]) -> Callable[[], int]:
    """Parses the arguments; returns the command with its options bound.

    Raises UsageError for an invalid @file, and SystemExit, after printing the reason, for invalid options. --help and
    --version print and raise SystemExit too.
    """
    if arguments and arguments[0] == "--version":
        print(f"dcae_fast {dcae_fast.__version__}")
        raise SystemExit(0)

    def deferred(command: Callable[..., int]) -> Callable[..., Callable[[], int]]:
        return wraps(command)(lambda *args, **options: partial(command, *args, **options))

    choices = tuple(Annotated[deferred(command), tyro.conf.subcommand(name)] for name, command in commands.items())

    def choose(options: Union[choices]) -> Callable[[], int]:  # noqa: UP007  tyro shows the name `options` in its messages
        return options

    expanded = with_files(arguments)
    rules = ConstructorRegistry()
    rules.primitive_rule(path_rule)
    description = "Deep compression autoencoders, fast."
    try:
        with rules:
            return tyro.cli(choose, prog="dcae-fast", description=description, args=expanded, config=CONFIG)
    except SystemExit as error:
        files = [argument for argument in arguments if argument.startswith("@")]
        if error.code and files:
            print(f"dcae-fast: {', '.join(files)}: the arguments become: {shlex.join(expanded)}", file=sys.stderr)
        if error.code:
            report_failure("dcae-fast: invalid options; each rank printed the reason above")
        raise


def path_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Refuses two texts where a path is expected: the empty one, which pathlib reads as the current folder, and "None",
    which an option file's null becomes.
    """

    def path_of(texts: list[str]) -> Path:
        if not texts[0]:
            raise ValueError("expected a file or folder, found an empty text; `.` is the current folder")
        if texts[0] == "None":
            raise ValueError("expected a file or folder, found None; one with this name is ./None")
        return Path(texts[0])

    if info.type is not Path:
        return None
    return PrimitiveConstructorSpec(1, "PATH", path_of, lambda value: isinstance(value, Path), lambda path: [str(path)])
