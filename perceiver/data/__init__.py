"""Data: the byte tokenizer, corpora and images, and the order in which examples are read.

What a training step sees is a pure function of (seed, step, index in the global batch). So there is no state to save,
and the number of ranks, workers and micro-batches changes nothing.
"""
from perceiver.data.batches import TrainKeys, collate_padded, eval_loader, train_loader
from perceiver.data.text import (IGNORE, ByteTokenizer, IdTokenizer, TextBlocks, TextDataConfig, TextWindows, Tokens,
                                 load_text)
