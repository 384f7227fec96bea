"""The command line: files in, files out, whatever the pictures are; nothing twice, and nothing lost by one bad file."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from PIL import Image
from test_pictures import LINEAR
from test_pipeline import add_safety_checker
from test_train import trainer_of
from tiny import ROOT, box_mask, picture, tiny_parser, tiny_pipe, with_odd_exif

import tryon
from pipeline_vton import ADAPTER_NAME, load_pipeline
from train_vton import to_pixels
from tryon import find_beside, find_pairs, is_drawn, main, parse_args


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A whole pipeline on disk, with a human parser that sees a top everywhere but in black."""
    folder = tmp_path_factory.mktemp("model")
    pipe = tiny_pipe(9)
    parser, processor = tiny_parser(["background", "top"])
    pipe.register_modules(human_parser=parser, human_parser_processor=processor)
    pipe.save_pretrained(folder, human_parser_license="mit")
    return folder


@pytest.fixture
def shop(tmp_path, fresh_accelerate):
    """Two people and two cloths, masks beside them."""
    for name, image in (
        ("people/ann", picture(1)),
        ("people/bob", picture(3)),
        ("cloths/red", picture(2)),
        ("cloths/tee", picture(4)),
    ):
        save(image, tmp_path / f"{name}.png")
    for name in ("ann", "bob_mask"):
        save(box_mask(), tmp_path / "masks" / f"{name}.png")
    return tmp_path


def save(image, file, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, **options)


def run(shop, model, *flags, person="people", cloth="cloths", output="results", mask="masks"):
    masks = [] if mask is None else ["--mask", str(shop / mask)]
    paths = ["--person", str(shop / person), "--cloth", str(shop / cloth), "--output", str(shop / output)]
    return main(parse_args([*paths, *masks, "--model", str(model), "--steps", "2", "--device", "cpu", *flags]))


def expected(model, person, cloth, **options):
    pipe = tiny_pipe(9)
    pipe = type(pipe).from_pretrained(model)
    generator = tryon.torch.Generator().manual_seed(0)
    return pipe(person, cloth, num_inference_steps=2, generator=generator, **options).images[0]


def test_one_pair_is_what_the_pipeline_makes_of_it(shop, model, capsys):
    assert run(shop, model, person="people/ann.png", cloth="cloths/red.png", output="out/result.png", mask=None) == 0
    result = Image.open(shop / "out/result.png")
    assert (np.asarray(result) == np.asarray(expected(model, picture(1), picture(2)))).all()
    assert "1 of 1 try-ons" in capsys.readouterr().out
    assert [file.name for file in (shop / "out").iterdir()] == ["result.png"]


def test_every_cloth_is_tried_on_every_person_and_each_is_encoded_once(shop, model, monkeypatch):
    encoded = []
    for name in ("prepare_person", "prepare_cloth"):
        method = getattr(tryon.StableDiffusionVTONPipeline, name)
        monkeypatch.setattr(
            tryon.StableDiffusionVTONPipeline,
            name,
            lambda *args, m=method, n=name, **options: encoded.append(n) or m(*args, **options),
        )
    assert run(shop, model, "--batch_size", "3", "--contact_sheet", str(shop / "sheet.png")) == 0
    names = ["ann__red.png", "ann__tee.png", "bob__red.png", "bob__tee.png"]
    assert sorted(file.name for file in (shop / "results").iterdir()) == names
    assert sorted(encoded) == ["prepare_cloth"] * 2 + ["prepare_person"] * 2
    one = expected(model, picture(3), picture(4), mask_image=box_mask())
    np.testing.assert_allclose(np.asarray(Image.open(shop / "results/bob__tee.png")), np.asarray(one), atol=1)
    sheet = Image.open(shop / "sheet.png")
    assert sheet.width > 2 * 3 * tryon.SHEET_HEIGHT * 24 // 32 and sheet.height > 2 * tryon.SHEET_HEIGHT


def test_a_list_names_the_pairs(shop, model):
    (shop / "list.txt").write_text("ann.png tee.png\nbob.png red.png\nann.png tee.png\n")
    assert run(shop, model, "--pairs", str(shop / "list.txt")) == 0
    assert sorted(file.name for file in (shop / "results").iterdir()) == ["ann__tee.png", "bob__red.png"]
    (shop / "list.txt").write_text("ann.png tee.png\nbob.png red.png\nann.png red.png\n")
    paths = ["--person", str(shop / "people"), "--cloth", str(shop / "cloths"), "--output", str(shop / "out")]
    ordered = find_pairs(parse_args([*paths, "--pairs", str(shop / "list.txt")]))
    assert [pair.person.stem for pair in ordered] == ["ann", "ann", "bob"]  # each is encoded once


