"""Published weights, by tables of key names: Hugging Face's copies of DeepMind's models, krasserm's Perceiver AR."""
import dataclasses
import fcntl
import http.client
import json
import math
import os
import pickle
import re
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights
from tqdm import tqdm

from perceiver import checkpoint
from perceiver.architectures import (FrameInputConfig, ImageClassifierConfig, ImageInputConfig, MaskedLMConfig,
                                     MultimodalAutoencoderConfig, OpticalFlowConfig, PerceiverIOConfig,
                                     TokenInputConfig, VideoInputConfig)
from perceiver.config import Config
from perceiver.errors import UserError
from perceiver.model import PerceiverARConfig, PerceiverDecoderConfig, PerceiverEncoderConfig

VARIANTS = ("deepmind", "transformers")
FILES = ("pytorch_model.bin", "model.safetensors")

# Their keys, as patterns, and ours, by kind of model. All patterns of a table are applied, in order; what becomes
# nothing is no weight.
COMMON = {
    r"^perceiver\.embeddings\.latents$": r"encoder.latents.weight",
    r"^perceiver\.encoder\.cross_attention\.": r"encoder.cross_attention.0.",
    r"^perceiver\.encoder\.self_attends\.(\d+)\.attention\.self\.layernorm1\.": r"encoder.self_attention.0.\1.norm.",
    r"^perceiver\.encoder\.self_attends\.": r"encoder.self_attention.0.",
    r"^perceiver\.decoder\.(decoder\.)?decoding_cross_attention\.": r"decoder.cross_attention.",
    r"^perceiver\.decoder\.(decoder\.)?output_position_encodings\.position_embeddings$": r"query_provider.table.weight",
    r"\.attention\.self\.layernorm1\.": r".q_norm.",
    r"\.attention\.self\.layernorm2\.": r".kv_norm.",
    r"\.attention\.self\.(q|k|v)(uery|ey|alue)\.": r".attention.\1.",
    r"\.attention\.output\.dense\.": r".attention.out.",
    r"\.layernorm\.": r".mlp.0.",
    r"\.mlp\.dense1\.": r".mlp.1.",
    r"\.mlp\.dense2\.": r".mlp.3.",
}
CLASSIFIER = COMMON | {r"^perceiver\.decoder\.decoder\.final_layer\.": r"output_adapter.linear."}
KEYS = {
    "masked_lm": COMMON | {
        r"^perceiver\.input_preprocessor\.embeddings\.": r"input_adapter.features.",
        r"^perceiver\.input_preprocessor\.position_embeddings\.": r"input_adapter.positions.table.",
        r"^embedding_decoder\.": r"output_adapter.",
    },
    "image_learned": CLASSIFIER | {
        r"^perceiver\.input_preprocessor\.convnet_1x1\.": r"input_adapter.features.conv.",
        r"^perceiver\.input_preprocessor\.position_embeddings\.position_embeddings$":
            r"input_adapter.positions.table.weight",
        r"^perceiver\.input_preprocessor\.positions_projection\.": r"input_adapter.positions.projection.",
    },
    "image_conv": CLASSIFIER | {
        r"^perceiver\.input_preprocessor\.convnet\.conv\.": r"input_adapter.features.conv.",
        r"^perceiver\.input_preprocessor\.convnet\.batchnorm\.": r"input_adapter.features.norm.",
    },
    "flow": CLASSIFIER | {r"^perceiver\.input_preprocessor\.conv_after_patches\.": r"input_adapter.features.linear."},
    "image_fourier": CLASSIFIER,
    "perceiver_ar": {
        r"^backend_model\.": r"",
        r"^input_adapter\.frq_pos_encoding\.inv_freq$": r"",  # a buffer: the rotary frequencies
        r"^input_adapter\.txt_embedding\.": r"token_embedding.",
        r"^input_adapter\.pos_embedding\.": r"position_embedding.",
        r"\.0\.module\.(q_norm|kv_norm|norm)\.": r".\1.",
        r"\.0\.module\.attention\.(q|k|v)_proj\.": r".attention.\1.",
        r"\.0\.module\.attention\.o_proj\.": r".attention.out.",
        r"\.1\.module\.": r".mlp.",
        r"^out_norm\.": r"output_norm.",
        r"^output_adapter\.bias$": r"output_bias",
    },
    "multimodal": COMMON | {
        r"^perceiver\.input_preprocessor\.": r"input_adapter.",
        r"^perceiver\.decoder\.modalities\.label\.decoder\.output_position_encodings\.position_embeddings$":
            r"query_provider.providers.label.table.weight",
        r"^perceiver\.decoder\.padding\.": r"query_provider.padding.",
        r"^perceiver\.decoder\.decoder\.final_layer\.": r"output_adapter.linear.",
        r"^perceiver\.output_postprocessor\.modalities\.(\w+)\.classifier\.": r"output_adapter.adapters.\1.linear.",
    },
}
# A key that tells the kind, if none before it in this order did.
MARKERS = {
    "masked_lm": "embedding_decoder.bias",
    "multimodal": "perceiver.input_preprocessor.padding.label",
    "image_learned": "perceiver.input_preprocessor.convnet_1x1.weight",
    "image_conv": "perceiver.input_preprocessor.convnet.conv.weight",
    "flow": "perceiver.input_preprocessor.conv_after_patches.weight",
    "image_fourier": "perceiver.decoder.decoder.final_layer.weight",
    "perceiver_ar": "backend_model.input_adapter.txt_embedding.weight",
}


