"""Classes are matched by name: scores do not depend on the layout of the folder."""

import json
import re
import shutil

import pytest
import timm
import torch
from conftest import STUDENT, jpeg_folder, run
from processes import finish

from flags import key_values
from scoring import real_labels
from utils import UserError

DEIT = "deit_tiny_patch16_224"
KWARGS = key_values(STUDENT)
CLASSES = [f"c{i}" for i in range(11, -1, -1)]  # an order that no sorting gives
SUBSET = ["c0", "c1", "c10", "c7"]
ON_CPU = ["--device", "cpu", "--num_workers", "0"]


def save(path, weights, **facts):
    """Write a checkpoint of a run on 32 pixels."""
    args = {"model": DEIT, "model_kwargs": KWARGS, "input_size": 32, "data_set": "IMNET"}
    torch.save({"model": weights, "args": args, **facts}, path)
    return path


def printed(flags, ranks, capsys):
    """Run main on so many processes, one of them in this process, and return the output of rank 0."""
    if ranks > 1:
        return finish(0, *flags, ranks=ranks)[0].text
    run(*flags)
    return capsys.readouterr().out


def scores(text):
    """Return the numbers of images and of correct ones, and the loss, that main prints."""
    (found,) = re.findall(r"on the (\d+) test images: .* \((\d+) correct; .* loss ([\d.]+)\)", text)
    return [float(number) for number in found]


def evaluate(checkpoint, folder, *more):
    return run("--eval", "--resume", checkpoint, "--data-path", folder, *ON_CPU, *more)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """Folders with the same images: named as in the model, numbered, and with only some of the classes."""
    root = tmp_path_factory.mktemp("layouts")
    jpeg_folder(root / "names", CLASSES, ["val"], images=1)
    shutil.copytree(root / "names", root / "numbers")
    for i, name in enumerate(CLASSES):
        (root / "numbers" / "val" / name).rename(root / "numbers" / "val" / str(i))
    for name in SUBSET:
        shutil.copytree(root / "names" / "val" / name, root / "subset" / "val" / name)
    return root


@pytest.fixture(scope="module")
def model():
    """A random model with distinct outputs."""
    torch.manual_seed(0)
    model = timm.create_model(DEIT, num_classes=len(CLASSES), **KWARGS)
    torch.nn.init.normal_(model.head.weight)
    return model


@pytest.fixture(scope="module")
def checkpoint(layouts, model):
    return save(layouts / "run.pth", model.state_dict(), classes=CLASSES)


@pytest.mark.parametrize("layout", ["names", "numbers", "subset"])
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_every_layout_is_scored_as_the_plain_one(ranks, layout, model, checkpoint, layouts, tmp_path, capsys):
    """The plain model has outputs for the folder's classes only, in the order of the folder."""
    classes = SUBSET if layout == "subset" else sorted(CLASSES)
    head = {f"head.{key}": w[[CLASSES.index(name) for name in classes]] for key, w in model.head.state_dict().items()}
    plain = save(tmp_path / "plain.pth", model.state_dict() | head, classes=classes)
    plain_layout = layouts / ("subset" if layout == "subset" else "names")
    runs = (plain, plain_layout, 1), (checkpoint, layouts / layout, ranks)
    expected, found = (
        printed(["--eval", "--resume", file, "--data-path", folder, *ON_CPU], processes, capsys)
        for file, folder, processes in runs
    )
    assert scores(found) == pytest.approx(scores(expected), abs=2e-4)
    limited = "predictions are limited to the data set's 4 of the model's 12 classes"
    assert (limited in found) == (layout == "subset")


def test_eval_refuses_renamed_classes(model, layouts, tmp_path):
    file = save(tmp_path / "run.pth", model.state_dict(), classes=["wasp", *set(CLASSES) - {"c3"}])
    with pytest.raises(UserError, match="1 of 12 classes are unknown to the model: c3"):
        evaluate(file, layouts / "names")


def test_resume_refuses_renamed_classes(model, tmp_path):
    folder = jpeg_folder(tmp_path / "images", ("ant", "bee"))
    file = save(tmp_path / "run.pth", model.state_dict(), classes=["ant", "wasp"])
    with pytest.raises(UserError, match=r"--resume: the data set's classes differ from the run's .bee"):
        run("--resume", file, "--data-path", folder, *ON_CPU)


