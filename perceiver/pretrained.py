"""Trained models: runs of train.py, DeepMind's weights on Hugging Face, and krasserm's Perceiver ARs."""

import dataclasses
import json
import re
import textwrap
import zipfile
from pathlib import Path

from torch import Tensor, nn
from torchvision.models import ResNet50_Weights

from perceiver import checkpoint
from perceiver.config import Config, from_dict
from perceiver.data import JsonTokenizer
from perceiver.errors import UserError, reading, reason
from perceiver.io import import_optional, load_tensors
from perceiver.tasks import TASKS, Task

VARIANTS = ("deepmind", "transformers")
WEIGHTS = ("pytorch_model.bin", "model.safetensors")
OURS = "perceiver_torch"  # the key of our config and task in a config.json that publish.py wrote
FILES = (checkpoint.BEST, checkpoint.LAST, *WEIGHTS)  # to load from a folder, the first that exists


def load_model(source: str | Path, device="cpu", variant="deepmind") -> tuple[Task, nn.Module]:
    """A trained model in evaluation mode, and its task.

    source   a run folder of train.py, a checkpoint, published weights (a folder with config.json, or the file), or a
             Hugging Face name such as deepmind/language-perceiver, which is downloaded once
    variant  how to run DeepMind's weights: "deepmind" as they were trained, "transformers" exactly like the Hugging
             Face port. The port differs in the GELU (exact, not tanh), in the padding of vision-perceiver-conv and in
             the query residual of vision-perceiver-learned

    The official models take and return:

        language-perceiver      input_ids (B, L), pad_mask (B, L) or None -> (B, L, 262)
        vision-perceiver-*      images (B, 3, 224, 224) -> (B, 1000)
        optical-flow-perceiver  frames (B, 2, 3, 368, 496) in [-1, 1] -> (B, 368, 496, 2) in pixels
        multimodal-perceiver    {"image": (B, 16, 3, 224, 224) in [0, 1], "audio": (B, 30720, 1) in [-1, 1],
                                "label": (B, 700), masked by default} -> a dict of the same shapes

    Raises UserError if there is no such model, or its files are damaged.
    """
    task, state = read_trained(source, variant)
    for value in state.values():
        if value.nbytes > value.untyped_storage().nbytes():
            raise UserError(f"{source} is damaged: it repeats values")
    # First without memory: the config may ask for more memory than the weights take.
    load_weights(task.meta_model(), state, source, assign=True)
    model = task.build_model()
    load_weights(model, state, source)
    return task, model.to(device).eval()


def from_pretrained(source: str | Path, variant="deepmind") -> nn.Module:
    """The model that `load_model` returns, on the CPU."""
    return load_model(source, variant=variant)[1]


def init_weights_from(model: nn.Module, source: str, config: Config):
    """Fills a new model with the weights of a trained one. `source` is any source of `load_model`.

    A Perceiver IO takes all parts from a model of the same task, except an output of another shape (other classes).
    From a model of another task it takes the input adapter and the encoder. A Perceiver AR takes all weights. Its
    num_latents may differ, and its max_seq_len too if there are no learned positions. Raises UserError if the models do
    not fit.
    """
    if is_missing(source):
        raise UserError(
            f"model.init_from={source} does not exist: train it first, or start without it (model.init_from=null)"
        )
    task, state = read_trained(source)
    same_task = task.name == config.task
    old = dataclasses.asdict(task.config.model)
    new = dataclasses.asdict(config.model)
    if ("encoder" in old) != ("encoder" in new):
        raise UserError(f"model.init_from={source} is a model of task {task.name}; task {config.task} cannot use it")

    if "encoder" not in new:
        kept = {name: old[name] for name in ("num_latents", "max_seq_len")}
        changed = checkpoint.differences(old, new | kept, "model")
    else:
        changed = checkpoint.differences(old["encoder"], new["encoder"], "model.encoder", CHOICES)
        if same_task and old["decoder"] and new["decoder"]:
            changed += checkpoint.differences(old["decoder"], new["decoder"], "model.decoder", CHOICES)
    if changed:
        raise UserError(f"model.init_from={source} does not fit: {', '.join(changed)}")

    if "encoder" not in new:
        load_weights(model, state, source)
        return
    for name, part in model.named_children():
        prefix = f"{name}."
        weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if name == "output_adapter" and shapes(weights) != shapes(part.state_dict()):
            continue
        if same_task or name in ("input_adapter", "encoder"):
            load_weights(part, weights, f"{source} ({name})")


