"""evaluate_vton.py on a tiny base and a tiny tree: figures against the libraries' own, and against each other."""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import PIL
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from accelerate import debug_launcher
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import patch_environment
from huggingface_hub import ModelCard
from PIL import Image, ImageFilter
from test_settings import save_lora
from tiny import ROOT, box_mask, picture, tiny_parser, tiny_pipe, with_odd_exif
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.kid import KernelInceptionDistance

from demo import measure
from demo.make_dataset import make_dataset
from demo.recognition import ATTRIBUTES, load_classifier, recognize
from demo.try_on import draw_lines
from demo.world import CATEGORIES
from evaluate_vton import (
    Features,
    Inception,
    Line,
    RowSource,
    Scorer,
    StreamedRows,
    bootstrap,
    clean_resize,
    compare,
    decibels,
    find_duplicates,
    fingerprint,
    frechet_distance,
    kernel_distance,
    load_lpips,
    load_recognizer,
    main,
    metric_library,
    parse_args,
    seed_of,
    squared_error,
    ssim,
)
from pipeline_vton import StableDiffusionVTONPipeline, as_tensors, load_pipeline, resize
from train_vton import DRESS_CODE_FOLDERS


pytestmark = pytest.mark.usefixtures("fresh_accelerate")
COUNT, HEIGHT, WIDTH = 5, 64, 48  # of the persons; they are worked at 32x24


UNPAIRED = {"setting": "unpaired", "metrics": ["psnr", "fid"]}


class Colors(torch.nn.Module):
    """Features of a picture: its mean colours in four quarters, (N, 12)."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(pictures.double() / 255, 2).flatten(1)


def save(image: Image.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """VITON-HD's layout, with a true picture for every unpaired line."""
    root = tmp_path_factory.mktemp("tree")
    for i in range(COUNT):
        other = (i + 2) % COUNT
        save(picture(i, HEIGHT, WIDTH), root / f"test/image/{i:02d}.png")
        save(picture(100 + i, HEIGHT, WIDTH), root / f"test/cloth/{i:02d}.png")
        save(box_mask(HEIGHT, WIDTH), root / f"test/agnostic-mask/{i:02d}_mask.png")
        save(picture(200 + i, HEIGHT, WIDTH), root / f"test/tryon/{i:02d}__{other:02d}.png")
    lines = "".join(f"{i:02d}.png {(i + 2) % COUNT:02d}.png\n" for i in range(COUNT))
    (root / "test_pairs.txt").write_text(lines)
    return root


@pytest.fixture
def own_tree(tree, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tree, tmp_path / "tree"))


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A base with an adapter beside it."""
    folder = tmp_path_factory.mktemp("model")
    tiny_pipe(guidance_scale=1.5, height=32, width=24).save_pretrained(folder)
    return folder


def flags(out: Path, tree: Path | None, model: Path | None = None, setting: str = "both", **changed) -> list[str]:
    """The command line of a short run; True is a flag without a value, None leaves one out."""
    options = {
        "output_dir": out,
        "dataset_root": tree,
        "model": model,
        "adapter": model,
        "setting": setting,
        "num_inference_steps": 2,
        "metrics": ["ssim", "psnr", "fid", "kid"],
    } | changed
    line = []
    for name, value in options.items():
        if value is not None:
            values = [] if value is True else value if isinstance(value, list) else [value]
            line += [f"--{name}", *map(str, values)]
    return line


def evaluate(out: Path, *where, **changed) -> dict:
    """The report of a run."""
    main(parse_args(flags(out, *where, **changed)), Colors())
    return json.loads((out / "report.json").read_text())


def fails(out: Path, *where, **changed) -> list[dict[str, str]]:
    """The failures of a run without figures."""
    with pytest.raises(SystemExit, match="lines failed"):
        evaluate(out, *where, **changed)
    report = json.loads((out / "report.json").read_text())
    assert report["figures"] == [] and report["failures"][0]["error"] in (out / "report.md").read_text()
    return report["failures"]


def figure(
    report: dict, setting: str, compositing: str, metric: str, region: str = "picture", group: str = "all"
) -> dict:
    wanted = {"setting": setting, "compositing": compositing, "metric": metric, "region": region, "group": group}
    (found,) = [row for row in report["figures"] if wanted.items() <= row.items()]
    return found


def results(out: Path) -> dict[str, np.ndarray]:
    return {str(file.relative_to(out)): np.asarray(Image.open(file)) for file in sorted(out.glob("seed-*/**/*.png"))}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """Whether the first run's pictures are the second's, pixel by pixel."""
    return bool(one) and all(np.array_equal(one[name], other[name]) for name in one)


def assert_close(one: dict, other: dict) -> None:
    """Equal figures, of the settings and metrics of the first report."""
    chosen = {(row["setting"], row["metric"]) for row in one["figures"]}
    twins = [row for row in other["figures"] if (row["setting"], row["metric"]) in chosen]
    assert chosen
    for row, twin in zip(one["figures"], twins, strict=True):
        assert row["group"] == twin["group"]
        for name in ("value", "low", "high", "deviation"):
            assert row[name] == pytest.approx(twin[name], abs=1e-6), row


@pytest.fixture(scope="session")
def finished(tree, model, tmp_path_factory) -> tuple[Path, dict]:
    """The output folder and the report of a whole run."""
    out = tmp_path_factory.mktemp("finished")
    with patch_environment(ACCELERATE_USE_CPU="true"):
        report = evaluate(out, tree, model)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    return out, report


# ------------------------------------------------------------------------------------------------------------ measures


def pooled_psnr(results, truths, mask=None):
    """As a report pools it: the error of all values of all pictures."""
    error, count = np.sum([squared_error(*pair, mask) for pair in zip(results, truths)], axis=0)
    return float(decibels(error / count))


def test_measures_are_torchmetrics_own():
    one, other = (torch.stack([as_tensors(picture(i), "p")[0] for i in some]) for some in ((1, 2, 3), (4, 5, 6)))
    similar = [ssim(*pair) for pair in zip(one, other)]
    direct = structural_similarity_index_measure(one.double(), other.double(), data_range=1.0, reduction="none")
    assert similar == pytest.approx(direct.tolist(), abs=1e-6)
    psnr = peak_signal_noise_ratio(one, other, data_range=1.0).item()
    assert pooled_psnr(one, other) == pytest.approx(psnr, abs=1e-5)
    box = torch.zeros(1, 32, 24)
    box[:, 8:20, 4:16] = 1
    inside = peak_signal_noise_ratio(one[..., 8:20, 4:16], other[..., 8:20, 4:16], data_range=1.0).item()
    assert pooled_psnr(one, other, box) == pytest.approx(inside, abs=1e-5)
    changed = torch.where(box.bool(), one[0], 1 - one[0])  # far from the mask's inside nothing matters
    box[:] = 0
    box[:, 14, 10] = 1
    assert ssim(one[0], changed, box) > 0.999 > 0.9 > ssim(one[0], changed)


def test_a_flat_picture_is_equal_to_itself():
    flat = torch.full((3, 32, 24), 0.7)
    assert ssim(flat, flat) == pytest.approx(1, abs=1e-9) and pooled_psnr([flat], [flat]) == math.inf


def test_bootstrap():
    values = np.random.default_rng(0).normal(5, 2, 400)
    found = bootstrap(values)
    assert found.value == pytest.approx(values.mean()) and found == bootstrap(values) != bootstrap(values, seed=1)
    half = 1.96 * values.std() / 20  # of the normal distribution's 95 %
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.03)
    pooled = bootstrap([0.0, 2.0], [100, 100], decibels)
    assert pooled.value == pytest.approx(20) and pooled.high == math.inf  # resamples of the perfect one alone
    with pytest.raises(ValueError, match="at least one, got shapes"):
        bootstrap([])


def test_set_distances_are_scipys_and_torchmetrics():
    real, fake = (torch.from_numpy(np.random.default_rng(i).normal(i / 4, 1 + i / 3, (60, 8))) for i in (0, 1))
    means, covariances = [x.numpy().mean(axis=0) for x in (real, fake)], [np.cov(x.numpy().T) for x in (real, fake)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    formula = np.square(means[0] - means[1]).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(real, fake) == pytest.approx(formula, abs=1e-6)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-6)

    state = torch.get_rng_state()
    found = kernel_distance(real, fake, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert found == kernel_distance(real, fake, seed=3) != kernel_distance(real, fake, seed=4)
    torch.manual_seed(3)
    direct = KernelInceptionDistance(Features(8), subset_size=30)  # half of them
    direct.update(real, real=True)
    direct.update(fake, real=False)
    assert found == pytest.approx([value.item() for value in direct.compute()], abs=1e-6)


def test_clean_resize_is_pils_on_floats():
    """As clean-fid has it: PIL's bicubic filter on every channel as floats, clamped and not rounded."""
    array = np.asarray(picture(1, 90, 70).resize((350, 450), Image.Resampling.NEAREST))
    channels = [Image.fromarray(array[..., i].astype(np.float32)) for i in range(3)]
    expected = np.stack([np.asarray(c.resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255) for c in channels])
    found = clean_resize(torch.from_numpy(array).movedim(-1, 0)[None].float(), (299, 299))[0].numpy()
    assert np.abs(found - expected).max() < 1e-3


