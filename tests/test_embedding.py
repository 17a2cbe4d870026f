"""docs/embedding.md: the encoder as a part of another model."""
import pytest
import torch

from conftest import ROOT
from perceiver.model import PerceiverEncoder, PerceiverEncoderConfig
from test_docs import blocks


@pytest.fixture
def page():
    """The names that the page defines."""
    torch.manual_seed(0)
    names = {}
    for code in blocks(ROOT / "docs/embedding.md", "python"):
        exec(code, names)
    return names


def test_the_model_of_the_page(page):
    """Its size, its gradients, and the same results without padding."""
    lines = blocks(ROOT / "docs/embedding.md", "python")[0].splitlines()
    body = [line for line in lines[lines.index("class EventModel(nn.Module):"):] if line.strip()]
    assert len(body) <= 20
    model, events, times = page["model"], page["events"], page["times"]
    assert model.encoder.latents is None and all(parameter.grad is not None for parameter in model.parameters())
    assert page["values"].shape == (2, 5, 3) and page["visual_tokens"].shape == (2, 16, 128)
    alone = model(events[1:, :7], times[1:, :7], None, page["query_times"][1:])
    torch.testing.assert_close(page["values"][1:], alone)
    assert not torch.allclose(alone, model(events[1:], times[1:], None, page["query_times"][1:]), atol=1e-4)


def test_gradients_through_inputs_and_latents():
    """By finite differences, in float64, with padding. Padding has no gradient."""
    torch.manual_seed(0)
    config = PerceiverEncoderConfig(num_cross_attention_heads=1, num_self_attention_heads=2, init_scale=0.5,
                                    num_cross_attention_layers=2, num_self_attention_blocks=2,
                                    num_self_attention_layers_per_block=1)
    encoder = PerceiverEncoder(config, None, 4, 3).double()
    x = torch.randn(2, 6, 3, dtype=torch.double, requires_grad=True)
    latents = torch.randn(2, 2, 4, dtype=torch.double, requires_grad=True)
    pad_mask = torch.arange(6) >= torch.tensor([[6], [4]])
    assert torch.autograd.gradcheck(lambda x, latents: encoder(x, pad_mask, latents), (x, latents))
    encoder(x, pad_mask, latents).square().sum().backward()
    assert x.grad[0].abs().min() > 0 and x.grad[1, :4].abs().min() > 0 and not x.grad[1, 4:].any()


def test_given_latents_replace_the_learned_ones():
    encoder = PerceiverEncoder(PerceiverEncoderConfig(num_cross_attention_heads=1), 5, 16, 8)
    x = torch.randn(2, 30, 8)
    given = encoder.latents.weight.expand(2, -1, -1)
    assert torch.equal(encoder(x), encoder(x, latents=given))
    assert encoder(x, latents=torch.randn(2, 9, 16)).shape == (2, 9, 16)
    assert not torch.allclose(encoder(x), encoder(x, latents=given + 1))
