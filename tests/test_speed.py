"""What a try-on costs is counted as it is, and fewer steps are what they say."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from tiny import ROOT, run, tiny_pipe

from benchmarks import accept_gpu, fewer_steps, growth, speed
from benchmarks.fewer_steps import Result, Setting
from benchmarks.sd15 import random_pipe


def rows_computed(pipe, **options) -> int:
    """How many rows the UNet computes in a call."""
    rows = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    run(pipe, **options)
    hook.remove()
    return sum(rows)


# -------------------------------------------------------------------------------------------------------------- costs


@pytest.mark.parametrize(("size", "least"), [((512, 384), 1.072), ((1024, 768), 1.191)])
def test_a_step_at_sd15s_size_does_little_more_than_the_bare_unets(size, least):
    """What the person's attention to twice the keys costs, and a fiftieth of reading the cloth, and nothing else."""
    pipe, rows = random_pipe("meta"), [row for row in speed.ROWS if not row.text and row.cloth != "joint"]
    times = speed.ratios({row: speed.count_flops(pipe, row, size) for row in rows}, steps=50)
    assert times[speed.REFERENCE] == pytest.approx(least, abs=0.003)


def test_a_machine_that_is_slower_by_turns_leaves_a_ratio_as_it_is():
    rounds = [1.0, 3.0, 2.0]
    costs = {speed.BARE: 2.0, speed.REFERENCE: 3.0, speed.BARE_UNGUIDED: 1.0, speed.READING: 1.0}
    seconds = {row: [cost * slower for slower in rounds] for row, cost in costs.items()}
    found = speed.ratio_of_rounds(speed.REFERENCE, seconds, steps=10)
    assert found.low == pytest.approx(found.high) and found.value == pytest.approx((3 + 1 / 10) / 2)
    assert found.value == pytest.approx(speed.ratios(costs, steps=10)[speed.REFERENCE])
    seconds[speed.REFERENCE][0] *= 2
    found = speed.ratio_of_rounds(speed.REFERENCE, seconds, steps=10)
    assert found.low < found.value < found.high


def test_rows_of_steps_can_be_chosen(capsys):
    line = ["steps", "--tiny", "--sizes", "64x48", "--dtypes", "fp32", "--rounds", "1", "--rows", "reference"]
    speed.main(speed.parse_args(line))
    names = [row.strip("| ").split(" | ")[0] for row in capsys.readouterr().out.splitlines() if row.startswith("| ")]
    assert names[1:] == ["bare UNet", "reference", "bare UNet, guidance 1", "reading the cloth"]


@pytest.mark.parametrize("question", ["steps", "ways", "flops", "stages"])
def test_every_question_is_answered(question, capsys):
    line = [question, "--tiny", "--sizes", "64x48", "--dtypes", "fp32", "--rounds", "1", "--num_inference_steps", "2"]
    speed.main(speed.parse_args(line))
    cells = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    _, *rows = cells
    values = {name: float(value) for name, value, *_ in rows}
    named = {"stages": [*speed.STAGES, speed.REST], "ways": list(speed.WAYS)}
    assert list(values) == named.get(question, [row.name for row in speed.ROWS])
    if question == "ways":
        assert float(rows[0][2]) == 1 and all(float(row[3]) < 1e-5 for row in rows)
    if question == "flops":
        assert 1 < values["reference"] / values["bare UNet"] < values["joint canvas"] / values["bare UNet"]
        assert values["bare UNet"] == pytest.approx(2 * values["bare UNet, guidance 1"], rel=0.1)
    if question == "stages":
        assert values.pop("schedule") >= 0 and min(values.values()) > 0  # which takes less than is shown


def test_the_cloths_keys_are_weighed():
    _, kept = speed.peak_of("as it is", "bf16", (64, 48), 1, "cpu", tiny=True)
    elements = 2 * (3 * 48 * 16 + 12 * 32)  # keys and values of 3 layers of 48 tokens and one of 12
    assert kept * 2**20 == 2 * elements


def test_an_adapters_file_is_weighed_and_loaded(capsys):
    speed.main(speed.parse_args(["adapter", "--tiny", "--rounds", "1"]))
    cells = [row.strip("| ").split(" | ") for row in capsys.readouterr().out.splitlines() if row.startswith("| fp")]
    (_, single, _), (_, half, seconds) = cells
    assert 1.5 < float(single) / float(half) <= 2 and float(seconds) >= 0


@pytest.mark.parametrize("how", speed.COMPILED)
def test_what_is_compiled_are_whole_graphs_that_later_calls_find_again(how):
    with torch._dynamo.config.patch(recompile_limit=2):  # SD1.5's repeated blocks need more than torch's 8
        found = speed.compile_cost(random_pipe(tiny=True), (64, 48), 1, rounds=2, backend="eager", how=how)
    assert found["graphs"] > 0 and found["graphs of later calls"] == 0 and found["graph breaks"] == 0


