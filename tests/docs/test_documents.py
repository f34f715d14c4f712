"""The documents agree with the code: generated parts, the picture, links, paths and options."""

import argparse
import re
from pathlib import Path

import pytest

from docs import generate
from embedfuse.cli import embed

PATH = re.compile(
    r"`((?:python|csrc|triton_kernels|tests|benchmarks|examples|docs|patching|pipeline|nn)/[\w/.-]+)`"
)


@pytest.mark.parametrize("page", generate.PAGES, ids=lambda page: page.name)
def test_parts_are_up_to_date(page):
    text = page.read_text()
    assert generate.filled(text) == text, "python -m docs.generate writes them anew"


def test_every_part_has_a_page():
    named = [
        name for page in generate.PAGES for _, name, _ in generate.PART.findall(page.read_text())
    ]
    assert sorted(named) == sorted(generate.PARTS)


def test_picture_shows_the_stored_results():
    picture = generate.PICTURE.read_text()
    for model, of in generate.bars().items():
        assert model in picture
        for speedup in of.values():
            assert f">{generate.ratio(speedup)}<" in picture


def test_picture_is_drawn_the_same_each_time(tmp_path):
    pytest.importorskip("matplotlib")
    pictures = [tmp_path / "1.svg", tmp_path / "2.svg"]
    for path in pictures:
        generate.draw(path)
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)", (generate.ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not Path(generate.ROOT, link).exists()] == []


def test_number_of_the_front_page_is_stored():
    requests, bulk, _ = next(iter(generate.bars().values())).values()
    text = " ".join((generate.ROOT / "README.md").read_text().split())
    assert f"**{generate.ratio(requests)}**" in text
    assert f"{bulk:.1f} times as fast" in text


def test_paths_exist():
    pages = (*generate.PAGES, generate.ROOT / "CONTRIBUTING.md")
    found = {path for page in pages for path in PATH.findall(page.read_text())}
    assert len(found) > 20
    new = {path for path in found if Path(path).stem in ("x", "test_x")}  # of an op to be added
    folders = generate.ROOT, generate.ROOT / "python" / "embedfuse"
    missing = [p for p in found - new if not any((folder / p).exists() for folder in folders)]
    assert missing == []


def test_options_of_embed_are_documented():
    parser = argparse.ArgumentParser(add_help=False)
    embed.add_arguments(parser)
    text = (generate.ROOT / "docs" / "command-line.md").read_text()
    options = [name for action in parser._actions for name in action.option_strings]
    assert len(options) > 8
    assert [name for name in options if f"`{name}" not in text] == []
