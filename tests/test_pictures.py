"""Pictures: the place and the strength of attention, captions, legends and scales."""
from typing import NamedTuple

import pytest
import torch
from PIL import ImageFont
from torchvision.transforms.v2 import Normalize

from perceiver import pictures
from perceiver.data import ByteTokenizer
from perceiver.model import PerceiverDecoderConfig, PerceiverEncoderConfig
from perceiver.tasks.images import ImageClassifierConfig, ImageInputConfig
from perceiver.tasks.masked_lm import TokenInputConfig
from perceiver.tasks.text_classification import TextClassifierConfig

SMALL = dict(num_latents=6, num_latent_channels=16, decoder=PerceiverDecoderConfig(1),
             encoder=PerceiverEncoderConfig(1, num_self_attention_heads=2, num_self_attention_layers_per_block=1))
RED = pictures.RED.byte()
encode = ByteTokenizer().encode


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture
def captions(monkeypatch):
    """A list that collects the captions of all pictures."""
    found, captioned = [], pictures.captioned

    def spy(tiles, captions, columns):
        found.extend(captions)
        return captioned(tiles, captions, columns)

    monkeypatch.setattr(pictures, "captioned", spy)
    return found


def looks_for(model, channel, scale=50.0):
    """Makes all latents attend to the input with the largest value in one channel of the adapted inputs."""
    attention = model.encoder.cross_attention[0].attention
    for linear in (attention.q, attention.k):
        torch.nn.init.zeros_(linear.weight)
    torch.nn.init.ones_(attention.q.bias)
    attention.k.weight[:, channel] = scale
    return model


def image_model(**kwargs):
    torch.manual_seed(0)
    return ImageClassifierConfig(**SMALL, input=ImageInputConfig(num_frequency_bands=4, **kwargs)).build().eval()


def text_model():
    torch.manual_seed(0)
    return TextClassifierConfig(**SMALL, input=TokenInputConfig(max_seq_len=512, num_input_channels=16)).build().eval()


def where(picture, color):
    """The rows and the columns of the pixels that have this color."""
    return (picture == color[:, None, None]).all(0).nonzero().unbind(1)


def reds(picture):
    """The rows and the columns of the pixels that show attention at full strength."""
    return where(picture, RED)


# ----------------------------------------------------------------------------------------------------------------------
# Attention


@pytest.mark.parametrize("channels", [1, 3])
def test_the_bright_pixel_is_where_the_model_looks(channels, captions):
    model = looks_for(image_model(image_shape=(8, 12, channels)), channel=0)
    image = torch.zeros(channels, 8, 12)
    image[:, 5, 9] = 30.0
    picture = pictures.over_image(model, image, Normalize((0.5,) * channels, (0.5,) * channels), [4, 1])
    scale = 27  # makes 12 columns at least 320 pixels wide
    assert picture.dtype == torch.uint8
    assert picture.shape == (3, 16 + 8 * scale + 30 + 16, 16 + 3 * (12 * scale + 16))
    rows, columns = reds(picture)
    top = 16 + 30 + 5 * scale
    lefts = [16 + tile * (12 * scale + 16) + 9 * scale for tile in (1, 2)]
    assert set(rows.tolist()) == set(range(top, top + scale))
    assert set(columns.tolist()) == {left + x for left in lefts for x in range(scale)}
    elsewhere = picture[:, top + 2 * scale, lefts[0]]
    assert elsewhere.max() - elsewhere.min() <= 2  # gray
    assert torch.equal(picture[:, top, 16 + 9 * scale], torch.tensor([255] * 3, dtype=torch.uint8))  # the input
    assert captions == ["input", "latent 4: at most 96x uniform", "latent 1: at most 96x uniform"]


def test_a_coarse_grid_covers_the_image():
    weights = torch.zeros(8)
    weights[6] = 1.0
    picture = pictures.draw_attention_over_image(torch.full((3, 400, 400), 0.5), {0: weights}, (2, 4))
    rows, columns = reds(picture)
    assert (rows.min(), rows.max()) == (46 + 200, 46 + 399)
    assert (columns.min(), columns.max()) == (16 + 416 + 200, 16 + 416 + 299)


def test_many_tiles_take_several_rows():
    maps = {latent: torch.ones(16) / 16 for latent in range(9)}
    picture = pictures.draw_attention_over_image(torch.zeros(1, 320, 320), maps, (4, 4))
    assert picture.shape == (3, 16 + 2 * 366, 16 + 5 * 336)


