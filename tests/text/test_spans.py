"""How much of a text stands in another: counted against sets of word tuples, and kept in a sketch of bounded size."""

import json
import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from page_folders import exact_report, full_report, healed_report

from qectomy.eval.evaluate import fitted_on
from qectomy.record.reduced import Exact, Fitted, Spans
from qectomy.record.texts import Overlap
from qectomy.report.text_words import text_doubt
from qectomy.text.overlap import KEPT, WORDS, FittedSpans, Sketch, overlap, span_hashes

DICE = random.Random(0)
VOCABULARY = [f"word{i}" for i in range(500)]
LONG = [" ".join(DICE.choices(VOCABULARY, k=12)) for _ in range(5000)]  # 60,000 words in lines
OTHER = "\n".join(" ".join(DICE.choices(VOCABULARY, k=12)) for _ in range(500))


def sketch(*texts):
    found = FittedSpans("", Sketch())
    for text in texts:
        found.add(text)
    return Sketch.of_record(json.loads(json.dumps(found.record()["fitted_spans"])))


def share(measured, *texts):
    return overlap(measured, sketch(*texts))["share"]


@given(words=st.lists(st.sampled_from("ab"), max_size=80), others=st.lists(st.sampled_from("ab"), max_size=80))
def test_the_share_is_that_of_equal_tuples_of_words(words, others):
    tuples = [[tuple(text[i : i + WORDS]) for i in range(len(text) - WORDS + 1)] for text in (words, others)]
    hashes = span_hashes(" ".join(words))
    assert len(hashes) == len(tuples[0])
    assert len(np.unique(hashes)) == len(set(tuples[0]))
    wanted = np.mean([entry in set(tuples[1]) for entry in tuples[0]]) if tuples[0] else None
    assert share(" ".join(words), " ".join(others)) == wanted


def test_spaces_line_ends_and_offsets_do_not_matter():
    text = "\n".join(LONG)
    for measured in ("\r\n".join(LONG[200:900]), "  \t".join(LONG[200:900]), "more before " + " ".join(LONG[200:900])):
        assert share(measured, text) > 0.99
    paragraphs = ["\n".join(LONG[at : at + 20]) for at in range(200, 900, 20)]
    random.Random(1).shuffle(paragraphs)
    assert 0.85 < share("\n".join(paragraphs), text) < 0.97  # but for the spans across two of them
    assert share(OTHER, text) == 0
    assert 0.4 < share(OTHER + "\n" + "\n".join(LONG[:500]), text) < 0.6


def test_languages_without_spaces():
    text = "".join(DICE.choices("日月火水木金土山川田人口目耳手足力出入立休先夕本文字学校村町森正生青赤", k=3000))
    assert len(span_hashes(text)) == 3000 - WORDS + 1
    assert share(text[500:900], text) == 1


def test_a_sketch_is_bounded_and_says_what_it_compared():
    found = sketch("\n".join(LONG))
    assert len(found.hashes) == KEPT
    record = found.record()
    assert len(json.dumps(record)) < 60_000
    told = overlap("\n".join(LONG[:2500]), found)
    assert told["share"] == 1
    every = len(span_hashes("\n".join(LONG[:2500])))
    assert told["spans"] == pytest.approx(every * KEPT / len(span_hashes("\n".join(LONG))), rel=0.1)
    assert overlap(OTHER, found)["share"] == 0


def test_sketches_join_to_that_of_both_texts():
    halves = "\n".join(LONG[:2500]), "\n".join(LONG[2500:])
    one, other = sketch(halves[0]), sketch(halves[1])
    joined, both = one.joined(other.hashes, other.below), sketch(*halves)
    assert np.array_equal(joined.hashes, both.hashes)
    assert joined.below == both.below
    assert joined.complete
    assert not one.joined(other.hashes, complete=False).complete


def test_what_is_fitted_now_is_compared_whole_and_with_what_was_fitted_before():
    earlier = sketch("\n".join(LONG))
    found = FittedSpans(OTHER, earlier)
    assert found.record()["overlap"]["share"] == 0
    found.add(OTHER)
    assert found.record()["overlap"]["share"] == 1
    assert overlap(OTHER, Sketch.of_record(found.record()["fitted_spans"]))["share"] == 1
    unknown = FittedSpans(OTHER, None)
    unknown.add("\n".join(LONG))
    assert unknown.record()["overlap"] == {"share": 0, "spans": len(span_hashes(OTHER)), "words": 20, "complete": False}
    assert not unknown.record()["fitted_spans"]["complete"]


