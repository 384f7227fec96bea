#!/usr/bin/env python
"""Draw the try-on page's examples, people and cloths that no model was trained on: `OUTPUT_DIR/CATEGORY-NUMBER/{person,cloth,mask}.png`."""

import argparse
from pathlib import Path

from demo.try_on import DEMO, check_count, draw_lines
from demo.world import UNIT_HEIGHT


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=DEMO / "examples", help="default demo/examples")
    parser.add_argument("--count", type=int, default=6, help="examples of all categories, at least 6 (default 6)")
    parser.add_argument("--seed", type=int, default=7, help="0 is the training set's own test split (default 7)")
    parser.add_argument("--height", type=int, default=UNIT_HEIGHT, help=f"of the pictures (default {UNIT_HEIGHT})")
    args = parser.parse_args(input_args)
    check_count(parser, "count", args.count)
    return args


def main(args: argparse.Namespace) -> None:
    for number, line in enumerate(draw_lines(args.count, args.seed, args.height)):
        folder = args.output_dir / f"{line.category}-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("person", "cloth", "mask"):
            getattr(line, name).save(folder / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main(parse_args())
