"""Compares the speed and the memory of this project with all others that do the same work, in one table.

    python benchmarks/compare.py [--rows ar-train ...] [--peers krasserm ...] [--rounds 15] [--out FOLDER]

The two sides of a comparison are this project ("ours") and another one (the "peer"). Each side has its own process. The
sides take turns: each does one unit of work at a time, so other load on the machine slows both alike. Two neighboring
units form a pair. The table has the median of each side's times, and the median of the ratios of all pairs, with
quartiles.

The rows are in rows.py, the sides in sides.py; that is where new ones go. worker.py does the work. The row `loader` has
a table of its own, without peers. benchmarks/requirements.txt says how to install the peers. Peers that are not
installed are left out, unless --peers names them. `--peers ours --peer-dir DIR` compares with another checkout.

A training step is forward, cross-entropy, backward and fused AdamW. Memory is measured in processes of its own: the
peak during a unit, beyond parameters, gradients and optimizer state. `difference` is the largest difference between the
outputs of both sides with the same random weights. The floor is the time of the matrix products alone, at the speed of
large ones, measured in the same run; for decoding, the time to read all weights and cached keys and values once.

With --precision auto, our side computes as train.py does by default: in bf16 if the device is fast at it. Another
checkout computes in the same way. Other peers and the decoding rows stay in float32. --out writes compare.md and
compare.json after each comparison.
"""
import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median, quantiles

import torch
from rows import ROWS
from sides import PEERS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from perceiver.errors import UserError, reason, run_script  # noqa: E402

FOLDERS = {"krasserm": "/tmp/peer-krasserm", "lucidrains": "/tmp/peer-lucidrains"}  # of packages
RECIPES = ("clm", "mlm", "copy_4k", "music", "flow", "autoencode")  # with data that need no download


