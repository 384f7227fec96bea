"""train_vton.py on a tiny base and a tiny drawn dataset: equalities, not file names."""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, patch_environment
from datasets.distributed import split_dataset_by_node
from huggingface_hub import HfApi
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import ROOT, picture, seeded, tiny_pipe

from pipeline_vton import (
    ADAPTER_NAME,
    LORA_NAME,
    AdapterSettings,
    ClothBesideAttnProcessor,
    ClothCacheAttnProcessor,
    TryOnLatents,
    adapter_parameters,
    vton_attention,
)
from train_vton import (
    LatentCache,
    PairDataset,
    Preparation,
    StreamedPairs,
    Trainer,
    TreePairs,
    draw,
    load_rows,
    main,
    parse_args,
    refuse_sharding,
    row_pictures,
)


pytestmark = pytest.mark.usefixtures("fresh_accelerate")
TRAIN, TEST = 10, 4  # pairs: 5 batches of 2, 3 updates of 2 batches an epoch, the last one of a single batch


@pytest.fixture(autouse=True)
def no_sleep_after_a_stream(monkeypatch):
    """`datasets` waits five seconds at the end of every epoch of shuffled parquet, whatever there was to wait for."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> dict[int, Path]:
    """Bases with 4, 8 and 9 input channels, as diffusers folders."""
    root = tmp_path_factory.mktemp("bases")
    for channels in (4, 8, 9):
        for name, component in tiny_pipe(channels, text=True).components.items():
            if component is not None:
                component.save_pretrained(root / str(channels) / name)
    return {channels: root / str(channels) for channels in (4, 8, 9)}


@pytest.fixture(scope="session")
def tested(tmp_path_factory) -> Path:
    from make_dataset import make_dataset  # `tiny` puts demo/ on the path

    root = tmp_path_factory.mktemp("tested")
    make_dataset(root, TRAIN, TEST, seed=0)
    return root


@pytest.fixture(scope="session")
def data(tested, tmp_path_factory) -> Path:
    """The same without a test list: there is nothing to validate with."""
    root = Path(shutil.copytree(tested, tmp_path_factory.mktemp("data") / "data"))
    (root / "test_pairs.txt").unlink()
    return root


@pytest.fixture
def own_data(tested, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tested, tmp_path / "own"))


def flags(base: Path, data: Path, out: Path, **changed) -> list[str]:
    """The command line of a short run; True is a flag without a value, None leaves one out."""
    options = {
        "pretrained_model_name_or_path": base,
        "dataset_root": data,
        "output_dir": out,
        "height": 32,
        "width": 24,
        "train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_train_steps": 2,
        "lr_warmup_steps": 1,
        "dataloader_num_workers": 0,
        "validation_steps": 100,
        "num_validation_pairs": 0,
        "report_to": "none",
    } | changed
    line = []
    for name, value in options.items():
        if value is not None:
            line += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return line


def trainer_of(*where, **changed) -> Trainer:
    return Trainer(parse_args(flags(*where, **changed)))


def tree(root: Path, split: str = "train", paired: bool = True, seed: int = 0, **options) -> PairDataset:
    return PairDataset(TreePairs(root, split, paired, **options), Preparation(32, 24, seed))


def launch(line: list[str], *options: str) -> subprocess.Popen:
    """`accelerate launch train_vton.py`, in a process group of its own."""
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    command += [
        "--dynamo_backend",
        "no",
        "--num_cpu_threads_per_process",
        threads,
        *options,
        str(ROOT / "train_vton.py"),
    ]
    return subprocess.Popen(
        command + line, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def curve(out: Path, tag: str) -> list[float]:
    """What the run logged to TensorBoard, step by step."""
    events = EventAccumulator(str(out / "logs" / "train_vton"))
    events.Reload()
    return [event.value for event in events.Scalars(tag)]


LONG = {  # 8 updates in epochs of 3, interrupted in the middle of the second and the third
    "max_train_steps": 8,
    "gradient_accumulation_steps": 2,
    "checkpointing_steps": 2,
    "checkpoints_total_limit": 3,
    "ema_decay": 0.9,
    "cloth_dropout": 0.4,
}


@pytest.fixture(scope="session")
def finished(bases, tested, tmp_path_factory) -> Path:
    """The output of an uninterrupted run of 8 updates."""
    out = tmp_path_factory.mktemp("finished")
    with patch_environment(ACCELERATE_USE_CPU="true"):
        main(parse_args(flags(bases[9], tested, out, report_to="tensorboard", num_validation_pairs=2, **LONG)))
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    return out


def same_end(one: Path, other: Path) -> bool:
    """Whether two runs published the same adapter and left the same weights behind, bit for bit."""
    files = (ADAPTER_NAME, f"checkpoint-8/{ADAPTER_NAME}")
    return all(equal(load_file(one / file), load_file(other / file)) for file in files)


# ------------------------------------------------------------------------------------------------------ interruptions


@pytest.mark.parametrize("step", [4, 6])  # in the middle of an epoch, and at the end of one
def test_resumed_run_equals_an_uninterrupted_one(finished, bases, data, tmp_path, step):
    begun = str(finished / f"checkpoint-{step}")
    main(parse_args(flags(bases[9], data, tmp_path, resume_from_checkpoint=begun, **LONG)))
    assert same_end(finished, tmp_path)


def test_killed_and_resumed_run_equals_an_uninterrupted_one(finished, bases, data, tmp_path):
    line = flags(bases[9], data, tmp_path, resume_from_checkpoint="latest", **LONG)
    process = launch(line, "--cpu", "--num_processes", "1")
    while process.poll() is None and not (tmp_path / "checkpoint-2").exists():
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[0]  # it was at work
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "unfinished-checkpoint-7")  # a save cut short
    (tmp_path / "unfinished-checkpoint-7" / ADAPTER_NAME).write_bytes(b"half")
    assert not (tmp_path / ADAPTER_NAME).exists()
    main(parse_args(line))
    assert same_end(finished, tmp_path)


def test_a_signal_leaves_a_checkpoint_and_goes_on_from_it(bases, data, tmp_path):
    """Ctrl-C at a moment that nobody chose; the run stops after the update in work."""

    def interrupt() -> None:
        while not (tmp_path / "checkpoint-2").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    line = flags(
        bases[9], data, tmp_path, max_train_steps=100_000, gradient_accumulation_steps=2, checkpointing_steps=2
    )
    watcher, handler = threading.Thread(target=interrupt), signal.getsignal(signal.SIGINT)
    watcher.start()
    with pytest.raises(SystemExit, match="stopped at step"):
        main(parse_args([*line, "--checkpoints_total_limit", "1"]))
    watcher.join()
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / ADAPTER_NAME).exists()
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = Trainer(parse_args([*line, "--resume_from_checkpoint", "latest"]))
    trainer.resume()
    assert [f"checkpoint-{trainer.step}"] == [
        path.name for path in tmp_path.glob("*checkpoint*")
    ] and trainer.step >= 2


def test_a_loss_that_is_no_number_stops_before_it_does_harm(bases, data, tmp_path):
    trainer = trainer_of(bases[9], data, tmp_path)
    with torch.no_grad():
        trainer.trained[0].fill_(torch.nan)
    before = [parameter.detach().clone() for parameter in trainer.trained]
    batch = next(trainer.batches())
    with (
        vton_attention(trainer.unet, ClothBesideAttnProcessor, "skip"),
        pytest.raises(
            FloatingPointError, match=f"the loss is nan at step 1; the pairs are {', '.join(batch['name'])}"
        ),
    ):
        trainer.update(batch)
    assert all(torch.equal(one, other) for one, other in zip(trainer.trained[1:], before[1:]))
    assert trainer.step == 0 and not trainer.optimizer.optimizer.state


def test_rotation_keeps_the_newest(finished):
    assert sorted(path.name for path in finished.glob("*checkpoint*")) == [f"checkpoint-{i}" for i in (4, 6, 8)]


def test_latest_without_a_checkpoint_starts_fresh(bases, data, tmp_path, caplog):
    trainer = trainer_of(bases[9], data, tmp_path, resume_from_checkpoint="latest")
    with caplog.at_level("INFO"):
        trainer.resume()
    assert trainer.step == 0 and "no checkpoint" in caplog.text


def test_other_weights_than_the_checkpoint(finished, bases, data, tmp_path):
    begun = str(finished / "checkpoint-8")
    trainer = trainer_of(bases[9], data, tmp_path, resume_from_checkpoint=begun, trainable="attention")
    with pytest.raises(ValueError, match="trained with other weights than --trainable attention"):
        trainer.resume()


# -------------------------------------------------------------------------------------------------------- what is left


def test_adapter_loads_and_is_the_average(finished):
    pipe = tiny_pipe(9)
    pipe.load_vton_adapter(finished)
    loaded = {name: p.detach() for name, p in adapter_parameters(pipe.unet, "self_attention", False).items()}
    published, last = load_file(finished / ADAPTER_NAME), load_file(finished / "checkpoint-8" / ADAPTER_NAME)
    average = torch.load(finished / "checkpoint-8" / "custom_checkpoint_1.pkl")["shadow_params"]
    assert equal(published, {name: weight.half() for name, weight in zip(loaded, average, strict=True)})
    assert equal(loaded, {name: weight.float() for name, weight in published.items()})
    assert not equal(published, {name: weight.half() for name, weight in last.items()})


def test_what_is_validated_is_what_is_published(bases, data, tmp_path):
    trainer = trainer_of(bases[9], data, tmp_path, ema_decay=0.5)
    assert trainer.run()
    last = [parameter.detach().clone() for parameter in trainer.trained]
    with trainer.published_weights():
        shown = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    assert equal(shown, {name: weight.float() for name, weight in load_file(tmp_path / ADAPTER_NAME).items()})
    assert all(torch.equal(*both) for both in zip(trainer.trained, last))
    assert not all(torch.equal(*both) for both in zip(shown.values(), last))


def test_metadata_is_complete(finished, bases):
    with safe_open(finished / ADAPTER_NAME, "pt") as file:
        metadata = file.metadata()
    unsaid = {"scheduler_class", "eta", "prompt"}
    known = {setting.name for setting in fields(AdapterSettings)} - {"base_in_channels", *unsaid}
    assert metadata.keys() == {"format", "format_version", "in_channels", *known}
    assert metadata["base_model"] == str(bases[9]) and metadata["trained_steps"] == "8"
    assert (metadata["height"], metadata["width"], metadata["in_channels"]) == ("32", "24", "9")


def test_arguments_are_kept(finished, bases):
    arguments = json.loads((finished / "training_args.json").read_text())
    assert arguments["seed"] == 0 and arguments["pretrained_model_name_or_path"] == str(bases[9])


def test_reports(finished):
    events = EventAccumulator(str(finished / "logs" / "train_vton"))
    events.Reload()
    assert len(events.Scalars("loss")) == 8
    assert {
        "lr",
        "images_per_second",
        "memory_gib",
        "grad_norm",
        "probe/t500_none",
        "probe/t500_right",
        "probe/t500_wrong",
    } <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["validation"]
    with Image.open(finished / "validation" / "step-000008.png") as grid:
        assert grid.size == (3 * 24, 2 * 32)


def test_default_schedule(finished):
    rates = curve(finished, "lr")  # as the next step will use it
    assert rates[0] == pytest.approx(1e-2) and rates[-1] == pytest.approx(1e-6, rel=1e-3)
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    "name, rates",
    [
        ("constant", [1, 1, 1, 1]),
        ("constant_with_warmup", [0, 0.5, 1, 1]),
        ("linear", [0, 0.5, 1, 0.5]),
        ("cosine", [0, 0.5, 1, 0.5]),
        ("cosine_with_restarts", [0, 0.5, 1, 0.5]),
        ("polynomial", [0, 0.5, 1, 0.5]),
    ],
)
def test_diffusers_schedules(bases, data, tmp_path, name, rates):
    options = {"lr_scheduler": name, "max_train_steps": 4, "lr_warmup_steps": 2, "learning_rate": 1.0}
    trainer, seen = trainer_of(bases[9], data, tmp_path, **options), []
    for _ in rates:
        seen += trainer.schedule.get_last_lr()
        trainer.optimizer.step()
        trainer.schedule.step()
    assert seen == pytest.approx(rates)


@pytest.fixture
def no_tf32():
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, value in zip(backends, before):
        backend.allow_tf32 = value


def test_flags_reach_the_optimiser(bases, data, tmp_path, no_tf32):
    epochs = {
        "max_train_steps": None,
        "num_train_epochs": 3,
        "lr_warmup_steps": None,
        "gradient_accumulation_steps": 2,
    }
    for changed, decay in (({}, 0.01), ({"adam_weight_decay": 0.1, "allow_tf32": True}, 0.1)):
        trainer = trainer_of(bases[9], data, tmp_path, **epochs, **changed)
        (group,) = trainer.optimizer.param_groups
        assert (group["betas"], group["weight_decay"], group["initial_lr"]) == ((0.9, 0.999), decay, 1e-2)
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == bool(changed)
    assert trainer.total_steps == 9
    factor = trainer.schedule.lr_lambdas[0]  # five epochs of warm-up are more than the run has
    assert [factor(step) for step in (0, 3, 9)] == pytest.approx([0.1, 0.4, 1.0])


# ------------------------------------------------------------------------------------------------------------ the step


def test_gradient_checkpointing_changes_no_gradient(bases, data, tmp_path):
    gradients = []
    for option in (None, True):
        trainer = trainer_of(bases[9], data, tmp_path, gradient_checkpointing=option)
        with vton_attention(trainer.unet, ClothBesideAttnProcessor, "skip"):
            trainer.accelerator.backward(trainer.train_step(next(trainer.batches())))
        assert trainer.unet.is_gradient_checkpointing == bool(option)
        gradients.append([parameter.grad for parameter in trainer.trained])
    assert all(torch.allclose(one, other, atol=1e-7) and one.any() for one, other in zip(*gradients))


@pytest.mark.parametrize("trainable", ["self_attention", "attention", "attention_norms", "all"])
def test_only_the_adapter_learns(bases, data, tmp_path, trainable):
    trainer = trainer_of(bases[9], data, tmp_path, trainable=trainable, cross_attention="prompt")
    before = {name: parameter.detach().clone() for name, parameter in trainer.unet.named_parameters()}
    chosen = adapter_parameters(trainer.unet, trainable, False)
    with vton_attention(trainer.unet, ClothBesideAttnProcessor, "prompt"):
        trainer.accelerator.backward(trainer.train_step(next(trainer.batches())))
        for name, parameter in trainer.unet.named_parameters():
            assert (parameter.grad is not None) == (name in chosen), name
        trainer.optimizer.zero_grad()
        trainer.update(next(trainer.batches()))
    changed = {name for name, p in trainer.unet.named_parameters() if not torch.equal(p, before[name])}
    assert changed == chosen.keys()
    assert all(parameter.grad is None for parameter in trainer.vae.parameters())


@pytest.mark.parametrize("channels", [4, 8, 9])
def test_loss_is_the_pipelines_noise_error(bases, data, tmp_path, channels):
    """The training form, [person ; cloth] in one batch, against the pipeline's: the cloth read first, then the person."""
    trainer = trainer_of(bases[channels], data, tmp_path, cloth_dropout=0)
    batch = next(trainer.batches())
    with vton_attention(trainer.unet, ClothBesideAttnProcessor, "skip"), torch.no_grad():
        loss = trainer.train_step(batch)

    pipe, drawn = trainer.pipe, draw(batch["seed"], (4, 8, 6))
    with torch.no_grad(), vton_attention(pipe.unet, ClothCacheAttnProcessor, "skip") as processors:
        posterior = pipe.vae.encode(batch["person"]).latent_dist
        target = (posterior.mean + posterior.std * drawn["posterior"]) * pipe.vae.config.scaling_factor
        timesteps = (drawn["time"] * 1000).long()
        noisy = pipe.scheduler.add_noise(target, drawn["noise"], timesteps)
        conditioning = TryOnLatents.encode(
            pipe.vae,
            batch["person"],
            batch["mask"],
            batch["cloth"],
            channels=pipe.unet.config.in_channels,
            condition_latents="unscaled" if channels == 8 else "scaled",
        )
        pipe._cross_attention_kwargs = None
        pipe.read_cloth(conditioning, None, processors)
        noise_pred = pipe.predict_noise(noisy, timesteps, conditioning, None, None, guided=False)
    assert loss.item() == pytest.approx((noise_pred - drawn["noise"]).square().mean().item(), rel=1e-5)
    assert trainer.settings.condition_latents == pipe.config.condition_latents


