"""Models are built as asked, and what cannot be built is refused in one line."""

import pytest
import timm
import torch
from families import FAMILIES, VIT, build, images

import main
import models
import utils


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("input_size", [64, 96])
@torch.no_grad()
def test_input_size_and_class_count_are_honored(name, input_size):
    assert build(name, 5, input_size=input_size)(images(input_size)).shape == (2, 5)


@torch.no_grad()
def test_img_size_among_the_kwargs_wins():
    model = build("deit_tiny_patch16_224", input_size=224, img_size=32)
    assert model(images(32)).shape == (2, 5)


def test_dropout_and_stochastic_depth_reach_the_model():
    model = models.build_model("deit_tiny_patch16_224", 5, input_size=64, kwargs=VIT, drop=0.3, drop_path=0.2)
    assert model.head_drop.p == 0.3
    assert model.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)


def test_families_without_stochastic_depth_can_be_built():
    with pytest.raises(TypeError, match="drop_path_rate"):
        timm.create_model("dla46_c", drop_path_rate=0.0)
    assert models.build_model("dla46_c", 3, drop=0.2).head_drop.p == 0.2
    with pytest.raises(utils.UserError, match=r"timm cannot build dla46_c: .*drop_path_rate"):
        models.build_model("dla46_c", 3, drop_path=0.1)


def test_an_unknown_model_argument_is_named():
    with pytest.raises(utils.UserError, match=r"timm cannot build deit_tiny_patch16_224: .*'dephts'"):
        models.build_model("deit_tiny_patch16_224", 5, kwargs={"dephts": 3})


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("deit_tinny_patch16_224", "deit_tiny_patch16_224"),
        ("cait_s24", "cait_s24_224"),
        ("swin_tiny_patch4_window7", "swin_tiny_patch4_window7_224"),
    ],
)
def test_an_unknown_model_is_refused_with_near_names(wrong, near):
    for check in (models.check_name, lambda name: models.build_model(name, 5)):
        with pytest.raises(utils.UserError, match=rf"timm has no model {wrong}: try .*\b{near}\b"):
            check(wrong)


def test_a_name_may_carry_a_pretrained_tag():
    models.check_name("swin_small_patch4_window7_224.ms_in1k")
    models.check_name("cait_s24_224")
    with pytest.raises(utils.UserError, match=r"Invalid pretrained tag \(nowhere\)"):
        models.check_name("cait_s24_224.nowhere")


def test_normalization_is_the_models_own():
    assert models.normalization(build("vit_tiny_patch16_224")) == ((0.5,) * 3, (0.5,) * 3)
    assert models.normalization(build("deit_tiny_patch16_224")) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_only_attention_position_and_heads_are_trained():
    model = build("deit_tiny_distilled_patch16_224")
    models.freeze_all_but_attention(model)
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad and ".attn." not in name}
    assert trained == {"pos_embed", "head", "head_dist"}
    assert all(p.requires_grad for name, p in model.named_parameters() if ".attn." in name)
    with pytest.raises(utils.UserError, match="resnet18 has no attention blocks"):
        models.freeze_all_but_attention(build("resnet18"))


# The teacher that the program builds


def teacher_of(path, teacher):
    """Return the frozen teacher that main.py builds beside a DeiT student."""
    kwargs = [f"{key}={value}" for key, value in VIT.items()]
    args = main.parse_args(
        [
            *("--data-set", "GRATINGS", "--input-size", "64", "--model", "deit_tiny_patch16_224"),
            *("--model-kwargs", *kwargs, "--distillation-type", "soft", "--s-id", "0", "--t-id", "1"),
            *("--teacher-model", teacher, "--teacher-kwargs", *kwargs, "--teacher-path", str(path)),
        ]
    )
    return main.build_teacher(args, 5, torch.device("cpu"), main.build_student(args, 5))


@torch.no_grad()
def test_a_teacher_gets_images_in_its_own_normalization(tmp_path):
    source = build("vit_tiny_patch16_224")
    torch.save(source.state_dict(), tmp_path / "teacher.pth")
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for_student, for_teacher = (
        (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        for mean, std in map(models.normalization, (build("deit_tiny_patch16_224"), source))
    )
    logits, maps = teacher_of(tmp_path / "teacher.pth", "vit_tiny_patch16_224")(for_student)
    torch.testing.assert_close(logits, source(for_teacher), rtol=1e-4, atol=1e-5)
    assert [tuple(each.shape) for each in maps] == [(2, 24, 4, 4)]


def test_a_teacher_of_equal_normalization_gets_images_as_is(tmp_path):
    torch.save(build("deit3_small_patch16_224").state_dict(), tmp_path / "teacher.pth")
    teacher = teacher_of(tmp_path / "teacher.pth", "deit3_small_patch16_224")
    assert teacher.scale is teacher.shift is None


def test_a_teacher_for_other_classes_is_refused(tmp_path):
    torch.save(build("vit_tiny_patch16_224", 7).state_dict(), tmp_path / "teacher.pth")
    with pytest.raises(utils.UserError, match="its head has 7 classes, 5 are needed"):
        teacher_of(tmp_path / "teacher.pth", "vit_tiny_patch16_224")
