"""Music: MIDI files, their encoding as events, corpora of pieces, and Perceiver AR on events.

The 388 events are those of Performance RNN, as in the Perceiver AR paper (section 5.3). The ids are krasserm's:

      0 .. 127  a note of this pitch begins        256 .. 355  time passes: 10 ms to 1 s, in steps of 10 ms
    128 .. 255  a note of this pitch ends          356 .. 387  velocity of the notes that follow, in bins of 4
                                                   388         padding, and the end of a piece in a corpus
"""

import csv
import math
import os
from collections import defaultdict, deque
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from torch.utils.data import ConcatDataset, DataLoader
from tqdm import tqdm

from perceiver import decoding, pictures
from perceiver.config import Count, ValFraction
from perceiver.data import (
    PARTS,
    LoaderConfig,
    TextBlocks,
    TextWindows,
    Tokens,
    check_unreadable,
    hold_out_folders,
    left_padded,
    own_process_group,
)
from perceiver.errors import UserError, reading
from perceiver.io import (
    Download,
    cached_array,
    digest,
    fetch,
    import_optional,
    output,
    output_files,
    report,
    save_picture,
    stamp,
    tell,
    visible_files,
)
from perceiver.tasks.base import Autoregression, unigram_bits

NOTE_ON, NOTE_OFF, SHIFT, VELOCITY, PAD = 0, 128, 256, 356, 388  # the first id of each kind of event
STEPS_PER_SECOND = 100

MIDI_ENDINGS = ".mid", ".midi"
SUSTAIN_PEDAL = 64  # MIDI controller number
DRUMS = 9  # the drum channel, which General MIDI calls 10
MAX_BYTES = 2**21  # a message of two bytes takes a kilobyte of memory
MAX_SECONDS = 86_400  # a damaged file of a kilobyte can last for years: millions of events


@dataclass(order=True)
class Note:
    onset: float  # seconds from the start
    end: float  # seconds from the start
    pitch: int  # 0 .. 127; 60 is middle C
    velocity: int  # loudness, 1 .. 127


def first_seconds(notes: list[Note], seconds: float) -> list[Note]:
    """The notes that begin before `seconds`. They end there if they would end later."""
    return [replace(note, end=min(note.end, seconds)) for note in notes if note.onset < seconds]


# ----------------------------------------------------------------------------------------------------------------------
# MIDI files


def read_midi(file) -> list[Note]:
    """The notes of all tracks and channels, sorted by onset.

    The sustain pedal of a channel holds a note after its key is released, until the pedal goes up or the key is struck
    again. If a key is struck twice before its release, the first note ends first. Unterminated notes end at the last
    note or pedal message. Messages that silence a whole channel are ignored. Raises UserError if the file is broken or
    holds no notes.
    """
    notes = []
    down = defaultdict(deque)  # by (track, channel, pitch): notes whose key is down, oldest first
    held = {}  # by channel whose pedal is down: {pitch: released notes that still sound}
    newest = {}  # by (channel, pitch): onset of the newest note
    for seconds, track, message in midi_messages(file):
        channel = message.channel
        if message.type == "control_change":
            if message.value >= 64:
                held.setdefault(channel, defaultdict(list))
            else:
                for note in chain(*held.pop(channel, {}).values()):
                    note.end = seconds
            continue
        pitch = message.note
        keys = down[track, channel, pitch]
        if message.type == "note_on" and message.velocity > 0:
            if channel in held:
                for note in held[channel].pop(pitch, []):
                    note.end = seconds
            note = Note(seconds, math.inf, pitch, message.velocity)
            notes.append(note)
            keys.append(note)
            newest[channel, pitch] = seconds
        elif keys:
            note = keys.popleft()
            if channel in held and note.onset == newest[channel, pitch]:
                held[channel][pitch].append(note)
            else:
                note.end = seconds
    if not notes:
        raise UserError(f"{file} holds no notes")
    for note in notes:
        note.end = min(note.end, seconds)
    return sorted(notes)


