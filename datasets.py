"""Data sets, their transforms, and the embedded data set GRATINGS.

Every data set hands out (image, label): uint8 pixels (3, H, W) and an int. Batches stay uint8 until `Prepare` has them
on the device, which is a quarter of the float traffic.
"""

import json
import random
from multiprocessing import Value
from pathlib import Path

import numpy as np
import torch
from timm.data import create_transform
from timm.data.auto_augment import auto_augment_transform
from timm.data.loader import fast_collate
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation, str_to_interp_mode
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import CIFAR100, ImageFolder
from torchvision.datasets.folder import default_loader

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
        return CIFAR100(root, train=split == "train", transform=transform)
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
                self.path, self.image = path, default_loader(path)
            except Exception as error:
                self.path = None
                raise BadImageError(f"cannot read image {path}: {error}") from None
        return self.image


class BadImageError(RuntimeError):
    """A file that is no readable image."""


class INaturalist(Dataset):
    """iNaturalist 2018 or 2019 as DeiT lays it out: train<year>.json, val<year>.json, categories.json and the images.

    The class of an image is its category's entry at the level `category`, numbered in the order in which the levels
    first appear among the training annotations. Images lie under <folder>/<category id>/ (DeiT) or where their
    file name says.
    """

    def __init__(self, root, split, year, category, transform=None):
        if category not in INAT_CATEGORIES:
            raise ValueError(f"--inat-category {category} is not one of {', '.join(INAT_CATEGORIES)}")
        categories = _read_json(root / "categories.json")
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
            self.samples.append((str(path), number[level_of[int(category_id)]]))
        self.transform, self.loader = transform, LastImage()

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        image = self.loader(path)
        return (self.transform(image) if self.transform else image), label


def _read_json(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: INAT needs categories.json, train<year>.json, val<year>.json")
    with open(path, encoding="utf-8") as file:
        return json.load(file)


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
    if three_augment:
        crop = RandomResizedCropAndInterpolation(input_size, interpolation=interpolation)
        if simple_crop:
            crop = _resized_random_crop(input_size, interpolation)
        jitter = [transforms.ColorJitter(color_jitter, color_jitter, color_jitter)] if color_jitter else []
        parts = [crop, transforms.RandomHorizontalFlip(hflip), auto_augment_transform("3a", {}), *jitter]
        return transforms.Compose([*parts, MaybePILToTensor()])
    transform = create_transform(
        input_size,
        is_training=True,
        hflip=hflip,
        color_jitter=color_jitter,
        auto_augment=aa,
        interpolation=interpolation,
        use_prefetcher=True,  # leaves uint8 pixels
    )
    if input_size <= SMALL_IMAGE:
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
        bad_images: how many unreadable files to replace by the next readable sample before giving up, counted over
            the workers of this process.
    """

    def __init__(self, dataset, bad_images=0):
        self.dataset = dataset
        self.budget = Value("i", bad_images)

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
                self._spend(error)
                index = (index + 1) % len(self.dataset)

    def _spend(self, error):
        with self.budget.get_lock():
            if self.budget.value == 0:
                raise error
            self.budget.value -= 1
            print(f"warning: {error}; taking the next one, {self.budget.value} more allowed", flush=True)


def build_loader(dataset, sampler, batch_size, num_workers, *, drop_last, pin_memory=False, timeout=0):
    """A DataLoader of (uint8 images (B, 3, H, W), int64 labels (B,)) whose workers live as long as it does.

    Args:
        timeout: seconds to wait for a worker's batch before giving up; 0 waits for ever.
    """
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
    )
