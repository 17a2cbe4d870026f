"""A model of krasserm's perceiver-io 0.11 with random weights, saved by its Hugging Face class, and what it computes.

    pip install --no-deps --ignore-requires-python --target PEER perceiver-io einops fairscale
    python tests/golden/krasserm/peer.py PEER FOLDER '{"vocab_size": 19, "max_seq_len": 24, ...}'

made hf-clm, of CONFIG below. training.npz holds the losses of training that model in float64. A process of its own, as that package is called `perceiver` too. Rows are padded on the
left, at most the whole prefix: its self-attention doesn't mask padding.
"""
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

CONFIG = dict(vocab_size=19, max_seq_len=24, max_latents=8, num_channels=16, num_heads=2, num_self_attention_layers=3,
              num_self_attention_rotary_layers=2, cross_attention_dropout=0.25, output_norm=True)


def main(peer: str, folder: str, config: str = json.dumps(CONFIG)):
    assert transformers.__version__  # imported before its look-alike's directory is on the path
    sys.path.insert(0, peer)
    training = types.ModuleType("perceiver.model.text.clm.lightning")  # it would need pytorch_lightning
    training.LitCausalLanguageModel = None
    sys.modules[training.__name__] = training
    from perceiver.model.text.clm.backend import CausalLanguageModelConfig
    from perceiver.model.text.clm.huggingface import PerceiverCausalLanguageModel, PerceiverCausalLanguageModelConfig

    config = CausalLanguageModelConfig(**json.loads(config))
    model = PerceiverCausalLanguageModel(PerceiverCausalLanguageModelConfig(config)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that all of them matter, and exact in float16
            parameter.normal_(std=0.5 if parameter.ndim == 1 else 1.5 * parameter.shape[1] ** -0.5)
            parameter.copy_(parameter.half())
    model.save_pretrained(folder)
    file = Path(folder) / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)

    prefix_len = config.max_seq_len - config.max_latents
    ids = torch.randint(config.vocab_size, (3, config.max_seq_len))
    pad = torch.arange(config.max_seq_len) < torch.tensor([[0], [prefix_len // 3], [prefix_len]])
    with torch.no_grad():
        logits = model(ids, prefix_len, attention_mask=~pad).logits
        short = model(ids[:, -5:], 2).logits
    np.savez_compressed(Path(folder) / "io.npz", ids=ids, pad=pad, logits=logits, short=short)
    np.savez_compressed(Path(folder) / "training.npz", **train(model.backend_model, config))


def train(model: nn.Module, config, num_steps: int = 20) -> dict:
    """Trains with AdamW and clipping. Returns the sequences of each step, the prefix positions it kept, and the losses.

    A sequence counts up in steps of 1, 2 or 3, modulo the size of the vocabulary.
    """
    model.double().train()
    angles = model.input_adapter.frq_pos_encoding.inv_freq  # krasserm rounds it to float32: here it is exact
    pairs = torch.arange(len(angles), dtype=torch.float64)
    angles.copy_(10_000 ** (-pairs / len(angles)))
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    prefix_len = config.max_seq_len - config.max_latents
    num_kept = prefix_len - int(prefix_len * config.cross_attention_dropout)
    starts = torch.randint(config.vocab_size, (num_steps, 4, 1))
    strides = torch.randint(1, 4, (num_steps, 4, 1))
    ids = (starts + strides * torch.arange(config.max_seq_len + 1)) % config.vocab_size
    kept, losses = [], []
    for step in range(num_steps):
        torch.manual_seed(step)
        kept.append(torch.rand(4, prefix_len).topk(num_kept).indices.sort().values)  # as the model will draw them
        torch.manual_seed(step)
        logits = model(ids[step, :, :-1], prefix_len).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[step, :, prefix_len + 1 :].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"ids": ids, "kept": torch.stack(kept), "losses": losses}


if __name__ == "__main__":
    main(*sys.argv[1:])
