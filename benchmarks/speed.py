"""What a try-on costs, with random weights of SD1.5's size, on any device; one question a run, one question a table.

    python -m benchmarks.speed steps      seconds of a denoising step against the bare UNet's, rows interleaved in one process
    python -m benchmarks.speed ways       the same step computed otherwise: seconds against it as it is, and how far the noise is off
    python -m benchmarks.speed flops      the same by counted floating-point operations, on the meta device: no machine's load shows
    python -m benchmarks.speed stages     where the time of a whole picture goes
    python -m benchmarks.speed memory     the peak of a picture by dtype, slicing, tiling, 8-bit weights and offloading
    python -m benchmarks.speed adapter    the size of an adapter's file, and seconds to load it
    python -m benchmarks.speed compile    torch.compile: seconds of a step, graphs, and recompilations

Reading the cloth is spread over the steps of a picture (`--num_inference_steps`). Times want a machine that does nothing else.
"""

import argparse
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.costs import PeakMemory
from benchmarks.sd15 import random_parser, random_pipe
from evaluate_vton import Interval, bootstrap
from pipeline_vton import (
    ClothCacheAttnProcessor,
    StableDiffusionVTONPipeline,
    TryOnLatents,
    markdown_table,
    vton_attention,
)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GUIDANCE, TOKENS = 2.5, 77


@dataclass(frozen=True)
class Row:
    """What one call of the UNet does: `cloth` is "none", "reference" (cached keys), "joint" (a canvas) or "reading"."""

    name: str
    cloth: str
    guided: bool = True
    text: bool = False


BARE, BARE_UNGUIDED, REFERENCE, READING = (
    Row("bare UNet", "none"),
    Row("bare UNet, guidance 1", "none", guided=False),
    Row("reference", "reference"),
    Row("reading the cloth", "reading", False),
)
ROWS = (
    BARE,
    Row("bare UNet, with text", "none", text=True),
    REFERENCE,
    Row("joint canvas", "joint"),
    BARE_UNGUIDED,
    Row("reference, guidance 1", "reference", guided=False),
    READING,
)


# ------------------------------------------------------------------------------------------------------------ one step


class LaidAnewAttnProcessor(ClothCacheAttnProcessor):
    """Cloth and person side by side in new memory in every call, as a concatenation has them."""

    def __call__(self, *args, **kwargs) -> torch.Tensor:
        if self.beside is not None:
            self.beside = tuple(both.clone() for both in self.beside)
        return super().__call__(*args, **kwargs)


@contextmanager
def step_of(
    row: Row,
    pipe: StableDiffusionVTONPipeline,
    height: int,
    width: int,
    batch: int,
    caching: type[ClothCacheAttnProcessor] = ClothCacheAttnProcessor,
) -> Iterator[Callable[[], torch.Tensor]]:
    """What computes a row's noise for `batch` persons, each with a cloth, as often as it is called."""
    unet, joint = pipe.unet, row.cloth == "joint"
    pipe.register_to_config(cloth_conditioning="joint" if joint else "reference")
    pipe._guidance_scale, pipe._guidance_rescale, pipe._cross_attention_kwargs = GUIDANCE, 0.0, None
    place = {"device": unet.device, "dtype": unet.dtype}
    latents = torch.randn(batch, 4, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor, **place)
    conditioning = TryOnLatents(latents, latents[:, :1], latents, latents, channels=9)
    noisy = conditioning.canvas(latents, latents) if joint else latents
    embeds = torch.zeros(batch, TOKENS, unet.config.cross_attention_dim, **place) if row.text else None
    t = torch.tensor(500, device=unet.device)

    def bare() -> torch.Tensor:
        rows, texts = conditioning.person_rows(noisy), embeds
        if row.guided:
            rows, texts = torch.cat([rows, rows]), None if embeds is None else torch.cat([embeds, embeds])
        return unet(rows, t, texts, return_dict=False)[0]

    processor = caching if row.cloth in {"reference", "reading"} else None
    with torch.no_grad(), vton_attention(unet, processor, "prompt" if row.text else "skip") as processors:
        if row.cloth == "reference":
            pipe.read_cloth(conditioning, embeds, processors)
        yield {
            "none": bare,
            "reading": lambda: unet(conditioning.cloth_rows(), t * 0, embeds, return_dict=False)[0],
        }.get(row.cloth, lambda: pipe.predict_noise(noisy, t, conditioning, embeds, embeds, row.guided))


