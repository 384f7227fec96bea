"""Measure the demo model against the drawn truth, on people and cloths of a seed that it was never trained on.

Printed are PSNR and SSIM inside the mask, and the share of results in which a small network (`demo.recognition`) sees the
colour, pattern, logo, sleeve and garment length that the cloth truly has, all with the 95 % of the bootstrap: for the adapter
and for what it has to beat; then where in the mask the error lies. `--by` breaks the figures down by category and factor,
`--steps` follows them along the number of denoising steps. `--output_dir` receives the tables (report.md) and their plots.
"""

import argparse
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionInpaintPipeline
from matplotlib.figure import Figure
from PIL import Image, ImageFilter

from demo.recognition import ATTRIBUTES, CLASSIFIER, ClothClassifier, load_classifier, recognize
from demo.try_on import (
    BATCH_SIZE,
    DEMO,
    MASKS,
    MASKS_HELP,
    Line,
    check_count,
    draw_lines,
    load_pipeline,
    noises,
    picture_height,
    try_on,
    with_masks,
)
from demo.world import CATEGORIES, FACTORS, LEVELS
from evaluate_vton import Interval, bootstrap, decibels, squared_error, ssim
from pipeline_vton import markdown_table


GROUPS = ("category", *FACTORS)
SHOWN_LOGO = "printed logo"  # of the lines that have one: most have none, which is easily right
RECOGNISED = (*ATTRIBUTES, SHOWN_LOGO)
TITLES = {"psnr": "PSNR", "ssim": "SSIM"} | {name: name.replace("_", " ") for name in RECOGNISED}
# Of a mask, each with a PSNR of its own.
PLACES = ("in plain cloths", "in patterned cloths", "at cloths' edges", "skin and background")
EDGE = 5  # pixels across

Figures = dict[str, Interval]
# Of one line and by figure, a numerator and a denominator, whose sums over the lines make the figure.
Parts = dict[str, tuple[float, float]]


# ------------------------------------------------------------------------------------------------ what is compared with what


def as_tensor(picture: Image.Image) -> torch.Tensor:
    """A picture (3, H, W), or a mask (1, H, W), in [0, 1]."""
    array = np.asarray(picture, np.float32) / 255
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def inside(results: Iterable[Image.Image], lines: Sequence[Line]) -> list[Image.Image]:
    """Results within the masks, and the person around them."""
    return [Image.composite(result, line.person, line.mask) for result, line in zip(results, lines)]


def without_cloth(pipe: DiffusionPipeline, lines: Sequence[Line], steps: int, seed: int) -> list[Image.Image]:
    """The same UNet through diffusers' own inpainting pipeline: the person's rows, and no cloth tokens."""
    parts = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    components = {part: getattr(pipe, part) for part in parts} | {"safety_checker": None, "feature_extractor": None}
    inpaint = StableDiffusionInpaintPipeline(**components, requires_safety_checker=False)
    results, (width, height) = [], lines[0].person.size
    for start in range(0, len(lines), BATCH_SIZE):
        batch = lines[start : start + BATCH_SIZE]
        results += inpaint(
            prompt=[""] * len(batch),
            image=[line.person for line in batch],
            mask_image=[line.mask for line in batch],
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=1.0,
            generator=noises(seed, start, start + len(batch)),
        ).images
    return inside(results, lines)


def mean_color(line: Line) -> Image.Image:
    """The truth, with the flat cloth's mean colour wherever the cloth is seen."""
    flat, painted = np.asarray(line.cloth), np.array(line.truth)
    painted[line.worn] = flat[(flat < 250).any(axis=-1)].mean(axis=0).round()  # all that is not the white behind it
    return Image.fromarray(painted)


