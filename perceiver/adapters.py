"""Input adapters, query providers and output adapters. They connect a modality to the models of model.py.

A modality needs three parts, each a small module:

    input adapter    inputs -> (B, M, C): features and positions, because attention itself ignores the order of inputs
    query provider   adapted inputs (B, M, C) -> queries (B, O, F): one query for each output
    output adapter   decoded queries (B, O, F) -> outputs

Letters in shapes are those of model.py; K is the number of Fourier bands. A grid is the arrangement of the M inputs:
(T,) of a text, (H, W) of an image. The attribute `num_channels` of a module is its number of output channels.
"""

import math

import torch
from torch import Tensor, nn

from perceiver.model import init_weights

Grid = tuple[int, ...]

# ----------------------------------------------------------------------------------------------------------------------
# Positions


def grid_positions(grid: Grid, device=None) -> Tensor:
    """Coordinates (M, d) of the points of a grid with d dimensions, row-major: from -1 to 1, endpoints included."""
    axes = [torch.linspace(-1.0, 1.0, size, device=device) for size in grid]
    points = torch.cartesian_prod(*axes)
    return points.view(-1, len(grid))


def fourier_features(positions: Tensor, num_bands: int, max_resolution: Grid) -> Tensor:
    """Fourier features (..., d * (2K + 1)) of positions (..., d) in [-1, 1]: the positions, sin(pi f p), cos(pi f p).

    The K frequencies f of a dimension are spaced linearly from 1 to its Nyquist frequency, half of `max_resolution`.
    All sines come before all cosines; within each, the dimensions follow one another (Perceiver, appendix D; DeepMind's
    position_encoding.py).
    """
    bands = []
    for resolution in max_resolution:
        bands.append(torch.linspace(1.0, resolution / 2, num_bands, device=positions.device))
    angles = positions[..., None] * torch.stack(bands)  # (..., d, K)
    angles = math.pi * angles.flatten(-2)
    return torch.cat((positions, angles.sin(), angles.cos()), dim=-1)


class FourierPositions(nn.Module):
    """Fourier features of the positions on a grid, always computed in float32: grid -> (M, C).

    The module stores the features of `grid`, the usual one. It computes those of other grids on demand.
    `max_resolution` sets the frequencies; default: `grid`.
    """

    def __init__(self, grid: Grid, num_bands: int, max_resolution: Grid | None = None):
        super().__init__()
        self.grid = grid
        self.num_bands = num_bands
        self.max_resolution = max_resolution or grid
        features = fourier_features(grid_positions(grid), num_bands, self.max_resolution)
        self.register_buffer("features", features, persistent=False)
        self.num_channels = features.shape[1]

    def forward(self, grid: Grid) -> Tensor:
        if grid == self.grid:
            return self.features
        positions = grid_positions(grid, self.features.device)
        return fourier_features(positions, self.num_bands, self.max_resolution)


class TrainablePositions(nn.Module):
    """A trained vector for each position of a grid, optionally projected: grid -> (M, C).

    On a grid of one dimension, such as a text, there may be fewer inputs than positions. They take the first ones.
    """

    def __init__(self, grid: Grid, num_channels: int, num_projected_channels: int | None = None, init_scale=0.02):
        super().__init__()
        self.grid = grid
        self.num_channels = num_projected_channels or num_channels
        self.table = nn.Embedding(math.prod(grid), num_channels)
        self.projection = nn.Identity()
        if num_projected_channels:
            self.projection = nn.Linear(num_channels, num_projected_channels)
        init_weights(self, init_scale)

    def forward(self, grid: Grid) -> Tensor:
        """Raises ValueError if the model has no trained positions for `grid`."""
        is_shorter = len(grid) == 1 and grid <= self.grid
        if grid != self.grid and not is_shorter:
            given = "x".join(map(str, grid))
            trained = "x".join(map(str, self.grid))
            raise ValueError(f"the inputs have {given} positions, the model was trained with {trained}")
        table = self.table.weight[: math.prod(grid)]
        return self.projection(table)


# ----------------------------------------------------------------------------------------------------------------------
# Input adapters


class InputAdapter(nn.Module):
    """Any inputs -> (B, M, C): their features, with positions concatenated ("concat") or added ("add").

    features   inputs -> (B, *grid, num_feature_channels): nn.Embedding for tokens (B, M), nn.Identity for inputs that
               already have this shape
    positions  grid -> (M, positions.num_channels)
    """

    def __init__(self, features: nn.Module, num_feature_channels: int, positions: nn.Module, combine="concat"):
        super().__init__()
        self.features = features
        self.positions = positions
        self.combine = combine
        self.num_channels = num_feature_channels
        if combine == "concat":
            self.num_channels += positions.num_channels

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.features(inputs)  # (B, *grid, C)
        positions = self.positions(x.shape[1:-1])  # (M, C')
        x = x.flatten(1, -2)  # (B, M, C)
        if self.combine == "add":
            return x + positions
        return append(x, positions)


