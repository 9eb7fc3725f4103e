"""Every timm family: it builds, loads and is averaged, and which blocks give true maps. Writes docs/families.md:

PYTHONPATH=. python tests/test_families.py > docs/families.md
"""

import re
from argparse import Namespace

import pytest
import timm
import torch
from conftest import ROOT
from families import build, images, perturbed
from timm.utils import ModelEmaV3

import builders
import models
from spectral import FeatureHooks, check_raster_order, describe_blocks

DOCUMENT = ROOT / "docs" / "families.md"
# One small model per timm family (a family is a module of timm.models).
MODELS = re.findall(
    r"\w+",
    """
beit_base_patch16_224 halonet_h1 test_byobnet cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 test_convnext
cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny deepseek_vit_412m
deit_tiny_patch16_224 densenet121 dla46x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0
mobilenetv2_035 efficientvim_m1 efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0 fastvit_t8
focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny
hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s
lowformer_b0 test_mambaout coatnet_pico_rw_224 poolformerv2_s12 gmlp_ti16_224 mobilenetv3_small_050 mobilenetv5_base
mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small nf_regnet_b0
pit_ti_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 res2next50
resnest14d resnet10t resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18
starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224
tnt_s_legacy_patch16_224 tresnet_l twins_svt_small vgg11 visformer_tiny test_vit vit_tiny_r_s16_p8_224
test_vit_relpos samvit_base_patch16_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw legacy_xception
xception41p xcit_nano_12_p16_224
""",
)
TINY_VIT = {"depth": 2, "embed_dim": 48, "num_heads": 3}
KWARGS = {
    "beit_base_patch16_224": TINY_VIT,
    "samvit_base_patch16_224": TINY_VIT,
    "naflexvit_base_patch16_parfac_gap": TINY_VIT,
    "deepseek_vit_412m": {"depth": 2, "embed_dim": 64, "num_heads": 2},
    "gemma4_vit_167m": {"depth": 2, "embed_dim": 64, "num_heads": 1},
    "qwen3_vit_88m": {"depth": 2, "embed_dim": 64, "num_heads": 2},
}
SIZES = {"sam2_hiera_tiny": 256, "csatv2": 256}  # smaller than their default


def native(name, **kwargs):
    """Return a timm model of its own depth and width where KWARGS has none, and a random image of its own size."""
    torch.manual_seed(0)
    model = perturbed(timm.create_model(name, num_classes=5, **KWARGS.get(name, {}) | kwargs))
    return model, images(SIZES.get(name, model.default_cfg["input_size"][-1]))[:1]


def examine(name):
    """Return (ids of the blocks with maps, the error of the first other block or "") of a timm model."""
    model, x = native(name)
    try:
        ids = range(len(describe_blocks(model)))
    except ValueError as error:
        return [], str(error)
    working, reason = [], ""
    for i in ids:
        try:
            check_raster_order(model, x, [i])
            working.append(i)
        except ValueError as error:
            reason = reason or str(error)
    return working, reason


def rows():
    """Return the rows of docs/families.md, by family, for the models that this timm has."""
    found = {}
    for name in filter(timm.is_model, MODELS):
        family = timm.models.model_entrypoint(name).__module__.rsplit(".", 1)[1]
        working, reason = examine(name)
        ids = (" ".join(map(str, working)) or "none") if reason else "all"
        found[family] = f"| {family} | {name} | {ids} | {reason} |"
    return found


HEADER = f"""\
# timm families whose blocks can be used

Made with timm {timm.__version__} by `PYTHONPATH=. python tests/test_families.py > docs/families.md`, from
one small model per family: the maps that the hooks capture are compared with timm's `forward_intermediates`.
Other block ids are refused at the start of a run, with the reason.

| family | model | usable ids | why not the others |
|---|---|---|---|
"""


@pytest.mark.sweep
def test_every_family_has_right_maps_or_a_true_reason():
    """Also that docs/families.md is up to date, if it was made with this version of timm."""
    found = rows()
    assert len(found) == sum(map(timm.is_model, MODELS)), "two models of one family"
    for row in found.values():
        assert re.search(r"\|  \|$|\| (block \d+ .*of )?\w+ has no map.*: .+ \|$", row)
        assert "input" not in row
    text = DOCUMENT.read_text()
    if f"timm {timm.__version__} " in text:
        assert text == HEADER + "\n".join(found.values()) + "\n"


@pytest.mark.sweep
@pytest.mark.parametrize("name", MODELS)
def test_every_family_builds_and_loads(name):
    """With the same and with another number of classes."""
    if not timm.is_model(name):
        pytest.skip("not in this timm")
    x = native(name)[1]
    one, other = (models.build_model(name, n, input_size=x.shape[-1], kwargs=KWARGS.get(name)) for n in (5, 7))
    with torch.no_grad():
        assert one.eval()(x).shape == (1, 5)
    weights = one.state_dict()
    models.load_weights(one, weights)
    ema = ModelEmaV3(one, 0.5, **builders.ema_options(Namespace(model_ema_force_cpu=False), one))
    ema.update(one)  # of equal weights: some families have buffers that are infinite by design
    assert all(torch.equal(value, weights[key]) for key, value in ema.module.state_dict().items())
    assert "7 classes" in models.load_weights(one, other.state_dict(), head="fresh")


COMMON = ["deit_tiny_patch16_224", "cait_s24_224", "swin_tiny_patch4_window7_224", "convnext_atto", "resnet18"]


@pytest.mark.parametrize("name", [*COMMON, "samvit_base_patch16_224"])
def test_raster_order_of_common_families_is_accepted(name):
    model = build(name, input_size=(64, 96), **KWARGS.get(name, {})).train()
    check_raster_order(model, images(64, 96), range(len(describe_blocks(model))))
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_tokens_in_another_order_are_refused():
    """Hiera unrolls its tokens: blocks before the last stage hold the right values in the wrong places."""
    model, x = build("hiera_tiny_224", input_size=(64, 96), stages=(1, 1, 2, 1)), images(64, 96)
    check_raster_order(model, x, [3])
    for i in range(3):
        with pytest.raises(ValueError, match=rf"block {i} of Hiera has no map: .*tokens not in raster order"):
            check_raster_order(model, x, [3, i])


REASONS = {
    "pit_ti_224": r"returns a tuple, not \(B, N, C\)",
    "crossvit_tiny_240": r"returns a list, not \(B, N, C\)",
    "coat_tiny": "forward does not call this module",
    "twins_svt_small": "there is no module 'block.0'",
}


@pytest.mark.parametrize("name", REASONS)
def test_the_error_names_why_a_block_has_no_map(name):
    with pytest.raises(ValueError, match=f"has no map.*: .*({REASONS[name]}|no feature_info)") as error:
        check_raster_order(*native(name), [0])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_tokens_dropped_in_training_are_refused(name):
    """When the hooks are made, or at the latest in a forward; in eval mode no tokens are dropped."""
    model, x = native(name, patch_drop_rate=0.5, **TINY_VIT)
    with pytest.raises(ValueError, match=r"drops tokens in training.*set patch_drop_rate to 0"):
        FeatureHooks(model.train(), [0])
    check_raster_order(model, x, [0, 1])
    FeatureHooks(model.eval(), [0])
    with pytest.raises(ValueError, match=r"has no map: it returns \d+ tokens for a (14 x 14|16 x 16|24 x 24) grid"):
        model.train()(x)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(HEADER + "\n".join(rows().values()))
