"""The drawn world: people, their poses and surroundings, cloths, and the factors by which they vary.

A cloth has coordinates of its own, u across and v down, in the units of the body. They follow it from the flat cloth to the body, so
that what it looks like on a person is exactly known. A unit is about 1/144 of a person's height; (0, 0) is the base of the neck, y
points down, and a side of -1 is the picture's left, which is the person's right.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from demo.drawing import Canvas, Region, profile


UNIT_HEIGHT, UNIT_WIDTH = 128, 96  # the picture in which the scales below hold
SPLITS = ("train", "test")
CATEGORIES = ("upper", "lower", "dress")

# The label numbers of VITON-HD's `image-parse-v3`: the classes of LIP (Gong et al., 2017).
LIP = {
    "background": 0,
    "hair": 2,
    "top": 5,
    "dress": 6,
    "trousers": 9,
    "neck": 10,
    "skirt": 12,
    "face": 13,
    "left_arm": 14,
    "right_arm": 15,
    "left_leg": 16,
    "right_leg": 17,
    "left_shoe": 18,
    "right_shoe": 19,
}

# How often each level of a factor is drawn; the first is what a factor that does not vary stays at.
LEVELS = {
    "pose": {"down": 0.56, "hip": 0.2, "crossed": 0.12, "raised": 0.12},
    "hair": {"short": 0.5, "behind": 0.35, "before": 0.15},
    "fold": {"none": 0.7, "folds": 0.3},
    "print": {"none": 0.2, "logo": 0.26, "word": 0.12, "coarse": 0.29, "fine": 0.13},
    "sleeve": {"short": 0.34, "no": 0.2, "half": 0.16, "long": 0.3},
    "fit": {"tight": 0.7, "loose": 0.3},
    "distance": {"near": 0.85, "far": 0.15},
    "background": {"plain": 0.82, "clutter": 0.18},
}
FACTORS = tuple(LEVELS)
PERSON_FACTORS = ("pose", "hair", "distance", "background")

COLORS = {
    "black": (0.11, 0.11, 0.13),
    "grey": (0.52, 0.53, 0.55),
    "white": (0.95, 0.94, 0.92),
    "red": (0.78, 0.14, 0.16),
    "orange": (0.93, 0.50, 0.13),
    "yellow": (0.95, 0.82, 0.24),
    "green": (0.15, 0.52, 0.28),
    "blue": (0.15, 0.34, 0.70),
    "purple": (0.46, 0.22, 0.60),
    "pink": (0.94, 0.56, 0.70),
}
PATTERNS = ("horizontal stripes", "vertical stripes", "checks", "dots")
LOGOS = ("disc", "ring", "square", "triangle", "cross")
WORDS = ("LOVE", "HELLO", "SUN", "COOL", "WOW", "MUSIC", "NICE", "2026")
NECKLINES = ("crew", "scoop", "v")
SLEEVES = {"no": 0.0, "short": 0.36, "half": 0.56, "long": 0.97}  # how much of the arm they cover
WAIST = 31.0
HEMS = {
    "top": {"crop": 36.0, "normal": 47.0, "long": 58.0},
    "trousers": {"short": 68.0, "knee": 86.0, "long": 109.0},
    "skirt": {"short": 66.0, "knee": 82.0, "long": 102.0},
    "dress": {"short": 68.0, "knee": 84.0, "long": 103.0},
}
HEM_ODDS = {"top": (0.2, 0.5, 0.3), "trousers": (0.3, 0.2, 0.5), "skirt": (0.35, 0.35, 0.3), "dress": (0.3, 0.4, 0.3)}
SKIN_TONES = np.array([(255, 222, 196), (240, 196, 162), (216, 162, 122), (176, 120, 84), (128, 84, 58), (88, 58, 43)])
HAIR_COLORS = np.array([(38, 30, 27), (84, 54, 34), (142, 94, 50), (216, 180, 112), (152, 66, 38), (134, 134, 138)])
MUTED = np.array(
    [(44, 62, 96), (36, 38, 44), (206, 202, 192), (92, 96, 104), (88, 92, 62), (226, 224, 218), (104, 44, 56)]
)
WALLS = np.array([(226, 224, 220), (205, 214, 222), (222, 212, 198), (200, 212, 200), (214, 202, 212), (176, 186, 196), (190, 178, 166)])  # fmt: skip

# Pixels to a unit, and where the base of the neck is, in a picture of 128 x 96, near and far.
FRAMES = {
    "upper": {"near": (1.26, 43.0), "far": (0.94, 38.0)},
    "lower": {"near": (1.08, -4.0), "far": (0.82, 26.5)},
    "dress": {"near": (0.81, 29.0), "far": (0.66, 36.0)},
}
FRAMES["outfit"] = FRAMES["dress"]  # a top with trousers or a skirt
FLAT_SCALES = {"top": 1.16, "trousers": 1.25, "skirt": 1.25, "dress": 1.08}
PERIODS = {"coarse": 11.0, "fine": 5.6}  # pixels of a pattern's repeat on a near person


# ------------------------------------------------------------------------------------------------------------ what there is


@dataclass(frozen=True)
class Cloth:
    """What a cloth looks like, wherever it is drawn; colours are RGB in [0, 1]."""

    kind: str
    color_name: str
    color: np.ndarray
    second_name: str
    second: np.ndarray
    print: str
    pattern: str
    period: float
    logo: str
    word: str
    sleeve: str
    length: str
    fit: str
    fold: str
    neckline: str
    phases: tuple[float, ...]

    @property
    def loose(self) -> bool:
        return self.fit == "loose"

    @property
    def hem(self) -> float:
        return HEMS[self.kind][self.length]

    def attributes(self) -> dict[str, str | None]:
        """What can be recognised of it."""
        sleeved = self.kind in ("top", "dress")
        return {
            "kind": self.kind,
            "color": self.color_name,
            "second_color": None if self.print == "none" else self.second_name,
            "pattern": self.pattern,
            "logo": self.logo,
            "sleeve_length": self.sleeve if sleeved else None,
            "garment_length": self.length,
            "neckline": self.neckline if sleeved else None,
        }


@dataclass(frozen=True)
class Figure:
    """A body's build and pose: the joints of arms and legs, the picture's left first."""

    build: float = 1.0
    shape: float = 0.0  # units by which the shoulders are wider and the hips narrower
    sway: float = 0.0  # units that the hips are to the right
    elbows: tuple = ((-26.0, 29.5), (26.0, 29.5))
    wrists: tuple = ((-35.0, 48.5), (35.0, 48.5))
    knees: tuple = ((-9.6, 80.0), (9.6, 80.0))
    ankles: tuple = ((-11.0, 109.0), (11.0, 109.0))

    def shoulder(self, side: int) -> tuple[float, float]:
        return side * (13.8 * self.build + self.shape), 9.0

    def hip(self, side: int) -> tuple[float, float]:
        return self.sway + side * (8.2 * self.build - self.shape / 2), 50.0

    def middle(self) -> tuple[np.ndarray, np.ndarray]:
        feet = (self.ankles[0][0] + self.ankles[1][0]) / 2
        return profile((-40, 0), (0, 0), (44, self.sway), (60, self.sway), (125, feet))

    def half_width(self, ease: float = 0.0, waist_ease: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Half the torso's width by y, `ease` units wider everywhere and `waist_ease` at the waist and below."""
        b, s = self.build, self.shape
        loose = ease + waist_ease
        return profile(
            (-4, 4.2 * b),
            (-1, 5.0 * b + ease / 2),
            (1.5, 9.5 * b + s + ease / 2),
            (4.2, 14.3 * b + s + ease),
            (8, 16.6 * b + s + ease),
            (13, 16.2 * b + s + ease),
            (22, 14.8 * b + s / 2 + ease + waist_ease * 0.6),
            (31, 13.0 * b + loose),
            (39, 14.8 * b - s / 2 + loose),
            (47, 16.6 * b - s + loose),
            (56, 17.0 * b - s + loose),
            (72, 16.6 * b - s + loose),
        )


