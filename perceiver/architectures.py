"""Whole models of the Perceiver IO family, as configs describe them: input, encoder, queries, decoder, output.

Each config's `build()` puts parts of model.py and adapters.py together. Letters of shapes are those of model.py.
"""
import math
from dataclasses import dataclass, field

from torch import Tensor, nn

from perceiver.adapters import (ClassificationOutput, FlowOutput, FourierPositions, FourierQueries, FrameFeatures,
                                GridOutput, ImageFeatures, InputAdapter, InputQueries, LinearOutput, Patches,
                                TiedTokenOutput, TrainablePositions, TrainableQueries, VectorInput)
from perceiver.model import (Perceiver, PerceiverDecoder, PerceiverDecoderConfig, PerceiverEncoder,
                             PerceiverEncoderConfig, PerceiverIO, check_choice, check_positive, init_weights)
from perceiver.multimodal import MultimodalInput, MultimodalOutput, MultimodalPerceiverIO, MultimodalQueries


@dataclass
class TokenInputConfig:
    vocab_size: int = 262  # V: 262 for bytes
    max_seq_len: int = 2048  # M: positions there are; shorter inputs take the first ones
    num_input_channels: int = 768  # C: of embeddings and positions, which are added

    def __post_init__(self):
        check_positive(self, "vocab_size", "max_seq_len", "num_input_channels")

    @property
    def num_channels(self) -> int:
        return self.num_input_channels

    def build(self, init_scale: float) -> InputAdapter:
        """Tokens (B, M) -> (B, M, C)."""
        embedding = nn.Embedding(self.vocab_size, self.num_input_channels)
        positions = TrainablePositions((self.max_seq_len,), self.num_input_channels, init_scale=init_scale)
        init_weights(embedding, init_scale)
        return InputAdapter(embedding, self.num_input_channels, positions, "add")


