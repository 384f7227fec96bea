"""Prepared persons and cloths: what a call makes of them is what it makes of their pictures, and nothing is encoded twice."""

import gc

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline
from test_pictures import LINEAR
from tiny import box_mask, picture, run, seeded, tiny_parser, tiny_pipe

from pipeline_vton import ClothCacheAttnProcessor, weights_mark


STEP = 1.01 / 255  # results pass through bytes on their way to the photograph's size
KINDS = {
    "inpainting": {"in_channels": 9},
    "8 channels": {"in_channels": 8, "condition_latents": "unscaled"},
    "mask-free": {"in_channels": 8, "mask_free": True},
    "joint": {"in_channels": 9, "cloth_conditioning": "joint", "canvas_axis": "width"},
    "prompt": {"in_channels": 9, "cross_attention": "prompt", "text": True},
}


def prepared(pipe, persons=None, cloths=None, **options):
    person = pipe.prepare_person(picture(1) if persons is None else persons, **{"mask_image": box_mask()} | options)
    size = person[0] if isinstance(person, list) else person
    return person, pipe.prepare_cloth(picture(2) if cloths is None else cloths, size.height, size.width)


def call(pipe, person, cloth, **options):
    options = {"num_inference_steps": 3, "output_type": "np", "generator": seeded()} | options
    return pipe(person, cloth, **options).images


def counted(module):
    calls = []
    module.register_forward_hook(lambda *args: calls.append(1))
    return calls


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_prepared_or_not_the_result_is_the_same(kind):
    pipe = tiny_pipe(**kind)
    options = {"prompt": "a shirt"} if kind.get("text") else {}
    person, cloth = prepared(pipe)
    assert (call(pipe, person, cloth, **options) == run(pipe, **options)).all()
    assert (call(pipe, person, picture(2), **options) == run(pipe, **options)).all()
    assert (call(pipe, picture(1), cloth, mask_image=box_mask(), **options) == run(pipe, **options)).all()


def test_a_batch_of_prepared_ones_is_a_batch():
    pipe, persons, cloths = tiny_pipe(9), [picture(1), picture(3)], [picture(2), picture(4)]
    people, pieces = prepared(pipe, persons, cloths)
    generators = {"generator": [seeded(1), seeded(2)]}
    expected = run(pipe, persons, cloths, **generators)
    np.testing.assert_allclose(call(pipe, people, pieces, generator=[seeded(1), seeded(2)]), expected, atol=STEP)
    one_by_one = [
        call(pipe, person, cloth, generator=seeded(i + 1)) for i, (person, cloth) in enumerate(zip(people, pieces))
    ]
    np.testing.assert_allclose(np.concatenate(one_by_one), expected, atol=STEP)
    np.testing.assert_allclose(call(pipe, people, pieces[0]), run(pipe, persons, cloths[0]), atol=STEP)
    np.testing.assert_allclose(
        call(pipe, people[0], pieces, num_images_per_prompt=2),
        run(pipe, persons[0], cloths, num_images_per_prompt=2),
        atol=STEP,
    )


def test_what_was_prepared_outlives_a_second_execution_of_the_file(tmp_path):
    """As whoever loads a `custom_pipeline` twice causes: the first pipeline's code then has the second's classes."""
    tiny_pipe(9).save_pretrained(tmp_path)
    first = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    person, cloth = prepared(first)
    alone = call(first, person, cloth)
    second = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    for pipe in (first, second):
        assert (call(pipe, person, cloth) == alone).all()
    with pytest.raises(
        TypeError, match="`cloth_image` must be pictures, or PreparedCloths alone, got PreparedPerson too"
    ):
        call(second, person, person)


def test_a_prepared_call_neither_encodes_nor_reads_again():
    pipe = tiny_pipe(9)
    person, cloth = prepared(pipe)
    encoded, unet_calls = counted(pipe.vae.encoder), counted(pipe.unet)
    call(pipe, person, cloth)
    assert not encoded and len(unet_calls) == 3
    run(pipe)
    assert len(encoded) == 2 and len(unet_calls) == 3 + 4


def test_preparing_leaves_the_unet_as_it_was():
    pipe = tiny_pipe(9)
    before = dict(pipe.unet.attn_processors)
    prepared(pipe)
    assert pipe.unet.attn_processors == before


def test_the_crop_and_the_size_are_the_prepared_persons():
    pipe, person = tiny_pipe(9), picture(1, 120, 100)
    mask = box_mask(120, 100).resize((100, 120))
    options = {"padding_mask_crop": 6, "height": 32, "width": 24}
    one = pipe.prepare_person(person, mask, **options)
    assert (one.height, one.width) == (32, 24)
    expected = call(pipe, person, picture(2), mask_image=mask, **options)
    assert (call(pipe, one, picture(2)) == expected).all()
    assert (call(pipe, one, picture(2), height=32, width=24) == expected).all()


