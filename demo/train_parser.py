#!/usr/bin/env python
"""Train the demo's human parser: a Segformer of less than half a million weights, on the drawn world's parse maps.

It reads VITON-HD's layout (`image-parse-v3`, numbered as LIP's labels, 10 being CIHP's Torso-skin) and DressCode's (`label_maps`,
which count the neck to the face), trains on the training pictures and prints the IoU of every label on the test pictures. The
result is an ordinary transformers folder for `pipe.load_human_parser`.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor


LIP = (
    "Background Hat Hair Glove Sunglasses Upper-clothes Dress Coat Socks Pants Torso-skin Scarf Skirt Face Left-arm "
    "Right-arm Left-leg Right-leg Left-shoe Right-shoe"
).split()
DRESS_CODE = (
    "Background Hat Hair Sunglasses Upper-clothes Skirt Pants Dress Belt Left-shoe Right-shoe Face Left-leg Right-leg "
    "Left-arm Right-arm Bag Scarf"
).split()
IGNORED = 255  # transformers' default for pixels that teach nothing: Belt and Bag, which LIP has no labels for
LIP_OF_DRESS_CODE = np.array([LIP.index(name) if name in LIP else IGNORED for name in DRESS_CODE], dtype=np.uint8)


def read_split(root: Path, split: str) -> list[tuple[Path, Path]]:
    """Persons and their parse maps: VITON-HD keeps the splits apart by folders, DressCode by lists in every category."""
    if (root / split / "image-parse-v3").is_dir():
        folder = root / split
        return [
            (file, folder / "image-parse-v3" / f"{file.stem}.png") for file in sorted((folder / "image").iterdir())
        ]
    pairs = []
    for file in sorted(root.glob(f"*/{split}_pairs{'_paired' if split == 'test' else ''}.txt")):
        for line in file.read_text(encoding="utf-8").splitlines():
            person = file.parent / "images" / line.split()[0]
            pairs.append((person, file.parent / "label_maps" / f"{person.stem.removesuffix('_0')}_4.png"))
    return pairs


def load(roots: list[Path], split: str, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (N, height, width, 3) and LIP's numbers (N, height, width), both uint8."""
    pairs = [pair for root in roots for pair in read_split(root, split)]
    if not pairs:
        raise FileNotFoundError(f"--dataset_root: no {split} pictures with parse maps in {', '.join(map(str, roots))}")
    images, maps = [], []
    for image, parsed in pairs:
        images.append(Image.open(image).convert("RGB").resize((width, height), Image.Resampling.LANCZOS))
        numbers = np.asarray(Image.open(parsed).resize((width, height), Image.Resampling.NEAREST))
        maps.append(LIP_OF_DRESS_CODE[numbers] if parsed.parent.name == "label_maps" else numbers)
    return np.stack(images), np.stack(maps)


def build(height: int, width: int) -> tuple[SegformerForSemanticSegmentation, SegformerImageProcessor]:
    """A Segformer whose logits have half of the input's sides, so that thin arms come through."""
    config = SegformerConfig(
        depths=[1, 1, 2, 2],
        hidden_sizes=[16, 32, 64, 112],
        num_attention_heads=[1, 2, 4, 4],
        sr_ratios=[8, 4, 2, 1],
        patch_sizes=[5, 3, 3, 3],
        strides=[2, 2, 2, 2],
        mlp_ratios=[2, 2, 2, 2],
        decoder_hidden_size=32,
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
        id2label=dict(enumerate(LIP)),
        semantic_loss_ignore_index=IGNORED,
    )
    return SegformerForSemanticSegmentation(config), SegformerImageProcessor(size={"height": height, "width": width})


def train(
    parser: SegformerForSemanticSegmentation,
    processor: SegformerImageProcessor,
    images: np.ndarray,
    maps: np.ndarray,
    steps: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
) -> None:
    optimizer = torch.optim.AdamW(parser.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    parser.train()
    with tqdm(total=steps, desc="parser") as bar:
        for _ in range(steps):
            chosen = torch.randint(len(images), (batch_size,), generator=generator).numpy()
            batch = processor(list(images[chosen]), segmentation_maps=list(maps[chosen]), return_tensors="pt")
            loss = parser(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
            bar.update()
    parser.eval()


@torch.no_grad()
def intersection_over_union(
    parser: SegformerForSemanticSegmentation, processor: SegformerImageProcessor, images: np.ndarray, maps: np.ndarray
) -> dict[str, float]:
    """Of every label that the maps show, over all pixels of all pictures at once."""
    intersection, union = np.zeros(len(LIP)), np.zeros(len(LIP))
    for start in range(0, len(images), 32):
        part, truth = images[start : start + 32], maps[start : start + 32]
        outputs = parser(**processor(list(part), return_tensors="pt").to(parser.dtype))
        parsed = processor.post_process_semantic_segmentation(outputs, [truth.shape[1:]] * len(truth))
        parsed = np.where(truth == IGNORED, IGNORED, torch.stack(parsed).numpy())
        for i in range(len(LIP)):
            intersection[i] += ((parsed == i) & (truth == i)).sum()
            union[i] += ((parsed == i) | (truth == i)).sum()
    shown = np.isin(np.arange(len(LIP)), maps)
    return {LIP[i]: float(intersection[i] / union[i]) for i in range(len(LIP)) if shown[i]}


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset_root", type=Path, nargs="+", required=True, help="folders that demo.make_dataset has written")
    add("--output_dir", type=Path, required=True, help="where the parser and its processor go")
    add("--height", type=int, default=128, help="the size that pictures are parsed at (default 128)")
    add("--width", type=int, default=96, help="default 96")
    add("--train_steps", type=int, default=2500, help="default 2500")
    add("--batch_size", type=int, default=8, help="pictures a step (default 8)")
    add("--learning_rate", type=float, default=3e-3, help="the highest (default 3e-3)")
    add("--seed", type=int, default=0, help="seed of weights and batches (default 0)")
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    size = (args.height, args.width)
    images, maps = load(args.dataset_root, "train", *size)
    held_out = load(args.dataset_root, "test", *size)
    torch.manual_seed(args.seed)
    parser, processor = build(*size)
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(args.seed)
    train(parser, processor, images, maps, args.train_steps, args.batch_size, args.learning_rate, generator)
    minutes = (time.perf_counter() - start) / 60
    parser.half().save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    scores = intersection_over_union(parser.float(), processor, *held_out)
    for name, score in scores.items():
        print(f"{score:6.3f}  {name}")
    print(
        f"{np.mean(list(scores.values())):6.3f}  mean IoU of {len(scores)} labels on {len(held_out[0])} held-out pictures"
    )
    print(
        f"{parser.num_parameters():,} weights, {args.train_steps} steps in {minutes:.1f} minutes, in {args.output_dir}"
    )


if __name__ == "__main__":
    main(parse_args())
