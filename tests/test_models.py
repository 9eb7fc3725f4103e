"""Models are built as asked, and what cannot be built is refused in one line."""

import pytest
import timm
import torch
import torchvision
from families import FAMILIES, VIT, build, images

import models
import utils

DEIT = "deit_tiny_patch16_224"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_input_size_and_class_count_are_honored(name):
    assert build(name, 5, input_size=96)(images(96)).shape == (2, 5)


def test_options_reach_the_model():
    """`img_size` among the arguments wins over the input size."""
    kwargs = {**VIT, "img_size": 32}
    model = models.build_model(DEIT, 5, input_size=224, kwargs=kwargs, drop=0.3, drop_path=0.2)
    assert model.patch_embed.img_size == (32, 32)
    assert model.head_drop.p == 0.3
    assert model.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)


@pytest.mark.parametrize("name", ["dla46_c", "hrnet_w18_small"])
def test_families_without_stochastic_depth_can_be_built(name):
    assert models.build_model(name, 3).num_classes == 3


def test_stochastic_depth_is_off_unless_asked_for():
    """timm's Swin has it by default."""
    model = build("swin_tiny_patch4_window7_224")
    assert not [module for module in model.modules() if getattr(module, "drop_prob", 0)]


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        *((name, {"global_pool": ""}, "but logits are needed") for name in (DEIT, "resnet18", "convnext_atto")),
        ("resnet18", {"features_only": True}, "but logits are needed"),
        (DEIT, {"dephts": 3}, "'dephts'"),
        ("dla46_c", {"drop_path_rate": 0.1}, "drop_path_rate"),
    ],
)
def test_wrong_arguments_of_a_model_are_refused(name, kwargs, message):
    with pytest.raises(utils.UserError, match=f"timm cannot build {name}: .*{message}"):
        models.build_model(name, 5, kwargs=FAMILIES.get(name, {}) | kwargs)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/resnet", "timm has no model timm/resnet: try "),
        ("s3:owner/name", "this timm has no s3 models, only hf-hub"),
        ("local-dir:nowhere", "cannot read its config.json: .*nowhere|has no local-dir models"),
    ],
)
def test_a_name_that_no_source_has_is_refused(name, message):
    with pytest.raises(utils.UserError, match=message):
        models.build_model(name, 5)


def test_a_name_may_have_a_prefix_and_a_pretrained_tag():
    assert models.build_model("timm/resnet18.a1_in1k", 5, kwargs=FAMILIES["resnet18"]).num_classes == 5


@torch.no_grad()
def test_a_model_registered_by_the_user_builds():
    def my_resnet(pretrained=False, num_classes=1000, **kwargs):
        return torchvision.models.resnet18(num_classes=num_classes)

    timm.models.register_model(my_resnet)
    model = models.build_model("my_resnet", 5, input_size=64)
    assert model.eval()(images()).shape == (2, 5)
    assert models.normalization(model) == IMAGENET
    note = models.load_weights(model, models.build_model("my_resnet", 7).state_dict(), head="fresh")
    assert note == "the file's head has 7 classes, not 5; a fresh head is trained"


def test_only_attention_position_and_heads_are_trained():
    model = build("deit_tiny_distilled_patch16_224")
    models.freeze_all_but_attention(model)
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad and ".attn." not in name}
    assert trained == {"pos_embed", "head", "head_dist"}
    assert all(p.requires_grad for name, p in model.named_parameters() if ".attn." in name)


@pytest.mark.parametrize(
    ("config", "num_classes", "pretrained", "name", "names"),
    [
        ({}, 1000, True, "resnet18", ["n01440764", "n01443537"]),
        ({}, 1000, True, "hf-hub:timm/resnet18.a1_in1k", ["n01440764", "n01443537"]),
        ({}, 1000, True, "hf-hub:owner/name", None),  # ImageNet's names are for timm's own weights only
        ({"label_names": ["cat", "dog"]}, 2, True, "resnet18", ["cat", "dog"]),
        ({"label_names": {"1": "dog", "0": "cat"}}, 2, True, "resnet18", ["cat", "dog"]),
        ({}, 2, True, "resnet18", None),  # unknown classes
        ({}, 1000, False, "resnet18", None),  # random weights know no classes
        ({"num_classes": 3, "label_names": ["cat", "dog", "cow"]}, 2, True, "resnet18", None),  # a fresh head
    ],
)
def test_class_names_are_those_of_the_weights(config, num_classes, pretrained, name, names):
    model = build("resnet18", num_classes)
    model.pretrained_cfg |= {"num_classes": num_classes, **config}
    found = models.class_names(model, name, pretrained, num_classes)
    assert (found and found[:2]) == names
    assert found is None or len(found) == num_classes
