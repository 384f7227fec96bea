"""Whether all of this works on a GPU: one command, under an hour, whose report.json anyone can send back.

    python -m benchmarks.accept_gpu --output_dir runs/accept-gpu [--real]

At SD1.5's size with random weights: half precision against fp32, batches against singles, VAE slicing and tiling, torch.compile,
offloading, what a step costs, peak memory, and twenty training updates, on two GPUs where there are two. `--real` adds a try-on
with Stable Diffusion 1.5 inpainting and CatVTON's adapter (about 3 GB to download; the adapter is not for commercial use).
Every check says its figure and its bound; one that raises fails with what it said, and the others go on. Pictures lie beside.
"""

import argparse
import copy
import json
import math
import os
import platform
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler
from diffusers.utils import load_image
from PIL import Image
from safetensors.torch import load_file

from benchmarks import speed
from benchmarks.costs import write_base
from benchmarks.launch import ROOT, launch
from benchmarks.sd15 import random_pipe
from demo.make_dataset import make_dataset
from pipeline_vton import ADAPTER_NAME, StableDiffusionVTONPipeline, load_pipeline


LIBRARIES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "Pillow",
)
BASE = "stable-diffusion-v1-5/stable-diffusion-inpainting"
ADAPTER, ADAPTER_FOLDER = "zhengchong/CatVTON", "mix-48k-1024/attention"
PARSER = "mattmdjaga/segformer_b2_clothes"
EXAMPLES = "https://raw.githubusercontent.com/Zheng-Chong/CatVTON/1f486df5bb0d2df34bd8a5ae9d7351a6cd5460d0/resource/demo/example"
PERSON, CLOTH = f"{EXAMPLES}/person/women/Yaqi_0.png", f"{EXAMPLES}/condition/upper/21514384_52353349_1000.jpg"
REAL_STEPS = 20
HALF = {"bf16": 0.1, "fp16": 0.03}  # how far, relatively, the latents of a few steps may be off those of fp32


class Report:
    """The checks and their figures, in a file after each, so that a run that is cut off still says what it found."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.content = folder, {"environment": environment(device), "checks": []}

    def check(
        self, name: str, measure: Callable[[], float], at_most: float = math.inf, at_least: float = -math.inf
    ) -> None:
        """Note a figure and whether it lies within its bounds; whatever is raised is noted as a failure."""
        row, started = {"name": name, "at_most": at_most, "at_least": at_least}, time.time()
        try:
            row["value"] = float(measure())
            if not math.isfinite(row["value"]):
                raise ValueError(f"the figure is {row.pop('value')}")
            row["passed"] = at_least <= row["value"] <= at_most
        except Exception as error:  # of any library, and the report is what it is for
            row |= {"passed": False, "error": f"{type(error).__name__}: {error}"[:1000]}
        row |= {"seconds": round(time.time() - started, 1)}
        self.note({key: value for key, value in row.items() if value not in {math.inf, -math.inf}})

    def skip(self, name: str, reason: str) -> None:
        self.note({"name": name, "skipped": reason})

    def note(self, row: dict) -> None:
        self.content["checks"].append(row)
        said = row.get("skipped") or row.get("error") or f"{row['value']:.4g}"
        mark = "skip" if "skipped" in row else "pass" if row["passed"] else "FAIL"
        print(f"{mark}  {row['name']}: {said}", flush=True)
        file = self.folder / "report.json"
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.content, indent=1), encoding="utf-8")
        os.replace(unfinished, file)

    @property
    def failed(self) -> list[str]:
        return [row["name"] for row in self.content["checks"] if row.get("passed") is False]


def environment(device: torch.device) -> dict[str, str | int | float]:
    found = {name: version(name) for name in LIBRARIES}
    found |= {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": speed.machine(device),
    }
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {"gpus": torch.cuda.device_count(), "gpu_gib": round(about.total_memory / 2**30, 1)}
        found |= {"cuda": torch.version.cuda, "capability": f"{about.major}.{about.minor}"}
    return found


def waits(pipe: StableDiffusionVTONPipeline, size: tuple[int, int], steps: int, **options) -> int:
    """How often a call makes the host wait for the GPU."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            speed.try_on(pipe, size, 1, steps, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(one.message) for one in said)


