"""The model card's metadata is what the Hub takes, and nothing that it carries over can break it."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conversions import convert_tiny, reload_here
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from page_folders import healed_report

from qectomy.checkpoint.checkpoint import Checkpoint, open_checkpoint
from qectomy.conversion.exact import convert_exact
from qectomy.conversion.settings import ConvertSettings
from qectomy.record.healing import Healing
from qectomy.record.reduced import read_reduced
from qectomy.record.scores import Change
from qectomy.report.model_card import model_card


@pytest.fixture(scope="module")
def converted(tiny_checkpoint, raven, tmp_path_factory):
    """(report, source) of one conversion."""
    source = tiny_checkpoint("gpt2")
    out = tmp_path_factory.mktemp("card") / "out"
    command = "qectomy convert it --out there"
    convert_tiny(source, out, "0=key-shared,1=select", raven, command=command)
    return read_reduced(out / "qectomy.json"), open_checkpoint(source)


@pytest.fixture
def report(converted):
    return converted[0].model_copy(deep=True)


@pytest.fixture
def made(converted, tmp_path):
    """A function (README of the source or None, path of the source's folder) -> the source, opened from there."""

    def make(card: str | bytes | None = None, folder: str = "local", licence: bool = False) -> Checkpoint:
        path = Path(shutil.copytree(converted[1].folder, tmp_path / folder))
        if card is not None:
            (path / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
        if licence:
            (path / "LICENSE").write_text("terms")
        return open_checkpoint(path)

    return make


SNAPSHOT = "hub/models--some-org--Model-1.7b_x/snapshots/0123abcd"


def load(card: str, tmp_path: Path) -> ModelCard:
    """The card as the Hub's own library reads it from a folder."""
    (tmp_path / "card.md").write_text(card, encoding="utf-8")
    return ModelCard.load(tmp_path / "card.md")


def fields(report, source) -> dict:
    return yaml.safe_load(model_card(report, source).split("---\n", 2)[1])


def body(card: str) -> str:
    return card.split("\n---\n", 1)[1]


def test_the_hub_reads_the_metadata(report, made, tmp_path):
    source = made("---\nlicense: apache-2.0\nlanguage: [en, de]\ntags: [theirs]\n---\n# Theirs\n", SNAPSHOT)
    card = load(model_card(report, source), tmp_path)
    assert {key: value for key, value in card.data.to_dict().items() if key != "model-index"} == {
        "base_model": "some-org/Model-1.7b_x",
        "base_model_relation": "finetune",
        "language": ["en", "de"],
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["qectomy", "query-free-attention"],
    }
    assert "Made from [some-org/Model-1.7b_x](https://huggingface.co/some-org/Model-1.7b_x)." in card.text
    assert "That of the original, whose card says `apache-2.0`. Its terms" in card.text


def test_the_measured_results_are_a_model_index(report, made, tmp_path):
    report.word_perplexity = Change(before=800.5, after=900.25)
    card = load(model_card(report, made()), tmp_path)
    name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "local without W_Q"
    assert {result.metric_type: result.metric_value for result in results} == {
        "perplexity": report.perplexity.after,
        "perplexity_ratio": report.perplexity.ratio,
        "word_perplexity": 900.25,
        "bits_per_byte": report.bits_per_byte.after,
        "kl_divergence": report.kl,
        "top1_agreement": report.top1_agreement,
    }
    protocol = report.perplexity.protocol
    for result in results:
        assert (result.task_type, result.dataset_type, result.dataset_name) == ("text-generation", "text", "raven.txt")
        assert result.dataset_args == {
            "sha256": protocol.text_sha256,
            "context": 32,
            "stride": 32,
            "scored_tokens": protocol.scored_tokens,
            "dtype": "float32",
        }
        assert not result.verified
    assert card.data.eval_results == results


@pytest.mark.parametrize(
    "text, expected",
    [
        ("raven.txt", ("text", None, None)),
        ("wiki:x.txt", ("text", None, None)),
        ("Salesforce/wikitext:wikitext-2-raw-v1:test", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")),
        ("org/set", ("org/set", None, "train")),
        ("../no id/at all", ("text", None, None)),
    ],
)
def test_a_dataset_of_the_hub_is_named_as_one(report, made, text, expected):
    report.perplexity.protocol.text = text
    ((_, results),) = [model_index_to_eval_results(fields(report, made())["model-index"])]
    found = results[0]
    assert (found.dataset_type, found.dataset_config, found.dataset_split) == expected
    assert found.dataset_name == text


def test_exact_ones(tiny_checkpoint, raven, tmp_path, made, monkeypatch):
    """No relation of the Hub's is true of them; without a text there is nothing measured."""
    reload_here(monkeypatch)
    for text, name in ((None, "bare"), (str(raven), "measured")):
        settings = ConvertSettings(eval_text=text, eval_tokens=160, context=32)
        report = convert_exact(open_checkpoint(tiny_checkpoint("gpt2")), tmp_path / name, settings)
        found = fields(report, made("---\nlicense: mit\n---\n", f"{name}-{SNAPSHOT}"))
        assert ("model-index" in found) == (text is not None)
        assert found["tags"] == ["qectomy"]
        assert (found["base_model"], found["license"]) == ("some-org/Model-1.7b_x", "mit")
        assert "base_model_relation" not in found
        written = load((tmp_path / name / "README.md").read_text(), tmp_path)
        assert "Exact means up to rounding" in written.text
        assert "Perplexity is a mean" not in written.text
        assert "base_model" not in written.data.to_dict()


@pytest.mark.parametrize("folder", ["local", "gpt2", "hub/models--a--b--c--d/snapshots/x", "models--a--b/blobs/x"])
def test_the_name_of_a_local_folder_is_no_hub_id(report, made, tmp_path, folder):
    """Nor is what its config says that it was saved from."""
    source = made(None, folder)
    source.config["_name_or_path"] = "some-org/other"
    card = load(model_card(report, source), tmp_path)
    assert "base_model" not in card.data.to_dict()
    assert "base_model_relation" not in card.data
    assert f"Made from a local folder, `{source.name}`; which model of the Hub that is, if any, is not" in card.text


@pytest.mark.parametrize("name, expected", [("org/model", "org/model"), ("org/mo`del", None), ("gpt2", None)])
def test_a_name_with_an_organisation_is_a_hub_id(report, made, name, expected):
    """As `heal` gives it, whose original may lie in any folder."""
    assert fields(report, replace(made(), name=name)).get("base_model") == expected


def test_of_another_teacher_only_the_originals_name_is_told(report, made):
    source = replace(made("---\nlicense: mit\n---\n", "hub/models--a--teacher/snapshots/x"), name="org/original")
    assert fields(report, source)["license"] == "mit"
    report.healing = Healing.model_validate(healed_report()["healing"] | {"teacher_is_source": False})
    found = fields(report, source)
    assert found["base_model"] == "org/original"
    assert "license" not in found


@pytest.mark.parametrize(
    "front, expected",
    [
        ("license: [mit, apache-2.0]", {"license": ["mit", "apache-2.0"]}),
        ("license: [mit]", {"license": "mit"}),
        ("license: other\nlicense_name: my terms-1.0", {"license": "other", "license_name": "my terms-1.0"}),
        ("license_link: https://x.org/a?b=c", {"license_link": "https://x.org/a?b=c"}),
        ("license_link: LICENSE", {"license_link": "LICENSE"}),
        ("license_link: NOTICE", {}),  # is not there
        ("license_link: javascript:x", {}),
        ("license_link: ../../etc/passwd", {}),
        ("license_link: 'https://x.org/)[y](z'", {}),
        ("language: no", {"language": "no"}),
        ("language: [en, 7, 'zh-Hant', '../x', [de]]", {"language": ["en", "zh-Hant"]}),
        ("license: 'MIT licence, or so'", {}),
        ('license: "mit\\n---\\nx: y"', {}),
        ("license: {a: b}", {}),
        ("license: 2026-01-01", {}),
        ("license: mit\nlicense_name: '<b>x</b>'\nlanguage: 1.5", {"license": "mit"}),
        ("license: mit\nmodel-index: [{name: 7}]\neval_results: 3", {"license": "mit"}),
        (f"license: {'a' * 300}", {}),
    ],
)
def test_what_is_carried_over_has_the_hubs_form(report, made, tmp_path, front, expected):
    source = made(f"---\n{front}\n---\n# Theirs\n", licence=True)
    carried = ("license", "license_name", "license_link", "language")
    found = load(model_card(report, source), tmp_path).data.to_dict()
    assert {key: found[key] for key in carried if key in found} == expected


def test_a_licence_file_that_stays_behind_is_linked(report, made):
    card = "---\nlicense: other\nlicense_name: llama-x\nlicense_link: TERMS.md\n---\n"
    source = made(card, SNAPSHOT)
    link = "https://huggingface.co/some-org/Model-1.7b_x/blob/main/TERMS.md"
    assert fields(report, source)["license_link"] == link
    assert f"whose card says `llama-x` ([text](<{link}>))." in model_card(report, source)


BROKEN = [
    b"---\nlicense: [mit\n---\n",
    b"---\nlicense: mit\n",
    b"---\n- a list\n---\n",
    b"---\n7: 8\nlicense: mit\n---\n",
    b"---\nignore_metadata_errors: true\nself: x\nlicense: mit\n---\n",
    b"---\n&a [*a]\n---\n",
    b"---\nlicense: !!python/object/apply:os.system ['exit 1']\n---\n",
    b"---\n" + b"[" * 20_000 + b"\n---\n",
    b"---\nlicense: mit\n" + b"x" * 300_000 + b": 1\n---\n",
    b"\xff\xfe\x00---\nlicense: \xc3\x28\n---\n",
    b"No block at all\n---\nlicense: mit\n---\n",
    b"---\n---\n",
    b"",
]


@pytest.mark.parametrize("card", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_card_counts_as_none(report, made, tmp_path, card):
    found = load(model_card(report, made(card)), tmp_path)
    assert "license" not in found.data.to_dict()
    assert "Not known: the original came without a card that names one." in found.text


def test_a_card_that_is_no_file(report, made, tmp_path):
    source = made()
    os.mkfifo(source.folder / "README.md")  # reading it would wait for ever
    assert "license" not in fields(report, source)
    (source.folder / "README.md").unlink()
    (source.folder / "README.md").symlink_to(tmp_path / "nowhere")
    assert "license" not in fields(report, source)


@pytest.mark.parametrize("start", ["\ufeff---\n", "---\r\n", "\n---\n"])
def test_other_line_ends_and_marks(report, made, start):
    end = "\r\n" if "\r" in start else "\n"
    assert fields(report, made(f"{start}license: mit{end}---{end}text{end}"))["license"] == "mit"


HOSTILE = [
    "a`b\n---\nlicense: evil",
    "[link](javascript:x)",
    "<script>alert(1)</script>",
    "<!-- x",
    "a --- b",
    "---",
    'quote " back \\ slash',
    "it's: {a: b} # c",
    "tab\tnul-ish \x07",
    "\u2028---\x85---",
    "é 烏 🐦‍⬛",
    "# h",
    "- x",
    "*&!%@",
    "null",
    "| a | b |",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_names(converted, report, name, tmp_path):
    """A folder, a text and a command may be called anything; the card's structure stays."""
    plain = load(model_card(report, converted[1]), tmp_path)
    report.perplexity.protocol.text = name
    report.command = f"qectomy convert '{name}' --text '```\n# not a heading'"
    written = model_card(report, replace(converted[1], name=name))
    card = load(written, tmp_path)
    assert card.data.to_dict().keys() == plain.data.to_dict().keys()
    shown = " ".join("".join(" " if c in "\n\t\x07\x85\u2028" else c for c in name).split())
    assert card.data.eval_results[0].dataset_name == shown
    assert card.data.model_name == f"{shown} without W_Q"
    lines, expected = card.text.splitlines(), plain.text.splitlines()
    for start in ("#", "```", "|", "-", "---", "<"):
        assert sum(line.startswith(start) for line in lines) == sum(line.startswith(start) for line in expected), start
    heading = next(line for line in lines if line.startswith("# "))
    for mark in "`<>[]*_|&#":
        bare = heading.removeprefix("# ").removesuffix("without W_Q").replace(f"\\{mark}", "")
        assert mark not in bare, mark


def test_what_moved_is_a_table_of_every_layer(report, made):
    report.layers[1].map = "dense"
    report.layers[1].moved = {"W_K": 0.0, "W_V": 0.0, "W_O": 0.0081, "W_down": 0.55, "b_O": 0.03}
    card = body(model_card(report, made()))
    assert "| 1 | dense | 0 % | 0 % | 0.81 % | 55 % | b\\_O 3.0 % |" in card
    assert len([line for line in card.splitlines() if line.startswith(("| 0 | key-shared", "| 1 |"))]) == 2
    assert "refitted to them in closed form, also in layers that keep their W_Q (`dense`)." in " ".join(card.split())
    report.layers[1].map, kept = "key-shared", report.layers[1].map
    other = " ".join(model_card(report, made(folder="reduced")).split())
    assert "refitted to them in closed form. " in other
    assert "of dense layers too" not in other
    report.layers[1].map = kept
    assert "b_O of a reduced layer also takes in the bias of its values" in " ".join(card.split())
    assert "--no-refit they stay" in " ".join(card.split())
    report.calibration.refit = False
    card = model_card(report, made(folder="left"))
    assert "layer by layer; nothing else was fitted." in card
    assert "refitted to them" not in card
    for layer in report.layers:
        layer.moved = None
    assert "What moved" not in model_card(report, made(folder="older"))


def test_what_an_adapter_can_be_trained_on_is_named(report, made, tiny_checkpoint):
    """By the names that tests/modeling/test_adapters.py gives to PEFT."""
    assert "its attention has `c_attn`, `c_proj`, which" in body(model_card(report, made()))
    llama = model_card(report, open_checkpoint(tiny_checkpoint()))
    assert "its attention has `k_proj`, `v_proj`, `o_proj`, which" in body(llama)


def test_limits_and_interval_in_plain_words(report, made):
    card = body(model_card(report, made()))
    for heading in ("## Load it", "## Limits", "## Licence", "## Made by"):
        assert card.count(f"\n{heading}\n") == 1
    assert "qectomy eval ORIGINAL PATH --text YOURS.txt --reference ORIGINAL" in card
    assert "before you serve this" in card
    report.perplexity.ratio_95 = None  # of a single window
    assert "confidence" not in model_card(report, made(folder="once"))
    report.perplexity.ratio_95 = [1.25, 1.5]
    assert "; 1.250 to 1.500 with 95 % confidence)" in model_card(report, made(folder="again"))
