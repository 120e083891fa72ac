"""The sections that show text: a sample token by token, and what both models write."""

from typing import Any

from qectomy.report.page import numbers
from qectomy.report.page.blocks import Block, Prose, Section, Table, Token, Tokens, Writing, Writings
from qectomy.report.page.reading import Folder

LEVELS = (0.1, 0.5, 1.5)  # nats by which a token is predicted worse or better
MOST_TOKENS, MOST_WRITINGS, LONGEST_WRITING = 1500, 12, 2000


def token_section(folder: Folder, key: str) -> Section | None:
    """A sample of the measured text, each token marked by how much worse it is predicted."""
    sample = folder.report.get("token_sample", {})
    found = sample.get("tokens", [])[:MOST_TOKENS]
    scored = [token for token in found if _scored(token)]
    if not scored:
        return None
    tokens = [
        Token(text=token["text"], level=_level(token), title=_title(token)) if _scored(token) else _unscored(token)
        for token in found
    ]
    ranked = sorted(scored, key=lambda token: token["after"] - token["before"])
    worst = [token for token in reversed(ranked) if token["after"] > token["before"]][:6]
    best = [token for token in ranked if token["after"] < token["before"]][:4]
    table = Table(
        caption="The largest differences in this sample",
        columns=("token", "original", "reduced", "difference, nats"),
        rows=[_token_row(token) for token in (*worst, *best)],
    )
    caption = (
        f"A part of {sample.get('text', 'the measured text')}. Marked tokens are predicted worse (solid underline) "
    )
    caption += "or better (dotted) than by the original; the thicker, the more. Pointing at a token shows its losses."
    blocks: tuple[Block, ...] = (Tokens(tokens=tokens, caption=caption), table)
    return Section(key=f"{key}-tokens", title="Token by token", blocks=blocks)


def _scored(token: dict[str, Any]) -> bool:
    return "before" in token and "after" in token


def _level(token: dict[str, Any]) -> int:
    gap = token["after"] - token["before"]
    return sum(abs(gap) >= level for level in LEVELS) * (1 if gap > 0 else -1)


def _title(token: dict[str, Any]) -> str:
    gap = numbers.signed(token["after"] - token["before"], 2)
    return f"{numbers.plain(token['before'], 2)} → {numbers.plain(token['after'], 2)} nats ({gap})"


def _unscored(token: dict[str, Any]) -> Token:
    return Token(text=token["text"], level=None, title="not scored")


def _token_row(token: dict[str, Any]) -> tuple[str, ...]:
    gap = token["after"] - token["before"]
    shown = token["text"].replace("\n", "⏎").replace(" ", "␣")
    losses = (numbers.plain(token[when], 2) for when in ("before", "after"))
    return (shown, *losses, f"{'worse' if gap > 0 else 'better'} {numbers.signed(gap, 2)}")


def generation_section(folder: Folder, key: str) -> Section | None:
    """What both models write after the same prompts."""
    found = folder.report.get("generation")
    if found is None:
        return None
    title, key = "Generation, side by side", f"{key}-generation"
    if not found.get("samples"):
        return Section(key=key, title=title, blocks=(Prose(text=f"Left out: {found.get('skipped', 'no samples')}."),))
    samples = []
    for sample in found["samples"][:MOST_WRITINGS]:
        original, reduced = (sample.get(who, "")[:LONGEST_WRITING] for who in ("original", "reduced"))
        same = 0
        while same < min(len(original), len(reduced)) and original[same] == reduced[same]:
            same += 1
        shared = original[:same].removeprefix(" ")  # the space between prompt and answer
        pair = dict(original=(shared, original[same:]), reduced=(shared, reduced[same:]))
        samples.append(Writing(prompt=sample.get("prompt", "")[:LONGEST_WRITING], **pair))
    most = f", at most {found['max_new_tokens']:,} tokens" if "max_new_tokens" in found else ""
    caption = f"Decoding: {found.get('decoding', 'not recorded')}{most}. Text from where the two part is underlined."
    caption += f" Prompts: {found['prompt_format']}." if "prompt_format" in found else ""
    return Section(key=key, title=title, blocks=(Writings(samples=samples, caption=caption),))
