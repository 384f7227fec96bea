# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with the
# License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
"""Virtual try-on with Stable Diffusion 1.5: a person, a cloth, and self-attention weights alone trained between them.

The file reads in the order of the data: pictures, latents in the UNet's slots, attention that sees the cloth, the adapter
file, and the pipeline. `train_vton.py` imports the same pieces.
"""

import copy
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import numbers
import operator
import os
import re
import shutil
import struct
import sys
import tempfile
import threading
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    __version__,
)
from diffusers.callbacks import IPAdapterScaleCutoffCallback, MultiPipelineCallbacks, PipelineCallback
from diffusers.configuration_utils import FrozenDict
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import FromSingleFileMixin, StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.loaders.lora_base import _best_guess_weight_name
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput, StableDiffusionSafetyChecker
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg, retrieve_timesteps
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.hub_utils import _get_model_file, populate_model_card
from diffusers.utils.torch_utils import randn_tensor, unwrap_module
from huggingface_hub import EvalResult, ModelCard, ModelCardData, create_repo, is_offline_mode, upload_folder
from huggingface_hub.errors import EntryNotFoundError, RemoteEntryNotFoundError
from PIL import ExifTags, Image, ImageCms, ImageDraw, ImageFilter, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    BaseImageProcessor,
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    SegformerForSemanticSegmentation,
)


# One picture, a batch, or a list.
PictureInput = Image.Image | np.ndarray | torch.Tensor | list[Image.Image] | list[np.ndarray] | list[torch.Tensor]

# The parts of a parameter's name that make it trainable; None takes every parameter.
TRAINABLE_PARTS = {
    "self_attention": {"attn1"},
    "attention": {"attn1", "attn2"},
    "attention_norms": {"attn1", "attn2", "norm", "norm1", "norm2", "norm3", "conv_norm_out"},
    "all": None,
}
CANVAS_DIMS = {"height": 2, "width": 3}  # where a canvas puts the cloth: below the person, beside
ADAPTER_NAME = "vton_adapter.safetensors"
ADAPTER_FORMAT, ADAPTER_FORMAT_VERSION = "vton-adapter", "1"
LORA_NAME = "pytorch_lora_weights.safetensors"  # diffusers' own
LORA_SETTINGS = "vton_adapter"  # our entry in its metadata
# Of a file on the Hub, as `from_pretrained` names them.
HUB_OPTIONS = ("subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only")

