"""Videos with sound: generated ones, and files, which the optional package `av` reads and writes."""
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from perceiver.config import require
from perceiver.data.batches import LoaderConfig
from perceiver.data.image import reading
from perceiver.data.text import labelled_files
from perceiver.errors import UserError

SUFFIXES = (".mp4", ".avi", ".m4v", ".mkv", ".mov", ".mpeg", ".mpg", ".webm")


@dataclass
class VideoDataConfig(LoaderConfig):
    path: str | None = None  # videos: CLASS/* in this folder, or in its folders train and val; null: generated clips
    val_fraction: float = 0.1  # share of each class's videos held out for validation, if there is no val
    num_val_clips: int = 64  # generated clips for validation
    sample_rate: int = 48_000  # of sound, Hz; a clip lasts model.input.num_audio_samples / sample_rate seconds
    allow_silent: bool = False  # take videos without sound as silent ones; else they are an error
    num_image_queries: int = 512  # pixels that a training example asks for, drawn at random
    num_audio_queries: int = 512  # patches of sound that it asks for
    label_mask_prob: float = 0.5  # share of training examples that don't see their class; in validation none does
    distance: str = "l1"  # of pixels and samples in the loss: l1, the paper's, or l2, the squared one
    image_weight: float = 0.03  # of the pixels' mean distance; all weights are the paper's
    audio_weight: float = 1.0  # of the samples' mean distance
    label_weight: float = 1e-4  # of the class's cross-entropy
    num_chunks: int = 128  # validation decodes in this many parts, which saves memory

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.val_fraction <= 0.5, f"val_fraction={self.val_fraction} must be in (0, 0.5]")
        require(0 <= self.label_mask_prob <= 1, f"label_mask_prob={self.label_mask_prob} must be in [0, 1]")
        require(self.distance in ("l1", "l2"), f"distance={self.distance!r} must be l1 or l2")
        for name in ("num_val_clips", "sample_rate", "num_image_queries", "num_audio_queries", "num_chunks"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        for name in ("image_weight", "audio_weight", "label_weight"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")


# ----------------------------------------------------------------------------------------------------------------------
# Datasets: image (T, 3, H, W) in [0, 1], audio (S, 1) in [-1, 1], label


@dataclass
class ClipShape:
    """What a model takes."""
    image_shape: tuple[int, int, int, int]  # frames, height, width, channels
    num_samples: int  # S, of sound
    sample_rate: int  # Hz

    @property
    def frame_rate(self) -> Fraction:
        """Frames per second."""
        return Fraction(self.image_shape[0] * self.sample_rate, self.num_samples)


SHAPES, MOTIONS = ("disc", "square", "ring"), ("slides", "bounces", "circles")


class GeneratedClips(Dataset):
    """A coloured shape moves over a coloured ground, and sounds: the higher it is the higher, the faster the louder.
    The class is what it is and how it moves. A clip is a function of `part` and its number."""
    class_names = [f"{shape} {motion}" for shape in SHAPES for motion in MOTIONS]

    def __init__(self, shape: ClipShape, num_clips: int, part: int):
        self.shape, self.num_clips, self.part = shape, num_clips, part

    def __len__(self) -> int:
        return self.num_clips

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        rng = np.random.default_rng((self.part, index))
        label = int(rng.integers(len(self.class_names)))
        shape, motion = divmod(label, len(MOTIONS))
        num_frames, height, width, _ = self.shape.image_shape
        move = self.motion(motion, rng)
        x, y = (middle[:, None, None] for middle in move(np.arange(num_frames) / num_frames))  # (T, 1, 1)
        rows, columns = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
        across, down, size = np.abs(columns - x), np.abs(rows - y), rng.uniform(0.2, 0.28)
        distance = (np.hypot(across, down) - size, np.maximum(across, down) - 0.85 * size,
                    np.abs(np.hypot(across, down) - 0.75 * size) - 0.25 * size)[shape]  # from the outline, out of it
        inside = np.clip(0.5 - distance * min(height, width), 0, 1)[:, None]  # (T, 1, H, W)
        ground, colour = rng.uniform(0, 0.2, (3, 1, 1)), rng.uniform(0.4, 1, (3, 1, 1))
        return {"image": torch.from_numpy(ground + inside * (colour - ground)).float(),
                "audio": torch.from_numpy(self.sound(move, rng)).float()[:, None], "label": label}

    @staticmethod
    def motion(kind: int, rng: np.random.Generator) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Time from 0 to 1 -> where the centre is, from left and from above, both in [0.25, 0.75] of the picture."""
        start, speed, place = rng.uniform(), rng.uniform(0.5, 1.2) * rng.choice((-1, 1)), rng.uniform(0.25, 0.75)

        def there_and_back(time):  # between 0 and 1 at an even pace
            return np.abs((2 * (start + speed * time)) % 2 - 1)

        def turn(time):
            return 2 * np.pi * (start + speed * time)

        return (lambda time: (0.25 + 0.5 * there_and_back(time), np.full_like(time, place)),
                lambda time: (np.full_like(time, place), 0.75 - 0.5 * np.abs(np.sin(turn(time)))),
                lambda time: (0.5 + 0.25 * np.cos(turn(time)), 0.5 + 0.25 * np.sin(turn(time))))[kind]

    def sound(self, move: Callable, rng: np.random.Generator) -> np.ndarray:
        """(S,): a tone from 60 Hz, at the bottom, to 180 Hz."""
        moments = (np.arange(self.shape.num_samples) + 0.5) / self.shape.num_samples
        x, y = move(moments)
        loudness = 0.2 + 0.2 * np.hypot(np.gradient(x, moments), np.gradient(y, moments)).clip(0, 4)
        cycles = np.cumsum(60 + 120 * (1 - y)) / self.shape.sample_rate
        return np.sin(2 * np.pi * (cycles + rng.uniform())) * loudness


class VideoFiles(Dataset):
    """Clips of video files by class: from anywhere in a file in training, with torch's generator; else the middle."""

    def __init__(self, files: dict[str, list[Path]], shape: ClipShape, allow_silent: bool, train: bool):
        self.class_names = list(files)
        self.files = [(file, label) for label, name in enumerate(files) for file in files[name]]
        self.shape, self.allow_silent, self.train = shape, allow_silent, train

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        file, label = self.files[index]
        image, sound = read_video(file, self.shape, torch.rand(()).item() if self.train else 0.5)
        if sound is None:
            if not self.allow_silent:
                raise UserError(f"{file} has no sound; with data.allow_silent=true it is taken as a silent one")
            sound = torch.zeros(self.shape.num_samples, 1)
        return {"image": image, "audio": sound, "label": label}


class WithQueries(Dataset):
    """Clips with what training asks of them, drawn by torch: image_positions, audio_positions, label_mask (1,)."""

    def __init__(self, clips: Dataset, config: VideoDataConfig, num_pixels: int, num_patches: int):
        self.clips, self.mask_prob = clips, config.label_mask_prob
        self.queries = {"image_positions": (num_pixels, config.num_image_queries),
                        "audio_positions": (num_patches, config.num_audio_queries)}

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        positions = {name: torch.randint(size, (count,)) for name, (size, count) in self.queries.items()}
        return self.clips[index] | positions | {"label_mask": torch.rand(1) < self.mask_prob}


def load_clips(config: VideoDataConfig, shape: ClipShape) -> tuple[GeneratedClips | VideoFiles, ...]:
    """Clips for training and for validation. Raises UserError if they are not there."""
    if config.path is None:
        return (GeneratedClips(shape, num_clips=2**20, part=0), GeneratedClips(shape, config.num_val_clips, part=1))
    import_av()  # for want of it, nothing should begin
    split = labelled_files(Path(config.path), SUFFIXES, config.val_fraction)
    return tuple(VideoFiles(files, shape, config.allow_silent, train)
                 for files, train in zip(split, (True, False)))


# ----------------------------------------------------------------------------------------------------------------------
# Files


def import_av():
    try:
        import av
    except ImportError:
        raise UserError("reading and writing videos needs the package av: pip install av") from None
    return av


@contextmanager
def opened(path: str | Path):
    """A video file to read from, as av gives it. Raises UserError if it is broken, or none."""
    av = import_av()
    with reading(path), av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("it has no pictures")
        yield container


def video_frames(path: str | Path) -> Iterator[Tensor]:
    """The frames of a video file in their order, (3, H, W) of uint8. Raises UserError if it is broken, or none."""
    with opened(path) as container:
        for frame in container.decode(video=0):
            yield to_tensor(frame)


def to_tensor(frame) -> Tensor:
    """(3, H, W) of uint8, turned as the file says: telephones film in portrait with the sensor lying on its side."""
    image = torch.from_numpy(frame.to_ndarray(format="rgb24")).movedim(-1, 0)
    return torch.rot90(image, round(getattr(frame, "rotation", 0) / 90), (1, 2))  # `rotation` is counterclockwise


def read_video(path: str | Path, shape: ClipShape, place: float = 0.0) -> tuple[Tensor, Tensor | None]:
    """A clip of a video file: frames (T, 3, H, W) in [0, 1], and mono sound (S, 1), None if the file has none.

    `place` is where in the video it lies, from 0, at the start, to 1, at the end. The frames are those shown at moments
    that are 1 / shape.frame_rate apart, their largest square in the middle (or as much as has the clip's proportions)
    resized as OpenCV does it, bilinearly without smoothing (DeepMind's video_autoencoding.ipynb). After the end of a
    shorter video the last frame stays, and there is silence. Raises UserError if the file is broken, or no video.
    """
    num_frames, *size, _ = shape.image_shape
    seconds = shape.num_samples / shape.sample_rate
    with opened(path) as container:
        second = import_av().time_base  # in the container's units
        start = (container.start_time or 0) / second
        start += place * max(0.0, (container.duration or 0) / second - seconds)
        frames = torch.stack([centre(frame, size) for frame in
                              frames_at(container, [start + seconds * i / num_frames for i in range(num_frames)])])
    with opened(path) as container:
        sound = sound_from(container, start, shape) if container.streams.audio else None
    return frames, sound


def frames_at(container, moments: list[float]) -> Iterator:
    """The frames shown at these moments, in seconds."""
    seek(container, moments[0])
    moments, shown = iter(moments), None
    moment = next(moments)
    for frame in container.decode(video=0):
        while shown is not None and (frame.time or 0.0) > moment + 1e-3:
            yield shown
            if (moment := next(moments, None)) is None:
                return
        shown = frame
    if shown is None:
        raise ValueError("it has no pictures")
    yield from (shown for _ in (moment, *moments))


def seek(container, start: float) -> None:
    """To the last place at or before `start`, in seconds, where decoding can begin."""
    if start > 0:
        container.seek(int(start * import_av().time_base))


def centre(frame, size: list[int]) -> Tensor:
    """The largest part in the middle of a frame with the proportions of `size`, in that size, (3, H, W) in [0, 1]."""
    image = to_tensor(frame).float() / 255
    scale = min(have / want for have, want in zip(image.shape[1:], size))
    height, width = (max(1, int(scale * want)) for want in size)
    top, left = (have // 2 - part // 2 for have, part in zip(image.shape[1:], (height, width)))
    return F.interpolate(image[None, :, top : top + height, left : left + width], size, mode="bilinear")[0]


def sound_from(container, start: float, shape: ClipShape) -> Tensor:
    """(S, 1): the sound from `start` on, in seconds, with silence where there is none."""
    seek(container, start - 1)  # to have come into it: the first that a decoder gives is not right
    resampler = import_av().AudioResampler(format="fltp", rate=shape.sample_rate)
    sound, end = torch.zeros(0), None  # `end` is the number, from `start` on, of the sample after those had so far
    for frame in chain(container.decode(audio=0), [None]):  # None: what is left in the resampler
        if end is None and frame is not None:
            end = round(((frame.time or 0.0) - start) * shape.sample_rate)
            sound = torch.zeros(max(0, end))
        for resampled in resampler.resample(frame):
            part = torch.from_numpy(resampled.to_ndarray()).mean(0)  # of its channels
            sound, end = torch.cat((sound, part[max(0, -end):])), end + len(part)
        if len(sound) >= shape.num_samples:
            break
    return F.pad(sound[: shape.num_samples], (0, max(0, shape.num_samples - len(sound))))[:, None]


def write_video(path: str | Path, frames: Tensor, frames_per_second: Fraction, sound: Tensor | None = None,
                sample_rate: int = 48_000) -> None:
    """An MP4 file (H.264, AAC) of frames (T, 3, H, W) of uint8 and, if given, mono sound (S, 1) in [-1, 1]."""
    av = import_av()
    frames = F.pad(frames, (0, frames.shape[-1] % 2, 0, frames.shape[-2] % 2))  # the format wants even sides
    with av.open(str(path), "w") as container:
        pictures = container.add_stream("libx264", rate=frames_per_second, options={"crf": "18"})
        pictures.height, pictures.width, pictures.pix_fmt = *frames.shape[-2:], "yuv420p"
        tones = container.add_stream("aac", rate=48_000, layout="mono") if sound is not None else None
        for frame in frames.movedim(1, -1).contiguous().cpu().numpy():
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(pictures.encode())
        if sound is not None:
            samples = sound.float().cpu().clamp(-1, 1).T.contiguous().numpy()
            frame = av.AudioFrame.from_ndarray(samples, "flt", "mono")
            frame.sample_rate, frame.time_base, frame.pts = sample_rate, Fraction(1, sample_rate), 0
            resampler = av.AudioResampler("fltp", "mono", 48_000)  # the encoder knows few rates
            for part in (*resampler.resample(frame), *resampler.resample(None)):
                container.mux(tones.encode(part))
            container.mux(tones.encode())


def write_sound(path: str | Path, sound: Tensor, sample_rate: int) -> None:
    """A WAV file of 16 bits of mono sound (S, 1) in [-1, 1]."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes((32767 * sound).round().short().numpy().tobytes())
