"""Data sets and their labels, DeiT's transforms, seeds per sample, damaged files, loaders."""

import hashlib
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
from conftest import jpeg_folder
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.auto_augment import AutoAugment, RandAugment
from timm.data.transforms import RandomResizedCropAndInterpolation as RandomResizedCrop
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets import CIFAR100, ImageFolder
from torchvision.datasets.folder import default_loader

import datasets
from datasets import BadImageError, SeededDataset, build_dataset, eval_transform, train_transform
from gratings import GRATINGS_SIZES, Gratings
from loaders import LoaderError, build_loader, warn_if_shm_is_small
from samplers import RASampler, SeededSampler


def picture(seed, size=(50, 40)):
    """Return a smooth random RGB image, on which resampling matters."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def labels(dataset):
    return [dataset[i][1] for i in range(len(dataset))]


def assert_same_pixels(image, expected):
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


def test_gratings_have_the_same_pixels_on_every_machine():
    digest = hashlib.sha256()
    for split, index in (("train", 0), ("train", 1), ("train", 5999), ("val", 0), ("val", 100)):
        digest.update(np.asarray(Gratings(split, 6000)[index][0]).tobytes())
    assert digest.hexdigest() == "a96477f328555a3e6ba3bd307866af6dc1ca3fdd31ef28181766799f60e2af0a"


@pytest.mark.parametrize(("length", "kept"), [(10_000, True), (10_001, False)])
def test_small_gratings_are_kept_and_do_not_change(length, kept):
    images = Gratings("train", length)
    image = images[7][0]
    before = image.copy()
    image.paste("red", (0, 0, 32, 32))
    assert_same_pixels(images[7][0], before)
    assert (images._computed is not None) == kept


def test_gratings_are_balanced_rgb_images():
    assert {split: len(build_dataset("GRATINGS", split, None)) for split in GRATINGS_SIZES} == GRATINGS_SIZES
    images = build_dataset("GRATINGS", "val", None, num_images=48)
    assert len(images.classes) == len(set(images.classes)) == 24
    assert Counter(labels(images)) == dict.fromkeys(range(24), 2)
    image, label = images[30]
    assert (image.mode, image.size, label) == ("RGB", (32, 32), 6)


def test_class_folders_list_the_samples_of_torchvision(tmp_path):
    jpeg_folder(tmp_path, ["b", "a", "a/z", "a/y-"], images=2)
    (tmp_path / "train/a/readme.txt").write_text("no image")
    (tmp_path / "train/a/0.jpg").rename(tmp_path / "train/a/z.JPEG")
    images, reference = build_dataset("IMNET", "train", tmp_path), ImageFolder(tmp_path / "train")
    assert (images.samples, images.classes) == (reference.samples, reference.classes)
    assert_same_pixels(images[7][0], reference[7][0])
    assert build_dataset("IMNET", "val", tmp_path, lambda image: image.size)[7] == ((40, 30), 1)


@pytest.mark.parametrize(
    ("splits", "folders", "classes"),
    [
        (["val"], map(str, range(11)), [str(i) for i in range(11)]),
        (["val"], ["a", "9", "10"], ["10", "9", "a"]),
        (["val"], ["cafe\u0301", "tea"], ["caf\u00e9", "tea"]),
        (["validation"], ["ant"], ["ant"]),
        (["val", "validation/no"], ["bee"], ["bee"]),
    ],
    ids=["numbers", "not all numbers", "Unicode", "validation", "both"],
)
def test_classes_are_those_of_the_folders(splits, folders, classes, tmp_path):
    images = build_dataset("IMNET", "val", jpeg_folder(tmp_path, list(folders), splits, images=1))
    assert (images.classes, labels(images)) == (classes, list(range(len(classes))))


def test_hidden_folders_are_no_classes(tmp_path, capsys):
    jpeg_folder(tmp_path, ["ant", ".ipynb_checkpoints", "ant/.ipynb_checkpoints"], images=2)
    (tmp_path / "val/ant/._0.jpg").write_text("what macOS adds to archives")
    images = build_dataset("IMNET", "val", tmp_path)
    assert (images.classes, labels(images)) == (["ant"], [0, 0])
    assert capsys.readouterr().out == f"{tmp_path}/val: skipping hidden folders: .ipynb_checkpoints\n"


def test_links_to_a_parent_repeat_no_images(tmp_path):
    jpeg_folder(tmp_path, ["ant", "bee", "elsewhere/more"], ["val"], images=2)
    (tmp_path / "val/elsewhere").rename(tmp_path / "elsewhere")
    links = {"val/ant/up": "..", "val/ant/self": ".", "val/bee/more": "../../elsewhere/more", "elsewhere/more/up": ".."}
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    assert labels(build_dataset("IMNET", "val", tmp_path)) == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("found", "known", "expected"),
    [
        (["cow", "ant"], ["ant", "bee", "cow"], [2, 0]),
        (["0", "1", "2", "10"], ["0", "1", "10", "2"], [0, 1, 3, 2]),
        (["000", "002", "001"], ["ant", "bee", "cow"], [0, 2, 1]),
        (["cafe\u0301"], ["tea", "caf\u00e9"], [1]),
        (["ant"], ["crane", "ant", "crane"], [1]),
    ],
    ids=["subset", "own numbers", "numbers", "Unicode", "twice elsewhere"],
)
def test_classes_are_matched_by_name(found, known, expected):
    assert datasets.match_classes(found, known) == expected


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
        datasets.match_classes(found, known)


def test_cifar_reads_the_files_of_its_authors(tmp_path, monkeypatch):
    """Folders of one image; torchvision does not check their sums."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    monkeypatch.setattr(CIFAR100, "train_list", [["train", ""]])
    one = {"data": np.zeros((1, 3072), np.uint8)}
    files = {"train": one | {"fine_labels": [0]}, "test": one | {"fine_labels": [1]}}
    files["meta"] = {"fine_label_names": [f"class{i}" for i in range(100)]}
    (tmp_path / CIFAR100.base_folder).mkdir()
    for name, content in files.items():
        (tmp_path / CIFAR100.base_folder / name).write_bytes(pickle.dumps(content))
    train, val = (build_dataset("CIFAR", split, tmp_path, lambda image: image.size) for split in ("train", "val"))
    assert (train[0], val[0], len(val.classes)) == (((32, 32), 0), ((32, 32), 1), 100)


