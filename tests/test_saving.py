"""What `save_pretrained` writes, from whose class, in which encoding, and what is left where it fails."""

import ast
import locale
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from tiny import ROOT, lie_like_sd15_inpainting, run, tiny_pipe

from pipeline_vton import ADAPTER_NAME, LORA_NAME, StableDiffusionVTONPipeline, load_pipeline


class Shop(StableDiffusionVTONPipeline):
    """A user's pipeline, with a secret in its file."""

    PASSWORD = "open sesame"


def test_a_subclass_is_saved_as_the_pipeline_that_it_is_made_of(tmp_path):
    pipe = tiny_pipe(9)
    shop = Shop(pipe.vae, pipe.unet, pipe.scheduler, cross_attention="identity")
    shop.set_progress_bar_config(disable=True)
    shop.save_pretrained(tmp_path)
    assert (tmp_path / "pipeline_vton.py").read_bytes() == (ROOT / "pipeline_vton.py").read_bytes()
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*.*") if file.suffix != ".safetensors")
    assert b"open sesame" not in written and b"Shop" not in written
    for loads in (
        partial(DiffusionPipeline.from_pretrained, trust_remote_code=True),
        StableDiffusionVTONPipeline.from_pretrained,
    ):
        loaded = loads(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded).__name__ == "StableDiffusionVTONPipeline"
        np.testing.assert_allclose(run(loaded), run(shop), atol=1.01 / 255)  # a rounding


@pytest.fixture
def ascii_files():
    """Files are read and written in another encoding than UTF-8 where nobody says otherwise, as on Windows."""
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    yield
    locale.setlocale(locale.LC_CTYPE, before)


def test_an_interactive_interpreter_in_another_encoding_saves_and_keeps_a_card_in_utf_8(tmp_path, ascii_files):
    own = "---\nlicense: mit\n---\n# Anprobe für alle \N{DRESS}\n"
    (tmp_path / "README.md").write_text(own, encoding="utf-8")
    with pytest.raises(UnicodeDecodeError):  # as it would be read without saying how
        (tmp_path / "README.md").read_text()
    typed = {"__name__": "__main__", "Base": StableDiffusionVTONPipeline}
    exec("class Mine(Base): pass", typed)
    pipe = tiny_pipe(9)
    typed["Mine"](pipe.vae, pipe.unet, pipe.scheduler).save_pretrained(tmp_path)
    assert own.splitlines()[-1] in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (tmp_path / "pipeline_vton.py").read_bytes() == (ROOT / "pipeline_vton.py").read_bytes()
    pipe.save_pretrained(tmp_path / "\N{DRESS}")
    assert "# \N{DRESS}" in (tmp_path / "\N{DRESS}" / "README.md").read_text(encoding="utf-8")