def midi_messages(file):
    """Yields note and pedal messages in the order of time: time in seconds, track number, message.

    Leaves out drums (channel 10): their notes are not pitches. Raises UserError if the file is broken.
    """
    mido = import_optional("mido", "reading MIDI files")
    with reading(file):
        if os.path.getsize(file) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes, too many for a piece")
        midi = mido.MidiFile(file)
        if midi.type == 2:
            raise ValueError("its tracks are not simultaneous (MIDI type 2)")
        if midi.ticks_per_beat <= 0:
            raise ValueError("its times are not in beats")
        messages = []  # (tick, track, message)
        for track, content in enumerate(midi.tracks):
            tick = 0
            for message in content:
                tick += message.time
                messages.append((tick, track, message))
        tempo = 500_000  # microseconds per beat
        last_tick = 0
        now = 0  # in microseconds x ticks per beat: integers, so rounding errors do not add up
        for tick, track, message in sorted(messages, key=itemgetter(0)):
            now += (tick - last_tick) * tempo
            last_tick = tick
            seconds = now / midi.ticks_per_beat / 1e6
            if seconds > MAX_SECONDS:
                raise ValueError("it lasts more than a day")
            if message.type == "set_tempo":
                tempo = message.tempo
            is_used = message.type in ("note_on", "note_off") or message.is_cc(SUSTAIN_PEDAL)
            if is_used and message.channel != DRUMS:
                yield seconds, track, message


