"""What a run of task image_ar makes of validation images: `python -m docs.plot_completions RUN PNG`.

Rows: the images, their upper halves, which the model gets, and two completions. Needs the run's data.
"""
import sys

import numpy as np
import torch
from torchvision.transforms.v2.functional import to_pil_image

from perceiver.data import to_tokens
from perceiver.sampling import generate
from perceiver.tasks import load_checkpoint

run, png = sys.argv[1:]
task, model = load_checkpoint(f"{run}/checkpoints/best.pt", torch.device("cpu"))
task.load_data()
tokens = np.stack([to_tokens(task.val_images[index]["image"]) for index in range(12)])  # (12, 1 + S)
prompts = tokens[:, : task.num_given].tolist()
samples = [torch.stack(list(generate(model, prompts, tokens.shape[1] - task.num_given, seed=seed)), 1)
           for seed in (0, 100)]
to_pil_image(task.picture(tokens, torch.stack(samples))).save(png)
