"""A modality to channels and back: what goes before and after the models of model.py.

A modality needs three parts, each a small module:

    input adapter    inputs -> (B, M, C): features with the positions of the inputs, which attention itself can't tell
    query provider   what to ask of the latents, (B, O, F): one query an output
    output adapter   decoded queries (B, O, F) -> outputs

Shapes are named as in model.py; K is the number of Fourier bands. A grid is the arrangement of the M inputs: (T,) of a
text, (H, W) of an image.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver.model import init_weights

# ----------------------------------------------------------------------------------------------------------------------
# Positions


def grid_positions(grid: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """Coordinates (M, d) of a grid of d dimensions: from -1 to 1 in each, both included, the last running fastest."""
    axes = (torch.linspace(-1.0, 1.0, n, device=device, dtype=torch.float32) for n in grid)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def fourier_features(positions: Tensor, num_bands: int, max_resolution: tuple[int, ...]) -> Tensor:
    """Features (M, d * (2K + 1)) of positions (M, d) in [-1, 1]: the positions, sin(pi f p), then cos(pi f p).

    The K frequencies f go linearly from 1 to half of the dimension's `max_resolution`, its Nyquist frequency; all
    those of the first dimension come first (Perceiver, appendix D; DeepMind's position_encoding.py).
    """
    bands = torch.stack([torch.linspace(1.0, resolution / 2, num_bands, device=positions.device, dtype=torch.float32)
                         for resolution in max_resolution])  # (d, K)
    angles = math.pi * (positions[..., None] * bands).flatten(-2)  # (M, d * K)
    return torch.cat((positions, angles.sin(), angles.cos()), dim=-1)


class FourierPositions(nn.Module):
    """Fourier features of a grid's positions, always computed in float32: grid -> (M, C).

    The features of `grid`, the usual one, are kept; those of others are computed when they come. `max_resolution` gives
    the frequencies; default: the usual grid.
    """

    def __init__(self, grid: tuple[int, ...], num_bands: int, max_resolution: tuple[int, ...] | None = None):
        super().__init__()
        self.grid = tuple(grid)
        self.num_bands = num_bands
        self.max_resolution = max_resolution or self.grid
        self.num_channels = len(self.grid) * (2 * num_bands + 1)
        self.register_buffer("features", self.compute(self.grid), persistent=False)

    def compute(self, grid: tuple[int, ...], device: torch.device | None = None) -> Tensor:
        return fourier_features(grid_positions(grid, device), self.num_bands, self.max_resolution)

    def forward(self, grid: tuple[int, ...]) -> Tensor:
        return self.features if grid == self.grid else self.compute(grid, self.features.device)


class TrainablePositions(nn.Module):
    """A trained vector for every position of a grid, optionally projected: grid -> (M, C).

    If the grid has one dimension, as a text has, there may be fewer inputs than positions: they take the first ones.
    """

    def __init__(self, grid: tuple[int, ...], num_channels: int, num_projected_channels: int | None = None,
                 init_scale: float = 0.02):
        super().__init__()
        self.grid = tuple(grid)
        self.num_channels = num_projected_channels or num_channels
        self.table = nn.Embedding(math.prod(grid), num_channels)
        self.projection = nn.Linear(num_channels, num_projected_channels) if num_projected_channels else nn.Identity()
        init_weights(self, init_scale)

    def forward(self, grid: tuple[int, ...]) -> Tensor:
        """Raises ValueError if there are no trained positions for `grid`."""
        if grid != self.grid and (len(grid) > 1 or grid[0] > self.grid[0]):
            raise ValueError(f"inputs of {'x'.join(map(str, grid))} positions, the model has trained "
                             f"{'x'.join(map(str, self.grid))}")
        return self.projection(self.table.weight[: math.prod(grid)])


# ----------------------------------------------------------------------------------------------------------------------
# Input adapters


class InputAdapter(nn.Module):
    """Any inputs: their features, with positions concatenated ("concat") or added ("add") -> (B, M, C).

    `features` makes (B, *grid, `num_feature_channels`) of the inputs: nn.Embedding of tokens (B, M), an `ImageFeatures`
    of images, nn.Identity of what already has that shape. `positions` gives (M, channels) for a grid.
    """

    def __init__(self, features: nn.Module, num_feature_channels: int, positions: nn.Module, combine: str = "concat"):
        super().__init__()
        self.features = features
        self.positions = positions
        self.combine = combine
        self.num_channels = num_feature_channels + (positions.num_channels if combine == "concat" else 0)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.features(inputs)  # (B, *grid, C)
        positions = self.positions(tuple(x.shape[1:-1])).to(x.dtype)  # (M, C')
        x = x.flatten(1, -2)  # (B, M, C)
        return x + positions if self.combine == "add" else torch.cat((x, positions.expand(len(x), -1, -1)), dim=-1)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """How TensorFlow pads before and after for ceil(size / stride) outputs: less before, where it is uneven."""
    padding = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return padding // 2, padding - padding // 2


class ImageFeatures(nn.Module):
    """Images (B, C, H, W) -> features (B, H', W', C') (Perceiver IO, appendix A.1; DeepMind's io_processors.py).

    `kind` is "pixels", the raw ones; "conv1x1", a linear map of each; "conv", a convolution of 7x7 with stride 2,
    BatchNorm, ReLU and a 3x3 max-pooling with stride 2, so that H' = H / 4. `padding` of the latter is "same", as
    TensorFlow does it, or "symmetric", as the Hugging Face port: 3 around the image, none before pooling.
    """

    def __init__(self, num_image_channels: int, kind: str, num_channels: int, padding: str = "same",
                 init_scale: float = 0.02):
        super().__init__()
        self.num_image_channels = num_image_channels
        self.kind = kind
        self.padding = padding
        if kind == "conv1x1":
            self.conv = nn.Conv2d(num_image_channels, num_channels, 1)
        if kind == "conv":
            self.conv = nn.Conv2d(num_image_channels, num_channels, 7, stride=2, bias=False)
            self.norm = nn.BatchNorm2d(num_channels)
        init_weights(self, init_scale)

    def forward(self, images: Tensor) -> Tensor:
        """Raises ValueError if the images have another number of channels."""
        if images.ndim != 4 or images.shape[1] != self.num_image_channels:
            raise ValueError(f"images of shape {tuple(images.shape)}, expected (batch, {self.num_image_channels}, "
                             "height, width)")
        x = images
        if self.kind == "conv1x1":
            x = self.conv(x)
        if self.kind == "conv":
            x = self.norm(self.conv(self.pad(x, 7, (3, 3)))).relu()
            x = F.max_pool2d(self.pad(x, 3, (0, 0)), 3, stride=2)  # no ReLU is below the padding's zeros
        return x.movedim(1, -1)

    def pad(self, x: Tensor, kernel: int, symmetric: tuple[int, int]) -> Tensor:
        height, width = (same_padding(size, kernel, 2) if self.padding == "same" else symmetric for size in x.shape[2:])
        return F.pad(x, width + height)


class FrameFeatures(nn.Module):
    """Two frames (B, 2, 3, H, W) -> (B, H, W, C): a linear map of what lies around each pixel in both of them.

    That is 3x3 pixels of each frame, zeros outside of it, in the order frame, row, column, colour (Perceiver IO,
    appendix H; DeepMind's optical_flow colab). The map is computed as a convolution: nothing 27 times as large as a
    frame exists.
    """

    def __init__(self, num_channels: int, init_scale: float = 0.02):
        super().__init__()
        self.linear = nn.Linear(2 * 3 * 3 * 3, num_channels)
        init_weights(self, init_scale)

    def forward(self, frames: Tensor) -> Tensor:
        """Raises ValueError if these are not two frames in colour."""
        if frames.ndim != 5 or frames.shape[1:3] != (2, 3):
            raise ValueError(f"frames of shape {tuple(frames.shape)}, expected (batch, 2, 3, height, width)")
        kernels = self.linear.weight.unflatten(1, (2, 3, 3, 3)).movedim(-1, 2).flatten(1, 2)  # (C, 6, 3, 3)
        return F.conv2d(frames.flatten(1, 2), kernels, self.linear.bias, padding=1).movedim(1, -1)


class Patches(nn.Module):
    """Inputs on a grid of d dimensions, (B, *sizes, C), to patches (B, *(sizes / patch_shape), C').

    The C' = prod(patch_shape) * C channels of a patch are in the order of its places, each with its C channels:
    DeepMind's space_to_depth. `channel_dim` is where the inputs have theirs: -1, or 2 of videos (B, T, C, H, W).
    """

    def __init__(self, patch_shape: tuple[int, ...], channel_dim: int = -1):
        super().__init__()
        self.patch_shape = tuple(patch_shape)
        self.channel_dim = channel_dim

    def forward(self, inputs: Tensor) -> Tensor:
        """Raises RuntimeError if a size is no multiple of the patch's."""
        x, d = inputs.movedim(self.channel_dim, -1), len(self.patch_shape)  # (B, *sizes, C)
        for i, size in enumerate(self.patch_shape):
            x = x.unflatten(2 * i + 1, (-1, size))  # in the end (B, n1, size1, n2, size2, ..., C)
        return x.permute(0, *range(1, 2 * d, 2), *range(2, 2 * d + 1, 2), -1).flatten(d + 1)


class VectorInput(nn.Module):
    """A vector (B, C), such as a class as one-hot, as the only input, (B, 1, C): it needs no position."""

    def __init__(self, num_channels: int):
        super().__init__()
        self.num_channels = num_channels

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs[:, None]


# ----------------------------------------------------------------------------------------------------------------------
# Query providers and output adapters


class TrainableQueries(nn.Module):
    """Trained queries, one an output: the adapted inputs (B, M, C) -> (B, O, F).

    With `one_per_input`, the outputs are as many as the inputs, M, and query i asks about input i.
    """

    def __init__(self, num_queries: int, num_channels: int, one_per_input: bool = False, init_scale: float = 0.02):
        super().__init__()
        self.one_per_input = one_per_input
        self.num_channels = num_channels
        self.table = nn.Embedding(num_queries, num_channels)
        init_weights(self, init_scale)

    def forward(self, x: Tensor, output_positions: Tensor | None = None) -> Tensor:
        """`output_positions` (O') or (B, O') selects queries by number."""
        queries = self.table.weight[: x.shape[1]] if self.one_per_input else self.table.weight  # (O, F)
        if output_positions is not None:
            queries = queries[output_positions]  # (O', F) or (B, O', F)
        return queries.expand(len(x), -1, -1)


class InputQueries(nn.Module):
    """The adapted inputs (B, M, C) themselves: query i asks about input i."""

    def forward(self, x: Tensor, output_positions: Tensor | None = None) -> Tensor:
        """`output_positions` (O') or (B, O') selects queries by number."""
        if output_positions is None:
            return x
        return x[torch.arange(len(x), device=x.device)[:, None], output_positions]  # (B, O', C)


class FourierQueries(nn.Module):
    """Fourier features of positions, one query a place on a grid: (B, M, C) -> (B, O, F), places in row-major order.

    A grid of n places has coordinates -1 + 2 i / n, which end before 1, as DeepMind's code has them for outputs that
    are chosen by number (perceiver.py, decoder_query). They are computed for the chosen ones alone: those of a video of
    16 x 224 x 224 take 626 MB.
    """

    def __init__(self, grid: tuple[int, ...], num_bands: int, max_resolution: tuple[int, ...]):
        super().__init__()
        self.grid = tuple(grid)
        self.num_bands = num_bands
        self.max_resolution = max_resolution
        self.num_channels = len(self.grid) * (2 * num_bands + 1)

    def forward(self, x: Tensor, output_positions: Tensor | None = None) -> Tensor:
        """`output_positions` (O') or (B, O') selects places by number."""
        if output_positions is None:
            output_positions = torch.arange(math.prod(self.grid), device=x.device)
        places = torch.stack(torch.unravel_index(output_positions, self.grid), dim=-1)  # (..., O', d)
        positions = -1 + 2 * places / torch.tensor(self.grid, dtype=torch.float32, device=x.device)
        queries = fourier_features(positions, self.num_bands, self.max_resolution).to(x.dtype)
        return queries.expand(len(x), -1, -1)


class LinearOutput(nn.Module):
    """Decoded queries (B, O, F) -> (B, O, E): logits of tokens, values of a series."""

    def __init__(self, num_channels: int, num_outputs: int, init_scale: float = 0.02):
        super().__init__()
        self.linear = nn.Linear(num_channels, num_outputs)
        init_weights(self, init_scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class GridOutput(LinearOutput):
    """Decoded queries (B, O, F) -> values (B, O, E) of places on a grid; `join` makes the whole of those of all places.

    `shape` is that of the whole with its channels last. They come to lie where `channel_dim` says, as of `Patches`.
    """

    def __init__(self, num_channels: int, num_outputs: int, shape: tuple[int, ...], channel_dim: int = -1,
                 init_scale: float = 0.02):
        super().__init__(num_channels, num_outputs, init_scale)
        self.shape = tuple(shape)
        self.channel_dim = channel_dim
        self.num_places = math.prod(shape) // num_outputs  # O

    def join(self, x: Tensor) -> Tensor:
        """Values of all places (B, O, E) -> the whole, (B, *shape) but for the place of the channels."""
        return x.reshape(len(x), *self.shape).movedim(-1, self.channel_dim)


class ClassificationOutput(LinearOutput):
    """The one decoded query (B, 1, F) -> logits of classes (B, E)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).squeeze(1)


class TiedTokenOutput(nn.Module):
    """Decoded queries (B, O, F) -> logits of tokens (B, O, V): products with the tokens' embeddings, and a bias."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.tied = (embedding,)  # not as a submodule: it is the input adapter's, to be saved and counted once
        self.bias = nn.Parameter(torch.zeros(embedding.num_embeddings))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.tied[0].weight, self.bias)


class FlowOutput(LinearOutput):
    """Decoded queries (B, O, F) -> optical flow (B, O, 2): how far each pixel moves right and down, in pixels.

    DeepMind's decoder divides by 100, and what it gives counts 20 pixels. Like there, the flow is 0 at first.
    """
    PIXELS = 20 / 100  # that a linear output of 1 stands for

    def __init__(self, num_channels: int):
        super().__init__(num_channels, 2, init_scale=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.PIXELS * self.linear(x)