def write_midi(file, notes: list[Note]):
    """Writes `notes` as a MIDI file with one piano track. Rounds times to 10 ms."""
    mido = import_optional("mido", "writing MIDI files")
    midi = mido.MidiFile(type=0, ticks_per_beat=STEPS_PER_SECOND // 2)  # MIDI's default tempo is 2 beats a second
    track = midi.add_track()
    now = 0
    for step, begins, pitch, velocity in starts_and_ends(notes):
        kind = "note_on" if begins else "note_off"
        track.append(mido.Message(kind, note=pitch, velocity=velocity, time=step - now))
        now = step
    midi.save(file)


# ----------------------------------------------------------------------------------------------------------------------
# Notes <-> events


def encode(notes: list[Note]):
    """Events (n,) of uint16 from notes in any order.

    Three details differ from krasserm's code. Each time is rounded to 10 ms on its own, so rounding errors do not add
    up. A velocity event comes only where the velocity changes. Notes after the last pedal message are kept. So the
    losses per event of the two codes do not compare exactly.
    """
    timed = []  # (step, event)
    velocity_bin = None
    for step, begins, pitch, velocity in starts_and_ends(notes):
        if begins and velocity // 4 != velocity_bin:
            velocity_bin = velocity // 4
            timed.append((step, VELOCITY + velocity_bin))
        timed.append((step, pitch + (NOTE_ON if begins else NOTE_OFF)))
    steps, ids = np.array(timed, np.int64).reshape(-1, 2).T
    return insert_shifts(steps, ids.astype(np.uint16))


def starts_and_ends(notes):
    """(step, whether the note begins, pitch, velocity) for the start and the end of each note, in the order of time.

    A step is 10 ms. Within a step, ends come before starts, and low pitches before high ones. A note shorter than a
    step gets one step; its start and its end are still right to 10 ms. Notes with the same pitch and onset start in the
    order of their ends, because `decode` ends the older note first.
    """
    changes = []
    for note in sorted(notes, key=attrgetter("end")):
        first = round(note.onset * STEPS_PER_SECOND)
        last = round(note.end * STEPS_PER_SECOND)
        if first == last and note.onset + note.end < 2 * first / STEPS_PER_SECOND:
            first -= 1
        last = max(last, first + 1)
        changes += [(first, True, note.pitch, note.velocity), (last, False, note.pitch, 0)]
    return sorted(changes, key=itemgetter(0, 1, 2))


def insert_shifts(steps, ids):
    """Events `ids` (n,) with time shifts before them. `steps` (n,) are the times of the events, in ascending order."""
    full, rest = np.divmod(np.diff(steps, prepend=0), STEPS_PER_SECOND)  # the longest shift is a second
    has_rest = rest > 0
    lengths = full + has_rest + 1  # the shifts before an event, and the event itself
    places = np.cumsum(lengths) - 1  # of the events
    events = np.full(lengths.sum(), VELOCITY - 1, ids.dtype)
    events[places] = ids
    events[places[has_rest] - 1] = SHIFT + rest[has_rest] - 1
    return events


def decode(events) -> list[Note]:
    """The notes of events, in the order of their onsets. Velocities are the centers of their bins.

    A model may generate any sequence. So the end of a note that does not sound is ignored. A note without an end lasts
    a second, or less if the piece ends before. Each note lasts at least 10 ms.
    """
    notes = []  # their times are in steps at first
    sounding = defaultdict(deque)  # by pitch: notes without an end, oldest first
    step, velocity = 0, 66
    for event in map(int, events):  # numpy's uint16 would overflow
        if event < NOTE_OFF:
            note = Note(step, step + STEPS_PER_SECOND, event, velocity)
            notes.append(note)
            sounding[event].append(note)
        elif event < SHIFT:
            if sounding[event - NOTE_OFF]:
                sounding[event - NOTE_OFF].popleft().end = step
        elif event < VELOCITY:
            step += event - SHIFT + 1
        elif event < PAD:
            velocity = 4 * (event - VELOCITY) + 2
    for note in notes:
        note.end = max(min(note.end, step), note.onset + 1) / STEPS_PER_SECOND
        note.onset /= STEPS_PER_SECOND
    return notes


def transpose(events, semitones):
    """Events (n,) with all pitches moved by `semitones`, or by less if a pitch would leave the range of MIDI."""
    is_note = events < SHIFT
    if not is_note.any():
        return events
    pitches = events[is_note].astype(np.int64) % NOTE_OFF
    semitones = np.clip(semitones, -pitches.min(), 127 - pitches.max())
    return events + is_note * semitones


def stretch(events, factor):
    """Events (n,) with all times multiplied by `factor` -> (n',): the number of time shifts may change."""
    events = np.append(events, PAD)  # an event at the end, so that the last shifts count
    is_shift = (SHIFT <= events) & (events < VELOCITY)
    steps = np.cumsum(np.where(is_shift, events - SHIFT + 1, 0))
    stretched = np.rint(steps[~is_shift] * factor).astype(np.int64)
    return insert_shifts(stretched, events[~is_shift])[:-1]


# ----------------------------------------------------------------------------------------------------------------------
# Corpora


@dataclass
class MusicDataConfig(LoaderConfig):
    dataset: Literal["generated", "maestro"] = "generated"  # generated: pieces of `compose`; ignored if path is set
    path: str | None = None  # own data: a folder of MIDI files; see `split_files`
    cache_dir: str = "data"  # holds maestro, downloaded if absent, and encoded pieces
    val_fraction: ValFraction = 0.05  # fraction held out for validation if the data has no split
    min_seq_len: Count | None = None  # windows have a random length from this to model.max_seq_len; null: full length
    transpose: Annotated[int, "[0, 127]"] = 0  # augmentation: transpose each window by up to this many semitones
    stretch: Annotated[float, "[0, 1)"] = 0.0  # augmentation: multiply times by a factor in 1 - stretch .. 1 + stretch


MAESTRO = Download(
    url="https://storage.googleapis.com/magentadata/datasets/maestro/v3.0.0/maestro-v3.0.0-midi.zip",
    unpacked="maestro-v3.0.0",
    sha256="70470ee253295c8d2c71e6d9d4a815189e35c89624b76d22fce5a019d5dde12c",
)


def load_music(config: MusicDataConfig):
    """Events for training and for validation, and a line that names their source.

    Raises UserError if there are none.
    """
    if config.path is not None:
        source = Path(config.path).expanduser()
    elif config.dataset == "maestro":
        source = fetch("maestro", MAESTRO, config.cache_dir)
    else:
        pieces = [encode(compose(seed)) for seed in range(1020)]
        return (
            Tokens(join_pieces(pieces[:1000])),
            Tokens(join_pieces(pieces[1000:])),
            "1,000 generated pieces for training, 20 others for validation",
        )
    if not source.is_dir():
        raise UserError(f"data.path={source} is not a folder; it must be a folder of MIDI files")
    train, val, split = split_files(source, config.val_fraction)
    note = f"{source}: {len(train):,} MIDI files for training, {len(val):,} for validation ({split})"
    return load_events(source, "train", train, config), load_events(source, "val", val, config), note


def split_files(folder, val_fraction):
    """Files for training and for validation, and a description of the split.

    MAESTRO's table gives the split, or else the folders train and valid (val, validation, dev). Without them, whole
    folders are held out: versions of one piece often share a folder.
    """
    for table in folder.glob("maestro-v*.csv"):
        parts = defaultdict(list)
        with reading(table), open(table, encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                parts[row["split"]].append(folder / row["midi_filename"])
        return parts["train"], parts["validation"], f"split by {table.name}"
    parts = {PARTS.get(place.name): place for place in folder.iterdir()}
    if "train" in parts and "val" in parts:
        return midi_files(parts["train"]), midi_files(parts["val"]), f"folders train and {parts['val'].name}"
    folder = parts.get("train", folder)  # the folder test is never used
    files = midi_files(folder)
    if len(files) < 2:
        raise UserError(
            f"{folder} holds {len(files)} MIDI files (.mid, .midi); it needs two or more, one of them for validation"
        )
    return *hold_out_folders(folder, files, val_fraction), "held out"


def midi_files(folder):
    return [file for file in visible_files(folder) if file.suffix.lower() in MIDI_ENDINGS]


def load_events(folder, part, files, config):
    """The corpus of the MIDI files `files` in `folder`. `cache_dir` keeps their events until a file changes.

    Leaves out files that cannot be read, and prints the reason to stderr.
    """
    cache = Path(config.cache_dir) / f"{folder.name}-{part}-{digest(*map(stamp, files))}.npy"

    def encode_files():
        import_optional("mido", "reading MIDI files")
        if not files:
            raise UserError(f"{folder} holds no MIDI file for {part}")
        loader = DataLoader(
            files,
            batch_size=None,
            collate_fn=encode_file,  # runs in the workers
            num_workers=config.num_workers,
            worker_init_fn=own_process_group,
        )
        num_unreadable = 0
        for piece in tqdm(loader, f"encoding {folder.name}, {part}", unit=" files"):
            if isinstance(piece, str):
                num_unreadable += 1
                check_unreadable(num_unreadable, len(files), config.max_unreadable, piece)
                tell(f"left out: {piece}")
            else:
                yield join_pieces([piece])

    return Tokens(cached_array(cache, encode_files))


def encode_file(file):
    """The events of a MIDI file, or the reason why it cannot be read."""
    try:
        return encode(read_midi(file))
    except UserError as error:
        return str(error)


def join_pieces(pieces):
    """A corpus: the events of all pieces, with PAD after each piece."""
    return np.concatenate([np.append(piece, np.uint16(PAD)) for piece in pieces])


def split_pieces(events):
    """The pieces, or parts of pieces, of a corpus or of a window in it."""
    parts = np.split(events, np.flatnonzero(events == PAD))
    pieces = [part[part != PAD] for part in parts]
    return [piece for piece in pieces if len(piece)]


@dataclass
class MusicWindows(TextWindows):
    """Training windows at random places of a corpus, by key (step, index in the global batch).

    A window may cross the end of a piece. It keeps its longest part within one piece, as in krasserm's code.
    """

    config: MusicDataConfig

    def draw(self, rng):
        """input_ids (T,), padded on the left, labels (N,), pad_mask (T,)"""
        config = self.config
        length = 1 + rng.integers(config.min_seq_len or self.max_seq_len, self.max_seq_len, endpoint=True)
        start = rng.integers(len(self.tokens) - length + 1)
        window = max(split_pieces(self.tokens[start : start + length]), key=len)
        window = transpose(window, rng.integers(-config.transpose, config.transpose, endpoint=True))
        if config.stretch:
            stretched = stretch(window, rng.uniform(1 - config.stretch, 1 + config.stretch))[:length]
            if len(stretched) > 1:  # a few short shifts may shrink to nothing
                window = stretched
        num_predicted = min(self.num_latents, len(window) - 1)
        return left_padded(window, num_predicted, self.max_seq_len, self.num_latents, PAD)


# ----------------------------------------------------------------------------------------------------------------------
# Generated pieces

SCALES = (
    (0, 2, 4, 5, 7, 9, 11),  # major
    (0, 2, 3, 5, 7, 8, 11),  # harmonic minor
)
PROGRESSIONS = (  # roots of the chords: degrees of the scale, one per bar
    (0, 3, 4, 0),
    (0, 5, 3, 4),
    (5, 3, 0, 4),
    (0, 4, 5, 3),
    (0, 5, 1, 4),
    (3, 4, 2, 5),
)
RHYTHMS = {  # by meter: rhythms of a bar of the melody, durations in beats
    3: ((1, 1, 1), (2, 1), (1, 0.5, 0.5, 1), (1.5, 0.5, 1), (3,)),
    4: ((1, 1, 1, 1), (2, 1, 1), (1.5, 0.5, 1, 1), (0.5, 0.5, 1, 2), (1, 1, 2), (4,)),
}
CHORD = 0, 2, 4  # degrees above the root
ARPEGGIOS = (  # degrees above the root, one per half beat
    (0, 2, 4, 2),
    (0, 4, 2, 4),
    (4, 2, 0, 2),
    (0, 2, 4, 7),
)


def compose(seed: int) -> list[Note]:
    """A random piano piece: a bass, broken chords and a melody, with its own key, meter, tempo and dynamics.

    Its form is A A B A, with four bars in each part. To predict the repeats, a model must remember the beginning.
    """
    rng = np.random.default_rng(seed)
    meter = int(rng.choice((3, 4)))  # beats in a bar
    beat = 60 / rng.uniform(80, 140)  # seconds
    tonic = rng.integers(-5, 7)
    loudness = int(rng.integers(50, 80))
    scale = rng.choice(SCALES)
    arpeggio = rng.choice(ARPEGGIOS)

    def pitch(degree):
        """The pitch of a degree of the scale. Degree 0 is the tonic near middle C; degree 7 is an octave above."""
        octave, degree = divmod(degree, 7)
        return int(60 + tonic + 12 * octave + scale[degree])

    def part():
        """Four bars: (onset and duration in beats, pitch, velocity) of every note."""
        notes = []
        melody = 11
        rhythms = rng.integers(len(RHYTHMS[meter]), size=2)
        for bar, root in enumerate(rng.choice(PROGRESSIONS)):
            start = bar * meter
            strong = loudness + 4 * bar  # a crescendo to the last bar
            notes.append((start, meter, pitch(root - 14), strong))
            for half_beat in range(2 * meter):
                tone = arpeggio[half_beat % 4]
                accent = -8 if half_beat % 2 else -16
                notes.append((start + half_beat / 2, 0.5, pitch(root - 7 + tone), strong + accent))
            onset = start
            for duration in RHYTHMS[meter][rhythms[bar % 2]]:
                if onset == start:  # the tone of the chord that is closest to the previous note
                    tones = [degree for degree in range(7, 17) if (degree - root) % 7 in CHORD]
                    melody = min(tones, key=lambda degree: abs(degree - melody))
                    accent = 20
                else:  # one or two steps of the scale
                    melody += rng.choice((-2, -1, 1, 2))
                    melody = min(max(melody, 7), 16)
                    accent = 12
                notes.append((onset, 0.9 * duration, pitch(melody), strong + accent))
                onset += duration
        return notes

    first = part()
    second = part()
    notes = []
    for number, bars in enumerate((first, first, second, first)):
        for onset, duration, tone, velocity in bars:
            onset += 4 * meter * number
            end = onset + duration
            notes.append(Note(onset * beat, end * beat, tone, velocity))
    return notes


# ----------------------------------------------------------------------------------------------------------------------
# The task


class SymbolicMusic(Autoregression):
    """Perceiver AR on the events of MIDI files (Perceiver AR, section 5.3)."""

    name = "symbolic_music"
    DataConfig = MusicDataConfig
    options = ("out", "piano_roll", "prompt_seconds")
    unit = "event"
    vocab_size = 389

    def __init__(self, config):
        super().__init__(config)
        min_seq_len, max_seq_len = config.data.min_seq_len, config.model.max_seq_len
        if min_seq_len is not None and min_seq_len > max_seq_len:
            raise UserError(f"data.min_seq_len={min_seq_len} exceeds model.max_seq_len={max_seq_len}")

    def load_data(self):
        model, data = self.config.model, self.config.data
        self.train_events, val_events, self.data_note = load_music(data)
        self.val_pieces = split_pieces(val_events.values)
        lengths = model.max_seq_len, model.num_latents
        self.val_set = ConcatDataset(TextBlocks(Tokens(piece), *lengths, PAD) for piece in self.val_pieces)
        windows = MusicWindows(self.train_events, *lengths, self.config.train.seed, data)
        return self.with_prefix_dropout(windows), self.val_set

    def visualize(self, model):
        """A piano roll: the beginning of the first validation piece in blue, and a continuation in red."""
        prompt = self.val_pieces[0][:256].tolist()
        steps = decoding.generate(model, [prompt], max_new_tokens=256, temperature=0.9, top_p=0.95)
        notes = decode([*prompt, *steps])
        return {"sample": pictures.piano_roll(notes, num_given=len(decode(prompt)))} if notes else {}

    def summary(self, metrics):
        return (
            f"validation: {metrics['bits_per_event']:.3f} bits per event; the unigram baseline has "
            f"{unigram_bits(self.train_events, self.val_set):.3f}"
        )

    def generate(self, model, args):
        """Continues a MIDI file. Writes a MIDI file with the prompt and its continuation for each sample."""
        source = args.prompt_file or args.prompt
        given = read_midi(source)
        if args.prompt_seconds is not None:
            given = first_seconds(given, args.prompt_seconds)
            if not given:
                raise UserError(f"{source} has no note in its first {args.prompt_seconds} seconds")
        prompt = encode(given).tolist()
        files = output_files(args.out or "continuation.mid", args.num_samples, MIDI_ENDINGS)
        rolls = output_files(args.piano_roll, args.num_samples, (".png", ".jpg")) if args.piano_roll else []
        samples = zip(*self.sample(model, prompt, args))
        for events, file, roll in zip_longest(samples, files, rolls):
            notes = decode([*prompt, *events])
            with output(file.parent, file.name):
                write_midi(file, notes)
            tell(f"{file}: {len(given)} notes of the prompt and {len(notes) - len(given)} new notes")
            if roll:
                save_picture(pictures.piano_roll(notes, len(given)), roll)
            written = [str(path) for path in (file, roll) if path]
            num_new = len(notes) - len(given)
            report(args, {"prompt": source, "prompt_notes": len(given), "new_notes": num_new, "files": written})
