"Timed predictions of several candidates on one Learner, inside `preserve_learner`: eval mode, no gradients."
import torch

from ..predict.compile_predictions import CompilePredictions
from ..core.distributed import broadcast_from_rank0
from . import selection
from .candidates import Candidate
from .number_check import check_predictions
from .train_benchmark import SYNCHRONOUS, TrainBenchmark, step_ms

__all__ = ['ROUNDS_UNFOLDED', 'PredictBenchmark']

ROUNDS_UNFOLDED = 2  # rounds before batch norms are folded, for candidates that are not far behind


class PredictBenchmark(TrainBenchmark):
    "Predictions of candidates that take turns on the same batches and weights."
    event = 'before_validate'

    def step(self, c, i) -> float:
        "Milliseconds of one batch's predictions."
        batch = self.batches[i % len(self.batches)]
        if self.device.type not in SYNCHRONOUS:  # on GPUs memory is scarce, and reported for each candidate
            for o in self.candidates:
                if o.folded and o is not c: o.fold.forget()
        if c.folded and not (c.compiled or c.fold.ready): self.learn.one_batch(0, batch)  # the weights were moved
        with self.peak_memory(c): ms = step_ms(self.learn, batch)
        self.steps += 1; self.on_step(self.steps)
        return ms

    def check_numbers(self):
        with torch.compiler.set_stance('force_eager'):
            self.reference = check_predictions(self.learn, self.candidates, self.callbacks, self.compared_batch)

    def add_folded(self, scaler):
        "For each candidate that is not far behind, add one with `FoldBatchNorm`, if that prepares any weights."
        self.run(ROUNDS_UNFOLDED, None)
        limit = selection.FAR_FACTOR*min(selection.fastest(c.ms) for c in self.running)
        near = [i for i, c in enumerate(self.candidates) if c.running and selection.fastest(c.ms) <= limit]
        for c in [self.candidates[i] for i in broadcast_from_rank0(near)]:
            folded = Candidate(c.memory_format, c.base_precision, scaler, c.fp32_layers, folded=True)
            folded.note = c.note
            self.warm_up([folded])
            if broadcast_from_rank0(folded.running and folded.fold.works): self.candidates.append(folded)
        self._check_added([c for c in self.running if c.folded])

    def add_compiled(self, scaler):
        "Add the fastest candidate of each precision with its model compiled. The compiler picks its own formats."
        self.run(ROUNDS_UNFOLDED, None)
        fastest = {}
        for c in sorted(self.running, key=lambda c: selection.fastest(c.ms)):
            if not c.fp32_layers: fastest.setdefault(c.base_precision, c)
        places = broadcast_from_rank0([self.candidates.index(c) for c in fastest.values()])
        for c in [self.candidates[i] for i in places]:
            compiled = Candidate(c.memory_format, c.base_precision, scaler, folded=c.folded, compile=CompilePredictions)
            self.candidates.append(compiled)
            self.warm_up([compiled])
        self._check_added([c for c in self.running if c.compiled])

    def _check_added(self, added):
        if any(c.compiled for c in added):  # only batches of the compiled shape run compiled, and not in `force_eager`
            baseline, batch, reference = self.candidates[:1], self.batches[0], self.reference
            if self.compared_batch is not batch:
                reference = check_predictions(self.learn, baseline, self.callbacks, batch)
            check_predictions(self.learn, added, self.callbacks, batch, reference)
        else:
            with torch.compiler.set_stance('force_eager'):
                check_predictions(self.learn, added, self.callbacks, self.compared_batch, self.reference)
        if added:  # only steps of the same rounds are compared: the machine may have been faster or slower before
            for c in self.running: c.ms.clear()
