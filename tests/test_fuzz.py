"""The short form of benchmarks/fuzz.py: damaged files end in exit code 0 or 2 and one line."""
import sys

import pytest

from conftest import ROOT, run_script

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


def test_damaged_files_end_in_one_line():
    """Four cases of each kind, forked from a process that has run no other test."""
    count = 4 * len(fuzz.CASES)
    result = run_script("benchmarks/fuzz.py", "--count", count, "--seed", 1)
    assert result.returncode == 0, result.stderr
    *_, total, _ = result.stdout.splitlines()
    cells = [cell.strip() for cell in total.split("|")]
    cases, wrong = cells[2], cells[6]
    assert (cases, wrong) == (str(count), "0"), result.stderr


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
