"""What the records share: each is built, written and read by one class.

A text in a record is clean, a number finite. In a file a field that no class knows is dropped, so that a newer version
can add some; a field that a class has to have, and what is of another kind than it says, is one error that names both.
"""

import importlib.metadata
import json
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, Strict, TypeAdapter, ValidationError

from qectomy import __version__
from qectomy.checkpoint.headers import MAX_JSON_BYTES, parse_json, read_regular
from qectomy.errors import ReportError, clean, shown

PACKAGES = ("torch", "transformers", "safetensors", "numpy")
AnyRecord = TypeVar("AnyRecord")


def _clean(value: Any) -> Any:
    return clean(value) if isinstance(value, str) else value


def _finite(number: float) -> float:
    if not abs(number) < 1e300:  # of which some are still added up and divided
        raise ValueError("it should be a finite number")
    return number


def _ordered(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError("it should be an interval [low, high]")
    return ends


Text = Annotated[str, Strict(), BeforeValidator(_clean)]
Flag = Annotated[bool, Strict()]
Size = Annotated[int, Strict(), Field(gt=0, lt=10**18)]
Count = Annotated[int, Strict(), Field(ge=0, lt=10**18)]
Number = Annotated[float, Strict(), AfterValidator(_finite)]
Amount = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
Share = Annotated[float, Strict(), Field(ge=0, le=1)]
Interval = Annotated[tuple[Number, Number], AfterValidator(_ordered)]
Plain = Text | Flag | Count | Number  # a setting of something


class Record(BaseModel):
    """Fields of the kinds above, or records of their own."""

    def as_dict(self) -> dict[str, Any]:
        """Return what is written of it: no field that is None."""
        return self.model_dump(mode="json", exclude_none=True)

    def as_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n"


class Made(Record):
    """By which versions, when and by which command something was made."""

    qectomy: Text
    versions: dict[Text, Text]
    created: Text
    command: Text


def made(command: str) -> dict[str, Any]:
    """Return the fields of `Made`, of something that is made now."""
    return {
        "qectomy": __version__,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
    }


def read_record(path: Path, kind: type[AnyRecord]) -> AnyRecord:
    """Return the record in a file. Raises ReportError that names the file and the field."""
    return checked(read_raw(path), kind, path)


def read_raw(path: Path) -> Any:
    """Return the content of a JSON file of bounded size and depth. Raises ReportError."""
    try:
        return parse_json(read_bounded(path))
    except ValueError as error:
        raise ReportError(f"{path} is not JSON ({error}); it was damaged, or is another file: make it again") from error


def read_bounded(path: Path) -> bytes:
    """Return the bytes of a file that is no larger than any report. Raises ReportError."""
    try:
        data = read_regular(path, MAX_JSON_BYTES)
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror or error}") from error
    if data is None:
        raise ReportError(f"{path} has more bytes than any report has ({MAX_JSON_BYTES:,})")
    return data


def checked(raw: Any, kind: type[AnyRecord], path: Path) -> AnyRecord:
    """Return a record of what a file holds. Raises ReportError that names the first field at fault."""
    try:
        return TypeAdapter(kind).validate_python(raw)
    except ValidationError as error:
        raise ReportError(
            f"{path}: {fault(error)}. It was changed by hand, or made by another version; make it again or mend the "
            "field"
        ) from error


def fault(error: ValidationError) -> str:
    """Say which field is at fault, what it is and what it should be."""
    first = error.errors(include_url=False)[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    where = clean(where.removeprefix("."))[:200] or "the file"
    if first["type"] == "missing":
        return f"{where} is missing"
    found, wanted = clean(shown(first["input"])), first["msg"].removeprefix("Value error, ")
    found = found if len(found) <= 60 else found[:57] + "..."
    return f"{where} is {found}; {wanted.replace('Input should', 'it should')}"
