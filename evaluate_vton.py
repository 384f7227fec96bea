#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with the
# License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
"""Measure try-on: figures that anybody can reproduce, or one sentence that says why there are none.

    accelerate launch evaluate_vton.py --model stable-diffusion-v1-5/stable-diffusion-inpainting --adapter runs/viton-hd \\
        --dataset_root data/viton-hd --output_dir runs/figures

tries every cloth of the test lists on, keeps the pictures without loss, and writes OUTPUT_DIR/report.json and report.md.

    python evaluate_vton.py --compare runs/figures/report.json runs/others/report.json

puts reports of one protocol side by side. The file reads in the order of a run: arguments, measures, lists and pictures,
trying on, scoring, the report, comparing.
"""

import argparse
import hashlib
import importlib
import importlib.metadata
import itertools
import json
import logging
import math
import os
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import psutil
import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from huggingface_hub import EvalResult
from PIL import Image, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

from pipeline_vton import (
    FAST_STEPS,
    LOOSENESS,
    AdapterSettings,
    as_masks,
    as_pil,
    as_tensors,
    composite_result,
    is_scheduler,
    load_pipeline,
    markdown_table,
    resize,
    whole_file,
)
from train_vton import (
    DRESS_CODE_FOLDERS,
    NOT_NEGATIVE,
    POSITIVE_COUNT,
    SEED,
    SHARE,
    RowPairs,
    TreePairs,
    check_sizes,
    cloth_roles,
    column_of,
    filled,
    fingerprint,
    in_persons_colours,
    is_cloth,
    load_rows,
    open_picture,
    path,
    write_text,
)


# else MKL rounds otherwise where several processes compute, and a byte flips
os.environ.setdefault("MKL_CBWR", "AUTO")
logger = get_logger("evaluate_vton")
SETTINGS = ("paired", "unpaired")
METRICS = ("ssim", "psnr", "lpips", "fid", "kid")
ARROWS = {"ssim": "↑", "psnr": "↑", "lpips": "↓", "fid": "↓", "kid": "↓", "recognition": "↑"}
CLOTH_TYPES = {"upper_body": "upper", "lower_body": "lower", "dresses": "dress"}
SUFFIXES = (".png", ".webp", ".jpg", ".jpeg", ".PNG", ".WEBP", ".JPG", ".JPEG")
INSTALL = "pip install -r requirements-eval.txt"
LIBRARIES = ("torch", "diffusers", "transformers", "torchmetrics", "torch-fidelity", "torchvision", "numpy", "pillow")
RESAMPLES = 2000  # of the bootstrap
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
FEWEST_PERSONS = 4  # of FID and KID, whose subsets are halves
# Of the duplicates' thumbnails: width and height, and the mean difference in levels. Copies of drawn people, half as large and
# lossy, differ by up to 2.4 (once 3.6), the same person in another cloth by 5 and more.
HASH_SIZE, HASH_DISTANCE = (12, 16), 3.0
# From pictures and their masks to what is recognised in each of them.
Recognizer = Callable[[list[Image.Image], list[Image.Image]], list[dict[str, str]]]


