"""SD2- and SDXL-shaped UNets go through pipeline and trainer as SD1.5-shaped ones do."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from test_attention import assert_same_latents, conditioning_of, latents_of, uncached
from test_train import LONG, equal, flags
from tiny import picture, run, seeded, tiny_pipe, tiny_unet

from benchmarks import backbones
from pipeline_vton import (
    ADAPTER_NAME,
    LORA_NAME,
    StableDiffusionVTONPipeline,
    added_conditions,
    widen_conv_in,
    within_range,
)
from train_vton import TRAINED_NAME, Trainer, main, parse_args


pytestmark = pytest.mark.usefixtures("fresh_accelerate")
SHAPES = {
    "sd2": {"use_linear_projection": True, "attention_head_dim": (2, 4), "cross_attention_dim": 40},
    "sdxl": {
        "use_linear_projection": True,
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 2),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 20,
    },
}
PREDICTION = {"sd2": "v_prediction", "sdxl": "epsilon"}


def shaped_pipe(shape: str, channels: int = 9, **settings) -> StableDiffusionVTONPipeline:
    torch.manual_seed(0)
    unet, tiny = UNet2DConditionModel.from_config(tiny_unet(channels).config, **SHAPES[shape]).eval(), tiny_pipe(9)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".attn" in name:
                parameter.mul_(3)
    scheduler = DDPMScheduler.from_config(tiny.scheduler.config, prediction_type=PREDICTION[shape])
    pipe = StableDiffusionVTONPipeline(tiny.vae, unet, scheduler, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def shaped(tmp_path_factory) -> dict[tuple[str, int], Path]:
    root = tmp_path_factory.mktemp("shaped")
    for shape, channels in (("sd2", 9), ("sdxl", 9), ("sdxl", 4)):
        for name, component in shaped_pipe(shape, channels).components.items():
            if component is not None:
                component.save_pretrained(root / f"{shape}-{channels}" / name)
    return {(shape, n): root / f"{shape}-{n}" for shape, n in (("sd2", 9), ("sdxl", 9), ("sdxl", 4))}


def say_sizes(unet: UNet2DConditionModel, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A hook, for calls of a UNet that say nothing of sizes."""
    return args, {"added_cond_kwargs": added_conditions(unet, args[0], 4)} | kwargs


@pytest.mark.parametrize("shape, channels", [("sd2", 9), ("sdxl", 9), ("sdxl", 4)])
def test_cached_reference_equals_the_training_form(shape, channels):
    pipe = shaped_pipe(shape, channels)
    if channels == 4:
        widen_conv_in(pipe.unet)
        with torch.no_grad():
            pipe.unet.conv_in.weight[:, 4:] = torch.randn(16, 4, 3, 3, generator=seeded(5)) / 6
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    conditioning = conditioning_of(pipe, [picture(1), picture(3)], [picture(2), picture(4)])
    noise = torch.randn(conditioning.person.shape, generator=seeded(7))
    options = {"person": [picture(1), picture(3)], "cloth": [picture(2), picture(4)], "num_inference_steps": 3}
    cached = latents_of(pipe, latents=noise, guidance_scale=2.5, **options)
    other = latents_of(pipe, latents=noise, guidance_scale=2.5, **options | {"cloth": [picture(5), picture(6)]})
    pipe.unet.register_forward_pre_hook(say_sizes, with_kwargs=True)
    assert_same_latents(cached, uncached(pipe, conditioning, noise, 3, 2.5))
    assert not torch.allclose(cached, other, atol=1e-3)


def test_sdxl_is_told_the_size_that_is_worked_at():
    pipe, seen = shaped_pipe("sdxl"), []
    pipe.unet.add_embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    expected = added_conditions(pipe.unet, torch.zeros(2, 9, 8, 6), 4)
    assert expected["time_ids"].tolist() == [[32, 24, 0, 0, 32, 24]] * 2 and expected["text_embeds"].shape == (2, 20)
    run(pipe, num_inference_steps=1, guidance_scale=2)
    reading, step = seen
    assert torch.equal(reading[0], step[0]) and len(step) == 2 and not step[:, :20].any()
    seen.clear()
    run(pipe, num_inference_steps=1, guidance_scale=2, height=64, width=48)
    assert not torch.equal(seen[0][0], reading[0])


