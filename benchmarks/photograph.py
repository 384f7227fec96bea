"""What a large photograph costs around the model: CPU seconds of every stage, and the peak of memory.

    python -m benchmarks.photograph

A drawn person of 24 megapixels with a mask, into which a result of 1024x768 is laid. No model runs but a human parser of a few
thousand weights. Opening the file, drawing the mask and writing the result, which come on top, are printed beside; and, on the clock,
what all of it but the files takes where the parser draws the mask, over the whole picture, which is the most that there is to lay in.
"""

import argparse
import io
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import psutil
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw

from benchmarks.costs import PeakMemory
from benchmarks.sd15 import random_parser, random_pipe
from pipeline_vton import StableDiffusionVTONPipeline, TryOnInputs, as_masks, as_pictures, as_pil, composite_result


WORKED_AT = (1024, 768)  # height and width


def draw(width: int, height: int) -> tuple[Image.Image, Image.Image]:
    """A photograph of smooth colours, and a mask: a trunk, two sleeves, and a strap that is thin."""
    coarse = torch.randint(0, 256, (7, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    person, mask = (
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC),
        Image.new("L", (400, 600)),
    )
    pen = ImageDraw.Draw(mask)
    pen.rounded_rectangle((110, 150, 290, 420), 40, fill=255)
    pen.line((130, 180, 70, 380), fill=255, width=36)
    pen.line((270, 180, 330, 380), fill=255, width=36)
    pen.line((200, 100, 210, 160), fill=255, width=3)
    mask = mask.resize((width, height), Image.Resampling.BICUBIC)
    return person, mask.point(lambda value: 255 * (value >= 128))


def measure(width: int, height: int) -> tuple[dict[str, float], dict[str, float], float]:
    """CPU seconds by stage; those that come on top; and by how many GiB the memory grew in the former at most, the photograph and
    its mask aside.
    """
    seconds: dict[str, float] = {}

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = work()
        seconds[stage] = time.process_time() - start
        return result

    photograph, drawn = draw(width, height)
    processor = VaeImageProcessor()
    size = dict(zip(("height", "width"), WORKED_AT))
    image, region = torch.rand(3, *WORKED_AT), (0, 0, width, height)
    with PeakMemory() as peak:
        before = psutil.Process().memory_info().rss / 2**30
        (person,) = timed("read the person", lambda: as_pictures(photograph, "person_image"))
        (mask,) = timed("read the mask", lambda: as_masks(drawn, "mask_image"))
        timed(
            "scale both for the model", lambda: [processor.preprocess(as_pil(one), **size) for one in (person, mask)]
        )
        result = timed("lay the result in", lambda: composite_result(image, person, mask, region))
        picture = timed("make a picture of it", lambda: as_pil(result))
    gib = peak.gib - before
    around = dict(seconds)
    pipe = random_pipe(tiny=True)
    parser, image_processor = random_parser("cpu", torch.float32, tiny=True)
    pipe.register_modules(human_parser=parser, human_parser_processor=image_processor)
    seconds.clear()
    seconds["on the clock, with a drawn mask"] = min(on_the_clock(pipe, photograph, image) for _ in range(2))
    timed("draw a mask", lambda: pipe.predict_mask(photograph))
    for kind, options in {"PNG": {}, "JPEG": {"quality": 95, "subsampling": 0}}.items():
        file = io.BytesIO()
        timed(f"write {kind}", partial(picture.save, file, kind, **options))
        timed(f"open {kind}", Image.open(file).load)
    return around, seconds, gib


def on_the_clock(pipe: StableDiffusionVTONPipeline, photograph: Image.Image, image: torch.Tensor) -> float:
    """Seconds around the model for a photograph without a mask."""
    start, (width, height) = time.perf_counter(), photograph.size
    persons = as_pictures(photograph, "person_image")
    inputs = TryOnInputs(persons, [], [None], None, [None], *WORKED_AT, padding=None, noise_shape=(), prompts=None)
    drawn = pipe.draw_masks(inputs, "upper")
    (person,), (mask,) = drawn.persons, drawn.masks
    for one in (person, mask):
        pipe.image_processor.preprocess(as_pil(one), **dict(zip(("height", "width"), WORKED_AT)))
    as_pil(composite_result(image, person, mask, (0, 0, width, height)))
    return time.perf_counter() - start


def main(args: argparse.Namespace) -> None:
    measure(600, 400)  # what is loaded once
    seconds, beside, gib = measure(*args.size)
    for stage, spent in (seconds | {"in all": sum(seconds.values())} | beside).items():
        print(f"{spent:6.2f} s  {stage}")
    print(f"{gib:6.2f} GiB at most, beside the photograph of {args.size[0]}x{args.size[1]} and its mask")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(4000, 6000), metavar=("WIDTH", "HEIGHT"), help="of the photograph in pixels (default 4000 6000)")  # fmt: skip
    args = parser.parse_args(input_args)
    if min(args.size) < 64:
        parser.error(f"--size must be at least 64 pixels a side, got {args.size[0]} {args.size[1]}")
    return args


if __name__ == "__main__":
    main(parse_args())
