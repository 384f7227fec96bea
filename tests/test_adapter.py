"""The adapter file and whole saved pipelines: what is written is what is read, and a wrong file changes nothing."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline, StableDiffusionInpaintPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import ROOT, box_mask, picture, run, seeded, tiny_pipe

from benchmarks import sd15
from pipeline_vton import (
    ADAPTER_NAME,
    AdapterSettings,
    StableDiffusionVTONPipeline,
    adapter_parameters,
    read_adapter,
    widen_conv_in,
    write_adapter,
)


LORA = {"r": 2, "lora_alpha": 2, "target_modules": r".*attn1\.(to_q|to_k|to_v|to_out\.0)", "init_lora_weights": False}


def trained_pipe(in_channels=9, **settings):
    """The base of `tiny_pipe(in_channels)` after a training: other attention weights, a widened `conv_in` that is in use."""
    pipe = tiny_pipe(in_channels, **settings)
    if in_channels == 4:
        widen_conv_in(pipe.unet)
    generator = seeded(11)
    with torch.no_grad():
        for parameter in adapter_parameters(pipe.unet, pipe.config.trainable, in_channels == 4).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 5)
    return pipe


def saved_adapter(folder, in_channels=9, dtype=None, **settings):
    pipe = trained_pipe(in_channels, **settings)
    pipe.save_vton_adapter(folder, dtype=dtype)
    return pipe


def settings_of(pipe):
    return {setting.name: pipe.config[setting.name] for setting in fields(AdapterSettings)}


def state_of(pipe):
    return (
        {name: weight.clone() for name, weight in pipe.unet.state_dict().items()},
        dict(pipe.config),
        dict(pipe.unet.config),
        dict(pipe.unet.attn_processors),
    )


def assert_same_state(pipe, state):
    weights, config, unet_config, processors = state
    now = pipe.unet.state_dict()
    assert now.keys() == weights.keys()
    assert all(torch.equal(now[name], weight) for name, weight in weights.items())
    assert dict(pipe.config) == config
    assert dict(pipe.unet.config) == unet_config
    assert pipe.unet.attn_processors == processors


def assert_same_adapter(folder, other):
    (weights, settings), (others, other_settings) = (read_adapter(path / ADAPTER_NAME) for path in (folder, other))
    assert settings == other_settings
    assert weights.keys() == others.keys()
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


# ---- saving, loading, unloading


@pytest.mark.parametrize("trainable", ["self_attention", "attention", "attention_norms", "all"])
@pytest.mark.parametrize("in_channels", [4, 8, 9])
def test_saved_and_loaded_adapter_gives_the_pipeline_from_before(tmp_path, in_channels, trainable):
    settings = {
        "trainable": trainable,
        "cross_attention": "identity",
        "condition_latents": "unscaled",
        "guidance_scale": 2.25,
        "mask_free": True,
        "height": 32,
        "width": 24,
        "base_model": "someone/something",
        "trained_steps": 3,
    }
    trained = saved_adapter(tmp_path, in_channels, **settings)
    pipe = tiny_pipe(in_channels)
    pipe.load_vton_adapter(tmp_path)
    assert_same_state(pipe, state_of(trained)[:3] + (pipe.unet.attn_processors,))
    assert pipe.config.base_in_channels == in_channels
    assert (run(pipe) == run(trained)).all()


@pytest.mark.parametrize("in_channels", [4, 8, 9])
def test_unloading_gives_the_base_bit_for_bit(tmp_path, in_channels):
    saved_adapter(tmp_path, in_channels, cross_attention="identity", guidance_scale=2.0, height=32, width=24)
    pipe = tiny_pipe(in_channels)
    before = state_of(pipe)
    pipe.load_vton_adapter(tmp_path)
    run(pipe)
    pipe.unload_vton_adapter()
    assert_same_state(pipe, before)


@pytest.mark.parametrize("in_channels", [4, 9])
def test_a_second_adapter_replaces_the_first_and_unloads_to_the_base(tmp_path, in_channels):
    saved_adapter(tmp_path / "first", in_channels, trainable="attention", guidance_scale=3.0)
    second = saved_adapter(tmp_path / "second", in_channels, cloth_conditioning="joint")
    pipe = tiny_pipe(in_channels)
    before = state_of(pipe)
    pipe.load_vton_adapter(tmp_path / "first")
    pipe.load_vton_adapter(tmp_path / "second")
    assert_same_state(pipe, state_of(second)[:3] + (pipe.unet.attn_processors,))
    pipe.unload_vton_adapter()
    assert_same_state(pipe, before)


def test_unloading_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no adapter was loaded"):
        tiny_pipe(9).unload_vton_adapter()


def test_an_adapter_file_holds_the_trainable_weights_and_the_settings_as_text(tmp_path):
    saved_adapter(tmp_path, 4, dtype=torch.float16, mask_free=True, base_model="me/base")
    with safe_open(tmp_path / ADAPTER_NAME, framework="pt") as file:
        metadata, names = file.metadata(), set(file.keys())
        assert file.get_tensor("conv_in.weight").shape == (16, 8, 3, 3)
        assert all(file.get_tensor(name).dtype == torch.float16 for name in names)
    assert all(".attn1." in name for name in names - {"conv_in.weight"})
    assert names <= tiny_pipe(4).unet.state_dict().keys()
    assert metadata == {
        "format": "vton-adapter",
        "format_version": "1",
        "in_channels": "4",
        "base_model": "me/base",
        "cloth_conditioning": "reference",
        "canvas_axis": "height",
        "cross_attention": "skip",
        "condition_latents": "scaled",
        "mask_free": "true",
        "pose": "none",
        "guidance_scale": "7.5",
        "trainable": "self_attention",
    }


def test_a_file_that_says_the_least_takes_the_defaults(tmp_path):
    weights = adapter_parameters(trained_pipe().unet, "self_attention", False)
    metadata = {"format": "vton-adapter", "format_version": "1", "in_channels": "9"}
    save_file({name: weight.detach() for name, weight in weights.items()}, tmp_path / "a.safetensors", metadata)
    _, settings = read_adapter(tmp_path / "a.safetensors")
    assert settings == AdapterSettings(base_in_channels=9)
    pipe = tiny_pipe(9, cross_attention="identity", mask_free=True, guidance_scale=1.5)
    pipe.load_vton_adapter(tmp_path / "a.safetensors")
    assert settings_of(pipe) == asdict(AdapterSettings(base_in_channels=9))


def test_an_adapter_is_found_by_folder_file_subfolder_and_name(tmp_path):
    trained = saved_adapter(tmp_path / "sub")
    expected = trained.unet.state_dict()
    renamed = tmp_path / "renamed" / "model.safetensors"
    renamed.parent.mkdir()
    renamed.write_bytes((tmp_path / "sub" / ADAPTER_NAME).read_bytes())
    for where, options in [
        (tmp_path / "sub" / ADAPTER_NAME, {}),
        (str(tmp_path), {"subfolder": "sub"}),
        (tmp_path / "renamed", {}),
        (tmp_path / "renamed", {"weight_name": "model.safetensors"}),
    ]:
        pipe = tiny_pipe(9)
        pipe.load_vton_adapter(where, **options)
        assert all(torch.equal(weight, expected[name]) for name, weight in pipe.unet.state_dict().items())
    with pytest.raises(OSError, match="model.safetensors"):
        tiny_pipe(9).load_vton_adapter(tmp_path)
    with pytest.raises(ValueError, match="weight_name.*adapter.bin"):
        tiny_pipe(9).load_vton_adapter(tmp_path / "sub", weight_name="adapter.bin")


def test_a_half_precision_file_loads_into_the_dtype_of_the_unet(tmp_path):
    trained = saved_adapter(tmp_path, dtype=torch.float16)
    pipe = tiny_pipe(9)
    pipe.load_vton_adapter(tmp_path)
    for name, weight in pipe.unet.state_dict().items():
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, trained.unet.state_dict()[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("action", ["call", "save_vton_adapter"])
def test_a_bare_four_channel_base_is_an_error(tmp_path, action):
    pipe = tiny_pipe(4)
    with pytest.raises(ValueError, match="4 input channels"):
        run(pipe) if action == "call" else pipe.save_vton_adapter(tmp_path)


def test_a_failed_save_leaves_no_half_file(tmp_path):
    (tmp_path / ADAPTER_NAME / "in the way").mkdir(parents=True)
    with pytest.raises(OSError):
        trained_pipe().save_vton_adapter(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [ADAPTER_NAME]


def test_sd15_trains_as_many_weights_as_it_says():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**sd15.UNET)
    attention = sum(parameter.numel() for parameter in adapter_parameters(unet, "self_attention", False).values())
    widen_conv_in(unet)
    widened = sum(parameter.numel() for parameter in adapter_parameters(unet, "self_attention", True).values())
    assert (attention, widened - attention) == (49_574_080, 23_040)


def test_widening_changes_nothing_until_it_is_trained():
    unet = tiny_pipe(4).unet
    latents, condition = torch.randn(2, 1, 4, 8, 8, generator=seeded(1))
    text, t = torch.randn(1, 5, 32, generator=seeded(2)), torch.tensor(400)
    with torch.no_grad():
        before = unet(latents, t, text).sample
        widen_conv_in(unet)
        torch.testing.assert_close(unet(torch.cat([latents, condition], 1), t, text).sample, before)


# ---- files that are wrong


def _metadata(**changes):
    def spoil(weights, metadata):
        metadata.update(changes)

    return spoil


def _weight(make):
    def spoil(weights, metadata):
        name = sorted(weights)[3]
        weights[name] = make(weights[name])

    return spoil


def _rename(weights, metadata):
    weights["down_blocks.9.attn1.to_q.weight"] = weights.pop(sorted(weights)[0])


WRONG_FILES = {
    "another format": (_metadata(format="lora"), "format='vton-adapter'.*'lora'"),
    "no metadata": (lambda weights, metadata: metadata.clear(), "format='vton-adapter'.*None"),
    "no version": (lambda weights, metadata: metadata.pop("format_version"), "format_version None"),
    "a later version": (_metadata(format_version="2"), "format_version '2'"),
    "no in_channels": (lambda weights, metadata: metadata.pop("in_channels"), "in_channels"),
    "another base": (_metadata(in_channels="8"), "8 input channels.*9"),
    "in_channels of nothing": (_metadata(in_channels="nine"), "in_channels='nine'"),
    "an unknown setting": (_metadata(colour="red"), "unknown setting colour='red'"),
    "an unknown choice": (_metadata(cloth_conditioning="telepathy"), "cloth_conditioning='telepathy'"),
    "an unknown trainable": (_metadata(trainable="hair"), "trainable='hair'"),
    "a boolean of Python": (_metadata(mask_free="True"), "mask_free='True'"),
    "an endless scale": (_metadata(guidance_scale="inf"), "guidance_scale='inf'"),
    "a scale in words": (_metadata(guidance_scale="much"), "guidance_scale='much'"),
    "a negative height": (_metadata(height="-64"), "height='-64'"),
    "one key missing": (lambda weights, metadata: weights.pop(sorted(weights)[0]), "1 weights missing, 0 unexpected"),
    "one key too many": (lambda weights, metadata: weights.update(x=torch.ones(1)), "0 weights missing, 1 unexpected"),
    "one key renamed": (_rename, "1 weights missing, 1 unexpected"),
    "keys of another trainable": (_metadata(trainable="attention"), "missing, 0 unexpected .*attn2"),
    "another shape": (_weight(lambda weight: torch.ones(3, 5)), r"shape \[3, 5\]"),
    "a NaN": (_weight(lambda weight: weight * float("nan")), "not all finite"),
    "an infinity": (_weight(lambda weight: torch.full_like(weight, float("inf"))), "not all finite"),
    "whole numbers": (_weight(lambda weight: weight.to(torch.int32)), "not all finite floating-point"),
}


@pytest.mark.parametrize("adapter_before", [False, True])
@pytest.mark.parametrize("spoil, message", WRONG_FILES.values(), ids=WRONG_FILES.keys())
def test_a_wrong_file_is_one_clear_error_and_leaves_the_pipeline_alone(tmp_path, spoil, message, adapter_before):
    saved_adapter(tmp_path)
    pipe = tiny_pipe(9)
    base = state_of(pipe)
    if adapter_before:
        pipe.load_vton_adapter(tmp_path)
    before = state_of(pipe)
    with safe_open(tmp_path / ADAPTER_NAME, framework="pt") as file:
        metadata = file.metadata()
    weights, wrong = load_file(tmp_path / ADAPTER_NAME), tmp_path / "wrong.safetensors"
    spoil(weights, metadata)
    save_file(weights, wrong, metadata or None)
    with pytest.raises(ValueError, match=f"wrong.safetensors.*{message}") as error:
        pipe.load_vton_adapter(wrong)
    assert "\n" not in str(error.value)
    assert_same_state(pipe, before)
    if adapter_before:
        pipe.unload_vton_adapter()
        assert_same_state(pipe, base)


def test_numbers_that_the_unets_dtype_cannot_hold_are_not_loaded(tmp_path):
    pipe = trained_pipe(9)
    with torch.no_grad():
        pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight[0, 0] = 1e5
    pipe.save_vton_adapter(tmp_path)
    narrow = tiny_pipe(9)
    narrow.unet.half()
    with pytest.raises(
        ValueError, match="does not fit this UNet: mid_block.*to_q.weight has numbers that torch.float16 cannot"
    ):
        narrow.load_vton_adapter(tmp_path)
    tiny_pipe(9).load_vton_adapter(tmp_path)


@pytest.mark.parametrize("length", [0, 5, 2000, -1])
def test_a_truncated_file_is_one_clear_error_and_leaves_the_pipeline_alone(tmp_path, length):
    saved_adapter(tmp_path)
    pipe = tiny_pipe(9)
    before = state_of(pipe)
    whole = (tmp_path / ADAPTER_NAME).read_bytes()
    (tmp_path / ADAPTER_NAME).write_bytes(whole[:length])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        pipe.load_vton_adapter(tmp_path)
    assert_same_state(pipe, before)


def test_a_file_for_another_unet_leaves_a_narrow_base_narrow(tmp_path):
    pipe = trained_pipe(4)
    weights = adapter_parameters(pipe.unet, "self_attention", True)
    weights["conv_in.weight"] = weights["conv_in.weight"][:, :4]
    write_adapter(tmp_path / ADAPTER_NAME, weights, AdapterSettings(base_in_channels=4))
    pipe = tiny_pipe(4)
    before = state_of(pipe)
    with pytest.raises(ValueError, match=r"conv_in.weight has shape \[16, 4, 3, 3\], not \[16, 8, 3, 3\]"):
        pipe.load_vton_adapter(tmp_path)
    assert_same_state(pipe, before)


# ---- UNets that peft, torch.compile or offloading have changed


def lora_on(pipe, seed=3):
    torch.manual_seed(seed)
    pipe.unet.add_adapter(LoraConfig(**LORA))


@pytest.mark.parametrize("in_channels", [4, 9])
def test_load_and_unload_work_under_peft(tmp_path, in_channels):
    trained = saved_adapter(tmp_path, in_channels)
    lora_on(trained)
    pipe = tiny_pipe(in_channels)
    lora_on(pipe)
    before = state_of(pipe)
    pipe.load_vton_adapter(tmp_path)
    assert (run(pipe) == run(trained)).all()
    pipe.save_vton_adapter(tmp_path / "again")
    assert_same_adapter(tmp_path / "again", tmp_path)
    pipe.unload_vton_adapter()
    assert_same_state(pipe, before)


def test_an_adapter_loaded_before_a_lora_unloads_after_it(tmp_path):
    saved_adapter(tmp_path)
    pipe = tiny_pipe(9)
    base = state_of(pipe)
    pipe.load_vton_adapter(tmp_path)
    lora_on(pipe)
    pipe.unload_vton_adapter()
    pipe.unload_lora_weights()
    assert_same_state(pipe, base)


def test_a_lora_on_a_conv_in_that_must_be_replaced_is_refused(tmp_path):
    saved_adapter(tmp_path, 4)
    lora = LoraConfig(r=2, target_modules=["conv_in"])
    pipe = tiny_pipe(4)
    pipe.unet.add_adapter(lora)
    before = state_of(pipe)
    with pytest.raises(ValueError, match="conv_in.*LoRA"):
        pipe.load_vton_adapter(tmp_path)
    assert_same_state(pipe, before)
    pipe.unload_lora_weights()
    pipe.load_vton_adapter(tmp_path)
    pipe.unet.add_adapter(lora)
    before = state_of(pipe)
    with pytest.raises(ValueError, match="conv_in.*LoRA"):
        pipe.unload_vton_adapter()
    assert_same_state(pipe, before)


@pytest.mark.parametrize("in_channels", [4, 9])
def test_load_and_unload_work_on_a_compiled_unet(tmp_path, in_channels):
    trained = saved_adapter(tmp_path, in_channels)
    pipe = tiny_pipe(in_channels)
    before = state_of(pipe)
    plain = pipe.unet
    pipe.unet = torch.compile(plain)
    pipe.load_vton_adapter(tmp_path)
    assert all(torch.equal(weight, plain.state_dict()[name]) for name, weight in trained.unet.state_dict().items())
    pipe.save_vton_adapter(tmp_path / "again")
    assert_same_adapter(tmp_path / "again", tmp_path)
    pipe.unload_vton_adapter()
    pipe.unet = plain
    assert_same_state(pipe, before)


@pytest.mark.parametrize("offload", ["sequential", "group"])
def test_scattered_weights_run_but_are_not_exchanged(tmp_path, offload):
    trained = saved_adapter(tmp_path)
    pipe = tiny_pipe(9)
    pipe.load_vton_adapter(tmp_path)
    cpu = torch.device("cpu")
    if offload == "sequential":
        for module in (pipe.unet, pipe.vae):
            cpu_offload(module, cpu)
    else:
        pipe.unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    assert (run(pipe) == run(trained)).all()
    for action in (lambda: pipe.load_vton_adapter(tmp_path), pipe.unload_vton_adapter, lambda: pipe.save_vton_adapter(tmp_path)):  # fmt: skip
        with pytest.raises(ValueError, match="sequential or group offload"):
            action()
    assert (run(pipe) == run(trained)).all()


class Eighths(torch.Tensor):
    """As torchao keeps quantised weights: a tensor of another kind."""


@pytest.mark.parametrize("in_channels", [4, 9])
@pytest.mark.parametrize("kind", [lambda weight: weight.to(torch.int8), lambda weight: weight.as_subclass(Eighths)])
def test_quantised_weights_are_not_exchanged(tmp_path, kind, in_channels):
    saved_adapter(tmp_path, in_channels)
    pipe = tiny_pipe(in_channels)
    projection = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    projection.weight = torch.nn.Parameter(kind(projection.weight.data), requires_grad=False)
    actions = [lambda: pipe.load_vton_adapter(tmp_path)]
    if in_channels == 9:
        actions += [lambda: pipe.save_vton_adapter(tmp_path), lambda: pipe.save_pretrained(tmp_path)]
    for action in actions:
        with pytest.raises(
            ValueError, match="the UNet's weights are quantised: load, save or unload the adapter before"
        ):
            action()
    assert pipe.unet.config.in_channels == in_channels


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "float16"])
def test_an_adapter_is_not_saved_as_numbers_that_no_one_can_load(tmp_path, dtype):
    with pytest.raises(ValueError, match="`dtype` must be None, or floating point of 16 bits at least, got"):
        tiny_pipe(9).save_vton_adapter(tmp_path, dtype)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scheduler", ["AmusedScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_an_adapter_whose_scheduler_cannot_be_made_changes_nothing(tmp_path, scheduler):
    tiny_pipe(9, seed=3, scheduler_class=scheduler).save_vton_adapter(tmp_path)
    pipe = tiny_pipe(9)
    before = run(pipe)
    with pytest.raises(ValueError, match=scheduler):
        pipe.load_vton_adapter(tmp_path)
    assert (run(pipe) == before).all()


def test_an_adapter_that_widens_is_not_loaded_into_float8_and_the_one_before_stays(tmp_path):
    source = tiny_pipe(4, seed=3)
    widen_conv_in(source.unet)
    source.save_vton_adapter(tmp_path)
    pipe = tiny_pipe(4)
    pipe.load_vton_adapter(tmp_path)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    before = run(pipe)
    with pytest.raises(ValueError, match="float8, in which `conv_in` is not widened"):
        pipe.load_vton_adapter(tmp_path)
    assert (run(pipe) == before).all()


def test_weights_that_are_kept_in_float8_are_not_published(tmp_path):
    saved_adapter(tmp_path / "adapter")
    pipe = tiny_pipe(9)
    pipe.load_vton_adapter(tmp_path / "adapter")
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    for save in (pipe.save_vton_adapter, pipe.save_pretrained):
        with pytest.raises(ValueError, match="float8, to which the adapter's are rounded: save it before"):
            save(tmp_path / "out")
    assert not (tmp_path / "out").exists() and np.isfinite(run(pipe)).all()


def test_without_a_unet_there_is_nothing_to_exchange(tmp_path):
    saved_adapter(tmp_path)
    pipe = tiny_pipe(9)
    pipe.register_modules(unet=None)
    for action in (pipe.load_vton_adapter, pipe.save_vton_adapter, pipe.save_pretrained):
        with pytest.raises(ValueError, match="needs the component `unet`, got None"):
            action(tmp_path)


def test_model_offload_hooks_run_and_give_the_same(tmp_path):
    trained = saved_adapter(tmp_path)
    pipe = tiny_pipe(9)
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.load_vton_adapter(tmp_path)
    assert (run(pipe) == run(trained)).all()
    assert pipe.unet._hf_hook is not None


# ---- LoRA by diffusers' own mixin


def test_lora_weights_save_load_scale_and_unload(tmp_path):
    pipe = tiny_pipe(9)
    base = run(pipe)
    lora_on(pipe)
    with_lora = run(pipe)
    pipe.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    other = tiny_pipe(9)
    other.load_lora_weights(tmp_path)
    np.testing.assert_allclose(run(other), with_lora, atol=1e-6)
    assert abs(with_lora - base).max() > 1e-3
    # the scale reaches the cloth's pass too: at 0 there is no LoRA anywhere
    np.testing.assert_allclose(run(other, cross_attention_kwargs={"scale": 0.0}), base, atol=1e-6)
    np.testing.assert_allclose(run(other, cross_attention_kwargs={"scale": 1.0}), with_lora, atol=1e-6)
    other.unload_lora_weights()
    assert (run(other) == base).all()


# ---- whole pipelines

LOAD = """
import sys, numpy as np, torch
from diffusers import DiffusionPipeline
folder, form, output = sys.argv[1:]
form = {"the repository": {}, "its vton.py": {"custom_pipeline": "vton"}}.get(form, {"custom_pipeline": form})
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **form)
if "custom_pipeline" in form and form["custom_pipeline"] != "vton":
    pipe.load_vton_adapter(folder)
