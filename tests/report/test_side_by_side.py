"""What is shown beside the numbers: it is right, and where it cannot be made, nothing else is lost."""

import copy
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conversions import convert_tiny
from tiny_models import RAVEN, VOCAB_SIZE, tiny_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig

from qectomy.errors import CheckpointError, Stopped, clean
from qectomy.eval import reload, samples
from qectomy.eval.protocol import Protocol, scoring_windows
from qectomy.eval.samples import NEW_TOKENS, generation_of, token_sample, write
from qectomy.eval.token_scores import TokenScores
from qectomy.text.text import Source


@pytest.fixture
def windows():
    return scoring_windows(tiny_tokenizer(), Source("raven", "hash", RAVEN * 2), Protocol(context=32), VOCAB_SIZE)


def test_the_window_shown_is_the_most_ordinary_one(windows, tiny_checkpoint):
    within, _ = windows.places()
    before = torch.rand(len(within), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    steps = torch.linspace(0, 1, len(windows.tokens), dtype=torch.float64)  # the mean change is the middle one's
    after = before + steps[within]
    found = token_sample(tiny_checkpoint(), windows, TokenScores(before), TokenScores(after))
    chosen = found.window
    assert abs(float(steps[chosen] - steps.mean())) == pytest.approx(float((steps - steps.mean()).abs().min()))
    tokens = found.tokens
    assert "".join(token.text for token in tokens) == tiny_tokenizer().decode(windows.tokens[chosen])
    assert tokens[0].before is None
    assert [t.before for t in tokens[1:]] == pytest.approx(before[within == chosen].tolist())
    assert [t.after for t in tokens[1:]] == pytest.approx(after[within == chosen].tolist())


def test_characters_of_several_tokens_come_with_their_last(tiny_checkpoint):
    source = Source("raven", "hash", "烏鴉說：永不再。é🐦" * 9)
    windows = scoring_windows(tiny_tokenizer(), source, Protocol(context=31), VOCAB_SIZE)
    scores = TokenScores(torch.zeros(int(windows.scored_mask().sum()), dtype=torch.float64))
    pieces = [token.text for token in token_sample(tiny_checkpoint(), windows, scores, scores).tokens]
    assert len(pieces) == 31
    assert "\ufffd" not in "".join(pieces[1:-3])
    assert "" in pieces


def test_a_sample_that_cannot_be_made_is_told(windows, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(samples, "load_tokenizer", lambda folder: 1 / 0)
    scores = TokenScores(torch.zeros(int(windows.scored_mask().sum()), dtype=torch.float64))
    found = token_sample(tiny_checkpoint(), windows, scores, scores)
    assert found.tokens == []
    assert found.skipped.startswith("ZeroDivisionError")


def test_both_models_write_greedily_whatever_their_folders_ask_for(tiny_checkpoint, tiny_copy):
    original, other = tiny_checkpoint(), tiny_copy("llama")
    GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=5.0).save_pretrained(other)
    found = generation_of(original, other)
    assert found.decoding == "greedy"
    assert [sample.prompt for sample in found.samples] == list(samples.PROMPTS)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(original), tiny_tokenizer()
    for sample in found.samples:
        assert sample.original == sample.reduced
        ids = tokenizer(sample.prompt, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        for _ in range(NEW_TOKENS):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
            if int(ids[0, -1]) == model.config.eos_token_id:
                break
        assert sample.original == clean(tokenizer.decode(ids[0, start:], skip_special_tokens=True))
    assert write(model, tokenizer, tokenizer("Nevermore", return_tensors="pt")["input_ids"]) != ""
    assert found.prompt_format is None


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[me]{% endif %}"
)


def with_template(folder, template):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_that_chats_is_asked_in_its_template(tiny_copy, monkeypatch):
    folder, asked = with_template(tiny_copy("llama"), TEMPLATE), []

    def watch(model, tokenizer, ids, ends_turn):
        asked.append((tokenizer.decode(ids[0]), ends_turn))
        return write(model, tokenizer, ids, ends_turn)

    monkeypatch.setattr(samples, "write", watch)
    found = generation_of(folder, folder)
    assert asked == 2 * [(f"[user]{prompt}\n[me]", True) for prompt in samples.CHAT_PROMPTS]
    assert [sample.prompt for sample in found.samples] == list(samples.CHAT_PROMPTS)
    assert found.prompt_format == "a user's message in the tokenizer's chat template"
    assert len(samples.CHAT_PROMPTS) == len(samples.PROMPTS)  # by which the time of a conversion is foretold


def test_the_tokenizers_end_ends_a_turn(tiny_copy):
    folder = with_template(tiny_copy("llama"), TEMPLATE)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), copy.deepcopy(tiny_tokenizer())
    ids = tokenizer("Nevermore", return_tensors="pt")["input_ids"]
    whole = write(model, tokenizer, ids)
    with torch.no_grad():
        tokenizer.eos_token_id = int(model(ids).logits[0, -1].argmax())
    assert write(model, tokenizer, ids) == whole
    assert len(write(model, tokenizer, ids, ends_turn=True)) < len(whole)


