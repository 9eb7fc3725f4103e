"""An interrupted run ends with the same bits as an uninterrupted one."""

import json
import re
import shutil
import signal

import pytest
import torch
from conftest import STUDENT, distil, tiny_run
from processes import codes, epochs, errors, finish, fork, status, strike

import main
import utils
from checkpoint import resumed_step
from flags import FEATURE_LOSSES
from weights import load_checkpoint

pytestmark = pytest.mark.slow

TIMING = ("seconds", "images_per_second")
EVERYTHING = (  # all that is random, and all that has a state
    *("--epochs", 3, "--batch-size", 8, "--accum-steps", 2, "--unscale-lr", "--lr", "1e-3", "--model-ema-decay", 0.9),
    *("--mixup", 0.8, "--cutmix", 1.0, "--reprob", 0.5, "--drop-path", 0.2, "--drop", 0.1, "--eval-ema"),
    *("--gratings-sizes", 96, 48),
)
STOPPED = 128 + signal.SIGTERM


def outcome(folder):
    """Return the results of a run without what must differ: paths, flags of the resume, times."""
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    result = {"log": [{name: value for name, value in line.items() if name not in TIMING} for line in lines]}
    for name in ("checkpoint.pth", "model_best.pth"):
        result[name] = torch.load(folder / name, weights_only=True)
        del result[name]["args"]
    return result


