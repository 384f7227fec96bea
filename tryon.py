#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with the
# License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
"""Try cloths on people: pictures in, pictures out.

  python tryon.py --person person.jpg --cloth cloth.jpg --output result.png
  python tryon.py --person people/ --cloth cloths/ --output results/                    every cloth on every person
  python tryon.py --person people/ --cloth cloths/ --pairs list.txt --output results/   the pairs of a list
  python tryon.py --person people/ --cloth cloths/ --one_each --output results/         each person in one other cloth
  accelerate launch --num_processes 4 tryon.py ...                                      the same on four GPUs

A result has its person's size, colour profile and file format, and in its EXIF how it was made; outside the mask it is the person's
picture (JPEG and WebP lose a little). What is there already is passed over, so that a run that was stopped goes on, and refused
where it was made otherwise. A file that cannot be used is named at the end, the exit status is then 1, and all else is done.
Without --model the demo's is used, which knows drawn people only.
"""

import argparse
import itertools
import json
import mimetypes
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import ExifTags, Image, ImageDraw, ImageOps
from tqdm import tqdm

from pipeline_vton import (
    FAST_STEPS,
    GENERATED,
    LOOSENESS,
    REPAINTED,
    UNREADABLE,
    PreparedCloth,
    PreparedPerson,
    StableDiffusionVTONPipeline,
    as_image,
    is_scheduler,
    load_pipeline,
    whole_file,
)
from train_vton import NAMES_A_PAIR, NOT_NEGATIVE, POSITIVE_COUNT, SEED, path, read_lines


DEMO_MODEL = Path(__file__).resolve().parent / "demo" / "model"
SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
WRITTEN = {".png": {}, ".jpg": {"quality": 95, "subsampling": 0}, ".webp": {"quality": 95}, ".tif": {}, ".bmp": {}}
WRITTEN |= {".jpeg": WRITTEN[".jpg"], ".tiff": WRITTEN[".tif"]}
CLOTHS_KEPT = 8  # encoded, with keys and values: in float16 35 MB each for SD1.5 at 512x384, 138 MB at 1024x768
TOLD = (  # of a result, where they are given: what changes it
    "model", "adapter", "adapter_subfolder", "human_parser", "scheduler", "looseness", "steps", "fast", "prompt",
    "guidance_scale", "seed", "height", "width",
)  # fmt: skip
SHEET_PAIRS, SHEET_HEIGHT = 48, 256
SHEET_LARGEST = (2 * SHEET_HEIGHT, SHEET_HEIGHT)  # of a picture


@dataclass(frozen=True)
class Pair:
    person: Path
    cloth: Path
    mask: Path | None
    output: Path
    cloth_type: tuple[str, ...]
    pose: Path | None = None


# --------------------------------------------------------------------------------------------------------------- pairs


def shown_files(folder: Path) -> Iterator[Path]:
    """The files of a folder that are not hidden: a Mac leaves a ._NAME.jpg beside every NAME.jpg."""
    return (file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))


def passed_over(args: argparse.Namespace) -> Iterator[str]:
    """A sentence for every folder with files of other kinds, which may be photographs: a telephone's HEIC."""
    for flag, place in (("--person", args.person), ("--cloth", args.cloth)):
        if args.pairs is None and place.is_dir():
            others = sorted(file.name for file in shown_files(place) if file.suffix.lower() not in SUFFIXES)
            if others:
                names = ", ".join(others[:3]) + (f", ... ({len(others)} in all)" if others[3:] else "")
                yield f"{flag} {place}: passed over, of kinds that cannot be read here: {names}"


def pictures_in(place: Path, flag: str) -> list[Path]:
    """A file, or the pictures of a folder by name."""
    if place.is_dir():
        files = sorted(file for file in shown_files(place) if file.suffix.lower() in SUFFIXES)
        if not files:
            raise FileNotFoundError(f"{flag}: there are no pictures in {place} of a kind that can be read")
        return files
    if not place.is_file():
        raise FileNotFoundError(f"{flag}: there is no {place}")
    return [place]