# Options of encoders and decoders that the shapes of weights do not reveal
CHOICES = (
    "num_cross_attention_heads",
    "num_self_attention_heads",
    "num_cross_attention_layers",
    "num_self_attention_blocks",
    "first_cross_attention_layer_shared",
    "first_self_attention_block_shared",
    "cross_attention_residual",
    "activation",
)


def shapes(state):
    return {key: value.shape for key, value in state.items()}


def load_weights(model: nn.Module, state: dict[str, Tensor], source, assign=False):
    """`model.load_state_dict(state, assign=assign)`. Raises a UserError of one line, with the keys that do not fit."""
    try:
        model.load_state_dict(state, assign=assign)
    except RuntimeError as error:
        problems = textwrap.shorten(str(error), 2000, placeholder=" ...")
        raise UserError(f"the weights in {source} do not fit the model: {problems}") from None


# ----------------------------------------------------------------------------------------------------------------------
# Where the files are


def is_missing(source) -> bool:
    """Whether `source` is neither a file, nor a folder, nor a possible Hugging Face name (owner/name)."""
    owner = str(source).partition("/")[0]
    is_local = owner == "runs" or Path(owner).exists()  # train.py writes to runs
    is_name = not is_local and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source))
    return not is_name and not Path(source).exists()


def find_file(source) -> Path:
    """The file of the checkpoint or of the weights of `source`. Downloads a Hugging Face model."""
    path = Path(source)
    if is_missing(source):
        raise UserError(f"{source} does not exist")
    if path.is_dir():
        for name in FILES:
            if (path / name).is_file():
                return path / name
        raise UserError(f"folder {path} holds no {' or '.join(FILES)}")
    return path if path.exists() else download(str(source))


def download(name) -> Path:
    """The file of the weights in huggingface_hub's cache, with config.json and tokenizer.json beside it."""
    hub = import_optional("huggingface_hub", f"downloading {name}")
    why = f"it has no {' or '.join(WEIGHTS)}"
    try:
        for weights in WEIGHTS:
            files = ["config.json", "tokenizer.json", weights]
            file = Path(hub.snapshot_download(name, allow_patterns=files), weights)
            if file.is_file():
                return file
    except hub.errors.GatedRepoError:
        why = f"you have no permission; ask for it at https://huggingface.co/{name} and set HF_TOKEN"
    except hub.errors.RepositoryNotFoundError:
        why = "no such file or folder exists here, and no such model on huggingface.co (a private one needs HF_TOKEN)"
    except hub.errors.LocalEntryNotFoundError:
        why = "huggingface.co cannot be reached, or HF_HUB_OFFLINE is set, and the cache does not hold the model"
    except Exception as error:  # the hub raises the errors of several packages
        why = reason(error)
    raise UserError(f"cannot download {name}: {why}")


def read_trained(source, variant="deepmind"):
    """The task and the state_dict of the trained model `source`."""
    if variant not in VARIANTS:
        raise UserError(f"variant={variant!r} must be one of {', '.join(VARIANTS)}")
    path = find_file(source)
    if path.suffix in (".bin", ".safetensors"):
        return read_published(path, variant)
    saved = checkpoint.load(path)
    return saved_task(saved), saved["model"]


def saved_task(saved: dict) -> Task:
    """The task in a checkpoint, from its entries `config` and `task`."""
    config = from_dict(saved["config"], TASKS)
    task = TASKS[config.task](config)
    task.load_state_dict(saved["task"])
    return task


# ----------------------------------------------------------------------------------------------------------------------
# Published weights


MAX_TABLES = 2**28  # bytes of computed positions; those of the official models take up to 188 million


