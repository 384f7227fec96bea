"""train_vton.py on a tiny base and a tiny drawn dataset: equalities, not file names."""

import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import datasets
import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.tracking import GeneralTracker
from accelerate.utils import DistributedType, patch_environment
from datasets.distributed import split_dataset_by_node
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from filelock import FileLock
from huggingface_hub import HfApi
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_pictures import LINEAR
from tiny import ROOT, box_mask, lie_like_sd15_inpainting, picture, run, seeded, tiny_pipe
from torch.utils.data import DataLoader

import train_vton
from demo.make_dataset import make_dataset
from pipeline_vton import (
    ADAPTER_NAME,
    LORA_NAME,
    AdapterSettings,
    ClothBesideAttnProcessor,
    ClothCacheAttnProcessor,
    TryOnLatents,
    adapter_parameters,
    as_masks,
    as_pil,
    as_tensors,
    vton_attention,
)
from train_vton import (
    TRAINED_NAME,
    LatentCache,
    PairDataset,
    Preparation,
    StreamedPairs,
    Trainer,
    TreePairs,
    collate,
    draw,
    load_rows,
    loosen,
    main,
    noise_loss,
    open_picture,
    parent_licence,
    parse_args,
    refuse_sharding,
    row_pictures,
    to_pixels,
    to_values,
    training_size,
)


pytestmark = pytest.mark.usefixtures("fresh_accelerate")
TRAIN, TEST = (
    10,
    4,
)  # pairs of `tested`: 5 batches of 2, 3 updates of 2 batches an epoch, the last one of a single batch


@pytest.fixture(autouse=True)
def no_sleep_after_a_stream(monkeypatch):
    """`datasets` waits five seconds at the end of every epoch of shuffled parquet, whatever there was to wait for."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)


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
        "guidance_scale": 2,
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
    files = (ADAPTER_NAME, f"checkpoint-8/{TRAINED_NAME}")
    return all(equal(load_file(one / file), load_file(other / file)) for file in files)


# ----------------------------------------------------------------------------------------------------------- the base


def test_a_base_of_pickles_and_half_precision_is_trained_from_its_safetensors(bases, data, tmp_path):
    """As SD1.5-inpainting's repository is."""
    base = shutil.copytree(bases[9], tmp_path / "base")
    lie_like_sd15_inpainting(base)
    for pickled in base.glob("*/*.bin"):
        pickled.write_bytes(b"never opened")
    trainer, usual = (
        trainer_of(folder, data, tmp_path / "out", cross_attention="prompt") for folder in (base, bases[9])
    )
    for name in ("unet", "vae", "text_encoder"):
        expected = getattr(usual.pipe, name).half().float().state_dict()
        assert equal(getattr(trainer.pipe, name).state_dict(), expected)


def test_a_compiled_run_equals_a_plain_one(bases, data, tmp_path, monkeypatch):
    """By a backend that needs no C++ compiler."""
    whole, asked = torch.compile, []

    def compile(model, backend, **options):
        asked.append(backend)
        return whole(model, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", compile)
    for name, compiled in (("plain", None), ("compiled", True)):
        AcceleratorState._reset_state(reset_partial_state=True)  # which keeps the first run's backend
        GradientState._reset_state()
        main(parse_args(flags(bases[9], data, tmp_path / name, torch_compile=compiled)))
    assert asked == ["inductor"]
    plain, compiled = (load_file(tmp_path / name / ADAPTER_NAME) for name in ("plain", "compiled"))
    assert equal(plain, compiled)


# ------------------------------------------------------------------------------------------------------ interruptions


@pytest.mark.parametrize("step", [4, 6])  # in the middle of an epoch, and at the end of one
def test_resumed_run_equals_an_uninterrupted_one(finished, bases, data, tmp_path, step):
    begun = str(finished / f"checkpoint-{step}")
    main(parse_args(flags(bases[9], data, tmp_path, resume_from_checkpoint=begun, **LONG)))
    assert same_end(finished, tmp_path)


@pytest.mark.parametrize(
    "options",
    [{"mask_free": True}, {"trainable": "attention_norms"}, {"trainable": "all"}, {"lora_rank": 2}],
    ids=lambda options: "-".join(map(str, next(iter(options.items())))),
)
def test_a_resumed_run_of_another_kind_equals_an_uninterrupted_one(bases, worn_otherwise, data, tmp_path, options):
    root = worn_otherwise if "mask_free" in options else data
    main(parse_args(flags(bases[9], root, tmp_path / "whole", **LONG, **options)))
    begun = tmp_path / "whole" / "checkpoint-6"
    main(parse_args(flags(bases[9], root, tmp_path / "again", resume_from_checkpoint=begun, **LONG, **options)))
    for file in (LORA_NAME if "lora_rank" in options else ADAPTER_NAME, f"checkpoint-8/{TRAINED_NAME}"):
        assert equal(load_file(tmp_path / "whole" / file), load_file(tmp_path / "again" / file))
    assert not equal(*(load_file(folder / TRAINED_NAME) for folder in (begun, tmp_path / "again" / "checkpoint-8")))


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


def test_tensorboard_shows_every_step_once(bases, data, tmp_path):
    """Also those that a run had made and logged after its last checkpoint, as one that was killed had."""
    line = flags(bases[9], data, tmp_path, **LONG | {"report_to": "tensorboard", "checkpoints_total_limit": 0})
    main(parse_args(line))
    for later in ("checkpoint-8", "checkpoint-6"):
        shutil.rmtree(tmp_path / later)
    main(parse_args([*line, "--resume_from_checkpoint", "latest"]))
    events = EventAccumulator(str(tmp_path / "logs" / "train_vton"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 9))


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
    trainer.checkpoints.resume()
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


def test_processes_wait_for_one_another_once_an_update_after_backward(bases, data, tmp_path, monkeypatch):
    trainer, exchanges = trainer_of(bases[9], data, tmp_path, gradient_accumulation_steps=2), []
    reduce = trainer.accelerator.reduce

    def spy(*args, **kwargs):
        exchanges.append(any(parameter.grad is not None for parameter in trainer.trained))
        return reduce(*args, **kwargs)

    monkeypatch.setattr(trainer.accelerator, "reduce", spy)
    batches = trainer.batches()
    first, second = next(batches), next(batches)
    assert all(isinstance(seed, int) for seed in first["seed"])  # no device is asked for them
    with vton_attention(trainer.unet, ClothBesideAttnProcessor, "skip"):
        with torch.no_grad():
            expected = [trainer.train_step(batch).item() for batch in (first, second)]
        assert trainer.update(first) == [] and exchanges == []
        assert trainer.update(second) == expected and exchanges == [True]


def test_the_batch_that_made_no_number_is_named(bases, data, tmp_path):
    """With batches accumulated, not the update's last one."""
    trainer = trainer_of(bases[9], data, tmp_path, gradient_accumulation_steps=2)
    batches = trainer.batches()
    first, second = next(batches), next(batches)
    spoiled = first | {"cloth": torch.full_like(first["cloth"], torch.nan)}
    with vton_attention(trainer.unet, ClothBesideAttnProcessor, "skip"):
        trainer.update(spoiled)
        with pytest.raises(FloatingPointError, match=f"the loss is nan at step 1; the pairs are {first['name'][0]}"):
            trainer.update(second)


def test_rotation_keeps_the_newest(finished):
    assert sorted(path.name for path in finished.glob("*checkpoint*")) == [f"checkpoint-{i}" for i in (4, 6, 8)]


def test_latest_without_a_checkpoint_starts_fresh(bases, data, tmp_path, caplog):
    with caplog.at_level("INFO"):
        trainer = trainer_of(bases[9], data, tmp_path, resume_from_checkpoint="latest")
        trainer.checkpoints.resume()
    assert trainer.step == 0 and "no checkpoint" in caplog.text


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"trainable": "attention"}, "trainable self_attention, not with trainable attention"),
        ({"cloth_conditioning": "joint"}, "cloth_conditioning reference, not with cloth_conditioning joint"),
        ({"cross_attention": "prompt"}, "cross_attention skip, prompt None, not with cross_attention prompt"),
        ({"condition_latents": "unscaled"}, "condition_latents scaled, not with condition_latents unscaled"),
        ({"height": 64, "width": 48}, "height 32, width 24, not with height 64, width 48"),
        ({"lora_rank": 2}, "lora_rank None, not with lora_rank 2"),
        (
            {"cross_attention": "prompt", "prompt": "a shirt"},
            "cross_attention skip, prompt None, not with .*prompt a shirt",
        ),
        ({"pretrained_model_name_or_path": 8}, "base_in_channels 9, .*not with base_in_channels 8"),
    ],
)
def test_a_run_goes_on_as_what_it_is(finished, bases, data, tmp_path, changed, message):
    if "pretrained_model_name_or_path" in changed:
        changed = {"pretrained_model_name_or_path": bases[8]}
    begun = finished / "checkpoint-8"
    with pytest.raises(ValueError, match=f"--resume_from_checkpoint: .*checkpoint-8 was trained with {message}"):
        trainer_of(bases[9], data, tmp_path, resume_from_checkpoint=begun, **changed)


@pytest.mark.parametrize("other", [False, True])
def test_a_run_that_goes_on_with_other_pairs_says_so(finished, bases, own_data, tmp_path, caplog, other):
    if other:
        listed = (own_data / "train_pairs.txt").read_text().splitlines()
        (own_data / "train_pairs.txt").write_text("\n".join(listed[1:]))
    trainer_of(bases[9], own_data, tmp_path / "out", resume_from_checkpoint=finished / "checkpoint-8")
    assert ("checkpoint-8 has learnt from other pairs, and goes on with these" in caplog.text) == other