def seconds_of(step: Callable[[], torch.Tensor], device: torch.device) -> float:
    wait = (lambda: None) if device.type == "cpu" else partial(torch.accelerator.synchronize, device)
    wait()
    started = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - started


def time_steps(
    pipe: StableDiffusionVTONPipeline, size: tuple[int, int], batch: int, rounds: int, rows: Iterable[Row] = ROWS
) -> dict[Row, list[float]]:
    """Seconds of every row, one of each a round, after a round to warm up."""
    seconds = {row: [] for row in rows}
    for number in range(1 + rounds):
        for row, taken in seconds.items():
            with step_of(row, pipe, *size, batch) as step:
                one = seconds_of(step, pipe.unet.device)
            if number:
                taken.append(one)
    return seconds


WAYS = {
    "as it is": (ClothCacheAttnProcessor, torch.contiguous_format),
    "the cloth's keys laid anew beside the person's in every step": (LaidAnewAttnProcessor, torch.contiguous_format),
    "weights in channels_last": (ClothCacheAttnProcessor, torch.channels_last),
}


def time_ways(
    pipe: StableDiffusionVTONPipeline, size: tuple[int, int], batch: int, rounds: int
) -> dict[str, tuple[list[float], float]]:
    """Of every one of `WAYS` the seconds of a reference step, one of each a round, and how far its noise is off, relatively."""
    seconds, noise = {way: [] for way in WAYS}, {}
    for number in range(1 + rounds):
        for way, (caching, memory) in WAYS.items():
            pipe.unet.to(memory_format=memory)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                with step_of(REFERENCE, pipe, *size, batch, caching) as step:
                    if number:
                        seconds[way].append(seconds_of(step, pipe.unet.device))
                    else:
                        noise[way] = step().float()
    pipe.unet.to(memory_format=torch.contiguous_format)
    usual = noise["as it is"]
    return {way: (seconds[way], ((noise[way] - usual).norm() / usual.norm()).item()) for way in WAYS}


def count_flops(pipe: StableDiffusionVTONPipeline, row: Row, size: tuple[int, int], batch: int = 1) -> int:
    """Floating-point operations of products, convolutions and attention, twice the multiplications."""
    with step_of(row, pipe, *size, batch) as step, FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def bare_of(row: Row) -> Row:
    return BARE if row.guided else BARE_UNGUIDED


def with_reading(row: Row, costs: dict[Row, float], steps: int) -> float:
    """What a step costs; one that looks at the cloth carries its share of reading it."""
    return costs[row] + costs[READING] / steps * (row.cloth == "reference")


def ratios(costs: dict[Row, float], steps: int) -> dict[Row, float]:
    """To the bare UNet of as many rows."""
    return {row: with_reading(row, costs, steps) / costs[bare_of(row)] for row in costs}


def ratio_of_rounds(row: Row, seconds: dict[Row, list[float]], steps: int) -> Interval:
    """The same of all rounds together, with the bootstrap's 95 % over them: machines that are shared are quicker and slower by turns."""
    rounds = [dict(zip(seconds, taken)) for taken in zip(*seconds.values())]
    return bootstrap([with_reading(row, costs, steps) for costs in rounds], [costs[bare_of(row)] for costs in rounds])


# ----------------------------------------------------------------------------------------------------- whole pictures

REST = "check, composite"
STAGES = {
    "parse": "draw_masks",
    "encode": "encode_pictures",
    "read the cloth": "read_cloth",
    "denoise": "predict_noise",
    "schedule": "scheduler.step",
    "decode": "decode_latents",
}


def drawn_pictures(height: int, width: int) -> tuple[Image.Image, Image.Image, Image.Image]:
    """A person and a cloth of noise, and a mask."""
    noise = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 255
    return Image.fromarray(noise[0]), Image.fromarray(noise[1]), Image.fromarray(mask)


