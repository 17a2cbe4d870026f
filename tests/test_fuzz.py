"""The short form of benchmarks/fuzz.py: damaged files end in exit code 0 or 2 and one line."""
import sys

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import fuzz

pytest.importorskip("av")
pytest.importorskip("mido")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    fuzz.make_samples(folder)
    fuzz.make_run(folder)
    return folder


@pytest.mark.parametrize("kind", fuzz.CASES)
def test_damaged_files_end_in_one_line(samples, kind):
    results = fuzz.fuzz(4, 60, seed=1, samples=samples, kinds=(kind,))
    assert len(results[kind]) == 4
    assert [result.error for result in results[kind]] == [""] * 4


def test_the_judge_finds_what_is_wrong(samples, monkeypatch):
    def crash(rng, samples):
        raise KeyError("no such key")

    def hang(rng, samples):
        fuzz.time.sleep(10)

    def spend(rng, samples):
        with pytest.raises(MemoryError):
            bytearray(2**33)
        return "predict", ["--ckpt", "missing.pt", "a", "--device", "cpu"]

    def delete(rng, samples):
        (samples / "gray.png").unlink()
        return "predict", ["--ckpt", "missing.pt", "a", "--device", "cpu"]

    monkeypatch.setattr(fuzz, "SECONDS", 1)
    for case, error in (crash, "exit code 70: KeyError"), (hang, "took more than"), (delete, "changed the run folder"):
        monkeypatch.setitem(fuzz.CASES, "bad", case)
        assert error in fuzz.run_case_alone("bad", 0, 0, samples).error
    monkeypatch.setitem(fuzz.CASES, "bad", spend)
    assert not fuzz.run_case_alone("bad", 0, 0, samples).error
