"""Videos: the model of several modalities, generated clips, video files, the task, and predict.py.

The tests write their video files with PyAV, so every frame and every sample is known.
"""
import math
import os
import re
import sys
import wave
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import default_collate

from conftest import GOLDEN, ROOT, average_rate, fails, new_checkpoint, ranking, read_metrics, run_script
from perceiver.adapters import (FourierPositions, InputAdapter, LinearOutput, MultimodalInput, TrainableQueries,
                                VectorInput)
from perceiver.config import build, load_config
from perceiver.data import Shuffled
from perceiver.distributed import to_floats
from perceiver.errors import UserError
from perceiver.model import (PerceiverDecoder, PerceiverDecoderConfig, PerceiverEncoder, PerceiverEncoderConfig,
                             PerceiverIO)
from perceiver.speed import training_flops
from perceiver.tasks import TASKS
from perceiver.tasks.video import (GeneratedClips, MultimodalAutoencoderConfig, VideoDataConfig, VideoInputConfig,
                                   WithQueries, load_clips, num_video_frames, read_video, to_tensor, video_frames,
                                   write_sound, write_video)

av = pytest.importorskip("av")


# ----------------------------------------------------------------------------------------------------------------------
# Model

VIDEO = dict(image_shape=(3, 8, 12, 3), num_image_bands=2, num_audio_samples=48, samples_per_patch=8,
             num_audio_bands=3, num_classes=5)


def config(**kwargs) -> MultimodalAutoencoderConfig:
    encoder = PerceiverEncoderConfig(1, num_self_attention_heads=2, num_self_attention_layers_per_block=1)
    decoder = PerceiverDecoderConfig(1, num_query_channels=9, cross_attention_residual=False)
    return MultimodalAutoencoderConfig(6, 16, encoder, decoder, VideoInputConfig(**VIDEO | kwargs), 10)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = config().build().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"image": torch.rand(2, 3, 3, 8, 12), "audio": torch.randn(2, 48, 1), "label": torch.eye(5)[[3, 0]]}


def assert_same(a: dict, b: dict, names=("audio", "image", "label")):
    assert tuple(a) == tuple(names)
    for name in names:
        torch.testing.assert_close(a[name], b[name])


def test_modalities_follow_one_another_each_with_its_padding(model, inputs):
    adapter = model.input_adapter
    x = adapter(inputs | {"label_mask": torch.zeros(2, 1, dtype=torch.bool)})
    assert x.shape == (2, 6 + 3 * 2 * 3 + 1, adapter.num_channels)
    assert adapter.num_channels == 48 + 3 * 5 + 4
    start = 0
    for name, size, width in (("audio", 6, 8 + 7), ("image", 18, 48 + 15), ("label", 1, 5)):
        part = x[:, start : start + size]
        torch.testing.assert_close(part[..., :width], adapter.adapters[name](inputs[name]))
        assert torch.equal(part[..., width:], adapter.padding[name].expand(2, size, -1))
        start += size


def test_a_masked_input_becomes_the_mask_vector_of_its_modality(model, inputs):
    masks = {"label_mask": torch.tensor([[True], [False]]), "image_mask": torch.arange(18).expand(2, -1) == 4}
    seen, x = (model.input_adapter(inputs | {"label_mask": mask} | images) for mask, images in (
        (torch.tensor([[False]]), {}), (masks["label_mask"], {"image_mask": masks["image_mask"]})))
    changed = (seen != x).any(-1).nonzero().tolist()
    assert changed == [[0, 6 + 4], [0, 24], [1, 6 + 4]]
    assert torch.equal(x[0, 24], model.input_adapter.mask["label"][0])
    assert torch.equal(x[1, 10], model.input_adapter.mask["image"][0])


def test_the_label_is_masked_unless_told_otherwise(model, inputs):
    other = inputs | {"label": torch.randn(2, 5)}
    assert_same(model(inputs), model(other))
    shown = {"label_mask": torch.tensor([[False], [True]])}
    a, b = model(inputs | shown), model(other | shown)
    assert not torch.allclose(a["label"][0], b["label"][0]) and torch.equal(a["label"][1], b["label"][1])


