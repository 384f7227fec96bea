"""Draw a dataset of people and cloths in VITON-HD's layout, or with `--category all` in DressCode's.

With `--category outfit` everybody wears a top (`cloth`) with trousers or a skirt (`cloth_2`), and tries on both of somebody else's.

Photograph sets never show the same person, in the same pose, in another cloth. This drawn world does: for every unpaired line of
the test list, `tryon/PERSON__CLOTH.png` is the true picture, so a try-on can be measured pixel by pixel. `condition/PERSON` shows
everybody in the cloth of the next sample of their category, as `train_vton.py --mask_free` reads it. `factors.jsonl` says of every
line of the lists, and of every test person in their own cloth, by what it varies and what can be recognised.

Every sample depends on the seed, its split and its number alone: the same command writes the same files, and a larger
`--train` only adds to them.
"""

import argparse
import json
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from demo.world import (
    BODY_25,
    CATEGORIES,
    COCO_18,
    FACTORS,
    LIP,
    SLEEVES,
    SPLITS,
    UNIT_HEIGHT,
    UNIT_WIDTH,
    Cloth,
    Person,
    draw_cloth,
    draw_outfit,
    draw_person,
    draw_sample,
    draw_skeleton,
    keypoints,
)


# Colours of a parse map by LIP's number: those of the usual 20-class palette.
PALETTE = (
    (0, 0, 0), (128, 0, 0), (254, 0, 0), (0, 85, 0), (169, 0, 51), (254, 85, 0), (0, 0, 85), (0, 119, 220), (85, 85, 0), (0, 85, 85),
    (85, 51, 0), (52, 86, 128), (0, 128, 0), (0, 0, 254), (51, 169, 220), (0, 254, 254), (85, 254, 169), (169, 254, 85),
    (254, 254, 0), (254, 169, 0),
)  # fmt: skip
# The label numbers of DressCode's `label_maps` by LIP's names.
DRESS_CODE_LABELS = {
    "background": 0,
    "hair": 2,
    "top": 4,
    "skirt": 5,
    "trousers": 6,
    "dress": 7,
    "left_shoe": 9,
    "right_shoe": 10,
    "neck": 11,
    "face": 11,
    "left_leg": 12,
    "right_leg": 13,
    "left_arm": 14,
    "right_arm": 15,
}
DRESS_CODE_FOLDERS = {"upper": "upper_body", "lower": "lower_body", "dress": "dresses"}
FIRST_TEST_NUMBER = 500_000  # DressCode keeps both splits in one folder


@dataclass(frozen=True)
class World:
    """All that decides what the samples look like.

    Args:
        seed: of the whole set.
        height: of a picture in pixels, a multiple of 64; the width is three quarters of it.
        category: `upper`, `lower`, `dress`, or `all` in turn; or `outfit`, of two cloths.
        factors: which of `FACTORS` vary.
    """

    seed: int
    height: int = UNIT_HEIGHT
    category: str = "upper"
    factors: Collection[str] = FACTORS

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.height * UNIT_WIDTH // UNIT_HEIGHT

    def category_of(self, index: int) -> str:
        return CATEGORIES[index % len(CATEGORIES)] if self.category == "all" else self.category

    def sample(self, split: str, index: int) -> tuple[Person, Cloth]:
        if self.category == "outfit":
            return draw_outfit(self.seed, split, index, self.factors)
        return draw_sample(self.seed, split, index, self.category_of(index), self.factors)

    @property
    def step(self) -> int:
        """From one number to the next of the same category."""
        return len(CATEGORIES) if self.category == "all" else 1

    def partner(self, index: int, count: int) -> int:
        """Whose cloth a test person tries on: the next one's of the same category."""
        return index + self.step if index + self.step < count else index % self.step

    def in_cloth_of(self, split: str, index: int, other: int) -> Image.Image:
        """A person in the cloths of another sample."""
        (person, _), (wearer, cloth) = (self.sample(split, number) for number in (index, other))
        person = replace(person, other=wearer.other) if self.category == "outfit" else person
        return draw_person(person, cloth, *self.size)[0]


