"""analyze.py: what it reads, its numbers against models run by hand, its files and figures."""

import itertools
import json
import re
import runpy
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, STUDENT, TEACHER, jpeg_folder
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import analyses
import analyze
import datasets
import plots
from parsing import key_values
from utils import UserError

NAME = "deit_tiny_patch16_224"
GRATINGS = ("--data-set", "GRATINGS", "--num-images", 6)
DEIT = ("--model", NAME, "--model-kwargs", *STUDENT, "--random", "--input-size", 32)
SUGGEST = ("--suggest", 2, "--student", NAME, "--student-kwargs", *STUDENT)


def tiny(name=NAME, kwargs=STUDENT, seed=0, **more):
    torch.manual_seed(seed)
    return timm.create_model(name, **key_values(kwargs), **more)


def parse(*argv):
    return analyze.parse_args(["--device", "cpu", "--num_workers", "0", *map(str, argv)])


def run(*argv):
    """Run the command in this process; a flag in `argv` wins."""
    analyze.main(parse(*argv))


def numbers(folder):
    with np.load(folder / "spectra.npz") as file:
        return dict(file)


def images_in(folder):
    return json.loads((folder / "spectra.json").read_text())["images"]


def tokens_by_hand(model, images, num_images=3000, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    """Return each block's patch tokens (B, N, C) of GRATINGS, from the blocks called one by one."""
    data = datasets.Gratings("val", num_images, transform=datasets.eval_transform(32))
    pixels = torch.stack([torch.as_tensor(data[i][0]) for i in images]) / 255
    batch = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    tokens, result = model.eval().pos_drop(model._pos_embed(model.patch_embed(batch))), []
    for block in model.blocks:
        tokens = block(tokens)
        result.append(tokens[:, 1:].detach())
    return result


def assert_intensity(found, tokens):
    expected = [np.abs(np.fft.fft(t.numpy(), axis=2) / t.shape[2]).mean() for t in tokens]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


SWIN = ["img_size=32", "patch_size=2", "embed_dim=16", "depths=(1,1,1,1)", "num_heads=(1,2,2,2)", "window_size=4"]
FAMILIES = {
    "swin_tiny_patch4_window7_224": (SWIN, [(16, 16, 16), (32, 8, 8), (64, 4, 4), (128, 2, 2)]),
    "deit_tiny_lift_patch16_224": (STUDENT, [(24, 4, 4)] * 3 + [(48, 4, 4)]),
    "deit_tiny_widelast_patch16_224": (STUDENT, [(24, 4, 4)] * 3 + [(48, 4, 4)]),
    "resnet18": (["layers=(1,1,1,1)"], [(64, 16, 16), (64, 8, 8), (128, 4, 4), (256, 2, 2), (512, 1, 1)]),
}


@pytest.mark.parametrize("model", FAMILIES)
def test_every_family_is_analyzed_block_by_block(model, capsys):
    kwargs, shapes = FAMILIES[model]
    student = ("--suggest", 3, "--student", model, "--student-kwargs", *kwargs)
    run("--model", model, "--model-kwargs", *kwargs, "--random", "--input-size", 32, *GRATINGS, *student)
    table, ids = capsys.readouterr().out.split("--s-id ")
    assert [tuple(map(int, found)) for found in re.findall(r"(\d+) x (\d+) x (\d+) ", table)] == shapes
    s_id, t_id = ids.strip().split(" --t-id ")
    assert s_id == t_id  # a model taught by itself
    assert len(s_id.split()) == 3


@pytest.fixture(scope="module")
def analyzed(tmp_path_factory):
    """Folder of an analysis of two random models of different depth, read from files, without figures."""
    folder = tmp_path_factory.mktemp("analyzed")
    torch.save(tiny(num_classes=7).state_dict(), folder / "bare.pth")
    cait = {"model": "cait_xxs24_224", "model_kwargs": key_values(TEACHER)}
    weights = tiny(cait["model"], TEACHER, num_classes=3).state_dict()
    torch.save({"model": weights, "args": cait}, folder / "cait.pth")
    compare = ("--compare", f"the teacher={folder}/cait.pth", f"student={NAME}:{folder}/bare.pth")
    more = ("--input-size", 32, "--entropy", "--ranks", "--batch-size", 4, "--output_dir", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw", lambda *_: {})
        run(*compare, "--model-kwargs", *STUDENT, *GRATINGS, *SUGGEST, *more)
    return folder


def test_numbers_are_those_of_the_model_run_by_hand(analyzed):
    """In one batch; the program read two, of different size."""
    assert images_in(analyzed) == list(range(6))
    found, tokens = numbers(analyzed), tokens_by_hand(tiny(num_classes=7), range(6))
    assert_intensity(found["student/intensity"], tokens)
    maps = [t.mT.unsqueeze(2) for t in tokens]
    for key, expected in analyses.entropy_over_depth(lambda: [maps]).items():
        np.testing.assert_allclose(found[f"student/{key}"], expected, rtol=1e-3)
    ranks = json.loads((analyzed / "ranks.json").read_text())["models"]["student"]
    expected = analyses.rank_analysis(lambda: [maps[-1]])
    assert {key: ranks[key] for key in expected} == expected


def test_files_hold_the_documented_keys(analyzed):
    document = json.loads((analyzed / "spectra.json").read_text())
    assert document["keys_of_spectra_npz"] == analyze.KEYS
    found, expected = numbers(analyzed), set()
    for model in document["models"]:
        for (i, block), key in itertools.product(enumerate(model["blocks"]), analyze.KEYS):
            expected.add(key.replace("NAME", model["name"]).replace("BLOCK", str(i)))
            assert block["intensity"] == found[f"{model['name']}/intensity"][i]
            np.testing.assert_allclose(found[f"{model['name']}/spectrum/{i}"].mean(), block["intensity"], rtol=1e-12)
    assert found.keys() == expected
    assert document["suggestion"].keys() == {"student", "teacher", "s_id", "t_id"}
    assert document["suggestion"]["teacher"] == "the teacher"


# Figures


@pytest.mark.slow
def test_figures_are_written_as_png_and_for_tensorboard(tmp_path):
    run(*DEIT, *GRATINGS, "--entropy", "--output_dir", tmp_path)
    names = {"intensity", "spectrum", "heatmap", "radial", "entropy"}
    for name in names:
        image = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))
        assert min(image.shape) > 400  # printable
        assert image.min() < 100  # something is drawn
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 1}).Reload()
    assert set(events.Tags()["images"]) == names
    (curves,) = (tmp_path / "tensorboard").glob("*/")
    points = EventAccumulator(str(curves)).Reload().Scalars("block/intensity")
    np.testing.assert_allclose([p.value for p in points], numbers(tmp_path)[f"{curves.name}/intensity"], rtol=1e-6)