@pytest.mark.parametrize("num_chunks", [1, 5, 128])
def test_outputs_in_chunks_equal_outputs_at_once(model, inputs, num_chunks):
    whole = model(inputs)
    assert {name: values.shape for name, values in whole.items()} == {
        name: values.shape for name, values in inputs.items()}
    assert_same(model.decode_in_chunks(*model.encode(inputs), num_chunks), whole)


def test_chosen_outputs(model, inputs):
    """Pixels chosen per example, one sound patch for all examples, and no label."""
    whole = model(inputs)
    pixels = whole["image"].movedim(2, -1).flatten(1, 3)  # (B, O, 3)
    positions = {"image": torch.tensor([[5, 287], [100, 100]]), "audio": torch.tensor([5])}
    some = model(inputs, output_positions=positions)
    expected = torch.stack([pixels[b, positions["image"][b]] for b in range(2)])
    assert_same(some, {"image": expected, "audio": whole["audio"][:, 40:].mT}, ("audio", "image"))
    assert_same(model(inputs, output_positions={"label": None}), whole, ("label",))


def test_gradients_reach_every_parameter(model, inputs):
    """Even unused mask vectors get gradients, because DDP waits for the gradients of all parameters."""
    sum(values.square().sum() for values in model(inputs).values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_official_size():
    encoder = PerceiverEncoderConfig(1, num_self_attention_layers_per_block=8)
    with torch.device("meta"):
        decoder = PerceiverDecoderConfig(1, num_query_channels=1024)
        model = MultimodalAutoencoderConfig(784, 512, encoder, decoder).build()
        inputs = {"image": torch.empty(1, 16, 3, 224, 224), "audio": torch.empty(1, 30720, 1),
                  "label": torch.empty(1, 700)}
        assert model.input_adapter(inputs).shape == (1, 52_097, 704)
    assert model.decoder.cross_attention.q_norm.normalized_shape == (1026,)
    assert sum(parameter.numel() for parameter in model.parameters()) == 19_858_855


def test_any_modalities():
    """The vector tells which element of the series the model must return."""
    torch.manual_seed(0)
    adapter = MultimodalInput({"which": VectorInput(3), "series": InputAdapter(nn.Identity(), 1,
                                                                              FourierPositions((3,), 2))})
    encoder = PerceiverEncoderConfig(1, num_self_attention_heads=2, num_self_attention_layers_per_block=1,
                                     init_scale=0.1)
    model = PerceiverIO(adapter, PerceiverEncoder(encoder, 4, 32, adapter.num_channels), TrainableQueries(1, 16),
                        PerceiverDecoder(PerceiverDecoderConfig(1, init_scale=0.1), 32, 16), LinearOutput(16, 1))
    optimizer, losses = torch.optim.Adam(model.parameters(), 3e-3), []
    for _ in range(400):
        series, which = torch.randn(64, 3, 1), torch.randint(3, (64,))
        answer = model({"series": series, "which": nn.functional.one_hot(which, 3).float()})[:, 0, 0]
        loss = (answer - series[torch.arange(64), which, 0]).square().mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) / 20 < 0.2


@pytest.mark.parametrize("values, message", [
    (dict(image_shape=[8, 8, 3]), r"image_shape=\[8, 8, 3\] must have 4 values"),
    (dict(image_shape=[3, 8, 12, 1]), r"image_shape=\(3, 8, 12, 1\) must end in 3"),
    (dict(patch_shape=[2, 4, 4]), r"patch_shape=\(2, 4, 4\) does not divide image_shape=\(3, 8, 12, 3\)"),
    (dict(patch_shape=[0, 4, 4]), r"patch_shape=.*0.* must be at least 1"),
    (dict(samples_per_patch=7), "samples_per_patch=7 does not divide num_audio_samples=48"),
    (dict(num_audio_bands=0), "num_audio_bands=0 must be at least 1")])
def test_errors_in_the_model_name_key_and_value(values, message):
    with pytest.raises(UserError, match=f"model.input.{message}"):
        build(VideoInputConfig, VIDEO | values, "model.input.")


