"""Find tasks of lm-evaluation-harness by name and load their data, before any model is loaded.

A task is a YAML file, which may name Python functions beside it (`!function`) that lm-eval runs: a folder of tasks
is to be trusted like a program. A checkpoint's is not; no code in it is run.
"""

import difflib
import logging
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qectomy.errors import QectomyError, reason_of

SUGGESTIONS = 3


class TaskError(QectomyError):
    """A task of lm-evaluation-harness that is unknown, cannot be read, or whose data cannot be had."""


@dataclass(frozen=True, kw_only=True)
class HarnessTasks:
    """Tasks with their data: for each name asked for, what lm-eval's `evaluate` takes."""

    loaded: dict[str, dict[str, Any]]
    num_fewshot: int | None  # examples before each question; None: what each task says


def check_tasks(names: Sequence[str], include_path: Path | None = None, num_fewshot: int | None = None) -> HarnessTasks:
    """Load tasks, groups and tags. Raises TaskError for one that is unknown, broken or without its data.

    The tasks in the folder `include_path` come first; lm-eval's own, thousands that take seconds to list, are only
    looked at when a name is not among them.
    """
    names = list(dict.fromkeys(stripped for name in names if (stripped := name.strip())))
    if not names:
        raise TaskError("no lm-eval task is named; give some, separated by commas: hellaswag,arc_easy")
    with quiet_harness():
        manager = _manager(names, include_path)
        loaded = {name: _load(manager, name) for name in names}
    for task in (task for tasks in loaded.values() for task in tasks["tasks"].values()):
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):  # a task that says 0 means it
            task.set_config("num_fewshot", num_fewshot or 0)
    return HarnessTasks(loaded=loaded, num_fewshot=num_fewshot)


class Truncations(logging.Handler):
    """How many texts lm-eval said that it cut on the left, to fit a question and its answer into the context."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += record.getMessage().startswith("Combined length of context")


@contextmanager
def quiet_harness() -> Iterator[Truncations]:
    """Keep lm-eval's bars, warnings and prints off the terminal; yield the count of the one warning that matters."""
    import tqdm  # type: ignore[import-untyped]

    def silent(self: Any, *arguments: Any, **options: Any) -> None:
        start(self, *arguments, **{**options, "disable": True})

    logger, start = logging.getLogger("lm_eval"), tqdm.tqdm.__init__
    level, handlers, propagate = logger.level, logger.handlers, logger.propagate
    truncations = Truncations()
    logger.level, logger.handlers, logger.propagate = logging.WARNING, [truncations], False
    tqdm.tqdm.__init__ = silent  # lm-eval's bootstrap imports it on its own, and has no switch
    try:
        with redirect_stdout(sys.stderr):  # stdout is for results
            yield truncations
    finally:
        tqdm.tqdm.__init__ = start
        logger.level, logger.handlers, logger.propagate = level, handlers, propagate


def _manager(names: list[str], folder: Path | None) -> Any:
    """Return lm-eval's task manager over the folder, and over lm-eval's own tasks if the folder lacks a name."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        if not folder.is_dir():
            raise TaskError(f"--lm-eval-path {folder} is no folder; give the one that holds the tasks' .yaml files")
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        missing = _missing(names, manager.task_index)
        if not missing:
            return manager
        for path, (text, reason) in _broken(folder).items():
            if any(re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) for name in missing):
                raise TaskError(f"{path} is no task that lm-eval can read: {reason}")
    manager = TaskManager(include_path=None if folder is None else str(folder))
    if missing := _missing(names, manager.task_index):
        raise TaskError(_unknown(missing, manager.all_tasks, folder))
    return manager


def _missing(names: list[str], index: dict[str, Any], seen: frozenset[str] = frozenset()) -> list[str]:
    """Return the names that are in no index, those that groups call for included."""
    missing = []
    for name in names:
        entry = index.get(name)
        if entry is None:
            missing.append(name)
        elif entry.kind.name == "GROUP" and name not in seen:
            missing += _missing(_members(entry.cfg or {}), index, seen | {name})
    return list(dict.fromkeys(missing))


def _members(group: dict[str, Any]) -> list[str]:
    """Return the names in a group's list of tasks; what is defined there and then needs no other file."""
    names: list[str] = []
    listed = group.get("task")
    for item in listed if isinstance(listed, list) else []:
        if isinstance(item, str):
            names.append(item)
        elif isinstance(item, dict) and "group" in item:
            names += _members(item)
        elif isinstance(item, dict) and not {"dataset_path", "class"} & item.keys():
            names.append(str(item.get("task")))
    return names


