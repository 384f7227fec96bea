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

The file reads in the order of a run: arguments, pairs of pictures, what is random, the loss, the trainer (setting up, one step,
the loop), what it shows of itself (`Validation`) and what is kept of it (`Checkpoints`).
"""

import argparse
import codecs
import contextlib
import hashlib
import importlib
import inspect
import io
import itertools
import json
import logging
import math
import multiprocessing
import operator
import os
import re
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, BinaryIO, ClassVar

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
    InitProcessGroupKwargs,
    LoggerType,
    ProjectConfiguration,
    gather_object,
    send_to_device,
    set_seed,
)
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import DownBlock2D
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel, cast_training_params, compute_snr, find_nearest_bucket
from diffusers.utils import convert_state_dict_to_diffusers, make_image_grid
from filelock import FileLock, Timeout
from huggingface_hub import ModelCard, create_repo, upload_folder
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset, default_collate
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from pipeline_vton import (
    ADAPTER_NAME,
    CANVAS_DIMS,
    EXIF_TURNS,
    LORA_NAME,
    LORA_SETTINGS,
    TRAINABLE_PARTS,
    UNREADABLE,
    AdapterSettings,
    ClothBesideAttnProcessor,
    PictureInput,
    StableDiffusionVTONPipeline,
    TryOnLatents,
    adapter_parameters,
    added_conditions,
    as_image,
    as_mask_image,
    as_pil,
    as_pose_image,
    as_tensors,
    check_unet,
    convert_profile,
    convex_hull,
    exif_turn,
    extent,
    fit_cloth,
    fit_size,
    from_safetensors,
    grow,
    hub_repository,
    is_lora,
    markdown_table,
    naming,
    overflows,
    read_adapter,
    read_safetensors,
    refuse_sdxl_text,
    same_aspect,
    vton_attention,
    whole_file,
    widen_conv_in,
    write_adapter,
)


logger = get_logger("train_vton")
OUTLIER = 5.0  # standard deviations: what a decoder's feature does beyond them is no measure of likeness
R1_WEIGHT = 0.1
COLLAPSED, COLLAPSE_AFTER = 0.05, 200  # a discriminator's loss that is as good as 0, and for how many updates
SEED_GUIDANCE = 7.5  # where nothing better is known
ASPECT_TOLERANCE = 1.1
PROBED_TIMESTEPS = (250, 500, 750)  # where the masked error without, with and with a wrong cloth is logged
PROBED_PAIRS = 16
QUARTER_TURNS = {EXIF_TURNS[orientation] for orientation in (5, 6, 7, 8)}
UNLIT = {"mask", "pose", "worn"}  # whose values are no colours of things: neither a profile nor the light changes them
READING = 2  # counts the changes of how pictures are read: latents cached before one are of other pictures
SIZED_ROWS = 16  # of a table, whose persons' sizes are looked at
HOST_VALUES = ("seed", "place")  # of an item
CLOTH_LATENTS = ("cloth", "cloth_condition")
LATENTS = ("person", "mask", *CLOTH_LATENTS)  # the tensors of `TryOnLatents`
TRAINED_NAME = "trained_weights.safetensors"  # of a checkpoint: what learns, beside the adapter that it makes
GUIDANCE_SCALES, GUIDANCE_STEPS = (1, 1.5, 2, 2.5, 3.5, 5, 7.5), 25
LOCAL_FLAGS = {"dataset_root", "output_dir", "cache_latents", "resume_from_checkpoint"}  # folders of this machine
RESUMED_SETTINGS = (  # what a checkpoint's weights have learnt with
    "base_in_channels", "cloth_conditioning", "canvas_axis", "cross_attention", "condition_latents", "mask_free", "pose",
    "trainable", "height", "width", "prompt",
)  # fmt: skip
PATIENCE = InitProcessGroupKwargs(timeout=timedelta(hours=6))  # while one process looks at files or draws
POLYNOMIAL_END = 1e-7  # diffusers' own
SCHEDULES = [kind.value for kind in SchedulerType if kind.value != "piecewise_constant"]  # that one needs rules
TRACKERS = [*map(str, LoggerType), "none"]
WARMUP_EPOCHS, WARMUP_START, FINAL_RATE = 5, 0.1, 1e-6
ADAPTER_FLAGS = {  # what an adapter says that training begins from, and what holds where neither it nor a flag does
    "cloth_conditioning": "reference", "cross_attention": "skip", "condition_latents": None, "mask_free": False,
    "pose": False, "trainable": "self_attention", "prompt": "",
}  # fmt: skip
NEEDS = {  # flags that say nothing without others
    "init_subfolder": ["init_adapter"], "perceptual_weight": ["perceptual_loss"], "perceptual_max_timestep": ["perceptual_loss"],
    "adversarial_start_step": ["adversarial_weight"], "hub_model_id": ["push_to_hub"], "hub_strategy": ["push_to_hub"],
    "hub_private_repo": ["push_to_hub"], "hub_license": ["push_to_hub"], "pose_folder": ["pose", "dataset_root"],
    "pose_column": ["pose", "dataset_name"], "pose_dropout": ["pose"], "condition_column": ["mask_free"],
    "person_column": ["dataset_name"], "cloth_column": ["dataset_name"], "mask_column": ["dataset_name"],
    "dataset_config_name": ["dataset_name"],
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- arguments


def number(kind: type, allowed: str, fits: Callable[[Any], bool]) -> Callable[[str], Any]:
    """A `type` for argparse: a finite number that `fits`."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (fits(value) and value < math.inf):
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def path(text: str) -> Path:
    """A `type` for argparse: a shell's variable that is not set is no name for the folder that one stands in."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return Path(text)


POSITIVE_COUNT = number(int, "a positive whole number", lambda value: value > 0)
COUNT = number(int, "a whole number from 0", lambda value: value >= 0)
POSITIVE = number(float, "a positive number", lambda value: value > 0)
NOT_NEGATIVE = number(float, "a number from 0", lambda value: value >= 0)
SHARE = number(float, "at least 0 and at most 1", lambda value: 0 <= value <= 1)
DECAY = number(float, "at least 0 and less than 1", lambda value: 0 <= value < 1)
SEED = number(int, "a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32)


def resolution(text: str) -> tuple[int, int]:
    """A `type` for argparse: a height and a width in pixels."""
    if (match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)) is None:
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH in pixels, as 512x384, got {text}")
    return int(match[1]), int(match[2])


def new_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for add_arguments in (add_data_arguments, add_model_arguments, add_optimisation_arguments, add_report_arguments):
        add_arguments(parser)
    return parser


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser()
    args = parser.parse_args(input_args)
    check_args(parser, args)
    if args.init_adapter is None:
        for name, default in ADAPTER_FLAGS.items():
            if getattr(args, name) is None:
                setattr(args, name, default)
        try:
            check_settings(args)
        except ValueError as error:
            parser.error(str(error))
    if args.cache_latents is True:
        args.cache_latents = args.output_dir / "latents"
    return args


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what goes in and comes out").add_argument
    add("--pretrained_model_name_or_path", required=True, help="the base: a Hub repository or a folder")
    add("--revision", help="the base's revision on the Hub (default main)")
    add("--vae_name_or_path", help="another VAE for the base, such as SDXL's for fp16 (default: the base's own)")
    add("--output_dir", type=path, required=True, help="for adapter, checkpoints, logs and validation pictures")
    add("--dataset_root", type=path, help="a folder in VITON-HD's or DressCode's layout")
    add("--dataset_name", help="or what datasets.load_dataset takes: a Hub repository, a folder of parquet files or pictures")  # fmt: skip
    add("--dataset_config_name", help="its configuration (default: its only one)")
    add("--streaming", action="store_true", help="read --dataset_name as it comes instead of downloading it first")
    add("--category", choices=("all", *DRESS_CODE_FOLDERS), default="all", help="of DressCode's layout (default all)")
    add("--person_column", default="image", help="the person in the cloth (default image)")
    add("--cloth_column", default="cloth", help="the cloth alone (default cloth)")
    add("--num_cloths", type=POSITIVE_COUNT, default=1, help="of a person, at most; the others are in columns or folders cloth_2, cloth_3, where there are any, or in DressCode-MR's lists (default 1)")  # fmt: skip
    add("--mask_column", default="mask", help="the agnostic mask (default mask)")
    add("--caption_column", help="a text for every pair, with --cross_attention prompt (default: --prompt for all)")
    add("--condition_column", default="condition", help="--mask_free: column, or folder beside the persons', of the person in another cloth (default condition)")  # fmt: skip
    add("--pose_column", default="pose", help="--pose: the column of poses (default pose)")
    add("--pose_folder", help="--pose: the folder beside the persons', such as image-densepose (default: openpose_img, DressCode's skeletons)")  # fmt: skip
    add("--height", type=POSITIVE_COUNT, help="training height in pixels, with --width (default: the base's native area at the data's aspect)")  # fmt: skip
    add("--width", type=POSITIVE_COUNT, help="training width in pixels, at the data's aspect")
    add("--resolutions", nargs="+", type=resolution, metavar="HEIGHTxWIDTH", help="train at all of these, a batch at one that is nearest to its persons' aspect; the first that suits most persons is the adapter's own (default: one size)")  # fmt: skip
    add("--augment", nargs="*", default=[], choices=("flip", "crop", "color", "mask"), help="mirror, zoom in, recolour, loosen masks (default none)")  # fmt: skip
    add("--cache_latents", nargs="?", type=path, const=True, help="encode once, and keep it in this folder, or without a name in OUTPUT_DIR/latents (default off)")  # fmt: skip
    add("--dataloader_num_workers", type=COUNT, default=2, help="reading processes (default 2)")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("how the cloth is shown, and what learns").add_argument
    add("--init_adapter", help="begin from this adapter, a Hub repository, a folder or a file: its settings hold (default: from the base)")  # fmt: skip
    add("--init_subfolder", help="where in the repository or folder it lies, as mix-48k-1024/attention in CatVTON's")
    add("--cloth_conditioning", choices=AdapterSettings.choices("cloth_conditioning"), help="cloth tokens in every attn1 (reference, the default), or one canvas")  # fmt: skip
    add("--cross_attention", choices=("skip", "prompt"), help="leave attn2 out (default), or feed it text")
    add("--prompt", help="the text of every picture with --cross_attention prompt (default empty)")
    add("--condition_latents", choices=AdapterSettings.choices("condition_latents"), help="default: unscaled for 8-channel bases (instruct-pix2pix), else scaled")  # fmt: skip
    add("--mask_free", action="store_true", default=None, help="condition on the whole person, in another cloth, instead of a masked one")  # fmt: skip
    add("--pose", action="store_true", default=None, help="paint a picture of the pose into the hole that the mask leaves")  # fmt: skip
    add("--pose_dropout", type=SHARE, default=0.1, help="--pose: share of rows whose hole is grey, for calls without a pose (default 0.1)")  # fmt: skip
    add("--trainable", choices=AdapterSettings.choices("trainable"), help="which UNet weights learn (default self_attention)")  # fmt: skip
    add("--lora_rank", type=POSITIVE_COUNT, help="learn low-rank updates of these weights instead, in diffusers' LoRA format (default off)")  # fmt: skip
    add("--cloth_dropout", type=SHARE, default=0.1, help="share of rows that see no cloth, for guidance (default 0.1)")
    add("--guidance_scale", type=NOT_NEGATIVE, help="recommended in the adapter (default: the best of seven, tried at the end on 16 test persons, else 7.5)")  # fmt: skip
    add("--guidance_distillation", type=POSITIVE, metavar="W", help="learn what the weights that the run begins from see with guidance W, arXiv:2210.03142: half the work of a call (default off)")  # fmt: skip
    add("--perceptual_loss", choices=("latent", "lpips"), help="add what the VAE's decoder (LPL, arXiv:2411.04873) or LPIPS (needs torchvision and torchmetrics, and downloads VGG) sees of the error in the mask (default off)")  # fmt: skip
    add("--perceptual_weight", type=POSITIVE, default=1.0, help="its weight (default 1)")
    add("--perceptual_max_timestep", type=COUNT, default=500, help="the noisiest timestep that it looks at (default 500)")  # fmt: skip
    add("--adversarial_weight", type=POSITIVE, help="add what a discriminator of noised latents holds against the predicted ones, as LADD, arXiv:2403.12015; untried at SD1.5's size, on the demo 1 was tried (default off)")  # fmt: skip
    add("--adversarial_start_step", type=COUNT, default=1000, help="updates before it begins (default 1000)")
    add("--snr_gamma", type=POSITIVE, help="Min-SNR weighting of the loss, arXiv:2303.09556; 5 is usual (default off)")
    add("--dream_detail_preservation", type=POSITIVE, help="DREAM's p, arXiv:2312.00210; CatVTON trained with 10 (default off)")  # fmt: skip


def add_optimisation_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("optimisation").add_argument
    add("--train_batch_size", type=POSITIVE_COUNT, default=4, help="pairs a step and process (default 4)")
    add("--gradient_accumulation_steps", type=POSITIVE_COUNT, default=1, help="batches an update (default 1)")
    add("--num_train_epochs", type=POSITIVE_COUNT, default=100, help="passes over the pairs (default 100)")
    add("--max_train_steps", type=POSITIVE_COUNT, help="updates; overrides --num_train_epochs")
    add("--learning_rate", type=POSITIVE, default=1e-4, help="AdamW's highest rate (default 1e-4)")
    add("--lr_scheduler", default="default", choices=("default", *SCHEDULES), help="default: warm-up from a tenth of the rate, then cosine to 1e-6; or one of diffusers'")  # fmt: skip
    add("--lr_warmup_steps", type=COUNT, help="updates of warm-up (default: 5 epochs, at most a tenth of the run)")
    add("--adam_weight_decay", type=NOT_NEGATIVE, default=0.01, help="AdamW's; its betas are 0.9 and 0.999 (default 0.01)")  # fmt: skip
    add("--use_8bit_adam", action="store_true", help="bitsandbytes' AdamW: a quarter of the optimiser's memory")
    add("--max_grad_norm", type=POSITIVE, default=1.0, help="gradient clipping (default 1.0)")
    add("--ema_decay", type=DECAY, default=0.9999, help="averages the published weights (default 0.9999, 0 is off)")
    add("--gradient_checkpointing", action="store_true", help="less memory, more time")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: accelerate's configuration")
    add("--allow_tf32", action="store_true", help="faster float32 products on Ampere and later GPUs")
    add("--torch_compile", action="store_true", help="compile the UNet with inductor")
    add("--seed", type=SEED, default=0, help="seed of order, noise, dropout and augmentation (default 0)")


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("checkpoints and reports").add_argument
    add("--checkpointing_steps", type=POSITIVE_COUNT, default=500, help="updates between checkpoints (default 500)")
    add("--checkpoints_total_limit", type=COUNT, default=3, help="how many checkpoints stay (default 3, 0 keeps all)")
    add("--resume_from_checkpoint", help="a checkpoint folder, or latest")
    add("--overwrite_output_dir", action="store_true", help="discard what an earlier run left in --output_dir")
    add("--validation_steps", type=POSITIVE_COUNT, default=500, help="updates between validations (default 500)")
    add("--num_validation_pairs", type=COUNT, default=4, help="unpaired test lines drawn at a validation (default 4)")
    add("--report_to", choices=TRACKERS, default="tensorboard", metavar="NAME", help="tensorboard (default), wandb, trackio, another of accelerate's, or none")  # fmt: skip
    add("--push_to_hub", action="store_true", help="upload the adapter with its code and a card")
    add("--hub_model_id", help="the repository (default: named as the output folder)")
    add("--hub_strategy", choices=("end", "every_save"), default="end", help="when to upload (default end)")
    add("--hub_private_repo", action="store_true", help="make it a private repository")
    add("--hub_license", metavar="ID", help="of the weights, for the card, such as cc-by-nc-4.0 (default: what is known of --init_adapter's, or of the base's)")  # fmt: skip


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """One sentence for what argparse cannot see by itself."""
    if args.output_dir.exists() and not args.output_dir.is_dir():
        parser.error(f"--output_dir must be a folder, got the file {args.output_dir}")
    if (args.height is None) != (args.width is None):
        parser.error(f"--height and --width go together, got {args.height} and {args.width}")
    if args.resolutions and (args.height or args.streaming):
        parser.error("--resolutions takes the place of --height and --width, and sorts all pairs, which --streaming cannot")  # fmt: skip
    resumed = args.resume_from_checkpoint
    if resumed not in {None, "latest"} and not (Path(resumed) / "progress.json").is_file():
        parser.error(f"--resume_from_checkpoint must be latest or a checkpoint's folder, got {resumed}")
    if (args.dataset_root is None) == (args.dataset_name is None):
        parser.error(f"give --dataset_root or --dataset_name, got {args.dataset_root} and {args.dataset_name}")
    if args.overwrite_output_dir and args.resume_from_checkpoint == "latest":
        parser.error("--overwrite_output_dir would discard what --resume_from_checkpoint latest looks for: give one of them")  # fmt: skip
    if args.streaming and (args.dataset_name is None or args.max_train_steps is None):
        parser.error("--streaming needs --dataset_name and, its length being unknown, --max_train_steps")
    if args.category != "all" and args.dataset_root is None:
        parser.error(f"--category {args.category} needs --dataset_root in DressCode's layout")
    if args.cache_latents and (args.augment or args.streaming or args.caption_column):
        parser.error("--cache_latents would freeze --augment, and knows neither --streaming nor --caption_column")
    if args.guidance_distillation and args.dream_detail_preservation:
        parser.error("--dream_detail_preservation moves the noise that --guidance_distillation does not learn: give one of them")  # fmt: skip
    if args.guidance_distillation and (args.perceptual_loss or args.adversarial_weight):
        parser.error("--guidance_distillation learns no pictures, of which --perceptual_loss and --adversarial_weight judge: give one of them")  # fmt: skip
    if args.guidance_distillation and not args.init_adapter:
        parser.error(
            f"--guidance_distillation {args.guidance_distillation:g} learns from an adapter: give --init_adapter"
        )
    if args.guidance_distillation and args.guidance_scale is None:
        args.guidance_scale = 1.0  # what is learnt needs no guidance
    if args.lr_scheduler == "polynomial" and args.learning_rate <= POLYNOMIAL_END:
        parser.error(f"--lr_scheduler polynomial ends at a rate of {POLYNOMIAL_END:g}: --learning_rate must be more, got {args.learning_rate:g}")  # fmt: skip
    if args.lora_rank and args.push_to_hub:
        parser.error("--push_to_hub uploads an adapter and its code: upload a LoRA's OUTPUT_DIR with hf upload")
    if args.lora_rank and args.init_adapter:
        parser.error("--lora_rank learns an update of the base alone: an adapter to begin from is trained whole")


def check_settings(args: argparse.Namespace) -> None:
    """ValueError for flags that do not fit together, once it is known what an adapter to begin from says of them."""
    parser = new_parser()
    for name, others in NEEDS.items():
        value = getattr(args, name)
        for other in others:
            if value != parser.get_default(name) and not getattr(args, other):
                raise ValueError(f"--{name} {value} needs --{other}")
    if args.caption_column and (args.dataset_name is None or args.cross_attention != "prompt"):
        raise ValueError(f"--caption_column {args.caption_column} needs --dataset_name and --cross_attention prompt")
    if args.prompt and args.cross_attention != "prompt":
        raise ValueError(f"--prompt {args.prompt} needs --cross_attention prompt")
    if args.mask_free and "mask" in args.augment:
        raise ValueError("--augment mask loosens masks, and --mask_free has none")
    if args.num_cloths > 1 and args.cloth_conditioning == "joint":
        raise ValueError(
            f"--num_cloths {args.num_cloths} needs --cloth_conditioning reference: a joint canvas holds one cloth"
        )
    if args.pose and args.mask_free:
        raise ValueError("--pose paints into the hole that a mask leaves, and --mask_free has none")
    if args.lora_rank and args.trainable not in {"self_attention", "attention"}:
        raise ValueError(f"--lora_rank needs --trainable self_attention or attention, got {args.trainable}")


def settle(args: argparse.Namespace, said: dict[str, Any]) -> None:
    """Give the flags of `ADAPTER_FLAGS` what is `said` of them; ValueError names one that was given and disagrees."""
    for name in ADAPTER_FLAGS:
        given = getattr(args, name)
        if given not in {None, said[name]}:
            raise ValueError(f"--{name} {given}: --init_adapter {args.init_adapter} was trained with {said[name]}")
        setattr(args, name, said[name])


# ---------------------------------------------------------------------------------------------------------------- data


def cloth_roles(num_cloths: int) -> list[str]:
    """What the pictures of a person's cloths are called: cloth, cloth_2, and so on."""
    return ["cloth", *(f"cloth_{number}" for number in range(2, num_cloths + 1))]


