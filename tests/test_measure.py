"""The committed demo model at work, what is measured of it, and the network that recognises cloths."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import ROOT

from demo import measure, train_classifier, try_on
from demo.make_dataset import World, make_dataset
from demo.recognition import ATTRIBUTES, CLASSIFIER, CROP, crop, load_classifier, recognize
from demo.world import draw_person


MODEL = ROOT / "demo" / "model"
HEIGHT = json.loads((MODEL / "vae" / "config.json").read_text(encoding="utf-8"))["sample_size"]


@pytest.fixture(scope="module")
def classifier():
    return load_classifier()


@pytest.fixture(scope="module")
def lines():
    """Two of every category, at the committed model's size."""
    return try_on.draw_lines(6, seed=11, height=HEIGHT)


@pytest.fixture(scope="module")
def pipe():
    pipe = try_on.load_pipeline(MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(pictures) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in pictures]) / 255


def test_the_lines_are_those_of_the_dataset(lines, tmp_path):
    make_dataset(tmp_path, train=0, test=6, seed=11, height=HEIGHT, category="all")
    rows = [json.loads(row) for row in (tmp_path / "factors.jsonl").read_text().splitlines()]
    unpaired = sorted(
        (row for row in rows if not row["paired"]), key=lambda row: ["upper", "lower", "dress"].index(row["category"])
    )
    assert [row["category"] for row in unpaired] == [line.category for line in lines]
    for row, line in zip(unpaired, lines):
        assert (row["factors"], row["attributes"]) == (line.factors, line.attributes)
        names = "{}__{}.png".format(*(row[role].removesuffix(".png") for role in ("person", "cloth")))
        (truth,), (cloth,) = tmp_path.glob(f"*/tryon/{names}"), tmp_path.glob(f"*/images/{row['cloth']}")
        assert np.array_equal(Image.open(truth), line.truth) and np.array_equal(Image.open(cloth), line.cloth)


def test_lines_of_outfits_have_two_cloths_and_are_those_of_the_dataset(tmp_path, monkeypatch):
    make_dataset(tmp_path, train=0, test=3, seed=11, height=64, category="outfit")
    rows = [json.loads(row) for row in (tmp_path / "factors.jsonl").read_text().splitlines()]
    outfits = try_on.draw_lines(3, seed=11, height=64, category="outfit")
    for row, line in zip((row for row in rows if not row["paired"]), outfits, strict=True):
        names = "{}__{}.png".format(*(row[role].removesuffix(".png") for role in ("person", "cloth")))
        files = {"truth": f"tryon/{names}", "cloth": f"cloth/{row['cloth']}", "cloth_2": f"cloth_2/{row['cloth']}"}
        for role, file in files.items():
            assert np.array_equal(Image.open(tmp_path / "test" / file), getattr(line, role))

    pipe, asked = try_on.load_pipeline(MODEL), []
    call = type(pipe).__call__
    monkeypatch.setattr(
        type(pipe), "__call__", lambda *args, **options: asked.append(options) or call(*args, **options)
    )
    assert len(try_on.try_on(pipe, outfits, steps=1, seed=0)) == 3
    assert asked[0]["cloth_image"] == [[line.cloth, line.cloth_2] for line in outfits]


def test_the_demo_model_puts_the_right_cloth_on(lines, pipe, classifier):
    """A result is nearer by 1 dB to its own truth than a result in the wrong cloth is, and is the person outside the mask."""
    tops = lines[:2]
    results = try_on.try_on(pipe, tops, steps=10, seed=0)
    right = measure.figures(measure.measure(results, tops, classifier))
    wrong = measure.figures(measure.measure(results[::-1], tops, classifier))
    assert right["psnr"].value > wrong["psnr"].value + 1
    outside = pixels(line.mask for line in tops) < 0.5
    assert np.array_equal(pixels(results)[outside], pixels(line.person for line in tops)[outside])
    alone = try_on.try_on(pipe, tops[:1], steps=10, seed=0)
    assert np.abs(pixels(alone) - pixels(results[:1])).max() < 0.05  # whoever else is tried on


def test_the_demo_writes_a_contact_sheet(tmp_path, capsys):
    try_on.main(try_on.parse_args(["--output_dir", str(tmp_path), "--count", "6", "--num_inference_steps", "1"]))
    width, height = Image.open(tmp_path / "contact_sheet.png").size
    assert width > 2 * 5 * 96 and height > 3 * HEIGHT
    with pytest.raises(SystemExit):
        try_on.parse_args(["--count", "5"])
    assert "--count must be at least 6" in capsys.readouterr().err


