#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with the
# License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
"""Train a try-on adapter: the self-attention weights of a Stable Diffusion UNet, and nothing else.

    accelerate launch train_vton.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-inpainting \\
        --dataset_root data/viton-hd --output_dir runs/viton-hd

writes OUTPUT_DIR/vton_adapter.safetensors, for `pipe.load_vton_adapter(OUTPUT_DIR)`. How the cloth enters the UNet is the
pipeline's own code, imported from pipeline_vton.py.

The file reads in the order of a run: arguments, pairs of pictures, what is random, the trainer (setting up, one step,
looking at it, keeping it, the loop).
"""

import argparse
import contextlib
import hashlib
import importlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, ClassVar

import accelerate
import numpy as np
import psutil
import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    DistributedType,
    ProjectConfiguration,
    gather_object,
    set_seed,
)
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel, cast_training_params, compute_snr
from diffusers.utils import convert_state_dict_to_diffusers, make_image_grid
from huggingface_hub import ModelCard, create_repo, upload_folder
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import ExifTags, Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from pipeline_vton import (
    ADAPTER_NAME,
    LORA_NAME,
    LORA_SETTINGS,
    TRAINABLE_PARTS,
    AdapterSettings,
    ClothBesideAttnProcessor,
    StableDiffusionVTONPipeline,
    TryOnLatents,
    adapter_parameters,
    as_masks,
    as_pil,
    as_tensors,
    fit_cloth,
    read_adapter,
    read_safetensors,
    vton_attention,
    widen_conv_in,
    write_adapter,
)


logger = get_logger("train_vton")
PROBED_TIMESTEPS = (250, 500, 750)  # where the masked error without, with and with a wrong cloth is logged
PROBED_PAIRS = 16
LATENTS = ("person", "mask", "cloth", "cloth_condition")  # the tensors of `TryOnLatents`
CARD_TEXT = """
## Training

{picture}

| up to step | mean loss |
|---|---|
{curve}

| flag | value |
|---|---|
{flags}
"""
SCHEDULES = [kind.value for kind in SchedulerType if kind.value != "piecewise_constant"]  # that one needs rules
WARMUP_EPOCHS, WARMUP_START, FINAL_RATE = 5, 0.1, 1e-6


# ----------------------------------------------------------------------------------------------------------- arguments


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for add_arguments in (add_data_arguments, add_model_arguments, add_optimisation_arguments, add_report_arguments):
        add_arguments(parser)
    args = parser.parse_args(input_args)
    check_args(parser, args)
    if args.cache_latents is True:
        args.cache_latents = args.output_dir / "latents"
    return args


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what goes in and comes out").add_argument
    add("--pretrained_model_name_or_path", required=True, help="the base: a Hub repository or a folder")
    add("--revision", help="the base's revision on the Hub (default main)")
    add("--output_dir", type=Path, required=True, help="for adapter, checkpoints, logs and validation pictures")
    add("--dataset_root", type=Path, help="a folder in VITON-HD's or DressCode's layout")
    add("--dataset_name", help="or what datasets.load_dataset takes: a Hub repository, a folder of parquet files or pictures")  # fmt: skip
    add("--dataset_config_name", help="its configuration (default: its only one)")
    add("--streaming", action="store_true", help="read --dataset_name as it comes instead of downloading it first")
    add("--person_column", default="image", help="the person in the cloth (default image)")
    add("--cloth_column", default="cloth", help="the cloth alone (default cloth)")
    add("--mask_column", default="mask", help="the agnostic mask (default mask)")
    add("--caption_column", help="a text for every pair, with --cross_attention prompt (default: --prompt for all)")
    add("--condition_column", default="condition", help="--mask_free: column, or folder beside the persons', of the person in another cloth (default condition)")  # fmt: skip
    add("--height", type=int, help="training height in pixels (default: the base's native size)")
    add("--width", type=int, help="training width in pixels (default: the base's native size)")
    add("--augment", nargs="*", default=[], choices=("flip", "crop", "color"), help="mirror, zoom in, recolour (default none)")  # fmt: skip
    add("--cache_latents", nargs="?", type=Path, const=True, help="encode once into this folder (default OUTPUT_DIR/latents)")  # fmt: skip
    add("--dataloader_num_workers", type=int, default=2, help="reading processes (default 2)")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("how the cloth is shown, and what learns").add_argument
    add("--cloth_conditioning", choices=AdapterSettings.choices("cloth_conditioning"), default="reference", help="cloth tokens in every attn1 (default), or one canvas")  # fmt: skip
    add("--cross_attention", choices=("skip", "prompt"), default="skip", help="leave attn2 out (default), or feed it text")  # fmt: skip
    add("--prompt", default="", help="the text of every picture with --cross_attention prompt (default empty)")
    add("--condition_latents", choices=AdapterSettings.choices("condition_latents"), help="default: unscaled for 8-channel bases (instruct-pix2pix), else scaled")  # fmt: skip
    add("--mask_free", action="store_true", help="condition on the whole person, in another cloth, instead of a masked one")  # fmt: skip
    add("--trainable", choices=AdapterSettings.choices("trainable"), default="self_attention", help="which UNet weights learn (default self_attention)")  # fmt: skip
    add("--lora_rank", type=int, help="learn low-rank updates of these weights instead, in diffusers' LoRA format (default off)")  # fmt: skip
    add("--cloth_dropout", type=float, default=0.1, help="share of rows that see no cloth, for guidance (default 0.1)")
    add("--guidance_scale", type=float, default=7.5, help="recommended in the adapter, used in validation (default 7.5)")  # fmt: skip
    add("--snr_gamma", type=float, help="Min-SNR weighting of the loss, arXiv:2303.09556; 5 is usual (default off)")
    add("--dream_detail_preservation", type=float, help="DREAM's p, arXiv:2312.00210; CatVTON trained with 10 (default off)")  # fmt: skip


