"""evaluate_vton.py on a tiny base and a tiny tree: figures against the libraries' own, and against each other."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from PIL import Image
from tiny import ROOT, box_mask, picture, tiny_pipe
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.kid import KernelInceptionDistance

from evaluate_vton import (
    Features,
    bootstrap,
    clean_resize,
    compare,
    decibels,
    find_duplicates,
    frechet_distance,
    kernel_distance,
    main,
    masked_psnr,
    metric_library,
    parse_args,
    ssim,
)
from pipeline_vton import StableDiffusionVTONPipeline, as_tensors


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


def flags(out: Path, tree: Path | None, model: Path | None = None, **changed) -> list[str]:
    """The command line of a short run; True is a flag without a value, None leaves one out."""
    options = {
        "output_dir": out,
        "dataset_root": tree,
        "model": model,
        "adapter": model,
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
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import patch_environment

    out = tmp_path_factory.mktemp("finished")
    with patch_environment(ACCELERATE_USE_CPU="true"):
        report = evaluate(out, tree, model)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    return out, report


# ------------------------------------------------------------------------------------------------------------ measures


def test_measures_are_torchmetrics_own():
    one, other = (torch.stack([as_tensors(picture(i), "p", 3)[0] for i in some]) for some in ((1, 2, 3), (4, 5, 6)))
    similar = [ssim(*pair) for pair in zip(one, other)]
    direct = structural_similarity_index_measure(one.double(), other.double(), data_range=1.0, reduction="none")
    assert similar == pytest.approx(direct.tolist(), abs=1e-6)
    psnr = peak_signal_noise_ratio(one, other, data_range=1.0).item()
    assert masked_psnr(one, other, [None] * 3) == pytest.approx(psnr, abs=1e-5)
    box = torch.zeros(1, 32, 24)
    box[:, 8:20, 4:16] = 1
    inside = peak_signal_noise_ratio(one[..., 8:20, 4:16], other[..., 8:20, 4:16], data_range=1.0).item()
    assert masked_psnr(one, other, [box] * 3) == pytest.approx(inside, abs=1e-5)
    changed = torch.where(box.bool(), one[0], 1 - one[0])  # far from the mask's inside nothing matters
    box[:] = 0
    box[:, 14, 10] = 1
    assert ssim(one[0], changed, box) > 0.999 > 0.9 > ssim(one[0], changed)


def test_a_flat_picture_is_equal_to_itself():
    flat = torch.full((3, 32, 24), 0.7)
    assert ssim(flat, flat) == pytest.approx(1, abs=1e-9) and masked_psnr([flat], [flat], [None]) == math.inf


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


def test_the_report_is_what_the_pictures_say(finished, tree):
    out, report = finished
    for setting, truth in (("paired", "image/{0:02d}"), ("unpaired", "tryon/{0:02d}__{1:02d}")):
        pairs = [(i, i if setting == "paired" else (i + 2) % COUNT) for i in range(COUNT)]
        truths = [Image.open(tree / f"test/{truth.format(*pair)}.png") for pair in pairs]
        for compositing in ("composited", "bare"):
            names = [out / f"seed-0/{setting}/{compositing}/{i:02d}__{j:02d}.png" for i, j in pairs]
            shown, true = (
                torch.stack([as_tensors(p.resize((24, 32), Image.Resampling.LANCZOS), "p", 3)[0] for p in pictures])
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
    text = (out / "report.md").read_text()
    shown = figure(report, "paired", "composited", "ssim")
    assert f"{shown['value']:.4f} [{shown['low']:.4f}, {shown['high']:.4f}]" in text and "FID (clean)" in text
    for name in ("sheet_paired.png", "sheet_unpaired.png", "distributions.png"):
        assert f"({name})" in text and Image.open(out / name).width > 300


def persons(tree: Path) -> torch.Tensor:
    files = sorted((tree / "test/image").iterdir())
    shrunk = [Image.open(file).resize((24, 32), Image.Resampling.LANCZOS) for file in files]
    return torch.stack([as_tensors(p, "p", 3)[0] for p in shrunk])


def test_composited_pictures_are_the_pipelines(finished, tree, model):
    """Pixel by pixel what a call with the line's seed returns."""
    from evaluate_vton import Line, seed_of

    out, _ = finished
    pipe = StableDiffusionVTONPipeline.from_pretrained(model)
    pipe.load_vton_adapter(model)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(seed_of(0, Line("unpaired", "01.png", "03.png")))
    pictures = [Image.open(tree / f"test/{name}.png") for name in ("image/01", "cloth/03", "agnostic-mask/01_mask")]
    expected = pipe(*pictures, height=32, width=24, num_inference_steps=2, generator=noise).images[0]
    found = Image.open(out / "seed-0/unpaired/composited/01__03.png")
    assert found.size == (WIDTH, HEIGHT) and np.array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_change_nothing(finished, tree, model, tmp_path, batch_size):
    out, report = finished
    assert_close(evaluate(tmp_path, tree, model, batch_size=batch_size, **UNPAIRED), report)
    assert same(results(tmp_path), results(out))


def test_two_processes_change_nothing(finished, tree, model, tmp_path):
    out, report = finished
    script = tmp_path / "run.py"
    script.write_text(
        "from test_evaluate import Colors\nfrom evaluate_vton import main, parse_args\nmain(parse_args(), Colors())\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", port, str(script), *flags(tmp_path / "out", tree, model, setting="unpaired")]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "ACCELERATE_USE_CPU": "true"}
    finished_run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert finished_run.returncode == 0, finished_run.stderr
    two = json.loads((tmp_path / "out/report.json").read_text())
    assert two["cost"]["processes"] == 2
    assert_close(two, report)
    assert same(results(tmp_path / "out"), results(out))


def test_a_killed_run_goes_on(finished, tree, model, tmp_path):
    """Of a run that was killed there are whole pictures and a temporary one; only what is missing is made."""
    out, report = finished
    begun = tmp_path / "begun"
    shutil.copytree(out, begun)
    gone = begun / "seed-0/paired/composited/03__03.png"
    gone.with_name(f".{gone.name}.123").write_bytes(gone.read_bytes()[:100])
    gone.unlink()
    kept = begun / "seed-0/paired/bare/01__01.png"
    before = kept.stat().st_mtime_ns
    assert_close(evaluate(begun, tree, model), report)
    assert same(results(begun), results(out)) and kept.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="pictures of another run: num_inference_steps was 2 and is 3"):
        evaluate(begun, tree, model, num_inference_steps=3)


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
