"""Data sets and their labels, DeiT's transforms, seeds per sample, damaged files, loaders."""

import hashlib
import itertools
import json
import os
import pickle
import random
import re
import resource
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.auto_augment import AutoAugment, RandAugment
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets import CIFAR100, ImageFolder
from torchvision.datasets.folder import default_loader

import datasets
from datasets import (
    BadImageError,
    BoundedResize,
    LastImage,
    Prepare,
    SeededDataset,
    build_dataset,
    check_images,
    eval_transform,
    match_classes,
    train_transform,
)
from gratings import GRATINGS_SIZES, Gratings
from loaders import LoaderError, build_loader, warn_if_shm_is_small
from samplers import RASampler, SeededSampler


def picture(seed, size=(50, 40)):
    """Return a smooth random RGB image, on which resampling matters."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def write_folder(root, classes, images=2, splits=("train", "val")):
    for split, (label, name) in itertools.product(splits, enumerate(classes)):
        (root / split / name).mkdir(parents=True)
        for i in range(images):
            picture(100 * label + i).save(root / split / name / f"{i}.jpg")
    return root


def labels(dataset):
    return [dataset[i][1] for i in range(len(dataset))]


def assert_same_pixels(image, expected):
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


# GRATINGS

GRATINGS_DIGEST = "87d2713258d8c49670e0d6eff4b23fd11b99dab2999f4700605b49fb8fb33cbd"


def test_gratings_have_the_same_pixels_on_every_machine():
    digest = hashlib.sha256()
    for split, index in (("train", 0), ("train", 1), ("train", 5999), ("val", 0), ("val", 100)):
        digest.update(np.asarray(Gratings(split, 6000)[index][0]).tobytes())
    digest.update(np.asarray(Gratings("train", 1, image_size=20)[0][0]).tobytes())
    assert digest.hexdigest() == GRATINGS_DIGEST


def test_a_grating_depends_on_split_and_index_alone():
    train, val, short = Gratings("train", 100), Gratings("val", 100), Gratings("train", 10)
    later, label = train[7]
    assert_same_pixels(short[7][0], later)
    assert short[7][1] == label
    pixels = [np.asarray(images[i][0]).tobytes() for images in (train, val) for i in range(100)]
    assert len(set(pixels)) == 200


def test_gratings_are_balanced_rgb_images():
    assert {split: len(build_dataset("GRATINGS", split, None)) for split in GRATINGS_SIZES} == GRATINGS_SIZES
    images = build_dataset("GRATINGS", "val", None, num_images=48)
    assert len(images) == 48
    assert len(images.classes) == len(set(images.classes)) == 24
    assert Counter(labels(images)) == dict.fromkeys(range(24), 2)
    image, label = images[30]
    assert (image.mode, image.size, label) == ("RGB", (32, 32), 6)


def test_the_label_of_a_grating_is_its_wave():
    """Of the waves of all classes, that of its own class correlates best with the images of a class."""
    images = Gratings("train", 24 * 40)
    y, x = np.mgrid[:32, :32] / 32
    filters = []
    for label in range(24):
        orientation, frequency = divmod(label, 4)
        angle, cycles = np.pi * orientation / 6, Gratings.FREQUENCIES[frequency]
        filters.append(np.exp(2j * np.pi * cycles * (np.cos(angle) * x + np.sin(angle) * y)).ravel())
    energy = np.zeros((24, 24))
    for image, label in (images[i] for i in range(len(images))):
        gray = np.asarray(image).astype(float).mean(axis=2)
        energy[label] += abs(np.array(filters) @ (gray - gray.mean()).ravel()) / np.linalg.norm(gray - gray.mean())
    assert energy.argmax(axis=1).tolist() == list(range(24))


# Files


def test_the_classes_of_imnet_are_those_of_the_folder(tmp_path):
    write_folder(tmp_path, ["n02", "n01", "n03"])
    images = build_dataset("IMNET", "train", tmp_path)
    assert images.classes == ["n01", "n02", "n03"]  # and not 1000
    assert labels(images) == [0, 0, 1, 1, 2, 2]
    assert_same_pixels(images[0][0], default_loader(tmp_path / "train/n01/0.jpg"))
    assert build_dataset("IMNET", "val", tmp_path, lambda image: image.size)[5] == ((50, 40), 2)


def test_a_missing_split_is_named(tmp_path):
    write_folder(tmp_path, ["a"], splits=("train",))
    with pytest.raises(FileNotFoundError, match=r"val does not exist: --data-path needs train/ and val/"):
        build_dataset("IMNET", "val", tmp_path)


def test_numbered_class_folders_are_in_numeric_order(tmp_path):
    write_folder(tmp_path, [str(i) for i in range(11)], images=1, splits=["val"])
    images = build_dataset("IMNET", "val", tmp_path)
    assert images.classes == [str(i) for i in range(11)]
    assert labels(images) == list(range(11))
    assert images.samples[10][0] == str(tmp_path / "val" / "10" / "0.jpg")
    write_folder(tmp_path, ["a", "9", "10"], images=1, splits=["train"])
    assert build_dataset("IMNET", "train", tmp_path).classes == ["10", "9", "a"]  # not all are numbers


def test_hidden_folders_are_no_classes(tmp_path, capsys):
    write_folder(tmp_path, ["ant", ".ipynb_checkpoints", "ant/.ipynb_checkpoints"], splits=["val"])
    (tmp_path / "val/ant/._0.jpg").write_text("what macOS adds to archives")
    images = build_dataset("IMNET", "val", tmp_path)
    assert (images.classes, labels(images)) == (["ant"], [0, 0])
    assert capsys.readouterr().out == f"{tmp_path}/val: skipping hidden folders: .ipynb_checkpoints\n"


def test_validation_is_accepted_for_val(tmp_path):
    write_folder(tmp_path, ["ant"], splits=["validation"])
    assert len(build_dataset("IMNET", "val", tmp_path)) == 2
    write_folder(tmp_path, ["bee"], splits=["val"])
    assert build_dataset("IMNET", "val", tmp_path).classes == ["bee"]


def test_images_without_class_folders_are_refused(tmp_path):
    write_folder(tmp_path, ["val"], splits=["."])
    with pytest.raises(ValueError, match=r"val has no class folders: .* one folder per class.*datasets\.ImageNet"):
        build_dataset("IMNET", "val", tmp_path)


def test_an_empty_class_folder_is_named(tmp_path):
    write_folder(tmp_path, ["ant", "bee"], splits=["val"])
    (tmp_path / "val/cow").mkdir()
    with pytest.raises(ValueError, match=r"val has classes without images: cow$"):
        build_dataset("IMNET", "val", tmp_path)


def test_unicode_forms_of_a_name_are_one_class(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    write_folder(tmp_path, [composed, "tea"], splits=["train"])
    write_folder(tmp_path, [decomposed, "tea"], splits=["val"])
    train, val = (build_dataset("IMNET", split, tmp_path) for split in ("train", "val"))
    assert train.classes == val.classes == [composed, "tea"]
    (tmp_path / "val" / composed).mkdir()
    with pytest.raises(ValueError, match=r"two folders of one class: 'cafe\\u0301', 'caf\\xe9'"):
        build_dataset("IMNET", "val", tmp_path)


def test_links_to_a_parent_repeat_no_images(tmp_path):
    write_folder(tmp_path, ["ant", "bee", "elsewhere/more"], splits=["val"])
    (tmp_path / "val/elsewhere").rename(tmp_path / "elsewhere")
    for link, target in (
        ("val/ant/up", ".."),
        ("val/ant/self", "."),
        ("val/bee/more", "../../elsewhere/more"),
        ("elsewhere/more/up", ".."),
        ("elsewhere/more/back", "../../val/bee"),
    ):
        (tmp_path / link).symlink_to(target)
    assert labels(build_dataset("IMNET", "val", tmp_path)) == [0, 0, 1, 1, 1, 1]


def test_class_folders_list_the_samples_of_torchvision(tmp_path):
    write_folder(tmp_path, ["b", "a", "a/z", "a/y-"], splits=["train"])
    (tmp_path / "train/a/readme.txt").write_text("no image")
    (tmp_path / "train/a/0.jpg").rename(tmp_path / "train/a/z.JPEG")
    images, reference = build_dataset("IMNET", "train", tmp_path), ImageFolder(tmp_path / "train")
    assert (images.samples, images.classes) == (reference.samples, reference.classes)
    assert len(images) == len(reference) == 8


@pytest.mark.parametrize(
    ("found", "known", "expected"),
    [
        (["ant", "bee"], ["bee", "ant"], [1, 0]),
        (["cow", "ant"], ["ant", "bee", "cow"], [2, 0]),
        (["0", "1", "10"], ["0", "1", "10"], [0, 1, 2]),
        (["0", "1", "2", "10"], ["0", "1", "10", "2"], [0, 1, 3, 2]),
        (["0", "1", "2"], ["ant", "bee", "cow"], [0, 1, 2]),
        (["000", "002", "001"], ["ant", "bee", "cow"], [0, 2, 1]),
        (["cafe\u0301"], ["tea", "caf\u00e9"], [1]),
        (["ant"], ["crane", "ant", "crane"], [1]),
    ],
    ids=["order", "subset", "own numbers", "numbers as text", "numbers", "padded", "Unicode", "twice elsewhere"],
)
def test_classes_are_matched_by_name(found, known, expected):
    assert match_classes(found, known) == expected


@pytest.mark.parametrize(
    ("found", "known", "message"),
    [
        (["ant", "wasp"], ["ant", "bee"], "1 of 2 classes are unknown to the model: wasp; it has 2: ant, bee"),
        (["0", "1"], ["ant", "bee", "cow"], "2 of 2 .* unknown"),
        (["0", "1"], ["1", "2"], "1 of 2 .*: 0;"),
        (["1", "2"], ["ant", "bee"], "2 of 2"),
        (list("abcdefg"), ["0"], "a, b, c, d, e and 2 more"),
        (["ant", "ant"], ["ant", "bee"], "not unique: ant$"),
        (["crane"], ["crane", "ant", "crane"], "not unique: crane$"),
        (["cafe\u0301", "caf\u00e9"], ["caf\u00e9"], "not unique"),
    ],
)
def test_classes_that_do_not_match_are_refused(found, known, message):
    with pytest.raises(ValueError, match=message):
        match_classes(found, known)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """CIFAR-100 in its own layout with few images; torchvision gets their checksums instead of the real ones."""
    folder = tmp_path / CIFAR100.base_folder
    folder.mkdir()
    arrays = {}

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def images(number):
        arrays[number] = np.random.default_rng(number).integers(0, 256, (number, 3, 32, 32), dtype=np.uint8)
        return {"data": arrays[number].reshape(number, -1), "fine_labels": list(range(90, 90 + number))}

    monkeypatch.setattr(CIFAR100, "train_list", [["train", write("train", images(6))]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", write("test", images(3))]])
    names = {"fine_label_names": [f"class{i}" for i in range(100)]}
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": write("meta", names)})
    return tmp_path, arrays


def test_cifar_reads_the_files_of_its_authors(cifar):
    path, arrays = cifar
    for split, number in (("train", 6), ("val", 3)):
        images = build_dataset("CIFAR", split, path)
        assert len(images.classes) == 100
        assert labels(images) == list(range(90, 90 + number))
        for (image, _), array in zip(images, arrays[number], strict=True):
            assert_same_pixels(image, array.transpose(1, 2, 0))


def test_damaged_cifar_is_refused(cifar):
    path, _ = cifar
    with open(path / CIFAR100.base_folder / "train", "ab") as file:
        file.write(b"x")
    with pytest.raises(RuntimeError, match=r"CIFAR-100 .*not found or damaged.*cifar-100-python\.tar\.gz"):
        build_dataset("CIFAR", "train", path)


@pytest.fixture(params=[2018, 2019])
def inat(tmp_path, request):
    """iNaturalist in DeiT's layout: four species of two families; the first annotation is of species 3."""
    year, levels = request.param, ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus")
    categories = [{"id": i, "name": f"species{i}", **{level: f"{level}{i // 2}" for level in levels}} for i in range(4)]
    (tmp_path / "categories.json").write_text(json.dumps(categories))
    for split, species in (("train", [3, 0, 3, 2]), ("val", [2, 3, 0])):
        names = [f"train_val{year}/Animals/{category}/{split}{i}.jpg" for i, category in enumerate(species)]
        listing = {
            "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
            "annotations": [{"image_id": i, "category_id": category} for i, category in enumerate(species)],
        }
        (tmp_path / f"{split}{year}.json").write_text(json.dumps(listing))
        for i, category in enumerate(species):
            place = tmp_path / f"train_val{year}" / str(category)
            place.mkdir(parents=True, exist_ok=True)
            picture(10 * category + i).save(place / f"{split}{i}.jpg")
    return "INAT" if year == 2018 else "INAT19", tmp_path, year


