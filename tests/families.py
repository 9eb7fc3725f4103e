"""Tiny models of the families that the recipes use, for several test files."""

import torch

import models

VIT = {"embed_dim": 24, "depth": 2, "num_heads": 3}
FAMILIES = {
    "deit_tiny_patch16_224": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "deit3_small_patch16_224": VIT,
    "vit_tiny_patch16_224": VIT,
    "cait_s24_224": VIT,
    "swin_tiny_patch4_window7_224": {"window_size": 2, "embed_dim": 12, "depths": (1,) * 4, "num_heads": (1, 2, 3, 4)},
    "hiera_tiny_224": {"embed_dim": 16, "stages": (1, 1, 1, 1)},
    "levit_128s": {"embed_dim": (16, 16, 16), "num_heads": (1, 1, 1), "depth": (1, 1, 1), "key_dim": 8},
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
    "regnety_160": {"w0": 16, "wa": 16, "wm": 2, "group_size": 8, "depth": 8},
}


def build(name, num_classes=5, *, seed=0, input_size=64, **kwargs):
    """Return a tiny model in eval mode."""
    torch.manual_seed(seed)
    kwargs = FAMILIES.get(name, {}) | kwargs
    return perturbed(models.build_model(name, num_classes, input_size=input_size, kwargs=kwargs))


@torch.no_grad()
def perturbed(model):
    """Return a model in eval mode of which no parameter is zero, because zeros hide mistakes."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.eval()


def images(height=64, width=None):
    return torch.randn(2, 3, height, width or height, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same_function(one, other, size=64):
    torch.testing.assert_close(one(images(size)), other(images(size)), rtol=0, atol=0)


def mae_file(source):
    """Return what a MAE file holds: no head, but a decoder and a mask token."""
    weights = {key: value for key, value in source.state_dict().items() if not key.startswith("head")}
    extra = ("mask_token", "decoder_pos_embed", "decoder_blocks.0.norm1.weight", "decoder_blocks.0.norm1.bias")
    return weights | {key: torch.ones(1, 1, 8) for key in extra}
