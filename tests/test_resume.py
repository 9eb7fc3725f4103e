"""A run that was interrupted ends with the very bits of one that was not."""

import json
import math
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import STUDENT, distil, tiny_run
from processes import codes, fork, strike

import main
import utils

pytestmark = pytest.mark.slow

TIMING = ("seconds", "images_per_second")
EVERYTHING = (  # all that is random, and all that has a state
    *("--epochs", 3, "--batch-size", 8, "--accum-steps", 2, "--unscale-lr", "--lr", "1e-3", "--model-ema-decay", 0.9),
    *("--mixup", 0.8, "--cutmix", 1.0, "--reprob", 0.5, "--drop-path", 0.2, "--drop", 0.1, "--eval-ema"),
)


def run(*flags, ranks=1, **options):
    """Runs main.py to its end and returns the exit codes of the ranks, each once."""
    runs = fork(*flags, ranks=ranks, **options)
    return set(codes(runs if ranks > 1 else [runs]))


def outcome(folder):
    """What a run left, without what must differ: paths, flags of the resume, times."""
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    result = {"log": [{name: value for name, value in line.items() if name not in TIMING} for line in lines]}
    for name in ("checkpoint.pth", "model_best.pth"):
        result[name] = torch.load(folder / name, weights_only=True)
        del result[name]["args"]
    return result