class Acceptance:
    """The checks, a method for each group of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.gpu = self.device.type == "cuda"
        self.report = Report(args.output_dir, self.device)
        self.size, self.large = ((64, 48), (128, 96)) if args.tiny else ((512, 384), (1024, 768))
        self.halves = list(HALF) if self.gpu else ["bf16"]
        self.dtype = speed.DTYPES[self.halves[-1]]
        self.random = random_pipe(tiny=args.tiny)

    def pipe(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> StableDiffusionVTONPipeline:
        """A copy of one with random weights, which take far longer to draw than to copy."""
        parts = {name: copy.deepcopy(part) for name, part in self.random.components.items()}
        pipe = StableDiffusionVTONPipeline(**parts).to(device or self.device, dtype or self.dtype)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def latents(
        self, pipe: StableDiffusionVTONPipeline, size: tuple[int, int] | None = None, batch: int = 1
    ) -> torch.Tensor:
        """Of four DDIM steps, from the same noise in any dtype and on any device; in float32 on the CPU."""
        height, width = (side // pipe.vae_scale_factor for side in size or self.size)
        noise = [torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(i)) for i in range(batch)]
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        options = {"latents": torch.cat(noise), "output_type": "latent"}
        return speed.try_on(pipe, size or self.size, batch, 4, **options).float().cpu()

    def picture(self, pipe: StableDiffusionVTONPipeline, name: str, size: tuple[int, int]) -> torch.Tensor:
        """(3, H, W) in [0, 1], the second of a batch of two, which VAE slicing takes apart; also a file of that name."""
        noise = [torch.Generator().manual_seed(i) for i in range(2)]
        _, image = speed.try_on(pipe, size, 2, 4, generator=noise, composite=False)
        image.save(self.args.output_dir / f"{name}.png")
        return torch.from_numpy(np.asarray(image, np.float32) / 255).movedim(-1, 0)

    # ---- the groups

    def precision(self) -> None:
        expected = self.latents(self.pipe(torch.float32))
        for name in self.halves:
            self.report.check(
                f"{name}: relative difference from fp32",
                lambda name=name: off(self.latents(self.pipe(speed.DTYPES[name])), expected),
                at_most=HALF[name],
            )
        pipe = self.pipe(torch.float32)
        self.report.check(
            "a batch against its singles", lambda: off(self.latents(pipe, batch=2)[:1], expected), at_most=1e-3
        )

    def vae(self) -> None:
        pipe = self.pipe()
        whole = self.picture(pipe, "whole", self.large)
        pipe.vae.enable_slicing()
        self.report.check("VAE slicing: mean difference", lambda: mean_off(self.picture(pipe, "sliced", self.large), whole), at_most=2e-3)  # fmt: skip
        pipe.vae.disable_slicing()
        pipe.vae.enable_tiling()
        self.report.check("VAE tiling: mean difference", lambda: mean_off(self.picture(pipe, "tiled", self.large), whole), at_most=0.1)  # fmt: skip

    def offload(self) -> None:
        if not self.gpu:
            return self.report.skip("offloading", "needs a GPU")
        expected = self.latents(self.pipe())
        for kind in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):

            def offloaded(kind: str = kind) -> float:
                pipe = self.pipe(device="cpu")
                getattr(pipe, kind)(device=self.device)
                return off(self.latents(pipe), expected)

            self.report.check(f"{kind}: relative difference", offloaded, at_most=0.02)

    def compile(self) -> None:
        pipe = self.pipe()
        expected = self.latents(pipe)
        found = {}

        def compiled() -> float:
            found.update(speed.compile_cost(pipe, self.size, 1, self.args.rounds))
            with torch._dynamo.config.patch(recompile_limit=speed.GRAPHS):
                return off(self.latents(pipe), expected)

        self.report.check("compiled: relative difference", compiled, at_most=0.05)
        self.report.check("compiled: graph breaks", lambda: found["graph breaks"], at_most=0)
        self.report.check("compiled: graphs of a second call", lambda: found["graphs of later calls"], at_most=0)
        self.report.check("compiled: seconds a step", lambda: found["compiled, s"], at_most=math.inf)
        self.report.check("eager: seconds a step", lambda: found["eager, s"], at_most=math.inf)

    def steps(self) -> None:
        pipe, bounds = self.pipe(), (1.12, 1.25)
        for size, bound in zip((self.size, self.large), bounds):
            for batch in (1, 4):
                where = f"{size[0]}x{size[1]}, batch {batch}"
                seconds = {r: statistics.median(s) for r, s in speed.time_steps(pipe, size, batch, self.args.rounds).items()}  # fmt: skip
                times = speed.ratios(seconds, steps=50)
                self.report.check(f"{where}: seconds a step", lambda s=seconds: s[speed.REFERENCE])
                limit = math.inf if self.args.tiny else bound  # launches, not arithmetic, are what tiny modules cost
                self.report.check(f"{where}: of the bare UNet", lambda t=times: t[speed.REFERENCE], at_most=limit)

        if not self.gpu:
            return self.report.skip("synchronisations a step", "needs a GPU")

        def waits_a_step(**options) -> float:
            return (waits(pipe, self.size, 8, **options) - waits(pipe, self.size, 4, **options)) / 4

        self.report.check("synchronisations a step", waits_a_step, at_most=0)
        on_host = {"generator": torch.Generator().manual_seed(0)}  # its noise is copied
        self.report.check("synchronisations a step, noise drawn on the CPU", lambda: waits_a_step(**on_host))
        pipe.fast()
        self.report.check("synchronisations a step, pipe.fast()", waits_a_step)

    def memory(self) -> None:
        if not self.gpu:
            return self.report.skip("peak memory", "needs a GPU")
        for size, bound in ((self.size, 4.0), (self.large, 8.0)):
            pipe = self.pipe()

            def peak(pipe: StableDiffusionVTONPipeline = pipe, size: tuple[int, int] = size) -> float:
                torch.cuda.reset_peak_memory_stats(self.device)
                speed.try_on(pipe, size, 1, 2)
                return torch.cuda.max_memory_allocated(self.device) / 2**30

            self.report.check(f"{size[0]}x{size[1]}: peak, GiB", peak, at_most=bound)

    def training(self) -> None:
        processes = [1, 2] if torch.cuda.device_count() > 1 and self.gpu else [1]
        with tempfile.TemporaryDirectory() as folder:
            write_base(Path(folder) / "base", tiny=self.args.tiny)
            make_dataset(Path(folder) / "data", train=4 * len(processes), test=0, seed=0, height=self.size[0])
            for precision in self.halves:
                for count in processes:
                    where = Path(folder) / f"{precision}-{count}"
                    self.report.check(
                        f"training, {precision}, {count} processes: last loss of the first",
                        lambda where=where, count=count, precision=precision: self.train(where, count, precision),
                        at_most=1.2,
                    )

    def train(self, out: Path, processes: int, precision: str) -> float:
        """Twenty updates; the mean of the last five losses over that of the first five."""
        line = launch("train_vton.py", processes, precision, self.gpu)
        line += ["--pretrained_model_name_or_path", out.parent / "base", "--dataset_root", out.parent / "data"]
        line += ["--output_dir", out, "--height", self.size[0], "--width", self.size[1], "--train_batch_size", 2]
        line += ["--max_train_steps", self.args.updates, "--guidance_scale", 2, "--report_to", "none"]
        line += ["--lr_warmup_steps", 1, "--num_validation_pairs", 0, "--gradient_checkpointing"]
        done = subprocess.run([str(word) for word in line], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-800:])
        if not all(torch.isfinite(weight).all() for weight in load_file(out / ADAPTER_NAME).values()):
            raise RuntimeError("the adapter is not finite")
        losses = json.loads((out / f"checkpoint-{self.args.updates}" / "progress.json").read_text(encoding="utf-8"))[
            "losses"
        ]
        part = max(1, len(losses) // 4)
        return sum(losses[-part:]) / sum(losses[:part])

    def real(self) -> None:
        """Public weights on public pictures: half precision against fp32, and the photograph untouched outside the mask."""
        if not self.args.real:
            return self.report.skip("real weights", "--real was not given")
        shown = {"person": load_image(PERSON), "cloth": load_image(CLOTH)}
        whole = self.try_on_real("fp32", shown)
        for name, image in (shown | {"tryon": whole}).items():
            image.save(self.args.output_dir / f"real-{name}.png")
        person, expected = (np.asarray(image.convert("RGB"), np.float32) / 255 for image in (shown["person"], whole))
        outside = np.asarray(shown["mask"]) < 128
        self.report.check("real weights: largest change outside the mask", lambda: np.abs(expected - person)[outside].max(), at_most=0)  # fmt: skip
        for name in self.halves:
            started = time.time()
            half = np.asarray(self.try_on_real(name, shown), np.float32) / 255
            spent = time.time() - started
            self.report.check(f"real weights, {name}: mean difference from fp32 in the mask", lambda half=half: np.abs(half - expected)[~outside].mean(), at_most=0.02)  # fmt: skip
            self.report.check(f"real weights, {name}: seconds, loading included", lambda spent=spent: spent)
            if self.gpu:
                self.report.check(f"real weights, {name}: peak, GiB", lambda: torch.cuda.max_memory_allocated(self.device) / 2**30, at_most=8)  # fmt: skip

    def try_on_real(self, dtype: str, shown: dict[str, Image.Image]) -> Image.Image:
        """The person in the cloth; the first adds the mask that its human parser draws."""
        if self.gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        dtype = speed.DTYPES[dtype]
        pipe = load_pipeline(BASE, ADAPTER, dtype=dtype, device=self.device, adapter_subfolder=ADAPTER_FOLDER)
        if "mask" not in shown:
            pipe.load_human_parser(PARSER)
            shown["mask"] = pipe.predict_mask(shown["person"])
        noise = torch.Generator().manual_seed(0)
        return pipe(
            *(shown[name] for name in ("person", "cloth", "mask")), num_inference_steps=REAL_STEPS, generator=noise
        ).images[0]


GROUPS = ("precision", "vae", "offload", "compile", "steps", "memory", "training", "real")


def off(result: torch.Tensor, expected: torch.Tensor) -> float:
    """The difference's norm over the expected one's."""
    return ((result - expected).norm() / expected.norm()).item()


def mean_off(result: torch.Tensor, expected: torch.Tensor) -> float:
    return (result - expected).abs().mean().item()


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("runs/accept-gpu"), help="default runs/accept-gpu")
    add("--device", default="cuda", help="default cuda")
    add("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), help="default: all")
    add("--rounds", type=int, default=10, help="timed steps, of which the median counts (default 10)")
    add("--updates", type=int, default=20, help="of training (default 20)")
    add("--real", action="store_true", help="download real weights and pictures too")
    add("--tiny", action="store_true", help="a few thousand weights, small pictures: to try the script")
    args = parser.parse_args(input_args)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(
            f"--device {args.device}: torch {torch.__version__} sees no GPU; --device cpu --tiny tries the script"
        )
    return args


def main(args: argparse.Namespace) -> None:
    acceptance = Acceptance(args)
    for group in args.groups:
        try:
            getattr(acceptance, group)()
        except Exception as error:  # of what a group needs before its first check
            acceptance.report.note(
                {"name": group, "passed": False, "error": f"{type(error).__name__}: {error}"[:1000]}
            )
    failed = acceptance.report.failed
    print(
        f"{len(failed)} failed{': ' + '; '.join(failed) if failed else ''}; all in {args.output_dir / 'report.json'}"
    )
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main(parse_args())