def test_a_model_without_decoder_is_refused():
    with pytest.raises(ValueError, match="decoder=None: an autoencoder needs a decoder"):
        MultimodalAutoencoderConfig(decoder=None)


# ----------------------------------------------------------------------------------------------------------------------
# Files

def clip_of(image_shape: tuple[int, ...], num_samples: int, sample_rate: int, samples_per_patch: int = 1,
            ) -> VideoInputConfig:
    return VideoInputConfig(image_shape, (1, 1, 1), num_audio_samples=num_samples, sample_rate=sample_rate,
                            samples_per_patch=samples_per_patch)


RATE = 48_000
CLIP = clip_of((5, 32, 32, 3), 9600, RATE, samples_per_patch=16)  # 0.2 seconds, 25 frames a second
FORMATS = {"mp4": ("libx264", "aac"), "avi": ("mpeg4", "pcm_s16le"), "mkv": ("libx264", "pcm_s16le")}


def make_video(path: Path, num_frames: int = 50, fps: int = 25, size: tuple[int, int] = (48, 64), sound: bool = True,
               rate: int = RATE, layout: str = "mono") -> Path:
    """Writes a video. Frame n is gray 4 n + 20 in the central square, and white beside it.

    The sound is `tone`. In stereo, it is louder on the right.
    """
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
    """A tone that rises and gets louder, so that no two moments sound the same."""
    return (0.2 + 0.1 * seconds) * np.sin(2 * np.pi * (30 + 10 * seconds) * seconds)


def numbers(frames: torch.Tensor) -> list[float]:
    """The numbers that these frames have in `make_video`, as floats."""
    assert frames.flatten(1).std(1).max() < 0.02  # they show only the gray square
    return ((frames.mean((1, 2, 3)) * 255 - 20) / 4).tolist()


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("place, start", [(0, 0), (0.5, 0.9), (1, 1.8)])
def test_frames_and_sound_of_the_same_moments(tmp_path, suffix, place, start):
    frames, sound = read_video(make_video(tmp_path / f"a.{suffix}"), CLIP, place)
    assert frames.shape == (5, 3, 32, 32) and sound.shape == (9600, 1)
    first = math.floor(start * 25 + 0.03)
    assert numbers(frames) == pytest.approx([first + n for n in range(5)], abs=0.5)
    difference = sound[:, 0].numpy() - tone(start + np.arange(9600) / RATE)
    # AAC is lossy, and Matroska rounds times to milliseconds.
    assert np.abs(difference).mean() < {"mp4": 0.02, "avi": 0.001, "mkv": 0.08}[suffix]


@pytest.mark.parametrize("fps, expected", [(50, [0, 2, 4, 6, 8]), (30, [0, 1, 2, 3, 4]), (10, [0, 0, 0, 1, 1])])
def test_other_frame_rates(tmp_path, fps, expected):
    """A clip has the frames that the video shows at 0, 40, 80, 120 and 160 ms."""
    frames, _ = read_video(make_video(tmp_path / "a.mp4", 12, fps, size=(64, 48)), CLIP)
    assert numbers(frames) == pytest.approx(expected, abs=0.5)


@pytest.mark.parametrize("rate, layout", [(44_100, "stereo"), (16_000, "mono")])
def test_sound_of_other_rates_and_channels(tmp_path, rate, layout):
    _, sound = read_video(make_video(tmp_path / "a.avi", rate=rate, layout=layout),
                          clip_of((8, 16, 16, 3), 8000, 16_000), 0.4)
    np.testing.assert_allclose(sound[50:-50, 0], tone(0.6 + np.arange(8000) / 16_000)[50:-50], atol=0.01)


def test_after_the_end(tmp_path):
    """After the end of the video, its last frame repeats, and silence follows."""
    frames, sound = read_video(make_video(tmp_path / "a.mkv", 3), CLIP, 1.0)
    assert numbers(frames) == pytest.approx([0, 1, 2, 2, 2], abs=0.5)
    assert sound[5000:5700].abs().max() > 0.1 and sound[5760:].abs().max() == 0


