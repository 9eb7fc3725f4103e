"""Every mistake that a user can make on the command line ends in one line that says how to mend it, and exit code 2."""

import re
import shutil

import pytest
import timm
import torch
from conftest import ROOT, STUDENT, TEACHER, distil, run_main, tiny_run
from PIL import Image

import main
import utils
from flags import key_values, parse_args


def jpeg_folder(root, classes=("ant", "bee"), splits=("train", "val"), images=4):
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(images):
                Image.new("RGB", (40, 30), (60 * i, 90, 120)).save(root / split / name / f"{i}.jpg")
    return root


@pytest.fixture(scope="module")
def places(tmp_path_factory, teacher_file):
    """Paths that the cases below name in braces."""
    root = tmp_path_factory.mktemp("places")
    images = jpeg_folder(root / "images")
    jpeg_folder(root / "no_train", splits=("val",))
    jpeg_folder(root / "no_val", splits=("train",))
    shutil.copytree(images, root / "empty_class")
    (root / "empty_class" / "train" / "cow").mkdir()
    shutil.copytree(images, root / "other_classes")
    shutil.move(root / "other_classes" / "val" / "bee", root / "other_classes" / "val" / "wasp")
    native = {key: value for key, value in key_values(TEACHER).items() if key != "img_size"}
    torch.save(timm.create_model("cait_s24_224", num_classes=24, **native).state_dict(), root / "hub.pth")
    whole = torch.load(teacher_file, weights_only=True)
    torch.save({"model": whole}, root / "only_weights.pth")
    run = {"model": whole, "optimizer": {}, "epoch": 0, "world_size": 2, "args": {"opt": "adamw"}}
    torch.save(run, root / "of_two_processes.pth")
    torch.save(run | {"world_size": 1, "args": {"opt": "sgd"}}, root / "of_sgd.pth")
    (root / "truncated.pth").write_bytes(teacher_file.read_bytes()[:5000])
    (root / "file").write_text("no checkpoint")
    (root / "empty").mkdir()
    names = (
        "images",
        "no_train",
        "no_val",
        "empty_class",
        "other_classes",
        "only_weights.pth",
        "of_two_processes.pth",
        "of_sgd.pth",
        "truncated.pth",
        "hub.pth",
        "file",
        "empty",
    )
    return {"teacher": teacher_file, **{name.partition(".")[0]: root / name for name in names}}


IMNET = "--data-set IMNET --num_workers 0 --input-size 32 --batch-size 2 --device cpu"
TINY = " ".join(tiny_run())
DISTIL = " ".join(distil("{teacher}"))
EVAL = f"{TINY} --eval"
CAIT = f"--model cait_s24_224 --model-kwargs {' '.join(TEACHER)}"
HUB = "pretrained_cfg_overlay={{'file':'{hub}','num_classes':24}}"  # stands for timm's own weights
HUB_TEACHER = f"--teacher-model cait_s24_224 --teacher-kwargs {' '.join(TEACHER)} {HUB}"

