"""Optical flow of images of any size, in tiles of the size that the model was trained for."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_OVERLAP = 20  # of neighbouring tiles, in pixels


def compute_flow(model: nn.Module, frames: Tensor, tile: tuple[int, ...]) -> Tensor:
    """Two frames (2, 3, H, W) in [-1, 1] -> flow (H, W, 2) in pixels, right and down.

    `tile` (h, w) is what the model takes. Where tiles overlap, a pixel's flow is their mean, weighted by how far inside
    of a tile it is: 1 at its edge (DeepMind's optical_flow colab). Frames smaller than a tile are continued to the
    right and below by their last pixels.
    """
    (height, width), (h, w) = frames.shape[2:], tile
    frames = F.pad(frames, (0, max(0, w - width), 0, max(0, h - height)), mode="replicate")
    rows, columns = (torch.minimum(torch.arange(1, n + 1), torch.arange(n, 0, -1)) for n in tile)
    inside = torch.minimum(rows[:, None], columns).to(frames)[..., None]  # (h, w, 1)
    flow, weight = frames.new_zeros(*frames.shape[2:], 2), frames.new_zeros(*frames.shape[2:], 1)
    for top in starts(frames.shape[2], h):
        for left in starts(frames.shape[3], w):
            box = slice(top, top + h), slice(left, left + w)
            weight[box] += inside
            flow[box] += inside / weight[box] * (model(frames[None, :, :, *box])[0] - flow[box])
    return flow[:height, :width]


def starts(size: int, tile: int) -> list[int]:
    """Where tiles begin that cover `size` pixels; the last one ends where the pixels do."""
    step = tile - min(MIN_OVERLAP, tile // 2)
    return sorted({min(start, size - tile) for start in range(0, size, step)})