def test_a_lora_goes_on_at_its_rank(bases, data, tmp_path):
    main(parse_args(flags(bases[9], data, tmp_path / "whole", lora_rank=2)))
    begun = tmp_path / "whole" / "checkpoint-2"
    with pytest.raises(ValueError, match="was trained with lora_rank 2, not with lora_rank 3"):
        trainer_of(bases[9], data, tmp_path / "more", resume_from_checkpoint=begun, lora_rank=3)


def test_mask_free_is_not_what_masked_was(finished, bases, worn_otherwise, tmp_path):
    begun = finished / "checkpoint-8"
    with pytest.raises(ValueError, match="was trained with mask_free False, not with mask_free True"):
        trainer_of(bases[9], worn_otherwise, tmp_path, resume_from_checkpoint=begun, mask_free=True)


def test_another_base_is_not_the_checkpoints(finished, bases, data, tmp_path):
    """Of the same shapes, but another seed; or one that predicts something else, as SD2.1 and its base do."""
    base, begun = Path(shutil.copytree(bases[9], tmp_path / "base")), finished / "checkpoint-8"
    UNet2DConditionModel.from_config(base / "unet").save_pretrained(base / "unet")
    with pytest.raises(ValueError, match="checkpoint-8 was trained with base_weights .*, not with base_weights "):
        trainer_of(base, data, tmp_path / "out", resume_from_checkpoint=begun)
    shutil.copytree(bases[9] / "unet", base / "unet", dirs_exist_ok=True)
    DDPMScheduler.from_pretrained(base / "scheduler", prediction_type="v_prediction").save_pretrained(
        base / "scheduler"
    )
    with pytest.raises(ValueError, match="with prediction_type epsilon, not with prediction_type v_prediction"):
        trainer_of(base, data, tmp_path / "out", resume_from_checkpoint=begun)


def test_an_update_takes_as_many_batches_as_the_flags_of_the_resumed_run_say(finished, bases, data, tmp_path):
    """accelerate counts batches over updates, and would begin in the middle of one."""
    begun = finished / "checkpoint-4"
    trainer = trainer_of(
        bases[9], data, tmp_path, **LONG | {"gradient_accumulation_steps": 3}, resume_from_checkpoint=begun
    )
    trainer.checkpoints.resume()
    with vton_attention(trainer.unet, ClothBesideAttnProcessor, "skip"):
        losses = [trainer.update(batch) for batch in itertools.islice(trainer.batches(), 3)]
    assert [len(of_update) for of_update in losses] == [0, 0, 3]


def test_a_checkpoint_that_cannot_be_written_is_one_sentence_and_leaves_the_others(finished, bases, data, tmp_path):
    """As on a full disk."""
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    trainer = trainer_of(bases[9], data, out, **LONG, resume_from_checkpoint="latest")
    trainer.checkpoints.resume()
    trainer.step = 9
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="checkpoint-9 could not be written, and the newest is .*checkpoint-8: "):
            trainer.checkpoints.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in out.glob("*checkpoint*")) == [f"checkpoint-{i}" for i in (4, 6, 8)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_leaves_a_checkpoint(bases, data, tmp_path, number):
    """As from a terminal, timeout or a cluster: reading processes go on while the trainer finishes its update."""
    options = {
        "max_train_steps": 100_000,
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 1,
        "dataloader_num_workers": 2,
    }
    process = launch(flags(bases[9], data, tmp_path, **options), "--cpu", "--num_processes", "1")
    while process.poll() is None and not list(tmp_path.glob("checkpoint-*")):
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    (trainer,) = (child for child in children if child.ppid() == process.pid)
    for child in (trainer, *trainer.children()):
        child.send_signal(number)
    said, _ = process.communicate(timeout=240)
    step = re.search(r"stopped at step (\d+): go on with", said)
    assert step is not None and "stopping after this update" in said, said
    assert [path.name for path in tmp_path.glob("*checkpoint-*")] == [f"checkpoint-{step[1]}"]
    psutil.wait_procs(children, timeout=60)
    assert not any(child.is_running() for child in children)


def test_what_a_killed_run_left_half_written_goes(finished, bases, data, tmp_path):
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    for name in ("unfinished-checkpoint-9", "leaving-checkpoint-3"):
        (out / name).mkdir()
    trainer_of(bases[9], data, out, **LONG, resume_from_checkpoint="latest")
    assert not [path for path in out.iterdir() if "-checkpoint-" in path.name]


def test_new_rates_and_lengths_are_obeyed_from_the_first_update(finished, bases, data, tmp_path):
    changed = {"max_train_steps": 12, "learning_rate": 5e-3, "adam_weight_decay": 0.3, "ema_decay": 0.5}
    options = LONG | changed | {"lr_warmup_steps": 0, "resume_from_checkpoint": finished / "checkpoint-8"}
    trainer = trainer_of(bases[9], data, tmp_path, **options)
    trainer.checkpoints.resume()
    (group,) = trainer.optimizer.param_groups
    rate = 5e-3 * (2e-4 + (1 - 2e-4) * 0.5 * (1 + math.cos(math.pi * 8 / 12)))
    assert group["lr"] == pytest.approx(rate) and group["weight_decay"] == 0.3 and trainer.ema.decay == 0.5
    trainer.schedule.step()
    rate = 5e-3 * (2e-4 + (1 - 2e-4) * 0.5 * (1 + math.cos(math.pi * 9 / 12)))
    assert group["lr"] == pytest.approx(rate)


def test_a_finished_run_that_is_resumed_publishes(finished, bases, data, tmp_path):
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    (out / ADAPTER_NAME).unlink()
    main(parse_args(flags(bases[9], data, out, resume_from_checkpoint="latest", **LONG)))
    assert same_end(finished, out)


# --------------------------------------------------------------------------------------------- somebody else's folder


@pytest.mark.parametrize("kept", ["checkpoint-2", ADAPTER_NAME, LORA_NAME, "training_args.json"])
def test_a_used_folder_is_refused(bases, data, tmp_path, kept):
    (tmp_path / kept).mkdir() if kept == "checkpoint-2" else (tmp_path / kept).touch()
    with pytest.raises(ValueError, match=f"--output_dir .* holds {kept} of an earlier run: --resume_from_checkpoint"):
        trainer_of(bases[9], data, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [kept]


def test_a_folder_is_one_runs_until_that_ends(bases, data, tmp_path):
    """Also one whose checkpoints were to be discarded, or gone on with; and a run that ends lets the next one in."""
    out, other = tmp_path / "out", FileLock(tmp_path / "out" / ".lock")
    out.mkdir()
    (out / "checkpoint-1").mkdir()
    with other:
        for asked in ({"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}):
            with pytest.raises(SystemExit, match="--output_dir .*out is another run's, which has not ended"):
                main(parse_args(flags(bases[9], data, out, **asked)))
        assert {path.name for path in out.iterdir()} == {".lock", "checkpoint-1"}
    main(parse_args(flags(bases[9], data, out, overwrite_output_dir=True, max_train_steps=1)))
    assert other.acquire(blocking=False)
    other.release()


@pytest.mark.parametrize("kept", [ADAPTER_NAME, LORA_NAME])
def test_what_a_run_came_to_is_not_overwritten_by_latest(bases, data, tmp_path, kept):
    """Where its checkpoints were deleted; a run that was killed before its first one begins again."""
    for name in (kept, "training_args.json"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"holds {kept} of an earlier run: there is no checkpoint to go on from"):
        trainer_of(bases[9], data, tmp_path, resume_from_checkpoint="latest")
    (tmp_path / kept).unlink()
    trainer_of(bases[9], data, tmp_path, resume_from_checkpoint="latest")


def test_a_used_folder_is_used_again_if_asked(finished, bases, data, tmp_path):
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    (out / "latents").mkdir()
    main(parse_args(flags(bases[9], data, out, overwrite_output_dir=True)))
    assert {path.name for path in out.iterdir()} == {
        "checkpoint-2", ADAPTER_NAME, "training_args.json", "train_pairs.json", "latents", ".lock",
    }  # fmt: skip


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"lr_warmup_steps": 9}, "--lr_warmup_steps 9 is too much for"),
        ({"train_batch_size": 11}, "a step takes 11 pairs"),
        ({"init_adapter": "."}, "--overwrite_output_dir would discard --init_adapter"),
        ({"init_adapter": "checkpoint-4"}, "--overwrite_output_dir would discard --init_adapter"),
        ({"init_adapter": f"checkpoint-4/{ADAPTER_NAME}"}, "--overwrite_output_dir would discard --init_adapter"),
    ],
)
def test_a_run_that_is_refused_discards_nothing(finished, bases, data, tmp_path, changed, message):
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file() and file.name != "train_pairs.json"}
    if "init_adapter" in changed:
        changed = {"init_adapter": out / changed["init_adapter"]}
    with pytest.raises(ValueError, match=message):
        trainer_of(bases[9], data, out, overwrite_output_dir=True, **changed)
    assert before.items() <= {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}.items()


def test_a_cache_alone_is_no_run(bases, data, tmp_path):
    (tmp_path / "latents").mkdir()
    trainer_of(bases[9], data, tmp_path)


def test_a_run_that_goes_back_keeps_nothing_of_what_came_after(finished, bases, data, tmp_path):
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    options = LONG | {"max_train_steps": 5, "resume_from_checkpoint": out / "checkpoint-4"}
    with pytest.raises(ValueError, match="holds checkpoint-6, checkpoint-8 of an earlier run"):
        trainer_of(bases[9], data, out, **options)
    main(parse_args(flags(bases[9], data, out, overwrite_output_dir=True, **options)))
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]


def test_another_folders_checkpoint_does_not_excuse_a_used_one(finished, bases, data, tmp_path):
    (tmp_path / "training_args.json").touch()
    with pytest.raises(ValueError, match="holds training_args.json of an earlier run"):
        trainer_of(bases[9], data, tmp_path, resume_from_checkpoint=finished / "checkpoint-4")


