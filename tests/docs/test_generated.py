"""The generated parts and the picture are what docs/generate.py writes; links of README.md lead somewhere."""

import re
from pathlib import Path

import pytest

from docs import generate


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
    text = (generate.ROOT / "README.md").read_text()
    assert f"**{generate.ratio(requests)}**" in text
    assert f"{bulk:.1f} times as fast" in text
