"""diffusers' own extensions: attention backends, callbacks, caches, schedulers, and UNets that ask for more."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from diffusers import (
    AmusedScheduler,
    CogVideoXDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    PyramidAttentionBroadcastConfig,
    RePaintScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    apply_pyramid_attention_broadcast,
)
from diffusers.callbacks import (
    IPAdapterScaleCutoffCallback,
    MultiPipelineCallbacks,
    PipelineCallback,
    SD3CFGCutoffCallback,
    SDCFGCutoffCallback,
    SDXLCFGCutoffCallback,
    SDXLControlnetCFGCutoffCallback,
)
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from tiny import picture, run, seeded, tiny_pipe, tiny_unet
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline_vton import OTHER_INPUTS, ClothBesideAttnProcessor, StableDiffusionVTONPipeline, vton_attention


# ---- attention backends


class Kernels(TorchDispatchMode):
    """Counts the fused attention kernels that a UNet calls."""

    def __init__(self, unet):
        super().__init__()
        self.inside, self.called = False, 0
        self.hooks = [
            unet.register_forward_pre_hook(lambda *args: setattr(self, "inside", True)),
            unet.register_forward_hook(lambda *args: setattr(self, "inside", False)),
        ]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called += self.inside and "scaled_dot_product" in func.name()
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error):
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()


@pytest.fixture
def restored_backend():
    """diffusers keeps the active backend for the whole process."""
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(before)


def kernels_and_latents(pipe, **options):
    with Kernels(pipe.unet) as kernels:
        latents = run(pipe, output_type="latent", **options)
    return kernels.called, latents


@pytest.mark.parametrize(
    "how", ["the UNet's method", "a context manager", "torch's context manager", "a processor's own"]
)
def test_the_chosen_attention_backend_reaches_our_processors(how, restored_backend):
    pipe = tiny_pipe(9).to(torch.float64)
    fused, expected = kernels_and_latents(pipe)
    assert fused > 0
    chosen = nullcontext()
    if how == "the UNet's method":
        pipe.unet.set_attention_backend("_native_math")
    elif how == "a context manager":
        chosen = attention_backend("_native_math")
    elif how == "torch's context manager":
        chosen = sdpa_kernel(SDPBackend.MATH)
    else:
        for processor in pipe.unet.attn_processors.values():
            processor._attention_backend = AttentionBackendName._NATIVE_MATH
    with chosen:
        called, latents = kernels_and_latents(pipe)
    assert not called
    torch.testing.assert_close(latents, expected, atol=1e-6, rtol=0)


def test_the_chosen_attention_backend_reaches_training(restored_backend):
    unet = tiny_pipe(9).unet.double()
    rows, steps = torch.randn(2, 9, 10, 6, generator=seeded(), dtype=torch.float64), torch.tensor([500, 0])
    outputs, called = [], []
    for backend in ("native", "_native_math"):
        with vton_attention(unet, ClothBesideAttnProcessor, "skip"), Kernels(unet) as kernels:
            unet.set_attention_backend(backend)
            outputs.append(unet(rows, steps, None).sample)
        called.append(kernels.called > 0)
    assert called == [True, False]
    torch.testing.assert_close(*outputs, atol=1e-6, rtol=0)


# ---- diffusers' own callbacks


def unet_rows(pipe, **options):
    """The rows of every UNet call of a run."""
    rows = []
    hook = pipe.unet.register_forward_pre_hook(lambda unet, args: rows.append(len(args[0])))
    run(pipe, **options)
    hook.remove()
    return rows


TEXTS = {"prompt": ["a shirt", "a dress"], "person": [picture(1), picture(3)], "num_inference_steps": 4}


@pytest.mark.parametrize("cross_attention", ["skip", "prompt"])
@pytest.mark.parametrize("many", [False, True])
def test_the_cutoff_callback_ends_the_guidance_and_changes_nothing_else(cross_attention, many):
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    if many:
        cutoff = MultiPipelineCallbacks([SDCFGCutoffCallback(cutoff_step_ratio=1.0), cutoff])
    pipe = tiny_pipe(9, text=True, cross_attention=cross_attention)
    assert unet_rows(pipe, callback_on_step_end=cutoff, **TEXTS)[1:] == [4, 4, 2, 2]
    expected = run(pipe, guidance_interval=(0, 0.5), **TEXTS)
    assert (run(pipe, callback_on_step_end=cutoff, **TEXTS) == expected).all()


class Louder(PipelineCallback):
    """A callback in diffusers' form that changes what it asks for."""

    tensor_inputs = ["prompt_embeds", "latents"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        assert list(callback_kwargs) == self.tensor_inputs
        return {name: 2 * value for name, value in callback_kwargs.items()}


def test_a_callback_in_diffusers_form_changes_the_tensors_that_it_asks_for():
    pipe = tiny_pipe(9, text=True, cross_attention="prompt")
    names = Louder.tensor_inputs

    def louder(pipe, step, t, tensors):
        return {name: 2 * value for name, value in tensors.items()}

    expected = run(pipe, callback_on_step_end=louder, callback_on_step_end_tensor_inputs=names, **TEXTS)
    assert (run(pipe, callback_on_step_end=Louder(), **TEXTS) == expected).all()
    assert (expected != run(pipe, **TEXTS)).any()


FOREIGN = {
    SDXLCFGCutoffCallback: "`callback_on_step_end_tensor_inputs` may name.*got add_text_embeds, add_time_ids",
    SDXLControlnetCFGCutoffCallback: "`callback_on_step_end_tensor_inputs` may name.*got add_text_embeds, add_time_ids, image",
    SD3CFGCutoffCallback: "`callback_on_step_end_tensor_inputs` may name.*got pooled_prompt_embeds",
    IPAdapterScaleCutoffCallback: "`callback_on_step_end`.*IP-Adapter",
}


@pytest.mark.parametrize("callback, message", FOREIGN.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_callbacks_of_other_pipelines_are_refused_before_any_work(callback, message):
    pipe = tiny_pipe(9)
    for given in (callback(), MultiPipelineCallbacks([SDCFGCutoffCallback(), callback()])):
        with pytest.raises(ValueError, match=message):
            assert not unet_rows(pipe, callback_on_step_end=given)


BAD_RETURNS = {
    "a list": (lambda tensors: [tensors], TypeError, "dictionary.*got list"),
    "a tensor": (lambda tensors: tensors["latents"], TypeError, "dictionary.*got Tensor"),
    "another name": (lambda tensors: {"latent": tensors["latents"]}, ValueError, "may return latents, .*got 'latent'"),
    "another shape": (lambda tensors: {"latents": tensors["latents"][:, :1]}, ValueError, r"\(1, 4, 10, 6\), got \(1, 1, 10, 6\)"),
    "an array": (lambda tensors: {"latents": tensors["latents"].numpy()}, ValueError, "got ndarray"),
    "None for a tensor": (lambda tensors: {"latents": None}, ValueError, "got NoneType"),
}  # fmt: skip


@pytest.mark.parametrize("answer, error, message", BAD_RETURNS.values(), ids=BAD_RETURNS.keys())
def test_what_a_callback_returns_is_checked(answer, error, message):
    with pytest.raises(error, match=f"`callback_on_step_end`.*{message}"):
        run(tiny_pipe(9), callback_on_step_end=lambda pipe, step, t, tensors: answer(tensors))


def test_a_callback_may_return_nothing_and_other_floats():
    pipe = tiny_pipe(9)
    assert (run(pipe, callback_on_step_end=lambda *args: None) == run(pipe)).all()
    doubled = run(pipe, callback_on_step_end=lambda pipe, step, t, tensors: {"latents": tensors["latents"].double()})
    assert (doubled == run(pipe)).all()


def raise_guidance(pipe, step, t, tensors):
    pipe._guidance_scale = 3.0


@pytest.mark.parametrize("settings", [{}, {"cloth_conditioning": "joint"}])
def test_guidance_may_rise_in_mid_run(settings):
    pipe = tiny_pipe(9, **settings)
    rows = unet_rows(pipe, guidance_scale=1.0, callback_on_step_end=raise_guidance)
    assert rows[-3:] == [1, 2, 2]
    expected = run(pipe, guidance_scale=3.0, guidance_interval=(0.3, 1))
    assert (run(pipe, guidance_scale=1.0, callback_on_step_end=raise_guidance) == expected).all()


def test_guidance_that_rises_without_its_text_says_so():
    pipe = tiny_pipe(9, text=True, cross_attention="prompt")
    with pytest.raises(ValueError, match="`guidance_scale` rose to 3.0.*`negative_prompt_embeds`"):
        run(pipe, prompt="a shirt", guidance_scale=1.0, callback_on_step_end=raise_guidance)


# ---- UNets, schedulers and caches that try-on cannot use


OTHER_UNETS = {
    "an IP-Adapter's": {"encoder_hid_dim": 8, "encoder_hid_dim_type": "image_proj", "cross_attention_dim": 32},
    "pooled text's": {"addition_embed_type": "text", "addition_embed_type_num_heads": 2},
    "class labels": {"num_class_embeds": 10},
    "class embeddings": {"class_embed_type": "timestep"},
    "an LCM's": {"time_cond_proj_dim": 16},
}  # fmt: skip


@pytest.mark.parametrize("in_channels", [4, 9])
@pytest.mark.parametrize("config", OTHER_UNETS.values(), ids=OTHER_UNETS.keys())
def test_a_unet_that_asks_for_more_is_refused_by_what_it_asks_for(config, in_channels):
    pipe = tiny_pipe(9)
    unet = UNet2DConditionModel.from_config(tiny_unet(in_channels).config, **config)
    pipe = StableDiffusionVTONPipeline(pipe.vae, unet, pipe.scheduler)
    name = next(name for name in config if name in OTHER_INPUTS)
    with pytest.raises(ValueError, match=f"the UNet asks for .*`{name}`"):
        run(pipe)


def test_a_unet_whose_ip_adapter_was_unloaded_runs_again():
    pipe = tiny_pipe(9)
    pipe.unet.register_to_config(
        encoder_hid_dim_type="ip_image_proj"
    )  # as StableDiffusionPipeline.load_ip_adapter does
    with pytest.raises(ValueError, match="IP-Adapter"):
        run(pipe)
    pipe.unet.register_to_config(encoder_hid_dim_type=None)
    run(pipe, num_inference_steps=1)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        FlowMatchHeunDiscreteScheduler(),
        FlowMatchLCMScheduler(),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        RePaintScheduler(),
        CogVideoXDPMScheduler(),
        AmusedScheduler(mask_token_id=0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_scheduler_for_other_models_is_refused_by_name(scheduler):
    pipe = tiny_pipe(9)
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=f"the `scheduler` {type(scheduler).__name__} is .*for"):
        assert not unet_rows(pipe)


@pytest.mark.parametrize("name", ["vae", "unet", "scheduler"])
def test_a_call_without_a_component_says_which(name):
    pipe = tiny_pipe(9)
    setattr(pipe, name, None)
    with pytest.raises(ValueError, match=f"component `{name}`"):
        run(pipe)


def deep_cache(unet):
    """Wraps `forward` as the DeepCache package's helper does."""
    forward, timesteps = unet.forward, list(range(1000))

    def wrapped_forward(*args, **kwargs):
        timesteps.index(args[1].item())
        return forward(*args, **kwargs)

    wrapped_forward.__module__ = "DeepCache.extension.deepcache"
    unet.forward = wrapped_forward


def broadcast(unet):
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        spatial_attention_block_identifiers=("down_blocks", "up_blocks"),
        current_timestep_callback=lambda: 500,
    )
    apply_pyramid_attention_broadcast(unet, config)


@pytest.mark.parametrize("cache, message", [(deep_cache, "DeepCache"), (broadcast, "pyramid_attention_broadcast")])
def test_a_cache_that_would_keep_the_cloths_pass_is_refused_where_there_is_one(cache, message):
    pipe = tiny_pipe(9)
    cache(pipe.unet)
    with pytest.raises(ValueError, match=f"{message}.*the cloth"):
        assert not unet_rows(pipe)
    joint = tiny_pipe(9, cloth_conditioning="joint")
    cache(joint.unet)
    run(joint)


# ---- results that are not finite


def spoil(module, value=float("nan")):
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] = value


