"""train_vton.py on a tiny base and a tiny drawn dataset: equalities, not file names."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import patch_environment
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import ROOT, tiny_pipe

from pipeline_vton import (
    ADAPTER_NAME,
    ADAPTER_SETTINGS,
    ClothBesideAttnProcessor,
    ClothCacheAttnProcessor,
    TryOnLatents,
    adapter_parameters,
    vton_attention,
)
from train_vton import Trainer, VitonHDDataset, draw, main, parse_args


TRAIN, TEST = 10, 4  # pairs: 5 batches of 2, 3 updates of 2 batches an epoch, the last one of a single batch


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps one state a process: every test gets a new one, on the CPU."""
    with patch_environment(ACCELERATE_USE_CPU="true"):
        yield
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


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
def data(tmp_path_factory) -> Path:
    from make_dataset import make_dataset  # `tiny` puts demo/ on the path

    root = tmp_path_factory.mktemp("data")
    make_dataset(root, TRAIN, TEST, seed=0)
    return root


@pytest.fixture
def own_data(data, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(data, tmp_path / "own"))


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
    output, _ = process.communicate(timeout=600)
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
def finished(bases, data, tmp_path_factory) -> Path:
    """The output of an uninterrupted run of 8 updates."""
    out = tmp_path_factory.mktemp("finished")
    with patch_environment(ACCELERATE_USE_CPU="true"):
        main(parse_args(flags(bases[9], data, out, report_to="tensorboard", num_validation_pairs=2, **LONG)))
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


