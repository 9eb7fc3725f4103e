"""tables.py shows what the logs hold, compares only what may be compared, and names what it cannot read."""

import csv
import io
import json
import subprocess
import sys

import pytest
import timm.scheduler
import torch
from conftest import ROOT, STUDENT, TEACHER, tiny_run
from PIL import Image

import flags
import plots
import tables

RUN = ["--data-set", "GRATINGS", "--device", "cpu", "--epochs", "3", "--warmup-epochs", "0"]
SOFT = ["--distillation-type", "soft", "--distillation-alpha", "0.9", "--w-fft", "0"]
SPECTRAL = [*SOFT, "--s-id", "0", "11", "--t-id", "0", "23", "--w-fft", "0.2"]


def log_line(epoch, top1, **more):
    """Return a line with the keys of the original program."""
    terms = {"train_loss": 1.5, "train_loss_base": 0.5, "train_loss_fft": 0.0, "train_loss_dist": 1.0}
    test = {"test_loss": 1.0, "test_acc1": top1, "test_acc5": 95.0}
    return json.dumps({"train_lr": 1e-3, **terms, **test, "epoch": epoch, "n_parameters": 5717416, **more}) + "\n"


@pytest.fixture
def write(tmp_path):
    """Write a run's folder from its top-1 of each epoch and its flags, and return it."""

    def write_run(name, top1, *more_flags, world_size=1, args=None, **more):
        folder = tmp_path / name
        folder.mkdir()
        stored = vars(flags.parse_args([*RUN, *map(str, more_flags)])) | {"world_size": world_size} | (args or {})
        (folder / "args.json").write_text(json.dumps(stored))
        (folder / "log.txt").write_text("".join(log_line(i, value, **more) for i, value in enumerate(top1)))
        return folder

    return write_run


@pytest.fixture
def show(capsys):
    """Return stdout and stderr of tables.py."""

    def run(*arguments, code=0):
        capsys.readouterr()
        assert tables.main([*map(str, arguments)]) == code
        return capsys.readouterr()

    return run


@pytest.fixture
def table(show):
    """Return the rows of the table by the name of the run."""
    return lambda *paths: {row["run"]: row for row in json.loads(show("--json", *paths).out)}


