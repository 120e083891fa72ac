"""`qectomy.page`: one HTML page of all that is known of reduced checkpoints, which `qectomy report` writes."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from qectomy.api.arguments import begin, names, path_or_none
from qectomy.api.options import Argument, Name, Names, Option


def page(
    folders: Annotated[Names, Argument("Folders that convert or heal wrote; several are compared.", path=True)],
    *,
    out: Annotated[
        Name | None,
        Option(
            "File to write. Default: report.html in the folder; of several, qectomy-comparison.html here.",
            path=True,
        ),
    ] = None,
    original: Annotated[
        Name | None,
        Option("Folder of the original: run both models, loaded whole, and show what they write.", path=True),
    ] = None,
    title: Annotated[str | None, Option("Title of the page.")] = None,
    also: Annotated[
        Names | None,
        Option(
            "JSON file of other things to compare with: a list of objects with name, parameters_removed (a share of "
            "the model's parameters, as 0.067), ratio (of perplexity) and, if you like, source. May be repeated.",
            path=True,
        ),
    ] = None,
    force: Annotated[bool, Option("Replace a file that is no report of qectomy, too.")] = False,
) -> dict[str, Any]:
    """Write the page, and the verdict into the folders' model cards; return what `qectomy report --json` prints.

    The options are those of `qectomy report`. Raises QectomyError.
    """
    begin(page, locals())
    from qectomy.report.card_verdict import renew_card_verdict
    from qectomy.report.page.compare import summary
    from qectomy.report.page.page import page as html
    from qectomy.report.page.reading import check_original, read_folders, read_points
    from qectomy.report.page.verdict import judged
    from qectomy.report.page.writing import COMPARISON, NAME, check_replaceable, write_html

    paths, model = [Path(name) for name in names(folders)], path_or_none(original)
    found = read_folders(paths)
    if model is not None:
        from qectomy.eval.samples import generation_of

        for each in found:
            check_original(each, model)
        found = [
            replace(each, report=each.report.model_copy(update={"generation": generation_of(model, folder, None)}))
            for each, folder in zip(found, paths, strict=True)
        ]
    points = [point for file in names(also) for point in read_points(Path(file))]
    where = path_or_none(out) or (paths[0] / NAME if len(paths) == 1 else Path(COMPARISON))
    check_replaceable(where, force=force)
    write_html(html(found, points=points, title=title), where, force=force)
    renewed = [folder for folder, each in zip(paths, found, strict=True) if renew_card_verdict(folder, judged(each))]
    return {"out": str(where), "cards": [str(folder / "README.md") for folder in renewed], **summary(found, points)}
