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
"""

import argparse
import contextlib
import json
import logging
import math
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel, cast_training_params
from diffusers.utils import make_image_grid
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from pipeline_vton import (
    ADAPTER_NAME,
    ADAPTER_SETTINGS,
    CHOICES,
    ClothBesideAttnProcessor,
    StableDiffusionVTONPipeline,
    TryOnLatents,
    adapter_parameters,
    as_pil,
    as_tensors,
    encode_latents,
    fit_cloth,
    read_adapter,
    vton_attention,
    widen_conv_in,
    write_adapter,
)


logger = get_logger("train_vton")
PROBED_TIMESTEPS = (250, 500, 750)  # where the masked noise error without, with and with a wrong cloth is logged
SEED_WARMUP_EPOCHS, SEED_WARMUP_START, SEED_FINAL_RATE = 5, 0.1, 1e-6


# ----------------------------------------------------------------------------------------------------------- arguments


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    group = parser.add_argument_group("what goes in and comes out")
    group.add_argument("--pretrained_model_name_or_path", required=True, help="the base: a Hub repository or a folder")
    group.add_argument("--revision", help="the base's revision on the Hub (default main)")
    group.add_argument("--variant", help="the base's file variant, such as fp16 (default none)")
    group.add_argument("--dataset_root", type=Path, required=True, help="a folder in VITON-HD's layout")
    group.add_argument(
        "--output_dir", type=Path, required=True, help="adapter, checkpoints, logs and validation pictures"
    )
    group.add_argument("--height", type=int, help="training height in pixels (default: the base's native size)")
    group.add_argument("--width", type=int, help="training width in pixels (default: the base's native size)")
    group.add_argument("--dataloader_num_workers", type=int, default=2, help="reading processes (default 2)")

    group = parser.add_argument_group("how the cloth is shown, and what learns")
    group.add_argument(
        "--cloth_conditioning",
        choices=CHOICES["cloth_conditioning"],
        default="reference",
        help="cloth tokens in every attn1 (default), or one canvas",
    )
    group.add_argument(
        "--cross_attention",
        choices=("skip", "prompt"),
        default="skip",
        help="leave attn2 out (default), or feed it --prompt",
    )
    group.add_argument(
        "--prompt", default="", help="the text of every picture with --cross_attention prompt (default empty)"
    )
    group.add_argument(
        "--condition_latents",
        choices=CHOICES["condition_latents"],
        help="default: unscaled for 8-channel bases (instruct-pix2pix), else scaled",
    )
    group.add_argument(
        "--trainable",
        choices=CHOICES["trainable"],
        default="self_attention",
        help="which UNet weights learn (default self_attention)",
    )
    group.add_argument(
        "--cloth_dropout", type=float, default=0.1, help="share of rows that see no cloth, for guidance (default 0.1)"
    )
    group.add_argument(
        "--guidance_scale",
        type=float,
        default=7.5,
        help="recommended in the adapter, used in validation (default 7.5)",
    )

    group = parser.add_argument_group("optimisation (defaults: the seed architecture's)")
    group.add_argument("--train_batch_size", type=int, default=4, help="pairs a step and process (default 4)")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1, help="batches an update (default 1)")
    group.add_argument("--num_train_epochs", type=int, default=100, help="passes over the pairs (default 100)")
    group.add_argument("--max_train_steps", type=int, help="updates; overrides --num_train_epochs")
    group.add_argument("--learning_rate", type=float, default=1e-4, help="AdamW's highest rate (default 1e-4)")
    group.add_argument(
        "--lr_scheduler",
        default="seed",
        choices=("seed", *(kind.value for kind in SchedulerType)),
        help="seed: warm-up from a tenth, then cosine to 1e-6 (default); or one of diffusers'",
    )
    group.add_argument(
        "--lr_warmup_steps", type=int, help="updates of warm-up (default: 5 epochs, at most the whole run)"
    )
    group.add_argument("--adam_beta1", type=float, default=0.9, help="default 0.9")
    group.add_argument("--adam_beta2", type=float, default=0.999, help="default 0.999")
    group.add_argument("--adam_weight_decay", type=float, default=0.01, help="default 0.01")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="gradient clipping (default 1.0)")
    group.add_argument(
        "--ema_decay", type=float, default=0.9999, help="averaging of the published weights (default 0.9999, 0 is off)"
    )
    group.add_argument("--gradient_checkpointing", action="store_true", help="less memory, a third more time")
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: accelerate's configuration")
    group.add_argument("--seed", type=int, default=0, help="seed of order, noise and dropout (default 0)")

    group = parser.add_argument_group("checkpoints and reports")
    group.add_argument(
        "--checkpointing_steps", type=int, default=500, help="updates between checkpoints (default 500)"
    )
    group.add_argument("--checkpoints_total_limit", type=int, help="how many checkpoints stay (default all)")
    group.add_argument("--resume_from_checkpoint", help="a checkpoint folder, or latest")
    group.add_argument("--validation_steps", type=int, default=500, help="updates between validations (default 500)")
    group.add_argument(
        "--num_validation_pairs", type=int, default=4, help="unpaired test lines drawn at a validation (default 4)"
    )
    group.add_argument(
        "--report_to", default="tensorboard", help="tensorboard (default), another tracker of accelerate's, or none"
    )

    args = parser.parse_args(input_args)
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """One sentence for what argparse cannot see by itself."""
    positive = (
        "train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_train_steps", "checkpointing_steps",
        "checkpoints_total_limit", "validation_steps", "height", "width", "learning_rate", "max_grad_norm",
    )  # fmt: skip
    for name in positive:
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f"--{name} must be positive, got {value}")
    if not 0 <= args.cloth_dropout < 1:
        parser.error(f"--cloth_dropout must be at least 0 and less than 1, got {args.cloth_dropout}")
    if not 0 <= args.ema_decay < 1:
        parser.error(f"--ema_decay must be at least 0 and less than 1, got {args.ema_decay}")
    if (args.height is None) != (args.width is None):
        parser.error(f"--height and --width go together, got {args.height} and {args.width}")
    if args.resume_from_checkpoint not in {None, "latest"} and not Path(args.resume_from_checkpoint).is_dir():
        parser.error(f"--resume_from_checkpoint must be latest or a folder, got {args.resume_from_checkpoint}")


# ---------------------------------------------------------------------------------------------------------------- data


def inside(root: Path, *parts: str) -> Path:
    """A path below `root`; ValueError where a list's line leads out of it."""
    path = root.joinpath(*parts)
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"--dataset_root: {'/'.join(parts)} leads out of {root}")
    return path