def differences(a, b, name=""):
    """Names of everything that is not equal, bit by bit, in nested dicts and lists."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) and a.dtype == b.dtype else [name]
    if isinstance(a, dict) and a.keys() == b.keys():
        return [found for key in a for found in differences(a[key], b[key], f"{name}/{key}")]
    if isinstance(a, (list, tuple)) and len(a) == len(b):
        return [found for i in range(len(a)) for found in differences(a[i], b[i], f"{name}/{i}")]
    return [] if a == b or (a != a and b != b) else [name]


@pytest.fixture(scope="module")
def flags(teacher_file):
    return tiny_run(*distil(teacher_file, "--w-fft", 0.2), *EVERYTHING)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, flags):
    """ranks -> the outcome of a run without interruption; each is made once."""
    made = {}

    def get(ranks):
        if ranks not in made:
            folder = tmp_path_factory.mktemp(f"straight{ranks}")
            assert run(*flags, "--output_dir", folder, ranks=ranks) == {0}
            made[ranks] = outcome(folder)
        return made[ranks]

    return get


def interrupted(flags, folder, ranks, workers, last=""):
    """Runs with four interruptions; `last` is executed before the last start."""
    steps = 8 // ranks  # an epoch
    resume = (*flags, "--output_dir", folder, "--num_workers", workers, "--resume", "auto")
    stopped = {128 + signal.SIGTERM}
    # In the middle of a group of two batches, so after it: epoch 0, step 2.
    assert run(*resume, ranks=ranks, before=strike(signal.SIGTERM, step=0)) == stopped
    assert torch.load(folder / "checkpoint.pth", weights_only=True)["step"] == 2
    # Killed in epoch 1, so epoch 1 starts anew from its boundary.
    assert 0 not in run(*resume, ranks=ranks, before=strike(signal.SIGKILL, step=steps, rank=0))
    assert torch.load(folder / "checkpoint.pth", weights_only=True)["epoch"] == 0
    # In the evaluation after epoch 1, all of whose steps are done then.
    assert run(*resume, ranks=ranks, before=strike(signal.SIGTERM, step=1, training=False)) == stopped
    assert torch.load(folder / "checkpoint.pth", weights_only=True)["step"] == steps
    # In the last step of epoch 2.
    assert run(*resume, ranks=ranks, before=strike(signal.SIGTERM, step=steps - 1)) == stopped
    assert torch.load(folder / "checkpoint.pth", weights_only=True)["epoch"] == 1
    assert run(*resume, ranks=ranks, before=last) == {0}
    return outcome(folder)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_interrupted_run_equals_a_straight_one_in_every_bit(ranks, workers, flags, straight, tmp_path):
    assert differences(straight(ranks), interrupted(flags, tmp_path, ranks, workers)) == []


# Controls: what the comparison above would say if a resume lost something.
LOSSES = {
    "seeds of the steps": (
        "import utils; utils.seed_everything = lambda seed: None",
        "/checkpoint.pth/model/head.weight",
    ),
    "seeds of the samples": (
        "import samplers, random; samplers.counter_seed = lambda *counters: random.getrandbits(63)",
        "/checkpoint.pth/model/head.weight",
    ),
    "moving average": (
        "import utils; old = utils.extract_weights\n"
        "utils.extract_weights = lambda checkpoint, ema=False: old(checkpoint)",
        "/checkpoint.pth/model_ema/head.weight",
    ),
    "sums of the epoch": ("import utils; utils.Meter.load_state_dict = lambda *_: None", "/log/2/train_loss"),
    "sums of the second rank": (
        "import utils; old = utils.Meter.load_state_dict\n"
        "utils.Meter.load_state_dict = lambda self, states: old(self, states[:1] * 2)",
        "/log/2/train_loss",
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_the_comparison_sees_when_a_resume_loses(loss, flags, straight, tmp_path):
    sabotage, seen_in = LOSSES[loss]
    ranks = 2 if "rank" in loss else 1
    resume = (*flags, "--output_dir", tmp_path, "--resume", "auto")
    strike_late = strike(signal.SIGTERM, step=2 * 8 // ranks + 1)  # in epoch 2, the last
    assert run(*resume, ranks=ranks, before=strike_late) == {128 + signal.SIGTERM}
    assert run(*resume, ranks=ranks, before=sabotage) == {0}
    assert seen_in in differences(straight(ranks), outcome(tmp_path))


def test_the_comparison_sees_one_bit():
    a = {"x": [torch.tensor([1.0]), {"lr": 0.1}]}
    b = {"x": [torch.tensor([1.0]).nextafter(torch.tensor(2.0)), {"lr": math.nextafter(0.1, 1)}]}
    assert differences(a, a) == []
    assert differences(a, b) == ["/x/0", "/x/1/lr"]


def stop_and_go_on(flags, folder, step, before=""):
    """Interrupts a run by SIGTERM in its step-th batch, goes on, and returns the outcome."""
    resume = (*flags, "--output_dir", folder, "--resume", "auto")
    assert run(*resume, before=before + strike(signal.SIGTERM, step=step)) == {128 + signal.SIGTERM}
    assert run(*resume, before=before) == {0}
    return outcome(folder)


# Flags, and statements that come before the run.
STATES = {
    "scaler": (
        ("--amp-dtype", "float16"),
        # Its scale starts low and grows after 3 good steps instead of 2000.
        "import torch; torch.amp.GradScaler.__init__.__defaults__ = ('cuda', 16.0, 2.0, 0.5, 3, True)",
    ),
    "plateau": (  # too slow to learn anything, so that the rate falls every epoch
        (
            *("--sched", "plateau", "--patience-epochs", 0, "--decay-rate", 0.5, "--warmup-epochs", 1),
            *("--unscale-lr", "--lr", "1e-6", "--min-lr", 0),
        ),
        "",
    ),
    "noise": (("--sched", "step", "--decay-epochs", 1, "--lr-noise", 0.2), ""),
    "lion": (("--no-repeated-aug", "--ThreeAugment", "--opt", "lion"), ""),
}


@pytest.mark.parametrize("name", STATES)
def test_what_has_a_state_of_its_own_goes_on(name, tmp_path):
    more, before = STATES[name]
    flags = tiny_run("--epochs", 7, "--mixup", 0.8, *more)
    assert run(*flags, "--output_dir", tmp_path / "straight", before=before) == {0}
    expected = outcome(tmp_path / "straight")
    if name == "plateau":  # the case is empty unless the rate falls before the stop and after it
        assert len({line["train_lr"] for line in expected["log"][4:]}) == 3
    if name == "scaler":  # or unless the scale moves
        assert expected["checkpoint.pth"]["scaler"]["scale"] > 16
    assert differences(expected, stop_and_go_on(flags, tmp_path / "stopped", 4 * 5 + 1, before)) == []


# What a resume changes


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The flags, and the folder, of a run of 2 epochs that was stopped in epoch 1 after step 2 of 4."""
    folder, flags = tmp_path_factory.mktemp("stopped"), tiny_run("--epochs", 2, "--lr", "1e-3")
    stop = strike(signal.SIGTERM, step=4 + 1)
    assert run(*flags, "--output_dir", folder, before=stop) == {128 + signal.SIGTERM}
    return flags, folder


