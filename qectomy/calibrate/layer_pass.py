"""One layer at a time: read, fit, refit, write, and run both models' layer on all windows."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qectomy.calibrate.attention_kl import attention_kl
from qectomy.calibrate.final_scores import FinalScores, Head, final_scores
from qectomy.calibrate.layer_fit import Streams, fast_math, fit_layer
from qectomy.calibrate.layers import LayerRunner
from qectomy.calibrate.memory import release_freed
from qectomy.calibrate.refine import RefineSettings
from qectomy.calibrate.refit import TURNED, RefitSettings, refit_layer
from qectomy.calibrate.settings import ConvertSettings
from qectomy.calibrate.states import HiddenStates, batches
from qectomy.calibrate.text import Windows
from qectomy.errors import NonFiniteError
from qectomy.eval.perplexity import ScoringWindows
from qectomy.surgery.checkpoint import Checkpoint, open_checkpoint
from qectomy.surgery.config_files import reduced_config, write_config
from qectomy.surgery.plan import planned_tensors
from qectomy.surgery.query_maps import QueryMapSpec
from qectomy.surgery.stream_basis import StreamBasis, random_basis
from qectomy.surgery.writer import DTYPES, ShardWriter, TensorSpec

Progress = Callable[[int, int, str], None]  # (layers done, layers in all, note)
TOKENS_A_BATCH = 1024  # how many tokens a layer runs on at a time
ROWS_A_READ = 8192  # of the embedding
KL_WINDOWS = 8  # on which the attention KL of a layer is measured, fitted and held-out alike


@dataclass
class Stopwatch:
    """Seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)
    begun: float = field(default_factory=time.perf_counter)

    def add(self, stage: str, since: float) -> float:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - since
        return now


