"""Any timm model can teach: with its own classes and image size, with or without a head."""

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import STUDENT, TEACHER, tiny_run
from families import FAMILIES, VIT, build, images
from timm.data import ImageNetInfo

import main
from builders import build_student, build_teacher
from datasets import build_dataset
from export import export_model
from flags import complete_teacher, key_values, parse_args
from model_names import CONFIG_READERS
from utils import UserError

CLASSES = ["n02979186", "n01440764", "n03000684"]  # of Imagenette, not in the order of ImageNet
has_local_dir = pytest.mark.skipif(CONFIG_READERS["local-dir"] is None, reason="old timm")


def pairs(kwargs):
    return [f"{key}={value!r}" for key, value in kwargs.items()]


def teacher_flags(name, kwargs, kind, *more):
    """Return flags of a tiny DeiT on 64 pixels and of a teacher without a feature loss."""
    student = ["--data-set", "GRATINGS", "--input-size", "64", "--model-kwargs", *pairs(VIT), "--device", "cpu"]
    teacher = ["--teacher-model", name, "--teacher-kwargs", *pairs(kwargs), "--distillation-type", kind]
    return parse_args([*student, *teacher, *map(str, more)])


def teacher_for(classes, *flags):
    """Return the frozen teacher that main.py builds."""
    args = teacher_flags(*flags)
    return build_teacher(args, classes, torch.device("cpu"), build_student(args, len(classes)))


@pytest.fixture
def imagenet_teacher(tmp_path):
    """A teacher with 1000 classes, and arguments that make timm use its weights as pretrained ones."""
    source = build("resnet18", 1000)
    torch.save(source.state_dict(), tmp_path / "hub.pth")
    return source, FAMILIES["resnet18"] | {"pretrained_cfg_overlay": {"file": str(tmp_path / "hub.pth")}}