@pytest.fixture
def folder(stopped, tmp_path):
    """A copy of the stopped run's folder."""
    return shutil.copytree(stopped[1], tmp_path / "folder")


@pytest.fixture
def again(stopped, folder):
    """Starts the run again in that folder, with more flags."""
    return lambda *more, **options: fork(*stopped[0], "--output_dir", folder, *more, **options)


def test_another_length_and_learning_rate_take_effect_and_are_said(again, folder, tmp_path):
    resumed = again("--resume", "auto", "--epochs", 4, "--lr", "2e-3")
    assert resumed.code() == 0
    assert "--resume: epochs was 2 and is 4 from now on" in resumed.text
    assert "--resume: lr was 0.001 and is 0.002 from now on" in resumed.text
    fresh = tmp_path / "fresh"
    assert run(*tiny_run("--epochs", 4, "--lr", "2e-3"), "--output_dir", fresh) == {0}
    rates = [[line["train_lr"] for line in outcome(path)["log"]] for path in (folder, fresh)]
    assert rates[0][1:] == rates[1][1:]
    assert rates[0][0] != rates[1][0]


def test_another_number_of_processes_is_refused_by_name(again):
    ranks = again("--resume", "auto", ranks=2)
    assert codes(ranks) == [2, 2]
    said = [line for each in ranks for line in each.text.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert re.search("1 processes wrote .* and 2 are here: start 1, or give --allow-world-size-change", said[0])


def test_another_number_of_processes_may_be_allowed_and_says_what_changes(again, folder):
    ranks = again("--resume", "auto", "--allow-world-size-change", ranks=2)
    assert codes(ranks) == [0, 0]
    assert "from now on a step has 32 images, the learning rate follows" in ranks[0].text
    assert "[2/2]" in ranks[0].text  # 32 of 64 images were done, so one of the new steps
    assert [line["epoch"] for line in outcome(folder)["log"]] == [0, 1]


@pytest.mark.parametrize(
    ("flags", "checkpoint", "step"),
    [
        (("--batch-size", 8), {"step": 5, "world_size": 1, "args": {"batch_size": 8, "accum_steps": 1}}, 5),
        (("--batch-size", 8), {"step": 5, "world_size": 4, "args": {"batch_size": 8, "accum_steps": 1}}, 20),
        (("--batch-size", 16), {"step": 5, "world_size": 1, "args": {"batch_size": 8, "accum_steps": 1}}, 2),
        (("--accum-steps", 2), {"step": 5, "world_size": 1, "args": {"batch_size": 16, "accum_steps": 1}}, 4),
        (("--accum-steps", 2), {"step": 5, "world_size": 1, "args": {"batch_size": 16, "accum_steps": 2}}, 5),
        ((), {"epoch": 3}, 0),  # DeiT's
    ],
)
def test_a_resume_with_other_steps_goes_on_at_the_same_images(flags, checkpoint, step):
    assert main.resumed_step(main.parse_args(tiny_run(*flags)), checkpoint) == step


def test_sums_of_other_processes_are_taken_over():
    meter = utils.Meter(["loss"])
    meter.load_state_dict([{"sums": {"loss": 3.0}, "count": 2}, {"sums": {"loss": 6.0}, "count": 1}])
    assert meter.averages() == {"loss": 3.0}


def test_start_epoch_wins_over_the_checkpoint(again, folder):
    resumed = again("--resume", folder / "checkpoint.pth", "--start_epoch", 0)
    assert resumed.code() == 0
    assert "epochs 0 to 1" in resumed.text
    assert [line["epoch"] for line in outcome(folder)["log"]] == [0, 1]


# Which checkpoint, and whether to go on at all


def test_a_finished_run_says_so(again, folder):
    resumed = again("--resume", "auto")
    assert resumed.code() == 0
    before = outcome(folder)
    repeated = again("--resume", "auto")
    assert repeated.code() == 0
    assert "nothing to do: 2 of 2 epochs are done" in repeated.text
    assert json.loads((folder / "status.json").read_text())["status"] == "done"
    assert differences(before, outcome(folder)) == []


def test_a_folder_that_holds_a_run_is_not_started_anew_by_accident(again, folder):
    before = (folder / "checkpoint.pth").read_bytes()
    refused = again()
    assert refused.code() == 2
    assert "holds a run: --resume auto goes on with it, --overwrite starts anew" in refused.text
    elsewhere = again("--resume", folder.parent / "other.pth")
    assert elsewhere.code() == 2  # of a file that is not this run's
    assert (folder / "checkpoint.pth").read_bytes() == before
    assert json.loads((folder / "status.json").read_text())["status"] == "preempted"


def test_a_run_is_not_continued_from_a_stranger_by_accident(again, folder):
    stranger = shutil.copy(folder / "checkpoint.pth", folder.parent / "stranger.pth")
    refused = again("--resume", stranger)
    assert refused.code() == 2
    assert "holds a run" in refused.text
    assert again("--resume", folder / "checkpoint_previous.pth").code() == 0


def test_overwrite_forgets_the_old_run_at_once(again, folder):
    assert again("--overwrite", before=strike(signal.SIGKILL, step=0)).code() == -signal.SIGKILL
    assert not list(folder.glob("*.pth"))
    resumed = again("--resume", "auto")
    assert resumed.code() == 0
    assert "no checkpoint yet, a fresh run" in resumed.text
    assert [line["epoch"] for line in outcome(folder)["log"]] == [0, 1]


def damage(path):
    """Flips a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # other names of the file keep their content
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(again, folder, straight_two):
    damage(folder / "checkpoint.pth")
    resumed = again("--resume", "auto")
    assert resumed.code() == 0
    assert re.search(r"warning: .*/checkpoint.pth is damaged: bad checksum .*; trying the one before", resumed.text)
    assert f"--resume auto: {folder}/checkpoint_previous.pth" in resumed.text
    assert differences(straight_two, outcome(folder)) == []


def test_a_damaged_checkpoint_never_replaces_the_whole_one_before_it(again, folder):
    damage(folder / "checkpoint.pth")
    whole = (folder / "checkpoint_previous.pth").read_bytes()
    assert again("--resume", "auto", before=strike(signal.SIGTERM, step=0)).code() == 128 + signal.SIGTERM
    assert (folder / "checkpoint_previous.pth").read_bytes() == whole
    utils.load_checkpoint(folder / "checkpoint.pth")


def test_without_a_whole_checkpoint_nothing_starts(again, folder):
    for path in folder.glob("*.pth"):
        damage(path)
    before = {path: path.read_bytes() for path in folder.glob("*.pth")}
    refused = again("--resume", "auto", ranks=2)
    assert codes(refused) == [2, 2]
    said = "".join(run.text for run in refused)
    assert said.count("error:") == 1
    assert f"error: every checkpoint in {folder} is damaged" in said
    assert before == {path: path.read_bytes() for path in folder.glob("*.pth")}


def test_a_named_checkpoint_is_never_replaced_by_another(again, folder):
    damage(folder / "checkpoint.pth")
    refused = again("--resume", folder / "checkpoint.pth")
    assert refused.code() == 2
    assert re.search("error: .*/checkpoint.pth is damaged", refused.text)


def test_a_stop_between_log_line_and_checkpoint_leaves_each_epoch_once(again, folder, straight_two):
    """The line is written first, so that a stop there is a line too many, which the resume drops."""
    with open(folder / "log.txt", "a") as log:
        log.write(json.dumps({"epoch": 1, "train_loss": 0.0}) + "\n" + '{"epoch": 1, "tr')  # and one torn by a kill
    assert again("--resume", "auto").code() == 0
    assert differences(straight_two, outcome(folder)) == []


@pytest.fixture(scope="module")
def straight_two(stopped, tmp_path_factory):
    """The outcome of the stopped run's flags without the stop."""
    folder = tmp_path_factory.mktemp("straight_two")
    assert run(*stopped[0], "--output_dir", folder) == {0}
    return outcome(folder)


def test_milestones_are_kept(again, folder):
    assert again("--resume", "auto", "--epochs", 4, "--save-every", 2).code() == 0
    assert sorted(path.name for path in folder.glob("checkpoint_0*")) == ["checkpoint_0001.pth", "checkpoint_0003.pth"]
    assert torch.load(folder / "checkpoint_0001.pth", weights_only=True)["epoch"] == 1
    assert torch.load(folder / "checkpoint_previous.pth", weights_only=True)["epoch"] == 2


def test_another_optimizer_or_image_size_is_refused_on_resume(tmp_path):
    flags = tiny_run("--output_dir", tmp_path)
    main.main(main.parse_args(flags))
    flags += ["--epochs", "2", "--resume", "auto"]
    with pytest.raises(utils.UserError, match="--opt was adamw and is sgd"):
        main.main(main.parse_args([*flags, "--opt", "sgd"]))
    larger = ["--input-size", "64", "--model-kwargs", "img_size=64", *STUDENT[1:]]
    with pytest.raises(utils.UserError, match=r"another model or image size \(pos_embed\): use --finetune"):
        main.main(main.parse_args([*flags, *larger]))


def test_a_restart_is_told_from_a_start_in_the_folder_of_another_run(folder, again, monkeypatch):
    """torchrun restarts a start that was refused, too; that must not go on with the stranger's run."""
    status = json.loads((folder / "status.json").read_text())
    launched = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "1"}
    refused = again(env=launched)
    assert refused.code() == 2
    assert "holds a run" in refused.text
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    checkpoints, ours = utils.CheckpointFolder(folder), status | {"launcher": utils._launcher()}
    (folder / "status.json").write_text(json.dumps(ours))
    assert checkpoints.begun_by_launcher()
    saved_before = (folder / "checkpoint.pth").stat().st_mtime_ns
    (folder / "status.json").write_text(json.dumps(ours | {"found": saved_before}))
    assert not checkpoints.begun_by_launcher()
    (folder / "status.json").write_text(json.dumps(ours))
    (folder / "status.json").write_text(json.dumps(status | {"launcher": "another 1"}))
    assert not checkpoints.begun_by_launcher()
    (folder / "status.json").unlink()
    assert not checkpoints.begun_by_launcher()


