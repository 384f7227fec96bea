"""Weights that exist elsewhere: CatVTON's, LCM-LoRA, and Stable Diffusion 1.5 in a single file."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny import box_mask, picture, run, seeded, tiny_pipe

from benchmarks import sd15
from pipeline_vton import StableDiffusionVTONPipeline, adapter_parameters, name_catvton_weights, widen_conv_in


# ---- CatVTON


def catvton_list(unet):
    """What CatVTON trains and saves: every module with `attn1` in its name, in one list."""
    return torch.nn.ModuleList([module for name, module in unet.named_modules() if "attn1" in name])


def save_catvton(file, in_channels=9, seed=21, stride=None, **changes):
    """A file in CatVTON's layout with random weights; `stride` 8 is what other diffusers versions make of the list."""
    unet = tiny_pipe(in_channels, seed=seed).unet
    whole = catvton_list(unet).state_dict()
    weights, tensors = {}, set()
    for name, weight in whole.items():  # duplicates dropped: the parts are in the list, and inside the whole
        if weight.data_ptr() not in tensors:
            tensors.add(weight.data_ptr())
            weights[name] = weight.clone()
    if stride is not None:
        places = sorted({int(name.split(".")[0]) for name in weights})
        weights = {
            f"{places.index(int(place)) * stride}.{part}": weight
            for (place, _, part), weight in ((name.partition("."), weight) for name, weight in weights.items())
        }
    weights |= changes
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: weight for name, weight in weights.items() if weight is not None}, file, {"format": "pt"})
    return unet


class ReturnInput(torch.nn.Module):
    def forward(self, hidden_states, **kwargs):
        return hidden_states