def test_a_missing_library_is_named_with_the_remedy():
    with pytest.raises(ImportError, match="needs no_such: pip install -r requirements-eval.txt"):
        metric_library("no_such.library")


# -------------------------------------------------------------------------------------------------------------- a run


def test_the_report_is_what_the_pictures_say(finished, tree, model):
    out, report = finished
    for setting, truth in (("paired", "image/{0:02d}"), ("unpaired", "tryon/{0:02d}__{1:02d}")):
        pairs = [(i, i if setting == "paired" else (i + 2) % COUNT) for i in range(COUNT)]
        truths = [Image.open(tree / f"test/{truth.format(*pair)}.png") for pair in pairs]
        for compositing in ("composited", "bare"):
            names = [out / f"seed-0/{setting}/{compositing}/{i:02d}__{j:02d}.png" for i, j in pairs]
            shown, true = (
                torch.stack([as_tensors(p.resize((24, 32), Image.Resampling.LANCZOS), "p")[0] for p in pictures])
                for pictures in (map(Image.open, names), truths)
            )
            psnr = peak_signal_noise_ratio(shown, true, data_range=1.0)
            similar = structural_similarity_index_measure(shown.double(), true.double(), data_range=1.0)
            assert figure(report, setting, compositing, "psnr")["value"] == pytest.approx(psnr.item(), abs=1e-5)
            assert figure(report, setting, compositing, "ssim")["value"] == pytest.approx(similar.item(), abs=1e-6)
            real, fake = (Colors()((x * 255).round().to(torch.uint8)) for x in (persons(tree), shown))
            fid = frechet_distance(real, fake)
            assert figure(report, setting, compositing, "fid")["value"] == pytest.approx(fid, abs=1e-6)
            kid = figure(report, setting, compositing, "kid")
            assert (kid["value"], kid["deviation"]) == pytest.approx([1000 * x for x in kernel_distance(real, fake)])
    pipe = StableDiffusionVTONPipeline.from_pretrained(model)
    pipe.load_vton_adapter(model)
    weights = [*pipe.unet.state_dict().values(), *pipe.vae.state_dict().values()]
    assert report["made"]["weights"] == fingerprint(weights)
    assert report["made"]["seeds"] == [0] and report["made"]["revision"] is None
    assert report["cost"]["seconds_a_picture"] > 0 and 0.1 < report["cost"]["peak_memory_gib"] < 100
    assert report["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert report["versions"]["pillow"] == PIL.__version__
    text = (out / "report.md").read_text()
    shown = figure(report, "paired", "composited", "ssim")
    assert f"{shown['value']:.4f} [{shown['low']:.4f}, {shown['high']:.4f}]" in text and "FID (clean)" in text
    for name in ("sheet_paired.png", "sheet_unpaired.png", "distributions.png"):
        assert f"({name})" in text and Image.open(out / name).width > 300


def persons(tree: Path) -> torch.Tensor:
    files = sorted((tree / "test/image").iterdir())
    shrunk = [Image.open(file).resize((24, 32), Image.Resampling.LANCZOS) for file in files]
    return torch.stack([as_tensors(p, "p")[0] for p in shrunk])


def test_composited_pictures_are_the_pipelines(finished, tree, model):
    """Pixel by pixel what a call with the line's seed returns."""
    out, _ = finished
    pipe = StableDiffusionVTONPipeline.from_pretrained(model)
    pipe.load_vton_adapter(model)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(seed_of(0, Line("unpaired", "01.png", "03.png")))
    pictures = [Image.open(tree / f"test/{name}.png") for name in ("image/01", "cloth/03", "agnostic-mask/01_mask")]
    expected = pipe(*pictures, height=32, width=24, num_inference_steps=2, generator=noise).images[0]
    found = Image.open(out / "seed-0/unpaired/composited/01__03.png")
    assert found.size == (WIDTH, HEIGHT) and np.array_equal(np.asarray(found), np.asarray(expected))


def test_the_fast_recipe_is_evaluated_as_it_is(tree, model, tmp_path):
    chosen = {"num_samples": 1, "metrics": ["psnr"], "fast": True, "num_inference_steps": 4}
    report = evaluate(tmp_path / "out", tree, model, "unpaired", **chosen)
    assert_close(evaluate(tmp_path / "out", tree, model, "unpaired", **chosen), report)  # which goes on
    (found,) = (tmp_path / "out/seed-0/unpaired/composited").iterdir()
    pipe = StableDiffusionVTONPipeline.from_pretrained(model)
    pipe.load_vton_adapter(model)
    pipe.set_progress_bar_config(disable=True)
    names = [f"{name}.png" for name in found.stem.split("__")]
    noise = torch.Generator().manual_seed(seed_of(0, Line("unpaired", *names)))
    pictures = [Image.open(tree / f"test/{place}") for place in (f"image/{names[0]}", f"cloth/{names[1]}")]
    mask = Image.open(tree / f"test/agnostic-mask/{Path(names[0]).stem}_mask.png")
    expected = pipe(*pictures, mask, height=32, width=24, generator=noise, **pipe.fast(4)).images[0]
    assert np.array_equal(Image.open(found), expected)
    said = json.dumps(report)
    assert '"EulerAncestralDiscreteScheduler"' in said and '"guidance_interval": [0.0, 0.75]' in said


@pytest.mark.parametrize("named", ["folder", "file"])
def test_a_lora_is_an_adapter(finished, tree, model, tmp_path, named):
    """What a call with the LoRA makes, and not what the model makes without it."""
    file = save_lora(tmp_path / "lora", guidance_scale=1.2)
    chosen = {"num_samples": 1, "metrics": ["psnr"]}
    evaluate(tmp_path / "out", tree, model, "unpaired", adapter=file if named == "file" else file.parent, **chosen)
    (found,) = (tmp_path / "out/seed-0/unpaired/composited").iterdir()
    pipe = StableDiffusionVTONPipeline.from_pretrained(model)
    pipe.load_lora_weights(file.parent)
    pipe.set_progress_bar_config(disable=True)
    names = [f"{name}.png" for name in found.stem.split("__")]
    noise = torch.Generator().manual_seed(seed_of(0, Line("unpaired", *names)))
    pictures = [Image.open(tree / f"test/{place}") for place in (f"image/{names[0]}", f"cloth/{names[1]}")]
    mask = Image.open(tree / f"test/agnostic-mask/{Path(names[0]).stem}_mask.png")
    expected = pipe(*pictures, mask, height=32, width=24, num_inference_steps=2, generator=noise).images[0]
    assert pipe.config.guidance_scale == 1.2 and np.array_equal(Image.open(found), expected)
    without = Image.open(finished[0] / "seed-0/unpaired/composited" / found.name)
    assert not np.array_equal(Image.open(found), without)


def test_a_lora_is_not_published_with_figures(tree, model, tmp_path):
    file = save_lora(tmp_path / "lora", guidance_scale=1.2)
    with pytest.raises(ValueError, match=f"--push_to_hub .* not LoRAs such as {file}"):
        evaluate(tmp_path / "out", tree, model, "unpaired", adapter=file, push_to_hub="me/figures", metrics=["psnr"])


def test_a_stream_is_begun_again_for_rows_that_are_no_longer_held():
    begun = []

    class Stream:
        def __iter__(self):
            begun.append(None)
            return iter(range(100, 110))

        def take(self, count):
            return list(self)[:count]

    rows = StreamedRows(Stream(), None, 4)
    assert [rows[i] for i in (0, 1, 3, 2, 0, 9, 6, 7)] == [100, 101, 103, 102, 100, 109, 106, 107] and len(begun) == 2
    assert rows[1] == 101 and len(begun) == 3
    assert len(StreamedRows(Stream(), 4, 4)) == 5  # the last line's cloth is the next row's


def test_every_line_has_a_seed_of_its_own():
    """The same everywhere: frozen pictures can be made again."""
    lines = [Line(setting, person, cloth) for setting in ("paired", "unpaired") for person in "ab" for cloth in "ab"]
    seeds = [seed_of(seed, line) for seed in (0, 1) for line in lines]
    assert len(set(seeds)) == 16 and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(0, Line("paired", "00001_00.jpg", "00001_00.jpg")) == 3289143412287145030


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_change_nothing(finished, tree, model, tmp_path, batch_size):
    out, report = finished
    assert_close(evaluate(tmp_path, tree, model, "unpaired", batch_size=batch_size), report)
    assert same(results(tmp_path), results(out))


def test_two_processes_change_nothing(finished, tree, model, tmp_path):
    out, report = finished
    debug_launcher(
        evaluate, (tmp_path, tree, model, "unpaired"), num_processes=2
    )  # what accelerate launch starts, forked
    two = json.loads((tmp_path / "report.json").read_text())
    assert two["cost"]["processes"] == 2 and len(results(tmp_path)) == 2 * COUNT
    assert same(results(tmp_path), results(out))
    assert_close(two, report)


def test_a_killed_run_goes_on(finished, tree, model, tmp_path):
    """Of a run that was killed there are whole pictures and a temporary one; only what is missing is made."""
    out, report = finished
    begun = tmp_path / "begun"
    shutil.copytree(out, begun)
    gone = begun / "seed-0/unpaired/composited/03__00.png"
    gone.with_name(f".{gone.name}.123").write_bytes(gone.read_bytes()[:100])
    gone.unlink()
    kept = begun / "seed-0/unpaired/bare/01__03.png"
    before = kept.stat().st_mtime_ns
    assert_close(evaluate(begun, tree, model, **UNPAIRED), report)
    assert same(results(begun), results(out)) and kept.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="pictures of another run: num_inference_steps was 2 and is 3"):
        evaluate(begun, tree, model, num_inference_steps=3)
    changed = Path(shutil.copytree(model, tmp_path / "model"))  # the same weights, with another setting
    pipe = load_pipeline(changed)
    pipe.register_to_config(eta=0.5)
    pipe.save_pretrained(changed)
    (begun / "pictures.json").write_text((begun / "pictures.json").read_text().replace(str(model), str(changed)))
    with pytest.raises(ValueError, match="pictures of another run: settings was"):
        evaluate(begun, tree, changed, **UNPAIRED)


