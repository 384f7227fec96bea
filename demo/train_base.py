"""Train the demo's stand-in for Stable Diffusion 1.5 inpainting: the same classes, 11.6 million weights, a drawn world.

Like SD1.5, it sees people and flat cloths, in whole and through masks, and as on a catalogue's page two people in the same
cloth side by side, but never a person beside their flat cloth: what it learns is how the drawn world looks, and to copy from one
place of a picture to another, not how to try a cloth on. The result is an ordinary diffusers folder.

The VAE, the UNet and once more the VAE's decoder are trained in turn. The same command goes on where a killed one stopped:
every stage keeps checkpoints (weights, optimiser, averages, generators), and a finished stage is kept and used. TensorBoard
logs and sheets of held-out samples lie in `--output_dir`.
"""

import argparse
import hashlib
import math
import shutil
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, get_wsd_schedule

from demo.try_on import fast_device
from train_vton import TreePairs


CAPTIONS = ("", "a person", "a cloth")
KINDS = ("person", "cloth")
PEOPLE_SHARE = 0.6  # of the pictures that are no pages of two; the others are cloths
MASK_SHARES = {  # of the same pictures, by what they show and what hides parts of it
    ("person", "agnostic"): 0.65 * PEOPLE_SHARE,
    ("person", "random"): 0.2 * PEOPLE_SHARE,
    ("person", "full"): 0.15 * PEOPLE_SHARE,
    ("cloth", "random"): 0.8 * (1 - PEOPLE_SHARE),
    ("cloth", "full"): 0.2 * (1 - PEOPLE_SHARE),
}
HELD_OUT_TIMESTEPS = (100, 300, 500, 700, 900)


# ---------------------------------------------------------------------------------------------------------------- data


@dataclass
class Pictures:
    """One kind of picture, held in memory: uint8 (N, 3, H, W), and the masks (N, 1, H, W) that hide parts of it."""

    images: torch.Tensor
    masks: dict[str, torch.Tensor]

    def to(self, device: torch.device) -> "Pictures":
        return Pictures(self.images.to(device), {kind: masks.to(device) for kind, masks in self.masks.items()})


def random_masks(count: int, height: int, width: int) -> torch.Tensor:
    """One to three overlapping rectangles a mask, each a quarter to four fifths of a side long: (N, 1, H, W), 0 or 255."""
    masks = torch.zeros(count, 1, height, width, dtype=torch.uint8)
    for mask in masks:
        for _ in range(int(torch.randint(1, 4, ()))):
            size, place = torch.rand(2) * 0.55 + 0.25, torch.rand(2)
            rows, columns = int(size[0] * height), int(size[1] * width)
            top, left = int(place[0] * (height - rows)), int(place[1] * (width - columns))
            mask[:, top : top + rows, left : left + columns] = 255
    return masks


def load_pairs(root: Path, split: str) -> TreePairs:
    return TreePairs(root, split, paired=True, roles=("person", "cloth", "mask", "condition"))


def load_pictures(pairs: TreePairs) -> dict[str, Pictures]:
    """All people, cloths and agnostic masks of a split, and random masks for both; `changed` are the people in the next's cloth."""

    def stack(role: str) -> torch.Tensor:
        arrays = np.stack([np.asarray(picture[role]) for picture in tqdm(rows, desc=f"{role} pictures", leave=False)])
        return torch.from_numpy(arrays if arrays.ndim == 4 else arrays[..., None]).permute(0, 3, 1, 2).contiguous()

    rows = [pairs.pictures(i) for i in tqdm(range(len(pairs)), desc="reading")]
    people, cloths, agnostic, changed = map(stack, ("person", "cloth", "mask", "condition"))
    hidden = partial(random_masks, len(rows), *people.shape[-2:])
    return {
        "person": Pictures(people, {"agnostic": agnostic, "random": hidden()}),
        "cloth": Pictures(cloths, {"random": hidden()}),
        "changed": Pictures(changed, {"agnostic": agnostic}),
    }