def test_sdxl_has_no_one_text_encoder(shaped, data, tmp_path):
    pipe = shaped_pipe("sdxl", cross_attention="prompt")
    with pytest.raises(ValueError, match="`cross_attention` 'prompt' needs one text encoder, and SDXL's"):
        run(pipe)
    line = flags(shaped["sdxl", 9], data, tmp_path, cross_attention="prompt")
    with pytest.raises(ValueError, match="`cross_attention` 'prompt' needs one text encoder, and SDXL's"):
        Trainer(parse_args(line))


@pytest.mark.parametrize("shape, upcast", [("sdxl", True), ("sd2", False)])
def test_sdxls_own_vae_works_in_float32_where_all_is_float16(shape, upcast):
    pipe = shaped_pipe(shape)
    pipe.vae.half()
    weights, kinds = {k: v.clone() for k, v in pipe.vae.state_dict().items()}, []
    pipe.vae.decoder.register_forward_pre_hook(lambda module, args: kinds.append(args[0].dtype))
    pipe.vae.encoder.register_forward_pre_hook(lambda module, args: kinds.append(args[0].dtype))
    pipe.unet.half()
    run(pipe, num_inference_steps=1)
    assert kinds == 3 * [torch.float32 if upcast else torch.float16]
    assert pipe.vae.dtype == torch.float16 and all(
        torch.equal(v, weights[k]) for k, v in pipe.vae.state_dict().items()
    )
    pipe.vae.register_to_config(force_upcast=False)  # as the fp16-fix's config says
    with within_range(pipe.vae, pipe.unet):
        assert pipe.vae.dtype == torch.float16


@pytest.mark.parametrize("shape, channels, options", [
    ("sd2", 9, {}), ("sdxl", 9, {"gradient_checkpointing": True}), ("sdxl", 4, {}), ("sdxl", 9, {"lora_rank": 2}),
])  # fmt: skip
def test_a_shape_trains_and_what_it_learnt_loads(shaped, data, tmp_path, shape, channels, options):
    main(parse_args(flags(shaped[shape, channels], data, tmp_path, **options)))
    pipe = shaped_pipe(shape, channels)
    before = None if channels == 4 else latents_of(pipe)
    if options.get("lora_rank"):
        pipe.load_lora_weights(tmp_path, weight_name=LORA_NAME)
    else:
        pipe.load_vton_adapter(tmp_path)
        assert ("conv_in.weight" in load_file(tmp_path / ADAPTER_NAME)) == (channels == 4)
    after = latents_of(pipe)
    assert torch.isfinite(after).all() and (before is None or not torch.equal(before, after))


@pytest.mark.parametrize("shape, options", [("sd2", {}), ("sdxl", {"gradient_checkpointing": True, "lora_rank": 2})])
def test_a_shapes_resumed_run_equals_an_uninterrupted_one(shaped, data, tmp_path, shape, options):
    options = options | LONG
    main(parse_args(flags(shaped[shape, 9], data, tmp_path / "whole", **options)))
    begun = tmp_path / "whole" / "checkpoint-6"
    main(parse_args(flags(shaped[shape, 9], data, tmp_path / "again", resume_from_checkpoint=begun, **options)))
    for file in (LORA_NAME if "lora_rank" in options else ADAPTER_NAME, f"checkpoint-8/{TRAINED_NAME}"):
        assert equal(load_file(tmp_path / "whole" / file), load_file(tmp_path / "again" / file))


def test_another_vae_takes_the_place_of_the_bases(shaped, data, tmp_path):
    vae = AutoencoderKL.from_pretrained(shaped["sd2", 9], subfolder="vae", scaling_factor=0.25)
    vae.save_pretrained(tmp_path / "vae")
    line = flags(shaped["sd2", 9], data, tmp_path / "out", vae_name_or_path=tmp_path / "vae")
    assert Trainer(parse_args(line)).vae.config.scaling_factor == 0.25


def test_the_table_of_backbones(capsys):
    weights = {name: backbones.row(config, 16) for name, config in backbones.BACKBONES.items()}
    by_kind = {name.split(" (")[0]: found for name, found in weights.items()}
    assert by_kind["SD1.5 inpainting"]["adapter"] == by_kind["SD2 inpainting"]["adapter"] == 49_574_080
    assert by_kind["SD1.5"]["adapter"] == 49_574_080 + 23_040
    assert round(by_kind["SDXL inpainting"]["adapter"] / 1e6, 1) == 409.7
    assert (
        round(by_kind["SDXL"]["unet"] / 1e6) in {2567, 2568}
        and round(by_kind["SD2.1, velocities"]["unet"] / 1e6) == 866
    )
