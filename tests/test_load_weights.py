"""Weights of every layout load into the model they are for; others are refused in one line."""

import re

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, VIT, assert_same_function, build, images, mae_file
from timm.models.volo import VOLO

import models
import utils
from weights import head_names, load_weights


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_of_a_model_fit_its_twin(name):
    source, model = build(name), build(name, seed=1)
    assert not load_weights(model, source.state_dict())
    assert_same_function(model, source)


# Layouts of the authors' own files


def swin_layout(key):
    """Their stages end with the downsampling that timm's begin with, and their head is no module of its own."""
    key = re.sub(r"layers\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", key)
    return key.replace("head.fc.", "head.")


def deit3_layout(key):
    return re.sub(r"ls([12])\.gamma", r"gamma_\1", key)


@pytest.mark.parametrize(
    ("name", "layout", "theirs"),
    [
        ("swin_tiny_patch4_window7_224", swin_layout, "layers.0.downsample.reduction.weight"),
        ("deit3_small_patch16_224", deit3_layout, "blocks.0.gamma_1"),
    ],
)
def test_files_of_the_authors_load(name, layout, theirs):
    source, model = build(name), build(name, seed=1)
    weights = {layout(key): value for key, value in source.state_dict().items()}
    if name.startswith("swin"):
        weights["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(4, 4, dtype=torch.int64)
    assert theirs in weights
    load_weights(model, weights)
    assert_same_function(model, source)


# Other image sizes


def grow(embedding, prefix, side):
    """Position embeddings (1, N, C) on a side x side grid: bicubic for the patches, unchanged for the prefix."""
    start, grid = embedding[:, :prefix], embedding[:, prefix:]
    grid = grid.unflatten(1, (int(grid.shape[1] ** 0.5), -1)).permute(0, 3, 1, 2)
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
def test_position_embeddings_are_resampled(name, prefix, old, new):
    source, model = build(name, input_size=old), build(name, seed=1, input_size=new)
    load_weights(model, source.state_dict())
    expected = source.state_dict() | {"pos_embed": grow(source.pos_embed, prefix, new // 16)}
    torch.testing.assert_close(model.state_dict(), expected, rtol=1e-5, atol=1e-6)
    assert model(images(new)).shape == (2, 5)


@torch.no_grad()
def test_pretrained_weights_are_resampled(tmp_path):
    source = build("cait_s24_224", input_size=224)
    torch.save(source.state_dict(), tmp_path / "hub.pth")
    kwargs = {**VIT, "pretrained_cfg_overlay": {"file": str(tmp_path / "hub.pth"), "num_classes": 5}}
    model = models.build_model("cait_s24_224", 5, input_size=64, kwargs=kwargs, pretrained=True)
    torch.testing.assert_close(model.pos_embed, grow(source.pos_embed, 0, 4), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.head.weight, source.head.weight, rtol=0, atol=0)


@torch.no_grad()
def test_position_embeddings_of_hiera_are_resampled():
    source, model = build("hiera_tiny_224"), build("hiera_tiny_224", seed=1, input_size=96)
    load_weights(model, source.state_dict())
    torch.testing.assert_close(model.pos_embed, grow(source.pos_embed, 0, 24), rtol=1e-5, atol=1e-6)
    assert model(images(96)).shape == (2, 5)


@torch.no_grad()
def test_position_embeddings_of_volo_are_resampled():
    """They are a map (1, H, W, C)."""

    def tiny_volo(size):
        model = VOLO((1, 1, 1, 1), size, num_classes=5, embed_dims=(8, 16, 16, 16), num_heads=(1, 1, 1, 1)).eval()
        model.pretrained_cfg = {"architecture": "volo", "classifier": ("head", "aux_head")}
        return model

    source, model = tiny_volo(64), tiny_volo(96)
    load_weights(model, source.state_dict())
    expected = grow(source.pos_embed.flatten(1, 2), 0, 6).view(1, 6, 6, 16)
    torch.testing.assert_close(model.pos_embed, expected, rtol=1e-5, atol=1e-6)
    assert model(images(96)).shape == (2, 5)


@torch.no_grad()
def test_relative_positions_of_swin_are_resampled():
    source = build("swin_tiny_patch4_window7_224")
    model = build("swin_tiny_patch4_window7_224", seed=1, input_size=96, window_size=3)
    load_weights(model, source.state_dict())
    small, large = (m.layers[0].blocks[0].attn.relative_position_bias_table for m in (source, model))
    assert (len(small), len(large)) == (9, 25)
    # center and corners of the table of offsets keep their place
    torch.testing.assert_close(large.view(5, 5)[2, 2], small.view(3, 3)[1, 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(large.view(5, 5)[0, 4], small.view(3, 3)[0, 2], rtol=1e-4, atol=1e-5)
    assert model(images(96)).shape == (2, 5)


# Heads


@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_of_another_class_count_is_refused(name):
    """The original silently puts a fresh head into the teacher."""
    with pytest.raises(utils.UserError, match=rf"do not fit {name}: its head has 7 classes, but 5 are needed"):
        load_weights(build(name, 5), build(name, 7, seed=1).state_dict())


@pytest.mark.parametrize("name", FAMILIES)
def test_fine_tuning_keeps_the_models_own_head(name):
    source, model = build(name, 7), build(name, 5, seed=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    note = load_weights(model, source.state_dict(), head="fresh")
    assert note == "the file's head has 7 classes, not 5; a fresh head is trained"
    heads = tuple(f"{head}." for head in head_names(model))
    for key, value in model.state_dict().items():
        wanted = before if key.startswith(heads) else source.state_dict()
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=0, msg=key)


def test_a_second_head_that_timm_does_not_name_is_replaced():
    source, model = build("levit_128s", 7), build("levit_128s", 5, seed=1)
    model.pretrained_cfg["classifier"] = "head.linear"
    before = model.head_dist.linear.weight.clone()
    load_weights(model, source.state_dict(), head="fresh")
    torch.testing.assert_close(model.head_dist.linear.weight, before, rtol=0, atol=0)


# Backbones without a head


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_self_supervised_backbone_gets_a_fresh_head(pool):
    """With average pooling the norm moves behind it, so that MAE's own norm has no place in the model."""
    source = build("vit_tiny_patch16_224", global_pool="token")
    model = build("vit_tiny_patch16_224", seed=1, global_pool=pool)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    note = load_weights(model, mae_file(source), head="fresh")
    unused = "decoder_blocks, decoder_pos_embed, mask_token" + (", norm" if pool == "avg" else "")
    assert note == f"the file has no head; a fresh head is trained; left out of the file: {unused}"
    for key, value in model.state_dict().items():
        wanted = before if key.startswith(("head.", "fc_norm.")) else source.state_dict()
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=0, msg=key)


def test_a_model_without_a_head_takes_a_file_with_one():
    source = build("vit_tiny_patch16_224")
    model = build("vit_tiny_patch16_224", 0, seed=1)
    assert load_weights(model, source.state_dict(), head="fresh") == "left out of the file: head"
    torch.testing.assert_close(model(images()), source.forward_head(source.forward_features(images()), pre_logits=True))


@pytest.mark.parametrize("kwargs", [{"depth": 3}, {"depth": 1}])
def test_fine_tuning_leaves_out_no_block(kwargs):
    with pytest.raises(utils.UserError, match=r"missing \['blocks|not expected \['blocks"):
        load_weights(build("vit_tiny_patch16_224"), build("vit_tiny_patch16_224", **kwargs).state_dict(), head="fresh")


def test_a_missing_head_is_refused_where_it_is_needed():
    with pytest.raises(utils.UserError, match=r"missing \['head.weight', 'head.bias'\]"):
        load_weights(build("vit_tiny_patch16_224"), build("vit_tiny_patch16_224", 0).state_dict())


# Refusals


@pytest.mark.parametrize(
    ("source", "message"),
    [("vit_tiny_patch16_224", "have other shapes"), ("cait_s24_224", ""), ("resnet18", "missing")],
)
def test_weights_of_another_model_are_refused_in_one_line(source, message):
    weights = build(source, **({"embed_dim": 48} if source.startswith("vit") else {})).state_dict()
    with pytest.raises(utils.UserError, match=f"^the weights do not fit deit_tiny_patch16_224: .*{message}.*$"):
        load_weights(build("deit_tiny_patch16_224"), weights)


@pytest.mark.parametrize("head", ["own", "fresh"])
@pytest.mark.parametrize(
    ("name", "found", "message"),
    [
        ("deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "the file is for a distilled DeiT .* is plain"),
        ("deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224", "the file is for a plain DeiT .* is distilled"),
    ],
)
def test_plain_and_distilled_deit_are_told_apart(name, found, message, head):
    with pytest.raises(utils.UserError, match=message):
        load_weights(build(name), build(found).state_dict(), head=head)