class VitonHDDataset(Dataset):
    """Pairs of a VITON-HD folder: `{split}/{image,cloth,agnostic-mask}` and `{split}_pairs.txt`, lines `PERSON CLOTH`.

    An item holds `person` and `cloth` (3, H, W) in [-1, 1], `mask` (1, H, W) 0 or 1, its `name`, and a `seed` for all that
    is random about it in this epoch, so that neither workers nor processes nor a resumed run change what is drawn.

    Args:
        root: the folder.
        split: `train` or `test`.
        height, width: in pixels; the person and the mask are stretched, the cloth is fitted on white.
        paired: every person with the cloth of the same name, whatever the list says.
        seed: the run's.
    """

    def __init__(self, root: Path, split: str, height: int, width: int, paired: bool, seed: int = 0) -> None:
        self.root, self.split, self.height, self.width, self.seed, self.epoch = root, split, height, width, seed, 0
        list_file = root / f"{split}_pairs.txt"
        if not list_file.is_file():
            raise FileNotFoundError(
                f"--dataset_root: there is no {list_file.name} in {root}, which VITON-HD's layout has"
            )
        self.pairs = []
        for number, line in enumerate(list_file.read_text().splitlines(), start=1):
            if not line.strip():
                continue
            if len(names := line.split()) != 2:
                raise ValueError(f"{list_file}, line {number}: must name a person and a cloth, got {line!r}")
            pair = (names[0], names[0] if paired else names[1])
            for file in self.files(*pair):
                if not file.is_file():
                    raise FileNotFoundError(f"{list_file}, line {number}: there is no {file.relative_to(root)}")
            self.pairs.append(pair)
        if not self.pairs:
            raise ValueError(f"{list_file} names no pairs")
        self.image_processor = VaeImageProcessor()
        self.mask_processor = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)

    def files(self, person: str, cloth: str) -> tuple[Path, Path, Path]:
        """Person, cloth and mask; repacks name the mask NAME_mask.png or NAME.png."""
        folder = self.split
        masks = [inside(self.root, folder, "agnostic-mask", Path(person).stem + end) for end in ("_mask.png", ".png")]
        mask = masks[1] if masks[1].is_file() else masks[0]
        return inside(self.root, folder, "image", person), inside(self.root, folder, "cloth", cloth), mask

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.pairs)

    def pictures(self, index: int) -> tuple[Image.Image, Image.Image, Image.Image]:
        """Person, cloth and mask as PIL images, at their own sizes."""
        opened = []
        for file, channels in zip(self.files(*self.pairs[index]), (3, 3, 1)):
            try:
                opened.append(as_pil(as_tensors(Image.open(file), str(file), channels)[0]))
            except OSError as error:
                raise ValueError(f"{file} cannot be read: {error}") from error
        if opened[0].size != opened[2].size:
            raise ValueError(
                f"{self.pairs[index][0]}: the mask has size {opened[2].size}, its person {opened[0].size}"
            )
        return tuple(opened)

    def __getitem__(self, index: int) -> dict[str, Any]:
        person, cloth, mask = self.pictures(index)
        size = {"height": self.height, "width": self.width}
        return {
            "person": self.image_processor.preprocess(person, **size)[0],
            "cloth": self.image_processor.preprocess(fit_cloth(cloth, **size))[0],
            "mask": self.mask_processor.preprocess(mask, **size)[0],
            "name": " ".join(self.pairs[index]),
            "seed": int(np.random.SeedSequence([self.seed, self.epoch, index]).generate_state(1)[0]),
        }


