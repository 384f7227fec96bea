#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with the
# License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
"""The try-on page: two photographs in, one picture out, in a browser. A Hugging Face Space starts this very file.

`python app.py` serves the demo model on http://127.0.0.1:7860. Environment variables name other weights:

    VTON_MODEL              base, or whole pipeline: a Hub repository or a folder (default: demo/model)
    VTON_ADAPTER            try-on adapter: a Hub repository, a folder or a file (default: the demo's on the demo's base, else none)
    VTON_ADAPTER_SUBFOLDER  where in there, such as CatVTON's mix-48k-1024/attention
    VTON_HUMAN_PARSER       a Segformer that proposes masks: a Hub repository or a folder (default: what the model has)
    VTON_EXAMPLES           folder of examples, CATEGORY-NAME/{person,cloth,mask}.png (default: the demo's on the demo's base, else none)

`GRADIO_SERVER_NAME` and `GRADIO_SERVER_PORT` are gradio's own. `python app.py --write_space DIR` writes a Space's folder.
The file reads in the order of the data: weights, pictures, a run with its previews, the page.
"""

import argparse
import hashlib
import html
import os
import queue
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


try:
    import spaces  # before torch, as ZeroGPU wants it; only Spaces have it
except ImportError:
    spaces = None

try:
    import gradio as gr
except ImportError as error:
    needed = "the page needs gradio: pip install -r requirements-app.txt"
    raise (SystemExit if __name__ == "__main__" else ImportError)(needed) from error
import numpy as np
import torch
from gradio.components import Component
from PIL import ExifTags, Image, ImageOps

from pipeline_vton import (
    GENERATED,
    UNREADABLE,
    StableDiffusionVTONPipeline,
    as_mask_image,
    as_pictures,
    as_pil,
    colour_profiles,
    encode_latents,
    load_pipeline,
    upright,
    within_range,
)


ROOT = Path(__file__).resolve().parent
DEMO_MODEL = ROOT / "demo" / "model"
DEMO_EXAMPLES = ROOT / "demo" / "examples"

FORMATS = {"AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP"}  # of a visitor's files
BROWSERS_FORMATS = "(A browser shows JPEG, PNG and WebP files; HEIC and TIFF files it drops.)"
MAX_PIXELS = 50_000_000  # of a photograph
MAX_FILE_SIZE = "100mb"  # an editor sends a photograph as PNG
STEPS, MAX_STEPS = 50, 100
SEEDS = 2**32
MAX_SIDE = 1536  # of the size that the model works at
MAX_QUEUE = 64  # visitors who wait
DELETE_EVERY, DELETE_AFTER = 600, 3600  # seconds: how often the server looks for uploads and results that are how old
PREVIEW_EVERY, PREVIEW_SIDE = 0.3, 512  # seconds, pixels
SHOWN_SIDE = 1600  # pixels of a result on the page; the download has all
CATEGORIES = [("Top", "upper"), ("Trousers or skirt", "lower"), ("Dress", "dress")]
LOOSENESS = [("As worn", "tight"), ("Room for another cut", "loose"), ("A box", "box")]
EMPTY_CANVAS = (16, 16)  # pixels
MASK_COLOR, MASK_ALPHA = "#e0218a", 0.6  # of the painted layer
ONE_AT_A_TIME = {"concurrency_limit": 1, "concurrency_id": "model"}

# gradio opens files too, and PIL would hand an EPS to Ghostscript
Image.init()
Image.ID[:] = [name for name in Image.ID if name in FORMATS]


# ------------------------------------------------------------------------------------------------------------- weights


def serves_demo() -> bool:
    return Path(os.environ.get("VTON_MODEL") or DEMO_MODEL).resolve() == DEMO_MODEL


