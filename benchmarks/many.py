"""How many pairs a minute `tryon.py` makes of folders, by batch size and number of processes, on the demo model.

    python -m benchmarks.many

Every cell is a whole run of the command, loading included. On CPUs, processes share the cores.
"""

import argparse
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.launch import launch
from demo.try_on import check_count, draw_lines
from pipeline_vton import markdown_table


def draw(folder: Path, count: int) -> None:
    """People, their masks and as many cloths, of all categories; and a list of as many pairs, one each."""
    lines = draw_lines(count, seed=1, height=128)
    for name in ("people", "masks", "cloths"):
        (folder / name).mkdir()
    for i, line in enumerate(lines):
        for name, picture in (("people", line.person), ("masks", line.mask), ("cloths", line.cloth)):
            picture.save(folder / name / f"{i:03d}.png")
    (folder / "list.txt").write_text("".join(f"{i:03d}.png {i:03d}.png\n" for i in range(count)), encoding="utf-8")


def seconds_of(folder: Path, batch: int, processes: int, steps: int) -> float:
    options = {
        "person": folder / "people",
        "mask": folder / "masks",
        "cloth": folder / "cloths",
        "pairs": folder / "list.txt",
        "output": folder / f"{batch}-{processes}",
        "steps": steps,
        "batch_size": batch,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    started = time.perf_counter()
    done = subprocess.run([*launch("tryon.py", processes), *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{processes} processes, {batch} a batch: {done.stderr[-800:]}")
    return time.perf_counter() - started


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pairs", type=int, default=24, help="default 24")
    add("--batches", type=int, nargs="+", default=[1, 2, 4, 8], help="default 1 2 4 8")
    add("--processes", type=int, nargs="+", default=[1, 2], help="default 1 2")
    add("--steps", type=int, default=20, help="default 20")
    args = parser.parse_args(input_args)
    check_count(parser, "pairs", args.pairs)
    gpus = torch.cuda.device_count()
    if gpus and max(args.processes) > gpus:
        parser.error(f"--processes must not be more than the {gpus} GPUs, got {args.processes}")
    return args


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), args.pairs)
        runs = [(processes, batch) for processes in args.processes for batch in args.batches]
        spent = {run: seconds_of(Path(folder), *run[::-1], args.steps) for run in tqdm(runs, unit="run")}
    rows = [[str(p), *(f"{60 * args.pairs / spent[p, batch]:.1f}" for batch in args.batches)] for p in args.processes]
    print(f"pairs a minute: {args.pairs} pairs of {args.steps} steps, the demo model\n")
    print(markdown_table(["processes", *(f"{batch} a batch" for batch in args.batches)], rows))


if __name__ == "__main__":
    main(parse_args())