class Process:
    """The worker process of a side. `process("unit")` makes it do one unit of its row."""

    def __init__(self, name: str, folder: Path, device: str, precision: str, **env):
        self.name = name
        command = [sys.executable, Path(__file__).with_name("worker.py"), name, device, precision]
        env = os.environ | {"PYTHONPATH": str(folder), **env}
        self.process = subprocess.Popen(command, text=True, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, do: str, **arguments) -> dict:
        print(json.dumps({"do": do, **arguments}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"the process of {self.name} ended in {do}; its error is above")
        return json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()  # the worker reads to the end, and stops
        self.process.wait()


def compare(name: str, peer: str, args) -> dict:
    """Measures a row beside a peer. The result has plain numbers, ours first; `table` turns them into text."""
    row = ROWS[name]
    folders = {"ours": ROOT, "peer": peer_folder(peer, args)}

    def start(side: str, precision=args.precision, **env) -> Process:
        process = Process("ours" if side == "ours" else peer, folders[side], args.device, precision, **env)
        process.built = process("build", row=name)
        return process

    def seconds(side: str) -> float:
        if row.kind != "start":
            return processes[side]("unit")["seconds"]
        begin = time.perf_counter()
        with start(side) as process:
            process("unit")
            return time.perf_counter() - begin

    # The floor has a process of its own: in ours, its work would slow the next unit.
    with start("ours") as ours, start("peer") as theirs, start("ours") as meter:
        processes = {"ours": ours, "peer": theirs}
        parameters = [process.built["parameters"] for process in (ours, theirs)]
        result = {"row": name, "peer": peer, "parameters": parameters, "bf16": ours.built["bf16"]}
        result |= {"pairs": [], "floors": []}
        for i in range(args.rounds + 1):
            order = ("ours", "peer") if i % 2 else ("peer", "ours")  # the sides take turns to be first
            times = {side: seconds(side) for side in order}
            if i == 0:  # a first unit takes longer
                continue
            result["pairs"].append([times["ours"], times["peer"]])
            if row.kind != "start":
                floor = meter("floor")
                result["floors"].append(floor.pop("seconds"))
                result |= floor
    if row.kind == "start":
        return result

    # glibc unmaps a freed array only above a size, which it raises with each free. With a fixed size, the resident
    # memory is the live memory. This slows the work, so the processes that measure time do without.
    result["memory"] = []
    for side in folders:
        with start(side, MALLOC_MMAP_THRESHOLD_=str(2**17)) as process:
            result["memory"].append(process("memory")["bytes"])
    if PEERS[peer].same:
        with tempfile.TemporaryDirectory() as folder:
            file = f"{folder}/outputs.pt"
            with start("peer", precision="float32") as process:
                process("save", file=file)
            with start("ours", precision="float32") as process:
                result |= process("check", file=file)
    return result


def table(results: list[dict]) -> str:
    """The results of `compare` as a Markdown table."""
    lines = ["| work | peer | parameters | ours | peer | peer / ours (quartiles) | memory: ours | peer | ours / peer | "
             "floor | ours / floor | difference |", "|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for result in results:
        ours, theirs = zip(*result["pairs"])
        low, middle, high = quartiles([b / a for a, b in result["pairs"]])
        counts = [f"{count:,}" for count in dict.fromkeys(result["parameters"])]
        cells = [ROWS[result["row"]].work + (", ours in bf16" if result["bf16"] else ""), result["peer"],
                 " and ".join(counts), duration(median(ours)), duration(median(theirs)),
                 f"{middle:.2f} ({low:.2f} .. {high:.2f})"]
        memory = floor = difference = ""
        if "memory" in result:
            a, b = result["memory"]
            memory = [f"{a / 2**20:,.0f} MiB", f"{b / 2**20:,.0f} MiB", f"{a / b:.2f}" if b else ""]
        if result["floors"]:
            above = median(a / floor for a, floor in zip(ours, result["floors"]))
            floor = [duration(median(result["floors"])), f"{above:.2f}"]
        if "difference" in result:
            difference = f"{result['difference']:.0e} (std {result['scale']:.1f})"
        elif not PEERS[result["peer"]].same:
            difference = "not the same computation"
        cells += [*(memory or 3 * [""]), *(floor or 2 * [""]), difference]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def loader_table(results: list[dict]) -> str:
    lines = ["| recipe | loader, examples/s | training step, examples/s | loader / step |", "|---|---|---|---|"]
    for result in results:
        ratio = result["loader"] / result["step"]
        lines.append(f"| {result['recipe']} | {result['loader']:,.0f} | {result['step']:,.0f} | {ratio:.1f} |")
    return "\n".join(lines)


def quartiles(values: list[float]) -> list[float]:
    return quantiles(values, n=4) if len(values) > 1 else 3 * values


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.{0 if seconds > 0.1 else 2}f} ms"


def machine(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores, {torch.get_num_threads()} threads"


def peer_folder(peer: str, args) -> Path:
    """The folder that holds the peer's package. Raises UserError if it is not there."""
    package = PEERS[peer].package
    if peer == "transformers":
        if importlib.util.find_spec(package) is None:
            raise UserError("peer transformers is not installed; see benchmarks/requirements.txt")
        return ROOT / "benchmarks"  # any folder without a package `perceiver`
    folder = args.peer_dir or Path(FOLDERS.get(peer, ""))
    if peer == "ours" and args.peer_dir is None:
        raise UserError("--peers ours needs --peer-dir, another checkout of this project")
    if not (folder / package).is_dir():
        raise UserError(f"{folder} holds no package {package}; see benchmarks/requirements.txt")
    return folder.resolve()


def check_arguments(args) -> list[tuple[str, str]]:
    """The comparisons to do: (row, peer). Raises UserError for wrong arguments."""
    for option, names, known in (("--rows", args.rows, [*ROWS, "loader"]), ("--peers", args.peers, PEERS)):
        for name in names or ():
            if name not in known:
                raise UserError(f"{option} {name}: choose from {', '.join(known)}")
    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds} must be at least 1")
    if args.peer_dir and (not args.peers or len(args.peers) > 1):
        raise UserError("--peer-dir needs --peers with exactly one peer")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {args.device} is not available") from None
    if args.out:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {args.out} is no folder: {reason(error)}") from None
    rows = args.rows or [*ROWS, "loader"]
    peers = args.peers or [peer for peer in PEERS if peer != "ours"]
    for peer in list(peers):
        try:
            peer_folder(peer, args)
        except UserError as error:
            if args.peers:
                raise
            print(f"left out: {error}", file=sys.stderr)
            peers.remove(peer)
    work = [(row, peer) for row in rows for peer in peers if row != "loader" and PEERS[peer].has(ROWS[row])]
    if not work and "loader" not in rows:
        raise UserError(f"none of the peers has the rows {', '.join(rows)}: {', '.join(peers) or 'no peer'}")
    return work + [("loader", "")] * ("loader" in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: run_script(lambda: raise_error(message))
    parser.add_argument("--rows", nargs="+", help=f"default: all of {' '.join(ROWS)} loader")
    parser.add_argument("--peers", nargs="+", help=f"default: all of {' '.join(PEERS)} but ours")
    parser.add_argument("--rounds", type=int, default=15, help="number of timed pairs per comparison")
    parser.add_argument("--precision", choices=("float32", "bf16", "auto"), default="float32", help="of our side")
    parser.add_argument("--peer-dir", type=Path, help="folder of the peer's package, if not in /tmp/peer-NAME")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for compare.md and compare.json")
    args = parser.parse_args()
    work = check_arguments(args)
    head = {"date": str(date.today()), "machine": machine(args.device), "torch": torch.__version__,
            "precision": args.precision, "rounds": args.rounds, "command": " ".join(sys.argv)}
    title = (f"{head['date']}, {head['machine']}, torch {head['torch']}, precision {args.precision}, {args.rounds} "
             f"pairs: `python {head['command']}`")
    results, loaders = [], []
    print(title)
    for row, peer in work:
        start = time.perf_counter()
        if row == "loader":
            with Process("ours", ROOT, args.device, args.precision) as process:
                loaders = [process("loader", config=name) | {"recipe": name} for name in RECIPES]
            print(loader_table(loaders), flush=True)
        else:
            results.append(compare(row, peer, args))
            lines = table(results[-1:]).splitlines()
            print("\n".join(lines if len(results) == 1 else lines[-1:]), flush=True)
        print(f"{row} {peer}: {time.perf_counter() - start:.0f} s in all", file=sys.stderr)
        if args.out:
            parts = [title, *([table(results)] if results else []), *([loader_table(loaders)] if loaders else [])]
            (args.out / "compare.md").write_text("\n\n".join(parts) + "\n")
            (args.out / "compare.json").write_text(
                json.dumps(head | {"results": results, "loader": loaders}, indent=1) + "\n")


def raise_error(message: str):
    raise UserError(message)


if __name__ == "__main__":
    run_script(main)
