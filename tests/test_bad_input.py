"""Every mistake on the command line ends in one line that says how to fix it, and exit code 2."""

import re
from pathlib import Path

import pytest
import timm
import torch
from conftest import ROOT, STUDENT, TEACHER, distil, jpeg_folder, run, tiny_run

import builders
import utils
from flags import key_values, parse_args
from utils import UserError

DEIT = "deit_tiny_patch16_224"
KWARGS = f"--model-kwargs {' '.join(STUDENT)}"
DISTIL = " ".join(distil("{teacher}"))
FINE = f"{KWARGS} patch_size=4"
IMNET = "--data-set IMNET --batch-size 2 --data-path"
CAIT = f"--model cait_s24_224 --model-kwargs {' '.join(TEACHER)}"
HIERA = "--input-size 64 --model hiera_tiny_224 --model-kwargs img_size=(64,64) embed_dim=12 num_heads=1"

# Each row: flags to add to tiny_run, and a pattern of the error. Names in braces are paths of `places`.
# These are found by the flags alone, before torch is imported.
FLAGS = [
    # paths
    ("--data-set IMNET", "--data-path is missing: --data-set IMNET needs the folder"),
    (f"{IMNET} {{empty}}/x", "--data-path .*empty/x is not a folder: --data-set IMNET needs"),
    ("--resume {empty}/x.pth", "--resume .*x.pth is not a file: give a file"),
    ("--finetune {empty}", "--finetune .*empty is not a file"),
    (f"{DISTIL} --teacher-path x.pth", "--teacher-path x.pth is not a file"),
    ("@no_such.args", "no_such.args"),
    # numbers
    ("--batch-size 0", r"--batch-size: expected a whole number in \[1, inf\), got 0"),
    ("--smoothing 1.5", r"--smoothing: expected a number in \[0, 1\], got 1.5"),
    ("--model-ema-decay 1", r"--model-ema-decay: expected a number in \(0, 1\), got 1"),
    ("--batch-size 15 --mixup 0.8", "give an even --batch-size, not 15"),
    ("--warmup-epochs 6 --epochs 4", "--warmup-epochs 6 is more than --epochs 4: lower it"),
    ("--model-kwargs depth", "--model-kwargs: expected KEY=VALUE, got depth"),
    # names
    ("--data-set IMAGENET", "--data-set: invalid choice: 'IMAGENET'.*IMNET"),
    ("--local-rank=0", "comes from torch.distributed.launch: .* torch.distributed.run"),
    # distillation
    (f"{DISTIL} --t-id 0 1", "--s-id has 3 ids but --t-id has 2: give one teacher"),
    (f"{DISTIL} --s-id 0 1 -1", "--s-id: expected"),
    (f"{DISTIL} --distillation-type fft --distillation-tau 2", "--distillation-tau has no effect without"),
    (f"{DISTIL} --distillation-type fft --w-fft 0", "give --w-fft or --distillation-alpha above 0"),
    (f"{DISTIL} --w-fft 0 --distillation-alpha 0", "the teacher would have no effect"),
    # flags that contradict each other
    ("--eval", "--eval without weights would score a random model"),
    ("--export x", "--export needs a checkpoint"),
    ("--eval --resume {teacher} --export x", "--export: not allowed with argument --eval"),
    ("--pretrained --finetune {teacher}", "--pretrained and --finetune both"),
    ("--resume {teacher} --finetune {teacher}", "leave out --finetune and --pretrained"),
    ("--resume auto", "--resume auto needs --output_dir"),
    ("--output_dir x --resume auto --overwrite", "--overwrite: not allowed with argument --resume"),
    ("--no-model-ema --eval-ema", "--eval-ema .* --no-model-ema"),
    ("--bce-loss", "add --smoothing 0"),
    # argument files
    ("@{quotes}", "cannot read the line .*No closing quotation"),
    ("@{latin1}", "not UTF-8"),
    ("@{itself}", "includes itself|[Tt]oo many open files"),
]
# Rows whose error names the first flag in one way.
ALIKE = {
    "{}: expected a number": """--lr inf, --lr nan, --lr -0.001, --drop 2, --drop-path -0.1, --mixup 1.2, --cutmix -1,
        --distillation-alpha 1.1, --w-fft -0.2, --w-fft nan, --distillation-beta -1, --distillation-beta nan,
        --distillation-tau 0, --model-ema-decay 0, --lr-noise-pct 0""",
    "{}.*: expected a whole number": """--epochs 0, --epochs 1.5, --num_workers -1, --gratings-sizes 10000000000000 1,
        --seed 100000000000000000000000""",
    "{}: invalid choice": "--train-interpolation cubic, --inat-category species",
    "unrecognized arguments: {}": "--mixupp 0, --distillation-t soft, --cosub, --resplit",
    "{} .* is not supported": "--sched plateau",
    "{} has no effect without": "--distillation-alpha 0.9, --s-id 0 --t-id 0, --w-fft 0.3",
}
FLAGS += [(row, text.format(row.split()[0])) for text, rows in ALIKE.items() for row in re.split(r",\s+", rows)]

