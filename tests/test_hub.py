"""Published and loaded like any diffusers model: the real `huggingface_hub` client against a server on loopback."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionInpaintPipeline, UNet2DConditionModel
from huggingface_hub import EvalResult, HfApi, ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load
from tiny import ROOT, box_mask, lie_like_sd15_inpainting, picture, run, seeded, tiny_pipe
from transformers import CLIPTextModel

from pipeline_vton import (
    ADAPTER_NAME,
    StableDiffusionVTONPipeline,
    adapter_parameters,
    from_safetensors,
    load_pipeline,
)


BASE = "stable-diffusion-v1-5/stable-diffusion-inpainting"
MIRROR = "diffusers/community-pipelines-mirror"
ME = "hf_me"

# Load by every form asked for, and keep what each shows or says.
FRESH = """
import json, sys
import numpy as np, torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from PIL import Image

pictures = [Image.open(name + ".png") for name in ("person", "cloth", "mask")]
said = {}
for name, (code, adapter) in json.load(open("loads.json")).items():
    try:
        exec(code)
        if adapter:
            pipe.load_vton_adapter(**adapter)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        np.save(name, pipe(*pictures, num_inference_steps=3, output_type="np", generator=generator).images)
        said[name] = "loaded"
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}, because of {error.__cause__}"
assert "pipeline_vton" not in sys.modules
json.dump(said, open("said.json", "w"))
"""


def load_code(repo, **options):
    return f"pipe = DiffusionPipeline.from_pretrained({repo!r}, trust_remote_code=True, **{options!r})"


class FreshProcess:
    """A process that has seen neither this checkout nor the Hub, in a folder and with caches of its own."""

    def __init__(self, folder, loads, **environment):
        self.folder = folder
        folder.mkdir()
        picture(1).save(folder / "person.png")
        picture(2).save(folder / "cloth.png")
        box_mask().save(folder / "mask.png")
        (folder / "loads.json").write_text(json.dumps(loads))
        homes = {"HF_HOME": str(folder / "home"), "HF_MODULES_CACHE": str(folder / "modules"), "PYTHONPATH": ""}
        self.process = subprocess.Popen(
            [sys.executable, "-c", FRESH], cwd=folder, env=os.environ | homes | environment, stderr=subprocess.PIPE
        )

    def finish(self):
        """What every load said, "loaded" or an error; its pictures are then in `images`."""
        errors = self.process.communicate(timeout=900)[1]
        assert self.process.returncode == 0, errors.decode()
        return json.loads((self.folder / "said.json").read_text())

    def images(self, name):
        return np.load(self.folder / f"{name}.npy")


def tiny_base(**settings):
    """Of weights that fp16 holds, as a base's that the Hub has in half precision."""
    pipe = tiny_pipe(9, text=True, **settings)
    for component in (pipe.unet, pipe.vae, pipe.text_encoder):
        component.half().float()
    return pipe


def trained_pipe(seed=11, **settings):
    """A try-on pipeline on the tiny base, with other attention weights than the base's, as a training saves them."""
    pipe = tiny_base(base_model=BASE, guidance_scale=2.0, **settings)
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(pipe.unet, "self_attention", widened=False).values():
            noise = torch.randn(parameter.shape, generator=generator) / 5
            parameter.copy_((parameter + noise).half())
    return pipe


def card_code(hub, repo):
    return re.search(r"```python\n(.*?)```", hub.files(repo)["README.md"].decode(), re.DOTALL)[1]


@pytest.fixture(scope="module")
def published(hub, tmp_path_factory):
    """The base, a pipeline in two versions, a private one and an adapter on the Hub; the pictures that they must make."""
    base = tiny_base()
    folder = tmp_path_factory.mktemp("base")
    StableDiffusionInpaintPipeline(
        base.vae, base.text_encoder, base.tokenizer, base.unet, base.scheduler, None, None, requires_safety_checker=False
    ).save_pretrained(folder)  # fmt: skip
    lie_like_sd15_inpainting(folder)
    hub.put(BASE, folder)
    first, second = trained_pipe(), trained_pipe(12)
    first.push_to_hub("me/vton", token=ME, commit_message="The first")
    HfApi().create_tag("me/vton", tag="first", token=ME)
    second.push_to_hub("me/vton", token=ME)
    first.push_to_hub("me/private", token=ME, private=True)
    second.push_to_hub("me/adapter", token=ME, adapter_only=True)
    return {"first": run(first), "second": run(second)}


