"""Adapters: positions and features against others' code, and composition of new modalities."""
import copy

import pytest
import torch
from torch import nn
from transformers.models.perceiver import modeling_perceiver as port

from perceiver.adapters import (FourierPositions, FourierQueries, GridOutput, InputAdapter, LinearOutput, Patches,
                                TiedTokenOutput, TrainablePositions, TrainableQueries, fourier_features, grid_positions,
                                same_padding)
from perceiver.architectures import ImageInputConfig, MaskedLMConfig, TokenInputConfig
from perceiver.model import (PerceiverDecoder, PerceiverDecoderConfig, PerceiverEncoder, PerceiverEncoderConfig,
                             PerceiverIO)
from perceiver.multimodal import MultimodalInput


@pytest.mark.parametrize("grid, num_bands, max_resolution", [((7,), 5, None), ((6, 9), 4, None), ((6, 9), 4, (20, 31)),
                                                             ((2, 3, 4), 3, None)])
def test_fourier_positions_equal_the_port(grid, num_bands, max_resolution):
    expected = port.PerceiverFourierPositionEncoding(num_bands, max_resolution or grid)(
        grid, 1, torch.device("cpu"), torch.float32)[0]
    positions = FourierPositions(grid, num_bands, max_resolution)
    assert positions.num_channels == expected.shape[1]
    torch.testing.assert_close(positions(grid), expected)


def test_fourier_features_by_hand():
    """Two rows of three: frequencies 1 and 5 in rows, 1 and 10 in columns; all sines before all cosines."""
    positions = grid_positions((2, 3))
    assert positions.tolist() == [[-1, -1], [-1, 0], [-1, 1], [1, -1], [1, 0], [1, 1]]
    positions = positions * 0.25
    angles = torch.pi * torch.stack([positions[:, 0], 5 * positions[:, 0], positions[:, 1], 10 * positions[:, 1]], 1)
    torch.testing.assert_close(fourier_features(positions, 2, (10, 20)),
                               torch.cat((positions, angles.sin(), angles.cos()), 1))


def test_positions_of_other_sizes_and_types():
    positions = FourierPositions((6, 9), 4, (20, 31))
    torch.testing.assert_close(positions((7, 5)), FourierPositions((7, 5), 4, (20, 31))((7, 5)))
    adapter = InputAdapter(nn.Identity(), 3, positions).bfloat16()
    for grid in ((6, 9), (200, 5)):  # exact up to the rounding of the result, at the highest frequency too
        exact = FourierPositions(grid, 4, (20, 31))(grid)
        torch.testing.assert_close(adapter(torch.zeros(1, *grid, 3, dtype=torch.bfloat16))[0, :, 3:].float(), exact,
                                   atol=4e-3, rtol=0)


def test_trainable_positions():
    positions = TrainablePositions((6, 9), 4, 8)
    torch.testing.assert_close(positions((6, 9)), positions.projection(positions.table.weight))
    with pytest.raises(ValueError, match="inputs of 9x6 positions, the model has trained 6x9"):
        positions((9, 6))
    text = TrainablePositions((6,), 4)
    torch.testing.assert_close(text((3,)), text.table.weight[:3])
    with pytest.raises(ValueError, match="inputs of 7 positions, the model has trained 6"):
        text((7,))


@pytest.mark.parametrize("size, kernel, padding", [(224, 7, (2, 3)), (112, 3, (0, 1)), (225, 7, (3, 3)), (5, 3, (1, 1)),
                                                   (1, 7, (3, 3))])
def test_same_padding_is_tensorflows(size, kernel, padding):
    assert same_padding(size, kernel, 2) == padding


@pytest.mark.parametrize("kwargs, grid, num_channels", [
    (dict(), (9, 14), 2 + 18), (dict(features="conv1x1"), (9, 14), 5 + 18), (dict(features="conv"), (3, 4), 5 + 18),
    (dict(features="conv", conv_padding="symmetric"), (2, 3), 5 + 18), (dict(positions="trainable"), (9, 14), 2 + 6)])
def test_images_of_any_shape_and_channel_count(kwargs, grid, num_channels):
    config = ImageInputConfig((9, 14, 2), num_feature_channels=5, num_frequency_bands=4, num_position_channels=6,
                              **kwargs)
    adapter, images = config.build(0.02), torch.randn(3, 2, 9, 14)
    assert config.grid == adapter.positions.grid == adapter.features(images).shape[1:-1] == grid
    assert config.num_channels == adapter.num_channels == num_channels
    assert adapter(images).shape == (3, grid[0] * grid[1], num_channels)
    with pytest.raises(ValueError, match=r"images of shape \(3, 1, 9, 14\), expected \(batch, 2, height, width\)"):
        adapter(images[:, :1])


def test_pixels_lie_with_their_positions():
    """Row by row: the coordinates beside a pixel are its own."""
    config, images = ImageInputConfig((3, 5, 1), num_frequency_bands=2), torch.arange(15.0).view(1, 1, 3, 5)
    x = config.build(0.02)(images)[0]
    row, column = (x[:, 1] + 1) * 1, (x[:, 2] + 1) * 2
    torch.testing.assert_close(x[:, 0], 5 * row + column)


@pytest.mark.parametrize("time, space", [(1, 4), (2, 2)])
def test_patches_equal_the_ports_space_to_depth(time, space):
    video = torch.randn(2, 4, 3, 8, 12)
    expected = port.space_to_depth(video, time, space)
    assert torch.equal(Patches((time, space, space), channel_dim=2)(video), expected)
    assert torch.equal(Patches((space, space))(video[:, 0].movedim(1, -1)), port.space_to_depth(video[:, 0], 1, space))
    assert torch.equal(Patches((4,))(video[:, 0, 0]), video[:, 0, 0].reshape(2, 2, 48))  # a series is cut into pieces


