"""Checks and measures the project on a CUDA GPU, in sections: see gpu.sh.

    python benchmarks/gpu.py --out OUT [--part 1 | --sections attention syncs ...] [--device cuda]

Each section runs in a process of its own, with a time limit. Its output goes to OUT/SECTION.md, and its result to
OUT/SECTION.json. A section that has passed is skipped when the script runs again. A section that fails or takes too
long does not stop the others; the exit code is then 1. With `--device cpu`, most sections run at a small size, to test
this script.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from perceiver import attention  # noqa: E402
from perceiver.attention import Attention, attend  # noqa: E402
from perceiver.config import load_config  # noqa: E402
from perceiver.data import collate_padded  # noqa: E402
from perceiver.decoding import generate  # noqa: E402
from perceiver.model import PerceiverAR, PerceiverARConfig  # noqa: E402
from perceiver.optim import build_optimizer, scale_and_clip  # noqa: E402
from perceiver.speed import peak_flops, training_flops  # noqa: E402
from perceiver.tasks import TASKS  # noqa: E402


@dataclass
class Section:
    part: int
    seconds: int  # time limit
    run: Callable[[str], None]  # its argument is the device; it prints Markdown, and raises an exception if it fails


SECTIONS: dict[str, Section] = {}


def section(part: int, seconds: int):
    def register(function):
        SECTIONS[function.__name__] = Section(part, seconds, function)
        return function

    return register


# ----------------------------------------------------------------------------------------------------------------------
# Part 1: is it right?


@section(1, 120)
def attention_is_exact(device: str):
    """`attend` and `Attention` on the device, beside float64 on the CPU: relative errors of outputs and gradients."""
    torch.set_float32_matmul_precision("highest")
    limits = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
    print("| case | width of a head | dtype | output | gradients |\n|---|---|---|---|---|")
    worst = []
    for dtype, limit in limits.items():
        for width in (32, 64, 264):
            for name, (n, m, causal, padded) in {
                "no mask": (48, 80, False, 0),
                "padding": (48, 80, False, 30),
                "causal": (80, 80, True, 0),
                "causal, more keys": (48, 80, True, 0),
                "causal, padding": (48, 80, True, 30),
                "fully masked": (48, 80, False, 80),
            }.items():
                torch.manual_seed(0)
                inputs = [torch.randn(2, 2, length, width).to(dtype) for length in (n, m, m)]
                mask = None
                if padded:
                    mask = torch.arange(80) >= torch.tensor([[padded], [0]])  # only the first row has padding
                    mask = mask[:, None, None]
                errors = compare(
                    lambda q, k, v: attend(q, k, v, None if mask is None else mask.to(q.device), causal), inputs, device
                )
                worst.append(report(name, width, dtype, errors, limit))
        for name, n, m in (("inputs unprojected", 8, 300), ("queries unprojected", 300, 8)):
            torch.manual_seed(0)
            layer = Attention(261, 261, 1).to(dtype)
            norm = nn.LayerNorm(261).to(dtype)
            inputs = [torch.randn(2, length, 261).to(dtype) for length in (n, m)]
            errors = compare(lambda q, kv: layer(q, kv, kv_norm=norm), inputs, device, (layer, norm))
            worst.append(report(name, 261, dtype, errors, limit))
    assert all(worst), "errors above the limit are in bold"


def compare(function, inputs: list[Tensor], device: str, modules: tuple[nn.Module, ...] = ()) -> list[float]:
    """Relative errors of the function's output and of its worst gradient on the device, beside float64 on the CPU."""

    def run(device, dtype):
        for module in modules:
            module.to(device, dtype)
        leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
        y = function(*leaves)
        grads = torch.autograd.grad(y.float().square().sum() if dtype != torch.float64 else y.square().sum(), leaves)
        return [x.detach().double().cpu() for x in (y, *grads)]

    dtype = inputs[0].dtype
    results = run(device, dtype)
    expected = run("cpu", torch.float64)
    for module in modules:
        module.to(dtype)
    scale = max(x.norm() for x in expected[1:])
    output, *grads = (x - y for x, y in zip(results, expected))
    return [(output.norm() / expected[0].norm()).item(), (max(x.norm() for x in grads) / scale).item()]


