"""A supersampled canvas and the shapes that people and cloths are drawn from.

Lengths are in the units of what is drawn; a canvas knows how many pixels a unit has and where the origin lies. Every shape is a
`Region`: it computes within its bounding box alone, and carries coordinates of its own, so that a texture can follow it.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw


SUPERSAMPLING = 3


@dataclass(frozen=True)
class Region:
    """N pixels of a canvas with coordinates of their own.

    Args:
        canvas: where they are.
        pixels: their numbers in the canvas, (N,).
        across: from -1 at the shape's left edge to 1 at the right one, (N,).
        along: down a column in units, or from 0 to 1 along a limb, (N,).
    """

    canvas: "Canvas"
    pixels: np.ndarray
    across: np.ndarray
    along: np.ndarray

    @property
    def x(self) -> np.ndarray:
        return self.canvas.x[self.pixels % len(self.canvas.x)]

    @property
    def y(self) -> np.ndarray:
        return self.canvas.y[self.pixels // len(self.canvas.x)]

    def where(self, condition: np.ndarray) -> "Region":
        """Those pixels for which a condition (N,) holds."""
        return Region(self.canvas, self.pixels[condition], self.across[condition], self.along[condition])


def profile(*knots: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """A smooth curve near the knots (y, value), as tables that `np.interp` reads."""
    y, value = np.array(knots, np.float64).T
    dense = np.arange(y[0], y[-1] + 0.5, 0.5)
    values = np.interp(dense, y, value)
    padded = np.pad(values, 4, mode="reflect", reflect_type="odd")
    return dense, np.convolve(padded, [1, 2, 3, 4, 5, 4, 3, 2, 1], mode="valid") / 25


class Canvas:
    """A picture, its label map and the pixels that may change, painted back to front.

    Args:
        height, width: of the finished picture, in pixels.
        scale: pixels of the finished picture to a unit.
        origin: where (0, 0) lies, (x, y) in pixels of the finished picture.
    """

    def __init__(self, height: int, width: int, scale: float, origin: tuple[float, float]) -> None:
        rows, columns = height * SUPERSAMPLING, width * SUPERSAMPLING
        self.y = (((np.arange(rows) + 0.5) / SUPERSAMPLING - origin[1]) / scale).astype(np.float32)
        self.x = (((np.arange(columns) + 0.5) / SUPERSAMPLING - origin[0]) / scale).astype(np.float32)
        self.numbers = np.arange(rows * columns).reshape(rows, columns)
        self.rgb = np.ones((3, rows * columns), np.float32)
        self.labels = np.zeros(rows * columns, np.uint8)
        self.changing = np.zeros(rows * columns, np.uint8)
        self.kept = np.zeros(rows * columns, np.uint8)

    # ---------------------------------------------------------------------------------------------------------- painting

    def paint(
        self, region: Region, color: np.ndarray, label: int | None = None, shade: np.ndarray | float = 1.0
    ) -> None:
        """Fill a region with one colour (3,) or a colour for each of its pixels (3, N); `shade` (N,) multiplies it."""
        if not region.pixels.size:
            return
        for plane, values in zip(self.rgb, color):
            plane[region.pixels] = values * shade
        if label is not None:
            self.labels[region.pixels] = label

    def paint_kept(self, region: Region, *how) -> None:
        """Paint what lies before every cloth: it never changes."""
        self.paint(region, *how)
        self.changing[region.pixels] = 0
        self.kept[region.pixels] = 255

    def may_change(self, region: Region) -> None:
        """A cloth may reach here, whether the painted one does or not."""
        self.changing[region.pixels] = 255
        self.kept[region.pixels] = 0

    # ------------------------------------------------------------------------------------------------------------ shapes

    def box(self, left: float, top: float, right: float, bottom: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pixels of a rectangle that are on the canvas: their x (1, W) and y (H, 1), and their numbers (H, W)."""
        rows, columns = slice(*self.y.searchsorted((top, bottom))), slice(*self.x.searchsorted((left, right)))
        return self.x[None, columns], self.y[rows, None], self.numbers[rows, columns]

    def region(self, box, inside: np.ndarray | None, across: np.ndarray, along: np.ndarray) -> Region:
        """The pixels of a box that are inside, (H, W), None for all; coordinates may have a side of 1."""
        values = (box[2], *(np.broadcast_to(values, box[2].shape) for values in (across, along)))
        return Region(self, *(value.ravel() if inside is None else value[inside] for value in values))

    def rectangle(self, left: float, top: float, right: float, bottom: float) -> Region:
        x, y, _ = box = self.box(left, top, right, bottom)
        return self.region(box, None, 2 * (x - left) / (right - left) - 1, (y - top) / (bottom - top))

    def ellipse(self, x: float, y: float, x_radius: float, y_radius: float) -> Region:
        xs, ys, _ = box = self.box(x - x_radius, y - y_radius, x + x_radius, y + y_radius)
        across, along = (xs - x) / x_radius, (ys - y) / y_radius
        return self.region(box, across**2 + along**2 <= 1, across, along)

    def polygon(self, *points: tuple[float, float]) -> Region:
        """A filled polygon; across and along run over its bounding box."""
        corners = np.array(points, np.float64)
        (left, top), (right, bottom) = corners.min(axis=0), corners.max(axis=0)
        x, y, numbers = box = self.box(left, top, right, bottom)
        if not numbers.size:
            return self.rectangle(left, top, right, bottom)
        picture = Image.new("1", numbers.shape[::-1])
        step = self.x[1] - self.x[0]
        ImageDraw.Draw(picture).polygon([tuple(p) for p in (corners - (x[0, 0], y[0, 0])) / step], fill=1)
        inside = np.asarray(picture)
        return self.region(box, inside, 2 * (x - left) / (right - left) - 1, (y - top) / (bottom - top))

    def column(
        self,
        half_width: tuple[np.ndarray, np.ndarray],
        middle: tuple[np.ndarray, np.ndarray],
        top: float,
        bottom: float,
    ) -> Region:
        """An upright shape by its `profile`s: half its width, and its middle line."""
        widest, (left, right) = half_width[1].max(), (middle[1].min(), middle[1].max())
        x, y, _ = box = self.box(left - widest, top, right + widest, bottom)
        line, width = (np.interp(y, *table).astype(np.float32) for table in (middle, half_width))
        across = (x - line) / np.maximum(width, 1e-3)
        return self.region(box, np.abs(across) <= 1, across, y)

    def limb(self, start, end, start_radius: float, end_radius: float) -> Region:
        """A tapered bar with round ends; along is 0 and 1 at its joints and goes beyond them."""
        (x0, y0), (x1, y1), radius = start, end, max(start_radius, end_radius)
        x, y, numbers = box = self.box(
            min(x0, x1) - radius, min(y0, y1) - radius, max(x0, x1) + radius, max(y0, y1) + radius
        )
        if not numbers.size:
            return self.region(box, None, x, y)
        dx, dy = np.float32(x1 - x0), np.float32(y1 - y0)
        squared = dx**2 + dy**2
        along = (x - np.float32(x0)) * (dx / squared) + (y - np.float32(y0)) * (dy / squared)
        beyond = along - np.clip(along, 0, 1)
        width = start_radius + (end_radius - start_radius) * (along - beyond)
        aside = ((x - np.float32(x0)) * dy - (y - np.float32(y0)) * dx) / np.sqrt(squared)
        inside = aside**2 + beyond**2 * squared <= width**2
        return self.region(box, inside, np.clip(aside / width, -1, 1), along)

    # ----------------------------------------------------------------------------------------------------------- results

    def reduced(self, plane: np.ndarray) -> Image.Image:
        """A plane of bytes at the finished picture's size, every pixel the mean of those it is made of."""
        return Image.fromarray(plane.reshape(self.numbers.shape)).reduce(SUPERSAMPLING)

    def image(self) -> Image.Image:
        """The picture, RGB."""
        levels = np.clip(self.rgb * 255 + 0.5, 0, 255).astype(np.uint8)
        return Image.merge("RGB", [self.reduced(plane) for plane in levels])

    def mask(self, margin: int) -> Image.Image:
        """Every pixel that may change, and `margin` more around them; what is kept only where it shares such a pixel."""
        exact = np.asarray(self.reduced(self.changing)) > 0
        kept = np.asarray(self.reduced(self.kept)) >= 128
        return Image.fromarray(np.uint8((grow(exact, margin) & ~kept) | exact) * 255)

    def label_map(self) -> np.ndarray:
        """The label in the middle of every pixel, (H, W)."""
        middle = SUPERSAMPLING // 2
        labels = self.labels.reshape(self.numbers.shape)
        return np.ascontiguousarray(labels[middle::SUPERSAMPLING, middle::SUPERSAMPLING])


def grow(mask: np.ndarray, pixels: int) -> np.ndarray:
    """A boolean mask (H, W) grown by some pixels, rounded at its corners."""
    (height, width), padded = mask.shape, np.pad(mask, pixels)
    grown = mask.copy()
    for down in range(-pixels, pixels + 1):
        reach = round((pixels**2 - down**2) ** 0.5)
        for right in range(-reach, reach + 1):
            grown |= padded[pixels + down :, pixels + right :][:height, :width]
    return grown
