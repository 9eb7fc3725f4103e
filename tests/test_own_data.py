"""Own data, loops and models as in the README: here handwritten digits and tiny models."""

import contextlib
import glob
import io
import json
import re
import shlex

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, distil, run, tiny_run
from families import build, mae_file
from PIL import Image
from sklearn.datasets import load_digits

import analyze
import tables
from flags import key_values

# What is added to the README's commands, so that they take seconds on a CPU.
ON_CPU = ["--device", "cpu", "--num_workers", "0"]
CPU = f"{shlex.join(ON_CPU)} --input-size 32"
TRAIN = f"{CPU} --epochs 4 --batch-size 16 --unscale-lr --lr 0.004 --warmup-epochs 0"
TRAIN += " --aa none --color-jitter 0 --reprob 0 --no-repeated-aug"
WIDE, NARROW = (f"layers=(1,1,1,1) channels={channels}" for channels in ("(16,16,32,32)", "(8,8,16,16)"))
ADDED = {
    "--suggest": f"{CPU} --student resnet18 --student-kwargs {NARROW} --suggest 4",
    "Output/teacher": f"{TRAIN} --model resnet18 --model-kwargs {WIDE} \"pretrained_cfg_overlay={{'file':'hub.pth'}}\"",
    "Output/spectral": f"{TRAIN} --model resnet18 --model-kwargs {NARROW} --teacher-model resnet18 "
    f"--teacher-kwargs {WIDE} --s-id 1 2 3 4 --t-id 1 2 3 4",
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """scikit-learn's digits as JPEG files in ImageNet's layout, every fifth for validation; timm's weights."""
    root, data = tmp_path_factory.mktemp("digits"), load_digits()
    for i, (pixels, label) in enumerate(zip(data.images[:600], data.target, strict=False)):
        folder = root / "DATA" / ("val" if i % 5 == 0 else "train") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
        image.convert("RGB").save(folder / f"{i}.jpg", quality=95)
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet18", **key_values(WIDE.split())).state_dict(), root / "hub.pth")
    return root


@pytest.fixture(scope="module")
def outputs(digits):
    """The output of each command of the README's section, executed in a folder with DATA."""
    section = (ROOT / "README.md").read_text().partition("## Your own data in an hour\n")[2]
    (block,) = re.findall(r"```bash\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    commands = [line for line in block.replace("\\\n", "").splitlines() if line[0] != "#"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(digits)
        return [execute(*shlex.split(command, comments=True)) for command in commands]


def execute(_, program, *words):
    """Run a command in this process, with the flags of ADDED, and return what it prints."""
    added = next((flags for word, flags in ADDED.items() if word in words), "")
    words = [*words, *shlex.split(added)]
    words = sorted(glob.glob("Output/*")) if "Output/*" in words else words
    programs = {
        "main.py": run,
        "analyze.py": lambda *words: analyze.main(analyze.get_args_parser().parse_args(words)),
        "tables.py": lambda *words: tables.main(words),
    }
    with contextlib.redirect_stdout(io.StringIO()) as output:
        programs[program](*words)
    return output.getvalue()


@pytest.mark.slow
def test_the_readme_gets_from_images_to_a_table(outputs):
    """It suggests pairs as flags of the next command, and names a default that does not fit."""
    assert len(re.findall(r"^\| .*resnet18", outputs[4], re.MULTILINE)) == 3, outputs[4]
    assert re.search(r"^--s-id( \d+){4} --t-id( \d+){4}$", outputs[1], re.MULTILINE)
    assert "an EMA decay of 0.99996 is too slow for 120 steps: try --model-ema-decay 0.9167" in outputs[0]


@pytest.mark.slow
def test_teacher_and_student_learn_handwritten_digits(outputs, digits):
    for name in ("teacher", "spectral", "soft_kd"):
        lines = map(json.loads, (digits / "Output" / name / "log.txt").read_text().splitlines())
        best = max(line["test_acc1"] for line in lines)
        assert best > 30, f"{name}: {best} %, where chance is 10 %"


@pytest.mark.slow
def test_the_control_differs_in_the_feature_loss_alone(outputs, digits):
    spectral, control = (
        json.loads((digits / f"Output/{name}/args.json").read_text()) for name in ("spectral", "soft_kd")
    )
    assert {name for name in spectral if spectral[name] != control[name]} == {"w_fft", "output_dir"}


def test_finetune_takes_a_self_supervised_file(tmp_path, capsys):
    torch.save({"model": mae_file(build("vit_tiny_patch16_224", input_size=32))}, tmp_path / "mae.pth")
    kwargs = ["--model-kwargs", "embed_dim=24", "depth=2", "num_heads=3"]
    run(*tiny_run("--model", "vit_tiny_patch16_224", *kwargs, "--finetune", tmp_path / "mae.pth", "--dry-run"))
    note = "the file has no head; a fresh head is trained; left out of the file: decoder_blocks, decoder_pos_embed"
    assert f"--finetune: {note}, mask_token\n" in capsys.readouterr().out


def test_the_snippet_of_the_readme_runs(monkeypatch):
    """It runs with narrower models of the same depth and without the download."""
    create = timm.create_model
    narrow = {"embed_dim": 24, "num_heads": 2}
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False: create(name, **narrow))
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(snippet, names)
    assert names["loss"].item() > 0
    names["loss"].backward()
    assert names["student"].blocks[11].mlp.fc2.weight.grad.abs().sum() > 0
    assert names["teacher"].blocks[23].mlp.fc2.weight.grad is None


MY_MODELS = """
import torchvision
from timm.models import register_model

@register_model
def my_resnet18(pretrained=False, num_classes=1000, **kwargs):
    model = torchvision.models.resnet18(num_classes=num_classes)
    model.feature_info = [dict(module=f"layer{i + 1}", num_chs=64 * 2**i, reduction=4 * 2**i) for i in range(4)]
    return model
"""


@pytest.mark.slow
def test_a_model_of_the_users_module_is_distilled(teacher_file, tmp_path, monkeypatch, capsys):
    """It is trained, evaluated from its checkpoint and analyzed."""
    (tmp_path / "my_models.py").write_text(MY_MODELS)
    monkeypatch.chdir(tmp_path)
    own = ["--import", "my_models"]
    flags = tiny_run("--model", "my_resnet18", "--model-kwargs", "--no-model-ema", *distil(teacher_file), *own)
    run(*flags, "--s-id", 0, 3, "--t-id", 0, 5, "--output_dir", tmp_path / "out")
    assert "layer4 [512, 1, 1] <- teacher blocks.5 [48, 4, 4]" in capsys.readouterr().out
    stats = run("--eval", "--resume", tmp_path / "out/checkpoint.pth", *own, *ON_CPU)
    line = json.loads((tmp_path / "out/log.txt").read_text())
    assert stats["acc1"] == pytest.approx(line["test_acc1"])
    words = ["--checkpoint", str(tmp_path / "out"), *own, *ON_CPU, "--num-images", "4"]
    analyze.main(analyze.get_args_parser().parse_args(words))
    assert "my_resnet18" in capsys.readouterr().out
