"""GRATINGS, a data set without files: each image is computed from its index."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

GRATINGS_SIZES = {"train": 6000, "val": 3000}
SIZE = 32  # side of the images in pixels
MAX_KEPT = 10_000  # up to this many images per data set (30 MB) are computed once and kept
_COSINE = np.array([round(256 * math.cos(2 * math.pi * k / 1024)) for k in range(1024)])


class Gratings(Dataset):
    """Color images of gratings in 24 classes: six orientations times four spatial frequencies.

    Phase, colors and contrast are random, orientation and frequency vary around those of the class, and a second,
    weaker grating, a disc and noise distract, so some images are between classes. An image depends only on (split,
    index) and is computed with integers from raw random bits: it is the same on every machine and numpy version.

    Args:
        split: "train" or "val".
        num_images: length of the data set; it does not change the images.
        transform: RGB PIL image -> image of the sample.
    """

    ORIENTATIONS = 6  # over half a turn
    FREQUENCIES = (2.0, 3.0, 4.5, 6.75)  # cycles per image
    JITTER = 0.45  # largest deviation of orientation and frequency, in steps between classes
    DISTRACTOR = 0.9  # largest amplitude of the second grating relative to the first
    NOISE = 90  # largest deviation of the noise in gray levels

    def __init__(self, split: str, num_images: int, transform: Callable | None = None):
        self.split = ("train", "val").index(split)
        self.num_images, self.transform = num_images, transform
        degrees = [180 * o // self.ORIENTATIONS for o in range(self.ORIENTATIONS)]
        self.classes = [f"orientation {o}, frequency {f:g}" for o in degrees for f in self.FREQUENCIES]
        self._y, self._x = np.mgrid[:SIZE, :SIZE]
        self._computed: dict[int, np.ndarray] | None = {} if num_images <= MAX_KEPT else None

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> tuple[Any, int]:
        label = index % len(self.classes)
        if self._computed is None:
            pixels = self.pixels(index, label)
        elif (pixels := self._computed.get(index)) is None:
            pixels = self._computed[index] = self.pixels(index, label)
        image = Image.fromarray(pixels)  # a copy
        return (self.transform(image) if self.transform else image), label

    def pixels(self, index: int, label: int) -> np.ndarray:
        """Return the image as uint8 (32, 32, 3)."""
        bits = np.random.PCG64(np.random.SeedSequence((self.split, index))).random_raw(20 + 3 * SIZE**2 // 4)
        bits = bits.astype("<u8")  # the same byte order on every machine
        u = [int(word) / 2**64 for word in bits[:20]]
        orientation, frequency = divmod(label, len(self.FREQUENCIES))
        wave = self._wave(orientation + self.JITTER * (2 * u[0] - 1), frequency + self.JITTER * (2 * u[1] - 1), u[2])
        other = self._wave(self.ORIENTATIONS * u[3], (len(self.FREQUENCIES) - 1) * u[4], u[5])
        wave = wave * 256 + other * int(256 * self.DISTRACTOR * u[6])
        contrast = 0.15 + 0.25 * u[7]
        direction = np.array([round(255 * contrast * (0.4 + 0.6 * v)) for v in u[8:11]])
        background = np.array([round(70 + 115 * v) for v in u[11:14]])
        image = background + (wave[..., None] * direction >> 16)
        radius = SIZE * (0.08 + 0.12 * u[14])
        disc = (self._x - int(SIZE * u[15])) ** 2 + (self._y - int(SIZE * u[16])) ** 2 < int(radius * radius)
        image[disc] = [round(255 * v) for v in u[17:20]]
        noise = bits[20:].view(np.uint8).reshape(2, SIZE, SIZE, 3).astype(np.int64).sum(axis=0) - 255
        return np.clip(image + (noise * self.NOISE >> 8), 0, 255).astype(np.uint8)

    def _wave(self, orientation, frequency, phase):
        """Return int 256 cos(2 pi (f . x + phase)) on the grid; orientation and frequency in steps between classes."""
        angle = math.pi * orientation / self.ORIENTATIONS
        cycles = self.FREQUENCIES[0] * (self.FREQUENCIES[1] / self.FREQUENCIES[0]) ** frequency
        step_x, step_y = (round(2**16 * cycles * part / SIZE) for part in (math.cos(angle), math.sin(angle)))
        return _COSINE[(self._x * step_x + self._y * step_y + int(2**16 * phase) >> 6) % 1024]