@torch.no_grad()
def published_catvton(pipe, file, person, cloth, mask, axis, steps, scale, generator):
    """CatVTON's own inference, written from its description alone; (B, 4, h, w) latents of the person's part.

    Masked weights: `noise 4 + mask 1 + masked person 4` on a canvas with the cloth below; mask-free ones (`mask` None):
    `noise 4 + whole person 4`, the cloth beside. Unconditional first, with a zero cloth; DDIM with eta 1.
    """
    unet, vae = copy.deepcopy(pipe.unet), pipe.vae
    saved = load_file(file)
    modules = catvton_list(unet)
    own = [i for i, module in enumerate(modules) if hasattr(module, "to_q")]
    for i, place in zip(own, sorted({int(name.split(".")[0]) for name in saved})):
        prefix = f"{place}."
        modules[i].load_state_dict({n.removeprefix(prefix): w for n, w in saved.items() if n.startswith(prefix)})
    for module in list(unet.modules()):
        if hasattr(module, "attn2"):
            module.attn2 = ReturnInput()

    def pixels(image):
        return torch.tensor(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1

    def encode(image):
        return vae.encode(image).latent_dist.mode() * vae.config.scaling_factor

    keep = 1.0 if mask is None else (torch.tensor(np.array(mask))[None, None] / 255 < 0.5).float()
    person, cloth = encode(pixels(person) * keep), encode(pixels(cloth))
    condition = torch.cat([person, cloth], dim=axis)
    condition = torch.cat([torch.cat([person, torch.zeros_like(cloth)], dim=axis), condition])
    if mask is not None:
        small = F.interpolate(1 - keep, size=person.shape[-2:], mode="nearest")
        small = torch.cat([small, torch.zeros_like(small)], dim=axis)
        condition = torch.cat([torch.cat([small, small]), condition], dim=1)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    shape = list(person.shape)
    shape[axis] *= 2
    latents = torch.randn(shape, generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        noisy = scheduler.scale_model_input(torch.cat([latents, latents]), t)
        without, with_cloth = unet(torch.cat([noisy, condition], dim=1), t, encoder_hidden_states=None).sample.chunk(2)
        noise = without + scale * (with_cloth - without)
        latents = scheduler.step(noise, t, latents, eta=1.0, generator=generator).prev_sample
    return latents.split(latents.shape[axis] // 2, dim=axis)[0]


@pytest.mark.parametrize("stride", [None, 8])
@pytest.mark.parametrize("mask_free", [False, True])
def test_catvtons_weights_give_what_its_own_pipeline_gives(hub, tmp_path, mask_free, stride):
    repository = "zhengchong/CatVTON-MaskFree" if mask_free else "zhengchong/CatVTON"
    file = tmp_path / "mix-48k-1024" / "attention" / "model.safetensors"
    save_catvton(file, in_channels=8 if mask_free else 9, stride=stride)
    hub.put(repository, tmp_path)
    pipe = tiny_pipe(8 if mask_free else 9)
    pictures = picture(1), picture(2, 32, 24), None if mask_free else box_mask()
    expected = published_catvton(
        pipe, file, *pictures, axis=3 if mask_free else 2, steps=4, scale=2.5, generator=seeded()
    )
    pipe.load_vton_adapter(repository, subfolder="mix-48k-1024/attention")
    options = {"num_inference_steps": 4, "height": 32, "width": 24, "output_type": "latent"}
    latents = pipe(*pictures, generator=seeded(), **options).images
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    assert (
        pipe(*pictures, generator=seeded(), **options | {"guidance_scale": 1.5}).images.sub(expected).abs().max()
        > 1e-2
    )


def test_catvtons_places_are_sd15s_attentions_with_the_mid_block_last():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**sd15.UNET | {"in_channels": 9})
        parts = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias")
        weights = {f"{8 * n}.{part}": torch.empty(n) for n in range(16) for part in parts}
    named = name_catvton_weights("model.safetensors", weights, unet)
    assert named.keys() == adapter_parameters(unet, "self_attention", widened=False).keys() and len(named) == 80
    places = {name.partition(".transformer_blocks")[0]: len(weight) for name, weight in named.items()}
    assert places["down_blocks.0.attentions.0"] == 0 and places["down_blocks.2.attentions.1"] == 5
    assert places["up_blocks.1.attentions.0"] == 6 and places["up_blocks.3.attentions.2"] == 14
    assert places["mid_block.attentions.0"] == 15


def test_catvtons_weights_bring_their_settings_and_leave_with_them(tmp_path):
    save_catvton(tmp_path / "model.safetensors")
    pipe = tiny_pipe(9)
    before, config = run(pipe), dict(pipe.config)
    pipe.load_vton_adapter(tmp_path)
    expected = {
        "cloth_conditioning": "joint",
        "canvas_axis": "height",
        "cross_attention": "identity",
        "condition_latents": "scaled",
        "mask_free": False,
        "guidance_scale": 2.5,
        "base_in_channels": 9,
        "trainable": "self_attention",
    }
    assert {name: pipe.config[name] for name in expected} == expected
    pipe.save_vton_adapter(tmp_path / "ours")  # from now on a file that says what it is
    again = tiny_pipe(9)
    again.load_vton_adapter(tmp_path / "ours")
    assert (run(again) == run(pipe)).all()
    pipe.unload_vton_adapter()
    assert (run(pipe) == before).all() and dict(pipe.config) == config


@pytest.mark.parametrize(
    "repository, channels, mask_free, kind",
    [
        ("CatVTON", 9, None, False),
        ("CatVTON-MaskFree", 8, None, True),
        ("my CatVTON weights", 9, None, False),
        ("weights", 8, None, True),
        ("weights", 8, True, True),
        ("CatVTON", 8, True, True),
        ("CatVTON-MaskFree", 9, False, False),
        ("CatVTON", 8, None, None),
        ("CatVTON-MaskFree", 9, None, None),
        ("weights", 9, True, None),
        ("weights", 8, False, None),
        ("CatVTON", 4, None, None),
    ],
)
def test_the_kind_of_catvtons_weights_is_known_or_refused(tmp_path, repository, channels, mask_free, kind):
    save_catvton(tmp_path / repository / "model.safetensors")
    pipe = tiny_pipe(channels)
    config, weights = dict(pipe.config), copy.deepcopy(pipe.unet.state_dict())
    if kind is None:
        with pytest.raises(ValueError, match=f"is for a base with [89] input channels .* this UNet has {channels}"):
            pipe.load_vton_adapter(tmp_path / repository, mask_free=mask_free)
        assert dict(pipe.config) == config
        assert all(torch.equal(weight, weights[name]) for name, weight in pipe.unet.state_dict().items())
    else:
        pipe.load_vton_adapter(tmp_path / repository, mask_free=mask_free)
        assert pipe.config.mask_free is kind and pipe.config.canvas_axis == ("width" if kind else "height")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"0.to_q.weight": None}, "1 weights missing.*attn1.to_q.weight is missing"),
        ({"0.to_q.weight": torch.zeros(8, 8)}, r"to_q.weight has shape \[8, 8\], not \[16, 16\]"),
        ({"0.to_q.weight": torch.full((16, 16), torch.nan)}, "damaged.*finite"),
        ({"98.to_q.weight": torch.zeros(16, 16)}, "self-attentions in CatVTON's layout, this UNet has"),
        ({"0.to_q.bias": torch.zeros(16)}, "must say format='vton-adapter'"),
    ],
)
def test_a_file_that_is_nearly_catvtons_is_refused(tmp_path, changes, message):
    save_catvton(tmp_path / "model.safetensors", **changes)
    pipe = tiny_pipe(9)
    before = run(pipe)
    with pytest.raises(ValueError, match=message):
        pipe.load_vton_adapter(tmp_path)
    assert (run(pipe) == before).all()


