"""The drawn dataset, and the base's trainer."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image, ImageFilter
from safetensors import safe_open
from tiny import ROOT

from demo import make_dataset, train_base, world
from demo.world import CATEGORIES, COLORS, FACTORS, LEVELS, LIP, draw_cloth, draw_person, draw_sample, keypoints
from pipeline_vton import ADAPTER_NAME
from train_vton import TreePairs


SMALL = 64, 48  # height and width in pixels


def files(root) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def described(root) -> list[dict]:
    return [json.loads(line) for line in (root / "factors.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Six training and four test samples of tops, in VITON-HD's layout."""
    root = tmp_path_factory.mktemp("drawn")
    make_dataset.make_dataset(root, train=6, test=4, seed=3, height=64)
    return root


@pytest.fixture(scope="module")
def all_drawn(tmp_path_factory):
    """Seven training and eight test samples of everything, in DressCode's layout."""
    root = tmp_path_factory.mktemp("all")
    make_dataset.make_dataset(root, train=7, test=8, seed=3, height=64, category="all")
    return root


def test_the_dataset_is_the_same_file_for_file_and_grows_at_its_end(drawn, tmp_path):
    make_dataset.make_dataset(tmp_path / "again", train=6, test=4, seed=3, height=64)
    assert files(tmp_path / "again") == files(drawn)
    make_dataset.make_dataset(tmp_path / "larger", train=8, test=0, seed=3, height=64)
    larger = files(tmp_path / "larger")
    pictures = {name: data for name, data in files(drawn).items() if name.startswith("train/")}
    lists = {"train_pairs.txt", "test_pairs.txt", "factors.jsonl"}
    assert pictures.items() <= larger.items() and len(larger.keys() - lists) == len(pictures) * 8 // 6
    assert described(tmp_path / "larger")[:6] == described(drawn)[:6]
    make_dataset.make_dataset(tmp_path / "other", train=6, test=4, seed=4, height=64)
    assert files(tmp_path / "other")["train/image/00000_00.png"] != files(drawn)["train/image/00000_00.png"]


def test_both_layouts_are_those_that_the_trainer_reads(drawn, all_drawn):
    for root, train, test in ((drawn, 6, 4), (all_drawn, 7, 8)):
        for split, paired, count in (("train", True, train), ("test", True, test), ("test", False, test)):
            pairs = TreePairs(root, split, paired)
            assert len(pairs) == count
            assert {picture.size for i in range(count) for picture in pairs.pictures(i).values()} == {SMALL[::-1]}
            if not paired:
                assert all(len({name.split("_")[0] for name in pairs.name(i).split()}) == 2 for i in range(count))
    counts = Counter((line["split"], line["category"]) for line in described(all_drawn) if line["paired"])
    assert [counts["train", name] for name in CATEGORIES] == [3, 2, 2]
    assert [counts["test", name] for name in CATEGORIES] == [3, 3, 2]


def test_the_truth_is_there_and_differs_from_the_person_only_inside_the_mask(drawn, all_drawn):
    for root in (drawn, all_drawn):
        pairs = TreePairs(root, "test", False)
        for i, (name, _, paths) in enumerate(pairs.pairs):
            folder = paths["person"].parents[1] / "tryon"
            truth = Image.open(folder / "{}__{}.png".format(*(part.removesuffix(".png") for part in name.split())))
            person, mask = (np.asarray(pairs.pictures(i)[role]) for role in ("person", "mask"))
            assert np.array_equal(person[mask == 0], np.asarray(truth)[mask == 0])
            assert not np.array_equal(person, truth)


def test_everybody_is_drawn_in_the_cloth_of_the_next_one_too(drawn, all_drawn):
    for root, count, last in ((drawn, 10, 1), (all_drawn, 15, 3)):
        pairs = TreePairs(root, "test", False, roles=("person", "cloth", "condition"))
        same = 0
        for _, _, files in pairs.pairs:
            folder = files["person"].parents[1]
            truth = folder / "tryon" / f"{files['person'].stem}__{files['cloth'].stem}.png"
            same += np.array_equal(Image.open(truth), Image.open(files["condition"]))
        assert same == len(pairs) - last  # in a list the last of a category wears the first one's cloth
        assert len(list(root.glob("**/condition/*.png"))) == count


