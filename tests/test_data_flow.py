"""Pairs of frames with flow: generated ones are exact, files are read as torchvision reads them."""
import struct
import zlib
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

from perceiver.data import FlowDataConfig, load_flow, write_flo
from perceiver.data.flow import FOLDERS, draw_pair
from perceiver.errors import UserError

SHAPE = (20, 28)  # of what the model is given
WHOLE = (26, 35)  # of the files' frames

# ----------------------------------------------------------------------------------------------------------------------
# Generated


def test_the_second_frame_moved_back_by_the_flow_is_the_first():
    """Where the same thing is seen in both, and all around it in the second, between whose pixels this interpolates."""
    compared, moved = 0, 0.0
    for seed in range(20):
        frames, flow, layers = draw_pair(np.random.default_rng(seed), (48, 64), max_motion=4.0)
        rows, columns = torch.meshgrid(torch.arange(48), torch.arange(64), indexing="ij")
        x, y = columns + flow[..., 0], rows + flow[..., 1]
        grid = torch.stack((x / 63, y / 47), -1)[None] * 2 - 1
        back = F.grid_sample(frames[1:], grid, align_corners=True)[0]
        inside = (x >= 0) & (x <= 62) & (y >= 0) & (y <= 46)
        same = inside.clone()
        for right, down in product((0, 1), (0, 1)):
            there = layers[1, (y.long() + down).clamp(0, 47), (x.long() + right).clamp(0, 63)]
            same &= there == layers[0]
        assert same.sum() > 0.6 * inside.sum()
        error, unmoved = (back - frames[0]).abs()[:, same], (frames[1] - frames[0]).abs()[:, same]
        assert error.mean() < 0.03 and error.mean() < 0.2 * unmoved.mean()
        compared, moved = compared + same.sum(), moved + flow.norm(dim=-1).mean() / 20
    assert compared > 20_000 and 1.5 < moved < 4.5


def test_generated_examples_depend_on_the_key_alone():
    config = FlowDataConfig(val_examples=3)
    (train, val), (again, _) = load_flow(config, SHAPE, seed=1), load_flow(config, SHAPE, seed=1)
    example, others = train[(5, 2)], [again[(5, 3)], again[(6, 2)], load_flow(config, SHAPE, 2)[0][(5, 2)], val[0]]
    for name, size in (("frames", (2, 3, *SHAPE)), ("flow", (*SHAPE, 2)), ("valid", SHAPE)):
        assert example[name].shape == size and torch.equal(example[name], again[(5, 2)][name])
    assert not any(torch.equal(example["frames"], other["frames"]) for other in others)
    assert len(val) == 3 and torch.equal(val[2]["flow"], load_flow(config, SHAPE, 2)[1][2]["flow"])
    assert example["frames"].abs().max() <= 1 and example["valid"].all()


# ----------------------------------------------------------------------------------------------------------------------
# Files, in the datasets' own formats


def write_frame(file: Path, rng: np.random.Generator, size: tuple[int, int] = WHOLE):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file)


def write_flow(file: Path, rng: np.random.Generator, size: tuple[int, int] = WHOLE):
    file.parent.mkdir(parents=True, exist_ok=True)
    write_flo(file, torch.from_numpy(rng.normal(0, 5, (*size, 2))).float())


def write_kitti(file: Path, rng: np.random.Generator):
    """A PNG of 16 bits in 3 channels, which PIL can't write."""
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


WRITE = {"sintel": sintel, "chairs": chairs, "kitti": kitti}


@pytest.fixture(params=WRITE)
def dataset(request, tmp_path) -> FlowDataConfig:
    WRITE[request.param](tmp_path / FOLDERS[request.param])
    return FlowDataConfig(dataset=request.param, path=str(tmp_path), batch_size=4)


def whole(dataset: FlowDataConfig) -> list[dict]:
    """All examples as torchvision reads them, frames in [-1, 1]."""
    root, kind = Path(dataset.path), dataset.dataset
    if kind == "sintel":
        sets = [torchvision.datasets.Sintel(root, pass_name="both")]
    elif kind == "chairs":
        sets = [torchvision.datasets.FlyingChairs(root, split) for split in ("train", "val")]
    else:
        sets = [torchvision.datasets.KittiFlow(root)]
    examples = []
    for frame1, frame2, flow, *valid in (example for part in sets for example in (part[i] for i in range(len(part)))):
        frames = torch.stack([torch.tensor(np.array(frame) / 127.5 - 1, dtype=torch.float32).movedim(-1, 0)
                              for frame in (frame1, frame2)])
        valid = torch.tensor(valid[0] if valid else np.ones(WHOLE, bool))
        flow = torch.tensor(flow).movedim(0, -1) * valid[..., None]
        examples.append({"frames": frames, "flow": flow, "valid": valid})
    return examples