def subject(name, depth):
    curves = dict.fromkeys(analyze.CURVES, np.arange(depth) + 1.0)
    profiles = dict.fromkeys(analyze.PROFILES, [np.arange(6) + 1.0] * depth)
    return analyze.Subject(name, "x", "x", 32, {}, None, [{}] * depth, curves, profiles)


def test_depth_is_relative_only_if_models_differ_in_it():
    place, label = plots.depth_axis([subject("a", 4), subject("b", 6)])
    assert label == "relative depth"
    assert place(subject("b", 6)).tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    place, label = plots.depth_axis([subject("a", 3), subject("b", 3)])
    assert (place(subject("b", 3)).tolist(), label) == ([0, 1, 2], "block")


@pytest.mark.parametrize("num", [1, 4, 5])
def test_figures_of_any_number_of_models_fit_the_page(num):
    for figure in plots.draw([subject(f"model {i}", 1 + i) for i in range(num)]).values():
        assert 3 <= figure.get_size_inches()[0] <= plots.PAGE_WIDTH


def test_milestones_are_colored_by_epoch():
    axes = plots.draw_milestones([subject(f"epoch {epoch}", 4) for epoch in (5, 10, 20)])["milestones"].axes
    scale = plots.matplotlib.colormaps[plots.DEPTH_COLORS]
    for axis in axes[:2]:  # intensity and RMS; then the color bar
        assert [line.get_color() for line in axis.lines] == [scale(x) for x in (0.0, 1 / 3, 1.0)]


# Data