@pytest.mark.parametrize("limit, kept", [(None, 3), (0, 4), (1, 1)])
def test_how_many_checkpoints_stay(bases, data, tmp_path, limit, kept):
    options = {"checkpoints_total_limit": limit, "checkpointing_steps": 1, "max_train_steps": 4}
    main(parse_args(flags(bases[9], data, tmp_path, **options)))
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{4 - i}" for i in range(kept)][::-1]


# -------------------------------------------------------------------------------------------------------- what is left


def test_adapter_loads_and_is_the_average(finished):
    pipe = tiny_pipe(9)
    pipe.load_vton_adapter(finished)
    loaded = {name: p.detach() for name, p in adapter_parameters(pipe.unet, "self_attention", False).items()}
    published, last = load_file(finished / ADAPTER_NAME), load_file(finished / "checkpoint-8" / TRAINED_NAME)
    assert equal(load_file(finished / "checkpoint-8" / ADAPTER_NAME), published)  # whose folder loads too
    average = torch.load(finished / "checkpoint-8" / "custom_checkpoint_1.pkl")["shadow_params"]
    assert equal(published, {name: weight.half() for name, weight in zip(loaded, average, strict=True)})
    assert equal(loaded, {name: weight.float() for name, weight in published.items()})
    assert not equal(published, {name: weight.half() for name, weight in last.items()})


def test_files_are_for_whom_new_files_are_for(finished, tmp_path):
    (tmp_path / "new").touch()
    for name in (ADAPTER_NAME, f"checkpoint-8/{TRAINED_NAME}"):
        assert (finished / name).stat().st_mode == (tmp_path / "new").stat().st_mode


def test_what_learns_is_not_rounded_first(bases, data, tmp_path):
    exact = trainer_of(bases[9], data, tmp_path / "fp32").parameters
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = trainer_of(bases[9], data, tmp_path / "bf16", mixed_precision="bf16")
    assert equal(trainer.parameters, exact) and trainer.unet.conv_out.weight.dtype is torch.bfloat16


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
    unsaid = {"eta", "prompt"}
    known = {setting.name for setting in fields(AdapterSettings)} - {"base_in_channels", *unsaid}
    assert metadata.keys() == {"format", "format_version", "in_channels", *known}
    assert metadata["scheduler_class"] == "DDPMScheduler"
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
    epochs = {"max_train_steps": None, "num_train_epochs": 10, "lr_warmup_steps": None}
    epochs |= {"gradient_accumulation_steps": 2}
    for changed, decay in (({}, 0.01), ({"adam_weight_decay": 0.1, "allow_tf32": True}, 0.1)):
        trainer = trainer_of(bases[9], data, tmp_path, **epochs, **changed)
        (group,) = trainer.optimizer.param_groups
        assert (group["betas"], group["weight_decay"], group["initial_lr"]) == ((0.9, 0.999), decay, 1e-2)
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == bool(changed)
    assert trainer.total_steps == 30
    factor = trainer.schedule.lr_lambdas[0]  # five epochs of warm-up are more than a tenth of the run
    assert [factor(step) for step in (0, 1, 2, 3)] == pytest.approx([0.1, 0.4, 0.7, 1.0]) and factor(4) < 1
    trainer = trainer_of(bases[9], data, tmp_path, **epochs | {"num_train_epochs": 100})
    factor = trainer.schedule.lr_lambdas[0]  # and less than a tenth of a longer one
    assert factor(14) < 1 and factor(15) == 1


# ------------------------------------------------------------------------------------- training and calls have one size


@pytest.mark.parametrize("asked", [None, (64, 48)])
def test_a_photograph_of_the_datas_aspect_is_worked_at_the_trained_size(bases, data, tmp_path, asked):
    size = {"height": asked and asked[0], "width": asked and asked[1]}
    main(parse_args(flags(bases[9], data, tmp_path, **size)))
    pipe, shapes = tiny_pipe(9), []
    pipe.load_vton_adapter(tmp_path)
    trained = (pipe.config.height, pipe.config.width)
    assert trained == (asked or (32, 24))  # the base's native area is 32 x 32

    def look(pipe, step, t, tensors):
        shapes.append(tuple(4 * side for side in tensors["latents"].shape[2:]))
        return tensors

    run(pipe, picture(1, 128, 96), mask=box_mask(128, 96), callback_on_step_end=look, num_inference_steps=1)
    assert shapes == [trained]


@pytest.mark.parametrize("person", [(1024, 768), (768, 1024), (1101, 825), (900, 601), (500, 500), (1200, 431)])
def test_the_default_size_is_at_rest(person):
    """Working at it, a call works at it; and it has the native area, and the aspect, as near as multiples of 8 can."""
    PartialState()  # for the log
    pipe = tiny_pipe(9)
    pipe.unet.register_to_config(sample_size=48)  # 192 x 192
    height, width = training_size(pipe, [person[::-1]], None)
    pipe.register_to_config(height=height, width=width)
    assert pipe.resolve_size(*person, None, None) == (height, width)
    assert 0.85 < height * width / 192**2 < 1.15 and abs(math.log(height / width / (person[0] / person[1]))) < 0.1


def test_the_size_is_that_of_most_persons(own_data, bases, tmp_path, caplog):
    for name in ("00000_00", "00001_00"):
        for file in (f"image/{name}.png", f"agnostic-mask/{name}_mask.png"):
            with Image.open(own_data / "train" / file) as opened:
                opened.resize((64, 48)).save(own_data / "train" / file)
    with caplog.at_level("INFO"):
        trainer = trainer_of(bases[9], own_data, tmp_path, height=None, width=None)
    assert (trainer.height, trainer.width) == (32, 24)
    assert "persons of 64 x 48 (height x width) are trained at 32 x 24" in caplog.text


def test_sizes_of_rows(bases, parquet, tmp_path):
    for streaming in (None, True):
        options = {"dataset_name": parquet, "streaming": streaming, "height": None, "width": None}
        trainer = trainer_of(bases[9], None, tmp_path, **options)
        assert (trainer.height, trainer.width) == (32, 24)


def test_other_aspects_are_refused_with_a_size_that_fits(bases, data, tmp_path, caplog):
    with pytest.raises(
        ValueError, match="--height 32 --width 32 would stretch .* 64 x 48 .*: --height 32 --width 24 fits"
    ):
        trainer_of(bases[9], data, tmp_path, height=32, width=32)
    trainer = trainer_of(bases[9], data, tmp_path, height=120, width=88)  # 2 % off
    assert (trainer.height, trainer.width) == (120, 88) and "a call" not in caplog.text
    trainer_of(bases[9], data, tmp_path, height=128, width=104)  # 8 %
    assert "trained at 128 x 104, while a call that names no size works at" in caplog.text


def test_validation_is_a_call_as_users_make_it(finished, bases, tested, tmp_path):
    trainer = trainer_of(bases[9], tested, tmp_path, resume_from_checkpoint=finished / "checkpoint-8", **LONG)
    trainer.checkpoints.resume()
    pipe, (person, cloth, mask) = (
        tiny_pipe(9),
        (picture(1, 48, 64), picture(2), box_mask(48, 64)),
    )  # not the data's aspect
    pipe.load_vton_adapter(finished)
    with trainer.published_weights():
        (shown,) = trainer.validation.try_on(person, cloth, mask, generator=seeded(), num_inference_steps=2)
    called = pipe(person, cloth, mask, generator=seeded(), num_inference_steps=2).images[0]
    difference = np.asarray(shown).astype(int) - np.asarray(called)
    assert shown.size == (64, 48) and abs(difference).max() <= 1


@pytest.mark.parametrize("mode", ["reference", "joint"])
def test_what_is_shown_no_cloth_reads_no_text(bases, data, tmp_path, mode):
    """As the unconditional branch of a call; the others read theirs."""
    options = {"cross_attention": "prompt", "prompt": "a shirt", "cloth_conditioning": mode}
    trainer = trainer_of(bases[9], data, tmp_path, **options)
    conditioning = trainer.latents(next(trainer.batches()))[0]
    noisy = torch.randn(2, 4, 8 if mode == "reference" else 16, 6)
    timesteps, seen = torch.tensor([300, 700]), torch.tensor([0.0, 1.0])
    processor = ClothBesideAttnProcessor if mode == "reference" else None

    def predict(*texts: str) -> torch.Tensor:
        with torch.no_grad(), vton_attention(trainer.unet, processor, "prompt"):
            return trainer.predict(conditioning, noisy, timesteps, seen, list(texts) or None)

    told = predict()
    assert torch.allclose(told, predict("zebra", "a shirt"), atol=1e-5)
    assert not torch.allclose(told[1], predict("a shirt", "zebra")[1], atol=1e-3)
    if mode == "reference":
        with torch.no_grad(), vton_attention(trainer.unet, None, "prompt"):
            unseen = trainer.unet(conditioning.person_rows(noisy), timesteps, trainer.embed(["", ""])).sample
        assert torch.allclose(told[0], unseen[0], atol=1e-5)


# -------------------------------------------------------------------------------------------------- looking at the run