@dataclass(frozen=True)
class Person:
    """A body, its looks and its surroundings: everything but the cloth to be changed."""

    category: str
    figure: Figure
    levels: dict[str, str]
    skin: np.ndarray
    hair: np.ndarray
    eyes: np.ndarray
    shoes: np.ndarray
    other: Cloth | None  # the trousers below a top, or the top above trousers
    wall: np.ndarray
    floor: np.ndarray
    scene: int  # seed of what stands in the background
    head: tuple[float, float]  # x of its middle, how far it is turned to the right
    place: tuple[float, float]  # pixels of a 128 x 96 picture, from the middle


FLAT = Figure()


# ---------------------------------------------------------------------------------------------------------------- sampling


def draw_sample(
    seed: int, split: str, index: int, category: str, factors: Collection[str] = FACTORS
) -> tuple[Person, Cloth]:
    """Sample `index` of a split, the same whatever the number of samples; `factors` outside stay at their first level."""
    people, cloths = (
        np.random.default_rng([seed, SPLITS.index(split), CATEGORIES.index(category), index, part]) for part in (0, 1)
    )
    return random_person(people, category, factors), random_cloth(cloths, category, factors)


def draw_outfit(seed: int, split: str, index: int, factors: Collection[str] = FACTORS) -> tuple[Person, Cloth]:
    """A person seen from head to foot whose two cloths both vary: the trousers or skirt is the person's `other`, the top the cloth."""
    (person, _), (_, top), (_, bottom) = (
        draw_sample(seed, split, index, category, factors) for category in ("dress", "upper", "lower")
    )
    return replace(person, category="outfit", other=bottom), top


def choose(rng: np.random.Generator, names: tuple[str, ...], odds: tuple[float, ...] | None = None) -> str:
    """One of the names, even or with the odds, which add up to 1."""
    odds = odds or (1 / len(names),) * len(names)
    return names[min(int(np.searchsorted(np.cumsum(odds), rng.random(), side="right")), len(names) - 1)]


def random_levels(rng: np.random.Generator, factors: Collection[str]) -> dict[str, str]:
    drawn = {name: choose(rng, tuple(odds), tuple(odds.values())) for name, odds in LEVELS.items()}
    return {name: level if name in factors else next(iter(LEVELS[name])) for name, level in drawn.items()}


def pick(rng: np.random.Generator, palette: np.ndarray) -> np.ndarray:
    """A colour of a palette of 0 to 255, a little off, as RGB in [0, 1]."""
    color = palette[rng.integers(len(palette))] / 255
    return np.clip(color * rng.uniform(0.92, 1.06) + rng.uniform(-0.02, 0.02, 3), 0, 1)


def named_color(rng: np.random.Generator, name: str) -> np.ndarray:
    return np.clip(np.array(COLORS[name]) * rng.uniform(0.93, 1.04) + rng.uniform(-0.012, 0.012, 3), 0.05, 0.97)


@cache
def contrasting(name: str) -> tuple[str, ...]:
    """The colours that stand out from a named one: other in hue, and lighter or darker."""
    differences = {other: np.subtract(COLORS[other], COLORS[name]) for other in COLORS}
    return tuple(other for other, d in differences.items() if abs(d).max() > 0.4 and abs(d @ (0.3, 0.59, 0.11)) > 0.16)


