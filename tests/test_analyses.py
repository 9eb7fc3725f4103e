"""Entropy over depth and ranks of the last block: the released programs' numbers, and the controls."""

import numpy as np
import pytest
import torch
from conftest import ROOT

import analyses

GOLDEN = ROOT / "tests" / "golden"
SHARES = (80, 90, 95, 99)


@pytest.fixture
def golden():
    return np.load(GOLDEN / "ranks.npz")


def batches_of(tokens, size):
    """What rank_analysis reads: maps of one row, `size` images per batch."""
    return lambda: (batch.mT.unsqueeze(2) for batch in torch.as_tensor(tokens).split(size))


def test_entropy_and_magnitude_are_the_released_ones():
    golden = np.load(GOLDEN / "entropy_spectrum.npz")
    found = analyses.entropy_over_depth(list(torch.tensor(golden["activations"])))
    for name in ("entropy", "entropy_own_range", "magnitude"):
        np.testing.assert_allclose(found[name], golden[name], rtol=1e-9)
    found = analyses.entropy_over_depth(list(torch.tensor(golden["activations"])), bins=50)
    np.testing.assert_allclose(found["entropy"], golden["entropy_50_bins"], rtol=1e-9)


def test_constant_features_have_no_entropy():
    found = analyses.entropy_over_depth([torch.full((2, 24, 4, 4), 3.0)])
    assert found["entropy"].item() == found["entropy_own_range"].item() == 0


@pytest.mark.parametrize("size", [1, 5, 12])
def test_ranks_are_the_released_ones(golden, size):
    found = analyses.rank_analysis(batches_of(golden["features"], size))
    assert (found["images"], found["cap"], found["width"]) == (12, 16, 24)
    for i, share in enumerate(SHARES):
        assert found["svd"][i] == pytest.approx(golden[f"svd_p99_dims_{share}"], abs=1e-12)
        assert found["pca"][i] == pytest.approx(golden[f"pca_p99_dims_{share}"], abs=1e-12)
        assert found["pca_centered"][i] == pytest.approx(golden[f"pca_centered_p99_dims_{share}"], abs=1e-12)
        assert round(found["pca"][i]) == golden[f"pca_p99_rounded_dims_{share}"]
        assert found["pca_global"][i] == golden[f"pca_global_dims_{share}"]
        assert found["pca_global_centered"][i] == golden[f"pca_centered_global_dims_{share}"]


def test_dimensions_per_image_are_the_released_ones(golden):
    tokens = torch.tensor(golden["features"], dtype=torch.float64)
    basis = torch.linalg.eigh(torch.einsum("bnc,bnd->cd", tokens, tokens))[1].flip(1)
    svd = analyses.dimensions(analyses.squared_singular_values(tokens))
    pca = analyses.dimensions((tokens @ basis).square().sum(1))
    for i, share in enumerate(SHARES):
        assert svd[:, i].tolist() == golden[f"svd_dims_{share}"].tolist()
        assert pca[:, i].tolist() == golden[f"pca_dims_{share}"].tolist()


@pytest.mark.parametrize("shape", [(2, 5, 9), (2, 9, 5)])
def test_squared_singular_values_are_those_of_the_svd(shape):
    tokens = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(analyses.squared_singular_values(tokens), torch.linalg.svdvals(tokens).square())


def test_a_share_met_exactly_counts():
    energies = torch.tensor([[4.0, 4.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    assert analyses.dimensions(energies, (0.4, 0.8, 0.81, 1.0)).tolist() == [[1, 2, 3, 4], [1, 1, 1, 1]]


@pytest.mark.parametrize("size", [1, 2, 12, 101])
def test_percentile_of_counts_is_numpys(size):
    values = np.random.RandomState(size).randint(1, 30, size)
    counts = torch.bincount(torch.tensor(values), minlength=31)
    assert analyses.count_percentile(counts) == pytest.approx(np.percentile(values, 99), abs=1e-9)


def test_random_rotations_take_away_a_shared_basis():
    """Images that share three directions fill three dimensions; turned one by one they fill most of them."""
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


def test_images_are_the_first_of_each_class():
    assert analyses.first_of_each_class([0, 0, 2, 1, 2, 1]) == [0, 3, 2]


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="no images"):
        analyses.rank_analysis(lambda: iter(()))