# What weights don't tell of how they are used.
ENCODER_CHOICES = ("num_cross_attention_heads", "num_self_attention_heads", "num_cross_attention_layers",
                   "num_self_attention_blocks", "first_cross_attention_layer_shared",
                   "first_self_attention_block_shared", "activation")
DECODER_CHOICES = ("num_cross_attention_heads", "cross_attention_residual", "activation")


def from_pretrained(name_or_path: str | os.PathLike, variant: str = "deepmind") -> nn.Module:
    """A model with published weights, in evaluation mode.

    name_or_path  a Hugging Face name, such as deepmind/language-perceiver, or what that has been saved to: a folder or
                  a file, pytorch_model.bin or model.safetensors. A config.json beside it is heeded; without one, what
                  the weights don't tell (numbers of heads and of blocks) is the official model's. krasserm's need it
    variant       "deepmind", which the weights were trained with, or "transformers", equal to the Hugging Face port.
                  They differ in the GELU (tanh or exact), in the padding of image-conv's convolution, and in
                  image-learned's query residual, that only the port has

    Masked language models: model(input_ids (B, L), pad_mask (B, L) or None) -> (B, L, 262). Image classifiers:
    model(images (B, 3, 224, 224)) -> (B, 1000). Optical flow: model(frames (B, 2, 3, 368, 496) in [-1, 1]) ->
    (B, 368, 496, 2) in pixels; flow.py has it for any size. The multimodal autoencoder: model({"image":
    (B, 16, 3, 224, 224) in [0, 1], "audio": (B, 30720, 1) in [-1, 1], "label": (B, 700)}) -> a dict of the same; it
    does not see the label unless told to (multimodal.py), and `model.reconstruct` needs less memory. krasserm's
    perceiver-ar-clm-base and -sam-giant-midi: a PerceiverAR, of which `variant` says nothing. Raises UserError at
    whatever is wrong with the files.
    """
    config, state = read_pretrained(name_or_path, variant)
    model = config.build()
    load_weights(model, state, str(name_or_path))
    return model.eval()


def read_pretrained(name_or_path: str | os.PathLike, variant: str = "deepmind",
                    ) -> tuple[PerceiverIOConfig | PerceiverARConfig, dict[str, Tensor]]:
    """The config and the state_dict of `from_pretrained`'s model."""
    if variant not in VARIANTS:
        raise UserError(f"variant={variant!r} must be one of {', '.join(VARIANTS)}")
    path = find_weights(name_or_path)
    weights, published = read_weights(path), read_config(path.with_name("config.json"))
    kind = next((kind for kind, marker in MARKERS.items() if marker in weights), None)
    if kind is None:
        raise UserError(f"{path} holds no weights of a model known here ({', '.join(KEYS)})")
    state = {our_key(kind, key): value.float() if value.is_floating_point() else value
             for key, value in weights.items()}
    state.pop("", None)
    try:
        return CONFIGS[kind](state, published, variant), state
    except KeyError as error:
        raise UserError(f"{path} lacks {error.args[0]}") from None
    except ValueError as error:
        raise UserError(f"the weights in {path} and its config.json do not fit: {error}") from None


def our_key(kind: str, key: str) -> str:
    for pattern, ours in KEYS[kind].items():
        key = re.sub(pattern, ours, key)
    return key


def published_class_names(name_or_path: str | os.PathLike, num_classes: int) -> list[str] | None:
    """Of an image classifier: those in config.json or, if there are 1000, ImageNet's; None if they are not known."""
    names = read_config(find_weights(name_or_path).with_name("config.json")).get("id2label", {})
    names = [names.get(str(number), f"LABEL_{number}") for number in range(num_classes)]
    if not all(re.fullmatch(r"LABEL_\d+", name) for name in names):  # what transformers writes for want of names
        return names
    return ResNet50_Weights.DEFAULT.meta["categories"] if num_classes == 1000 else None