@dataclass
class ImageInputConfig:
    image_shape: tuple[int, ...] = (224, 224, 3)  # height, width, channels
    features: str = "pixels"  # pixels, conv1x1 (each pixel mapped) or conv (7x7, BatchNorm, ReLU, max-pool: a fourth)
    num_feature_channels: int = 64  # of conv1x1 and conv
    conv_padding: str = "same"  # of conv: same (DeepMind, TensorFlow) or symmetric (the Hugging Face port)
    positions: str = "fourier"  # fourier or trainable; concatenated to the features
    num_frequency_bands: int = 64  # K, of fourier
    max_resolution: tuple[int, ...] | None = None  # of fourier: twice the highest frequencies; null: that of the inputs
    num_position_channels: int = 256  # of trainable, before and after a linear map

    def __post_init__(self):
        check_positive(self, "num_feature_channels", "num_frequency_bands", "num_position_channels")
        for name, length in (("image_shape", 3), ("max_resolution", 2)):
            if (value := getattr(self, name)) is not None and (len(value) != length or min(value) < 1):
                raise ValueError(f"{name}={value} must be {length} positive numbers")
        for name, choices in (("features", ("pixels", "conv1x1", "conv")), ("conv_padding", ("same", "symmetric")),
                              ("positions", ("fourier", "trainable"))):
            check_choice(self, name, choices)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the features."""
        height, width, _ = self.image_shape
        if self.features != "conv":
            return height, width
        if self.conv_padding == "same":
            return math.ceil(height / 4), math.ceil(width / 4)
        return (height - 1) // 4, (width - 1) // 4

    @property
    def num_channels(self) -> int:
        """C of the adapted inputs."""
        num_features = self.image_shape[2] if self.features == "pixels" else self.num_feature_channels
        num_fourier = 2 * (2 * self.num_frequency_bands + 1)
        return num_features + (num_fourier if self.positions == "fourier" else self.num_position_channels)

    def build(self, init_scale: float) -> InputAdapter:
        """Images (B, channels, height, width) -> (B, M, C)."""
        if self.positions == "fourier":
            positions = FourierPositions(self.grid, self.num_frequency_bands, self.max_resolution)
        else:
            num_channels = self.num_position_channels
            positions = TrainablePositions(self.grid, num_channels, num_channels, init_scale)
        features = ImageFeatures(self.image_shape[2], self.features, self.num_feature_channels, self.conv_padding,
                                 init_scale)
        return InputAdapter(features, self.num_channels - positions.num_channels, positions)


@dataclass
class PerceiverIOConfig:
    """What the configs of all models have in common; each adds an `input`."""
    num_latents: int = 256  # N
    num_latent_channels: int = 512  # D
    encoder: PerceiverEncoderConfig = field(default_factory=PerceiverEncoderConfig)
    decoder: PerceiverDecoderConfig | None = field(default_factory=PerceiverDecoderConfig)
    # Weights to start training from: as `from_pretrained`, or a checkpoint of train.py
    init_from: str | None = field(default=None, kw_only=True)

    def __post_init__(self):
        check_positive(self, "num_latents", "num_latent_channels")
        attentions = [("encoder.num_cross_attention", self.encoder, self.input.num_channels),
                      ("encoder.num_self_attention", self.encoder, self.num_latent_channels)]
        if self.decoder is not None:
            attentions.append(("decoder.num_cross_attention", self.decoder, self.num_latent_channels))
        for key, config, num_channels in attentions:
            heads, qk, v = (getattr(config, f"{key.split('.')[1]}_{name}") for name in ("heads", "qk_channels",
                                                                                        "v_channels"))
            qk = qk or num_channels
            for name, channels in (("qk", qk), ("v", v or qk)):
                if channels % heads:
                    raise ValueError(f"{key}_heads={heads} does not divide {channels}, the {key}_{name}_channels")

    def build_encoder(self) -> PerceiverEncoder:
        return PerceiverEncoder(self.encoder, self.num_latents, self.num_latent_channels, self.input.num_channels)


@dataclass
class MaskedLMConfig(PerceiverIOConfig):
    """Tokens (B, M) to logits of the token at every position, (B, M, V)."""
    input: TokenInputConfig = field(default_factory=TokenInputConfig)
    tied_output: bool = True  # logits are products with the input's embeddings

    def __post_init__(self):
        super().__post_init__()
        if self.decoder is None:
            raise ValueError("decoder=None: a masked language model needs one")
        if self.tied_output and self.num_query_channels != self.input.num_input_channels:
            raise ValueError(f"decoder.num_query_channels={self.num_query_channels} must be "
                             f"input.num_input_channels={self.input.num_input_channels}, or tied_output false")

    @property
    def num_query_channels(self) -> int:
        return self.decoder.num_query_channels or (
            self.input.num_input_channels if self.tied_output else self.num_latent_channels)

    def build(self) -> PerceiverIO:
        input_adapter, init_scale = self.input.build(self.encoder.init_scale), self.decoder.init_scale
        num_channels = self.num_query_channels
        return PerceiverIO(
            input_adapter, self.build_encoder(),
            TrainableQueries(self.input.max_seq_len, num_channels, one_per_input=True, init_scale=init_scale),
            PerceiverDecoder(self.decoder, self.num_latent_channels, num_channels),
            TiedTokenOutput(input_adapter.features) if self.tied_output
            else LinearOutput(num_channels, self.input.vocab_size, init_scale))


def freeze(module: nn.Module) -> None:
    """No gradients, and evaluation mode for good: no dropout, and BatchNorm's statistics stay as they are."""
    module.requires_grad_(False).eval()
    module.train = lambda mode=True: module


@dataclass
class ClassifierConfig(PerceiverIOConfig):
    """Anything to logits of classes (B, E). Without a decoder, it's the original Perceiver: the mean of the latents."""
    num_classes: int = 10  # E
    freeze_encoder: bool = field(default=False, kw_only=True)  # train what comes after the latents alone

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "num_classes")

    def build(self) -> PerceiverIO | Perceiver:
        input_adapter, encoder = self.input.build(self.encoder.init_scale), self.build_encoder()
        for part in (input_adapter, encoder) if self.freeze_encoder else ():
            freeze(part)
        if self.decoder is None:
            output = ClassificationOutput(self.num_latent_channels, self.num_classes, self.encoder.init_scale)
            return Perceiver(input_adapter, encoder, output)
        num_channels, init_scale = self.decoder.num_query_channels or self.num_latent_channels, self.decoder.init_scale
        return PerceiverIO(input_adapter, encoder, TrainableQueries(1, num_channels, init_scale=init_scale),
                           PerceiverDecoder(self.decoder, self.num_latent_channels, num_channels),
                           ClassificationOutput(num_channels, self.num_classes, init_scale))