class VitonHD:
    """VITON-HD's folders: everything of a split in one."""

    folders = ("image", "cloth", "agnostic-mask", "image-parse-v3", "openpose_img", "openpose_json", "condition")

    def __init__(self, root: Path) -> None:
        self.root = root

    def prepare(self) -> None:
        for split in SPLITS:
            for folder in (*self.folders, *(["tryon"] if split == "test" else [])):
                (self.root / split / folder).mkdir(parents=True, exist_ok=True)

    def person(self, split: str, index: int) -> str:
        return f"{index:05d}_00.png"

    cloth = person

    def list_file(self, split: str, category: str, paired: bool) -> Path | None:
        """Where a line stands; None for the test persons with their own cloths, whom VITON-HD doesn't list again."""
        if split == "test" and paired:
            return None
        return self.root / f"{split}_pairs.txt"

    def write(self, split: str, index: int, category: str, pictures: dict[str, Image.Image], labels, points) -> None:
        place, name = self.root / split, Path(self.person(split, index)).stem
        save(pictures["person"], place / "image" / f"{name}.png")
        save(pictures["cloth"], place / "cloth" / f"{name}.png")
        if "cloth_2" in pictures:
            (place / "cloth_2").mkdir(exist_ok=True)
            save(pictures["cloth_2"], place / "cloth_2" / f"{name}.png")
        save(pictures["mask"], place / "agnostic-mask" / f"{name}_mask.png")
        save(pictures["condition"], place / "condition" / f"{name}.png")
        save(pictures["skeleton"], place / "openpose_img" / f"{name}_rendered.png")
        save(with_palette(labels), place / "image-parse-v3" / f"{name}.png")
        numbers = [number for point in BODY_25 for number in triple(points.get(point))]
        text = json.dumps({"version": 1.3, "people": [{"person_id": [-1], "pose_keypoints_2d": numbers}]})
        (place / "openpose_json" / f"{name}_keypoints.json").write_text(text, encoding="utf-8")

    def truth(self, category: str, person: str, cloth: str) -> Path:
        return self.root / "test" / "tryon" / f"{Path(person).stem}__{Path(cloth).stem}.png"


class DressCode(VitonHD):
    """DressCode's folders: one for every category, both splits in it."""

    folders = ("images", "label_maps", "agnostic_masks", "skeletons", "keypoints", "condition", "tryon")

    def prepare(self) -> None:
        for category in DRESS_CODE_FOLDERS.values():
            for folder in self.folders:
                (self.root / category / folder).mkdir(parents=True, exist_ok=True)

    def number(self, split: str, index: int) -> str:
        return f"{index + FIRST_TEST_NUMBER * (split == 'test'):06d}"

    def person(self, split: str, index: int) -> str:
        return f"{self.number(split, index)}_0.png"

    def cloth(self, split: str, index: int) -> str:
        return f"{self.number(split, index)}_1.png"

    def list_file(self, split: str, category: str, paired: bool) -> Path:
        end = "" if split == "train" else "_paired" if paired else "_unpaired"
        return self.root / DRESS_CODE_FOLDERS[category] / f"{split}_pairs{end}.txt"

    def write(self, split: str, index: int, category: str, pictures: dict[str, Image.Image], labels, points) -> None:
        place, number = self.root / DRESS_CODE_FOLDERS[category], self.number(split, index)
        save(pictures["person"], place / "images" / f"{number}_0.png")
        save(pictures["cloth"], place / "images" / f"{number}_1.png")
        save(pictures["mask"], place / "agnostic_masks" / f"{number}_0.png")
        save(pictures["condition"], place / "condition" / f"{number}_0.png")
        save(pictures["skeleton"], place / "skeletons" / f"{number}_5.png")
        table = np.zeros(len(PALETTE), np.uint8)
        for name, label in LIP.items():
            table[label] = DRESS_CODE_LABELS[name]
        save(with_palette(table[labels]), place / "label_maps" / f"{number}_4.png")
        rows = [[*triple(points.get(point)), i] for i, point in enumerate(COCO_18)]
        (place / "keypoints" / f"{number}_2.json").write_text(json.dumps({"keypoints": rows}), encoding="utf-8")

    def truth(self, category: str, person: str, cloth: str) -> Path:
        return self.root / DRESS_CODE_FOLDERS[category] / "tryon" / f"{Path(person).stem}__{Path(cloth).stem}.png"


def layout(root: Path, category: str) -> VitonHD:
    return (DressCode if category == "all" else VitonHD)(root)


def save(picture: Image.Image, file: Path) -> None:
    picture.save(file, compress_level=3)


def triple(point: tuple[float, float] | None) -> list[float]:
    """x, y and confidence, as OpenPose writes them: zeros for what it didn't find."""
    return [round(point[0], 2), round(point[1], 2), 1.0] if point else [0.0, 0.0, 0.0]


def with_palette(labels: np.ndarray) -> Image.Image:
    picture = Image.fromarray(labels).convert("P")
    picture.putpalette(bytes(channel for color in PALETTE for channel in color))
    return picture


def describe(world: World, person: Person, own: Cloth, cloth: Cloth) -> dict:
    """The level of every factor and what can be recognised, of a person in a cloth; `own` is what they wore."""
    levels = person.levels | {"fold": cloth.fold, "print": cloth.print, "fit": cloth.fit}
    if cloth.kind in ("top", "dress"):
        longer = SLEEVES[cloth.sleeve] - SLEEVES[own.sleeve]
        levels["sleeve"] = "longer" if longer > 0 else "shorter" if longer < 0 else "equal"
    return {"factors": {name: levels[name] for name in FACTORS if name in levels}, "attributes": cloth.attributes()}


