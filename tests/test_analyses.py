"""Pairs of blocks; entropy over depth and ranks of the last block: the released programs' numbers, and controls."""

import itertools

import numpy as np
import pytest
import torch
from conftest import ROOT

import analyses

GOLDEN = ROOT / "tests" / "golden"
SHARES = (80, 90, 95, 99)


def batches_of(tokens, size):
    """What rank_analysis reads: maps of one row, `size` images per batch."""
    return lambda: (batch.mT.unsqueeze(2) for batch in torch.as_tensor(tokens).split(size))


def entropy_of(maps, size=1, **options):
    """Return the entropy of maps (blocks, B, C, H, W), read `size` images at a time."""
    return analyses.entropy_over_depth(lambda: (list(batch) for batch in maps.split(size, dim=1)), **options)


def test_entropy_and_magnitude_are_the_released_ones():
    golden = np.load(GOLDEN / "entropy_spectrum.npz")
    found = entropy_of(torch.tensor(golden["activations"]))
    for name in ("entropy", "entropy_own_range", "magnitude"):
        np.testing.assert_allclose(found[name], golden[name], rtol=1e-9)
    found = entropy_of(torch.tensor(golden["activations"]), bins=50)
    np.testing.assert_allclose(found["entropy"], golden["entropy_50_bins"], rtol=1e-9)


def test_constant_features_have_no_entropy():
    found = entropy_of(torch.full((1, 2, 24, 4, 4), 3.0))
    assert found["entropy"].item() == found["entropy_own_range"].item() == 0


@pytest.mark.parametrize("size", [1, 5, 12])
def test_ranks_are_the_released_ones(size):
    golden = np.load(GOLDEN / "ranks.npz")
    found = analyses.rank_analysis(batches_of(golden["features"], size))
    assert (found["images"], found["cap"], found["width"]) == (12, 16, 24)
    for i, share in enumerate(SHARES):
        assert found["svd"][i] == pytest.approx(golden[f"svd_p99_dims_{share}"], abs=1e-12)
        assert found["pca"][i] == pytest.approx(golden[f"pca_p99_dims_{share}"], abs=1e-12)
        assert found["pca_centered"][i] == pytest.approx(golden[f"pca_centered_p99_dims_{share}"], abs=1e-12)
        assert round(found["pca"][i]) == golden[f"pca_p99_rounded_dims_{share}"]
        assert found["pca_global"][i] == golden[f"pca_global_dims_{share}"]
        assert found["pca_global_centered"][i] == golden[f"pca_centered_global_dims_{share}"]


@pytest.mark.parametrize("shape", [(2, 5, 9), (2, 9, 5)])
def test_squared_singular_values_are_those_of_the_svd(shape):
    tokens = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(analyses.squared_singular_values(tokens), torch.linalg.svdvals(tokens).square())


