"""One UNet called from many threads, through one pipeline or many, and from callbacks."""

import copy
import gc
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from test_settings import save_lora
from tiny import picture, run, seeded, tiny_parser, tiny_pipe

from pipeline_vton import TURNS, StableDiffusionVTONPipeline


def around(unet_of, scheduler=None, **settings):
    """Another pipeline on the same UNet, with a scheduler of its own."""
    scheduler = scheduler or DDPMScheduler.from_config(unet_of.scheduler.config)
    pipe = StableDiffusionVTONPipeline(unet_of.vae, unet_of.unet, scheduler, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def visit(pipe, number):
    """One visitor's call; every one wants something else."""
    options = {"guidance_scale": 1.0 + number % 3, "num_inference_steps": 2 + number % 2}
    return run(pipe, picture(number), picture(100 + number), seed=number, output_type="latent", **options)


@pytest.mark.parametrize(
    "kind", ["one pipeline", "two pipelines", "two kinds of pipeline", "one scheduler, two UNets"]
)
def test_calls_from_many_threads_give_what_calls_one_after_the_other_give(kind):
    first = tiny_pipe(9)
    second = {
        "one pipeline": lambda: first,
        "two pipelines": lambda: around(first),
        "two kinds of pipeline": lambda: around(first, cloth_conditioning="joint", cross_attention="identity"),
        "one scheduler, two UNets": lambda: tiny_pipe(9, seed=5),
    }[kind]()
    if kind == "one scheduler, two UNets":
        second.scheduler = first.scheduler
    pipes = [first, second] * 4
    before = dict(first.unet.attn_processors)
    expected = [visit(pipe, number) for number, pipe in enumerate(pipes)]
    together = threading.Barrier(4)

    def call(pipe, number):
        if number < 4:
            together.wait()
        return visit(pipe, number)

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(call, pipes, range(8)))
    assert all(torch.equal(one, other) for one, other in zip(results, expected))
    assert {name: id(one) for name, one in first.unet.attn_processors.items()} == {k: id(v) for k, v in before.items()}


def test_a_call_that_fails_lets_the_next_one_in():
    pipe = tiny_pipe(9)
    for _ in range(2):
        with pytest.raises(ValueError):
            run(pipe, num_inference_steps=0)
        with pytest.raises(ZeroDivisionError):
            run(pipe, callback_on_step_end=lambda *args: 1 / 0)
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(run, pipe).result(timeout=60).shape == (1, 32, 24, 3)


def test_pipelines_of_two_executions_of_the_file_share_their_turns(tmp_path):
    pipe = tiny_pipe(9)
    pipe.save_pretrained(tmp_path)
    other = DiffusionPipeline.from_pretrained(tmp_path, unet=pipe.unet, trust_remote_code=True)
    other.set_progress_bar_config(disable=True)
    assert type(other) is not type(pipe)
    held, released, order = threading.Event(), threading.Event(), []

    def hold(pipe, step, t, tensors):
        held.set()
        released.wait(60)
        order.append("first")
        return {}

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(run, pipe, num_inference_steps=1, callback_on_step_end=hold)
        held.wait(60)
        second = threads.submit(lambda: (run(other, num_inference_steps=1), order.append("second")))
        with pytest.raises(TimeoutError):
            second.result(timeout=1)
        released.set()
        first.result(60), second.result(60)
    assert order == ["first", "second"]


def test_a_callback_may_call_another_pipeline_on_the_same_unet():
    pipe = tiny_pipe(9)
    preview = around(pipe, cross_attention="identity")
    alone, previews = run(pipe), []

    def look(pipe, step, t, tensors):
        previews.append(run(preview, num_inference_steps=1))
        return {}

    assert (run(pipe, callback_on_step_end=look) == alone).all()
    assert len(previews) == 3 and (previews[0] == run(preview, num_inference_steps=1)).all()


@pytest.mark.parametrize(
    "inner",
    [
        "the same",
        "one with its scheduler",
        "one with its scheduler on another UNet",
        "the same with another scheduler",
    ],
)
def test_a_callback_may_not_call_a_pipeline_whose_state_is_in_use(inner):
    pipe = tiny_pipe(9)
    other = {
        "the same": lambda: pipe,
        "one with its scheduler": lambda: around(pipe, scheduler=pipe.scheduler),
        "one with its scheduler on another UNet": lambda: around(tiny_pipe(9, seed=5), scheduler=pipe.scheduler),
        "the same with another scheduler": lambda: pipe,
    }[inner]()

    def call(pipe, step, t, tensors):
        if inner == "the same with another scheduler":
            pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        run(other)

    with pytest.raises(RuntimeError, match="callback.*same pipeline.*scheduler of its own"):
        run(pipe, callback_on_step_end=call)
    if inner != "the same with another scheduler":
        assert (run(pipe) == run(tiny_pipe(9))).all()


def test_a_pipeline_that_was_called_can_be_copied_and_pickled():
    pipe = tiny_pipe(9)
    expected = run(pipe)
    for unet in (copy.deepcopy(pipe.unet), pickle.loads(pickle.dumps(pipe.unet))):
        other = StableDiffusionVTONPipeline(pipe.vae, unet, pipe.scheduler)
        other.set_progress_bar_config(disable=True)
        np.testing.assert_allclose(run(other), expected, atol=1.01 / 255)
    np.testing.assert_allclose(run(copy.deepcopy(pipe), generator=seeded()), expected, atol=1.01 / 255)


