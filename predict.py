"""Run a trained model on files: `python predict.py --ckpt runs/mnist/checkpoints/best.pt digit.png`.

The checkpoint tells what is done with the inputs: masks of a text are filled, texts or images are classified, between
frames optical flow is found, videos are given back. Results in words go to stdout, everything else that is said to
stderr; pictures, videos, sound and flow to files.
"""
import argparse
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, pairwise
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import flow_to_image
from tqdm import tqdm

from perceiver import pictures
from perceiver.architectures import MaskedLMConfig, MultimodalAutoencoderConfig, OpticalFlowConfig
from perceiver.config import Config
from perceiver.data import (ByteTokenizer, FlowDataConfig, ImageDataConfig, MaskedTextDataConfig, VideoDataConfig,
                            image_transform, read_frames, read_image, read_video, stack_frames, write_flo, write_sound,
                            write_video)
from perceiver.data.video import SUFFIXES, video_frames
from perceiver.distributed import init_ranks
from perceiver.errors import UserError, run_script
from perceiver.flow import compute_flow
from perceiver.model import PerceiverARConfig
from perceiver.pretrained import VARIANTS, load_weights, published_class_names, read_pretrained
from perceiver.tasks import (ImageClassification, MaskedLM, MultimodalAutoencoding, OpticalFlow, Task,
                             TextClassification, load_checkpoint)