def test_seeds_spread(finished, tree, model, tmp_path):
    out, one = finished
    report = evaluate(tmp_path, tree, model, seeds=2, setting="paired", metrics=["psnr", "fid"])
    assert same({name: shown for name, shown in results(tmp_path).items() if "seed-0" in name}, results(out))
    for metric in ("psnr", "fid"):
        found = figure(report, "paired", "bare", metric)
        assert found["per_seed"][0] == pytest.approx(figure(one, "paired", "bare", metric)["value"])
        assert found["per_seed"][1] != found["per_seed"][0]
        assert found["spread"] == pytest.approx(np.std(found["per_seed"], ddof=1))
    assert "(seeds ± " in (tmp_path / "report.md").read_text()


# ------------------------------------------------------------------------------------------- predictions and failures


def predict(tree: Path, folder: Path, end: str = ".png", **options) -> Path:
    """The truth of every unpaired line as another model's picture of it."""
    folder.mkdir()
    for file in (tree / "test/tryon").iterdir():
        Image.open(file).save(folder / f"{file.stem}{end}", **options)
    return folder


PREDICTED = {"setting": "unpaired", "metrics": ["psnr"]}


def test_a_perfect_prediction(own_tree, tmp_path):
    """The truths are the persons here, so that FID's real pictures are the predictions too."""
    for i in range(COUNT):
        shutil.copy(own_tree / f"test/image/{i:02d}.png", own_tree / f"test/tryon/{i:02d}__{(i + 2) % COUNT:02d}.png")
    pictures = predict(own_tree, tmp_path / "pictures")
    report = evaluate(tmp_path / "out", own_tree, pred_dir=pictures, setting="unpaired")
    for compositing in ("composited", "bare"):
        for region in ("picture", "mask"):
            similar, psnr = (figure(report, "unpaired", compositing, name, region) for name in ("ssim", "psnr"))
            assert similar["value"] == similar["low"] == pytest.approx(1, abs=1e-9)
            assert psnr["value"] == psnr["low"] == psnr["high"] == "inf"
        assert figure(report, "unpaired", compositing, "fid")["value"] == pytest.approx(0, abs=1e-3)
    assert "| inf [inf, inf] | inf [inf, inf] |" in (tmp_path / "out/report.md").read_text()

    lossy = predict(own_tree, tmp_path / "lossy", ".jpg", quality=75)  # which a lossy truth would make of it
    report = evaluate(tmp_path / "lossy_out", own_tree, pred_dir=lossy, setting="unpaired", metrics=["ssim", "psnr"])
    assert figure(report, "unpaired", "bare", "ssim")["value"] < 0.999
    assert figure(report, "unpaired", "bare", "psnr")["value"] < 45
    assert report["made"]["files"] == ".jpg"


def test_predictions_are_pasted_as_ours(finished, tree, tmp_path):
    """The bare results of a run, named by their persons, as another model's."""
    out, report = finished
    (tmp_path / "pictures").mkdir()
    for file in (out / "seed-0/unpaired/bare").iterdir():
        shutil.copy(file, tmp_path / f"pictures/{file.name[:2]}.png")
    again = evaluate(
        tmp_path / "out", tree, pred_dir=tmp_path / "pictures", **PREDICTED, eval_height=32, eval_width=24
    )
    bare, ours = ([row for row in r["figures"] if row["compositing"] == "bare"] for r in (again, report))
    assert_close({"figures": bare}, {"figures": ours})
    pasted, whole = (figure(r, "unpaired", "composited", "psnr")["value"] for r in (again, report))
    assert pasted == pytest.approx(whole, abs=0.01)  # ours were pasted before they were rounded to bytes


def test_composited_predictions_must_be_the_persons_outside_the_mask(finished, tree, tmp_path):
    out, report = finished
    pictures = tmp_path / "pictures"
    shutil.copytree(out / "seed-0/unpaired/composited", pictures)
    options = PREDICTED | {"eval_height": 32, "eval_width": 24, "pred_composited": True}
    again = evaluate(tmp_path / "out", tree, pred_dir=pictures, **options)
    assert again["protocol"]["compositing"] == "composited"
    assert_close(again, {"figures": [row for row in report["figures"] if row["compositing"] == "composited"]})
    touched = Image.open(pictures / "02__04.png")
    touched.putpixel((1, 1), tuple(255 - value for value in touched.getpixel((1, 1))))
    touched.save(pictures / "02__04.png")
    Image.open(pictures / "03__00.png").resize((24, 32)).save(pictures / "03__00.png")
    failures = fails(tmp_path / "again", tree, pred_dir=pictures, **options)
    assert [failure["line"] for failure in failures] == ["unpaired 02.png 04.png", "unpaired 03.png 00.png"]
    assert failures[0]["error"] == "1 pixels outside the mask are not the person's"
    assert "has size (24, 32), its person (48, 64)" in failures[1]["error"]


def test_what_cannot_be_read_leaves_no_figures(own_tree, model, tmp_path):
    """Every such line is listed; one that can be read does not make a smaller set."""
    file = own_tree / "test/cloth/00.png"  # of the first line too
    file.write_bytes(file.read_bytes()[:200])
    failures = fails(tmp_path / "out", own_tree, model, setting="both", metrics=["psnr"], seeds=2)
    assert sorted(failure["line"] for failure in failures) == ["paired 00.png 00.png", "unpaired 03.png 00.png"]
    assert all("cloth/00.png` must be a whole picture" in failure["error"] for failure in failures)
    assert "No figures: 2 of 10 lines failed" in (tmp_path / "out/report.md").read_text()

    save(picture(100, HEIGHT, WIDTH), file)  # mended, the run goes on
    made = own_tree.parent / "out/seed-0/paired/bare/02__02.png"
    before = made.stat().st_mtime_ns
    assert (
        figure(evaluate(tmp_path / "out", own_tree, model, metrics=["psnr"]), "paired", "bare", "psnr")["count"]
        == COUNT
    )
    assert made.stat().st_mtime_ns == before


@pytest.mark.parametrize("what", ["missing", "unreadable", "stretched", "truth is the cloth", "empty mask"])
def test_predictions_that_fail(own_tree, tmp_path, what):
    pictures = predict(own_tree, tmp_path / "pictures")
    spoilt = pictures / "02__04.png"
    if what == "missing":
        spoilt.unlink()
    elif what == "unreadable":
        spoilt.write_bytes(spoilt.read_bytes()[:200])
    elif what == "stretched":
        Image.open(spoilt).resize((48, 48)).save(spoilt)
    elif what == "truth is the cloth":
        shutil.copy(own_tree / "test/cloth/04.png", own_tree / "test/tryon/02__04.png")
    else:
        Image.new("L", (WIDTH, HEIGHT)).save(own_tree / "test/agnostic-mask/02_mask.png")
    (failure,) = fails(tmp_path / "out", own_tree, pred_dir=pictures, **PREDICTED)
    said = {
        "missing": "no picture named 02__04 or 02 (unpaired)",
        "unreadable": "got one that cannot be read",
        "stretched": "02__04.png has size (48, 48), not (48, 64)",
        "truth is the cloth": "the truth and the cloth are the same picture",
        "empty mask": "mask that is black everywhere",
    }
    assert failure["line"] == "unpaired 02.png 04.png" and said[what] in failure["error"]