def test_inat_numbers_the_levels_as_deit_does(inat):
    name, path, _ = inat
    train, val = (build_dataset(name, split, path) for split in ("train", "val"))
    assert train.classes == val.classes == ["species3", "species0", "species2"]  # in the order of the annotations
    assert (labels(train), labels(val)) == ([0, 1, 0, 2], [2, 0, 1])
    families = build_dataset(name, "val", path, inat_category="family")
    assert families.classes == ["family1", "family0"]
    assert labels(families) == [0, 0, 1]


def test_inat_finds_images_in_both_layouts(inat):
    name, path, year = inat
    folder = path / f"train_val{year}"
    assert build_dataset(name, "train", path, transform=lambda image: image.size)[0] == ((50, 40), 0)
    (folder / "Animals").mkdir()
    (folder / "3").rename(folder / "Animals" / "3")  # as in file_name
    assert build_dataset(name, "train", path, transform=lambda image: image.size)[0] == ((50, 40), 0)


def test_inat_names_what_is_missing(inat):
    name, path, year = inat
    without = [{"id": i, "name": f"species{i}", "supercategory": "Animals"} for i in range(4)]
    (path / "categories.json").write_text(json.dumps(without))  # as iNaturalist publishes it
    assert len(build_dataset(name, "train", path).classes) == 3
    with pytest.raises(ValueError, match=r"--inat-category family is not in .*categories\.json.*supercategory, name"):
        build_dataset(name, "train", path, inat_category="family")
    (path / f"train{year}.json").write_text("{")
    with pytest.raises(ValueError, match=rf"train{year}\.json is not valid JSON"):
        build_dataset(name, "train", path)
    (path / f"train{year}.json").unlink()
    with pytest.raises(FileNotFoundError, match=rf"train{year}\.json does not exist: INAT needs"):
        build_dataset(name, "train", path)


