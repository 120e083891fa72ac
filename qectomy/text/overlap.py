"""How much of one text stands in another: hashes of its spans of words, at any offset, whatever its spaces.

Of what was fitted or trained on, a report keeps the smallest hashes alone, a *sketch*: below its largest one it says of
every span whether it was there.
"""

import base64
import binascii
import hashlib
import re
from typing import Any

import numpy as np

WORDS = 20  # a span: long enough that two texts do not share one by chance, but for what they quote
KEPT = 7000  # hashes of a sketch: 42 kB, and as base64 56
BITS = 48  # of a hash
ALL = 1 << BITS
# Where no spaces part the words, each character counts as one: Thai, Lao, Khmer, Japanese and Chinese.
UNSPACED = "\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
WORD = re.compile(f"[{UNSPACED}]|[^\\s{UNSPACED}]+")
FACTOR = np.uint64(0x9E3779B97F4A7C15)


def span_hashes(text: str) -> np.ndarray:
    """Return one hash for each span of words of a text, in their order."""
    known: dict[str, int] = {}
    words = WORD.findall(text)
    for word in words:
        if word not in known:
            known[word] = int.from_bytes(
                hashlib.blake2b(word.encode(errors="replace"), digest_size=8).digest(), "little"
            )
    numbers = np.array([known[word] for word in words], np.uint64)
    n = len(numbers) - WORDS + 1
    if n < 1:
        return np.empty(0, np.uint64)
    mixed = np.zeros(n, np.uint64)
    for start in range(WORDS):  # modulo 2^64
        mixed = mixed * FACTOR + numbers[start : start + n]
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64's, so that all bits count
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed ^ (mixed >> np.uint64(31))) >> np.uint64(64 - BITS)


class Sketch:
    """The spans of a text of any length by its smallest hashes: those below `below`, sorted, each once.

    `complete`: whether it is of all that was fitted or trained on. `validation`: what its best step was chosen by.
    """

    def __init__(
        self,
        hashes: np.ndarray | None = None,
        below: int = ALL,
        complete: bool = True,
        validation: "Sketch | None" = None,
    ):
        self.hashes = np.empty(0, np.uint64) if hashes is None else hashes
        self.below, self.complete, self.validation = below, complete, validation

    def joined(self, hashes: np.ndarray, below: int = ALL, complete: bool = True) -> "Sketch":
        """Return the sketch of this text and another one together."""
        below = min(self.below, below)
        both = np.unique(np.concatenate([self.hashes, hashes]))
        both = both[both < np.uint64(below)]
        if len(both) > KEPT:
            both, below = both[:KEPT], int(both[KEPT])
        return Sketch(both, below, self.complete and complete)

    def record(self) -> dict[str, Any]:
        """Return what a report keeps."""
        packed = self.hashes.astype("<u8").view(np.uint8).reshape(-1, 8)[:, : BITS // 8].tobytes()
        hashes = base64.b64encode(packed).decode()
        return {"words": WORDS, "complete": self.complete, "below": self.below, "hashes": hashes}

    @staticmethod
    def of_record(found: Any) -> "Sketch | None":
        """Return what a report kept; None for what is no such record."""
        try:
            if found["words"] != WORDS or not 0 < found["below"] <= ALL:
                return None
            packed = np.frombuffer(base64.b64decode(found["hashes"], validate=True), np.uint8).reshape(-1, BITS // 8)
            hashes = np.zeros((len(packed), 8), np.uint8)
            hashes[:, : BITS // 8] = packed
            own = np.unique(hashes.reshape(-1).view("<u8")), int(found["below"]), found["complete"] is True
            validation = found.get("validation")
            return Sketch(*own, Sketch.of_record({**validation, "validation": None} if validation else None))
        except (TypeError, KeyError, ValueError, binascii.Error):
            return None


class _Compared:
    """How much of a measured text stands in texts that were sketched before and in those that are added."""

    def __init__(self, measured: np.ndarray, earlier: Sketch):
        self._measured, self.sketch = measured, earlier
        self._told = measured < np.uint64(earlier.below)
        self._found = np.isin(measured, earlier.hashes)

    def add(self, text: str) -> None:
        hashes = np.unique(span_hashes(text))
        self._found |= np.isin(self._measured, hashes)
        self.sketch = self.sketch.joined(hashes)

    def share(self) -> tuple[float | None, int]:
        """Return the share of the spans that are found, and of how many that is known."""
        count = int(self._told.sum())
        return float(self._found[self._told].mean()) if count else None, count


class FittedSpans:
    """What is fitted or trained on, text by text, beside the text measured on and the sketch of what was fitted before.

    `earlier` is None where that is not known. Text that is validated on is not trained on, but chooses the best step:
    it is kept apart.
    """

    def __init__(self, measured: str, earlier: Sketch | None):
        spans, earlier = span_hashes(measured), earlier or Sketch(complete=False)
        self._fitted, self._validated = _Compared(spans, earlier), _Compared(spans, earlier.validation or Sketch())

    def add(self, text: str, validation: bool = False) -> None:
        (self._validated if validation else self._fitted).add(text)

    def record(self) -> dict[str, Any]:
        """Return the sketch of it all, and how much of the measured text stands in it."""
        sketch, validation = self._fitted.sketch, self._validated.sketch
        share, spans = self._fitted.share()
        found = {"share": share, "spans": spans, "words": WORDS, "complete": sketch.complete}
        if not len(validation.hashes):
            return {"fitted_spans": sketch.record(), "overlap": found}
        return {
            "fitted_spans": sketch.record() | {"validation": validation.record()},
            "overlap": found | {"validation_share": self._validated.share()[0]},
        }


def overlap(measured: str, fitted: Sketch | None) -> dict[str, Any]:
    """Return how much of a text stands in what a checkpoint was fitted on; None: it keeps no sketch."""
    return FittedSpans(measured, fitted or Sketch(below=0, complete=False)).record()["overlap"]
