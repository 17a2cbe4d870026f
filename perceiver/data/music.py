"""Music as events: MIDI files in and out, corpora of pieces and windows of them, pieces made by rule.

The 388 events of Performance RNN, which the Perceiver AR paper uses (section 5.3), with the ids of krasserm's code:

      0 .. 127  a note of this pitch begins        256 .. 355  time passes: 10 ms to 1 s, in steps of 10 ms
    128 .. 255  a note of this pitch ends          356 .. 387  the velocity of the notes that follow, in bins of 4
                                                   388         padding, and the end of a piece in a corpus
"""
import csv
import hashlib
import json
import sys
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from perceiver.config import require
from perceiver.data.batches import LoaderConfig, own_process_group
from perceiver.data.image import reading
from perceiver.data.text import TextWindows, Tokens, fetch, hold_out, left_padded, write_tokens
from perceiver.errors import UserError

NOTE_ON, NOTE_OFF, SHIFT, VELOCITY, PAD = 0, 128, 256, 356, 388  # the first ids of each kind
NUM_EVENTS = 389
LONGEST_SHIFT = VELOCITY - SHIFT  # steps of 10 ms
STEPS_PER_SECOND = 100
MAX_SILENCE = 100_000  # beats; hours, even of the fastest music: a number that is damaged
SUSTAIN_PEDAL, DRUMS = 64, 9  # a controller, and the channel that General MIDI calls 10


class Note(NamedTuple):
    onset: float  # seconds from the start
    end: float
    pitch: int  # 0 .. 127, 60 is middle C
    velocity: int  # how hard it is struck, 1 .. 127


# ----------------------------------------------------------------------------------------------------------------------
# MIDI files


def import_mido():
    try:
        import mido
    except ImportError:
        raise UserError("MIDI files need the package mido: pip install mido") from None
    return mido


def read_midi(file: str | Path) -> list[Note]:
    """The notes of all tracks and channels, by onset. Drums (channel 10) are left out: their notes are not pitches.

    A key that is released while the sustain pedal of its channel is down sounds on, until the pedal is released or the
    key struck again. Of two notes of one key at once, the first to begin is the first to end. What never ends does
    so with the last note or pedal; messages that silence a whole channel are not heeded. Raises UserError for a broken
    file and for one without notes.
    """
    mido = import_mido()
    with reading(file):
        try:
            midi = mido.MidiFile(file)
        except EOFError:
            raise ValueError("it ends too early") from None
        if midi.type == 2 or midi.ticks_per_beat <= 0:
            raise ValueError("its tracks are not simultaneous" if midi.type == 2 else "its time is not in beats")
    messages = []  # (tick, track, message)
    for number, track in enumerate(midi.tracks):
        tick = 0
        for message in track:
            tick += message.time
            messages.append((tick, number, message))
    messages.sort(key=itemgetter(0))  # at one tick they stay in their order
    if any(message.time / midi.ticks_per_beat > MAX_SILENCE for track in midi.tracks for message in track):
        raise UserError(f"cannot read {file}: its time jumps by more than {MAX_SILENCE} beats")

    notes = []
    down = defaultdict(deque)  # onsets and velocities of keys that are down, by (track, channel, pitch), oldest first
    ringing = defaultdict(list)  # of released keys that the pedal holds, by (channel, pitch)
    struck = {}  # the newest onset by (channel, pitch)
    pedals = set()  # channels whose pedal is down
    now, last_tick, tempo = 0, 0, 500_000  # time in microseconds x ticks per beat, so that nothing is ever rounded
    seconds = 0.0

    def stop(pitch: int, sounding: Iterable[tuple[float, int]]) -> None:
        notes.extend(Note(onset, seconds, pitch, velocity) for onset, velocity in sounding)

    for tick, track, message in messages:
        now, last_tick = now + (tick - last_tick) * tempo, tick
        if message.type == "set_tempo":
            tempo = message.tempo
        elif message.type in ("note_on", "note_off") and message.channel != DRUMS:
            seconds, key = now / midi.ticks_per_beat / 1e6, (message.channel, message.note)
            keys = down[track, *key]
            if message.type == "note_on" and message.velocity > 0:
                stop(message.note, ringing.pop(key, ()))
                keys.append((seconds, message.velocity))
                struck[key] = seconds
            elif keys and message.channel in pedals and keys[0][0] == struck[key]:
                ringing[key].append(keys.popleft())
            elif keys:
                stop(message.note, [keys.popleft()])
        elif message.type == "control_change" and message.control == SUSTAIN_PEDAL:
            seconds = now / midi.ticks_per_beat / 1e6
            if message.value >= 64:
                pedals.add(message.channel)
            else:
                pedals.discard(message.channel)
                for key in [key for key in ringing if key[0] == message.channel]:
                    stop(key[1], ringing.pop(key))
    for (*_, pitch), sounding in (*down.items(), *ringing.items()):
        stop(pitch, sounding)
    if not notes:
        raise UserError(f"{file} holds no notes")
    return sorted(notes)