# Decoding


def test_the_last_image_is_decoded_once(tmp_path):
    paths = [tmp_path / f"{i}.jpg" for i in range(2)]
    for i, path in enumerate(paths):
        picture(i).save(path)
    load = LastImage()
    first = load(paths[0])
    assert load(paths[0]) is first
    for path in (paths[1], paths[0]):
        assert_same_pixels(load(path), default_loader(path))
    assert load(paths[0]) is not first


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_images_of_other_modes_become_rgb(tmp_path, mode):
    picture(0).convert(mode).save(tmp_path / "image.jpg")
    image = LastImage()(tmp_path / "image.jpg")
    assert image.mode == "RGB"
    assert_same_pixels(image, default_loader(tmp_path / "image.jpg"))


RAMP = np.linspace(0, 65535, 256).reshape(16, 16)  # every 8-bit level once


@pytest.mark.parametrize(
    ("pixels", "mode"),
    [
        (RAMP.astype("<u2"), "I;16"),
        (RAMP.astype(">u2"), "I;16B"),
        (RAMP.astype("<i4"), "I"),
        (RAMP.astype("<i4") * 1000 - 5, "I"),
        (RAMP.astype("<f4") / 65535, "F"),
        (RAMP.astype("<f4") / 257, "F"),
        (RAMP.astype("<f4") - 1000, "F"),
    ],
)
def test_deep_images_are_scaled_and_not_clipped(tmp_path, pixels, mode):
    image = Image.frombuffer(mode, (16, 16), pixels.tobytes(), "raw", mode if pixels.dtype != "<f4" else "F;32F", 0, 1)
    image.save(tmp_path / "image.tif")
    with Image.open(tmp_path / "image.tif") as saved:
        assert saved.mode == mode
    loaded = LastImage()(tmp_path / "image.tif")
    assert loaded.mode == "RGB"
    assert_same_pixels(loaded, np.arange(256).reshape(16, 16, 1).repeat(3, axis=2))


