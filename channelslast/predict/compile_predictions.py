"`CompilePredictions`: predict with the model compiled and its weights frozen."
import math
import sys
import threading
import time
import weakref

import torch
from fastai.callback.core import Callback
from fastai.layers import ToTensorBase
from fastai.torch_core import TensorBase
from fastcore.basics import noop
from torch import Tensor

from ..core.compiling import CHANGES, compiling_quietly, note_reasons, own_code, print_compiled, reason_of
from ..core.nested_tensors import map_tensors, tensors_of
from ..core.pickle_as import pickle_as
from ..core.stand_in import running_fits
from ..core.model_copy import is_plain
from .prepared_model import NotPrepared, PredictionCallback, input_key
from .runtimes import BACKENDS, Runtime, check_backend

__all__ = ['CompilePredictions']

MAX_MISSES = 3  # batches in a row that the compiled code does not fit; then it is compiled again
MAX_UNUSED = 3  # compilations in a row that fitted no later batch; then the model stays uncompiled


def _plain(args, contiguous):
    "Inputs without fastai's tensor types, and without inference tensors, which compiled code does not take."
    def _f(t): return torch.as_subclass(t, Tensor) if isinstance(t, TensorBase) else t
    def _plain(t):
        t = _f(t.clone() if t.is_inference() else t)
        return t.detach().contiguous() if contiguous else t
    return map_tensors(_plain, args)


_compiling = threading.local()  # `.constants`: tensors that the code which this thread compiles holds; `.backend`


def _backend(graph, inputs): # PyTorch keeps each backend for the life of the process
    constants = vars(_compiling).get('constants')
    if constants is None: raise NotPrepared(CHANGES)  # a later call that the code does not fit
    constants += [getattr(graph, n.target) for n in graph.graph.nodes if n.op == 'get_attr']
    if _compiling.backend != 'inductor': return Runtime(_compiling.backend, graph, inputs)
    return torch._inductor.compile(graph, inputs)  # its entrance for graphs


class FrozenModel:
    """A model compiled for one kind of input, by a runtime for all sizes that PyTorch's guards admit. `constants` gets the
    tensors that the compiled code holds. `types` are those of the tensors that the model gives uncompiled."""
    def __init__(self, model, args, kwargs, types, constants, backend):
        from torch._dynamo import config  # has no public name
        from torch._dynamo.eval_frame import remove_from_cache  # PyTorch keeps compiled code and its constants
        from torch._inductor.codecache import PyCodeCache  # for the life of the process
        if len(types) > 1: raise NotPrepared('its outputs are tensors of several types')
        self.start, self.types, self.converted = time.perf_counter(), types, backend != 'inductor'
        def _forward(*args, **kwargs):
            if not torch.compiler.is_compiling(): raise NotPrepared('`torch.compile` is disabled')
            return model(*args, **kwargs)
        forward, n = own_code(_forward), len(PyCodeCache.modules)
        weakref.finalize(forward, remove_from_cache, forward.__code__)
        self.run, self.sizes = torch.compile(forward, fullgraph=True, dynamic=False, backend=_backend), set()
        try:
            _compiling.constants, _compiling.backend = constants, backend
            # `options` come too late: the weights would be inputs of the compiled code
            with compiling_quietly(), torch._inductor.config.patch(freezing=True), config.patch(allow_rnn=self.converted):
                self(*args, **kwargs)
        finally:
            _compiling.constants = None
            for m in PyCodeCache.modules[n:]: sys.modules.pop(m.__name__, None)
            del PyCodeCache.modules[n:]

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        args, kwargs = _plain((args, kwargs), self.converted)
        if self.converted and vars(_compiling).get('constants') is not None:  # TODO
            for t in tensors_of((args, kwargs)):
                torch._dynamo.maybe_mark_dynamic(t, [d for d, n in enumerate(t.shape) if n > 1])
        try: out = self.run(*args, **kwargs)
        except Exception as e: raise getattr(e, 'inner_exception', e) from None
        return out if self.types <= {Tensor} else map_tensors(lambda t: torch.as_subclass(t, *self.types), out)


