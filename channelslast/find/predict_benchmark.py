"Predictions of many candidates on one Learner, inside `preserve_learner`: in eval mode, without gradients, folded or not."
import torch

from ..core.distributed import broadcast_from_rank0
from . import selection
from .candidates import Candidate
from .number_check import check_predictions
from .train_benchmark import SYNCHRONOUS, TrainBenchmark, step_ms

__all__ = ['ROUNDS_UNFOLDED', 'PredictBenchmark']

ROUNDS_UNFOLDED = 2  # rounds, after which those far behind need not be folded too


class PredictBenchmark(TrainBenchmark):
    "Candidates that predict in turn, on the same batches and weights."
    event = 'before_validate'

    def step(self, c, i) -> float:
        "Milliseconds of one batch's predictions."
        batch = self.batches[i % len(self.batches)]
        if self.device.type not in SYNCHRONOUS:  # elsewhere memory is scarce, and told per candidate
            for o in self.candidates:
                if o.folded and o is not c: o.fold.forget()
        if c.folded and not c.fold.ready: self.learn.one_batch(0, batch)  # a switch of format moved the weights
        with self.peak_memory(c): ms = step_ms(self.learn, batch)
        self.count()
        return ms

    def check_numbers(self):
        with torch.compiler.set_stance('force_eager'):
            self.truth = check_predictions(self.learn, self.candidates, self.cbs, self.compared_batch)

    def add_folded(self, scaler):
        "For each format and precision that is not far behind, the same with batch norms folded, where there are any."
        self.run(ROUNDS_UNFOLDED, None)
        best = min(selection.fastest(c.ms) for c in self.running)
        near = broadcast_from_rank0([c.running and selection.fastest(c.ms) <= selection.FAR_FACTOR*best for c in self.candidates])
        for c in [c for c, is_near in zip(self.candidates, near) if is_near]:
            folded = Candidate(c.memory_format, c.base_precision, scaler, c.fp32_layers, folded=True)
            folded.note = c.note
            self.warm_up([folded])
            if not broadcast_from_rank0(folded.running and folded.fold.works): continue  # nothing to fold: no row
            self.candidates.append(folded)
        with torch.compiler.set_stance('force_eager'):
            added = [c for c in self.running if c.folded]
            check_predictions(self.learn, added, self.cbs, self.compared_batch, self.truth)
        if added:  # the race is among steps of the same rounds: a machine may have been faster, or slower, before
            for c in self.running: c.ms.clear()
