"""The command that writes the page of reduced checkpoints; `cli.py` registers it."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from qectomy.commands.terminal import Json, note_old_code, print_json

ALSO_HELP = (
    "JSON file of other things to compare with: a list of objects with name, parameters_removed (a share of the "
    "model's parameters, as 0.067), ratio (of perplexity) and, if you like, source. May be repeated."
)


def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders that convert or heal wrote; several are compared.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write. Default: report.html in the folder; of several, qectomy-comparison.html here."
        ),
    ] = None,
    original: Annotated[
        Path | None,
        typer.Option(help="Folder of the original: run both models, loaded whole, and show what they write."),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Title of the page.")] = None,
    also: Annotated[list[Path] | None, typer.Option(help=ALSO_HELP)] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is no report of qectomy, too.")] = False,
    as_json: Json = False,
) -> None:
    """Write one HTML page on reduced checkpoints: what was removed, what it cost, whether to believe it.

    It needs nothing beside it and no network. It shows qectomy.json, and where they lie in the folder evaluation.json
    (`eval --save`), bench.json (`bench --save`) and healing.csv.
    """
    from qectomy.report.card_verdict import renew_card_verdict
    from qectomy.report.page.compare import summary
    from qectomy.report.page.page import page
    from qectomy.report.page.reading import read_folders, read_points
    from qectomy.report.page.verdict import judged
    from qectomy.report.page.writing import COMPARISON, NAME, check_replaceable, write_html

    found = read_folders(folders)
    note_old_code(folders)
    if original is not None:
        from qectomy.eval.samples import generation_of
        from qectomy.report.page.reading import check_original

        for each in found:
            check_original(each, original)
        found = [
            replace(each, report={**each.report, "generation": generation_of(original, folder, None)})
            for each, folder in zip(found, folders, strict=True)
        ]
    points = [point for file in also or () for point in read_points(file)]
    where = out or (folders[0] / NAME if len(folders) == 1 else Path(COMPARISON))
    check_replaceable(where, force=force)
    write_html(page(found, points=points, title=title), where, force=force)
    renewed = [folder for folder, each in zip(folders, found, strict=True) if renew_card_verdict(folder, judged(each))]
    result = {"out": str(where), **summary(found, points)}
    if as_json:
        print_json(result)
    else:
        from qectomy.report.page.table import show_summary

        show_summary(result)
        for folder in renewed:
            typer.echo(f"wrote the verdict in {folder / 'README.md'} anew")
        typer.echo(f"wrote {where}")