def test_the_base_sees_two_people_in_one_cloth_and_one_of_them_is_hidden(all_drawn):
    pairs = train_base.load_pairs(all_drawn, "train")
    followed = train_base.before_their_next(pairs)
    assert followed.tolist() == [0, 1, 3, 5]  # three tops, two lower garments, two dresses
    latents = {}
    for name, first in (("person", 100.0), ("changed", 200.0)):
        numbers = torch.arange(7).view(-1, 1, 1, 1)
        latents[f"{name}.mean"] = (first + numbers).expand(-1, 4, 2, 2)
        latents[f"{name}.agnostic"] = torch.ones(7, 5, 2, 2)
    training = object.__new__(train_base.UNetTraining)
    hidden, shown = training.draw_views(latents, followed[torch.randint(len(followed), (64,))])
    seen = set()
    for target, other, behind, known in zip(hidden[0], shown[0], hidden[1], shown[1]):
        wearer, owner = sorted((target[0, 0, 0].item(), other[0, 0, 0].item()), reverse=True)
        # A person in the cloth of the next one, and that one.
        assert wearer - 200 == owner - 101 and int(wearer - 200) in followed
        assert torch.equal(behind, torch.ones(5, 2, 2))
        assert not known[0].any() and torch.equal(known[1:], other)
        seen.add(target[0, 0, 0].item() >= 200)
    assert seen == {True, False}
    wide = train_base.on_one_page(hidden, shown, dim=3)
    assert wide[0].shape == (64, 4, 2, 4) and torch.equal(wide[1][..., 2:], shown[1])


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_mask_covers_every_cloth_and_betrays_none(category):
    """Over all levels of all factors, exactly; and it leaves the faces, hair and hands before the cloth alone."""
    for i in range(12):
        person, own = draw_sample(5, "test", i, category)
        picture, mask, _ = (np.asarray(result) for result in draw_person(person, own, *SMALL))
        for j in range(i + 1, i + 4):
            _, cloth = draw_sample(5, "test", j, category)
            other, same_mask, _ = (np.asarray(result) for result in draw_person(person, cloth, *SMALL))
            assert np.array_equal(mask, same_mask)
            assert np.array_equal(picture[mask == 0], other[mask == 0])
        _, _, sleeved = draw_person(person, replace(own, sleeve="long"), *SMALL)
        hands = ("left_arm", "right_arm") if person.levels["pose"] != "crossed" else ()
        for name in ("face", "left_shoe", *hands):
            part = Image.fromarray(np.uint8(sleeved == LIP[name]) * 255).filter(ImageFilter.MinFilter(3))
            assert not (mask[np.asarray(part) > 0] > 0).any(), name
        assert 0.1 < (mask > 0).mean() < 0.75


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_parse_map_is_where_the_cloth_is(category):
    """Another colour changes the pixels labelled as the cloth, and no others but those on its edge."""
    for i in range(8):
        person, cloth = draw_sample(6, "test", i, category, ("pose", "hair", "sleeve", "fit", "distance"))
        pictures, labels = [], None
        for name in ("black", "yellow"):
            picture, _, labels = draw_person(person, replace(cloth, color=np.array(COLORS[name])), *SMALL)
            pictures.append(np.asarray(picture))
        changed = (pictures[0] != pictures[1]).any(axis=-1)
        worn = Image.fromarray(np.uint8(labels == LIP[cloth.kind]) * 255)
        inside, around = (
            np.asarray(worn.filter(kind(3))) > 0 for kind in (ImageFilter.MinFilter, ImageFilter.MaxFilter)
        )
        assert inside.any() and changed[inside].all() and not changed[~around].any()