def test_a_template_that_fails_or_does_not_end_leaves_plain_prompts(tiny_copy, monkeypatch):
    folder = with_template(tiny_copy("llama"), "{{ raise_exception('no users here') }}")
    found = generation_of(folder, folder)
    assert "chat template failed (TemplateError: no users here)" in found.prompt_format
    assert [sample.prompt for sample in found.samples] == list(samples.PROMPTS)

    def endless(*arguments, **options):
        while True:
            pass

    monkeypatch.setattr(samples, "TEMPLATE_SECONDS", 0.2)
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.apply_chat_template", endless)
    assert "TimeoutError: it took more than 0.2 s" in generation_of(folder, folder).prompt_format
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_large_models_do_not_write(tiny_checkpoint):
    found = generation_of(tiny_checkpoint(), tiny_checkpoint(), most_bytes=1000)
    assert "qectomy report DIR --original ORIGINAL" in found.skipped


class TestFreshProcess:
    """What becomes of a conversion whose fresh process checks, and then dies writing; or dies of its own troubles."""

    def run(self, child, folder, monkeypatch):
        monkeypatch.setattr(reload, "CHILD", child)
        return reload.check_reload(folder, torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 8), folder)

    def test_killed_while_it_writes(self, tmp_path, monkeypatch):
        told = json.dumps({"error": 0.0, "cached_error": 0.0, "peak_memory_bytes": 7})
        child = f"print({told!r}, flush=True); import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"
        found = self.run(child, tmp_path, monkeypatch)
        assert (found.error, found.peak_memory_bytes) == (0.0, 7)
        assert "ended (-9)" in found.generation.skipped

    def test_wrong_logits_are_refused_whatever_it_writes(self, tmp_path, monkeypatch):
        told = json.dumps({"error": 0.5, "cached_error": 0.0, "peak_memory_bytes": 7})
        with pytest.raises(CheckpointError, match=r"gives other logits in a fresh process: off by 5.0e-01"):
            self.run(f"print({told!r})", tmp_path, monkeypatch)

    @pytest.mark.parametrize("child", ["raise MemoryError('none left')", "import nothing_of_that_name"])
    def test_its_own_troubles_can_be_gone_on_from(self, child, tmp_path, monkeypatch):
        with pytest.raises(Stopped, match="does not load in a fresh process: "):
            self.run(child, tmp_path, monkeypatch)

    def test_a_checkpoint_that_it_finds_broken_is_refused(self, tmp_path, monkeypatch):
        with pytest.raises(CheckpointError, match=r"does not load in a fresh process: CheckpointError: .*config.json"):
            self.run(reload.CHILD, tmp_path, monkeypatch)

    def test_a_conversion_shows_what_both_models_write(self, tiny_checkpoint, raven, tmp_path):
        report = convert_tiny(tiny_checkpoint(), tmp_path / "out", "select", raven, fresh_process=True)
        assert len(report["generation"]["samples"]) == len(samples.PROMPTS)
        assert report["reload_check"]["largest_relative_logit_error"] < 1e-4


def test_text_without_spaces_has_a_page(tiny_checkpoint, tmp_path):
    """One word of thousands of characters costs more nats than exp takes; it has no word perplexity, and a page."""
    text = tmp_path / "text.txt"
    text.write_text("烏鴉說永不再" * 400)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "qectomy", "convert", tiny_checkpoint(), "--out", out, "--query", "exact"]
    command += ["--eval-text", text, "--eval-tokens", "640", "--context", "64"]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "word_perplexity" not in json.loads((out / "qectomy.json").read_text())
    assert "note:" not in done.stderr
    assert "<h1" in (out / "report.html").read_text()
