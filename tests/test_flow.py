"""Optical flow: model, tiles, datasets, training, and predict.py."""
import re
import struct
import zlib
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision.utils import flow_to_image

from conftest import GOLDEN, fails, new_checkpoint, read_metrics, run_script
from perceiver.config import build, from_dict
from perceiver.errors import UserError
from perceiver.model import PerceiverDecoderConfig, PerceiverEncoderConfig
from perceiver.pretrained import from_pretrained
from perceiver.tasks import TASKS
from perceiver.tasks.flow import (FlowDataConfig, FrameFeatures, FrameInputConfig, OpticalFlow, OpticalFlowConfig,
                                  add_noise, coarse_to_fine, compute_flow, draw_pair, enlarge_flow, load_flow,
                                  move_back, read_flow, read_frame, tile_starts, write_flo)
from perceiver.tasks.video import write_video

TILE = (24, 40)  # size of the model's frames
SHAPE = (20, 28)  # the same in tests of datasets
WHOLE = (26, 35)  # size of the frames in files


# ----------------------------------------------------------------------------------------------------------------------
# The model


def small_model(**kwargs) -> nn.Module:
    encoder = PerceiverEncoderConfig(1, num_self_attention_layers_per_block=1, num_self_attention_heads=2)
    decoder = PerceiverDecoderConfig(1, cross_attention_residual=False)
    model = OpticalFlowConfig(6, 16, encoder, decoder, FrameInputConfig(TILE, 8, 3, **kwargs)).build().eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("size", [3, 5])
