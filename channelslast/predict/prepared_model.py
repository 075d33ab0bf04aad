"What the callbacks for predictions share: private copies of the model, prepared and compared once, never stale."
import warnings
from contextlib import ExitStack, nullcontext

import torch
from torch import Tensor

from ..core.compiling import CHANGES
from ..core.compare import numbers_of, perturb, relative_error
from ..core.devices import fp32_precision
from ..core.nested_tensors import leaves_of, tensors_of
from ..core.random_state import python_state, restore_random_states
from ..core.stand_in import StandInCallback, Work
from ..core.undo import restore_dict
from .model_copy import ModelCopy
from .model_state import CantCopy, ModelState, has_global_hooks, versions_of

__all__ = ['NotPrepared', 'PredictionCallback', 'input_key']

MAX_SHAPES = 8  # input shapes to compare; if one copy served all of them, it serves other shapes too
MAX_WRITES = 3  # batches in a row that change the model; then it predicts as without the callback
HALF_TOLERANCE = 5e-2  # relative error allowed in each output tensor, if anything is computed in half precision
REDUCED_FP32 = dict(fp16=(1e-2, 2**-10), bf16=(HALF_TOLERANCE, 2**-7))  # fp32 in TF32 or bf16; with rounding errors
# Deep models amplify rounding errors. A rounding error of the input changes the output of a ResNet-152 by 4e-4 if its
# batch norms hold one batch's statistics. Folding changes it by 0.9 to 2.8 times as much in ten torchvision models.
AMPLIFICATION = 10
PLAIN = bool, int, float, str


class NotPrepared(Exception):
    "Raised where a model can't be prepared, or where a prepared one does not fit the call, with the reason."


def input_key(args, kwargs) -> tuple: # Kind of the input; its shapes without the batch dimension
    "What a prepared model depends on in the input."
    leaves = leaves_of((args, kwargs))
    devices = {t.device.type for t in leaves if isinstance(t, Tensor)}
    def _kind(x): return (x.dtype, x.device) if isinstance(x, Tensor) else x if isinstance(x, PLAIN) else type(x)
    def _casts(d): return torch.amp.is_autocast_available(d) and torch.is_autocast_enabled(d)
    kind, autocast = map(_kind, leaves), [(d, torch.get_autocast_dtype(d)) for d in sorted(devices) if _casts(d)]
    return (*kind, *autocast), tuple(t.shape[1:] for t in leaves if isinstance(t, Tensor))


class Prepared:
    "A copy prepared for one kind of input. `run` computes the model's output; None: nothing could be prepared."
    def __init__(self, run, kind, shapes): self.run, self.kind, self.shapes = run, kind, {shapes}


class Copies(Work):
    "The copies that a callback prepared, and what it knows of the model."
    def __init__(self):
        self.state, self.prepared, self.refused = None, (), None
        self.checked, self.again, self.misread = False, False, []
        self.writes = self.misses = self.unused = 0