MASK = b"[MASK]"
EPILOG = """\
masked language models
  INPUT is a text with masks, or a file with one. Each [MASK] stands for --mask-bytes bytes, and several in a row for
  that many times as many: the model fills bytes, it doesn't choose how many. The default, 7, leaves
  deepmind/language-perceiver the room to write "missing" here:
    python predict.py --ckpt deepmind/language-perceiver \\
      "This is an incomplete sentence where some words are [MASK]."
  For masks of different lengths, --mask-bytes 1 and a [MASK] for every byte. Printed are the text, and of each mask
  what fills it and its probability, the product of its bytes', each predicted without knowing the others.

text classifiers    INPUT is a text file, the model sees its beginning
image classifiers   INPUT is an image file
optical flow        INPUTs are two or more images, in their order, or a folder of images, or a video file. Written are
                    pictures of how each moves to the next and, of two or more images, .flo files
video autoencoders  INPUT is a video file, the model sees and hears its beginning. Printed are classes; written are a
                    video and a picture of the original beside what the model makes of it, and the sound it makes
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="what it may be depends on the model, see below; "
                        "- is a text from stdin")
    parser.add_argument("--ckpt", required=True, help="a checkpoint of train.py (.pt), the Hugging Face name of "
                        "official weights, such as deepmind/language-perceiver, or a folder or file with such weights")
    parser.add_argument("--top-k", type=int, default=5, help="classes to print; default: %(default)s")
    parser.add_argument("--mask-bytes", type=int, default=7, help="that a [MASK] stands for; default: %(default)s")
    parser.add_argument("--attention", action="store_true", help="write a picture of what some latents look at")
    parser.add_argument("--latents", metavar="0,1,2", help="by number, the latents in the picture; default: the four "
                        "whose attention is the most focused")
    parser.add_argument("--out", default="predictions", help="folder of what is written; default: %(default)s")
    parser.add_argument("--variant", default=VARIANTS[0], choices=VARIANTS, help="of official weights: how they are "
                        "used, as by DeepMind's code or by the Hugging Face port; default: %(default)s")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return parser.parse_args()


# ----------------------------------------------------------------------------------------------------------------------
# One function for each kind of model


def fill_masks(task: MaskedLM, model: nn.Module, args: argparse.Namespace) -> None:
    """The text with its masks filled, and what each of them got."""
    tokenizer, max_seq_len = ByteTokenizer(), task.config.model.input.max_seq_len
    for source, name in progress(args.inputs):
        text = source.encode("utf-8", "surrogateescape")
        if MASK not in text and (source == "-" or os.path.exists(source)):
            text = read_text(source)
        if MASK not in text:
            raise UserError(f"{shorten(source)} holds no {MASK.decode()} to fill, and is no file with one")
        ids, spans = [], []
        for i, piece in enumerate(re.split(rb"((?:\[MASK\])+)", text)):  # text, masks in a row, text, ...
            start = len(ids)
            ids += [tokenizer.MASK] * (args.mask_bytes * piece.count(MASK)) if i % 2 else tokenizer.encode(piece)
            spans += [slice(start, len(ids))] if i % 2 else []
        if len(ids) > max_seq_len:
            raise UserError(f"{shorten(source)} has {len(ids)} bytes, the model takes {max_seq_len}")
        input_ids = torch.tensor(ids, device=args.device)
        places = (input_ids == tokenizer.MASK).nonzero()[:, 0]
        logits = model(input_ids[None], output_positions=places)[0, :, tokenizer.OFFSET :]  # no special tokens
        best, byte = logits.float().log_softmax(-1).max(-1)
        filled = input_ids.index_put((places,), byte + tokenizer.OFFSET).tolist()
        log_probs = torch.zeros(len(ids), device=args.device).index_put((places,), best)
        say(tokenizer.decode(filled),
            *(f"  {tokenizer.decode(filled[span])!r}, probability {log_probs[span].sum().exp():.3g}" for span in spans))
        if args.attention:
            save(pictures.over_text(model, input_ids, args.latents), name, args)


def classify_texts(task: TextClassification, model: nn.Module, args: argparse.Namespace) -> None:
    max_seq_len = task.config.model.input.max_seq_len
    for file, name in progress(args.inputs):
        text = read_text(file)
        if not text:
            raise UserError(f"{file} is empty")
        if len(text) > max_seq_len:
            tell(f"{file} has {len(text)} bytes, of which the model sees the first {max_seq_len}")
        input_ids = torch.tensor(ByteTokenizer().encode(text[:max_seq_len]), device=args.device)
        say(file, *ranking(model(input_ids[None])[0], task, args.top_k))
        if args.attention:
            save(pictures.over_text(model, input_ids, args.latents), name, args)


def classify_images(task: ImageClassification, model: nn.Module, args: argparse.Namespace) -> None:
    image_shape = task.config.model.input.image_shape
    transform = image_transform(task.config.data, image_shape)
    for file, name in progress(args.inputs):
        image = transform(read_image(file, image_shape[2])).to(args.device)
        say(file, *ranking(model(image[None])[0], task, args.top_k))
        if args.attention:
            save(task.attention(model, image, args.latents), name, args)


def find_flow(task: OpticalFlow, model: nn.Module, args: argparse.Namespace) -> None:
    """Pictures of the flow from each frame to the next, and .flo files if the frames were named one by one."""
    if args.attention:
        raise UserError("--attention is for texts and images; there is no picture of it over two frames")
    for name, frames in frame_pairs(args.inputs):
        flow = compute_flow(model, frames.to(args.device), task.config.model.input.frame_shape).cpu()  # (H, W, 2)
        with output(args, f"{name}-flow.png") as path:
            to_pil_image(flow_to_image(flow.movedim(-1, 0))).save(path)
        if len(args.inputs) > 1:
            with output(args, f"{name}-flow.flo") as path:
                write_flo(path, flow)


def frame_pairs(inputs: list[str]) -> Iterator[tuple[str, Tensor]]:
    """A name, and a frame with the next one, (2, 3, H, W) in [-1, 1], of image files, a folder of them, or a video."""
    source = Path(inputs[0])
    if len(inputs) == 1 and source.suffix.lower() in SUFFIXES:
        number = 0
        for number, pair in enumerate(pairwise(tqdm(video_frames(source), unit=" frames")), 1):
            names = [f"frame {number + i} of {source}" for i in range(2)]
            yield f"{source.stem}-{number:05}", stack_frames(names, pair)
        if number == 0:
            raise UserError(f"{source} has a single frame; optical flow is between two")
        return
    if len(inputs) == 1 and source.is_dir():
        files = [str(file) for file in source.iterdir() if file.suffix.lower() in Image.registered_extensions()]
        inputs = sorted(files, key=lambda file: [int(part) if part.isdigit() else part
                                                 for part in re.split(r"(\d+)", file)])  # 9.png, 10.png
    if not source.exists():
        raise UserError(f"cannot read {source}: No such file or directory")
    if len(inputs) < 2:
        raise UserError(f"optical flow is between two images of one size, or more; {source} "
                        f"{f'holds {len(inputs)}' if source.is_dir() else 'is one'}")
    for (file, name), following in zip(progress(inputs[:-1]), inputs[1:]):
        yield name, read_frames([file, following])


def reconstruct_videos(task: MultimodalAutoencoding, model: nn.Module, args: argparse.Namespace) -> None:
    """Classes, and the clip beside what the model makes of it: a video, a picture of some frames, the sound."""
    rate, sample_rate = task.shape.frame_rate, task.shape.sample_rate
    if args.attention:
        raise UserError("--attention is for texts and images; there is no picture of it over a video")
    for file, name in progress(args.inputs):
        image, audio = read_video(file, task.shape)
        if audio is None:
            tell(f"{file} has no sound: the model gets silence")
            audio = torch.zeros(task.shape.num_samples, 1)
        image_again, audio_again, logits = task.reconstruct(model, image, audio)
        say(file, *ranking(logits, task, args.top_k))
        with output(args, f"{name}-reconstruction.png") as path:
            to_pil_image(pictures.contact_sheet(image, image_again)).save(path)
        with output(args, f"{name}-reconstruction.wav") as path:
            write_sound(path, audio_again, sample_rate)
        with output(args, f"{name}-reconstruction.mp4") as path:
            both = pictures.enlarged(torch.cat((image, image_again), dim=-1), 448)
            write_video(path, both, rate, audio_again, sample_rate)


PREDICTORS = {MaskedLM: fill_masks, TextClassification: classify_texts, ImageClassification: classify_images,
              OpticalFlow: find_flow, MultimodalAutoencoding: reconstruct_videos}


# ----------------------------------------------------------------------------------------------------------------------
# What they have in common


def load(source: str, variant: str, device: torch.device) -> tuple[Task, nn.Module]:
    """A model, ready to be used, and the task that it is for."""
    if Path(source).suffix == ".pt":
        return load_checkpoint(source, device)
    config, state = read_pretrained(source, variant)
    if isinstance(config, PerceiverARConfig):
        raise UserError(f"{source} is a Perceiver AR: use generate.py")
    model = config.build()
    load_weights(model, state, source)
    if isinstance(config, MaskedLMConfig):
        task = MaskedLM(Config("masked_lm", config, MaskedTextDataConfig()))
    elif isinstance(config, OpticalFlowConfig):
        task = OpticalFlow(Config("optical_flow", config, FlowDataConfig()))
    elif isinstance(config, MultimodalAutoencoderConfig):
        task = MultimodalAutoencoding(Config("multimodal_autoencoding", config, VideoDataConfig()))
        task.class_names = published_class_names(source, config.input.num_classes)
    else:
        task = ImageClassification(Config("image_classification", config, ImageDataConfig(path=source)))  # as ImageNet
        task.class_names = published_class_names(source, config.num_classes)
    return task, model.to(device).eval()


def parse_latents(text: str, num_latents: int) -> list[int]:
    try:
        latents = [int(number) for number in text.split(",")]
    except ValueError:
        latents = []
    if not latents or not all(0 <= latent < num_latents for latent in latents):
        raise UserError(f"--latents {text} must be numbers from 0 to {num_latents - 1}, like 0,1,2")
    return latents


def read_text(source: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {shorten(source)}: {getattr(error, 'strerror', None) or error}") from None


def shorten(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def ranking(logits: Tensor, task: Task, top_k: int) -> list[str]:
    """Lines with the likeliest classes of logits (E,)."""
    top = logits.float().softmax(-1).topk(min(top_k, len(logits)))
    return [f"  {prob:7.2%}  {task.class_names[label] if task.class_names else f'class {label}'}"
            for prob, label in zip(top.values.tolist(), top.indices.tolist())]


def save(picture: Tensor, name: str, args: argparse.Namespace) -> None:
    """Writes a picture (3, H, W) of attention to the folder --out."""
    with output(args, f"{name}-attention.png") as path:
        to_pil_image(picture).save(path)


@contextmanager
def output(args: argparse.Namespace, name: str) -> Iterator[Path]:
    """The file of this name in the folder --out, to be written."""
    path = Path(args.out) / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    tell(f"wrote {path}")


def progress(inputs: list[str]) -> Iterator[tuple[str, str]]:
    """The inputs, each with a name of its own for what is written about it; a bar, if they are several."""
    used = set()
    with tqdm(inputs, disable=len(inputs) == 1) as bar:
        for source in bar:
            stem = Path(source).stem if os.path.isfile(source) else "text"
            name = next(name for n in count(1) if (name := stem if n == 1 else f"{stem}-{n}") not in used)
            used.add(name)
            yield source, name


def say(*lines: str) -> None:
    tqdm.write("\n".join(lines), sys.stdout)


def tell(line: str) -> None:
    tqdm.write(line, sys.stderr)


def main(args: argparse.Namespace) -> None:
    for name in ("top_k", "mask_bytes"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if args.latents is not None and not args.attention:
        raise UserError(f"--latents {args.latents} are those of a picture: it needs --attention")
    args.device = init_ranks(args.device).device
    task, model = load(args.ckpt, args.variant, args.device)
    if type(task) not in PREDICTORS:
        raise UserError(f"{args.ckpt} is a checkpoint of task {task.config.task}: use generate.py")
    if args.latents is not None:
        args.latents = parse_latents(args.latents, task.config.model.num_latents)
    with torch.inference_mode():
        PREDICTORS[type(task)](task, model, args)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    run_script(lambda: main(parse_args()))