def test_validation_stops_nothing(finished, bases, tested, tmp_path, caplog):
    """Neither a try-on that fails, nor a full disk, nor a tracker; the checkpoint is there before, the weights are untouched."""
    trainer = trainer_of(bases[9], tested, tmp_path, num_validation_pairs=2, validation_steps=4, **LONG)
    (name, pictures), other = trainer.validation.tryons
    trainer.validation.tryons = [(name, pictures | {"mask": picture(1, 10, 10)}), other]
    trainer.accelerator.trackers.append(BrokenTracker())
    (tmp_path / "validation").touch()  # no folder can be made
    saved, run = [], trainer.validation.run
    trainer.validation.run = lambda: saved.append((tmp_path / f"checkpoint-{trainer.step}").is_dir()) or run()
    assert trainer.run()
    assert saved == [True] * 2 and same_end(finished, tmp_path)
    for what in (f"trying on {name} failed", "validation failed", "the tracker failed"):
        assert f"{what}, and training goes on: " in caplog.text
    (tmp_path / "validation").unlink()
    caplog.clear()
    with vton_attention(trainer.unet, ClothBesideAttnProcessor, "skip"):
        trainer.validation.run()
    assert f"trying on {name} failed" in caplog.text and "tracking " in caplog.text
    with Image.open(tmp_path / "validation" / "step-000008.png") as grid:
        assert grid.size == (3 * 24, 32)  # the other is shown


class BrokenTracker(GeneralTracker):
    name, requires_logging_directory, tracker, main_process_only = "tensorboard", False, None, True

    def log(self, *args, **kwargs) -> None:
        raise ConnectionError("the server is gone")

    log_images = store_init_configuration = finish = log


@pytest.fixture
def encodings(monkeypatch) -> list[int]:
    """How many pictures at once the VAE is asked to encode."""
    counts, encode = [], AutoencoderKL.encode
    monkeypatch.setattr(AutoencoderKL, "encode", lambda vae, x, *rest: counts.append(len(x)) or encode(vae, x, *rest))
    return counts


@pytest.mark.parametrize("mode", ["reference", "joint"])
def test_probes_are_encoded_once_and_never_more_at_a_time_than_in_training(bases, tested, tmp_path, encodings, mode):
    errors = []
    for size in (1, 3, 4):
        trainer = trainer_of(bases[9], tested, tmp_path, train_batch_size=size, cloth_conditioning=mode)
        assert encodings and max(encodings) <= size
        encodings.clear()
        rows, processor = [], ClothBesideAttnProcessor if mode == "reference" else None
        trainer.unet.register_forward_pre_hook(lambda unet, inputs, rows=rows: rows.append(len(inputs[0])))
        with vton_attention(trainer.unet, processor, "skip"):
            errors.append(trainer.validation.run())
        assert not encodings and max(rows) <= (2 * size if processor else size)
    assert len({round(error, 5) for error in errors[0].values()}) == 9  # three cloths, three timesteps
    assert all(errors[0] == pytest.approx(other, rel=1e-4) for other in errors[1:])


def test_masks_that_vanish_are_not_probed(bases, own_data, tmp_path, caplog):
    for n in range(TEST):
        if n == 2:
            with caplog.at_level("INFO"):
                validation = trainer_of(bases[9], own_data, tmp_path).validation
            assert len(validation.probes["seed"]) == TEST - 2 and np.isfinite(list(validation.run().values())).all()
            assert "vanishes at the latents' size: 00000_00.png 00000_00.png, 00001_00.png 00001_00.png" in caplog.text
        dot = Image.new("L", (48, 64))
        dot.putpixel((7, 7), 255)
        dot.save(own_data / f"test/agnostic-mask/{n:05d}_00_mask.png")
    assert trainer_of(bases[9], own_data, tmp_path).validation.probes is None


@pytest.mark.parametrize("options", [{}, {"mask_free": True}, {"cross_attention": "prompt", "prompt": "a shirt"}])
def test_the_guidance_that_suits_best_is_recommended(
    bases, worn_otherwise, tested, tmp_path, monkeypatch, caplog, options
):
    monkeypatch.setattr(train_vton, "GUIDANCE_SCALES", (1, 3))
    monkeypatch.setattr(train_vton, "GUIDANCE_STEPS", 2)
    data = worn_otherwise if "mask_free" in options else tested
    line = flags(bases[9], data, tmp_path / "out", guidance_scale=None, ema_decay=0, train_batch_size=3, **options)
    trainer = Trainer(parse_args(line))
    with caplog.at_level("INFO"):
        assert trainer.run()
    errors = trainer.validation.guidance_errors
    best = min(errors, key=errors.get)
    assert errors.keys() == {1, 3} and errors[1] != errors[3] and f"{best} is recommended" in caplog.text
    pipe = tiny_pipe(9, text=True)
    pipe.load_vton_adapter(tmp_path / "out")
    assert pipe.config.guidance_scale == best

    size, total, masked = {"height": 32, "width": 24}, 0.0, 0.0  # the same by hand
    for item in map(to_values, tree(data, "test", roles=trainer.roles, condition_folder="condition")):
        person = item["condition"] if "mask_free" in options else item["person"]
        mask = None if "mask_free" in options else item["mask"]
        said = {"generator": seeded(item["seed"]), "prompt": options.get("prompt"), "num_inference_steps": 2}
        shown = {"guidance_scale": 3.0, "composite": False, "output_type": "pt"}
        result = pipe(person / 2 + 0.5, item["cloth"] / 2 + 0.5, mask, **size, **said, **shown).images[0]
        total += ((result - item["person"] / 2 - 0.5).square() * item["mask"]).sum().item()
        masked += 3 * item["mask"].sum().item()
    assert errors[3] == pytest.approx(total / masked, rel=2e-2)