def test_a_working_size_of_another_aspect_is_stretched_back(tree, model, tmp_path):
    """Sides are multiples of the VAE's, so most photographs are stretched to work on them; figures are of the photograph's aspect."""
    options = {"height": 32, "width": 32, "metrics": ["psnr"], "num_samples": 1}
    report = evaluate(tmp_path / "out", tree, model, "paired", **options)
    assert report["protocol"]["size"] == "32x24"
    (bare,) = (tmp_path / "out/seed-0/paired/bare").iterdir()
    assert Image.open(bare).size == (32, 32)
    result, truth = (
        as_tensors(Image.open(file), "picture")[0] for file in (bare, tree / f"test/image/{bare.name[:2]}.png")
    )
    error = (resize(result, 32, 24) - resize(truth, 32, 24)).square().mean().item()
    assert figure(report, "paired", "bare", "psnr")["value"] == pytest.approx(-10 * np.log10(error), abs=1e-4)


def test_a_size_that_would_stretch_the_truth_is_refused_before_anything_is_made(tree, model, tmp_path):
    with pytest.raises(ValueError, match="the first person of 48x64 pixels would be stretched to 32x32"):
        evaluate(tmp_path / "out", tree, model, eval_height=32, eval_width=32)
    assert not (tmp_path / "out/seed-0").exists()


def test_predictions_of_both_settings_may_lie_in_one_folder(tree, tmp_path):
    pictures = predict(tree, tmp_path / "pictures")
    for i in range(COUNT):
        save(picture(300 + i), pictures / f"{i:02d}__{i:02d}.png")
    report = evaluate(tmp_path / "out", tree, pred_dir=pictures, **PREDICTED | {"setting": "both"})
    assert {row["setting"] for row in report["figures"]} == {"paired", "unpaired"}
    (pictures / "02__02.png").rename(pictures / "02.png")  # of which setting?
    with pytest.raises(ValueError, match="hold 10 pictures, 9 of them of the list's 10 lines"):
        evaluate(tmp_path / "again", tree, pred_dir=pictures, **PREDICTED | {"setting": "both"})


def test_predictions_of_another_list_are_refused(tree, tmp_path):
    pictures = predict(tree, tmp_path / "pictures")
    save(picture(9), pictures / "09__01.png")
    with pytest.raises(ValueError, match="hold 6 pictures, 5 of them of the list's 5 lines"):
        evaluate(tmp_path / "out", tree, pred_dir=pictures, **PREDICTED)
    with pytest.raises(ValueError, match="is the dataset's own truth"):
        evaluate(tmp_path / "out", tree, pred_dir=tree / "test/tryon", **PREDICTED)


# ---------------------------------------------------------------------------------------------------- lists and readers


def test_a_frozen_list_needs_no_other(finished, own_tree, tmp_path):
    """What was evaluated is evaluated again, whatever has become of the tree's lists; another list has another hash."""
    pictures, _ = predict(own_tree, tmp_path / "pictures"), finished
    first = evaluate(tmp_path / "one", own_tree, pred_dir=pictures, **PREDICTED)
    lines = (tmp_path / "one/list.txt").read_text()
    assert lines.splitlines()[1] == "unpaired\t01.png\t03.png"
    (own_tree / "test_pairs.txt").write_text("00.png 01.png\n")
    again = evaluate(tmp_path / "two", own_tree, pred_dir=pictures, list=tmp_path / "one/list.txt", **PREDICTED)
    assert again["protocol"] == first["protocol"]
    assert_close(again, first)
    shuffled = tmp_path / "shuffled.txt"
    shuffled.write_text("".join(reversed(lines.splitlines(keepends=True))))
    other = evaluate(tmp_path / "three", own_tree, pred_dir=pictures, list=shuffled, **PREDICTED)
    assert other["protocol"]["list"] != first["protocol"]["list"]
    shuffled.write_text("01.png 03.png\n")
    with pytest.raises(
        ValueError, match="shuffled.txt, line 1: must be paired or unpaired, a person and a cloth with tabs"
    ):
        evaluate(tmp_path / "four", own_tree, pred_dir=pictures, list=shuffled, **PREDICTED)


def test_a_frozen_list_is_not_cut_short(tree, model, tmp_path):
    evaluate(tmp_path / "out", tree, model, "unpaired", metrics=["psnr"])
    lines, again = (tmp_path / "out/list.txt").read_text(), {"list": tmp_path / "out/list.txt", "metrics": ["psnr"]}
    with pytest.raises(ValueError, match="--list .*out/list.txt would be overwritten with 2 of its lines"):
        evaluate(tmp_path / "out", tree, model, "unpaired", num_samples=2, **again)
    assert (tmp_path / "out/list.txt").read_text() == lines
    evaluate(tmp_path / "out", tree, model, "unpaired", **again)


def test_a_frozen_list_is_measured_whole(model, tmp_path):
    """Lines of a folder that a tree has not are missing, and not a smaller denominator."""
    for folder in ("upper_body", "dresses"):
        for i in range(COUNT):
            save(picture(i, HEIGHT, WIDTH), tmp_path / f"dc/{folder}/images/{i:02d}_0.png")
            save(picture(100 + i, HEIGHT, WIDTH), tmp_path / f"dc/{folder}/images/{i:02d}_1.png")
            save(box_mask(HEIGHT, WIDTH), tmp_path / f"dc/{folder}/agnostic_masks/{i:02d}_0.png")
        names = "".join(f"{i:02d}_0.png\t{(i + 2) % COUNT:02d}_1.png\n" for i in range(COUNT))
        (tmp_path / f"dc/{folder}/test_pairs_unpaired.txt").write_text(names)
    options = {"setting": "unpaired", "metrics": ["fid"], "list": tmp_path / "list.txt"}
    evaluate(tmp_path / "whole", tmp_path / "dc", model, **options | {"list": None})
    shutil.copy(tmp_path / "whole/list.txt", tmp_path / "list.txt")
    assert len((tmp_path / "list.txt").read_text().splitlines()) == 2 * COUNT
    shutil.rmtree(tmp_path / "dc/dresses")
    with pytest.raises(ValueError, match="list.txt, line .*dc has no folder for 'unpaired.tdresses/00_0.png"):
        evaluate(tmp_path / "part", tmp_path / "dc", model, **options)
    assert not (tmp_path / "part").exists()
    report = evaluate(
        tmp_path / "part", tmp_path / "dc", model, category="upper_body", **options
    )  # whoever asks for less
    assert figure(report, "unpaired", "composited", "fid", "picture")["count"] == COUNT


def test_two_lines_with_one_result_are_refused(own_tree, model, tmp_path):
    for colour in ("red", "blue"):
        save(picture(len(colour), HEIGHT, WIDTH), own_tree / f"test/cloth/{colour}/1.png")
    (own_tree / "test_pairs.txt").write_text("00.png red/1.png\n00.png blue/1.png\n")
    with pytest.raises(
        ValueError, match="00.png in red/1.png and 00.png in blue/1.png would both have the result 00__1.png"
    ):
        evaluate(tmp_path / "out", own_tree, model, "unpaired", metrics=["psnr"])


@pytest.mark.parametrize("name", ["../../00.png", "{root}/test/image/00.png"])
def test_results_stay_in_the_output_folder(own_tree, model, tmp_path, name):
    (own_tree / "test_pairs.txt").write_text(f"{name.format(root=own_tree)} 01.png\n")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="--dataset_root: .*00.png leads out of"):
        evaluate(tmp_path / "out", own_tree, model, "unpaired", metrics=["psnr"])
    assert sorted(tmp_path.rglob("*")) == before


def test_too_few_persons_for_distances_are_told_before_anything_is_made(own_tree, model, tmp_path, caplog):
    with pytest.raises(ValueError, match="--metrics fid: FID and KID need 4 persons, got 3"):
        evaluate(tmp_path / "out", own_tree, model, "paired", metrics=["fid"], num_samples=3)
    assert not (tmp_path / "out").exists()
    report = evaluate(tmp_path / "out", own_tree, model, "paired", metrics=["fid", "psnr"], num_samples=3)
    assert {row["metric"] for row in report["figures"]} == {"psnr"}
    assert "FID and KID need 4 persons, got 3: they are left out" in caplog.text


def test_a_photograph_with_odd_exif_is_a_line_as_others_are(own_tree, model, tmp_path):
    (own_tree / "test/cloth/03.png").write_bytes(with_odd_exif(picture(9, WIDTH, HEIGHT)))
    report = evaluate(tmp_path / "out", own_tree, model, "paired", metrics=["psnr"])
    assert figure(report, "paired", "bare", "psnr", "mask")["count"] == COUNT


