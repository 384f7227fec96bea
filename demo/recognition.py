"""What a cloth looks like on a person, read off the picture by a small network: colour, pattern, logo, lengths.

Decibels reward what is merely average; this tells whether a stripe is still a stripe. The network sees the picture around its
agnostic mask alone, and the mask, which says what kind of cloth is meant.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import ResNetForImageClassification

from demo.world import COLORS, LOGOS, PATTERNS, SLEEVES


CLASSIFIER = Path(__file__).resolve().parent / "classifier"
CROP = (96, 72)  # height and width, about the mask's size in a picture of 128 x 96
MARGIN = 0.04  # of the mask's sides, around it

# By the names of `Cloth.attributes`, what the network chooses from.
ATTRIBUTES = {
    "color": tuple(COLORS),
    "pattern": ("plain", *PATTERNS),
    "logo": ("none", *LOGOS, "word"),
    "sleeve_length": tuple(SLEEVES),
    "garment_length": ("crop", "normal", "short", "knee", "long"),
}
LABELS = [f"{attribute}: {value}" for attribute, values in ATTRIBUTES.items() for value in values]


def crop(picture: Image.Image, mask: Image.Image) -> np.ndarray:
    """A picture of any size and its agnostic mask around the mask, bytes (4, *CROP): RGB, and the mask's grey.

    Raises:
        ValueError: the mask is empty or of another size than the picture.
    """
    box = mask.convert("L").point(lambda value: 255 * (value >= 128)).getbbox()
    if box is None or mask.size != picture.size:
        raise ValueError(
            f"`mask` must have something white and the picture's size {picture.size}, got {mask.size} with box {box}"
        )
    x, y = MARGIN * (box[2] - box[0]), MARGIN * (box[3] - box[1])
    width, height = picture.size
    around = (max(0, box[0] - x), max(0, box[1] - y), min(width, box[2] + x), min(height, box[3] + y))
    parts = [
        each.resize(CROP[::-1], Image.Resampling.BILINEAR, around)
        for each in (picture.convert("RGB"), mask.convert("L"))
    ]
    return np.concatenate([np.asarray(parts[0]), np.asarray(parts[1])[..., None]], axis=-1).transpose(2, 0, 1)


def to_input(crops: torch.Tensor) -> torch.Tensor:
    """Bytes (N, 4, H, W) to floats around zero."""
    return crops.float() / 127.5 - 1


def by_attribute(logits: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Logits (N, labels) as one block (N, values) for each of `ATTRIBUTES`."""
    return zip(ATTRIBUTES, logits.split([len(values) for values in ATTRIBUTES.values()], dim=1))


def load_classifier(folder: Path = CLASSIFIER) -> ResNetForImageClassification:
    return ResNetForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def recognize(
    classifier: ResNetForImageClassification, pictures: Sequence[Image.Image], masks: Sequence[Image.Image]
) -> list[dict[str, str]]:
    """The likeliest value of each of `ATTRIBUTES`, for every picture; where a cloth has no sleeves to speak of, theirs is idle."""
    crops = torch.from_numpy(np.stack([crop(*pair) for pair in zip(pictures, masks, strict=True)]))
    logits = torch.cat([classifier(to_input(part)).logits for part in crops.split(64)])
    chosen = {name: [ATTRIBUTES[name][i] for i in block.argmax(dim=1)] for name, block in by_attribute(logits)}
    return [dict(zip(chosen, values)) for values in zip(*chosen.values())]
