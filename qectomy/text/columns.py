"""The rows of a table that hold its text: a parquet file, and a folder that save_to_disk of `datasets` wrote."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qectomy.errors import TextError, note, reason_of, shown
from qectomy.text.records import Placed, text_field
from qectomy.text.text_bytes import KINDS

ROWS_A_READ = 256
STATE, SPLITS = "state.json", "dataset_dict.json"  # files of save_to_disk


@contextmanager
def parquet_rows(path: Path, field: str | None) -> Iterator[tuple[str | None, Placed]]:
    """Yield the column of a parquet file that holds its text, and its rows, some in memory at a time."""
    from pyarrow.parquet import ParquetFile

    with _refused(path), ParquetFile(path) as file:
        column = _column(str(path), file.schema_arrow, field)
        yield column, _rows(file.iter_batches(batch_size=ROWS_A_READ, columns=[column] if column else []), column)


@contextmanager
def saved_rows(folder: Path, field: str | None) -> Iterator[tuple[str | None, Placed]]:
    """Yield the column of a saved dataset that holds its text, and its rows, as they are read."""
    files = saved_files(folder)
    with _refused(folder):
        column = None
        for _, schema in map(_stream, files[:1]):
            column = _column(str(folder), schema, field)
        yield column, _rows((batch for file in files for batch in _stream(file)[0]), column)


def saved_files(folder: Path) -> list[Path]:
    """Return the files with the rows of a saved dataset. Raises TextError for another folder, or several splits."""
    if (folder / SPLITS).is_file():
        splits = _json(folder / SPLITS).get("splits")
        known = [name for name in splits if _inside(folder, name)] if isinstance(splits, list) else []
        if len(known) != 1 and "train" not in known:
            raise TextError(
                f"{folder} holds several splits, {shown(known)}; give one, as {folder}/{known[0]}"
                if known
                else f"{folder / SPLITS} names no split that is there"
            )
        chosen = known[0] if len(known) == 1 else "train"
        if others := [name for name in known if name != chosen]:
            note(f"{folder} holds the splits {shown(known)}, and train is read; another: {folder}/{others[0]}")
        folder = folder / chosen
    if not (folder / STATE).is_file():
        raise TextError(f"{folder} is a folder; give {KINDS}")
    state = _json(folder / STATE)
    if state.get("_indices_data_files"):
        raise TextError(f"{folder} holds a selection of its rows; save it again after flatten_indices()")
    files = state.get("_data_files")
    names = (
        [file.get("filename") if isinstance(file, dict) else None for file in files] if isinstance(files, list) else []
    )
    if not names or not all(_inside(folder, name) for name in names):
        raise TextError(f"{folder / STATE} names no files of rows, or not only such as lie beside it: {shown(names)}")
    return [folder / str(name) for name in names]


def _inside(folder: Path, name: Any) -> bool:
    """Whether a name is that of something in a folder, and of nothing elsewhere."""
    return isinstance(name, str) and Path(name).name == name and (folder / name).resolve().parent == folder.resolve()


def _json(path: Path) -> dict[str, Any]:
    """Return an object in a JSON file that came from elsewhere."""
    from qectomy.checkpoint.headers import MAX_JSON_BYTES, parse_json, read_regular

    try:
        found = parse_json(read_regular(path, MAX_JSON_BYTES) or b"")
    except (OSError, ValueError) as error:
        raise TextError(f"{path} cannot be read: {reason_of(error)}") from error
    if not isinstance(found, dict):
        raise TextError(f"{path} holds no JSON object")
    return found


def _stream(path: Path) -> tuple[Any, Any]:
    """Return the batches of rows of an Arrow file, mapped and not copied, and their schema."""
    import pyarrow

    if not path.is_file():
        raise TextError(f"{path} is missing")
    reader = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
    return reader, reader.schema


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError, ValueError, KeyError, IndexError, RecursionError) as error:
        raise TextError(f"{path} cannot be read: {reason_of(error)}") from error


def _column(what: str, schema: Any, field: str | None) -> str | None:
    """Return the column of a table that holds its text; None where all of it is null."""
    if field is None:
        return text_field({column.name: _stand_in(column.type) for column in schema}, what)
    if field not in schema.names:
        raise TextError(f"{what} has no column {shown(field)}, which --field names; it has {shown(schema.names)}")
    return field


def _stand_in(kind: Any) -> Any:
    """A value such as a column of this type holds, as far as that says whether it is text."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    if types.is_list(kind) or types.is_large_list(kind):
        return [_stand_in(kind.value_type)]
    if types.is_struct(kind):
        return {field.name: _stand_in(field.type) for field in kind}
    return "" if types.is_string(kind) or types.is_large_string(kind) else None if types.is_null(kind) else ...


def _rows(batches: Iterable[Any], field: str | None) -> Placed:
    number = 0
    for batch in batches if field else ():
        for value in batch.column(field).to_pylist():
            number += 1
            yield f", row {number}", {field: value}
