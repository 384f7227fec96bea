"""The demo base's training goes on after kill -9, wherever it struck, and ends as if nothing had happened."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

from demo import train_base
from demo.train_base import Captured, Stage, parse_args, random_masks


STEPS, EVERY = 12, 4


def run_stage(folder: Path, kill_at_step: int | None = None, kill_in_save: int | None = None) -> None:
    """Fit noise that the generators draw; SIGKILL at a step, or when the checkpoint of a step is about to get its name."""
    train_base.fast_device = lambda: torch.device("cpu")  # in a process of its own
    args = parse_args(["--dataset_root", "unused", "--output_dir", str(folder), "--checkpointing_steps", str(EVERY)])
    torch.manual_seed(3)
    module = torch.nn.Linear(4, 4)
    steps = 0

    def loss(drawn: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == kill_at_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return (module(drawn) - drawn).square().mean()

    class KilledInSave(Stage):
        def save(self, accelerator, step: int) -> None:
            if step == kill_in_save:
                accelerator.save_state(str(self.folder / "unfinished"))
                os.kill(os.getpid(), signal.SIGKILL)
            super().save(accelerator, step)

    stage = KilledInSave("toy", module, list(module.parameters()), STEPS, 1e-2, 1e-3, average=True, args=args)
    stage.train(lambda: (torch.randn(8, 4),), loss, lambda step: {"drawn": torch.rand(()).item()})
    torch.save(module.state_dict(), folder / "result.pt")


def in_child(*args) -> int:
    child = multiprocessing.get_context("fork").Process(target=run_stage, args=args)
    child.start()
    child.join(60)
    return child.exitcode


def test_a_killed_stage_ends_as_an_uninterrupted_one(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert in_child(whole) == 0
    assert in_child(killed, 3) == -signal.SIGKILL  # before any checkpoint
    assert in_child(killed, 6) == -signal.SIGKILL  # after the first
    assert in_child(killed, None, 8) == -signal.SIGKILL  # while the second is written
    assert in_child(killed) == 0
    expected, got = (torch.load(folder / "result.pt") for folder in (whole, killed))
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(expected[name], got[name])
    assert [folder.name for folder in (killed / "checkpoints" / "toy").iterdir()] == [f"{STEPS:06d}"]


def test_numbers_are_checked():
    with pytest.raises(SystemExit):
        parse_args(["--dataset_root", "d", "--output_dir", "o", "--unet_steps", "0"])


def test_random_masks_hide_a_part():
    masks = random_masks(20, 64, 48)
    shares = (masks == 255).float().mean(dim=(1, 2, 3))
    assert set(masks.unique().tolist()) == {0, 255}
    assert shares.min() > 0.05 and shares.max() < 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_captured_descent_leaves_what_the_descent_itself_leaves():
    module = torch.nn.Linear(4, 4, device="cuda")

    def descend(drawn: torch.Tensor) -> torch.Tensor:
        module.zero_grad(set_to_none=False)
        value = (module(drawn) - drawn).square().mean()
        value.backward()
        return value.detach()

    captured = Captured(descend, [])
    for rows in (8, 2, 8):  # of either shape, and after the weights have changed
        drawn = torch.randn(rows, 4, device="cuda")
        got = captured(drawn), module.weight.grad.clone()
        expected = descend(drawn), module.weight.grad.clone()
        torch.testing.assert_close(got, expected)
        with torch.no_grad():
            module.weight.add_(1)
