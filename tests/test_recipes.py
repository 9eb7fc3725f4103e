"""Recipes repeat published settings, differ from their controls in one thing, explain themselves and run."""

import json
import os
import re
import subprocess

import pytest
import timm
import torch
from conftest import ROOT, jpeg_folder
from processes import until

import main
import runs
from flags import key_values, parse_args

RESULTS = json.loads((ROOT / "recipes" / "published.json").read_text())["results"]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.args"))

# The published command lines, as the README quotes them.
COMMANDS = re.findall(r"main\.py (--output_dir .* --epochs .*)", (ROOT / "README.md").read_text())
PUBLISHED = dict(zip(("deit_tiny", "deit_small", "swin_tiny"), COMMANDS, strict=True))
TEACHERS = ("cait_s24_224", "swin_small_patch4_window7_224.ms_in1k", "regnety_160.deit_in1k")

# The same families and numbers of blocks, but narrow.
NARROW = {
    "deit": ["embed_dim=24", "num_heads=3"],
    "swin": ["embed_dim=12", "num_heads=(1,1,2,2)"],
    "cait": ["embed_dim=24", "num_heads=2"],
    "regnety": ["w0=16", "wa=16", "wm=2", "group_size=8", "depth=8"],
}


def narrow(model):
    return NARROW[model.partition("_")[0]]


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    """Recipes name each other relative to the root of the repository."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return a folder like ImageNet's, of two classes."""
    return jpeg_folder(tmp_path_factory.mktemp("data") / "ILSVRC2012", size=(90, 70))


@pytest.fixture(scope="module")
def read(images):
    return lambda recipe, *more: parse_args(
        [f"@recipes/{recipe}.args", "--data-set", "IMNET", "--data-path", str(images), "--device", "cpu", *more]
    )


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_recipe_equals_its_published_command(recipe, read, images):
    words = PUBLISHED[recipe].replace("ILSVRC2012", str(images)).split()
    published = parse_args([*words, "--device", "cpu"])
    assert published == read(recipe, "--num_workers", "16", "--output_dir", published.output_dir)


def ids(student, teacher):
    return {"s_id": [*student], "t_id": [*teacher]}


DEITS = {"global_batch": 1024, "drop_path": 0.1, "mixup": 0.8, "cutmix": 1.0}
SWINS = DEITS | {"drop_path": 0.2, "warmup_epochs": 20, "clip_grad": 5, "repeated_aug": False}
HARD = {"distillation_type": "hard", "distillation_alpha": 0.5, "w_fft": 0}
HARD |= {"teacher_model": "regnety_160.deit_in1k", "teacher_path": "", "teacher_kwargs": [], "teacher_dtype": "float32"}
STUDENTS = {name: {"model": f"deit_tiny_{name}_patch16_224"} for name in ("lift", "widelast")}
CHANGES = [  # a recipe, the one it is based on (None: the flags' defaults), and all that differs
    *((f"{name}_mse", name, {"feature_loss": "mse"}) for name in PUBLISHED),
    *((f"{name}_soft_kd", name, {"w_fft": 0}) for name in PUBLISHED),
    *((f"{name}_no_teacher", f"{name}_soft_kd", {"distillation_type": "none"}) for name in PUBLISHED),
    *((f"{name}_first_blocks", name, ids([0, 1], [0, 1])) for name in PUBLISHED),
    *((f"deit_{size}_last_blocks", f"deit_{size}", ids(range(6, 12), range(18, 24))) for size in ("tiny", "small")),
    ("swin_tiny_last_blocks", "swin_tiny", ids([2, 3], [2, 3])),
    ("deit_tiny_baseline", None, DEITS),
    ("deit_small_baseline", None, DEITS | {"model": "deit_small_patch16_224"}),
    ("swin_tiny_baseline", None, SWINS | {"model": "swin_tiny_patch4_window7_224"}),
    *(
        (f"deit_{size}_hard_distilled", f"deit_{size}_baseline", HARD | {"model": f"deit_{size}_distilled_patch16_224"})
        for size in ("tiny", "small")
    ),
    ("later_spectral_last", "later_soft_kd", {"feature_loss": "spectral", "w_fft": 0.2, **ids([11], [23])}),
    ("later_spectral_first", "later_spectral_last", ids([0], [0])),
    ("later_spectral_first_last", "later_spectral_last", ids([0, 11], [0, 23])),
    ("later_spectral_last_8", "later_spectral_last", ids(range(4, 12), range(16, 24))),
    *(
        (f"later_projector_{where}", f"later_spectral_{where}", {"feature_loss": "projector", "batch_per_process": 512})
        for where in ("first", "first_last", "last")
    ),
    *((f"{name}_no_teacher", "later_no_teacher", model) for name, model in STUDENTS.items()),
    *((f"{name}_soft_kd", "later_soft_kd", model) for name, model in STUDENTS.items()),
    *((f"{name}_spectral", "later_spectral_last", model) for name, model in STUDENTS.items()),
    *((f"{name}_mse", f"{name}_spectral", {"feature_loss": "mse_plain"}) for name in STUDENTS),
    *((f"{name}_mse_only", f"{name}_mse", {"distillation_alpha": 0}) for name in STUDENTS),
]


