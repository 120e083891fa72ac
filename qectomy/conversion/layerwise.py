"""One layer at a time: read, fit, refit, write, and run both models' layer on all windows."""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import nn

from qectomy.calibrate.attention_kl import attention_kl
from qectomy.calibrate.hidden_states import Streams, batches, scratch_file
from qectomy.calibrate.layer_fit import fit_layer
from qectomy.calibrate.layer_runner import LayerRunner
from qectomy.calibrate.precision import fast_math
from qectomy.calibrate.refine import RefineSettings
from qectomy.calibrate.refit import TURNED, RefitSettings, refit_layer
from qectomy.checkpoint.checkpoint import Checkpoint, open_checkpoint
from qectomy.checkpoint.config_files import reduced_config, write_reduced_config
from qectomy.checkpoint.finite import all_finite
from qectomy.checkpoint.prefetch import Layers, read_layers
from qectomy.checkpoint.shards import DTYPES, TensorSpec
from qectomy.checkpoint.sizes import planned_tensors
from qectomy.conversion.at_once import TOKENS_A_BATCH, TOKENS_ON_DEVICE
from qectomy.conversion.final_scores import FinalScores, Head, final_scores
from qectomy.conversion.moved import moved_by
from qectomy.conversion.pass_steps import PassStep
from qectomy.conversion.settings import ConvertSettings
from qectomy.conversion.shared_run import SharedWriter, own_scratch
from qectomy.conversion.stopwatch import Stopwatch
from qectomy.distributed.process_group import ProcessGroup
from qectomy.distributed.window_shard import shard_windows
from qectomy.errors import NonFiniteError
from qectomy.eval.protocol import ScoringWindows
from qectomy.models.query_maps import QueryMapSpec, turns_stream
from qectomy.progress import Progress
from qectomy.record.reduced import AttentionKL, FittedLayer
from qectomy.runs.input_hashes import FileWatch
from qectomy.runs.run_dir import RunDir
from qectomy.surgery.audit import spectrum
from qectomy.surgery.basis import read_query
from qectomy.surgery.stream_basis import StreamBasis, random_basis
from qectomy.text.windows import Windows

BYTES_A_READ = 4_000_000  # of the embedding, about
KL_WINDOWS = 8  # on which the attention KL of a layer is measured, fitted and held-out alike