@pickle_as(Callback)
class CompilePredictions(PredictionCallback):
    """Predict with the model compiled by `torch.compile`, its weights frozen as constants of the compiled code.

    The first batch that the Learner predicts outside a fit is compiled, which takes seconds to minutes and needs a C++
    compiler (on GPUs Triton). Later batches of the same shape run compiled, others as without this callback, so that
    none waits for a compilation. `forget()` frees the code. Changes are detected as by `FoldBatchNorm`: the next
    prediction outside a fit compiles again, and a line says so; in a fit, validation runs uncompiled. A private copy is
    compiled, and its first output compared with the model's. A model that can't be compiled, keeps state, or draws
    random numbers of Python or NumPy runs uncompiled, with a warning.

    >>> from fastai.vision.all import *; from channelslast import *
    >>> dl = DataLoader([(torch.randn(3, 32, 32), torch.tensor(0))]*8, bs=4)
    >>> learn = Learner(DataLoaders(dl, dl), nn.Sequential(Flatten(), nn.Linear(3072, 2)), CrossEntropyLossFlat(),
    ...                 cbs=CompilePredictions())
    >>> with learn.no_bar(): preds, targs = learn.get_preds() # doctest: +ELLIPSIS
    CompilePredictions: Sequential compiled in ... s, for inputs of (4, 3, 32, 32)."""
    order = math.inf  # after `FoldBatchNorm`, which runs other shapes
    exact = {torch.float64: 1e-3, torch.float32: 1e-3}
    differs = 'its outputs differ when compiled (relative difference {})'
    reason, seconds = '', None  # Why the model is not compiled; seconds that the last compilation took
    backend = 'inductor'  # of copies and of callbacks made without `__init__`

    def __init__(self, backend: str = 'inductor'): # `'inductor'`, `'openvino'` or `'onnxruntime'`
        check_backend(backend)
        self.backend = backend

    @property
    def max_copies(self) -> int: return 1 if self.backend == 'inductor' else 4

    @property
    def compiled(self) -> bool:
        "True if predictions of the compiled shape would run compiled now."
        s = self.work.state
        return bool(s and s.model is self.model and s.same_structure() and s.same_program() and s.same_versions()
                    and s.same_memory() and s.same_values())

    def trust(self):
        if self.work.state: self.work.state.take_values()

    def key(self, args, kwargs) -> tuple:
        tensors, (kind, _) = tensors_of((args, kwargs)), input_key(args, kwargs)
        if self.backend == 'inductor': return (*kind, *((t.shape, t.stride()) for t in tensors)), ()
        alike = ((tuple(min(n, 2) for n in t.shape), t.dim_order(ambiguity_check=False)) for t in tensors)  # PyTorch's guards tell 0 and 1 apart
        return (*kind, torch.get_num_threads(), *alike), tuple(t.shape for t in tensors)

    def may_prepare(self) -> bool: return not running_fits.get(self.learn)
    def setting(self): return getattr(getattr(self.learn, 'mixed_precision', None), 'fp32_layers', ())
    def watch(self): return note_reasons(self, self.model, self.work.reasons)

    def prepare(self, copy, truth, args, kwargs):
        state = self.work.state
        if self.work.reasons: raise NotPrepared(self.work.reasons[0])
        for m in copy.model.modules():
            if type(m) is ToTensorBase: m.forward = noop  # the output is cast afterwards
        run = FrozenModel(copy.model, args, kwargs, {type(t) for t in tensors_of(truth)}, constants := [], self.backend)
        if not (state.same_memory() and state.same_values()): self.work.runs.clear()  # code with other values
        others = {id(t): t for t in constants if t.data_ptr() not in {t.data_ptr() for t in state.watched}}
        if not all(map(is_plain, others.values())): raise NotPrepared('it depends on tensors of other types')
        state.tensors += others.values()  # compared from now on
        state.take_values()
        return run

    def refresh(self, run) -> bool: return False

    def drop(self):
        self.work.again = self.work.again or bool(self.work.runs)
        super().drop()

    def on_misfit(self, e):
        self.work.misses += 1
        if self.work.misses == MAX_MISSES: self.drop()

    def on_prepared(self, run, args, kwargs):
        self.work.misses, self.work.unused = 0, self.work.unused + 1
        print_compiled(self, self.model, run.start, args, kwargs, self.work.again)
        if self.work.unused > MAX_UNUSED: self.refuse(CHANGES)

    def reason_of(self, e): return str(e) if isinstance(e, NotPrepared) else reason_of(e)

    def warn(self, reason):
        self.reason = reason
        super().warn(f'stays uncompiled: {reason}')
