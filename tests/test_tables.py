"""The table shows what the logs hold, compares only what may be compared, and says what it cannot read."""

import csv
import io
import json
import subprocess
import sys

import pytest
import timm
import torch
from conftest import ROOT, STUDENT, TEACHER, tiny_run
from PIL import Image

import main
import tables

RUN = ["--data-set", "GRATINGS", "--model", "deit_tiny_patch16_224", "--epochs", "3", "--device", "cpu"]
SOFT = ["--distillation-type", "soft", "--distillation-alpha", "0.9", "--w-fft", "0"]
SPECTRAL = [*SOFT, "--s-id", "0", "11", "--t-id", "0", "23", "--w-fft", "0.2"]


def log_line(epoch, top1, **more):
    """A line with the keys of the original program."""
    terms = {"train_loss": 1.5, "train_loss_base": 0.5, "train_loss_fft": 0.0, "train_loss_dist": 1.0}
    test = {"test_loss": 1.0, "test_acc1": top1, "test_acc5": 95.0}
    return json.dumps({"train_lr": 1e-3, **terms, **test, "epoch": epoch, "n_parameters": 5717416, **more}) + "\n"


@pytest.fixture
def write(tmp_path, capsys):
    """Writes a run's folder from its top-1 of each epoch and its flags, and returns it."""

    def write_run(name, top1, *flags, world_size=1, **more):
        folder = tmp_path / name
        folder.mkdir()
        args = vars(main.parse_args([*RUN, *map(str, flags)])) | {"world_size": world_size}
        (folder / "args.json").write_text(json.dumps(args))
        (folder / "log.txt").write_text("".join(log_line(i, value, **more) for i, value in enumerate(top1)))
        capsys.readouterr()  # what the flags' check had to say
        return folder

    return write_run


@pytest.fixture
def table(capsys):
    """Rows of the table as JSON, by the name of the run."""

    def read(*paths):
        capsys.readouterr()
        assert tables.main(["--json", *map(str, paths)]) == 0
        return {row["run"]: row for row in json.loads(capsys.readouterr().out)}

    return read


def test_best_last_and_mean_of_the_last_ten(write, table):
    long, short = write("long", [90, *range(10, 22)], "--epochs", 13), write("short", [30, 50, 40])
    rows = table(long, short)
    assert [rows["long"][name] for name in ("best", "last", "last10")] == [90, 21, 16.5]
    assert [rows["short"][name] for name in ("best", "last", "last10")] == [50, 40, None]


def test_runs_that_differ_in_their_seed_are_one_row_with_mean_and_sample_deviation(write, table):
    runs = [write(f"run_{seed}", [10, 20, top1], "--seed", seed) for seed, top1 in enumerate((60, 62, 67))]
    row = table(*runs)["run_*"]
    assert row["seeds"] == [0, 1, 2]
    assert row["best"] == pytest.approx(63)
    assert row["best_std"] == pytest.approx(13**0.5)  # (9 + 1 + 16) / 2


def test_the_same_seed_twice_has_no_spread(write, table):
    row = table(write("run_a", [1, 2, 60]), write("run_b", [1, 2, 61]))["run_*"]
    assert (row["seeds"], row["best"], row["best_std"]) == ([0, 0], 60.5, None)


def test_a_run_that_is_named_twice_counts_once(write, table):
    run = write("run", [1, 2, 60])
    assert table(run, run / "log.txt", f"{run}/../run")["run"]["seeds"] == [0]


def test_gains_are_over_the_controls_with_the_error_of_the_difference(write, table):
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


@pytest.mark.parametrize(
    ("other", "counts"),
    [
        (["--lr", 1e-3], True),
        (["--epochs", 2], True),
        (["--batch-size", 128], True),
        (["--drop-path", 0.1], True),
        (["--aa", "none"], True),
        (["--no-repeated-aug"], True),
        (["--amp-dtype", "bfloat16"], True),
        (["--model", "deit_small_patch16_224"], True),
        (["--model-kwargs", "embed_dim=24"], True),
        (["--gratings-sizes", 100, 100], True),
        (["--num_workers", 3], False),
        (["--output_dir", "elsewhere"], False),
        (["--no-dist-eval"], False),
        (["--batch-size", 32, "--accum-steps", 2], False),
    ],
    ids=str,
)
def test_a_control_must_agree_in_every_argument_that_counts(other, counts, write, table):
    none, soft = write("none", [1, 2, 50], *other), write("soft", [1, 2, 60], *SOFT)
    assert table(none, soft)["soft"]["gain_no_teacher"] == (None if counts else 10)


