"""Any timm model can teach: with its own classes and image size, with or without a head."""

import pytest
import timm
import torch
import torch.nn.functional as F
from families import FAMILIES, VIT, build, images, mae_file
from timm.data import ImageNetInfo

from builders import build_student, build_teacher
from flags import complete_args, complete_teacher, get_args_parser, parse_args
from utils import UserError
from weights import load_checkpoint

CLASSES = ["n02979186", "n01440764", "n03000684"]  # of Imagenette, not in the order of ImageNet
LOGITS = ["soft", "--w-fft", 0]


def teacher_for(classes, name, kwargs, *flags):
    """Return the frozen teacher that main.py builds for a tiny DeiT on 64 pixels; `flags` begin with the kind."""
    student, teacher = ([f"{key}={value!r}" for key, value in each.items()] for each in (VIT, kwargs))
    flags = ["--model-kwargs", *student, "--teacher-kwargs", *teacher, "--distillation-type", *map(str, flags)]
    args = parse_args(["--data-set", "GRATINGS", "--input-size", "64", "--teacher-model", name, *flags])
    file = load_checkpoint(args.teacher_path) if args.teacher_path else None
    return build_teacher(args, file, classes, torch.device("cpu"), build_student(args, len(classes)))


@pytest.fixture
def taught_by(tmp_path):
    """Return a function like `teacher_for` whose teacher takes its weights from a file of a model."""

    def teacher(source, taught, *flags, classes=None, **kwargs):
        torch.save({"model": source.state_dict(), "classes": classes}, tmp_path / "teacher.pth")
        name = source.pretrained_cfg["architecture"]
        return teacher_for(taught, name, FAMILIES[name] | kwargs, *flags, "--teacher-path", tmp_path / "teacher.pth")

    return teacher


def assert_logits(teacher, expected):
    torch.testing.assert_close(teacher(images())[0], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_imagenet_teacher_teaches_a_part_of_its_classes(taught_by, tmp_path):
    """This holds for timm's weights and for a file of them without class names."""
    source = build("resnet18", 1000)
    torch.save(source.state_dict(), tmp_path / "hub.pth")
    pretrained = FAMILIES["resnet18"] | {"pretrained_cfg_overlay": {"file": str(tmp_path / "hub.pth")}}
    index = [ImageNetInfo("imagenet-1k").label_names().index(name) for name in CLASSES]
    for teacher in (teacher_for(CLASSES, "resnet18", pretrained, *LOGITS), taught_by(source, CLASSES, *LOGITS)):
        assert_logits(teacher, source(images())[:, index])
    message = "the teacher resnet18: 2 of 2 classes are unknown to the model: ant, bee; .*fine-tune it .*--teacher-path"
    with pytest.raises(UserError, match=message):
        teacher_for(["ant", "bee"], "resnet18", pretrained, *LOGITS)


@torch.no_grad()
def test_a_teachers_checkpoint_brings_its_classes(taught_by):
    source, known = build("resnet18", 4), ["ant", "cat", "bee", "dog"]
    assert_logits(taught_by(source, ["ant", "bee"], *LOGITS, classes=known), source(images())[:, [0, 2]])
    with pytest.raises(UserError, match=r"--teacher-path .*: 1 of 2 classes are unknown to the model: wasp"):
        taught_by(source, ["ant", "wasp"], *LOGITS, classes=known)
    with pytest.raises(UserError, match="has 4 unnamed classes, but the data set has 2"):
        taught_by(source, ["ant", "bee"], *LOGITS)


ENCODERS = ["small_patch14_dinov2", "base_patch16_clip_224", "base_patch16_siglip_224", "base_patch16_224.mae"]


@pytest.mark.parametrize("name", ENCODERS)
def test_feature_distillation_needs_no_logits(name, tmp_path):
    """An encoder has no head, or one for texts; its file may have a decoder."""
    name, kwargs = f"vit_{name}", VIT | {"patch_size": 16}
    model = timm.create_model(name, num_classes=0, img_size=64, **kwargs)
    torch.save(mae_file(model), tmp_path / "encoder.pth")
    flags = (name, kwargs, "fft", "--s-id", 0, 1, "--t-id", 0, 1, "--teacher-path", tmp_path / "encoder.pth")
    _, maps = teacher_for(["ant", "bee"], *flags)(images())
    assert [tuple(each.shape) for each in maps] == [(2, 24, 4, 4)] * 2


def test_feature_distillation_ignores_the_teachers_classes(taught_by):
    """Also: `all` pairs models with equally many blocks."""
    ids = ["fft", "--s-id", "all", "--t-id", "all"]
    logits, maps = taught_by(build("vit_tiny_patch16_224", 7), ["ant", "bee"], *ids)(images())
    assert (logits.shape, len(maps)) == ((2, 7), VIT["depth"])


@torch.no_grad()
def test_a_teacher_gets_images_in_its_own_normalization(taught_by):
    source, pixels = build("vit_tiny_patch16_224", 2), images().sigmoid()
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    logits, _ = taught_by(source, ["ant", "bee"], *LOGITS)((pixels - mean) / std)  # as the student gets them
    torch.testing.assert_close(logits, source((pixels - 0.5) / 0.5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "size", "kwargs"), [("levit_128s", 224, {}), ("deit_tiny_patch16_224", 96, {"img_size": 96})]
)
@torch.no_grad()
def test_a_teacher_of_a_fixed_size_gets_resized_images(name, size, kwargs, taught_by, capsys):
    """The attention biases of LeViT cannot be resampled; of other models, arguments may fix the size."""
    source = build(name, 2, input_size=size)
    resized = F.interpolate(images(64), size=(size, size), mode="bicubic", antialias=True)
    assert_logits(taught_by(source, ["a", "b"], *LOGITS, **kwargs), source(resized))
    assert f"images of {size} pixels: the student's images (64 pixels) are resized for it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ("vit_tiny_patch16_224", {"depth": 3})),
        (["--teacher-kwargs", "depth=4"], ("vit_tiny_patch16_224", {"depth": 4})),
        (["--teacher-model", "cait_s24_224"], ("cait_s24_224", {})),
    ],
)
def test_a_teacher_is_the_model_of_its_run_unless_named(flags, expected):
    """With its arguments, which do not go with another model."""
    stored = {"model": "vit_tiny_patch16_224", "model_kwargs": {"depth": 3}}
    args = parse_args(["--data-set", "GRATINGS", "--distillation-type", *map(str, LOGITS), *flags])
    args = complete_teacher(complete_args(args, {}), stored)
    assert (args.teacher_model, args.teacher_kwargs) == expected


def test_the_help_explains_block_ids():
    words = " ".join(get_args_parser().format_help().split())
    assert "indices into timm's feature_info (ViT: blocks, Swin: stages), or all" in words