def is_cloth(role: str) -> bool:
    return role.partition("_")[0] == "cloth"


@dataclass
class Preparation:
    """Makes of a pair's pictures what a step reads, and of its place in the run the seed of all that is random about it.

    An item holds `person` and `cloth` (3, H, W) of uint8, `mask` (1, H, W) 0 or 1, mask-free `condition` and, where asked for,
    `pose` (3, H, W), its `name`, and a `seed`, so that neither workers nor processes nor a resumed run change what is drawn.
    Persons, masks, conditions and poses are stretched, cloths are fitted on white, as in the pipeline. Of several cloths, `cloth`
    is (num_cloths, 3, H, W), and `worn` (num_cloths,) is 0 for those that a person has not, which are white.
    """

    height: int
    width: int
    seed: int = 0
    augment: Collection[str] = ()
    num_cloths: int = 1

    def tag(self, name: str, epoch: int, index: int) -> dict[str, Any]:
        return {"name": name, "seed": int(np.random.SeedSequence([self.seed, epoch, index]).generate_state(1)[0])}

    def __call__(self, pictures: dict[str, Image.Image], epoch: int, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.seed, epoch, index, 1])
        pictures = self.recolor(self.move(pictures, rng), rng)
        size = {"height": self.height, "width": self.width}
        pictures |= {role: fit_cloth(pictures[role], **size) for role in pictures if is_cloth(role)}
        item = {role: to_pixels(picture, **size) for role, picture in pictures.items()}
        if "mask" not in item:  # mask-free
            item["mask"] = torch.ones(1, self.height, self.width)
        if self.num_cloths > 1:
            roles, white = cloth_roles(self.num_cloths), torch.full_like(item["cloth"], 255)
            worn = torch.tensor([float(role in item) for role in roles])
            item |= {"cloth": torch.stack([item.pop(role, white) for role in roles]), "worn": worn}
        if "mask" in self.augment:
            item["mask"] = loosen(item["mask"], rng)
        return item

    def move(self, pictures: dict[str, Image.Image], rng: np.random.Generator) -> dict[str, Image.Image]:
        """Mirror every picture, or none; show the same part, at least 4/5 a side, of all but the cloth."""
        pictures = dict(pictures)
        if "flip" in self.augment and rng.random() < 0.5:
            pictures = {role: ImageOps.mirror(picture) for role, picture in pictures.items()}
        if "crop" in self.augment:
            side = rng.uniform(0.8, 1)
            left, top = rng.uniform(0, 1 - side, 2)
            for role in [role for role in pictures if not is_cloth(role)]:
                width, height = pictures[role].size
                box = (left * width, top * height, (left + side) * width, (top + side) * height)
                pictures[role] = pictures[role].crop(tuple(round(edge) for edge in box))
        return pictures

    def recolor(self, pictures: dict[str, Image.Image], rng: np.random.Generator) -> dict[str, Image.Image]:
        """One gamma a channel, alike on person, condition and cloth: another light in which black and white stay."""
        if "color" in self.augment:
            gamma = 2 ** rng.uniform(-0.4, 0.4, (3, 1))
            table = np.rint(255 * (np.arange(256) / 255) ** gamma).astype(int).flatten().tolist()
            pictures |= {role: picture.point(table) for role, picture in pictures.items() if role not in UNLIT}
        return pictures


def to_pixels(picture: Image.Image, height: int, width: int) -> Tensor:
    """An RGB image as (3, height, width) of uint8, or a grey one as a mask (1, height, width) of 0 and 1, by PIL's LANCZOS."""
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    if picture.mode == "L":
        return (torch.from_numpy(np.array(picture))[None] >= 128).float()
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def to_values(batch: dict[str, Any]) -> dict[str, Any]:
    """The same with its uint8 pictures in [-1, 1], where they are; bit for bit what `VaeImageProcessor.preprocess` makes of them.

    Reading processes hand over bytes: a quarter of the memory, and half of their work.
    """
    pictures = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.dtype == torch.uint8}
    return batch | {k: v.float().div_(255).mul_(2).sub_(1) for k, v in pictures.items()}


def loosen(mask: Tensor, rng: np.random.Generator) -> Tensor:
    """A mask (1, H, W) that tells less of the cloth that is worn: itself, its hull or its box, grown by up to H/16 pixels.

    Every other one stays as it is, since such masks are what a model will meet too.
    """
    reach, shape = round(rng.uniform(0, mask.shape[1] / 16)), rng.choice(["own", "hull", "box"])
    region = mask[0] >= 0.5
    if rng.random() < 0.5 or not region.any():
        return mask
    if shape == "hull":
        region = torch.from_numpy(np.array(convex_hull(region))) > 0
    if shape == "box":
        top, bottom, left, right = extent(region)
        region[top:bottom, left:right] = True
    return grow(region, reach)[None].to(mask.dtype)


def open_picture(open_file: Callable[[], Image.Image], name: str, role: str) -> Image.Image:
    """A whole picture, with its colour profile; ValueError where it cannot be read, or should be a mask or a pose and is none."""
    try:
        picture = open_file()
        return {"mask": as_mask_image, "pose": as_pose_image}.get(role, as_image)(picture, name)
    except UNREADABLE as error:
        raise ValueError(f"{name} cannot be read: {error}") from error


def in_persons_colours(pictures: dict[str, Image.Image], where: str) -> dict[str, Image.Image]:
    """The same pictures by role, all in the colour profile of the person, as a call has them; `where` is for the error."""
    profile = pictures["person"].info.get("icc_profile")
    for role in pictures.keys() - {"person", *UNLIT}:
        before = pictures[role].info.get("icc_profile")
        if before != profile:
            try:
                converted = convert_profile(as_tensors(pictures[role], role)[0], before, profile)
            except ValueError as error:
                raise ValueError(f"{where}: the {role} in the person's colours: {error}") from error
            pictures[role] = as_pil(converted, profile)
    return pictures


def picture_size(file: Path | BinaryIO, where: str) -> tuple[int, int]:
    """Width and height as shown, from the file's head alone."""
    try:
        with Image.open(file) as picture:
            turn = None if picture.format == "TIFF" else exif_turn(picture)  # PIL has turned a TIFF's size already
            return picture.size[::-1] if turn in QUARTER_TURNS else picture.size
    except UNREADABLE as error:
        raise ValueError(f"{where}: {file} cannot be read: {error}") from error


def check_sizes(sizes: dict[str, tuple[int, int]], where: str) -> None:
    """Mask and condition have their person's size and the pose its aspect, or one sentence says which has not."""
    for role in sizes:
        fits = same_aspect if role == "pose" else operator.eq
        if not is_cloth(role) and not fits(sizes[role], sizes["person"]):
            raise ValueError(f"{where}: the {role} has size {sizes[role]}, its person {sizes['person']}")


def fault_or(work: Callable, *arguments: Any) -> Any:
    """What the work returns, or the OSError or ValueError that it raises."""
    try:
        return work(*arguments)
    except (OSError, ValueError) as error:
        return error


def raise_together(found: Sequence[Any]) -> None:
    """The errors that are in `found` as one, if there are any: the first few and how many more."""
    errors = [each for each in found if isinstance(each, Exception)]
    if errors:
        told = "; ".join(dict.fromkeys(map(str, errors[:FAULTS_TOLD])))
        more = f"; and {len(errors) - FAULTS_TOLD} more" if len(errors) > FAULTS_TOLD else ""
        raise type(errors[0])(f"{told}{more}") from errors[0]


