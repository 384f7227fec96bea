"""The scripts behind the README's tables, in the small."""

import methods
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline
from tiny import ROOT


@torch.no_grad()
def test_the_four_channel_base_paints_what_the_inpainting_base_paints_behind_a_full_mask(tmp_path):
    base = ROOT / "demo" / "model"
    methods.write_four_channel_base(base, tmp_path)
    narrow = StableDiffusionPipeline.from_pretrained(tmp_path).unet
    pipe = StableDiffusionInpaintPipeline.from_pretrained(base, dtype=torch.float32)
    noisy = torch.randn(2, 4, 32, 24, generator=torch.Generator().manual_seed(0))
    grey = pipe.vae.encode(torch.zeros(2, 3, 64, 48)).latent_dist.mode() * pipe.vae.config.scaling_factor
    rows = torch.cat([noisy, torch.ones(2, 1, 32, 24), grey], dim=1)
    expected, inside = (
        pipe.unet.conv_in(rows),
        (..., slice(4, -4), slice(4, -4)),
    )  # at the edge, grey is not one colour

    def error(bias: torch.Tensor) -> torch.Tensor:
        return (F.conv2d(noisy, narrow.conv_in.weight, bias, padding=1) - expected)[inside].abs().mean()

    assert error(narrow.conv_in.bias) < 0.2 * error(pipe.unet.conv_in.bias)


def test_a_row_of_the_method_table(tmp_path, capfd):
    row = "reference, conv_in widened from 4 channels"
    line = ["--output_dir", str(tmp_path), "--rows", row, "--train", "4", "--max_train_steps", "1", "--lines", "2"]
    methods.main(methods.parse_args([*line, "--train_batch_size", "2", "--num_inference_steps", "1"]))
    assert f"| {row} | " in capfd.readouterr().out