# name: (command line, what the one line must say). A model is built for none of these.
BEFORE_A_MODEL = {
    # paths
    "no data path": (IMNET, "needs --data-path"),
    "missing data path": (f"{IMNET} --data-path {{empty}}/x", "--data-path .*x is not a folder"),
    "no train folder": (f"{IMNET} --data-path {{no_train}}", "train does not exist: --data-path needs train/ and val/"),
    "no val folder": (f"{IMNET} --data-path {{no_val}}", "val does not exist: --data-path needs train/ and val/"),
    "empty class folder": (f"{IMNET} --data-path {{empty_class}}", "cow"),
    "train and val classes differ": (f"{IMNET} --data-path {{other_classes}}", "different classes, (bee|wasp)"),
    "no CIFAR there": (f"{IMNET} --data-set CIFAR --data-path {{empty}}", "not found"),
    "no INAT there": (f"{IMNET} --data-set INAT --data-path {{empty}}", "categories.json does not exist"),
    "resume missing": (f"{TINY} --resume {{empty}}/x.pth", "--resume .*x.pth does not exist"),
    "resume a folder": (f"{TINY} --resume {{empty}}", "empty is a folder.*--output_dir .*empty --resume auto"),
    "resume and finetune": (f"{TINY} --resume {{of_sgd}} --finetune {{of_sgd}}", "so --finetune has no effect"),
    "resume and hub": (f"{EVAL} --resume {{of_sgd}} --pretrained", "so --pretrained has no effect"),
    "auto from an epoch": (f"{TINY} --output_dir x --resume auto --start_epoch 3", "begin there anew at each"),
    "resume truncated": (f"{TINY} --resume {{truncated}}", "truncated.pth is damaged"),
    "resume no checkpoint": (f"{EVAL} --resume {{file}}", "file is damaged or no checkpoint"),
    "resume without optimizer": (f"{TINY} --resume {{only_weights}}", "has no 'optimizer'.*: use --finetune"),
    "resume with other processes": (
        f"{TINY} --resume {{of_two_processes}}",
        "2 processes wrote the checkpoint and 1 are here: start 2, or give --allow-world-size-change",
    ),
    "resume with another optimizer": (f"{TINY} --resume {{of_sgd}}", "--opt was sgd and is adamw: use --finetune"),
    "finetune missing": (f"{TINY} --finetune {{empty}}/x.pth", "--finetune .*x.pth does not exist"),
    "teacher missing": (f"{TINY} {DISTIL} --teacher-path x.pth", "--teacher-path x.pth does not exist"),
    "output_dir a file": (f"{TINY} --output_dir {{file}}", "--output_dir .*file cannot be written"),
    "output_dir not writable": (f"{TINY} --output_dir /proc/x", "--output_dir /proc/x cannot be written"),
    "argument file missing": ("@no_such.args", "no_such.args"),
    # numbers
    "batch 0": (f"{TINY} --batch-size 0", r"--batch-size: expected a whole number in \[1, inf\), got 0"),
    "batch over the samples": (f"{TINY} --batch-size 65", "an epoch has 64 images .* --batch-size is 65: lower it"),
    "epochs 0": (f"{TINY} --epochs 0", "--epochs: expected"),
    "epochs not whole": (f"{TINY} --epochs 1.5", "--epochs: expected a whole number .* got 1.5"),
    "warm-up over the run": (f"{TINY} --warmup-epochs 5 --epochs 4", "--warmup-epochs 5 is longer than .* --epochs 4"),
    "lr nan": (f"{TINY} --lr nan", r"--lr: expected a number in \[0, inf\), got nan"),
    "lr infinite": (f"{TINY} --lr inf", "--lr: expected"),
    "lr negative": (f"{TINY} --lr -0.001", "--lr: expected .* got -0.001"),
    "smoothing over 1": (f"{TINY} --smoothing 1.5", r"--smoothing: expected a number in \[0, 1\], got 1.5"),
    "drop over 1": (f"{TINY} --drop 2", "--drop: expected"),
    "drop-path negative": (f"{TINY} --drop-path -0.1", "--drop-path: expected"),
    "mixup over 1": (f"{TINY} --mixup 1.2", "--mixup: expected"),
    "cutmix negative": (f"{TINY} --cutmix -1", "--cutmix: expected"),
    "alpha over 1": (f"{TINY} {DISTIL} --distillation-alpha 1.1", "--distillation-alpha: expected"),
    "tau 0": (f"{TINY} {DISTIL} --distillation-tau 0", r"--distillation-tau: expected a number in \(0, inf\), got 0"),
    "w-fft negative": (f"{TINY} {DISTIL} --w-fft -0.2", "--w-fft: expected"),
    "w-fft nan": (f"{TINY} {DISTIL} --w-fft nan", "--w-fft: expected"),
    "beta negative": (f"{TINY} {DISTIL} --distillation-beta -1", "--distillation-beta: expected"),
    "EMA decay 1": (f"{TINY} --model-ema-decay 1", r"--model-ema-decay: expected a number in \(0, 1\), got 1"),
    "noise without limit": (f"{TINY} --lr-noise 0.1 --lr-noise-pct 0", "--lr-noise-pct: expected"),
    "noise beyond the rate": (f"{TINY} --lr-noise 0.1 --lr-noise-pct 5", "--lr-noise-pct: expected"),
    "noise backwards": (f"{TINY} --lr-noise 0.9 0.1", "--lr-noise ends before it begins"),
    "cut backwards": (f"{TINY} --cutmix-minmax 0.8 0.2", "--cutmix-minmax takes the lower limit"),
    "one beta": (f"{TINY} --opt-betas 0.9", "--opt-betas: --opt adamw has 2, not 1"),
    "betas of SGD": (f"{TINY} --opt sgd --opt-betas 0.9 0.9", "--opt-betas: --opt sgd has 0, not 2"),
    "three betas": (f"{TINY} --opt-betas 0.9 0.9 0.9", "--opt-betas: --opt adamw has 2, not 3"),
    "workers negative": (f"{TINY} --num_workers -1", "--num_workers.*: expected"),
    "too few classes": (f"{TINY} --num-classes 5", "--num-classes 5 is less than the 24"),
    "no key and value": (f"{TINY} --model-kwargs depth", "--model-kwargs: expected KEY=VALUE, got depth"),
    "dropout twice": (f"{TINY} --model-kwargs drop_path_rate=0.1", "would win over --drop-path: give --drop-path"),
    # names
    "unknown model": (f"{TINY} --model deit_tinny_patch16_224", "no model deit_tinny.* try deit_tiny_patch16_224"),
    "unknown weights": (f"{TINY} --model deit_tiny_patch16_224.no_such", "no_such"),
    "unknown teacher": (f"{TINY} {DISTIL} --teacher-model cait_s25_224", "no model cait_s25_224: try .*cait_s24_224"),
    "unknown data set": (f"{TINY} --data-set IMAGENET", "--data-set: invalid choice: 'IMAGENET'.*IMNET"),
    "unknown interpolation": (f"{TINY} --train-interpolation cubic", "--train-interpolation: invalid choice"),
    "unknown category": (f"{TINY} --inat-category species", "--inat-category: invalid choice"),
    "unknown device": (f"{TINY} --device gpu", "--device gpu: expected cuda, cuda:N or cpu"),
    "no such GPU": (f"{TINY} --device cuda:99", "--device cuda:99: this machine has [0-9]+ GPUs; try --device cpu"),
    "unknown flag": (f"{TINY} --mixupp 0", "unrecognized arguments: --mixupp"),
    "shortened flag": (f"{TINY} --distillation-t soft", "unrecognized arguments: --distillation-t"),
    "unknown optimizer": (f"{TINY} --opt adamwww", "--opt adamwww: "),
    "unknown scheduler": (f"{TINY} --sched cosinus", "--sched cosinus: "),
    # distillation
    "ids of different length": (f"{TINY} {DISTIL} --t-id 0 1", "--s-id has 3 ids but --t-id has 2: give one teacher"),
    "only student ids": (f"{TINY} --distillation-type fft --s-id 0", "--s-id has 1 ids but --t-id has 0"),
    "no ids": (f"{TINY} --distillation-type soft", "needs --s-id and --t-id: give both, or --w-fft 0"),
    "negative id": (f"{TINY} {DISTIL} --s-id 0 1 -1", "--s-id: expected"),
    "alpha without teacher": (f"{TINY} --distillation-alpha 0.9", "--distillation-alpha has no effect without"),
    "ids without teacher": (f"{TINY} --s-id 0 --t-id 0", "--s-id has no effect without"),
    "w-fft without teacher": (f"{TINY} --w-fft 0.2", "--w-fft has no effect without"),
    "tau in fft": (f"{TINY} {DISTIL} --distillation-type fft --distillation-tau 2", "--distillation-tau has no effect"),
    "fft without weight": (f"{TINY} {DISTIL} --distillation-type fft --w-fft 0", "give --w-fft above 0"),
    "no part for the teacher": (f"{TINY} {DISTIL} --w-fft 0 --distillation-alpha 0", "the teacher has no part"),
    "cool-down of plateau": (f"{TINY} --sched plateau --cooldown-epochs 2", "has no cool-down"),
    "two cuts": (f"{TINY} --cutmix 1 --cutmix-minmax 0.2 0.8", "in place of --cutmix: give one"),
    "simple crop of small images": (f"{TINY} --src", "--src has no effect without larger images or --ThreeAugment"),
    "sizes of another set": (f"{IMNET} --data-path {{images}} --gratings-sizes 9 9", "--gratings-sizes has no effect"),
    # modes
    "eval without weights": (EVAL, "--eval without weights would score a random model"),
    "eval and export": (f"{EVAL} --resume {{teacher}} --export x", "--eval and --export exclude each other"),
    "two starts": (f"{TINY} --pretrained --finetune {{teacher}}", "--pretrained and --finetune both"),
    "auto without folder": (f"{TINY} --resume auto", "--resume auto looks into --output_dir"),
    "resume and overwrite": (f"{TINY} --output_dir x --resume auto --overwrite", "--resume .* --overwrite"),
    "EMA scored, not kept": (f"{TINY} --no-model-ema --eval-ema", "--eval-ema has no effect without --model-ema"),
    "binary loss of smooth labels": (f"{TINY} --bce-loss", "give --smoothing 0"),
    "average on the host": (
        f"{TINY} --device cuda --eval-ema --model-ema-force-cpu",
        "--eval-ema scores on --device|this machine has 0 GPUs",
    ),
    "plateau from the middle": (f"{TINY} --sched plateau --start_epoch 3", "--start_epoch: --sched plateau goes by"),
    "no cool-down": (f"{TINY} --sched step --cooldown-epochs 2", "has no cool-down"),
    "three parts of noise": (f"{TINY} --lr-noise 0.1 0.5 0.9", "where the noise begins and ends, not 3 numbers"),
    "unknown augmentation": (f"{TINY} --aa foo", "--aa foo: Unknown AA policy foo"),
    "huge seed": (f"{TINY} --seed 100000000000000000000000", "--seed: expected a whole number"),
    "second-order optimizer": (f"{TINY} --opt adahessian", "--opt adahessian needs second derivatives"),
    "nothing to score": (
        f"{EVAL} --resume auto --output_dir {{empty}}",
        "there is no checkpoint in .*empty: name a file",
    ),
    "average of the hub": (f"{EVAL} --pretrained --eval-ema", "--pretrained weights have no moving average"),
    "odd batch mixed": (f"{TINY} --batch-size 15 --mixup 0.8", "give an even --batch-size, not 15"),
    "random interpolation": (f"{TINY} --train-interpolation random", "give bicubic or bilinear"),
    "cosub": (f"{TINY} --cosub", "--cosub has no place here"),
    "resplit": (f"{TINY} --resplit", "--resplit has no place here"),
    "export without weights": (f"{TINY} --export x", "--export needs the checkpoint"),
}