# What human parsers call what they see: ATR's labels (mattmdjaga/segformer_b2_clothes), those of fashn-ai/fashn-human-parser and
# of yolo12138/segformer-b2-human-parse-24, LIP's and CIHP's. Case aside, and with "-" for "_" and " ".
PARSER_LABELS = {
    "background": {"background"},
    "top": {
        "top", "upper-clothes", "coat", "upper-only-torso-region", "coat-only-torso-region", "left-sleeve-for-upper",
        "right-sleeve-for-upper",
    },
    "dress": {"dress", "dresses-only-torso-region", "jumpsuits"},
    "skirt": {"skirt", "skirts"},
    "trousers": {"pants", "left-pants", "right-pants", "right-patns"},
    "belt": {"belt"},
    "scarf": {"scarf"},
    "torso": {"torso", "torso-skin", "skin-around-neck-region"},
    "arms": {"arms", "left-arm", "right-arm"},
    "legs": {"legs", "left-leg", "right-leg"},
    "hands": {"hands", "glove"},
    "feet": {"feet", "left-shoe", "right-shoe", "socks"},
    "head": {"face", "hair", "hat", "glasses", "sunglasses"},
    "bag": {"bag"},
    "jewelry": {"jewelry"},
}  # fmt: skip
# What a try-on repaints of them, and what it never does.
REPAINTED = {
    "upper": {"top", "dress", "scarf", "torso", "arms"},
    "lower": {"skirt", "trousers", "dress", "belt", "legs"},
}
REPAINTED["dress"] = REPAINTED["upper"] | REPAINTED["lower"]
KEPT = {"head", "hands", "feet", "bag"}
LOOSENESS = ("tight", "loose", "box")
UNREADABLE = (OSError, SyntaxError, RuntimeError, Image.DecompressionBombError)  # what PIL raises of a file, by format
EXIF_TURNS = {  # what brings a picture of this EXIF orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
GENERATED = "virtual try-on: a generated picture"  # in EXIF, as the software that made a result
FAST_STEPS, FAST_GUIDED = 8, 0.75  # of `fast`: how many steps, and the share of them that is guided


# ------------------------------------------------------------------------------------------------------------- numbers


def is_number(value: Any) -> bool:
    """Whether it is a finite real number, numpy's included; truth values are none."""
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def shown(value: Any) -> str:
    """A value as an error shows it: on one line, and not all of a long one."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_whole(value: Any) -> bool:
    """Whether it is a whole number; a page's 2.0 is one, True is none."""
    return is_number(value) and value == int(value)


# ------------------------------------------------------------------------------------------------------------ pictures


PROFILE_SPACES = {"GRAY": ("1", "L", "LA", "La"), "CMYK": ("CMYK",)}  # profiles that no RGB picture can carry


def as_tensors(pictures: PictureInput, name: str) -> list[torch.Tensor]:
    """Turn whatever shows pictures into a list of float tensors (3, H, W) in [0, 1].

    Args:
        pictures: PIL images of any mode (EXIF orientation is applied, transparency lies on white, 16 bits and floats keep
            their values), arrays (H, W, 1 or 3), tensors (1 or 3, H, W), batches of those (N, ...), or a list. uint8 is
            0-255, floats are 0-1 and may leave that by 1e-3, as resampled ones do.
        name: the argument's name, for the errors.

    Raises:
        ValueError, TypeError: a picture is none, is damaged, or has other values.
    """
    return [as_floats(picture) for picture in as_pictures(pictures, name)]


def as_pictures(pictures: PictureInput, name: str) -> list[torch.Tensor]:
    """As `as_tensors`, (3, H, W) each, but pictures of eight bits stay uint8: a photograph takes a quarter of the memory."""
    return [_as_picture(picture, name, "white") for picture in _listed(pictures, name)]


def as_floats(picture: torch.Tensor) -> torch.Tensor:
    """A picture (C, H, W) of `as_pictures` as floats in [0, 1]."""
    if picture.dtype != torch.uint8:
        return picture
    own = picture if picture.stride(0) else picture[:1]  # a single channel may be seen three times
    return own.float().div_(255).expand(picture.shape)


def as_bytes(picture: torch.Tensor) -> torch.Tensor:
    """A picture (C, H, W) of `as_pictures`, or floats in [0, 1], as uint8."""
    return picture if picture.dtype == torch.uint8 else (picture * 255).round_().to(torch.uint8)


def as_masks(pictures: PictureInput, name: str) -> list[torch.Tensor]:
    """Turn whatever shows masks into a list of tensors (1, H, W) that hold 0 and 1, 1 where the person is repainted.

    A mask is grey and nearly black and white, cut at one half. Where its transparency varies, as in a drawing of white
    strokes, what is transparent is black.

    Args:
        pictures: as for `as_tensors`.
        name: the argument's name, for the errors.

    Raises:
        ValueError: it is no mask: more than 1 % of the pixels are coloured (their channels differ by more than 32/255), more
            than 20 % lie between .1 and .9, or none is white.
        TypeError: it is no picture.

    Warns:
        UserWarning: its four corners are white and not all of it: it may be inverted.
    """
    masks = []
    for picture in _listed(pictures, name):
        mask = _as_picture(picture, name, "black")
        if mask.stride(0):  # no single channel, seen three times
            mask = as_floats(mask)
            coloured = (mask.amax(dim=0) - mask.amin(dim=0) > 32 / 255).float().mean().item()
            if coloured > 0.01:
                raise ValueError(
                    f"`{name}` must be a black and white mask, got a picture of which {coloured:.1%} is coloured"
                )
            luma = mask.new_tensor([0.299, 0.587, 0.114])  # ITU-R 601, as PIL's "L"
            mask = torch.tensordot(luma, mask, 1)[None]
        mask = mask[:1]
        # the luma of one half is one half, rounding aside; bytes stay bytes: a photograph's mask has millions
        low, half, high = (25, 128, 230) if mask.dtype == torch.uint8 else (0.1, 0.5 - 1e-6, 0.9)
        between = ((mask > low) & (mask < high)).count_nonzero().item() / mask.numel()
        white = mask >= half
        _check_mask(name, between, bool(white.numpy().any()))
        if white[:, [0, 0, -1, -1], [0, -1, 0, -1]].all() and not white.all():
            warnings.warn(
                f"`{name}` is white in all four corners, and what is white is repainted: is it inverted?", stacklevel=2
            )
        masks.append(white.float())
    return masks


def _check_mask(name: str, between: float, white: bool) -> None:
    """ValueError where too large a share of a mask is grey, or nothing of it white."""
    if between > 0.2:
        raise ValueError(
            f"`{name}` must be a black and white mask, got a picture of which {between:.1%} lies between 0.1 and 0.9"
        )
    if not white:
        raise ValueError(f"`{name}` must be white where the cloth goes, got a mask that is black everywhere")


def as_image(picture: Image.Image, name: str) -> Image.Image:
    """A PIL image as `as_tensors` reads it, in RGB, with its ICC profile; eight bits stay eight bits on the way."""
    seen = _opened(picture, name, "white")
    (profile,) = colour_profiles(picture)
    if not isinstance(seen, Image.Image):
        return as_pil(as_tensors(seen, name)[0], profile)
    image = seen if seen.mode == "RGB" else seen.convert("RGB")
    image.info = {} if profile is None else {"icc_profile": profile}
    return image


def as_mask_image(picture: Image.Image, name: str) -> Image.Image:
    """A PIL image as `as_masks` reads it, black and white; grey of eight bits is looked at by its histogram alone."""
    seen = _opened(picture, name, "black")
    if not isinstance(seen, Image.Image) or seen.mode != "L":
        return as_pil(as_masks(picture, name)[0])
    levels = seen.histogram()
    _check_mask(name, sum(levels[26:230]) / sum(levels), any(levels[128:]))  # 0.1 and 0.9 of 255 lie outside
    mask = seen.point([255 * (level >= 128) for level in range(256)])
    mask.info = {}
    return mask


def as_poses(pictures: PictureInput, name: str) -> list[torch.Tensor]:
    """As `as_pictures`; ValueError where a picture's values are labels, which are next to black."""
    poses = as_pictures(pictures, name)
    for pose in poses:
        _check_pose(name, float(as_bytes(pose).amax()))
    return poses


def as_pose_image(picture: Image.Image, name: str) -> Image.Image:
    """A PIL image as `as_poses` reads it, in RGB."""
    image = as_image(picture, name)
    _check_pose(name, max(high for _, high in image.getextrema()))
    return image


def _check_pose(name: str, brightest: float) -> None:
    """ValueError where the brightest value of 255 is neither black's, as of a person nobody found, nor a drawing's."""
    if 0 < brightest < 32:
        raise ValueError(
            f"`{name}` must be a picture of a pose, got one that is nowhere brighter than {brightest:g} of 255: give a map of labels colours first"
        )


def same_aspect(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes are those of one picture, perhaps at another scale, to a pixel of either."""
    (a, b), (c, d) = size, other
    return abs(a * d - b * c) <= max(size + other)


def _is_many(pictures: PictureInput) -> bool:
    """Whether it is a list or a batch, for which a list comes back."""
    return isinstance(pictures, (list, tuple)) or getattr(pictures, "ndim", 3) == 4


def _listed(pictures: PictureInput, name: str) -> list[Image.Image | np.ndarray | torch.Tensor]:
    if isinstance(pictures, (np.ndarray, torch.Tensor)) and pictures.ndim == 4:
        pictures = list(pictures)
    if not isinstance(pictures, (list, tuple)):
        pictures = [pictures]
    if not pictures:
        raise ValueError(f"`{name}` must hold at least one picture, got {pictures!r}")
    return list(pictures)


def as_outfits(cloths: Any) -> tuple[Any, int]:
    """`cloth_image` without its nesting, where it has any, and how many cloths a person wears, whose pictures stand together.

    Raises:
        ValueError: one person's cloths are no list, or not as many as another's.
    """
    if not isinstance(cloths, (list, tuple)) or not any(isinstance(one, (list, tuple)) for one in cloths):
        return cloths, 1
    counts = [len(one) if isinstance(one, (list, tuple)) else "a single one" for one in cloths]
    if counts[0] == 0 or len(set(counts)) > 1:
        raise ValueError(
            f"`cloth_image` must be pictures, or lists of equally many for every person, got {shown(counts)} cloths"
        )
    return [cloth for outfit in cloths for cloth in outfit], counts[0]


def _as_picture(picture: Image.Image | np.ndarray | torch.Tensor, name: str, background: str) -> torch.Tensor:
    """One picture as (3, H, W), uint8 or floats in [0, 1], with no memory of the caller's."""
    picture = np.asarray(_opened(picture, name, background)) if isinstance(picture, Image.Image) else picture
    if isinstance(picture, np.ndarray):
        if picture.dtype not in (bool, np.uint8) and picture.dtype.kind != "f":
            raise TypeError(f"`{name}` must be uint8 (0-255) or floating point (0-1), got {picture.dtype}")
        picture = np.array(picture, dtype=np.float32 if picture.dtype.kind == "f" else picture.dtype)  # any byte order
        picture = torch.from_numpy(picture[..., None] if picture.ndim == 2 else picture).movedim(-1, 0)
    elif isinstance(picture, torch.Tensor):
        picture = picture.clone() if picture.dtype == torch.uint8 and picture.layout == torch.strided else picture
    else:
        raise TypeError(
            f"`{name}` must be a PIL image, an array, a tensor or a list of them, got {type(picture).__name__}"
        )
    if picture.layout != torch.strided or picture.device.type == "meta":
        kind = "one without values, on the meta device" if picture.device.type == "meta" else picture.layout
        raise TypeError(f"`{name}` must be a dense tensor, got {kind}")
    picture = picture.detach().cpu()
    picture = picture[None] if picture.ndim == 2 else picture
    if picture.ndim != 3 or picture.shape[0] not in {1, 3} or 0 in picture.shape:
        shape = tuple(picture.shape)
        raise ValueError(
            f"`{name}` must have 1 or 3 channels, as (C, H, W) tensors or (H, W, C) arrays, got (C, H, W) = {shape}"
        )
    if picture.dtype == torch.uint8:
        return picture.expand(3, -1, -1)
    if picture.dtype == torch.bool or picture.is_floating_point():
        picture = picture.float()
    else:
        raise TypeError(f"`{name}` must be uint8 (0-255) or floating point (0-1), got {picture.dtype}")
    if not torch.isfinite(picture).all() or picture.min() < -1e-3 or picture.max() > 1 + 1e-3:
        low, high = picture.min().item(), picture.max().item()
        raise ValueError(f"`{name}` must have finite values from 0 to 1, got values from {low:g} to {high:g}")
    return picture.clamp(0, 1).expand(3, -1, -1)


def exif_turn(picture: Image.Image) -> Image.Transpose | None:
    """What brings a picture upright, as its EXIF says; None where that says nothing, or cannot be read."""
    try:
        return EXIF_TURNS.get(picture.getexif().get(ExifTags.Base.Orientation))
    except (struct.error, SyntaxError, ValueError, TypeError, KeyError, OSError, EOFError):
        return None


def upright(picture: Image.Image) -> Image.Image:
    """A copy, turned as its EXIF says, without EXIF, which PIL's own `exif_transpose` would have to write anew: not all that
    cameras wrote can be.
    """
    picture.load()  # PIL turns a TIFF itself, and forgets its orientation
    turn = exif_turn(picture)
    picture = picture.copy() if turn is None else picture.transpose(turn)
    for name in ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"):  # wherever PIL would read it again
        picture.info.pop(name, None)
    return picture


def _opened(picture: Image.Image, name: str, background: str) -> Image.Image | np.ndarray:
    """A PIL image in RGB or L, or floats (H, W) in [0, 1] of one with more than eight bits; transparency shows the background."""
    try:
        picture = upright(picture)
    except (*UNREADABLE, ValueError, AssertionError) as error:  # opened, but not read until now
        reason = error if str(error) else "its file is closed"
        raise ValueError(f"`{name}` must be a whole picture, got one that cannot be read: {reason}") from error
    if 0 in picture.size:
        raise ValueError(f"`{name}` must have pixels, got a picture of {picture.width}x{picture.height}")
    if picture.mode == "F" or picture.mode.startswith("I"):  # PIL would cut off at 255
        array = np.asarray(picture).astype(np.float32)
        if picture.mode == "F":  # 0-1, or PIL's own 0-255
            full = 255 if array.max(initial=0) > 1 + 1e-3 else 1
        else:  # PIL's own 0-255, or 16 bits, as a PGM of them is opened
            full = 65535 if picture.mode != "I" or array.max(initial=0) > 255 else 255
        return array / np.float32(full)
    picture = picture.convert("LA") if picture.mode == "La" else picture
    profile, space = _read_profile(picture) if background == "white" else (None, None)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        low, high = picture.getchannel("A").getextrema()
        if background == "white" and high == 0:
            raise ValueError(f"`{name}` must show something, got a picture that is transparent everywhere")
        if background == "white" or low != high or high == 0:  # one thickness all over says nothing of where a mask is
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture)
    if space in PROFILE_SPACES:  # the result, an RGB picture, could not carry it
        picture = picture.convert("L" if space == "GRAY" else space)
        return _change_profile(picture, profile, ImageCms.createProfile("sRGB"), name, outputMode="RGB")
    return picture if picture.mode in {"L", "RGB"} else picture.convert("RGB")  # a copy already, as `upright` makes


def _read_profile(picture: Image.Image) -> tuple[ImageCms.ImageCmsProfile | None, str | None]:
    """The colour profile of a PIL image and its space; nothing where there is none, or one that does not fit the picture."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(picture.info["icc_profile"]))
    except (KeyError, TypeError, OSError, ImageCms.PyCMSError):
        return None, None
    space = profile.profile.xcolor_space.strip()
    fits = (
        picture.mode in PROFILE_SPACES[space] if space in PROFILE_SPACES else space == "RGB" and picture.mode != "CMYK"
    )
    return (profile, space) if fits else (None, None)


def colour_profiles(pictures: PictureInput) -> list[bytes | None]:
    """The ICC profile of every picture as `as_tensors` returns it; None is sRGB.

    Grey and CMYK pictures with a profile are sRGB by then.
    """
    pictures = [picture if isinstance(picture, Image.Image) else None for picture in _listed(pictures, "pictures")]
    spaces = [None if picture is None else _read_profile(picture)[1] for picture in pictures]
    return [picture.info["icc_profile"] if space == "RGB" else None for picture, space in zip(pictures, spaces)]


def _change_profile(picture: Image.Image, before: Any, after: Any, name: str, **options: Any) -> Image.Image:
    try:
        return ImageCms.profileToProfile(picture, before, after, **options)
    except ImageCms.PyCMSError as error:  # a scanner's or a camera's, which goes one way only
        raise ValueError(f"`{name}`: colours cannot be converted by its ICC profile: {error}") from error


def convert_profile(picture: torch.Tensor, before: bytes | None, after: bytes | None) -> torch.Tensor:
    """The same colours (3, H, W) by another ICC profile, by way of eight bits; None is sRGB.

    Raises:
        ValueError: the profiles are none between which colours can be converted.
    """
    if before == after:
        return picture
    try:
        profiles = [
            ImageCms.createProfile("sRGB") if profile is None else ImageCms.ImageCmsProfile(io.BytesIO(profile))
            for profile in (before, after)
        ]
    except (TypeError, OSError, ImageCms.PyCMSError) as error:
        raise ValueError(f"`profile` must be an ICC profile's bytes or None: {error}") from error
    intent = {"renderingIntent": ImageCms.Intent.RELATIVE_COLORIMETRIC}
    converted = _change_profile(as_pil(picture), *profiles, "person_image` or `cloth_image", **intent)
    return as_tensors(converted, "image")[0]


def as_pil(picture: torch.Tensor, profile: bytes | None = None) -> Image.Image:
    """(C, H, W), uint8 or floats in [0, 1], to a PIL image, RGB or L, with its ICC profile."""
    array = as_bytes(picture).movedim(0, -1).numpy()
    image = Image.fromarray(array if array.shape[-1] == 3 else array[..., 0])
    if profile is not None:
        image.info["icc_profile"] = profile
    return image


def resize(picture: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(3, h, w) in [0, 1] to (3, height, width), by PIL's LANCZOS; the same tensor where the size is right."""
    if picture.shape[1:] == (height, width):
        return picture
    return as_tensors(as_pil(picture).resize((width, height), Image.Resampling.LANCZOS), "image")[0]


def _cut(picture: torch.Tensor, region: tuple[int, int, int, int]) -> torch.Tensor:
    """The region (left, top, right, bottom) of a picture (C, H, W)."""
    left, top, right, bottom = region
    return picture[:, top:bottom, left:right]


def fit_cloth(cloth: Image.Image, height: int, width: int) -> Image.Image:
    """The whole cloth, centred on white, at height x width (pixels); ValueError for one of which not a line would be left."""
    if min(cloth.size) * min(height / cloth.height, width / cloth.width) <= 0.5:
        raise ValueError(
            f"`cloth_image` of {cloth.height}x{cloth.width} (height x width) is too thin to be seen at {height}x{width}"
        )
    return ImageOps.pad(cloth, (width, height), method=Image.Resampling.LANCZOS, color="white")


def fit_size(
    person_height: int, person_width: int, height: int | None, width: int | None, *, area: float, multiple: int
) -> tuple[int, int]:
    """The height and width to work at: as given; else the person's aspect, at about `area` pixels.

    Both are multiples of `multiple`; a given side that is none is a ValueError.
    """
    for name, side in (("height", height), ("width", width)):
        if side is not None and (not is_whole(side) or side <= 0 or side % multiple):
            raise ValueError(f"`{name}` must be a positive multiple of {multiple}, got {shown(side)}")
    if height is None and width is None:
        scale = math.sqrt(area / (person_height * person_width))
        height, width = person_height * scale, person_width * scale
    height = width * person_height / person_width if height is None else height
    width = height * person_width / person_height if width is None else width
    return tuple(max(multiple, round(side / multiple) * multiple) for side in (height, width))


def feather(mask: torch.Tensor, width: int) -> torch.Tensor:
    """Soften a mask (1, H, W) of 0 and 1 inward: bytes, 0 outside, rising over `width` pixels to 255.

    Where the mask is thinner than 15 times that, the seam is a half as wide, or a quarter, and so on, or hard: a small mask,
    and a thin part of a large one, keep a core that is entirely theirs.
    """
    top, bottom, left, right = extent(mask[0])
    window = (slice(None), slice(max(0, top - width), bottom + width), slice(max(0, left - width), right + width))
    alpha = (mask > 0).to(torch.uint8).mul_(255)
    inside, soft = alpha[window].clone(), alpha[window]
    hard = inside > 0
    for radius in (width >> halvings for halvings in range(width.bit_length())):
        # the finer ones are needed in a few places, and cost the most: they look at blocks in which something is still hard
        side, reach = (max(hard.shape) if radius == width else 64 * radius), 18 * radius
        for row, column in itertools.product(*(range(0, size, side) for size in hard.shape[1:])):
            block = hard[0, row : row + side, column : column + side]
            if not block.numpy().any():
                continue
            up, down, start, stop = extent(block)
            y, x = row + up // radius * radius, column + start // radius * radius
            y_end, x_end = row + down, column + stop
            y_seen, x_seen = max(0, y - reach), max(0, x - reach)  # so much around it as a seam depends on
            thick, seam = _seam(inside[:, y_seen : y_end + reach, x_seen : x_end + reach], radius)
            part = (slice(None), slice(y, y_end), slice(x, x_end))
            seen = (slice(None), slice(y - y_seen, y_end - y_seen), slice(x - x_seen, x_end - x_seen))
            chosen = thick[seen] & hard[part]
            soft[part] = torch.where(chosen, seam[seen], soft[part])
            hard[part] &= ~chosen
    return alpha


def _seam(inside: torch.Tensor, radius: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a mask (1, H, W), 0 or 255, is 15 radii thick, and its bytes as the seam of that width has them."""
    outside = F.max_pool2d(255 - inside, radius, ceil_mode=True)[0] > 0  # false where a square of that side is inside
    thick = grow(~grow(outside, 7), 9).repeat_interleave(radius, 0).repeat_interleave(radius, 1)
    inward = [max(0, 2 * value - 255) for value in range(256)]  # the blur's upper half: the outline is where it begins
    blurred = as_pil(inside).filter(ImageFilter.BoxBlur(radius)).point(inward)
    thick = thick[None, : inside.shape[1], : inside.shape[2]]
    return thick, torch.from_numpy(np.array(blurred))[None].bitwise_and_(inside)


def composite_result(
    image: torch.Tensor, person: torch.Tensor, mask: torch.Tensor | None, region: tuple[int, int, int, int]
) -> torch.Tensor:
    """Lay a result (3, h, w) into its photograph (3, H, W): outside the mask every pixel stays exactly as it is.

    Args:
        image: the result for the region, at any size, in [0, 1].
        person: the photograph, uint8 or in [0, 1]; what comes back is likewise.
        mask: (1, H, W), 0 or 1; None takes the result everywhere, in [0, 1].
        region: (left, top, right, bottom) in the photograph.

    Returns:
        (3, H, W), in the photograph's dtype; without a mask (3, bottom - top, right - left), floats in [0, 1].

    The seam lies inside the mask, over about 1/128 of the region's larger side, less where the mask is thin (`feather`).
    """
    left, top, right, bottom = region
    if mask is None:
        return as_floats(resize(image, bottom - top, right - left))
    seen = extent(mask[0, top:bottom, left:right] > 0)
    part, image = enlarged_part(image, bottom - top, right - left, seen)
    window = (slice(top + part[0], top + part[1]), slice(left + part[2], left + part[3]))
    alpha = feather(mask, max(bottom - top, right - left) // 128)[(..., *window)]
    if person.dtype == torch.uint8:  # PIL mixes bytes a pixel at a time, with no float of any
        laid = as_pil(person)
        laid.paste(as_pil(image), (window[1].start, window[0].start), as_pil(alpha))
        return as_pictures(laid, "image")[0]
    result = person.clone()
    result[(..., *window)] = torch.lerp(person[(..., *window)], as_floats(image), alpha / 255)
    return result


def enlarged_part(
    picture: torch.Tensor, height: int, width: int, part: tuple[int, int, int, int]
) -> tuple[tuple[int, int, int, int], torch.Tensor]:
    """What `resize` makes of a picture (3, h, w), where only a part (top, bottom, left, right) of it is needed: which part came out,
    and that: uint8 where it was resized.

    It is a little larger than the part, as far as LANCZOS reaches, so that its edges change nothing in there.
    """
    spans, box = [], []
    for size, own, (low, high) in ((height, picture.shape[1], part[:2]), (width, picture.shape[2], part[2:])):
        reach = math.ceil(3 * max(1, size / own)) + 1
        low, high = max(0, low - reach), min(size, high + reach)
        spans.append((low, high))
        box.append((low * own / size, high * own / size))
    (top, bottom), (left, right) = spans
    if picture.shape[1:] == (height, width):
        return (top, bottom, left, right), picture[:, top:bottom, left:right]
    size, corners = (right - left, bottom - top), (box[1][0], box[0][0], box[1][1], box[0][1])
    resized = as_pil(picture).resize(size, Image.Resampling.LANCZOS, box=corners)
    return (top, bottom, left, right), as_pictures(resized, "image")[0]


def _cut_enlarged(picture: torch.Tensor, height: int, width: int, region: tuple[int, int, int, int]) -> torch.Tensor:
    """The region (left, top, right, bottom) of what `resize` makes of a picture."""
    left, top, right, bottom = region
    part, picture = enlarged_part(picture, height, width, (top, bottom, left, right))
    return _cut(picture, (left - part[2], top - part[0], right - part[2], bottom - part[0]))


# ---------------------------------------------------------------------------------------------------------- the mask


def as_cloth_types(cloth_type: str | list[str]) -> list[str]:
    """One kind of cloth or several as a list; ValueError where one is none of them."""
    cloth_types = list(cloth_type) if isinstance(cloth_type, (list, tuple)) else [cloth_type]
    if not cloth_types or not all(isinstance(each, str) and each in REPAINTED for each in cloth_types):
        raise ValueError(
            f"`cloth_type` must be one of {', '.join(REPAINTED)}, or a list of them, got {shown(cloth_type)}"
        )
    return cloth_types


def parser_roles(id2label: dict[int, str]) -> dict[int, str]:
    """What a human parser's label numbers show, in the words of `PARSER_LABELS`, read by their names.

    Raises:
        ValueError: a name is unknown; the sentence lists all that were found.
    """
    roles = {name: role for role, names in PARSER_LABELS.items() for name in names}
    found = {i: re.sub("[ _]", "-", label.lower()) for i, label in id2label.items()}
    if unknown := sorted(set(found.values()) - roles.keys()):
        raise ValueError(
            f"`human_parser` must have labels that are known here (rename them in its config's `id2label`), got "
            f"{', '.join(unknown)} among {', '.join(id2label.values())}"
        )
    return {i: roles[name] for i, name in found.items()}


def agnostic_mask(parsed: torch.Tensor, roles: dict[int, str], cloth_types: list[str], looseness: str) -> torch.Tensor:
    """Where a try-on repaints a person: the cloth and the skin that it may cover, without what is never touched.

    Args:
        parsed: (H, W), a label number for every pixel.
        roles: what the numbers show, of `parser_roles`.
        cloth_types: kinds of `REPAINTED`; their regions are united.
        looseness: `"tight"`, the region grown by 3 % of its larger side; `"loose"`, its convex hull, blurred and grown by 4 %:
            down to the hips for an upper cloth, else flared by 15 % of its height towards the feet, so that neither sleeves nor
            hem of the worn cloth show; `"box"`, the box around that, 6 % wider and 2 % higher on each side.

    Returns:
        (H, W), true where the person is repainted; false everywhere if nothing of the kind is there.
    """

    def shows(*wanted: str) -> torch.Tensor:
        return torch.isin(parsed, parsed.new_tensor([i for i, role in roles.items() if role in wanted]))

    repainted = set().union(*(REPAINTED[cloth_type] for cloth_type in cloth_types))
    region = shows(*repainted)
    if not region.any():
        return region
    cleaned = grow(~grow(~region, 1), 1)  # without specks, one of which would stretch a hull over half the picture
    cleaned = cleaned if cleaned.any() else region
    top, bottom, left, right = extent(cleaned)
    side = max(bottom - top, right - left)
    mask = grow(region, max(1, round(0.03 * side)))
    if looseness != "tight":
        reached = cleaned.clone()
        if "legs" in repainted:
            _, _, left, right = extent(cleaned[bottom - (bottom - top + 9) // 10 : bottom])
            flare = round(0.15 * (bottom - top))
            reached[bottom - 1, max(0, left - flare) : right + flare] = True
        else:
            reached |= shows("skirt", "trousers", "belt", "legs") & _above_hips(shows("head"), top, bottom)
        if looseness == "loose":  # the hull, blurred by 3 % and cut where that has grown it by 4 %
            blurred = convex_hull(reached).filter(ImageFilter.GaussianBlur(0.03 * side))
            mask |= torch.from_numpy(np.array(blurred)) > 0.1 * 255
        else:
            top, bottom, left, right = extent(reached)
            x, y = round(0.06 * side), round(0.02 * side)
            mask[max(0, top - y) : bottom + y, max(0, left - x) : right + x] = True
    if "arms" not in repainted:
        return mask & ~shows("arms", *KEPT)
    hands = ~grow(~shows("hands"), max(1, round(0.01 * side)))  # their rim is the cuff's
    return mask & ~hands & ~shows(*(KEPT - {"hands"}))


def extent(region: torch.Tensor) -> tuple[int, int, int, int]:
    """First and last row, first and last column of a region (H, W) of which something is true, the last ones exclusive."""
    array = region.cpu().numpy()  # torch's own `any` is twenty times as slow
    (rows,), (columns,) = array.any(axis=1).nonzero(), array.any(axis=0).nonzero()
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def grow(region: torch.Tensor, reach: int) -> torch.Tensor:
    """A region (H, W), true or false, and all within `reach` pixels of it along both axes."""
    grown = region.float()[None]
    for kernel in ((2 * reach + 1, 1), (1, 2 * reach + 1)):  # a square, one side after the other
        grown = F.max_pool2d(grown, kernel, stride=1, padding=tuple(size // 2 for size in kernel))
    return grown[0] > 0


def _above_hips(head: torch.Tensor, top: int, bottom: int) -> torch.Tensor:
    """(H, 1), true down to the crotch: four heads below the crown, as figures are drawn; without a whole head, a third of the
    cloth's height (`top` to `bottom`) below it.
    """
    hips = bottom + (bottom - top) / 3
    if head.any() and not head[0].any():
        crown, chin, _, _ = extent(head)
        hips = crown + 4 * (chin - crown)
    return torch.arange(len(head), device=head.device)[:, None] < hips


def convex_hull(region: torch.Tensor) -> Image.Image:
    """A region (H, W), of which something is true, and all between two points of it (Andrew's monotone chain): mode L, 0 or 255."""
    rows = region.any(dim=1).nonzero()[:, 0].tolist()
    left = region.int().argmax(dim=1).tolist()
    right = (region.shape[1] - 1 - region.flip(1).int().argmax(dim=1)).tolist()

    def chain(points: list[tuple[int, int]]) -> list[tuple[int, int]]:
        turning: list[tuple[int, int]] = []
        for x, y in points:
            while len(turning) > 1:
                (x0, y0), (x1, y1) = turning[-2:]
                if (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) > 0:
                    break
                turning.pop()
            turning.append((x, y))
        return turning

    outline = chain([(right[y], y) for y in rows]) + chain([(left[y], y) for y in reversed(rows)])
    hull = Image.new("L", (region.shape[1], region.shape[0]))
    ImageDraw.Draw(hull).polygon(outline, fill=255, outline=255)
    return hull


class VTONMaskMixin:
    """Draws masks with the components `human_parser` and `human_parser_processor`."""

    def load_human_parser(
        self,
        pretrained_model_name_or_path: str | os.PathLike,
        subfolder: str = "",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        dtype: torch.dtype | str = "auto",
    ) -> None:
        """Load a Segformer human parser and its processor, for `predict_mask` and for calls without a mask.

        Load it before offloading is enabled, to have it offloaded too. Mind its licence: parsers that were trained from
        NVIDIA's SegFormer weights are for non-commercial use.

        Args:
            pretrained_model_name_or_path: a Hub repository or a folder, such as `fashn-ai/fashn-human-parser`.
            subfolder, revision, token, cache_dir, force_download, local_files_only: as in `from_pretrained`, with its defaults.
            dtype: of the parser's weights; "auto", the default, is the file's.

        Raises:
            ValueError: it is no Segformer with a trained head, or its labels are unknown. Nothing has changed then.
            OSError: there is no such file.
        """
        source = str(pretrained_model_name_or_path)
        values = (subfolder, revision, token, cache_dir, force_download, local_files_only)
        options = dict(zip(HUB_OPTIONS, values, strict=True))
        config = AutoConfig.from_pretrained(source, **options)
        if config.model_type != "segformer":
            raise ValueError(f"load_human_parser: {source} must be a Segformer, got a {config.model_type}")
        parser_roles(config.id2label)
        parser, report = SegformerForSemanticSegmentation.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
        if report["missing_keys"]:
            raise ValueError(
                f"load_human_parser: {source} is no trained parser, {len(report['missing_keys'])} of its weights are missing "
                f"({sorted(report['missing_keys'])[0]})"
            )
        processor = AutoImageProcessor.from_pretrained(source, **options)
        device = self._execution_device
        self.register_modules(human_parser=parser.to(device), human_parser_processor=processor)

    @torch.no_grad()
    def predict_mask(
        self, person_image: PictureInput, cloth_type: str | list[str] = "upper", looseness: str = "loose"
    ) -> Image.Image | list[Image.Image]:
        """Draw the agnostic mask with the human parser: white where a try-on repaints the person, to look at and edit.

        It covers the worn cloth and the skin that another may cover, and spares head, hands, feet and bags. Parsers without a
        label for hands count them to the arms.

        Args:
            person_image: one or N photographs, as a call takes them.
            cloth_type: `"upper"` (the default), `"lower"` or `"dress"`; the regions of a list are united. A dress over other cloths frees
                them and the legs, an upper cloth over a dress the whole dress.
            looseness: how much of the worn cloth's cut the mask tells, `"loose"` by default. `"tight"` is the region, grown; `"loose"` its convex
                hull, blurred and grown, so that neither sleeve length nor hem show; `"box"` a box around it.

        Returns:
            A PIL image (mode L) of the person's size, or a list of them for a list or a batch.

        Raises:
            ValueError, TypeError: there is no parser, its labels are unknown, it sees nothing of the kind, or an argument is wrong.
        """
        cloth_types = as_cloth_types(cloth_type)
        if not isinstance(looseness, str) or looseness not in LOOSENESS:
            raise ValueError(f"`looseness` must be one of {', '.join(LOOSENESS)}, got {shown(looseness)}")
        if self.human_parser is None or self.human_parser_processor is None:
            raise ValueError("predict_mask needs a human parser: call load_human_parser first")
        roles, masks = parser_roles(self.human_parser.config.id2label), []
        for person in as_pictures(person_image, "person_image"):
            mask = agnostic_mask(self.parse_person(person), roles, cloth_types, looseness)
            if not mask.any():
                raise ValueError(
                    f"`person_image` shows the human parser nothing of the kind `cloth_type`={cloth_type!r}: give a `mask_image`"
                )
            mask = Image.fromarray(mask.numpy().astype(np.uint8) * 255)
            mask = mask.resize((person.shape[2], person.shape[1]), Image.Resampling.BILINEAR)
            masks.append(mask.point(lambda value: 255 * (value >= 128)))
        return masks if _is_many(person_image) else masks[0]

    def parse_person(self, person: torch.Tensor) -> torch.Tensor:
        """A person (3, H, W), uint8 or in [0, 1], to label numbers (h, w), no larger than the picture or the parser's input."""
        parser = self.human_parser
        device = self._execution_device if hasattr(parser, "_hf_hook") else parser.device
        image, sides = as_pil(person), dict(self.human_parser_processor.size).values()
        spare = min(image.size) // (2 * max(filter(None, sides)))  # averaged first, a large photograph costs a tenth
        image = image.reduce(spare) if spare > 1 else image
        pixels = self.human_parser_processor(images=image, return_tensors="pt")["pixel_values"]
        # (1, labels, a quarter of the input)
        logits = parser(pixel_values=pixels.to(device, parser.dtype)).logits.float()
        scale = min(1, max(pixels.shape[-2:]) / max(person.shape[1:]))
        size = [max(1, round(length * scale)) for length in person.shape[1:]]
        return F.interpolate(logits, size=size, mode="bilinear")[0].argmax(dim=0).cpu()


# ----------------------------------------------------------------------------------------- latents in the UNet's slots


def encode_latents(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] to *unscaled* latents (B, 4, H/8, W/8): the posterior's mode."""
    return retrieve_latents(vae.encode(pixels.to(vae.dtype)), sample_mode="argmax")


@dataclass
class TryOnLatents:
    """Person, mask and cloth as latents, and the UNet inputs that they make with a noisy latent.

    The UNet reads `noisy 4 + person 4` (8 channels: instruct-pix2pix, or SD1.5 with a widened `conv_in`) or
    `noisy 4 + mask 1 + person 4` (9 channels: SD1.5 inpainting).
    """

    person: torch.Tensor  # (B, 4, h, w), what is kept of the person, in the condition slot
    mask: torch.Tensor  # (B, 1, h, w), 1 where the person is repainted
    cloth: torch.Tensor  # (C, 4, h, w), scaled; a person's cloths stand together
    cloth_condition: torch.Tensor  # (C, 4, h, w), in the condition slot
    channels: int  # of the UNet's input: 8 or 9
    canvas_dim: int = 2  # where a canvas puts the cloth: 2 below the person, 3 beside
    num_cloths: int = 1  # of a person
    cloth_worn: torch.Tensor | None = None  # (C,), 0 where a person has fewer cloths, in training; None: all are worn

    @staticmethod
    def encode_person(
        vae: AutoencoderKL,
        person: torch.Tensor,
        mask: torch.Tensor,
        pose: torch.Tensor | None = None,
        *,
        mask_free: bool,
        condition_latents: str,
        dtype: torch.dtype | None,
    ) -> dict[str, torch.Tensor]:
        """`person` (B, 4, h, w) and `mask` (B, 1, h, w) of the latents, from person and pose (B, 3, H, W) in [-1, 1] and the binary
        mask (B, 1, H, W); the hole that the mask leaves shows the pose, or grey. Both in `dtype`; the person is scaled by the VAE's
        factor where `condition_latents` is `"scaled"`."""
        kept = person if mask_free else person * (mask < 0.5)
        if pose is not None:
            kept = torch.where(mask < 0.5, person, pose)
        scale = vae.config.scaling_factor if condition_latents == "scaled" else 1.0
        latents = encode_latents(vae, kept).to(dtype) * scale
        return {"person": latents, "mask": F.interpolate(mask.to(latents), size=latents.shape[-2:])}  # nearest

    @staticmethod
    def encode_cloth(
        vae: AutoencoderKL, cloth: torch.Tensor, *, condition_latents: str, dtype: torch.dtype | None
    ) -> dict[str, torch.Tensor]:
        """`cloth` and `cloth_condition` (C, 4, h, w) of the latents, from cloths (C, 3, H, W) in [-1, 1]. Both in `dtype`; `cloth` is
        always scaled by the VAE's factor."""
        latents, scale = encode_latents(vae, cloth).to(dtype), vae.config.scaling_factor
        scaled = latents * scale
        return {"cloth": scaled, "cloth_condition": scaled if condition_latents == "scaled" else latents}

    def _slots(self, noisy: torch.Tensor, mask: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return torch.cat([noisy, mask, condition] if self.channels == 9 else [noisy, condition], dim=1)

    def person_rows(self, noisy: torch.Tensor) -> torch.Tensor:
        """(B, 4, h, w) noisy latents to the person's UNet input (B, 8 or 9, h, w)."""
        return self._slots(noisy, self.mask, self.person)

    def cloth_rows(self) -> torch.Tensor:
        """The cloth's UNet input (C, 8 or 9, h, w): clean in both slots, nothing masked. It goes with timestep 0."""
        return self._slots(self.cloth, torch.zeros_like(self.cloth[:, :1]), self.cloth_condition)

    def canvas(self, person: torch.Tensor, cloth: torch.Tensor) -> torch.Tensor:
        """Person and cloth on one canvas, (B, c, 2h, w) or (B, c, h, 2w)."""
        return torch.cat([person, cloth.expand(len(person), -1, -1, -1)], dim=self.canvas_dim)

    def canvas_rows(self, noisy: torch.Tensor, cloth_seen: torch.Tensor | bool) -> torch.Tensor:
        """A noisy canvas to its UNet input; where `cloth_seen` (B, 1, 1, 1) is false the cloth's condition is zero."""
        condition = self.canvas(self.person, self.cloth_condition * cloth_seen)
        return self._slots(noisy, self.canvas(self.mask, torch.zeros_like(self.mask)), condition)

    def person_part(self, canvas: torch.Tensor) -> torch.Tensor:
        return canvas.chunk(2, dim=self.canvas_dim)[0]

    def one_cloth_each(self) -> "TryOnLatents":
        """The same, with a cloth (or several) for every person where one was for all."""
        cloths = {}
        for name in ("cloth", "cloth_condition"):
            outfits = getattr(self, name).unflatten(0, (-1, self.num_cloths))
            cloths[name] = outfits.expand(len(self.person), -1, -1, -1, -1).flatten(0, 1)
        return replace(self, **cloths)

    def repeat(self, times: int, cloth: bool) -> "TryOnLatents":
        """Every person `times` times in a row, and every cloth too if asked."""
        names = ("person", "mask", "cloth", "cloth_condition") if cloth else ("person", "mask")
        return replace(self, **{name: getattr(self, name).repeat_interleave(times, dim=0) for name in names})


# ----------------------------------------------------------------------------------------- attention that sees a cloth


def _project(attn: Attention, hidden_states: torch.Tensor) -> Iterator[torch.Tensor]:
    """Queries, keys and values, each (B, N, heads, head_dim)."""
    for layer in (attn.to_q, attn.to_k, attn.to_v):
        yield layer(hidden_states).unflatten(-1, (attn.heads, -1))


def _output(attn: Attention, attended: torch.Tensor) -> torch.Tensor:
    """(B, N, heads, head_dim) to (B, N, C), through `to_out`."""
    return attn.to_out[1](attn.to_out[0](attended.flatten(2)))


class ClothAttnProcessor:
    """`attn1` that computes attention where `set_attention_backend` says, as diffusers' own processors do.

    diffusers hands every processor the same arguments: a self-attention of these UNets has no use for `encoder_hidden_states`
    and `temb`, and at inference nobody gives an `attention_mask`.
    """

    _attention_backend = None  # class attributes: diffusers looks for them, and sets them on an instance
    _parallel_config = None

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, N, heads, head_dim), of as many tokens as the queries have; `attn_mask` (B, keys) is false for keys to leave out,
        None for none."""
        return dispatch_attention_fn(
            query, key, value, attn_mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )


def side_by_side(tokens: torch.Tensor, num_cloths: int) -> torch.Tensor:
    """Every person's cloths (P * num_cloths, N, heads, head_dim) as one row of tokens, (P, num_cloths * N, heads, head_dim)."""
    return tokens.unflatten(0, (-1, num_cloths)).flatten(1, 2)


class ClothCacheAttnProcessor(ClothAttnProcessor):
    """`attn1` at inference: the first call reads the cloths and keeps their keys and values, later ones look at them too.

    Every cloth is read alone, and a person sees all of theirs. Denoising begins with `make_room`. From then on the last rows are
    the conditional ones, a whole number for every set of cloths; rows before them (the unconditional half) see no cloth. One
    instance lasts for one call of the pipeline.
    """

    def __init__(self, num_cloths: int = 1) -> None:
        self.cloth: tuple[torch.Tensor, torch.Tensor] | None = None  # of 1 or N persons, (P, tokens, heads, head_dim)
        # `[person ; cloth]`, (B, n + tokens, heads, head_dim)
        self.beside: tuple[torch.Tensor, torch.Tensor] | None = None
        self.num_cloths = num_cloths

    def keep(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keys and values of cloths, (P * num_cloths, N, heads, head_dim)."""
        self.cloth = side_by_side(key, self.num_cloths), side_by_side(value, self.num_cloths)

    def make_room(self, rows: int, tokens: int) -> None:
        """Lay the cloths, once and for all steps, beside room for the `tokens` of as many persons as there are `rows`."""
        beside, repeats = [], rows // len(self.cloth[0])
        for cloth in self.cloth:
            beside.append(cloth.new_empty(rows, tokens + cloth.shape[1], *cloth.shape[2:]))
            beside[-1][:, tokens:].unflatten(0, (-1, repeats)).copy_(cloth[:, None])
        self.beside = tuple(beside)
        self.cloth = tuple(both[::repeats, tokens:] for both in beside)  # views: nothing is kept twice

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        query, key, value = _project(attn, hidden_states)
        if self.beside is None:
            self.keep(key, value)
            return _output(attn, self.attend(query, key, value))
        without = len(query) - len(self.beside[0])
        for both, of_person in zip(self.beside, (key, value)):
            both[:, : of_person.shape[1]] = of_person[without:]
        attended = self.attend(query[without:], *self.beside)
        if without:
            attended = torch.cat([self.attend(query[:without], key[:without], value[:without]), attended])
        return _output(attn, attended)


class ClothBesideAttnProcessor(ClothAttnProcessor):
    """`attn1` in training: the batch is `[person rows ; cloth rows]`, and nothing is kept between calls.

    Person queries see `[person ; cloth]`, or all their cloths, whose rows stand together; cloth queries see their cloth alone. A
    person row whose `attention_mask` is 0 (the UNet makes a negative bias of it) sees no cloth: its own keys stand in the cloth's
    place, and attention to the same keys twice is attention to them once. With several cloths it hides every one whose row is 0
    too, and their keys are masked.

    Args:
        num_cloths: of a person.
    """

    def __init__(self, num_cloths: int = 1) -> None:
        self.num_cloths = num_cloths

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        persons, attn_mask = len(hidden_states) // (1 + self.num_cloths), None
        (query, cloth_query), (key, cloth_key), (value, cloth_value) = (
            (x[:persons], x[persons:]) for x in _project(attn, hidden_states)
        )
        cloth_attended = self.attend(cloth_query, cloth_key, cloth_value)
        tokens = cloth_key.shape[1]
        cloth_key, cloth_value = (side_by_side(x, self.num_cloths) for x in (cloth_key, cloth_value))
        if attention_mask is not None and self.num_cloths == 1:
            hidden = (attention_mask[:persons] < 0)[..., None]  # (B, 1, 1, 1)
            cloth_key, cloth_value = torch.where(hidden, key, cloth_key), torch.where(hidden, value, cloth_value)
        elif attention_mask is not None:
            seen = attention_mask.flatten() >= 0
            worn = seen[:persons, None] & seen[persons:].unflatten(0, (persons, self.num_cloths))  # (B, num_cloths)
            attn_mask = torch.cat(
                [torch.ones_like(worn[:, :1]).expand(-1, key.shape[1]), worn.repeat_interleave(tokens, 1)], dim=1
            )
        attended = self.attend(
            query, torch.cat([key, cloth_key], dim=1), torch.cat([value, cloth_value], dim=1), attn_mask
        )
        return _output(attn, torch.cat([attended, cloth_attended]))


class SkipAttnProcessor:
    """`attn2` that adds nothing, whatever it is given."""

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, **unused: Any) -> torch.Tensor:
        return hidden_states.new_zeros(())  # to be added


class IdentityAttnProcessor:
    """`attn2` that returns its input, so that the block adds norm2(h): what CatVTON's weights were trained with."""

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, **unused: Any) -> torch.Tensor:
        return hidden_states


@contextmanager
def vton_attention(
    unet: UNet2DConditionModel, self_attention: Callable[[], ClothAttnProcessor] | None, cross_attention: str
) -> Iterator[list[ClothCacheAttnProcessor | ClothBesideAttnProcessor]]:
    """Install the try-on processors and, at the end, whatever was there before.

    Args:
        unet: the UNet, compiled, wrapped by peft or plain.
        self_attention: makes a processor for every `attn1`; None leaves them (joint mode).
        cross_attention: `"skip"` or `"identity"` for every `attn2`; `"prompt"` leaves them.

    Yields:
        The `attn1` processors.
    """
    before = dict(unet.attn_processors)
    during, installed = dict(before), []
    cross_processor = {"skip": SkipAttnProcessor, "identity": IdentityAttnProcessor, "prompt": None}[cross_attention]
    for name in before:
        if ".attn1." in name and self_attention is not None:
            during[name] = self_attention()
            if hasattr(before[name], "_attention_backend"):
                during[name]._attention_backend = before[name]._attention_backend
            installed.append(during[name])
        elif ".attn2." in name and cross_processor is not None:
            during[name] = cross_processor()
    try:
        unet.set_attn_processor(during)
        yield installed
    finally:
        unet.set_attn_processor(before)


# --------------------------------------------------------------------------------------------------- one call at a time


class Turn:
    """Whose turn it is with a UNet or a scheduler: a lock, and the pipelines whose calls hold it, with their schedulers."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.held: list[Any] = []


# By UNet and by scheduler, which stay free to be copied and pickled. Kept in diffusers, for all copies of this file: whoever
# loads a `custom_pipeline` twice has executed it twice.
TURNS = vars(diffusers).setdefault("_vton_turns", weakref.WeakKeyDictionary())


def in_turn(call: Callable) -> Callable:
    """Let the calls of pipelines that share a UNet or a scheduler run one after the other, from whatever threads they come.

    A callback may call another pipeline, on the same UNet too, that has a scheduler of its own.
    """

    @functools.wraps(call)
    def waiting(self: "StableDiffusionVTONPipeline", *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as turns:
            for name in ("unet", "scheduler"):  # a scheduler may be put in while the UNet is waited for
                if (part := unwrap_module(getattr(self, name))) is None:
                    continue
                turn = TURNS.setdefault(part, Turn())
                turns.enter_context(turn.lock)
                if any(held is self or held is self.scheduler for held in turn.held):
                    raise RuntimeError(
                        "a callback of a running call must not call the same pipeline, or one with its scheduler, whose state would "
                        "be overwritten: give the inner pipeline a scheduler of its own"
                    )
                turns.callback(setattr, turn, "held", turn.held)
                turn.held = [*turn.held, self, self.scheduler]
            return call(self, *args, **kwargs)

    return waiting


def between_calls(change: Callable) -> Callable:
    """Let what changes a UNet's weights, or the scheduler, wait for the calls of other threads on it; not in a call's callback.

    Which layers of settings are in force may change with it: their scheduler follows.
    """

    @functools.wraps(change)
    def waiting(self: "StableDiffusionVTONPipeline", *args: Any, **kwargs: Any) -> Any:
        turn = Turn() if self.unet is None else TURNS.setdefault(unwrap_module(self.unet), Turn())
        with turn.lock:
            if turn.held:
                raise RuntimeError(
                    f"a callback of a running call must not call {change.__name__}, which would change the model in the middle of "
                    "a picture"
                )
            returned = change(self, *args, **kwargs)
            self._follow_scheduler()
            return returned

    return waiting


# -------------------------------------------------------------------------------------------------------- the settings


def _setting(default: Any, kind: type, rule: str, valid: Callable[[Any], bool], **more: Any) -> Any:
    """A setting by its default, its type, what it must be, in words and as a check, and how a file's text is read, by `kind`."""
    return field(default=default, metadata={"kind": kind, "rule": rule, "valid": valid, "read": kind, **more})


def _choice(*choices: Any) -> Any:
    """A setting that is one of few; the first is its default."""
    kind, texts = type(choices[0]), {_text(choice): choice for choice in choices}
    rule, read = f"one of {', '.join(texts)}", texts.__getitem__
    return _setting(choices[0], kind, rule, lambda x: isinstance(x, kind) and x in choices, choices=choices, read=read)


def _number(default: Any, kind: type, rule: str, low: float = -math.inf, high: float = math.inf) -> Any:
    """A setting that is a finite number from `low` to `high`, whole where `kind` is int."""
    is_kind = is_whole if kind is int else is_number
    return _setting(default, kind, rule, lambda x: is_kind(x) and low <= x <= high)


def _free(rule: str, valid: Callable[[str], bool] = lambda text: True) -> Any:
    """A setting that is a text, None by default."""
    return _setting(None, str, rule, lambda x: isinstance(x, str) and valid(x))


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def is_scheduler(name: str) -> bool:
    scheduler = getattr(diffusers, name, None)
    return isinstance(scheduler, type) and issubclass(scheduler, SchedulerMixin) and scheduler is not SchedulerMixin


def scheduler_like(scheduler: SchedulerMixin, name: str) -> SchedulerMixin:
    """A scheduler of diffusers' class `name` with another's betas and prediction type."""
    cls, config, options = getattr(diffusers, name), scheduler.config, {}
    silent = "clip_sample" not in config or "clip_sample" in config.get("_use_default_values", [])
    if silent and "clip_sample" in inspect.signature(cls).parameters:
        options["clip_sample"] = False  # latents are not pictures in [-1, 1]
    return cls.from_config(config, **options)


@dataclass(frozen=True)
class AdapterSettings:
    """What has to be known of an adapter's weights to use them as they were trained.

    The settings travel as text in the metadata of the adapter's file, live in the pipeline's config and are keywords of its
    `__init__`. This class is their only list: defaults, choices, checks and texts.

    Args:
        base_in_channels: input channels of the base's UNet before any widening, 4, 8 or 9; `in_channels` in a file.
        cloth_conditioning: `"reference"` (the cloth is read once, its keys and values stand in every `attn1`) or `"joint"`
            (person and cloth on one canvas).
        canvas_axis: `"height"` or `"width"`, where joint mode puts the cloth.
        cross_attention: `"skip"` (no text), `"prompt"` or `"identity"` (CatVTON's).
        condition_latents: `"scaled"` by the VAE's factor, or `"unscaled"`.
        mask_free: the condition is the whole person, and a mask is not needed.
        pose: `"painted"` where a pose may be painted into the hole that the mask leaves; `"none"` leaves it grey.
        guidance_scale: what `guidance_scale=None` means in a call.
        scheduler_class: the diffusers scheduler to sample with; None leaves the base's.
        eta: what `eta=None` means in a call, 0 to 1; None is 0.
        prompt: the text that `cross_attention="prompt"` was trained with, used where a call gives none.
        height, width: the native size in pixels; None takes the UNet's.
        trainable: which weights an adapter holds.
        base_model, trained_steps: where the weights come from.

    Raises:
        ValueError: a value is none of its setting's; the sentence names both.
    """

    base_in_channels: int | None = _number(None, int, "a positive whole number", low=1)
    cloth_conditioning: str = _choice("reference", "joint")
    canvas_axis: str = _choice("height", "width")
    cross_attention: str = _choice("skip", "prompt", "identity")
    condition_latents: str = _choice("scaled", "unscaled")
    mask_free: bool = _choice(False, True)
    pose: str = _choice("none", "painted")
    guidance_scale: float = _number(7.5, float, "a finite number")
    scheduler_class: str | None = _free("the name of a diffusers scheduler", is_scheduler)
    eta: float | None = _number(None, float, "a number from 0 to 1", low=0, high=1)
    prompt: str | None = _free("a text")
    height: int | None = _number(None, int, "a positive whole number", low=1)
    width: int | None = _number(None, int, "a positive whole number", low=1)
    trainable: str = _choice(*TRAINABLE_PARTS)
    base_model: str | None = _free("a text")
    trained_steps: int | None = _number(None, int, "a whole number from 0", low=0)

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            try:
                object.__setattr__(self, setting.name, self._check(setting, value))
            except ValueError as error:
                raise ValueError(f"`{setting.name}` must be {error}, got {value!r}") from None
        if self.pose == "painted" and self.mask_free:
            raise ValueError(
                "`pose` must be none where `mask_free` is true, since no mask leaves a hole to paint, got 'painted'"
            )

    @staticmethod
    def _check(setting: Field, value: Any) -> Any:
        """The value in its setting's own type; ValueError, with what it must be, where it is none."""
        if value is None and setting.default is None:
            return None
        if not setting.metadata["valid"](value):
            raise ValueError(setting.metadata["rule"])
        return setting.metadata["kind"](value)

    @classmethod
    def choices(cls, name: str) -> tuple:
        """What a setting may be, the default first."""
        return cls.__dataclass_fields__[name].metadata["choices"]

    @classmethod
    def from_metadata(cls, metadata: dict[str, str], file: str | os.PathLike) -> "AdapterSettings":
        """The settings in the metadata of an adapter's `file`, with defaults for those that it leaves out.

        Raises:
            ValueError: the file is of another format or a later version, or has an unknown setting.
        """
        if metadata.get("format") != ADAPTER_FORMAT:
            raise ValueError(
                f"the adapter {file} must say format={ADAPTER_FORMAT!r} in its metadata, got {metadata.get('format')!r}"
            )
        if metadata.get("format_version") != ADAPTER_FORMAT_VERSION:
            version = metadata.get("format_version")
            raise ValueError(
                f"the adapter {file} has format_version {version!r}; this pipeline reads {ADAPTER_FORMAT_VERSION!r}"
            )
        if "in_channels" not in metadata:
            raise ValueError(f"the adapter {file} must say in_channels (4, 8 or 9) in its metadata")
        known = {"in_channels" if s.name == "base_in_channels" else s.name: s for s in fields(cls)}
        settings = {}
        for name, text in metadata.items():
            if name in {"format", "format_version"}:
                continue
            if name not in known:
                raise ValueError(f"the adapter {file} has the unknown setting {name}={text!r}")
            setting = known[name]
            try:
                settings[setting.name] = cls._check(setting, setting.metadata["read"](text))
            except (KeyError, ValueError):
                rule = setting.metadata["rule"]
                raise ValueError(f"the adapter {file} has the setting {name}={text!r}, not {rule}") from None
        return cls(**settings)

    def metadata(self) -> dict[str, str]:
        """The settings as an adapter's metadata, without those that are None; `from_metadata` reads it."""
        texts = {name: _text(value) for name, value in asdict(self).items() if value is not None}
        if "base_in_channels" in texts:
            texts["in_channels"] = texts.pop("base_in_channels")
        return {"format": ADAPTER_FORMAT, "format_version": ADAPTER_FORMAT_VERSION, **texts}


# --------------------------------------------------------------------------------------------------------- the adapter


def adapter_parameters(unet: UNet2DConditionModel, trainable: str, widened: bool) -> dict[str, torch.nn.Parameter]:
    """The parameters that an adapter holds, by their names in a plain UNet's state dict.

    Args:
        unet: the UNet, compiled or wrapped by peft as it may be.
        trainable: `"self_attention"`, `"attention"`, `"attention_norms"` or `"all"`.
        widened: whether `conv_in` was widened from 4 channels, and so belongs to the adapter.
    """
    parts, chosen = TRAINABLE_PARTS[trainable], {}
    for name, parameter in unet.named_parameters():
        name = name.removeprefix("_orig_mod.").replace(".base_layer.", ".")
        if ".lora_" in name or {"to_qkv", "to_kv"} & set(name.split(".")):  # what unfuse_qkv_projections leaves behind
            continue
        if parts is None or parts & set(name.split(".")) or (widened and name == "conv_in.weight"):
            chosen[name] = parameter
    return chosen


def widen_conv_in(unet: UNet2DConditionModel) -> torch.nn.Conv2d:
    """Give a 4-channel UNet four condition channels whose weights start at zero; returns the old `conv_in`."""
    old = unet.conv_in
    new = torch.nn.Conv2d(
        8, old.out_channels, old.kernel_size, padding=old.padding, device=old.weight.device, dtype=old.weight.dtype
    )
    new.requires_grad_(old.weight.requires_grad)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, :4] = old.weight
        new.bias.copy_(old.bias)
    unet.conv_in = new
    unet.register_to_config(in_channels=8)
    return old


def hub_repository(name: str | os.PathLike | None) -> str | None:
    """The Hub repository that a name, or a folder in the Hub's cache, stands for; None for any other folder."""
    if cached := re.search(r"models--([\w.-]+?)--([\w.-]+)", str(name)):
        return f"{cached[1]}/{cached[2]}"
    return str(name) if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)) and not Path(name).exists() else None


