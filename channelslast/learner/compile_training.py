"`CompileTraining`: train with the model compiled."
import time

import torch
from fastai.callback.core import Callback

from ..core.compiling import CHANGES, DRAWS, compiling_quietly, note_reasons, own_code, print_compiled, reason_of, stance
from ..core.model_copy import all_hooks_of, program_of
from ..core.nested_tensors import tensors_of
from ..core.pickle_as import pickle_as
from ..core.stand_in import StandInCallback, Work
from ..core.undo import undo_on_error

MAX_SETTINGS = 4  # to compile for: modes, frozen layers, precision, format
MAX_DRAWS = 3  # first batches in a row with random numbers drawn; fewer may be another thread's
NOTE = 'This step ran code compiled by `CompileTraining`. `learn.remove_cb(CompileTraining)` removes it.'


@pickle_as(Callback)
class CompileTraining(StandInCallback):
    """Train with the model compiled by `torch.compile`. Validation and predictions stay as they are.

    The second batch of a fit is compiled, which takes seconds to minutes and needs a C++ compiler (on GPUs Triton).
    Later batches of its shape run compiled. Another precision, format or set of frozen layers compiles again, up to four
    times. `forget()` frees the code. A model that can't be compiled, or draws random numbers of Python or NumPy, runs
    uncompiled, with a warning. Compiled, dropout draws other numbers, batch norms inside `torch.utils.checkpoint` update
    their statistics once per step instead of twice, and a second backward pass (`create_graph`) fails, as the error says.

    >>> from fastai.vision.all import *; from channelslast import *
    >>> dl = DataLoader([(torch.randn(3, 32, 32), torch.tensor(0))]*8, bs=4)
    >>> net = nn.Sequential(Flatten(), nn.Linear(3072, 2))
    >>> learn = Learner(DataLoaders(dl, dl), net, CrossEntropyLossFlat(), cbs=CompileTraining())
    >>> with learn.no_bar(), learn.no_logging(): learn.fit(1) # doctest: +ELLIPSIS
    CompileTraining: Sequential compiled in ... s, for inputs of (4, 3, 32, 32)."""
    backend, reason, seconds = 'inductor', '', None # `torch.compile`'s default; Why it is uncompiled; seconds of the last compilation

    def new_work(self): return Work(codes={}, shapes=None, code=None, draws=0, program=(), objects=())
    def takes_part(self) -> bool: return self.training

    def before_train(self):  # notebooks define methods again
        self.work.objects = program_of({c: None for m in self.model.modules() for c in type(m).__mro__})
        self.work.program = tuple(map(id, self.work.objects))

    @property
    def compiled(self) -> int: return sum(c.run is not None for c in self.work.codes.values())

    def run_model(self, forward, *args, **kwargs):
        work, model, tensors = self.work, self.model, tensors_of((args, kwargs))
        work.code, work.shapes, self.error_note = None, work.shapes or [t.shape for t in tensors], ''
        if not torch.is_grad_enabled() or work.shapes != [t.shape for t in tensors]: return forward(*args, **kwargs)
        casts = [torch.is_autocast_enabled(d) and torch.get_autocast_dtype(d) for d in {t.device.type for t in tensors}]
        params = [(p.requires_grad, p.stride()) for p in model.parameters()]
        setting = *casts, *params, *((m, m.training) for m in model.modules()), *all_hooks_of(model.modules()), *work.program
        code = work.code = work.codes.get(setting)
        if code is None and len(work.codes) < MAX_SETTINGS: return self._first_batch(setting, model, forward, args, kwargs)
        if code is None or code.refused: return forward(*args, **kwargs)
        if code.run is None: return self._second_batch(code, model, forward, args, kwargs)
        self.error_note = NOTE
        with stance('eager_on_recompile'): out = code.run(*args, **kwargs)
        if code.misses: self._refuse(CHANGES)
        return out

    def _first_batch(self, setting, model, forward, args, kwargs):
        self.work.code = self.work.codes[setting] = Work(run=None, started=None, refused=False, misses=0, no_grad=())
        reasons = ['a module has a finalizer'] if any(hasattr(m, '__del__') for m in model.modules()) else []
        with note_reasons(self, model, reasons): out = forward(*args, **kwargs)
        self.work.draws = self.work.draws + 1 if reasons == [DRAWS] else 0
        if 0 < self.work.draws < MAX_DRAWS: self.work.codes.pop(setting)  # the next batch is the first one again
        elif reasons: self._refuse(reasons[0])
        return out

    def _second_batch(self, code, model, forward, args, kwargs):
        def _forward(*args, **kwargs):
            if not torch.compiler.is_compiling(): code.misses += 1
            return model(*args, **kwargs)
        code.started, self.error_note = (time.perf_counter(), args, kwargs), NOTE  # the backward pass compiles, too
        code.run = torch.compile(own_code(_forward), fullgraph=True, dynamic=False)
        try:
            with compiling_quietly(), undo_on_error(model): return code.run(*args, **kwargs)
        except Exception as e: self._refuse(reason_of(e))
        return forward(*args, **kwargs)  # outside the handler, whose traceback holds the failed pass

    def _refuse(self, reason):
        vars(self.work.code).update(refused=True, run=None, started=None)
        self.reason, self.error_note = reason, ''
        self.warn(f'stays uncompiled: {reason}')

    def after_backward(self):
        code = self.work.code or Work(run=True, started=None, no_grad=())
        if not code.run: code.no_grad = [p for p in self.model.parameters() if p.requires_grad and p.grad is None]
        for p in code.no_grad:  # compiled code gives zeros where the loss does not depend on a parameter
            if p.grad is not None and not p.grad.any(): p.grad = None
        if code.started: print_compiled(self, self.model, *code.started, again=self.compiled > 1)
        code.started = None
