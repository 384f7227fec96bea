"""How few steps a try-on needs: schedulers, steps and guidance on the demo's held-out lines, against the work that they cost.

First every scheduler at every number of steps, with the adapter's own guidance, and what `pipe.fast()` gives; then, for the three
best, other guidance scales and guidance that begins late or ends early. Work is counted in rows that the UNet computes for a picture, which no other
program's load changes; seconds are printed too. A setting is good enough where it loses less than `--psnr` dB and
`--recognition` of the attributes against the default, 50 DDPM steps. The same command goes on where a killed one stopped.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import diffusers
from diffusers import DiffusionPipeline
from matplotlib.figure import Figure

from demo.measure import add_lines_arguments, figures, measure, recognition
from demo.recognition import ClothClassifier, load_classifier
from demo.try_on import Line, check_count, draw_lines, load_pipeline, picture_height, try_on
from pipeline_vton import FAST_GUIDED, FAST_STEPS, markdown_table
from train_vton import fingerprint


SCHEDULERS = {
    "DDPM": "DDPMScheduler",
    "DDIM": "DDIMScheduler",
    "UniPC": "UniPCMultistepScheduler",
    "DPM++ 2M": "DPMSolverMultistepScheduler",
    "Euler a": "EulerAncestralDiscreteScheduler",
}
INTERVALS = ((0.0, 1.0), (0.0, 0.75), (0.0, 0.5), (0.25, 1.0))


@dataclass(frozen=True)
class Setting:
    """How to sample; guidance None is the adapter's own scale, and `interval` the share of the steps that is guided."""

    scheduler: str
    steps: int
    guidance: float | None = None
    interval: tuple[float, float] = (0.0, 1.0)

    def rows(self, scale: float) -> int:
        """That the UNet computes for a picture, its cloth's included, at a guidance of `scale`."""
        inside = sum(self.interval[0] <= i / self.steps < self.interval[1] for i in range(self.steps))
        return 1 + self.steps + (inside if scale > 1 else 0)


DEFAULT = Setting("DDPM", 50)
FAST = Setting("Euler a", FAST_STEPS, interval=(0.0, FAST_GUIDED))  # what `pipe.fast()` gives


@dataclass(frozen=True)
class Result:
    setting: Setting
    rows: int
    seconds: float  # a picture
    psnr: float  # in the mask, dB
    ssim: float
    recognised: float  # share of the attributes

    def beats(self, other: "Result") -> bool:
        """No worse in work, PSNR and recognition, and better in one of them."""
        mine, theirs = ((-r.rows, r.psnr, r.recognised) for r in (self, other))
        return all(a >= b for a, b in zip(mine, theirs)) and mine != theirs


def sample(
    pipe: DiffusionPipeline, setting: Setting, lines: Sequence[Line], classifier: ClothClassifier, seed: int
) -> Result:
    """What a setting makes of the lines."""
    before = pipe.scheduler
    pipe.scheduler = getattr(diffusers, SCHEDULERS[setting.scheduler]).from_config(before.config)
    try:
        started = time.perf_counter()
        results = try_on(
            pipe, lines, setting.steps, seed, setting.guidance, guidance_interval=setting.interval
        )  # fmt: skip
        seconds = (time.perf_counter() - started) / len(lines)
    finally:
        pipe.scheduler = before
    found = figures(measure(results, lines, classifier))
    scale = pipe.config.guidance_scale if setting.guidance is None else setting.guidance
    return Result(setting, setting.rows(scale), seconds, found["psnr"].value, found["ssim"].value, recognition(found))


def good_enough(results: Sequence[Result], args: argparse.Namespace) -> list[Result]:
    """The settings that lose no more than asked against the default, the cheapest first."""
    default = next(r for r in results if r.setting == DEFAULT)
    kept = [
        r
        for r in results
        if r.psnr >= default.psnr - args.psnr and r.recognised >= default.recognised - args.recognition
    ]
    return sorted(kept, key=lambda r: r.rows)


def pareto(results: Sequence[Result]) -> list[Result]:
    """Those that no other beats, the cheapest first."""
    front = [r for r in results if not any(other.beats(r) for other in results)]
    return sorted(front, key=lambda r: r.rows)


def best_three(results: Sequence[Result], args: argparse.Namespace) -> list[Setting]:
    """The cheapest that are good enough, one a scheduler and number of steps; then those of the highest PSNR."""
    ranked = good_enough(results, args) + sorted(results, key=lambda r: -r.psnr)
    return list(dict.fromkeys(r.setting for r in ranked))[:3]


# ------------------------------------------------------------------------------------------------------------- report


def cells(result: Result, default: Result) -> list[str]:
    setting = result.setting
    guidance = "the adapter's" if setting.guidance is None else f"{setting.guidance:g}"
    return [
        setting.scheduler, str(setting.steps), guidance, "{:g} to {:g}".format(*setting.interval), str(result.rows),
        f"{default.rows / result.rows:.1f}", f"{result.seconds:.2f}", f"{result.psnr:.2f}", f"{result.ssim:.3f}",
        f"{result.recognised:.1%}",
    ]  # fmt: skip


