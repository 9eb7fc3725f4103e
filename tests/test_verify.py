"""verify.py on small stand-ins for ImageNet, the released weights and the released logs."""

import copy
import json
import math

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import verify
from utils import UserError

MODELS = {
    "cait_s24_224": {"embed_dim": 24, "num_heads": 2, "depth": 2},
    "deit_tiny_lift_patch16_224": {"embed_dim": 24, "depth": 3},
}


def ranks_of(tokens):
    """99th percentile of the singular directions per share, by numpy's SVD."""
    energies = np.square(np.linalg.svd(tokens, compute_uv=False)).cumsum(1)
    counts = [(energies < share * energies[:, -1:]).sum(1) + 1 for share in (0.8, 0.9, 0.95, 0.99)]
    return [round(np.percentile(values, 99)) for values in counts]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A folder of images, weights and a log, and the numbers that belong to them, found without the project."""
    root, random = tmp_path_factory.mktemp("verify"), np.random.RandomState(0)
    for name in ("ant", "bee"):
        (root / "val" / name).mkdir(parents=True)
        for i in range(3):
            pixels = random.randint(0, 256, (8, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((300, 240), Image.BICUBIC).save(root / "val" / name / f"{i}.png")
    files = sorted((root / "val").rglob("*.png"))
    published = {"num_classes": 2, "model_kwargs": MODELS, "teachers": {}, "checkpoints": {}, "ranks": {}}
    for name, kwargs in MODELS.items():
        torch.manual_seed(1)
        model = timm.create_model(name, num_classes=2, **kwargs).eval()
        torch.save({"model": model.state_dict()}, root / f"{name}.pth")
        transform = create_transform(**resolve_model_data_config(model), is_training=False)
        images = torch.stack([transform(Image.open(file)) for file in files])
        with torch.no_grad():
            classes = model(images).argmax(1)
            maps = model.forward_intermediates(images[::3], indices=1, intermediates_only=True)[0]
        part = "teachers" if "cait" in name else "checkpoints"
        published[part][name] = 100 * (classes == torch.tensor([0, 0, 0, 1, 1, 1])).double().mean().item()
        published["ranks"][name] = {"svd": ranks_of(maps.flatten(2).mT.double().numpy())}
    published["results"] = [{"log": "SoftKD", "global_batch": 2048}, {"log": None, "global_batch": 512}]
    steps = [max(epoch - 1, 0) for epoch in range(30)]
    rates = [
        1e-6 + t * (2e-3 - 1e-6) / 5 if t < 5 else 1e-5 + (2e-3 - 1e-5) * (1 + math.cos(math.pi * t / 30)) / 2
        for t in steps
    ]
    (root / "SoftKD.txt").write_text("\n".join(json.dumps({"epoch": i, "train_lr": r}) for i, r in enumerate(rates)))
    return root, published


@pytest.fixture
def check(stand_ins, capsys):
    """Run verify on the stand-ins with numbers changed by `change`; return the exit code and the report's lines."""
    root, published = stand_ins

    def run(change=lambda published: None, weights=root, logs=root):
        numbers = copy.deepcopy(published)
        change(numbers)
        argv = ["--data-path", root, "--weights", weights, "--logs", logs, "--device", "cpu", "--num_workers", "0"]
        code = verify.main([*map(str, argv), "--batch-size", "2"], numbers)
        return code, capsys.readouterr().out.splitlines()

    return run


def test_right_numbers_pass(check):
    code, lines = check()
    assert (code, lines[-1]) == (0, "5 passed, 0 differ, 0 not checked")


def test_a_wrong_number_is_shown_with_its_difference(check):
    def change(published):
        published["teachers"]["cait_s24_224"] += 0.2
        published["ranks"]["cait_s24_224"]["svd"][2] -= 1
        published["results"][0]["global_batch"] = 1024

    code, lines = check(change)
    assert (code, lines[-1]) == (1, "2 passed, 3 differ, 0 not checked")
    assert "differs by -0.20" in lines[2]
    assert "differs by [0, 0, 1, 0]" in lines[3]
    assert "of the rate" in lines[6]


def test_what_is_missing_is_named_with_its_source(check, tmp_path):
    def only_lift(published):
        published["teachers"] = {}
        del published["ranks"]["cait_s24_224"]

    code, lines = check(only_lift, weights=tmp_path, logs=tmp_path)
    assert (code, lines[-1]) == (2, "0 passed, 0 differ, 2 not checked")
    assert f"{tmp_path / 'deit_tiny_lift_patch16_224.pth'}" in lines[2]
    assert "SoftKD.txt from thy960112/Distillation-Dynamics" in lines[3]


def test_another_data_set_is_refused_in_one_line(stand_ins):
    with pytest.raises(UserError, match="val has 2 classes, not 1000"):
        verify.main(["--data-path", str(stand_ins[0]), "--device", "cpu"])


def test_every_published_number_is_of_a_model_that_timm_knows():
    published = json.loads((ROOT / "recipes" / "published.json").read_text())
    for part in ("teachers", "checkpoints", "ranks"):
        assert all(timm.is_model(name) for name in published[part])