def require_place(name: str | os.PathLike) -> None:
    """FileNotFoundError for what is neither here nor a name that a Hub repository can have, before the Hub is asked for it."""
    if not Path(name).exists() and hub_repository(name) is None:
        raise FileNotFoundError(f"there is no file or folder {name}, and a Hub repository is OWNER/NAME")


def is_lora(place: Path) -> bool:
    """Whether it is a LoRA's file, or a folder that holds one, as `train_vton.py --lora_rank` writes them."""
    return place.name == LORA_NAME or (place / LORA_NAME).is_file()


def read_safetensors(file: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Weights and metadata of a file; ValueError where it is none, or not whole."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"the adapter {file} is not a whole safetensors file: {error}") from error


def read_adapter(file: str | os.PathLike) -> tuple[dict[str, torch.Tensor], AdapterSettings]:
    """Read an adapter: its weights and its settings.

    Raises:
        ValueError: the file is no safetensors file, of another format or a later version, or has an unknown setting.
    """
    weights, metadata = read_safetensors(file)
    return weights, AdapterSettings.from_metadata(metadata, file)


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A temporary name beside `file`, whose folder is made, to write to; renamed at the end: never half a file, and read by
    whom new files are for, which safetensors' own are not.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_adapter(file: str | os.PathLike, weights: dict[str, torch.Tensor], settings: AdapterSettings) -> None:
    """Write weights and settings, never half a file."""
    weights = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    with whole_file(Path(file)) as temporary:
        save_file(weights, temporary, settings.metadata())


CATVTON_KEY = re.compile(r"(\d+)\.(to_[qkv]\.weight|to_out\.0\.weight|to_out\.0\.bias)")


def name_catvton_weights(
    file: str | os.PathLike, weights: dict[str, torch.Tensor], unet: UNet2DConditionModel
) -> dict[str, torch.Tensor]:
    """CatVTON's weights by the UNet's names; in the file they are numbered by places in a list of modules.

    The list holds every module with `attn1` in its name, parts included, so the step between two attentions depends on the
    diffusers version that wrote the file. Their order, that of `named_modules()` (down, up, then mid), does not.
    """
    keys = {name: CATVTON_KEY.fullmatch(name).groups() for name in weights}
    places = sorted({int(place) for place, _ in keys.values()})
    modules = dict.fromkeys(
        name.partition(".attn1.")[0] for name in adapter_parameters(unet, "self_attention", widened=False)
    )
    if len(places) != len(modules):
        raise ValueError(
            f"the adapter {file} has {len(places)} self-attentions in CatVTON's layout, this UNet has {len(modules)}"
        )
    prefixes = {place: f"{module}.attn1." for place, module in zip(places, modules)}
    return {prefixes[int(place)] + part: weights[name] for name, (place, part) in keys.items()}


def catvton_settings(source: str, mask_free: bool | None, base_in_channels: int) -> AdapterSettings:
    """The settings of CatVTON's weights, whose kind is given, or in the repository's name, or follows from the base.

    Neither file says how it was trained: masked ones on SD1.5 inpainting with the cloth below the person, mask-free ones on
    instruct-pix2pix with the cloth beside.
    """
    if mask_free is None:
        named = re.search(r"(?:^|[/\\]|--)CatVTON(-MaskFree)?(?:$|[/\\])", source)
        mask_free = named[1] is not None if named else base_in_channels == 8
    return AdapterSettings(
        base_in_channels=8 if mask_free else 9,
        cloth_conditioning="joint",
        canvas_axis="width" if mask_free else "height",
        cross_attention="identity",
        mask_free=mask_free,
        guidance_scale=2.5,
        scheduler_class="DDIMScheduler",
        eta=1.0,
        base_model="timbrooks/instruct-pix2pix" if mask_free else "stable-diffusion-v1-5/stable-diffusion-inpainting",
    )


def _lora_modules(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The modules that peft has put around others."""
    return (module for module in model.modules() if hasattr(module, "merged_adapters"))


def _merged_loras(model: torch.nn.Module) -> set[str]:
    """The names of the LoRAs that are merged into its weights, whichever pipeline fused them."""
    return {name for module in _lora_modules(model) for name in module.merged_adapters}


class VTONAdapterMixin(StableDiffusionLoraLoaderMixin):
    """Adapters, LoRAs and settings of a pipeline: what its `unet` carries, and what its config says of it.

    Settings are a stack of layers: the base's, what was fused into it for good, the adapter's, and those of every LoRA that
    brings its own and is active, in loading order; None in a layer leaves what lies below. `config` shows the top. The layers
    stay with the UNet, so that every pipeline around it knows them, and another UNet has its own.
    """

    @property
    def config(self) -> FrozenDict:
        """As diffusers'; the settings in it are the stack's top, whatever happened to the UNet since one looked last."""
        if "_said" in self.__dict__:
            self._follow_scheduler()
            settings = asdict(self._settings())
            if not settings.items() <= self._internal_dict.items():  # set past __setattr__, which asks for `config`
                self.__dict__["_internal_dict"] = FrozenDict({**self._internal_dict, **settings})
        return self._internal_dict

    def register_to_config(self, **kwargs: Any) -> None:
        """As diffusers'; a setting is said of the layer that is the top one now, and goes with it."""
        names = [setting.name for setting in fields(AdapterSettings) if setting.name in kwargs]
        said = {name: kwargs.pop(name) for name in names}
        super().register_to_config(**kwargs)
        if said:
            checked = asdict(AdapterSettings(**asdict(self._settings()) | said))
            said = {name: checked[name] for name in names}
            if "base_in_channels" in said:
                self._stack["base_in_channels"] = said.pop("base_in_channels")
            top = self._layers()[-1]["id"]
            for known in (self._said, self._stack["said"]):
                known[top] = known.get(top, {}) | said

    def _begin_settings(self, **given: Any) -> None:
        """The settings of a new pipeline: as given, else what was last said of this UNet, else the defaults."""
        given = {name: value for name, value in given.items() if value is not None}
        stack = self._stack
        if not stack["said"]:  # nobody has seen this UNet
            settings = asdict(AdapterSettings(**{"base_in_channels": stack["base_in_channels"]} | given))
            stack["base_in_channels"] = settings.pop("base_in_channels")
            stack["said"]["base"] = settings
            given = {}
        self._layers_sampled = {layer["id"] for layer in self._layers()}  # whose schedulers had their turn
        self._said = copy.deepcopy(stack["said"])  # by the layers' ids; by this pipeline alone from now on
        top, known = self._layers()[-1]["id"], asdict(self._settings())
        checked = asdict(AdapterSettings(**known | given))
        self._said[top] = self._said.get(top, {}) | {n: checked[n] for n in given if checked[n] != known[n]}

    @property
    def _stack(self) -> dict[str, Any]:
        """What the UNet carries."""
        unet = unwrap_module(self.unet)
        new = {
            "base_in_channels": None if unet is None else unet.config.in_channels,
            "said": {"base": self._said["base"]} if "_said" in self.__dict__ else {},  # by the layers' ids
            "fixed": [],  # layers that were fused into the base
            "adapter": None,  # its layer, with the base's weights
            "loras": {},  # layers by the names of LoRAs
        }
        return new if unet is None else vars(unet).setdefault("vton_stack", new)

    @staticmethod
    def _new_layer(settings: AdapterSettings) -> dict[str, Any]:
        return {"id": uuid.uuid4().hex, "settings": asdict(settings)}

    def _layers(self, loras: bool = True) -> list[dict[str, Any]]:
        """The layers in force, from the base up; without `loras` only what the UNet's own weights are."""
        stack = self._stack
        layers = [{"id": "base", "settings": {}}, *stack["fixed"]]
        if stack["adapter"] is not None:
            layers.append(stack["adapter"])
        if loras and stack["loras"]:
            computing = set()
            for module in _lora_modules(self.unet):  # where some are merged, the others do nothing
                if not module.disable_adapters:
                    computing.update(module.merged_adapters or module.active_adapters)
            layers += [layer for name, layer in stack["loras"].items() if name in computing]
        return layers

    def _settings(self, loras: bool = True) -> AdapterSettings:
        """What the layers in force say together."""
        settings = {}
        for layer in self._layers(loras):
            settings |= {name: value for name, value in layer["settings"].items() if value is not None}
            settings |= self._said.get(layer["id"], {})
        return AdapterSettings(**settings | {"base_in_channels": self._stack["base_in_channels"]})

    def _follow_scheduler(self) -> None:
        """Sample as the layers in force ask for: a new one puts its scheduler in, and one that went takes its own out.

        The scheduler is built from the one before; betas and prediction type stay. A scheduler that somebody else put in is
        theirs, and stays.
        """
        layers = {layer["id"]: layer["settings"].get("scheduler_class") for layer in self._layers()}
        new = [identity for identity, name in layers.items() if name and identity not in self._layers_sampled]
        if self.scheduler is None or layers.keys() == self._layers_sampled:
            return
        turn = TURNS.get(self.scheduler)
        if turn is not None and any(held is self for held in turn.held):  # a callback's doing: after the call
            return
        self._layers_sampled.clear()  # in place: to set it would ask for `config`, and come here again
        self._layers_sampled.update(layers)
        scheduler = self.scheduler
        while getattr(scheduler, "vton_layer", "base") not in {"base", *layers}:
            scheduler = scheduler.vton_replaced
        for identity in new:
            replaced, scheduler = scheduler, scheduler_like(scheduler, layers[identity])
            scheduler.vton_layer, scheduler.vton_replaced = identity, replaced
        if scheduler is not self.scheduler:
            self.scheduler = scheduler

    @between_calls
    def load_vton_adapter(
        self,
        pretrained_model_name_or_path: str | os.PathLike,
        weight_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        mask_free: bool | None = None,
    ) -> None:
        """Put a try-on adapter's weights into the UNet, and its settings into the pipeline's config.

        Everything in the file is checked before anything changes. A second adapter replaces the first. CatVTON's published
        weights (`zhengchong/CatVTON`, subfolder `mix-48k-1024/attention`) load too.

        Args:
            pretrained_model_name_or_path: a Hub repository, a folder or a file.
            weight_name: the file's name; None tries `vton_adapter.safetensors`, then `model.safetensors`.
            subfolder, revision, token, cache_dir, force_download, local_files_only: as in `from_pretrained`, with its defaults.
            mask_free: which kind CatVTON's weights are, where the repository's name does not tell (`CatVTON-MaskFree` is
                mask-free, another `CatVTON` is not; with neither in the name, a base with 8 channels means mask-free); None by default.

        Raises:
            ValueError: the file is damaged, of another format or a later version, or does not fit this UNet.
            OSError: there is no such file.
            RuntimeError: a callback of a running call asks for it.
        """
        values = (subfolder, revision, token, cache_dir, force_download, local_files_only)
        options = dict(zip(HUB_OPTIONS, values, strict=True))
        self._refuse_changed_unet()
        file = self._find_adapter(pretrained_model_name_or_path, weight_name, options)
        weights, metadata = read_safetensors(file)
        if weights and all(map(CATVTON_KEY.fullmatch, weights)):
            weights = name_catvton_weights(file, weights, self.unet)
            settings = catvton_settings(str(pretrained_model_name_or_path), mask_free, self.config.base_in_channels)
        else:
            settings = AdapterSettings.from_metadata(metadata, file)
            if mask_free not in {None, settings.mask_free}:
                raise ValueError(f"`mask_free`={mask_free} is not what the adapter {file} says: {settings.mask_free}")
        self._check_adapter(file, weights, settings)
        self._check_scheduler_class(settings)
        if settings.base_in_channels == 4 and self.unet.conv_in.weight.element_size() == 1:
            raise ValueError(
                "the UNet keeps its weights in float8, in which `conv_in` is not widened: load the adapter before enable_layerwise_casting"
            )
        self._refuse_lora_on_conv_in(widened=settings.base_in_channels == 4)
        stack = self._stack
        if stack["adapter"] is not None:
            self.unload_vton_adapter()
        conv_in = widen_conv_in(self.unet) if self.unet.config.in_channels == 4 else None
        parameters = self._adapter_parameters(settings)
        before = {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
        stack["adapter"] = self._new_layer(settings) | {"weights": before, "conv_in": conv_in}
        meant = hub_repository(settings.base_model)
        base = hub_repository(self._said["base"].get("base_model")) or hub_repository(self.name_or_path)
        if meant is not None and base is not None and meant != base:
            warnings.warn(
                f"the adapter {file} was trained on {meant}, and its weights replace those of {base}", stacklevel=2
            )

    @between_calls
    def unload_vton_adapter(self) -> None:
        """Put the base's weights back, bit for bit, and the settings that lie below the adapter's.

        Raises:
            ValueError: there is no adapter, or the UNet's weights are offloaded, quantised or fused.
            RuntimeError: a callback of a running call asks for it.
        """
        adapter = self._stack["adapter"]
        if adapter is None:
            raise ValueError(
                "unload_vton_adapter: no adapter was loaded into this UNet with load_vton_adapter, or its weights are merged "
                "with the base's: saved by save_pretrained, or under a LoRA that was fused and then unloaded"
            )
        self._refuse_changed_unet()
        widened = adapter["conv_in"] is not None
        self._refuse_lora_on_conv_in(widened)
        parameters = adapter_parameters(self.unet, "all", widened)
        with torch.no_grad():
            for name, weight in adapter["weights"].items():
                parameters[name].copy_(weight)
        if widened:
            self.unet.conv_in = adapter["conv_in"].to(self.unet.conv_in.weight)  # its device and dtype
            self.unet.register_to_config(in_channels=4)
        self._stack["adapter"] = None

    def save_vton_adapter(self, save_directory: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """Write `vton_adapter.safetensors`: the trainable weights and the settings.

        LoRAs that are loaded and not fused are no part of it, neither their weights nor their settings.

        Args:
            save_directory: the folder, made where there is none.
            dtype: of the weights in the file, floating point of 16 bits at least; None, the default, is the UNet's.

        Raises:
            ValueError: the UNet has 4 channels, its weights are offloaded, quantised, fused or in float8, or `dtype` is none of
                those.
        """
        self._require("unet")
        if self.unet.config.in_channels == 4:
            raise ValueError(
                "save_vton_adapter: this UNet has 4 input channels and no adapter; load or train one first"
            )
        if dtype not in {None, torch.float16, torch.bfloat16, torch.float32, torch.float64}:
            raise ValueError(f"`dtype` must be None, or floating point of 16 bits at least, got {shown(dtype)}")
        self._refuse_changed_unet()
        self._write_adapter(Path(save_directory), dtype, self._settings(loras=False))

    def _write_adapter(self, folder: Path, dtype: torch.dtype | None, settings: AdapterSettings) -> None:
        parameters = self._adapter_parameters(settings)
        if any(parameter.element_size() == 1 for parameter in parameters.values()):
            raise ValueError(
                "the UNet keeps its weights in float8, to which the adapter's are rounded: save it before enable_layerwise_casting"
            )
        weights = {name: parameter.detach().to(dtype) for name, parameter in parameters.items()}
        write_adapter(folder / ADAPTER_NAME, weights, settings)

    def _adapter_parameters(self, settings: AdapterSettings) -> dict[str, torch.nn.Parameter]:
        """What an adapter with these settings holds of this UNet."""
        return adapter_parameters(self.unet, settings.trainable, settings.base_in_channels == 4)

    @between_calls
    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        settings: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """As diffusers loads a LoRA; one that `train_vton.py` trained brings its settings too, as long as it is active.

        Args:
            pretrained_model_name_or_path_or_dict, adapter_name, kwargs: as in diffusers.
            settings: the `AdapterSettings` of a LoRA whose file is silent, or that comes as a dict of weights; None takes the
                file's.

        Raises:
            ValueError: the LoRA was trained on a UNet with other input channels, or its settings are damaged.
        """
        brought = self._find_lora_settings(pretrained_model_name_or_path_or_dict, **kwargs)
        brought = brought if settings is None else AdapterSettings(**settings)
        if brought is not None:
            self._check_scheduler_class(brought)
        before = set(getattr(self.unet, "peft_config", {}))
        super().load_lora_weights(pretrained_model_name_or_path_or_dict, adapter_name, **kwargs)
        for name in set(getattr(self.unet, "peft_config", {})) - before or {adapter_name}:
            self._stack["loras"].pop(name, None)
            if brought is not None:
                self._stack["loras"][name] = self._new_layer(brought)

    @between_calls
    def unload_lora_weights(self) -> None:
        """As diffusers unloads LoRAs, and their settings; one that is fused stays in the weights, and its settings stay."""
        self._keep_fused(set(self._stack["loras"]))
        super().unload_lora_weights()
        self._stack["loras"].clear()

    @between_calls
    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """As diffusers deletes LoRAs, and their settings; one that is fused stays in the weights, and its settings stay."""
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        self._keep_fused(names)
        super().delete_adapters(adapter_names)
        for name in names:
            self._stack["loras"].pop(name, None)

    # As diffusers has them; settings and scheduler follow.
    set_adapters = between_calls(StableDiffusionLoraLoaderMixin.set_adapters)
    enable_lora = between_calls(StableDiffusionLoraLoaderMixin.enable_lora)
    disable_lora = between_calls(StableDiffusionLoraLoaderMixin.disable_lora)
    fuse_lora = between_calls(StableDiffusionLoraLoaderMixin.fuse_lora)
    unfuse_lora = between_calls(StableDiffusionLoraLoaderMixin.unfuse_lora)

    def _keep_fused(self, names: set[str]) -> None:
        """Of LoRAs that are about to go: those that are merged become the base's for good, and an adapter under them too."""
        stack = self._stack
        merged = _merged_loras(self.unet)
        if merged & names:
            if stack["adapter"] is not None:
                stack["fixed"].append({name: stack["adapter"][name] for name in ("id", "settings")})
                stack["adapter"] = None
            stack["fixed"] += [layer for name, layer in stack["loras"].items() if name in merged & names]

    def _find_lora_settings(
        self, path: str | os.PathLike | dict, weight_name: str | None = None, **kwargs: Any
    ) -> AdapterSettings | None:
        """The settings in a LoRA's metadata; None for a LoRA of another kind."""
        if isinstance(path, dict):
            return None
        options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        try:
            if weight_name is None:
                weight_name = _best_guess_weight_name(path, local_files_only=options.get("local_files_only"))
            file = _get_model_file(path, weights_name=weight_name or LORA_NAME, **options)
        except (OSError, ValueError):  # diffusers says what is missing
            return None
        metadata = read_safetensors(file)[1] if file.endswith(".safetensors") else {}
        if LORA_SETTINGS not in metadata:
            return None
        settings = AdapterSettings.from_metadata(json.loads(metadata[LORA_SETTINGS]), file)
        if settings.base_in_channels != self.unet.config.in_channels:
            raise ValueError(
                f"the LoRA {file} is for a UNet with {settings.base_in_channels} input channels, this one has {self.unet.config.in_channels}"
            )
        return settings

    def _check_scheduler_class(self, settings: AdapterSettings) -> None:
        """ValueError where what is loaded asks for a scheduler that cannot be made of the pipeline's, or not step latents."""
        if settings.scheduler_class is not None and self.scheduler is not None:
            try:
                check_scheduler(scheduler_like(self.scheduler, settings.scheduler_class))
            except (TypeError, AttributeError) as error:
                raise ValueError(
                    f"`scheduler_class` {settings.scheduler_class} cannot be made here: {error}"
                ) from error

    def _refuse_changed_unet(self) -> None:
        """ValueError where the adapter's weights are not there as numbers, or are mixed with others'."""
        self._require("unet")
        if _is_group_offload_enabled(self.unet) or any(p.device.type == "meta" for p in self.unet.parameters()):
            raise ValueError(
                "the UNet's weights are spread by sequential or group offloading: load, save or unload the adapter before it is enabled"
            )
        if any(type(p.data) is not torch.Tensor or not p.is_floating_point() for p in self.unet.parameters()):
            raise ValueError(
                "the UNet's weights are quantised: load, save or unload the adapter before they are, or take an unquantised UNet"
            )
        if merged := _merged_loras(self.unet):
            raise ValueError(
                f"the UNet's weights are fused with the LoRA {', '.join(sorted(merged))}: call unfuse_lora before the adapter is loaded, saved or unloaded"
            )
        if any(isinstance(processor, FusedAttnProcessor2_0) for processor in self.unet.attn_processors.values()):
            raise ValueError(
                "the UNet's QKV projections are fused: call unfuse_qkv_projections before the adapter is loaded, saved or unloaded"
            )

    def _refuse_lora_on_conv_in(self, widened: bool) -> None:
        if widened and hasattr(self.unet.conv_in, "base_layer"):
            raise ValueError(
                "the UNet's `conv_in` carries a LoRA and is to be widened or narrowed: call unload_lora_weights first"
            )

    @staticmethod
    def _find_adapter(path: str | os.PathLike, weight_name: str | None, options: dict[str, Any]) -> str:
        names = [weight_name] if weight_name else [ADAPTER_NAME, "model.safetensors"]
        if not all(name.endswith(".safetensors") for name in names):
            raise ValueError(f"`weight_name` must end in .safetensors, got {weight_name!r}")
        require_place(path)
        place = Path(path, options["subfolder"] or "")
        offline = options["local_files_only"] or is_offline_mode()
        for name in names:
            try:
                return _get_model_file(path, weights_name=name, **options)
            except OSError as error:  # a folder without the file is no cause; a wrong token or a lost connection is
                if not (offline or isinstance(error.__cause__, (RemoteEntryNotFoundError, type(None)))):
                    raise
                reason = error.__cause__ if offline else None
        lora = f", but a LoRA, which load_lora_weights loads ({LORA_NAME})" if is_lora(place) else ""
        raise OSError(f"there is no {' and no '.join(names)} in {place}{lora}{f': {reason}' if reason else ''}")

    def _check_adapter(self, file: str, weights: dict[str, torch.Tensor], settings: AdapterSettings) -> None:
        """ValueError unless the file's weights are exactly those of this UNet."""
        if settings.base_in_channels != self.config.base_in_channels:
            raise ValueError(
                f"the adapter {file} is for a base with {settings.base_in_channels} input channels "
                f"(base_model={settings.base_model!r}), this UNet has {self.config.base_in_channels}"
            )
        parameters = self._adapter_parameters(settings)
        missing, unexpected = sorted(parameters.keys() - weights.keys()), sorted(weights.keys() - parameters.keys())
        if missing or unexpected:
            example = f"{missing[0]} is missing" if missing else f"{unexpected[0]} is unexpected"
            raise ValueError(
                f"the adapter {file} does not fit this UNet: {len(missing)} weights missing, {len(unexpected)} unexpected ({example})"
            )
        for name, weight in weights.items():
            shape = list(parameters[name].shape)
            if name == "conv_in.weight" and settings.base_in_channels == 4:
                shape[1] = 8
            if list(weight.shape) != shape:
                raise ValueError(
                    f"the adapter {file} does not fit this UNet: {name} has shape {list(weight.shape)}, not {shape}"
                )
            if not weight.is_floating_point() or not torch.isfinite(weight.float()).all():
                raise ValueError(f"the adapter {file} is damaged: {name} is not all finite floating-point numbers")
            dtype = parameters[name].dtype
            if not torch.isfinite(weight.to(dtype).float()).all():
                raise ValueError(
                    f"the adapter {file} does not fit this UNet: {name} has numbers that {dtype} cannot hold"
                )


# ------------------------------------------------------------------------------------------------------ the model card

BASE_LICENSES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-inpainting": "creativeml-openrail-m",
    "timbrooks/instruct-pix2pix": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2": "openrail++",
    "stabilityai/stable-diffusion-2-base": "openrail++",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
    "stabilityai/stable-diffusion-2-inpainting": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "diffusers/stable-diffusion-xl-1.0-inpainting-0.1": "openrail++",
}
# Of full precision their repositories hold pickles alone, safetensors in the fp16 variant.
FP16_BASES = {"stable-diffusion-v1-5/stable-diffusion-inpainting"}
CARD_NOTE = (
    "<!-- Written by save_pretrained, and written anew by the next; take this line out to keep a text of your own. -->"
)
CARD_CODE = """import torch
from diffusers import DiffusionPipeline
from diffusers.utils import load_image

pipe = DiffusionPipeline.from_pretrained({load}, trust_remote_code=True)
{adapter}pipe.to("cuda" if torch.cuda.is_available() else "cpu")
result = pipe(
    person_image=load_image("person.png"),
    cloth_image=load_image("cloth.png"),
    mask_image={mask},
)
result.images[0].save("tryon.png")"""
CARD_TEXT = """{note}

# {name}

Virtual try-on with Stable Diffusion: it puts the cloth of one photograph on the person of another. {kind}

```python
{code}
```

{other_ways}
## What the weights are

{settings}

## Measured

{measured}

## Licence

The code is Apache 2.0. The weights are not: they follow their base and the data that they learnt from (here: `{license}`).
VITON-HD and DressCode are for research only, and so are weights trained on them.
{human_parser}
## Photographs of people

Dress people who agreed to it, say of a result that it is generated, and do not make it of children, to deceive, to undress or
to ridicule. A result shows neither how a cloth fits nor what the body under it looks like. What the base has learnt about
people, its biases included, is still there.
"""


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows of values as a Markdown table: each cell on one line, no bar in it."""
    cells = ([" ".join(str(value).split()).replace("|", "\\|") for value in row] for row in (head, *rows))
    first, *others = (f"| {' | '.join(row)} |" for row in cells)
    return "\n".join([first, "|" + "---|" * len(head), *others, ""])


@contextmanager
def written_whole(directory: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder that becomes `directory`, or whose files go into it, when all of them are written; an error while they
    are leaves everything as it was.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    beside = directory if directory.exists() else directory.parent
    with tempfile.TemporaryDirectory(dir=beside, prefix=".unfinished-") as unfinished:
        whole = Path(unfinished, "whole")
        whole.mkdir()
        yield whole
        if not directory.exists():
            whole.rename(directory)
            return
        stale = {file for pattern in replaced_weights(whole) for file in directory.glob(pattern)}
        places = {file: directory / file.relative_to(whole) for file in sorted(whole.rglob("*"))}
        for file, place in places.items():
            if file.is_dir():
                place.mkdir(exist_ok=True)
            else:
                os.replace(file, place)
        for file in stale.difference(places.values()):
            file.unlink()


def replaced_weights(folder: Path) -> list[str]:
    """What the weights of a folder take the place of elsewhere, in one file or in shards, as patterns: a loader would prefer old shards."""
    patterns = []
    for file in folder.rglob("*.safetensors"):
        stem, variant = re.fullmatch(r"([^.]+?)(\..+?)?(?:-\d{5}-of-\d{5})?", file.stem).groups(default="")
        place = (file.relative_to(folder).parent / stem).as_posix()
        patterns += [f"{place}{variant}.safetensors", f"{place}{variant}-?????-of-?????.safetensors"]
        patterns.append(f"{place}.safetensors.index{variant}.json")
    return list(dict.fromkeys(patterns))


def hide_folders(saved: Path) -> None:
    """Take the names of folders, from which parts were loaded, out of what was saved: they are nobody else's business."""
    for file in saved.rglob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if "_name_or_path" in content:
            repository = hub_repository(content.pop("_name_or_path"))
            content |= {} if repository is None else {"_name_or_path": repository}
            file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class VTONHubMixin:
    """Saves, publishes and describes a whole pipeline, its code included."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        license: str | None = None,
        human_parser_license: str | None = None,
        eval_results: list[EvalResult] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a complete Hub repository: components, `model_index.json`, the code that runs them, the adapter and a card.

        Args:
            save_directory: the folder; a README.md of your own in it is kept.
            variant, max_shard_size: as in diffusers, None by default.
            safe_serialization, push_to_hub, kwargs: True, False and nothing: there is no other way.
            license: of the weights, for the card; None, the default, takes what is known of the base.
            human_parser_license: of the human parser, which is saved too where it is given; its weights have a licence of
                their own, so None leaves it out.
            eval_results: what was measured, for the card; None by default.

        Raises:
            ValueError: a pickle or an upload is asked for, a component is missing, or the UNet's weights are offloaded, quantised,
                fused or under a LoRA. Nothing is written then.
            TypeError: there are `kwargs`.
        """
        if not safe_serialization:
            raise ValueError(
                f"`safe_serialization` must be True: this pipeline writes safetensors only, got {shown(safe_serialization)}"
            )
        if push_to_hub:
            raise ValueError(
                "`push_to_hub=True` would upload before the code is written: call pipe.push_to_hub(repo_id) instead"
            )
        if kwargs:  # diffusers would pass over them
            raise TypeError(
                f"save_pretrained takes no {', '.join(kwargs)}: it writes all (save_vton_adapter writes the adapter alone)"
            )
        self._require("vae", "unet", "scheduler")
        self._refuse_lora_layers()
        if self.unet.config.in_channels != 4:
            self._refuse_changed_unet()
        with written_whole(save_directory) as folder:
            super().save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
            left_out = () if human_parser_license is not None else ("human_parser", "human_parser_processor")
            self._mend_index(folder, left_out)
            hide_folders(folder)
            self._write_code(folder)
            if self.unet.config.in_channels != 4:
                self._write_adapter(folder, self._lossless_dtype(), self._published_settings())
            if (own := Path(save_directory, "README.md")).is_file():
                shutil.copy(own, folder)
            self._write_card(
                folder, Path(save_directory).resolve().name, False, license, human_parser_license, eval_results
            )
        if self.unet.config.in_channels == 4:  # which has no adapter
            Path(save_directory, ADAPTER_NAME).unlink(missing_ok=True)

    def _mend_index(self, folder: Path, left_out: Sequence[str]) -> None:
        """What diffusers wrote of the pipeline, with our class, and without components that are `left_out`."""
        for name in left_out:
            shutil.rmtree(folder / name, ignore_errors=True)
        index = json.loads((folder / self.config_name).read_text(encoding="utf-8"))
        index["_class_name"] = ["pipeline_vton", StableDiffusionVTONPipeline.__name__]
        index["base_model"] = self._published_settings().base_model
        index |= dict.fromkeys(left_out, [None, None])
        for component in index.values():
            # transformers' name where torchvision is missing; the plain one loads anywhere
            if isinstance(component, list) and str(component[-1]).endswith("ImageProcessorPil"):
                component[-1] = component[-1].removesuffix("Pil")
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / self.config_name).write_text(text, encoding="utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        *,
        variant: str | None = None,
        adapter_only: bool = False,
        license: str | None = None,
        human_parser_license: str | None = None,
        eval_results: list[EvalResult] | None = None,
    ) -> str:
        """Upload a complete repository, as `save_pretrained` writes it, or the adapter with its code and card alone.

        Args:
            repo_id, commit_message, private, token, create_pr, variant: as in diffusers, with its defaults.
            adapter_only: False by default; True uploads no components: about 100 MB for SD1.5, loaded onto the base by
                `from_pretrained(BASE, custom_pipeline=repo_id)` and `load_vton_adapter(repo_id)`.
            license, human_parser_license, eval_results: as in `save_pretrained`. A card of your own on the Hub is kept.

        Returns:
            The commit's address.

        Raises:
            ValueError: as `save_pretrained`. What the Hub raises is raised.
        """
        if adapter_only:
            self._refuse_changed_unet()
        else:
            self._refuse_lora_layers()
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as directory:
            folder = Path(directory)
            try:
                ModelCard.load(repo_id, token=token).save(folder / "README.md")
            except EntryNotFoundError:
                pass  # a new repository
            if adapter_only:
                self._save_adapter_repository(folder, repo_id)
            else:
                self.save_pretrained(folder, variant=variant, human_parser_license=human_parser_license)
            self._write_card(folder, repo_id, adapter_only, license, human_parser_license, eval_results)
            return upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                token=token,
                commit_message=commit_message or f"Upload {StableDiffusionVTONPipeline.__name__}",
                create_pr=create_pr,
                delete_patterns=[*replaced_weights(folder), ADAPTER_NAME],  # but for what is uploaded
            )

    def _refuse_lora_layers(self) -> None:
        for name in ("unet", "text_encoder"):
            component = getattr(self, name)
            if component is not None and any(_lora_modules(component)):
                raise ValueError(
                    f"`{name}` has LoRA layers, and with them would be saved what does not load: call unload_lora_weights first, "
                    "after fuse_lora to keep what they do"
                )

    def _save_adapter_repository(self, folder: Path, repo_id: str) -> None:
        """The adapter, its code, and a `vton.py` that tells who loads it as a whole pipeline how to load it."""
        self._write_adapter(folder, self._lossless_dtype(), self._published_settings())
        self._write_code(folder)
        base = self._published_base() or "BASE"
        message = (
            f"{repo_id} holds a try-on adapter, not a whole pipeline: load its base with DiffusionPipeline.from_pretrained("
            f"{base!r}, custom_pipeline={repo_id!r}, trust_remote_code=True), then pipe.load_vton_adapter({repo_id!r})"
        )
        (folder / "vton.py").write_text(f"raise ValueError({message!r})\n", encoding="utf-8")
        name = StableDiffusionVTONPipeline.__name__
        index = {"_class_name": ["vton", name], "_diffusers_version": __version__}
        (folder / self.config_name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def _write_code(folder: Path) -> None:
        """This file, and one line under each of the two names that `custom_pipeline` looks for; of a subclass nothing."""
        name = StableDiffusionVTONPipeline.__name__
        if __name__ == "__main__":
            raise ValueError(f"{name} has no file of its own that could be saved: import it from pipeline_vton.py")
        code = inspect.getsource(sys.modules[__name__])
        (folder / "pipeline_vton.py").write_text(code, encoding="utf-8")
        for file in ("pipeline.py", "vton.py"):
            (folder / file).write_text(f"from .pipeline_vton import {name}  # noqa: F401\n", encoding="utf-8")

    def _lossless_dtype(self) -> torch.dtype | None:
        """float16 where that changes no weight (trainers write so), else None: the UNet's own."""
        parameters = self._adapter_parameters(self._settings(loras=False)).values()
        return torch.float16 if all(torch.equal(p, p.half().to(p.dtype)) for p in parameters) else None

    def _published_settings(self) -> AdapterSettings:
        """The adapter's, without the name of a folder: that is nobody else's business."""
        settings = self._settings(loras=False)
        return replace(settings, base_model=hub_repository(settings.base_model))

    def _published_base(self) -> str | None:
        """The base's repository on the Hub, as the adapter or the loading says, unless it is a folder."""
        return self._published_settings().base_model or hub_repository(self.name_or_path)

    def _write_card(
        self,
        folder: Path,
        name: str,
        adapter_only: bool,
        license: str | None,
        human_parser_license: str | None,
        eval_results: list[EvalResult] | None,
    ) -> None:
        """README.md: a new one, or with the measurements added where somebody wrote one."""
        file = folder / "README.md"
        if file.exists() and CARD_NOTE not in file.read_text(encoding="utf-8"):
            card = ModelCard.load(file)
        else:
            parser_license = None if adapter_only else human_parser_license
            card = self._new_card(name, adapter_only, license, parser_license, eval_results or [])
        if eval_results:
            card.data.model_name, card.data.eval_results = name, eval_results
        populate_model_card(card).save(file)

    def _new_card(
        self,
        name: str,
        adapter_only: bool,
        license: str | None,
        human_parser_license: str | None,
        eval_results: list[EvalResult],
    ) -> ModelCard:
        base, settings = self._published_base(), self._published_settings()
        if license is None:
            license = BASE_LICENSES.get(base, "unknown")
            if settings.cross_attention == "identity":  # CatVTON's weights, whatever became of them
                license = "cc-by-nc-sa-4.0"
        data = ModelCardData(
            license=license,
            base_model=base,
            pipeline_tag="image-to-image",
            tags=["virtual-try-on", "stable-diffusion", "diffusers"],
        )
        variant = ', variant="fp16"' if base in FP16_BASES else ""
        whole, onto = f'"{name}", custom_pipeline="vton"', f'"{base or "BASE"}"{variant}, custom_pipeline="{name}"'
        code = CARD_CODE.format(
            load=onto if adapter_only else whole,
            adapter=f'pipe.load_vton_adapter("{name}")\n' if adapter_only else "",
            mask="None" if settings.mask_free or human_parser_license else 'load_image("mask.png")',
        )
        known = asdict(settings) | {"base_model": base}
        known = {name: value for name, value in known.items() if value is not None}
        measured = [(r.dataset_name, r.metric_name or r.metric_type, r.metric_value) for r in eval_results]
        text = CARD_TEXT.format(
            note=CARD_NOTE,
            name=name,
            kind="These are the adapter's weights; they need their base." if adapter_only else "",
            code=code,
            other_ways=""
            if adapter_only
            else f"`custom_pipeline` may be left out. The adapter alone goes onto a base that is already there with "
            f'`DiffusionPipeline.from_pretrained({onto}, trust_remote_code=True)` and `pipe.load_vton_adapter("{name}")`.\n',
            settings=markdown_table(["", ""], known.items()),
            measured=markdown_table(["data", "metric", "value"], measured) if measured else "Nothing yet.",
            license=license,
            human_parser=self._describe_human_parser(human_parser_license),
        )
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")

    def _describe_human_parser(self, license: str | None) -> str:
        """Whose the human parser is, and what one may do with it."""
        if self.human_parser is None:
            return ""
        source = hub_repository(self.human_parser.name_or_path)
        if license is not None:
            named = f", `{source}`," if source else ""
            return f"\nThe human parser in `human_parser/`{named} has a licence of its own: `{license}`.\n"
        if source is None:
            return ""
        return (
            f"\nMasks are drawn by `{source}`, which has a licence of its own and is not in here: "
            f'`pipe.load_human_parser("{source}")`.\n'
        )

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As diffusers', but of a class that is already imported no code has to be trusted: it sees the plain name."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][-1]
        return loaded

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple:
        """As diffusers', but reads pipelines that were saved when `base_in_channels` was called `in_channels`, too."""
        renamed = {"base_in_channels" if name == "in_channels" else name: value for name, value in config_dict.items()}
        return super().extract_init_dict(renamed, **kwargs)


# -------------------------------------------------------------------------------------------------------- the pipeline


def check_sampling(
    train_timesteps: int,
    *,
    guidance_scale: float,
    num_inference_steps: int = 1,
    timesteps: list[int] | None = None,
    guidance_rescale: float = 0.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    eta: float = 0.0,
    cross_attention_kwargs: dict[str, Any] | None = None,
) -> None:
    """ValueError where an argument of how to denoise is wrong; the sentence names it and its value.

    Args:
        train_timesteps: how many the scheduler was trained with.
        guidance_scale, ...: the call's.
    """
    if not is_whole(num_inference_steps) or num_inference_steps < 1:
        raise ValueError(f"`num_inference_steps` must be a positive whole number, got {shown(num_inference_steps)}")
    if not is_number(guidance_scale):
        raise ValueError(f"`guidance_scale` must be a finite number, got {shown(guidance_scale)}")
    for name, number in (("guidance_rescale", guidance_rescale), ("eta", eta)):
        if not is_number(number) or not 0 <= number <= 1:
            raise ValueError(f"`{name}` must be a number from 0 to 1, got {shown(number)}")
    ends = guidance_interval if isinstance(guidance_interval, (list, tuple)) else ()
    if len(ends) != 2 or not all(map(is_number, ends)) or not 0 <= ends[0] <= ends[1] <= 1:
        raise ValueError(
            f"`guidance_interval` must be (start, end) with 0 <= start <= end <= 1, got {shown(guidance_interval)}"
        )
    if timesteps is not None:
        valid = isinstance(timesteps, (list, tuple)) and len(timesteps) > 0
        valid = valid and all(is_whole(t) and 0 <= t < train_timesteps for t in timesteps)
        if not valid or any(later >= t for t, later in zip(timesteps, timesteps[1:])):
            raise ValueError(
                f"`timesteps` must be None or fall from at most {train_timesteps - 1} to 0, got {shown(timesteps)}"
            )
    if cross_attention_kwargs is not None and (
        not isinstance(cross_attention_kwargs, dict)
        or cross_attention_kwargs.keys() - {"scale"}
        or not all(map(is_number, cross_attention_kwargs.values()))
    ):
        raise ValueError(
            f"`cross_attention_kwargs` must be None or {{'scale': a LoRA's scale}}, got {shown(cross_attention_kwargs)}"
        )


def check_output(num_images_per_prompt: int, composite: bool, output_type: str) -> None:
    """ValueError or TypeError where a call could not return what it was asked for."""
    if not isinstance(output_type, str) or output_type not in {"pil", "np", "pt", "latent"}:
        raise ValueError(f"`output_type` must be pil, np, pt or latent, got {shown(output_type)}")
    if not isinstance(composite, (bool, np.bool_)):
        raise TypeError(f"`composite` must be True or False, got {shown(composite)}")
    if not is_whole(num_images_per_prompt) or num_images_per_prompt < 1:
        raise ValueError(
            f"`num_images_per_prompt` must be a positive whole number, got {shown(num_images_per_prompt)}"
        )


def check_callback(callback: Callable | None, names: list[str], known: list[str]) -> None:
    """TypeError or ValueError where `callback_on_step_end` is no callback, or asks for what is not known here."""
    if callback is not None and not callable(callback):
        raise TypeError(f"`callback_on_step_end` must be callable, got {type(callback).__name__}")
    callbacks = callback.callbacks if isinstance(callback, MultiPipelineCallbacks) else [callback]
    if any(isinstance(one, IPAdapterScaleCutoffCallback) for one in callbacks):
        raise ValueError("`callback_on_step_end` sets the scale of an IP-Adapter, which try-on has none of")
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"`callback_on_step_end_tensor_inputs` must be a list of names, got {shown(names)}")
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"`callback_on_step_end_tensor_inputs` may name {', '.join(known)}, got {', '.join(unknown)}")


