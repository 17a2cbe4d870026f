"""Tasks on text: language models, causal and masked, and classification."""
import gzip
import lzma
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from perceiver import pictures, sampling
from perceiver.architectures import MaskedLMConfig, TextClassifierConfig
from perceiver.config import Config
from perceiver.data import (IGNORE, ByteTokenizer, IdTokenizer, JsonTokenizer, MaskedBlocks, MaskedTextDataConfig,
                            MaskedWindows, TextBlocks, TextClassificationDataConfig, TextDataConfig, TextWindows,
                            load_labelled_text, load_text, tokenize)
from perceiver.errors import UserError
from perceiver.tasks.base import Autoregression, Classification, Task, bits_by_frequency, token_sums


class CausalLM(Autoregression):
    """Perceiver AR on text: predict the next byte, the next token of a tokenizer.json, or the next token id."""
    DataConfig = TextDataConfig

    def __init__(self, config: Config):
        super().__init__(config)
        self.tokenizer = IdTokenizer() if config.data.holds_ids else ByteTokenizer()
        self.unit = "token" if config.data.holds_ids or config.data.tokenizer else "byte"
        if self.unit == "byte" and config.model.vocab_size < ByteTokenizer.vocab_size:
            raise UserError(f"model.vocab_size={config.model.vocab_size} is too small for bytes, "
                            f"which need {ByteTokenizer.vocab_size}")

    def state(self) -> dict:
        return super().state() | {"tokenizer": getattr(self.tokenizer, "json", None)}

    def restore(self, saved: dict) -> None:
        super().restore(saved)
        if saved.get("tokenizer") is not None:
            self.tokenizer = JsonTokenizer(saved["tokenizer"], "the checkpoint")

    def load_data(self) -> tuple[Dataset, Dataset]:
        model, data = self.config.model, self.config.data
        train, self.val_tokens = load_text(data)
        text, first = self.val_tokens.values, 1  # bytes of the first token, which is never predicted
        if data.tokenizer is not None:
            self.tokenizer = JsonTokenizer.read(data.tokenizer)
            if self.tokenizer.vocab_size > model.vocab_size:
                raise UserError(f"model.vocab_size={model.vocab_size} is too small for data.tokenizer="
                                f"{data.tokenizer}, which needs {self.tokenizer.vocab_size}")
            if not data.holds_ids:
                train, self.val_tokens = (tokenize(part, self.tokenizer, Path(data.cache_dir))
                                          for part in (train, self.val_tokens))
                first = len(self.tokenizer.decode(self.val_tokens[:1].tolist()).encode())
        self.val_text = None if data.holds_ids else text[first:].tobytes()
        for tokens in (train, self.val_tokens) if data.holds_ids else ():
            if tokens.values.max() >= model.vocab_size or tokens.values.min() < 0:
                raise UserError(f"data.path={data.path} holds token {tokens.values.max()}, outside of the vocabulary; "
                                f"model.vocab_size is {model.vocab_size}")
        num_kept = model.num_kept(model.max_seq_len - model.num_latents)
        return (TextWindows(train, model.max_seq_len, model.num_latents, num_kept, self.config.train.seed),
                TextBlocks(self.val_tokens, model.max_seq_len, model.num_latents))

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """With a tokenizer, bits per byte are those per token divided by the mean length of the validation text's
        tokens: exact there, an estimate in training. That makes tokenizers comparable."""
        metrics = super().metrics(sums)
        if self.unit == "token" and self.val_text:
            metrics["bits_per_byte"] = metrics["bits_per_token"] * (len(self.val_tokens) - 1) / len(self.val_text)
        return metrics

    def show(self, model: nn.Module) -> dict[str, str]:
        """A text that continues the start of the validation text."""
        prompt = self.val_tokens[:32].tolist()
        tokens = sampling.generate(model, [prompt], max_new_tokens=256, temperature=0.8, top_p=0.95)
        return {"sample": self.tokenizer.decode(prompt + [token.item() for token in tokens])}

    def summary(self, metrics: dict[str, float]) -> str | None:
        if not (text := self.val_text):
            return None
        gzip_bits, xz_bits = (8 * len(packed) / len(text)
                              for packed in (gzip.compress(text, 9), lzma.compress(text, preset=9)))
        return (f"validation: {metrics['bits_per_byte']:.3f} bits per byte; for the same {len(text):,} bytes "
                f"gzip -9 needs {gzip_bits:.3f} and xz -9 {xz_bits:.3f}")


