"""Several cloths of a person, in calls and in training."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file
from test_attention import CLOSE, assert_same_latents
from test_pictures import LINEAR
from test_pose import base  # noqa: F401
from test_train import by_hand, flags, trainer_of
from tiny import box_mask, picture, run, seeded, tiny_pipe

from demo.make_dataset import World, make_dataset
from demo.world import draw_person
from pipeline_vton import (
    ClothBesideAttnProcessor,
    ClothCacheAttnProcessor,
    TryOnLatents,
    vton_attention,
)
from train_vton import (
    TRAINED_NAME,
    OutfitPairs,
    Preparation,
    RowPairs,
    TreePairs,
    load_rows,
    main,
    parse_args,
    tree_pairs,
)


pytestmark = pytest.mark.usefixtures("fresh_accelerate")
OUTFITS = [[picture(2), picture(4)], [picture(5), picture(6)]]
TWO = partial(ClothBesideAttnProcessor, 2)


@pytest.fixture(scope="session")
def outfits(tmp_path_factory) -> Path:
    """A drawn dataset of outfits, whose second training person wears a top alone."""
    root = tmp_path_factory.mktemp("outfits")
    make_dataset(root, train=4, test=2, seed=0, height=64, category="outfit")
    (root / "train/cloth_2/00001_00.png").unlink()
    return root


def conditioning_of(pipe, persons, outfits, **options):
    return pipe.encode_pictures(pipe.check_inputs(persons, outfits, box_mask(), "upper", None, None, None, **options))


# ---- calls


@pytest.mark.parametrize("cross_attention", ["skip", "prompt"])
def test_cached_outfits_equal_the_training_form(cross_attention):
    pipe = tiny_pipe(9, text=True, cross_attention=cross_attention)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    persons, prompts = [picture(1), picture(3)], {"prompt": ["a shirt", "a skirt"], "negative_prompt": "bad"}
    conditioning = conditioning_of(pipe, persons, OUTFITS)
    assert len(conditioning.cloth) == 4 and conditioning.num_cloths == 2
    latents = noise = torch.randn(conditioning.person.shape, generator=seeded(7))
    embeds, negative = pipe.encode_prompt(prompts["prompt"], "cpu", 1, True, ["bad"] * 2)
    embeds = torch.cat([negative, embeds, embeds.repeat_interleave(2, 0).repeat(2, 1, 1)])
    cloth_rows, seen = conditioning.cloth_rows().repeat(2, 1, 1, 1), torch.tensor([[0.0]] * 2 + [[1.0]] * 10)
    pipe.scheduler.set_timesteps(3)
    with torch.no_grad(), vton_attention(pipe.unet, TWO, cross_attention):
        for t in pipe.scheduler.timesteps:
            rows = torch.cat([*[conditioning.person_rows(latents)] * 2, cloth_rows])
            timesteps = torch.cat([t.expand(4), torch.zeros(8, dtype=torch.long)])
            without, shown = pipe.unet(rows, timesteps, embeds, attention_mask=seen).sample[:4].chunk(2)
            latents = pipe.scheduler.step(without + 2.5 * (shown - without), t, latents).prev_sample
    cached = run(pipe, persons, OUTFITS, latents=noise, guidance_scale=2.5, output_type="latent", **prompts)
    assert_same_latents(cached, latents)


def test_every_cloth_is_read_alone_and_all_are_seen_in_any_order():
    pipe, caches = tiny_pipe(9), []

    def look(pipe, step, t, tensors):
        processors = pipe.unet.attn_processors
        caches.append([processors[name].cloth for name in processors if ".attn1." in name])
        return {}

    one = {"num_inference_steps": 1, "callback_on_step_end": look}
    run(pipe, cloth=[OUTFITS[0]], **one)
    for cloth in OUTFITS[0]:
        run(pipe, cloth=cloth, **one)
    both, *singly = caches
    for layer, top, skirt in zip(both, *singly):
        for together, *apart in zip(layer, top, skirt):
            torch.testing.assert_close(together, torch.cat(apart, dim=1), atol=1e-4, rtol=1e-3)
    orders = (OUTFITS[0], OUTFITS[0][::-1], OUTFITS[0][:1])
    both, turned, alone = (run(pipe, cloth=[outfit], output_type="latent") for outfit in orders)
    assert_same_latents(turned, both)
    assert (alone - both).abs().max() > 1e-3
    assert torch.equal(alone, run(pipe, cloth=OUTFITS[0][0], output_type="latent"))


def test_outfits_are_batched_broadcast_coloured_and_prepared():
    pipe, persons = tiny_pipe(9), [picture(1), picture(3)]
    generators = [seeded(1), seeded(2)]
    together = run(pipe, persons, OUTFITS, generator=generators)
    for i in range(2):
        alone = run(pipe, persons[i], [OUTFITS[i]], generator=seeded(i + 1))
        np.testing.assert_allclose(together[i : i + 1], alone, atol=1.01 / 255)
    shared = run(pipe, persons, OUTFITS[:1], num_images_per_prompt=2)
    np.testing.assert_allclose(shared, run(pipe, persons, OUTFITS[:1] * 2, num_images_per_prompt=2), atol=1.01 / 255)

    profiled = picture(1)
    profiled.info["icc_profile"] = LINEAR
    cloths = pipe.check_inputs([profiled, picture(3)], OUTFITS[:1], box_mask()).cloths
    plain = pipe.check_inputs(picture(3), OUTFITS[:1], box_mask()).cloths
    assert len(cloths) == 4 and all(torch.equal(*pair) for pair in zip(cloths[2:], plain))
    assert not any(torch.equal(*pair) for pair in zip(cloths[:2], plain))

    pieces = [pipe.prepare_cloth(outfit, 40, 24) for outfit in OUTFITS]
    prepared = run(pipe, persons, pieces, generator=[seeded(1), seeded(2)])
    np.testing.assert_allclose(prepared, together, atol=1.01 / 255)


def test_outfits_that_do_not_fit_are_one_sentence():
    top, skirt = OUTFITS[0]
    for outfits, message in (
        ([[top, skirt], [top]], r"`cloth_image` must be .*, got \[2, 1\] cloths"),
        ([[top], top], "`cloth_image` must be .* got .*a single one"),
        ([[]], r"`cloth_image` must be .*, got \[0\] cloths"),
        ([[top, skirt]] * 3, "`person_image` must number 1 or 3"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            run(tiny_pipe(9), [picture(1)] * 2, outfits)
        assert "\n" not in str(raised.value)
    joint = tiny_pipe(9, cloth_conditioning="joint")
    with pytest.raises(ValueError, match="`cloth_image` must have one cloth for every person where .* joint, got 2"):
        run(joint, cloth=[[top, skirt]])
    assert (run(joint, cloth=[[top]]) == run(joint, cloth=top)).all()


# ---- training


def test_a_cloth_that_is_not_worn_is_not_there():
    unet = tiny_pipe(9).unet
    rows = torch.randn(9, 9, 8, 6, generator=seeded(1))  # three persons, two cloths of each
    timesteps = torch.tensor([700, 300, 500, *[0] * 6])
    seen = torch.tensor([1, 1, 0, *(1, 1), *(1, 0), *(1, 1)])[:, None].float()
    with torch.no_grad(), vton_attention(unet, TWO, "skip"):
        masked = unet(rows, timesteps, None, attention_mask=seen).sample
        unmasked = unet(rows, timesteps, None).sample
    with torch.no_grad(), vton_attention(unet, ClothBesideAttnProcessor, "skip"):
        one = unet(rows[[1, 5]], timesteps[[1, 5]], None).sample
    with torch.no_grad(), vton_attention(unet, None, "skip"):
        none = unet(rows[2:3], timesteps[2:3], None).sample
    torch.testing.assert_close(masked[:1], unmasked[:1], **CLOSE)
    torch.testing.assert_close(masked[1], one[0], **CLOSE)
    torch.testing.assert_close(masked[2:3], none, **CLOSE)
    torch.testing.assert_close(masked[3:], unmasked[3:], **CLOSE)
    assert all((masked[row] - unmasked[row]).abs().max() > 1e-3 for row in (1, 2))


@pytest.mark.parametrize("text", [{}, {"cross_attention": "prompt", "prompt": "a shirt"}])
def test_the_loss_is_the_pipelines_noise_error(base, outfits, tmp_path, text):  # noqa: F811
    options = {"num_cloths": 2, "cloth_dropout": 0, "train_batch_size": 4} | text
    folder = base
    if text:
        folder = tmp_path / "text"
        tiny_pipe(9, text=True).save_pretrained(folder)
    trainer = trainer_of(folder, outfits, tmp_path / "out", **options)
    batch = next(trainer.batches())
    assert sorted(batch["worn"].sum(dim=1).tolist()) == [1, 2, 2, 2]
    cross_attention = text.get("cross_attention", "skip")
    with torch.no_grad(), vton_attention(trainer.unet, trainer.self_attention, cross_attention):
        loss = trainer.train_step(batch)
    pipe, errors = trainer.pipe, []
    pipe._cross_attention_kwargs = None
    with torch.no_grad():
        clean, noise, timesteps, _ = by_hand(trainer, batch)
        noisy = pipe.scheduler.add_noise(clean, noise, timesteps)
        for i, worn in enumerate(batch["worn"] > 0):
            with vton_attention(
                pipe.unet, partial(ClothCacheAttnProcessor, int(worn.sum())), cross_attention
            ) as processors:
                pair = [batch[name][i : i + 1] for name in ("person", "mask")]
                settings = {"condition_latents": "scaled", "dtype": None}
                conditioning = TryOnLatents(
                    **TryOnLatents.encode_person(pipe.vae, *pair, mask_free=False, **settings),
                    **TryOnLatents.encode_cloth(pipe.vae, batch["cloth"][i][worn], **settings),
                    channels=9,
                )
                conditioning = replace(conditioning, num_cloths=int(worn.sum()))
                pipe.read_cloth(conditioning, trainer.prompt_embeds, processors)
                row = (noisy[i : i + 1], timesteps[i : i + 1], conditioning, trainer.prompt_embeds, None)
                errors.append((pipe.predict_noise(*row, guided=False) - noise[i]).square().mean())
    assert loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)


def test_outfits_train_cached_or_not_and_load(base, outfits, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("train_vton.GUIDANCE_SCALES", (1, 3))
    monkeypatch.setattr("train_vton.GUIDANCE_STEPS", 1)
    options = {"num_cloths": 2, "max_train_steps": 3, "checkpointing_steps": 3, "cloth_dropout": 0.4}
    shown = {"num_validation_pairs": 1, "guidance_scale": None}
    main(parse_args(flags(base, outfits, tmp_path / "plain", **options, **shown)))
    main(parse_args(flags(base, outfits, tmp_path / "cached", cache_latents=tmp_path / "latents", **options)))
    one, two = (load_file(tmp_path / name / f"checkpoint-3/{TRAINED_NAME}") for name in ("plain", "cached"))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    with Image.open(tmp_path / "plain/validation/step-000003.png") as grid:
        assert grid.size == (4 * 24, 32)  # person, two cloths, result
    pipe = tiny_pipe(9)
    pipe.load_vton_adapter(tmp_path / "plain")
    assert np.isfinite(run(pipe, cloth=OUTFITS[:1])).all()


def test_a_resumed_run_on_outfits_with_poses_equals_an_uninterrupted_one(base, outfits, tmp_path):  # noqa: F811
    options = {"num_cloths": 2, "pose": True, "pose_dropout": 0.5, "cloth_dropout": 0.4, "augment": "color"}
    options |= {"max_train_steps": 4, "checkpointing_steps": 2}
    main(parse_args(flags(base, outfits, tmp_path / "whole", **options)))
    begun = tmp_path / "whole" / "checkpoint-2"
    main(parse_args(flags(base, outfits, tmp_path / "resumed", resume_from_checkpoint=begun, **options)))
    one, two = (load_file(tmp_path / name / f"checkpoint-4/{TRAINED_NAME}") for name in ("whole", "resumed"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def dress_code_mr(outfits: Path, root: Path) -> Path:
    """The same pictures in DressCode-MR's layout."""
    lines = {"train": [], "test": []}
    for split, written in lines.items():
        for _, _, files in TreePairs(outfits, split, True, ("person", "cloth", "cloth_2", "mask", "pose")).pairs:
            name, row = f"{split}-{files['person'].name}", {"shoe": "shoe/none.jpg", "bag": None, "overall": ""}
            for role, folder in {"person": "person", "cloth": "upper", "cloth_2": "lower", "mask": "annotations/agnostic-mask",
                                 "pose": "annotations/dwpose"}.items():  # fmt: skip
                if role in files:
                    (root / folder).mkdir(parents=True, exist_ok=True)
                    shutil.copy(files[role], root / folder / name)
                    row |= {} if folder.startswith("annotations") else {folder: f"{folder}/{name}"}
            written.append(json.dumps(row))
        (root / f"{split}.jsonl").write_text("\n".join(written))
    return root