@pytest.fixture
def jpegs(tmp_path):
    return jpeg_folder(tmp_path / "jpegs", splits=("val",))


def images_of(*argv):
    return analyze.build_data(parse(*DEIT, *argv), [])[1]["images"]


def test_images_are_drawn_the_first_or_one_of_each_class(jpegs):
    data = ("--data-path", jpegs, "--num-images", 5)
    assert images_of(*data, "--first") == [0, 1, 2, 3, 4]
    assert images_of(*data, "--per-class") == [0, 4, 1, 5, 2]
    assert images_of(*data, "--seed", 1) == images_of(*data, "--seed", 1) != images_of(*data)
    assert len(set(images_of(*data))) == 5


@pytest.mark.parametrize(
    ("preset", "number", "order", "crop"),
    [("spectralkd", 32, "first", 0.875), ("dynamics", 32, "first", 0.875), ("mismatch", 1000, "classes", "own")],
)
def test_a_preset_sets_what_its_paper_looked_at(preset, number, order, crop):
    args = parse(*DEIT, "--data-set", "GRATINGS", "--preset", preset)
    data = analyze.build_data(args, [])[1]
    assert (len(data["images"]), data["order"], data["crop_ratio"]) == (number, order, crop)
    assert (args.entropy, args.ranks) == (preset == "dynamics", preset == "mismatch")
    assert len(images_of("--data-set", "GRATINGS", "--num-images", 7, "--preset", preset)) == 7


