"""What the documents say, and what the page says where its library is missing."""

import inspect
import re
import subprocess
import sys
from dataclasses import fields

import pytest
from tiny import ROOT

from pipeline_vton import AdapterSettings, StableDiffusionVTONPipeline


def first_column(section: str) -> set[str]:
    """What the rows of a section's table speak of."""
    return {
        name
        for row in section.splitlines()
        if row.startswith("| ")
        for name in re.findall(r"`(\w+)`", row.split(" | ")[0])
    }


def test_every_argument_and_setting_is_in_its_table():
    text = (ROOT / "docs/pipeline.md").read_text()
    call = text[text.index("## A call") : text.index("## Methods")]
    file = text[text.index("## The adapter's file") :]
    assert first_column(call) == inspect.signature(StableDiffusionVTONPipeline.__call__).parameters.keys() - {"self"}
    assert first_column(file) == {setting.name for setting in fields(AdapterSettings)}
    for setting in fields(AdapterSettings):
        for choice in setting.metadata.get("choices", ()):
            assert f"`{str(choice).lower() if isinstance(choice, bool) else choice}`" in file


def test_every_method_that_is_named_is_there():
    text = (ROOT / "docs/pipeline.md").read_text()
    table = text[text.index("## Methods") : text.index("## Settings")]
    for method in first_column(table):
        assert callable(getattr(StableDiffusionVTONPipeline, method)), method


def test_the_page_without_gradio_says_what_to_install():
    code = "import runpy, sys; sys.modules['gradio'] = None; runpy.run_path('app.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "the page needs gradio: pip install -r requirements-app.txt\n"


def anchors(text: str) -> set[str]:
    """Of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "file", ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{f.name}" for f in (ROOT / "docs").glob("*.md"))]
)
def test_every_link_leads_somewhere(file):
    text = (ROOT / file).read_text()
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        place, _, anchor = link.partition("#")
        target = (ROOT / file).parent / place if place else ROOT / file
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link
