"""docs/pipeline.md names all that there is."""

import inspect
import re
from dataclasses import fields

from tiny import ROOT

from pipeline_vton import AdapterSettings, StableDiffusionVTONPipeline


def test_every_argument_and_setting_is_in_its_table():
    text = (ROOT / "docs/pipeline.md").read_text()
    file = text[text.index("## The adapter's file") :]
    rows = [set(re.findall(r"`(\w+)`", row.split(" | ")[0])) for row in text.splitlines() if row.startswith("| `")]
    named = set().union(*rows)
    assert named >= inspect.signature(StableDiffusionVTONPipeline.__call__).parameters.keys() - {"self"}
    assert named >= {setting.name for setting in fields(AdapterSettings)}
    for setting in fields(AdapterSettings):
        for choice in setting.metadata.get("choices", ()):
            assert f"`{str(choice).lower() if isinstance(choice, bool) else choice}`" in file


def test_every_method_that_is_named_is_there():
    text = (ROOT / "docs/pipeline.md").read_text()
    table = text[text.index("## Methods") : text.index("## Settings")]
    for name in re.findall(r"^\| (.*?) \|", table, re.MULTILINE)[2:]:
        for method in re.findall(r"`(\w+)`", name):
            assert callable(getattr(StableDiffusionVTONPipeline, method)), method
