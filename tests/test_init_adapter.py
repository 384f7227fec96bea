"""Training that begins from an adapter: its weights at step 0, its settings, and what is said of it."""

import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file
from test_settings import save_lora
from test_train import equal, flags, trainer_of
from test_weights import save_catvton
from tiny import box_mask, picture, seeded, tiny_pipe

from pipeline_vton import ADAPTER_NAME, LORA_NAME, adapter_parameters
from train_vton import TRAINED_NAME, main, parent_licence, parse_args


pytestmark = pytest.mark.usefixtures("fresh_accelerate")
OWN = {"guidance_scale": None, "lr_warmup_steps": None, "height": None, "width": None}


def save_own(folder, **settings):
    """An adapter of random weights in float32, for 9 channels."""
    pipe = tiny_pipe(9, seed=5)
    pipe.register_to_config(**settings)
    pipe.save_vton_adapter(folder)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("kind", ["own", "CatVTON", "CatVTON, mask-free"])
def test_step_0_is_the_adapter(bases, data, tmp_path, kind, precision):
    """Every weight of it in float32, and a try-on of it."""
    channels, adapter = 8 if "free" in kind else 9, tmp_path / "adapter"
    if kind == "own":
        settings = {"cloth_conditioning": "joint", "guidance_scale": 3.5, "height": 64, "width": 48}
        save_own(adapter, **settings, trainable="attention")
    else:
        save_catvton(adapter / "model.safetensors", in_channels=channels)
    options = {"init_adapter": adapter, "mixed_precision": precision, **OWN}
    pipe = tiny_pipe(channels)
    pipe.load_vton_adapter(adapter)
    if "free" in kind:
        options |= {"condition_column": "image"}  # the persons themselves do
    trainer = trainer_of(bases[channels], data, tmp_path / "out", **options)
    expected = adapter_parameters(pipe.unet, pipe.config.trainable, False)
    assert equal(trainer.parameters, expected) and all(p.dtype == torch.float32 for p in trainer.trained)
    frozen = [p.dtype for p in trainer.unet.parameters() if not p.requires_grad]
    assert set(frozen) == {torch.float32 if precision == "no" else torch.bfloat16}
    for name in ("cloth_conditioning", "canvas_axis", "cross_attention", "mask_free", "scheduler_class", "eta"):
        assert getattr(trainer.settings, name) == pipe.config[name], name
    assert trainer.settings.guidance_scale == pipe.config.guidance_scale
    assert type(trainer.pipe.scheduler) is type(pipe.scheduler)
    if kind == "own":
        assert (trainer.height, trainer.width) == (64, 48)
    if precision == "no":
        mask = None if "free" in kind else box_mask()
        said = {"height": 32, "width": 24, "num_inference_steps": 2, "output_type": "latent"}
        one, other = (p(picture(1), picture(2), mask, generator=seeded(), **said).images for p in (trainer.pipe, pipe))
        assert torch.equal(one, other)


def test_a_widened_conv_in_is_begun_from_too(bases, data, tmp_path):
    main(parse_args(flags(bases[4], data, tmp_path / "first")))
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = trainer_of(bases[4], data, tmp_path / "second", init_adapter=tmp_path / "first")
    begun = load_file(tmp_path / "first" / ADAPTER_NAME)
    assert "conv_in.weight" in begun and equal(trainer.parameters, {n: w.float() for n, w in begun.items()})


