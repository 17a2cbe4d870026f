"""Several modalities in one model: how inputs and queries are laid out, what masks hide, outputs in parts."""
import pytest
import torch
from torch import nn

from perceiver.adapters import FourierPositions, InputAdapter, LinearOutput, TrainableQueries, VectorInput
from perceiver.architectures import MultimodalAutoencoderConfig, VideoInputConfig
from perceiver.model import (PerceiverDecoder, PerceiverDecoderConfig, PerceiverEncoder, PerceiverEncoderConfig,
                             PerceiverIO)
from perceiver.multimodal import MultimodalInput

VIDEO = dict(image_shape=(3, 8, 12, 3), num_image_bands=2, num_audio_samples=48, samples_per_patch=8,
             num_audio_bands=3, num_classes=5)


def config(**kwargs) -> MultimodalAutoencoderConfig:
    encoder = PerceiverEncoderConfig(1, num_self_attention_heads=2, num_self_attention_layers_per_block=1)
    decoder = PerceiverDecoderConfig(1, num_query_channels=9, cross_attention_residual=False)
    return MultimodalAutoencoderConfig(6, 16, encoder, decoder, VideoInputConfig(**VIDEO | kwargs), 10)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = config().build().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"image": torch.rand(2, 3, 3, 8, 12), "audio": torch.randn(2, 48, 1), "label": torch.eye(5)[[3, 0]]}


def assert_same(a: dict, b: dict, names=("audio", "image", "label")):
    assert tuple(a) == tuple(names)
    for name in names:
        torch.testing.assert_close(a[name], b[name])


def test_modalities_lie_one_after_the_other_each_with_its_padding(model, inputs):
    adapter = model.input_adapter
    x = adapter(inputs | {"label_mask": torch.zeros(2, 1, dtype=torch.bool)})
    assert x.shape == (2, 6 + 3 * 2 * 3 + 1, adapter.num_channels)
    assert adapter.num_channels == config().input.num_channels == 48 + 3 * 5 + 4
    start = 0
    for name, size, width in (("audio", 6, 8 + 7), ("image", 18, 48 + 15), ("label", 1, 5)):
        part = x[:, start : start + size]
        torch.testing.assert_close(part[..., :width], adapter.adapters[name](inputs[name]))
        assert torch.equal(part[..., width:], adapter.padding[name].expand(2, size, -1))
        start += size


def test_what_is_masked_is_its_modalitys_vector(model, inputs):
    masks = {"label_mask": torch.tensor([[True], [False]]), "image_mask": torch.arange(18).expand(2, -1) == 4}
    seen, x = (model.input_adapter(inputs | {"label_mask": mask} | images) for mask, images in (
        (torch.tensor([[False]]), {}), (masks["label_mask"], {"image_mask": masks["image_mask"]})))
    changed = (seen != x).any(-1).nonzero().tolist()
    assert changed == [[0, 6 + 4], [0, 24], [1, 6 + 4]]
    assert torch.equal(x[0, 24], model.input_adapter.mask["label"][0])
    assert torch.equal(x[1, 10], model.input_adapter.mask["image"][0])


def test_the_label_is_masked_unless_told_otherwise(model, inputs):
    other = inputs | {"label": torch.randn(2, 5)}
    assert_same(model(inputs), model(other))
    shown = {"label_mask": torch.tensor([[False], [True]])}
    a, b = model(inputs | shown), model(other | shown)
    assert not torch.allclose(a["label"][0], b["label"][0]) and torch.equal(a["label"][1], b["label"][1])


@pytest.mark.parametrize("num_chunks", [1, 5, 128])
def test_outputs_in_parts_are_those_at_once(model, inputs, num_chunks):
    whole = model(inputs)
    assert {name: values.shape for name, values in whole.items()} == {
        name: values.shape for name, values in inputs.items()}
    assert_same(model.reconstruct(inputs, num_chunks), whole)


def test_chosen_outputs(model, inputs):
    """Each example its own pixels, the same sound for all, and no label."""
    whole = model(inputs)
    pixels = whole["image"].movedim(2, -1).flatten(1, 3)  # (B, O, 3)
    positions = {"image": torch.tensor([[5, 287], [100, 100]]), "audio": torch.tensor([5])}
    some = model(inputs, output_positions=positions)
    expected = torch.stack([pixels[b, positions["image"][b]] for b in range(2)])
    assert_same(some, {"image": expected, "audio": whole["audio"][:, 40:].mT}, ("audio", "image"))
    assert_same(model(inputs, output_positions={"label": None}), whole, ("label",))


def test_gradients_reach_every_parameter(model, inputs):
    """Of masks that hide nothing too: processes that exchange gradients wait for all of them."""
    sum(values.square().sum() for values in model(inputs).values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_official_size():
    encoder = PerceiverEncoderConfig(1, num_self_attention_layers_per_block=8)
    with torch.device("meta"):
        decoder = PerceiverDecoderConfig(1, num_query_channels=1024)
        model = MultimodalAutoencoderConfig(784, 512, encoder, decoder).build()
        inputs = {"image": torch.empty(1, 16, 3, 224, 224), "audio": torch.empty(1, 30720, 1),
                  "label": torch.empty(1, 700)}
        assert model.input_adapter(inputs).shape == (1, 52_097, 704)
    assert model.decoder.cross_attention.q_norm.normalized_shape == (1026,)
    assert sum(parameter.numel() for parameter in model.parameters()) == 19_858_855


def test_any_modalities():
    """A model that answers from a vector and a series; which is needed is told by the other one."""
    torch.manual_seed(0)
    adapter = MultimodalInput({"which": VectorInput(3), "series": InputAdapter(nn.Identity(), 1,
                                                                              FourierPositions((3,), 2))})
    encoder = PerceiverEncoderConfig(1, num_self_attention_heads=2, num_self_attention_layers_per_block=1,
                                     init_scale=0.1)
    model = PerceiverIO(adapter, PerceiverEncoder(encoder, 4, 32, adapter.num_channels), TrainableQueries(1, 16),
                        PerceiverDecoder(PerceiverDecoderConfig(1, init_scale=0.1), 32, 16), LinearOutput(16, 1))
    optimizer, losses = torch.optim.Adam(model.parameters(), 3e-3), []
    for _ in range(400):
        series, which = torch.randn(64, 3, 1), torch.randint(3, (64,))
        answer = model({"series": series, "which": nn.functional.one_hot(which, 3).float()})[:, 0, 0]
        loss = (answer - series[torch.arange(64), which, 0]).square().mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) / 20 < 0.2


@pytest.mark.parametrize("kwargs, message", [
    (dict(image_shape=(8, 8, 3)), r"image_shape=\(8, 8, 3\) must be 4 positive numbers"),
    (dict(patch_shape=(2, 4, 4)), r"patch_shape=\(2, 4, 4\) does not divide image_shape=\(3, 8, 12, 3\)"),
    (dict(samples_per_patch=7), "samples_per_patch=7 does not divide num_audio_samples=48"),
    (dict(num_audio_bands=0), "num_audio_bands=0 must be at least 1")])
def test_config_errors_name_key_and_value(kwargs, message):
    with pytest.raises(ValueError, match=message):
        config(**kwargs)


def test_a_model_without_decoder_is_refused():
    with pytest.raises(ValueError, match="decoder=None: an autoencoder needs one"):
        MultimodalAutoencoderConfig(decoder=None)
