"""The five commands of the README take a folder of images to a table: here handwritten digits and tiny models."""

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
from conftest import ROOT
from PIL import Image
from sklearn.datasets import load_digits

import analyze
import main
import tables
from flags import key_values, parse_args

pytestmark = pytest.mark.slow

# What is added to the README's commands, so that they take seconds on a CPU.
CPU = "--device cpu --num_workers 0 --input-size 32"
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


def execute(python, program, *words):
    """Run a command in this process, with the flags of ADDED, and return what it prints."""
    added = next((flags for word, flags in ADDED.items() if word in words), "")
    words = [*words, *shlex.split(added)]
    if "Output/*" in words:
        words = sorted(glob.glob("Output/*"))
    with contextlib.redirect_stdout(io.StringIO()) as output:
        if program == "main.py":
            main.main(parse_args(words))
        elif program == "analyze.py":
            analyze.main(analyze.get_args_parser().parse_args(words))
        else:
            assert (python, program, tables.main(words)) == ("python", "tables.py", 0)
    return output.getvalue()


def test_the_readme_gets_from_images_to_a_table(outputs):
    assert len(re.findall(r"^\| .*resnet18", outputs[4], re.MULTILINE)) == 3, outputs[4]


def test_teacher_and_student_learn_handwritten_digits(outputs, digits):
    for name in ("teacher", "spectral", "soft_kd"):
        lines = map(json.loads, (digits / "Output" / name / "log.txt").read_text().splitlines())
        best = max(line["test_acc1"] for line in lines)
        assert best > 30, f"{name}: {best} %, where chance is 10 %"


def test_suggestions_are_flags_of_the_next_command(outputs):
    assert re.search(r"^--s-id( \d+){4} --t-id( \d+){4}$", outputs[1], re.MULTILINE)


def test_the_control_differs_in_the_feature_loss_alone(outputs, digits):
    spectral, control = (
        json.loads((digits / f"Output/{name}/args.json").read_text()) for name in ("spectral", "soft_kd")
    )
    assert {name for name in spectral if spectral[name] != control[name]} == {"w_fft", "output_dir"}


def test_the_run_names_defaults_that_do_not_fit(outputs):
    assert re.search(r"an EMA decay of 0.99996 is too slow for \d+ steps: try --model-ema-decay 0.", outputs[0])