def test_the_keypoints_lie_on_the_body(drawn, all_drawn):
    for category in CATEGORIES:
        for i in range(10):
            person, cloth = draw_sample(7, "train", i, category)
            _, _, labels = draw_person(person, cloth, 128, 96)
            points = keypoints(person, 128, 96)
            assert {"right_wrist", "left_elbow", "middle_hip"} <= points.keys() <= set(world.BODY_25)
            for name, (x, y) in points.items():
                assert labels[int(y), int(x)] != LIP["background"], (category, i, name)
            if "nose" in points:
                x, y = points["nose"]
                assert labels[int(y), int(x)] in {LIP["face"], LIP["left_arm"], LIP["right_arm"]}
            assert all(points[f"right_{joint}"][0] < points[f"left_{joint}"][0] for joint in ("elbow", "hip"))
            crossed = points["right_wrist"][0] > points["left_wrist"][0]
            assert crossed == (person.levels["pose"] == "crossed")
    person, _ = draw_sample(3, "train", 0, "upper")
    written = json.loads((drawn / "train" / "openpose_json" / "00000_00_keypoints.json").read_text())
    numbers = np.array(written["people"][0]["pose_keypoints_2d"]).reshape(25, 3)
    for name, (x, y, confidence) in zip(world.BODY_25, numbers):
        at = keypoints(person, *SMALL).get(name)
        assert (x, y, confidence) == (pytest.approx((*at, 1), abs=0.01) if at else (0, 0, 0))
    assert Image.open(drawn / "train" / "openpose_img" / "00000_00_rendered.png").size == SMALL[::-1]
    rows = json.loads((all_drawn / "upper_body" / "keypoints" / "000000_2.json").read_text())["keypoints"]
    assert np.shape(rows) == (18, 4) and [row[3] for row in rows] == list(range(18))


def test_the_label_maps_have_the_numbers_of_their_dataset(drawn, all_drawn):
    def numbers(file):
        return set(np.unique(np.asarray(Image.open(file))).tolist())

    assert {5, 13} <= numbers(drawn / "train" / "image-parse-v3" / "00000_00.png") <= set(LIP.values())
    assert {4, 11} <= numbers(all_drawn / "upper_body" / "label_maps" / "000000_4.png")
    assert {9, 10, 11} <= numbers(all_drawn / "dresses" / "label_maps" / "000002_4.png")
    kinds = set()
    for line in (line for line in described(all_drawn) if line["paired"]):
        folder, kind = make_dataset.DRESS_CODE_FOLDERS[line["category"]], line["attributes"]["kind"]
        file = all_drawn / folder / "label_maps" / line["person"].replace("_0.", "_4.")
        assert {"top": 4, "skirt": 5, "trousers": 6, "dress": 7}[kind] in numbers(file)
        kinds.add(kind)
    assert len(kinds) == 4


def test_every_line_says_its_levels_and_what_can_be_recognised(all_drawn):
    lines = described(all_drawn)
    own = {line["cloth"]: line for line in lines if line["paired"]}
    unpaired = [line for line in lines if not line["paired"]]
    assert len(unpaired) == 8
    for line in unpaired:
        assert line["attributes"] == own[line["cloth"]]["attributes"]  # what is tried on
        wearer = own[line["person"].replace("_0.", "_1.")]
        assert all(line["factors"][name] == wearer["factors"][name] for name in world.PERSON_FACTORS)
        assert line["category"] == wearer["category"]
        if line["category"] != "lower":
            order = [list(world.SLEEVES).index(one["attributes"]["sleeve_length"]) for one in (line, wearer)]
            expected = "equal" if order[0] == order[1] else "longer" if order[0] > order[1] else "shorter"
            assert line["factors"]["sleeve"] == expected