def before_their_next(pairs: TreePairs) -> torch.Tensor:
    """The numbers of the pairs that the next one of their category follows, whose cloth they wear in `changed`."""
    folders = [files["person"].parent for *_, files in pairs.pairs]
    return torch.tensor([i for i in range(len(pairs) - 1) if folders[i] == folders[i + 1]], dtype=torch.long)


def to_model(images: torch.Tensor) -> torch.Tensor:
    """uint8 to [-1, 1]."""
    return images.float() / 127.5 - 1


def hide(images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Grey where the mask is white, as the inpainting pipelines do."""
    return images * (masks < 128)


def save_sheet(file: Path, columns: list[torch.Tensor]) -> None:
    """Pictures (N, 3, H, W) in [-1, 1], one column for each of the tensors."""
    rows = torch.cat([torch.cat(list(column.cpu()), dim=1) for column in columns], dim=2)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(((rows.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(file)


# -------------------------------------------------------------------------------------------------------------- a stage


@contextmanager
def undisturbed(seed: int):
    """What happens inside draws from a seed of its own, and leaves the generators of the training as they were."""
    with torch.random.fork_rng([0] if torch.cuda.is_available() else []), torch.no_grad():
        torch.manual_seed(seed)
        yield


class Captured:
    """A function of a GPU's tensors, as one CUDA graph for each shape of theirs: a small network's thousands of kernels take longer to
    launch one by one than to run.

    Args:
        function: draws nothing and waits for nothing; what it leaves in tensors that were there before, as gradients, is left by a
            replay too.
        kept: tensors that it adds to at each call, which are none the wiser for the calls that come before the first graph.
    """

    def __init__(self, function: Callable[..., torch.Tensor], kept: list[torch.Tensor]) -> None:
        self.function, self.kept, self.graphs = function, kept, {}

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        shapes = tuple(each.shape for each in inputs)
        if shapes not in self.graphs:
            self.graphs[shapes] = self.capture([each.clone() for each in inputs])
        graph, places, result = self.graphs[shapes]
        for place, value in zip(places, inputs):
            place.copy_(value)
        graph.replay()
        return result.clone()

    def capture(self, places: list[torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor], torch.Tensor]:
        before = [each.clone() for each in self.kept]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # libraries choose their kernels, and gradients find their places
                self.function(*places)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self.function(*places)
        for place, value in zip(self.kept, before):
            place.copy_(value)
        return graph, places, result


Drawn = tuple[torch.Tensor, ...]


@dataclass
class Stage:
    """A training loop that goes on where a kill stopped it.

    Checkpoints are written under another name first, and hold all that the loop draws on; the last one is kept. The
    learning rate stays at its height until the last quarter, so that a run can be given more steps, or fewer.
    """

    name: str
    module: torch.nn.Module
    trained: list[torch.nn.Parameter]
    steps: int
    learning_rate: float
    weight_decay: float
    average: bool  # publish the moving average of the weights
    args: argparse.Namespace

    @property
    def folder(self) -> Path:
        return self.args.output_dir / "checkpoints" / self.name

    def train(
        self,
        draw: Callable[[], Drawn],
        loss: Callable[..., torch.Tensor],
        report: Callable[[int], dict[str, float]],
    ) -> None:
        """Minimise `loss(*draw())`, which draws nothing itself; `report(step)` says how held-out pictures fare, with the weights
        that will be published.
        """
        logs = {"log_with": "tensorboard", "project_dir": str(self.args.output_dir)}
        uncached = AutocastKwargs(cache_enabled=False)  # a graph casts weights as they are when it is replayed
        on_cpu = fast_device().type == "cpu"
        accelerator = Accelerator(
            cpu=on_cpu, mixed_precision=self.args.mixed_precision, kwargs_handlers=[uncached], **logs
        )
        torch.manual_seed(self.args.seed)
        optimizer = torch.optim.AdamW(
            self.trained, lr=self.learning_rate, weight_decay=self.weight_decay, betas=(0.9, 0.99), fused=True
        )
        warmup, decay = min(200, self.steps // 10), self.steps // 4
        schedule = get_wsd_schedule(
            optimizer, num_warmup_steps=warmup, num_decay_steps=decay, num_training_steps=self.steps
        )
        _, optimizer, schedule = accelerator.prepare(self.module, optimizer, schedule)
        ema = EMAModel(self.trained, decay=0.999, use_ema_warmup=True, power=0.75, foreach=True)
        accelerator.register_for_checkpointing(ema)
        done = self.resume(accelerator)
        ema.to(accelerator.device)  # what accelerate restores of it lies on the CPU
        repeated = {"tensorboard": {"purge_step": done + 1}}  # what a killed run logged after its last checkpoint
        accelerator.init_trackers(f"logs-{self.name}", init_kwargs=repeated)

        def descend(*drawn: torch.Tensor) -> torch.Tensor:
            optimizer.zero_grad(set_to_none=False)
            with accelerator.autocast():
                value = loss(*drawn)
            accelerator.backward(value)
            return value.detach()

        descend = descend if on_cpu else Captured(descend, list(self.module.buffers()))
        bar, losses = tqdm(range(done, self.steps), initial=done, total=self.steps, desc=self.name), deque(maxlen=200)
        for step in range(done + 1, self.steps + 1):
            losses.append(descend(*draw()))  # read when it is shown: nobody waits for a GPU after each step
            accelerator.clip_grad_norm_(self.trained, 1.0)
            optimizer.step()
            schedule.step()
            if self.average:
                ema.step(self.trained)
            bar.update()
            if step % 50 == 0:
                log = {f"{self.name}/loss": mean(list(losses)[-50:]), f"{self.name}/lr": schedule.get_last_lr()[0]}
                accelerator.log(log, step=step)
            if step % self.args.checkpointing_steps == 0 or step == self.steps:
                self.save(accelerator, step)
                with self.published(ema), undisturbed(self.args.seed):
                    held_out = report(step)
                accelerator.log({f"{self.name}/{name}": value for name, value in held_out.items()}, step=step)
                shown = "  ".join(f"{name} {value:.4f}" for name, value in held_out.items())
                tqdm.write(f"{self.name} step {step}  loss {mean(list(losses)):.4f}  {shown}")
        if self.average:
            ema.copy_to(self.trained)
        optimizer.zero_grad(set_to_none=True)
        accelerator.end_training()
        accelerator.unwrap_model(self.module, keep_fp32_wrapper=False).eval().requires_grad_(False)

    @contextmanager
    def published(self, ema: EMAModel):
        training = self.module.training
        self.module.eval()
        if self.average:
            ema.store(self.trained)
            ema.copy_to(self.trained)
        yield
        if self.average:
            ema.restore(self.trained)
        self.module.train(training)

    def save(self, accelerator: Accelerator, step: int) -> None:
        unfinished, finished = self.folder / "unfinished", self.folder / f"{step:06d}"
        shutil.rmtree(unfinished, ignore_errors=True)
        accelerator.save_state(str(unfinished))
        unfinished.rename(finished)
        for older in set(self.finished()) - {finished}:
            shutil.rmtree(older)

    def finished(self) -> list[Path]:
        return sorted(folder for folder in self.folder.glob("*") if folder.name.isdecimal())

    def resume(self, accelerator: Accelerator) -> int:
        """The number of steps that are done."""
        if not self.finished():
            return 0
        accelerator.load_state(str(self.finished()[-1]))
        return int(self.finished()[-1].name)


def mean(losses: list[torch.Tensor]) -> float:
    return torch.stack(losses).mean().item()


def psnr(error: torch.Tensor) -> float:
    """Of an error in a range of two, from -1 to 1."""
    return 10 * math.log10(4 / error.square().mean().item())


# ----------------------------------------------------------------------------------------------------------------- VAE


def build_vae(height: int) -> AutoencoderKL:
    """Latents have a quarter of a picture's sides."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        mid_block_add_attention=False,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=height,
    )


