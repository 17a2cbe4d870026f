"""Export a trained model: `python -m perceiver.export --ckpt runs/clm --out model.pt2`.

The exported file runs without this package; see docs/export.md.
"""

import argparse
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map

from perceiver.attention import LayerCache
from perceiver.errors import UserError, run_script
from perceiver.io import import_optional, replacing, say
from perceiver.model import DecodingStep, PerceiverAR
from perceiver.pretrained import VARIANTS, load_model
from perceiver.publish import publish
from perceiver.tasks import Task
from perceiver.tasks.flow import FrameInputConfig
from perceiver.tasks.images import ImageInputConfig
from perceiver.tasks.masked_lm import TokenInputConfig
from perceiver.tasks.video import VideoInputConfig

TOLERANCE = 1e-4  # largest difference between the outputs of the file and of the model
Inputs = dict[str, Tensor | dict[str, Tensor]]  # the keyword arguments of a model's `forward`

EPILOG = """\
--out model.pt2   a program of torch.export: torch.export.load("model.pt2").module() runs it
--out model.onnx  the same for onnxruntime and others; needs the packages onnx and onnxscript
--out FOLDER/     model.safetensors and config.json, for from_pretrained and the Hugging Face Hub
"""


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m perceiver.export",
        description=__doc__.splitlines()[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ckpt", required=True, help="a run folder or checkpoint of train.py, or published weights")
    parser.add_argument("--out", required=True, help="a file that ends with .pt2 or .onnx, or a folder")
    parser.add_argument(
        "--step", action="store_true", help="Perceiver AR: export one step of generation with its key/value cache"
    )
    parser.add_argument("--variant", default=VARIANTS[0], choices=VARIANTS, help="as in predict.py")
    return parser.parse_args(arguments)


# ----------------------------------------------------------------------------------------------------------------------
# What is exported


def example_inputs(task: Task, batch_size=2) -> Inputs:
    """Random inputs of the task's model. Raises UserError for a task of your own: use `export` with your inputs."""
    model = task.config.model
    inputs = getattr(model, "input", None)
    if inputs is None and hasattr(model, "vocab_size"):
        shape = (batch_size, model.max_seq_len)
        return {"input_ids": torch.randint(model.vocab_size, shape), "pad_mask": padding(shape).flip(1)}
    if isinstance(inputs, TokenInputConfig):
        shape = (batch_size, inputs.max_seq_len)
        return {"inputs": torch.randint(inputs.vocab_size, shape), "pad_mask": padding(shape)}
    if isinstance(inputs, ImageInputConfig):
        height, width, channels = inputs.image_shape
        return {"inputs": torch.randn(batch_size, channels, height, width)}
    if isinstance(inputs, FrameInputConfig):
        return {"frames": 2 * torch.rand(batch_size, 2, 3, *inputs.frame_shape) - 1}
    if isinstance(inputs, VideoInputConfig):
        num_frames, height, width, channels = inputs.image_shape
        clip = {
            "image": torch.rand(batch_size, num_frames, channels, height, width),
            "audio": torch.rand(batch_size, inputs.num_audio_samples, 1),
            "label": torch.rand(batch_size, inputs.num_classes),
        }
        return {"inputs": clip}
    raise UserError(f"task {task.name}: its inputs are unknown here; call perceiver.export.export with inputs")


def padding(shape: tuple[int, int]) -> Tensor:
    """A mask (B, M), true at the last quarter of each row."""
    batch_size, length = shape
    return (torch.arange(length) >= length - length // 4).repeat(batch_size, 1)


class CachedStep(nn.Module):
    """One step of a Perceiver AR: the newest token of every sequence and its cache -> logits and the new cache.

    A token of the prefix needs a step, too: with latent=0 it only joins the cache of the cross-attention, because the
    first latent overwrites the rest. Its logits do not count.
    """

    def __init__(self, model: PerceiverAR):
        super().__init__()
        self.model = model
        if model.config.latent_keys != "kv_norm":
            raise UserError(f"--step needs model.latent_keys=kv_norm, not {model.config.latent_keys}")
        if not len(model.self_attention):
            raise UserError("--step needs a model with self-attention layers; num_self_attention_layers is 0")

    def forward(
        self,
        tokens: Tensor,
        position: Tensor,
        latent: Tensor,
        cross_keys: Tensor,
        cross_values: Tensor,
        self_keys: Tensor,
        self_values: Tensor,
    ) -> dict[str, Tensor]:
        """tokens    (B, R), the newest token and the R - 1 before it, which n-grams need; 0 where there are none
        position  (B,), the number of the newest token in its window, from 0
        latent    (B,), its number among the latents, from 0
        cross_*   keys (B, H, T, C/H) and values (B, H, C/H, T) of the cross-attention; zeros at the start
        self_*    keys (B, L, H, N, C/H) and values (B, L, H, C/H, N) of the L self-attention layers

        Returns logits (B, V) and the four arrays of the cache, with new_ before their names.
        """
        cross = layer_cache(cross_keys, cross_values, position)
        layers = [layer_cache(*buffers, latent) for buffers in zip(self_keys.unbind(1), self_values.unbind(1))]
        logits = self.model(tokens, step=DecodingStep(position[:, None], cross, layers))
        return {
            "logits": logits[:, -1],
            "new_cross_keys": cross.keys,
            "new_cross_values": cross.values,
            "new_self_keys": torch.stack([layer.keys for layer in layers], dim=1),
            "new_self_values": torch.stack([layer.values for layer in layers], dim=1),
        }

    def example_inputs(self, batch_size=2) -> Inputs:
        """Random inputs, in the middle of a sequence."""
        c = self.model.config
        qk_width, v_width = self.model.cross_attention.attention.head_widths(torch.device("cpu"))
        cross = (batch_size, c.num_heads)
        layers = (batch_size, c.num_self_attention_layers, c.num_heads)
        return {
            "tokens": torch.randint(c.vocab_size, (batch_size, self.model.num_recent_tokens)),
            "position": torch.full((batch_size,), c.max_seq_len // 2),
            "latent": torch.full((batch_size,), c.num_latents // 2),
            "cross_keys": torch.randn(*cross, c.max_seq_len, qk_width),
            "cross_values": torch.randn(*cross, v_width, c.max_seq_len),
            "self_keys": torch.randn(*layers, c.num_latents, qk_width),
            "self_values": torch.randn(*layers, v_width, c.num_latents),
        }


def layer_cache(keys: Tensor, values: Tensor, place: Tensor) -> LayerCache:
    """A copy of the cache of a layer, for a step whose key of row b goes to place[b]."""
    rows = torch.arange(keys.shape[0])[:, None]
    size = keys.shape[2]
    unused = torch.arange(size) > place[:, None]
    bias = torch.where(unused, -torch.inf, 0.0)
    return LayerCache(keys.clone(), values.clone(), at=(rows, place[:, None]), num_read=size, bias=bias[:, None])


# ----------------------------------------------------------------------------------------------------------------------
# Files


def export(model: nn.Module, inputs: Inputs, path: str | Path) -> str:
    """Writes `model`, in evaluation mode, to a .pt2 or .onnx file. Returns a line with its inputs, outputs and sizes.

    `inputs` are examples of the keyword arguments of `forward`: tensors, or dicts of tensors. Their first dimension is
    the batch, 2 or more; the file takes any batch size if the model does. All other sizes are fixed. The file is then
    read and run on the first example alone. Raises UserError if its outputs differ from those of the model.
    """
    path = Path(path)
    dynamic = tree_map(lambda _: {0: torch.export.Dim.AUTO}, inputs)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about its own code
        program = torch.export.export(model, (), inputs, dynamic_shapes=dynamic)
        any_batch = bool(program.range_constraints)
        if any_batch:
            inputs = tree_map(lambda x: x[:1], inputs)
        outputs = model(**inputs)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".onnx":
            save_onnx(program, list(named(inputs)), list(named(outputs)), path)
        else:
            with replacing(path) as temporary, open(temporary, "wb") as file:
                torch.export.save(program, file)
        found = run_file(path, inputs)
    checked = "it was not checked: pip install onnxruntime"
    if found is not None:
        difference = compare(tree_leaves(outputs), found, path)
        checked = f"outputs differ from the model's by at most {difference:.1g}"
    given = ", ".join(describe(name, x, any_batch) for name, x in named(inputs).items())
    results = ", ".join(describe(name, x, any_batch) for name, x in named(outputs).items())
    return f"{path} ({path.stat().st_size / 1e6:.1f} MB): {given} -> {results}; {checked}"


def compare(expected: list[Tensor], found: list[Tensor], path: Path) -> float:
    """The largest difference between the outputs of the model and of the file. Raises UserError if it is large."""
    shapes, found_shapes = ([tuple(x.shape) for x in outputs] for outputs in (expected, found))
    if shapes != found_shapes:
        raise UserError(f"{path}: its outputs have shapes {found_shapes}, the model's {shapes}; do not use it")
    largest = torch.stack([x.abs().max() for x in expected]).max().item()
    difference = torch.stack([(a - b).abs().max() for a, b in zip(expected, found)]).max().item()
    if not difference < TOLERANCE * max(1.0, largest):  # also if one is NaN or infinite
        raise UserError(f"{path}: its outputs differ from the model's by {difference:.2g}; do not use it")
    return difference


def named(tree) -> dict[str, Tensor]:
    """The tensors of nested dicts and tuples, with names like inputs_audio. A tensor alone is `output`."""
    if isinstance(tree, Tensor):
        return {"output": tree}
    tensors = {}
    for path, tensor in tree_flatten_with_path(tree)[0]:
        parts = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
        tensors["_".join(parts) if isinstance(tree, dict) else f"output_{'_'.join(parts)}"] = tensor
    return tensors


def describe(name: str, tensor: Tensor, any_batch: bool) -> str:
    sizes = ["B" if any_batch else str(len(tensor)), *map(str, tensor.shape[1:])]
    return f"{name} ({', '.join(sizes)}) {str(tensor.dtype).removeprefix('torch.')}"


def save_onnx(program: torch.export.ExportedProgram, input_names: list[str], output_names: list[str], path: Path):
    import_optional("onnx", "export to ONNX")
    import_optional("onnxscript", "export to ONNX")
    onnx_program = torch.onnx.export(program, input_names=input_names, output_names=output_names, verbose=False)
    size = sum(x.nbytes for x in [*program.state_dict.values(), *program.constants.values()])
    if size > 2e9:
        raise UserError(f"{path}: an ONNX file holds at most 2 GB, and the model has {size / 1e9:.1f} GB; use .pt2")
    with replacing(path) as temporary:
        onnx_program.save(temporary)


def run_file(path: Path, inputs: Inputs) -> list[Tensor] | None:
    """The outputs of an exported file. None for an ONNX file if onnxruntime is not installed."""
    if path.suffix == ".pt2":
        return tree_leaves(torch.export.load(path).module()(**inputs))
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(path)
    outputs = session.run(None, {name: tensor.numpy() for name, tensor in named(inputs).items()})
    return [torch.from_numpy(x) for x in outputs]


def main(args: argparse.Namespace):
    path = Path(args.out)
    is_file = path.suffix in (".pt2", ".onnx")
    if not is_file and path.suffix and not path.is_dir() and not args.out.endswith("/"):
        raise UserError(f"--out {args.out} must end with .pt2, .onnx, or / for a folder")
    task, model = load_model(args.ckpt, variant=args.variant)
    if args.step and not (is_file and isinstance(model, PerceiverAR)):
        raise UserError(f"--step needs a Perceiver AR and a file; this is task {task.name} and --out {args.out}")
    if not is_file:
        say(f"{path}/model.safetensors and config.json: from_pretrained loads them; {publish(task, model, path)}")
    elif args.step:
        step = CachedStep(model)
        say(export(step, step.example_inputs(), path))
    else:
        say(export(model, example_inputs(task), path))


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
