"""Numbers as people read them. None is written as a dash."""

from collections.abc import Sequence

from qectomy.report.tables import size

Number = float | int | None
DASH = "–"
MINUS = "\N{MINUS SIGN}"


def whole(value: Number) -> str:
    return DASH if value is None else f"{value:,.0f}".replace("-", MINUS)


def rough(value: float | int) -> str:
    """A large count: 8.85 million."""
    for scale, word in ((1e9, "billion"), (1e6, "million")):
        if value >= 10 * scale or (scale == 1e9 and value >= scale):
            return f"{value / scale:,.1f} {word}"
    return whole(value)


def percent(value: Number, digits: int = 1) -> str:
    return DASH if value is None else f"{100 * value:.{digits}f} %".replace("-", MINUS)


def plain(value: Number, digits: int = 3) -> str:
    return DASH if value is None else f"{value:,.{digits}f}".replace("-", MINUS)


def signed(value: Number, digits: int = 3) -> str:
    return DASH if value is None else f"{value:+,.{digits}f}".replace("-", MINUS)


def short(value: Number) -> str:
    """Three digits that count: 0.0123, 1.2e-5 as 1.2 × 10⁻⁵."""
    if value is None:
        return DASH
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        digits = max(0, 2 - _exponent(value))
        return plain(value, digits)
    mantissa, exponent = f"{value:.1e}".split("e")
    power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa} × 10{power}".replace("-", MINUS)


def _exponent(value: float | int) -> int:
    return int(f"{value:e}".split("e")[1])


def ratio(value: Number) -> str:
    """A ratio with the digits that tell it from 1."""
    if value is None or value == 1:
        return DASH if value is None else "1"
    if abs(value - 1) < 5e-5:
        return f"{value:.7f}"
    return plain(value, 4 if value < 2 else 2 if value < 100 else 0)


def between(pair: Sequence[float] | None, write: str = "plain") -> str:
    """An interval."""
    if pair is None:
        return DASH
    if write == "ratio" and max(abs(end - 1) for end in pair) >= 5e-5:
        digits = 4 if pair[1] < 2 else 2
        return f"[{plain(pair[0], digits)}, {plain(pair[1], digits)}]"
    return f"[{WRITERS[write](pair[0])}, {WRITERS[write](pair[1])}]"


def bytes_(value: Number) -> str:
    return DASH if value is None else size(value).replace("-", MINUS)


def seconds(value: Number) -> str:
    if value is None:
        return DASH
    if value < 100:
        return f"{value:.1f} s" if value >= 10 else f"{value:.2f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


WRITERS = {"plain": lambda value: plain(value, 2), "ratio": ratio, "signed": signed}
