"""The copy task of Perceiver AR: a test of how far a model can look back, to the token."""
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from perceiver import sampling
from perceiver.config import Config
from perceiver.data import IdTokenizer
from perceiver.data.copy import VOCAB_SIZE, CopyBlocks, CopyDataConfig, CopyWindows
from perceiver.errors import UserError
from perceiver.tasks.base import Autoregression


class Copy(Autoregression):
    """Perceiver AR on sequences of max_seq_len tokens, whose second half is the first one backwards."""
    DataConfig = CopyDataConfig

    def __init__(self, config: Config):
        super().__init__(config)
        self.tokenizer = IdTokenizer()
        model, min_crop = config.model, config.data.min_crop
        if model.max_seq_len % 2 or model.num_latents >= model.max_seq_len:
            raise UserError(f"model.max_seq_len={model.max_seq_len} must be even, and more than model.num_latents="
                            f"{model.num_latents}")
        if min_crop is not None and not model.num_latents <= min_crop < model.max_seq_len:
            raise UserError(f"data.min_crop={min_crop} must be at least model.num_latents={model.num_latents}, "
                            f"and less than model.max_seq_len={model.max_seq_len}")
        if model.vocab_size < VOCAB_SIZE:
            raise UserError(f"model.vocab_size={model.vocab_size} must be at least {VOCAB_SIZE} for this task")

    def load_data(self) -> tuple[Dataset, Dataset]:
        c, data = self.config.model, self.config.data
        min_crop = c.num_latents if data.min_crop is None else data.min_crop
        self.val_set = CopyBlocks(c.max_seq_len, c.num_latents, data.num_val_sequences)
        train_set = CopyWindows(c.max_seq_len, c.num_latents, min_crop, self.config.train.seed, data.grow_steps)
        return train_set, self.val_set

    def sums(self, logits: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        correct = (logits.argmax(-1) == batch["labels"]) & batch["mirrored"]
        return super().sums(logits, batch) | {"correct": correct.sum(), "mirrored": batch["mirrored"].sum()}

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """`accuracy` is of the second half alone; `loss` and bits too in validation, whose labels are all of it."""
        accuracy = {"accuracy": sums["correct"] / sums["mirrored"]} if sums["mirrored"] else {}
        return super().metrics(sums) | accuracy

    def show(self, model: nn.Module) -> dict[str, str]:
        """The first tokens of a second half, and what the model makes of the first half."""
        sequence = self.val_set.sequence(0)
        half = len(sequence) // 2
        right = sequence[half : half + 16]
        tokens = sampling.generate(model, [sequence[:half].tolist()], max_new_tokens=len(right), temperature=0)
        copied = torch.cat(list(tokens)).tolist()
        return {"right": self.tokenizer.decode(right), "copied": self.tokenizer.decode(copied)}

    def summary(self, metrics: dict[str, float]) -> str:
        return (f"validation: {metrics['accuracy']:.2%} of the tokens of second halves right; "
                f"by chance it would be {1 / 256:.2%}")
