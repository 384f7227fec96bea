"""How a try-on's seconds and memory grow with its pixels, steps, persons and cloths, with random weights of SD1.5's size.

Every point is a whole call in a process of its own, once to warm up and once more to be timed. Memory is what the call takes
beside the loaded weights. The exponent of a power law is fitted to each curve (1: twice as much costs twice as much), and all
of them are drawn into one plot. Wants a machine that does nothing else.
"""

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from tqdm import tqdm

from benchmarks.costs import PeakMemory
from benchmarks.sd15 import random_pipe
from benchmarks.speed import DTYPES, GUIDANCE, drawn_pictures, machine
from pipeline_vton import markdown_table


@dataclass(frozen=True)
class Call:
    """What is asked of the pipeline; the defaults stay while another grows."""

    height: int = 256
    width: int = 192
    steps: int = 4
    persons: int = 1
    cloths: int = 1

    @property
    def pixels(self) -> int:
        return self.height * self.width


SIZES = ((256, 192), (384, 256), (512, 384), (640, 512))  # multiples of 64, as SD1.5 takes
TINY_SIZES = ((64, 48), (128, 96))
COUNTS = {"steps": (2, 4, 8, 16), "persons": (1, 2, 4, 8), "cloths": (1, 2, 3, 4)}


def curves(sizes: tuple[tuple[int, int], ...], counts: dict[str, tuple[int, ...]]) -> dict[str, list[Call]]:
    """By what grows, the calls."""
    smallest = Call(*sizes[0])
    found = {"pixels": [replace(smallest, height=height, width=width) for height, width in sizes]}
    return found | {name: [replace(smallest, **{name: count}) for count in values] for name, values in counts.items()}


def cost(call: Call, dtype: str, device: str, tiny: bool) -> tuple[float, float]:
    """Seconds, and GiB beside the weights."""
    pipe = random_pipe(device, DTYPES[dtype], tiny)
    person, cloth, mask = drawn_pictures(call.height, call.width)
    people = ([person] * call.persons, [[cloth] * call.cloths] * call.persons, [mask] * call.persons)
    options = {"height": call.height, "width": call.width, "guidance_scale": GUIDANCE}
    on_gpu = device.startswith("cuda")
    loaded = torch.cuda.memory_allocated(device) if on_gpu else psutil.Process().memory_info().rss
    with PeakMemory() as peak:
        pipe(*people, num_inference_steps=1, **options)
        started = time.perf_counter()
        pipe(
            *people, num_inference_steps=call.steps, **options
        )  # its pictures are on the CPU: nothing is left to wait for
        seconds = time.perf_counter() - started
    most = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else peak.gib
    return seconds, most - loaded / 2**30


def exponent(amounts: list[float], costs: list[float]) -> float:
    """Of the power law that is nearest in logarithms."""
    return float(np.polyfit(np.log(amounts), np.log(costs), 1)[0])


def plot(found: dict[str, list[tuple[float, float, float]]], file: Path) -> None:
    sheet = Figure(figsize=(12, 5.5), layout="constrained")
    for row, (number, title) in zip(sheet.subplots(2, len(found)), ((1, "seconds"), (2, "GiB beside the weights"))):
        for axes, (name, points) in zip(row, found.items()):
            amounts, costs = [point[0] for point in points], [point[number] for point in points]
            axes.plot(amounts, costs, "o-", label=f"exponent {exponent(amounts, costs):.2f}")
            axes.set(xscale="log", yscale="log", xlabel=name, ylabel=title)
            axes.set_xticks(amounts, [f"{amount:,}" for amount in amounts], fontsize=8)
            axes.xaxis.set_minor_locator(NullLocator())
            for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                set_formatter("{x:g}")
            axes.legend(fontsize=8)
    sheet.savefig(file, dpi=110)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--output_dir",
        type=Path,
        default=Path("runs/growth"),
        help="for growth.png and report.md (default runs/growth)",
    )
    add("--dtype", choices=DTYPES, default="fp32", help="default fp32")
    add("--device", default="cpu", help="default cpu")
    add("--tiny", action="store_true", help="a few thousand weights instead of SD1.5's, to try the script")
    args = parser.parse_args(input_args)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: there is no GPU that torch can use")
    return args


def main(args: argparse.Namespace) -> None:
    counts = {name: values[:2] for name, values in COUNTS.items()} if args.tiny else COUNTS
    found, cells = {}, []
    for name, calls in curves(TINY_SIZES if args.tiny else SIZES, counts).items():
        points = []
        for call in tqdm(calls, desc=name):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
                spent = alone.submit(cost, call, args.dtype, args.device, args.tiny).result()
            points.append((getattr(call, name), *spent))
        found[name] = points
        amounts, seconds, gib = zip(*points)
        shown = [" / ".join(f"{value:.3g}" for value in values) for values in (amounts, seconds, gib)]
        cells.append([name, shown[0], shown[1], f"{exponent(amounts, seconds):.2f}", shown[2], f"{exponent(amounts, gib):.2f}"])  # fmt: skip
    titles = ["what grows", "to", "seconds", "exponent", "GiB beside the weights", "exponent"]
    written = f"Whole calls, {args.dtype}, {machine(torch.device(args.device))}\n\n" + markdown_table(titles, cells)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "report.md").write_text(written, encoding="utf-8")
    plot(found, args.output_dir / "growth.png")
    print(written)


if __name__ == "__main__":
    main(parse_args())
