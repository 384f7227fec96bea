"""diffusers' own extensions: attention backends, callbacks, caches, schedulers, and UNets that ask for more."""

from contextlib import nullcontext

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from tiny import run, seeded, tiny_pipe
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline_vton import ClothBesideAttnProcessor, vton_attention


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


@pytest.mark.parametrize("cross_attention", ["skip", "identity"])
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
