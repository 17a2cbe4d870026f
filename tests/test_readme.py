"""What the README says works: its code runs, its commands name files and options that are there."""
import re

import torch

from conftest import ROOT, run_script

README = (ROOT / "README.md").read_text()


def test_a_modality_of_ones_own_takes_the_lines_shown():
    section = README.partition("## A modality of your own")[2].partition("\n## ")[0]
    names = {}
    for code in re.findall(r"```python\n(.*?)```", section, re.S):
        exec(code, names)
        assert names["forecast"].shape == (2, 4, 3) and torch.isfinite(names["forecast"]).all()


def test_files_and_configs_named_are_there():
    commands = re.findall(r"(?:python|train.py) ([\w/]+\.(?:py|yaml))", README)
    for name in re.findall(r"\]\(([\w./-]+)\)", README) + commands:
        assert (ROOT / name).exists(), name
    assert all(path.name in README for path in (ROOT / "configs").glob("*.yaml"))


def test_options_named_are_there():
    options = run_script("generate.py", "--help").stdout + run_script("predict.py", "--help").stdout
    assert all(option in options for option in re.findall(r"`(--[\w-]+)`", README) if "nproc" not in option)