# ----------------------------------------------------------------------------------------------------------- arguments


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for add_arguments in (add_data_arguments, add_model_arguments, add_metric_arguments):
        add_arguments(parser)
    args = parser.parse_args(input_args)
    check_args(parser, args)
    return args


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what is tried on").add_argument
    add("--dataset_root", type=path, help="a folder in VITON-HD's or DressCode's layout")
    add("--dataset_name", help="or what datasets.load_dataset takes; unpaired is then every row in the next row's cloth")  # fmt: skip
    add("--dataset_config_name", help="its configuration (default: its only one)")
    add("--streaming", action="store_true", help="read --dataset_name as it comes instead of downloading it first")
    add("--person_column", default="image", help="the person in the cloth (default image)")
    add("--cloth_column", default="cloth", help="the cloth alone (default cloth)")
    add("--mask_column", default="mask", help="the agnostic mask (default mask)")
    add("--condition_column", default="condition", help="paired and mask-free: column, or folder beside the persons', of the person in another cloth (default condition)")  # fmt: skip
    add("--pose_column", default="pose", help="of an adapter that reads poses: their column (default pose)")
    add("--pose_folder", help="of an adapter that reads poses: their folder beside the persons' (default: openpose_img, DressCode's skeletons)")  # fmt: skip
    add("--caption_column", help="with --dataset_name, for an adapter that reads text: a text for every pair (default: the adapter's prompt)")  # fmt: skip
    add("--split", default="test", help="whose pairs are taken (default test)")
    add("--setting", choices=(*SETTINGS, "both"), default="both", help="own cloths, other cloths, or both (default)")
    add("--category", choices=(*DRESS_CODE_FOLDERS, "all"), default="all", help="of DressCode's layout (default all, pooled and each)")  # fmt: skip
    add("--list", type=path, help="a frozen list, OUTPUT_DIR/list.txt of another run, in place of the tree's own")
    add("--num_samples", type=POSITIVE_COUNT, help="the first lines of every list and category (default all)")
    add("--human_parser", help="the parser for --masks parser: a Hub repository or a folder (default: the pipeline's own)")  # fmt: skip
    add("--looseness", choices=LOOSENESS, default="loose", help="of --masks parser, as in predict_mask (default loose)")  # fmt: skip
    add("--num_cloths", type=POSITIVE_COUNT, default=1, help="of an adapter that was trained on outfits: cloths in the folders or columns cloth_2, ... too (default 1)")  # fmt: skip
    add("--cloth_type", choices=tuple(CLOTH_TYPES.values()), default="upper", help="what --masks parser repaints where no category says (default upper)")  # fmt: skip
    add("--masks", choices=("files", "parser", "none"), help="read, drawn by the pipeline's human parser, or none (default files; mask-free: none)")  # fmt: skip
    add("--train_root", type=path, help="the training set's tree: test persons that are in it fail the run")
    add("--drop_duplicates", action="store_true", help="leave them out of the list, and say so, instead")
    add("--output_dir", type=path, help="for pictures and the report; a killed run goes on there")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("who tries on").add_argument
    add("--model", help="the base, or a whole pipeline: a Hub repository or a folder")
    add("--revision", help="its revision on the Hub (default main)")
    add("--adapter", help="the adapter, a Hub repository, a folder or a file; or a LoRA's folder or file (default: none, for a model that is whole; a base alone has learnt no try-on)")  # fmt: skip
    add("--adapter_subfolder", help="where in there, such as CatVTON's mix-48k-1024/attention")
    add("--pred_dir", type=path, help="or pictures that another model made: [SETTING/][CATEGORY/]PERSON__CLOTH.png or PERSON.png")  # fmt: skip
    add("--pred_composited", action="store_true", help="they are the photographs outside the masks, which is checked (default: pasted into them here)")  # fmt: skip
    add("--height", type=POSITIVE_COUNT, help="to work at (default: the adapter's, at the persons' aspect)")
    add("--width", type=POSITIVE_COUNT, help="to work at (default: the adapter's, at the persons' aspect)")
    add("--num_inference_steps", type=POSITIVE_COUNT, help=f"denoising steps (default 50; with --fast {FAST_STEPS})")
    add("--fast", action="store_true", help="few ancestral Euler steps, three quarters of them guided, as pipe.fast() has them")  # fmt: skip
    add("--guidance_scale", type=NOT_NEGATIVE, help="default: the adapter's own")
    add("--scheduler", help="a scheduler class of diffusers (default: the pipeline's own)")
    add("--eta", type=SHARE, help="for DDIM (default: the pipeline's own)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="default: float16 on a GPU, else float32")
    add("--batch_size", type=POSITIVE_COUNT, default=4, help="pictures read, and written, side by side (default 4); the UNet sees one at a time, since batches round otherwise")  # fmt: skip
    add("--seed", type=SEED, default=0, help="with a line's name it seeds the line's noise (default 0)")
    add("--seeds", type=POSITIVE_COUNT, default=1, help="how often everything is tried on, with seeds from --seed on (default 1)")  # fmt: skip


def add_metric_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("how it is measured").add_argument
    add("--metrics", nargs="+", choices=METRICS, default=list(METRICS), help="default all; lpips, fid and kid need torchvision and weights")  # fmt: skip
    add("--eval_height", type=POSITIVE_COUNT, help="with --eval_width, the size at which truth and result are compared (default: the working size)")  # fmt: skip
    add("--eval_width", type=POSITIVE_COUNT, help="with --eval_height, at the persons' aspect")
    add("--lpips_net", choices=("squeeze", "alex", "vgg"), default="squeeze", help="LPIPS' backbone (default squeeze, as CatVTON and Leffa have it)")  # fmt: skip
    add("--lpips_weights", type=path, help="the backbone's weights, torchvision's file (default: downloaded)")
    add("--fid_mode", choices=("clean", "legacy"), default="clean", help="clean-fid's resize (default), or TensorFlow's of 2015")  # fmt: skip
    add("--inception_weights", type=path, help="torch-fidelity's file (default: downloaded)")
    add("--recognizer", help="MODULE:FUNCTION, from lists of PIL pictures and of their masks (white everywhere without masks) to a dict of attributes for each: the share that equals the truth's is reported (the drawn world's: demo.recognition:recognize_drawn)")  # fmt: skip
    add("--push_to_hub", metavar="REPO", help="upload --adapter with the figures in its card")
    add("--compare", nargs="+", type=path, metavar="REPORT", help="print these report.json, or those of these folders, side by side, and do nothing else")  # fmt: skip


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """One sentence for what argparse cannot see by itself."""
    if args.compare is not None:
        if len(args.compare) < 2:
            parser.error(f"--compare needs at least two reports, got {len(args.compare)}")
        args.compare = [file / "report.json" if file.is_dir() else file for file in args.compare]
        for file in args.compare:
            if not file.is_file():
                parser.error(f"--compare: there is no {file}")
        return
    if args.output_dir is None:
        parser.error("--output_dir must be given")
    for one, other in (("dataset_root", "dataset_name"), ("model", "pred_dir")):
        if (getattr(args, one) is None) == (getattr(args, other) is None):
            parser.error(f"give --{one} or --{other}, got {getattr(args, one)} and {getattr(args, other)}")
    if (args.eval_height is None) != (args.eval_width is None):
        parser.error(f"--eval_height and --eval_width go together, got {args.eval_height} and {args.eval_width}")
    for flag in ("streaming", "caption_column"):
        if getattr(args, flag) and args.dataset_name is None:
            parser.error(f"--{flag} needs --dataset_name")
    if args.list is not None and (args.dataset_root is None or not args.list.is_file()):
        parser.error(f"--list must be a file, and goes with --dataset_root, got {args.list} and {args.dataset_root}")
    if args.train_root is not None and args.dataset_root is None:
        parser.error(f"--train_root goes with --dataset_root, whose files it is compared with, got {args.train_root}")
    if args.drop_duplicates and args.train_root is None:
        parser.error("--drop_duplicates needs --train_root")
    if args.scheduler is not None and not is_scheduler(args.scheduler):
        parser.error(f"--scheduler must be the name of a scheduler class of diffusers, got {args.scheduler}")
    if args.fast and (args.scheduler is not None or args.pred_dir is not None):
        parser.error("--fast goes with --model, and has a sampler of its own: leave out --scheduler")
    if args.pred_dir is not None and (args.seeds > 1 or args.push_to_hub or args.masks == "parser"):
        parser.error("--pred_dir has one seed, no adapter to push and no human parser")
    if args.push_to_hub and not args.adapter:
        parser.error(f"--push_to_hub {args.push_to_hub} needs --adapter, in whose card the figures stand")
    if args.human_parser is not None and args.masks != "parser":
        parser.error(f"--human_parser needs --masks parser, got {args.masks}")
    if args.pred_composited and (args.pred_dir is None or args.masks == "none"):
        parser.error("--pred_composited speaks of --pred_dir's pictures, and is checked with the masks")
    if args.recognizer is not None and ":" not in args.recognizer:
        parser.error(f"--recognizer must be MODULE:FUNCTION, got {args.recognizer}")
    for flag in ("dataset_root", "pred_dir", "train_root"):
        if (folder := getattr(args, flag)) is not None and not folder.is_dir():
            parser.error(f"--{flag} must be a folder, got {folder}")
    for flag in ("lpips_weights", "inception_weights"):
        if (file := getattr(args, flag)) is not None and not file.is_file():
            parser.error(f"--{flag} must be a file, got {file}")


# ------------------------------------------------------------------------------------------------------------ measures


def squared_error(result: Tensor, truth: Tensor, mask: Tensor | None = None) -> tuple[float, float]:
    """Sum of squared errors, and of how many values; pictures (3, H, W) in [0, 1], inside the mask (1, H, W) if given."""
    error = (result.double() - truth.double()).square()
    mask = torch.ones_like(error) if mask is None else (mask >= 0.5).expand_as(error).double()
    return (error * mask).sum().item(), mask.sum().item()


def decibels(mean_squared_error: np.ndarray | float) -> np.ndarray:
    """Peak signal-to-noise ratio of values in [0, 1]; infinite where there is no error."""
    with np.errstate(divide="ignore"):
        return -10 * np.log10(mean_squared_error)


def ssim_map(result: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of pictures (3, H, W) in [0, 1] around every value.

    Source: torchmetrics, Gaussian window of sigma 1.5, data_range 1; in float64, since in float32 a flat picture is not
    even equal to itself (.9991).
    """
    measure = metric_library("torchmetrics.functional.image").structural_similarity_index_measure
    return measure(result.double()[None], truth.double()[None], data_range=1.0, return_full_image=True)[1][0]


def masked_mean(values: Tensor, mask: Tensor | None) -> float:
    """The mean of (3, H, W), inside the mask (1, H, W) if given."""
    return (values if mask is None else values[(mask >= 0.5).expand_as(values)]).mean().item()


def ssim(result: Tensor, truth: Tensor, mask: Tensor | None = None) -> float:
    """Structural similarity of pictures (3, H, W) in [0, 1]: its map's mean, inside the mask (1, H, W) if given."""
    return masked_mean(ssim_map(result, truth), mask)


@dataclass(frozen=True)
class Interval:
    """A figure and the 95 % of the bootstrap around it."""

    value: float
    low: float
    high: float


def bootstrap(
    numerators: Sequence[float],
    denominators: Sequence[float] | None = None,
    transform: Callable[[np.ndarray], np.ndarray] = np.asarray,
    seed: int = 0,
) -> Interval:
    """`transform(sum of numerators / sum of denominators)` over the samples, with 2.5 and 97.5 % of 2,000 resamples of them.

    Without denominators it is a mean. PSNR is `transform=decibels` of squared errors and counts: pooled, never infinite
    because of one picture.

    Source: the percentile bootstrap, Efron and Tibshirani, 1993.
    """
    numerators = np.asarray(numerators, dtype=np.float64)
    denominators = np.ones_like(numerators) if denominators is None else np.asarray(denominators, dtype=np.float64)
    if numerators.ndim != 1 or not len(numerators) or denominators.shape != numerators.shape:
        shapes = f"{numerators.shape} and {denominators.shape}"
        raise ValueError(f"`numerators` and `denominators` must be equally many, at least one, got shapes {shapes}")
    drawn = np.random.default_rng(seed).integers(0, len(numerators), (RESAMPLES, len(numerators)))
    resampled = transform(numerators[drawn].sum(axis=1) / denominators[drawn].sum(axis=1))
    ordered = np.sort(resampled)  # no interpolation between quantiles, which infinities would turn into NaN
    low, high = ordered[int(0.025 * RESAMPLES)], ordered[int(0.975 * RESAMPLES)]
    return Interval(float(transform(numerators.sum() / denominators.sum())), float(low), float(high))


class Features(torch.nn.Module):
    """Features that are there already, (N, d), handed on: torchmetrics' FID and KID then only compare them, in one process."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """FID of features (N, d) and (M, d), in float64. Source: arXiv:1706.08500; torchmetrics."""
    metric = metric_library("torchmetrics.image.fid").FrechetInceptionDistance(
        Features(real.shape[1]), sync_on_compute=False
    )
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return metric.compute().item()


def kernel_distance(real: Tensor, fake: Tensor, seed: int = 0) -> tuple[float, float]:
    """KID of features (N, d) and (M, d), and its deviation over 100 subsets of min(1000, half of the fewer), drawn by `seed`.

    Source: arXiv:1801.01401; torchmetrics, whose subsets come from torch's global generator, which is put back.
    """
    size = min(KID_SUBSET_SIZE, min(len(real), len(fake)) // 2)
    options = {"subsets": KID_SUBSETS, "subset_size": size, "sync_on_compute": False}
    metric = metric_library("torchmetrics.image.kid").KernelInceptionDistance(Features(real.shape[1]), **options)
    metric.update(real.double().cpu(), real=True)
    metric.update(fake.double().cpu(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return mean.item(), deviation.item()


class Inception(torch.nn.Module):
    """Pictures uint8 (N, 3, H, W) to the 2,048 features of torch-fidelity's Inception, the graph of 2015.

    Args:
        mode: `"clean"` resizes as clean-fid does, arXiv:2104.11222 (bicubic with antialiasing, clamped, not rounded);
            `"legacy"` as TensorFlow's graph did (bilinear without).
        weights: torch-fidelity's file; None downloads it.
    """

    num_features = 2048

    def __init__(self, mode: str = "clean", weights: Path | None = None) -> None:
        super().__init__()
        fidelity = metric_library("torch_fidelity.feature_extractor_inceptionv3")
        options = {"feature_extractor_weights_path": None if weights is None else str(weights)}
        net = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], **options)
        self.body = torch.nn.Sequential(*[layer for name, layer in net.named_children() if name != "fc"])
        self.size, self.mode = (net.INPUT_IMAGE_SIZE, net.INPUT_IMAGE_SIZE), mode
        self.legacy_resize = partial(fidelity.interpolate_bilinear_2d_like_tensorflow1x, align_corners=False)

    def forward(self, pictures: Tensor) -> Tensor:
        pictures = pictures.float()
        if self.mode == "legacy":
            pictures = self.legacy_resize(pictures, size=self.size)
        else:
            pictures = clean_resize(pictures, self.size)
        return self.body((pictures - 128) / 128).flatten(1)


def clean_resize(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, 3, H, W) in 0-255 to (N, 3, *size), as PIL's bicubic filter does on floats."""
    return F.interpolate(pictures, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)


def load_lpips(net: str, weights: Path | None) -> torch.nn.Module:
    """torchmetrics' LPIPS; `weights` stands in torch's own cache, where torchvision would download the backbone to."""
    metric_library("torchvision")  # without which torchmetrics names another remedy
    measure = metric_library("torchmetrics.image.lpip").LearnedPerceptualImagePatchSimilarity
    if weights is None:
        return measure(net, normalize=True, sync_on_compute=False)
    names = {"squeeze": "squeezenet1_1", "alex": "alexnet", "vgg": "vgg16"}
    url = metric_library("torchvision.models").get_model_weights(names[net]).DEFAULT.url
    before = torch.hub.get_dir()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "checkpoints").mkdir()
        (Path(folder) / "checkpoints" / Path(url).name).symlink_to(weights.resolve())
        torch.hub.set_dir(folder)
        try:
            return measure(net, normalize=True, sync_on_compute=False)
        finally:
            torch.hub.set_dir(before)


def metric_library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"measuring needs {name.split('.')[0]}: {INSTALL}") from error