def read_published(path, variant):
    """The task and the state_dict of published weights. config.json describes the model; if it is missing, MODELS.

    A config.json that publish.py wrote holds our config, too. `variant` does not matter then.
    """
    weights = read_weights(path)
    markers = [key for key in MODELS if key in weights]
    config_json = path.with_name("config.json")
    published = None
    if config_json.exists():
        with reading(config_json):
            published = DEFAULTS | json.loads(config_json.read_bytes())
            if OURS in published:
                return saved_task(published[OURS]), renamed(weights) if markers else weights
    if not markers:
        raise UserError(f"{path} holds no weights of a known model")
    make_config, official = MODELS[markers[0]]
    if published is None:
        published = DEFAULTS | official
    if published["id2label"]:
        published["num_labels"] = len(published["id2label"])
    try:
        config = from_dict(make_config(published, variant), TASKS)
    except KeyError as error:
        raise UserError(f"{config_json} lacks {error}") from None
    except UserError as error:
        raise UserError(f"{config_json} describes no known model: {error}") from None

    task = TASKS[config.task](config)
    tables = sum(table.nbytes for table in task.meta_model().buffers())
    if published["num_labels"] > 10**6 or tables > MAX_TABLES:
        raise UserError(f"{config_json} describes a model that is larger than its weights")
    task.class_names = published_class_names(published)
    if config.task == "causal_lm":
        tokenizer = path.with_name("tokenizer.json")
        task.tokenizer = JsonTokenizer.read(tokenizer) if tokenizer.exists() else None
    return task, renamed(weights)


def read_weights(path) -> dict[str, Tensor]:
    """Tensors by name, from a PyTorch or safetensors file. Raises UserError if it is damaged."""
    with reading(path):
        if path.suffix == ".safetensors":
            safetensors = import_optional("safetensors", f"reading {path}")
            with safetensors.safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path} is cut short or damaged, or holds no weights")
        return load_tensors(path)


