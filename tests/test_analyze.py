"""The spectral analysis: measures against numpy, the choice of pairs, the command, and the curves of a run."""

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
from conftest import ROOT, STUDENT, TEACHER, distil, run_main, tiny_run
from PIL import Image
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import analyze
import datasets
import main
import samplers
import spectral
import utils

SHAPES = [(2, 6, 4, 4), (1, 7, 3, 5), (3, 1, 2, 2), (2, 8, 1, 1), (1, 5, 4, 2)]


def maps_of(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def result_of(*batches, seed=0):
    profile = spectral.SpectralProfile(seed)
    for maps in batches:
        profile.add(maps)
    return profile.result()


# Measures


@pytest.mark.parametrize("shape", SHAPES)
def test_layerwise_spectrum_is_numpys_transform_along_channels(shape):
    maps = maps_of(shape)
    expected = np.abs(np.fft.fft(maps.numpy(), axis=1) / shape[1]).mean(axis=(0, 2, 3))
    torch.testing.assert_close(spectral.layerwise_spectrum(maps), torch.from_numpy(expected), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_power_spectrum_is_numpys_and_keeps_the_energy(shape):
    maps = maps_of(shape)
    power = spectral.power_spectrum(maps)
    expected = (np.abs(np.fft.fft2(maps.numpy(), norm="ortho")) ** 2).mean(axis=(0, 1))
    torch.testing.assert_close(power, torch.from_numpy(expected), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(power.mean(), maps.square().mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [(4, 4), (5, 5), (3, 8), (1, 1), (14, 14)])
def test_radial_average_takes_each_frequency_into_the_ring_of_its_distance(size):
    power = maps_of(size).abs()
    rings = {}
    for y, x in itertools.product(*map(range, size)):
        cycles = [min(k, n - k) / n for k, n in zip((y, x), size, strict=True)]
        rings.setdefault(round(math.hypot(*cycles) * min(size)), []).append(power[y, x].item())
    radius, mean = spectral.radial_average(power)
    assert sorted(rings) == list(range(len(mean)))
    torch.testing.assert_close(mean.tolist(), [float(np.mean(rings[r])) for r in range(len(mean))], rtol=1e-12, atol=0)
    torch.testing.assert_close(radius.tolist(), [r / min(size) for r in range(len(mean))], rtol=1e-12, atol=0)


@pytest.mark.parametrize("channels", [6, 7])
def test_squared_bins_of_a_token_keep_its_energy(channels):
    token = maps_of((1, channels, 1, 1))
    spectrum = spectral.layerwise_spectrum(token)
    torch.testing.assert_close(spectrum.square().sum(), token.square().sum() / channels, rtol=1e-12, atol=0)


@pytest.mark.parametrize("channels", [24, 192, 384])
def test_intensity_of_gaussian_features_is_their_rms_over_the_root_of_the_width(channels):
    result = result_of(3.0 * maps_of((4, channels, 8, 8)))
    ratio = result["intensity_corrected"] / result["rms"]
    torch.testing.assert_close(ratio.item(), math.sqrt(math.pi) / 2, rtol=0.02, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_intensity_is_never_above_the_rms_over_the_root_of_the_width(shape):
    result = result_of(maps_of(shape))
    assert result["intensity_corrected"] <= result["rms"] * (1 + 1e-12)


@pytest.mark.parametrize("parts", [(8,), (1,) * 8, (5, 3), (2, 1, 4, 1)])
def test_streaming_equals_one_batch(parts):
    maps = maps_of((8, 6, 5, 3))
    whole, streamed = result_of(maps), result_of(*maps.split(parts))
    for name, value in whole.items():
        torch.testing.assert_close(streamed[name], value, rtol=1e-12, atol=0)


def test_results_hold_what_their_names_say():
    maps = maps_of((4, 6, 3, 3))
    result = result_of(maps)
    torch.testing.assert_close(result["intensity"], spectral.layerwise_spectrum(maps).mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(result["rms"], maps.square().mean().sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(result["intensity_corrected"], result["intensity"] * math.sqrt(6), rtol=1e-12, atol=0)


def test_shuffling_hardly_changes_features_whose_channels_have_no_order_and_changes_those_that_have_one():
    unordered = result_of(maps_of((4, 64, 4, 4)) * torch.linspace(0.5, 2, 64)[torch.randperm(64)].view(-1, 1, 1))
    torch.testing.assert_close(unordered["intensity_shuffled"], unordered["intensity"], rtol=0.05, atol=0)
    wave = torch.cos(2 * torch.pi * 3 * torch.arange(64, dtype=torch.float64) / 64)
    ordered = result_of(maps_of((4, 1, 4, 4)) * wave.view(-1, 1, 1))
    assert ordered["intensity_shuffled"] > 2 * ordered["intensity"]


def test_one_permutation_serves_all_batches_and_goes_with_the_seed():
    maps = maps_of((4, 16, 2, 2))
    assert result_of(*maps.split(1))["intensity_shuffled"] == result_of(*maps.split(1))["intensity_shuffled"]
    assert result_of(maps, seed=1)["intensity_shuffled"] != result_of(maps)["intensity_shuffled"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_results_are_float64_for_maps_of_any_precision_and_inside_autocast(dtype):
    maps = maps_of((2, 6, 3, 3), dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = result_of(maps)
    exact = result_of(maps.double())
    for name, value in result.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, exact[name], rtol=1e-5, atol=1e-6)


def test_a_profile_without_images_has_no_result():
    with pytest.raises(RuntimeError, match="no maps"):
        spectral.SpectralProfile().result()


def tiny_deit(**more):
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_224", **utils.key_values(STUDENT), **more)


def test_intensity_curve_is_that_of_the_patch_tokens_of_each_block_and_leaves_no_hook():
    model, images = tiny_deit(proj_drop_rate=0.5).train(), torch.randn(3, 3, 32, 32)
    curve = spectral.intensity_curve(model, images)
    tokens = model.pos_drop(model._pos_embed(model.patch_embed(images)))
    for block, intensity in zip(model.blocks, curve, strict=True):
        tokens = block(tokens)
        expected = np.abs(np.fft.fft(tokens[:, 1:].detach().numpy(), axis=2) / 24).mean()
        torch.testing.assert_close(intensity, float(expected), rtol=1e-5, atol=0)
    assert not model._forward_pre_hooks
    assert not any(block._forward_hooks for block in model.blocks)
    with pytest.raises(AssertionError):
        spectral.intensity_curve(model, torch.randn(1, 3, 40, 40))
    assert not any(block._forward_hooks for block in model.blocks)


def test_outputs_that_are_no_maps_are_refused():
    model = tiny_deit()
    model.feature_info[1]["num_chs"] = 25
    hooks = spectral.FeatureHooks(model, [1])
    with pytest.raises(RuntimeError, match=r"blocks\.1 has not the channels"):
        model(torch.zeros(1, 3, 32, 32))
    hooks.remove()
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
        ([2.0, 1.0, 3.0, 4.0], [2, *STAGES], STAGES, 3, [1, 3, 4], [0, 2, 3]),
        ([1.0, 2.0, 5.0, 4.0], STAGES, [4, 8, 16, 16], 3, [0, 1, 2], [0, 1, 3]),  # a stage ends with its last block
        (U_SHAPE, STAGES, [16] * 24, 4, [0, 1, 2, 3], [0, 21, 22, 23]),  # stages on one side only
    ],
)
def test_pairs_are_the_ends_with_most_intensity(intensity, student, teacher, number, s_id, t_id):
    assert analyze.suggest_pairs(intensity, student, teacher, number) == (s_id, t_id)


def test_pairs_are_ascending_without_repeats_and_the_best_ends_for_all_depths_and_numbers():
    generator = torch.Generator().manual_seed(0)
    for depth, student in itertools.product(range(1, 14), range(1, 16)):
        intensity = torch.rand(depth, generator=generator).tolist()
        for number in range(1, min(depth, student) + 1):
            s_id, t_id = analyze.suggest_pairs(intensity, [16] * student, [16] * depth, number)
            for ids, blocks in ((s_id, student), (t_id, depth)):
                assert len(ids) == number
                assert ids == sorted(set(ids))
                assert ids[0] >= 0
                assert ids[-1] < blocks
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
    with pytest.raises(utils.UserError, match=message):
        analyze.suggest_pairs([1.0] * len(teacher), student, teacher, 5)


# The command


def run(*flags):
    """The command in this process; a flag in `flags` wins."""
    args = analyze.get_args_parser().parse_args(["--device", "cpu", "--num_workers", "0", *map(str, flags)])
    analyze.check_args(args)
    analyze.main(args)


def numbers(folder):
    with np.load(folder / "spectra.npz") as file:
        return dict(file)


GRATINGS = ("--data-set", "GRATINGS", "--num-images", 6)
TINY = (*GRATINGS, "--input-size", 32, "--random")

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


@pytest.mark.parametrize("model", FAMILIES)
def test_every_family_is_analysed_block_by_block(model, tmp_path, capsys, monkeypatch):
    kwargs, shapes = FAMILIES[model]
    monkeypatch.setattr(analyze, "draw", lambda *_: {})  # the figures have tests of their own
    student = ("--suggest", 3, "--student", model, "--student-kwargs", *kwargs)
    run("--model", model, "--model-kwargs", *kwargs, *TINY, "--output_dir", tmp_path, *student)
    found = numbers(tmp_path)
    assert [tuple(shape) for shape in found[f"{model}/shape"]] == shapes
    for i, (channels, *_) in enumerate(shapes):
        spectrum = found[f"{model}/spectrum/{i}"]
        assert spectrum.shape == (channels,)
        torch.testing.assert_close(spectrum.mean(), found[f"{model}/intensity"][i], rtol=1e-12, atol=0)
    assert np.isfinite(found[f"{model}/rms"]).all()
    s_id, t_id = capsys.readouterr().out.split("--s-id ")[1].split("\n")[0].split(" --t-id ")
    assert s_id == t_id  # a model taught by itself
    assert len(s_id.split()) == 3


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    """Folder of an analysis of two random models with everything that can be written."""
    folder = tmp_path_factory.mktemp("analysed")
    kwargs = ("--student-kwargs", *STUDENT)
    bare = folder / "bare.pth"
    torch.save(tiny_deit(num_classes=7).state_dict(), bare)
    cait = timm.create_model("cait_xxs24_224", num_classes=3, **utils.key_values(TEACHER)).state_dict()
    torch.save({"model": cait, "args": {"model": "cait_xxs24_224", "model_kwargs": TEACHER}}, folder / "cait.pth")
    sources = (f"the teacher={folder}/cait.pth", f"student=deit_tiny_patch16_224:{bare}")
    suggest = ("--suggest", 2, "--student", "deit_tiny_patch16_224", *kwargs)
    flags = ("--compare", *sources, "--model-kwargs", *STUDENT, *GRATINGS, "--input-size", 32)
    run(*flags, "--pdf", "--output_dir", folder, *suggest)
    return folder, flags


@pytest.mark.parametrize("more", [("--batch-size", 1), ("--batch-size", 4)])
@pytest.mark.slow
def test_results_do_not_depend_on_the_batch_size(analysed, more, tmp_path, monkeypatch):
    folder, flags = analysed
    monkeypatch.setattr(analyze, "draw", lambda *_: {})
    run(*flags, *more, "--output_dir", tmp_path)
    expected, found = numbers(folder), numbers(tmp_path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-6, err_msg=name)


@pytest.mark.slow
def test_numbers_are_those_of_the_model_run_by_hand_on_the_same_images(analysed):
    folder, _ = analysed
    images = json.loads((folder / "spectra.json").read_text())["images"]
    assert images == samplers.random_subset(datasets.GRATINGS_SIZES["val"], 6, seed=0)
    data = datasets.Gratings("val", 3000, transform=datasets.eval_transform(32))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    batch = torch.stack([(torch.as_tensor(data[i][0]).float() / 255 - mean) / std for i in images])
    expected = spectral.intensity_curve(tiny_deit(num_classes=7), batch)
    np.testing.assert_allclose(numbers(folder)["student/intensity"], expected, rtol=1e-5)


@pytest.mark.slow
def test_files_hold_the_documented_keys_for_every_model_and_block(analysed):
    folder, _ = analysed
    document = json.loads((folder / "spectra.json").read_text())
    assert document["keys_of_spectra_npz"] == analyze.KEYS
    expected = set()
    for model in document["models"]:
        for key in analyze.KEYS:
            names = [key.replace("NAME", model["name"]).replace("BLOCK", str(i)) for i in range(len(model["blocks"]))]
            expected |= set(names)
    found = numbers(folder)
    assert found.keys() == expected
    for model in document["models"]:
        for i, block in enumerate(model["blocks"]):
            assert block["intensity"] == found[f"{model['name']}/intensity"][i]
    assert document["suggestion"].keys() == {"student", "teacher", "s_id", "t_id"}
    assert document["suggestion"]["teacher"] == "the teacher"


@pytest.mark.parametrize("name", ["intensity", "spectrum", "heatmap", "radial", "suggestion"])
@pytest.mark.slow
def test_figures_are_written_as_png_of_printable_size_and_pdf(analysed, name):
    folder, _ = analysed
    image = np.asarray(Image.open(folder / f"{name}.png").convert("L"))
    assert min(image.shape) > 400
    assert image.min() < 100  # something is drawn
    assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.slow
def test_tensorboard_receives_the_curves_over_blocks_and_the_figures(analysed):
    folder, _ = analysed
    events = EventAccumulator(str(folder / "tensorboard" / "student")).Reload()
    points = events.Scalars("block/intensity")
    assert [point.step for point in points] == [0, 1, 2, 3]
    np.testing.assert_allclose([p.value for p in points], numbers(folder)["student/intensity"], rtol=1e-6)
    figures = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 1}).Reload().Tags()["images"]
    assert set(figures) == {"intensity", "spectrum", "heatmap", "radial", "suggestion"}


def test_depth_is_relative_where_models_differ_in_it_and_blocks_are_numbered_where_not():
    def fake(depth):
        return analyze.Analysis("x", "x", "x", 32, [{}] * depth)

    place, label = analyze.depth_axis([fake(4), fake(6)])
    assert label == "relative depth"
    assert place(fake(6)).tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    place, label = analyze.depth_axis([fake(3), fake(3)])
    assert (place(fake(3)).tolist(), label) == ([0, 1, 2], "block")


@pytest.mark.parametrize("num", [1, 4, 5])
@pytest.mark.slow
def test_figures_of_any_number_of_models_can_be_drawn(num):
    def fake(i):
        width = 6 + 2 * i
        block = {"shape": (width, 2, 2), "module": "blocks", "reduction": 16, **result_of(maps_of((2, width, 2, 2)))}
        return analyze.Analysis(f"model {i}", "x", "x", 32, [block] * (1 + i))

    with analyze.matplotlib.rc_context(analyze.STYLE):
        for figure in analyze.draw([fake(i) for i in range(num)]).values():
            figure.draw_without_rendering()
            assert 3 <= figure.get_size_inches()[0] <= analyze.PAGE_WIDTH


def test_first_takes_the_first_images_and_seed_draws_others(tmp_path, monkeypatch):
    monkeypatch.setattr(analyze, "draw", lambda *_: {})
    drawn = {}
    for name, more in {"first": ["--first"], "seed 0": [], "seed 1": ["--seed", 1], "again": ["--seed", 1]}.items():
        run(*DEIT, *GRATINGS, *more, "--output_dir", tmp_path / name)
        drawn[name] = json.loads((tmp_path / name / "spectra.json").read_text())["images"]
    assert drawn["first"] == [0, 1, 2, 3, 4, 5]
    assert drawn["seed 1"] == drawn["again"] != drawn["seed 0"]
    assert len(set(drawn["seed 0"])) == 6


def jpegs(folder, damaged=False):
    for name in ("ant", "bee"):
        (folder / "val" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (40, 30), (60 * i, 90, 120)).save(folder / "val" / name / f"{i}.jpg")
    if damaged:
        (folder / "val" / "bee" / "1.jpg").write_bytes(b"no image")
    return folder


DEIT = ("--model", "deit_tiny_patch16_224", "--model-kwargs", *STUDENT, "--random", "--input-size", 32)


def test_an_image_folder_needs_val_alone_and_gives_all_it_has(tmp_path, capsys):
    run(*DEIT, "--data-path", jpegs(tmp_path))
    out = capsys.readouterr().out
    assert "--num-images 32: IMNET has 4 validation images" in out
    assert "4 validation images of IMNET, drawn by seed 0" in out


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_in_one_line(tmp_path, workers):
    folder = jpegs(tmp_path, damaged=True)
    with pytest.raises(utils.UserError, match=r"^cannot read image .*bee/1\.jpg: [^\n]*$"):
        run(*DEIT, "--data-path", folder, "--num_workers", workers)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, teacher_file):
    """Folder of a distilled run of four epochs that logged its spectra, of the same without, and resumed half-way.

    Student and teacher take images normalised in different ways.
    """
    vit = ("--model", "vit_tiny_patch16_224", "--model-ema-decay", 0.9)
    folder = tmp_path_factory.mktemp("trained")
    spectra = ("--spectra-every", 2, "--save-every", 2)
    half_way = folder / "with" / "checkpoint_0001.pth"
    for name, more in {"with": spectra, "without": (), "resumed": (*spectra, "--resume", half_way)}.items():
        flags = distil(teacher_file, *vit, "--epochs", 4, "--output_dir", folder / name, *more)
        main.main(main.parse_args(tiny_run(*flags)))
    return folder


@pytest.mark.parametrize("other", ["without", "resumed"])
@pytest.mark.slow
def test_logging_spectra_changes_neither_the_run_nor_its_resume(trained, other):
    checkpoints = [torch.load(trained / name / "checkpoint.pth", weights_only=True) for name in ("with", other)]
    for part in ("model", "model_ema"):
        for key, value in checkpoints[0][part].items():
            torch.testing.assert_close(value, checkpoints[1][part][key], rtol=0, atol=0)
    assert checkpoints[0]["meter"] == checkpoints[1]["meter"]


@pytest.mark.slow
def test_curves_are_logged_every_so_many_epochs_and_the_teachers_once(trained):
    lines = [json.loads(line) for line in (trained / "with" / "log.txt").read_text().splitlines()]
    assert ["student_intensity" in line for line in lines] == [False, True, False, True]
    assert ["teacher_intensity" in line for line in lines] == [False, True, False, False]
    assert (len(lines[1]["student_intensity"]), len(lines[1]["teacher_intensity"])) == (4, 6)
    events = EventAccumulator(str(trained / "with")).Reload()
    points = events.Scalars("student/intensity/03")
    assert [point.step for point in points] == [1, 3]
    np.testing.assert_allclose(points[1].value, lines[3]["student_intensity"][3], rtol=1e-6)


@pytest.mark.slow
def test_a_resumed_run_logs_the_same_curves(trained):
    straight, resumed = ((trained / name / "log.txt").read_text().splitlines()[-1] for name in ("with", "resumed"))
    assert json.loads(straight)["student_intensity"] == json.loads(resumed)["student_intensity"]
    assert "teacher_intensity" not in (trained / "resumed" / "log.txt").read_text()


@pytest.mark.slow
def test_logged_curves_are_those_of_the_command_on_the_run_folder(trained, teacher_file, tmp_path, capsys):
    sources = [f"run={trained / 'with'}", f"teacher=cait_s24_224:{teacher_file}"]
    run("--compare", *sources, "--model-kwargs", *TEACHER, "--input-size", 32, "--output_dir", tmp_path)
    assert "32 validation images of GRATINGS" in capsys.readouterr().out  # the run says which data
    lines = [json.loads(line) for line in (trained / "with" / "log.txt").read_text().splitlines()]
    found = numbers(tmp_path)
    np.testing.assert_allclose(found["run/intensity"], lines[3]["student_intensity"], rtol=1e-5)
    np.testing.assert_allclose(found["teacher/intensity"], lines[1]["teacher_intensity"], rtol=1e-5)


@pytest.mark.slow
def test_weights_are_read_from_every_kind_of_file(trained, tmp_path, capsys):
    checkpoint = torch.load(trained / "with" / "checkpoint.pth", weights_only=True)
    deit = {**checkpoint, "args": argparse.Namespace(**checkpoint["args"])}
    torch.save(deit, tmp_path / "deit.pth")
    torch.save(checkpoint["model"], tmp_path / "bare.pth")
    save_file(checkpoint["model"], tmp_path / "bare.safetensors")
    name = "vit_tiny_patch16_224"
    cases = {
        "folder": ["--checkpoint", trained / "with"],
        "file": ["--checkpoint", trained / "with" / "checkpoint.pth"],
        "deit": ["--checkpoint", tmp_path / "deit.pth"],
        "bare": ["--checkpoint", tmp_path / "bare.pth", "--model", name, "--model-kwargs", *STUDENT],
        "safetensors": ["--compare", f"{name}={name}:{tmp_path / 'bare.safetensors'}", "--model-kwargs", *STUDENT],
        "ema": ["--checkpoint", trained / "with", "--ema"],
    }
    tables = {}
    for case, flags in cases.items():
        run(*flags, *GRATINGS, "--first", "--input-size", 32)
        tables[case] = capsys.readouterr().out.split(" pixels\n")[1]
    assert tables["folder"] == tables["file"] == tables["deit"] == tables["bare"] == tables["safetensors"]
    assert tables["ema"] != tables["folder"]


@pytest.mark.slow
def test_curves_are_logged_by_the_first_of_two_processes(tmp_path):
    done = run_main(*tiny_run("--spectra-every", 1, "--output_dir", tmp_path), processes=2)
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "log.txt").read_text().splitlines()
    assert len(json.loads(line)["student_intensity"]) == 4


BAD = {
    "nothing": ("", "nothing to analyse"),
    "unknown model": ("--model deit_tini_patch16_224 --random", "timm has no model deit_tini.*deit_tiny_patch16_224"),
    "no such path": ("--compare a=nowhere/x.pth", r"nowhere/x\.pth is no file and no folder, and timm has no model"),
    "entry without a name": ("--compare {bare}", "expected NAME=SOURCE"),
    "entry twice": ("--compare a={bare} a={bare}", "a is given 2 times"),
    "name with a slash": ("--compare a/b={bare}", "expected NAME=SOURCE"),
    "compare and checkpoint": ("--compare a={bare} --checkpoint {bare}", "exclude each other"),
    "random and checkpoint": ("--checkpoint {bare} --random", "exclude each other"),
    "which model": ("--checkpoint {bare}", "does not say which model it is for"),
    "damaged": ("--checkpoint {truncated}", "truncated.pth is damaged"),
    "empty folder": ("--checkpoint {empty}", r"empty/checkpoint\.pth is not a file"),
    "no moving average": (
        "--model {name} --checkpoint {bare} --ema",
        "bare.pth: the checkpoint holds no moving",
    ),
    "other model": ("--compare a=resnet18:{bare}", "a: the weights do not fit resnet18"),
    "pdf of nothing": ("--model {name} --pdf", "--pdf has no effect without --output_dir"),
    "arguments of no student": ("--model {name} --student-kwargs depth=3", "--student-kwargs has no effect without"),
    "average of the hub": ("--model {name} --ema", "--ema has no effect without --checkpoint"),
    "a folder as a model": ("--model {empty}", "--model .* is a path: give it as --checkpoint"),
    "suggest alone": ("--model {name} --suggest 3", "--suggest N and --student MODEL need each other"),
    "student alone": ("--model {name} --student {name}", "--suggest N and --student MODEL need each other"),
    "no data path": ("--model {name} --random --data-set IMNET", "--data-set IMNET needs --data-path"),
    "no val": ("--model {name} --random --data-set IMNET --data-path {empty}", "empty/val does not exist"),
    "no images": ("--model {name} --num-images 0", "--num-images.*got 0"),
    "device": ("--model {name} --device tpu", "--device tpu"),
    "kwargs": ("--model {name} --model-kwargs depth", "expected KEY=VALUE"),
    "output is a file": ("--model {name} --random --output_dir {bare}", "--output_dir .*bare.pth cannot be written"),
    "size": ("--model {name} --random --input-size 40 --model-kwargs img_size=32", "--input-size 40: "),
    "too many pairs": (
        "--model {name} --random --model-kwargs {kwargs} --input-size 32 --suggest 5 --student {name}",
        "the teacher has only 4 blocks",
    ),
    "no feature_info": ("--model pit_ti_224 --random", "pit_ti_224.*no map of tokens"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    torch.save(tiny_deit().state_dict(), folder / "bare.pth")
    (folder / "truncated.pth").write_bytes((folder / "bare.pth").read_bytes()[:3000])
    (folder / "empty").mkdir()
    names = {path.stem: path for path in folder.iterdir()}
    return {"name": "deit_tiny_patch16_224", "kwargs": " ".join(STUDENT), **names}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_said_in_one_line(case, files):
    flags, message = BAD[case]
    data = () if "--data-set" in flags else ("--data-set", "GRATINGS", "--num-images", "2")
    data = data if "--num-images" not in flags else data[:2]
    with pytest.raises(utils.UserError, match=message):
        run(*flags.format(**files).split(), *data)


@pytest.mark.slow
def test_the_program_ends_bad_input_with_exit_code_2_and_without_a_traceback():
    done = subprocess.run(
        [sys.executable, str(ROOT / "analyze.py"), "--model", "deit_tini"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: timm has no model deit_tini")
    assert done.stderr.count("\n") == 1
