"""runs.py reads logs, compares settings, finds published results, and reports what it cannot read."""

import json

import pytest
import timm
from conftest import ROOT, STUDENT, tiny_run
from logs import log_line, rows_of, write_run

import flags
import runs
import students  # noqa: F401 registers models with timm

RESULTS = runs.PUBLISHED["results"]


@pytest.fixture
def write(tmp_path):
    return lambda name, *top1_and_flags, **more: write_run(tmp_path / name, *top1_and_flags, **more)


# Logs


def test_the_later_line_of_an_epoch_counts(write):
    run = write("run", [1, 70, 3])
    with open(run / "log.txt", "a") as file:
        file.write(log_line(1, 20) + log_line(2, 40))
    assert rows_of(run)["run"]["best"] == 40


def test_an_incomplete_last_line_is_skipped(write, capsys):
    run = write("run", [10, 20, 30])
    (run / "log.txt").write_text((run / "log.txt").read_text()[:-40])
    row = rows_of(run)["run"]
    assert (row["best"], row["epochs_seen"], row["done"]) == (20, 2, False)
    assert "last line is incomplete" in capsys.readouterr().err


def test_a_sweep_is_found_and_named_by_its_folder(tmp_path):
    for folder in (tmp_path / "x", tmp_path / "sweep" / "deit"):
        folder.mkdir(parents=True)
        for seed in (0, 1):
            write_run(folder / f"seed={seed}", [1, 2, 3], "--seed", seed, "--lr", len(folder.name))
    assert list(rows_of(tmp_path)) == ["deit/seed=*", "x/seed=*"]


FOREIGN = {
    "README.md": b"# Published logs\n",
    "other.json": b'{"epoch": 0, "accuracy": 3}\n',
    "list.txt": b"[1, 2]\n",
    "nan.txt": log_line(0, float("nan")).encode(),
    "binary.pth": b"PK\x03\x04\xff\xfe",
    "empty.txt": b"",
    "torn.txt": (log_line(0, 1) + log_line(1, 2)[:30] + "\n" + log_line(2, 3)).encode(),
}


def test_files_that_are_no_logs_are_named_and_skipped(tmp_path, write, capsys):
    for name, content in FOREIGN.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    foreign = [str(tmp_path / name) for name in (*FOREIGN, "folder", "missing")]
    assert list(rows_of(*foreign, write("run", [1, 2, 3]))) == ["run"]
    warnings = capsys.readouterr().err.splitlines()
    assert {line.split(": skipped, ")[0] for line in warnings} == set(foreign)
    assert f"{tmp_path / 'folder'}: skipped, there is no log.txt in it" in warnings


@pytest.mark.parametrize("content", ['{"model": "x"}', "[]", "{", '{"sched": 3, "epochs": 1, "cooldown_epochs": 0}'])
def test_foreign_arguments_are_ignored(content, write, capsys):
    run = write("run", [1, 2, 3])
    (run / "args.json").write_text(content)
    assert rows_of(run)["run"]["method"].startswith("unknown")
    assert "not the arguments of a run" in capsys.readouterr().err


def test_runs_of_version_0_1_join_todays(write):
    """That version stored KEY=VALUE strings, and had other flags."""
    new = write("run_0", [1, 2, 3], "--model-kwargs", "depth=4", "name=x")
    args = {"model_kwargs": ["depth=4", "name=x"], "teacher_kwargs": [], "seed": 1, "spectra_every": 0}
    old = write("run_1", [1, 2, 3], args=args)
    stored = json.loads((old / "args.json").read_text())
    (old / "args.json").write_text(json.dumps({name: stored[name] for name in stored if name != "feature_loss"}))
    assert rows_of(new, old)["run_*"]["student"] == "deit_tiny_patch16_224 depth=4 name=x"


# Published numbers


