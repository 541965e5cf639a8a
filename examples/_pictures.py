"""Handwritten digits as 28 x 28 pictures: scikit-learn's, made larger, or MNIST from a file, folder or torchvision."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE, CLASSES = 28, 10
PIXELS = SIDE * SIDE
DATA_HELP = (
    "MNIST: an .npz file (x_train, y_train, x_test, y_test), or a folder of IDX files; torchvision fills an empty one. "
    "Default: the 1,797 digits that scikit-learn brings, made larger"
)


class Pictures(NamedTuple):
    """images (B, 784) from 0 to 1, labels (B,)."""

    images: Tensor
    labels: Tensor

    def of(self, digit: int) -> Pictures:
        """Those that show ``digit``."""
        shown = self.labels == digit
        return Pictures(self.images[shown], self.labels[shown])

    def batch(self, index: Tensor) -> Pictures:
        return Pictures(self.images[index], self.labels[index])


def load(source: Path | None, seed: int, device: str | torch.device = "cpu") -> tuple[Pictures, Pictures]:
    """(to train on, to test with)

    Raises:
        ValueError: ``source`` holds no MNIST, a part of it, or broken files, and torchvision is not there to fetch it.
        OSError: it cannot be read.
    """
    if source is None:
        parts = _small_digits(seed)
    else:
        try:
            parts = _npz(source) if source.suffix == ".npz" else _folder(source)
        except (EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{source} is broken or cut short: {error}") from error
        _check(parts, source)
    images, labels, test_images, test_labels = (part.to(device) for part in parts)
    return Pictures(images, labels), Pictures(test_images, test_labels)


def _small_digits(seed: int) -> list[Tensor]:
    """The 8 x 8 digits of scikit-learn, a quarter of each digit held out by ``seed``."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    small, small_test, labels, test_labels = train_test_split(
        images, labels, test_size=0.25, stratify=labels, random_state=seed
    )
    large = []
    for part in (small, small_test):
        pixels = torch.tensor(part / 16, dtype=torch.float32).view(-1, 1, 8, 8)
        large.append(F.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear").flatten(1))
    return [large[0], torch.tensor(labels), large[1], torch.tensor(test_labels)]


def _check(parts: list[Tensor], source: Path) -> None:
    for what, images, labels in (("train", *parts[:2]), ("test", *parts[2:])):
        if images.shape[1:] != (PIXELS,) or labels.shape != images.shape[:1] or not len(labels):
            raise ValueError(
                f"{source}, to {what}: {SIDE} x {SIDE} pixels and a label for each picture are needed, "
                f"not {tuple(images.shape)} pixels and {tuple(labels.shape)} labels"
            )
        if not 0 <= labels.min() <= labels.max() < CLASSES:
            raise ValueError(
                f"{source}, to {what}: labels are 0 to {CLASSES - 1}, not {int(labels.min())} to {int(labels.max())}"
            )


def _npz(path: Path) -> list[Tensor]:
    import numpy as np

    with zipfile.ZipFile(path), np.load(path) as file:  # np.load alone takes other kinds of file for an array
        missing = [name for name in ("x_train", "y_train", "x_test", "y_test") if name not in file]
        if missing:
            raise ValueError(f"{path} has no {', '.join(missing)}: it must be MNIST as Keras stores it")
        arrays = [torch.from_numpy(file[name]) for name in ("x_train", "y_train", "x_test", "y_test")]
    return [_normalised(arrays[0]), arrays[1].long(), _normalised(arrays[2]), arrays[3].long()]


def _folder(folder: Path) -> list[Tensor]:
    names = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    found = [_idx_file(folder, name) for name in names]
    if not all(found):
        try:
            from torchvision.datasets import MNIST
        except ImportError:
            raise ValueError(
                f"{folder} does not hold {', '.join(names)}; pip install torchvision to fetch them"
            ) from None
        try:
            MNIST(str(folder), download=True)
        except RuntimeError as error:
            raise ValueError(f"torchvision could not fetch MNIST into {folder}: {error}") from error
        found = [_idx_file(folder, name) for name in names]
    arrays = [_read_idx(path) for path in found if path is not None]
    return [_normalised(arrays[0]), arrays[1].long(), _normalised(arrays[2]), arrays[3].long()]


def _idx_file(folder: Path, name: str) -> Path | None:
    # The second folder is where torchvision puts them.
    places = [place / f"{name}{packed}" for place in (folder, folder / "MNIST" / "raw") for packed in ("", ".gz")]
    return next((place for place in places if place.is_file()), None)


def _read_idx(path: Path) -> Tensor:
    """The format MNIST is published in: two zero bytes, type 8, the number of sizes, the sizes, the bytes."""
    data = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read()
    dimensions = data[3] if data[:3] == b"\x00\x00\x08" else 0
    sizes = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    start = 4 + 4 * dimensions
    if not dimensions or len(data) - start != torch.Size(sizes).numel():
        raise ValueError(f"{path} is not an IDX file of bytes")
    return torch.frombuffer(bytearray(data[start:]), dtype=torch.uint8).view(sizes)


def _normalised(images: Tensor) -> Tensor:
    """(B, 28, 28) bytes as (B, 784) from 0 to 1."""
    if images.dim() < 2:
        raise ValueError(f"pictures of {SIDE} x {SIDE} pixels are needed, got a tensor of shape {tuple(images.shape)}")
    return images.flatten(1).float() / 255
