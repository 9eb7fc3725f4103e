"""tables.py shows what the logs contain, and compares only comparable runs."""

import csv
import io
import json

import pytest
import timm.scheduler
import torch
from conftest import ROOT, TEACHER
from logs import SOFT, SPECTRAL, cells, log_line, rows_of, write_run
from PIL import Image

import flags
import plots
import runs
import tables


@pytest.fixture
def write(tmp_path):
    return lambda name, *top1_and_flags, **more: write_run(tmp_path / name, *top1_and_flags, **more)


@pytest.fixture
def show(capsys):
    """Return stdout and stderr of tables.py."""

    def run(*arguments, code=0):
        capsys.readouterr()
        assert tables.main([*map(str, arguments)]) == code
        return capsys.readouterr()

    return run


# Rows


def test_best_last_and_mean_of_last_ten(write):
    rows = rows_of(write("long", [90, *range(10, 22)], "--epochs", 13), write("short", [30, 50, 40]))
    assert [rows["long"][name] for name in ("best", "last", "last10")] == [90, 21, 16.5]
    assert [rows["short"][name] for name in ("best", "last", "last10")] == [50, 40, None]


# Seeds, their best top-1, and mean and sample deviation of these.
SPREADS = [([0, 1, 2], [60, 62, 67], 63, 13**0.5), ([0, 0], [60, 61], 60.5, None)]


@pytest.mark.parametrize(("seeds", "top1", "mean", "deviation"), SPREADS)
def test_seeds_share_a_row_with_mean_and_sample_deviation(seeds, top1, mean, deviation, write):
    """The same seed twice has no spread, and a run named twice counts once."""
    folders = [write(f"run_{i}", [10, 20, top1[i]], "--seed", seed) for i, seed in enumerate(seeds)]
    row = rows_of(*folders, folders[0] / "log.txt", f"{folders[0]}/../run_0")["run_*"]
    assert (row["seeds"], row["best"], row["best_std"]) == (seeds, pytest.approx(mean), pytest.approx(deviation))


def test_gains_and_the_error_of_the_difference(tmp_path, write):
    for seed, (none, soft, spectral) in enumerate([(50, 60, 61), (52, 60, 65)]):
        write(f"none_{seed}", [1, 2, none], "--seed", seed)
        write(f"soft_{seed}", [1, 2, soft], "--seed", seed, *SOFT)
        write(f"spectral_{seed}", [1, 2, spectral], "--seed", seed, *SPECTRAL)
    rows = rows_of(tmp_path)  # a folder of runs stands for its runs
    assert rows["none_*"]["gain_no_teacher"] is rows["soft_*"]["gain_soft_kd"] is None
    assert (rows["soft_*"]["gain_no_teacher"], rows["spectral_*"]["gain_no_teacher"]) == (9, 12)
    assert rows["spectral_*"]["gain_soft_kd"] == 3
    # variances 2 and 8 of two seeds each: the means' are 1 and 4
    assert rows["spectral_*"]["gain_no_teacher_se"] == pytest.approx(5**0.5)
    assert rows["spectral_*"]["gain_soft_kd_se"] == pytest.approx(2)


COUNTS = ["--lr 1e-3", "--epochs 2", "--batch-size 128", "--drop-path 0.1", "--aa none", "--no-repeated-aug"]
COUNTS += ["--amp-dtype bfloat16", "--model deit_small_patch16_224", "--model-kwargs embed_dim=24"]
COUNTS += ["--gratings-sizes 100 100", "--device cuda"]  # another default dtype
DOES_NOT = ["--num_workers 3", "--output_dir elsewhere", "--no-dist-eval", "--batch-size 32 --accum-steps 2"]


@pytest.mark.parametrize("other", [*COUNTS, *DOES_NOT])
def test_a_control_must_agree_in_what_counts(other, write):
    rows = rows_of(write("none", [1, 2, 50], *other.split()), write("soft", [1, 2, 60], *SOFT))
    assert rows["soft"]["gain_no_teacher"] == (None if other in COUNTS else 10)


def test_the_teachers_dtype_does_not_matter_without_a_teacher(write):
    rows = rows_of(write("none", [1, 2, 50]), write("soft", [1, 2, 60], *SOFT, "--teacher-dtype", "bfloat16"))
    assert rows["soft"]["gain_no_teacher"] == 10


OTHER_KD = ["--distillation-alpha 0.5", "--distillation-tau 2", "--teacher-model cait_xs24_384"]


