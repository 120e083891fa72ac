"""Perplexity of whole checkpoints, against a loop of our own over the stock classes of transformers."""

import math
import shutil

import pytest
import torch
from conversions import window_nll
from damage import edit_json, edit_weights
from safetensors.torch import load_file, save_file
from tiny_models import RAVEN, VOCAB_SIZE, bos_tokenizer, scramble, tiny_tokenizer
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GraniteConfig, PhiConfig
from transformers.utils import logging

from qectomy.errors import CheckpointError, NonFiniteError, QectomyError, TextError
from qectomy.eval.evaluate import evaluate
from qectomy.eval.loading import load_model
from qectomy.eval.protocol import Protocol, common_context, scoring_windows
from qectomy.eval.score_windows import LogitsReader
from qectomy.text.text import Source

SOURCE = Source("raven", "hash", RAVEN * 2)
CONTEXTS = [(16, 16), (16, 5), (16, 1), (33, 20)]
SMALL = dict(vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
SPECIAL = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)


def token_ids(text):
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


def by_hand(model, ids, context, stride, bos=None):
    """(nats, scored token ids) of one window after the other; each token but the first few is scored once."""
    width = context - (bos is not None)
    nats, scored, done = [], [], 0
    for begin in range(0, len(ids) - width + 1, min(stride, width)):
        window = ids[begin : begin + width]
        new = begin + width - done
        given = torch.tensor(([] if bos is None else [bos]) + window)
        losses = window_nll(model, given[None])[-new:] if begin or bos is not None else window_nll(model, given[None])
        nats.append(losses)
        scored += window[-len(losses) :]
        done = begin + width
    return torch.cat(nats), scored


def n_bytes(ids):
    """Bytes behind byte-level tokens: every character of a token stands for one."""
    return sum(map(len, tiny_tokenizer().convert_ids_to_tokens(ids)))


@pytest.mark.parametrize("context, stride", CONTEXTS)
@pytest.mark.parametrize("bos", [False, True])
def test_windows_with_a_stride(tiny_copy, context, stride, bos):
    folder = tiny_copy()
    if bos:
        bos_tokenizer().save_pretrained(folder)
    ids = token_ids(RAVEN)[:70] if stride == 1 else token_ids(RAVEN * 2)
    result = evaluate(str(folder), SOURCE, Protocol(context=context, stride=stride, tokens=70 if stride == 1 else None))
    model = AutoModelForCausalLM.from_pretrained(folder)
    nats, scored = by_hand(model, ids, context, stride, 0 if bos else None)
    protocol = result.protocol
    assert protocol.scored_tokens == len(nats) == len(scored)
    assert protocol.scored_bytes == n_bytes(scored)
    assert protocol.bos == ("every window starts with BOS" if bos else "none")
    assert (protocol.context, protocol.stride) == (context, min(stride, context - bos))
    assert result.perplexity == pytest.approx(math.exp(nats.mean()), rel=1e-5)
    assert result.nll == pytest.approx(float(nats.mean()), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(float(nats.sum()) / math.log(2) / n_bytes(scored), rel=1e-6)


def test_every_token_is_scored_once_where_windows_overlap():
    ids = token_ids(RAVEN * 2)
    for context, stride in CONTEXTS[1:]:
        windows = scoring_windows(tiny_tokenizer(), SOURCE, Protocol(context=context, stride=stride), VOCAB_SIZE)
        mask = windows.scored_mask()
        scored = windows.tokens[:, 1:][mask].tolist()
        assert scored == ids[1 : 1 + len(scored)]
        assert len(ids) - len(scored) - 1 < stride


@pytest.mark.parametrize("text", ["烏鴉說：永不再。", "🐦‍⬛é ß\n"])
def test_bytes_of_characters_that_windows_cut(text):
    """Such a character counts once, where it ends: the sum is off by a few bytes at the ends of a run at most."""
    source = Source("cut", "hash", text * 40)
    apart = scoring_windows(tiny_tokenizer(), source, Protocol(context=32), VOCAB_SIZE)
    true = n_bytes(apart.tokens[:, 1:].flatten().tolist())
    assert abs(apart.n_bytes - true) <= 6 * len(apart.tokens)
    overlapping = scoring_windows(tiny_tokenizer(), source, Protocol(context=32, stride=5), VOCAB_SIZE)
    scored = overlapping.report.scored_tokens
    assert abs(overlapping.n_bytes - n_bytes(token_ids(source.text)[1 : 1 + scored])) <= 6


@pytest.mark.parametrize(
    "config",
    [
        GraniteConfig(num_key_value_heads=2, logits_scaling=4.0, embedding_multiplier=2.0, **SMALL, **SPECIAL),
        PhiConfig(**SMALL, **SPECIAL),  # its head has a bias
        Gemma2Config(
            num_key_value_heads=2, head_dim=8, final_logit_softcapping=3.0, query_pre_attn_scalar=8, **SMALL, **SPECIAL
        ),
        GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=64, **SPECIAL),
    ],
    ids=["logit-scaling", "head-bias", "soft-cap", "tied-gpt2"],
)
def test_heads_that_are_more_than_a_matrix(config, tmp_path):
    model = AutoModelForCausalLM.from_config(config).eval()
    scramble(model, config.model_type)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    found = evaluate(str(tmp_path), SOURCE, Protocol(context=32), reference=str(tmp_path))
    nats, _ = by_hand(model, token_ids(SOURCE.text), 32, 32)
    assert found.perplexity == pytest.approx(math.exp(nats.mean()), rel=1e-5)
    assert found.kl == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("buffer", ["attn.bias", "attn.masked_bias"])