def test_the_own_transform_is_that_of_the_models_config(tmp_path, capsys):
    """CaiT's crop is the whole image."""
    (tmp_path / "val" / "ant").mkdir(parents=True)
    pixels = np.random.RandomState(0).randint(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((96, 72)).save(tmp_path / "val" / "ant" / "0.png")
    cait = "--model cait_s24_224 --random --model-kwargs patch_size=16 embed_dim=24 depth=2 num_heads=2 --input-size 64"
    found = []
    for crop in ("own", 1, 0.875):
        run(*cait.split(), "--data-path", tmp_path, "--eval-crop-ratio", crop)
        found.append(capsys.readouterr().out)
    assert found[0] == found[1] != found[2]


def test_published_ranks_stand_beside_the_measured_ones(jpegs, capsys):
    model = ("--model", "cait_s24_224", "--random", "--model-kwargs", *TEACHER, "--input-size", 32)
    run(*model, "--data-path", jpegs, "--ranks")
    table = capsys.readouterr().out
    assert "8 validation images of IMNET, the first by name of each class" in table
    assert re.search(r"^SVD .*   14 34 61 121$", table, re.M)
    assert re.search(r"^PCA .*   167 247 302 359$", table, re.M)


def test_a_damaged_image_is_named_in_one_line(jpegs):
    (jpegs / "val" / "bee" / "1.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^cannot read image .*bee/1\.jpg: [^\n]*$"):
        run(*DEIT, "--data-path", jpegs, "--num_workers", 1)


# Runs

STORED = {"model_kwargs": key_values(STUDENT), "input_size": 32, "data_set": "GRATINGS", "gratings_sizes": [64, 48]}


@pytest.mark.parametrize("ema", [False, True])
def test_a_run_folder_provides_model_and_data(ema, tmp_path, capsys, monkeypatch):
    """Its model normalizes images in another way than the default."""
    network, average = (tiny("vit_tiny_patch16_224", seed=seed, num_classes=24) for seed in (0, 1))
    weights = {"model": network.state_dict(), "model_ema": average.state_dict()}
    torch.save({**weights, "args": {**STORED, "model": "vit_tiny_patch16_224"}}, tmp_path / "checkpoint.pth")
    monkeypatch.setattr(plots, "draw", lambda *_: {})  # drawing takes most of the time
    run("--compare", f"run={tmp_path}", "--output_dir", tmp_path, *["--ema"] * ema)
    assert "32 validation images of GRATINGS, drawn by seed 0" in capsys.readouterr().out
    assert max(images_in(tmp_path)) < 48
    tokens = tokens_by_hand(average if ema else network, images_in(tmp_path), 48, (0.5,) * 3, (0.5,) * 3)
    assert_intensity(numbers(tmp_path)["run/intensity"], tokens)


def test_milestones_of_a_run_are_analyzed(tmp_path):
    networks = {epoch: tiny(seed=epoch) for epoch in (5, 20)}
    for epoch, network in networks.items():
        checkpoint = {"model": network.state_dict(), "args": {**STORED, "model": NAME}}
        torch.save(checkpoint, tmp_path / f"checkpoint_{epoch - 1:04d}.pth")
    torch.save({}, tmp_path / "checkpoint_previous.pth")
    run("--milestones", tmp_path, "--entropy", "--num-images", 4, "--pdf", "--output_dir", tmp_path)
    assert [path.stem for path in tmp_path.glob("*.png")] == ["milestones"]
    assert (tmp_path / "milestones.pdf").read_bytes().startswith(b"%PDF")
    for epoch, network in networks.items():
        tokens = tokens_by_hand(network, images_in(tmp_path), 48)
        assert_intensity(numbers(tmp_path)[f"epoch {epoch}/intensity"], tokens)


# Errors

TINY = f"--model {NAME} --model-kwargs {' '.join(STUDENT)} --input-size 32"
BAD = {
    "nothing": ("", "nothing to analyze"),
    "unknown model": ("--model deit_tini_patch16_224", "timm has no model deit_tini.*deit_tiny_patch16_224"),
    "no such path": ("--compare a=nowhere/x.pth", r"nowhere/x\.pth is neither a file nor a folder, and timm has no"),
    "two sources": ("--compare a={bare} --checkpoint {bare}", "--checkpoint: not allowed with argument --compare"),
    "which model": ("--checkpoint {bare}", "does not name its model"),
    "empty folder": ("--checkpoint {empty}", r"empty/checkpoint\.pth is not a file"),
    "other source": ("--compare a=local-dir:{empty}", "model local-dir:.*empty: "),
    "no EMA": (f"--model {NAME} --checkpoint {{bare}} --ema", "bare.pth: the checkpoint has no"),
    "other model": ("--compare a=resnet18:{bare}", "a: the weights do not fit resnet18"),
    "not finite": (f"{TINY} --checkpoint {{nan}}", "features are not finite"),
    "suggest alone": (f"--model {NAME} --suggest 3", "--suggest N and --student MODEL need each other"),
    "too many pairs": (f"{TINY} --random --suggest 5 --student {NAME}", "the teacher has only 4 blocks"),
    "no milestones": ("--milestones {empty}", r"empty has no checkpoint_0009\.pth etc\.: train with --save-every"),
    "no data path": (f"{TINY} --random --data-set IMNET", "--data-set IMNET needs --data-path"),
    "no val": (f"{TINY} --random --data-set IMNET --data-path {{empty}}", "empty/val does not exist"),
    "output is a file": (f"{TINY} --random --output_dir {{bare}}", "--output_dir .*bare.pth cannot be written"),
    "size": (f"--model {NAME} --random --input-size 40 --model-kwargs img_size=32", "images of 40 pixels: "),
    "no feature_info": ("--model pit_ti_224 --random", "pit_ti_224"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    weights = tiny().state_dict()
    torch.save(weights, folder / "bare.pth")
    torch.save({**weights, "cls_token": weights["cls_token"] * torch.nan}, folder / "nan.pth")
    (folder / "empty").mkdir()
    return {path.stem: path for path in folder.iterdir()}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_user_error(case, files):
    argv, message = BAD[case]
    data = () if "--data-set" in argv else ("--data-set", "GRATINGS", "--num-images", "2")
    with pytest.raises(UserError, match=message):
        run(*argv.format(**files).split(), *data)


@pytest.mark.parametrize(
    ("program", "argv", "message"),
    [
        ("analyze.py", "--model deit_tini", "deit_tini: timm has no model deit_tini: try .*"),
        ("verify.py", "--data-path nowhere", "nowhere/val does not exist: .*"),
    ],
)
def test_bad_input_ends_with_one_line_and_exit_code_2(program, argv, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [program, *argv.split()])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # which the end of a program replaces
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / program), run_name="__main__")
    assert end.value.code == 2
    assert re.fullmatch(f"error: {message}\n", capsys.readouterr().err)
