"""How fast ours is beside another implementation at the same work.

    python benchmarks/compare.py [--rows train-step decode ...] [--rounds 15] [--peer krasserm] [--peer-dir DIR]

Each side lives in a process of its own (krasserm's package is called `perceiver` too) and does one unit of work at a
time, in turns, so that whatever else the machine does hits both alike. Ratios are medians over pairs of neighbours in
time, with their quartiles. `--peer ours --peer-dir DIR` compares with another checkout of this project.

What a unit is:
    train-step  forward, cross-entropy, backward and fused AdamW of one example; half of the prefix is dropped
    fourier-forward, fourier-train  (--peer transformers) the ImageNet classifier with Fourier positions on one image,
                without and with cross-entropy, backward and fused AdamW; no dropout on either side
    decode      one greedy token, as a mean over 16, after a prompt of 3500 tokens of which the last 428 are latents.
                krasserm's side drives the core model and its own `kv_cache` in the leanest loop: model, argmax. Its
                Hugging Face wrapper would add to that, and has no `generate` in transformers 5. Ours goes through
                `Decoder`, as generate.py does. The encoding of the prompt is not part of it. Ours encodes anew every
                256 tokens to stay exact, which krasserm's does not (it slides the cache, an approximation).
    decode-compiled  the same, ours with generate.py's --compile
A new row is a name in ROWS and a branch in each side; a new peer is a function like `krasserm`.
The floor of `decode` is the time to read all weights and cached keys and values once, in the same run.
decode.py has more of decoding, without a peer.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.nn.functional as F

PROMPT, PREFIX, TOKENS = 3500, 3072, 16  # decode: tokens before the first timed one, those that are prefix; timed ones
DECODE = f"AR cached token: prompt {PROMPT} of T 4096, N 512, 512 channels, 8 layers, batch 1"
ROWS = {  # name: what it is, the parameters that both models must have
    "train-step": ("AR training step: T 2048, N 512, 512 channels, 8 layers, batch 1, prefix dropout 0.5", 29_514_502),
    "fourier-forward": ("Perceiver IO, ImageNet Fourier, 224x224, batch 1: forward", 48_440_627),
    "fourier-train": ("Perceiver IO, ImageNet Fourier, 224x224, batch 1: training step", 48_440_627),
    "decode": (DECODE, 30_563_078),
    "decode-compiled": (f"{DECODE}, ours compiled", 30_563_078),
}
PEERS = {"krasserm": ("train-step", "decode", "decode-compiled"), "transformers": ("fourier-forward", "fourier-train"),
         "ours": tuple(ROWS)}  # the rows that a peer can do
INSTALL = "pip install --no-deps --ignore-requires-python --target {} perceiver-io einops fairscale"

# ----------------------------------------------------------------------------------------------------------------------
# The work. Each side is a function: row -> (model, function that does one unit and returns its seconds)


def ours(row: str, device: str):
    from perceiver.model import PerceiverAR, PerceiverARConfig
    from perceiver.sampling import Decoder

    if row == "train-step":
        model = PerceiverAR(PerceiverARConfig(max_seq_len=2048, cross_attention_dropout=0.5)).to(device)
        return model, training(model, *next_bytes(model, device))
    if row.startswith("fourier"):
        from perceiver.config import load_config
        from perceiver.tasks import TASKS
        config = load_config(Path(__file__).parents[1] / "configs/imagenet_fourier.yaml", [], TASKS)
        return image_row(row, config.model.build().to(device), lambda model, images: model(images))

    model = PerceiverAR(PerceiverARConfig()).to(device).eval()
    options = {"compile": True} if row == "decode-compiled" else {}  # older checkouts know no such option

    def unit():
        decoder = Decoder(model, [prompt().tolist()], TOKENS + 1, **options)

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
    """What `training` takes, of a model of bytes: the logits of the last 512 of 2048, and their labels."""
    tokens = torch.randint(262, (1, 2049), device=device)
    return lambda: logits(tokens[:, :-1])[0], tokens[0, -512:]


def prompt(length: int = PROMPT) -> torch.Tensor:
    return torch.randint(262, (length,), generator=torch.Generator().manual_seed(0))


def training(model, logits, labels):
    device = labels.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(logits(), labels).backward()
        optimizer.step()

    return lambda: timed(step, device)


def timed(step, device, times: int = 1) -> float:
    """Seconds of one call of `step`, as a mean over `times`."""
    sync = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    sync()
    start = time.perf_counter()
    for _ in range(times):
        step()
    sync()
    return (time.perf_counter() - start) / times


def worker(side: str, device: str) -> None:
    """Answers every line on stdin, the name of a row, with JSON: seconds of a unit, parameters of the model."""
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
    """A worker: called with a row, it does one unit of it."""

    def __init__(self, name: str, package_dir: Path, args):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", name, "--device", args.device], text=True,
            env=os.environ | {"PYTHONPATH": str(package_dir)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, row: str) -> dict:
        print(row, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        return json.loads(line) if line else sys.exit(f"{self.process.args} ended; its error is above")


def decode_bytes(num_parameters: int, batch_size: int = 1, weight_bytes: int = 4, cache_bytes: int = 4) -> int:
    """What a token of a batch reads: all parameters but the positions of other tokens, the keys and values."""
    keys = PROMPT + TOKENS // 2 + 8 * (PROMPT + TOKENS // 2 - PREFIX)
    return weight_bytes * (num_parameters - (4096 - 1) * 512) + cache_bytes * batch_size * 2 * 512 * keys


def reading_time(num_bytes: int, device: str) -> float:
    """Seconds to read so much memory once, at the best of five passes."""
    memory = torch.ones(num_bytes // 4096, 1024, device=device)  # float32
    return min(timed(lambda: memory.sum(1), device) for _ in range(5))


def machine(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="default: all that the peer can do")
    parser.add_argument("--rounds", type=int, default=15, help="timed pairs of a row")
    parser.add_argument("--peer", choices=PEERS, default="krasserm")
    parser.add_argument("--peer-dir", type=Path, default=Path("/tmp/peer-krasserm"), help="where its package is")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.device)
    args.rows = args.rows or PEERS[args.peer]
    if args.peer == "transformers":
        args.peer_dir = Path(__file__).parent  # it is in requirements-dev.txt
    elif not (args.peer_dir / "perceiver").is_dir():
        print(f"--peer-dir has no package `perceiver`; {INSTALL.format(args.peer_dir)}", file=sys.stderr)
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
            order = sides if i % 2 else sides[::-1]  # who goes first alternates
            pairs.append([side(row)["seconds"] for side in order][:: 1 if i % 2 else -1])
            if row.startswith("decode"):
                floors.append(reading_time(decode_bytes(num_parameters), args.device))
        a, b = (f"{1e3 * median(times):.2f} ms" for times in zip(*pairs))
        low, ratio, high = quantiles((peer / mine for mine, peer in pairs), n=4)
        least = "|"
        if floors:
            above = median(pair[0] / floor for pair, floor in zip(pairs, floors))
            least = f"{1e3 * median(floors):.2f} ms | {above:.2f}"
        print(f"| {description} | {num_parameters:,} | {a} | {b} | {ratio:.2f} ({low:.2f} .. {high:.2f}) | {least} |",
              flush=True)


if __name__ == "__main__":
    main()
