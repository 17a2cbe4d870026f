"""The sides of compare.py: this project, and the projects that it is compared with.

A side is a class. Its methods have the names of the models in rows.py. A method returns a new model and a function:

    ar, mlm, ...    the function maps the inputs (rows.make_inputs) to logits (..., number of classes), or others;
                    `ar` and `mlm` take options, under the side's own names, for models other than those of the rows
    decode          the function encodes a prompt (L,). It returns another function, which maps the next token (1,) to
                    the logits (1, V) of the token after it

To add a peer, write a class and add it to PEERS. To add a row, add it to ROWS and a method to the sides that have it.
All imports of packages are inside the methods, because each side runs in a process of its own: krasserm's package is
called `perceiver` too.
"""
import sys
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from rows import PREFIX, video_outputs
from torch import Tensor, nn


class Side:
    package = ""  # a peer's package
    same = True  # whether it computes the same as our side if the weights are the same

    def rename(self, key: str) -> str:
        """The name of a weight as perceiver/pretrained.py can read it; "" if our model has no such weight."""
        return key

    @classmethod
    def has(cls, row) -> bool:
        return hasattr(cls, row.model)

    def set_dtype(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Makes the model compute in `dtype`."""
        model.to(dtype)


class Ours(Side):
    """The models are those of the recipes, with the peers' variants: exact GELU, latent_keys=q_norm."""

    package = "perceiver"

    def ar(self, **options):
        from perceiver.model import PerceiverAR, PerceiverARConfig

        options = dict(max_seq_len=2048, cross_attention_dropout=0.5) | options
        model = PerceiverAR(PerceiverARConfig(vocab_size=262, latent_keys="q_norm", **options))
        return model, model

    def decode(self, compiled=False):
        from perceiver.decoding import Decoder

        model, _ = self.ar(max_seq_len=4096)

        def start(prompt):
            decoder = Decoder(model, [prompt.tolist()], compile=compiled)
            decoder.logits()

            def step(token):
                decoder.append(token)
                return decoder.logits()

            return step

        return model, start

    def recipe(self, name: str, overrides=()):
        import perceiver
        from perceiver.config import load_config
        from perceiver.tasks import TASKS

        file = Path(perceiver.__file__).parents[1] / f"configs/{name}.yaml"
        activation = ["model.encoder.activation=gelu", "model.decoder.activation=gelu"]
        model = load_config(file, [*activation, *overrides], TASKS).model.build()
        return model, model

    def mlm(self, overrides=()):
        return self.recipe("mlm_paper", overrides)

    def imagenet(self):
        return self.recipe("imagenet_fourier")

    def mnist(self):
        return self.recipe("mnist")

    def flow(self):
        return self.recipe("flow_sintel")

    def video(self):
        model, _ = self.recipe("autoencode_kinetics")

        def outputs(inputs):
            out = model(inputs, output_positions=video_outputs(inputs["image"].device))
            return torch.cat([out[name].flatten() for name in ("image", "audio", "label")])

        return model, outputs


class Transformers(Side):
    """Hugging Face transformers, with the options of DeepMind's models but no attention dropout, like our side."""

    package = "transformers"

    def config(self, **options):
        from transformers import PerceiverConfig

        return PerceiverConfig(attention_probs_dropout_prob=0.0, **options)

    def mlm(self, **options):
        from transformers import PerceiverForMaskedLM

        model = PerceiverForMaskedLM(self.config(**dict(qk_channels=256, v_channels=1280) | options))
        return model, lambda tokens: model(tokens).logits

    def imagenet(self):
        from transformers import PerceiverForImageClassificationFourier

        model = PerceiverForImageClassificationFourier(self.config(
            num_latents=512, d_latents=1024, d_model=261, num_blocks=8, num_self_attends_per_block=6,
            num_cross_attention_heads=1, num_labels=1000))
        return model, lambda images: model(inputs=images).logits

    def flow(self):
        """The inputs are patches of 3 x 3 pixels. We cut them in the first call, outside the time."""
        from transformers import PerceiverForOpticalFlow

        model = PerceiverForOpticalFlow(self.config(
            num_latents=2048, d_latents=512, d_model=322, num_self_attends_per_block=24, num_self_attention_heads=16,
            num_cross_attention_heads=1, train_size=[368, 496]))
        port = flow_of_patches(lambda patches: model(patches).logits)
        return model, port

    def video(self):
        from transformers import PerceiverForMultimodalAutoencoding

        model = PerceiverForMultimodalAutoencoding(self.config(
            num_latents=784, d_latents=512, d_model=704, num_self_attends_per_block=8, num_cross_attention_heads=1,
            num_labels=700))

        def outputs(inputs):
            positions = video_outputs(inputs["image"].device)
            out = model(inputs, subsampled_output_points=positions).logits
            return torch.cat([out[name].flatten() for name in ("image", "audio", "label")])

        return model, outputs


def cut_patches(frames: Tensor) -> Tensor:
    """Frames (B, 2, 3, H, W) -> (B, 2, 27, H, W): the 3 x 3 pixels around each pixel, zeros outside."""
    height, width = frames.shape[-2:]
    padded = F.pad(frames, (1, 1, 1, 1))
    places = [(row, column) for row in range(3) for column in range(3)]
    return torch.cat([padded[..., i : i + height, j : j + width] for i, j in places], dim=2)


def flow_of_patches(model):
    """A function of frames for a model of their patches, which are cut in its first call. The flow is in pixels."""
    patches = None

    def flow(frames):
        nonlocal patches
        if patches is None:
            patches = cut_patches(frames)
        return 20 * model(patches)

    return flow


class Krasserm(Side):
    """krasserm/perceiver-io. Its Hugging Face wrappers have no `generate` in transformers 5, so `decode` is the
    shortest loop around the core model. Its cache slides once it is full; in the timed tokens it is not.
    """

    package = "perceiver"

    def ar(self, **options):
        from perceiver.model.core import CausalSequenceModel, CausalSequenceModelConfig

        options = dict(max_seq_len=2048, cross_attention_dropout=0.5) | options
        model = CausalSequenceModel(CausalSequenceModelConfig(**options))
        return model, lambda tokens: model(tokens, prefix_len=tokens.shape[1] - model.max_latents).logits

    def set_dtype(self, model, dtype):
        """Its rotary frequencies were rounded to float32. A model in float64 gets exact ones here, as ours has them."""
        model.to(dtype)
        for name, frequencies in model.named_buffers():
            if name.endswith("inv_freq") and dtype == torch.float64:
                pairs = torch.arange(len(frequencies), dtype=dtype)
                frequencies.copy_(10_000 ** (-pairs / len(frequencies)))

    def decode(self, compiled=False):
        model, _ = self.ar(max_seq_len=4096)

        def start(prompt):
            prefix = PREFIX[len(prompt)]
            out = model(prompt[None], prefix_len=prefix, kv_cache=[])

            def step(token):
                nonlocal out
                out = model(token[:, None], prefix_len=prefix, kv_cache=out.kv_cache)
                return out.logits[:, -1]

            return step

        return model, start

    def mlm(self):
        skip_init("perceiver.model.text.mlm")
        from perceiver.model.text.common import TextEncoderConfig
        from perceiver.model.text.mlm.backend import MaskedLanguageModel, MaskedLanguageModelConfig, TextDecoderConfig

        text = dict(vocab_size=262, max_seq_len=2048)
        encoder = TextEncoderConfig(
            **text, num_input_channels=768, num_cross_attention_qk_channels=256, num_cross_attention_v_channels=1280,
            num_self_attention_qk_channels=256, num_self_attention_v_channels=1280,
            num_self_attention_layers_per_block=26)
        decoder = TextDecoderConfig(
            **text, num_cross_attention_qk_channels=256, num_cross_attention_v_channels=768,
            cross_attention_residual=False)
        config = MaskedLanguageModelConfig(encoder, decoder, num_latents=256, num_latent_channels=1280)
        model = MaskedLanguageModel(config)
        return model, model

    def imagenet(self):
        return self.image_classifier(
            encoder=dict(image_shape=(224, 224, 3), num_frequency_bands=64, num_self_attention_layers_per_block=6,
                         num_self_attention_blocks=8),
            decoder=dict(num_classes=1000, num_output_query_channels=1024), num_latents=512, num_latent_channels=1024)

    def mnist(self):
        return self.image_classifier(
            encoder=dict(image_shape=(28, 28, 1), num_frequency_bands=32, num_cross_attention_layers=2,
                         num_self_attention_blocks=3, num_self_attention_layers_per_block=3,
                         first_self_attention_block_shared=False, dropout=0.1),
            decoder=dict(num_classes=10, num_output_query_channels=128, dropout=0.1),
            num_latents=32, num_latent_channels=128)

    def image_classifier(self, encoder: dict, decoder: dict, **latents):
        skip_init("perceiver.model.vision.image_classifier")
        from perceiver.model.vision.image_classifier import backend

        encoder = backend.ImageEncoderConfig(num_cross_attention_heads=1, **encoder)
        decoder = backend.ClassificationDecoderConfig(num_cross_attention_heads=1, **decoder)
        model = backend.ImageClassifier(backend.ImageClassifierConfig(encoder, decoder, **latents))
        return model, lambda images: model(images.movedim(1, -1))

    def flow(self):
        """Its inputs are patches, as in transformers."""
        skip_init("perceiver.model.vision.optical_flow")
        from perceiver.model.vision.optical_flow import backend

        encoder = backend.OpticalFlowEncoderConfig(
            num_cross_attention_heads=1, num_self_attention_heads=16, num_self_attention_layers_per_block=24)
        decoder = backend.OpticalFlowDecoderConfig(
            num_cross_attention_qk_channels=512, num_cross_attention_v_channels=512, num_cross_attention_heads=1,
            cross_attention_residual=False)
        config = backend.OpticalFlowConfig(encoder, decoder, num_latents=2048, num_latent_channels=512)
        model = backend.OpticalFlow(config)
        return model, flow_of_patches(model)

    # The start of a name, and its replacement. The first match counts.
    KEYS = {
        "0.input_adapter.position_encoding.": None,  # Fourier features: our model computes them
        "0.input_adapter.txt_embedding.": "input_adapter.features.",
        "0.input_adapter.pos_embedding.": "input_adapter.positions.table.",
        "0.input_adapter.linear.": "input_adapter.features.linear.",
        "0.latent_provider._query": "encoder.latents.weight",
        "0.cross_attn_1.": "encoder.cross_attention.0.",
        "0.cross_attn_n.": "encoder.cross_attention.1.",
        "0.self_attn_1.": "encoder.self_attention.0.",
        "0.self_attn_n.": "encoder.self_attention.1.",
        "1.cross_attn.0.module.": "decoder.cross_attention.",
        "1.cross_attn.0.": "decoder.cross_attention.",  # without a residual
        "1.cross_attn.": "decoder.cross_attention.",
        "1.output_query_provider._query": "query_provider.table.weight",
        "1.output_adapter.bias": "embedding_decoder.bias",
        "1.output_adapter.": "output_adapter.",
    }

    def rename(self, key):
        for theirs, ours in self.KEYS.items():
            if key.startswith(theirs):
                return ours + key.removeprefix(theirs) if ours else ""
        return key


def skip_init(package: str) -> None:
    """Puts an empty module in place of the package's __init__.py, which would import pytorch_lightning."""
    parent, _, name = package.rpartition(".")
    __import__(parent)
    module = sys.modules[package] = ModuleType(package)
    module.__path__ = [f"{sys.modules[parent].__path__[0]}/{name}"]


class Lucidrains(Side):
    """lucidrains' perceiver-ar-pytorch. There is no row `decode`: its `generate` has no cache, and evaluates the whole
    model for each token. There are no rows for perceiver-pytorch: its MLPs are always gated and widen four times, so no
    options give it a model like ours.
    """

    package = "perceiver_ar_pytorch"
    same = False

    def ar(self):
        from perceiver_ar_pytorch import PerceiverAR

        model = PerceiverAR(num_tokens=262, dim=512, depth=8, max_seq_len=2048, cross_attn_seq_len=1536,
                            cross_attn_dropout=0.5)
        return model, model


PEERS = {"lucidrains": Lucidrains, "krasserm": Krasserm, "transformers": Transformers, "ours": Ours}