def test_proportions_of_the_clip(tmp_path):
    """The video has 64 x 48 pixels, the clip 48 x 24. The crop has all 64 columns: 8 at each side are white. Resizing
    makes them 6."""
    frames, _ = read_video(make_video(tmp_path / "a.mp4", 5), clip_of((5, 24, 48, 3), 9600, RATE))
    white = frames[0].mean((0, 1)) > 0.9
    assert frames.shape == (5, 3, 24, 48) and 4 <= white[:24].sum() == white[24:].sum() <= 7


def test_all_frames_in_order(tmp_path):
    file = make_video(tmp_path / "a.avi", 12, sound=False)
    frames = torch.stack(list(video_frames(file)))
    assert frames.dtype == torch.uint8 and frames.shape == (12, 3, 48, 64) and average_rate(file) == 25
    assert num_video_frames(file) == 12 and num_video_frames(make_video(tmp_path / "a.mkv", 12)) is None
    assert numbers(frames[..., 10:-10] / 255) == pytest.approx(range(12), abs=0.5)


def test_what_is_written_can_be_read(tmp_path):
    frames = torch.arange(10, 210, 20, dtype=torch.uint8)[:, None, None, None].expand(10, 3, 40, 50)
    sound = torch.from_numpy(tone(np.arange(8192) / 8192)).float()[:, None]
    write_video(tmp_path / "a.mp4", frames, Fraction(10), sound, 8192)
    again, sound_again = read_video(tmp_path / "a.mp4", clip_of((10, 40, 50, 3), 8192, 8192))
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
# Mistakes


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
    assert "class folders" in error_of(load_clips, config, CLIP)
    for name in ("sit", "run"):
        (tmp_path / name).mkdir()
    assert "no valid file for the classes run, sit" in error_of(load_clips, config, CLIP)
    for name in ("sit/b.mp4", "sit/a.mkv", "sit/c.AVI", "run/a.mp4"):
        (tmp_path / name).touch()
    assert f"class run of {tmp_path} has one example" in error_of(load_clips, config, CLIP)
    (tmp_path / "run/b.mp4").touch()
    train, val, note = load_clips(config, CLIP)
    assert "3 examples for training" in note and "2 for validation" in note
    assert train.class_names == val.class_names == ["run", "sit"]
    assert [os.path.basename(file) for file in train.files] == [b"a.mp4", b"a.mkv", b"c.AVI"]
    assert [os.path.basename(file) for file in val.files] == [b"b.mp4", b"b.mp4"]
    assert train.labels.tolist() == [0, 1, 1] and val.labels.tolist() == [0, 1]


def test_silent_videos(tmp_path):
    make_video(tmp_path / "a.mp4", 5, sound=False)
    silence = read_video(tmp_path / "a.mp4", CLIP)[1]
    assert silence.shape == (9600, 1) and not silence.any()
    for name in ("train/x", "train/y", "val/x", "val/y"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "b.mp4").touch()
    (tmp_path / "val/y/b.mp4").unlink()
    (tmp_path / "a.mp4").rename(tmp_path / "val/y/a.mp4")
    _, val, _ = load_clips(VideoDataConfig(path=str(tmp_path)), CLIP)
    assert "val/y/a.mp4 has no sound; data.allow_silent=true accepts it" in error_of(val.examples.__getitem__, 1)
    _, val, _ = load_clips(VideoDataConfig(path=str(tmp_path), allow_silent=True), CLIP)
    assert val[1]["audio"].shape == (9600, 1) and not val[1]["audio"].any() and val[1]["label"] == 1


@pytest.mark.parametrize("values, message", [
    (dict(label_mask_prob=1.5), "label_mask_prob=1.5 must be in"),
    (dict(num_chunks=0), "num_chunks=0 must be at least 1"),
    (dict(val_fraction=0.0), "val_fraction=0.0 must be in"),
    (dict(distance="mse"), "distance='mse' must be one of l1, l2"),
    (dict(image_weight=-1.0), "image_weight=-1.0 must not be negative")])
def test_errors_in_the_data_section_name_key_and_value(values, message):
    with pytest.raises(UserError, match=f"data.{message}"):
        build(VideoDataConfig, values, "data.")


# ----------------------------------------------------------------------------------------------------------------------
# Datasets


