"""How much of W_Q went: one definition for every place that says so."""

from dataclasses import dataclass

from qectomy.record.reduced import Exact, Folded, Reduced, Totals


@dataclass(frozen=True, kw_only=True)
class QueryShare:
    """Parameters of all layers' W_Q before, and of what stands in their place, dense layers counted with their own.

    "W_Q removed" is `removed`, of all layers; `of_reduced` is of the `reduced` layers alone.
    """

    before: float
    after: float
    removed: float
    of_reduced: float
    reduced: int
    layers: int

    @property
    def words(self) -> str:
        """Of what the share is, with the other one where a recipe leaves layers as they were."""
        if self.reduced == self.layers:
            return "of all layers"
        return f"of all {self.layers} layers; {100 * self.of_reduced:.1f} % of the {self.reduced} reduced"


def kind_words(report: Reduced) -> str:
    """Say in a few words what a checkpoint is, with the layers that it concerns where some kept their W_Q."""
    if isinstance(report, Exact):
        return "folded exactly"
    reduced = sum(name != "dense" for name in report.maps)
    return "without W_Q" + ("" if reduced == len(report.maps) else f" in {reduced} of {len(report.maps)} layers")


def query_share(found: Totals) -> QueryShare | None:
    """Return the shares of a report, or of a plan, whose `query_parameters` count the layers that are not dense.

    None where there is nothing to take a share of. An exact fold counts every layer, and reduces all or none of it.
    """
    counted, maps = found.query_parameters, found.maps
    reduced = len(maps) if isinstance(found, Folded) else sum(name != "dense" for name in maps)
    if not counted.before or not reduced:
        return None
    before = counted.before * len(maps) / reduced
    gone = counted.before - counted.after
    return QueryShare(
        before=before,
        after=before - gone,
        removed=gone / before,
        of_reduced=gone / counted.before,
        reduced=reduced,
        layers=len(maps),
    )
