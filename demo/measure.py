#!/usr/bin/env python
"""Measure the demo model against the drawn truth: PSNR inside the mask, squared error pooled over all masked pixels.

The lines are unpaired and held out: people and cloths of another seed than the training's, 50 DDPM steps.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionInpaintPipeline
from make_dataset import UNIT_HEIGHT, UNIT_WIDTH, UPPER_CLOTHES, draw_person, draw_sample, make_dataset
from PIL import Image
from try_on import DEMO, load_pipeline, read_test_split


def as_array(pictures: list[Image.Image]) -> np.ndarray:
    """RGB pictures of one size to (N, H, W, 3) in [0, 1]."""
    return np.stack([np.asarray(picture.convert("RGB")) for picture in pictures]) / 255


def masked_psnr(results: np.ndarray, truth: np.ndarray, masks: np.ndarray) -> float:
    return float(-10 * np.log10(np.square(results - truth)[masks].mean()))


def without_cloth(model: Path, pictures: dict[str, list[Image.Image]], steps: int, seed: int) -> np.ndarray:
    """The base by itself, through diffusers' own inpainting pipeline: the person's rows, and no cloth tokens."""
    pipe = StableDiffusionInpaintPipeline.from_pretrained(model, dtype=torch.float32)
    width, height = pictures["person"][0].size
    images = pipe(
        prompt=[""] * len(pictures["person"]),
        image=pictures["person"],
        mask_image=pictures["mask"],
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
        person, cloth = (draw_sample(seed, "test", int(name.split("_")[0])) for name in line.split())
        _, _, labels = draw_person(person[0], cloth[1], UNIT_HEIGHT, UNIT_WIDTH)
        flat = cloths[i][(cloths[i] < 0.98).any(axis=-1)]  # all that is not the white behind it
        painted[i][np.asarray(labels) == UPPER_CLOTHES] = flat.mean(axis=0)
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
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_dataset(root, train=0, test=args.lines, seed=args.seed)
        pictures = read_test_split(root)
        truth, cloths = as_array(pictures["truth"]), as_array(pictures["cloth"])
        masks = np.stack([np.asarray(mask) >= 128 for mask in pictures["mask"]])
        painted = mean_color(root, truth, cloths, args.seed)

    pipe = load_pipeline(args.model)
    if args.adapter is not None:
        pipe.load_vton_adapter(args.adapter)
    rows = []
    for scale in args.guidance_scale:
        images = pipe(
            person_image=pictures["person"],
            cloth_image=pictures["cloth"],
            mask_image=pictures["mask"],
            num_inference_steps=args.num_inference_steps,
            guidance_scale=scale,
            generator=torch.Generator().manual_seed(args.seed),
        ).images
        rows.append((f"(a) the adapter, guidance {pipe.guidance_scale:g}", as_array(images)))
    rows.append(
        ("(b) the base without a cloth", without_cloth(args.model, pictures, args.num_inference_steps, args.seed))
    )
    rows.append(("(c) the cloth's mean colour in the true cloth region", painted))
    rows.append(("(d) the VAE's round trip of the truth", round_trip(pipe.vae, truth)))
    print(
        f"PSNR in the mask, {args.lines} held-out unpaired lines, {args.num_inference_steps} DDPM steps, seed {args.seed}"
    )
    for name, results in rows:
        print(f"{masked_psnr(results, truth, masks):6.2f} dB  {name}")


if __name__ == "__main__":
    main(parse_args())