def test_three_ways_in_from_the_hub_and_offline_in_fresh_processes(hub, published, tmp_path):
    mirror = tmp_path / "mirror"
    (mirror / "main").mkdir(parents=True)
    (mirror / "main" / "vton.py").write_bytes((ROOT / "pipeline_vton.py").read_bytes())
    hub.put(MIRROR, mirror, kind="datasets")
    community = hf_hub_download(MIRROR, "main/vton.py", repo_type="dataset")
    snapshot_download("me/vton")
    snapshot_download(BASE)
    offline = "folder = snapshot_download({!r}, local_files_only=True); pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **{!r})"  # fmt: skip
    here = {"pretrained_model_name_or_path": "me/vton", "local_files_only": True}
    processes = {
        "the first form": FreshProcess(
            tmp_path / "form1",
            {
                "card": (card_code(hub, "me/vton"), None),
                "main": (load_code("me/vton", custom_pipeline="vton"), None),
                "first": (load_code("me/vton", custom_pipeline="vton", revision="first"), None),
                "wrong": (load_code("me/private", custom_pipeline="vton", token="hf_wrong"), None),
                "missing": (load_code("me/nothing", custom_pipeline="vton"), None),
            },
        ),
        "the second form": FreshProcess(
            tmp_path / "form2",
            {
                "main": (load_code("me/vton"), None),
                "first": (load_code("me/vton", revision="first"), None),
                "private": (load_code("me/private"), None),
                "norevision": (load_code("me/vton", revision="third"), None),
            },
            HF_TOKEN=ME,
        ),
        "the third form": FreshProcess(
            tmp_path / "form3",
            {
                "card": (card_code(hub, "me/adapter"), None),
                "adapter": (load_code(BASE, custom_pipeline="me/adapter"), {"pretrained_model_name_or_path": "me/adapter"}),
                "main": (load_code(BASE, custom_pipeline="me/vton"), {"pretrained_model_name_or_path": "me/vton"}),
                "first": (
                    load_code(BASE, custom_pipeline="me/vton", custom_revision="first"),
                    {"pretrained_model_name_or_path": "me/vton", "revision": "first"},
                ),
                "form1": (load_code("me/adapter", custom_pipeline="vton"), None),
                "form2": (load_code("me/adapter"), None),
                "community": (load_code(BASE, custom_pipeline=community), {"pretrained_model_name_or_path": "me/vton"}),
            },
        ),
        "offline": FreshProcess(
            tmp_path / "offline",
            {
                "form1": (offline.format("me/vton", {"custom_pipeline": "vton"}), None),
                "form2": (offline.format("me/vton", {}), None),
                "form3": (f"folder = snapshot_download('me/vton', local_files_only=True); base = snapshot_download({BASE!r}, local_files_only=True); pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline=folder, trust_remote_code=True)", here),
            },
            HF_HOME=os.environ["HF_HOME"],
            HF_HUB_OFFLINE="1",
        ),
    }  # fmt: skip
    said = {form: process.finish() for form, process in processes.items()}
    expected = {
        "the first form": {"card": "second", "main": "second", "first": "first"},
        "the second form": {"main": "second", "first": "first", "private": "first"},
        "the third form": {
            "card": "second", "adapter": "second", "main": "second", "first": "first", "community": "second",
        },
        "offline": {"form1": "second", "form2": "second", "form3": "second"},
    }  # fmt: skip
    for form, loads in expected.items():
        for name, version in loads.items():
            assert said[form][name] == "loaded", (form, name, said[form][name])
            np.testing.assert_allclose(
                processes[form].images(name), published[version], rtol=0, atol=1e-6, err_msg=f"{form}, {name}"
            )
    assert f'"{BASE}", variant="fp16", custom_pipeline="me/adapter"' in card_code(hub, "me/adapter")
    for form in ("the first form", "the third form"):
        assert (processes[form].folder / "tryon.png").exists(), f"{form}: the card's code shows nothing"
    for name in ("form1", "form2"):
        assert re.search(f"adapter, not a whole pipeline.*{BASE}.*load_vton_adapter", said["the third form"][name])
    errors = said["the first form"] | said["the second form"]
    assert re.search(r"(?s)me/private.*401.*Invalid credentials in Authorization header", errors["wrong"])
    assert re.search(r"(?s)me/nothing.*Repository Not Found", errors["missing"])
    assert re.search(r"(?s)me/vton.*Revision Not Found.*third", errors["norevision"])


