"""analyze.py: the measures against numpy, the choice of pairs, the command, its files and figures."""

import argparse
import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, STUDENT, TEACHER, distil, jpeg_folder, tiny_run
from PIL import Image
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import analyze
import datasets
import flags
import plots
import samplers
import spectral
from utils import UserError

SHAPES = [(2, 6, 4, 4), (1, 7, 3, 5), (3, 1, 2, 2), (2, 8, 1, 1), (1, 5, 4, 2)]
NAME = "deit_tiny_patch16_224"
GRATINGS = ("--data-set", "GRATINGS", "--num-images", 6)
DEIT = ("--model", NAME, "--model-kwargs", *STUDENT, "--random", "--input-size", 32)


def maps_of(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def result_of(*batches, seed=0):
    profile = spectral.SpectralProfile(seed)
    for maps in batches:
        profile.add(maps)
    return profile.result()


def assert_close(found, expected, rtol=1e-12, atol=0.0):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def tiny(name=NAME, kwargs=STUDENT, **more):
    torch.manual_seed(0)
    return timm.create_model(name, **{k: int(v) for k, v in (pair.split("=") for pair in kwargs)}, **more)


def parse(*argv):
    return analyze.get_args_parser().parse_args(["--device", "cpu", "--num_workers", "0", *map(str, argv)])


def run(*argv):
    """Run the command in this process; a flag in `argv` wins."""
    args = parse(*argv)
    analyze.check_args(args)
    analyze.main(args)


def numbers(folder):
    with np.load(folder / "spectra.npz") as file:
        return dict(file)


def tokens_intensity(model, images):
    """Return the intensity of each block's patch tokens, from the blocks called one by one and numpy's transform."""
    tokens, result = model.pos_drop(model._pos_embed(model.patch_embed(images))), []
    for block in model.blocks:
        tokens = block(tokens)
        spectrum = np.fft.fft(tokens[:, 1:].detach().numpy(), axis=2) / tokens.shape[2]
        result.append(np.abs(spectrum).mean())
    return result


# Measures


@pytest.mark.parametrize("shape", SHAPES)
def test_layerwise_spectrum_is_numpys_fft_along_channels(shape):
    maps = maps_of(shape)
    expected = np.abs(np.fft.fft(maps.numpy(), axis=1) / shape[1]).mean(axis=(0, 2, 3))
    assert_close(spectral.layerwise_spectrum(maps), torch.from_numpy(expected), atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_power_spectrum_is_numpys_and_keeps_the_energy(shape):
    maps = maps_of(shape)
    power = spectral.power_spectrum(maps)
    expected = (np.abs(np.fft.fft2(maps.numpy(), norm="ortho")) ** 2).mean(axis=(0, 1))
    assert_close(power, torch.from_numpy(expected), atol=1e-14)
    assert_close(power.mean(), maps.square().mean())


@pytest.mark.parametrize("size", [(4, 4), (5, 5), (3, 8), (1, 1), (14, 14)])
def test_radial_average_is_the_mean_over_each_ring(size):
    power = maps_of(size).abs()
    rings = {}
    for y, x in itertools.product(*map(range, size)):
        cycles = [min(k, n - k) / n for k, n in zip((y, x), size, strict=True)]
        rings.setdefault(round(math.hypot(*cycles) * min(size)), []).append(power[y, x].item())
    radius, mean = spectral.radial_average(power)
    assert sorted(rings) == list(range(len(mean)))
    assert_close(mean.tolist(), [float(np.mean(rings[r])) for r in range(len(mean))])
    assert_close(radius.tolist(), [r / min(size) for r in range(len(mean))])


@pytest.mark.parametrize("channels", [24, 192, 384])
def test_intensity_of_gaussian_features_follows_their_rms(channels):
    result = result_of(3.0 * maps_of((4, channels, 8, 8)))
    ratio = result["intensity_corrected"] / result["rms"]
    assert_close(ratio.item(), math.sqrt(math.pi) / 2, rtol=0.02)


@pytest.mark.parametrize("parts", [(8,), (1,) * 8, (5, 3), (2, 1, 4, 1)])
def test_streaming_equals_one_batch(parts):
    maps = maps_of((8, 6, 5, 3))
    whole, streamed = result_of(maps), result_of(*maps.split(parts))
    for name, value in whole.items():
        assert_close(streamed[name], value)


def test_results_are_what_their_names_promise():
    maps = maps_of((4, 6, 3, 3))
    result = result_of(maps)
    assert_close(result["intensity"], spectral.layerwise_spectrum(maps).mean())
    assert_close(result["rms"], maps.square().mean().sqrt())
    assert_close(result["intensity_corrected"], result["intensity"] * math.sqrt(6))


def test_shuffling_changes_only_features_with_ordered_channels():
    unordered = result_of(maps_of((4, 64, 4, 4)) * torch.linspace(0.5, 2, 64)[torch.randperm(64)].view(-1, 1, 1))
    assert_close(unordered["intensity_shuffled"], unordered["intensity"], rtol=0.05)
    wave = torch.cos(2 * torch.pi * 3 * torch.arange(64, dtype=torch.float64) / 64)
    ordered = result_of(maps_of((4, 1, 4, 4)) * wave.view(-1, 1, 1))
    assert ordered["intensity_shuffled"] > 2 * ordered["intensity"]


def test_the_seed_fixes_one_permutation_for_all_batches():
    maps = maps_of((4, 16, 2, 2))
    assert result_of(*maps.split(1))["intensity_shuffled"] == result_of(*maps.split(1))["intensity_shuffled"]
    assert result_of(maps, seed=1)["intensity_shuffled"] != result_of(maps)["intensity_shuffled"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_results_are_float64_for_maps_of_any_precision(dtype):
    maps = maps_of((2, 6, 3, 3), dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = result_of(maps)
    exact = result_of(maps.double())
    for name, value in result.items():
        assert value.dtype == torch.float64
        assert_close(value, exact[name], rtol=1e-5, atol=1e-6)


def test_a_profile_without_images_has_no_result():
    with pytest.raises(RuntimeError, match="no maps"):
        spectral.SpectralProfile().result()


def test_outputs_with_other_channels_are_refused():
    model = tiny()
    model.feature_info[1]["num_chs"] = 25
    spectral.FeatureHooks(model, [1])
    with pytest.raises(RuntimeError, match=r"blocks\.1"):
        model(torch.zeros(1, 3, 32, 32))


def test_a_block_that_does_not_exist_is_refused():
    model = tiny()
    model.feature_info[1]["module"] = "layers.1"
    with pytest.raises(ValueError, match=r"VisionTransformer has no layers\.1"):
        spectral.FeatureHooks(model, [1])


# Pairs of blocks

U_SHAPE = [3.0, 2.5] + [1.0] * 16 + [2.0, 2.2, 2.5, 3.0, 4.0, 6.0]
STAGES = [4, 8, 16, 32]


@pytest.mark.parametrize(
    ("intensity", "student", "teacher", "number", "s_id", "t_id"),
    [
        (U_SHAPE, [16] * 12, [16] * 24, 8, [0, 1, 6, 7, 8, 9, 10, 11], [0, 1, 18, 19, 20, 21, 22, 23]),
        (U_SHAPE[::-1], [16] * 12, [16] * 24, 8, [0, 1, 2, 3, 4, 5, 10, 11], [0, 1, 2, 3, 4, 5, 22, 23]),
        (U_SHAPE, [16] * 12, [16] * 24, 1, [11], [23]),
        (U_SHAPE, [16] * 12, [16] * 24, 2, [10, 11], [22, 23]),
        (U_SHAPE, [16] * 12, [16] * 24, 3, [0, 10, 11], [0, 22, 23]),
        (list(range(6)), [16] * 4, [16] * 6, 3, [1, 2, 3], [3, 4, 5]),  # rising: the last ones
        (list(range(6))[::-1], [16] * 4, [16] * 6, 3, [0, 1, 2], [0, 1, 2]),
        ([1.0] * 6, [16] * 4, [16] * 6, 4, [0, 1, 2, 3], [0, 1, 4, 5]),  # flat: as even as can be
        (U_SHAPE[:1] + U_SHAPE[-5:], [16] * 12, [16] * 6, 4, [0, 7, 9, 11], [0, 3, 4, 5]),  # a deeper student
        ([1.0, 2.0, 1.5], [16] * 3, [16] * 3, 3, [0, 1, 2], [0, 1, 2]),
        ([2.0, 1.0, 3.0, 4.0], STAGES, STAGES, 4, [0, 1, 2, 3], [0, 1, 2, 3]),
        ([9.0, 2.0, 1.0, 3.0, 4.0], STAGES, [2, *STAGES], 4, [0, 1, 2, 3], [1, 2, 3, 4]),  # the stem has no partner
        ([9.0, 1.0, 1.0, 1.0, 5.0], STAGES, [2, *STAGES], 1, [3], [4]),  # and does not count
        ([2.0, 1.0, 3.0, 4.0], [2, *STAGES], STAGES, 3, [1, 3, 4], [0, 2, 3]),
        ([1.0, 2.0, 5.0, 4.0], STAGES, [4, 8, 16, 16], 3, [0, 1, 2], [0, 1, 3]),  # a stage ends with its last block
        (U_SHAPE, STAGES, [16] * 24, 4, [0, 1, 2, 3], [0, 21, 22, 23]),  # stages on one side only
    ],
)
def test_pairs_are_the_ends_with_most_intensity(intensity, student, teacher, number, s_id, t_id):
    assert analyze.suggest_pairs(intensity, student, teacher, number) == (s_id, t_id)


def test_pairs_are_ascending_and_the_best_for_all_depths():
    generator = torch.Generator().manual_seed(0)
    for depth, student in itertools.product(range(1, 14), range(1, 16)):
        intensity = torch.rand(depth, generator=generator).tolist()
        for number in range(1, min(depth, student) + 1):
            s_id, t_id = analyze.suggest_pairs(intensity, [16] * student, [16] * depth, number)
            for ids, blocks in ((s_id, student), (t_id, depth)):
                assert len(ids) == number
                assert ids == sorted(set(ids) & set(range(blocks)))
            best = max(sum(intensity[:k] + intensity[::-1][: number - k]) for k in range(number + 1))
            assert sum(intensity[i] for i in t_id) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ([16] * 4, [16] * 12, "--suggest 5: the student has only 4 blocks"),
        ([16] * 12, [16] * 4, "--suggest 5: the teacher has only 4 blocks"),
        ([2, 4, 8, 16, 32], STAGES, "--suggest 5: the student has only 4 stages of equal resolution"),
    ],
)
def test_more_pairs_than_blocks_are_refused(student, teacher, message):
    with pytest.raises(UserError, match=message):
        analyze.suggest_pairs([1.0] * len(teacher), student, teacher, 5)


# The command

FAMILIES = {
    "deit_tiny_distilled_patch16_224": (STUDENT, [(24, 4, 4)] * 4),
    "cait_xxs24_224": (TEACHER, [(48, 4, 4)] * 6),
    "swin_tiny_patch4_window7_224": (
        ["img_size=32", "patch_size=2", "embed_dim=16", "depths=(1,1,1,1)", "num_heads=(1,2,2,2)", "window_size=4"],
        [(16, 16, 16), (32, 8, 8), (64, 4, 4), (128, 2, 2)],
    ),
    "deit3_small_patch16_224": (STUDENT, [(24, 4, 4)] * 4),
    "vit_tiny_patch16_224": (STUDENT, [(24, 4, 4)] * 4),
    "convnext_atto": (["depths=(1,1,1,1)", "dims=(8,16,24,32)"], [(8, 8, 8), (16, 4, 4), (24, 2, 2), (32, 1, 1)]),
    "regnety_002": ([], [(32, 16, 16), (24, 8, 8), (56, 4, 4), (152, 2, 2), (368, 1, 1)]),
    "resnet18": (["layers=(1,1,1,1)"], [(64, 16, 16), (64, 8, 8), (128, 4, 4), (256, 2, 2), (512, 1, 1)]),
}


@pytest.fixture
def no_figures(monkeypatch):
    """Figures take most of the time and have tests of their own."""
    monkeypatch.setattr(plots, "draw", lambda *_: {})


@pytest.mark.parametrize("model", FAMILIES)
def test_every_family_is_analyzed_block_by_block(model, tmp_path, capsys, no_figures):
    kwargs, shapes = FAMILIES[model]
    student = ("--suggest", 3, "--student", model, "--student-kwargs", *kwargs)
    what = ("--model", model, "--model-kwargs", *kwargs, "--random", "--input-size", 32)
    run(*what, *GRATINGS, "--output_dir", tmp_path, *student)
    found = numbers(tmp_path)
    assert [tuple(shape) for shape in found[f"{model}/shape"]] == shapes
    for i, (channels, *_) in enumerate(shapes):
        spectrum = found[f"{model}/spectrum/{i}"]
        assert spectrum.shape == (channels,)
        assert_close(spectrum.mean(), found[f"{model}/intensity"][i])
    assert np.isfinite(found[f"{model}/rms"]).all()
    s_id, t_id = capsys.readouterr().out.split("--s-id ")[1].split("\n")[0].split(" --t-id ")
    assert s_id == t_id  # a model taught by itself
    assert len(s_id.split()) == 3


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Flags that compare two random models of different depth, read from files."""
    folder = tmp_path_factory.mktemp("sources")
    torch.save(tiny(num_classes=7).state_dict(), folder / "bare.pth")
    kwargs = {key: int(value) for key, value in (pair.split("=") for pair in TEACHER)}
    cait = tiny("cait_xxs24_224", TEACHER, num_classes=3).state_dict()
    torch.save({"model": cait, "args": {"model": "cait_xxs24_224", "model_kwargs": kwargs}}, folder / "cait.pth")
    compare = ("--compare", f"the teacher={folder}/cait.pth", f"student={NAME}:{folder}/bare.pth")
    suggest = ("--suggest", 2, "--student", NAME, "--student-kwargs", *STUDENT)
    return (*compare, "--model-kwargs", *STUDENT, *GRATINGS, "--input-size", 32, *suggest)


@pytest.fixture(scope="module")
def analyzed(sources, tmp_path_factory):
    """Folder of their analysis, without figures."""
    folder = tmp_path_factory.mktemp("analyzed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw", lambda *_: {})
        run(*sources, "--output_dir", folder)
    return folder


@pytest.mark.parametrize("batch_size", [1, 4])
def test_results_do_not_depend_on_the_batch_size(batch_size, sources, analyzed, tmp_path, no_figures):
    run(*sources, "--batch-size", batch_size, "--output_dir", tmp_path)
    expected, found = numbers(analyzed), numbers(tmp_path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-6, err_msg=name)


def test_numbers_are_those_of_the_model_run_by_hand(analyzed):
    images = json.loads((analyzed / "spectra.json").read_text())["images"]
    assert images == samplers.random_subset(datasets.GRATINGS_SIZES["val"], 6, seed=0)
    data = datasets.Gratings("val", 3000, transform=datasets.eval_transform(32))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    batch = torch.stack([(torch.as_tensor(data[i][0]).float() / 255 - mean) / std for i in images])
    expected = tokens_intensity(tiny(num_classes=7).eval(), batch)
    np.testing.assert_allclose(numbers(analyzed)["student/intensity"], expected, rtol=1e-5)


def test_files_hold_the_documented_keys(analyzed):
    document = json.loads((analyzed / "spectra.json").read_text())
    assert document["keys_of_spectra_npz"] == analyze.KEYS
    found, expected = numbers(analyzed), set()
    for model in document["models"]:
        for (i, block), key in itertools.product(enumerate(model["blocks"]), analyze.KEYS):
            expected.add(key.replace("NAME", model["name"]).replace("BLOCK", str(i)))
            assert block["intensity"] == found[f"{model['name']}/intensity"][i]
    assert found.keys() == expected
    assert document["suggestion"].keys() == {"student", "teacher", "s_id", "t_id"}
    assert document["suggestion"]["teacher"] == "the teacher"


@pytest.mark.slow
def test_figures_are_written_as_png_pdf_and_for_tensorboard(sources, tmp_path):
    run(*sources, "--pdf", "--output_dir", tmp_path)
    names = {"intensity", "spectrum", "heatmap", "radial", "suggestion"}
    for name in names:
        image = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))
        assert min(image.shape) > 400  # printable
        assert image.min() < 100  # something is drawn
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 1}).Reload()
    assert set(events.Tags()["images"]) == names


def test_tensorboard_receives_the_curves_over_blocks(analyzed):
    points = EventAccumulator(str(analyzed / "tensorboard" / "student")).Reload().Scalars("block/intensity")
    assert [point.step for point in points] == [0, 1, 2, 3]
    np.testing.assert_allclose([p.value for p in points], numbers(analyzed)["student/intensity"], rtol=1e-6)


def subject(name, width, depth):
    block = {"shape": (width, 2, 2), "module": "blocks", "reduction": 16, **result_of(maps_of((2, width, 2, 2)))}
    return analyze.Subject(name, "x", "x", 32, [block] * depth, torch.nn.Identity())


def test_depth_is_relative_only_if_models_differ_in_it():
    place, label = plots.depth_axis([subject("a", 6, 4), subject("b", 6, 6)])
    assert label == "relative depth"
    assert place(subject("b", 6, 6)).tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    place, label = plots.depth_axis([subject("a", 6, 3), subject("b", 6, 3)])
    assert (place(subject("b", 6, 3)).tolist(), label) == ([0, 1, 2], "block")


@pytest.mark.parametrize("num", [1, pytest.param(4, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)])
def test_figures_of_any_number_of_models_fit_the_page(num):
    subjects = [subject(f"model {i}", 6 + 2 * i, 1 + i) for i in range(num)]
    with analyze.matplotlib.rc_context(plots.STYLE):
        for figure in plots.draw(subjects).values():
            figure.draw_without_rendering()
            assert 3 <= figure.get_size_inches()[0] <= plots.PAGE_WIDTH


def test_first_takes_the_first_images_and_seed_draws_others():
    def drawn(*more):
        return analyze.build_data(parse(*GRATINGS, *more), [])[1]["images"]

    assert drawn("--first") == [0, 1, 2, 3, 4, 5]
    assert drawn("--seed", 1) == drawn("--seed", 1) != drawn()
    assert len(set(drawn())) == 6


@pytest.fixture
def jpegs(tmp_path):
    return jpeg_folder(tmp_path, splits=("val",), images=2)


def test_an_image_folder_needs_only_val(jpegs, capsys):
    run(*DEIT, "--data-path", jpegs)
    assert "4 validation images of IMNET, drawn by seed 0" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_in_one_line(jpegs, workers):
    (jpegs / "val" / "bee" / "1.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^cannot read image .*bee/1\.jpg: [^\n]*$"):
        run(*DEIT, "--data-path", jpegs, "--num_workers", workers)


def test_out_of_memory_is_not_blamed_on_the_input_size(monkeypatch):
    """A GPU in use by another job is the most common failure at the start."""

    def forward(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(timm.models.vision_transformer.Block, "forward", forward)
    with pytest.raises(torch.cuda.OutOfMemoryError, match=r"^CUDA out of memory$"):
        run(*DEIT, *GRATINGS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, teacher_file):
    """Folder of a distilled run of two epochs; student and teacher normalize images differently."""
    import main

    folder = tmp_path_factory.mktemp("trained")
    vit = ("--model", "vit_tiny_patch16_224", "--model-ema-decay", 0.9)
    main.main(flags.parse_args(tiny_run(*distil(teacher_file, *vit, "--epochs", 2, "--output_dir", folder))))
    return folder


@pytest.mark.slow
def test_a_run_folder_provides_model_and_data(trained, tmp_path, capsys, no_figures):
    run("--compare", f"run={trained}", "--output_dir", tmp_path)
    assert "32 validation images of GRATINGS" in capsys.readouterr().out
    checkpoint = torch.load(trained / "checkpoint.pth", weights_only=True)
    model = tiny("vit_tiny_patch16_224", num_classes=24).eval()
    model.load_state_dict(checkpoint["model"])
    images = json.loads((tmp_path / "spectra.json").read_text())["images"]
    data = datasets.Gratings("val", 48, transform=datasets.eval_transform(32))
    batch = torch.stack([torch.as_tensor(data[i][0]).float() / 127.5 - 1 for i in images])
    np.testing.assert_allclose(numbers(tmp_path)["run/intensity"], tokens_intensity(model, batch), rtol=1e-5)


@pytest.mark.slow
def test_weights_are_read_from_every_kind_of_file(trained, tmp_path, capsys):
    checkpoint = torch.load(trained / "checkpoint.pth", weights_only=True)
    torch.save({**checkpoint, "args": argparse.Namespace(**checkpoint["args"])}, tmp_path / "deit.pth")
    torch.save(checkpoint["model"], tmp_path / "bare.pth")
    save_file(checkpoint["model"], tmp_path / "bare.safetensors")
    name = "vit_tiny_patch16_224"
    cases = {
        "folder": ["--checkpoint", trained],
        "file": ["--checkpoint", trained / "checkpoint.pth"],
        "deit": ["--checkpoint", tmp_path / "deit.pth"],
        "bare": ["--checkpoint", tmp_path / "bare.pth", "--model", name, "--model-kwargs", *STUDENT],
        "safetensors": ["--compare", f"{name}={name}:{tmp_path / 'bare.safetensors'}", "--model-kwargs", *STUDENT],
        "ema": ["--checkpoint", trained, "--ema"],
    }
    tables = {}
    for case, argv in cases.items():
        run(*argv, *GRATINGS, "--first", "--input-size", 32)
        tables[case] = capsys.readouterr().out.split(" pixels\n")[1]
    assert tables.pop("ema") != tables["folder"]
    assert len(set(tables.values())) == 1


BAD = {
    "nothing": ("", "nothing to analyze"),
    "unknown model": ("--model deit_tini_patch16_224", "timm has no model deit_tini.*deit_tiny_patch16_224"),
    "no such path": ("--compare a=nowhere/x.pth", r"nowhere/x\.pth is neither a file nor a folder, and timm has no"),
    "entry without a name": ("--compare {bare}", "expected KEY=VALUE"),
    "compare and checkpoint": ("--compare a={bare} --checkpoint {bare}", "cannot be combined"),
    "random and checkpoint": ("--checkpoint {bare} --random", "cannot be combined"),
    "which model": ("--checkpoint {bare}", "does not name its model"),
    "damaged": ("--checkpoint {truncated}", "truncated.pth is "),
    "empty folder": ("--checkpoint {empty}", r"empty/checkpoint\.pth is not a file"),
    "no EMA": ("--model {name} --checkpoint {bare} --ema", "bare.pth: the checkpoint holds no"),
    "other model": ("--compare a=resnet18:{bare}", "a: the weights do not fit resnet18"),
    "not finite": (
        "--checkpoint {nan} --model {name} --model-kwargs {kwargs} --input-size 32",
        "features are not finite",
    ),
    "suggest alone": ("--model {name} --suggest 3", "--suggest N and --student MODEL need each other"),
    "student alone": ("--model {name} --student {name}", "--suggest N and --student MODEL need each other"),
    "no data path": ("--model {name} --random --data-set IMNET", "--data-set IMNET needs --data-path"),
    "no val": ("--model {name} --random --data-set IMNET --data-path {empty}", "empty/val does not exist"),
    "device": ("--model {name} --device tpu", "--device tpu"),
    "output is a file": ("--model {name} --random --output_dir {bare}", "--output_dir .*bare.pth cannot be written"),
    "size": ("--model {name} --random --input-size 40 --model-kwargs img_size=32", "images of 40 pixels: "),
    "too many pairs": (
        "--model {name} --random --model-kwargs {kwargs} --input-size 32 --suggest 5 --student {name}",
        "the teacher has only 4 blocks",
    ),
    "no feature_info": ("--model pit_ti_224 --random", "pit_ti_224"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    weights = tiny().state_dict()
    torch.save(weights, folder / "bare.pth")
    torch.save({**weights, "cls_token": weights["cls_token"] * torch.nan}, folder / "nan.pth")
    (folder / "truncated.pth").write_bytes((folder / "bare.pth").read_bytes()[:3000])
    (folder / "empty").mkdir()
    return {"name": NAME, "kwargs": " ".join(STUDENT), **{path.stem: path for path in folder.iterdir()}}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_user_error(case, files):
    argv, message = BAD[case]
    data = () if "--data-set" in argv else ("--data-set", "GRATINGS", "--num-images", "2")
    with pytest.raises(UserError, match=message):
        run(*argv.format(**files).split(), *data)


@pytest.mark.slow
def test_bad_input_ends_with_one_line_and_exit_code_2():
    command = [sys.executable, str(ROOT / "analyze.py"), "--model", "deit_tini"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: deit_tini is neither a file nor a folder, and timm has no model deit_tini")
    assert done.stderr.count("\n") == 1