def test_soft_kd_is_a_control_for_the_same_weight_temperature_and_teacher_only(write, table):
    run = write("spectral", [1, 2, 61], *SPECTRAL)
    assert table(run, write("soft", [1, 2, 60], *SOFT))["spectral"]["gain_soft_kd"] == 1
    for i, other in enumerate(
        (["--distillation-alpha", 0.5], ["--distillation-tau", 2], ["--teacher-model", "cait_xs24_384"])
    ):
        assert table(run, write(f"soft_{i}", [1, 2, 60], *SOFT, *other))["spectral"]["gain_soft_kd"] is None


def test_the_place_of_the_images_does_not_count_but_their_name_does(tmp_path, write, table):
    for place in ("here/ILSVRC2012", "there/ILSVRC2012", "there/Imagenette"):
        (tmp_path / "data" / place).mkdir(parents=True)
    flags = ["--data-set", "IMNET", "--data-path"]
    soft = write("soft", [1, 2, 60], *SOFT, *flags, tmp_path / "data/here/ILSVRC2012")
    same = write("same", [1, 2, 50], *flags, tmp_path / "data/there/ILSVRC2012")
    other = write("other", [1, 2, 50], *flags, tmp_path / "data/there/Imagenette")
    assert table(soft, same)["soft"]["gain_no_teacher"] == 10
    assert table(soft, other)["soft"]["gain_no_teacher"] is None


def test_a_run_that_is_going_says_where_it_is_and_takes_part_in_no_gain(write, table, capsys):
    going, soft = write("none", [1, 50]), write("soft", [1, 2, 60], *SOFT)
    rows = table(going, soft)
    assert (rows["none"]["done"], rows["none"]["epochs_seen"]) == (False, 2)
    assert rows["soft"]["gain_no_teacher"] is None
    tables.main([str(going), str(soft)])
    assert "| 2 of 3 " in capsys.readouterr().out


def test_seeds_that_are_going_are_not_averaged_with_those_that_are_done(write, table):
    rows = table(write("a_0", [1, 2, 60]), write("a_1", [1, 30], "--seed", 1))
    assert (rows["a_0"]["best"], rows["a_1"]["best"]) == (60, 30)


def test_the_cool_down_belongs_to_the_length_of_a_run(write, table):
    row = table(write("run", [1, 2, 3], "--cooldown-epochs", 2))["run"]
    assert row["done"] is False
    args = main.parse_args([*RUN, "--cooldown-epochs", "2"])
    assert row["epochs"] == main.build_optimizer(args, torch.nn.Linear(1, 1))[2]  # the trainer's own count


@pytest.mark.parametrize(
    ("flags", "method"),
    [
        ([], "none"),
        (SOFT, "soft KD"),
        (SPECTRAL, "SpectralKD (2 pairs)"),
        ([*SPECTRAL, "--s-id", "0", "--t-id", "0"], "SpectralKD (1 pair)"),
        ([*SPECTRAL, "--feature-loss", "mse"], "MSE twin (2 pairs)"),
        ([*SPECTRAL, "--distillation-beta", "0"], "soft KD"),
        (["--distillation-type", "hard", "--w-fft", "0"], "hard"),
        ([*SPECTRAL, "--distillation-type", "hard"], "hard + spectral (2 pairs)"),
        ([*SPECTRAL, "--distillation-type", "fft"], "fft + spectral (2 pairs)"),
        ([*SPECTRAL, "--distillation-type", "fft", "--feature-loss", "mse"], "fft + MSE (2 pairs)"),
    ],
)
def test_the_method_has_its_name(flags, method, write, table):
    assert table(write("run", [1, 2, 3], *flags))["run"]["method"] == method


def test_rows_that_would_look_alike_say_in_what_they_differ(write, table):
    first = write("first", [1, 2, 3], *SPECTRAL, "--s-id", "0", "1", "--t-id", "0", "1")
    rows = table(first, write("ends", [1, 2, 3], *SPECTRAL), write("none", [1, 2, 3]))
    assert rows["first"]["method"] == "SpectralKD (2 pairs), s_id 0 1, t_id 0 1"
    assert rows["ends"]["method"] == "SpectralKD (2 pairs), s_id 0 11, t_id 0 23"
    assert rows["none"]["method"] == "none"


def test_the_teacher_comes_first_and_shows_its_own_top1_beside_its_students(write, table, capsys):
    teacher = write("z_teacher", [1, 70, 65], "--model", "cait_s24_224", "--model-kwargs", *TEACHER)
    for name in ("model_best.pth", "checkpoint.pth"):
        (teacher / name).touch()
    flags = ["--teacher-kwargs", *TEACHER, "--teacher-path"]
    best, last = teacher / "model_best.pth", teacher / "checkpoint.pth"
    runs = [
        write("a", [1, 2, 60], *SPECTRAL, *flags, best),
        write("b", [1, 2, 60], *SPECTRAL, "--feature-loss", "mse", *flags, best),
        write("c", [1, 2, 60], *SOFT, *flags, last),
        write("d", [1, 2, 60]),
        teacher,
    ]
    rows = table(*runs)
    assert list(rows) == ["z_teacher", "d", "c", "b", "a"]  # teacher, none, soft KD, MSE twin, SpectralKD
    assert [row["teacher_top1"] for row in rows.values()] == [None, None, 65, 70, 70]
    tables.main([*map(str, runs)])
    assert "cait_s24_224 [1] (70.00)" in capsys.readouterr().out