def test_mask_free_is_refused_where_an_adapter_says_otherwise(tmp_path):
    tiny_pipe(9).save_vton_adapter(tmp_path)
    with pytest.raises(ValueError, match="`mask_free`=True is not what the adapter .* says: False"):
        tiny_pipe(9).load_vton_adapter(tmp_path, mask_free=True)


# ---- LCM-LoRA


def save_lcm_lora(folder, unet):
    """A LoRA with the names that LCM-LoRA for SD1.5 has, and the weights that it adds, by the UNet's names."""
    saved, added = {}, {}
    generator = seeded(5)
    for name, module in unet.named_modules():
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2")):
            down, up = (
                torch.randn(2, module.weight.shape[1], generator=generator) / 10,
                torch.randn(module.weight.shape[0], 2, generator=generator) / 10,
            )
            if module.weight.ndim == 4:
                down, up = down[..., None, None], up[..., None, None]
            key = "lora_unet_" + name.replace(".", "_")
            saved |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)}
            added[name] = (up.flatten(1) @ down.flatten(1)).view_as(module.weight) / 2  # alpha / rank
    save_file(saved, folder / "pytorch_lora_weights.safetensors", {"format": "pt"})
    return added


def test_lcm_lora_and_its_scheduler_take_four_steps(tmp_path):
    adapter = tiny_pipe(9, seed=7)
    adapter.save_vton_adapter(tmp_path)
    pipe = tiny_pipe(9)
    pipe.load_vton_adapter(tmp_path)
    without = run(pipe)
    added = save_lcm_lora(tmp_path, pipe.unet)
    fused = tiny_pipe(9)
    fused.load_vton_adapter(tmp_path)
    with torch.no_grad():
        for name, weight in added.items():
            fused.unet.get_submodule(name).weight.add_(weight)
    pipe.load_lora_weights(tmp_path)
    options = {"num_inference_steps": 4, "guidance_scale": 1.0}
    for each in (pipe, fused):
        each.scheduler = LCMScheduler.from_config(each.scheduler.config)
    calls = []
    hook = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    few = run(pipe, **options)
    hook.remove()
    assert len(calls) == 5  # the cloth once, and four steps of one branch
    np.testing.assert_allclose(few, run(fused, **options), atol=1e-4)
    assert np.abs(few - run(pipe, **options | {"num_inference_steps": 8})).max() > 1e-3
    pipe.unload_lora_weights()
    pipe.scheduler = tiny_pipe(9).scheduler
    assert (run(pipe) == without).all()


