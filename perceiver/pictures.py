"""Pictures of what a model looks at, the first cross-attention of an encoder over an image or a text; of what it makes.

Attention is recomputed for them; neither training nor inference ever has it in memory. A picture is a tensor (3, H, W)
of uint8, as TensorBoard and PNG take it.
"""
import math
from collections.abc import Iterator
from itertools import groupby

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import flow_to_image, make_grid

from perceiver.data import ByteTokenizer, Note

# From no attention to the most: white, amber, orange, red.
RAMP = torch.tensor([[255, 255, 255], [255, 226, 138], [252, 141, 60], [222, 45, 38]]) / 255
MARGIN, CAPTION, COLUMNS = 16, 30, 5  # pixels around parts, pixels of the line above them; tiles in a row


# ----------------------------------------------------------------------------------------------------------------------
# Attention


def attention(model: nn.Module, inputs: Tensor, latents: list[int] | None = None) -> tuple[list[int], Tensor]:
    """Where latents of a Perceiver or PerceiverIO look in one example's `inputs`, without a batch dimension: their
    numbers, and their attention (number of latents, M), the mean over heads. Default: the four most focused ones."""
    training = model.training
    model.eval()
    with torch.no_grad():
        x = model.input_adapter(inputs[None].to(model.encoder.latents.weight.device))  # (1, M, C)
        latents = most_focused(model.encoder, x) if latents is None else latents
        weights = model.encoder.attention_map(x, latents)[0].mean(0)  # (number of latents, M)
    model.train(training)
    return latents, weights.cpu()


def most_focused(encoder: nn.Module, x: Tensor, count: int = 4) -> list[int]:
    """The latents whose attention to x (1, M, C) has the lowest entropy, lowest first. Of those that look most at the
    same input, only the first is taken, as long as there are others."""
    entropies, peaks = [], []
    for part in torch.arange(len(encoder.latents.weight), device=x.device).split(64):  # not all N x M at once
        weights = encoder.attention_map(x, part)[0].mean(0)  # (64, M)
        entropies += torch.special.entr(weights).sum(-1).tolist()
        peaks += weights.argmax(-1).tolist()
    order = sorted(range(len(entropies)), key=entropies.__getitem__)
    first, others, seen = [], [], set()
    for latent in order:
        (others if peaks[latent] in seen else first).append(latent)
        seen.add(peaks[latent])
    return (first + others)[:count]


# ----------------------------------------------------------------------------------------------------------------------
# Over an image


def over_image(model: nn.Module, image: Tensor, mean: tuple[float, ...], std: tuple[float, ...],
               latents: list[int] | None = None) -> Tensor:
    """The attention of latents over an image (C, H, W) that was normalised with `mean` and `std`."""
    latents, weights = attention(model, image, latents)
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return image_tiles((image.cpu() * std + mean).clamp(0, 1), weights.unflatten(1, model.input_adapter.positions.grid),
                       latents)