def try_on(pipe: StableDiffusionVTONPipeline, size: tuple[int, int], batch: int, steps: int, **options) -> list:
    """Without a mask where the pipeline has a human parser."""
    person, cloth, mask = drawn_pictures(*size)
    masks = [mask] * batch if pipe.human_parser is None else None
    options = {"guidance_scale": GUIDANCE, "num_inference_steps": steps} | options
    return pipe([person] * batch, [cloth] * batch, masks, height=size[0], width=size[1], **options).images


@contextmanager
def stopwatch(pipe: StableDiffusionVTONPipeline) -> Iterator[dict[str, float]]:
    """Seconds spent in every stage while the context lasts."""
    spent, device = dict.fromkeys(STAGES, 0.0), pipe.unet.device

    def timed(stage: str, method: Callable) -> Callable:
        def run(*args, **kwargs):
            result = []
            spent[stage] += seconds_of(lambda: result.append(method(*args, **kwargs)), device)
            return result[0]

        return run

    with ExitStack() as installed:
        for stage, place in STAGES.items():
            *owner, name = place.split(".")
            owner = getattr(pipe, owner[0]) if owner else pipe
            setattr(owner, name, timed(stage, getattr(owner, name)))
            installed.callback(delattr, owner, name)
        yield spent


def time_stages(
    pipe: StableDiffusionVTONPipeline, size: tuple[int, int], batch: int, steps: int, tiny: bool
) -> dict[str, float]:
    """Seconds by stage of one call without a mask, after a short one to warm up; what is in no other stage is mostly
    checking what comes in and laying the result into the photograph.
    """
    parser, processor = random_parser(pipe.unet.device, pipe.unet.dtype, tiny)
    pipe.register_modules(human_parser=parser, human_parser_processor=processor)
    try_on(pipe, size, batch, 1)
    with stopwatch(pipe) as spent:
        whole = seconds_of(lambda: try_on(pipe, size, batch, steps), pipe.unet.device)
    return spent | {REST: whole - sum(spent.values())}


# ------------------------------------------------------------------------------------------------------------- memory


def in_int8(pipe: StableDiffusionVTONPipeline) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # optional: pip install torchao

    quantize_(pipe.unet, Int8WeightOnlyConfig())


def in_fp8(pipe: StableDiffusionVTONPipeline) -> None:
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=pipe.unet.dtype)


def offloaded(pipe: StableDiffusionVTONPipeline) -> None:
    device = pipe.unet.device
    pipe.unet.enable_group_offload(device, torch.device("cpu"), offload_type="leaf_level")


VARIANTS: dict[str, Callable | None] = {
    "as it is": None,
    "VAE slicing": lambda pipe: pipe.vae.enable_slicing(),
    "VAE tiling": lambda pipe: pipe.vae.enable_tiling(),
    "weights in fp8": in_fp8,
    "weights in int8": in_int8,
    "weights offloaded": offloaded,
}


def peak_of(
    variant: str, dtype: str, size: tuple[int, int], batch: int, device: str, tiny: bool
) -> tuple[float, float]:
    """GiB at the peak of a try-on of two steps, of the GPU or of this process; and MiB of the cloths' keys and values."""
    pipe, kept = random_pipe(device, DTYPES[dtype], tiny), []
    if VARIANTS[variant] is not None:
        VARIANTS[variant](pipe)

    def look(pipe, step, t, tensors):
        processors = [p for p in pipe.unet.attn_processors.values() if isinstance(p, ClothCacheAttnProcessor)]
        kept.append(sum(x.numel() * x.element_size() for processor in processors for x in processor.cloth))
        return {}

    if device.startswith("cuda"):  # all of the weights were there while they were made smaller, or moved away
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with PeakMemory() as peak:
        try_on(pipe, size, batch, 2, callback_on_step_end=look)
    gib = torch.cuda.max_memory_allocated(device) / 2**30 if device.startswith("cuda") else peak.gib
    return gib, kept[-1] / 2**20