def test_fourier_queries_of_places():
    """Coordinates that end before 1; the same for chosen places, also when every example chooses its own."""
    queries, x = FourierQueries((2, 3, 4), 5, (7, 8, 9)), torch.zeros(2, 0, 1)
    steps = torch.meshgrid(torch.tensor([-1, 0.0]), torch.tensor([-1, -1 / 3, 1 / 3]), torch.arange(-1, 1, 0.5),
                           indexing="ij")
    expected = fourier_features(torch.stack(steps, -1).view(24, 3), 5, (7, 8, 9))
    torch.testing.assert_close(queries(x), expected.expand(2, -1, -1))
    places = torch.tensor([[23, 0, 7], [7, 7, 1]])
    torch.testing.assert_close(queries(x, places), expected[places])
    torch.testing.assert_close(queries(x, places[0]), expected[places[0]].expand(2, -1, -1))


def test_outputs_of_places_are_joined():
    video, sound = GridOutput(5, 3, (2, 4, 6, 3), channel_dim=2), GridOutput(5, 8, (32, 1))
    pixels, patches = torch.randn(2, 48, 3), torch.randn(2, 4, 8)
    whole, series = video.join(pixels), sound.join(patches)
    assert (video.num_places, sound.num_places) == (48, 4)
    assert whole.shape == (2, 2, 3, 4, 6) and series.shape == (2, 32, 1)
    assert torch.equal(whole[1, 1, :, 1, 5], pixels[1, 24 + 6 + 5])  # row by row, frame by frame
    assert torch.equal(series[1, 16:24, 0], patches[1, 2])


def test_tokens():
    adapter, ids = TokenInputConfig(10, 6, 4).build(0.02), torch.tensor([[1, 9, 3], [0, 0, 5]])
    torch.testing.assert_close(adapter(ids), adapter.features.weight[ids] + adapter.positions.table.weight[:3])


def test_tied_output_shares_the_embedding():
    config = MaskedLMConfig(6, 16, PerceiverEncoderConfig(2), input=TokenInputConfig(10, 8, 12),
                            decoder=PerceiverDecoderConfig(2))
    model = copy.deepcopy(config.build())
    assert isinstance(model.output_adapter, TiedTokenOutput)
    assert model.output_adapter.tied[0].weight is model.input_adapter.features.weight
    assert [key for key in model.state_dict() if "output" in key] == ["output_adapter.bias"]
    x = torch.randn(2, 8, 12)
    torch.testing.assert_close(model.output_adapter(x), x @ model.input_adapter.features.weight.T)
    untied = MaskedLMConfig(6, 16, PerceiverEncoderConfig(2), PerceiverDecoderConfig(2, num_query_channels=7),
                            TokenInputConfig(10, 8, 12), tied_output=False).build()
    assert untied(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 10)


@pytest.mark.parametrize("kwargs, message", [
    (dict(image_shape=(28, 28)), r"image_shape=\(28, 28\) must be 3 positive numbers"),
    (dict(max_resolution=(0, 3)), r"max_resolution=\(0, 3\) must be 2 positive numbers"),
    (dict(features="conv3"), "features='conv3' must be one of pixels, conv1x1, conv"),
    (dict(positions="sin"), "positions='sin' must be one of fourier, trainable"),
    (dict(num_frequency_bands=0), "num_frequency_bands=0 must be at least 1"),
    (dict(conv_padding="x"), "conv_padding")])
def test_config_errors_name_key_and_value(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ImageInputConfig(**kwargs)


@pytest.fixture
def one_thread():
    """Small models are several times slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_new_modality_takes_three_adapters(one_thread):
    """The README's example: a time series of 3 variables continued, here one that follows from what came before, with
    an image of its phase beside it in the second model, as another modality."""
    torch.manual_seed(0)
    series = InputAdapter(nn.Identity(), 3, FourierPositions((24,), 6))
    image = ImageInputConfig((4, 6, 1), num_frequency_bands=2).build(0.02)
    encoder = PerceiverEncoderConfig(1, num_self_attention_heads=2, num_self_attention_layers_per_block=2,
                                     init_scale=0.1)
    for adapter in (series, MultimodalInput({"series": series, "image": image})):
        model = PerceiverIO(adapter, PerceiverEncoder(encoder, 8, 32, adapter.num_channels), TrainableQueries(4, 16),
                            PerceiverDecoder(PerceiverDecoderConfig(1, init_scale=0.1), 32, 16), LinearOutput(16, 3))
        optimizer, losses = torch.optim.Adam(model.parameters(), 3e-3), []
        for _ in range(100):
            phase = torch.rand(32, 1, 1) * 6.3
            waves = torch.sin(torch.arange(28)[:, None] * torch.tensor([0.3, 0.5, 0.7]) + phase)  # (32, 28, 3)
            inputs = waves[:, :24]
            if adapter is not series:
                inputs = {"series": inputs, "image": phase.sin().expand(-1, 4, 6)[:, None]}
            loss = (model(inputs) - waves[:, 24:]).square().mean()
            optimizer.zero_grad(), loss.backward(), optimizer.step()
            losses.append(loss.item())
        assert sum(losses[-10:]) / 10 < 0.2 * losses[0]
