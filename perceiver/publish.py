"""Publishing: model.safetensors and config.json, for `from_pretrained`, the Hugging Face Hub, and transformers."""

import dataclasses
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from perceiver import checkpoint
from perceiver.config import Config, from_dict, to_dict
from perceiver.errors import UserError
from perceiver.io import replacing
from perceiver.pretrained import (
    DEFAULTS,
    ENCODER,
    OURS,
    PORT_KEYS,
    image_conv,
    image_fourier,
    image_learned,
    masked_lm,
    multimodal,
    optical_flow,
    rename_key,
)
from perceiver.tasks import TASKS, Task

DTYPES = {  # of a safetensors file
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}


def publish(task: Task, model: nn.Module, folder: Path) -> str:
    """Writes config.json and model.safetensors. Returns a line about who can load them.

    The folder does not tell where the data and the initial weights were.
    """
    config_json = {OURS: {"config": public_config(task.config), "task": task.state_dict()}}
    state = model.state_dict()
    note = "transformers has no such model"
    port = port_config(task.config)
    if port is not None:
        kind, published, variant = port
        published["d_model"] = model.input_adapter.num_channels
        names = task.class_names or [f"LABEL_{number}" for number in range(published.get("num_labels", 0))]
        published["id2label"] = dict(enumerate(names))
        config_json |= published
        state = port_state(state, kind)
        note = f"transformers.{ARCHITECTURES[kind]}.from_pretrained loads them, too"
        if variant == "deepmind":
            note += ", but it computes this kind with other padding or another residual, so its outputs differ"
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config_json, indent=2) + "\n")
    save_safetensors(state, folder / "model.safetensors")
    return note


def public_config(config: Config) -> dict:
    """The sections task, model and data as nested dicts, without the folders of this machine."""
    values = to_dict(config)
    values["model"]["init_from"] = None
    data = values["data"]
    if data.get("path") is not None:
        data["path"] = Path(data["path"]).name
    data.pop("cache_dir", None)
    return {"task": config.task, "model": values["model"], "data": data}


def save_safetensors(tensors: dict[str, Tensor], path: Path):
    """A safetensors file: the length of a JSON header, the header, and the bytes of the tensors."""
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)


# ----------------------------------------------------------------------------------------------------------------------
# The format of transformers

# The classes of transformers that load the weights of each kind
ARCHITECTURES = {
    masked_lm: "PerceiverForMaskedLM",
    multimodal: "PerceiverForMultimodalAutoencoding",
    image_learned: "PerceiverForImageClassificationLearned",
    image_conv: "PerceiverForImageClassificationConvProcessing",
    optical_flow: "PerceiverForOpticalFlow",
    image_fourier: "PerceiverForImageClassificationFourier",
}
# Keys of PORT_KEYS that a kind does not have, although other kinds have them for the same weights of ours
ABSENT = {
    masked_lm: ("perceiver.decoder.decoder.",),
    image_learned: ("input_adapter.position_embeddings.", "input_adapter.convnet.conv."),
}
# Our options of a model besides its encoder, and the same options in transformers' PerceiverConfig
MODEL = {
    "num_latents": "num_latents",
    "num_latent_channels": "d_latents",
    "num_classes": "num_labels",
    "num_output_channels": "output_num_channels",
}
INPUT = {
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "num_input_channels": "d_model",
    "frame_shape": "train_size",
    "samples_per_patch": "samples_per_patch",
    "num_classes": "num_labels",
}
# Options that do not change what a trained model computes
TRAINING = ("freeze_encoder", "coarse_to_fine", "init_from")


def port_key(key: str, kind) -> str:
    """transformers' name for a weight of ours: the inverse of `rename_key`, for a model of one `kind` of MODELS."""
    for theirs, ours in reversed(PORT_KEYS.items()):
        if theirs not in ABSENT.get(kind, ()):
            key = key.replace(ours, theirs)
    return key


def port_state(state: dict[str, Tensor], kind) -> dict[str, Tensor]:
    """Our weights under transformers' names."""
    published = {port_key(key, kind): value for key, value in state.items()}
    assert [rename_key(key) for key in published] == list(state)
    return published


def port_config(config: Config) -> tuple[Callable, dict, str] | None:
    """The kind of a model of ours in MODELS, its config.json for transformers, and the variant that it equals.

    None if no kind, read back from such a config.json, gives the model.
    """
    if "input" not in vars(config.model) or config.model.decoder is None:
        return None
    published = port_values(config.model)
    for kind, architecture in ARCHITECTURES.items():
        for variant in ("transformers", "deepmind"):
            with suppress(UserError):
                made = from_dict(kind(DEFAULTS | published, variant), TASKS)
                same_task = made.task == config.task
                if same_task and not checkpoint.differences(comparable(made.model), comparable(config.model), "model"):
                    return kind, published | {"architectures": [architecture]}, variant
    return None


def port_values(model) -> dict:
    """The options of our model as transformers' PerceiverConfig has them, as far as it can."""
    published = {"model_type": "perceiver"}
    for part, names in ((model, MODEL), (model.encoder, ENCODER), (model.input, INPUT)):
        published |= {theirs: getattr(part, ours) for ours, theirs in names.items() if hasattr(part, ours)}
    published["hidden_act"] = "gelu" if model.encoder.activation == "gelu" else "gelu_pytorch_tanh"
    inputs = model.input
    if hasattr(inputs, "image_shape"):
        published["image_size"] = inputs.image_shape[1]
    if hasattr(inputs, "num_audio_samples"):
        num_frames, _, size = comparable(model)["input"]["max_resolution"]
        published |= {
            "num_frames": num_frames,
            "image_size": size,
            "audio_samples_per_frame": inputs.num_audio_samples // num_frames,
            "output_shape": [1, *inputs.image_shape[:3]],
            "_label_trainable_num_channels": model.decoder.num_query_channels or model.num_latent_channels,
        }
    return published


def comparable(model) -> dict:
    """The config of a model as nested dicts, without TRAINING, and with default resolutions filled in."""
    values = dataclasses.asdict(model)
    for name in TRAINING:
        values.pop(name, None)
    inputs = values["input"]
    if inputs.get("max_resolution", ()) is None:
        inputs["max_resolution"] = position_grid(model.input)
    return values


def position_grid(inputs) -> tuple[int, ...]:
    """The grid of the Fourier positions of images, frames or videos."""
    if hasattr(inputs, "frame_shape"):
        return inputs.frame_shape
    if hasattr(inputs, "patch_shape"):
        return tuple(size // patch for size, patch in zip(inputs.image_shape, inputs.patch_shape))
    return inputs.grid