def append(x, channels):
    """x (B, M, C) and `channels` (M or 1, C'), the same for every example -> (B, M, C + C')."""
    channels = channels.to(x.dtype).expand(*x.shape[:2], -1)
    return torch.cat((x, channels), dim=-1)


class Patches(nn.Module):
    """Inputs (B, *sizes, C) on a grid of d dimensions -> patches (B, *(sizes / patch_shape), C').

    The C' = prod(patch_shape) * C channels of a patch are those of its points in row-major order, as in DeepMind's
    space_to_depth. `channel_dim` is the dimension of the inputs' channels: -1, or 2 for videos (B, T, C, H, W).
    """

    def __init__(self, patch_shape: Grid, channel_dim=-1):
        super().__init__()
        self.patch_shape = patch_shape
        self.channel_dim = channel_dim

    def forward(self, inputs: Tensor) -> Tensor:
        """Raises RuntimeError if a size is not a multiple of the patch size."""
        x = inputs.movedim(self.channel_dim, 1)  # (B, C, *sizes)
        for dim, size in enumerate(self.patch_shape, start=2):
            x = x.unflatten(dim, (-1, size))
            x = x.movedim(dim + 1, -1)
        x = x.movedim(1, -1)  # (B, n1, n2, ..., size1, size2, ..., C)
        return x.flatten(-1 - len(self.patch_shape))


class VectorInput(nn.Module):
    """A vector (B, C), such as a one-hot class, as the only input: (B, 1, C). It needs no position."""

    def __init__(self, num_channels: int):
        super().__init__()
        self.num_channels = num_channels

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs[:, None]


# ----------------------------------------------------------------------------------------------------------------------
# Query providers. `output_positions` (O') or (B, O') are the indices of the outputs to compute; default: all


class TrainableQueries(nn.Module):
    """A trained query for each output: (B, M, C) -> (B, O, F).

    With `one_per_input` there are as many outputs as inputs, and query i asks about input i.
    """

    def __init__(self, num_queries: int, num_channels: int, one_per_input=False, init_scale=0.02):
        super().__init__()
        self.one_per_input = one_per_input
        self.num_channels = num_channels
        self.table = nn.Embedding(num_queries, num_channels)
        init_weights(self, init_scale)

    def forward(self, x: Tensor, output_positions: Tensor | None = None) -> Tensor:
        queries = self.table.weight  # (O, F)
        if self.one_per_input:
            queries = queries[: x.shape[1]]
        if output_positions is not None:
            queries = queries[output_positions]  # (O', F) or (B, O', F)
        return queries.expand(x.shape[0], -1, -1)


class InputQueries(nn.Module):
    """The adapted inputs (B, M, C) are the queries: query i asks about input i."""

    def forward(self, x: Tensor, output_positions: Tensor | None = None) -> Tensor:
        if output_positions is None:
            return x
        examples = torch.arange(x.shape[0], device=x.device)[:, None]
        return x[examples, output_positions]  # (B, O', C)


class FourierQueries(nn.Module):
    """Fourier features of the points of a grid, one query for each point in row-major order: (B, M, C) -> (B, O, F).

    Point i of a side with n points has the coordinate -1 + 2 i / n, so the last one is below 1. DeepMind's code does
    the same for selected outputs (perceiver.py, decoder_query). The module computes only the selected queries: those of
    all points of a 16 x 224 x 224 video take 626 MB.
    """

    def __init__(self, grid: Grid, num_bands: int, max_resolution: Grid):
        super().__init__()
        self.grid = grid
        self.num_bands = num_bands
        self.max_resolution = max_resolution
        self.num_channels = len(grid) * (2 * num_bands + 1)

    def forward(self, x: Tensor, output_positions: Tensor | None = None) -> Tensor:
        if output_positions is None:
            output_positions = torch.arange(math.prod(self.grid), device=x.device)
        coordinates = torch.unravel_index(output_positions, self.grid)
        positions = [-1 + 2 * points / size for points, size in zip(coordinates, self.grid)]
        positions = torch.stack(positions, dim=-1)  # (..., O', d)
        queries = fourier_features(positions, self.num_bands, self.max_resolution)
        return queries.to(x.dtype).expand(x.shape[0], -1, -1)


# ----------------------------------------------------------------------------------------------------------------------
# Output adapters