@pytest.mark.parametrize("output_type", ["pil", "latent"])
@pytest.mark.parametrize("settings", [{}, {"cloth_conditioning": "joint"}])
@pytest.mark.parametrize(
    "dtype, remedy", [(torch.float32, "weights"), (torch.float16, "torch.bfloat16 or torch.float32")]
)
def test_a_unet_that_gives_no_numbers_raises(dtype, remedy, settings, output_type):
    pipe = tiny_pipe(9, **settings)
    pipe.unet.to(dtype)
    spoil(pipe.unet.conv_out)
    with pytest.raises(ValueError, match=f"the UNet in {dtype} gave NaN.*{remedy}"):
        run(pipe, output_type=output_type)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_vae_that_gives_no_numbers_raises(value):
    pipe = tiny_pipe(9)
    pipe.vae.half()
    spoil(pipe.vae.decoder.conv_out, value)
    with pytest.raises(
        ValueError, match="the VAE's decoder in torch.float16 gave NaN.*torch.bfloat16 or torch.float32"
    ):
        run(pipe)
    run(pipe, output_type="latent")
    pipe = tiny_pipe(9)
    spoil(pipe.vae.encoder.conv_in, value)
    with pytest.raises(ValueError, match="the VAE's encoder in torch.float32 gave NaN.*weights"):
        assert not unet_rows(pipe)