def image_tiles(image: Tensor, weights: Tensor, latents: list[int]) -> Tensor:
    """An image (1 or 3, H, W) in [0, 1], then for each of K latents the image in grey under a heat map of its `weights`
    (K, h, w), each in its own scale. Small images are enlarged."""
    scale = math.ceil(320 / max(image.shape[1:]))
    image = image.expand(3, -1, -1).repeat_interleave(scale, 1).repeat_interleave(scale, 2)  # pixels stay pixels
    grey = 0.1 + 0.6 * image.mean(0).expand(3, -1, -1)
    tiles = [("input", image)]
    for latent, weight in zip(latents, weights):
        heat = F.interpolate((weight / weight.max())[None, None], image.shape[1:], mode="nearest-exact")[0, 0]  # (H, W)
        tiles.append((caption(latent, weight), torch.lerp(grey, ramp((1 + 2 * heat) / 3).movedim(-1, 0), heat.sqrt())))

    font = ImageFont.load_default(20)
    (height, width), columns = image.shape[1:], min(len(tiles), COLUMNS)
    step_x, step_y = width + MARGIN, height + CAPTION + MARGIN
    canvas = Image.new("RGB", (MARGIN + columns * step_x, MARGIN + -(-len(tiles) // columns) * step_y), "white")
    for i, (name, tile) in enumerate(tiles):
        x, y = MARGIN + i % columns * step_x, MARGIN + i // columns * step_y
        ImageDraw.Draw(canvas).text((x, y), name, "black", font)
        canvas.paste(TF.to_pil_image(tile), (x, y + CAPTION))
    return TF.pil_to_tensor(canvas)


def caption(latent: int, weight: Tensor) -> str:
    return f"latent {latent}, at most {100 * weight.max():.2g}%"


def ramp(weights: Tensor) -> Tensor:
    """Colours (..., 3) in [0, 1] of weights (...) in [0, 1]."""
    place = weights.clamp(0, 1) * (len(RAMP) - 1)
    below = place.long().clamp(max=len(RAMP) - 2)
    return torch.lerp(RAMP[below], RAMP[below + 1], (place - below)[..., None])


# ----------------------------------------------------------------------------------------------------------------------
# Over a text


def over_text(model: nn.Module, input_ids: Tensor, latents: list[int] | None = None) -> Tensor:
    """The attention of latents over a text, byte tokens (M,) without padding."""
    latents, weights = attention(model, input_ids, latents)
    return text_blocks(input_ids.tolist(), weights, latents)


def text_blocks(input_ids: list[int], weights: Tensor, latents: list[int]) -> Tensor:
    """For each of K latents the text of M byte tokens on a background that shows its `weights` (K, M), each in its own
    scale. A character of several bytes has as many stripes, a masked byte is a _, a line's end an empty cell."""
    line_height, max_width = 32, 1280
    font, small = ImageFont.load_default(22), ImageFont.load_default(20)
    cells, x, y = [], MARGIN, CAPTION  # of characters: (text, number of tokens, x, y, width)
    for text, count in characters(input_ids):
        width = math.ceil(font.getlength(text)) + 1
        if x + width > max_width - MARGIN and text != LINE_END:
            x, y = MARGIN, y + line_height
        cells.append((text, count, x, y, width))
        x, y = (MARGIN, y + line_height) if text == LINE_END else (x + width, y)
    width = max(400, MARGIN + max(x + width for _, _, x, _, width in cells))
    step = max(y for _, _, _, y, _ in cells) + line_height + MARGIN
    canvas = Image.new("RGB", (width, MARGIN + len(latents) * step), "white")
    draw = ImageDraw.Draw(canvas)
    for block, (latent, weight) in enumerate(zip(latents, weights)):
        top = MARGIN + block * step
        draw.text((MARGIN, top), caption(latent, weight), "black", small)
        colours = iter((255 * ramp(weight / weight.max())).round().int().tolist())
        for text, count, x, y, width in cells:
            for i in range(count):
                left, right = x + i * width // count, x + (i + 1) * width // count - 1
                draw.rectangle((left, top + y, right, top + y + line_height - 3), tuple(next(colours)))
            draw.text((x, top + y + 1), text, "black", font)
    return TF.pil_to_tensor(canvas)


LINE_END = "  "
BLANKS = {"\n": LINE_END, "\t": "    "}


def characters(input_ids: list[int]) -> Iterator[tuple[str, int]]:
    """What to draw for byte tokens, character by character, with the number of tokens that each stands for."""
    tokenizer = ByteTokenizer()
    for special, run in groupby(input_ids, lambda token: token < tokenizer.OFFSET):
        if special:
            yield from (("_", 1) for _ in run)
            continue
        text = bytes(token - tokenizer.OFFSET for token in run).decode("utf-8", "surrogateescape")
        for character in text:
            shown = character if character.isprintable() else BLANKS.get(character, "\ufffd")
            yield shown, len(character.encode("utf-8", "surrogateescape"))


# ----------------------------------------------------------------------------------------------------------------------
# Videos


def enlarged(frames: Tensor, size: int) -> Tensor:
    """Frames (T, 3, H, W) in [0, 1] as uint8, their pixels repeated if the longer side has fewer than `size`."""
    scale = math.ceil(size / max(frames.shape[2:]))
    return (255 * frames).round().byte().repeat_interleave(scale, 2).repeat_interleave(scale, 3)


def contact_sheet(*clips: Tensor) -> Tensor:
    """A row of at most 8 frames for each of the clips (T, 3, H, W) in [0, 1]."""
    some = torch.linspace(0, len(clips[0]) - 1, min(8, len(clips[0]))).round().long()
    frames = enlarged(torch.cat([clip[some] for clip in clips]), 96)
    return make_grid(frames, nrow=len(some), padding=MARGIN // 4, pad_value=255)


# ----------------------------------------------------------------------------------------------------------------------
# Music

GIVEN, NEW = (52, 101, 164), (222, 45, 38)  # blue, red


def piano_roll(notes: list[Note], num_given: int, max_width: int = 1280) -> Tensor:
    """Notes over time, the first `num_given` of them in blue, the others in red, loud ones darker. A row is a semitone,
    grey for the black keys, a line a second; every C has its name."""
    left, height = 40, 8  # of the names, of a row
    lowest, highest = (edge(note.pitch for note in notes) for edge in (min, max))
    seconds = max(note.end for note in notes)
    scale = min(64, (max_width - left) / seconds)  # pixels of a second
    width, rows = left + math.ceil(seconds * scale), range(highest + 2, lowest - 3, -1)
    canvas = Image.new("RGB", (width, len(rows) * height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for y, pitch in enumerate(rows):
        if pitch % 12 in (1, 3, 6, 8, 10):
            draw.rectangle((left, y * height, width, (y + 1) * height - 1), (240, 240, 240))
        elif pitch % 12 == 0:
            draw.text((4, y * height - 4), f"C{pitch // 12 - 1}", "black", font)
    for second in range(math.ceil(seconds)):
        draw.line((left + second * scale, 0, left + second * scale, canvas.height), (220, 220, 220))
    for number, note in enumerate(notes):
        shade = 0.6 * (1 - note.velocity / 127)  # of white
        colour = tuple(round(part + shade * (255 - part)) for part in (GIVEN if number < num_given else NEW))
        x, y = left + note.onset * scale, rows.index(note.pitch) * height
        draw.rectangle((x, y, max(x + 1, left + note.end * scale - 2), y + height - 2), colour)
    return TF.pil_to_tensor(canvas)


# ----------------------------------------------------------------------------------------------------------------------
# Images that are completed


def completions(images: Tensor, samples: Tensor) -> Tensor:
    """A grid of images (n, C, H, W) of uint8: a row as they are, one without their lower halves, and one for each of K
    `samples` (K, n, C, H, W). Small ones are enlarged."""
    given, scale = images.clone(), math.ceil(96 / max(images.shape[2:]))
    given[:, :, images.shape[2] // 2 :] = 128
    tiles = torch.cat((images, given, samples.flatten(0, 1))).expand(-1, 3, -1, -1)
    return make_grid(tiles.repeat_interleave(scale, 2).repeat_interleave(scale, 3), len(images), 4, pad_value=255)


# ----------------------------------------------------------------------------------------------------------------------
# Optical flow


def flow_rows(frames: Tensor, *flows: Tensor) -> Tensor:
    """A row for each of the frames (B, 3, H, W) in [-1, 1]: the frame, then each of the flows (B, H, W, 2) in colours
    that tell the direction; the fuller, the further, on one scale for the row. Small frames are enlarged."""
    rows = []
    for frame, *fields in zip(frames, *flows):
        colours = flow_to_image(torch.stack(fields).movedim(-1, 1).float())  # divides by the largest of them all
        rows.append(torch.cat(((frame[None] + 1) / 2, colours / 255)))  # (1 + flows, 3, H, W)
    return make_grid(enlarged(torch.cat(rows), 160), nrow=1 + len(flows), padding=MARGIN // 2, pad_value=255)