def find(example: dict, wholes: list[dict]) -> tuple[int, int, int] | None:
    """Which of the whole examples it is a piece of, and where."""
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
    number = {"sintel": (32, 8), "chairs": (4, 2), "kitti": (9, 2)}[dataset.dataset]
    assert (len(train.examples), len(val)) == number and sum(number) == len(wholes)
    steps = -(-number[0] // 4)
    found = [find(train[(n // 4, n % 4)], wholes) for n in range(4 * steps)]
    assert len({n for n, _, _ in found}) == number[0]  # an epoch has each once
    dataset.train_pixels = 7
    some = load_flow(dataset, SHAPE, seed=0)[0][(0, 0)]
    assert torch.equal(some["frames"], train[(0, 0)]["frames"]) and len(some["positions"].unique()) == 7
    assert torch.equal(some["flow"], train[(0, 0)]["flow"].flatten(0, 1)[some["positions"]])
    assert torch.equal(some["valid"], train[(0, 0)]["valid"].flatten()[some["positions"]])
    assert len({place[1:] for place in found}) > 2
    held_out = [find(val[n], wholes) for n in range(len(val))]
    assert {place[1:] for place in held_out} == {(3, 4)}  # the centre
    assert not {n for n, _, _ in held_out} & {n for n, _, _ in found}


def test_whole_images_for_validation(tmp_path):
    sintel(tmp_path / "Sintel")
    config = FlowDataConfig(dataset="sintel", path=str(tmp_path), sintel_pass="final", eval_whole=True)
    val = load_flow(config, SHAPE, seed=0)[1]
    wholes = torchvision.datasets.Sintel(tmp_path, pass_name="final")
    flows = {wholes[n][2].tobytes() for n in range(len(wholes))}
    assert len(val) == 4 and len(wholes) == 20
    assert all(val[n]["flow"].movedim(-1, 0).contiguous().numpy().tobytes() in flows for n in range(4))
    assert val[0]["frames"].shape == (2, 3, *WHOLE)


def test_flips_turn_the_flow_too(tmp_path):
    """Flipped back, frames and flow are a piece of the file's again."""
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


def test_flo_files_are_written_as_the_format_has_it(tmp_path):
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
    folder = tmp_path / FOLDERS[dataset.dataset]
    folder.rename(tmp_path / "elsewhere")
    assert f"there is no {folder}; data.path must be" in error_of(load_flow, dataset, SHAPE, 0)
    folder.mkdir()
    assert f"cannot read {folder}: " in error_of(load_flow, dataset, SHAPE, 0)


def test_broken_files_are_named(dataset):
    root, rng = Path(dataset.path) / FOLDERS[dataset.dataset], np.random.default_rng(0)
    frame, flow = {
        "sintel": ("training/clean/a/frame_0001.png", "training/flow/a/frame_0001.flo"),
        "chairs": ("data/00003_img1.ppm", "data/00003_flow.flo"),
        "kitti": ("training/image_2/000000_10.png", "training/flow_occ/000000_10.png")}[dataset.dataset]
    frame, flow = root / frame, root / flow
    val = load_flow(dataset, SHAPE, 0)[1]
    for file in (frame, flow):
        content = file.read_bytes()
        for broken in (b"", b"rubbish", content[: len(content) // 2]):
            file.write_bytes(broken)
            assert error_of(val.__getitem__, 0).startswith(f"cannot read {frame}, the frame after it or their flow: ")
        file.unlink()
        assert "No such file or directory" in error_of(val.__getitem__, 0)
        file.write_bytes(content)
    write_frame(frame, rng, (26, 34))
    assert f"35x26, {frame} 34x26; frames must be of one size" in error_of(val.__getitem__, 0)
    write_frame(frame, rng)
    assert "smaller than model.input.frame_shape, 40x20" in error_of(load_flow(dataset, (20, 40), 0)[1].__getitem__, 0)
    if dataset.dataset != "kitti":
        write_flow(flow, rng, (25, 35))
        assert f"the flow of {frame} is 35x25, the frame 35x26" in error_of(val.__getitem__, 0)


def test_splits_that_do_not_fit(tmp_path):
    chairs(tmp_path / "FlyingChairs")
    split = tmp_path / "FlyingChairs" / "FlyingChairs_train_val.txt"
    config = FlowDataConfig(dataset="chairs", path=str(tmp_path))
    split.write_text("1\n" * 5)
    assert f"cannot read {split.parent}: " in error_of(load_flow, config, SHAPE, 0)
    split.write_text("1\n" * 6)
    assert "too few examples" in error_of(load_flow, config, SHAPE, 0)
    split.unlink()
    assert "FlyingChairs_train_val.txt file was not found" in error_of(load_flow, config, SHAPE, 0)


@pytest.mark.parametrize("change, message", [
    (dict(dataset="middlebury"), "dataset='middlebury' must be one of generated, sintel, chairs, kitti"),
    (dict(dataset="kitti"), "path=None"), (dict(max_motion=0.0), "max_motion=0.0"), (dict(val_examples=0), "val_ex"),
    (dict(sintel_pass="albedo"), "sintel_pass='albedo' must be clean, final or both"),
    (dict(train_pixels=0), "train_pixels=0"), (dict(dataset="kitti", path="a", eval_whole=True), "eval_whole=True")])
def test_mistakes_in_the_config(change, message):
    with pytest.raises(ValueError, match=message):
        FlowDataConfig(**change)