def add_optimisation_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("optimisation").add_argument
    add("--train_batch_size", type=int, default=4, help="pairs a step and process (default 4)")
    add("--gradient_accumulation_steps", type=int, default=1, help="batches an update (default 1)")
    add("--num_train_epochs", type=int, default=100, help="passes over the pairs (default 100)")
    add("--max_train_steps", type=int, help="updates; overrides --num_train_epochs")
    add("--learning_rate", type=float, default=1e-4, help="AdamW's highest rate (default 1e-4)")
    add("--lr_scheduler", default="default", choices=("default", *SCHEDULES), help="default: warm-up from a tenth of the rate, then cosine to 1e-6; or one of diffusers'")  # fmt: skip
    add("--lr_warmup_steps", type=int, help="updates of warm-up (default: 5 epochs, at most the whole run)")
    add("--adam_weight_decay", type=float, default=0.01, help="AdamW's; its betas are 0.9 and 0.999 (default 0.01)")
    add("--use_8bit_adam", action="store_true", help="bitsandbytes' AdamW: a quarter of the optimiser's memory")
    add("--max_grad_norm", type=float, default=1.0, help="gradient clipping (default 1.0)")
    add("--ema_decay", type=float, default=0.9999, help="averages the published weights (default 0.9999, 0 is off)")
    add("--gradient_checkpointing", action="store_true", help="less memory, a third more time")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: accelerate's configuration")
    add("--allow_tf32", action="store_true", help="faster float32 products on Ampere and later GPUs")
    add("--torch_compile", action="store_true", help="compile the UNet with inductor")
    add("--seed", type=int, default=0, help="seed of order, noise, dropout and augmentation (default 0)")


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("checkpoints and reports").add_argument
    add("--checkpointing_steps", type=int, default=500, help="updates between checkpoints (default 500)")
    add("--checkpoints_total_limit", type=int, help="how many checkpoints stay (default all)")
    add("--resume_from_checkpoint", help="a checkpoint folder, or latest")
    add("--validation_steps", type=int, default=500, help="updates between validations (default 500)")
    add("--num_validation_pairs", type=int, default=4, help="unpaired test lines drawn at a validation (default 4)")
    add("--report_to", default="tensorboard", help="tensorboard (default), wandb, trackio, another of accelerate's, or none")  # fmt: skip
    add("--push_to_hub", action="store_true", help="upload the adapter with its code and a card")
    add("--hub_model_id", help="the repository (default: named as the output folder)")
    add("--hub_strategy", choices=("end", "every_save"), default="end", help="when to upload (default end)")
    add("--hub_private_repo", action="store_true", help="make it a private repository")


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """One sentence for what argparse cannot see by itself."""
    positive = (
        "train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_train_steps", "checkpointing_steps",
        "checkpoints_total_limit", "validation_steps", "height", "width", "learning_rate", "max_grad_norm", "lora_rank",
        "snr_gamma", "dream_detail_preservation",
    )  # fmt: skip
    for name in positive:
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f"--{name} must be positive, got {value}")
    if not 0 <= args.cloth_dropout <= 1:
        parser.error(f"--cloth_dropout must be at least 0 and at most 1, got {args.cloth_dropout}")
    if not 0 <= args.ema_decay < 1:
        parser.error(f"--ema_decay must be at least 0 and less than 1, got {args.ema_decay}")
    if (args.height is None) != (args.width is None):
        parser.error(f"--height and --width go together, got {args.height} and {args.width}")
    if args.resume_from_checkpoint not in {None, "latest"} and not Path(args.resume_from_checkpoint).is_dir():
        parser.error(f"--resume_from_checkpoint must be latest or a folder, got {args.resume_from_checkpoint}")
    if (args.dataset_root is None) == (args.dataset_name is None):
        parser.error(f"give --dataset_root or --dataset_name, got {args.dataset_root} and {args.dataset_name}")
    if args.streaming and (args.dataset_name is None or args.max_train_steps is None or args.lr_warmup_steps is None):
        parser.error("--streaming needs --dataset_name and, its length being unknown, --max_train_steps and --lr_warmup_steps")  # fmt: skip
    if args.caption_column and (args.dataset_name is None or args.cross_attention != "prompt"):
        parser.error(f"--caption_column {args.caption_column} needs --dataset_name and --cross_attention prompt")
    if args.cache_latents and (args.augment or args.streaming or args.caption_column):
        parser.error("--cache_latents would freeze --augment, and knows neither --streaming nor --caption_column")
    if args.lora_rank and args.trainable not in {"self_attention", "attention"}:
        parser.error(f"--lora_rank needs --trainable self_attention or attention, got {args.trainable}")
    if args.lora_rank and args.push_to_hub:
        parser.error("--push_to_hub uploads an adapter and its code: upload a LoRA's OUTPUT_DIR with hf upload")


# ---------------------------------------------------------------------------------------------------------------- data


@dataclass
class Preparation:
    """Makes of a pair's pictures what a step reads, and of its place in the run the seed of all that is random about it.

    An item holds `person` and `cloth` (3, H, W) in [-1, 1], `mask` (1, H, W) 0 or 1, mask-free `condition` (3, H, W), its
    `name`, and a `seed`, so that neither workers nor processes nor a resumed run change what is drawn. Persons, masks and
    conditions are stretched, cloths are fitted on white, as in the pipeline.
    """

    height: int
    width: int
    seed: int = 0
    augment: Collection[str] = ()

    def __post_init__(self) -> None:
        self.image_processor = VaeImageProcessor()
        self.mask_processor = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)

    def tag(self, name: str, epoch: int, index: int) -> dict[str, Any]:
        return {"name": name, "seed": int(np.random.SeedSequence([self.seed, epoch, index]).generate_state(1)[0])}

    def __call__(self, pictures: dict[str, Image.Image], epoch: int, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.seed, epoch, index, 1])
        pictures = self.move(pictures, rng)
        size = {"height": self.height, "width": self.width}
        pictures["cloth"] = fit_cloth(pictures["cloth"], **size)
        item = {"mask": torch.ones(1, self.height, self.width)}  # mask-free
        for role, picture in pictures.items():
            processor = self.mask_processor if role == "mask" else self.image_processor
            item[role] = processor.preprocess(picture, **size)[0]
        return self.recolor(item, rng)

    def move(self, pictures: dict[str, Image.Image], rng: np.random.Generator) -> dict[str, Image.Image]:
        """Mirror every picture, or none; show the same part, at least 4/5 a side, of all but the cloth."""
        pictures = dict(pictures)
        if "flip" in self.augment and rng.random() < 0.5:
            pictures = {role: ImageOps.mirror(picture) for role, picture in pictures.items()}
        if "crop" in self.augment:
            side = rng.uniform(0.8, 1)
            left, top = rng.uniform(0, 1 - side, 2)
            for role in pictures.keys() - {"cloth"}:
                width, height = pictures[role].size
                box = (left * width, top * height, (left + side) * width, (top + side) * height)
                pictures[role] = pictures[role].crop(tuple(round(edge) for edge in box))
        return pictures

    def recolor(self, item: dict[str, Tensor], rng: np.random.Generator) -> dict[str, Tensor]:
        """One gamma a channel, alike on person, condition and cloth: another light in which black and white stay."""
        if "color" in self.augment:
            gamma = torch.tensor(2 ** rng.uniform(-0.4, 0.4, (3, 1, 1)), dtype=torch.float32)
            item |= {k: 2 * (v / 2 + 0.5).clamp(0, 1) ** gamma - 1 for k, v in item.items() if k != "mask"}
        return item


def open_picture(open_file: Callable[[], Image.Image], name: str, role: str) -> Image.Image:
    try:
        return as_pil((as_masks if role == "mask" else as_tensors)(open_file(), name)[0])
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: some broken PNGs
        raise ValueError(f"{name} cannot be read: {error}") from error


def picture_size(file: Path, where: str) -> tuple[int, int]:
    """Width and height as shown, from the file's head alone."""
    try:
        with Image.open(file) as picture:
            turned = picture.getexif().get(ExifTags.Base.Orientation, 1) > 4
            return picture.size[::-1] if turned else picture.size
    except OSError as error:
        raise ValueError(f"{where}: {file} cannot be read: {error}") from error


def check_sizes(sizes: dict[str, tuple[int, int]], where: str) -> None:
    """Mask and condition have their person's size, or one sentence says which has not."""
    for role in sizes.keys() - {"person", "cloth"}:
        if sizes[role] != sizes["person"]:
            raise ValueError(f"{where}: the {role} has size {sizes[role]}, its person {sizes['person']}")