@torch.no_grad()
def round_trip(vae: AutoencoderKL, lines: Sequence[Line]) -> list[Image.Image]:
    """What the VAE leaves of the truth."""
    pixels = torch.stack([as_tensor(line.truth) for line in lines]) * 2 - 1  # (N, 3, H, W)
    batches = pixels.to(vae.device, vae.dtype).split(BATCH_SIZE)
    decoded = torch.cat([vae.decode(vae.encode(batch).latent_dist.mode()).sample.float() for batch in batches])
    arrays = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().byte().movedim(1, -1).cpu().numpy()
    return inside(map(Image.fromarray, arrays), lines)


# ---------------------------------------------------------------------------------------------------------------- figures


def places(line: Line) -> dict[str, torch.Tensor]:
    """Those of `PLACES` that a line has, masks (1, H, W): all of its mask once."""
    worn, mask = Image.fromarray(line.worn.astype(np.uint8) * 255), as_tensor(line.mask)
    inner, outer = (as_tensor(worn.filter(rank(EDGE))) for rank in (ImageFilter.MinFilter, ImageFilter.MaxFilter))
    plain, patterned, edges, rest = PLACES
    cloth = plain if line.attributes["pattern"] == "plain" else patterned
    return {cloth: mask * inner, edges: mask * (outer - inner), rest: mask * (1 - outer)}


def measure(results: Sequence[Image.Image], lines: Sequence[Line], classifier: ClothClassifier) -> list[Parts]:
    """What each line adds to each figure; an attribute that its cloth has not is left out."""
    said, rows = recognize(classifier, results, [line.mask for line in lines]), []
    for result, line, seen in zip(results, lines, said):
        pair, mask = (as_tensor(result), as_tensor(line.truth)), as_tensor(line.mask)
        right = {name: float(seen[name] == line.attributes[name]) for name in ATTRIBUTES if line.attributes[name]}
        if line.attributes["logo"] != "none":
            right[SHOWN_LOGO] = right["logo"]
        values = {"psnr": squared_error(*pair, mask), "ssim": (ssim(*pair, mask), 1.0)}
        values |= {place: squared_error(*pair, where) for place, where in places(line).items()}
        rows.append(values | {name: (value, 1.0) for name, value in right.items()})
    return rows


def figures(rows: Sequence[Parts]) -> Figures:
    """The figures of some lines, those of `TITLES` and `PLACES` that any of them has."""
    found = {}
    for name in (*TITLES, *PLACES):
        parts = [row[name] for row in rows if name in row]
        if parts:
            transform = decibels if name in ("psnr", *PLACES) else np.asarray
            found[name] = bootstrap(*zip(*parts), transform=transform)
    return found


def groups(lines: Sequence[Line], by: str) -> dict[str, list[int]]:
    """The numbers of the lines at every level of a factor, or of every category."""
    order = CATEGORIES if by == "category" else ("shorter", "equal", "longer") if by == "sleeve" else LEVELS[by]
    found = {level: [] for level in order}
    for i, line in enumerate(lines):
        level = line.category if by == "category" else line.factors.get(by)
        if level is not None:
            found[level].append(i)
    return {level: numbers for level, numbers in found.items() if numbers}


# --------------------------------------------------------------------------------------------------------- tables and plots


def cells(found: Figures, names: Iterable[str] = TITLES) -> list[str]:
    styles = {"ssim": "{:.3f}"} | dict.fromkeys(("psnr", *PLACES), "{:.2f}")

    def cell(name: str) -> str:
        if name not in found:
            return "–"
        one, style = found[name], styles.get(name, "{:.0%}")
        shown = [style.format(value) for value in (one.value, one.low, one.high)]
        return f"{shown[0]} [{shown[1]}, {shown[2]}]"

    return [cell(name) for name in names]


def error_cells(rows: Sequence[Parts]) -> list[str]:
    """For each of `PLACES` its PSNR and its shares of the mask and of the mask's squared error."""
    sums = {place: np.sum([row.get(place, (0.0, 0.0)) for row in rows], axis=0) for place in PLACES}
    shares = np.array(list(sums.values())) / np.maximum(sum(sums.values()), 1e-12)  # the truth has no error
    shown = cells(figures(rows), PLACES)
    return [f"{decibel}; {area:.0%}, {error:.0%}" for decibel, (error, area) in zip(shown, shares)]