def find_beside(place: Path | None, person: Path, *others: str) -> Path | None:
    """The mask or the pose of a person: the file given, or the one in a folder of the person's name or of an other one."""
    if place is None or place.is_file():
        return place
    endings = [case(suffix) for case in (str.lower, str.upper) for suffix in sorted(SUFFIXES)]
    names = [stem + ending for stem in (person.stem, *others) for ending in endings]
    return next((place / name for name in names if (place / name).is_file()), place / f"{person.stem}.png")


def pair_of(args: argparse.Namespace, person: Path, cloth: Path, kind: str | None, output: Path) -> Pair:
    mask = find_beside(args.mask, person, f"{person.stem}_mask")
    pose = find_beside(args.pose, person, f"{person.stem}_rendered", re.sub("_0$", "_5", person.stem))
    return Pair(person, cloth, mask, output, tuple(args.cloth_type) if kind is None else (kind,), pose)


def one_each(people: list[Path], cloths: list[Path], seed: int) -> list[tuple[Path, Path]]:
    """Every person in a cloth that has not their name, all cloths in turn; drawn by the seed."""
    drawn, pairs = [cloths[i] for i in np.random.default_rng(seed).permutation(len(cloths))], []
    for i, person in enumerate(people):
        in_turn = [(i + later) % len(drawn) for later in range(len(drawn))]
        other = next((place for place in in_turn if drawn[place].stem != person.stem), None)
        if other is None:
            raise ValueError(f"--one_each: there is no cloth for {person} but their own, {drawn[0]}")
        drawn[in_turn[0]], drawn[other] = drawn[other], drawn[in_turn[0]]
        pairs.append((person, drawn[in_turn[0]]))
    return pairs


def named_pairs(args: argparse.Namespace) -> list[tuple[Path, Path, str | None]]:
    """Those of --pairs, whose files are there, and the cloths' kinds where lines name them."""
    for flag, place in (("--person", args.person), ("--cloth", args.cloth)):
        if not place.is_dir():
            raise ValueError(f"--pairs {args.pairs} names files in folders: {flag} must be one, got {place}")
    pairs = []
    for words, where in read_lines(args.pairs):
        kind = words.pop() if len(words) == 3 and words[2] in REPAINTED else None
        if len(words) != 2:
            raise ValueError(
                f"--pairs {where}: {NAMES_A_PAIR}, and after them, if anything, {', '.join(REPAINTED)}, got {' '.join(words)!r}"
            )
        files = args.person / words[0], args.cloth / words[1]
        if (missing := next((file for file in files if not file.is_file()), None)) is not None:
            raise ValueError(f"--pairs {where}: there is no {missing}")
        pairs.append((*files, kind))
    if not pairs:
        raise ValueError(f"--pairs {args.pairs} names no pairs")
    return pairs


def check_beside(args: argparse.Namespace, people: int) -> None:
    """ValueError where one file would be the mask, or the pose, of several persons."""
    for flag, place in (("--mask", args.mask), ("--pose", args.pose)):
        if place is not None and place.is_file() and people > 1:
            raise ValueError(f"{flag} {place} is one person's, and there are {people}: give a folder with theirs")


