"""The cloth in the UNet's attention: cached and uncached, seen and unseen, reference and joint."""

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor
from tiny import box_mask, picture, run, seeded, tiny_pipe

from pipeline_vton import ClothBesideAttnProcessor, ClothCacheAttnProcessor, vton_attention, widen_conv_in


CLOSE = {"atol": 1e-5, "rtol": 0}


def assert_same_latents(latents, others):
    """Equal to 1e-5 of their size, which a few guided steps of a random UNet drive up."""
    size = others.abs().max()
    torch.testing.assert_close(latents / size, others / size, **CLOSE)


def latents_of(pipe, **options):
    return run(pipe, output_type="latent", **options)


def conditioning_of(pipe, person=None, cloth=None):
    persons, cloths = person or picture(1), cloth or picture(2)
    return pipe.encode_pictures(pipe.check_inputs(persons, cloths, box_mask(), "upper", None, None, None))


def uncached(pipe, conditioning, latents, steps, guidance_scale, embeds=None, negative_embeds=None):
    """Denoise in the form of training: at every step `[without cloth, with cloth ; cloth, cloth]`, nothing kept."""
    pipe.scheduler.set_timesteps(steps)
    count = len(latents)
    cloth_rows = conditioning.cloth_rows().repeat(2 * count // len(conditioning.cloth), 1, 1, 1)
    seen = torch.cat([torch.zeros(count, 1), torch.ones(count, 1)]).repeat(2, 1)
    if embeds is not None:
        embeds = torch.cat([negative_embeds, embeds, embeds, embeds])
    with torch.no_grad(), vton_attention(pipe.unet, ClothBesideAttnProcessor, pipe.config.cross_attention):
        for t in pipe.scheduler.timesteps:
            person_rows = conditioning.person_rows(latents)
            rows = torch.cat([person_rows, person_rows, cloth_rows])
            timesteps = torch.cat([t.expand(2 * count), torch.zeros(2 * count, dtype=torch.long)])
            noise = pipe.unet(rows, timesteps, embeds, attention_mask=seen).sample
            without, with_cloth = noise[:count], noise[count : 2 * count]
            noise = without + guidance_scale * (with_cloth - without)
            latents = pipe.scheduler.step(noise, t, latents).prev_sample
    return latents


@pytest.mark.parametrize("cross_attention", ["skip", "identity", "prompt"])
@pytest.mark.parametrize("in_channels, condition_latents", [(8, "unscaled"), (9, "scaled"), (4, "scaled")])
def test_cached_reference_equals_the_training_form(in_channels, condition_latents, cross_attention):
    pipe = tiny_pipe(in_channels, text=True, cross_attention=cross_attention, condition_latents=condition_latents)
    if in_channels == 4:
        widen_conv_in(pipe.unet)
        with torch.no_grad():
            pipe.unet.conv_in.weight[:, 4:] = torch.randn(16, 4, 3, 3, generator=seeded(5)) / 6
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    persons, cloths = [picture(1), picture(3)], [picture(2), picture(4)]
    conditioning = conditioning_of(pipe, persons, cloths)
    noise = torch.randn(conditioning.person.shape, generator=seeded(7))
    embeds, negative_embeds = pipe.encode_prompt(["a shirt"] * 2, "cpu", 1, True, ["bad"] * 2)
    cached = latents_of(
        pipe, person=persons, cloth=cloths, latents=noise, num_inference_steps=4, guidance_scale=2.5,
        prompt="a shirt", negative_prompt="bad",
    )  # fmt: skip
    assert_same_latents(cached, uncached(pipe, conditioning, noise, 4, 2.5, embeds, negative_embeds))


def test_one_cloth_for_many_persons_is_read_once_and_equals_the_training_form():
    pipe = tiny_pipe(9)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    persons = [picture(1), picture(3), picture(5)]
    conditioning = conditioning_of(pipe, persons)
    assert len(conditioning.cloth) == 1
    noise = torch.randn(conditioning.person.shape, generator=seeded(7))
    cached = latents_of(pipe, person=persons, latents=noise, guidance_scale=2.0)
    assert_same_latents(cached, uncached(pipe, conditioning, noise, 3, 2.0))


def test_guidance_starts_from_a_run_without_any_cloth():
    pipe = tiny_pipe(9)
    conditioning = conditioning_of(pipe)
    noise = torch.randn(conditioning.person.shape, generator=seeded(7))
    t = torch.tensor(999)
    with torch.no_grad(), vton_attention(pipe.unet, None, "skip"):
        without = pipe.unet(conditioning.person_rows(noise), t, None).sample
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing", steps_offset=0)
    options = {"latents": noise, "num_inference_steps": 1}
    pipe.scheduler.set_timesteps(1)
    one_step = pipe.scheduler.step(without, t, noise).prev_sample
    plain, guided = (latents_of(pipe, guidance_scale=scale, **options) for scale in (1.0, 3.0))
    assert (plain - one_step).abs().max() > 1e-3
    torch.testing.assert_close(guided, one_step + 3 * (plain - one_step), atol=1e-4, rtol=0)


def cloth_cache(pipe, **options):
    """Every `attn1`'s keys and values after each step of a call."""
    seen = []

    def look(pipe, step, t, tensors):
        processors = pipe.unet.attn_processors
        seen.append([x.clone() for name in processors if ".attn1." in name for x in processors[name].cloth])
        return {}

    run(pipe, callback_on_step_end=look, **options)
    return seen


def test_cloth_keys_and_values_depend_on_the_cloth_alone():
    pipe = tiny_pipe(9)
    first, *later = cloth_cache(pipe)
    assert len(first) == 2 * sum(".attn1." in name for name in pipe.unet.attn_processors)
    for other in [*later, cloth_cache(pipe, person=picture(8))[0], cloth_cache(pipe, seed=9)[0],
                  cloth_cache(pipe, num_inference_steps=7)[-1], cloth_cache(pipe, guidance_scale=1.0)[0]]:  # fmt: skip
        assert all(torch.equal(x, y) for x, y in zip(first, other))
    assert all(not torch.allclose(x, y, atol=1e-3) for x, y in zip(first, cloth_cache(pipe, cloth=picture(8))[0]))


def test_a_cloth_is_laid_beside_its_persons_once():
    """The same buffers at every step, whose cloth half nothing writes again; one cloth lies beside two persons."""
    pipe, seen = tiny_pipe(), []

    def look(pipe, step, t, tensors):
        processors = [p for p in pipe.unet.attn_processors.values() if isinstance(p, ClothCacheAttnProcessor)]
        halves = [both.chunk(2, dim=1) for processor in processors for both in processor.beside]
        seen.append([(person.data_ptr(), person.clone(), cloth.clone()) for person, cloth in halves])
        return {}

    run(pipe, person=[picture(1), picture(3)], num_inference_steps=2, callback_on_step_end=look)
    for (place, person, cloth), (same_place, next_person, same_cloth) in zip(*seen, strict=True):
        assert place == same_place and torch.equal(cloth, same_cloth) and torch.equal(cloth[0], cloth[1])
        assert not torch.equal(person, next_person) and not torch.equal(person[0], person[1])


def test_in_training_cloth_rows_do_not_see_the_person():
    pipe = tiny_pipe(9)
    cloth_rows = conditioning_of(pipe).cloth_rows()
    person_rows = torch.randn(2, 9, 8, 8, generator=seeded(1))
    cloth_rows = torch.nn.functional.interpolate(cloth_rows, size=(8, 8))
    with torch.no_grad(), vton_attention(pipe.unet, ClothBesideAttnProcessor, "skip"):
        first, second = (
            pipe.unet(torch.cat([row[None], cloth_rows]), torch.tensor([500, 0]), None).sample for row in person_rows
        )
    assert torch.equal(first[1], second[1])
    assert not torch.allclose(first[0], second[0], atol=1e-3)


def test_a_dropped_row_equals_a_run_without_cloth_and_leaves_the_other_row_alone():
    unet = tiny_pipe(9).unet
    rows = torch.randn(4, 9, 8, 6, generator=seeded(1))  # two persons, two cloths
    timesteps = torch.tensor([700, 300, 0, 0])
    with torch.no_grad():
        with vton_attention(unet, ClothBesideAttnProcessor, "skip"):
            dropped = unet(rows, timesteps, None, attention_mask=torch.tensor([[0.0], [1.0], [0.0], [1.0]])).sample
            kept = unet(rows, timesteps, None).sample
        with vton_attention(unet, None, "skip"):
            without = unet(rows[:2], timesteps[:2], None).sample
    torch.testing.assert_close(dropped[0], without[0], **CLOSE)
    torch.testing.assert_close(dropped[1:], kept[1:], **CLOSE)
    assert (kept[0] - without[0]).abs().max() > 1e-3


def test_training_form_keeps_no_state_and_has_gradients_in_attn1():
    unet = tiny_pipe(9).unet.train()
    unet.enable_gradient_checkpointing()
    rows, timesteps = torch.randn(2, 9, 8, 6, generator=seeded(1)), torch.tensor([700, 0])
    with vton_attention(unet, ClothBesideAttnProcessor, "skip") as processors:
        first = unet(rows, timesteps, None).sample
        first[:1].square().mean().backward()
        assert torch.equal(first, unet(rows, timesteps, None).sample)
    assert all(vars(processor) == {"num_cloths": 1} for processor in processors)
    for name, parameter in unet.named_parameters():
        if ".attn1." in name:
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("cross_attention", ["skip", "identity"])
def test_cross_attention_adds_nothing_or_returns_its_input(cross_attention):
    pipe = tiny_pipe(9, cross_attention=cross_attention)
    passes = []
    for name, module in pipe.unet.named_modules():
        if name.endswith("attn2"):
            module.register_forward_hook(lambda module, args, output: passes.append((args[0], output)))
    run(pipe)
    assert passes
    for given, output in passes:
        assert not output.any() if cross_attention == "skip" else torch.equal(output, given)


@pytest.mark.parametrize("cross_attention", ["skip", "identity"])
def test_prompts_change_nothing_without_cross_attention(cross_attention):
    pipe = tiny_pipe(9, text=True, cross_attention=cross_attention)
    assert (run(pipe) == run(pipe, prompt="a shirt", negative_prompt=["bad"])).all()


def test_prompts_are_read_by_the_conditional_row_the_cloth_and_the_unconditional_row():
    pipe = tiny_pipe(9, text=True, cross_attention="prompt")
    calls = []
    pipe.unet.register_forward_pre_hook(lambda unet, args: calls.append(args[2].clone()))
    result = run(pipe, prompt="a shirt", negative_prompt="bad", num_inference_steps=1)
    embeds, negative_embeds = pipe.encode_prompt("a shirt", "cpu", 1, True, "bad")
    cloth, denoising = calls
    assert torch.equal(cloth, embeds)
    assert torch.equal(denoising, torch.cat([negative_embeds, embeds]))
    given = run(pipe, prompt_embeds=embeds, negative_prompt_embeds=negative_embeds, num_inference_steps=1)
    assert (result == given).all()
    assert abs(result - run(pipe, prompt="a skirt", negative_prompt="bad", num_inference_steps=1)).max() > 1e-4


def mark_processors(unet):
    """Processors that are not the default, told apart by identity."""
    unet.set_attn_processor({name: AttnProcessor() for name in unet.attn_processors})
    return dict(unet.attn_processors)


@pytest.mark.parametrize("settings", [{}, {"cloth_conditioning": "joint", "cross_attention": "identity"}])
def test_processors_after_a_call_are_those_from_before(settings):
    pipe = tiny_pipe(9, **settings)
    before = mark_processors(pipe.unet)
    run(pipe)
    assert pipe.unet.attn_processors == before


def test_processors_after_a_call_that_raised_are_those_from_before():
    pipe = tiny_pipe(9)
    before = mark_processors(pipe.unet)
    expected = run(pipe)

    def fail(pipe, step, t, tensors):
        assert any(isinstance(processor, ClothCacheAttnProcessor) for processor in pipe.unet.attn_processors.values())
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        run(pipe, callback_on_step_end=fail)
    assert pipe.unet.attn_processors == before
    assert (run(pipe) == expected).all()


def test_a_call_changes_no_mode_hook_gradient_or_weight_of_the_unet():
    pipe = tiny_pipe(9)
    pipe.unet.train()
    pipe.unet.requires_grad_(True)
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    run(pipe)
    assert pipe.unet.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in pipe.unet.parameters())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in pipe.unet.modules())
    assert all(torch.equal(weight, before[name]) for name, weight in pipe.unet.state_dict().items())