@dataclass
class TextClassifierConfig(ClassifierConfig):
    input: TokenInputConfig = field(default_factory=TokenInputConfig)


@dataclass
class ImageClassifierConfig(ClassifierConfig):
    input: ImageInputConfig = field(default_factory=ImageInputConfig)


@dataclass
class FrameInputConfig:
    frame_shape: tuple[int, ...] = (368, 496)  # height and width that the model is trained for
    num_feature_channels: int = 64  # of what is around a pixel in both frames
    num_frequency_bands: int = 64  # K, of Fourier positions, which are concatenated
    max_resolution: tuple[int, ...] | None = None  # twice the highest frequencies; null: frame_shape

    def __post_init__(self):
        check_positive(self, "num_feature_channels", "num_frequency_bands")
        for name in ("frame_shape", "max_resolution"):
            if (value := getattr(self, name)) is not None and (len(value) != 2 or min(value) < 1):
                raise ValueError(f"{name}={value} must be 2 positive numbers")

    @property
    def num_channels(self) -> int:
        """C of the adapted inputs."""
        return self.num_feature_channels + 2 * (2 * self.num_frequency_bands + 1)

    def build(self, init_scale: float) -> InputAdapter:
        """Frames (B, 2, 3, H, W) -> (B, H * W, C)."""
        positions = FourierPositions(self.frame_shape, self.num_frequency_bands, self.max_resolution)
        return InputAdapter(FrameFeatures(self.num_feature_channels, init_scale), self.num_feature_channels, positions)


class OpticalFlowModel(PerceiverIO):
    """Perceiver IO with an output for each pixel, arranged as the pixels are."""

    def forward(self, frames: Tensor, output_positions: Tensor | None = None) -> Tensor:
        """Two frames (B, 2, 3, H, W) in [-1, 1] -> flow (B, H, W, 2), how far each pixel of the first moves right and
        down, in pixels; or (B, O', 2) at `output_positions` (O') or (B, O'), pixels by number, row by row."""
        flow = super().forward(frames, output_positions=output_positions)  # (B, O, 2)
        return flow.unflatten(1, frames.shape[-2:]) if output_positions is None else flow


