"""What happens to a run when something breaks: each fault is provoked for real."""

import json

import pytest
import torch
from conftest import tiny_run
from processes import codes, fork
from torch import nn

import engine
import main
import utils


def status(folder):
    return json.loads((folder / "status.json").read_text())


def errors(runs):
    """All lines that begin with error: of all ranks."""
    return [line for run in runs for line in run.text.splitlines() if line.startswith("error:")]


def checkpoint(folder, name="checkpoint.pth"):
    return torch.load(folder / name, weights_only=True)


# Divergence


def poison(what, *, steps, rank):
    """Statements for `fork`'s `before`: on one rank, replace the student's output in these training steps by `what`.

    Each rank also leaves its weights, as evaluation sees them, in rank<r>.pth of its working folder.
    """
    return f"""
import os, sys, torch
rank = int(os.environ.get("RANK", 0))
seen = 0
def replace(module, args, output):
    global seen
    if type(module).__name__ != "VisionTransformer":
        return
    if not module.training:
        folder = sys.argv[sys.argv.index("--output_dir") + 1]
        torch.save(module.state_dict(), folder + f"/rank{{rank}}")
        return
    seen += 1
    if rank == {rank} and seen - 1 in {list(steps)}:
        return {what}
torch.nn.modules.module.register_module_forward_hook(replace)
"""


NAN = "output * float('nan')"
BAD_GRADIENT = "output.register_hook(lambda gradient: gradient * float('inf')) and None"
FOUR_STEPS = tiny_run("--batch-size", 8, "--unscale-lr", "--lr", "1e-3")  # an epoch on two processes


def test_one_rank_without_a_finite_loss_makes_all_skip_the_same_steps(tmp_path):
    runs = fork(
        *FOUR_STEPS, "--epochs", 3, "--output_dir", tmp_path, ranks=2, before=poison(NAN, steps=(2, 3, 5), rank=1)
    )
    assert codes(runs) == [0, 0]
    ranks = [torch.load(tmp_path / f"rank{r}", weights_only=True) for r in (0, 1)]
    torch.testing.assert_close(ranks[0], ranks[1], rtol=0, atol=0)
    saved = checkpoint(tmp_path)
    assert utils.name_not_finite(saved) is None
    assert {state["step"].item() for state in saved["optimizer"]["state"].values()} == {12 - 3}
    warning = "warning: term loss_base of rank 1 is not finite in epoch 0, step 3; the step was skipped"
    assert warning in runs[0].text
    assert all(line["train_loss"] > 0 for line in map(json.loads, (tmp_path / "log.txt").read_text().splitlines()))


def test_the_third_loss_in_a_row_stops_all_ranks_with_term_epoch_and_step(tmp_path):
    """Counted across epochs: the last step of epoch 0 and the first two of epoch 1."""
    runs = fork(
        *FOUR_STEPS, "--epochs", 3, "--output_dir", tmp_path, ranks=2, before=poison(NAN, steps=(3, 4, 5), rank=1)
    )
    assert codes(runs) == [3, 3]
    assert errors(runs) == ["error: term loss_base of rank 1 was not finite 3 steps in a row, epoch 1, step 1"]
    assert checkpoint(tmp_path)["epoch"] == 0
    assert utils.name_not_finite(checkpoint(tmp_path)) is None
    assert status(tmp_path)["status"] == "diverged"
    assert "term loss_base of rank 1" in status(tmp_path)["reason"]


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("float32", "error: 20 steps in a row were skipped for their gradient, up to epoch 4, step 3"),
        ("float16", "error: the gradient scale fell to 0.5 in epoch 2: no step counts"),  # 2^11 halved 12 times
    ],
)
def test_a_run_whose_gradient_never_counts_is_stopped_though_its_loss_is_finite(dtype, message, tmp_path):
    flags = (*FOUR_STEPS, "--epochs", 9, "--amp-dtype", dtype, "--output_dir", tmp_path)
    low_scale = "import torch; torch.amp.GradScaler.__init__.__defaults__ = ('cuda', 2.0**11, 2.0, 0.5, 2000, True)"
    runs = fork(*flags, ranks=2, before=low_scale + poison(BAD_GRADIENT, steps=range(99), rank=0))
    assert codes(runs) == [3, 3]
    assert errors(runs) == [message]
    assert status(tmp_path)["status"] == "diverged"


