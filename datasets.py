"""Data sets, their transforms, and the embedded data set GRATINGS.

Every data set hands out (image, label): uint8 pixels (3, H, W) and an int. Batches stay uint8 until `Prepare` has them
on the device, which is a quarter of the float traffic.
"""

import json
import math
import random
from multiprocessing import Array
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.loader import fast_collate
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybePILToTensor, str_to_interp_mode
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling
from torchvision import transforms
from torchvision.datasets import CIFAR100, ImageFolder

from utils import log

DATA_SETS = ("IMNET", "CIFAR", "INAT", "INAT19", "GRATINGS")
INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")
SMALL_IMAGE = 32  # DeiT's rule: at this size or less, crops are of the whole image with a border of 4 pixels


def build_dataset(name, split, path, transform=None, *, inat_category="name", num_images=None):
    """Builds one split of a data set.

    Args:
        name: one of DATA_SETS.
        split: "train" or "val".
        path: folder of the data; not used by GRATINGS.
        transform: PIL image -> anything.
        inat_category: taxonomic level that is the class (INAT, INAT19).
        num_images: size of the split (GRATINGS), or None for its default.

    Returns:
        A map-style Dataset of (transform(image), label) with `classes`, the list of class names.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: with one line that says what was expected, and where.
    """
    if name == "GRATINGS":
        return Gratings(split, num_images or GRATINGS_SIZES[split], transform=transform)
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"--data-path {path} is not a folder")
    if name == "CIFAR":
        try:
            return CIFAR100(root, train=split == "train", transform=transform)
        except RuntimeError:  # its own message proposes an argument of Python's
            raise RuntimeError(
                f"CIFAR-100 not found or damaged under --data-path {path}: unpack cifar-100-python.tar.gz there"
            ) from None
    if name in ("INAT", "INAT19"):
        return INaturalist(root, split, 2018 if name == "INAT" else 2019, inat_category, transform)
    folder = root / split
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: --data-path needs train/ and val/, a folder a class in each")
    return ImageFolder(folder, transform=transform, loader=LastImage())


class LastImage:
    """An image loader (path -> RGB PIL image) that keeps the last image it decoded.

    Repeated augmentation puts the copies of an image side by side, so that one process asks for the same file up to
    three times in a row. Transforms never write into their input, so the pixels are those of a fresh decode.
    """

    def __init__(self):
        self.path, self.image = None, None

    def __call__(self, path):
        if path != self.path:
            try:
                self.path, self.image = path, _decode(path)
            except Exception as error:
                raise BadImageError(f"cannot read image {path}: {error}") from None
        return self.image


def _decode(path):
    """The pixels of torchvision's default loader, which copies an image that is RGB already."""
    with Image.open(path) as image:
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")


class BadImageError(RuntimeError):
    """A file that is no readable image."""


class INaturalist(ImageFolder):
    """iNaturalist 2018 or 2019 as DeiT lays it out: train<year>.json, val<year>.json, categories.json and the images.

    The class of an image is its category's entry at the level `category`, numbered in the order in which the levels
    first appear among the training annotations. Images lie under <folder>/<category id>/ (DeiT) or where their
    file name says.
    """

    def __init__(self, root, split, year, category, transform=None):
        if category not in INAT_CATEGORIES:
            raise ValueError(f"--inat-category {category} is not one of {', '.join(INAT_CATEGORIES)}")
        categories = _read_json(root / "categories.json")
        if not all(category in c for c in categories):
            levels = [level for level in INAT_CATEGORIES if all(level in c for c in categories)]
            raise ValueError(
                f"--inat-category {category} is not in {root / 'categories.json'}: it has {', '.join(levels)}"
            )
        level_of = {int(c.get("id", i)): c[category] for i, c in enumerate(categories)}
        train = _read_json(root / f"train{year}.json")
        order = dict.fromkeys(level_of[int(a["category_id"])] for a in train["annotations"])
        self.classes = [str(level) for level in order]
        number = {level: i for i, level in enumerate(order)}
        images = train if split == "train" else _read_json(root / f"{split}{year}.json")
        self.samples = []
        for image in images["images"]:
            folder, *_, category_id, file = image["file_name"].split("/")
            deit = root / folder / category_id / file
            path = deit if deit.exists() else root / image["file_name"]
            label = number.get(level_of.get(int(category_id)))
            if label is None:
                raise ValueError(f"the {category} of {image['file_name']} is not among those of train{year}.json")
            self.samples.append((str(path), label))
        self.transform, self.target_transform, self.loader = transform, None, LastImage()


