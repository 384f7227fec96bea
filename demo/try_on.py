"""Draw people that the demo model has never seen, try cloths on them, and show it all on one sheet."""

import argparse
import os
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw

from demo.make_dataset import make_dataset


DEMO = Path(__file__).resolve().parent
COLUMNS = ("person", "cloth", "mask", "result", "truth")
ZOOM, MARGIN, TITLE = 3, 6, 14


def load_pipeline(model: Path, adapter: Path | None = None) -> DiffusionPipeline:
    """The base in `model`, with the pipeline of this repository and an adapter: None is the one beside the base."""
    pipe = DiffusionPipeline.from_pretrained(
        str(model), custom_pipeline=str(DEMO.parent / "pipeline_vton.py"), trust_remote_code=True, dtype=torch.float32
    )
    pipe.load_vton_adapter(adapter or model)
    return pipe


def read_test_split(root: Path) -> dict[str, list[Image.Image]]:
    """Every line of `test_pairs.txt` as pictures: person, cloth, mask and truth."""
    pairs = [[Path(name).stem for name in line.split()] for line in (root / "test_pairs.txt").read_text().splitlines()]
    files = {
        "person": [f"image/{person}.png" for person, _ in pairs],
        "cloth": [f"cloth/{cloth}.png" for _, cloth in pairs],
        "mask": [f"agnostic-mask/{person}_mask.png" for person, _ in pairs],
        "truth": [f"tryon/{person}__{cloth}.png" for person, cloth in pairs],
    }
    return {name: [Image.open(root / "test" / file) for file in listed] for name, listed in files.items()}


def try_on(
    pipe: DiffusionPipeline, pictures: dict[str, list[Image.Image]], steps: int, seed: int, scale: float | None
) -> list[Image.Image]:
    """Every cloth on its person; `scale` None is the adapter's own guidance."""
    return pipe(
        person_image=pictures["person"],
        cloth_image=pictures["cloth"],
        mask_image=pictures["mask"],
        num_inference_steps=steps,
        guidance_scale=scale,
        generator=torch.Generator().manual_seed(seed),
    ).images


def contact_sheet(pictures: dict[str, list[Image.Image]]) -> Image.Image:
    """Two pairs a line, every pixel shown as a square."""
    count, (width, height) = len(pictures["person"]), pictures["person"][0].size
    cell = (width * ZOOM + MARGIN, height * ZOOM + MARGIN)
    block = len(COLUMNS) * cell[0] + MARGIN
    sheet = Image.new("RGB", (2 * block + MARGIN, TITLE + (count + 1) // 2 * cell[1] + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for i in range(count):
        for j, name in enumerate(COLUMNS):
            left = MARGIN + i % 2 * block + j * cell[0]
            draw.text((left, 2), name, fill="black")
            picture = pictures[name][i].convert("RGB").resize((width * ZOOM, height * ZOOM), Image.Resampling.NEAREST)
            sheet.paste(picture, (left, TITLE + MARGIN + i // 2 * cell[1]))
    return sheet


def can_show() -> bool:
    on_screen = sys.platform in {"darwin", "win32"} or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    return on_screen and "CI" not in os.environ


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO / "model", help="base and adapter (default demo/model)")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="default runs/demo")
    parser.add_argument("--count", type=int, default=12, help="try-ons, at least 2 (default 12)")
    parser.add_argument(
        "--seed", type=int, default=7, help="seed of people, cloths and noise; 0 was trained on (default 7)"
    )
    parser.add_argument("--num_inference_steps", type=int, default=50, help="denoising steps (default 50)")
    parser.add_argument("--guidance_scale", type=float, help="default: the adapter's own")
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    make_dataset(args.output_dir / "dataset", train=0, test=args.count, seed=args.seed)
    pictures = read_test_split(args.output_dir / "dataset")
    pipe = load_pipeline(args.model)
    pictures["result"] = try_on(pipe, pictures, args.num_inference_steps, args.seed, args.guidance_scale)
    sheet = contact_sheet(pictures)
    sheet.save(args.output_dir / "contact_sheet.png")
    print(f"{args.count} try-ons in {args.output_dir / 'contact_sheet.png'}")
    if can_show():
        sheet.show()


if __name__ == "__main__":
    main(parse_args())