def differences(a, b, name=""):
    """Return the names of all values in nested dicts and lists that are not equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) and a.dtype == b.dtype else [name]
    if isinstance(a, dict) and a.keys() == b.keys():
        return [found for key in a for found in differences(a[key], b[key], f"{name}/{key}")]
    if isinstance(a, (list, tuple)) and len(a) == len(b):
        return [found for i in range(len(a)) for found in differences(a[i], b[i], f"{name}/{i}")]
    return [] if a == b or (a != a and b != b) else [name]


def position(folder, name="checkpoint.pth"):
    """Return (last finished epoch, batches done in the next one, whether these were all)."""
    saved = torch.load(folder / name, weights_only=True)
    return saved["epoch"], saved["step"], saved["trained"]


# Equality


@pytest.fixture(scope="module")
def flags(teacher_file):
    return tiny_run(*distil(teacher_file, "--w-fft", 0.2), *EVERYTHING)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, flags):
    """Return a function: ranks -> results of an uninterrupted run, which is made once."""
    made = {}

    def get(ranks):
        if ranks not in made:
            folder = tmp_path_factory.mktemp(f"straight{ranks}")
            finish(0, *flags, "--output_dir", folder, ranks=ranks)
            made[ranks] = outcome(folder)
        return made[ranks]

    return get


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_interrupted_run_equals_straight_run(ranks, workers, flags, straight, tmp_path):
    steps = 12 // ranks  # per epoch
    resume = (*flags, "--output_dir", tmp_path, "--num_workers", workers, "--resume", "auto")
    # In the first of two accumulated batches; two processes stop one optimizer step later.
    finish(STOPPED, *resume, ranks=ranks, before=strike(signal.SIGTERM, step=0))
    assert position(tmp_path) == (-1, 2 * ranks, False)
    # Killed in epoch 1, which is repeated.
    assert 0 not in codes(fork(*resume, ranks=ranks, before=strike(signal.SIGKILL, step=steps, rank=0)))
    assert position(tmp_path) == (0, 0, False)
    # In the validation of epoch 1.
    finish(STOPPED, *resume, ranks=ranks, before=strike(signal.SIGTERM, step=0, training=False))
    assert position(tmp_path) == (0, steps, True)
    # In the last step of epoch 2.
    finish(STOPPED, *resume, ranks=ranks, before=strike(signal.SIGTERM, step=steps - 1))
    assert position(tmp_path) == (1, steps, True)
    finish(0, *resume, ranks=ranks)
    assert differences(straight(ranks), outcome(tmp_path)) == []


# Controls: what the comparison above finds if a resume loses something.
OLD_EMA = (
    "import checkpoint; old = checkpoint.extract_weights; checkpoint.extract_weights = lambda it, ema=False: old(it)"
)
FIRST_SUMS = """
import utils
old = utils.Meter.load_state_dict
utils.Meter.load_state_dict = lambda self, states: old(self, states[:1] * 2)
"""
UNSEEDED = "import samplers, random; samplers.counter_seed = lambda *counters: random.getrandbits(63)"
WEIGHT = "/checkpoint.pth/model/head.weight"
LOSSES = {
    "seeds of the steps": ("import utils; utils.seed_everything = lambda seed: None", WEIGHT),
    "seeds of the samples": (UNSEEDED, WEIGHT),
    "EMA": (OLD_EMA, "/checkpoint.pth/model_ema/head.weight"),
    "sums of the epoch": ("import utils; utils.Meter.load_state_dict = lambda *_: None", "/log/2/train_loss"),
    "sums of the second rank": (FIRST_SUMS, "/log/2/train_loss"),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_comparison_finds_what_a_resume_loses(loss, flags, straight, tmp_path):
    sabotage, found_in = LOSSES[loss]
    ranks = 2 if "rank" in loss else 1
    resume = (*flags, "--output_dir", tmp_path, "--resume", "auto")
    finish(STOPPED, *resume, ranks=ranks, before=strike(signal.SIGTERM, step=2 * 12 // ranks + 1))
    finish(0, *resume, ranks=ranks, before=sabotage)
    assert found_in in differences(straight(ranks), outcome(tmp_path))


# The scale starts low and grows after 3 good steps instead of 2000.
SCALE = "import torch; torch.amp.GradScaler.__init__.__defaults__ = ('cuda', 16.0, 2.0, 0.5, 3, True)\n"
# Flags, and statements that come before the run.
STATES = {
    "scaler": ("--amp-dtype float16", SCALE),
    "noise": ("--sched step --decay-epochs 1 --lr-noise 0.2", ""),
    "lion": ("--no-repeated-aug --ThreeAugment --opt lion", ""),
}


@pytest.mark.parametrize("name", STATES)
def test_every_state_is_resumed(name, tmp_path):
    more, before = STATES[name]
    flags = tiny_run("--epochs", 4, "--mixup", 0.8, *more.split())
    finish(0, *flags, "--output_dir", tmp_path / "straight", before=before)
    expected = outcome(tmp_path / "straight")
    if name == "scaler":  # the case is empty unless the scale moves
        assert expected["checkpoint.pth"]["scaler"]["scale"] > 16
    resume = (*flags, "--output_dir", tmp_path / "stopped", "--resume", "auto")
    finish(STOPPED, *resume, before=before + strike(signal.SIGTERM, step=4 * 2 + 1))
    finish(0, *resume, before=before)
    assert differences(expected, outcome(tmp_path / "stopped")) == []


OBJECTIVES = [("deit_tiny_patch16_224", loss) for loss in FEATURE_LOSSES]
OBJECTIVES += [("deit_tiny_lift_patch16_224", "mse_plain"), ("deit_tiny_widelast_patch16_224", "mse_plain")]


@pytest.mark.parametrize(("student", "loss"), OBJECTIVES)
def test_every_feature_loss_and_student_is_resumed(student, loss, teacher_file, tmp_path):
    """With two processes, stopped in epoch 1 after step 2 of 4."""
    flags = tiny_run(*distil(teacher_file, "--model", student, "--feature-loss", loss), "--epochs", 2)
    flags += ["--batch-size", "8", "--unscale-lr", "--lr", "1e-3"]
    runs = finish(0, *flags, "--output_dir", tmp_path / "straight", ranks=2)
    assert "UserWarning" not in runs[0].text
    resume = (*flags, "--output_dir", tmp_path / "stopped", "--resume", "auto")
    finish(STOPPED, *resume, ranks=2, before=strike(signal.SIGTERM, step=4 + 1))
    finish(0, *resume, ranks=2)
    expected = outcome(tmp_path / "straight")
    assert expected["log"][1]["train_loss_fft"] > 0
    assert differences(expected, outcome(tmp_path / "stopped")) == []


# What a resume changes


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Return (flags, folder) of a run of 2 epochs that was stopped in epoch 1 after step 2 of 4."""
    folder, flags = tmp_path_factory.mktemp("stopped"), tiny_run("--epochs", 2, "--lr", "1e-3")
    finish(STOPPED, *flags, "--output_dir", folder, before=strike(signal.SIGTERM, step=4 + 1))
    return flags, folder