def test_guidance_that_is_said_or_unknown(finished, bases, data, tmp_path, caplog):
    with safe_open(finished / ADAPTER_NAME, "pt") as file:
        assert file.metadata()["guidance_scale"] == "2.0"
    with caplog.at_level("INFO"):
        main(parse_args(flags(bases[9], data, tmp_path, guidance_scale=None)))
    with safe_open(tmp_path / ADAPTER_NAME, "pt") as file:
        assert file.metadata()["guidance_scale"] == "7.5"
    assert "guidance 7.5 is recommended" in caplog.text


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
        settings = {"condition_latents": "unscaled" if channels == 8 else "scaled", "dtype": None}
        conditioning = TryOnLatents(
            **TryOnLatents.encode_person(pipe.vae, batch["person"], batch["mask"], mask_free=False, **settings),
            **TryOnLatents.encode_cloth(pipe.vae, batch["cloth"], **settings),
            channels=pipe.unet.config.in_channels,
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
    whole, parts = (load_file(tmp_path / name / f"checkpoint-2/{TRAINED_NAME}") for name in ("whole", "parts"))
    assert all(torch.allclose(whole[name], parts[name], atol=1e-5) for name in whole)


def test_an_epochs_last_update_averages_the_batches_that_it_has(bases, data, tmp_path):
    """Of five batches the third update of two has one alone; nothing moves meanwhile."""
    norms = []
    for count in (1, 2):
        options = {"gradient_accumulation_steps": count, "learning_rate": 1e-20, "max_train_steps": 10 // count}
        trainer = trainer_of(bases[9], data, tmp_path, **options)
        batches = trainer.batches()
        with vton_attention(trainer.unet, ClothBesideAttnProcessor, "skip"):
            for _ in range(5):
                trainer.update(next(batches))
        norms.append(trainer.grad_norm)
    assert trainer.step == 3 and norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_training_in_another_thread(bases, data, tmp_path):
    thread = threading.Thread(target=main, args=(parse_args(flags(bases[9], data, tmp_path)),))
    thread.start()
    thread.join()
    assert (tmp_path / ADAPTER_NAME).exists()


@pytest.mark.parametrize(("name", "warmup"), [("default", 3), ("linear", 3), ("polynomial", 2)])
def test_a_warmup_that_leaves_nothing_of_the_run_is_refused(bases, data, tmp_path, name, warmup):
    with pytest.raises(
        ValueError, match=f"{warmup} is too much for --lr_scheduler {name} and the 2 updates of the run"
    ):
        trainer_of(bases[9], data, tmp_path, lr_scheduler=name, lr_warmup_steps=warmup)


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


def test_min_snr_weighs_pure_noise():
    """Betas of zero terminal SNR: what predicts noise there learns it whole, and velocities have nothing to tell."""
    errors = torch.tensor([3.0, 5.0]).sqrt().view(2, 1, 1, 1)
    for prediction_type, expected in (("epsilon", 3 / 2), ("v_prediction", 0)):
        scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type=prediction_type)
        timesteps = torch.tensor([999, 0])
        loss = noise_loss(scheduler, errors, torch.zeros_like(errors), timesteps, 5.0)
        snr = (scheduler.alphas_cumprod[0] / (1 - scheduler.alphas_cumprod[0])).item()
        assert scheduler.alphas_cumprod[-1] == 0
        assert loss.item() == pytest.approx(expected + 5 * 5 / (snr + (prediction_type != "epsilon")) / 2, rel=1e-5)


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


def save_teacher(folder: Path, **settings) -> Path:
    tiny_pipe(9, seed=5, **settings).save_vton_adapter(folder)
    return folder


def test_distillation_needs_a_teacher(bases, data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_args(flags(bases[9], data, tmp_path, guidance_distillation=2))
    assert "--guidance_distillation 2 learns from an adapter: give --init_adapter" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["reference", "joint"])
def test_distillation_learns_the_guided_noise_of_where_it_began(bases, data, tmp_path, mode):
    options = {"cloth_conditioning": mode, "cloth_dropout": 0, "learning_rate": 1e-3, "guidance_scale": None}
    options["init_adapter"] = save_teacher(tmp_path / "teacher", cloth_conditioning=mode)
    losses, trainers = {}, {}
    for scale in (1, 3):
        trainer = trainers[scale] = trainer_of(
            bases[9], data, tmp_path / "out", guidance_distillation=scale, **options
        )
        assert trainer.settings.guidance_scale == 1
        batch = next(trainer.batches())
        processor = ClothBesideAttnProcessor if mode == "reference" else None
        with vton_attention(trainer.unet, processor, "skip"):
            with torch.no_grad():
                losses[scale] = trainer.train_step(batch).item()
            if scale == 3:
                begun = [weight.clone() for weight in trainer.teacher]
                (first,), (again,) = trainer.update(batch), trainer.update(batch)
                assert first == losses[3] and again < first  # the same noise, once learnt
                assert all(map(torch.equal, trainer.teacher, begun))
                assert not all(map(torch.equal, trainer.trained, begun))
    assert losses[1] < 1e-9  # guidance 1 is what it sees already
    trainer = trainers[1]  # nothing has moved
    with torch.no_grad(), vton_attention(trainer.unet, processor, "skip"):
        conditioning, mean, std = trainer.latents(batch)
        drawn = draw(batch["seed"], mean.shape[1:])
        clean = (mean + std * drawn["posterior"]) * trainer.vae.config.scaling_factor
        clean, noise = trainer.on_canvas(conditioning, clean, drawn)
        timesteps = (drawn["time"] * 1000).long()
        noisy, seen = trainer.noise_scheduler.add_noise(clean, noise, timesteps), torch.ones(len(mean))
        without, with_cloth = (trainer.predict(conditioning, noisy, timesteps, s) for s in (0 * seen, seen))
        # u + 3 (c - u), learnt by c, is off by 2 (c - u)
        assert losses[3] == pytest.approx((2 * (with_cloth - without)).square().mean().item(), rel=1e-4)


def test_a_distillation_goes_on_with_the_teacher_that_it_had(bases, data, tmp_path):
    options = {"guidance_distillation": 2, "max_train_steps": 4, "checkpointing_steps": 2, "cloth_dropout": 0.4}
    options["init_adapter"] = save_teacher(tmp_path / "teacher")
    main(parse_args(flags(bases[9], data, tmp_path / "whole", **options)))
    begun = tmp_path / "whole" / "checkpoint-2"
    main(parse_args(flags(bases[9], data, tmp_path / "again", resume_from_checkpoint=begun, **options)))
    assert equal(load_file(tmp_path / "whole" / ADAPTER_NAME), load_file(tmp_path / "again" / ADAPTER_NAME))
    with pytest.raises(ValueError, match="trained with guidance_distillation 2.0, not with guidance_distillation 3.0"):
        changed = options | {"guidance_distillation": 3}
        trainer_of(bases[9], data, tmp_path / "more", resume_from_checkpoint=begun, **changed)
    other = tmp_path / "whole" / ADAPTER_NAME
    with pytest.raises(ValueError, match="was trained with init_adapter .*, not with init_adapter "):
        changed = options | {"init_adapter": other}
        trainer_of(bases[9], data, tmp_path / "more", resume_from_checkpoint=begun, **changed)


def test_lora_has_no_widened_conv_in(bases, data, tmp_path):
    with pytest.raises(ValueError, match="--lora_rank cannot train the conv_in"):
        trainer_of(bases[4], data, tmp_path, lora_rank=4)


# ---------------------------------------------------------------------------------------------------------- processes


def test_sharded_weights_are_refused():
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        with pytest.raises(ValueError, match=f"configured for {kind.value}"):
            refuse_sharding(kind)
    refuse_sharding(DistributedType.MULTI_GPU)


def everything_drawn(folder: Path, category: str) -> Path:
    make_dataset(folder, train=4, test=2, seed=0, height=64, category=category)
    return folder


@pytest.mark.parametrize("kind", ["plain", "distilled", "outfits and poses", "mask-free and cached"])
def test_two_processes_equal_one_with_twice_the_batch(bases, data, tmp_path, kind):
    options = {"max_train_steps": 7, "report_to": "tensorboard", "learning_rate": 1e-3, "lr_warmup_steps": 3}
    options |= {"cloth_dropout": 0.4, "max_grad_norm": 0.05, "checkpointing_steps": 7}
    if kind == "distilled":
        options |= {"init_adapter": save_teacher(tmp_path / "teacher"), "guidance_distillation": 2}
    if kind == "outfits and poses":
        data = everything_drawn(tmp_path / "drawn", "outfit")
        options |= {"num_cloths": 2, "pose": True, "trainable": "attention_norms", "gradient_checkpointing": True}
    if kind == "mask-free and cached":
        data = everything_drawn(tmp_path / "drawn", "upper")
        options |= {"mask_free": True, "cache_latents": tmp_path / "latents", "trainable": "all"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    line = flags(bases[9], data, tmp_path / "two", train_batch_size=1, **options)
    # --multi_gpu is what makes accelerate start two processes; with ACCELERATE_USE_CPU they are CPU ones, on gloo.
    finish(launch(line, "--multi_gpu", "--num_processes", "2", "--main_process_port", port))
    main(parse_args(flags(bases[9], data, tmp_path / "one", train_batch_size=2, **options)))
    assert curve(tmp_path / "two", "lr") == curve(tmp_path / "one", "lr")
    assert curve(tmp_path / "two", "loss") == pytest.approx(curve(tmp_path / "one", "loss"), abs=1e-4)
    one, two = (load_file(tmp_path / n / f"checkpoint-7/{TRAINED_NAME}") for n in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


# --------------------------------------------------------------------------------------------------------------- data


def test_items_do_not_depend_on_who_reads_them(data):
    dataset = tree(data, seed=3)
    seeds = [dataset[i]["seed"] for i in range(TRAIN)]
    assert len(set(seeds)) == TRAIN and seeds == [dataset[i]["seed"] for i in range(TRAIN)]
    dataset.set_epoch(1)
    later = [dataset[i]["seed"] for i in range(TRAIN)]
    assert not set(seeds) & set(later)
    staying = DataLoader(dataset, batch_size=5, collate_fn=collate, num_workers=1, persistent_workers=True)
    for epoch, expected in ((0, seeds), (1, later)):  # a reading process that outlasts an epoch
        dataset.set_epoch(epoch)
        assert [seed for batch in staying for seed in batch["seed"]] == expected


def test_pixels_are_those_of_diffusers_processor():
    rgb, grey = picture(1, 48, 40), Image.linear_gradient("L").resize((40, 48))
    images, masks = (
        VaeImageProcessor(),
        VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True),
    )
    for size in ((48, 40), (32, 24)):
        pixels = to_pixels(rgb, *size)
        assert pixels.dtype == torch.uint8  # what reading processes send
        assert torch.equal(to_values({"person": pixels})["person"], images.preprocess(rgb, *size)[0])
        assert torch.equal(to_pixels(grey, *size), masks.preprocess(grey, *size)[0])


@pytest.mark.parametrize("kind", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "F"])
def test_pictures_are_opened_as_the_pipeline_reads_them(kind):
    ramp = Image.linear_gradient("L").resize((24, 32))
    image = {"I;16": lambda: Image.fromarray(np.asarray(ramp).astype(np.uint16) * 257)}.get(
        kind, lambda: ramp.convert(kind)
    )()
    if kind == "RGBA":
        image.putalpha(ramp.rotate(180))
    read = as_pil(as_tensors(image, "image")[0])
    opened = open_picture(lambda: image, "image", "person")
    assert opened.mode == "RGB" and np.array_equal(np.asarray(opened), np.asarray(read))
    black_and_white = ramp.point([0] * 120 + [255] * 136)
    mask = black_and_white.convert(kind) if kind not in {"RGBA", "I;16"} else black_and_white
    read = as_pil(as_masks(mask, "mask")[0])
    opened = open_picture(lambda: mask, "mask", "mask")
    assert opened.mode == "L" and np.array_equal(np.asarray(opened), np.asarray(read))


# ---- lists


def relist(root: Path, change: Callable[[list[str]], list[str]], name: str = "train_pairs.txt") -> None:
    """Change the lines of a list."""
    (root / name).write_text("\n".join(change((root / name).read_text().split("\n"))))


def test_a_training_list_says_who_wears_what(own_data):
    relist(own_data, lambda lines: ["00000_00.png 00003_00.png", "", *lines[1:]])
    dataset = tree(own_data)
    assert dataset[0]["name"] == "00000_00.png 00003_00.png" and len(dataset) == TRAIN
    assert torch.equal(dataset[0]["cloth"], dataset[3]["cloth"]) and dataset[1]["name"] == "00001_00.png 00001_00.png"


def test_a_long_shuffled_list_trains_everybody_in_their_own(own_data, monkeypatch, caplog):
    """As VITON-HD's training lists on the web are."""
    own = [tree(own_data)[i]["cloth"] for i in range(TRAIN)]
    relist(own_data, lambda lines: [f"{i:05d}_00.png {(i + 1) % TRAIN:05d}_00.png" for i in range(TRAIN)])
    assert torch.equal(tree(own_data)[0]["cloth"], own[1])  # a short one is meant as it stands
    monkeypatch.setattr(train_vton, "SHUFFLED_FROM", TRAIN)
    assert all(torch.equal(item["cloth"], cloth) for item, cloth in zip(tree(own_data), own))
    assert "pairs hardly anybody with their own cloth" in caplog.text
    (own_data / "train_pairs.txt").rename(own_data / "train_pairs_paired.txt")
    assert torch.equal(tree(own_data)[0]["cloth"], own[1])
    (own_data / "train_pairs_paired.txt").rename(own_data / "train_pairs.txt")
    (own_data / "train/cloth/00000_00.png").rename(own_data / "train/cloth/shirt.png")  # then names say nothing
    relist(own_data, lambda lines: [line.replace(" 00000_00", " shirt") for line in lines])
    assert torch.equal(tree(own_data)[0]["cloth"], own[1])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_as_editors_write_them(own_data, encoding):
    """A byte-order mark, Windows' line ends, letters beyond ASCII, and names with spaces."""
    images = own_data / "train" / "image"
    (images / "00000_00.png").rename(images / "zoë mit hut.png")
    (own_data / "train/agnostic-mask/00000_00_mask.png").rename(own_data / "train/agnostic-mask/zoë mit hut_mask.png")
    lines = (own_data / "train_pairs.txt").read_text().split("\n")
    lines[0] = "zoë mit hut.png\t00000_00.png"
    (own_data / "train_pairs.txt").write_bytes("\r\n".join(lines).encode(encoding))
    assert tree(own_data)[0]["name"] == "zoë mit hut.png 00000_00.png" and len(tree(own_data)) == TRAIN


def test_a_list_in_another_encoding_is_named(own_data):
    (own_data / "train_pairs.txt").write_bytes("00000_00.png 00000_00.png\nzoë.png x.png".encode("latin-1"))
    with pytest.raises(ValueError, match="train_pairs.txt, line 2: is not UTF-8"):
        tree(own_data)


OTHERS = "".join(f"{i:05d}_00.png {(i + 1) % TEST:05d}_00.png\n" for i in range(TEST))
OWN = "".join(f"{i:05d}_00.png {i:05d}_00.png\n" for i in range(TEST))


@pytest.mark.parametrize(
    "lists",
    [
        {"_unpaired": OTHERS},
        {"_paired": OWN},
        {"": OTHERS},
        {"": OWN},  # as one repack of VITON-HD has it
        {"_paired": OWN, "_unpaired": OTHERS, "": "wrong wrong"},
    ],
)
def test_one_test_list_is_enough(own_data, lists):
    (own_data / "test_pairs.txt").unlink()
    for kind, lines in lists.items():
        (own_data / f"test_pairs{kind}.txt").write_text(lines)
    paired, unpaired = (tree(own_data, "test", paired).pairs for paired in (True, False))
    assert [paired.name(i) for i in range(TEST)] == OWN.split("\n")[:-1]
    assert [unpaired.name(i) for i in range(TEST)] == OTHERS.split("\n")[:-1]


def test_cloths_with_names_of_their_own(bases, own_data, tmp_path, caplog):
    """Only a list that says so can pair such test persons with what they wear."""
    for cloth in (own_data / "test" / "cloth").iterdir():
        cloth.rename(cloth.with_name(f"shirt {cloth.name}"))
    lines = [f"{i:05d}_00.png\tshirt {i:05d}_00.png" for i in range(TEST)]
    (own_data / "test_pairs.txt").write_text("\n".join(lines))
    with caplog.at_level("INFO"):
        validation = trainer_of(bases[9], own_data, tmp_path, num_validation_pairs=1).validation
    assert validation.probes is None and len(validation.tryons) == 1
    assert "nothing is probed" in caplog.text and "test_pairs_paired.txt" in caplog.text
    (own_data / "test_pairs.txt").rename(own_data / "test_pairs_paired.txt")
    assert len(trainer_of(bases[9], own_data, tmp_path).validation.probes["seed"]) == TEST


def test_a_test_split_that_cannot_be_read_stops_no_training(bases, own_data, tmp_path, caplog):
    shutil.rmtree(own_data / "test" / "agnostic-mask")
    trainer = trainer_of(bases[9], own_data, tmp_path / "out", num_validation_pairs=1)
    assert trainer.validation.probes is None and not trainer.validation.tryons
    assert "nothing is probed" in caplog.text and "no cloth is tried on test persons" in caplog.text
    assert trainer.run()


def test_a_limit_takes_pairs_of_all_lists(dress_code):
    pairs = TreePairs(dress_code, "train", True, limit=3)
    assert {Path(files["person"]).parts[-3] for _, _, files in pairs.pairs} == {"upper_body", "lower_body", "dresses"}


def test_one_category_alone_is_trained_and_tried_on(bases, dress_code, own_data, tmp_path):
    trainer = trainer_of(bases[9], dress_code, tmp_path, category="upper_body", num_validation_pairs=2)
    read = [files["person"] for _, _, files in trainer.pairs.pairs]
    assert read and {file.parts[-3] for file in read} == {"upper_body"}
    persons = {
        line.split()[0] for line in (dress_code / "upper_body/test_pairs_unpaired.txt").read_text().splitlines()
    }
    assert {name.split()[0] for name, _ in trainer.validation.tryons} <= persons
    with pytest.raises(FileNotFoundError, match="category 'lower_body' needs the folder"):
        TreePairs(own_data, "train", True, category="lower_body")


def test_cloths_are_trained_in_their_persons_colours(own_data):
    """As a call shows them to the UNet."""
    before, cloth = tree(own_data)[0], own_data / "train/cloth/00000_00.png"
    with Image.open(cloth) as opened:
        opened.save(cloth, icc_profile=LINEAR)
    after = tree(own_data)[0]
    assert torch.equal(after["person"], before["person"])
    pipe = tiny_pipe(9)
    (profiled,) = pipe.check_inputs(*(Image.open(own_data / f"train/{file}") for file in (
        "image/00000_00.png", "cloth/00000_00.png", "agnostic-mask/00000_00_mask.png")),
        "upper", 32, 24, None).cloths  # fmt: skip
    assert torch.equal(
        after["cloth"], Preparation(32, 24)({"person": as_pil(profiled), "cloth": as_pil(profiled)}, 0, 0)["cloth"]
    )
    assert (after["cloth"].int() - before["cloth"].int()).abs().max() > 12


@pytest.mark.parametrize("kind", ["alpha", "photograph", "grey"])
def test_masks_are_what_the_pipeline_takes_for_masks(own_data, kind):
    file = own_data / "train/agnostic-mask/00000_00_mask.png"
    mask, before = Image.open(file).convert("L"), tree(own_data)[0]["mask"]
    if kind == "alpha":  # white strokes, as a browser draws them
        white = Image.new("L", mask.size, 255)
        Image.merge("LA", (white, mask)).save(file)
        assert torch.equal(tree(own_data)[0]["mask"], before)
        return
    spoilt = picture(1, 64, 48) if kind == "photograph" else Image.eval(mask, lambda value: value // 2 + 64)
    spoilt.save(file)
    with pytest.raises(
        ValueError, match="train_pairs.txt, line 1: .*00000_00_mask.png` must be a black and white mask"
    ):
        tree(own_data)


# ---- what is learnt of the files


def test_files_are_opened_once(own_data, tmp_path, monkeypatch):
    opened, index = [], tmp_path / "index.json"
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda file, *rest: opened.append(file) or real(file, *rest))

    def look(**options) -> TreePairs:
        opened.clear()
        return TreePairs(own_data, "train", True, index=index, **options)

    first = look()
    assert len(opened) == 3 * TRAIN
    again = look()
    assert not opened
    os.utime(own_data / "train/cloth/00003_00.png", (0, 0))
    assert look().identity() != first.identity() and len(opened) == 1
    (own_data / "train_pairs.txt").unlink()  # another process has looked, and is believed
    other = look(checked=True)
    assert not opened and other.pairs == again.pairs and other.person_sizes() == again.person_sizes()
    with pytest.raises(FileNotFoundError):
        look()


@pytest.mark.parametrize("split", ["train", "test"])
def test_black_masks_are_found_at_the_start(bases, own_data, tmp_path, split):
    mask = own_data / split / "agnostic-mask/00001_00_mask.png"
    Image.new("L", Image.open(mask).size).save(mask)
    with pytest.raises(ValueError, match=f"_pairs.txt, line 2: .*{mask.name}` must be white where the cloth goes"):
        trainer_of(bases[9], own_data, tmp_path)


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
            lists = {"_paired": persons, "_unpaired": others} if split == "test" else {"": persons}
            for end, cloths in lists.items():
                lines = "".join(f"{one}_0.png\t{other}_1.png\n" for one, other in zip(persons, cloths))
                (root / folder / f"{split}_pairs{end}.txt").write_text(lines)
    return root


def test_dress_code_is_recognised(data, dress_code):
    viton, dresses = tree(data), tree(dress_code)
    assert len(dresses) == TRAIN
    by_name = {dresses[i]["name"]: dresses[i] for i in range(TRAIN)}
    for n in range(TRAIN):
        item = by_name[f"{n:06d}_0.png {n:06d}_1.png"]
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
    before, items = to_values(plain(pictures, 0, 0)), [to_values(moved(pictures, 0, i)) for i in range(8)]
    for item in items:
        assert ((item["person"][:1] > 0) == (item["mask"] > 0.5)).float().mean() > 0.98
    assert len({item["person"].mean().item() for item in items}) == 8
    assert torch.equal(to_values(moved(pictures, 0, 3))["person"], items[3]["person"])  # drawn for this pair and epoch
    mirrored = [to_values(flipped(pictures, 0, i)) for i in range(8)]
    assert {torch.equal(item["person"], before["person"].flip(-1)) for item in mirrored} == {True, False}
    assert all(torch.equal(item["person"], item["cloth"]) for item in mirrored)

    gray = {"person": Image.new("RGB", (240, 320), (50, 120, 255)), "mask": mask}
    item = to_values(colored(gray | {"cloth": gray["person"]}, 0, 0))
    colors = item["person"].mean(dim=(1, 2)), item["cloth"].mean(dim=(1, 2))
    assert (
        torch.equal(*colors) and colors[0][2] == 1 and not torch.allclose(colors[0][0], torch.tensor(50 / 127.5 - 1))
    )
    assert torch.equal(item["mask"], before["mask"])


def test_loosened_masks_hold_the_mask_and_tell_less_of_its_shape():
    mask = torch.zeros(1, 64, 48)
    mask[:, 20:40, 10:16] = mask[:, 34:40, 10:36] = 1  # an L
    rng = np.random.default_rng(0)
    loosened = [loosen(mask, rng) for _ in range(30)]
    assert all((one >= mask).all() and set(one.unique().tolist()) == {0.0, 1.0} for one in loosened)
    assert all(not one[0, :16].any() and not one[0, 44:].any() and not one[0, :, :6].any() for one in loosened)
    assert 8 < len({one.sum().item() for one in loosened}) and any(one[0, 21, 34] for one in loosened)
    assert 8 < sum(torch.equal(one, mask) for one in loosened) < 22  # every other one stays
    assert not loosen(torch.zeros(1, 64, 48), rng).any()


def test_loosening_touches_the_mask_alone_and_is_drawn_for_the_pair():
    pictures = {role: picture(i, 64, 48) for i, role in enumerate(("person", "cloth"))} | {"mask": box_mask(64, 48)}
    plain, loosened = Preparation(64, 48, augment=("color",)), Preparation(64, 48, augment=("color", "mask"))
    masks = []
    for i in range(12):
        before, after = plain(pictures, 0, i), loosened(pictures, 0, i)
        assert torch.equal(after["mask"], loosened(pictures, 0, i)["mask"])
        assert all(torch.equal(after[role], before[role]) for role in ("person", "cloth"))
        masks.append(after["mask"].sum().item())
    assert len(set(masks)) > 3 and min(masks) >= before["mask"].sum()


@pytest.fixture
def worn_otherwise(own_data) -> Path:
    """A dataset with the persons in other cloths: here, other persons."""
    for split, count in (("train", TRAIN), ("test", TEST)):
        (own_data / split / "condition").mkdir(exist_ok=True)
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


def test_mask_free_needs_the_person_in_another_cloth(bases, own_data, tmp_path):
    shutil.rmtree(own_data / "train" / "condition")  # as photograph sets have none
    with pytest.raises(FileNotFoundError, match="train_pairs.txt, line 1: there is no train/condition/00000_00.png"):
        trainer_of(bases[9], own_data, tmp_path / "out", mask_free=True)


def test_cached_latents_train_the_same(bases, own_data, tmp_path, monkeypatch):
    monkeypatch.setattr(LatentCache, "SHARD", 4)
    options = {"max_train_steps": 7, "checkpointing_steps": 7, "cloth_dropout": 0.4}
    main(parse_args(flags(bases[9], own_data, tmp_path / "plain", **options)))
    cached = flags(bases[9], own_data, tmp_path / "cached", cache_latents=tmp_path / "latents", **options)
    main(parse_args(cached))
    one, two = (load_file(tmp_path / n / f"checkpoint-7/{TRAINED_NAME}") for n in ("plain", "cached"))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)

    shards = sorted((tmp_path / "latents").glob("*/*.safetensors"))
    assert len(shards) == 3
    written = [shard.stat().st_mtime_ns for shard in shards]
    content = load_file(shards[1])
    shards[1].unlink()
    again = [str(tmp_path / "again") if word == str(tmp_path / "cached") else word for word in cached]
    Trainer(parse_args(again))  # fills the gap and leaves the rest
    assert equal(load_file(shards[1]), content)
    assert [shard.stat().st_mtime_ns for shard in (shards[0], shards[2])] == [written[0], written[2]]

    for change in ("size", "picture", "settings"):
        changed = {
            "size": ["--height", "64", "--width", "48"],
            "settings": ["--condition_latents", "unscaled"],
            "picture": [],
        }[change]
        if change == "picture":
            os.utime(own_data / "train/cloth/00003_00.png", (0, 0))
        Trainer(parse_args([*again, *changed]))
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
        case "beside":  # of the condition, it would be the person as they are
            (root / "train_pairs.txt").write_text("../image/00000_00.png 00001_00.png\n")
        case "absolute":
            (root / "train_pairs.txt").write_text(f"{root}/train/image/00000_00.png 00001_00.png\n")
        case "corrupt":
            (root / "train/image/00000_00.png").write_bytes(b"no picture")
        case "other size":
            Image.new("L", (10, 10), 255).save(mask)