@pytest.fixture(params=[("INAT", 2018), ("INAT19", 2019)])
def inat(tmp_path, request):
    """iNaturalist in DeiT's layout: four species of two families; the first annotation is of species 3."""
    name, year = request.param
    categories = [{"id": i, "name": f"species{i}", "family": f"family{i // 2}", "genus": i} for i in range(4)]
    (tmp_path / "categories.json").write_text(json.dumps(categories))
    jpeg_folder(tmp_path, ["0", "2", "3"], [f"train_val{year}"])
    for split, species in (("train", [3, 0, 3, 2]), ("val", [2, 3, 0])):
        images = [{"file_name": f"train_val{year}/Animals/{category}/{i}.jpg"} for i, category in enumerate(species)]
        listing = {"images": images, "annotations": [{"category_id": category} for category in species]}
        (tmp_path / f"{split}{year}.json").write_text(json.dumps(listing))
    return name, tmp_path, year


def test_inat_numbers_the_levels_as_deit_does(inat):
    name, path, _ = inat
    train, val = (build_dataset(name, split, path) for split in ("train", "val"))
    assert train.classes == val.classes == ["species3", "species0", "species2"]  # in the order of the annotations
    assert (labels(train), labels(val)) == ([0, 1, 0, 2], [2, 0, 1])
    families = build_dataset(name, "val", path, inat_category="family")
    assert (families.classes, labels(families)) == (["family1", "family0"], [0, 0, 1])


def test_inat_finds_images_where_file_name_says(inat):
    name, path, year = inat
    (path / f"train_val{year}" / "Animals").mkdir()
    (path / f"train_val{year}" / "3").rename(path / f"train_val{year}" / "Animals" / "3")
    assert build_dataset(name, "train", path, transform=lambda image: image.size)[0] == ((40, 30), 0)


def test_inat_names_the_levels_that_exist(inat):
    name, path, _ = inat
    with pytest.raises(ValueError, match=r"--inat-category order is not in .*categories\.json.*family, genus"):
        build_dataset(name, "train", path, inat_category="order")


# Decoding