# -------------------------------------------------------------------------------------------------- lists and pictures


@dataclass(frozen=True)
class Line:
    """Who wears what. Person and cloth are named as in the list, DressCode's with their category's folder before."""

    setting: str
    person: str
    cloth: str

    @property
    def name(self) -> str:
        """Of the result, without a suffix; DressCode's lie in their category's folder."""
        return f"{Path(self.person).with_suffix('')}__{Path(self.cloth).stem}"

    @property
    def category(self) -> str | None:
        folder = Path(self.person).parts[0]
        return folder if folder in DRESS_CODE_FOLDERS else None

    def __str__(self) -> str:
        return f"{self.setting}\t{self.person}\t{self.cloth}"


def frozen_lines(file: Path) -> list[tuple[Line, str]]:
    """The lines of a list that another run wrote, SETTING, PERSON and CLOTH with tabs between them, and the places of them."""
    found = []
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        words, where = text.split("\t"), f"{file}, line {number}"
        if len(words) != 3 or words[0] not in SETTINGS:
            raise ValueError(
                f"{where}: must be {' or '.join(SETTINGS)}, a person and a cloth with tabs between, got {text!r}"
            )
        found.append((Line(*words), where))
    return found


class EvaluatedPairs(TreePairs):
    """The trainer's pairs, with the `names` of their lines; files are opened when their line's turn comes, which then fails alone.

    With `frozen` they are its lines, whatever lists the tree has.
    """

    def __init__(self, frozen: Path | None, *args: Any, **options: Any) -> None:
        self.frozen, self.names = frozen, []
        super().__init__(*args, **options)

    def named_pairs(self, folder: str, split: str, paired: bool) -> list[tuple[str, str, str]]:
        before = f"{folder}/" if self.dress_code else ""
        if self.frozen is None:
            named = super().named_pairs(folder, split, paired)
        else:
            named = [
                (line.person.removeprefix(before), line.cloth.removeprefix(before), where)
                for line, where in frozen_lines(self.frozen)
                if line.setting == SETTINGS[not paired] and line.person.startswith(before)
            ]
        self.names += [(before + person, before + cloth) for person, cloth, _ in named]
        return named

    def check(self) -> None:
        pass


class TreeSource:
    """Lines and pictures of a tree, through the trainer's reader; `lists` names the files that were taken.

    A drawn world has more than photographs have: the `truth` of an unpaired line, `tryon/PERSON__CLOTH.png` beside the persons'
    folder, and `factors.jsonl`, which says of every line by what it varies and what can be recognised.

    Args:
        args: of `parse_args`.
        roles: which pictures to read, by setting.
    """

    def __init__(self, args: argparse.Namespace, roles: dict[str, list[str]]) -> None:
        self.root, self.split = args.dataset_root, args.split
        folders = {"condition_folder": args.condition_column, "pose_folder": args.pose_folder}
        self.places: dict[Line, tuple[EvaluatedPairs, int]] = {}
        for setting in settings_of(args):
            paired = setting == "paired"
            pairs = EvaluatedPairs(args.list, self.root, self.split, paired, roles[setting], **folders)
            for index, names in enumerate(pairs.names):
                if (line := Line(setting, *names)) in self.places:
                    raise ValueError(f"{pairs.pairs[index][1]}: {pairs.name(index)} stands in the list twice")
                self.places[line] = pairs, index
        for line, where in frozen_lines(args.list) if args.list is not None else ():
            asked = line.setting in settings_of(args) and args.category in {"all", line.category}
            if asked and line not in self.places:
                raise ValueError(f"{where}: {self.root} has no folder for {str(line)!r}")
        self.lines = list(self.places)
        wheres = [pairs.pairs[index][1] for pairs, index in self.places.values()]
        self.lists = list(dict.fromkeys(where.rsplit(", line ", 1)[0] for where in wheres))
        self.known = self.read_factors()
        further = cloth_roles(args.num_cloths + 1)[-1]
        if (self.root / self.split / further).is_dir():
            logger.warning("%s has %s, which --num_cloths %d would show", self.root, further, args.num_cloths + 1)

    def read_factors(self) -> dict[Line, dict[str, dict[str, str | None]]]:
        """Of every line that factors.jsonl has: `factors` and `attributes`."""
        known, file = {}, self.root / "factors.jsonl"
        folders = {kind: folder for folder, kind in CLOTH_TYPES.items() if (self.root / folder).is_dir()}
        for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
            row = json.loads(text)
            folder = folders.get(row["category"])
            names = [f"{folder}/{row[role]}" if folder else row[role] for role in ("person", "cloth")]
            if row["split"] == self.split:
                known[Line("paired" if row["paired"] else "unpaired", *names)] = row
        return known

    def files(self, line: Line) -> dict[str, Path]:
        pairs, index = self.places[line]
        files = pairs.pairs[index][2]
        truth = files["person"].parent.parent / "tryon" / f"{Path(line.name).name}.png"
        return files | ({"truth": truth} if line.setting == "unpaired" and truth.is_file() else {})

    def caption(self, line: Line) -> str | None:
        return None

    def pictures(self, line: Line) -> dict[str, Image.Image]:
        pairs, index = self.places[line]
        pictures, files = pairs.pictures(index), self.files(line)
        if "truth" in files:
            pictures["truth"] = read_picture(files["truth"], "truth")
        check_sizes(
            {role: picture.size for role, picture in pictures.items() if role != "truth"}, str(files["person"])
        )
        return pictures

    def factors(self, line: Line) -> dict[str, str]:
        """By what a line varies: its category and the levels of its factors."""
        category = {"category": line.category} if line.category else {}
        return category | self.known.get(line, {}).get("factors", {})

    def attributes(self, line: Line) -> dict[str, str]:
        """What can be recognised of the cloth in a line's truth."""
        attributes = self.known.get(line, {}).get("attributes", {})
        return {name: value for name, value in attributes.items() if value is not None}


class RowSource:
    """Lines and pictures of a `datasets` split: every row in its own cloth, or in the next row's. Arguments as of `TreeSource`."""

    def __init__(self, args: argparse.Namespace, roles: dict[str, list[str]]) -> None:
        settings = settings_of(args)
        columns = {role: column_of(args, role) for setting in settings for role in roles[setting]}
        rows = load_rows(args, args.split, columns)
        rows = StreamedRows(rows, args.num_samples, 2 * args.batch_size) if args.streaming else rows
        self.rows, self.caption_column = rows, args.caption_column
        self.pairs = {s: RowPairs(rows, {role: columns[role] for role in roles[s]}) for s in settings}
        self.lists = [f"{args.dataset_name}, split {args.split}"]
        count, step = len(rows), {"paired": 0, "unpaired": 1}
        self.lines = [Line(s, f"row-{i}", f"row-{(i + step[s]) % count}") for s in settings for i in range(count)]

    def caption(self, line: Line) -> str | None:
        """That of the cloth's row."""
        column, row = self.caption_column, int(line.cloth.removeprefix("row-"))
        return filled(self.rows[row][column], f"row {row}: the caption") if column else None

    def pictures(self, line: Line) -> dict[str, Image.Image]:
        person, cloth = (int(name.removeprefix("row-")) for name in (line.person, line.cloth))
        pictures = self.pairs[line.setting].pictures
        if line.setting == "paired":
            return pictures(person)
        kept = {role: picture for role, picture in pictures(person).items() if not is_cloth(role)}
        return kept | {role: picture for role, picture in pictures(cloth).items() if is_cloth(role)}

    def files(self, line: Line) -> dict[str, Path]:
        """Nothing: rows have no files, and neither factors nor attributes."""
        return {}

    factors = attributes = files


class StreamedRows:
    """A stream as a sequence: it is counted once, read on from where it stands, and begun again for a row that is no longer held.

    Of the stream are read a row more than the `limit`, whose cloth the last line takes; of its rows `held` are kept.
    """

    def __init__(self, stream: Any, limit: int | None, held: int) -> None:
        self.stream, self.held = stream if limit is None else stream.take(limit + 1), held
        self.length, self.at = sum(1 for _ in self.stream), math.inf
        self.rows_at: dict[int, dict[str, Any]] = {}
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        with self.lock:
            if index not in self.rows_at and index < self.at:
                self.rows, self.at, self.rows_at = iter(self.stream), -1, {}
            while self.at < index:
                self.at += 1
                self.rows_at[self.at] = next(self.rows)
                self.rows_at.pop(self.at - self.held, None)
            return self.rows_at[index]


def read_picture(file: Path, role: str) -> Image.Image:
    return open_picture(partial(Image.open, file), str(file), role)


def read_result(file: Path, person: Image.Image) -> Image.Image:
    """In the colours of the person, whose profile ours carry."""
    return in_persons_colours({"person": person, "result": read_picture(file, "result")}, str(file))["result"]


def settings_of(args: argparse.Namespace) -> Sequence[str]:
    return SETTINGS if args.setting == "both" else (args.setting,)