@pytest.mark.parametrize("other", ["", *OTHER_KD, "--teacher-kwargs depth=6"])
def test_soft_kd_controls_only_the_same_distillation(other, write):
    rows = rows_of(write("spectral", [1, 2, 61], *SPECTRAL), write("soft", [1, 2, 60], *SOFT, *other.split()))
    assert rows["spectral"]["gain_soft_kd"] == (None if other else 1)


@pytest.mark.parametrize(("folder", "gain"), [("/there/ILSVRC2012", 10), ("here/Imagenette", None)])
def test_the_name_of_the_data_folder_counts_not_its_place(folder, gain, write):
    soft = write("soft", [1, 2, 60], *SOFT, args={"data_path": "here/ILSVRC2012"})
    assert rows_of(soft, write("none", [1, 2, 50], args={"data_path": folder}))["soft"]["gain_no_teacher"] == gain


def test_unfinished_runs_are_excluded_from_comparisons(write, show):
    folders = [write("none", [1, 50]), write("soft", [1, 2, 60], *SOFT), write("soft_1", [1, 30], *SOFT, "--seed", 1)]
    rows = rows_of(*folders)
    assert [rows["soft"][name] for name in ("gain_no_teacher", "best", "seeds")] == [None, 60, [0]]
    assert cells(show(*folders).out)["none"]["epochs"] == "2 of 3"


@pytest.mark.parametrize("sched", ["cosine", "tanh", "poly", "step"])
def test_the_cool_down_counts_as_in_timm(sched, write):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)
    _, epochs = timm.scheduler.create_scheduler_v2(optimizer, sched, num_epochs=3, cooldown_epochs=2)
    row = rows_of(write("run", [1, 2, 3], "--cooldown-epochs", 2, "--sched", sched))["run"]
    assert (row["epochs"], row["done"]) == (epochs, epochs == 3)


METHODS = {
    "no teacher": [],
    "soft KD": [*SPECTRAL, "--distillation-beta", "0"],
    "SpectralKD (1 pair)": [*SPECTRAL, "--s-id", "0", "--t-id", "0"],
    "SpectralKD (all blocks)": [*SPECTRAL, "--s-id", "all", "--t-id", "all"],
    "MSE baseline (2 pairs)": [*SPECTRAL, "--feature-loss", "mse"],
    "soft KD + manifold (2 pairs)": [*SPECTRAL, "--feature-loss", "manifold"],
    "hard": ["--distillation-type", "hard", "--w-fft", "0"],
    "fft + spectral (2 pairs)": [*SPECTRAL, "--distillation-type", "fft"],
}


@pytest.mark.parametrize("method", METHODS)
def test_the_method_has_its_name(method, write):
    assert rows_of(write("run", [1, 2, 3], *METHODS[method]))["run"]["method"] == method


def test_teachers_come_first_and_methods_in_order(write, show):
    teacher = write("z_teacher", [1, 70, 65], "--model", "vit_tiny_patch16_224", "--model-kwargs", *TEACHER)
    taught = [*SPECTRAL, "--teacher-kwargs", *TEACHER]
    by = {"args": {"teacher_path": str(teacher / "model_best.pth")}}
    folders = [teacher, write("a", [1, 2, 60], *taught, **by), write("d", [1, 2, 60])]
    folders.append(write("b", [1, 2, 60], *taught, "--feature-loss", "mse", **by))
    folders.append(write("c", [1, 2, 60], *taught, "--w-fft", 0, **by))
    folders.append(write("e", [1, 2, 60], "--distillation-type", "hard", "--w-fft", 0))
    rows = cells(show(*folders).out)
    assert list(rows) == ["z_teacher", "d", "e", "c", "b", "a"]  # teacher, none, hard, soft KD, MSE, SpectralKD
    assert rows["a"]["teacher"] == "cait_s24_224 [1]"


# Sweeps


@pytest.fixture
def sweep(tmp_path, write):
    """Two seeds each of two weights, and a run without a teacher."""
    for weight, top1 in ((10, 61), (0.05, 62)):
        for seed in (0, 1):
            more = [*SPECTRAL, "--w-fft", weight, "--seed", seed]
            write(f"w-fft={weight},seed={seed}", [1, 2, top1 + seed], *more)
    write("a", [1, 2, 50])
    return tmp_path


def test_settings_that_tell_rows_apart_are_columns(sweep, show):
    rows = cells(show(sweep).out)
    assert [row["w-fft"] for row in rows.values()] == ["", "0.05", "10"]
    assert "s-id" not in rows["a"]


