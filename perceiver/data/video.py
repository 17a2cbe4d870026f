"""Videos: files, with their sound, read and written by the optional package `av`."""
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver.data.image import reading
from perceiver.errors import UserError

SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")

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


def frame_rate(path: str | Path) -> Fraction:
    """Frames per second of a video file. Raises UserError if it is broken, or none."""
    with opened(path) as container:
        return container.streams.video[0].average_rate


def to_tensor(frame) -> Tensor:
    return torch.from_numpy(frame.to_ndarray(format="rgb24")).movedim(-1, 0)


def read_video(path: str | Path, num_frames: int, size: int, num_samples: int, sample_rate: int, place: float = 0.0
               ) -> tuple[Tensor, Tensor | None]:
    """A clip of num_samples / sample_rate seconds: pictures (T, 3, size, size) in [0, 1] and mono sound (S, 1).

    `place` is where in the video it lies, from 0, at the start, to 1, at the end. The frames are those shown at T moments
    at equal distances, their largest square in the middle resized as OpenCV does it, bilinearly without smoothing
    (DeepMind's video_autoencoding.ipynb). At the end of a shorter video the last frame stays, and there is silence. The
    sound is None if the file has none. Raises UserError if the file is broken, or no video.
    """
    seconds = num_samples / sample_rate
    with opened(path) as container:
        second = import_av().time_base  # in the container's units
        start = (container.start_time or 0) / second
        start += place * max(0.0, (container.duration or 0) / second - seconds)
        frames = torch.stack([square(frame, size) for frame in
                              frames_at(container, [start + seconds * i / num_frames for i in range(num_frames)])])
    with opened(path) as container:
        sound = sound_from(container, start, num_samples, sample_rate) if container.streams.audio else None
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


def square(frame, size: int) -> Tensor:
    """The largest square in the middle of a frame, (3, size, size) in [0, 1]."""
    image = to_tensor(frame).float() / 255
    side = min(image.shape[1:])
    top, left = (length // 2 - side // 2 for length in image.shape[1:])
    return F.interpolate(image[None, :, top : top + side, left : left + side], (size, size), mode="bilinear")[0]


def sound_from(container, start: float, num_samples: int, sample_rate: int) -> Tensor:
    """(S, 1): the sound from `start` on, in seconds, with silence where there is none."""
    seek(container, start)
    resampler = import_av().AudioResampler(format="flt", layout="mono", rate=sample_rate)
    sound, end = torch.zeros(0), None  # `end` is the number, from `start` on, of the sample after those had so far
    for frame in chain(container.decode(audio=0), [None]):  # None: what is left in the resampler
        if end is None and frame is not None:
            end = round(((frame.time or 0.0) - start) * sample_rate)
            sound = torch.zeros(max(0, end))
        for resampled in resampler.resample(frame):
            part = torch.from_numpy(resampled.to_ndarray()[0])
            sound, end = torch.cat((sound, part[max(0, -end):])), end + len(part)
        if len(sound) >= num_samples:
            break
    return F.pad(sound[:num_samples], (0, max(0, num_samples - len(sound))))[:, None]


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
