"""Arguments of odd types and values: they work, or one sentence names the argument, before any model runs."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from tiny import box_mask, picture, run, seeded, tiny_pipe


ODD = {
    "True": True,
    "None in a list": [None],
    "an empty list": [],
    "a nested list": [[1]],
    "an empty tuple": (),
    "a dictionary": {"a": 1},
    "a set": {1},
    "a word": "x",
    "bytes": b"x",
    "an object": object(),
    "a type": int,
    "a function": lambda *args: args,
    "NaN": float("nan"),
    "infinity": float("-inf"),
    "a number that no float holds": 10**400,
    "a negative number": -1,
    "a number between": 2.5,
    "a complex number": 1j,
    "an array of objects": np.array([None, 1], dtype=object),
    "an array of words": np.array(["a", "b"]),
    "an array of numbers": np.array([1.0, 2.0]),
    "a number in an array": np.array(2),
    "a number in a tensor": torch.tensor(2),
    "a sparse tensor": torch.eye(3).to_sparse(),
    "a tensor without values": torch.empty(1, 4, 10, 6, device="meta"),
    "whole numbers in a tensor": torch.zeros(1, 4, 10, 6, dtype=torch.int64),
    "a tensor of NaN": torch.full((1, 4, 10, 6), float("nan")),
    "a tensor of five axes": torch.zeros(2, 2, 2, 2, 2),
}
ARGUMENTS = [
    "person_image", "cloth_image", "mask_image", "pose_image", "cloth_type", "prompt", "negative_prompt", "prompt_embeds", "negative_prompt_embeds",
    "height", "width", "num_inference_steps", "timesteps", "guidance_scale", "guidance_rescale", "guidance_interval",
    "num_images_per_prompt", "eta", "cross_attention_kwargs", "generator", "latents", "padding_mask_crop", "composite", "output_type",
    "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
]  # fmt: skip
# What is odd and right: a page's and numpy's numbers, any finite guidance, prompts that nobody reads, a callback that does nothing.
RIGHT = {
    ("True", "composite"), ("True", "return_dict"), ("a negative number", "guidance_scale"), ("a number between", "guidance_scale"),
    ("a word", "prompt"), ("a word", "negative_prompt"), ("an empty list", "prompt"), ("an empty list", "negative_prompt"),
    ("a tensor of five axes", "prompt_embeds"), ("a tensor of five axes", "negative_prompt_embeds"),
    ("an empty list", "callback_on_step_end_tensor_inputs"), ("an empty tuple", "callback_on_step_end_tensor_inputs"),
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipe(9, pose="painted")


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_argument_is_one_clear_sentence_or_right(pipe, odd):
    rows = []
    hook = pipe.unet.register_forward_pre_hook(lambda unet, args: rows.append(len(args[0])))
    for name in ARGUMENTS:
        options = {
            "person_image": picture(1),
            "cloth_image": picture(2),
            "mask_image": box_mask(),
            "num_inference_steps": 1,
        }
        if (odd, name) in RIGHT:
            pipe(**(options | {name: ODD[odd]}))
            continue
        rows.clear()
        with pytest.raises((ValueError, TypeError)) as raised:
            pipe(**(options | {name: ODD[odd]}))
        if (odd, name) in {("a function", "callback_on_step_end"), ("a type", "callback_on_step_end")}:
            continue  # found out by what they return, or when they are called
        assert f"`{name}` must " in str(raised.value) or f"`{name}` may " in str(raised.value), (name, raised.value)
        assert "\n" not in str(raised.value) and not rows
    hook.remove()


@pytest.mark.parametrize(
    "name, values",
    [
        ("num_inference_steps", [2, 2.0, np.int64(2), np.float32(2), Fraction(4, 2)]),
        ("num_images_per_prompt", [1, 1.0, np.uint8(1)]),
        ("height", [32, 32.0, np.int32(32), np.float64(32)]),
        ("padding_mask_crop", [4, 4.0, np.int16(4)]),
        ("guidance_scale", [3, 3.0, np.float32(3), np.int8(3), Fraction(3)]),
        ("guidance_rescale", [1, 1.0, np.float16(1)]),
        ("eta", [1, 1.0, np.float64(1)]),
        ("guidance_interval", [(0, 0.5), [0.0, Fraction(1, 2)], (np.int64(0), np.float32(0.5))]),
        ("timesteps", [[900, 10], (900.0, 10.0), [np.int64(900), np.float32(10)]]),
        ("cross_attention_kwargs", [{"scale": 1}, {"scale": np.float32(1)}]),
        ("composite", [True, np.bool_(True)]),
    ],
)
def test_numbers_are_numbers_whoever_made_them(pipe, name, values):
    first, *others = [run(pipe, **{"num_inference_steps": 2, "seed": 1, name: value}) for value in values]
    for other in others:
        np.testing.assert_array_equal(other, first)


@pytest.mark.parametrize("name", ["guidance_rescale", "eta"])
@pytest.mark.parametrize("value", [-0.01, 1.01, 5, 7.0])
def test_shares_lie_between_0_and_1(pipe, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be a number from 0 to 1, got {value}"):
        run(pipe, **{name: value})


@pytest.mark.parametrize(
    "timesteps", [[500, 500], [10, 400], [1000, 10], [5, -1], [9.5], [[900], [10]], torch.tensor([900, 10])]
)
def test_timesteps_fall_within_the_schedule(pipe, timesteps):
    with pytest.raises(ValueError, match="`timesteps` must be None or fall from at most 999 to 0"):
        run(pipe, timesteps=timesteps)


@pytest.mark.parametrize("name", ["prompt_embeds", "negative_prompt_embeds", "latents"])
def test_tensors_are_dense_and_finite(name):
    pipe = tiny_pipe(9, text=True, cross_attention="prompt")
    whole = (
        torch.randn(1, 4, 10, 6, generator=seeded())
        if name == "latents"
        else torch.randn(1, 77, 32, generator=seeded())
    )
    for value in (whole.to_sparse(), whole.to("meta"), whole.long(), whole.to(torch.complex64)):
        with pytest.raises(TypeError, match=f"`{name}` must be a dense tensor of floating-point numbers"):
            run(pipe, **{name: value})
    with pytest.raises(ValueError, match=f"`{name}` must have finite values"):
        run(pipe, **{name: whole.where(whole > 0, torch.inf)})
