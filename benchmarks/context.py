"""What a Perceiver AR gains and loses beside a Transformer as the context grows: losses after the same time.

    python benchmarks/context.py --nanogpt /tmp/nanoGPT --data input.txt [--contexts 256 512 1024] [--seconds 45]

benchmarks/nanogpt.py tells how to get the two. Each cell of the table is a model of five layers with 128 channels and 4
heads, trained for the same wall-clock time:

    Perceiver AR     N = 128 latents. One cross-attention layer, four self-attention layers
    the same, N = T  all positions are latents: a Transformer in our code, so only the number of latents differs
    nanoGPT          its GPT: five self-attention layers, trained positions instead of rotary ones, 65 tokens, not 262

All have the same optimizer: Muon for the matrices of the layers, AdamW for the rest, with the options of
configs/shakespeare.yaml. A step predicts 1024 characters: 8 windows of a Perceiver AR with 128 latents, or 1024 / T
windows of a Transformer, at least one. The schedule of the learning rate follows the clock, so it ends with the time.

The loss is in nats per character, of the first --val-size characters after the first nine tenths of the text. All
models predict the same characters from the same windows: each from the last T - 127 to T characters. The time of a step
is the median. The memory is the peak of a training step beyond what stays in memory, measured in a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from compare import machine, raise_error  # noqa: E402
from nanogpt import (  # noqa: E402
    check_nanogpt,
    check_text,
    encode,
    import_model,
    mean_loss,
    predict_with,
    validation,
    version,
)
from perceiver.config import load_config  # noqa: E402
from perceiver.data import TextWindows, collate_padded  # noqa: E402
from perceiver.errors import UserError, run_script  # noqa: E402
from perceiver.model import PerceiverARConfig  # noqa: E402
from perceiver.optim import Muon, Optimizers, build_optimizer, decay_groups, learning_rate, scale_and_clip  # noqa: E402
from perceiver.tasks import TASKS  # noqa: E402
from worker import resident  # noqa: E402

CONFIG = ROOT / "configs/shakespeare.yaml"
MODELS = ("Perceiver AR", "the same, N = T", "nanoGPT")
LATENTS = 128
CHARACTERS = 1024  # that a step predicts
LAYERS, CHANNELS, HEADS = 5, 128, 4


class Side:
    """A model of the table with its optimizer and its data."""

    def __init__(self, name: str, context: int, nanogpt: Path, text: bytes, val_size: int):
        torch.manual_seed(0)
        self.name = name
        optim = replace(load_config(CONFIG, [], TASKS).optim, warmup_steps=50)  # of the 1000 steps of the schedule
        num_latents = LATENTS if name == "Perceiver AR" else context
        vocabulary = None
        if name == "nanoGPT":
            vocabulary = bytes(sorted(set(text)))
            model_file = import_model(nanogpt)
            options = dict(n_layer=LAYERS, n_head=HEADS, n_embd=CHANNELS, dropout=0.0, bias=False)
            self.model = model_file.GPT(model_file.GPTConfig(block_size=context, vocab_size=len(vocabulary), **options))
            self.predict = predict_with(self.model)
            self.optimizer = gpt_optimizer(self.model, optim)
        else:
            config = PerceiverARConfig(
                vocab_size=262,
                max_seq_len=context,
                num_latents=num_latents,
                num_channels=CHANNELS,
                num_heads=HEADS,
                num_self_attention_layers=LAYERS - 1,
                absolute_positions=False,
                num_rotary_layers=-1,
                output_norm=True,
            )
            self.model = self.predict = config.build()
            self.optimizer = build_optimizer(self.model, optim)
        self.optim = optim
        held_out = validation(text)
        train = encode(text[: -len(held_out)], vocabulary)
        self.windows = TextWindows(train, context, num_latents, seed=0)
        self.batch_size = max(1, CHARACTERS // num_latents)
        self.val = encode(held_out[:val_size], vocabulary)

    def step(self, number: int, progress: float):
        """Training step `number`; `progress` from 0 to 1 is the place in the schedule."""
        lr = learning_rate(int(1000 * progress), 1000, self.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batch = collate_padded([self.windows[number, index] for index in range(self.batch_size)])
        labels = batch["labels"]
        if self.name == "nanoGPT":
            loss = self.model(batch["input_ids"], labels)[1]
        else:
            loss = F.cross_entropy(self.model(batch["input_ids"]).flatten(0, 1), labels.flatten())
        loss.backward()
        scale_and_clip(self.model.parameters(), torch.tensor(1.0), self.optim.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def gpt_optimizer(gpt: nn.Module, optim) -> Optimizers:
    """What `build_optimizer` gives our models: Muon for the matrices of the layers, AdamW for the rest."""
    matrices = [p for p in gpt.transformer.h.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in gpt.parameters() if id(p) not in chosen]
    muon = Muon(matrices, optim.lr, optim.muon_lr / optim.lr, optim.momentum, optim.weight_decay)
    adamw = torch.optim.AdamW(decay_groups(others, optim), optim.lr, optim.betas, optim.eps, fused=True)
    return Optimizers(muon, adamw)


def train(side: Side, seconds: float, context: int) -> dict:
    """Trains for so many seconds, then measures the loss."""
    side.step(0, 0.0)  # takes longer; the clock starts after it
    start, times = time.perf_counter(), []
    last = start
    while last - start < seconds:
        side.step(len(times) + 1, (last - start) / seconds)
        now = time.perf_counter()
        times.append(now - last)
        last = now
    side.model.eval()
    loss = mean_loss(side.predict, side.val, context, LATENTS)
    parameters = sum(p.numel() for p in side.model.parameters())
    return {"loss": loss, "steps": len(times), "step": median(times), "parameters": parameters}


def memory(side: Side) -> dict:
    """The peak of resident memory in a training step, beyond the memory before it, in MiB."""
    side.step(0, 0.0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
    before = resident("VmRSS")
    side.step(1, 0.0)
    return {"mib": (resident("VmHWM") - before) / 2**20}


def measure(name: str, context: int, args: argparse.Namespace) -> dict:
    """A cell of the table.

    Memory is measured in a second process, because giving freed arrays back to the system takes time.
    """
    command = [sys.executable, __file__, "--nanogpt", str(args.nanogpt), "--data", str(args.data), "--contexts"]
    command += [str(context), "--seconds", str(args.seconds), "--val-size", str(args.val_size), "--worker", name]
    result = {}
    for extra, env in (([], {}), (["--memory"], {"MALLOC_MMAP_THRESHOLD_": str(2**17)})):
        process = subprocess.run(
            [*command, *extra], env=os.environ | env, stdout=subprocess.PIPE, text=True, check=True
        )
        result |= json.loads(process.stdout.splitlines()[-1])  # nanoGPT prints its parameters before it
    return result


def row(context: int, name: str, result: dict) -> str:
    cells = [f"{context:,}", name, f"{result['parameters']:,}", f"{result['steps']:,}", f"{1e3 * result['step']:.1f}"]
    return f"| {' | '.join([*cells, format(result['mib'], '.0f'), format(result['loss'], '.3f')])} |"


def check_contexts(contexts: list[int], text: Path) -> None:
    for context in contexts:
        if context <= LATENTS:
            raise UserError(f"--contexts {context} must be more than {LATENTS}, the number of latents")
        if context > text.stat().st_size // 10:
            raise UserError(f"--contexts {context} is more than a tenth of {text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: run_script(lambda: raise_error(message))
    parser.add_argument("--nanogpt", type=Path, default=Path("/tmp/nanoGPT"), help="a checkout; default: /tmp/nanoGPT")
    parser.add_argument("--data", type=Path, default=Path("input.txt"), help="the text; default: input.txt")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 512, 1024], help="characters")
    parser.add_argument("--seconds", type=float, default=45, help="of training, for each cell")
    parser.add_argument("--val-size", type=int, default=32769, help="characters to measure the loss on")
    parser.add_argument("--worker", choices=MODELS, help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    check_nanogpt(args.nanogpt)
    check_text(args.data)
    check_contexts(args.contexts, args.data)
    if args.worker:
        (context,) = args.contexts
        side = Side(args.worker, context, args.nanogpt, args.data.read_bytes(), args.val_size)
        print(json.dumps(memory(side) if args.memory else train(side, args.seconds, context)))
        return
    print(f"{date.today()}, {machine('cpu')}, torch {torch.__version__}, nanoGPT {version(args.nanogpt)}")
    print(f"\n    python {' '.join(sys.argv)}\n\nEach model trains for {args.seconds:g} s.\n")
    print("| context | model | parameters | steps | a step, ms | memory of a step, MiB | loss |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for context in args.contexts:
        for name in MODELS:
            print(row(context, name, measure(name, context, args)), flush=True)


if __name__ == "__main__":
    run_script(main)
