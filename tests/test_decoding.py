import os
import random
import re
import shutil

import pytest
import torch

from perceiver import decoding
from perceiver.decoding import ENDED, Decoder, UntilStop, generate, new_tokens, sample_token, window_bounds
from perceiver.int8 import quantize
from test_model import GOOGLE, NGRAMS, small_model, tokens

T, N = 24, 8


@pytest.mark.parametrize("stride", [1, 2, 3, 5, 8])
def test_window_bounds_fit_into_the_context(stride):
    previous = (0, 0)
    for length in range(1, 200):
        first_token, first_latent = window_bounds(length, T, N, stride)
        assert 0 <= first_token <= first_latent < length
        assert length - first_latent <= N and length - first_token <= T
        assert first_latent - first_token <= T - N
        if length > N:
            assert length - first_latent > N - stride
        if length > T:
            assert length - first_token > T - stride
        assert first_latent - previous[1] in (0, stride)
        if first_latent == previous[1]:
            assert first_token == previous[0]
        previous = first_token, first_latent


@pytest.mark.parametrize("options", [
    dict(), dict(latent_keys="q_norm"), dict(absolute_positions=False, num_rotary_layers=-1, output_norm=True),
    dict(absolute_positions=False, latent_keys="q_norm", num_self_attention_layers=0, num_rotary_layers=0),
    GOOGLE, NGRAMS,
])
@pytest.mark.parametrize("stride", [1, 3, 4, 8])
@pytest.mark.parametrize("lengths", [[5], [30], [1, 7, 24, 40]])
def test_cached_equals_uncached(options, stride, lengths):
    """Decodes more than three context lengths: prompts of different lengths in a batch, and each prompt alone."""
    model = small_model(**options)
    prompts = [tokens(max(lengths))[:length].tolist() for length in lengths]
    steps = 3 * T + 5
    cached = Decoder(model, prompts, stride)
    uncached = Decoder(model, prompts, stride, kv_cache=False)
    singles = [Decoder(model, [prompt], stride) for prompt in prompts]
    for _ in range(steps):
        logits = cached.logits()
        assert (logits - uncached.logits()).abs().max() < 1e-10
        assert (logits - torch.cat([single.logits() for single in singles])).abs().max() < 1e-10
        best = logits.argmax(-1)
        for decoder, token in ((cached, best), (uncached, best), *zip(singles, best[:, None])):
            decoder.append(token)


@pytest.fixture
def uncompiled(monkeypatch):
    """Makes `compile=True` use the static cache without torch.compile."""
    monkeypatch.setattr(decoding, "compiled_step", lambda device: decoding.decode_step)


@pytest.mark.parametrize("options", [dict(), dict(latent_keys="q_norm"), GOOGLE, NGRAMS])
@pytest.mark.parametrize("lengths", [[5], [1, 7, 24, 40]])
@pytest.mark.parametrize("int8", [False, True])
def test_the_step_that_is_compiled_equals_the_uncached_model(uncompiled, options, lengths, int8):
    model = small_model(**options)
    if int8:
        quantize(model)
    check_compiled(model, [tokens(length).tolist() for length in lengths], 2 * T)


def check_compiled(model, prompts, steps) -> Decoder:
    static, uncached = (Decoder(model, prompts, compile=compile, kv_cache=compile) for compile in (True, False))
    for _ in range(steps):
        logits = uncached.logits()
        assert (static.logits() - logits).abs().max() < 1e-10
        for decoder in (static, uncached):
            decoder.append(logits.argmax(-1))
    return static


def test_a_compiled_step_reads_few_numbers_of_keys(uncompiled):
    """It reads 512 keys, then 1024, then all 1500. Each number needs its own graph, which takes seconds to compile."""
    decoder = Decoder(small_model(max_seq_len=1500), [tokens(505).tolist()], compile=True)
    numbers = []

    def record(model, tokens, step):
        numbers.append(step.cross_attention.num_read)
        return decoding.decode_step(model, tokens, step)

    decoder.decode_step = record
    for _ in range(1_000):
        decoder.append(decoder.logits().argmax(-1))
    assert list(dict.fromkeys(numbers)) == [512, 1024, 1500]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler")
def test_a_compiled_step_is_compiled_once():
    """One graph serves sequences of different lengths, and also a second model of the same shape."""
    for seed in (0, 1):
        model = small_model(num_self_attention_layers=1, num_rotary_layers=1)
        with torch.no_grad():
            model.token_embedding.weight.mul_(1 + seed)
        torch._dynamo.utils.counters.clear()
        check_compiled(model, [tokens(length).tolist() for length in (3, 9)], 2 * T)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 - seed