def call_back(
    callback: Callable,
    pipe: DiffusionPipeline,
    step: int,
    t: torch.Tensor,
    tensors: dict[str, torch.Tensor | None],
    names: list[str],
) -> dict[str, torch.Tensor]:
    """Call `callback_on_step_end` and check what it returns: the tensors that replace those in `tensors`, by their names.

    diffusers' own callbacks look at prompt embeddings where there are none, and take their last row for the conditional ones:
    they get embeddings of no tokens, and that row replaces nothing.
    """
    official = isinstance(callback, (PipelineCallback, MultiPipelineCallbacks))
    nothing = tensors["latents"].new_zeros(len(tensors["latents"]), 0, pipe.unet.config.cross_attention_dim)
    given = {name: nothing if official and tensors[name] is None else tensors[name] for name in names}
    returned = callback(pipe, step, t, given)
    returned = {} if returned is None else returned
    if not isinstance(returned, dict):
        raise TypeError(
            f"`callback_on_step_end` must return a dictionary of the tensors that it changed, got {type(returned).__name__}"
        )
    changed = {}
    for name, value in returned.items():
        if name not in tensors:
            raise ValueError(f"`callback_on_step_end` may return {', '.join(tensors)}, got {name!r}")
        before = tensors[name]
        if value is before or before is None:
            continue
        tensor = isinstance(value, torch.Tensor)
        if official and tensor and torch.equal(value, before[-1:]):
            continue
        if not tensor or value.shape != before.shape:
            got = tuple(value.shape) if tensor else type(value).__name__
            raise ValueError(f"`callback_on_step_end` must return `{name}` of shape {tuple(before.shape)}, got {got}")
        changed[name] = value.to(before)
    return changed