class LayerPass:
    """One pass over a checkpoint: both streams, the writer, and what has been measured.

    Each of several processes runs it on its own windows.
    """

    def __init__(
        self,
        source: Checkpoint,
        recipe: tuple[QueryMapSpec, ...],
        settings: ConvertSettings,
        runner: LayerRunner,
        fitted: Windows,
        held: ScoringWindows,
        unchanged: FileWatch,
        work: RunDir,
        watch: Stopwatch,
        processes: ProcessGroup | None = None,
        refine: RefineSettings | None = None,
    ):
        self.source, self.recipe, self.settings, self.runner = source, recipe, settings, runner
        self.held, self.unchanged, self.work, self.watch = held, unchanged, work, watch
        self.refine = refine or RefineSettings()
        self.share = shard_windows(
            processes or ProcessGroup(settings.device), fitted.tokens.shape[0], held.tokens.shape[0]
        )
        own = self.share.fitted, self.share.held
        self.tokens = torch.cat([fitted.tokens[own[0]], held.tokens[own[1]]])  # of this process
        self.n_fitted = len(own[0])
        at_once = TOKENS_A_BATCH if runner.device.type == "cpu" else TOKENS_ON_DEVICE
        self.batch = max(1, at_once // settings.context)
        planned = planned_tensors(source, recipe, settings.stored_dtype)
        self.specs = {name: TensorSpec(info.shape, info.dtype) for name, info in planned.items()}
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.teacher_seconds = 0.0  # float32 teacher layers on the evaluation windows
        self.basis = self._choose_basis()
        self.drifted = self.basis is not None  # whether the student's stream has left the teacher's
        self.layers: list[FittedLayer] = []  # one record a layer
        self.coming: Layers  # those of the source that are still to be done

    def run(self, progress: Progress | None) -> tuple[FinalScores, dict[str, str]]:
        """Write every tensor; return the scores of the evaluation windows, and the sha256 of each tensor."""
        dims, tell = self.source.dims, progress or (lambda done, total, note: None)
        shape = (self.tokens.shape[0], self.settings.context, dims.d_model)
        with ExitStack() as stack, torch.no_grad():
            scratch = own_scratch(self.work, self.share.processes)
            streams = Streams(scratch, shape, fitted=self.n_fitted, batch=self.batch, share=self.share)
            stack.callback(streams.close)
            writer = stack.enter_context(SharedWriter(self.share.processes, self.work, self.specs, streams))
            if writer.steps:
                self._go_on_from(writer.steps, streams)
                tell(len(self.layers), dims.n_layers, "done before: going on from there")
            else:
                self._begin(streams, writer)
            ahead, device = range(len(self.layers), dims.n_layers), self.runner.device
            self.coming = stack.enter_context(read_layers(self.source, ahead, torch.float32, device, on_host=True))
            for layer in ahead:
                record = self._timed_layer(layer, streams, writer)
                self._keep(streams, writer, record)
                if kl := record.attention_kl:
                    tell(layer + 1, dims.n_layers, f"attention KL {kl.fitted:.4f}, held out {kl.heldout:.4f}")
            writer.finish()
            self._write_config()
            return self._score(streams), writer.digests

    def _begin(self, streams: Streams, writer: SharedWriter) -> None:
        """Write what lies outside the layers and both streams' first states: the first step."""
        since = time.perf_counter()
        self._embed(streams)
        if writer.writes:
            self._write_outer(writer)
        self.watch.add("embedding", since)
        self._keep(streams, writer, None)

    def _keep(self, streams: Streams, writer: SharedWriter, record: FittedLayer | None) -> None:
        """End a step: after this nothing of it is lost, and all that the next layers depend on is on the disk."""
        since = time.perf_counter()
        self.unchanged.check()
        self.layers += [record] if record else []
        step = PassStep(
            record=record,
            generator=self.generator.get_state().numpy().tobytes().hex(),
            drifted=self.drifted,
            seconds=self.watch.seconds,
            total_seconds=self.watch.total,
            teacher_seconds=self.teacher_seconds,
        )
        writer.keep(states=self.share.processes.all_gather(streams.sync()), **step.as_dict())
        self.watch.add("keeping", since)

    def _go_on_from(self, steps: list[dict[str, Any]], streams: Streams) -> None:
        """Be as this was when the last of some steps was kept."""
        found = [PassStep.model_validate(step) for step in steps]
        self.layers, last = [step.record for step in found if step.record], found[-1]
        streams.enter(len(self.layers))
        self.generator.set_state(torch.frombuffer(bytearray.fromhex(last.generator), dtype=torch.uint8))
        self.drifted, self.teacher_seconds = last.drifted, last.teacher_seconds
        self.watch.go_on_from(last.seconds, last.total_seconds)

    def _timed_layer(self, layer: int, streams: Streams, writer: SharedWriter) -> FittedLayer:
        begun = time.perf_counter()
        try:
            record = self._layer(layer, streams, writer)
            record.seconds = round(time.perf_counter() - begun, 3)
            return record
        except torch.linalg.LinAlgError as error:
            raise NonFiniteError(
                f"layer {layer} cannot be fitted: its weights or hidden states overflow float32"
            ) from error

    def _write_config(self) -> None:
        """Write the reduced model's config.json, by the first process, for all to open."""
        dtype = self.settings.stored_dtype or self.source.dtype
        if self.share.processes.is_main:
            write_reduced_config(self.work.result, reduced_config(self.source, self.recipe, dtype))
        self.share.processes.barrier()

    def _score(self, streams: Streams) -> FinalScores:
        """Return the scores of both models on the evaluation windows."""
        since = time.perf_counter()
        original = Head(self.source, self.runner.config, self.runner.device)
        reduced = Head(open_checkpoint(self.work.result, reduced=True), self.runner.config, self.runner.device)
        scores = final_scores(original, reduced, streams, self.held, self.basis)
        self.watch.add("scores", since)
        return scores

    def forward_pass_seconds(self, head_seconds: float) -> float:
        """Estimate of one plain float32 pass over all tokens, from the teacher's share of this run."""
        return (self.teacher_seconds + head_seconds) * (1 + self.share.n_fitted / self.share.n_held)

    def _choose_basis(self) -> StreamBasis | None:
        """Turn the stream where a layer reads its queries straight from it, and no norm can add a shift to them."""
        if not turns_stream(self.recipe, self.source.dims):
            return None
        family, dims = self.source.family, self.source.dims
        power = torch.zeros(dims.d_model, dtype=torch.float64)
        for rows in self._rows(family.embedding):
            power += rows.double().square().sum(0)
        gain = self.source.read(f"{family.final_norm}.weight", torch.float64)
        return random_basis(gain, power, dims.tied, self.generator)

    def _rows(self, name: str) -> Iterator[torch.Tensor]:
        """Yield a tensor a few rows at a time, as stored."""
        for start, stop in self._runs(name):
            yield self.source.read_rows(name, start, stop)

    def _runs(self, name: str) -> Iterator[tuple[int, int]]:
        """Yield [start, stop) runs of a tensor's rows, each about BYTES_A_READ in float32."""
        rows, *width = self.source.tensors[name].shape
        yield from batches(0, rows, max(1, BYTES_A_READ // (4 * math.prod(width))))

    def _embed(self, streams: Streams) -> None:
        """Write both streams' first hidden states: embedding rows of the tokens that occur, and of positions."""
        wanted, basis, name = self.tokens.unique(), self.basis, self.source.family.embedding
        positions = self._positions()
        with ExitStack() as stack:
            shape = (len(wanted), self.source.dims.d_model)
            tables = [stack.enter_context(scratch_file(streams.scratch / f"rows-{i}", *shape)) for i in range(2)]
            for start, stop in self._runs(name):
                first, last = torch.searchsorted(wanted, torch.tensor([start, stop])).tolist()
                if first == last:
                    continue
                rows = self.source.read_rows(name, start, stop, torch.float32)[wanted[first:last] - start]
                tables[0][first:last] = rows if basis is None else basis.states(rows)
                ours = rows if basis is None else basis.embedding_rows(rows)
                tables[1][first:last] = self._as_stored(name, ours)
            for start, stop in batches(0, self.tokens.shape[0], self.batch):
                places, where = torch.searchsorted(wanted, self.tokens[start:stop]).unique(return_inverse=True)
                for states, table, added in zip((streams.teacher, streams.student), tables, positions, strict=True):
                    states[start:stop] = table[places.tolist()][where] + added

    def _positions(self) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """Return what the teacher and the student add to a window's embedding, (T, D), if positions are learned."""
        name = self.source.family.positions
        if name is None:
            return 0.0, 0.0
        rows = self.source.read_rows(name, 0, self.settings.context, torch.float32)
        return rows, self._as_stored(name, rows)

    def _write_outer(self, writer: SharedWriter) -> None:
        """Write what lies outside the layers, a few rows at a time."""
        family, basis = self.source.family, self.basis
        change = {family.embedding: basis.embedding_rows, family.head: basis.head_rows} if basis else {}
        for name in family.outer_shapes(self.source.dims):
            if basis and name == f"{family.final_norm}.weight":
                writer.write(name, basis.new_final_gain)
                continue
            start = 0
            for rows in self._rows(name):
                rows = change[name](rows.double()) if name in change else rows
                self._as_stored(name, rows)  # also the rows of tokens that no text here holds
                writer.write_rows(name, start, rows)
                start += len(rows)

    def _layer(self, layer: int, streams: Streams, writer: SharedWriter) -> FittedLayer:
        """Run, fit, write and run again one layer; return its record."""
        runner, spec = self.runner, self.recipe[layer]
        since = time.perf_counter()
        tensors, reduced = self._read(layer)
        teacher = runner.build(layer, tensors)
        since = self.watch.add("reading", since)
        self._run_teacher(layer, teacher, streams)
        since = self.watch.add("forward", since)
        if spec.name != "dense":
            with torch.enable_grad():
                reduced = fit_layer(
                    runner, layer, spec, tensors, reduced, teacher, streams, self.refine, self.generator
                )
            since = self.watch.add("fitting", since)
        student = runner.build(layer, self._stored_layer(layer, reduced), reduced=True)
        kl = self._attention_kl(teacher, student, streams)  # the refit changes neither queries nor keys
        del teacher, tensors
        since = self.watch.add("measuring", since)
        self.drifted = self.drifted or spec.name != "dense"
        if self.drifted and self.settings.refit:
            student = runner.build(layer, reduced, reduced=True)
            reduced = {}  # the refit replaces some of them: not to be held twice
            refit_layer(runner, student, streams, TURNED if self.basis else RefitSettings())
            reduced = {name: tensor.detach() for name, tensor in student.state_dict().items()}
            since = self.watch.add("refitting", since)
        stored = self._stored_layer(layer, reduced)
        for name, tensor in stored.items():
            writer.write(runner.family.prefix(layer) + name, tensor)
        moved = moved_by(self.source, layer, spec, stored, self.basis) if writer.writes else None
        sigma = spectrum(read_query(self.source, layer).to(self.runner.device))
        student = runner.build(layer, stored, reduced=True)
        since = self.watch.add("writing", since)
        self._run_student(layer, student, streams)
        streams.enter(layer + 1)
        self.watch.add("forward", since)
        return FittedLayer(index=layer, map=str(spec), attention_kl=kl, moved=moved, singular_values=sigma)

    def _read(self, layer: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Return the teacher's layer and the one that the fit starts from: the same but where the stream begins."""
        tensors, family = self.coming.take(layer), self.source.family
        if self.basis is None:
            return tensors, tensors
        turned = self.basis.layer(family, tensors)
        return turned, turned if layer else self.basis.layer(family, tensors, scaled_embedding=True)

    def _stored_layer(self, layer: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return a layer's tensors, by name inside the layer, with the values that they will have in the file."""
        prefix = self.runner.family.prefix(layer)
        return {name: self._as_stored(prefix + name, tensor) for name, tensor in tensors.items()}

    def _as_stored(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the float32 values that the written tensor will have. Raises NonFiniteError if it overflows."""
        if not tensor.is_floating_point():
            return tensor
        stored = tensor.to("cpu", DTYPES[self.specs[name].dtype]).float()
        if not all_finite(stored):
            if not all_finite(tensor):
                raise NonFiniteError(f"{name} came out as NaN or Inf: the model's hidden states overflow there")
            raise NonFiniteError(f"{name} does not fit in {self.specs[name].dtype}; use --dtype float32")
        return stored

    def _attention_kl(self, teacher: nn.Module, student: nn.Module, streams: Streams) -> AttentionKL:
        """Mean KL of the attention in nats, over a few fitted and a few held-out windows, float32."""
        share, means = self.share, []
        for before, own, total in ((0, share.fitted, share.n_fitted), (self.n_fitted, share.held, share.n_held)):
            values = torch.zeros(min(total, KL_WINDOWS), device=self.runner.device)  # each in its place
            first = before - own.start
            for window in range(own.start, min(own.stop, KL_WINDOWS)):
                start, pair = first + window, []
                for module, states in ((teacher, streams.teacher), (student, streams.student)):
                    hidden = self.runner.read(module, states[start : start + 1].to(self.runner.device))
                    pair.append(self.runner.queries_keys(module, hidden))
                values[window] = attention_kl(pair[0], pair[1], self.runner.causal(teacher)).mean()
            share.processes.all_reduce_(values)
            means.append(float(values.mean()))
        return AttentionKL(fitted=means[0], heldout=means[1])

    def _run_teacher(self, layer: int, teacher: nn.Module, streams: Streams) -> None:
        """Run the original layer on all windows and keep its stream after the attention and after the layer."""
        for first, last, precision in self._spans():
            begun = time.perf_counter()
            with precision:
                for start, stop in batches(first, last, self.batch):
                    x_mid, _ = self.runner.attend(teacher, streams.teacher[start:stop].to(self.runner.device))
                    after, _ = self.runner.think(teacher, x_mid)
                    self._check(after, f"the original model's layer {layer}", start, stop)
                    if first < self.n_fitted:
                        streams.teacher_mid[start:stop] = x_mid
                    streams.teacher_after[start:stop] = after
            if first == self.n_fitted:
                self.teacher_seconds += self.share.sum_numbers(time.perf_counter() - begun)[0]

    def _run_student(self, layer: int, student: nn.Module, streams: Streams) -> None:
        """Run the reduced layer on all windows and keep its stream after the layer."""
        for first, last, precision in self._spans():
            with precision:
                for start, stop in batches(first, last, self.batch):
                    after = self.runner.forward(student, streams.student[start:stop].to(self.runner.device))
                    self._check(after, f"the reduced model's layer {layer}", start, stop)
                    streams.student_after[start:stop] = after

    def _spans(self) -> Iterator[tuple[int, int, AbstractContextManager[None]]]:
        """Yield the fitted windows, for fast precision, and the evaluation windows, for float32."""
        yield 0, self.n_fitted, fast_math(self.runner.device)
        yield self.n_fitted, self.tokens.shape[0], nullcontext()

    def _check(self, after: torch.Tensor, what: str, start: int, stop: int) -> None:
        if not all_finite(after):
            first, last = self.share.number(start), self.share.number(stop - 1)
            raise NonFiniteError(f"{what} gives NaN or Inf on windows {first} to {last}; nothing was written")