def choose_lines(args: argparse.Namespace, lines: list[Line]) -> list[Line]:
    """The lines of --category, and of every setting and category the first --num_samples; ValueError where two would have one result."""
    if args.category != "all":
        lines = [line for line in lines if line.category == args.category]
    seen, chosen = Counter(), []
    for line in lines:
        seen[line.setting, line.category] += 1
        if args.num_samples is None or seen[line.setting, line.category] <= args.num_samples:
            chosen.append(line)
    if not chosen:
        raise ValueError(
            f"there is nothing to evaluate: no line of --setting {args.setting} --category {args.category}"
        )
    named: dict[tuple[str, str], Line] = {}
    for line in chosen:
        other = named.setdefault((line.setting, line.name), line)
        if other is not line:
            both = " and ".join(f"{each.person} in {each.cloth}" for each in (other, line))
            raise ValueError(f"{both} would both have the result {line.name}.png: rename one")
    return chosen


def write_list(file: Path, lines: list[Line], taken: Path | None = None) -> str:
    """The frozen list, for --list; returns its hash. ValueError where it would be the list that was `taken`, cut short."""
    text = "".join(f"{line}\n" for line in lines)
    same = taken is not None and file.is_file() and file.samefile(taken)
    if same and set(taken.read_text(encoding="utf-8").splitlines()) != set(text.splitlines()):
        raise ValueError(
            f"--list {taken} would be overwritten with {len(lines)} of its lines: take another --output_dir"
        )
    write_text(file, text)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def perceptual_hash(file: Path) -> np.ndarray:
    """The picture at 12x16 pixels, (576,): alike for other sizes and after lossy storage, unlike for another cloth."""
    picture = read_picture(file, "person")
    return np.asarray(picture.resize(HASH_SIZE, Image.Resampling.BOX), dtype=np.float32).ravel()


def find_duplicates(persons: dict[str, Path], train_root: Path) -> dict[str, str]:
    """Persons of the test lists that are among the training persons too, and under which name."""
    train = TreePairs(train_root, "train", True, ["person"])
    files = [files["person"] for _, _, files in train.pairs]
    known = np.stack([perceptual_hash(file) for file in tqdm(files, desc="hash the training persons")])
    found = {}
    for name, file in tqdm(persons.items(), desc="hash the tested persons"):
        distances = np.abs(known - perceptual_hash(file)).mean(axis=1)
        if distances.min() <= HASH_DISTANCE:
            found[name] = str(files[distances.argmin()].relative_to(train_root))
    return found


# ----------------------------------------------------------------------------------------------------------- trying on


def seed_of(seed: int, line: Line) -> int:
    """A line's own seed, whoever computes it and beside whatever."""
    return int.from_bytes(hashlib.sha256(f"{seed} {line}".encode()).digest()[:8]) >> 1


class Model:
    """Tries lines on, one picture at a time: batched kernels round otherwise, and would make other pictures."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, dtype = args, args.dtype and getattr(torch, args.dtype)
        self.pipe = load_pipeline(  # without the safety checker, whose black pictures would be measured
            args.model, args.adapter, args.human_parser, args.scheduler, dtype, device,
            args.adapter_subfolder, revision=args.revision, safety_checker=None,
        )  # fmt: skip
        if args.push_to_hub and getattr(self.pipe.unet, "peft_config", None):
            raise ValueError(f"--push_to_hub uploads adapters, not LoRAs such as {args.adapter}")
        if args.masks == "parser" and self.pipe.human_parser is None:
            raise ValueError(f"--masks parser: {args.model} holds no human parser, name one with --human_parser")
        if args.caption_column and self.pipe.config.cross_attention != "prompt":
            raise ValueError(f"--caption_column {args.caption_column}: this model's adapter reads no text")
        if args.masks == "none" and not self.pipe.config.mask_free:
            raise ValueError(
                "--masks none goes with mask-free adapters and --pred_dir: this model's adapter needs masks"
            )
        self.pipe.set_progress_bar_config(disable=True)
        steps = {} if args.num_inference_steps is None else {"num_inference_steps": args.num_inference_steps}
        self.sampling = self.pipe.fast(**steps) if args.fast else {"num_inference_steps": 50} | steps
        self.pipe.check_settings(args.height, args.width, self.sampling["num_inference_steps"])
        self.mask_free, self.posed = self.pipe.config.mask_free, self.pipe.config.pose == "painted"

    def working_size(self, person: Image.Image) -> tuple[int, int]:
        return self.pipe.resolve_size(person.height, person.width, self.args.height, self.args.width)

    def describe(self, size: tuple[int, int]) -> dict[str, Any]:
        """All that the pictures depend on, beside the lines."""
        args, pipe = self.args, self.pipe
        said = {} if args.eta is None else {"eta": args.eta}
        said |= {"num_cloths": args.num_cloths} if args.num_cloths > 1 else {}
        said |= {"caption_column": args.caption_column} if args.caption_column else {}
        settings = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
        settings |= {setting.name: pipe.config[setting.name] for setting in fields(AdapterSettings)}
        if self.posed:
            said["poses"] = args.pose_folder or ("the layout's own" if args.dataset_root else args.pose_column)
        return {
            "model": args.model,
            "revision": args.revision,
            "adapter": args.adapter,
            **({} if args.adapter_subfolder is None else {"adapter_subfolder": args.adapter_subfolder}),
            "weights": fingerprint([*pipe.unet.state_dict().values(), *pipe.vae.state_dict().values()]),
            "settings": hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16],
            "scheduler": type(pipe.scheduler).__name__,
            **self.sampling,
            "guidance_scale": pipe.config.guidance_scale if args.guidance_scale is None else args.guidance_scale,
            "working_size": list(size),
            "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        } | said

    def describe_masks(self) -> str:
        args, weights = self.args, fingerprint(self.pipe.human_parser.state_dict().values())
        return f"{args.human_parser or args.model} of weights {weights}, {args.looseness}, {args.cloth_type}"

    def draw_mask(self, line: Line, person: Image.Image) -> Image.Image:
        kind = CLOTH_TYPES.get(line.category, self.args.cloth_type)
        return self.pipe.predict_mask(person, kind, self.args.looseness)

    def bare(
        self,
        line: Line,
        pictures: dict[str, Image.Image],
        seed: int,
        size: tuple[int, int],
        caption: str | None,
    ) -> Tensor:
        """The bare decode (3, H, W) in [0, 1] at the working size."""
        args = self.args
        outfit = [pictures[role] for role in cloth_roles(args.num_cloths) if role in pictures]
        return self.pipe(
            pictures.get("condition", pictures["person"]),
            [outfit],
            pictures.get("mask"),
            pictures.get("pose"),
            prompt=caption,
            height=size[0],
            width=size[1],
            guidance_scale=args.guidance_scale,
            eta=args.eta,
            generator=torch.Generator().manual_seed(seed_of(seed, line)),
            composite=False,
            output_type="pt",
            **self.sampling,
        ).images[0]


class Predictions:
    """Pictures that another model made, in [SETTING/][CATEGORY/], named as the lists name them: PERSON__CLOTH, or PERSON where one
    setting alone is meant.
    """

    mask_free = posed = False

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.folder, self.both = args.pred_dir, args.setting == "both"
        self.suffixes: set[str] = set()

    def working_size(self, person: Image.Image) -> tuple[int, int]:
        return person.height, person.width

    def describe(self, size: tuple[int, int]) -> dict[str, Any]:
        return {"model": str(self.folder), "files": ", ".join(sorted(self.suffixes))}

    def look_for(self, line: Line) -> Path | None:
        files = (name.with_name(name.name + end) for name in self.names(line) for end in SUFFIXES)
        return next(filter(Path.is_file, files), None)

    def names(self, line: Line) -> list[Path]:
        """Where a line's picture may lie, without a suffix; a person's name may mean either setting if both are asked for."""
        of_setting = self.folder / line.setting
        folder = of_setting if of_setting.is_dir() else self.folder
        person = [] if self.both and folder != of_setting else [folder / Path(line.person).with_suffix("")]
        return [folder / line.name, *person]

    def bare(self, line: Line, pictures: dict[str, Image.Image], *_: Any) -> Tensor:
        """The picture as it was given, (3, H, W) in [0, 1], whatever else a model would be told."""
        return as_tensors(read_result(self.file(line), pictures["person"]), "result")[0]

    def file(self, line: Line) -> Path:
        """The line's picture, which is none of the tree's own."""
        if (file := self.look_for(line)) is None:
            named = " or ".join(str(name.relative_to(self.folder)) for name in self.names(line))
            raise FileNotFoundError(f"--pred_dir: there is no picture named {named} ({line.setting})")
        return file

    def check(self, lines: list[Line], source: Any) -> None:
        """One picture a line, none beside them, which may be of another list, and none of the dataset's own."""
        # a missing one fails its line
        found = {line: file for line in lines if (file := self.look_for(line)) is not None}
        for line, file in found.items():
            for role, other in source.files(line).items():
                if file.samefile(other):
                    raise ValueError(f"--pred_dir: {file} is the dataset's own {role}")
        folders = {file.parent for file in found.values()}
        held = {file for folder in folders for file in folder.iterdir() if file.suffix in SUFFIXES}
        if len(held) > len(found) or len(set(found.values())) < len(found):
            belong = len(set(found.values()))
            raise ValueError(
                f"--pred_dir: its folders hold {len(held)} pictures, {belong} of them of the list's {len(lines)} lines"
            )
        self.suffixes = {file.suffix.lower() for file in found.values()}
        if lossy := sorted(self.suffixes & {".jpg", ".jpeg"}):
            logger.warning("--pred_dir: what %s lost of the pictures is measured with them", " and ".join(lossy))


# ------------------------------------------------------------------------------------------------------------- scoring


@dataclass
class Row:
    """What was measured on one line with one seed."""

    index: int  # of the line
    seed: int
    # by compositing, region and metric: numerator and denominator
    values: dict[tuple[str, str, str], tuple[float, float]]
    features: dict[str, np.ndarray]  # Inception's, (d,), by compositing; and the real person's
    digests: dict[str, str]  # of truth and mask
    masked: float | None  # share of the picture
    seconds: float | None  # that the picture took