def test_int8_weights_are_the_nearest_multiples_of_a_scale():
    model = small_model(**GOOGLE)
    weights = {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    weights["cross_attention.attention.q"].data[3] = 0.0  # a row of zeros has no scale
    exact = model(tokens(2, 20))
    quantize(model)
    assert len(weights) == 6 * (1 + model.config.num_self_attention_layers) + 1
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        error = (layer.weight - weight).abs()
        assert (error <= weight.abs().amax(1, keepdim=True) / 127 * 0.5001).all() and error.max() > 0
        row = torch.randn(1, weight.shape[1]).double()
        assert (layer(row) - layer(row.expand(2, -1))[:1]).abs().max() < 1e-12
    assert 0 < (model(tokens(2, 20)) - exact).std() < 0.1 * exact.std()


@pytest.mark.parametrize("compile", [False, True])
def test_bfloat16_is_as_exact_with_a_cache_as_without(uncompiled, compile):
    exact, model = small_model(init_scale=0.1), small_model(init_scale=0.1).bfloat16()
    prompts = [tokens(length).tolist() for length in (5, 30)]
    decoders = [Decoder(exact, prompts), Decoder(model, prompts, kv_cache=False),
                Decoder(model, prompts, compile=compile)]
    assert decoders[2].cache.cross_attention[0].dtype == torch.bfloat16
    errors = []
    for _ in range(40):
        expected, *rounded = (decoder.logits() for decoder in decoders)
        errors.append([(logits - expected).square().mean() for logits in rounded])
        for decoder in decoders:
            decoder.append(expected.argmax(-1))
    uncached, cached = torch.tensor(errors).mean(0).sqrt()
    assert 0 < cached < 1.2 * uncached


def test_with_stride_one_all_latents_are_used_at_every_step():
    model = small_model()
    decoder = Decoder(model, [tokens(40).tolist()], stride=1)
    for _ in range(10):
        window = torch.tensor(decoder.sequences)[:, -T:]
        logits = decoder.logits()
        assert (logits - model(window, N)[:, -1]).abs().max() < 1e-10
        decoder.append(logits.argmax(-1))


def test_greedy_text_is_the_same_with_and_without_cache():
    model = small_model().float()
    for length in (1, N - 1, N, N + 1, T, 3 * T):
        prompts = [tokens(length).tolist()] * 4
        texts = [torch.stack(list(generate(model, prompts, 3 * T, temperature=0, kv_cache=cache)))
                 for cache in (True, False)]
        assert torch.equal(*texts)


def test_there_are_never_more_than_n_latents():
    model = small_model()
    seen = []
    model.cross_attention.q_norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    list(generate(model, [tokens(40).tolist()], 3 * T, kv_cache=False))
    assert max(seen) == N and min(seen) > N // 2


def test_a_cached_step_computes_one_token():
    model = small_model()
    decoder = Decoder(model, [tokens(17).tolist()])
    decoder.append(decoder.logits().argmax(-1))
    seen = []
    model.token_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    decoder.logits()
    assert seen == [1]


def test_a_sample_does_not_depend_on_its_batch():
    model = small_model()
    prompts = [tokens(n).tolist() for n in (3, 12, 30)]
    together = torch.stack(list(generate(model, prompts, 40, seed=5)), dim=1)
    for row, prompt in enumerate(prompts):
        alone = torch.stack(list(generate(model, [prompt], 40, seed=5 + row)), dim=1)
        assert torch.equal(together[row], alone[0])
    assert not torch.equal(together, torch.stack(list(generate(model, prompts, 40, seed=9)), dim=1))


def test_continuing_a_text_in_two_calls_is_one_call():
    model = small_model()
    prompt = tokens(10).tolist()
    whole = [t.item() for t in generate(model, [prompt], 50, temperature=0)]
    first = [t.item() for t in generate(model, [prompt], 20, temperature=0)]
    assert whole == first + [t.item() for t in generate(model, [prompt + first], 30, temperature=0)]


@pytest.mark.parametrize("options", [dict(), dict(compile=True), dict(kv_cache=False), dict(stride=1)])
def test_rows_end_one_by_one_and_the_others_do_not_change(uncompiled, options):
    """Rows end after 3, 20 and up to 61 tokens: before and after moves of the window, and a fourth row."""
    model = small_model()
    prompts = [tokens(length).tolist() for length in (5, 30, 9, 2)]

    def rows(count, stop=()):
        steps = list(generate(model, prompts[:count], 80, 20.0, seed=3, stop=stop, **options))
        return torch.stack(steps, dim=1).tolist()

    free = rows(4)
    stop = [row[end - 3 : end] for row, end in zip(free, (3, 20, 61))]
    ends = [min(at for at in range(3, 81) if row[at - 3 : at] in stop or at == 80) for row in free]
    assert ends[:2] == [3, 20] and 30 < ends[2] <= 61
    ended = rows(4, stop)
    assert len(ended[0]) == max(ends)
    for row, end, unended in zip(ended, ends, free):
        assert row[:end] == unended[:end] and set(row[end:]) <= {ENDED}
    assert new_tokens(torch.tensor(ended).T, stop) == [row[: end - 3] for row, end in zip(free, ends)]
    assert len(rows(1, stop)[0]) == 3


def test_a_stop_sequence_does_not_begin_in_the_prompt():
    model = small_model()
    (first,) = generate(model, [[1, 2]], 1, temperature=0)
    stop = [[2, first.item()]]
    assert len(list(generate(model, [[1, 2]], 9, temperature=0, stop=stop))) > 1
    with pytest.raises(ValueError, match="stop"):
        generate(model, [[1]], 5, stop=[[]])


@pytest.mark.parametrize("as_list", [False, True])
def test_text_ends_at_the_first_stop_sequence_however_it_arrives(as_list):
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choices("abc", k=rng.randrange(12)))
        stop = ["".join(rng.choices("abc", k=rng.randrange(1, 5))) for _ in range(rng.randrange(3))]
        found = re.search("|".join(map(re.escape, stop)), text) if stop else None
        expected = text[: found.start()] if found else text
        convert = list if as_list else str
        until = UntilStop([convert(sequence) for sequence in stop])
        shown = convert()
        while text:
            size = rng.randrange(1, 4)
            shown += until.push(convert(text[:size]))
            assert list(expected[: len(shown)]) == list(shown)  # nothing is shown that must be taken back
            text = text[size:]
        shown += until.push(convert(), final=True)
        assert list(shown) == list(expected) and until.ended == bool(found)


