"""Tokenizers beyond bytes: what a `tokenizer.json` of the package `tokenizers` says, and corpora in its tokens."""
import codecs
import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from perceiver.data.text import Tokens, read_bytes, read_tokens, write_tokens
from perceiver.errors import UserError


class JsonTokenizer:
    """Text <-> token ids by BPE, Unigram and what else a tokenizer.json may hold; the interface of ByteTokenizer.

    Special tokens are neither added nor decoded. Raises UserError if `json` is no tokenizer or `tokenizers` is missing.
    """

    def __init__(self, json: str, source: str | Path):
        """`json` is the text of a tokenizer.json, `source` where it comes from, for messages."""
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UserError(f"the tokenizer of {source} needs the package tokenizers: pip install tokenizers") from None
        try:
            self.tokenizer = Tokenizer.from_str(json)
        except Exception as error:  # the package raises nothing more special
            raise UserError(f"{source} holds no tokenizer: {error}") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.json = json
        self.vocab_size = 1 + max(self.tokenizer.get_vocab().values())

    @classmethod
    def read(cls, file: str | Path) -> "JsonTokenizer":
        return cls(read_bytes(Path(file)).decode("utf-8", "replace"), file)

    def encode(self, text: str) -> list[int]:
        """Bytes that are no UTF-8, surrogates in `text`, are U+FFFD to the tokenizer."""
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens)

    def new_stream(self) -> tuple[list[int], list[int]]:
        return [], []  # the last tokens whose text is complete, and those whose text is not

    def stream(self, tokens: list[int], state: tuple[list[int], list[int]], final: bool = False) -> str:
        """The text that is complete with these tokens: what they add to that of the tokens before, because on those it
        depends whether there is a space between. The bytes of an unfinished character wait in `state`."""
        told, waiting = state
        waiting += tokens
        before, text = self.decode(told), self.decode(told + waiting)
        if text.endswith("\ufffd") and not final:
            return ""
        told[:] = (told + waiting)[-16:]
        waiting.clear()
        return text[len(before) :]


def tokenize(corpus: Tokens, tokenizer: JsonTokenizer, cache_dir: Path) -> Tokens:
    """A corpus of bytes in the tokens of `tokenizer`, from a file in `cache_dir` if it has been made before."""
    digest = hashlib.sha256(tokenizer.json.encode())
    digest.update(np.ascontiguousarray(corpus.values))
    file = cache_dir / f"tokens-{digest.hexdigest()[:16]}.npy"
    if not file.exists():
        dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
        ids, parts = [np.empty(0, dtype)], lines(corpus.values)
        with tqdm(desc=f"tokens for {file}", total=len(corpus), unit="B", unit_scale=True) as bar:
            while group := list(islice(parts, 16)):  # encoded in parallel
                ids += [np.array(encoding.ids, dtype)
                        for encoding in tokenizer.tokenizer.encode_batch(group, add_special_tokens=False)]
                bar.update(sum(len(text.encode()) for text in group))
        write_tokens(file, np.concatenate(ids))
    return read_tokens(file, "")


def lines(values: np.ndarray, size: int = 2**18) -> Iterator[str]:
    """A text (n,) of UTF-8 bytes in parts of about `size`, each up to the end of a line if there is one."""
    decoder, start = codecs.getincrementaldecoder("utf-8")("replace"), 0
    while start < len(values):
        block = values[start : start + size].tobytes()
        last = start + size >= len(values)
        end = len(block) if last else block.rfind(b"\n") + 1 or len(block)
        yield decoder.decode(block[:end], final=last)
        start += end