def test_the_parser_proposes_masks_that_cover_what_changes(lines, pipe):
    """Of what differs between person and truth, nearly all, with loose masks more than with tight ones."""
    shares = {}
    for looseness in ("tight", "loose"):
        covered = changed = 0
        for line, masked in zip(lines, try_on.with_masks(pipe, lines, looseness)):
            differs = (pixels([line.person])[0] != pixels([line.truth])[0]).any(axis=-1)
            covered, changed = covered + (differs & (pixels([masked.mask])[0] > 0.5)).sum(), changed + differs.sum()
            assert masked.person is line.person and masked.truth is line.truth
        shares[looseness] = covered / changed
    assert 0.8 < shares["tight"] < shares["loose"] and shares["loose"] > 0.93, shares


def test_the_mean_colour_is_painted_where_the_cloth_is_seen_and_nowhere_else(lines):
    for line in lines:
        painted, truth = np.asarray(measure.mean_color(line)), np.asarray(line.truth)
        assert np.array_equal(painted[~line.worn], truth[~line.worn])
        assert line.worn.any() and len(np.unique(painted[line.worn], axis=0)) == 1


def test_the_truth_is_perfect_and_another_cloth_is_not(lines, classifier):
    true = measure.figures(measure.measure([line.truth for line in lines], lines, classifier))
    wrong = measure.figures(measure.measure([line.person for line in lines], lines, classifier))
    assert true["psnr"].value == np.inf and true["ssim"].value == pytest.approx(1, abs=1e-12)
    assert measure.recognition(true) > measure.recognition(wrong) + 0.3
    assert wrong["psnr"].value < 20 and wrong["ssim"].value < 0.9


def test_an_attribute_counts_where_the_cloth_has_it(lines, classifier):
    rows = measure.measure([line.truth for line in lines], lines, classifier)
    for row, line in zip(rows, lines):
        assert ("sleeve_length" in row) == (line.category != "lower")
        assert (measure.SHOWN_LOGO in row) == (line.attributes["logo"] != "none")


def test_the_figures_pool_the_squared_errors():
    rows = [
        {"psnr": (1.0, 100.0), "color": (1.0, 1.0)},
        {"psnr": (1.0, 400.0)},
        {"psnr": (8.0, 500.0), "color": (0.0, 1.0)},
    ]
    found = measure.figures(rows)
    assert found["psnr"].value == pytest.approx(20) and found["color"].value == 0.5


def test_every_error_in_the_mask_lies_in_one_place(lines, classifier):
    """The places' errors and pixels sum to the mask's; a cloth in its mean colour is wrong where the cloth is, and nowhere else."""
    rows = measure.measure([measure.mean_color(line) for line in lines], lines, classifier)
    for row, line in zip(rows, lines):
        parts = [row[place] for place in measure.PLACES if place in row]
        assert np.sum(parts, axis=0) == pytest.approx(row["psnr"])
        assert ("in plain cloths" in row) == (line.attributes["pattern"] == "plain") != ("in patterned cloths" in row)
        assert row["skin and background"][0] == 0 < row["at cloths' edges"][0]
    shown = measure.error_cells(rows)
    assert shown[-1].startswith("inf") and shown[-1].endswith(" 0%")
    shares = [[int(share.removesuffix("%")) for share in cell.split("; ")[1].split(", ")] for cell in shown]
    assert np.sum(shares, axis=0) == pytest.approx(100, abs=2)


def test_the_lines_are_grouped_by_their_levels(lines):
    assert measure.groups(lines, "category") == {"upper": [0, 1], "lower": [2, 3], "dress": [4, 5]}
    for factor in measure.FACTORS:
        for level, numbers in measure.groups(lines, factor).items():
            assert numbers == [i for i, line in enumerate(lines) if line.factors.get(factor) == level]


