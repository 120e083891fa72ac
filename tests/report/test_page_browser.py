"""The page in a real browser: no errors in light and dark, nothing wider than a phone, and it prints."""

import page_folders
import pytest
from chromium import browser, find_chromium

from qectomy.report.page.page import page
from qectomy.report.page.reading import Point, read_folder

EVIL = "</style><script>document.title='owned'</script>\"'><img src=x onerror=\"document.title='owned'\">"


@pytest.fixture(scope="module")
def chromium():
    with browser(find_chromium()) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """{name: file}: a full report, an exact one, a comparison, and one whose texts are hostile and long."""
    root = tmp_path_factory.mktemp("pages")
    others = dict(evaluation=page_folders.full_evaluation(), bench=page_folders.full_bench())
    full = read_folder(page_folders.write_folder(root / "full", page_folders.healed_report(), **others))
    exact = read_folder(page_folders.write_folder(root / "exact", page_folders.exact_report()))
    evil = page_folders.full_report()
    evil["source"]["name"] = EVIL + "x" * 3000
    evil["command"] = f"qectomy convert '{EVIL}' " + "y" * 3000
    evil["layers"][0]["map"] = EVIL
    evil["token_sample"]["tokens"][3] = {"text": EVIL, "before": 1.0, "after": 3.0}
    evil["generation"]["samples"][0] |= {"prompt": EVIL, "original": EVIL + "1", "reduced": EVIL + "2"}
    hostile = read_folder(page_folders.write_folder(root / "evil", evil))
    points = [Point(name=EVIL, parameters_removed=0.05, ratio=1.4, source="z" * 500)]
    made = {"full": [full], "exact": [exact], "comparison": [full, exact, hostile], "hostile": [hostile]}
    files = {}
    for name, folders in made.items():
        files[name] = root / f"{name}.html"
        files[name].write_text(page(folders, points=points if len(folders) > 1 else ()), encoding="utf-8")
    return files


@pytest.mark.parametrize("name", ["full", "exact", "comparison", "hostile"])
@pytest.mark.parametrize("dark", [False, True])
def test_it_shows_in_both_schemes_without_a_word_on_the_console(name, dark, chromium, pages):
    chromium.open(pages[name], dark=dark)
    assert chromium.problems == []
    assert chromium.requests == [pages[name].as_uri()]
    assert chromium.evaluate("document.title").endswith(" – Qectomy")
    background = chromium.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(21, 23, 26)" if dark else "rgb(253, 253, 251)")
    drawn = "[...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().height > 50)"
    assert chromium.evaluate(drawn)
    axis = "getComputedStyle(document.querySelector('svg text')).fontFamily"
    if name != "exact":
        assert "system-ui" in chromium.evaluate(axis)


@pytest.mark.parametrize("name", ["full", "exact", "comparison", "hostile"])
@pytest.mark.parametrize("width", [360, 1000])
def test_it_is_no_wider_than_the_window(name, width, chromium, pages):
    chromium.open(pages[name], width=width)
    assert chromium.evaluate("innerWidth") == width
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width
    boxes = "[...document.querySelectorAll('*')].filter(box => getComputedStyle(box).overflowY !== 'visible')"
    hidden = f"{boxes}.filter(box => !box.closest('.unseen') && box.scrollHeight > box.clientHeight + 1)"
    assert chromium.evaluate(f"{hidden}.map(box => box.outerHTML.slice(0, 99))") == []  # a picture shows every row
    if name == "full":  # a table that is wider scrolls in its box
        wide = "[...document.querySelectorAll('.wide')].some(box => box.scrollWidth > box.clientWidth)"
        assert chromium.evaluate(wide) == (width == 360)


def test_a_copied_command_is_the_command(chromium, pages):
    chromium.open(pages["full"])
    found = chromium.evaluate("[...document.querySelectorAll('pre')].map(block => block.innerText)")
    report = page_folders.healed_report()
    assert report["command"] in found
    assert report["healing"]["command"] in found


def test_it_prints(chromium, pages):
    chromium.open(pages["comparison"], dark=True, media="print")
    assert chromium.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert chromium.evaluate("getComputedStyle(document.querySelector('.verdict p')).color") == "rgb(27, 27, 25)"
    chromium.evaluate("document.querySelectorAll('details').forEach(part => part.open = false)")
    shown = "document.querySelector('details .verdict').checkVisibility({contentVisibilityAuto: true})"
    assert chromium.evaluate(shown)  # closed on the screen, yet on the paper
    printed = chromium.pdf()
    assert printed.startswith(b"%PDF-")
    assert len(printed) > 50_000
