import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu
import torch


def result(out, name):
    return json.loads((out / f"{name}.json").read_text())


def test_a_section_runs_once_and_a_failure_stops_no_other(tmp_path, monkeypatch, capsys):
    """On a CPU, `decoding_with_cuda_graphs` passes without work; a section that does not exist fails."""
    limits = gpu.SECTIONS | {"nothing": gpu.Section(1, 60, print)}
    names = ["nothing", "decoding_with_cuda_graphs"]
    assert gpu.run_sections(names, tmp_path, "cpu", limits) == 1
    assert not result(tmp_path, "nothing")["passed"] and result(tmp_path, "decoding_with_cuda_graphs")["passed"]
    assert "needs a GPU" in (tmp_path / "decoding_with_cuda_graphs.md").read_text()
    assert "nothing: FAILED" in capsys.readouterr().out
    assert gpu.run_sections(names[1:], tmp_path, "cpu", limits) == 0
    assert "passed before" in capsys.readouterr().out


def test_a_section_that_takes_too_long_fails(tmp_path):
    limits = {"attention_is_exact": gpu.Section(1, 0.1, print)}
    assert gpu.run_sections(["attention_is_exact"], tmp_path, "cpu", limits) == 1
    assert result(tmp_path, "attention_is_exact")["code"] == "timeout"


def test_errors_of_attention_on_the_cpu_are_within_the_limits(capsys):
    gpu.attention_is_exact("cpu")
    assert "**" not in capsys.readouterr().out


@pytest.mark.parametrize("name", gpu.PAPER_MODELS)
def test_models_of_the_papers_take_the_random_inputs(name):
    config = gpu.load_config(gpu.ROOT / f"configs/{name}.yaml", [], gpu.TASKS)
    with torch.device("meta"):
        model = gpu.TASKS[config.task](config).build_model().eval()
    with torch.inference_mode():
        assert len(model(*gpu.model_inputs(config, "meta", torch.float32))) == 1


@pytest.mark.parametrize("part", [1, 2, 3, 4])
def test_parts_take_at_most_nine_minutes(part):
    assert sum(section.seconds for section in gpu.SECTIONS.values() if section.part == part) <= 540
