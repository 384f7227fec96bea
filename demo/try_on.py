"""Draw people that the demo model has never seen, try cloths on them, and show it all on one sheet."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw

from demo.make_dataset import World, describe
from demo.world import CATEGORIES, LIP, draw_cloth, draw_person, draw_skeleton, keypoints
from pipeline_vton import LOOSENESS


DEMO = Path(__file__).resolve().parent
COLUMNS = ("person", "cloth", "mask", "result", "truth")
SHOWN_HEIGHT, MARGIN, TITLE = 256, 8, 18  # pixels of the sheet
BATCH_SIZE = 16
MASKS = ("true", *LOOSENESS)
MASKS_HELP = "the drawn world's masks (true), or the human parser's of a looseness"


@dataclass(frozen=True)
class Line:
    """A person and a cloth that they don't wear, drawn; pictures have the model's size.

    Args:
        category: one of `CATEGORIES`, or `outfit`.
        person, cloth, mask, pose: what a try-on is given; the pose where the adapter reads poses.
        truth: what it should give.
        worn: where the truth shows the cloth, booleans (H, W).
        factors: the level of every factor by which the truth varies.
        attributes: what can be recognised of the cloth.
        cloth_2: of an outfit, the trousers or the skirt.
    """

    category: str
    person: Image.Image
    cloth: Image.Image
    mask: Image.Image
    pose: Image.Image
    truth: Image.Image
    worn: np.ndarray
    factors: dict[str, str]
    attributes: dict[str, str | None]
    cloth_2: Image.Image | None = None


def draw_line(world: World, index: int, partner: int) -> Line:
    (person, own), (wearer, cloth) = (world.sample("test", i) for i in (index, partner))
    before, mask, _ = draw_person(person, own, *world.size)
    outfit = {"cloth_2": draw_cloth(wearer.other, *world.size)} if world.category == "outfit" else {}
    truth, _, labels = draw_person(replace(person, other=wearer.other) if outfit else person, cloth, *world.size)
    described = describe(world, person, own, cloth)
    return Line(
        category=world.category_of(index),
        person=before,
        cloth=draw_cloth(cloth, *world.size),
        mask=mask,
        pose=draw_skeleton(keypoints(person, *world.size), *world.size),
        truth=truth,
        worn=labels == LIP[cloth.kind],
        **described,
        **outfit,
    )


def draw_lines(count: int, seed: int, height: int, category: str = "all") -> list[Line]:
    """The unpaired lines of the dataset that `demo.make_dataset` draws of a category, or of all, those of each side by side."""
    world = World(seed, height, category)
    lines = [draw_line(world, i, world.partner(i, count)) for i in range(count)]
    return sorted(lines, key=lambda line: line.category in CATEGORIES and CATEGORIES.index(line.category))


def fast_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def mixed_precision() -> str:
    """What training is to multiply matrices in: `bf16` on GPUs and CPUs with units for it; on others that is slower."""
    gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if gpu or torch.cpu._is_amx_tile_supported() else "no"


def fast_dtype() -> torch.dtype:
    """bfloat16 on CPUs that are fast with it; elsewhere float32, which on a GPU the demo's small model can afford."""
    return torch.bfloat16 if fast_device().type == "cpu" and mixed_precision() == "bf16" else torch.float32


