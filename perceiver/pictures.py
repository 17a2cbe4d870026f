"""Pictures for TensorBoard and PNG files: tensors (3, H, W) of uint8.

A picture of attention shows the first cross-attention of an encoder over an image or a text. It computes the attention
weights again, because a forward pass does not keep them. The model must be in evaluation mode.
"""

import math

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2.functional import pil_to_tensor, to_dtype, to_pil_image
from torchvision.utils import flow_to_image, make_grid

from perceiver.data import ByteTokenizer

MARGIN = 16  # pixels around tiles
CAPTION = 30  # height of a caption
RED = torch.tensor([222.0, 45.0, 38.0])


def enlarge(images, size):
    """Images (..., H, W), floats in [0, 1] or uint8, as uint8. Repeats pixels until the longer side reaches `size`."""
    images = to_dtype(images, torch.uint8, scale=True)
    longer = max(images.shape[-2:])
    scale = math.ceil(size / longer)
    images = images.repeat_interleave(scale, -2)
    return images.repeat_interleave(scale, -1)


def blank(size, font_size):
    """A white image of `size` (width, height), and its ImageDraw."""
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    draw.font = ImageFont.load_default(font_size)
    return canvas, draw


def captioned(tiles, captions, columns):
    """A grid of tiles (1 or 3, H, W) of uint8, all of one size, each below its caption; `columns` tiles in a row."""
    _, height, width = tiles[0].shape
    size = (width + MARGIN, CAPTION + height + MARGIN)
    cells = []
    for tile, caption in zip(tiles, captions):
        cell, draw = blank(size, font_size=16)
        draw.text((0, 0), caption, "black")
        cell.paste(to_pil_image(tile), (0, CAPTION))
        cells.append(pil_to_tensor(cell))
    grid = make_grid(cells, columns, padding=0, pad_value=255)
    return F.pad(grid, (MARGIN, 0, MARGIN, 0), value=255)


# ----------------------------------------------------------------------------------------------------------------------
# Attention


def attention(model, inputs, latents=None):
    """The attention weights (M,) of some latents over one example, averaged over heads: a dict by latent.

    `model` is a Perceiver or PerceiverIO. `inputs` have no batch dimension. `latents` are indices; default: the four
    most focused latents.
    """
    inputs = inputs.to(model.encoder.latents.weight.device)
    x = model.input_adapter(inputs[None])  # (1, M, C)
    weights = model.encoder.attention_map(x)  # (1, H, N, M)
    weights = weights[0].mean(0).cpu()
    latents = latents or most_focused(weights)
    return {latent: weights[latent] for latent in latents}


def most_focused(weights, count=4):
    """The `count` latents whose attention `weights` (N, M) have the lowest entropy, lowest first.

    If several latents have the same strongest input, only the first of them keeps its place; the others go to the end,
    because their pictures look alike.
    """
    entropies = torch.special.entr(weights).sum(-1)
    order = entropies.argsort(stable=True).tolist()
    strongest = weights.argmax(-1).tolist()
    distinct = {}  # the first latent of each strongest input
    for latent in order:
        distinct.setdefault(strongest[latent], latent)
    latents = dict.fromkeys([*distinct.values(), *order])
    return list(latents)[:count]


def heat(weights):
    """The attention `weights` (M,) of a latent as strengths (M,) of a color, in [0, 1].

    Uniform attention, 1 / M, and less have strength 0. The largest weight has strength 1 if it is at least 10 times
    uniform (M times, if M is below 10). Otherwise it is paler, so untrained latents stay pale.
    """
    ratio = weights * len(weights)
    full = max(ratio.max(), min(10, len(weights)), 2)  # 2: no division by zero if M is 1
    strength = (ratio - 1) / (full - 1)
    return strength.clamp(0, 1)


def attention_captions(maps):
    captions = []
    for latent, weights in maps.items():
        peak = weights.max() * len(weights)
        captions.append(f"latent {latent}: at most {peak:.3g}x uniform")
    return captions


def over_image(model, image, normalize, latents=None):
    """A picture of the attention of latents over an image (C, H, W), normalized by `normalize`."""
    std = torch.tensor(normalize.std)[:, None, None]
    mean = torch.tensor(normalize.mean)[:, None, None]
    original = image.cpu() * std + mean
    maps = attention(model, image, latents)
    grid = model.input_adapter.positions.grid
    return draw_attention_over_image(original.clamp(0, 1), maps, grid)