def published_class_names(published) -> list[str] | None:
    """The class names in config.json. 1000 classes without names are ImageNet's. None if the names are unknown."""
    labels = published["id2label"]
    names = [labels.get(str(number), f"LABEL_{number}") for number in range(published["num_labels"])]
    if not all(name.startswith("LABEL_") for name in names):  # transformers makes up LABEL_0, LABEL_1, ...
        return names
    return ResNet50_Weights.DEFAULT.meta["categories"] if len(names) == 1000 else None


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published weights under our names, without those that our model does not have."""
    state = {rename_key(key): value for key, value in weights.items()}
    state.pop("", None)
    return state


def rename_key(key: str) -> str:
    """Our name for a published weight, or "" if our model has no such weight."""
    for theirs, ours in (KRASSERM_KEYS | PORT_KEYS).items():
        key = key.replace(theirs, ours)
    return key


# Parts of published names, and our replacements. All pairs apply, in this order.
KRASSERM_KEYS = {
    "backend_model.": "",
    "input_adapter.frq_pos_encoding.inv_freq": "",  # frequencies of rotary positions: our model computes them
    "input_adapter.txt_embedding.": "token_embedding.",
    "input_adapter.pos_embedding.": "position_embedding.",
    ".0.module.": ".",
    ".1.module.": ".mlp.",
    ".q_proj.": ".q.",
    ".k_proj.": ".k.",
    ".v_proj.": ".v.",
    ".o_proj.": ".out.",
    "out_norm.": "output_norm.",
    "output_adapter.bias": "output_bias",
}
PORT_KEYS = {
    # transformers' Perceiver IO. publish.py applies the pairs backwards, so the order of similar names matters.
    "cross_attention.attention.self.layernorm1.": "cross_attention.q_norm.",
    ".attention.self.layernorm1.": ".norm.",  # of the self-attention layers
    ".attention.self.layernorm2.": ".kv_norm.",
    ".attention.self.query.": ".attention.q.",
    ".attention.self.key.": ".attention.k.",
    ".attention.self.value.": ".attention.v.",
    ".attention.output.dense.": ".attention.out.",
    ".layernorm.": ".mlp.0.",
    ".mlp.dense1.": ".mlp.1.",
    ".mlp.dense2.": ".mlp.3.",
    "perceiver.embeddings.latents": "encoder.latents.weight",
    "perceiver.encoder.cross_attention.": "encoder.cross_attention.0.",
    "perceiver.encoder.self_attends.": "encoder.self_attention.0.",
    "perceiver.decoder.modalities.label.decoder.output_position_encodings.position_embeddings": "query_provider.providers.label.table.weight",  # noqa: E501
    "perceiver.decoder.padding.": "query_provider.padding.",
    "perceiver.decoder.decoder.": "perceiver.decoder.",
    "perceiver.decoder.decoding_cross_attention.": "decoder.cross_attention.",
    "perceiver.decoder.output_position_encodings.position_embeddings": "query_provider.table.weight",
    "perceiver.output_postprocessor.modalities.": "output_adapter.adapters.",
    ".classifier.": ".linear.",
    "perceiver.decoder.final_layer.": "output_adapter.linear.",
    "embedding_decoder.bias": "output_adapter.bias",
    "perceiver.input_preprocessor.": "input_adapter.",
    "input_adapter.position_embeddings.position_embeddings": "input_adapter.positions.table.weight",
    "input_adapter.position_embeddings.": "input_adapter.positions.table.",
    "input_adapter.positions_projection.": "input_adapter.positions.projection.",
    "input_adapter.embeddings.": "input_adapter.features.",
    "input_adapter.convnet_1x1.": "input_adapter.features.conv.",
    "input_adapter.convnet.conv.": "input_adapter.features.conv.",
    "input_adapter.convnet.batchnorm.": "input_adapter.features.norm.",
    "input_adapter.conv_after_patches.": "input_adapter.features.linear.",
}

# Defaults of transformers' PerceiverConfig. A config.json holds only the values that differ from them.
DEFAULTS = {
    "model_type": "perceiver",
    "num_latents": 256,
    "d_latents": 1280,
    "d_model": 768,
    "num_blocks": 1,
    "num_self_attends_per_block": 26,
    "num_self_attention_heads": 8,
    "num_cross_attention_heads": 8,
    "qk_channels": None,
    "v_channels": None,
    "self_attention_widening_factor": 1,
    "cross_attention_widening_factor": 1,
    "hidden_act": "gelu",
    "use_query_residual": True,
    "num_labels": 2,
    "id2label": {},
    "vocab_size": 262,
    "max_position_embeddings": 2048,
    "image_size": 56,
    "train_size": [368, 496],
    "num_frames": 16,
    "audio_samples_per_frame": 1920,
    "samples_per_patch": 16,
    "output_shape": [1, 16, 224, 224],
    "output_num_channels": 512,
    "_label_trainable_num_channels": 1024,
}

ACTIVATIONS = ("gelu", "gelu_pytorch_tanh")  # in a config.json

# Our options of an encoder, and the same options in transformers' PerceiverConfig
ENCODER = {
    "num_cross_attention_heads": "num_cross_attention_heads",
    "num_cross_attention_qk_channels": "qk_channels",
    "num_cross_attention_v_channels": "v_channels",
    "cross_attention_widening_factor": "cross_attention_widening_factor",
    "num_self_attention_heads": "num_self_attention_heads",
    "num_self_attention_qk_channels": "qk_channels",
    "num_self_attention_v_channels": "v_channels",
    "self_attention_widening_factor": "self_attention_widening_factor",
    "num_self_attention_blocks": "num_blocks",
    "num_self_attention_layers_per_block": "num_self_attends_per_block",
}


def perceiver_io(published, variant, task, inputs, decoder={}, **options) -> dict:
    """Our config, as nested dicts. config.json does not describe the decoder: `decoder` overrides its usual options."""
    for key in ("model_type", "use_query_residual"):
        if published[key] != DEFAULTS[key]:
            raise UserError(f"{key}={published[key]!r} must be {DEFAULTS[key]!r}")
    if published["hidden_act"] not in ACTIVATIONS:
        raise UserError(f"hidden_act={published['hidden_act']!r} must be one of {', '.join(ACTIVATIONS)}")
    exact = published["hidden_act"] == "gelu" and variant == "transformers"
    activation = {"activation": "gelu" if exact else "gelu_tanh"}
    encoder = {ours: published[theirs] for ours, theirs in ENCODER.items()}
    plain_decoder = {"num_cross_attention_heads": 1, "cross_attention_residual": False}
    model = {
        "num_latents": published["num_latents"],
        "num_latent_channels": published["d_latents"],
        "input": inputs,
        "encoder": encoder | activation,
        "decoder": plain_decoder | activation | decoder,
    }
    return {"task": task, "model": model | options}


def masked_lm(published, variant):
    inputs = {
        "vocab_size": published["vocab_size"],
        "max_seq_len": published["max_position_embeddings"],
        "num_input_channels": published["d_model"],
    }
    decoder = {
        "num_cross_attention_heads": 8,
        "num_cross_attention_qk_channels": 256,
        "num_cross_attention_v_channels": published["d_model"],
    }
    return perceiver_io(published, variant, "masked_lm", inputs, decoder)


def image_classifier(published, variant, inputs, query_residual=True):
    decoder = {"cross_attention_residual": query_residual}
    num_classes = published["num_labels"]
    return perceiver_io(published, variant, "image_classification", inputs, decoder, num_classes=num_classes)


def image_fourier(published, variant):
    return image_classifier(published, variant, {"image_shape": [224, 224, 3]})


def image_conv(published, variant):
    inputs = {
        "image_shape": [224, 224, 3],
        "features": "conv",
        "conv_padding": "same" if variant == "deepmind" else "symmetric",
        "max_resolution": [56, 56],
    }
    return image_classifier(published, variant, inputs)


def image_learned(published, variant):
    size = published["image_size"]
    inputs = {
        "image_shape": [size, size, 3],
        "features": "conv1x1",
        "num_feature_channels": 256,
        "positions": "trainable",
    }
    return image_classifier(published, variant, inputs, query_residual=variant == "transformers")


def optical_flow(published, variant):
    inputs = {"frame_shape": published["train_size"]}
    return perceiver_io(published, variant, "optical_flow", inputs)


def multimodal(published, variant):
    resolution = published["image_size"]
    inputs = {
        "image_shape": [*published["output_shape"][1:], 3],
        "max_resolution": [published["num_frames"], resolution, resolution],
        "num_audio_samples": published["num_frames"] * published["audio_samples_per_frame"],
        "samples_per_patch": published["samples_per_patch"],
        "num_classes": published["num_labels"],
    }
    decoder = {"num_query_channels": published["_label_trainable_num_channels"]}
    num_channels = published["output_num_channels"]
    task = "multimodal_autoencoding"
    return perceiver_io(published, variant, task, inputs, decoder, num_output_channels=num_channels)


def perceiver_ar(published, variant):
    """The config of krasserm's PerceiverCausalLanguageModel or PerceiverSymbolicAudioModel."""
    theirs = published["model_config"]
    for key in ("cross_attention_widening_factor", "self_attention_widening_factor"):
        if theirs[key] != 4:
            raise UserError(f"{key}={theirs[key]} must be 4")
    model = {ours: theirs[name] for ours, name in PERCEIVER_AR.items()}
    music = published["model_type"] == "perceiver-ar-symbolic-audio-model"
    return {"task": "symbolic_music" if music else "causal_lm", "model": model | {"latent_keys": "q_norm"}}