def evenly(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly spread."""
    count = min(count, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]  # the middles of equal parts


def find_list(place: Path, split: str, paired: bool) -> tuple[Path, str]:
    """The list of a split that comes nearest to what is asked for, and its kind: `_paired`, `_unpaired` or nothing."""
    kinds = ("_paired", "", "_unpaired")
    for kind in kinds if paired else kinds[::-1]:
        if (file := place / f"{split}_pairs{kind}.txt").is_file():
            return file, kind
    raise FileNotFoundError(
        f"--dataset_root: there is no {split}_pairs.txt in {place}; VITON-HD and DressCode have it"
    )


NAMES_A_PAIR = "must name a person and a cloth, with a tab between them where names have spaces"


def read_lines(file: Path) -> Iterator[tuple[list[str], str]]:
    """The words of every line and its place, of a text in UTF-8, or in UTF-16 with its mark, as Windows writes it."""
    text = file.read_bytes()
    encoding = "utf-16" if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        lines = text.decode(encoding).splitlines()
    except UnicodeDecodeError as error:
        place = text[: error.start].count(b"\n") + 1
        raise ValueError(f"{file}, line {place}: is not {encoding.removesuffix('-sig').upper()}: {error}") from error
    for number, line in enumerate(map(str.strip, lines), start=1):
        if line:
            words = line.split("\t") if "\t" in line else line.split()
            yield [word.strip() for word in words], f"{file}, line {number}"


def read_list(file: Path) -> list[tuple[str, str, str]]:
    """Person, cloth, and the place of every line."""
    pairs = []
    for names, where in read_lines(file):
        if len(names) != 2:
            raise ValueError(f"{where}: {NAMES_A_PAIR}, got {' '.join(names)!r}")
        pairs.append((*names, where))
    return pairs


DRESS_CODE_FOLDERS = ("upper_body", "lower_body", "dresses")
SHUFFLED_FROM = 100  # lines
FAULTS_TOLD = 5  # of a dataset's


class TreePairs:
    """Pairs of a folder in VITON-HD's or DressCode's layout.

    VITON-HD: `{split}/{image,cloth,agnostic-mask}`, the mask NAME_mask.png or NAME.png, and `{split}_pairs.txt`.
    DressCode: `{upper_body,lower_body,dresses}/{images,agnostic_masks}`, the person ID_0, the cloth ID_1, the mask ID_0.png,
    and the lists in every category. A line names person and cloth; a list may end in `_paired` or `_unpaired`.

    Training lists count as they stand, but for a long one that pairs hardly anybody with their own cloth: a shuffled list, as
    there are of VITON-HD, from which everybody is trained in their own. `train_pairs_paired.txt` always counts.

    Args:
        root: the folder.
        split: `train` or `test`.
        paired: every person in a cloth that they wear; or, of `test`, with somebody else's.
        roles: which pictures to read; a mask-free `condition` is the person in another cloth.
        category: of DressCode's layout `upper_body`, `lower_body` or `dresses`, or all that are there.
        condition_folder: where conditions lie, beside the persons' folder and by the persons' names.
        pose_folder: where poses lie, beside the persons' folder and by the names of `pose_names`; None is the layout's own.
        limit: take no more pairs than this, evenly spread; None takes all.
        index: keep here what is learnt of the files: only those that were written since are opened again.
        checked: another process has just checked these pairs, and its `index` is believed.

    Raises:
        FileNotFoundError, ValueError: a list or a picture is missing or wrong; the sentence names list and line.
    """

    POSES: ClassVar[str] = "openpose_img"

    def __init__(
        self,
        root: Path,
        split: str,
        paired: bool,
        roles: Collection[str] = ("person", "cloth", "mask"),
        category: str = "all",
        condition_folder: str = "condition",
        limit: int | None = None,
        index: Path | None = None,
        checked: bool = False,
        pose_folder: str | None = None,
    ) -> None:
        self.root, self.roles, self.condition_folder = root, roles, condition_folder
        folders = [folder for folder in DRESS_CODE_FOLDERS if (root / folder).is_dir()]
        self.dress_code = bool(folders)
        self.pose_folder = pose_folder or ("skeletons" if self.dress_code else self.POSES)
        self.pairs: list[tuple[str, str, dict[str, Path]]] = []  # name, list and line, files
        # role and file: bytes, nanosecond of writing, width, height
        self.learnt: dict[tuple[str, str], list[int]] = {}
        if checked or (index is not None and index.is_file()):
            self.read_index(index)
        if checked:
            return
        if category != "all":
            if category not in folders:
                raise FileNotFoundError(
                    f"category {category!r} needs the folder {root / category} of DressCode's layout"
                )
            folders = [category]
        self.pairs = self.listed_files(folders or [split], split, paired)
        self.pairs = self.pairs if limit is None else evenly(self.pairs, limit)
        self.check()
        if index is not None:
            self.write_index(index)

    @property
    def further_cloths(self) -> list[str]:
        """The roles of a person's cloths beside the first."""
        return [role for role in self.roles if is_cloth(role) and role != "cloth"]

    def listed_files(self, folders: list[str], split: str, paired: bool) -> list[tuple[str, str, dict[str, Path]]]:
        """Name, list and line, and files of all pairs."""
        found = []
        for folder in folders:
            for person, cloth, where in self.named_pairs(folder, split, paired):
                found.append((f"{person} {cloth}", where, self.files(folder, person, cloth)))
        for role in self.further_cloths:
            if not any(role in files for *_, files in found):
                raise FileNotFoundError(
                    f"--num_cloths: nobody in {self.root} has a {role}: {split}/{role}/CLOTH holds them"
                )
        return found

    def named_pairs(self, folder: str, split: str, paired: bool) -> list[tuple[str, str, str]]:
        """Person, cloth, and list and line, of one folder."""
        file, kind = find_list(self.root / folder if self.dress_code else self.root, split, paired)
        lines = read_list(file)
        if not lines:
            raise ValueError(f"{file} names no pairs")
        persons, cloths, places = zip(*lines)
        own = tuple(re.sub(r"_0(?=\.\w+$)", "_1", person) if self.dress_code else person for person in persons)
        if not paired:
            if kind == "_paired" or cloths == own:
                cloths = cloths[1:] + cloths[:1]
        elif kind == "_unpaired" or (kind == "" and split == "test"):
            if not any(self.cloth_file(folder, cloth).is_file() for cloth in own):
                instead = f"list the pairs in {split}_pairs_paired.txt"
                raise FileNotFoundError(
                    f"{file} does not say who wears which cloth, nor do the cloths' names: {instead}"
                )
            cloths = own
        elif kind == "" and self.is_shuffled(folder, cloths, own):
            logging.getLogger("train_vton").warning(
                "%s pairs hardly anybody with their own cloth: everybody is trained in their own; name it "
                "%s_pairs_paired.txt to train it as it stands", file, split,
            )  # fmt: skip
            cloths = own
        return list(zip(persons, cloths, places))

    def is_shuffled(self, folder: str, cloths: Sequence[str], own: Sequence[str]) -> bool:
        rarely = sum(map(operator.eq, cloths, own)) < len(own) / 10
        return len(own) >= SHUFFLED_FROM and rarely and all(self.cloth_file(folder, cloth).is_file() for cloth in own)

    def cloth_file(self, folder: str, cloth: str) -> Path:
        return inside(self.root, folder, "images" if self.dress_code else "cloth", cloth)

    def files(self, folder: str, person: str, cloth: str) -> dict[str, Path]:
        persons, masks = ("images", "agnostic_masks") if self.dress_code else ("image", "agnostic-mask")
        files = {"person": inside(self.root, folder, persons, person), "cloth": self.cloth_file(folder, cloth)}
        for role in self.further_cloths:  # who has no such file wears fewer
            if not self.dress_code and (file := inside(self.root, folder, role, cloth)).is_file():
                files[role] = file
        if "mask" in self.roles:
            named = [inside(self.root, folder, masks, Path(person).stem + end) for end in ("_mask.png", ".png")]
            files["mask"] = named[1] if self.dress_code or named[1].is_file() else named[0]
        if "condition" in self.roles:
            files["condition"] = inside(self.root, folder, self.condition_folder, person)
        if "pose" in self.roles:
            places = [inside(self.root, folder, self.pose_folder, name) for name in self.pose_names(person)]
            files["pose"] = next((place for place in places if place.is_file()), places[0])
        return {role: files[role] for role in self.roles if role in files}

    def pose_names(self, person: str) -> list[str]:
        """What a person's pose may be called: NAME_rendered or NAME; DressCode's ID_5 (skeletons, dense) or ID_4 (label_maps)."""
        stem, suffix = Path(person).stem, Path(person).suffix
        stems = [re.sub("_0$", end, stem) for end in ("_5", "_4")] if self.dress_code else [f"{stem}_rendered"]
        return [name + end for name in (*stems, stem) for end in dict.fromkeys((".png", suffix, ".jpg"))]

    def check(self) -> None:
        """Every file is there and can be read, the masks are masks; those known already are not opened again."""
        looked_at = [(role, file, where) for _, where, files in self.pairs for role, file in files.items()]
        with ThreadPoolExecutor() as readers:
            learnt = readers.map(lambda one: fault_or(self.look_at, *one), looked_at)
            learnt = list(tqdm(learnt, desc="check the files", total=len(looked_at), delay=3))
        raise_together(learnt)
        self.learnt = {(role, str(file)): facts for (role, file, _), facts in zip(looked_at, learnt)}
        sizes = [
            ({role: tuple(self.learnt[role, str(file)][2:]) for role, file in files.items()}, where)
            for _, where, files in self.pairs
        ]
        raise_together([fault_or(check_sizes, *one) for one in sizes])

    def look_at(self, role: str, file: Path, where: str) -> list[int]:
        if not file.is_file():
            raise FileNotFoundError(f"{where}: there is no {file.relative_to(self.root)}")
        stat, known = file.stat(), self.learnt.get((role, str(file)), [])
        if known[:2] == [stat.st_size, stat.st_mtime_ns]:
            return known
        size = open_picture(partial(Image.open, file), f"{where}: {file}", role).size
        return [stat.st_size, stat.st_mtime_ns, *size]

    def read_index(self, index: Path) -> None:
        content = json.loads(index.read_text(encoding="utf-8"))
        for name, where, files in content["pairs"]:
            self.pairs.append((name, where, {role: Path(file) for role, file in files.items()}))
        self.learnt = {(role, file): facts for role, file, *facts in content["learnt"]}

    def write_index(self, index: Path) -> None:
        pairs = [(name, where, {role: str(file) for role, file in files.items()}) for name, where, files in self.pairs]
        write_text(
            index, json.dumps({"pairs": pairs, "learnt": [(*key, *facts) for key, facts in self.learnt.items()]})
        )

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return self.pairs[index][0]

    def pictures(self, index: int) -> dict[str, Image.Image]:
        """Person, cloth, and mask or condition, at their own sizes."""
        _, where, files = self.pairs[index]
        opened = {
            role: open_picture(partial(Image.open, file), f"{where}: {file}", role) for role, file in files.items()
        }
        return in_persons_colours(opened, where)

    def person_sizes(self) -> list[tuple[int, int]]:
        """Widths and heights."""
        return [tuple(facts[2:]) for (role, _), facts in self.learnt.items() if role == "person"]

    def person_size(self, index: int) -> tuple[int, int]:
        return tuple(self.learnt["person", str(self.pairs[index][2]["person"])][2:])

    def identity(self) -> list:
        """What a cache of these pairs depends on: the files, their sizes and when they were written."""
        files = [(role, str(file)) for _, _, files in self.pairs for role, file in files.items()]
        return self.further_cloths + [(file, *self.learnt[role, file][:2]) for role, file in files]


class OutfitPairs(TreePairs):
    """Persons and all their cloths, of a folder in DressCode-MR's layout.

    `{train,test}.jsonl`, and `test_unpair.jsonl` with other cloths (without it, the next person's are taken), name the file of every
    person in `person`, and of their cloths in `upper`, `lower` and `overall`, empty where there is none; shoes and bags are passed
    over. Masks, which are not shipped, and poses lie in `annotations/agnostic-mask` and `annotations/dwpose`, beside the folder
    `person` and by its names, as PNG.

    Args: as for `TreePairs`; its `pose_folder` is one of `annotations`.
    """

    CLOTHS: ClassVar[tuple[str, ...]] = ("upper", "lower", "overall")
    POSES: ClassVar[str] = "dwpose"

    @staticmethod
    def list_of(root: Path, split: str, paired: bool = True) -> Path:
        return root / f"{split}{'' if paired else '_unpair'}.jsonl"

    def listed_files(self, folders: list[str], split: str, paired: bool) -> list[tuple[str, str, dict[str, Path]]]:
        found, file = [], self.list_of(self.root, split, paired)
        shuffled = not paired and not file.is_file()
        file = self.list_of(self.root, split) if shuffled else file
        for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if text.strip():
                found.append((f"{file}, line {number}", *self.named_in(text, f"{file}, line {number}")))
        if not found:
            raise ValueError(f"{file} names no persons")
        outfits = [cloths for _, _, *cloths in found]
        outfits = outfits[1:] + outfits[:1] if shuffled else outfits
        return [
            (" ".join([person, *cloths]), where, self.outfit_files(person, cloths, where))
            for (where, person, *_), cloths in zip(found, outfits)
        ]

    def named_in(self, text: str, where: str) -> list[str]:
        """The files of a line's person and cloths."""
        try:
            row = json.loads(text)
            names = [row["person"], *(row[kind] for kind in self.CLOTHS if row.get(kind))]
            inside_person = re.search("(^|/)person/", names[0])
            " ".join(names)  # texts, all of them
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            need = "must be a JSON object with the files of a person and their cloths"
            raise ValueError(f"{where}: {need}, got {text.strip()!r}") from error
        if not inside_person:
            raise ValueError(f"{where}: the person must lie in a folder person, got {names[0]}")
        return names

    def outfit_files(self, person: str, cloths: list[str], where: str) -> dict[str, Path]:
        roles = [role for role in self.roles if is_cloth(role)]
        if not 1 <= len(cloths) <= len(roles):
            raise ValueError(f"{where}: names {len(cloths)} cloths, and --num_cloths is {len(roles)}")
        files = {role: inside(self.root, cloth) for role, cloth in zip(roles, cloths)}
        files["person"] = inside(self.root, person)
        for role, folder in (("mask", "agnostic-mask"), ("pose", self.pose_folder)):
            beside = re.sub(r"(^|/)person/", rf"\1annotations/{folder}/", person, count=1)
            files[role] = inside(self.root, str(Path(beside).with_suffix(".png")))
        if "condition" in self.roles:  # as tryon.py --one_each writes it
            beside = re.sub(r"(^|/)person/", rf"\1{self.condition_folder}/", person, count=1)
            files["condition"] = inside(self.root, beside)
        return {role: files[role] for role in self.roles if role in files}


def inside(root: Path, *parts: str) -> Path:
    """A path below `root`, whose last part is a list's and leads down alone; ValueError where it does not."""
    path, last = Path(os.path.abspath(root.joinpath(*parts))), Path(parts[-1])
    if last.is_absolute() or ".." in last.parts or not path.is_relative_to(os.path.abspath(root)):
        raise ValueError(f"--dataset_root: {parts[-1]} leads out of {root.joinpath(*parts[:-1])}")
    return root.joinpath(*parts)


def write_text(file: Path, text: str) -> None:
    """All of a text or none of it."""
    with whole_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


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

    def person_sizes(self) -> list[tuple[int, int]]:
        """Widths and heights of some, evenly spread."""
        person = {"person": self.columns["person"]}
        if hasattr(self.rows, "__len__"):
            some = ((i, self.rows[i]) for i in evenly(range(len(self)), SIZED_ROWS))
        else:  # a stream: its first
            some = enumerate(self.rows.take(SIZED_ROWS))
        return [row_pictures(row, person, self.name(i))["person"].size for i, row in some]

    def person_size(self, index: int) -> tuple[int, int]:
        name, column = self.name(index), self.columns["person"]
        cell = filled(self.rows[index][column], f"{name}: the column {column}")
        picture = Path(cell["path"]) if cell["bytes"] is None else io.BytesIO(cell["bytes"])
        return picture_size(picture, f"{name}, column {column}")

    def identity(self) -> list:
        return [self.rows._fingerprint, self.columns]


@dataclass(eq=False)
class PairDataset(Dataset):
    """Items that `prepare` makes of the pictures of `pairs`, with this epoch's seeds; and texts, where there are any."""

    pairs: TreePairs | RowPairs
    prepare: Preparation
    captions: Sequence[str] | None = None

    def __post_init__(self) -> None:
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # reading processes outlast an epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.pairs)

    def tag(self, index: int) -> dict[str, Any]:
        name = self.pairs.name(index)
        caption = {} if self.captions is None else {"caption": filled(self.captions[index], f"{name}: the caption")}
        return self.prepare.tag(name, int(self.epoch), index) | caption

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.prepare(self.pairs.pictures(index), int(self.epoch), index) | self.tag(index)


@dataclass(eq=False)
class StreamedPairs(IterableDataset):
    """The same of process `rank`'s part of a streamed dataset, epoch after epoch.

    An item's `place` is its epoch and how many of the part's rows were read by then; `start` is one to go on from: earlier
    epochs are not read again, earlier rows of that epoch are passed over, undecoded, since a shuffled stream draws from them.
    """

    rows: Any
    columns: dict[str, str]
    prepare: Preparation
    rank: int
    processes: int
    caption_column: str | None = None
    start: tuple[int, int] = (0, 0)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        first, skip = self.start
        for epoch in itertools.count(first):
            self.rows.set_epoch(epoch)
            place = 0
            for place, row in enumerate(self.rows, start=1):
                if skip > 0:
                    skip -= 1
                    continue
                index = self.rank + (place - 1) * self.processes
                name = f"row {index} of the stream"
                item = self.prepare(row_pictures(row, self.columns, name), epoch, index)
                if self.caption_column:
                    item["caption"] = filled(row[self.caption_column], f"{name}: the caption")
                yield item | self.prepare.tag(name, epoch, index) | {"place": (epoch, place)}
            if place == 0:
                raise ValueError("--dataset_name has no rows for this process")


def column_of(args: argparse.Namespace, role: str) -> str:
    """Named by the flag of a role; further cloths' are named after the first's."""
    return args.cloth_column + role.removeprefix("cloth") if is_cloth(role) else getattr(args, f"{role}_column")


def load_rows(args: argparse.Namespace, split: str, columns: dict[str, str]) -> Any:
    """A split of --dataset_name with its pictures undecoded."""
    datasets = optional("datasets", "dataset_name")
    rows = datasets.load_dataset(args.dataset_name, args.dataset_config_name, split=split, streaming=args.streaming)
    known = rows.column_names
    if known is None:  # a stream of CSV files
        raise ValueError(f"--streaming: {args.dataset_name} names no columns ahead, as parquet, JSON and pictures do")
    for role, column in {**columns, "caption": args.caption_column}.items():
        if column is not None and column not in known:
            flag = "num_cloths" if is_cloth(role) and role != "cloth" else f"{role}_column"
            raise ValueError(f"--{flag}: {args.dataset_name} has the columns {', '.join(known)}, not {column}")
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
        if row[column] is None and is_cloth(role) and role != "cloth":
            continue  # who has none wears fewer
        cell = filled(row[column], f"{name}: the column {column}")
        opened[role] = open_picture(partial(decode, cell), f"{name}, column {column}", role)
    check_sizes({role: picture.size for role, picture in opened.items()}, name)
    return in_persons_colours(opened, name)


@dataclass(eq=False)
class LatentCache(PairDataset):
    """The same with what the VAE makes of the pictures, encoded once: safetensors shards in `folder`, tensors (N, ...)."""

    folder: Path = field(kw_only=True)
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
            batches = DataLoader(part, collate_fn=collate, **loading)
            encoded = [encode(batch) for batch in map(to_values, batches)]
            tensors = {name: torch.cat([batch[name].cpu() for batch in encoded]).contiguous() for name in encoded[0]}
            with whole_file(self.shard(start)) as temporary:
                save_file(tensors, temporary)
        logger.info("wrote %d of %d shards of latents in %.0f s", len(missing), len(starts), time.time() - started)
        accelerator.wait_for_everyone()


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """16 hexadecimal digits that stand for these very values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def cache_key(vae: AutoencoderKL, settings: AdapterSettings, pairs: TreePairs | RowPairs) -> str:
    """A name for everything that changes the latents: pictures, size, VAE, settings, and how pictures are read."""
    weights = [dict(vae.config), fingerprint(vae.state_dict().values()), str(vae.dtype)]
    said = [getattr(settings, name) for name in ("height", "width", "condition_latents", "mask_free")]
    key = json.dumps([READING, weights, said, pairs.identity()], default=str)
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def tree_pairs(root: Path, split: str, *args: Any, **options: Any) -> TreePairs:
    """A folder's pairs, in whichever layout it is."""
    return (OutfitPairs if OutfitPairs.list_of(root, split).is_file() else TreePairs)(root, split, *args, **options)


@dataclass(eq=False)
class PairsAtSizes(Dataset):
    """The same pairs at several sizes: an item is asked for by its size's place and its own."""

    sizes: list[PairDataset]

    @property
    def epoch(self) -> int:
        return int(self.sizes[0].epoch)

    def set_epoch(self, epoch: int) -> None:
        for dataset in self.sizes:
            dataset.set_epoch(epoch)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        size, index = place
        return self.sizes[size][index]


def nearest_aspect(height: int, width: int, resolutions: Sequence[tuple[int, int]]) -> list[int]:
    """The places of the resolutions (height, width) whose aspect is nearest to a person's: of all that have that one."""
    aspects = list(dict.fromkeys(Fraction(w, h) for h, w in resolutions))
    nearest = aspects[find_nearest_bucket(height, width, [(1, float(aspect)) for aspect in aspects])]
    return [place for place, (h, w) in enumerate(resolutions) if Fraction(w, h) == nearest]


def group_by_aspect(
    pairs: TreePairs | RowPairs, resolutions: Sequence[tuple[int, int]]
) -> list[tuple[list[int], list[int]]]:
    """For every aspect the places of its resolutions, and of the pairs whose persons are nearest to it."""
    if len({Fraction(w, h) for h, w in resolutions}) == 1:
        return [(list(range(len(resolutions))), list(range(len(pairs))))]
    groups, stretched = defaultdict(list), 0
    for index in tqdm(range(len(pairs)), desc="sort by aspect", delay=3):
        width, height = pairs.person_size(index)
        places = nearest_aspect(height, width, resolutions)
        groups[tuple(places)].append(index)
        stretched += stretches(*resolutions[places[0]], height / width)
    if unused := set(range(len(resolutions))) - set(itertools.chain(*groups)):
        height, width = resolutions[min(unused)]
        raise ValueError(f"--resolutions: no person's aspect is nearest to that of {height}x{width}: leave it out")
    if stretched:
        logger.warning("--resolutions: %d of %d persons are stretched by more than a tenth", stretched, len(pairs))
    return [(list(places), indices) for places, indices in groups.items()]


@dataclass(eq=False)
class ResolutionBatches(Sampler):
    """The batches of an epoch, every step at one resolution, with as many for every process.

    The pairs of an aspect are shuffled anew in every epoch and cut into steps, each at one of the aspect's resolutions, drawn; a
    last step that they do not fill takes some of them twice. `processes` batches in a row make a step: accelerate deals them
    out, so that the processes' batches are disjoint and of one size.
    """

    dataset: PairsAtSizes
    groups: list[tuple[list[int], list[int]]]  # places of resolutions, and of pairs
    batch_size: int  # of a process
    processes: int
    seed: int

    def __len__(self) -> int:
        rows = self.batch_size * self.processes
        return self.processes * sum(math.ceil(len(pairs) / rows) for _, pairs in self.groups)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rng = np.random.default_rng([self.seed, self.dataset.epoch, 2])
        rows, steps = self.batch_size * self.processes, []
        for sizes, pairs in self.groups:
            whole = np.resize(rng.permutation(pairs), math.ceil(len(pairs) / rows) * rows)  # goes around
            steps += [(rng.choice(sizes).item(), step.tolist()) for step in whole.reshape(-1, rows)]
        for place in rng.permutation(len(steps)):
            size, step = steps[place]
            for start in range(0, rows, self.batch_size):
                yield [(size, index) for index in step[start : start + self.batch_size]]


def load_pairs(
    args: argparse.Namespace, columns: dict[str, str], accelerator: accelerate.Accelerator
) -> TreePairs | RowPairs:
    """What to train on. The first process looks at every file of a tree, once, and the others believe it."""
    if args.dataset_root is None:
        return RowPairs(load_rows(args, "train", columns), columns)
    index, checked = args.output_dir / "train_pairs.json", not accelerator.is_main_process
    options = {"pose_folder": args.pose_folder, "index": index, "checked": checked}
    with accelerator.main_process_first():
        return tree_pairs(args.dataset_root, "train", True, columns, args.category, args.condition_column, **options)


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Items to a batch; seeds and places stay numbers of the host, as names do, and wait for no device."""
    kept = {name: [item[name] for item in items] for name in HOST_VALUES if name in items[0]}
    return default_collate([{k: v for k, v in item.items() if k not in kept} for item in items]) | kept


def draw(seeds: Iterable[int], shape: tuple[int, ...], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """What is random in a step, each row from its own seed: three noises (B, *shape) and two numbers (B,) in [0, 1).

    It is drawn on the CPU, whatever the device, and nobody waits for its way there.
    """
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        row = {name: torch.randn(shape, generator=generator) for name in ("noise", "cloth_noise", "posterior")}
        rows.append(row | {name: torch.rand((), generator=generator) for name in ("time", "dropout")})
    drawn = default_collate(rows)
    if torch.device(device).type == "cuda":
        drawn = {name: value.pin_memory() for name, value in drawn.items()}
    return {name: value.to(device, non_blocking=True) for name, value in drawn.items()}


def draw_share(seeds: Iterable[int], share: float) -> Tensor:
    """False in a share of the rows (B,), each from its own seed, apart from what else is drawn of it."""
    return torch.tensor([np.random.default_rng([seed, 1]).random() >= share for seed in seeds])


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


def lora_modules(trainable: str) -> str:
    """The layers that a LoRA of `--trainable` goes on, as a pattern of their names."""
    return rf".*\.({'|'.join(sorted(TRAINABLE_PARTS[trainable]))})\.(to_q|to_k|to_v|to_out\.0)"


def unet_target(scheduler: DDPMScheduler, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the UNet is to see, by the base's scheduler: the noise, or the velocity."""
    if scheduler.config.prediction_type == "epsilon":
        return noise
    return scheduler.get_velocity(clean, noise, timesteps)


def predicted_latents(scheduler: DDPMScheduler, noisy: Tensor, predicted: Tensor, timesteps: Tensor) -> Tensor:
    """The clean latents that follow from noisy ones and the noise, or the velocity, that is predicted of them."""
    alpha = scheduler.alphas_cumprod.to(noisy.device)[timesteps].view(-1, 1, 1, 1)
    if scheduler.config.prediction_type == "epsilon":
        return (noisy - (1 - alpha).sqrt() * predicted) / alpha.sqrt()
    return alpha.sqrt() * noisy - (1 - alpha).sqrt() * predicted


class PerceptualLoss:
    """How unlike predicted and true latents look in the hole that is painted, to a frozen network that knows pictures.

    `"latent"` compares what the blocks of the VAE's decoder make of them: LPL, arXiv:2411.04873, with features normalised by
    the true ones', and the l-th block weighing 2**-l. `"lpips"` compares decoded pictures, the true one's pixels standing around
    the hole, with VGG: arXiv:1801.03924. Rows noisier than `max_timestep` count nothing, since there is no picture in them yet.

    Raises:
        ImportError, OSError: LPIPS lacks torchvision, torchmetrics or its weights.
    """

    def __init__(self, kind: str, vae: AutoencoderKL, max_timestep: int, checkpointing: bool) -> None:
        self.vae, self.max_timestep, self.checkpointing = vae, max_timestep, checkpointing
        self.errors, self.lpips = self.decoder_errors, None
        if kind == "lpips":
            self.errors, self.lpips = self.picture_errors, load_lpips().to(vae.device)
            if checkpointing:
                vae.enable_gradient_checkpointing()

    def __call__(self, found: Tensor, clean: Tensor, hole: Tensor, timesteps: Tensor) -> Tensor:
        """The batch's mean, of scaled latents (B, 4, h, w), a mask (B, 1, h, w) and timesteps (B,)."""
        rows = timesteps <= self.max_timestep
        if not rows.any():
            return clean.new_zeros(())
        unscaled = (latents[rows] / self.vae.config.scaling_factor for latents in (found, clean))
        return self.errors(*unscaled, hole[rows]).sum() / len(timesteps)

    def decoder_errors(self, found: Tensor, clean: Tensor, hole: Tensor) -> Tensor:
        """(B,), from unscaled latents."""
        with torch.no_grad():
            true_features = self.decoder_features(clean)
        errors = torch.zeros(len(clean), device=clean.device)
        for level, (features, true) in enumerate(zip(self.decoder_features(found), true_features)):
            deviation, mean = torch.std_mean(true, dim=(2, 3), keepdim=True)
            compared = F.interpolate(hole, size=true.shape[-2:]) * ((true - mean).abs() < OUTLIER * deviation)
            squares = ((features - true) / (deviation + 1e-6)).square() * compared
            errors = errors + 2.0**-level * squares.sum(dim=(1, 2, 3)) / compared.sum(dim=(1, 2, 3)).clamp(min=1)
        return errors

    def decoder_features(self, latents: Tensor) -> list[Tensor]:
        """What the decoder's blocks, from the lowest resolution up, make of unscaled latents."""
        decoder, first, features = self.vae.decoder, self.vae.post_quant_conv, []
        hidden = latents.to(self.vae.dtype)
        hidden = decoder.conv_in(hidden if first is None else first(hidden))
        for block in (decoder.mid_block, *decoder.up_blocks):
            hidden = checkpoint(block, hidden, use_reentrant=False) if self.checkpointing else block(hidden)
            features.append(hidden.float())
        return features

    def picture_errors(self, found: Tensor, clean: Tensor, hole: Tensor) -> Tensor:
        """(B,), from unscaled latents."""
        with torch.no_grad():
            truth = self.vae.decode(clean.to(self.vae.dtype), return_dict=False)[0].float()
        shown = self.vae.decode(found.to(self.vae.dtype), return_dict=False)[0].float()
        hole = F.interpolate(hole, size=truth.shape[-2:])
        return self.lpips(hole * shown + (1 - hole) * truth, truth).flatten()


class LatentDiscriminator(torch.nn.Module):
    """Tells true latents from predicted ones, both noised, patch by patch, knowing the timestep and the cloth.

    On noised latents as in LADD, arXiv:2403.12015, which lends its discriminator the eyes of a trained network; these are
    its own: two of diffusers' blocks.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        told, wide = 4 * width, {"temb_channels": 4 * width, "resnet_groups": 8}
        self.frequencies = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = TimestepEmbedding(width, told)
        self.cloth = torch.nn.Sequential(
            *(torch.nn.Conv2d(4, width, 3, stride=2, padding=1), torch.nn.SiLU()),
            *(torch.nn.Conv2d(width, told, 3, stride=2, padding=1), torch.nn.SiLU()),
            *(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(told, told)),
        )
        self.conv_in = torch.nn.Conv2d(4, width, 3, padding=1)
        self.blocks = torch.nn.ModuleList([DownBlock2D(k * width, 2 * k * width, **wide) for k in (1, 2)])
        self.conv_out = torch.nn.Sequential(
            torch.nn.GroupNorm(8, 4 * width), torch.nn.SiLU(), torch.nn.Conv2d(4 * width, 1, 1)
        )

    def forward(self, noisy: Tensor, timesteps: Tensor, cloth: Tensor) -> Tensor:
        """Logits (B, 1, h/4, w/4), high for true ones, of latents (B, 4, h, w), timesteps (B,) and cloths (B, 4, h, w).

        Of several cloths a row, (B * n, 4, h, w), what each says is added up.
        """
        told = self.time(self.frequencies(timesteps))
        told = told + self.cloth(cloth).unflatten(0, (len(noisy), -1)).sum(dim=1)
        hidden = self.conv_in(noisy)
        for block in self.blocks:
            hidden, _ = block(hidden, told)
        return self.conv_out(hidden)


class AdversarialLoss:
    """What a `LatentDiscriminator` holds against predicted latents, and how it learns: softplus losses, R1 on true latents.

    It has an optimiser of its own, at a constant `learning_rate`, which makes an update where the UNet's does. Every process has
    the same discriminator: their gradients are averaged.
    """

    def __init__(
        self, accelerator: accelerate.Accelerator, scheduler: DDPMScheduler, seed: int, learning_rate: float
    ) -> None:
        self.accelerator, self.scheduler, self.learning_rate = accelerator, scheduler, learning_rate
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = LatentDiscriminator().to(accelerator.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), learning_rate, betas=(0.0, 0.99))
        self.loss, self.quiet = torch.zeros(()), 0  # of the last batch; updates in a row in which it was as good as 0

    def __call__(self, found: Tensor, clean: Tensor, cloth: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        """The UNet's loss for `found` instead of `clean` (B, 4, h, w); the discriminator's gradients are added up on the way.

        Both are noised alike and anew, at timesteps of the discriminator's own, as LADD's are: noise as strong as what was
        predicted from would hide what the prediction lacks.
        """
        timesteps = (drawn["time"] * self.scheduler.config.num_train_timesteps).long()
        found, true = (self.scheduler.add_noise(latents, drawn["noise"], timesteps) for latents in (found, clean))
        self.model.requires_grad_(False)
        loss = F.softplus(-self.model(found, timesteps, cloth)).mean()
        self.model.requires_grad_(True)
        self.learn(found.detach(), true, cloth, timesteps)
        return loss

    @torch.enable_grad()
    def learn(self, found: Tensor, true: Tensor, cloth: Tensor, timesteps: Tensor) -> None:
        """Add up the gradients of softplus(-D(true)) + softplus(D(found)) and R1, arXiv:1801.04406."""
        true = true.detach().requires_grad_()
        for_true, for_found = self.model(true, timesteps, cloth), self.model(found, timesteps, cloth)
        (slope,) = torch.autograd.grad(for_true.sum(), true, create_graph=True)
        penalty = slope.square().sum(dim=(1, 2, 3)).mean()
        loss = F.softplus(-for_true).mean() + F.softplus(for_found).mean()
        ((loss + R1_WEIGHT / 2 * penalty) / self.accelerator.gradient_accumulation_steps).backward()
        self.loss = loss.detach()

    def update(self) -> None:
        """One step of the optimiser; a collapse is logged once it has lasted."""
        for parameter in self.model.parameters():
            parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.quiet = self.quiet + 1 if self.loss.item() < COLLAPSED else 0
        if self.quiet == COLLAPSE_AFTER:
            said = "the discriminator has told true from predicted latents without an error for %d updates and has nothing to teach"
            logger.warning(f"{said}: a smaller --adversarial_weight, or a later --adversarial_start_step", self.quiet)

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "quiet": self.quiet}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate  # of this run, not of the one that is resumed
        self.quiet = state["quiet"]


def load_lpips() -> torch.nn.Module:
    """torchmetrics' LPIPS with VGG, frozen: two pictures (B, 3, H, W) in [-1, 1] to (B, 1, 1, 1)."""
    for library in ("torchvision", "torchmetrics"):
        optional(library, "perceptual_loss lpips")
    try:
        return importlib.import_module("torchmetrics.image.lpip").LearnedPerceptualImagePatchSimilarity("vgg").net
    except OSError as error:
        raise OSError(f"--perceptual_loss lpips: VGG's weights are not there and do not come: {error}") from error


@torch.no_grad()
def dream_noise(
    scheduler: DDPMScheduler, predict: Callable, clean: Tensor, noise: Tensor, timesteps: Tensor, p: float
) -> Tensor:
    """The noise, moved by what the UNet gets wrong of it times (1 - alpha-bar)**(p / 2): DREAM, arXiv:2312.00210."""
    alpha = scheduler.alphas_cumprod.to(clean.device)[timesteps].view(-1, 1, 1, 1)
    noisy = scheduler.add_noise(clean, noise, timesteps)
    noise_pred = predict(noisy)
    if scheduler.config.prediction_type == "v_prediction":
        noise_pred = alpha.sqrt() * noise_pred + (1 - alpha).sqrt() * noisy
    return noise + (1 - alpha) ** (p / 2) * (noise - noise_pred)


def noise_loss(
    scheduler: DDPMScheduler, predicted: Tensor, target: Tensor, timesteps: Tensor, snr_gamma: float | None
) -> Tensor:
    """MSE; with `snr_gamma` every row weighs min(SNR, gamma) / SNR (+ 1 for velocities), arXiv:2303.09556."""
    if snr_gamma is None:
        return F.mse_loss(predicted, target)
    snr = compute_snr(scheduler, timesteps)
    if scheduler.config.prediction_type == "epsilon":
        weights = (snr_gamma / snr).clamp(max=1)  # pure noise has an SNR of 0
    else:
        weights = snr.clamp(max=snr_gamma) / (snr + 1)
    return (weights * (predicted - target).square().mean(dim=(1, 2, 3))).mean()


def memory_gib(device: torch.device) -> float:
    """The peak of the GPU's memory, or this process's now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return psutil.Process().memory_info().rss / 2**30


@contextlib.contextmanager
def forgiven(what: str) -> Iterator[None]:
    """What fails inside is logged, whatever it is, and training goes on."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        logger.warning("%s failed, and training goes on: %s", what, reason, main_process_only=False)


def stretches(height: int, width: int, aspect: float) -> bool:
    """Whether pictures of that aspect, height by width, change by more than a tenth at this size."""
    return not 1 / ASPECT_TOLERANCE <= height / width / aspect <= ASPECT_TOLERANCE


def middle_person(persons: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The width and height with the middle aspect."""
    return sorted(persons, key=lambda size: size[0] / size[1])[len(persons) // 2]


def training_size(
    pipe: StableDiffusionVTONPipeline, persons: Sequence[tuple[int, int]], asked: tuple[int, int] | None
) -> tuple[int, int]:
    """Height and width to train at, which are those that a call without a size works at.

    Args:
        pipe: still without a size of its own, so that it works at the area of the adapter to begin from, or the base's.
        persons: widths and heights; the one with the middle aspect stands for all.
        asked: (height, width), refused where the aspect differs from the persons' by more than a tenth; None takes
            that area.
    """
    width, height = middle_person(persons)
    size, again = None, asked or pipe.resolve_size(height, width, None, None)
    while size != again:  # rounding may take more than once to come to rest
        size, area = again, again[0] * again[1]
        again = fit_size(height, width, None, None, area=area, multiple=pipe.size_multiple)
    if asked is None:
        logger.info("persons of %d x %d (height x width) are trained at %d x %d", height, width, *size)
        return size
    pipe.resolve_size(height, width, *asked)  # an error names a side that is no multiple
    if stretches(*asked, height / width):
        raise ValueError(
            f"--height {asked[0]} --width {asked[1]} would stretch the persons of {height} x {width} (height x width) by more "
            f"than a tenth, which a call does not: --height {size[0]} --width {size[1]} fits, or leave both out"
        )
    if size != asked:
        logger.warning("trained at %d x %d, while a call that names no size works at %d x %d", *asked, *size)
    return asked


class StopRequest:
    """Ctrl-C or SIGTERM, however often, only asks for a stop while the context lasts; Ctrl-\\ still stops at once.

    torchrun repeats a Ctrl-C that its workers have had, which may not break a save. Signals reach the main thread alone: in
    another one nothing is listened to.
    """

    def __init__(self) -> None:
        self.made, self.before = False, {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.make) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def make(self, number: int, frame: FrameType | None) -> None:
        if not self.made:  # past the buffers, of which one may be at work
            os.write(2, b"\nstopping after this update, with a checkpoint\n")
        self.made = True

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def heed_the_trainer_alone(worker: int) -> None:
    """Of a reading process: signals to all of a run's processes, such as Ctrl-C, ask the one that trains for a stop, and it goes on
    reading until that one ends it. (macOS and Windows do not tell who sends a SIGTERM.)
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    trainer = multiprocessing.parent_process().pid

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class Trainer:
    """The models, the optimiser and the counters of one run; `run` is the loop."""

    # ---- setting up

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.accelerator = accelerate.Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=args.output_dir / "logs"),
            dataloader_config=DataLoaderConfiguration(
                use_seedable_sampler=True, data_seed=args.seed, non_blocking=True
            ),
            dynamo_backend="inductor" if args.torch_compile else None,
            kwargs_handlers=[DistributedDataParallelKwargs(), PATIENCE],
        )
        refuse_sharding(self.accelerator.distributed_type)
        if args.report_to != "none" and not self.accelerator.log_with:  # accelerate would train on without
            raise ImportError(
                f"--report_to {args.report_to} needs a library that is not here: pip install {args.report_to}"
            )
        if self.accelerator.mixed_precision == "fp16" and self.accelerator.device.type == "cpu":
            raise ValueError("--mixed_precision fp16 needs a GPU: take bf16 or no on the CPU")
        if self.accelerator.is_main_process:
            check_output_dir(args)
            self.claim = claim(args.output_dir)
            for kind in ("unfinished-checkpoint-*", "leaving-checkpoint-*"):  # of a run that was killed
                for part in args.output_dir.glob(kind):
                    shutil.rmtree(part)
        if args.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        set_seed(args.seed)
        self.step, self.losses, self.grad_norm = 0, [], 0.0
        self.pending: list[tuple[Tensor, list[str]]] = []  # the losses, and the names, of an update's batches so far
        self.place = (0, 0)  # of the stream
        self.stop, self.stopping = StopRequest(), False  # of this process; as all processes know
        self.batch: dict[str, Any] | None = None  # the last one
        self.unread: str | None = None  # what was wrong with the pair that could not be read
        self.load_base()
        shown = ["condition" if args.mask_free else "mask", *(["pose"] if args.pose else [])]
        self.roles = ("person", *cloth_roles(args.num_cloths), *shown)
        self.columns = {role: column_of(args, role) for role in self.roles}
        self.pairs = load_pairs(args, self.columns, self.accelerator)
        self.load_settings()
        self.checkpoints = Checkpoints(self)
        self.load_data()
        self.validation = Validation(self)
        self.prepare_losses()
        self.prepare_parameters()
        self.prepare_training()
        self.checkpoints.register()
        self.checkpoints.discard_earlier()  # now that nothing can refuse the run any more

    @property
    def dtype(self) -> torch.dtype:
        """Of what is frozen."""
        return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.accelerator.mixed_precision, torch.float32)

    def load(self, cls: type, subfolder: str | None, **instead: Any) -> torch.nn.Module:
        """A frozen model of the base, in the mixed precision's dtype; or with other arguments of `from_pretrained`."""
        options = {**self.base, "subfolder": subfolder, "dtype": self.dtype} | instead
        place = options["pretrained_model_name_or_path"]
        with naming(
            "vae_name_or_path" if place == self.args.vae_name_or_path else "pretrained_model_name_or_path", place
        ):
            model = from_safetensors(cls.from_pretrained, **options)
        return model.to(self.accelerator.device).eval().requires_grad_(False)

    def load_vae(self) -> AutoencoderKL:
        """The base's VAE or --vae_name_or_path; SDXL's own overflows in fp16, and works in float32 there."""
        subfolder, place = "vae", {}
        if self.args.vae_name_or_path is not None:
            subfolder, place = None, {"pretrained_model_name_or_path": self.args.vae_name_or_path, "revision": None}
        vae = self.load(AutoencoderKL, subfolder, **place)
        if overflows(vae, self.unet):
            vae = self.load(AutoencoderKL, subfolder, **place, dtype=torch.float32)
        return vae

    def load_base(self) -> None:
        args = self.args
        self.base = {name: getattr(args, name) for name in ("pretrained_model_name_or_path", "revision")}
        self.refuse_trained_pipeline()
        whole = self.dtype if args.lora_rank else torch.float32  # so that what learns is not rounded
        self.unet = self.load(UNet2DConditionModel, "unet", dtype=whole)
        weights = self.unet.state_dict().values()
        self.base_weights = fingerprint(weight.flatten()[:64].bfloat16() for weight in weights)  # in any precision
        self.vae = self.load_vae()
        self.noise_scheduler = DDPMScheduler.from_pretrained(**self.base, subfolder="scheduler", clip_sample=False)
        kind = self.noise_scheduler.config.prediction_type
        if kind not in {"epsilon", "v_prediction"}:
            raise ValueError(f"the base's scheduler predicts {kind}, and training needs epsilon or v_prediction")
        self.in_channels = self.unet.config.in_channels
        if self.in_channels not in {4, 8, 9}:
            raise ValueError(f"the base's UNet must have 4, 8 or 9 input channels, got {self.in_channels}")
        if self.in_channels == 4 and args.lora_rank:
            raise ValueError("--lora_rank cannot train the conv_in that a 4-channel base gets: take one of 8 or 9")
        parts = (self.vae, self.unet, self.noise_scheduler)
        self.pipe = StableDiffusionVTONPipeline(*parts, base_in_channels=self.in_channels)
        self.pipe.set_progress_bar_config(disable=True)
        self.brought = self.load_init_adapter() if args.init_adapter else None
        check_unet(self.unet, args.cloth_conditioning == "reference")
        refuse_sdxl_text(self.unet, args.cross_attention)
        self.begun_from = None  # a name for the adapter's weights
        if self.brought is not None:
            begun = adapter_parameters(self.unet, args.trainable, self.in_channels == 4)
            self.begun_from = fingerprint(begun.values())
        elif self.in_channels == 4:
            widen_conv_in(self.unet)
        self.prompt_embeds = self.empty_embeds = None  # (1, 77, features)
        if args.cross_attention == "prompt":
            tokenizer = CLIPTokenizer.from_pretrained(**self.base, subfolder="tokenizer")
            self.pipe.register_modules(tokenizer=tokenizer, text_encoder=self.load(CLIPTextModel, "text_encoder"))
            self.prompt_embeds, self.empty_embeds = self.embed([args.prompt]), self.embed([""])

    def refuse_trained_pipeline(self) -> None:
        """The weights of what `save_pretrained` wrote have learnt with settings that a base does not have."""
        try:
            index = StableDiffusionVTONPipeline.load_config(**self.base)
        except OSError:
            return  # parts without an index are a base too; one that is nowhere is told of when they are loaded
        if index.get("trained_steps") is not None:
            whole = self.args.pretrained_model_name_or_path
            raise ValueError(
                f"--pretrained_model_name_or_path {whole} is a try-on pipeline that has learnt: give its base there, and {whole} to --init_adapter"
            )

    def load_init_adapter(self) -> AdapterSettings:
        """Put the weights to begin from into the UNet; their settings, which hold from now on."""
        args = self.args
        if is_lora(Path(args.init_adapter, args.init_subfolder or "")):
            raise ValueError(f"--init_adapter {args.init_adapter} is a LoRA: training begins from adapters alone")
        self.pipe.load_vton_adapter(args.init_adapter, subfolder=args.init_subfolder, mask_free=args.mask_free)
        config = self.pipe.config
        brought = AdapterSettings(**{setting.name: config[setting.name] for setting in fields(AdapterSettings)})
        settle(args, asdict(brought) | {"prompt": brought.prompt or "", "pose": brought.pose == "painted"})
        check_settings(args)
        logger.info(
            "begun from %s: %s", args.init_adapter, ", ".join(f"{k} {getattr(args, k)}" for k in ADAPTER_FLAGS)
        )
        return brought

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Tensor:
        """Texts to embeddings (B, 77, features)."""
        return self.pipe.encode_prompt(texts, self.accelerator.device, 1, False)[0]

    def load_settings(self) -> None:
        """The size, and the settings that travel with the adapter."""
        args = self.args
        unsaid = {"scheduler_class": "DDPMScheduler", "guidance_scale": SEED_GUIDANCE}
        said = unsaid if self.brought is None else asdict(self.brought)
        size = (args.height, args.width) if args.height else None
        if args.resolutions:
            size = self.own_resolution()
        self.height, self.width = training_size(self.pipe, self.pairs.person_sizes(), size)
        own = {
            "base_in_channels": self.in_channels,
            "cloth_conditioning": args.cloth_conditioning,
            "cross_attention": args.cross_attention,
            "condition_latents": args.condition_latents or ("unscaled" if self.in_channels == 8 else "scaled"),
            "mask_free": args.mask_free,
            "pose": "painted" if args.pose else "none",
            "trainable": args.trainable,
            "guidance_scale": said["guidance_scale"] if args.guidance_scale is None else args.guidance_scale,
            "prompt": args.prompt if args.cross_attention == "prompt" else None,
            "base_model": args.pretrained_model_name_or_path,
            "height": self.height,
            "width": self.width,
            "trained_steps": None,
        }
        self.settings = AdapterSettings(**said | own)
        self.pipe.register_to_config(**asdict(self.settings))
        self.prepare = Preparation(self.height, self.width, args.seed, args.augment, args.num_cloths)

    def own_resolution(self) -> tuple[int, int]:
        """The adapter's own of `--resolutions`: the first of those whose aspect is nearest to the middle person's."""
        resolutions, multiple = self.args.resolutions, self.pipe.size_multiple
        for height, width in resolutions:
            if height % multiple or width % multiple:
                raise ValueError(
                    f"--resolutions must have sides that are multiples of {multiple}, got {height}x{width}"
                )
        width, height = middle_person(self.pairs.person_sizes())
        own = resolutions[nearest_aspect(height, width, resolutions)[0]]
        if stretches(*own, height / width):
            fitting = "{}x{}".format(*fit_size(height, width, own[0], None, area=1, multiple=multiple))
            raise ValueError(
                f"--resolutions {own[0]}x{own[1]}, the nearest to the persons of {height}x{width}, would stretch them by more "
                f"than a tenth: one such as {fitting} must be among them"
            )
        return own

    def load_data(self) -> None:
        args, processes = self.args, self.accelerator.num_processes
        if args.streaming:
            return self.load_stream()
        rows = args.train_batch_size * processes
        if len(self.pairs) < rows:
            source = "--dataset_root" if args.dataset_root is not None else "--dataset_name"
            raise ValueError(f"--train_batch_size: a step takes {rows} pairs, and {source} has {len(self.pairs)}")
        if args.resolutions is None:
            self.dataset = self.pairs_at(self.height, self.width)
            order = {"batch_size": args.train_batch_size, "shuffle": True, "drop_last": True}
        else:
            groups = group_by_aspect(self.pairs, args.resolutions)
            self.dataset = PairsAtSizes([self.pairs_at(*size) for size in args.resolutions])
            batches = ResolutionBatches(self.dataset, groups, args.train_batch_size, processes, args.seed)
            order = {"batch_sampler": batches}
        self.loader = self.new_loader(args.dataloader_num_workers, **order)

    def pairs_at(self, height: int, width: int) -> PairDataset:
        """The pairs at one size, with what the VAE makes of them if that is to be cached."""
        args, prepare = self.args, replace(self.prepare, height=height, width=width)
        if args.cache_latents is None:
            captions = self.pairs.rows[args.caption_column] if args.caption_column else None
            return PairDataset(self.pairs, prepare, captions)
        settings = replace(self.settings, height=height, width=width)
        folder = args.cache_latents / cache_key(self.vae, settings, self.pairs)
        dataset = LatentCache(self.pairs, prepare, folder=folder)
        loading = {"batch_size": args.train_batch_size, "num_workers": args.dataloader_num_workers}
        dataset.fill(partial(self.encode, unposed=args.pose), self.accelerator, **loading)
        return dataset

    def load_stream(self) -> None:
        """Every process reads its own part, and has one reader, which keeps the order."""
        args, place = self.args, (self.accelerator.process_index, self.accelerator.num_processes)
        rows = self.pairs.rows.shuffle(seed=args.seed)
        rows = importlib.import_module("datasets.distributed").split_dataset_by_node(rows, *place)
        self.dataset = StreamedPairs(rows, self.columns, self.prepare, *place, args.caption_column)
        self.loader = self.new_loader(min(1, args.dataloader_num_workers), batch_size=args.train_batch_size)

    def new_loader(self, workers: int, **order: Any) -> DataLoader:
        """How training is fed: by processes that outlast an epoch, from memory that a GPU copies without waiting."""
        return DataLoader(
            self.dataset,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=heed_the_trainer_alone,
            collate_fn=collate,
            pin_memory=self.accelerator.device.type == "cuda",
            **order,
        )

    def prepare_losses(self) -> None:
        """What is added to the noise's error."""
        args = self.args
        self.parts: dict[str, Tensor] = {}  # of this process' last batch, for the log
        self.perceptual = None
        if args.perceptual_loss is not None:
            options = (args.perceptual_max_timestep, args.gradient_checkpointing)
            self.perceptual = PerceptualLoss(args.perceptual_loss, self.vae, *options)
        self.adversary = None
        if args.adversarial_weight is not None:
            self.adversary = AdversarialLoss(self.accelerator, self.noise_scheduler, args.seed, args.learning_rate)

    def prepare_parameters(self) -> None:
        """What learns, in float32: the adapter's weights, or a LoRA of the same modules."""
        args = self.args
        if args.lora_rank:
            modules = lora_modules(args.trainable)
            self.unet.add_adapter(LoraConfig(r=args.lora_rank, lora_alpha=args.lora_rank, target_modules=modules))
            self.parameters = {name: p for name, p in self.unet.named_parameters() if ".lora_" in name}
        else:
            self.parameters = adapter_parameters(self.unet, args.trainable, self.in_channels == 4)
        self.trained = list(self.parameters.values())
        for parameter in self.trained:
            parameter.requires_grad_(True)
        cast_training_params(self.unet, dtype=torch.float32)
        self.teacher = [p.detach().clone() for p in self.trained] if args.guidance_distillation else None
        for parameter in self.unet.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(self.dtype)
        if args.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            self.unet.train()

    def prepare_training(self) -> None:
        args = self.args
        eight_bit = args.use_8bit_adam and optional("bitsandbytes", "use_8bit_adam").optim.AdamW8bit
        adam = eight_bit or torch.optim.AdamW
        self.optimizer = adam(self.trained, args.learning_rate, (0.9, 0.999), weight_decay=args.adam_weight_decay)
        unused = args.cross_attention != "prompt" and args.trainable != "self_attention"  # attn2 may learn, left out
        self.accelerator.ddp_handler.find_unused_parameters = unused
        if unused and args.trainable == "attention":
            logger.warning(
                "--cross_attention %s leaves out what --trainable attention has beside self-attention",
                args.cross_attention,
            )
        self.model, self.optimizer = self.accelerator.prepare(self.unet, self.optimizer)
        if args.streaming:
            self.steps_per_epoch = args.max_train_steps
        else:
            self.loader = self.accelerator.prepare(self.loader)
            self.steps_per_epoch = math.ceil(len(self.loader) / args.gradient_accumulation_steps)
        self.total_steps = args.max_train_steps or args.num_train_epochs * self.steps_per_epoch
        warmup = min(WARMUP_EPOCHS * self.steps_per_epoch, self.total_steps // 10)
        if args.lr_warmup_steps is not None:
            warmup = args.lr_warmup_steps
        if args.adversarial_weight and args.adversarial_start_step >= self.total_steps:
            raise ValueError(
                f"--adversarial_start_step {args.adversarial_start_step} is not reached in the {self.total_steps} updates of the run"
            )
        if warmup > self.total_steps - (args.lr_scheduler == "polynomial"):  # which divides by what is left
            raise ValueError(
                f"--lr_warmup_steps {warmup} is too much for --lr_scheduler {args.lr_scheduler} and the {self.total_steps} updates of the run"
            )
        # Stepped here, once an update: accelerate would step a prepared schedule once a process.
        if args.lr_scheduler == "default":
            self.schedule = warmup_cosine(self.optimizer.optimizer, warmup, self.total_steps)
        else:
            lengths = {"num_warmup_steps": warmup, "num_training_steps": self.total_steps}
            self.schedule = get_scheduler(args.lr_scheduler, self.optimizer.optimizer, **lengths)
        self.ema = EMAModel(self.trained, decay=args.ema_decay, use_ema_warmup=True, power=0.75)
        self.ema.to(self.accelerator.device)

    # ---- one step

    @torch.no_grad()
    def encode(self, batch: dict[str, Any], unposed: bool = False) -> dict[str, Tensor]:
        """What the VAE makes of a batch: the tensors of `TryOnLatents`, and the posterior of the person to paint; with `unposed`
        also the person without their pose.
        """
        device = self.accelerator.device
        read = {role for role in self.roles if role == "cloth" or not is_cloth(role)} | {"mask"}
        pictures = {name: batch[name].to(device, non_blocking=True) for name in read}
        shown = pictures["condition" if self.args.mask_free else "person"], pictures["mask"]
        settings = {"condition_latents": self.settings.condition_latents, "dtype": torch.float32}
        encode_person = partial(
            TryOnLatents.encode_person, self.vae, *shown, mask_free=self.args.mask_free, **settings
        )
        cloths = pictures["cloth"].flatten(0, -4)  # (C, 3, H, W)
        encoded = encode_person(pictures.get("pose")) | TryOnLatents.encode_cloth(self.vae, cloths, **settings)
        posterior = self.vae.encode(pictures["person"].to(self.vae.dtype)).latent_dist
        encoded |= {"mean": posterior.mean, "std": posterior.std}
        if self.args.num_cloths > 1:  # a row for every pair, for the cache
            outfits = {name: encoded[name].unflatten(0, (-1, self.args.num_cloths)) for name in CLOTH_LATENTS}
            encoded |= outfits | {"worn": batch["worn"]}
        if unposed:
            encoded["unposed"] = encode_person()["person"]
        return encoded

    def latents(self, batch: dict[str, Any], pose_seen: Tensor | None = None) -> tuple[TryOnLatents, Tensor, Tensor]:
        """A batch's conditioning, and mean and deviation of the latents to paint, unscaled; cached or made now.

        Where `pose_seen` (B,) is false, the hole that the mask leaves is grey; None shows every pose.
        """
        if pose_seen is not None:
            grey = {"person": batch["unposed"]} if "mean" in batch else {"pose": torch.zeros_like(batch["pose"])}
            seen = pose_seen.to(batch["mask"].device).view(-1, 1, 1, 1)
            batch = batch | {name: torch.where(seen, batch[name], unseen) for name, unseen in grey.items()}
        encoded = batch if "mean" in batch else self.encode(batch)
        wanted = (*LATENTS, "mean", "std", *(["worn"] if self.args.num_cloths > 1 else []))
        encoded = {name: encoded[name].to(self.accelerator.device) for name in wanted}
        mean, std = encoded.pop("mean"), encoded.pop("std")
        if self.args.num_cloths > 1:
            encoded |= {name: encoded[name].flatten(0, 1) for name in CLOTH_LATENTS}
            encoded["cloth_worn"] = encoded.pop("worn").flatten()
        canvas_dim = CANVAS_DIMS[self.settings.canvas_axis]
        settings = {"channels": self.unet.config.in_channels, "canvas_dim": canvas_dim}
        return TryOnLatents(**encoded, **settings, num_cloths=self.args.num_cloths), mean, std

    def predict(
        self,
        conditioning: TryOnLatents,
        noisy: Tensor,
        timesteps: Tensor,
        cloth_seen: Tensor,
        captions: list[str] | None = None,
    ) -> Tensor:
        """What the UNet sees in `noisy` (B, 4, h, w) or a canvas, at timesteps (B,); where `cloth_seen` (B,) is 0, without
        cloth and text, as a call's unconditional branch.

        Reference mode is one UNet call on `[person rows ; cloth rows]`, the cloth rows at timestep 0, a person's together.
        """
        count = len(noisy)
        if self.args.cloth_conditioning == "joint":
            rows, seen = conditioning.canvas_rows(noisy, cloth_seen.view(-1, 1, 1, 1)), None
        else:
            cloths, worn = conditioning.cloth_rows(), conditioning.cloth_worn
            rows = torch.cat([conditioning.person_rows(noisy), cloths])
            timesteps = torch.cat([timesteps, timesteps.new_zeros(len(cloths))])
            seen = torch.cat([cloth_seen, cloth_seen.new_ones(len(cloths)) if worn is None else worn])[:, None]
        embeds = self.prompt_embeds
        if embeds is not None:
            embeds = embeds.expand(count, -1, -1) if captions is None else self.embed(captions)
            of_persons = torch.where(cloth_seen.view(-1, 1, 1) > 0, embeds, self.empty_embeds)
            of_cloths = embeds.repeat_interleave(conditioning.num_cloths, dim=0)
            embeds = torch.cat([of_persons, of_cloths]) if len(rows) > count else of_persons
        options = {
            "attention_mask": seen,
            "added_cond_kwargs": added_conditions(self.unet, rows, self.pipe.vae_scale_factor),
        }
        with self.accelerator.autocast():
            return self.model(rows, timesteps, embeds, **options, return_dict=False)[0][:count].float()

    def on_canvas(self, conditioning: TryOnLatents, clean: Tensor, drawn: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Clean latents and noise of the person alone; in joint mode of the whole canvas."""
        if self.args.cloth_conditioning == "reference":
            return clean, drawn["noise"]
        canvas = conditioning.canvas
        return canvas(clean, conditioning.cloth), canvas(drawn["noise"], drawn["cloth_noise"])

    def train_step(self, batch: dict[str, Any]) -> Tensor:
        """MSE between the predicted and the actual noise, over the person (joint: over the canvas)."""
        with torch.no_grad():
            pose_seen = draw_share(batch["seed"], self.args.pose_dropout) if self.args.pose else None
            conditioning, mean, std = self.latents(batch, pose_seen)
            drawn = draw(batch["seed"], mean.shape[1:], mean.device)
            clean = (mean + std * drawn["posterior"]).float() * self.vae.config.scaling_factor
        clean, noise = self.on_canvas(conditioning, clean, drawn)
        timesteps = (drawn["time"] * self.noise_scheduler.config.num_train_timesteps).long()
        seen = (drawn["dropout"] >= self.args.cloth_dropout).float()

        def predict(noisy: Tensor, seen: Tensor = seen) -> Tensor:
            return self.predict(conditioning, noisy, timesteps, seen, batch.get("caption"))

        scheduler, p = self.noise_scheduler, self.args.dream_detail_preservation
        if p:
            noise = dream_noise(scheduler, predict, clean, noise, timesteps, p)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        target = unet_target(scheduler, clean, noise, timesteps)
        if self.teacher is not None:
            target = self.guided(predict, noisy, seen)
        predicted = predict(noisy)
        loss = noise_loss(scheduler, predicted, target, timesteps, self.args.snr_gamma)
        if self.perceptual is None and not self.is_contested:
            return loss
        found = predicted_latents(scheduler, noisy, predicted, timesteps)
        return loss + self.picture_losses(conditioning, found, clean, timesteps, seen, batch["seed"])

    @property
    def is_contested(self) -> bool:
        """Whether a discriminator is at work by now."""
        return self.adversary is not None and self.step >= self.args.adversarial_start_step

    def picture_losses(
        self,
        conditioning: TryOnLatents,
        found: Tensor,
        clean: Tensor,
        timesteps: Tensor,
        seen: Tensor,
        seeds: Iterable[int],
    ) -> Tensor | float:
        """What else is said of predicted latents, `found` instead of `clean`, (B, 4, h, w) or a canvas; of the hole alone."""
        if self.args.cloth_conditioning == "joint":
            found, clean = conditioning.person_part(found), conditioning.person_part(clean)
        total = 0.0
        if self.perceptual is not None:
            part = self.perceptual(found, clean, conditioning.mask, timesteps)
            total += self.args.perceptual_weight * part
            self.parts["perceptual"] = part.detach()
        if self.is_contested:
            found = conditioning.mask * found + (1 - conditioning.mask) * clean
            others = [int(np.random.SeedSequence([seed, 1]).generate_state(1)[0]) for seed in seeds]
            drawn = draw(others, clean.shape[1:], clean.device)
            told = seen.repeat_interleave(len(conditioning.cloth) // len(seen))  # of a row that saw no cloth, none
            told = told if conditioning.cloth_worn is None else told * conditioning.cloth_worn
            cloth = conditioning.cloth * told.view(-1, 1, 1, 1)
            part = self.adversary(found, clean, cloth, drawn)
            total += self.args.adversarial_weight * part
            self.parts |= {"adversarial": part.detach(), "discriminator": self.adversary.loss}
        return total

    @torch.no_grad()
    def guided(self, predict: Callable[[Tensor, Tensor], Tensor], noisy: Tensor, seen: Tensor) -> Tensor:
        """What the weights that the run began from see in `noisy` (B, 4, h, w) with guidance; rows without a cloth have none."""
        with self.weights(self.teacher):
            without, with_cloth = predict(noisy, 0 * seen), predict(noisy, seen)
        return without + self.args.guidance_distillation * (with_cloth - without)

    def update(self, batch: dict[str, Any]) -> list[float]:
        """Forward, backward and, every `gradient_accumulation_steps` batches, one update; returns its batches' losses then.

        Processes wait for one another, and for their devices, once an update, after backward; a perceptual or an adversarial loss
        waits for the device as well.
        """
        accelerator, losses = self.accelerator, []
        with accelerator.accumulate(self.model):
            loss = self.train_step(batch)
            accelerator.backward(loss)
            self.pending.append((loss.detach(), list(batch["name"])))
            if accelerator.sync_gradients:
                self.average_gradients()
                norm = accelerator.clip_grad_norm_(self.trained, self.args.max_grad_norm)
                losses = self.agree(norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if accelerator.sync_gradients:
            if self.is_contested:
                self.adversary.update()
            self.schedule.step()
            self.ema.step(self.trained)
            self.step, self.pending = self.step + 1, []
            self.place = batch["place"][-1] if "place" in batch else self.place
        return losses

    def agree(self, norm: Tensor) -> list[float]:
        """The losses of an update's batches, of all processes, and whether one of them is to stop: one exchange, one wait."""
        of_batches = torch.stack([loss for loss, _ in self.pending])
        asked = of_batches.new_full((1,), float(self.stop.made))
        means = self.accelerator.reduce(torch.cat([of_batches, asked]), reduction="mean")
        *losses, stopping, self.grad_norm = torch.cat([means, norm.reshape(1).to(means)]).tolist()
        self.stopping = stopping > 0
        for loss, (_, names) in zip(losses, self.pending):
            self.require_finite("loss", loss, names)
        if self.accelerator.scaler is None:  # fp16's scaler skips such a step by itself
            self.require_finite("gradient norm", self.grad_norm, self.pending[-1][1])
        return losses

    def average_gradients(self) -> None:
        """accelerate divides by `gradient_accumulation_steps`; an epoch's last update may have had fewer batches."""
        missing = self.args.gradient_accumulation_steps / len(self.pending)
        if missing > 1:
            discriminator = [] if self.adversary is None else self.adversary.model.parameters()
            for gradient in (p.grad for p in (*self.trained, *discriminator) if p.grad is not None):
                gradient.mul_(missing)

    def require_finite(self, what: str, value: float, names: list[str]) -> None:
        if not math.isfinite(value):
            everyone = ", ".join(gather_object(names))
            raise FloatingPointError(f"the {what} is {value} at step {self.step + 1}; the pairs are {everyone}")

    @contextlib.contextmanager
    def weights(self, values: list[Tensor]) -> Iterator[None]:
        """These in the UNet, in the place of what learns, for as long as the context lasts."""
        before = [parameter.detach().clone() for parameter in self.trained]
        try:
            assign(self.trained, values)
            yield
        finally:
            assign(self.trained, before)

    @contextlib.contextmanager
    def published_weights(self) -> Iterator[None]:
        """In the UNet, for as long as the context lasts: the averaged weights, rounded to fp16 as they are published."""
        average, was_training = self.ema.shadow_params if self.args.ema_decay else self.trained, self.unet.training
        try:
            self.unet.eval()
            with self.weights([weight.detach().half() for weight in average]):
                yield
        finally:
            self.unet.train(was_training)

    # ---- the loop

    def batches(self) -> Iterator[dict[str, Any]]:
        """Batches from where the run stands, epoch after epoch, in the order that an uninterrupted run would see."""
        accumulated = self.args.gradient_accumulation_steps
        if self.args.streaming:
            self.dataset.start = self.place
            yield from map(self.on_device, self.loader)
        epoch, done = divmod(self.step, self.steps_per_epoch)
        skip = done * accumulated
        while True:
            self.loader.set_epoch(epoch)
            self.dataset.set_epoch(epoch)  # which the loader's does not reach with several processes
            yield from map(self.on_device, accelerate.skip_first_batches(self.loader, skip) if skip else self.loader)
            epoch, skip = epoch + 1, 0

    def on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Also of a stream's loader, which accelerate does not prepare: bytes travel, a quarter of what their values would be."""
        return to_values(send_to_device(batch, self.accelerator.device, non_blocking=True))

    def next_batch(self, batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """The next; where a pair of it cannot be read, the last one again, and the run stops after this update, which the other
        processes are at as well.
        """
        if self.unread is None:
            try:
                self.batch = next(batches)
            except (OSError, ValueError) as error:
                kind = f"{type(error).__name__}: "
                last = f"{kind}{error}".splitlines()[-1]  # a reading process sends the way there too
                self.unread = last.removeprefix(kind)
                self.stop.made = True
        if self.batch is None:
            raise SystemExit(f"train_vton.py: {self.unread}")
        return self.batch

    @property
    def self_attention(self) -> Callable[[], ClothBesideAttnProcessor] | None:
        """Makes the processors of every `attn1`; None leaves them, as joint mode does."""
        reference = self.args.cloth_conditioning == "reference"
        return partial(ClothBesideAttnProcessor, self.args.num_cloths) if reference else None

    def run(self) -> bool:
        """Train to the end, or until asked to stop; returns whether it came to the end."""
        self.checkpoints.resume()
        self.introduce()
        hidden = not self.accelerator.is_local_main_process
        bar = tqdm(total=self.total_steps, initial=self.step, desc="train", disable=hidden)
        with vton_attention(self.unet, self.self_attention, self.args.cross_attention):
            with bar, self.stop:
                batches, started = self.batches(), time.time()
                while self.step < self.total_steps and not self.stopping:
                    if losses := self.update(self.next_batch(batches)):
                        bar.update()
                        self.after_update(bar, losses, time.time() - started)
                        started = time.time()
            if self.step >= self.total_steps:
                self.finish()
        return self.step >= self.total_steps

    def introduce(self) -> None:
        """Say what the run is."""
        args, weights = self.args, sum(parameter.numel() for parameter in self.trained)
        pairs = "a stream of pairs" if args.streaming else f"{len(self.pairs)} pairs"
        update = " x ".join(
            map(str, (self.accelerator.num_processes, args.gradient_accumulation_steps, args.train_batch_size))
        )
        logger.info(
            "%s at %dx%d, %s an update (processes x batches x pairs), %d updates, %.2f million weights learn on %s",
            pairs, self.height, self.width, update, self.total_steps, weights / 1e6, self.accelerator.device,
        )  # fmt: skip
        if self.step >= self.total_steps:
            logger.warning(
                "step %d of %d: nothing is left to train, what it came to is published anew",
                self.step,
                self.total_steps,
            )

    def after_update(self, bar: tqdm, losses: list[float], seconds: float) -> None:
        """Save, validate and report as often as asked; save at the end, and when asked to stop."""
        args, last = self.args, self.step == self.total_steps
        pairs = len(losses) * args.train_batch_size * self.accelerator.num_processes
        self.losses.append(sum(losses) / len(losses))
        logs = {
            "loss": self.losses[-1],
            "lr": self.schedule.get_last_lr()[0],
            "grad_norm": self.grad_norm,
            "images_per_second": pairs / seconds,
            "memory_gib": memory_gib(self.accelerator.device),
        } | {f"loss_{name}": part.item() for name, part in self.parts.items()}
        bar.set_postfix({name: f"{logs[name]:.3g}" for name in ("loss", "lr", "images_per_second")})
        saving = self.step % args.checkpointing_steps == 0 or last or self.stopping
        if saving:
            self.checkpoints.save()
        if self.step % args.validation_steps == 0 and not last:
            logs |= self.validation.run()
        self.track(logs)
        if saving and not last and args.push_to_hub and args.hub_strategy == "every_save":
            if self.accelerator.is_main_process:
                self.checkpoints.push(attempts=1)
            self.accelerator.wait_for_everyone()

    def finish(self) -> None:
        """Publish the weights, with the guidance that suits them best and a last look at them."""
        if self.accelerator.is_main_process and self.args.guidance_scale is None:
            with forgiven("the choice of a guidance scale"):
                self.settings = replace(self.settings, guidance_scale=self.validation.best_guidance())
                self.pipe.register_to_config(guidance_scale=self.settings.guidance_scale)
        self.track(self.validation.run())
        if self.accelerator.is_main_process:
            self.checkpoints.publish(self.args.output_dir)
            logger.info("trained weights in %s", self.args.output_dir)
            if self.args.push_to_hub:
                self.checkpoints.push(attempts=3)

    def start_trackers(self, config: dict[str, Any]) -> None:
        """TensorBoard forgets what a killed run logged after the checkpoint that is gone on from."""
        done = 0 if self.checkpoints.resumed is None else self.checkpoints.progress()["step"]
        self.accelerator.init_trackers("train_vton", config, {"tensorboard": {"purge_step": done + 1}})

    def track(self, logs: dict[str, float]) -> None:
        with forgiven("the tracker"):
            self.accelerator.log(logs, step=self.step)


class Validation:
    """What a run shows of itself: the masked noise error on test persons, and a grid of test persons in other cloths.

    `paired` are test persons in their own cloths and `probes` what the VAE made of them, for which it is asked once;
    `tryons` are names and pictures of test persons and other cloths. What is missing is logged, and so is whatever fails once
    the run has begun; a test picture that is none is refused before.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.args, self.accelerator = trainer, trainer.args, trainer.accelerator
        pairs, self.tryons = self.test_rows() if self.args.dataset_name is not None else self.test_tree()
        texts = [row[self.args.caption_column] for row in pairs.rows] if self.args.caption_column and pairs else None
        paired = PairDataset(pairs, replace(trainer.prepare, augment=()), texts)
        self.paired = Subset(paired, range(min(PROBED_PAIRS, len(pairs))))
        self.captions: list[str] = []  # of the probes, where there are any
        self.probes = self.encode_probes()
        self.guidance_errors: dict[float, float] = {}

    def test_tree(self) -> tuple[TreePairs | list, list[tuple[str, dict]]]:
        args, root, roles, paired, tryons = self.args, self.args.dataset_root, self.trainer.roles, [], []
        lists = [*root.glob("test_pairs*.txt"), *root.glob(f"{args.category.replace('all', '*')}/test_pairs*.txt")]
        if not any(read_list(file) for file in lists) and not OutfitPairs.list_of(root, "test").is_file():
            return [], []
        place = {"limit": PROBED_PAIRS, "pose_folder": args.pose_folder}
        try:
            paired = tree_pairs(root, "test", True, roles, args.category, args.condition_column, **place)
        except FileNotFoundError as error:
            logger.warning("nothing is probed: %s", error)
        shown, place["limit"] = [role for role in roles if role != "condition"], args.num_validation_pairs
        try:
            if args.num_validation_pairs:
                unpaired = tree_pairs(root, "test", False, shown, args.category, **place)
                tryons = [(unpaired.name(i), unpaired.pictures(i)) for i in range(len(unpaired))]
        except FileNotFoundError as error:
            logger.warning("no cloth is tried on test persons: %s", error)
        return paired, tryons

    def test_rows(self) -> tuple[RowPairs | list, list[tuple[str, dict]]]:
        args, columns, wanted = self.args, self.trainer.columns, max(PROBED_PAIRS, self.args.num_validation_pairs)
        splits = optional("datasets", "dataset_name").get_dataset_split_names
        if "test" not in splits(args.dataset_name, args.dataset_config_name):
            return [], []
        pairs = RowPairs(list(load_rows(args, "test", columns).take(wanted)), columns, "test row")
        shown = range(min(args.num_validation_pairs, len(pairs)))
        tryons = []
        for i in shown:
            own, other = (pairs.pictures(index % len(pairs)) for index in (i, i + 1))
            person = {role: picture for role, picture in own.items() if not is_cloth(role)}
            cloths = {role: picture for role, picture in other.items() if is_cloth(role)}
            text = {"caption": pairs.rows[(i + 1) % len(pairs)][args.caption_column]} if args.caption_column else {}
            tryons.append((pairs.name(i), person | cloths | text))
        return pairs, tryons

    def batches(self) -> Iterator[dict[str, Any]]:
        """The test persons in their own cloths, as many at a time as training takes; one by one where they may wear unequally many."""
        size = self.args.train_batch_size if self.args.num_cloths == 1 else 1
        return map(to_values, DataLoader(self.paired, batch_size=size, collate_fn=collate))

    def shown_cloths(self, batch: dict[str, Any]) -> Tensor | list[list[Tensor]]:
        """The cloths of a batch in [0, 1], as a call takes them."""
        cloths = batch["cloth"] / 2 + 0.5
        if self.args.num_cloths == 1:
            return cloths
        return [list(of_person[worn > 0]) for of_person, worn in zip(cloths, batch["worn"])]

    def encode_probes(self) -> dict[str, Tensor] | None:
        """Latents and seeds (N, ...) of `paired`; None for less than two, of whom none has a wrong cloth."""
        encoded = []
        for batch in self.batches():
            latents = self.trainer.encode(batch) | {"seed": torch.tensor(batch["seed"])}
            vanished = ~latents["mask"].flatten(1).any(dim=1).cpu()
            if vanished.any():
                names = ", ".join(name for name, gone in zip(batch["name"], vanished) if gone)
                logger.info("not probed, since the mask vanishes at the latents' size: %s", names)
            encoded.append({name: tensor.cpu()[~vanished] for name, tensor in latents.items()})
            self.captions += itertools.compress(batch.get("caption", ()), (~vanished).tolist())
        if sum(len(latents["seed"]) for latents in encoded) < 2:
            return None
        return {name: torch.cat([latents[name] for latents in encoded]) for name in encoded[0]}

    @torch.no_grad()
    def probe(self) -> dict[str, float]:
        """The masked noise error without a cloth, with the right one and with a wrong one, on the same test persons and noise.

        While the cloth is being read, right < none < wrong.
        """
        trainer, scheduler, errors, masked = self.trainer, self.trainer.noise_scheduler, defaultdict(float), 0.0
        of_cloths = {*CLOTH_LATENTS, "worn"} & self.probes.keys()
        others = {name: self.probes[name].roll(1, 0) for name in of_cloths}
        texts = {"none": None, "right": self.captions, "wrong": self.captions[-1:] + self.captions[:-1]}
        for rows in torch.arange(len(self.probes["seed"])).split(self.args.train_batch_size):
            batch = {name: tensor[rows] for name, tensor in self.probes.items()}
            conditioning, mean, _ = trainer.latents(batch)
            wrong, *_ = trainer.latents(batch | {name: cloths[rows] for name, cloths in others.items()})
            mean = mean.float() * trainer.vae.config.scaling_factor
            drawn = draw(batch["seed"].tolist(), mean.shape[1:], mean.device)
            seen = torch.ones(len(mean), device=mean.device)
            cloths = (("none", conditioning, 0 * seen), ("right", conditioning, seen), ("wrong", wrong, seen))
            for t, (name, shown, visible) in itertools.product(PROBED_TIMESTEPS, cloths):
                timesteps = torch.full((len(mean),), t, device=mean.device)
                clean, noise = trainer.on_canvas(shown, mean, drawn)
                captions = [texts[name][row] for row in rows.tolist()] if texts[name] else None
                noisy = scheduler.add_noise(clean, noise, timesteps)
                predicted = trainer.predict(shown, noisy, timesteps, visible, captions)
                error = (predicted - unet_target(scheduler, clean, noise, timesteps)).square()
                error = error if self.args.cloth_conditioning == "reference" else conditioning.person_part(error)
                errors[f"probe/t{t}_{name}"] += (error * conditioning.mask).sum().item()
            masked += conditioning.mask.expand_as(mean).sum().item()
        return {name: error / masked for name, error in errors.items()}

    def run(self) -> dict[str, float]:
        """Probe the published weights, and try cloths on test persons; the grid goes to OUTPUT_DIR/validation and the trackers."""
        logs = {}
        with forgiven("validation"), self.trainer.published_weights():
            if self.probes is not None:
                logs = self.probe()
                shown = ", ".join(f"{name.removeprefix('probe/')} {error:.4f}" for name, error in logs.items())
                logger.info("step %d, masked noise error: %s", self.trainer.step, shown)
            if self.tryons and self.accelerator.is_main_process:
                self.save_grid()
        self.accelerator.wait_for_everyone()
        return logs

    def try_on(self, person: PictureInput, cloth: PictureInput, mask: PictureInput | None, **options) -> list | Tensor:
        """A call of the pipeline as users make it; its results."""
        with self.accelerator.autocast():
            return self.trainer.pipe(person, cloth, mask, **options).images

    def save_grid(self) -> None:
        size, tiles = {"height": self.trainer.height, "width": self.trainer.width}, []
        roles = cloth_roles(self.args.num_cloths)
        for name, pictures in self.tryons:
            person, cloths = pictures["person"], [pictures[role] for role in roles if role in pictures]
            generator = torch.Generator(self.accelerator.device).manual_seed(self.args.seed)
            with forgiven(f"trying on {name}"):
                options = {"pose_image": pictures.get("pose"), "generator": generator}
                options["prompt"] = pictures.get("caption")
                (result,) = self.try_on(person, [cloths], pictures.get("mask"), **options)
                cloths += [Image.new("RGB", person.size, "white")] * (len(roles) - len(cloths))
                shown = (person, *(fit_cloth(cloth, **size) for cloth in cloths), result)
                tiles += [picture.resize((size["width"], size["height"])) for picture in shown]
        if not tiles:
            return
        grid = make_image_grid(tiles, rows=len(tiles) // (2 + len(roles)), cols=2 + len(roles))
        file = self.args.output_dir / "validation" / f"step-{self.trainer.step:06d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        grid.save(file)
        with forgiven(f"tracking {file}"):
            self.track_grid(grid)

    def track_grid(self, grid: Image.Image) -> None:
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"validation": np.asarray(grid)[None]}, self.trainer.step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({"validation": [grid]}, self.trainer.step)
            elif tracker.name == "trackio":
                import trackio  # there, since it is the tracker

                tracker.log({"validation": trackio.Image(np.asarray(grid))}, self.trainer.step)

    def best_guidance(self) -> float:
        """The scale with which test persons in their own cloths come out nearest to their photographs, inside the mask."""
        if not len(self.paired):
            known = self.trainer.settings.guidance_scale
            logger.warning(
                "guidance %g is recommended untried: there are no test persons with all that they would be tried on with",
                known,
            )
            return known
        logger.info("which guidance suits: %d test persons at %d scales", len(self.paired), len(GUIDANCE_SCALES))
        errors, masked = dict.fromkeys(GUIDANCE_SCALES, 0.0), 0.0
        size = {"height": self.trainer.height, "width": self.trainer.width}
        bar = tqdm(total=len(errors) * len(self.paired), desc="guidance")
        with bar, self.trainer.published_weights():
            for batch in self.batches():
                truth, mask = batch["person"] / 2 + 0.5, batch["mask"]
                person = batch["condition"] / 2 + 0.5 if self.args.mask_free else truth
                shown = (person, self.shown_cloths(batch), None if self.args.mask_free else mask)
                pose = batch["pose"] / 2 + 0.5 if self.args.pose else None
                for scale in errors:
                    generators = [torch.Generator().manual_seed(seed) for seed in batch["seed"]]
                    options = {"num_inference_steps": GUIDANCE_STEPS, "composite": False, "output_type": "pt"}
                    options |= {"pose_image": pose, "prompt": batch.get("caption")}
                    result = self.try_on(*shown, guidance_scale=scale, generator=generators, **size, **options)
                    errors[scale] += ((result - truth).square() * mask).sum().item()
                    bar.update(len(truth))
                masked += mask.expand_as(truth).sum().item()
        self.guidance_errors = {scale: error / masked for scale, error in errors.items()}
        best = min(errors, key=self.guidance_errors.get)
        measured = ", ".join(f"{scale:g}: {error:.5f}" for scale, error in self.guidance_errors.items())
        logger.info("squared error in the mask by guidance: %s; %g is recommended", measured, best)
        return best


class Checkpoints:
    """What is kept of a run: its checkpoints, the trained weights, and what is uploaded of them."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.args, self.accelerator = trainer, trainer.args, trainer.accelerator
        self.folder, self.resumed = trainer.args.output_dir, None
        self.uploaded: bool | None = None  # whether the last upload of this process went well
        wanted = self.args.resume_from_checkpoint
        if wanted is not None:
            self.resumed = (
                Path(wanted) if wanted != "latest" else next(reversed(finished_checkpoints(self.folder)), None)
            )
        if self.resumed is not None:
            self.check_resumed()
        elif wanted is not None:
            logger.info("--resume_from_checkpoint latest: no checkpoint in %s, starting fresh", self.folder)

    def discard_earlier(self) -> None:
        """What --overwrite_output_dir takes away."""
        if self.args.overwrite_output_dir and self.accelerator.is_main_process:
            for path in left_behind(self.args):
                logger.info("--overwrite_output_dir: discarded %s", path)
                discard(path)

    def check_resumed(self) -> None:
        """A run goes on as what it is: what its weights have learnt with does not change."""
        with safe_open(self.resumed / TRAINED_NAME, "pt") as file:
            before = asdict(AdapterSettings.from_metadata(file.metadata(), self.resumed / TRAINED_NAME))
        flags = self.resumed_flags()
        before |= {name: self.progress().get(name) for name in flags}
        now = asdict(self.trainer.settings) | flags
        changed = [name for name in (*RESUMED_SETTINGS, *flags) if before[name] != now[name]]
        if changed:
            was, is_now = (", ".join(f"{name} {run[name]}" for name in changed) for run in (before, now))
            raise ValueError(f"--resume_from_checkpoint: {self.resumed} was trained with {was}, not with {is_now}")
        if self.progress().get("pairs") != self.pairs_mark:
            said = "--resume_from_checkpoint: %s has learnt from other pairs, and goes on with these"
            logger.warning(said, self.resumed)

    def resumed_flags(self) -> dict[str, Any]:
        """What no adapter says of itself and does not change either, as JSON has it."""
        args = self.args
        flags = {
            "lora_rank": args.lora_rank,
            "resolutions": args.resolutions and [list(size) for size in args.resolutions],
            "num_cloths": args.num_cloths if args.num_cloths > 1 else None,
            "vae_name_or_path": args.vae_name_or_path,
            "guidance_distillation": args.guidance_distillation,
            "init_adapter": self.trainer.begun_from,
            "prediction_type": self.trainer.noise_scheduler.config.prediction_type,
            "base_weights": self.trainer.base_weights,
        }
        kept_apart = {"adversarial_loss": args.adversarial_weight, "fp16_scaler": self.accelerator.scaler}
        return flags | {name: True if state else None for name, state in kept_apart.items()}

    @cached_property
    def pairs_mark(self) -> str | None:
        """What stands for the names of the pairs, in their order; nothing does for a stream's."""
        pairs = self.trainer.pairs
        if self.args.streaming:
            return None
        names = "\n".join(map(pairs.name, range(len(pairs))))
        return hashlib.sha256(names.encode()).hexdigest()[:16]

    def progress(self) -> dict[str, Any]:
        return json.loads((self.resumed / "progress.json").read_text(encoding="utf-8"))

    def register(self) -> None:
        """What accelerate saves and loads."""
        self.accelerator.register_for_checkpointing(self.trainer.schedule, self.trainer.ema)
        if self.trainer.adversary is not None:
            self.accelerator.register_for_checkpointing(self.trainer.adversary)
        self.accelerator.register_save_state_pre_hook(self.save_weights)
        self.accelerator.register_load_state_pre_hook(self.load_weights)

    def resume(self) -> None:
        """Weights and counters of the checkpoint; rates, decay and lengths are the flags'."""
        if self.resumed is None:
            return
        trainer, progress = self.trainer, self.progress()
        self.accelerator.load_state(str(self.resumed))
        self.accelerator.step = 0  # of batches in an update: the flags may say otherwise now
        trainer.ema.to(self.accelerator.device)  # what accelerate restores for others lies on the CPU
        trainer.step, trainer.losses, trainer.ema.decay = progress["step"], progress["losses"], self.args.ema_decay
        if self.args.streaming:
            trainer.place = self.stream_place(progress)
        trainer.schedule.base_lrs = [self.args.learning_rate] * len(trainer.optimizer.param_groups)
        for group, factor in zip(trainer.optimizer.param_groups, trainer.schedule.lr_lambdas, strict=True):
            group["initial_lr"], group["weight_decay"] = self.args.learning_rate, self.args.adam_weight_decay
            group["lr"] = self.args.learning_rate * factor(trainer.schedule.last_epoch)
        logger.info("resumed from %s", self.resumed)

    def stream_place(self, progress: dict[str, Any]) -> tuple[int, int]:
        """Where this process goes on in its part of the stream: as noted, or counted by those who shared it otherwise."""
        places, rank = progress.get("places", []), self.accelerator.process_index
        if len(places) == self.accelerator.num_processes:
            return tuple(places[rank])
        return 0, progress["step"] * self.args.gradient_accumulation_steps * self.args.train_batch_size

    def save_weights(self, models: list[torch.nn.Module], weights: list[dict], output_dir: str) -> None:
        """accelerate's hook: a checkpoint holds the trained weights in fp32, not the whole UNet."""
        if self.accelerator.is_main_process:
            self.write_weights(Path(output_dir) / TRAINED_NAME)
        while weights:
            weights.pop()

    def load_weights(self, models: list[torch.nn.Module], input_dir: str) -> None:
        weights, _ = read_adapter(Path(input_dir) / TRAINED_NAME)
        assign(self.trainer.trained, [weights[name] for name in self.trainer.parameters])
        while models:
            models.pop()

    def save(self) -> None:
        """Write under another name, rename when whole, and only then delete the oldest.

        Raises:
            OSError: it cannot be written, as on a full disk; those before are as they were.
        """
        final = self.folder / f"checkpoint-{self.trainer.step}"
        unfinished = final.with_name(f"unfinished-{final.name}")
        if self.accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            self.write(unfinished)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's and safetensors' too, of a full disk
            shutil.rmtree(unfinished, ignore_errors=True)
            newest = next(reversed(finished_checkpoints(self.folder)), None)
            raise OSError(f"{final} could not be written, and the newest is {newest}: {error}") from error
        if self.accelerator.is_main_process:
            unfinished.rename(final)
            kept = self.args.checkpoints_total_limit
            for old in finished_checkpoints(self.folder)[:-kept] if kept else ():
                discard(old)

    def write(self, folder: Path) -> None:
        """What a run goes on from, and the adapter that it would publish."""
        self.accelerator.save_state(str(folder))
        places = gather_object([self.trainer.place])
        if self.accelerator.is_main_process:
            trainer = self.trainer
            progress = {"step": trainer.step, "losses": trainer.losses, "pairs": self.pairs_mark}
            progress |= self.resumed_flags()
            progress |= {"places": places} if self.args.streaming else {}
            write_text(folder / "progress.json", json.dumps(progress))
            self.publish(folder)

    def write_weights(self, file: Path, dtype: torch.dtype | None = None) -> None:
        weights = {name: parameter.detach().to(dtype) for name, parameter in self.trainer.parameters.items()}
        write_adapter(file, weights, replace(self.trainer.settings, trained_steps=self.trainer.step))

    def write_lora(self, folder: Path) -> None:
        """diffusers' own LoRA file; the settings are a metadata entry of their own, since diffusers reads its entry whole."""
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.trainer.unet))
        layers = {name: layer.half() for name, layer in layers.items()}
        described = {"unet_lora_adapter_metadata": self.trainer.unet.peft_config["default"].to_dict()}
        with tempfile.TemporaryDirectory() as temporary:
            StableDiffusionVTONPipeline.save_lora_weights(temporary, layers, weight_name=LORA_NAME, **described)
            weights, metadata = read_safetensors(Path(temporary) / LORA_NAME)
        settings = replace(self.trainer.settings, trained_steps=self.trainer.step).metadata()
        with whole_file(folder / LORA_NAME) as file:
            save_file(weights, file, metadata | {LORA_SETTINGS: json.dumps(settings)})

    def publish(self, folder: Path) -> None:
        """The averaged weights in fp16, as they are loaded."""
        with self.trainer.published_weights():
            if self.args.lora_rank:
                self.write_lora(folder)
            else:
                self.write_weights(folder / ADAPTER_NAME, torch.float16)

    def push(self, attempts: int) -> None:
        """Upload; what fails is logged and tried again, since neither training nor what is on disk depends on it."""
        self.uploaded = False
        for attempt in range(1, attempts + 1):
            try:
                self.upload(self.args.hub_model_id or self.folder.resolve().name)
                self.uploaded = True
                return
            except Exception as error:  # of many libraries; whatever it is, the run goes on
                there = self.folder
                logger.warning("upload %d of %d failed, all is still in %s: %s", attempt, attempts, there, error)
                time.sleep(attempt)

    def upload(self, repo_id: str) -> None:
        """The published weights as the pipeline uploads them, and on the card how they were trained."""
        trainer, private, parent = self.trainer, self.args.hub_private_repo or None, self.args.init_adapter
        licence = self.args.hub_license or (None if parent is None else parent_licence(parent))
        base = hub_repository(trainer.settings.base_model)
        trainer.pipe.register_to_config(trained_steps=trainer.step)
        with trainer.published_weights():
            options = {"private": private, "adapter_only": True, "license": licence}
            trainer.pipe.push_to_hub(repo_id, f"Step {trainer.step}", **options)
        repo_id = create_repo(repo_id, exist_ok=True).repo_id  # with its owner
        card, pictures = ModelCard.load(repo_id), sorted((self.folder / "validation").glob("*.png"))[-1:]
        if parent is not None and (repository := hub_repository(parent)) is not None:
            card.data.base_model = [base, repository] if base else repository
        card.text += training_card(self.args, trainer.losses, trainer.validation.guidance_errors, pictures)
        with tempfile.TemporaryDirectory() as folder:
            card.save(Path(folder) / "README.md")
            for picture in pictures:
                (Path(folder) / "validation").mkdir()
                shutil.copy(picture, Path(folder) / "validation")
            message = f"How step {trainer.step} was trained"
            upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)