def report(name, width, dtype, errors, limit) -> bool:
    cells = [f"{error:.1e}" if error < limit else f"**{error:.1e}**" for error in errors]
    print(f"| {name} | {width} | {str(dtype)[6:]} | {' | '.join(cells)} |", flush=True)
    return all(error < limit for error in errors)


@section(1, 150)
def steps_do_not_wait(device: str):
    """A training step of each small recipe, which must not make the host wait for the GPU."""
    for name in ("clm", "mlm", "music", "copy", "flow", "autoencode"):
        config = load_config(ROOT / f"configs/{name}.yaml", [], TASKS)
        task = TASKS[config.task](config)
        model = task.build_model().to(device).train()
        optimizer = build_optimizer(model, config.optim)
        train_set = task.load_data()[0]
        batch = collate_padded([train_set[0, index] for index in range(2)])
        batch = {key: values.to(device) for key, values in batch.items()}

        def step():
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                sums = task.loss(model, batch)
            sums["loss"].backward()
            scale_and_clip(model.parameters(), 1 / sums["count"], config.optim.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step()  # the first step creates the state of the optimizer
        set_sync_debug(device, "error")
        step()
        set_sync_debug(device, "default")
        print(f"- {name}: no wait", flush=True)


def set_sync_debug(device: str, mode: str):
    if device == "cuda":
        torch.cuda.set_sync_debug_mode(mode)


@section(1, 270)
def tests(device: str):
    """The tests marked gpu."""
    run_command("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests"))


# ----------------------------------------------------------------------------------------------------------------------
# Part 2: compilation, kernels, utilization


@section(2, 90)
def training_compiles(device: str):
    """Perceiver AR compiles to one graph, forward and backward, and its gradients stay the same."""
    torch.manual_seed(0)
    model = PerceiverAR(PerceiverARConfig(vocab_size=262, max_seq_len=96, num_latents=64, num_channels=64)).to(device)
    ids = torch.randint(262, (2, 96), device=device)
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    grads = []
    for run in (model, compiled):
        model.zero_grad()
        F.cross_entropy(run(ids).flatten(0, 1), ids[:, -64:].flatten()).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    error = ((grads[0] - grads[1]).norm() / grads[0].norm()).item()
    print(f"relative difference of the gradients: {error:.1e}")
    assert error < 1e-3


@section(2, 150)
def decoding_with_cuda_graphs(device: str):
    """Two compiled decoders in one process: the second compiles nothing, and both give the tokens of the eager one."""
    if device == "cpu":
        print("needs a GPU")
        return
    torch.manual_seed(0)
    model = PerceiverAR(PerceiverARConfig(vocab_size=262, max_seq_len=1024, num_latents=256)).to(device).eval()
    prompt = torch.randint(262, (700,)).tolist()

    def decode(compile):
        start = time.perf_counter()
        tokens = [new.item() for new in generate(model, [prompt], 64, temperature=0.0, compile=compile)]
        return tokens, time.perf_counter() - start

    expected, seconds = decode(False)
    print(f"- eager: {seconds:.1f} s")
    graphs = []
    for _ in range(2):
        tokens, seconds = decode(True)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        print(f"- compiled: {seconds:.1f} s, {graphs[-1]} graphs so far", flush=True)
        assert tokens == expected, "other tokens than the eager decoder"
    assert graphs[0] == graphs[1], "the second decoder compiled again"


PAPER_MODELS = (
    "mlm_paper",
    "imagenet_fourier",
    "imagenet_learned",
    "imagenet_conv",
    "flow_sintel",
    "clm_wikitext103",
    "clm_c4",
    "music_maestro",
    "copy_131k",
)


