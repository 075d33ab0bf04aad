"`CompilePredictions`: predict with the model compiled and its weights frozen."
import sys
import time
import weakref

import torch
from fastai.callback.core import Callback
from fastai.layers import ToTensorBase
from fastai.torch_core import TensorBase
from torch import Tensor

from ..core.compiling import CHANGES, compiling_quietly, note_rewritten, own_code, print_compiled, reason_of
from ..core.nested_tensors import map_tensors, tensors_of
from ..core.pickle_as import pickle_as
from ..core.stand_in import running_fits
from .model_state import is_plain
from .prepared_model import NotPrepared, PredictionCallback, input_key

__all__ = ['CompilePredictions']

MAX_MISSES = 3  # batches in a row that the compiled code does not fit; then it is compiled again
MAX_UNUSED = 3  # compilations in a row that fitted no later batch; then the model stays uncompiled


def _identity(x): return x


def _plain(args):
    "Inputs without fastai's tensor types, and without inference tensors, which compiled code does not take."
    def _f(t): return torch.as_subclass(t, Tensor) if isinstance(t, TensorBase) else t
    return map_tensors(lambda t: _f(t.clone() if t.is_inference() else t), args)


class FrozenModel:
    "A model compiled for one kind of input, its tensors as constants. A call that the code does not fit raises `Misfit`."
    def __init__(self, model, args, kwargs, types): # `types`: those of the tensors that the model gives uncompiled
        from torch._dynamo.eval_frame import remove_from_cache  # PyTorch keeps compiled code and its constants
        from torch._inductor.codecache import PyCodeCache  # for the life of the process
        start, self.types, self.constants, self.is_compiled = time.perf_counter(), types, [], False
        if len(types) > 1: raise NotPrepared('its outputs are tensors of several types')
        constants, backend = self.constants, self._backend
        def _forward(*args, **kwargs):
            if not torch.compiler.is_compiling(): raise NotPrepared('`torch.compile` is disabled')
            return model(*args, **kwargs)
        forward = own_code(_forward)
        weakref.finalize(forward, remove_from_cache, forward.__code__)
        self.run, n = torch.compile(forward, fullgraph=True, dynamic=False, backend=backend), len(PyCodeCache.modules)
        try:
            # `options` come too late: the weights would be inputs of the compiled code
            with compiling_quietly(), torch._inductor.config.patch(freezing=True): self(*args, **kwargs)
        finally:
            for m in PyCodeCache.modules[n:]: sys.modules.pop(m.__name__, None)
            del PyCodeCache.modules[n:]
        self.is_compiled, self.seconds = True, time.perf_counter() - start

    def _backend(self, graph, inputs):
        if self.is_compiled: raise Misfit(CHANGES)
        self.constants += [getattr(graph, n.target) for n in graph.graph.nodes if n.op == 'get_attr']
        return torch._inductor.compile(graph, inputs)  # its entrance for graphs

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        args, kwargs = _plain((args, kwargs))
        try: out = self.run(*args, **kwargs)
        except Exception as e:
            if isinstance(getattr(e, 'inner_exception', e), Misfit): raise Misfit(CHANGES) from None
            raise
        return out if self.types <= {Tensor} else map_tensors(lambda t: torch.as_subclass(t, *self.types), out)


class Misfit(NotPrepared):
    "Raised where compiled code does not fit a call, such as after a change of the number of threads."