def test_a_unet_that_is_let_go_takes_its_turns_with_it():
    pipe = tiny_pipe(9)
    run(pipe, num_inference_steps=1)
    gc.collect()  # those that other tests let go
    count = len(TURNS)
    del pipe
    gc.collect()
    assert len(TURNS) == count - 2


CHANGES = {
    "load_vton_adapter": lambda pipe, folder: pipe.load_vton_adapter(folder),
    "unload_vton_adapter": lambda pipe, folder: pipe.unload_vton_adapter(),
    "load_lora_weights": lambda pipe, folder: pipe.load_lora_weights(folder),
    "delete_adapters": lambda pipe, folder: pipe.delete_adapters("worn"),
    "set_adapters": lambda pipe, folder: pipe.set_adapters("worn", 0.1),
    "disable_lora": lambda pipe, folder: pipe.disable_lora(),
    "enable_lora": lambda pipe, folder: pipe.enable_lora(),
    "fuse_lora": lambda pipe, folder: pipe.fuse_lora(lora_scale=3.0),
    "unfuse_lora": lambda pipe, folder: pipe.unfuse_lora(),
    "fast": lambda pipe, folder: pipe.fast(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_adapter_is_loaded_and_unloaded_between_the_calls_of_other_threads(change, tmp_path):
    pipe, other = tiny_pipe(9), tiny_pipe(9, seed=5)
    if "vton" not in change:
        other.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["attn1.to_q", "attn1.to_v"]))
        other.save_lora_weights(tmp_path, convert_state_dict_to_diffusers(get_peft_model_state_dict(other.unet)))
    else:
        other.save_vton_adapter(tmp_path)
    if change == "unload_vton_adapter":
        pipe.load_vton_adapter(tmp_path)
    if change in {"delete_adapters", "set_adapters", "disable_lora", "enable_lora", "fuse_lora", "unfuse_lora"}:
        pipe.load_lora_weights(tmp_path, adapter_name="worn")
    if change == "enable_lora":
        pipe.disable_lora()
    if change == "unfuse_lora":
        pipe.fuse_lora()
    expected, changes = run(pipe), []

    def switch(pipe, step, t, tensors):
        if step == 0:
            changes.append(threads.submit(CHANGES[change], pipe, tmp_path))
            with pytest.raises(TimeoutError):
                changes[0].result(timeout=0.5)

    with ThreadPoolExecutor(1) as threads:
        assert (run(pipe, callback_on_step_end=switch) == expected).all()
        changes[0].result(timeout=60)
    if change != "unfuse_lora":  # which leaves the LoRA at work
        assert abs(run(pipe) - expected).max() > 0.01


def test_a_callback_does_not_change_the_model_of_its_own_call(tmp_path):
    pipe = tiny_pipe(9)
    tiny_pipe(9, seed=5).save_vton_adapter(tmp_path)
    before = run(pipe)
    for change in ("load_vton_adapter", "fast"):
        with pytest.raises(RuntimeError, match=f"must not call {change}, which would change the model"):
            run(pipe, callback_on_step_end=lambda pipe, *_, change=CHANGES[change]: change(pipe, tmp_path))
    assert (run(pipe) == before).all()
    pipe.load_vton_adapter(tmp_path)
    assert (run(pipe) != before).any()


def test_the_scheduler_is_the_one_that_there_is_when_ones_turn_comes():
    """Another thread may put one in while a call waits for the UNet."""
    pipe = tiny_pipe(9)
    waiting, seen, begun = around(pipe), [], threading.Event()
    swapped = DDIMScheduler.from_config(pipe.scheduler.config)

    def swap(pipe, step, t, tensors):
        if step == 0:
            calls.append(pool.submit(run, waiting, callback_on_step_end=look))
            time.sleep(0.5)  # it waits by now
            waiting.scheduler = swapped
            begun.set()
        return {}

    def look(pipe, step, t, tensors):
        seen.append(any(held is waiting for held in TURNS[swapped].held))
        return {}

    with ThreadPoolExecutor(1) as pool:
        calls = []
        run(pipe, callback_on_step_end=swap)
        calls[0].result(timeout=60)
    assert begun.is_set() and seen and all(seen)


def test_a_lora_that_is_turned_off_in_a_callback_keeps_its_scheduler_to_the_calls_end(tmp_path):
    pipe = tiny_pipe(9)
    save_lora(tmp_path, 2.0, scheduler_class="DDIMScheduler")
    before = type(pipe.scheduler)
    pipe.load_lora_weights(tmp_path)

    def switch(pipe, step, t, tensors):
        pipe.unet.disable_lora()
        assert pipe.config.guidance_scale and type(pipe.scheduler) is DDIMScheduler
        return {}

    run(pipe, callback_on_step_end=switch)
    assert pipe.config and type(pipe.scheduler) is before


def test_without_a_unet_there_is_no_call_to_wait_for():
    pipe = tiny_pipe(9)
    pipe.register_modules(unet=None)
    assert pipe.fast()["num_inference_steps"] == 8


def test_a_pipeline_that_is_being_saved_keeps_its_parser_for_other_threads(tmp_path):
    pipe = tiny_pipe(9)
    parser, processor = tiny_parser(["background", "top"])
    pipe.register_modules(human_parser=parser, human_parser_processor=processor)
    seen, write = [], pipe.vae.save_pretrained
    pipe.vae.save_pretrained = lambda *args, **options: seen.append(pipe.human_parser) or write(*args, **options)
    pipe.save_pretrained(tmp_path)
    assert seen == [parser] and not (tmp_path / "human_parser").exists()
    assert StableDiffusionVTONPipeline.from_pretrained(tmp_path).human_parser is None
