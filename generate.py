"""Continue a prompt with a Perceiver AR: `python generate.py --ckpt runs/clm --prompt "def "`.

The text goes to stdout while the model generates it; everything else goes to stderr. A model of music continues a MIDI
file: `python generate.py --ckpt runs/music --prompt piece.mid --out longer.mid --piano-roll longer.png`. A model of
images completes the lower half of an image:
`python generate.py --ckpt runs/image_ar --prompt digit.png --out digits.png`.
"""

import argparse
import os
import shutil
import time

import torch

from perceiver import int8
from perceiver.distributed import find_device
from perceiver.errors import UserError, explaining_memory, run_script
from perceiver.io import check_counts, check_options, tell
from perceiver.model import PerceiverAR
from perceiver.pretrained import load_model


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--ckpt",
        required=True,
        help="a run folder or checkpoint of train.py, or published weights: "
        "krasserm/perceiver-ar-clm-base, krasserm/perceiver-ar-sam-giant-midi, a folder, or a file",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="the text to continue, or - for stdin; music and images: a file")
    source.add_argument("--prompt-file", help="a file that holds the prompt")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=512,
        help="number of tokens to generate; default: %(default)s; images are always completed",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 always takes the most likely token; default: %(default)s"
    )
    parser.add_argument("--top-k", type=int, help="sample from the K most likely tokens; default: from all")
    parser.add_argument(
        "--top-p", type=float, help="sample from the fewest tokens with total probability P or more; default: from all"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed; sample i uses seed + i; default: %(default)s")
    parser.add_argument(
        "--num-samples", type=int, default=1, help="several samples are printed at the end; default: %(default)s"
    )
    parser.add_argument(
        "--stride",
        type=int,
        help="number of tokens between two moves of the window; default: half the number of latents",
    )
    parser.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="text: end before TEXT, which may be given several times; for a model of token ids, TEXT is ids such as "
        "'17 4'. A sample also ends at the tokenizer's end-of-text token",
    )
    parser.add_argument("--no-prompt", action="store_true", help="text: leave the prompt out of the output")
    parser.add_argument("--json", action="store_true", help="print one line of JSON per sample")
    parser.add_argument("--tokenizer", help="text: a tokenizer.json; default: the model's own tokenizer")
    parser.add_argument(
        "--out",
        help="the file to write; music: default continuation.mid, numbered if there are several samples; "
        "images: default completion.png",
    )
    parser.add_argument("--piano-roll", metavar="PNG", help="music: also write a picture of the notes")
    parser.add_argument(
        "--prompt-seconds", metavar="S", type=float, help="music: use only the first S seconds of the prompt"
    )
    parser.add_argument("--no-kv-cache", action="store_true", help="run the model on the whole window for every token")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "int8"),
        help="data type of the weights; default: %(default)s; "
        "bfloat16 is for GPUs, int8 for one sample on a CPU with --compile",
    )
    parser.add_argument(
        "--compile", action="store_true", help="use torch.compile: the first token takes 20 s, others are faster"
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="auto takes CUDA if there is a GPU; default: %(default)s",
    )
    return parser.parse_args()


def main(args: argparse.Namespace):
    check_counts(args, "max_new_tokens", "num_samples")
    device = find_device(args.device)
    if args.compile and device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise UserError("--compile needs a C++ compiler: install g++, or name one in the environment variable CXX")
    if args.dtype == "int8" and not args.compile:
        raise UserError("--dtype int8 without --compile is slower than float32: add --compile")
    task, model = load_model(args.ckpt, device)
    check_options(task, args, ("tokenizer", "out", "piano_roll", "stop", "no_prompt", "prompt_seconds"))
    if isinstance(model, PerceiverAR):
        if args.dtype == "int8":
            int8.quantize(model)
        else:
            model.to(getattr(torch, args.dtype))
    start = time.perf_counter()
    advice = f"--num-samples {args.num_samples}: fewer need less memory, and so do --dtype bfloat16 and --device cpu"
    with explaining_memory(advice):
        task.generate(model, args)
    seconds = time.perf_counter() - start
    count = getattr(task, "num_sampled", 0)
    if count:
        tell(f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
