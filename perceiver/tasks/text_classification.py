"""Classification of text: Perceiver IO on the bytes of labeled texts."""

import csv
import json
import os
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from heapq import nlargest
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from perceiver.data import (
    STDLIB,
    ByteTokenizer,
    LabelledConfig,
    check_unreadable,
    find_source,
    pad_right,
    split_classes,
    stdlib_files,
    visible_places,
)
from perceiver.errors import UserError, reading
from perceiver.io import input_files, progress, read_bytes, read_text, shorten, tell
from perceiver.tasks.classification import Classification, ClassifierConfig, report_classes
from perceiver.tasks.masked_lm import TokenInputConfig, first_text_attention, save_attention

ClassTexts = dict[str, list[bytes]]  # the texts of every class


@dataclass
class TextClassifierConfig(ClassifierConfig):
    input: TokenInputConfig = field(default_factory=TokenInputConfig)


@dataclass
class TextClassificationDataConfig(LabelledConfig):
    dataset: Literal["stdlib", "imdb"] = "stdlib"  # stdlib: which package of this Python holds the code?
    # Your data instead of a dataset: a folder with CLASS/*.txt; a folder with one text file per class and one example
    # per line; or a .csv, .tsv or .jsonl file with one example per row. A folder may also hold train and val (or test),
    # each of which is one of these.
    path: str | None = None
    text_column: str = "text"  # of a .csv, .tsv or .jsonl file
    label_column: str = "label"
    cache_dir: str = "data"  # folder of the datasets; a missing dataset is downloaded to it


class LabelledText(Dataset):
    """Texts, cut to `max_seq_len` bytes, with their classes. Leaves out empty texts."""

    def __init__(self, classes: ClassTexts, max_seq_len: int):
        self.class_names = list(classes)
        self.max_seq_len = max_seq_len
        self.texts, self.labels = [], []
        for label, texts in enumerate(classes.values()):
            cut = [text[:max_seq_len] for text in texts if text]
            self.texts += cut
            self.labels += [label] * len(cut)

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        """input_ids (L,), padded on the right, pad_mask (L,), and label."""
        ids = ByteTokenizer().encode(self.texts[index])
        return pad_right(np.array(ids), self.max_seq_len) | {"label": self.labels[index]}


def load_labelled_text(config: TextClassificationDataConfig, max_seq_len: int):
    """Texts by class for training and for validation, and a line that says where they come from.

    Raises UserError if texts are missing, or if the classes of the two differ.
    """
    source = find_source(config)
    if source == STDLIB:
        train, val, note = split_classes(source, stdlib_packages, config)
        return read_pieces(train, max_seq_len), read_pieces(val, max_seq_len), note
    return split_classes(source, partial(read_classes, config), config)


def read_classes(config, source) -> ClassTexts:
    """Reads a table, a folder with one folder per class, or a folder with one file per class, one example per line."""
    if source.is_file():
        return read_table(config, source)
    places = visible_places(source)
    classes = {}
    for folder in places:
        if folder.is_dir() and folder.name != "unsup":  # IMDb's texts without labels
            classes[folder.name] = [read_bytes(file) for file in sorted(folder.glob("*.txt"))]
    if not classes:
        for file in places:
            name = file.name.removesuffix(".txt")  # keeps names like reviews.pos
            classes[name] = [line for line in read_bytes(file).splitlines() if line.strip()]
    problems = [f"class {name} has no texts" for name, texts in classes.items() if not texts]
    if len(classes) < 2:
        problems.append(f"it has {len(classes)} classes")
    if problems:
        raise UserError(
            f"data.path={source} cannot be used: {problems[0]}. Give a folder with two or more of CLASS/*.txt, a "
            "folder with two or more text files (one per class, one example per line), or a .csv, .tsv or "
            ".jsonl file"
        )
    return classes


