"""The demo's human parser: trained on label maps of both layouts, small, and what a pipeline loads."""

import numpy as np
import pytest
from PIL import Image, ImageDraw
from tiny import tiny_pipe

from demo.train_parser import DRESS_CODE, LIP, load, main, parse_args


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
    root = draw_people(tmp_path / "data", "viton-hd")
    flags = ["--dataset_root", str(root), "--output_dir", str(tmp_path / "parser"), "--height", "64", "--width", "48"]
    main(parse_args([*flags, "--train_steps", "60", "--batch_size", "4"]))
    printed = capsys.readouterr().out
    scores = {line.split()[1]: float(line.split()[0]) for line in printed.splitlines()[:4]}
    assert scores.keys() == {"Background", "Upper-clothes", "Pants", "Face"} and min(scores.values()) > 0.3
    assert scores["Background"] > 0.9 and scores["Pants"] > 0.7
    assert "mean IoU of 4 labels on 8 held-out pictures" in printed
    assert sum(file.stat().st_size for file in (tmp_path / "parser").iterdir()) < 1_000_000
    pipe = tiny_pipe(9)
    pipe.load_human_parser(tmp_path / "parser", dtype="float32")
    person, parsed = (Image.open(root / "test" / folder / "0.png") for folder in ("image", "image-parse-v3"))
    mask = np.asarray(pipe.predict_mask(person, "lower", "tight")) > 0
    assert mask[np.asarray(parsed) == LIP.index("Pants")].mean() > 0.9 and mask.mean() < 0.6


def test_a_folder_without_parse_maps_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="--dataset_root.*nothing"):
        load([tmp_path / "nothing"], "train", 64, 48)