def test_a_list_names_the_kinds_of_its_cloths(shop, model, capsys):
    """A line's kind is what the human parser looks for; the other lines have --cloth_type's."""
    (shop / "list.txt").write_text("ann.png tee.png\nann.png red.png lower\n")
    assert run(shop, model, "--pairs", str(shop / "list.txt"), mask=None) == 1  # its parser knows tops alone
    said = capsys.readouterr().err
    assert "ann.png: `person_image` shows the human parser nothing" in said and "['lower']" in said
    assert [file.name for file in (shop / "results").iterdir()] == ["ann__tee.png"]
    assert run(shop, model, "--pairs", str(shop / "list.txt"), output="masked") == 0
    kinds = {
        file.stem: json.loads(Image.open(file).getexif()[0x10E])["cloth_type"] for file in (shop / "masked").iterdir()
    }
    assert kinds == {"ann__tee": ["upper"], "ann__red": ["lower"]}


def test_what_a_list_names_is_there(shop, model, capsys):
    """Told of before a model is loaded."""
    for line, message in (
        ("ann.png tee.png\nann.png ten.png", "list.txt, line 2: there is no .*/cloths/ten.png"),
        (
            "ann.png tee.png shoes",
            "line 1: must name a person and a cloth, .* after them, if anything, upper, lower, dress, got",
        ),
        ('ann.png,"tee, red.png"', "list.txt, line 1: there is no .*/people/ann.png,"),
    ):
        (shop / "list.txt").write_text(line)
        assert run(shop, "nowhere", "--pairs", str(shop / "list.txt")) == 2
        assert re.search(f"tryon.py: --pairs .*{message}", capsys.readouterr().err)
    assert run(shop, "nowhere", "--pairs", str(shop / "list.txt"), person="people/ann.png") == 2
    assert re.search("--person must be one, got .*ann.png", capsys.readouterr().err)


@pytest.mark.parametrize("name", ["ann.PNG", "ann_mask.JPG", "ann.webp"])
def test_a_mask_is_found_whatever_its_ending(shop, model, name):
    (shop / "masks/ann.png").unlink()
    save(box_mask(), shop / "masks" / name)
    assert find_beside(shop / "masks", shop / "people/ann.png", "ann_mask") == shop / "masks" / name


def test_one_mask_is_one_persons(shop, model, capsys):
    assert run(shop, "nowhere", mask="masks/ann.png") == 2
    assert re.search("--mask .*ann.png is one person's, and there are 2: give a folder", capsys.readouterr().err)
    assert run(shop, model, person="people/ann.png", mask="masks/ann.png") == 0


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_a_result_says_how_it_was_made_and_is_not_taken_for_another(shop, model, capsys, suffix):
    one = {"person": "people/ann.png", "cloth": "cloths/red.png", "output": f"one{suffix}"}
    for _ in range(2):  # the second time it is there already
        assert run(shop, model, **one) == 0
    exif = Image.open(shop / f"one{suffix}").getexif()
    assert exif[0x131] == "virtual try-on: a generated picture"
    told = json.loads(exif[0x10E])
    assert told == {
        "person": "ann.png", "cloth": "red.png", "mask": "ann.png", "model": model.name, "cloth_type": ["upper"],
        "looseness": "loose", "steps": 2, "seed": 0,
    }  # fmt: skip
    capsys.readouterr()
    before = (shop / f"one{suffix}").read_bytes()
    for changed, flags, message in (
        ({"cloth": "cloths/tee.png"}, (), "cloth was red.png and is tee.png"),
        ({}, ("--seed", "3"), "seed was 0 and is 3"),
        ({"mask": None}, (), "mask was ann.png and is None"),
    ):
        assert run(shop, model, *flags, **one | changed) == 2
        assert f"made otherwise ({message}): --overwrite makes it anew" in capsys.readouterr().err
    assert (shop / f"one{suffix}").read_bytes() == before
    assert run(shop, model, "--seed", "3", "--overwrite", **one) == 0
    told = Image.Exif()
    told.update({0x131: exif[0x131], 0x10E: "a dress"})
    for options in ({}, {"exif": told}):  # of which nothing is known
        save(picture(9), shop / f"one{suffix}", **options)
        assert run(shop, model, **one) == 0 and "1 of 1 are there already" in capsys.readouterr().err


