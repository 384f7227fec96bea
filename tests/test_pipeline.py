"""Calls of the pipeline: sizes, inputs, compositing, batches, guidance, callbacks, schedulers and the safety checker."""

import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from tiny import box_mask, picture, run, seeded, tiny_parser, tiny_pipe, tiny_text
from transformers import CLIPConfig, CLIPImageProcessor


def as_float(image):
    return np.float32(image) / 255


def hooked_inputs(pipe):
    """The UNet's input of every call from now on."""
    inputs = []
    pipe.unet.register_forward_pre_hook(lambda unet, args: inputs.append(args[0]))
    return inputs


def models_run(pipe):
    """The names of the models that run from now on."""
    names = []
    for name, model in (
        ("unet", pipe.unet),
        ("vae", pipe.vae.encoder),
        ("text", pipe.text_encoder),
        ("parser", pipe.human_parser),
    ):
        if model is not None:
            model.register_forward_pre_hook(lambda model, args, name=name: names.append(name))
    return names


def unet_rows(pipe, **options):
    """The rows of every UNet call of a run."""
    inputs = hooked_inputs(pipe)
    run(pipe, **options)
    return [len(rows) for rows in inputs]


# ---- sizes


@pytest.mark.parametrize(
    "person, given, size",
    [
        ((32, 32), (None, None), (32, 32)),
        ((4000, 3000), (None, None), (40, 24)),
        ((3000, 4000), (None, None), (24, 40)),
        ((7, 700), (None, None), (8, 320)),
        ((32, 24), (64, None), (64, 48)),
        ((32, 24), (None, 48), (64, 48)),
        ((32, 24), (16, 40), (16, 40)),
    ],
)
def test_the_size_to_work_at_keeps_the_aspect_and_the_native_area(person, given, size):
    assert tiny_pipe(9).resolve_size(*person, *given) == size


def test_the_native_area_is_the_adapters_before_the_unets():
    assert tiny_pipe(9, height=64, width=48).resolve_size(640, 480, None, None) == (64, 48)
    pipe = tiny_pipe(9)
    pipe.unet.register_to_config(sample_size=(16, 12))
    assert pipe.resolve_size(640, 480, None, None) == (64, 48)


def test_a_given_size_is_the_size_that_the_unet_works_at():
    pipe = tiny_pipe(9)
    inputs = hooked_inputs(pipe)
    images = run(pipe, height=48, width=16, composite=False)
    assert {tuple(rows.shape[-2:]) for rows in inputs} == {(12, 4)}
    assert images.shape == (1, 48, 16, 3)


@pytest.mark.parametrize("name", ["height", "width"])
@pytest.mark.parametrize("value", [0, -8, 12, 32.5, "32", True, float("nan"), float("inf")])
def test_a_side_that_is_no_multiple_is_an_error(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be a positive multiple of 8, got {value!r}"):
        run(tiny_pipe(9), **{name: value})


# ---- what pictures may be


def in_form(image, form):
    array = np.array(image)
    array = array if array.ndim == 3 else array[..., None]
    tensor = torch.from_numpy(array).movedim(-1, 0)
    return {
        "list": [image],
        "uint8 array": array,
        "float array": array / 255,
        "array batch": array[None],
        "uint8 tensor": tensor,
        "float tensor": tensor.float() / 255,
        "tensor batch": tensor[None].float() / 255,
        "list of tensors": [tensor.double() / 255],
        "flat": array[..., 0],
        "boolean": array[..., 0] > 0,
    }[form]


@pytest.mark.parametrize(
    "form", ["list", "uint8 array", "float array", "array batch", "uint8 tensor", "float tensor", "tensor batch", "list of tensors"]
)  # fmt: skip
def test_pictures_in_every_form_are_the_same_pictures(form):
    pipe = tiny_pipe(9)
    pictures = picture(1), picture(2), box_mask()
    given = [in_form(image, form) for image in pictures]
    assert (run(pipe, *given, output_type="pil")[0].tobytes()) == run(pipe, *pictures, output_type="pil")[0].tobytes()


@pytest.mark.parametrize("form", ["flat", "boolean"])
def test_masks_may_be_flat_or_boolean(form):
    pipe = tiny_pipe(9)
    assert (run(pipe, mask=in_form(box_mask(), form)) == run(pipe)).all()


def test_inputs_are_left_as_they_were():
    given = [in_form(image, "float tensor") for image in (picture(1), picture(2), box_mask())]
    before = [tensor.clone() for tensor in given]
    run(tiny_pipe(9), *given)
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(given, before))


def test_a_mask_is_cut_at_one_half():
    soft = np.array(box_mask())
    soft[:3], soft[12:15, 6:18] = 127, 128
    pipe = tiny_pipe(9)
    assert (run(pipe, mask=soft) == run(pipe)).all()


