"""Times our rows of compare.py in bf16 beside float32: `python benchmarks/bf16_speed.py`.

Both run in one process, in turns, so that a change of the machine's speed meets both.
"""
import argparse
import sys
from pathlib import Path
from statistics import median, quantiles

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from compare import machine  # noqa: E402
from rows import ROWS  # noqa: E402
from worker import Worker  # noqa: E402


def seconds(worker: Worker, bf16: bool) -> float:
    worker.bf16 = bf16
    return worker.unit()["seconds"]


def main() -> None:
    rows = [name for name, row in ROWS.items() if row.kind in ("train", "forward")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=rows, default=["ar-train", "mnist-train"])
    parser.add_argument("--rounds", type=int, default=12, help="number of timed pairs")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    print(machine(args.device))
    print("| work | float32 | bf16 | float32 / bf16 (quartiles) |\n|---|---|---|---|")
    for row in args.rows:
        worker = Worker("ours", args.device, "float32")
        worker.build(row)
        pairs = [(seconds(worker, False), seconds(worker, True)) for _ in range(args.rounds + 1)][1:]  # one to warm up
        low, middle, high = quantiles(wide / narrow for wide, narrow in pairs)
        wide, narrow = (median(times) for times in zip(*pairs))
        print(f"| {row} | {wide:.2f} s | {narrow:.2f} s | {middle:.2f} ({low:.2f} .. {high:.2f}) |", flush=True)


if __name__ == "__main__":
    main()
