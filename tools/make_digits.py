"""Makes `trajshift/data/digits.npz` from the optical digits bundled with scikit-learn.

    python -m venv /tmp/digits && /tmp/digits/bin/pip install scikit-learn
    /tmp/digits/bin/python tools/make_digits.py

The last fifth of each class, in file order, becomes the test part. Pixels 0..16 are stretched to 0..255.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

TARGET = Path(__file__).parents[1] / "trajshift" / "data" / "digits.npz"


def main() -> None:
    scans = load_digits()
    pixels = np.round(scans.images * (255 / 16)).astype(np.uint8)
    labels = scans.target.astype(np.int64)
    is_test = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        members = np.flatnonzero(labels == digit)
        is_test[members[-(len(members) // 5) :]] = True
    np.savez_compressed(
        TARGET,
        x_train=pixels[~is_test],
        y_train=labels[~is_test],
        x_test=pixels[is_test],
        y_test=labels[is_test],
        class_names=np.array([str(digit) for digit in range(10)]),
    )
    print(f"{TARGET}: {np.sum(~is_test)} training and {np.sum(is_test)} test images")


if __name__ == "__main__":
    main()