def test_unpaired_lines_without_truths_need_distances(own_tree, tmp_path):
    pictures = predict(own_tree, tmp_path / "pictures")
    shutil.rmtree(own_tree / "test/tryon")
    with pytest.raises(
        ValueError, match="--metrics psnr need truths, which unpaired lines have none of: add fid or kid"
    ):
        evaluate(tmp_path / "out", own_tree, pred_dir=pictures, **PREDICTED)
    report = evaluate(tmp_path / "out", own_tree, pred_dir=pictures, setting="unpaired", metrics=["psnr", "fid"])
    assert {row["metric"] for row in report["figures"]} == {"fid"}


def test_a_list_that_repeats_a_line_is_refused(own_tree, tmp_path):
    lines = (own_tree / "test_pairs.txt").read_text()
    (own_tree / "test_pairs.txt").write_text(lines + lines.splitlines()[2])
    with pytest.raises(ValueError, match="test_pairs.txt, line 6: 02.png 04.png stands in the list twice"):
        evaluate(tmp_path / "out", own_tree, pred_dir=tmp_path, **PREDICTED)


def test_dress_code_is_pooled_and_by_category(tree, tmp_path):
    root, pictures = tmp_path / "dresses", tmp_path / "pictures"
    for k, category in enumerate(("upper_body", "dresses")):
        for i in range(4):
            save(picture(i + 10 * k, HEIGHT, WIDTH), root / f"{category}/images/{i:06d}_0.png")
            save(picture(i + 300, HEIGHT, WIDTH), root / f"{category}/images/{i:06d}_1.png")
            save(box_mask(HEIGHT, WIDTH), root / f"{category}/agnostic_masks/{i:06d}_0.png")
            save(picture(i + 400 + k, HEIGHT, WIDTH), pictures / f"{category}/{i:06d}_0.png")
        lines = "".join(f"{i:06d}_0.png {i:06d}_1.png\n" for i in range(4))
        (root / category / "test_pairs_paired.txt").write_text(lines)
    options = {"pred_dir": pictures, "setting": "paired", "metrics": ["psnr", "fid"]}
    report = evaluate(tmp_path / "out", root, **options)
    alone = evaluate(tmp_path / "alone", root, category="dresses", **options)
    for metric in ("psnr", "fid"):
        pooled, dresses = (figure(report, "paired", "bare", metric, group=g) for g in ("all", "category: dresses"))
        assert (pooled["count"], dresses["count"]) == (8, 4) and pooled["value"] != dresses["value"]
        assert dresses["value"] == pytest.approx(figure(alone, "paired", "bare", metric)["value"], abs=1e-9)
    assert (
        (tmp_path / "out/list.txt")
        .read_text()
        .startswith("paired\tupper_body/000000_0.png\tupper_body/000000_1.png\n")
    )
    frozen = evaluate(tmp_path / "frozen", root, list=tmp_path / "out/list.txt", **options)
    assert_close(frozen, report)


def test_masks_of_the_parser(own_tree, model, tmp_path):
    """Drawn once for a person, kept, and named with their looseness."""
    shutil.rmtree(own_tree / "test/agnostic-mask")
    network, processor = tiny_parser(["background", "top"], only="top")
    network.save_pretrained(tmp_path / "parser")
    processor.save_pretrained(tmp_path / "parser")
    options = {
        "masks": "parser",
        "human_parser": tmp_path / "parser",
        "looseness": "box",
        "num_samples": 2,
    } | PREDICTED
    report = evaluate(tmp_path / "out", own_tree, model, **options)
    weights = fingerprint(network.state_dict().values())
    assert report["made"]["masks"] == f"{tmp_path / 'parser'} of weights {weights}, box, upper"
    assert [file.name for file in sorted((tmp_path / "out/masks").iterdir())] == ["00.png", "01.png"]
    assert figure(report, "unpaired", "composited", "psnr", "mask")["count"] == 2
    with pytest.raises(ValueError, match="holds no human parser, name one with --human_parser"):
        evaluate(tmp_path / "none", own_tree, model, **options | {"human_parser": None})


def test_mask_free(own_tree, tmp_path):
    """Paired, the person wears another cloth, and comes out in their own; there is no mask to measure in or paste by."""
    folder = tmp_path / "model"
    tiny_pipe(8, mask_free=True, height=32, width=24).save_pretrained(folder)
    with pytest.raises(SystemExit):
        evaluate(tmp_path / "out", own_tree, folder, metrics=["psnr"])
    for i in range(COUNT):
        save(picture(500 + i, HEIGHT, WIDTH), own_tree / f"test/condition/{i:02d}.png")
    report = evaluate(tmp_path / "out", own_tree, folder, metrics=["psnr"])
    assert {(row["setting"], row["compositing"], row["region"]) for row in report["figures"]} == {
        ("paired", "bare", "picture"), ("unpaired", "bare", "picture"),
    }  # fmt: skip
    described = json.loads((tmp_path / "out/pictures.json").read_text())
    described.pop("condition_column")  # as older runs were described
    (tmp_path / "out/pictures.json").write_text(json.dumps(described))
    assert evaluate(tmp_path / "out", own_tree, folder, metrics=["psnr"])["figures"] == report["figures"]
    shutil.copytree(own_tree / "test/condition", own_tree / "test/other")
    with pytest.raises(ValueError, match="holds pictures of another run: condition_column was condition and is other"):
        evaluate(tmp_path / "out", own_tree, folder, metrics=["psnr"], condition_column="other")
    shutil.copy(own_tree / "test/image/02.png", own_tree / "test/condition/02.png")  # not another cloth
    (failure,) = fails(tmp_path / "again", own_tree, folder, "paired", metrics=["psnr"])
    assert failure["error"] == "the truth and the condition are the same picture"


@pytest.mark.parametrize("streaming", [None, True])
def test_rows_are_measured_as_a_tree(finished, tree, model, tmp_path, streaming):
    """Streamed or not; everybody in their own cloth, and in the next row's."""
    names = [f"{i:02d}" for i in range(COUNT)]
    rows = {
        "image": [str(tree / f"test/image/{name}.png") for name in names],
        "cloth": [str(tree / f"test/cloth/{name}.png") for name in names],
        "mask": [str(tree / f"test/agnostic-mask/{name}_mask.png") for name in names],
    }
    kinds = datasets.Features({column: datasets.Image() for column in rows})
    (tmp_path / "rows").mkdir()
    datasets.Dataset.from_dict(rows, kinds).to_parquet(tmp_path / "rows/test.parquet")
    options = {"dataset_name": tmp_path / "rows", "streaming": streaming, "num_samples": 3, "metrics": ["psnr"]}
    report = evaluate(tmp_path / "out", None, model, **options)
    assert (tmp_path / "out/list.txt").read_text().splitlines()[3:] == [
        "unpaired\trow-0\trow-1", "unpaired\trow-1\trow-2", "unpaired\trow-2\trow-3",
    ]  # fmt: skip
    (tree / "three.txt").write_text("".join(f"paired\t{name}.png\t{name}.png\n" for name in names[:3]))
    again = evaluate(tmp_path / "again", tree, pred_dir=renamed(tmp_path / "out/seed-0/paired/bare", tmp_path / "made"), list=tree / "three.txt", setting="paired", metrics=["psnr"], eval_height=32, eval_width=24)  # fmt: skip
    assert figure(again, "paired", "bare", "psnr")["value"] == pytest.approx(
        figure(report, "paired", "bare", "psnr")["value"]
    )


def test_each_row_is_tried_on_with_its_cloths_text(tree, model, tmp_path, monkeypatch):
    names = [f"{i:02d}" for i in range(3)]
    rows = {
        "image": [str(tree / f"test/image/{name}.png") for name in names],
        "cloth": [str(tree / f"test/cloth/{name}.png") for name in names],
        "mask": [str(tree / f"test/agnostic-mask/{name}_mask.png") for name in names],
    }
    kinds = {column: datasets.Image() for column in rows} | {"text": datasets.Value("string")}
    rows["text"] = [f"shirt {name}" for name in names]
    datasets.Dataset.from_dict(rows, datasets.Features(kinds)).to_parquet(tmp_path / "test.parquet")
    reader = tiny_pipe(9, text=True, cross_attention="prompt", height=32, width=24)
    reader.save_pretrained(tmp_path / "reader")
    call, prompts = type(reader).__call__, []

    def calls(*args, **options):
        prompts.append(options["prompt"])
        return call(*args, **options)

    monkeypatch.setattr(type(reader), "__call__", calls)
    options = {"dataset_name": tmp_path, "caption_column": "text", "metrics": ["psnr"]}
    evaluate(tmp_path / "out", None, tmp_path / "reader", **options)
    assert prompts == ["shirt 00", "shirt 01", "shirt 02", "shirt 01", "shirt 02", "shirt 00"]
    with pytest.raises(ValueError, match="--caption_column text: this model's adapter reads no text"):
        evaluate(tmp_path / "other", None, model, **options)