def test_pixels_that_are_not_finite_are_an_error(tmp_path):
    Image.fromarray(np.array([[0, np.nan]], dtype=np.float32)).save(tmp_path / "image.tif")
    with pytest.raises(BadImageError, match="not finite"):
        LastImage()(tmp_path / "image.tif")


def test_a_constant_deep_image_is_not_divided_by_zero(tmp_path):
    Image.fromarray(np.full((2, 2), -3, dtype=np.float32)).save(tmp_path / "image.tif")
    assert np.asarray(LastImage()(tmp_path / "image.tif")).max() == 0


@pytest.mark.parametrize("options", [{"aa": "rand-m9-mstd0.5-inc1"}, {"three_augment": True, "color_jitter": 0.4}])
def test_transforms_do_not_write_into_the_kept_image(tmp_path, options):
    picture(0).save(tmp_path / "image.jpg")
    load, transform = LastImage(), train_transform(48, **options)
    for _ in range(40):
        transform(load(tmp_path / "image.jpg"))
    assert_same_pixels(load(tmp_path / "image.jpg"), default_loader(tmp_path / "image.jpg"))


def test_a_damaged_file_is_named_every_time(tmp_path):
    picture(0).save(tmp_path / "good.jpg")
    (tmp_path / "bad.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:300])
    load = LastImage()
    for _ in range(2):  # the second time must not find half an image
        with pytest.raises(BadImageError, match=r"cannot read image .*bad\.jpg"):
            load(tmp_path / "bad.jpg")
    assert load(tmp_path / "good.jpg").size == (50, 40)


# Transforms


def test_prepare_gives_the_bits_of_totensor_and_normalize():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    expected = torch.stack([reference(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in pixels])
    torch.testing.assert_close(Prepare(mean, std)(pixels), expected, rtol=0, atol=0)
    assert (pixels == torch.arange(256).view(16, 16)).all()


@pytest.mark.parametrize("remode", ["const", "rand", "pixel"])
def test_prepare_erases_only_in_training(remode):
    prepare = Prepare([0.5] * 3, [0.25] * 3, reprob=1.0, remode=remode, recount=2)
    pixels = torch.full((4, 3, 24, 24), 200, dtype=torch.uint8)
    whole = Prepare([0.5] * 3, [0.25] * 3)(pixels)
    torch.testing.assert_close(prepare.eval()(pixels), whole, rtol=0, atol=0)
    erased = (prepare.train()(pixels) != whole).any(dim=1).flatten(1).float().mean(dim=1)
    assert ((erased > 0) & (erased < 0.9)).all()
    assert list(prepare.state_dict()) == ["mean", "std"]


def kinds(transform):
    """Return the classes of a transform's parts, those of a nested composition as a tuple."""
    return [tuple(kinds(part)) if isinstance(part, transforms.Compose) else type(part) for part in transform.transforms]


CROP, SIMPLE_CROP = RandomResizedCropAndInterpolation, (BoundedResize, transforms.RandomCrop)
FLIP, JITTER = transforms.RandomHorizontalFlip, transforms.ColorJitter


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"aa": "rand-m9-mstd0.5-inc1", "color_jitter": 0.4}, [CROP, FLIP, RandAugment]),
        ({"color_jitter": 0.4}, [CROP, FLIP, JITTER]),
        ({"aa": None, "hflip": 0.0}, [CROP]),
        ({"simple_crop": True}, [SIMPLE_CROP, FLIP]),
        ({"three_augment": True, "color_jitter": 0.3}, [CROP, FLIP, AutoAugment, JITTER]),
        ({"three_augment": True, "simple_crop": True}, [SIMPLE_CROP, FLIP, AutoAugment]),
    ],
)
def test_training_transforms_have_the_parts_of_deit(options, expected):
    transform = train_transform(64, **options)
    assert kinds(transform)[:-1] == expected
    image = torch.as_tensor(transform(picture(0)))
    assert (image.dtype, image.shape) == (torch.uint8, (3, 64, 64))


