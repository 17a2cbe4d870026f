"""README.md and docs/: their code runs, and their commands name files and options that exist."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import FLOAT32, ROOT, read_metrics, run_script

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


def test_the_task_of_your_own_task_is_learned_from_a_csv_file(tmp_path):
    """The two files of the page, copied into a checkout, train a model on a CSV file and predict from it."""
    page = ROOT / "docs/your_own_task.md"
    (code,), (recipe,) = blocks(page, "python"), blocks(page, "yaml")
    assert code.count("\n") <= 80
    for name in ("perceiver", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("train.py", "predict.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "perceiver/tasks/forecasting.py").write_text(code)
    (tmp_path / "configs/forecasting.yaml").write_text(recipe)
    time = np.arange(600)
    series = np.stack((np.sin(time / 3), np.cos(time / 5)), axis=1)
    np.savetxt(tmp_path / "series.csv", series, delimiter=",", header="a,b", comments="")

    def run(*args):
        result = subprocess.run([sys.executable, *args], cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr
        return result.stdout

    result = run("train.py", "configs/forecasting.yaml", "data.path=series.csv", FLOAT32)
    assert "480 rows for training, the last 120" in result
    losses = [line["loss"] for line in read_metrics(tmp_path / "runs/forecasting", "val")]
    assert losses[-1] < 0.05  # the variance of both series is 0.5
    name, *rows = run("predict.py", "--ckpt", "runs/forecasting", "series.csv").splitlines()
    forecast = np.array([[float(value) for value in row.split()] for row in rows])
    expected = np.stack((np.sin(np.arange(600, 604) / 3), np.cos(np.arange(600, 604) / 5)), axis=1)
    assert name == "series.csv" and forecast.shape == (4, 2) and np.abs(forecast - expected).mean() < 0.25


def test_files_and_configs_in_the_pages_exist():
    for page in PAGES:
        text = page.read_text()
        for name in re.findall(r"\]\(([\w./-]+)\)", text):
            assert (page.parent / name).exists(), f"{page.name}: {name}"
        for name in re.findall(r"(?:python|train.py) ([\w/]+\.(?:py|yaml))", text):
            assert (ROOT / name).exists() or name == "configs/forecasting.yaml", f"{page.name}: {name}"
    text = "".join(page.read_text() for page in PAGES)
    assert all(path.name in text for path in (ROOT / "configs").glob("*.yaml"))
    assert README.count("\n") <= 160


def test_options_in_the_pages_exist():
    commands = [["generate.py"], ["predict.py"], ["benchmarks/compare.py"]]
    commands += [["-m", f"perceiver.{module}"] for module in ("evaluate", "export", "prepare")]
    options = "".join(run_script(*command, "--help").stdout for command in commands)
    for page in PAGES:
        for option in re.findall(r"`(--[\w-]+)", page.read_text()):
            assert option in options or option == "--nproc-per-node", f"{page.name}: {option}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "your_own_task.md"],
                         ids=lambda page: page.stem)
def test_python_of_the_pages_runs(page, tmp_path, monkeypatch):
    """The blocks of a page run in order. Blocks that start with `# needs ...` need things that a test lacks: skip."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in blocks(page, "python"):
        if not code.startswith("# needs "):
            exec(code, names)
