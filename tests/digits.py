"""Write scikit-learn's digits (8x8 pixels) in MNIST's file format: `python tests/digits.py FOLDER`.

1437 digits are for training, 360 for testing.
"""
import struct
import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits


def write_digits(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    data = load_digits()
    images, order = (data.images * 255 / 16).astype(np.uint8), np.random.default_rng(0).permutation(len(data.images))
    for part, numbers in (("train", order[:1437]), ("t10k", order[1437:])):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">4i", 0x803, len(numbers), 8, 8) + images[numbers].tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 0x801, len(numbers)) + data.target[numbers].astype(np.uint8).tobytes())
    return folder


if __name__ == "__main__":
    write_digits(Path(sys.argv[1]))
