"""Losses beside the noise's error: what a decoder sees of predicted latents, and what a discriminator holds against them."""

import importlib.util
import socket
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_train import by_hand, curve, equal, finish, flags, launch, seen_by, step_of, trainer_of
from tiny import seeded, tiny_pipe

import train_vton
from demo.make_dataset import make_dataset
from pipeline_vton import ADAPTER_NAME, ClothBesideAttnProcessor, vton_attention
from train_vton import OUTLIER, TRAINED_NAME, LatentDiscriminator, PerceptualLoss, main, parse_args, predicted_latents


pytestmark = pytest.mark.usefixtures("fresh_accelerate")
ALWAYS = {"perceptual_max_timestep": 999}


def latents(seed: int, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 4, 8, 6, generator=seeded(seed))


def half(rows: int = 2) -> torch.Tensor:
    """A mask over the right half."""
    mask = torch.zeros(rows, 1, 8, 6)
    mask[..., 3:] = 1
    return mask


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_clean_latents_follow_from_what_is_predicted(kind):
    scheduler = tiny_pipe(9).scheduler
    scheduler.register_to_config(prediction_type=kind)
    clean, noise, timesteps = latents(1), latents(2), torch.tensor([20, 700])
    noisy = scheduler.add_noise(clean, noise, timesteps)
    predicted = noise if kind == "epsilon" else scheduler.get_velocity(clean, noise, timesteps)
    assert torch.allclose(predicted_latents(scheduler, noisy, predicted, timesteps), clean, atol=1e-4)


# ---- perceptual


def decoder_error(vae, found: torch.Tensor, clean: torch.Tensor, hole: torch.Tensor) -> torch.Tensor:
    """LPL by hand, one row: features by hooks on the decoder, normalised channel by channel, masked, averaged."""
    blocks, seen = [vae.decoder.mid_block, *vae.decoder.up_blocks], []
    hooks = [block.register_forward_hook(lambda module, inputs, output: seen.append(output)) for block in blocks]
    for one in (found, clean):
        vae.decode(one / vae.config.scaling_factor)
    for hook in hooks:
        hook.remove()
    total = 0.0
    for level, (one, other) in enumerate(zip(seen[: len(blocks)], seen[len(blocks) :])):
        factor, squares, count = other.shape[-1] // hole.shape[-1], 0.0, 0
        large = hole[0, 0].repeat_interleave(factor, 0).repeat_interleave(factor, 1).bool()
        for ours, true in zip(one[0], other[0]):
            z, ours = (true - true.mean()) / true.std(), (ours - true.mean()) / true.std()
            counted = large & (z.abs() < OUTLIER)
            squares, count = squares + (z - ours)[counted].square().sum(), count + counted.sum()
        total = total + squares / count / 2**level
    return total


@torch.no_grad()
def test_the_latent_loss_is_its_formula_and_rows_without_a_picture_count_nothing():
    vae, found, clean = tiny_pipe(9).vae, latents(1), latents(2)
    loss = PerceptualLoss("latent", vae, 500, checkpointing=False)
    alone = [decoder_error(vae, found[i : i + 1], clean[i : i + 1], half(1)) for i in range(2)]
    assert loss(found, clean, half(), torch.tensor([500, 0])).item() == pytest.approx(sum(alone).item() / 2, rel=1e-4)
    assert loss(found, clean, half(), torch.tensor([501, 3])).item() == pytest.approx(alone[1].item() / 2, rel=1e-4)
    assert loss(found, clean, half(), torch.tensor([501, 999])) == 0
    assert loss(clean, clean, half(), torch.tensor([5, 5])) == 0
    assert loss(found, clean, 0 * half(), torch.tensor([5, 5])) == 0


def listen(trainer) -> list:
    """What the perceptual loss is given, and what it says."""
    told, perceptual = [], trainer.perceptual

    def aloud(*given):
        told.append((given, perceptual(*given)))
        return told[-1][1]

    trainer.perceptual = aloud
    return told