def test_training_clips_depend_on_their_key_alone(tmp_path):
    for name in ("a/1.mkv", "a/2.mkv", "b/1.mkv", "b/2.mkv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        make_video(tmp_path / name, 50)
    config = VideoDataConfig(path=str(tmp_path), num_image_queries=7, num_audio_queries=3, label_mask_prob=0.5)
    train, val, _ = load_clips(config, CLIP)
    examples = [Shuffled(WithQueries(train, config, CLIP), 4, seed=1)[step, index]
                for step, index in ((0, 0), (3, 2), (0, 0), (0, 1))]
    assert all(torch.equal(torch.as_tensor(examples[0][key]), torch.as_tensor(examples[2][key])) for key in examples[0])
    starts = {numbers(example["image"])[0] for example in (examples[0], examples[1], examples[3])}
    assert len(starts) == 3 and numbers(val[0]["image"])[0] == pytest.approx(22, abs=0.5)  # in the middle
    assert examples[0]["image_positions"].shape == (7,) and examples[0]["image_positions"].max() < 5 * 32 * 32
    assert examples[0]["audio_positions"].shape == (3,) and examples[0]["label_mask"].shape == (1,)
    frame, place = examples[0]["image_positions"][0].item() // 1024, examples[0]["image_positions"][0].item() % 1024
    assert torch.equal(examples[0]["image_targets"][0], examples[0]["image"][frame, :, place // 32, place % 32])
    start = 16 * examples[0]["audio_positions"][0].item()
    assert torch.equal(examples[0]["audio_targets"][0], examples[0]["audio"][start : start + 16, 0])


def test_generated_clips():
    shape = clip_of((6, 40, 24, 3), 3000, 6000)
    train, val, _ = load_clips(VideoDataConfig(val_size=7), shape)
    assert len(val) == 7 and len(set(train.class_names)) == 9 and shape.frame_rate == 12
    clips = [train[index] for index in range(60)]
    assert {clip["label"] for clip in clips} == set(range(9))
    for clip in clips:
        assert clip["image"].shape == (6, 3, 40, 24) and 0 <= clip["image"].min() <= clip["image"].max() <= 1
        assert clip["audio"].shape == (3000, 1) and 0.1 < clip["audio"].abs().max() <= 1
    assert all(torch.equal(clips[5][name], train[5][name]) for name in ("image", "audio"))
    assert not torch.equal(clips[0]["image"], val[0]["image"])


def test_the_sound_follows_the_motion():
    """The higher a bouncing disc is, the more often the sound crosses zero."""
    clips = GeneratedClips(clip_of((8, 32, 32, 3), 8000, 8000), 200, 0)
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


def test_frames_are_rotated_as_the_file_says():
    """A rotation of -90 degrees counterclockwise makes the left edge the top edge."""
    frame = SimpleNamespace(rotation=-90, to_ndarray=lambda format: np.arange(6, dtype=np.uint8).reshape(2, 3, 1))
    assert to_tensor(frame)[0].tolist() == [[3, 0], [4, 1], [5, 2]]


# ----------------------------------------------------------------------------------------------------------------------
# Task

SHORT = ["train.max_steps=10", "train.eval_every=10", "train.log_every=1"]
SMALL_CLIPS = ["model.input.image_shape=[4,16,16,3]", "model.input.max_resolution=[4,4,4]", "data.val_size=8",
               "model.input.num_audio_samples=256", "model.input.sample_rate=512", "data.num_chunks=3",
               "model.num_latents=32", "data.num_audio_queries=8"]


def test_videos_are_learned(tmp_path):
    """The model beats the mean frame by 3 dB: it knows more than the colors of the shape and the background."""
    result = run_script("train.py", "configs/autoencode.yaml", f"train.out_dir={tmp_path}/run", *SMALL_CLIPS,
                        "data.audio_weight=0.1", "train.max_steps=350", "train.eval_every=350",
                        "optim.schedule=constant")
    assert result.returncode == 0, result.stderr
    found = re.search(r"PSNR ([\d.]+) dB; .* would give ([\d.]+) dB, .* clip itself ([\d.]+) dB", result.stdout)
    assert float(found[1]) > float(found[2]) + 3, found[0]
    assert float(found[1]) == pytest.approx(read_metrics(tmp_path / "run", "val")[-1]["psnr"], abs=0.01)
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert events.Images("frames")[0].width == 4 + 4 * (96 + 4)
    assert events.Audio("sound")[0].sample_rate == events.Audio("sound_again")[0].sample_rate == 512


def test_ranks_change_nothing_in_videos(tmp_path):
    """The random outputs and the masked classes depend on the example only."""
    common = ["train.py", "configs/autoencode.yaml", *SMALL_CLIPS, "data.batch_size=4", *SHORT]
    runs = [run_script(*common, f"train.out_dir={tmp_path}/{processes}", processes=processes) for processes in (1, 2)]
    assert all(run.returncode == 0 for run in runs), runs[1].stderr
    for split, length in (("train", 10), ("val", 1)):
        one, two = (read_metrics(tmp_path / str(processes), split) for processes in (1, 2))
        assert len(one) == length
        for name in ("loss", "psnr", "audio_snr", "accuracy"):
            assert [line.get(name) for line in one] == pytest.approx([line.get(name) for line in two], abs=1e-3)


def test_baselines_of_videos_by_hand():
    config = load_config(ROOT / "configs/autoencode.yaml", [*SMALL_CLIPS, "data.val_size=3"], TASKS)
    task = TASKS[config.task](config)
    task.load_data()
    train, val = (torch.stack([clips[index]["image"] for index in range(number)])  # (n, T, 3, H, W)
                  for clips, number in ((task.train_clips, 256), (task.val_clips, 3)))
    psnr, own = (-10 * (val - mean).square().mean().log10() for mean in (train.mean((0, 1)), val.mean(1, keepdim=True)))
    line = f"clips would give {psnr:.2f} dB, the mean frame of the clip itself {own:.2f} dB"
    assert line in task.summary({"psnr": 0})


def test_metrics_that_are_undefined():
    """Silence has no signal-to-noise ratio. Without masked classes, there is no accuracy.

    Sums that are not finite raise no error here: train.py reports them.
    """
    config = load_config(ROOT / "configs/autoencode.yaml", SMALL_CLIPS, TASKS)
    sums = {"loss": 1.0, "count": 2, "image_mse": 0.02, "audio_mse": 0.0, "audio_power": 0.0, "masked": 0,
            "masked_correct": 0}
    task = TASKS[config.task](config)
    assert task.metrics(sums) == {"loss": 0.5, "psnr": pytest.approx(20)}
    assert math.isnan(task.metrics(sums | {"image_mse": math.nan})["psnr"])
    assert task.metrics(sums | {"image_mse": math.inf})["psnr"] < -100


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_losses_of_videos_by_hand(distance):
    """Evaluation counts all outputs, training only the random ones."""
    config = load_config(ROOT / "configs/autoencode.yaml", [*SMALL_CLIPS, f"data.distance={distance}"], TASKS)
    torch.manual_seed(0)
    task = TASKS[config.task](config)
    model, (train_set, _) = task.build_model(), task.load_data()
    batch = default_collate([train_set[0, index] for index in range(3)])
    data, positions = config.data, batch["image_positions"]
    assert training_flops(task, batch) > 1e6  # runs on meta tensors
    for training in (True, False):
        sums = to_floats(task.loss(model.train(training), batch))
        mask = batch["label_mask"] if training else torch.ones(3, 1, dtype=torch.bool)
        out = model({"image": batch["image"], "audio": batch["audio"], "label_mask": mask,
                     "label": torch.nn.functional.one_hot(batch["label"], 9).float()})
        difference = {name: out[name] - batch[name] for name in ("image", "audio")}
        if training:
            pixels = difference["image"].permute(0, 1, 3, 4, 2).reshape(3, -1, 3)
            difference["image"] = torch.stack([pixels[b, positions[b]] for b in range(3)])
            patches = difference["audio"].reshape(3, -1, 16)
            difference["audio"] = torch.stack([patches[b, batch["audio_positions"][b]] for b in range(3)])
        means = {name: values.abs().pow(1 if distance == "l1" else 2).mean() for name, values in difference.items()}
        expected = (data.image_weight * means["image"] + data.audio_weight * means["audio"]
                    + data.label_weight * torch.nn.functional.cross_entropy(out["label"], batch["label"]))
        metrics = task.metrics(sums)
        assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-4)
        assert metrics["psnr"] == pytest.approx(-10 * difference["image"].square().mean().log10().item(), abs=1e-3)
        assert sums["masked"] == mask.sum()


# ----------------------------------------------------------------------------------------------------------------------
# predict.py


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A video of one second, with 24 x 20 pixels and sound."""
    file = tmp_path_factory.mktemp("videos") / "clip.mp4"
    frames = torch.randint(256, (10, 3, 1, 1), dtype=torch.uint8).expand(-1, -1, 20, 24)
    write_video(file, frames, Fraction(10), torch.rand(8000, 1) - 0.5, 8000)
    return file


VIDEO_MODEL = {"num_output_channels": 12, "input": {
    "image_shape": [5, 16, 16, 3], "num_image_bands": 2, "num_audio_samples": 4000, "sample_rate": 8000,
    "samples_per_patch": 8, "num_audio_bands": 2, "num_classes": 3}}


def test_videos_are_reconstructed(clip, predict, tmp_path):
    ckpt, model = new_checkpoint(tmp_path / "video.pt", "multimodal_autoencoding", ["run", "sit", "swim"], VIDEO_MODEL,
                                 {"num_chunks": 7})
    result = predict(ckpt, clip, clip, "--top-k", "2")
    assert result.code == 0 and "wrote predictions/clip-2-reconstruction.mp4" in result.err
    image, audio = read_video(clip, clip_of((5, 16, 16, 3), 4000, 8000))
    with torch.inference_mode():
        again = model({"image": image[None], "audio": audio[None], "label": torch.zeros(1, 3)})
    names, probs = ranking(result.out.splitlines()[1:3])
    expected = again["label"].softmax(-1)[0].topk(2)
    assert names == [["run", "sit", "swim"][n] for n in expected.indices]
    assert probs == pytest.approx(expected.values.tolist(), abs=1e-4)
    with wave.open("predictions/clip-reconstruction.wav") as file:
        sound = np.frombuffer(file.readframes(4000), "<i2") / 32767
    np.testing.assert_allclose(sound, again["audio"][0, :, 0].clamp(-1, 1), atol=1e-3)
    frames = torch.stack(list(video_frames("predictions/clip-reconstruction.mp4")))
    assert frames.shape == (5, 3, 224, 448) and average_rate("predictions/clip-reconstruction.mp4") == 10
    assert (frames[..., 6:-230].float().mean((2, 3)) - 255 * image.mean((2, 3))).abs().max() < 8  # left: original
    means = again["image"][0].clamp(0, 1).mean((2, 3))
    assert (frames[..., 224:].float().mean((2, 3)) - 255 * means).abs().max() < 12
    with Image.open("predictions/clip-reconstruction.png") as sheet:
        assert sheet.size == (4 + 5 * (96 + 4), 4 + 2 * (96 + 4))


def test_videos_with_official_weights(clip, predict, tmp_path):
    result = predict(GOLDEN / "multimodal", clip, "--out", tmp_path / "out")
    assert result.code == 0 and len(list((tmp_path / "out").iterdir())) == 3
    assert len(result.out.splitlines()) == 6 and re.search(r"^ +[\d.]+%  class \d+$", result.out, re.MULTILINE)


def test_mistakes_with_videos(clip, predict, tmp_path, monkeypatch):
    write_video(tmp_path / "silent.mp4", torch.zeros(3, 3, 16, 16, dtype=torch.uint8), Fraction(25))
    official = GOLDEN / "multimodal"
    result = predict(official, tmp_path / "silent.mp4")
    assert result.code == 0 and f"{tmp_path}/silent.mp4 has no sound: the model gets silence\n" in result.err
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:1000])
    assert fails(predict(official, tmp_path / "cut.mp4"), "cannot read", "cut.mp4")
    assert fails(predict(official, clip, "--attention"), "--attention")
    monkeypatch.setitem(sys.modules, "av", None)
    assert fails(predict(official, clip), "pip install av")
