"""Check what the short conversion of .ci/run reports: finite, bounded, and consistent between commands.

The bounds are wide: 2,048 calibration tokens are far too few for a good fit. They catch a broken conversion.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

MOST = 2.0  # perplexity after / before
LEAST = 0.9
FORETOLD = (0.2, 5.0)  # time over the real one: a machine that is shared is another one minutes later
MATERIALIZED_ERROR = 1e-3  # relative, float32


def perplexities(report: Any) -> list[float]:
    """Return every number called perplexity in a report, in its order."""
    if isinstance(report, list):
        return [number for part in report for number in perplexities(part)]
    if not isinstance(report, dict):
        return []
    own = report.get("perplexity")
    rest = [number for key, part in report.items() if key != "perplexity" for number in perplexities(part)]
    return [float(own), *rest] if isinstance(own, int | float) else rest


def check(name: str, value: float, least: float, most: float) -> None:
    print(f"{name}: {value:.6g} (must lie in {least:g} to {most:g})")
    if not (math.isfinite(value) and least <= value <= most):
        sys.exit(f"error: {name} is {value}, outside {least:g} to {most:g}")


def main(work: Path) -> None:
    report = json.loads((work / "convert.json").read_text(encoding="utf-8"))
    stored = json.loads((work / "reduced" / "qectomy.json").read_text(encoding="utf-8"))
    for source, found in (("convert --json", report), ("qectomy.json", stored)):
        perplexity = found["perplexity"]
        check(f"{source}: perplexity before", perplexity["before"], 1.0, 1000.0)
        check(f"{source}: perplexity after / before", perplexity["ratio"], LEAST, MOST)
        before, after = found["parameters"]["before"], found["parameters"]["after"]
        check(f"{source}: parameters after / before", after / before, 0.5, 0.999)

    foretold = json.loads((work / "inspect.json").read_text(encoding="utf-8"))["needs"]
    check("inspect: memory / convert's", foretold["peak_memory_bytes"] / report["peak_memory_bytes"], 0.7, 1.3)
    check("inspect: time / convert's", foretold["seconds"] / report["seconds"]["total"], *FORETOLD)

    healing = json.loads((work / "heal.json").read_text(encoding="utf-8"))["healing"]
    check("heal: steps", healing["steps"], 4, 4)
    for kind in ("fitted", "healed"):
        check(f"heal: {kind} / original", healing["perplexity"][f"{kind}_ratio"], LEAST, MOST)
    for name in ("healed/healing.png", *(f"{folder}/report.html" for folder in ("reduced", "healed", "exact"))):
        if not (work / name).is_file():
            sys.exit(f"error: there is no {name}")

    measured = perplexities(json.loads((work / "eval.json").read_text(encoding="utf-8")))
    if len(measured) != 3:
        sys.exit(f"error: eval of three checkpoints reports {len(measured)} perplexities: {measured}")
    original, reduced, stock = measured
    check("eval: perplexity of the original", original, 1.0, 1000.0)
    check("eval: reduced / original", reduced / original, LEAST, MOST)
    (streamed,) = perplexities(json.loads((work / "streamed.json").read_text(encoding="utf-8")))
    check("eval: streamed / in memory", streamed / reduced, 1 - MATERIALIZED_ERROR, 1 + MATERIALIZED_ERROR)
    check("eval: materialized / reduced", stock / reduced, 1 - MATERIALIZED_ERROR, 1 + MATERIALIZED_ERROR)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