def renamed(rows: Path, folder: Path) -> Path:
    """Results of rows under the names of the tree's persons."""
    folder.mkdir()
    for file in rows.iterdir():
        shutil.copy(file, folder / f"{int(file.name[4]):02d}.png")
    return folder


def test_training_persons_among_the_tested_fail_or_leave(tree, tmp_path):
    train = tmp_path / "train"
    for i in range(4):
        save(picture(50 + i, HEIGHT, WIDTH), train / f"train/image/{i:02d}.jpg")
        save(picture(60 + i, HEIGHT, WIDTH), train / f"train/cloth/{i:02d}.jpg")
    again = picture(3, HEIGHT, WIDTH).resize((96, 128))  # a test person, larger and lossy
    again.save(train / "train/image/02.jpg", quality=80)
    (train / "train_pairs.txt").write_text("".join(f"{i:02d}.jpg {i:02d}.jpg\n" for i in range(4)))
    persons = {file.name: file for file in (tree / "test/image").iterdir()}
    assert find_duplicates(persons, train) == {"03.png": "train/image/02.jpg"}
    options = PREDICTED | {"pred_dir": predict(tree, tmp_path / "pictures"), "train_root": train}
    with pytest.raises(ValueError, match="--train_root holds 1 of the test persons .03.png is train/image/02.jpg"):
        evaluate(tmp_path / "out", tree, **options)
    (tmp_path / "pictures/03__00.png").unlink()
    report = evaluate(tmp_path / "out", tree, drop_duplicates=True, **options)
    assert report["lines"] == COUNT - 1 and report["duplicates"] == {"03.png": "train/image/02.jpg"}
    assert "03.png\t00.png" not in (tmp_path / "out/list.txt").read_text()


# ----------------------------------------------------------------------------------- factors, recognition, comparing


def brightness(pictures: list[Image.Image], masks: list[Image.Image]) -> list[dict[str, str]]:
    """A recognizer, of what the masks show."""
    inside = [np.asarray(shown)[np.asarray(mask) > 127].mean() for shown, mask in zip(pictures, masks, strict=True)]
    return [{"tone": "light" if value > 128 else "dark"} for value in inside]


def test_factors_and_recognition(own_tree, tmp_path):
    pictures = predict(own_tree, tmp_path / "pictures")
    tones = [
        brightness([Image.open(pictures / f"{i:02d}__{(i + 2) % COUNT:02d}.png")], [box_mask(HEIGHT, WIDTH)])[0][
            "tone"
        ]
        for i in range(COUNT)
    ]
    known = []
    for i in range(COUNT):
        row = {"split": "test", "category": "upper", "paired": False, "person": f"{i:02d}.png"}
        row |= {"cloth": f"{(i + 2) % COUNT:02d}.png", "factors": {"pose": "raised" if i < 2 else "down"}}
        tone = "light" if i == 1 else tones[i]
        known.append(json.dumps(row | {"attributes": {"tone": tone, "logo": None}}) + "\n")
    tones[1] = "light"
    (own_tree / "factors.jsonl").write_text("".join(known))
    Image.new("RGB", (WIDTH, HEIGHT)).save(pictures / "01__03.png")  # dark: not what should be recognised
    options = PREDICTED | {"pred_dir": pictures, "recognizer": "test_evaluate:brightness"}
    report = evaluate(tmp_path / "out", own_tree, **options)
    seen = {
        g: figure(report, "unpaired", "bare", "recognition of tone", group=g)
        for g in ("all", "pose: raised", "pose: down")
    }
    assert [(row["value"], row["count"]) for row in seen.values()] == [(0.8, 5), (0.5, 2), (1, 3)]
    raised = figure(report, "unpaired", "bare", "psnr", "mask", "pose: raised")["value"]
    assert raised < 20 and figure(report, "unpaired", "bare", "psnr", "mask", "pose: down")["value"] == "inf"
    assert "| pose: raised | 2 |" in (tmp_path / "out/report.md").read_text()


def test_a_recognizer_gets_masks_of_its_pictures_sizes():
    """The line's, or white everywhere."""
    seen = []

    def recognizer(pictures, masks):
        seen.extend(zip(pictures, masks, strict=True))
        return [{"tone": "light"} for _ in pictures]

    result, truth, mask = picture(1, 32, 24), picture(2, HEIGHT, WIDTH), box_mask(HEIGHT, WIDTH)
    for given in (mask, None):
        values = Scorer((32, 24), (32, 24), ["psnr"], torch.device("cpu"), recognizer=recognizer).values(
            result, truth, given
        )
        assert values["picture", "recognition of tone"] == (1, 1)
    assert [shown for shown, _ in seen] == [result, truth] * 2
    assert np.array_equal(seen[0][1], box_mask(32, 24)) and np.array_equal(seen[1][1], mask)
    assert [(one.size, one.getextrema()) for _, one in seen[2:]] == [((24, 32), (255, 255)), (truth.size, (255, 255))]


def test_the_demos_classifier_is_a_recognizer(tree, tmp_path):
    """Shares of pictures in which it sees what it sees in the truth."""
    folder, others = predict(tree, tmp_path / "pictures"), [picture(300 + i, HEIGHT, WIDTH) for i in range(COUNT)]
    truths = [Image.open(file) for file in sorted(folder.iterdir())]
    masks, classifier = [box_mask(HEIGHT, WIDTH)] * COUNT, load_classifier()
    expected = [recognize(classifier, shown, masks) for shown in (others, truths)]
    for file, other in zip(sorted(folder.iterdir()), others):
        other.save(file)
    options = PREDICTED | {"pred_dir": folder, "recognizer": "demo.recognition:recognize_drawn"}
    report = evaluate(tmp_path / "out", tree, **options)
    for name in ATTRIBUTES:
        share = np.mean([said[name] == true[name] for said, true in zip(*expected)])
        assert figure(report, "unpaired", "bare", f"recognition of {name}")["value"] == pytest.approx(share)


def test_a_drawn_world_is_measured_as_the_demos_own_measures_do(tmp_path, capsys):
    """Unpaired lines of DressCode's layout, pooled and by category: in the mask, at the pictures' own size; and printed."""
    make_dataset(tmp_path / "drawn", train=0, test=6, seed=11, height=128, category="all")
    lines = draw_lines(6, seed=11, height=128)
    for i, file in enumerate(sorted((tmp_path / "drawn").glob("*/tryon/*.png"))):
        blurred = Image.open(file).filter(ImageFilter.GaussianBlur(1 + i))
        save(blurred, tmp_path / "predicted" / file.parent.parent.name / file.name)
    options = PREDICTED | {"metrics": ["psnr", "ssim"], "recognizer": "demo.recognition:recognize_drawn"}
    report = evaluate(tmp_path / "out", tmp_path / "drawn", pred_dir=tmp_path / "predicted", **options)
    assert capsys.readouterr().out.strip() == (tmp_path / "out/report.md").read_text().strip()
    results = []
    for line in lines:
        folder = tmp_path / "drawn" / DRESS_CODE_FOLDERS[CATEGORIES.index(line.category)]
        truths = {file.name: np.asarray(Image.open(file)) for file in (folder / "tryon").iterdir()}
        (name,) = [name for name, truth in truths.items() if np.array_equal(truth, line.truth)]
        results.append(Image.open(tmp_path / "predicted" / folder.name / name))
    own = measure.measure(results, lines, load_classifier())
    for group in ("all", *DRESS_CODE_FOLDERS):
        kinds = CATEGORIES if group == "all" else (CATEGORIES[DRESS_CODE_FOLDERS.index(group)],)
        expected = measure.figures([parts for parts, line in zip(own, lines) if line.category in kinds])
        name = group if group == "all" else f"category: {group}"
        for metric in expected.keys() & {"psnr", "ssim", *ATTRIBUTES}:
            shown = (f"recognition of {metric}",) if metric in ATTRIBUTES else (metric, "mask")
            found = figure(report, "unpaired", "bare", *shown, group=name)
            assert found["value"] == pytest.approx(expected[metric].value, abs=1e-5)