def write_midi(file: str | Path, notes: list[Note]) -> None:
    """A piano piece of one track, with time in steps of 10 ms."""
    mido = import_mido()
    midi = mido.MidiFile(type=0, ticks_per_beat=STEPS_PER_SECOND // 2)  # at MIDI's tempo by default, 2 beats a second
    track, now = midi.add_track(), 0
    for step, begins, pitch, velocity in changes(notes):
        kind = "note_on" if begins else "note_off"
        track.append(mido.Message(kind, note=pitch, velocity=velocity, time=step - now))
        now = step
    midi.save(file)


# ----------------------------------------------------------------------------------------------------------------------
# Notes <-> events


def encode(notes: list[Note]) -> np.ndarray:
    """Events (n,), uint16, of notes in any order.

    Three things differ from krasserm's code, whose ids these are: times are rounded to 10 ms each by itself, so that
    errors don't add up; a velocity is written only where it changes; and notes after the last pedal are not lost. So
    losses per event of the two do not compare exactly.
    """
    steps, ids, velocity_bin = [], [], None
    for step, begins, pitch, velocity in changes(notes):
        if begins and velocity // 4 != velocity_bin:
            velocity_bin = velocity // 4
            steps.append(step)
            ids.append(VELOCITY + velocity_bin)
        steps.append(step)
        ids.append((NOTE_ON if begins else NOTE_OFF) + pitch)
    return with_shifts(np.array(steps, np.int64), np.array(ids, np.uint16))


def changes(notes: list[Note]) -> list[tuple[int, bool, int, int]]:
    """What happens when: (step of 10 ms, whether a note begins or ends, pitch, velocity), in order.

    At one step notes end before others begin, the lowest first. All last a step at least, where rounding would leave
    none: both ends are still right to 10 ms. Notes of one pitch and onset begin in the order of their ends, so that the
    first to begin is the first to end.
    """
    found = []
    for onset, end, pitch, velocity in sorted(notes, key=itemgetter(1)):
        first, last = round(onset * STEPS_PER_SECOND), round(end * STEPS_PER_SECOND)
        if first == last and onset + end < 2 * first / STEPS_PER_SECOND:
            first -= 1
        found += [(first, True, pitch, velocity), (max(last, first + 1), False, pitch, 0)]
    return sorted(found, key=itemgetter(0, 1, 2))


def with_shifts(steps: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Events `ids` (n,) with the time shifts that bring them to `steps` (n,), which never decrease."""
    full, rest = np.divmod(np.diff(steps, prepend=0), LONGEST_SHIFT)
    places = np.cumsum(full + (rest > 0) + 1) - 1  # of the events themselves
    events = np.full(places[-1] + 1 if len(places) else 0, VELOCITY - 1, ids.dtype)
    events[places] = ids
    events[places[rest > 0] - 1] = SHIFT + rest[rest > 0] - 1
    return events


def decode(events: Iterable[int]) -> list[Note]:
    """The notes of events, in the order in which they begin; velocities are the middle of their bins.

    What a model may write does no harm: the end of a note that doesn't sound is nothing, a note whose end is missing
    lasts a second or to the end of the piece, and every note lasts 10 ms at least.
    """
    onsets, pitches, velocities, ends = [], [], [], {}  # of notes by number
    sounding = defaultdict(deque)  # numbers of notes by pitch, oldest first
    step, velocity = 0, 66
    for event in map(int, events):  # numpy's small ones would overflow
        if event < NOTE_OFF:
            sounding[event].append(len(onsets))
            onsets.append(step)
            pitches.append(event)
            velocities.append(velocity)
        elif event < SHIFT:
            if sounding[event - NOTE_OFF]:
                ends[sounding[event - NOTE_OFF].popleft()] = step
        elif event < VELOCITY:
            step += event - SHIFT + 1
        elif event < PAD:
            velocity = 4 * (event - VELOCITY) + 2
    notes = []
    for number, (onset, pitch, velocity) in enumerate(zip(onsets, pitches, velocities)):
        end = max(ends.get(number, min(step, onset + STEPS_PER_SECOND)), onset + 1)
        notes.append(Note(onset / STEPS_PER_SECOND, end / STEPS_PER_SECOND, pitch, velocity))
    return notes


def transpose(events: np.ndarray, semitones: int) -> np.ndarray:
    """Events (n,) with all pitches moved; by less, if one of them would leave the range of MIDI."""
    is_note = events < SHIFT
    if not is_note.any():
        return events
    pitches = events[is_note] % NOTE_OFF
    return events + is_note * np.clip(semitones, -int(pitches.min()), 127 - int(pitches.max()))


def stretch(events: np.ndarray, factor: float) -> np.ndarray:
    """Events with all times multiplied by `factor` and rounded anew, each by itself: as many, or some more or less."""
    events = np.append(events, PAD)  # something that happens at the end
    is_shift = (events >= SHIFT) & (events < VELOCITY)
    steps = np.cumsum(np.where(is_shift, events - SHIFT + 1, 0))[~is_shift]
    return with_shifts(np.rint(steps * factor).astype(np.int64), events[~is_shift])[:-1]


# ----------------------------------------------------------------------------------------------------------------------
# Corpora


@dataclass
class MusicDataConfig(LoaderConfig):
    dataset: str = "generated"  # generated (by rule) or maestro; not used with a path
    path: str | None = None  # own data: a folder of MIDI files, MAESTRO's, or one with folders train and valid
    cache_dir: str = "data"  # where maestro is looked for, or downloaded to, and where encoded pieces are kept
    val_fraction: float = 0.05  # share of the files held out for validation, if the data comes without a split
    min_seq_len: int | None = None  # windows have a random length from this to model.max_seq_len; null: all are full
    transpose: int = 0  # augmentation: windows are moved by up to so many semitones, up or down
    stretch: float = 0.0  # augmentation: times are multiplied by a factor from 1 - stretch to 1 + stretch

    def __post_init__(self):
        super().__post_init__()
        require(self.dataset in ("generated", *DOWNLOADS),
                f"dataset={self.dataset!r} must be generated or maestro; your own MIDI files go in data.path")
        require(0 < self.val_fraction <= 0.5, f"val_fraction={self.val_fraction} must be in (0, 0.5]")
        require(self.min_seq_len is None or self.min_seq_len >= 1,
                f"min_seq_len={self.min_seq_len} must be at least 1, or null")
        require(0 <= self.transpose <= 127, f"transpose={self.transpose} must be from 0 to 127 semitones")
        require(0 <= self.stretch < 1, f"stretch={self.stretch} must be in [0, 1)")


# as in text.py
DOWNLOADS = {
    "maestro": ("https://storage.googleapis.com/magentadata/datasets/maestro/v3.0.0/maestro-v3.0.0-midi.zip",
                "70470ee253295c8d2c71e6d9d4a815189e35c89624b76d22fce5a019d5dde12c", "maestro-v3.0.0"),
}
GENERATED = 1000, 20  # pieces for training and for validation


def load_music(config: MusicDataConfig) -> tuple[Tokens, Tokens]:
    """For training and validation: events of pieces, a PAD after each. Raises UserError if there are none."""
    if config.path is None and config.dataset == "generated":
        train, val = (join(encode(compose(seed)) for seed in seeds)
                      for seeds in (range(GENERATED[0]), range(GENERATED[0], sum(GENERATED))))
        return Tokens(train), Tokens(val)
    if config.path is None:
        source = fetch(config.dataset, Path(config.cache_dir), DOWNLOADS)
    else:
        source = Path(config.path).expanduser()
    if not source.is_dir():
        raise UserError(f"data.path={source} is not a folder; it must be one with MIDI files")
    train, val = split_pieces(source, config.val_fraction)
    return encoded(source, "train", train, config), encoded(source, "val", val, config)


def split_pieces(folder: Path, val_fraction: float) -> tuple[list[Path], list[Path]]:
    """The files for training and for validation: as MAESTRO's table says, of folders so named, or every n-th file."""
    table = next((file for ending in ("csv", "json") for file in sorted(folder.glob(f"maestro-v*.{ending}"))), None)
    if table is not None:
        with reading(table):
            if table.suffix == ".csv":
                with open(table, encoding="utf-8", newline="") as lines:
                    rows = [(row["split"], row["midi_filename"]) for row in csv.DictReader(lines)]
            else:
                columns = json.loads(table.read_text(encoding="utf-8"))
                rows = [(split, columns["midi_filename"][row]) for row, split in columns["split"].items()]
        return tuple([folder / name for split, name in rows if split == part] for part in ("train", "validation"))
    held_out = next((folder / name for name in ("valid", "validation", "val") if (folder / name).is_dir()), None)
    if held_out is not None and (folder / "train").is_dir():
        return midi_files(folder / "train"), midi_files(held_out)
    files = midi_files(folder)
    if len(files) < 2:
        raise UserError(f"{folder} holds {len(files)} MIDI files (.mid, .midi); it needs two or more, one of them for "
                        "validation")
    return hold_out(files, val_fraction)


def midi_files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in (".mid", ".midi")
            and not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def encoded(folder: Path, part: str, files: list[Path], config: MusicDataConfig) -> Tokens:
    """The corpus of MIDI files, kept in `cache_dir` for as long as they are the same. Files that cannot be read, or
    hold no notes, are left out, each with a line that says why."""
    known = []  # by which changes are seen
    for file in files:
        with reading(file):
            known.append((str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns))
    digest = hashlib.sha256(repr(known).encode()).hexdigest()[:12]
    cache = Path(config.cache_dir) / f"{folder.resolve().name}-{part}-{digest}.npy"
    if not cache.exists():
        import_mido()
        loader = DataLoader(Encoder(files), batch_size=1, collate_fn=itemgetter(0), num_workers=config.num_workers,
                            worker_init_fn=own_process_group)
        pieces = []
        for piece in tqdm(loader, f"encoding {folder.name}, {part}", unit=" files"):
            if isinstance(piece, str):
                tqdm.write(f"left out: {piece}", sys.stderr)
            else:
                pieces.append(piece)
        if not pieces:
            raise UserError(f"{folder} holds no MIDI file that can be read for {part}")
        write_tokens(cache, join(pieces))
    with reading(cache):
        return Tokens(np.load(cache, mmap_mode="r", allow_pickle=False))


class Encoder(Dataset):
    """MIDI files as events, or as what is wrong with them."""

    def __init__(self, files: list[Path]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray | str:
        try:
            return encode(read_midi(self.files[index]))
        except UserError as error:
            return str(error)


def join(pieces: Iterable[np.ndarray]) -> np.ndarray:
    """A corpus of pieces: their events, a PAD after each."""
    return np.concatenate([part for piece in pieces for part in (piece, np.array([PAD], np.uint16))])


def split(events: np.ndarray) -> list[np.ndarray]:
    """The pieces, or their parts, in a corpus or a window of it."""
    ends = np.flatnonzero(events == PAD)
    return [events[start + 1 : end] for start, end in pairwise([-1, *ends, len(events)]) if end > start + 1]


class MusicWindows(TextWindows):
    """Training windows at random places of a corpus, by key (step, index in the global batch). Of a window with parts
    of several pieces the longest is kept (krasserm's code)."""

    def __init__(self, tokens: Tokens, max_seq_len: int, num_latents: int, num_kept: int, seed: int,
                 config: MusicDataConfig):
        super().__init__(tokens, max_seq_len, num_latents, num_kept, seed)
        self.config = config

    def draw(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """input_ids (T,), padded on the left, labels (N,), pad_mask (T,)"""
        config = self.config
        length = 1 + rng.integers(config.min_seq_len or self.max_seq_len, self.max_seq_len, endpoint=True)
        start = rng.integers(len(self.tokens) - length + 1)
        window = max(split(self.tokens[start : start + length]), key=len)
        window = transpose(window, rng.integers(-config.transpose, config.transpose, endpoint=True))
        if config.stretch:
            stretched = stretch(window, rng.uniform(1 - config.stretch, 1 + config.stretch))[:length]
            window = stretched if len(stretched) > 1 else window  # of short silences, nothing may be left
        return left_padded(window, min(self.num_latents, len(window) - 1), self.max_seq_len, self.num_latents, PAD)


# ----------------------------------------------------------------------------------------------------------------------
# Pieces made by rule

SCALES = (0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 11)  # major, harmonic minor
PROGRESSIONS = ((0, 3, 4, 0), (0, 5, 3, 4), (5, 3, 0, 4), (0, 4, 5, 3), (0, 5, 1, 4), (3, 4, 2, 5))  # degrees of a bar
RHYTHMS = {3: ((1, 1, 1), (2, 1), (1, 0.5, 0.5, 1), (1.5, 0.5, 1), (3,)),  # beats of a bar's melody, by metre
           4: ((1, 1, 1, 1), (2, 1, 1), (1.5, 0.5, 1, 1), (0.5, 0.5, 1, 2), (1, 1, 2), (4,))}
ARPEGGIOS = (0, 1, 2, 1), (0, 2, 1, 2), (2, 1, 0, 1), (0, 1, 2, 3)  # tones of the chord, one each half beat


def compose(seed: int) -> list[Note]:
    """A piano piece to learn from without a download: broken chords, a bass below and a melody above them, in a key, a
    metre, a tempo and dynamics of its own.

    Its form is A A B A, of four bars each: to know what comes in the repeats one has to remember how it began.
    """
    rng = np.random.default_rng(seed)
    metre, beat = int(rng.choice((3, 4))), 60 / rng.uniform(80, 140)
    tonic, loudness = int(rng.integers(-5, 7)), int(rng.integers(50, 80))
    scale, arpeggio = SCALES[rng.integers(len(SCALES))], ARPEGGIOS[rng.integers(len(ARPEGGIOS))]

    def pitch(degree: int) -> int:
        """Of a degree of the scale: 0 is the tonic near middle C, 7 that an octave above."""
        return 60 + tonic + 12 * (degree // 7) + scale[degree % 7]

    def part() -> list[tuple[float, float, int, int]]:
        """Four bars: (onset and duration in beats, pitch, velocity) of every note."""
        notes, melody = [], 11
        rhythms = [RHYTHMS[metre][i] for i in rng.integers(len(RHYTHMS[metre]), size=2)]
        for bar, root in enumerate(PROGRESSIONS[rng.integers(len(PROGRESSIONS))]):
            start, strong = bar * metre, loudness + 4 * bar  # a crescendo to the last bar
            notes.append((start, metre, pitch(root - 14), strong))
            for half in range(2 * metre):
                degree = root - 7 + (0, 2, 4, 7)[arpeggio[half % 4]]
                notes.append((start + half / 2, 0.5, pitch(degree), strong - (8 if half % 2 else 16)))
            at = 0
            for duration in rhythms[bar % 2]:
                if at == 0:  # a tone of the chord, near the last one
                    chord = (tone for tone in range(7, 17) if (tone - root) % 7 in (0, 2, 4))
                    melody = min(chord, key=lambda tone: abs(tone - melody))
                else:  # a step of the scale or two
                    melody = min(max(melody + int(rng.choice((-2, -1, 1, 2))), 7), 16)
                notes.append((start + at, 0.9 * duration, pitch(melody), strong + (20 if at == 0 else 12)))
                at += duration
        return notes

    first, second = part(), part()
    return [Note((onset + 4 * metre * number) * beat, (onset + 4 * metre * number + duration) * beat, tone, velocity)
            for number, notes in enumerate((first, first, second, first)) for onset, duration, tone, velocity in notes]
