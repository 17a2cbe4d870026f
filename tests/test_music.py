"""Music: MIDI files, events, corpora, windows, training, and generation."""
import json
import re
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from conftest import ROOT, read_metrics, run_script
from perceiver.config import load_config
from perceiver.data import IGNORE, TextBlocks, Tokens, eval_loader
from perceiver.distributed import Ranks
from perceiver.errors import UserError
from perceiver.tasks import TASKS, music
from perceiver.tasks.music import (PAD, SHIFT, VELOCITY, MusicDataConfig, MusicWindows, Note, SymbolicMusic, compose,
                                   decode, encode, first_seconds, join_pieces, load_music, read_midi, split_pieces,
                                   stretch, transpose, write_midi)

mido = pytest.importorskip("mido")


# ----------------------------------------------------------------------------------------------------------------------
# MIDI files


def random_piece(file, rng: np.random.Generator) -> list[Note]:
    """Writes a MIDI file of random music. Returns its notes without reading the file.

    First draws notes, pedals and tempi. Then applies each pedal to each note, and turns ticks into seconds by exact
    fractions.
    """
    ticks_per_beat = int(rng.choice([24, 96, 480, 960]))
    tempi = [(0, 500_000)] + [(int(tick), int(tempo)) for tick, tempo in zip(
        np.sort(rng.integers(0, 40 * ticks_per_beat, 3)), rng.integers(100_000, 2_000_000, 3))]

    def seconds(tick: int) -> float:
        ends = [start for start, _ in tempi[1:]] + [tick]
        return float(sum(Fraction(max(0, min(end, tick) - start) * tempo, ticks_per_beat * 1_000_000)
                         for (start, tempo), end in zip(tempi, ends)))

    channels = rng.choice([0, 1, 2, 15], 3)  # tracks may share a channel and its pedal
    keys, pedals = [], {}  # (onset, end, pitch, velocity, track) in ticks; (down, up) by channel
    for track in range(3):
        for pitch in rng.choice(range(track, 128, 3), 4, replace=False):  # a pitch is in one track only
            long = rng.random(12) < 0.1  # these notes follow a gap of several seconds
            onsets = np.cumsum(2 * rng.integers(1, 1 + ticks_per_beat * np.where(long, 8, 1)))
            ends = np.sort(onsets + 2 * rng.integers(0, 1 + ticks_per_beat, 12))  # notes of one key may overlap
            keys += [(*map(int, values), track) for values in zip(onsets, ends, [pitch] * 12, rng.integers(1, 128, 12))]
    last = max(end for _, end, *_ in keys)
    for channel in set(channels):
        changes = np.sort(2 * rng.choice(last // 2, 5, replace=False)) + 1  # odd ticks; notes have even ticks
        pedals[channel] = [*changes.tolist(), last]  # down, up, down, up, and down until the end

    midi = mido.MidiFile(ticks_per_beat=ticks_per_beat)
    midi.tracks.append(to_track((tick, mido.MetaMessage("set_tempo", tempo=tempo)) for tick, tempo in tempi[1:]))
    for track in range(3):
        channel = int(channels[track])
        messages = []
        for number, (onset, end, pitch, velocity, _) in enumerate(sorted(key for key in keys if key[4] == track)):
            off = dict(type="note_off") if rng.random() < 0.5 else dict(type="note_on", velocity=0)
            messages += [((onset, number, 0), mido.Message("note_on", note=pitch, velocity=velocity, channel=channel)),
                         ((end, number, 1), mido.Message(note=pitch, channel=channel, **off))]
        if track == np.flatnonzero(channels == channel)[0]:
            for down, tick in enumerate(pedals[channel][:-1], 1):
                value = int(rng.integers(64, 128) if down % 2 else rng.integers(0, 64))
                pedal = mido.Message("control_change", control=64, value=value, channel=channel)
                messages.append(((tick, 0, 0), pedal))
        messages.sort(key=lambda message: message[0])
        midi.tracks.append(to_track((when[0], message) for when, message in messages))
    midi.save(file)

    notes = []
    for onset, end, pitch, velocity, track in keys:
        spans = pedals[channels[track]]
        up = next((up for down, up in zip(spans[::2], spans[1::2]) if down < end < up), end)
        again = min((other[0] for other in keys if other[2] == pitch and other[0] > onset), default=up)
        notes.append(Note(seconds(onset), seconds(max(end, min(up, again))), pitch, velocity))
    return sorted(notes)


def to_track(messages) -> mido.MidiTrack:
    track, now = mido.MidiTrack(), 0
    for tick, message in messages:
        track.append(message.copy(time=tick - now))
        now = tick
    return track


def assert_same(found: list[Note], expected: list[Note], seconds: float):
    """Asserts that both have the same notes: times may differ by `seconds`, velocities within their bins."""
    by_pitch = [sorted(notes, key=lambda note: (note.pitch, note.onset, note.end)) for notes in (found, expected)]
    assert len(found) == len(expected)
    for a, b in zip(*by_pitch):
        assert a.pitch == b.pitch and a.velocity // 4 == b.velocity // 4, (a, b)
        assert abs(a.onset - b.onset) <= seconds + 1e-9 and abs(a.end - b.end) <= seconds + 1e-9, (a, b)


@pytest.mark.parametrize("seed", range(20))
def test_random_files_survive_reading_encoding_decoding_and_writing(tmp_path, seed):
    expected = random_piece(tmp_path / "piece.mid", np.random.default_rng(seed))
    notes = read_midi(tmp_path / "piece.mid")
    assert_same(notes, expected, 0)
    assert [note.velocity for note in notes] == [note.velocity for note in expected]
    events = encode(notes)
    decoded = decode(events)
    assert_same(decoded, expected, 0.01)
    assert events.dtype == np.uint16 and encode(decoded).tolist() == events.tolist()
    write_midi(tmp_path / "again.mid", decoded)
    assert_same(read_midi(tmp_path / "again.mid"), decoded, 0)


def test_bytes_of_a_file_with_running_status_and_drums(tmp_path):
    track = bytes.fromhex("00 90 3c 40  30 3e 50  30 3c 00  00 3e 00"  # running status; velocity 0 ends a note
                          "00 99 24 7f  00 89 24 00"  # a drum
                          "00 ff 51 03 0f 42 40  00 90 40 07"  # tempo of a beat per second; a note without an end
                          "60 b0 40 7f  00 ff 2f 00")  # a pedal that stays down
    data = b"MThd" + bytes.fromhex("00000006 0000 0001 0060") + b"MTrk" + len(track).to_bytes(4, "big") + track
    (tmp_path / "piece.mid").write_bytes(data)
    assert read_midi(tmp_path / "piece.mid") == [
        Note(0.0, 0.5, 60, 64), Note(0.25, 0.5, 62, 80), Note(0.5, 1.5, 64, 7)]


def test_the_pedal_holds_released_keys_until_it_or_the_key_is_used_again(tmp_path):
    def message(kind, **values):
        return mido.Message(kind, **values)

    midi = mido.MidiFile(ticks_per_beat=50)  # a tick is 10 ms
    midi.tracks.append(to_track([
        (0, message("note_on", note=60)), (10, message("control_change", control=64, value=64)),
        (20, message("note_off", note=60)), (30, message("note_on", note=62)), (40, message("note_off", note=62)),
        (50, message("note_on", note=62)), (60, message("note_on", note=64)), (70, message("note_off", note=62)),
        (80, message("control_change", control=64, value=63)), (90, message("note_off", note=64)),
        (95, message("note_on", note=60)), (99, message("note_off", note=60))]))
    midi.save(tmp_path / "piece.mid")
    assert [(note.onset, note.end, note.pitch) for note in read_midi(tmp_path / "piece.mid")] == [
        (0, 0.8, 60), (0.3, 0.5, 62), (0.5, 0.8, 62), (0.6, 0.9, 64), (0.95, 0.99, 60)]


@pytest.mark.parametrize("content, reason", [
    (b"", "too early"), (b"MThd", "too early"), (b"this is a text, and a long one", "Probably not a MIDI file"),
    (b"\x89PNG\r\n\x1a\n" + bytes(50), "Probably not a MIDI file"), ("cut", "too early"), ("junk", ""),
    (b"MThd\0\0\0\6\0\0\0\1\0\x60MTrk\0\0\0\4\0\xff\x2f\0", "no notes"),
    (b"MThd\0\0\0\6\0\2\0\1\0\x60MTrk\0\0\0\4\0\xff\x2f\0", "not simultaneous"),
    (b"MThd\0\0\0\6\0\1\0\1\xe7\x28MTrk\0\0\0\4\0\xff\x2f\0", "not in beats"), (None, "No such file"),
    (b"MThd\0\0\0\6\0\0\0\1\0\1MTrk\0\0\0\x0f\0\x90\x3c\x40\xff\xff\xff\x7f\x80\x3c\0\0\xff\x2f\0",
     "more than a day"),  # 37 bytes that would become millions of events
])
def test_a_broken_file_is_one_clear_line(tmp_path, content, reason):
    file = tmp_path / "broken.mid"
    if isinstance(content, str):
        write_midi(file, compose(0))
        whole = file.read_bytes()
        content = whole[:500] if content == "cut" else whole[:30] + b"\xff" * 99 + whole[30:]
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=f"broken.mid.*{reason}") as raised:
        read_midi(file)
    assert "\n" not in str(raised.value)


def test_without_mido_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mido", None)
    with pytest.raises(UserError, match="pip install mido"):
        read_midi("piece.mid")
    (tmp_path / "a.mid").touch()
    (tmp_path / "b.mid").touch()
    with pytest.raises(UserError, match="pip install mido"):
        load_music(MusicDataConfig(path=str(tmp_path), cache_dir=str(tmp_path / "cache")))


# ----------------------------------------------------------------------------------------------------------------------
# Events


def test_events_of_a_few_notes():
    notes = [Note(2.35, 2.45, 60, 100), Note(2.35, 3.35, 64, 103), Note(2.45, 2.45, 60, 104), Note(6.35, 6.36, 61, 104)]
    assert encode(notes).tolist() == [
        355, 355, 290, VELOCITY + 25, 60, 64,  # 1 s, 1 s, 350 ms, a velocity for two notes
        SHIFT + 9, 128 + 60, VELOCITY + 26, 60,  # a note ends before the next note of its pitch begins
        SHIFT, 128 + 60, SHIFT + 88, 128 + 64,  # a note without a duration lasts 10 ms
        355, 355, 355, 61, SHIFT, 128 + 61]
    assert encode([]).tolist() == [] and SymbolicMusic.vocab_size == 389


def test_rounding_errors_do_not_add_up():
    """The notes begin every 14.9 ms. Rounding each distance to 10 ms would lose almost a second in all."""
    notes = [Note(0.0149 * n, 0.0149 * n + 0.003, 60, 64) for n in range(200)]
    assert_same(decode(encode(notes)), notes, 0.01)
    notes = [Note(0, 3600, 60, 64), Note(3000.004, 3001, 61, 64)]  # more steps than 16 bits can count
    assert_same(decode(encode(notes)), notes, 0.01)


def test_the_first_of_two_notes_of_a_pitch_ends_first():
    notes = [Note(0, 1, 60, 40), Note(0.5, 2, 60, 80), Note(3, 4, 60, 40), Note(3, 5, 60, 80)]
    assert [(note.onset, note.end, note.velocity // 4) for note in decode(encode(notes))] == [
        (0, 1, 10), (0.5, 2, 20), (3, 4, 10), (3, 5, 20)]


def test_whatever_a_model_writes_can_be_played(tmp_path):
    assert decode([128 + 60, VELOCITY, 60, SHIFT + 9, 60, PAD, 128 + 60, 128 + 60, 128 + 60, 62]) == [
        Note(0, 0.1, 60, 2), Note(0.1, 0.11, 60, 2), Note(0.1, 0.11, 62, 2)]
    assert decode([60, 355, 62, 355, 355]) == [Note(0, 1, 60, 66), Note(1, 2, 62, 66)]  # no ends: a second each
    rng = np.random.default_rng(0)
    for _ in range(20):
        notes = decode(rng.choice([*range(40), *range(128, 168), *range(SHIFT, PAD + 1)], 300).tolist())
        write_midi(tmp_path / "piece.mid", notes)
        kinds = [message.type for message in mido.MidiFile(tmp_path / "piece.mid") if not message.is_meta]
        assert kinds.count("note_on") == kinds.count("note_off") == len(notes) > 20
        again = decode(encode(notes))
        for part in ("onset", "end"):  # compared alone: with a missing end, a note may end before an older one
            one, other = (sorted((getattr(note, part), note.pitch) for note in found) for found in (notes, again))
            assert one == other


def test_transposition_and_stretching_change_one_thing():
    notes = decode(encode(compose(1)))
    events = encode(notes)
    assert decode(transpose(events, 5)) == [replace(note, pitch=note.pitch + 5) for note in notes]
    assert stretch(events, 1.0).tolist() == events.tolist()
    for factor in (0.5, 0.953, 1.05, 30.0):
        expected = [replace(note, onset=note.onset * factor, end=note.end * factor) for note in notes]
        assert_same(decode(stretch(events, factor)), expected, 0.005 if factor > 0.9 else 0.01)
    # a part of a piece may begin and end anywhere
    assert stretch(np.array([355, 128 + 60, 290, 355]), 1.2).tolist() == [355, 275, 128 + 60, 355, 317]
    assert transpose(np.array([120, 128, 300]), 9).tolist() == [127, 135, 300]  # limited by pitch 127
    assert transpose(np.array([120, 128, 300]), -9).tolist() == [120, 128, 300]
    assert transpose(np.array([300, 301]), 5).tolist() == [300, 301]


# ----------------------------------------------------------------------------------------------------------------------
# Corpora and windows


def test_generated_pieces_have_a_form_and_differ():
    notes = sorted(compose(7))
    assert notes == sorted(compose(7)) and notes[0] != sorted(compose(8))[0]
    length = max(note.end for note in notes) / 4
    first, second, third, last = ([(round((note.onset + 1e-6) % length, 3), note.pitch, note.velocity) for note in notes
                                   if number == int((note.onset + 1e-6) / length)] for number in range(4))
    assert first == second == last != third
    train, val, note = load_music(MusicDataConfig())
    assert note == "1,000 generated pieces for training, 20 others for validation"
    assert len(split_pieces(train.values)) == 1000 and len(split_pieces(val.values)) == 20
    train, val = ({piece.tobytes() for piece in split_pieces(part.values)} for part in (train, val))
    assert not train & val


def corpus(*lengths: int) -> Tokens:
    """A corpus of pieces with these lengths. Its events count up, so an event shows its position."""
    ids = np.arange(sum(lengths)) % 100
    pieces = np.split(ids.astype(np.uint16), np.cumsum(lengths)[:-1])
    return Tokens(join_pieces(pieces))


def test_windows_are_the_longest_part_of_a_piece_and_a_function_of_seed_step_and_index():
    windows = MusicWindows(corpus(30, 20, 40), 16, 4, seed=3, config=MusicDataConfig())
    padded = 0
    for step in range(100):
        example = windows[step, 1]
        real = ~example["pad_mask"]
        ids, labels = example["input_ids"], example["labels"]
        assert np.array_equal(real, np.sort(real)) and 7 <= real.sum() <= 16  # padding is on the left
        assert (ids[~real] == PAD).all() and (np.diff(ids[real]) == 1).all()
        assert labels.tolist() == [*ids[-3:], ids[-1] + 1]
        padded += (~real).any()
    assert 30 < padded < 90
    one, other = windows[5, 2]["input_ids"], windows[6, 2]["input_ids"]
    assert np.array_equal(one, windows[5, 2]["input_ids"]) and not np.array_equal(one, other)


def test_windows_of_random_lengths_keep_their_labels():
    config = MusicDataConfig(min_seq_len=2)
    windows = MusicWindows(corpus(90), 16, 4, 0, config)
    examples = [windows[step, 0] for step in range(100)]
    assert {(~example["pad_mask"]).sum() for example in examples} == set(range(2, 17))
    for example in examples:
        known = (~example["pad_mask"]).sum()
        assert (example["labels"] != IGNORE).sum() == min(4, known)


def test_augmentation_is_drawn_for_each_window():
    piece = encode(compose(2))
    tokens = Tokens(join_pieces([piece]))
    plain = MusicWindows(tokens, 64, 16, 0, MusicDataConfig())
    moved = MusicWindows(tokens, 64, 16, 0, MusicDataConfig(transpose=3))
    shifts = set()
    for step in range(40):
        a, b = (windows[step, 0]["input_ids"].astype(int) for windows in (plain, moved))
        notes = a < SHIFT
        assert np.array_equal(a[~notes], b[~notes]) and len(set(b[notes] - a[notes])) == 1
        shifts.add((b - a)[notes][0])
    assert shifts == set(range(-3, 4))
    stretched = MusicWindows(tokens, 64, 16, 0, MusicDataConfig(stretch=0.1))
    ratios = [duration(stretched[step, 0]["input_ids"]) / duration(plain[step, 0]["input_ids"]) for step in range(40)]
    assert 0.85 < min(ratios) < 0.95 and 1.05 < max(ratios) < 1.15
    assert np.array_equal(stretched[3, 1]["input_ids"], stretched[3, 1]["input_ids"])


def duration(events: np.ndarray) -> int:
    return sum(event - SHIFT + 1 for event in events if SHIFT <= event < VELOCITY)


@pytest.fixture
def folder(tmp_path):
    """A folder with MIDI files of eight pieces. One file is broken; one more file is in a hidden folder."""
    write_pieces(tmp_path / "midi", {f"{n}.{'mid' if n % 3 else 'MIDI'}": n for n in range(8)})
    (tmp_path / "midi/2.mid").write_bytes(b"MThd")
    write_pieces(tmp_path / "midi", {".trash/9.mid": 9})
    return tmp_path / "midi"


def write_pieces(folder, seeds: dict[str, int]):
    for name, seed in seeds.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_midi(folder / name, compose(seed))


def pieces(tokens: Tokens) -> list[int]:
    """The seeds of the generated pieces in a corpus."""
    known = {encode(compose(n)).tobytes(): n for n in range(20)}
    return [known[piece.tobytes()] for piece in split_pieces(tokens.values)]


def load(folder, **values) -> list[list[int]]:
    config = MusicDataConfig(path=str(folder), cache_dir=str(folder / "cache"), **values)
    train, val, _ = load_music(config)
    return [pieces(train), pieces(val)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_folder_is_encoded_once(folder, capfd, monkeypatch, num_workers):
    # every fourth file is for validation, from the third file on; file 2 is broken
    assert load(folder, val_fraction=0.25, num_workers=num_workers) == [[0, 1, 3, 4, 5, 7], [6]]
    assert re.findall("left out: .*", capfd.readouterr().err) == [
        f"left out: cannot read {folder}/2.mid: it ends too early"]
    with monkeypatch.context() as patch:
        patch.setattr(music, "read_midi", None)
        assert load(folder, val_fraction=0.25) == [[0, 1, 3, 4, 5, 7], [6]]
    write_midi(folder / "2.mid", compose(2))
    assert load(folder, val_fraction=0.25) == [[0, 1, 3, 4, 5, 7], [2, 6]]


def test_splits_that_the_data_defines(folder):
    rows = {"4.mid": "train", "1.mid": "validation", "5.mid": "test", "7.mid": "train"}
    table = folder / "maestro-v3.0.0.csv"
    table.write_text("canonical_title,split,midi_filename\n"
                     + "".join(f'"a, b",{part},{name}\n' for name, part in rows.items()))
    assert load(folder) == [[4, 7], [1]]
    (folder / "1.mid").unlink()
    with pytest.raises(UserError, match="1.mid"):
        load(folder)
    table.write_text("split\ntrain\n")
    with pytest.raises(UserError, match="cannot read .*maestro-v3.0.0.csv: 'midi_filename'"):
        load(folder)
    table.unlink()
    write_pieces(folder, {"train/8.mid": 8, "train/a/9.mid": 9, "valid/10.mid": 10, "test/11.mid": 11})
    assert load(folder) == [[8, 9], [10]]
    (folder / "valid/10.mid").unlink()
    (folder / "valid").rmdir()
    assert load(folder) == [[8], [9]]  # a part of train is held out; test and other files are never used


def test_whole_folders_are_held_out(tmp_path):
    """Versions of one piece share a folder, as in the datasets ASAP and POP909."""
    names = [f"{composer}/{piece}/{player}.mid"
             for composer in ("Bach", "Liszt") for piece in ("Fugue", "Sonata") for player in ("A", "B", "C")]
    write_pieces(tmp_path / "asap", {name: seed for seed, name in enumerate(names)})
    train, val = load(tmp_path / "asap", val_fraction=0.25)
    assert (sorted(train), sorted(val)) == ([0, 1, 2, 3, 4, 5, 9, 10, 11], [6, 7, 8])  # Liszt/Fugue
    pop909 = {}
    for piece in range(5):
        pop909 |= {f"00{piece}/00{piece}.mid": 3 * piece, f"00{piece}/versions/00{piece}-v1.mid": 3 * piece + 1,
                   f"00{piece}/versions/00{piece}-v2.mid": 3 * piece + 2}
    write_pieces(tmp_path / "pop909", pop909)
    train, val = load(tmp_path / "pop909", val_fraction=0.2)
    assert (sorted(train), sorted(val)) == ([0, 1, 2, 3, 4, 5, 9, 10, 11, 12, 13, 14], [6, 7, 8])
    config = MusicDataConfig(path=str(tmp_path / "pop909"), cache_dir=str(tmp_path / "cache"), val_fraction=0.2)
    assert load_music(config)[2] == f"{tmp_path}/pop909: 12 MIDI files for training, 3 for validation (held out)"


def test_missing_data_is_one_line(tmp_path):
    (tmp_path / "one").mkdir()
    write_midi(tmp_path / "one/piece.mid", compose(0))
    for path, reason in (("nowhere", "is not a folder"), ("one", "holds 1 MIDI files"), ("", "no example is readable")):
        (tmp_path / "broken.mid").write_bytes(b"")
        with pytest.raises(UserError, match=reason):
            load_music(MusicDataConfig(path=str(tmp_path / path), cache_dir=str(tmp_path / "cache")))


def test_validation_predicts_every_event_but_the_first_of_a_piece_once():
    pieces = split_pieces(corpus(30, 3, 41).values)
    val_set = torch.utils.data.ConcatDataset([TextBlocks(Tokens(piece), 16, 4, PAD) for piece in pieces])
    labels = torch.cat([batch["labels"].flatten() for batch in
                        eval_loader(val_set, 4, Ranks(0, 1, torch.device("cpu")), 0)])
    assert labels[labels != IGNORE].tolist() == [event for piece in pieces for event in piece[1:]]


# ----------------------------------------------------------------------------------------------------------------------
# The task


SMALL = ["model.max_seq_len=192", "model.num_latents=64", "model.num_channels=64", "model.num_heads=2",
         "model.num_self_attention_layers=1", "model.cross_attention_dropout=0.1", "data.min_seq_len=96",
         "data.transpose=1", "data.stretch=0.02"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a small model on generated pieces with augmentation: its folder, and the output of train.py."""
    run = tmp_path_factory.mktemp("music") / "run"
    result = run_script("train.py", "configs/music.yaml", f"train.out_dir={run}", *SMALL, "train.max_steps=150",
                        "train.eval_every=150")
    assert result.returncode == 0, result.stderr
    return run, result.stdout


def test_music_is_learned(trained):
    assert "1,000 generated pieces for training, 20 others for validation" in trained[1]
    found = re.search(r"validation: ([\d.]+) bits per event; the unigram baseline has ([\d.]+)", trained[1])
    assert float(found[1]) < float(found[2]) - 2, found[0]
    assert read_metrics(trained[0], "val")[-1]["bits_per_event"] == pytest.approx(float(found[1]), abs=1e-3)


def continue_piece(run, *args):
    return run_script("generate.py", "--ckpt", run / "checkpoints/best.pt", "--max-new-tokens", "200", *args)


def test_a_piece_is_continued(trained, tmp_path):
    """The notes of the prompt do not change. New notes begin after them."""
    prompt = [note for note in compose(1005) if note.onset < 3]
    write_midi(tmp_path / "piece.mid", prompt)
    result = continue_piece(trained[0], "--prompt", tmp_path / "piece.mid", "--out", tmp_path / "new/long.mid",
                            "--piano-roll", tmp_path / "long.png")
    assert result.returncode == 0 and result.stdout == "", result.stderr
    notes = read_midi(tmp_path / "new/long.mid")
    assert_same([note for note in notes if note.onset < 3][: len(prompt)], prompt, 0.01)
    assert len(notes) > len(prompt) + 20
    assert all(note.onset >= max(given.end for given in prompt) - 0.01 for note in sorted(notes)[len(prompt) :])
    assert f"{len(prompt)} notes of the prompt and {len(notes) - len(prompt)} new notes" in result.stderr
    assert (tmp_path / "long.png").read_bytes()[:4] == b"\x89PNG"


def test_several_samples_of_a_prompt_longer_than_the_context(trained, tmp_path):
    prompt = compose(1006)
    write_midi(tmp_path / "piece.mid", prompt)
    result = continue_piece(trained[0], "--prompt-file", tmp_path / "piece.mid", "--out", tmp_path / "long.mid",
                            "--num-samples", "2", "--json")
    assert result.returncode == 0 and "the model sees only the last 192" in result.stderr, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["files"] for line in lines] == [[f"{tmp_path}/long-{number}.mid"] for number in (1, 2)]
    assert all(line["prompt_notes"] == len(prompt) and line["new_notes"] > 0 for line in lines)
    first, second = (read_midi(tmp_path / f"long-{number}.mid") for number in (1, 2))
    assert first != second
    for notes in (first, second):
        assert_same(notes[: len(prompt)], prompt, 0.01)


def test_the_first_seconds_of_a_piece():
    notes = [Note(0.0, 1.0, 60, 64), Note(1.5, 3.0, 62, 64), Note(2.0, 2.5, 64, 64)]
    assert first_seconds(notes, 2.0) == [notes[0], Note(1.5, 2.0, 62, 64)] and first_seconds(notes, 9.0) == notes


def test_mistakes_are_one_line_and_exit_code_2(trained, tmp_path):
    (tmp_path / "broken.mid").write_bytes(b"MThd\0\0")
    result = continue_piece(trained[0], "--prompt", tmp_path / "broken.mid")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: cannot read {tmp_path}/broken.mid: it ends too early\n"


def test_the_recipe_needs_no_vocabulary_and_drops_prefixes():
    config = load_config(ROOT / "configs/music.yaml", ["model.cross_attention_dropout=0.25"], TASKS)
    task = SymbolicMusic(config)
    assert config.model.vocab_size == 389
    example = task.load_data()[0][7, 1]
    assert len(example["input_ids"]) == 768 and len(example["prefix_keep"]) == 384  # 3/4 of 768 - 256
    assert task.data_note == "1,000 generated pieces for training, 20 others for validation"


@pytest.mark.parametrize("override", ["model.vocab_size=388", "data.min_seq_len=769", "data.min_seq_len=0",
                                      "data.dataset=giantmidi", "data.transpose=-1", "data.stretch=1.0"])
def test_wrong_values_are_named(override):
    key, _, value = override.partition("=")
    with pytest.raises(UserError, match=f"{key}='?{value}'?"):
        config = load_config(ROOT / "configs/music.yaml", [override], TASKS)
        TASKS[config.task](config)
