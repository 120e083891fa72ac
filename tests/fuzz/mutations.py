"""Hostile values, and what a hand or a bad disk does to bytes and to JSON; all by one source of chance.

That source is a `random.Random`: a seeded one, hypothesis's own (so that it can make a failing case small), or
`ByteDice`, whose every choice comes from bytes that a coverage-guided fuzzer changes.
"""

import copy
import json
import random
from typing import Any

Dice = random.Random


class ByteDice(random.Random):
    """Chance from given bytes; zeros when they are used up, so that every choice then is the first one."""

    def __new__(cls, data: bytes) -> "ByteDice":
        return super().__new__(cls, 0)

    def __init__(self, data: bytes):
        self._data, self._at = data, 0
        super().__init__(0)

    def getrandbits(self, k: int) -> int:
        n = (k + 7) // 8
        piece, self._at = self._data[self._at : self._at + n], self._at + n
        return int.from_bytes(piece.ljust(n, b"\0"), "big") >> (8 * n - k)

    def random(self) -> float:
        return self.getrandbits(32) / 2**32


class Raw(str):
    """JSON text that goes into a file as it is."""


NUMBERS = (0, 1, -1, 2, 3, 4, 7, 31, 33, 320, 2**15, 10**6, 10**7, 2**31 - 1, 2**31, 2**40, 2**53, 2**63, 2**64)
STRINGS = (
    "",
    "..",
    "../secret.safetensors",
    "/etc/passwd",
    "\0",
    "\ud800",
    "\x1b[2J\x1b]0;x\x07",
    "a" * 3000,
    "ﷺ" * 99,
)
WORDS = ("llama", "gpt2", "mistral", "qectomy_llama", "qwen3", "gelu", "silu", "linear", "yarn", "float32", "dense")
RAW = ("1e999", "-1e999", "NaN", "-Infinity", "9" * 400, "9" * 5000, "-" + "9" * 30, "[" * 90 + "]" * 90, "1.5", "1e5")
DEEP = ("[" * 150 + "]" * 150, "[" * 900 + "]" * 900, "[" * 30_000 + "]" * 30_000, '{"a":' * 5000 + "1" + "}" * 5000)


def hostile(dice: Dice) -> Any:
    """A value that no field expects."""
    kind = dice.randrange(16)
    if kind < 5:
        return dice.choice(NUMBERS) * dice.choice((1, 1, -1))
    if kind < 8:
        return dice.choice(STRINGS)
    if kind < 10:
        return dice.choice(WORDS)
    if kind < 12:
        return Raw(dice.choice(RAW))
    if kind == 12:
        return Raw(dice.choice(DEEP))
    simple = (None, True, False, 0.5, -0.0, [], {}, [[]], {"": None}, [1, "a", None], {"type": "default"}, 1e308)
    return copy.deepcopy(dice.choice(simple))


def mutated(dice: Dice, value: Any, most: int = 3) -> Any:
    """A copy of a JSON value in which up to `most` places are changed."""
    held = [copy.deepcopy(value)]
    for _ in range(1 + dice.randrange(most)):
        parent, key = _place(dice, held)
        _change(dice, parent, key)
    return held[0] if held else hostile(dice)


def _place(dice: Dice, held: list[Any]) -> tuple[Any, Any]:
    """A container inside `held` and one of its keys."""
    parent: Any = held
    key: Any = 0
    while parent and isinstance(inner := parent[key], dict | list) and inner and dice.randrange(8):
        parent = inner
        key = dice.choice(list(parent)) if isinstance(parent, dict) else dice.randrange(len(parent))
    return parent, key


def _change(dice: Dice, parent: Any, key: Any) -> None:
    kind = dice.randrange(8)
    if not parent:
        return
    if kind < 4:
        parent[key] = hostile(dice)
    elif kind == 4:
        del parent[key]
    elif kind == 5 and isinstance(parent[key], int) and not isinstance(parent[key], bool):
        parent[key] += dice.choice((-1, 1, -parent[key], 8, parent[key]))
    elif isinstance(parent, dict):
        other = dice.choice(list(parent))
        if kind == 6:
            parent[key], parent[other] = parent[other], parent[key]
        else:
            parent[str(hostile(dice))[:4000]] = copy.deepcopy(parent[other])
    else:
        parent.insert(key, copy.deepcopy(dice.choice(parent)))


def json_text(dice: Dice, value: Any) -> bytes:
    """A value as JSON in UTF-8, at times with a name that stands twice, or not quite JSON."""
    text = _dump(dice, value, dice.randrange(4) == 0)
    kind = dice.randrange(40)
    if kind == 0:
        text = text[: dice.randrange(len(text) + 1)]
    elif kind == 1:
        text += dice.choice(("x", "{}", " ", "\0", "]"))
    elif kind == 2:
        text = "\ufeff" + text
    elif kind == 3:
        return mutated_bytes(dice, text.encode("utf-8", "surrogatepass"))
    return text.encode("utf-8", "surrogatepass")


def _dump(dice: Dice, value: Any, twice: bool) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, list):
        return "[" + ", ".join(_dump(dice, item, twice) for item in value) + "]"
    if isinstance(value, dict):
        parts = [f"{json.dumps(name)}: {_dump(dice, item, twice)}" for name, item in value.items()]
        if twice and parts and dice.randrange(6) == 0:
            parts.append(dice.choice(parts))
        return "{" + ", ".join(parts) + "}"
    return json.dumps(value)


def mutated_bytes(dice: Dice, data: bytes, most: int = 4) -> bytes:
    """A copy of some bytes that were flipped, cut out, doubled, put in or moved at up to `most` places."""
    for _ in range(1 + dice.randrange(most)):
        a = dice.randrange(len(data) + 1) if dice.randrange(3) else dice.randrange(min(len(data), 400) + 1)
        b = min(len(data), a + dice.choice((1, 1, 2, 4, 8, 100, 5000)))
        kind = dice.randrange(7)
        if kind < 2:
            data = (
                data[:a]
                + bytes(byte ^ (1 << dice.randrange(8)) for byte in data[a : min(b, a + 8)])
                + data[min(b, a + 8) :]
            )
        elif kind == 2:
            data = data[:a] + data[b:]
        elif kind == 3:
            data = data[:b] + data[a:]
        elif kind == 4:
            data = (
                data[:a]
                + dice.choice((b"\0" * 8, b"\xff" * 8, b'"', b"{", b"[", b",", b"-", b"99", b"\n", b"\xed\xa0\x80"))
                + data[a:]
            )
        elif kind == 5:
            data = data[:a]
        else:
            data = data[:a] + bytes(dice.randrange(256) for _ in range(min(b - a, 8))) + data[b:]
    return data
