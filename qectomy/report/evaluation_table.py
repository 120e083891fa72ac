"""What `qectomy eval` prints for people: one column a checkpoint, and the protocol in words."""

from rich.markup import escape
from rich.table import Table

from qectomy.record.evaluation import Evaluated
from qectomy.report.tables import between, console, shown
from qectomy.report.text_words import read_as_words, text_doubt

MOST_COLUMNS, LONGEST_NAME = 3, 24  # checkpoints side by side by name; more or longer ones by number


def show_evaluations(results: list[Evaluated]) -> None:
    """Print one column a checkpoint, what the intervals are, and the protocol they share."""
    names = [row.checkpoint for row in results]
    if len(names) > MOST_COLUMNS or max(map(len, names)) > LONGEST_NAME:
        for number, name in enumerate(names, 1):
            console.print(f"{number}: {name}", markup=False, soft_wrap=True)
        names = [str(number) for number in range(1, len(names) + 1)]
    table = Table("", *map(escape, names))
    pairs = [row.paired for row in results]
    speeds = [row.tokens_per_second for row in results if row.tokens_per_second is not None]
    fast = len(speeds) == len(results)  # else a reference ran beside some of them
    rows = {
        "computed in": [row.protocol.dtype or "-" for row in results] if len(dtypes_of(results)) > 1 else ["-"],
        "perplexity": [shown(row.perplexity, 4) for row in results],
        "  95 %": [between(row.perplexity_95, 3) for row in results],
        "ratio to the first": [shown(pair.ratio if pair else None, 5) for pair in pairs],
        "  95 %, paired": [between(pair.ratio_95 if pair else None, 4) for pair in pairs],
        "word perplexity": [shown(row.word_perplexity, 3) for row in results],
        "bits per byte": [shown(row.bits_per_byte, 5) for row in results],
        "KL to the reference": [shown(row.kl, 5) for row in results],
        "same first choice": ["-" if row.top1_agreement is None else f"{row.top1_agreement:.2%}" for row in results],
        "tokens a second": [f"{speed:,.0f}" for speed in speeds] if fast else ["-"],
    }
    for name, cells in rows.items():
        if set(cells) != {"-"}:
            table.add_row(name, *cells)
    console.print(table)
    for row in results:
        for why in dict.fromkeys((row.reference_refused, row.paired_refused)):
            if why:
                console.print(f"{row.checkpoint}: {why}", markup=False)
    for row in results:
        # Of what was fitted on nothing there is no overlap.
        if row.overlap and (doubt := text_doubt(row.own_protocol)):
            console.print(f"{row.checkpoint}: {doubt[1]}", markup=False)
    protocol = results[0].protocol
    name = f"{protocol.name}: " if protocol.name else ""
    if protocol.only_first_tokens is not None:
        name += f"NOT the whole text, its first {protocol.only_first_tokens:,} tokens or so: "
    dtypes = ", ".join(dtypes_of(results))
    read_as = f", {words}" if (words := read_as_words(protocol)) else ""
    console.print(
        f"{name}{protocol.text} (sha256 {protocol.text_sha256[:16]}{read_as}), "
        f"{protocol.scored_tokens:,} tokens scored in {protocol.windows:,} windows, {dtypes}: "
        f"{protocol.in_words}. BOS: {protocol.bos}; "
        f"{protocol.tail}. 95 %: bootstrap over windows.",
        markup=False,
    )


def dtypes_of(results: list[Evaluated]) -> list[str]:
    """The types that the results were computed in, each once."""
    return list(dict.fromkeys(row.protocol.dtype or "-" for row in results))
