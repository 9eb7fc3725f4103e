"""Building timm's families, loading every kind of weights file into them, and the teacher that the program makes."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import main
import models
import utils

VIT = {"embed_dim": 24, "depth": 2, "num_heads": 3}
CAIT = {"embed_dim": 24, "depth": 2, "num_heads": 3}
SWIN = {"window_size": 2, "embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4)}
RESNET = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}
FAMILIES = {
    "deit_tiny_patch16_224": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "deit3_small_patch16_224": VIT,
    "vit_tiny_patch16_224": VIT,
    "cait_s24_224": CAIT,
    "swin_tiny_patch4_window7_224": SWIN,
    "resnet18": RESNET,
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
    "regnety_002": {},
}


def build(name, num_classes=5, *, seed=0, input_size=64, **kwargs):
    """A tiny model in eval mode whose every parameter is random: a fresh model has zeros that hide mistakes."""
    torch.manual_seed(seed)
    model = models.build_model(name, num_classes, input_size=input_size, kwargs=FAMILIES[name] | kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def images(size=64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same_function(one, other, size=64):
    torch.testing.assert_close(one(images(size)), other(images(size)), rtol=0, atol=0)


# Building


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("input_size", [64, 96])
@torch.no_grad()
def test_every_family_takes_the_input_size_and_the_class_count(name, input_size):
    model = build(name, 5, input_size=input_size)
    assert model(images(input_size)).shape == (2, 5)


@torch.no_grad()
def test_an_image_size_among_the_keyword_arguments_wins():
    model = build("deit_tiny_patch16_224", input_size=224, img_size=32)
    assert model(images(32)).shape == (2, 5)


def test_dropout_and_stochastic_depth_reach_the_model():
    model = models.build_model("deit_tiny_patch16_224", 5, input_size=64, kwargs=VIT, drop=0.3, drop_path=0.2)
    assert model.head_drop.p == 0.3
    assert model.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)


def test_a_family_without_stochastic_depth_is_built_where_none_is_asked():
    with pytest.raises(TypeError, match="drop_path_rate"):
        timm.create_model("dla46_c", drop_path_rate=0.0)
    assert models.build_model("dla46_c", 3, drop=0.2).head_drop.p == 0.2
    with pytest.raises(utils.UserError, match=r"timm cannot build dla46_c: .*drop_path_rate"):
        models.build_model("dla46_c", 3, drop_path=0.1)


def test_an_argument_that_the_model_does_not_have_is_named():
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
def test_an_unknown_model_is_refused_with_the_nearest_names(wrong, near):
    for check in (models.check_name, lambda name: models.build_model(name, 5)):
        with pytest.raises(utils.UserError, match=rf"timm has no model {wrong}: try .*\b{near}\b"):
            check(wrong)


def test_a_name_may_carry_the_tag_of_its_weights():
    models.check_name("swin_small_patch4_window7_224.ms_in1k")
    models.check_name("cait_s24_224")


# Loading


@pytest.mark.parametrize("name", FAMILIES)
def test_the_weights_of_a_model_fit_its_twin(name):
    source, model = build(name), build(name, seed=1)
    assert models.load_weights(model, source.state_dict()) is None
    assert_same_function(model, source)


@pytest.mark.parametrize("layout", ["bare", "DeiT", "state_dict", "module", "compiled", "safetensors"])
def test_every_kind_of_file_is_read(layout, tmp_path):
    source, model = build("deit_tiny_patch16_224"), build("deit_tiny_patch16_224", seed=1)
    weights, path = source.state_dict(), tmp_path / "weights.pth"
    prefixed = {f"module._orig_mod.{key}": value for key, value in weights.items()}
    if layout == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(weights, path)
    else:
        content = {
            "bare": weights,
            "DeiT": {"model": weights, "optimizer": {"state": {}}, "epoch": 3, "args": {"lr": 0.1}},
            "state_dict": {"state_dict": weights},
            "module": {"model": {f"module.{key}": value for key, value in weights.items()}},
            "compiled": {"model": prefixed},
        }
        torch.save(content[layout], path)
    models.load_weights(model, utils.extract_weights(utils.load_checkpoint(path)))
    assert_same_function(model, source)


def test_the_moving_average_is_taken_where_it_is_asked_for():
    one, two = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    for key in ("model_ema", "state_dict_ema"):
        assert utils.extract_weights({"model": one, key: two}, ema=True)["w"] == 1
    with pytest.raises(utils.UserError, match="holds no moving average"):
        utils.extract_weights({"model": one, "model_ema": None}, ema=True)
    with pytest.raises(utils.UserError, match="holds no weights"):
        utils.extract_weights({"epoch": 3})


def test_files_of_the_authors_of_swin_load():
    """Their stages end with the downsampling that timm's begin with, and their head is no module of its own."""
    source, model = build("swin_tiny_patch4_window7_224"), build("swin_tiny_patch4_window7_224", seed=1)
    weights = {}
    for key, value in source.state_dict().items():
        key = re.sub(r"layers\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", key)
        weights[key.replace("head.fc.", "head.")] = value
    weights["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(4, 4, dtype=torch.int64)
    assert "layers.0.downsample.reduction.weight" in weights
    models.load_weights(model, weights)
    assert_same_function(model, source)


def grow(embedding, prefix, side):
    """Position embeddings (1, N, C) on a side x side grid: bicubic for the patches, nothing for the prefix."""
    start, grid = embedding[:, :prefix], embedding[:, prefix:]
    old = int(grid.shape[1] ** 0.5)
    grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True)
    return torch.cat([start, grid.flatten(2).transpose(1, 2)], dim=1)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("deit_tiny_patch16_224", 1),
        ("deit_tiny_distilled_patch16_224", 2),
        ("deit3_small_patch16_224", 0),
        ("cait_s24_224", 0),
    ],
)
@pytest.mark.parametrize(("old", "new"), [(64, 96), (96, 64)])
@torch.no_grad()
def test_position_embeddings_are_resampled_to_another_image_size(name, prefix, old, new):
    source, model = build(name, input_size=old), build(name, seed=1, input_size=new)
    models.load_weights(model, source.state_dict())
    expected = grow(source.pos_embed, prefix, new // 16)
    torch.testing.assert_close(model.pos_embed, expected, rtol=1e-5, atol=1e-6)
    for key, value in model.state_dict().items():
        if key != "pos_embed":
            torch.testing.assert_close(value, source.state_dict()[key], rtol=0, atol=0)
    assert model(images(new)).shape == (2, 5)


@torch.no_grad()
def test_weights_of_the_hub_are_resampled_to_another_image_size(tmp_path):
    source = build("cait_s24_224", input_size=224)
    torch.save(source.state_dict(), tmp_path / "hub.pth")
    kwargs = {**CAIT, "pretrained_cfg_overlay": {"file": str(tmp_path / "hub.pth"), "num_classes": 5}}
    model = models.build_model("cait_s24_224", 5, input_size=64, kwargs=kwargs, pretrained=True)
    torch.testing.assert_close(model.pos_embed, grow(source.pos_embed, 0, 4), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.head.weight, source.head.weight, rtol=0, atol=0)


def test_the_authors_own_names_of_the_layer_scale_of_deit3_load():
    source, model = build("deit3_small_patch16_224"), build("deit3_small_patch16_224", seed=1)
    weights = {re.sub(r"ls([12])\.gamma", r"gamma_\1", key): value for key, value in source.state_dict().items()}
    assert "blocks.0.gamma_1" in weights
    models.load_weights(model, weights)
    assert_same_function(model, source)


@torch.no_grad()
def test_relative_positions_of_swin_are_resampled_to_another_window():
    source = build("swin_tiny_patch4_window7_224")
    model = build("swin_tiny_patch4_window7_224", seed=1, input_size=96, window_size=3)
    models.load_weights(model, source.state_dict())
    small, large = (m.layers[0].blocks[0].attn.relative_position_bias_table for m in (source, model))
    assert (len(small), len(large)) == (9, 25)
    # centre and corners of the table of offsets keep their place
    torch.testing.assert_close(large.view(5, 5)[2, 2], small.view(3, 3)[1, 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(large.view(5, 5)[0, 4], small.view(3, 3)[0, 2], rtol=1e-4, atol=1e-5)
    assert model(images(96)).shape == (2, 5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_of_another_class_count_is_refused(name):
    """The original puts a fresh head into the teacher without a word."""
    model = build(name, 5)
    with pytest.raises(utils.UserError, match=rf"do not fit {name}: its head has 7 classes, 5 are needed"):
        models.load_weights(model, build(name, 7, seed=1).state_dict())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.slow
def test_fine_tuning_keeps_its_own_head_and_says_so(name):
    source, model = build(name, 7), build(name, 5, seed=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert models.load_weights(model, source.state_dict(), replace_head=True) == 7
    heads = model.pretrained_cfg["classifier"]
    heads = (heads,) if isinstance(heads, str) else heads
    for key, value in model.state_dict().items():
        wanted = before if key.startswith(tuple(f"{head}." for head in heads)) else source.state_dict()
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=0, msg=key)


@pytest.mark.parametrize(
    ("source", "message"),
    [("vit_tiny_patch16_224", "have other shapes"), ("cait_s24_224", ""), ("resnet18", "missing")],
)
def test_weights_of_another_model_are_refused_in_one_line(source, message):
    weights = build(source, **({"embed_dim": 48} if source.startswith("vit") else {})).state_dict()
    with pytest.raises(utils.UserError, match=f"the weights do not fit deit_tiny_patch16_224: (.|\n)*{message}"):
        models.load_weights(build("deit_tiny_patch16_224"), weights)


# The teacher


def teacher_of(path, *flags, student="deit_tiny_patch16_224", teacher="vit_tiny_patch16_224", classes=5):
    """The teacher that the program builds for these flags, beside its student."""
    kwargs = [f"{key}={value}" for key, value in VIT.items()]
    args = main.parse_args(
        [
            *("--data-set", "GRATINGS", "--input-size", "64", "--model", student, "--model-kwargs", *kwargs),
            *("--distillation-type", "soft", "--s-id", "0", "--t-id", "1"),
            *("--teacher-model", teacher, "--teacher-kwargs", *kwargs, "--teacher-path", str(path), *flags),
        ]
    )
    return main.build_teacher(args, classes, torch.device("cpu"), main.build_student(args, classes))


@torch.no_grad()
def test_a_teacher_of_another_mean_and_deviation_gets_its_own_normalisation(tmp_path):
    source = build("vit_tiny_patch16_224")
    torch.save(source.state_dict(), tmp_path / "teacher.pth")
    teacher = teacher_of(tmp_path / "teacher.pth")
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    normalised = []
    for model in (timm.create_model("deit_tiny_patch16_224", **VIT), source):
        mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        normalised.append((pixels - mean) / std)
    assert not torch.equal(*normalised)
    logits, maps = teacher(normalised[0])
    torch.testing.assert_close(logits, source(normalised[1]), rtol=1e-4, atol=1e-5)
    assert [tuple(each.shape) for each in maps] == [(2, 24, 4, 4)]


def test_a_teacher_of_the_same_normalisation_gets_the_images_as_they_are(tmp_path):
    torch.save(build("deit3_small_patch16_224").state_dict(), tmp_path / "teacher.pth")
    teacher = teacher_of(tmp_path / "teacher.pth", teacher="deit3_small_patch16_224")
    assert teacher.scale is None
    assert teacher.shift is None


def test_a_teacher_for_other_classes_is_refused(tmp_path):
    torch.save(build("vit_tiny_patch16_224", 7).state_dict(), tmp_path / "teacher.pth")
    with pytest.raises(utils.UserError, match="its head has 7 classes, 5 are needed"):
        teacher_of(tmp_path / "teacher.pth")
