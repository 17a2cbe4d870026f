import hashlib
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT

from perceiver.data import (IGNORE, ByteTokenizer, IdTokenizer, Shuffled, TextBlocks, TextDataConfig, TextWindows,
                            Tokens, TrainKeys, eval_loader, load_text, text, train_loader)
from perceiver.distributed import Ranks
from perceiver.errors import UserError


def ranks(world_size: int) -> list[Ranks]:
    return [Ranks(rank, world_size, torch.device("cpu")) for rank in range(world_size)]


def test_bytes_are_tokens_as_in_deepminds_tokenizer():
    tokenizer = ByteTokenizer()
    # from the colab of the masked language model: " missing."
    assert tokenizer.encode(" missing.") == [38, 115, 111, 121, 121, 111, 116, 109, 52]
    text = "naïve 🙂 \0 \x7f"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([1, *tokenizer.encode("a"), 3, 0]) == "a"
    assert tokenizer.encode("\udcff") == [255 + 6]  # a byte that is no UTF-8, as Python reads it


def test_streaming_holds_unfinished_characters_back():
    tokenizer = ByteTokenizer()
    state, parts = tokenizer.new_stream(), []
    for token in tokenizer.encode("é🙂"):
        parts.append(tokenizer.stream([token], state))
    assert parts == ["", "é", "", "", "", "🙂"]
    tokenizer.stream([tokenizer.encode("é")[0]], state)
    assert tokenizer.stream([], state, final=True) == "\ufffd"


def test_ids_are_written_as_numbers():
    assert IdTokenizer().encode(" 3 4\n50 ") == [3, 4, 50]
    with pytest.raises(UserError, match="numbers"):
        IdTokenizer().encode("def")


def test_the_default_corpus_is_this_pythons_library():
    train, val = load_text(TextDataConfig(val_fraction=0.02))
    text = val.values.tobytes().decode("utf-8", "replace")
    assert len(train) > 5_000_000 and len(val) > 50_000
    assert text.count("\ndef ") > 50 and train.offset == 6


def test_own_text_as_file_and_folder(tmp_path):
    (tmp_path / "a").mkdir()
    for n in range(40):
        (tmp_path / "a" / f"{n:02}.txt").write_text(f"<{n}>")
    (tmp_path / "a" / ".hidden").write_text("no")
    (tmp_path / "a" / "picture.png").write_bytes(b"\x89PNG\0\0no")
    train, val = load_text(TextDataConfig(path=str(tmp_path), val_fraction=0.1))
    assert val.values.tobytes() == b"<5><15><25><35>"
    assert train.values.tobytes() == b"".join(b"<%d>" % n for n in range(40) if n % 10 != 5)

    file = tmp_path / "one.txt"
    file.write_bytes(bytes(range(100)))
    train, val = load_text(TextDataConfig(path=str(file), val_fraction=0.1, max_val_tokens=7))
    assert train.values.tobytes() == bytes(range(90)) and val.values.tobytes() == bytes(range(90, 97))
    assert train[:3].tolist() == [6, 7, 8]


@pytest.mark.parametrize("name, dtype", [("ids.npy", np.int32), ("ids.bin", np.uint16), ("bytes.bin", np.uint8)])
def test_own_token_ids(tmp_path, name, dtype):
    ids = np.arange(200).astype(dtype)
    np.save(tmp_path / name, ids) if name.endswith("npy") else ids.tofile(tmp_path / name)
    config = TextDataConfig(path=str(tmp_path / name), bin_dtype=np.dtype(dtype).name if "bin" in name else "uint16")
    train, val = load_text(config)
    assert config.holds_ids and np.concatenate([train[:], val[:]]).tolist() == ids.tolist()


@pytest.mark.parametrize("names", [("wiki.train.raw", "wiki.valid.raw"), ("wiki.train.tokens", "wiki.valid.tokens"),
                                   ("train.txt", "val.txt")])