def memory_tables(args: argparse.Namespace) -> Iterator[tuple[str, list[list[str]]]]:
    """A heading and the cells of every size; every figure comes from a process of its own."""
    variants = [v for v in args.variants if VARIANTS[v] is not in_int8 or find_spec("torchao")]
    for left_out in set(args.variants) - set(variants):
        print(f"{left_out}: left out, pip install torchao")
    for size in args.sizes:
        for batch in args.batches:
            cells = []
            for dtype in args.dtypes:
                for variant in variants:
                    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
                        found = alone.submit(peak_of, variant, dtype, size, batch, args.device, args.tiny).result()
                    cells.append([f"{dtype}, {variant}", f"{found[0]:.2f}", f"{found[1]:.0f}"])
            yield f"{size[0]}x{size[1]}, batch {batch}, {machine(torch.device(args.device))}", cells


# ------------------------------------------------------------------------------------------------------------ adapter


def adapter_cost(pipe: StableDiffusionVTONPipeline, file_dtype: str, rounds: int) -> tuple[float, float]:
    """MB of an adapter's file, and the median of the seconds that loading it takes."""
    with TemporaryDirectory() as folder:
        pipe.save_vton_adapter(folder, DTYPES[file_dtype])
        seconds = []
        for _ in range(rounds):
            seconds.append(seconds_of(lambda: pipe.load_vton_adapter(folder), pipe.unet.device))
            pipe.unload_vton_adapter()
        return sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6, statistics.median(seconds)


# ------------------------------------------------------------------------------------------------------------ compile


GRAPHS = 32  # of one block: for every width, size, and kind of call; torch's own limit is 8
COMPILED = {"repeated blocks": "compile_repeated_blocks", "whole UNet": "compile"}  # methods of a diffusers model


def compile_cost(
    pipe: StableDiffusionVTONPipeline,
    size: tuple[int, int],
    batch: int,
    rounds: int,
    backend: str = "inductor",
    how: str = "repeated blocks",
) -> dict[str, float]:
    """Seconds of a reference step, eager and compiled, and what the compiler had to do for two calls, each with steps without guidance."""
    found = {}
    with step_of(REFERENCE, pipe, *size, batch) as step:
        step()
        found["eager, s"] = statistics.median(seconds_of(step, pipe.unet.device) for _ in range(rounds))
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=GRAPHS):
        getattr(pipe.unet, COMPILED[how])(fullgraph=True, backend=backend)
        with step_of(REFERENCE, pipe, *size, batch) as step:
            found["first step, s"] = seconds_of(step, pipe.unet.device)
            found["compiled, s"] = statistics.median(seconds_of(step, pipe.unet.device) for _ in range(rounds))
        for _ in range(2):  # with guided and unguided steps
            try_on(pipe, size, batch, 4, guidance_interval=(0.0, 0.75))
            found.setdefault("graphs", counters["stats"]["unique_graphs"])
    found["graphs of later calls"] = counters["stats"]["unique_graphs"] - found["graphs"]
    found["graph breaks"] = sum(counters["graph_break"].values())
    return found


# --------------------------------------------------------------------------------------------------------------- main