def test_the_last_image_is_decoded_once(tmp_path):
    paths = [tmp_path / f"{mode}.jpg" for mode in ("RGB", "CMYK")]
    for path in paths:
        picture(0).convert(path.stem).save(path)
    load = datasets.LastImage()
    first = load(paths[0])
    assert load(paths[0]) is first
    for path in (paths[1], paths[0]):
        assert_same_pixels(load(path), default_loader(path))
    assert load(paths[0]) is not first


RAMP = np.linspace(0, 65535, 256).reshape(16, 16)  # every 8-bit level once


@pytest.mark.parametrize(
    ("pixels", "mode"),
    [
        (RAMP.astype("<u2"), "I;16"),
        (RAMP.astype(">u2"), "I;16B"),
        (RAMP.astype("<i4"), "I"),
        (RAMP.astype("<i4") // 257, "I"),
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
    loaded = datasets.LastImage()(tmp_path / "image.tif")
    assert loaded.mode == "RGB"
    assert_same_pixels(loaded, np.arange(256).reshape(16, 16, 1).repeat(3, axis=2))


@pytest.mark.filterwarnings("error")
def test_a_damaged_file_is_named_every_time(tmp_path):
    picture(0).save(tmp_path / "good.jpg")
    (tmp_path / "bad.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:300])
    Image.fromarray(np.array([[0, np.nan]], dtype=np.float32)).save(tmp_path / "nan.tif")
    Image.fromarray(np.full((2, 2), -3, dtype=np.float32)).save(tmp_path / "constant.tif")
    load = datasets.LastImage()
    # The second time must not find half an image.
    for name, reason in (("bad.jpg", ""), ("bad.jpg", ""), ("nan.tif", "pixels that are not finite")):
        with pytest.raises(BadImageError, match=f"cannot read image .*{name}: .*{reason}"):
            load(tmp_path / name)
    assert load(tmp_path / "good.jpg").size == (50, 40)
    assert load(tmp_path / "constant.tif").getextrema() == ((0, 0),) * 3  # and no division by zero


# Transforms


def test_prepare_gives_the_bits_of_totensor_and_normalize():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    expected = torch.stack([reference(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in pixels])
    torch.testing.assert_close(datasets.Prepare(mean, std)(pixels), expected, rtol=0, atol=0)
    assert (pixels == torch.arange(256).view(16, 16)).all()


def test_prepare_erases_only_in_training():
    prepare = datasets.Prepare([0.5] * 3, [0.25] * 3, reprob=1.0, remode="const", recount=2)
    pixels = torch.full((4, 3, 24, 24), 200, dtype=torch.uint8)
    whole = datasets.Prepare([0.5] * 3, [0.25] * 3)(pixels)
    torch.testing.assert_close(prepare.eval()(pixels), whole, rtol=0, atol=0)
    images = prepare.train()(pixels)
    erased = (images != whole).flatten(1).float().mean(dim=1)
    assert ((erased > 0) & (erased < 0.9)).all()
    assert (images[images != whole] == 0).all()


def kinds(transform):
    """Return the classes of a transform's parts, those of a nested composition as a tuple."""
    return [tuple(kinds(part)) if isinstance(part, transforms.Compose) else type(part) for part in transform.transforms]


CROP, SIMPLE_CROP = RandomResizedCrop, (transforms.Resize, transforms.RandomCrop)
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
    [(32, {}, "constant"), (28, {"interpolation": "bilinear"}, "constant"), (33, {"simple_crop": True}, "reflect")],
)
def test_small_images_and_simple_crop_are_padded(input_size, options, padding_mode):
    resize, crop = train_transform(input_size, **options).transforms[0].transforms
    assert (resize.size, resize.interpolation.value) == (input_size, options.get("interpolation", "bicubic"))
    assert (crop.size, crop.padding, crop.padding_mode) == ((input_size, input_size), 4, padding_mode)


@pytest.mark.parametrize(("interpolation", "value"), [("bilinear", "bilinear"), ("random", None)])
def test_random_crops_are_interpolated_as_asked(interpolation, value):
    crop = train_transform(64, interpolation=interpolation).transforms[0]
    assert getattr(crop.interpolation, "value", None) == value


@pytest.mark.parametrize(
    ("size", "tolerance"),  # PIL rounds the position of a part
    [((500, 375), 0), ((333, 500), 0), ((1, 255), 0), ((1798, 7), 2), ((2, 3001), 2)],
)
@pytest.mark.parametrize(
    ("input_size", "ratio", "resized"), [(224, 0.875, 256), (64, 0.875, 73), (65, 0.96, 67), (32, 0.875, 32)]
)
def test_evaluation_has_the_bits_of_resize_and_center_crop(size, tolerance, input_size, ratio, resized):
    """The shorter side becomes input_size / ratio; images of 32 pixels are taken whole."""
    bicubic = transforms.InterpolationMode.BICUBIC
    reference = transforms.Compose([transforms.Resize(resized, bicubic), transforms.CenterCrop(input_size)])
    image = picture(1, size)
    expected = np.asarray(reference(image)).transpose(2, 0, 1).astype(int)
    assert abs(np.asarray(eval_transform(input_size, ratio)(image)) - expected).max() <= tolerance


@pytest.mark.parametrize("size", [(20_000, 2), (1, 5000)])
def test_a_panorama_takes_little_memory(size):
    """Resized as a whole it takes up to 2 GB. With 256 MiB of address space left that is a MemoryError."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**28, limits[1]))
    try:
        eval_transform(224)(Image.new("RGB", size))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


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


def test_samples_depend_on_their_seed_and_not_on_the_workers():
    def epoch(num_workers):
        sampler = SeededSampler(RASampler(range(12), 1, 0), seed=5, rank=0)
        sampler.set_epoch(1)
        return list(build_loader(SeededDataset(RandomImages()), sampler, 4, num_workers, drop_last=True))

    torch.manual_seed(99)
    alone = epoch(0)
    torch.manual_seed(1)
    torch.testing.assert_close(epoch(2), alone, rtol=0, atol=0)
    images, numbers = alone[0]
    assert (images.dtype, numbers.dtype, images.shape) == (torch.uint8, torch.int64, (4, 3, 24, 24))
    assert numbers[0] == numbers[1] == numbers[2]  # the copies of one image, each augmented anew
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize(("drop_last", "sizes"), [(True, [4, 4]), (False, [4, 4, 2])])
def test_the_last_batch_is_dropped_where_asked(drop_last, sizes):
    loader = build_loader(RandomImages(), range(10), 4, 0, drop_last=drop_last)
    assert [len(batch) for _, batch in loader] == sizes


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
    with pytest.raises(BadImageError):  # not in search of a readable one forever
        SeededDataset(RandomImages(range(12)), bad_images=99)[0, 0]


def test_a_sample_of_the_files_is_checked(tmp_path):
    jpeg_folder(tmp_path, splits=["val"])
    images = build_dataset("IMNET", "val", tmp_path, transform=lambda _: pytest.fail("only decoding is needed"))
    (tmp_path / "val/bee/0.jpg").write_text("no image")
    datasets.check_images(images, num=1)
    with pytest.raises(BadImageError, match=r"cannot read image .*bee/0\.jpg"):
        datasets.check_images(images, num=2)
    datasets.check_images(Gratings("val", 1))


def test_damaged_files_are_counted_over_the_workers():
    def epoch(bad_images):
        images = SeededDataset(RandomImages(bad={0, 4, 8}), bad_images)
        loader = build_loader(images, [(i, i) for i in range(12)], 2, 2, drop_last=False)
        return torch.cat([batch for _, batch in loader]).tolist()

    assert epoch(3) == [1, 1, 2, 3, 5, 5, 6, 7, 9, 9, 10, 11]
    with pytest.raises(BadImageError, match="cannot read image") as error:
        epoch(2)
    # Its frames hold the workers in a cycle, and the garbage collector takes five seconds to stop each.
    traceback.clear_frames(error.tb)


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
        loader = build_loader(RandomImages(), [], 4, 2, drop_last=False)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 2 * (2 * 10 + 20)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert loader.timeout == 0  # the default waits as long as the workers live


def test_shared_memory_that_is_too_small_gives_a_warning():
    assert re.match(r"/dev/shm has \d+ MB left.* 2000000 MB: .*--shm-size", warn_if_shm_is_small(2**20 * 10**6, 1))
    assert warn_if_shm_is_small(1, 1) is None
    assert warn_if_shm_is_small(10**15, 0) is None


def test_labels_are_those_of_the_samples(tmp_path):
    for dataset in (Gratings("val", 30), build_dataset("IMNET", "val", jpeg_folder(tmp_path, ["ant", "bee"]))):
        assert datasets.labels(dataset) == labels(dataset)
