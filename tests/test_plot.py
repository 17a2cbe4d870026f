"""docs/plot_metric.py: runs against steps, data and time."""
import json
import runpy
import sys

import pytest
from PIL import Image

from conftest import ROOT

TEXT = {"model": {"num_latents": 100, "num_heads": 1}, "data": {"batch_size": 4}}
IMAGES = {"model": {"num_latents": 100}, "data": {"batch_size": 4}}


def plot(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["plot_metric.py", *map(str, args)])
    return runpy.run_path(str(ROOT / "docs/plot_metric.py"))


@pytest.mark.parametrize("config, rate, speed, data", [
    (TEXT, "tokens_per_s", 400, 4000), (IMAGES, "samples_per_s", 4, 40)])
def test_runs_against_steps_data_and_time(config, rate, speed, data, tmp_path, monkeypatch):
    """A step takes a second until step 10, then half a second."""
    pytest.importorskip("matplotlib")
    lines = [{"step": 10, "split": "train", "loss": 2.0, rate: speed}, {"step": 10, "split": "val", "loss": 2.1},
             {"step": 20, "split": "train", "loss": 1.0, rate: 2 * speed}]
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (tmp_path / name / "config.yaml").write_text(json.dumps(config))
    args = [tmp_path / "out.png", "loss", tmp_path / "a", tmp_path / "b"]
    found = plot(monkeypatch, *args, "--against", "all")["runs"][tmp_path / "a"]
    assert [line["data"] for line in found] == [data, data, 2 * data]
    assert [60 * line["time"] for line in found] == pytest.approx([10, 10, 15])
    wide = Image.open(tmp_path / "out.png").size
    plot(monkeypatch, *args)
    assert wide[0] == 3 * Image.open(tmp_path / "out.png").size[0]
    (tmp_path / "a/config.yaml").unlink()
    with pytest.raises(SystemExit, match="2"):
        plot(monkeypatch, *args, "--against", "time")
