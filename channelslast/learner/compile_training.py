"`CompileTraining`: train with the model compiled."
import time
import warnings

import torch
from fastai.callback.core import Callback

from ..core.compiling import CHANGES, MISREAD, compiling_quietly, own_code, print_compiled, reason_of
from ..core.devices import is_out_of_memory, unwrap_model
from ..core.exception_note import add_note
from ..core.nested_tensors import tensors_of
from ..core.compiling import note_rewritten  # TEMPORARY
from ..core.pickle_as import pickle_as
from ..core.random_state import python_state
from ..core.stand_in import StandInCallback, Work
from ..core.undo import undo_on_error

__all__ = ['CompileTraining']

MAX_SETTINGS = 4  # to compile for: modes, frozen layers, precision, format


class Code:
    def __init__(self, setting): self.setting, self.run, self.misses, self.refused, self.no_grad = setting, None, 0, False, []


class Codes(Work):
    def __init__(self): self.codes, self.shapes, self.code, self.started = [], None, None, None


@pickle_as(Callback)
class CompileTraining(StandInCallback):
    """Train with the model compiled by `torch.compile`. Validation and predictions stay as they are.

    The second batch of a fit is compiled, which takes seconds to minutes and needs a C++ compiler (on GPUs Triton).
    Later batches of the same shape run compiled, others as without this callback. Another precision or format, and
    freezing or unfreezing layers, compile once more, for up to four settings. `forget()` frees the compiled code. A
    model that can't be compiled, or draws random numbers of Python or NumPy, runs uncompiled, with a warning.

    Compiled code differs in three ways: dropout draws other numbers, batch norms inside `torch.utils.checkpoint` update
    their running statistics once per step instead of twice, and a second backward pass through the same graph fails
    (`create_graph=True`, `retain_graph=True`). An error in a compiled step says so.

    >>> from fastai.vision.all import *; from channelslast import *
    >>> dl = DataLoader([(torch.randn(3, 32, 32), torch.tensor(0))]*8, bs=4)
    >>> learn = Learner(DataLoaders(dl, dl), nn.Sequential(Flatten(), nn.Linear(3072, 2)), CrossEntropyLossFlat(),
    ...                 cbs=CompileTraining())
    >>> with learn.no_bar(), learn.no_logging(): learn.fit(1) # doctest: +ELLIPSIS
    CompileTraining: Sequential compiled in ... s, for inputs of (4, 3, 32, 32)."""
    kind_of_work, reason, seconds = Codes, '', None # Why it is uncompiled; seconds of the last compilation

    @property
    def compiled(self) -> int: return sum(c.run is not None for c in self.work.codes)

    def takes_part(self) -> bool:
        self.work.code, self.work.started = None, None
        return self.training

    def run_model(self, forward, *args, **kwargs):
        work, tensors, model = self.work, tensors_of((args, kwargs)), self.model
        shapes, devices = [t.shape for t in tensors], {t.device.type for t in tensors}
        if not torch.is_grad_enabled() or work.shapes not in (None, shapes): return forward(*args, **kwargs)
        casts = [torch.is_autocast_enabled(d) and torch.get_autocast_dtype(d) for d in devices]
        modes, params = [(m, m.training) for m in model.modules()], [(p.requires_grad, p.stride()) for p in model.parameters()]
        work.shapes, work.code = shapes, next((c for c in work.codes if c.setting == (modes, params, casts)), None)
        if work.code is None and len(work.codes) < MAX_SETTINGS:
            work.code = Code((modes, params, casts))
            work.codes.append(work.code)
            return self._look(forward, args, kwargs)
        if work.code is None or work.code.refused: return forward(*args, **kwargs)
        if work.code.run is None: return self._compile(forward, args, kwargs)
        with torch.compiler.set_stance('eager_on_recompile'): out = work.code.run(*args, **kwargs)
        if work.code.misses: self._refuse(CHANGES)
        return out

    def _look(self, forward, args, kwargs):
        "Output of a setting's first batch, which runs uncompiled."
        rewritten, draws, model = [], python_state(), self.model
        with note_rewritten(rewritten): out = forward(*args, **kwargs)
        if unwrap_model(model) is not model: self._refuse('it is compiled already, or wrapped for several devices')
        elif getattr(getattr(self.learn, 'mixed_precision', None), 'fp32_layers', ()):
            self._refuse('some of its layers are kept in fp32')
        elif any(hasattr(m, '__del__') for m in model.modules()): self._refuse('a module has a finalizer')
        elif rewritten: self._refuse(MISREAD)
        elif draws != python_state(): self._refuse('it draws random numbers of Python or NumPy')
        return out

    def _compile(self, forward, args, kwargs):
        "Output of a setting's second batch."
        code, model, self.work.started = self.work.code, self.model, (time.perf_counter(), args, kwargs)
        def _forward(*args, **kwargs):
            if not torch.compiler.is_compiling(): code.misses += 1
            return model(*args, **kwargs)
        code.run = torch.compile(own_code(_forward), fullgraph=True, dynamic=False)
        try:
            with compiling_quietly(), undo_on_error(model): return code.run(*args, **kwargs)
        except Exception as e: self._refuse(reason_of(e))
        return forward(*args, **kwargs)  # outside the handler, whose traceback holds the failed pass

    def _refuse(self, reason):
        self.work.code.refused, self.work.code.run, self.work.started, self.reason = True, None, None, reason
        if not self.quiet: warnings.warn(f'CompileTraining: {type(self.model).__name__} stays uncompiled: {reason}.')

    def after_backward(self):
        code, started, params = self.work.code, self.work.started, self.model.parameters()
        if code is None or code.refused: return
        if code.run is None: code.no_grad = [p for p in params if p.requires_grad and p.grad is None]
        for p in code.no_grad:  # compiled code gives zeros where the loss does not depend on a parameter
            if p.grad is not None and not p.grad.any(): p.grad = None
        if started: self.reason, self.seconds = '', time.perf_counter() - started[0]
        if started: print_compiled(self, self.model, self.seconds, *started[1:], again=self.compiled > 1)

    def explain(self, e):
        if self.work.code and self.work.code.run and isinstance(e, RuntimeError) and not is_out_of_memory(e):
            add_note(e, 'This step ran compiled. `learn.remove_cb(CompileTraining)` trains with the model as it is.')