@pytest.mark.parametrize(
    ("input_size", "options", "padding_mode"),
    [(32, {}, "constant"), (28, {"aa": "rand-m9"}, "constant"), (33, {"simple_crop": True}, "reflect")],
)
def test_small_images_and_simple_crop_are_padded(input_size, options, padding_mode):
    resize, crop = train_transform(input_size, **options).transforms[0].transforms
    assert (resize.size, crop.size) == (input_size, (input_size, input_size))
    assert (crop.padding, crop.padding_mode) == (4, padding_mode)


def test_three_augment_is_one_of_three_operations():
    (augment,) = (part for part in train_transform(64, three_augment=True).transforms if isinstance(part, AutoAugment))
    names = sorted(op.name for policy in augment.policy for op in policy)
    assert names == ["Desaturate", "GaussianBlurRand", "Solarize"]
    assert all(policy[0].prob == 1.0 for policy in augment.policy)


def test_interpolation_is_as_asked():
    for name in ("bicubic", "bilinear"):
        assert train_transform(64, interpolation=name).transforms[0].interpolation.value == name
        assert train_transform(32, interpolation=name).transforms[0].transforms[0].interpolation.value == name
    assert len(train_transform(64, interpolation="random").transforms[0].interpolation) == 2


@pytest.mark.parametrize(
    ("input_size", "ratio", "resized"), [(224, 0.875, 256), (64, 0.875, 73), (64, 1.0, 64), (32, 0.875, 32)]
)
def test_evaluation_crops_the_center(input_size, ratio, resized):
    """The shorter side becomes input_size / ratio; images of 32 pixels are taken whole."""
    image = picture(0, (90, 70))
    wide = image.resize((int(resized * 90 / 70), resized), Image.Resampling.BICUBIC)
    left, top = round((wide.width - input_size) / 2), round((wide.height - input_size) / 2)
    expected = np.asarray(wide.crop((left, top, left + input_size, top + input_size))).transpose(2, 0, 1)
    assert_same_pixels(eval_transform(input_size, ratio)(image), expected)


