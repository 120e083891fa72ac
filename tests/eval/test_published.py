"""Published protocols on local stand-ins, each against a loop written from the papers' code or the harness itself."""

import json
import math
import re

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks.wikitext import preprocess_wikitext
from tiny_models import RAVEN, bos_tokenizer
from transformers import AutoModelForCausalLM

from qectomy.errors import CheckpointError, QectomyError, TextError
from qectomy.eval.evaluate import Measure, evaluate, evaluate_all, settle
from qectomy.eval.protocol import Protocol
from qectomy.eval.published import PUBLISHED, detokenized, read_text, rolling_spans

LINES = ["", " = Raven = \n", "", *[f' {line} , said it @-@ and : " so " \n' for line in RAVEN.splitlines()], ""]
PAGES = [" = The Raven = \n \n" + RAVEN[:700].replace(",", " ,"), RAVEN[700:740], RAVEN * 2, "x"]


def write_rows(path, rows, field):
    if path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.table({field: rows}), path)
    else:
        path.write_text("".join(json.dumps({field: row}) + "\n" for row in rows))
    return path


@pytest.fixture(params=["plain", "bos"])
def model(request, tiny_copy):
    """A folder whose tokenizer starts a text with BOS, or not."""
    folder = tiny_copy()
    if request.param == "bos":
        bos_tokenizer().save_pretrained(folder)
    return folder


def loaded(folder):
    from transformers import AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".txt"])
@pytest.mark.parametrize("name", ["wikitext2-2048", "wikitext2-1024"])
def test_joined_windows_are_those_of_gptq(name, suffix, model, tmp_path, monkeypatch):
    """The loop of GPTQ's and SliceGPT's evaluation: join, tokenize, cut, mean of the windows' mean losses."""
    chosen = PUBLISHED[name]
    length = chosen.context // 16
    monkeypatch.setitem(PUBLISHED, name, type(chosen)(chosen.dataset, length, chosen.windows, chosen.lines))
    path = tmp_path / f"test{suffix}"
    path.write_text("".join(line or " \n" for line in LINES)) if suffix == ".txt" else write_rows(path, LINES, "text")
    causal, tokenizer = loaded(model)
    ids = tokenizer("\n\n".join(LINES), return_tensors="pt").input_ids
    losses = []
    for i in range(ids.numel() // length):
        batch = ids[:, i * length : (i + 1) * length]
        with torch.no_grad():
            logits = causal(batch).logits[:, :-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits[0], batch[0, 1:]) * length)
    expected = math.exp(torch.stack(losses).sum() / (len(losses) * length))
    found = evaluate(str(model), read_text(str(path), name), settle(name, None, None, None, [str(model)]))
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    protocol = found.protocol
    assert protocol.name == name
    assert protocol.windows == len(losses) > 3
    assert protocol.bos == ("at the start of the text" if ids[0, 0] == tokenizer.bos_token_id else "none")


def harness(folder, documents, length):
    """Log-likelihood of each document by lm-evaluation-harness, in nats."""
    causal, tokenizer = loaded(folder)
    lm = HFLM(pretrained=causal, tokenizer=tokenizer, batch_size=3, max_length=length)
    requests = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0, metadata=("t", i, 1))
        for i, text in enumerate(documents)
    ]
    return lm.loglikelihood_rolling(requests, disable_tqdm=True)


@pytest.mark.parametrize("length", [16, 33, 128])
def test_rolling_windows_are_those_of_the_harness(length, model, tmp_path):
    path = write_rows(tmp_path / "pages.jsonl", PAGES, "page")
    found = evaluate(str(model), read_text(str(path), "rolling"), settle("rolling", length, None, None, [str(model)]))
    nats = -sum(harness(model, PAGES, length))
    n_bytes, n_words = (
        sum(map(count, PAGES)) for count in (lambda p: len(p.encode()), lambda p: len(re.split(r"\s+", p)))
    )
    assert found.bits_per_byte == pytest.approx(nats / n_bytes / math.log(2), rel=1e-5)
    assert found.word_perplexity == pytest.approx(math.exp(nats / n_words), rel=1e-4)
    assert found.protocol.documents == len(PAGES)