def test_one_cloth_each_is_never_a_persons_own_and_results_have_persons_names(shop, model, capsys):
    for i in range(7):
        save(picture(i), shop / f"train/image/{i}.jpg")
        save(picture(i), shop / f"train/cloth/{i}.png")
    flags = [
        "--person",
        str(shop / "train/image"),
        "--cloth",
        str(shop / "train/cloth"),
        "--output",
        str(shop / "out"),
    ]
    drawn = [find_pairs(parse_args([*flags, "--one_each", "--seed", str(seed)])) for seed in range(9)]
    assert all(pair.cloth.stem != pair.person.stem == pair.output.stem for pairs in drawn for pair in pairs)
    assert all([pair.output.name for pair in pairs] == [f"{i}.jpg" for i in range(7)] for pairs in drawn)
    assert all(len({pair.cloth for pair in pairs}) >= 6 for pairs in drawn)
    assert len({tuple(pair.cloth for pair in pairs) for pairs in drawn}) > 5

    (shop / "list.txt").write_text("ann.png tee.png\nbob.png red.png\n")
    assert run(shop, model, "--one_each", "--pairs", str(shop / "list.txt")) == 0
    assert sorted(file.name for file in (shop / "results").iterdir()) == ["ann.png", "bob.png"]
    (shop / "list.txt").write_text("ann.png tee.png\nann.png red.png\n")
    assert run(shop, model, "--one_each", "--pairs", str(shop / "list.txt")) == 2
    assert "would both be written" in capsys.readouterr().err
    assert run(shop, model, "--one_each", person="people/ann.png", cloth="people/ann.png") == 2
    assert "no cloth for" in capsys.readouterr().err


def test_an_adapter_in_a_subfolder_is_that_one(shop, model):
    pipe = tiny_pipe(9)
    for i, weight in enumerate(pipe._adapter_parameters(pipe._settings(loras=False)).values()):
        weight.data.mul_(1 + i % 2)
    pipe.save_vton_adapter(shop / "adapters/sixteen/attention")
    one = {"person": "people/ann.png", "cloth": "cloths/red.png", "output": "one.png", "mask": "masks/ann.png"}
    where = ["--adapter", str(shop / "adapters"), "--adapter_subfolder", "sixteen/attention"]
    assert run(shop, model, *where, **one) == 0
    assert run(shop, model, "--adapter", str(shop / "adapters/sixteen/attention"), **one | {"output": "two.png"}) == 0
    assert run(shop, model, **one | {"output": "three.png"}) == 0
    with_it, same, without = (Image.open(shop / f"{name}.png").tobytes() for name in ("one", "two", "three"))
    assert with_it == same != without


def test_pictures_that_the_model_fails_at_are_named_and_all_else_is_done(shop, model, monkeypatch, capsys):
    """The others of its batch too."""
    call, prepare = tryon.StableDiffusionVTONPipeline.__call__, tryon.StableDiffusionVTONPipeline.prepare_cloth
    bad = None

    def prepares(pipe, *args, **options):
        nonlocal bad
        prepared = prepare(pipe, *args, **options)
        bad = bad or prepared
        return prepared

    monkeypatch.setattr(tryon.StableDiffusionVTONPipeline, "prepare_cloth", prepares)

    def fails_at_red(pipe, persons, cloths, **options):
        if any(cloth is bad for cloth in cloths):
            raise ValueError("the UNet in float16 gave NaN or infinity")
        return call(pipe, persons, cloths, **options)

    monkeypatch.setattr(tryon.StableDiffusionVTONPipeline, "__call__", fails_at_red)
    assert run(shop, model, "--batch_size", "2") == 1
    said = capsys.readouterr()
    assert "ann__red.png: the UNet in float16 gave NaN" in said.err and "2 of 4 try-ons" in said.out


def test_a_persons_profile_that_converts_nothing_costs_nobody_elses_results(shop, model, capsys):
    image = Image.open(shop / "people/ann.png")
    image.save(shop / "people/ann.png", icc_profile=LINEAR.replace(b"rTRC", b"xTRC"))
    assert run(shop, model) == 1
    assert "colours cannot be converted" in capsys.readouterr().err
    assert sorted(file.name for file in (shop / "results").iterdir()) == ["bob__red.png", "bob__tee.png"]


def test_what_is_there_is_passed_over_and_a_stopped_run_goes_on(shop, model, capsys):
    assert run(shop, model) == 0
    kept, gone = shop / "results/ann__red.png", shop / "results/bob__tee.png"
    before = gone.read_bytes()
    kept.write_bytes(b"mine")
    gone.unlink()
    assert run(shop, model) == 0
    assert kept.read_bytes() == b"mine" and gone.read_bytes() == before
    assert "3 of 4 are there already" in capsys.readouterr().err
    assert run(shop, model, "--overwrite") == 0
    assert kept.read_bytes() != b"mine"


