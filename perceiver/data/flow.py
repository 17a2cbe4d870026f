"""Optical flow: pairs of frames and how far each pixel of the first moves. Generated, Sintel, FlyingChairs, KITTI."""
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms.v2 import functional as TF

from perceiver.config import require
from perceiver.data.batches import LoaderConfig, Shuffled
from perceiver.data.image import read_image, reading
from perceiver.errors import UserError

FOLDERS = {"sintel": "Sintel", "chairs": "FlyingChairs", "kitti": "KittiFlow"}  # as torchvision calls them


@dataclass
class FlowDataConfig(LoaderConfig):
    dataset: str = "generated"  # generated, sintel, chairs (FlyingChairs) or kitti (KITTI flow 2015)
    path: str | None = None  # folder that holds Sintel, FlyingChairs or KittiFlow, as torchvision wants it
    max_motion: float = 4.0  # of generated: how far a thing moves at most, in pixels, right or left, and up or down
    val_examples: int = 256  # of generated: pairs to validate on
    sintel_pass: str = "both"  # of sintel: clean, final (with blur and fog), or both
    flip: bool = False  # training: left and right exchanged in half of the examples, top and bottom in a tenth
    train_pixels: int | None = None  # training: how many pixels of an example, at random, are asked for; null: all
    eval_whole: bool = False  # validation: whole images, in tiles; else their centres

    def __post_init__(self):
        super().__post_init__()
        require(self.dataset in ("generated", *FOLDERS),
                f"dataset={self.dataset!r} must be one of generated, {', '.join(FOLDERS)}")
        require(self.path is not None or self.dataset == "generated",
                f"path=None must name the folder of {self.dataset}")
        require(self.max_motion > 0, f"max_motion={self.max_motion} must be positive")
        require(self.train_pixels is None or self.train_pixels >= 1,
                f"train_pixels={self.train_pixels} must be at least 1, or null")
        require(self.val_examples >= 1, f"val_examples={self.val_examples} must be at least 1")
        require(self.sintel_pass in ("clean", "final", "both"),
                f"sintel_pass={self.sintel_pass!r} must be clean, final or both")
        require(self.dataset in ("sintel", "chairs") or not self.eval_whole,
                f"eval_whole={self.eval_whole} is for images of one size: sintel's, chairs'")
        require(self.dataset != "generated" or not self.flip, f"flip={self.flip} is not for generated pairs")


def load_flow(config: FlowDataConfig, frame_shape: tuple[int, ...], seed: int) -> tuple[Dataset, Dataset]:
    """Pairs of frames for training, by key (step, index in the global batch), and for validation.

    Each is a dict: frames (2, 3, H, W) in [-1, 1], flow (H, W, 2) in pixels, right and down, of the first frame, and
    valid (H, W), true where it is known; with `train_pixels`, flow (O', 2) and valid (O',) at positions (O',). Raises
    UserError if they are not there.
    """
    if config.dataset == "generated":
        return (GeneratedFlow(frame_shape, config.max_motion, (seed,), train_pixels=config.train_pixels),
                GeneratedFlow(frame_shape, config.max_motion, (2**63,), config.val_examples))  # no seed is that large
    (train_set, train), (val_set, val) = open_dataset(config)
    if not train or not val:
        raise UserError(f"data.path={config.path} holds too few examples of {config.dataset} to train and validate")
    examples = FlowFiles(train_set, train, frame_shape, True, config.flip, config.train_pixels)
    val_shape = None if config.eval_whole else frame_shape
    return Shuffled(examples, config.batch_size, seed), FlowFiles(val_set, val, val_shape)


def only_at(example: dict[str, Tensor], positions: Tensor) -> dict[str, Tensor]:
    """Of the flow what there is at `positions` (O'), numbers of pixels."""
    return {"frames": example["frames"], "positions": positions, "flow": example["flow"].flatten(0, 1)[positions],
            "valid": example["valid"].flatten()[positions]}


# ----------------------------------------------------------------------------------------------------------------------
# Generated