def random_cloth(rng: np.random.Generator, category: str, factors: Collection[str]) -> Cloth:
    level = random_levels(rng, factors)
    trousers = rng.random() < 0.6
    kind = {"upper": "top", "lower": "trousers" if trousers else "skirt", "dress": "dress"}[category]
    name = choose(rng, tuple(COLORS))
    second = choose(rng, contrasting(name))
    pattern, logo, word = choose(rng, PATTERNS), choose(rng, LOGOS), choose(rng, WORDS)
    period = PERIODS.get(level["print"], 1.0) / FRAMES[category]["near"][0] * rng.uniform(0.95, 1.12)
    return Cloth(
        kind=kind,
        color_name=name,
        color=named_color(rng, name),
        second_name=second,
        second=named_color(rng, second),
        print=level["print"],
        pattern=pattern if level["print"] in PERIODS else "plain",
        period=float(period),
        logo={"logo": logo, "word": "word"}.get(level["print"], "none"),
        word=word,
        sleeve=level["sleeve"],
        length=choose(rng, tuple(HEMS[kind]), HEM_ODDS[kind]),
        fit=level["fit"],
        fold=level["fold"],
        neckline=choose(rng, NECKLINES, (0.5, 0.25, 0.25)),
        phases=tuple(rng.uniform(0, 2 * np.pi, 4).tolist()),
    )


def random_other(rng: np.random.Generator, category: str) -> Cloth | None:
    """What a person wears besides the cloth of the category: plain and muted."""
    plain = random_cloth(rng, "lower" if category == "upper" else "upper", ())
    color, sleeve = pick(rng, MUTED), choose(rng, ("no", "short", "long"), (0.2, 0.45, 0.35))
    length = choose(rng, ("knee", "long")) if category == "upper" else "normal"
    return None if category == "dress" else replace(plain, color=color, sleeve=sleeve, length=length)


def random_person(rng: np.random.Generator, category: str, factors: Collection[str]) -> Person:
    levels = random_levels(rng, factors)
    tone = rng.uniform(0, len(SKIN_TONES) - 1)
    lighter, darker = SKIN_TONES[int(tone)], SKIN_TONES[int(np.ceil(tone))]
    wall = pick(rng, WALLS)
    return Person(
        category=category,
        figure=random_figure(rng, levels["pose"]),
        levels={name: levels[name] for name in PERSON_FACTORS},
        skin=(lighter * (1 - tone % 1) + darker * (tone % 1)) / 255,
        hair=pick(rng, HAIR_COLORS if tone < 3 else HAIR_COLORS[:2]),
        eyes=pick(rng, np.array([(60, 42, 30), (70, 92, 120), (72, 94, 60), (40, 30, 26)])),
        shoes=pick(rng, np.array([(40, 38, 40), (230, 228, 224), (122, 80, 52), (150, 40, 44), (70, 78, 100)])),
        other=random_other(rng, category),
        wall=wall,
        floor=wall * rng.uniform(0.74, 0.92) * np.array([1.0, 0.97, 0.93]),
        scene=int(rng.integers(2**31)),
        head=(rng.uniform(-0.8, 0.8), rng.uniform(-0.9, 0.9)),
        place=(rng.uniform(-2.5, 2.5), rng.uniform(-1.0, 1.0)),
    )


def random_figure(rng: np.random.Generator, pose: str) -> Figure:
    build, shape = rng.uniform(0.93, 1.1), rng.uniform(-1.0, 1.0)
    sway = rng.uniform(-2.2, 2.2)
    both, first = rng.random() < 0.5, rng.random() < 0.5
    jitter = rng.uniform(-1.3, 1.3, (2, 2, 2))
    arms = {
        "down": ((20.5 + 4 * rng.random(), 31.0), (22.0 + 7 * rng.random(), 52.0)),
        "hip": ((32.0, 25.0), (18.5, 41.5)),
        "crossed": ((21.0, 28.5), (-7.0, 26.0)),
        "raised": ((30.0, -3.0), (23.0, -23.0)),
    }
    elbows, wrists = [], []
    for i, side in enumerate((-1, 1)):
        posed = pose if pose == "crossed" or both or first == (side == 1) else "down"
        elbow, wrist = arms[posed]
        if posed == "crossed":
            wrist = (wrist[0], wrist[1] + side * 2.0)
        elbows.append((side * elbow[0] * build + jitter[i, 0, 0], elbow[1] + jitter[i, 0, 1]))
        wrists.append((side * wrist[0] * build + jitter[i, 1, 0], wrist[1] + jitter[i, 1, 1]))
    stance, bend = rng.uniform(8.0, 13.5, 2), rng.uniform(-1.0, 1.2, 2)
    return Figure(
        build=build,
        shape=shape,
        sway=sway,
        elbows=tuple(elbows),
        wrists=tuple(wrists),
        knees=tuple((sway * 0.8 + side * ((8.2 + stance[i]) / 2 + bend[i]), 80.0) for i, side in enumerate((-1, 1))),
        ankles=tuple((sway * 0.5 + side * stance[i], 109.0) for i, side in enumerate((-1, 1))),
    )


# ---------------------------------------------------------------------------------------------------------------- the cloth


@dataclass(frozen=True)
class Panel:
    """A piece of a cloth where it lies, the cloth's coordinates u and v there, and how far round it is there, from -1 to 1: (N,)."""

    region: Region
    u: np.ndarray
    v: np.ndarray
    turn: np.ndarray

    def where(self, condition: np.ndarray) -> "Panel":
        return Panel(self.region.where(condition), self.u[condition], self.v[condition], self.turn[condition])


def neckline(region: Region, kind: str, rim: float = 0.0) -> np.ndarray:
    """The pixels above the neckline, or above a line `rim` units lower."""
    x, y = np.abs(region.x), region.y
    if kind == "v":
        return (y < 11.5 + 1.4 * rim - 1.75 * x) & (x < 6.2 + rim)
    x_radius, y_radius = {"crew": (5.6, 4.6), "scoop": (7.0, 8.6)}[kind]
    return (x / (x_radius + rim)) ** 2 + ((y + 1) / (y_radius + rim)) ** 2 < 1


