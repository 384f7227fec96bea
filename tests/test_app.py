"""The try-on page in a real browser, its API, the Space's folder and the notebook: `make test-app`."""

import io
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from gradio.components.image_editor import EditorData
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from huggingface_hub import RepoCard
from nbclient import NotebookClient
from PIL import ExifTags, Image, UnidentifiedImageError
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from test_pipeline import add_safety_checker
from tiny import ROOT, box_mask, picture, seeded, tiny_parser, tiny_pipe, with_odd_exif

import app
from benchmarks.load import serve


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
PATIENCE = 1000 * int(os.environ.get("VTON_PATIENCE", 120))  # milliseconds; a busy machine sets more, in seconds
EXAMPLE = min(app.DEMO_EXAMPLES.iterdir())  # the first on the page


# ------------------------------------------------------------------------------------------------------------ fixtures


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pipe():
    """A tiny pipeline with a human parser of random weights, slow enough to be watched."""
    pipe = tiny_pipe()
    parser, processor = tiny_parser(["background", "top", "face", "pants"])
    pipe.register_modules(human_parser=parser, human_parser_processor=processor)
    pipe.unet.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    return pipe


@pytest.fixture(scope="module")
def page_url(pipe, tmp_path_factory) -> Iterator[str]:
    """A page in this process, with a human parser and one example."""
    example = tmp_path_factory.mktemp("examples") / "upper-one"
    example.mkdir()
    for name, image in (("person", picture(7, 64, 48)), ("cloth", picture(8)), ("mask", box_mask(64, 48))):
        image.save(example / f"{name}.png")
    page = app.build_page(pipe, example.parent)
    _, url, _ = app.launch(page, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield url
    page.close()


@pytest.fixture(scope="module")
def space_url(tmp_path_factory) -> Iterator[str]:
    """The demo model as a Space would serve it, by a folder of its own."""
    folder = tmp_path_factory.mktemp("spaces") / "space"
    app.write_space(folder)
    with serve(folder) as (url, _):
        yield url


@pytest.fixture
def visit(browser):
    """Opens a page in a profile of its own; in the end nothing may have gone wrong in it, nor been asked of another host."""
    contexts: list[BrowserContext] = []
    wrong: list[str] = []

    def visit(url: str, width: int = 1280) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900})
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on(
            "request",
            lambda request: None if request.url.startswith((url, "blob:", "data:")) else wrong.append(request.url),
        )
        page.goto(url)
        page.locator("#person canvas").first.wait_for(state="attached")
        return page

    visit.wrong = wrong
    yield visit
    for context in contexts:
        context.close()
    assert wrong == []


def save(image: Image.Image, file: Path) -> str:
    image.save(file)
    return str(file)


def upload(page: Page, name: str, file: str) -> None:
    page.locator(f"#{name} input[type=file]").first.set_input_files(file)


def set_steps(page: Page, steps: int) -> None:
    page.get_by_text("More settings").click()
    page.locator("#steps input[type=number]").fill(str(steps))
    page.locator("#steps input[type=number]").blur()


def wait_until(page: Page, text: str) -> None:
    expect(page.locator("#status")).to_contain_text(text, timeout=PATIENCE)


def downloaded(page: Page) -> np.ndarray:
    with page.expect_download() as download:
        page.locator("#download").click()
    with Image.open(download.value.path()) as picture:
        assert "generated" in picture.getexif()[ExifTags.Base.Software]
        return np.asarray(picture.convert("RGB"))


def used_mask(page: Page) -> np.ndarray:
    file = page.locator("#used_mask img").get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(page.request.get(file).body())).convert("L")) > 127


