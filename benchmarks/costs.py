"""What a training step costs at SD1.5's size: seconds and peak memory, with random weights, on the CPU in float32.

Every row runs the trainer's own update in a process of its own: one update to warm up, then the timed ones. Training the whole
UNet needs about 20 GB of memory, the base 2 GB of disk while the script runs.
"""

import argparse
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import psutil
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

from benchmarks import sd15
from demo.make_dataset import make_dataset
from pipeline_vton import ClothBesideAttnProcessor, vton_attention
from train_vton import Trainer
from train_vton import parse_args as training_args


ROWS = {
    "reference": "",
    "reference, cached latents": "--cache_latents",
    "reference, gradient checkpointing": "--gradient_checkpointing",
    "reference, both": "--cache_latents --gradient_checkpointing",
    "reference, perceptual loss": "--perceptual_loss latent --perceptual_max_timestep 999",
    "reference, perceptual loss, both": "--perceptual_loss latent --perceptual_max_timestep 999 --cache_latents --gradient_checkpointing",
    "reference, adversarial loss": "--adversarial_weight 0.01 --adversarial_start_step 0",
    "joint": "--cloth_conditioning joint",
    "joint, both": "--cloth_conditioning joint --cache_latents --gradient_checkpointing",
    "the whole UNet, reference": "--trainable all",
    "the whole UNet, both": "--trainable all --cache_latents --gradient_checkpointing",
}


def write_base(folder: Path) -> None:
    """SD1.5-inpainting's UNet and VAE with random weights, as a diffusers folder."""
    torch.manual_seed(0)
    UNet2DConditionModel(**sd15.UNET | {"in_channels": 9}).half().save_pretrained(folder / "unet")
    AutoencoderKL(**sd15.VAE).half().save_pretrained(folder / "vae")
    DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        folder / "scheduler"
    )


class PeakMemory:
    """The most memory that this process had resident, in GiB, looked at every 20 ms while the context lasts."""

    def __enter__(self) -> "PeakMemory":
        self.gib, self.done = 0.0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(0.02):
            self.gib = max(self.gib, psutil.Process().memory_info().rss / 2**30)

    def __exit__(self, *_) -> None:
        self.done.set()
        self.thread.join()


def measure(line: list[str], updates: int) -> tuple[float, float]:
    """Seconds of the fastest update, and GiB at the peak."""
    trainer = Trainer(training_args(line))
    processor = ClothBesideAttnProcessor if trainer.args.cloth_conditioning == "reference" else None
    batches, seconds = trainer.batches(), []
    with PeakMemory() as peak, vton_attention(trainer.unet, processor, trainer.args.cross_attention):
        for _ in range(1 + updates):
            started = time.time()
            trainer.update(next(batches))
            seconds.append(time.time() - started)
    return min(seconds[1:]), peak.gib


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=256, help="default 256")
    parser.add_argument("--width", type=int, default=192, help="default 192")
    parser.add_argument("--train_batch_size", type=int, default=1, help="default 1")
    parser.add_argument("--updates", type=int, default=3, help="timed updates; the fastest counts (default 3)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="default: all")
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    size = ["--height", args.height, "--width", args.width, "--train_batch_size", args.train_batch_size]
    print("| what is trained | seconds an update | peak memory |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder) / "base")
        make_dataset(Path(folder) / "data", train=args.train_batch_size * (1 + args.updates), test=0, seed=0)
        where = ["--pretrained_model_name_or_path", f"{folder}/base", "--dataset_root", f"{folder}/data"]
        where += ["--output_dir", f"{folder}/out", "--dataloader_num_workers", "0", "--report_to", "none"]
        for name in args.rows:
            line = [str(word) for word in (*where, *size, *ROWS[name].split())]
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
                seconds, gib = alone.submit(measure, line, args.updates).result()
            print(f"| {name} | {seconds:.1f} s | {gib:.1f} GiB |", flush=True)


if __name__ == "__main__":
    main(parse_args())