def test_cloth_dropout_hides_the_cloth_alone(bases, data, tmp_path):
    trainer = trainer_of(bases[9], data, tmp_path)
    batch = next(trainer.batches())
    conditioning, noisy = trainer.latents(batch)[0], torch.randn(2, 4, 8, 6)
    timesteps = torch.tensor([300, 700])
    with torch.no_grad(), vton_attention(trainer.unet, ClothBesideAttnProcessor, "skip"):
        half = trainer.predict(conditioning, noisy, timesteps, torch.tensor([0.0, 1.0]))
        seen = trainer.predict(conditioning, noisy, timesteps, torch.ones(2))
    with torch.no_grad(), vton_attention(trainer.unet, None, "skip"):  # the person's rows alone
        unseen = trainer.unet(conditioning.person_rows(noisy), timesteps, None).sample
    assert torch.allclose(half[0], unseen[0], atol=1e-5) and not torch.allclose(half[0], seen[0], atol=1e-3)
    assert torch.allclose(half[1], seen[1], atol=1e-5)


@torch.no_grad()
def test_a_row_that_drops_out_does_not_depend_on_its_cloth(bases, data, tmp_path):
    trainer, batch, _ = step_of(bases[9], data, tmp_path)
    numbers = draw(batch["seed"], (4, 8, 6))["dropout"]
    trainer.args.cloth_dropout = numbers.mean().item()  # between the two
    dropped, losses = numbers.argmin().item(), []
    for row in (None, dropped, 1 - dropped):
        cloth = batch["cloth"].clone()
        if row is not None:
            cloth[row] = -cloth[row]
        with vton_attention(trainer.unet, ClothBesideAttnProcessor, "skip"):
            losses.append(trainer.train_step(batch | {"cloth": cloth}).item())
    assert losses[1] == pytest.approx(losses[0], abs=1e-6) and abs(losses[2] - losses[0]) > 1e-4