def upright_panel(canvas: Canvas, figure: Figure, cloth: Cloth, outline, top: float, drop: float) -> Panel:
    """A piece around the body, from the top to a hem that hangs `drop` lower in its middle. As u follows the flat cloth's width,
    patterns keep their shape where a skirt is wide.
    """
    region = canvas.column(outline(figure, cloth), figure.middle(), top, cloth.hem + drop)
    region = region.where(region.y < cloth.hem + drop * (1 - region.across**2))
    return Panel(region, region.across * np.interp(region.y, *outline(FLAT, cloth)), region.y, region.across)


def body_outline(figure: Figure, cloth: Cloth) -> tuple[np.ndarray, np.ndarray]:
    """Half the width of a top or a dress by y."""
    y, width = figure.half_width(1.6, 3.4) if cloth.loose else figure.half_width(0.7)
    if cloth.sleeve == "no":  # armholes
        width = np.where(y < 15, np.minimum(width, 10.2 + 0.42 * np.maximum(y, 0)), width)
    return with_skirt(y, width, cloth) if cloth.kind == "dress" else (y, width)


def skirt_outline(figure: Figure, cloth: Cloth) -> tuple[np.ndarray, np.ndarray]:
    return with_skirt(*figure.half_width(0.9, 0.6 if cloth.loose else 0.0), cloth)


def with_skirt(y: np.ndarray, width: np.ndarray, cloth: Cloth) -> tuple[np.ndarray, np.ndarray]:
    """A profile of the waist or the torso, with a skirt that flares from the hips."""
    below = np.arange(y[-1] + 0.5, 110, 0.5)
    y, width = np.append(y, below), np.append(width, np.full(len(below), width[-1]))
    slope = 0.24 if cloth.loose else 0.03
    flared = np.interp(44, y, width) + 0.2 + slope * (y - 44)
    return y, np.where(y > 44, np.maximum(flared, width if cloth.loose else flared), width)


def sleeve_panels(canvas: Canvas, figure: Figure, cloth: Cloth, side: int) -> Iterator[Panel]:
    """The sleeve's pieces on upper arm and forearm, as far as it reaches."""
    i, reach = (side + 1) // 2, SLEEVES[cloth.sleeve] * 2
    ease = (1.4, 2.4, 2.0) if cloth.loose else (0.6, 0.8, 0.7)
    joints = (figure.shoulder(side), figure.elbows[i], figure.wrists[i])
    radii = [radius * figure.build + more for radius, more in zip((4.9, 4.1, 3.0), ease)]
    for part in (0, 1):
        if reach > part:
            region = canvas.limb(joints[part], joints[part + 1], radii[part], radii[part + 1])
            region = region.where(region.along < reach - part)
            yield Panel(region, 5 * region.across, 22 * (region.along + part), region.across)


def trouser_panels(canvas: Canvas, figure: Figure, cloth: Cloth) -> Iterator[Panel]:
    """Both legs, then the hips."""
    knee, ankle = (3.0, 4.6) if cloth.loose else (0.9, 1.0)
    thigh = 1.6 if cloth.loose else 0.5
    b = figure.build
    reach = 2 * (cloth.hem - 50) / 59
    for i, side in enumerate((-1, 1)):
        joints = (figure.hip(side), figure.knees[i], figure.ankles[i])
        radii = (8.2 * b + thigh, 6.3 * b + knee, 3.9 * b + ankle)
        for part in (0, 1):
            if reach > part:
                region = canvas.limb(joints[part], joints[part + 1], radii[part], radii[part + 1])
                region = region.where((region.along < reach - part) & (region.y > 48))
                yield Panel(region, 8.5 * (side + region.across), 50 + 29.5 * (region.along + part), region.across)
    region = canvas.column(figure.half_width(0.4, thigh - 0.5), figure.middle(), WAIST, 58)
    region = region.where(region.y < 58 - 8 * region.across**2)
    below = np.clip((region.y - 42) / 14, 0, 1)  # where the hips become two legs
    turn = region.across + below * (region.across - np.sign(region.across))
    yield Panel(region, 17 * region.across, region.y, turn)


