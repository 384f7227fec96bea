"""Train the network that recognises cloths on people (`demo.recognition`), on drawn truths of seeds that nothing else uses.

The result is an ordinary diffusers folder of less than a megabyte; printed is the share of held-out truths of another seed
that it gets right, for every attribute, and what it mistakes for what.
"""

import argparse
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from demo.make_dataset import World
from demo.recognition import ATTRIBUTES, ClothClassifier, crop, load_classifier, to_input
from demo.try_on import fast_device
from demo.world import LOGOS, UNIT_HEIGHT, draw_person
from pipeline_vton import written_whole


NONE = -100  # what `cross_entropy` leaves out: trousers have no sleeves


def draw_truth(index: int, world: World, logos: bool) -> tuple[np.ndarray, list[int]]:
    """A person in a cloth, cropped (4, H, W), and the number of each attribute's value."""
    person, cloth = world.sample("train", index)
    if (
        logos and index % 2
    ):  # the smallest there is to see; categories alternate, so that every three cloths have another
        cloth = replace(cloth, print="logo", pattern="plain", logo=(*LOGOS, "word")[index // 6 % (len(LOGOS) + 1)])
    picture, mask, _ = draw_person(person, cloth, *world.size)
    attributes = cloth.attributes()
    values = [NONE if attributes[name] is None else ATTRIBUTES[name].index(attributes[name]) for name in ATTRIBUTES]
    return crop(picture, mask), values


def draw_truths(count: int, world: World, logos: bool) -> TensorDataset:
    """Crops, bytes (N, 4, H, W), and labels (N, attributes); with a logo or a word on every second cloth, if wanted."""
    with ProcessPoolExecutor() as pool:
        drawn = pool.map(partial(draw_truth, world=world, logos=logos), range(count), chunksize=32)
        crops, values = zip(*tqdm(drawn, total=count, desc=f"truths of seed {world.seed}"))
    return TensorDataset(torch.from_numpy(np.stack(crops)), torch.tensor(values))


def disturb(crops: torch.Tensor) -> torch.Tensor:
    """What a result may have and a truth has not: mirrored, shifted, darker or lighter, blurred, noisy; (N, 4, H, W) in [-1, 1]."""
    _, _, height, width = crops.shape

    def drawn() -> torch.Tensor:
        return torch.rand(len(crops), 1, 1, 1, device=crops.device)

    crops = torch.where(drawn() < 0.5, crops.flip(3), crops)
    down, right = torch.randint(0, 7, (2,)).tolist()
    crops = F.pad(crops, (3, 3, 3, 3), mode="replicate")[..., down : down + height, right : right + width]
    picture, mask = crops.split((3, 1), dim=1)
    blurred = F.avg_pool2d(F.pad(picture, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    picture = picture.lerp(blurred, 0.6 * drawn() * (drawn() < 0.4))
    light = torch.randn_like(picture[:, :2, :1, :1])
    picture = picture * (1 + 0.04 * light[:, :1]) + 0.04 * light[:, 1:]
    picture = picture + 0.08 * drawn() * torch.randn_like(picture)
    return torch.cat([picture.clamp(-1, 1), mask], dim=1)


def loss(classifier: ClothClassifier, crops: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    said, values = classifier(disturb(to_input(crops.to(classifier.device)))), values.to(classifier.device)
    return sum(F.cross_entropy(said[name], values[:, i]) for i, name in enumerate(ATTRIBUTES))


@torch.no_grad()
def evaluate(classifier: ClothClassifier, truths: TensorDataset) -> dict[str, Counter]:
    """By attribute, how often which (true value, said value) occurred."""
    confusions = {name: Counter() for name in ATTRIBUTES}
    for crops, values in DataLoader(truths, batch_size=256):
        for i, (name, logits) in enumerate(classifier(to_input(crops.to(classifier.device))).items()):
            pairs = zip(values[:, i].tolist(), logits.argmax(dim=1).tolist())
            confusions[name].update((ATTRIBUTES[name][t], ATTRIBUTES[name][s]) for t, s in pairs if t != NONE)
    return confusions


def share_right(confusions: Counter) -> float:
    return sum(n for (true, said), n in confusions.items() if true == said) / confusions.total()


def train(classifier: ClothClassifier, truths: TensorDataset, held_out: TensorDataset, args) -> None:
    """Minimise the cross-entropies of all attributes; the classifier is left ready for use."""
    batches = DataLoader(truths, args.batch_size, shuffle=True, drop_last=True)
    total = args.epochs * len(batches)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=args.learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=total, pct_start=0.15)
    classifier.to(fast_device(), memory_format=torch.channels_last)
    bar = tqdm(total=total, desc="classifier")
    for epoch in range(args.epochs):
        classifier.train()
        for crops, values in batches:
            value = loss(classifier, crops, values)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            bar.update()
        shares = {name: share_right(found) for name, found in evaluate(classifier.eval(), held_out).items()}
        tqdm.write(f"epoch {epoch + 1}  loss {value:.3f}  " + "  ".join(f"{n} {s:.4f}" for n, s in shares.items()))


def report(confusions: dict[str, Counter]) -> str:
    lines = []
    for name, found in confusions.items():
        wrong = [f"{true} for {said} {n}" for (true, said), n in found.most_common() if true != said]
        lines.append(f"{name:15} {share_right(found):7.2%} of {found.total()}: {', '.join(wrong[:6])}")
    return "\n".join(lines)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="where the network and its config go")
    add("--train", type=int, default=24000, help="truths to learn from (default 24000)")
    add("--test", type=int, default=2000, help="held-out truths of the next seed (default 2000)")
    add("--seed", type=int, default=100, help="seed of people, cloths, weights and batches (default 100)")
    add(
        "--height",
        type=int,
        default=UNIT_HEIGHT,
        help=f"of the pictures before they are cropped (default {UNIT_HEIGHT})",
    )
    add("--epochs", type=int, default=14, help="how often each truth is seen (default 14)")
    add("--batch_size", type=int, default=64, help="truths a step (default 64)")
    add("--learning_rate", type=float, default=4e-3, help="the highest (default 4e-3)")
    args = parser.parse_args(input_args)
    for name in ("train", "test", "epochs", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be positive, got {getattr(args, name)}")
    if args.train < args.batch_size:
        parser.error(f"--train must be at least --batch_size {args.batch_size}, got {args.train}")
    return args


def main(args: argparse.Namespace) -> None:
    truths = draw_truths(args.train, World(args.seed, args.height, "all"), logos=True)
    held_out = draw_truths(args.test, World(args.seed + 1, args.height, "all"), logos=False)
    torch.manual_seed(args.seed)
    classifier = ClothClassifier()
    train(classifier, truths, held_out, args)
    with written_whole(args.output_dir) as folder:
        classifier.half().save_pretrained(folder)
    print(report(evaluate(load_classifier(args.output_dir), held_out)))


if __name__ == "__main__":
    main(parse_args())
