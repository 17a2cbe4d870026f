"""The rows of compare.py: which work each of them times, and on which inputs."""
from dataclasses import dataclass

import torch
from torch import Tensor

TOKENS = 16  # timed tokens of a decoding row
PREFIX = {512: 256, 3500: 3072}  # decoding: tokens of the prompt, and how many of them are not latents


@dataclass
class Row:
    work: str  # a description
    model: str  # the method of the sides that builds the model; a side without it does not have the row
    kind: str  # train: a training step. forward. decode: a token. start: a process up to its first training step
    parameters: int  # of our model
    prompt: int = 0  # decode: tokens
    compiled: bool = False  # decode: whether our side compiles


AR = "AR, T 2048, N 512, 512 channels, 8 layers"
DECODE = "AR, T 4096, cached token after a prompt of {} tokens"
ROWS = {
    "ar-train": Row(f"{AR}, prefix dropout 0.5: training step", "ar", "train", 29_514_502),
    "mlm-forward": Row("masked LM, a text of 2048 bytes: forward", "mlm", "forward", 201_108_230),
    "mlm-train": Row("masked LM, a text of 2048 bytes: training step", "mlm", "train", 201_108_230),
    "imagenet-forward": Row("ImageNet Fourier, an image: forward", "imagenet", "forward", 48_440_627),
    "imagenet-train": Row("ImageNet Fourier, an image: training step", "imagenet", "train", 48_440_627),
    "mnist-train": Row("MNIST, 64 images, attention dropout 0.1: training step", "mnist", "train", 907_212),
    "flow-forward": Row("optical flow, 368 x 496: forward", "flow", "forward", 41_057_134),
    "video-forward": Row("video autoencoder, 1/128 of the outputs: forward", "video", "forward", 19_858_855),
    "decode-512": Row(DECODE.format(512), "decode", "decode", 30_563_078, 512),
    "decode-512-compiled": Row(DECODE.format(512) + ", ours compiled", "decode", "decode", 30_563_078, 512, True),
    "decode-3500": Row(DECODE.format(3500), "decode", "decode", 30_563_078, 3500),
    "decode-3500-compiled": Row(DECODE.format(3500) + ", ours compiled", "decode", "decode", 30_563_078, 3500, True),
    "start-up": Row(f"{AR}: from `python` to the end of the first training step", "ar", "start", 29_514_502),
}


def make_inputs(row: Row, device) -> Tensor | dict[str, Tensor]:
    """The inputs of our model. Both sides get the same."""
    random = torch.Generator().manual_seed(0)
    if row.kind == "decode":
        return torch.randint(262, (row.prompt,), generator=random).to(device)
    if row.model in ("ar", "mlm"):
        return torch.randint(262, (1, 2048), generator=random).to(device)
    if row.model == "video":
        shapes = {"image": (1, 16, 3, 224, 224), "audio": (1, 30720, 1), "label": (1, 700)}
        return {name: torch.rand(shape, generator=random).to(device) for name, shape in shapes.items()}
    shape = {"imagenet": (1, 3, 224, 224), "mnist": (64, 1, 28, 28), "flow": (1, 2, 3, 368, 496)}[row.model]
    return (torch.rand(shape, generator=random) * 2 - 1).to(device)


def video_outputs(device) -> dict[str, Tensor | None]:
    """The outputs of the video autoencoder that a forward computes: a 128th of the pixels and sound, and the label."""
    return {"image": torch.arange(6272, device=device), "audio": torch.arange(15, device=device), "label": None}