def draw_attention_over_image(image, maps, grid):
    """A picture of an image (1 or 3, H, W) in [0, 1], and for each latent a heat map over the image.

    `maps` holds the attention (M,) of each latent. The M inputs lie on `grid`, rows and columns that cover the image.
    """
    image = enlarge(image, 320)
    gray = 25 + 0.6 * image.float().mean(0)  # (H, W)
    red = RED[:, None, None]
    tiles = [image]
    for weights in maps.values():
        strength = heat(weights).view(1, 1, *grid)
        strength = F.interpolate(strength, gray.shape, mode="nearest-exact")
        tile = torch.lerp(gray, red, strength[0])  # (3, H, W)
        tiles.append(tile.byte())
    return captioned(tiles, ["input", *attention_captions(maps)], columns=5)


# Pictures of texts: sizes in pixels
FONT_SIZE = 22
LINE_HEIGHT = 32
LINE_WIDTH = 1248
BLANKS = {"\n": "  ", "\t": "    "}  # drawn instead of these characters


def over_text(model, input_ids, latents=None):
    """A picture of the attention of latents over a text: byte tokens (M,) without padding."""
    maps = attention(model, input_ids, latents)
    return draw_attention_over_text(input_ids.tolist(), maps)


def draw_attention_over_text(input_ids, maps):
    """A picture with the text of M byte tokens, once for each latent of `maps`. The background shows the attention.

    A character of several bytes has one stripe per byte. A masked byte is drawn as _, a line break as a blank.
    """
    boxes = list(layout(input_ids))
    right = max(x + width for x, _, width, _ in boxes)
    bottom = boxes[-1][1] + LINE_HEIGHT
    size = (max(368, right), bottom)
    tiles = []
    for weights in maps.values():
        colors = 255 + heat(weights)[:, None] * (RED - 255)  # (M, 3)
        canvas, draw = blank(size, FONT_SIZE)
        for (x, y, width, _), color in zip(boxes, colors.int().tolist()):
            corner = (x + width - 1, y + LINE_HEIGHT - 3)
            draw.rectangle((x, y, *corner), tuple(color))
        for x, y, _, text in boxes:
            draw.text((x, y + 1), text, "black")
        tiles.append(pil_to_tensor(canvas))
    return captioned(tiles, attention_captions(maps), columns=1)


def layout(input_ids):
    """Yields x, y, width and text of each byte token. The text is "" after the first byte of a character."""
    font = ImageFont.load_default(FONT_SIZE)
    x = 0
    y = 0
    for text, num_bytes in characters(input_ids):
        width = font.getlength(text) / num_bytes
        width = math.ceil(width) + 1
        ends_line = text == BLANKS["\n"]
        if x + num_bytes * width > LINE_WIDTH and not ends_line:
            x = 0
            y += LINE_HEIGHT
        for number in range(num_bytes):
            yield x, y, width, text if number == 0 else ""
            x += width
        if ends_line:
            x = 0
            y += LINE_HEIGHT


def characters(input_ids):
    """Yields the text to draw for each character of byte tokens, and the number of its tokens."""
    offset = ByteTokenizer.OFFSET
    data = bytes(token - offset if token >= offset else ord("_") for token in input_ids)
    for character in data.decode("utf-8", "surrogateescape"):
        encoded = character.encode("utf-8", "surrogateescape")
        if not character.isprintable():
            character = BLANKS.get(character, "\ufffd")
        yield character, len(encoded)


# ----------------------------------------------------------------------------------------------------------------------
# Confusion matrix


