"""Readers of what lies beside a checkpoint: a run's journal and record, tokenizer, reports, texts, nanoGPT files."""

import gzip
import hashlib
import importlib.metadata
import io
import json
import pickle
import warnings
import zlib
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow
import pyarrow.parquet
import torch
from cases import Case, Pipe, Reader, odd_file
from checkpoint_readers import Grounds, refused_or_none
from mutations import Dice, Raw, hostile, json_text, mutated, mutated_bytes
from nanogpt_checkpoints import made
from page_folders import exact_report, full_bench, full_evaluation, full_report, healed_report
from tiny_models import RAVEN, tiny_tokenizer

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.checkpoint.headers import SINGLE
from qectomy.eval.certificate import _as_written
from qectomy.eval.evaluate import fitted_on
from qectomy.healing.data import fitted_span
from qectomy.healing.export import fitted_report
from qectomy.report.page.page import page
from qectomy.report.page.reading import read_folders, read_points
from qectomy.surgery.materialize import materialize
from qectomy.surgery.nanogpt import import_nanogpt
from qectomy.text.documents import Documents, Reading
from qectomy.text.overlap import Sketch, overlap, span_hashes
from qectomy.text.text import Source, load_tokenizer, read_source
from qectomy.text.windows import first_tokens, make_windows

WORK = "out.converting"
TEXT_ENDINGS = (".txt", ".json", ".jsonl", ".parquet", ".gz", "")
CANARY = "import pathlib\npathlib.Path('MARK').write_text('run')\n"


def canary(mark: Path) -> str:
    """Python that leaves a mark where it is run."""
    return CANARY.replace("MARK", str(mark))