def test_attention_is_drawn_relative_to_uniform_attention(captions):
    """Attention of less than 10 times uniform is pale. Uniform attention is invisible."""
    def weights(peak: float) -> torch.Tensor:
        rest = (1 - peak / 100) / 99
        return torch.tensor([peak / 100] + 99 * [rest])

    strengths = [pictures.heat(weights(peak))[0].item() for peak in (0.5, 1, 1.9, 5.5, 10, 50)]
    assert strengths == pytest.approx([0, 0, 0.1, 0.5, 1, 1], abs=1e-4)
    assert pictures.heat(weights(50))[1:].max() == 0
    image = torch.zeros(1, 10, 10)
    pale, strong = (pictures.draw_attention_over_image(image, {0: weights(peak)}, (10, 10)) for peak in (1.9, 50))
    assert len(reds(pale)[0]) == 0 and len(reds(strong)[0]) == 32 * 32
    assert captions == ["input", "latent 0: at most 1.9x uniform", "input", "latent 0: at most 50x uniform"]
    assert pictures.heat(torch.ones(1)).tolist() == [0]  # a single input
    assert pictures.heat(torch.tensor([0.0, 1.0])).tolist() == [0, 1]  # with two inputs, 2 times uniform is the maximum


def test_the_byte_is_where_the_model_looks():
    model = looks_for(text_model(), channel=3)
    model.input_adapter.positions.table.weight.zero_()
    model.input_adapter.features.weight[encode("x"), 3] = 30.0
    picture = pictures.over_text(model, torch.tensor(encode("one two\nfax on")), [0, 5])
    rows, columns = reds(picture)
    font = ImageFont.load_default(22)
    left = 16 + sum(int(-(-font.getlength(letter) // 1)) + 1 for letter in "fa")
    assert columns.min() == left and columns.max() < left + font.getlength("x") + 1
    assert picture.shape[1] == 16 + 2 * (30 + 2 * 32 + 16)
    for top in (16, 16 + 110):  # two tiles; the x is in the second line of each
        inside = (rows >= top) & (rows < top + 110)
        assert rows[inside].min() == top + 30 + 32 and rows[inside].max() < top + 30 + 64


def test_long_texts_are_wrapped_and_every_byte_is_there():
    weights = torch.zeros(400)
    weights[399] = 1.0
    picture = pictures.draw_attention_over_text(encode("long " * 80), {0: weights})
    rows, columns = reds(picture)
    assert rows.min() > 16 + 30 + 32
    assert picture.shape[2] <= 1280


def test_bytes_of_a_character_are_stripes_of_it():
    text = "né".encode() + b"\xff\n\t"
    ids = [*encode(text), ByteTokenizer.MASK]
    assert list(pictures.characters(ids)) == [("n", 1), ("é", 2), ("\ufffd", 1), ("  ", 1), ("    ", 1), ("_", 1)]

    def columns(byte):
        return reds(pictures.draw_attention_over_text(ids, {0: torch.eye(len(ids))[byte]}))[1]
    for byte in range(len(ids) - 2):
        assert columns(byte).max() < columns(byte + 1).min() or byte + 1 == 5  # the tab is on the next line
    assert columns(5).min() == 16


def test_the_most_focused_latents_come_first_and_differ():
    logits = torch.zeros(100, 20)
    logits[70, 3], logits[7, 3], logits[99, 11], logits[0, 5] = 9.0, 8.0, 7.0, 6.0
    weights = logits.softmax(-1)
    assert pictures.most_focused(weights) == [70, 99, 0, 1]  # 1: the first of the uniform latents
    assert pictures.most_focused(weights, 5)[-1] == 7  # then the rest, the most focused first


def test_pictures_of_attention_do_not_change_the_model():
    model = image_model(image_shape=(32, 32, 3), features="conv")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    maps = pictures.attention(model, torch.randn(3, 32, 32))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert len(maps) == 4
    for weights in maps.values():
        assert weights.shape == (64,)
        torch.testing.assert_close(weights.sum(), torch.tensor(1.0))


# ----------------------------------------------------------------------------------------------------------------------
# Images, videos, optical flow, music


def test_small_images_are_enlarged():
    image = torch.tensor([[[0.0, 0.5, 1.0]]])
    for values in (image, (255 * image).byte()):
        assert pictures.enlarge(values, 5).tolist() == [2 * [[0, 0, 127, 127, 255, 255]]]
    assert pictures.enlarge(torch.zeros(2, 3, 9, 9), 5).shape == (2, 3, 9, 9)


def test_rows_of_completions(captions):
    images, samples = torch.full((3, 1, 4, 6), 200).byte(), torch.full((2, 3, 1, 4, 6), 90).byte()
    picture = pictures.completions(images, samples)
    assert captions == ["original", "upper half", "sample 1", "sample 2"]
    assert picture.shape == (3, 16 + 4 * (30 + 64 + 16), 16 + 3 * (96 + 4) + 16)
    assert picture[0, 46::110, 16 + 100].tolist() == [200, 200, 90, 90]
    assert picture[0, 46 + 63 :: 110, 16 + 100].tolist() == [200, 128, 90, 90]


def test_a_contact_sheet_has_at_most_eight_frames_a_row():
    clip = torch.linspace(0, 1, 20)[:, None, None, None].expand(-1, 3, 96, 96)
    sheet = pictures.contact_sheet(clip, 1 - clip)
    row = sheet[0, 4, 4::100]
    assert sheet.shape == (3, 4 + 2 * 100, 4 + len(row) * 100) and 4 < len(row) <= 8
    assert row[0] == 0 and (row[1:] > row[:-1]).all() and sheet[0, 104, 4] == 255


def test_rows_of_flow_tell_their_scale(captions):
    """All pictures of a row have one color scale. The captions give it in pixels."""
    flow = torch.zeros(2, 24, 24, 2)
    flow[0, :, :, 0] = 3.0
    flow[1, :, :, 1] = -0.5
    picture = pictures.flow_rows(torch.zeros(2, 3, 24, 24), flow / 2, flow, titles=("predicted", "true"))
    assert captions == ["frame", "predicted: up to 1.5 pixels", "true: up to 3.0 pixels",
                        "frame", "predicted: up to 0.2 pixels", "true: up to 0.5 pixels"]
    assert picture.shape == (3, 16 + 2 * (30 + 240 + 16), 16 + 3 * (240 + 16))
    colors = picture[:, 100::286, 100::256].int()
    assert (colors[:, :, 0] == 127).all()
    faint, full = 255 - colors[:, :, 1:].amin(0).T
    assert ((full - 2 * faint).abs() <= 3).all() and (faint > 60).all()


class Note(NamedTuple):
    onset: float
    end: float
    pitch: int
    velocity: int


def test_a_piano_roll_has_a_legend_and_an_axis():
    notes = [Note(0.0, 1.0, 60, 127), Note(1.0, 2.0, 64, 127), Note(2.0, 4.0, 62, 127), Note(4.0, 5.0, 62, 1)]
    picture = pictures.piano_roll(notes, num_given=2)
    height = 20 + 9 * 8 + 20  # from two semitones below 60 to two above 64
    assert picture.shape == (3, height, 40 + 5 * 64)

    def hue(second: float, pitch: int) -> tuple[bool, bool]:
        red, _, blue = picture[:, 20 + 8 * (66 - pitch) + 3, 40 + int(64 * second)].int()
        return bool(blue > red + 20), bool(red > blue + 20)

    assert hue(0.5, 60) == hue(1.5, 64) == (True, False)
    assert hue(2.5, 62) == hue(4.5, 62) == (False, True)
    assert hue(2.5, 60) == hue(0.5, 64) == (False, False)
    loud, quiet = (picture[:, 20 + 8 * 4 + 3, 40 + int(64 * second)].float().mean() for second in (2.5, 4.5))
    assert quiet > loud + 30
    legend = picture[:, :18].int()
    assert (legend[2] > legend[0] + 60).any() and (legend[0] > legend[2] + 60).any()
    axis = (picture[:, -18:] < 100).all(0).any(0).nonzero()[:, 0]  # black labels
    labeled = {second for second in range(5) if ((axis >= 40 + 64 * second) & (axis < 60 + 64 * second)).any()}
    assert labeled == {0, 1, 2, 3, 4}


def test_long_pieces_have_few_labels():
    for seconds in (0.2, 3600.0):
        picture = pictures.piano_roll([Note(0.0, seconds, 60, 64)], num_given=0)
        assert 240 <= picture.shape[2] <= 1280