class MaskedLM(Task):
    """Perceiver IO on text: some words are masked, predict their bytes (Perceiver IO, section 4.1)."""
    ModelConfig = MaskedLMConfig
    DataConfig = MaskedTextDataConfig

    def load_data(self) -> tuple[Dataset, Dataset]:
        if self.config.data.holds_ids:
            raise UserError(f"data.path={self.config.data.path} holds token ids; words are masked in text alone")
        length, data = self.config.model.input.max_seq_len, self.config.data
        self.train_tokens, val_tokens = load_text(data)
        self.val_set = MaskedBlocks(val_tokens, length, data.mask_prob)
        return MaskedWindows(self.train_tokens, length, data.mask_prob, self.config.train.seed), self.val_set

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits, labels = model(batch["input_ids"], batch.get("pad_mask")), batch["labels"]  # (B, L, V), (B, L)
        sums = token_sums(logits, labels) | {"correct": (logits.argmax(-1) == labels).sum()}
        sums["masked_loss"] = sums["loss"]
        if model.training and (weight := self.config.data.unmasked_weight):
            unmasked = batch["input_ids"].where(labels == IGNORE, IGNORE)
            sums["loss"] = sums["loss"] + weight * token_sums(logits, unmasked)["loss"]
        return sums

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return super().metrics(sums) | {"bits_per_byte": sums["masked_loss"] / sums["count"] / math.log(2)}

    def show(self, model: nn.Module) -> dict[str, str | Tensor]:
        """The start of the validation text as the model gets it, each masked byte a _, as it fills that in, and a
        picture of where it looks."""
        example = {name: torch.from_numpy(values)[None].to(next(model.parameters()).device)
                   for name, values in self.val_set[0].items()}
        with torch.inference_mode():
            best = model.eval()(example["input_ids"], example["pad_mask"])[..., ByteTokenizer.OFFSET :].argmax(-1)
        model.train()
        ids, tokenizer = example["input_ids"][0, :512], ByteTokenizer()
        masked = ids == tokenizer.MASK
        blanks = torch.full_like(ids, ord("_")) + tokenizer.OFFSET
        filled = best[0, :512] + tokenizer.OFFSET
        texts = {name: tokenizer.decode(torch.where(masked, there, ids).tolist())
                 for name, there in (("masked", blanks), ("filled", filled))}
        return texts | {"attention": first_text_attention(model, self.val_set)}

    def summary(self, metrics: dict[str, float]) -> str:
        """Beside the best that can be done without looking at the text around a byte."""
        frequency_bits = bits_by_frequency(self.train_tokens, self.val_set)
        return (f"validation: {metrics['bits_per_byte']:.3f} bits per masked byte, {metrics['accuracy']:.1%} of them "
                f"right; by the frequencies of bytes it would be {frequency_bits:.3f} bits")


class TextClassification(Classification):
    """Perceiver IO on texts with labels; usually on an encoder that a masked language model trained."""
    ModelConfig = TextClassifierConfig
    DataConfig = TextClassificationDataConfig

    def load_data(self) -> tuple[Dataset, Dataset]:
        return self.share(*load_labelled_text(self.config.data, self.config.model.input.max_seq_len))

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.class_sums(model(batch["input_ids"], batch.get("pad_mask")), batch["label"])

    def show(self, model: nn.Module) -> dict[str, Tensor]:
        """Where the model looks in the first validation text."""
        return {"attention": first_text_attention(model, self.val_set)}


def first_text_attention(model: nn.Module, texts: Dataset) -> Tensor:
    """A picture of where the model looks in the first text, without its padding."""
    example = texts[0]
    return pictures.over_text(model, torch.from_numpy(example["input_ids"][~example["pad_mask"]]))