def report(results: Sequence[Result], args: argparse.Namespace) -> str:
    default = next(r for r in results if r.setting == DEFAULT)
    head = ["scheduler", "steps", "guidance", "guided", "UNet rows", "times less", "s", "PSNR", "SSIM", "recognised"]
    recipe = good_enough(results, args)[0]
    return "\n".join(
        [
            f"{args.lines} held-out unpaired lines of seed {args.seed}, in the mask; the Pareto front of work, PSNR and recognition\n",
            markdown_table(head, [cells(r, default) for r in pareto(results)]),
            f"Cheapest within {args.psnr:g} dB and {args.recognition:.0%} of the default:\n",
            markdown_table(head, [cells(recipe, default)]),
            "`pipe.fast()`\n",
            markdown_table(head, [cells(r, default) for r in results if r.setting == FAST]),
            "All\n",
            markdown_table(head, [cells(r, default) for r in results]),
        ]
    )


def plot(results: Sequence[Result], file: Path) -> None:
    sheet = Figure(figsize=(10, 4), layout="constrained")
    front = pareto(results)
    for axes, name, title in zip(sheet.subplots(1, 2), ("psnr", "recognised"), ("PSNR in the mask, dB", "recognised")):
        for scheduler in SCHEDULERS:
            shown = [r for r in results if r.setting.scheduler == scheduler]
            axes.plot(
                [r.rows for r in shown], [getattr(r, name) for r in shown], "o", ms=4, alpha=0.6, label=scheduler
            )
        rings = {"ms": 9, "mfc": "none", "mec": "black", "label": "Pareto front"}
        axes.plot([r.rows for r in front], [getattr(r, name) for r in front], "o", **rings)
        axes.set(xscale="log", xlabel="UNet rows a picture", ylabel=title)
    axes.legend(fontsize=8)
    sheet.savefig(file, dpi=110)


# --------------------------------------------------------------------------------------------------------------- main


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_lines_arguments(add)
    add("--output_dir", type=Path, default=Path("runs/fewer-steps"), help="default runs/fewer-steps")
    add("--schedulers", nargs="+", choices=SCHEDULERS, default=list(SCHEDULERS), help="default: all five")
    add("--steps", type=int, nargs="+", default=[2, 4, 8, 15, 25, 50], help="default 2 4 8 15 25 50")
    add("--guidance_scale", type=float, nargs="*", default=[1, 1.5, 2.5, 5, 7.5], help="of the best three (default 1 1.5 2.5 5 7.5; none leaves them, and other intervals, out)")  # fmt: skip
    add("--psnr", type=float, default=0.2, help="dB that may be lost against the default (default 0.2)")
    add("--recognition", type=float, default=0.02, help="share of attributes that may be lost (default 0.02)")
    args = parser.parse_args(input_args)
    check_count(parser, "lines", args.lines)
    if min(args.steps) < 1:
        parser.error(f"--steps must be positive, got {min(args.steps)}")
    return args


class Notebook:
    """Results in a file, of the same weights, settings, seed and number of lines, so that none is computed twice."""

    def __init__(self, args: argparse.Namespace, pipe: DiffusionPipeline, classifier: ClothClassifier) -> None:
        self.file, self.args = args.output_dir / "results.json", args
        modules = (pipe.unet, pipe.vae, classifier)
        weights = fingerprint(weight for module in modules for weight in module.state_dict().values())
        said = [{k: v for k, v in c.items() if k != "_name_or_path"} for c in (pipe.config, pipe.scheduler.config)]
        settings = json.dumps(said, sort_keys=True, default=str)
        self.of = [weights, settings, args.lines, args.seed]
        self.results: dict[Setting, Result] = {}
        if self.file.is_file():
            content = json.loads(self.file.read_text(encoding="utf-8"))
            if content["of"] == self.of:
                for row in content["results"]:
                    setting = Setting(**row.pop("setting"))
                    setting = replace(setting, interval=tuple(setting.interval))
                    self.results[setting] = Result(setting, **row)

    def add(self, result: Result) -> None:
        self.results[result.setting] = result
        self.args.output_dir.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_suffix(".unfinished")
        content = {"of": self.of, "results": [asdict(r) for r in self.results.values()]}
        unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(unfinished, self.file)


def main(args: argparse.Namespace) -> None:
    pipe, classifier = load_pipeline(args.model, args.adapter), load_classifier(args.classifier)
    lines = draw_lines(args.lines, args.seed, picture_height(pipe))
    notebook = Notebook(args, pipe, classifier)

    def results_of(settings: Sequence[Setting]) -> list[Result]:
        for setting in settings:
            if setting not in notebook.results:
                notebook.add(sample(pipe, setting, lines, classifier, args.seed))
        return [notebook.results[setting] for setting in settings]

    grid = dict.fromkeys([DEFAULT, FAST, *(Setting(s, n) for s in args.schedulers for n in args.steps)])
    results = results_of(list(grid))
    scales = (None, *args.guidance_scale) if args.guidance_scale else ()
    refined = [
        replace(setting, guidance=scale, interval=interval)
        for setting in best_three([r for r in results if r.setting != FAST], args)
        for scale in scales
        for interval in (INTERVALS if scale is None or scale > 1 else INTERVALS[:1])
    ]
    results = results_of(list(dict.fromkeys([*grid, *refined])))
    written = report(results, args)
    (args.output_dir / "report.md").write_text(written, encoding="utf-8")
    plot(results, args.output_dir / "pareto.png")
    print(written)


if __name__ == "__main__":
    main(parse_args())
