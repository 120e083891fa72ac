"""The sections that show text: a sample token by token, and what both models write."""

from qectomy.record.reduced import TokenLoss
from qectomy.report.page import numbers
from qectomy.report.page.blocks import Prose, Section, Table, Token, Tokens, Writing, Writings
from qectomy.report.page.reading import Folder

LEVELS = (0.1, 0.5, 1.5)  # nats by which a token is predicted worse or better
MOST_TOKENS, MOST_WRITINGS, LONGEST_WRITING = 1500, 12, 2000


def token_section(folder: Folder, key: str) -> Section | None:
    """A sample of the measured text, each token marked by how much worse it is predicted."""
    sample = folder.report.token_sample
    found = sample.tokens[:MOST_TOKENS] if sample else []
    ranked = sorted(((token.gap, place) for place, token in enumerate(found) if token.gap is not None))
    if sample is None or not ranked:
        return None
    worst = [found[place] for gap, place in reversed(ranked) if gap > 0][:6]
    best = [found[place] for gap, place in ranked if gap < 0][:4]
    table = Table(
        caption="The largest differences in this sample",
        columns=("token", "original", "reduced", "difference, nats"),
        rows=[_token_row(token) for token in (*worst, *best)],
    )
    caption = f"A part of {sample.text}. Marked tokens are predicted worse (solid underline) or better (dotted) than "
    caption += "by the original; the thicker, the more. Pointing at a token shows its losses."
    blocks = (Tokens(tokens=[_token(token) for token in found], caption=caption), table)
    return Section(key=f"{key}-tokens", title="Token by token", blocks=blocks)


def _token(token: TokenLoss) -> Token:
    if (gap := token.gap) is None:
        return Token(text=token.text, level=None, title="not scored")
    level = sum(abs(gap) >= level for level in LEVELS) * (1 if gap > 0 else -1)
    losses = f"{numbers.plain(token.before, 2)} → {numbers.plain(token.after, 2)} nats ({numbers.signed(gap, 2)})"
    return Token(text=token.text, level=level, title=losses)


def _token_row(token: TokenLoss) -> tuple[str, ...]:
    gap = token.gap or 0.0
    shown = token.text.replace("\n", "⏎").replace(" ", "␣")
    losses = numbers.plain(token.before, 2), numbers.plain(token.after, 2)
    return (shown, *losses, f"{'worse' if gap > 0 else 'better'} {numbers.signed(gap, 2)}")


def generation_section(folder: Folder, key: str) -> Section | None:
    """What both models write after the same prompts."""
    found = folder.report.generation
    if found is None:
        return None
    title, key = "Generation, side by side", f"{key}-generation"
    if not found.samples:
        return Section(key=key, title=title, blocks=(Prose(text=f"Left out: {found.skipped or 'no samples'}."),))
    samples = []
    for sample in found.samples[:MOST_WRITINGS]:
        original, reduced = (text[:LONGEST_WRITING] for text in (sample.original, sample.reduced))
        same = 0
        while same < min(len(original), len(reduced)) and original[same] == reduced[same]:
            same += 1
        shared = original[:same].removeprefix(" ")  # the space between prompt and answer
        pair = dict(original=(shared, original[same:]), reduced=(shared, reduced[same:]))
        samples.append(Writing(prompt=sample.prompt[:LONGEST_WRITING], **pair))
    most = f", at most {found.max_new_tokens:,} tokens" if found.max_new_tokens else ""
    caption = f"Decoding: {found.decoding}{most}. Text from where the two part is underlined."
    caption += f" Prompts: {found.prompt_format}." if found.prompt_format else ""
    return Section(key=key, title=title, blocks=(Writings(samples=samples, caption=caption),))