def _broken(folder: Path) -> dict[Path, tuple[str, str]]:
    """Return {file: (text, reason)} of the YAML files that lm-eval silently leaves out."""
    import yaml  # type: ignore[import-untyped]

    broken = {}
    for path in sorted(folder.glob("**/*.yaml")):
        text, reason = "", None
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
            root = yaml.compose(text)  # builds nothing, so that `!function` is no matter
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            place = f"line {mark.line + 1}: " if mark is not None else ""
            reason = place + (getattr(error, "problem", None) or reason_of(error))
        except OSError as error:
            reason = error.strerror or type(error).__name__
        else:
            reason = _lost_include(path, root)
        if reason is not None:
            broken[path] = (text or path.stem, reason)
    return broken


def _lost_include(path: Path, root: Any) -> str | None:
    fields = root.value if root is not None and root.id == "mapping" else []
    for key, value in fields:
        listed = value.value if value.id == "sequence" else [value]
        for node in listed if key.value == "include" else []:
            if not (path.parent / str(node.value)).is_file():
                return f"what it includes, {node.value}, is not there"
    return None


def _unknown(missing: list[str], known: list[str], folder: Path | None) -> str:
    """Say which names are unknown and which are like them."""
    parts = []
    for name in missing:
        near = difflib.get_close_matches(name, known, n=SUGGESTIONS)
        parts.append(f"{name!r}" + (f" (did you mean {', '.join(near)}?)" if near else ""))
    where = f"neither in {folder} nor among lm-eval's own" if folder else "not among lm-eval's own"
    hint = "" if folder else "; the folder of a task of yours goes with --lm-eval-path"
    return f"unknown lm-eval task {', '.join(parts)}: {where}{hint}; `lm_eval ls tasks` lists those"


def _load(manager: Any, name: str) -> dict[str, Any]:
    """Load one task, group or tag with its data."""
    try:
        loaded = manager.load([name])
    except ConnectionError as error:
        raise TaskError(
            f"lm-eval task {name!r} needs data from the hub, which is neither in the cache nor within reach "
            f"({reason_of(error)}); run it once where the hub can be reached, or give a task that reads a local file"
        ) from error
    except FileNotFoundError as error:
        raise TaskError(f"lm-eval task {name!r}: its data cannot be read: {reason_of(error)}") from error
    except Exception as error:  # a task's fields and functions may fail in any way; the message is what helps
        entry = manager.task_index[name]
        where = f" ({entry.yaml_path})" if entry.yaml_path else ""
        hint = "; does its data have the splits that it names?" if isinstance(error, KeyError) else ""
        raise TaskError(f"lm-eval task {name!r}{where} cannot be made: {describe(error)}{hint}") from error
    if not loaded["tasks"]:
        raise TaskError(f"lm-eval task {name!r} is a group without a task")
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            why = "runs code that the model writes" if getattr(task, "UNSAFE_CODE", False) else "needs more than text"
            raise TaskError(f"lm-eval task {task.task_name!r} {why}, which is not done here; use the lm_eval command")
    return dict(loaded)


def describe(error: Exception) -> str:
    """Return an error of lm-eval's, whatever its kind, in one line; of a bare assertion, what it asserts."""
    said = reason_of(error)
    if isinstance(error, AssertionError) and not str(error).strip():
        said = traceback.extract_tb(error.__traceback__)[-1].line or said
    return f"{type(error).__name__}: {said}"