def test_one_file_is_no_place_for_several_pairs(shop, model, capsys):
    assert run(shop, model, output="all.png") == 2
    assert f"--output must be a folder, got {shop}/all.png" in capsys.readouterr().err
    assert run(shop, model, person="people/ann.png", cloth="cloths/red.png", output="one.gif") == 2
    assert "--output must be a folder, or end in .png, .jpg" in capsys.readouterr().err
    assert run(shop, model, person="people/ann.png", cloth="cloths/red.png", output="one.heic") == 2
    assert "--output must be a folder, or end in .png, .jpg" in capsys.readouterr().err
    (shop / "results").write_text("a file")
    assert run(shop, model) == 2 and "--output must be a folder" in capsys.readouterr().err


def test_what_a_safety_checker_blackens_is_no_result(shop, model, tmp_path, capsys):
    pipe = add_safety_checker(tiny_pipe(9), flags=True)
    pipe.save_pretrained(tmp_path / "checked")
    assert run(shop, tmp_path / "checked", person="people/ann.png") == 1
    said = capsys.readouterr()
    assert said.err.count("the model's safety checker blackened the picture") == 2 and "0 of 2 try-ons" in said.out
    assert not (shop / "results").exists()


def test_a_sheet_that_cannot_be_drawn_costs_no_failure_its_sentence(shop, model, capsys):
    (shop / "people/broken.png").write_text("no picture")
    (shop / "results").mkdir()
    (shop / "results/ann__red.png").write_text("no picture")
    assert run(shop, model, "--contact_sheet", str(shop / "sheet.png")) == 1
    told = capsys.readouterr().err
    assert "broken.png cannot be read" in told and "--contact_sheet" in told and "ann__red.png cannot be read" in told


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--output", ""), "argument --output: must not be empty"),
        (("--guidance_scale", "-3"), "--guidance_scale: must be a number from 0, got -3"),
        (("--guidance_scale", "nan"), "--guidance_scale: must be a number from 0, got nan"),
        (("--seed", str(2**70)), "--seed: must be a whole number from 0"),
        (("--device", "cuda:0/foo"), "--device: must be a device of this machine, got cuda:0/foo"),
        (("--device", "cuda:77"), "--device: must be a device of this machine, got cuda:77"),
        (("--device", "meta"), "--device: must be a device of this machine, got meta"),
        (("--pairs", "nowhere.txt"), "--pairs: there is no nowhere.txt"),
    ],
)
def test_a_flag_that_says_nothing_sensible_is_refused_before_anything_is_loaded(shop, flags, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(shop, shop / "no-model", *flags)
    assert stopped.value.code == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--height", "31"), "`height` must be a positive multiple of 8, got 31"),
        (("--steps", "2000"), "2000"),
        (("--scheduler", "FlowMatchEulerDiscreteScheduler"), "FlowMatchEulerDiscreteScheduler is"),
    ],
)
def test_settings_that_the_model_cannot_follow_are_told_once(shop, model, flags, told, capsys):
    assert run(shop, model, *flags) == 2
    said = capsys.readouterr().err
    (sentence,) = [line for line in said.splitlines() if line.startswith("tryon.py: ")]
    assert told in sentence and not (shop / "results").exists()


def test_where_nothing_can_be_written_is_known_before_the_model_is_loaded(shop, capsys):
    (shop / "taken").write_text("a file")
    assert run(shop, shop / "no-model", output="taken/results") == 2
    assert "taken/results cannot be written to: Not a directory" in capsys.readouterr().err
    assert run(shop, shop / "no-model", "--contact_sheet", str(shop / "taken/sheet.png")) == 2
    assert "taken cannot be written to: Not a directory" in capsys.readouterr().err


def test_an_adapter_that_reads_text_is_given_one(shop, model, tmp_path, capsys):
    pipe = tiny_pipe(9, text=True, cross_attention="prompt")
    pipe.save_pretrained(tmp_path / "reader")
    one = {"person": "people/ann.png", "cloth": "cloths/red.png", "output": "out.png"}
    assert run(shop, tmp_path / "reader", "--prompt", "a red shirt", **one) == 0
    made = expected(tmp_path / "reader", picture(1), picture(2), mask_image=box_mask(), prompt="a red shirt")
    assert (np.asarray(Image.open(shop / "out.png")) == np.asarray(made)).all()
    assert run(shop, model, "--overwrite", "--prompt", "a red shirt", **one) == 2
    assert "this model's adapter reads no text: leave out --prompt a red shirt" in capsys.readouterr().err


def test_a_list_of_no_pairs_is_an_error(shop, model, capsys):
    (shop / "list.txt").write_text("\n\n")
    assert run(shop, model, "--pairs", str(shop / "list.txt")) == 2
    assert "list.txt names no pairs" in capsys.readouterr().err


