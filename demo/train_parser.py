#!/usr/bin/env python
"""Train the demo's human parser: a Segformer of less than half a million weights, on the drawn world's parse maps.

It reads VITON-HD's layout (`image-parse-v3`, numbered as LIP's labels, 10 being CIHP's Torso-skin) and DressCode's (`label_maps`,
which count the neck to the face), trains on the training pictures and prints the IoU of every label on the test pictures. The
result is an ordinary transformers folder for `pipe.load_human_parser`. The same command goes on where a killed one stopped.

    python -m demo.train_parser --dataset_root UPPER LOWER DRESS --output_dir DIR
    python -m demo.train_parser --dataset_root UPPER LOWER DRESS --score demo/model     the IoU of a parser that is there
    python -m demo.train_parser --output_dir DIR --install demo/model                   put it into a pipeline's folder
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

from demo.train_base import Stage
from pipeline_vton import written_whole


LIP = (
    "Background Hat Hair Glove Sunglasses Upper-clothes Dress Coat Socks Pants Torso-skin Scarf Skirt Face Left-arm "
    "Right-arm Left-leg Right-leg Left-shoe Right-shoe"
).split()
DRESS_CODE = (
    "Background Hat Hair Sunglasses Upper-clothes Skirt Pants Dress Belt Left-shoe Right-shoe Face Left-leg Right-leg "
    "Left-arm Right-arm Bag Scarf"
).split()
IGNORED = 255  # transformers' default for pixels that teach nothing: Belt and Bag, which LIP has no labels for
# The components of a pipeline that a trained parser is: as model_index.json names them, with torchvision or without, and their files.
COMPONENTS = {
    "human_parser": ("SegformerForSemanticSegmentation", ("config.json", "model.safetensors")),
    "human_parser_processor": ("SegformerImageProcessor", ("preprocessor_config.json",)),
}
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
    pictures: tuple[np.ndarray, np.ndarray],
    held_out: tuple[np.ndarray, np.ndarray],
    args: argparse.Namespace,
) -> None:
    """Minimise the cross-entropy of every pixel; the parser is left ready for use."""
    images, maps = pictures

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.randint(len(images), (args.batch_size,)).numpy()
        batch = processor(list(images[chosen]), segmentation_maps=list(maps[chosen]), return_tensors="pt")
        return batch["pixel_values"].to(parser.device), batch["labels"].to(parser.device)

    def loss(pixel_values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return parser(pixel_values=pixel_values, labels=labels).loss

    def report(step: int) -> dict[str, float]:
        scores = intersection_over_union(parser, processor, *held_out)
        return {"iou": float(np.mean(list(scores.values())))}

    trained = list(parser.parameters())
    Stage("parser", parser, trained, args.train_steps, args.learning_rate, 0.01, average=False, args=args).train(
        draw, loss, report
    )


@torch.no_grad()
def intersection_over_union(
    parser: SegformerForSemanticSegmentation, processor: SegformerImageProcessor, images: np.ndarray, maps: np.ndarray
) -> dict[str, float]:
    """Of every label that the maps show, over all pixels of all pictures at once."""
    intersection, union = np.zeros(len(LIP)), np.zeros(len(LIP))
    for start in range(0, len(images), 32):
        part, truth = images[start : start + 32], maps[start : start + 32]
        outputs = parser(**processor(list(part), return_tensors="pt").to(parser.device, parser.dtype))
        parsed = processor.post_process_semantic_segmentation(outputs, [truth.shape[1:]] * len(truth))
        parsed = np.where(truth == IGNORED, IGNORED, torch.stack(parsed).cpu().numpy())
        for i in range(len(LIP)):
            intersection[i] += ((parsed == i) & (truth == i)).sum()
            union[i] += ((parsed == i) | (truth == i)).sum()
    shown = np.isin(np.arange(len(LIP)), maps)
    return {LIP[i]: float(intersection[i] / union[i]) for i in range(len(LIP)) if shown[i]}


def print_scores(
    parser: SegformerForSemanticSegmentation, processor: SegformerImageProcessor, images: np.ndarray, maps: np.ndarray
) -> None:
    scores = intersection_over_union(parser, processor, images, maps)
    for name, score in scores.items():
        print(f"{score:6.3f}  {name}")
    print(
        f"{np.mean(list(scores.values())):6.3f}  mean IoU of {len(scores)} labels on {len(images)} held-out pictures"
    )


def read_parser(folder: Path) -> tuple[SegformerForSemanticSegmentation, SegformerImageProcessor]:
    """A trained parser and its processor, from a folder of both or from a pipeline's."""
    parts = [folder / name if (folder / name).is_dir() else folder for name in COMPONENTS]
    parser = SegformerForSemanticSegmentation.from_pretrained(parts[0], dtype=torch.float32)
    return parser.eval(), SegformerImageProcessor.from_pretrained(parts[1])