def cpu_name() -> str:
    """As Linux tells it; elsewhere the architecture alone."""
    about = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    names = [line.partition(":")[2].strip() for line in about.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{cpu_name()}, {torch.get_num_threads()} threads"
    return device.type


def size_of(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH in pixels, got {text}")
    return int(height), int(width)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("question", choices=("steps", "ways", "flops", "stages", "memory", "adapter", "compile"))
    sizes = [(256, 192), (512, 384), (1024, 768)]
    add("--sizes", type=size_of, nargs="+", default=sizes, help="HEIGHTxWIDTH (default 256x192 512x384 1024x768)")
    add("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"], help="default fp32 bf16")
    add("--batches", type=int, nargs="+", default=[1], help="persons a step (default 1)")
    add("--rounds", type=int, default=5, help="timed ones (default 5): medians of seconds, and ratios of them all")
    add("--num_inference_steps", type=int, default=50, help="of a picture (default 50)")
    names = [row.name for row in ROWS]
    add("--rows", nargs="+", choices=names, default=names, metavar="ROW", help="of steps, beside the bare UNet's (default all)")  # fmt: skip
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT", help="of memory (default all)")  # fmt: skip
    add("--device", default="cpu", help="default cpu")
    add("--channels_last", action="store_true", help="the UNet's weights in that memory format")
    add("--tiny", action="store_true", help="a few thousand weights instead of SD1.5's, to try the script")
    return parser.parse_args(input_args)


def answer(
    question: str, pipe: StableDiffusionVTONPipeline, size: tuple[int, int], batch: int, args: argparse.Namespace
) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of one table."""
    steps = args.num_inference_steps
    if question == "steps":
        rows = [row for row in ROWS if row.name in args.rows or row in {BARE, BARE_UNGUIDED, READING}]
        cells = []
        for row, taken in (seconds := time_steps(pipe, size, batch, args.rounds, rows)).items():
            ratio = ratio_of_rounds(row, seconds, steps)
            times = [f"{of(taken):.3f}" for of in (statistics.median, min, max)]
            cells.append([row.name, *times, f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"])
        return ["", "median, s", "fastest", "slowest", f"of the bare UNet, {steps} steps"], cells
    if question == "ways":
        found = time_ways(pipe, size, batch, args.rounds)
        usual = statistics.median(found["as it is"][0])
        cells = [[way, f"{(s := statistics.median(taken)):.3f}", f"{s / usual:.3f}", f"{off:.1e}"] for way, (taken, off) in found.items()]  # fmt: skip
        return ["", "median, s", "of it as it is", "noise is off by"], cells
    if question == "flops":
        counted = {row: count_flops(pipe, row, size, batch) for row in ROWS}
        times = ratios(counted, steps)
        return ["", "GFLOP a step", f"of the bare UNet, {steps} steps"], [
            [row.name, f"{flops / 1e9:.5g}", f"{times[row]:.3f}"] for row, flops in counted.items()
        ]
    if question == "stages":
        spent = time_stages(pipe, size, batch, steps, args.tiny)
        whole = sum(spent.values())
        return ["stage", "s", "share"], [[name, f"{s:.2f}", f"{s / whole:.1%}"] for name, s in spent.items()]
    found = {}
    for how in COMPILED:  # each on a copy: what is compiled stays so
        own = random_pipe(pipe.unet.device, pipe.unet.dtype, args.tiny)
        own.unet.to(memory_format=torch.channels_last if args.channels_last else torch.preserve_format)
        found[how] = compile_cost(own, size, batch, args.rounds, how=how)
    names = next(iter(found.values()))
    return ["", *COMPILED], [
        [name, *(f"{one[name]:.3f}" if " s" in name else str(one[name]) for one in found.values())] for name in names
    ]


def main(args: argparse.Namespace) -> None:
    if args.question == "memory":
        for heading, cells in memory_tables(args):
            print(f"\n{heading}\n")
            print(markdown_table(["", "peak, GiB", "the cloths' keys and values, MiB"], cells), flush=True)
        return
    if args.question == "adapter":
        pipe = random_pipe(args.device, DTYPES[args.dtypes[0]], args.tiny)
        costs = [adapter_cost(pipe, name, args.rounds) for name in ("fp32", "fp16")]
        cells = [[name, f"{mb:.3g}", f"{s:.2f}"] for name, (mb, s) in zip(("fp32", "fp16"), costs)]
        return print(markdown_table(["file", "MB", f"seconds to load into a UNet in {args.dtypes[0]}"], cells))
    device = "meta" if args.question == "flops" else args.device
    for dtype in args.dtypes[:1] if args.question == "flops" else args.dtypes:
        pipe = random_pipe(device, DTYPES[dtype], args.tiny)
        if args.channels_last:
            pipe.unet.to(memory_format=torch.channels_last)
        for size in args.sizes:
            for batch in args.batches:
                titles, cells = answer(args.question, pipe, size, batch, args)
                print(f"\n{size[0]}x{size[1]}, batch {batch}, {dtype}, {machine(torch.device(device))}\n")
                print(markdown_table(titles, cells), flush=True)


if __name__ == "__main__":
    main(parse_args())