def recognition(found: Figures) -> float:
    """The mean over the attributes, the printed logo's share aside."""
    return float(np.mean([found[name].value for name in ATTRIBUTES if name in found]))


def draw_error_bars(axes, places: Sequence[float], found: Sequence[Interval], **style) -> None:
    values = np.array([one.value for one in found])
    reach = np.abs([[one.value - one.low, one.high - one.value] for one in found]).T
    axes.errorbar(places, values, reach, capsize=2, **style)


def plot_groups(rows: dict[str, list[Parts]], lines: Sequence[Line], by: Sequence[str], file: Path) -> None:
    """For every factor, PSNR above and recognition below, by level and method."""
    sheet = Figure(figsize=(3.2 * len(by), 6.4), layout="constrained")
    frames = sheet.subplots(2, len(by), squeeze=False, sharey="row")
    for (above, below), name in zip(frames.T, by):
        levels = groups(lines, name)
        for method, of_lines in rows.items():
            found = [figures([of_lines[i] for i in numbers]) for numbers in levels.values()]
            style = {"marker": "o", "label": method}
            if np.isfinite([one["psnr"].value for one in found]).all():
                draw_error_bars(above, range(len(levels)), [one["psnr"] for one in found], **style)
            below.plot(range(len(levels)), [recognition(one) for one in found], **style)
        above.set_title(name)
        labels = [f"{level}\n{len(numbers)} lines" for level, numbers in levels.items()]
        below.set_xticks(range(len(levels)), labels, fontsize=7)
        above.set_xticks([])
    frames[0, 0].set_ylabel("PSNR in the mask, dB")
    frames[1, 0].set_ylabel("attributes recognised, share")
    below.legend(fontsize=7)
    sheet.savefig(file, dpi=110)


def plot_steps(by_steps: dict[int, Figures], file: Path) -> None:
    sheet = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = sheet.subplots(1, 2)
    draw_error_bars(left, list(by_steps), [found["psnr"] for found in by_steps.values()], marker="o")
    left.set_ylabel("PSNR in the mask, dB")
    for name in RECOGNISED:
        there = {steps: found[name].value for steps, found in by_steps.items() if name in found}
        right.plot(list(there), list(there.values()), marker="o", label=TITLES[name])
    right.set_ylabel("recognised, share")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(list(by_steps), [str(steps) for steps in by_steps])
        axes.minorticks_off()
        axes.set_xlabel("denoising steps")
    sheet.savefig(file, dpi=110)


# ------------------------------------------------------------------------------------------------------------------- main


def add_lines_arguments(add: Callable[..., argparse.Action]) -> None:
    """Which model is measured, on which lines."""
    add("--model", type=Path, default=DEMO / "model", help="base and adapter (default demo/model)")
    add("--adapter", type=Path, help="another adapter for the base (default: the one beside it)")
    add("--classifier", type=Path, default=CLASSIFIER, help="what recognises cloths (default demo/classifier)")
    add("--lines", type=int, default=64, help="held-out unpaired lines, at least 6 (default 64)")
    add("--seed", type=int, default=1, help="seed of people, cloths and noise (default 1)")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_lines_arguments(add)
    add("--output_dir", type=Path, default=Path("runs/measure"), help="for tables and plots (default runs/measure)")
    add("--height", type=int, help="of the pictures and of the work, a multiple of 64: what sizes not trained at cost (default: as trained)")  # fmt: skip
    add("--num_inference_steps", type=int, default=50, help="denoising steps (default 50)")
    add("--guidance_scale", type=float, nargs="+", default=[None], help="one row each (default: the adapter's own)")
    add("--masks", nargs="+", choices=MASKS, default=["true"], help=f"{MASKS_HELP}, one row each (default true)")
    add("--by", nargs="*", choices=GROUPS, metavar="FACTOR", help=f"break down by these, all if none is named: {', '.join(GROUPS)}")  # fmt: skip
    add(
        "--steps",
        type=int,
        nargs="+",
        default=[],
        help="the adapter's figures after each number of steps, as a curve, with the first of --masks and --guidance_scale",
    )
    args = parser.parse_args(input_args)
    check_count(parser, "lines", args.lines)
    for steps in (args.num_inference_steps, *args.steps):
        if steps < 1:
            parser.error(f"--num_inference_steps and --steps must be positive, got {steps}")
    if args.height is not None and (args.height < 64 or args.height % 64):
        parser.error(f"--height must be a positive multiple of 64, got {args.height}")
    args.by = [] if args.by is None else args.by or list(GROUPS)
    return args