# What a UNet's config may ask for beside latents, a timestep and text.
OTHER_INPUTS = {
    "encoder_hid_dim_type": "the pictures of an IP-Adapter, or other features",
    "addition_embed_type": "embeddings that are not SDXL's sizes and pooled text",
    "class_embed_type": "class labels",
    "num_class_embeds": "class labels",
    "time_cond_proj_dim": "an embedding of the guidance scale",
}


def is_sdxl(unet: UNet2DConditionModel) -> bool:
    """Whether a UNet is conditioned on sizes and pooled text, as SDXL's are (arXiv:2307.01952)."""
    return unet.config.get("addition_embed_type") == "text_time"


def added_conditions(unet: UNet2DConditionModel, rows: torch.Tensor, scale: int) -> dict[str, torch.Tensor] | None:
    """What SDXL's UNets are given beside latents, timesteps and text: no pooled text, a picture of the rows' size, uncropped.

    Args:
        unet: the UNet, whose config says how wide pooled text is.
        rows: (B, c, h, w), its input.
        scale: pixels a latent's side.

    Returns:
        `text_embeds` (B, pooled) and `time_ids` (B, 6): height and width before, top and left of the crop, height and width; None
        for other UNets.
    """
    if not is_sdxl(unet):
        return None
    height, width = (side * scale for side in rows.shape[-2:])
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    sizes = [rows.new_full((len(rows), 1), side) for side in (height, width, 0, 0, height, width)]  # waits for no copy
    return {"text_embeds": rows.new_zeros(len(rows), pooled), "time_ids": torch.cat(sizes, dim=1)}