def size_of_aspect(picture: Image.Image, height: int) -> tuple[int, int]:
    """Height and width of a picture that is scaled to a height."""
    return height, round(height * picture.width / picture.height)


def check_aspect(picture: Image.Image, size: tuple[int, int], what: str) -> None:
    """A size is a picture's own aspect, within a hundredth or a pixel."""
    height, width = size
    if abs(height * picture.width / picture.height - width) > max(1, 0.01 * width):
        raise ValueError(
            f"the {what} of {picture.width}x{picture.height} pixels would be stretched to {width}x{height}"
        )


def check_untouched(result: Image.Image, person: Image.Image, mask: Image.Image) -> None:
    """Outside the mask every pixel is the person's."""
    if result.size != person.size:
        raise ValueError(f"the composited result has size {result.size}, its person {person.size}")
    changed = (np.asarray(result) != np.asarray(person)).any(axis=-1) & (np.asarray(mask) < 128)
    if changed.any():
        raise ValueError(f"{changed.sum()} pixels outside the mask are not the person's")


def check_truth(pictures: dict[str, Image.Image], truth: Image.Image, name: str = "truth") -> None:
    """No input is the truth itself, as where persons and cloths share a folder and a list mixes them up."""
    for role in pictures.keys() & {"cloth", "condition"}:
        if pictures[role].size == truth.size and np.array_equal(np.asarray(pictures[role]), np.asarray(truth)):
            raise ValueError(f"the {name} and the {role} are the same picture")


@dataclass
class Scorer:
    """Measures results against their truth at one size, one picture at a time.

    Args:
        size: height and width of the persons' aspect.
        working_size: to which the pipeline has stretched the person of a bare result, which is stretched back.
    """

    size: tuple[int, int]
    working_size: tuple[int, int]
    metrics: Sequence[str]
    device: torch.device
    lpips: torch.nn.Module | None = None
    inception: torch.nn.Module | None = None
    recognizer: Recognizer | None = None

    @property
    def exact(self) -> torch.device:
        """Where float64 is: Apple's GPUs have none."""
        return torch.device("cpu") if self.device.type == "mps" else self.device

    def values(
        self,
        result: Image.Image,
        truth: Image.Image,
        mask: Image.Image | None,
        attributes: dict[str, str] | None = None,
    ) -> dict[tuple[str, str], tuple[float, float]]:
        """By region and metric: numerator and denominator, whose sums over the lines make the figure.

        `attributes` are what the recognizer should see; where there are none, what it sees in the truth.
        """
        pair = [self.to_size(each, what).to(self.exact) for each, what in ((result, "result"), (truth, "truth"))]
        regions, values = {"picture": None}, {}
        if mask is not None:
            resized = mask.resize(self.size[::-1], Image.Resampling.NEAREST)
            regions["mask"] = as_masks(resized, "mask")[0].to(self.exact)
        if "ssim" in self.metrics:
            similarity = ssim_map(*pair)
            values |= {(region, "ssim"): (masked_mean(similarity, inside), 1.0) for region, inside in regions.items()}
        if "psnr" in self.metrics:
            values |= {(region, "psnr"): squared_error(*pair, inside) for region, inside in regions.items()}
        if self.lpips is not None:
            values["picture", "lpips"] = self.lpips(*(each[None].to(self.device) for each in pair)).item(), 1.0
            self.lpips.reset()
        if self.recognizer is not None:
            everywhere = Image.new("L", truth.size, 255)
            masks = [(mask or everywhere).resize(each.size, Image.Resampling.NEAREST) for each in (result, truth)]
            seen, true = self.recognizer([result, truth], masks)
            expected = attributes or true
            for name in sorted(seen.keys() & expected.keys()):
                values["picture", f"recognition of {name}"] = float(seen[name] == expected[name]), 1.0
        return values

    def to_size(self, picture: Image.Image, what: str) -> Tensor:
        """(3, *size) in [0, 1], by LANCZOS."""
        if what != "result" or picture.size != self.working_size[::-1]:
            check_aspect(picture, self.size, what)
        return resize(as_tensors(picture, what)[0], *self.size)

    @torch.no_grad()
    def features(self, picture: Image.Image, what: str) -> np.ndarray:
        pixels = (self.to_size(picture, what) * 255).round().to(torch.uint8)
        return self.inception(pixels[None].to(self.device))[0].cpu().double().numpy()


def save_picture(file: Path, picture: Image.Image, told: dict[str, str] = {}) -> None:
    """Without loss, and under a temporary name first; what is `told` of it goes with it."""
    text = PngInfo()
    for name, value in told.items():
        text.add_text(name, value)
    with whole_file(file) as temporary:
        picture.save(temporary, format="PNG", pnginfo=text)


def read_text(file: Path) -> dict[str, str]:
    """What `save_picture` wrote beside a picture."""
    with Image.open(file) as picture:
        return picture.text


def digest_of(picture: Image.Image) -> str:
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()


def digest_of_all(pictures: dict[str, Image.Image]) -> str:
    """Of all pictures by role but the truth, of which no result is made."""
    digests = [f"{role} {digest_of(pictures[role])}" for role in sorted(pictures.keys() - {"truth"})]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------- figures


@dataclass
class Figure:
    """One number of the report, with what it was taken from."""

    setting: str
    compositing: str
    group: str  # all, or the level of a factor
    region: str
    metric: str
    value: float  # over all seeds
    count: int  # of lines
    per_seed: list[float]
    low: float | None = None  # the bootstrap's 95 %
    high: float | None = None
    deviation: float | None = None  # KID's, over its subsets

    @property
    def key(self) -> tuple[str, ...]:
        return self.setting, self.compositing, self.group, self.region, self.metric

    @property
    def spread(self) -> float | None:
        """The standard deviation between seeds."""
        return float(np.std(self.per_seed, ddof=1)) if len(self.per_seed) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        if self.low is not None:
            return self.low, self.high
        return None if self.deviation is None else (self.value - self.deviation, self.value + self.deviation)


def figures(rows: list[Row], lines: list[Line], groups: dict[str, list[int]], seed: int) -> list[Figure]:
    """Means with their intervals for every group of lines, then distances of sets for all and for each category.

    Args:
        rows: of every line and seed.
        groups: indices of lines by name.
        seed: of the bootstrap and of KID's subsets.
    """
    made = []
    for name, members in groups.items():
        for setting in SETTINGS:
            chosen = {index for index in members if lines[index].setting == setting}
            some = [row for row in rows if row.index in chosen]
            for key in dict.fromkeys(key for row in some for key in row.values):
                made.append(mean_figure(setting, name, key, [row for row in some if key in row.values], seed))
            if name == "all" or name.startswith("category: "):
                made += set_figures(setting, name, some, lines, seed)
    return made


def mean_figure(setting: str, group: str, key: tuple[str, str, str], rows: list[Row], seed: int) -> Figure:
    """A mean, or PSNR, over the lines: those of one line with several seeds are resampled together."""
    compositing, region, metric = key
    transform = decibels if metric == "psnr" else np.asarray
    indices = sorted({row.index for row in rows})
    sums = {index: np.zeros(2) for index in indices}
    totals = defaultdict(lambda: np.zeros(2))
    for row in rows:
        sums[row.index] += row.values[key]
        totals[row.seed] += row.values[key]
    numerators, denominators = np.stack(list(sums.values())).T
    found = bootstrap(numerators, denominators, transform, seed)
    per_seed = [float(transform(numerator / denominator)) for numerator, denominator in totals.values()]
    return Figure(
        setting, compositing, group, region, metric, found.value, len(indices), per_seed, found.low, found.high
    )


def set_figures(setting: str, group: str, rows: list[Row], lines: list[Line], seed: int) -> list[Figure]:
    """FID and KID (times 1,000) of the results against the persons of the lines, each person once; none of too few."""
    real = {lines[row.index].person: row.features["real"] for row in rows if "real" in row.features}
    if len(real) < FEWEST_PERSONS:
        return []
    real, made = torch.from_numpy(np.stack(list(real.values()))), []
    for compositing in [name for name in rows[0].features if name != "real"]:
        by_seed = defaultdict(list)
        for row in rows:
            by_seed[row.seed].append(torch.from_numpy(row.features[compositing]))
        fakes, count = [torch.stack(features) for features in by_seed.values()], len(rows) // len(by_seed)
        fids = [frechet_distance(real, fake) for fake in fakes]
        kids = [[1000 * value for value in kernel_distance(real, fake, seed)] for fake in fakes]
        where = (setting, compositing, group, "picture")
        made.append(Figure(*where, "fid", float(np.mean(fids)), count, fids))
        means, deviations = zip(*kids)
        made.append(
            Figure(*where, "kid", float(np.mean(means)), count, list(means), deviation=float(np.mean(deviations)))
        )
    return made


# ---------------------------------------------------------------------------------------------------------- the report


def label(metric: str, region: str, protocol: dict[str, Any]) -> str:
    """A measure as tables name it: never LPIPS without its backbone, never FID without its resize."""
    named = {"lpips": f"LPIPS ({protocol['lpips_net']})", "fid": f"FID ({protocol['fid_mode']})", "kid": "KID × 1000"}
    name = named.get(metric, metric.upper() if metric in METRICS else metric)
    return f"{name} in the mask" if region == "mask" else name


def number(value: float, metric: str) -> str:
    digits = {"psnr": 2, "fid": 3, "kid": 3}.get(metric, 4)
    return f"{value:.{digits}f}"