@pytest.mark.parametrize("size", [(500, 375), (333, 500), (64, 64), (31, 200), (3000, 40), (7, 900), (1, 255)])
@pytest.mark.parametrize(("input_size", "ratio"), [(224, 0.875), (65, 0.9), (32, 1.0)])
def test_evaluation_has_the_bits_of_resize_and_center_crop(size, input_size, ratio):
    resized = int(input_size / ratio)
    bicubic = transforms.InterpolationMode.BICUBIC
    reference = transforms.Compose([transforms.Resize(resized, bicubic), transforms.CenterCrop(input_size)])
    image = picture(1, size)
    expected = np.asarray(reference(image)).transpose(2, 0, 1)
    assert_same_pixels(eval_transform(input_size, ratio)(image), expected)


@pytest.mark.parametrize("size", [(3000, 40), (40, 3001), (7, 900), (900, 7), (1, 255)])
@pytest.mark.parametrize("input_size", [224, 225])
def test_the_part_of_a_panorama_is_that_of_the_whole(size, input_size, monkeypatch):
    image, transform = picture(1, size), eval_transform(input_size)
    whole = np.asarray(transform(image)).astype(int)
    monkeypatch.setattr(BoundedResize, "LIMIT", 2**17)
    difference = abs(np.asarray(transform(image)).astype(int) - whole)
    assert difference.max() <= 2  # PIL rounds the position of the part
    assert (difference > 0).mean() < 1e-3


