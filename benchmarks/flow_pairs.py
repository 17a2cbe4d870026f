"""Measures a run's optical flow on real pairs with known flow, scene by scene.

    python benchmarks/flow_pairs.py runs/flow data/middlebury --picture docs/flow.jpg

The folder holds other-data and other-gt-flow of https://vision.middlebury.edu/flow/data. The table gives end-point
errors in pixels over the pixels of known flow. "Standing still" predicts that nothing moves. The picture shows the
pairs that training on Middlebury would hold out.
"""
import argparse
import sys
import time
from pathlib import Path

import torch
from torchvision.transforms.v2.functional import center_crop

sys.path.append(str(Path(__file__).parent.parent))
from perceiver import pictures  # noqa: E402
from perceiver.errors import run_script  # noqa: E402
from perceiver.io import save_picture  # noqa: E402
from perceiver.pretrained import load_model  # noqa: E402
from perceiver.tasks.flow import FlowDataConfig, find_pairs, read_flow, read_frame  # noqa: E402


def measure(task, model, files: tuple) -> tuple:
    """The first frame, the predicted flow, the true flow, and the errors of the model and of standing still."""
    first, second, flow_file = files
    frames = torch.stack([read_frame(first), read_frame(second)])
    *flow, valid = read_flow(flow_file)
    flow, valid = torch.stack(flow, dim=-1), valid > 0
    predicted = task.flow(model, frames[None])[0]
    error = (predicted - flow).norm(dim=-1)[valid].mean().item()
    return frames[0], predicted, flow, error, flow.norm(dim=-1)[valid].mean().item()


def draw(results: list[tuple], file: str) -> None:
    """Writes a picture with a row for each pair: the first frame, its predicted flow, and its true flow."""
    size = [min(frame.shape[axis] for frame, *_ in results) for axis in (1, 2)]
    frames, *flows = (
        torch.stack([center_crop(image, size) for image in images])
        for images in zip(*((frame, predicted.movedim(-1, 0), flow.movedim(-1, 0))
                            for frame, predicted, flow, *_ in results)))
    flows = [flow.movedim(1, -1) for flow in flows]
    save_picture(pictures.flow_rows(frames, *flows, titles=("predicted flow", "true flow")), Path(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ckpt", help="a run folder, a checkpoint of train.py, or published weights")
    parser.add_argument("folder", help="the folder that holds other-data and other-gt-flow")
    parser.add_argument("--picture", help="a file for the picture of the held-out pairs")
    args = parser.parse_args()
    train, held_out = find_pairs(FlowDataConfig(dataset="middlebury", path=args.folder))
    task, model = load_model(args.ckpt)
    print("| scene | error | standing still | seconds |\n|---|---|---|---|")
    with torch.inference_mode():
        for title, pairs in (("other scenes", train), ("held-out scenes", held_out)):
            results = []
            start = time.perf_counter()
            for files in pairs:
                before = time.perf_counter()
                results.append(measure(task, model, files))
                *_, error, still = results[-1]
                seconds = time.perf_counter() - before
                print(f"| {files[0].parent.name} | {error:.3f} | {still:.3f} | {seconds:.0f} |", flush=True)
            error, still = (sum(result[place] for result in results) / len(results) for place in (3, 4))
            print(f"| mean of {len(pairs)} {title} | {error:.3f} | {still:.3f} | {time.perf_counter() - start:.0f} |")
    if args.picture:
        draw(results, args.picture)


if __name__ == "__main__":
    run_script(main)