@pytest.mark.parametrize(
    "what, message",
    [
        ("no list", "there is no train_pairs.txt in"),
        ("empty list", "names no pairs"),
        ("one name", "train_pairs.txt, line 2: must name a person and a cloth, .* got '00001_00.png'"),
        ("no picture", "train_pairs.txt, line 3: there is no train/cloth/00002_00.png"),
        ("outside", "leads out of"),
        ("beside", "../image/00000_00.png leads out of .*train/image"),
        ("absolute", "train/image/00000_00.png leads out of .*train/image"),
        ("corrupt", "00000_00.png cannot be read"),
        ("other size", "the mask has size"),
    ],
)
def test_bad_data(own_data, what, message):
    spoil(own_data, what)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        tree(own_data)[0]


def test_all_bad_files_are_told_of_at_once(own_data):
    for name in ("00000_00", "00003_00"):
        (own_data / f"train/image/{name}.png").write_bytes(b"no picture")
    (own_data / "train/cloth/00005_00.png").unlink()
    with pytest.raises(ValueError) as caught:
        tree(own_data)
    said = str(caught.value)
    assert all(
        name in said for name in ("00000_00.png cannot be", "00003_00.png cannot be", "no train/cloth/00005_00.png")
    )
    for file in (own_data / "train/cloth").iterdir():
        file.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="; and [0-9]+ more$") as caught:
        tree(own_data)
    assert str(caught.value).count("; ") == train_vton.FAULTS_TOLD


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"report_to": "wandb"}, "--report_to wandb needs a library that is not here: pip install wandb"),
        ({"train_batch_size": 11}, "a step takes 11 pairs, and --dataset_root has 10"),
        (
            {"pretrained_model_name_or_path": "runs/no/base"},
            "`pretrained_model_name_or_path` runs/no/base: there is no",
        ),
        ({"vae_name_or_path": "runs/no/vae"}, "`vae_name_or_path` runs/no/vae: there is no file or folder"),
        ({"init_adapter": "runs/no/adapter"}, "there is no file or folder runs/no/adapter"),
    ],
)
def test_a_run_that_cannot_begin_ends_with_a_sentence(bases, data, tmp_path, changed, message):
    with pytest.raises(SystemExit, match=f"^train_vton.py: .*{message}"):
        main(parse_args(flags(bases[9], data, tmp_path, **changed)))


