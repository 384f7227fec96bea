"""The drawn dataset, the base's trainer, and the committed demo model at work."""

import make_dataset
import measure
import numpy as np
import pytest
import torch
import train_base
import try_on
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image, ImageFilter
from tiny import ROOT, seeded


def files(root) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Six training and four test samples."""
    root = tmp_path_factory.mktemp("drawn")
    make_dataset.make_dataset(root, train=6, test=4, seed=3)
    return root


def test_the_dataset_is_the_same_file_for_file_and_grows_at_its_end(drawn, tmp_path):
    make_dataset.make_dataset(tmp_path / "again", train=6, test=4, seed=3)
    assert files(tmp_path / "again") == files(drawn)
    make_dataset.make_dataset(tmp_path / "larger", train=8, test=0, seed=3)
    larger = files(tmp_path / "larger")
    pictures = {name: data for name, data in files(drawn).items() if name.startswith("train/")}
    assert pictures.items() <= larger.items() and len(larger) == len(pictures) + 2 * 4 + 2
    make_dataset.make_dataset(tmp_path / "other", train=6, test=4, seed=4)
    assert files(tmp_path / "other")["train/image/00000_00.png"] != files(drawn)["train/image/00000_00.png"]


def test_the_truth_differs_from_the_person_only_where_the_mask_is_or_touches(drawn):
    """A pixel is masked where at least half of it may change, so that one beside the mask may still show some cloth."""
    pictures = try_on.read_test_split(drawn)
    for line, person, mask, truth in zip(
        (drawn / "test_pairs.txt").read_text().splitlines(), pictures["person"], pictures["mask"], pictures["truth"]
    ):
        assert len(set(line.split())) == 2  # unpaired
        person, mask, truth = np.asarray(person), np.asarray(mask.filter(ImageFilter.MaxFilter(3))), np.asarray(truth)
        assert np.array_equal(person[mask == 0], truth[mask == 0])
        assert not np.array_equal(person, truth)


@pytest.mark.parametrize("arguments", [["--train", "-1"], ["--test", "1"], ["--height", "100"]])
def test_the_dataset_refuses_bad_counts_and_sizes(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_dataset.parse_args(["--output_dir", str(tmp_path), *arguments])
    assert arguments[0] in capsys.readouterr().err


def test_the_base_trainer_writes_an_ordinary_diffusers_folder(drawn, tmp_path):
    arguments = ["--dataset_root", str(drawn), "--output_dir", str(tmp_path), "--batch_size", "4"]
    arguments += ["--vae_steps", "1", "--unet_steps", "2", "--decoder_steps", "1", "--checkpointing_steps", "1"]
    train_base.main(train_base.parse_args(arguments))
    pipe = StableDiffusionInpaintPipeline.from_pretrained(tmp_path)
    assert pipe.unet.config.in_channels == 9
    pipe.set_progress_bar_config(disable=True)
    person, mask = picture_and_mask(drawn)
    result = pipe("a person", image=person, mask_image=mask, height=64, width=48, num_inference_steps=1).images[0]
    assert result.size == (48, 64)


def picture_and_mask(root) -> tuple[Image.Image, Image.Image]:
    pictures = try_on.read_test_split(root)
    return pictures["person"][0], pictures["mask"][0]


def test_the_demo_model_puts_the_right_cloth_on(tmp_path):
    """On people and cloths of a seed of its own, a result is nearer by 4 dB to its own truth than one in another cloth is."""
    make_dataset.make_dataset(tmp_path, train=0, test=8, seed=11)
    pictures = try_on.read_test_split(tmp_path)
    pipe = try_on.load_pipeline(ROOT / "demo" / "model")
    pipe.set_progress_bar_config(disable=True)

    def results(cloths):
        images = pipe(pictures["person"], cloths, pictures["mask"], num_inference_steps=20, generator=seeded()).images
        return measure.as_array(images)

    truth, masks = (
        measure.as_array(pictures["truth"]),
        np.stack([np.asarray(mask) >= 128 for mask in pictures["mask"]]),
    )
    right, wrong = results(pictures["cloth"]), results(pictures["cloth"][1:] + pictures["cloth"][:1])
    assert measure.masked_psnr(right, truth, masks) > measure.masked_psnr(wrong, truth, masks) + 4
    assert np.array_equal(right[~masks], measure.as_array(pictures["person"])[~masks])


def test_the_committed_model_is_safetensors_without_code():
    suffixes = {path.suffix for path in (ROOT / "demo" / "model").rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".txt"}
    assert sum(path.stat().st_size for path in (ROOT / "demo" / "model").rglob("*")) < 12e6


def test_the_demo_writes_a_contact_sheet(tmp_path):
    torch.manual_seed(0)
    try_on.main(try_on.parse_args(["--output_dir", str(tmp_path), "--count", "2", "--num_inference_steps", "2"]))
    assert Image.open(tmp_path / "contact_sheet.png").width > 2 * 5 * 48