def test_a_run_from_catvton_is_resumed_bit_for_bit(bases, data, tmp_path):
    save_catvton(tmp_path / "CatVTON" / "deep" / "model.safetensors")
    options = {"init_adapter": tmp_path / "CatVTON", "init_subfolder": "deep", "max_train_steps": 4}
    options |= {"checkpointing_steps": 2, "cloth_dropout": 0.4}
    main(parse_args(flags(bases[9], data, tmp_path / "whole", **options)))
    begun = tmp_path / "whole" / "checkpoint-2"
    main(parse_args(flags(bases[9], data, tmp_path / "again", resume_from_checkpoint=begun, **options)))
    for file in (ADAPTER_NAME, f"checkpoint-4/{TRAINED_NAME}"):
        assert equal(load_file(tmp_path / "whole" / file), load_file(tmp_path / "again" / file))
    with safe_open(tmp_path / "whole" / ADAPTER_NAME, "pt") as file:
        metadata = file.metadata()
    said = {"cross_attention": "identity", "scheduler_class": "DDIMScheduler", "eta": "1.0", "trained_steps": "4"}
    assert said.items() <= metadata.items() and metadata["base_model"] == str(bases[9])
    tiny_pipe(9).load_vton_adapter(tmp_path / "whole")
    with pytest.raises(ValueError, match="was trained with cloth_conditioning joint, .*identity.*, not with"):
        trainer_of(bases[9], data, tmp_path / "other", resume_from_checkpoint=begun)


@pytest.mark.parametrize(
    "flag, value, was",
    [
        ("cloth_conditioning", "reference", "joint"),
        ("cross_attention", "prompt", "skip"),
        ("condition_latents", "unscaled", "scaled"),
        ("trainable", "all", "attention"),
        ("prompt", "a shirt", ""),
        ("mask_free", True, "False"),
    ],
)
def test_a_flag_that_disagrees_is_named(bases, data, tmp_path, flag, value, was):
    save_own(tmp_path / "adapter", cloth_conditioning="joint", trainable="attention")
    message = "`mask_free`=True is not what" if flag == "mask_free" else f"--{flag} {value}: .* was trained with {was}"
    with pytest.raises(ValueError, match=message):
        trainer_of(bases[9], data, tmp_path / "out", init_adapter=tmp_path / "adapter", **{flag: value})


def test_a_flag_that_agrees_is_none_to_refuse(bases, data, tmp_path):
    save_own(tmp_path / "adapter", cloth_conditioning="joint")
    options = {
        "cloth_conditioning": "joint",
        "cross_attention": "skip",
        "height": 64,
        "width": 48,
        "guidance_scale": 1,
    }
    trainer = trainer_of(bases[9], data, tmp_path / "out", init_adapter=tmp_path / "adapter", **options)
    assert (trainer.settings.height, trainer.settings.guidance_scale) == (64, 1)


def test_what_does_not_load_or_fit_is_one_sentence(bases, data, tmp_path, capsys):
    save_own(tmp_path / "adapter", cross_attention="skip")
    with pytest.raises(ValueError, match="is for a base with 9 input channels"):
        trainer_of(bases[8], data, tmp_path / "out", init_adapter=tmp_path / "adapter")
    with pytest.raises(ValueError, match="--caption_column text needs --dataset_name and --cross_attention prompt"):
        rows = {"dataset_root": None, "dataset_name": "me/pairs", "caption_column": "text"}
        trainer_of(bases[9], None, tmp_path / "out", init_adapter=tmp_path / "adapter", **rows)
    save_lora(tmp_path / "lora", guidance_scale=2.0)
    for place in (tmp_path / "lora", tmp_path / "lora" / LORA_NAME):
        with pytest.raises(ValueError, match="--init_adapter .* is a LoRA: training begins from adapters alone"):
            trainer_of(bases[9], data, tmp_path / "out", init_adapter=place)
    with pytest.raises(OSError, match="nowhere"):
        trainer_of(bases[9], data, tmp_path / "out", init_adapter=tmp_path / "nowhere")
    for changed, message in (
        ({"init_adapter": "a", "lora_rank": 2}, "--lora_rank learns an update of the base alone"),
        ({"init_subfolder": "deep"}, "--init_subfolder deep needs --init_adapter"),
        ({"perceptual_weight": 2.0}, "--perceptual_weight 2.0 needs --perceptual_loss"),
        ({"adversarial_start_step": 5}, "--adversarial_start_step 5 needs --adversarial_weight"),
    ):
        with pytest.raises(SystemExit):
            parse_args(flags("base", "data", tmp_path / "out", **changed))
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("licence", ["cc-by-nc-sa-4.0", None])
def test_parent_and_licence_are_on_the_card(bases, data, tmp_path, hub, monkeypatch, licence):
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    parent, name = f"you/parent-{licence}", f"me/child-{licence}"
    save_own(tmp_path / "adapter")
    if licence:
        (tmp_path / "adapter" / "README.md").write_text(f"---\nlicense: {licence}\n---\n# A parent\n")
    hub.put(parent, tmp_path / "adapter")
    options = {"init_adapter": parent, "push_to_hub": True, "hub_model_id": name, "max_train_steps": 1}
    main(parse_args(flags(bases[9], data, tmp_path / "out", **options)))
    (tmp_path / "card.md").write_bytes(hub.files(name)["README.md"])
    card = ModelCard.load(tmp_path / "card.md")
    assert card.data.license == (licence or "unknown") and card.data.base_model == parent
    assert f"| init_adapter | {parent} |" in card.text and f"(here: `{licence or 'unknown'}`)" in card.text
    # what a run that begins from this one's folder is told
    assert parent_licence(str(tmp_path / "out")) == (licence or "unknown")


