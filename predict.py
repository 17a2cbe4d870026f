"""Run a trained model on files: `python predict.py --ckpt runs/mnist digit.png`.

The task of the checkpoint decides what the model does: it fills in the masks of a text, classifies texts or images,
computes the optical flow between frames, or reconstructs a video. Text results go to stdout, remarks to stderr,
pictures and other results to files.
"""

import argparse
import sys

import torch

from perceiver.distributed import find_device
from perceiver.errors import UserError, explaining_memory, run_script
from perceiver.io import check_counts, check_options
from perceiver.pretrained import VARIANTS, load_model

EPILOG = """\
masked language models
  INPUT is a text with masks, or a file with such a text. Each [MASK] stands for --mask-bytes bytes: the model chooses
  the bytes, but not their number. The default is 7, the length of the word "missing", which fits here:
    python predict.py --ckpt deepmind/language-perceiver \\
      "This is an incomplete sentence where some words are [MASK]."
  For masks of different lengths, use --mask-bytes 1 and one [MASK] per byte. The output is the filled text and, for
  each mask, its bytes and their probability. The model predicts each byte without knowing the others; the probability
  of a mask is the product over its bytes.

text classifiers    INPUT is a text file, a folder of text files, or a text of two or more words; the model sees its
                    start
image classifiers   INPUT is an image file or a folder of images
optical flow        INPUTs are two or more images in order, a folder of images, or a video file. Writes pictures of the
                    flow from each frame to the next. For two or more image files, also writes .flo files
video autoencoders  INPUT is a video file or a folder of videos; the model sees and hears the start of each. Prints
                    classes. Writes a video and a picture of the original beside its reconstruction, and the
                    reconstructed sound
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="depends on the model, see below; - reads a text from stdin"
    )
    parser.add_argument(
        "--ckpt",
        required=True,
        help="a run folder or checkpoint of train.py, or published weights: "
        "a Hugging Face name such as deepmind/language-perceiver, a folder, or a file",
    )
    parser.add_argument("--top-k", type=int, default=5, help="number of classes to print; default: %(default)s")
    parser.add_argument("--mask-bytes", type=int, default=7, help="number of bytes for a [MASK]; default: %(default)s")
    parser.add_argument("--limit", metavar="N", type=int, help="at most N inputs, or frames of a video; default: all")
    parser.add_argument("--json", action="store_true", help="print one line of JSON per result")
    parser.add_argument("--attention", action="store_true", help="write a picture of the attention of some latents")
    parser.add_argument(
        "--latents",
        metavar="0,1,2",
        help="the latents in that picture; default: the four with the most focused attention",
    )
    parser.add_argument("--out", default="predictions", help="folder for output files; default: %(default)s")
    parser.add_argument(
        "--variant",
        default=VARIANTS[0],
        choices=VARIANTS,
        help="DeepMind's weights: compute as DeepMind's code or as the Hugging Face port; default: %(default)s",
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="auto takes CUDA if there is a GPU; default: %(default)s",
    )
    return parser.parse_args()


def parse_latents(text: str, num_latents: int) -> list[int]:
    """The indices in a text like "0,1,2". Raises UserError if one is not the index of a latent."""
    try:
        latents = [int(number) for number in text.split(",")]
    except ValueError:
        latents = []
    if not latents or min(latents) < 0 or max(latents) >= num_latents:
        raise UserError(f"--latents {text} must be numbers from 0 to {num_latents - 1}, like 0,1,2")
    return latents


def main(args: argparse.Namespace):
    check_counts(args, "top_k", "mask_bytes", "limit")
    if args.latents is not None and not args.attention:
        raise UserError(f"--latents {args.latents} selects latents for the picture of --attention: add --attention")
    task, model = load_model(args.ckpt, find_device(args.device), args.variant)
    check_options(task, args, ("attention",))
    if args.latents is not None:
        args.latents = parse_latents(args.latents, task.config.model.num_latents)
    with explaining_memory("Give fewer or smaller inputs, or use --device cpu"), torch.inference_mode():
        task.predict(model, args)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    run_script(lambda: main(parse_args()))