def test_accumulated_batches_are_one(bases, data, tmp_path):
    for name, size, count in (("whole", 4, 1), ("parts", 2, 2)):
        options = {"train_batch_size": size, "gradient_accumulation_steps": count, "learning_rate": 1e-3}
        main(parse_args(flags(bases[9], data, tmp_path / name, **options)))
    whole, parts = (load_file(tmp_path / name / f"checkpoint-2/{ADAPTER_NAME}") for name in ("whole", "parts"))
    assert all(torch.allclose(whole[name], parts[name], atol=1e-5) for name in whole)


def test_dropout_takes_its_share():
    numbers = draw(range(2000), (1,))["dropout"]
    assert 0.08 < (numbers < 0.1).float().mean() < 0.12


def test_joint_trains_the_whole_canvas(bases, data, tmp_path):
    trainer = trainer_of(bases[9], data, tmp_path, cloth_conditioning="joint", cloth_dropout=0)
    batch = next(trainer.batches())
    with torch.no_grad(), vton_attention(trainer.unet, None, "skip"):
        loss = trainer.train_step(batch)
        conditioning, drawn = trainer.latents(batch)[0], draw(batch["seed"], (4, 8, 6))
        posterior = trainer.vae.encode(batch["person"]).latent_dist
        target = (posterior.mean + posterior.std * drawn["posterior"]) * trainer.vae.config.scaling_factor
        clean = torch.cat([target, conditioning.cloth], dim=2)
        noise = torch.cat([drawn["noise"], drawn["cloth_noise"]], dim=2)
        timesteps = (drawn["time"] * 1000).long()
        trainer.pipe._cross_attention_kwargs = None
        noise_pred = trainer.pipe.predict_noise(
            trainer.noise_scheduler.add_noise(clean, noise, timesteps),
            timesteps,
            conditioning,
            None,
            None,
            guided=False,
        )
    assert loss.item() == pytest.approx((noise_pred - noise).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("channels", [4, 8, 9])
def test_every_base_trains_and_loads(bases, data, tmp_path, channels):
    main(parse_args(flags(bases[channels], data, tmp_path)))
    pipe = tiny_pipe(channels)
    pipe.load_vton_adapter(tmp_path)
    assert pipe.unet.config.in_channels == (9 if channels == 9 else 8)
    weights = load_file(tmp_path / ADAPTER_NAME)
    if channels == 4:  # the new half starts at zero and learns
        assert weights["conv_in.weight"].shape[1] == 8 and weights["conv_in.weight"][:, 4:].any()
    assert ("conv_in.weight" in weights) == (channels == 4)


def step_of(*where, **changed) -> tuple[Trainer, dict, torch.Tensor]:
    """A trainer, its first batch, and the loss of it; nothing dropped out."""
    trainer = trainer_of(*where, cloth_dropout=0, **changed)
    batch = next(trainer.batches())
    with torch.no_grad(), vton_attention(trainer.unet, ClothBesideAttnProcessor, "skip"):
        return trainer, batch, trainer.train_step(batch)


def by_hand(trainer: Trainer, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clean latents, noise, timesteps and the noise level's alpha-bar (B, 1, 1, 1) of a batch, as `train_step` has them."""
    posterior = trainer.vae.encode(batch["person"]).latent_dist
    drawn = draw(batch["seed"], posterior.mean.shape[1:])
    clean = (posterior.mean + posterior.std * drawn["posterior"]) * trainer.vae.config.scaling_factor
    timesteps = (drawn["time"] * 1000).long()
    return clean, drawn["noise"], timesteps, trainer.noise_scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)


def seen_by(trainer: Trainer, batch: dict, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), vton_attention(trainer.unet, ClothBesideAttnProcessor, "skip"):
        return trainer.predict(trainer.latents(batch)[0], noisy, timesteps, torch.ones(len(noisy)))


@pytest.fixture(scope="session")
def velocity_base(bases, tmp_path_factory) -> Path:
    base = Path(shutil.copytree(bases[9], tmp_path_factory.mktemp("velocity") / "base"))
    config = json.loads((base / "scheduler" / "scheduler_config.json").read_text())
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"prediction_type": "v_prediction"}))
    return base