def confusion_matrix(counts, names):
    """A picture of `counts` (E, E): a row for each class, a column for each answer, darker for more of the row.

    Up to 40 classes have names and numbers; the cells of more classes are small squares.
    """
    num_classes = len(counts)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    labelled = num_classes <= 40
    cell = 40 if labelled else max(1, 1000 // num_classes)
    names = [name if len(name) <= 20 else f"{name[:17]}..." for name in names] if labelled else []
    font = ImageFont.load_default(12)
    left = 2 * MARGIN + math.ceil(max([font.getlength(name) for name in names], default=0))
    top = 2 * CAPTION
    canvas, draw = blank((left + num_classes * cell + MARGIN, top + num_classes * cell + MARGIN), font_size=12)
    draw.text((left, 8), "rows: the class; columns: the model's answer", "black")
    colors = (255 + shares[..., None] * (RED - 255)).byte()  # (E, E, 3)
    squares = colors.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
    canvas.paste(to_pil_image(squares.movedim(-1, 0)), (left, top))
    for row, name in enumerate(names):
        draw.text((MARGIN, top + row * cell + cell // 3), name, "black")
        draw.text((left + row * cell + 4, top - 20), name[:5], "black")
        for column, count in enumerate(counts[row].tolist()):
            if count:
                draw.text((left + column * cell + 4, top + row * cell + cell // 3), str(count), "black")
    return pil_to_tensor(canvas)


# ----------------------------------------------------------------------------------------------------------------------
# Images, videos, optical flow


def completions(images, samples):
    """Rows of images (n, C, H, W) of uint8: the originals, their upper halves, and K `samples` (K, n, C, H, W)."""
    half = images.shape[2] // 2
    given = images.clone()
    given[:, :, half:] = 128
    rows = torch.stack((images, given, *samples))  # (2 + K, n, C, H, W)
    rows = enlarge(rows, 96)
    rows = F.pad(rows, (0, 4), value=255)  # a gap after each image
    rows = rows.movedim(1, 3).flatten(3)  # (2 + K, C, H, n * W)
    captions = ["original", "upper half"]
    captions += [f"sample {number + 1}" for number in range(len(samples))]
    return captioned(rows, captions, columns=1)


def contact_sheet(*clips):
    """A row of at most 8 frames for each clip (T, 3, H, W) in [0, 1]."""
    step = math.ceil(len(clips[0]) / 8)
    rows = [clip[::step] for clip in clips]
    frames = enlarge(torch.cat(rows), 96)
    return make_grid(frames, len(rows[0]), padding=4, pad_value=255)


def flow_rows(frames, *flows, titles):
    """A row for each of the frames (B, 3, H, W) in [-1, 1]: the frame, then its flows (B, H, W, 2), one for each title.

    The hue is the direction of the motion, and the saturation is its length. All flows of a row share one
    scale. The captions give the longest motion.
    """
    tiles = []
    captions = []
    for frame, *fields in zip(frames, *flows):
        fields = torch.stack(fields).float()
        colors = flow_to_image(fields.movedim(-1, 1))  # scaled by the longest motion of all fields
        tiles += [enlarge(image, 240) for image in ((frame + 1) / 2, *colors)]
        captions.append("frame")
        for title, field in zip(titles, fields):
            longest = field.norm(dim=-1).max()
            captions.append(f"{title}: up to {longest:.1f} pixels")
    return captioned(tiles, captions, columns=1 + len(flows))


# ----------------------------------------------------------------------------------------------------------------------
# Music

# Blue and red; {} is the lightness
PROMPT = "hsl(214, 60%, {}%)"
CONTINUATION = "hsl(2, 60%, {}%)"


def piano_roll(notes, num_given):
    """A picture of notes over time. The first `num_given` notes, the prompt, are blue; the continuation is red.

    A note has `onset` and `end` in seconds, and `pitch` and `velocity` as in MIDI. Louder notes are darker. A row is a
    semitone; the rows of black keys are gray, and each C has a label.
    """
    left = 40  # pixels, for the labels
    top = 20  # for the legend
    row_height = 8
    seconds = max(note.end for note in notes)
    scale = min(64, 1240 / seconds)  # pixels per second
    lowest = min(note.pitch for note in notes) - 2
    highest = max(note.pitch for note in notes) + 2
    width = left + math.ceil(max(200, seconds * scale))
    bottom = top + (highest - lowest + 1) * row_height
    canvas, draw = blank((width, bottom + 20), font_size=12)

    def draw_bar(pitch, start, end, color):
        x = left + start * scale
        y = top + (highest - pitch) * row_height
        right = max(x + 1, left + end * scale - 2)
        draw.rectangle((x, y, right, y + row_height - 2), color)

    draw.text((left, 2), "prompt", PROMPT.format(40))
    draw.text((left + 60, 2), "continuation", CONTINUATION.format(40))
    for pitch in range(lowest, highest + 1):
        octave, key = divmod(pitch, 12)
        if key in (1, 3, 6, 8, 10):
            draw_bar(pitch, 0, seconds, "whitesmoke")
        if key == 0:
            y = top + (highest - pitch) * row_height
            draw.text((4, y - 4), f"C{octave - 1}", "black")
    spacing = math.ceil(40 / scale)  # seconds between labels; a label takes up to 40 pixels
    for second in range(0, math.ceil(seconds), spacing):
        x = left + second * scale
        draw.line((x, top, x, bottom), "lightgray")
        draw.text((x, bottom + 2), f"{second} s", "black")
    for number, note in enumerate(notes):
        color = PROMPT if number < num_given else CONTINUATION
        lightness = 80 - 40 * note.velocity / 127
        draw_bar(note.pitch, note.onset, note.end, color.format(lightness))
    return pil_to_tensor(canvas)