def test_a_full_disk_stops_the_run_with_a_sentence(shop, model, monkeypatch, capsys):
    written, write = [], tryon.save_picture

    def fails(*args):
        written.append(args)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        write(*args)

    monkeypatch.setattr(tryon, "save_picture", fails)
    assert run(shop, model) == 1
    said = capsys.readouterr()
    assert "stopped, since a result could not be written: [Errno 28] No space left" in said.err
    assert "1 of 4 try-ons" in said.out and len(written) == 2 and len(list((shop / "results").iterdir())) == 1


def test_files_of_other_kinds_are_told_of_and_hidden_ones_are_not(shop, model, capsys):
    for name in ("people/IMG_1.HEIC", "people/._ann.png", "people/.DS_Store", "cloths/list.txt"):
        (shop / name).write_bytes(b"what a telephone or a Mac leaves")
    assert run(shop, model) == 0
    said = capsys.readouterr()
    assert "people: passed over, of kinds that cannot be read here: IMG_1.HEIC\n" in said.err
    assert "cloths: passed over" in said.err and "4 of 4 try-ons" in said.out and ".DS" not in said.err


def test_a_sheet_shows_what_the_model_sees(shop, model):
    """Transparency on white, sixteen bits, and no picture so wide that the others are lost beside it."""
    clear = Image.new("RGBA", (24, 32), (0, 0, 0, 0))
    clear.putpixel((0, 0), (255, 255, 255, 255))
    save(clear, shop / "cloths/red.png")
    save(Image.fromarray(np.full((32, 24), 65535, np.uint16)), shop / "cloths/tee.png")
    save(picture(5, 32, 640), shop / "cloths/wide.png")
    assert run(shop, model, "--contact_sheet", str(shop / "sheet.png"), person="people/ann.png") == 0
    sheet = Image.open(shop / "sheet.png")
    assert sheet.width < 2 * (192 + 512 + 192 + 40) + 1
    cloths = [file.name for file in sorted((shop / "cloths").iterdir())]
    assert cloths == ["red.png", "tee.png", "wide.png"]
    column, rows = sheet.width // 2, [(0, 24), (1, 24)]
    for place, top in rows:
        assert sheet.getpixel((place * column + 10 + 192 + 10 + 96, top + 128)) == (255, 255, 255)


def test_a_base_without_an_adapter_is_told_of(model, tmp_path, recwarn):
    beside = load_pipeline(ROOT / "demo/model", device="cpu")  # the adapter lies beside the base
    assert beside.config.trained_steps
    load_pipeline(model, device="cpu")
    assert not any("no adapter was given" in str(told.message) for told in recwarn)
    base = shutil.copytree(ROOT / "demo/model", tmp_path / "base", ignore=shutil.ignore_patterns(ADAPTER_NAME))
    with pytest.warns(UserWarning, match=f"{base} is a base that has learnt no try-on, and no adapter was given"):
        load_pipeline(base, device="cpu")


def test_the_demos_model_is_the_default(shop):
    """Two drawn pictures and nothing more."""
    example = ROOT / "demo/examples/upper-0"
    pictures = ["--person", str(example / "person.png"), "--cloth", str(example / "cloth.png")]
    assert main(parse_args([*pictures, "--output", str(shop / "out.png"), "--steps", "1", "--device", "cpu"])) == 0
    person, result = (
        np.asarray(Image.open(file).convert("RGB")) for file in (example / "person.png", shop / "out.png")
    )
    changed = (person != result).any(axis=-1)
    assert 0.1 < changed.mean() < 0.9


def test_a_result_is_written_while_the_next_one_is_made(shop, model, monkeypatch):
    made, overlapped, write = [], [], tryon.save_picture
    second, call = Event(), tryon.StableDiffusionVTONPipeline.__call__

    def calls(pipe, *args, **options):
        made.append(args)
        if len(made) == 2:
            second.set()
        return call(pipe, *args, **options)

    def writes(*args):
        overlapped.append(second.wait(timeout=60))
        write(*args)

    monkeypatch.setattr(tryon.StableDiffusionVTONPipeline, "__call__", calls)
    monkeypatch.setattr(tryon, "save_picture", writes)
    assert run(shop, model, person="people/ann.png") == 0
    assert overlapped == [True, True] and len(list((shop / "results").iterdir())) == 2


@pytest.mark.parametrize(("flags", "rows"), [((), 4), (("--fast",), 14), (("--fast", "--steps", "4"), 7)])
def test_fast_is_the_pipelines_own(shop, model, monkeypatch, flags, rows):
    computed, predict = [], tryon.StableDiffusionVTONPipeline.predict_noise

    def predicts(pipe, noisy, t, conditioning, prompt_embeds, negative_prompt_embeds, guided):
        computed.append(1 + guided)
        return predict(pipe, noisy, t, conditioning, prompt_embeds, negative_prompt_embeds, guided)

    monkeypatch.setattr(tryon.StableDiffusionVTONPipeline, "predict_noise", predicts)
    steps = [] if flags else ["--steps", "2"]
    places = ["--person", "people/ann.png", "--cloth", "cloths/red.png", "--mask", "masks", "--output", "results"]
    places = [str(shop / word) if i % 2 else word for i, word in enumerate(places)]
    line = [*places, "--model", str(model), "--device", "cpu", *steps, *flags]
    assert main(parse_args(line)) == 0 and sum(computed) == rows