@pytest.mark.parametrize("in_channels", [8, 9])
@pytest.mark.parametrize("axis, sides", [("height", (20, 6)), ("width", (10, 12))])
def test_joint_mode_denoises_a_canvas_whose_unconditional_cloth_is_zero(in_channels, axis, sides):
    pipe = tiny_pipe(in_channels, cloth_conditioning="joint", canvas_axis=axis)
    dim = 2 if axis == "height" else 3
    inputs, canvases = [], []
    pipe.unet.register_forward_pre_hook(lambda unet, args: inputs.append(args[0]))

    def keep(pipe, step, t, tensors):
        assert not any(isinstance(p, ClothCacheAttnProcessor) for p in pipe.unet.attn_processors.values())
        canvases.append(tensors["latents"])
        return {}

    person_part = latents_of(pipe, guidance_scale=2.0, callback_on_step_end=keep)
    conditioning = conditioning_of(pipe)
    assert torch.equal(person_part, canvases[-1].chunk(2, dim=dim)[0])
    assert len(inputs) == 3
    for rows in inputs:
        assert rows.shape == (2, in_channels, *sides)
        person, cloth = rows[:, -4:].chunk(2, dim=dim)
        assert torch.equal(person, conditioning.person.expand_as(person))
        assert torch.equal(cloth, torch.cat([torch.zeros_like(conditioning.cloth), conditioning.cloth_condition]))
        if in_channels == 9:
            person_mask, cloth_mask = rows[:, 4:5].chunk(2, dim=dim)
            assert torch.equal(person_mask, conditioning.mask.expand_as(person_mask)) and not cloth_mask.any()


