"""Fuzz what users give to the scripts: `python benchmarks/fuzz.py [--count 10000] [--seconds 1200] [--seed 0]`.

Each case changes a valid file at random and gives it to train.py, generate.py or predict.py. The script must end with
exit code 0, or with exit code 2 and one line that begins with "error: ". (Damaged weights that still have the right
shapes may make training diverge: exit code 1 and one line.) It must take less than 30 seconds and 2 GiB,
and the run folder must stay as it is. A case runs in a process forked from one that has imported everything. The case
`kind:number` of a seed is always the same: --only KIND:NUMBER runs it alone.

The result is a table with a row for each kind of file. --out writes it to a file.
"""

import argparse
import contextlib
import hashlib
import io
import os
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
import zipfile
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors import safe_open  # noqa: E402

import generate  # noqa: E402
import predict  # noqa: E402
import train  # noqa: E402
from perceiver import checkpoint  # noqa: E402
from perceiver.config import from_dict, load_config, to_dict  # noqa: E402
from perceiver.distributed import Ranks  # noqa: E402
from perceiver.errors import run_script  # noqa: E402
from perceiver.tasks import TASKS  # noqa: E402
from perceiver.tasks.music import compose, write_midi  # noqa: E402
from perceiver.tasks.video import write_video  # noqa: E402

SECONDS = 30
TOO_LONG = signal.SIGUSR1  # ends a process, because train.py does not handle it
MEMORY = 2**31  # bytes

ENCODER = {"num_cross_attention_heads": 1, "num_self_attention_heads": 2, "num_self_attention_layers_per_block": 1}
PERCEIVER_IO = {
    "num_latents": 4,
    "num_latent_channels": 16,
    "encoder": ENCODER,
    "decoder": {"num_cross_attention_heads": 1},
}
PERCEIVER_AR = {
    "max_seq_len": 16,
    "num_latents": 8,
    "num_channels": 16,
    "num_heads": 2,
    "num_self_attention_layers": 1,
}
TEXT_INPUT = {"max_seq_len": 48, "num_input_channels": 16}
CLIP = {"image_shape": [2, 8, 8, 3], "patch_shape": [1, 4, 4], "num_audio_samples": 960, "num_classes": 2}
MODELS = {
    "text": ("causal_lm", PERCEIVER_AR),
    "music": ("symbolic_music", PERCEIVER_AR),
    "masked": ("masked_lm", PERCEIVER_IO | {"input": TEXT_INPUT}),
    "classes": ("text_classification", PERCEIVER_IO | {"input": TEXT_INPUT, "num_classes": 2}),
    "image": ("image_classification", PERCEIVER_IO | {"input": {"image_shape": [8, 8, 3]}, "num_classes": 2}),
    "flow": ("optical_flow", PERCEIVER_IO | {"input": {"frame_shape": [8, 8]}}),
    "video": ("multimodal_autoencoding", PERCEIVER_IO | {"input": CLIP, "num_output_channels": 8}),
}

# Published weights in tests/golden, and the inputs of predict.py
PUBLISHED = {
    "masked-lm": ["text.txt"],
    "image-learned": ["image.png"],
    "optical-flow": ["image.png", "image.jpg"],
    "multimodal": ["clip.mp4"],
}

# ----------------------------------------------------------------------------------------------------------------------
# Valid files