def refuse_sdxl_text(unet: UNet2DConditionModel, cross_attention: str) -> None:
    """ValueError where SDXL is to read a prompt, for which it has two text encoders."""
    if cross_attention == "prompt" and is_sdxl(unet):
        raise ValueError(
            "`cross_attention` 'prompt' needs one text encoder, and SDXL's UNets read two: use 'skip', the default, got 'prompt'"
        )


def overflows(vae: AutoencoderKL, unet: UNet2DConditionModel) -> bool:
    """Whether it is SDXL's own VAE in float16, as `force_upcast` in its config says: true by default, and of sense beside
    SDXL's UNets alone.
    """
    return vae.dtype == torch.float16 and vae.config.force_upcast and is_sdxl(unet)


@contextmanager
def within_range(vae: AutoencoderKL, unet: UNet2DConditionModel) -> Iterator[None]:
    """The VAE in float32 for as long as the context lasts, where it overflows."""
    if not overflows(vae, unet):
        yield
        return
    before = vae.dtype
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(before)


def check_unet(unet: UNet2DConditionModel, reference: bool) -> None:
    """ValueError where a UNet asks for what try-on does not give, or carries what would mix the cloth's pass with the person's.

    Args:
        unet: the UNet.
        reference: whether the cloth is read in a pass of its own.
    """
    for name, what in OTHER_INPUTS.items():
        if (asked := unet.config.get(name)) is not None and not (name == "addition_embed_type" and is_sdxl(unet)):
            raise ValueError(f"the UNet asks for {what}, which try-on does not give: its `{name}` is {asked!r}")
    if not reference:
        return
    if (wrapper := getattr(unet.forward, "__module__", None) or "").partition(".")[0] == "DeepCache":
        raise ValueError(
            f"DeepCache ({wrapper}) counts the pass that reads the cloth as a step: disable its helper first"
        )
    for module in unet.modules():
        for name, hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).items():
            if hook._is_stateful:
                raise ValueError(
                    f"the UNet's {name} hook keeps results from call to call, and would keep those of the pass that reads the cloth: "
                    "disable it first"
                )