class LinearOutput(nn.Module):
    """Decoded queries (B, O, F) -> outputs (B, O, E), such as logits of tokens or values of a series."""

    def __init__(self, num_channels: int, num_outputs: int, init_scale=0.02):
        super().__init__()
        self.linear = nn.Linear(num_channels, num_outputs)
        init_weights(self, init_scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class ClassificationOutput(LinearOutput):
    """The only decoded query (B, 1, F) -> logits of classes (B, E)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).squeeze(1)


class GridOutput(LinearOutput):
    """Decoded queries (B, O, F) -> values (B, O, E). `join` arranges the values of all O queries on a grid.

    `shape` is the shape of the joined values, with the channels last. `join` then moves the channels to `channel_dim`,
    as in `Patches`.
    """

    def __init__(self, num_channels: int, num_outputs: int, shape: Grid, channel_dim=-1, init_scale=0.02):
        super().__init__(num_channels, num_outputs, init_scale)
        self.shape = shape
        self.channel_dim = channel_dim
        self.num_places = math.prod(shape) // num_outputs  # O

    def join(self, x: Tensor) -> Tensor:
        """Values of all queries (B, O, E) -> (B, *shape), with the channels moved to `channel_dim`."""
        whole = x.reshape(-1, *self.shape)
        return whole.movedim(-1, self.channel_dim)


class TiedTokenOutput(nn.Module):
    """Decoded queries (B, O, F) -> logits of tokens (B, O, V): products with the token embeddings, plus a bias."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.tied = (embedding,)  # owned by the input adapter; in a tuple it is not saved and counted twice
        self.bias = nn.Parameter(torch.zeros(embedding.num_embeddings))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.tied[0].weight, self.bias)


# ----------------------------------------------------------------------------------------------------------------------
# Several modalities at once (Perceiver IO, section 4.3). Inputs, outputs and `output_positions` are dicts, with the
# names of the modalities as keys. A trained vector pads each modality to the same number of channels; it also tells the
# modalities apart. Then the modalities are concatenated in the order of their names.


Modules = dict[str, nn.Module]
Tensors = dict[str, Tensor]


def trained_vectors(num_channels, init_scale):
    """A trained vector (1, n) for each name. The dict `num_channels` gives n by name."""
    vectors = {name: init_scale * torch.randn(1, n) for name, n in num_channels.items()}
    return nn.ParameterDict(vectors)


def paddings(parts, num_trained, init_scale):
    """A common number of channels for all `parts`, and the trained vectors that pad each part to it.

    The number exceeds the channels of the widest part by `num_trained`.
    """
    num_channels = num_trained + max(part.num_channels for part in parts.values())
    missing = {name: num_channels - part.num_channels for name, part in parts.items()}
    return num_channels, trained_vectors(missing, init_scale)


class MultimodalInput(nn.Module):
    """Inputs by name, as their adapters take them -> (B, M, C), where M is the sum over the modalities.

    The trained mask vector of a modality replaces its masked inputs. The inputs may have an entry NAME_mask (B, M of
    the modality), true where an input is masked. Without it, a modality in `hidden` is masked completely, and any other
    not at all.
    """

    def __init__(self, adapters: Modules, hidden=(), init_scale=0.02):
        super().__init__()
        self.hidden = hidden
        self.adapters = nn.ModuleDict(sorted(adapters.items()))
        # 4 or more trained channels for each modality, as in DeepMind's code
        self.num_channels, self.padding = paddings(self.adapters, 4, init_scale)
        self.mask = trained_vectors(dict.fromkeys(self.adapters, self.num_channels), init_scale)

    def forward(self, inputs: Tensors) -> Tensor:
        parts = []
        for name, adapter in self.adapters.items():
            x = append(adapter(inputs[name]), self.padding[name])  # (B, M, C)
            default = torch.full((1, 1), name in self.hidden, device=x.device)
            mask = inputs.get(f"{name}_mask", default)
            vector = self.mask[name].to(x.dtype)
            parts.append(torch.where(mask[..., None], vector, x))
        return torch.cat(parts, dim=1)


class MultimodalQueries(nn.Module):
    """The adapted inputs (B, M, C) -> queries (B, O of the modality, F) by name, for the requested modalities."""

    def __init__(self, providers: Modules, init_scale=0.02):
        super().__init__()
        self.providers = nn.ModuleDict(sorted(providers.items()))
        # 2 or more trained channels for each modality, as in DeepMind's code
        self.num_channels, self.padding = paddings(self.providers, 2, init_scale)

    def forward(self, x: Tensor, output_positions: dict[str, Tensor | None]) -> Tensors:
        """`output_positions` has a key for each requested modality. The value None requests all its outputs."""
        queries = {}
        for name, positions in sorted(output_positions.items()):
            query = self.providers[name](x, positions)
            queries[name] = append(query, self.padding[name])
        return queries


class MultimodalOutput(nn.Module):
    """Decoded queries (B, O, F) by name -> outputs by name: one linear map for all, then an adapter for each."""

    def __init__(self, adapters: Modules, num_query_channels: int, num_channels: int, init_scale=0.02):
        super().__init__()
        self.linear = nn.Linear(num_query_channels, num_channels)
        init_weights(self.linear, init_scale)
        self.adapters = nn.ModuleDict(sorted(adapters.items()))

    def forward(self, queries: Tensors) -> Tensors:
        outputs = {}
        for name, x in queries.items():
            outputs[name] = self.adapters[name](self.linear(x))
        return outputs
