"""Language models on text: masked words, baselines, and vocabularies."""
import numpy as np
import pytest
import tokenizers
import torch

from perceiver.config import build, from_dict
from perceiver.data import (IGNORE, ByteTokenizer, IdTokenizer, JsonTokenizer, Tokens, TrainKeys, eval_loader,
                            train_loader)
from perceiver.distributed import Ranks
from perceiver.errors import UserError
from perceiver.tasks import TASKS
from perceiver.tasks.base import StopSequences, TextSample, unigram_bits
from perceiver.tasks.masked_lm import MaskedBlocks, MaskedLM, MaskedTextDataConfig, MaskedWindows
from perceiver.tasks.text import CausalLM

ONE = Ranks(0, 1, torch.device("cpu"))
decode = ByteTokenizer().decode


def words_of(length: int, seed: int = 0) -> Tokens:
    """A corpus of words with 1 to 9 bytes, separated by different kinds of whitespace."""
    rng = np.random.default_rng(seed)
    text = b""
    while len(text) < length:
        text += bytes(rng.integers(97, 123, rng.integers(1, 10)).astype(np.uint8)) + rng.choice([b" ", b"\n", b"\t  "])
    return Tokens(np.frombuffer(text[:length], np.uint8), 6)


def spans(ids: np.ndarray) -> list[slice]:
    """The places of the words, found with Python's `split`."""
    text, found, start = bytes((ids - 6).astype(np.uint8)), [], 0
    for word in text.split():
        start = text.index(word, start)
        found.append(slice(start, start + len(word)))
        start += len(word)
    return found


def test_whole_words_are_masked_as_often_as_they_should():
    tokens = words_of(100_000)
    example = MaskedWindows(tokens, len(tokens), 0.15, seed=0)[0, 0]
    ids, inputs, labels = tokens[:], example["input_ids"], example["labels"]
    words = spans(ids)
    # Only whole words are selected.
    chosen = [word for word in words if (labels[word] != IGNORE).any()]
    assert all(np.array_equal(labels[word], ids[word]) for word in chosen)
    assert (labels != IGNORE).sum() == sum(word.stop - word.start for word in chosen)
    assert len(chosen) / len(words) == pytest.approx(0.15, abs=0.01)
    assert np.array_equal(inputs[labels == IGNORE], ids[labels == IGNORE])

    masked = [word for word in chosen if (inputs[word] == ByteTokenizer.MASK).any()]
    assert all((inputs[word] == ByteTokenizer.MASK).all() for word in masked)
    long = [word for word in chosen if word.stop - word.start > 3]  # random bytes hardly ever equal such a word
    kept = [word for word in long if np.array_equal(inputs[word], ids[word])]
    masked = [word for word in masked if word in long]
    assert len(masked) / len(long) == pytest.approx(0.8, abs=0.04)
    assert len(kept) / len(long) == pytest.approx(0.1, abs=0.03)
    replaced = np.concatenate([inputs[word] for word in long if word not in masked and word not in kept])
    assert replaced.min() >= 6 and replaced.max() < 262 and len(set(replaced)) > 240  # replacements are random bytes


def test_masks_are_a_function_of_seed_step_and_index():
    tokens = words_of(5000)
    windows = MaskedWindows(tokens, 64, 0.15, seed=0)
    assert all(np.array_equal(windows[3, 1][name], windows[3, 1][name]) for name in ("input_ids", "labels"))
    for other in (windows[3, 2], windows[4, 1], MaskedWindows(tokens, 64, 0.15, seed=1)[3, 1]):
        assert not np.array_equal(other["input_ids"], windows[3, 1]["input_ids"])
    batches = [list(train_loader(windows, TrainKeys(4, 2, ONE, 0, 2), workers)) for workers in (0, 2)]
    for a, b in zip(*batches, strict=True):
        assert set(a) == {"input_ids", "labels", "unreadable"} and a["input_ids"].dtype == torch.long
        assert all(torch.equal(a[name], b[name]) for name in a)
    whole = MaskedWindows(Tokens(words_of(66).values, 6), 64, 0.15, 0)  # windows begin at every possible place
    starts = {decode([t if n == IGNORE else n for t, n in zip(e["input_ids"], e["labels"])])
              for e in (whole[step, 0] for step in range(40))}
    assert len(starts) >= 3