def training_card(
    args: argparse.Namespace, losses: list[float], guidance_errors: dict[float, float], pictures: list[Path]
) -> str:
    """How an adapter was trained, for its card: no path of this machine, and tables that no flag can break."""
    part = math.ceil(len(losses) / 10)
    curve = [(i + part, losses[i : i + part]) for i in range(0, len(losses), part)]
    flags = {name: value for name, value in vars(args).items() if value is not None and name not in LOCAL_FLAGS}
    for name in ("pretrained_model_name_or_path", "vae_name_or_path", "dataset_name", "init_adapter"):
        if name in flags and Path(flags[name]).exists():
            flags[name] = "a local folder"
    tables = {
        ("up to step", "mean loss"): [(step, f"{sum(some) / len(some):.4f}") for step, some in curve],
        ("guidance", "squared error in the mask"): [(f"{s:g}", f"{e:.5f}") for s, e in guidance_errors.items()],
        ("flag", "value"): flags.items(),
    }
    parts = ["## Training", *(f"![Persons, cloths, results](validation/{picture.name})" for picture in pictures)]
    parts += [markdown_table(head, rows) for head, rows in tables.items() if rows]
    return "\n" + "\n\n".join(parts) + "\n"


def parent_licence(adapter: str) -> str | None:
    """What the card of an adapter that training begins from says of its licence; a run's folder without a card has the one that
    the run was given, or its own parent's, and None without one.
    """
    repository, place = hub_repository(adapter), Path(adapter)
    if repository is None and not place.exists():
        return "unknown"
    if repository is None:
        folder = place if place.is_dir() else place.parent
        card, run = folder / "README.md", folder / "training_args.json"
        if card.is_file():
            return ModelCard.load(card).data.license
        told = json.loads(run.read_text(encoding="utf-8")) if run.is_file() else {}
        parent = told.get("init_adapter")
        return told.get("hub_license") or (None if parent is None else parent_licence(parent))
    try:
        return ModelCard.load(repository).data.license or "unknown"
    except (EntryNotFoundError, RepositoryNotFoundError):  # no card; not on the Hub
        return "unknown"