@torch.no_grad()
def test_velocity_and_min_snr(bases, velocity_base, data, tmp_path):
    """Both objectives, weighted or not, against their formulas."""
    for base in (bases[9], velocity_base):
        trainer, batch, plain = step_of(base, data, tmp_path)
        clean, noise, timesteps, alpha = by_hand(trainer, batch)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        target = noise if base == bases[9] else alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        errors = (seen_by(trainer, batch, noisy, timesteps) - target).square().mean(dim=(1, 2, 3))
        assert plain.item() == pytest.approx(errors.mean().item(), rel=1e-5)
        snr = (alpha / (1 - alpha)).flatten()
        gamma = snr.mean().item()  # one row above it, one below
        weights = snr.clamp(max=gamma) / (snr if base == bases[9] else snr + 1)
        *_, weighted = step_of(base, data, tmp_path, snr_gamma=gamma)
        assert weighted.item() == pytest.approx((weights * errors).mean().item(), rel=1e-5)


@torch.no_grad()
def test_dream_moves_input_and_target_by_what_the_unet_gets_wrong(bases, velocity_base, data, tmp_path):
    for base in (bases[9], velocity_base):
        trainer, batch, loss = step_of(base, data, tmp_path, dream_detail_preservation=2)
        clean, noise, timesteps, alpha = by_hand(trainer, batch)
        sigma = (1 - alpha).sqrt()
        noisy = alpha.sqrt() * clean + sigma * noise
        noise_pred = seen_by(trainer, batch, noisy, timesteps)
        if base == velocity_base:
            noise_pred = alpha.sqrt() * noise_pred + sigma * noisy
        moved = sigma**2 * (noise - noise_pred)
        target = noise + moved if base == bases[9] else alpha.sqrt() * (noise + moved) - sigma * clean
        again = seen_by(trainer, batch, noisy + sigma * moved, timesteps)
        assert loss.item() == pytest.approx(F.mse_loss(again, target).item(), rel=1e-5)


@pytest.mark.parametrize("trainable", ["self_attention", "attention"])
def test_lora_loads_as_any_lora_does(bases, data, tmp_path, trainable):
    options = {"lora_rank": 3, "trainable": trainable, "ema_decay": 0, "max_train_steps": 3, "learning_rate": 0.1}
    options |= {"checkpointing_steps": 2}
    main(parse_args(flags(bases[9], data, tmp_path / "whole", **options)))
    begun = str(tmp_path / "whole" / "checkpoint-2")
    trainer = trainer_of(bases[9], data, tmp_path / "resumed", resume_from_checkpoint=begun, **options)
    trainer.run()
    weights = load_file(tmp_path / "whole" / LORA_NAME)
    assert equal(weights, load_file(tmp_path / "resumed" / LORA_NAME))
    modules = {name.partition(".lora")[0].removeprefix("unet.") for name in weights}
    chosen = adapter_parameters(tiny_pipe(9).unet, trainable, False)
    assert modules == {name.rpartition(".")[0] for name in chosen}

    pipe, rows = tiny_pipe(9), torch.randn(1, 9, 8, 8, generator=seeded())
    with torch.no_grad():
        bare = pipe.unet(rows, 500, torch.zeros(1, 1, 32)).sample
        pipe.load_lora_weights(tmp_path / "whole", weight_name=LORA_NAME)
        loaded, trained = (unet(rows, 500, torch.zeros(1, 1, 32)).sample for unet in (pipe.unet, trainer.unet))
    assert (loaded - trained).abs().max() < 1e-2 < (loaded - bare).abs().max()


def test_lora_brings_its_settings_until_it_is_unloaded(bases, data, tmp_path):
    options = {"cloth_conditioning": "joint", "guidance_scale": 2.5, "ema_decay": 0, "max_train_steps": 1}
    main(parse_args(flags(bases[8], data, tmp_path, lora_rank=2, **options)))
    pipe = tiny_pipe(8)
    before = dict(pipe.config)
    pipe.load_lora_weights(tmp_path)
    brought = {"cloth_conditioning": "joint", "guidance_scale": 2.5, "condition_latents": "unscaled", "height": 32}
    assert brought.items() <= pipe.config.items() and pipe.config.trained_steps == 1
    pipe.unload_lora_weights()
    assert dict(pipe.config) == before

    pipe.load_lora_weights(load_file(tmp_path / LORA_NAME))  # as weights alone, or under another name: a LoRA like any
    (tmp_path / LORA_NAME).rename(tmp_path / "other.safetensors")
    pipe.load_lora_weights(tmp_path, weight_name="other.safetensors", adapter_name="second")
    assert brought.items() <= pipe.config.items()
    inpainting = tiny_pipe(9)
    with pytest.raises(ValueError, match="is for a UNet with 8 input channels, this one has 9"):
        inpainting.load_lora_weights(tmp_path, weight_name="other.safetensors")
    assert not hasattr(inpainting.unet, "peft_config")


