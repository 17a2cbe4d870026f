"""Trains our models and those of other projects from the same weights on the same batches, and compares the losses.

    python benchmarks/same_training.py [--rows ar mlm] [--dtype float32 float64] [--steps 300] [--lr 1e-3]

The rows are Perceiver AR beside krasserm's CausalSequenceModel, and the masked language model beside transformers'
PerceiverForMaskedLM. The models are small. They start from the peer's initial weights, without dropout, and learn the
bytes of Python's standard library. Each side has its own process, and its own autograd. Our side steps with train.py's
optimizer and clipping, the peer with torch.optim.AdamW and torch.nn.utils.clip_grad_norm_.

Training multiplies small differences, such as those of rounding. To tell them from errors, our side trains a second
time from weights that differ by one part in 10 million. This is the column `disturbed`. In float64, rounding is a
billion times smaller: a difference that stays has another cause.
"""

import argparse
import os
import sys
import tempfile
from datetime import date
from pathlib import Path
from statistics import mean

import torch
from compare import FOLDERS, ROOT, Process, machine, peer_folder

from perceiver.data import CorpusConfig, TextWindows, load_corpus
from perceiver.errors import UserError, run_script
from perceiver.tasks.masked_lm import MaskedWindows

CONTEXT = 256
LATENTS = 64
BATCH_SIZE = 8
OPTIM = {"weight_decay": 0.01, "max_grad_norm": 0.5}
DISTURBANCE = 1e-7  # standard deviation, as a part of each weight
SHOWN = (1, 2, 5, 10, 20, 50, 100, 200, 300)  # steps
LAST = 50  # steps at the end that the table averages

AR = {
    "max_seq_len": CONTEXT,
    "num_channels": 128,
    "num_heads": 4,
    "num_self_attention_layers": 3,
    "cross_attention_dropout": 0.0,
}
# The work, the peer, our options and the peer's, as the methods in sides.py take them
ROWS = {
    "ar": ("Perceiver AR", "krasserm", AR | {"num_latents": LATENTS}, AR | {"max_latents": LATENTS}),
    "mlm": ("masked language model", "transformers", {"overrides": [
        f"model.num_latents={LATENTS}", "model.num_latent_channels=128", f"model.input.max_seq_len={CONTEXT}",
        "model.input.num_input_channels=96", "model.encoder.num_cross_attention_qk_channels=64",
        "model.encoder.num_cross_attention_v_channels=128", "model.encoder.num_self_attention_qk_channels=64",
        "model.encoder.num_self_attention_v_channels=128", "model.encoder.num_self_attention_layers_per_block=3",
        "model.decoder.num_cross_attention_v_channels=96"]},
        {"num_latents": LATENTS, "d_latents": 128, "max_position_embeddings": CONTEXT, "d_model": 96,
         "qk_channels": 64, "v_channels": 128, "num_self_attends_per_block": 3}),
}  # fmt: skip


def write_batches(row: str, steps: int, file: str) -> None:
    """Writes input_ids and labels of all steps, (steps, B, T) and (steps, B, N or T)."""
    tokens = load_corpus(CorpusConfig()).train
    windows = TextWindows(tokens, CONTEXT, LATENTS, 0) if row == "ar" else MaskedWindows(tokens, CONTEXT, 0.15, 0)
    examples = [windows[step, i] for step in range(steps) for i in range(BATCH_SIZE)]
    stacked = {key: torch.stack([torch.from_numpy(example[key]).long() for example in examples]) for key in examples[0]}
    torch.save({key: values.unflatten(0, (steps, BATCH_SIZE)) for key, values in stacked.items()}, file)


def train(row: str, dtype: str, args) -> tuple[int, dict[str, list[float]]]:
    """The number of parameters, and the losses of all steps: of our side, the peer, and our side disturbed."""
    _, peer, our_options, peer_options = ROWS[row]
    losses = {}
    optim = OPTIM | {"lr": args.lr}
    with tempfile.TemporaryDirectory() as folder:
        batches, weights = f"{folder}/batches.pt", f"{folder}/weights.pt"
        write_batches(row, args.steps, batches)
        with Process(peer, peer_folder(peer, args), "cpu", "float32") as theirs:
            parameters = theirs("new_model", model=row, options=peer_options, dtype=dtype)["parameters"]
            theirs("save_weights", file=weights)
            losses["peer"] = theirs("train", file=batches, optim=optim)["losses"]
        for name, disturbance in (("ours", 0.0), ("disturbed", DISTURBANCE)):
            with Process("ours", ROOT, "cpu", "float32") as ours:
                assert ours("new_model", model=row, options=our_options, dtype=dtype)["parameters"] == parameters
                ours("load_weights", file=weights, disturbance=disturbance)
                losses[name] = ours("train", file=batches, optim=optim)["losses"]
    return parameters, losses


def table(losses: dict[str, list[float]]) -> str:
    """The losses as a Markdown table, and the largest differences."""
    ours, peer, disturbed = losses["ours"], losses["peer"], losses["disturbed"]
    steps = {f"{step}": slice(step - 1, step) for step in SHOWN if step <= len(ours)}
    steps[f"mean of the last {min(LAST, len(ours))}"] = slice(-LAST, None)
    lines = ["| step | ours | peer | ours - peer | ours - disturbed |", "|---|---|---|---|---|"]
    for name, part in steps.items():
        a, b, c = (mean(side[part]) for side in (ours, peer, disturbed))
        lines.append(f"| {name} | {a:.6f} | {b:.6f} | {a - b:.1e} | {a - c:.1e} |")
    far = [max(abs(a - b) for a, b in zip(ours, other)) for other in (peer, disturbed)]
    lines += ["", f"Largest difference of all {len(ours)} steps: {far[0]:.1e} from the peer, {far[1]:.1e} disturbed."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--dtype", nargs="+", choices=("float32", "float64"), default=["float32", "float64"])
    parser.add_argument("--steps", type=int, default=SHOWN[-1])
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--peer-dir", type=Path, help=f"folder of krasserm's package, if not {FOLDERS['krasserm']}")
    args = parser.parse_args()
    if args.steps < 1:
        raise UserError(f"--steps {args.steps} must be at least 1")
    for row in args.rows:
        peer_folder(ROWS[row][1], args)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the sides
    torch.set_num_threads(1)
    print(f"{date.today()}, {machine('cpu')}, torch {torch.__version__}: `python {' '.join(sys.argv)}`")
    for row in args.rows:
        work, peer, *_ = ROWS[row]
        for dtype in args.dtype:
            parameters, losses = train(row, dtype, args)
            print(
                f"\n## {work}, {peer}, {parameters:,} parameters, {dtype}, lr {args.lr:g}\n\n{table(losses)}",
                flush=True,
            )


if __name__ == "__main__":
    run_script(main)
