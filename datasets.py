"""Data sets, how their files are read, and their transforms.

Every sample is (image, label): uint8 pixels (3, H, W) and an int. `Prepare` converts batches on the device, because
uint8 batches need a quarter of the memory traffic of float32.
"""

import json
import os
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing import Array
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybePILToTensor, str_to_interp_mode
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets import CIFAR100, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from gratings import GRATINGS_SIZES, Gratings
from loaders import build_loader as build_loader
from utils import log

SMALL_IMAGE = 32  # up to this size, DeiT crops the whole image with a border of 4 pixels


def build_dataset(
    name: str,
    split: str,
    path: str | Path | None,
    transform: Callable | None = None,
    *,
    inat_category: str = "name",
    num_images: int | None = None,
) -> Dataset:
    """Return a split ("train" or "val"): a map-style data set of (image, label) with a list of class names, `classes`.

    Args:
        name: IMNET, CIFAR, INAT, INAT19 or GRATINGS.
        path: folder of the data (not GRATINGS).
        transform: RGB PIL image -> image of the sample.
        inat_category: taxonomic level of the classes (INAT, INAT19).
        num_images: size of the split (GRATINGS); None for its default.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: the data are not as expected; the message is one line.
    """
    if name == "GRATINGS":
        return Gratings(split, num_images or GRATINGS_SIZES[split], transform=transform)
    root = Path(path)
    if name == "CIFAR":
        try:
            return CIFAR100(root, train=split == "train", transform=transform)
        except RuntimeError:  # torchvision suggests download=True
            raise RuntimeError(
                f"CIFAR-100 not found or damaged under --data-path {path}: unpack cifar-100-python.tar.gz there"
            ) from None
    if name in ("INAT", "INAT19"):
        return INaturalist(root, split, 2018 if name == "INAT" else 2019, inat_category, transform)
    folder = root / split
    if split == "val" and not folder.is_dir() and (root / "validation").is_dir():
        folder = root / "validation"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: --data-path needs train/ and val/ with one folder per class")
    return ClassFolders(folder, transform)


def labels(dataset: Any) -> list[int]:
    """Return the class of each sample of a data set of `build_dataset`, without reading images."""
    if isinstance(dataset, Gratings):
        return [index % len(dataset.classes) for index in range(len(dataset))]
    return dataset.targets if isinstance(dataset, CIFAR100) else [label for _, label in dataset.samples]


def match_classes(found: Sequence[str], known: Sequence[str]) -> list[int]:
    """Return the model's class index for each class of a data set.

    Args:
        found: class names of the data set: some of the model's names, or the numbers 0..N-1 of its N classes.
        known: class names of the model, in the order of its logits.

    Raises:
        ValueError: the model does not know a name, or a name occurs twice.
    """
    found, known = ([unicodedata.normalize("NFC", name) for name in names] for names in (found, known))
    counts = Counter(known)
    twice = [name for name, count in Counter(found).items() if count > 1 or counts[name] > 1]
    if twice:
        raise ValueError(f"class names are not unique: {_first(twice)}")
    unknown = [name for name in found if name not in counts]
    numbers = [int(name) for name in found if name.isdecimal()]
    if len(unknown) == len(found) and sorted(numbers) == list(range(len(known))):
        return numbers
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(found)} classes are unknown to the model: {_first(unknown)}; it has {len(known)}: "
            f"{_first(known)}. Name the class folders as the model does, or number all {len(known)} from 0 in its order"
        )
    index = {name: i for i, name in enumerate(known)}
    return [index[name] for name in found]


def _first(names, number=5):
    return ", ".join(names[:number]) + (f" and {len(names) - number} more" if len(names) > number else "")


class BadImageError(RuntimeError):
    """A file that cannot be read as an image."""


class ClassFolders(ImageFolder):
    """torchvision's ImageFolder with these differences.

    Class folders named by numbers are in numeric order, not 0, 1, 10, 2. Hidden files and folders are skipped. Class
    names are in Unicode's NFC form. Links to a parent folder are not followed, because its images would repeat.
    """

    def __init__(self, root: Path, transform: Callable | None = None):
        folders = sorted((unicodedata.normalize("NFC", path.name), path) for path in root.iterdir() if path.is_dir())
        if hidden := [name for name, _ in folders if name.startswith(".")]:
            log(f"{root}: skipping hidden folders: {_first(hidden)}")
            folders = [pair for pair in folders if pair[0] not in hidden]
        if not folders:
            raise ValueError(
                f"{root} has no class folders: sort its images into one folder per class, as in train/ "
                "(torchvision.datasets.ImageNet does it for the official ImageNet archives)"
            )
        if all(name.isdecimal() for name, _ in folders):
            folders.sort(key=lambda pair: int(pair[0]))
        self.classes = [name for name, _ in folders]
        self.samples = [(path, i) for i, (_, folder) in enumerate(folders) for path in _image_files(folder)]
        self.targets = [label for _, label in self.samples]
        if empty := set(range(len(folders))).difference(self.targets):
            raise ValueError(f"{root} has classes without images: {_first([self.classes[i] for i in sorted(empty)])}")
        self.transform, self.target_transform, self.loader = transform, None, LastImage()


