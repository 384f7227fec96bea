"""The scripts behind the tables of docs/measured.md, in the small."""

import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline
from tiny import ROOT

import train_vton
from benchmarks import costs, many, methods, photograph
from benchmarks.launch import launch
from demo.make_dataset import make_dataset
from demo.try_on import draw_lines


@torch.no_grad()
def test_the_four_channel_base_paints_what_the_inpainting_base_paints_behind_a_full_mask(tmp_path):
    base = ROOT / "demo" / "model"
    methods.write_four_channel_base(base, tmp_path)
    narrow = StableDiffusionPipeline.from_pretrained(tmp_path).unet
    pipe = StableDiffusionInpaintPipeline.from_pretrained(base, dtype=torch.float32)
    grey = pipe.vae.encode(torch.zeros(2, 3, 128, 96)).latent_dist.mode() * pipe.vae.config.scaling_factor
    noisy = torch.randn(grey.shape, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([noisy, torch.ones_like(grey[:, :1]), grey], dim=1)
    expected = pipe.unet.conv_in(rows)
    inside = (..., slice(4, -4), slice(4, -4))  # at the edge, grey is not one colour

    def error(bias: torch.Tensor) -> torch.Tensor:
        return (F.conv2d(noisy, narrow.conv_in.weight, bias, padding=1) - expected)[inside].abs().mean()

    assert error(narrow.conv_in.bias) < 0.2 * error(pipe.unet.conv_in.bias)


def test_a_row_is_trained_and_measured_once_for_a_budget(tmp_path, monkeypatch, capfd):
    line = ["--output_dir", str(tmp_path), "--rows", "reference", "--train", "6", "--lines", "6", "--seed", "11"]
    line += ["--train_batch_size", "2", "--num_inference_steps", "2", "--max_train_steps"]
    methods.main(methods.parse_args([*line, "1"]))
    row = capfd.readouterr().out.splitlines()[-2]
    assert row.startswith("| reference | ") and (tmp_path / "reference" / "vton_adapter.safetensors").is_file()

    def train(*args):
        raise RuntimeError("trained again")

    monkeypatch.setattr(methods, "train", train)
    methods.main(methods.parse_args([*line, "1"]))
    assert capfd.readouterr().out.splitlines()[-2] == row
    monkeypatch.setattr(methods, "train", lambda *args: None)  # as one that finds nothing left to do
    methods.main(methods.parse_args([*line, "1", "--seed", "12"]))
    assert capfd.readouterr().out.splitlines()[-2] != row and (tmp_path / "reference" / "checkpoint-1").is_dir()
    monkeypatch.setattr(methods, "train", train)
    with pytest.raises(RuntimeError, match="trained again"):
        methods.main(methods.parse_args([*line, "2"]))
    assert not (tmp_path / "reference" / "checkpoint-1").exists()


@pytest.mark.parametrize("method", methods.METHODS, ids=lambda method: method.folder)
def test_every_row_is_a_command_line_of_the_trainer(method, tmp_path):
    line = methods.training(method, tmp_path, tmp_path, methods.parse_args(["--base", str(ROOT / "demo" / "model")]))
    flags = line[line.index(str(ROOT / "train_vton.py")) + 1 :]
    said, usual = (train_vton.parse_args(each) for each in (flags, flags[: len(flags) - len(method.flags.split())]))
    assert said.seed == method.seed and (said == usual) == (not method.flags)
    assert said.adversarial_start_step < said.max_train_steps or not said.adversarial_weight


def test_the_masked_adapter_draws_what_a_mask_free_one_learns_from(tmp_path):
    """Everybody of the lists, in a cloth that is not their own."""
    args = methods.parse_args(["--output_dir", str(tmp_path), "--train", "6"])
    methods.draw_dataset(args, height=64)
    methods.draw_tried_on(args)
    for category in train_vton.DRESS_CODE_FOLDERS:
        folder = methods.dataset_folder(args) / category
        people = {file.name for file in (folder / "images").glob("*_0.png")}
        assert {file.name for file in (folder / "tried_on").iterdir()} == people
        pairs = train_vton.read_list(folder / "others.txt")
        assert {person for person, *_ in pairs} == people
        assert all(Path(person).stem[:-2] != Path(cloth).stem[:-2] for person, cloth, _ in pairs)


def test_a_row_is_measured_with_its_cloth_or_without():
    model, lines = ROOT / "demo" / "model", draw_lines(6, seed=1, height=64)
    args = methods.parse_args(["--num_inference_steps", "4"])
    reference = methods.Method("reference")
    right, none = (methods.measure(row, model, model, lines, args) for row in (reference, methods.NO_CLOTH))
    assert right["psnr"].value > none["psnr"].value


def test_a_photograph_is_timed_and_weighed(capsys):
    photograph.main(photograph.parse_args(["--size", "320", "480"]))
    *stages, memory = capsys.readouterr().out.splitlines()
    seconds = {name: float(spent) for spent, name in (stage.strip().split(" s  ") for stage in stages)}
    around = list(seconds).index("in all")
    assert around == 5 and seconds["in all"] == pytest.approx(sum(list(seconds.values())[:around]), abs=0.04)
    beside = ["on the clock, with a drawn mask", "draw a mask", "write PNG", "open PNG", "write JPEG", "open JPEG"]
    assert list(seconds)[around + 1 :] == beside
    assert float(memory.split()[0]) < 0.5 and "320x480" in memory


def test_a_step_is_timed_and_weighed(tmp_path, fresh_accelerate):
    make_dataset(tmp_path / "data", train=2, test=0, seed=0, height=64)
    line = ["--pretrained_model_name_or_path", ROOT / "demo" / "model", "--dataset_root", tmp_path / "data"]
    line += ["--output_dir", tmp_path / "out", "--height", 64, "--width", 48, "--train_batch_size", 1]
    line += ["--dataloader_num_workers", 0, "--report_to", "none", *costs.ROWS["reference, both"].split()]
    seconds, before = costs.measure([str(word) for word in line], updates=1)
    with costs.PeakMemory() as peak:
        kept = torch.ones(2**28)  # 1 GiB
        time.sleep(0.1)
    assert seconds > 0 and 0.5 < peak.gib - before < 1 + kept[0]


def test_reading_a_pair_is_measured():
    assert 0 < costs.measure_loader(64, 48, pairs=2, rounds=1) < 1000


def test_a_row_of_costs_is_measured_at_any_aspect(capsys):
    rows = ["reference, bf16, channels_last", "reference, two cloths"]
    costs.main(costs.parse_args(["--tiny", "--height", "64", "--width", "64", "--updates", "1", "--rows", *rows]))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("| reference")] == [f"| {row}" for row in rows]


def test_pairs_a_minute_of_whole_runs(capsys):
    many.main(many.parse_args(["--pairs", "6", "--batches", "4", "--processes", "1", "--steps", "1"]))
    title, row = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2::2])
    assert title == ["processes", "4 a batch"] and row[0] == "1" and float(row[1]) > 0


@pytest.mark.parametrize("gpu", [False, True])
def test_a_launch_is_what_it_says_on_a_machine_with_a_configuration_of_its_own(tmp_path, monkeypatch, gpu):
    own = tmp_path / "default_config.yaml"
    own.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nmixed_precision: fp16\ngpu_ids: '3'\n")
    monkeypatch.setattr("accelerate.commands.launch.default_config_file", str(own))
    args = launch_command_parser().parse_args(launch("train_vton.py", precision="bf16", gpu=gpu)[3:])
    args, *_ = _validate_launch_command(args)
    assert not (args.use_fsdp or args.multi_gpu) and args.mixed_precision == "bf16" and args.num_processes == 1
    assert args.cpu != gpu and args.gpu_ids != "3"