def test_features_are_a_linear_map_of_neighboring_pixels(size):
    features, frames = FrameFeatures(5, 0.3, size), torch.randn(2, 2, 3, 6, 7)
    nn.init.normal_(features.linear.bias)
    padding = (size // 2, size // 2)
    padded = np.pad(frames.numpy(), ((0, 0), (0, 0), (0, 0), padding, padding))
    for row, column in ((0, 0), (3, 4), (5, 6), (5, 2)):
        around = padded[:, :, :, row : row + size, column : column + size].transpose(0, 1, 3, 4, 2).reshape(2, -1)
        torch.testing.assert_close(features(frames)[:, row, column], features.linear(torch.tensor(around)))
    with pytest.raises(ValueError, match=r"frames of shape \(2, 3, 6, 7\)"):
        features(frames[0])


def test_normalized_features_ignore_light_and_contrast():
    frames = torch.randn(2, 2, 3, 6, 7)
    features = FrameFeatures(5, 0.3, normalize=True)
    color = torch.tensor([0.3, -0.2, 0.1]).view(3, 1, 1)
    torch.testing.assert_close(features(0.5 * frames + color), features(frames), rtol=0.05, atol=0.02)
    assert features(0.01 * frames).std() < 0.5 * features(frames).std()  # the noise of a flat tile stays small


@torch.inference_mode()
def test_flow_of_selected_pixels():
    model, frames = small_model(), torch.randn(2, 2, 3, *TILE)
    flow = model(frames)
    assert flow.shape == (2, *TILE, 2)
    assert (flow.std((1, 2)) > 0.05).all()
    some = torch.tensor([[0, 41, 959], [7, 7, 500]])
    torch.testing.assert_close(model(frames, some)[0], flow[0].flatten(0, 1)[some[0]])
    torch.testing.assert_close(model(frames, some)[1], flow[1].flatten(0, 1)[some[1]])
    torch.testing.assert_close(model(frames, some[0]), flow.flatten(1, 2)[:, some[0]])


def test_an_untrained_model_predicts_no_motion():
    model = OpticalFlowConfig(6, 16, PerceiverEncoderConfig(1), input=FrameInputConfig(TILE)).build()
    assert not model(torch.randn(1, 2, 3, *TILE)).any()
    assert model.output_adapter.linear.weight.requires_grad


@pytest.mark.parametrize("change, message", [
    (dict(decoder=None), "decoder=None"),
    (dict(decoder=PerceiverDecoderConfig(num_query_channels=8)), "decoder.num_query_channels=8 must be null"),
    (dict(encoder=PerceiverEncoderConfig(8)), "does not divide 322")])
def test_mistakes_in_the_model_config(change, message):
    with pytest.raises(ValueError, match=message):
        OpticalFlowConfig(**dict(encoder=PerceiverEncoderConfig(1)) | change).build()
    for shape in ([8, 8, 3], [8, 0]):
        with pytest.raises(UserError, match="frame_shape"):
            build(FrameInputConfig, {"frame_shape": shape})
    with pytest.raises(UserError, match="patch_size=4 must be odd"):
        build(FrameInputConfig, {"patch_size": 4})


# ----------------------------------------------------------------------------------------------------------------------
# Tiles


class Fake(nn.Module):
    """A model whose flow depends on the place of a pixel in the tile, and on its color in both frames."""

    def forward(self, frames):
        assert frames.shape[-2:] == TILE
        place = torch.arange(TILE[0] * TILE[1]).reshape(TILE) / 100
        return torch.stack((frames[:, 0, 0] + place, frames[:, 1, 2] - place), dim=-1)


def test_tiles_are_deepminds():
    assert tile_starts(436, 368) == [0, 68] and tile_starts(1024, 496) == [0, 476, 528]  # Sintel
    assert tile_starts(368, 368) == [0]
    assert tile_starts(700, 368) == [0, 332]  # not 348, where the second tile would leave the image


def test_small_tiles_leave_no_grid():
    """A small model is wrong near the edges of a tile. After blending, the error is nearly the same everywhere."""
    rows = torch.linspace(-1, 1, TILE[0])[:, None].expand(TILE)
    wrong = torch.stack((rows, rows), -1).square()  # 1 at the upper and lower edges, 0 in the middle
    flow = compute_flow(lambda frames: wrong.expand(len(frames), -1, -1, -1), torch.zeros(2, 3, 120, 200), TILE)
    inside = flow[24:-24, 40:-40]
    assert inside.max() - inside.min() < 0.06  # it would be 0.18 if tiles overlapped by half


@pytest.mark.parametrize("size", [(24, 40), (30, 40), (24, 61), (57, 93)])
def test_overlapping_tiles_are_blended(size):
    """The result equals the formula: the sum of weight times flow, divided by the sum of weights."""
    frames, tile = torch.randn(2, 3, *size), TILE
    steps = (6, 10)  # small tiles start every quarter of a tile
    ys, xs = ({min(start, n - t) for start in range(0, n, step)} for n, t, step in zip(size, tile, steps))
    total, weights = np.zeros((*size, 2)), np.zeros((*size, 1))
    for y in ys:
        for x in xs:
            flow = Fake()(frames[None, :, :, y : y + tile[0], x : x + tile[1]])[0].numpy()
            for i in range(tile[0]):
                for j in range(tile[1]):
                    weight = min(j + 1, tile[1] - j, i + 1, tile[0] - i)
                    total[y + i, x + j] += weight * flow[i, j]
                    weights[y + i, x + j] += weight
    torch.testing.assert_close(compute_flow(Fake(), frames, tile), torch.tensor(total / weights, dtype=torch.float32))


@pytest.mark.parametrize("tile, most", [((24, 40), 34), ((24, 1400), 1), ((368, 496), 1)])
def test_small_tiles_form_batches(tile, most):
    """Of up to 2**15 pixels. Large tiles come one at a time: two may not fit into memory."""
    sizes = []

    def model(frames):
        sizes.append(len(frames))
        return torch.zeros(len(frames), *tile, 2)
    compute_flow(model, torch.zeros(2, 3, 400, 1500), tile)
    assert max(sizes) == most and sum(sizes) == len(tile_starts(400, tile[0])) * len(tile_starts(1500, tile[1]))


@torch.inference_mode()
def test_an_image_of_one_tile_has_the_flow_of_the_model():
    model, frames = small_model(), torch.randn(2, 3, *TILE)
    assert torch.equal(compute_flow(model, frames, TILE), model(frames[None])[0])


@pytest.mark.parametrize("size", [(24, 40), (25, 41), (100, 77), (5, 9), (10, 90)])
def test_blending_keeps_a_flow_on_which_all_tiles_agree(size):
    def model(frames):
        return torch.tensor([1.7, -0.3]).expand(len(frames), *TILE, 2)
    flow = compute_flow(model, torch.zeros(2, 3, *size), TILE)
    assert flow.shape == (*size, 2) and (flow == torch.tensor([1.7, -0.3])).all()


def test_small_images_are_padded_with_their_edges():
    frames = torch.randn(2, 3, 10, 90)
    larger = torch.cat((frames, frames[:, :, -1:].expand(-1, -1, 14, -1)), dim=2)
    torch.testing.assert_close(compute_flow(Fake(), frames, TILE), compute_flow(Fake(), larger, TILE)[:10])


# ----------------------------------------------------------------------------------------------------------------------
# From coarse to fine


def ramp(right: float, down: float, size: tuple[int, int]) -> torch.Tensor:
    """Two frames whose red and green grow to the right and down. The second frame is the first, moved."""
    rows, columns = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    first = torch.stack((columns, rows, torch.zeros(size))) / 200
    return torch.stack((first, first - torch.tensor([right, down, 0]).view(3, 1, 1) / 200))


def short_sighted(frames: torch.Tensor) -> torch.Tensor:
    """The exact motion of a ramp, but never more than 2 pixels along an axis."""
    first, second = frames.unbind(1)
    steps = torch.stack((first[0, 0, 5, 6] - first[0, 0, 5, 5], first[0, 1, 6, 5] - first[0, 1, 5, 5]))
    difference = (first - second)[:, :2].movedim(1, -1)
    return (difference / steps).clamp(-2, 2)


@pytest.mark.parametrize("size", [(100, 163), (97, 160)])
def test_long_motions_are_found_from_coarse_to_fine(size):
    """Two halvings make 7 pixels less than 2. At the edges, the second frame does not show where a pixel went."""
    frames, true = ramp(7.0, -5.5, size), torch.tensor([7.0, -5.5])
    inside = slice(12, -12), slice(12, -12)
    flow = coarse_to_fine(short_sighted, frames, TILE)
    assert flow.shape == (*size, 2)
    assert (flow[inside] - true).abs().max() < 0.1
    assert (compute_flow(short_sighted, frames, TILE)[inside] - torch.tensor([2.0, -2.0])).abs().max() < 1e-3


def test_frames_of_less_than_two_tiles_have_one_scale():
    frames = torch.randn(2, 3, 2 * TILE[0], 2 * TILE[1] - 1)
    assert torch.equal(coarse_to_fine(Fake(), frames, TILE), compute_flow(Fake(), frames, TILE))
    frames = torch.randn(2, 3, 2 * TILE[0], 2 * TILE[1])
    assert not torch.allclose(coarse_to_fine(Fake(), frames, TILE), compute_flow(Fake(), frames, TILE))


def test_frames_move_back_along_the_flow():
    frame, flow = torch.randn(3, 9, 12), torch.zeros(9, 12, 2)
    assert torch.allclose(move_back(frame, flow), frame, atol=1e-5)
    flow[..., 0], flow[..., 1] = 3.0, -2.0
    moved = move_back(frame, flow)
    torch.testing.assert_close(moved[:, 2:, :-3], frame[:, :-2, 3:], atol=1e-5, rtol=0)
    torch.testing.assert_close(moved[:, 2:, -3:], frame[:, :-2, -1:].expand(3, 7, 3), atol=1e-5, rtol=0)
    larger = enlarge_flow(flow, 18, 36)
    assert larger.shape == (18, 36, 2) and torch.equal(larger[7, 7], torch.tensor([9.0, -4.0]))


def test_the_task_goes_from_coarse_to_fine_if_the_model_does():
    frames = torch.randn(1, 2, 3, 2 * TILE[0], 2 * TILE[1])
    for on, expected in ((True, coarse_to_fine), (False, compute_flow)):
        task = new_task()
        task.config.model.coarse_to_fine = on
        assert torch.equal(task.flow(Fake(), frames)[0], expected(Fake(), frames[0], TILE))


# ----------------------------------------------------------------------------------------------------------------------
# Generated pairs


def colors_at_targets(frame: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(48), torch.arange(64), indexing="ij")
    grid = torch.stack(((columns + flow[..., 0]) / 63, (rows + flow[..., 1]) / 47), -1)[None] * 2 - 1
    return F.grid_sample(frame[None], grid, align_corners=True)[0]


def test_the_second_frame_moved_back_by_the_flow_is_the_first():
    """No other flow does it better, not even one that differs by half a pixel.

    Compares only pixels whose layer is visible in both frames, and in all pixels of the second frame that the
    interpolation reads."""
    others = 0.5 * torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]])
    compared, moved = 0, []
    for seed in range(30):
        frames, flow, layers = draw_pair(np.random.default_rng(seed), (48, 64), max_motion=4.0)
        rows, columns = torch.meshgrid(torch.arange(48), torch.arange(64), indexing="ij")
        x, y = columns + flow[..., 0], rows + flow[..., 1]
        inside = (x >= 1) & (x <= 61) & (y >= 1) & (y <= 45)
        same = inside.clone()
        for right, down in product((0, 1), (0, 1)):
            there = layers[1, (y.long() + down).clamp(0, 47), (x.long() + right).clamp(0, 63)]
            same &= there == layers[0]
        assert same.sum() > 0.6 * inside.sum()
        errors = [(colors_at_targets(frames[1], flow + other) - frames[0]).abs()[:, same].mean()
                  for other in (torch.zeros(2), *others)]
        assert errors[0] < 0.9 * min(errors[1:]), seed
        compared += same.sum()
        moved.append(flow.norm(dim=-1).mean().item())
    assert compared > 40_000 and 1.0 < np.mean(moved) < 4.0
    assert min(moved) < 1.0 and max(moved) > 3.0  # short motions too: coarse-to-fine leaves them


