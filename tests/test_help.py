"""The help of train.py: every key of every recipe, and the list of recipes."""
import dataclasses
import re
from dataclasses import dataclass, field
from typing import Annotated

import pytest

from conftest import ROOT
from perceiver import help
from perceiver.config import load_config
from perceiver.errors import UserError
from perceiver.tasks import TASKS

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


def keys(section, prefix):
    """The dotted keys of a dataclass and the sections in it, with their values."""
    found = {}
    for name in (member.name for member in dataclasses.fields(section)):
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            found |= keys(value, f"{prefix}.{name}")
        else:
            found[f"{prefix}.{name}"] = value
    return found


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_help_of_a_recipe_has_every_key_and_gives_its_config(recipe, capsys):
    assert help.read_command([str(recipe), "--help", "optim.eps=0.125"], "usage", TASKS) is None
    text = capsys.readouterr().out
    config = load_config(recipe, ["optim.eps=0.125"], TASKS)
    for section in ("model", "data", "optim", "train"):
        for key in keys(getattr(config, section), section):
            assert f"\n  {key}=" in text, key
    assert "optim.eps=0.125    (float > 0; default 1.0e-08)\n      all but sgd" in text
    # What is shown can be given back. If model.decoder is null, its keys are shown, but giving them would make one.
    shown = re.findall(r"^  (\S+=.*?)    \(", text, re.M)
    if getattr(config.model, "decoder", 0) is None:
        shown = [setting for setting in shown if not setting.startswith("model.decoder.")]
    assert load_config(recipe, shown, TASKS) == config


@dataclass
class Part:
    rate: Annotated[float, "[0, 1)"] = 0.5  # at the end


@dataclass
class Section(Part):
    # above, in
    # two lines
    size: int | None = None
    plain: bool = True
    names: tuple[str, ...] = field(
        default=("a",),  # not this one
    )  # after several lines
    part: Part | None = None


def test_comments_types_and_sections():
    assert list(help.section_lines(Section(size=3), "x")) == [
        "\nx",
        "  x.rate=0.5    (float in [0, 1); default 0.5)", "      at the end",
        "  x.size=3    (int or null; default null)", "      above, in two lines",
        "  x.plain=true    (bool; default true)",
        "  x.names=[a]    (list of str; default [a])", "      after several lines",
        "  x.part=null    (section or null; default null)",
        "\nx.part", "  x.part.rate=0.5    (float in [0, 1); default 0.5)", "      at the end",
    ]


def test_recipes_are_listed_with_their_first_sentence(capsys):
    help.read_command(["--list"], "usage", TASKS)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [path.stem for path in RECIPES]
    assert "clm                   A small Perceiver AR on bytes." in lines
    assert all(len(line) < 125 and len(line.split()) > 3 for line in lines)


def test_an_override_is_no_config():
    with pytest.raises(UserError, match="the config is missing. usage"):
        help.read_command(["optim.lr=3"], "usage", TASKS)


def test_help_without_a_config(capsys):
    help.read_command(["-h"], "usage", TASKS)
    text = capsys.readouterr().out
    assert text.startswith("usage\n") and "--list" in text and "optim.lr=" in text and "causal_lm" in text