def test_the_parser_draws_a_prepared_persons_mask():
    pipe = tiny_pipe(9)
    labels = "background top".split()
    parser, processor = tiny_parser(labels)
    pipe.register_modules(human_parser=parser, human_parser_processor=processor)
    assert (call(pipe, pipe.prepare_person(picture(1)), picture(2)) == call(pipe, picture(1), picture(2))).all()


@pytest.mark.parametrize("mask", ["drawn", "coloured", "none"])
def test_pictures_are_where_they_are_whatever_the_default_device(mask):
    """`torch.set_default_device("cuda")` stands in many a notebook; there is no such device here, and meta, whose tensors hold
    nothing, tells as much.
    """
    pipe = tiny_pipe(9, mask_free=mask == "none")
    parser, processor = tiny_parser("background top legs face".split())
    pipe.register_modules(human_parser=parser, human_parser_processor=processor)
    given = box_mask().convert("RGB") if mask == "coloured" else None
    with torch.device("meta"):
        person, cloth = prepared(pipe, mask_image=given)
    assert (call(pipe, person, cloth) == call(pipe, picture(1), picture(2), mask_image=given)).all()


def test_a_mask_free_adapter_asks_no_parser_and_its_mask_slot_is_ones_whatever_is_given():
    """As in its training; a given mask only says where the result is pasted."""
    pipe = tiny_pipe(9, mask_free=True)
    expected = call(pipe, picture(1), picture(2))
    parser, processor = tiny_parser("background top".split())
    pipe.register_modules(human_parser=parser, human_parser_processor=processor)
    assert (call(pipe, picture(1), picture(2)) == expected).all()
    assert (call(pipe, pipe.prepare_person(picture(1)), picture(2)) == expected).all()
    masked = call(pipe, picture(1), picture(2), mask_image=box_mask(), composite=False)
    assert (masked == call(pipe, picture(1), picture(2), composite=False)).all()


def test_a_changed_adapter_makes_cloths_stale_and_persons_not(tmp_path):
    pipe = tiny_pipe(9)
    person, cloth = prepared(pipe)
    other = tiny_pipe(9, seed=1)
    other.save_vton_adapter(tmp_path)
    pipe.load_vton_adapter(tmp_path)
    with pytest.raises(ValueError, match="`cloth_image` was prepared with other weights.*call prepare_cloth again"):
        call(pipe, person, cloth)
    assert (call(pipe, person, picture(2)) == run(pipe)).all()
    pipe.unload_vton_adapter()
    assert (call(pipe, person, cloth) == run(pipe)).all()
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.mul_(2)
    with pytest.raises(ValueError, match="`person_image` was prepared with other weights.*call prepare_person again"):
        call(pipe, person, picture(2))


def test_what_was_prepared_holds_whoever_computes_how():
    """A sum of many weights would depend on the number of threads that add them up."""
    pipe, threads = tiny_pipe(9), torch.get_num_threads()
    for model in (pipe.unet, pipe.vae):
        model.ballast = torch.nn.Parameter(torch.randn(1_000_000, generator=seeded()))
    try:
        torch.set_num_threads(1)
        person, cloth = prepared(pipe)
        torch.set_num_threads(2)
        call(pipe, person, cloth, num_inference_steps=1)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["unet", "vae"])
def test_a_change_of_any_weight_is_seen(name):
    model = getattr(tiny_pipe(9), name)
    before = weights_mark(model)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.mul_(2).add_(1)
            assert weights_mark(model) != before
            parameter.sub_(1).div_(2)
    assert weights_mark(model.half()) != before


def test_the_cloths_keys_are_gone_when_the_vae_decodes(monkeypatch):
    pipe, left = tiny_pipe(9), []
    decode = pipe.decode_latents

    def look(latents):
        left.append([one for one in gc.get_objects() if type(one) is ClothCacheAttnProcessor])
        return decode(latents)

    monkeypatch.setattr(pipe, "decode_latents", look)
    run(pipe)
    assert left == [[]]


def test_other_settings_make_stale():
    pipe = tiny_pipe(8)
    person, cloth = prepared(pipe)
    pipe.register_to_config(condition_latents="unscaled")
    for given in ((person, picture(2)), (picture(1), cloth)):
        with pytest.raises(ValueError, match="was prepared with other weights, settings"):
            call(pipe, *given, mask_image=None if given[0] is person else box_mask())


