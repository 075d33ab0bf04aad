"`CompilePredictions`: predict with the model compiled and its weights frozen."
from contextlib import ExitStack

import torch
from fastai.callback.core import Callback

from ..core.autocast import HALF_DTYPES
from ..core.compare import numbers_of, relative_error
from ..core.devices import fp32_precision
from ..core.nested_tensors import tensors_of
from ..core.pickle_as import pickle_as
from ..core.random_state import restore_random_states
from ..core.undo import restore_dict
from ..fold.fold_trace import memory_ref
from ..fold.plan_conditions import structure_key
from .compiled_forward import (DEPENDS, MISREAD, CompileCallback, CompiledForward, NotCompiled, check_compilable,
                               kind_of, note_misread, reason_of, running_fits)

__all__ = ['CompilePredictions']

TOLERANCE = dict(fp32=1e-3, fp16=2e-2, bf16=1e-1)  # relative difference of the outputs that rounding explains
MAX_MISSES = 3  # batches of the compiled shape in a row that the compiled code does not fit; then it is compiled again
MAX_UNUSED = 3  # compilations in a row that fitted no later batch; then the model stays uncompiled


def _attributes(modules) -> list:
    "Tensors in plain attributes of modules, nested ones too."
    own = '_parameters', '_buffers', '_modules'
    return tensors_of([[v for k, v in vars(m).items() if k not in own] for m in modules])


class FrozenForward(CompiledForward):
    "A compiled forward whose constants are the model's weights as they were."
    def __init__(self, model, args, kwargs, reference, attributes): # `attributes`: tensors in plain attributes
        self.model, self.structure, self.attributes = model, structure_key(model), attributes
        super().__init__(model, args, kwargs, {type(t) for t in tensors_of(reference)}, freeze=True)
        self.output = None
        self.trust()

    def _tensors(self) -> list: # faster than `model.parameters()`, for single images
        own = [t for m in self.structure[0] for d in (m._parameters, m._buffers) for t in d.values() if t is not None]
        return own + self.attributes

    def _state(self) -> list:
        "Changes with version counters and `t.data = …`, not with `t.data.add_()`."
        def _memory(t):
            if t.layout is not torch.strided or t.is_nested: return ()
            return t.untyped_storage()._cdata, t.storage_offset(), t.stride()
        return [(id(t), t._version, *_memory(t)) for t in self._tensors()]

    def trust(self):
        "Take the model's weights as those that were compiled."
        self.tensors = self._tensors()
        self.refs = [memory_ref(t) for t in self.tensors]  # new tensors and memory can't reuse their addresses
        self.state = self._state()

    def is_current(self) -> bool:
        try: return self.structure == structure_key(self.model) and self.state == self._state()
        except RuntimeError: return False  # inference tensors, whose changes are not counted

    def __call__(self, *args, **kwargs):
        with torch.inference_mode(False), torch.no_grad(): return super().__call__(*args, **kwargs)


