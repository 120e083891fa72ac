"""Batches and where a model breaks; the scores themselves are held against other loops in the tests beside this."""

import pytest
import torch
from damage import edit_weights
from tiny_models import RAVEN, VOCAB_SIZE, save_variant, tiny_model, tiny_tokenizer

from qectomy.errors import NonFiniteError
from qectomy.eval import layerwise_model, score_windows
from qectomy.eval.evaluate import Measure, evaluate, evaluate_all
from qectomy.eval.layerwise_model import StreamedModel, open_any, score_streamed
from qectomy.eval.loading import load_model
from qectomy.eval.protocol import Protocol, ScoringWindows, scoring_windows
from qectomy.eval.score_windows import MOST_PADDING, batches, first_bad_layer, score_model
from qectomy.eval.token_scores import score_rows, score_tokens
from qectomy.record.texts import TextProtocol
from qectomy.text.text import Source

SOURCE = Source("raven", "hash", RAVEN * 2)


def of_lengths(*lengths):
    tokens = torch.arange(len(lengths) * max(lengths)).view(len(lengths), -1) % VOCAB_SIZE
    report = TextProtocol.model_construct(scored_bytes=1, scored_words=1)
    return ScoringWindows(tokens, torch.ones(len(lengths), dtype=torch.int64), report, torch.tensor(lengths))


def test_batches_hold_each_window_once_and_hardly_any_padding():
    lengths = [7, 100, 64, 65, 63, 3, 100, 64, 1, 90]
    seen = []
    for rows, longest in batches(of_lengths(*lengths), 200):
        held = [lengths[row] for row in rows]
        assert max(held) == longest
        assert len(held) * longest <= 200 or len(held) == 1
        assert sum(held) >= (1 - MOST_PADDING) * len(held) * longest
        seen += rows.tolist()
    assert sorted(seen) == list(range(len(lengths)))
    assert len(list(batches(of_lengths(*lengths), 200))) < len(lengths)


@pytest.mark.parametrize("at_once", [1, 90, 4096])
def test_scores_are_in_the_order_of_the_windows_however_they_are_batched(at_once, monkeypatch):
    monkeypatch.setattr(score_windows, "TOKENS_A_BATCH", at_once)
    model, windows = tiny_model(), of_lengths(20, 33, 9, 33, 32)
    found, start = score_model(model, windows).nll, 0
    for tokens, length in zip(windows.tokens, windows.lengths.tolist(), strict=True):
        with torch.no_grad():
            logits = model(tokens[None, :length]).logits[0, :-1].double().log_softmax(-1)
        expected = -logits.gather(1, tokens[1:length, None])[:, 0]
        torch.testing.assert_close(found[start : start + length - 1], expected, rtol=1e-5, atol=1e-5)
        start += length - 1
    assert start == len(found)


def test_whole_rows_and_slices_agree():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (4 * torch.randn(9, 1200, generator=generator) for _ in range(2))
    targets = torch.randint(1200, (9,), generator=generator)
    by_rows = score_rows(ours, targets, theirs)
    by_slices = score_tokens(lambda a, b: ours[:, a:b], targets, 1200, lambda a, b: theirs[:, a:b])
    for name in ("nll", "kl", "agree", "reference_nll"):
        torch.testing.assert_close(getattr(by_rows, name), getattr(by_slices, name), rtol=1e-5, atol=1e-5)
    for bad in (torch.nan, torch.inf, -torch.inf):  # the last of them no sum over the vocabulary shows
        ours[4, 77] = bad
        found = (score_rows(ours, targets), score_tokens(lambda a, b: ours[:, a:b], targets, 1200))
        for scores in found:
            assert not scores.finite()
            assert scores.nll.isfinite().tolist() == [i != 4 for i in range(9)]


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
@pytest.mark.parametrize("held", [1, 3000, 1 << 28])
@pytest.mark.parametrize("plain", [True, False])
def test_an_accelerators_way_gives_the_same_scores(shape, held, plain, tiny_checkpoint, monkeypatch):
    """Whole rows, some at a time, also of heads that are run whole."""
    model, other = (load_model(str(tiny_checkpoint(kind)), "float32", "cpu")[0] for kind in (shape, shape))
    windows = of_lengths(20, 33, 9, 33, 32)
    expected = [score_model(model, windows, reference=reference) for reference in (None, other)]
    monkeypatch.setattr(score_windows, "SLICED", ())
    monkeypatch.setattr(score_windows, "LOGITS_ON_DEVICE", held)
    if not plain:
        monkeypatch.setattr(score_windows, "is_plain", lambda *_: False)
    for reference, scores in zip((None, other), expected, strict=True):
        found = score_model(model, windows, reference=reference)
        for name in ("nll", "kl", "agree", "reference_nll"):
            one, two = getattr(found, name), getattr(scores, name)
            assert (one is None) == (two is None)
            if two is not None:
                torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