def test_a_save_that_fails_leaves_nothing_half_written(tmp_path):
    pipe = tiny_pipe(9)
    pipe.save_pretrained(tmp_path / "old")
    before = {file: file.read_bytes() for file in (tmp_path / "old").rglob("*") if file.is_file()}
    pipe.unet.conv_in.weight.data += 1
    pipe.register_to_config(guidance_scale=2.0)
    pipe.vae.to("meta")  # as sequential offloading leaves it: its weights cannot be written
    for name in ("old", "new"):
        with pytest.raises(NotImplementedError):
            pipe.save_pretrained(tmp_path / name)
    assert {file: file.read_bytes() for file in (tmp_path / "old").rglob("*") if file.is_file()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["old"]


def test_saving_again_replaces_the_files_and_keeps_others(tmp_path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    tiny_pipe(9).save_pretrained(tmp_path)
    other = tiny_pipe(9, seed=5, guidance_scale=2.0)
    other.save_pretrained(tmp_path)
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"
    loaded = StableDiffusionVTONPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(run(loaded), run(other), atol=1.01 / 255)
    assert loaded.config.guidance_scale == 2.0
    assert f"# {tmp_path.name}" in ModelCard.load(tmp_path / "README.md").text


@pytest.mark.parametrize("shards", ["before", "after"])
def test_old_weights_in_another_number_of_files_are_not_what_loads(tmp_path, shards):
    """Loaders prefer an index of shards to one file; other variants and files stay."""
    for variant in ("fp16", "non-ema"):
        for _ in range(2):  # into a new folder, and again
            tiny_pipe(9).save_pretrained(tmp_path, variant=variant)
    # as older releases wrote them
    (tmp_path / "unet" / "diffusion_pytorch_model-00001-of-00002.fp16.safetensors").touch()
    kept = {
        file.relative_to(tmp_path): file.read_bytes()
        for file in tmp_path.rglob("*")
        if "fp16" in file.name or "ema" in file.name
    }
    (tmp_path / "unet" / "notes.safetensors.txt").touch()
    sizes = {"max_shard_size": "200KB"}
    tiny_pipe(9).save_pretrained(tmp_path, **sizes if shards == "before" else {})
    assert bool(list(tmp_path.glob("unet/*.index.json"))) == (shards == "before")
    other = tiny_pipe(9, seed=5)
    other.save_pretrained(tmp_path, **sizes if shards == "after" else {})
    loaded = StableDiffusionVTONPipeline.from_pretrained(tmp_path)
    assert all(torch.equal(one, two) for one, two in zip(loaded.unet.parameters(), other.unet.parameters()))
    assert bool(list(tmp_path.glob("unet/*.index.json"))) == (shards == "after")
    assert len(kept) == 5 and kept == {file: (tmp_path / file).read_bytes() for file in kept}
    assert (tmp_path / "unet" / "notes.safetensors.txt").is_file()


def test_a_base_that_needs_no_adapter_leaves_none_of_before(tmp_path):
    tiny_pipe(9).save_pretrained(tmp_path)
    assert (tmp_path / ADAPTER_NAME).is_file()
    tiny_pipe(4).save_pretrained(tmp_path)
    assert not (tmp_path / ADAPTER_NAME).exists()


def test_pickled_weights_are_refused_by_whatever_way_they_are_asked_for(tmp_path):
    for asked in ({"safe_serialization": False}, {"push_to_hub": True}):
        with pytest.raises(ValueError, match=f"`{next(iter(asked))}"):
            tiny_pipe(9).save_pretrained(tmp_path / "out", **asked)
    with pytest.raises(ValueError, match="`safe_serialization` must be True: .*, got False"):
        tiny_pipe(9).save_pretrained(tmp_path / "out", False)
    assert not list(tmp_path.iterdir())


def test_of_a_base_with_pickles_the_safetensors_in_half_precision_are_loaded(tmp_path):
    """SD1.5-inpainting's repository is so; `train_vton.py` loads the same way."""
    base = tiny_pipe(9, text=True)
    base.save_pretrained(tmp_path)
    lie_like_sd15_inpainting(tmp_path)
    for pickled in tmp_path.glob("*/*.bin"):
        pickled.write_bytes(b"never opened")
    loaded = load_pipeline(tmp_path, dtype=torch.float32, device="cpu")
    for name in ("unet", "vae", "text_encoder"):
        expected = getattr(base, name).half().state_dict()
        assert all(torch.equal(w, expected[key].float()) for key, w in getattr(loaded, name).state_dict().items())
    for file in tmp_path.glob("unet/*.safetensors"):
        file.unlink()
    with pytest.raises(OSError, match="no file named .*model.safetensors found"):
        load_pipeline(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("argument", "name", "told"),
    [
        ("model", "{here}/nothing", "there is no file or folder"),
        ("model", "{here}", "model_index.json"),
        ("adapter", "{here}", "there is no vton_adapter.safetensors and no model.safetensors in {here}$"),
        ("human_parser", "./parsr", "there is no file or folder ./parsr"),
        ("human_parser", "{here}", "config.json"),
    ],
)
def test_what_cannot_be_loaded_is_told_by_its_argument(tmp_path, argument, name, told):
    base, here = tmp_path / "base", tmp_path / "here"
    tiny_pipe(9).save_pretrained(base)
    here.mkdir()
    name, told = name.format(here=here), told.format(here=here)
    with pytest.raises((OSError, ValueError), match=f"`{argument}` {name}: .*{told}") as caught:
        load_pipeline(**{"model": base, argument: name}, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_lora_is_no_adapter(tmp_path):
    Path(tmp_path, LORA_NAME).write_bytes(b"")
    with pytest.raises(OSError, match="no vton_adapter.safetensors .* a LoRA, which load_lora_weights loads"):
        tiny_pipe(9).load_vton_adapter(tmp_path)


def test_what_was_loaded_from_a_folder_does_not_tell_which(tmp_path):
    tiny_pipe(9, text=True).save_pretrained(tmp_path / "anns-folder")
    loaded = StableDiffusionVTONPipeline.from_pretrained(tmp_path / "anns-folder")
    loaded.save_pretrained(tmp_path / "saved")
    published = [file.read_bytes() for file in (tmp_path / "saved").rglob("*") if file.is_file()]
    assert len(published) > 5 and not any(b"anns-folder" in each for each in published)
    # a repository's is no secret
    loaded.unet.config._name_or_path = loaded.unet._internal_dict["_name_or_path"] = "me/base"
    loaded.save_pretrained(tmp_path / "saved")
    assert "me/base" in (tmp_path / "saved/unet/config.json").read_text(encoding="utf-8")


def test_a_card_shows_no_folder_and_its_table_holds_what_a_prompt_may_say(tmp_path):
    base = tmp_path / "anns-folder" / "base"
    base.mkdir(parents=True)
    tiny_pipe(9, prompt="a shirt | red\nor blue", base_model=str(base)).save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    assert "anns-folder" not in card
    published = [file.read_bytes() for file in (tmp_path / "saved").rglob("*") if file.is_file()]
    assert len(published) > 5 and not any(b"anns-folder" in each for each in published)
    assert "\n| prompt | a shirt \\| red or blue |\n" in card


def test_every_text_file_is_read_and_written_as_utf_8():
    unsaid = []
    for file in [*ROOT.glob("*.py"), *ROOT.glob("demo/*.py"), *ROOT.glob("benchmarks/*.py")]:
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and not any(keyword.arg == "encoding" for keyword in call.keywords):
                method = isinstance(call.func, ast.Attribute) and call.func.attr in {"read_text", "write_text"}
                if method or (isinstance(call.func, ast.Name) and call.func.id == "open"):
                    unsaid.append(f"{file.name}:{call.lineno}")
    assert not unsaid