# These are found in files and folders, or by torch and timm, before a model is built.
BEFORE_A_MODEL = [
    (f"{IMNET} {{no_train}}", "train does not exist: --data-path needs train/ and val/"),
    (f"{IMNET} {{no_val}}", "val does not exist: --data-path needs train/ and val/"),
    (f"{IMNET} {{flat_val}}", r"val has no class folders: .* one folder per class.*datasets\.ImageNet"),
    (f"{IMNET} {{empty_class}}", "val has classes without images: cow$"),
    (f"{IMNET} {{other_classes}}", "only one of them has bee"),
    ("--data-set CIFAR --data-path {empty}", r"CIFAR-100 not found .*cifar-100-python\.tar\.gz"),
    ("--data-set INAT --data-path {empty}", "No such file .*categories.json"),
    ("--resume {truncated}", "truncated.pth is not a valid checkpoint"),
    ("--eval --resume {file}", "file is not a valid checkpoint"),
    ("--eval --resume auto --output_dir {empty}", "there is no checkpoint in .*empty: give a file"),
    ("--output_dir {file}", "--output_dir .*file cannot be written"),
    ("--output_dir /proc/x", "--output_dir /proc/x cannot be written"),
    ("--num-classes 5", "--num-classes 5 is too low: the data set has 24"),
    ("--model deit_tinny_patch16_224", f"no model deit_tinny.* try {DEIT}"),
    (f"--model {DEIT}.no_such", "no_such"),
    (f"{DISTIL} --teacher-model cait_s25_224", "no model cait_s25_224: try .*cait_s24_224"),
    ("--device gpu", "--device gpu: expected cuda, cuda:N or cpu"),
    ("--device cuda:99", r"--device cuda:99: this machine has \d+ GPUs, .* try --device cpu"),
    ("--aa foo", "--aa foo.*: Unknown AA policy foo"),
    ("--import no_such_module", "^--import no_such_module: No module named 'no_such_module'$"),
]