def test_a_kill_while_the_old_run_is_cleared_is_not_taken_for_a_run_that_has_saved(folder, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    checkpoints, latest = utils.CheckpointFolder(folder), folder / "checkpoint.pth"
    found = {"launcher": utils._launcher(), "found": latest.stat().st_mtime_ns}
    (folder / "status.json").write_text(json.dumps(found))
    left = []
    unlink = Path.unlink

    def watch(path):
        left.append((latest.exists(), checkpoints.begun_by_launcher()))
        unlink(path)

    monkeypatch.setattr(Path, "unlink", watch)
    checkpoints.clear()
    assert len(left) > 1
    assert set(left) == {(True, False)}
    assert not checkpoints.files()


def test_a_log_edited_by_hand_does_not_stop_a_resume(tmp_path):
    (tmp_path / "log.txt").write_bytes(b'{"epoch": 0}\n{"epoch": "1"}\n\xff\n')
    utils.RunLog(tmp_path, {}, start_epoch=1).close()
    assert (tmp_path / "log.txt").read_text() == '{"epoch": 0}\n'


def test_two_processes_score_the_one_network_with_batchnorm_that_they_save(tmp_path):
    flags = ["--data-set", "GRATINGS", "--gratings-sizes", 96, 96, "--input-size", 32, "--num_workers", 0]
    flags += ["--device", "cpu", "--model", "resnet18", "--model-kwargs", "channels=(8,8,8,16)", "--batch-size", 8]
    train = [
        "--epochs",
        1,
        "--warmup-epochs",
        0,
        "--lr",
        0.3,
        "--no-repeated-aug",
        "--model-ema-decay",
        0.5,
        "--eval-ema",
    ]
    assert run(*flags, *train, "--output_dir", tmp_path, ranks=2) == {0}
    line = json.loads((tmp_path / "log.txt").read_text())
    for name, ema in (("test_loss", []), ("test_ema_loss", ["--eval-ema"])):
        scored = [*flags, "--eval", "--resume", tmp_path / "checkpoint.pth", *ema]
        stats = main.main(main.parse_args(list(map(str, scored))))
        assert stats["loss"] == pytest.approx(line[name], rel=1e-6)