@pytest.mark.parametrize("how", speed.COMPILED)
def test_what_is_compiled_draws_the_same(how):
    pipe = tiny_pipe(9)
    plain = run(pipe)
    getattr(pipe.unet, speed.COMPILED[how])(fullgraph=True, backend="eager")
    assert (run(pipe) == plain).all()


def test_a_gpu_is_accepted_by_checks_that_also_run_here(tmp_path, capsys):
    line = ["--device", "cpu", "--tiny", "--rounds", "1", "--output_dir", str(tmp_path)]
    accept_gpu.main(
        accept_gpu.parse_args([*line, "--groups", "precision", "vae", "offload", "steps", "memory", "real"])
    )
    report = json.loads((tmp_path / "report.json").read_text())
    checks = {row["name"]: row for row in report["checks"]}
    assert {name for name, row in checks.items() if "skipped" in row} == {
        "offloading",
        "peak memory",
        "real weights",
        "synchronisations a step",
    }
    assert 0 < checks["bf16: relative difference from fp32"]["value"] < 0.1
    assert report["environment"]["torch"] == torch.__version__ and (tmp_path / "whole.png").is_file()


def test_real_weights_are_checked_in_half_precision_against_fp32(tmp_path, monkeypatch):
    """With the demo's in their place."""
    model, example = ROOT / "demo/model", ROOT / "demo/examples/upper-0"
    shutil.copytree(model / "human_parser", tmp_path / "parser")
    shutil.copy(model / "human_parser_processor/preprocessor_config.json", tmp_path / "parser")
    monkeypatch.setattr(accept_gpu, "REAL_STEPS", 2)
    places = {"BASE": model, "ADAPTER": model, "ADAPTER_FOLDER": None, "PARSER": tmp_path / "parser"}
    for name, place in (places | {"PERSON": example / "person.png", "CLOTH": example / "cloth.png"}).items():
        monkeypatch.setattr(accept_gpu, name, place and str(place))
    out = tmp_path / "out"
    accept_gpu.main(accept_gpu.parse_args(["--device", "cpu", "--groups", "real", "--real", "--output_dir", str(out)]))
    checks = {row["name"]: row["value"] for row in json.loads((out / "report.json").read_text())["checks"]}
    assert checks["real weights: largest change outside the mask"] == 0
    assert 0 < checks["real weights, bf16: mean difference from fp32 in the mask"] < 0.02
    assert (out / "real-mask.png").is_file() and (out / "real-tryon.png").is_file()


def test_what_fails_is_in_the_report_and_the_rest_goes_on(tmp_path):
    report = accept_gpu.Report(tmp_path, torch.device("cpu"))
    report.check("too much", lambda: 2, at_most=1)
    report.check("no number", lambda: float("nan"))
    report.check("broken", lambda: 1 / 0)
    report.check("fine", lambda: 1, at_most=1, at_least=1)
    assert report.failed == ["too much", "no number", "broken"]
    checks = json.loads((tmp_path / "report.json").read_text())["checks"]
    assert "ZeroDivisionError" in checks[2]["error"] and checks[3]["passed"]


def test_training_is_accepted(tmp_path):
    line = ["--device", "cpu", "--tiny", "--groups", "training", "--updates", "4", "--output_dir", str(tmp_path)]
    accept_gpu.main(accept_gpu.parse_args(line))


# -------------------------------------------------------------------------------------------------------- fewer steps


def test_fast_is_one_scheduler_and_the_options_of_calls():
    pipe = tiny_pipe(guidance_scale=2.0)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    options = pipe.fast()
    assert options == {"num_inference_steps": 8, "guidance_interval": (0.0, 0.75)}
    assert isinstance(pipe.scheduler, EulerAncestralDiscreteScheduler)
    assert rows_computed(pipe, **options) == Setting("Euler a", 8, None, (0.0, 0.75)).rows(2.0) == 1 + 14
    assert pipe.fast(4)["num_inference_steps"] == 4 and pipe.config.guidance_scale == 2


@pytest.mark.parametrize("steps", [0, -1, 2.5, "8", True])
def test_fast_refuses_what_is_no_number_of_steps(steps):
    pipe = tiny_pipe()
    scheduler = pipe.scheduler
    with pytest.raises(ValueError, match="`num_inference_steps` must be a positive whole number, got"):
        pipe.fast(steps)
    assert pipe.scheduler is scheduler


@pytest.mark.parametrize("scheduler", [None, FlowMatchEulerDiscreteScheduler()])
def test_fast_refuses_a_scheduler_that_is_none_of_stable_diffusions(scheduler):
    pipe = tiny_pipe()
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match="`scheduler`"):
        pipe.fast()