# ---- a single file


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def ldm_unet(unet):
    """The tiny UNet's weights by the names of the original Stable Diffusion code."""
    places = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    block = 1
    for i, down in enumerate(unet.down_blocks):
        for j in range(len(down.resnets)):
            places[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{block}.0"
            places[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{block}.1"
            block += 1
        if down.downsamplers:
            places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{block}.0.op"
            block += 1
    block = 0
    for i, up in enumerate(unet.up_blocks):
        for j in range(len(up.resnets)):
            places[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{block}.0"
            places[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{block}.1"
            block += 1
        last = 2 if hasattr(up, "attentions") else 1
        places[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{block - 1}.{last}"
    return renamed(unet, places, RESNET)


def ldm_vae(vae):
    levels = len(vae.encoder.down_blocks)
    places = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        places |= {f"{half}.conv_in": f"{half}.conv_in", f"{half}.conv_out": f"{half}.conv_out"}
        places |= {f"{half}.conv_norm_out": f"{half}.norm_out", f"{half}.mid_block.attentions.0": f"{half}.mid.attn_1"}
        places |= {f"{half}.mid_block.resnets.{j}": f"{half}.mid.block_{j + 1}" for j in range(2)}
    for i in range(levels):
        for j in range(2):
            places[f"encoder.down_blocks.{i}.resnets.{j}"] = f"encoder.down.{i}.block.{j}"
            places[f"decoder.up_blocks.{i}.resnets.{j}"] = f"decoder.up.{levels - 1 - i}.block.{j}"
        places[f"encoder.down_blocks.{i}.downsamplers.0"] = f"encoder.down.{i}.downsample"
        places[f"decoder.up_blocks.{i}.upsamplers.0"] = f"decoder.up.{levels - 1 - i}.upsample"
    parts = {
        "conv_shortcut": "nin_shortcut",
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }
    return renamed(vae, places, parts)


def renamed(module, places, parts):
    weights = {}
    for name, weight in module.state_dict().items():
        place = next(place for place in sorted(places, key=len, reverse=True) if name.startswith(place + "."))
        inner = name.removeprefix(place + ".")
        if "resnets" in place or "mid_block.attentions" in place:
            for ours, theirs in parts.items():
                inner = theirs + inner.removeprefix(ours) if inner.startswith(ours + ".") else inner
        weights[f"{places[place]}.{inner}"] = weight.clone()
    return weights


@pytest.mark.parametrize("in_channels, base", [(4, "stable-diffusion-v1-5"), (9, "stable-diffusion-inpainting")])
def test_a_single_file_is_a_base_like_any_other(hub, tmp_path, in_channels, base):
    pipe = tiny_pipe(in_channels, text=True)
    StableDiffusionPipeline(
        pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.unet, pipe.scheduler, None, None, requires_safety_checker=False
    ).save_pretrained(tmp_path / "configs")  # fmt: skip
    for weights in (tmp_path / "configs").rglob("*.safetensors"):
        weights.unlink()
    hub.put(f"stable-diffusion-v1-5/{base}", tmp_path / "configs")
    text = {f"cond_stage_model.transformer.text_model.{n}": w for n, w in pipe.text_encoder.state_dict().items()}
    checkpoint = {f"model.diffusion_model.{n}": w for n, w in ldm_unet(pipe.unet).items()} | text
    checkpoint |= {f"first_stage_model.{n}": w for n, w in ldm_vae(pipe.vae).items()}
    save_file(checkpoint, tmp_path / "finetune.safetensors")
    trained = tiny_pipe(in_channels, seed=7)
    if in_channels == 4:
        widen_conv_in(trained.unet)
    trained.save_vton_adapter(tmp_path)

    loaded = StableDiffusionVTONPipeline.from_single_file(tmp_path / "finetune.safetensors")
    loaded.set_progress_bar_config(disable=True)
    for each in (pipe, loaded):
        each.load_vton_adapter(tmp_path)
    loaded.scheduler = pipe.scheduler
    np.testing.assert_allclose(run(loaded), run(pipe), atol=1e-5)
