"""vLLM beside plain transformers: greedy tokens and log-probabilities of reduced folders, and the speed of `exact`.

Run it with the project's python; vLLM lives in an environment of its own, which constraints-serve.txt says how to make:

    python benchmarks/serve_vllm.py --python SERVE/bin/python --work FOLDER

Each sample model is converted with every query map. For each folder, 8 prompts are continued by 48 greedy tokens: by
transformers in this environment, and by vLLM with one and two processes, without and with prefix caching (each prompt
twice, the second time out of the cache), and over HTTP with no flag of trust. Tokens must be equal and
log-probabilities within 1e-4, the chosen tokens' and the five likeliest ones'. What cannot be sharded must be refused.
Decoding of `exact` is timed in turn with its original's. The tables come last; the exit code is 1 where a must fails.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from setting import print_table

HERE = Path(__file__).parent
SAMPLES = HERE.parent / "samples"
MIXED = "0=dense,1=key-shared,2=select,3=identity,4=low-rank:8,5=key-shared"
MAPS = ("original", "key-shared", "select", "identity", "low-rank:8", "exact", "mixed")
WAYS = {  # how vLLM runs, and what the job of that is
    "1 process": {"kind": "engine", "tp": 1, "prefix_caching": False, "eager": True},
    "HTTP, prefix cache": {"kind": "http", "tp": 1, "prefix_caching": True, "eager": False},
    "2 processes, prefix cache": {"kind": "engine", "tp": 2, "prefix_caching": True, "eager": True},
}
REFUSED = {  # family and number of processes, and the words that must stand in the refusal
    ("gpt2", 2): "a reduced GPT-2 is not sharded",
    ("llama", 4): "does not divide the 2 key-value heads",
}
N_PROMPTS, N_TOKENS, CONTEXT, BLOCK = 8, 48, 256, 32
MOST_APART, LEAST_SPEED = 1e-4, 0.97


def make_folder(family: str, query: str, work: Path) -> Path:
    """Return the folder of a sample converted with a query map, made if it is not there."""
    if query == "original":
        return SAMPLES / family
    out = work / f"{family}-{query.replace(':', '-')}"
    if not out.exists():
        command = [sys.executable, "-m", "qectomy", "convert", str(SAMPLES / family), "--out", str(out)]
        command += ["--query", MIXED if query == "mixed" else query]
        if query != "exact":
            command += ["--text", str(SAMPLES / "kjv_train.txt"), "--eval-text", str(SAMPLES / "kjv_heldout.txt")]
            command += [
                "--tokens",
                "512",
                "--eval-tokens",
                "256",
                "--context",
                "128",
            ]  # how good the fit is does not matter
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


def make_prompts() -> list[list[int]]:
    """Return token ids of held-out verses, of 20 to 90 tokens: some fill blocks of the prefix cache, some do not."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SAMPLES / "llama")
    ids = tokenizer((SAMPLES / "kjv_heldout.txt").read_text(encoding="utf-8")[:40_000])["input_ids"]
    return [ids[700 * i : 700 * i + 20 + 10 * i] for i in range(N_PROMPTS)]


