"`CompileTraining`: train with the model compiled."
from contextlib import ExitStack

import torch
from fastai.callback.core import Callback

from ..core.devices import free_memory
from ..core.nested_tensors import tensors_of
from ..core.onednn_workarounds import hits_onednn_6035
from ..core.pickle_as import pickle_as
from ..core.undo import restore_dict
from ..fold.plan_conditions import structure_key
from .compiled_forward import (MISREAD, CompileCallback, CompiledForward, NotCompiled, check_compilable,
                               functorch_config, kind_of, note_misread, reason_of)

__all__ = ['CompileTraining']

MAX_CODES = 4  # settings to compile for: frozen layers, precision, format, modes
MAX_MISSES = 3  # batches in a row that the compiled code does not fit; then that setting stays uncompiled


class Code:
    "Compiled code for one setting of the model. Copies and pickles are None."
    def __init__(self, setting):
        self.setting, self.types, self.run, self.misses, self.misread = setting, None, None, 0, []
    def __reduce__(self): return type(None), ()
    def __deepcopy__(self, memo): return None


@pickle_as(Callback)
class CompileTraining(CompileCallback):
    """Train with the model compiled by `torch.compile`. Validation and predictions stay as they are.

    The second batch of a fit is compiled, which takes seconds to minutes and needs a C++ compiler (on GPUs Triton).
    Later batches of the same shape run compiled. Other shapes run as without this callback, so that none waits for a
    compilation: the smaller last batch, another image size. `forget()` frees the compiled code. Freezing or unfreezing
    layers, another precision or format compiles once more, for up to four settings. A model that can't be compiled
    runs uncompiled, with a warning. Dropout draws other random numbers when compiled. The model keeps its class, names
    and weights, so checkpoints and exports are as without it.

    >>> from fastai.vision.all import *; from channelslast import *
    >>> dl = DataLoader([(torch.randn(3, 32, 32), torch.tensor(0))]*8, bs=4)
    >>> learn = Learner(DataLoaders(dl, dl), nn.Sequential(Flatten(), nn.Linear(3072, 2)), CrossEntropyLossFlat(),
    ...                 cbs=CompileTraining())
    >>> with learn.no_bar(), learn.no_logging(): learn.fit(1) # doctest: +ELLIPSIS
    CompileTraining: Sequential compiled in ... s, for inputs of (4, 3, 32, 32)."""
    _model, _shapes, _codes, _config = None, None, (), ExitStack()

    def forget(self, keep_reason=False):
        "Free the compiled code. The next training batches compile again."
        self._model, self._shapes, self._codes = None, None, ()
        if not keep_reason: self.reason = ''

    @property
    def compiled(self):
        "Number of settings that are compiled."
        return len([o for o in self._codes if o and o.run])

    @property
    def fits(self):
        "True if the compiled code of each setting fitted the last batch."
        return not any(o.misses for o in self._codes if o)

    def takes_part(self):
        if self.training:  # by default, compiled code does not allow a second backward pass through the same graph
            self._config = ExitStack()
            self._config.enter_context(functorch_config.patch(donated_buffer=False))
        return self.training

    def leave(self):
        "Restore the model's own forward, after the backward pass."
        super().leave()
        self._config.close()

    def run_model(self, forward, *args, **kwargs):
        model = self.model
        if not torch.is_grad_enabled(): return forward(*args, **kwargs)
        if model is not self._model: self.forget()
        kind, shapes = kind_of(args, kwargs)
        if self._shapes not in (None, shapes): return forward(*args, **kwargs)
        self._model, self._shapes = model, shapes
        setting = structure_key(model), kind, [(p.requires_grad, p.stride()) for p in model.parameters()]
        code = next((o for o in self._codes if o and o.setting == setting), None)
        if code is None and len(self._codes) < MAX_CODES:
            code = Code(setting)
            self._codes = *filter(None, self._codes), code
        if code is None or code.misses >= MAX_MISSES: return forward(*args, **kwargs)
        if code.run is None: return self._compile(code, forward, args, kwargs)
        try:
            out = code.run(*args, **kwargs)
            code.misses = 0
            return out
        except NotCompiled as e:
            code.misses += 1
            if code.misses == MAX_MISSES: self._give_up(code, e)
            return forward(*args, **kwargs)

    def _give_up(self, code, e):
        code.misses, code.run = MAX_MISSES, None
        self.warn(reason_of(e))

    def _compile(self, code, forward, args, kwargs):
        "Run the first batch of a setting uncompiled, and compile for the second one. Returns the output."
        if code.types is None:
            with note_misread(self.model, code.misread): out = forward(*args, **kwargs)
            code.types = {type(t) for t in tensors_of(out)}
            return out
        model, modules, run = self.model, [*self.model.modules()], None
        with ExitStack() as undo:
            for m in modules: restore_dict(undo, vars(m))
            try:
                check_compilable(model, modules, self.fp32_layers)
                if any(code.misread) or any(hits_onednn_6035(m) and m.weight.is_cpu for m in modules):
                    raise NotCompiled(MISREAD)
                run = CompiledForward(model, args, kwargs, code.types, freeze=False)
                undo.pop_all()  # this was the batch's forward pass
            except Exception as e:
                undo.close()
                self._give_up(code, e)
        if run is None:  # no longer in the handler, whose traceback holds the failed pass
            free_memory(next(model.parameters()).device)
            return forward(*args, **kwargs)
        code.run, out, run.output = run, run.output, None
        self.compiled_in(run.seconds, args, kwargs, again=self.compiled > 1)
        return out
