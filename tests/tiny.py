"""Tiny real modules: the classes of Stable Diffusion 1.5 with a few thousand random weights."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import ExifTags, Image, ImageOps
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
)

from benchmarks.sd15 import TINY_UNET
from pipeline_vton import StableDiffusionVTONPipeline


ROOT = Path(__file__).resolve().parents[1]


def tiny_unet(in_channels: int = 9) -> UNet2DConditionModel:
    return UNet2DConditionModel(**TINY_UNET | {"in_channels": in_channels})


def tiny_pipe(in_channels: int = 9, seed: int = 0, text: bool = False, **settings) -> StableDiffusionVTONPipeline:
    """A pipeline whose latents have 1/4 of a picture's sides, and whose sizes are multiples of 8."""
    torch.manual_seed(seed)
    unet = tiny_unet(in_channels)
    with torch.no_grad():  # an untrained UNet hardly looks at anything: let attention speak up
        for name, parameter in unet.named_parameters():
            if ".attn" in name:
                parameter.mul_(3)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
        scaling_factor=0.5,
    )
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    components = dict(zip(("text_encoder", "tokenizer"), tiny_text())) if text else {}
    pipe = StableDiffusionVTONPipeline(vae.eval(), unet.eval(), scheduler, **components, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def lie_like_sd15_inpainting(folder: Path) -> None:
    """Turn a base's folder into what the Hub has of SD1.5-inpainting: of full precision pickles alone, safetensors in fp16."""
    for file in folder.glob("*/*model.safetensors"):
        weights = load_file(file)
        halves = {name: weight.half() if weight.is_floating_point() else weight for name, weight in weights.items()}
        save_file(halves, file.with_suffix(".fp16.safetensors"), {"format": "pt"})
        torch.save(weights, file.with_name("pytorch_model.bin" if file.stem == "model" else f"{file.stem}.bin"))
        file.unlink()


def tiny_text() -> tuple[CLIPTextModel, CLIPTokenizer]:
    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval(), tokenizer


def tiny_parser(
    labels: list[str], only: str | None = None, size: tuple[int, int] = (64, 64)
) -> tuple[SegformerForSemanticSegmentation, SegformerImageProcessor]:
    """A random Segformer, or one that sees a single label everywhere, and a processor that hands it pictures of a size."""
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 8],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 1],
        mlp_ratios=[1, 1],
        decoder_hidden_size=16,
        id2label=dict(enumerate(labels)),
    )
    torch.manual_seed(2)
    parser = SegformerForSemanticSegmentation(config).eval()
    classifier = parser.decode_head.classifier
    with torch.no_grad():
        classifier.weight.mul_(0 if only else 200)
        classifier.bias.zero_()
        if only:
            classifier.bias[labels.index(only)] = 1
    return parser, SegformerImageProcessor(size={"height": size[0], "width": size[1]})


def picture(seed: int, height: int = 32, width: int = 24) -> Image.Image:
    """A smooth random photograph."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def with_odd_exif(picture: Image.Image) -> bytes:
    """A JPEG that is to be turned by a quarter, as some cameras write them: its EXIF can be read, but PIL cannot write it again."""
    exif, content = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Make] = 6, "me"
    written = exif.tobytes()
    # the maker's name is now the width
    odd = written.replace(b"\x01\x0f", b"\x01\x00").replace(b"\x0f\x01", b"\x00\x01")
    assert odd != written
    picture.save(content, "JPEG", exif=odd, quality=95)
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(content))
    return content.getvalue()


def box_mask(height: int = 32, width: int = 24) -> Image.Image:
    """White in the middle."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 4, height // 4, 3 * width // 4, 3 * height // 4))
    return mask


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(pipe, person=None, cloth=None, mask=None, seed: int = 0, **options):
    """A short call with fixed pictures and noise, as a float array batch unless told otherwise."""
    options = {"num_inference_steps": 3, "output_type": "np", "generator": seeded(seed)} | options
    person = picture(1) if person is None else person
    cloth = picture(2) if cloth is None else cloth
    return pipe(person, cloth, box_mask() if mask is None else mask, **options).images
