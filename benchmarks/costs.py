"""What a training step costs at SD1.5's size, or SDXL's: seconds and peak memory, with random weights, on the CPU.

Every row runs the trainer's own update in a process of its own: one update to warm up, then the timed ones. Training the whole
UNet needs about 20 GB of memory, the base 2 GB of disk while the script runs. SDXL's has three times the weights: take `--rows` of
LoRA alone. `--loader` measures what reading a pair costs instead: CPU time, which another program's load does not change much.
"""

import argparse
import os
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import psutil
import torch
from PIL import Image

from benchmarks.backbones import SDXL
from benchmarks.sd15 import UNET, random_pipe
from demo.make_dataset import make_dataset
from pipeline_vton import vton_attention
from train_vton import PairDataset, Preparation, Trainer, TreePairs
from train_vton import parse_args as training_args


BACKBONES = {"sd15": UNET, "sdxl": SDXL}
ROWS = {
    "reference": "",
    "reference, cached latents": "--cache_latents",
    "reference, gradient checkpointing": "--gradient_checkpointing",
    "reference, both": "--cache_latents --gradient_checkpointing",
    "reference, two cloths": "--num_cloths 2",
    "reference, bf16": "--mixed_precision bf16",
    "reference, channels_last": "",
    "reference, bf16, channels_last": "--mixed_precision bf16",
    "reference, bf16, gradient checkpointing": "--mixed_precision bf16 --gradient_checkpointing",
    "reference, gradient checkpointing, LoRA rank 16": "--gradient_checkpointing --lora_rank 16",
    "reference, bf16, gradient checkpointing, LoRA rank 16": "--mixed_precision bf16 --gradient_checkpointing --lora_rank 16",
    "reference, perceptual loss": "--perceptual_loss latent --perceptual_max_timestep 999",
    "reference, perceptual loss, both": "--perceptual_loss latent --perceptual_max_timestep 999 --cache_latents --gradient_checkpointing",
    "reference, adversarial loss": "--adversarial_weight 0.01 --adversarial_start_step 0",
    "joint": "--cloth_conditioning joint",
    "joint, both": "--cloth_conditioning joint --cache_latents --gradient_checkpointing",
    "the whole UNet, reference": "--trainable all",
    "the whole UNet, both": "--trainable all --cache_latents --gradient_checkpointing",
}


def write_base(folder: Path, unet: dict = UNET, tiny: bool = False) -> None:
    """An inpainting base's UNet and SD1.5's VAE with random weights, as a diffusers folder."""
    pipe = random_pipe(dtype=torch.float16, unet=unet, tiny=tiny)
    for name in ("unet", "vae", "scheduler"):
        getattr(pipe, name).save_pretrained(folder / name)


class PeakMemory:
    """The most memory that this process had resident, in GiB, looked at every 20 ms while the context lasts."""

    def __enter__(self) -> "PeakMemory":
        self.gib, self.done = 0.0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while True:
            self.gib = max(self.gib, psutil.Process().memory_info().rss / 2**30)
            if self.done.wait(0.02):
                return

    def __exit__(self, *_) -> None:
        self.done.set()
        self.thread.join()


def measure(line: list[str], updates: int, channels_last: bool = False) -> tuple[float, float]:
    """Seconds of the fastest update, and GiB at the peak; `channels_last` is the UNet's memory format, which no flag sets."""
    trainer = Trainer(training_args(line))
    if channels_last:
        trainer.unet.to(memory_format=torch.channels_last)
    batches, seconds = trainer.batches(), []
    with PeakMemory() as peak, vton_attention(trainer.unet, trainer.self_attention, trainer.args.cross_attention):
        for _ in range(1 + updates):
            started = time.time()
            trainer.update(next(batches))
            seconds.append(time.time() - started)
    return min(seconds[1:] or seconds), peak.gib


def measure_loader(height: int, width: int, pairs: int, rounds: int = 5) -> float:
    """CPU milliseconds that a training pair of drawn PNG files costs its reading process; the fastest round counts."""
    with tempfile.TemporaryDirectory() as folder:
        make_dataset(Path(folder), train=pairs, test=0, seed=0, height=height)
        dataset = PairDataset(TreePairs(Path(folder), "train", True), Preparation(height, width))
        spent = []
        for _ in range(rounds):
            started = time.process_time()
            for i in range(pairs):
                dataset[i]
            spent.append(time.process_time() - started)
    return 1000 * min(spent) / pairs


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=BACKBONES, default="sd15", help="default sd15")
    parser.add_argument("--height", type=int, default=256, help="default 256")
    parser.add_argument("--width", type=int, default=192, help="default 192")
    parser.add_argument("--train_batch_size", type=int, default=1, help="default 1")
    parser.add_argument(
        "--updates",
        type=int,
        default=3,
        help="timed after one to warm up; the fastest counts (default 3; 0 times the first)",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=ROWS,
        default=list(ROWS),
        metavar="ROW",
        help=f"default: all; {'; '.join(map(repr, ROWS))}",
    )
    parser.add_argument("--tiny", action="store_true", help="a few thousand weights instead, to try the script")
    parser.add_argument("--loader", action="store_true", help="CPU milliseconds that reading a pair costs, instead")
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    if args.loader:
        torch.set_num_threads(1)  # as in a reading process
        spent = measure_loader(args.height, args.width, pairs=4)
        return print(f"{spent:.1f} ms of CPU a {args.height}x{args.width} pair (height x width)")
    os.environ["ACCELERATE_USE_CPU"] = "true"  # whose memory is the process's
    size = ["--height", args.height, "--width", args.width, "--train_batch_size", args.train_batch_size]
    print("| what is trained | seconds an update | peak memory |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder) / "base", BACKBONES[args.backbone], args.tiny)
        pairs = args.train_batch_size * (1 + args.updates)
        make_dataset(Path(folder) / "data", train=pairs, test=0, seed=0, category="outfit")
        for file in Path(folder, "data").rglob("*.png"):  # to whatever aspect is asked for
            Image.open(file).resize((args.width, args.height), Image.Resampling.NEAREST).save(file)
        where = ["--pretrained_model_name_or_path", f"{folder}/base", "--dataset_root", f"{folder}/data"]
        where += ["--output_dir", f"{folder}/out", "--dataloader_num_workers", "0", "--report_to", "none"]
        for name in args.rows:
            line = [str(word) for word in (*where, *size, *ROWS[name].split())]
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
                seconds, gib = alone.submit(measure, line, args.updates, "channels_last" in name).result()
            print(f"| {name} | {seconds:.1f} s | {gib:.1f} GiB |", flush=True)


if __name__ == "__main__":
    main(parse_args())