@pytest.fixture(scope="module")
def straight_two(stopped, tmp_path_factory):
    """Return the results of the same flags without the stop."""
    folder = tmp_path_factory.mktemp("straight_two")
    finish(0, *stopped[0], "--output_dir", folder)
    return outcome(folder)


@pytest.fixture
def folder(stopped, tmp_path):
    """Return a copy of the stopped run's folder."""
    return shutil.copytree(stopped[1], tmp_path / "folder")


@pytest.fixture
def again(stopped, folder):
    """Start the run again in that folder, with more flags, which must end with this exit code."""
    return lambda code, *more, **options: finish(code, *stopped[0], "--output_dir", folder, *more, **options)


def test_changed_length_and_rate_take_effect_and_are_logged(again, folder, tmp_path):
    resumed = again(0, "--resume", "auto", "--epochs", 4, "--lr", "2e-3")
    assert "--resume: epochs was 2 and is 4 from now on" in resumed.text
    assert "--resume: lr was 0.001 and is 0.002 from now on" in resumed.text
    finish(0, *tiny_run("--epochs", 4, "--lr", "2e-3"), "--output_dir", tmp_path / "new")
    rates = [[line["train_lr"] for line in outcome(path)["log"]] for path in (folder, tmp_path / "new")]
    assert rates[0][1:] == rates[1][1:]
    assert rates[0][0] != rates[1][0]


def test_other_processes_continue_at_the_same_image(again, folder):
    ranks = again(0, "--resume", "auto", "--batch-size", 8, ranks=2)
    assert "--resume: from 1 to 2 process(es); the global batch stays 16 images" in ranks[0].text
    assert "[3/4]" not in ranks[0].text  # 2 of 4 steps were done
    assert "[4/4]" in ranks[0].text
    assert epochs(folder) == [0, 1]


SPLITS = [  # batch size and accumulation, those of the stopped run, its processes, and the step of the resume
    ((8, 1), (8, 1), 1, 6),
    ((16, 1), (8, 2), 1, 3),
    ((8, 3), (24, 1), 1, 18),
    ((8, 4), (8, 1), 4, 24),
    ((16, 1), (8, None), 2, 6),  # DeiT's
]


@pytest.mark.parametrize(("new", "old", "processes", "step"), SPLITS)
def test_resume_with_another_split_continues_at_the_same_image(new, old, processes, step):
    flags = main.parse_args(tiny_run("--batch-size", new[0], "--accum-steps", new[1]))
    stored = {"world_size": processes, "args": {"batch_size": old[0], "accum_steps": old[1]}}
    if old[1] is None:
        stored = {"args": {"batch_size": old[0], "world_size": processes}}
    assert resumed_step({"step": 6, **stored}, flags) == step


def test_another_global_batch_is_refused():
    checkpoint = {"step": 5, "world_size": 2, "args": {"batch_size": 8, "accum_steps": 1}}
    for batch, accum_steps, fix in ((8, 3, "24: give --accum-steps 2"), (32, 1, "32: give --batch-size 16")):
        with pytest.raises(utils.UserError, match=f"was 16 images and is {fix}"):
            resumed_step(checkpoint, main.parse_args(tiny_run("--batch-size", batch, "--accum-steps", accum_steps)))


def test_sums_of_other_processes_are_taken_over():
    meter = utils.Meter(["loss"])
    meter.load_state_dict([{"sums": {"loss": 3.0}, "count": 2}, {"sums": {"loss": 6.0}, "count": 1}])
    assert meter.averages() == {"loss": 3.0}