class Canary:
    """A pickle of this leaves a mark where it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (canary(self.mark),)


def journal_reader(grounds: Grounds, interrupted: Case, whole: bytes) -> Reader:
    """OUT.converting of a run that was stopped: what it becomes must be what an undisturbed run writes."""
    config = {name: data for name, data in grounds.files["run"].items() if name in ("config.json", SINGLE)}
    entries = [json.loads(line[65:]) for line in interrupted[f"{WORK}/journal"].splitlines()]
    record = json.loads(interrupted[f"{WORK}/run.json"])

    def make(dice: Dice) -> Case:
        case: Case = {**config, **interrupted}
        kind = dice.randrange(12)
        if kind == 0:
            places = ("journal", "run.json", "lock", "result", "scratch", "result/" + SINGLE, "result/config.json")
            case = {name: held for name, held in case.items() if dice.randrange(3) or not name.startswith(WORK)}
            place = f"{WORK}/{dice.choice((*places, 'run.json.draft', 'scratch/x'))}"
            case = {name: held for name, held in case.items() if not name.startswith((f"{place}/", place))}
            case[place] = odd_file(dice)
        elif kind == 1:
            case[f"{WORK}/journal"] = mutated_bytes(dice, interrupted[f"{WORK}/journal"])
        elif kind == 2:
            case[f"{WORK}/result/{SINGLE}"] = mutated_bytes(dice, interrupted[f"{WORK}/result/{SINGLE}"])
        elif kind == 3:
            case[f"{WORK}/run.json"] = json_text(dice, mutated(dice, record))
        else:
            case[f"{WORK}/journal"] = _chained(_steps(dice, entries), dice)
        return case

    version = cache(importlib.metadata.version)  # 30 ms a run otherwise

    def read(folder: Path) -> None:
        with patch.object(importlib.metadata, "version", version):
            materialize(open_checkpoint(folder, reduced=True), folder / "out", resume=True)
        assert (folder / "out" / SINGLE).read_bytes() == whole, "a damaged run was taken for a sound one"

    return Reader("journal and run.json", make, read, lambda raw: {**config, **interrupted, f"{WORK}/journal": raw})


def _steps(dice: Dice, entries: list[Any]) -> list[Any]:
    """Entries in another order, doubled, empty, merged, or with other content."""
    found = json.loads(json.dumps(entries))
    for _ in range(1 + dice.randrange(2)):
        kind = dice.randrange(7)
        place = dice.randrange(len(found)) if found else 0
        if kind == 0 or not found:
            found.insert(place, dice.choice(({"tensors": {}}, {"report": {}}, {"report": 3, "inode": 1}, {}, [], 3)))
        elif kind == 1:
            found.insert(place, dice.choice(found))
        elif kind == 2:
            del found[place]
        elif kind == 3:
            found.reverse()
        elif kind == 4:
            found = [{"tensors": {k: v for step in found for k, v in _tensors(step).items()}}] * (1 + dice.randrange(9))
        elif kind == 5:
            found[place] = {
                "tensors": {
                    k: hostile(dice) if dice.randrange(4) == 0 else v for k, v in _tensors(found[place]).items()
                }
            }
        else:
            found = mutated(dice, found)
            found = found if isinstance(found, list) else [found]
    return found


def _tensors(step: Any) -> dict[str, Any]:
    held = step.get("tensors") if isinstance(step, dict) else None
    return held if isinstance(held, dict) else {}


def _chained(entries: list[Any], dice: Dice) -> bytes:
    """Lines of a journal whose digests are right, whatever the entries are."""
    lines, before = [], ""
    for entry in entries:
        text = json_text(dice, entry).replace(b"\n", b" ").replace(b"\r", b" ")
        before = hashlib.sha256(before.encode() + b" " + text).hexdigest()
        lines.append(before.encode() + b" " + text + b"\n")
    return b"".join(lines)


def tokenizer_reader(grounds: Grounds, mark: Path) -> Reader:
    """The files of a tokenizer, with code beside them that must not run."""
    own = ("tokenizer.json", "tokenizer_config.json")
    files = {name: data for name, data in grounds.files["llama"].items() if name in (*own, "config.json")}
    model, told = (json.loads(files[name]) for name in own)
    vocab = {token: i for i, token in enumerate(model["model"]["vocab"])}
    old = {
        "vocab.json": json.dumps(vocab).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(m) for m in model["model"]["merges"])]).encode(),
        "special_tokens_map.json": b'{"bos_token": "<s>", "eos_token": "</s>"}',
        "added_tokens.json": b'{"<extra>": 320}',
    }
    code = {name: canary(mark).encode() for name in ("tokenization_x.py", "tokenizer.py", "configuration_x.py")}
    config = json.loads(files["config.json"]) | {"auto_map": {"AutoConfig": "configuration_x.X"}}
    classes = ("GPT2Tokenizer", "LlamaTokenizer", "PreTrainedTokenizerFast", "BertTokenizer", "T5Tokenizer", "X", "")
    rules = [
        {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40},
        {"type": "Replace", "pattern": {"Regex": ""}, "content": "x" * 20_000},
        {"type": "Replace", "pattern": {"Regex": "(a|aa)+$"}, "content": ""},
        {"type": "Prepend", "prepend": "x"},
    ]

    def make(dice: Dice) -> Case:
        case: Case = {**files, **code, "training_args.bin": pickle.dumps(Canary(mark))}
        kind = dice.randrange(10)
        if kind == 0:
            case[dice.choice(own)] = odd_file(dice)
        elif kind == 1:
            name = dice.choice((*own, *own, "config.json"))
            case[name] = mutated_bytes(dice, files[name])
        elif kind == 2:
            hub = {"AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"], "AutoConfig": "configuration_x.X"}
            case["config.json"] = json_text(dice, config | {"auto_map": hub, "model_type": dice.choice(("x", "llama"))})
            changes = {"auto_map": hub, "tokenizer_class": dice.choice((*classes, "tokenization_x.X"))}
            case["tokenizer_config.json"] = json_text(dice, told | changes)
        elif kind == 3:
            case["tokenizer_config.json"] = json_text(
                dice, mutated(dice, told | {"tokenizer_class": dice.choice(classes)})
            )
        elif kind < 6:
            del case["tokenizer.json"]
            case |= old
            case["tokenizer_config.json"] = json_text(dice, told | {"tokenizer_class": dice.choice(classes)})
            name = dice.choice(tuple(old))
            case[name] = mutated_bytes(dice, old[name]) if dice.randrange(2) else odd_file(dice)
            if dice.randrange(4) == 0:
                case["tokenizer.model"] = mutated_bytes(dice, b"\x0a\x0e\x0a\x05<unk>\x15\0\0\0\0\x18\x02" * 9)
        else:
            found = json.loads(files["tokenizer.json"])
            part = dice.choice(("normalizer", "post_processor", "decoder", "pre_tokenizer", "truncation", "padding"))
            if dice.randrange(2):
                found[part] = dice.choice((*rules, hostile(dice)))
            elif dice.randrange(2):
                found["added_tokens"] = mutated(dice, found["added_tokens"])
            elif dice.randrange(2):
                token = dice.choice(list(found["model"]["vocab"]))
                found["model"]["vocab"][token] = dice.choice((10**6, 319, 2**32 - 1, hostile(dice)))
            else:
                found = mutated(dice, found)
            case["tokenizer.json"] = json_text(dice, found)
        return case

    source = Source("raven", "0" * 64, (RAVEN + "aaaaaaaaaaaaaaaaaaaaaaab é \U0001f600 ") * 2)

    def read(folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = load_tokenizer(folder)
            windows = make_windows(tokenizer, [source], context=16, tokens=64, vocab_size=320)
            assert int(windows.tokens.max()) < 320
            assert int(windows.tokens.min()) >= 0
            first_tokens(tokenizer, source.text, 40, places=True)

    return Reader("tokenizer", make, read, lambda raw: {**files, **code, "tokenizer.json": raw})


def report_reader(grounds: Grounds) -> Reader:
    """qectomy.json and what else a report, a healing or a verification reads of a folder."""
    reports = tuple(_short(report) for report in (full_report(), exact_report(), healed_report()))
    others = {"evaluation.json": full_evaluation(), "bench.json": full_bench()}
    points = [{"name": "x", "parameters_removed": 0.1, "ratio": 1.5}]
    config, weights = grounds.files["reduced"]["config.json"], grounds.files["reduced"][SINGLE]
    names = list(grounds.files["reduced"])
    sound = {"calibration": {"texts": [{"file": "a", "sha256": "0", "tokens": 9, "first_token": 1}]}}
    sound |= {"fitted_spans": Sketch(span_hashes(RAVEN)).record()}
    layers = [{"index": i, "map": "select"} for i in range(5)]

    def make(dice: Dice) -> Case:
        digests = {"tensors_sha256": dict.fromkeys(names, "0" * 64)}
        report = mutated(
            dice, {**dice.choice(reports), **sound, **digests, **({"layers": layers} if dice.randrange(2) else {})}
        )
        case: Case = {"config.json": config, SINGLE: weights, "qectomy.json": json_text(dice, report)}
        for name, content in others.items():
            if dice.randrange(4) == 0:
                case[name] = json_text(dice, mutated(dice, content))
        if dice.randrange(4) == 0:
            case["points.json"] = json_text(dice, mutated(dice, points))
        if dice.randrange(12) == 0:
            case[dice.choice(("qectomy.json", *others, "points.json"))] = odd_file(dice)
        return case

    def read(folder: Path) -> None:
        checkpoint = open_checkpoint(folder, reduced=True)
        report = fitted_report(checkpoint)
        first, stop = fitted_span(checkpoint, "a", "a")
        assert first <= stop
        assert overlap("a text", fitted_on(report))["spans"] == 0
        refused_or_none(_as_written, checkpoint)
        found = refused_or_none(read_points, folder / "points.json") or []
        folders = read_folders([folder])
        if zlib.crc32((folder / "qectomy.json").read_bytes()) % 16 == 0:  # drawing takes half a second
            page(folders, points=found)

    return Reader("qectomy.json and reports", make, read, lambda raw: {"qectomy.json": raw})


def _short(value: Any) -> Any:
    """A report with the first items of its long lists: a page of it is made a hundred times faster."""
    if isinstance(value, dict):
        return {name: _short(item) for name, item in value.items()}
    return [_short(item) for item in value[: 5 if len(value) > 12 else None]] if isinstance(value, list) else value


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def saved_dataset(records: list[dict[str, Any]]) -> list[tuple[str, bytes]]:
    """The files of a folder that save_to_disk wrote, but for the one that is not read."""
    table, sink = pyarrow.Table.from_pylist(records), pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    state = json.dumps({"_data_files": [{"filename": "rows.arrow"}]}).encode()
    return [("state.json", state), ("rows.arrow", sink.getvalue().to_pybytes())]


def text_reader() -> Reader:
    """Texts: plain, JSON lines and lists, and parquet, each under any name, compressed or not; saved datasets."""
    lines = [line for line in RAVEN.splitlines() if line]
    records = [{"text": line} for line in lines]
    held = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": lines}), held, row_group_size=4)
    saved = saved_dataset(records)
    sound = [RAVEN.encode(), held.getvalue(), json.dumps(records).encode(), json.dumps(lines, indent=1).encode()]

    def lines_of(dice: Dice) -> bytes:
        found = [json.dumps(record).encode() for record in records]
        found[dice.randrange(len(found))] = json_text(dice, mutated(dice, {"text": "a", "n": [1]}))
        return b"\n".join(found)

    def list_of(dice: Dice) -> bytes:
        found = list[Any](records)
        found[dice.randrange(len(found))] = mutated(dice, {"text": "a", "n": [1]})
        return json_text(dice, found)

    def make(dice: Dice) -> Case:
        name = f"a{dice.choice(TEXT_ENDINGS)}"
        kind = dice.randrange(11)
        if kind == 0:
            content = odd_file(dice)
            return {name: b"" if isinstance(content, Pipe) else content}  # a pipe is a text like another
        if kind < 5:
            return {name: mutated_bytes(dice, sound[kind - 1])}
        if kind < 8:
            return {name: lines_of(dice) if kind < 7 else list_of(dice)}
        if kind == 8:
            return {
                f"d/{file}": content if dice.randrange(2) else mutated_bytes(dice, content) for file, content in saved
            }
        pack = gzip.compress if dice.randrange(2) else zstd
        packed = pack(dice.choice(sound) if dice.randrange(2) else lines_of(dice))
        return {name: packed if dice.randrange(2) else mutated_bytes(dice, packed)}

    def read(folder: Path) -> None:
        name = str(next(folder.iterdir()))
        reading = Reading(tokenizer=tiny_tokenizer)  # which has no chat template
        source, streamed = read_source(name, reading), Documents(name, reading)
        found = list(streamed)
        assert source.text == streamed.join.join(found)
        assert source.sha256 == streamed.sha256
        if Path(name).is_file():
            assert source.sha256 == hashlib.sha256(Path(name).read_bytes()).hexdigest()

    return Reader("texts", make, read, lambda raw: {f"a{TEXT_ENDINGS[len(raw) % len(TEXT_ENDINGS)]}": raw})


def nanogpt_reader(mark: Path) -> Reader:
    """A nanoGPT checkpoint: a pickle, of which only tensors and plain containers are read."""
    sound = made(bias=False)
    modes = ("identity", "residual", "original", "residual_gelu", "x")

    def saved(content: Any) -> bytes:
        held = io.BytesIO()
        torch.save(content, held)
        return held.getvalue()

    whole = saved({"model_args": sound.args, "model": sound.state})
    legacy = io.BytesIO()
    torch.save({"model_args": sound.args, "model": sound.state}, legacy, _use_new_zipfile_serialization=False)
    old = legacy.getvalue()

    def make(dice: Dice) -> Case:
        kind = dice.randrange(8)
        if kind == 0:
            return {"ckpt.pt": odd_file(dice)}
        if kind < 3:
            return {"ckpt.pt": mutated_bytes(dice, dice.choice((whole, old)))}
        args, state = dict(sound.args), dict(sound.state)
        name = dice.choice(list(state))
        if kind < 5:
            args = _plain(mutated(dice, {**args, "query_mode": dice.choice(modes)}))
        elif kind == 5:
            odd = (
                torch.zeros(1).expand(10**9),
                torch.zeros(3, dtype=torch.int8),
                torch.zeros(0),
                state[name].to_sparse(),
            )
            state[name] = dice.choice(
                (*odd, None, 3, state[name].double(), state[name].t(), state[name] * float("nan"))
            )
        elif kind == 6:
            state[dice.choice((*state, "x", "\x1b[2J", "transformer.h.99.x"))] = state.pop(name)
        else:
            return {
                "ckpt.pt": dice.choice((pickle.dumps(Canary(mark)), saved({"model_args": Canary(mark), "model": {}})))
            }
        return {"ckpt.pt": saved({"model_args": args, "model": state})}

    def read(folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import_nanogpt(folder / "ckpt.pt", folder / "out")

    return Reader("nanoGPT checkpoint", make, read, lambda raw: {"ckpt.pt": raw})


def _plain(value: Any) -> Any:
    """A mutated value without JSON's raw parts."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value)[:50] if isinstance(value, Raw) else value