DRESS_CODE_FOLDERS = ("upper_body", "lower_body", "dresses")


class TreePairs:
    """Pairs of a folder in VITON-HD's or DressCode's layout.

    VITON-HD: `{split}/{image,cloth,agnostic-mask}`, the mask NAME_mask.png or NAME.png, and `{split}_pairs.txt`.
    DressCode: `{upper_body,lower_body,dresses}/{images,agnostic_masks}`, the person ID_0, the cloth ID_1, the mask ID_0.png,
    and the lists in every category. A line names person and cloth; the test lists may end in `_paired` or `_unpaired`.

    Args:
        root: the folder.
        split: `train` or `test`.
        paired: every person with their own cloth, whatever the list says.
        roles: which pictures to read; a mask-free `condition` is the person in another cloth.
        condition_folder: where conditions lie, beside the persons' folder and by the persons' names.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        paired: bool,
        roles: Collection[str] = ("person", "cloth", "mask"),
        condition_folder: str = "condition",
    ) -> None:
        self.root, self.roles, self.condition_folder = root, roles, condition_folder
        self.dress_code = any((root / folder).is_dir() for folder in DRESS_CODE_FOLDERS)
        self.pairs: list[tuple[str, str, dict[str, Path]]] = []  # name, list and line, files
        for list_file, folder in find_lists(root, split, paired):
            for number, line in enumerate(list_file.read_text().splitlines(), start=1):
                if line.strip():
                    self.add_pair(line.split(), f"{list_file}, line {number}", folder, paired)
        if not self.pairs:
            raise ValueError(f"{list_file} names no pairs")

    def add_pair(self, names: list[str], where: str, folder: str, paired: bool) -> None:
        if len(names) != 2:
            raise ValueError(f"{where}: must name a person and a cloth, got {' '.join(names)!r}")
        person, cloth = names
        if paired:
            cloth = re.sub(r"_0(?=\.\w+$)", "_1", person) if self.dress_code else person
        files = self.files(folder, person, cloth)
        for file in files.values():
            if not file.is_file():
                raise FileNotFoundError(f"{where}: there is no {file.relative_to(self.root)}")
        sizes = {role: picture_size(file, where) for role, file in files.items()}
        check_sizes(sizes, where)
        self.pairs.append((f"{person} {cloth}", where, files))

    def files(self, folder: str, person: str, cloth: str) -> dict[str, Path]:
        viton = ("image", "cloth", "agnostic-mask")
        persons, cloths, masks = ("images", "images", "agnostic_masks") if self.dress_code else viton
        named = [inside(self.root, folder, masks, Path(person).stem + end) for end in ("_mask.png", ".png")]
        files = {
            "person": inside(self.root, folder, persons, person),
            "cloth": inside(self.root, folder, cloths, cloth),
            "mask": named[1] if named[1].is_file() or self.dress_code else named[0],
            "condition": inside(self.root, folder, self.condition_folder, person),
        }
        return {role: files[role] for role in self.roles}

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return self.pairs[index][0]

    def pictures(self, index: int) -> dict[str, Image.Image]:
        """Person, cloth, and mask or condition, at their own sizes."""
        _, where, files = self.pairs[index]
        return {
            role: open_picture(partial(Image.open, file), f"{where}: {file}", role) for role, file in files.items()
        }

    def identity(self) -> list:
        """What a cache of these pairs depends on: the files, their sizes and when they were written."""
        stats = [(str(file), file.stat()) for _, _, files in self.pairs for file in files.values()]
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def inside(root: Path, *parts: str) -> Path:
    """A path below `root`; ValueError where a list's line leads out of it."""
    path = Path(os.path.abspath(root.joinpath(*parts)))
    if not path.is_relative_to(os.path.abspath(root)):
        raise ValueError(f"--dataset_root: {'/'.join(parts)} leads out of {root}")
    return root.joinpath(*parts)


def find_lists(root: Path, split: str, paired: bool) -> list[tuple[Path, str]]:
    """The lists of a split, each with the folder of its pictures."""
    places = [(root / name, name) for name in DRESS_CODE_FOLDERS if (root / name).is_dir()] or [(root, split)]
    kind = "paired" if paired else "unpaired"
    found = []
    for place, folder in places:
        names = [f"{split}_pairs_{kind}.txt", f"{split}_pairs.txt"]
        files = [place / name for name in names if (place / name).is_file()]
        if not files:
            raise FileNotFoundError(
                f"--dataset_root: there is no {names[1]} in {place}; VITON-HD and DressCode have it"
            )
        found.append((files[0], folder))
    return found


@dataclass(eq=False)
class RowPairs:
    """Pairs of a `datasets.Dataset` whose pictures are not decoded yet; `columns` names the column of every role."""

    rows: Any
    columns: dict[str, str]
    kind: str = "row"

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{self.kind} {index}"

    def pictures(self, index: int) -> dict[str, Image.Image]:
        return row_pictures(self.rows[index], self.columns, self.name(index))

    def identity(self) -> list:
        return [self.rows._fingerprint, self.columns]


@dataclass(eq=False)
class PairDataset(Dataset):
    """Items that `prepare` makes of the pictures of `pairs`, with this epoch's seeds; and texts, where there are any."""

    pairs: TreePairs | RowPairs
    prepare: Preparation
    captions: Sequence[str] | None = None
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.pairs)

    def tag(self, index: int) -> dict[str, Any]:
        name = self.pairs.name(index)
        caption = {} if self.captions is None else {"caption": filled(self.captions[index], f"{name}: the caption")}
        return self.prepare.tag(name, self.epoch, index) | caption

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.prepare(self.pairs.pictures(index), self.epoch, index) | self.tag(index)


@dataclass(eq=False)
class StreamedPairs(IterableDataset):
    """The same of process `rank`'s part of a streamed dataset, epoch after epoch; `skip` pairs are passed over, undecoded."""

    rows: Any
    columns: dict[str, str]
    prepare: Preparation
    rank: int
    processes: int
    caption_column: str | None = None
    skip: int = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        place = 0
        for epoch in itertools.count():
            self.rows.set_epoch(epoch)
            for index, row in zip(itertools.count(self.rank, self.processes), self.rows):
                place += 1
                if place > self.skip:
                    name = f"row {index} of the stream"
                    item = self.prepare(row_pictures(row, self.columns, name), epoch, index)
                    if self.caption_column:
                        item["caption"] = filled(row[self.caption_column], f"{name}: the caption")
                    yield item | self.prepare.tag(name, epoch, index)
            if place == 0:
                raise ValueError("--dataset_name has no rows for this process")


def load_rows(args: argparse.Namespace, split: str, columns: dict[str, str]) -> Any:
    """A split of --dataset_name with its pictures undecoded."""
    datasets = optional("datasets", "dataset_name")
    rows = datasets.load_dataset(args.dataset_name, args.dataset_config_name, split=split, streaming=args.streaming)
    known = rows.column_names
    if known is None:  # a stream of CSV files
        raise ValueError(f"--streaming: {args.dataset_name} names no columns ahead, as parquet, JSON and pictures do")
    for role, column in {**columns, "caption": args.caption_column}.items():
        if column is not None and column not in known:
            raise ValueError(f"--{role}_column: {args.dataset_name} has the columns {', '.join(known)}, not {column}")
    for column in columns.values():
        rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def optional(library: str, flag: str) -> ModuleType:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ImportError(f"--{flag} needs the {library} library: pip install {library}") from error