# Our options of Perceiver AR, and the same options in krasserm's config
PERCEIVER_AR = {
    "vocab_size": "vocab_size",
    "max_seq_len": "max_seq_len",
    "num_latents": "max_latents",
    "num_channels": "num_channels",
    "num_heads": "num_heads",
    "num_self_attention_layers": "num_self_attention_layers",
    "absolute_positions": "abs_pos_emb",
    "num_rotary_layers": "num_self_attention_rotary_layers",
    "output_norm": "output_norm",
    "output_bias": "output_bias",
    "init_scale": "init_scale",
    "cross_attention_dropout": "cross_attention_dropout",
    "post_attention_dropout": "post_attention_dropout",
    "residual_dropout": "residual_dropout",
}

# The config.json of the official models, as far as it differs from DEFAULTS
VISION = {
    "num_latents": 512,
    "d_latents": 1024,
    "num_blocks": 8,
    "num_self_attends_per_block": 6,
    "num_cross_attention_heads": 1,
    "num_labels": 1000,
    "image_size": 224,
}
FLOW = {
    "num_latents": 2048,
    "d_latents": 512,
    "num_self_attends_per_block": 24,
    "num_self_attention_heads": 16,
    "num_cross_attention_heads": 1,
}
MULTIMODAL = {
    "num_latents": 784,
    "d_latents": 512,
    "num_self_attends_per_block": 8,
    "num_cross_attention_heads": 1,
    "num_labels": 700,
}
# The kinds of published models. The key is the name of a weight that marks this kind; the first match counts. The value
# is the function that makes our config, and the config.json of the official model, as far as it differs from DEFAULTS.
MODELS = {
    "embedding_decoder.bias": (masked_lm, {"qk_channels": 256, "v_channels": 1280}),
    "perceiver.input_preprocessor.padding.label": (multimodal, MULTIMODAL),
    "perceiver.input_preprocessor.convnet_1x1.weight": (image_learned, VISION),
    "perceiver.input_preprocessor.convnet.conv.weight": (image_conv, VISION),
    "perceiver.input_preprocessor.conv_after_patches.weight": (optical_flow, FLOW),
    "perceiver.decoder.decoder.final_layer.weight": (image_fourier, VISION),
    "backend_model.input_adapter.txt_embedding.weight": (perceiver_ar, {}),
}