@pytest.mark.parametrize("in_channels", [8, 9])
def test_reference_rows_have_the_cloth_clean_in_both_slots_and_nothing_masked(in_channels):
    pipe = tiny_pipe(in_channels, condition_latents="unscaled")
    inputs, times = [], []
    pipe.unet.register_forward_pre_hook(lambda unet, args: (inputs.append(args[0]), times.append(args[1])) and None)
    run(pipe, num_inference_steps=1)
    conditioning, (cloth, person) = conditioning_of(pipe), inputs
    assert times[0].tolist() == [0] and times[1] > 0
    torch.testing.assert_close(cloth[:, :4], cloth[:, -4:] * pipe.vae.config.scaling_factor)
    assert torch.equal(person[:1, -4:], conditioning.person)
    if in_channels == 9:
        assert not cloth[:, 4].any()
        assert torch.equal(person[:1, 4:5], conditioning.mask)


@pytest.mark.parametrize("settings", [{}, {"cloth_conditioning": "joint"}, {"mask_free": True}])
@pytest.mark.parametrize("in_channels", [8, 9])
def test_the_output_changes_when_the_cloth_changes(in_channels, settings):
    pipe = tiny_pipe(in_channels, **settings)
    assert (run(pipe) == run(pipe)).all()
    assert abs(run(pipe) - run(pipe, cloth=picture(8))).max() > 1e-3


@pytest.mark.parametrize("cloth", [False, True])
def test_conditioning_is_repeated_as_a_copy(cloth):
    conditioning = conditioning_of(tiny_pipe(9), [picture(1), picture(3)])
    before = {name: getattr(conditioning, name).clone() for name in ("person", "mask", "cloth", "cloth_condition")}
    repeated = conditioning.one_cloth_each().repeat(3, cloth=cloth)
    assert len(repeated.person) == 6 and len(repeated.cloth) == (6 if cloth else 2)
    assert all(torch.equal(getattr(conditioning, name), tensor) for name, tensor in before.items())
