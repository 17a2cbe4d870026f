"""Compares the speed of this project with another implementation that does the same work.

    python benchmarks/compare.py [--rows train-step decode ...] [--rounds 15] [--peer krasserm] [--peer-dir DIR]

The two sides are this project ("ours") and the other implementation (the "peer"). Each side has its own process,
because krasserm's package is called `perceiver` too. The sides take turns: each does one unit of work at a time, so
other load on the machine slows both alike. Two neighboring units form a pair. The table gives the median of the ratios
of all pairs, with quartiles. `--peer ours --peer-dir DIR` compares with another checkout of this project.

A row of the table is one kind of work. Its unit:

    train-step        a training step on one example: forward, cross-entropy, backward, fused AdamW. Half of the prefix
                      is dropped
    fourier-forward   (--peer transformers) the ImageNet classifier with Fourier positions: forward on one image
    fourier-train     (--peer transformers) the same model: a training step on one image, without dropout
    decode            one greedy token after a prompt of 3500 tokens, of which the last 428 are latents. The time is a
                      mean over 16 tokens, without the encoding of the prompt
    decode-compiled   the same; our side uses --compile of generate.py

In `decode`, our side runs `Decoder`, as generate.py does. Every 256 tokens it encodes the window again, to stay exact.
krasserm's side runs the core model with its own `kv_cache` in the shortest loop: model, argmax. It slides its cache
instead, which is an approximation. krasserm's Hugging Face wrapper would take longer, and has no `generate` in
transformers 5. The floor of `decode` is the time to read all weights and all cached keys and values once. It is
measured in the same run. decode.py measures more of decoding, without a peer.

To add a row, add a name to ROWS and a branch to each side. To add a peer, write a function like `krasserm`.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.nn.functional as F

PROMPT, PREFIX, TOKENS = 3500, 3072, 16  # decode: tokens in the prompt, in the prefix, and timed
DECODE = f"AR cached token: prompt {PROMPT} of T 4096, N 512, 512 channels, 8 layers, batch 1"
ROWS = {  # name: description, number of parameters of both models
    "train-step": ("AR training step: T 2048, N 512, 512 channels, 8 layers, batch 1, prefix dropout 0.5", 29_514_502),
    "fourier-forward": ("Perceiver IO, ImageNet Fourier, 224x224, batch 1: forward", 48_440_627),
    "fourier-train": ("Perceiver IO, ImageNet Fourier, 224x224, batch 1: training step", 48_440_627),
    "decode": (DECODE, 30_563_078),
    "decode-compiled": (f"{DECODE}, ours compiled", 30_563_078),
}
PEERS = {"krasserm": ("train-step", "decode", "decode-compiled"), "transformers": ("fourier-forward", "fourier-train"),
         "ours": tuple(ROWS)}  # the rows that each peer has
INSTALL = "pip install --no-deps --ignore-requires-python --target {} perceiver-io einops fairscale"

# ----------------------------------------------------------------------------------------------------------------------
# The work. Each side is a function: row -> (model, a function that does one unit and returns the seconds that it took)


def ours(row: str, device: str):
    from perceiver.model import PerceiverAR, PerceiverARConfig

    if row == "train-step":
        config = PerceiverARConfig(vocab_size=262, max_seq_len=2048, cross_attention_dropout=0.5)
        model = PerceiverAR(config).to(device)
        return model, training(model, *next_bytes(model, device))
    if row.startswith("fourier"):
        from perceiver.config import load_config
        from perceiver.tasks import TASKS
        config = load_config(Path(__file__).parents[1] / "configs/imagenet_fourier.yaml", [], TASKS)
        return image_row(row, config.model.build().to(device), lambda model, images: model(images))

    try:
        from perceiver.decoding import Decoder
    except ImportError:  # the Decoder of older checkouts needs the number of new tokens
        from perceiver.sampling import Decoder as OldDecoder
        Decoder = partial(OldDecoder, max_new_tokens=TOKENS + 1)
    model = PerceiverAR(PerceiverARConfig(vocab_size=262)).to(device).eval()
    options = {"compile": True} if row == "decode-compiled" else {}  # older checkouts do not have this option

    def unit():
        decoder = Decoder(model, [prompt().tolist()], **options)

        def step():
            decoder.append(step.logits.argmax(-1))
            step.logits = decoder.logits()

        step.logits = decoder.logits()
        step()
        assert decoder.cached == [(0, PREFIX)]
        return timed(step, device, TOKENS)

    return model, unit


def krasserm(row: str, device: str):
    from perceiver.model.core import CausalSequenceModel, CausalSequenceModelConfig

    if row == "train-step":
        model = CausalSequenceModel(CausalSequenceModelConfig(max_seq_len=2048, cross_attention_dropout=0.5)).to(device)
        return model, training(model, *next_bytes(lambda x: model(x, prefix_len=x.shape[1] - 512).logits, device))

    model = CausalSequenceModel(CausalSequenceModelConfig()).to(device).eval()

    @torch.inference_mode()
    def unit():
        def step():
            token = step.out.logits[:, -1:].argmax(-1)
            step.out = model(token, prefix_len=PREFIX, kv_cache=step.out.kv_cache)

        step.out = model(prompt()[None].to(device), prefix_len=PREFIX, kv_cache=[])
        step()
        return timed(step, device, TOKENS)

    return model, unit


def transformers(row: str, device: str):
    from transformers import PerceiverConfig, PerceiverForImageClassificationFourier

    config = PerceiverConfig(num_latents=512, d_latents=1024, d_model=261, num_blocks=8, num_self_attends_per_block=6,
                             num_self_attention_heads=8, num_cross_attention_heads=1, num_labels=1000,
                             attention_probs_dropout_prob=0.0)
    model = PerceiverForImageClassificationFourier(config).to(device)
    return image_row(row, model, lambda model, images: model(inputs=images).logits)


def image_row(row: str, model, logits):
    """The result of a side for a row with an image classifier. `logits` is a function of the model and the images."""
    device = next(model.parameters()).device
    images, label = torch.randn(1, 3, 224, 224, device=device), torch.zeros(1, dtype=torch.long, device=device)
    if row == "fourier-train":
        return model, training(model, lambda: logits(model, images), label)
    model.eval()

    @torch.inference_mode()
    def unit():
        return timed(lambda: logits(model, images), device)

    return model, unit


def next_bytes(logits, device):
    """Arguments of `training` for a model of bytes: a function that returns the logits (512, V) of the last 512 of 2048
    positions, and their labels (512,)."""
    tokens = torch.randint(262, (1, 2049), device=device)
    return lambda: logits(tokens[:, :-1])[0], tokens[0, -512:]


def prompt(length: int = PROMPT) -> torch.Tensor:
    return torch.randint(262, (length,), generator=torch.Generator().manual_seed(0))


def training(model, logits, labels):
    """A function that does a training step and returns its seconds. `logits` is a function that runs the model."""
    device = labels.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(logits(), labels).backward()
        optimizer.step()

    return lambda: timed(step, device)


def timed(step, device, times: int = 1) -> float:
    """Seconds of one call of `step`: the mean over `times` calls."""
    sync = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    sync()
    start = time.perf_counter()
    for _ in range(times):
        step()
    sync()
    return (time.perf_counter() - start) / times


def worker(side: str, device: str) -> None:
    """Reads names of rows from stdin. For each, does one unit, and prints JSON: its seconds, the model's parameters."""
    replies, sys.stdout = sys.stdout, sys.stderr
    row = None
    for line in sys.stdin:
        if line.strip() != row:
            row = line.strip()
            torch.manual_seed(0)
            model, unit = globals()[side](row, device)
        reply = {"seconds": unit(), "parameters": sum(p.numel() for p in model.parameters())}
        print(json.dumps(reply), file=replies, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# The comparison


class Side:
    """The worker process of a side. A call makes it do one unit of a row."""

    def __init__(self, name: str, package_dir: Path, args):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", name, "--device", args.device], text=True,
            env=os.environ | {"PYTHONPATH": str(package_dir)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, row: str) -> dict:
        print(row, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        return json.loads(line) if line else sys.exit(f"{self.process.args} ended; its error is above")


def decode_bytes(num_parameters: int, batch_size: int = 1, weight_bytes: int = 4, cache_bytes: int = 4) -> int:
    """Bytes that a decoding step reads: the parameters, with one row of the position table, and all keys and values."""
    keys = PROMPT + TOKENS // 2 + 8 * (PROMPT + TOKENS // 2 - PREFIX)
    return weight_bytes * (num_parameters - (4096 - 1) * 512) + cache_bytes * batch_size * 2 * 512 * keys


def reading_time(num_bytes: int, device: str) -> float:
    """Seconds to read `num_bytes` of memory once: the best of five passes."""
    memory = torch.ones(num_bytes // 4096, 1024, device=device)  # float32
    return min(timed(lambda: memory.sum(1), device) for _ in range(5))


def machine(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="default: all rows that the peer has")
    parser.add_argument("--rounds", type=int, default=15, help="number of timed pairs per row")
    parser.add_argument("--peer", choices=PEERS, default="krasserm")
    parser.add_argument("--peer-dir", type=Path, default=Path("/tmp/peer-krasserm"), help="holds the peer's package")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.device)
    args.rows = args.rows or PEERS[args.peer]
    if args.peer == "transformers":
        args.peer_dir = Path(__file__).parent  # any folder without a package `perceiver`
    elif not (args.peer_dir / "perceiver").is_dir():
        print(f"{args.peer_dir} holds no package `perceiver`: {INSTALL.format(args.peer_dir)}", file=sys.stderr)
        sys.exit(2)

    sides = [Side("ours", Path(__file__).parents[1], args), Side(args.peer, args.peer_dir.resolve(), args)]
    print(f"{date.today()}, {machine(args.device)}, torch {torch.__version__}, float32, {args.rounds} pairs\n")
    print(f"| work | parameters | ours | {args.peer} | {args.peer} / ours (quartiles) | floor | ours / floor |")
    print("|---|---|---|---|---|---|---|")
    for row in args.rows:
        for _ in range(2):
            counts = [side(row)["parameters"] for side in sides]
        description, num_parameters = ROWS[row]
        assert counts == [num_parameters] * 2, f"{row}: not the same model, {counts} parameters"
        pairs, floors = [], []
        for i in range(args.rounds):
            order = sides if i % 2 else sides[::-1]  # the sides take turns to be first
            pairs.append([side(row)["seconds"] for side in order][:: 1 if i % 2 else -1])
            if row.startswith("decode"):
                floors.append(reading_time(decode_bytes(num_parameters), args.device))
        a, b = (f"{1e3 * median(times):.2f} ms" for times in zip(*pairs))
        low, ratio, high = quantiles((peer / mine for mine, peer in pairs), n=4)
        cells = "|"
        if floors:
            above_floor = median(pair[0] / floor for pair, floor in zip(pairs, floors))
            cells = f"{1e3 * median(floors):.2f} ms | {above_floor:.2f}"
        print(f"| {description} | {num_parameters:,} | {a} | {b} | {ratio:.2f} ({low:.2f} .. {high:.2f}) | {cells} |",
              flush=True)


if __name__ == "__main__":
    main()