def write_sample(index: int, root: Path, split: str, world: World) -> None:
    person, cloth = world.sample(split, index)
    image, mask, labels = draw_person(person, cloth, *world.size)
    points = keypoints(person, *world.size)
    pictures = {
        "person": image,
        "cloth": draw_cloth(cloth, *world.size),
        "mask": mask,
        "skeleton": draw_skeleton(points, *world.size),
        "condition": world.in_cloth_of(split, index, index + world.step),
    }
    if world.category == "outfit":
        pictures["cloth_2"] = draw_cloth(person.other, *world.size)
    layout(root, world.category).write(split, index, world.category_of(index), pictures, labels, points)


def write_truth(pair: tuple[int, int], root: Path, world: World) -> None:
    files = layout(root, world.category)
    file = files.truth(world.category_of(pair[0]), files.person("test", pair[0]), files.cloth("test", pair[1]))
    save(world.in_cloth_of("test", *pair), file)


def write_lists(root: Path, world: World, pairs: list[tuple[str, int, int]]) -> None:
    """The lists of pairs, and `factors.jsonl`, from (split, person's number, cloth's number)."""
    files = layout(root, world.category)
    categories = CATEGORIES if world.category == "all" else (world.category,)
    listed = {files.list_file(split, name, split == "train"): [] for split in SPLITS for name in categories}
    with open(root / "factors.jsonl", "w", encoding="utf-8") as factors:
        for split, i, j in pairs:
            (person, own), (_, cloth), category = world.sample(split, i), world.sample(split, j), world.category_of(i)
            names = {"person": files.person(split, i), "cloth": files.cloth(split, j)}
            place = {"split": split, "category": category, "paired": i == j}
            factors.write(json.dumps(place | names | describe(world, person, own, cloth)) + "\n")
            file = files.list_file(split, category, i == j)
            if file is not None:
                listed.setdefault(file, []).append(" ".join(names.values()))
    for file, lines in listed.items():
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def make_dataset(
    root: Path,
    train: int,
    test: int,
    seed: int,
    height: int = UNIT_HEIGHT,
    category: str = "upper",
    factors: Collection[str] = FACTORS,
) -> None:
    """Write the whole dataset under `root`.

    Args:
        root: a folder, made if missing.
        train, test: how many samples; those of category `all` are spread evenly. Every test person also has an unpaired line.
        seed, height, category, factors: see `World`.
    """
    world = World(seed, height, category, factors)
    layout(root, category).prepare()
    unpaired = [(i, world.partner(i, test)) for i in range(test)]
    lines = [("train", i, i) for i in range(train)] + [("test", i, i) for i in range(test)]
    jobs = [
        ("train", partial(write_sample, root=root, split="train", world=world), range(train)),
        ("test", partial(write_sample, root=root, split="test", world=world), range(test)),
        ("truth", partial(write_truth, root=root, world=world), unpaired),
    ]
    with ProcessPoolExecutor() as pool:
        for name, job, items in jobs:
            list(tqdm(pool.map(job, items, chunksize=16), total=len(items), desc=name, disable=not len(items)))
    write_lists(root, world, lines + [("test", *pair) for pair in unpaired])  # last: without lists, a set is not read


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="folder to write, made if missing")
    add("--train", type=int, default=2000, help="training samples (default 2000, 0 for none)")
    add("--test", type=int, default=64, help="test samples and unpaired lines (default 64, 0 for none)")
    add("--seed", type=int, default=0, help="seed of the whole set (default 0)")
    add("--height", type=int, default=UNIT_HEIGHT, help=f"picture height, a multiple of 64 (default {UNIT_HEIGHT})")
    add(
        "--category",
        choices=(*CATEGORIES, "all", "outfit"),
        default="upper",
        help="cloths; all in turn; or outfits of two (default upper)",
    )
    add("--factors", nargs="*", choices=FACTORS, default=FACTORS, metavar="FACTOR", help=f"those that vary, of {', '.join(FACTORS)} (default all)")  # fmt: skip
    args = parser.parse_args(input_args)
    categories = len(CATEGORIES) if args.category == "all" else 1
    if args.train < 0 or args.test < 0 or 0 < args.test < 2 * categories:
        parser.error(
            f"--train and --test must not be negative, and every category needs two test samples, got {args.train} and {args.test}"
        )
    if args.test > FIRST_TEST_NUMBER or args.train > FIRST_TEST_NUMBER:
        parser.error(f"--train and --test must be {FIRST_TEST_NUMBER} at most, got {args.train} and {args.test}")
    if args.height <= 0 or args.height % 64:
        parser.error(f"--height must be a positive multiple of 64, got {args.height}")
    return args


def main(args: argparse.Namespace) -> None:
    make_dataset(args.output_dir, args.train, args.test, args.seed, args.height, args.category, tuple(args.factors))
    print(f"{args.train} training and {args.test} test samples in {args.output_dir}")


if __name__ == "__main__":
    main(parse_args())