def _image_files(root):
    """Return the paths of the images in a folder in torchvision's order."""
    paths, seen = [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.join(os.path.realpath(folder), "")
        if any(other.startswith(real) for other in seen):  # a link to a parent, or a second link
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        paths += [(folder, name) for name in files if name.lower().endswith(IMG_EXTENSIONS) and name[0] != "."]
    return [os.path.join(*path) for path in sorted(paths)]


class LastImage:
    """Load RGB PIL images and keep the last one, as repeated augmentation reads a file up to three times in a row.

    Transforms do not write to their input, so the kept pixels equal those of a new decode.
    """

    def __init__(self):
        self.path, self.image = None, None

    def __call__(self, path: str | Path) -> Image.Image:
        if path != self.path:
            try:
                self.path, self.image = path, _decode(path)
            except Exception as error:
                raise BadImageError(f"cannot read image {path}: {error}") from None
        return self.image


def _decode(path):
    """Load an image as torchvision does, but scale 16-bit and float images to 8 bits."""
    with Image.open(path) as image:
        image.load()
        image = _to_8_bits(image) if image.mode[0] in "IF" else image
        return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(image):
    """Scale an image of mode I;16, I;16B, I or F to mode L; PIL would clip it.

    Of 16 bits, 0..65535 is mapped to 0..255. Integers of 32 bits in 0..255 or 0..65535, and floats in 0..1 or 0..255,
    are mapped in the same way; with other values, they are scaled by their own minimum and maximum.
    """
    pixels = np.asarray(image).astype(np.float64)
    low, high = pixels.min(), pixels.max()
    if not np.isfinite([low, high]).all():
        raise ValueError("it has pixels that are not finite")
    tops = {"I": (255, 65535), "F": (1, 255)}.get(image.mode, (65535,))
    top = next((top for top in tops if low >= 0 and high <= top), None)
    if top is None:
        pixels, top = pixels - low, (high - low) or 1
    return Image.fromarray(np.rint(pixels * (255 / top)).astype(np.uint8))


class INaturalist(ImageFolder):
    """iNaturalist 2018 or 2019 in DeiT's layout: train<year>.json, val<year>.json, categories.json and the images.

    The class of an image is the name of its category at the taxonomic level `category`. Classes are in the order of the
    training annotations. Images are in <folder>/<category id>/, as in DeiT, or at their `file_name`.
    """

    def __init__(self, root: Path, split: str, year: int, category: str, transform: Callable | None = None):
        categories, train, images = (
            json.loads((root / name).read_text(encoding="utf-8"))
            for name in ("categories.json", f"train{year}.json", f"{split}{year}.json")
        )
        if not all(category in c for c in categories):
            known = ", ".join(categories[0])
            raise ValueError(f"--inat-category {category} is not in {root / 'categories.json'}: choose from {known}")
        level_of = {int(c.get("id", i)): c[category] for i, c in enumerate(categories)}
        order = dict.fromkeys(level_of[int(a["category_id"])] for a in train["annotations"])
        self.classes = [str(level) for level in order]
        number = {level: i for i, level in enumerate(order)}
        self.samples = []
        for image in images["images"]:
            folder, *_, category_id, file = image["file_name"].split("/")
            deit = root / folder / category_id / file
            path = deit if deit.exists() else root / image["file_name"]
            self.samples.append((str(path), number[level_of[int(category_id)]]))
        self.transform, self.target_transform, self.loader = transform, None, LastImage()


def train_transform(
    input_size: int,
    *,
    aa: str | None = None,
    color_jitter: float | None = None,
    interpolation: str = "bicubic",
    hflip: float = 0.5,
    three_augment: bool = False,
    simple_crop: bool = False,
) -> transforms.Compose:
    """Build DeiT's training transform up to uint8 pixels; `Prepare` normalizes and erases on the device.

    Args:
        aa: timm's name of an augmentation policy ("rand-m9-mstd0.5-inc1"), or None.
        color_jitter: strength, or None. As in DeiT, timm omits it with RandAugment and AutoAugment.
        interpolation: "bicubic", "bilinear" or "random".
        three_augment: use DeiT III's 3-Augment (arXiv 2204.07118) instead of `aa`.
        simple_crop: use DeiT III's crop: resize, then a random crop with 4 pixels of reflected border.
    """
    transform = create_transform(
        input_size,
        is_training=True,
        hflip=hflip,
        color_jitter=color_jitter,
        auto_augment="3a" if three_augment else aa,
        interpolation=interpolation,
        use_prefetcher=True,  # keeps the pixels uint8
    )
    small = input_size <= SMALL_IMAGE and not three_augment  # as for CIFAR in DeiT: a crop of the whole image
    if small or simple_crop:
        if interpolation == "random":
            raise ValueError("random interpolation needs DeiT's random resized crop: choose bicubic or bilinear")
        resize = transforms.Resize(input_size, str_to_interp_mode(interpolation))
        crop = transforms.RandomCrop(input_size, padding=4, padding_mode="reflect" if simple_crop else "constant")
        transform.transforms[0] = transforms.Compose([resize, crop])
    return transform


def eval_transform(input_size: int, crop_ratio: float = 0.875, interpolation: str = "bicubic") -> transforms.Compose:
    """Build DeiT's evaluation transform: resize the shorter side to input_size / crop_ratio, center crop, uint8."""
    size = int(input_size / crop_ratio) if input_size > SMALL_IMAGE else input_size
    resize = transforms.Resize(size, str_to_interp_mode(interpolation))
    return transforms.Compose([crop_panorama, resize, transforms.CenterCrop(input_size), MaybePILToTensor()])


def own_eval_transform(model: nn.Module, input_size: int | None = None) -> transforms.Compose:
    """Build the evaluation transform of a timm model's config, for its own input size or another one."""
    config = resolve_model_data_config(model)
    return eval_transform(input_size or config["input_size"][-1], config["crop_pct"], config["interpolation"])


def crop_panorama(image: Image.Image) -> Image.Image:
    """Return the middle of an image that is more than 256 times as long as wide, or the image.

    Resized to a height of 256, a panorama of 2 x 20,000 pixels would take 2 GB. As many squares are cut from both ends,
    the center crop of the resized image stays the same.
    """
    width, height = image.size
    short, long = sorted(image.size)
    cut = max(0, long // short - 254) // 2 * short
    if cut == 0:
        return image
    return image.crop((cut, 0, width - cut, height) if width == long else (0, cut, width, height - cut))


class Prepare(nn.Module):
    """Convert uint8 images to the model's input: x / 255, - mean, / std, then random erasing in training mode.

    This order gives the same bits as torchvision's ToTensor and Normalize.

    Args:
        mean, std: three floats each, for pixels in 0..1.
        reprob, remode, recount: timm's random erasing (arXiv 1708.04896), per image.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], reprob=0.0, remode="pixel", recount=1, device: Any = "cpu"
    ):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, device=device).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std, device=device).view(3, 1, 1))
        erasing = {"probability": reprob, "mode": remode, "max_count": recount, "device": torch.device(device).type}
        self.erase = RandomErasing(**erasing) if reprob > 0 else None

    def forward(self, images: Tensor) -> Tensor:
        """Convert uint8 (B, 3, H, W) to float32 (B, 3, H, W)."""
        images = images.float().div_(255).sub_(self.mean).div_(self.std)
        return self.erase(images) if self.erase and self.training else images


def check_images(dataset: Any, num: int = 32) -> None:
    """Decode an evenly spaced sample of a data set's image files; raise a BadImageError if one cannot be read."""
    samples = getattr(dataset, "samples", [])  # GRATINGS and CIFAR have no files
    for i in range(0, len(samples), max(1, len(samples) // num)):
        dataset.loader(samples[i][0])


class SeededDataset(Dataset):
    """Seed Python's, NumPy's and torch's CPU generators for each sample; keys are (index, seed) of a SeededSampler.

    Up to `bad_images` unreadable files, over all workers of this process, are replaced by the next readable sample. One
    more raises a BadImageError.
    """

    def __init__(self, dataset: Dataset, bad_images: int = 0):
        self.dataset = dataset
        allowed = min(bad_images, len(dataset) - 1)  # leave a sample as replacement
        self.bad = Array("q", [-1] * allowed)  # indices of unreadable files, shared by the workers

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, int]:
        index, seed = key
        while True:
            random.seed(seed)
            np.random.seed(seed % 2**32)  # timm uses numpy's generator
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed GPUs
            try:
                return self.dataset[index]
            except BadImageError as error:
                self._count(index, error)
                index = (index + 1) % len(self.dataset)

    def _count(self, index, error):
        """Count a bad image, unless it was counted before."""
        with self.bad.get_lock():
            bad = self.bad[:]
            if index not in bad:
                left = bad.count(-1) - 1
                if left < 0:
                    raise error
                self.bad[len(bad) - left - 1] = index
                log(f"warning: {error}; using the next one, {left} more allowed", every_rank=True)
