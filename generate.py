"""Sample from a Perceiver AR: `python generate.py --ckpt runs/clm/checkpoints/last.pt --prompt "def "`.

Only the text goes to stdout, as it is made; everything else goes to stderr. A model of music continues a MIDI file:
`python generate.py --ckpt runs/music/checkpoints/best.pt --prompt piece.mid --out longer.mid --piano-roll longer.png`.
One of images completes the lower half: `--ckpt runs/image_ar/checkpoints/best.pt --prompt digit.png --out digits.png`.
"""
import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

from perceiver import pictures
from perceiver.config import Config
from perceiver.data import (JsonTokenizer, MusicDataConfig, TextDataConfig, image_transform, music, read_image,
                            to_tokens)
from perceiver.distributed import init_ranks
from perceiver.errors import UserError, run_script
from perceiver.model import PerceiverAR
from perceiver.pretrained import find_beside, from_pretrained, read_config
from perceiver.sampling import generate, quantize
from perceiver.tasks import CausalLM, Copy, ImageSequences, SymbolicMusic, Task, load_checkpoint


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", required=True, help="a checkpoint of train.py (.pt), or published weights: krasserm/"
                        "perceiver-ar-clm-base, krasserm/perceiver-ar-sam-giant-midi, or a folder or file with them")
    parser.add_argument("--tokenizer", help="text: a tokenizer.json; default: that of the checkpoint or the weights")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="the text to continue; - reads it from stdin. Music, images: a file")
    source.add_argument("--prompt-file", help="a file with what to continue")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="default: %(default)s; images: all that lack")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    parser.add_argument("--top-k", type=int, help="draw from the K most likely tokens")
    parser.add_argument("--top-p", type=float, help="draw from the most likely tokens with total probability P")
    parser.add_argument("--seed", type=int, default=0, help="sample i of a run is sample 0 of seed + i")
    parser.add_argument("--num-samples", type=int, default=1, help="several are printed when they are complete")
    parser.add_argument("--stride", type=int, help="tokens between two re-encodings; default: half of the latents")
    parser.add_argument("--out", help="music, images: file to write; default: continuation.mid (several samples are "
                        "numbered) or completion.png")
    parser.add_argument("--piano-roll", metavar="PNG", help="music: file for a picture, with what is new in red")
    parser.add_argument("--no-kv-cache", action="store_true", help="evaluate the whole model for every token")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "int8"),
                        help="of weights; bfloat16, also of caches: for GPUs; int8: with --compile, for one sample")
    parser.add_argument("--compile", action="store_true", help="decode by torch.compile: 20 s at first, then faster")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return parser.parse_args()


def read_prompt(args: argparse.Namespace) -> str:
    """Bytes that are no UTF-8 survive as surrogates, and are bytes again in the tokenizer and in `write`."""
    try:
        if args.prompt is None:
            return Path(args.prompt_file).read_bytes().decode("utf-8", "surrogateescape")
        return sys.stdin.buffer.read().decode("utf-8", "surrogateescape") if args.prompt == "-" else args.prompt
    except OSError as error:
        raise UserError(f"cannot read --prompt-file {args.prompt_file}: {error.strerror}") from None


def write(text: str) -> None:
    sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
    sys.stdout.buffer.flush()


