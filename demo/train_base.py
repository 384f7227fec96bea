"""Train the demo's stand-in for Stable Diffusion 1.5 inpainting: the same classes, four million weights, a drawn world.

Like SD1.5, it sees people and flat cloths, in whole and through masks, but never a person beside their cloth: what it learns
is how the drawn world looks, not how to try a cloth on. The result is an ordinary diffusers folder.

The VAE, the UNet and once more the VAE's decoder are trained in turn. A finished VAE in `--output_dir` is kept and used.
"""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


CAPTIONS = ("", "a person", "a cloth")
MASK_KINDS = {
    "person": (("agnostic", 0.5), ("random", 0.35), ("full", 0.15)),
    "cloth": (("random", 0.8), ("full", 0.2)),
}


# ---------------------------------------------------------------------------------------------------------------- data


@dataclass
class Pictures:
    """One kind of picture, held in memory: uint8 (N, 3, H, W), and the masks (N, 1, H, W) that hide parts of it."""

    images: torch.Tensor
    masks: dict[str, torch.Tensor]


def read_folder(folder: Path, mode: str) -> torch.Tensor:
    files = sorted(folder.glob("*.png"))
    if not files:
        raise FileNotFoundError(f"--dataset_root: no pictures in {folder}; run demo/make_dataset.py first")
    stack = np.stack([np.asarray(Image.open(file).convert(mode)) for file in files])
    return torch.from_numpy(stack if stack.ndim == 4 else stack[..., None]).permute(0, 3, 1, 2).contiguous()


def random_masks(count: int, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """One to three overlapping rectangles a mask, each a quarter to four fifths of a side long: (N, 1, H, W), 0 or 255."""
    masks = torch.zeros(count, 1, height, width, dtype=torch.uint8)
    for mask in masks:
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            size, place = torch.rand(2, generator=generator) * 0.55 + 0.25, torch.rand(2, generator=generator)
            rows, columns = int(size[0] * height), int(size[1] * width)
            top, left = int(place[0] * (height - rows)), int(place[1] * (width - columns))
            mask[:, top : top + rows, left : left + columns] = 255
    return masks


def load_pictures(root: Path, generator: torch.Generator) -> dict[str, Pictures]:
    people, cloths = read_folder(root / "train" / "image", "RGB"), read_folder(root / "train" / "cloth", "RGB")
    height, width = people.shape[-2:]
    agnostic = read_folder(root / "train" / "agnostic-mask", "L")
    return {
        "person": Pictures(
            people, {"agnostic": agnostic, "random": random_masks(len(people), height, width, generator)}
        ),
        "cloth": Pictures(cloths, {"random": random_masks(len(cloths), height, width, generator)}),
    }


def to_model(images: torch.Tensor) -> torch.Tensor:
    """uint8 to [-1, 1]."""
    return images.float() / 127.5 - 1


def hide(images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Grey where the mask is white, as the inpainting pipelines do."""
    return images * (masks < 128)


# ----------------------------------------------------------------------------------------------------------------- VAE


def build_vae(height: int) -> AutoencoderKL:
    """Latents have half of a picture's sides: stripes of three pixels must come through."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        mid_block_add_attention=False,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=height,
    )


def train_vae(pictures: dict[str, Pictures], steps: int, batch_size: int, generator: torch.Generator) -> AutoencoderKL:
    """Reconstruct pictures, one in six behind a mask; then set `scaling_factor` so that latents have unit variance.

    Drawn pictures vary twenty times more in brightness than along either colour axis. A small VAE trained on the plain error
    spends its four channels on edges and forgets a colour axis for good, so its first and last layers start from whitened
    colours, and the error is whitened half-way.
    """
    images = torch.cat([p.images for p in pictures.values()])
    masks = torch.cat([p.masks["random"] for p in pictures.values()])
    vae = build_vae(images.shape[-2])
    variances, axes = torch.linalg.eigh(torch.cov(to_model(images[::16]).movedim(1, -1).reshape(-1, 3).T))

    def whitening(power: float) -> torch.Tensor:
        return axes @ torch.diag((variances / variances.mean()) ** power) @ axes.T  # (3, 3)

    with torch.no_grad():
        first, last = vae.encoder.conv_in.weight, vae.decoder.conv_out.weight
        first.copy_(torch.einsum("ochw,cd->odhw", first, whitening(-0.5)))
        last.copy_(torch.einsum("co,oihw->cihw", whitening(0.5), last))
        vae.quant_conv.bias[4:] = -8.0  # the posterior starts almost without noise
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, weight_decay=1e-4, betas=(0.9, 0.99), fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(100, steps), steps)
    bar = tqdm(range(steps), desc="VAE")
    for _ in bar:
        chosen = torch.randint(len(images), (batch_size,), generator=generator)
        batch = to_model(images[chosen])
        hidden = torch.rand(batch_size, 1, 1, 1, generator=generator) < 1 / 6
        batch = torch.where(hidden, hide(batch, masks[chosen]), batch)
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        error = torch.einsum("cd,bdhw->bchw", whitening(-0.25), decoded - batch)
        loss = error.square().mean() + 0.1 * error.abs().mean() + 1e-6 * posterior.kl().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if bar.n % 20 == 0:
            bar.set_postfix(psnr=f"{10 * math.log10(4 / F.mse_loss(decoded, batch).item()):.1f} dB")
    with torch.no_grad():
        sample = torch.cat([vae.encode(to_model(p.images[:512])).latent_dist.mode() for p in pictures.values()])
    vae.register_to_config(scaling_factor=1 / sample.std().item())
    return vae.eval().requires_grad_(False)


