"""What the page reads of qectomy.json, healing.csv and a file of other points."""

from typing import Any

from qectomy.report.page.checked import (
    Kind,
    WrongField,
    amount,
    count,
    flag,
    interval,
    listed,
    mapping,
    number,
    plain,
    positive,
    record,
    share,
    string,
)

VERSIONS = mapping(string)
OVERLAP = record(
    {"share": share, "spans": count, "words": count, "complete": flag, "validation_share": share, "fitted_text": flag}
)
READ_AS = record(
    {"kind": string, "records": count, "field": string, "chat_template_sha256": string, "looks_like": string}
)
PROTOCOL = record(
    {
        "text": string,
        "text_sha256": string,
        "text_read_as": READ_AS,
        "tokenizer": string,
        "context": count,
        "stride": count,
        "bos": string,
        "windows": count,
        "tokens": count,
        "scored_tokens": count,
        "scored_bytes": count,
        "tail": string,
        "name": string,
        "in_words": string,
        "only_first_tokens": count,
        "first_token": count,
        "fitted_on": flag,
        "overlap": OVERLAP,
        "dtype": string,
    }
)


def _before_after(kind: Kind) -> Kind:
    return record({"before": kind, "after": kind}, required=("before", "after"))


def _positions(*names: str) -> Kind:
    """Mean losses between the edges: a loss for each edge, or one fewer where the last edge closes the last bin."""
    fields = record({"edges": listed(count), **{name: listed(number, or_null=True) for name in names}})

    def check(value: Any, where: str) -> dict[str, Any]:
        found = fields(value, where)
        for name in names:
            if name not in found or "edges" not in found:
                raise WrongField(f"{where}.{'edges' if 'edges' not in found else name} is missing")
            if len(found["edges"]) - len(found[name]) not in (0, 1):
                raise WrongField(f"{where}.{name} has {len(found[name])} numbers for {len(found['edges'])} edges")
        if found["edges"] != sorted(set(found["edges"])):
            raise WrongField(f"{where}.edges do not rise")
        return found

    return check


LAYER = record(
    {
        "index": count,
        "map": string,
        "value_map": string,
        "output_map": string,
        "how": string,
        "reason": string,
        "value_reason": string,
        "W_Q_condition": number,
        "basis_condition": number,
        "pivot_condition": number,
        "attention_kl": record({"fitted": number, "heldout": number}),
        "moved": mapping(amount, or_null=True),
        "seconds": amount,
        "singular_values": listed(amount),
    },
    required=("index", "map"),
)
CURVE_ROW = record(
    {
        "step": count,
        "tokens": count,
        "train_loss": number,
        "validation_loss": number,
        "validation_kl": number,
        "validation_perplexity": positive,
        "learning_rate": number,
    },
    required=("tokens",),
)
HEALING = record(
    {
        "command": string,
        "created": string,
        "texts": listed(record({"text": string, "sha256": string, "tokens": count})),
        "tokens": count,
        "steps": count,
        "planned_steps": count,
        "best_step": count,
        "tokens_a_step": count,
        "trained_parameters": count,
        "settings": mapping(plain),
        "device": string,
        "processes": count,
        "fitted_sha256": mapping(string),
        "teacher_is_source": flag,
        "seconds": mapping(amount),
        "validation": record({"original_perplexity": positive, "curve": listed(CURVE_ROW)}),
        "perplexity": record(
            {
                **dict.fromkeys(("original", "fitted", "healed", "fitted_ratio", "healed_ratio"), positive),
                "fitted_ratio_95": interval,
                "healed_ratio_95": interval,
                "fitted_95": interval,
            }
        ),
        "kl": record({"fitted": number, "healed": number}),
        "top1_agreement": record({"fitted": share, "healed": share}),
    }
)
REDUCED = record(
    {
        "qectomy": string,
        "versions": VERSIONS,
        "created": string,
        "command": string,
        "method": string,
        "source": record(
            {
                "name": string,
                "model_type": string,
                "dtype": string,
                "sha256": mapping(string),
                "fingerprint": string,
            }
        ),
        "calibration": record(
            {
                "texts": listed(record({"file": string, "sha256": string, "tokens": count, "first_token": count})),
                "context": count,
                "seed": count,
                "refit": flag,
            }
        ),
        "layers": listed(LAYER),
        "tie": string,
        "logit_error": amount,
        "logit_error_on": string,
        "perplexity": record(
            {
                "before": positive,
                "after": positive,
                "ratio": positive,
                "ratio_95": interval,
                "difference_95": interval,
                "before_95": interval,
                "after_95": interval,
                "windows": count,
                "protocol": PROTOCOL,
            },
            required=("before", "after", "ratio"),
        ),
        "bits_per_byte": _before_after(number),
        "word_perplexity": _before_after(positive),
        "kl": number,
        "top1_agreement": share,
        "per_position": _positions("before", "after"),
        "token_sample": record(
            {
                "text": string,
                "tokens": listed(record({"text": string, "before": number, "after": number}, required=("text",))),
            }
        ),
        "generation": record(
            {
                "max_new_tokens": count,
                "decoding": string,
                "prompt_format": string,
                "samples": listed(record({"prompt": string, "original": string, "reduced": string})),
                "skipped": string,
            }
        ),
        "parameters": _before_after(positive),
        "bytes": _before_after(positive),
        "query_parameters": _before_after(amount),
        "seconds": mapping(amount),
        "forward_pass_seconds": amount,
        "peak_memory_bytes": amount,
        "device": string,
        "reload_check": record({"largest_relative_logit_error": amount, "peak_memory_bytes": amount}),
        "healing": HEALING,
        "renewed": record({"qectomy": string, "created": string, "fingerprints": listed(string)}),
    },
    required=("qectomy", "layers", "parameters", "bytes"),
)
POINTS = listed(
    record(
        {"name": string, "parameters_removed": share, "ratio": positive, "source": string},
        required=("name", "parameters_removed", "ratio"),
    )
)