# Only a model can tell these: its blocks, its head, the sizes and arguments that it takes, the weights that fit.
WITH_A_MODEL = {
    "resume of another model": (f"{EVAL} --resume {{teacher}}", "weights do not fit deit_tiny_patch16_224"),
    "teacher of another model": (
        f"{TINY} {DISTIL} --teacher-model deit_tiny_patch16_224",
        "weights do not fit deit_tiny_patch16_224",
    ),
    "teacher of another class count": (
        f"{IMNET} --data-path {{images}} --model-kwargs {' '.join(STUDENT)} {DISTIL}",
        "its head has 24 classes, 2 are needed",
    ),
    "student id out of range": (f"{TINY} {DISTIL} --s-id 0 1 4", r"--s-id: block id 4 is out of range: .* ids 0..3"),
    "teacher id out of range": (f"{TINY} {DISTIL} --t-id 0 1 6", r"--t-id: block id 6 is out of range: .* ids 0..5"),
    "input size not the model's": (f"{TINY} --input-size 30", "--input-size 30 does not fit deit_tiny_patch16_224"),
    "another head scored": (f"{EVAL} --finetune {{teacher}} {CAIT} --num-classes 30", "its head has 24 classes"),
    "heads kept together": (
        f"{TINY} {DISTIL} --model deit_tiny_distilled_patch16_224 --no-train-mode",
        "--no-train-mode keeps the heads",
    ),
    "hub teacher of another class count": (
        f"{IMNET} --data-path {{images}} --model-kwargs {' '.join(STUDENT)} "
        f"--distillation-type soft --w-fft 0 {HUB_TEACHER}",
        "the teacher's weights are for 24 classes and the data set has 2: give --teacher-path",
    ),
    "hub weights of another class count scored": (
        f"{IMNET} --data-path {{images}} --eval --pretrained {CAIT} {HUB}",
        "--pretrained weights are for 24 classes, the data set has 2",
    ),
    "unknown model argument": (f"{TINY} --model-kwargs dpeth=3", "timm cannot build deit_tiny_patch16_224: .*dpeth"),
}


