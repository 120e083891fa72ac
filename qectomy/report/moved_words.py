"""What a conversion moved beside W_Q, in words: rows of a table for each layer, and one line for all of a map."""

from qectomy.models.query_maps import MAPS
from qectomy.record.reduced import Fitted, Reduced

COLUMNS = ("W_K", "W_V", "W_O", "W_down")
OTHERS = {
    name: name for name in ("W_Q", "W_gate", "W_up", *(f"b_{name}" for name in "QKVO"), "b_gate", "b_up", "b_down")
}
OTHERS |= {"norm_gain": "the norm's gain", "norm_shift": "the norm's shift"}
MEANING = (
    "‖W' − W‖ / ‖W‖ (Frobenius), W as the original stores it and W' as this does, rounding included. W_K of a reduced "
    "layer makes up for its query map, and may lie in other coordinates that give the same attention. {rest}"
)
REFITTED = (
    "From the first reduced layer on W_O and W_down are refitted{dense}, so that the stream returns to the original's; "
    "with --no-refit they stay."
)
LEFT = "Nothing was refitted (--no-refit)."
TAKES_IN = "b_O of a reduced layer also takes in the bias of its values, which loses nothing."
TURNED = "The stream lies in another basis here, in which W is taken too."
HEALED = "Measured when it was fitted, before healing, which trained all of them or some."


def moved_table(report: Reduced) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the heads and a row for each layer that says how far it moved; none of an exact fold does."""
    heads, rows = ("layer", "map", *COLUMNS, "other"), []
    for layer in report.layers if isinstance(report, Fitted) else ():
        if moved := layer.moved:
            others = (f"{said} {share(moved[name])}" for name, said in OTHERS.items() if moved.get(name, 0) != 0)
            columns = (share(moved[name]) if name in moved else "-" for name in COLUMNS)
            rows.append((str(layer.index), layer.map, *columns, ", ".join(others)))
    if any(row[-1] for row in rows):
        return heads, rows
    return heads[:-1], [row[:-1] for row in rows]


def moved_meaning(report: Fitted) -> str:
    """Say what the numbers of `moved_table` are."""
    refitted = REFITTED.format(dense=", of dense layers too" if has_refitted_dense(report) else "")
    said = [refitted if report.calibration is None or report.calibration.refit else LEFT]
    maps = set(report.maps)
    if report.source.model_type == "gpt2":
        said += [TAKES_IN] if maps - {"dense"} else []
    elif maps & {name for name, query_map in MAPS.items() if query_map.plain}:
        said.append(TURNED)
    return MEANING.format(rest=" ".join([*said, HEALED] if report.healing else said))


def has_refitted_dense(report: Fitted) -> bool:
    """Whether a dense layer comes after a reduced one, so that a fit refits it."""
    maps = list(report.maps)
    return "dense" in maps[next((i for i, name in enumerate(maps) if name != "dense"), len(maps)) :]


def moved_summary(report: Fitted) -> list[str]:
    """Say of the layers of each map how far the least and the most moved: 'dense: W_O 0.8 to 2.2 %, W_K 0'."""
    found: dict[str, dict[str, list[float]]] = {}
    for layer in report.layers:
        for name in COLUMNS:
            value = (layer.moved or {}).get(name)
            if value is not None:
                found.setdefault(layer.map, {}).setdefault(name, []).append(value)
    return [
        f"{query_map}: {', '.join(f'{name} {_span(values)}' for name, values in parts.items())}"
        for query_map, parts in found.items()
    ]


def share(value: float | None) -> str:
    """Write a share with the digits that count; None: there were only zeros before."""
    if value is None:
        return "from 0"
    percent = 100 * value
    if 0 < percent < 0.01:
        return "< 0.01 %"
    return f"{percent:.{0 if not percent or percent >= 10 else 1 if percent >= 1 else 2}f} %"


def _span(values: list[float]) -> str:
    least, most = share(min(values)), share(max(values))
    return most if least == most else f"{least.removesuffix(' %')} to {most}"
