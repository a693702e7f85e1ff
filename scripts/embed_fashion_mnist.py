"""Make the embedded Fashion-MNIST file from a folder of the published idx files.

    python scripts/embed_fashion_mnist.py FOLDER [--out FILE]

Writes the first 1,000 test images and labels and logs the hash that advkit/tasks/fashion_mnist.py expects.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import logging
from pathlib import Path

import numpy as np

from advkit.models.checkpoint import write_atomically
from advkit.tasks.fashion_mnist import EMBEDDED, read_pair

DEFAULT = Path(__file__).parent.parent / "advkit" / "tasks" / "data" / "fashion_mnist_test_1000.npz"


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz")
    parser.add_argument("--out", type=Path, default=DEFAULT)
    given = parser.parse_args()
    images, labels = read_pair(given.folder, "test")
    images, labels = images[:EMBEDDED], labels[:EMBEDDED]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=images, labels=labels)
    write_atomically(given.out, buffer.getvalue())
    sha256 = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    size = given.out.stat().st_size
    logging.info("%s: %d rows, %d bytes, EMBEDDED_SHA256 = %s", given.out.name, len(labels), size, sha256)


if __name__ == "__main__":
    main()