def test_start_epoch_overrides_the_checkpoint(again, folder):
    assert "epochs 0 to 1" in again(0, "--resume", folder / "checkpoint.pth", "--start_epoch", 0).text
    assert epochs(folder) == [0, 1]


def test_another_optimizer_or_image_size_is_refused(tmp_path):
    flags = tiny_run("--output_dir", tmp_path)
    main.main(main.parse_args(flags))
    flags += ["--epochs", "2", "--resume", "auto"]
    with pytest.raises(utils.UserError, match="--opt was adamw and is sgd"):
        main.main(main.parse_args([*flags, "--opt", "sgd"]))
    larger = ["--input-size", "64", "--model-kwargs", "img_size=64", *STUDENT[1:]]
    with pytest.raises(utils.UserError, match=r"another model, image size or loss \(pos_embed\): use"):
        main.main(main.parse_args([*flags, *larger]))


# Parts of the stopped run's checkpoint that are made not to fit.
def reverse(moments):
    moments.update(zip(list(moments), list(moments.values())[::-1], strict=True))


UNFIT = {
    "another shape": (lambda file: file["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)), "exp_avg of .* shape"),
    "another order": (lambda file: reverse(file["optimizer"]["state"]), "has shape"),
    "no moments": (lambda file: file["optimizer"]["state"].clear(), "of parameter 0 is missing"),
    "one moment missing": (lambda file: file["optimizer"]["state"][3].pop("exp_avg_sq"), "exp_avg_sq of .* is missing"),
    "one parameter more": (lambda file: file["optimizer"]["param_groups"][0]["params"].append(99), "of parameter"),
    "no groups": (lambda file: file["optimizer"].pop("param_groups"), "param_groups"),
    "no best epoch": (lambda file: file.update(best_epoch="none"), "invalid literal"),
    "no sums": (lambda file: file.pop("meter"), "meter"),
}


@pytest.mark.parametrize("part", UNFIT)
def test_checkpoint_part_that_does_not_fit_is_refused(part, stopped, tmp_path):
    change, reason = UNFIT[part]
    file = torch.load(stopped[1] / "checkpoint.pth", weights_only=True)
    change(file)
    torch.save(file, tmp_path / "unfit.pth")
    with pytest.raises(utils.UserError, match=f"--resume: the file does not fit this run: .*{reason}"):
        main.main(main.parse_args([*stopped[0], "--resume", str(tmp_path / "unfit.pth")]))


@pytest.mark.parametrize("options", [("momentum", "--momentum", 0), ("lookahead_adamw",), ("lamb",)])
def test_optimizer_state_of_every_kind_is_accepted(options, tmp_path):
    """8 steps are needed, because Lookahead creates its second weights after 6."""
    flags = tiny_run("--epochs", 2, "--opt", *options, "--output_dir", tmp_path)
    main.main(main.parse_args(flags))
    main.main(main.parse_args([*flags, "--epochs", "3", "--resume", str(tmp_path / "checkpoint.pth")]))
    assert epochs(tmp_path) == [0, 1, 2]


# Which checkpoint, and whether to continue at all


def test_finished_run_does_nothing(again, folder):
    again(0, "--resume", "auto")
    before, finished = outcome(folder), status(folder)
    assert "nothing to do: 2 of 2 epochs are done" in again(0, "--resume", "auto").text
    facts = ("status", "best_accuracy", "best_epoch")
    assert [status(folder).get(name) for name in facts] == ["done", *(finished[name] for name in facts[1:])]
    assert differences(before, outcome(folder)) == []


@pytest.mark.parametrize("stranger", [False, True])
def test_folder_that_holds_a_run_is_not_used_by_accident(stranger, again, folder):
    before = (folder / "checkpoint.pth").read_bytes()
    other = ("--resume", shutil.copy(folder / "checkpoint.pth", folder.parent / "stranger.pth"))
    refused = again(2, *(other if stranger else ()))
    assert errors(refused) == [f"error: {folder} contains a run: --resume auto continues it, --overwrite starts over"]
    assert (folder / "checkpoint.pth").read_bytes() == before
    assert status(folder)["status"] == "preempted"


def test_a_run_continues_from_an_older_file_of_its_own(again, folder):
    again(0, "--resume", folder / "checkpoint_previous.pth")
    assert epochs(folder) == [0, 1]


def test_overwrite_forgets_the_old_run(again, folder):
    again(-signal.SIGKILL, "--overwrite", before=strike(signal.SIGKILL, step=0))
    assert not list(folder.glob("*.pth"))
    assert "no checkpoint yet, starting a new run" in again(0, "--resume", "auto").text
    assert epochs(folder) == [0, 1]


def damage(path):
    """Flip a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_damaged_checkpoint_is_named_and_an_older_one_used(again, folder, straight_two):
    damage(folder / "checkpoint.pth")
    resumed = again(0, "--resume", "auto")
    warning = r"warning: .*/checkpoint.pth is not a valid checkpoint: bad checksum .*; trying an older one"
    assert re.search(warning, resumed.text)
    assert f"--resume auto: {folder}/checkpoint_previous.pth" in resumed.text
    assert differences(straight_two, outcome(folder)) == []


def test_damaged_checkpoint_never_replaces_a_valid_one(again, folder):
    damage(folder / "checkpoint.pth")
    valid = (folder / "checkpoint_previous.pth").read_bytes()
    again(STOPPED, "--resume", "auto", before=strike(signal.SIGTERM, step=0))
    assert (folder / "checkpoint_previous.pth").read_bytes() == valid
    load_checkpoint(folder / "checkpoint.pth")


def test_without_a_valid_checkpoint_nothing_starts(again, folder):
    for path in folder.glob("*.pth"):
        damage(path)
    before = {path: path.read_bytes() for path in folder.glob("*.pth")}
    message = f"error: no checkpoint in {folder} is valid: restore one, or use --overwrite to start over"
    assert errors(again(2, "--resume", "auto", ranks=2)) == [message, f"[rank 1] {message}"]
    assert before == {path: path.read_bytes() for path in folder.glob("*.pth")}


def test_named_checkpoint_is_never_replaced_by_another(again, folder):
    damage(folder / "checkpoint.pth")
    (error,) = errors(again(2, "--resume", folder / "checkpoint.pth"))
    assert "/checkpoint.pth is not a valid checkpoint" in error


def test_stop_between_log_line_and_checkpoint_leaves_one_line(again, folder, straight_two):
    """The line is written first, so the stop leaves one too many, which the resumed run drops."""
    with open(folder / "log.txt", "a") as log:
        log.write(json.dumps({"epoch": 1, "train_loss": 0.0}) + "\n" + '{"epoch": 1, "tr')  # and one cut short
    again(0, "--resume", "auto")
    assert differences(straight_two, outcome(folder)) == []


def test_milestones_are_kept(again, folder):
    again(0, "--resume", "auto", "--epochs", 4, "--save-every", 2)
    assert sorted(path.name for path in folder.glob("checkpoint_0*")) == ["checkpoint_0001.pth", "checkpoint_0003.pth"]
    assert position(folder, "checkpoint_0001.pth") == (1, 0, False)
    assert position(folder, "checkpoint_previous.pth") == (2, 4, True)


# The best weights


def best(folder):
    """Return (best epoch of log.txt, epoch of model_best.pth)."""
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return max(lines, key=lambda line: line["test_acc1"])["epoch"], position(folder, "model_best.pth")[0]


def kill_at_rename(target, count):
    """Return statements for `before`: SIGKILL before the count-th time that a file gets this name."""
    return f"""
import os, pathlib
replace, seen = os.replace, 0
def strike(source, target):
    global seen
    seen += pathlib.Path(target).name == {target!r}
    if seen == {count}:
        os.kill(os.getpid(), 9)
    replace(source, target)
os.replace = strike
"""


@pytest.mark.parametrize("target", ["model_best.pth", "checkpoint_previous.pth", "checkpoint.pth"])
def test_kill_between_the_files_of_a_save_is_repaired(target, tmp_path):
    """The kill is in the first save after the validation of epoch 0, the best so far."""
    flags = tiny_run("--output_dir", tmp_path, "--resume", "auto")
    count = {"model_best.pth": 1, "checkpoint_previous.pth": 1, "checkpoint.pth": 2}[target]
    finish(-signal.SIGKILL, *flags, before=kill_at_rename(target, count))
    finish(0, *flags)
    assert best(tmp_path) == (0, 0)
    assert epochs(tmp_path) == [0]


@pytest.mark.parametrize("stale", ["missing", "older", "damaged"])
def test_stale_best_file_is_replaced_on_resume(stale, again, folder):
    """After epoch 0, whose checkpoint is checkpoint_previous.pth."""
    file, target = folder / "checkpoint_previous.pth", folder / "model_best.pth"
    target.unlink()
    if stale == "older":
        torch.save(torch.load(file, weights_only=True) | {"epoch": -1}, target)
    elif stale == "damaged":
        target.write_bytes(b"PK")
    (folder / "checkpoint.pth").unlink()
    again(STOPPED, "--resume", "auto", before=strike(signal.SIGTERM, step=0))
    assert position(folder, "model_best.pth") == (0, 0, False)


def test_lost_best_weights_are_reported_with_every_save(again, folder):
    (folder / "model_best.pth").unlink()
    resumed = again(STOPPED, "--resume", "auto", before=strike(signal.SIGTERM, step=0))
    assert resumed.text.count("warning: the weights of the best epoch, 0, are not in model_best.pth") == 2


@pytest.mark.parametrize(("name", "copied"), [("model_best.pth", True), ("checkpoint.pth", False)])
def test_a_run_continued_in_another_folder_has_the_best_weights(name, copied, again, folder, tmp_path):
    """Or reports that they are not there: checkpoint.pth is in the middle of the epoch after the best one."""
    new = tmp_path / "new"
    run = again(STOPPED, "--resume", folder / name, "--output_dir", new, before=strike(signal.SIGTERM, step=0))
    assert (new / "model_best.pth").exists() == copied
    assert ("warning: the weights of the best epoch, 0, are not in model_best.pth" in run.text) != copied
    assert not copied or position(new, "model_best.pth") == (0, 0, False)


def test_rewriting_the_best_file_keeps_the_checkpoint(again, folder):
    """They are two files, not two names of the same file."""
    again(0, "--resume", "auto")
    for path in folder.glob("*.pth"):
        others = {other: other.read_bytes() for other in folder.glob("*.pth") if other != path}
        with open(path, "r+b") as file:
            file.write(b"overwritten in place")
        assert others == {other: other.read_bytes() for other in others}


def test_batchnorm_of_two_processes_is_scored_as_saved(tmp_path):
    flags = ["--data-set", "GRATINGS", "--gratings-sizes", 96, 96, "--input-size", 32, "--num_workers", 0]
    flags += ["--device", "cpu", "--model", "resnet18", "--model-kwargs", "channels=(8,8,8,16)", "--batch-size", 8]
    train = ["--epochs", 1, "--warmup-epochs", 0, "--lr", 0.3, "--no-repeated-aug", "--model-ema-decay", 0.5]
    finish(0, *flags, *train, "--eval-ema", "--output_dir", tmp_path, ranks=2)
    line = json.loads((tmp_path / "log.txt").read_text())
    for name, ema in (("test_loss", []), ("test_ema_loss", ["--eval-ema"])):
        scored = [*flags, "--eval", "--resume", tmp_path / "checkpoint.pth", *ema]
        stats = main.main(main.parse_args(list(map(str, scored))))
        assert stats["loss"] == pytest.approx(line[name], rel=1e-6)