def test_bad_files_are_named_at_the_end_and_all_else_is_done(shop, model, capsys):
    (shop / "people/broken.png").write_bytes((shop / "people/ann.png").read_bytes()[:200])
    (shop / "cloths/text.jpg").write_text("no picture")
    save(picture(5), shop / "people/zoe.png")  # nobody drew her mask
    save(picture(6), shop / "people/yan.avif")
    whole = (shop / "people/yan.avif").read_bytes()
    (shop / "people/yan.avif").write_bytes(whole[:-200] + bytes(200))  # PIL's reader of AVIF raises RuntimeError
    with pytest.raises(RuntimeError):
        Image.open(shop / "people/yan.avif").load()
    assert run(shop, model) == 1
    assert sorted(file.stem for file in (shop / "results").iterdir()) == [
        "ann__red",
        "ann__tee",
        "bob__red",
        "bob__tee",
    ]
    told = capsys.readouterr()
    lines = [line for line in told.err.splitlines() if str(shop) in line]
    assert len(lines) == 4 and "4 of 15 try-ons" in told.out
    assert any("yan.avif cannot be read" in line for line in lines)
    assert any("broken.png cannot be read" in line for line in lines)
    assert any("text.jpg cannot be read" in line for line in lines)
    assert any("masks/zoe.png cannot be read" in line for line in lines)


def test_a_mask_of_another_size_is_named_with_its_person(shop, model, capsys):
    save(box_mask(40, 40), shop / "masks/ann.png")
    assert run(shop, model) == 1
    assert (
        f"{shop}/people/ann.png with {shop}/masks/ann.png: `mask_image` must have the size" in capsys.readouterr().err
    )
    assert (shop / "results/bob__red.png").is_file()


def test_a_photograph_with_odd_exif_is_tried_on_upright(shop, model):
    (shop / "people/eve.jpg").write_bytes(with_odd_exif(picture(1)))
    save(box_mask(24, 32), shop / "masks/eve.png")
    assert run(shop, model, "--contact_sheet", str(shop / "sheet.png"), person="people/eve.jpg") == 0
    assert Image.open(shop / "results/eve__red.jpg").size == (32, 24) and (shop / "sheet.png").is_file()


@pytest.mark.parametrize(
    "flags, places, named",
    [
        (["--one_each"], {"output": "people", "cloth": "cloths/red.png"}, "--output .*people/ann.png"),
        (
            [],
            {"person": "people/ann.png", "cloth": "cloths/red.png", "output": "cloths/../cloths/red.png"},
            "--output .*/red.png",
        ),
        (["--one_each"], {"output": "masks"}, "--output .*masks/ann.png"),
        (["--contact_sheet", "people/bob.png"], {}, "--contact_sheet .*people/bob.png"),
    ],
)
def test_what_is_tried_on_is_never_overwritten(shop, model, capsys, monkeypatch, flags, places, named):
    monkeypatch.chdir(shop)
    before = {file: file.read_bytes() for file in shop.rglob("*.png")}
    assert run(shop, model, "--overwrite", *flags, **places) == 2
    assert re.search(f"{named} is a picture that is tried on itself", capsys.readouterr().err)
    assert {file: file.read_bytes() for file in shop.rglob("*.png")} == before


@pytest.mark.parametrize("suffix, kind", [("jpg", "JPEG"), ("webp", "WEBP"), ("png", "PNG"), ("gif", "PNG")])
def test_a_result_has_its_persons_format_and_colours_and_nothing_of_its_exif(shop, model, suffix, kind):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"  # turned by a quarter
    options = {} if suffix == "gif" else {"exif": exif, "icc_profile": LINEAR}
    save(picture(1), shop / f"people/eve.{suffix}", **options)
    mask = box_mask(*((24, 32) if suffix != "gif" else (32, 24)))
    save(mask, shop / "masks/eve.png")
    assert run(shop, model, person=f"people/eve.{suffix}", cloth="cloths/red.png") == 0
    (file,) = (shop / "results").iterdir()
    result = Image.open(file)
    assert result.format == kind and set(result.getexif()) == {0x131, 0x10E} and result.size == mask.size
    assert result.info.get("icc_profile") == options.get("icc_profile")