def test_outfits_are_read_from_folders_lists_and_rows_alike(base, outfits, tmp_path):  # noqa: F811
    roles, prepare = ("person", "cloth", "cloth_2", "mask", "pose"), Preparation(32, 24, num_cloths=2)
    of_tree = tree_pairs(outfits, "train", True, roles)
    of_list = tree_pairs(dress_code_mr(outfits, tmp_path / "mr"), "train", True, roles)
    assert isinstance(of_list, OutfitPairs) and len(of_list) == len(of_tree) == 4
    columns = {"person": "image", "cloth": "cloth", "cloth_2": "cloth_2", "mask": "mask", "pose": "pose"}
    files = [files for *_, files in of_tree.pairs]
    cells = {column: [str(row[role]) if role in row else None for row in files] for role, column in columns.items()}
    kinds = datasets.Features(dict.fromkeys(cells, datasets.Image()))
    (tmp_path / "rows").mkdir()
    datasets.Dataset.from_dict(cells, kinds).to_parquet(tmp_path / "rows/train.parquet")
    args = parse_args(flags(base, None, tmp_path / "out", dataset_name=tmp_path / "rows", num_cloths=2))
    of_rows = RowPairs(load_rows(args, "train", columns), columns)
    for i in range(4):
        items = [prepare(pairs.pictures(i), 0, i) for pairs in (of_tree, of_list, of_rows)]
        assert all(torch.equal(items[0][name], item[name]) for item in items for name in items[0])
        assert items[0]["cloth"].shape == (2, 3, 32, 24) and items[0]["worn"].tolist() == (
            [1, 0] if i == 1 else [1, 1]
        )
    assert (items[0]["cloth"] < 255).flatten(1).any(dim=1).all()
    unpaired = tree_pairs(tmp_path / "mr", "test", False, roles[:4])  # without a list of them, in the next one's
    names = [{role: file.name for role, file in files.items()} for *_, files in unpaired.pairs]
    assert [row["cloth_2"] == row["cloth"] != row["person"] for row in names] == [True, True]
    (tmp_path / "mr/test_unpair.jsonl").write_text((tmp_path / "mr/test.jsonl").read_text())
    listed = [files for *_, files in tree_pairs(tmp_path / "mr", "test", False, roles[:4]).pairs]
    assert all(files["person"].name == files["cloth"].name for files in listed)