def make_samples(folder: Path):
    """Fills `folder` with small valid files of all kinds, with a checkpoint of each model, and with a run."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    for name, (task_name, model) in MODELS.items():
        save_checkpoint(folder / f"{name}.pt", task_name, model)
    for name in PUBLISHED:
        shutil.copytree(ROOT / "tests/golden" / name, folder / name)
        with safe_open(folder / name / "model.safetensors", "pt") as file:
            torch.save({key: file.get_tensor(key) for key in file.keys()}, folder / name / "pytorch_model.bin")
    write_midi(folder / "piece.mid", compose(0))
    pixels = rng.integers(0, 256, (24, 32, 3), np.uint8)
    for ending in ("png", "jpg", "bmp", "ppm", "tif", "webp", "gif"):
        Image.fromarray(pixels).save(folder / f"image.{ending}")
    Image.fromarray(pixels[..., 0]).save(folder / "gray.png")
    frames = torch.from_numpy(rng.integers(0, 256, (6, 3, 32, 32), np.uint8))
    sound = torch.from_numpy(rng.uniform(-0.5, 0.5, (9600, 1))).float()
    for ending in ("mp4", "mkv", "avi", "mov"):
        write_video(str(folder / f"clip.{ending}"), frames, 25, sound)
    (folder / "text.txt").write_text("The quick [MASK] jumps over the dog.\n" * 40)
    (folder / "rows.jsonl").write_text("".join(f'{{"text": "line {n}", "label": "{n % 2}"}}\n' for n in range(40)))
    (folder / "rows.csv").write_text("text,label\n" + "".join(f"line {n},{n % 2}\n" for n in range(40)))
    np.save(folder / "ids.npy", rng.integers(0, 262, 400).astype(np.uint16))
    (folder / "ids.bin").write_bytes(rng.integers(0, 262, 400).astype(np.uint16).tobytes())
    for name in ("clm", "music", "mlm", "digits", "txt_clf"):
        (folder / f"{name}.yaml").write_bytes((ROOT / "configs" / f"{name}.yaml").read_bytes())
    (folder / "tiny.yaml").write_text(TINY.format(folder=folder))


TINY = """\
task: causal_lm
model: {{max_seq_len: 16, num_latents: 8, num_channels: 16, num_heads: 2, num_self_attention_layers: 1}}
data: {{path: {folder}/text.txt, batch_size: 2, val_size: 100, cache_dir: cache}}
optim: {{lr: 1.0e-3, warmup_steps: 1}}
train: {{max_steps: 2, log_every: 1, device: cpu, precision: float32}}
"""


def save_checkpoint(path, task_name, model):
    config = from_dict({"task": task_name, "model": model}, TASKS)
    task = TASKS[task_name](config)
    if "num_classes" in str(model):
        task.class_names = ["a", "b"]
    net = task.build_model()
    state = {"model": net.state_dict(), "optimizer": {}, "step": 1, "best_loss": 1.0, "config": to_dict(config)}
    checkpoint.save(state | {"task": task.state_dict()}, path)


# ----------------------------------------------------------------------------------------------------------------------
# Damage


def damage(rng: np.random.Generator, data: bytes) -> bytes:
    """Changes a file like a bad disk or an attacker: flips, cuts, repeats, inserts, or writes extreme numbers."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        place = int(rng.integers(len(data) + 1)) if rng.random() < 0.5 else int(len(data) * rng.random() ** 4)
        length = int(min(len(data), 2 ** rng.uniform(0, 10)))
        kind = rng.integers(7)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[place : place + length] = rng.integers(0, 256, length, np.uint8).tobytes()
        elif kind == 2:
            del data[place:]
        elif kind == 3:
            del data[place : place + length]
        elif kind == 4:
            data[place:place] = data[place : place + length] * int(rng.integers(1, 4))
        elif kind == 5:
            size = int(rng.choice((1, 2, 4, 8)))
            number = int(rng.choice((0, 1, 0x7F, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1))) % 2 ** (8 * size)
            data[place : place + size] = number.to_bytes(size, str(rng.choice(("big", "little"))))
        else:
            data[place:place] = bytes(length)
    return bytes(data)


VALUES = "0 -1 1e308 nan null true [] {} '' 'x' 2000000000 [1,[2]] 0x10 1_000 2024-01-01 *x !!python/tuple ~".split()


def damage_text(rng, data: bytes) -> bytes:
    """Changes a YAML text: damages bytes, changes values, or repeats, removes and swaps lines."""
    if rng.random() < 0.3:
        return damage(rng, data)
    lines = data.decode().splitlines()
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(len(lines)))
        key, colon, _ = lines[place].partition(":")
        kind = rng.integers(5)
        if kind <= 1 and colon:
            lines[place] = f"{key}: {rng.choice(VALUES)}"
        elif kind == 2:
            lines.insert(int(rng.integers(len(lines))), lines[place])
        elif kind == 3 and len(lines) > 1:
            del lines[place]
        else:
            lines[place] = lines[place][: int(rng.integers(len(lines[place]) + 1))]
    return "\n".join(lines).encode()