class VAETraining:
    """Reconstruct pictures, one in six behind a mask; then the decoder once more, by itself.

    Drawn pictures vary twenty times more in brightness than along either colour axis. A small VAE trained on the plain error
    spends its four channels on edges and forgets a colour axis for good, so its first and last layers start from whitened
    colours, and the error is whitened half-way. The decoder's own stage has the plain error, and leaves latents as they are.
    """

    def __init__(self, vae: AutoencoderKL, pictures: dict[str, Pictures], held_out: Pictures, args) -> None:
        self.vae, self.pictures, self.held_out, self.args = vae, pictures, held_out, args
        sample = torch.cat([to_model(pictures[name].images[:512]) for name in KINDS])
        self.variances, self.axes = torch.linalg.eigh(torch.cov(sample.movedim(1, -1).reshape(-1, 3).T))

    def whitening(self, power: float) -> torch.Tensor:
        return self.axes @ torch.diag((self.variances / self.variances.mean()) ** power) @ self.axes.T  # (3, 3)

    @torch.no_grad()
    def initialize(self) -> None:
        first, last = self.vae.encoder.conv_in.weight, self.vae.decoder.conv_out.weight
        first.copy_(torch.einsum("ochw,cd->odhw", first, self.whitening(-0.5)))
        last.copy_(torch.einsum("co,oihw->cihw", self.whitening(0.5), last))
        self.vae.quant_conv.bias[4:] = -8.0  # the posterior starts almost without noise

    def draw(self) -> Drawn:
        """A batch (B, 3, H, W) in [-1, 1]: three people to two cloths, one in six behind a mask; and noise (B, 4, h, w)."""
        batch = []
        people = round(self.args.batch_size * PEOPLE_SHARE)
        for name, count in (("person", people), ("cloth", self.args.batch_size - people)):
            kind = self.pictures[name]
            chosen = torch.randint(len(kind.images), (count,))
            images = to_model(kind.images[chosen])
            hidden = torch.rand(count, 1, 1, 1, device=images.device) < 1 / 6
            batch.append(torch.where(hidden, hide(images, kind.masks["random"][chosen]), images))
        batch = torch.cat(batch)
        height, width = batch.shape[-2:]
        return batch, torch.randn(len(batch), 4, height // 4, width // 4, device=batch.device)

    def draw_noisy(self) -> Drawn:
        """As `draw`, with noise from none to a third of the latents' deviation: as wrong as a UNet's are (arXiv:2510.11690)."""
        batch, noise = self.draw()
        strength = torch.rand(len(batch), 1, 1, 1, device=batch.device) * 0.35 / self.vae.config.scaling_factor
        return batch, strength * noise

    def loss(self, batch: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Of the decoded sample, and of the halved picture, which halved latents must show: smooth latents, which a UNet learns
        far sooner (arXiv:2502.09509). The divergence is a sum over latents and the error a mean: at 1e-6 it drowns channels.
        """
        posterior = self.vae.encode(batch).latent_dist
        latents = posterior.mean + posterior.std * noise
        halved = self.error(F.avg_pool2d(latents, 2), F.avg_pool2d(batch, 2))
        return self.error(latents, batch) + 0.25 * halved + 1e-8 * posterior.kl().mean()

    def error(self, latents: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
        """Its fine part with colours whitened half-way, its coarse part, most of what is wrong with colours, whitened."""
        error = self.vae.decode(latents).sample - pictures
        fine = torch.einsum("cd,bdhw->bchw", self.whitening(-0.25), error)
        coarse = torch.einsum("cd,bdhw->bchw", self.whitening(-0.5), F.avg_pool2d(error, 4))
        return fine.square().mean() + 0.1 * fine.abs().mean() + 0.5 * coarse.square().mean()

    def decoder_loss(self, batch: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The plain error of what is decoded of noisy latents."""
        with torch.no_grad():
            latents = self.vae.encode(batch).latent_dist.mode()
        error = self.vae.decode(latents + noise).sample - batch
        return error.square().mean() + 0.05 * error.abs().mean()

    def report(self, step: int, name: str = "vae") -> dict[str, float]:
        """PSNR of held-out people, whole and inside the agnostic mask."""
        images, masks = to_model(self.held_out.images), self.held_out.masks["agnostic"] >= 128
        decoded = torch.cat([self.vae.decode(self.vae.encode(x).latent_dist.mode()).sample for x in images.split(16)])
        error = decoded.clamp(-1, 1) - images
        save_sheet(self.args.output_dir / "samples" / f"{name}-{step:06d}.png", [images[:8], decoded[:8]])
        return {"psnr": psnr(error), "psnr_in_mask": psnr(error[masks.expand_as(error)])}


def train_vae(pictures: dict[str, Pictures], held_out: Pictures, args) -> AutoencoderKL:
    """A VAE, and its `scaling_factor` such that latents have unit variance."""
    torch.manual_seed(args.seed)
    vae = build_vae(held_out.images.shape[-2]).to(held_out.images.device)
    training = VAETraining(vae, pictures, held_out, args)
    training.initialize()
    stage = Stage("vae", vae, list(vae.parameters()), args.vae_steps, 3e-3, 1e-4, average=False, args=args)
    stage.train(training.draw, training.loss, training.report)
    with torch.no_grad():
        sample = [vae.encode(to_model(pictures[name].images[:256])).latent_dist.mode() for name in KINDS]
    vae.register_to_config(scaling_factor=1 / torch.cat(sample).std().item())
    return vae


def train_decoder(vae: AutoencoderKL, pictures: dict[str, Pictures], held_out: Pictures, args) -> None:
    trained = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    training = VAETraining(vae, pictures, held_out, args)
    stage = Stage("decoder", vae, trained, args.decoder_steps, 2e-3, 1e-4, average=True, args=args)
    stage.train(training.draw_noisy, training.decoder_loss, partial(training.report, name="decoder"))


# ------------------------------------------------------------------------------------------------------------- latents


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor, masks: torch.Tensor, desc: str) -> torch.Tensor:
    """Scaled means of the posteriors of pictures behind masks, (N, 4, h, w), in half precision."""
    batches = tqdm(list(zip(images.split(64), masks.split(64))), desc=desc)
    means = [vae.encode(hide(to_model(seen), mask)).latent_dist.mean for seen, mask in batches]
    return (torch.cat(means) * vae.config.scaling_factor).half()


def encode_pictures(vae: AutoencoderKL, pictures: dict[str, Pictures]) -> dict[str, torch.Tensor]:
    """By `picture.part`: mean (N, 4, h, w), and conditions (N, 5, h, w), the mask and what is seen beside it.

    The posteriors' deviations, of which the VAE's loss leaves next to nothing, are left out.
    """
    encoded = {}
    for name, p in pictures.items():
        nothing = torch.zeros_like(p.images[:, :1])
        encoded[f"{name}.mean"] = encode(vae, p.images, nothing, f"{name} latents")
        everything = torch.full_like(nothing[:1], 255)
        for kind, masks in {**p.masks, "full": everything}.items():
            mask = F.interpolate((masks >= 128).half(), size=encoded[f"{name}.mean"].shape[-2:])  # nearest
            seen = encode(vae, p.images[: len(masks)], masks, f"{name} behind {kind} masks")
            encoded[f"{name}.{kind}"] = torch.cat([mask, seen], dim=1)  # one "full" serves all
    return encoded


def cached_latents(vae: AutoencoderKL, pictures: dict[str, Pictures], pairs: TreePairs, file: Path) -> dict:
    """`encode_pictures`, once for these pairs and this VAE."""
    weights = b"".join(v.contiguous().cpu().numpy().tobytes() for v in vae.encoder.state_dict().values())
    identity = hashlib.sha256(weights + repr(pairs.identity()).encode()).hexdigest()
    if file.is_file():
        with safe_open(file, "pt") as stored:
            if (stored.metadata() or {}).get("identity") == identity:
                return load_file(file, str(vae.device))
    latents = encode_pictures(vae, pictures)
    save_file(latents, file.with_suffix(".unfinished"), metadata={"identity": identity})
    file.with_suffix(".unfinished").rename(file)
    return latents


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
    """Self-attention on every level, the finest included: what a cloth shows is read where it is seen."""
    return UNet2DConditionModel(
        sample_size=round(math.sqrt(math.prod(latent_size))),  # StableDiffusionInpaintPipeline takes no pair
        in_channels=9,
        out_channels=4,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=(1, 4, 4),
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


# Clean latents (B, 4, h, w), what is seen of them (B, 5, h, w) and the numbers of the captions (B,).
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def on_one_page(first: Batch, second: Batch, dim: int) -> Batch:
    """Two batches as one of pictures twice as high (2) or wide (3), with the captions of the first."""
    return torch.cat([first[0], second[0]], dim), torch.cat([first[1], second[1]], dim), first[2]


@dataclass
class UNetTraining:
    """The plain error of what the scheduler has the UNet predict, velocities: of pictures, and of two people on one page.

    Args:
        followed, held_out_followed: `before_their_next` of both splits.
    """

    pipe: StableDiffusionInpaintPipeline
    latents: dict[str, torch.Tensor]
    followed: torch.Tensor
    held_out: dict[str, Pictures]
    held_out_followed: torch.Tensor
    args: argparse.Namespace

    def __post_init__(self) -> None:
        tokens = self.pipe.tokenizer(list(CAPTIONS), padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            self.caption_embeds = self.pipe.text_encoder(tokens.to(self.pipe.device))[0]  # (captions, 16, 32)
        self.held_out_latents = encode_pictures(self.pipe.vae, self.held_out)

    def draw(self, latents: dict[str, torch.Tensor], count: int) -> Batch:
        """Three people to two cloths on average, behind masks of random kinds, half without text."""
        drawn = torch.multinomial(torch.tensor(list(MASK_SHARES.values())), count, replacement=True)
        targets, conditions, captions = [], [], []
        for (name, kind), number in zip(MASK_SHARES, drawn.bincount(minlength=len(MASK_SHARES)).tolist()):
            chosen = torch.randint(len(latents[f"{name}.mean"]), (number,))
            targets.append(latents[f"{name}.mean"][chosen])
            conditions.append(latents[f"{name}.{kind}"][chosen if kind != "full" else torch.zeros_like(chosen)])
            captions.append(CAPTIONS.index(f"a {name}") * (torch.rand(number) < 0.5))
        return torch.cat(targets).float(), torch.cat(conditions).float(), torch.cat(captions)

    def draw_views(self, latents: dict[str, torch.Tensor], numbers: torch.Tensor) -> tuple[Batch, Batch]:
        """Two people in the same cloth, of numbers that are followed: one behind the agnostic mask, the other to be seen; without text."""
        cut = (
            len(numbers) + int(torch.rand(()) < 0.5)
        ) // 2  # who is hidden: half of them in one cloth, half in the other
        first, second = numbers[:cut], numbers[cut:] + 1
        hidden = {"changed": first, "person": second}
        shown = {"person": first + 1, "changed": second - 1}

        def stack(kind: str, chosen: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.cat([latents[f"{name}.{kind}"][i] for name, i in chosen.items()]).float()

        no_text, seen = torch.zeros(len(numbers), dtype=torch.long), stack("mean", shown)
        unmasked = F.pad(seen, (0, 0, 0, 0, 1, 0))  # its mask hides nothing
        return (stack("mean", hidden), stack("agnostic", hidden), no_text), (seen, unmasked, no_text)

    def with_noise(self, batch: Batch, timesteps: torch.Tensor) -> Drawn:
        """What the UNet is given, (B, 9, h, w), timesteps and embeddings; and the velocities that it should predict, (B, 4, h, w)."""
        targets, conditions, captions = batch
        timesteps = timesteps.to(targets.device)
        noise = torch.randn_like(targets)
        noisy = self.pipe.scheduler.add_noise(targets, noise, timesteps)
        velocities = self.pipe.scheduler.get_velocity(targets, noise, timesteps)
        return torch.cat([noisy, conditions], dim=1), timesteps, self.caption_embeds[captions], velocities

    def errors(
        self, model_input: torch.Tensor, timesteps: torch.Tensor, embeds: torch.Tensor, velocities: torch.Tensor
    ) -> torch.Tensor:
        """Squared, (B, 4, h, w)."""
        predicted = self.pipe.unet(model_input, timesteps, embeds, return_dict=False)[0]
        return (predicted.float() - velocities).square()

    def timesteps(self, count: int) -> torch.Tensor:
        """One of every equal share of the schedule: the same mean as drawing each alone, with less luck."""
        return ((torch.randperm(count) + torch.rand(count)) / count * len(self.pipe.scheduler.betas)).long()

    def draw_step(self) -> Drawn:
        """Of a batch's first half, pictures; of its second, pages of two, beside or above one another, one of them known."""
        views = self.args.batch_size // 2
        count = self.args.batch_size - views
        drawn = self.with_noise(self.draw(self.latents, count), self.timesteps(count))
        if views:
            pair = self.draw_views(self.latents, self.followed[torch.randint(len(self.followed), (views,))])
            pair = pair[:: 1 if torch.rand(()) < 0.5 else -1]
            page = on_one_page(*pair, dim=int(torch.randint(2, 4, ())))
            drawn += self.with_noise(page, self.timesteps(views))
        return drawn

    def loss(self, *drawn: torch.Tensor) -> torch.Tensor:
        """Pages count twice, since they hold twice the pixels."""
        pictures, pages = drawn[:4], drawn[4:]
        return self.errors(*pictures).mean() + (2 * self.errors(*pages).mean() if pages else 0)

    def reading(self, timestep: int) -> dict[str, float]:
        """The error behind the masks of held-out people above another in the same cloth, and in a wrong one."""
        followed, errors = self.held_out_followed, []
        hidden, shown = self.draw_views(self.held_out_latents, followed[torch.randperm(len(followed))[:32]])
        hole, timesteps = (hidden[1][:, :1] > 0).expand_as(hidden[0]), torch.full((len(hidden[0]),), timestep)
        for other in (shown, tuple(part.roll(1, dims=0) for part in shown)):
            with undisturbed(self.args.seed):  # the same noise for both
                error = self.errors(*self.with_noise(on_one_page(hidden, other, dim=2), timesteps))
            errors.append(error[:, :, : hole.shape[2]][hole].mean().item())
        return {f"read t{timestep}": errors[0], f"misread t{timestep}": errors[1]}

    def report(self, step: int) -> dict[str, float]:
        """Errors on held-out pictures by timestep; a sheet of masked people and of what stands behind the masks."""
        batch = self.draw(self.held_out_latents, 48)
        errors = {
            t: self.errors(*self.with_noise(batch, torch.full((48,), t))).mean().item() for t in HELD_OUT_TIMESTEPS
        }
        people = self.held_out["person"]
        images = to_model(people.images[:8])
        results = self.pipe(
            prompt=["a person"] * len(images),
            image=images / 2 + 0.5,
            mask_image=(people.masks["agnostic"][:8] >= 128).float(),
            height=images.shape[-2],
            width=images.shape[-1],
            num_inference_steps=20,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(self.args.seed),
            output_type="pt",
        ).images
        masked = hide(images, people.masks["agnostic"][:8])
        sheet = self.args.output_dir / "samples" / f"unet-{step:06d}.png"
        save_sheet(sheet, [images, masked, results.float() * 2 - 1])
        found = {"held_out": float(np.mean(list(errors.values())))} | {f"t{t}": error for t, error in errors.items()}
        return found | self.reading(HELD_OUT_TIMESTEPS[-2])


# ---------------------------------------------------------------------------------------------------------------- main


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset_root", type=Path, required=True, help="a folder that `python -m demo.make_dataset` wrote"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="where the diffusers folder goes")
    parser.add_argument("--vae_steps", type=int, default=1500, help="steps of the VAE (default 1500)")
    parser.add_argument("--unet_steps", type=int, default=10000, help="steps of the UNet (default 10000)")
    parser.add_argument("--decoder_steps", type=int, default=1500, help="steps of the decoder alone (default 1500)")
    parser.add_argument(
        "--batch_size", type=int, default=16, help="pictures a step; half of the UNet's are pages of two (default 16)"
    )
    parser.add_argument("--learning_rate", type=float, default=8e-4, help="the UNet's highest rate (default 8e-4)")
    parser.add_argument(
        "--mixed_precision",
        choices=("no", "bf16"),
        default="no",
        help="bf16 pays on GPUs and on CPUs with AMX (default no)",
    )
    parser.add_argument(
        "--checkpointing_steps", type=int, default=250, help="steps between checkpoints and reports (default 250)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and noise (default 0)")
    args = parser.parse_args(input_args)
    for name in ("vae_steps", "unet_steps", "decoder_steps", "batch_size", "checkpointing_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be positive, got {getattr(args, name)}")
    return args


def main(args: argparse.Namespace) -> None:
    pairs, held_out_pairs = (load_pairs(args.dataset_root, split) for split in ("train", "test"))
    followed = {"train": before_their_next(pairs), "test": before_their_next(held_out_pairs)}
    for split, numbers in followed.items():
        if not len(numbers):
            raise ValueError(f"--dataset_root {args.dataset_root}: no category has two {split} pairs")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    device = fast_device()
    pictures, held_out = (
        {name: kind.to(device) for name, kind in load_pictures(read).items()} for read in (pairs, held_out_pairs)
    )

    vae = train_vae(pictures, held_out["person"], args)
    latents = cached_latents(vae, pictures, pairs, args.output_dir / "latents.safetensors")

    torch.manual_seed(args.seed)
    tokenizer, text_encoder = build_text_encoder()
    unet = build_unet(latents["person.mean"].shape[-2:], text_encoder.config.hidden_size)
    pipe = StableDiffusionInpaintPipeline(
        vae, text_encoder, tokenizer, unet, build_scheduler(), None, None, requires_safety_checker=False
    )
    pipe.to(device)
    if args.mixed_precision == "bf16":  # as the units that multiply bf16 read them
        unet.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)
    training = UNetTraining(pipe, latents, followed["train"], held_out, followed["test"], args)
    stage = Stage("unet", unet, list(unet.parameters()), args.unet_steps, args.learning_rate, 1e-3, True, args)
    stage.train(training.draw_step, training.loss, training.report)

    train_decoder(vae, pictures, held_out["person"], args)
    # The text encoder stays in float32: transformers loads what was saved, and a default load must not mix dtypes.
    vae.to(torch.float16)
    unet.to(torch.float16, memory_format=torch.contiguous_format)
    pipe.save_pretrained(args.output_dir)
    print(f"base in {args.output_dir}")


if __name__ == "__main__":
    main(parse_args())
