"""Compares how recipes learn in float32 and in bf16 on a CPU, by the validation loss after a share of their steps.

    python benchmarks/bf16_learning.py [--recipes copy clm ...] [--share 0.1] [--seeds 0 1]

The recipes need no download. digits uses scikit-learn's digits, which needs scikit-learn.

If the CPU multiplies bf16 in hardware, the bf16 run is that of train.precision=bf16. Otherwise such a run would take
hours, and the script simulates it: autocast is on, so all tensors are bf16 that would be bf16 in hardware. But matrix
products, convolutions and attention convert their bf16 inputs to float32, compute in float32, and round the result to
bf16. Hardware does the same: it multiplies bf16 numbers and adds the products in float32. One thing differs: between
its two products, the attention kernel of bf16 also rounds the attention weights. `check_simulation` compares the
simulated results with those of the bf16 kernels before the runs.
"""
import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import train  # noqa: E402
from compare import machine  # noqa: E402
from perceiver.config import load_config  # noqa: E402
from perceiver.distributed import Ranks, uses_bf16  # noqa: E402
from perceiver.tasks import TASKS  # noqa: E402

RECIPES = ("copy", "digits", "music", "autoencode", "flow", "mlm", "clm")
VAL_SIZE = {"clm": 65536, "mlm": 32768}  # bytes of validation text; the whole would take longer than the training
CPU = torch.device("cpu")
aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
PRODUCTS = {
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.convolution.default,
    aten.convolution_backward.default, ATTENTION, aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}


class SimulatedBf16(TorchDispatchMode):
    """Computes products of bf16 tensors in float32, and rounds the results to bf16."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if function not in PRODUCTS or not any(x.dtype == torch.bfloat16 for x in tensors):
            return function(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, lambda x: x.float() if x.dtype == torch.bfloat16 else x, (args, kwargs))
        result = function(*args, **kwargs)
        if function is ATTENTION:
            output, log_sum_exp = result  # the kernel of bf16 returns float32 log_sum_exp too
            return output.bfloat16(), log_sum_exp
        return tree_map_only(Tensor, Tensor.bfloat16, result)


def gradients(function: Callable, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """The result of `function` on random arrays under bf16 autocast, and the gradients of the arrays."""
    generator = torch.Generator().manual_seed(0)
    arrays = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    with torch.autocast("cpu", torch.bfloat16):
        result = function(*arrays)
    result.float().square().sum().backward()
    return [result.detach(), *(array.grad for array in arrays)]


def check_simulation() -> dict[str, float]:
    """The largest difference from the bf16 kernels, as a part of the largest number, by kind of product.

    Raises AssertionError if a difference exceeds 2^-6; bf16 rounds by up to 2^-9 of a number.
    """
    mask = torch.ones(24, 40, dtype=torch.bool).tril(16)
    cases = {
        "linear": (F.linear, [(40, 48), (32, 48), (32,)]),
        "matrix product": (torch.matmul, [(4, 24, 48), (4, 48, 32)]),
        "convolution": (F.conv2d, [(2, 3, 16, 16), (8, 3, 3, 3)]),
        "attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask),
                      [(2, 4, 24, 16), (2, 4, 40, 16), (2, 4, 40, 16)]),
    }
    worst = {}
    for name, case in cases.items():
        expected = gradients(*case)
        with SimulatedBf16():
            simulated = gradients(*case)
        assert [x.dtype for x in expected] == [x.dtype for x in simulated]
        errors = [(a.float() - b.float()).abs().max() / a.abs().max() for a, b in zip(expected, simulated)]
        worst[name] = max(errors).item()
        assert worst[name] < 2**-6, f"the simulation of {name} is wrong by {worst[name]}"
    return worst


def learn(name: str, share: float, precision: str, seed: int, simulate: bool, folder: Path) -> tuple[int, float, float]:
    """Trains a recipe. Returns the number of steps and the training and validation loss at the end."""
    recipe = ROOT / "configs" / f"{name}.yaml"
    steps = int(share * load_config(recipe, [], TASKS).train.max_steps)
    overrides = [f"train.max_steps={steps}", f"train.eval_every={steps}", f"train.log_every={max(1, steps // 4)}",
                 f"train.precision={precision}", f"train.seed={seed}", "train.device=cpu", "data.num_workers=0",
                 f"train.out_dir={folder}/{name}-{precision}-{seed}"]
    if name in VAL_SIZE:
        overrides.append(f"data.val_size={VAL_SIZE[name]}")
    if name == "digits":
        from digits import write_digits

        overrides.append(f"data.path={write_digits(folder / f'digits-{precision}-{seed}')}")
    config = load_config(recipe, overrides, TASKS)
    mode = SimulatedBf16() if simulate and precision == "bf16" else contextlib.nullcontext()
    with mode, contextlib.redirect_stdout(sys.stderr):
        assert train.train(config, Ranks(0, 1, CPU)) == 0
    lines = [json.loads(line) for line in (Path(config.train.out_dir) / "metrics.jsonl").read_text().splitlines()]
    final = {line["split"]: line["loss"] for line in lines}
    return steps, final["train"], final["val"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--share", type=float, default=0.1, help="of the recipe's steps; default: %(default)s")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    simulate = not uses_bf16("auto", CPU)
    print(f"{date.today()}, {machine('cpu')}, torch {torch.__version__}, {' '.join(sys.argv)}\n")
    if simulate:
        differences = ", ".join(f"{name} {error:.4f}" for name, error in check_simulation().items())
        print(f"bf16 is simulated. Largest difference from the bf16 kernels, relative: {differences}.\n")
    print("| recipe | seed | steps | float32: training loss | validation loss | bf16: training loss | validation loss "
          "| bf16 / float32, validation |\n|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.recipes:
            for seed in args.seeds:
                steps, *float32 = learn(name, args.share, "float32", seed, simulate, Path(folder))
                _, *bf16 = learn(name, args.share, "bf16", seed, simulate, Path(folder))
                losses = " | ".join(f"{loss:.4f}" for loss in (*float32, *bf16))
                print(f"| {name}.yaml | {seed} | {steps:,} | {losses} | {bf16[1] / float32[1]:.4f} |", flush=True)


if __name__ == "__main__":
    main()