# ----------------------------------------------------------------------------------------------------------------------
# Kinds of cases: each takes random numbers and the folder of the samples, changes files in the current folder, and
# returns a script and its arguments.


def config_case(rng, samples):
    name = str(rng.choice(("clm", "music", "mlm", "digits", "txt_clf", "tiny")))
    Path("config.yaml").write_bytes(damage_text(rng, (samples / f"{name}.yaml").read_bytes()))
    return "train", ["config.yaml", "train.dry_run=true"]


def run_case(rng, samples):
    """A short run of a damaged config."""
    Path("config.yaml").write_bytes(damage_text(rng, (samples / "tiny.yaml").read_bytes()))
    return "train", ["config.yaml", "train.max_steps=2", "train.device=cpu", f"data.path={samples}/text.txt"]


def resume_case(rng, samples):
    """A run that continues from a damaged checkpoint."""
    Path("last.pt").write_bytes(damage(rng, (samples / "run/checkpoints/last.pt").read_bytes()))
    return "train", [str(samples / "tiny.yaml"), "train.max_steps=3", "train.resume=last.pt", "train.out_dir=out"]


def rezip(rng, data: bytes) -> bytes:
    """Damages the pickle or a tensor of a checkpoint, and packs it again with right checksums."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(packed, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                content = damage(rng, content)
            new.writestr(entry, content)
    return packed.getvalue()


def checkpoint_case(rng, samples):
    name = str(rng.choice(list(MODELS)))
    data = (samples / f"{name}.pt").read_bytes()
    Path("model.pt").write_bytes(damage(rng, data) if rng.random() < 0.5 else rezip(rng, data))
    if name in ("text", "music"):
        prompt = "ab" if name == "text" else str(samples / "piece.mid")
        return "generate", ["--ckpt", "model.pt", "--prompt", prompt, "--max-new-tokens", "4", "--device", "cpu"]
    inputs = {"image": ["image.png"], "flow": ["image.png", "image.jpg"], "video": ["clip.mp4"]}
    files = [str(samples / file) for file in inputs.get(name, ["text.txt"])]
    return "predict", ["--ckpt", "model.pt", *files, "--device", "cpu"]


def weights_case(rng, samples):
    """Published weights: the file of the weights is damaged, or config.json, or a number in it is extreme."""
    name = str(rng.choice(list(PUBLISHED)))
    weights = str(rng.choice(("model.safetensors", "pytorch_model.bin")))
    config = (samples / name / "config.json").read_bytes()
    data = (samples / name / weights).read_bytes()
    kind = rng.integers(4)
    if kind == 0:
        data = damage(rng, data)
    elif kind == 1:
        data = rezip(rng, data) if weights.endswith(".bin") else damage(rng, data)
    elif kind == 2:
        config = damage(rng, config)
    else:
        numbers = list(re.finditer(rb"\b\d+\b", config))
        found = numbers[rng.integers(len(numbers))]
        config = config[: found.start()] + str(2 ** int(rng.integers(70))).encode() + config[found.end() :]
    Path(weights).write_bytes(data)
    Path("config.json").write_bytes(config)
    files = [str(samples / file) for file in PUBLISHED[name]]
    return "predict", ["--ckpt", weights, *files, "--device", "cpu"]


def midi_case(rng, samples):
    Path("piece.mid").write_bytes(damage(rng, (samples / "piece.mid").read_bytes()))
    arguments = ["--ckpt", str(samples / "music.pt"), "--prompt", "piece.mid", "--max-new-tokens", "4"]
    return "generate", [*arguments, "--device", "cpu", "--piano-roll", "roll.png"]


def image_case(rng, samples):
    name = str(rng.choice(("image.png", "image.jpg", "image.bmp", "image.ppm", "image.tif", "image.webp", "gray.png")))
    data = (samples / name).read_bytes()
    Path(name).write_bytes(huge_png(rng) if rng.random() < 0.1 else damage(rng, data))
    if rng.random() < 0.5:
        return "predict", ["--ckpt", str(samples / "image.pt"), name, "--device", "cpu"]
    return "predict", ["--ckpt", str(samples / "flow.pt"), name, str(samples / "image.png"), "--device", "cpu"]


def huge_png(rng) -> bytes:
    """A small file that declares a large image."""
    sides = [int(2 ** rng.uniform(4, 31)) for _ in range(2)]
    depth, color = rng.choice(((8, 2), (16, 2), (8, 6), (1, 0), (8, 3)))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", *sides, depth, color, 0, 0, 0)
    pixels = zlib.compress(bytes(2**20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def video_case(rng, samples):
    name = str(rng.choice(("clip.mp4", "clip.mkv", "clip.avi", "clip.mov")))
    Path(name).write_bytes(damage(rng, (samples / name).read_bytes()))
    model = str(rng.choice(("video.pt", "flow.pt")))
    return "predict", ["--ckpt", str(samples / model), name, "--device", "cpu"]


def bytes_case(rng, samples):
    """Any bytes as a text to continue, to fill in, to classify, or to train on."""
    data = damage(rng, (samples / "text.txt").read_bytes())
    Path("input.txt").write_bytes(data[: 2 ** int(rng.integers(3, 12))])
    kind = rng.integers(4)
    if kind == 0:
        arguments = ["--ckpt", str(samples / "text.pt"), "--prompt-file", "input.txt", "--max-new-tokens", "4"]
        return "generate", [*arguments, "--device", "cpu"]
    if kind == 1:
        return "train", [str(samples / "tiny.yaml"), "data.path=input.txt", "train.out_dir=out"]
    model = "masked.pt" if kind == 2 else "classes.pt"
    return "predict", ["--ckpt", str(samples / model), "input.txt", "--device", "cpu"]


def data_case(rng, samples):
    """Damaged token ids or tables as training data."""
    name = str(rng.choice(("ids.npy", "ids.bin", "rows.jsonl", "rows.csv")))
    Path(name).write_bytes(damage(rng, (samples / name).read_bytes()))
    if name.startswith("ids"):
        return "train", [str(samples / "tiny.yaml"), f"data.path={name}", "train.out_dir=out", "model.vocab_size=262"]
    model = ["model.num_latents=4", "model.num_latent_channels=16", "model.input.max_seq_len=16", "model.num_classes=2"]
    model += ["model.init_from=null", "model.freeze_encoder=false", "data.batch_size=4", "train.max_steps=1"]
    arguments = [str(samples / "txt_clf.yaml"), f"data.path={name}", "train.out_dir=out", "train.device=cpu"]
    return "train", arguments + model


CASES = {
    "configs": config_case,
    "runs of configs": run_case,
    "resumed checkpoints": resume_case,
    "checkpoints": checkpoint_case,
    "weights": weights_case,
    "MIDI files": midi_case,
    "images": image_case,
    "videos": video_case,
    "byte streams": bytes_case,
    "ids and tables": data_case,
}

# ----------------------------------------------------------------------------------------------------------------------
# Running a case


@dataclass
class Result:
    code: int
    error: str  # what went wrong; empty if the script did as it should
    seconds: float
    memory: int  # peak of resident bytes, with PyTorch's


def run_main(script: str, arguments: list[str]):
    sys.argv = [f"{script}.py", *arguments]
    if script == "train":
        run_script(train.main)
    module = {"generate": generate, "predict": predict}[script]
    run_script(lambda: module.main(module.parse_args()))


def child(case, key, samples, folder):
    """Runs a case. Never returns: the exit code is the script's, or 70 for an exception that escaped."""
    os.chdir(folder)
    os.dup2(os.open("stdout", os.O_CREAT | os.O_WRONLY), 1)
    os.dup2(os.open("stderr", os.O_CREAT | os.O_WRONLY), 2)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), encoding="utf-8", errors="surrogateescape", write_through=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), encoding="utf-8", errors="backslashreplace", write_through=True)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY,) * 2)
    code = 70
    try:
        rng = np.random.default_rng(key)
        run_main(*case(rng, samples))
    except SystemExit as exit:
        code = exit.code or 0
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(code)


