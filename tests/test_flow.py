"""Optical flow: tiles, what the model is by construction, and that it learns."""
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from conftest import read_metrics, run_script
from perceiver.adapters import FrameFeatures
from perceiver.architectures import FrameInputConfig, OpticalFlowConfig
from perceiver.config import from_dict
from perceiver.flow import compute_flow, starts
from perceiver.model import PerceiverDecoderConfig, PerceiverEncoderConfig
from perceiver.tasks import OpticalFlow

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
    steps = (12, 20)  # 20 less than a tile, or half of it where it is that small
    ys, xs = ({min(start, n - t) for start in range(0, n, step)} for n, t, step in zip(size, tile, steps))
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


# ----------------------------------------------------------------------------------------------------------------------
# The task


def new_task(**data) -> OpticalFlow:
    model = {"num_latents": 6, "num_latent_channels": 16, "encoder": {"num_cross_attention_heads": 1},
             "decoder": {"num_cross_attention_heads": 1}, "input": {"frame_shape": TILE}}
    return OpticalFlow(from_dict({"task": "optical_flow", "model": model, "data": data}, {"optical_flow": OpticalFlow}))


def batch_of(size: tuple[int, int]) -> dict[str, torch.Tensor]:
    return {"frames": torch.randn(3, 2, 3, *size), "flow": torch.randn(3, *size, 2),
            "valid": torch.rand(3, *size) < 0.6}


@pytest.mark.parametrize("size", [TILE, (30, 61)])
def test_the_loss_is_the_distance_over_known_pixels(size):
    """Of whole images too, whose flow comes from tiles."""
    task, batch = new_task(), batch_of(size)
    metrics = task.metrics({name: value.item() for name, value in task.loss(Fake(), batch).items()})
    predicted = torch.stack([compute_flow(Fake(), frames, TILE) for frames in batch["frames"]])
    distances = (predicted - batch["flow"]).square().sum(-1).sqrt()[batch["valid"]]
    assert metrics["loss"] == metrics["epe"] == pytest.approx(distances.mean().item(), rel=1e-5)
    lengths = batch["flow"].square().sum(-1).sqrt()[batch["valid"]]
    assert metrics["motion"] == pytest.approx(lengths.mean().item(), rel=1e-5)


def test_pixels_at_random_are_a_part_of_all():
    whole, part = (new_task(train_pixels=pixels).load_data()[0][(3, 1)] for pixels in (None, 50))
    assert torch.equal(whole["frames"], part["frames"])
    assert len(part["positions"].unique()) == 50 and part["valid"].shape == (50,)
    assert torch.equal(part["flow"], whole["flow"].flatten(0, 1)[part["positions"]])
    model, task = small_model(), new_task()
    sums = task.loss(model, {name: values[None] for name, values in part.items()})
    error = (model(whole["frames"][None])[0] - whole["flow"]).norm(dim=-1).flatten()[part["positions"]]
    assert sums["count"] == 50 and sums["loss"].item() == pytest.approx(error.sum().item(), rel=1e-4)


def test_flow_is_learned(tmp_path):
    """A little, in a twentieth of the recipe's steps; and what there is to see of it."""
    run, ckpt = tmp_path / "run", tmp_path / "run" / "checkpoints" / "best.pt"
    result = run_script("train.py", "configs/flow.yaml", f"train.out_dir={run}", "train.max_steps=150",
                        "train.eval_every=150", "optim.warmup_steps=30", "data.val_examples=64", "data.num_workers=0")
    assert result.returncode == 0, result.stderr
    last = read_metrics(run, "val")[-1]
    assert last["epe"] < 0.85 * last["motion"]
    assert (f"an end-point error of {last['epe']:.3f} pixels; if nothing moved, it would be {last['motion']:.3f}"
            in result.stdout)
    assert run_script("docs/show.py", ckpt, "flow", tmp_path / "flow.png").returncode == 0
    with Image.open(tmp_path / "flow.png") as picture:  # three columns, four rows, each pixel 5x5
        assert picture.size == (3 * (160 + 8) + 8, 4 * (120 + 8) + 8)