def sample(model: PerceiverAR, prompt: list[int], args: argparse.Namespace) -> Iterator[list[int]]:
    """The next token of every sample, `--max-new-tokens` times; on stderr, what there is to say of it."""
    if len(prompt) > model.config.max_seq_len:
        tell(f"the prompt has {len(prompt)} tokens, of which the model sees the last ones: its context is "
             f"{model.config.max_seq_len}")
    try:
        steps = generate(model, [prompt] * args.num_samples, args.max_new_tokens, args.temperature, args.top_k,
                         args.top_p, args.seed, args.stride, not args.no_kv_cache, args.compile)
    except ValueError as error:  # a prompt or a number that it does not take
        raise UserError(str(error)) from None
    start = time.perf_counter()
    for tokens in tqdm(steps, total=args.max_new_tokens, unit=" tokens", disable=sys.stdout.isatty()):
        yield tokens.tolist()
    seconds, count = time.perf_counter() - start, args.num_samples * args.max_new_tokens
    tell(f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s")


def tell(line: str) -> None:
    print(line, file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# One function for each kind of model


def continue_text(task: CausalLM, model: PerceiverAR, args: argparse.Namespace) -> None:
    """The prompt and what follows: one sample as it is made, several when they are complete."""
    if args.tokenizer is not None:
        task.tokenizer = JsonTokenizer.read(args.tokenizer)
    text, tokenizer = read_prompt(args), task.tokenizer
    prompt = tokenizer.encode(text)
    steps = sample(model, prompt, args)
    streams = [tokenizer.new_stream() for _ in range(args.num_samples)]
    for stream in streams:
        tokenizer.stream(prompt, stream, final=True)  # how a text goes on may depend on what it follows
    if args.num_samples > 1:
        samples = [text + tokenizer.stream(tokens, stream, final=True) for stream, tokens in zip(streams, zip(*steps))]
        write("\n-----\n".join(samples) + "\n")
        return
    for number, tokens in enumerate(steps):
        write((text if number == 0 else "") + tokenizer.stream(tokens, streams[0]))
    write(tokenizer.stream([], streams[0], final=True) + "\n")


def continue_music(task: SymbolicMusic, model: PerceiverAR, args: argparse.Namespace) -> None:
    """A MIDI file for each sample, the prompt and what follows."""
    prompt = music.encode(music.read_midi(args.prompt_file or args.prompt)).tolist()
    given = music.decode(prompt)
    outs = output_files(args.out or "continuation.mid", args.num_samples)
    rolls = output_files(args.piano_roll, args.num_samples, Image.registered_extensions()) if args.piano_roll else []
    for number, events in enumerate(zip(*sample(model, prompt, args))):
        notes = music.decode([*prompt, *events])
        music.write_midi(outs[number], notes)
        tell(f"wrote {outs[number]}: {len(given)} notes of the prompt and {len(notes) - len(given)} that follow")
        if rolls:
            save_picture(pictures.piano_roll(notes, len(given)), rolls[number])


def output_files(name: str, count: int, endings: Iterable[str] = (".mid", ".midi")) -> list[Path]:
    """Files to write, numbered if they are several, in a folder that is there. Raises UserError before anything is
    computed if that can't be."""
    path = Path(name)
    if path.is_dir() or path.suffix.lower() not in endings:
        raise UserError(f"cannot write {name}: it must be a file, ending in {', '.join(sorted(endings)[:12])}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {name}: {error.strerror}") from None
    return [path if count == 1 else path.with_stem(f"{path.stem}-{number}") for number in range(1, count + 1)]


def save_picture(picture: Tensor, file: Path) -> None:
    to_pil_image(picture).save(file)
    tell(f"wrote {file}")


def complete_image(task: ImageSequences, model: PerceiverAR, args: argparse.Namespace) -> None:
    """A picture: the image as it is, its upper half, and samples of the lower one."""
    shape = task.config.data.image_shape
    (out,) = output_files(args.out or "completion.png", 1, Image.registered_extensions())
    image = read_image(args.prompt_file if args.prompt is None else args.prompt, shape[2])
    tokens = to_tokens(image_transform(task.config.data, shape)(image))
    args.max_new_tokens = len(tokens) - task.num_given
    lower = torch.tensor(list(sample(model, tokens[: task.num_given].tolist(), args))).T  # (number of samples, S / 2)
    save_picture(task.picture(tokens[None], lower[:, None]), out)


GENERATORS = {CausalLM: continue_text, Copy: continue_text, SymbolicMusic: continue_music,
              ImageSequences: complete_image}
# Options that are not for all
OPTIONS = {"tokenizer": (CausalLM,), "out": (SymbolicMusic, ImageSequences), "piano_roll": (SymbolicMusic,)}


def load(args: argparse.Namespace, device: torch.device) -> tuple[Task, PerceiverAR]:
    """A model, ready to be used, and the task that it is for."""
    if Path(args.ckpt).suffix == ".pt":
        return load_checkpoint(args.ckpt, device)
    model = from_pretrained(args.ckpt)
    if not isinstance(model, PerceiverAR):
        raise UserError(f"{args.ckpt} is for predict.py; generate.py needs a Perceiver AR")
    if read_config(find_beside(args.ckpt, "config.json")).get("model_type") == "perceiver-ar-symbolic-audio-model":
        return SymbolicMusic(Config("symbolic_music", model.config, MusicDataConfig())), model.to(device)
    task = CausalLM(Config("causal_lm", model.config, TextDataConfig(holds_ids=True)))
    args.tokenizer = args.tokenizer or find_beside(args.ckpt, "tokenizer.json")
    if args.tokenizer is None:
        raise UserError(f"{args.ckpt} comes without a tokenizer.json; give one with --tokenizer")
    return task, model.to(device)


def main(args: argparse.Namespace) -> None:
    for name in ("max_new_tokens", "num_samples"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    task, model = load(args, init_ranks(args.device).device)
    if type(task) not in GENERATORS:
        raise UserError(f"{args.ckpt} is a checkpoint of task {task.config.task}, for predict.py; generate.py needs a "
                        "Perceiver AR")
    for name, tasks in OPTIONS.items():
        if getattr(args, name) is not None and type(task) not in tasks:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} is not for task {task.config.task}")
    if args.compile and not shutil.which(os.environ.get("CXX", "g++")):
        raise UserError("--compile needs a C++ compiler: install g++, or name one by the environment variable CXX")
    if args.dtype == "int8":
        if not args.compile:
            raise UserError("--dtype int8 is slower than float32 without --compile")
        quantize(model)
    else:
        model.to(getattr(torch, args.dtype))
    GENERATORS[type(task)](task, model, args)


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
