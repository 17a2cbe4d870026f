"""The package: pip installs it, its extras, and the program of docs/library.md."""
import os
import subprocess
import sys
import tomllib
from email import message_from_string

import pytest

import perceiver
from conftest import ROOT
from test_docs import blocks


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which pip has installed a copy of the tracked files."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("package")
    files = ["pyproject.toml", "README.md", "LICENSE", "requirements.txt", "requirements", "perceiver"]
    subprocess.run(["cp", "-r", *files, folder], cwd=ROOT, check=True)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    result = subprocess.run([*command, "--target", folder / "site", folder], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder / "site"


def test_the_program_of_the_page_runs_outside_the_checkout(installed, tmp_path):
    (code,) = blocks(ROOT / "docs/library.md", "python")
    (tmp_path / "program.py").write_text(code + "\nimport perceiver\nprint(perceiver.__file__)\n")
    env = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    sampled, file = result.stdout.splitlines()
    assert sampled.endswith("[' brown fox jumps over the lazy dog', ' over the lazy dog']")
    assert file == str(installed / "perceiver/__init__.py")


def test_the_installed_package_is_whole_and_names_its_packages(installed):
    """Every module is there, and the requirements files are the only source of names."""
    modules = {path.relative_to(ROOT) for path in (ROOT / "perceiver").rglob("*.py")}
    assert modules == {path.relative_to(installed) for path in (installed / "perceiver").rglob("*.py")}
    (info,) = installed.glob("*.dist-info")
    metadata = message_from_string((info / "METADATA").read_text())
    assert metadata["Version"] == perceiver.__version__
    required = metadata.get_all("Requires-Dist")

    def names(file):
        return {line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines() if line[0] not in "#-"}

    assert {line for line in required if "extra ==" not in line} == names("requirements.txt")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["tool"]["setuptools"]["dynamic"]["optional-dependencies"]
    assert set(metadata.get_all("Provides-Extra")) == set(extras)
    assert extras.keys() == {"weights", "music", "video", "tokenizers", "onnx", "all"}
    everything = set()
    for extra in extras.keys() - {"all"}:
        found = {line.split(";")[0] for line in required if f'extra == "{extra}"' in line}
        assert found == names(f"requirements/{extra}.txt") and f"-r requirements/{extra}.txt" in (
            ROOT / "requirements-extra.txt").read_text()
        everything |= found
    assert {line.split(";")[0] for line in required if 'extra == "all"' in line} == everything