def filled(cell: Any, what: str) -> Any:
    if cell is None:
        raise ValueError(f"{what} is empty")
    return cell


def row_pictures(row: dict[str, Any], columns: dict[str, str], name: str) -> dict[str, Image.Image]:
    opened, decode = {}, optional("datasets", "dataset_name").Image().decode_example
    for role, column in columns.items():
        cell = filled(row[column], f"{name}: the column {column}")
        opened[role] = open_picture(partial(decode, cell), f"{name}, column {column}", role)
    check_sizes({role: picture.size for role, picture in opened.items()}, name)
    return opened


@dataclass(eq=False)
class LatentCache(PairDataset):
    """The same with what the VAE makes of the pictures, encoded once: safetensors shards in `folder`, tensors (N, ...)."""

    folder: Path = Path("latents")
    SHARD: ClassVar[int] = 256  # pairs

    def shard(self, index: int) -> Path:
        return self.folder / f"{index // self.SHARD:06d}.safetensors"

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = index % self.SHARD
        with safe_open(self.shard(index), "pt") as file:
            latents = {name: file.get_slice(name)[place : place + 1][0] for name in file.keys()}
        return latents | self.tag(index)

    def fill(
        self, encode: Callable[[dict], dict[str, Tensor]], accelerator: accelerate.Accelerator, **loading
    ) -> None:
        """Write the shards that are not there, every process its part of them; `loading` goes to the DataLoader."""
        self.folder.mkdir(parents=True, exist_ok=True)
        started = time.time()
        starts = range(0, len(self), self.SHARD)[accelerator.process_index :: accelerator.num_processes]
        missing = [start for start in starts if not self.shard(start).is_file()]
        for start in tqdm(missing, desc="encode", disable=not accelerator.is_local_main_process or not missing):
            part = Subset(PairDataset(self.pairs, self.prepare), range(start, min(start + self.SHARD, len(self))))
            encoded = [encode(batch) for batch in DataLoader(part, **loading)]
            tensors = {name: torch.cat([batch[name].cpu() for batch in encoded]).contiguous() for name in encoded[0]}
            temporary = self.shard(start).with_suffix(f".{os.getpid()}")
            save_file(tensors, temporary)
            os.replace(temporary, self.shard(start))
        logger.info("wrote %d of %d shards of latents in %.0f s", len(missing), len(starts), time.time() - started)
        accelerator.wait_for_everyone()


def draw(seeds: Iterable[int], shape: tuple[int, ...]) -> dict[str, Tensor]:
    """What is random in a step, each row from its own seed: three noises (B, *shape) and two numbers (B,) in [0, 1)."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(int(seed))
        row = {name: torch.randn(shape, generator=generator) for name in ("noise", "cloth_noise", "posterior")}
        rows.append(row | {name: torch.rand((), generator=generator) for name in ("time", "dropout")})
    return default_collate(rows)


# ------------------------------------------------------------------------------------------------------------ the step


def warmup_cosine(optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int) -> LambdaLR:
    """Linear from a tenth of the optimiser's rate to all of it, then cosine to 1e-6."""
    final = min(FINAL_RATE / optimizer.defaults["lr"], 1.0)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return WARMUP_START + (1 - WARMUP_START) * step / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


def refuse_sharding(kind: DistributedType) -> None:
    """Sharded weights have other names and shapes than an adapter holds, and 50 million of them need no sharding."""
    if kind in {DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM}:
        enough = "plain data parallelism is enough for an adapter"
        raise ValueError(f"accelerate is configured for {kind.value}, whose shards an adapter cannot hold: {enough}")


