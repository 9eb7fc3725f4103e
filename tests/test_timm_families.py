"""A small model of every timm family is built, loads its own weights, and gets a fresh head for other classes."""

from collections import Counter

import pytest
import timm
import torch

import models
import utils
from weights import load_weights

TINY = {"deepseek_vit_412m": {"depth": 1, "embed_dim": 64, "num_heads": 1}}
SMALL = ("test_", "atto", "xxs", "xx_small", "femto", "pico", "nano", "tiny", "xs", "x_small", "_s", "small", "_b0")
SMALL += ("18", "10", "d0", "m0", "patch16_224")


def small_model(module):
    """Return the name of a family's model that looks smallest."""

    def size(name):
        return next((rank for rank, word in enumerate(SMALL) if word in name), len(SMALL)), len(name), name

    return min(timm.list_models(module=module), key=size)


def use(name):
    """Build a model, run it, and load its weights with the same and with another number of classes."""
    size = timm.models.get_pretrained_cfg_value(name, "input_size")[-1]
    model = models.build_model(name, 5, input_size=size, kwargs=TINY.get(name)).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, size, size)).shape == (1, 5)
    weights = model.state_dict()
    load_weights(model, weights)
    other = models.build_model(name, 7, input_size=size, kwargs=TINY.get(name)).state_dict()
    assert "7 classes" in load_weights(model, other, head="fresh")


@pytest.mark.sweep
def test_every_family_of_timm_builds_and_loads():
    results = Counter()
    failures = []
    for module in timm.list_modules():
        name = small_model(module)
        print(name, flush=True)
        try:
            use(name)
            results["pass"] += 1
        except utils.UserError as error:
            results["refused"] += 1
            print(f"refused: {error}")
        except Exception as error:
            results["fail"] += 1
            failures.append(f"{name}: {type(error).__name__}: {error}")
    print(f"timm {timm.__version__}: {dict(results)}")
    assert not failures, "\n".join(failures)