def test_metadata_is_complete(finished, bases):
    with safe_open(finished / ADAPTER_NAME, "pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"format", "format_version", "in_channels", *ADAPTER_SETTINGS}
    assert metadata["base_model"] == str(bases[9]) and metadata["trained_steps"] == "8"
    assert (metadata["height"], metadata["width"], metadata["in_channels"]) == ("32", "24", "9")


def test_arguments_are_kept(finished, bases):
    arguments = json.loads((finished / "training_args.json").read_text())
    assert arguments["seed"] == 0 and arguments["pretrained_model_name_or_path"] == str(bases[9])


def test_reports(finished):
    events = EventAccumulator(str(finished / "logs" / "train_vton"))
    events.Reload()
    assert len(events.Scalars("loss")) == 8
    assert {"lr", "images_per_second", "probe/t500_none", "probe/t500_right", "probe/t500_wrong"} <= set(
        events.Tags()["scalars"]
    )
    assert events.Tags()["images"] == ["validation"]
    with Image.open(finished / "validation" / "step-000008.png") as grid:
        assert grid.size == (3 * 24, 2 * 32)


def test_seed_schedule(finished):
    rates = curve(finished, "lr")  # as the next step will use it
    assert rates[0] == pytest.approx(1e-2) and rates[-1] == pytest.approx(1e-6, rel=1e-3)
    assert rates == sorted(rates, reverse=True)


# ------------------------------------------------------------------------------------------------------------ the step


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
    assert trainer.settings["condition_latents"] == pipe.config.condition_latents


def test_cloth_dropout_hides_the_cloth_alone(bases, data, tmp_path):
    trainer = trainer_of(bases[9], data, tmp_path)
    batch = next(trainer.batches())
    conditioning, noisy = trainer.encode(batch), torch.randn(2, 4, 8, 6)
    timesteps = torch.tensor([300, 700])
    with torch.no_grad(), vton_attention(trainer.unet, ClothBesideAttnProcessor, "skip"):
        half = trainer.predict(conditioning, noisy, timesteps, torch.tensor([0.0, 1.0]))
        seen = trainer.predict(conditioning, noisy, timesteps, torch.ones(2))
    with torch.no_grad(), vton_attention(trainer.unet, None, "skip"):  # the person's rows alone
        unseen = trainer.unet(conditioning.person_rows(noisy), timesteps, None).sample
    assert torch.allclose(half[0], unseen[0], atol=1e-5) and not torch.allclose(half[0], seen[0], atol=1e-3)
    assert torch.allclose(half[1], seen[1], atol=1e-5)


def test_dropout_takes_its_share():
    numbers = draw(range(2000), (1,))["dropout"]
    assert 0.08 < (numbers < 0.1).float().mean() < 0.12


def test_joint_trains_the_whole_canvas(bases, data, tmp_path):
    trainer = trainer_of(bases[9], data, tmp_path, cloth_conditioning="joint", cloth_dropout=0)
    batch = next(trainer.batches())
    with torch.no_grad(), vton_attention(trainer.unet, None, "skip"):
        loss = trainer.train_step(batch)
        conditioning, drawn = trainer.encode(batch), draw(batch["seed"], (4, 8, 6))
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


# ---------------------------------------------------------------------------------------------------------- processes


def test_two_processes_equal_one_with_twice_the_batch(bases, data, tmp_path):
    options = {"max_train_steps": 6, "report_to": "tensorboard", "learning_rate": 1e-3, "lr_warmup_steps": 3}
    options |= {"cloth_dropout": 0.4, "max_grad_norm": 0.05, "checkpointing_steps": 6}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    line = flags(bases[9], data, tmp_path / "two", train_batch_size=1, **options)
    # --multi_gpu is what makes accelerate start two processes; with ACCELERATE_USE_CPU they are CPU ones, on gloo.
    finish(launch(line, "--multi_gpu", "--num_processes", "2", "--main_process_port", port))
    main(parse_args(flags(bases[9], data, tmp_path / "one", train_batch_size=2, **options)))
    assert curve(tmp_path / "two", "lr") == curve(tmp_path / "one", "lr")
    assert curve(tmp_path / "two", "loss") == pytest.approx(curve(tmp_path / "one", "loss"), abs=1e-4)
    one, two = (load_file(tmp_path / n / f"checkpoint-6/{ADAPTER_NAME}") for n in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


# --------------------------------------------------------------------------------------------------------------- data


def test_items_do_not_depend_on_who_reads_them(data):
    dataset = VitonHDDataset(data, "train", 32, 24, paired=True, seed=3)
    seeds = [dataset[i]["seed"] for i in range(TRAIN)]
    assert len(set(seeds)) == TRAIN and seeds == [dataset[i]["seed"] for i in range(TRAIN)]
    dataset.set_epoch(1)
    assert not set(seeds) & {dataset[i]["seed"] for i in range(TRAIN)}


def test_unpaired_list_trains_paired(own_data):
    lines = (own_data / "train_pairs.txt").read_text().split("\n")
    (own_data / "train_pairs.txt").write_text("00000_00.png 00003_00.png\n\n" + "\n".join(lines[1:]))
    dataset = VitonHDDataset(own_data, "train", 32, 24, paired=True)
    assert dataset[0]["name"] == "00000_00.png 00000_00.png" and len(dataset) == TRAIN


def test_masks_without_a_suffix(own_data):
    before = VitonHDDataset(own_data, "train", 32, 24, paired=True)[0]["mask"]
    for mask in (own_data / "train" / "agnostic-mask").iterdir():
        mask.rename(mask.with_name(mask.name.replace("_mask", "")))
    assert torch.equal(VitonHDDataset(own_data, "train", 32, 24, paired=True)[0]["mask"], before)


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
        VitonHDDataset(own_data, "train", 32, 24, paired=True)[0]


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"train_batch_size": 11}, "a step takes 11 pairs, and --dataset_root has 10"),
        ({"height": 33}, "`height` must be a positive multiple of 8, got 33"),
    ],
)
def test_arguments_that_do_not_fit(bases, data, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(bases[9], data, tmp_path, **changed)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"learning_rate": 0}, "--learning_rate must be positive, got 0"),
        ({"cloth_dropout": 1}, "--cloth_dropout must be at least 0 and less than 1, got 1.0"),
        ({"width": None}, "--height and --width go together"),
        ({"resume_from_checkpoint": "nowhere"}, "must be latest or a folder, got nowhere"),
    ],
)
def test_arguments_that_are_wrong(capsys, changed, message):
    with pytest.raises(SystemExit):
        parse_args(flags(Path("base"), Path("data"), Path("out"), **changed))
    assert message in capsys.readouterr().err