def run_case_alone(kind: str, number: int, seed: int, samples: Path) -> Result:
    key = (seed, list(CASES).index(kind), number)
    before = fingerprint(samples)
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            child(CASES[kind], key, samples, folder)
        too_long = threading.Timer(SECONDS, os.kill, (pid, TOO_LONG))
        too_long.start()
        _, status, usage = os.wait4(pid, 0)
        too_long.cancel()
        too_long.join()
        seconds = time.monotonic() - start
        code = os.waitstatus_to_exitcode(status)
        stderr = Path(folder, "stderr").read_text(errors="replace")
    memory = 1024 * usage.ru_maxrss
    error = judge(code, stderr)
    if not error and memory > MEMORY:
        error = f"took {memory / 2**20:.0f} MiB"
    if not error and fingerprint(samples) != before:
        error = "changed the run folder"
    return Result(code, error, seconds, memory)


def judge(code, stderr) -> str:
    """What the script did wrong; empty if nothing."""
    lines = stderr.replace("\r", "\n").splitlines()
    if code == -TOO_LONG:
        return f"took more than {SECONDS} s"
    if code < 0:
        return f"died of {signal.Signals(-code).name}"
    if code == 1 and stderr.count("error: at step ") == 1:  # damaged weights diverge, and train.py says so
        return ""
    if code not in (0, 2):
        last = lines[-1] if lines else ""
        return f"exit code {code}: {last[:150]}"
    if code == 2 and sum(line.startswith("error: ") or ": error: " in line for line in lines) != 1:
        return f"exit code 2 without one line of error: {stderr[-150:]!r}"
    if "Traceback" in stderr:
        return f"a traceback: {lines[-1][:150]}"
    return ""