def test_varied_flags_give_columns_and_order(sweep, write, show):
    more = write("b", [1, 2, 60], *SPECTRAL, "--s-id", 0, "--t-id", 0, "--w-fft", 2)
    rows = cells(show(sweep, more, "--vary", "w-fft,--s-id").out)
    shown = [(row["w-fft"], row["s-id"], row["best"]) for row in rows.values()]
    ends = [("0.05", "0 11", "62.500 ± 0.707"), ("2", "0", "60.000"), ("10", "0 11", "61.500 ± 0.707")]
    assert shown == [("", "", "50.000"), *ends]


def test_a_flag_that_some_runs_do_not_have_can_be_varied(write, show):
    """Empty values come before text, and no value before all others."""
    folders = [write(f"run{i}", [1], "--model-kwargs", *kwargs) for i, kwargs in enumerate((["depth=6"], []))]
    rows = cells(show(*folders, "--vary", "model-kwargs").out)
    assert [row["model-kwargs"] for row in rows.values()] == ["", "depth=6"]


@pytest.mark.parametrize("name", ["seed", "num_workers", "nothing"])
def test_what_cannot_change_the_result_cannot_be_varied(name, sweep, capsys):
    with pytest.raises(SystemExit):
        tables.main([str(sweep), "--vary", name])
    assert f"flags of main.py that change the result, got {name}" in capsys.readouterr().err


def test_a_sweep_is_drawn_with_its_seeds(sweep, write):
    write("unfinished", [1], *SPECTRAL, "--w-fft", 7)
    axis = plots.draw_rows(tables.tabulate(runs.read_runs([str(sweep)]), ["w_fft", "s_id"])).axes[0]
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels == ["no teacher", *(f"SpectralKD (2 pairs), w-fft {w}, s-id 0 11" for w in (0.05, 10.0))]
    means = [(bars[0].get_xdata()[0], bars[0].get_ydata()[0]) for bars in axis.containers]
    assert means == [(62.5, 1), (61.5, 2)]  # one run has no mean
    left, right = axis.containers[0][2][0].get_segments()[0][:, 0]
    assert right - left == pytest.approx(2 * 0.5)  # two seeds, 62 and 63


def test_students_are_named_once(write, show):
    names = [f"deit_{size}_patch16_224" for size in ("tiny", "small")]
    for name in names:
        folder = write(name, [1, 2, 3], "--model", name).parent
    rows = cells(show(folder, "--vary", "model").out)
    assert [row["student"] for row in rows.values()] == names[::-1]
    assert "model" not in rows[names[1]]
    axis = plots.draw_rows(tables.tabulate(runs.read_runs([str(folder)]), ["model"])).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == [f"{name}: no teacher" for name in names[::-1]]


# Output


def test_logs_of_the_original_need_no_arguments(tmp_path, write, show):
    (tmp_path / "soft.txt").write_text("".join(log_line(i, 60 + i / 1000) for i in range(20)))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").write_text(log_line(0, 50.0, train_loss_fft=0.25))
    rows = cells(show(tmp_path / "soft.txt", tmp_path / "run", write("ours", [1, 2, 3])).out)
    expected = {
        "best": "60.019",
        "mean of last 10": "60.014",  # of 60.010 ... 60.019, 60.0145 to even
        "epochs": "20 seen",
        "student": "unknown",
        "method": "unknown",
    }
    assert {name: rows["soft"][name] for name in expected} == expected
    assert "published" not in rows["run"]
    assert (rows["ours"]["data set"], rows["soft"]["data set"]) == ("GRATINGS", "unknown")