def test_a_share_met_exactly_counts():
    energies = torch.tensor([[4.0, 4.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    assert analyses.dimensions(energies, (0.4, 0.8, 0.81, 1.0)).tolist() == [[1, 2, 3, 4], [1, 1, 1, 1]]


def test_random_rotations_take_away_a_shared_basis():
    """Images that share three directions fill three dimensions; rotated one by one, they fill most dimensions."""
    shared = torch.linalg.qr(torch.randn(24, 3, dtype=torch.float64))[0].mT
    tokens = torch.randn(40, 16, 3, dtype=torch.float64) @ shared
    found = analyses.rank_analysis(batches_of(tokens, 8))
    assert max(found["svd"]) <= 3
    assert max(found["pca"]) <= 3
    assert found["pca_rotated"][3] > 15


def test_rotation_is_one_of_the_tokens_themselves():
    tokens = torch.randn(3, 16, 24, dtype=torch.float64)
    ((x, energies, rotated),) = analyses._read(batches_of(tokens, 3), seed=0)
    torch.testing.assert_close(x, tokens)
    torch.testing.assert_close(energies, analyses.squared_singular_values(tokens))
    torch.testing.assert_close(analyses.squared_singular_values(rotated), energies)


def test_images_are_the_first_of_each_class_then_the_second():
    assert analyses.one_of_each_class([0, 0, 2, 1, 2, 1]) == [0, 3, 2]
    assert analyses.one_of_each_class([0, 0, 2, 1, 2, 1], 5) == [0, 3, 2, 1, 5]


# Pairs of blocks

U_SHAPE = [3.0, 2.5] + [1.0] * 16 + [2.0, 2.2, 2.5, 3.0, 4.0, 6.0]
STAGES = [4, 8, 16, 32]


@pytest.mark.parametrize(
    ("intensity", "student", "teacher", "number", "s_id", "t_id"),
    [
        (U_SHAPE, [16] * 12, [16] * 24, 8, [0, 1, 6, 7, 8, 9, 10, 11], [0, 1, 18, 19, 20, 21, 22, 23]),
        (U_SHAPE[::-1], [16] * 12, [16] * 24, 8, [0, 1, 2, 3, 4, 5, 10, 11], [0, 1, 2, 3, 4, 5, 22, 23]),
        (U_SHAPE, [16] * 12, [16] * 24, 1, [11], [23]),
        (U_SHAPE, [16] * 12, [16] * 24, 3, [0, 10, 11], [0, 22, 23]),
        (list(range(6)), [16] * 4, [16] * 6, 3, [1, 2, 3], [3, 4, 5]),  # rising: the last ones
        ([1.0] * 6, [16] * 4, [16] * 6, 4, [0, 1, 2, 3], [0, 1, 4, 5]),  # flat: as even as can be
        (U_SHAPE[:1] + U_SHAPE[-5:], [16] * 12, [16] * 6, 4, [0, 7, 9, 11], [0, 3, 4, 5]),  # a deeper student
        ([9.0, 2.0, 1.0, 3.0, 4.0], STAGES, [2, *STAGES], 4, [0, 1, 2, 3], [1, 2, 3, 4]),  # the stem has no partner
        ([9.0, 1.0, 1.0, 1.0, 5.0], STAGES, [2, *STAGES], 1, [3], [4]),  # and does not count
        ([2.0, 1.0, 3.0, 4.0], [2, *STAGES], STAGES, 3, [1, 3, 4], [0, 2, 3]),
        ([1.0, 2.0, 5.0, 4.0], STAGES, [4, 8, 16, 16], 3, [0, 1, 2], [0, 1, 3]),  # a stage ends with its last block
        (U_SHAPE, STAGES, [16] * 24, 4, [0, 1, 2, 3], [0, 21, 22, 23]),  # stages on one side only
    ],
)
def test_pairs_are_the_ends_with_most_intensity(intensity, student, teacher, number, s_id, t_id):
    assert analyses.suggest_pairs(intensity, student, teacher, number) == (s_id, t_id)


def test_pairs_are_ascending_and_the_best_for_all_depths():
    generator = torch.Generator().manual_seed(0)
    for depth, student in itertools.product(range(1, 14), range(1, 16)):
        intensity = torch.rand(depth, generator=generator).tolist()
        for number in range(1, min(depth, student) + 1):
            s_id, t_id = analyses.suggest_pairs(intensity, [16] * student, [16] * depth, number)
            for ids, blocks in ((s_id, student), (t_id, depth)):
                assert len(ids) == number
                assert ids == sorted(set(ids) & set(range(blocks)))
            best = max(sum(intensity[:k] + intensity[::-1][: number - k]) for k in range(number + 1))
            assert sum(intensity[i] for i in t_id) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ([16] * 4, [16] * 12, "5 pairs: the student has only 4 blocks"),
        ([2, 4, 8, 16, 32], STAGES, "5 pairs: the student has only 4 stages of equal resolution"),
    ],
)
def test_more_pairs_than_blocks_are_refused(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        analyses.suggest_pairs([1.0] * len(teacher), student, teacher, 5)
