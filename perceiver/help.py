"""The command line of train.py: its config, its help, and the list of recipes."""

import ast
import dataclasses
import inspect
import io
import re
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from perceiver.config import Config, OptimConfig, TrainConfig, load_config
from perceiver.errors import UserError

HELP = {"-h", "--help"}
CONFIGS = Path(__file__).parent.parent / "configs"
INTRO = """
CONFIG is a YAML file such as those in configs/. Each section.key=value changes one of its values.

    python train.py --list             the recipes in configs/
    python train.py CONFIG --help      all keys of a recipe, with its values
"""


def read_command(arguments: list[str], usage: str, tasks: dict[str, type]) -> Config | None:
    """The config that the command line asks for. None if it asked for help or the list, which are printed here."""
    others = [argument for argument in arguments if argument not in HELP]
    wants_help = len(others) < len(arguments)
    has_config = bool(others) and ("=" not in others[0] or Path(others[0]).exists())
    if "--list" in arguments:
        print(*recipe_lines(CONFIGS), sep="\n")
        return None
    if not has_config and not wants_help:
        raise UserError(f"the config is missing. {usage}")
    config = load_config(others[0], others[1:], tasks) if has_config else None
    if not wants_help:
        return config
    lines = config_lines(config, tasks) if has_config else common_lines(tasks)
    print(usage, *lines, sep="\n")
    return None


def recipe_lines(folder: Path) -> list[str]:
    """A line for each recipe in `folder`: its file, and the first sentence of the comment at its top."""
    files = sorted(folder.glob("*.yaml"))
    width = max((len(file.stem) for file in files), default=0)
    lines = []
    for file in files:
        comment = re.match(r"(#.*\n)*", file.read_text(encoding="utf-8"))[0]
        text = " ".join(comment.replace("#", " ").split())
        sentence = re.split(r"(?<=\.) ", text)[0]
        lines.append(f"{file.stem:{width}}  {textwrap.shorten(sentence, 100, placeholder=' ...')}")
    return lines


def common_lines(tasks: dict[str, type]) -> Iterator[str]:
    """The help without a config: how to use it, the tasks, and the keys that all tasks share."""
    yield INTRO
    yield f"Tasks: {', '.join(tasks)}"
    yield "\nThe keys of optim and train are the same for all tasks:"
    yield from section_lines(OptimConfig(), "optim")
    yield from section_lines(TrainConfig(), "train")


def config_lines(config: Config, tasks: dict[str, type]) -> Iterator[str]:
    """The help for a config: every key of its task, with value, type, default and comment."""
    yield f"\ntask: {config.task}    {inspect.getdoc(tasks[config.task]).splitlines()[0]}"
    for section in ("model", "data", "optim", "train"):
        yield from section_lines(getattr(config, section), section)


def section_lines(section: Any, prefix: str) -> Iterator[str]:
    """Two lines or more for each field of a dataclass: key, value, type and default; then its comment."""
    yield f"\n{prefix}"
    hints = typing.get_type_hints(type(section), include_extras=True)
    comments = field_comments(type(section))
    nested = []
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), f"{prefix}.{field.name}"
        default = default_of(field)
        part = section_type(hints[field.name])
        if part is not None:
            nested.append((value or part(), key))
        if dataclasses.is_dataclass(value):
            continue
        rule = f"{describe(hints[field.name])}; default {shown(default)}"
        yield f"  {key}={shown(value)}    ({rule})"
        if field.name in comments:
            yield textwrap.fill(comments[field.name], 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    for value, key in nested:
        yield from section_lines(value, key)


def section_type(hint: Any) -> type | None:
    """The dataclass of a field that is a section, or that may be one instead of null."""
    candidates = (hint, *typing.get_args(hint))
    return next((kind for kind in candidates if dataclasses.is_dataclass(kind)), None)


def default_of(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def shown(value: Any) -> str:
    """A value as one writes it in YAML."""
    if value is dataclasses.MISSING:
        return "none, it must be set"
    if dataclasses.is_dataclass(value):
        return "a section"
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


def describe(hint: Any) -> str:
    """The type of a field in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # X | None
        return f"{describe(arguments[0])} or null"
    if origin is Annotated:
        low, high = arguments[1].split(", ")
        rule = f"in {arguments[1]}"
        if high == "inf)":
            rule = f"{'>=' if low[0] == '[' else '>'} {low[1:]}"
        return f"{describe(arguments[0])} {rule}"
    if origin is Literal:
        return ", ".join(map(shown, arguments))
    if origin is tuple:
        kinds = list(dict.fromkeys(describe(argument) for argument in arguments if argument is not Ellipsis))
        size = "" if arguments[-1] is Ellipsis else f"{len(arguments)} values: "
        return f"list of {size}{', '.join(kinds)}"
    if dataclasses.is_dataclass(hint):
        return "section"
    return hint.__name__


def field_comments(cls: type) -> dict[str, str]:
    """The comment of each field of a dataclass: at the end of its line, or in the lines above it."""
    comments = {}
    for part in reversed(cls.__mro__):
        if dataclasses.is_dataclass(part):
            comments |= comments_in(textwrap.dedent(inspect.getsource(part)))
    return comments


def comments_in(source: str) -> dict[str, str]:
    """The comments of the annotated names in the source code of a class."""
    by_line = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            by_line[token.start[0]] = token.string.lstrip("# ")
    lines = source.splitlines()
    comments = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            above = node.lineno - 1
            while lines[above - 1].lstrip().startswith("#"):
                above -= 1
            places = [node.end_lineno] if node.end_lineno in by_line else range(above + 1, node.lineno)
            comments[node.target.id] = " ".join(by_line[place] for place in places)
    return {name: comment for name, comment in comments.items() if comment}
