"""Measure the demo model against the drawn truth: PSNR inside the mask, squared error pooled over all masked pixels.

The lines are unpaired and held out: people and cloths of another seed than the training's, 50 DDPM steps.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionInpaintPipeline
from PIL import Image

from demo.make_dataset import make_dataset
from demo.try_on import DEMO, load_pipeline, read_test_split, try_on
from demo.world import LIP, UNIT_HEIGHT, draw_person, draw_sample


def as_array(pictures: list[Image.Image]) -> np.ndarray:
    """RGB pictures of one size to (N, H, W, 3) in [0, 1]."""
    return np.stack([np.asarray(picture.convert("RGB")) for picture in pictures]) / 255


def masked_psnr(results: np.ndarray, truth: np.ndarray, masks: np.ndarray) -> float:
    return float(-10 * np.log10(np.square(results - truth)[masks].mean()))


@dataclass
class HeldOut:
    """Unpaired lines of a seed that nothing was trained on: the pictures by role, and arrays (N, H, W, 3) and (N, H, W)."""

    pictures: dict[str, list[Image.Image]]
    truth: np.ndarray
    masks: np.ndarray
    mean_colors: np.ndarray

    @classmethod
    def draw(cls, lines: int, seed: int, height: int = UNIT_HEIGHT) -> "HeldOut":
        with tempfile.TemporaryDirectory() as folder:
            make_dataset(Path(folder), train=0, test=lines, seed=seed, height=height)
            pictures = read_test_split(Path(folder))
            truth = as_array(pictures["truth"])
            masks = np.stack([np.asarray(mask) >= 128 for mask in pictures["mask"]])
            painted = mean_color(Path(folder), truth, as_array(pictures["cloth"]), seed)
        return cls(pictures, truth, masks, painted)

    def psnr(self, results: np.ndarray) -> float:
        return masked_psnr(results, self.truth, self.masks)


def without_cloth(pipe: DiffusionPipeline, held_out: HeldOut, steps: int, seed: int) -> np.ndarray:
    """The same UNet through diffusers' own inpainting pipeline: the person's rows, and no cloth tokens."""
    parts = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    components = {part: getattr(pipe, part) for part in parts} | {"safety_checker": None, "feature_extractor": None}
    inpaint = StableDiffusionInpaintPipeline(**components, requires_safety_checker=False)
    height, width = held_out.masks.shape[1:]
    images = inpaint(
        prompt=[""] * len(held_out.masks),
        image=held_out.pictures["person"],
        mask_image=held_out.pictures["mask"],
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(seed),
    ).images
    return as_array(images)


def mean_color(root: Path, truth: np.ndarray, cloths: np.ndarray, seed: int) -> np.ndarray:
    """The truth, with the cloth's mean colour all over the region that the cloth truly covers."""
    painted = truth.copy()
    for i, line in enumerate((root / "test_pairs.txt").read_text().splitlines()):
        (person, _), (_, cloth) = (
            draw_sample(seed, "test", int(name.split("_")[0]), "upper") for name in line.split()
        )
        _, _, labels = draw_person(person, cloth, *truth.shape[1:3])
        flat = cloths[i][(cloths[i] < 0.98).any(axis=-1)]  # all that is not the white behind it
        painted[i][labels == LIP["top"]] = flat.mean(axis=0)
    return painted


@torch.no_grad()
def round_trip(vae: AutoencoderKL, pictures: np.ndarray) -> np.ndarray:
    pixels = torch.from_numpy(pictures).float().movedim(-1, 1) * 2 - 1
    decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    return (decoded / 2 + 0.5).clamp(0, 1).movedim(1, -1).numpy()


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO / "model", help="base and adapter (default demo/model)")
    parser.add_argument("--adapter", type=Path, help="another adapter for the base (default: the one beside it)")
    parser.add_argument("--lines", type=int, default=64, help="held-out unpaired lines (default 64)")
    parser.add_argument("--seed", type=int, default=1, help="seed of people, cloths and noise (default 1)")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="denoising steps (default 50)")
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=[None], help="default: the adapter's own")
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    held_out = HeldOut.draw(args.lines, args.seed)
    pipe = load_pipeline(args.model, args.adapter)
    rows, run = [], (args.num_inference_steps, args.seed)
    for scale in args.guidance_scale:
        results = as_array(try_on(pipe, held_out.pictures, *run, scale))
        rows.append((f"(a) the adapter, guidance {pipe.guidance_scale:g}", results))
    pipe.unload_vton_adapter()
    rows.append(("(b) the base without a cloth", without_cloth(pipe, held_out, *run)))
    rows.append(("(c) the cloth's mean colour in the true cloth region", held_out.mean_colors))
    rows.append(("(d) the VAE's round trip of the truth", round_trip(pipe.vae, held_out.truth)))
    print(
        f"PSNR in the mask, {args.lines} held-out unpaired lines, {args.num_inference_steps} DDPM steps, seed {args.seed}"
    )
    for name, results in rows:
        print(f"{held_out.psnr(results):6.2f} dB  {name}")


if __name__ == "__main__":
    main(parse_args())