# These need a model: its blocks, its head, the sizes and arguments it takes, the weights that fit.
WITH_A_MODEL = [
    ("--batch-size 65", "an epoch has 64 images per process, but --batch-size is 65: lower it"),
    (
        DISTIL.replace("--s-id 0 1 3 --t-id 0 1 5 ", ""),
        "needs --s-id and --t-id: .* has blocks 0 to 3, cait_s24_224 0 to 5; `python analyze.py .* --suggest 8",
    ),
    ("--resume {only_weights}", "has no 'optimizer'.*: use --finetune"),
    ("--resume {of_two_processes}", "the global batch was 32 images and is 16: give --accum-steps 2"),
    ("--resume {of_sgd}", "--opt was sgd and is adamw: use --finetune"),
    ("--resume {of_no_moments}", "--resume: .* parameter 0 is missing"),
    ("--resume {of_another_model}", "--resume: the file is for another model"),
    ("--eval --resume {teacher}", f"weights do not fit {DEIT}"),
    (f"--eval --finetune {{teacher}} {CAIT} --num-classes 30", "its head has 24 classes"),
    ("--input-size 30", f"{DEIT} with images of 30 pixels|30 pixels"),
    (f"{KWARGS} global_pool=", f"timm cannot build {DEIT}: .*global_pool"),
    ("--model resnet18 --model-kwargs channels=(8,8,8,16) --batch-size 1", "--batch-size 1: resnet18 has BatchNorm"),
    ("--model resnet18 --model-kwargs channels=(8,8,8,16) --attn-only", "resnet18 has no attention blocks"),
    ("--opt adamwww", "--opt adamwww with these --opt-\\* flags: "),
    ("--opt-betas 0.9", "--opt adamw with these --opt-\\* flags: "),
    ("--sched cosinus", "--sched cosinus: "),
    # distillation
    (f"{DISTIL} --teacher-model {DEIT}", f"--teacher-path .*weights do not fit {DEIT}"),
    (f"{DISTIL} --s-id all --t-id all", "needs models with equally many blocks, not 4 and 6"),
    (f"{DISTIL} --feature-loss projector --s-id 3 --t-id 2 {FINE}", "--feature-loss projector: .*the same tokens"),
    (f"{DISTIL} --s-id 0 1 4", r"--s-id: block id 4 is out of range: .* ids 0..3"),
    (f"{DISTIL} --t-id 0 1 6", r"--t-id: block id 6 is out of range: .* ids 0..5"),
    (f"{DISTIL} {KWARGS} patch_drop_rate=0.5", "--s-id: .* drops tokens in training.* set patch_drop_rate to 0"),
    (f"{DISTIL} {HIERA}", "--s-id: block 0 of Hiera has no map: .*not in raster order"),
    (f"{DISTIL} --model deit_tiny_distilled_patch16_224 --no-train-mode", "--no-train-mode cannot train the two heads"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory, teacher_file):
    """Paths that the rows name in braces."""
    root = tmp_path_factory.mktemp("places")
    jpeg_folder(root / "no_train", splits=("val",))
    for name in ("no_val", "flat_val", "empty_class", "other_classes"):
        jpeg_folder(root / name, splits=("train",))
    jpeg_folder(root / "other_classes", ["ant", "wasp"], splits=("val",))
    for folder in ("flat_val/val", "empty_class/val/cow"):
        (root / folder).mkdir(parents=True)
    write_checkpoints(root, torch.load(teacher_file, weights_only=True))
    (root / "truncated.pth").write_bytes(teacher_file.read_bytes()[:5000])
    (root / "file").write_text("no checkpoint")
    (root / "quotes.args").write_text("--output_dir 'a folder")
    (root / "latin1.args").write_bytes(b"--output_dir caf\xe9")
    (root / "itself.args").write_bytes(b"@" + bytes(root / "itself.args"))
    (root / "empty").mkdir()
    return {"teacher": teacher_file, **{path.stem: path for path in root.iterdir()}}


def write_checkpoints(root, teacher):
    """Write weights and training states, each with one thing wrong."""
    student = timm.create_model(DEIT, num_classes=24, **key_values(STUDENT))
    torch.save({"model": student.state_dict()}, root / "only_weights.pth")
    optimizer, _, _ = builders.build_optimizer(parse_args(tiny_run()), student, torch.nn.Identity())
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    run = {"model": student.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 0, "args": {"batch_size": 16}}
    torch.save(run | {"world_size": 2}, root / "of_two_processes.pth")
    torch.save(run | {"args": {"opt": "sgd"}}, root / "of_sgd.pth")
    torch.save(run | {"model": teacher}, root / "of_another_model.pth")
    torch.save(run | {"optimizer": run["optimizer"] | {"state": {}}}, root / "of_no_moments.pth")


def flags_of(row, places):
    return [word.format(**places) for word in row.split()]


def assert_refused(message, function, *flags):
    """The function raises a UserError of one line that matches."""
    with pytest.raises(UserError) as caught:
        function(*flags)
    assert re.search(message, str(caught.value))
    assert "\n" not in utils.error_line(caught.value)


@pytest.mark.parametrize(("row", "message"), FLAGS)
def test_flags_alone_show_the_mistake(row, message, places):
    assert_refused(message, parse_args, tiny_run(*flags_of(row, places)))


@pytest.mark.parametrize(("row", "message"), WITH_A_MODEL)
def test_a_mistake_that_needs_a_model_is_refused(row, message, places):
    assert_refused(message, run, *tiny_run(*flags_of(row, places)))


@pytest.mark.parametrize(("row", "message"), BEFORE_A_MODEL)
def test_a_mistake_is_found_before_a_model_is_built(row, message, places, monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: pytest.fail("a model was built"))
    test_a_mistake_that_needs_a_model_is_refused(row, message, places)


# Content of an argument file, and the value of --output_dir that it gives.
ARGUMENT_FILES = [
    (b"--epochs 3\r\n--output_dir out\r\n", "out"),
    (b"\xef\xbb\xbf--output_dir out", "out"),
    (b"--output_dir 'a folder'  # of mine", "a folder"),
    (b'--output_dir "a folder"', "a folder"),
    (b"--output_dir=a\\ folder", "a folder"),
    (b"# nothing\n\n--output_dir ~/out", str(Path.home() / "out")),
]


@pytest.mark.parametrize(("content", "expected"), ARGUMENT_FILES)
def test_argument_files_are_read_as_a_shell_would(content, expected, tmp_path):
    (tmp_path / "run.args").write_bytes(content)
    assert parse_args(tiny_run(f"@{tmp_path / 'run.args'}")).output_dir == expected


@pytest.mark.slow
def test_a_minimum_above_the_learning_rate_is_a_warning(capsys):
    run(*tiny_run("--lr", "1e-4"))  # of a global batch of 512; here it is 16
    assert "warning: --min-lr 1e-05 is above the learning rate" in capsys.readouterr().out


def test_the_published_commands_are_accepted(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ILSVRC2012").mkdir()
    commands = re.findall(r"nproc_per_node=2 main\.py (--output_dir .*)", (ROOT / "README.md").read_text())
    assert len(commands) == 3
    for command in commands:
        parse_args(command.split())