def test_half_precision_trains_whole_weights(bases, tested, tmp_path):
    trainer = trainer_of(bases[9], tested, tmp_path, mixed_precision="bf16", num_validation_pairs=1)
    assert trainer.run()
    assert {p.dtype for p in trainer.trained} == {torch.float32}
    assert {p.dtype for p in trainer.unet.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {weight.dtype for weight in load_file(tmp_path / ADAPTER_NAME).values()} == {torch.float16}
    tiny_pipe(9).load_vton_adapter(tmp_path)


def test_lora_has_no_widened_conv_in(bases, data, tmp_path):
    with pytest.raises(ValueError, match="--lora_rank cannot train the conv_in"):
        trainer_of(bases[4], data, tmp_path, lora_rank=4)


# ---------------------------------------------------------------------------------------------------------- processes


def test_sharded_weights_are_refused():
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        with pytest.raises(ValueError, match=f"configured for {kind.value}"):
            refuse_sharding(kind)
    refuse_sharding(DistributedType.MULTI_GPU)


def test_two_processes_equal_one_with_twice_the_batch(bases, data, tmp_path):
    options = {"max_train_steps": 7, "report_to": "tensorboard", "learning_rate": 1e-3, "lr_warmup_steps": 3}
    options |= {"cloth_dropout": 0.4, "max_grad_norm": 0.05, "checkpointing_steps": 7}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    line = flags(bases[9], data, tmp_path / "two", train_batch_size=1, **options)
    # --multi_gpu is what makes accelerate start two processes; with ACCELERATE_USE_CPU they are CPU ones, on gloo.
    finish(launch(line, "--multi_gpu", "--num_processes", "2", "--main_process_port", port))
    main(parse_args(flags(bases[9], data, tmp_path / "one", train_batch_size=2, **options)))
    assert curve(tmp_path / "two", "lr") == curve(tmp_path / "one", "lr")
    assert curve(tmp_path / "two", "loss") == pytest.approx(curve(tmp_path / "one", "loss"), abs=1e-4)
    one, two = (load_file(tmp_path / n / f"checkpoint-7/{ADAPTER_NAME}") for n in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


# --------------------------------------------------------------------------------------------------------------- data


def test_items_do_not_depend_on_who_reads_them(data):
    dataset = tree(data, seed=3)
    seeds = [dataset[i]["seed"] for i in range(TRAIN)]
    assert len(set(seeds)) == TRAIN and seeds == [dataset[i]["seed"] for i in range(TRAIN)]
    dataset.set_epoch(1)
    assert not set(seeds) & {dataset[i]["seed"] for i in range(TRAIN)}


def test_unpaired_list_trains_paired(own_data):
    lines = (own_data / "train_pairs.txt").read_text().split("\n")
    (own_data / "train_pairs.txt").write_text("00000_00.png 00003_00.png\n\n" + "\n".join(lines[1:]))
    dataset = tree(own_data)
    assert dataset[0]["name"] == "00000_00.png 00000_00.png" and len(dataset) == TRAIN


def test_masks_without_a_suffix(own_data):
    before = tree(own_data)[0]["mask"]
    for mask in (own_data / "train" / "agnostic-mask").iterdir():
        mask.rename(mask.with_name(mask.name.replace("_mask", "")))
    assert torch.equal(tree(own_data)[0]["mask"], before)


@pytest.fixture(scope="session")
def dress_code(tested, tmp_path_factory) -> Path:
    """The same pictures in DressCode's layout: 4 + 3 + 3 training pairs, and two test pairs in one category."""
    root = tmp_path_factory.mktemp("dress_code")
    folders = ("upper_body", "lower_body", "dresses")
    for i, folder in enumerate(folders):
        (root / folder / "images").mkdir(parents=True)
        (root / folder / "agnostic_masks").mkdir()
        for split, count in (("train", TRAIN), ("test", TEST)):
            numbers = [n for n in range(count) if n % 3 == i]
            for n in numbers:
                source, name = tested / split, f"{n + 1000 * (split == 'test'):06d}"
                shutil.copy(source / f"image/{n:05d}_00.png", root / folder / f"images/{name}_0.png")
                shutil.copy(source / f"cloth/{n:05d}_00.png", root / folder / f"images/{name}_1.png")
                mask = root / folder / f"agnostic_masks/{name}_0.png"
                shutil.copy(source / f"agnostic-mask/{n:05d}_00_mask.png", mask)
            persons = [f"{n + 1000 * (split == 'test'):06d}" for n in numbers]
            others = persons[1:] + persons[:1]
            lists = {"_paired": persons, "_unpaired": others} if split == "test" else {"": others}
            for end, cloths in lists.items():
                lines = "".join(f"{one}_0.png\t{other}_1.png\n" for one, other in zip(persons, cloths))
                (root / folder / f"{split}_pairs{end}.txt").write_text(lines)
    return root


def test_dress_code_is_recognised(data, dress_code):
    viton, dresses = tree(data), tree(dress_code)
    assert len(dresses) == TRAIN
    by_name = {dresses[i]["name"]: dresses[i] for i in range(TRAIN)}
    for n in range(TRAIN):
        item = by_name[f"{n:06d}_0.png {n:06d}_1.png"]  # with their own cloth, whatever the list says
        assert all(torch.equal(item[role], viton[n][role]) for role in ("person", "cloth", "mask"))
    assert tree(dress_code, "test", paired=True)[0]["name"] == "001000_0.png 001000_1.png"
    assert tree(dress_code, "test", paired=False)[0]["name"] == "001000_0.png 001003_1.png"


def test_dress_code_trains(bases, dress_code, tmp_path):
    main(parse_args(flags(bases[9], dress_code, tmp_path, num_validation_pairs=1)))
    assert (tmp_path / ADAPTER_NAME).exists()


def test_augmentation_is_the_same_for_all_pictures():
    """The person's red channel is the mask: wherever the person goes, the mask goes."""
    mask = Image.fromarray((np.random.default_rng(0).random((4, 3)) < 0.5).astype(np.uint8) * 255)
    mask = mask.resize((240, 320), Image.Resampling.NEAREST)
    white = Image.new("L", mask.size, 255)
    person = Image.merge("RGB", (mask, white, white))
    pictures = {"person": person, "mask": mask, "cloth": person}
    plain, moved = Preparation(320, 240), Preparation(320, 240, augment=("flip", "crop"))
    colored, flipped = Preparation(320, 240, augment=("color",)), Preparation(320, 240, augment=("flip",))
    before, items = plain(pictures, 0, 0), [moved(pictures, 0, i) for i in range(8)]
    for item in items:
        assert ((item["person"][:1] > 0) == (item["mask"] > 0.5)).float().mean() > 0.98
    assert len({item["person"].mean().item() for item in items}) == 8
    assert torch.equal(moved(pictures, 0, 3)["person"], items[3]["person"])  # drawn for this pair and epoch
    mirrored = [flipped(pictures, 0, i) for i in range(8)]
    assert {torch.equal(item["person"], before["person"].flip(-1)) for item in mirrored} == {True, False}
    assert all(torch.equal(item["person"], item["cloth"]) for item in mirrored)

    gray = {"person": Image.new("RGB", (240, 320), (50, 120, 255)), "mask": mask}
    item = colored(gray | {"cloth": gray["person"]}, 0, 0)
    colors = item["person"].mean(dim=(1, 2)), item["cloth"].mean(dim=(1, 2))
    assert (
        torch.equal(*colors) and colors[0][2] == 1 and not torch.allclose(colors[0][0], torch.tensor(50 / 127.5 - 1))
    )
    assert torch.equal(item["mask"], before["mask"])


@pytest.fixture
def worn_otherwise(own_data) -> Path:
    """A dataset with the persons in other cloths: here, other persons."""
    for split, count in (("train", TRAIN), ("test", TEST)):
        (own_data / split / "condition").mkdir()
        for n in range(count):
            other = own_data / split / f"image/{(n + 1) % count:05d}_00.png"
            shutil.copy(other, own_data / split / f"condition/{n:05d}_00.png")
        shutil.rmtree(own_data / split / "agnostic-mask")  # not read
    return own_data


def test_mask_free_is_conditioned_on_the_person_in_another_cloth(bases, worn_otherwise, tmp_path):
    trainer, batch, loss = step_of(bases[9], worn_otherwise, tmp_path, mask_free=True)
    conditioning, mean, _ = trainer.latents(batch)
    scale = trainer.vae.config.scaling_factor
    with torch.no_grad():
        assert torch.equal(conditioning.person, trainer.vae.encode(batch["condition"]).latent_dist.mode() * scale)
        assert torch.equal(mean, trainer.vae.encode(batch["person"]).latent_dist.mode())
    assert conditioning.mask.min() == 1 and not torch.allclose(conditioning.person, mean * scale)

    main(parse_args(flags(bases[9], worn_otherwise, tmp_path, mask_free=True, num_validation_pairs=1)))
    pipe = tiny_pipe(9)
    pipe.load_vton_adapter(tmp_path)
    assert pipe.config.mask_free and pipe(picture(1), picture(2), num_inference_steps=1).images


def test_mask_free_needs_the_person_in_another_cloth(bases, data, tmp_path):
    with pytest.raises(FileNotFoundError, match="train_pairs.txt, line 1: there is no train/condition/00000_00.png"):
        trainer_of(bases[9], data, tmp_path, mask_free=True)


def test_cached_latents_train_the_same(bases, own_data, tmp_path, monkeypatch):
    monkeypatch.setattr(LatentCache, "SHARD", 4)
    options = {"max_train_steps": 7, "checkpointing_steps": 7, "cloth_dropout": 0.4}
    main(parse_args(flags(bases[9], own_data, tmp_path / "plain", **options)))
    cached = flags(bases[9], own_data, tmp_path / "cached", cache_latents=tmp_path / "latents", **options)
    main(parse_args(cached))
    one, two = (load_file(tmp_path / n / f"checkpoint-7/{ADAPTER_NAME}") for n in ("plain", "cached"))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)

    shards = sorted((tmp_path / "latents").glob("*/*.safetensors"))
    assert len(shards) == 3
    written = [shard.stat().st_mtime_ns for shard in shards]
    content = load_file(shards[1])
    shards[1].unlink()
    Trainer(parse_args(cached))  # fills the gap and leaves the rest
    assert equal(load_file(shards[1]), content)
    assert [shard.stat().st_mtime_ns for shard in (shards[0], shards[2])] == [written[0], written[2]]

    for change in ("size", "picture", "settings"):
        changed = {"size": ["--height", "40"], "settings": ["--condition_latents", "unscaled"], "picture": []}[change]
        if change == "picture":
            os.utime(own_data / "train/cloth/00003_00.png", (0, 0))
        Trainer(parse_args([*cached, *changed]))
    assert len(list((tmp_path / "latents").iterdir())) == 4


def spoil(root: Path, what: str) -> None:
    mask = root / "train/agnostic-mask/00000_00_mask.png"
    match what:
        case "no list":
            (root / "train_pairs.txt").unlink()
        case "empty list":
            (root / "train_pairs.txt").write_text("\n")
        case "one name":
            (root / "train_pairs.txt").write_text("00000_00.png 00000_00.png\n00001_00.png\n")
        case "no picture":
            (root / "train/cloth/00002_00.png").unlink()
        case "outside":
            (root / "train_pairs.txt").write_text("../../../secret.png x.png\n")
        case "corrupt":
            (root / "train/image/00000_00.png").write_bytes(b"no picture")
        case "other size":
            Image.new("L", (10, 10), 255).save(mask)


@pytest.mark.parametrize(
    "what, message",
    [
        ("no list", "there is no train_pairs.txt in"),
        ("empty list", "names no pairs"),
        ("one name", "train_pairs.txt, line 2: must name a person and a cloth, got '00001_00.png'"),
        ("no picture", "train_pairs.txt, line 3: there is no train/cloth/00002_00.png"),
        ("outside", "leads out of"),
        ("corrupt", "00000_00.png cannot be read"),
        ("other size", "the mask has size"),
    ],
)
def test_bad_data(own_data, what, message):
    spoil(own_data, what)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        tree(own_data)[0]


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"train_batch_size": 11}, "a step takes 11 pairs, and --dataset_root has 10"),
        ({"height": 33}, "`height` must be a positive multiple of 8, got 33"),
        ({"mixed_precision": "fp16"}, "--mixed_precision fp16 needs a GPU"),
    ],
)
def test_arguments_that_do_not_fit(bases, data, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(bases[9], data, tmp_path, **changed)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"learning_rate": 0}, "--learning_rate must be positive, got 0"),
        ({"cloth_dropout": 1.5}, "--cloth_dropout must be at least 0 and at most 1, got 1.5"),
        ({"width": None}, "--height and --width go together"),
        ({"resume_from_checkpoint": "nowhere"}, "must be latest or a folder, got nowhere"),
        ({"dataset_name": "me/pairs"}, "give --dataset_root or --dataset_name"),
        (
            {"dataset_root": None, "dataset_name": "me/pairs", "streaming": True, "lr_warmup_steps": None},
            "--streaming needs",
        ),
        ({"caption_column": "text"}, "--caption_column text needs --dataset_name"),
        ({"cache_latents": True, "augment": "flip"}, "--cache_latents would freeze --augment"),
        ({"lora_rank": 4, "trainable": "all"}, "--lora_rank needs --trainable self_attention or attention, got all"),
        ({"dream_detail_preservation": -1}, "--dream_detail_preservation must be positive, got -1.0"),
    ],
)
def test_arguments_that_are_wrong(capsys, changed, message):
    with pytest.raises(SystemExit):
        parse_args(flags(Path("base"), Path("data"), Path("out"), **changed))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "library, changed",
    [("bitsandbytes", {"use_8bit_adam": True}), ("datasets", {"dataset_root": None, "dataset_name": "me/pairs"})],
)
def test_optional_libraries_are_named(bases, data, tmp_path, monkeypatch, library, changed):
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    with pytest.raises(ImportError, match=f"pip install {library}"):
        trainer_of(bases[9], data, tmp_path, **changed)