@pytest.fixture
def published(tmp_path, write, monkeypatch):
    """Return the published top-1 that is shown for a run of a recipe with further flags."""

    def run_recipe(recipe, *more, processes=None, **other):
        monkeypatch.chdir(ROOT)  # recipes include each other relative to the repository
        (tmp_path / "ILSVRC2012").mkdir()
        base = [f"@recipes/{recipe}.args", "--data-path", str(tmp_path / "ILSVRC2012")]
        args = flags.parse_args(base)
        batch = next((entry["global_batch"] for entry in RESULTS if entry["recipe"] == recipe), 2 * args.batch_size)
        size = {"n_parameters": runs.PUBLISHED["parameters"][args.model]} | other
        stored = {"world_size": processes or batch // args.batch_size}
        row = rows_of(write("run", [1, 2, 3], *more, base=base, args=stored, **size))["run"]
        assert (row["source"] is None) == (row["published"] is None)
        assert row["data_set"] == ("CIFAR" if "CIFAR" in more else "ILSVRC2012")  # IMNET by the name of its folder
        return row["published"]

    return run_recipe


@pytest.mark.parametrize("entry", [entry for entry in RESULTS if entry["recipe"]], ids=lambda entry: entry["recipe"])
def test_a_run_by_a_recipe_has_its_published_number(entry, published):
    assert published(entry["recipe"]) == entry["best"]


@pytest.mark.parametrize("recipe", ["deit_tiny_mse", "later_soft_kd_wide", "swin_tiny_last_blocks"])
def test_a_recipe_without_a_published_number_has_none(recipe, published):
    assert published(recipe) is None


MATTERS = ["--t-id 22", "--w-fft 0.3", "--mixup 0.8", "--teacher-model cait_xs24_384", "--model-kwargs depth=11"]
MATTERS += ["--epochs 400", "--batch-size 256", "--feature-loss mse", "--amp-dtype bfloat16", "--data-set CIFAR"]
MATTERS += ["--lr 1e-3"]
NEUTRAL = ["--num_workers 3", "--batch-size 256 --accum-steps 2", "--seed 5", "--no-model-ema", "--device cuda:0"]
NEUTRAL += ["--deterministic", "--wandb project", "--import my_models", "--teacher-attention timm"]


@pytest.mark.parametrize("more", [*MATTERS, *NEUTRAL])
def test_a_published_number_needs_its_own_recipe(more, published):
    assert published("later_spectral_last", *more.split()) == (None if more in MATTERS else 76.826)


def test_a_published_number_needs_1000_classes(published):
    assert published("later_soft_kd", n_parameters=5543716) is None


def test_losses_across_a_batch_depend_on_its_split(published):
    """Manifold's terms compare the images of a process, so 4 processes x 128 have another loss than 8 x 64."""
    assert published("manifold", "--batch-size", 128, processes=4) is None


def test_recipes_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs.recipe_settings.cache_clear()
    assert runs.recipe_settings("lift_mse_only")["epochs"] == 300


@pytest.mark.parametrize("model", runs.PUBLISHED["parameters"])
def test_published_parameter_counts_are_the_models(model):
    assert sum(p.numel() for p in timm.create_model(model).parameters()) == runs.PUBLISHED["parameters"][model]


def test_names_of_arguments_are_flags():
    others = {"spectra_every", "batch_per_process"}  # of version 0.1, and of runs.py
    assert {*runs.NEUTRAL, *runs.FEATURE, *runs.TEACHER, *runs.NOT_PUBLISHED} - set(runs.DEFAULTS) == others


def test_released_logs_are_known_by_name(tmp_path):
    for i, (name, entry) in enumerate(runs.RELEASED.items()):
        (tmp_path / f"{name}.txt").write_text(log_line(entry["epochs"] - 1, 50 + i))
    rows = rows_of(tmp_path)
    assert set(rows) == set(runs.RELEASED)
    names = ("student", "teacher", "method", "epochs")
    for i, (name, entry) in enumerate(runs.RELEASED.items()):
        shown = [rows[name][key] for key in (*names, "published", "best", "done")]
        assert shown == [*(entry[key] for key in names), entry["best"], 50 + i, True]


@pytest.mark.slow
def test_runs_of_main_are_read(tmp_path):
    """The contract between RunLog and tables.py, including the EMA."""
    import main

    for seed in (0, 1):
        argv = tiny_run("--output_dir", tmp_path / f"run_{seed}", "--eval-ema", "--seed", seed)
        main.main(flags.parse_args(argv))
    row = rows_of(*tmp_path.iterdir())["run_*"]
    lines = [json.loads((tmp_path / f"run_{seed}" / "log.txt").read_text()) for seed in (0, 1)]
    assert row["best"] == pytest.approx(sum(line["test_acc1"] for line in lines) / 2)
    assert row["ema_best"] == pytest.approx(sum(line["test_ema_acc1"] for line in lines) / 2)
    assert (row["done"], row["epochs"], row["global_batch"], sorted(row["seeds"])) == (True, 1, 16, [0, 1])
    assert row["student"] == " ".join(["deit_tiny_patch16_224", *STUDENT])