def cell(figure: Figure | None) -> str:
    """A figure with its interval, KID's deviation, and the spread between seeds."""
    if figure is None:
        return "–"
    shown = number(figure.value, figure.metric)
    if figure.low is not None:
        shown += f" [{number(figure.low, figure.metric)}, {number(figure.high, figure.metric)}]"
    if figure.deviation is not None:
        shown += f" (subsets ± {number(figure.deviation, figure.metric)})"
    if figure.spread is not None:
        shown += f" (seeds ± {number(figure.spread, figure.metric)})"
    return shown


def measure_name(figure: Figure, protocol: dict[str, Any]) -> str:
    return f"{label(figure.metric, figure.region, protocol)} {ARROWS.get(figure.metric.split()[0], '')}"


def figure_tables(found: list[Figure], protocol: dict[str, Any]) -> Iterator[str]:
    """A table of all lines for every setting, and one by category and factor."""
    by_key = {figure.key: figure for figure in found}
    for setting in [name for name in SETTINGS if any(figure.setting == name for figure in found)]:
        here = [figure for figure in found if figure.setting == setting]
        pooled, compositings = [f for f in here if f.group == "all"], list(dict.fromkeys(f.compositing for f in here))
        measures = {(f.region, f.metric): measure_name(f, protocol) for f in pooled}
        rows = [
            [name, *(cell(by_key.get((setting, compositing, "all", *key))) for compositing in compositings)]
            for key, name in measures.items()
        ]
        yield f"## {setting.capitalize()}, {max(f.count for f in pooled)} lines\n"
        yield markdown_table(["", *compositings], rows)
        groups = list(dict.fromkeys(f.group for f in here if f.group != "all"))
        if groups:
            rows = []
            for group in groups:
                cells = [by_key.get((setting, compositings[0], group, *key)) for key in measures]
                rows.append([group, str(max(f.count for f in cells if f)), *map(cell, cells)])
            yield markdown_table([compositings[0], "lines", *measures.values()], rows)


def write_report(folder: Path, report: dict[str, Any], found: list[Figure], pictures: list[str]) -> None:
    """report.json, which --compare reads, and report.md; infinities are strings, since JSON has none."""
    rows = [vars(figure) | {"spread": figure.spread} for figure in found]
    text = json.dumps(without_infinities(report | {"figures": rows}), indent=2, allow_nan=False)
    protocol, made = report["protocol"], report["made"]
    parts = [f"# Try-on, measured\n\n{made['model']}{' with ' + made['adapter'] if made.get('adapter') else ''}\n"]
    if report["failures"]:
        parts.append(f"**No figures: {len(report['failures'])} of {report['lines']} lines failed.**\n")
        parts.append(markdown_table(["line", "what is wrong"], [[f["line"], f["error"]] for f in report["failures"]]))
    parts += figure_tables(found, protocol)
    if found:
        parts.append(
            f"Brackets hold the 95 % of {RESAMPLES} bootstrap resamples of the lines. PSNR pools the error of all pictures.\n"
        )
    parts += [f"![{name}]({name})\n" for name in pictures]
    if report["duplicates"]:
        parts.append("Left out, since the training set has them:\n")
        parts.append(markdown_table(["test person", "training person"], report["duplicates"].items()))
    for title in ("protocol", "made", "cost", "versions"):
        parts.append(f"## {title.capitalize()}\n")
        parts.append(markdown_table(["", ""], [[name, str(value)] for name, value in report[title].items()]))
    write_text(folder / "report.md", "\n".join(parts))
    write_text(folder / "report.json", f"{text}\n")


def write_lines(file: Path, rows: list[Row], lines: list[Line]) -> None:
    """Numerator and denominator of every measure of every line and seed."""
    texts = []
    for row in rows:
        values = {" ".join(key): value for key, value in row.values.items()}
        texts.append(json.dumps({"line": str(lines[row.index]), "seed": row.seed} | values) + "\n")
    write_text(file, "".join(texts))