# --------------------------------------------------------------------------------------------- what `datasets` reads


@pytest.fixture(scope="session")
def parquet(tested, tmp_path_factory) -> Path:
    """The pairs of `tested` as parquet files, with a text and another person for every pair."""
    folder = tmp_path_factory.mktemp("parquet")
    kinds = {column: datasets.Image() for column in (*COLUMNS.values(), "condition")} | {
        "text": datasets.Value("string")
    }
    for split, shards in (("train", 2), ("test", 1)):
        files = [files for _, _, files in TreePairs(tested, split, True).pairs]
        rows = {column: [str(pair[role]) for pair in files] for role, column in COLUMNS.items()}
        rows["condition"] = rows["image"][1:] + rows["image"][:1]
        rows["text"] = [f"shirt {TEXTS[i]}" for i in range(len(files))]
        whole = datasets.Dataset.from_dict(rows, datasets.Features(kinds))
        for i in range(shards):
            whole.shard(shards, i, contiguous=True).to_parquet(folder / f"{split}-{i:05d}-of-{shards:05d}.parquet")
    return folder


COLUMNS = {"person": "image", "cloth": "cloth", "mask": "mask"}
TEXTS = "abcdefghij"
STREAM = {"streaming": True, "max_train_steps": 7, "checkpointing_steps": 3, "cloth_dropout": 0.4}