def compare(
    pipe: DiffusionPipeline, lines: Sequence[Line], args: argparse.Namespace, score: Callable, adapter_row: Callable
) -> dict[str, list[Parts]]:
    """The adapter and what it has to beat; it is unloaded on the way."""
    rows = {}
    for masks, scale in itertools.product(args.masks, args.guidance_scale):
        found = adapter_row(args.num_inference_steps, masks, scale)
        read = "" if masks == "true" else f", {masks} masks of the parser"
        shown = pipe.config.guidance_scale if scale is None else scale
        rows[f"(a) the adapter, guidance {shown:g}{read}"] = found
    pipe.unload_vton_adapter()
    return rows | {
        "(b) the base without a cloth": score(without_cloth(pipe, lines, args.num_inference_steps, args.seed)),
        "(c) the cloth's mean colour in its true place": score([mean_color(line) for line in lines]),
        "(d) the truth through the VAE": score(round_trip(pipe.vae, lines)),
        "(e) the person in a wrong cloth, as they came": score([line.person for line in lines]),
        "the truth": score([line.truth for line in lines]),
    }


def main(args: argparse.Namespace) -> None:
    pipe, classifier = load_pipeline(args.model, args.adapter), load_classifier(args.classifier)
    height = args.height or picture_height(pipe)
    lines = draw_lines(args.lines, args.seed, height)
    args.output_dir.mkdir(parents=True, exist_ok=True)

    def score(results: Sequence[Image.Image]) -> list[Parts]:
        return measure(results, lines, classifier)

    @functools.cache
    def masked(masks: str) -> list[Line]:
        return lines if masks == "true" else with_masks(pipe, lines, masks)

    @functools.cache
    def adapter_row(steps: int, masks: str, scale: float | None) -> list[Parts]:
        return score(try_on(pipe, masked(masks), steps, args.seed, scale, height=height))

    width, steps = lines[0].person.width, args.num_inference_steps
    parts = [
        f"{args.lines} held-out unpaired lines of seed {args.seed} at {height}x{width}, {steps} DDPM steps, in the mask\n"
    ]
    by_steps = {n: figures(adapter_row(n, args.masks[0], args.guidance_scale[0])) for n in args.steps}
    rows = compare(pipe, lines, args, score, adapter_row)
    parts.append(
        markdown_table(["", *TITLES.values()], [[name, *cells(figures(found))] for name, found in rows.items()])
    )
    parts.append("Where in the mask: PSNR; share of its pixels, of its squared error\n")
    parts.append(markdown_table(["", *PLACES], [[name, *error_cells(found)] for name, found in rows.items()]))
    if by_steps:
        parts.append(
            markdown_table(["steps", *TITLES.values()], [[str(n), *cells(found)] for n, found in by_steps.items()])
        )
        plot_steps(by_steps, args.output_dir / "steps.png")
    for name in args.by:
        broken_down = [
            [level, str(len(numbers)), method, *cells(figures([found[i] for i in numbers]))]
            for level, numbers in groups(lines, name).items()
            for method, found in rows.items()
        ]
        parts.append(markdown_table([name, "lines", "", *TITLES.values()], broken_down))
    if args.by:
        shown = {method: found for method, found in rows.items() if method != "the truth"}
        plot_groups(shown, lines, args.by, args.output_dir / "by.png")
    report = "\n".join(parts)
    (args.output_dir / "report.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main(parse_args())