def install(folder: Path, model: Path) -> None:
    """Copy a trained parser into a pipeline's folder, and name it in its model_index.json as the pipeline does."""
    for name, (_, files) in COMPONENTS.items():
        (model / name).mkdir(exist_ok=True)
        for file in files:
            shutil.copy(folder / file, model / name)
    index = json.loads((model / "model_index.json").read_text(encoding="utf-8"))
    index |= {name: ["transformers", kind] for name, (kind, _) in COMPONENTS.items()}
    text = json.dumps(dict(sorted(index.items())), indent=2) + "\n"
    (model / "model_index.json.unfinished").write_text(text, encoding="utf-8")
    (model / "model_index.json.unfinished").replace(model / "model_index.json")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset_root", type=Path, nargs="+", default=[], help="folders that demo.make_dataset has written")
    add("--output_dir", type=Path, help="where the parser, its processor and its checkpoints go")
    add("--score", type=Path, metavar="DIR", help="train nothing, print the IoU of this parser, or pipeline's parser")
    add("--install", type=Path, metavar="DIR", help="train nothing, copy --output_dir's parser into this pipeline")
    add("--height", type=int, default=128, help="the size that pictures are parsed at (default 128)")
    add("--width", type=int, default=96, help="default 96")
    add("--train_steps", type=int, default=2500, help="default 2500")
    add("--batch_size", type=int, default=8, help="pictures a step (default 8)")
    add("--learning_rate", type=float, default=3e-3, help="the highest (default 3e-3)")
    add("--checkpointing_steps", type=int, default=250, help="steps between checkpoints and scores (default 250)")
    add("--seed", type=int, default=0, help="seed of weights and batches (default 0)")
    args = parser.parse_args(input_args)
    args.mixed_precision = "no"  # which `Stage` asks for: so small a network gains nothing from bfloat16
    for name in ("height", "width", "train_steps", "batch_size", "checkpointing_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be positive, got {getattr(args, name)}")
    if args.output_dir is None and args.score is None:
        parser.error("--output_dir must be given, for the parser that is trained or installed")
    if not args.dataset_root and args.install is None:
        parser.error("--dataset_root must name the folders to learn from and to score on")
    return args


def main(args: argparse.Namespace) -> None:
    if args.install is not None:
        install(args.output_dir, args.install)
        return
    size = (args.height, args.width)
    held_out = load(args.dataset_root, "test", *size)
    if args.score is not None:
        print_scores(*read_parser(args.score), *held_out)
        return
    pictures = load(args.dataset_root, "train", *size)
    torch.manual_seed(args.seed)
    parser, processor = build(*size)
    train(parser, processor, pictures, held_out, args)
    with written_whole(args.output_dir) as folder:
        processor.save_pretrained(folder)
        parser.half().save_pretrained(folder)
    print_scores(*read_parser(args.output_dir), *held_out)
    print(f"{parser.num_parameters():,} weights, {args.train_steps} steps, in {args.output_dir}")


if __name__ == "__main__":
    main(parse_args())
