"""Training at several resolutions: who goes where, in which order, on how many processes."""

import itertools
from collections import Counter
from fractions import Fraction

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_train import COLUMNS, equal, flags
from tiny import tiny_pipe

from train_vton import (
    TRAINED_NAME,
    Preparation,
    ResolutionBatches,
    Trainer,
    TreePairs,
    main,
    nearest_aspect,
    parse_args,
    to_values,
)


pytestmark = pytest.mark.usefixtures("fresh_accelerate")
SIZES = [(32, 24), (64, 48)]
MANY = {"height": None, "width": None}


def sized(*where, resolutions=SIZES, **changed) -> list[str]:
    words = [f"{height}x{width}" for height, width in resolutions]
    return [*flags(*where, **MANY | changed), "--resolutions", *words]


def sized_trainer(*where, **changed) -> Trainer:
    return Trainer(parse_args(sized(*where, **changed)))


class Counted:
    """Stands for the datasets: the batches' order asks for the epoch alone."""

    epoch = 0


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("counts", [(10, 7), (12,), (1, 25)])
def test_every_pair_comes_and_every_step_has_one_resolution(processes, counts):
    starts = list(itertools.accumulate(counts, initial=0))
    groups = [([2 * i, 2 * i + 1], list(range(*starts[i : i + 2]))) for i in range(len(counts))]
    dataset, rows = Counted(), 2 * processes
    batches = ResolutionBatches(dataset, groups, batch_size=2, processes=processes, seed=3)
    epochs = []
    for dataset.epoch in range(3):
        drawn = list(batches)
        assert drawn == list(batches) and len(drawn) == len(batches) and len(drawn) % processes == 0
        for start in range(0, len(drawn), processes):
            step = list(itertools.chain(*drawn[start : start + processes]))
            sizes, pairs = zip(*step)
            assert len(step) == rows and len(set(sizes)) == 1
            (group,) = [pairs_of for places, pairs_of in groups if sizes[0] in places]
            assert set(pairs) <= set(group) and len(set(pairs)) == min(rows, len(group))
        seen = Counter(index for batch in drawn for _, index in batch)
        for _, pairs in groups:
            assert all(seen[index] >= 1 for index in pairs)
            assert sum(seen[index] - 1 for index in pairs) == -len(pairs) % rows  # no more than fill the last step
        epochs.append(drawn)
    assert epochs[0] != epochs[1] != epochs[2]


def test_equal_aspects_are_drawn_at_random():
    dataset, groups = Counted(), [([0, 1, 2], list(range(6)))]
    batches, seen = ResolutionBatches(dataset, groups, 2, 1, seed=0), Counter()
    for dataset.epoch in range(200):
        seen.update(place for batch in batches for place in batch)
    assert len(seen) == 18 and min(seen.values()) > 30  # 66 of each are expected


@pytest.mark.parametrize(
    "person, places", [((1024, 768), [0, 2]), ((700, 500), [0, 2]), ((500, 520), [1]), ((300, 900), [3])]
)
def test_the_nearest_aspect_is_that_of_the_person_whatever_the_scale(person, places):
    resolutions = [(512, 384), (512, 512), (1024, 768), (384, 768)]
    assert nearest_aspect(*person, resolutions) == places
    errors = [abs(Fraction(w, h) - Fraction(person[1], person[0])) for h, w in resolutions]
    assert places == [i for i, error in enumerate(errors) if error == min(errors)]


@pytest.fixture
def mixed(own_data):
    """Two of the ten persons lie across."""
    for name in ("00003_00", "00007_00"):
        for file in (f"image/{name}.png", f"agnostic-mask/{name}_mask.png"):
            with Image.open(own_data / "train" / file) as opened:
                opened.resize((64, 48)).save(own_data / "train" / file)
    (own_data / "test_pairs.txt").unlink()
    return own_data


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_of_a_batch_share_the_size_of_their_aspect(bases, mixed, tmp_path, workers):
    resolutions = [(24, 32), *SIZES]
    trainer = sized_trainer(bases[9], mixed, tmp_path, resolutions=resolutions, dataloader_num_workers=workers)
    assert (trainer.height, trainer.width) == (32, 24) == (trainer.settings.height, trainer.settings.width)
    assert trainer.steps_per_epoch == 5
    names, shapes, seeds, pairs = Counter(), Counter(), [], TreePairs(mixed, "train", True)
    for batch in itertools.islice(trainer.batches(), 20):  # four epochs
        (size,) = {tuple(batch[role].shape[2:]) for role in ("person", "cloth", "mask")}
        across = {name[:5] in {"00003", "00007"} for name in batch["name"]}
        assert across == {size == (24, 32)} and size in resolutions
        names.update(batch["name"])
        shapes[size] += 1
        seeds += batch["seed"]
        place = next(i for i in range(len(pairs)) if pairs.name(i) == batch["name"][0])
        item = to_values(Preparation(*size)(pairs.pictures(place), 0, place))
        assert all(torch.equal(batch[role][0], item[role]) for role in ("person", "cloth", "mask"))
    assert shapes[24, 32] == 4 and len(shapes) == 3 and set(names.values()) == {4} and len(set(seeds)) == 40