@pytest.mark.parametrize(("recipe", "base", "changes"), CHANGES, ids=lambda value: value if type(value) is str else "")
def test_a_recipe_changes_nothing_else(recipe, base, changes):
    defaults = runs.settings(runs.DEFAULTS | {"world_size": 2})
    own, other = runs.recipe_settings(recipe), runs.recipe_settings(base) if base else defaults
    assert {name: own[name] for name in own if own[name] != other.get(name, ...)} == changes


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_explains_itself(recipe, read):
    text = (ROOT / "recipes" / f"{recipe}.args").read_text()
    assert [line for line in text.splitlines() if line.startswith("--") and not re.search(r"  # \w", line)] == []
    assert re.search(
        r"Cost: about \d+ H100-(hours|minutes) \(estimated\), .*[\d.]+ GB per process \((counted|twice)", text
    )
    processes, size, batch = map(int, re.search(r"Global batch: (\d+) process(?:es)? x (\d+) = (\d+)", text).groups())
    args, rows = read(recipe), [row for row in RESULTS if row["recipe"] == recipe]
    assert (size, batch) == (args.batch_size, processes * size)
    quoted = re.findall(r"Published top-1: ([\d.]+) \((.*?)\)", text)
    assert quoted == [(f"{row['best']}", row["source"]) for row in rows]
    for row in rows:
        assert (args.epochs, batch) == (row["epochs"], row["global_batch"])
        assert (args.distillation_type == "none") == (row["teacher"] is None)


def test_published_rows_hold_every_log_and_have_sources():
    logs = [row["log"] for row in RESULTS if row["log"]]
    assert len(logs) == len(set(logs)) == 11
    assert {row["recipe"] for row in RESULTS} - {None} <= set(RECIPES)
    for row in RESULTS:
        assert row["source"]
        assert 60 < (row["last"] or row["best"]) <= row["best"] < 90


def test_the_docs_show_every_published_row():
    lines = (ROOT / "docs" / "reproducing.md").read_text().splitlines()
    shown = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    for row in RESULTS:
        names = ("student", "method", "epochs", "global_batch", "best", "last", "last10", "recipe")
        student, *others = ("" if row[name] is None else str(row[name]) for name in names)
        wanted = [student, row["teacher"] or "none", *others]
        assert any(cells[:9] == wanted and row["source"] in cells[9] for cells in shown)


@pytest.fixture(scope="module")
def teacher_files(tmp_path_factory):
    """Return the file of random weights of the narrow version of each teacher."""
    root, files = tmp_path_factory.mktemp("teachers"), {}
    for name in TEACHERS:
        model = timm.create_model(name, num_classes=2, **key_values(narrow(name)))
        files[name] = root / f"{name}.pth"
        torch.save(model.state_dict(), files[name])
    return files


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.slow
def test_a_recipe_builds_and_trains_two_steps(recipe, read, teacher_files, capsys):
    args = read(recipe)
    more = ["--dry-run", "--batch-size", "2", "--num_workers", "0", "--model-kwargs", *narrow(args.model)]
    if args.pretrained:
        more += [f"pretrained_cfg_overlay={{'file':'{teacher_files[args.model]}','num_classes':2}}"]
    if args.distillation_type != "none":
        path = str(teacher_files[args.teacher_model])
        more += ["--teacher-path", path, "--teacher-kwargs", *narrow(args.teacher_model)]
    main.main(read(recipe, *more))
    output = capsys.readouterr().out
    assert "nothing was written" in output
    assert output.count(" <- ") == (len(args.s_id) if args.w_fft else 0)


# Stand-ins for SLURM's commands: the run saves when it gets the signal, or ends at once with an error.
SRUN = """#!/bin/bash
trap 'echo "{\\"status\\": \\"preempted\\"}" > "$FOLDER/status.json"; exit 143' TERM
touch "$FOLDER/begun"
[ "$FAILS" ] && exit 1
while :; do sleep 0.05; done
"""
SCONTROL = '#!/bin/bash\necho "$@" >> "$FOLDER/scontrol"\n'


@pytest.mark.parametrize("stopped", [True, False])
@pytest.mark.parametrize("recipe", ["one_node", "several_nodes"])
def test_slurm_requeues_what_the_time_limit_stopped(recipe, stopped, tmp_path):
    """A run that fails before it writes its status must not be requeued because of an older status."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("ip", "#!/bin/bash\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "status.json").write_text('{"status": "preempted"}')
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FOLDER": str(tmp_path)}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_NNODES": "4", "FAILS": "" if stopped else "1"}
    job = subprocess.Popen(["bash", f"recipes/{recipe}.slurm", "x.args", "data", str(tmp_path)], env=environment)
    if stopped:
        until((tmp_path / "begun").exists)
        job.terminate()
    assert job.wait(60) == (143 if stopped else 1)
    calls = (tmp_path / "scontrol").read_text() if (tmp_path / "scontrol").exists() else ""
    assert ("requeue 7" in calls) == stopped