def cells(markdown):
    """Return the cells of a Markdown table, as one dict per row, by the name of the run."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


# Rows


def test_best_last_and_mean_of_last_ten(write, table):
    rows = table(write("long", [90, *range(10, 22)], "--epochs", 13), write("short", [30, 50, 40]))
    assert [rows["long"][name] for name in ("best", "last", "last10")] == [90, 21, 16.5]
    assert [rows["short"][name] for name in ("best", "last", "last10")] == [50, 40, None]


def test_seeds_share_a_row_with_mean_and_sample_deviation(write, table):
    runs = [write(f"run_{seed}", [10, 20, top1], "--seed", seed) for seed, top1 in enumerate((60, 62, 67))]
    row = table(*runs)["run_*"]
    assert (row["seeds"], row["best"]) == ([0, 1, 2], pytest.approx(63))
    assert row["best_std"] == pytest.approx(13**0.5)  # (9 + 1 + 16) / 2


def test_the_same_seed_twice_has_no_spread(write, table):
    row = table(write("run_a", [1, 2, 60]), write("run_b", [1, 2, 61]))["run_*"]
    assert (row["seeds"], row["best"], row["best_std"]) == ([0, 0], 60.5, None)


def test_a_run_named_twice_counts_once(write, table):
    run = write("run", [1, 2, 60])
    assert table(run, run / "log.txt", f"{run}/../run")["run"]["seeds"] == [0]


def test_gains_and_the_error_of_the_difference(write, table):
    for seed, (none, soft, spectral) in enumerate([(50, 60, 61), (52, 60, 65)]):
        write(f"none_{seed}", [1, 2, none], "--seed", seed)
        write(f"soft_{seed}", [1, 2, soft], "--seed", seed, *SOFT)
        run = write(f"spectral_{seed}", [1, 2, spectral], "--seed", seed, *SPECTRAL)
    rows = table(*run.parent.iterdir())
    assert rows["none_*"]["gain_no_teacher"] is rows["soft_*"]["gain_soft_kd"] is None
    assert (rows["soft_*"]["gain_no_teacher"], rows["spectral_*"]["gain_no_teacher"]) == (9, 12)
    assert rows["spectral_*"]["gain_soft_kd"] == 3
    # variances 2 and 8 of two seeds each: the means' are 1 and 4
    assert rows["spectral_*"]["gain_no_teacher_se"] == pytest.approx(5**0.5)
    assert rows["spectral_*"]["gain_soft_kd_se"] == pytest.approx(2)


COUNTS = ["--lr 1e-3", "--epochs 2", "--batch-size 128", "--drop-path 0.1", "--aa none", "--no-repeated-aug"]
COUNTS += ["--amp-dtype bfloat16", "--model deit_small_patch16_224", "--model-kwargs embed_dim=24"]
COUNTS += ["--gratings-sizes 100 100"]


@pytest.mark.parametrize("other", COUNTS)
def test_a_control_must_agree_in_what_counts(other, write, table):
    rows = table(write("none", [1, 2, 50], *other.split()), write("soft", [1, 2, 60], *SOFT))
    assert rows["soft"]["gain_no_teacher"] is None


@pytest.mark.parametrize(
    "other", ["--num_workers 3", "--output_dir elsewhere", "--no-dist-eval", "--batch-size 32 --accum-steps 2"]
)
def test_a_control_may_differ_in_what_does_not_count(other, write, table):
    rows = table(write("none", [1, 2, 50], *other.split()), write("soft", [1, 2, 60], *SOFT))
    assert rows["soft"]["gain_no_teacher"] == 10


def test_soft_kd_controls_only_the_same_distillation(write, table):
    run = write("spectral", [1, 2, 61], *SPECTRAL)
    assert table(run, write("soft", [1, 2, 60], *SOFT))["spectral"]["gain_soft_kd"] == 1
    others = ("--distillation-alpha 0.5", "--distillation-tau 2", "--teacher-model cait_xs24_384")
    for i, other in enumerate((*others, "--teacher-kwargs depth=6")):
        control = write(f"soft_{i}", [1, 2, 60], *SOFT, *other.split())
        assert table(run, control)["spectral"]["gain_soft_kd"] is None


def test_the_name_of_the_data_folder_counts_not_its_place(tmp_path, write, table):
    for place in ("here/ILSVRC2012", "there/ILSVRC2012", "there/Imagenette"):
        (tmp_path / "data" / place).mkdir(parents=True)
    data = ["--data-set", "IMNET", "--data-path"]
    soft = write("soft", [1, 2, 60], *SOFT, *data, tmp_path / "data/here/ILSVRC2012")
    same = write("same", [1, 2, 50], *data, tmp_path / "data/there/ILSVRC2012")
    other = write("other", [1, 2, 50], *data, tmp_path / "data/there/Imagenette")
    assert table(soft, same)["soft"]["gain_no_teacher"] == 10
    assert table(soft, other)["soft"]["gain_no_teacher"] is None


def test_unfinished_runs_are_excluded_from_comparisons(write, table, show):
    unfinished, soft = write("none", [1, 50]), write("soft", [1, 2, 60], *SOFT)
    rows = table(unfinished, soft)
    assert (rows["none"]["done"], rows["none"]["epochs_seen"]) == (False, 2)
    assert rows["soft"]["gain_no_teacher"] is None
    assert cells(show(unfinished, soft).out)["none"]["epochs"] == "2 of 3"


def test_unfinished_seeds_are_not_averaged(write, table):
    rows = table(write("a_0", [1, 2, 60]), write("a_1", [1, 30], "--seed", 1))
    assert (rows["a_0"]["best"], rows["a_1"]["best"]) == (60, 30)


@pytest.mark.parametrize("sched", ["cosine", "tanh", "poly", "step"])
def test_the_cool_down_counts_as_in_timm(sched, write, table):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)
    _, epochs = timm.scheduler.create_scheduler_v2(optimizer, sched, num_epochs=3, cooldown_epochs=2)
    row = table(write("run", [1, 2, 3], "--cooldown-epochs", 2, "--sched", sched))["run"]
    assert (row["epochs"], row["done"]) == (epochs, epochs == 3)


@pytest.mark.parametrize(
    ("more", "method"),
    [
        ([], "none"),
        (SOFT, "soft KD"),
        (SPECTRAL, "SpectralKD (2 pairs)"),
        ([*SPECTRAL, "--s-id", "0", "--t-id", "0"], "SpectralKD (1 pair)"),
        ([*SPECTRAL, "--feature-loss", "mse"], "MSE baseline (2 pairs)"),
        ([*SPECTRAL, "--distillation-beta", "0"], "soft KD"),
        (["--distillation-type", "hard", "--w-fft", "0"], "hard"),
        ([*SPECTRAL, "--distillation-type", "hard"], "hard + spectral (2 pairs)"),
        ([*SPECTRAL, "--distillation-type", "fft"], "fft + spectral (2 pairs)"),
        ([*SPECTRAL, "--distillation-type", "fft", "--feature-loss", "mse"], "fft + MSE (2 pairs)"),
    ],
)
def test_the_method_has_its_name(more, method, write, table):
    assert table(write("run", [1, 2, 3], *more))["run"]["method"] == method


def test_rows_that_look_the_same_name_their_differences(write, table):
    first = write("first", [1, 2, 3], *SPECTRAL, "--s-id", "0", "1", "--t-id", "0", "1")
    rows = table(first, write("ends", [1, 2, 3], *SPECTRAL), write("none", [1, 2, 3]))
    assert rows["first"]["method"] == "SpectralKD (2 pairs), s_id 0 1, t_id 0 1"
    assert rows["ends"]["method"] == "SpectralKD (2 pairs), s_id 0 11, t_id 0 23"
    assert rows["none"]["method"] == "none"


def test_teachers_come_first_and_methods_in_order(write, table, show):
    teacher = write("z_teacher", [1, 70, 65], "--model", "cait_s24_224", "--model-kwargs", *TEACHER)
    best, last = teacher / "model_best.pth", teacher / "checkpoint.pth"
    best.touch()
    last.touch()
    taught = ["--teacher-kwargs", *TEACHER, "--teacher-path"]
    runs = [
        write("a", [1, 2, 60], *SPECTRAL, *taught, best),
        write("b", [1, 2, 60], *SPECTRAL, "--feature-loss", "mse", *taught, best),
        write("c", [1, 2, 60], *SOFT, *taught, last),
        write("d", [1, 2, 60]),
        teacher,
    ]
    rows = table(*runs)
    assert list(rows) == ["z_teacher", "d", "c", "b", "a"]  # teacher, none, soft KD, MSE baseline, SpectralKD
    assert [row["teacher_top1"] for row in rows.values()] == [None, None, 65, 70, 70]
    assert cells(show(*runs).out)["a"]["teacher"] == "cait_s24_224 [1] (70.00)"


def test_model_arguments_stored_as_a_list_are_the_same(write, table):
    """Version 0.1 stored KEY=VALUE strings."""
    new = write("run_0", [1, 2, 3], "--model-kwargs", "depth=4", "name=x")
    old = write("run_1", [1, 2, 3], "--seed", 1, args={"model_kwargs": ["depth=4", "name=x"], "teacher_kwargs": []})
    assert table(new, old)["run_*"]["student"] == "deit_tiny_patch16_224 depth=4 name=x"


# Published numbers


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "ILSVRC2012"
    path.mkdir()
    return ["--data-set", "IMNET", "--data-path", str(path)]


LATER = ["--batch-size", "1024", "--drop-path", "0", "--warmup-epochs", "5", "--epochs"]


@pytest.mark.parametrize(
    ("more", "number"),
    [
        ([*LATER, 300], 74.86),
        ([*SOFT, *LATER, 300], 76.99),
        ([*SOFT, *LATER, 500], 78.07),
        ([*SPECTRAL, *LATER, 300, "--s-id", 0, "--t-id", 0], 77.0),
        ([*SPECTRAL, *LATER, 300], 77.08),
        ([*SPECTRAL, *LATER, 300, "--s-id", 11, "--t-id", 23], 76.83),
        ([*SPECTRAL, *LATER, 500, "--s-id", 11, "--t-id", 23], 77.59),
        ([*SPECTRAL, *LATER, 300, "--s-id", 11, "--t-id", 22], None),
        ([*SOFT, *LATER, 400], None),
        ([*SOFT, *LATER, 300, "--mixup", 0.8], None),
        ([*SOFT, *LATER, 300, "--teacher-model", "cait_xs24_384"], None),
        ([*SOFT, *LATER, 300, "--model-kwargs", "embed_dim=24"], None),
        ([*SOFT, *LATER, 300, "--data-set", "CIFAR"], None),
        ([*SOFT, *LATER, 300, "--batch-size", 256], None),
    ],
    ids=str,
)
def test_a_published_number_needs_its_own_recipe(more, number, write, table, imagenet):
    row = table(write("run", [1, 2, 3], *imagenet, *more, world_size=2))["run"]
    assert row["published"] == number
    assert (row["source"] is None) is (number is None)


def test_a_published_number_needs_1000_classes(write, table, imagenet):
    run = write("hundred", [1, 2, 3], *imagenet, *SOFT, *LATER, 300, world_size=2, n_parameters=5543716)
    row = table(run)["hundred"]
    assert row["published"] is row["source"] is None


@pytest.mark.parametrize("model", tables.PUBLISHED["parameters"])
def test_published_parameter_counts_are_timms(model):
    assert sum(p.numel() for p in timm.create_model(model).parameters()) == tables.PUBLISHED["parameters"][model]


def test_common_published_settings_are_the_defaults(imagenet):
    known = tables.settings(vars(flags.parse_args(imagenet)) | {"world_size": 1})
    base = tables.PUBLISHED["settings"]["base"]
    assert {name: known[name] for name in base} == base


def test_the_names_of_arguments_are_flags():
    known = {action.dest for action in flags.get_args_parser()._actions} | {"global_batch", "like", "top1", "source"}
    entries = [*tables.PUBLISHED["settings"].values(), *tables.PUBLISHED["results"]]
    assert set().union(tables.NEUTRAL, tables.FEATURE, tables.TEACHER, *entries) - known == set()


# Logs


def test_logs_of_the_original_need_no_arguments(tmp_path, show):
    (tmp_path / "soft.txt").write_text("".join(log_line(i, 60 + i / 1000) for i in range(20)))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").write_text(log_line(0, 50.0, train_loss_fft=0.25))
    rows = cells(show(tmp_path / "soft.txt", tmp_path / "run").out)
    assert rows["soft"]["best"] == "60.019"
    assert rows["soft"]["mean of last 10"] == "60.014"  # of 60.010 ... 60.019, 60.0145 to even
    assert rows["soft"]["epochs"] == "20 seen"
    assert rows["soft"]["student"] == "unknown, 5717416 parameters"
    assert rows["soft"]["method"] == "unknown; loss terms base, dist"
    assert rows["run"]["method"] == "unknown; loss terms base, dist, fft"
    assert rows["run"]["published"] == rows["run"]["over soft KD"] == ""


def test_the_data_set_is_shown_if_it_is_known(tmp_path, write, show):
    (tmp_path / "log.txt").write_text(log_line(0, 50.0))
    rows = cells(show(write("run", [1, 2, 3]), tmp_path).out)
    assert [row["data set"] for row in rows.values()] == ["GRATINGS", "unknown"]


def test_the_later_line_of_an_epoch_counts(write, table, show):
    run = write("run", [1, 70, 3])
    with open(run / "log.txt", "a") as file:
        file.write(log_line(1, 20) + log_line(2, 40))
    assert "repeats epoch 1" in show(run).err
    assert table(run)["run"]["best"] == 40


def test_an_incomplete_last_line_is_skipped(write, table, show):
    run = write("run", [10, 20, 30])
    (run / "log.txt").write_text((run / "log.txt").read_text()[:-40])
    assert "last line is incomplete" in show(run).err
    row = table(run)["run"]
    assert (row["best"], row["epochs_seen"], row["done"]) == (20, 2, False)


FOREIGN = {
    "README.md": b"# Published logs\n",
    "other.json": b'{"epoch": 0, "accuracy": 3}\n',
    "list.txt": b"[1, 2]\n",
    "nan.txt": log_line(0, float("nan")).encode(),
    "binary.pth": b"PK\x03\x04\xff\xfe",
    "empty.txt": b"",
    "torn.txt": (log_line(0, 1) + log_line(1, 2)[:30] + "\n" + log_line(2, 3)).encode(),
}


def test_files_that_are_no_logs_are_named_and_skipped(tmp_path, write, show):
    for name, content in FOREIGN.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    foreign = [str(tmp_path / name) for name in (*FOREIGN, "folder", "missing")]
    *skipped, last = show(*foreign, code=2).err.splitlines()
    assert [line.split(": skipped, ")[0] for line in skipped] == foreign
    assert last.startswith("error: none of the arguments is")
    output = show(*foreign, write("run", [1, 2, 3]))
    assert len(output.err.splitlines()) == len(foreign)
    assert list(cells(output.out)) == ["run"]


@pytest.mark.parametrize("content", ['{"model": "x"}', "[]", "{", '{"sched": 3, "epochs": 1, "cooldown_epochs": 0}'])
def test_foreign_arguments_are_ignored(content, write, table, show):
    run = write("run", [1, 2, 3])
    (run / "args.json").write_text(content)
    assert "not the arguments of a run" in show(run).err
    assert table(run)["run"]["method"].startswith("unknown")


# Output


def test_markdown_is_aligned_and_shows_spread_and_gain(write, show):
    runs = [write(f"a|b_{seed}", [1, 2, 60 + seed], *SOFT, "--seed", seed, test_ema_acc1=7.5) for seed in (0, 1)]
    lines = show(*runs, write("none", [1, 2, 50])).out.splitlines()
    lines = [line for line in lines if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    for cell in (r" a\|b_* ", " 60.500 ± 0.707 ", " +10.500 ", " 0, 1 (n = 2) "):
        assert f"|{cell}" in lines[3]
    assert "| best of EMA " in lines[0]


def test_csv_holds_the_numbers_of_json(write, show):
    runs = [write(f"run_{seed}", [1, 2, 60 + seed], *SOFT, "--seed", seed, test_ema_acc1=7.5) for seed in (0, 1)]
    runs.append(write("none", [1, 2, 50]))
    rows, records = csv.DictReader(io.StringIO(show("--csv", *runs).out)), json.loads(show("--json", *runs).out)
    for row, record in zip(rows, records, strict=True):
        flat = {name: " ".join(map(str, v)) if isinstance(v, list) else v for name, v in record.items()}
        assert row == {name: "" if value is None else str(value) for name, value in flat.items()}
    assert records[1]["ema_best"] == 7.5


def test_the_ema_has_a_column_only_if_it_was_evaluated(write, show):
    assert "EMA" not in show(write("run", [1, 2, 3])).out


def test_the_plot_has_one_color_per_row(tmp_path, write, show):
    file = tmp_path / "curves.png"
    show(write("none", [10, 30, 40]), write("soft", [20, 40, 50], *SOFT), "--plot", file)
    pixels = {color for _, color in Image.open(file).convert("RGB").getcolors(maxcolors=2**24)}
    colors = [tuple(bytes.fromhex(color[1:])) for color in plots.COLORS]
    assert pixels & set(colors) == {*colors[:2], (0, 0, 0)}


def test_a_log_without_loss_terms_is_drawn(tmp_path, write, show):
    """DeiT's own logs have none."""
    run = write("run", [10, 30, 40])
    (run / "log.txt").write_text('{"epoch": 0, "test_acc1": 10.0}\n{"epoch": 1, "test_acc1": 20.0}\n')
    show(run, "--plot", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("file", ["missing/curves.png", "curves.txt"])
def test_a_plot_that_cannot_be_written_is_one_line(file, tmp_path, write, show):
    assert len(show(write("run", [1, 2, 3]), "--plot", tmp_path / file, code=2).err.splitlines()) == 1


@pytest.mark.slow
def test_a_table_imports_neither_torch_nor_matplotlib(write):
    code = "import sys, tables; tables.main(sys.argv[1:]); print({'torch', 'numpy', 'matplotlib'} & set(sys.modules))"
    command = [sys.executable, "-c", code, str(write("run", [1, 2, 3]))]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.splitlines()[-1] == "set()"


@pytest.mark.slow
def test_runs_of_main_are_read(tmp_path, table):
    """The contract between RunLog and tables.py, including the EMA."""
    import main

    for seed in (0, 1):
        argv = tiny_run("--output_dir", tmp_path / f"run_{seed}", "--eval-ema", "--seed", seed)
        main.main(flags.parse_args(argv))
    row = table(*tmp_path.iterdir())["run_*"]
    lines = [json.loads((tmp_path / f"run_{seed}" / "log.txt").read_text()) for seed in (0, 1)]
    assert row["best"] == pytest.approx(sum(line["test_acc1"] for line in lines) / 2)
    assert row["ema_best"] == pytest.approx(sum(line["test_ema_acc1"] for line in lines) / 2)
    assert (row["done"], row["epochs"], row["global_batch"], sorted(row["seeds"])) == (True, 1, 16, [0, 1])
    assert row["student"] == " ".join(["deit_tiny_patch16_224", *STUDENT])
