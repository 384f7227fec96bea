"""Compare ways of showing the cloth and of learning, on the demo's base: one budget a row, held-out unpaired lines of all categories.

Every row is one run of `accelerate launch train_vton.py`, and what `demo.measure` says of it: PSNR in the mask, and the share of
results in which the cloth's attributes are recognised. The same command goes on where a killed one stopped: rows that
`--output_dir` holds of the same arguments are kept, and a row's training goes on from its last checkpoint (of another base, take
another folder). Measured otherwise (`--lines`, `--seed`, `--num_inference_steps`), a row is not trained again. Second seeds tell what of a
difference is luck.
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionInpaintPipeline, StableDiffusionPipeline, UNet2DConditionModel

from benchmarks.launch import ROOT, launch
from demo.make_dataset import UNIT_HEIGHT, UNIT_WIDTH, make_dataset
from demo.measure import TITLES, cells, figures, without_cloth
from demo.measure import measure as measure_results
from demo.recognition import CLASSIFIER, load_classifier
from demo.try_on import Line, check_count, draw_lines, fast_device, fast_dtype, mixed_precision, try_on
from evaluate_vton import Interval
from pipeline_vton import StableDiffusionVTONPipeline, is_lora, markdown_table
from train_vton import read_list, write_text


@dataclass(frozen=True)
class Method:
    """A row: further flags of `train_vton.py` and its seed; `channels` of the base; what is drawn, `all` or the `outfit`s of two
    cloths; whether it is run if no rows are named.
    """

    name: str
    flags: str = ""
    channels: int = 9
    drawn: str = "all"
    seed: int = 0
    by_default: bool = True

    @property
    def folder(self) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in self.name)


JOINT, DREAM = "--cloth_conditioning joint", "--dream_detail_preservation 10"
EVERYTHING = (
    "--trainable all --learning_rate 5e-4"  # at the others' rate, a whole UNet would unlearn what the base knows
)
RESOLUTIONS = "--resolutions 128x96 64x48 192x144"
ADVERSARIAL = (
    "--adversarial_weight 1 --adversarial_start_step {fifth}"  # at .01 its gradient is a thousandth of the loss's
)
TRIED_ON = "--mask_free --condition_column tried_on"  # of what `draw_tried_on` draws
SHIPPED = "--init_adapter {base} --learning_rate 2e-4"  # a trained adapter is moved less
DISTILLED = f"{SHIPPED} --guidance_distillation 1.5 --guidance_scale 1"
NO_CLOTH = Method("no cloth, with the prompt", "--cloth_dropout 1 --cross_attention prompt")
METHODS = [
    NO_CLOTH,
    Method("joint canvas", JOINT),
    Method("reference"),
    Method("reference, DREAM", DREAM),
    Method("reference, LoRA rank 16", "--lora_rank 16"),
    Method("reference, the whole UNet", EVERYTHING),
    Method("joint canvas, another seed", JOINT, seed=1),
    Method("reference, another seed", seed=1),
    Method("reference, the whole UNet, another seed", EVERYTHING, seed=1),
    Method("reference, attention and norms", "--trainable attention_norms", by_default=False),
    Method("reference, attention and norms, another seed", "--trainable attention_norms", seed=1, by_default=False),
    Method("reference, mask-free from true pictures", "--mask_free", by_default=False),
    Method("reference, mask-free from the masked adapter's", TRIED_ON, by_default=False),
    Method("reference, mask-free from true pictures, another seed", "--mask_free", seed=1, by_default=False),
    Method("reference, mask-free from the masked adapter's, another seed", TRIED_ON, seed=1, by_default=False),
    Method("reference, begun from the demo's adapter", SHIPPED, by_default=False),
    Method("reference, begun from the demo's adapter, another seed", SHIPPED, seed=1, by_default=False),
    Method("reference, the demo's adapter, guidance distilled", DISTILLED, by_default=False),
    Method("reference, with the pose", "--pose", by_default=False),
    Method("reference, with the pose, another seed", "--pose", seed=1, by_default=False),
    Method(f"{NO_CLOTH.name}, on outfits", NO_CLOTH.flags, drawn="outfit", by_default=False),
    Method("reference, on outfits", "--num_cloths 2", drawn="outfit", by_default=False),
    Method("reference, on outfits, another seed", "--num_cloths 2", drawn="outfit", seed=1, by_default=False),
    Method("reference, with the prompt", "--cross_attention prompt", by_default=False),
    Method("reference, LoRA rank 16, another seed", "--lora_rank 16", seed=1, by_default=False),
    Method("reference, LoRA rank 4", "--lora_rank 4", by_default=False),
    Method("reference, conv_in widened from 4 channels", channels=4, by_default=False),
    Method("reference, three resolutions", RESOLUTIONS, by_default=False),
    Method("reference, three resolutions, another seed", RESOLUTIONS, seed=1, by_default=False),
    Method("reference, perceptual loss", "--perceptual_loss latent", by_default=False),
    Method("reference, perceptual loss, another seed", "--perceptual_loss latent", seed=1, by_default=False),
    Method("reference, adversarial loss", ADVERSARIAL, by_default=False),
    Method("reference, adversarial loss, another seed", ADVERSARIAL, seed=1, by_default=False),
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


def training(method: Method, base: Path, folder: Path, args: argparse.Namespace) -> list[str]:
    """The command line of a row's run of `train_vton.py`."""
    command = launch("train_vton.py", precision=mixed_precision())
    height = picture_height(args.base)
    options = {
        "pretrained_model_name_or_path": base,
        "dataset_root": dataset_folder(args, method.drawn),
        "output_dir": folder,
        "cache_latents": args.output_dir / "latents",
        "height": height,
        "width": height * UNIT_WIDTH // UNIT_HEIGHT,
        "train_batch_size": args.train_batch_size,
        "max_train_steps": args.max_train_steps,
        "learning_rate": args.learning_rate,
        "lr_warmup_steps": args.max_train_steps // 20,
        "ema_decay": 0.99,
        "guidance_scale": args.guidance_scale,
        "validation_steps": args.max_train_steps,
        "num_validation_pairs": 0,
        "checkpointing_steps": args.checkpointing_steps,
        "checkpoints_total_limit": 1,
        "resume_from_checkpoint": "latest",
        "seed": method.seed,
    }
    if "--resolutions" in method.flags:
        del options["height"], options["width"]
    for name, value in options.items():
        command += [f"--{name}", value]
    values = {"base": args.base, "fifth": args.max_train_steps // 5}
    flags = (flag.format(**values) for flag in method.flags.split())
    return [str(word) for word in (*command, *flags)]


def train(method: Method, base: Path, folder: Path, args: argparse.Namespace) -> None:
    subprocess.run(training(method, base, folder, args), check=True)


def dataset_folder(args: argparse.Namespace, drawn: str = "all") -> Path:
    return args.output_dir / f"dataset-{args.train}-{drawn}"


def draw_dataset(args: argparse.Namespace, height: int, drawn: str = "all") -> None:
    """Once: cached latents are those of these files."""
    unfinished, folder = args.output_dir / "dataset.unfinished", dataset_folder(args, drawn)
    if not folder.is_dir():
        shutil.rmtree(unfinished, ignore_errors=True)
        make_dataset(unfinished, train=args.train, test=16, seed=0, height=height, category=drawn)
        unfinished.rename(folder)


def draw_tried_on(args: argparse.Namespace) -> None:
    """Everybody in the next one's cloth, `tried_on/` of every category, as the adapter beside the base draws them in few steps."""
    for kind, category in (("upper", "upper_body"), ("lower", "lower_body"), ("dress", "dresses")):
        folder = dataset_folder(args) / category
        own = [pair for name in ("train_pairs.txt", "test_pairs_paired.txt") for pair in read_list(folder / name)]
        others = [f"{person}\t{cloth}\n" for (person, *_), (_, cloth, _) in zip(own, own[1:] + own[:1])]
        (folder / "others.txt").write_text("".join(others), encoding="utf-8")
        options = {
            "person": folder / "images",
            "cloth": folder / "images",
            "pairs": folder / "others.txt",
            "mask": folder / "agnostic_masks",
            "output": folder / "tried_on",
            "model": args.base,
            "adapter": args.base,
            "scheduler": "DDIMScheduler",
            "steps": 4,
            "guidance_scale": 1,
            "cloth_type": kind,
            "batch_size": 8,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        subprocess.run([sys.executable, ROOT / "tryon.py", "--one_each", *map(str, words)], check=True)


def picture_height(base: Path) -> int:
    return AutoencoderKL.load_config(base, subfolder="vae")["sample_size"]


def measure(
    method: Method, base: Path, folder: Path, lines: list[Line], args: argparse.Namespace
) -> dict[str, Interval]:
    """The row's figures, by the names of `TITLES`."""
    pipe = StableDiffusionVTONPipeline.from_pretrained(base, dtype=fast_dtype()).to(fast_device())
    if is_lora(folder):
        pipe.load_lora_weights(folder)
    else:
        pipe.load_vton_adapter(folder)
    run = (pipe, lines, args.num_inference_steps, args.seed)
    results = without_cloth(*run) if method.flags == NO_CLOTH.flags else try_on(*run)
    return figures(measure_results(results, lines, load_classifier(args.classifier)))


def finished(row: Path) -> dict[str, Interval]:
    return {name: Interval(**values) for name, values in json.loads(row.read_text(encoding="utf-8")).items()}


def budget(method: Method, args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """All that a row's training and its measuring depend on."""
    training = ("base", "train", "max_train_steps", "train_batch_size", "learning_rate", "guidance_scale")
    measuring = ("classifier", "lines", "seed", "num_inference_steps")
    of_method = {name: str(getattr(method, name)) for name in ("flags", "channels", "drawn", "seed")}
    return {
        "training": {name: str(getattr(args, name)) for name in training} | of_method,
        "measuring": {name: str(getattr(args, name)) for name in measuring},
    }


def train_and_measure(method: Method, base: Path, lines: list[Line], args: argparse.Namespace) -> dict[str, Interval]:
    """A row's figures; what an earlier run trained, or measured, of the same budget is kept."""
    folder, now = args.output_dir / method.folder, budget(method, args)
    row, spent = folder / "row.json", folder / "budget.json"
    before = json.loads(spent.read_text(encoding="utf-8")) if spent.is_file() else {}
    if before.get("training") != now["training"]:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    elif before["measuring"] != now["measuring"]:
        row.unlink(missing_ok=True)
    write_text(spent, json.dumps(now))
    if not row.is_file():
        train(method, base, folder, args)
        found = {name: vars(one) for name, one in measure(method, base, folder, lines, args).items()}
        write_text(row, json.dumps(found))
    return finished(row)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", type=Path, default=ROOT / "demo" / "model", help="default demo/model")
    add("--classifier", type=Path, default=CLASSIFIER, help="what recognises cloths (default demo/classifier)")
    add("--output_dir", type=Path, default=Path("runs/methods"), help="default runs/methods")
    names, usual = ([m.name for m in METHODS if m.by_default or everything] for everything in (True, False))
    add("--rows", nargs="+", choices=names, default=usual, metavar="NAME", help=f"of {'; '.join(names)} (default: the first {len(usual)})")  # fmt: skip
    add("--train", type=int, default=3000, help="drawn training pairs (default 3000)")
    add("--max_train_steps", type=int, default=500, help="updates of every row (default 500)")
    add("--checkpointing_steps", type=int, default=100, help="updates between checkpoints (default 100)")
    add("--train_batch_size", type=int, default=8, help="pairs a step (default 8)")
    add(
        "--learning_rate",
        type=float,
        default=2e-3,
        help="highest rate of the rows that train attention (default 2e-3)",
    )
    add("--guidance_scale", type=float, default=1.5, help="of every row with a cloth (default 1.5)")
    add("--lines", type=int, default=64, help="held-out unpaired lines (default 64)")
    add("--seed", type=int, default=1, help="of the held-out people, cloths and noise (default 1)")
    add("--num_inference_steps", type=int, default=50, help="DDPM steps (default 50)")
    args = parser.parse_args(input_args)
    check_count(parser, "lines", args.lines)
    return args


def main(args: argparse.Namespace) -> None:
    height, four_channels = picture_height(args.base), args.output_dir / "four-channels"
    chosen = [method for method in METHODS if method.name in args.rows]
    worlds = {method.drawn for method in chosen}
    for drawn in worlds:
        draw_dataset(args, height, drawn)
    if any(method.channels == 4 for method in chosen):
        shutil.rmtree(four_channels, ignore_errors=True)
        write_four_channel_base(args.base, four_channels)
    if any(method.flags == TRIED_ON for method in chosen):
        draw_tried_on(args)
    lines = {drawn: draw_lines(args.lines, args.seed, height, drawn) for drawn in worlds}
    rows = []
    for method in chosen:
        base = four_channels if method.channels == 4 else args.base
        rows.append([method.name, *cells(train_and_measure(method, base, lines[method.drawn], args))])
    print(f"\n{args.max_train_steps} updates of {args.train_batch_size} pairs, {args.lines} held-out unpaired lines\n")
    print(markdown_table(["method", *TITLES.values()], rows))


if __name__ == "__main__":
    main(parse_args())
