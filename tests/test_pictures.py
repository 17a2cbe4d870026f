"""Pictures of attention: its weights are where they belong."""
import pytest
import torch
from PIL import ImageFont

from perceiver import pictures
from perceiver.architectures import ImageClassifierConfig, ImageInputConfig, TextClassifierConfig, TokenInputConfig
from perceiver.data import ByteTokenizer
from perceiver.model import PerceiverDecoderConfig, PerceiverEncoderConfig

SMALL = dict(num_latents=6, num_latent_channels=16, decoder=PerceiverDecoderConfig(1),
             encoder=PerceiverEncoderConfig(1, num_self_attention_heads=2, num_self_attention_layers_per_block=1))
RED = (pictures.RAMP[-1] * 255).round().to(torch.uint8)
encode = ByteTokenizer().encode


def looks_for(model, channel, scale=50.0):
    """Makes all latents look at what is largest in one channel of the adapted inputs."""
    attention = model.encoder.cross_attention[0].attention
    for linear in (attention.q, attention.k):
        torch.nn.init.zeros_(linear.weight)
    torch.nn.init.ones_(attention.q.bias)
    with torch.no_grad():
        attention.k.weight[:, channel] = scale
    return model


def image_model(**kwargs):
    torch.manual_seed(0)
    return ImageClassifierConfig(**SMALL, input=ImageInputConfig(num_frequency_bands=4, **kwargs)).build()


def text_model():
    torch.manual_seed(0)
    return TextClassifierConfig(**SMALL, input=TokenInputConfig(max_seq_len=512, num_input_channels=16)).build()


def reds(picture):
    """Where the picture has the colour of the largest weight: rows and columns."""
    return (picture == RED[:, None, None]).all(0).nonzero().unbind(1)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_bright_pixel_is_where_the_model_looks(channels):
    model = looks_for(image_model(image_shape=(8, 12, channels)), channel=0)
    image = torch.zeros(channels, 8, 12)
    image[:, 5, 9] = 30.0
    picture = pictures.over_image(model, image, (0.5,) * channels, (0.5,) * channels, [4, 1])
    scale = 27  # 12 columns become at least 320
    assert picture.dtype == torch.uint8
    assert picture.shape == (3, 16 + 8 * scale + 30 + 16, 16 + 3 * (12 * scale + 16))
    rows, columns = reds(picture)
    top = 16 + 30 + 5 * scale
    lefts = [16 + tile * (12 * scale + 16) + 9 * scale for tile in (1, 2)]
    assert set(rows.tolist()) == set(range(top, top + scale))
    assert set(columns.tolist()) == {left + x for left in lefts for x in range(scale)}
    elsewhere = picture[:, top + 2 * scale, lefts[0]]
    assert elsewhere.max() - elsewhere.min() <= 2  # grey
    assert torch.equal(picture[:, top, 16 + 9 * scale], torch.tensor([255] * 3, dtype=torch.uint8))  # the input


def test_a_coarse_grid_covers_the_image():
    weights = torch.zeros(1, 2, 4)
    weights[0, 1, 2] = 1.0
    picture = pictures.image_tiles(torch.full((3, 400, 400), 0.5), weights, [0])
    rows, columns = reds(picture)
    assert (rows.min(), rows.max()) == (46 + 200, 46 + 399)
    assert (columns.min(), columns.max()) == (16 + 416 + 200, 16 + 416 + 299)


def test_many_tiles_take_several_rows():
    picture = pictures.image_tiles(torch.zeros(1, 320, 320), torch.ones(9, 4, 4), list(range(9)))
    assert picture.shape == (3, 16 + 2 * 366, 16 + 5 * 336)


def test_the_byte_is_where_the_model_looks():
    model = looks_for(text_model(), channel=3)
    with torch.no_grad():
        model.input_adapter.positions.table.weight.zero_()
        model.input_adapter.features.weight[encode("x"), 3] = 30.0
    picture = pictures.over_text(model, torch.tensor(encode("one two\nfax on")), [0, 5])
    rows, columns = reds(picture)
    font = ImageFont.load_default(22)
    left = 16 + sum(int(-(-font.getlength(letter) // 1)) + 1 for letter in "fa")
    assert columns.min() == left and columns.max() < left + font.getlength("x") + 1
    assert picture.shape[1] == 16 + 2 * (30 + 2 * 32 + 16)
    for top in (16, 16 + 110):  # two blocks, and in each the second line
        inside = (rows >= top) & (rows < top + 110)
        assert rows[inside].min() == top + 30 + 32 and rows[inside].max() < top + 30 + 64


def test_long_texts_are_wrapped_and_every_byte_is_there():
    weights = torch.zeros(1, 400)
    weights[0, 399] = 1.0
    rows, columns = reds(pictures.text_blocks(encode("long " * 80), weights, [0]))
    assert rows.min() > 16 + 30 + 32
    assert pictures.text_blocks(encode("long " * 80), weights, [0]).shape[2] <= 1280


def test_bytes_of_a_character_are_stripes_of_it():
    text = "né".encode() + b"\xff\n\t"
    ids = [*encode(text), ByteTokenizer.MASK]
    assert list(pictures.characters(ids)) == [("n", 1), ("é", 2), ("\ufffd", 1), ("  ", 1), ("    ", 1), ("_", 1)]

    def columns(byte):
        return reds(pictures.text_blocks(ids, torch.eye(len(ids))[[byte]], [0]))[1]
    for byte in range(len(ids) - 2):
        assert columns(byte).max() < columns(byte + 1).min() or byte + 1 == 5  # the tab is on the next line
    assert columns(5).min() == 16


def test_the_most_focused_latents_come_first_and_not_all_look_at_the_same():
    logits = torch.zeros(100, 20)
    logits[70, 3], logits[7, 3], logits[99, 11], logits[0, 5] = 9.0, 8.0, 7.0, 6.0

    class Encoder:
        latents = torch.nn.Embedding(100, 4)

        def attention_map(self, x, latents):
            return logits[latents].softmax(-1)[None, None]

    assert pictures.most_focused(Encoder(), torch.zeros(1, 20, 4)) == [70, 99, 0, 1]  # 1: where all others look
    assert pictures.most_focused(Encoder(), torch.zeros(1, 20, 4), 5)[-1] == 7  # the others, the most focused first


def test_looking_changes_nothing():
    model = image_model(image_shape=(32, 32, 3), features="conv").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    latents, weights = pictures.attention(model, torch.randn(3, 32, 32))
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert len(set(latents)) == 4 and weights.shape == (4, 64)
    torch.testing.assert_close(weights.sum(1), torch.ones(4))