pipe.set_progress_bar_config(disable=True)
pictures = [torch.from_numpy(array) for array in np.load(output + "/pictures.npz").values()]
images = pipe(*pictures, num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
np.save(output + "/images.npy", images)
pipe.save_pretrained(output + "/again")
"""


def as_arrays():
    person, cloth = (np.float32(picture(seed)).transpose(2, 0, 1) / 255 for seed in (1, 2))
    return {"person": person, "cloth": cloth, "mask": np.float32(box_mask())[None] / 255}


def test_other_processes_load_what_was_saved_and_give_the_same(tmp_path):
    trained = trained_pipe(4, guidance_scale=2.0, text=True)
    trained.save_pretrained(tmp_path / "saved")
    trained.save_vton_adapter(tmp_path / "base")
    base = tiny_pipe(4, text=True)
    StableDiffusionInpaintPipeline(
        base.vae, base.text_encoder, base.tokenizer, base.unet, base.scheduler, None, None, requires_safety_checker=False
    ).save_pretrained(tmp_path / "base")  # fmt: skip
    expected = run(trained, num_inference_steps=2)
    forms = {
        "the repository": "saved",
        "its vton.py": "saved",
        str(tmp_path / "saved"): "base",  # its pipeline.py
        str(ROOT / "pipeline_vton.py"): "base",
    }
    processes = []
    for i, (form, folder) in enumerate(forms.items()):
        output = tmp_path / f"output{i}"
        output.mkdir()
        np.savez(output / "pictures.npz", **as_arrays())
        environment = os.environ | {"HF_MODULES_CACHE": str(output / "modules"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", LOAD, str(tmp_path / folder), form, str(output)]
        processes.append(
            subprocess.Popen(command, env=environment, cwd=output, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        )
    for i, (process, form) in enumerate(zip(processes, forms)):
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, (form, errors.decode())
        np.testing.assert_allclose(np.load(tmp_path / f"output{i}" / "images.npy"), expected, atol=1e-6)
        for name in ("pipeline.py", "pipeline_vton.py", "vton.py"):
            again = tmp_path / f"output{i}" / "again" / name
            assert again.read_text() == (tmp_path / "saved" / name).read_text()


def test_the_imported_class_loads_what_was_saved_without_trusting_code(tmp_path):
    trained = trained_pipe(4, guidance_scale=2.0, cross_attention="identity")
    trained.save_pretrained(tmp_path)
    pipe = StableDiffusionVTONPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert (run(pipe) == run(trained)).all()
    assert settings_of(pipe) == settings_of(trained)
    with pytest.raises(ValueError, match="merged"):
        pipe.unload_vton_adapter()
    pipe.save_vton_adapter(tmp_path)  # its adapter is still there to be taken out
    base = tiny_pipe(4)
    base.load_vton_adapter(tmp_path)
    assert (run(base) == run(trained)).all()


def test_a_pipeline_that_was_saved_with_the_old_name_of_a_setting_loads(tmp_path):
    trained_pipe(4, cross_attention="identity").save_pretrained(tmp_path)
    file = tmp_path / "model_index.json"
    index = json.loads(file.read_text())
    index["in_channels"] = index.pop("base_in_channels")
    file.write_text(json.dumps(index))
    pipe = StableDiffusionVTONPipeline.from_pretrained(tmp_path)
    assert (pipe.config.base_in_channels, pipe.config.cross_attention) == (4, "identity")


def test_a_saved_pipeline_takes_another_adapter_and_returns_to_its_merged_weights(tmp_path):
    trained_pipe(4).save_pretrained(tmp_path / "saved")
    other = tiny_pipe(4, seed=5)
    widen_conv_in(other.unet)
    other.save_vton_adapter(tmp_path / "other")
    pipe = StableDiffusionVTONPipeline.from_pretrained(tmp_path / "saved")
    merged = state_of(pipe)
    pipe.load_vton_adapter(tmp_path / "other")
    assert torch.equal(pipe.unet.conv_in.weight, other.unet.conv_in.weight)
    pipe.unload_vton_adapter()
    assert_same_state(pipe, merged)


def test_a_saved_folder_is_a_complete_repository(tmp_path):
    tiny_pipe(9, cross_attention="identity").save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_vton", "StableDiffusionVTONPipeline"]
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert index["cross_attention"] == "identity"
    assert index["safety_checker"] == [None, None]
    assert (tmp_path / "pipeline_vton.py").read_text() == (ROOT / "pipeline_vton.py").read_text()
    names = {path.name for path in Path(tmp_path).iterdir()}
    assert names >= {"model_index.json", "pipeline.py", "pipeline_vton.py", "vton.py", "scheduler", "unet", "vae"}


@pytest.mark.parametrize("option", [{"push_to_hub": True}, {"safe_serialization": False}, {"adapter_only": True}])
def test_saving_refuses_what_would_upload_too_early_pickle_or_be_passed_over(tmp_path, option):
    with pytest.raises((ValueError, TypeError), match=next(iter(option))):
        tiny_pipe(9).save_pretrained(tmp_path, **option)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["cloth_conditioning", "canvas_axis", "cross_attention", "condition_latents", "trainable"]
)
def test_an_unknown_setting_of_the_pipeline_is_an_error(name):
    with pytest.raises(ValueError, match=f"`{name}`.*'nonsense'"):
        tiny_pipe(9, **{name: "nonsense"})


def test_the_pipeline_is_made_of_its_components_whatever_is_none():
    pipe = tiny_pipe(9, cross_attention="identity")
    again = StableDiffusionVTONPipeline(**pipe.components, cross_attention="identity")
    again.set_progress_bar_config(disable=True)
    assert (run(again) == run(pipe)).all()
    assert set(StableDiffusionVTONPipeline(None, None, None).components) == set(pipe.components)
    piped = StableDiffusionVTONPipeline.from_pipe(pipe, dtype=torch.float32)
    assert piped.config.cross_attention == "identity"
    assert isinstance(piped, DiffusionPipeline)