def test_validation_blocks_cover_the_text_with_fixed_masks():
    tokens = words_of(150)
    blocks = MaskedBlocks(tokens, 64, 0.15)
    assert len(blocks) == 3
    text = []
    for index in range(3):
        block, again = blocks[index], MaskedBlocks(tokens, 64, 0.15)[index]
        assert all(np.array_equal(block[name], again[name]) for name in block)
        real = ~block["pad_mask"]
        chosen = block["labels"] != IGNORE
        assert chosen.any() and not (chosen & ~real).any() and (block["input_ids"][~real] == ByteTokenizer.PAD).all()
        assert chosen[block["input_ids"] == ByteTokenizer.MASK].all()
        if index != 2:
            assert real.all()
        text += [np.where(chosen, block["labels"], block["input_ids"])[real]]
    padded = blocks[2]["pad_mask"]
    assert padded.tolist() == [False] * 22 + [True] * 42
    batches = list(eval_loader(blocks, 2, ONE, 0))
    assert "pad_mask" not in batches[0] and torch.equal(batches[1]["pad_mask"][0], torch.from_numpy(padded))


def test_every_text_has_something_to_predict():
    for text in (b"a", b"ab cd", b" x "):
        labels = MaskedBlocks(Tokens(np.frombuffer(text, np.uint8), 6), 8, 0.01)[0]["labels"]
        assert (labels != IGNORE).any()
    assert (MaskedBlocks(Tokens(np.frombuffer(b" \n", np.uint8), 6), 8, 0.01)[0]["labels"] == IGNORE).all()
    assert MaskedBlocks(Tokens(np.frombuffer(b"a b", np.uint8), 6), 3, 1.0)[0]["labels"].tolist() == [103, IGNORE, 104]
    with pytest.raises(UserError, match="10 bytes.*max_seq_len=11"):
        MaskedWindows(words_of(10), 11, 0.15, 0)
    with pytest.raises(UserError, match="mask_prob=0"):
        build(MaskedTextDataConfig, {"mask_prob": 0})


def test_token_ids_have_no_words(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(100, dtype=np.uint16))
    config = from_dict({"task": "masked_lm", "data": {"path": str(tmp_path / "ids.npy")}}, TASKS)
    with pytest.raises(UserError, match="ids.npy holds token ids"):
        MaskedLM(config).load_data()


def test_a_sample_shows_the_masked_text(tmp_path):
    """Every selected byte is a _, and no other byte differs from the original."""
    text = "some words that stand in a text which is long enough to have several of them masked " * 3
    (tmp_path / "text.txt").write_text(text * 20)
    model = {"num_latents": 4, "num_latent_channels": 16, "input": {"max_seq_len": 240, "num_input_channels": 16},
             "encoder": {"num_cross_attention_heads": 1, "num_self_attention_heads": 1},
             "decoder": {"num_cross_attention_heads": 1}}
    config = from_dict({"task": "masked_lm", "model": model, "data": {"path": str(tmp_path / "text.txt")}}, TASKS)
    task = MaskedLM(config)
    model = task.build_model().eval()
    task.load_data()
    with torch.inference_mode():
        shown = task.visualize(model)
    example = task.val_set[0]
    original = decode(np.where(example["labels"] == IGNORE, example["input_ids"], example["labels"]).tolist())
    selected = [label != IGNORE for label in example["labels"]]
    assert any(selected) and len(shown["masked"]) == len(original)
    assert all(a == ("_" if chosen else b) for a, b, chosen in zip(shown["masked"], original, selected))
    assert shown["attention"].dtype == torch.uint8


def test_the_unigram_baseline_by_hand():
    train = Tokens(np.frombuffer(b"aab" * 50, np.uint8), 6)

    class Labels:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return {"labels": np.array([[97 + 6, IGNORE], [98 + 6, 98 + 6]][index])}

    total = 150 + 99  # each of the 99 values up to b counts once more
    expected = -(np.log2(101 / total) + 2 * np.log2(51 / total)) / 3
    assert unigram_bits(train, Labels()) == pytest.approx(expected)


