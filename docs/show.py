"""Writes what a run shows in TensorBoard as a file: `python docs/show.py RUN/checkpoints/best.pt NAME OUT.png`."""
import sys
from pathlib import Path

import torch
from torchvision.transforms.v2.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).parent.parent))
from perceiver.tasks import load_checkpoint

checkpoint, name, out = sys.argv[1:]
task, model = load_checkpoint(checkpoint, torch.device("cpu"))
task.load_data()
to_pil_image(task.show(model)[name]).save(out)
