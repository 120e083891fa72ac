"""Every reader of outside files, on sound folders that are made here once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cases import SECRET, Reader, files_of
from checkpoint_readers import (
    Grounds,
    companion_reader,
    config_reader,
    header_reader,
    index_reader,
    query_reader,
    recipe_reader,
)
from foldings import fold
from other_readers import journal_reader, nanogpt_reader, report_reader, text_reader, tokenizer_reader
from tiny_models import EVERY_MAP, save_reduced, save_tiny

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.checkpoint.headers import SINGLE
from qectomy.errors import Stopped
from qectomy.surgery.materialize import materialize

SMALL: dict[str, Any] = dict(vocab_size=320, hidden_size=16, intermediate_size=8, num_attention_heads=2)
SMALL |= dict(num_key_value_heads=1)
THREE = ("select", "key-shared", "low-rank:3")
AT_STEP = 3  # the run that is found has been stopped there


def make_readers(where: Path, place: Path) -> list[Reader]:
    """Return every reader. `where` keeps the sound folders; cases are laid in `place`, whose parent is watched."""
    llama = save_tiny(where / "llama", **SMALL)
    five = save_tiny(where / "five", **{**SMALL, "num_hidden_layers": len(EVERY_MAP)})
    five_gpt2 = save_tiny(where / "five_gpt2", "gpt2", **{**SMALL, "num_hidden_layers": len(EVERY_MAP)})
    three = save_tiny(where / "three_stock", **{**SMALL, "num_hidden_layers": len(THREE)})
    gpt2 = save_tiny(where / "gpt2", "gpt2", **SMALL)
    fold(gpt2, where / "exact")
    grounds = Grounds(
        llama=llama,
        gpt2=gpt2,
        mistral=save_tiny(where / "mistral", "mistral", **SMALL),
        yarn=save_tiny(where / "yarn", "rope-yarn", **SMALL),
        sharded=save_tiny(where / "sharded", "sharded", **SMALL),
        reduced=save_reduced(where / "reduced", five, EVERY_MAP),
        run=save_reduced(where / "three", three, THREE),
        reduced_gpt2=save_reduced(where / "reduced_gpt2", five_gpt2, EVERY_MAP),
        exact=where / "exact",
    )
    place.parent.mkdir(parents=True, exist_ok=True)
    (place.parent / "secret").write_bytes(SECRET)
    (place.parent / SINGLE).write_bytes(grounds.files["llama"][SINGLE])
    mark = place.parent / "mark"
    return [
        header_reader(grounds),
        index_reader(grounds),
        config_reader(grounds),
        recipe_reader(grounds),
        query_reader(grounds),
        companion_reader(grounds),
        journal_reader(grounds, *_interrupted(grounds, where)),
        tokenizer_reader(grounds, mark),
        report_reader(grounds),
        text_reader(),
        nanogpt_reader(mark),
    ]


def _interrupted(grounds: Grounds, where: Path) -> tuple[dict[str, bytes], bytes]:
    """Return the files that a stopped materialize leaves, and the weights of one that was not stopped."""
    source = where / "run"
    source.mkdir()
    for name in ("config.json", SINGLE):
        (source / name).write_bytes(grounds.files["run"][name])
    materialize(open_checkpoint(source, reduced=True), where / "whole")
    materialized = (where / "whole" / SINGLE).read_bytes()

    def stop(done: int, total: int, doing: str) -> None:
        if done == AT_STEP:
            raise Stopped("stopped for the test")

    stopping: Callable[[int, int, str], None] = stop
    try:
        materialize(open_checkpoint(source, reduced=True), where / "stopped" / "out", stopping)
    except Stopped:
        return files_of(where / "stopped"), materialized
    raise AssertionError("the run was not stopped")