def test_bad_weights_are_never_saved(tmp_path):
    """The weights break after the last step of epoch 1, so that no loss of it tells."""
    break_weights = """
import torch
evaluations = set()
def overwrite(module, args):
    if type(module).__name__ == "VisionTransformer" and module.training:
        evaluations.add(0)
    elif type(module).__name__ == "VisionTransformer" and evaluations == {0}:
        evaluations.add(1)  # of epoch 0
    elif type(module).__name__ == "VisionTransformer" and evaluations == {0, 1}:
        with torch.no_grad():
            module.head.bias[0] = float("inf")
torch.nn.modules.module.register_module_forward_pre_hook(overwrite)
"""
    runs = fork(
        *FOUR_STEPS, "--gratings-sizes", 64, 16, "--epochs", 2, "--output_dir", tmp_path, ranks=2, before=break_weights
    )
    assert codes(runs) == [3, 3]
    assert errors(runs) == ["error: checkpoint model head.bias is not finite: not saved, the checkpoint before is kept"]
    assert checkpoint(tmp_path)["epoch"] == 0
    assert utils.name_not_finite(checkpoint(tmp_path)) is None


class Sum(nn.Module):
    """Float images as they are."""

    def forward(self, images):
        return images


class NoHooks:
    def pop(self):
        return []


def train(batches, criterion=None):
    """Trains a small network with BatchNorm on batches of (float images, labels); returns it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    engine.train_one_epoch(
        model,
        NoHooks(),
        criterion or (lambda images, outputs, maps, labels: {"loss": nn.functional.cross_entropy(outputs, labels)}),
        batches,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.1),
        scaler=main.ConstantScaler("cpu"),
        meter=utils.Meter(["loss"]),
        epoch=0,
        device=torch.device("cpu"),
        prepare=Sum(),
        seed_step=lambda epoch, step: None,
        should_stop=lambda: False,
    )
    return model


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 6, generator=generator), torch.arange(8) % 3


def test_a_skipped_step_leaves_no_trace_in_weights_and_batchnorm():
    bad = (torch.full((8, 6), torch.inf), torch.arange(8) % 3)
    found, expected = train([batch(1), bad, batch(2)]).state_dict(), train([batch(1), batch(2)]).state_dict()
    del found["1.num_batches_tracked"], expected["1.num_batches_tracked"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_an_infinite_loss_is_skipped_though_its_gradient_is_finite():
    def criterion(images, outputs, maps, labels):
        return {"loss": nn.functional.cross_entropy(outputs, labels) + torch.inf}

    initial = train([])
    torch.testing.assert_close(
        train([batch(1)], criterion).state_dict(),
        initial.state_dict() | {"1.num_batches_tracked": torch.tensor(1)},
        rtol=0,
        atol=0,
    )


def test_watching_for_divergence_does_not_wait_for_the_device():
    """Tensors of the meta device have no numbers: whatever asked for one would fail, as the check does."""
    watch, guard = engine.DivergenceWatch(), engine.BufferGuard(nn.BatchNorm1d(3, device="meta"))
    watch.begin(["loss"], 0)
    loss = torch.ones((), device="meta")
    for step in range(5):
        guard.keep()
        engine.spoil_unless_finite(loss)
        guard.put_back_unless(loss.isfinite())
        watch.note([loss[None]], loss, step)
    with pytest.raises((RuntimeError, NotImplementedError)):
        watch.check(None)
