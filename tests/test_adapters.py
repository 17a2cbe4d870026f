"""Adapters: comparisons of positions and features with other implementations, and new modalities."""
import copy

import pytest
import torch
from torch import nn
from transformers.models.perceiver import modeling_perceiver as port

from perceiver.adapters import (FourierPositions, FourierQueries, GridOutput, InputAdapter, LinearOutput,
                                MultimodalInput, Patches, TiedTokenOutput, TrainablePositions, TrainableQueries,
                                fourier_features, grid_positions)
from perceiver.model import (PerceiverDecoder, PerceiverDecoderConfig, PerceiverEncoder, PerceiverEncoderConfig,
                             PerceiverIO, TokenEmbedding)
from perceiver.tasks.images import ImageInputConfig
from perceiver.tasks.masked_lm import MaskedLMConfig, TokenInputConfig


@pytest.mark.parametrize("grid, num_bands, max_resolution", [((7,), 5, None), ((6, 9), 4, None), ((6, 9), 4, (20, 31)),
                                                             ((2, 3, 4), 3, None)])
def test_fourier_positions_equal_the_port(grid, num_bands, max_resolution):
    expected = port.PerceiverFourierPositionEncoding(num_bands, max_resolution or grid)(
        grid, 1, torch.device("cpu"), torch.float32)[0]
    positions = FourierPositions(grid, num_bands, max_resolution)
    assert positions.num_channels == expected.shape[1]
    torch.testing.assert_close(positions(grid), expected)


def test_fourier_features_by_hand():
    """A grid of 2 rows and 3 columns. Rows have frequencies 1 and 5, columns 1 and 10. Sines precede cosines."""
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
    for grid in ((6, 9), (200, 5)):  # only the result is rounded, so even high frequencies are exact
        exact = FourierPositions(grid, 4, (20, 31))(grid)
        torch.testing.assert_close(adapter(torch.zeros(1, *grid, 3, dtype=torch.bfloat16))[0, :, 3:].float(), exact,
                                   atol=4e-3, rtol=0)


def test_trainable_positions():
    positions = TrainablePositions((6, 9), 4, 8)
    torch.testing.assert_close(positions((6, 9)), positions.projection(positions.table.weight))
    with pytest.raises(ValueError, match="the inputs have 9x6 positions, the model was trained with 6x9"):
        positions((9, 6))
    text = TrainablePositions((6,), 4)
    torch.testing.assert_close(text((3,)), text.table.weight[:3])
    with pytest.raises(ValueError, match="the inputs have 7 positions, the model was trained with 6"):
        text((7,))


@pytest.mark.parametrize("time, space", [(1, 4), (2, 2)])
def test_patches_equal_the_ports_space_to_depth(time, space):
    video = torch.randn(2, 4, 3, 8, 12)
    expected = port.space_to_depth(video, time, space)
    assert torch.equal(Patches((time, space, space), channel_dim=2)(video), expected)
    assert torch.equal(Patches((space, space))(video[:, 0].movedim(1, -1)), port.space_to_depth(video[:, 0], 1, space))
    assert torch.equal(Patches((4,))(video[:, 0, 0]), video[:, 0, 0].reshape(2, 2, 48))  # a series is cut into pieces


def test_fourier_queries_of_grid_points():
    """Coordinates end before 1. Selected points get the same queries, even if each example selects other points."""
    queries, x = FourierQueries((2, 3, 4), 5, (7, 8, 9)), torch.zeros(2, 0, 1)
    steps = torch.meshgrid(torch.tensor([-1, 0.0]), torch.tensor([-1, -1 / 3, 1 / 3]), torch.arange(-1, 1, 0.5),
                           indexing="ij")
    expected = fourier_features(torch.stack(steps, -1).view(24, 3), 5, (7, 8, 9))
    torch.testing.assert_close(queries(x), expected.expand(2, -1, -1))
    places = torch.tensor([[23, 0, 7], [7, 7, 1]])
    torch.testing.assert_close(queries(x, places), expected[places])
    torch.testing.assert_close(queries(x, places[0]), expected[places[0]].expand(2, -1, -1))


def test_outputs_are_joined_to_a_grid():
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


def test_ngrams_add_a_vector_for_each_size():
    """The vector of an n-gram depends on its n tokens alone, wherever it is, and on their order."""
    config = TokenInputConfig(vocab_size=10, max_seq_len=8, num_input_channels=4, ngram_sizes=(2, 3))
    embedding = config.build(0.02).features
    ids = torch.tensor([[1, 2, 3, 7, 1, 2, 3, 3], [3, 2, 1, 0, 0, 0, 0, 0]])
    torch.testing.assert_close(embedding(ids), embedding.weight[ids])  # n-grams start at 0
    torch.nn.init.normal_(embedding.ngrams)
    pairs, triples = embedding.ngram_indices(ids)
    assert triples[0, 2] == triples[0, 6] != triples[1, 2]
    assert pairs[0, 1] == pairs[0, 5] and pairs[0, 0] != pairs[0, 4]  # a text starts with padding
    assert len({*pairs.flatten().tolist()}) == 7 + 5 - 1  # no two n-grams of this test share a vector
    vectors = embedding.ngrams
    torch.testing.assert_close(embedding(ids), embedding.weight[ids] + vectors[pairs] + vectors[triples])
    assert pairs.max() < config.num_ngram_buckets <= triples.min() and triples.max() < 2 * config.num_ngram_buckets


def test_ngrams_look_back_only():
    embedding = TokenEmbedding(262, 4, (3, 6), 1000)
    torch.nn.init.normal_(embedding.ngrams)
    ids = torch.randint(262, (1, 50))
    changed = ids.clone()
    changed[0, 20] = (ids[0, 20] + 1) % 262
    differs = (embedding(ids) != embedding(changed)).any(-1)[0].nonzero().flatten()
    assert differs.tolist() == [20, 21, 22, 23, 24, 25]


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


@pytest.fixture
def one_thread():
    """One thread for a test: with more, small models are several times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_new_modality_takes_three_adapters(one_thread):
    """A model learns to continue a time series of 3 variables. A second model also gets another modality: an image that
    shows the phase of the series."""
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
