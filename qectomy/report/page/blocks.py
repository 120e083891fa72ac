"""What a section of the page is made of; each block has a macro of its `kind` in templates/blocks.html."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell with more than text: `mark` is a class of the page's style, `share` draws a bar of that length."""

    text: str
    mark: str = ""
    share: float | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; the first column heads its rows. `words` are the columns of text, all others are numbers."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    words: Sequence[int] = (0,)
    note: str = ""
    kind: str = "table"


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A picture and what it shows."""

    picture: Markup
    caption: str
    kind: str = "chart"


@dataclass(frozen=True, kw_only=True)
class Prose:
    text: str
    kind: str = "prose"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Names and their values, as a list of definitions."""

    rows: Sequence[tuple[str, str]]
    mono: bool = False
    kind: str = "facts"


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command to copy."""

    label: str
    text: str
    kind: str = "command"


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token of the sample: `level` from -3 (far better) to 3 (far worse), None where it is not scored."""

    text: str
    level: int | None
    title: str


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A text, each token marked by how much worse the reduced model predicts it."""

    tokens: Sequence[Token]
    caption: str
    kind: str = "tokens"


@dataclass(frozen=True, kw_only=True)
class Writing:
    """What both models make of a prompt; `agree` is how many characters they share from the start."""

    prompt: str
    original: tuple[str, str]  # what they share, what follows
    reduced: tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Writings:
    samples: Sequence[Writing]
    caption: str
    kind: str = "writings"


Block = Table | Chart | Prose | Facts | Command | Tokens | Writings


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and its blocks; `key` is its anchor, unique in a page."""

    key: str
    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)