def without_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_infinities(each) for name, each in value.items()}
    if isinstance(value, list):
        return [without_infinities(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def per_line(rows: list[Row], lines: list[Line], seed: int) -> dict[tuple[str, str, str, str], dict[int, float]]:
    """By setting, compositing, region and metric: the value of every line with one seed."""
    values = defaultdict(dict)
    for row in (row for row in rows if row.seed == seed):
        for (compositing, region, metric), (numerator, denominator) in row.values.items():
            value = numerator / denominator
            value = float(decibels(value)) if metric == "psnr" else value
            values[lines[row.index].setting, compositing, region, metric][row.index] = value
    return values


def contact_sheet(
    columns: Sequence[str], rows: Sequence[tuple[str, dict[str, Image.Image]]], height: int = 192
) -> Image.Image:
    """Rows of a caption and pictures by column; small pictures are enlarged pixel by pixel."""
    shape = next(iter(rows[0][1].values()))
    width, margin, title, caption = round(shape.width * height / shape.height), 6, 18, 200
    size = (caption + len(columns) * (width + margin) + margin, title + len(rows) * (height + margin) + margin)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for j, name in enumerate(columns):
        draw.text((caption + margin + j * (width + margin), 4), name, fill="black")
    for i, (text, pictures) in enumerate(rows):
        top = title + margin + i * (height + margin)
        draw.multiline_text((margin, top), text, fill="black")
        for j, name in enumerate(columns):
            if name in pictures:
                picture = pictures[name].convert("RGB")
                enlarged = Image.Resampling.NEAREST if picture.height < height else Image.Resampling.LANCZOS
                picture = ImageOps.contain(picture, (width, height), enlarged)
                sheet.paste(picture, (caption + margin + j * (width + margin), top))
    return sheet


def plot_distributions(
    values: dict[tuple[str, str, str, str], dict[int, float]], protocol: dict[str, Any], file: Path
) -> None:
    """A histogram of every measure, composited and bare in one frame, with their medians."""
    matplotlib_figure = metric_library("matplotlib.figure")
    frames = defaultdict(dict)
    for (setting, compositing, region, metric), by_line in values.items():
        finite = [value for value in by_line.values() if math.isfinite(value)]
        if finite and metric in METRICS:
            frames[f"{label(metric, region, protocol)}, {setting}"][compositing] = finite
    if not frames:
        return
    columns = min(3, len(frames))
    lines = math.ceil(len(frames) / columns)
    width, height = 4 * columns, 2.6 * lines  # inches
    sheet = matplotlib_figure.Figure(figsize=(width, height))
    sheet.subplots_adjust(0.6 / width, 0.4 / height, 1 - 0.2 / width, 1 - 0.3 / height, wspace=0.25, hspace=0.35)
    for place, (title, by_compositing) in enumerate(frames.items(), start=1):
        axes = sheet.add_subplot(lines, columns, place)
        edges = np.histogram_bin_edges(np.concatenate(list(by_compositing.values())), bins=24)
        for color, (compositing, found) in zip(("tab:blue", "tab:orange"), by_compositing.items()):
            shown = f"{compositing}, median {np.median(found):.4g}"
            axes.hist(found, edges, histtype="stepfilled", alpha=0.55, color=color, label=shown)
            axes.axvline(np.median(found), color=color, linewidth=1)
        axes.set_title(title, fontsize=9)
        axes.set_ylabel("lines", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.locator_params(nbins=5)
        axes.legend(fontsize=7)
    with whole_file(file) as temporary:
        sheet.savefig(temporary, format="png", dpi=120)


def compare(files: Sequence[Path]) -> str:
    """Reports of one protocol side by side; ≈ stands where the intervals of a figure and the first report's overlap."""
    reports = []
    for file in files:
        try:
            reports.append(json.loads(file.read_text(encoding="utf-8")))
            reports[-1]["figures"], reports[-1]["protocol"], reports[-1]["failures"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--compare: {file} is no report of evaluate_vton.py: {error!r}") from error
    for file, report in zip(files, reports):
        if not report["figures"]:
            raise ValueError(f"{file} has no figures: {len(report['failures'])} of its lines failed")
        for name in reports[0]["protocol"] | report["protocol"]:
            first, other = (each["protocol"].get(name) for each in (reports[0], report))
            if first != other:
                raise ValueError(f"{files[0]} and {file} were measured differently: {name} is {first} and {other}")
    found = [{figure.key: figure for figure in map(read_figure, report["figures"])} for report in reports]
    keys = [key for key in found[0] if all(key in each for each in found)]
    rows = []
    for key in keys:
        first = found[0][key]
        cells = [cell(first)]
        for figure in (each[key] for each in found[1:]):
            cells.append(cell(figure) + (" ≈" if overlap(first.interval, figure.interval) else ""))
        setting, compositing, group, _, _ = key
        rows.append([setting, compositing, group, measure_name(first, reports[0]["protocol"]), *cells])
    head = ["setting", "compositing", "lines", "measure", *(str(file.parent) for file in files)]
    return markdown_table(head, rows)


def overlap(one: tuple[float, float] | None, other: tuple[float, float] | None) -> bool:
    return one is not None and other is not None and one[0] <= other[1] and other[0] <= one[1]


def read_figure(row: dict[str, Any]) -> Figure:
    numbers = {name: float(row[name]) for name in ("value", "low", "high", "deviation") if row[name] is not None}
    rest = {name: value for name, value in row.items() if name != "spread"}
    return Figure(**rest | numbers | {"per_seed": [float(value) for value in row["per_seed"]]})


# ------------------------------------------------------------------------------------------------------------ the run


class Evaluation:
    """One run: `run` makes the pictures, scores them and writes the report.

    Args:
        args: of `parse_args`.
        inception: a module from uint8 pictures (N, 3, H, W) to features (N, d) in place of Inception.
    """

    def __init__(self, args: argparse.Namespace, inception: torch.nn.Module | None = None) -> None:
        patient = InitProcessGroupKwargs(timeout=timedelta(hours=12))  # for whoever has less to do
        self.args, self.accelerator = args, accelerate.Accelerator(kwargs_handlers=[patient])
        device = self.accelerator.device
        lpips = load_lpips(args.lpips_net, args.lpips_weights).to(device) if "lpips" in args.metrics else None
        if {"fid", "kid"} & set(args.metrics):
            inception = (inception or Inception(args.fid_mode, args.inception_weights)).to(device).eval()
        else:
            inception = None
        for library in ("torchmetrics", "matplotlib"):  # missed now, not when all is drawn
            metric_library(library)
        self.failures: list[dict[str, str]] = []
        self.model = (Model if args.pred_dir is None else Predictions)(args, device)
        self.masks = args.masks or ("none" if self.model.mask_free else "files")
        roles = ["person", *cloth_roles(args.num_cloths)]
        roles += ["mask"] * (self.masks == "files") + ["pose"] * self.model.posed
        by_setting = {"paired": roles + ["condition"] * self.model.mask_free, "unpaired": roles}
        self.source = (RowSource if args.dataset_root is None else TreeSource)(args, by_setting)
        self.lines = choose_lines(args, self.source.lines)
        self.duplicates = self.drop_duplicates() if args.train_root is not None else {}
        first = next(filter(None, (self.attempt(self.source.pictures, line) for line in self.lines)), None)
        if first is None:
            raise ValueError(f"none of the {len(self.lines)} lines can be read: {self.failures[0]['error']}")
        self.failures = []  # come again, in their turn
        self.working_size = self.model.working_size(first["person"])
        self.size = size_of_aspect(first["person"], self.working_size[0])
        if args.eval_height is not None:
            self.size = args.eval_height, args.eval_width
            check_aspect(first["person"], self.size, "first person")
        self.seeds = range(args.seed, args.seed + args.seeds)
        recognizer = load_recognizer(args.recognizer) if args.recognizer is not None else None
        self.scorer = Scorer(self.size, self.working_size, args.metrics, device, lpips, inception, recognizer)
        self.given = None  # the compositing of --pred_dir's pictures
        self.compositings = ["bare"] if self.masks == "none" else ["composited", "bare"]
        if args.pred_dir is not None:
            self.given = "composited" if args.pred_composited else "bare"
            self.compositings = ["composited"] if args.pred_composited else self.compositings
            self.model.check(self.lines, self.source)
            if (shown := next(filter(None, map(self.model.look_for, self.lines)), None)) is not None:
                with Image.open(shown) as picture:
                    self.given_size = picture.size
        self.check_measurable()

    def check_measurable(self) -> None:
        """There is something to measure: the truth of a line, or features of enough of them."""
        metrics, scorer = " ".join(self.args.metrics), self.scorer
        compared = scorer.recognizer is not None or not {"fid", "kid"}.issuperset(self.args.metrics)
        truths = compared and any(x.setting == "paired" or "truth" in self.source.files(x) for x in self.lines)
        if scorer.inception is None and not truths:
            raise ValueError(f"--metrics {metrics} need truths, which unpaired lines have none of: add fid or kid")
        if scorer.inception is None and any(
            x.setting == "unpaired" and "truth" not in self.source.files(x) for x in self.lines
        ):
            logger.warning(
                "--metrics %s measure nothing of unpaired lines without a truth, which are tried on all the same: add fid or kid, "
                "or give --setting paired",
                metrics,
            )
        persons = max(Counter(setting for setting, _ in {(line.setting, line.person) for line in self.lines}).values())
        if scorer.inception is not None and persons < FEWEST_PERSONS:
            need = f"FID and KID need {FEWEST_PERSONS} persons, got {persons}"
            if not truths:
                raise ValueError(f"--metrics {metrics}: {need}")
            logger.warning("%s: they are left out", need)

    def drop_duplicates(self) -> dict[str, str]:
        """Find test persons in the training tree; they fail the run, or leave the list if asked."""
        found = [None]
        if self.accelerator.is_main_process:
            persons = {line.person: self.source.files(line)["person"] for line in self.lines}
            found = [find_duplicates(persons, self.args.train_root)]
        found = broadcast_object_list(found)[0]
        if found and not self.args.drop_duplicates:
            shown = ", ".join(f"{name} is {other}" for name, other in list(found.items())[:5])
            raise ValueError(f"--train_root holds {len(found)} of the test persons ({shown}): see --drop_duplicates")
        self.lines = [line for line in self.lines if line.person not in found]
        if not self.lines:
            raise ValueError("--drop_duplicates leaves nothing: all of the test persons are in --train_root")
        return found

    # ---- making pictures

    def file(self, seed: int, line: Line, compositing: str) -> Path:
        if compositing == self.given:
            return self.model.file(line)
        return self.args.output_dir / f"seed-{seed}" / line.setting / compositing / f"{line.name}.png"

    def pictures(self, line: Line) -> dict[str, Image.Image]:
        """The line's pictures, with its mask where the parser draws it."""
        pictures = self.source.pictures(line)
        if self.masks == "parser":
            file = self.args.output_dir / "masks" / f"{Path(line.person).with_suffix('')}.png"
            made_of = digest_of(pictures["person"])
            if not file.is_file() or read_text(file).get("made_of") != made_of:
                save_picture(file, self.model.draw_mask(line, pictures["person"]), {"made_of": made_of})
            pictures["mask"] = read_picture(file, "mask")
        return pictures

    def make(self) -> None:
        """Try on what is not there yet, every process its part; what fails is kept for the report."""
        wanted = [(seed, line) for seed in self.seeds for line in self.lines]
        missing = [job for job in wanted if not all(self.is_made(*job, name) for name in self.compositings)]
        self.accelerator.wait_for_everyone()  # all have looked before the first is made
        missing = missing[self.accelerator.process_index :: self.accelerator.num_processes]
        bar = tqdm(total=len(missing), desc="try on", disable=not self.accelerator.is_local_main_process)
        with bar, ThreadPoolExecutor(self.args.batch_size) as pool:
            for start in range(0, len(missing), self.args.batch_size):
                jobs = missing[start : start + self.args.batch_size]
                saved = []
                for (seed, line), read in zip(jobs, pool.map(lambda job: self.attempt(self.pictures, job[1]), jobs)):
                    if read is not None and (made := self.attempt(self.try_on, line, read, seed)) is not None:
                        saved += [pool.submit(save_picture, *each) for each in made]
                    bar.update()
                for future in saved:
                    future.result()

    def is_made(self, seed: int, line: Line, compositing: str) -> bool:
        """A given picture is there; it is pasted anew, since it may have changed."""
        return compositing == self.given or (self.given is None and self.file(seed, line, compositing).is_file())

    def attempt(self, work: Callable, line: Line, *rest: Any) -> Any:
        """What `work` returns; None, and a failure, where it says what is wrong with the line."""
        try:
            return work(line, *rest)
        except (OSError, ValueError) as error:
            self.fail(line, str(error))
            return None

    def fail(self, line: Line, error: str) -> None:
        self.failures.append({"line": str(line).replace("\t", " "), "error": error})

    def try_on(self, line: Line, pictures: dict[str, Image.Image], seed: int) -> list[tuple]:
        """The files to save, each with its picture and seconds."""
        started = time.perf_counter()
        bare = self.model.bare(line, pictures, seed, self.working_size, self.source.caption(line))
        made = {"bare": bare}
        if "mask" in pictures:
            person = as_tensors(pictures.get("condition", pictures["person"]), "person_image")[0]
            mask = as_masks(pictures["mask"], "mask_image")[0]
            made["composited"] = composite_result(bare, person, mask, (0, 0, *person.shape[:0:-1]))
        seconds = time.perf_counter() - started
        missing = [name for name in made if not self.is_made(seed, line, name)]
        profile = pictures["person"].info.get("icc_profile")
        told = {"made_of": digest_of_all(pictures), "seconds": f"{seconds:.3f}"}
        return [(self.file(seed, line, name), as_pil(made[name], profile), told) for name in missing]

    # ---- scoring

    def score(self) -> list[Row]:
        """Rows of every line and seed, in the list's order, on every process."""
        jobs = [(index, seed) for seed in self.seeds for index in range(len(self.lines))]
        jobs = jobs[self.accelerator.process_index :: self.accelerator.num_processes]
        rows = []
        for index, seed in tqdm(jobs, desc="score", disable=not self.accelerator.is_local_main_process):
            line = self.lines[index]
            if (row := self.attempt(self.score_line, line, index, seed)) is not None:
                rows.append(row)
        return sorted(gather_object(rows), key=lambda row: (row.seed, row.index))

    def score_line(self, line: Line, index: int, seed: int) -> Row:
        pictures = self.pictures(line)
        person, mask = pictures["person"], pictures.get("mask")
        truth = person if line.setting == "paired" else pictures.get("truth")
        values, features, seconds = {}, {}, None
        reference, name = (person, "person") if truth is None else (truth, "truth")
        check_truth(pictures, reference, name)
        made_of = digest_of_all(pictures)
        for compositing in self.compositings:
            file = self.file(seed, line, compositing)
            result = read_result(file, person)
            if compositing != self.given:
                told = read_text(file)
                if told.get("made_of") != made_of:
                    raise ValueError(
                        f"{file} was made of other pictures than there are now: delete it, or take another --output_dir"
                    )
                seconds = float(told["seconds"])
            if compositing == "composited":
                check_untouched(result, pictures.get("condition", person), mask)
            elif result.size not in self.bare_sizes(person):
                raise ValueError(
                    f"{file} has size {result.size}, not {' or '.join(map(str, self.bare_sizes(person)))}"
                )
            if truth is not None:
                measured = self.scorer.values(result, truth, mask, self.source.attributes(line))
                values |= {(compositing, *key): value for key, value in measured.items()}
            if self.scorer.inception is not None:
                features[compositing] = self.scorer.features(result, "result")
        if self.scorer.inception is not None and seed == self.seeds[0]:
            features["real"] = self.scorer.features(person, "person")
        compared = {"truth": reference, "mask": mask}  # without a truth, with the persons' distribution
        digests = {name: digest_of(picture) for name, picture in compared.items() if picture}
        share = None if mask is None else float((np.asarray(mask) >= 128).mean())
        return Row(index, seed, values, features, digests, share, seconds)

    def bare_sizes(self, person: Image.Image) -> list[tuple[int, int]]:
        """The sizes that a bare result may have: the working size; a given one its person's, or that of the first."""
        return [self.working_size[::-1]] if self.given is None else list(dict.fromkeys([person.size, self.given_size]))

    # ---- the run

    def run(self) -> bool:
        """Make, score, report; returns whether no line failed."""
        args, main = self.args, self.accelerator.is_main_process
        described = self.model.describe(self.working_size) | {
            "dataset": str(args.dataset_root or args.dataset_name),
            "split": args.split,
            "masks": self.model.describe_masks() if self.masks == "parser" else self.masks,
        }
        if self.model.mask_free and "paired" in settings_of(args):  # of whom the photographs are tried on
            described["condition_column"] = args.condition_column
        if args.dataset_name is not None:
            columns = {f"{role}_column" for role in ("person", "cloth", "mask", "condition")}
            described |= {name: getattr(args, name) for name in sorted(columns | {"dataset_config_name"})}
        if main:
            args.output_dir.mkdir(parents=True, exist_ok=True)
            self.refuse_other_pictures(described)
            self.list_hash = write_list(args.output_dir / "list.txt", self.lines, args.list)
        self.accelerator.wait_for_everyone()
        for line in self.lines:  # told of now, not when all others are drawn
            for file in itertools.filterfalse(Path.is_file, self.source.files(line).values()):
                self.fail(line, f"there is no {file}")
        if not self.failures:
            self.make()
        self.accelerator.wait_for_everyone()
        failures = gather_object(self.failures)
        rows = []
        if not failures:
            rows = self.score()
            failures = gather_object(self.failures)
        peak = max(gather_object([peak_memory(self.accelerator.device)]))
        if main:
            different = {tuple(failure.values()): failure for failure in failures}  # the seeds of a line fail alike
            self.report(described, [] if failures else rows, list(different.values()), peak)
        self.accelerator.wait_for_everyone()
        return not failures

    def refuse_other_pictures(self, described: dict[str, Any]) -> None:
        """Pictures that are there go on only if this run would make the same."""
        file = self.args.output_dir / "pictures.json"
        described = json.loads(json.dumps(described))  # as the file has it: a tuple is a list there
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else described
        if "condition_column" in described:  # of which older files are silent
            before.setdefault("condition_column", "condition")
        if before != described:
            differing = [name for name in described | before if described.get(name) != before.get(name)]
            shown = ", ".join(f"{name} was {before.get(name)} and is {described.get(name)}" for name in differing)
            raise ValueError(f"--output_dir {self.args.output_dir} holds pictures of another run: {shown}")
        write_text(file, json.dumps(described))

    def groups(self) -> dict[str, list[int]]:
        """Indices of lines: all, and by category and by the levels of the factors that a tree writes."""
        groups = {"all": list(range(len(self.lines)))}
        for index, line in enumerate(self.lines):
            for name, level in self.source.factors(line).items():
                groups.setdefault(f"{name}: {level}", []).append(index)
        return {name: groups[name] for name in ("all", *sorted(groups.keys() - {"all"}))}

    def protocol(self, rows: list[Row]) -> dict[str, Any]:
        """What must be equal where figures stand side by side."""
        args, scorer, first = self.args, self.scorer, [row for row in rows if row.seed == self.seeds[0]]
        digests = {
            name: hashlib.sha256("".join(row.digests.get(name, "") for row in first).encode()).hexdigest()[:16]
            for name in ("truth", "mask")
        }
        net = scorer.lpips
        return {
            "size": f"{self.size[0]}x{self.size[1]}",
            "compositing": " and ".join(self.compositings),
            "lpips_net": args.lpips_net if net else None,
            "lpips_weights": fingerprint(net.state_dict().values()) if net else None,
            "fid_mode": args.fid_mode if scorer.inception else None,
            "inception_weights": fingerprint(scorer.inception.state_dict().values()) if scorer.inception else None,
            "list": self.list_hash,
            "masks": digests["mask"],
            "truths": digests["truth"],
        }

    def report(self, described: dict[str, Any], rows: list[Row], failures: list[dict[str, str]], peak: float) -> None:
        args, folder = self.args, self.args.output_dir
        asked = (*args.metrics, "recognition")
        found = figures(rows, self.lines, self.groups(), args.seed)
        found = [figure for figure in found if figure.metric.split()[0] in asked]
        protocol, sheets = self.protocol(rows), []
        if rows:
            values = per_line(rows, self.lines, self.seeds[0])
            sheets = self.draw_sheets(values, protocol)
            write_lines(folder / "lines.jsonl", rows, self.lines)
        shares, seconds = [row.masked for row in rows if row.masked], [row.seconds for row in rows if row.seconds]
        report = {
            "lines": len(self.lines),
            "protocol": protocol,
            "made": described
            | {
                "seeds": list(self.seeds),
                "lists": ", ".join(self.source.lists),
                "masked": f"{np.mean(shares):.1%} of a picture on average" if shares else None,
            },
            "cost": {
                "seconds_a_picture": round(float(np.mean(seconds)), 3) if seconds else None,
                "peak_memory_gib": round(peak, 2),  # of the process that took the most
                "device": device_name(self.accelerator.device),
                "processes": self.accelerator.num_processes,
            },
            "versions": versions(),
            "failures": failures,
            "duplicates": self.duplicates,
        }
        write_report(folder, report, found, sheets)
        if found and args.push_to_hub is not None:
            self.push(found, protocol)

    def draw_sheets(self, values: dict[tuple, dict[int, float]], protocol: dict[str, Any]) -> list[str]:
        """The best, the median and the worst line by each measure, a sheet a setting; and the distributions."""
        folder, drawn = self.args.output_dir, []
        for setting in SETTINGS:
            rows = []
            for (where, compositing, region, metric), by_line in values.items():
                if where != setting or compositing != self.compositings[0] or metric not in METRICS:
                    continue
                ordered = sorted(by_line, key=lambda index: by_line[index], reverse=ARROWS[metric] == "↑")
                name = label(metric, region, protocol)
                for rank, place in (("best", 0), ("median", len(ordered) // 2), ("worst", -1)):
                    index = ordered[place]
                    rows.append((f"{rank}\n{name}\n{number(by_line[index], metric)}", self.shown(self.lines[index])))
            if rows:
                sheet = contact_sheet(("person", "cloth", "mask", "result", "truth"), rows)
                drawn.append(f"sheet_{setting}.png")
                save_picture(folder / drawn[-1], sheet)
        if values:
            drawn.append("distributions.png")
            plot_distributions(values, protocol, folder / drawn[-1])
        return drawn

    def shown(self, line: Line) -> dict[str, Image.Image]:
        pictures = self.pictures(line)
        file = self.file(self.seeds[0], line, self.compositings[0])
        pictures["result"] = read_result(file, pictures["person"])
        return {"truth": pictures["person"]} | pictures

    def push(self, found: list[Figure], protocol: dict[str, Any]) -> None:
        """The figures of all lines into the card of the adapter, or of the whole pipeline."""
        data, results = str(self.args.dataset_name or self.args.dataset_root.name), []
        for figure in (figure for figure in found if figure.group == "all"):
            where = f"{figure.setting}, {figure.compositing}, {protocol['size']}"
            results.append(
                EvalResult(
                    task_type="image-to-image",
                    dataset_type=data,
                    dataset_name=f"{data}, {where}",
                    dataset_config=where,  # by which the card tells results apart
                    dataset_split=self.args.split,
                    metric_type=figure.metric,
                    metric_name=measure_name(figure, protocol),
                    metric_value=float(number(figure.value, figure.metric)),
                )
            )
        self.model.pipe.push_to_hub(self.args.push_to_hub, "Figures", adapter_only=True, eval_results=results)


def peak_memory(device: torch.device) -> float:
    """The GPU's, or this process's, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # of bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
    )


def versions() -> dict[str, str]:
    there = {package.name.lower() for package in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in LIBRARIES if name in there}


def load_recognizer(name: str) -> Recognizer:
    module, function = name.split(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--recognizer {name}: {error}") from error


def main(args: argparse.Namespace, inception: torch.nn.Module | None = None) -> None:
    shape = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(format=shape, datefmt="%H:%M:%S", level=logging.INFO)
    if args.compare is not None:
        print(compare(args.compare))
        return
    # GPUs round convolutions to ten bits, and pick kernels by the clock, unless told not to
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    evaluation = Evaluation(args, inception)
    complete = evaluation.run()
    logger.info("%s", args.output_dir / "report.md")
    if evaluation.accelerator.is_main_process:
        print((args.output_dir / "report.md").read_text(encoding="utf-8"))
    if not complete:
        raise SystemExit(f"no figures, since lines failed: {args.output_dir / 'report.md'} lists them")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"evaluate_vton.py: {error}")