def start_from(model: nn.Module, source: str, config: Config) -> None:
    """Fills a new model with weights to train on from: `source` as in `from_pretrained`, or a checkpoint of train.py.

    From a model of the same kind all parts are taken, but an output that has another shape (other classes); from one of
    another kind the input adapter and the encoder. A Perceiver AR is taken as a whole: only its numbers of latents and,
    without absolute positions, of inputs may differ. Raises UserError if those do not fit.
    """
    if Path(source).suffix == ".pt":
        saved = checkpoint.load(source)
        old, state, same_kind = saved["config"]["model"], saved["model"], saved["config"]["task"] == config.task
    else:
        published, state = read_pretrained(source)
        old, same_kind = dataclasses.asdict(published), isinstance(config.model, type(published))
    new = dataclasses.asdict(config.model)
    if isinstance(config.model, PerceiverARConfig):
        free = {name: old.get(name) for name in ("num_latents", "max_seq_len")}
        if changed := checkpoint.differences(old, new | free, "model"):
            raise UserError(f"model.init_from={source} does not fit: {', '.join(changed)}")
        return load_weights(model, state, source)
    if "encoder" not in old:
        raise UserError(f"model.init_from={source} has no encoder to start from")
    for part, choices in {"encoder": ENCODER_CHOICES, "decoder": DECODER_CHOICES if same_kind else ()}.items():
        for name in choices if old[part] and new[part] else ():
            if old[part][name] != new[part][name]:
                raise UserError(f"model.init_from={source} has {part}.{name}={old[part][name]}, "
                                f"model.{part}.{name} is {new[part][name]}")
    for name, part in model.named_children():
        weights = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        if name in ("input_adapter", "encoder") or same_kind:
            fits = all(key in weights and weights[key].shape == value.shape for key, value in part.state_dict().items())
            if fits or name != "output_adapter":
                load_weights(part, weights, f"{source} ({name})")