def test_the_masks_latent_is_the_nearest_pixel_of_the_mask():
    mask = Image.new("L", (24, 32))
    mask.paste(255, (6, 10, 18, 26))  # edges in the middle of a latent's four pixels
    job = tiny_pipe(9).check_inputs(picture(1), picture(2), mask, "upper", 32, 24, None)
    latent = tiny_pipe(9).encode_pictures(job).mask[0, 0].numpy()
    assert (latent == (np.asarray(mask)[::4, ::4] > 0)).all()


def test_a_cloth_is_fitted_whole_on_white():
    cloth = Image.new("RGB", (100, 20), "red")
    white = Image.new("RGB", (24, 40), "white")
    white.paste("red", (0, 18, 24, 23))
    pipe = tiny_pipe(9)
    assert (run(pipe, cloth=cloth) == run(pipe, cloth=white)).all()


# ---- compositing


@pytest.mark.parametrize("size", [(32, 24), (61, 47), (20, 90)])
def test_outside_the_mask_every_pixel_is_the_photographs(size):
    person, mask = picture(1, *size), box_mask(*size)
    images = run(tiny_pipe(9), person, mask=mask)
    assert images.shape == (1, *size, 3)
    inside = np.asarray(mask) > 0
    assert (images[0][~inside] == as_float(person)[~inside]).all()
    assert (images[0] != as_float(person)).any(axis=-1)[inside].mean() > 0.9


def test_float_pictures_keep_what_eight_bits_cannot_hold():
    person = torch.rand(3, 32, 24, generator=seeded(1))
    result, outside = run(tiny_pipe(9), person, output_type="pt")[0], np.asarray(box_mask()) == 0
    assert torch.equal(result[:, outside], person[:, outside])


def test_without_compositing_the_decode_comes_back():
    pipe = tiny_pipe(9)
    person, mask = picture(1, 50, 30), box_mask(50, 30)
    bare = run(pipe, person, mask=mask, composite=False, output_type="pt")
    assert bare.shape == (1, 3, 40, 24)
    latents = run(pipe, person, mask=mask, output_type="latent")
    assert torch.equal(bare, pipe.decode_latents(latents))
    outside = np.asarray(box_mask(40, 24)) == 0
    assert (bare[0].movedim(0, -1).numpy() != as_float(person.resize((24, 40))))[outside].any()


def test_padding_mask_crop_works_on_the_masks_surroundings_alone():
    person, mask = picture(1, 120, 100), Image.new("L", (100, 120))
    mask.paste(255, (60, 20, 80, 50))
    size = {"height": 32, "width": 24}
    region = VaeImageProcessor.get_crop_region(mask, 24, 32, pad=6)
    assert region[2] - region[0] < 50
    pipe = tiny_pipe(9)
    whole = run(pipe, person, mask=mask, padding_mask_crop=6, output_type="pil", **size)[0]
    part = run(pipe, person.crop(region), mask=mask.crop(region), output_type="pil", **size)[0]
    expected = person.copy()
    expected.paste(part, region)
    assert whole.tobytes() == expected.tobytes()
    assert whole.tobytes() != person.tobytes()


def test_mask_free_without_a_mask_returns_the_whole_decode_at_the_photographs_size():
    for in_channels in (8, 9):
        pipe = tiny_pipe(in_channels, mask_free=True)
        inputs = hooked_inputs(pipe)
        result = pipe(picture(1, 50, 30), picture(2), num_inference_steps=2, generator=seeded()).images[0]
        assert result.size == (30, 50)
        kept = pipe.encode_pictures(pipe.check_inputs(picture(1, 50, 30), picture(2), None, "upper", None, None, None))
        assert torch.equal(inputs[-1][:1, -4:], kept.person)
        if in_channels == 9:
            assert (inputs[-1][:, 4] == 1).all()


def test_mask_free_shows_the_person_whole_and_composites_within_a_given_mask():
    pipe = tiny_pipe(8, mask_free=True)
    inputs = hooked_inputs(pipe)
    images = run(pipe)
    outside = np.asarray(box_mask()) == 0
    assert (images[0][outside] == as_float(picture(1))[outside]).all()
    whole = pipe.encode_pictures(pipe.check_inputs(picture(1), picture(2), None, "upper", None, None, None)).person
    assert torch.equal(inputs[-1][:1, -4:], whole)
    masked = tiny_pipe(8)
    inputs = hooked_inputs(masked)
    run(masked)
    assert not torch.equal(inputs[-1][:1, -4:], whole)


def test_the_result_does_not_depend_on_the_person_under_the_mask():
    inside = np.asarray(box_mask()) > 0
    other = np.array(picture(1))
    other[inside] = np.asarray(picture(9))[inside]
    pipe = tiny_pipe(9)
    assert (run(pipe, height=32, width=24)[0][inside] == run(pipe, other, height=32, width=24)[0][inside]).all()


# ---- batches


# at their own size, pictures come back without a rounding to eight bits
OWN_SIZE = {"height": 32, "width": 24}
MODES = [{}, {"cloth_conditioning": "joint"}, {"cross_attention": "prompt", "text": True}]


