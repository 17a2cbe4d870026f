"""Write a picture of a run, which TensorBoard shows too, to a file: `python docs/show.py runs/flow flow flow.png`."""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from perceiver.errors import UserError, run_script
from perceiver.io import save_picture
from perceiver.pretrained import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ckpt", help="a run folder or a checkpoint of train.py")
    parser.add_argument("name", help="the name of the picture in TensorBoard")
    parser.add_argument("out", help="the file to write")
    args = parser.parse_args()
    task, model = load_model(args.ckpt)
    task.load_data()
    with torch.inference_mode():
        shown = {name: value for name, value in task.visualize(model).items() if isinstance(value, torch.Tensor)}
    if args.name not in shown:
        raise UserError(f"{args.ckpt} has no picture {args.name}; choose from {', '.join(shown)}")
    save_picture(shown[args.name], Path(args.out))


if __name__ == "__main__":
    run_script(main)
