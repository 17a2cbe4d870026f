"""Videos: Perceiver IO reconstructs the frames and the sound of a clip, and classifies it (Perceiver IO, section 4.3).

Shapes: B clips, T frames, H x W pixels, S sound samples; M inputs, C channels and O outputs are those of model.py.
"""

import math
import os
import wave
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, Subset
from torchvision.transforms.v2.functional import resized_crop

from perceiver import pictures
from perceiver.adapters import (
    FourierPositions,
    FourierQueries,
    GridOutput,
    InputAdapter,
    MultimodalInput,
    MultimodalOutput,
    MultimodalQueries,
    Patches,
    TrainableQueries,
    VectorInput,
)
from perceiver.config import Count, NonNegative, Probability
from perceiver.data import LabelledConfig, Readable, Shuffled, file_array, labelled_files
from perceiver.errors import UserError, reading
from perceiver.io import import_optional, input_files, output, progress, save_picture, tell
from perceiver.model import PerceiverDecoder, PerceiverIO, PerceiverIOConfig
from perceiver.tasks.base import Task
from perceiver.tasks.classification import report_classes

# ----------------------------------------------------------------------------------------------------------------------
# Model


class MultimodalPerceiverIO(PerceiverIO):
    """Perceiver IO whose inputs and outputs are dicts by modality. Its adapters are the Multimodal ones of adapters.py.

    `output_positions` is a dict, too: the modalities to compute. Its values are indices of outputs, (O') or (B, O'), or
    None for all outputs of a modality. With indices, the result is (B, O', E); with None, it has the shape of the whole
    modality, such as (B, T, 3, H, W). Default: all outputs of all modalities.
    """

    def decode(self, x, latents, output_positions=None):
        adapters = self.output_adapter.adapters
        output_positions = output_positions or dict.fromkeys(adapters)
        queries = self.query_provider(x, output_positions)
        parts = list(queries.values())
        sizes = [part.shape[1] for part in parts]
        decoded = self.decoder(torch.cat(parts, dim=1), latents)  # (B, O, F)
        outputs = self.output_adapter(dict(zip(queries, decoded.split(sizes, dim=1))))
        for name, positions in output_positions.items():
            if positions is None:
                outputs[name] = adapters[name].join(outputs[name])
        return outputs

    def decode_in_chunks(self, x, latents, num_chunks):
        """All outputs of all modalities. Decodes each modality in `num_chunks` parts, to save memory.

        x (B, M, C) and latents (B, N, D) come from `encode`. Call it in evaluation mode, without gradients.
        """
        outputs = {}
        for name, adapter in self.output_adapter.adapters.items():
            values = x.new_empty(len(x), adapter.num_places, adapter.linear.out_features)
            for places in torch.arange(adapter.num_places, device=x.device).chunk(num_chunks):
                values[:, places] = self.decode(x, latents, {name: places})[name]
            outputs[name] = adapter.join(values)
        return outputs