def test_a_pipeline_that_has_learnt_is_no_base(bases, data, tmp_path):
    """With an adapter's settings that training would not ask for."""
    tiny_pipe(9, trained_steps=5).save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="whole is a try-on pipeline that has learnt: give its base"):
        trainer_of(tmp_path / "whole", data, tmp_path / "out")


def test_a_cut_off_photograph_is_found_before_training(own_data):
    file = own_data / "train/image/00003_00.png"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match="train_pairs.txt, line 4: .*00003_00.png.*cannot be read"):
        tree(own_data)


def test_ctrl_c_before_the_first_update_is_a_sentence(bases, data, tmp_path, monkeypatch):
    def interrupted(trainer):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "load_data", interrupted)
    with pytest.raises(SystemExit, match="stopped before the first update"):
        main(parse_args(flags(bases[9], data, tmp_path)))


def test_a_run_says_what_it_is_and_when_nothing_is_left(bases, data, tmp_path, caplog):
    line = flags(bases[9], data, tmp_path)
    with caplog.at_level("INFO"):
        main(parse_args(line))
    assert "10 pairs at 32x24, 1 x 1 x 2 an update (processes x batches x pairs), 2 updates, " in caplog.text
    assert "nothing is left to train" not in caplog.text
    AcceleratorState._reset_state(reset_partial_state=True)
    main(parse_args([*line, "--resume_from_checkpoint", "latest"]))
    assert "step 2 of 2: nothing is left to train" in caplog.text


def test_what_a_library_raises_is_shown_with_the_way_there(bases, data, tmp_path, monkeypatch):
    """A researcher's own change, say."""
    monkeypatch.setattr(train_vton.Trainer, "prepare_losses", lambda self: np.zeros(2).reshape(3))
    with pytest.raises(ValueError, match="cannot reshape"):
        main(parse_args(flags(bases[9], data, tmp_path)))


def test_ctrl_c_while_guidance_is_chosen_leaves_a_run_that_goes_on(bases, tested, tmp_path, monkeypatch):
    def interrupted(validation):
        raise KeyboardInterrupt

    line, choose = flags(bases[9], tested, tmp_path, guidance_scale=None), train_vton.Validation.best_guidance
    monkeypatch.setattr(train_vton.Validation, "best_guidance", interrupted)
    with pytest.raises(SystemExit, match="stopped at step 2: go on with --resume_from_checkpoint latest"):
        main(parse_args(line))
    assert not (tmp_path / ADAPTER_NAME).exists()
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(train_vton.Validation, "best_guidance", choose)
    monkeypatch.setattr(train_vton, "GUIDANCE_STEPS", 2)
    main(parse_args([*line, "--resume_from_checkpoint", "latest"]))
    assert (tmp_path / ADAPTER_NAME).exists()


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
        ({"width": None}, "--height and --width go together"),
        ({"output_dir": __file__}, "--output_dir must be a folder, got the file"),
        ({"resume_from_checkpoint": "nowhere"}, "must be latest or a checkpoint's folder, got nowhere"),
        ({"resume_from_checkpoint": "latest", "overwrite_output_dir": True}, "would discard what"),
        ({"dataset_name": "me/pairs"}, "give --dataset_root or --dataset_name"),
        (
            {"dataset_root": None, "dataset_name": "me/pairs", "streaming": True, "max_train_steps": None},
            "--streaming needs",
        ),
        ({"caption_column": "text"}, "--caption_column text needs --dataset_name"),
        ({"prompt": "a red shirt"}, "--prompt a red shirt needs --cross_attention prompt"),
        ({"cache_latents": True, "augment": "flip"}, "--cache_latents would freeze --augment"),
        ({"mask_free": True, "augment": "mask"}, "--augment mask loosens masks"),
        (
            {"lr_scheduler": "polynomial", "learning_rate": 1e-7},
            "polynomial ends at a rate of 1e-07: --learning_rate must",
        ),
        ({"lora_rank": 4, "trainable": "all"}, "--lora_rank needs --trainable self_attention or attention, got all"),
    ],
)
def test_arguments_that_are_wrong(capsys, changed, message):
    with pytest.raises(SystemExit):
        parse_args(flags(Path("base"), Path("data"), Path("out"), **changed))
    assert message in capsys.readouterr().err