def check_scheduler(scheduler: KarrasDiffusionSchedulers) -> None:
    """ValueError where a scheduler cannot step Stable Diffusion's latents from noise, as those for flow matching cannot."""
    name, config = type(scheduler).__name__, scheduler.config
    if config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas"):
        raise ValueError(
            f"the `scheduler` {name} is set up for flow matching, which Stable Diffusion's UNets do not predict"
        )
    needed = ("init_noise_sigma", "scale_model_input", "timesteps", "step")
    lacking = [part for part in needed if not hasattr(scheduler, part)]
    parameters = [] if lacking else list(inspect.signature(scheduler.step).parameters.values())
    asked = [p.name for p in parameters[3:] if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if lacking or asked:
        trouble = f"it has no {lacking[0]}" if lacking else f"its steps ask for {asked[0]}"
        raise ValueError(f"the `scheduler` {name} is not for Stable Diffusion: {trouble}; DDPMScheduler is the card's")


def check_tensor(value: Any, name: str) -> None:
    """TypeError or ValueError unless an argument is a dense tensor of finite floating-point numbers."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.device.type == "meta" or not value.is_floating_point():
        raise TypeError(
            f"`{name}` must be a dense tensor of floating-point numbers, got {value.dtype}, {value.layout}, on {value.device}"
        )
    if not torch.isfinite(value).all():
        raise ValueError(f"`{name}` must have finite values, got NaN or infinity")


def check_finite(values: torch.Tensor, what: str, dtype: torch.dtype) -> None:
    """ValueError where a model's result holds NaN or infinity, with the usual remedy."""
    if not torch.isfinite(values).all():
        remedy = (
            "load it in torch.bfloat16 or torch.float32, whose range is wider"
            if dtype == torch.float16
            else "check its weights, and `latents` and `guidance_scale` if they were given"
        )
        raise ValueError(f"{what} in {dtype} gave NaN or infinity, which would be a black picture: {remedy}")


@dataclass
class TryOnInputs:
    """What `check_inputs` learnt of a call: the pictures, where in them to work, at which size, and with which text."""

    persons: list[torch.Tensor]  # N of (3, H, W), uint8 or in [0, 1]
    # 1 or N times `num_cloths` of (3, H, W), a person's together; None of prepared ones
    cloths: list[torch.Tensor | None]
    masks: list[torch.Tensor | None]  # N of (1, H, W), 0 or 1; None where there is none (yet)
    poses: list[torch.Tensor] | None  # N of (3, h, w), their persons' aspects
    profiles: list[bytes | None]  # N ICC profiles of the persons, which the results carry
    height: int
    width: int
    padding: int | None  # `padding_mask_crop`
    noise_shape: tuple[int, ...]  # (B, 4, h, w) of all results, or whole canvases
    prompts: dict[str, Any] | None  # `encode_prompt`'s arguments, for N; None where text is not used

    prepared_persons: list["PreparedPerson"] | None = None  # N, where the call was given them
    prepared_cloths: list["PreparedCloth"] | None = None  # as many as `cloths`
    num_cloths: int = 1  # of a person

    @functools.cached_property
    def regions(self) -> list[tuple[int, int, int, int]]:
        """Where in every photograph to work, as (left, top, right, bottom): all of it, or the mask's surroundings."""
        if self.prepared_persons:
            return [person.region for person in self.prepared_persons]
        if self.padding is None:
            return [(0, 0, person.shape[2], person.shape[1]) for person in self.persons]
        crop_region = VaeImageProcessor.get_crop_region  # at the aspect of height x width
        return [crop_region(as_pil(mask), self.width, self.height, self.padding) for mask in self.masks]


@dataclass(frozen=True, eq=False)
class PreparedPerson:
    """A person of `prepare_person`, for a call to take in the place of photograph and mask."""

    picture: torch.Tensor  # (3, H, W), uint8 or in [0, 1]
    mask: torch.Tensor | None  # (1, H, W), 0 or 1
    region: tuple[int, int, int, int]
    profile: bytes | None
    height: int
    width: int
    latents: dict[str, torch.Tensor]  # person (1, 4, h, w) and mask (1, 1, h, w)
    made_with: tuple  # the weights and settings that the latents depend on


@dataclass(frozen=True, eq=False)
class PreparedCloth:
    """A cloth of `prepare_cloth`, for a call to take in the place of its picture."""

    profile: bytes | None
    height: int
    width: int
    latents: dict[str, torch.Tensor]  # cloth and cloth_condition, (1, 4, h, w)
    # of every attn1, (1, N, heads, head_dim); None: read anew
    keys_values: list[tuple[torch.Tensor, torch.Tensor]] | None
    made_with: tuple


def _joined(prepared: list[PreparedPerson] | list[PreparedCloth]) -> dict[str, torch.Tensor]:
    """Their latents as batches."""
    return {name: torch.cat([one.latents[name] for one in prepared]) for name in prepared[0].latents}


def resident_parameters(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """A model's parameters; those that accelerate took out, for sequential offloading, from where it keeps them."""
    for module in model.modules():
        outer = getattr(module, "_hf_hook", None)
        maps = (getattr(hook, "weights_map", None) for hook in getattr(outer, "hooks", [outer]))
        kept = next((one for one in maps if one is not None), None)
        for name, parameter in module.named_parameters(recurse=False):
            yield kept[name] if parameter.device.type == "meta" else parameter


def weights_mark(model: torch.nn.Module) -> tuple:
    """What tells a model's weights, and the LoRAs on them, from others: a hash of every parameter's first row, dtype and scales.

    The numbers themselves: a sum would depend on its order, and thereby on threads and device. Asks a GPU once.
    """
    rows: dict[torch.device, list[torch.Tensor]] = {}
    for parameter in map(torch.Tensor.detach, resident_parameters(model)):
        row = (parameter[0] if parameter.dim() > 1 else parameter).dequantize()  # to float32, torchao's eight bits too
        rows.setdefault(parameter.device, []).append(row.flatten())
    digest = hashlib.sha256()
    for listed in rows.values():
        digest.update(torch.cat(listed).cpu().numpy().tobytes())
    loras = [
        (layer.active_adapters, dict(layer.scaling), layer.disable_adapters, layer.merged_adapters)
        for layer in _lora_modules(model)
        if hasattr(layer, "scaling")
    ]
    return model.dtype, digest.hexdigest(), repr(loras)


class VTONInputsMixin:
    """Checks what a call is given, and prepares people and cloths ahead of calls."""

    def resolve_size(
        self, person_height: int, person_width: int, height: int | None, width: int | None
    ) -> tuple[int, int]:
        """The height and width to work at, in pixels: as given; else the person's aspect, at about the adapter's area, or the UNet's.
        ValueError for a given side that is no positive multiple of `size_multiple`.
        """
        if self.config.height and self.config.width:
            area = self.config.height * self.config.width
        else:
            size = self.unet.config.sample_size or 64
            area = math.prod(size if isinstance(size, (list, tuple)) else (size, size)) * self.vae_scale_factor**2
        return fit_size(person_height, person_width, height, width, area=area, multiple=self.size_multiple)

    def check_settings(
        self, height: int | None = None, width: int | None = None, num_inference_steps: int | None = None
    ) -> None:
        """ValueError where this model cannot work so, whatever the pictures are: for who would know before reading many.

        Args:
            height, width, num_inference_steps: as in a call; None is not looked at. The pipeline's scheduler stays as it is.
        """
        self._check_components()
        self.resolve_size(1, 1, height, width)
        if num_inference_steps is not None:
            train_timesteps = self.scheduler.config.num_train_timesteps
            check_sampling(train_timesteps, guidance_scale=1.0, num_inference_steps=num_inference_steps)
            copy.deepcopy(self.scheduler).set_timesteps(int(num_inference_steps))  # a call may be running with it

    def check_inputs(
        self,
        person_image: PictureInput | PreparedPerson | list[PreparedPerson],
        cloth_image: PictureInput | PreparedCloth | list[PreparedCloth] | list[list],
        mask_image: PictureInput | None = None,
        cloth_type: str | list[str] = "upper",
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        *,
        pose_image: PictureInput | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        composite: bool = True,
        output_type: str = "pil",
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = [],
        text: bool = True,
        **sampling: Any,
    ) -> TryOnInputs:
        """Check everything that a call was asked for, before any model runs; returns what the rest of the call uses.

        Args:
            person_image, ..., sampling: the call's, those that it takes from the adapter resolved.
            text: False leaves out what is said of prompts.

        Raises:
            ValueError, TypeError: one is wrong; the sentence names it and its value.
        """
        self._check_components()
        if self.safety_checker is not None and self.feature_extractor is None:
            raise ValueError("`feature_extractor` must be given with a `safety_checker`, got None")
        as_cloth_types(cloth_type)
        cloth_image, num_cloths = as_outfits(cloth_image)
        if num_cloths > 1 and self.config.cloth_conditioning == "joint":
            raise ValueError(
                f"`cloth_image` must have one cloth for every person where `cloth_conditioning` is joint, got {num_cloths}"
            )
        prepared_persons = self._prepared(person_image, PreparedPerson, "person_image")
        prepared_cloths = self._prepared(cloth_image, PreparedCloth, "cloth_image")
        self._check_beside_person(mask_image, pose_image, padding_mask_crop, is_prepared=bool(prepared_persons))
        check_output(num_images_per_prompt, composite, output_type)
        check_sampling(self.scheduler.config.num_train_timesteps, guidance_scale=guidance_scale, **sampling)
        check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        persons, cloths, masks, poses, profiles, prepared_persons = self._check_pictures(
            person_image, cloth_image, mask_image, pose_image, prepared_persons, prepared_cloths, num_cloths
        )
        own_sizes = {tuple(person.shape[1:]) for person in persons}
        if composite and output_type in {"np", "pt"} and len(own_sizes) > 1:
            raise ValueError(
                f"`output_type`={output_type!r} needs results of one size, got (H, W) {sorted(own_sizes)}: use 'pil'"
            )
        height, width = self._check_size(own_sizes, height, width, prepared_persons, prepared_cloths)
        results = len(persons) * int(num_images_per_prompt)
        return TryOnInputs(
            persons=persons,
            cloths=cloths,
            masks=masks,
            poses=poses,
            profiles=profiles,
            height=height,
            width=width,
            padding=None if padding_mask_crop is None else int(padding_mask_crop),
            noise_shape=self._check_noise(results, height, width, latents, generator),
            prompts=self._check_prompts(
                len(persons), guidance_scale > 1, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds
            )
            if text
            else None,
            prepared_persons=prepared_persons,
            prepared_cloths=prepared_cloths,
            num_cloths=num_cloths,
        )

    def _check_beside_person(
        self,
        mask_image: PictureInput | None,
        pose_image: PictureInput | None,
        padding_mask_crop: int | None,
        is_prepared: bool,
    ) -> None:
        """ValueError where what goes with a person is missing, or is given where it has no use."""
        if padding_mask_crop is not None and (not is_whole(padding_mask_crop) or padding_mask_crop < 0):
            raise ValueError(
                f"`padding_mask_crop` must be None or a whole number of pixels from 0, got {shown(padding_mask_crop)}"
            )
        if is_prepared:
            brought = {"mask_image": mask_image, "pose_image": pose_image, "padding_mask_crop": padding_mask_crop}
            for name, value in brought.items():
                if value is not None:
                    raise ValueError(
                        f"`{name}` must be None with a prepared person, which brings its own, got {shown(value)}"
                    )
        elif mask_image is None and not self.config.mask_free and self.human_parser is None:
            raise ValueError(
                "`mask_image` must be given: None needs a `human_parser` or a mask-free adapter, and there is neither"
            )
        elif mask_image is None and self.config.mask_free and padding_mask_crop is not None:
            raise ValueError(f"`padding_mask_crop` needs a `mask_image`, got {shown(padding_mask_crop)} without one")
        if pose_image is not None and self.config.pose == "none":
            raise ValueError(
                "`pose_image` must be None with an adapter that has learnt without poses (its setting `pose` is none), got "
                f"{shown(pose_image)}"
            )

    def _check_pictures(
        self,
        person_image: PictureInput | list[PreparedPerson],
        cloth_image: PictureInput | list[PreparedCloth],
        mask_image: PictureInput | None,
        pose_image: PictureInput | None,
        prepared_persons: list[PreparedPerson] | None,
        prepared_cloths: list[PreparedCloth] | None,
        num_cloths: int,
    ) -> tuple[list, list, list, list | None, list, list | None]:
        """Persons (N), cloths (1 or N, times `num_cloths`) in their persons' colours, masks, poses and ICC profiles of the persons,
        prepared persons (N each).
        """
        if prepared_persons:
            persons, profiles = [p.picture for p in prepared_persons], [p.profile for p in prepared_persons]
            masks = [p.mask for p in prepared_persons]
        else:
            persons, profiles = as_pictures(person_image, "person_image"), colour_profiles(person_image)
            masks = [None] if mask_image is None else as_masks(mask_image, "mask_image")
        if prepared_cloths:
            cloths, cloth_profiles = [None for _ in prepared_cloths], [p.profile for p in prepared_cloths]
        else:
            cloths, cloth_profiles = as_pictures(cloth_image, "cloth_image"), colour_profiles(cloth_image)
        poses = [None] if pose_image is None else as_poses(pose_image, "pose_image")
        outfits = cloths[::num_cloths]
        given = {"person_image": persons, "cloth_image": outfits, "mask_image": masks, "pose_image": poses}
        count = max(map(len, given.values()))
        for name, pictures in given.items():
            if len(pictures) not in {1, count}:
                raise ValueError(f"`{name}` must number 1 or {count}, as the other pictures do, got {len(pictures)}")
        if len(persons) == 1:
            persons, profiles = persons * count, profiles * count
            prepared_persons = prepared_persons and prepared_persons * count
        if len(outfits) == 1 and len(set(profiles)) > 1:  # cloths of all, in the colours of each
            cloths, cloth_profiles = cloths * count, cloth_profiles * count
        wearers = [profile for profile in profiles for _ in range(num_cloths)]
        if prepared_cloths and any(before != after for before, after in zip(cloth_profiles, wearers)):
            raise ValueError(
                "`cloth_image` was prepared for other colours than the person's: call prepare_cloth with the person's `profile`"
            )
        cloths = [
            convert_profile(cloth, before, after) for cloth, before, after in zip(cloths, cloth_profiles, wearers)
        ]
        masks, poses = (pictures * count if len(pictures) == 1 else pictures for pictures in (masks, poses))
        for name, pictures, what, fits in (
            ("mask_image", masks, "size", operator.eq),
            ("pose_image", poses, "aspect", same_aspect),
        ):
            for person, one in zip(persons, pictures):
                if one is not None and not fits(size := tuple(person.shape[1:]), found := tuple(one.shape[1:])):
                    raise ValueError(f"`{name}` must have the {what} of `person_image` {size} (H, W), got {found}")
        return persons, cloths, masks, None if pose_image is None else poses, profiles, prepared_persons

    def _check_size(
        self,
        own_sizes: set[tuple[int, int]],
        height: int | None,
        width: int | None,
        prepared_persons: list[PreparedPerson] | None,
        prepared_cloths: list[PreparedCloth] | None,
    ) -> tuple[int, int]:
        """The one height and width to work at."""
        if prepared_persons:
            sizes = {(p.height, p.width) for p in prepared_persons}
        else:
            sizes = {self.resolve_size(*size, height, width) for size in own_sizes}
        if len(sizes) > 1:
            raise ValueError(
                f"`person_image` has pictures for {sorted(sizes)} (height, width): give `height` and `width`, or call once a size"
            )
        (size,) = sizes
        wanted = (height or size[0], width or size[1])
        for name, prepared in (("person_image", prepared_persons or []), ("cloth_image", prepared_cloths or [])):
            for one in prepared:
                if (one.height, one.width) != wanted:
                    raise ValueError(
                        f"`{name}` was prepared for {one.height}x{one.width} (height x width), this call works at "
                        f"{wanted[0]}x{wanted[1]}"
                    )
        return size

    def _check_noise(
        self,
        results: int,
        height: int,
        width: int,
        latents: torch.Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> tuple[int, ...]:
        """The shape of the latents, that of the canvas in joint mode."""
        shape = [
            results, self.vae.config.latent_channels,
            height // self.vae_scale_factor, width // self.vae_scale_factor,
        ]  # fmt: skip
        if self.config.cloth_conditioning == "joint":
            shape[CANVAS_DIMS[self.config.canvas_axis]] *= 2
        if latents is not None:
            check_tensor(latents, "latents")
        if latents is not None and list(latents.shape) != shape:
            raise ValueError(f"`latents` must have shape {tuple(shape)}, got {tuple(latents.shape)}")
        generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
        if not all(isinstance(one, torch.Generator) for one in generators):
            raise TypeError(f"`generator` must be a torch.Generator or a list of them, got {shown(generator)}")
        if isinstance(generator, list) and len(generator) != results:
            raise ValueError(f"`generator` must be one or {results}, one for every result, got {len(generator)}")
        return tuple(shape)

    def _require(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) is None:
                raise ValueError(f"this needs the component `{name}`, got None")

    def _check_components(self) -> None:
        self._require("vae", "unet", "scheduler")
        check_unet(self.unet, self.config.cloth_conditioning == "reference")
        refuse_sdxl_text(self.unet, self.config.cross_attention)
        check_scheduler(self.scheduler)
        if self.unet.config.in_channels not in {8, 9}:
            raise ValueError(
                f"the UNet has {self.unet.config.in_channels} input channels, try-on needs 8 or 9: load an adapter with load_vton_adapter first"
            )

    def _prepared(self, given: Any, kind: type, name: str) -> list | None:
        """What prepare_person or prepare_cloth made, as a list; None for pictures."""
        listed = list(given) if isinstance(given, (list, tuple)) else [given]
        # by names: whoever loads a `custom_pipeline` twice has two classes of each
        kinds = {type(one).__name__ for one in listed}
        if not kinds & {PreparedPerson.__name__, PreparedCloth.__name__}:
            return None
        if others := sorted(kinds - {kind.__name__}):
            raise TypeError(f"`{name}` must be pictures, or {kind.__name__}s alone, got {', '.join(others)} too")
        made_with = self._made_with(kind)
        if any(one.made_with != made_with for one in listed):
            prepare = "prepare_person" if kind is PreparedPerson else "prepare_cloth"
            raise ValueError(
                f"`{name}` was prepared with other weights, settings or on another device than the pipeline has now: call {prepare} again"
            )
        return listed

    def _made_with(self, kind: type) -> tuple:
        """The weights and settings that a prepared person or cloth depends on."""
        settings = (
            self.config.mask_free, self.config.condition_latents, self.vae.config.scaling_factor, self.unet.dtype,
            self._execution_device,
        )  # fmt: skip
        if kind is PreparedPerson:
            return (weights_mark(self.vae), *settings, self.config.pose)
        attention = (self.config.cloth_conditioning, self.config.cross_attention, self.unet.config.in_channels)
        freeu = [getattr(block, name, None) for block in self.unet.up_blocks for name in ("s1", "s2", "b1", "b2")]
        return (weights_mark(self.vae), weights_mark(self.unet), *settings, *attention, *freeu)

    @in_turn
    @torch.no_grad()
    def prepare_person(
        self,
        person_image: PictureInput,
        mask_image: PictureInput | None = None,
        cloth_type: str | list[str] = "upper",
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        pose_image: PictureInput | None = None,
    ) -> PreparedPerson | list[PreparedPerson]:
        """Encode persons once, for many calls: what comes back is given to a call as `person_image`.

        Args:
            person_image, mask_image, cloth_type, height, width, padding_mask_crop, pose_image: as in a call, with its
                defaults; the call then takes none of the last six (a height and a width must be these).

        Returns:
            One, or a list of them for a list or a batch. It holds for this VAE and these settings; a call says where not.

        Raises:
            ValueError, TypeError: an argument is wrong; the sentence names it and its value.
            RuntimeError: a callback of the same pipeline's call asks for it.
        """
        nothing = Image.new("RGB", (1, 1))
        inputs = self.check_inputs(
            person_image, nothing, mask_image, cloth_type, height, width, padding_mask_crop, pose_image=pose_image,
            text=False,
        )  # fmt: skip
        inputs = self.draw_masks(inputs, cloth_type)
        latents, made_with = self._encode_persons(inputs), self._made_with(PreparedPerson)
        prepared = [
            PreparedPerson(
                picture=person,
                mask=inputs.masks[i],
                region=inputs.regions[i],
                profile=inputs.profiles[i],
                height=inputs.height,
                width=inputs.width,
                latents={name: value[i : i + 1] for name, value in latents.items()},
                made_with=made_with,
            )
            for i, person in enumerate(inputs.persons)
        ]
        self.maybe_free_model_hooks()
        return prepared if _is_many(person_image) else prepared[0]

    @in_turn
    @torch.no_grad()
    def prepare_cloth(
        self,
        cloth_image: PictureInput,
        height: int,
        width: int,
        profile: bytes | None = None,
    ) -> PreparedCloth | list[PreparedCloth]:
        """Encode and read cloths once, for many calls: what comes back is given to a call as `cloth_image`.

        In reference mode the keys and values of every self-attention are kept, unless the adapter reads cloths with a prompt;
        a call with `cross_attention_kwargs` reads the cloth again.

        Args:
            cloth_image: one or N cloths, as a call takes them.
            height, width: the size that the calls work at, in pixels, multiples of 64 for SD1.5: a prepared person's, say. Both.
            profile: the ICC profile of the persons (`PreparedPerson.profile`); None, the default, is sRGB.

        Returns:
            One, or a list of them for a list or a batch. It holds for these weights and settings; a call says where not.

        Raises:
            ValueError, TypeError: an argument is wrong; the sentence names it.
            RuntimeError: a callback of the same pipeline's call asks for it.
        """
        self._check_components()
        if height is None or width is None:
            raise ValueError(f"`height` and `width` must both be given, got {shown(height)} and {shown(width)}")
        height, width = self.resolve_size(1, 1, height, width)
        cloths = [
            convert_profile(cloth, before, profile)
            for cloth, before in zip(as_pictures(cloth_image, "cloth_image"), colour_profiles(cloth_image))
        ]
        latents, keys_values = self._encode_cloths(cloths, height, width), None
        if self.config.cloth_conditioning == "reference" and self.config.cross_attention != "prompt":
            self._cross_attention_kwargs = None
            with vton_attention(self.unet, ClothCacheAttnProcessor, self.config.cross_attention) as processors:
                nobody = latents["cloth"][:0]
                rows = TryOnLatents(nobody, nobody[:, :1], **latents, channels=self.unet.config.in_channels)
                self.read_cloth(rows, None, processors)
            keys_values = [processor.cloth for processor in processors]
        made_with = self._made_with(PreparedCloth)
        prepared = [
            PreparedCloth(
                profile,
                height,
                width,
                {name: value[i : i + 1] for name, value in latents.items()},
                keys_values and [(key[i : i + 1], value[i : i + 1]) for key, value in keys_values],
                made_with,
            )
            for i in range(len(cloths))
        ]
        self.maybe_free_model_hooks()
        return prepared if _is_many(cloth_image) else prepared[0]

    def _check_prompts(
        self,
        count: int,
        guided: bool,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
    ) -> dict[str, Any] | None:
        """`encode_prompt`'s arguments for `count` persons, or None where text is not used."""
        text, features = self.config.cross_attention == "prompt", self.unet.config.cross_attention_dim
        for name, words, embeds in (
            ("prompt", prompt, prompt_embeds),
            ("negative_prompt", negative_prompt, negative_prompt_embeds),
        ):
            listed = words if isinstance(words, list) else [] if words is None else [words]
            if not all(isinstance(one, str) for one in listed):
                raise TypeError(f"`{name}` must be a string or a list of them, got {shown(words)}")
            if embeds is not None:
                check_tensor(embeds, f"{name}_embeds")
            if words is not None and embeds is not None:
                raise ValueError(
                    f"`{name}` and `{name}_embeds` say the same: give one, got {shown(words)} and a tensor"
                )
            if text and isinstance(words, list) and len(words) != count:
                raise ValueError(f"`{name}` must be one string or {count}, as the pictures are, got {len(words)}")
            if text and embeds is not None and (embeds.ndim != 3 or embeds.shape[::2] != (count, features)):
                raise ValueError(
                    f"`{name}_embeds` must have shape ({count}, tokens, {features}), got {tuple(embeds.shape)}"
                )
        if not text:
            return None
        encodes = self.text_encoder is not None and self.tokenizer is not None
        if prompt_embeds is None and not encodes:
            raise ValueError(
                "`prompt_embeds` must be given: this adapter uses text, and there is no `text_encoder` and `tokenizer`"
            )
        if guided and negative_prompt_embeds is None and not encodes:
            raise ValueError(
                "`negative_prompt_embeds` must be given with `prompt_embeds` where guidance_scale > 1, got None"
            )
        if guided and negative_prompt_embeds is not None:
            tokens = self.tokenizer.model_max_length if prompt_embeds is None else prompt_embeds.shape[1]
            if negative_prompt_embeds.shape[1] != tokens:
                raise ValueError(
                    f"`negative_prompt_embeds` must have {tokens} tokens, as the prompt has, got {negative_prompt_embeds.shape[1]}"
                )
        prompt, negative_prompt = (
            words if isinstance(words, list) else [words or ""] * count for words in (prompt, negative_prompt)
        )
        return {
            "prompt": prompt if prompt_embeds is None else None,
            "negative_prompt": negative_prompt if negative_prompt_embeds is None else None,
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
        }


class StableDiffusionVTONPipeline(
    VTONInputsMixin,
    VTONMaskMixin,
    VTONAdapterMixin,
    VTONHubMixin,
    DiffusionPipeline,
    StableDiffusionMixin,
    TextualInversionLoaderMixin,
    FromSingleFileMixin,
):
    r"""Virtual try-on: put the cloth of one photograph on the person of another.

    Args:
        vae: encodes and decodes pictures.
        unet: the UNet of an SD1.5, SD2 or SDXL, with 9 input channels (inpainting), 8 (instruct-pix2pix) or 4 (widened by the
            adapter).
        scheduler: any diffusers scheduler; `DDPMScheduler` is the one that the figures are measured with.
        text_encoder, tokenizer: used where `cross_attention` is `"prompt"`.
        safety_checker, feature_extractor: looks at the finished pictures, if there is one.
        human_parser, human_parser_processor: a Segformer human parser that draws the mask where none is given
            and the adapter is not mask-free.
        base_in_channels, cloth_conditioning, ...: the settings, as `AdapterSettings` describes them; None takes their defaults,
            and the UNet's input channels.

    An adapter's settings (`load_vton_adapter`) replace the settings here, until it is unloaded.
    """

    model_cpu_offload_seq = "human_parser->text_encoder->unet->vae"
    _optional_components = [
        "text_encoder", "tokenizer", "safety_checker", "feature_extractor", "human_parser", "human_parser_processor",
    ]  # fmt: skip
    _exclude_from_cpu_offload = ["safety_checker"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    encode_prompt = StableDiffusionPipeline.encode_prompt
    prepare_extra_step_kwargs = StableDiffusionPipeline.prepare_extra_step_kwargs
    run_safety_checker = StableDiffusionPipeline.run_safety_checker

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        text_encoder: CLIPTextModel | None = None,
        tokenizer: CLIPTokenizer | None = None,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        human_parser: SegformerForSemanticSegmentation | None = None,
        human_parser_processor: BaseImageProcessor | None = None,
        base_in_channels: int | None = None,
        cloth_conditioning: str | None = None,
        canvas_axis: str | None = None,
        cross_attention: str | None = None,
        condition_latents: str | None = None,
        mask_free: bool | None = None,
        pose: str | None = None,
        guidance_scale: float | None = None,
        scheduler_class: str | None = None,
        eta: float | None = None,
        prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        trainable: str | None = None,
        base_model: str | None = None,
        trained_steps: int | None = None,
    ) -> None:
        super().__init__()
        values = locals()
        self.register_modules(
            vae=vae,
            unet=unet,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            human_parser=human_parser,
            human_parser_processor=human_parser_processor,
        )
        self._begin_settings(**{setting.name: values[setting.name] for setting in fields(AdapterSettings)})
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 8
        unet_levels = len(unet.config.block_out_channels) if unet is not None else 4
        self.size_multiple = self.vae_scale_factor * 2 ** (unet_levels - 1)  # of heights and widths; 64 for SD1.5
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.mask_processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        )

    # ---- what a call is asked for

    @between_calls
    def fast(self, num_inference_steps: int = FAST_STEPS) -> dict[str, Any]:
        """Sample in few steps: put Euler's ancestral sampler in as the scheduler, which adds noise between steps as the default
        DDPM does, and return what calls are then to be given.

            result = pipe(person, cloth, mask, **pipe.fast())

        The guidance scale stays the adapter's; guidance ends after three quarters of the steps (`guidance_interval`,
        arXiv:2404.07724). With 8 steps the UNet computes 14 rows a picture, with the default's 50 it computes 100;
        `python -m benchmarks.fewer_steps` measures what that costs in likeness. The scheduler that was there before is
        `pipe.scheduler` until this is called.

        Args:
            num_inference_steps: denoising steps, 8 by default.

        Returns:
            `num_inference_steps` and `guidance_interval` for calls.

        Raises:
            ValueError: the number is no positive whole one, or the scheduler is none of Stable Diffusion's.
        """
        self._require("scheduler")
        check_scheduler(self.scheduler)
        check_sampling(
            self.scheduler.config.num_train_timesteps, guidance_scale=1.0, num_inference_steps=num_inference_steps
        )
        self.scheduler = scheduler_like(self.scheduler, "EulerAncestralDiscreteScheduler")
        return {"num_inference_steps": int(num_inference_steps), "guidance_interval": (0.0, FAST_GUIDED)}

    # ---- the way through the model

    def draw_masks(self, inputs: TryOnInputs, cloth_type: str | list[str]) -> TryOnInputs:
        """The inputs with the human parser's masks, where there are none, the adapter needs them and there is a parser;
        ValueError where that sees nothing of the kind.
        """
        given = inputs.masks[0] is not None or inputs.prepared_persons
        if given or self.config.mask_free or self.human_parser is None:
            return inputs
        persons = {id(person): person for person in inputs.persons}  # one with many cloths is read once
        masks = self.predict_mask(list(persons.values()), cloth_type)
        drawn = {one: torch.from_numpy(np.asarray(mask)[None] > 0).float() for one, mask in zip(persons, masks)}
        return replace(inputs, masks=[drawn[id(person)] for person in inputs.persons])

    def encode_pictures(self, inputs: TryOnInputs) -> TryOnLatents:
        """Stretch persons and masks to height x width, fit the cloths on white, and encode all that is not encoded yet; ValueError
        where what the VAE says is not finite.
        """
        persons, cloths = inputs.prepared_persons, inputs.prepared_cloths
        cloth = _joined(cloths) if cloths else self._encode_cloths(inputs.cloths, inputs.height, inputs.width)
        return TryOnLatents(
            **(_joined(persons) if persons else self._encode_persons(inputs)),
            **cloth,
            channels=self.unet.config.in_channels,
            canvas_dim=CANVAS_DIMS[self.config.canvas_axis],
            num_cloths=inputs.num_cloths,
        )

    def _encode_persons(self, inputs: TryOnInputs) -> dict[str, torch.Tensor]:
        size, device = {"height": inputs.height, "width": inputs.width}, self._execution_device
        persons = [as_pil(_cut(person, region)) for person, region in zip(inputs.persons, inputs.regions)]
        if inputs.masks[0] is None or self.config.mask_free:  # which has learnt with nothing but ones
            mask = torch.ones(len(persons), 1, inputs.height, inputs.width, device=device)
        else:
            masks = [as_pil(_cut(mask, region)) for mask, region in zip(inputs.masks, inputs.regions)]
            mask = self.mask_processor.preprocess(masks, **size)
        pose = None
        if inputs.poses is not None:
            poses = inputs.poses
            if inputs.padding is not None:  # as large as their persons before they are cut, as far as that is seen
                poses = [
                    _cut_enlarged(pose, *person.shape[1:], region)
                    for pose, person, region in zip(poses, inputs.persons, inputs.regions)
                ]
            poses = [as_pil(pose) for pose in poses]
            pose = self.image_processor.preprocess(poses, **size).to(device)
        with within_range(self.vae, self.unet):
            encoded = TryOnLatents.encode_person(
                self.vae,
                self.image_processor.preprocess(persons, **size).to(device),
                mask.to(device),
                pose,
                mask_free=self.config.mask_free,
                condition_latents=self.config.condition_latents,
                dtype=self.unet.dtype,
            )
        check_finite(encoded["person"], "the VAE's encoder", self.vae.dtype)
        return encoded

    def _encode_cloths(self, cloths: list[torch.Tensor], height: int, width: int) -> dict[str, torch.Tensor]:
        fitted = [fit_cloth(as_pil(cloth), height, width) for cloth in cloths]
        pixels = self.image_processor.preprocess(fitted, height=height, width=width)
        with within_range(self.vae, self.unet):
            encoded = TryOnLatents.encode_cloth(
                self.vae,
                pixels.to(self._execution_device),
                condition_latents=self.config.condition_latents,
                dtype=self.unet.dtype,
            )
        check_finite(encoded["cloth"], "the VAE's encoder", self.vae.dtype)
        return encoded

    def prepare_latents(
        self,
        shape: tuple[int, ...],
        latents: torch.Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """The first noise, (B, 4, h, w) or a whole canvas, in the UNet's dtype, at the scheduler's initial scale (after `set_timesteps`)."""
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype)
        return latents.to(self._execution_device, self.unet.dtype) * self.scheduler.init_noise_sigma

    def read_cloth(
        self,
        conditioning: TryOnLatents,
        prompt_embeds: torch.Tensor | None,
        processors: list[ClothCacheAttnProcessor],
        prepared: list[PreparedCloth] | None = None,
    ) -> None:
        """One pass of the cloths at timestep 0, whose keys and values the processors keep, unless `prepared` brings them.

        They lie ready for the conditioning's persons then; a conditioning of none only reads.
        """
        num_cloths = conditioning.num_cloths
        if prepared and prepared[0].keys_values and not self.cross_attention_kwargs:
            for processor, of_layer in zip(processors, zip(*(cloth.keys_values for cloth in prepared))):
                processor.keep(*(torch.cat(parts) for parts in zip(*of_layer)))
        else:
            rows = conditioning.cloth_rows()
            if prompt_embeds is not None:  # a person's
                prompt_embeds = prompt_embeds.repeat_interleave(num_cloths, dim=0)
            timesteps = torch.zeros(len(rows), device=rows.device, dtype=torch.long)
            self._run_unet(rows, timesteps, prompt_embeds)
        if not len(conditioning.person):
            return
        for processor in processors:  # a cloth has as many tokens as its person
            processor.make_room(len(conditioning.person), processor.cloth[0].shape[1] // num_cloths)

    def _run_unet(self, rows: torch.Tensor, t: torch.Tensor, prompt_embeds: torch.Tensor | None) -> torch.Tensor:
        """(B, 8 or 9, h, w) to (B, 4, h, w)."""
        return self.unet(
            rows,
            t,
            prompt_embeds,
            cross_attention_kwargs=self.cross_attention_kwargs,
            added_cond_kwargs=added_conditions(self.unet, rows, self.vae_scale_factor),
            return_dict=False,
        )[0]

    def predict_noise(
        self,
        noisy: torch.Tensor,
        t: torch.Tensor,
        conditioning: TryOnLatents,
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        guided: bool,
    ) -> torch.Tensor:
        """The noise in latents that the scheduler has scaled; where `guided`, pushed away from what the UNet says without the cloth.

        Source: classifier-free guidance, arXiv:2207.12598, with the cloth as the condition.

        Args:
            noisy: (B, 4, h, w), or whole canvases.
            t: the timestep, a tensor of one number.
            prompt_embeds, negative_prompt_embeds: (B, tokens, C), or None.

        Returns:
            As `noisy`.
        """
        if self.config.cloth_conditioning == "reference":
            rows = conditioning.person_rows(noisy)
            rows = torch.cat([rows, rows]) if guided else rows
        else:
            rows = conditioning.canvas_rows(noisy, cloth_seen=True)
            rows = torch.cat([conditioning.canvas_rows(noisy, cloth_seen=False), rows]) if guided else rows
        if guided and prompt_embeds is not None:
            if negative_prompt_embeds is None:
                raise ValueError(
                    f"`guidance_scale` rose to {self.guidance_scale} in a run that began at 1 or less, without `negative_prompt_embeds`: "
                    "begin above 1, with a `guidance_interval`"
                )
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
        noise_pred = self._run_unet(rows, t, prompt_embeds)
        if not guided:
            return noise_pred
        uncond, cond = noise_pred.chunk(2)
        noise_pred = uncond + self.guidance_scale * (cond - uncond)
        return rescale_noise_cfg(noise_pred, cond, self.guidance_rescale) if self.guidance_rescale > 0 else noise_pred

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, 4, h, w) to pictures (B, 3, H, W) in [0, 1], float32 on the CPU; ValueError where they are not finite."""
        with within_range(self.vae, self.unet):
            unscaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
            decoded = self.vae.decode(unscaled, return_dict=False)[0]
        check_finite(decoded, "the VAE's decoder", self.vae.dtype)
        return self.image_processor.postprocess(decoded, output_type="pt").float().cpu()

    def check_safety(self, images: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[bool] | None]:
        """Pictures (3, H, W) as they may be shown, flagged ones black, and the flags; as they are, and None, without a checker."""
        if self.safety_checker is None:
            return images, None
        checked, flags = [], []
        for image in images:
            array = as_floats(image).movedim(0, -1)[None].numpy()
            array, flagged = self.run_safety_checker(array, self._execution_device, self.safety_checker.dtype)
            checked.append(torch.from_numpy(array[0]).movedim(-1, 0))
            flags += flagged
        return checked, flags

    # ---- what a running call shows

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def guidance_rescale(self) -> float:
        return self._guidance_rescale

    @property
    def cross_attention_kwargs(self) -> dict[str, Any] | None:
        return self._cross_attention_kwargs

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @in_turn
    @torch.no_grad()
    def __call__(
        self,
        person_image: PictureInput | PreparedPerson | list[PreparedPerson],
        cloth_image: PictureInput | PreparedCloth | list[PreparedCloth] | list[list],
        mask_image: PictureInput | None = None,
        pose_image: PictureInput | None = None,
        cloth_type: str | list[str] = "upper",
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        num_images_per_prompt: int = 1,
        eta: float | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        padding_mask_crop: int | None = None,
        composite: bool = True,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> StableDiffusionPipelineOutput | tuple:
        r"""Put the cloth on the person.

        Args:
            person_image: one or N photographs: PIL images of any mode and size, arrays (H, W, 3), tensors (3, H, W), batches
                or lists of them (uint8 is 0-255, floats are 0-1), or what `prepare_person` made of them, mask included.
            cloth_image: one cloth, or N, in any size, fitted whole on white, or what `prepare_cloth` made of them. For several
                cloths at once a list of lists, equally many for every person: `[[top, skirt]]`; reference mode only.
            mask_image: one mask or N, of their person's size: white (at least one half) where the picture may change. None
                draws it with the human parser; a mask-free adapter needs none, and gets none drawn.
            pose_image: one or N, each of its person's aspect and aligned with them: a skeleton, DensePose or a parse map, painted
                into the hole that the mask leaves. For adapters that were trained so (setting `pose`); None leaves it grey.
            cloth_type: `"upper"` (the default), `"lower"`, `"dress"` or a list of them, for the human parser.
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds: as in `StableDiffusionPipeline`, one text or N,
                embeddings (N, tokens, C), None by default; used by adapters with `cross_attention="prompt"`, which may bring a
                prompt for calls that give none.
            height, width: the size to work at, in pixels, multiples of 64 for SD1.5. None, the default, keeps the person's aspect
                at about the native area; one alone takes the other from the aspect.
            num_inference_steps: denoising steps, 50 by default; schedulers of second order, such as Heun, evaluate the UNet nearly
                twice a step.
            timesteps: the very timesteps, falling whole numbers from 999 to 0 for SD1.5, in the place of `num_inference_steps`, for
                schedulers that take them; None by default.
            guidance_scale: how far to push from "no cloth" to "this cloth", any finite number. None, the default, takes the
                adapter's own; at 1 or less the unconditional branch is not run.
            guidance_rescale: 0 (the default) to 1, arXiv:2305.08891.
            guidance_interval: [start, end) in fractions of the steps, 0 <= start <= end <= 1, (0, 1) by default; outside it the
                conditional branch runs alone (arXiv:2404.07724).
            num_images_per_prompt: results for every person, which stand together; 1 by default.
            eta: noise that DDIM adds again at every step, 0 to 1 (arXiv:2010.02502); None, the default, takes the adapter's own,
                or 0.
            cross_attention_kwargs: `{"scale": ...}` of a LoRA; None by default.
            generator: one, or a list with one for every result; None, the default, is torch's own.
            latents: the first noise, floats (N * num_images_per_prompt, 4, h, w), before the scheduler's scale; the whole canvas in
                joint mode. None, the default, draws it.
            padding_mask_crop: work on the mask's surroundings alone, with so many of the photograph's pixels around it, from 0;
                None, the default, works on all of it.
            composite: True, the default, lays the result into the photograph, at its own size and untouched outside the mask; False
                returns the bare decode at height x width.
            output_type: `"pil"` (the default), `"np"` (B, H, W, 3), `"pt"` (B, 3, H, W), both float32 in [0, 1] on the CPU, or
                `"latent"` (B, 4, h, w), scaled by the VAE's factor, on the device; B is N * num_images_per_prompt.
            return_dict: True by default; False returns `(images, nsfw_content_detected)`.
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)` after every step; the dictionary that it
                returns, if any, replaces the tensors, whose shapes must stay. It may set `pipe._interrupt = True`, and not change
                the model.
            callback_on_step_end_tensor_inputs: which of `latents` (canvases in joint mode; the default), `prompt_embeds`,
                `negative_prompt_embeds` it gets.

        Returns:
            `StableDiffusionPipelineOutput`: `images`, and `nsfw_content_detected` of the safety checker (None without one, and for
            `"latent"`).

        Raises:
            ValueError, TypeError: an argument is wrong, and the sentence names it and its value; or a model's result is not finite.
            RuntimeError: a callback calls its own pipeline, or one with its scheduler.
        """
        # 1. Check, and learn what there is to do; what was not said is as the adapter says
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        prompt = self.config.prompt if prompt is None and prompt_embeds is None else prompt
        guidance_scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        eta = (self.config.eta or 0.0) if eta is None else eta
        if not isinstance(return_dict, (bool, np.bool_)):
            raise TypeError(f"`return_dict` must be True or False, got {shown(return_dict)}")
        inputs = self.check_inputs(
            person_image, cloth_image, mask_image, cloth_type, height, width, padding_mask_crop, pose_image=pose_image,
            num_images_per_prompt=num_images_per_prompt, generator=generator, latents=latents, composite=composite,
            output_type=output_type, prompt=prompt, negative_prompt=negative_prompt, prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds, num_inference_steps=num_inference_steps, timesteps=timesteps,
            guidance_scale=guidance_scale, guidance_rescale=guidance_rescale, guidance_interval=guidance_interval, eta=eta,
            cross_attention_kwargs=cross_attention_kwargs, callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        num_images_per_prompt = int(num_images_per_prompt)
        timesteps = None if timesteps is None else [int(t) for t in timesteps]
        # on the host: a scheduler that looks at them needn't wait for a GPU
        timesteps, _ = retrieve_timesteps(self.scheduler, int(num_inference_steps), "cpu", timesteps)
        step_kwargs = self.prepare_extra_step_kwargs(generator, float(eta))
        self._guidance_scale = float(guidance_scale)
        self._guidance_rescale = float(guidance_rescale)
        self._cross_attention_kwargs = cross_attention_kwargs
        self._num_timesteps = len(timesteps)
        self._interrupt = False
        reference, dtype = self.config.cloth_conditioning == "reference", self.unet.dtype

        # 2. Human parser: the masks, where none is given
        inputs = self.draw_masks(inputs, cloth_type)

        # 3. Text encoder: the prompt, for adapters that use one
        prompt_embeds = negative_prompt_embeds = cloth_embeds = None
        if inputs.prompts is not None:
            embeds = self.encode_prompt(
                device=self._execution_device,
                num_images_per_prompt=num_images_per_prompt,
                do_classifier_free_guidance=self.do_classifier_free_guidance,
                lora_scale=(cross_attention_kwargs or {}).get("scale"),
                **inputs.prompts,
            )  # in the dtype that the text encoder was saved in
            prompt_embeds, negative_prompt_embeds = (None if one is None else one.to(dtype) for one in embeds)
            cloth_embeds = prompt_embeds[::num_images_per_prompt]

        # 4. VAE: person, mask and cloth to latents; and the first noise
        conditioning = self.encode_pictures(inputs)
        if prompt_embeds is not None or not reference:  # text changes how a cloth is read
            conditioning = conditioning.one_cloth_each()
        conditioning = conditioning.repeat(num_images_per_prompt, cloth=not reference)
        latents = self.prepare_latents(inputs.noise_shape, latents, generator)

        # 5. UNet: read the cloth once, then denoise
        processor = functools.partial(ClothCacheAttnProcessor, inputs.num_cloths) if reference else None
        with (
            vton_attention(self.unet, processor, self.config.cross_attention) as processors,
            self.progress_bar(total=len(timesteps)) as progress_bar,
        ):
            if reference:
                self.read_cloth(conditioning, cloth_embeds, processors, inputs.prepared_cloths)
            for i, (t, timestep) in enumerate(zip(timesteps, timesteps.float().to(self._execution_device))):
                if self.interrupt:
                    continue
                in_interval = guidance_interval[0] <= i / len(timesteps) < guidance_interval[1]
                guided = self.do_classifier_free_guidance and in_interval
                noisy = self.scheduler.scale_model_input(latents, t)
                noise_pred = self.predict_noise(
                    noisy, timestep, conditioning, prompt_embeds, negative_prompt_embeds, guided
                )
                latents = self.scheduler.step(noise_pred, t, latents, **step_kwargs, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = {
                        "latents": latents,
                        "prompt_embeds": prompt_embeds,
                        "negative_prompt_embeds": negative_prompt_embeds,
                    }
                    tensors |= call_back(callback_on_step_end, self, i, t, tensors, callback_on_step_end_tensor_inputs)
                    latents, prompt_embeds, negative_prompt_embeds = tensors.values()
                progress_bar.update()
        del processors  # the cloths' keys and values: the VAE may need the room
        latents = latents if reference else conditioning.person_part(latents)
        check_finite(latents, "the UNet", self.unet.dtype)

        # 6. VAE: decode, and lay the result into the photograph
        if output_type == "latent":
            images, flags = latents, None
        else:
            images = list(self.decode_latents(latents))
            index = [i // num_images_per_prompt for i in range(len(images))]
            if composite:  # in the photograph's eight bits, where the result has no more
                persons = inputs.persons if output_type == "pil" else [as_floats(one) for one in inputs.persons]
                images = [
                    composite_result(image, persons[i], inputs.masks[i], inputs.regions[i])
                    for image, i in zip(images, index)
                ]
            images, flags = self.check_safety(images)
            if output_type == "pil":
                images = [as_pil(image, inputs.profiles[i]) for image, i in zip(images, index)]
            else:  # (N, 3, H, W) or (N, H, W, 3)
                images = torch.stack(images) if output_type == "pt" else torch.stack(images).movedim(1, -1).numpy()
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, flags
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=flags)


def from_safetensors(load: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What a `from_pretrained` makes of safetensors alone: those of full precision or, in repositories that have pickles in their
    place, as `stable-diffusion-v1-5/stable-diffusion-inpainting` does, those of the fp16 variant.
    """
    try:
        return load(*args, **options, use_safetensors=True)
    except OSError as error:
        if "variant" in options:
            raise
        try:
            return load(*args, **options, use_safetensors=True, variant="fp16")
        except (OSError, ValueError):  # of a variant that there is not
            raise error from None


@contextmanager
def naming(argument: str, value: Any) -> Iterator[None]:
    """Say of what fails to load which argument named it."""
    try:
        require_place(value)
        yield
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"`{argument}` {value}: {' '.join(str(error).split())}") from error


def load_pipeline(
    model: str | os.PathLike,
    adapter: str | os.PathLike | None = None,
    human_parser: str | os.PathLike | None = None,
    scheduler: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    adapter_subfolder: str | None = None,
    **options: Any,
) -> StableDiffusionVTONPipeline:
    """A pipeline that is ready for calls, from the names of its parts.

    Args:
        model: the base, or a whole pipeline: a Hub repository or a folder. Its weights must be safetensors, of full precision or
            of the fp16 variant.
        adapter: of `load_vton_adapter`, or a LoRA's folder or file; None where the model is whole, or a folder with the adapter
            beside the base's parts.
        human_parser: of `load_human_parser`; None is the model's own, if it has one.
        scheduler: a scheduler class of diffusers; None is the adapter's, or the model's.
        dtype: of all weights; None is float16 on a GPU, else float32.
        device: None is a GPU where there is one.
        adapter_subfolder: of `adapter`, such as CatVTON's "mix-48k-1024/attention".
        options: of `from_pretrained`, such as `revision`.

    Raises:
        ValueError: `scheduler` is none of diffusers'; whatever the loading raises.
        OSError: there is no such model, or its weights are pickles.
    """
    if scheduler is not None and not is_scheduler(scheduler):
        raise ValueError(f"`scheduler` must be the name of a scheduler class of diffusers, got {shown(scheduler)}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    with naming("model", model):
        pipe = from_safetensors(StableDiffusionVTONPipeline.from_pretrained, model, dtype=dtype, **options).to(device)
        whole = pipe.load_config(model, **options).get("_class_name") == StableDiffusionVTONPipeline.__name__
    if adapter is None and not whole and Path(model, ADAPTER_NAME).is_file():
        adapter = model
    if adapter is not None:
        lora = is_lora(Path(adapter, adapter_subfolder or ""))
        with naming("adapter", adapter):
            (pipe.load_lora_weights if lora else pipe.load_vton_adapter)(adapter, subfolder=adapter_subfolder)
    elif not whole:
        warnings.warn(f"{model} is a base that has learnt no try-on, and no adapter was given", stacklevel=2)
    if human_parser is not None:
        with naming("human_parser", human_parser):
            pipe.load_human_parser(human_parser, dtype=dtype)
    if scheduler is not None:
        pipe.scheduler = scheduler_like(pipe.scheduler, scheduler)
    return pipe
