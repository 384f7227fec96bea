"""Stable Diffusion 1.5's sizes, as the config.json files of stable-diffusion-v1-5/stable-diffusion-v1-5 give them, and those of
Segformer's b2, of which published human parsers are made, as mattmdjaga/segformer_b2_clothes gives them.
"""

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

from pipeline_vton import StableDiffusionVTONPipeline


UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
VAE = {
    "sample_size": 512,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
PARSER = {"depths": [3, 4, 6, 3], "hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 768}
PARSER_SIDE = 512
PARSER_LABELS = (
    "Background", "Hat", "Hair", "Sunglasses", "Upper-clothes", "Skirt", "Pants", "Dress", "Belt", "Left-shoe", "Right-shoe",
    "Face", "Left-leg", "Right-leg", "Left-arm", "Right-arm", "Bag", "Scarf",
)  # fmt: skip

# The same kinds of layers with a few thousand weights: what tests run a benchmark on.
TINY_UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2,
    "cross_attention_dim": 32,
    "norm_num_groups": 4,
}
TINY_VAE = {
    "sample_size": 32,
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 4,
}
TINY_PARSER = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 10, 16], "decoder_hidden_size": 16}


def random_parser(
    device: str | torch.device, dtype: torch.dtype, tiny: bool = False
) -> tuple[SegformerForSemanticSegmentation, SegformerImageProcessor]:
    """A human parser with random weights that sees an upper cloth everywhere, and its processor."""
    config = SegformerConfig(**(TINY_PARSER if tiny else PARSER), id2label=dict(enumerate(PARSER_LABELS)))
    parser = SegformerForSemanticSegmentation(config).to(device, dtype).eval().requires_grad_(False)
    parser.decode_head.classifier.bias[PARSER_LABELS.index("Upper-clothes")] = 1e4
    return parser, SegformerImageProcessor(size={"height": PARSER_SIDE, "width": PARSER_SIDE})


def random_pipe(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    tiny: bool = False,
    seed: int = 0,
    unet: dict = UNET,
) -> StableDiffusionVTONPipeline:
    """SD1.5-inpainting with random weights, the same on every device, without text; on the meta device, with none.

    `unet` is another backbone's config; `tiny` takes small ones.
    """
    torch.manual_seed(seed)
    unet, vae = (TINY_UNET, TINY_VAE) if tiny else (unet, VAE)
    with torch.device("meta" if torch.device(device).type == "meta" else "cpu"):
        models = UNet2DConditionModel(**unet | {"in_channels": 9}), AutoencoderKL(**vae)
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    unet, vae = (model.to(device, dtype).eval().requires_grad_(False) for model in models)
    pipe = StableDiffusionVTONPipeline(vae, unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe
