"""Compares the time of cached decoding with its floor: the time to read the weights and the cache once.

    PYTHONPATH=. python benchmarks/decode.py [--rounds 9] [--device cpu]

The model is that of configs/clm_wikitext103.yaml, with a context of 4096 tokens. In the column `equal`, all prompts of
a batch have 3500 tokens. In the column `ragged`, they have 3500 tokens on average, and their lengths differ by 8 to 56
tokens. A row of the table with `stride` in its name gives the mean over the 256 tokens from one re-encoding of the
window to the next, so it includes one re-encoding of each sequence. The other rows include none. A round measures the
floor and both columns in turns, each as the best of 5 times. The table has the minimum over the rounds, and for ratios
the median.
"""
import argparse
from datetime import date
from statistics import median

import torch
from compare import machine
from rows import PREFIX, ROWS, make_inputs
from worker import decode_bytes, reading_time, timed

from perceiver.decoding import Decoder
from perceiver.int8 import quantize
from perceiver.model import PerceiverAR, PerceiverARConfig

PROMPT = 3500  # tokens in a prompt, on average
STRIDE = 256  # tokens between two re-encodings
KINDS = [(1, "float32", False), (1, "float32", True), (8, "float32", False), (8, "float32", True),
         (1, "bfloat16", False), (1, "bfloat16", True), (1, "int8", True)]  # batch size, dtype of the weights, compiled


def decoder(model: PerceiverAR, batch_size: int, apart: int, compile: bool) -> Decoder:
    """A decoder of prompts with PROMPT tokens on average, whose lengths are `apart` tokens apart.

    It has encoded the prompts and decoded one token with the cache, so compilation is done.
    """
    middle = apart * (batch_size - 1) // 2
    tokens = make_inputs(ROWS["decode-3500"], "cpu").repeat(2)
    prompts = [tokens[: PROMPT - middle + row * apart].tolist() for row in range(batch_size)]
    result = Decoder(model, prompts, compile=compile)
    for _ in range(2):
        step(result)
    return result


def step(decoder: Decoder) -> None:
    decoder.append(decoder.logits().argmax(-1))


def steps(decoder: Decoder, count: int, device: str) -> float:
    """Seconds per token: the mean over `count` tokens."""
    return timed(lambda: [step(decoder) for _ in range(count)], device) / count


def table_row(name: str, batch_size: int, seconds: list[list[float]], num_bytes: int) -> None:
    """Prints a row. `seconds` has for each round: the floor, a token of equal rows and, if measured, of ragged rows."""
    floor, equal, *ragged = map(min, zip(*seconds))
    cells = [name, f"{1e3 * equal:.2f} ms", f"{batch_size / equal:.0f}", f"{1e3 * floor:.2f} ms",
             f"{num_bytes / floor / 1e9:.0f} GB/s", f"{median(times[1] / times[0] for times in seconds):.2f}"]
    cells += [f"{1e3 * ragged[0]:.2f} ms", f"{median(s[2] / s[1] for s in seconds):.2f}"] if ragged else ["", ""]
    print("|", " | ".join(cells), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    print(f"{date.today()}, {machine(args.device)}, torch {torch.__version__}, {args.rounds} rounds\n")
    print("| decoding | equal | tokens/s | floor | bandwidth | equal / floor | ragged | ragged / equal |")
    print("|---|---|---|---|---|---|---|---|")
    for batch_size, dtype, compile in KINDS:
        torch.manual_seed(0)
        model = PerceiverAR(PerceiverARConfig(vocab_size=262)).to(args.device).eval()
        num_parameters = sum(p.numel() for p in model.parameters())
        if dtype == "int8":
            quantize(model)
        else:
            model.to(getattr(torch, dtype))
        cache_bytes = model.token_embedding.weight.element_size()
        weight_bytes = 1 if dtype == "int8" else cache_bytes
        sides = [decoder(model, batch_size, apart, compile) for apart in ((0, 8) if batch_size > 1 else (0,))]
        num_bytes = decode_bytes(num_parameters, PROMPT, batch_size, weight_bytes, cache_bytes)

        def measure(tokens: int, times: int) -> list[float]:
            return [reading_time(num_bytes, args.device),
                    *(min(steps(side, tokens, args.device) for _ in range(times)) for side in sides)]

        name = f"batch {batch_size}, {dtype}, {'compiled' if compile else 'eager'}"
        table_row(name, batch_size, [measure(1, 5) for _ in range(args.rounds)], num_bytes)
        first_latents = {first_latent for side in sides for _, first_latent in side.cached}
        assert first_latents == {PREFIX[PROMPT]}, "too many rounds"
        if batch_size > 1:
            table_row(f"{name}, stride", batch_size, [measure(STRIDE, 1) for _ in range(2)], num_bytes)


if __name__ == "__main__":
    main()