def test_a_licence_is_found_from_wherever_it_is_asked_for(bases, data, tmp_path, hub, monkeypatch):
    """A run tells where it began, wherever its next is started; of a folder that is gone nothing is known."""
    save_own(tmp_path / "runs/first")
    (tmp_path / "runs/first/README.md").write_text("---\nlicense: mit\n---\n# A parent\n")
    monkeypatch.chdir(tmp_path)
    main(parse_args(flags(bases[9], data, tmp_path / "out", init_adapter="runs/first", max_train_steps=1)))
    monkeypatch.chdir(tmp_path / "out")
    assert parent_licence(str(tmp_path / "out")) == "mit"
    shutil.move(tmp_path / "runs/first", tmp_path / "elsewhere")
    (tmp_path / "runs/README.md").write_text("---\nlicense: apache-2.0\n---\n# All runs\n")
    assert parent_licence(str(tmp_path / "out")) == "unknown"
    (tmp_path / "out/training_args.json").write_text('{"init_adapter": "runs/gone"}')  # might be a repository's name
    assert parent_licence(str(tmp_path / "out")) == "unknown"


def test_an_adapter_of_poses_trains_with_poses(bases, tested, tmp_path):
    save_own(tmp_path / "posed", pose="painted")
    save_own(tmp_path / "unposed")
    trainer = trainer_of(bases[9], tested, tmp_path / "out", init_adapter=tmp_path / "posed")
    assert trainer.args.pose is True and trainer.settings.pose == "painted"
    assert next(trainer.batches())["pose"].shape[1] == 3
    with pytest.raises(ValueError, match="--pose True: --init_adapter .* was trained with False"):
        trainer_of(bases[9], tested, tmp_path / "out", init_adapter=tmp_path / "unposed", pose=True)


def test_a_run_goes_on_from_the_adapter_that_it_began_from(bases, data, tmp_path):
    """Without the flag, its sampler, its licence and its parent would be forgotten."""
    save_own(tmp_path / "adapter", scheduler_class="DDIMScheduler", eta=1.0)
    options = {"max_train_steps": 2, "checkpointing_steps": 1, "resume_from_checkpoint": "latest"}
    whole = flags(bases[9], data, tmp_path / "out", init_adapter=tmp_path / "adapter", **options)
    main(parse_args(whole))
    with pytest.raises(ValueError, match="was trained with init_adapter .*, not with init_adapter None"):
        trainer_of(bases[9], data, tmp_path / "out", **options)
    trainer_of(bases[9], data, tmp_path / "out", init_adapter=tmp_path / "adapter", **options)