def test_outfits_are_tried_on_whole(model, tmp_path, caplog):
    make_dataset(tmp_path / "drawn", train=0, test=4, seed=11, height=64, category="outfit")
    test = tmp_path / "drawn/test"
    (test / "cloth_2/00001_00.png").unlink()  # who wears no more than a top
    report = evaluate(tmp_path / "out", tmp_path / "drawn", model, "unpaired", num_cloths=2, metrics=["psnr"])
    assert '"num_cloths": 2' in json.dumps(report) and "--num_cloths" not in caplog.text
    pipe = StableDiffusionVTONPipeline.from_pretrained(model)
    pipe.load_vton_adapter(model)
    pipe.set_progress_bar_config(disable=True)
    found = sorted((tmp_path / "out/seed-0/unpaired/composited").iterdir())
    assert len(found) == 4
    for file in found:
        person, cloth = (f"{name}.png" for name in file.stem.split("__"))
        outfit = [test / folder / cloth for folder in ("cloth", "cloth_2")]
        outfit = [Image.open(one) for one in outfit if one.is_file()]
        noise = torch.Generator().manual_seed(seed_of(0, Line("unpaired", person, cloth)))
        pictures = (
            Image.open(test / "image" / person),
            [outfit],
            Image.open(test / "agnostic-mask" / f"{Path(person).stem}_mask.png"),
        )
        expected = pipe(*pictures, height=32, width=24, num_inference_steps=2, generator=noise).images[0]
        assert np.array_equal(Image.open(file), expected)
    evaluate(tmp_path / "tops", tmp_path / "drawn", model, "unpaired", metrics=["psnr"])
    assert "has cloth_2, which --num_cloths 2 would show" in caplog.text


def test_outfits_of_a_table_are_swapped_whole(tmp_path):
    table = {"image": [picture(i) for i in range(3)], "mask": [box_mask()] * 3}
    table |= {"cloth": [picture(i) for i in (3, 4, 5)], "cloth_2": [picture(6), None, picture(8)]}
    datasets.Dataset.from_dict(table, datasets.Features(dict.fromkeys(table, datasets.Image()))).to_parquet(
        tmp_path / "test.parquet"
    )
    args = parse_args(flags(tmp_path / "out", None, "m", dataset_name=str(tmp_path), num_cloths=2))
    source = RowSource(args, dict.fromkeys(("paired", "unpaired"), ["person", "cloth", "cloth_2", "mask"]))
    first = source.pictures(Line("unpaired", "row-0", "row-1"))
    assert "cloth_2" not in first and np.array_equal(first["cloth"], picture(4))
    second = source.pictures(Line("unpaired", "row-1", "row-2"))
    assert np.array_equal(second["cloth_2"], picture(8)) and np.array_equal(second["person"], picture(1))


def test_reports_side_by_side(tree, tmp_path, capsys):
    """Overlapping intervals are marked; reports of different protocols are refused by the name of what differs."""
    truth = predict(tree, tmp_path / "truth")
    for name, noise in (("near", 8), ("nearer", 7), ("far", 120)):
        (tmp_path / name).mkdir()
        for i, file in enumerate(sorted(truth.iterdir())):
            pixels = np.asarray(Image.open(file)) + np.random.default_rng(i).normal(
                0, noise * (1 + i / 4), (HEIGHT, WIDTH, 3)
            )
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / name / file.name)
        evaluate(tmp_path / f"{name}_out", tree, pred_dir=tmp_path / name, **PREDICTED)
    reports = [tmp_path / f"{name}_out/report.json" for name in ("near", "nearer", "far")]
    main(parse_args(["--compare", str(reports[0].parent), *map(str, reports[1:])]))  # folders are their reports
    table = capsys.readouterr().out.splitlines()
    (psnr,) = [line for line in table if "| unpaired | bare | all | PSNR in the mask ↑ |" in line]
    near = json.loads(reports[0].read_text())
    low, high = (figure(near, "unpaired", "bare", "psnr", "mask")[side] for side in ("low", "high"))
    cells = psnr.split(" | ")
    assert f"[{low:.2f}, {high:.2f}]" in cells[4] and ["≈" in cell for cell in cells[4:]] == [False, True, False]

    evaluate(tmp_path / "smaller", tree, pred_dir=tmp_path / "near", **PREDICTED, eval_height=32, eval_width=24)
    with pytest.raises(ValueError, match="were measured differently: size is 64x48 and 32x24"):
        compare([reports[0], tmp_path / "smaller/report.json"])
    for name in near["protocol"]:
        other = near | {"protocol": near["protocol"] | {name: "another"}}
        (tmp_path / "other.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match=f"measured differently: {name} is {near['protocol'][name]} and another"):
            compare([reports[0], tmp_path / "other.json"])
    newer = near | {
        "protocol": near["protocol"] | {"new": "a"}
    }  # what one report speaks of alone is a difference, too
    (tmp_path / "other.json").write_text(json.dumps(newer))
    for pair in ([reports[0], tmp_path / "other.json"], [tmp_path / "other.json", reports[0]]):
        with pytest.raises(ValueError, match="measured differently: new is (None and a|a and None)"):
            compare(pair)
    for text in ("no JSON", "[]", "{}"):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match="--compare: .*other.json is no report of evaluate_vton.py"):
            compare([reports[0], tmp_path / "other.json"])


@pytest.mark.parametrize("name", ["nowhere:function", "test_evaluate:nothing", ":function"])
def test_a_recognizer_that_is_not_there_is_told_by_its_flag(name):
    with pytest.raises(ValueError, match=f"--recognizer {name}: "):
        load_recognizer(name)


def test_pictures_of_other_inputs_are_not_measured_with_the_new_ones(own_tree, model, tmp_path):
    """Masks that were mended, say."""
    options = {"metrics": ["psnr"], "setting": "paired"}
    evaluate(tmp_path / "out", own_tree, model, **options)
    Image.new("L", (WIDTH, HEIGHT), 255).save(own_tree / "test/agnostic-mask/01_mask.png")
    save(picture(7, HEIGHT, WIDTH), own_tree / "test/cloth/02.png")
    failures = fails(tmp_path / "out", own_tree, model, **options)
    assert [failure["line"] for failure in failures] == ["paired 01.png 01.png", "paired 02.png 02.png"]
    assert all("was made of other pictures than there are now" in failure["error"] for failure in failures)
    for failure in failures:
        Path(failure["error"].split(" was made")[0]).unlink()
    for file in (tmp_path / "out").rglob("0[12]__*.png"):
        file.unlink()
    assert evaluate(tmp_path / "out", own_tree, model, **options)["figures"]


def test_a_missing_file_is_told_of_before_anything_is_drawn(own_tree, model, tmp_path):
    (own_tree / "test/cloth/03.png").unlink()
    failures = fails(tmp_path / "out", own_tree, model, metrics=["psnr"])
    assert {failure["error"] for failure in failures} == {f"there is no {own_tree}/test/cloth/03.png"}
    assert not list((tmp_path / "out").glob("seed-*"))


def test_lines_of_which_nothing_can_be_measured_are_told_of(own_tree, model, tmp_path, caplog):
    evaluate(tmp_path / "all", own_tree, model, metrics=["psnr"])
    assert "measure nothing of unpaired lines" not in caplog.text
    shutil.rmtree(own_tree / "test/tryon")
    evaluate(tmp_path / "some", own_tree, model, metrics=["psnr"])
    assert "--metrics psnr measure nothing of unpaired lines without a truth" in caplog.text


def test_steps_that_the_model_cannot_take_are_told_before_the_first_picture(tree, model, tmp_path):
    with pytest.raises(ValueError, match="2000"):
        evaluate(tmp_path, tree, model, num_inference_steps=2000)


def test_unpaired_figures_of_other_persons_do_not_stand_side_by_side(own_tree, tmp_path):
    """FID without truths is a distance to the persons."""
    shutil.rmtree(own_tree / "test/tryon")
    pictures, options = tmp_path / "predicted", {"setting": "unpaired", "metrics": ["fid"]}
    for i in range(COUNT):
        save(picture(400 + i, HEIGHT, WIDTH), pictures / f"{i:02d}.png")
    evaluate(tmp_path / "before", own_tree, pred_dir=pictures, **options)
    Image.open(own_tree / "test/image/03.png").save(own_tree / "test/image/03.png", "JPEG", quality=30)
    evaluate(tmp_path / "after", own_tree, pred_dir=pictures, **options)
    with pytest.raises(ValueError, match="were measured differently: truths is"):
        compare([tmp_path / "before/report.json", tmp_path / "after/report.json"])


def test_a_person_is_no_cloth(own_tree, tmp_path):
    shutil.rmtree(own_tree / "test/tryon")
    shutil.copy(own_tree / "test/image/02.png", own_tree / "test/cloth/04.png")
    for i in range(COUNT):
        save(picture(400 + i, HEIGHT, WIDTH), tmp_path / f"predicted/{i:02d}.png")
    (failure,) = fails(tmp_path / "out", own_tree, pred_dir=tmp_path / "predicted", **PREDICTED | {"metrics": ["fid"]})
    assert failure["error"] == "the person and the cloth are the same picture"