# Published numbers


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "ILSVRC2012"
    path.mkdir()
    return ["--data-set", "IMNET", "--data-path", str(path)]


LATER = ["--batch-size", "1024", "--drop-path", "0", "--epochs"]


@pytest.mark.parametrize(
    ("flags", "number"),
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
def test_a_published_number_stands_beside_its_own_recipe_only(flags, number, write, table, imagenet):
    row = table(write("run", [1, 2, 3], *imagenet, *flags, world_size=2))["run"]
    assert row["published"] == number
    assert (row["source"] is None) is (number is None)


def test_no_published_number_stands_beside_a_run_of_other_classes(write, table, imagenet):
    flags = [*imagenet, *SOFT, *LATER, 300]
    row = table(write("hundred", [1, 2, 3], *flags, world_size=2, n_parameters=5543716))["hundred"]  # of 100 classes
    assert row["published"] is row["source"] is None


@pytest.mark.parametrize("model", tables.PARAMETERS)
def test_published_models_have_the_parameters_that_the_table_expects(model):
    assert sum(p.numel() for p in timm.create_model(model).parameters()) == tables.PARAMETERS[model]


def test_what_published_runs_have_in_common_are_the_trainers_defaults(imagenet):
    defaults = vars(main.parse_args(imagenet))
    assert {name: defaults[name] for name in tables.BASE} == tables.BASE


def test_the_names_of_arguments_are_flags():
    flags = {action.dest for action in main.get_args_parser()._actions} | {"world_size", "global_batch"}
    published = {name for _, _, needs in tables.PUBLISHED for name in needs}
    assert {*tables.NEUTRAL, *tables.FEATURE, *tables.TEACHER, *published} - flags == set()


# Logs


def test_logs_of_the_original_are_read_without_arguments(tmp_path, capsys):
    (tmp_path / "soft.txt").write_text("".join(log_line(i, 60 + i / 1000) for i in range(20)))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").write_text(log_line(0, 50.0, train_loss_fft=0.25))
    assert tables.main([str(tmp_path / "soft.txt"), str(tmp_path / "run")]) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    cells = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:4]}
    assert cells["soft"]["best"] == "60.019"
    assert cells["soft"]["mean of last 10"] == "60.014"  # of 60.010 ... 60.019, 60.0145 to even
    assert cells["soft"]["epochs"] == "20 seen"
    assert cells["soft"]["student"] == "unknown, 5717416 parameters"
    assert cells["soft"]["method"] == "unknown; loss terms base, dist"
    assert cells["run"]["method"] == "unknown; loss terms base, dist, fft"
    assert cells["run"]["published"] == cells["run"]["over soft KD"] == ""


def test_the_later_of_two_lines_of_an_epoch_counts(write, table, capsys):
    run = write("run", [1, 70, 3])
    with open(run / "log.txt", "a") as file:
        file.write(log_line(1, 20) + log_line(2, 40))
    assert tables.main([str(run)]) == 0
    assert "repeats epoch 1" in capsys.readouterr().err
    assert table(run)["run"]["best"] == 40


def test_a_torn_last_line_is_left_out_and_said(write, table, capsys):
    run = write("run", [10, 20, 30])
    whole = (run / "log.txt").read_text()
    (run / "log.txt").write_text(whole[:-40])
    assert tables.main([str(run)]) == 0
    assert "last line is torn" in capsys.readouterr().err
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


def test_unreadable_and_foreign_logs_are_named_and_skipped(tmp_path, write, capsys):
    for name, content in FOREIGN.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    foreign = [str(tmp_path / name) for name in (*FOREIGN, "folder", "missing")]
    assert tables.main(foreign) == 2
    *skipped, last = capsys.readouterr().err.splitlines()
    assert [line.split(": skipped, ")[0] for line in skipped] == foreign
    assert last.startswith("error: none of the arguments is")
    assert tables.main([*foreign, str(write("run", [1, 2, 3]))]) == 0
    output = capsys.readouterr()
    assert len(output.err.splitlines()) == len(foreign)
    assert "| run " in output.out


@pytest.mark.parametrize("content", ['{"model": "x"}', "[]", "{", '{"sched": 3, "epochs": 1, "cooldown_epochs": 0}'])
def test_foreign_arguments_are_said_and_the_log_is_shown_without(content, write, table, capsys):
    run = write("run", [1, 2, 3])
    (run / "args.json").write_text(content)
    assert tables.main([str(run)]) == 0
    assert "not the arguments of a run" in capsys.readouterr().err
    assert table(run)["run"]["method"].startswith("unknown")