@pytest.mark.parametrize("mode", ["reference", "joint"])
def test_what_the_decoder_sees_is_added_and_reaches_the_adapter_alone(bases, data, tmp_path, mode):
    gradients, options = [], {"cloth_conditioning": mode, "perceptual_loss": "latent", "perceptual_weight": 0.5}
    processor = ClothBesideAttnProcessor if mode == "reference" else None
    for checkpointing in (None, True):
        trainer = trainer_of(bases[9], data, tmp_path, gradient_checkpointing=checkpointing, **ALWAYS, **options)
        batch, told = next(trainer.batches()), listen(trainer)
        with vton_attention(trainer.unet, processor, "skip"):
            loss = trainer.train_step(batch)
            trainer.accelerator.backward(loss)
            gradients.append([parameter.grad.clone() for parameter in trainer.trained])
            trainer.optimizer.zero_grad()
            trainer.perceptual = None
            plain = trainer.train_step(batch)
            trainer.accelerator.backward(plain)
        (((found, clean, hole, timesteps), part),) = told
        assert loss.item() == pytest.approx(plain.item() + 0.5 * part.item(), rel=1e-5) and part > 0
        truth, _, expected, _ = by_hand(trainer, batch)
        assert torch.allclose(clean, truth, atol=1e-5) and torch.equal(timesteps, expected) and found.requires_grad
        assert torch.equal(hole, trainer.latents(batch)[0].mask)
        assert all(parameter.grad is None for parameter in trainer.vae.parameters())
        assert not all(torch.allclose(p.grad, before) for p, before in zip(trainer.trained, gradients[-1]))
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*gradients))


