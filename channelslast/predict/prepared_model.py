"What the callbacks for predictions share: private copies of the model, prepared and compared once, never stale."
from contextlib import ExitStack, nullcontext

import torch
from torch import Tensor

from ..core.compare import FACTOR, numbers_of, relative_error, rounding_error
from ..core.compiling import CHANGES, DRAWS
from ..core.nested_tensors import leaves_of, tensors_of
from ..core.onednn_workarounds import pause_safe_convolutions
from ..core.random_state import generators_of, restore_random_states
from ..core.stand_in import StandInCallback, Work
from ..core.undo import restore_dict
from ..core.model_copy import CantCopy, ModelCopy, ModelState, has_global_hooks, versions_of

MAX_SHAPES = 8  # input shapes to compare; if one copy is right for all of them, it serves other shapes too
MAX_WRITES = 3  # batches in a row that change the model; then it predicts as without the callback
MAX_ERROR = 0.5  # a larger relative error of the outputs is never taken for rounding


class NotPrepared(Exception):
    "Raised where a model can't be prepared, or where a prepared one does not fit the call, with the reason."


def input_key(args, kwargs) -> tuple: # Kind of the input; its shapes without the batch dimension
    "What a prepared model depends on in the input."
    leaves = leaves_of((args, kwargs))
    tensors = [o for o in leaves if isinstance(o, Tensor)]
    def _kind(x):
        if isinstance(x, Tensor): return x.dtype, x.device
        return x if isinstance(x, (bool, int, float, str)) else type(x)
    def _casts(d): return torch.amp.is_autocast_available(d) and torch.is_autocast_enabled(d)
    autocast = [(d, torch.get_autocast_dtype(d)) for d in sorted({t.device.type for t in tensors}) if _casts(d)]
    return (*map(_kind, leaves), *autocast), tuple(t.shape[1:] for t in tensors)