# Output


def test_markdown_csv_and_json_hold_the_same_numbers(write, capsys):
    runs = [write(f"a|b_{seed}", [1, 2, 60 + seed], *SOFT, "--seed", seed, test_ema_acc1=7.5) for seed in (0, 1)]
    runs = [str(run) for run in (*runs, write("none", [1, 2, 50]))]
    outputs = []
    for flags in ([], ["--csv"], ["--json"]):
        tables.main([*flags, *runs])
        outputs.append(capsys.readouterr().out)
    lines = [line for line in outputs[0].splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1  # aligned
    assert "| best of EMA " in lines[0]
    assert r"| a\|b_* " in lines[3]
    assert "| 60.500 ± 0.707 |" in lines[3]
    assert "| +10.500 " in lines[3]
    assert "| 0, 1 (n = 2) |" in lines[3]
    rows, records = list(csv.DictReader(io.StringIO(outputs[1]))), json.loads(outputs[2])
    for row, record in zip(rows, records, strict=True):
        assert row.keys() == record.keys()
        flat = {name: " ".join(map(str, v)) if isinstance(v, list) else v for name, v in record.items()}
        assert row == {name: "" if value is None else str(value) for name, value in flat.items()}
    assert records[1]["ema_best"] == 7.5


def test_the_average_has_a_column_only_where_it_was_scored(write, capsys):
    tables.main([str(write("run", [1, 2, 3]))])
    assert "EMA" not in capsys.readouterr().out


def test_the_plot_shows_every_row_in_a_colour_of_its_own(tmp_path, write):
    runs = [write("none", [10, 30, 40]), write("soft", [20, 40, 50], *SOFT)]
    file = tmp_path / "curves.png"
    assert tables.main([*map(str, runs), "--plot", str(file)]) == 0
    pixels = {colour for _, colour in Image.open(file).convert("RGB").getcolors(maxcolors=2**24)}
    colours = {tuple(bytes.fromhex(colour[1:])) for colour in tables.COLOURS}
    assert colours & pixels == {tuple(bytes.fromhex(colour[1:])) for colour in tables.COLOURS[:2]} | {(0, 0, 0)}


def test_a_log_without_loss_terms_is_drawn(tmp_path, write):
    """As DeiT's own are."""
    run = write("run", [10, 30, 40])
    (run / "log.txt").write_text('{"epoch": 0, "test_acc1": 10.0}\n{"epoch": 1, "test_acc1": 20.0}\n')
    assert tables.main([str(run), "--plot", str(tmp_path / "curves.png")]) == 0


@pytest.mark.parametrize("file", ["missing/curves.png", "curves.txt"])
def test_a_plot_that_cannot_be_written_is_one_line(file, tmp_path, write, capsys):
    assert tables.main([str(write("run", [1, 2, 3])), "--plot", str(tmp_path / file)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
def test_a_table_needs_neither_torch_nor_matplotlib(write):
    code = "import sys, tables; tables.main(sys.argv[1:]); print({'torch', 'numpy', 'matplotlib'} & set(sys.modules))"
    command = [sys.executable, "-c", code, str(write("run", [1, 2, 3]))]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.splitlines()[-1] == "set()"


@pytest.mark.slow
def test_a_run_of_the_trainer_is_read(tmp_path, table):
    """The contract between utils.RunLog and the table, the average of the weights included."""
    for seed in (0, 1):
        main.main(main.parse_args(tiny_run("--output_dir", tmp_path / f"run_{seed}", "--eval-ema", "--seed", seed)))
    row = table(*tmp_path.iterdir())["run_*"]
    lines = [json.loads((tmp_path / f"run_{seed}" / "log.txt").read_text()) for seed in (0, 1)]
    assert row["best"] == pytest.approx(sum(line["test_acc1"] for line in lines) / 2)
    assert row["ema_best"] == pytest.approx(sum(line["test_ema_acc1"] for line in lines) / 2)
    assert (row["done"], row["epochs"], row["global_batch"], sorted(row["seeds"])) == (True, 1, 16, [0, 1])
    assert row["student"] == " ".join(["deit_tiny_patch16_224", *STUDENT])


@pytest.mark.parametrize("change", [{"seed": None}, {"model_kwargs": None}, {"distillation_type": "x"}, {"s_id": None}])
def test_arguments_that_are_none_of_a_run_are_left_aside(change, write, capsys):
    folder = write("run", [1, 2, 3])
    args = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(args | change))
    assert tables.main([str(folder)]) == 0
    assert "not the arguments of a run" in capsys.readouterr().err