@torch.no_grad()
@pytest.mark.parametrize("from_file", [False, True])
def test_an_imagenet_teacher_teaches_a_part_of_its_classes(from_file, imagenet_teacher, tmp_path):
    """This holds for timm's weights and for a file of them without class names."""
    source, kwargs = imagenet_teacher
    more = ["--teacher-path", tmp_path / "hub.pth"] if from_file else []
    teacher = teacher_for(CLASSES, "resnet18", kwargs, "soft", "--w-fft", 0, *more)
    index = [ImageNetInfo("imagenet-1k").label_names().index(name) for name in CLASSES]
    torch.testing.assert_close(teacher(images())[0], source(images())[:, index], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_teachers_checkpoint_brings_its_classes(tmp_path):
    source = build("resnet18", 4)
    known = ["ant", "cat", "bee", "dog"]
    torch.save({"model": source.state_dict(), "classes": known}, tmp_path / "teacher.pth")
    flags = ("resnet18", FAMILIES["resnet18"], "soft", "--w-fft", 0, "--teacher-path", tmp_path / "teacher.pth")
    teacher = teacher_for(["ant", "bee"], *flags)
    torch.testing.assert_close(teacher(images())[0], source(images())[:, [0, 2]], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"--teacher-path .*: 1 of 2 classes are unknown to the model: wasp"):
        teacher_for(["ant", "wasp"], *flags)


def test_a_teacher_of_other_classes_is_refused(imagenet_teacher):
    message = "the teacher resnet18: 2 of 2 classes are unknown to the model: ant, bee; .*fine-tune it .*--teacher-path"
    with pytest.raises(UserError, match=message):
        teacher_for(["ant", "bee"], "resnet18", imagenet_teacher[1], "soft", "--w-fft", 0)


ENCODERS = ["small_patch14_dinov2", "base_patch16_clip_224", "base_patch16_siglip_224", "base_patch16_224.mae"]


@pytest.mark.parametrize("name", ENCODERS)
def test_feature_distillation_needs_no_logits(name, tmp_path):
    """An encoder has no head, or one for texts."""
    name, kwargs = f"vit_{name}", VIT | {"patch_size": 16}
    model = timm.create_model(name, num_classes=0, img_size=64, **kwargs)
    torch.save(model.state_dict(), tmp_path / "encoder.pth")
    flags = (name, kwargs, "fft", "--s-id", 0, 1, "--t-id", 0, 1, "--teacher-path", tmp_path / "encoder.pth")
    _, maps = teacher_for(["ant", "bee"], *flags)(images())
    assert [tuple(each.shape) for each in maps] == [(2, 24, 4, 4)] * 2


def test_feature_distillation_ignores_the_teachers_classes(tmp_path):
    torch.save(build("vit_tiny_patch16_224", 7).state_dict(), tmp_path / "teacher.pth")
    flags = ("vit_tiny_patch16_224", VIT, "fft", "--s-id", 0, "--t-id", 1, "--teacher-path", tmp_path / "teacher.pth")
    assert teacher_for(["ant", "bee"], *flags)(images())[0].shape == (2, 7)


@torch.no_grad()
def test_a_teacher_of_a_fixed_size_gets_resized_images(tmp_path, capsys):
    name, kwargs = "levit_128s", FAMILIES["levit_128s"]
    source = build(name, 2, input_size=224)
    torch.save(source.state_dict(), tmp_path / "teacher.pth")
    teacher = teacher_for(["a", "b"], name, kwargs, "soft", "--w-fft", 0, "--teacher-path", tmp_path / "teacher.pth")
    resized = F.interpolate(images(64), size=(224, 224), mode="bicubic", antialias=True)
    torch.testing.assert_close(teacher(images(64))[0], source(resized), rtol=1e-4, atol=1e-5)
    assert "takes images of 224 pixels: the student's images (64 pixels) are resized for it" in capsys.readouterr().out


@pytest.mark.slow
@has_local_dir
def test_exported_folders_are_models_and_teachers(tmp_path, capsys):
    """A folder of --export serves as --model and as --teacher-model."""
    for folder, name, kwargs in (("s", "deit_tiny_patch16_224", STUDENT), ("t", "cait_s24_224", TEACHER)):
        model = timm.create_model(name, num_classes=24, **key_values(kwargs))
        classes = None if folder == "s" else build_dataset("GRATINGS", "val", None).classes
        export_model(model, tmp_path / folder, input_size=32, classes=classes, model_args=key_values(kwargs))
    flags = tiny_run("--model", f"local-dir:{tmp_path / 's'}", "--model-kwargs", "--pretrained", "--dry-run")
    flags += ["--teacher-model", f"local-dir:{tmp_path / 't'}", "--distillation-type", "soft", "--s-id", 3, "--t-id", 5]
    main.main(parse_args(list(map(str, flags))))
    assert "blocks.3 [24, 4, 4] <- teacher blocks.5 [48, 4, 4]" in capsys.readouterr().out


def test_a_teacher_is_the_model_of_its_run_unless_named():
    """With its arguments, which do not go with another model."""
    stored = {"model": "vit_tiny_patch16_224", "model_kwargs": {"depth": 3}}
    kinds = ["--data-set", "GRATINGS", "--distillation-type", "soft", "--w-fft", "0"]
    for more, expected in (
        ([], ("vit_tiny_patch16_224", {"depth": 3})),
        (["--teacher-kwargs", "depth=4"], ("vit_tiny_patch16_224", {"depth": 4})),
        (["--teacher-model", "cait_s24_224"], ("cait_s24_224", {})),
    ):
        args = complete_teacher(parse_args([*kinds, *more]), stored)
        assert (args.teacher_model, args.teacher_kwargs) == expected


def test_all_pairs_models_with_equally_many_blocks(tmp_path):
    torch.save(build("vit_tiny_patch16_224").state_dict(), tmp_path / "teacher.pth")
    flags = ("vit_tiny_patch16_224", VIT, "fft", "--teacher-path", tmp_path / "teacher.pth", "--s-id", "all", "--t-id")
    assert len(teacher_for(["ant", "bee"], *flags, "all")(images())[1]) == VIT["depth"]


def test_the_help_explains_block_ids():
    assert "indices into timm's feature_info (ViT: blocks, Swin: stages), or all" in " ".join(
        main.get_args_parser().format_help().split()
    )