def test_lists_of_outfits_that_are_wrong_are_named(outfits, tmp_path):
    root = dress_code_mr(outfits, tmp_path)
    roles = ("person", "cloth", "cloth_2", "mask")
    with pytest.raises(ValueError, match="train.jsonl, line 1: names 2 cloths, and --num_cloths is 1"):
        tree_pairs(root, "train", True, ("person", "cloth", "mask"))
    for line, message in (
        ("{", "line 1: must be a JSON object with the files of a person and their cloths, got '{'"),
        ('{"upper": "upper/a.png"}', "line 1: must be a JSON object"),
        ('{"person": "person/a.png"}', "line 1: names 0 cloths"),
        ('{"person": "a.png", "upper": "upper/a.png"}', "line 1: the person must lie in a folder person, got a.png"),
        ('{"person": "person/../../a.png", "upper": "upper/a.png"}', "leads out of"),
    ):
        (root / "train.jsonl").write_text(line)
        with pytest.raises(ValueError, match=message):
            tree_pairs(root, "train", True, roles)
    shutil.rmtree(Path(shutil.copytree(outfits, tmp_path / "own")) / "train/cloth_2")
    with pytest.raises(
        FileNotFoundError, match="--num_cloths: nobody in .* has a cloth_2: train/cloth_2/CLOTH holds them"
    ):
        tree_pairs(tmp_path / "own", "train", True, roles)
    with pytest.raises(SystemExit):
        parse_args(flags(Path("base"), Path("data"), Path("out"), num_cloths=2, cloth_conditioning="joint"))


def test_a_drawn_outfit_changes_within_its_mask(outfits):
    world = World(0, 64, "outfit")
    (person, top), (other, cloth) = (world.sample("test", i) for i in (0, 1))
    truth, _, _ = draw_person(replace(person, other=other.other), cloth, *world.size)
    assert (np.asarray(Image.open(outfits / "test/tryon/00000_00__00001_00.png")) == np.asarray(truth)).all()
    for index in range(8):
        person, top = world.sample("train", index)
        image, mask, _ = draw_person(person, top, *world.size)
        changed, same, _ = draw_person(replace(person, other=other.other), cloth, *world.size)
        differ = (np.asarray(image) != np.asarray(changed)).any(axis=-1)
        assert differ.any() and (np.asarray(mask)[differ] > 0).all() and (np.asarray(mask) == np.asarray(same)).all()
