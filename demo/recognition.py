"""What a cloth looks like on a person, read off the picture by a small network: colour, pattern, logo, lengths.

Decibels reward what is merely average; this tells whether a stripe is still a stripe. The network sees the picture around its
agnostic mask alone, and the mask, which says what kind of cloth is meant.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import nn

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


class ClothClassifier(ModelMixin, ConfigMixin):
    """Crops (N, 4, H, W) in [-1, 1], of `crop`, to one block of logits (N, values) for each of `ATTRIBUTES`.

    Args:
        channels: of every level, whose sides are half those of the one before.
    """

    @register_to_config
    def __init__(self, channels: tuple[int, ...] = (32, 64, 96, 128)) -> None:
        super().__init__()
        levels = []
        for before, after in zip((4, *channels), channels):
            for inputs, stride in ((before, 2), (after, 1)):
                convolution = nn.Conv2d(inputs, after, 3, stride, padding=1, bias=False)
                levels += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
        self.levels = nn.Sequential(*levels)
        self.head = nn.Linear(2 * channels[-1], sum(map(len, ATTRIBUTES.values())))

    def forward(self, crops: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.levels(crops)
        pooled = torch.cat(
            [features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1
        )  # a logo is in one place alone
        return dict(zip(ATTRIBUTES, self.head(pooled).split([len(values) for values in ATTRIBUTES.values()], dim=1)))


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


def load_classifier(folder: Path = CLASSIFIER) -> ClothClassifier:
    return ClothClassifier.from_pretrained(folder).float().eval()


@torch.no_grad()
def recognize(
    classifier: ClothClassifier, pictures: Sequence[Image.Image], masks: Sequence[Image.Image]
) -> list[dict[str, str]]:
    """The likeliest value of each of `ATTRIBUTES`, for every picture; where a cloth has no sleeves to speak of, theirs is idle."""
    crops = torch.from_numpy(np.stack([crop(*pair) for pair in zip(pictures, masks, strict=True)]))
    said = []
    for part in crops.split(64):
        numbers = {name: logits.argmax(dim=1).tolist() for name, logits in classifier(to_input(part)).items()}
        said += [{name: ATTRIBUTES[name][i] for name, i in zip(numbers, row)} for row in zip(*numbers.values())]
    return said


committed_classifier = cache(load_classifier)


def recognize_drawn(pictures: Sequence[Image.Image], masks: Sequence[Image.Image]) -> list[dict[str, str]]:
    """`recognize` with the committed classifier: `evaluate_vton.py --recognizer demo.recognition:recognize_drawn`."""
    return recognize(committed_classifier(), pictures, masks)
