"""Videos: generated clips, and files that av writes here, whose every frame and sample is known."""
import math
import sys
import wave
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import average_rate

from perceiver.data import (ClipShape, Shuffled, VideoDataConfig, WithQueries, load_clips, read_video,
                            video_frames, write_sound, write_video)
from perceiver.data.video import GeneratedClips, to_tensor
from perceiver.errors import UserError

av = pytest.importorskip("av")
RATE = 48_000
CLIP = ClipShape((5, 32, 32, 3), 9600, RATE)  # 0.2 seconds, 25 frames a second
FORMATS = {"mp4": ("libx264", "aac"), "avi": ("mpeg4", "pcm_s16le"), "mkv": ("libx264", "pcm_s16le")}


def make_video(path: Path, num_frames: int = 50, fps: int = 25, size: tuple[int, int] = (48, 64), sound: bool = True,
               rate: int = RATE, layout: str = "mono") -> Path:
    """Frame n is grey 4 n + 20 in the middle square and white beside it; the sound is `tone`, louder on the right."""
    height, width = size
    with av.open(str(path), "w") as container:
        video_codec, audio_codec = FORMATS[path.suffix[1:]]
        pictures = container.add_stream(video_codec, rate=fps, options={"crf": "4", "g": "10"})
        pictures.height, pictures.width, pictures.pix_fmt = height, width, "yuv420p"
        pictures.codec_context.bit_rate = 4_000_000
        tones = container.add_stream(audio_codec, rate=rate, layout=layout) if sound else None
        for n in range(num_frames):
            frame = np.full((height, width, 3), 255, np.uint8)
            side = min(size)
            frame[(height - side) // 2 : (height + side) // 2, (width - side) // 2 : (width + side) // 2] = 4 * n + 20
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(pictures.encode())
        if sound:
            samples = tone(np.arange(num_frames * rate // fps) / rate)
            samples = samples[None] if layout == "mono" else np.stack((0.5 * samples, 1.5 * samples))
            fitting = av.AudioResampler(tones.format.name, layout, rate)
            for start in range(0, samples.shape[1], 1000):
                part = np.ascontiguousarray(samples[:, start : start + 1000], np.float32)
                frame = av.AudioFrame.from_ndarray(part, "fltp", layout)
                frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), start
                for part in fitting.resample(frame):
                    container.mux(tones.encode(part))
            container.mux(tones.encode())
    return path


def tone(seconds):
    """Rises and gets louder: no other moment sounds the same."""
    return (0.2 + 0.1 * seconds) * np.sin(2 * np.pi * (30 + 10 * seconds) * seconds)


def numbers(frames: torch.Tensor) -> list[float]:
    """Which frames of `make_video` these are."""
    assert frames.flatten(1).std(1).max() < 0.02  # nothing of what is beside the square
    return ((frames.mean((1, 2, 3)) * 255 - 20) / 4).tolist()


# ----------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("place, start", [(0, 0), (0.5, 0.9), (1, 1.8)])
def test_frames_and_sound_of_the_same_moments(tmp_path, suffix, place, start):
    frames, sound = read_video(make_video(tmp_path / f"a.{suffix}"), CLIP, place)
    assert frames.shape == (5, 3, 32, 32) and sound.shape == (9600, 1)
    first = math.floor(start * 25 + 0.03)
    assert numbers(frames) == pytest.approx([first + n for n in range(5)], abs=0.5)
    difference = sound[:, 0].numpy() - tone(start + np.arange(9600) / RATE)
    # AAC loses some, and Matroska's times are in milliseconds.
    assert np.abs(difference).mean() < {"mp4": 0.02, "avi": 0.001, "mkv": 0.08}[suffix]


@pytest.mark.parametrize("fps, expected", [(50, [0, 2, 4, 6, 8]), (30, [0, 1, 2, 3, 4]), (10, [0, 0, 0, 1, 1])])
def test_other_frame_rates(tmp_path, fps, expected):
    """Shown at 0, 40, 80, 120 and 160 ms."""
    frames, _ = read_video(make_video(tmp_path / "a.mp4", 12, fps, size=(64, 48)), CLIP)
    assert numbers(frames) == pytest.approx(expected, abs=0.5)


@pytest.mark.parametrize("rate, layout", [(44_100, "stereo"), (16_000, "mono")])
def test_sound_of_other_rates_and_channels(tmp_path, rate, layout):
    _, sound = read_video(make_video(tmp_path / "a.avi", rate=rate, layout=layout),
                          ClipShape((8, 16, 16, 3), 8000, 16_000), 0.4)
    np.testing.assert_allclose(sound[50:-50, 0], tone(0.6 + np.arange(8000) / 16_000)[50:-50], atol=0.01)


def test_after_the_end(tmp_path):
    """The last frame stays, and there is silence."""
    frames, sound = read_video(make_video(tmp_path / "a.mkv", 3), CLIP, 1.0)
    assert numbers(frames) == pytest.approx([0, 1, 2, 2, 2], abs=0.5)
    assert sound[5000:5700].abs().max() > 0.1 and sound[5760:].abs().max() == 0


def test_proportions_of_the_clip(tmp_path):
    """The middle of 64 x 48, in the proportions 1 : 2, is 24 rows of all columns: 8 of them white at each side."""
    frames, _ = read_video(make_video(tmp_path / "a.mp4", 5), ClipShape((5, 24, 48, 3), 9600, RATE))
    white = frames[0].mean((0, 1)) > 0.9
    assert frames.shape == (5, 3, 24, 48) and 4 <= white[:24].sum() == white[24:].sum() <= 7


def test_all_frames_in_order(tmp_path):
    file = make_video(tmp_path / "a.avi", 12, sound=False)
    frames = torch.stack(list(video_frames(file)))
    assert frames.dtype == torch.uint8 and frames.shape == (12, 3, 48, 64) and average_rate(file) == 25
    assert numbers(frames[..., 10:-10] / 255) == pytest.approx(range(12), abs=0.5)


def test_what_is_written_can_be_read(tmp_path):
    frames = torch.arange(10, 210, 20, dtype=torch.uint8)[:, None, None, None].expand(10, 3, 40, 50)
    sound = torch.from_numpy(tone(np.arange(8192) / 8192)).float()[:, None]
    write_video(tmp_path / "a.mp4", frames, Fraction(10), sound, 8192)
    again, sound_again = read_video(tmp_path / "a.mp4", ClipShape((10, 40, 50, 3), 8192, 8192))
    torch.testing.assert_close(again * 255, frames.float(), atol=3, rtol=0)
    torch.testing.assert_close(sound_again[100:-100], sound[100:-100], atol=0.05, rtol=0)
    write_video(tmp_path / "odd.mp4", frames[..., 1:, 1:], Fraction(10))
    assert len(list(video_frames(tmp_path / "odd.mp4"))) == 10
    write_sound(tmp_path / "a.wav", sound, 8192)
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (8192, 1, 8192)
        samples = np.frombuffer(file.readframes(8192), "<i2") / 32767
    np.testing.assert_allclose(samples, sound[:, 0], atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# What can be wrong


def error_of(function, *args) -> str:
    with pytest.raises(UserError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_files_that_are_no_videos(tmp_path, monkeypatch):
    file = make_video(tmp_path / "a.mp4", 5)
    (tmp_path / "cut.mp4").write_bytes(file.read_bytes()[:3000])
    (tmp_path / "text.mp4").write_text("no video")
    write_sound(tmp_path / "sound.wav", torch.zeros(99, 1), 8000)
    for name in ("cut.mp4", "text.mp4", "sound.wav", "nowhere.mp4"):
        assert f"cannot read {tmp_path / name}: " in error_of(read_video, tmp_path / name, CLIP)
        assert f"cannot read {tmp_path / name}: " in error_of(list, video_frames(tmp_path / name))
    monkeypatch.setitem(sys.modules, "av", None)
    assert error_of(read_video, file, CLIP) == "reading and writing videos needs the package av: pip install av"


def test_folders(tmp_path):
    config = VideoDataConfig(path=str(tmp_path))
    assert "holds no class folders" in error_of(load_clips, config, CLIP)
    for name in ("sit", "run"):
        (tmp_path / name).mkdir()
    assert "holds no .mp4 files" in error_of(load_clips, config, CLIP)
    for name in ("sit/b.mp4", "sit/a.mkv", "sit/c.AVI", "run/a.mp4"):
        (tmp_path / name).touch()
    assert f"{tmp_path / 'run'} holds one file" in error_of(load_clips, config, CLIP)
    (tmp_path / "run/b.mp4").touch()
    train, val = load_clips(config, CLIP)
    assert train.class_names == val.class_names == ["run", "sit"]
    assert [(file.name, label) for file, label in train.files] == [("a.mp4", 0), ("a.mkv", 1), ("c.AVI", 1)]
    assert [(file.name, label) for file, label in val.files] == [("b.mp4", 0), ("b.mp4", 1)]


def test_silent_videos(tmp_path):
    make_video(tmp_path / "a.mp4", 5, sound=False)
    assert read_video(tmp_path / "a.mp4", CLIP)[1] is None
    for name in ("train/x", "train/y", "val/x", "val/y"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "b.mp4").touch()
    (tmp_path / "val/y/b.mp4").unlink()
    (tmp_path / "a.mp4").rename(tmp_path / "val/y/a.mp4")
    _, val = load_clips(VideoDataConfig(path=str(tmp_path)), CLIP)
    assert "val/y/a.mp4 has no sound; with data.allow_silent=true it is taken" in error_of(val.__getitem__, 1)
    _, val = load_clips(VideoDataConfig(path=str(tmp_path), allow_silent=True), CLIP)
    assert val[1]["audio"].shape == (9600, 1) and not val[1]["audio"].any() and val[1]["label"] == 1


@pytest.mark.parametrize("kwargs, message", [
    (dict(label_mask_prob=1.5), "label_mask_prob=1.5 must be in"),
    (dict(num_chunks=0), "num_chunks=0 must be at least 1"), (dict(val_fraction=0), "val_fraction=0 must be in"),
    (dict(distance="mse"), "distance='mse' must be l1 or l2"),
    (dict(image_weight=-1), "image_weight=-1 must not be negative")])
def test_config_errors_name_key_and_value(kwargs, message):
    with pytest.raises(ValueError, match=message):
        VideoDataConfig(**kwargs)


# ----------------------------------------------------------------------------------------------------------------------
# Datasets


def test_training_clips_depend_on_their_key_alone(tmp_path):
    for name in ("a/1.mkv", "a/2.mkv", "b/1.mkv", "b/2.mkv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        make_video(tmp_path / name, 50)
    config = VideoDataConfig(path=str(tmp_path), num_image_queries=7, num_audio_queries=3, label_mask_prob=0.5)
    train, val = load_clips(config, CLIP)
    examples = [Shuffled(WithQueries(train, config, 5 * 32 * 32, 600), 4, seed=1)[step, index]
                for step, index in ((0, 0), (3, 2), (0, 0), (0, 1))]
    assert all(torch.equal(torch.as_tensor(examples[0][key]), torch.as_tensor(examples[2][key])) for key in examples[0])
    starts = {numbers(example["image"])[0] for example in (examples[0], examples[1], examples[3])}
    assert len(starts) == 3 and numbers(val[0]["image"])[0] == pytest.approx(22, abs=0.5)  # in the middle
    assert examples[0]["image_positions"].shape == (7,) and examples[0]["image_positions"].max() < 5 * 32 * 32
    assert examples[0]["audio_positions"].shape == (3,) and examples[0]["label_mask"].shape == (1,)


def test_generated_clips():
    shape = ClipShape((6, 40, 24, 3), 3000, 6000)
    train, val = load_clips(VideoDataConfig(num_val_clips=7), shape)
    assert len(val) == 7 and len(set(train.class_names)) == 9 and shape.frame_rate == 12
    clips = [train[index] for index in range(60)]
    assert {clip["label"] for clip in clips} == set(range(9))
    for clip in clips:
        assert clip["image"].shape == (6, 3, 40, 24) and 0 <= clip["image"].min() <= clip["image"].max() <= 1
        assert clip["audio"].shape == (3000, 1) and 0.1 < clip["audio"].abs().max() <= 1
    assert all(torch.equal(clips[5][name], train[5][name]) for name in ("image", "audio"))
    assert not torch.equal(clips[0]["image"], val[0]["image"])


def test_the_sound_follows_the_motion():
    """The more a bouncing disc is above, the more often the sound crosses zero."""
    clips = GeneratedClips(ClipShape((8, 32, 32, 3), 8000, 8000), 200, 0)
    heights, crossings = [], []
    for clip in (clips[n] for n in range(60)):
        if clips.class_names[clip["label"]] == "disc bounces":
            ground = clip["image"][:, :, :1, :1]
            away = (clip["image"] - ground).abs().sum(1)  # (T, H, W)
            row = (away.sum(2) * torch.arange(32)).sum(1) / away.sum((1, 2))
            heights += (-row[:-1] - row[1:]).tolist()
            signs = clip["audio"][:, 0].view(8, 1000).sign()
            crossings += (signs.diff(dim=1) != 0).sum(1)[:-1].tolist()
    assert np.corrcoef(heights, crossings)[0, 1] > 0.8


def test_frames_are_turned_as_the_file_says():
    """-90 degrees counterclockwise: what was the left edge is the top."""
    frame = SimpleNamespace(rotation=-90, to_ndarray=lambda format: np.arange(6, dtype=np.uint8).reshape(2, 3, 1))
    assert to_tensor(frame)[0].tolist() == [[3, 0], [4, 1], [5, 2]]