@dataclass
class VideoInputConfig:
    """A clip: frames, sound, and class."""

    image_shape: tuple[Count, Count, Count, Count] = (16, 224, 224, 3)  # frames, height, width, channels
    patch_shape: tuple[Count, Count, Count] = (1, 4, 4)  # frames, height, width of a patch: one image input
    num_image_bands: Count = 32  # K, Fourier bands of the positions of patches and pixels
    max_resolution: tuple[Count, Count, Count] | None = None  # twice the highest frequency per axis; null: patch grid
    num_audio_samples: Count = 30_720  # S, samples of mono sound
    sample_rate: Count = 48_000  # in Hz; a clip lasts num_audio_samples / sample_rate seconds
    samples_per_patch: Count = 16  # sound samples of one input, and of one output
    num_audio_bands: Count = 192  # K, Fourier bands of the positions of sound patches
    num_classes: Count = 700

    def __post_init__(self):
        if self.image_shape[-1] != 3:
            raise ValueError(f"image_shape={self.image_shape} must end in 3, the channels of a video")
        if any(size % patch for size, patch in zip(self.image_shape, self.patch_shape)):
            raise ValueError(f"patch_shape={self.patch_shape} does not divide image_shape={self.image_shape}")
        if self.num_audio_samples % self.samples_per_patch:
            raise ValueError(
                f"samples_per_patch={self.samples_per_patch} does not divide num_audio_samples={self.num_audio_samples}"
            )

    @property
    def frame_rate(self):
        """Frames per second. The frames last as long as the sound."""
        return Fraction(self.image_shape[0] * self.sample_rate, self.num_audio_samples)

    @property
    def audio_grid(self):
        """The grid of sound patches: (number of patches,)."""
        return (self.num_audio_samples // self.samples_per_patch,)


@dataclass
class MultimodalAutoencoderConfig(PerceiverIOConfig):
    """An autoencoder of the frames, the sound and the class of a clip (Perceiver IO, section 4.3).

    Inputs and outputs are image (B, T, 3, H, W), audio (B, S, 1), and label (B, num_classes): one-hot as an input,
    logits as an output. The input label is masked unless the input label_mask (B, 1) is false.
    """

    input: VideoInputConfig = field(default_factory=VideoInputConfig)
    num_output_channels: Count = 512  # output channels of the linear map that all modalities share

    def __post_init__(self):
        if self.decoder is None:
            raise ValueError("decoder=None: an autoencoder needs a decoder")

    def build(self) -> MultimodalPerceiverIO:
        clip = self.input
        image_grid = tuple(size // patch for size, patch in zip(clip.image_shape, clip.patch_shape))
        image_positions = FourierPositions(image_grid, clip.num_image_bands, clip.max_resolution)
        # As in the official model, max_resolution of the sound is its number of samples, not of patches.
        audio_positions = FourierPositions(clip.audio_grid, clip.num_audio_bands, (clip.num_audio_samples,))
        inputs = {
            "image": InputAdapter(
                Patches(clip.patch_shape, channel_dim=2), 3 * math.prod(clip.patch_shape), image_positions
            ),
            "audio": InputAdapter(Patches((clip.samples_per_patch,)), clip.samples_per_patch, audio_positions),
            "label": VectorInput(clip.num_classes),
        }
        scale = self.decoder.init_scale
        num_label_channels = self.decoder.num_query_channels or self.num_latent_channels
        queries = {
            "image": FourierQueries(clip.image_shape[:3], clip.num_image_bands, image_positions.max_resolution),
            "audio": FourierQueries(clip.audio_grid, clip.num_audio_bands, audio_positions.max_resolution),
            "label": TrainableQueries(1, num_label_channels, init_scale=scale),
        }
        query_provider = MultimodalQueries(queries, scale)
        num_channels = self.num_output_channels
        outputs = {
            "image": GridOutput(num_channels, 3, clip.image_shape, 2, scale),
            "audio": GridOutput(num_channels, clip.samples_per_patch, (clip.num_audio_samples, 1), init_scale=scale),
            "label": GridOutput(num_channels, clip.num_classes, (clip.num_classes,), init_scale=scale),
        }
        input_adapter = MultimodalInput(inputs, ("label",), self.encoder.init_scale)
        return MultimodalPerceiverIO(
            input_adapter,
            self.build_encoder(input_adapter.num_channels),
            query_provider,
            PerceiverDecoder(self.decoder, self.num_latent_channels, query_provider.num_channels),
            MultimodalOutput(outputs, query_provider.num_channels, num_channels, scale),
        )


# ----------------------------------------------------------------------------------------------------------------------
# Data sets. An example has image (T, 3, H, W) in [0, 1], audio (S, 1) in [-1, 1], and label, the class number.


@dataclass
class VideoDataConfig(LabelledConfig):
    path: str | None = None  # folder of videos, CLASS/* or train/CLASS/* and val/CLASS/*; null: generated clips
    val_size: Count = 64  # number of generated validation clips
    allow_silent: bool = False  # true: a video without sound gives silence; false: it is an error
    num_image_queries: Count = 512  # random pixels to reconstruct per training example
    num_audio_queries: Count = 512  # random sound patches to reconstruct per training example
    label_mask_prob: Probability = 0.5  # fraction of training examples whose class is masked
    distance: Literal["l1", "l2"] = "l1"  # in the loss: absolute (l1, as in the paper) or squared (l2)
    image_weight: NonNegative = 0.03  # weight of the mean distance of pixels; the three weights are the paper's
    audio_weight: NonNegative = 1.0  # weight of the mean distance of sound samples
    label_weight: NonNegative = 1e-4  # weight of the cross-entropy of the class
    num_chunks: Count = 128  # evaluation decodes each modality in this many parts; more parts take less memory


def load_clips(config: VideoDataConfig, clip: VideoInputConfig):
    """Training clips, validation clips, and a line that names their source.

    Raises UserError if the folder of videos has another layout, or if the package av is missing.
    """
    if config.path is None:
        if config.eval_split == "test":
            raise UserError("data.eval_split=test: generated clips have no part test; leave it at val")
        return GeneratedClips(clip, 2**20, part=0), GeneratedClips(clip, config.val_size, part=1), ""
    import_av()
    train, val, note = labelled_files(Path(config.path), SUFFIXES, config)
    train_clips = VideoFiles(train, clip, config.allow_silent, random=True)
    val_clips = VideoFiles(val, clip, config.allow_silent)
    return Readable(train_clips, config.max_unreadable), Readable(val_clips, config.max_unreadable), note


@dataclass
class WithQueries(Dataset):
    """Training clips, each with the random outputs to reconstruct. PyTorch's generator draws them.

    Adds image_positions and audio_positions (O',), image_targets (O', 3), audio_targets (O', samples_per_patch), and
    label_mask (1,), true if the class is masked.
    """

    clips: Dataset
    config: VideoDataConfig
    clip: VideoInputConfig

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        num_pixels = math.prod(self.clip.image_shape[:3])
        image_positions = torch.randint(num_pixels, (self.config.num_image_queries,))
        audio_positions = torch.randint(*self.clip.audio_grid, (self.config.num_audio_queries,))
        example = self.clips[index]
        pixels = example["image"].movedim(1, -1).flatten(0, 2)
        patches = example["audio"].view(-1, self.clip.samples_per_patch)
        return example | {
            "image_positions": image_positions,
            "image_targets": pixels[image_positions],
            "audio_positions": audio_positions,
            "audio_targets": patches[audio_positions],
            "label_mask": torch.rand(1) < self.config.label_mask_prob,
        }


# ----------------------------------------------------------------------------------------------------------------------
# Generated clips

# The distance of a point to the outline of a shape, negative inside. x and y are relative to the center of the shape.
SHAPES = {
    "disc": lambda x, y, size: np.hypot(x, y) - size,
    "square": lambda x, y, size: np.maximum(np.abs(x), np.abs(y)) - 0.85 * size,
    "ring": lambda x, y, size: np.abs(np.hypot(x, y) - 0.75 * size) - 0.25 * size,
}
# The center of a moving shape: x to the right and y down, both in [0.25, 0.75]. A motion along one axis keeps the
# other coordinate at `fixed`.
MOTIONS = {
    "slides": lambda turns, angle, fixed: (0.25 + 0.5 * np.abs(2 * turns % 2 - 1), fixed),
    "bounces": lambda turns, angle, fixed: (fixed, 0.75 - 0.5 * np.abs(np.sin(angle))),
    "circles": lambda turns, angle, fixed: (0.5 + 0.25 * np.cos(angle), 0.5 + 0.25 * np.sin(angle)),
}


@dataclass
class GeneratedClips(Dataset):
    """A colored shape moves over a background and hums: the higher it is, the higher the pitch; the faster, the louder.

    Shape and motion together are the class. A clip depends only on its index and on `part`: 0 training, 1 validation.
    """

    clip: VideoInputConfig
    num_clips: int
    part: int
    class_names = [f"{shape} {motion}" for shape in SHAPES for motion in MOTIONS]

    def __len__(self):
        return self.num_clips

    def __getitem__(self, index):
        num_frames, height, width, _ = self.clip.image_shape
        rng = np.random.default_rng((self.part, index))
        label = rng.integers(len(self.class_names))
        shape, motion = self.class_names[label].split()
        start = rng.uniform()
        num_turns = rng.uniform(0.5, 1.2) * rng.choice((-1, 1))
        fixed = rng.uniform(0.25, 0.75)

        def center(times):
            """x and y at `times` in [0, 1]."""
            turns = start + num_turns * times
            return MOTIONS[motion](turns, 2 * np.pi * turns, np.full_like(times, fixed))

        x, y = center(np.arange(num_frames)[:, None, None] / num_frames)  # (T, 1, 1)
        rows = interval_centers(height)[:, None]
        columns = interval_centers(width)
        size = rng.uniform(0.2, 0.28)
        distance = SHAPES[shape](columns - x, rows - y, size)  # (T, H, W)
        inside = np.clip(0.5 - distance * min(height, width), 0, 1)  # the edges are soft
        background = rng.uniform(0, 0.2, (3, 1, 1))
        color = rng.uniform(0.4, 1, (3, 1, 1))
        image = background + inside[:, None] * (color - background)  # (T, 3, H, W)

        times = interval_centers(self.clip.num_audio_samples)
        x, y = center(times)
        speed = np.hypot(*np.gradient((x, y), times, axis=1))
        loudness = 0.2 + 0.2 * speed.clip(0, 4)
        cycles = np.cumsum(60 + 120 * (1 - y)) / self.clip.sample_rate  # 90 to 150 Hz
        audio = loudness * np.sin(2 * np.pi * (cycles + rng.uniform()))  # (S,)
        return {
            "image": torch.from_numpy(image).float(),
            "audio": torch.from_numpy(audio).float()[:, None],
            "label": label,
        }


def interval_centers(count):
    """The centers (count,) of equal intervals between 0 and 1."""
    return (np.arange(count) + 0.5) / count


# ----------------------------------------------------------------------------------------------------------------------
# Video files. The package av decodes and encodes them

SUFFIXES = (".mp4", ".avi", ".m4v", ".mkv", ".mov", ".mpeg", ".mpg", ".webm")
# The formats of these files. FFmpeg knows others, such as playlists, that make it open files and addresses in a file.
DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm,mpeg,mpegts,mpegvideo,h264,m4v,ogg,asf,flv"
MAX_PIXELS = 2**25  # of a frame; a file of a few bytes can declare any size
TIME_UNITS = 1_000_000  # per second: a container counts time in microseconds


@dataclass
class VideoFiles(Dataset):
    """One clip of each video file: its middle, or, with `random`, a part that PyTorch's generator draws."""

    files: dict[str, list[Path]]  # by class; later their `file_array`
    clip: VideoInputConfig
    allow_silent: bool
    random: bool = False

    def __post_init__(self):
        self.class_names = list(self.files)
        sizes = [len(files) for files in self.files.values()]
        self.labels = np.repeat(np.arange(len(sizes)), sizes)
        self.files = file_array(list(chain(*self.files.values())))  # workers would copy a list, element by element

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        place = torch.rand(()).item() if self.random else 0.5
        image, audio = read_video(os.fsdecode(self.files[index]), self.clip, place, self.allow_silent)
        return {"image": image, "audio": audio, "label": int(self.labels[index])}


def import_av():
    return import_optional("av", "reading and writing videos")


@contextmanager
def open_video(file):
    """Yields the container of a video file. Raises UserError if the file is broken or is no video."""
    options = {"format_whitelist": DEMUXERS}
    with reading(file), import_av().open(str(file), options=options) as container:
        if not container.streams.video:
            raise ValueError("it has no frames")
        stream = container.streams.video[0]
        if stream.width * stream.height > MAX_PIXELS:
            raise ValueError(f"its frames have {stream.width} x {stream.height} pixels, more than {MAX_PIXELS}")
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # later frames may be larger
        yield container


def num_video_frames(file):
    """The number of frames that a video file states, or None if it states none."""
    with open_video(file) as container:
        return container.streams.video[0].frames or None


def video_frames(file):
    """Yields the frames (3, H, W) of a video file as uint8. Raises UserError if the file is broken or is no video."""
    with open_video(file) as container:
        for frame in container.decode(video=0):
            yield to_tensor(frame)


def to_tensor(frame):
    """A frame (3, H, W) as uint8, rotated as the file says: phones store portrait videos in landscape."""
    image = torch.from_numpy(frame.to_ndarray(format="rgb24"))  # (H, W, 3)
    quarter_turns = round(frame.rotation / 90)  # counterclockwise
    return torch.rot90(image, quarter_turns).movedim(-1, 0)


def read_video(file, clip: VideoInputConfig, place=0.0, allow_silent=True):
    """A clip of a video file: frames (T, 3, H, W) in [0, 1] and mono sound (S, 1) in [-1, 1].

    `place` is the position of the clip, from 0, the start of the video, to 1, its end. If the video is shorter than
    the clip, its last frame repeats, and silence follows its sound. Raises UserError if the file is broken or is no
    video, or if it has no sound and `allow_silent` is false.
    """
    num_frames, *size, _ = clip.image_shape
    seconds = clip.num_audio_samples / clip.sample_rate
    with open_video(file) as container:
        video_start = (container.start_time or 0) / TIME_UNITS
        video_seconds = (container.duration or 0) / TIME_UNITS
        start = video_start + place * max(0.0, video_seconds - seconds)
        times = start + seconds * np.arange(num_frames) / num_frames
        seek(container, start)
        frames = [crop_and_resize(frame, size) for frame in frames_at(container, times)]
    with open_video(file) as container:
        if not container.streams.audio and not allow_silent:
            raise UserError(f"{file} has no sound; data.allow_silent=true accepts it as a silent video")
        audio = read_audio(container, start, clip)
    return torch.stack(frames), audio


def seek(container, seconds):
    """Moves `container` to the last point at or before `seconds` where decoding can begin."""
    if seconds > 0:
        container.seek(int(seconds * TIME_UNITS))


def frames_at(container, times):
    """Yields the frame that a video shows at each of `times`: seconds, ascending. Decodes from where `container` is."""
    frames = container.decode(video=0)
    shown = following = next(frames, None)
    if shown is None:
        raise ValueError("it has no frames")
    for time in times:
        while following is not None and (following.time or 0.0) <= time + 1e-3:
            shown = following
            following = next(frames, None)
        yield shown


def crop_and_resize(frame, size):
    """The largest center crop of a frame with the aspect ratio of `size` (H, W), resized to (3, H, W) in [0, 1].

    Resizes bilinearly without antialiasing, as OpenCV does (DeepMind's video_autoencoding.ipynb).
    """
    image = to_tensor(frame)
    full_size = np.array(image.shape[1:])
    scale = min(full_size / size)
    crop_size = (scale * np.array(size)).astype(int)
    corner = full_size // 2 - crop_size // 2
    return resized_crop(image / 255, *corner, *crop_size, size, antialias=False)


def read_audio(container, start, clip):
    """Mono sound (S, 1) from `start`, in seconds. Silence fills the time before the first and after the last sample."""
    num_samples = clip.num_audio_samples
    seek(container, start - 1)  # a second early: the first samples after a seek are wrong
    frames = container.decode(audio=0) if container.streams.audio else iter(())
    first = next(frames, None)
    if first is None:
        return torch.zeros(num_samples, 1)
    resampler = import_av().AudioResampler(format="fltp", rate=clip.sample_rate)
    offset = round(((first.time or 0.0) - start) * clip.sample_rate)  # samples from `start` to the first one
    offset = min(offset, num_samples)
    parts = []
    length = 0
    for frame in chain([first], frames, [None]):  # None flushes the resampler
        for resampled in resampler.resample(frame):
            parts.append(resampled.to_ndarray().mean(0))
            length += len(parts[-1])
        if offset + length >= num_samples:
            break
    sound = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    sound = np.pad(sound[max(0, -offset) :], (max(0, offset), num_samples))
    return torch.from_numpy(sound[:num_samples, None])


def write_video(file, frames, frame_rate, audio=None, sample_rate=48_000):
    """Writes an MP4 file (H.264, AAC) from frames (T, 3, H, W) of uint8 and, if given, mono sound (S, 1) in [-1, 1].

    `frame_rate` is in frames per second, a Fraction or an integer. `sample_rate` is in Hz.
    """
    av = import_av()
    height, width = frames.shape[2:]
    frames = F.pad(frames, (0, width % 2, 0, height % 2))  # H.264 needs even sides
    with av.open(file, "w") as container:
        video_stream = container.add_stream("libx264", frame_rate, {"crf": "18"})
        video_stream.height, video_stream.width = frames.shape[2:]
        if audio is not None:
            audio_stream = container.add_stream("aac", 48_000, layout="mono")
            frame = av.AudioFrame.from_ndarray(audio.T.numpy(), "flt", "mono")
            frame.sample_rate = sample_rate
            frame.pts = 0
            container.mux(audio_stream.encode(frame))  # resamples to 48 kHz
        for image in frames.movedim(1, -1).numpy():
            frame = av.VideoFrame.from_ndarray(image)
            container.mux(video_stream.encode(frame))
        for stream in container.streams:
            container.mux(stream.encode())


def write_sound(file, audio, sample_rate):
    """Writes a 16-bit WAV file from mono sound (S, 1) in [-1, 1]."""
    with wave.open(str(file), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(sample_rate)
        out.writeframes((32767 * audio).round().short().numpy())


# ----------------------------------------------------------------------------------------------------------------------
# Task


class MultimodalAutoencoding(Task):
    """Reconstructs the frames and the sound of a clip, and classifies it.

    A training step reconstructs random pixels and sound patches, and masks the class of some examples. Evaluation
    reconstructs everything and masks all classes.
    """

    name = "multimodal_autoencoding"
    ModelConfig = MultimodalAutoencoderConfig
    DataConfig = VideoDataConfig

    def load_data(self):
        data, clip = self.config.data, self.config.model.input
        self.train_clips, self.val_clips, self.data_note = load_clips(data, clip)
        self.check_classes(self.train_clips.class_names, "model.input.num_classes", clip.num_classes)
        train_set = WithQueries(self.train_clips, data, clip)
        return Shuffled(train_set, data.batch_size, self.config.train.seed), self.val_clips

    def loss(self, model, batch):
        data = self.config.data
        labels = batch["label"]  # (B,)
        classes = F.one_hot(labels, self.config.model.input.num_classes)
        inputs = {"image": batch["image"], "audio": batch["audio"], "label": classes.float()}
        if model.training:
            inputs["label_mask"] = batch["label_mask"]
            positions = {"image": batch["image_positions"], "audio": batch["audio_positions"], "label": None}
            outputs = model(inputs, output_positions=positions)
            targets = {"image": batch["image_targets"], "audio": batch["audio_targets"]}
            masked = batch["label_mask"][:, 0]
        else:
            outputs = model.decode_in_chunks(*model.encode(inputs), data.num_chunks)
            targets = inputs
            masked = torch.ones_like(labels)

        loss = 0.0
        sums = {}
        for name, weight in ("image", data.image_weight), ("audio", data.audio_weight):
            error = outputs[name].float() - targets[name]
            squared = sum_of_means(error.square())
            distance = squared if data.distance == "l2" else sum_of_means(error.abs())
            loss += weight * distance
            sums[f"{name}_mse"] = squared
        cross_entropy = F.cross_entropy(outputs["label"].float(), labels, reduction="sum")
        correct = outputs["label"].argmax(-1) == labels
        return sums | {
            "loss": loss + data.label_weight * cross_entropy,
            "count": labels.new_full((), len(labels)),  # new_tensor would wait for the GPU
            "audio_power": sum_of_means(targets["audio"].square()),
            "masked": masked.sum(),
            "masked_correct": (masked * correct).sum(),
        }

    def metrics(self, sums):
        """Adds `psnr` (peak 1) and `audio_snr` in decibels over all clips, and `accuracy` on masked classes."""
        metrics = super().metrics(sums)
        metrics["psnr"] = decibels(sums["count"], sums["image_mse"])
        if sums["audio_power"]:  # zero if all clips are silent
            metrics["audio_snr"] = decibels(sums["audio_power"], sums["audio_mse"])
        if sums["masked"]:
            metrics["accuracy"] = sums["masked_correct"] / sums["masked"]
        return metrics

    def reconstruct(self, model, image, audio):
        """Frames (T, 3, H, W) and sound (S, 1) of a clip -> their reconstructions, and logits of classes (E,)."""
        device = next(model.parameters()).device
        # The label is masked, so its value does not matter.
        clip = {"image": image, "audio": audio, "label": torch.zeros(self.config.model.input.num_classes)}
        inputs = {name: values[None].to(device) for name, values in clip.items()}
        outputs = model.decode_in_chunks(*model.encode(inputs), self.config.data.num_chunks)
        image = outputs["image"][0].float().clamp(0, 1)
        audio = outputs["audio"][0].float().clamp(-1, 1)
        return image.cpu(), audio.cpu(), outputs["label"][0]

    def visualize(self, model):
        """The first validation clip above its reconstruction, and both sounds."""
        sample_rate = self.config.model.input.sample_rate
        clip = self.val_clips[0]
        image, audio, _ = self.reconstruct(model, clip["image"], clip["audio"])
        return {
            "frames": pictures.contact_sheet(clip["image"], image),
            "sound": (clip["audio"], sample_rate),
            "sound_again": (audio, sample_rate),
        }

    def summary(self, metrics):
        """PSNR beside two baselines: predict the mean frame of training clips, or the mean frame of the clip itself.

        The baselines use at most 256 clips of each set.
        """
        train, val = (Subset(clips, range(min(256, len(clips)))) for clips in (self.train_clips, self.val_clips))
        mean_frame = sum(clip["image"].mean(0) for clip in train) / len(train)
        error = own_error = 0.0
        for clip in val:
            image = clip["image"]
            error += (image - mean_frame).square().mean()
            own_error += (image - image.mean(0)).square().mean()
        return (
            f"{self.config.data.eval_name}: PSNR {metrics['psnr']:.2f} dB; the mean frame of training clips would give "
            f"{decibels(len(val), error):.2f} dB, the mean frame of the clip itself "
            f"{decibels(len(val), own_error):.2f} dB"
        )

    def predict(self, model, args):
        """Prints the most likely classes of each video. Writes its first clip and the reconstruction as a video and as
        a picture, and the reconstructed sound."""
        clip = self.config.model.input
        for file, name in progress(input_files(args.inputs, SUFFIXES, "videos"), args.limit):
            image, audio = read_video(file, clip)
            if not audio.any():
                tell(f"{file} has no sound: the model gets silence")
            new_image, new_audio, logits = self.reconstruct(model, image, audio)
            picture = Path(args.out) / f"{name}-reconstruction.png"
            save_picture(pictures.contact_sheet(image, new_image), picture)
            with output(args.out, f"{name}-reconstruction.wav") as sound:
                write_sound(sound, new_audio, clip.sample_rate)
            with output(args.out, f"{name}-reconstruction.mp4") as video:
                frames = pictures.enlarge(torch.cat((image, new_image), dim=-1), 448)
                write_video(video, frames, clip.frame_rate, new_audio, clip.sample_rate)
            report_classes(args, file, logits, self.class_names, (picture, sound, video))


def sum_of_means(x):
    """The mean of each example in x (B, ...), summed over examples."""
    return x.flatten(1).mean(1).sum()


def decibels(signal, noise):
    """The ratio of two powers in decibels. The ratio is bounded: a diverged model must raise no error here."""
    return 10 * math.log10(max(signal / max(noise, 1e-30), 1e-30))