def test_looseness_and_cloth_types_reach_the_parser(shop, model, monkeypatch):
    asked = []
    predict = tryon.StableDiffusionVTONPipeline.predict_mask
    monkeypatch.setattr(
        tryon.StableDiffusionVTONPipeline, "predict_mask", lambda *args: asked.append(args[2:]) or predict(*args)
    )
    flags = ("--looseness", "box", "--cloth_type", "upper", "dress")
    assert run(shop, model, *flags, mask=None, person="people/ann.png") == 0
    assert asked == [(["upper", "dress"], "box")]


def test_sizes_scheduler_and_dtype_are_obeyed(shop, model, monkeypatch):
    seen = []
    call = tryon.StableDiffusionVTONPipeline.__call__

    def watched(self, persons, *args, **options):
        seen.append((persons[0].height, persons[0].width, type(self.scheduler).__name__, str(self.unet.dtype)))
        return call(self, persons, *args, **options)

    monkeypatch.setattr(tryon.StableDiffusionVTONPipeline, "__call__", watched)
    flags = ("--height", "48", "--width", "32", "--scheduler", "DDIMScheduler", "--dtype", "bfloat16")
    assert run(shop, model, *flags, person="people/ann.png", cloth="cloths/red.png") == 0
    assert seen == [(48, 32, "DDIMScheduler", "torch.bfloat16")]


def test_an_adapter_and_a_parser_are_loaded(shop, model, tmp_path):
    other = tiny_pipe(9, seed=1)
    other.save_vton_adapter(tmp_path / "adapter")
    parser, processor = tiny_parser(["top"], only="top")
    parser.save_pretrained(tmp_path / "parser")
    processor.save_pretrained(tmp_path / "parser")
    flags = ("--adapter", str(tmp_path / "adapter"), "--human_parser", str(tmp_path / "parser"))
    assert run(shop, model, *flags, mask=None, person="people/ann.png", cloth="cloths/red.png") == 0
    pipe = type(other).from_pretrained(model)
    pipe.load_vton_adapter(tmp_path / "adapter")
    white = Image.new("L", picture(1).size, 255)
    result = pipe(
        picture(1), picture(2), white, num_inference_steps=2, generator=tryon.torch.Generator().manual_seed(0)
    )
    assert (np.asarray(Image.open(shop / "results/ann__red.png")) == np.asarray(result.images[0])).all()