class PredictionCallback(StandInCallback):
    """Predicts with private copies of the model. The first batch runs as without the callback. If it changes nothing, a
    copy is made, prepared and compared on it. The model's structure is then compared for each batch, and its values
    for each prediction (`validate`, `get_preds`, an epoch's validation).

    A callback prepares with `prepare(copy, truth, args, kwargs)`, which returns a function or None, and makes it
    current after the values changed with `refresh(run)`, which returns False if that takes a new copy."""
    max_prepared, copies_functions = 4, True # copies; True: hooks that are functions may run in a copy
    tolerances, half_tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}, HALF_TOLERANCE

    kind_of_work = Copies

    def drop(self): self.work.state, self.work.prepared = None, ()
    def before_validate(self): self.work.checked = False
    def takes_part(self) -> bool: return not self.training
    def may_prepare(self) -> bool: return True
    def key(self, args, kwargs) -> tuple: return input_key(args, kwargs)
    def setting(self): "What a refusal depends on, besides the model's modules and modes."
    def watch(self, model): return nullcontext()
    def on_prepared(self, run, args, kwargs): "Called after a comparison."

    def run_model(self, forward, *args, **kwargs):
        if torch.is_grad_enabled() or self.model.training or has_global_hooks() or not self._is_current():
            return forward(*args, **kwargs)
        kind, shapes = self.key(args, kwargs)
        own = [p for p in self.work.prepared if p.kind == kind]
        p = next((p for p in own if shapes in p.shapes or len(p.shapes) >= MAX_SHAPES), None)
        if p is None: return self._prepare(own, kind, shapes, forward, args, kwargs)
        same = self.work.checked or self.work.state.same_values()
        if same is not True and same.device.type != 'cpu':  # reading it waits, so the batch comes first
            out = self._run(p.run, forward, args, kwargs)
            if not same: return self._refresh() and forward(*args, **kwargs)
        else:
            if not same and not self._refresh(): return self._prepare([], kind, shapes, forward, args, kwargs)
            out = self._run(p.run, forward, args, kwargs)
        self.work.checked = True
        return out

    def _run(self, run, forward, args, kwargs):
        "Output of `run`, or of `forward` if the call does not fit or fails: the error is then the model's own."
        if run is None: return forward(*args, **kwargs)
        try: out = run(*args, **kwargs)
        except NotPrepared as e: self.on_misfit(e)
        except Exception: pass
        else:
            self.work.misses = self.work.unused = 0
            return out
        return forward(*args, **kwargs)

    def on_misfit(self, e): self.refuse(str(e))

    def _is_current(self) -> bool:
        "False if this batch has to run without a copy. Refreshes or drops copies that the model no longer is like."
        if self.work.refused is not None:
            if self.work.refused == self._modes(): return False
            self.forget()
        s = self.work.state
        if s is None: return True
        if s.model is self.model and s.has_more_hooks(): return False
        if s.model is not self.model or not s.same_structure() or not self.same_program(s): self.drop()
        elif not s.same_versions() or not (self.work.checked or s.same_memory()): self._refresh()
        return True

    def same_program(self, state) -> bool: return True

    def _refresh(self) -> bool:
        "Make the copies current, or drop them: the model may be on another device."
        try:
            with torch.inference_mode(False), torch.no_grad():
                if not all([self.refresh(p.run) for p in self.work.prepared if p.run]): raise RuntimeError
                self.work.state.take_values()
                return True
        except RuntimeError: self.drop()
        return False

    def _modes(self): return [(m, m.training) for m in self.model.modules()], self.setting()

    def refuse(self, reason):
        "Predict as without the callback until the model's modules or modes change."
        self.drop()
        self.work.refused = self._modes()
        self.warn(reason)

    def warn(self, reason): warnings.warn(f'{type(self).__name__}: {type(self.model).__name__} {reason}', stacklevel=2)

    def _prepare(self, own, kind, shapes, forward, args, kwargs):
        "Output of `forward`. A copy is prepared on this input if the pass changed nothing."
        if not self.may_prepare() or (not own and len(self.work.prepared) >= self.max_prepared): return forward(*args, **kwargs)
        try: state = ModelState(self.model)
        except CantCopy as e:
            self.refuse(str(e))
            return forward(*args, **kwargs)
        if state.foreign_hooks(not self.copies_functions): return forward(*args, **kwargs)
        inputs = tensors_of((args, kwargs))
        with ExitStack() as start:
            start.enter_context(restore_random_states())
            versions, draws = versions_of(inputs), python_state()
            with self.watch(self.model): truth = forward(*args, **kwargs)
            reason = '' if state.is_unchanged() else CHANGES
            if versions != versions_of(inputs): reason = 'it changes its buffers or inputs'
            if draws != python_state() and not self.copies_functions: reason = 'it draws random numbers of Python or NumPy'
            with restore_random_states():
                start.close()  # more passes from the same random states
                if reason: self._changes(reason)
                elif not self._serves(own, kind, shapes, truth, args, kwargs):
                    self._prepare_copy(state, kind, shapes, truth, args, kwargs)
        return truth

    def _changes(self, reason):
        self.work.writes += 1
        if self.work.writes == MAX_WRITES: self.refuse(reason)

    def _serves(self, own, kind, shapes, truth, args, kwargs) -> bool:
        "True if a copy that was prepared for other shapes gives the right output for these."
        for p in own:
            try: error = self._error(p.run, truth, args, kwargs) if p.run else 1.
            except Exception: continue
            if error <= self._tolerance(kind)[0]:
                p.shapes.add(shapes)
                return True
        return False

    def _prepare_copy(self, state, kind, shapes, truth, args, kwargs):
        if len(self.work.prepared) >= self.max_prepared: return
        self.work.state = self.work.state or state
        try:
            if not numbers_of(truth): raise NotPrepared('it gives outputs without numbers, which can\'t be compared')
            with torch.inference_mode(False), torch.no_grad(), ExitStack() as undo:
                copy = ModelCopy(self.work.state)
                for o in copy.shared:
                    if hasattr(o, '__dict__'): restore_dict(undo, vars(o))
                    if isinstance(o, (dict, list, set)): restore_dict(undo, dict(own=o))
                with restore_random_states(): run = self.prepare(copy, truth, args, kwargs)
                if run: self._compare(run, copy, kind, truth, args, kwargs)
        except KeyboardInterrupt:
            if not self.work.prepared: self.drop()
            raise
        except Exception as e: return self.refuse(self.reason_of(e))
        self.work.prepared, self.work.checked, self.work.writes = (*self.work.prepared, Prepared(run, kind, shapes)), True, 0
        if run: self.on_prepared(run, args, kwargs)

    def reason_of(self, e): return str(e)

    def _error(self, run, truth, args, kwargs) -> float:
        with restore_random_states(): return relative_error(run(*args, **kwargs), truth)

    def _compare(self, run, copy, kind, truth, args, kwargs):
        "Raise `NotPrepared` if the output is not the model's, up to rounding."
        error, (tolerance, eps) = self._error(run, truth, args, kwargs), self._tolerance(kind)
        if tolerance < error <= HALF_TOLERANCE: tolerance = self._amplified(eps, truth, args, kwargs)
        if not error <= tolerance: raise NotPrepared(self.differs.format(f'{error:.0e}'))

    def _amplified(self, eps, truth, args, kwargs) -> float:
        "Error that rounding may cause in the output. 0 if the model fails on a perturbed input or its error is large."
        try:
            with restore_random_states(): args, kwargs = perturb((args, kwargs), eps)
            error = AMPLIFICATION*self._error(ModelCopy(self.work.state).model, truth, args, kwargs)
        except Exception: return 0  # a model that checks its input
        return error if error <= HALF_TOLERANCE else 0

    def _tolerance(self, kind) -> tuple: # Relative error allowed; rounding error of the least exact number
        tensors = [t for t in self.work.state.watched if t.is_floating_point()]
        dtypes = {t.dtype for t in tensors} | {o[1] for o in kind if isinstance(o, tuple) and isinstance(o[0], str)}
        precisions = {fp32_precision(d) for d in {t.device for t in tensors}}
        limits = [REDUCED_FP32[p] for p in precisions if p in REDUCED_FP32 and torch.float32 in dtypes]
        limits += [(self.tolerances.get(t, self.half_tolerance), torch.finfo(t).eps) for t in dtypes]
        return tuple(map(max, zip(*limits)))