@pytest.mark.parametrize("settings", MODES)
def test_a_batch_equals_its_singles(settings):
    pipe = tiny_pipe(9, **settings)
    persons, cloths = [picture(1), picture(3)], [picture(2), picture(4)]
    masks = [box_mask(), box_mask().rotate(180, translate=(3, 2))]
    options = {"prompt": "a shirt"} if settings.get("text") else {}
    batch = run(pipe, persons, cloths, masks, generator=[seeded(5), seeded(6)], **options, **OWN_SIZE)
    for i in range(2):
        single = run(pipe, persons[i], cloths[i], masks[i], generator=seeded(5 + i), **options, **OWN_SIZE)
        np.testing.assert_allclose(batch[i], single[0], atol=1e-4)


@pytest.mark.parametrize("settings", MODES)
@pytest.mark.parametrize("many", ["person", "cloth", "mask"])
def test_one_picture_goes_with_many(many, settings):
    pipe = tiny_pipe(9, **settings)
    several = {
        "person": [picture(1), picture(3), picture(5)],
        "cloth": [picture(2), picture(4), picture(6)],
        "mask": [box_mask(), box_mask().rotate(180, translate=(3, 2)), Image.new("L", (24, 32), 255)],
    }[many]
    batch = run(pipe, **{many: several}, generator=[seeded(i) for i in range(3)], **OWN_SIZE)
    assert len(batch) == 3
    for i, one in enumerate(several):
        np.testing.assert_allclose(batch[i], run(pipe, **{many: one}, generator=seeded(i), **OWN_SIZE)[0], atol=1e-4)