def as_array(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def canvas(page: Page) -> bytes:
    return page.locator("#person canvas").first.screenshot()


def settled(page: Page, before: bytes) -> bytes:
    """The editor's canvas, once it shows something else than before and no longer changes: what is done to it until then is lost."""
    deadline, last = time.monotonic() + PATIENCE / 1000, before
    while time.monotonic() < deadline:
        page.wait_for_timeout(300)
        now = canvas(page)
        if now == last != before:
            return now
        last = now
    raise AssertionError("the editor's canvas shows nothing new, or never the same twice")


def upload_person(page: Page, file: str) -> bytes:
    """The canvas with the person on it."""
    empty = canvas(page)
    upload(page, "person", file)
    return settled(page, empty)


def paint_a_spot(page: Page) -> None:
    """One stroke in the middle of the person, with whatever tool is chosen."""
    box = page.locator("#person canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 30, y + 30, steps=4)
    page.mouse.up()


# --------------------------------------------------- without browser, before one is started: Playwright has a loop of its own


def test_painted_layers_of_any_size_and_number_are_one_mask():
    person, mask = picture(1, 64, 48), box_mask(64, 48)
    large, small = app.mask_layer(mask), app.mask_layer(box_mask(16, 12))
    for layers in ([large], [small], [small, large]):
        assert np.array_equal(app.read_editor({"background": person, "layers": layers})[1], mask)
    assert app.read_editor({"background": person, "layers": []}) == (person, None)
    for empty in (None, {"background": None, "layers": []}, {"background": Image.new("RGBA", (16, 16)), "layers": []}):
        with pytest.raises(app.gr.Error, match="There is no picture of the person yet"):
            app.read_editor(empty)


def test_a_preview_is_nearer_to_the_picture_than_its_mean_and_keeps_what_is_not_masked():
    pipe, person = app.load_from_environment(), Image.open(EXAMPLE / "person.png")
    preview = app.Previewer(pipe, person, Image.new("L", person.size, 255), None)
    pixels = pipe.image_processor.preprocess(
        person.convert("RGB"), *pipe.resolve_size(person.height, person.width, None, None)
    )
    latents = app.encode_latents(pipe.vae, pixels).detach() * pipe.vae.config.scaling_factor
    shown, true = (np.asarray(image, float) for image in (preview(latents), person.convert("RGB")))
    assert ((shown - true) ** 2).mean() < 0.35 * true.var(axis=(0, 1)).mean()
    preview.mask = Image.new("L", person.size, 0)
    assert np.array_equal(preview(latents), person.convert("RGB"))


def test_a_run_that_is_closed_stops_the_model_at_its_next_step():
    pipe, calls = tiny_pipe(), []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(time.sleep(0.05)))
    settings = app.Settings("upper", "loose", steps=100, guidance_scale=1.5, seed=1, height=None)
    run = app.Studio(pipe).try_on(picture(1), picture(2), box_mask(), settings)
    assert next(run).done < 100
    run.close()
    assert len(calls) < 50


def test_what_names_a_file_is_not_logged(tmp_path):
    (tmp_path / "ann.jpg").write_text("no picture")
    with pytest.raises(app.gr.Error, match="ann.jpg") as raised:
        app.open_picture(str(tmp_path / "ann.jpg"), "person")
    assert not raised.value.print_exception


def test_a_run_that_fails_or_is_stopped_leaves_no_picture_behind(tmp_path):
    """gradio deletes after a while what it was given, and that alone."""
    page = app.Page(tiny_pipe(), [], "")
    page.cache, stopped = str(tmp_path / "cache"), threading.Event()
    editor = {"background": picture(1, 64, 48), "layers": [app.mask_layer(box_mask(64, 48))]}
    rest = ("upper", "loose", 2, 1.5, 0, 0)
    (tmp_path / "cloth.png").write_text("no picture")
    *_, last = page.page_try_on(stopped, editor, str(tmp_path / "cloth.png"), *rest)
    assert "no picture that can be read" in last[page.progress]
    run = page.page_try_on(stopped, editor, save(picture(2), tmp_path / "cloth.png"), *rest)
    next(run)
    stopped.set()
    (last,) = run
    assert last[page.result] is None and "Stopped." in last[page.progress] and not list(tmp_path.rglob("before.png"))


def test_a_run_gives_what_the_pipeline_gives():
    pipe = tiny_pipe()
    settings = app.Settings("upper", "loose", steps=3, guidance_scale=1.5, seed=5, height=None)
    *_, last = app.Studio(pipe).try_on(picture(1), picture(2), box_mask(), settings)
    direct = pipe(
        picture(1), picture(2), box_mask(), num_inference_steps=3, guidance_scale=1.5, generator=seeded(5)
    ).images[0]
    assert last.finished and np.array_equal(last.picture, direct)


def test_a_mask_free_model_needs_no_mask_and_proposes_none():
    pipe = tiny_pipe(9, mask_free=True)
    parser, processor = tiny_parser(["background", "top"])
    pipe.register_modules(human_parser=parser, human_parser_processor=processor)
    studio = app.Studio(pipe)
    with pytest.raises(app.gr.Error, match="This model needs no mask"):
        studio.predict_mask(picture(1), "upper", "loose")
    *_, last = studio.try_on(picture(1), picture(2), None, app.Settings("upper", "loose", 1, 1.5, 5, None))
    assert last.finished and last.mask is None


def test_limits_are_said_in_words(tmp_path, monkeypatch):
    studio = app.Studio(tiny_pipe())
    with pytest.raises(app.gr.Error, match="no human parser"):
        studio.predict_mask(picture(1), "upper", "loose")
    for change, words in (
        ({"steps": 101}, "steps"),
        ({"height": 4096}, "1536 pixels a side"),
        ({"cloth_type": "hat"}, "cloth_type"),
    ):
        settings = app.Settings(
            **{
                "cloth_type": "upper",
                "looseness": "loose",
                "steps": 2,
                "guidance_scale": 1.5,
                "seed": 1,
                "height": None,
            }
            | change
        )
        with pytest.raises(app.gr.Error, match=words):
            list(studio.try_on(picture(1), picture(2), box_mask(), settings))
    with pytest.raises(app.gr.Error, match="Paint over"):
        list(studio.try_on(picture(1), picture(2), None, settings))
    monkeypatch.setattr(app, "MAX_PIXELS", 100)
    with pytest.raises(app.gr.Error, match="24 x 32 pixels, the limit is 100"):
        app.open_picture(save(picture(1), tmp_path / "person.png"), "person")


def test_what_a_safety_checker_blackens_is_said(tmp_path):
    studio = app.Studio(add_safety_checker(tiny_pipe(9), flags=True))
    settings = app.Settings("upper", "loose", 1, 1.5, 1, None)
    with pytest.raises(app.gr.Error, match="safety checker blackened"):
        list(studio.try_on(picture(1), picture(2), box_mask(), settings))


def test_a_zero_gpu_space_lends_its_gpu_to_every_run_and_mask(monkeypatch):
    lent = []

    def gpu(duration):
        return lambda function: lambda *arguments: lent.append(duration) or function(*arguments)

    monkeypatch.setattr(app, "spaces", SimpleNamespace(GPU=gpu))
    pipe = tiny_pipe(9)
    parser, processor = tiny_parser(["top"], only="top")
    pipe.register_modules(human_parser=parser, human_parser_processor=processor)
    studio = app.Studio(pipe)
    *_, last = studio.try_on(picture(1), picture(2), None, app.Settings("upper", "loose", 1, 1.5, 1, None))
    assert last.finished and lent == [120, 120]


def test_the_environment_names_the_weights(tmp_path, monkeypatch):
    base, other = tiny_pipe(9), tiny_pipe(9, seed=1)
    base.save_pretrained(tmp_path / "base")
    other.save_vton_adapter(tmp_path / "adapters/mine")
    for part in tiny_parser(["top"], only="top"):
        part.save_pretrained(tmp_path / "parser")
    places = {"MODEL": "base", "ADAPTER": "adapters", "HUMAN_PARSER": "parser"}
    for name, place in places.items():
        monkeypatch.setenv(f"VTON_{name}", str(tmp_path / place))
    monkeypatch.setenv("VTON_ADAPTER_SUBFOLDER", "mine")
    pipe = app.load_from_environment()
    name = next(name for name in pipe.unet.state_dict() if "attn1.to_k" in name)
    assert torch.equal(pipe.unet.state_dict()[name], other.unet.state_dict()[name])
    assert pipe.human_parser.config.id2label == {0: "top"} and not app.serves_demo()


def test_a_model_that_is_not_there_is_one_sentence(monkeypatch):
    monkeypatch.setenv("VTON_MODEL", "runs/no/model")
    monkeypatch.setattr("sys.argv", ["app.py"])
    with pytest.raises(SystemExit, match="app.py: VTON_MODEL, .* `model` runs/no/model: there is no file or folder"):
        app.main()


def test_what_ghostscript_would_run_is_no_picture(tmp_path, monkeypatch):
    """PIL hands EPS to it, whatever a file is called."""
    picture(1).save(tmp_path / "photo.png", "EPS")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("the visitor's program runs"))
    with pytest.raises(app.gr.Error, match="is no picture that can be read"):
        app.open_picture(str(tmp_path / "photo.png"), "cloth")
    file = app.gr.FileData(path=str(tmp_path / "photo.png"))
    with pytest.raises(UnidentifiedImageError):
        app.gr.ImageEditor(type="pil").preprocess(EditorData(background=file, layers=[], composite=None))