class GeneratedFlow(Dataset):
    """Textured things that move over a textured background, drawn anew for each key."""

    def __init__(self, frame_shape: tuple[int, ...], max_motion: float, seed: tuple[int, ...], num_examples: int = 0,
                 train_pixels: int | None = None):
        self.frame_shape, self.max_motion, self.train_pixels = frame_shape, max_motion, train_pixels
        self.seed, self.num_examples = seed, num_examples

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Tensor]:
        rng = np.random.default_rng((*self.seed, *np.atleast_1d(key)))
        frames, flow, _ = draw_pair(rng, self.frame_shape, self.max_motion)
        example = {"frames": frames, "flow": flow, "valid": torch.ones(self.frame_shape, dtype=torch.bool)}
        if self.train_pixels is None:
            return example
        return only_at(example, torch.from_numpy(rng.permutation(flow[..., 0].numel())[: self.train_pixels]))


def draw_pair(rng: np.random.Generator, frame_shape: tuple[int, ...], max_motion: float,
              ) -> tuple[Tensor, Tensor, Tensor]:
    """Two frames (2, 3, H, W), the flow (H, W, 2), and which layer is seen where, (2, H, W).

    A layer is a function of the plane, a texture and a shape, as it is in the first frame. An affine motion moves it: a
    pixel of the second frame shows what the inverse motion finds in the first one's plane. So the flow is exact.
    """
    height, width = frame_shape
    size = torch.tensor([width, height])
    pixels = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"), -1)  # (H, W, 2)
    for layer in range(rng.integers(2, 5)):  # the background, and one to three things
        centre = torch.from_numpy(rng.uniform(0.1, 0.9, 2)).float() * size
        angle, zoom = rng.uniform(-0.1, 0.1), rng.uniform(0.95, 1.05)
        turn = zoom * torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]).float()
        shift = torch.from_numpy(rng.uniform(-max_motion, max_motion, 2)).float()
        moved = (pixels - centre) @ turn.T + centre + shift  # where the layer's points are in the second frame
        came = (pixels - centre - shift) @ turn.inverse().T + centre  # and where what is there was in the first one
        points = torch.stack((pixels, came))  # (2, H, W, 2)
        texture = torch.from_numpy(rng.normal(size=(3, height // 3, width // 3))).float()  # 3 pixels to a new colour
        colours = F.grid_sample(texture.expand(2, -1, -1, -1), 2 * points / size - 1, "bilinear", "reflection",
                                align_corners=False).tanh()  # (2, 3, H, W)
        if layer == 0:
            frames, flow, layers = colours, moved - pixels, torch.zeros(2, height, width, dtype=torch.long)
            continue
        radii = torch.from_numpy(rng.uniform(0.15, 0.35, 2)).float() * size
        seen = ((points - centre) / radii).abs().pow(rng.choice([2, 8])).sum(-1) < 1  # an ellipse, or nearly a box
        frames = torch.where(seen[:, None], colours, frames)
        flow = torch.where(seen[0, ..., None], moved - pixels, flow)
        layers = layers.masked_fill(seen, layer)
    return frames, flow, layers


# ----------------------------------------------------------------------------------------------------------------------
# Files


def open_dataset(config: FlowDataConfig) -> tuple[tuple[datasets.VisionDataset, list[int]], ...]:
    """For training and for validation: torchvision's dataset, and numbers of its examples in the order of file names.

    FlyingChairs comes with a split. Of the others, whose test sets come without flow, every eighth scene (Sintel) and
    every tenth pair (KITTI) is for validation. Raises UserError if the files are not there.
    """
    folder = Path(config.path) / FOLDERS[config.dataset]
    if not folder.is_dir():
        raise UserError(f"there is no {folder}; data.path must be the folder that holds {folder.name}")
    with reading(folder):
        if config.dataset == "chairs":
            parts = [datasets.FlyingChairs(config.path, part) for part in ("train", "val")]
            return tuple([(part, list(range(len(part)))) for part in parts])
        if config.dataset == "sintel":
            dataset, every = datasets.Sintel(config.path, pass_name=config.sintel_pass), 8
            units = [Path(file).parent.name for file, _ in dataset._image_list]
        else:
            dataset, every = datasets.KittiFlow(config.path), 10
            units = [file for file, _ in dataset._image_list]
    held_out = set(sorted(set(units))[::every])
    numbers = sorted(range(len(dataset)), key=lambda number: dataset._image_list[number])  # not as the disk lists them
    return tuple([(dataset, [number for number in numbers if (units[number] in held_out) == part])
                  for part in (False, True)])


class FlowFiles(Dataset):
    """Examples of a dataset of torchvision, by number there, cropped to `frame_shape` if that is given: training at
    random, else the centre."""

    def __init__(self, dataset: datasets.VisionDataset, numbers: list[int], frame_shape: tuple[int, ...] | None,
                 train: bool = False, flip: bool = False, train_pixels: int | None = None):
        self.dataset, self.numbers, self.frame_shape = dataset, numbers, frame_shape
        self.train, self.flip, self.train_pixels = train, flip, train_pixels

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number = self.numbers[index]
        file = self.dataset._image_list[number][0]
        with reading(f"{file}, the frame after it or their flow"):
            first, second, flow, *valid = self.dataset[number]
        pictures = [TF.pil_to_tensor(frame) for frame in (first, second)]
        frames = stack_frames([file, "the frame after it"], pictures)  # (2, 3, H, W)
        flow = torch.from_numpy(flow).movedim(0, -1)  # (H, W, 2)
        valid = torch.from_numpy(valid[0]) if valid else torch.ones(flow.shape[:2], dtype=torch.bool)
        flow = flow.where(valid[..., None], 0.0)
        if flow.shape[:2] != frames.shape[2:]:
            raise UserError(f"the flow of {file} is {size_of(flow.shape)}, the frame {size_of(frames.shape[2:])}")
        (height, width), (h, w) = flow.shape[:2], self.frame_shape or flow.shape[:2]
        if height < h or width < w:
            raise UserError(f"{file} is {size_of(flow.shape)}, smaller than model.input.frame_shape, "
                            f"{size_of(self.frame_shape)}")
        room = (height - h + 1, width - w + 1)
        top, left = (int(torch.randint(n, ())) if self.train else n // 2 for n in room)
        box = slice(top, top + h), slice(left, left + w)
        frames, flow, valid = frames[:, :, *box], flow[box], valid[box]
        for axis, share in ((1, 0.5), (0, 0.1)) if self.train and self.flip else ():
            if torch.rand(()) < share:
                frames, flow, valid = frames.flip(axis + 2), flow.flip(axis), valid.flip(axis)
                flow = flow * torch.tensor([-1.0, 1.0] if axis == 1 else [1.0, -1.0])
        example = {"frames": frames, "flow": flow, "valid": valid}
        return only_at(example, torch.randperm(h * w)[: self.train_pixels]) if self.train_pixels else example


def read_frames(files: list[str | Path]) -> Tensor:
    """Image files of one size as frames (n, 3, H, W) in [-1, 1]; raises UserError if they are not."""
    return stack_frames(files, [TF.pil_to_tensor(read_image(file, 3)) for file in files])


def stack_frames(names: list[str | Path], frames: Sequence[Tensor]) -> Tensor:
    """Frames (3, H, W) of uint8 with names -> (n, 3, H, W) in [-1, 1]; raises UserError if they differ in size."""
    for name, frame in zip(names, frames):
        if frame.shape != frames[0].shape:
            raise UserError(f"{name} is {size_of(frame.shape[1:])}, {names[0]} {size_of(frames[0].shape[1:])}; frames "
                            "must be of one size")
    return torch.stack(frames) / 127.5 - 1


def size_of(shape: tuple[int, ...]) -> str:
    height, width = shape[:2]
    return f"{width}x{height}"


def write_flo(file: str | Path, flow: Tensor) -> None:
    """Writes flow (H, W, 2), in pixels right and down, as a Middlebury .flo file: "PIEH", width and height as int32,
    and float32 row by row, all little-endian."""
    height, width, _ = flow.shape
    Path(file).write_bytes(b"PIEH" + np.array([width, height], "<i4").tobytes()
                           + flow.cpu().numpy().astype("<f4").tobytes())