class TestNonFinite:
    def test_names_model_window_and_layer(self, tiny_copy):
        """An embedding that only one word of the text has, and that overflows in the second layer."""
        folder = tiny_copy()
        model, *_ = load_model(str(folder), "float32", "cpu")
        source = Source("raven", "hash", RAVEN)
        windows = scoring_windows(tiny_tokenizer(), source, Protocol(context=16), VOCAB_SIZE)
        token = next(int(t) for t in windows.tokens[-1] if not (windows.tokens[:-1] == t).any())
        model.model.layers[1].self_attn.v_proj.register_forward_hook(
            lambda module, args, out: out.masked_fill((self.tokens == token)[..., None], torch.inf)
        )
        model.model.register_forward_pre_hook(
            lambda module, args, kwargs: setattr(self, "tokens", kwargs["input_ids"]), with_kwargs=True
        )
        last = len(windows.tokens) - 1
        with pytest.raises(NonFiniteError, match=rf"the model gives NaN or Inf in window {last}, first in layer 1;"):
            score_model(model, windows)
        assert first_bad_layer(model, windows.tokens[:1]) is None

    def test_names_the_reference(self, tiny_copy, tiny_checkpoint):
        folder = tiny_copy()
        edit_weights(folder, lambda tensors: tensors["model.norm.weight"].fill_(1e38))
        with pytest.raises(NonFiniteError, match=r"the reference gives NaN or Inf in window 0, first in the logits"):
            evaluate(str(tiny_checkpoint()), SOURCE, Protocol(context=16), reference=str(folder))


class TestStreamed:
    @pytest.mark.parametrize("shape", ["gpt2", "llama", "biases", "mistral", "qwen2", "bf16", "tied", "mqa"])
    def test_gives_the_same_numbers(self, shape, tiny_checkpoint, monkeypatch):
        monkeypatch.setattr(layerwise_model, "STATES_BYTES", 40_000)  # several groups
        monkeypatch.setattr(layerwise_model, "STREAMED_TOKENS", 70)
        name, other = str(tiny_checkpoint(shape)), str(tiny_checkpoint(shape, initializer_range=0.03))
        results = [
            evaluate(name, SOURCE, Protocol(context=32), dtype="float32", reference=other, streamed=kind)
            for kind in (False, True)
        ]
        for key in ("perplexity", "bits_per_byte", "word_perplexity", "kl", "top1_agreement"):
            ours, theirs = (getattr(result, key) for result in results)
            assert theirs == pytest.approx(ours, rel=2e-5, abs=1e-6), key
        assert [result.streamed for result in results] == [False, True]
        assert results[0].protocol == results[1].protocol

    @pytest.mark.parametrize("family", ["gpt2", "llama"])
    @pytest.mark.parametrize("fields", [dict(norms=False, mlp_skip=False), dict(norms=False, shared_layers=True)])
    def test_of_other_structures(self, family, fields, tmp_path):
        folder = save_variant(tmp_path / "model", family, **fields)
        tiny_tokenizer().save_pretrained(folder)
        resident, layered = (
            evaluate(str(folder), SOURCE, Protocol(context=32), dtype="float64", streamed=kind)
            for kind in (False, True)
        )
        assert layered.nll == pytest.approx(resident.nll, rel=1e-6)

    def test_of_reduced_checkpoints_and_windows_of_unequal_lengths(self, tiny_reduced):
        name = str(tiny_reduced(("select", "key-shared")))
        text = Source("pages", "hash", "", documents=(RAVEN, RAVEN[:50], "x", RAVEN[:300]))
        results = [
            evaluate(name, text, Protocol(name="rolling", context=24), dtype="float32", streamed=kind)
            for kind in (False, True)
        ]
        assert results[1].bits_per_byte == pytest.approx(results[0].bits_per_byte, rel=1e-6)

    def test_reads_each_layer_once_whatever_the_text(self, tiny_checkpoint, monkeypatch):
        monkeypatch.setattr(layerwise_model, "STREAMED_TOKENS", 70)
        checkpoint = open_any(str(tiny_checkpoint()))
        read = []
        monkeypatch.setattr(type(checkpoint), "read_layer", count_calls(type(checkpoint).read_layer, read))
        windows = scoring_windows(tiny_tokenizer(), SOURCE, Protocol(context=32), VOCAB_SIZE)
        done = []
        score_streamed([StreamedModel(checkpoint)], windows, lambda *step: done.append(step[:2]))
        assert read == list(range(checkpoint.dims.n_layers))
        assert done == [(i + 1, checkpoint.dims.n_layers) for i in range(checkpoint.dims.n_layers)]

    def test_names_the_layer_that_breaks(self, tiny_copy):
        folder = tiny_copy()
        edit_weights(folder, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].fill_(3e38))
        with pytest.raises(NonFiniteError, match=r"copy-of-llama gives NaN or Inf in layer 1"):
            evaluate(str(folder), SOURCE, Protocol(context=32), streamed=True)


def count_calls(method, seen):
    def counted(self, layer, *rest):
        seen.append(layer)
        return method(self, layer, *rest)

    return counted


def test_several_checkpoints_are_compared_on_the_same_windows(tiny_checkpoint, tiny_copy, tmp_path):
    from tiny_models import bos_tokenizer

    text = tmp_path / "raven.txt"
    text.write_text(RAVEN * 3)
    names = [str(tiny_checkpoint()), str(tiny_checkpoint("mqa")), str(tiny_copy())]
    bos_tokenizer().save_pretrained(names[2])
    first, second, third = evaluate_all(names, str(text), Measure(protocol=Protocol(context=32)))
    pair = second.paired
    assert pair.ratio == pytest.approx(second.perplexity / first.perplexity)
    low, high = pair.ratio_95
    assert low < pair.ratio < high
    assert pair.against == names[0]
    assert "paired" not in first
    assert "paired" not in third
    assert "another tokenizer" in third.paired_refused