def load_weights(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """model.load_state_dict(state), but what does not fit is told in one line, a UserError."""
    own = model.state_dict()
    problems = {
        "not used": state.keys() - own.keys(),
        "missing": {key for key in own.keys() - state.keys() if not key.endswith("num_batches_tracked")},
        "of another shape": {f"{key} ({shape(state[key])}, the model's is {shape(own[key])})"
                             for key in own.keys() & state.keys() if own[key].shape != state[key].shape},
    }
    if any(problems.values()):
        raise UserError(f"the weights in {source} do not fit the model: " + "; ".join(
            f"{len(keys)} {problem}: {', '.join(sorted(keys)[:20])}{', ...' * (len(keys) > 20)}"
            for problem, keys in problems.items() if keys))
    model.load_state_dict(state, strict=False)


def shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


# ----------------------------------------------------------------------------------------------------------------------
# Configs, from the shapes of weights and what config.json adds


def masked_lm(state: dict[str, Tensor], published: dict, variant: str) -> MaskedLMConfig:
    vocab_size, num_input_channels = state["input_adapter.features.weight"].shape
    return MaskedLMConfig(
        **core(state, published, variant, num_blocks=1, num_heads=8, num_decoder_heads=8, query_residual=False),
        input=TokenInputConfig(vocab_size, len(state["input_adapter.positions.table.weight"]), num_input_channels))


def image_classifier(state: dict[str, Tensor], published: dict, variant: str) -> ImageClassifierConfig:
    num_classes = len(state["output_adapter.linear.weight"])
    if (num_labels := published.get("num_labels", len(published.get("id2label", [])))) not in (0, num_classes):
        raise ValueError(f"{num_classes} classes, config.json has num_labels={num_labels}")
    size = published.get("image_size", 224)  # the usual one: Fourier positions are of any size
    positions, convolution = state.get("input_adapter.positions.table.weight"), "input_adapter.features.conv.weight"
    residual = positions is None or variant == "transformers"
    if positions is not None:  # image_learned
        size, num_position_channels = math.isqrt(len(positions)), positions.shape[1]
        image_input = ImageInputConfig((size, size, 3), "conv1x1", len(state[convolution]), positions="trainable",
                                       num_position_channels=num_position_channels)
    elif convolution in state:  # image_conv
        image_input = ImageInputConfig((size, size, 3), "conv", len(state[convolution]),
                                       conv_padding="same" if variant == "deepmind" else "symmetric",
                                       max_resolution=(56, 56))
    else:  # image_fourier
        image_input = ImageInputConfig((size, size, 3), max_resolution=(224, 224))
    return ImageClassifierConfig(
        **core(state, published, variant, num_blocks=8, num_heads=1, num_decoder_heads=1, query_residual=residual),
        num_classes=num_classes, input=image_input)


def optical_flow(state: dict[str, Tensor], published: dict, variant: str) -> OpticalFlowConfig:
    frame_shape = tuple(published.get("train_size", (368, 496)))
    return OpticalFlowConfig(
        **core(state, published, variant, num_blocks=1, num_heads=1, num_decoder_heads=1, query_residual=False,
               num_self_heads=16),
        input=FrameInputConfig(frame_shape, len(state["input_adapter.features.linear.weight"])))


def perceiver_ar(state: dict[str, Tensor], published: dict, variant: str) -> PerceiverARConfig:
    """As the config.json of krasserm's PerceiverCausalLanguageModel and PerceiverSymbolicAudioModel tells."""
    theirs = published.get("model_config", {})
    try:
        widening_factor = theirs["self_attention_widening_factor"]
        if theirs["cross_attention_widening_factor"] != widening_factor:
            raise ValueError(f"cross_attention_widening_factor={theirs['cross_attention_widening_factor']} must be "
                             f"self_attention_widening_factor={widening_factor}")
        same = ("vocab_size", "max_seq_len", "num_channels", "num_heads", "num_self_attention_layers", "output_norm",
                "output_bias", "cross_attention_dropout", "post_attention_dropout", "residual_dropout", "init_scale")
        return PerceiverARConfig(
            **{name: theirs[name] for name in same}, num_latents=theirs["max_latents"], widening_factor=widening_factor,
            absolute_positions=theirs["abs_pos_emb"], num_rotary_layers=theirs["num_self_attention_rotary_layers"],
            latent_keys="q_norm")
    except (KeyError, TypeError) as error:
        raise ValueError(f"model_config of config.json lacks {error.args[0]}") from None


def multimodal(state: dict[str, Tensor], published: dict, variant: str) -> MultimodalAutoencoderConfig:
    num_channels = {name: state[f"input_adapter.mask.{name}"].shape[1] - state[f"input_adapter.padding.{name}"].shape[1]
                    for name in ("audio", "image", "label")}
    samples_per_patch = len(state["output_adapter.adapters.audio.linear.weight"])
    num_frames, resolution = published.get("num_frames", 16), published.get("image_size", 56)
    video = VideoInputConfig(
        (*published.get("output_shape", (1, 16, 224, 224))[1:], 3), max_resolution=(num_frames, resolution, resolution),
        num_image_bands=((num_channels["image"] - 4 * 4 * 3) // 3 - 1) // 2,
        num_audio_samples=num_frames * published.get("audio_samples_per_frame", 1920),
        samples_per_patch=samples_per_patch, num_audio_bands=(num_channels["audio"] - samples_per_patch - 1) // 2,
        num_classes=num_channels["label"],
        num_padding_channels=min(state[f"input_adapter.padding.{name}"].shape[1] for name in num_channels))
    return MultimodalAutoencoderConfig(
        **core(state, published, variant, num_blocks=1, num_heads=1, num_decoder_heads=1, query_residual=False),
        input=video, num_output_channels=len(state["output_adapter.linear.weight"]),
        num_query_padding_channels=min(state[f"query_provider.padding.{name}"].shape[1] for name in num_channels))


def core(state: dict[str, Tensor], published: dict, variant: str, num_blocks: int, num_heads: int,
         num_decoder_heads: int, query_residual: bool, num_self_heads: int = 8) -> dict:
    """Latents, encoder and decoder; numbers of blocks and heads are those of the official model."""
    for key, value in (("model_type", "perceiver"), ("hidden_act", "gelu"), ("use_query_residual", True)):
        if published.get(key, value) != value:
            raise ValueError(f"config.json has {key}={published[key]!r}, known here is {value!r}")

    def widths(layer: str, kind: str) -> dict[str, int]:
        return {f"num_{kind}_attention_qk_channels": len(state[f"{layer}.attention.k.weight"]),
                f"num_{kind}_attention_v_channels": len(state[f"{layer}.attention.v.weight"]),
                f"{kind}_attention_widening_factor": (len(state[f"{layer}.mlp.1.weight"])
                                                      // len(state[f"{layer}.mlp.0.weight"]))}

    activation = "gelu_tanh" if variant == "deepmind" else "gelu"
    num_latents, num_latent_channels = state["encoder.latents.weight"].shape
    encoder = PerceiverEncoderConfig(
        num_cross_attention_heads=published.get("num_cross_attention_heads", num_heads),
        num_self_attention_heads=published.get("num_self_attention_heads", num_self_heads),
        num_self_attention_blocks=published.get("num_blocks", num_blocks),
        num_self_attention_layers_per_block=sum(
            re.fullmatch(r"encoder\.self_attention\.0\.\d+\.norm\.weight", key) is not None for key in state),
        activation=activation, **widths("encoder.cross_attention.0", "cross"),
        **widths("encoder.self_attention.0.0", "self"))
    queries = next((state[key] for key in state if re.fullmatch(r"query_provider\..*table\.weight", key)), None)
    decoder = PerceiverDecoderConfig(
        num_cross_attention_heads=num_decoder_heads, cross_attention_residual=query_residual, activation=activation,
        num_query_channels=None if queries is None else queries.shape[1], **widths("decoder.cross_attention", "cross"))
    return dict(num_latents=num_latents, num_latent_channels=num_latent_channels, encoder=encoder, decoder=decoder)


# Kind of model: what makes its config.
CONFIGS = {
    "masked_lm": masked_lm,
    "image_learned": image_classifier,
    "image_conv": image_classifier,
    "image_fourier": image_classifier,
    "flow": optical_flow,
    "multimodal": multimodal,
    "perceiver_ar": perceiver_ar,
}


# ----------------------------------------------------------------------------------------------------------------------
# Files


def find_weights(name_or_path: str | os.PathLike) -> Path:
    """The file with the weights, downloaded if need be."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.is_dir():
        for file in FILES:
            if (path / file).is_file():
                return path / file
        raise UserError(f"folder {path} holds no {' or '.join(FILES)}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name_or_path)):
        raise UserError(f"{name_or_path} is no file, no folder and no Hugging Face name (owner/name)")
    download(str(name_or_path), "config.json")
    for file in FILES:
        if (path := download(str(name_or_path), file)) is not None:
            return path
    raise UserError(f"{name_or_path} is no file or folder here, and on huggingface.co it has no {' or '.join(FILES)}")


def find_beside(name_or_path: str | os.PathLike, file: str) -> Path | None:
    """A file that is published with the weights, downloaded if need be; None if there is none."""
    path = find_weights(name_or_path).with_name(file)
    if not path.is_file() and not Path(name_or_path).exists():
        return download(str(name_or_path), file)
    return path if path.is_file() else None


def read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"cannot read {path}: it must hold fields by name")
    return config


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name, of a PyTorch or a safetensors file."""
    try:
        if path.suffix == ".safetensors":
            weights = read_safetensors(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"weights {path} cannot be read ({reason}); the file may be cut short or damaged") from None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"weights {path} must be tensors by name, a state_dict")
    return weights


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"reading {path} needs the package safetensors: pip install safetensors") from None
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(error) from None


def download(name: str, file: str) -> Path | None:
    """The cached copy of a published file, after fetching what is missing of it; None if there is no such file.

    What an interrupted download leaves is continued by the next one. Of several processes, one downloads and the
    others wait. Not torch.hub.download_url_to_file, which starts anew each time and takes a short file for a whole one.
    """
    url = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{name}/resolve/main/{file}"
    path = Path(torch.hub.get_dir()) / "perceiver" / name.replace("/", "--") / file
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(file + ".part")
    with open(part, "ab") as out:
        fcntl.flock(out, fcntl.LOCK_EX)
        if path.exists():
            return path
        start = out.tell()
        try:
            request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
            with urllib.request.urlopen(request, timeout=60) as response:
                if response.status != http.HTTPStatus.PARTIAL_CONTENT:
                    start = out.seek(0)
                    out.truncate()
                length = response.headers["Content-Length"]
                size = start + int(length) if length else None
                with tqdm(desc=f"{name}/{file}", total=size, initial=start, unit="B", unit_scale=True) as bar:
                    while chunk := response.read(1 << 20):
                        bar.update(out.write(chunk))
            if size is not None and out.tell() < size:
                raise OSError(f"the connection closed after {out.tell()} of {size} bytes")
        except urllib.error.HTTPError as error:
            part.unlink()  # also if the server finds no rest to send: then the part is of another file
            if error.code == http.HTTPStatus.NOT_FOUND:
                return None
            raise UserError(f"downloading {url} failed: {error}") from None
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"downloading {url} failed ({error}); run it again to continue") from None
        part.rename(path)
    return path