@section(2, 120)
def kernels(device: str):
    """Which kernel attention can take in bf16, for every shape of attention in the models of the papers."""
    print("| model | queries | keys | widths of a head | mask | causal | kernels |\n|---|---|---|---|---|---|---|")
    for name in PAPER_MODELS if device == "cuda" else ("clm",):
        config = load_config(ROOT / f"configs/{name}.yaml", [], TASKS)
        task = TASKS[config.task](config)
        model = task.build_model().to(device, torch.bfloat16).eval()
        seen = {}

        def record(q, k, v, mask=None, causal=False, dropout=0.0, scale=None):
            key = q.shape[2], k.shape[2], q.shape[3], v.shape[3], mask is not None, causal
            seen.setdefault(key, possible_kernels(q, k, v, mask, causal))
            return attend(q, k, v, mask, causal, dropout, scale)

        attention.attend = record
        with torch.inference_mode():
            model(*model_inputs(config, device, torch.bfloat16))
        attention.attend = attend
        for (n, m, qk, value, mask, causal), names in seen.items():
            print(f"| {name} | {n:,} | {m:,} | {qk}, {value} | {mask} | {causal} | {names} |", flush=True)


def possible_kernels(q, k, v, mask, causal) -> str:
    if q.device.type != "cuda":
        return "not on a CPU"
    backends = torch.backends.cuda
    params = backends.SDPAParams(q, k, v, mask, 0.0, causal and q.shape[2] == k.shape[2], False)
    return ", ".join(
        name
        for name, possible in (
            ("flash", backends.can_use_flash_attention(params)),
            ("cudnn", backends.can_use_cudnn_attention(params)),
            ("memory-efficient", backends.can_use_efficient_attention(params)),
        )
        if possible
    )