def test_what_was_validated_on_is_found_and_told_apart():
    found = FittedSpans("", Sketch())
    found.add("\n".join(LONG))
    found.add(OTHER, validation=True)
    kept = Sketch.of_record(json.loads(json.dumps(found.record()["fitted_spans"])))
    told = overlap(OTHER, kept)
    assert (told["share"], told["validation_share"]) == (0, 1)
    assert overlap("\n".join(LONG), kept)["validation_share"] == 0
    again = FittedSpans("", kept)  # healed once more
    again.add("other words " * 50, validation=True)
    assert overlap(OTHER, Sketch.of_record(again.record()["fitted_spans"]))["validation_share"] == 1
    assert "validation_share" not in overlap(OTHER, sketch(OTHER))
    for damaged in ("x", 3, {"words": 20}, {**Sketch().record(), "below": -1}):
        kept = Sketch.of_record(found.record()["fitted_spans"] | {"validation": damaged})
        assert kept is None or "validation_share" not in overlap(OTHER, kept)


def test_the_texts_of_earlier_healings_count():
    report = Fitted.model_validate(healed_report())
    earlier = report.healing.model_copy(deep=True)
    report.calibration.texts[0].sha256, report.healing.texts[0].sha256, earlier.texts[0].sha256 = "abc"
    report.healing.earlier = earlier
    assert report.fitted_hashes == set("abc")
    assert Exact.model_validate(exact_report()).fitted_hashes == set()


def test_a_report_without_a_sketch_tells_nothing():
    assert fitted_on(None) is None
    assert fitted_on(Exact.model_validate(exact_report())).complete
    fitted = Fitted.model_validate(full_report())
    assert fitted_on(fitted) is None
    fitted.fitted_spans = Spans(**sketch(OTHER).record())
    assert fitted_on(fitted).hashes.tolist() == sketch(OTHER).hashes.tolist()
    for damaged in (None, [], {"words": 20}, {**Sketch().record(), "hashes": "x"}, {**Sketch().record(), "below": -1}):
        assert Sketch.of_record(damaged) is None
    assert Sketch.of_record({**sketch(OTHER).record(), "hashes": "AAAA"}) is None
    assert overlap(OTHER, None) == {"share": None, "spans": 0, "words": 20, "complete": False}


@pytest.mark.parametrize(
    "found, was_fitted, digest, holds, words",
    [
        ({"share": 0.0, "spans": 500}, False, "b", True, "none of those fitted or trained on: 0.0% of 500 spans of 20"),
        ({"share": 0.009, "spans": 100}, False, "b", True, "none of those"),
        ({"share": 0.01, "spans": 100}, False, "b", False, "1% of the measured text stands in text that was fitted or"),
        ({"share": 0.996, "spans": 40, "complete": False}, False, "b", False, "100% of the measured text stands in"),
        ({"share": 0.0, "spans": 99}, False, "b", None, "is not known: only 99 spans of 20 words could be compared"),
        ({"share": None, "spans": 0}, False, "b", None, "is not known: only 0 spans"),
        ({"share": 0.0, "spans": 500, "complete": False}, False, "b", None, "is not recorded by its content"),
        ({}, False, "b", None, "is not recorded by its content"),
        ({"share": 0.0, "spans": 500}, False, "a", False, "another part of a text that was fitted on"),
        ({"share": 0.0, "spans": 500}, True, "b", False, "was fitted on, which flatters"),
        (
            {"share": 0.0, "spans": 500, "fitted_text": True},
            False,
            "b",
            False,
            "another part of a text that was fitted",
        ),
        (
            {"share": 0.0, "spans": 500, "validation_share": 0.01},
            False,
            "b",
            False,
            "1% of the measured text stands in",
        ),
        ({"share": 0.0, "spans": 500, "validation_share": 0.0}, False, "b", True, "none of those fitted"),
    ],
)
def test_the_words_go_by_the_share_and_by_what_was_compared(found, was_fitted, digest, holds, words):
    report = Fitted.model_validate(full_report())
    report.calibration.texts[0].sha256 = "a"
    protocol = report.perplexity.protocol.model_copy(update={"text_sha256": digest, "fitted_on": was_fitted})
    protocol.overlap = Overlap(**{"complete": True, "words": 20, **found}) if found else None
    doubt = text_doubt(protocol, report)
    assert doubt[0] is holds
    assert words in doubt[1]
    report.calibration = protocol.overlap = protocol.fitted_on = None
    assert text_doubt(protocol, report)[0] is None
    assert text_doubt(protocol) is None


def test_hashes_have_no_pattern():
    """The smallest are a fair sample: hashes of neighbours are spread evenly."""
    hashes = span_hashes(" ".join(LONG)) / 2.0**48
    assert abs(hashes.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(hashes[:-1], hashes[1:])[0, 1]) < 0.02
    assert all(
        abs(np.mean((hashes >= low) & (hashes < high)) - 0.1) < 0.01 for low, high in pairwise(np.arange(11) / 10)
    )