# ImageNet's names


@pytest.fixture(scope="module")
def thousand():
    """A model of 1000 classes that always prefers the last one, then n01443537, then n01440764."""
    model = timm.create_model(DEIT, num_classes=1000, **KWARGS)
    with torch.no_grad():
        model.head.bias[[999, 1, 0]] = torch.tensor([300.0, 200.0, 100.0])
    return model


def test_unnamed_weights_for_imagenet_know_its_classes(thousand, tmp_path):
    folder = jpeg_folder(tmp_path, ("n01440764", "n01443537", "n01484850"), ["val"], images=3)
    file = save(tmp_path / "deit.pth", thousand.state_dict())
    assert evaluate(file, folder)["correct1"] == 3


def test_a_new_head_of_pretrained_weights_is_not_scored(thousand, tmp_path):
    folder = jpeg_folder(tmp_path, ("n01440764", "n01443537"), ["val"], images=1)
    torch.save(timm.create_model(DEIT, **KWARGS | {"img_size": 224}).state_dict(), tmp_path / "hub.pth")
    hub = f"pretrained_cfg_overlay={{'file':'{tmp_path / 'hub.pth'}'}}"
    flags = ["--eval", "--pretrained", "--num-classes", "2", "--data-path", folder, *ON_CPU, "--input-size", 32]
    with pytest.raises(UserError, match="--pretrained with --num-classes would score an untrained head"):
        run(*flags, "--model-kwargs", *STUDENT, hub)


@pytest.fixture(scope="module")
def real(tmp_path_factory, thousand):
    """1000 images in folders 0 to 999, of which 300 show the model's choice after ReaL, 600 do not, 100 nothing."""
    root = tmp_path_factory.mktemp("real")
    image = (jpeg_folder(root / "one", ("ant",), ["val"], images=1, size=(32, 32)) / "val/ant/0.jpg").read_bytes()
    for i in range(1000):
        (root / "images" / "val" / str(i)).mkdir(parents=True)
        (root / "images" / "val" / str(i) / f"ILSVRC2012_val_{i + 1:08d}.JPEG").write_bytes(image)
    (root / "real.json").write_text(json.dumps([[7, 999]] * 300 + [[7]] * 600 + [[]] * 100))
    save(root / "run.pth", thousand.state_dict())
    return ["--eval", "--resume", root / "run.pth", "--data-path", root / "images", *ON_CPU, "--real-labels"], root


ON_TWO = [pytest.param(split, 2, marks=pytest.mark.slow) for split in ("--dist-eval", "--no-dist-eval")]


@pytest.mark.parametrize(("split", "ranks"), [("--dist-eval", 1), *ON_TWO])
def test_real_labels_give_their_own_accuracy(split, ranks, real, capsys):
    """Of 1000 images, of which only one has the label that the model prefers; each is counted once."""
    flags, root = real
    text = printed([*flags, root / "real.json", split], ranks, capsys)
    assert "the 1000 test images: 0.100% (1 correct" in text
    expected = "ReaL accuracy: 33.333% of the 900 images with ReaL labels"
    assert re.findall("ReaL accuracy: .*", text) == [expected]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("[[7], [7]]", "ILSVRC2012_val_00000001.JPEG", "expected one entry for each image"),
        ("no", "ILSVRC2012_val_00000001.JPEG", "Expecting value"),
        ("[[7]]", "tiger.JPEG", r"found tiger\.JPEG"),
    ],
)
def test_wrong_real_labels_are_refused(content, name, message, tmp_path):
    (tmp_path / "real.json").write_text(content)
    with pytest.raises(UserError, match=f"^--real-labels .*real.json: .*{message}"):
        real_labels(str(tmp_path / "real.json"), [name], [])


def test_real_labels_need_imagenets_classes(checkpoint, layouts):
    with pytest.raises(UserError, match="--real-labels needs a model and a data set with the 1000 classes"):
        evaluate(checkpoint, layouts / "names", "--real-labels")