@pickle_as(Callback)
class CompilePredictions(CompileCallback):
    """Predict with the model compiled by `torch.compile`, its weights frozen as constants of the compiled code.

    The first batch that the Learner predicts outside a fit is compiled, which takes seconds to minutes and needs a C++
    compiler (on GPUs Triton). Later batches of the same shape run compiled. Other shapes run as without this callback,
    so that none waits for a compilation: the smaller last batch, another image size. `forget()` frees the compiled
    code, and the next batch is compiled. Changed weights and switches are detected, as `FoldBatchNorm` does: the next
    prediction outside a fit compiles again, and a line says so. In a fit, validation runs uncompiled. The first outputs
    are compared with those of the model as it is, which takes three passes (users' hooks run in them, too). A model
    that can't be compiled runs uncompiled, with a warning. The model is never changed.

    After changes that PyTorch does not count, such as `p.data.mul_(2)` outside a fit, call
    `learn.compile_predictions.forget()`.

    >>> from fastai.vision.all import *; from channelslast import *
    >>> dl = DataLoader([(torch.randn(3, 32, 32), torch.tensor(0))]*8, bs=4)
    >>> learn = Learner(DataLoaders(dl, dl), nn.Sequential(Flatten(), nn.Linear(3072, 2)), CrossEntropyLossFlat(),
    ...                 cbs=CompilePredictions())
    >>> with learn.no_bar(): preds, targs = learn.get_preds() # doctest: +ELLIPSIS
    CompilePredictions: Sequential compiled in ... s, for inputs of (4, 3, 32, 32)."""
    _compiled, _failed, _again, _misses, _unused = None, None, False, 0, 0

    @property
    def compiled(self):
        "True if predictions of the compiled shape would run compiled now."
        c = self._compiled
        return c is not None and c.model is self.model and c.is_current()

    def forget(self, keep_reason=False):
        "Free the compiled code and its weights. The next prediction compiles again."
        self._compiled = None
        if not keep_reason: self._failed, self._misses, self._unused, self.reason = None, 0, 0, ''

    def trust(self):
        "Take the model's weights as those that were compiled: they were only moved."
        if self._compiled: self._compiled.trust()

    def takes_part(self):
        # fastai's optimizers step through `p.data`, which PyTorch doesn't count
        if self.training and self._compiled: self._drop()
        return not self.training

    def _drop(self): self._compiled, self._again, self._misses = None, True, 0

    def run_model(self, forward, *args, **kwargs):
        model, compiled = self.model, self._compiled
        if torch.is_grad_enabled() or model.training: return forward(*args, **kwargs)
        if compiled and compiled.model is model and compiled.is_current():
            (kind, shapes), (own_kind, own_shapes) = kind_of(args, kwargs), compiled.kind
            if shapes != own_shapes: return forward(*args, **kwargs)
            try:
                if kind != own_kind: raise NotCompiled
                out = compiled(*args, **kwargs)
                self._misses = self._unused = 0
                return out
            except NotCompiled: self._misses += 1  # such as another number of threads, or an empty cache of the model
            if self._misses < MAX_MISSES: return forward(*args, **kwargs)
        if compiled: self._drop()
        if running_fits.get(self.learn) or self._is_failed(): return forward(*args, **kwargs)
        return self._compile(forward, args, kwargs)

    def _setting(self): return structure_key(self.model), self.fp32_layers

    def _is_failed(self) -> bool:
        if self._unused >= MAX_UNUSED and self._failed is None: self._give_up(DEPENDS)
        if self._failed is not None and self._failed != self._setting(): self.forget()
        return self._failed is not None

    def _give_up(self, reason):
        self._compiled, self._failed = None, self._setting()
        self.warn(reason)

    def _compile(self, forward, args, kwargs):
        "The output of `forward`, after the model was compiled and compared on the same input."
        model, modules, inputs = self.model, list(self.model.modules()), tensors_of((args, kwargs))
        watched = [t for t in (*model.parameters(), *model.buffers(), *inputs) if not t.is_inference()]
        def _versions(): return [t._version for t in watched]
        with ExitStack() as random, ExitStack() as undo:
            random.enter_context(restore_random_states())
            versions, attributes, misread = _versions(), _attributes(modules), []
            with note_misread(model, misread): reference = forward(*args, **kwargs)
            with restore_random_states():
                random.close()  # a second pass from the same random states
                for m in modules: restore_dict(undo, vars(m))
                try:
                    check_compilable(model, modules, self.fp32_layers)
                    if any(t.is_inference() for t in (*model.parameters(), *model.buffers())):
                        raise NotCompiled('its weights are inference tensors, whose changes are not counted')
                    if versions != _versions(): raise NotCompiled('it changes its buffers or inputs')
                    if any(misread): raise NotCompiled(MISREAD)
                    with torch.inference_mode(False), torch.no_grad():
                        # Tensors in plain attributes are constants of the compiled code, too. Those that the pass
                        # assigned are its results, such as the features that fastai's U-Net stores in hooks.
                        kept = {id(t) for t in _attributes(modules)}
                        attributes = [t for t in attributes if id(t) in kept]
                        compiled = FrozenForward(model, args, kwargs, reference, attributes)
                    self._compare(compiled(*args, **kwargs), reference)
                except Exception as e:
                    self._give_up(reason_of(e))
                    return reference
        self._compiled, self._unused = compiled, self._unused + 1
        self.compiled_in(compiled.seconds, args, kwargs, self._again)
        return reference

    def _compare(self, output, reference):
        if not numbers_of(reference): raise NotCompiled('its outputs have no numbers to compare')
        error, tensors = relative_error(output, reference), tensors_of(reference)
        half = any(t.dtype in HALF_DTYPES or torch.is_autocast_enabled(t.device.type) for t in tensors)
        precisions = [fp32_precision(t.device) for t in tensors]  # fp16's rounding errors where TF32 is computed
        if not error <= (TOLERANCE['bf16'] if half else max(map(TOLERANCE.get, precisions), default=TOLERANCE['fp32'])):
            raise NotCompiled(f'its outputs differ when compiled (relative difference {error:.0e})')