def refused(command, places):
    """The line that a command line ends with."""
    with pytest.raises(utils.UserError) as caught:
        main.main(parse_args(command.format(**places).split()))
    return str(caught.value)


@pytest.mark.parametrize("name", BEFORE_A_MODEL)
def test_a_mistake_is_refused_before_a_model_is_built(name, places, monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: pytest.fail("a model was built"))
    command, message = BEFORE_A_MODEL[name]
    assert re.search(message, refused(command, places))


@pytest.mark.parametrize("name", WITH_A_MODEL)
def test_a_mistake_that_a_model_shows_is_refused(name, places):
    command, message = WITH_A_MODEL[name]
    assert re.search(message, refused(command, places))


def test_the_tiny_command_lines_are_good_without_the_mistake(places):
    main.main(parse_args(f"{TINY} {DISTIL}".format(**places).split()))


@pytest.mark.slow
def test_a_mistake_ends_the_program_with_one_line_and_code_2():
    done = run_main(*tiny_run("--lr", "nan"))
    assert done.returncode == 2
    assert done.stderr == "error: argument --lr: expected a number in [0, inf), got nan\n"


def test_a_minimum_above_the_scaled_learning_rate_is_a_warning(capsys):
    main.main(parse_args(tiny_run("--lr", "1e-4")))  # of a global batch of 512; here it is 16
    assert "warning: --min-lr 1e-05 is above this learning rate" in capsys.readouterr().out