def _read_json(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: INAT needs categories.json, train<year>.json, val<year>.json")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None


def keeps_whole(input_size, three_augment) -> bool:
    """Whether a training crop is of the whole image with a border, as for CIFAR, and not of a random part of it."""
    return input_size <= SMALL_IMAGE and not three_augment


def train_transform(
    input_size,
    *,
    aa=None,
    color_jitter=None,
    interpolation="bicubic",
    hflip=0.5,
    three_augment=False,
    simple_crop=False,
):
    """DeiT's training transform up to uint8 pixels; normalisation and random erasing follow on the device.

    Args:
        input_size: side of the square image, pixels.
        aa: timm's name of an automatic augmentation ("rand-m9-mstd0.5-inc1"), or None.
        color_jitter: strength, or None. timm leaves it out where `aa` is RandAugment or AutoAugment, as in DeiT.
        interpolation: "bicubic", "bilinear" or "random".
        hflip: probability of a horizontal flip.
        three_augment: DeiT III's augmentation (arXiv 2204.07118): one of grey scale, solarisation and blur, and colour
            jitter, instead of `aa`.
        simple_crop: DeiT III's crop: resize, then a random crop with 4 pixels of reflected border.
    """
    transform = create_transform(
        input_size,
        is_training=True,
        hflip=hflip,
        color_jitter=color_jitter,
        auto_augment="3a" if three_augment else aa,
        interpolation=interpolation,
        use_prefetcher=True,  # leaves uint8 pixels
    )
    if keeps_whole(input_size, three_augment):
        transform.transforms[0] = _resized_random_crop(input_size, interpolation, "constant")
    elif simple_crop:
        transform.transforms[0] = _resized_random_crop(input_size, interpolation)
    return transform


def _resized_random_crop(input_size, interpolation, padding_mode="reflect"):
    resize = transforms.Resize(input_size, interpolation=str_to_interp_mode(interpolation))
    return transforms.Compose([resize, transforms.RandomCrop(input_size, padding=4, padding_mode=padding_mode)])


def eval_transform(input_size, crop_ratio=0.875, interpolation="bicubic"):
    """DeiT's evaluation transform: shorter side to input_size / crop_ratio, centre crop, uint8 pixels."""
    size = int(input_size / crop_ratio) if input_size > SMALL_IMAGE else input_size
    resize = transforms.Resize(size, interpolation=str_to_interp_mode(interpolation))
    return transforms.Compose([resize, transforms.CenterCrop(input_size), MaybePILToTensor()])


class Prepare(nn.Module):
    """Takes uint8 images to the model's input on their device: x / 255, - mean, / std, then random erasing in training.

    The three steps in this order give the bits of torchvision's ToTensor and Normalize.

    Args:
        mean, std: three floats each, on the scale 0..1.
        reprob, remode, recount: timm's random erasing (arXiv 1708.04896) per image; 0 for none.
        device: where the images will be.
    """

    def __init__(self, mean, std, reprob=0.0, remode="pixel", recount=1, device="cpu"):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, device=device).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std, device=device).view(3, 1, 1))
        erasing = {"probability": reprob, "mode": remode, "max_count": recount, "device": torch.device(device).type}
        self.erase = RandomErasing(**erasing) if reprob > 0 else None

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, 3, H, W)."""
        images = images.float().div_(255).sub_(self.mean).div_(self.std)
        return self.erase(images) if self.erase and self.training else images


class SeededDataset(Dataset):
    """Seeds Python's, numpy's and torch's CPU generators for each sample, as `samplers.SeededSampler` tells.

    Args:
        dataset: map-style data set with random transforms.
        bad_images: how many unreadable files to replace by the next readable sample before giving up, over the workers
            of this process.
    """

    def __init__(self, dataset, bad_images=0):
        self.dataset = dataset
        self.allowed = min(bad_images, len(dataset) - 1)  # one has to be left to take their place
        self.bad = Array("b", len(dataset))  # 1 for each unreadable file met; shared by the workers

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        index, seed = key
        while True:
            random.seed(seed)
            np.random.seed(seed % 2**32)  # timm draws from numpy's global generator
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would visit every GPU as well
            try:
                return self.dataset[index]
            except BadImageError as error:
                self._replace(index, error)
                index = (index + 1) % len(self.dataset)

    def _replace(self, index, error):
        """Counts a bad image, once however often it comes."""
        with self.bad.get_lock():
            if not self.bad[index]:
                more = self.allowed - bytes(self.bad.get_obj()).count(1) - 1
                if more < 0:
                    raise error
                self.bad[index] = 1
                log(f"warning: {error}; taking the next one, {more} more allowed", every_rank=True)


def build_loader(
    dataset, sampler, batch_size, num_workers, *, drop_last, pin_memory=False, timeout=0, worker_init_fn=None
):
    """A DataLoader of (uint8 images (B, 3, H, W), int64 labels (B,)) whose workers live as long as it does.

    Args:
        timeout: seconds to wait for a worker's batch before giving up; 0 waits as long as it lives.
        worker_init_fn: called in each worker with its number, or None.
    """
    # Else torch lets the signal of a worker's end raise in whatever line the process has come to, be it a save.
    # The DataLoader also finds that a worker is gone when it has waited 5 s (or `timeout`) for a batch.
    signal_handling._SIGCHLD_handler_set = True
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=fast_collate,
        pin_memory=pin_memory,
        drop_last=drop_last,
        persistent_workers=num_workers > 0,
        timeout=timeout if num_workers > 0 else 0,
        multiprocessing_context="fork" if num_workers > 0 else None,  # the workers know their parent by its number
        worker_init_fn=worker_init_fn,
    )


def load_batch(dataset, indices) -> Tensor:
    """The images of these samples, read here and now: uint8 (B, 3, H, W)."""
    return fast_collate([dataset[i] for i in indices])[0]


GRATINGS_SIZES = {"train": 6000, "val": 3000}
_COSINE = np.array([round(256 * math.cos(2 * math.pi * k / 1024)) for k in range(1024)])


class Gratings(Dataset):
    """Embedded data set: colour images of a grating whose orientation and spatial frequency are the class.

    Six orientations times four frequencies. Phase, colours and contrast are random, orientation and frequency jitter
    about their class's, and a second, weaker grating, a disc and noise distract; so some images lie between classes.
    An image is a function of (split, index) alone, in integer arithmetic on raw random bits, so that it is the same on
    every machine and under every version of numpy.

    Args:
        split: "train" or "val".
        num_images: length of the data set; the first n images are the same for every length.
        image_size: side of the images, pixels.
        transform: RGB PIL image -> anything.
    """

    ORIENTATIONS = 6  # over half a turn
    FREQUENCIES = (2.0, 3.0, 4.5, 6.75)  # cycles an image
    JITTER = 0.45  # of orientation and frequency, largest, in steps between classes
    DISTRACTOR = 0.9  # largest amplitude of the second grating, as a part of the first's
    NOISE = 90  # largest deviation of the noise, grey levels

    def __init__(self, split, num_images, image_size=32, transform=None):
        self.split = ("train", "val").index(split)
        self.num_images, self.image_size, self.transform = num_images, image_size, transform
        degrees = [180 * o // self.ORIENTATIONS for o in range(self.ORIENTATIONS)]
        self.classes = [f"orientation {o}, frequency {f:g}" for o in degrees for f in self.FREQUENCIES]
        self._y, self._x = np.mgrid[:image_size, :image_size]

    def __len__(self):
        return self.num_images

    def __getitem__(self, index):
        label = index % len(self.classes)
        image = Image.fromarray(self.pixels(index, label))
        return (self.transform(image) if self.transform else image), label

    def pixels(self, index, label):
        """uint8 (image_size, image_size, 3)."""
        size = self.image_size
        bits = np.random.PCG64(np.random.SeedSequence((self.split, index))).random_raw(20 + 3 * size * size // 4)
        bits = bits.astype("<u8")  # bytes in one order on every machine
        u = [int(word) / 2**64 for word in bits[:20]]
        orientation, frequency = divmod(label, len(self.FREQUENCIES))
        wave = self._wave(orientation + self.JITTER * (2 * u[0] - 1), frequency + self.JITTER * (2 * u[1] - 1), u[2])
        other = self._wave(self.ORIENTATIONS * u[3], (len(self.FREQUENCIES) - 1) * u[4], u[5])
        wave = wave * 256 + other * int(256 * self.DISTRACTOR * u[6])
        contrast = 0.15 + 0.25 * u[7]
        direction = np.array([round(255 * contrast * (0.4 + 0.6 * v)) for v in u[8:11]])
        background = np.array([round(70 + 115 * v) for v in u[11:14]])
        image = background + (wave[..., None] * direction >> 16)
        radius = size * (0.08 + 0.12 * u[14])
        disc = (self._x - int(size * u[15])) ** 2 + (self._y - int(size * u[16])) ** 2 < int(radius * radius)
        image[disc] = [round(255 * v) for v in u[17:20]]
        noise = bits[20:].view(np.uint8)[: 6 * size * size].reshape(2, size, size, 3).astype(np.int64).sum(axis=0) - 255
        return np.clip(image + (noise * self.NOISE >> 8), 0, 255).astype(np.uint8)

    def _wave(self, orientation, frequency, phase):
        """256 cos(2 pi (f . x + phase)) on the grid; orientation and frequency in steps between classes."""
        angle = math.pi * orientation / self.ORIENTATIONS
        cycles = self.FREQUENCIES[0] * (self.FREQUENCIES[1] / self.FREQUENCIES[0]) ** frequency
        step_x, step_y = (round(2**16 * cycles * part / self.image_size) for part in (math.cos(angle), math.sin(angle)))
        return _COSINE[(self._x * step_x + self._y * step_y + int(2**16 * phase) >> 6) % 1024]