def test_folders_with_a_split_of_their_own(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text(name * 3)
    train, val = load_text(TextDataConfig(path=str(tmp_path)))
    assert (train.values.tobytes().decode(), val.values.tobytes().decode()) == tuple(name * 3 for name in names)


def test_wikitext_is_unpacked_from_a_zip_that_is_there(tmp_path):
    with zipfile.ZipFile(tmp_path / "wikitext-103-raw-v1.zip", "w") as archive:
        for part in ("train", "valid", "test"):
            archive.writestr(f"wikitext-103-raw/wiki.{part}.raw", f"text to {part}")
    train, val = load_text(TextDataConfig(dataset="wikitext103", cache_dir=str(tmp_path)))
    assert train.values.tobytes() == b"text to train" and val.values.tobytes() == b"text to valid"


def test_enwik8_is_split_as_customary(tmp_path, monkeypatch):
    content = np.arange(100_000_000, dtype=np.uint32).astype(np.uint8).tobytes()
    with zipfile.ZipFile(tmp_path / "enwik8.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("enwik8", content)
    config = TextDataConfig(dataset="enwik8", cache_dir=str(tmp_path), max_val_tokens=10**9)
    with pytest.raises(UserError, match="checksum"):
        load_text(config)
    monkeypatch.setattr(text, "ENWIK8_MD5", hashlib.md5(content).hexdigest())
    train, val = load_text(config)
    assert (len(train), len(val)) == (90_000_000, 5_000_000) and val[:1] == 90_000_000 % 256 + 6


def test_missing_data_says_what_to_do(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(UserError, match="no network.*wikitext-103-raw-v1.zip.*data.path="):
        load_text(TextDataConfig(dataset="wikitext103", cache_dir=str(tmp_path)))
    for path, content, message in (("none.txt", None, "does not exist"), ("empty.txt", b"", "empty"),
                                   ("bad.npy", b"junk", "cannot read"), ("one.txt", b"a", "validate on")):
        if content is not None:
            (tmp_path / path).write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_text(TextDataConfig(path=str(tmp_path / path)))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="no text files"):
        load_text(TextDataConfig(path=str(tmp_path / "folder")))


def test_windows_are_a_function_of_seed_step_and_index():
    tokens = Tokens(np.arange(1000, dtype=np.uint16))
    windows = TextWindows(tokens, max_seq_len=32, num_latents=8, num_kept=12, seed=3)
    example = windows[5, 2]
    ids = example["input_ids"]
    assert ids.tolist() == list(range(ids[0], ids[0] + 32))
    assert example["labels"].tolist() == list(range(ids[0] + 25, ids[0] + 33))
    keep = example["prefix_keep"]
    assert len(set(keep)) == 12 and min(keep) >= 0 and max(keep) < 24
    for name in example:
        assert np.array_equal(example[name], windows[5, 2][name])
        assert not np.array_equal(example[name], windows[5, 3][name])
        assert not np.array_equal(example[name], windows[6, 2][name])
    with pytest.raises(UserError, match="fewer than model.max_seq_len"):
        TextWindows(Tokens(np.zeros(32, np.uint8)), 32, 8, 12, 0)


def test_every_window_of_a_corpus_can_come():
    windows = TextWindows(Tokens(np.arange(35, dtype=np.uint8)), 32, 8, 24, 0)
    assert {windows[step, 0]["input_ids"][0] for step in range(50)} == {0, 1, 2}
    assert "prefix_keep" not in windows[0, 0]


@pytest.mark.parametrize("length", [2, 5, 9, 17, 33, 34, 100, 101])
def test_blocks_predict_every_token_but_the_first_once(length):
    blocks = TextBlocks(Tokens(np.arange(length, dtype=np.uint8), 6), max_seq_len=32, num_latents=8)
    predicted = []
    for block in (blocks[i] for i in range(len(blocks))):
        ids, labels, padded = block["input_ids"], block["labels"], block["pad_mask"]
        assert len(ids) == len(padded) == 32 and len(labels) == 8
        for position in np.flatnonzero(labels != IGNORE):
            predicted.append(labels[position])
            assert ids[32 - 8 + position] == labels[position] - 1 and not padded[32 - 8 + position]
        assert ids[~padded].tolist() == list(range(ids[~padded][0], ids[~padded][0] + 32 - padded.sum()))
        assert not padded.any() or ids[~padded][0] == 6  # padded only where the corpus begins
    assert predicted == list(range(7, 6 + length))


@pytest.mark.parametrize("world_size, accumulate", [(1, 1), (2, 1), (1, 2), (2, 3)])
def test_ranks_and_micro_batches_share_the_same_batch(world_size, accumulate):
    seen = {}
    for rank in ranks(world_size):
        micro_batches = list(TrainKeys(12, accumulate, rank, first_step=3, last_step=5))
        assert len(micro_batches) == 2 * accumulate
        for i, batch in enumerate(micro_batches):
            assert all(step == 3 + i // accumulate for step, _ in batch)
            seen.setdefault(batch[0][0], []).extend(index for _, index in batch)
    assert {step: sorted(indices) for step, indices in seen.items()} == {3: list(range(12)), 4: list(range(12))}


def test_workers_change_nothing_and_evaluation_sees_everything_once():
    tokens = Tokens(np.arange(1000, dtype=np.uint16))
    windows, blocks = TextWindows(tokens, 32, 8, 12, 0), TextBlocks(tokens, 32, 8)
    rank = ranks(1)[0]
    batches = [list(train_loader(windows, TrainKeys(4, 2, rank, 0, 3), workers)) for workers in (0, 2)]
    assert len(batches[0]) == 6
    for a, b in zip(*batches):
        assert all(torch.equal(a[name], b[name]) for name in a)
    labels = torch.cat([batch["labels"][batch["labels"] != IGNORE]
                        for rank in ranks(3) for batch in eval_loader(blocks, 5, rank, 0)])
    assert sorted(labels.tolist()) == list(range(1, 1000))
    padded = ["pad_mask" in batch for batch in eval_loader(blocks, 5, rank, 0)]
    assert padded[0] and not any(padded[1:])


class Noisy(torch.utils.data.Dataset):
    """Ten numbers with a random one each."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, number: int):
        return {"number": number, "noise": torch.rand(3)}


def test_every_epoch_has_each_example_once_in_another_order():
    shuffled = Shuffled(Noisy(), batch_size=4, seed=0)
    numbers = [shuffled[step, index]["number"] for step in range(10) for index in range(4)]
    epochs = [tuple(numbers[start : start + 10]) for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len(set(epochs)) == 4
    assert numbers[:10] != [Shuffled(Noisy(), 4, seed=1)[0, index]["number"] for index in range(10)]
    assert shuffled[0, 1]["number"] == numbers[1]  # an earlier epoch again


def test_augmentation_is_a_function_of_the_key_and_disturbs_nothing():
    shuffled = Shuffled(Noisy(), batch_size=4, seed=0)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    noise = shuffled[3, 2]["noise"]
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(shuffled[3, 2]["noise"], noise)
    others = [shuffled[3, 3], shuffled[4, 2], Shuffled(Noisy(), batch_size=4, seed=1)[3, 2]]
    assert not any(torch.equal(other["noise"], noise) for other in others)
    batches = [list(train_loader(shuffled, TrainKeys(4, 2, ranks(1)[0], 2, 5), workers)) for workers in (0, 2)]
    assert torch.equal(batches[0][3]["noise"][0], noise)
    for a, b in zip(*batches, strict=True):
        assert torch.equal(a["number"], b["number"]) and torch.equal(a["noise"], b["noise"])


class Broken(Noisy):

    def __getitem__(self, number: int):
        try:
            raise OSError("on the way")
        except OSError:
            raise UserError(f"cannot read {number}.png: it is truncated")


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_workers_are_one_line(workers):
    with pytest.raises(UserError) as error:
        next(iter(eval_loader(Broken(), 2, ranks(1)[0], workers)))
    assert str(error.value) == "cannot read 0.png: it is truncated"


def test_a_process_that_fails_with_workers_running_ends(tmp_path):
    """At exit, Python ends its workers by a SIGTERM and waits for them: they must not ignore it."""
    script = tmp_path / "leave.py"
    script.write_text("""
import builtins, sys, torch
from perceiver.data import eval_loader
from perceiver.distributed import Ranks
builtins.kept = iter(eval_loader([{"number": 1}] * 8, 2, Ranks(0, 1, torch.device("cpu")), 1))
print(next(builtins.kept))
""")
    result = subprocess.run([sys.executable, script], env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60)
    assert result.returncode == 0