def test_lpips_says_what_it_lacks(bases, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as if it were not installed
    with pytest.raises(ImportError, match="--perceptual_loss lpips needs the torchvision library: pip install"):
        trainer_of(bases[9], data, tmp_path, perceptual_loss="lpips")


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision: make test-eval")
def test_lpips_sees_the_hole_alone(tmp_path, monkeypatch):
    import torchvision

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    name = torchvision.models.get_model_weights("vgg16").DEFAULT.url.rpartition("/")[2]
    (tmp_path / "checkpoints").mkdir()
    torch.save(torchvision.models.vgg16(weights=None).state_dict(), tmp_path / "checkpoints" / name)
    pipe = tiny_pipe(9)
    loss, timesteps = PerceptualLoss("lpips", pipe.vae, 500, checkpointing=True), torch.tensor([100, 600])
    found, clean = torch.randn(2, 4, 16, 12, generator=seeded(1)).requires_grad_(), torch.zeros(2, 4, 16, 12)
    hole = F.interpolate(half(), size=(16, 12))
    value = loss(found, clean, hole, timesteps)
    value.backward()
    assert value > 0 and found.grad[0].any() and not found.grad[1].any()
    assert loss(found, clean, 0 * hole, timesteps) == 0


# ---- adversarial

CONTESTED = {"adversarial_weight": 0.5, "adversarial_start_step": 0}


@torch.no_grad()
def test_the_unet_is_told_by_how_much_it_is_found_out(bases, data, tmp_path):
    """Of the hole alone, at timesteps of the discriminator's own, and of a row that saw no cloth without one."""
    trainer = trainer_of(bases[9], data, tmp_path, cloth_dropout=1, **CONTESTED)
    batch, told = next(trainer.batches()), []
    trainer.adversary.model.register_forward_hook(lambda model, inputs, output: told.append((*inputs, output)))
    with vton_attention(trainer.unet, ClothBesideAttnProcessor, "skip"):
        loss = trainer.train_step(batch)
        trainer.adversary = None
        plain = trainer.train_step(batch)
    noisy, own, cloth, logits = told[0]
    assert loss.item() == pytest.approx(plain.item() + 0.5 * F.softplus(-logits).mean().item(), rel=1e-5)
    clean, _, timesteps, _ = by_hand(trainer, batch)
    assert (own != timesteps).all() and not cloth.any()
    true, again, *_ = told[1]
    assert torch.equal(own, again)
    outside = (trainer.latents(batch)[0].mask == 0).expand_as(true)
    assert torch.allclose(noisy[outside], true[outside], atol=1e-5) and not torch.allclose(noisy, true, atol=1e-3)


def test_a_start_that_is_never_reached_is_refused(bases, data, tmp_path):
    with pytest.raises(ValueError, match="--adversarial_start_step 1000 is not reached in the 2 updates of the run"):
        trainer_of(bases[9], data, tmp_path, adversarial_weight=0.1)


@torch.no_grad()
def test_the_discriminator_is_not_told_of_a_cloth_that_nobody_wears(bases, tmp_path):
    make_dataset(tmp_path / "data", train=2, test=0, seed=0, height=64, category="outfit")
    (tmp_path / "data/train/cloth_2/00001_00.png").unlink()
    options = {"num_cloths": 2, "cloth_dropout": 0, **CONTESTED}
    trainer = trainer_of(bases[9], tmp_path / "data", tmp_path / "out", **options)
    told = []
    trainer.adversary.model.register_forward_hook(lambda model, inputs, output: told.append(inputs[2]))
    with vton_attention(trainer.unet, trainer.self_attention, "skip"):
        batch = next(trainer.batches())
        trainer.train_step(batch)
    assert [bool(cloth.any()) for cloth in told[0]] == batch["worn"].flatten().bool().tolist()
    assert batch["worn"].sum() == 3


def test_the_discriminator_learns_by_softplus_and_r1(bases, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train_vton, "R1_WEIGHT", 300.0)  # so that neither part is small beside the other
    adversary = trainer_of(bases[9], data, tmp_path, **CONTESTED).adversary
    found, true, cloth, timesteps = latents(1), latents(2), latents(3), torch.tensor([10, 500])
    adversary.learn(found, true, cloth, timesteps)
    learnt = [parameter.grad.clone() for parameter in adversary.model.parameters()]
    adversary.optimizer.zero_grad()

    def judge(one):
        return adversary.model(one, timesteps, cloth)

    loss = F.softplus(-judge(true)).mean() + F.softplus(judge(found)).mean()
    loss.backward()
    by_softplus = [parameter.grad.clone() for parameter in adversary.model.parameters()]
    true.requires_grad_()
    (slope,) = torch.autograd.grad(judge(true).sum(), true)
    step = 0.01 * slope / slope.norm()  # R1's gradient is that of the rise along the slope, here by differences
    rise = (judge(true.detach() + step).sum() - judge(true.detach() - step).sum()) / 0.02 * slope.norm()
    (300 / len(true) * rise).backward()
    expected = [parameter.grad for parameter in adversary.model.parameters()]

    def apart(one, other):
        return max((a - b).abs().max() for a, b in zip(one, other)) / max(b.abs().max() for b in other)

    assert apart(learnt, expected) < 0.01 < 0.1 < apart(learnt, by_softplus)
    assert adversary.loss.item() == pytest.approx(loss.item(), rel=1e-5)


@torch.no_grad()
def test_several_cloths_of_a_row_are_told_together():
    model, noisy, timesteps = LatentDiscriminator(16), latents(1), torch.tensor([10, 500])
    cloths = latents(3, rows=4)
    both = model(noisy, timesteps, cloths)
    swapped, mixed = model(noisy, timesteps, cloths[[1, 0, 3, 2]]), model(noisy, timesteps, cloths[[0, 2, 1, 3]])
    assert both.shape == (2, 1, 2, 2)
    assert torch.allclose(both, swapped, atol=1e-5) and not torch.allclose(both, mixed, atol=1e-4)


def test_a_discriminator_tells_true_from_shifted_latents_and_its_collapse_is_logged(
    bases, data, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(train_vton, "COLLAPSED", 0.5)
    monkeypatch.setattr(train_vton, "COLLAPSE_AFTER", 3)
    trainer = trainer_of(bases[9], data, tmp_path, **CONTESTED)
    adversary, losses = trainer.adversary, []
    adversary.optimizer.param_groups[0]["lr"] = 1e-3
    for step in range(40):
        adversary.learn(latents(step) + 2, latents(step + 100), latents(0), torch.tensor([100, 500]))
        adversary.update()
        losses.append(adversary.loss.item())
        if adversary.quiet >= 4:
            break
    assert 1 < losses[0] < 2 and losses[-1] < 0.5
    assert caplog.text.count("without an error for 3 updates and has nothing to teach") == 1


BOTH = {  # 7 updates in epochs of 3, of 5 batches; the discriminator begins in between
    "max_train_steps": 7,
    "gradient_accumulation_steps": 2,
    "checkpointing_steps": 4,
    "cloth_dropout": 0.4,
    "perceptual_loss": "latent",
    "adversarial_weight": 0.1,
    "adversarial_start_step": 2,
    "report_to": "tensorboard",
}


def test_a_resumed_run_equals_an_uninterrupted_one_and_the_adapter_holds_no_discriminator(bases, data, tmp_path):
    main(parse_args(flags(bases[9], data, tmp_path / "whole", **BOTH)))
    begun = tmp_path / "whole" / "checkpoint-4"
    main(parse_args(flags(bases[9], data, tmp_path / "again", resume_from_checkpoint=begun, **BOTH)))
    for file in (ADAPTER_NAME, f"checkpoint-7/{TRAINED_NAME}"):
        assert equal(load_file(tmp_path / "whole" / file), load_file(tmp_path / "again" / file))
    states = [torch.load(tmp_path / n / "checkpoint-7" / "custom_checkpoint_2.pkl") for n in ("whole", "again")]
    assert equal(states[0]["model"], states[1]["model"]) and states[0]["optimizer"]["state"]
    before = torch.load(begun / "custom_checkpoint_2.pkl")["model"]
    assert not equal(before, states[0]["model"])
    tiny_pipe(9).load_vton_adapter(tmp_path / "whole")
    assert (
        len(curve(tmp_path / "whole", "loss_adversarial")) == 5 == len(curve(tmp_path / "whole", "loss_discriminator"))
    )
    assert len(curve(tmp_path / "whole", "loss_perceptual")) == 7
    with pytest.raises(ValueError, match="was trained with adversarial_loss True, not with adversarial_loss None"):
        without = {**BOTH, "adversarial_weight": None, "adversarial_start_step": None}
        trainer_of(bases[9], data, tmp_path / "other", resume_from_checkpoint=begun, **without)
    slower = trainer_of(bases[9], data, tmp_path / "slower", resume_from_checkpoint=begun, learning_rate=1e-5, **BOTH)
    slower.checkpoints.resume()
    assert [group["lr"] for group in slower.adversary.optimizer.param_groups] == [1e-5]


def test_two_processes_equal_one_with_twice_the_batch(bases, data, tmp_path):
    """At two resolutions, with both losses."""
    options = {**BOTH, "gradient_accumulation_steps": 1, "learning_rate": 1e-3, "height": None, "width": None}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def line(name, size):
        return [
            *flags(bases[9], data, tmp_path / name, train_batch_size=size, **options),
            "--resolutions",
            "32x24",
            "64x48",
        ]

    finish(launch(line("two", 1), "--multi_gpu", "--num_processes", "2", "--main_process_port", port))
    main(parse_args(line("one", 2)))
    assert curve(tmp_path / "two", "loss") == pytest.approx(curve(tmp_path / "one", "loss"), abs=1e-3)
    one, two = (load_file(tmp_path / n / f"checkpoint-7/{TRAINED_NAME}") for n in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-3) for name in one)
    one, two = (torch.load(tmp_path / n / "checkpoint-7/custom_checkpoint_2.pkl")["model"] for n in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-3) for name in one)


@torch.no_grad()
def test_without_a_flag_nothing_is_added(bases, data, tmp_path):
    trainer, batch, loss = step_of(bases[9], data, tmp_path)
    clean, noise, timesteps, alpha = by_hand(trainer, batch)
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    assert loss.item() == pytest.approx(F.mse_loss(seen_by(trainer, batch, noisy, timesteps), noise).item(), rel=1e-5)
    assert trainer.perceptual is None and trainer.adversary is None and not trainer.parts
