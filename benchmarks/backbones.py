"""What an adapter holds of each backbone: its weights, how many they are, and its size in fp16.

The UNets are built from their published configs on the meta device: nothing is downloaded and no memory is used. "adapter" is
`--trainable self_attention`, with the widened `conv_in` of a base of 4 channels; LoRA is `--lora_rank` of the same modules.
"""

import argparse

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

from benchmarks import sd15
from pipeline_vton import adapter_parameters, markdown_table, widen_conv_in
from train_vton import lora_modules


SD2 = sd15.UNET | {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True}
SDXL = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
BACKBONES = {  # configs as in the unet/config.json of these repositories, as far as they shape weights
    "SD1.5 (stable-diffusion-v1-5/stable-diffusion-v1-5)": sd15.UNET,
    "instruct-pix2pix (timbrooks/instruct-pix2pix)": sd15.UNET | {"in_channels": 8},
    "SD1.5 inpainting (stable-diffusion-v1-5/stable-diffusion-inpainting)": sd15.UNET | {"in_channels": 9},
    "SD2 inpainting (stabilityai/stable-diffusion-2-inpainting)": SD2 | {"in_channels": 9},
    "SD2.1, velocities (stabilityai/stable-diffusion-2-1)": SD2 | {"sample_size": 96},
    "SDXL (stabilityai/stable-diffusion-xl-base-1.0)": SDXL,
    "SDXL inpainting (diffusers/stable-diffusion-xl-1.0-inpainting-0.1)": SDXL | {"in_channels": 9},
}


def count(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


def row(config: dict, rank: int) -> dict[str, int]:
    """Counts of weights: the UNet's, an adapter's, an adapter's of its `conv_in`, and a LoRA's."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        widened = config["in_channels"] == 4
        if widened:
            widen_conv_in(unet)
        adapter = adapter_parameters(unet, "self_attention", widened)
        found = {"unet": count(unet.parameters()), "adapter": count(adapter.values()), "tensors": len(adapter)}
        found["conv_in"] = adapter["conv_in.weight"].numel() if widened else 0
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=lora_modules("self_attention")))
    return found | {"lora": count(p for name, p in unet.named_parameters() if ".lora_" in name)}


def main(args: argparse.Namespace) -> None:
    head = ["base", "channels", "UNet, M", "adapter, M", "tensors", "of it conv_in", "adapter in fp16", f"LoRA {args.lora_rank}, M", "in fp16"]  # fmt: skip
    cells = []
    for name, config in BACKBONES.items():
        found, channels = row(config, args.lora_rank), config["in_channels"]
        cells.append([
            name, f"{channels}, widened to 8" if channels == 4 else str(channels), f"{found['unet'] / 1e6:.1f}",
            f"{found['adapter'] / 1e6:.1f}", str(found["tensors"]), f"{found['conv_in']:,}",
            f"{2 * found['adapter'] / 1e6:.0f} MB", f"{found['lora'] / 1e6:.1f}", f"{2 * found['lora'] / 1e6:.0f} MB",
        ])  # fmt: skip
    print(markdown_table(head, cells))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora_rank", type=int, default=16, help="default 16")
    main(parser.parse_args())
