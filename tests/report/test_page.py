"""The page says what the files say, whichever of them there are, and nothing in them becomes markup."""

import itertools
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import page_folders
import pytest
from markupsafe import Markup, escape

from qectomy import __version__
from qectomy.errors import CONTROLS, ReportError, clean
from qectomy.report.page import charts
from qectomy.report.page.page import page
from qectomy.report.page.reading import Point, read_folder
from qectomy.report.page.verdict import verdict

VOID = {"meta", "link", "br"}


class Reader(HTMLParser):
    """Collects a page's elements as (tag, attributes), its text by element, and checks that tags are nested."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.text = [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th", "dt", "dd", "li", "p", "strong"):
            self.text.append(" ")

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def tags(self, name):
        return [attrs for tag, attrs in self.elements if tag == name]

    @property
    def words(self):
        return " ".join("".join(self.text).split())


def make(tmp_path, report=None, name="reduced", **others):
    return read_folder(page_folders.write_folder(tmp_path / name, report or page_folders.full_report(), **others))


@pytest.fixture
def full(tmp_path):
    others = dict(evaluation=page_folders.full_evaluation(), bench=page_folders.full_bench())
    return make(tmp_path, page_folders.healed_report(), **others)


def section(html, key):
    return Reader(re.search(rf'<section id="m-{key}".*?</section>', html, re.DOTALL)[0])


# What it says


def test_the_headline(full):
    words = Reader(page([full])).words
    assert "HuggingFaceTB/SmolLM2-135M-Instruct without WQ, healed" in words
    assert "Parameters removed 6.58 % of 134.5 million; 17.7 MB" in words  # 8,847,360 of 134,515,008
    assert "1.0264 95 %: [1.0191, 1.0334]" in words
    assert "WQ removed 88.9 % of all layers" in words
    assert "Close" in words
    assert "is 1.0334, at most 1.05" in words


@pytest.mark.parametrize(
    "change, word, rule",
    [
        (dict(ratio=1.02, ratio_95=[1.01, 1.04]), "Close", "interval is 1.0400, at most 1.05"),
        (dict(ratio=1.04, ratio_95=[1.02, 1.0501]), "Heal before use", "interval is 1.0501, above 1.05"),
        (dict(ratio=1.0499, ratio_95=None), "Close, on little text", "no interval, is 1.0499"),
        (dict(ratio=1.4, ratio_95=[1.3, 1.5]), "Heal before use", "at most 1.5"),
        (dict(ratio=1.4, ratio_95=[1.3, 1.51]), "A starting point only", "is 1.5100, above 1.5"),
        (dict(ratio=0.9, ratio_95=[0.8, 0.95]), "Close", "is 0.9500"),
    ],
)
def test_the_verdict_follows_the_upper_end_of_the_interval(change, word, rule, tmp_path):
    report = page_folders.full_report()
    report["perplexity"] |= change
    found = verdict(make(tmp_path, report).report)
    assert found.word == word
    assert rule in found.rule


def test_a_healed_checkpoint_is_not_told_to_be_healed_as_if_it_never_was(tmp_path):
    report = page_folders.healed_report()
    report["perplexity"] |= {"ratio": 1.2, "ratio_95": [1.1, 1.3]}
    assert verdict(make(tmp_path, report).report).word == "Heal further before use"


def test_an_exact_one_is_lossless_by_proof_and_has_no_fit(tmp_path):
    html = page([make(tmp_path, page_folders.exact_report())])
    words = Reader(html).words
    assert "Lossless" in words
    assert "That is a proof, not a measurement" in words
    assert "In float64 no logit is off by more than 1.7 × 10⁻⁸ of the largest, on random tokens." in words
    assert "0-29 dense gauge dense 8.57 with RMSNorm before its readers" in words
    for absent in ("attention KL", "Healing", "Heal before use"):
        assert absent not in words


@pytest.mark.parametrize(
    "change, doubt",
    [
        (lambda r: r["perplexity"]["protocol"].update(scored_tokens=9_999), "on 9,999 tokens: few"),
        (lambda r: r["perplexity"]["protocol"].update(text_sha256=page_folders.OTHER_SHA), "another part of a text"),
        (lambda r: r["perplexity"]["protocol"].update(fitted_on=True), "was fitted on, which flatters"),
        (
            lambda r: r["perplexity"]["protocol"].pop("overlap"),
            "is not known: what was fitted or trained on is not rec",
        ),
        (lambda r: r["perplexity"]["protocol"]["overlap"].update(spans=99), "is not known: only 99 spans of 20 words"),
        (lambda r: r["perplexity"]["protocol"]["overlap"].update(share=0.5), "50% of the measured text stands in text"),
        (lambda r: r.update(layers=[page_folders._layer(2)]), "1.80 times the fitted one: more calibration tokens"),
        (lambda r: r["reload_check"].update(largest_relative_logit_error=0.1), "logits off by 0.100"),
        (lambda r: r["perplexity"].pop("ratio_95"), "There is no interval of the ratio"),
        (
            lambda r: (r.pop("calibration"), r["perplexity"]["protocol"].pop("overlap")),
            "does not say which texts were fitted on",
        ),
    ],
)
def test_what_speaks_against_the_numbers_is_said(change, doubt, tmp_path):
    report = page_folders.full_report()
    report["layers"] = [page_folders._layer(3)]  # held out is 1.2 times fitted
    clear = Reader(page([make(tmp_path, report, "clear")]))
    assert not [attrs for attrs in clear.tags("li") if attrs.get("class") in ("careful", "unknown")]
    change(report)
    doubted = page([make(tmp_path, report, "doubted")])
    items = re.findall(r'<li class="(?:careful|unknown)">(.*?)</li>', doubted)
    assert any(doubt in item for item in items), items


def test_tasks_are_marked_beyond_two_standard_errors_and_by_their_direction(full):
    words = section(page([full]), "tasks").words
    assert "arc_easy (acc) 1,000 0.5800 ± 0.0100 0.5300 ± 0.0100 ▼ −0.0500" in words
    assert "toxicity (acc) 1,000 0.3000 ± 0.0100 0.2000 ± 0.0100 ▲ −0.1000" in words  # lower is better
    assert "0.5281 ± 0.0100 +0.0081" in words
    assert words.count("▼") + words.count("▲") == 4  # and the legend


def test_the_mark_stands_from_two_standard_errors_of_the_difference(tmp_path):
    evaluation = page_folders.full_evaluation()
    two = 2 * math.sqrt(0.01**2 + 0.01**2)
    for gap, marked in ((two - 1e-6, False), (two + 1e-6, True)):
        values = evaluation["lm_eval"]["tasks"][0]["values"]
        values[1]["value"] = values[0]["value"] - gap
        words = section(page([make(tmp_path, evaluation=evaluation)]), "tasks").words
        assert ("▼ −0.0283" in words) == marked


def test_tokens_are_marked_by_how_much_worse_they_are_predicted(tmp_path):
    report = page_folders.full_report()
    gaps = {" far": 1.6, " some": 0.6, " bit": 0.2, " same": 0.05, " gain": -0.6, " much": -2.0}
    tokens = [{"text": "Start", "before": None, "after": None}]
    tokens += [{"text": text, "before": 3.0, "after": 3.0 + gap} for text, gap in gaps.items()]
    report["token_sample"]["tokens"] = tokens
    html = page([make(tmp_path, report)])
    text = re.search(r'<div class="tokens".*?</div>', html, re.DOTALL)[0]
    marks = {word: mark.strip() for mark, word in re.findall(r'<span class="t([^"]*)"[^>]*>([^<]*)</span>', text)}
    expected = {"Start": "un", " far": "w3", " some": "w2", " bit": "w1", " same": "", " gain": "b2", " much": "b3"}
    assert marks == expected
    assert 'title="3.00 → 4.60 nats (+1.60)"' in text


def test_generation_is_underlined_from_where_the_two_part(full):
    html = page([full])
    assert "apt install with <u>its name as an administrator." in html
    assert "apt install with <u>the name of the package." in html
    assert "Reduced, the same" in html


def test_what_moved_is_told_of_each_layer(tmp_path):
    report = page_folders.full_report()
    report["layers"][1]["map"] = "dense"
    report["layers"][1]["moved"] = {"W_K": 0, "W_V": 0.00001, "W_O": 0.0224, "W_down": 0.1, "norm_gain": 0.4, "x": 1}
    del report["layers"][2]["moved"]
    html = page([make(tmp_path, report)])
    words = section(html, "moved").words
    assert (
        "0 key-shared 61 % 0 % 0.80 % 0.46 % bO from 0 1 dense 0 % < 0.01 % 2.2 % 10 % the norm's gain 40 % 3 " in words
    )
    assert "are refitted, of dense layers too, so that" in words
    assert "before healing" not in words
    all_reduced = page_folders.full_report()
    assert "are refitted, so that" in section(page([make(tmp_path, all_reduced, "all")]), "moved").words
    assert "values" not in words  # which is GPT-2's
    assert "another basis" not in words
    report["layers"][3]["map"] = "identity"
    report["healing"] = page_folders.healed_report()["healing"]
    words = section(page([make(tmp_path, report)]), "moved").words
    assert "in another basis here, in which W is taken too. Measured when it was fitted, before healing" in words
    for layer in report["layers"]:
        layer["moved"] = {"W_K": 0.5, "b_O": 0}
    assert " Wdown 0 key-shared" in section(page([make(tmp_path, report)]), "moved").words
    report["calibration"]["refit"] = False
    assert "Nothing was refitted (--no-refit)" in section(page([make(tmp_path, report)]), "moved").words
    del report["layers"][1:], report["layers"][0]["moved"]  # by an older version
    assert "m-moved" not in page([make(tmp_path, report)])


def test_the_chat_template_is_told_where_one_was_used(tmp_path):
    report = page_folders.full_report()
    assert "Prompts:" not in section(page([make(tmp_path, report)]), "generation").words
    report["generation"]["prompt_format"] = "a user's message in the tokenizer's chat template"
    told = section(page([make(tmp_path, report)]), "generation").words
    assert "Prompts: a user's message in the tokenizer's chat template." in told


def test_generation_that_was_skipped_says_why(tmp_path):
    report = page_folders.full_report() | {"generation": {"skipped": "the folder holds no tokenizer"}}
    assert "Left out: the folder holds no tokenizer." in section(page([make(tmp_path, report)]), "generation").words


def test_numbers_of_each_part(full):
    html = page([full])
    removed = section(html, "removed").words
    assert "the whole model 134,515,008 125,667,648 8,847,360 6.58 %" in removed
    assert "bytes of the weights 269.0 MB 251.3 MB 17.7 MB 6.58 %" in removed
    assert "fitting 8 min 32 s 77 %" in section(html, "time").words  # 512.25 of 661.7 s
    assert "2–3 4.250 4.260 +0.0100" in section(html, "position").words
    assert "256+ " in section(html, "position").words
    bench = section(html, "bench").words
    assert "Decode, batch 8, tokens/s 112 [109, 116]" in bench
    assert "Weights 269.0 MB 251.3 MB 1.07" in bench
    assert "step 50 is kept" in section(html, "healing").words
    perplexity = section(html, "perplexity").words
    assert "fitted 26.158 – 1.0655 [1.0581, 1.0732]" in perplexity
    assert "healed 25.200 [23.60, 27.00] 1.0264 [1.0191, 1.0334]" in perplexity
    assert "32,704 scored tokens of handbook.txt (sha256 e6e052066a829994); windows of 512 tokens" in perplexity


def test_every_hash_and_command_is_there_whole(full):
    html = page([full])
    for digest in (page_folders.SHA, page_folders.OTHER_SHA, page_folders.SHA[::-1]):
        assert digest in html
    commands = ["".join(Reader(found).text) for found in re.findall(r"<code><span>.*?</code>", html, re.DOTALL)]
    report = page_folders.healed_report()
    for command in (report["command"], report["healing"]["command"], page_folders.full_bench()["command"]):
        assert command in commands


# Whichever parts there are


def _paths(value, prefix=()):
    for key, item in value.items():
        yield (*prefix, key)
        if isinstance(item, dict):
            yield from _paths(item, (*prefix, key))


def test_any_part_may_be_absent_or_null_or_is_named(tmp_path, monkeypatch):
    """What a record does not always have can be left out, and a page is drawn; of all else an error names the field."""
    monkeypatch.setattr(charts, "inline", lambda *_: Markup("<svg></svg>"))  # a second a page, and drawn elsewhere
    source = page_folders.healed_report()
    shown, refused, unnamed = set(), set(), set()
    for path in _paths(source):
        for gone in (True, False):
            report = json.loads(json.dumps(source))
            holder = report
            for key in path[:-1]:
                holder = holder[key]
            if gone:
                del holder[path[-1]]
            else:
                holder[path[-1]] = None
            try:
                folder = make(tmp_path, report)
            except ReportError as error:
                named = re.search(rf"{'.'.join(path)} is (missing|None)", str(error))
                (refused if named else unnamed).add(path)
                continue
            if gone and len(path) == 1:
                Reader(page([folder]))
            shown.add(path)
    assert not unnamed
    for path in (("calibration",), ("word_perplexity",), ("generation",), ("healing",), ("perplexity", "ratio_95")):
        assert path in shown - refused
    for path in (("layers",), ("perplexity",), ("perplexity", "protocol"), ("healing", "validation", "curve")):
        assert path in refused - shown


def test_a_healed_one_of_whose_fit_nothing_is_known_has_a_page(tmp_path):
    report = page_folders.healed_report()
    for name in ("calibration", "forward_pass_seconds", "device"):
        del report[name]
    report |= {"layers": [{"index": 0, "map": "select"}], "seconds": {}}
    words = Reader(page([make(tmp_path, report)])).words
    assert "select in every layer" in words
    assert "Error by layer" not in words


# The comparison


def test_the_comparison_names_the_frontier(tmp_path):
    ours = []
    for name, after, ratio in (("cheap", 0.95, 1.02), ("beaten", 0.94, 1.2), ("dear", 0.9, 1.5)):
        report = page_folders.full_report()
        report["parameters"]["after"] = int(report["parameters"]["before"] * after)
        report["perplexity"] |= {"ratio": ratio, "ratio_95": [ratio - 0.01, ratio + 0.01]}
        ours.append(make(tmp_path, report, name))
    points = [Point(name="SVD <b>", parameters_removed=0.07, ratio=1.1, source="benchmarks")]
    html = page(ours, points=points)
    table = re.search(r"All that is compared.*?</table>", html, re.DOTALL)[0]
    rows = [Reader(row).words.split() for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)[1:]]
    assert {row[0]: row[-1] for row in rows} == {"cheap": "yes", "beaten": "no", "dear": "yes", "SVD": "yes"}
    reader = Reader(html)
    anchors = {attrs["id"] for _, attrs in reader.elements if "id" in attrs}
    links = [attrs["href"][1:] for attrs in reader.tags("a")]
    assert {"m0", "m1", "m2"} <= set(links)
    assert set(links) <= anchors
    assert all("open" in attrs for attrs in reader.tags("details"))  # a printed page hides nothing


def test_ratios_that_were_not_measured_alike_are_called_so(tmp_path):
    same, other = page_folders.full_report(), page_folders.full_report()
    assert "Careful" not in Reader(page([make(tmp_path, same, "a"), make(tmp_path, same, "b")])).words
    other["perplexity"]["protocol"]["context"] = 256
    words = Reader(page([make(tmp_path, same, "a"), make(tmp_path, other, "b")])).words
    assert "Careful: these ratios were measured in windows of different lengths" in words


# As a document


@pytest.mark.parametrize("several", [False, True])
def test_the_page_stands_alone_and_is_well_formed(full, several, tmp_path):
    html = page([full, make(tmp_path, page_folders.exact_report(), "exact")] if several else [full])
    assert len(html.encode()) < 1_000_000
    reader = Reader(html)
    names = {tag for tag, _ in reader.elements}
    assert not names & {"script", "img", "iframe", "object", "embed", "base", "form", "foreignobject"}
    ids = [attrs["id"] for _, attrs in reader.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in reader.elements:
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("href", "src", "xlink:href"):
            assert attrs.get(name, "#").startswith(("#", "data:,"))
    used = re.findall(r'(?:url\(#|href="#)([^")]+)', html)
    assert used
    assert set(used) <= set(ids)
    assert not re.search(r"https?://|@import|@font-face", html)
    metas = {attrs.get("name") or attrs.get("http-equiv"): attrs.get("content") for attrs in reader.tags("meta")}
    assert metas["generator"] == f"qectomy {__version__}"
    assert metas["Content-Security-Policy"].startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")


@pytest.mark.parametrize("several", [False, True])
def test_it_can_be_read_without_seeing_it(full, several, tmp_path):
    html = page([full, make(tmp_path, name="second")] if several else [full])
    reader = Reader(html)
    assert reader.tags("html")[0]["lang"] == "en"
    levels = [int(tag[1]) for tag, _ in reader.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert len(reader.tags("caption")) == len(reader.tags("table")) > 5
    assert all(attrs["scope"] in ("row", "col") for attrs in reader.tags("th"))
    assert all(attrs["role"] == "img" and len(attrs["aria-label"]) > 30 for attrs in reader.tags("svg"))
    assert len(reader.tags("svg")) >= 5


def test_the_same_input_gives_the_same_page(full):
    assert page([full]) == page([full])


def _luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_texts_have_enough_contrast_in_both_schemes(full):
    """WCAG's formula: 4.5 for every colour that letters have, on everything that lies below them."""
    light, dark = re.findall(r":root \{(.*?)\}", page([full]), re.DOTALL)[:2]
    for block in (light, dark):
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
        pairs = [(letters, "paper") for letters in ("ink", "soft", "one", "two", "three", "good", "fair", "poor")]
        pairs += [("ink", below) for below in ("wash", "w1", "w2", "w3", "b1", "b2", "b3")]
        for letters, below in pairs:
            low, high = sorted((_luminance(colours[letters]), _luminance(colours[below])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (letters, below)


# Hostile texts

EVIL = [
    "<script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</svg><img src=x onerror=alert(1)>",
    "\"' onmouseover='alert(1)' x=\"",
    "]]>--><b>",
    "{{ 7 * 7 }}{% raw %}",
    "$\\frac{1}{$ @0@ @12@",
    "a\x00b\x07c\x1b[31m\x85d",
    "lone \ud800 surrogate \udfff",
    "\u202egnp.exe \u2066x",
    "`W_Q` </code>",
    "烏 🐦‍⬛ שלום",
    "x" * 5000,
]


def _infect(value, evil):
    if isinstance(value, dict):
        return {key: _infect(item, evil) for key, item in value.items()}
    if isinstance(value, list):
        return [_infect(item, evil) for item in value]
    return evil if isinstance(value, str) and value not in ("fitted", "exact", "evaluation", "bench") else value


def _comparison_of(text, root):
    """The page of a comparison in which every text of every file, every name and the title is `text`."""
    others = dict(evaluation=page_folders.full_evaluation(), bench=page_folders.full_bench())
    others = {name: _infect(content, text) for name, content in others.items()}
    ours = [
        make(root, _infect(page_folders.healed_report(), text), "healed", **others),
        make(root, _infect(page_folders.exact_report(), text), "exact"),
    ]
    ours = [replace(one, name=clean(f"{text}{place}")) for place, one in enumerate(ours)]
    points = [Point(name=clean(text), parameters_removed=0.1, ratio=1.3, source=clean(text))]
    return page(ours, points=points, title=text)


def _skeleton(html):
    """A page's elements with the names of their attributes, but for those that depend on how long a text is."""
    elements = [(tag, sorted(set(attrs) - {"class"})) for tag, attrs in Reader(html).elements]
    return [one for one in elements if one[0] not in ("code", "sub", "span")]


@pytest.fixture(scope="module")
def harmless(tmp_path_factory):
    return _skeleton(_comparison_of("plain", tmp_path_factory.mktemp("plain")))


@pytest.mark.parametrize("evil", EVIL, ids=lambda evil: ascii(evil[:20]))
def test_texts_stay_texts_wherever_they_stand(evil, harmless, tmp_path, recwarn):
    """The page has the same elements as one of harmless texts, and none that acts."""
    html = _comparison_of(evil, tmp_path)
    html.encode("utf-8")
    assert not [ord(c) for c in html if ord(c) in CONTROLS]
    assert _skeleton(html) == harmless
    for tag, attrs in Reader(html).elements:
        assert tag != "script"
        assert not [name for name in attrs if name.startswith("on")], (tag, attrs)
    assert html.count(str(escape(clean(evil)[:25]))) > 20
    assert not recwarn.list
