"""Optical flow: tiles, what the model is by construction, and that it learns."""
import numpy as np
import pytest
import torch
from torch import nn

from conftest import read_metrics, run_script
from perceiver.adapters import FrameFeatures
from perceiver.architectures import FrameInputConfig, OpticalFlowConfig
from perceiver.flow import compute_flow, starts
from perceiver.model import PerceiverDecoderConfig, PerceiverEncoderConfig

TILE = (24, 40)


def small_model(**kwargs) -> nn.Module:
    encoder = PerceiverEncoderConfig(1, num_self_attention_layers_per_block=1, num_self_attention_heads=2)
    decoder = PerceiverDecoderConfig(1, cross_attention_residual=False)
    model = OpticalFlowConfig(6, 16, encoder, decoder, FrameInputConfig(TILE, 8, 3, **kwargs)).build().eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


# ----------------------------------------------------------------------------------------------------------------------
# The model


def test_features_are_a_linear_map_of_the_pixels_around():
    features, frames = FrameFeatures(5, 0.3), torch.randn(2, 2, 3, 6, 7)
    nn.init.normal_(features.linear.bias)
    padded = np.pad(frames.numpy(), ((0, 0), (0, 0), (0, 0), (1, 1), (1, 1)))
    for row, column in ((0, 0), (3, 4), (5, 6), (5, 2)):
        around = padded[:, :, :, row : row + 3, column : column + 3].transpose(0, 1, 3, 4, 2).reshape(2, 54)
        torch.testing.assert_close(features(frames)[:, row, column], features.linear(torch.tensor(around)))
    with pytest.raises(ValueError, match=r"frames of shape \(2, 3, 6, 7\)"):
        features(frames[0])


@torch.inference_mode()
def test_pixels_can_be_asked_for_by_number():
    model, frames = small_model(), torch.randn(2, 2, 3, *TILE)
    flow = model(frames)
    assert flow.shape == (2, *TILE, 2)
    assert (flow.std((1, 2)) > 0.05).all()
    some = torch.tensor([[0, 41, 959], [7, 7, 500]])
    torch.testing.assert_close(model(frames, some)[0], flow[0].flatten(0, 1)[some[0]])
    torch.testing.assert_close(model(frames, some)[1], flow[1].flatten(0, 1)[some[1]])
    torch.testing.assert_close(model(frames, some[0]), flow.flatten(1, 2)[:, some[0]])


def test_nothing_moves_at_first():
    model = OpticalFlowConfig(6, 16, PerceiverEncoderConfig(1), input=FrameInputConfig(TILE)).build()
    assert not model(torch.randn(1, 2, 3, *TILE)).any()
    assert model.output_adapter.linear.weight.requires_grad


@pytest.mark.parametrize("change, message", [
    (dict(decoder=None), "decoder=None"),
    (dict(decoder=PerceiverDecoderConfig(num_query_channels=8)), "decoder.num_query_channels=8 must be null"),
    (dict(encoder=PerceiverEncoderConfig(8)), "does not divide 322")])
def test_mistakes_in_the_config(change, message):
    with pytest.raises(ValueError, match=message):
        OpticalFlowConfig(**dict(encoder=PerceiverEncoderConfig(1)) | change)
    with pytest.raises(ValueError, match="frame_shape=.* must be 2 positive numbers"):
        FrameInputConfig((8, 8, 3))


# ----------------------------------------------------------------------------------------------------------------------
# Tiles


class Fake(nn.Module):
    """Pixels of a tile say where they are in it, and what is there in both frames."""

    def forward(self, frames):
        assert frames.shape[-2:] == TILE
        place = torch.arange(TILE[0] * TILE[1]).reshape(TILE) / 100
        return torch.stack((frames[:, 0, 0] + place, frames[:, 1, 2] - place), dim=-1)


def test_tiles_are_deepminds():
    assert starts(436, 368) == [0, 68] and starts(1024, 496) == [0, 476, 528]  # Sintel
    assert starts(368, 368) == [0]
    assert starts(700, 368) == [0, 332]  # there, the second tile would begin at 348 and leave the image


@pytest.mark.parametrize("size", [(24, 40), (30, 40), (24, 61), (57, 93)])
def test_overlapping_tiles_are_blended(size):
    """As the formula has it: the sum of weight times flow over the sum of weights."""
    frames, tile = torch.randn(2, 3, *size), TILE
    ys, xs = (list(range(0, n, t - 20)) if t > 20 else None for n, t in zip(size, (tile[0] + 8, tile[1])))
    ys = list(range(0, size[0], 12))  # half of a tile where it is that small
    ys, xs = ({min(start, n - t) for start in places} for places, n, t in zip((ys, xs), size, tile))
    total, weights = np.zeros((*size, 2)), np.zeros((*size, 1))
    for y in ys:
        for x in xs:
            flow = Fake()(frames[None, :, :, y : y + tile[0], x : x + tile[1]])[0].numpy()
            for i in range(tile[0]):
                for j in range(tile[1]):
                    weight = min(j + 1, tile[1] - j, i + 1, tile[0] - i)
                    total[y + i, x + j] += weight * flow[i, j]
                    weights[y + i, x + j] += weight
    torch.testing.assert_close(compute_flow(Fake(), frames, tile), torch.tensor(total / weights, dtype=torch.float32))


@torch.inference_mode()
def test_an_image_of_one_tile_is_what_the_model_says():
    model, frames = small_model(), torch.randn(2, 3, *TILE)
    assert torch.equal(compute_flow(model, frames, TILE), model(frames[None])[0])


@pytest.mark.parametrize("size", [(24, 40), (25, 41), (100, 77), (5, 9), (10, 90)])
def test_what_all_tiles_agree_on_stays(size):
    flow = compute_flow(lambda frames: torch.tensor([1.7, -0.3]).expand(1, *TILE, 2), torch.zeros(2, 3, *size), TILE)
    assert flow.shape == (*size, 2) and (flow == torch.tensor([1.7, -0.3])).all()


def test_small_images_are_continued_by_their_edges():
    frames = torch.randn(2, 3, 10, 90)
    larger = torch.cat((frames, frames[:, :, -1:].expand(-1, -1, 14, -1)), dim=2)
    torch.testing.assert_close(compute_flow(Fake(), frames, TILE), compute_flow(Fake(), larger, TILE)[:10])
