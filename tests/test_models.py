"""Models are built as asked, and what cannot be built is refused in one line."""

import pytest
import timm
import torch
import torchvision
from families import FAMILIES, VIT, build, images

import builders
import models
import utils
from flags import parse_args


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


@pytest.mark.parametrize("name", ["dla46_c", "hrnet_w18_small"])
def test_families_without_stochastic_depth_can_be_built(name):
    assert models.build_model(name, 3).num_classes == 3


def test_stochastic_depth_is_refused_where_a_family_has_none():
    with pytest.raises(utils.UserError, match=r"timm cannot build dla46_c: .*drop_path_rate"):
        models.build_model("dla46_c", 3, drop_path=0.1)


def test_stochastic_depth_is_off_unless_asked_for():
    """timm's Swin has it by default."""
    model = build("swin_tiny_patch4_window7_224")
    assert not [module for module in model.modules() if getattr(module, "drop_prob", 0)]


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "resnet18", "convnext_atto"])
@pytest.mark.parametrize("kwargs", [{"global_pool": ""}, {"features_only": True}])
def test_models_without_logits_are_refused(name, kwargs):
    with pytest.raises(utils.UserError, match=f"timm cannot build {name}: .*but logits are needed"):
        models.build_model(name, 5, kwargs=FAMILIES[name] | kwargs)


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


@pytest.mark.parametrize(("name", "found"), [("resnet18", True), ("deit_tiny_patch16_224", False)])
def test_batch_norm_is_found(name, found):
    assert models.has_batch_norm(build(name)) is found


# Sources of models


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf-hub:resnet18", "expected a name of timm, hf-hub:owner/name or local-dir:FOLDER"),
        ("s3:owner/name", "expected a name of timm, hf-hub:owner/name or local-dir:FOLDER"),
        ("timm/resnet", "timm has no model timm/resnet: try "),
        ("local-dir:nowhere", "no nowhere/config.json|has no local-dir: models"),
    ],
)
def test_a_wrong_source_is_refused(name, message):
    with pytest.raises(utils.UserError, match=message):
        models.check_name(name)


def test_a_name_may_carry_a_source():
    models.check_name("hf-hub:owner/name")
    models.check_name("timm/resnet18.a1_in1k")
    assert models.build_model("timm/resnet18.a1_in1k", 5, kwargs=FAMILIES["resnet18"]).num_classes == 5


@torch.no_grad()
def test_a_model_registered_by_the_user_builds():
    def my_resnet(pretrained=False, num_classes=1000, **kwargs):
        model = torchvision.models.resnet18(num_classes=num_classes)
        model.feature_info = [
            {"module": f"layer{i}", "num_chs": 32 * 2**i, "reduction": 2 ** (i + 1)} for i in (1, 2, 3, 4)
        ]
        return model

    timm.models.register_model(my_resnet)
    model = models.build_model("my_resnet", 5, input_size=64)
    assert model.eval()(images()).shape == (2, 5)
    assert models.normalization(model) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    note = models.load_weights(model, models.build_model("my_resnet", 7).state_dict(), head="fresh")
    assert note == "the file's head has 7 classes, not 5; a fresh head is trained"


# Names of classes


def pretrained_file(path, name, num_classes, **config):
    """Return arguments with which timm takes random weights from a file for its own pretrained ones."""
    torch.save(build(name, num_classes).state_dict(), path)
    return FAMILIES[name] | {"pretrained_cfg_overlay": {"file": str(path), "num_classes": num_classes, **config}}


@pytest.mark.parametrize(
    ("config", "num_classes", "pretrained", "names"),
    [
        ({}, 1000, True, ["n01440764", "n01443537"]),
        ({"label_names": ["cat", "dog"]}, 2, True, ["cat", "dog"]),
        ({"label_names": {"1": "dog", "0": "cat"}}, 2, True, ["cat", "dog"]),
        ({}, 2, True, None),  # unknown classes
        ({}, 1000, False, None),  # random weights know no classes
        ({"num_classes": 3, "label_names": ["cat", "dog", "cow"]}, 2, True, None),  # a fresh head
    ],
)
def test_class_names_are_those_of_the_weights(config, num_classes, pretrained, names, tmp_path):
    kwargs = pretrained_file(tmp_path / "weights.pth", "resnet18", **{"num_classes": num_classes} | config)
    model = models.build_model("resnet18", num_classes, kwargs=kwargs, pretrained=pretrained)
    found = models.class_names(model, "resnet18", pretrained, num_classes)
    assert (found and found[:2]) == names
    assert found is None or len(found) == num_classes


def test_imagenet_names_are_for_timms_own_weights_only(tmp_path):
    kwargs = pretrained_file(tmp_path / "weights.pth", "resnet18", 1000)
    model = models.build_model("resnet18", 1000, kwargs=kwargs, pretrained=True)
    assert models.class_names(model, "hf-hub:timm/resnet18.a1_in1k", True, 1000)[0] == "n01440764"
    assert models.class_names(model, "hf-hub:owner/name", True, 1000) is None


# Teachers


@pytest.mark.parametrize(
    ("name", "kwargs", "input_size", "size"),
    [
        ("deit_tiny_patch16_224", VIT, 96, 96),  # built at our size
        ("deit_tiny_patch16_224", {**VIT, "img_size": 64}, 96, 64),  # as asked
        ("levit_128s", FAMILIES["levit_128s"], 64, 224),  # cannot resample its attention biases
        ("resnet18", FAMILIES["resnet18"], 64, 64),
    ],
)
@torch.no_grad()
def test_a_teacher_is_built_at_our_size_or_its_own(name, kwargs, input_size, size):
    weights = models.build_model(name, 0, input_size=size, kwargs=kwargs).state_dict()
    model, found = models.build_teacher(name, 0, input_size=input_size, kwargs=kwargs, weights=weights)
    assert found == size
    assert not model.training
    assert model(images(size)).ndim == 2


def test_a_teacher_of_another_model_is_refused():
    weights = build("resnet18").state_dict()
    with pytest.raises(utils.UserError, match="the weights do not fit deit_tiny_patch16_224"):
        models.build_teacher("deit_tiny_patch16_224", 5, input_size=64, kwargs=VIT, weights=weights)


# The teacher that the program builds


def teacher_of(path, teacher):
    """Return the frozen teacher that main.py builds beside a DeiT student."""
    kwargs = [f"{key}={value}" for key, value in VIT.items()]
    args = parse_args(
        [
            *("--data-set", "GRATINGS", "--input-size", "64", "--model", "deit_tiny_patch16_224"),
            *("--model-kwargs", *kwargs, "--distillation-type", "soft", "--s-id", "0", "--t-id", "1"),
            *("--teacher-model", teacher, "--teacher-kwargs", *kwargs, "--teacher-path", str(path)),
        ]
    )
    return builders.build_teacher(args, list("abcde"), torch.device("cpu"), builders.build_student(args, 5))


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
    with pytest.raises(utils.UserError, match="has 7 unnamed classes, but the data set has 5"):
        teacher_of(tmp_path / "teacher.pth", "vit_tiny_patch16_224")