@pytest.mark.filterwarnings("ignore:.*has learnt no try-on")
def test_of_a_base_on_the_hub_no_pickle_is_downloaded(hub, published, tmp_path):
    """By what `train_vton.py` and `load_pipeline` load it with."""
    for cls, part in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"), (CLIPTextModel, "text_encoder")):
        from_safetensors(cls.from_pretrained, BASE, subfolder=part, cache_dir=tmp_path)
    load_pipeline(BASE, device="cpu", cache_dir=tmp_path)
    names = {file.name for file in tmp_path.rglob("*")}
    assert names >= {"diffusion_pytorch_model.fp16.safetensors", "model.fp16.safetensors"}
    assert not any(name.endswith(".bin") for name in names)
    with pytest.raises(OSError, match="me/nothing"):
        load_pipeline("me/nothing", device="cpu", cache_dir=tmp_path)


def test_a_pushed_repository_is_whole(hub, published):
    files = hub.files("me/vton")
    folders = {"scheduler", "text_encoder", "tokenizer", "unet", "vae"}
    assert {name.split("/")[0] for name in files} == folders | {
        "README.md", "model_index.json", "pipeline.py", "pipeline_vton.py", "vton.py", ADAPTER_NAME,
    }  # fmt: skip
    assert json.loads(files["model_index.json"])["_class_name"] == ["pipeline_vton", "StableDiffusionVTONPipeline"]
    assert files["pipeline_vton.py"] == (ROOT / "pipeline_vton.py").read_bytes()
    repository = hub.repositories["models/me/vton"]
    assert repository.messages[:3] == ["initial commit", "The first", "Upload StableDiffusionVTONPipeline"]
    assert not repository.private and hub.repositories["models/me/private"].private
    assert set(hub.files("me/adapter")) == {
        "README.md", "model_index.json", "pipeline.py", "pipeline_vton.py", "vton.py", ADAPTER_NAME,
    }  # fmt: skip


def test_an_adapter_is_published_in_half_precision_where_that_loses_nothing(hub, published):
    weights = load(hub.files("me/adapter")[ADAPTER_NAME])
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    pipe = trained_pipe()
    with torch.no_grad():
        next(iter(adapter_parameters(pipe.unet, "self_attention", widened=False).values())).add_(1e-6)
    pipe.push_to_hub("me/fine", token=ME, adapter_only=True)
    weights = load(hub.files("me/fine")[ADAPTER_NAME])
    assert all(torch.equal(pipe.unet.state_dict()[name], weight) for name, weight in weights.items())


# ---- who may not, and what is not there


def test_adapters_of_a_private_repository_need_its_token(hub, published, tmp_path):
    pipe = tiny_base()
    pipe.load_vton_adapter("me/private", token=ME)
    assert (run(pipe) == published["first"]).all()
    with pytest.raises(OSError, match="(?s)me/private.*401.*Invalid credentials in Authorization header"):
        pipe.load_vton_adapter("me/private", token="hf_wrong", cache_dir=tmp_path)
    for token in (False, "hf_you"):
        with pytest.raises(OSError, match="me/private is not a local folder and is not a valid model identifier"):
            pipe.load_vton_adapter("me/private", token=token, cache_dir=tmp_path)
    assert (run(pipe) == published["first"]).all()


@pytest.mark.parametrize(
    "where, message",
    [
        ({"pretrained_model_name_or_path": "me/nothing"}, "me/nothing is not"),
        ({"pretrained_model_name_or_path": "me/vton", "revision": "third"}, "third is not a valid git identifier"),
        ({"pretrained_model_name_or_path": BASE}, f"no vton_adapter.safetensors and no model.safetensors in {BASE}"),
        ({"pretrained_model_name_or_path": "me/vton", "weight_name": "x.safetensors"}, "no x.safetensors in me/vton"),
        ({"pretrained_model_name_or_path": "me/vton/adapter"}, "no file or folder me/vton/adapter"),
        ({"pretrained_model_name_or_path": "adaptr"}, "no file or folder adaptr"),
    ],
)
def test_an_adapter_that_is_not_there_is_one_clear_error(hub, published, where, message):
    with pytest.raises(OSError, match=message):
        tiny_pipe(9).load_vton_adapter(**where)