def test_markdown_is_aligned_and_shows_spread_and_gain(write, show):
    folders = [write(f"a|b_{seed}", [1, 2, 60 + seed], *SOFT, "--seed", seed, test_ema_acc1=7.5) for seed in (0, 1)]
    lines = show(*folders, write("none", [1, 2, 50])).out.splitlines()
    lines = [line for line in lines if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    assert "source" not in lines[0]  # empty columns are left out
    for cell in (r" a\|b_* ", " 60.500 ± 0.707 ", " +10.500 ", " 0, 1 (n = 2) "):
        assert f"|{cell}" in lines[3]
    assert "| best of EMA " in lines[0]


def test_nothing_to_show_is_an_error(show):
    assert show(code=2).err.startswith("error: there is no run in these paths")


def test_json_and_csv_hold_the_numbers_and_the_logs(write, show):
    folders = [write(f"run_{seed}", [1, 2, 60 + seed], *SOFT, "--seed", seed, test_ema_acc1=7.5) for seed in (0, 1)]
    (row,) = json.loads(show("--json", *folders).out)
    assert [row[name] for name in ("best", "ema_best", "seeds")] == [60.5, 7.5, [0, 1]]
    assert row["runs"] == [str(folder / "log.txt") for folder in folders]
    (line,) = csv.DictReader(io.StringIO(show("--csv", "--vary", "w-fft", *folders).out))
    assert [line[name] for name in ("best", "seeds", "w-fft")] == ["60.5", "0 1", "0"]


def test_the_plot_has_one_color_per_row(tmp_path, write, show):
    file = tmp_path / "curves.png"
    show(write("none", [10, 30, 40]), write("soft", [20, 40, 50], *SOFT), "--plot", file)
    pixels = {color for _, color in Image.open(file).convert("RGB").getcolors(maxcolors=2**24)}
    colors = [tuple(bytes.fromhex(color[1:])) for color in plots.COLORS]
    assert pixels & set(colors) == {*colors[:2], (0, 0, 0)}


@pytest.mark.parametrize("file", ["missing/curves.png", "curves.txt"])
def test_a_plot_that_cannot_be_written_is_one_line(file, tmp_path, write, show):
    assert len(show(write("run", [1, 2, 3]), "--plot", tmp_path / file, code=2).err.splitlines()) == 1


def test_published_rows_stand_beside_the_runs(tmp_path, write, show):
    (tmp_path / "SoftKD.txt").write_text(log_line(99, 50.0))
    output = show(tmp_path / "SoftKD.txt", write("mine", [1, 2, 3]), "--published")
    assert output.err == "mine: not shown, because it does not repeat a published result\n"
    row = cells(output.out)["SoftKD"]
    shown = [row[name] for name in ("best", "measured best", "epochs", "epochs seen", "recipe", "source")]
    assert shown == ["76.988", "50.000", "300", "100", "later_soft_kd", "arXiv 2511.06848"]


def test_all_published_rows_are_shown_without_runs(show):
    output = show("--published").out
    assert "measured" not in output
    header, _, *rows = [line.split("|")[1:-1] for line in output.splitlines() if line.startswith("|")]
    names = [name.strip().replace(" ", "_") for name in header]
    wanted = [[tables.as_text(entry[name]) for name in names] for entry in runs.PUBLISHED["results"]]
    assert [[cell.strip() for cell in row] for row in rows] == wanted


# The measured table

STUDENTS = {"DeiT": "deit_tiny_patch16_224", "Lift": "deit_tiny_lift_patch16_224"}
STUDENTS |= {"WideLast": "deit_tiny_widelast_patch16_224", "CaiT, the teacher (one seed)": "cait_s24_224"}
MEASURED = {"+ plain MSE": "soft KD + mse_plain (1 pair)", "+ spectral": "SpectralKD (1 pair)"}
MEASURED |= {"+ Manifold": "soft KD + manifold (1 pair)", "+ trained projector": "soft KD + projector_trained (1 pair)"}


def test_the_table_of_gratings_is_that_of_its_logs():
    section = (ROOT / "docs" / "reproducing.md").read_text().partition("## A measured table on GRATINGS")[2]
    shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| ")]
    rows = tables.tabulate(runs.read_runs([str(ROOT / "results" / "gratings")]), [])
    found = {(row["student"].split()[0], row["method"]): row for row in rows}
    assert len(shown) - 1 == len(found) == 11

    def text(row, name):
        error = row[f"{name}_std"]
        return f"{row[name]:.2f}" + ("" if error is None else f" ± {error / len(row['seeds']) ** 0.5:.2f}")

    for student, parameters, method, best, last10, gain in shown[1:]:
        row = found[STUDENTS[student], MEASURED.get(method, method)]
        assert len(row["seeds"]) == (1 if "teacher" in student else 5)
        assert [f"{row['parameters']:,}", text(row, "best"), text(row, "last10")] == [parameters, best, last10]
        assert gain == (f"{row['gain_soft_kd']:+.2f} ± {row['gain_soft_kd_se']:.2f}" if gain else "")


@pytest.mark.parametrize("name", ["teacher", "none", "deit", "lift", "widelast"])
def test_the_settings_of_gratings_are_those_of_its_runs(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    given = vars(flags.get_args_parser().parse_args([f"@results/gratings/{name}.args"]))
    varied = {"output_dir", "resume", "seed", "feature_loss", "w_fft", "world_size"}
    logs = [*(ROOT / "results" / "gratings" / name).rglob("args.json")]
    assert len(logs) in (1, 5, 10, 25)
    for log in logs:
        ran = json.loads(log.read_text())
        assert {key: ran[key] for key in given.keys() - varied} == {key: given[key] for key in given.keys() - varied}