def draw(seeds: Iterable[int], shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """What is random in a step, each row from its own seed: three noises (B, *shape) and two numbers (B,) in [0, 1)."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(int(seed))
        rows.append(
            {
                "noise": torch.randn(shape, generator=generator),
                "cloth_noise": torch.randn(shape, generator=generator),
                "posterior": torch.randn(shape, generator=generator),
                "time": torch.rand((), generator=generator),
                "dropout": torch.rand((), generator=generator),
            }
        )
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


# ------------------------------------------------------------------------------------------------------------ the step


def seed_schedule(
    optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int, peak: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """The seed's schedule: linear from 0.1 * peak to peak, then cosine to 1e-6."""
    final = min(SEED_FINAL_RATE / peak, 1.0)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return SEED_WARMUP_START + (1 - SEED_WARMUP_START) * step / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Trainer:
    """The models, the optimiser and the counters of one run; `run` is the loop."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.accelerator = accelerate.Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=args.output_dir / "logs"),
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        )
        set_seed(args.seed)
        self.step = 0
        self.load_base()
        self.load_data()
        self.prepare_training()

    # ---- setting up

    def load_base(self) -> None:
        args, device = self.args, self.accelerator.device
        options = {"revision": args.revision, "variant": args.variant, "use_safetensors": True}
        frozen_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(
            self.accelerator.mixed_precision, torch.float32
        )

        def load(cls: type, subfolder: str) -> torch.nn.Module:
            model = cls.from_pretrained(args.pretrained_model_name_or_path, subfolder=subfolder, **options)
            return model.to(device, frozen_dtype).eval().requires_grad_(False)

        self.vae, self.unet = load(AutoencoderKL, "vae"), load(UNet2DConditionModel, "unet")
        self.noise_scheduler = DDPMScheduler.from_pretrained(
            args.pretrained_model_name_or_path, subfolder="scheduler", revision=args.revision, clip_sample=False
        )
        self.in_channels = self.unet.config.in_channels
        if self.in_channels not in {4, 8, 9}:
            raise ValueError(
                f"--pretrained_model_name_or_path must have a UNet with 4, 8 or 9 input channels, got {self.in_channels}"
            )
        if self.in_channels == 4:
            widen_conv_in(self.unet)
        self.prompt_embeds = None
        if args.cross_attention == "prompt":
            tokenizer = CLIPTokenizer.from_pretrained(
                args.pretrained_model_name_or_path, subfolder="tokenizer", revision=args.revision
            )
            tokens = tokenizer(
                args.prompt,
                padding="max_length",
                truncation=True,
                max_length=tokenizer.model_max_length,
                return_tensors="pt",
            )
            with torch.no_grad():
                self.prompt_embeds = load(CLIPTextModel, "text_encoder")(tokens.input_ids.to(device))[
                    0
                ]  # (1, 77, 768)
        size = self.unet.config.sample_size
        size = size if isinstance(size, (list, tuple)) else (size, size)
        self.pipe = StableDiffusionVTONPipeline(
            self.vae, self.unet, self.noise_scheduler, **{"in_channels": self.in_channels}
        )
        self.height = args.height or size[0] * self.pipe.vae_scale_factor
        self.width = args.width or size[1] * self.pipe.vae_scale_factor
        self.pipe.resolve_size(self.height, self.width, self.height, self.width)  # an error names a bad side
        self.settings = ADAPTER_SETTINGS | {
            "cloth_conditioning": args.cloth_conditioning,
            "cross_attention": args.cross_attention,
            "condition_latents": args.condition_latents or ("unscaled" if self.in_channels == 8 else "scaled"),
            "trainable": args.trainable,
            "guidance_scale": args.guidance_scale,
            "base_model": args.pretrained_model_name_or_path,
            "height": self.height,
            "width": self.width,
        }
        self.pipe.register_to_config(**self.settings)
        self.pipe.set_progress_bar_config(disable=True)

    def load_data(self) -> None:
        args, size = self.args, (self.height, self.width)
        self.dataset = VitonHDDataset(args.dataset_root, "train", *size, paired=True, seed=args.seed)
        rows = args.train_batch_size * self.accelerator.num_processes
        if len(self.dataset) < rows:
            raise ValueError(
                f"--train_batch_size: a step takes {rows} pairs, and --dataset_root has {len(self.dataset)}"
            )
        self.loader = DataLoader(
            self.dataset,
            batch_size=args.train_batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=args.dataloader_num_workers,
        )
        self.probes = self.unpaired = None
        if (args.dataset_root / "test_pairs.txt").is_file():
            probes = VitonHDDataset(args.dataset_root, "test", *size, paired=True, seed=args.seed)
            if len(probes) > 1:
                self.probes = torch.utils.data.default_collate([probes[i] for i in range(min(16, len(probes)))])
            self.unpaired = VitonHDDataset(args.dataset_root, "test", *size, paired=False, seed=args.seed)

    def prepare_training(self) -> None:
        args = self.args
        parameters = adapter_parameters(self.unet, args.trainable, self.in_channels == 4)
        self.trained = list(parameters.values())
        for parameter in self.trained:
            parameter.requires_grad_(True)
        cast_training_params(self.unet, dtype=torch.float32)
        if args.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            self.unet.train()
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.adam_weight_decay,
        )
        self.model, self.optimizer, self.loader = self.accelerator.prepare(self.unet, self.optimizer, self.loader)
        self.steps_per_epoch = math.ceil(len(self.loader) / args.gradient_accumulation_steps)
        self.total_steps = args.max_train_steps or args.num_train_epochs * self.steps_per_epoch
        warmup = (
            args.lr_warmup_steps if args.lr_warmup_steps is not None else SEED_WARMUP_EPOCHS * self.steps_per_epoch
        )
        warmup = min(warmup, self.total_steps)
        # Stepped here, once an update: accelerate would step a prepared schedule once a process.
        if args.lr_scheduler == "seed":
            self.schedule = seed_schedule(self.optimizer.optimizer, warmup, self.total_steps, args.learning_rate)
        else:
            self.schedule = get_scheduler(args.lr_scheduler, self.optimizer.optimizer, warmup, self.total_steps)
        self.ema = EMAModel(self.trained, decay=args.ema_decay, use_ema_warmup=True, power=0.75)
        self.ema.to(self.accelerator.device)
        self.accelerator.register_for_checkpointing(self.schedule, self.ema)
        self.accelerator.register_save_state_pre_hook(self.save_weights)
        self.accelerator.register_load_state_pre_hook(self.load_weights)

    # ---- one step

    def encode(self, batch: dict[str, Any]) -> TryOnLatents:
        device = self.accelerator.device
        return TryOnLatents.encode(
            self.vae,
            *(batch[name].to(device) for name in ("person", "mask", "cloth")),
            channels=self.unet.config.in_channels,
            condition_latents=self.settings["condition_latents"],
            dtype=torch.float32,
        )

    def predict(
        self, conditioning: TryOnLatents, noisy: torch.Tensor, timesteps: torch.Tensor, cloth_seen: torch.Tensor
    ) -> torch.Tensor:
        """The noise in `noisy` (B, 4, h, w) or a canvas, at timesteps (B,); rows where `cloth_seen` (B,) is 0 see no cloth.

        Reference mode is one UNet call on `[person rows ; cloth rows]`, the cloth rows at timestep 0.
        """
        count = len(noisy)
        if self.args.cloth_conditioning == "joint":
            rows, seen = conditioning.canvas_rows(noisy, cloth_seen.view(-1, 1, 1, 1)), None
        else:
            rows = torch.cat([conditioning.person_rows(noisy), conditioning.cloth_rows()])
            timesteps = torch.cat([timesteps, torch.zeros_like(timesteps)])
            seen = torch.cat([cloth_seen, torch.ones_like(cloth_seen)])[:, None]
        embeds = None if self.prompt_embeds is None else self.prompt_embeds.expand(len(rows), -1, -1)
        with self.accelerator.autocast():
            return self.model(rows, timesteps, embeds, attention_mask=seen, return_dict=False)[0][:count].float()

    def on_canvas(
        self, conditioning: TryOnLatents, target: torch.Tensor, drawn: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Target and noise of the person alone; in joint mode of the whole canvas."""
        if self.args.cloth_conditioning == "reference":
            return target, drawn["noise"]
        canvas = conditioning.canvas
        return canvas(target, conditioning.cloth), canvas(drawn["noise"], drawn["cloth_noise"])

    def train_step(self, batch: dict[str, Any]) -> torch.Tensor:
        """The seed's loss: MSE between the predicted and the actual noise, over the person (joint: over the canvas)."""
        device = self.accelerator.device
        with torch.no_grad():
            conditioning = self.encode(batch)
            posterior = self.vae.encode(batch["person"].to(device, self.vae.dtype)).latent_dist
            drawn = {k: v.to(device) for k, v in draw(batch["seed"], posterior.mean.shape[1:]).items()}
            target = (posterior.mean + posterior.std * drawn["posterior"]).float() * self.vae.config.scaling_factor
        target, noise = self.on_canvas(conditioning, target, drawn)
        timesteps = (drawn["time"] * self.noise_scheduler.config.num_train_timesteps).long()
        noisy = self.noise_scheduler.add_noise(target, noise, timesteps)
        noise_pred = self.predict(
            conditioning, noisy, timesteps, (drawn["dropout"] >= self.args.cloth_dropout).float()
        )
        return F.mse_loss(noise_pred, noise)

    def update(self, batch: dict[str, Any]) -> float:
        """Forward, backward and, every `gradient_accumulation_steps` batches, one update; returns this batch's loss."""
        with self.accelerator.accumulate(self.model):
            loss = self.train_step(batch)
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.trained, self.args.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.accelerator.sync_gradients:
            self.schedule.step()
            self.ema.step(self.trained)
            self.step += 1
        mean = self.accelerator.reduce(loss.detach(), reduction="mean").item()
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the loss is {mean} at step {self.step}; the pairs were {', '.join(batch['name'])}"
            )
        return mean

    # ---- looking at it

    @contextlib.contextmanager
    def published_weights(self):
        """The EMA weights in the UNet, for as long as the context lasts."""
        if not self.args.ema_decay:
            yield
            return
        self.ema.store(self.trained)
        self.ema.copy_to(self.trained)
        try:
            yield
        finally:
            self.ema.restore(self.trained)

    @torch.no_grad()
    def probe(self) -> dict[str, float]:
        """The masked noise error without a cloth, with the right one and with a wrong one, on the same test persons and noise.

        While the cloth is being read, right < none < wrong.
        """
        batch, device = self.probes, self.accelerator.device
        conditioning = self.encode(batch)
        target = encode_latents(self.vae, batch["person"].to(device)).float() * self.vae.config.scaling_factor
        drawn = {name: noise.to(device) for name, noise in draw(batch["seed"], target.shape[1:]).items()}
        other = {name: getattr(conditioning, name).roll(1, 0) for name in ("cloth", "cloth_condition")}
        wrong = TryOnLatents(**vars(conditioning) | other)
        seen, errors = torch.ones(len(target), device=device), {}
        for t in PROBED_TIMESTEPS:
            timesteps = torch.full((len(target),), t, device=device)
            for name, shown, visible in (
                ("none", conditioning, 0 * seen),
                ("right", conditioning, seen),
                ("wrong", wrong, seen),
            ):
                clean, noise = self.on_canvas(shown, target, drawn)
                noisy = self.noise_scheduler.add_noise(clean, noise, timesteps)
                error = (self.predict(shown, noisy, timesteps, visible) - noise).square()
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
            if self.unpaired is not None and self.args.num_validation_pairs > 0 and self.accelerator.is_main_process:
                self.save_validation_grid()
        self.unet.train(was_training)
        self.accelerator.wait_for_everyone()
        return logs

    def save_validation_grid(self) -> None:
        tiles, count = [], min(self.args.num_validation_pairs, len(self.unpaired))
        for index in range(count):
            person, cloth, mask = self.unpaired.pictures(index)
            with self.accelerator.autocast():
                result = self.pipe(
                    person,
                    cloth,
                    mask,
                    height=self.height,
                    width=self.width,
                    prompt=self.args.prompt or None,
                    prompt_embeds=self.prompt_embeds,
                    negative_prompt_embeds=self.prompt_embeds,
                    generator=torch.Generator(self.accelerator.device).manual_seed(self.args.seed),
                )
            size = (self.width, self.height)
            tiles += [
                picture.resize(size)
                for picture in (person, fit_cloth(cloth, self.height, self.width), result.images[0])
            ]
        grid = make_image_grid(tiles, rows=count, cols=3)
        folder = self.args.output_dir / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        grid.save(folder / f"step-{self.step:06d}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_images("validation", np.asarray(grid)[None], self.step, dataformats="NHWC")

    # ---- keeping it

    def save_weights(self, models: list[torch.nn.Module], weights: list[dict], output_dir: str) -> None:
        """accelerate's hook: a checkpoint holds the trained weights in fp32, not the whole UNet."""
        if self.accelerator.is_main_process:
            self.write_adapter(Path(output_dir) / ADAPTER_NAME)
        while weights:
            weights.pop()

    def load_weights(self, models: list[torch.nn.Module], input_dir: str) -> None:
        weights, _ = read_adapter(Path(input_dir) / ADAPTER_NAME)
        parameters = adapter_parameters(self.unet, self.args.trainable, self.in_channels == 4)
        if weights.keys() != parameters.keys():
            raise ValueError(
                f"--resume_from_checkpoint: {input_dir} was trained with other weights than --trainable {self.args.trainable}"
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
        while models:
            models.pop()

    def write_adapter(self, file: Path, dtype: torch.dtype | None = None) -> None:
        parameters = adapter_parameters(self.unet, self.args.trainable, self.in_channels == 4)
        settings = self.settings | {"in_channels": self.in_channels, "trained_steps": self.step}
        write_adapter(file, {name: parameter.detach().to(dtype) for name, parameter in parameters.items()}, settings)

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
            (unfinished / "progress.json").write_text(json.dumps({"step": self.step}))
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)
            for old in self.checkpoints()[: -(self.args.checkpoints_total_limit or len(self.checkpoints()))]:
                shutil.rmtree(old)

    def resume(self) -> None:
        wanted = self.args.resume_from_checkpoint
        if wanted is None:
            return
        found = self.checkpoints() if wanted == "latest" else [Path(wanted)]
        if not found:
            logger.info("--resume_from_checkpoint latest: no checkpoint in %s, starting fresh", self.args.output_dir)
            return
        self.accelerator.load_state(str(found[-1]))
        self.step = json.loads((found[-1] / "progress.json").read_text())["step"]
        logger.info("resumed from %s", found[-1])

    # ---- the loop

    def batches(self):
        """Batches from where the run stands, epoch after epoch, in the order that an uninterrupted run would see."""
        epoch, done = divmod(self.step, self.steps_per_epoch)
        skip = done * self.args.gradient_accumulation_steps
        while True:
            self.loader.set_epoch(epoch)
            self.dataset.set_epoch(epoch)  # which the loader's does not reach with several processes
            yield from accelerate.skip_first_batches(self.loader, skip) if skip else self.loader
            epoch, skip = epoch + 1, 0

    def run(self) -> None:
        args, processor = self.args, ClothBesideAttnProcessor if self.args.cloth_conditioning == "reference" else None
        self.resume()
        bar = tqdm(
            total=self.total_steps, initial=self.step, desc="train", disable=not self.accelerator.is_local_main_process
        )
        started, seen, losses = time.time(), 0, []
        with vton_attention(self.unet, processor, args.cross_attention):
            batches = self.batches()
            while self.step < self.total_steps:
                before = self.step
                losses.append(self.update(next(batches)))
                seen += args.train_batch_size * self.accelerator.num_processes
                if self.step == before:
                    continue
                logs = {
                    "loss": sum(losses) / len(losses),
                    "lr": self.schedule.get_last_lr()[0],
                    "images_per_second": seen / (time.time() - started),
                }
                losses = []
                bar.update()
                bar.set_postfix(
                    loss=f"{logs['loss']:.4f}", lr=f"{logs['lr']:.1e}", img_s=f"{logs['images_per_second']:.2f}"
                )
                if self.step % args.validation_steps == 0 or self.step == self.total_steps:
                    probes = self.validate()
                    logs |= probes
                    if probes:
                        logger.info(
                            "step %d, masked noise error: %s",
                            self.step,
                            ", ".join(f"{k.removeprefix('probe/')} {v:.4f}" for k, v in probes.items()),
                        )
                self.accelerator.log(logs, step=self.step)
                if self.step % args.checkpointing_steps == 0 or self.step == self.total_steps:
                    self.save_checkpoint()
        bar.close()
        if self.accelerator.is_main_process:
            with self.published_weights():
                self.write_adapter(args.output_dir / ADAPTER_NAME, torch.float16)
            logger.info("adapter in %s", args.output_dir / ADAPTER_NAME)


def main(args: argparse.Namespace) -> None:
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=logging.INFO
    )
    trainer = Trainer(args)
    if trainer.accelerator.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        (args.output_dir / "training_args.json").write_text(json.dumps(config, indent=2) + "\n")
        trainer.accelerator.init_trackers("train_vton", {k: v for k, v in config.items() if v is not None})
    trainer.run()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
