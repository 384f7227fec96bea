"""The demo's human parser: trained on label maps of both layouts, small, and what a pipeline loads."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from tiny import ROOT, tiny_pipe
from transformers import SegformerForSemanticSegmentation

from demo import train_base, train_parser
from demo.make_dataset import make_dataset
from demo.train_parser import (
    COMPONENTS,
    DRESS_CODE,
    LIP,
    intersection_over_union,
    load,
    main,
    parse_args,
    read_parser,
)
from pipeline_vton import StableDiffusionVTONPipeline


MODEL = ROOT / "demo/model"
NUMBERS = {"viton-hd": LIP, "dresscode": DRESS_CODE}


def draw_people(root, layout, count=8):
    """People of a red top, blue trousers and a brown face on white, 64x48, in the test split too."""
    labels, rng = NUMBERS[layout], np.random.default_rng(3)
    for split in ("train", "test"):
        names = []
        for i in range(count):
            image, parsed = Image.new("RGB", (48, 64), "white"), Image.new("L", (48, 64))
            x, y = rng.integers(8, 24), rng.integers(6, 16)
            parts = (("Face", "brown", 0, 6), ("Upper-clothes", "red", 7, 25), ("Pants", "blue", 26, 44))
            for label, color, top, bottom in parts:
                ImageDraw.Draw(image).rectangle((x, y + top, x + 14, y + bottom), fill=color)
                ImageDraw.Draw(parsed).rectangle((x, y + top, x + 14, y + bottom), fill=labels.index(label))
            if layout == "viton-hd":
                files = root / split / "image" / f"{i}.png", root / split / "image-parse-v3" / f"{i}.png"
            else:
                name = f"{i + 100 * (split == 'test')}"
                files = root / "upper_body/images" / f"{name}_0.png", root / "upper_body/label_maps" / f"{name}_4.png"
                names.append(f"{name}_0.png {name}_1.png\n")
            for file, picture in zip(files, (image, parsed)):
                file.parent.mkdir(parents=True, exist_ok=True)
                picture.save(file)
        if names:
            (root / "upper_body" / f"{split}_pairs{'_paired' if split == 'test' else ''}.txt").write_text(
                "".join(names)
            )
    return root


@pytest.mark.parametrize("layout", NUMBERS)
def test_both_layouts_are_read_as_lips_numbers(tmp_path, layout):
    images, maps = load([draw_people(tmp_path, layout)], "train", 64, 48)
    assert images.shape == (8, 64, 48, 3) and maps.shape == (8, 64, 48)
    assert [LIP[i] for i in np.unique(maps)] == ["Background", "Upper-clothes", "Pants", "Face"]
    assert (images[maps == LIP.index("Upper-clothes")] == (255, 0, 0)).all()


def test_a_parser_is_trained_scored_on_held_out_pictures_and_drawn_with(tmp_path, capsys):
    root, folder = draw_people(tmp_path / "data", "viton-hd"), tmp_path / "parser"
    flags = ["--dataset_root", str(root), "--height", "64", "--width", "48"]
    options = ["--output_dir", str(folder), "--train_steps", "60", "--batch_size", "4", "--checkpointing_steps", "60"]
    main(parse_args([*flags, *options]))
    printed = capsys.readouterr().out.splitlines()[-6:]
    scores = {line.split()[1]: float(line.split()[0]) for line in printed[:4]}
    assert scores.keys() == {"Background", "Upper-clothes", "Pants", "Face"} and min(scores.values()) > 0.3
    assert scores["Background"] > 0.9 and scores["Pants"] > 0.7
    assert "mean IoU of 4 labels on 8 held-out pictures" in printed[4]
    assert (
        sum(file.stat().st_size for file in folder.iterdir() if file.suffix in {".json", ".safetensors"}) < 1_000_000
    )

    pipe = tiny_pipe(9)
    pipe.load_human_parser(folder, dtype="float32")
    person, parsed = (Image.open(root / "test" / folder / "0.png") for folder in ("image", "image-parse-v3"))
    mask = np.asarray(pipe.predict_mask(person, "lower", "tight")) > 0
    assert mask[np.asarray(parsed) == LIP.index("Pants")].mean() > 0.9 and mask.mean() < 0.6

    model = tmp_path / "model"
    tiny_pipe(9).save_pretrained(model)
    main(parse_args(["--output_dir", str(folder), "--install", str(model)]))
    main(parse_args([*flags, "--score", str(model)]))
    assert capsys.readouterr().out.splitlines()[-5:] == printed[:5]
    installed = StableDiffusionVTONPipeline.from_pretrained(model)
    assert np.array_equal(
        installed.predict_mask(person, "lower", "tight"), pipe.predict_mask(person, "lower", "tight")
    )
    pipe.save_pretrained(tmp_path / "saved", human_parser_license="apache-2.0")
    named = [json.loads((place / "model_index.json").read_text()) for place in (model, tmp_path / "saved")]
    assert all(named[0][name] == named[1][name] for name in COMPONENTS)


class Stopped(Exception):
    pass


class StoppedAtSix(SegformerForSemanticSegmentation):
    """Stops a training at its sixth step, when the second checkpoint is there."""

    steps = 0

    def forward(self, *args, **kwargs):
        self.steps += self.training
        if self.steps == 6:
            raise Stopped
        return super().forward(*args, **kwargs)


def test_a_stopped_training_goes_on_from_its_checkpoint_to_the_same_parser(tmp_path, monkeypatch):
    monkeypatch.setattr(train_base, "fast_device", lambda: torch.device("cpu"))  # where every step calls the parser
    root = draw_people(tmp_path / "data", "viton-hd")
    flags = ["--dataset_root", str(root), "--height", "32", "--width", "24", "--train_steps", "6", "--batch_size", "2"]
    flags += ["--checkpointing_steps", "2", "--output_dir"]
    main(parse_args([*flags, str(tmp_path / "whole")]))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(train_parser, "SegformerForSemanticSegmentation", StoppedAtSix)
        main(parse_args([*flags, str(tmp_path / "stopped")]))
    assert [file.name for file in (tmp_path / "stopped" / "checkpoints" / "parser").iterdir()] == ["000004"]
    main(parse_args([*flags, str(tmp_path / "stopped")]))
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert whole.keys() == resumed.keys() and all((whole[name] == resumed[name]).all() for name in whole)


def test_what_is_asked_of_the_parsers_command_is_checked(capsys):
    for flags, words in (
        (["--dataset_root", "d"], "--output_dir must be given"),
        (["--output_dir", "o"], "--dataset_root must name"),
        (["--dataset_root", "d", "--output_dir", "o", "--train_steps", "0"], "--train_steps must be positive, got 0"),
    ):
        with pytest.raises(SystemExit):
            parse_args(flags)
        assert words in capsys.readouterr().err


def test_a_folder_without_parse_maps_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="--dataset_root.*nothing"):
        load([tmp_path / "nothing"], "train", 64, 48)


def test_the_demos_parser_is_small_and_sees_what_is_drawn(tmp_path):
    """`make measure-parser` says more: .904 on 192 people of this seed."""
    for category in ("upper", "lower", "dress"):
        make_dataset(tmp_path / category, train=0, test=8, seed=22, height=128, category=category)
    roots = [tmp_path / category for category in ("upper", "lower", "dress")]
    parser, processor = read_parser(MODEL)
    scores = intersection_over_union(parser, processor, *load(roots, "test", 128, 96))
    assert np.mean(list(scores.values())) > 0.85
    assert sum(file.stat().st_size for file in (MODEL / "human_parser").iterdir()) < 1e6