def finished_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def left_behind(args: argparse.Namespace) -> list[Path]:
    """What a run with these flags may not mix with in --output_dir: all of an earlier run, or what came after the checkpoint
    that is resumed; a cache of latents is no run.
    """
    resumed, checkpoints = args.resume_from_checkpoint, finished_checkpoints(args.output_dir)
    if resumed == "latest" and checkpoints:
        return []
    places = [path.resolve() for path in checkpoints]
    if resumed is not None and Path(resumed).resolve() in places:
        return checkpoints[places.index(Path(resumed).resolve()) + 1 :]

    def there(*names: str) -> list[Path]:
        return [args.output_dir / name for name in names if (args.output_dir / name).exists()]

    trained = there(ADAPTER_NAME, LORA_NAME)
    if resumed == "latest":  # a run without a checkpoint begins again, one that has ended is done
        return trained
    found = checkpoints + trained + there("training_args.json")
    return found + there("validation", "logs") if found else []


def check_output_dir(args: argparse.Namespace) -> None:
    """Nothing of an earlier run is mixed with, nor lost, unless asked for."""
    left = left_behind(args)
    if left and not args.overwrite_output_dir:
        names = ", ".join(path.name for path in left)
        instead = "--resume_from_checkpoint latest goes on with the newest, --overwrite_output_dir discards them"
        if args.resume_from_checkpoint == "latest":
            instead = "there is no checkpoint to go on from, take another folder"
        raise ValueError(f"--output_dir {args.output_dir} holds {names} of an earlier run: {instead}")
    if left and args.init_adapter is not None:
        begun = Path(args.init_adapter).resolve()
        if any(path.resolve() in {begun, *begun.parents} or path.resolve().parent == begun for path in left):
            lost = f"--overwrite_output_dir would discard --init_adapter {args.init_adapter}"
            raise ValueError(f"{lost}: take another --output_dir, got {args.output_dir}")