def test_the_camera_changes_light_and_adds_noise():
    frames, changes = torch.zeros(2, 3, 20, 30), []
    for seed in range(100):
        noisy = add_noise(np.random.default_rng(seed), frames + 0.5)
        assert noisy.abs().max() <= 1
        changes.append(noisy.mean((1, 2, 3)) - 0.5)
    first, second = torch.stack(changes).T
    assert first.abs().max() < 0.01 and 0.03 < second.std() < 0.1


def test_generated_examples_depend_on_the_key_alone():
    config = FlowDataConfig(val_size=3)
    (train, val), (again, _) = load_flow(config, SHAPE, seed=1), load_flow(config, SHAPE, seed=1)
    example, others = train[(5, 2)], [again[(5, 3)], again[(6, 2)], load_flow(config, SHAPE, 2)[0][(5, 2)], val[0]]
    for name, size in (("frames", (2, 3, *SHAPE)), ("flow", (*SHAPE, 2)), ("valid", SHAPE)):
        assert example[name].shape == size and torch.equal(example[name], again[(5, 2)][name])
    assert not any(torch.equal(example["frames"], other["frames"]) for other in others)
    assert len(val) == 3 and torch.equal(val[2]["flow"], load_flow(config, SHAPE, 2)[1][2]["flow"])
    assert example["frames"].abs().max() <= 1 and example["valid"].all()