# ---- offloading


def test_a_call_frees_the_models_that_model_offloading_brought_in():
    pipe = tiny_pipe(9)
    pipe.enable_model_cpu_offload(device="cpu")
    before = list(pipe._all_hooks)
    assert len(before) == 2  # the UNet's and the VAE's
    run(pipe)
    assert len(pipe._all_hooks) == 2 and not set(before) & set(pipe._all_hooks)  # diffusers puts new ones in


# ---- LoRAs with text-encoder weights


def test_a_lora_of_unet_and_text_encoder_trains_is_saved_and_loads(tmp_path):
    pipe = tiny_pipe(9, text=True, cross_attention="prompt")
    torch.manual_seed(0)
    pipe.text_encoder.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"]))
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["attn1.to_q", "attn2.to_v"]))
    learning = {
        name: p for part in (pipe.unet, pipe.text_encoder) for name, p in part.named_parameters() if p.requires_grad
    }
    assert all("lora_" in name for name in learning)
    optimizer = torch.optim.AdamW(learning.values(), lr=0.1)
    words = pipe.tokenizer("a shirt", padding="max_length", return_tensors="pt").input_ids
    rows, steps = torch.randn(2, 9, 10, 6, generator=seeded()), torch.tensor([500, 0])
    for _ in range(2):
        with vton_attention(pipe.unet, ClothBesideAttnProcessor, "prompt"):
            embeds = pipe.text_encoder(words)[0].repeat(2, 1, 1)
            pipe.unet(rows, steps, embeds).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.abs().max() > 0 for p in learning.values())  # half of a LoRA begins at zero
    trained = run(pipe, prompt="a shirt")
    layers = [
        convert_state_dict_to_diffusers(get_peft_model_state_dict(part)) for part in (pipe.unet, pipe.text_encoder)
    ]
    pipe.save_lora_weights(tmp_path, *layers)
    pipe = tiny_pipe(9, text=True, cross_attention="prompt")
    plain = run(pipe, prompt="a shirt")
    pipe.load_lora_weights(tmp_path)
    assert set(pipe.get_list_adapters()) == {"unet", "text_encoder"}
    np.testing.assert_allclose(run(pipe, prompt="a shirt"), trained, atol=1.01 / 255)
    pipe.set_adapters("default_0", {"text_encoder": 1.0, "unet": 0.0})
    assert abs(run(pipe, prompt="a shirt") - plain).max() > 0.05
    pipe.unload_lora_weights()
    np.testing.assert_allclose(run(pipe, prompt="a shirt"), plain, atol=1.01 / 255)