def test_an_adapter_by_revision(hub, published):
    for revision, version in (("first", "first"), ("main", "second"), (None, "second")):
        pipe = tiny_base()
        pipe.load_vton_adapter("me/vton", revision=revision)
        assert (run(pipe) == published[version]).all()


def test_a_hub_that_fails_is_not_taken_for_a_repository_without_an_adapter(hub, published, tmp_path):
    hub.unreadable.add(ADAPTER_NAME)
    try:
        with pytest.raises(OSError) as error:
            tiny_pipe(9).load_vton_adapter("me/vton", cache_dir=tmp_path)
    finally:
        hub.unreadable.clear()
    assert "model.safetensors" not in str(error.value)


def test_a_pull_request_leaves_main_as_it_is(hub, published):
    before = hub.files("me/vton")
    trained_pipe(17).push_to_hub("me/vton", token=ME, create_pr=True)
    assert hub.files("me/vton") == before
    pipe = tiny_base()
    pipe.load_vton_adapter("me/vton", revision="refs/pr/1")
    assert (run(pipe) == run(trained_pipe(17))).all()


@pytest.mark.parametrize("repo, token, status", [("me/new", "hf_wrong", 401), ("me/new", False, 401), ("me/vton", "hf_you", 403)])  # fmt: skip
def test_pushing_without_the_right_token_is_an_error_and_changes_nothing(hub, published, repo, token, status):
    before = dict(hub.repositories["models/me/vton"].refs)
    with pytest.raises(HfHubHTTPError) as error:
        trained_pipe(13).push_to_hub(repo, token=token)
    assert error.value.response.status_code == status
    if token == "hf_wrong":
        assert "Invalid credentials in Authorization header" in str(error.value)
    assert hub.repositories["models/me/vton"].refs == before and "models/me/new" not in hub.repositories


# ---- uploads that break


def test_an_upload_cut_in_the_middle_is_taken_up_again(hub):
    hub.cut_uploads = 1
    pipe = trained_pipe(14)
    pipe.push_to_hub("me/cut", token=ME)
    assert hub.cut_uploads == 0
    weights = load(hub.files("me/cut")["unet/diffusion_pytorch_model.safetensors"])
    assert all(torch.equal(weight, pipe.unet.state_dict()[name]) for name, weight in weights.items())


def test_an_upload_that_fails_leaves_the_repository_as_it_was_and_can_be_repeated(hub):
    trained_pipe(15).push_to_hub("me/broken", token=ME)
    before, pipe = hub.files("me/broken"), trained_pipe(16)
    hub.cut_uploads, hub.refuse_uploads = 1, True
    try:
        with pytest.raises(RuntimeError, match="Error while uploading"):
            pipe.push_to_hub("me/broken", token=ME)
    finally:
        hub.refuse_uploads = False
    assert hub.files("me/broken") == before
    pipe.push_to_hub("me/broken", token=ME)
    other = tiny_base()
    other.load_vton_adapter("me/broken", force_download=True)
    assert (run(other) == run(pipe)).all()


# ---- the card


RESULTS = [EvalResult("image-to-image", "viton-hd", "VITON-HD, paired", "ssim", 0.8713, metric_name="SSIM")]


def test_an_upload_replaces_weights_that_were_in_shards_and_nothing_else(hub, tmp_path):
    tiny_pipe(9).save_pretrained(tmp_path, max_shard_size="200KB")
    (tmp_path / "unet/notes.txt").write_text("mine", encoding="utf-8")
    hub.put("me/sharded", tmp_path)
    assert "unet/diffusion_pytorch_model.safetensors.index.json" in hub.files("me/sharded")
    tiny_pipe(9, seed=5).push_to_hub("me/sharded", token=ME)
    files = [file for file in hub.files("me/sharded") if file.startswith("unet/")]
    assert sorted(files) == ["unet/config.json", "unet/diffusion_pytorch_model.safetensors", "unet/notes.txt"]


