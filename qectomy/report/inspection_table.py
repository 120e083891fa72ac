"""What `qectomy inspect` prints: sizes, what each map would remove, each layer's verdict, and what can be done."""

import shlex
from typing import Any

from rich.table import Table

from qectomy.errors import clean
from qectomy.models.query_maps import DEFAULT, ranges
from qectomy.report.tables import console, layers_of, show_needs, show_verdicts, size

AUDIT_COLUMNS = (
    "cond(W_Q): largest over smallest singular value of W_Q: how much inverting it may enlarge rounding errors. Where "
    "`convert --query exact` refuses a layer for it, give --dtype float32",
    "distance: how far W_Q, the norm's gain folded in and each head's own coordinates chosen for the best, is from "
    "orthogonal columns. At 0 `convert --query exact` takes all of it out behind a norm; a random square matrix is at "
    f"about 0.55, and all that is not 0 to rounding takes a fit, as `convert --query {DEFAULT}`",
    "rank 99 %: how many directions, of d_model, carry 99 % of the energy of the queries under {under}. Where they are "
    "few, try so many as R of `convert --query low-rank:R`",
)


def show_inspection(result: dict[str, Any], checkpoint: str) -> None:
    """Print what `qectomy inspect` found of a checkpoint, and which commands follow from it."""
    d = result["dimensions"]
    console.print(
        f"{result['checkpoint']}: {result['family']}, {result['parameters']:,} parameters, "
        f"{size(result['bytes'])} in {result['dtype']}, {d['n_layers']} layers, d_model {d['d_model']}, "
        f"{d['n_heads']} query heads on {d['n_kv_heads']} KV heads of {d['d_head']}, "
        f"head {'tied' if d['tied'] else 'untied'}",
        markup=False,
    )
    table = Table("query map", "W_Q removed", "parameters removed", "bytes removed", "of the model")
    for row in result["query_maps"]:
        if row["possible"]:
            table.add_row(
                row["map"],
                f"{row['share_of_W_Q']:.1%}",
                f"{row['removed_parameters']:,}",
                size(row["removed_bytes"]),
                f"{row['share_of_model']:.2%}",
            )
        else:
            table.add_row(row["map"], "not possible", "-", "-", "-")
    console.print(table)
    for why in dict.fromkeys(row["why_not"] for row in result["query_maps"] if not row["possible"]):
        console.print(why, markup=False)
    show_verdicts(result["layers"])
    if "audit" in result["layers"][0]:
        _show_audit({layer["index"]: layer["audit"] for layer in result["layers"]})
    if any(row["possible"] for row in result["query_maps"] if row["map"] != "exact"):
        show_needs(result["needs"])
    _show_commands(result, checkpoint)


def _show_commands(result: dict[str, Any], checkpoint: str) -> None:
    """Print what can be done with the checkpoint, each command on a line of its own."""
    found = commands(result, checkpoint)
    if not found:
        console.print("nothing can be taken out of this checkpoint, for the reasons above")
    for what, command in found:
        console.print(f"{what}:", markup=False)
        console.print(f"  {clean(command)}", markup=False, soft_wrap=True)


def commands(result: dict[str, Any], checkpoint: str) -> list[tuple[str, str]]:
    """Return (what it does, command) of each thing that can be done with an inspected checkpoint."""
    removed = {row["map"]: row["removed_parameters"] for row in result["query_maps"] if row["possible"]}
    audited, whole = "audit" in result["layers"][0], [row["index"] for row in result["layers"] if row["how"] == "exact"]
    name, found = shlex.quote(checkpoint), []
    if "exact" in removed or whole:
        gain = f"{removed['exact']:,} parameters" if "exact" in removed else "W_Q"
        also = f", all of W_Q in {layers_of(ranges(whole))} among them" if whole and audited else ""
        found.append((f"to take out {gain} without any loss{also}", f"qectomy convert {name} --query exact --out OUT"))
    if DEFAULT in removed:
        found.append(
            (
                f"to take out {removed[DEFAULT]:,} parameters, at a cost in perplexity that the conversion measures",
                f"qectomy convert {name} --query {DEFAULT} --text YOURS.txt --eval-text OTHER.txt --out OUT",
            )
        )
    if not audited and result["dimensions"]["norms"]:
        found.append(
            ("to see whether the W_Q of some layer goes whole without loss", f"qectomy inspect {name} --audit")
        )
    return found


def _show_audit(audits: dict[int, dict[str, Any]]) -> None:
    """Print how far each layer's W_Q is from going exactly, what the columns mean, and why a number is missing."""
    table = Table("layer", "cond(W_Q)", "distance", "rank 99 %", "d_model")
    for index, row in audits.items():
        cond = "inf" if row["cond"] is None else f"{row['cond']:.3g}"
        distance = row["distance_from_orthogonal"]
        shown = "-" if distance is None else f"{distance:.3f}" if distance > 5e-4 else f"{distance:.0e}"
        table.add_row(str(index), cond, shown, str(row["rank_99"]), str(row["d_model"]))
    console.print(table)
    data = next(iter(audits.values()))["rank_99_data"]
    under = data if data == "white states" else f"the text's data ({data})"
    for line in AUDIT_COLUMNS:
        console.print(line.format(under=under), markup=False)
    for why in {row["distance_why_not"]: None for row in audits.values() if row["distance_why_not"]}:
        layers = ", ".join(str(i) for i, row in audits.items() if row["distance_why_not"] == why)
        console.print(f"no distance in layers {layers}: {why}", markup=False)