# ----------------------------------------------------------------------------------------------------------------------
# Files in the formats of the datasets


def write_frame(file: Path, rng: np.random.Generator, size: tuple[int, int] = WHOLE):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file)


def write_flow(file: Path, rng: np.random.Generator, size: tuple[int, int] = WHOLE):
    file.parent.mkdir(parents=True, exist_ok=True)
    write_flo(file, torch.from_numpy(rng.normal(0, 5, (*size, 2))).float())


def write_kitti(file: Path, rng: np.random.Generator):
    """Writes a PNG file of 3 channels with 16 bits, which PIL cannot write."""
    file.parent.mkdir(parents=True, exist_ok=True)
    valid = rng.integers(0, 2, WHOLE)
    values = np.stack((*(rng.integers(2**15 - 900, 2**15 + 900, (2, *WHOLE)) * valid), valid), -1).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", WHOLE[1], WHOLE[0], 16, 2, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def sintel(root: Path):
    rng = np.random.default_rng(0)
    for scene in "abcdefghij":
        for n in (1, 2, 3):
            for name in ("clean", "final"):
                write_frame(root / "training" / name / scene / f"frame_{n:04}.png", rng)
            if n < 3:
                write_flow(root / "training" / "flow" / scene / f"frame_{n:04}.flo", rng)


def chairs(root: Path):
    rng = np.random.default_rng(0)
    for n in range(1, 7):
        write_flow(root / "data" / f"{n:05}_flow.flo", rng)
        for k in (1, 2):
            write_frame(root / "data" / f"{n:05}_img{k}.ppm", rng)
    (root / "FlyingChairs_train_val.txt").write_text("1\n1\n2\n1\n1\n2\n")


def kitti(root: Path):
    rng = np.random.default_rng(0)
    for n in range(11):
        for k in (10, 11):
            write_frame(root / "training" / "image_2" / f"{n:06}_{k}.png", rng)
        write_kitti(root / "training" / "flow_occ" / f"{n:06}_10.png", rng)


def middlebury(root: Path, sizes: dict[str, tuple[int, int]] = dict.fromkeys("abcdefgh", WHOLE)):
    rng = np.random.default_rng(0)
    for scene, size in sizes.items():
        for n in (10, 11):
            write_frame(root / scene / f"frame{n}.png", rng, size)
        file = root.parent / "other-gt-flow" / scene / "flow10.flo"
        write_flow(file, rng, size)
        content = bytearray(file.read_bytes())
        content[12:28] = struct.pack("<4f", 1666666752.0, 1666666752.0, float("nan"), 0.5)  # unknown flow at two pixels
        file.write_bytes(content)
    write_frame(root / "without-flow" / "frame10.png", rng)


WRITE = {"sintel": sintel, "chairs": chairs, "kitti": kitti, "middlebury": middlebury}
FOLDERS = {"sintel": "Sintel", "chairs": "FlyingChairs", "kitti": "KittiFlow", "middlebury": "other-data"}


@pytest.fixture(params=WRITE)
def dataset(request, tmp_path) -> FlowDataConfig:
    WRITE[request.param](tmp_path / FOLDERS[request.param])
    return FlowDataConfig(dataset=request.param, path=str(tmp_path), batch_size=4)


def read_middlebury(root: Path) -> list[tuple]:
    """Middlebury's pairs in the form of torchvision's datasets. torchvision has no class for Middlebury."""
    pairs = []
    for file in root.glob("other-gt-flow/*/flow10.flo"):
        _, width, height, *values = struct.unpack(f"<4s2i{2 * WHOLE[0] * WHOLE[1]}f", file.read_bytes())
        flow = np.array(values, np.float32).reshape(height, width, 2).transpose(2, 0, 1)
        valid = np.ones((height, width), bool)
        valid[0, :2] = False
        frames = [Image.open(root / "other-data" / file.parent.name / f"frame{n}.png") for n in (10, 11)]
        pairs.append((*frames, np.where(valid, flow, 0), valid))
    return pairs


def whole(dataset: FlowDataConfig) -> list[dict]:
    """All examples with whole frames in [-1, 1]. torchvision reads them, except Middlebury's."""
    root, kind = Path(dataset.path), dataset.dataset
    if kind == "sintel":
        sets = [torchvision.datasets.Sintel(root, pass_name="both")]
    elif kind == "chairs":
        sets = [torchvision.datasets.FlyingChairs(root, split) for split in ("train", "val")]
    elif kind == "kitti":
        sets = [torchvision.datasets.KittiFlow(root)]
    else:
        sets = [read_middlebury(root)]
    examples = []
    for frame1, frame2, flow, *valid in (example for part in sets for example in (part[i] for i in range(len(part)))):
        frames = torch.stack([torch.tensor(np.array(frame) / 127.5 - 1, dtype=torch.float32).movedim(-1, 0)
                              for frame in (frame1, frame2)])
        valid = torch.tensor(valid[0] if valid else np.ones(WHOLE, bool))
        flow = torch.tensor(flow).movedim(0, -1) * valid[..., None]
        examples.append({"frames": frames, "flow": flow, "valid": valid})
    return examples