def test_a_masked_adapter_is_measured_with_masks(tree, model, tmp_path):
    with pytest.raises(ValueError, match="--masks none goes with mask-free adapters"):
        evaluate(tmp_path / "out", tree, model, masks="none")


@pytest.mark.parametrize(("package", "metric"), [("torchvision", "lpips"), ("matplotlib", "psnr")])
def test_what_is_not_installed_is_missed_before_anything_is_drawn(tree, model, tmp_path, monkeypatch, package, metric):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"needs {package}: pip install -r requirements-eval.txt"):
        evaluate(tmp_path / "out", tree, model, metrics=[metric])
    assert not (tmp_path / "out").exists()


def test_a_fault_is_one_sentence(tree, tmp_path):
    line = [
        sys.executable,
        str(ROOT / "evaluate_vton.py"),
        *flags(tmp_path / "out", tree, tmp_path / "nowhere", metrics=["psnr"]),
    ]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("evaluate_vton.py: ") and "nowhere" in done.stderr.splitlines()[-1]


def test_figures_stand_in_the_adapters_card(finished, tree, model, tmp_path, hub, monkeypatch):
    out, report = finished
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    begun = shutil.copytree(out, tmp_path / "out")
    evaluate(begun, tree, model, push_to_hub="me/measured", metrics=["psnr"], setting="paired")
    card = ModelCard.load("me/measured")
    found = {
        result.dataset_name: result for result in card.data.eval_results if result.metric_name == "PSNR in the mask ↑"
    }
    bare = figure(report, "paired", "bare", "psnr", "mask")["value"]
    (result,) = [found[name] for name in found if "paired, bare, 32x24" in name]
    assert result.metric_value == pytest.approx(bare, abs=0.01) and result.metric_type == "psnr"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--output_dir", "o"], "give --dataset_root or --dataset_name, got None and None"),
        (["--output_dir", "o", "--dataset_root", "d"], "give --model or --pred_dir, got None and None"),
        (["--dataset_root", "d", "--model", "m"], "--output_dir must be given"),
        (["--output_dir", "o", "--dataset_root", "d", "--model", "m", "--seeds", "0"], "--seeds: must be a positive whole number, got 0"),
        (["--output_dir", "o", "--dataset_root", "d", "--pred_dir", "p", "--seeds", "2"], "--pred_dir has one seed"),
        (["--output_dir", "o", "--dataset_root", "d", "--model", "m", "--eval_width", "8"], "go together, got None and 8"),
        (["--output_dir", "o", "--dataset_name", "d", "--model", "m", "--train_root", "t"], "--train_root goes with --dataset_root"),
        (["--output_dir", "o", "--dataset_root", "d", "--model", "m", "--seed", "-1"], "--seed: must be a whole number from 0 to 4294967295, got -1"),
        (["--output_dir", "o", "--dataset_root", "d", "--model", "m"], "--dataset_root must be a folder, got d"),
        (["--output_dir", "o", "--dataset_root", ".", "--pred_dir", "p"], "--pred_dir must be a folder, got p"),
        (["--output_dir", "o", "--dataset_root", ".", "--model", "m", "--lpips_weights", "w"], "--lpips_weights must be a file, got w"),
        (["--output_dir", "o", "--dataset_root", ".", "--model", "m", "--guidance_scale", "-1"], "--guidance_scale: must be a number from 0, got -1"),
        (["--output_dir", "o", "--dataset_root", ".", "--model", "m", "--eta", "7"], "--eta: must be at least 0 and at most 1, got 7"),
        (["--compare", "one", "other"], "--compare: there is no one"),
        (["--output_dir", "o", "--dataset_root", ".", "--model", "m", "--caption_column", "t"], "--caption_column needs --dataset_name"),
        (["--compare", "tests", "other"], "--compare: there is no tests/report.json"),
        (["--output_dir", "o", "--dataset_root", "d", "--model", "m", "--scheduler", "None"], "--scheduler must be the name of a scheduler"),
        (["--output_dir", "o", "--dataset_root", "d", "--model", "m", "--push_to_hub", "r"], "--push_to_hub r needs --adapter"),
        (["--compare", "one"], "--compare needs at least two reports, got 1"),
    ],
)  # fmt: skip
def test_arguments(capsys, line, said):
    with pytest.raises(SystemExit):
        parse_args(line)
    assert said in capsys.readouterr().err


# ------------------------------------------------------------------- the classes that need torchvision: make test-eval

real_classes = pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is None, reason="needs make test-eval")


BACKBONES = {"squeeze": "squeezenet1_1", "alex": "alexnet", "vgg": "vgg16"}


@pytest.fixture(scope="session")
def random_weights(tmp_path_factory) -> dict[str, Path]:
    """Files as torch-fidelity's and torchvision's, with random weights."""
    import torchvision
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    files = {name: tmp_path_factory.mktemp("weights") / f"{name}.pth" for name in ("inception", *BACKBONES)}
    torch.manual_seed(0)
    for net, name in BACKBONES.items():
        torch.save(torchvision.models.get_model(name, weights=None).state_dict(), files[net])
    torch.save({}, files["inception"])
    with pytest.MonkeyPatch.context() as patch:  # it can only be made of a file
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(files["inception"]))
    for layer in net.modules():
        if isinstance(layer, torch.nn.Conv2d):  # as made they would fade to nothing
            torch.nn.init.kaiming_normal_(layer.weight)
    torch.save(net.state_dict(), files["inception"])
    return files


@real_classes
def test_inception_is_torch_fidelitys(random_weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    pictures = torch.stack([(as_tensors(picture(i, 80, 60), "p")[0] * 255).round().to(torch.uint8) for i in range(2)])
    net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(random_weights["inception"]))
    legacy, clean = (Inception(mode, random_weights["inception"]).eval() for mode in ("legacy", "clean"))
    with torch.no_grad():
        expected = net(pictures)[0]
        assert expected.std() > 0.01 and torch.allclose(legacy(pictures), expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(clean(pictures), expected, rtol=1e-3)
        square = clean_resize(pictures.float(), (299, 299)).round().to(torch.uint8)  # nothing left to resize
        assert torch.allclose(clean(square), net(square)[0], rtol=1e-5, atol=1e-6)


@real_classes
@pytest.mark.parametrize("net", BACKBONES)
def test_lpips_is_torchmetrics(random_weights, tmp_path, net):
    """From a file, without a download; torch's own cache is left alone."""
    import torchvision
    from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity

    one, other = (as_tensors(picture(i, 64, 48), "p")[0][None] for i in (1, 2))
    before = torch.hub.get_dir()
    measured = load_lpips(net, random_weights[net])(one, other).item()
    assert torch.hub.get_dir() == before
    torch.hub.set_dir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    url = torchvision.models.get_model_weights(BACKBONES[net]).DEFAULT.url
    shutil.copy(random_weights[net], tmp_path / "checkpoints" / Path(url).name)
    try:
        direct = learned_perceptual_image_patch_similarity(one, other, net, normalize=True).item()
    finally:
        torch.hub.set_dir(before)
    assert measured == pytest.approx(direct, abs=1e-6) and measured > 0


@real_classes
def test_a_perfect_prediction_by_the_real_classes(own_tree, random_weights, tmp_path):
    for i in range(COUNT):
        shutil.copy(own_tree / f"test/image/{i:02d}.png", own_tree / f"test/tryon/{i:02d}__{(i + 2) % COUNT:02d}.png")
    options = {"pred_dir": predict(own_tree, tmp_path / "pictures"), "setting": "unpaired", "pred_composited": True}
    options |= {"inception_weights": random_weights["inception"], "lpips_weights": random_weights["squeeze"]}
    options["metrics"] = ["ssim", "psnr", "lpips", "fid", "kid"]
    main(parse_args(flags(tmp_path / "out", own_tree, **options)))
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert figure(report, "unpaired", "composited", "fid")["value"] == pytest.approx(0, abs=1e-3)
    assert figure(report, "unpaired", "composited", "lpips")["value"] == pytest.approx(0, abs=1e-6)
    assert report["protocol"]["lpips_net"] == "squeeze" and len(report["protocol"]["inception_weights"]) == 16
    text = (tmp_path / "out/report.md").read_text()
    assert "LPIPS (squeeze) ↓" in text and "FID (clean) ↓" in text and "KID × 1000 ↓" in text
    legacy = options | {"metrics": ["fid"], "fid_mode": "legacy"}
    main(parse_args(flags(tmp_path / "legacy", own_tree, **legacy)))
    assert "FID (legacy) ↓" in (tmp_path / "legacy/report.md").read_text()
    main(parse_args(flags(tmp_path / "clean", own_tree, **legacy | {"fid_mode": "clean"})))
    with pytest.raises(ValueError, match="were measured differently: fid_mode is legacy and clean"):
        compare([tmp_path / name / "report.json" for name in ("legacy", "clean")])