def test_a_photograph_with_odd_exif_is_opened_upright(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(with_odd_exif(picture(1)))
    assert app.open_picture(str(tmp_path / "photo.jpg"), "person").size == (32, 24)


def test_the_spaces_card_is_what_the_hub_reads(tmp_path):
    app.write_space(tmp_path / "space")
    card = RepoCard.load(tmp_path / "space/README.md").data
    assert (card.sdk, card.sdk_version, card.license) == ("gradio", app.gr.__version__, "apache-2.0")
    assert (tmp_path / "space" / card.app_file).read_text() == (ROOT / "app.py").read_text()
    needed = (tmp_path / "space/requirements.txt").read_text().splitlines()
    assert "torch>=2.8,<2.12" in needed and "torch>=2.8" not in needed


def test_a_used_folder_is_no_space(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="write_space"):
        app.write_space(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("opened_in", [".", "notebooks"])
def test_the_notebook_runs_on_the_demo_model(tmp_path, monkeypatch, opened_in):
    for name in ("pipeline_vton.py", "demo"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name, value in {
        "MODEL": "demo/model",
        "ADAPTER": "demo/model",
        "ADAPTER_SUBFOLDER": "",
        "PICTURES": str(EXAMPLE),
        "STEPS": "2",
    }.items():
        monkeypatch.setenv(f"VTON_{name}", value)
    notebook = nbformat.read(ROOT / "notebooks" / "try_on.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    (tmp_path / opened_in).mkdir(exist_ok=True)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path / opened_in)}}).execute()
    assert Image.open(tmp_path / "tryon.png").size == Image.open(EXAMPLE / "person.png").size
    assert "image/png" in notebook.cells[-2].outputs[-1].data


def test_equal_pictures_of_two_visitors_never_share_a_file(tmp_path):
    """gradio would write the second over the first while that is being sent, and the first visitor gets a cut one."""
    assert len({app.save_picture(box_mask(), "mask", str(tmp_path)) for _ in range(2)}) == 2


def test_a_transparent_person_is_shown_as_the_model_sees_them():
    """On white, in their colours' profile, and upright."""
    person = picture(1, 64, 48).convert("RGBA")
    person.putalpha(0)
    person.putpixel((0, 0), (255, 255, 255, 255))
    assert np.array_equal(app.shown(person), Image.new("RGB", (48, 64), "white"))
    turned = picture(1, 64, 48)
    turned.getexif()[0x0112] = 6  # a quarter turn
    assert app.shown(turned).size == (64, 48) and max(app.shown(picture(1, 64, 48), 32).size) == 32
    pipe = tiny_pipe()
    preview = app.Previewer(pipe, person, box_mask(64, 48), None)
    assert np.array_equal(preview.person, Image.new("RGB", (48, 64), "white"))


# ---------------------------------------------------------------------------------------------------------- the browser


def test_two_visitors_at_once_wait_their_turn_and_get_their_own_person_back(page_url, pipe, visit, tmp_path):
    persons, pages = [picture(seed, 64, 48) for seed in (1, 2)], []
    for number, person in enumerate(persons):
        page = visit(page_url, width=(1280, 390)[number])
        upload_person(page, save(person, tmp_path / f"person{number}.png"))
        upload(page, "cloth", save(picture(3 + number), tmp_path / f"cloth{number}.jpg"))
        expect(page.locator("#cloth img")).to_be_visible(timeout=PATIENCE)
        set_steps(page, 100)
        pages.append(page)
    pages[0].locator("#start").click()
    expect(pages[0].locator("#status progress")).to_be_visible(timeout=PATIENCE)
    pages[1].locator("#start").click()
    expect(pages[1].locator("#status")).to_contain_text("queue: 1/1", timeout=PATIENCE)
    pages[1].locator("#stop").click()  # who waits may think again
    wait_until(pages[1], "Stopped")
    pages[1].locator("#start").click()
    expect(pages[1].locator("#status")).to_contain_text("queue: 2/2", timeout=PATIENCE)
    for page, person in zip(pages, persons):
        wait_until(page, "Done")
        result, used = downloaded(page), np.asarray(pipe.predict_mask(person)) > 0
        assert np.array_equal(result[~used], as_array(person)[~used])
        assert not np.array_equal(result[used], as_array(person)[used])


def test_a_mask_is_proposed_mended_and_used_and_a_run_can_be_stopped(page_url, pipe, visit, tmp_path):
    person = picture(1, 64, 48)
    proposed = np.asarray(pipe.predict_mask(person)) > 0
    page = visit(page_url)
    upload(page, "cloth", save(picture(3), tmp_path / "cloth.png"))
    set_steps(page, 100)
    unpainted = upload_person(page, save(person, tmp_path / "person.png"))
    page.locator("#propose").click()
    wait_until(page, "This is the mask")
    settled(page, unpainted)
    page.locator("#person button[aria-label=Erase]").click()
    paint_a_spot(page)
    page.locator("#start").click()
    expect(page.locator("#status progress")).to_be_visible(timeout=PATIENCE)
    page.locator("#stop").click()
    wait_until(page, "Stopped")
    expect(page.locator("#result img")).to_have_count(0, timeout=PATIENCE)  # when the run has heard of it
    wait_until(page, "Stopped")
    page.locator("#steps input[type=number]").fill("2")
    page.locator("#start").click()
    wait_until(page, "Done")
    used, changed = used_mask(page), (downloaded(page) != as_array(person)).any(axis=2)
    assert not used[~proposed].any() and 0 < used.sum() < proposed.sum()
    assert changed.any() and not changed[~used].any()


def test_a_proposed_mask_follows_the_choice_and_a_painted_one_stays(page_url, pipe, visit, tmp_path):
    person = picture(1, 64, 48)
    page = visit(page_url)
    upload(page, "cloth", save(picture(3), tmp_path / "cloth.png"))
    set_steps(page, 2)
    expect(page.get_by_label("Seed")).to_have_value("")  # a new one at each run
    before = upload_person(page, save(person, tmp_path / "person.png"))
    page.locator("#propose").click()
    before = settled(page, before)
    page.get_by_label("Trousers or skirt").click()
    before = settled(page, before)
    page.locator("#start").click()
    wait_until(page, "Done")
    assert np.array_equal(used_mask(page), np.asarray(pipe.predict_mask(person, "lower")) > 0)
    page.locator("#person button[aria-label=Erase]").click()
    paint_a_spot(page)
    page.get_by_label("Dress").click()
    wait_until(page, "The mask stays as you painted it")
    page.get_by_label("Seed").fill("-1")
    page.locator("#start").click()
    wait_until(page, "The seed must be a whole number from 0 to 4294967295")
    expect(page.locator("#download")).to_be_disabled()  # nothing of the last run stays beside this one
    expect(page.locator("#used_mask img")).to_have_count(0)


def test_the_api_proposes_masks_and_takes_what_it_proposed(page_url, pipe, tmp_path):
    client = Client(page_url, verbose=False, download_files=str(tmp_path), httpx_kwargs={"timeout": PATIENCE / 1000})
    person = handle_file(save(picture(1, 64, 48), tmp_path / "person.png"))
    cloth = handle_file(save(picture(3), tmp_path / "cloth.png"))
    mask = client.predict(person, "upper", "tight", api_name="/mask")
    assert np.array_equal(Image.open(mask), pipe.predict_mask(picture(1, 64, 48), "upper", "tight"))
    colours = handle_file(save(Image.open(mask).convert("RGB"), tmp_path / "mask.png"))  # as most programs save masks
    result, used, _ = client.predict(person, cloth, colours, steps=20, api_name="/tryon")
    assert "generated" in Image.open(result).getexif()[ExifTags.Base.Software]
    assert np.array_equal(Image.open(used).convert("L"), Image.open(mask))


def test_what_is_wrong_is_said_in_words(page_url, visit, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "photo.png").write_text("no picture either")
    page = visit(page_url)
    upload(page, "person", str(tmp_path / "notes.txt"))
    upload(page, "cloth", str(tmp_path / "notes.txt"))
    expect(page.get_by_text("Invalid file type: notes.txt")).to_be_visible(timeout=PATIENCE)
    page.locator("#start").click()
    wait_until(page, "There is no picture of the person yet.")
    upload_person(page, save(picture(1), tmp_path / "person.png"))
    upload(page, "cloth", str(tmp_path / "photo.png"))
    page.locator("#cloth img").wait_for(state="attached")
    page.locator("#start").click()
    wait_until(page, "The file for the cloth (photo.png) is no picture that can be read.")


def test_what_there_are_no_words_for_is_told_too_and_the_button_comes_back(page_url, visit, tmp_path, monkeypatch):
    def breaks(*_):
        raise RuntimeError("a kernel panic")
        yield

    page = visit(page_url)
    upload_person(page, save(picture(1), tmp_path / "person.png"))
    upload(page, "cloth", save(picture(2), tmp_path / "cloth.png"))
    page.locator("#cloth img").wait_for(state="attached")
    with monkeypatch.context() as broken:
        broken.setattr(app.Studio, "try_on", breaks)
        page.locator("#start").click()
        wait_until(page, app.FAILED)
    expect(page.locator("#start")).to_be_visible(timeout=PATIENCE)
    assert "kernel panic" not in page.content()
    set_steps(page, 1)
    page.locator("#start").click()
    wait_until(page, "Done")


def test_whoever_finds_the_queue_full_is_told_and_may_try_again(pipe, visit, tmp_path, monkeypatch):
    enough = threading.Event()

    def waits(*_):
        enough.wait(PATIENCE / 1000)
        raise app.in_words("That was enough.")
        yield

    monkeypatch.setattr(app.Studio, "try_on", waits)
    with monkeypatch.context() as narrow:
        narrow.setattr(app, "MAX_QUEUE", 1)
        served = app.build_page(pipe)
    _, url, _ = app.launch(served, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    pages = [visit(url) for _ in range(3)]
    for page, said in zip(
        pages, ("Reading the pictures", "queue", app.FAILED)
    ):  # one runs, one waits, one is too many
        upload_person(page, save(picture(1), tmp_path / "person.png"))
        upload(page, "cloth", save(picture(2), tmp_path / "cloth.png"))
        page.locator("#cloth img").wait_for(state="attached")
        page.locator("#start").click()
        wait_until(page, said)
    expect(pages[2].locator("#start")).to_be_visible(timeout=PATIENCE)
    enough.set()
    for page in pages[:2]:
        wait_until(page, "That was enough.")
    for page in pages:
        page.context.close()
    served.close()
    (refused,) = visit.wrong  # which the browser's console tells of, too
    assert "503 (Service Unavailable)" in refused
    visit.wrong.clear()


def test_pictures_are_deleted_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(app, "DELETE_EVERY", 1)
    monkeypatch.setattr(app, "DELETE_AFTER", 10)  # long enough for a busy machine to read what was sent
    page = app.build_page(tiny_pipe())
    _, url, _ = app.launch(page, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    client = Client(url, verbose=False, download_files=str(tmp_path / "mine"))
    files = {"person": picture(1), "cloth": picture(2), "mask": box_mask()}
    sent = {name: handle_file(save(image, tmp_path / f"{name}.png")) for name, image in files.items()}
    result, _, _ = client.predict(**sent, steps=1, seed=7, api_name="/tryon")
    deadline = time.monotonic() + PATIENCE / 1000
    while (left := list((tmp_path / "cache").rglob("*.png"))) and time.monotonic() < deadline:
        time.sleep(0.2)
    page.close()
    assert left == [] and Path(result).is_file()


def test_an_example_fills_everything_and_a_cleared_person_is_uploaded_and_painted(page_url, visit, tmp_path):
    person, mask = as_array(picture(7, 64, 48)), np.asarray(box_mask(64, 48)) > 127
    page = visit(page_url)
    empty = canvas(page)
    set_steps(page, 9)
    guidance = page.get_by_label("number input for Guidance: pull of the cloth")
    own = guidance.input_value()
    guidance.fill("7")
    guidance.blur()
    page.locator("#examples button").first.click()
    expect(page.locator("#cloth img")).to_be_visible(timeout=PATIENCE)
    filled = settled(page, empty)
    expect(guidance).to_have_value(own, timeout=PATIENCE)
    expect(page.locator("#steps input[type=number]")).to_have_value(str(app.STEPS))
    page.locator("#steps input[type=number]").fill("2")
    page.locator("#steps input[type=number]").blur()
    page.locator("#start").click()
    wait_until(page, "Done")
    changed = (downloaded(page) != person).any(axis=2)
    assert changed.any() and not changed[~mask].any()

    page.locator("#person button[aria-label='Clear canvas']").click()
    cleared = settled(page, filled)
    page.locator("#start").click()
    wait_until(page, "There is no picture of the person yet.")
    upload(page, "person", save(picture(7, 64, 48), tmp_path / "person.png"))
    settled(page, cleared)
    page.locator("#person button[aria-label=Brush]").click()
    paint_a_spot(page)
    page.locator("#start").click()
    wait_until(page, "Done")
    used, changed = used_mask(page), (downloaded(page) != person).any(axis=2)
    assert 0 < used.sum() < 0.2 * mask.sum()  # a stroke, and not what the parser would take
    assert changed.any() and not changed[~used].any()


def test_a_space_serves_the_demo_model_by_its_api(space_url, tmp_path):
    person, mask = as_array(Image.open(EXAMPLE / "person.png")), np.asarray(Image.open(EXAMPLE / "mask.png")) > 127
    client = Client(space_url, verbose=False, download_files=str(tmp_path), httpx_kwargs={"timeout": PATIENCE / 1000})
    files = {name: handle_file(str(EXAMPLE / f"{name}.png")) for name in ("person", "cloth", "mask")}
    results = [client.predict(**files, steps=1, seed=seed, api_name="/tryon") for seed in (7, 7, None)]
    first, again, other = (as_array(Image.open(file)) for file, _, _ in results)
    assert np.array_equal(first, again) and not np.array_equal(first, other) and results[0][2] == 7
    assert np.array_equal(first[~mask], person[~mask]) and not np.array_equal(first, person)
    with pytest.raises(AppError, match="100"):
        client.predict(**files, steps=101, api_name="/tryon")