def find_pairs(args: argparse.Namespace) -> list[Pair]:
    """All that is asked for; a few cloths at a time, and of those person by person, so that little is encoded again."""
    if args.pairs is not None:
        pairs = named_pairs(args)
    else:
        people, cloths = pictures_in(args.person, "--person"), pictures_in(args.cloth, "--cloth")
        every = [(person, cloth) for person in people for cloth in cloths]
        pairs = [(*pair, None) for pair in (one_each(people, cloths, args.seed) if args.one_each else every)]
    check_beside(args, len({person for person, *_ in pairs}))
    one = args.pairs is None and args.person.is_file() and args.cloth.is_file()
    suffix, is_folder = args.output.suffix.lower(), args.output.is_dir()
    is_picture = suffix in SUFFIXES or (mimetypes.guess_type(args.output.name)[0] or "").startswith("image/")  # a HEIC
    if one and suffix in WRITTEN and not is_folder:
        return [pair_of(args, *pairs[0], args.output)]
    if args.output.is_file() or (is_picture and not is_folder):
        rule = f"be a folder, or end in {', '.join(WRITTEN)}" if one else "be a folder"
        raise ValueError(f"--output must {rule}, got {args.output}")
    ends = {person: person.suffix if person.suffix.lower() in WRITTEN else ".png" for person, *_ in pairs}
    found: dict[Path, Pair] = {}
    for person, cloth, kind in dict.fromkeys(pairs):
        name = person.stem if args.one_each else f"{person.stem}__{cloth.stem}"
        output = args.output / f"{name}{ends[person]}"
        if output in found:
            other, remedy = found[output], "name a person once" if args.one_each else "rename one"
            raise ValueError(
                f"{person} with {cloth} and {other.person} with {other.cloth} would both be written to {output}: {remedy}"
            )
        found[output] = pair_of(args, person, cloth, kind, output)
    cloths = {cloth: i // CLOTHS_KEPT for i, cloth in enumerate(dict.fromkeys(pair.cloth for pair in found.values()))}
    people = {person: i for i, person in enumerate(dict.fromkeys(pair.person for pair in found.values()))}
    return sorted(found.values(), key=lambda pair: (cloths[pair.cloth], people[pair.person], pair.cloth_type))


def check_outputs(pairs: list[Pair], args: argparse.Namespace) -> None:
    """ValueError where a result, or the sheet, would take the place of a picture that it is made of."""
    used = {file.resolve(): file for pair in pairs for file in (pair.person, pair.cloth, pair.mask, pair.pose) if file}
    written = [("--output", pair.output) for pair in pairs] + [("--contact_sheet", args.contact_sheet)]
    for flag, file in written:
        if file is not None and (same := used.get(file.resolve())) is not None:
            raise ValueError(f"{flag} {file} is a picture that is tried on itself, {same}: write elsewhere")


def told_of(pair: Pair, args: argparse.Namespace) -> str:
    """How a result is made, for its EXIF: names of files without their folders, and the flags that change it."""
    files = {name: getattr(pair, name) for name in ("person", "cloth", "mask", "pose")}
    told = {name: file and file.name for name, file in files.items()} | {"cloth_type": list(pair.cloth_type)}
    told |= {flag: getattr(args, flag) for flag in TOLD}
    for flag in ("model", "adapter", "human_parser"):
        if told[flag] is not None and Path(told[flag]).exists():
            told[flag] = Path(told[flag]).resolve().name
    return json.dumps({what: value for what, value in told.items() if value is not None and value is not False})


def check_made(pairs: list[Pair], args: argparse.Namespace) -> None:
    """ValueError where a result that is there says that it was made otherwise; of what is no result nothing is known."""
    for pair in pairs:
        if args.overwrite or not pair.output.exists():
            continue
        try:
            with Image.open(pair.output) as result:  # without its pixels
                exif = result.getexif()
        except UNREADABLE:
            continue
        if exif.get(ExifTags.Base.Software) != GENERATED:
            continue
        try:
            was = dict(json.loads(exif.get(ExifTags.Base.ImageDescription, "")))
        except (TypeError, ValueError):  # somebody wrote something else there
            continue
        now = json.loads(told_of(pair, args))
        if was != now:
            changed = [what for what in was | now if was.get(what) != now.get(what)]
            shown = ", ".join(f"{what} was {was.get(what)} and is {now.get(what)}" for what in changed)
            raise ValueError(
                f"{pair.output} is there already and was made otherwise ({shown}): --overwrite makes it anew"
            )


def check_folders(files: list[Path]) -> None:
    """OSError where the folder of a file that is to be written cannot be made or written to; nothing is left there."""
    for folder in dict.fromkeys(file.parent for file in files):
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        try:
            with TemporaryFile(dir=there):
                pass
        except OSError as error:
            raise OSError(f"{folder} cannot be written to: {error.strerror}") from error


# ------------------------------------------------------------------------------------------------------------ pictures


def open_picture(file: Path) -> Image.Image:
    try:
        with Image.open(file) as picture:
            picture.load()
            return picture
    except UNREADABLE as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def is_drawn(person: Image.Image) -> bool:
    """Whether neighbouring pixels are often the same, white ones aside, as in the demo's world and not in photographs."""
    small = np.asarray(as_image(person, "person").resize((96, 128), Image.Resampling.LANCZOS))
    coloured = (small[:, 1:] < 250).any(axis=-1)
    same = (small[:, 1:] == small[:, :-1]).all(axis=-1)
    return (same & coloured).sum() > 0.25 * max(1, coloured.sum())


def save_picture(picture: Image.Image, file: Path, told: str | None = None) -> None:
    """Write a picture, never half of it. The colour profile goes along, and in EXIF what is `told` of it."""
    kind = Image.registered_extensions()[file.suffix.lower()]
    profile = picture.info.get("icc_profile")
    options = WRITTEN[file.suffix.lower()] | ({} if profile is None else {"icc_profile": profile})
    if told is not None:
        options["exif"] = Image.Exif()
        options["exif"].update({ExifTags.Base.Software: GENERATED, ExifTags.Base.ImageDescription: told})
    with whole_file(file) as temporary:
        picture.save(temporary, format=kind, **options)


def contact_sheet(pairs: list[Pair]) -> Image.Image:
    """Person, cloth and result of the first pairs, two to a line."""
    rows = []
    for pair in pairs[:SHEET_PAIRS]:
        shown = [as_image(open_picture(file), "picture") for file in (pair.person, pair.cloth, pair.output)]
        rows.append([ImageOps.contain(one, SHEET_LARGEST, Image.Resampling.LANCZOS) for one in shown])
    column = max(sum(picture.width for picture in row) for row in rows) + 40
    sheet = Image.new("RGB", (min(2, len(rows)) * column, (len(rows) + 1) // 2 * (SHEET_HEIGHT + 30) + 10), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (pair, row) in enumerate(zip(pairs, rows)):
        x, y = i % 2 * column + 10, i // 2 * (SHEET_HEIGHT + 30) + 24
        draw.text((x, y - 16), f"{pair.person.stem}, {pair.cloth.stem}", fill="black")
        for picture in row:
            sheet.paste(picture, (x, y))
            x += picture.width + 10
    return sheet


# ----------------------------------------------------------------------------------------------------------------- run


class TryOn:
    """Tries pairs on in batches, encodes every file once while it is needed, and remembers what could not be used."""

    def __init__(self, pipe: StableDiffusionVTONPipeline, args: argparse.Namespace) -> None:
        self.pipe, self.args = pipe, args
        steps = {} if args.steps is None else {"num_inference_steps": args.steps}
        self.sampling = pipe.fast(**steps) if args.fast else steps
        pipe.check_settings(args.height, args.width, self.sampling.get("num_inference_steps"))
        if args.batch_size > 1:
            pipe.vae.enable_slicing()  # a decoder's activations are larger than all that a batch else needs
        self.person = lru_cache(1)(self.prepare_person)
        self.cloth = lru_cache(CLOTHS_KEPT)(self.prepare_cloth)
        self.failures: dict[str, None] = {}  # sentences, in order and once each
        self.bad: set[tuple] = set()  # persons with masks, and cloths with the colour profiles that they were to have

    def prepare_person(
        self, file: Path, mask: Path | None, cloth_type: tuple[str, ...], pose: Path | None
    ) -> PreparedPerson:
        args, picture, kinds = self.args, open_picture(file), list(cloth_type)
        if mask is not None:
            drawn = open_picture(mask)
        elif self.pipe.human_parser is None or self.pipe.config.mask_free:
            drawn = None
        else:
            drawn = self.pipe.predict_mask(picture, kinds, args.looseness)
        skeleton = None if pose is None else open_picture(pose)
        return self.pipe.prepare_person(picture, drawn, kinds, args.height, args.width, pose_image=skeleton)

    def prepare_cloth(self, file: Path, height: int, width: int, profile: bytes | None) -> PreparedCloth:
        return self.pipe.prepare_cloth(open_picture(file), height, width, profile)

    def attempt(self, key: tuple, prepare: Callable, *arguments: Any) -> Any:
        """What `prepare` makes; None where it cannot, which is named once by the files of the `key`."""
        if key in self.bad:
            return None
        try:
            return prepare(*arguments)
        except (ValueError, TypeError) as error:
            self.bad.add(key)
            files = " with ".join(str(file) for file in key if isinstance(file, Path))
            self.failures[str(error) if str(key[0]) in str(error) else f"{files}: {error}"] = None
            return None

    def batches(self, pairs: list[Pair], bar: tqdm) -> Iterator[list[tuple[Pair, PreparedPerson, PreparedCloth]]]:
        """Pairs that can be tried on together: of one size, at most `--batch_size`."""
        batch: list[tuple[Pair, PreparedPerson, PreparedCloth]] = []
        for pair in pairs:
            given = pair.person, pair.mask, pair.cloth_type
            person = self.attempt(given, self.person, *given, pair.pose)
            cloth = None
            if person is not None:
                size = (person.height, person.width)
                cloth = self.attempt((pair.cloth, person.profile), self.cloth, pair.cloth, *size, person.profile)
            if cloth is None:
                bar.update()
                continue
            full = len(batch) == self.args.batch_size
            if batch and (full or size != (batch[0][1].height, batch[0][1].width)):
                yield batch
                batch = []
            batch.append((pair, person, cloth))
        if batch:
            yield batch

    def results(self, batch: list[tuple[Pair, PreparedPerson, PreparedCloth]]) -> list[Image.Image | None]:
        """What the model makes of a batch; where it fails, of each alone, and nothing of the one that is the cause."""
        listed, persons, cloths = (list(each) for each in zip(*batch))
        try:
            made = self.pipe(
                persons,
                cloths,
                prompt=self.args.prompt,
                guidance_scale=self.args.guidance_scale,
                **self.sampling,
                generator=[torch.Generator().manual_seed(self.args.seed) for _ in batch],
            )
        except ValueError as error:
            if len(batch) > 1:
                return [result for one in batch for result in self.results([one])]
            self.failures[f"{listed[0].output}: {error}"] = None
            return [None]
        blackened = made.nsfw_content_detected or [False] * len(batch)
        for pair in itertools.compress(listed, blackened):
            self.failures[f"{pair.output}: the model's safety checker blackened the picture"] = None
        return [None if black else image for image, black in zip(made.images, blackened)]

    def __call__(self, pairs: list[Pair], bar: tqdm) -> None:
        """A batch's pictures are written while the next is made: to compress 24 megapixels takes seconds. Where one cannot be
        written, as on a full disk, nothing more is made.
        """

        def write(batch: list[tuple[Pair, PreparedPerson, PreparedCloth]], results: list[Image.Image | None]) -> None:
            for (pair, *_), result in zip(batch, results):
                if result is not None:
                    save_picture(result, pair.output, told_of(pair, self.args))

        with ThreadPoolExecutor(1) as writer:
            written = None
            try:
                for batch in self.batches(pairs, bar):
                    results = self.results(batch)
                    if written is not None:
                        written.result()  # no more than one batch waits in memory
                    written = writer.submit(write, batch, results)
                    bar.update(len(batch))
                if written is not None:
                    written.result()
            except OSError as error:
                self.failures[f"stopped, since a result could not be written: {error}"] = None


def warn_of_photographs(pairs: list[Pair]) -> None:
    for person in dict.fromkeys(pair.person for pair in pairs):
        try:
            drawn = is_drawn(open_picture(person))
        except ValueError:
            continue  # it is named at the end
        if not drawn:
            print(
                f"{person} looks like a photograph, and the demo's model knows drawn people only: name a model that was trained on "
                "photographs with --model and --adapter",
                file=sys.stderr,
            )
            return


# --------------------------------------------------------------------------------------------------------------- flags


def add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("pictures").add_argument
    add("--person", type=path, required=True, metavar="PATH", help="a photograph, or a folder of them")
    add("--cloth", type=path, required=True, metavar="PATH", help="a picture of a cloth, or a folder of them")
    add("--pairs", type=path, metavar="FILE", help=f"lines of a person's and a cloth's file name in those folders, with their endings, and where it is not --cloth_type's, the cloth's kind ({', '.join(REPAINTED)})")  # fmt: skip
    add("--output", type=path, required=True, metavar="PATH", help="a file for one pair, else a folder: PERSON__CLOTH.EXT, with --one_each PERSON.EXT")  # fmt: skip
    add("--one_each", action="store_true", help="name results after their persons, in one cloth each: of --pairs, else one that is drawn and has another name; what `train_vton.py --mask_free` trains on")  # fmt: skip
    add("--mask", type=path, metavar="PATH", help="white where to repaint: a file, or a folder with the persons' names (default: drawn by the human parser, or none if the adapter is mask-free)")  # fmt: skip
    add("--pose", type=path, metavar="PATH", help="skeletons or the like, for an adapter that reads poses: a file, or a folder with the persons' names")  # fmt: skip
    add("--overwrite", action="store_true", help="make results anew that are there already")
    add("--contact_sheet", type=path, metavar="FILE", help=f"persons, cloths and results of the first {SHEET_PAIRS} pairs on one picture")  # fmt: skip


def device(text: str) -> torch.device:
    """A `type` for argparse: a device that is there."""
    try:
        tensor = torch.zeros(1, device=text)
        tensor.item()  # which has no value on the meta device
        return tensor.device
    except (RuntimeError, AssertionError) as error:  # no such name or no such device; no device of its kind
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"must be a device of this machine, got {text}: {reason}") from error


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model", default=str(DEMO_MODEL), metavar="NAME", help="the base: a folder or a Hub repository (default: the demo's)")  # fmt: skip
    add("--adapter", metavar="NAME", help="folder, file or Hub repository for load_vton_adapter (default: the one in the model's folder, if there is one)")  # fmt: skip
    add("--adapter_subfolder", metavar="NAME", help="where in there, such as CatVTON's mix-48k-1024/attention")
    add("--human_parser", metavar="NAME", help="folder or Hub repository for load_human_parser (default: the model's own)")  # fmt: skip
    add("--scheduler", metavar="CLASS", help="a scheduler of diffusers (default: the adapter's, or the model's)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="default: float16 on a GPU, else float32")
    add("--device", type=device, help="such as cuda:1 or cpu (default: a GPU where there is one; not with accelerate launch)")  # fmt: skip


def add_call_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("try-on").add_argument
    add("--cloth_type", nargs="+", choices=tuple(REPAINTED), default=["upper"], help="what is repainted (default upper)")  # fmt: skip
    add("--looseness", choices=LOOSENESS, default="loose", help="how far a drawn mask goes beyond the worn cloth (default loose)")  # fmt: skip
    add("--steps", type=POSITIVE_COUNT, metavar="N", help=f"denoising steps (default 50; with --fast {FAST_STEPS})")
    add("--fast", action="store_true", help="few ancestral Euler steps, three quarters of them guided, as pipe.fast() has them")  # fmt: skip
    add("--prompt", metavar="TEXT", help="for an adapter that reads text (default: its own)")
    add("--guidance_scale", type=NOT_NEGATIVE, metavar="X", help="default: the adapter's own")
    add("--seed", type=SEED, default=0, metavar="N", help="of the noise, the same for every pair (default 0)")
    add("--height", type=POSITIVE_COUNT, metavar="N", help="size to work at (default: the person's aspect at the adapter's area)")  # fmt: skip
    add("--width", type=POSITIVE_COUNT, metavar="N", help="likewise")
    add("--batch_size", type=POSITIVE_COUNT, default=1, metavar="N", help="pairs at a time (default 1)")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_picture_arguments(parser)
    add_model_arguments(parser)
    add_call_arguments(parser)
    args = parser.parse_args(input_args)
    if args.scheduler is not None and not is_scheduler(args.scheduler):
        parser.error(f"--scheduler must be the name of a diffusers scheduler, got {args.scheduler}")
    if args.fast and args.scheduler is not None:
        parser.error(f"--fast has a sampler of its own: leave out --scheduler, got {args.scheduler}")
    if args.contact_sheet is not None and args.contact_sheet.suffix.lower() not in WRITTEN:
        parser.error(f"--contact_sheet must end in {', '.join(WRITTEN)}, got {args.contact_sheet}")
    for flag in ("pairs", "mask", "pose"):
        place = getattr(args, flag)
        if place is not None and not place.exists():
            parser.error(f"--{flag}: there is no {place}")
    return args


def load(args: argparse.Namespace, device: str | torch.device) -> StableDiffusionVTONPipeline:
    """The pipeline that was named.

    Raises:
        OSError, ValueError: a name is none of a model, weights do not fit, or the model lacks what the pictures need.
    """
    dtype = args.dtype and getattr(torch, args.dtype)
    names = (args.model, args.adapter, args.human_parser, args.scheduler, dtype, device, args.adapter_subfolder)
    pipe = load_pipeline(*names)
    if args.mask is None and pipe.human_parser is None and not pipe.config.mask_free:
        raise ValueError("this model has no human parser: give --human_parser, or --mask")
    if args.pose is not None and pipe.config.pose == "none":
        raise ValueError("this model's adapter has learnt without poses: leave out --pose")
    if args.prompt is not None and pipe.config.cross_attention != "prompt":
        raise ValueError(f"this model's adapter reads no text: leave out --prompt {args.prompt}")
    return pipe


def main(args: argparse.Namespace) -> int:
    """The exit status."""
    patience = timedelta(hours=12)  # for whoever has the longer share
    state = PartialState(cpu=args.device == torch.device("cpu"), timeout=patience)
    try:
        pairs = find_pairs(args)
        check_outputs(pairs, args)
        check_made(pairs, args)
        missing = [pair for pair in pairs if args.overwrite or not pair.output.exists()]
        check_folders([pair.output for pair in missing] + ([args.contact_sheet] if args.contact_sheet else []))
    except (OSError, ValueError) as error:
        print(f"tryon.py: {error}", file=sys.stderr)
        return 2
    state.wait_for_everyone()  # all have looked before the first is made
    for sentence in passed_over(args) if state.is_main_process else ():
        print(sentence, file=sys.stderr)
    if len(missing) < len(pairs) and state.is_main_process:
        print(
            f"{len(pairs) - len(missing)} of {len(pairs)} are there already (--overwrite makes them anew)",
            file=sys.stderr,
        )
    failures: list[str] = []
    if missing:
        if Path(args.model).resolve() == DEMO_MODEL and state.is_main_process:
            warn_of_photographs(missing)
        try:
            try_on = TryOn(load(args, args.device or state.device), args)
        except (OSError, ValueError) as error:  # diffusers' are of several lines, and every process has its own
            if state.is_main_process:
                print(f"tryon.py: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        try_on.pipe.set_progress_bar_config(disable=len(missing) > 1 or not state.is_main_process)
        with (
            state.split_between_processes(missing) as own,
            tqdm(
                total=len(own), desc="try-ons", unit="pair", disable=len(missing) == 1 or not state.is_main_process
            ) as bar,
        ):
            try_on(own, bar)
        failures = gather_object(list(try_on.failures))
    done = [pair for pair in pairs if pair.output.exists()]
    if state.is_main_process:
        if args.contact_sheet and done:
            try:
                save_picture(contact_sheet(done), args.contact_sheet)
            except (OSError, ValueError) as error:
                failures.append(f"--contact_sheet {args.contact_sheet}: {error}")
        for failure in dict.fromkeys(failures):
            print(failure, file=sys.stderr)
        print(f"{len(done)} of {len(pairs)} try-ons are in {args.output}")
    return int(bool(failures))


if __name__ == "__main__":
    try:
        sys.exit(main(parse_args()))
    except KeyboardInterrupt:
        sys.exit("stopped: the same command goes on, without --overwrite")
