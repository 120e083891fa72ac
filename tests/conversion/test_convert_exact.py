"""`convert --query exact` as a whole: what it writes, what it reports, what it refuses."""

import json

import pytest
import torch
from conversions import hashes, measured, reload_here
from damage import edit_weights
from tiny_models import save_variant
from transformers import AutoModelForCausalLM

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.conversion.exact import convert_exact, dry_run_exact
from qectomy.conversion.settings import ConvertSettings
from qectomy.errors import QectomyError, QueryMapError, TextError
from qectomy.models.query_maps import parse_exact
from qectomy.record.reduced import Sizes

NORM_FREE = dict(norms=False, mlp_skip=False)


@pytest.fixture(autouse=True)
def _reload_here(monkeypatch):
    reload_here(monkeypatch)


def run(source, out, **settings):
    kept = settings.pop("kept", frozenset())
    return convert_exact(open_checkpoint(source), out, ConvertSettings(**settings), kept)


@pytest.mark.parametrize("shape", ["gpt2", "llama", "biases", "mistral", "qwen2", "sharded"])
def test_the_report_tells_what_lies_in_the_folder(shape, tiny_checkpoint, raven, tmp_path):
    source = tiny_checkpoint(shape)
    before = hashes(source)
    report = run(source, tmp_path / "out", eval_text=str(raven), eval_tokens=160, context=32)
    assert hashes(source) == before
    assert json.loads((tmp_path / "out/qectomy.json").read_text()) == report.as_dict()
    old, new = open_checkpoint(source), open_checkpoint(tmp_path / "out", reduced=True)
    assert report.parameters == Sizes(before=old.parameters, after=new.parameters)
    assert report.bytes == Sizes(before=old.nbytes, after=new.nbytes)
    assert new.parameters < old.parameters
    assert report.method == "exact"
    assert [layer.map for layer in report.layers] == [str(spec) for spec in new.recipe]
    assert report.perplexity.before == pytest.approx(measured(source, raven), rel=1e-5)
    assert report.perplexity.after == pytest.approx(measured(tmp_path / "out", raven), rel=1e-5)
    assert report.perplexity.ratio == pytest.approx(1, abs=1e-4)
    assert report.top1_agreement == 1
    assert 0 < report.logit_error < 1e-5
    card = (tmp_path / "out/README.md").read_text()
    assert "folded exactly" in card
    assert "Nothing was fitted" in card
    assert (tmp_path / "out/tokenizer.json").is_file()


def test_no_text_is_needed(tiny_checkpoint, tmp_path):
    report = run(tiny_checkpoint(), tmp_path / "out")
    assert report.perplexity is None
    assert "on random tokens" in (tmp_path / "out/README.md").read_text()
    assert 0 < report.logit_error < 1e-5


def test_a_narrow_dtype_says_what_it_costs(tiny_checkpoint, tmp_path, raven):
    source = tiny_checkpoint()
    options = dict(eval_text=str(raven), eval_tokens=160, context=32)
    whole = run(source, tmp_path / "whole", **options)
    half = run(source, tmp_path / "half", dtype="float16", **options)
    assert half.bytes.after < 0.6 * whole.bytes.after
    assert half.logit_error > 100 * whole.logit_error


def test_layers_can_be_left_whole(tmp_path):
    source = save_variant(tmp_path / "source", "gpt2", **NORM_FREE)
    report = run(source, tmp_path / "out", kept=frozenset({1}))
    assert [(layer.map, layer.value_map, layer.how) for layer in report.layers] == [
        ("identity", "gauge", "exact"),
        ("dense", "dense", "kept"),
    ]
    old, new = open_checkpoint(source), open_checkpoint(tmp_path / "out", reduced=True)
    assert new.tensors["transformer.h.1.attn.c_attn.weight"].shape == (32, 96)
    assert torch.allclose(logits(old.folder), logits(new.folder), rtol=1e-9, atol=1e-9)


def logits(folder):
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)(input_ids=tokens).logits


def test_a_tie_is_broken_only_where_that_pays(tmp_path):
    few = save_variant(tmp_path / "few", "llama", norms=False, tie_word_embeddings=True, vocab_size=24, pad_token_id=2)
    report = run(few, tmp_path / "untied")
    assert report.tie == "broken"
    assert not json.loads((tmp_path / "untied/config.json").read_text())["tie_word_embeddings"]
    assert "lm_head.weight" in open_checkpoint(tmp_path / "untied", reduced=True).tensors
    many = save_variant(tmp_path / "many", "llama", norms=False, tie_word_embeddings=True)
    report = run(many, tmp_path / "tied")
    assert report.tie == "kept"
    assert "breaks the tie of embedding and head, which costs 10,240 parameters" in report.layers[0].reason


def test_the_dry_run_is_the_plan(tmp_path):
    source = save_variant(tmp_path / "source", "llama", **NORM_FREE)
    plan = dry_run_exact(open_checkpoint(source), ConvertSettings())
    report = run(source, tmp_path / "out")
    assert plan.dry_run
    for key in ("layers", "tie", "parameters", "bytes", "query_parameters"):
        assert getattr(plan, key) == getattr(report, key)


def test_what_is_refused_leaves_nothing(tiny_copy, tmp_path, raven):
    source = save_variant(tmp_path / "source", "llama", **NORM_FREE)
    name = "model.layers.1.self_attn.q_proj.weight"
    edit_weights(source, lambda tensors: tensors[name][:, 3].zero_())
    with pytest.raises(QueryMapError, match=r"layer 1: W_Q is singular.*--query 0=exact,1=dense"):
        run(source, tmp_path / "out")
    narrow = tiny_copy(
        "gpt2", num_attention_heads=32
    )  # whose blocks are no more numbers than the channels they stand at
    with pytest.raises(QueryMapError, match="nothing of this checkpoint goes exactly"):
        run(narrow, tmp_path / "out")
    learned = tiny_copy("gpt2-untied")
    with pytest.raises(TextError, match="longer than the model's 128 positions"):
        run(learned, tmp_path / "out", eval_text=str(raven), context=129)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([narrow.name, learned.name, "source"])


def test_what_rounding_spoils_is_not_written(tmp_path, monkeypatch):
    """However it came about: logits further off than the type excuses are an error, and no folder."""
    monkeypatch.setattr("qectomy.surgery.choice.SPENT", 1e9)
    monkeypatch.setattr("qectomy.surgery.checkpoint.LOST", 1e9)
    source = save_variant(tmp_path / "source", "llama", dtype="float32", norms=False, tie_word_embeddings=False)
    name = "model.layers.{}.self_attn.q_proj.weight"

    def spoil(tensors):
        for layer in range(2):
            W = tensors[name.format(layer)]
            W[9] = W[1] + 1e-4 * W[9]

    edit_weights(source, spoil)
    with pytest.raises(QueryMapError, match=r"the logits are off by .* of the largest \(at most 1e-03 is rounding\)"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shared_layers_are_all_exact_or_all_dense(tmp_path):
    source = open_checkpoint(save_variant(tmp_path / "source", "llama", norms=False, shared_layers=True))
    with pytest.raises(QueryMapError, match="the layers share their weights, so they are all exact or all dense"):
        parse_exact("0=exact,1=dense", source.dims)
    assert parse_exact("exact", source.dims) == frozenset()


def test_a_device_is_refused(tiny_checkpoint, tmp_path):
    with pytest.raises(QectomyError, match="--device cuda: exact folding computes in float64 on the processor"):
        run(tiny_checkpoint(), tmp_path / "out", device="cuda")