def find(example: dict, wholes: list[dict]) -> tuple[int, int, int] | None:
    """The number of the whole example that contains `example` as a crop, and the top and left of the crop."""
    for n, other in enumerate(wholes):
        first = (other["frames"][0] - example["frames"][0, :, :1, :1]).abs().amax(0) < 1e-6
        for top, left in first.nonzero().tolist():
            box = slice(top, top + SHAPE[0]), slice(left, left + SHAPE[1])
            if other["flow"][box].equal(example["flow"]) and other["valid"][box].equal(example["valid"]):
                torch.testing.assert_close(example["frames"], other["frames"][:, :, *box])
                return n, top, left
    return None


def test_files_are_read_as_torchvision_reads_them(dataset):
    train, val = load_flow(dataset, SHAPE, seed=0)
    wholes = whole(dataset)
    number = {"sintel": (36, 4), "chairs": (4, 2), "kitti": (10, 1), "middlebury": (5, 3)}[dataset.dataset]
    assert (len(train.examples), len(val)) == number and sum(number) == len(wholes)
    steps = -(-number[0] // 4)
    found = [find(train[(n // 4, n % 4)], wholes) for n in range(4 * steps)]
    assert len({n for n, _, _ in found}) == number[0]  # an epoch has each pair once
    dataset.num_image_queries = 7
    some = load_flow(dataset, SHAPE, seed=0)[0][(0, 0)]
    assert torch.equal(some["frames"], train[(0, 0)]["frames"]) and len(some["positions"].unique()) == 7
    assert torch.equal(some["flow"], train[(0, 0)]["flow"].flatten(0, 1)[some["positions"]])
    assert torch.equal(some["valid"], train[(0, 0)]["valid"].flatten()[some["positions"]])
    assert len({place[1:] for place in found}) > 2
    held_out = [find(val[n], wholes) for n in range(len(val))]
    assert {place[1:] for place in held_out} == {(3, 4)}  # the center
    assert not {n for n, _, _ in held_out} & {n for n, _, _ in found}


def test_whole_images_for_validation(tmp_path):
    sintel(tmp_path / "Sintel")
    config = FlowDataConfig(dataset="sintel", path=str(tmp_path), sintel_pass="final", eval_whole=True)
    val = load_flow(config, SHAPE, seed=0)[1]
    wholes = torchvision.datasets.Sintel(tmp_path, pass_name="final")
    flows = {wholes[n][2].tobytes() for n in range(len(wholes))}
    assert len(val) == 2 and len(wholes) == 20
    assert all(val[n]["flow"].movedim(-1, 0).contiguous().numpy().tobytes() in flows for n in range(2))
    assert val[0]["frames"].shape == (2, 3, *WHOLE)


def test_frames_of_several_sizes(tmp_path):
    """Training pads small frames. Validation crops whole frames to the smallest height and width."""
    small, wide = (16, 40), (22, 60)
    middlebury(tmp_path / "other-data", dict(a=small, b=wide, c=small, d=small, e=WHOLE, f=small, g=small, h=WHOLE))
    config = FlowDataConfig(dataset="middlebury", path=str(tmp_path), batch_size=5, eval_whole=True)
    train, val = load_flow(config, SHAPE, seed=0)
    assert [val[n]["frames"].shape[2:] for n in range(3)] == 3 * [(22, 35)]
    for n in range(5):
        example = train[(0, n)]
        assert example["frames"].shape == (2, 3, *SHAPE) and example["flow"].shape == (*SHAPE, 2)
        assert example["valid"].sum() in [16 * 28 - unknown for unknown in range(3)]
        assert not example["flow"][~example["valid"]].any()


def test_unknown_flow_is_zero(tmp_path):
    flow = torch.tensor([[1.5, -2.0], [1666666752.0, 0.0], [3.0, float("nan")], [-1e10, 1.0]]).view(2, 2, 2)
    write_flo(tmp_path / "a.flo", flow)
    *flow, valid = read_flow(tmp_path / "a.flo")
    assert valid.tolist() == [[1, 0], [0, 0]]
    assert torch.stack(flow, -1).tolist() == [[[1.5, -2.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]


def test_flips_change_the_flow_too(tmp_path):
    """Flipped back, frames and flow are a crop of those in the file."""
    chairs(tmp_path / "FlyingChairs")
    config = FlowDataConfig(dataset="chairs", path=str(tmp_path), batch_size=4, flip=True)
    train, wholes, seen = load_flow(config, SHAPE, seed=0)[0], whole(config), []
    for n in range(48):
        example = train[(n // 4, n % 4)]
        for right, down in product((False, True), (False, True)):
            axes = [axis for axis, on in ((1, right), (0, down)) if on]
            back = {"frames": example["frames"].flip([axis + 2 for axis in axes]), "valid": example["valid"].flip(axes),
                    "flow": example["flow"].flip(axes) * torch.tensor([-1.0 if right else 1.0, -1.0 if down else 1.0])}
            if find(back, wholes):
                seen.append((right, down))
    assert len(seen) == 48
    assert 14 <= sum(right for right, _ in seen) <= 34 and 1 <= sum(down for _, down in seen) <= 12


def test_flo_files_have_middleburys_format(tmp_path):
    flow = torch.arange(24.0).reshape(3, 4, 2)
    write_flo(tmp_path / "a.flo", flow)
    assert (tmp_path / "a.flo").read_bytes() == struct.pack("<fii24f", 202021.25, 4, 3, *range(24))


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


def error_of(function, *args) -> str:
    with pytest.raises(UserError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_folders_without_the_dataset(dataset, tmp_path):
    for folder in tmp_path.iterdir():
        folder.rename(tmp_path / f"{folder.name}-elsewhere")
    place = {"middlebury": "other-gt-flow"}.get(dataset.dataset, FOLDERS[dataset.dataset])
    assert f"data.path={tmp_path} holds 0 files {place}/" in error_of(load_flow, dataset, SHAPE, 0)
    (tmp_path / place).mkdir()
    assert f"data.path={tmp_path} holds 0 files {place}/" in error_of(load_flow, dataset, SHAPE, 0)


def test_broken_files_are_named(dataset):
    root, rng = Path(dataset.path), np.random.default_rng(0)
    first, second, flow = {
        "sintel": [f"training/{name}" for name in ("clean/e/frame_0001.png", "clean/e/frame_0002.png",
                                                   "flow/e/frame_0001.flo")],
        "chairs": ["data/00003_img1.ppm", "data/00003_img2.ppm", "data/00003_flow.flo"],
        "kitti": ["training/image_2/000005_10.png", "training/image_2/000005_11.png",
                  "training/flow_occ/000005_10.png"],
        "middlebury": ["b/frame10.png", "b/frame11.png", "../other-gt-flow/b/flow10.flo"]}[dataset.dataset]
    first, second, flow = ((root / FOLDERS[dataset.dataset] / name).resolve() for name in (first, second, flow))
    val = load_flow(dataset, SHAPE, 0)[1].examples
    for file in (first, second, flow):
        content = file.read_bytes()
        for broken in (b"", b"rubbish", content[: len(content) // 2]):
            file.write_bytes(broken)
            assert error_of(val.__getitem__, 0).startswith(f"cannot read {file}: ")
        file.unlink()
        assert "No such file or directory" in error_of(val.__getitem__, 0)
        file.write_bytes(content)
    write_frame(first, rng, (26, 34))
    assert f"{second} is 35x26, {first} is 34x26; frames and flow must have the same" in error_of(val.__getitem__, 0)
    write_frame(first, rng)
    if dataset.dataset != "kitti":
        write_flow(flow, rng, (25, 35))
        assert f"{flow} is 35x25, {first} is 35x26" in error_of(val.__getitem__, 0)


def test_splits_that_do_not_fit(tmp_path):
    chairs(tmp_path / "FlyingChairs")
    split = tmp_path / "FlyingChairs" / "FlyingChairs_train_val.txt"
    config = FlowDataConfig(dataset="chairs", path=str(tmp_path))
    split.write_text("1\n" * 5)
    message = f"{split} must have a line for each of 6 pairs: 1 for training, 2 for validation"
    assert error_of(load_flow, config, SHAPE, 0) == message
    split.write_text("1\n" * 6)
    assert error_of(load_flow, config, SHAPE, 0) == message
    split.unlink()
    assert f"cannot read {split}: No such file" in error_of(load_flow, config, SHAPE, 0)


@pytest.mark.parametrize("change, message", [
    (dict(dataset="autoflow"), "dataset='autoflow' must be one of generated, sintel, chairs, kitti, middlebury"),
    (dict(dataset="kitti"), "path=None"), (dict(max_motion=0.0), "max_motion=0.0"), (dict(val_size=0), "val_size=0"),
    (dict(sintel_pass="albedo"), "sintel_pass='albedo' must be one of clean, final, both"),
    (dict(num_image_queries=0), "num_image_queries=0")])
def test_mistakes_in_the_data_config(change, message):
    with pytest.raises(UserError, match=message):
        build(FlowDataConfig, change)


# ----------------------------------------------------------------------------------------------------------------------
# The task


def new_task(**data) -> OpticalFlow:
    model = {"num_latents": 6, "num_latent_channels": 16, "encoder": {"num_cross_attention_heads": 1},
             "decoder": {"num_cross_attention_heads": 1}, "input": {"frame_shape": TILE}}
    return OpticalFlow(from_dict({"task": "optical_flow", "model": model, "data": data}, TASKS))


def batch_of(size: tuple[int, int]) -> dict[str, torch.Tensor]:
    return {"frames": torch.randn(3, 2, 3, *size), "flow": torch.randn(3, *size, 2),
            "valid": torch.rand(3, *size) < 0.6}


@pytest.mark.parametrize("size", [TILE, (30, 61)])
def test_the_loss_is_the_distance_over_known_pixels(size):
    """This also holds for images that are larger than a tile."""
    task, batch = new_task(), batch_of(size)
    metrics = task.metrics({name: value.item() for name, value in task.loss(Fake(), batch).items()})
    predicted = torch.stack([compute_flow(Fake(), frames, TILE) for frames in batch["frames"]])
    distances = (predicted - batch["flow"]).square().sum(-1).sqrt()[batch["valid"]]
    assert metrics["loss"] == metrics["epe"] == pytest.approx(distances.mean().item(), rel=1e-5)
    lengths = batch["flow"].square().sum(-1).sqrt()[batch["valid"]]
    assert metrics["epe_zero_flow"] == pytest.approx(lengths.mean().item(), rel=1e-5)


def test_random_pixels_are_a_part_of_all_pixels():
    whole, part = (new_task(num_image_queries=pixels).load_data()[0][(3, 1)] for pixels in (None, 50))
    assert torch.equal(whole["frames"], part["frames"])
    assert len(part["positions"].unique()) == 50 and part["valid"].shape == (50,)
    assert torch.equal(part["flow"], whole["flow"].flatten(0, 1)[part["positions"]])
    model, task = small_model(), new_task()
    sums = task.loss(model, {name: values[None] for name, values in part.items()})
    error = (model(whole["frames"][None])[0] - whole["flow"]).norm(dim=-1).flatten()[part["positions"]]
    assert task.load_data() and task.data_note.startswith("generated frames; objects shift by at most 4.0")
    assert sums["count"] == 50 and sums["loss"].item() == pytest.approx(error.sum().item(), rel=1e-4)


def test_flow_is_learned(tmp_path):
    """400 of the recipe's 6000 steps lower the error. docs/show.py writes a picture of the run."""
    run, ckpt = tmp_path / "run", tmp_path / "run" / "checkpoints" / "best.pt"
    result = run_script("train.py", "configs/flow.yaml", f"train.out_dir={run}", "train.max_steps=400",
                        "train.eval_every=400", "optim.warmup_steps=30", "data.val_size=64", "data.num_workers=0")
    assert result.returncode == 0, result.stderr
    last = read_metrics(run, "val")[-1]
    assert last["epe"] < 0.85 * last["epe_zero_flow"]
    assert (f"an end-point error of {last['epe']:.3f} pixels; zero flow would give {last['epe_zero_flow']:.3f}"
            in result.stdout)
    assert run_script("docs/show.py", ckpt, "flow", tmp_path / "flow.png").returncode == 0
    with Image.open(tmp_path / "flow.png") as picture:  # enlarged frames in four rows and three columns
        assert picture.width > 3 * 160 and picture.height > 4 * 120


@torch.inference_mode()
def test_the_errors_of_real_pairs_are_measured_scene_by_scene(tmp_path):
    """benchmarks/flow_pairs.py. Here the scenes have several sizes, and some pixels of unknown flow."""
    wide = (30, 60)
    middlebury(tmp_path / "other-data", dict(a=WHOLE, b=WHOLE, c=wide, d=WHOLE, e=wide))
    ckpt, model = new_checkpoint(tmp_path / "flow.pt", "optical_flow", None, {
        "decoder": {"num_cross_attention_heads": 1}, "coarse_to_fine": True,
        "input": {"frame_shape": [12, 16], "num_feature_channels": 8, "num_frequency_bands": 2}})
    result = run_script("benchmarks/flow_pairs.py", ckpt, tmp_path, "--picture", tmp_path / "flow.png")
    assert result.returncode == 0, result.stderr
    rows = {cells[0]: [float(cell) for cell in cells[1:3]] for cells in re.findall(
        r"^\| (.+?) \| ([\d.]+) \| ([\d.]+) \|", result.stdout, re.MULTILINE)}
    for scene in "abcde":
        pair = [read_frame(tmp_path / f"other-data/{scene}/frame{n}.png") for n in (10, 11)]
        *true, valid = read_flow(tmp_path / f"other-gt-flow/{scene}/flow10.flo")
        true, known = torch.stack(true, -1), valid > 0
        assert known.logical_not().sum() == 2
        error = (coarse_to_fine(model, torch.stack(pair), (12, 16)) - true).square().sum(-1).sqrt()
        still = true.square().sum(-1).sqrt()
        assert rows[scene] == pytest.approx([error[known].mean().item(), still[known].mean().item()], abs=6e-4)
    val = load_flow(FlowDataConfig(dataset="middlebury", path=str(tmp_path)), SHAPE, seed=0)[1]
    held_out = sorted(first.parent.name for first, *_ in val.pairs)
    others = sorted(set("abcde") - set(held_out))
    names = [*others, f"mean of {len(others)} other scenes", *held_out, f"mean of {len(held_out)} held-out scenes"]
    assert list(rows) == names
    for title, scenes in ((names[len(others)], others), (names[-1], held_out)):
        assert rows[title] == pytest.approx(np.mean([rows[scene] for scene in scenes], axis=0), abs=1e-3)
    assert Image.open(tmp_path / "flow.png").width > 3 * 240


# ----------------------------------------------------------------------------------------------------------------------
# predict.py

FLOW = GOLDEN / "optical-flow"  # its frames have 56x40 pixels


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """A folder of three frames of 70x48 pixels: crops of a smooth image that move from frame to frame."""
    folder = tmp_path_factory.mktemp("frames")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (10, 14, 3), np.uint8)).resize((80, 60), 3)
    for n in range(3):
        image.crop((n, 2 * n, n + 70, 2 * n + 48)).save(folder / f"{n}.png")
    (folder / "notes.txt").write_text("not a frame")
    return folder


@torch.inference_mode()
def flow_of(model, frames, numbers, tile):
    pair = [torch.from_numpy(np.array(Image.open(frames / f"{n}.png"))).movedim(-1, 0) / 127.5 - 1 for n in numbers]
    return compute_flow(model, torch.stack(pair), tile)


def picture(file):
    return torch.from_numpy(np.array(Image.open(file))).movedim(-1, 0)


@pytest.mark.parametrize("variant", ["deepmind", "transformers"])
def test_flow_between_images(frames, predict, tmp_path, variant):
    result = predict(FLOW, *(frames / f"{n}.png" for n in (2, 0, 1)), "--variant", variant)
    assert result.code == 0 and result.out == "" and "3/3" in result.err
    assert all(f"wrote predictions/{n}-flow.{kind}" in result.err for n in (2, 0) for kind in ("flo", "png"))
    model = from_pretrained(FLOW, variant)
    for numbers in ((2, 0), (0, 1)):
        expected = flow_of(model, frames, numbers, (40, 56))
        data = (tmp_path / "predictions" / f"{numbers[0]}-flow.flo").read_bytes()
        flow = torch.frombuffer(bytearray(data[12:]), dtype=torch.float32).view(48, 70, 2)
        torch.testing.assert_close(flow, expected)
        assert flow.std() > 0.05
        assert f"{numbers[0]}: the longest motion is {flow.norm(dim=-1).max():.1f} pixels" in result.err
        assert torch.equal(picture(tmp_path / "predictions" / f"{numbers[0]}-flow.png"),
                           flow_to_image(flow.movedim(-1, 0)))


def test_flow_of_folders_and_videos_by_our_checkpoints(frames, predict, tmp_path):
    ckpt, model = new_checkpoint(tmp_path / "flow.pt", "optical_flow", None, {
        "decoder": {"num_cross_attention_heads": 1, "cross_attention_residual": False},
        "input": {"frame_shape": [40, 60], "num_feature_channels": 8, "num_frequency_bands": 2}})
    assert predict(ckpt, frames, "--out", "a").code == 0
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["0-flow.png", "1-flow.png"]
    assert torch.equal(picture(tmp_path / "a" / "1-flow.png"),
                       flow_to_image(flow_of(model, frames, (1, 2), (40, 60)).movedim(-1, 0)))

    video = torch.stack([picture(frames / f"{n}.png") for n in range(3)])
    write_video(tmp_path / "clip.mp4", video, Fraction(25))
    result = predict(ckpt, tmp_path / "clip.mp4", "--out", "b")
    assert result.code == 0 and "3/3" in result.err
    names = ["clip-00001-flow.png", "clip-00002-flow.png"]
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == names
    assert picture(tmp_path / "b" / names[1]).shape == (3, 48, 70)


def test_mistakes_in_frames_are_one_line_and_exit_code_2(frames, predict, tmp_path):
    Image.new("RGB", (70, 47)).save(tmp_path / "other.png")
    (tmp_path / "cut.png").write_bytes((frames / "0.png").read_bytes()[:900])
    (tmp_path / "empty").mkdir()
    write_video(tmp_path / "still.mp4", torch.zeros(1, 3, 48, 70, dtype=torch.uint8), Fraction(25))
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    assert fails(predict(FLOW, frames / "0.png"), "two frames or more", "0.png has only one")
    assert fails(predict(FLOW, tmp_path / "empty"), "empty holds no images")
    assert fails(predict(FLOW, frames / "0.png", frames / "1.png", "--attention"), "--attention")
    for inputs, message in (
            ([frames / "0.png", tmp_path / "other.png"], "other is 70x47, 0 is 70x48"),
            ([frames / "0.png", tmp_path / "cut.png"], "cannot read .*cut.png"),
            ([frames / "0.png", tmp_path / "nowhere.png"], "cannot read .*nowhere.png: No such"),
            ([tmp_path / "still.mp4"], "two frames or more; .*still.mp4 has only one"),
            ([tmp_path / "broken.mp4"], "cannot read .*broken.mp4")):
        result = predict(FLOW, *inputs)
        assert result.code == 2 and re.search(f"^error: .*{message}.*$", result.err.replace("\r", "\n"), re.MULTILINE)
        assert "Traceback" not in result.err