def test_rows_train_as_a_tree_does(bases, tested, parquet, tmp_path):
    options = {"max_train_steps": 7, "checkpointing_steps": 7}
    main(parse_args(flags(bases[9], tested, tmp_path / "tree", **options)))
    for name, more in {"rows": {}, "cached": {"cache_latents": tmp_path / "latents"}}.items():
        main(parse_args(flags(bases[9], None, tmp_path / name, dataset_name=parquet, **options, **more)))
    tree, rows, cached = (load_file(tmp_path / n / ADAPTER_NAME) for n in ("tree", "rows", "cached"))
    assert equal(rows, tree)
    assert all(torch.allclose(cached[name].float(), rows[name].float(), atol=1e-3) for name in rows)


def test_a_folder_of_pictures_holds_the_same_rows(bases, tested, parquet, tmp_path):
    folder = tmp_path / "pictures" / "train"
    folder.mkdir(parents=True)
    lines = []
    for i, (_, _, files) in enumerate(TreePairs(tested, "train", True).pairs):
        line = {f"{COLUMNS[role]}_file_name": f"{i}_{role}.png" for role in files}
        for role, file in files.items():
            shutil.copy(file, folder / f"{i}_{role}.png")
        lines.append(json.dumps(line))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    of_pictures, of_parquet = (
        trainer_of(bases[9], None, tmp_path, dataset_name=name).dataset for name in (tmp_path / "pictures", parquet)
    )
    assert len(of_pictures) == len(of_parquet) == TRAIN
    for one, other in zip(of_pictures, of_parquet):
        assert all(torch.equal(one[name], other[name]) for name in ("person", "cloth", "mask"))


def test_columns_have_the_names_that_are_given(bases, parquet, tmp_path):
    names = {"image": "photo", "cloth": "shirt", "mask": "hole", "condition": "other"}
    rows = datasets.load_dataset(str(parquet), split="train").rename_columns(names)
    (tmp_path / "renamed").mkdir()
    rows.to_parquet(tmp_path / "renamed" / "train.parquet")
    given = {"person_column": "photo", "cloth_column": "shirt", "mask_column": "hole", "condition_column": "other"}
    for more in ({}, {"mask_free": True}):
        one, other = (
            trainer_of(bases[9], None, tmp_path, dataset_name=name, **more, **columns).dataset[3]
            for name, columns in ((parquet, {}), (tmp_path / "renamed", given))
        )
        assert all(torch.equal(one[role], other[role]) for role in one.keys() - {"name", "seed"})


def test_a_configuration_of_rows(bases, tested, tmp_path):
    configs = ""
    for name, cloth in (("plain", None), ("swapped", tested / "train/cloth/00001_00.png")):
        (tmp_path / name).mkdir()
        changed = {} if cloth is None else {"cloth": {"bytes": cloth.read_bytes(), "path": None}}
        rows_of(tested, tmp_path / name, **changed)
        configs += f"- config_name: {name}\n  data_files: {name}/train.parquet\n"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name, number in (("plain", 0), ("swapped", 1)):
        trainer = trainer_of(bases[9], None, tmp_path, dataset_name=tmp_path, dataset_config_name=name)
        assert torch.equal(trainer.dataset[0]["cloth"], tree(tested)[number]["cloth"])


def test_a_stream_goes_on_where_it_was_stopped(bases, parquet, tmp_path):
    main(parse_args(flags(bases[9], None, tmp_path / "whole", dataset_name=parquet, **STREAM)))
    begun = tmp_path / "whole" / "checkpoint-3"
    again = flags(bases[9], None, tmp_path / "again", dataset_name=parquet, resume_from_checkpoint=begun, **STREAM)
    main(parse_args(again))
    assert equal(load_file(tmp_path / "whole" / ADAPTER_NAME), load_file(tmp_path / "again" / ADAPTER_NAME))


@pytest.mark.parametrize("processes", [2, 5])  # a file each, and fewer files than processes
def test_processes_share_a_stream(bases, parquet, tmp_path, processes):
    """Every pair of an epoch is seen once, and epochs differ in order."""
    trainer = trainer_of(bases[9], None, tmp_path, dataset_name=parquet, **STREAM)
    rows = load_rows(trainer.args, "train", COLUMNS).shuffle(seed=0)
    epochs, share = ([], []), TRAIN // processes
    for rank in range(processes):
        part = split_dataset_by_node(rows, rank, processes)
        stream = iter(StreamedPairs(part, COLUMNS, trainer.prepare, rank, processes))
        for epoch in epochs:
            epoch += [item["person"].sum().item() for item in itertools.islice(stream, share)]
    everyone = sorted(trainer.prepare(row_pictures(row, COLUMNS, ""), 0, 0)["person"].sum().item() for row in rows)
    assert sorted(epochs[0]) == sorted(epochs[1]) == everyone
    assert epochs[0] != epochs[1]