def test_a_card_is_valid_and_says_what_the_weights_are(hub, published):
    card = ModelCard.load("me/vton")
    card.validate()
    assert card.data.to_dict() == {
        "base_model": BASE,
        "library_name": "diffusers",
        "license": "creativeml-openrail-m",
        "pipeline_tag": "image-to-image",
        "tags": ["virtual-try-on", "stable-diffusion", "diffusers"],
    }
    assert "Nothing yet." in card.text and "| guidance_scale | 2.0 |" in card.text
    assert "apache" not in ModelCard.load("me/adapter").data.license


def test_a_card_tells_what_was_measured_and_only_that(hub, tmp_path):
    pipe = tiny_pipe(9)
    pipe.save_pretrained(tmp_path, eval_results=RESULTS)
    card = ModelCard.load(tmp_path / "README.md")
    card.validate()
    assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == [("ssim", 0.8713)]
    assert "| VITON-HD, paired | SSIM | 0.8713 |" in card.text
    pipe.save_pretrained(tmp_path)  # other weights, not measured
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results is None and "0.8713" not in card.text


@pytest.mark.parametrize(
    "settings, given, license",
    [
        ({}, None, "unknown"),
        ({"base_model": "timbrooks/instruct-pix2pix"}, None, "creativeml-openrail-m"),
        ({"base_model": "diffusers/stable-diffusion-xl-1.0-inpainting-0.1"}, None, "openrail++"),
        ({"base_model": "me/finetune"}, "mit", "mit"),
        ({"base_model": BASE, "cross_attention": "identity"}, None, "cc-by-nc-sa-4.0"),
        ({"base_model": str(ROOT)}, None, "unknown"),
    ],
)
def test_a_cards_licence_follows_the_base(hub, tmp_path, settings, given, license):
    tiny_pipe(9, **settings).save_pretrained(tmp_path, license=given)
    card = ModelCard.load(tmp_path / "README.md")
    card.validate()
    assert card.data.license == license and f"`{license}`" in card.text
    assert card.data.base_model == (None if license == "unknown" else settings["base_model"])


def test_a_card_names_the_base_that_was_loaded_where_the_adapter_knows_a_folder(tmp_path):
    pipe = tiny_pipe(9, base_model="/data/stable-diffusion")
    pipe.register_to_config(_name_or_path=BASE)  # as from_pretrained does
    pipe.save_pretrained(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.base_model == BASE


def test_a_card_of_ones_own_is_kept_in_the_folder_and_on_the_hub(hub, tmp_path):
    own = "---\nlicense: mit\npipeline_tag: image-to-image\nlibrary_name: diffusers\n---\n# Mine\n"
    (tmp_path / "README.md").write_text(own)
    pipe = trained_pipe()
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == own
    HfApi().create_repo("me/own", token=ME)
    HfApi().upload_file(
        path_or_fileobj=own.encode(), path_in_repo="README.md", repo_id="me/own", token=ME
    )  # fmt: skip
    pipe.push_to_hub("me/own", token=ME, eval_results=RESULTS)
    card = ModelCard.load("me/own", token=ME)
    assert card.text == "# Mine\n" and card.data.license == "mit"
    assert card.data.eval_results[0].metric_value == 0.8713


def test_a_card_that_the_hub_refuses_is_an_error_before_the_upload(hub):
    with pytest.raises(ValueError, match='(?s)Invalid metadata in README.md.*"license" is not valid'):
        tiny_pipe(9).push_to_hub("me/refused", token=ME, license="public domain, I think")
    assert not hub.files("me/refused")


def test_a_bare_base_of_four_channels_is_saved_without_an_adapter(tmp_path):
    tiny_pipe(4).save_pretrained(tmp_path)
    assert not (tmp_path / ADAPTER_NAME).exists()
    pipe = StableDiffusionVTONPipeline.from_pretrained(tmp_path)
    assert pipe.unet.config.in_channels == 4
    pipe.save_pretrained(tmp_path / "again")
    assert ModelCard.load(tmp_path / "again" / "README.md").data.base_model is None
