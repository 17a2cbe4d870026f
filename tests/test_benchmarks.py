"""benchmarks/compare.py: the models of our side, wrong arguments, the tables. No peer is needed."""
import sys

import pytest
import torch

from conftest import ROOT
from perceiver.decoding import window_bounds
from perceiver.errors import run_script

sys.path.append(str(ROOT / "benchmarks"))
import bf16_speed  # noqa: E402
import compare  # noqa: E402
from rows import PREFIX, ROWS, TOKENS, make_inputs  # noqa: E402
from sides import PEERS, Lucidrains, Ours, cut_patches  # noqa: E402
from worker import FlopCounter, Worker, count_flops  # noqa: E402


@pytest.mark.parametrize("row", ROWS)
def test_our_side_builds_the_stated_model(row):
    assert Worker("ours", "meta", "float32").build(row)["parameters"] == ROWS[row].parameters


@pytest.mark.parametrize("row, expected", [
    ("ar-train", 107e9), ("mlm-forward", 121e9), ("mlm-train", 363e9), ("imagenet-forward", 407e9),
    ("imagenet-train", 1220e9), ("mnist-train", 40.5e9), ("flow-forward", 1897e9), ("video-forward", 307e9)])
def test_flops_of_our_side(row, expected):
    """Matrix products, with the backward pass, without padding. `expected` is for attention that always projects."""
    worker = Worker("ours", "meta", "float32")
    worker.build(row)
    assert expected / 3 < count_flops(worker) < 1.01 * expected


def test_our_side_decodes_and_trains():
    worker = Worker("ours", "cpu", "float32")
    worker.build("mnist-train")
    worker.inputs = worker.inputs[:2]
    before = worker.model.output_adapter.linear.bias.clone()
    assert worker.unit()["seconds"] > 0
    assert (worker.model.output_adapter.linear.bias - before).abs().max() > 1e-5

    model, start = Ours().decode()
    model.eval()
    prompt = make_inputs(ROWS["decode-512"], "cpu")
    with torch.inference_mode():
        logits = start(prompt)(prompt[:1])
        expected = model(torch.cat((prompt, prompt[:1]))[None], num_latents=513 - PREFIX[512])[:, -1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("bf16, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_bf16_and_float32_take_turns(bf16, dtype):
    worker = Worker("ours", "cpu", "float32")
    worker.build("mnist-train")
    worker.inputs = worker.inputs[:2]
    assert bf16_speed.seconds(worker, bf16) > 0
    assert worker.logits().dtype is dtype


def test_a_process_measures_memory():
    """In a new process, so no freed memory is left that the work could use. Decoding needs at least its caches."""
    with compare.Process("ours", ROOT, "cpu", "auto", MALLOC_MMAP_THRESHOLD_=str(2**17)) as process:
        assert process("build", row="decode-512")["parameters"] == 30_563_078
        memory = process("memory")["bytes"]
    caches = 4 * 2 * 512 * (4096 + 8 * 512)
    assert caches < memory < 3 * caches


@pytest.mark.parametrize("prompt", PREFIX)
def test_both_sides_decode_with_the_same_prefix(prompt):
    """Our decoder moves its first latent by itself; krasserm's gets the prefix. Neither moves in the timed tokens."""
    for length in (prompt + 1, prompt + 2 + TOKENS):
        assert window_bounds(length, 4096, 512, 256) == (0, PREFIX[prompt])


def test_flops_of_matrix_products():
    x = torch.randn(3, 4, 5, requires_grad=True)
    weight = torch.randn(6, 5, requires_grad=True)
    with FlopCounter() as counter:
        (x @ weight.T).sum().backward()
    assert counter.flops == 3 * 2 * 3 * 4 * 5 * 6  # forward, and the gradients of x and of weight


def test_patches_hold_the_neighbors_of_a_pixel():
    frames = torch.arange(1.0, 13.0).view(1, 1, 1, 3, 4)
    patches = cut_patches(frames)
    assert patches.shape == (1, 1, 9, 3, 4)
    assert patches[0, 0, :, 0, 0].tolist() == [0, 0, 0, 0, 1, 2, 0, 5, 6]


def test_peers_have_rows():
    assert PEERS["krasserm"].has(ROWS["decode-512"]) and not Lucidrains.has(ROWS["decode-512"])
    assert all(Ours.has(row) for row in ROWS.values())
    for row in ROWS.values():
        assert any(PEERS[peer].has(row) for peer in PEERS if peer != "ours"), row


@pytest.mark.parametrize("arguments, words", [
    ("--rows fast", "--rows fast: choose from ar-train"), ("--peers jax", "--peers jax: choose from lucidrains"),
    ("--rounds 0", "--rounds 0 must be at least 1"), ("--rounds many", "invalid int value: 'many'"),
    ("--precision int8", "invalid choice: 'int8'"), ("--peers ours", "--peers ours needs --peer-dir"),
    ("--peers krasserm --peer-dir nowhere", "nowhere holds no package perceiver"),
    ("--peer-dir nowhere", "--peer-dir needs --peers with exactly one peer"),
    ("--device tpu", "--device tpu is not available"), ("--speed 3", "unrecognized arguments: --speed 3"),
    ("--rows mnist-train --peers lucidrains --peer-dir LUCIDRAINS", "none of the peers has the rows mnist-train"),
    ("--rows loader --out FILE", "--out FILE")])
def test_a_wrong_argument_gives_one_line(arguments, words, monkeypatch, capsys, tmp_path):
    (tmp_path / "perceiver_ar_pytorch").mkdir()
    (tmp_path / "file").touch()
    arguments = arguments.replace("LUCIDRAINS", str(tmp_path)).replace("FILE", str(tmp_path / "file"))
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        run_script(compare.main)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert words.replace("FILE", str(tmp_path / "file")) in err and err.count("\n") == 1


def test_table():
    """Ratios 1, 2, 3, 4, 5: the quartiles are 1.5 and 4.5. The median of both times is that of the third pair."""
    result = {"row": "mnist-train", "peer": "krasserm", "pairs": [[0.01, 0.01 * ratio] for ratio in (3, 1, 5, 2, 4)],
              "floors": [0.004, 0.004, 0.005, 0.005, 0.005], "parameters": [907_212, 907_212], "bf16": False,
              "memory": [2**20 * 30, 2**20 * 40], "difference": 1.23e-6, "scale": 0.97}
    row = compare.table([result]).splitlines()[2]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        ROWS["mnist-train"].work, "krasserm", "907,212", "10.00 ms", "30.00 ms", "3.00 (1.50 .. 4.50)", "30 MiB",
        "40 MiB", "0.75", "5.00 ms", "2.00", "1e-06 (std 1.0)"]
    start = {"row": "start-up", "peer": "lucidrains", "pairs": [[2.0, 3.0]], "floors": [], "parameters": [5, 1000],
             "bf16": True}
    header, line, *rows = compare.table([result, start]).splitlines()
    assert len({text.count("|") for text in (header, line, *rows)}) == 1
    assert [cell.strip() for cell in rows[1].strip("|").split("|")] == [
        ROWS["start-up"].work + ", ours in bf16", "lucidrains", "5 and 1,000", "2.00 s", "3.00 s",
        "1.50 (1.50 .. 1.50)", "", "", "", "", "", "not the same computation"]


def test_loader_table():
    text = compare.loader_table([{"recipe": "clm", "loader": 12345.6, "step": 100.0}])
    assert text.splitlines()[2] == "| clm | 12,346 | 100 | 123.5 |"