@pickle_as(Callback)
class CompilePredictions(PredictionCallback):
    """Predict with the model compiled by `torch.compile`, its weights frozen as constants of the compiled code.

    The first batch that the Learner predicts outside a fit is compiled, which takes seconds to minutes and needs a C++
    compiler (on GPUs Triton). Later batches of the same shape run compiled. Other shapes run as without this callback,
    so that none waits for a compilation: the smaller last batch, another image size. `forget()` frees the compiled
    code, and the next batch is compiled. Changes are detected as by `FoldBatchNorm`: the next prediction outside a fit
    compiles again, and a line says so. In a fit, validation runs uncompiled. A private copy of the model is compiled,
    and its first output is compared with the model's. The model itself is never changed. A model that can't be
    compiled, keeps state, or draws random numbers of Python or NumPy runs uncompiled, with a warning.

    >>> from fastai.vision.all import *; from channelslast import *
    >>> dl = DataLoader([(torch.randn(3, 32, 32), torch.tensor(0))]*8, bs=4)
    >>> learn = Learner(DataLoaders(dl, dl), nn.Sequential(Flatten(), nn.Linear(3072, 2)), CrossEntropyLossFlat(),
    ...                 cbs=CompilePredictions())
    >>> with learn.no_bar(): preds, targs = learn.get_preds() # doctest: +ELLIPSIS
    CompilePredictions: Sequential compiled in ... s, for inputs of (4, 3, 32, 32)."""
    order = PredictionCallback.order + 1  # other shapes run folded
    max_prepared, copies_functions = 1, False
    tolerances, half_tolerance = {torch.float64: 1e-3, torch.float32: 1e-3}, 1e-1
    differs = 'its outputs differ when compiled (relative difference {})'
    reason, seconds = '', None  # Why the model is not compiled; seconds that the last compilation took

    @property
    def compiled(self) -> bool:
        "True if predictions of the compiled shape would run compiled now."
        s = self.work.state
        if not self.work.prepared or s.model is not self.model or not s.same_structure() or not self.same_program(s): return False
        return s.same_versions() and s.same_memory() and bool(s.same_values())

    def trust(self):
        "Take the model's weights as those that were compiled: they were only moved."
        if self.work.prepared: self.work.state.take_values()

    def key(self, args, kwargs) -> tuple:
        (kind, _), tensors = input_key(args, kwargs), tensors_of((args, kwargs))
        return (*kind, *((t.shape, t.stride()) for t in tensors)), ()

    def may_prepare(self) -> bool: return not running_fits.get(self.learn)
    def setting(self): return getattr(getattr(self.learn, 'mixed_precision', None), 'fp32_layers', ())
    def same_program(self, state): return self.work.checked or state.same_program()
    def watch(self, model): return note_rewritten(self.work.misread)

    def prepare(self, copy, truth, args, kwargs):
        if self.work.misread: raise NotPrepared("oneDNN's kernels compute one of its convolutions wrongly")
        if self.setting(): raise NotPrepared('some of its layers are kept in fp32')
        if any('forward' in vars(m) for m in copy.modules): raise NotPrepared('the forward of a module was replaced')
        for m in copy.modules:
            if type(m) is ToTensorBase: m.forward = _identity  # the output is cast afterwards
        run = FrozenModel(copy.model, args, kwargs, {type(t) for t in tensors_of(truth)})
        known = {t.data_ptr() for t in self.work.state.watched}
        others = [t for t in run.constants if t.data_ptr() not in known]
        if not all(map(is_plain, others)): raise NotPrepared('it depends on tensors of other types')
        self.work.state.tensors += others  # compared from now on
        self.work.state.take_values()
        return run

    def refresh(self, run) -> bool: return False

    def drop(self):
        self.work.again = self.work.again or bool(self.work.prepared)
        super().drop()

    def on_misfit(self, e):
        if not isinstance(e, Misfit): return
        self.work.misses += 1
        if self.work.misses == MAX_MISSES: self.drop()

    def on_prepared(self, run, args, kwargs):
        self.reason, self.seconds = '', run.seconds
        self.work.misses, self.work.unused = 0, self.work.unused + 1
        print_compiled(self, self.model, run.seconds, args, kwargs, self.work.again)
        if self.work.unused > MAX_UNUSED: self.refuse(CHANGES)

    def reason_of(self, e): return str(e) if isinstance(e, NotPrepared) else reason_of(e)

    def warn(self, reason):
        self.reason = reason
        if not self.quiet: super().warn(f'stays uncompiled: {reason}.')
