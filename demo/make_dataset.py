#!/usr/bin/env python
"""Draw a small VITON-HD-shaped dataset of people and upper-body cloths.

Photograph sets never show the same person, in the same pose, in another cloth. This drawn world does: for every line of the
unpaired `test_pairs.txt`, `test/tryon/PERSON__CLOTH.png` is the true picture, so a try-on can be measured pixel by pixel.

Every sample depends on the seed, its split and its number alone: the same command writes the same files, and a larger
`--train` only adds to them.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm


# All lengths are in pixels of a 64x48 picture; other sizes scale them.
UNIT_HEIGHT, UNIT_WIDTH = 64, 48
SUPERSAMPLING = 4
ZOOM, FRAME_TOP = 1.15, 2.5  # people are framed from the head to the thighs, as in VITON-HD

# The label numbers of VITON-HD's `image-parse-v3` (the LIP classes).
BACKGROUND, HAIR, UPPER_CLOTHES, PANTS, NECK, FACE, LEFT_ARM, RIGHT_ARM = 0, 2, 5, 9, 10, 13, 14, 15
LABEL_COLORS = {
    HAIR: (254, 0, 0),
    UPPER_CLOTHES: (254, 85, 0),
    PANTS: (0, 85, 85),
    NECK: (85, 51, 0),
    FACE: (0, 0, 254),
    LEFT_ARM: (51, 169, 220),
    RIGHT_ARM: (0, 254, 254),
}

PATTERNS = ("plain", "horizontal stripes", "vertical stripes", "checks", "dots")
LOGOS = ("disc", "square", "triangle", "cross", "ring")
SLEEVE_LENGTHS = {"no": 0.0, "short": 0.38, "half": 0.6, "long": 1.0}  # fractions of the arm
SKIN_TONES = (
    np.array([[255, 224, 196], [241, 194, 160], [214, 160, 120], [170, 115, 80], [120, 78, 52], [84, 54, 40]]) / 255
)
HAIR_COLORS = (
    np.array([[35, 28, 25], [80, 50, 30], [140, 90, 45], [215, 180, 110], [150, 60, 35], [130, 130, 135]]) / 255
)


@dataclass(frozen=True)
class Cloth:
    """What a cloth looks like, wherever it is drawn."""

    color: np.ndarray
    second_color: np.ndarray
    pattern: str
    repeats: int
    logo: str | None
    logo_color: np.ndarray
    sleeve: str
    v_neck: bool


@dataclass(frozen=True)
class Person:
    """A body, its pose and its surroundings; everything but the cloth."""

    skin: np.ndarray
    hair: np.ndarray
    long_hair: bool
    trousers: np.ndarray
    background: np.ndarray
    floor: np.ndarray
    center: float
    shoulder_y: float
    torso_length: float
    lean: float
    half_widths: tuple[float, float, float]  # shoulders, waist, hips
    arm_angles: tuple[tuple[float, float], tuple[float, float]]  # left, right: upper arm, forearm
    arm_radius: float


def random_color(rng: np.random.Generator, saturation=(0.35, 0.95), value=(0.3, 0.95)) -> np.ndarray:
    """A colour with even hue, as RGB in [0, 1]."""
    hue, s, v = rng.uniform(0, 6), rng.uniform(*saturation), rng.uniform(*value)
    return np.array([v - v * s * max(0, min(k := (n + hue) % 6, 4 - k, 1)) for n in (5, 3, 1)])


def contrasting_color(rng: np.random.Generator, color: np.ndarray) -> np.ndarray:
    while np.abs((other := random_color(rng, (0.0, 0.95), (0.1, 1.0))) - color).max() < 0.45:
        pass
    return other


def random_cloth(rng: np.random.Generator) -> Cloth:
    color = random_color(rng, (0.1, 0.95), (0.25, 0.95))
    pattern = str(rng.choice(PATTERNS, p=(0.3, 0.2, 0.2, 0.15, 0.15)))
    second_color = contrasting_color(rng, color)
    return Cloth(
        color=color,
        second_color=second_color,
        pattern=pattern,
        repeats=int(rng.integers(2, 4)),
        logo=str(rng.choice(LOGOS)) if pattern == "plain" and rng.random() < 0.75 else None,
        logo_color=second_color,
        sleeve=str(rng.choice(list(SLEEVE_LENGTHS))),
        v_neck=bool(rng.random() < 0.4),
    )


def random_person(rng: np.random.Generator) -> Person:
    wall = random_color(rng, (0.0, 0.35), (0.55, 1.0))
    tone = rng.uniform(0, len(SKIN_TONES) - 1)
    skin = SKIN_TONES[int(tone)] * (1 - tone % 1) + SKIN_TONES[int(np.ceil(tone))] * (tone % 1)
    build = rng.uniform(-1, 1)

    def arm() -> tuple[float, float]:
        if rng.random() < 0.25:  # hand on hip
            return rng.uniform(35, 50), rng.uniform(-55, -40)
        upper = rng.uniform(6, 45)
        return upper, upper + rng.uniform(-35, 15)

    return Person(
        skin=skin,
        hair=HAIR_COLORS[rng.integers(len(HAIR_COLORS))] * rng.uniform(0.8, 1.1),
        long_hair=bool(rng.random() < 0.5),
        trousers=random_color(rng, (0.0, 0.7), (0.1, 0.6)),
        background=wall,
        floor=np.clip(wall * rng.uniform(0.8, 1.0), 0, 1),
        center=UNIT_WIDTH / 2 + rng.uniform(-1.5, 1.5),
        shoulder_y=rng.uniform(20.5, 22.5),
        torso_length=rng.uniform(26, 29),
        lean=rng.uniform(-4, 4),
        half_widths=(9.3 + 1.0 * build, 7.8 + 1.3 * build, 8.6 + 1.2 * build),
        arm_angles=(arm(), arm()),
        arm_radius=2.7 + 0.3 * build,
    )


class Canvas:
    """A supersampled picture and its label map, painted back to front."""

    def __init__(self, height: int, width: int, color: np.ndarray, zoom: float = 1.0, top: float = 0.0):
        self.size = (height, width)
        rows, columns = height * SUPERSAMPLING, width * SUPERSAMPLING
        unit = UNIT_HEIGHT / rows / zoom
        self.y, self.x = (np.mgrid[0:rows, 0:columns] * unit + unit / 2).astype(np.float32)
        self.y += top
        self.x += UNIT_WIDTH / 2 * (1 - 1 / zoom)
        self.rgb = np.empty((rows, columns, 3), np.float32)
        self.rgb[:] = color
        self.labels = np.full((rows, columns), BACKGROUND, np.uint8)

    def paint(self, where: np.ndarray, color: np.ndarray, label: int | None = None) -> None:
        """Fill the N true pixels of `where` with one colour (3,), or each with its own (N, 3)."""
        self.rgb[where] = color
        if label is not None:
            self.labels[where] = label

    def ellipse(self, cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
        return ((self.x - cx) / rx) ** 2 + ((self.y - cy) / ry) ** 2 <= 1

    def limb(self, start, end, radius: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A rounded bar: its pixels, its coordinate across in [-1, 1] and along in [0, 1]."""
        dx, dy = end[0] - start[0], end[1] - start[1]
        length = np.hypot(dx, dy)
        along = ((self.x - start[0]) * dx + (self.y - start[1]) * dy) / length**2
        nearest = np.clip(along, 0, 1)
        distance = np.hypot(self.x - start[0] - nearest * dx, self.y - start[1] - nearest * dy)
        across = ((self.x - start[0]) * dy - (self.y - start[1]) * dx) / length / radius
        return distance <= radius, np.clip(across, -1, 1), nearest

    def torso(self, center, top, length, half_widths, lean=0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A body from shoulders to hips: its pixels, its coordinate across in [-1, 1] and down in [0, 1]."""
        shear = np.tan(np.radians(lean))
        down = (self.y - top) / length
        width = np.interp(
            down, [0.0, 0.1, 0.6, 1.0], [half_widths[0] - 2.2, half_widths[0], half_widths[1], half_widths[2]]
        )
        across = (self.x - center + (self.y - top - length) * shear) / width
        return (np.abs(across) <= 1) & (down >= 0) & (down <= 1), across, down

    def image(self) -> Image.Image:
        height, width = self.size
        small = self.rgb.reshape(height, SUPERSAMPLING, width, SUPERSAMPLING, 3).mean(axis=(1, 3))
        return Image.fromarray((small.clip(0, 1) * 255).round().astype(np.uint8))

    def mask(self, where: np.ndarray) -> Image.Image:
        height, width = self.size
        covered = where.reshape(height, SUPERSAMPLING, width, SUPERSAMPLING).mean(axis=(1, 3)) >= 0.5
        return Image.fromarray(np.uint8(covered * 255))

    def label_map(self) -> Image.Image:
        middle = self.labels[SUPERSAMPLING // 2 :: SUPERSAMPLING, SUPERSAMPLING // 2 :: SUPERSAMPLING]
        image = Image.fromarray(np.ascontiguousarray(middle)).convert("P")
        palette = np.zeros((256, 3), np.uint8)
        for label, color in LABEL_COLORS.items():
            palette[label] = color
        image.putpalette(palette.tobytes())
        return image


def cloth_colors(cloth: Cloth, across: np.ndarray, down: np.ndarray, on_sleeve: bool) -> np.ndarray:
    """The cloth's colours (N, 3) at N of its own coordinates: across in [-1, 1], down in [0, 1]."""
    u, v = (across + 1) / 2 * (1 if on_sleeve else cloth.repeats), down * cloth.repeats
    if cloth.pattern == "horizontal stripes":
        second = v % 1 < 0.5
    elif cloth.pattern == "vertical stripes":
        second = u % 1 < 0.5
    elif cloth.pattern == "checks":
        second = (1.5 * u % 2 < 1) ^ (1.5 * v % 2 < 1)
    elif cloth.pattern == "dots":
        second = (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.1
    else:
        second = np.zeros(across.shape, bool)
    colors = np.where(second[..., None], cloth.second_color, cloth.color)
    if cloth.logo and not on_sleeve:
        colors[logo_shape(cloth.logo, across / 0.42, (down - 0.38) / 0.16)] = cloth.logo_color
    return colors * (1 - 0.22 * across[..., None] ** 2)  # rounder than flat


def logo_shape(logo: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    radius = np.hypot(x, y)
    return {
        "disc": radius < 1,
        "ring": (radius < 1) & (radius > 0.5),
        "square": np.maximum(abs(x), abs(y)) < 0.9,
        "triangle": (y < 0.8) & (y > -1 + 1.8 * abs(x)),
        "cross": (np.minimum(abs(x), abs(y)) < 0.32) & (np.maximum(abs(x), abs(y)) < 1),
    }[logo]


def neckline(canvas: Canvas, cloth: Cloth, center: float, top: float) -> np.ndarray:
    if cloth.v_neck:
        return (canvas.y < top + 7.5 - 1.7 * abs(canvas.x - center)) & (abs(canvas.x - center) < 4.2)
    return canvas.ellipse(center, top - 0.5, 4.2, 3.4)


def draw_cloth(cloth: Cloth, height: int, width: int) -> Image.Image:
    """The cloth laid flat on white."""
    canvas = Canvas(height, width, np.ones(3))
    center, top, length, half_widths = UNIT_WIDTH / 2, 13.0, 38.0, (11.0, 10.5, 10.8)
    for side in (-1, 1):
        reach = SLEEVE_LENGTHS[cloth.sleeve]
        if reach:
            start = (center + side * (half_widths[0] - 2.5), top + 3.3)
            end = (start[0] + side * 13.5, start[1] + 30.0)
            pixels, across, along = canvas.limb(start, end, 3.4)
            sleeve = pixels & (along < reach)
            canvas.paint(sleeve, 0.9 * cloth_colors(cloth, side * across[sleeve], along[sleeve], on_sleeve=True))
    pixels, across, down = canvas.torso(center, top, length, half_widths)
    body = pixels & ~neckline(canvas, cloth, center, top)
    canvas.paint(body, cloth_colors(cloth, across[body], down[body], on_sleeve=False))
    return canvas.image()


def arm_joints(person: Person, side: int) -> list[tuple[float, float]]:
    """Shoulder, elbow and wrist; side -1 is the picture's left, the person's right."""
    upper, fore = person.arm_angles[0 if side < 0 else 1]
    lean = np.tan(np.radians(person.lean)) * person.torso_length
    joints = [(person.center + lean + side * (person.half_widths[0] - 2.3), person.shoulder_y + 2.8)]
    for angle, length in ((upper, 12.5), (fore, 11.5)):
        x, y = joints[-1]
        joints.append((x + side * length * np.sin(np.radians(angle)), y + length * np.cos(np.radians(angle))))
    return joints


def draw_person(person: Person, cloth: Cloth, height: int, width: int) -> tuple[Image.Image, Image.Image, Image.Image]:
    """The person wearing the cloth: picture, agnostic mask (the same for every cloth) and label map."""
    canvas = Canvas(height, width, person.background, ZOOM, FRAME_TOP)
    canvas.paint(canvas.y > 56, person.floor)
    neck_x = person.center + np.tan(np.radians(person.lean)) * person.torso_length
    head_y = person.shoulder_y - 9.5
    if person.long_hair:
        canvas.paint(canvas.ellipse(neck_x, head_y + 3, 7.2, 10), person.hair, HAIR)

    hips = person.shoulder_y + person.torso_length
    legs = (np.abs(canvas.x - person.center) < person.half_widths[2] + 0.02 * (canvas.y - hips)) & (
        canvas.y > hips - 3
    )
    canvas.paint(legs, person.trousers, PANTS)
    canvas.paint(legs & (np.abs(canvas.x - person.center) < 0.4) & (canvas.y > hips + 4), 0.6 * person.trousers, PANTS)

    torso, across, down = canvas.torso(
        person.center, person.shoulder_y, person.torso_length, person.half_widths, person.lean
    )
    neck, _, _ = canvas.limb((neck_x, head_y + 5), (neck_x, person.shoulder_y + 1.5), 3.0)
    canvas.paint(torso | neck, 0.93 * person.skin, NECK)
    dressed = torso & ~neckline(canvas, cloth, neck_x, person.shoulder_y)
    canvas.paint(dressed, cloth_colors(cloth, across[dressed], down[dressed], on_sleeve=False), UPPER_CLOTHES)
    head = draw_head(canvas, person, neck_x, head_y)

    arms, hands = np.zeros_like(torso), np.zeros_like(torso)
    for side, label in ((-1, RIGHT_ARM), (1, LEFT_ARM)):
        shoulder, elbow, wrist = arm_joints(person, side)
        for i, (start, end) in enumerate(((shoulder, elbow), (elbow, wrist))):
            pixels, s, t = canvas.limb(start, end, person.arm_radius)
            along = (i + t) / 2
            canvas.paint(pixels, person.skin * (1 - 0.18 * s[pixels, None] ** 2), label)
            sleeve = pixels & (along < SLEEVE_LENGTHS[cloth.sleeve])
            canvas.paint(
                sleeve, 0.9 * cloth_colors(cloth, side * s[sleeve], along[sleeve], on_sleeve=True), UPPER_CLOTHES
            )
            arms |= pixels
        hand = canvas.ellipse(*wrist, 2.6, 2.8)
        canvas.paint(hand, person.skin, label)
        hands |= hand

    covered = torso | arms | (neck & (canvas.y > person.shoulder_y - 1))
    mask = dilate(covered, round(1.4 * SUPERSAMPLING * height / UNIT_HEIGHT)) & ~hands & ~head
    return canvas.image(), canvas.mask(mask), canvas.label_map()


def draw_head(canvas: Canvas, person: Person, x: float, y: float) -> np.ndarray:
    """Face and hair; returns the pixels they cover."""
    face = canvas.ellipse(x, y, 5.2, 6.6)
    canvas.paint(face, person.skin, FACE)
    for side in (-1, 1):
        canvas.paint(canvas.ellipse(x + side * 2, y - 0.4, 0.75, 0.75), np.full(3, 0.1))
    canvas.paint(canvas.ellipse(x, y + 3.4, 1.6, 0.55), person.skin * np.array([0.75, 0.45, 0.45]))
    hair = canvas.ellipse(x, y - 1.2, 6, 7.2) & ~canvas.ellipse(x, y + 2.0, 5.0, 5.6)
    canvas.paint(hair, person.hair, HAIR)
    return face | hair


def dilate(where: np.ndarray, radius: int) -> np.ndarray:
    """Grow a boolean mask by `radius` pixels in the 8 directions, as an octagon."""
    for i in range(radius):
        padded = np.pad(where, 1)
        grown = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:] | where
        if i % 2:
            grown |= padded[:-2, :-2] | padded[2:, 2:] | padded[:-2, 2:] | padded[2:, :-2]
        where = grown
    return where


def draw_sample(seed: int, split: str, index: int) -> tuple[Person, Cloth]:
    """Sample `index` of a split: the same for every size of the dataset."""
    rng = np.random.default_rng([seed, ("train", "test").index(split), index])
    return random_person(rng), random_cloth(rng)


def write_sample(index: int, root: Path, split: str, seed: int, height: int, width: int) -> None:
    person, cloth = draw_sample(seed, split, index)
    image, mask, labels = draw_person(person, cloth, height, width)
    name = f"{index:05d}_00"
    image.save(root / split / "image" / f"{name}.png")
    mask.save(root / split / "agnostic-mask" / f"{name}_mask.png")
    labels.save(root / split / "image-parse-v3" / f"{name}.png")
    draw_cloth(cloth, height, width).save(root / split / "cloth" / f"{name}.png")


def write_truth(pair: tuple[int, int], root: Path, seed: int, height: int, width: int) -> None:
    (person, _), (_, cloth) = (draw_sample(seed, "test", index) for index in pair)
    image, _, _ = draw_person(person, cloth, height, width)
    image.save(root / "test" / "tryon" / f"{pair[0]:05d}_00__{pair[1]:05d}_00.png")


def make_dataset(
    root: Path, train: int, test: int, seed: int, height: int = UNIT_HEIGHT, width: int = UNIT_WIDTH
) -> None:
    """Write the whole dataset under `root`; `test_pairs.txt` gives every test person another test person's cloth."""
    for split in ("train", "test"):
        for folder in ("image", "cloth", "agnostic-mask", "image-parse-v3"):
            (root / split / folder).mkdir(parents=True, exist_ok=True)
    (root / "test" / "tryon").mkdir(exist_ok=True)

    order = np.random.default_rng([seed, 2]).permutation(test)
    partner = dict(zip(order.tolist(), np.roll(order, 1).tolist()))
    unpaired = [(i, partner[i]) for i in range(test)]
    (root / "train_pairs.txt").write_text("".join(f"{i:05d}_00.png {i:05d}_00.png\n" for i in range(train)))
    (root / "test_pairs.txt").write_text("".join(f"{i:05d}_00.png {j:05d}_00.png\n" for i, j in unpaired))

    options = {"root": root, "seed": seed, "height": height, "width": width}
    jobs = [
        ("train", partial(write_sample, split="train", **options), range(train)),
        ("test", partial(write_sample, split="test", **options), range(test)),
        ("truth", partial(write_truth, **options), unpaired),
    ]
    with ProcessPoolExecutor() as pool:
        for name, job, items in jobs:
            list(tqdm(pool.map(job, items, chunksize=16), total=len(items), desc=name, disable=not len(items)))


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write, made if missing")
    parser.add_argument("--train", type=int, default=2000, help="training samples (default 2000, 0 for none)")
    parser.add_argument(
        "--test", type=int, default=64, help="test samples and unpaired lines (default 64, 0 for none)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the whole set (default 0)")
    parser.add_argument(
        "--height", type=int, default=UNIT_HEIGHT, help="picture height, a multiple of 64 (default 64)"
    )
    args = parser.parse_args(input_args)
    if args.train < 0 or args.test < 0 or args.test == 1:
        parser.error(
            f"--train and --test must not be negative, and one test sample has no partner, got {args.train} and {args.test}"
        )
    if args.height <= 0 or args.height % UNIT_HEIGHT:
        parser.error(f"--height must be a positive multiple of {UNIT_HEIGHT}, got {args.height}")
    return args


def main(args: argparse.Namespace) -> None:
    make_dataset(
        args.output_dir, args.train, args.test, args.seed, args.height, args.height * UNIT_WIDTH // UNIT_HEIGHT
    )
    print(f"{args.train} training and {args.test} test samples in {args.output_dir}")


if __name__ == "__main__":
    main(parse_args())
