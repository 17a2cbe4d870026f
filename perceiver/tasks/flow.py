"""Optical flow: Perceiver IO predicts how each pixel of a frame moves to the next frame (Perceiver IO, section 4.2).

The flow of a pixel is two numbers: its motion in pixels to the right, and down.
Shapes: B pairs of frames, H x W pixels; M inputs, C channels and O outputs are those of model.py.
"""

import re
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice, pairwise, product
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate
from torchvision.transforms import v2
from torchvision.utils import flow_to_image
from tqdm import tqdm

from perceiver import pictures
from perceiver.adapters import FourierPositions, InputAdapter, InputQueries, LinearOutput
from perceiver.config import Count, Positive
from perceiver.data import LoaderConfig, Readable, Shuffled, check_pixels, hold_out_folders, open_image, read_image
from perceiver.errors import UserError, reading
from perceiver.io import output, progress, read_bytes, report, save_picture, tell
from perceiver.model import PerceiverDecoder, PerceiverIO, PerceiverIOConfig, init_weights
from perceiver.tasks.base import Task
from perceiver.tasks.images import image_files
from perceiver.tasks.video import SUFFIXES, num_video_frames, video_frames

# ----------------------------------------------------------------------------------------------------------------------
# Model


class FrameFeatures(nn.Module):
    """Two frames (B, 2, 3, H, W) -> features (B, H, W, C): a linear map of the patches around each pixel.

    A pixel has one patch in each frame; outside a frame there are zeros. The weights of a channel have the order frame,
    row, column, color (Perceiver IO, appendix H; DeepMind's optical_flow colab). A convolution computes the map, so no
    tensor holds all patches.
    """

    def __init__(self, num_channels: int, init_scale=0.02, patch_size=3, normalize=False):
        super().__init__()
        self.patch_size = patch_size
        self.normalize = normalize
        self.linear = nn.Linear(2 * patch_size**2 * 3, num_channels)
        init_weights(self, init_scale)

    def forward(self, frames: Tensor) -> Tensor:
        """Raises ValueError unless `frames` has the shape (B, 2, 3, H, W)."""
        if frames.shape[1:3] != (2, 3):
            raise ValueError(f"frames of shape {tuple(frames.shape)}, expected (batch, 2, 3, height, width)")
        if self.normalize:
            frames = frames - frames.mean((1, 3, 4), keepdim=True)
            frames = frames / (frames.std((1, 2, 3, 4), keepdim=True) + 0.02)  # 0.02: noise is not worth more
        k = self.patch_size
        weight = self.linear.weight.unflatten(1, (2, k, k, 3))  # (C, frame, row, column, color)
        kernels = weight.movedim(-1, 2).flatten(1, 2)  # (C, 6, k, k)
        features = F.conv2d(frames.flatten(1, 2), kernels, self.linear.bias, padding=k // 2)
        return features.movedim(1, -1)


class FlowOutput(LinearOutput):
    """Decoded queries (B, O, F) -> flow (B, O, 2) in pixels.

    DeepMind's decoder divides its outputs by 100; the result is in units of 20 pixels.
    """

    def forward(self, x: Tensor) -> Tensor:
        return 20 / 100 * self.linear(x)


class OpticalFlowModel(PerceiverIO):
    """Perceiver IO with one output per pixel."""

    def forward(self, frames: Tensor, output_positions: Tensor | None = None) -> Tensor:
        """Two frames (B, 2, 3, H, W) in [-1, 1] -> flow (B, H, W, 2), or (B, O', 2) at `output_positions`.

        `output_positions`, (O') or (B, O'), are indices of pixels, row by row.
        """
        flow = super().forward(frames, output_positions=output_positions)  # (B, O, 2)
        return flow.unflatten(1, frames.shape[-2:]) if output_positions is None else flow


@dataclass
class FrameInputConfig:
    frame_shape: tuple[Count, Count] = (368, 496)  # height and width of the model's frames
    num_feature_channels: Count = 64  # output channels of FrameFeatures
    num_frequency_bands: Count = 64  # K, Fourier bands of the positions; positions are concatenated to features
    max_resolution: tuple[Count, Count] | None = None  # twice the highest frequency per axis; null: frame_shape
    patch_size: Count = 3  # rows and columns of the patches that FrameFeatures sees; odd
    normalize: bool = False  # give each pair a mean color of 0 and a standard deviation of about 1

    def __post_init__(self):
        if self.patch_size % 2 == 0:
            raise ValueError(f"patch_size={self.patch_size} must be odd: a patch has a pixel at its center")

    def build(self, init_scale) -> InputAdapter:
        """Frames (B, 2, 3, H, W) -> (B, H * W, C)."""
        features = FrameFeatures(self.num_feature_channels, init_scale, self.patch_size, self.normalize)
        positions = FourierPositions(self.frame_shape, self.num_frequency_bands, self.max_resolution)
        return InputAdapter(features, self.num_feature_channels, positions)


@dataclass
class OpticalFlowConfig(PerceiverIOConfig):
    """Two frames to flow. The query of each pixel is its adapted input."""

    input: FrameInputConfig = field(default_factory=FrameInputConfig)
    coarse_to_fine: bool = False  # frames larger than frame_shape: start on small copies of them

    def __post_init__(self):
        if self.decoder is None:
            raise ValueError("decoder=None: optical flow needs a decoder")
        if self.decoder.num_query_channels is not None:
            raise ValueError(
                f"decoder.num_query_channels={self.decoder.num_query_channels} must be null: the inputs are the queries"
            )

    def build(self) -> OpticalFlowModel:
        input_adapter = self.input.build(self.encoder.init_scale)
        num_channels = input_adapter.num_channels
        encoder = self.build_encoder(num_channels)
        decoder = PerceiverDecoder(self.decoder, self.num_latent_channels, num_channels)
        output_adapter = FlowOutput(num_channels, 2, init_scale=0.0)  # an untrained model predicts no motion
        return OpticalFlowModel(input_adapter, encoder, InputQueries(), decoder, output_adapter)


# ----------------------------------------------------------------------------------------------------------------------
# Frames of any size, in tiles

TILE_PIXELS = 2**15  # small tiles form batches of up to so many pixels: half the time on a CPU


def compute_flow(model: nn.Module, frames: Tensor, tile) -> Tensor:
    """Two frames (2, 3, H, W) in [-1, 1] -> flow (H, W, 2). The model runs on tiles of size `tile` (height, width).

    Where tiles overlap, the result is the weighted mean of their flows. The weight of a pixel is its distance to the
    edge of the tile (DeepMind's optical_flow colab). Frames smaller than a tile are padded on the right and below: the
    padding repeats the last column and row.
    """
    h, w = tile
    height, width = frames.shape[2:]
    padding = (0, max(0, w - width), 0, max(0, h - height))
    frames = F.pad(frames, padding, mode="replicate")
    size = frames.shape[2:]
    rows, columns = map(edge_distance, tile)
    weight = torch.minimum(rows[:, None], columns)  # (h, w)
    weight = weight.to(frames)[..., None]
    flow = frames.new_zeros(*size, 2)
    total = torch.zeros_like(flow)  # sum of the weights so far
    starts = list(product(*map(tile_starts, size, tile)))
    batch_size = max(1, TILE_PIXELS // (h * w))
    for first in range(0, len(starts), batch_size):
        boxes = []
        for top, left in starts[first : first + batch_size]:
            boxes.append((slice(top, top + h), slice(left, left + w)))
        tiles = torch.stack([frames[:, :, *box] for box in boxes])
        tile_flows = model(tiles)
        for box, tile_flow in zip(boxes, tile_flows):
            total[box] += weight
            share = weight / total[box]
            flow[box] += share * (tile_flow - flow[box])  # a running mean, exact where tiles agree
    return flow[:height, :width]


def coarse_to_fine(model: nn.Module, frames: Tensor, tile) -> Tensor:
    """Two frames (2, 3, H, W) in [-1, 1] -> flow (H, W, 2), also where a motion is too long for the model.

    It computes the flow of frames of half the size first, in the same way. Then it moves the second frame back by twice
    that flow, and the model only finds the rest. The smallest frames are one to two tiles high or wide.
    """
    height, width = frames.shape[2:]
    if height < 2 * tile[0] or width < 2 * tile[1]:
        return compute_flow(model, frames, tile)
    small = F.interpolate(frames, (height // 2, width // 2), mode="area")
    flow = enlarge_flow(coarse_to_fine(model, small, tile), height, width)
    moved = move_back(frames[1], flow)
    return flow + compute_flow(model, torch.stack((frames[0], moved)), tile)


def enlarge_flow(flow, height, width):
    """Flow (h, w, 2) -> flow (H, W, 2) of frames of that size."""
    scale = flow.new_tensor([width / flow.shape[1], height / flow.shape[0]])
    channels = (scale * flow).movedim(-1, 0)[None]  # (1, 2, h, w)
    return F.interpolate(channels, (height, width), mode="bilinear")[0].movedim(0, -1)


def move_back(frame, flow):
    """Colors (3, H, W): each pixel gets the color of `frame` at the place where `flow` (H, W, 2) leads."""
    height, width = frame.shape[1:]
    columns, rows = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
    places = torch.stack((columns, rows), dim=-1).to(flow) + flow
    places = (2 * places + 1) / flow.new_tensor([width, height]) - 1
    return F.grid_sample(frame[None], places[None], padding_mode="border", align_corners=False)[0]


def edge_distance(size):
    """Distances (size,) to the nearest edge: 1, 2, 3, ..., 3, 2, 1."""
    numbers = torch.arange(1, size + 1)
    return torch.minimum(numbers, numbers.flip(0))


def tile_starts(size, tile):
    """Starts of the tiles along an axis of `size` pixels. The last tile ends with the frame.

    Tiles overlap by 20 pixels or more, as DeepMind's do. Tiles of less than 100 pixels overlap by three quarters. With
    one half instead, a dotted grid appears in the flow of flow.yaml's model, six times as strong.
    """
    overlap = 20 if tile >= 100 else 3 * tile // 4
    starts = range(0, size, tile - overlap)
    return sorted({min(start, size - tile) for start in starts})


# ----------------------------------------------------------------------------------------------------------------------
# Data sets. An example has frames (2, 3, H, W) in [-1, 1], flow (H, W, 2), and valid (H, W), false where the flow is
# unknown. An example may also have positions (O'), the indices of some pixels. Then flow (O', 2) and valid (O') are of
# these pixels only.

# For each data set: the flow files in data.path, the first frame of a pair, and the fraction held out for validation.
# {folder} and {stem} come from the path of the flow file; {render} is clean or final.
LAYOUTS = {
    "sintel": ("Sintel/training/flow/*/frame_*.flo", "Sintel/training/{render}/{folder}/{stem}.png", 1 / 8),
    "chairs": ("FlyingChairs/data/*_flow.flo", "FlyingChairs/data/{stem}_img1.ppm", None),  # has a split of its own
    "kitti": ("KittiFlow/training/flow_occ/*_10.png", "KittiFlow/training/image_2/{stem}.png", 1 / 10),
    "middlebury": ("other-gt-flow/*/flow10.flo", "other-data/{folder}/frame10.png", 1 / 3),
}


@dataclass
class FlowDataConfig(LoaderConfig):
    dataset: Literal["generated", "sintel", "chairs", "kitti", "middlebury"] = "generated"
    path: str | None = None  # folder that holds Sintel, FlyingChairs, KittiFlow, or other-data and other-gt-flow
    max_motion: Positive = 4.0  # generated: largest shift of an object in pixels, along each axis
    val_size: Count = 256  # generated: number of validation pairs
    sintel_pass: Literal["clean", "final", "both"] = "both"  # final adds motion blur and fog
    flip: bool = False  # training on files: horizontal flips, p 0.5, and vertical flips, p 0.1
    num_image_queries: Count | None = None  # training: number of random pixels to predict; null: all pixels
    eval_whole: bool = False  # validation on files: whole frames, in tiles; false: center crops of frame_shape

    def __post_init__(self):
        if self.dataset != "generated" and self.path is None:
            raise ValueError(f"path=None must name the folder that holds {LAYOUTS[self.dataset][0]}")


def load_flow(config: FlowDataConfig, frame_shape, seed):
    """Training pairs, by key (step, index in the global batch), and validation pairs.

    With `eval_whole`, validation frames are cropped to the smallest of them. Training pads frames smaller than
    `frame_shape`; the flow of the padding is unknown. Raises UserError if files are missing.
    """
    if config.dataset == "generated":
        train_set = GeneratedFlow(config, frame_shape, seed, config.num_image_queries)
        val_set = GeneratedFlow(config, frame_shape, seed=2**63)  # larger than any train.seed
        return train_set, val_set
    train, val = find_pairs(config)
    transforms = [v2.RandomCrop(frame_shape, pad_if_needed=True)]
    if config.flip:
        transforms.append(partial(random_flip, axis=2, probability=0.5))
        transforms.append(partial(random_flip, axis=1, probability=0.1))
    train_set = FlowFiles(train, v2.Compose(transforms), config.num_image_queries)
    val_shape = frame_shape
    if config.eval_whole:
        val_shape = smallest_frame([first for first, *_ in val])
    train_set = Readable(train_set, config.max_unreadable)
    val_set = Readable(FlowFiles(val, v2.CenterCrop(val_shape)), config.max_unreadable)
    return Shuffled(train_set, config.batch_size, seed), val_set


def smallest_frame(files):
    """The smallest height and the smallest width of image files. Ignores unreadable files, unless all are."""
    shapes = []
    for file in files:
        try:
            with open_image(file) as image:
                shapes.append((image.height, image.width))
        except UserError as error:
            problem = error
    if not shapes:
        raise problem
    return np.min(shapes, axis=0).tolist()


def make_example(frames, flow, valid, num_queries, permutation):
    """An example with all pixels, or, if `num_queries` is given, with that many random ones.

    `permutation(n)` returns the numbers below n in random order.
    """
    example = {"frames": frames, "flow": flow, "valid": valid}
    if num_queries is None:
        return example
    positions = torch.as_tensor(permutation(valid.numel()))[:num_queries]
    flow = flow.flatten(0, 1)[positions]
    return example | {"flow": flow, "valid": valid.flatten()[positions], "positions": positions}


# ----------------------------------------------------------------------------------------------------------------------
# Generated pairs


@dataclass
class GeneratedFlow(Dataset):
    """Textured objects move over a textured background. A pair depends only on `seed` and its key."""

    config: FlowDataConfig
    frame_shape: tuple[int, int]
    seed: int
    num_queries: int | None = None  # None: all pixels

    def __len__(self):
        return self.config.val_size

    def __getitem__(self, key):
        rng = np.random.default_rng((self.seed, *np.atleast_1d(key)))
        frames, flow, _ = draw_pair(rng, self.frame_shape, self.config.max_motion)
        frames = add_noise(rng, frames)
        valid = torch.ones(self.frame_shape, dtype=torch.bool)
        return make_example(frames, flow, valid, self.num_queries, rng.permutation)


def draw_pair(rng, frame_shape, max_motion):
    """Two frames (2, 3, H, W), the flow (H, W, 2), and the index of the visible layer at each pixel (2, H, W).

    A layer is a textured shape. Texture and shape are functions of a point in the first frame, and an affine map moves
    them. Each pixel of the second frame looks up the point that moved to it. So the flow is exact.
    """
    height, width = frame_shape
    size = torch.tensor([width, height], dtype=torch.float32)
    rows, columns = np.indices(frame_shape, dtype=np.float32)
    pixels = torch.tensor(np.stack((columns, rows), axis=-1))  # (H, W, 2)

    def draw_point(low, high):
        return torch.from_numpy(rng.uniform(low, high, 2)).float()

    # Short motions are frequent: coarse-to-fine leaves them.
    camera_reach, object_reach = max_motion * rng.uniform(0, 1, 2) ** 2
    camera = draw_point(-camera_reach, camera_reach)  # shift of the background; objects have it too
    blur = rng.uniform(0.5, 2.0)  # width of the edges of objects in pixels
    for layer in range(rng.integers(1, 6)):  # the background, then up to four objects
        center = draw_point(0, 1) * size
        shift = camera
        if layer > 0:
            shift = (camera + draw_point(-object_reach, object_reach)).clamp(-max_motion, max_motion)
        angle = rng.normal(0, 0.03)
        zoom = rng.normal(1, 0.03)
        transform = turn_and_zoom(angle, zoom)
        inverse = turn_and_zoom(-angle, 1 / zoom)
        target = (pixels - center) @ transform.T + center + shift  # where pixels of the first frame move to
        source = (pixels - center - shift) @ inverse.T + center  # where pixels of the second come from
        motion = target - pixels
        points = torch.stack((pixels, source))  # (2, H, W, 2)

        textures = draw_texture(rng, frame_shape).expand(2, -1, -1, -1)
        places = rng.uniform(0.3, 0.8) * ((2 * points + 1) / size - 1)  # enlarged: lenses blur the finest detail
        colors = F.grid_sample(textures, places, padding_mode="reflection", align_corners=False)  # (2, 3, H, W)
        if layer == 0:
            frames, flow = colors, motion
            layers = torch.zeros(2, height, width)
            continue
        radii = draw_point(0.1, 0.6) * height
        places = (points - center) @ turn_and_zoom(rng.uniform(0, np.pi), 1.0) / radii
        places = places + 0.2 * torch.sin(2 * places.flip(-1) + draw_point(0, 6))  # bends straight edges
        power = int(rng.choice([2, 8]))  # 2: an ellipse, 8: almost a box
        distance = places.pow(power).sum(-1).pow(1 / power)  # 1 at the edge
        cover = ((1 - distance) * radii.min() / blur + 0.5).clamp(0, 1)  # (2, H, W)
        inside = cover > 0.5
        frames = torch.lerp(frames, colors, cover[:, None])
        flow = torch.where(inside[0, ..., None], motion, flow)
        layers = layers.masked_fill(inside, layer)
    return frames, flow, layers


def turn_and_zoom(angle, zoom):
    """The matrix (2, 2) that turns points by `angle` and multiplies them by `zoom`."""
    cosine, sine = np.cos(angle), np.sin(angle)
    return torch.tensor([[cosine, -sine], [sine, cosine]], dtype=torch.float32) * zoom


def draw_texture(rng, shape):
    """A texture (3, H, W). Half of the textures also have patches of a second color with sharp edges."""
    noise = noise_maps(*shape)
    gray, patches, *colors = noise[rng.integers(len(noise), size=5)]
    two_colors = rng.uniform((-0.8, -0.4), (0.8, 0.4), (3, 2))
    base, second = torch.from_numpy(two_colors).float().T[..., None, None]  # each (3, 1, 1)
    saturation = rng.uniform(0, 0.7)
    texture = saturation * torch.stack(colors) + (1 - saturation) * gray
    texture = base + rng.uniform(0.03, 0.5) * texture
    if rng.random() < 0.5:
        texture = texture + second * torch.tanh(rng.uniform(3, 12) * patches)
    return texture.clamp(-1, 1)


@lru_cache(maxsize=1)  # one Fourier transform per texture would take half the time of training
def noise_maps(height, width):
    """Images of noise (1024, H, W) with mean 0 and variance 1.

    As in photos, the amplitude at frequency f is about 1 / f: 1 / f ** 0.8 in the first image, 1 / f ** 2 in the last.
    """
    rng = np.random.default_rng(0)
    down, right = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    frequencies = np.hypot(down, right)
    frequencies[0, 0] = np.inf  # the mean becomes 0
    slopes = np.linspace(0.8, 2.0, 1024)[:, None, None]
    white = rng.standard_normal((len(slopes), height, width))
    spectrum = np.fft.rfft2(white) / frequencies**slopes
    noise = np.fft.irfft2(spectrum, (height, width))
    noise /= noise.std((1, 2), keepdims=True)
    return torch.from_numpy(noise).float()


def add_noise(rng, frames):
    """Adds what a camera adds: the second frame has another brightness and contrast, and all pixels have noise."""
    first, second = frames
    second = rng.normal(1, 0.05) * second + rng.normal(0, 0.05)
    frames = torch.stack((first, second))
    noise = torch.from_numpy(rng.standard_normal(frames.shape, dtype=np.float32))
    frames = frames + rng.exponential(0.02) * noise
    return frames.clamp(-1, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Pairs in files


def find_pairs(config):
    """The files (first frame, second frame, flow) of all training pairs, and of all validation pairs.

    FlyingChairs has a split of its own. The test sets of the others have no flow. So every n-th scene of the training
    set is held out for validation; KITTI has no scenes, so it is every n-th pair. Raises UserError if files are
    missing.
    """
    root = Path(config.path)
    flow_pattern, frame_pattern, val_fraction = LAYOUTS[config.dataset]
    flows = sorted(root.glob(flow_pattern))
    if len(flows) < 2:
        raise UserError(f"data.path={root} holds {len(flows)} files {flow_pattern}; it must hold two or more")
    if config.dataset == "chairs":
        train, val = split_chairs(flows, root / "FlyingChairs/FlyingChairs_train_val.txt")
    else:
        train, val = hold_out_folders(root, flows, val_fraction)
    passes = ("clean", "final") if config.sintel_pass == "both" else (config.sintel_pass,)

    def pairs(flows):
        found = {}
        for render, flow in product(passes, flows):
            stem = flow.stem.removesuffix("_flow")
            first = root / frame_pattern.format(render=render, folder=flow.parent.name, stem=stem)
            found[first] = (first, next_file(first), flow)  # the dict drops repeats: only Sintel has two passes
        return list(found.values())

    return pairs(train), pairs(val)


def split_chairs(flows, split):
    """The flow files for training and for validation. The file `split` has one line per pair: 1 or 2."""
    parts = read_bytes(split).split()
    if len(parts) != len(flows) or set(parts) != {b"1", b"2"}:
        raise UserError(f"{split} must have a line for each of {len(flows)} pairs: 1 for training, 2 for validation")
    train = [flow for flow, part in zip(flows, parts) if part == b"1"]
    val = [flow for flow, part in zip(flows, parts) if part == b"2"]
    return train, val


def next_file(file):
    """The file with the next number: frame_0002.png for frame_0001.png."""
    start, number = re.fullmatch(r"(.*?)(\d+)", file.stem).groups()
    return file.with_stem(f"{start}{int(number) + 1:0{len(number)}}")


@dataclass
class FlowFiles(Dataset):
    """Pairs in files. `transform` gets a pair as one image (9, H, W): 3 + 3 colors, 2 channels of flow, and valid.

    PyTorch's generator draws the random pixels. Raises UserError if a file is broken, or if the files of a pair differ
    in size.
    """

    pairs: list[tuple[Path, Path, Path]]  # files of the first frame, the second frame, and the flow
    transform: nn.Module
    num_queries: int | None = None  # None: all pixels

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        files = self.pairs[index]
        first, second, flow_file = files
        images = [read_frame(first), read_frame(second), read_flow(flow_file)]
        check_sizes(files, images)
        pixels = self.transform(torch.cat(images))
        frames = pixels[:6].unflatten(0, (2, 3))
        flow = pixels[6:8].movedim(0, -1)
        return make_example(frames, flow, pixels[8] > 0, self.num_queries, torch.randperm)


def random_flip(pixels, axis, probability):
    """Flips a pair (9, H, W) along `axis`, 1 or 2, and negates the flow along this axis."""
    if torch.rand(()) < probability:
        pixels = pixels.flip(axis)
        pixels[8 - axis] *= -1  # channel 6 is the flow to the right, along axis 2; channel 7 the flow down
    return pixels


def read_frame(file):
    """An image file as a frame (3, H, W) in [-1, 1]. Raises UserError if the file cannot be read."""
    return v2.functional.pil_to_tensor(read_image(file, 3)) / 127.5 - 1


def check_sizes(names, images):
    """Raises UserError unless all images (C, H, W) have the same size."""
    sizes = [f"{image.shape[2]}x{image.shape[1]}" for image in images]
    for name, size in zip(names, sizes):
        if size != sizes[0]:
            raise UserError(f"{name} is {size}, {names[0]} is {sizes[0]}; frames and flow must have the same size")


def read_flow(file: Path) -> Tensor:
    """Flow and valid as one tensor (3, H, W), from a .png file of KITTI or a .flo file of Middlebury.

    A .flo file has 4 bytes "PIEH", width and height as int32, and float32 values row by row. Its unknown values are
    above 1e9 or NaN; here they become 0. Raises UserError if the file cannot be read.
    """
    with reading(file):
        if file.suffix == ".png":
            values = read_png16(file).float()
            flow = (values[:2] - 2**15) / 64  # as in KITTI's development kit
            valid = values[2] > 0
        else:
            values = torch.from_numpy(np.fromfile(file, np.float32))
            width, height = values[1:3].view(torch.int32)
            flow = values[3:].view(height, width, 2).movedim(-1, 0)
            valid = (flow.abs() < 1e9).all(0)
        return torch.cat((flow.where(valid, 0.0), valid[None]))


def read_png16(file) -> Tensor:
    """The values (3, H, W) of a PNG file with 16-bit colors. Raises ValueError if it has other pixels.

    Pillow keeps only the first byte of such a value. Read as little-endian, the first byte is the low one.
    """
    parts = []
    for order in ("RGB;16B", "RGB;16L"):
        with Image.open(file, formats=["PNG"]) as image:
            check_pixels(image)
            (tile,) = image.tile
            if tile[3] != "RGB;16B":
                raise ValueError(f"its pixels are {tile[3]}; they must be RGB with 16 bits per color")
            image.tile = [(*tile[:3], order)]
            parts.append(np.asarray(image).astype(np.int32))
    high, low = parts
    return torch.from_numpy(256 * high + low).movedim(-1, 0)


def write_flo(file, flow):
    """Writes flow (H, W, 2) as a .flo file."""
    height, width, _ = flow.shape
    header = b"PIEH" + np.int32([width, height]).tobytes()
    Path(file).write_bytes(header + flow.numpy().tobytes())


# ----------------------------------------------------------------------------------------------------------------------
# Task


class OpticalFlow(Task):
    """The loss is the end-point error: the distance between predicted and true flow, in pixels, where flow is known."""

    name = "optical_flow"
    ModelConfig = OpticalFlowConfig
    DataConfig = FlowDataConfig

    def load_data(self):
        data = self.config.data
        train_set, self.val_set = load_flow(data, self.config.model.input.frame_shape, self.config.train.seed)
        if data.dataset == "generated":
            self.data_note = f"generated frames; objects shift by at most {data.max_motion} pixels along each axis"
        else:
            self.data_note = f"{len(train_set.examples)} pairs for training, {len(self.val_set)} for validation"
        return train_set, self.val_set

    def flow(self, model, frames) -> Tensor:
        """Frames (B, 2, 3, H, W) -> flow (B, H, W, 2). Uses tiles unless the frames have the model's size."""
        frame_shape = self.config.model.input.frame_shape
        if frames.shape[3:] == frame_shape:
            return model(frames)
        compute = coarse_to_fine if self.config.model.coarse_to_fine else compute_flow
        return torch.stack([compute(model, pair, frame_shape) for pair in frames])

    def loss(self, model, batch):
        frames, flow, valid = batch["frames"], batch["flow"], batch["valid"]
        if "positions" in batch:
            predicted = model(frames, batch["positions"])
        else:
            predicted = self.flow(model, frames)
        error = (predicted.float() - flow).norm(dim=-1)
        motion = flow.norm(dim=-1)
        return {"loss": (error * valid).sum(), "count": valid.sum(), "motion": (motion * valid).sum()}

    def metrics(self, sums):
        """`epe` is the model's end-point error; `epe_zero_flow` is the error of predicting no motion."""
        epe = sums["loss"] / sums["count"]
        return {"loss": epe, "epe": epe, "epe_zero_flow": sums["motion"] / sums["count"]}

    def visualize(self, model):
        """The first frames of up to four validation pairs, their predicted flow, and their true flow."""
        numbers = range(len(self.val_set))
        step = max(1, len(numbers) // 4)
        batch = default_collate([self.val_set[number] for number in numbers[::step][:4]])
        frames = batch["frames"]
        device = next(model.parameters()).device
        flow = self.flow(model, frames.to(device)).cpu()
        titles = ("predicted flow", "true flow")
        return {"flow": pictures.flow_rows(frames[:, 0], flow, batch["flow"], titles=titles)}

    def summary(self, metrics):
        epe, zero_flow = metrics["epe"], metrics["epe_zero_flow"]
        return f"validation: an end-point error of {epe:.3f} pixels; zero flow would give {zero_flow:.3f}"

    def predict(self, model, args):
        """Writes a picture of the flow from each frame to the next, and a .flo file if there are several inputs."""
        device = next(model.parameters()).device
        flow = None
        for pair in pairwise(read_inputs(args.inputs, args.limit)):
            names, images = zip(*pair)
            check_sizes(names, images)
            frames = torch.stack(images).to(device)
            flow = self.flow(model, frames[None])[0].cpu()
            name = names[0]
            if not flow.isfinite().all():
                raise UserError(f"{name}: the flow has values that are not finite; the model's weights are damaged")
            longest = flow.norm(dim=-1).max().item()
            tell(f"{name}: the longest motion is {longest:.1f} pixels")
            files = [Path(args.out) / f"{name}-flow.png"]
            save_picture(flow_to_image(flow.movedim(-1, 0)), *files)
            if len(args.inputs) > 1:
                with output(args.out, f"{name}-flow.flo") as path:
                    write_flo(path, flow)
                files.append(path)
            report(args, {"input": name, "longest_motion": longest, "files": list(map(str, files))})
        if flow is None:
            raise UserError(f"optical flow needs two frames or more; {args.inputs[0]} has only one")


def read_inputs(inputs, limit=None):
    """Yields a name and a frame (3, H, W) in [-1, 1] for each frame of a video, a folder of images, or image files.

    There are at most `limit` frames.
    """
    source = Path(inputs[0])
    if source.suffix.lower() in SUFFIXES:
        total = min(filter(None, (num_video_frames(source), limit)), default=None)
        frames = tqdm(islice(video_frames(source), limit), total=total, unit=" frames")
        for number, frame in enumerate(frames, start=1):
            yield f"{source.stem}-{number:05}", frame / 127.5 - 1
    else:
        for file, name in progress(image_files(inputs), limit):
            yield name, read_frame(file)