def test_training_takes_a_random_part_of_a_panorama(monkeypatch):
    monkeypatch.setattr(BoundedResize, "LIMIT", 2**12)
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(256, 1)).convert("RGB").resize((2, 5120))
    transform = train_transform(64, simple_crop=True, hflip=0.0)
    means = [np.asarray(transform(image)).mean() for _ in range(20)]
    assert max(means) - min(means) > 50


@pytest.mark.parametrize("size", [(20_000, 2), (1, 5000)])
@pytest.mark.parametrize(
    "transform", [eval_transform(224), train_transform(224), train_transform(64, simple_crop=True)]
)
def test_a_panorama_takes_little_memory(size, transform):
    """Resized as a whole it takes up to 2 GB. With 256 MiB of address space left that is a MemoryError."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**28, limits[1]))
    try:
        image = np.asarray(transform(Image.new("RGB", size, (9, 9, 9))))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert image.shape[0] == 3


# Seeds


class RandomImages(Dataset):
    """Twelve images whose pixels depend on every random generator; those in `bad` cannot be read."""

    def __init__(self, bad=()):
        self.bad, self.transform = bad, train_transform(24, aa="rand-m9-mstd0.5-inc1")

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index in self.bad:
            raise BadImageError(f"cannot read image {index}.jpg")
        seed = np.random.randint(256) + random.randrange(256) + torch.randint(256, ()).item()
        return self.transform(picture(seed)), index


def epoch_of(num_workers):
    sampler = SeededSampler(RASampler(range(12), 1, 0), seed=5, rank=0)
    sampler.set_epoch(1)
    return list(build_loader(SeededDataset(RandomImages()), sampler, 4, num_workers, drop_last=True))


def test_samples_depend_on_their_seed_and_not_on_the_workers():
    torch.manual_seed(99)
    alone = epoch_of(0)
    torch.manual_seed(1)
    for num_workers in (1, 2):
        for got, wanted in zip(epoch_of(num_workers), alone, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    images, numbers = alone[0]
    assert (images.dtype, numbers.dtype, images.shape) == (torch.uint8, torch.int64, (4, 3, 24, 24))
    assert numbers[0] == numbers[1] == numbers[2]  # the copies of one image, each augmented anew
    assert not torch.equal(images[0], images[1])


def test_a_sample_is_a_function_of_index_and_seed():
    images = SeededDataset(RandomImages())
    one, other = images[3, 17], images[3, 18]
    assert_same_pixels(images[3, 17][0], one[0])
    assert not np.array_equal(np.asarray(one[0]), np.asarray(other[0]))
    assert len(images) == 12


def test_the_last_batch_is_dropped_where_asked():
    images, keys = SeededDataset(RandomImages()), [(i, i) for i in range(10)]
    for drop_last, sizes in ((True, [4, 4]), (False, [4, 4, 2])):
        assert [len(batch) for _, batch in build_loader(images, keys, 4, 0, drop_last=drop_last)] == sizes


# Damaged files


def test_the_next_readable_sample_replaces_a_damaged_one(capsys):
    images = SeededDataset(RandomImages(bad={2, 3, 7, 11}), bad_images=3)
    assert images[2, 0][1] == 4
    assert images[11, 0][1] == 0  # the first follows the last
    printed = capsys.readouterr().out
    assert "cannot read image 2.jpg; using the next one, 2 more allowed" in printed
    assert "cannot read image 11.jpg; using the next one, 0 more allowed" in printed
    assert images[2, 1][1] == 4  # each file counts once
    assert capsys.readouterr().out == ""
    with pytest.raises(BadImageError, match=r"7\.jpg"):
        images[7, 0]


@pytest.mark.parametrize(("bad", "allowed"), [({2}, 0), (set(range(12)), 99)])
def test_too_many_damaged_files_are_an_error(bad, allowed):
    with pytest.raises(BadImageError):
        SeededDataset(RandomImages(bad), bad_images=allowed)[2, 0]


def test_a_warning_on_a_full_disk_does_not_end_the_run(monkeypatch):
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr("sys.stdout", open(full, "w", closefd=False))  # noqa: SIM115 closing it would fail, too
    assert SeededDataset(RandomImages(bad={2}), bad_images=1)[2, 0][1] == 3


def test_memory_does_not_grow_with_an_absurd_length():
    images = SeededDataset(Gratings("train", 10**13, transform=train_transform(32)), bad_images=10**13)
    assert len(images) == 10**13
    assert images[10**13 - 1, 0][1] == (10**13 - 1) % 24


def test_a_sample_of_the_files_is_checked(tmp_path):
    write_folder(tmp_path, ["ant", "bee"], images=4, splits=["val"])
    images = build_dataset("IMNET", "val", tmp_path, transform=lambda _: pytest.fail("only decoding is needed"))
    (tmp_path / "val/bee/0.jpg").write_text("no image")
    check_images(images, num=1)
    for num in (2, 5, 100):
        with pytest.raises(BadImageError, match=r"cannot read image .*bee/0\.jpg"):
            check_images(images, num)
    check_images(Gratings("val", 10**13))


def labels_or_error(bad_images):
    """Return the labels of an epoch with two workers, or the error that ended it."""
    images = SeededDataset(RandomImages(bad={0, 4, 8}), bad_images)
    try:
        loader = build_loader(images, [(i, i) for i in range(12)], 2, 2, drop_last=False)
        return torch.cat([batch for _, batch in loader]).tolist()
    except BadImageError as error:
        # Its frames hold the workers in a cycle, and the garbage collector takes five seconds to stop each.
        traceback.clear_frames(error.__traceback__)
        return str(error)


def test_damaged_files_are_counted_over_the_workers():
    assert labels_or_error(3) == [1, 1, 2, 3, 5, 5, 6, 7, 9, 9, 10, 11]
    assert "cannot read image" in labels_or_error(2)


# Shared memory and open files


def test_a_batch_that_cannot_be_shared_is_an_error():
    """As where /dev/shm is full. Python drops such a batch, and the loader waits for it forever."""

    def fill_up(_):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    loader = build_loader(RandomImages(), range(12), 4, 1, drop_last=False, worker_init_fn=fill_up)
    with pytest.raises(LoaderError, match=r"File too large.*--shm-size.*--ipc=host.*--num_workers 0") as info:
        list(loader)
    traceback.clear_frames(info.tb)


def test_too_few_open_files_are_an_error(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (32, 32))
    with pytest.raises(LoaderError, match=r"4 loader workers need \d+ open files; the limit is 32: .*ulimit -n"):
        build_loader(RandomImages(), [], 4, 4, drop_last=False)
    build_loader(RandomImages(), [], 4, 0, drop_last=False)


def test_the_soft_limit_on_open_files_is_raised():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, hard))
    try:
        build_loader(RandomImages(), [], 4, 2, drop_last=False)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 2 * (2 * 10 + 20)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_shared_memory_that_is_too_small_gives_a_warning():
    assert re.match(r"/dev/shm has \d+ MB left.* 2000000 MB: .*--shm-size", warn_if_shm_is_small(2**20 * 10**6, 1))
    assert warn_if_shm_is_small(1, 1) is None
    assert warn_if_shm_is_small(10**15, 0) is None


def test_labels_are_those_of_the_samples(cifar, tmp_path):
    folder = write_folder(tmp_path / "folder", ("ant", "bee"))
    for dataset in (
        Gratings("val", 30),
        build_dataset("CIFAR", "val", cifar[0]),
        build_dataset("IMNET", "val", folder),
    ):
        assert datasets.labels(dataset) == labels(dataset)