class PredictionCallback(StandInCallback):
    """Predicts with private copies of the model. The first batch runs as without the callback. If it changes nothing, a
    copy is made, prepared and compared on it. The model's structure is then compared for each batch, and its values
    for each prediction (`validate`, `get_preds`, an epoch's validation).

    `prepare(copy, truth, args, kwargs)` returns a function or None. `refresh(run)` makes it current after the values
    changed; False if that takes a new copy."""
    max_copies = 4
    exact = {torch.float64: 1e-10, torch.float32: 1e-5} # relative error of the outputs that needs no explanation
    rounding = 0. # least relative rounding error of an operation

    def new_work(self): # `runs`: functions by kind and shapes of the input, None where nothing can be prepared
        return Work(state=None, runs={}, refused=None, checked=False, inside=False, again=False, reasons=[], writes=0, misses=0, unused=0)

    def drop(self): self.work.state, self.work.runs = None, {}
    def before_validate(self): self.work.checked, self.work.inside = False, True
    def after_validate(self): self.work.checked, self.work.inside = False, False
    after_cancel_validate = after_validate
    def takes_part(self) -> bool: return not self.training
    def may_prepare(self) -> bool: return True
    def key(self, args, kwargs) -> tuple: return input_key(args, kwargs)
    def setting(self): "What a refusal depends on, besides the model's modules and modes."
    def watch(self): return nullcontext()
    def on_prepared(self, run, args, kwargs): "Called after a comparison."
    def on_misfit(self, e): self.refuse(str(e))
    def reason_of(self, e) -> str: return str(e)

    def run_model(self, forward, *args, **kwargs):
        work, plain = self.work, torch.is_grad_enabled() or self.model.training or has_global_hooks()
        if plain or not self._is_current(): return forward(*args, **kwargs)
        key = kind, shapes = self.key(args, kwargs)
        own = [k for k in work.runs if k[0] == kind]
        if key not in work.runs and len(own) >= MAX_SHAPES and len({work.runs[k] for k in own}) == 1: key = own[0]
        if key not in work.runs: return self._prepare(key, own, forward, args, kwargs)
        same = work.checked or work.state.same_values()
        if isinstance(same, Tensor) and not same.is_cpu:  # reading it waits, so the batch comes first
            out = self._run(work.runs[key], forward, args, kwargs)
            if not same:
                self._refresh()
                return forward(*args, **kwargs)
        else:
            if not same and not self._refresh(): return self._prepare(key, [], forward, args, kwargs)
            out = self._run(work.runs[key], forward, args, kwargs)
        work.checked = work.inside
        return out

    def _run(self, run, forward, args, kwargs):
        "Output of `run`, or of `forward` if the call does not fit or fails: the error is then the model's own."
        try:
            out = run(*args, **kwargs) if run else forward(*args, **kwargs)
            self.work.misses = self.work.unused = self.work.writes = 0
            return out
        except Exception as e:
            if run is None: raise
            if isinstance(e, NotPrepared): self.on_misfit(e)
        return forward(*args, **kwargs)

    @pause_safe_convolutions()
    def _is_current(self) -> bool:
        "False if this batch has to run without a copy. Refreshes or drops copies that the model is no longer like."
        if self.work.refused is not None:
            if self.work.refused == self._modes(): return False
            self.forget()
        state = self.work.state
        if state is None: return True
        if state.model is not self.model: self.drop()
        elif not state.same_structure():
            if state.has_more_hooks(): return False
            self.drop()
            self._changes(CHANGES)
            return self.work.refused is None
        elif not self.work.checked and not state.same_program(): self.drop()
        elif not state.same_memory(): self._refresh()
        return True

    def _refresh(self) -> bool:
        "Make the copies current, or drop them: the model may be on another device."
        try:
            with torch.inference_mode(False), torch.no_grad():
                done = all([self.refresh(run) for run in {*self.work.runs.values()} if run])
                if done: self.work.state.take_values()
        except RuntimeError: done = False
        if not done: self.drop()
        return done

    def _modes(self): # Without numbers, which the model may count in
        own = [(m, type(m), vars(m)) for m in self.model.modules()]
        switches = [v for *_, d in own for v in d.values() if isinstance(v, (bool, str, type(None)))]
        return [(m, cls, d.get('forward')) for m, cls, d in own], switches, self.setting()

    def refuse(self, reason):
        "Predict as without the callback until the model's modules or modes change."
        self.drop()
        self.work.refused = self._modes()
        self.warn(reason)

    def _prepare(self, key, own, forward, args, kwargs):
        "Output of `forward`. If that pass changes nothing, a copy is prepared on this input."
        if not self.may_prepare() or not own and len({*self.work.runs.values()}) >= self.max_copies:
            return forward(*args, **kwargs)
        try: state = ModelState(self.model)
        except CantCopy as e:
            self.refuse(str(e))
            return forward(*args, **kwargs)
        if state.foreign_hooks(): return forward(*args, **kwargs)
        inputs = tensors_of((args, kwargs))
        with ExitStack() as start:
            start.enter_context(restore_random_states())
            versions, self.work.reasons = versions_of(inputs), []
            with self.watch(): truth = forward(*args, **kwargs)
            reason = '' if state.is_unchanged() else CHANGES
            if versions != versions_of(inputs): reason = 'it changes its buffers or inputs'
            if DRAWS in self.work.reasons: reason = DRAWS
            with restore_random_states():
                start.close()  # more passes from the same random states
                if reason: self._changes(reason)
                else: self._prepare_copy(state, key, own, truth, args, kwargs)
        return truth

    def _changes(self, reason):
        self.work.writes += 1
        if self.work.writes == MAX_WRITES: self.refuse(reason)

    def _prepare_copy(self, state, key, own, truth, args, kwargs):
        work = self.work
        for run in {work.runs[k] for k in own} - {None}:  # prepared for other shapes
            try: error = self._compare(run, key[0], truth, args, kwargs)
            except Exception: continue
            if not error: return work.runs.update({key: run})
        if len({*work.runs.values()}) >= self.max_copies: return
        work.state, new = work.state or state, work.state is None
        try:
            with torch.inference_mode(False), torch.no_grad(), ExitStack() as undo:
                if not numbers_of(truth): raise NotPrepared("it gives outputs without numbers, which can't be compared")
                copy = ModelCopy(work.state)
                for o in copy.shared: restore_dict(undo, vars(o) if hasattr(o, '__dict__') else dict(own=o))
                for restore, old in generators_of(work.state.owned.values()): undo.callback(restore, old)
                with restore_random_states(): run = self.prepare(copy, truth, args, kwargs)
                error = run and self._compare(run, key[0], truth, args, kwargs)
                if error: raise NotPrepared(self.differs.format(f'{error:.0e}'))
        except BaseException as e:
            if new: self.drop()
            if not isinstance(e, Exception): raise
            return self.refuse(self.reason_of(e))
        work.runs[key], work.checked = run, work.inside
        if run: self.on_prepared(run, args, kwargs)

    def _compare(self, run, kind, truth, args, kwargs) -> float: # The error, if it is more than rounding explains, or 0
        from ..core.rounding import Rounding  # needs a private module of PyTorch
        error, (allowed, eps) = _error(run, truth, args, kwargs), _tolerance(self.work.state, kind, self.exact)
        if allowed < error <= MAX_ERROR:
            try:
                with Rounding(max(eps, self.rounding)):
                    allowed = max(allowed, FACTOR*_error(ModelCopy(self.work.state).model, truth, args, kwargs))
            except Exception: pass  # a model that checks its input, or can't run in a dispatch mode
        return 0. if error <= min(allowed, MAX_ERROR) else error


def _error(run, truth, args, kwargs) -> float:
    with restore_random_states(): return relative_error(run(*args, **kwargs), truth)


def _tolerance(state, kind, exact) -> tuple: # Relative error that needs no explanation; the rounding error of one number
    weights = [t for t in state.watched if t.is_floating_point()]
    dtypes = {t.dtype for t in weights} | {o[1] for o in kind if isinstance(o, tuple) and isinstance(o[0], str)}
    return rounding_error(dtypes, {t.device for t in weights}, exact)