def test_processes_share_the_list(shop, model):
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        str(ROOT / "tryon.py"),
    ]
    (shop / "cloths/text.png").write_text("no picture")
    flags = ["--model", str(model), "--steps", "1", "--mask", str(shop / "masks")]
    paths = ["--person", str(shop / "people"), "--cloth", str(shop / "cloths"), "--output", str(shop / "results")]
    done = subprocess.run(
        [*command, *paths, *flags], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode != 0 and done.stdout.count("4 of 6 try-ons") == 1, done.stderr
    assert "text.png cannot be read" in done.stderr
    assert len(list((shop / "results").iterdir())) == 4


def test_photographs_and_the_demos_model(tmp_path):
    flat = Image.new("RGB", (96, 128), "navy")
    assert is_drawn(flat)
    examples = list((ROOT / "demo/examples").glob("*/person.png"))
    assert examples and all(is_drawn(Image.open(file)) for file in examples)
    assert not is_drawn(Image.open(ROOT / "tests/photos/person.webp"))
    noise = np.random.default_rng(0).integers(0, 30, (256, 192, 3), dtype=np.uint8)
    photograph = Image.fromarray(np.asarray(picture(1, 256, 192)) // 2 + noise)
    assert not is_drawn(photograph)


def test_a_photograph_for_the_demos_model_is_told_of(shop, model, monkeypatch, capsys):
    monkeypatch.setattr(tryon, "DEMO_MODEL", Path(model).resolve())
    tiny_pipe(9).save_vton_adapter(model)
    one = {"person": "people/ann.png", "cloth": "cloths/red.png"}
    assert run(shop, model, **one) == 0
    assert "people/ann.png looks like a photograph" in (told := capsys.readouterr().err) and "--model" in told
    save(Image.new("RGB", (24, 32), "navy"), shop / "people/ann.png")
    assert run(shop, model, "--overwrite", **one) == 0
    assert "photograph" not in capsys.readouterr().err
    assert run(shop, model, "--overwrite") == 0
    assert "people/bob.png looks like a photograph" in capsys.readouterr().err


def test_a_model_without_a_parser_asks_for_one_or_for_masks(shop, model, tmp_path, capsys):
    tiny_pipe(9).save_pretrained(tmp_path / "bare")
    assert run(shop, tmp_path / "bare", mask=None) == 2
    assert "give --human_parser, or --mask" in capsys.readouterr().err


def test_one_cloth_each_is_what_mask_free_training_reads(model, bases, own_data, tmp_path, fresh_accelerate):
    """The README's two commands."""
    split = own_data / "train"
    shutil.rmtree(split / "condition")  # as a photograph set has none
    places = {"person": "image", "cloth": "cloth", "mask": "agnostic-mask", "output": "condition"}
    line = [word for flag, folder in places.items() for word in (f"--{flag}", str(split / folder))]
    assert main(parse_args([*line, "--model", str(model), "--one_each", "--steps", "1", "--device", "cpu"])) == 0
    trainer = trainer_of(bases[8], own_data, tmp_path / "out", mask_free=True)
    for item in (trainer.dataset[i] for i in range(len(trainer.dataset))):
        written = Image.open(split / "condition" / item["name"].split()[0])
        assert tryon.torch.equal(item["condition"], to_pixels(written, 32, 24))


def test_a_mask_free_model_asks_its_parser_nothing(shop, tmp_path, monkeypatch):
    pipe = tiny_pipe(9, mask_free=True, height=32, width=24)
    parser, processor = tiny_parser(["background", "top"])
    pipe.register_modules(human_parser=parser, human_parser_processor=processor)
    pipe.save_pretrained(tmp_path / "mask-free")
    parser.save_pretrained(tmp_path / "parser")
    processor.save_pretrained(tmp_path / "parser")
    monkeypatch.setattr(tryon.StableDiffusionVTONPipeline, "predict_mask", None)
    flags = ["--human_parser", str(tmp_path / "parser")]
    assert run(shop, tmp_path / "mask-free", *flags, cloth="cloths/red.png", mask=None) == 0


def test_a_model_that_cannot_be_loaded_is_one_sentence(shop, model, capsys):
    for flags, said in (
        (["--model", str(shop / "people")], "model_index.json"),
        (["--adapter", str(shop)], str(shop)),
    ):
        assert run(shop, model, *flags) == 2
        *_, told = capsys.readouterr().err.partition("tryon.py: ")
        assert said in told and told.count("\n") == 1


def test_what_lies_beside_a_person_is_found_by_the_names_that_datasets_have(shop, tmp_path):
    """VITON-HD's NAME_mask and NAME_rendered, DressCode's ID_5."""
    for name in ("p/00_0.png", "c/00_1.png", "masks/00_0_mask.png", "poses/00_0_rendered.jpg", "skeletons/00_5.jpg"):
        save(picture(1), tmp_path / name)
    places = {"person": "p", "cloth": "c", "output": "out", "mask": "masks"}
    line = [word for flag, name in places.items() for word in (f"--{flag}", str(tmp_path / name))]
    for folder, name in (("poses", "00_0_rendered.jpg"), ("skeletons", "00_5.jpg")):
        (pair,) = find_pairs(parse_args([*line, "--pose", str(tmp_path / folder)]))
        assert pair.mask == tmp_path / "masks/00_0_mask.png" and pair.pose == tmp_path / folder / name


def test_wrong_flags_are_one_sentence(shop, model, capsys):
    save(picture(6), shop / "people/ann.jpg")
    places = ["--person", str(shop / "people"), "--cloth", str(shop / "cloths"), "--output", str(shop / "results")]
    pairs = find_pairs(parse_args(places))
    assert len({pair.output for pair in pairs}) == len(pairs) == 6  # ann.jpg's results are JPEGs
    save(picture(6), shop / "cloths/red.jpg")
    with pytest.raises(ValueError, match="would both be written to .*ann__red.jpg: rename one"):
        find_pairs(parse_args(places))
    assert main(parse_args([*places[:2], "--cloth", str(shop / "nothing"), *places[4:]])) == 2
    assert f"--cloth: there is no {shop}/nothing" in capsys.readouterr().err
    (shop / "empty").mkdir()
    assert main(parse_args(["--person", str(shop / "empty"), *places[2:]])) == 2
    assert f"--person: there are no pictures in {shop}/empty" in capsys.readouterr().err
    for flags, words in (
        (["--steps", "0"], "--steps: must be a positive whole number, got 0"),
        (["--scheduler", "Nothing"], "--scheduler must be the name of a diffusers scheduler, got Nothing"),
        (["--mask", str(shop / "nothing")], "--mask: there is no"),
        (["--contact_sheet", "sheet.gif"], "--contact_sheet must end in .png"),
        (
            ["--fast", "--scheduler", "DDIMScheduler"],
            "--fast has a sampler of its own: leave out --scheduler, got DDIMScheduler",
        ),
        (["--seed", "-1"], "--seed: must be a whole number from 0 to 4294967295, got -1"),
    ):
        with pytest.raises(SystemExit):
            parse_args([*places, *flags])
        assert words in capsys.readouterr().err