NUMBERS = {
    "a positive whole number": (
        "height width lora_rank num_cloths train_batch_size gradient_accumulation_steps num_train_epochs max_train_steps "
        "checkpointing_steps validation_steps", "0 -1",
    ),
    "a whole number from 0": (
        "dataloader_num_workers lr_warmup_steps checkpoints_total_limit num_validation_pairs perceptual_max_timestep "
        "adversarial_start_step", "-1",
    ),
    "a whole number from 0 to 4294967295": ("seed", "-1 4294967296"),
    "a positive number": (
        "learning_rate max_grad_norm snr_gamma dream_detail_preservation perceptual_weight adversarial_weight", "0 -1 nan inf",
    ),
    "a number from 0": ("guidance_scale adam_weight_decay", "-1 nan inf -inf"),
    "at least 0 and at most 1": ("cloth_dropout pose_dropout", "-0.1 1.1 nan"),
    "at least 0 and less than 1": ("ema_decay", "-0.1 1 nan"),
}  # fmt: skip


@pytest.mark.parametrize("allowed", NUMBERS)
def test_every_number_is_checked(capsys, allowed):
    names, values = (words.split() for words in NUMBERS[allowed])
    for name, value in itertools.product(names, values):
        line = flags(Path("base"), Path("data"), Path("out"))
        with pytest.raises(SystemExit):
            parse_args([*line, f"--{name}={value}"])
        assert f"argument --{name}: must be {allowed}, got {value}" in capsys.readouterr().err


def test_no_number_goes_unchecked(capsys):
    checked = {name for names, _ in NUMBERS.values() for name in names.split()}
    numbers = {name for name, value in vars(parse_args(flags(Path("base"), Path("data"), Path("out")))).items()
               if type(value) in {int, float}}  # fmt: skip
    assert numbers <= checked


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
    given = {"person_column": "photo", "cloth_column": "shirt", "mask_column": "hole"}
    for more, also in (({}, {}), ({"mask_free": True}, {"condition_column": "other"})):
        one, other = (
            trainer_of(bases[9], None, tmp_path, dataset_name=name, **more, **columns).dataset[3]
            for name, columns in ((parquet, {}), (tmp_path / "renamed", given | also))
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


def test_a_resumed_stream_reads_no_past_epoch_again(bases, parquet, tmp_path):
    """Six updates of two are an epoch of ten and two rows more."""
    options = STREAM | {"max_train_steps": 6}
    main(parse_args(flags(bases[9], None, tmp_path, dataset_name=parquet, **options)))
    assert json.loads((tmp_path / "checkpoint-6" / "progress.json").read_text())["places"] == [[1, 2]]
    again = flags(bases[9], None, tmp_path, dataset_name=parquet, resume_from_checkpoint="latest", **STREAM)
    trainer, epochs = Trainer(parse_args(again)), []
    trainer.checkpoints.resume()
    rows = trainer.dataset.rows
    set_epoch, rows.set_epoch = rows.set_epoch, lambda epoch: (epochs.append(epoch), set_epoch(epoch))
    batch = next(trainer.batches())
    assert epochs == [1] and batch["place"] == [(1, 3), (1, 4)]
    trainer.place = (0, 12)  # counted from the beginning
    assert next(trainer.batches())["seed"] == batch["seed"] and epochs == [1, 0, 1]


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
        shown = to_values(trainer.prepare(people[TEXTS.index(caption[-1])], 0, 0))["person"]
        assert torch.equal(person, shown)
    with torch.no_grad(), vton_attention(trainer.unet, ClothBesideAttnProcessor, "prompt"):
        loss, swapped = (
            trainer.train_step(batch | {"caption": texts}) for texts in (batch["caption"], batch["caption"][::-1])
        )
    assert loss != swapped


def test_the_test_rows_are_probed_and_tried_on(bases, tested, parquet, tmp_path):
    of_rows = trainer_of(bases[9], None, tmp_path, dataset_name=parquet, num_validation_pairs=3)
    of_tree = trainer_of(bases[9], tested, tmp_path)
    assert len(of_rows.validation.probes["person"]) == TEST and len(of_rows.validation.tryons) == 3
    assert all(
        torch.equal(of_rows.validation.probes[name], of_tree.validation.probes[name])
        for name in ("person", "cloth", "mask", "seed")
    )
    (_, one), (_, other), _ = of_rows.validation.tryons
    assert one["cloth"] != other["cloth"] and one["person"] != other["person"]


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


@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_that_cannot_be_read_stops_a_run_with_a_checkpoint(bases, parquet, tmp_path, workers):
    """One that was good where it was looked at."""
    rows = datasets.load_dataset(str(parquet), split="train").cast_column("cloth", datasets.Image(decode=False))
    spoiled = {"cloth": {"bytes": b"no picture", "path": None}}
    rows = rows.map(lambda row, i: spoiled if i == 6 else {}, with_indices=True)
    rows.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    options = {"dataset_name": tmp_path / "data", "max_train_steps": 20, "dataloader_num_workers": workers}
    line = flags(bases[9], None, tmp_path / "out", **options)
    with pytest.raises(SystemExit, match="^row 6, column cloth cannot be read: .*: stopped at step [1-5]: go on with"):
        main(parse_args(line))
    (left,) = (tmp_path / "out").glob("checkpoint-*")
    trainer = Trainer(parse_args([*line, "--resume_from_checkpoint", "latest"]))
    trainer.checkpoints.resume()
    assert left.name == f"checkpoint-{trainer.step}"


def test_validation_shows_each_pair_with_its_own_text(bases, parquet, tmp_path, monkeypatch):
    """As training does: in probes, while guidance is chosen and on the grid."""
    texts = [f"shirt {letter}" for letter in TEXTS[:4]]  # of the test rows
    predict, call, predicted, called = Trainer.predict, train_vton.StableDiffusionVTONPipeline.__call__, [], []

    def predicts(trainer, conditioning, noisy, timesteps, seen, captions=None):
        predicted.append(captions)
        return predict(trainer, conditioning, noisy, timesteps, seen, captions)

    def calls(*args, **options):
        called.append(options["prompt"])
        return call(*args, **options)

    monkeypatch.setattr(Trainer, "predict", predicts)
    monkeypatch.setattr(train_vton.StableDiffusionVTONPipeline, "__call__", calls)
    monkeypatch.setattr(train_vton, "GUIDANCE_STEPS", 1)
    options = {
        "caption_column": "text",
        "cross_attention": "prompt",
        "num_validation_pairs": 2,
        "guidance_scale": None,
    }
    main(parse_args(flags(bases[9], None, tmp_path, dataset_name=parquet, max_train_steps=1, **options)))
    seven = len(train_vton.GUIDANCE_SCALES)
    assert (
        called == [texts[:2]] * seven + [texts[2:]] * seven + texts[1:3]
    )  # a grid's person wears the next one's cloth
    timesteps = len(train_vton.PROBED_TIMESTEPS)
    first, second = [None, texts[:2], [texts[3], texts[0]]], [None, texts[2:], texts[1:3]]
    assert predicted[1:] == first * timesteps + second * timesteps


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
        "hub_license": "cc-by-nc-4.0",
        "prompt": "a | b\nc",
        "cross_attention": "prompt",
        "guidance_scale": None,
    }
    monkeypatch.setattr(train_vton, "GUIDANCE_STEPS", 2)
    out = tmp_path / "out"
    main(parse_args(flags(bases[9], tested, out, checkpointing_steps=1, num_validation_pairs=1, **options)))
    repository, files = hub.repositories["models/me/trained"], hub.files("me/trained")
    assert repository.private and {"Step 1", "Step 2"} <= set(repository.messages)
    (tmp_path / "uploaded.safetensors").write_bytes(files[ADAPTER_NAME])
    assert equal(load_file(tmp_path / "uploaded.safetensors"), load_file(out / ADAPTER_NAME))
    assert files["validation/step-000002.png"] == (out / "validation" / "step-000002.png").read_bytes()
    card = files["README.md"].decode()
    assert "\nlicense: cc-by-nc-4.0\n" in card and "(here: `cc-by-nc-4.0`)" in card
    assert parent_licence(str(out)) == "cc-by-nc-4.0"  # for a run that begins from this one's folder
    assert card.count("## Training") == 1 and "validation/step-000002.png" in card
    assert r"| prompt | a \| b c |" in card and "| guidance | squared error in the mask |\n|---|---|\n| 1 | " in card
    assert "| pretrained_model_name_or_path | a local folder |" in card
    assert not any(str(path.parent) in card + str(files[ADAPTER_NAME]) for path in (tested, out, bases[9]))
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
    with pytest.raises(SystemExit, match=f"trained to the end, and not uploaded, .* in {tmp_path}/refused"):
        main(parse_args(flags(bases[9], data, tmp_path / "refused", **options)))
    assert "models/me/kept-out" not in hub.repositories
    assert caplog.text.count("upload 1 of 1 failed") == 1 and "upload 3 of 3 failed" in caplog.text
    AcceleratorState._reset_state(reset_partial_state=True)
    main(parse_args(flags(bases[9], data, tmp_path / "plain", checkpointing_steps=1)))
    for file in (ADAPTER_NAME, f"checkpoint-2/{TRAINED_NAME}"):
        assert equal(load_file(tmp_path / "refused" / file), load_file(tmp_path / "plain" / file))