def test_rows_have_aspects_too(bases, mixed, tmp_path):
    files = [files for _, _, files in TreePairs(mixed, "train", True).pairs]
    kinds = datasets.Features({column: datasets.Image() for column in COLUMNS.values()})
    rows = {column: [str(pair[role]) for pair in files] for role, column in COLUMNS.items()}
    folder = tmp_path / "rows"
    datasets.Dataset.from_dict(rows, kinds).to_parquet(folder / "train.parquet")
    trainer = sized_trainer(
        bases[9], None, tmp_path / "out", dataset_name=folder, resolutions=[(24, 32), *SIZES], dataset_root=None
    )
    groups = trainer.loader.batch_sampler.groups
    assert sorted(groups) == [([0], [3, 7]), ([1, 2], [0, 1, 2, 4, 5, 6, 8, 9])]


RUN = {  # 7 updates in epochs of 3, of 5 batches
    "max_train_steps": 7,
    "gradient_accumulation_steps": 2,
    "checkpointing_steps": 4,
    "cloth_dropout": 0.4,
}


def test_a_resumed_run_equals_an_uninterrupted_one_and_cached_latents_train_the_same(bases, data, tmp_path):
    main(parse_args(sized(bases[9], data, tmp_path / "whole", **RUN)))
    begun = tmp_path / "whole" / "checkpoint-4"
    main(parse_args(sized(bases[9], data, tmp_path / "again", resume_from_checkpoint=begun, **RUN)))
    cached = sized(bases[9], data, tmp_path / "cached", cache_latents=tmp_path / "latents", **RUN)
    main(parse_args(cached))
    whole, again, cached = (
        load_file(tmp_path / n / f"checkpoint-7/{TRAINED_NAME}") for n in ("whole", "again", "cached")
    )
    assert equal(whole, again) and all(torch.allclose(whole[name], cached[name], atol=1e-5) for name in whole)
    shapes = {tuple(load_file(file)["mean"].shape) for file in (tmp_path / "latents").glob("*/*.safetensors")}
    assert shapes == {(10, 4, 8, 6), (10, 4, 16, 12)}
    tiny_pipe(9).load_vton_adapter(tmp_path / "whole")
    with pytest.raises(ValueError, match="was trained with resolutions .*, not with resolutions "):
        sized_trainer(bases[9], data, tmp_path / "other", resolutions=[(32, 24)], resume_from_checkpoint=begun, **RUN)


def test_what_cannot_be_is_one_sentence(bases, data, tmp_path, capsys):
    place = (bases[9], data, tmp_path)
    for line, message in (
        (sized(*place, height=32, width=24), "--resolutions takes the place of --height and --width"),
        (sized(*place, dataset_root=None, dataset_name="me/pairs", streaming=True), "which --streaming cannot"),
        (flags(*place, **MANY) + ["--resolutions", "32"], "--resolutions: must be HEIGHTxWIDTH in pixels, as 512x384, got 32"),
        (flags(*place, **MANY) + ["--resolutions", "0x24"], "as 512x384, got 0x24"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            parse_args(line)
        assert message in capsys.readouterr().err
    for resolutions, message in (
        ([(32, 24), (36, 24)], "--resolutions must have sides that are multiples of 8, got 36x24"),
        ([(32, 24), (32, 48)], "--resolutions: no person's aspect is nearest to that of 32x48: leave it out"),
        (
            [(32, 32), (64, 64)],
            "--resolutions 32x32, the nearest to the persons of 64x48, would stretch them .*: one such as 32x24 must be among",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            sized_trainer(*place, resolutions=resolutions)


def test_persons_that_are_stretched_are_counted(bases, mixed, tmp_path, caplog):
    sized_trainer(bases[9], mixed, tmp_path, resolutions=[(32, 24), (32, 32)])
    assert "2 of 10 persons are stretched by more than a tenth" in caplog.text
