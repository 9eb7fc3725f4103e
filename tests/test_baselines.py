"""Feature losses of other papers: the released programs' values and gradients, and what keeps a resume exact."""

import numpy as np
import pytest
import torch
from conftest import ROOT

from baselines import MANIFOLD_WEIGHTS, Projector, build_feature_loss, manifold_loss, mse_plain
from spectral import spectral_loss

GOLDEN = ROOT / "tests" / "golden"
DTYPES = [(torch.float64, "", 1e-9), (torch.float32, "_f32", 1e-5)]


def close(value, expected, tolerance):
    """Compare within `tolerance` of the largest expected number."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(value.detach().numpy(), expected, rtol=0, atol=tolerance * np.abs(expected).max())


def pair(golden, case, j, dtype):
    """The student map, which takes a gradient, and the teacher map of pair j."""
    student, teacher = (torch.tensor(golden[f"{case}{side}{j}"], dtype=dtype) for side in "st")
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("case", ["equal", "divisible", "uneven", "wider_student"])
@pytest.mark.parametrize(
    ("name", "function", "dtype", "suffix", "rtol"),
    [*(("mse", mse_plain, *dtype) for dtype in DTYPES), ("fft", spectral_loss, *DTYPES[1])],
)
def test_pair_losses_are_the_later_papers(case, name, function, dtype, suffix, rtol):
    golden = np.load(GOLDEN / "feature_losses.npz")
    for j in range(2):
        student, teacher = pair(golden, f"{case}_", j, dtype)
        loss = function(student, teacher)
        (loss / 2).backward()  # the released gradients are those of the mean over two pairs
        close(loss, golden[f"{case}_{name}_per_pair{suffix}"][j], rtol)
        close(student.grad, golden[f"{case}_{name}_grad_s{j}"], rtol)


@pytest.mark.parametrize("case", ["A", "B"])
@pytest.mark.parametrize("tokens", [8, 192])
@pytest.mark.parametrize(("dtype", "suffix", "rtol"), DTYPES)
def test_manifold_loss_is_the_released_one(case, tokens, dtype, suffix, rtol):
    golden = np.load(GOLDEN / "manifold.npz")
    prefix = f"{case}_K{tokens}_"
    for j in range(2):
        student, teacher = pair(golden, f"{case}_", j, dtype)
        loss = manifold_loss(student, teacher, tokens, torch.tensor(golden[f"{prefix}index{j}"]))
        (loss / 2).backward()
        terms = [golden[f"{prefix}{term}_per_pair{suffix}"][j] for term in ("patch", "sample", "rand")]
        close(loss, np.dot(MANIFOLD_WEIGHTS, terms), rtol)
        close(student.grad, golden[f"{prefix}grad_s{j}"], rtol)


def test_manifold_draws_anew_for_each_pair_from_the_seeded_generator():
    maps = torch.randn(2, 4, 8, 4, 4)
    torch.manual_seed(0)
    first, second = (manifold_loss(*maps, tokens=8) for _ in range(2))
    torch.manual_seed(0)
    assert manifold_loss(*maps, tokens=8) == first != second


@pytest.mark.parametrize("state", ["init", "trained"])
@pytest.mark.parametrize(("dtype", "suffix", "rtol"), [(torch.float64, "", 1e-9), (torch.float32, "32", 1e-5)])
def test_projector_is_the_released_one(state, dtype, suffix, rtol):
    golden, losses = np.load(GOLDEN / "projector.npz"), []
    for j in range(2):
        student, teacher = pair(golden, "", j, dtype)
        module = Projector(12, 20, trained=True)
        names = {"projector": f"projectors.{j}", "bn_student": f"bn_student.{j}", "bn_teacher": f"bn_teacher.{j}"}
        released = {f"{ours}.{kind}": f"{name}.{kind}" for ours, name in names.items() for kind in ("weight", "bias")}
        module.load_state_dict({k: torch.tensor(golden[f"{state}_param/{name}"]) for k, name in released.items()})
        losses.append(module.to(dtype)(student, teacher))
        (losses[-1] / 2).backward()
        if not suffix:
            assert losses[-1].item() == pytest.approx(golden[f"{state}_per_pair"][j], rel=rtol)
            close(student.grad, golden[f"{state}_grad_s{j}"], rtol)
            for key, parameter in module.named_parameters():  # the bias cancels in the normalization
                expected = golden[f"{state}_grad/{released[key]}"]
                np.testing.assert_allclose(parameter.grad, expected, rtol=0, atol=1e-9)
    assert torch.stack(losses).mean().item() == pytest.approx(golden[f"{state}{suffix}_loss_feature"], rel=rtol)


@pytest.mark.parametrize(("name", "trained"), [("projector", False), ("projector_trained", True)])
def test_only_the_trained_projector_has_gradients(name, trained):
    losses = build_feature_loss(name, [12, 12], [20, 24])
    assert len(list(losses.parameters())) == 12
    assert all(parameter.requires_grad == trained for parameter in losses.parameters())
    assert losses[1](torch.randn(4, 12, 2, 2), torch.randn(4, 24, 2, 2)) > 0


def test_projectors_depend_on_the_seed_alone_and_leave_the_generator():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, other = (build_feature_loss("projector", [12], [20], seed).state_dict() for seed in (1, 2))
    assert torch.rand(1) == expected
    for key, value in build_feature_loss("projector", [12], [20], 1).state_dict().items():
        torch.testing.assert_close(value, first[key], rtol=0, atol=0)
    assert not torch.equal(first["0.projector.weight"], other["0.projector.weight"])


def one_loss(name):
    """The loss of a pair of maps of 12 channels."""
    loss = build_feature_loss(name, [12], [12])
    return loss[0] if isinstance(loss, torch.nn.ModuleList) else loss


@pytest.mark.parametrize("name", ["manifold", "projector"])
def test_unequal_grids_are_refused_in_one_line(name):
    with pytest.raises(ValueError, match=r"^this feature loss needs .*\(2, 2\) and \(4, 4\): .*$"):
        one_loss(name)(torch.zeros(4, 12, 2, 2), torch.zeros(4, 12, 4, 4))


@pytest.mark.parametrize("name", ["spectral", "mse", "mse_plain", "manifold", "projector"])
def test_feature_losses_compute_in_float32_inside_autocast(name):
    loss, maps = one_loss(name), torch.randn(2, 4, 12, 4, 4).bfloat16()
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(*maps)
    torch.set_rng_state(state)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, loss(*maps.float()), rtol=1e-6, atol=1e-7)