def test_buffers_that_old_checkpoints_hold_do_no_harm(buffer, tiny_copy):
    folder = tiny_copy("gpt2")
    expected = evaluate(str(folder), SOURCE, Protocol(context=32))
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file({**tensors, f"h.0.{buffer}": torch.ones(1)}, folder / "model.safetensors", {"format": "pt"})
    assert evaluate(str(folder), SOURCE, Protocol(context=32)).per_position == expected.per_position
    save_file({**tensors, "h.0.attn.other": torch.ones(1)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 tensor\(s\) have no place in a gpt2 model .*attn\.other"):
        evaluate(str(folder), SOURCE, Protocol(context=32))


def test_windows_longer_than_a_table_of_positions_are_refused(tiny_checkpoint):
    name = str(tiny_checkpoint("gpt2", max_position_embeddings=24))
    assert common_context([str(tiny_checkpoint()), name]) == 24
    assert evaluate(name, SOURCE, Protocol(context=24)).perplexity > 1
    with pytest.raises(TextError, match=f"--context 25 is longer than the 24 positions of {name}; use 24 or less"):
        evaluate(name, SOURCE, Protocol(context=25))


def test_a_plain_head_is_read_in_slices(tiny_checkpoint):
    model, *_ = load_model(str(tiny_checkpoint()), None, "cpu")
    tokens, calls = torch.arange(3, 35)[None], []
    read = LogitsReader(model, tokens)
    model.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        logits = read(tokens, torch.ones(1, 31, dtype=torch.bool))
        sliced = torch.cat([logits.slices(0, 100), logits.slices(100, VOCAB_SIZE)], dim=1)
        torch.testing.assert_close(torch.cat([logits.rows(slice(0, 9)), logits.rows(slice(9, 31))]), sliced)
        assert calls == []  # only the model under the head has run
        torch.testing.assert_close(sliced, model(tokens).logits[0, :-1])


class TestReference:
    def test_against_itself(self, tiny_checkpoint):
        name = str(tiny_checkpoint())
        result = evaluate(name, SOURCE, Protocol(context=32), reference=name)
        assert result.kl == pytest.approx(0.0, abs=1e-9)
        assert result.top1_agreement == 1.0
        assert result.reference == name

    def test_against_another_model(self, tiny_checkpoint):
        name, other = str(tiny_checkpoint()), str(tiny_checkpoint("mqa"))
        result = evaluate(name, SOURCE, Protocol(context=32), reference=other)
        windows = torch.tensor(token_ids(SOURCE.text))
        windows = windows[: len(windows) // 32 * 32].view(-1, 32)
        with torch.no_grad():
            s, t = (
                AutoModelForCausalLM.from_pretrained(n)(windows).logits[:, :-1].double().log_softmax(-1)
                for n in (name, other)
            )
        assert result.kl == pytest.approx(float((t.exp() * (t - s)).sum(-1).mean()), rel=1e-4)
        agree = (s.argmax(-1) == t.argmax(-1)).double().mean()
        assert result.top1_agreement == pytest.approx(float(agree), abs=1e-3)
        assert evaluate(name, SOURCE, Protocol(context=32)).kl is None

    def test_of_another_tokenizer_is_refused(self, tiny_checkpoint, tiny_copy):
        other = tiny_copy()
        bos_tokenizer().save_pretrained(other)
        self.check_refused(str(tiny_checkpoint()), str(other))

    def test_of_another_vocabulary_is_refused(self, tiny_checkpoint):
        other = tiny_checkpoint(vocab_size=VOCAB_SIZE + 8)
        self.check_refused(str(tiny_checkpoint()), str(other))

    def check_refused(self, name, other):
        """No number that compares tokens, those that compare text, and the reason."""
        result, alone = (evaluate(name, SOURCE, Protocol(context=32), reference=ref) for ref in (other, None))
        assert "another tokenizer or vocabulary" in result.reference_refused
        assert "bits per byte" in result.reference_refused
        assert (result.kl, result.top1_agreement) == (None, None)
        assert result.bits_per_byte == alone.bits_per_byte


def test_a_reduced_checkpoint_is_evaluated_by_the_code_that_is_installed(tiny_reduced, tmp_path):
    folder = shutil.copytree(tiny_reduced(("select", "key-shared")), tmp_path / "reduced")
    code, marker = folder / "modeling_qectomy_llama.py", tmp_path / "ran"
    code.write_text(f"open({str(marker)!r}, 'w')\n" + code.read_text())
    assert evaluate(str(folder), SOURCE, Protocol(context=32)).perplexity > 1
    assert not marker.exists()


def test_a_folder_that_does_not_tell_of_its_channel_numbers_is_named(tiny_reduced, tmp_path, capsys):
    folder = shutil.copytree(tiny_reduced(("select", "key-shared")), tmp_path / "untold")
    assert evaluate(str(folder), SOURCE, Protocol(context=32)).perplexity > 1
    assert "index_sha256" not in capsys.readouterr().err
    edit_json(folder / "config.json", lambda config: config.pop("index_sha256"))
    assert evaluate(str(folder), SOURCE, Protocol(context=32)).perplexity > 1
    said = f"note: {folder}: config.json has no index_sha256, so it is not known whether the channel numbers"
    assert capsys.readouterr().err.startswith(said)


def test_the_dtype_is_that_of_the_checkpoint_or_the_one_given(tiny_checkpoint):
    name = str(tiny_checkpoint("bf16"))
    half, full = (evaluate(name, SOURCE, Protocol(context=32), dtype=dtype) for dtype in (None, "float32"))
    assert half.protocol.dtype == "bfloat16"
    assert full.protocol.dtype == "float32"
    assert half.perplexity != full.perplexity
    with pytest.raises(QectomyError, match=r"unknown --dtype 'int3'; known: float32, bfloat16, float16"):
        evaluate(name, SOURCE, Protocol(context=32), dtype="int3")


@pytest.mark.parametrize(
    "protocol, message",
    [
        (Protocol(context=32, stride=33), r"--stride 33 must lie between 1 and the context, 32"),
        (Protocol(context=32, tokens=31), r"31 evaluation tokens are fewer than one window of 32"),
        (Protocol(context=9999), r"fewer than one window of 9999; give more text or a smaller --context"),
    ],
)
def test_protocols_that_cannot_be(tiny_checkpoint, protocol, message):
    with pytest.raises(TextError, match=message):
        evaluate(str(tiny_checkpoint()), SOURCE, protocol)


class TestDamage:
    def refused(self, folder, message, error=CheckpointError):
        with pytest.raises(error, match=message) as caught:
            evaluate(str(folder), SOURCE, Protocol(context=32))
        assert len(str(caught.value).splitlines()) == 1

    def test_nan_weights(self, tiny_copy):
        folder = tiny_copy()
        edit_weights(folder, lambda tensors: tensors["lm_head.weight"][7].fill_(torch.nan))
        self.refused(folder, r"copy-of-llama gives NaN or Inf in window 0, first in the logits", NonFiniteError)

    @pytest.mark.parametrize("streamed", [False, True])
    def test_numbers_beyond_the_type_name_it_and_why_it_was_taken(self, streamed, tiny_copy):
        folder = tiny_copy("fp16")
        edit_weights(folder, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].fill_(6e4))
        for asked, why in ((None, "in which .* is stored"), ("float16", "which --dtype asks for")):
            with pytest.raises(NonFiniteError, match=f"NaN or Inf.* computed in float16, ({why}); --dtype float32"):
                evaluate(str(folder), SOURCE, Protocol(context=32), dtype=asked, streamed=streamed)
        assert evaluate(str(folder), SOURCE, Protocol(context=32), dtype="float32", streamed=streamed).perplexity

    def test_a_missing_tensor(self, tiny_copy):
        folder = tiny_copy()
        edit_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
        self.refused(
            folder, r"copy-of-llama: 1 tensor\(s\) that config.json calls for are missing, first .*layers.1.mlp.up_proj"
        )

    def test_a_tensor_too_many(self, tiny_copy):
        folder = tiny_copy()
        edit_weights(folder, lambda tensors: tensors.update({"model.other.weight": torch.zeros(1)}))
        self.refused(folder, r"1 tensor\(s\) have no place in a llama model .*model.other.weight")

    def test_token_ids_beyond_the_vocabulary(self, tiny_checkpoint):
        self.refused(tiny_checkpoint(vocab_size=280), r"token id \d+, but the model's embedding has 280 rows")

    def test_pickles_are_not_loaded(self, tiny_copy):
        folder = tiny_copy()
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        self.refused(folder, "pytorch_model.bin would be loaded by pickle, which can run code")

    def test_code_in_the_folder_is_not_run(self, tiny_copy, tmp_path):
        folder = tiny_copy()
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        edit_json(
            folder / "config.json",
            lambda c: c.update(model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}),
        )
        self.refused(folder, "model_type 'evil'.*cannot be loaded")
        assert not (tmp_path / "ran").exists()

    def test_no_such_folder(self):
        self.refused("no/such/folder", "no folder no/such/folder")


def test_loading_leaves_the_callers_bars_and_warnings_as_they_were(tiny_checkpoint):
    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        load_model(str(tiny_checkpoint()), None, "cpu")
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.INFO, True)
    finally:
        logging.set_verbosity(before[0])
        if not before[1]:
            logging.disable_progress_bar()
