"""Settings are a stack: base, adapter, active LoRAs. The config shows its top, and what cannot be taken apart is refused."""

import copy
import json
import random
import warnings
from dataclasses import asdict

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_adapter import LORA, assert_same_adapter, assert_same_state, saved_adapter, settings_of, state_of
from tiny import run, tiny_pipe, tiny_unet

from pipeline_vton import (
    LORA_NAME,
    LORA_SETTINGS,
    AdapterSettings,
    StableDiffusionVTONPipeline,
    load_pipeline,
    read_adapter,
)


BASE, ADAPTER, FIRST, SECOND = 7.5, 2.0, 3.0, 4.0  # guidance scales, that tell whose settings are on top


def save_lora(folder, guidance_scale, name=LORA_NAME, seed=3, channels=9, **settings):
    """A LoRA as `train_vton.py` writes it."""
    unet = tiny_unet(channels)
    torch.manual_seed(seed)
    unet.add_adapter(LoraConfig(**LORA))
    layers = get_peft_model_state_dict(unet)
    StableDiffusionVTONPipeline.save_lora_weights(folder, layers, weight_name=name)
    settings = AdapterSettings(base_in_channels=channels, guidance_scale=guidance_scale, **settings)
    with safe_open(folder / name, "pt") as file:
        metadata = file.metadata() | {LORA_SETTINGS: json.dumps(settings.metadata())}
    save_file(load_file(folder / name), folder / name, metadata)
    return folder / name


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An adapter, and two LoRAs that bring their settings."""
    folder = tmp_path_factory.mktemp("files")
    saved_adapter(folder / "adapter", guidance_scale=ADAPTER, cross_attention="identity")
    return {
        "adapter": folder / "adapter",
        "first": save_lora(folder / "first", FIRST, seed=3, trainable="attention"),
        "second": save_lora(folder / "second", SECOND, seed=4),
    }


def scale_of(pipe):
    return pipe.config.guidance_scale


def refused(action, message):
    with pytest.raises(ValueError, match=message) as error:
        action()
    assert "\n" not in str(error.value)


# ---- the top of the stack


def test_every_layer_is_on_top_as_long_as_it_is_in_force(files):
    pipe, seen = tiny_pipe(9), []
    for action in (
        lambda: None,
        lambda: pipe.load_vton_adapter(files["adapter"]),
        lambda: pipe.load_lora_weights(files["first"], adapter_name="first"),
        lambda: pipe.load_lora_weights(files["second"], adapter_name="second"),
        lambda: pipe.set_adapters(["second", "first"]),  # in loading order, whatever the order here
        lambda: pipe.set_adapters("first"),
        lambda: pipe.disable_lora(),
        lambda: pipe.enable_lora(),
        lambda: pipe.unload_vton_adapter(),
        lambda: pipe.delete_adapters("first"),
        lambda: pipe.unload_lora_weights(),
        lambda: pipe.load_vton_adapter(files["adapter"]),
        lambda: pipe.unload_vton_adapter(),
    ):
        action()
        seen.append(scale_of(pipe))
    assert seen == [BASE, ADAPTER, FIRST, SECOND, SECOND, FIRST, ADAPTER, FIRST, FIRST, SECOND, BASE, ADAPTER, BASE]


@pytest.mark.parametrize("seed", range(6))
def test_in_whatever_order_the_top_is_right_and_the_base_comes_back_bit_for_bit(files, seed):
    choose, pipe = random.Random(seed), tiny_pipe(9)
    base, adapter, loras, active, enabled = state_of(pipe), None, [], set(), True
    for _ in range(14):
        can = ["adapter", "load"] + ["unload adapter"] * (adapter is not None)
        can += ["delete", "set", "disable", "enable", "unload", "refuse", "unet"] * bool(loras)
        match choose.choice(can):
            case "adapter":
                pipe.load_vton_adapter(files["adapter"])
                adapter = ADAPTER
            case "unload adapter":
                pipe.unload_vton_adapter()
                adapter = None
            case "load" if missing := [name for name in ("first", "second") if name not in loras]:
                name = choose.choice(missing)
                pipe.load_lora_weights(files[name], adapter_name=name)
                pipe.set_adapters(name)
                pipe.enable_lora()
                loras, active, enabled = [*loras, name], {name}, True
            case "delete":
                name = choose.choice(loras)
                pipe.set_adapters(loras)
                pipe.delete_adapters(name)
                loras.remove(name)
                active = set(loras)
            case "set":
                active = set(choose.sample(loras, choose.randint(1, len(loras))))
                pipe.set_adapters(list(active))
            case "unet":  # past the pipeline
                active = set(loras)
                pipe.unet.set_adapters(loras)
            case "disable" | "enable" as word:
                pipe.enable_lora() if word == "enable" else pipe.disable_lora()
                enabled = word == "enable"
            case "unload":
                pipe.unload_lora_weights()
                loras, active, enabled = [], set(), True
            case "refuse" if active and enabled:
                weights = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
                pipe.fuse_lora()
                refused(lambda: pipe.load_vton_adapter(files["adapter"]), "fused with the LoRA.*call unfuse_lora")
                assert scale_of(pipe) == {"first": FIRST, "second": SECOND}[[n for n in loras if n in active][-1]]
                pipe.unfuse_lora()
                pipe.unet.load_state_dict(weights)  # peft subtracts what it added, which rounds
        on_top = [{"first": FIRST, "second": SECOND}[name] for name in loras if name in active and enabled]
        assert scale_of(pipe) == (on_top or [adapter or BASE])[-1]
    pipe.unload_lora_weights()
    if adapter is not None:
        pipe.unload_vton_adapter()
    assert_same_state(pipe, base)


def test_a_setting_that_is_said_afterwards_goes_with_its_layer(files):
    pipe = tiny_pipe(9)
    pipe.register_to_config(guidance_scale=6.0)
    pipe.load_vton_adapter(files["adapter"])
    assert scale_of(pipe) == ADAPTER
    pipe.register_to_config(guidance_scale=5.0)
    assert scale_of(pipe) == 5.0 and pipe.config.cross_attention == "identity"
    pipe.unload_vton_adapter()
    assert scale_of(pipe) == 6.0
    pipe.load_vton_adapter(files["adapter"])
    assert scale_of(pipe) == ADAPTER
    refused(lambda: pipe.register_to_config(cross_attention="telepathy"), "`cross_attention` must be one of skip")
    assert pipe.config.cross_attention == "identity"


# ---- where a LoRA's settings are found


def test_a_loras_settings_are_found_under_another_name(tmp_path):
    save_lora(tmp_path, FIRST, name="mine.safetensors")
    for where, options in [
        (tmp_path, {}),
        (tmp_path, {"weight_name": "mine.safetensors"}),
        (tmp_path / "mine.safetensors", {}),
        (tmp_path.parent, {"subfolder": tmp_path.name, "weight_name": "mine.safetensors"}),
    ]:
        pipe = tiny_pipe(9)
        pipe.load_lora_weights(where, **options)
        assert scale_of(pipe) == FIRST
        pipe.unload_lora_weights()
        assert scale_of(pipe) == BASE


def test_the_settings_of_a_lora_that_comes_as_a_dict_are_given_beside_it(files):
    pipe = tiny_pipe(9)
    pipe.load_lora_weights(load_file(files["first"]), settings={"guidance_scale": FIRST})
    assert scale_of(pipe) == FIRST
    pipe.unload_lora_weights()
    pipe.load_lora_weights(load_file(files["first"]))
    assert scale_of(pipe) == BASE
    refused(
        lambda: pipe.load_lora_weights(load_file(files["first"]), settings={"eta": 2.0}), "`eta` must be .* got 2.0"
    )


def test_a_name_that_is_used_again_has_no_settings_of_the_lora_from_before(files):
    pipe = tiny_pipe(9)
    pipe.load_lora_weights(files["first"], adapter_name="mine")
    pipe.unet.delete_adapters("mine")  # past the pipeline
    pipe.load_lora_weights(load_file(files["second"]), adapter_name="mine")
    assert scale_of(pipe) == BASE


# ---- what cannot be taken apart


def test_an_adapter_under_a_fused_lora_waits_until_it_is_unfused(files, tmp_path):
    pipe = tiny_pipe(9)
    base = state_of(pipe)
    pipe.load_vton_adapter(files["adapter"])
    pipe.load_lora_weights(files["first"])
    pipe.fuse_lora()
    fused = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    for action in (
        pipe.unload_vton_adapter,
        lambda: pipe.load_vton_adapter(files["adapter"]),
        lambda: pipe.save_vton_adapter(tmp_path / "out"),
    ):
        refused(action, "weights are fused with the LoRA default_0: call unfuse_lora")
    assert all(torch.equal(weight, fused[name]) for name, weight in pipe.unet.state_dict().items())
    assert scale_of(pipe) == FIRST and not (tmp_path / "out").exists()
    pipe.unfuse_lora()
    pipe.unload_vton_adapter()
    pipe.unload_lora_weights()
    assert_same_state(pipe, base)


def test_a_fused_lora_that_is_unloaded_is_the_bases_from_then_on(files, tmp_path):
    pipe = tiny_pipe(9)
    pipe.load_vton_adapter(files["adapter"])
    pipe.load_lora_weights(files["first"])
    with_lora = run(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    np.testing.assert_allclose(run(pipe), with_lora, atol=1e-4)
    assert scale_of(pipe) == FIRST
    refused(pipe.unload_vton_adapter, "fused and then unloaded")
    pipe.save_pretrained(tmp_path)
    kept = state_of(pipe)
    again = StableDiffusionVTONPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert scale_of(again) == FIRST and (run(again) == run(pipe)).all()
    pipe.load_vton_adapter(files["adapter"])
    assert scale_of(pipe) == ADAPTER
    pipe.unload_vton_adapter()
    assert_same_state(pipe, kept)


def test_a_fused_lora_that_is_deleted_is_the_bases_and_the_others_stay_on_top(files):
    pipe = tiny_pipe(9)
    pipe.load_lora_weights(files["first"], adapter_name="first")
    pipe.load_lora_weights(files["second"], adapter_name="second")
    pipe.fuse_lora(adapter_names=["first"])
    assert scale_of(pipe) == FIRST  # where some are merged, peft leaves the others out
    pipe.set_adapters(["first", "second"])
    pipe.delete_adapters("first")
    pipe.unfuse_lora()
    assert scale_of(pipe) == SECOND
    pipe.unload_lora_weights()
    assert scale_of(pipe) == FIRST


def test_a_lora_that_changes_what_is_trainable_does_not_confuse_the_adapter(files, tmp_path):
    pipe = tiny_pipe(9)
    base = state_of(pipe)
    pipe.load_vton_adapter(files["adapter"])
    pipe.load_lora_weights(files["first"])
    assert pipe.config.trainable == "attention"
    pipe.save_vton_adapter(tmp_path)
    assert_same_adapter(tmp_path, files["adapter"])
    pipe.unload_vton_adapter()
    pipe.unload_lora_weights()
    assert_same_state(pipe, base)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_pipeline_with_lora_layers_is_not_saved(tmp_path, part, fused):
    pipe = tiny_pipe(9, text=True)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "q_proj"]), getattr(pipe, part))
    if fused:
        pipe.fuse_lora(components=[part])
    refused(lambda: pipe.save_pretrained(tmp_path), f"`{part}` has LoRA layers.*unload_lora_weights")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", [{}, {"cloth_conditioning": "joint"}])
def test_fused_projections_are_unfused_before_an_adapter_is_touched(tmp_path, settings):
    saved_adapter(tmp_path / "adapter", **settings)
    pipe = tiny_pipe(9, **settings)
    base = run(pipe)
    with torch.no_grad():
        pipe.fuse_qkv_projections()
    for action in (
        lambda: pipe.load_vton_adapter(tmp_path / "adapter"),
        lambda: pipe.save_vton_adapter(tmp_path / "out"),
        lambda: pipe.save_pretrained(tmp_path / "out"),
    ):
        refused(action, "QKV projections are fused: call unfuse_qkv_projections")
    assert not (tmp_path / "out").exists()
    pipe.unfuse_qkv_projections()
    pipe.load_vton_adapter(tmp_path / "adapter")
    with_adapter = run(pipe)
    with torch.no_grad():
        pipe.fuse_qkv_projections()
    np.testing.assert_allclose(run(pipe), with_adapter, atol=1e-4)
    refused(pipe.unload_vton_adapter, "QKV projections are fused")
    pipe.unfuse_qkv_projections()
    pipe.save_vton_adapter(tmp_path / "again")
    assert_same_adapter(tmp_path / "again", tmp_path / "adapter")
    pipe.unload_vton_adapter()
    assert (run(pipe) == base).all()


def test_what_cannot_be_saved_is_not_published_either(hub):
    pipe = tiny_pipe(9)
    pipe.unet.add_adapter(LoraConfig(**LORA))
    refused(lambda: pipe.push_to_hub("me/lora", token="hf_me"), "`unet` has LoRA layers")
    pipe.fuse_lora()
    refused(lambda: pipe.push_to_hub("me/lora", token="hf_me", adapter_only=True), "fused with the LoRA")
    assert "models/me/lora" not in hub.repositories


def test_an_adapter_is_published_as_it_is_under_a_lora(hub, files):
    pipe = tiny_pipe(9)
    pipe.load_vton_adapter(files["adapter"])
    pipe.load_lora_weights(files["first"])
    pipe.push_to_hub("me/under", token="hf_me", adapter_only=True)
    assert f"| guidance_scale | {ADAPTER} |" in hub.files("me/under")["README.md"].decode()
    other = tiny_pipe(9)
    other.load_vton_adapter("me/under")
    assert scale_of(other) == ADAPTER and other.config.trainable == "self_attention"


# ---- the UNet carries them


@pytest.mark.parametrize("channels", [4, 9])
def test_another_unet_has_nothing_to_unload_and_takes_an_adapter_as_a_new_pipeline_does(tmp_path, channels):
    saved_adapter(tmp_path, channels, guidance_scale=ADAPTER)
    pipe = tiny_pipe(channels)
    base = state_of(pipe)
    pipe.load_vton_adapter(tmp_path)
    first, pipe.unet = pipe.unet, tiny_pipe(channels, seed=8).unet
    other = state_of(pipe)
    assert scale_of(pipe) == BASE and pipe.config.base_in_channels == channels
    refused(pipe.unload_vton_adapter, "no adapter was loaded into this UNet")
    assert_same_state(pipe, other)
    pipe.load_vton_adapter(tmp_path)
    assert scale_of(pipe) == ADAPTER
    pipe.unload_vton_adapter()
    assert_same_state(pipe, other)
    pipe.unet = first  # with its adapter
    assert scale_of(pipe) == ADAPTER
    pipe.unload_vton_adapter()
    assert_same_state(pipe, base)


def test_another_unet_may_have_other_channels(tmp_path):
    saved_adapter(tmp_path, 8)
    pipe = tiny_pipe(9)
    pipe.unet = tiny_pipe(8).unet
    pipe.load_vton_adapter(tmp_path)
    assert pipe.config.base_in_channels == 8
    pipe.save_vton_adapter(tmp_path / "again")
    assert_same_adapter(tmp_path / "again", tmp_path)


@pytest.mark.parametrize("channels", [4, 9])
def test_a_pipeline_of_another_ones_components_knows_the_adapter(tmp_path, channels):
    saved_adapter(tmp_path, channels, guidance_scale=ADAPTER, cross_attention="identity")
    pipe = tiny_pipe(channels, height=32, width=24)
    base, config = state_of(pipe), settings_of(pipe)
    pipe.load_vton_adapter(tmp_path)
    again = StableDiffusionVTONPipeline(**pipe.components)
    again.set_progress_bar_config(disable=True)
    assert settings_of(again) == settings_of(pipe)
    assert (run(again) == run(pipe)).all()
    again.save_vton_adapter(tmp_path / "again")
    assert read_adapter(tmp_path / "again" / "vton_adapter.safetensors")[1].base_in_channels == channels
    again.unload_vton_adapter()
    assert settings_of(again) == settings_of(pipe) == config
    assert_same_state(pipe, base)
    refused(pipe.unload_vton_adapter, "no adapter was loaded")


def test_a_pipeline_of_another_ones_components_knows_what_was_merged(files, tmp_path):
    saved = tiny_pipe(9)
    saved.load_vton_adapter(files["adapter"])
    saved.save_pretrained(tmp_path)
    pipe = StableDiffusionVTONPipeline.from_pretrained(tmp_path)
    pipe.load_lora_weights(files["first"])
    again = StableDiffusionVTONPipeline(**pipe.components)
    assert settings_of(again) == settings_of(pipe) and scale_of(again) == FIRST
    again.unload_lora_weights()
    assert scale_of(pipe) == scale_of(again) == ADAPTER


def test_pipelines_around_one_unet_have_settings_of_their_own(files):
    first = tiny_pipe(9)
    second = StableDiffusionVTONPipeline(**first.components, cloth_conditioning="joint")
    first.register_to_config(height=32)
    assert (first.config.cloth_conditioning, second.config.cloth_conditioning) == ("reference", "joint")
    assert (first.config.height, second.config.height) == (32, None)
    first.load_vton_adapter(files["adapter"])
    third = StableDiffusionVTONPipeline(**first.components, guidance_scale=9.0)
    assert [scale_of(pipe) for pipe in (first, second, third)] == [ADAPTER, ADAPTER, 9.0]
    first.unload_vton_adapter()
    assert [scale_of(pipe) for pipe in (first, second, third)] == [BASE] * 3
    assert second.config.cloth_conditioning == "joint"


def test_from_pipe_keeps_the_stack(files, tmp_path):
    saved_adapter(tmp_path, height=64, guidance_scale=ADAPTER)
    pipe = tiny_pipe(9)
    pipe.load_vton_adapter(tmp_path)
    pipe.load_lora_weights(files["first"])
    piped = StableDiffusionVTONPipeline.from_pipe(pipe, dtype=torch.float32)
    assert settings_of(piped) == settings_of(pipe)
    piped.unload_vton_adapter()
    assert scale_of(piped) == FIRST and piped.config.height is None  # which the LoRA says nothing of
    piped.unload_lora_weights()
    assert settings_of(piped) == asdict(AdapterSettings(base_in_channels=9))


def test_a_copy_has_an_adapter_of_its_own(files):
    pipe = tiny_pipe(9)
    base = state_of(pipe)
    pipe.load_vton_adapter(files["adapter"])
    with_adapter, copied = state_of(pipe), copy.deepcopy(pipe)
    copied.unload_vton_adapter()
    assert scale_of(copied) == BASE
    assert all(torch.equal(weight, base[0][name]) for name, weight in copied.unet.state_dict().items())
    assert_same_state(pipe, with_adapter)
    pipe.unload_vton_adapter()
    assert_same_state(pipe, base)


# ---- how the adapter is sampled


def adapter_with(folder, **settings):
    saved_adapter(folder, **settings)
    return folder


@pytest.mark.parametrize("config, clip_sample", [({}, False), ({"clip_sample": True}, True)])
def test_an_adapter_is_sampled_by_its_scheduler_with_the_bases_betas(tmp_path, config, clip_sample):
    adapter_with(tmp_path, scheduler_class="DDPMScheduler")
    betas = {
        "beta_start": 0.001,
        "beta_end": 0.013,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
    }
    pipe = tiny_pipe(9)
    pipe.scheduler = old = (DDIMScheduler if config else PNDMScheduler)(**betas, **config)
    pipe.load_vton_adapter(tmp_path)
    assert type(pipe.scheduler) is DDPMScheduler
    assert (betas | {"clip_sample": clip_sample}).items() <= pipe.scheduler.config.items()
    pipe.unload_vton_adapter()
    assert pipe.scheduler is old
    pipe.save_pretrained(tmp_path / "whole")
    asked = load_pipeline(tmp_path / "whole", scheduler="DDPMScheduler", device="cpu")
    assert (betas | {"clip_sample": clip_sample}).items() <= asked.scheduler.config.items()
    assert pipe.config.scheduler == ("diffusers", type(old).__name__)


def test_a_scheduler_that_is_set_afterwards_stays(files, tmp_path):
    adapter_with(tmp_path, scheduler_class="DDPMScheduler")
    save_lora(tmp_path, FIRST, scheduler_class="DDIMScheduler")
    pipe = tiny_pipe(9)
    pipe.load_vton_adapter(tmp_path)
    pipe.scheduler = mine = PNDMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(tmp_path, weight_name=LORA_NAME)
    assert type(pipe.scheduler) is DDIMScheduler
    pipe.unload_lora_weights()
    assert pipe.scheduler is mine
    pipe.unload_vton_adapter()
    assert pipe.scheduler is mine


def test_a_loras_scheduler_is_in_force_as_long_as_the_lora_is(tmp_path):
    adapter_with(tmp_path, scheduler_class="DDPMScheduler")
    save_lora(tmp_path, FIRST, scheduler_class="DDIMScheduler")
    pipe, seen = tiny_pipe(9), []
    pipe.scheduler = base = PNDMScheduler.from_config(pipe.scheduler.config)
    for action in (
        lambda: pipe.load_vton_adapter(tmp_path),
        lambda: pipe.load_lora_weights(tmp_path, weight_name=LORA_NAME, adapter_name="first"),
        pipe.disable_lora,
        pipe.enable_lora,
        pipe.unload_vton_adapter,
        lambda: pipe.delete_adapters("first"),
    ):
        action()
        seen.append(type(pipe.scheduler).__name__.removesuffix("Scheduler"))
    assert seen == ["DDPM", "DDIM", "DDPM", "DDIM", "DDIM", "PNDM"] and pipe.scheduler is base


def test_an_older_adapter_leaves_the_bases_scheduler(files):
    pipe = tiny_pipe(9)
    before = pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    pipe.load_vton_adapter(files["adapter"])
    assert pipe.scheduler is before


def test_a_second_pipeline_puts_the_old_scheduler_back_too(tmp_path):
    adapter_with(tmp_path, scheduler_class="DDIMScheduler", eta=1.0)
    pipe = tiny_pipe(9)
    old = pipe.scheduler
    pipe.load_vton_adapter(tmp_path)
    again = StableDiffusionVTONPipeline(**pipe.components)
    assert again.scheduler is pipe.scheduler and again.config.eta == 1.0
    again.unload_vton_adapter()
    assert again.scheduler is old and pipe.config.eta is None and pipe.scheduler is old


def test_a_saved_pipeline_keeps_the_scheduler_that_it_was_saved_with(tmp_path):
    adapter_with(tmp_path / "adapter", scheduler_class="DDPMScheduler")
    pipe = tiny_pipe(9)
    pipe.load_vton_adapter(tmp_path / "adapter")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    again = StableDiffusionVTONPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is DDIMScheduler and again.config.scheduler_class == "DDPMScheduler"
    again.load_vton_adapter(tmp_path / "adapter")
    assert type(again.scheduler) is DDPMScheduler


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "SchedulerMixin2", "os"])
def test_a_scheduler_that_is_none_is_refused(name):
    refused(
        lambda: AdapterSettings(scheduler_class=name),
        f"`scheduler_class` must be .* diffusers scheduler, got '{name}'",
    )


def test_eta_none_is_the_adapters(tmp_path):
    adapter_with(tmp_path, scheduler_class="DDIMScheduler", eta=1.0)
    pipe = tiny_pipe(9)
    pipe.load_vton_adapter(tmp_path)
    noisy, still = run(pipe), run(pipe, eta=0.0)
    assert (noisy == run(pipe, eta=1.0)).all() and abs(noisy - still).max() > 1e-3


def test_an_adapters_prompt_is_used_where_a_call_gives_none():
    pipe = tiny_pipe(9, text=True, cross_attention="prompt", prompt="a shirt")
    shown, empty = run(pipe), run(pipe, prompt="")
    assert (shown == run(pipe, prompt="a shirt")).all() and abs(shown - empty).max() > 1e-4
    embeds = pipe.encode_prompt("", "cpu", 1, True)
    given = run(pipe, prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1])
    assert (given == empty).all()


@pytest.mark.parametrize(
    "meant, base, warned",
    [
        ("me/one", "me/two", True),
        ("me/one", "/cache/models--me--two/snapshots/12ab", True),
        ("me/one", "/cache/models--me--one/snapshots/12ab", False),
        ("me/one", "me/one", False),
        ("me/one", "/data/some/base", False),
        ("/data/other", "me/two", False),
        (None, "me/two", False),
        ("me/one", None, False),
    ],
)
def test_an_adapter_on_another_base_warns_by_name(tmp_path, meant, base, warned):
    adapter_with(tmp_path, base_model=meant)
    pipe = tiny_pipe(9)
    pipe.register_to_config(_name_or_path=base)  # as from_pretrained does
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pipe.load_vton_adapter(tmp_path)
    assert len(said) == warned
    if warned:
        assert "trained on me/one" in str(said[0].message) and "me/two" in str(said[0].message)