def test_rows_hold_persons_in_another_cloth(bases, parquet, tmp_path):
    dataset = trainer_of(bases[9], None, tmp_path, dataset_name=parquet, mask_free=True).dataset
    for i in range(TRAIN):
        assert torch.equal(dataset[i]["condition"], dataset[(i + 1) % TRAIN]["person"])
        assert dataset[i]["mask"].min() == 1


@pytest.mark.parametrize("options", [{}, {"streaming": True}])
def test_a_caption_goes_with_its_row(bases, parquet, tmp_path, options):
    columns = {"caption_column": "text", "cross_attention": "prompt", "cloth_dropout": 0} | options
    trainer = trainer_of(bases[9], None, tmp_path, dataset_name=parquet, **columns)
    batch = next(trainer.batches())
    people = [row_pictures(row, COLUMNS, "") for row in load_rows(trainer.args, "train", COLUMNS)]
    for person, caption in zip(batch["person"], batch["caption"]):
        shown = trainer.prepare(people[TEXTS.index(caption[-1])], 0, 0)["person"]
        assert torch.equal(person, shown)
    with torch.no_grad(), vton_attention(trainer.unet, ClothBesideAttnProcessor, "prompt"):
        loss, swapped = (
            trainer.train_step(batch | {"caption": texts}) for texts in (batch["caption"], batch["caption"][::-1])
        )
    assert loss != swapped


def test_the_test_rows_are_probed_and_tried_on(bases, tested, parquet, tmp_path):
    of_rows = trainer_of(bases[9], None, tmp_path, dataset_name=parquet, num_validation_pairs=3)
    of_tree = trainer_of(bases[9], tested, tmp_path)
    assert len(of_rows.probes["person"]) == TEST and len(of_rows.tryons) == 3
    assert all(torch.equal(of_rows.probes[name], of_tree.probes[name]) for name in ("person", "cloth", "mask", "seed"))
    persons = [pictures["person"] for pictures in of_rows.tryons]
    assert of_rows.tryons[0]["cloth"] != of_rows.tryons[1]["cloth"] and persons[0] != persons[1]


def rows_of(tested: Path, folder: Path, **changed) -> Path:
    """Two equal training rows, with some of their cells changed."""
    files = TreePairs(tested, "train", True).pairs[0][2]
    row = {column: {"bytes": files[role].read_bytes(), "path": None} for role, column in COLUMNS.items()}
    row |= {"text": "a shirt"} | changed
    kinds = {column: datasets.Image() for column in COLUMNS.values()} | {"text": datasets.Value("string")}
    rows = datasets.Dataset.from_dict({name: [cell] * 2 for name, cell in row.items()}, datasets.Features(kinds))
    rows.to_parquet(folder / "train.parquet")
    return folder


@pytest.mark.parametrize(
    "changed, options, message",
    [
        ({}, {"cloth_column": "shirt"}, "--cloth_column: .* has the columns image, cloth, mask, text, not shirt"),
        ({"cloth": None}, {}, "row [01].*: the column cloth is empty"),
        ({"text": None}, {"caption_column": "text", "cross_attention": "prompt"}, "row [01].*: the caption is empty"),
        ({"cloth": {"bytes": b"no picture", "path": None}}, {}, "row [01].*, column cloth cannot be read"),
        ({"mask": "small"}, {}, r"row [01].*: the mask has size \(10, 10\), its person \(48, 64\)"),
    ],
)
@pytest.mark.parametrize("streaming", [None, True])
def test_bad_rows(bases, tested, tmp_path, changed, options, message, streaming):
    if changed.get("mask") == "small":
        Image.new("L", (10, 10), 255).save(tmp_path / "small.png")
        changed = {"mask": {"bytes": (tmp_path / "small.png").read_bytes(), "path": None}}
    folder = rows_of(tested, tmp_path, **changed)
    with pytest.raises(ValueError, match=message):
        next(trainer_of(bases[9], None, tmp_path, dataset_name=folder, streaming=streaming, **options).batches())


def test_a_stream_that_names_no_columns(bases, tmp_path):
    (tmp_path / "train.csv").write_text("image,cloth,mask\nperson.png,cloth.png,mask.png\n")
    with pytest.raises(ValueError, match="--streaming: .* names no columns ahead"):
        trainer_of(bases[9], None, tmp_path, dataset_name=tmp_path, **STREAM)


# ------------------------------------------------------------------------------------------------------------- the Hub


def test_uploads_every_checkpoint_with_a_card(bases, tested, tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    options = {
        "push_to_hub": True,
        "hub_model_id": "me/trained",
        "hub_strategy": "every_save",
        "hub_private_repo": True,
    }
    out = tmp_path / "out"
    main(parse_args(flags(bases[9], tested, out, checkpointing_steps=1, num_validation_pairs=1, **options)))
    repository, files = hub.repositories["models/me/trained"], hub.files("me/trained")
    assert repository.private and {"Step 1", "Step 2"} <= set(repository.messages)
    (tmp_path / "uploaded.safetensors").write_bytes(files[ADAPTER_NAME])
    assert equal(load_file(tmp_path / "uploaded.safetensors"), load_file(out / ADAPTER_NAME))
    assert files["validation/step-000002.png"] == (out / "validation" / "step-000002.png").read_bytes()
    card = files["README.md"].decode()
    assert card.count("## Training") == 1 and "validation/step-000002.png" in card
    assert "| learning_rate | 0.01 |" in card and "| up to step | mean loss |\n|---|---|\n| 1 | " in card


def test_a_revision_of_a_base_on_the_hub(bases, data, tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    hub.put("me/base", bases[8])
    HfApi().create_tag("me/base", tag="first")
    hub.put("me/base", bases[9])
    channels = [trainer_of("me/base", data, tmp_path, revision=name).in_channels for name in ("first", "main")]
    assert channels == [8, 9]


def test_a_failed_upload_is_tried_again_and_harms_nothing(bases, data, tmp_path, hub, monkeypatch, caplog):
    options = {
        "push_to_hub": True,
        "hub_model_id": "me/kept-out",
        "hub_strategy": "every_save",
        "checkpointing_steps": 1,
    }
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    main(parse_args(flags(bases[9], data, tmp_path / "refused", **options)))
    assert "models/me/kept-out" not in hub.repositories
    assert caplog.text.count("upload 1 of 1 failed") == 2 and "upload 3 of 3 failed" in caplog.text
    AcceleratorState._reset_state(reset_partial_state=True)
    main(parse_args(flags(bases[9], data, tmp_path / "plain", checkpointing_steps=1)))
    for file in (ADAPTER_NAME, f"checkpoint-2/{ADAPTER_NAME}"):
        assert equal(load_file(tmp_path / "refused" / file), load_file(tmp_path / "plain" / file))
