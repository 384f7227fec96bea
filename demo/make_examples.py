#!/usr/bin/env python
"""Draw the try-on page's examples: `OUTPUT_DIR/CATEGORY-NUMBER/{person,cloth,mask}.png`."""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from make_dataset import make_dataset
from try_on import read_test_split


def main(args: argparse.Namespace) -> None:
    with TemporaryDirectory() as root:
        make_dataset(Path(root), train=0, test=args.count, seed=args.seed)
        pictures = read_test_split(Path(root))
        for number in range(args.count):
            folder = args.output_dir / f"upper-{number}"
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("person", "cloth", "mask"):
                pictures[name][number].save(folder / f"{name}.png", optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "examples")
    parser.add_argument("--count", type=int, default=4, help="examples, at least 2 (default 4)")
    parser.add_argument("--seed", type=int, default=7, help="0 was trained on (default 7)")
    main(parser.parse_args())