def load_pipeline(model: Path, adapter: Path | None = None, dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """The base in `model`, with the pipeline of this repository and an adapter: None is the one beside the base."""
    pipe = DiffusionPipeline.from_pretrained(
        str(model),
        custom_pipeline=str(DEMO.parent / "pipeline_vton.py"),
        trust_remote_code=True,
        dtype=dtype or fast_dtype(),
    ).to(fast_device())
    pipe.load_vton_adapter(adapter or model)
    return pipe


def picture_height(pipe: DiffusionPipeline) -> int:
    """Of the drawn world in which the model was trained."""
    return pipe.vae.config.sample_size


def noises(seed: int, start: int, stop: int) -> list[torch.Generator]:
    """A generator for each line, so that its result doesn't depend on how many are tried on, or together with which."""
    return [torch.Generator().manual_seed(seed * 100_003 + i) for i in range(start, stop)]


def with_masks(pipe: DiffusionPipeline, lines: Sequence[Line], looseness: str) -> list[Line]:
    """The same lines with the masks that the model's human parser proposes."""
    return [replace(line, mask=pipe.predict_mask(line.person, line.category, looseness)) for line in lines]


def try_on(
    pipe: DiffusionPipeline, lines: Sequence[Line], steps: int, seed: int, scale: float | None = None, **options: Any
) -> list[Image.Image]:
    """Every cloth on its person, with the pose where the adapter reads poses; `scale` None is the adapter's own guidance.

    `options` are a call's.
    """
    results, posed = [], pipe.config.pose == "painted"
    for start in range(0, len(lines), BATCH_SIZE):
        batch = lines[start : start + BATCH_SIZE]
        results += pipe(
            person_image=[line.person for line in batch],
            cloth_image=[[line.cloth, line.cloth_2] if line.cloth_2 else line.cloth for line in batch],
            mask_image=[line.mask for line in batch],
            pose_image=[line.pose for line in batch] if posed else None,
            num_inference_steps=steps,
            guidance_scale=scale,
            generator=noises(seed, start, start + len(batch)),
            **options,
        ).images
    return results


def contact_sheet(lines: Sequence[Line], results: Sequence[Image.Image]) -> Image.Image:
    """Two lines a row, every pixel shown as a square of whole pixels."""
    width, height = lines[0].person.size
    zoom = max(1, SHOWN_HEIGHT // height)
    shown = width * zoom, height * zoom
    cell = [side + MARGIN for side in shown]
    block = len(COLUMNS) * cell[0] + 2 * MARGIN
    sheet = Image.new("RGB", (2 * block - MARGIN, TITLE + (len(lines) + 1) // 2 * cell[1] + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (line, result) in enumerate(zip(lines, results)):
        pictures = {
            "person": line.person,
            "cloth": line.cloth,
            "mask": line.mask,
            "result": result,
            "truth": line.truth,
        }
        for j, name in enumerate(COLUMNS):
            left = MARGIN + i % 2 * block + j * cell[0]
            if i < 2:
                draw.text((left + shown[0] // 2, TITLE), name, fill="black", anchor="mb", font_size=13)
            picture = pictures[name].convert("RGB").resize(shown, Image.Resampling.NEAREST)
            sheet.paste(picture, (left, TITLE + MARGIN // 2 + i // 2 * cell[1]))
    return sheet


def can_show() -> bool:
    on_screen = sys.platform in {"darwin", "win32"} or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    return on_screen and "CI" not in os.environ


def check_count(parser: argparse.ArgumentParser, name: str, count: int) -> None:
    """Every category needs two lines: a person tries on what another one wears."""
    if count < 2 * len(CATEGORIES):
        parser.error(f"--{name} must be at least {2 * len(CATEGORIES)}, two of every category, got {count}")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO / "model", help="base and adapter (default demo/model)")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="default runs/demo")
    parser.add_argument("--count", type=int, default=12, help="try-ons, at least 6 (default 12)")
    parser.add_argument(
        "--seed",
        type=int,
        default=7,
        help="seed of people, cloths and noise; 0 is the training set's own test split (default 7)",
    )
    parser.add_argument("--num_inference_steps", type=int, default=50, help="denoising steps (default 50)")
    parser.add_argument("--guidance_scale", type=float, help="default: the adapter's own")
    parser.add_argument("--masks", choices=MASKS, default="loose", help=f"{MASKS_HELP} (default loose)")
    args = parser.parse_args(input_args)
    check_count(parser, "count", args.count)
    return args


def main(args: argparse.Namespace) -> None:
    pipe = load_pipeline(args.model)
    lines = draw_lines(args.count, args.seed, picture_height(pipe))
    if args.masks != "true":
        lines = with_masks(pipe, lines, args.masks)
    results = try_on(pipe, lines, args.num_inference_steps, args.seed, args.guidance_scale)
    sheet, file = contact_sheet(lines, results), args.output_dir / "contact_sheet.png"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    sheet.save(file)
    print(f"{args.count} try-ons in {file}")
    if can_show():
        sheet.show()


if __name__ == "__main__":
    main(parse_args())