def test_factors_that_do_not_vary_stay_at_their_easiest_level_and_change_nothing_else():
    for i in range(20):
        category = CATEGORIES[i % 3]
        (person, cloth), (easy, plain), (posed, _) = (
            draw_sample(1, "train", i, category, factors) for factors in (FACTORS, (), ("pose",))
        )
        assert set(easy.levels.values()) == {next(iter(LEVELS[name])) for name in world.PERSON_FACTORS}
        assert (plain.print, plain.pattern, plain.logo, plain.fit, plain.sleeve) == (
            "none",
            "plain",
            "none",
            "tight",
            "short",
        )
        assert posed.levels == easy.levels | {"pose": person.levels["pose"]}
        assert np.array_equal(easy.skin, person.skin) and np.array_equal(easy.wall, person.wall)
        assert (plain.kind, plain.color_name, plain.length) == (cloth.kind, cloth.color_name, cloth.length)
    levels = Counter(draw_sample(1, "train", i, "upper")[0].levels["pose"] for i in range(300))
    assert levels.keys() == LEVELS["pose"].keys() and all(
        abs(levels[name] / 300 - odds) < 0.08 for name, odds in LEVELS["pose"].items()
    )


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_larger_picture_shows_the_same(category):
    person, cloth = draw_sample(2, "train", 1, category)
    for draw in (lambda *size: draw_person(person, cloth, *size)[0], lambda *size: draw_cloth(cloth, *size)):
        small, large = draw(128, 96), draw(256, 192)
        assert large.size == (192, 256)
        assert np.abs(np.asarray(small, np.float32) - np.asarray(large.reduce(2), np.float32)).mean() < 1.5


def test_cloths_of_every_kind_look_different_from_each_other():
    """Every attribute that is written shows in the flat cloth."""
    _, cloth = draw_sample(0, "train", 0, "upper")
    plain = replace(
        cloth, print="none", pattern="plain", logo="none", fold="none", fit="tight", sleeve="short", length="normal"
    )
    changes = [{"logo": logo} for logo in (*world.LOGOS, "word")] + [
        {"pattern": name, "period": 8.0} for name in world.PATTERNS
    ]
    changes += [{"sleeve": name} for name in world.SLEEVES if name != "short"]
    changes += [
        {"length": "crop"},
        {"length": "long"},
        {"fit": "loose"},
        {"fold": "folds"},
        {"color": 0.5 * plain.color},
    ]
    second = {"second": 1 - plain.color}
    flat = {np.asarray(draw_cloth(replace(plain, **second, **change), *SMALL)).tobytes() for change in [{}, *changes]}
    assert len(flat) == 1 + len(changes)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--train", "-1"],
        ["--test", "1"],
        ["--test", "5", "--category", "all"],
        ["--height", "100"],
        ["--factors", "mood"],
    ],
)
def test_the_dataset_refuses_bad_counts_sizes_and_factors(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_dataset.parse_args(["--output_dir", str(tmp_path / "new"), *arguments])
    assert arguments[0] in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_the_base_trainer_refuses_a_set_in_which_nobody_follows_another(tmp_path):
    make_dataset.make_dataset(tmp_path / "few", train=3, test=6, seed=3, height=64, category="all")
    line = ["--dataset_root", str(tmp_path / "few"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="few: no category has two train pairs"):
        train_base.main(train_base.parse_args(line))


def test_the_base_trainer_writes_an_ordinary_diffusers_folder(drawn, tmp_path):
    arguments = ["--dataset_root", str(drawn), "--output_dir", str(tmp_path), "--batch_size", "4"]
    arguments += ["--vae_steps", "1", "--unet_steps", "2", "--decoder_steps", "1", "--checkpointing_steps", "1"]
    train_base.main(train_base.parse_args(arguments))
    pipe = StableDiffusionInpaintPipeline.from_pretrained(tmp_path)
    assert pipe.unet.config.in_channels == 9
    pipe.set_progress_bar_config(disable=True)
    seen = TreePairs(drawn, "test", True).pictures(0)
    options = {
        "image": seen["person"],
        "mask_image": seen["mask"],
        "height": 64,
        "width": 48,
        "num_inference_steps": 1,
    }
    assert pipe("a person", **options).images[0].size == (48, 64)


def test_the_committed_model_is_safetensors_without_code():
    suffixes = {path.suffix for path in (ROOT / "demo" / "model").rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".txt"}
    assert sum(path.stat().st_size for path in (ROOT / "demo" / "model").rglob("*")) < 26.5e6
    with safe_open(ROOT / "demo" / "model" / ADAPTER_NAME, "pt") as adapter:
        assert adapter.metadata()["base_model"] == "demo/model"  # not the folder in which it was trained