def model_inputs(config, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Random inputs of one example."""
    model = config.model
    if isinstance(model, PerceiverARConfig):
        size = model.vocab_size or 262
        return (torch.randint(size, (1, model.max_seq_len), device=device),)
    if config.task == "masked_lm":
        return (torch.randint(262, (1, model.input.max_seq_len), device=device),)
    if config.task == "optical_flow":
        return (torch.randn(1, 2, 3, *model.input.frame_shape, device=device, dtype=dtype),)
    height, width, channels = model.input.image_shape
    return (torch.randn(1, channels, height, width, device=device, dtype=dtype),)


@section(2, 180)
def utilization(device: str):
    """Training speed of three models in bf16: the share of the GPU's peak FLOP/s (MFU)."""
    print("| model | batch | compiled | step, ms | TFLOP/s | MFU |\n|---|---|---|---|---|---|")
    sizes = {"clm_wikitext103": 16, "mlm_paper": 16, "imagenet_fourier": 16} if device == "cuda" else {"clm": 2}
    for name, batch_size in sizes.items():
        config = load_config(ROOT / f"configs/{name}.yaml", [], TASKS)
        task = TASKS[config.task](config)
        batch = random_batch(config, batch_size, device)
        flops = training_flops(task, batch)
        for compile in (False, True) if device == "cuda" else (False,):
            torch.manual_seed(0)
            model = task.build_model().to(device).train()
            optimizer = build_optimizer(model, config.optim)
            run = torch.compile(model) if compile else model
            for step in range(13 if device == "cuda" else 4):
                if step == 3:
                    synchronize(device)
                    start = time.perf_counter()
                with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                    sums = task.loss(run, batch)
                sums["loss"].backward()
                scale_and_clip(model.parameters(), 1 / sums["count"], config.optim.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            synchronize(device)
            seconds = (time.perf_counter() - start) / (step - 2)
            peak = peak_flops(torch.cuda.get_device_name(), bf16=True) if device == "cuda" else 0.0
            mfu = f"{flops / seconds / peak:.3f}" if peak else "peak unknown"
            print(f"| {name} | {batch_size} | {compile} | {1e3 * seconds:.1f} | {flops / seconds / 1e12:.2f} | {mfu} |")


def random_batch(config, batch_size: int, device: str) -> dict[str, Tensor]:
    inputs = model_inputs(config, device, torch.float32)[0]
    inputs = inputs.expand(batch_size, *inputs.shape[1:])
    if isinstance(config.model, PerceiverARConfig):
        return {"input_ids": inputs, "labels": inputs[:, -config.model.num_latents :]}
    if config.task == "masked_lm":
        return {"input_ids": inputs, "labels": inputs}
    return {"image": inputs, "label": torch.zeros(batch_size, dtype=torch.long, device=device)}


def synchronize(device: str):
    if device == "cuda":
        torch.cuda.synchronize()


# ----------------------------------------------------------------------------------------------------------------------
# Parts 3 and 4: beside the peers, and long contexts


@section(3, 300)
def training_beside_peers(device: str):
    compare_rows(device, "ar-train", "mlm-train", "imagenet-train", "mnist-train")


@section(3, 200)
def inference_beside_peers(device: str):
    compare_rows(device, "mlm-forward", "imagenet-forward", "flow-forward", "video-forward")


@section(4, 240)
def decoding_beside_peers(device: str):
    compare_rows(device, "decode-512", "decode-512-compiled", "decode-3500", "decode-3500-compiled")


def compare_rows(device: str, *rows: str):
    """Rows of compare.py, in bf16 as a user runs them. On a CPU, only the first."""
    rounds = "9" if device == "cuda" else "1"
    chosen = rows if device == "cuda" else rows[:1]
    script = str(ROOT / "benchmarks/compare.py")
    run_command(script, "--precision", "auto", "--rounds", rounds, "--device", device, "--rows", *chosen)


@section(4, 260)
def long_contexts(device: str):
    """Time and memory of a training step up to T = 131,072: the paper's model."""
    lengths = ["8192", "32768", "131072"] if device == "cuda" else ["2048", "4096"]
    run_command(str(ROOT / "benchmarks/long_context.py"), "--lengths", *lengths, "--repeats", "2")


def run_command(*arguments: str):
    subprocess.run([sys.executable, *arguments], check=True)


# ----------------------------------------------------------------------------------------------------------------------
# The runner


def run_sections(names: list[str], out: Path, device: str, sections: dict[str, Section] = SECTIONS) -> int:
    """Runs sections that have not passed yet, each in a process. Returns the exit code: 1 if one failed."""
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names:
        result_file = out / f"{name}.json"
        if result_file.exists() and json.loads(result_file.read_text())["passed"]:
            print(f"{name}: passed before")
            continue
        start = time.perf_counter()
        with open(out / f"{name}.md", "w") as output, open(out / f"{name}.log", "w") as log:
            command = [sys.executable, __file__, "--worker", name, "--device", device]
            try:
                code = subprocess.run(command, stdout=output, stderr=log, timeout=sections[name].seconds).returncode
            except subprocess.TimeoutExpired:
                code = "timeout"
        result = {"passed": code == 0, "code": code, "seconds": round(time.perf_counter() - start, 1)}
        result_file.write_text(json.dumps(result))
        if code == 0:
            print(f"{name}: passed in {result['seconds']} s", flush=True)
        else:
            failed.append(name)
            last = (out / f"{name}.log").read_text().strip().splitlines()[-1:]
            print(f"{name}: FAILED ({code}) {' '.join(last)}; see {out / name}.log", flush=True)
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder of the results")
    parser.add_argument("--part", type=int, choices=(1, 2, 3, 4), help="default: all parts")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, help="instead of a part")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--worker", choices=SECTIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA GPU")
    if args.worker:
        print(f"## {args.worker.replace('_', ' ')}\n")
        SECTIONS[args.worker].run(args.device)
        return 0
    names = args.sections or [name for name, section in SECTIONS.items() if args.part in (None, section.part)]
    return run_sections(names, args.out, args.device)


if __name__ == "__main__":
    sys.exit(main())
