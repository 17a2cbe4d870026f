"""The tasks, by the name that a config gives, and how to load what one of them trained."""
from pathlib import Path

import torch
from torch import nn

from perceiver import checkpoint
from perceiver.config import from_dict
from perceiver.pretrained import load_weights
from perceiver.tasks.base import Autoregression, Classification, Task
from perceiver.tasks.copy import Copy
from perceiver.tasks.flow import OpticalFlow
from perceiver.tasks.image import ImageClassification, ImageSequences
from perceiver.tasks.language import CausalLM, MaskedLM, TextClassification
from perceiver.tasks.music import SymbolicMusic
from perceiver.tasks.video import MultimodalAutoencoding

TASKS = {
    "causal_lm": CausalLM,
    "masked_lm": MaskedLM,
    "text_classification": TextClassification,
    "image_classification": ImageClassification,
    "copy": Copy,
    "symbolic_music": SymbolicMusic,
    "image_ar": ImageSequences,
    "optical_flow": OpticalFlow,
    "multimodal_autoencoding": MultimodalAutoencoding,
}


def load_checkpoint(path: str | Path, device: torch.device) -> tuple[Task, nn.Module]:
    """The task of a checkpoint of train.py and its model, rebuilt from the config in it, in evaluation mode. Raises
    UserError if there is none or it is broken."""
    saved = checkpoint.load(path, device)
    config = from_dict(saved["config"], TASKS)
    task = TASKS[config.task](config)
    task.restore(saved)
    model = task.build_model().to(device)
    load_weights(model, saved["model"], str(path))
    return task, model.eval()