def draw(logits, temperature=1.0, top_k=None, top_p=None, count=20_000):
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0))
    chosen = sample_token(logits.expand(count, -1), uniform, temperature, top_k, top_p)
    return torch.bincount(chosen, minlength=logits.shape[-1]) / count


def test_tokens_come_with_their_probabilities():
    logits = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0])
    for temperature in (0.5, 1.0, 2.0):
        assert (draw(logits, temperature) - (logits / temperature).softmax(0)).abs().max() < 0.015
    top_2 = torch.tensor([-torch.inf, 2.0, -torch.inf, 1.0, -torch.inf]).softmax(0)
    assert (draw(logits, top_k=2) - top_2).abs().max() < 0.015
    probs = logits.softmax(0)  # 0.13, 0.56, 0.03, 0.21, 0.08: tokens 1 and 3 together exceed 0.75
    assert (draw(logits, top_p=0.75) - top_2).abs().max() < 0.015
    assert draw(logits, top_p=probs.max().item() / 2)[1] == 1
    assert draw(logits, temperature=0)[1] == 1


@pytest.mark.parametrize("options", [dict(temperature=-1), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.5),
                                     dict(stride=0), dict(stride=9)])
def test_impossible_options_are_errors_at_once(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        generate(small_model(), [[1]], 5, **options)


@pytest.mark.parametrize("prompts", [[], [[]], [[19]], [[-1]]])
def test_impossible_prompts_are_errors_at_once(prompts):
    with pytest.raises(ValueError, match="prompt"):
        generate(small_model(), prompts, 5)


def test_a_model_in_training_mode_is_an_error_at_once():
    with pytest.raises(ValueError, match="eval"):
        generate(small_model().train(), [[1]], 5)


def test_a_step_says_where_keys_go():
    """Two rows have 3 and 5 tokens, all of them latents. Their next tokens get positions 3 and 5."""
    cache = decoding.KVCache(small_model(), 2)
    step = cache.advance([(4, 4), (6, 6)])
    assert step.positions.tolist() == [[3], [5]]
    for layer in (step.cross_attention, *step.self_attention):
        assert layer.num_read == 6 and layer.at[1].tolist() == [[3], [5]]
        assert layer.bias.isfinite().sum(-1).tolist() == [[4], [6]]
    equal = cache.advance([(4, 4), (4, 4)]).cross_attention
    assert equal.bias is None and equal.num_read == 4