class LayerPass:
    """One pass over a checkpoint: both streams, the writer, and what has been measured."""

    def __init__(
        self,
        source: Checkpoint,
        recipe: tuple[QueryMapSpec, ...],
        settings: ConvertSettings,
        runner: LayerRunner,
        fitted: Windows,
        held: ScoringWindows,
        work: Path,
        watch: Stopwatch,
    ):
        self.source, self.recipe, self.settings, self.runner = source, recipe, settings, runner
        self.held, self.work, self.watch = held, work, watch
        self.tokens = torch.cat([fitted.tokens, held.tokens])
        self.n_fitted = fitted.tokens.shape[0]
        self.batch = max(1, TOKENS_A_BATCH // settings.context)
        planned = planned_tensors(source, recipe, settings.stored_dtype)
        self.specs = {name: TensorSpec(info.shape, info.dtype) for name, info in planned.items()}
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.teacher_seconds = 0.0  # float32 teacher layers on the evaluation windows
        self.basis = self._choose_basis()
        self.drifted = self.basis is not None  # whether the student's stream has left the teacher's

    def run(self, progress: Progress | None) -> tuple[FinalScores, list[dict[str, Any]]]:
        """Write every tensor; return the scores of the evaluation windows, and one record a layer."""
        dims, layers = self.source.dims, []
        shape = (self.tokens.shape[0], self.settings.context, dims.d_model)
        with ExitStack() as stack, torch.no_grad():
            files = [self.work / ".teacher", self.work / ".student"]
            states = [HiddenStates(path, *shape) for path in files]
            for state in states:
                stack.callback(state.close)
            streams = Streams(states[0], states[1], self.n_fitted, self.batch)
            writer = stack.enter_context(ShardWriter(self.work, self.specs))
            since = time.perf_counter()
            self._embed(streams)
            self._write_outer(writer)
            release_freed()
            self.watch.add("embedding", since)
            for layer in range(dims.n_layers):
                begun = time.perf_counter()
                try:
                    record = self._layer(layer, streams, writer)
                except torch.linalg.LinAlgError as error:
                    raise NonFiniteError(
                        f"layer {layer} cannot be fitted: its weights or hidden states overflow float32"
                    ) from error
                release_freed()
                record["seconds"] = round(time.perf_counter() - begun, 3)
                layers.append(record)
                if progress:
                    kl = record["attention_kl"]
                    progress(
                        layer + 1,
                        dims.n_layers,
                        f"attention KL {kl['fitted']:.4f}, held out {kl['heldout']:.4f}",
                    )
            writer.finish()
            since = time.perf_counter()
            dtype = self.settings.stored_dtype or self.source.dtype
            write_config(self.work, reduced_config(self.source, self.recipe, dtype))
            original = Head(self.source, self.runner.config, self.runner.device)
            reduced = Head(open_checkpoint(self.work, reduced=True), self.runner.config, self.runner.device)
            scores = final_scores(original, reduced, streams, self.held, self.basis)
            self.watch.add("scores", since)
        for path in files:
            path.unlink()
        return scores, layers

    def forward_pass_seconds(self, head_seconds: float) -> float:
        """Estimate of one plain float32 pass over all tokens, from the teacher's share of this run."""
        share = self.tokens.shape[0] / (self.tokens.shape[0] - self.n_fitted)
        return (self.teacher_seconds + head_seconds) * share

    def _choose_basis(self) -> StreamBasis | None:
        """Turn the stream where a layer reads its queries straight from it."""
        if not any(spec.name == "identity" for spec in self.recipe):
            return None
        family, dims = self.source.family, self.source.dims
        power = torch.zeros(dims.d_model, dtype=torch.float64)
        for rows in self._rows(family.embedding):
            power += rows.double().square().sum(0)
        gain = self.source.read(family.final_norm, torch.float64)
        return random_basis(gain, power, dims.tied, self.generator)

    def _rows(self, name: str) -> Iterator[torch.Tensor]:
        """Yield a tensor a few rows at a time, as stored."""
        size = self.source.tensors[name].shape[0]
        for start in range(0, size, ROWS_A_READ):
            yield self.source.read_rows(name, start, min(start + ROWS_A_READ, size))

    def _embed(self, streams: Streams) -> None:
        """Write both streams' first hidden states: the embedding rows of the tokens that occur."""
        wanted = self.tokens.unique()
        table = torch.empty(len(wanted), self.source.dims.d_model)
        for start in range(0, self.source.dims.vocab_size, ROWS_A_READ):
            stop = min(start + ROWS_A_READ, self.source.dims.vocab_size)
            here = (wanted >= start) & (wanted < stop)
            if here.any():
                rows = self.source.read_rows(self.source.family.embedding, start, stop, torch.float32)
                table[here] = rows[wanted[here] - start]
        theirs, ours = table, table
        if self.basis is not None:
            theirs, ours = self.basis.states(table), self.basis.embedding_rows(table)
        ours = self._as_stored(self.source.family.embedding, ours)
        for start, stop in batches(0, self.tokens.shape[0], self.batch):
            places = torch.searchsorted(wanted, self.tokens[start:stop])
            streams.teacher.write(start, theirs[places])
            streams.student.write(start, ours[places])

    def _write_outer(self, writer: ShardWriter) -> None:
        """Write what lies outside the layers, a few rows at a time."""
        family, basis = self.source.family, self.basis
        change = {family.embedding: basis.embedding_rows, family.head: basis.head_rows} if basis else {}
        for name in family.outer_shapes(self.source.dims):
            if basis and name == family.final_norm:
                writer.write(name, basis.new_final_gain)
                continue
            start = 0
            for rows in self._rows(name):
                rows = change[name](rows.double()) if name in change else rows
                self._as_stored(name, rows)  # also the rows of tokens that no text here holds
                writer.write_rows(name, start, rows)
                start += len(rows)

    def _layer(self, layer: int, streams: Streams, writer: ShardWriter) -> dict[str, Any]:
        """Fit, write and run one layer; return its record."""
        runner, spec = self.runner, self.recipe[layer]
        since = time.perf_counter()
        tensors = self.source.read_layer(layer, torch.float32)
        base = tensors
        if self.basis is not None:
            base = self.basis.layer(runner.family, tensors, scaled_embedding=layer == 0)
            tensors = self.basis.layer(runner.family, tensors)
        teacher = runner.build(layer, tensors)
        since = self.watch.add("reading", since)
        reduced = base
        if spec.name != "dense":
            with torch.enable_grad():
                reduced = fit_layer(
                    runner, layer, spec, tensors, base, teacher, streams, RefineSettings(), self.generator
                )
            release_freed()
            since = self.watch.add("fitting", since)
        if self.drifted or spec.name != "dense":
            self.drifted = True
            student = runner.build(layer, reduced, reduced=True)
            refit_layer(runner, teacher, student, streams, TURNED if self.basis else RefitSettings())
            reduced = {name: tensor.detach() for name, tensor in student.state_dict().items()}
            since = self.watch.add("refitting", since)
        prefix = runner.family.prefix(layer)
        stored = {name: self._as_stored(prefix + name, tensor) for name, tensor in reduced.items()}
        for name, tensor in stored.items():
            writer.write(prefix + name, tensor)
        student = runner.build(layer, stored, reduced=True)
        since = self.watch.add("writing", since)
        kl = self._attention_kl(teacher, student, streams)
        since = self.watch.add("measuring", since)
        self._advance(layer, teacher, student, streams)
        self.watch.add("forward", since)
        return {"index": layer, "map": str(spec), "attention_kl": kl}

    def _as_stored(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the float32 values that the written tensor will have. Raises NonFiniteError if it overflows."""
        if not tensor.is_floating_point():
            return tensor
        stored = tensor.to("cpu", DTYPES[self.specs[name].dtype]).float()
        if not torch.isfinite(stored).all():
            if not torch.isfinite(tensor).all():
                raise NonFiniteError(f"{name} came out as NaN or Inf: the model's hidden states overflow there")
            raise NonFiniteError(f"{name} does not fit in {self.specs[name].dtype}; use --dtype float32")
        return stored

    def _attention_kl(self, teacher: nn.Module, student: nn.Module, streams: Streams) -> dict[str, float]:
        """Mean KL of the attention in nats, over a few fitted and a few held-out windows, float32."""
        total = self.tokens.shape[0]
        result = {}
        for name, first, last in (("fitted", 0, self.n_fitted), ("heldout", self.n_fitted, total)):
            values = []
            for start in range(first, min(last, first + KL_WINDOWS)):
                pair = []
                for module, states in ((teacher, streams.teacher), (student, streams.student)):
                    hidden = self.runner.read(module, states.read(start, start + 1).to(self.runner.device))
                    pair.append(self.runner.queries_keys(module, hidden))
                values.append(attention_kl(pair[0], pair[1], self.runner.causal()).mean())
            result[name] = float(torch.stack(values).mean())
        return result

    def _advance(self, layer: int, teacher: nn.Module, student: nn.Module, streams: Streams) -> None:
        """Run both layers on all windows: fitted ones in fast precision, evaluation ones in float32."""
        total = self.tokens.shape[0]
        for module, states, who in (
            (teacher, streams.teacher, "original"),
            (student, streams.student, "reduced"),
        ):
            with fast_math(self.runner.device):
                self._step(module, states, 0, self.n_fitted, f"the {who} model's layer {layer}")
            begun = time.perf_counter()
            self._step(module, states, self.n_fitted, total, f"the {who} model's layer {layer}")
            if module is teacher:
                self.teacher_seconds += time.perf_counter() - begun

    def _step(self, module: nn.Module, states: HiddenStates, first: int, last: int, what: str) -> None:
        for start, stop in batches(first, last, self.batch):
            after = self.runner.forward(module, states.read(start, stop).to(self.runner.device))
            if not torch.isfinite(after).all():
                raise NonFiniteError(f"{what} gives NaN or Inf on windows {start} to {stop - 1}; nothing was written")
            states.write(start, after)
