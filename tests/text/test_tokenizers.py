"""The tokenizer of a folder, by whatever files it has, and that of the folder which is written of it."""

import json
import shutil
from pathlib import Path

import pytest
from damage import edit_json
from tiny_models import RAVEN, tiny_tokenizer
from transformers import AutoTokenizer

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.checkpoint.config_files import copy_companions, reduced_config, write_config
from qectomy.errors import CheckpointError
from qectomy.eval.same_tokenizer import check_same_tokenizer
from qectomy.text import text
from qectomy.text.text import load_tokenizer

LINE = "Once upon a midnight dreary,\n  while I pondered"


def written_of(source: Path, out: Path) -> Path:
    """Write what lies beside the weights of a reduced checkpoint."""
    checkpoint = open_checkpoint(source)
    out.mkdir()
    write_config(out, reduced_config(checkpoint, checkpoint.recipe, "F32"))
    copy_companions(source, out)
    return out


@pytest.fixture
def gpt2_files(tiny_copy):
    """Return a function (config, vocabulary) -> folder of a GPT-2 with the tokenizer in these files."""

    def make(config: dict | None, vocabulary: str) -> Path:
        folder = tiny_copy("gpt2", vocab_size=321)
        for path in folder.glob("tokenizer*"):
            path.unlink()
        tokenizer = tiny_tokenizer()
        tokenizer.save_pretrained(folder / "saved")
        model = json.loads((folder / "saved/tokenizer.json").read_text())["model"]
        if vocabulary == "tokenizer.json":
            shutil.copy(folder / "saved/tokenizer.json", folder)
        else:
            vocab = {**model["vocab"], "<|endoftext|>": 320}
            (folder / "vocab.json").write_text(json.dumps(vocab))
            (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, model["merges"])]) + "\n")
        if config is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
        shutil.rmtree(folder / "saved")
        return folder

    return make


@pytest.mark.parametrize("vocabulary", ["vocab.json", "tokenizer.json"])
@pytest.mark.parametrize("config", [None, {}, {"model_max_length": 128}])
def test_a_gpt2_whose_files_name_no_class(config, vocabulary, gpt2_files, tmp_path):
    source = gpt2_files(config, vocabulary)
    out = written_of(source, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(source)
    for ours in (load_tokenizer(source), load_tokenizer(out), AutoTokenizer.from_pretrained(out)):
        assert ours(LINE)["input_ids"] == theirs(LINE)["input_ids"] != []
        assert (ours.bos_token, ours.eos_token) == ("<|endoftext|>", "<|endoftext|>")
        assert ours.eos_token_id == theirs.eos_token_id
    check_same_tokenizer(source, out)
    named = json.loads((out / "tokenizer_config.json").read_text())
    assert named == {**(config or {}), "tokenizer_class": "GPT2Tokenizer"}


def test_a_class_that_is_named_is_left_as_it_is(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("gpt2")
    out = written_of(source, tmp_path / "out")
    assert (out / "tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()


class TestSameTokenizer:
    def test_special_tokens_that_are_lost(self, tiny_copy, tmp_path):
        source = tiny_copy()
        out = written_of(source, tmp_path / "out")
        check_same_tokenizer(source, out)
        edit_json(out / "tokenizer_config.json", lambda config: config.pop("eos_token"))
        with pytest.raises(CheckpointError, match=r"not the original's: eos_token_id differ"):
            check_same_tokenizer(source, out)

    def test_other_ids(self, tiny_copy, tmp_path):
        source = tiny_copy()
        out = written_of(source, tmp_path / "out")
        edit_json(out / "tokenizer.json", lambda made: made["model"]["merges"].clear())
        with pytest.raises(CheckpointError, match=r"the ids of a text from token [0-9]+ on differ"):
            check_same_tokenizer(source, out)

    def test_a_folder_without_a_tokenizer(self, tiny_copy, tmp_path):
        source = tiny_copy()
        for path in source.glob("tokenizer*"):
            path.unlink()
        check_same_tokenizer(source, written_of(source, tmp_path / "out"))


class TestSentencepiece:
    @pytest.fixture
    def source(self, tiny_copy, tmp_path):
        """A Llama with tokenizer.model and nothing else, as Llama-1 and -2 came; the model is trained here."""
        trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
        folder = tiny_copy("llama", vocab_size=400)
        for path in folder.glob("tokenizer*"):
            path.unlink()
        (tmp_path / "raven.txt").write_text(RAVEN)
        options = dict(model_type="bpe", byte_fallback=True, vocab_size=330, num_threads=1, minloglevel=2)
        trainer.train(input=str(tmp_path / "raven.txt"), model_prefix=str(tmp_path / "made"), **options)
        shutil.copy(tmp_path / "made.model", folder / "tokenizer.model")
        return folder

    def test_it_reads_as_sentencepiece_itself_does(self, source, tmp_path):
        from sentencepiece import SentencePieceProcessor

        line = "Once upon a midnight dreary, while I pondered"  # without what sentencepiece takes for one space
        expected = SentencePieceProcessor(model_file=str(source / "tokenizer.model")).encode(line)
        out = written_of(source, tmp_path / "out")
        for ours in (load_tokenizer(source), load_tokenizer(out), AutoTokenizer.from_pretrained(out)):
            assert ours(line, add_special_tokens=False)["input_ids"] == expected
            assert (ours.bos_token_id, ours.eos_token_id) == (1, 2)

    def test_without_the_library_the_right_one_is_named(self, tiny_copy, monkeypatch):
        folder = tiny_copy()
        for path in folder.glob("tokenizer*"):
            path.unlink()
        (folder / "tokenizer.model").write_bytes(b"\n\x00")
        monkeypatch.setattr(text, "_is_installed", lambda module: module != "sentencepiece")
        with pytest.raises(CheckpointError, match="and sentencepiece cannot be imported here: pip install sentencep"):
            load_tokenizer(folder)


def test_a_sentencepiece_file_that_is_none(tiny_copy, monkeypatch):
    folder = tiny_copy()
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x00")
    monkeypatch.setattr(text, "_is_installed", lambda module: True)
    with pytest.raises(CheckpointError, match="holds no tokenizer that can be loaded"):
        load_tokenizer(folder)


def test_a_config_at_fault_is_blamed_and_not_the_tokenizer(tiny_copy):
    """As of a Llama with pruned heads, whose widths transformers refuses."""
    folder = tiny_copy()
    edit_json(folder / "config.json", lambda config: config.update(num_attention_heads=3))
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(folder)
    assert "config.json cannot be used" in str(caught.value)
    assert "The hidden size (32) is not a multiple of the number of attention heads (3)" in str(caught.value)