def load_from_environment() -> StableDiffusionVTONPipeline:
    """What VTON_MODEL, VTON_ADAPTER and VTON_HUMAN_PARSER name, else the demo; float16 on a GPU, else float32."""
    model = os.environ.get("VTON_MODEL") or str(DEMO_MODEL)
    adapter = os.environ.get("VTON_ADAPTER") or None
    subfolder = os.environ.get("VTON_ADAPTER_SUBFOLDER") or None
    pipe = load_pipeline(model, adapter, os.environ.get("VTON_HUMAN_PARSER") or None, adapter_subfolder=subfolder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ------------------------------------------------------------------------------------------------------------ pictures


def in_words(sentence: str) -> gr.Error:
    """What the page says; the server's log says nothing of it, since it may name a visitor's file."""
    return gr.Error(sentence, print_exception=False)


def photograph(**options) -> gr.Image:
    """An image component that hands over the uploaded file as it is, so that a bad one is told of in our words."""
    component = gr.Image(**options)
    component.preprocess = lambda payload: None if payload is None else payload.path
    return component


def open_picture(file: str | None, what: str) -> Image.Image:
    """The picture in a file; `what` it shows is for the errors."""
    if file is None:
        raise in_words(f"There is no picture of the {what} yet.")
    try:
        with Image.open(file) as picture:
            check_pixels(picture, what)
            return upright(picture)
    except gr.Error:  # a ValueError too
        raise
    except Image.DecompressionBombError:
        raise in_words(f"The picture of the {what} is too large: the limit is {MAX_PIXELS:,} pixels.") from None
    except (*UNREADABLE, ValueError, AssertionError):
        raise in_words(f"The file for the {what} ({Path(file).name}) is no picture that can be read.") from None


def check_pixels(picture: Image.Image, what: str) -> None:
    if picture.width * picture.height > MAX_PIXELS:
        size = f"{picture.width} x {picture.height}"
        raise in_words(f"The picture of the {what} has {size} pixels, the limit is {MAX_PIXELS:,} in all.")


def read_editor(editor: dict | None) -> tuple[Image.Image, Image.Image | None]:
    """Person and painted mask of an ImageEditor's value; None where nothing is painted.

    The mask is where the layers' alpha is, in the person's size, whatever size the layers have.

    Raises:
        gr.Error: there is no person, or one that is too large.
    """
    person = editor and editor["background"]
    if person is None or person.size == EMPTY_CANVAS:  # which a cleared editor sends
        raise in_words(f"There is no picture of the person yet. {BROWSERS_FORMATS}")
    check_pixels(person, "person")
    painted = np.zeros((person.height, person.width), bool)
    for layer in editor["layers"]:
        alpha = np.asarray(layer.getchannel("A").resize(person.size, Image.Resampling.NEAREST))
        painted |= alpha > 255 * MASK_ALPHA / 2
    return person, Image.fromarray(np.uint8(painted * 255)) if painted.any() else None


def read_seed(text: str | None) -> int | None:
    """What was typed; None where nothing was."""
    text = (text or "").strip()
    if text and not (text.isdecimal() and int(text) < SEEDS):
        raise in_words(f"The seed must be a whole number from 0 to {SEEDS - 1}, or empty for a new one each time.")
    return int(text) if text else None


def digest(mask: Image.Image) -> str:
    """What stands for a mask as `read_editor` returns it."""
    return hashlib.sha256(mask.convert("L").point(lambda value: 255 * (value >= 128)).tobytes()).hexdigest()


def mask_layer(mask: Image.Image) -> Image.Image:
    """A mask as the layer that an ImageEditor paints."""
    layer = Image.new("RGBA", mask.size, MASK_COLOR)
    layer.putalpha(mask.convert("L").point(lambda value: round(255 * MASK_ALPHA) if value >= 128 else 0))
    return layer


def save_picture(picture: Image.Image, name: str, folder: str, **options: Any) -> str:
    """Write a lossless file in a subfolder that nobody guesses; `options` are PIL's.

    gradio names what it writes itself by its content and writes it anew each time, also while another visitor reads it.
    """
    subfolder = Path(folder) / secrets.token_hex(16)
    subfolder.mkdir(parents=True)
    picture.save(subfolder / f"{name}.png", compress_level=1, **options)
    return str(subfolder / f"{name}.png")


def save_editor(person: Image.Image, mask: Image.Image, folder: str) -> dict:
    """An ImageEditor's value, with the mask painted over the person; a composite would be shown as background."""
    layers = [save_picture(mask_layer(mask), "mask", folder)]
    return {"background": save_picture(person, "person", folder), "layers": layers, "composite": None}


def shown(picture: Image.Image, side: int = SHOWN_SIDE) -> Image.Image:
    """The picture as the pipeline reads it, as large as the page needs it."""
    picture = as_pil(*as_pictures(picture, "picture"), *colour_profiles(picture))
    picture.thumbnail((side, side))
    return picture


# ---------------------------------------------------------------------------------------------- a run and its previews


@dataclass
class Settings:
    """What a visitor chose; None is a new seed, or the model's own size."""

    cloth_type: str
    looseness: str
    steps: int
    guidance_scale: float
    seed: int | None
    height: int | None  # pixels that the model works at


@dataclass
class Progress:
    """Where a run is: so many steps done, and the picture so far."""

    done: int
    picture: Image.Image
    mask: Image.Image | None
    seed: int
    seconds: float
    finished: bool = False


def save_result(at: Progress, folder: str) -> str:
    """Of a finished run, a file that says in EXIF that it is generated."""
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = GENERATED
    return save_picture(at.picture, f"tryon-{at.seed}", folder, exif=exif)


class Previewer:
    """Shows latents without the VAE: a linear map to RGB, fitted to this person's own latents and pixels."""

    def __init__(self, pipe: StableDiffusionVTONPipeline, person: Image.Image, mask: Image.Image, height: int | None):
        self.person = shown(person, PREVIEW_SIDE)
        self.mask = as_mask_image(mask, "mask_image").resize(self.person.size)
        size = pipe.resolve_size(person.height, person.width, height, None)
        pixels = pipe.image_processor.preprocess(self.person, *size).to(pipe._execution_device)
        with within_range(pipe.vae, pipe.unet):
            latents = encode_latents(pipe.vae, pixels)[0] * pipe.vae.config.scaling_factor
        self.size = latents.shape[-2:]
        colors = torch.nn.functional.interpolate(pixels.float(), self.size, mode="area")[0]  # (3, h, w) in [-1, 1]
        self.to_rgb = torch.linalg.lstsq(self._columns(latents), colors.flatten(1).T.cpu()).solution  # (4 + 1, 3)

    @staticmethod
    def _columns(latents: torch.Tensor) -> torch.Tensor:
        """(4, h, w) to (h * w, 4 + 1), the last for the constant."""
        columns = latents.flatten(1).T.float().cpu()
        return torch.cat([columns, torch.ones_like(columns[:, :1])], dim=1)

    def __call__(self, latents: torch.Tensor) -> Image.Image:
        """Latents (1, 4, h, w), or a canvas that starts with them, laid into the person."""
        height, width = self.size
        rgb = self._columns(latents[0, :, :height, :width]) @ self.to_rgb
        pixels = ((rgb.view(height, width, 3) + 1) * 127.5).clamp(0, 255).byte().numpy()
        picture = Image.fromarray(pixels).resize(self.person.size, Image.Resampling.BICUBIC)
        return Image.composite(picture, self.person, self.mask)


@torch.no_grad()
def denoise(
    pipe: StableDiffusionVTONPipeline,
    person: Image.Image,
    cloth: Image.Image,
    mask: Image.Image | None,
    settings: Settings,
) -> Iterator[tuple[int, Image.Image]]:
    """Try the cloth on; yields (steps done, picture), a preview now and then and the result at last.

    The model works in a thread of its own. Closing the iterator stops it at its next step, and waits for that.
    """
    everywhere = Image.new("L", person.size, 255)
    preview = Previewer(pipe, person, mask or everywhere, settings.height)
    previews, stopped, last = queue.SimpleQueue(), threading.Event(), time.monotonic()

    def after_step(pipe, step: int, timestep: int, tensors: dict) -> dict:
        nonlocal last
        pipe._interrupt = stopped.is_set()
        if time.monotonic() - last > PREVIEW_EVERY:
            previews.put((step + 1, preview(tensors["latents"])))
            last = time.monotonic()
        return {}

    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(
            pipe,
            person,
            cloth,
            mask,
            cloth_type=settings.cloth_type,
            height=settings.height,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            generator=torch.Generator().manual_seed(settings.seed),
            callback_on_step_end=after_step,
        )
        run.add_done_callback(lambda _: previews.put(None))
        try:
            yield from iter(previews.get, None)
        finally:
            stopped.set()
    made = run.result()
    if any(made.nsfw_content_detected or ()):
        raise ValueError("The model's safety checker blackened the result: try other pictures, or another seed.")
    yield settings.steps, made.images[0]


@contextmanager
def errors_in_words() -> Iterator[None]:
    """What the pipeline says of bad input becomes what the page says."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise in_words(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise in_words("The graphics card has too little memory for this size: choose a smaller one.") from error


def on_gpu(function: Callable) -> Callable:
    """On a ZeroGPU Space a GPU is lent to the function; arguments travel to another process, what it closes over does not."""
    return function if spaces is None else spaces.GPU(duration=120)(function)


class Studio:
    """One pipeline that dresses one visitor after the other."""

    def __init__(self, pipe: StableDiffusionVTONPipeline):
        self.pipe = pipe
        self.turn = threading.Lock()  # whoever leaves the page leaves gradio's queue before the model has stopped

        @on_gpu
        def run(*arguments) -> Iterator[tuple[int, Image.Image]]:
            yield from denoise(pipe, *arguments)

        @on_gpu
        def parse(*arguments) -> Image.Image:
            return pipe.predict_mask(*arguments)

        self._run, self._parse = run, parse

    @property
    def proposes_masks(self) -> bool:
        return self.pipe.human_parser is not None and not self.pipe.config.mask_free

    @property
    def hint(self) -> str:
        """What a visitor may paint."""
        if self.pipe.config.mask_free:
            return "This model needs no mask: paint only to keep the change within a part."
        return "Paint over what the new cloth may change" + (
            ", or see and mend what the page would take." if self.proposes_masks else ": the page has no human parser."
        )

    def predict_mask(self, person: Image.Image, cloth_type: str, looseness: str) -> Image.Image:
        """Where a cloth of this kind may change the person: white, in the person's size."""
        if not self.proposes_masks:
            raise in_words(self.hint)
        with errors_in_words():
            return self._parse(person, cloth_type, looseness)

    def try_on(
        self, person: Image.Image, cloth: Image.Image, mask: Image.Image | None, settings: Settings
    ) -> Iterator[Progress]:
        """Put the cloth on the person; without a mask one is predicted, where the model needs one."""
        if not 1 <= settings.steps <= MAX_STEPS:
            raise in_words(f"The steps must be from 1 to {MAX_STEPS}, not {settings.steps}.")
        with errors_in_words():
            height, width = self.pipe.resolve_size(person.height, person.width, settings.height, None)
        if max(height, width) > MAX_SIDE:
            raise in_words(
                f"The model works at {MAX_SIDE} pixels a side at most, and this would be {height} x {width}."
            )
        if mask is None and self.proposes_masks:
            mask = self.predict_mask(person, settings.cloth_type, settings.looseness)
        if mask is None and not self.pipe.config.mask_free:
            raise in_words("Paint over what the new cloth may change: the model sees nothing of the person there.")
        seed = secrets.randbelow(SEEDS) if settings.seed is None else settings.seed
        with errors_in_words(), self.turn:
            start = time.monotonic()
            for done, picture in self._run(person, cloth, mask, replace(settings, seed=seed)):
                yield Progress(done, picture, mask, seed, time.monotonic() - start)
        yield Progress(done, picture, mask, seed, time.monotonic() - start, finished=True)


# ------------------------------------------------------------------------------------------------------------ the page


CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; }
#title h1 { margin-bottom: 0; }
#notes *, .hint * { color: var(--body-text-color-subdued); font-size: var(--text-sm); }
#cloth img, #used_mask img { width: 100%; height: 100%; object-fit: contain; }
#examples .gallery-item, #examples .gallery-item * { width: 10.5rem; height: 7rem; max-width: none; max-height: none; }
@media (max-width: 600px) { #examples .gallery-item, #examples .gallery-item * { width: 9.3rem; height: 6.2rem; } }
#person:has(.empty) .zoom-number { visibility: hidden; }
#status { min-height: 4rem; }
#status p { margin: 0 0 .4rem; }
#status progress { appearance: none; width: 100%; height: .6rem; border-radius: .3rem; overflow: hidden; }
#status progress::-webkit-progress-bar { background: var(--border-color-primary); }
#status progress::-webkit-progress-value { background: var(--color-accent); }
#status progress::-moz-progress-bar { background: var(--color-accent); }
#status .failed { padding: .6rem .8rem; border-left: 4px solid var(--error-border-color); background: var(--error-background-fill); }
"""
TITLE = "# Virtual try-on\nA photograph of a person, one of a cloth: see the person wear it."
NOTES = (
    "The pictures are made by a model: they show neither size nor fit, and the body under the cloth is invented. Dress only people "
    "who agreed to it, and say of a result that it is generated. Uploads and results are deleted within {minutes} minutes; "
    "nothing else is kept of them."
)
FAILED = "The server could not do it. Try again in a while; if that fails too, tell whoever runs this page."
DEMO_NOTE = "This page runs the demo model, which knows drawn people only; `VTON_MODEL` names another."


def status(text: str, done: int | None = None, steps: int | None = None, failed: bool = False) -> str:
    """A line about the run, and how far it is."""
    bar = "" if done is None else f'<progress value="{done}" max="{steps}" aria-label="steps done"></progress>'
    return f'<div role="status" class="{"failed" if failed else ""}"><p>{html.escape(text)}</p>{bar}</div>'


def heights(pipe: StableDiffusionVTONPipeline) -> list[tuple[str, int]]:
    """Sizes to choose from: around the model's own height, in steps that it can work at."""
    multiple = pipe.size_multiple
    own = pipe.resolve_size(4, 3, None, None)[0]
    sides = {round(own * factor / multiple) * multiple for factor in (0.5, 0.75, 1.25, 1.5, 2)} - {0, own}
    return [("The model's own", 0), *((f"{side} px high", side) for side in sorted(sides) if side <= MAX_SIDE)]


@dataclass
class Example:
    """What a click on an example fills in, and the picture to click on."""

    person: Image.Image
    cloth: Image.Image
    mask: Image.Image
    cloth_type: str

    @classmethod
    def read(cls, folder: Path) -> "Example":
        """From a folder CATEGORY-NAME with person.png, cloth.png and mask.png."""
        pictures = [Image.open(folder / f"{name}.png") for name in ("person", "cloth", "mask")]
        return cls(*pictures, folder.name.partition("-")[0])

    def filling(self, folder: str) -> tuple[dict, str, str]:
        """What goes into the editor, the cloth and the kind of cloth; its files are written to `folder`."""
        return save_editor(self.person, self.mask, folder), save_picture(self.cloth, "cloth", folder), self.cloth_type

    def thumbnail(self) -> Image.Image:
        """Person and cloth side by side."""
        size = self.person.width * 256 // self.person.height, 256
        pair = Image.new("RGB", (2 * size[0], size[1]))
        for left, picture in ((0, self.person), (size[0], self.cloth)):
            pair.paste(ImageOps.pad(shown(picture), size, Image.Resampling.BICUBIC, "white"), (left, 0))
        return pair


class Page:
    """The page of one pipeline: its components, column by column, and what its buttons do.

    Args:
        pipe, note: as for `build_page`.
        examples: those to choose from, below the columns.
    """

    def __init__(self, pipe: StableDiffusionVTONPipeline, examples: list[Example], note: str):
        self.studio = Studio(pipe)
        self.files = tempfile.TemporaryDirectory()  # of the examples, which stay
        self.fillings = [example.filling(self.files.name) for example in examples]
        self.example_masks = [digest(example.mask) for example in examples]
        cleanup = (DELETE_EVERY, DELETE_AFTER)
        self.blocks = gr.Blocks(title="Virtual try-on", analytics_enabled=False, delete_cache=cleanup)
        with self.blocks:
            gr.Markdown(f"{TITLE}\n\n{note}", elem_id="title")
            with gr.Row():
                with gr.Column():
                    self.person_part(pipe)
                    with gr.Row():
                        self.cloth_part(pipe)
                    self.buttons()
                with gr.Column():
                    self.result_column()
            self.gallery = gr.Dataset(
                components=[gr.Image(render=False, format="png")],
                samples=[[example.thumbnail()] for example in examples],
                type="index",
                layout="gallery",
                label="Examples",
                visible=bool(examples),
                elem_id="examples",
            )
            gr.Markdown(NOTES.format(minutes=(DELETE_AFTER + DELETE_EVERY) // 60), elem_id="notes")
            self.cache = self.result.GRADIO_CACHE  # whose files are deleted after a while
            self.options = [
                self.cloth_type, self.looseness, self.steps, self.guidance_scale, self.seed, self.height,
            ]  # fmt: skip
            self.connect_buttons()
            self.connect_examples()
            with gr.Row(visible=False):
                self.connect_api()

    # ---- the left column

    def person_part(self, pipe: StableDiffusionVTONPipeline) -> None:
        brush_size = max(1, pipe.resolve_size(4, 3, None, None)[0] // 20)
        self.editor = gr.ImageEditor(
            label="Person",
            type="pil",
            format="png",
            sources=["upload", "webcam", "clipboard"],
            layers=False,
            transforms=(),
            placeholder="# A person\nDrop a photograph, or\nupload or take one",
            brush=gr.Brush(brush_size, colors=[(MASK_COLOR, MASK_ALPHA)], color_mode="fixed"),
            eraser=gr.Eraser(brush_size),
            canvas_size=EMPTY_CANVAS,  # gradio misplaces layers of pictures that are smaller than the canvas was
            height=480,
            elem_id="person",
        )
        gr.Markdown(self.studio.hint, elem_classes="hint")
        with gr.Row(visible=self.studio.proposes_masks):
            self.looseness = gr.Dropdown(LOOSENESS, value="loose", label="Room around the cloth", elem_id="looseness")
            self.propose = gr.Button("Show the mask", elem_id="propose")

    def cloth_part(self, pipe: StableDiffusionVTONPipeline) -> None:
        sources = ["upload", "clipboard", "webcam"]
        self.cloth = photograph(label="Cloth", format="png", sources=sources, height=240, elem_id="cloth")
        with gr.Column(min_width=200):
            self.cloth_type = gr.Radio(CATEGORIES, value="upper", label="Kind of cloth", elem_id="cloth_type")
            with gr.Accordion("More settings", open=False):
                self.steps = gr.Slider(1, MAX_STEPS, value=STEPS, step=1, label="Steps", elem_id="steps")
                own = pipe.config.guidance_scale
                self.guidance_scale = gr.Slider(
                    min(1, own), max(10, own), value=own, step=0.1, label="Guidance: pull of the cloth"
                )
                # no gr.Number: an empty one in a closed accordion is 0 once that is opened
                self.seed = gr.Textbox(label="Seed", placeholder="random", max_lines=1)
                self.height = gr.Dropdown(heights(pipe), value=0, label="Size that the model works at")

    def buttons(self) -> None:
        self.start = gr.Button("Try it on", variant="primary", elem_id="start")
        self.stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop")
        self.stopped = gr.State()  # a `threading.Event` of the visitor's last run
        self.proposed = gr.State()  # the `digest` of the mask that the page painted last
        self.progress = gr.HTML(status("Choose a person and a cloth."), elem_id="status")

    # ---- the right column

    def result_column(self) -> None:
        self.result = gr.ImageSlider(
            label="Before | after", format="png", buttons=["fullscreen"], height=560, elem_id="result"
        )
        with gr.Row():
            self.used_mask = gr.Image(
                label="Mask used",
                format="png",
                height=200,
                interactive=False,
                buttons=["download"],
                elem_id="used_mask",
            )
            with gr.Column(min_width=160):
                self.download = gr.DownloadButton("Download", interactive=False, elem_id="download")
                self.summary = gr.Markdown(elem_id="summary")

    # ---- what the buttons do

    def page_try_on(
        self, stopped, editor, cloth, cloth_type, looseness, steps, guidance_scale, seed, height
    ) -> Iterator[dict[Component, Any]]:
        if stopped.is_set():  # while it waited: the visitor may be at the next run
            return
        try:
            person, mask = read_editor(editor)
            settings = Settings(cloth_type, looseness, steps, guidance_scale, read_seed(seed), height or None)
            yield {self.progress: status("Reading the pictures", 0, steps)}
            with errors_in_words():
                before, before_file = shown(person), None
            for at in self.studio.try_on(person, open_picture(cloth, "cloth"), mask, settings):
                if stopped.is_set():
                    yield {self.result: None, self.progress: status("Stopped.")}
                    return
                # written when it is shown: gradio deletes what it was given, and that alone
                before_file = before_file or save_picture(before, "before", self.cache)
                if at.finished:
                    break
                after = save_picture(at.picture.resize(before.size), f"step-{at.done}", self.cache)
                yield {
                    self.result: (before_file, after),
                    self.progress: status(f"Step {at.done} of {steps}", at.done, steps),
                }
            file = save_result(at, self.cache)
            size = f"{at.picture.width} x {at.picture.height} pixels"
            yield {
                self.result: (before_file, save_picture(shown(at.picture), "after", self.cache)),
                self.used_mask: save_picture(at.mask, "mask", self.cache) if at.mask else None,
                self.download: gr.DownloadButton(value=file, interactive=True),
                self.summary: f"Seed {at.seed}, {steps} steps, {at.seconds:.1f} s, {size}",
                self.progress: status("Done."),
                **self.idle(),
            }
        except gr.Error as error:
            yield {self.progress: status(error.message, failed=True), **self.idle()}

    def page_mask(self, editor, cloth_type, looseness) -> tuple[Any, Any, str]:
        try:
            person, _ = read_editor(editor)
            mask = self.studio.predict_mask(person, cloth_type, looseness)
            filled = save_editor(person, mask, self.cache)
            return filled, digest(mask), status("This is the mask: paint or erase, then try the cloth on.")
        except gr.Error as error:
            return gr.skip(), gr.skip(), status(error.message, failed=True)

    def page_follow(self, editor, cloth_type, looseness, proposed) -> tuple[Any, Any, Any]:
        """Another kind of cloth wants another mask: the page paints its own anew, and leaves the visitor's."""
        try:
            _, mask = read_editor(editor)
        except gr.Error:
            mask = None  # there is no person yet
        if mask is None or not self.studio.proposes_masks:
            return gr.skip(), gr.skip(), gr.skip()
        if digest(mask) != proposed:
            kept = "The mask stays as you painted it: Show the mask paints the one for this choice over it."
            return gr.skip(), gr.skip(), status(kept)
        return self.page_mask(editor, cloth_type, looseness)

    def idle(self) -> dict[Component, Any]:
        return {self.start: gr.Button(visible=True), self.stop: gr.Button(visible=False)}

    def page_failed(self) -> dict[Component, Any]:
        """For what the page has no words for: gradio shows its own beside them, such as that too many wait."""
        return {self.progress: status(FAILED, failed=True), **self.idle()}

    def page_begin(self) -> dict[Component, Any]:
        """Nothing of the last run stays beside the next."""
        return {
            self.stopped: threading.Event(),
            self.result: None,
            self.used_mask: None,
            self.download: gr.DownloadButton(value=None, interactive=False),
            self.summary: "",
            self.start: gr.Button(visible=False),
            self.stop: gr.Button(visible=True),
        }

    def page_stop(self, stopped) -> dict[Component, Any]:
        """A run ends at its next step, one that waits when it is its turn; gradio's own `cancels` closes the stream on which
        the visitor's next run is told of."""
        stopped.set()
        return {self.progress: status("Stopped."), **self.idle()}

    def connect_buttons(self) -> None:
        buttons, quietly = [self.start, self.stop], {"queue": False, "api_visibility": "private"}
        shown = [self.result, self.used_mask, self.download, self.summary]
        run = self.start.click(self.page_begin, None, [self.stopped, *shown, *buttons], **quietly).then(
            self.page_try_on,
            [self.stopped, self.editor, self.cloth, *self.options],
            [*shown, self.progress, *buttons],
            show_progress_on=self.progress,
            trigger_mode="multiple",  # the next run, while a stopped one still waits
            api_visibility="private",
            **ONE_AT_A_TIME,
        )
        run.failure(self.page_failed, None, [self.progress, *buttons], **quietly)
        self.stop.click(self.page_stop, self.stopped, [self.progress, *buttons], **quietly)
        asked = [self.editor, self.cloth_type, self.looseness]
        painted = [self.editor, self.proposed, self.progress]
        beside = {"show_progress_on": self.progress, "api_visibility": "private"}  # on the editor it would stay there
        self.propose.click(self.page_mask, asked, painted, **beside)
        for choice in (self.cloth_type, self.looseness):
            choice.input(self.page_follow, [*asked, self.proposed], painted, **beside)

    def connect_examples(self) -> None:
        usual = [component.value for component in self.options[1:]]  # all but the kind of cloth
        # An empty canvas takes the new picture's size, and so does its layer; it wants a moment to be empty.
        cleared = self.gallery.click(
            lambda editor: None if editor and editor["background"] else gr.skip(),
            self.editor,
            self.editor,
            queue=False,
            api_visibility="private",
        )
        cleared.then(
            lambda index: (*self.fillings[index], *usual, self.example_masks[index]),
            self.gallery,
            [self.editor, self.cloth, *self.options, self.proposed],
            js="async (index) => { await new Promise(done => setTimeout(done, 300)); return index; }",
            queue=False,
            api_visibility="private",
        )

    # ---- the API, whose functions' names and arguments are seen from outside

    def tryon(
        self,
        person,
        cloth,
        mask=None,
        cloth_type=None,
        looseness=None,
        steps=None,
        guidance_scale=None,
        seed=None,
        height=None,
    ) -> tuple[str, str | None, int]:
        """Put a cloth on a person; returns the result's file, the mask used and the seed."""
        settings = Settings(cloth_type, looseness, steps, guidance_scale, seed, height or None)
        pictures = open_picture(person, "person"), open_picture(cloth, "cloth")
        mask = None if mask is None else open_picture(mask, "mask")
        *_, at = self.studio.try_on(*pictures, mask, settings)
        mask = save_picture(at.mask, "mask", self.cache) if at.mask else None
        return save_result(at, self.cache), mask, at.seed

    def mask(self, person, cloth_type, looseness) -> str:
        """Where a cloth of this kind may change the person: a mask in the person's size."""
        mask = self.studio.predict_mask(open_picture(person, "person"), cloth_type, looseness)
        return save_picture(mask, "mask", self.cache)

    def connect_api(self) -> None:
        """Components that nobody sees: what /tryon and /mask take in the editor's place, and return."""
        person, mask = photograph(), photograph()
        used_mask, result = gr.Image(format="png"), gr.File()
        seed = gr.Number(label="Seed", precision=0, minimum=0, maximum=SEEDS - 1)
        gr.Button().click(
            self.tryon,
            [person, self.cloth, mask, *(seed if option is self.seed else option for option in self.options)],
            [result, used_mask, seed],
            api_name="tryon",
            **ONE_AT_A_TIME,
        )
        asked = [person, self.cloth_type, self.looseness]
        gr.Button().click(self.mask, asked, used_mask, api_name="mask")


def build_page(pipe: StableDiffusionVTONPipeline, examples: Path | None = None, note: str = "") -> gr.Blocks:
    """The page of one pipeline.

    Args:
        pipe: with a `human_parser` the page proposes masks; without one they are painted; a mask-free one needs none.
        examples: a folder of folders that `Example.read` reads; None shows none.
        note: a line for below the title.
    """
    found = [Example.read(folder) for folder in sorted(examples.glob("*-*"))] if examples else []
    return Page(pipe, found, note).blocks.queue(max_size=MAX_QUEUE)


def launch(page: gr.Blocks, **options) -> tuple:
    """Serve the page; gradio's `launch` options are taken too."""
    sans = ("Source Sans Pro", "system-ui", "sans-serif")  # gradio serves it: no other host is asked for a font
    return page.launch(
        theme=gr.themes.Soft(primary_hue="pink", font=sans),
        css=CSS,
        footer_links=["api", "gradio"],
        run_history=False,
        enable_monitoring=False,
        max_file_size=MAX_FILE_SIZE,
        state_session_capacity=2 * MAX_QUEUE,  # a visitor's buttons; the default keeps those of ten thousand
        **options,
    )


# ------------------------------------------------------------------------------------------------------------ the Space


SPACE_CARD = """---
title: Virtual try-on
emoji: 👕
colorFrom: pink
colorTo: indigo
sdk: gradio
sdk_version: {gradio}
python_version: "3.12"
app_file: app.py
license: apache-2.0
tags:
  - virtual-try-on
---

# Virtual try-on

As it is, this Space runs the demo model, which knows drawn people only. In its settings, the variables `VTON_MODEL`,
`VTON_ADAPTER` and `VTON_HUMAN_PARSER` name other weights, and `HF_TOKEN` as a secret reads private ones; `app.py` says more.
"""
SPACE_FILES = ("app.py", "pipeline_vton.py", "demo/model", "demo/examples", "LICENSE")


def write_space(folder: Path) -> None:
    """Write what a Space needs into a new or empty folder, whole or not at all."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"`--write_space` must name a new or an empty folder, got {folder}, which has files")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        space = Path(temporary) / "space"
        for name in SPACE_FILES:
            source, target = ROOT / name, space / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target)
            else:
                shutil.copy(source, target)
        needed = (ROOT / "requirements.txt").read_text(encoding="utf-8")
        needed = needed.replace("torch>=2.8", "torch>=2.8,<2.12")  # all that ZeroGPU has
        (space / "requirements.txt").write_text(needed, encoding="utf-8")
        (space / "README.md").write_text(SPACE_CARD.format(gradio=gr.__version__), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        space.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write_space", type=Path, metavar="DIR", help="write a Space's folder, and do not serve")
    args = parser.parse_args()
    if args.write_space is not None:
        try:
            return write_space(args.write_space)
        except ValueError as error:
            sys.exit(f"app.py: {error}")
    demo = serves_demo()
    examples = os.environ.get("VTON_EXAMPLES") or (DEMO_EXAMPLES if demo else None)
    try:
        page = build_page(load_from_environment(), examples and Path(examples), DEMO_NOTE if demo else "")
    except (OSError, ValueError) as error:
        sys.exit(
            f"app.py: VTON_MODEL, VTON_ADAPTER, VTON_HUMAN_PARSER or VTON_EXAMPLES names what cannot be loaded: {error}"
        )
    launch(page)


if __name__ == "__main__":
    main()