class Trainer:
    """The models, the optimiser and the counters of one run; `run` is the loop."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        unused = args.cross_attention == "skip" and args.trainable != "self_attention"  # attn2 may learn, left out
        self.accelerator = accelerate.Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=args.output_dir / "logs"),
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
            dynamo_backend="inductor" if args.torch_compile else None,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
        )
        refuse_sharding(self.accelerator.distributed_type)
        if self.accelerator.mixed_precision == "fp16" and self.accelerator.device.type == "cpu":
            raise ValueError("--mixed_precision fp16 needs a GPU: take bf16 or no on the CPU")
        if args.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        set_seed(args.seed)
        self.step, self.losses, self.grad_norm = 0, [], 0.0
        self.asked_to_stop = self.stopping = False  # by a signal; as all processes know
        self.load_base()
        self.load_settings()
        self.load_data()
        self.load_validation()
        self.prepare_parameters()
        self.prepare_training()

    # ---- setting up

    def load(self, cls: type, subfolder: str) -> torch.nn.Module:
        """A frozen model of the base, in the mixed precision's dtype."""
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.accelerator.mixed_precision, torch.float32)
        model = cls.from_pretrained(**self.base, subfolder=subfolder, use_safetensors=True, dtype=dtype)
        return model.to(self.accelerator.device).eval().requires_grad_(False)

    def load_base(self) -> None:
        args = self.args
        self.base = {name: getattr(args, name) for name in ("pretrained_model_name_or_path", "revision")}
        self.vae, self.unet = self.load(AutoencoderKL, "vae"), self.load(UNet2DConditionModel, "unet")
        self.noise_scheduler = DDPMScheduler.from_pretrained(**self.base, subfolder="scheduler", clip_sample=False)
        kind = self.noise_scheduler.config.prediction_type
        if kind not in {"epsilon", "v_prediction"}:
            raise ValueError(f"the base's scheduler predicts {kind}, and training needs epsilon or v_prediction")
        self.in_channels = self.unet.config.in_channels
        if self.in_channels not in {4, 8, 9}:
            raise ValueError(f"the base's UNet must have 4, 8 or 9 input channels, got {self.in_channels}")
        if self.in_channels == 4:
            if args.lora_rank:
                raise ValueError("--lora_rank cannot train the conv_in that a 4-channel base gets: take one of 8 or 9")
            widen_conv_in(self.unet)
        self.prompt_embeds = None
        if args.cross_attention == "prompt":
            self.tokenizer = CLIPTokenizer.from_pretrained(**self.base, subfolder="tokenizer")
            self.text_encoder = self.load(CLIPTextModel, "text_encoder")
            self.prompt_embeds = self.embed([args.prompt])

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Tensor:
        """Texts to embeddings (B, 77, 768)."""
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return self.text_encoder(tokens.input_ids.to(self.accelerator.device))[0]

    def load_settings(self) -> None:
        """The size, and the settings that travel with the adapter."""
        args, size = self.args, self.unet.config.sample_size
        size = size if isinstance(size, (list, tuple)) else (size, size)
        parts = (self.vae, self.unet, self.noise_scheduler)
        self.pipe = StableDiffusionVTONPipeline(*parts, base_in_channels=self.in_channels)
        self.height = args.height or size[0] * self.pipe.vae_scale_factor
        self.width = args.width or size[1] * self.pipe.vae_scale_factor
        self.pipe.resolve_size(self.height, self.width, self.height, self.width)  # an error names a bad side
        self.settings = AdapterSettings(
            base_in_channels=self.in_channels,
            cloth_conditioning=args.cloth_conditioning,
            cross_attention=args.cross_attention,
            condition_latents=args.condition_latents or ("unscaled" if self.in_channels == 8 else "scaled"),
            mask_free=args.mask_free,
            trainable=args.trainable,
            guidance_scale=args.guidance_scale,
            base_model=args.pretrained_model_name_or_path,
            height=self.height,
            width=self.width,
        )
        self.pipe.register_to_config(**asdict(self.settings))
        self.pipe.set_progress_bar_config(disable=True)
        self.prepare = Preparation(self.height, self.width, args.seed, args.augment)
        self.roles = ("person", "cloth", "condition" if args.mask_free else "mask")
        self.columns = {role: getattr(args, f"{role}_column") for role in self.roles}

    def load_data(self) -> None:
        args, captions = self.args, None
        if args.streaming:
            return self.load_stream()
        if args.dataset_root is not None:
            pairs = TreePairs(args.dataset_root, "train", True, self.roles, args.condition_column)
        else:
            rows = load_rows(args, "train", self.columns)
            pairs, captions = RowPairs(rows, self.columns), rows[args.caption_column] if args.caption_column else None
        self.dataset = PairDataset(pairs, self.prepare, captions)
        loading = {"batch_size": args.train_batch_size, "num_workers": args.dataloader_num_workers}
        rows = args.train_batch_size * self.accelerator.num_processes
        if len(self.dataset) < rows:
            source = "--dataset_root" if args.dataset_root is not None else "--dataset_name"
            raise ValueError(f"--train_batch_size: a step takes {rows} pairs, and {source} has {len(self.dataset)}")
        if args.cache_latents is not None:
            self.dataset = LatentCache(pairs, self.prepare, folder=self.cache_folder(pairs))
            self.dataset.fill(self.encode, self.accelerator, **loading)
        self.loader = DataLoader(self.dataset, shuffle=True, drop_last=True, **loading)

    def load_stream(self) -> None:
        """Every process reads its own part, and has one reader, which keeps the order."""
        args, place = self.args, (self.accelerator.process_index, self.accelerator.num_processes)
        rows = load_rows(args, "train", self.columns).shuffle(seed=args.seed)
        rows = importlib.import_module("datasets.distributed").split_dataset_by_node(rows, *place)
        self.dataset = StreamedPairs(rows, self.columns, self.prepare, *place, args.caption_column)
        workers = min(1, args.dataloader_num_workers)
        self.loader = DataLoader(self.dataset, batch_size=args.train_batch_size, num_workers=workers)

    def cache_folder(self, pairs: TreePairs | RowPairs) -> Path:
        """A folder of --cache_latents for everything that changes the latents: pictures, size, VAE and settings."""
        vae = hashlib.sha256(json.dumps(dict(self.vae.config), default=str).encode())
        for name, weight in self.vae.state_dict().items():
            vae.update(name.encode() + weight.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        settings = {
            name: getattr(self.settings, name) for name in ("height", "width", "condition_latents", "mask_free")
        }
        key = json.dumps([vae.hexdigest(), str(self.vae.dtype), settings, pairs.identity()])
        return self.args.cache_latents / hashlib.sha256(key.encode()).hexdigest()[:16]

    def load_validation(self) -> None:
        """`probes`: a batch of test persons with their own cloths; `tryons`: pictures of test persons and other cloths."""
        pairs, self.tryons = self.test_rows() if self.args.dataset_name is not None else self.test_tree()
        own = PairDataset(pairs, Preparation(self.height, self.width, self.args.seed))
        probes = [own[i] for i in range(min(PROBED_PAIRS, len(pairs)))]
        self.probes = default_collate(probes) if len(probes) > 1 else None  # one has no wrong cloth

    def test_tree(self) -> tuple[TreePairs | list, list[dict]]:
        args, root, paired = self.args, self.args.dataset_root, []
        lists = [*root.glob("test_pairs*.txt"), *root.glob("*/test_pairs*.txt")]
        if not any(file.read_text().strip() for file in lists):
            return [], []
        try:
            paired = TreePairs(root, "test", True, self.roles, args.condition_column)
        except FileNotFoundError as error:
            if not args.mask_free:
                raise
            logger.info("the test persons are not there in other cloths, so nothing is probed: %s", error)
        unpaired = TreePairs(root, "test", False, [r for r in self.roles if r != "condition"])
        return paired, [unpaired.pictures(i) for i in range(min(args.num_validation_pairs, len(unpaired)))]

    def test_rows(self) -> tuple[RowPairs | list, list[dict]]:
        args, wanted = self.args, max(PROBED_PAIRS, self.args.num_validation_pairs)
        splits = optional("datasets", "dataset_name").get_dataset_split_names
        if "test" not in splits(args.dataset_name, args.dataset_config_name):
            return [], []
        pairs = RowPairs(list(load_rows(args, "test", self.columns).take(wanted)), self.columns, "test row")
        shown = [pairs.pictures(i) for i in range(min(args.num_validation_pairs, len(pairs)))]
        others = [pairs.pictures((i + 1) % len(pairs))["cloth"] for i in range(len(shown))]
        return pairs, [pictures | {"cloth": cloth} for pictures, cloth in zip(shown, others)]

    def prepare_parameters(self) -> None:
        """What learns, in float32: the adapter's weights, or a LoRA of the same modules."""
        args = self.args
        if args.lora_rank:
            parts = sorted(TRAINABLE_PARTS[args.trainable])
            modules = rf".*\.({'|'.join(parts)})\.(to_q|to_k|to_v|to_out\.0)"
            self.unet.add_adapter(LoraConfig(r=args.lora_rank, lora_alpha=args.lora_rank, target_modules=modules))
            self.parameters = {name: p for name, p in self.unet.named_parameters() if ".lora_" in name}
        else:
            self.parameters = adapter_parameters(self.unet, args.trainable, self.in_channels == 4)
        self.trained = list(self.parameters.values())
        for parameter in self.trained:
            parameter.requires_grad_(True)
        cast_training_params(self.unet, dtype=torch.float32)
        if args.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            self.unet.train()

    def prepare_training(self) -> None:
        args = self.args
        eight_bit = args.use_8bit_adam and optional("bitsandbytes", "use_8bit_adam").optim.AdamW8bit
        adam = eight_bit or torch.optim.AdamW
        self.optimizer = adam(self.trained, args.learning_rate, (0.9, 0.999), weight_decay=args.adam_weight_decay)
        self.model, self.optimizer = self.accelerator.prepare(self.unet, self.optimizer)
        if args.streaming:
            self.steps_per_epoch = args.max_train_steps
        else:
            self.loader = self.accelerator.prepare(self.loader)
            self.steps_per_epoch = math.ceil(len(self.loader) / args.gradient_accumulation_steps)
        self.total_steps = args.max_train_steps or args.num_train_epochs * self.steps_per_epoch
        warmup = WARMUP_EPOCHS * self.steps_per_epoch if args.lr_warmup_steps is None else args.lr_warmup_steps
        warmup = min(warmup, self.total_steps)
        # Stepped here, once an update: accelerate would step a prepared schedule once a process.
        if args.lr_scheduler == "default":
            self.schedule = warmup_cosine(self.optimizer.optimizer, warmup, self.total_steps)
        else:
            lengths = {"num_warmup_steps": warmup, "num_training_steps": self.total_steps}
            self.schedule = get_scheduler(args.lr_scheduler, self.optimizer.optimizer, **lengths)
        self.ema = EMAModel(self.trained, decay=args.ema_decay, use_ema_warmup=True, power=0.75)
        self.ema.to(self.accelerator.device)
        self.accelerator.register_for_checkpointing(self.schedule, self.ema)
        self.accelerator.register_save_state_pre_hook(self.save_weights)
        self.accelerator.register_load_state_pre_hook(self.load_weights)

    # ---- one step

    @torch.no_grad()
    def encode(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What the VAE makes of a batch: the tensors of `TryOnLatents`, and the posterior of the person to paint."""
        pictures = {name: batch[name].to(self.accelerator.device) for name in {*self.roles, "mask"}}
        shown = pictures["condition" if self.args.mask_free else "person"], pictures["mask"], pictures["cloth"]
        settings = {name: getattr(self.settings, name) for name in ("mask_free", "condition_latents")}
        channels = self.unet.config.in_channels
        conditioning = TryOnLatents.encode(self.vae, *shown, channels=channels, **settings, dtype=torch.float32)
        posterior = self.vae.encode(pictures["person"].to(self.vae.dtype)).latent_dist
        return {name: getattr(conditioning, name) for name in LATENTS} | {"mean": posterior.mean, "std": posterior.std}

    def latents(self, batch: dict[str, Any]) -> tuple[TryOnLatents, Tensor, Tensor]:
        """A batch's conditioning, and mean and deviation of the latents to paint, unscaled; cached or made now."""
        encoded = batch if "mean" in batch else self.encode(batch)
        encoded = {name: encoded[name].to(self.accelerator.device) for name in (*LATENTS, "mean", "std")}
        mean, std = encoded.pop("mean"), encoded.pop("std")
        return TryOnLatents(**encoded, channels=self.unet.config.in_channels), mean, std

    def predict(
        self,
        conditioning: TryOnLatents,
        noisy: Tensor,
        timesteps: Tensor,
        cloth_seen: Tensor,
        captions: list[str] | None = None,
    ) -> Tensor:
        """What the UNet sees in `noisy` (B, 4, h, w) or a canvas, at timesteps (B,); where `cloth_seen` (B,) is 0, clothless.

        Reference mode is one UNet call on `[person rows ; cloth rows]`, the cloth rows at timestep 0.
        """
        count = len(noisy)
        if self.args.cloth_conditioning == "joint":
            rows, seen = conditioning.canvas_rows(noisy, cloth_seen.view(-1, 1, 1, 1)), None
        else:
            rows = torch.cat([conditioning.person_rows(noisy), conditioning.cloth_rows()])
            timesteps = torch.cat([timesteps, torch.zeros_like(timesteps)])
            seen = torch.cat([cloth_seen, torch.ones_like(cloth_seen)])[:, None]
        embeds = self.prompt_embeds
        if embeds is not None:
            embeds = embeds.expand(count, -1, -1) if captions is None else self.embed(captions)
            embeds = embeds.repeat(len(rows) // count, 1, 1)
        with self.accelerator.autocast():
            return self.model(rows, timesteps, embeds, attention_mask=seen, return_dict=False)[0][:count].float()

    def on_canvas(self, conditioning: TryOnLatents, clean: Tensor, drawn: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Clean latents and noise of the person alone; in joint mode of the whole canvas."""
        if self.args.cloth_conditioning == "reference":
            return clean, drawn["noise"]
        canvas = conditioning.canvas
        return canvas(clean, conditioning.cloth), canvas(drawn["noise"], drawn["cloth_noise"])

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the UNet is to see, by the base's scheduler: the noise, or the velocity."""
        if self.noise_scheduler.config.prediction_type == "epsilon":
            return noise
        return self.noise_scheduler.get_velocity(clean, noise, timesteps)

    def train_step(self, batch: dict[str, Any]) -> Tensor:
        """MSE between the predicted and the actual noise, over the person (joint: over the canvas)."""
        with torch.no_grad():
            conditioning, mean, std = self.latents(batch)
            drawn = {k: v.to(mean.device) for k, v in draw(batch["seed"], mean.shape[1:]).items()}
            clean = (mean + std * drawn["posterior"]).float() * self.vae.config.scaling_factor
        clean, noise = self.on_canvas(conditioning, clean, drawn)
        timesteps = (drawn["time"] * self.noise_scheduler.config.num_train_timesteps).long()
        seen = (drawn["dropout"] >= self.args.cloth_dropout).float()

        def predict(noisy: Tensor) -> Tensor:
            return self.predict(conditioning, noisy, timesteps, seen, batch.get("caption"))

        if self.args.dream_detail_preservation:
            noise = self.dream(predict, clean, noise, timesteps)
        noisy, target = self.noise_scheduler.add_noise(clean, noise, timesteps), self.target(clean, noise, timesteps)
        return self.loss(predict(noisy), target, timesteps)

    @torch.no_grad()
    def dream(self, predict: Callable, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noise, moved by what the UNet gets wrong of it times (1 - alpha-bar)**(p / 2): DREAM, arXiv:2312.00210."""
        alpha = self.noise_scheduler.alphas_cumprod.to(clean.device)[timesteps].view(-1, 1, 1, 1)
        noisy = self.noise_scheduler.add_noise(clean, noise, timesteps)
        noise_pred = predict(noisy)
        if self.noise_scheduler.config.prediction_type == "v_prediction":
            noise_pred = alpha.sqrt() * noise_pred + (1 - alpha).sqrt() * noisy
        return noise + (1 - alpha) ** (self.args.dream_detail_preservation / 2) * (noise - noise_pred)

    def loss(self, predicted: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
        """MSE; with --snr_gamma every row weighs min(SNR, gamma) / SNR (+ 1 for velocities), arXiv:2303.09556."""
        if self.args.snr_gamma is None:
            return F.mse_loss(predicted, target)
        snr = compute_snr(self.noise_scheduler, timesteps)
        weights = snr.clamp(max=self.args.snr_gamma)
        weights = weights / (snr if self.noise_scheduler.config.prediction_type == "epsilon" else snr + 1)
        return (weights * (predicted - target).square().mean(dim=(1, 2, 3))).mean()

    def update(self, batch: dict[str, Any]) -> float:
        """Forward, backward and, every `gradient_accumulation_steps` batches, one update; returns this batch's loss."""
        accelerator = self.accelerator
        with accelerator.accumulate(self.model):
            loss = self.train_step(batch)
            both = torch.stack([loss.detach(), loss.new_tensor(float(self.asked_to_stop))])
            mean, stopping = accelerator.reduce(both, reduction="mean").tolist()
            self.stopping = stopping > 0
            self.require_finite("loss", mean, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                self.grad_norm = accelerator.clip_grad_norm_(self.trained, self.args.max_grad_norm).item()
                if accelerator.scaler is None:  # fp16's scaler skips such a step by itself
                    self.require_finite("gradient norm", self.grad_norm, batch)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if accelerator.sync_gradients:
            self.schedule.step()
            self.ema.step(self.trained)
            self.step += 1
        return mean

    def require_finite(self, what: str, value: float, batch: dict[str, Any]) -> None:
        if not math.isfinite(value):
            names = ", ".join(gather_object(list(batch["name"])))
            raise FloatingPointError(f"the {what} is {value} at step {self.step + 1}; the pairs are {names}")

    # ---- looking at it

    @contextlib.contextmanager
    def published_weights(self) -> Iterator[None]:
        """In the UNet, for as long as the context lasts: the averaged weights, rounded to fp16 as they are published."""
        before = [parameter.detach().clone() for parameter in self.trained]
        average = self.ema.shadow_params if self.args.ema_decay else before
        assign(self.trained, [weight.half() for weight in average])
        try:
            yield
        finally:
            assign(self.trained, before)

    @torch.no_grad()
    def probe(self) -> dict[str, float]:
        """The masked noise error without a cloth, with the right one and with a wrong one, on the same test persons and noise.

        While the cloth is being read, right < none < wrong.
        """
        conditioning, mean, _ = self.latents(self.probes)
        mean = mean.float() * self.vae.config.scaling_factor
        drawn = {name: noise.to(mean.device) for name, noise in draw(self.probes["seed"], mean.shape[1:]).items()}
        other = {name: getattr(conditioning, name).roll(1, 0) for name in ("cloth", "cloth_condition")}
        wrong = TryOnLatents(**vars(conditioning) | other)
        seen, errors = torch.ones(len(mean), device=mean.device), {}
        cloths = (("none", conditioning, 0 * seen), ("right", conditioning, seen), ("wrong", wrong, seen))
        for t in PROBED_TIMESTEPS:
            timesteps = torch.full((len(mean),), t, device=mean.device)
            for name, shown, visible in cloths:
                clean, noise = self.on_canvas(shown, mean, drawn)
                noisy = self.noise_scheduler.add_noise(clean, noise, timesteps)
                target = self.target(clean, noise, timesteps)
                error = (self.predict(shown, noisy, timesteps, visible) - target).square()
                error = error if self.args.cloth_conditioning == "reference" else conditioning.person_part(error)
                error = (error * conditioning.mask).sum() / conditioning.mask.expand_as(error).sum()
                errors[f"probe/t{t}_{name}"] = error.item()
        return errors

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Probe the published weights, and try cloths on test persons; the grid goes to OUTPUT_DIR/validation and the trackers."""
        logs = {}
        was_training = self.unet.training
        self.unet.eval()
        with self.published_weights():
            if self.probes is not None:
                logs = self.probe()
                shown = ", ".join(f"{name.removeprefix('probe/')} {error:.4f}" for name, error in logs.items())
                logger.info("step %d, masked noise error: %s", self.step, shown)
            if self.tryons and self.accelerator.is_main_process:
                self.save_validation_grid()
        self.unet.train(was_training)
        self.accelerator.wait_for_everyone()
        return logs

    def save_validation_grid(self) -> None:
        tiles, size = [], {"height": self.height, "width": self.width}
        text = {"prompt_embeds": self.prompt_embeds, "negative_prompt_embeds": self.prompt_embeds}
        for pictures in self.tryons:
            person, cloth = pictures["person"], pictures["cloth"]
            generator = torch.Generator(self.accelerator.device).manual_seed(self.args.seed)
            with self.accelerator.autocast():
                result = self.pipe(person, cloth, pictures.get("mask"), **size, **text, generator=generator)
            shown = (person, fit_cloth(cloth, **size), result.images[0])
            tiles += [picture.resize((self.width, self.height)) for picture in shown]
        grid = make_image_grid(tiles, rows=len(self.tryons), cols=3)
        folder = self.args.output_dir / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        grid.save(folder / f"step-{self.step:06d}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"validation": np.asarray(grid)[None]}, self.step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({"validation": [grid]}, self.step)
            elif tracker.name == "trackio":
                import trackio  # there, since it is the tracker

                tracker.log({"validation": trackio.Image(np.asarray(grid))}, self.step)

    def memory(self) -> float:
        """The peak of the GPU's memory, or this process's, in GiB."""
        if self.accelerator.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return psutil.Process().memory_info().rss / 2**30

    # ---- keeping it

    def save_weights(self, models: list[torch.nn.Module], weights: list[dict], output_dir: str) -> None:
        """accelerate's hook: a checkpoint holds the trained weights in fp32, not the whole UNet."""
        if self.accelerator.is_main_process:
            self.write_weights(Path(output_dir) / ADAPTER_NAME)
        while weights:
            weights.pop()

    def load_weights(self, models: list[torch.nn.Module], input_dir: str) -> None:
        weights, _ = read_adapter(Path(input_dir) / ADAPTER_NAME)
        if weights.keys() != self.parameters.keys():
            chosen = f"--trainable {self.args.trainable} --lora_rank {self.args.lora_rank}"
            raise ValueError(f"--resume_from_checkpoint: {input_dir} was trained with other weights than {chosen}")
        assign(self.trained, [weights[name] for name in self.parameters])
        while models:
            models.pop()

    def write_weights(self, file: Path, dtype: torch.dtype | None = None) -> None:
        weights = {name: parameter.detach().to(dtype) for name, parameter in self.parameters.items()}
        write_adapter(file, weights, replace(self.settings, trained_steps=self.step))

    def write_lora(self, folder: Path) -> None:
        """diffusers' own LoRA file; the settings are a metadata entry of their own, since diffusers reads its entry whole."""
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.unet))
        layers = {name: layer.half() for name, layer in layers.items()}
        described = {"unet_lora_adapter_metadata": self.unet.peft_config["default"].to_dict()}
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            StableDiffusionVTONPipeline.save_lora_weights(temporary, layers, weight_name=LORA_NAME, **described)
            file = Path(temporary) / LORA_NAME
            weights, metadata = read_safetensors(file)
            settings = replace(self.settings, trained_steps=self.step).metadata()
            save_file(weights, file, metadata | {LORA_SETTINGS: json.dumps(settings)})
            os.replace(file, folder / LORA_NAME)

    def publish(self) -> None:
        """The averaged weights in fp16, to OUTPUT_DIR."""
        with self.published_weights():
            if self.args.lora_rank:
                self.write_lora(self.args.output_dir)
            else:
                self.write_weights(self.args.output_dir / ADAPTER_NAME, torch.float16)
        logger.info("trained weights in %s", self.args.output_dir)

    def push(self, attempts: int) -> None:
        """Upload; what fails is logged and tried again, since neither training nor what is on disk depends on it."""
        for attempt in range(1, attempts + 1):
            try:
                return self.upload(self.args.hub_model_id or self.args.output_dir.resolve().name)
            except Exception as error:  # of many libraries; whatever it is, the run goes on
                there = self.args.output_dir
                logger.warning("upload %d of %d failed, all is still in %s: %s", attempt, attempts, there, error)
                time.sleep(attempt)

    def upload(self, repo_id: str) -> None:
        """The published weights as the pipeline uploads them, and on the card how they were trained."""
        self.pipe.register_to_config(trained_steps=self.step)
        with self.published_weights():
            private = self.args.hub_private_repo or None
            self.pipe.push_to_hub(repo_id, f"Step {self.step}", private=private, adapter_only=True)
        repo_id = create_repo(repo_id, exist_ok=True).repo_id  # with its owner
        card = ModelCard.load(repo_id)
        part = math.ceil(len(self.losses) / 10)
        losses = [(i + part, self.losses[i : i + part]) for i in range(0, len(self.losses), part)]
        pictures = sorted((self.args.output_dir / "validation").glob("*.png"))[-1:]
        card.text += CARD_TEXT.format(
            curve="\n".join(f"| {step} | {sum(some) / len(some):.4f} |" for step, some in losses),
            flags="\n".join(f"| {name} | {value} |" for name, value in vars(self.args).items() if value is not None),
            picture="".join(f"![Persons, cloths, results](validation/{picture.name})" for picture in pictures),
        )
        with tempfile.TemporaryDirectory() as folder:
            card.save(Path(folder) / "README.md")
            for picture in pictures:
                (Path(folder) / "validation").mkdir()
                shutil.copy(picture, Path(folder) / "validation")
            upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"How step {self.step} was trained")

    def checkpoints(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        found = [p for p in self.args.output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
        return sorted(found, key=lambda path: int(path.name.split("-")[1]))

    def save_checkpoint(self) -> None:
        """Write under another name, rename when whole, and only then delete the oldest."""
        final = self.args.output_dir / f"checkpoint-{self.step}"
        unfinished = final.with_name(f"unfinished-{final.name}")
        if self.accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(unfinished))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (unfinished / "progress.json").write_text(json.dumps({"step": self.step, "losses": self.losses}))
            if final.exists():  # of an earlier run into the same folder
                discard(final)
            unfinished.rename(final)
            for old in self.checkpoints()[: -(self.args.checkpoints_total_limit or len(self.checkpoints()))]:
                discard(old)

    def resume(self) -> None:
        wanted = self.args.resume_from_checkpoint
        if wanted is None:
            return
        found = self.checkpoints() if wanted == "latest" else [Path(wanted)]
        if not found:
            logger.info("--resume_from_checkpoint latest: no checkpoint in %s, starting fresh", self.args.output_dir)
            return
        self.accelerator.load_state(str(found[-1]))
        progress = json.loads((found[-1] / "progress.json").read_text())
        self.step, self.losses = progress["step"], progress["losses"]
        logger.info("resumed from %s", found[-1])

    # ---- the loop

    def batches(self) -> Iterator[dict[str, Any]]:
        """Batches from where the run stands, epoch after epoch, in the order that an uninterrupted run would see."""
        accumulated = self.args.gradient_accumulation_steps
        if self.args.streaming:
            self.dataset.skip = self.step * accumulated * self.args.train_batch_size
            yield from self.loader
        epoch, done = divmod(self.step, self.steps_per_epoch)
        skip = done * accumulated
        while True:
            self.loader.set_epoch(epoch)
            self.dataset.set_epoch(epoch)  # which the loader's does not reach with several processes
            yield from accelerate.skip_first_batches(self.loader, skip) if skip else self.loader
            epoch, skip = epoch + 1, 0

    @contextlib.contextmanager
    def gentle_stop(self) -> Iterator[None]:
        """Ctrl-C or SIGTERM, however often, asks for a checkpoint after the running update; Ctrl-\\ still stops at once.

        torchrun repeats a Ctrl-C that its workers have had, and reading processes get one too: neither may break the save.
        """

        def stop(number: int, frame: FrameType | None) -> None:
            self.asked_to_stop = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def run(self) -> bool:
        """Train to the end, or until asked to stop; returns whether it came to the end."""
        args, processor = self.args, ClothBesideAttnProcessor if self.args.cloth_conditioning == "reference" else None
        self.resume()
        hidden = not self.accelerator.is_local_main_process
        bar = tqdm(total=self.total_steps, initial=self.step, desc="train", disable=hidden)
        with bar, self.gentle_stop(), vton_attention(self.unet, processor, args.cross_attention):
            batches, losses, started = self.batches(), [], time.time()
            while self.step < self.total_steps:
                before = self.step
                losses.append(self.update(next(batches)))
                if self.step == before:
                    continue
                bar.update()
                self.after_update(bar, losses, time.time() - started)
                losses, started = [], time.time()
                if self.stopping:
                    break
        if self.step == self.total_steps and self.accelerator.is_main_process:
            self.publish()
            if args.push_to_hub:
                self.push(attempts=3)
        return self.step == self.total_steps

    def after_update(self, bar: tqdm, losses: list[float], seconds: float) -> None:
        """Report, validate and save as often as asked; always at the end, and save when asked to stop."""
        args, last = self.args, self.step == self.total_steps
        pairs = len(losses) * args.train_batch_size * self.accelerator.num_processes
        self.losses.append(sum(losses) / len(losses))
        logs = {
            "loss": self.losses[-1],
            "lr": self.schedule.get_last_lr()[0],
            "grad_norm": self.grad_norm,
            "images_per_second": pairs / seconds,
            "memory_gib": self.memory(),
        }
        bar.set_postfix({name: f"{logs[name]:.3g}" for name in ("loss", "lr", "images_per_second")})
        if self.step % args.validation_steps == 0 or last:
            logs |= self.validate()
        self.accelerator.log(logs, step=self.step)
        if self.step % args.checkpointing_steps == 0 or last or self.stopping:
            self.save_checkpoint()
            if args.push_to_hub and args.hub_strategy == "every_save" and self.accelerator.is_main_process:
                self.push(attempts=1)
            self.accelerator.wait_for_everyone()


@torch.no_grad()
def assign(parameters: list[torch.nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def discard(folder: Path) -> None:
    """Delete a checkpoint whose name is gone before its first file is, so that half of one is never taken for one."""
    leaving = folder.with_name(f"leaving-{folder.name}")
    shutil.rmtree(leaving, ignore_errors=True)
    folder.rename(leaving)
    shutil.rmtree(leaving)


def main(args: argparse.Namespace) -> None:
    shape = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(format=shape, datefmt="%H:%M:%S", level=logging.INFO)
    trainer = Trainer(args)
    if trainer.accelerator.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        config = {name: str(v) if isinstance(v, (Path, list)) else v for name, v in vars(args).items()}
        (args.output_dir / "training_args.json").write_text(json.dumps(config, indent=2) + "\n")
        trainer.accelerator.init_trackers("train_vton", {k: v for k, v in config.items() if v is not None})
    finished = trainer.run()
    trainer.accelerator.end_training()
    if not finished:
        raise SystemExit(f"stopped at step {trainer.step}: go on with --resume_from_checkpoint latest")


if __name__ == "__main__":
    main(parse_args())