@pytest.mark.parametrize("settings", MODES)
def test_results_of_one_person_stand_together(settings):
    pipe = tiny_pipe(9, **settings)
    persons, cloths = [picture(1), picture(3)], [picture(2), picture(4)]
    options = {"prompt": ["red", "blue"]} if settings.get("text") else {}
    batch = run(
        pipe, persons, cloths, num_images_per_prompt=2, generator=[seeded(i) for i in range(4)], **options, **OWN_SIZE
    )
    assert len(batch) == 4
    for i in range(4):
        single = {name: value[i // 2] for name, value in options.items()}
        expected = run(pipe, persons[i // 2], cloths[i // 2], generator=seeded(i), **single, **OWN_SIZE)
        np.testing.assert_allclose(batch[i], expected[0], atol=1e-4)


def test_one_generator_draws_for_the_whole_batch_and_the_same_seed_gives_the_same():
    pipe = tiny_pipe(9)
    first, second = (run(pipe, num_images_per_prompt=2, seed=4) for _ in range(2))
    assert (first == second).all()
    assert abs(first[0] - first[1]).max() > 1e-3
    assert abs(first - run(pipe, num_images_per_prompt=2, seed=5)).max() > 1e-3


@pytest.mark.parametrize("settings, sides", [({}, (10, 6)), ({"cloth_conditioning": "joint"}, (20, 6))])
def test_given_latents_are_the_first_noise(settings, sides):
    pipe = tiny_pipe(9, **settings)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    noise = torch.randn(1, 4, *sides, generator=seeded(3))
    assert (run(pipe, latents=noise) == run(pipe, generator=seeded(3))).all()


# ---- outputs


def test_output_types_show_the_same_result():
    pipe = tiny_pipe(9)
    arrays, tensors, images, latents = (run(pipe, output_type=kind) for kind in ("np", "pt", "pil", "latent"))
    assert arrays.shape == (1, 32, 24, 3) and arrays.dtype == np.float32
    assert (tensors.movedim(1, -1).numpy() == arrays).all()
    assert (np.asarray(images[0]) == (arrays[0] * 255).round()).all()
    assert latents.shape == (1, 4, 10, 6)
    images, flags = pipe(
        picture(1), picture(2), box_mask(), num_inference_steps=3, generator=seeded(), output_type="np", return_dict=False
    )  # fmt: skip
    assert (images == arrays).all() and flags is None


def test_results_of_different_sizes_need_pil_and_say_so_before_any_work():
    pipe = tiny_pipe(9)
    inputs = hooked_inputs(pipe)
    pictures = {"person": [picture(1), picture(1, 64, 48)], "mask": [box_mask(), box_mask(64, 48)]}
    with pytest.raises(ValueError, match="`output_type`='np'"):
        run(pipe, **pictures)
    assert not inputs
    assert [image.size for image in run(pipe, **pictures, output_type="pil")] == [(24, 32), (48, 64)]
    assert run(pipe, **pictures, composite=False).shape == (2, 40, 24, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_pipeline_runs_in_another_dtype(dtype):
    pipe = tiny_pipe(9).to(dtype)
    result = run(pipe)
    assert result.dtype == np.float32 and np.isfinite(result).all()
    outside = np.asarray(box_mask()) == 0
    assert (result[0][outside] == as_float(picture(1))[outside]).all()


# ---- guidance


def test_guidance_of_one_runs_half_the_rows_and_the_cloth_is_read_once():
    assert unet_rows(tiny_pipe(9), guidance_scale=1.0) == [1, 1, 1, 1]
    assert unet_rows(tiny_pipe(9), guidance_scale=2.0) == [1, 2, 2, 2]
    assert unet_rows(tiny_pipe(9, cloth_conditioning="joint"), guidance_scale=2.0) == [2, 2, 2]
    assert unet_rows(tiny_pipe(9), person=[picture(1), picture(3)], num_images_per_prompt=2) == [1, 8, 8, 8]


@pytest.mark.parametrize(
    "interval, rows",
    [
        ((0.0, 1.0), [2, 2, 2, 2]),
        ((0.25, 0.75), [1, 2, 2, 1]),
        ((0.5, 1.0), [1, 1, 2, 2]),
        ((0.0, 0.5), [2, 2, 1, 1]),
        ((0.5, 0.5), [1, 1, 1, 1]),
    ],
)
def test_guidance_interval_skips_rows_outside_it(interval, rows):
    assert unet_rows(tiny_pipe(9), guidance_interval=interval, num_inference_steps=4) == [1, *rows]


def test_an_empty_guidance_interval_is_a_guidance_of_one():
    pipe = tiny_pipe(9)
    assert (run(pipe, guidance_interval=(0, 0)) == run(pipe, guidance_scale=1)).all()
    assert abs(run(pipe, guidance_scale=3) - run(pipe, guidance_scale=1)).max() > 1e-3


def test_guidance_scale_none_is_the_settings():
    pipe = tiny_pipe(9, guidance_scale=2.5)
    assert (run(pipe) == run(pipe, guidance_scale=2.5)).all()
    assert pipe.guidance_scale == 2.5 and pipe.do_classifier_free_guidance
    assert unet_rows(tiny_pipe(9, guidance_scale=1.0)) == [1, 1, 1, 1]


def test_guidance_rescale_gives_the_guided_noise_the_spread_of_the_conditional():
    pipe = tiny_pipe(9)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    outputs, first = [], torch.randn(1, 4, 10, 6, generator=seeded(3))
    pipe.unet.register_forward_hook(lambda unet, args, output: outputs.append(output[0]))
    options = {"latents": first, "num_inference_steps": 1, "guidance_scale": 5.0, "output_type": "latent"}
    latents = run(pipe, guidance_rescale=1.0, **options)
    uncond, cond = outputs[-1].chunk(2)
    guided = uncond + 5 * (cond - uncond)
    t = pipe.scheduler.timesteps[0]
    expected = pipe.scheduler.step(guided * cond.std() / guided.std(), t, first).prev_sample
    torch.testing.assert_close(latents, expected)
    plain = pipe.scheduler.step(guided, t, first).prev_sample
    torch.testing.assert_close(run(pipe, **options), plain)
    assert (plain - expected).abs().max() > 1e-2


# ---- callbacks and the progress of a call


def test_a_callback_sees_every_step_and_what_it_returns_replaces_the_latents():
    pipe, steps = tiny_pipe(9), []

    def zero(pipe, step, t, tensors):
        steps.append((step, int(t), set(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = run(pipe, callback_on_step_end=zero, output_type="latent")
    assert not latents.any()
    assert [step for step, _, _ in steps] == [0, 1, 2]
    assert [t for _, t, _ in steps] == pipe.scheduler.timesteps.tolist()
    assert all(names == {"latents"} for _, _, names in steps)
    assert pipe.num_timesteps == 3


def test_a_callback_can_look_at_and_replace_the_prompts():
    pipe = tiny_pipe(9, text=True, cross_attention="prompt")
    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def swap(pipe, step, t, tensors):
        assert list(tensors) == names and tensors["prompt_embeds"].shape == (1, 77, 32)
        return {"prompt_embeds": tensors["prompt_embeds"] * 0}

    options = {"callback_on_step_end_tensor_inputs": names, "prompt": "a shirt"}
    assert abs(run(pipe, callback_on_step_end=swap, **options) - run(pipe, prompt="a shirt")).max() > 1e-4


def test_a_text_encoder_may_have_another_dtype_than_the_unet():
    pipe = tiny_pipe(9, text=True, cross_attention="prompt")
    expected = run(pipe, prompt="a shirt")
    pipe.text_encoder.half()
    assert abs(run(pipe, prompt="a shirt") - expected).max() < 1e-2


def test_interrupting_skips_the_remaining_steps():
    pipe = tiny_pipe(9)

    def stop(pipe, step, t, tensors):
        pipe._interrupt = True
        return {}

    assert unet_rows(pipe, callback_on_step_end=stop) == [1, 2]
    assert pipe.interrupt
    assert unet_rows(pipe) == [1, 2, 2, 2]


def test_the_loop_rereads_the_guidance_scale():
    def cut(pipe, step, t, tensors):
        pipe._guidance_scale = 0.0
        return {}

    assert unet_rows(tiny_pipe(9), callback_on_step_end=cut) == [1, 2, 1, 1]


def test_the_progress_bar_counts_the_steps(capsys):
    pipe = tiny_pipe(9)
    pipe.set_progress_bar_config(disable=False)
    run(pipe)
    assert "3/3" in capsys.readouterr().err


# ---- schedulers


SCHEDULERS = [
    (DDPMScheduler, {}),
    (DDPMScheduler, {"prediction_type": "v_prediction"}),
    (DDIMScheduler, {}),
    (PNDMScheduler, {"skip_prk_steps": True}),
    (EulerDiscreteScheduler, {}),
    (EulerAncestralDiscreteScheduler, {}),
    (HeunDiscreteScheduler, {}),
    (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    (UniPCMultistepScheduler, {}),
    (LCMScheduler, {}),
]


@pytest.mark.parametrize("scheduler, settings", SCHEDULERS, ids=lambda x: getattr(x, "__name__", None))
def test_schedulers_run_batches_alike_and_repeatably(scheduler, settings):
    pipe = tiny_pipe(9)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **settings)
    batch = run(
        pipe, cloth=[picture(2), picture(4)], generator=[seeded(1), seeded(2)], num_inference_steps=4, **OWN_SIZE
    )
    assert np.isfinite(batch).all()
    for i in range(2):
        single = run(pipe, cloth=picture(2 + 2 * i), generator=seeded(1 + i), num_inference_steps=4, **OWN_SIZE)
        np.testing.assert_allclose(batch[i], single[0], atol=1e-3)
    assert (
        abs(batch[0] - run(pipe, cloth=picture(4), generator=seeded(1), num_inference_steps=4, **OWN_SIZE)).max()
        > 1e-4
    )


def test_eta_adds_noise_to_ddim_from_the_generator():
    pipe = tiny_pipe(9)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    still, noisy, again = (run(pipe, eta=eta) for eta in (0.0, 1.0, 1.0))
    assert (noisy == again).all() and abs(still - noisy).max() > 1e-3


@pytest.mark.parametrize("scheduler, settings", SCHEDULERS)
def test_a_scheduler_needs_no_value_from_the_device_that_denoises(scheduler, settings, monkeypatch):
    """Its timesteps are on the host, whatever device denoises; to read them there it would wait. Meta tensors have no values."""
    pipe, asked = tiny_pipe(), []
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **settings)
    set_timesteps = pipe.scheduler.set_timesteps
    monkeypatch.setattr(type(pipe), "_execution_device", torch.device("cpu:0"))
    with monkeypatch.context() as patched:
        patched.setattr(
            pipe.scheduler,
            "set_timesteps",
            lambda *args, device, **options: (
                asked.append(str(device)),
                set_timesteps(*args, device=device, **options),
            ),
        )
        run(pipe)
    assert asked == ["cpu"]
    pipe.scheduler.set_timesteps(4, device="cpu")
    latents = torch.empty(1, 4, 8, 8, device="meta")
    for t in pipe.scheduler.timesteps:
        noise_pred = pipe.scheduler.scale_model_input(latents, t)
        latents = pipe.scheduler.step(noise_pred, t, latents, return_dict=False)[0]
    assert latents.device.type == "meta"


def test_the_noise_starts_at_the_schedulers_scale_and_the_cloth_is_never_scaled():
    pipe = tiny_pipe(9)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    inputs = hooked_inputs(pipe)
    noise = torch.randn(1, 4, 10, 6, generator=seeded(3))
    run(pipe, latents=noise)
    pipe.scheduler.set_timesteps(3)
    sigma = pipe.scheduler.sigmas[0]
    assert pipe.scheduler.init_noise_sigma > 2
    cloth = pipe.encode_pictures(
        pipe.check_inputs(picture(1), picture(2), box_mask(), "upper", None, None, None)
    ).cloth
    assert torch.equal(inputs[0][:, :4], cloth)
    scaled = noise * pipe.scheduler.init_noise_sigma / (sigma**2 + 1) ** 0.5
    torch.testing.assert_close(inputs[1][:1, :4], scaled)


def test_timesteps_may_be_chosen():
    pipe, seen = tiny_pipe(9), []
    run(pipe, timesteps=[900, 400, 10], callback_on_step_end=lambda pipe, step, t, tensors: seen.append(int(t)) or {})
    assert seen == [900, 400, 10]
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="timestep"):
        run(pipe, timesteps=[900, 400, 10])


# ---- the safety checker


def add_safety_checker(pipe, flags):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # fmt: skip
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8)).eval()
    with torch.no_grad():  # the thresholds of its cosine distances
        checker.concept_embeds_weights.fill_(-2.0 if flags else 2.0)
        checker.special_care_embeds_weights.fill_(2.0)
    extractor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    pipe.register_modules(safety_checker=checker, feature_extractor=extractor)
    return pipe


def test_a_flagged_picture_is_black_all_over_and_others_stay():
    pictures = {"person_image": [picture(1), picture(3)], "cloth_image": picture(2), "mask_image": box_mask()}
    options = {"num_inference_steps": 2, "output_type": "np"}
    plain = tiny_pipe(9)(**pictures, **options, generator=seeded())
    passed = add_safety_checker(tiny_pipe(9), flags=False)(**pictures, **options, generator=seeded())
    flagged = add_safety_checker(tiny_pipe(9), flags=True)(**pictures, **options, generator=seeded())
    assert plain.nsfw_content_detected is None
    assert passed.nsfw_content_detected == [False, False] and (passed.images == plain.images).all()
    assert flagged.nsfw_content_detected == [True, True] and not flagged.images.any()
    assert flagged.images.shape == plain.images.shape


def test_a_safety_checker_needs_its_feature_extractor():
    pipe = add_safety_checker(tiny_pipe(9), flags=False)
    pipe.register_modules(feature_extractor=None)
    with pytest.raises(ValueError, match="`feature_extractor`.*None"):
        run(pipe)


# ---- bad input


def spoiled(value, index=(0, 0, 0)):
    tensor = torch.full((3, 32, 24), 0.5)
    tensor[index] = value
    return tensor


BAD_PICTURES = {
    "a path": ("person.png", TypeError, "got str"),
    "nothing": (None, TypeError, "got NoneType"),
    "a list of nothing": ([None], TypeError, "got NoneType"),
    "an empty list": ([], ValueError, r"at least one picture, got \[\]"),
    "an empty batch": (torch.zeros(0, 3, 32, 24), ValueError, "at least one picture"),
    "an empty picture": (np.zeros((0, 24, 3), np.uint8), ValueError, r"\(3, 0, 24\)"),
    "an empty image": (Image.new("RGB", (0, 5)), ValueError, "must have pixels, got a picture of 0x5"),
    "four channels": (torch.zeros(4, 32, 24), ValueError, r"\(4, 32, 24\)"),
    "a batch of four channels": (torch.zeros(1, 4, 8, 6), ValueError, r"\(4, 8, 6\)"),
    "a list with four channels": ([torch.zeros(4, 32, 24)], ValueError, r"\(4, 32, 24\)"),
    "an RGBA array": (np.zeros((32, 24, 4), np.uint8), ValueError, r"\(4, 32, 24\)"),
    "a batch in a list": ([torch.zeros(1, 3, 32, 24)], ValueError, r"\(1, 3, 32, 24\)"),
    "a row of numbers": (np.zeros(5, np.float32), ValueError, r"\(5,\)"),
    "NaN": (spoiled(float("nan")), ValueError, "finite values from 0 to 1, got values from nan"),
    "infinity": (spoiled(float("inf")), ValueError, "finite values from 0 to 1, got values from 0.5 to inf"),
    "minus one": (spoiled(-1.0), ValueError, "got values from -1 to 0.5"),
    "255 as a float": (spoiled(255.0), ValueError, "got values from 0.5 to 255"),
    "int64": (torch.zeros(3, 32, 24, dtype=torch.int64), TypeError, "torch.int64"),
}


@pytest.mark.parametrize("name", ["person_image", "cloth_image", "mask_image"])
@pytest.mark.parametrize("value, error, message", BAD_PICTURES.values(), ids=BAD_PICTURES.keys())
def test_a_bad_picture_is_one_clear_error(name, value, error, message):
    pipe = tiny_pipe(9)
    pictures = {"person_image": picture(1), "cloth_image": picture(2), "mask_image": box_mask()}
    if name == "mask_image":
        if value is None:
            error, message = ValueError, "human_parser"
        elif isinstance(value, torch.Tensor) and value.ndim == 3 and len(value) == 3:
            value = value[:1]
    with pytest.raises(error, match=f"^`{name}`.*{message}") as raised:
        pipe(**(pictures | {name: value}))
    assert "\n" not in str(raised.value)


BAD_CALLS = {
    "persons and cloths": ({"person": [picture(1)] * 2, "cloth": [picture(2)] * 3}, "`person_image` must number 1 or 3.*2"),
    "masks": ({"person": [picture(1)] * 3, "mask": [box_mask()] * 2}, "`mask_image` must number 1 or 3.*2"),
    "mask of another size": ({"mask": box_mask(24, 32)}, r"`mask_image`.*\(32, 24\).*\(24, 32\)"),
    "black mask": ({"mask": Image.new("L", (24, 32))}, "`mask_image`.*black"),
    "one black mask of two": ({"mask": [box_mask(), Image.new("L", (24, 32), 20)]}, "`mask_image`.*black everywhere"),
    "persons of two sizes": (
        {"person": [picture(1), picture(1, 24, 32)], "mask": [box_mask(), box_mask(24, 32)], "output_type": "pil"},
        "`person_image`.*height",
    ),
    "cloth type": ({"cloth_type": "hat"}, "`cloth_type`.*'hat'"),
    "no steps": ({"num_inference_steps": 0}, "`num_inference_steps`.*0"),
    "negative steps": ({"num_inference_steps": -3}, "`num_inference_steps`.*-3"),
    "half a step": ({"num_inference_steps": 2.5}, "`num_inference_steps`.*2.5"),
    "more steps than timesteps": ({"num_inference_steps": 1001}, "num_inference_steps.*1001"),
    "no images": ({"num_images_per_prompt": 0}, "`num_images_per_prompt`.*0"),
    "no timesteps": ({"timesteps": []}, r"`timesteps`.*\[\]"),
    "rising timesteps": ({"timesteps": [10, 400]}, "timesteps"),
    "guidance NaN": ({"guidance_scale": float("nan")}, "`guidance_scale`.*nan"),
    "guidance in words": ({"guidance_scale": "7.5"}, "`guidance_scale`.*'7.5'"),
    "rescale NaN": ({"guidance_rescale": float("nan")}, "`guidance_rescale`.*nan"),
    "rescale None": ({"guidance_rescale": None}, "`guidance_rescale`.*None"),
    "rescale too large": ({"guidance_rescale": 1.5}, "`guidance_rescale`.*from 0 to 1, got 1.5"),
    "eta too large": ({"eta": 7.5}, "`eta`.*from 0 to 1, got 7.5"),
    "eta negative": ({"eta": -0.1}, "`eta`.*from 0 to 1, got -0.1"),
    "steps of truth": ({"num_inference_steps": True}, "`num_inference_steps`.*True"),
    "eta in words": ({"eta": "1"}, "`eta`.*'1'"),
    "interval reversed": ({"guidance_interval": (0.8, 0.2)}, r"`guidance_interval`.*\(0.8, 0.2\)"),
    "interval too long": ({"guidance_interval": (0.0, 1.5)}, "`guidance_interval`.*1.5"),
    "interval of one": ({"guidance_interval": 0.5}, "`guidance_interval`.*0.5"),
    "interval of three": ({"guidance_interval": (0, 0.5, 1)}, "`guidance_interval`"),
    "interval in words": ({"guidance_interval": ("0", "1")}, "`guidance_interval`"),
    "output type": ({"output_type": "jpeg"}, "`output_type`.*'jpeg'"),
    "padding": ({"padding_mask_crop": -1}, "`padding_mask_crop`.*-1"),
    "half padding": ({"padding_mask_crop": 0.5}, "`padding_mask_crop`.*0.5"),
    "attention kwargs": ({"cross_attention_kwargs": {"gligen": 1}}, "`cross_attention_kwargs`.*gligen"),
    "attention kwargs listed": ({"cross_attention_kwargs": ["scale"]}, "`cross_attention_kwargs`.*scale"),
    "callback": ({"callback_on_step_end": 3}, "`callback_on_step_end`.*int"),
    "callback names": ({"callback_on_step_end_tensor_inputs": ["noise"]}, "`callback_on_step_end_tensor_inputs`.*noise"),
    "generators": ({"generator": [seeded()] * 2}, "`generator`.*1.*2"),
    "a seed": ({"generator": 42}, "`generator`.*42"),
    "latents' shape": ({"latents": torch.zeros(1, 4, 8, 8)}, r"`latents`.*\(1, 4, 10, 6\).*\(1, 4, 8, 8\)"),
    "latents' type": ({"latents": np.zeros((1, 4, 10, 6))}, "`latents`.*ndarray"),
    "prompt": ({"prompt": 3}, "`prompt`.*3"),
    "prompts": ({"negative_prompt": ["a", None]}, "`negative_prompt`.*None"),
    "prompt embeddings": ({"prompt_embeds": "a shirt"}, "`prompt_embeds`.*str"),
    "both": ({"prompt": "a shirt", "prompt_embeds": torch.zeros(1, 77, 32)}, "`prompt` and `prompt_embeds`"),
}  # fmt: skip


@pytest.mark.parametrize("options, message", BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_a_bad_argument_is_one_clear_error_before_any_model_runs(options, message):
    pipe = tiny_pipe(9)
    ran = models_run(pipe)
    with pytest.raises((ValueError, TypeError), match=message) as raised:
        run(pipe, **options)
    assert "\n" not in str(raised.value)
    assert not ran


BAD_PROMPTS = {
    "too many": ({"prompt": ["a", "b"]}, "`prompt`.*1.*2"),
    "too many negative": ({"negative_prompt": ["a", "b"]}, "`negative_prompt`.*1.*2"),
    "rows": (
        {"prompt_embeds": torch.zeros(2, 77, 32), "negative_prompt_embeds": torch.zeros(1, 77, 32)},
        r"`prompt_embeds`.*\(1, tokens, 32\).*\(2, 77, 32\)",
    ),
    "features": ({"prompt": "a", "negative_prompt_embeds": torch.zeros(1, 77, 8)}, r"`negative_prompt_embeds`.*32"),
    "tokens": ({"prompt": "a", "negative_prompt_embeds": torch.zeros(1, 9, 32)}, "`negative_prompt_embeds`.*77.*9"),
    "flat": ({"prompt_embeds": torch.zeros(77, 32)}, "`prompt_embeds`"),
}


@pytest.mark.parametrize("options, message", BAD_PROMPTS.values(), ids=BAD_PROMPTS.keys())
def test_a_bad_prompt_is_one_clear_error_before_any_model_runs(options, message):
    pipe = tiny_pipe(9, text=True, cross_attention="prompt")
    ran = models_run(pipe)
    with pytest.raises(ValueError, match=message):
        run(pipe, **options)
    assert not ran


@pytest.mark.parametrize("negative", [None, "a coat"])
def test_embeddings_go_with_a_negative_text_and_without_one_as_in_stable_diffusions_pipeline(negative):
    pipe = tiny_pipe(9, text=True, cross_attention="prompt")
    embeddings = pipe.encode_prompt("a shirt", "cpu", 1, False)[0]
    expected = run(pipe, prompt="a shirt", negative_prompt=negative)
    assert (run(pipe, prompt_embeds=embeddings, negative_prompt=negative) == expected).all()
    pipe.register_modules(text_encoder=None, tokenizer=None)
    with pytest.raises(ValueError, match="`negative_prompt_embeds`.*None|`negative_prompt`"):
        run(pipe, prompt_embeds=embeddings, negative_prompt=negative)


def test_settings_are_checked_without_a_call():
    pipe = tiny_pipe(9)

    def look(pipe, step, t, tensors):
        pipe.check_settings(40, 24, 3)  # the call goes on with its own steps
        return {}

    assert (run(pipe, num_inference_steps=4, callback_on_step_end=look) == run(pipe, num_inference_steps=4)).all()
    for steps in (0, -1, 2.5, "a", True, 5000):
        with pytest.raises(ValueError, match=f"num_inference_steps.*{steps}"):
            pipe.check_settings(num_inference_steps=steps)
    with pytest.raises(ValueError, match="`width` must be a positive multiple of 8, got 25"):
        pipe.check_settings(40, 25)
    pipe.unet.register_to_config(sample_size=None)  # diffusers' own default
    assert (
        pipe.resolve_size(64, 48, 40, 24) == (40, 24)
        and pipe.resolve_size(64, 64, None, None) == (64 * pipe.vae_scale_factor,) * 2
    )


def test_bad_latents_are_an_error_before_the_parser_and_the_text_encoder_run():
    pipe = tiny_pipe(9)
    pipe.register_modules(**dict(zip(("human_parser", "human_parser_processor"), tiny_parser(["top"]))))
    pipe.register_modules(**dict(zip(("text_encoder", "tokenizer"), tiny_text())))
    pipe.register_to_config(cross_attention="prompt")
    ran = models_run(pipe)
    for options in ({"latents": torch.zeros(1, 4, 8, 8)}, {"generator": [seeded()] * 2}, {"timesteps": [10, 400]}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}"):
            pipe(picture(1), picture(2), prompt="a shirt", **options)
    assert not ran
    pipe(picture(1), [picture(2), picture(4)], num_inference_steps=1)
    assert ran == ["parser", "text", "text", "vae", "vae", "unet", "unet"]  # one person is parsed once


def test_whole_numbers_of_any_kind_count():
    pipe = tiny_pipe(9)
    expected = run(pipe, num_images_per_prompt=2)
    for number in (float, np.float32, np.int64):
        options = {"num_inference_steps": number(3), "num_images_per_prompt": number(2), "guidance_scale": number(7.5)}
        options |= {} if number is not np.int64 else {"guidance_scale": np.float64(7.5)}
        assert (run(pipe, **options) == expected).all()


def test_an_adapter_that_reads_text_says_what_is_missing():
    with pytest.raises(ValueError, match="`prompt_embeds`.*text_encoder"):
        run(tiny_pipe(9, cross_attention="prompt"), prompt="a shirt")


def test_a_missing_mask_and_a_crop_without_one_are_errors():
    with pytest.raises(ValueError, match="`mask_image`.*human_parser"):
        tiny_pipe(9)(picture(1), picture(2))
    with pytest.raises(ValueError, match="`padding_mask_crop`.*`mask_image`"):
        tiny_pipe(9, mask_free=True)(picture(1), picture(2), padding_mask_crop=8)
    parsing = tiny_pipe(9, mask_free=True)
    parser, processor = tiny_parser(["background", "top"])
    parsing.register_modules(human_parser=parser, human_parser_processor=processor)
    with pytest.raises(ValueError, match="`padding_mask_crop`.*`mask_image`"):
        parsing(picture(1), picture(2), padding_mask_crop=8)


def test_a_unet_of_other_channels_is_an_error():
    with pytest.raises(ValueError, match="5 input channels"):
        run(tiny_pipe(5))


def test_a_call_warns_of_nothing(caplog):
    pipe = tiny_pipe(9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(pipe, cross_attention_kwargs={"scale": 0.5})
    assert not caplog.records