def claim(folder: Path) -> FileLock:
    """Keeps other processes' runs out of a folder until it is released, or this process ends, however it does.

    Raises:
        ValueError: another run has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", is_singleton=True)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(f"--output_dir {folder} is another run's, which has not ended: take another folder") from None
    return lock


@torch.no_grad()
def assign(parameters: list[torch.nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def discard(path: Path) -> None:
    """Delete a file or a folder, whose name is gone before its first file is: half of a checkpoint is never taken for one."""
    if not path.is_dir():
        return path.unlink()
    leaving = path.with_name(f"leaving-{path.name}")
    shutil.rmtree(leaving, ignore_errors=True)
    path.rename(leaving)
    shutil.rmtree(leaving)


def is_told(error: Exception) -> bool:
    """Whether a sentence of this project's says all of an error; of what a library raises by itself the way there is shown."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, OSError) or Path(last) in {Path(__file__), Path(inspect.getfile(AdapterSettings))}


def main(args: argparse.Namespace) -> None:
    shape = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(format=shape, datefmt="%H:%M:%S", level=logging.INFO)
    if args.init_adapter is not None and Path(args.init_adapter).exists():  # told wherever it is read from
        args.init_adapter = str(Path(args.init_adapter).resolve())
    try:
        trainer = Trainer(args)
    except (ImportError, OSError, ValueError) as error:
        if not is_told(error):
            raise
        raise SystemExit(f"train_vton.py: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("stopped before the first update: the same command begins again") from None
    if trainer.accelerator.is_main_process:
        config = {name: str(v) if isinstance(v, (Path, list)) else v for name, v in vars(args).items()}
        write_text(args.output_dir / "training_args.json", json.dumps(config, indent=2) + "\n")
        trainer.start_trackers({k: v for k, v in config.items() if v is not None})
    try:
        finished = trainer.run()
    except KeyboardInterrupt:  # not during an update: the last checkpoint is whole
        finished = False
    except OSError as error:
        raise SystemExit(f"train_vton.py: {error}") from error
    finally:
        if trainer.accelerator.is_main_process:
            trainer.claim.release()
    with forgiven("the end of tracking"):
        trainer.accelerator.end_training()
    if not finished:
        reason = "" if trainer.unread is None else f"{trainer.unread}: "
        raise SystemExit(f"{reason}stopped at step {trainer.step}: go on with --resume_from_checkpoint latest")
    if trainer.checkpoints.uploaded is False:
        raise SystemExit(f"trained to the end, and not uploaded, as told above: all is in {args.output_dir}")


if __name__ == "__main__":
    main(parse_args())