def read_table(config, file) -> ClassTexts:
    """Reads a .csv, .tsv or .jsonl file with a column of texts and a column of labels."""
    separators = {".csv": ",", ".tsv": "\t"}
    with reading(file), open(file, encoding="utf-8", errors="surrogateescape", newline="") as lines:
        if file.suffix == ".jsonl":
            rows = [read_row(line) for line in lines if line.strip()]
        elif file.suffix in separators:
            csv.field_size_limit(2**30)
            rows = list(csv.DictReader(lines, delimiter=separators[file.suffix]))
        else:
            raise UserError(f"data.path={file} must be a folder or end in .csv, .tsv or .jsonl")
    classes = defaultdict(list)
    columns = config.text_column, config.label_column
    num_unreadable = 0
    for number, row in enumerate(rows, 1):
        missing = [column for column in columns if row.get(column) is None]
        if missing:
            names = shorten(", ".join(map(str, row)))
            advice = "set data.text_column and data.label_column"
            error = f"{file}: row {number} has no {missing[0]}, only {names}; {advice}"
            if not row:
                error = f"cannot read {file}: row {number} is no JSON object"
            num_unreadable += 1
            check_unreadable(num_unreadable, len(rows), config.max_unreadable, error)
            tell(f"left out: {error}")
            continue
        text, label = (str(row[column]) for column in columns)
        classes[label].append(to_bytes(text))
    if len(classes) < 2:
        raise UserError(f"{file} has {len(classes)} classes in column {config.label_column}; it needs two or more")
    return dict(sorted(classes.items()))


def to_bytes(text):
    """UTF-8, in which surrogates stand for bytes that are not UTF-8. Others, from a .jsonl file, become "?"."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace")


def read_row(line) -> dict:
    """The row in a line of a .jsonl file; empty if there is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def stdlib_packages(folder):
    """The files of the ten largest packages of the standard library, among those with ten files or more.

    The longest files come first, so that `hold_out` picks files of all lengths.
    """
    sizes = {file: file.stat().st_size for file in stdlib_files()}
    packages = defaultdict(list)
    for file in sorted(sizes, key=sizes.get, reverse=True):
        if file.parent != folder:
            packages[file.relative_to(folder).parts[0]].append(file)
    large = {name: files for name, files in packages.items() if len(files) >= 10}
    largest = nlargest(10, large, key=lambda name: sum(map(sizes.get, large[name])))
    return {name: large[name] for name in sorted(largest)}


def read_pieces(classes, max_seq_len) -> ClassTexts:
    """Cuts files into texts of `max_seq_len` bytes. Leaves out a remainder of up to half of that."""
    pieces = defaultdict(list)
    for name, files in classes.items():
        for text in map(read_bytes, files):
            end = max(1, len(text) - max_seq_len // 2)
            pieces[name] += [text[start : start + max_seq_len] for start in range(0, end, max_seq_len)]
    return pieces


class TextClassification(Classification):
    """Perceiver IO on labeled texts, usually with the trained encoder of a masked language model."""

    name = "text_classification"
    ModelConfig = TextClassifierConfig
    DataConfig = TextClassificationDataConfig

    def load_data(self):
        max_seq_len = self.config.model.input.max_seq_len
        train, val, self.data_note = load_labelled_text(self.config.data, max_seq_len)
        return self.prepare(LabelledText(train, max_seq_len), LabelledText(val, max_seq_len))

    def loss(self, model, batch):
        return self.class_sums(model(batch["input_ids"], batch.get("pad_mask")), batch["label"])

    def visualize(self, model):
        return {"attention": first_text_attention(model, self.val_set)}

    def predict(self, model, args):
        """Prints the most likely classes of each text. The model sees only the start of a long one."""
        device = next(model.parameters()).device
        max_seq_len = self.config.model.input.max_seq_len
        for source, name in progress(input_files(args.inputs, ("",), "files"), args.limit):
            text = read_text_or_file(source)
            if not text:
                raise UserError(f"{source} is empty")
            if len(text) > max_seq_len:
                tell(f"{shorten(source)} has {len(text)} bytes; the model sees only the first {max_seq_len}")
            input_ids = torch.tensor(ByteTokenizer().encode(text[:max_seq_len]), device=device)
            written = save_attention(model, input_ids, name, args)
            report_classes(args, source, model(input_ids[None])[0], self.class_names, written)


def read_text_or_file(source: str) -> bytes:
    """The text in the file `source`. "-" is stdin. Several words that name no file are the text itself."""
    if len(source.split()) > 1 and not os.path.exists(source):
        return source.encode("utf-8", "surrogateescape")
    return read_text(source)