def reference(folder: Path, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Return transformers' greedy tokens, and at each the log-probabilities of all (48, V), from one uncached pass."""
    import torch
    from transformers import AutoModelForCausalLM

    import qectomy  # noqa: F401  registers the reduced classes

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", trust_remote_code=False).eval()
    model.generation_config.eos_token_id = None
    torch.set_num_threads(1)  # models this small lose by more
    results = []
    with torch.no_grad():
        for ids in prompts:
            prompt = torch.tensor([ids])
            mask = torch.ones_like(prompt)
            told = dict(attention_mask=mask, max_new_tokens=N_TOKENS, do_sample=False, pad_token_id=0)
            text = model.generate(prompt, **told)
            likely = model(text).logits[0, len(ids) - 1 : -1].double().log_softmax(-1)
            results.append({"tokens": text[0, len(ids) :].tolist(), "logprobs": likely})
    return results


def run_vllm(python: Path, job: dict[str, Any], out: Path) -> dict[str, Any]:
    """Run a job in vLLM's environment. Returns its result; `failed` holds what it printed where it ended badly."""
    told = json.dumps(job | {"out": str(out)})
    out.unlink(missing_ok=True)
    threads = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    if job["tp"] == 1 and job["kind"] == "engine":
        threads["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # no process for each engine
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    done = subprocess.run(
        [python, HERE / "vllm_run.py", told],
        env={**os.environ, **threads, **quiet},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    out.with_suffix(".log").write_text(done.stdout)
    if done.returncode or not out.exists():
        return {"failed": done.stdout}
    return dict(json.loads(out.read_text()))


def compare(result: dict[str, Any], expected: list[dict[str, Any]], caching: bool) -> dict[str, Any]:
    """Return how many prompts have equal tokens in all rounds, and how far the log-probabilities are apart at most.

    Positions after a token that differs are left out: there the texts are other texts.
    """
    if "failed" in result:
        return {"error": (result["failed"].strip() or "no word").splitlines()[-1][:120]}
    equal, apart, compared = 0, 0.0, 0
    for places in zip(expected, *result["rounds"], strict=True):
        want, *rounds = places
        equal += all(got["tokens"] == want["tokens"] for got in rounds)
        for got in rounds:
            for place, likely in enumerate(got["logprobs"]):
                if got["tokens"][:place] != want["tokens"][:place]:
                    break
                differences = [abs(value - want["logprobs"][place, int(token)]) for token, value in likely.items()]
                apart, compared = max(apart, float(max(differences))), compared + len(differences)
    hits = result["prefix_hits"]
    good = equal == N_PROMPTS and apart <= MOST_APART and (hits > 0) == caching
    return {"equal": equal, "apart": apart, "compared": compared, "prefix_hits": hits, "good": good}


def check_refusals(options: argparse.Namespace, common: dict[str, Any]) -> list[list[str]]:
    """Return a row for each way of sharding that must be refused, with what was said."""
    rows = []
    for (family, tp), words in REFUSED.items():
        if family not in options.families:
            continue
        folder = make_folder(family, "key-shared", options.work)
        out = options.work / f"refused-{family}.json"
        result = run_vllm(options.python, common | WAYS["1 process"] | {"tp": tp, "folders": [str(folder)]}, out)
        refused = "failed" in result.get(str(folder), result) and words in out.with_suffix(".log").read_text()
        rows.append([f"{family}, {tp} processes", "refused" if refused else "NOT REFUSED AS IT SHOULD BE"])
    return rows


def measure_speed(options: argparse.Namespace, common: dict[str, Any]) -> list[list[str]]:
    """Return a row a family: decoding of `exact` against its original in vLLM's own class and on the same backend."""
    rows = []
    for family in options.families:
        original, exact = str(SAMPLES / family), str(make_folder(family, "exact", options.work))
        same = {"model_impl": "transformers"}
        folders = {"own class": (original, {}), "exact": (exact, {})}
        if family != "gpt2":  # of the stock one the backend loads no bias of c_attn, and stops
            folders["same backend"] = (original, same)
        job = common | WAYS["1 process"] | {"kind": "speed", "folders": folders, "turns": options.turns, "tokens": 128}
        result = run_vllm(options.python, job, options.work / f"speed-{family}.json")
        if "failed" in result:
            rows.append([family, "failed", "", ""])
            continue
        seconds = result["seconds"]
        rate = N_PROMPTS * 128 / median(seconds["exact"])
        pairs = {name: list(zip(seconds[name], seconds["exact"], strict=True)) for name in folders if name != "exact"}
        against = {name: f"{median(one / exact for one, exact in turns):.3f}" for name, turns in pairs.items()}
        rows.append([family, f"{rate:.0f}", against["own class"], against.get("same backend", "")])
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="python of the environment that has vLLM")
    parser.add_argument("--work", type=Path, required=True, help="folder for the models and results; kept")
    parser.add_argument("--families", nargs="+", default=["llama", "gpt2"], choices=["llama", "gpt2"])
    parser.add_argument("--maps", nargs="+", default=list(MAPS), choices=MAPS)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS, help="how vLLM runs; empty: speed alone")
    parser.add_argument("--turns", type=int, default=9, help="timed rounds of each model")
    parser.add_argument("--port", type=int, default=8011, help="where the OpenAI server listens, on this machine alone")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    prompts = make_prompts()
    common = {"prompts": prompts, "tokens": N_TOKENS, "context": CONTEXT, "block_size": BLOCK, "engine": {}}
    common["port"] = options.port
    rows, good = [], True
    for family in options.families:
        folders = {query: str(make_folder(family, query, options.work)) for query in options.maps}
        expected = {query: reference(Path(folder), prompts) for query, folder in folders.items()}
        for way, job in ((way, WAYS[way]) for way in options.ways):
            if family == "gpt2" and job["tp"] > 1:
                continue
            out = options.work / f"{family}-{way.replace(', ', '-').replace(' ', '-')}.json"
            result = run_vllm(options.python, common | job | {"folders": list(folders.values())}, out)
            for query, folder in folders.items():
                found = compare(result.get(folder, result), expected[query], caching=bool(job["prefix_caching"]))
                good &= found.get("good", False)
                rows.append([family, query, way, *shown(found)])
                print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    refusals, speeds = check_refusals(options, common), measure_speed(options, common)
    print_table(["model", "query map", "vLLM", "prompts equal", "log-probabilities apart", "from the cache"], rows)
    print_table(["sharding", "outcome"], refusals)
    print_table(["exact", "tokens/s", "÷ the original in vLLM's class", "÷ the original on this backend"], speeds)
    good &= all(row[1] == "refused" for row in refusals)
    return 0 if good and all(row[2] and float(row[2]) >= LEAST_SPEED for row in speeds) else 1


def shown(found: dict[str, Any]) -> list[str]:
    if "error" in found:
        return ["failed", found["error"], ""]
    return [f"{found['equal']} of {N_PROMPTS}", f"{found['apart']:.1e}", f"{found['prefix_hits']:.0f}"]


if __name__ == "__main__":
    sys.exit(main())