def test_what_reads_or_encodes_otherwise_makes_stale():
    pipe = tiny_pipe(9)
    person, cloth = prepared(pipe)
    pipe.enable_freeu(s1=0.5, s2=0.5, b1=1.8, b2=1.8)
    with pytest.raises(ValueError, match="`cloth_image` was prepared with other weights, settings"):
        call(pipe, person, cloth)
    pipe.disable_freeu()
    assert (call(pipe, person, cloth) == run(pipe)).all()
    pipe.vae.register_to_config(scaling_factor=0.1)
    with pytest.raises(ValueError, match="`person_image` was prepared with other weights, settings"):
        call(pipe, person, picture(2))


def test_another_models_cloth_is_told_from_ones_own_when_the_weights_are_offloaded():
    """Sequentially: accelerate leaves parameters without values."""
    pipe, other = tiny_pipe(9), tiny_pipe(9, seed=5)
    marks = [weights_mark(one.unet) for one in (pipe, other)]
    for one in (pipe, other):
        for module in (one.unet, one.vae):
            cpu_offload(module, torch.device("cpu"))
    assert [weights_mark(one.unet) for one in (pipe, other)] == marks
    cloth = pipe.prepare_cloth(picture(2), 40, 24)
    assert (run(pipe, cloth=cloth) == run(pipe)).all()
    with pytest.raises(ValueError, match="`cloth_image` was prepared with other weights"):
        run(other, cloth=cloth)


def test_a_person_is_prepared_without_the_text_that_calls_bring():
    pipe = tiny_pipe(9, cross_attention="prompt", text=True)
    texts = pipe.encode_prompt("a shirt", "cpu", 1, True)
    options = {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1]}
    pipe.register_modules(text_encoder=None, tokenizer=None)
    person = pipe.prepare_person(picture(1), box_mask())
    assert (call(pipe, person, picture(2), **options) == run(pipe, **options)).all()


def test_a_lora_scale_reads_the_cloth_again():
    pipe = tiny_pipe(9)
    person, cloth = prepared(pipe)
    calls = counted(pipe.unet)
    call(pipe, person, cloth, cross_attention_kwargs={"scale": 1.0})
    assert len(calls) == 4


def test_a_cloth_is_prepared_in_the_persons_colours():
    pipe, person = tiny_pipe(9), picture(1)
    person.info["icc_profile"] = LINEAR
    one = pipe.prepare_person(person, box_mask())
    cloth = pipe.prepare_cloth(picture(2), one.height, one.width, profile=one.profile)
    assert (call(pipe, one, cloth) == run(pipe, person)).all() and (call(pipe, one, cloth) != run(pipe)).any()
    with pytest.raises(ValueError, match="`cloth_image` was prepared for other colours than the person's"):
        call(pipe, one, pipe.prepare_cloth(picture(2), one.height, one.width))


def test_what_does_not_fit_is_one_sentence():
    pipe = tiny_pipe(9)
    person, cloth = prepared(pipe)
    with pytest.raises(ValueError, match="`mask_image` must be None with a prepared person"):
        call(pipe, person, cloth, mask_image=box_mask())
    with pytest.raises(ValueError, match="`padding_mask_crop` must be None with a prepared person"):
        call(pipe, person, cloth, padding_mask_crop=4)
    with pytest.raises(ValueError, match="`person_image` was prepared for 40x24 .*works at 64x24"):
        call(pipe, person, cloth, height=64)
    with pytest.raises(ValueError, match="`cloth_image` was prepared for 48x24 .*works at 40x24"):
        call(pipe, person, pipe.prepare_cloth(picture(2), 48, 24))
    with pytest.raises(TypeError, match="`person_image` must be pictures, or PreparedPersons alone, got Image too"):
        call(pipe, [person, picture(1)], cloth)
    with pytest.raises(
        TypeError, match="`cloth_image` must be pictures, or PreparedCloths alone, got PreparedPerson too"
    ):
        call(pipe, person, person)
    for size in ((40, None), (None, 24), (None, None)):
        with pytest.raises(ValueError, match="`height` and `width` must both be given, got"):
            pipe.prepare_cloth(picture(2), *size)
    with pytest.raises(ValueError, match="`profile` must be an ICC profile's bytes or None"):
        pipe.prepare_cloth(picture(2), 40, 24, profile=b"junk")
    with pytest.raises(ValueError, match="`height` must be a positive multiple of 8, got 30"):
        pipe.prepare_cloth(picture(2), 30, 24)
    with pytest.raises(ValueError, match="needs 8 or 9"):
        tiny_pipe(4).prepare_cloth(picture(2), 32, 24)
