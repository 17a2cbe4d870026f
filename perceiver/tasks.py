"""Tasks: what a run is about. The loop in train.py asks the task for everything that depends on the modality.

A task has the dataclasses of its config sections, `ModelConfig` and `DataConfig`, and the methods of `CausalLM` below.
Losses and metrics travel as sums over examples and ranks; the loop divides only at the end, so that neither the number
of ranks nor uneven batches change a result.
"""
import gzip
import lzma
import math

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from perceiver import sampling
from perceiver.config import Config
from perceiver.data import ByteTokenizer, IdTokenizer, TextBlocks, TextDataConfig, TextWindows, load_text
from perceiver.errors import UserError
from perceiver.model import PerceiverAR, PerceiverARConfig


class CausalLM:
    """Perceiver AR on text: predict the next byte (or token id) at each of the last N positions of a window."""
    ModelConfig = PerceiverARConfig
    DataConfig = TextDataConfig
    rate = "tokens_per_s"  # predicted tokens, as counted in `loss`

    def __init__(self, config: Config):
        self.config = config
        self.tokenizer = IdTokenizer() if config.data.holds_ids else ByteTokenizer()
        if isinstance(self.tokenizer, ByteTokenizer) and config.model.vocab_size < ByteTokenizer.vocab_size:
            raise UserError(f"model.vocab_size={config.model.vocab_size} is too small for bytes, "
                            f"which need {ByteTokenizer.vocab_size}")

    def build_model(self) -> PerceiverAR:
        return PerceiverAR(self.config.model)

    def load_data(self) -> tuple[Dataset, Dataset]:
        """The training set, by key (step, index in the global batch), and the validation set."""
        model, data = self.config.model, self.config.data
        train, self.val_tokens = load_text(data)
        for tokens in (train, self.val_tokens) if data.holds_ids else ():
            if tokens.values.max() >= model.vocab_size or tokens.values.min() < 0:
                raise UserError(f"data.path={data.path} holds token {tokens.values.max()}, outside of the vocabulary; "
                                f"model.vocab_size is {model.vocab_size}")
        prefix_length = model.max_seq_len - model.num_latents
        num_kept = prefix_length - int(prefix_length * model.cross_attention_dropout)
        return (TextWindows(train, model.max_seq_len, model.num_latents, num_kept, self.config.train.seed),
                TextBlocks(self.val_tokens, model.max_seq_len, model.num_latents))

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the batch: `loss` in nats and `count`, the number of predicted tokens."""
        labels = batch["labels"]  # (B, N)
        logits = model(batch["input_ids"], labels.shape[1], batch.get("pad_mask"), batch.get("prefix_keep"))
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
        return {"loss": loss, "count": (labels >= 0).sum()}

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        loss = sums["loss"] / sums["count"]
        unit = "byte" if isinstance(self.tokenizer, ByteTokenizer) else "token"
        return {"loss": loss, f"bits_per_{unit}": loss / math.log(2)}

    def show(self, model: PerceiverAR) -> dict[str, str]:
        """Things to look at after an evaluation, by name: a text that continues the start of the validation text."""
        prompt = self.val_tokens[: 32].tolist()
        tokens = sampling.generate(model, [prompt], max_new_tokens=256, temperature=0.8, top_p=0.95)
        return {"sample": self.tokenizer.decode(prompt + [token.item() for token in tokens])}

    def summary(self, metrics: dict[str, float]) -> str | None:
        """A closing line: the result on the validation set beside a yardstick."""
        if "bits_per_byte" not in metrics:
            return None
        text = self.val_tokens.values[1:].tobytes()  # the first byte is never predicted
        gzip_bits, xz_bits = (8 * size / len(text) for size in (len(gzip.compress(text, 9)),
                                                               len(lzma.compress(text, preset=9))))
        return (f"validation: {metrics['bits_per_byte']:.3f} bits per byte; for the same {len(text):,} bytes "
                f"gzip -9 needs {gzip_bits:.3f} and xz -9 {xz_bits:.3f}")


TASKS = {"causal_lm": CausalLM}