def test_the_report_has_every_table_and_plot(tmp_path, monkeypatch):
    tried_on = []
    monkeypatch.setattr(
        measure, "try_on", lambda *given, **more: tried_on.append(given) or try_on.try_on(*given, **more)
    )
    arguments = [
        "--output_dir",
        str(tmp_path),
        "--lines",
        "6",
        "--num_inference_steps",
        "1",
        "--guidance_scale",
        "1.5",
        "2",
        "--masks",
        "true",
        "tight",
        "--height",
        str(192 - HEIGHT),
    ]
    measure.main(measure.parse_args([*arguments, "--by", "category", "sleeve", "--steps", "1", "2"]))
    assert (
        len(tried_on) == 5
    )  # two masks by two scales, of which the first are a point of the curve, and the other point
    assert f"at {192 - HEIGHT}x{144 - HEIGHT * 3 // 4}, 1 DDPM steps" in (tmp_path / "report.md").read_text()
    starts = [row.split("|")[1].strip() for row in (tmp_path / "report.md").read_text().splitlines() if row[:1] == "|"]
    assert {
        "(a) the adapter, guidance 1.5",
        "(a) the adapter, guidance 2",
        "(a) the adapter, guidance 2, tight masks of the parser",
        "the truth",
        "1",
        "2",
        "upper",
        "longer",
    } <= set(starts)
    assert starts.count("dress") == 9  # methods
    for name in ("by.png", "steps.png"):
        assert Image.open(tmp_path / name).width > 500
    assert measure.parse_args(["--by"]).by == list(measure.GROUPS) and measure.parse_args([]).by == []


def test_the_committed_classifier_is_small_and_recognises_cloths_of_other_people(classifier):
    assert sum(file.stat().st_size for file in CLASSIFIER.iterdir()) < 1e6
    world, right = World(12, category="all"), {name: [] for name in ATTRIBUTES}
    for i in range(60):
        person, cloth = world.sample("test", i)
        picture, mask, _ = draw_person(person, cloth, *world.size)
        (seen,), true = recognize(classifier, [picture], [mask]), cloth.attributes()
        for name in ATTRIBUTES:
            right[name] += [seen[name] == true[name]] if true[name] else []
    shares = {name: np.mean(found) for name, found in right.items()}
    assert shares.pop("logo") > 0.75 and min(shares.values()) > 0.93, shares


def test_the_crop_is_the_masks_surroundings_whatever_the_pictures_size(lines):
    line = lines[0]
    small = crop(line.person, line.mask)
    assert small.shape == (4, *CROP) and small.dtype == np.uint8
    sizes = [side * 2 for side in line.person.size]
    large = crop(line.person.resize(sizes), line.mask.resize(sizes, Image.Resampling.NEAREST))
    assert np.abs(small / 255 - large / 255).mean() < 0.03
    for mask in (Image.new("L", line.person.size), Image.new("L", (5, 5), 255)):
        with pytest.raises(ValueError, match="`mask` must"):
            crop(line.person, mask)


def test_a_classifier_is_trained_and_says_what_it_mistakes(tmp_path, lines, capsys):
    line = [
        "--output_dir",
        str(tmp_path),
        "--train",
        "8",
        "--test",
        "4",
        "--epochs",
        "1",
        "--batch_size",
        "4",
        "--height",
        str(192 - HEIGHT),
    ]
    train_classifier.main(train_classifier.parse_args(line))
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines()[-len(ATTRIBUTES) :]] == list(ATTRIBUTES)
    trained = load_classifier(tmp_path)
    said = recognize(trained, [line.truth for line in lines], [line.mask for line in lines])
    assert all(one[name] in ATTRIBUTES[name] for one in said for name in ATTRIBUTES)
    with pytest.raises(SystemExit):
        train_classifier.parse_args([*line, "--train", "2"])
    assert "--train must be at least --batch_size 4, got 2" in capsys.readouterr().err


def test_every_logo_is_learnt_on_every_kind_of_cloth():
    world, logo = World(0, 64, "all"), list(ATTRIBUTES).index("logo")
    learnt = [(i % 3, train_classifier.draw_truth(i, world, logos=True)[1][logo]) for i in range(1, 37, 2)]
    assert len(set(learnt)) == 3 * len(ATTRIBUTES["logo"][1:])


def test_disturbed_crops_keep_their_cloth_and_mask():
    torch.manual_seed(0)
    crops = torch.rand(8, 4, *CROP) * 2 - 1
    crops[:, 3] = crops[:, 3].sign()
    disturbed = train_classifier.disturb(crops)
    assert disturbed.shape == crops.shape and set(disturbed[:, 3].unique().tolist()) == {-1.0, 1.0}
    assert disturbed.abs().max() <= 1 and not torch.equal(disturbed, crops)