@cache
def written(word: str) -> np.ndarray:
    """A word's letters as a boolean picture, 60 pixels high."""
    font = ImageFont.load_default(80)
    left, top, right, bottom = font.getbbox(word)
    picture = Image.new("L", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(picture).text((-left, -top), word, fill=255, font=font, stroke_width=2)
    return np.asarray(picture.resize((picture.width * 60 // picture.height, 60))) > 127


def logo_place(cloth: Cloth) -> tuple[float, float, float]:
    """Where on a cloth the logo's middle is, and the radius, in units."""
    if cloth.kind == "trousers":
        return 8.5, 60.0, 5.2
    return (0.0, 53.0, 7.6) if cloth.kind == "skirt" else (0.0, 23.0, 7.6 if cloth.kind == "dress" else 7.0)


def logo(cloth: Cloth, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which of the points (u, v) of a cloth's front its logo or word covers."""
    middle, height, radius = logo_place(cloth)
    x, y = (u - middle) / radius, (v - height) / radius
    if cloth.logo == "word":
        if cloth.kind == "trousers":  # along the leg
            x, y = y, -x
        letters = np.pad(written(cloth.word), 1)  # the rim stands for all that is outside
        sides = np.array(letters.shape)[:, None] - 2
        places = np.floor((np.stack([y, x]) / 0.72 * sides[0] + sides) / 2).astype(int) + 1
        return letters[tuple(places.clip(0, sides + 1))]
    distance = np.hypot(x, y)
    return {
        "disc": distance < 1,
        "ring": (distance < 1.08) & (distance > 0.58),
        "square": np.maximum(np.abs(x), np.abs(y)) < 0.9,
        "triangle": (y < 0.85) & (y > -1.05 + 1.75 * np.abs(x)),
        "cross": (np.minimum(np.abs(x), np.abs(y)) < 0.33) & (np.maximum(np.abs(x), np.abs(y)) < 1.08),
    }[cloth.logo]


def cloth_colors(cloth: Cloth, u: np.ndarray, v: np.ndarray, front: bool) -> np.ndarray:
    """The cloth's colours (3, N) at N of its points; only the front carries the logo."""

    def band(x: np.ndarray, share: float) -> np.ndarray:
        return np.abs((x / cloth.period + 0.5) % 1 - 0.5) < share / 2

    second = np.zeros(u.shape, np.float32)
    if cloth.pattern == "horizontal stripes":
        second[band(v, 0.42)] = 1
    elif cloth.pattern == "vertical stripes":
        second[band(u, 0.42)] = 1
    elif cloth.pattern == "checks":  # gingham: two transparent bands
        second = (band(u, 0.46) * 0.5 + band(v, 0.46) * 0.5).astype(np.float32)
    elif cloth.pattern == "dots":
        row = np.round(v / cloth.period)
        x = (u / cloth.period + 0.5 * (row % 2) + 0.5) % 1 - 0.5
        second[x**2 + (v / cloth.period - row) ** 2 < 0.31**2] = 1
    if front and cloth.logo != "none":
        second[logo(cloth, u, v)] = 1
    return cloth.color[:, None] + second * (cloth.second - cloth.color)[:, None]


def folds(cloth: Cloth, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Brightness around 1 of a soft cloth's folds: slanted on tops, falling on skirts and trousers."""
    a, b, c, d = cloth.phases
    if cloth.kind == "top":
        first = np.sin(0.46 * v + 0.4 * u + a) * (0.5 + 0.5 * np.sin(0.13 * u - 0.1 * v + b))
        waves = first + np.sin(0.5 * v - 0.34 * u + c) * (0.5 + 0.5 * np.sin(0.12 * u + 0.12 * v + d))
    else:
        first = np.sin(0.62 * u + 0.03 * v + a) * (0.65 + 0.35 * np.sin(0.06 * v + b))
        waves = first + 0.6 * np.sin(0.3 * v + 0.3 * u + c) * (0.5 + 0.5 * np.sin(0.11 * v - 0.2 * u + d))
    return 0.99 + 0.07 * waves - 0.035 * waves**2


def paint_panel(panel: Panel, cloth: Cloth, paint: Callable, depth: float, front: bool = True) -> None:
    """Paint a piece with `Canvas.paint` or `Canvas.paint_kept`; its edges are `depth` darker than its middle."""
    shade = 1.03 - 0.05 * panel.turn - depth * panel.turn**2 - 0.12 * (np.abs(panel.region.across) > 0.94)
    if cloth.fold == "folds":
        shade = shade * folds(cloth, panel.u, panel.v)
    paint(panel.region, cloth_colors(cloth, panel.u, panel.v, front), LIP[cloth.kind], shade)


def paint_seams(body: Region, figure: Figure, cloth: Cloth, paint: Callable) -> None:
    """What is sewn on the piece around the body: collar, waistband and fly."""
    dark = 0.8 * cloth.color
    if cloth.kind in ("top", "dress"):
        paint(body.where(neckline(body, cloth.neckline, 1.3)), 0.84 * cloth.color)
    if cloth.kind in ("trousers", "skirt"):
        band = body.where(body.along < WAIST + 3.4)
        paint(band, dark, None, 1 - 0.15 * band.across**2 - 0.3 * (band.along > WAIST + 2.8))
    if cloth.kind == "trousers":
        fly = np.abs(body.x - np.interp(body.y, *figure.middle())) < 0.45
        paint(body.where(fly & (body.along > WAIST + 3)), dark)


def cloth_panels(canvas: Canvas, figure: Figure, cloth: Cloth) -> list[Panel]:
    """A cloth's pieces around the body, sleeves aside, back to front."""
    if cloth.kind == "trousers":
        return list(trouser_panels(canvas, figure, cloth))
    if cloth.kind == "skirt":
        return [upright_panel(canvas, figure, cloth, skirt_outline, WAIST, 2.0)]
    return [upright_panel(canvas, figure, cloth, body_outline, -1.8, 1.5)]


def wear(canvas: Canvas, figure: Figure, cloth: Cloth, paint: Callable, depth: float) -> None:
    """Paint a cloth's pieces, sleeves aside."""
    panels = cloth_panels(canvas, figure, cloth)
    if cloth.kind in ("top", "dress"):
        panels = [panel.where(~neckline(panel.region, cloth.neckline)) for panel in panels]
    for panel in panels:
        paint_panel(panel, cloth, paint, depth)
    paint_seams(panels[-1].region, figure, cloth, paint)


def wear_sleeve(canvas: Canvas, figure: Figure, cloth: Cloth, side: int, paint: Callable, depth: float) -> None:
    """Paint a sleeve and its cuff."""
    for panel in sleeve_panels(canvas, figure, cloth, side):
        paint_panel(panel, cloth, paint, depth, front=False)
        end = SLEEVES[cloth.sleeve] * 44
        paint(panel.region.where(panel.v > end - 1.6), 0.82 * cloth.color)


def draw_cloth(cloth: Cloth, height: int, width: int) -> Image.Image:
    """The cloth laid flat on white."""
    pixel = height / UNIT_HEIGHT
    scale = FLAT_SCALES[cloth.kind]
    top = WAIST if cloth.kind in ("trousers", "skirt") else -1.0
    center = (top + cloth.hem) / 2
    if SLEEVES[cloth.sleeve] and cloth.kind in ("top", "dress"):
        center = max(center, (top + 8 + 40 * SLEEVES[cloth.sleeve]) / 2)
    canvas = Canvas(height, width, scale * pixel, (width / 2, height / 2 - center * scale * pixel))
    if cloth.kind in ("top", "dress"):
        for side in (-1, 1):
            wear_sleeve(canvas, FLAT, cloth, side, canvas.paint, 0.08)
        region = cloth_panels(canvas, FLAT, cloth)[0].region
        back = neckline(region, cloth.neckline) & (region.y > 0.4 - 0.02 * region.x**2)
        canvas.paint(region.where(back), 0.6 * cloth.color)
    wear(canvas, FLAT, cloth, canvas.paint, 0.08)
    return canvas.image()


# --------------------------------------------------------------------------------------------------------------- the person


@cache
def envelopes(category: str) -> list[Cloth]:
    """The largest cloths of a category: together they reach wherever any of it may."""
    anything = random_cloth(np.random.default_rng(0), "upper" if category == "outfit" else category, ())
    kinds = {"upper": ("top",), "lower": ("trousers", "skirt"), "dress": ("dress",)}
    kinds = (kinds | {"outfit": kinds["upper"] + kinds["lower"]})[category]
    return [replace(anything, kind=kind, sleeve="long", length="long", fit="loose") for kind in kinds]


def frame(person: Person, height: int, width: int) -> tuple[float, tuple[float, float]]:
    """How a person is framed: pixels to a unit, and where the base of the neck is, (x, y) in pixels."""
    pixel = height / UNIT_HEIGHT
    scale, top = FRAMES[person.category][person.levels["distance"]]
    x, y = person.place
    return scale * pixel, (width / 2 + x * pixel, (top + y) * pixel)


def draw_person(person: Person, cloth: Cloth, height: int, width: int) -> tuple[Image.Image, Image.Image, np.ndarray]:
    """The person wearing the cloth: picture, agnostic mask (the same for every cloth) and label map (H, W) of `LIP`'s numbers."""
    canvas, figure = Canvas(height, width, *frame(person, height, width)), person.figure
    paint_background(canvas, person)
    if person.levels["hair"] != "short":
        paint_hair_behind(canvas, person)
    paint_legs(canvas, person)
    paint_torso(canvas, person)
    if person.other is not None:
        wear(canvas, figure, person.other, canvas.paint, 0.2)
    widest = envelopes(person.category)
    for largest in widest:
        for panel in cloth_panels(canvas, figure, largest):
            canvas.may_change(panel.region)
    wear(canvas, figure, cloth, canvas.paint, 0.2)
    paint_shoes(canvas, person)
    paint_head(canvas, person)
    if person.levels["hair"] == "before":
        paint_hair_before(canvas, person)
    for side in (-1, 1):
        paint_arm(canvas, person, side)
        if person.category == "lower":
            wear_sleeve(canvas, figure, person.other, side, canvas.paint_kept, 0.2)
        else:
            for panel in sleeve_panels(canvas, figure, widest[0], side):
                canvas.may_change(panel.region)
            wear_sleeve(canvas, figure, cloth, side, canvas.paint, 0.2)
        paint_hand(canvas, person, side)
    return canvas.image(), canvas.mask(round(2 * height / UNIT_HEIGHT)), canvas.label_map()


def rounded(region: Region, depth: float = 0.22) -> np.ndarray:
    """The shade of a round thing lit from the left."""
    return 1.02 - 0.05 * region.across - depth * region.across**2


def paint_background(canvas: Canvas, person: Person) -> None:
    left, right, top, bottom = canvas.x[0], canvas.x[-1], canvas.y[0], canvas.y[-1]
    light = np.repeat(1.04 - 0.1 * (canvas.y - top) / (bottom - top), len(canvas.x))
    np.multiply(person.wall[:, None], light, out=canvas.rgb)
    floor = 101.0
    if person.levels["background"] == "clutter":
        paint_clutter(canvas, person, floor)
    ground = canvas.rectangle(left, floor, right + 1, floor + 60)
    canvas.paint(ground, person.floor)
    canvas.paint(canvas.rectangle(left, floor - 1.5, right + 1, floor), person.wall * 0.86)
    for side in (0, 1):
        x, y = person.figure.ankles[side]
        shadow = canvas.ellipse(x, y + 7.0, 10, 3.2)
        canvas.paint(shadow, person.floor, None, 0.78 + 0.22 * (shadow.across**2 + shadow.along**2))


def paint_clutter(canvas: Canvas, person: Person, floor: float) -> None:
    """Frames on the wall, furniture and a plant."""
    rng = np.random.default_rng(person.scene)
    left, right, top = canvas.x[0], canvas.x[-1], canvas.y[0]
    bottom = min(floor, canvas.y[-1])
    for side in (left, right):
        x, y = side + rng.uniform(-6, 6), top + rng.uniform(0.05, 0.4) * (bottom - top)
        w, h = rng.uniform(9, 20), rng.uniform(9, 20)
        canvas.paint(canvas.rectangle(x - w, y - h, x + w, y + h), pick(rng, MUTED))
        canvas.paint(
            canvas.rectangle(x - w + 2, y - h + 2, x + w - 2, y + h - 2), pick(rng, WALLS) * rng.uniform(0.7, 1)
        )
        x, h, color = side + rng.uniform(-6, 6), rng.uniform(18, 52), pick(rng, MUTED)
        w = rng.uniform(8, 22)
        if rng.random() < 0.5:
            canvas.paint(canvas.rectangle(x - w, bottom - h, x + w, bottom), color)
            for shelf in np.arange(bottom - h + 6, bottom, 11):
                canvas.paint(canvas.rectangle(x - w, shelf, x + w, shelf + 1.6), color * 0.7)
        else:
            for angle in rng.uniform(-0.9, 0.9, 7):
                tip = (x + 26 * np.sin(angle), bottom - 20 - 26 * np.cos(angle))
                leaf = canvas.limb((x, bottom - 16), tip, 2.2, 3.6)
                canvas.paint(leaf, np.array([0.25, 0.45, 0.27]) * rng.uniform(0.8, 1.15), None, rounded(leaf))
            canvas.paint(
                canvas.polygon((x - 9, bottom - 18), (x + 9, bottom - 18), (x + 6, bottom), (x - 6, bottom)), color
            )


def paint_limb(canvas: Canvas, joints, radii, color: np.ndarray, label: int, paint: Callable) -> None:
    for part in range(len(joints) - 1):
        region = canvas.limb(joints[part], joints[part + 1], radii[part], radii[part + 1])
        paint(region, color, label, rounded(region))


def paint_legs(canvas: Canvas, person: Person) -> None:
    figure = person.figure
    radii = [radius * figure.build for radius in (8.6, 6.1, 3.7)]
    for i, side in enumerate((-1, 1)):
        joints = (figure.hip(side), figure.knees[i], figure.ankles[i])
        foot = (figure.ankles[i][0], figure.ankles[i][1] + 4)
        paint_limb(
            canvas, (*joints, foot), (*radii, 3.4), person.skin, LIP[("right_leg", "left_leg")[i]], canvas.paint
        )


def paint_shoes(canvas: Canvas, person: Person) -> None:
    for i, side in enumerate((-1, 1)):
        (x, y), label = person.figure.ankles[i], LIP[("right_shoe", "left_shoe")[i]]
        upper = canvas.limb((x, y + 2.2), (x + side * 1.8, y + 6.2), 4.0, 4.8)
        sole = canvas.rectangle(x + side * 1.8 - 5.2, y + 9.0, x + side * 1.8 + 5.2, y + 11.2)
        canvas.paint_kept(upper, person.shoes, label, rounded(upper))
        canvas.paint_kept(sole, person.shoes * 0.55, label)


def paint_torso(canvas: Canvas, person: Person) -> None:
    """Neck, chest and hips, bare."""
    x = person.head[0]
    region = canvas.column(person.figure.half_width(), person.figure.middle(), -3, 58)
    canvas.paint(region, person.skin, LIP["neck"], rounded(region, 0.15))
    neck = canvas.limb((x, -10), (0, 3), 4.4, 4.9)
    canvas.paint(neck, person.skin, LIP["neck"], rounded(neck, 0.2) * np.clip(0.93 + 0.05 * neck.along, 0.8, 0.97))
    shadow = canvas.ellipse(x, -5.5, 4.3, 4.2)
    canvas.paint(shadow, person.skin * np.array([0.8, 0.77, 0.76]))


def paint_arm(canvas: Canvas, person: Person, side: int) -> None:
    figure, i = person.figure, (side + 1) // 2
    joints = (figure.shoulder(side), figure.elbows[i], figure.wrists[i])
    radii = [radius * figure.build for radius in (4.8, 4.1, 2.9)]
    paint_limb(canvas, joints, radii, person.skin, LIP[("right_arm", "left_arm")[i]], canvas.paint_kept)


def paint_hand(canvas: Canvas, person: Person, side: int) -> None:
    """A palm, fingers and a thumb."""
    i = (side + 1) // 2
    wrist, elbow = np.array(person.figure.wrists[i]), np.array(person.figure.elbows[i])
    ahead = (wrist - elbow) / np.hypot(*(wrist - elbow))
    if person.levels["pose"] == "hip" and wrist[1] < 46 and wrist[1] > 30:
        ahead = np.array([-side * 0.55, 0.83])
    aside = np.array([ahead[1], -ahead[0]])
    inward = aside if aside @ np.array([-side, 0.3]) > 0 else -aside
    label = LIP[("right_arm", "left_arm")[i]]
    knuckles = wrist + 4.2 * ahead
    shapes = (
        canvas.limb(wrist, knuckles, 2.9, 3.3),
        canvas.limb(knuckles, knuckles + 3.8 * ahead + 0.5 * inward, 3.1, 2.2),
        canvas.limb(wrist + 1.4 * ahead, wrist + 4.6 * ahead + 3.4 * inward, 1.5, 1.2),
    )
    for shape in shapes:
        canvas.paint_kept(shape, person.skin, label, rounded(shape, 0.12))
    gap = canvas.limb(knuckles + 0.6 * ahead, knuckles + 4.6 * ahead, 0.28, 0.28)
    canvas.paint_kept(gap, person.skin * 0.78)


def paint_head(canvas: Canvas, person: Person) -> None:
    """Ears, face and the hair around it."""
    (x, turn), skin, paint = person.head, person.skin, canvas.paint_kept
    for side in (-1, 1):
        paint(canvas.ellipse(x + side * 8.2, -16.0, 1.7, 2.6), skin * 0.88, LIP["face"])
    jaw = profile((-28.5, 2.0), (-26.5, 6.2), (-22, 8.1), (-16, 8.2), (-11, 6.9), (-8, 4.9), (-6.2, 2.2))
    face = canvas.column(jaw, profile((-30, x), (0, x)), -28.5, -6.2)
    paint(face, skin, LIP["face"], rounded(face, 0.14))
    middle = x + turn
    for side in (-1, 1):
        cheek = canvas.ellipse(middle + side * 4.3, -12.8, 2.3, 1.8)
        paint(cheek, skin * np.array([1.0, 0.9, 0.88]))
        paint(canvas.ellipse(middle + side * 3.4, -17.3, 1.75, 1.15), np.array([0.95, 0.94, 0.92]))
        paint(canvas.ellipse(middle + side * 3.3 + turn * 0.3, -17.2, 1.05, 1.2), person.eyes * 0.8)
        paint(canvas.limb((middle + side * 2.0, -20.3), (middle + side * 5.2, -20.5), 0.5, 0.35), person.hair * 0.8)
        paint(canvas.limb((middle + side * 2.0, -18.5), (middle + side * 5.0, -18.1), 0.3, 0.26), skin * 0.45)
    paint(canvas.limb((middle + 0.9, -16.2), (middle + 1.3, -13.6), 0.4, 0.7), skin * 0.84)
    paint(canvas.ellipse(middle, -13.3, 1.5, 0.6), skin * 0.78)
    lips = skin * np.array([0.82, 0.5, 0.5])
    smile = canvas.ellipse(middle, -11.6, 2.9, 2.5)
    paint(smile.where(smile.along > 0.2), lips)
    paint(smile.where((smile.along > 0.2) & (smile.along < 0.5 - 0.3 * smile.across**2)), lips * 0.7)
    cap = canvas.column(profile((-31, 1.5), (-29.5, 5.5), (-26, 8.8), (-21, 9.6), (-14, 9.3), (-12, 8.6)), profile((-40, x), (0, x)), -31, -13)  # fmt: skip
    xs, ys = cap.x, cap.y
    part = -2.5 if turn > 0 else 2.5
    forehead = ((xs - x - part * 0.4) / 7.9) ** 2 + ((ys + 13.5) / 10.2) ** 2 < 1
    low = (ys > -17.0) & (np.abs(xs - x) < 8.3)
    hair = cap.where(~forehead & ~low)
    paint(hair, person.hair, LIP["hair"], hair_shade(hair))


def hair_shade(region: Region) -> np.ndarray:
    return 1.06 - 0.1 * region.across - 0.2 * region.across**2 + 0.07 * np.sin(15 * region.across)


def paint_hair_behind(canvas: Canvas, person: Person) -> None:
    x = person.head[0]
    table = profile((-29, 4), (-26, 8.6), (-18, 10.6), (-6, 11.4), (4, 12.4), (11, 11.0), (14, 8.0))
    region = canvas.column(table, profile((-40, x), (20, x)), -29, 13.5)
    canvas.paint(region, person.hair * 0.82, LIP["hair"], hair_shade(region))


def paint_hair_before(canvas: Canvas, person: Person) -> None:
    """Two locks that fall over the shoulders, before the cloth."""
    x = person.head[0]
    for side in (-1, 1):
        joints = [
            (x + side * 9.0, -17),
            (x + side * 9.9, -4),
            (x + side * 10.6, 8),
            (side * 9.6, 22 + 3 * side * person.head[1]),
        ]
        for part, (start, end) in enumerate(((2.0, 3.0), (3.0, 3.5), (3.5, 1.3))):
            lock = canvas.limb(joints[part], joints[part + 1], start, end)
            canvas.paint_kept(
                lock, person.hair, LIP["hair"], 1.04 - 0.22 * lock.across**2 + 0.08 * np.sin(7 * lock.across)
            )


# ------------------------------------------------------------------------------------------------------------------ the pose


BODY_25 = (
    "nose", "neck", "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist", "middle_hip",
    "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle", "right_eye", "left_eye", "right_ear",
    "left_ear", "left_big_toe", "left_small_toe", "left_heel", "right_big_toe", "right_small_toe", "right_heel",
)  # fmt: skip
COCO_18 = tuple(name for name in BODY_25[:19] if name != "middle_hip")
# The limbs and colours with which OpenPose (Cao et al., 2017) draws COCO's 18 keypoints.
LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0), (0, 14), (14, 16),
    (0, 15), (15, 17),
)  # fmt: skip
LIMB_COLORS = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85), (0, 255, 170),
    (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85),
)  # fmt: skip


def keypoints(person: Person, height: int, width: int) -> dict[str, tuple[float, float]]:
    """Where the joints of `BODY_25` lie, (x, y) in pixels; those outside the picture are left out."""
    figure, (x, turn) = person.figure, person.head
    points = {"nose": (x + turn, -14.0), "neck": (0.0, 4.0), "middle_hip": (figure.sway, 48.0)}
    for i, (side, name) in enumerate(((-1, "right"), (1, "left"))):
        ankle = figure.ankles[i]
        points |= {
            f"{name}_shoulder": figure.shoulder(side),
            f"{name}_elbow": figure.elbows[i],
            f"{name}_wrist": figure.wrists[i],
            f"{name}_hip": figure.hip(side),
            f"{name}_knee": figure.knees[i],
            f"{name}_ankle": ankle,
            f"{name}_eye": (x + turn + side * 3.4, -17.3),
            f"{name}_ear": (x + side * 8.2, -16.0),
            f"{name}_big_toe": (ankle[0] + side * 0.5, ankle[1] + 8),
            f"{name}_small_toe": (ankle[0] + side * 4.5, ankle[1] + 8),
            f"{name}_heel": (ankle[0], ankle[1] + 5),
        }
    scale, (left, top) = frame(person, height, width)
    at = {name: (left + scale * x, top + scale * y) for name, (x, y) in points.items()}
    return {name: point for name, point in at.items() if 0 <= point[0] < width and 0 <= point[1] < height}


def draw_skeleton(points: dict[str, tuple[float, float]], height: int, width: int) -> Image.Image:
    """The keypoints as OpenPose draws them, on black."""
    picture, thick = Image.new("RGB", (2 * width, 2 * height)), height / 32
    draw = ImageDraw.Draw(picture)
    named = [points.get(name) for name in COCO_18]
    for (start, end), color in zip(LIMBS, LIMB_COLORS):
        if named[start] and named[end]:
            ends = [tuple(2 * c for c in named[j]) for j in (start, end)]
            draw.line(ends, fill=tuple(int(0.6 * c) for c in color), width=round(thick))
    for point, color in zip(named, LIMB_COLORS):
        if point:
            draw.circle([2 * c for c in point], thick / 1.6, fill=color)
    return picture.reduce(2)