@dataclass
class OpticalFlowConfig(PerceiverIOConfig):
    """Two frames to how each pixel of the first moves; a pixel's query is its adapted input (section 4.2)."""
    input: FrameInputConfig = field(default_factory=FrameInputConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.decoder is None:
            raise ValueError("decoder=None: optical flow needs one")
        if self.decoder.num_query_channels is not None:
            raise ValueError(f"decoder.num_query_channels={self.decoder.num_query_channels} must be null: the queries "
                             "are the adapted inputs")

    def build(self) -> OpticalFlowModel:
        num_channels = self.input.num_channels
        return OpticalFlowModel(self.input.build(self.encoder.init_scale), self.build_encoder(), InputQueries(),
                                PerceiverDecoder(self.decoder, self.num_latent_channels, num_channels),
                                FlowOutput(num_channels))


@dataclass
class VideoInputConfig:
    """A clip: frames, sound and the class of what happens in it."""
    image_shape: tuple[int, ...] = (16, 224, 224, 3)  # frames, height, width, channels
    patch_shape: tuple[int, ...] = (1, 4, 4)  # frames, height and width of what is one input
    num_image_bands: int = 32  # K of the patches' positions, and of the pixels' that are asked for
    max_resolution: tuple[int, ...] | None = None  # of both: twice the highest frequencies; null: the patches
    num_audio_samples: int = 30_720  # of mono sound, as long as the frames are shown
    samples_per_patch: int = 16  # that are one input, and one output
    num_audio_bands: int = 192  # K
    num_classes: int = 700
    num_padding_channels: int = 4  # at least so many trained ones follow those of each modality

    def __post_init__(self):
        check_positive(self, "num_image_bands", "num_audio_samples", "samples_per_patch", "num_audio_bands",
                       "num_classes", "num_padding_channels")
        for name, length in (("image_shape", 4), ("patch_shape", 3), ("max_resolution", 3)):
            if (value := getattr(self, name)) is not None and (len(value) != length or min(value) < 1):
                raise ValueError(f"{name}={value} must be {length} positive numbers")
        if any(size % patch for size, patch in zip(self.image_shape, self.patch_shape)):
            raise ValueError(f"patch_shape={self.patch_shape} does not divide image_shape={self.image_shape}")
        if self.num_audio_samples % self.samples_per_patch:
            raise ValueError(f"samples_per_patch={self.samples_per_patch} does not divide "
                             f"num_audio_samples={self.num_audio_samples}")

    @property
    def image_grid(self) -> tuple[int, ...]:
        """The patches: in time, in height, in width."""
        return tuple(size // patch for size, patch in zip(self.image_shape, self.patch_shape))

    @property
    def audio_grid(self) -> tuple[int, ...]:
        return (self.num_audio_samples // self.samples_per_patch,)

    @property
    def max_resolutions(self) -> dict[str, tuple[int, ...]]:
        """The official models' are those of patches of the frames, but of samples of the sound."""
        return {"image": self.max_resolution or self.image_grid, "audio": (self.num_audio_samples,)}

    @property
    def num_features(self) -> dict[str, int]:
        """Channels of the adapted inputs but for positions."""
        return {"image": math.prod(self.patch_shape) * self.image_shape[-1], "audio": self.samples_per_patch,
                "label": self.num_classes}

    @property
    def num_channels(self) -> int:
        """C of the adapted inputs."""
        num_positions = {"image": 3 * (2 * self.num_image_bands + 1), "audio": 2 * self.num_audio_bands + 1, "label": 0}
        return max(self.num_features[name] + num_positions[name] for name in num_positions) + self.num_padding_channels

    def build(self, init_scale: float) -> MultimodalInput:
        """image (B, T, 3, H, W), audio (B, S, 1), label (B, num_classes), masked by default -> (B, M, C)."""
        image = FourierPositions(self.image_grid, self.num_image_bands, self.max_resolutions["image"])
        audio = FourierPositions(self.audio_grid, self.num_audio_bands, self.max_resolutions["audio"])
        adapters = {
            "image": InputAdapter(Patches(self.patch_shape, channel_dim=2), self.num_features["image"], image),
            "audio": InputAdapter(Patches((self.samples_per_patch,)), self.num_features["audio"], audio),
            "label": VectorInput(self.num_classes)}
        return MultimodalInput(adapters, self.num_padding_channels, ("label",), init_scale)


@dataclass
class MultimodalAutoencoderConfig(PerceiverIOConfig):
    """Frames, sound and class of a video to the same (Perceiver IO, section 4.3)."""
    input: VideoInputConfig = field(default_factory=VideoInputConfig)
    num_output_channels: int = 512  # that all outputs are made of
    num_query_padding_channels: int = 2  # at least so many trained ones follow those of each modality's queries

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "num_output_channels", "num_query_padding_channels")
        if self.decoder is None:
            raise ValueError("decoder=None: an autoencoder needs one")

    def build(self) -> MultimodalPerceiverIO:
        c, init_scale, resolutions = self.input, self.decoder.init_scale, self.input.max_resolutions
        queries = MultimodalQueries({
            "image": FourierQueries(c.image_shape[:3], c.num_image_bands, resolutions["image"]),
            "audio": FourierQueries(c.audio_grid, c.num_audio_bands, resolutions["audio"]),
            "label": TrainableQueries(1, self.decoder.num_query_channels or self.num_latent_channels,
                                      init_scale=init_scale)}, self.num_query_padding_channels, init_scale)

        def output(*sizes) -> GridOutput:
            return GridOutput(self.num_output_channels, *sizes, init_scale=init_scale)

        outputs = {"image": output(c.image_shape[-1], c.image_shape, 2),
                   "audio": output(c.samples_per_patch, (c.num_audio_samples, 1)),
                   "label": output(c.num_classes, (c.num_classes,))}
        return MultimodalPerceiverIO(
            c.build(self.encoder.init_scale), self.build_encoder(), queries,
            PerceiverDecoder(self.decoder, self.num_latent_channels, queries.num_channels),
            MultimodalOutput(outputs, queries.num_channels, self.num_output_channels, init_scale))