def test_the_vocabulary_follows_the_data(tmp_path):
    """The default size is 262. Token ids may need fewer. The checkpoint remembers that the data was token ids."""
    small = {"max_seq_len": 16, "num_latents": 4, "num_channels": 16, "num_heads": 2}
    np.save(tmp_path / "ids.npy", np.tile(np.arange(50, dtype=np.uint16), 10))
    (tmp_path / "text.txt").write_text("words " * 100)

    def task(path, **model):
        return CausalLM(from_dict({"task": "causal_lm", "model": small | model, "data": {"path": str(path)}}, TASKS))

    assert task(tmp_path / "text.txt").config.model.vocab_size == 262
    ids = task(tmp_path / "ids.npy", vocab_size=50)
    ids.load_data()
    again = task(tmp_path / "ids.npy", vocab_size=50)
    again.load_state_dict(ids.state_dict())
    assert ids.unit == again.unit == "token" and isinstance(again.tokenizer, IdTokenizer)
    with pytest.raises(UserError, match="token 49.*vocab_size is 49"):
        task(tmp_path / "ids.npy", vocab_size=49).load_data()
    np.save(tmp_path / "negative.npy", np.tile(np.arange(-1, 9), 10))
    with pytest.raises(UserError, match="token -1"):
        task(tmp_path / "negative.npy", vocab_size=49).load_data()
    with pytest.raises(UserError, match="model.vocab_size=200 is too small for bytes"):
        task(tmp_path / "text.txt", vocab_size=200).load_data()


def test_windows_of_random_lengths(tmp_path):
    """All windows of a step have one of the lengths, and they are the ends of the full windows."""
    (tmp_path / "text.txt").write_bytes(bytes(range(256)) * 4)

    def training_set(**data):
        model = {"max_seq_len": 40, "num_latents": 16, "num_channels": 16, "num_heads": 2}
        config = {"task": "causal_lm", "model": model, "data": {"path": str(tmp_path / "text.txt"), **data}}
        return CausalLM(from_dict(config, TASKS)).load_data()[0]

    full, short = training_set(), training_set(random_lengths=True)
    lengths = set()
    for step in range(30):
        length = len(short[step, 0]["input_ids"])
        lengths.add(length)
        for index in range(3):
            expected, example = full[step, index], short[step, index]
            assert np.array_equal(example["input_ids"], expected["input_ids"][-length:])
            assert np.array_equal(example["labels"], expected["labels"])
    assert lengths == {40, 24}  # the next one, 8, is below num_latents


def end(tokenizer, prompt, tokens, *texts):
    """The text of a sample of `tokens`, whether it is shown piece by piece or at once, and the number of its tokens."""
    sample = TextSample(tokenizer, tokenizer.encode(prompt), StopSequences(tokenizer, list(texts)))
    pieces = [sample.push(token) for token in tokens]
    pieces.append(sample.finish())
    assert "".join(pieces) == sample.text
    return sample.text, sample.num_tokens


def test_a_text_ends_at_end_of_text_and_at_stop_texts():
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer = JsonTokenizer(tokenizer.to_str(), "here")
    assert tokenizer.end_of_text == 3 and ByteTokenizer.end_of_text == ByteTokenizer.EOS
    assert end(tokenizer, "a", [1, 0, 3, 1]) == (" b a", 3)
    assert end(tokenizer, "a", [1, 0, 0, 1], "a a") == (" b ", 3)
    assert end(tokenizer, "a", [1, 0, 0, 1], "b b") == (" b a a b", 4)
    text = ByteTokenizer()
    assert end(text, "x", text.encode("né, né. no"), "é.", "o") == ("né, n", 9)
    assert end(text, "x", [*text.encode("né"), text.EOS, *text.encode("no")]) == ("né", 4)
    ids = IdTokenizer()
    assert end(ids, "1", [17, 4, 170, 17, 42, 17, 4, 5], "17 42", "7") == (" 17 4 170", 5)
    with pytest.raises(UserError, match="--stop"):
        end(text, "x", [1], "")
