"""Compare ways of showing the cloth and of learning, on the demo's base: one budget, one seed, held-out unpaired lines.

Every row is one run of `accelerate launch train_vton.py`, and the PSNR inside the mask as `demo.measure` measures it. A row
that `--output_dir` holds of the same arguments is not trained again (of another base: take another folder). A second seed of
reference and joint tells what of a difference is luck.
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline, UNet2DConditionModel

from demo.make_dataset import make_dataset
from demo.measure import HeldOut, as_array, without_cloth
from demo.try_on import try_on
from pipeline_vton import LORA_NAME, StableDiffusionVTONPipeline


ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Method:
    name: str
    flags: str = ""
    channels: int = 9
    seed: int = 0

    @property
    def folder(self) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in self.name)


NO_CLOTH = Method("no cloth, with the prompt", "--cloth_dropout 1 --cross_attention prompt")
METHODS = [
    NO_CLOTH,
    Method("joint canvas", "--cloth_conditioning joint"),
    Method("reference"),
    Method("reference, with the prompt", "--cross_attention prompt"),
    Method("reference, LoRA rank 4", "--lora_rank 4"),
    Method("reference, LoRA rank 16", "--lora_rank 16"),
    Method("reference, conv_in widened from 4 channels", channels=4),
    Method("reference, DREAM", "--dream_detail_preservation 10"),
    Method("joint canvas, another seed", "--cloth_conditioning joint", seed=1),
    Method("reference, another seed", seed=1),
]


def write_four_channel_base(base: Path, folder: Path) -> None:
    """The base as a text-to-image model: its mask is always full, and that is folded into the bias of `conv_in`."""
    pipe = StableDiffusionInpaintPipeline.from_pretrained(base, dtype=torch.float32)
    old, vae = pipe.unet.conv_in, pipe.vae
    unet = UNet2DConditionModel.from_config({**pipe.unet.config, "in_channels": 4})
    weights = pipe.unet.state_dict()
    with torch.no_grad():
        grey = vae.encode(torch.zeros(1, 3, vae.config.sample_size, vae.config.sample_size)).latent_dist.mode()
        middle = grey[0, :, grey.shape[2] // 2, grey.shape[3] // 2] * vae.config.scaling_factor
        behind_mask = torch.cat([torch.ones(1), middle])  # what the condition's five channels say, the edges aside
        weights["conv_in.bias"] = old.bias + (old.weight[:, 4:].sum(dim=(2, 3)) @ behind_mask)
        weights["conv_in.weight"] = old.weight[:, :4].clone()
    unet.load_state_dict(weights)
    parts = {"vae": vae, "text_encoder": pipe.text_encoder, "tokenizer": pipe.tokenizer, "scheduler": pipe.scheduler}
    whole = StableDiffusionPipeline(
        unet=unet, **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    whole.save_pretrained(folder)


def train(method: Method, base: Path, dataset: Path, folder: Path, args: argparse.Namespace) -> None:
    command = [Path(sys.executable).with_name("accelerate"), "launch", "--cpu", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--num_cpu_threads_per_process", torch.get_num_threads(), ROOT / "train_vton.py"]
    options = {
        "pretrained_model_name_or_path": base,
        "dataset_root": dataset,
        "output_dir": folder,
        "cache_latents": folder.parent / "latents",
        "height": args.height,
        "width": args.width,
        "train_batch_size": args.train_batch_size,
        "max_train_steps": args.max_train_steps,
        "learning_rate": args.learning_rate,
        "lr_warmup_steps": args.max_train_steps // 20,
        "ema_decay": 0.99,
        "guidance_scale": args.guidance_scale,
        "validation_steps": args.max_train_steps,
        "num_validation_pairs": 0,
        "checkpointing_steps": args.max_train_steps,
        "seed": method.seed,
    }
    for name, value in options.items():
        command += [f"--{name}", value]
    subprocess.run([str(word) for word in (*command, *method.flags.split())], check=True)


def measure(method: Method, base: Path, folder: Path, held_out: HeldOut, args: argparse.Namespace) -> float:
    pipe = StableDiffusionVTONPipeline.from_pretrained(base, dtype=torch.float32)
    if (folder / LORA_NAME).is_file():
        pipe.load_lora_weights(folder)
    else:
        pipe.load_vton_adapter(folder)
    run = (args.num_inference_steps, 1)
    if method == NO_CLOTH:
        return held_out.psnr(without_cloth(pipe, held_out, *run))
    return held_out.psnr(as_array(try_on(pipe, held_out.pictures, *run, None)))


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=ROOT / "demo" / "model", help="default demo/model")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/methods"), help="default runs/methods")
    names = [method.name for method in METHODS]
    parser.add_argument("--rows", nargs="+", choices=names, default=names, metavar="NAME", help="default: all")
    parser.add_argument("--train", type=int, default=3000, help="drawn training pairs (default 3000)")
    parser.add_argument("--height", type=int, default=128, help="default 128")
    parser.add_argument("--width", type=int, default=96, help="default 96")
    parser.add_argument("--max_train_steps", type=int, default=500, help="updates of every row (default 500)")
    parser.add_argument("--train_batch_size", type=int, default=8, help="pairs a step (default 8)")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="highest rate of every row (default 2e-3)")
    parser.add_argument("--guidance_scale", type=float, default=1.5, help="of every row with a cloth (default 1.5)")
    parser.add_argument("--lines", type=int, default=64, help="held-out unpaired lines (default 64)")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="DDPM steps (default 50)")
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    dataset, four_channels = args.output_dir / "dataset", args.output_dir / "four-channels"
    make_dataset(dataset, train=args.train, test=16, seed=0, height=args.height)
    shutil.rmtree(four_channels, ignore_errors=True)
    write_four_channel_base(args.base, four_channels)
    held_out = HeldOut.draw(args.lines, seed=1, height=args.height)
    rows, budget = [], {name: str(value) for name, value in vars(args).items() if name not in {"rows", "output_dir"}}
    for method in (method for method in METHODS if method.name in args.rows):
        folder, base = args.output_dir / method.folder, four_channels if method.channels == 4 else args.base
        report = folder / "row.json"
        row = json.loads(report.read_text()) if report.is_file() else {}
        if row.get("budget") != budget:
            train(method, base, dataset, folder, args)
            row = {"psnr": measure(method, base, folder, held_out, args), "budget": budget}
            report.write_text(json.dumps(row))
        rows.append((method.name, row))
    print(f"\n{args.max_train_steps} updates of {args.train_batch_size} pairs, {args.lines} held-out unpaired lines\n")
    print("| method | PSNR in the mask |\n|---|---|")
    for name, row in rows:
        print(f"| {name} | {row['psnr']:.2f} dB |")


if __name__ == "__main__":
    main(parse_args())