def test_pages_of_wikitext_are_detokenized_and_counted_as_they_stand(model, tmp_path):
    path = write_rows(tmp_path / "pages.jsonl", PAGES, "page")
    name = "lm-eval-wikitext"
    found = evaluate(str(model), read_text(str(path), name), settle(name, 64, None, None, [str(model)]))
    docs = [{"page": page} for page in PAGES]
    loglikelihoods = harness(model, [preprocess_wikitext.wikitext_detokenizer(doc) for doc in docs], 64)
    results = [preprocess_wikitext.process_results(doc, [ll]) for doc, ll in zip(docs, loglikelihoods, strict=True)]
    for metric, mine in (("word_perplexity", found.word_perplexity), ("bits_per_byte", found.bits_per_byte)):
        nats, weight = (sum(column) for column in zip(*[result[metric] for result in results], strict=True))
        theirs = math.exp(-nats / weight) if metric == "word_perplexity" else -nats / weight / math.log(2)
        assert mine == pytest.approx(theirs, rel=1e-4 if metric == "word_perplexity" else 1e-5)
    assert detokenized(PAGES[0]) != PAGES[0]


def test_windows_default_to_what_the_model_was_made_for(tiny_checkpoint):
    name = str(tiny_checkpoint("gpt2"))  # 128 positions
    assert settle("rolling", None, None, None, [name]).context == 128
    assert settle("wikitext2-1024", None, None, None, [name]).context == 1024


def test_rows_of_a_document():
    """Every token once; the last window is as long as the others, its start read again."""
    for context in (1, 3, 4, 10, 99):
        scored = []
        for start, stop, seen in rolling_spans(10, context):
            assert stop - start <= context + 1
            scored += range(start + max(1, seen), stop)
        assert scored == list(range(1, 11))
    assert rolling_spans(10, 4, at=100) == [(100, 105, 0), (104, 109, 1), (106, 111, 3)]
    assert rolling_spans(0, 4) == []


def test_a_text_is_cut_after_whole_documents(model, tmp_path):
    path = write_rows(tmp_path / "pages.jsonl", PAGES, "page")
    found = evaluate(str(model), read_text(str(path), "rolling"), settle("rolling", 64, None, 300, [str(model)]))
    assert found.protocol.documents == 1
    assert found.protocol.only_first_tokens == 300


def test_rows_end_where_datasets_ends_them(tmp_path):
    """Not where Unicode sees the end of a line: each row too many would add a blank line to the text."""
    (tmp_path / "wiki.txt").write_bytes("one\u2028two\x0cthree\x85\x1cfour\r\n \n\nlast".encode())
    found = read_text(str(tmp_path / "wiki.txt"), "wikitext2-1024").documents
    assert found == ("one\u2028two\x0cthree\x85\x1cfour\n", "", "", "last")


def test_what_a_model_or_a_share_of_the_text_cannot_do(tiny_checkpoint, tmp_path):
    (tmp_path / "raven.txt").write_text(RAVEN * 9)
    name = str(tiny_checkpoint("gpt2"))  # 128 positions
    for protocol, message in (
        (Protocol(name="wikitext2-2048", context=2048), r"has 128 positions; it can be measured by another one"),
        (Protocol(name="rolling", context=64, tokens=50), r"--tokens 50: documents are scored whole, and the first"),
    ):
        with pytest.raises(TextError, match=message):
            evaluate_all([name], str(tmp_path / "raven.txt"), Measure(protocol=protocol))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("wikitext3", None, None), r"unknown --protocol 'wikitext3'; known: wikitext2-2048, .*rolling"),
        (("wikitext2-2048", 512, None), r"means windows of 2048 tokens; leave --context out"),
        (("rolling", None, 5), r"leave --stride out"),
    ],
)
def test_what_a_published_protocol_does_not_leave_open(arguments, message, tiny_checkpoint):
    with pytest.raises(QectomyError, match=message):
        settle(*arguments, None, [str(tiny_checkpoint())])


@pytest.mark.parametrize("name", ["rolling", "wikitext2-1024"])
def test_a_tokenizer_that_fails_is_a_fault_of_the_checkpoint(tmp_path, name):
    class Failing:
        bos_token_id = 0
        is_fast = True

        def __call__(self, text, **_):
            raise ValueError("no merges")

        def decode(self, ids):
            return "<s>"

    (tmp_path / "raven.txt").write_text(RAVEN)
    text = read_text(str(tmp_path / "raven.txt"), name)
    with pytest.raises(CheckpointError, match="tokenizer cannot read the text: no merges"):
        PUBLISHED[name].windows(Failing(), text, Protocol(context=16, name=name), 320)


def test_texts_that_cannot_be(tmp_path, model):
    with pytest.raises(TextError, match="rolling is measured on a text of your own: give --text"):
        read_text(None, "rolling")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(TextError, match="holds no text"):
        read_text(str(tmp_path / "empty.txt"), "wikitext2-2048")
    (tmp_path / "short.txt").write_text("Nevermore.")
    with pytest.raises(TextError, match=r"fewer than one window of 2048"):
        evaluate_all(
            [str(model)], str(tmp_path / "short.txt"), Measure(protocol=Protocol(name="wikitext2-2048", context=2048))
        )
