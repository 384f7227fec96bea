"""model_index.json at the top is the index of a Stable Diffusion 1.5 pipeline with DDPM."""

import json

from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from tiny import ROOT, tiny_pipe
from transformers import CLIPConfig, CLIPImageProcessor

from pipeline_vton import StableDiffusionVTONPipeline


def sd15_index(folder) -> dict:
    """What `save_pretrained` writes for the components of SD1.5, in small."""
    plain = tiny_pipe(4, text=True)
    small = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPConfig(text_config=small, vision_config=small | {"image_size": 16, "patch_size": 8}, projection_dim=32)
    pipe = StableDiffusionVTONPipeline(
        **plain.components
        | {"safety_checker": StableDiffusionSafetyChecker(clip), "feature_extractor": CLIPImageProcessor()}
    )
    pipe.save_pretrained(folder)
    return json.loads((folder / "model_index.json").read_text())


def test_the_index_at_the_top_is_what_save_pretrained_writes(tmp_path):
    written, committed = sd15_index(tmp_path), json.loads((ROOT / "model_index.json").read_text())
    assert committed["_class_name"] == ["pipeline_vton", "StableDiffusionVTONPipeline"]
    assert committed["scheduler"] == ["diffusers", "DDPMScheduler"]
    for index in (written, committed):
        index.pop("_diffusers_version")
    assert written == committed