def train_decoder(
    vae: AutoencoderKL, pictures: dict[str, Pictures], steps: int, batch_size: int, generator: torch.Generator
) -> None:
    """The decoder once more, by itself and on the plain error: latents, and so the UNet, stay as they are."""
    people, cloths = (p.images for p in pictures.values())
    trained = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=1e-4, betas=(0.9, 0.99), fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(50, steps), steps)
    bar = tqdm(range(steps), desc="decoder")
    for _ in bar:
        count = batch_size // 4  # a quarter cloths
        batch = to_model(
            torch.cat(
                [
                    people[torch.randint(len(people), (batch_size - count,), generator=generator)],
                    cloths[torch.randint(len(cloths), (count,), generator=generator)],
                ]
            )
        )
        with torch.no_grad():
            latents = vae.encode(batch).latent_dist.mode()
        error = vae.decode(latents).sample - batch
        loss = error.square().mean() + 0.05 * error.abs().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if bar.n % 20 == 0:
            bar.set_postfix(psnr=f"{10 * math.log10(4 / error.square().mean().item()):.1f} dB")
    vae.requires_grad_(False)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor, desc: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled posterior mean and standard deviation, each (N, 4, h, w)."""
    posteriors = [vae.encode(batch).latent_dist for batch in tqdm(images.split(256), desc=desc)]
    scale = vae.config.scaling_factor
    return torch.cat([p.mean for p in posteriors]) * scale, torch.cat([p.std for p in posteriors]) * scale


# ---------------------------------------------------------------------------------------------------------------- UNet


def build_text_encoder() -> tuple[CLIPTokenizer, CLIPTextModel]:
    """A tokenizer of single bytes, and a frozen random text encoder: enough to tell the captions apart."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, CLIPTextModel(config).eval().requires_grad_(False)


def build_unet(latent_size: tuple[int, int], cross_attention_dim: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=round(math.sqrt(math.prod(latent_size))),  # StableDiffusionInpaintPipeline takes no pair
        in_channels=9,
        out_channels=4,
        block_out_channels=(32, 96, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=cross_attention_dim,
        norm_num_groups=8,
    )


def build_scheduler() -> DDPMScheduler:
    """SD1.5's betas, rescaled to end in pure noise, and velocities (arXiv:2305.08891).

    Here the stand-in differs from SD1.5, which predicts the noise: so small a UNet believes the little that SD1.5's last
    timestep leaves of a picture, and takes the noise's mean for the cloth's colour.
    """
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )


