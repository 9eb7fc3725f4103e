"""Checkpoints of every layout are read, and anything else is refused in one line."""

import pytest
import torch
from families import assert_same_function, build
from safetensors.torch import save_file

import models
import utils


@pytest.mark.parametrize("layout", ["bare", "DeiT", "state_dict", "module", "compiled", "safetensors"])
def test_every_layout_of_a_checkpoint_is_read(layout, tmp_path):
    source, model = build("deit_tiny_patch16_224"), build("deit_tiny_patch16_224", seed=1)
    weights, path = source.state_dict(), tmp_path / "weights.pth"
    if layout == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(weights, path)
    else:
        content = {
            "bare": weights,
            "DeiT": {"model": weights, "optimizer": {"state": {}}, "epoch": 3, "args": {"lr": 0.1}},
            "state_dict": {"state_dict": weights},
            "module": {"model": {f"module.{key}": value for key, value in weights.items()}},
            "compiled": {"model": {f"module._orig_mod.{key}": value for key, value in weights.items()}},
        }
        torch.save(content[layout], path)
    models.load_weights(model, utils.extract_weights(utils.load_checkpoint(path)))
    assert_same_function(model, source)


def test_the_moving_average_is_taken_on_request():
    one, two = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    for key in ("model_ema", "state_dict_ema"):
        assert utils.extract_weights({"model": one, key: two}, ema=True)["w"] == 1
    with pytest.raises(utils.UserError, match="holds no moving average"):
        utils.extract_weights({"model": one, "model_ema": None}, ema=True)
    with pytest.raises(utils.UserError, match="holds no weights"):
        utils.extract_weights({"epoch": 3})