NOTED = {
    "data path": ("--data-path {empty}", "--data-path has no effect without a data set of files"),
    "bad images": ("--skip-bad-images 3", "--skip-bad-images has no effect without a data set of image files"),
    "crop": ("--eval-crop-ratio 1", "--eval-crop-ratio has no effect without larger images"),
    "jitter": ("--color-jitter 0.3", "--color-jitter has no effect without --aa none or --ThreeAugment"),
    "drop": ("--no-train-mode --drop-path 0.1", "--drop-path has no effect without --train-mode"),
    "timeout": ("--loader-timeout 5", "--loader-timeout has no effect without --num_workers above 0"),
    "processes": ("--allow-world-size-change", "--allow-world-size-change has no effect without --resume"),
    "memory": ("--model-ema-force-cpu", "--model-ema-force-cpu has no effect without --device cuda"),
    "mixup's mode": ("--mixup-mode elem", "--mixup-mode has no effect without --mixup or --cutmix"),
    "switch": ("--mixup 0.8 --mixup-switch-prob 0.1", "--mixup-switch-prob has no effect without both --mixup and"),
    "noise": ("--lr-noise-pct 0.67", "--lr-noise-pct has no effect without --lr-noise"),
    "erasing": ("--reprob 0 --recount 2", "--recount has no effect without --reprob above 0"),
    "patience": ("--patience-epochs 3", "--patience-epochs has no effect without --sched plateau"),
    "momentum": ("--momentum 0.8", "--momentum has no effect with --opt adamw"),
    "epsilon": ("--opt sgd --opt-eps 0.1", "--opt-eps has no effect with --opt sgd"),
    "decays": ("--decay-epochs 3", "--decay-epochs has no effect without --sched step"),
    "rate": ("--decay-rate 0.5", "--decay-rate has no effect without --sched step"),
    "minimum": ("--sched step --min-lr 0", "--min-lr has no effect without a --sched that goes down"),
    "warm-up": ("--warmup-lr 1e-5", "--warmup-lr has no effect without --warmup-epochs above 0"),
    "compile": ("--compile teacher", "--compile has no effect without a teacher"),
    "tau": (f"{DISTIL} --distillation-tau 2 --distillation-alpha 0", "--distillation-tau has no effect without --d"),
    "pairs": (f"{DISTIL} --w-fft 0", "--s-id has no effect without --w-fft and --distillation-beta above 0"),
    "loss": (f"{DISTIL} --distillation-beta 0 --feature-loss mse", "--feature-loss has no effect without --w-fft and"),
}


@pytest.mark.parametrize("name", NOTED)
def test_a_flag_that_may_stay_in_a_command_line_is_said_to_have_no_effect(name, places, capsys):
    flags, message = NOTED[name]
    parse_args(f"{TINY} {flags}".format(**places).split())
    assert message in capsys.readouterr().out


def test_the_published_commands_have_no_flag_without_effect(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ILSVRC2012").mkdir()
    commands = re.findall(r"nproc_per_node=2 main\.py (--output_dir .*)", (ROOT / "README.md").read_text())
    assert len(commands) == 3
    for command in commands:
        parse_args(command.split())
    assert capsys.readouterr().out == ""


def test_scoring_says_where_the_run_had_other_images(tmp_path, capsys):
    main.main(parse_args(tiny_run("--output_dir", str(tmp_path))))
    other = ["--eval", "--resume", str(tmp_path / "checkpoint.pth"), "--eval-crop-ratio", "1.0"]
    main.main(parse_args(tiny_run(*other)))
    assert "the run had --eval-crop-ratio 0.875, this scores with --eval-crop-ratio 1.0" in capsys.readouterr().out


def test_validation_images_alone_are_enough_to_score(places, tmp_path):
    flags = f"{IMNET} --data-path {{no_train}} --model-kwargs {' '.join(STUDENT)}".format(**places).split()
    model = timm.create_model("deit_tiny_patch16_224", num_classes=2, **key_values(STUDENT))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    stats = main.main(parse_args([*flags, "--eval", "--resume", str(tmp_path / "weights.pth")]))
    assert stats["images"] == 8