@dataclass
class Latents:
    """One kind of picture, encoded: what is drawn, and what is seen of it through each kind of mask."""

    mean: torch.Tensor  # (N, 4, h, w)
    std: torch.Tensor  # (N, 4, h, w)
    conditions: dict[str, torch.Tensor]  # (N, 5, h, w): mask, masked picture
    caption: int

    def draw(self, kind: str, chosen: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn(self.mean[chosen].shape, generator=generator)
        return self.mean[chosen] + self.std[chosen] * noise, self.conditions[kind][chosen]


def encode_pictures(vae: AutoencoderKL, pictures: dict[str, Pictures]) -> dict[str, Latents]:
    encoded = {}
    for name, p in pictures.items():
        images = to_model(p.images)
        mean, std = encode(vae, images, f"{name} latents")
        conditions = {}
        for kind, masks in p.masks.items():
            mask = F.interpolate((masks >= 128).float(), size=mean.shape[-2:])  # nearest
            conditions[kind] = torch.cat(
                [mask, encode(vae, hide(images, masks), f"{name} behind {kind} masks")[0]], dim=1
            )
        grey = encode(vae, torch.zeros_like(images[:1]), "grey")[0]
        conditions["full"] = torch.cat([torch.ones_like(grey[:, :1]), grey], dim=1).expand(len(mean), -1, -1, -1)
        encoded[name] = Latents(mean, std, conditions, CAPTIONS.index(f"a {name}"))
    return encoded


def draw_batch(latents: dict[str, Latents], batch_size: int, generator: torch.Generator):
    """Three people to two cloths, each behind a mask of a random kind; half of the captions are dropped."""
    targets, conditions, captions = [], [], []
    people = round(batch_size * 0.6)
    for name, count in (("person", people), ("cloth", batch_size - people)):
        kinds, weights = zip(*MASK_KINDS[name])
        drawn = torch.multinomial(torch.tensor(weights), count, replacement=True, generator=generator)
        for i, kind in enumerate(kinds):
            number = int((drawn == i).sum())
            chosen = torch.randint(len(latents[name].mean), (number,), generator=generator)
            target, condition = latents[name].draw(kind, chosen, generator)
            targets.append(target)
            conditions.append(condition)
            captions.append(torch.where(torch.rand(number, generator=generator) < 0.5, 0, latents[name].caption))
    return torch.cat(targets), torch.cat(conditions), torch.cat(captions)


def train_unet(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    latents: dict[str, Latents],
    caption_embeds: torch.Tensor,
    args: argparse.Namespace,
    generator: torch.Generator,
) -> None:
    """The plain error of what the scheduler has the UNet predict, velocities; leaves the EMA weights in `unet`."""
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.learning_rate, weight_decay=1e-3, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(200, args.unet_steps), args.unet_steps)
    ema = EMAModel(unet.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    losses, bar = [], tqdm(range(args.unet_steps), desc="UNet")
    for _ in bar:
        targets, conditions, captions = draw_batch(latents, args.batch_size, generator)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(targets),), generator=generator)
        noise = torch.randn(targets.shape, generator=generator)
        model_input = torch.cat([scheduler.add_noise(targets, noise, timesteps), conditions], dim=1)  # (B, 9, h, w)
        predicted = unet(model_input, timesteps, caption_embeds[captions], return_dict=False)[0]
        loss = F.mse_loss(predicted, scheduler.get_velocity(targets, noise, timesteps))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        losses.append(loss.item())
        if len(losses) % 100 == 0:
            tqdm.write(f"step {len(losses)}  loss {np.mean(losses[-100:]):.4f}  lr {schedule.get_last_lr()[0]:.2e}")
        if len(losses) % args.checkpointing_steps == 0:
            ema.store(unet.parameters())
            ema.copy_to(unet.parameters())
            unet.save_pretrained(args.output_dir / "checkpoint-unet")
            ema.restore(unet.parameters())
    ema.copy_to(unet.parameters())
    unet.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------- main


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_root", type=Path, required=True, help="a folder written by demo/make_dataset.py")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the diffusers folder goes")
    parser.add_argument("--vae_steps", type=int, default=1200, help="steps of the VAE (default 1200)")
    parser.add_argument("--unet_steps", type=int, default=7000, help="steps of the UNet (default 7000)")
    parser.add_argument("--decoder_steps", type=int, default=1500, help="steps of the decoder alone (default 1500)")
    parser.add_argument("--batch_size", type=int, default=16, help="pictures a step (default 16)")
    parser.add_argument("--learning_rate", type=float, default=8e-4, help="the UNet's highest rate (default 8e-4)")
    parser.add_argument(
        "--checkpointing_steps", type=int, default=500, help="steps between copies of the UNet (default 500)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and noise (default 0)")
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    started = time.time()
    generator = torch.Generator().manual_seed(args.seed)
    pictures = load_pictures(args.dataset_root, generator)
    drawn = generator.get_state()

    def start_stage() -> None:  # every stage starts from the seed, whether the one before it ran now or earlier
        torch.manual_seed(args.seed)
        generator.set_state(drawn)

    start_stage()
    if (args.output_dir / "vae" / "config.json").is_file():
        vae = AutoencoderKL.from_pretrained(args.output_dir / "vae").eval().requires_grad_(False)
    else:
        vae = train_vae(pictures, args.vae_steps, args.batch_size, generator)
        vae.save_pretrained(args.output_dir / "vae")
    print(f"VAE ready after {time.time() - started:.0f} s, scaling factor {vae.config.scaling_factor:.4f}")

    start_stage()
    latents = encode_pictures(vae, pictures)
    tokenizer, text_encoder = build_text_encoder()
    tokens = tokenizer(list(CAPTIONS), padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        caption_embeds = text_encoder(tokens)[0]  # (captions, 16, 32)
    unet = build_unet(latents["person"].mean.shape[-2:], text_encoder.config.hidden_size)
    scheduler = build_scheduler()
    train_unet(unet, scheduler, latents, caption_embeds, args, generator)

    start_stage()
    train_decoder(vae, pictures, args.decoder_steps, args.batch_size, generator)
    # The text encoder stays in float32: transformers loads what was saved, and a default load must not mix dtypes.
    vae, unet = vae.to(torch.float16), unet.to(torch.float16)
    pipe = StableDiffusionInpaintPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipe.save_pretrained(args.output_dir)
    print(f"base in {args.output_dir} after {time.time() - started:.0f} s")


if __name__ == "__main__":
    main(parse_args())
