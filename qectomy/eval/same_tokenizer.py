"""Whether the tokenizer of a written folder is that of the folder it came from: by what it makes of a text."""

from pathlib import Path

from qectomy.checkpoint.config_files import TOKENIZER_FILES, companions
from qectomy.errors import CheckpointError
from qectomy.text.text import load_tokenizer, token_ids

# Spaces in a row, line ends, digits, another script, an emoji of several code points, and what looks like markup.
TEXT = (
    "Once upon a midnight,\n\n  while 1845 I   pondered: élan, мысль, 思い, \U0001f469\u200d\U0001f4bb <s> [INST]\t{x}"
)
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


def check_same_tokenizer(original: Path, written: Path) -> None:
    """Raise CheckpointError unless both folders' tokenizers give one text the same ids and have the same special ones.

    A folder without a tokenizer has nothing to compare.
    """
    if not companions(original, TOKENIZER_FILES):
        return
    theirs, ours = (load_tokenizer(folder) for folder in (original, written))
    before, after = (token_ids(tokenizer, TEXT)["input_ids"] for tokenizer in (theirs, ours))
    wrong = [name for name in SPECIAL if getattr(theirs, name) != getattr(ours, name)]
    if before != after:
        pairs = enumerate(zip(before, after, strict=False))
        first = next((place for place, (one, other) in pairs if one != other), min(len(before), len(after)))
        wrong.append(f"the ids of a text from token {first} on")
    if wrong:
        raise CheckpointError(
            f"the written tokenizer is not the original's: {', '.join(wrong)} differ: the model would read other tokens"
            f" than it was made for. Give {original} a tokenizer_config.json that names its tokenizer_class"
        )