@pytest.mark.parametrize("guidance, interval", [(1.0, (0.0, 1.0)), (2.0, (0.0, 1.0)), (2.0, (0.25, 0.75))])
def test_a_settings_work_is_the_rows_that_the_unet_computes(guidance, interval):
    setting = Setting("DDPM", 5, guidance, interval)
    options = {"num_inference_steps": 5, "guidance_scale": guidance, "guidance_interval": interval}
    assert setting.rows(guidance) == rows_computed(tiny_pipe(), **options)


def test_the_fast_recipe_is_the_one_that_is_measured():
    pipe = tiny_pipe()
    options = pipe.fast()
    measured = Setting("Euler a", options["num_inference_steps"], interval=options["guidance_interval"])
    assert measured == fewer_steps.FAST and type(pipe.scheduler).__name__ == fewer_steps.SCHEDULERS["Euler a"]


def test_the_front_and_the_recipe():
    args = fewer_steps.parse_args([])

    def result(scheduler: str, steps: int, rows: int, psnr: float, recognised: float) -> Result:
        return Result(Setting(scheduler, steps), rows, 1.0, psnr, 0.9, recognised)

    default = result("DDPM", 50, 101, 24.0, 0.9)
    close, worse, lost, blind = (
        result("UniPC", 8, 17, 23.9, 0.9), result("DDIM", 8, 17, 23.85, 0.89),
        result("DPM++ 2M", 4, 9, 23.7, 0.91), result("DDIM", 4, 9, 24.1, 0.5),
    )  # fmt: skip
    results = [default, close, worse, lost, blind]
    assert fewer_steps.pareto(results) == [lost, blind, close, default]
    assert fewer_steps.good_enough(results, args) == [close, worse, default]
    assert fewer_steps.best_three(results, args) == [close.setting, worse.setting, default.setting]


def test_settings_are_swept_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fewer_steps, "DEFAULT", Setting("DDPM", 2))
    monkeypatch.setattr(fewer_steps, "FAST", replace(fewer_steps.FAST, steps=2))
    monkeypatch.setattr(fewer_steps, "INTERVALS", ((0.0, 1.0),))
    line = [
        "--output_dir",
        str(tmp_path),
        "--lines",
        "6",
        "--schedulers",
        "UniPC",
        "--steps",
        "1",
        "--guidance_scale",
        "1",
    ]
    fewer_steps.main(fewer_steps.parse_args([*line, "--model", str(ROOT / "demo" / "model")]))
    printed = capsys.readouterr().out
    assert "| UniPC | 1 | " in printed and (tmp_path / "pareto.png").is_file()
    assert "| Euler a | 2 | the adapter's | 0 to 0.75 | 5 | " in printed.split("`pipe.fast()`")[1].split("All")[0]
    monkeypatch.setattr(fewer_steps, "try_on", None)  # nothing is computed again, wherever the model lies
    (tmp_path / "moved").symlink_to(ROOT / "demo" / "model")
    fewer_steps.main(fewer_steps.parse_args([*line, "--model", str(tmp_path / "moved")]))
    assert capsys.readouterr().out == printed


# ------------------------------------------------------------------------------------------------------------- growth


def test_growth_is_fitted_and_drawn(tmp_path, monkeypatch, capsys):
    """Of a call that costs its pixels times its steps, and the square of its persons in memory."""

    def cost(call, *where):
        return call.pixels * call.steps / 1e6, call.persons**2 * call.cloths**0.5

    # or a call of SD1.5's size refuses them
    assert all(height % 64 == 0 == width % 64 for height, width in growth.SIZES)
    monkeypatch.setattr(growth, "cost", cost)
    monkeypatch.setattr(growth, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(count))
    growth.main(growth.parse_args(["--output_dir", str(tmp_path)]))
    rows = [row.split(" | ") for row in (tmp_path / "report.md").read_text().splitlines() if row[:1] == "|"][2:]
    exponents = {row[0].strip("| "): [float(row[3]), float(row[5].strip("| "))] for row in rows}
    assert exponents == {"pixels": [1, 0], "steps": [1, 0], "persons": [0, 2], "cloths": [0, 0.5]}
    assert rows[0][1] == "4.92e+04 / 9.83e+04 / 1.97e+05 / 3.28e+05"
    assert Image.open(tmp_path / "growth.png").width > 800


def test_growth_asks_for_whole_calls(monkeypatch):
    asked = []

    def pipe(persons, cloths, masks, **options):
        asked.append((len(persons), [len(outfit) for outfit in cloths], len(masks), options["num_inference_steps"]))
        return real(persons, cloths, masks, **options)

    real = random_pipe(tiny=True)
    monkeypatch.setattr(growth, "random_pipe", lambda *args: pipe)
    seconds, gib = growth.cost(growth.Call(64, 48, steps=3, persons=2, cloths=2), "fp32", "cpu", tiny=True)
    assert asked == [(2, [2, 2], 2, 1), (2, [2, 2], 2, 3)] and seconds > 0
    assert gib < 0.5  # the weights, and all that was imported, are not in it