def fingerprint(samples: Path) -> str:
    """Changes with any file of the run."""
    total = hashlib.sha256()
    for file in sorted(samples.rglob("*")):
        if file.is_file():
            total.update(f"{file} {file.stat().st_mtime_ns} {file.stat().st_size}".encode())
    return total.hexdigest()


def make_run(samples: Path):
    """The run that `resume_case` continues."""
    config = load_config(samples / "tiny.yaml", [f"train.out_dir={samples}/run", "train.compile=false"], TASKS)
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGALRM
    handlers = [signal.getsignal(number) for number in numbers]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.train(config, Ranks(0, 1, torch.device("cpu")))
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)


def fuzz(count: int, seconds: float, seed: int, samples: Path) -> dict[str, list[Result]]:
    """Runs up to `count` cases, the kinds in turn, until `seconds` have passed. Reports what goes wrong on stderr."""
    torch.set_num_threads(1)
    kinds = tuple(CASES)
    results = defaultdict(list)
    start = time.monotonic()
    for number in range(count):
        if time.monotonic() - start > seconds:
            break
        kind = kinds[number % len(kinds)]
        result = run_case_alone(kind, number // len(kinds), seed, samples)
        results[kind].append(result)
        if result.error:
            print(f"{kind}:{number // len(kinds)}: {result.error}", file=sys.stderr, flush=True)
    return results


def table(results) -> str:
    lines = [
        "| files | cases | exit code 0 | exit code 2 | diverged | wrong | longest | most memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = [*results.items(), ("all", [result for found in results.values() for result in found])]
    for kind, found in rows:
        codes = Counter(result.code for result in found if not result.error)
        wrong = sum(bool(result.error) for result in found)
        seconds = max(result.seconds for result in found)
        memory = max(result.memory for result in found) / 2**20
        lines.append(
            f"| {kind} | {len(found):,} | {codes[0]:,} | {codes[2]:,} | {codes[1]} | {wrong} | {seconds:.1f} s | "
            f"{memory:.0f} MiB |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="KIND:NUMBER", help="run one case, and show its output")
    parser.add_argument("--out", help="a file for the table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder)
        make_samples(samples)
        make_run(samples)
        if args.only:
            kind, number = args.only.split(":")
            os.chdir(samples)
            key = (args.seed, list(CASES).index(kind), int(number))
            script, arguments = CASES[kind](np.random.default_rng(key), samples)
            print(script, *arguments)
            run_main(script, arguments)
        start = time.monotonic()
        text = table(fuzz(args.count, args.seconds, args.seed, samples))
        print(text, f"{time.monotonic() - start:.0f} s", sep="\n")
        if args.out:
            Path(args.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
