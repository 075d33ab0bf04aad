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
from torch import Tensor, nn

from ..core.compare import SUM_ERROR
from ..core.compiling import CHANGES, compiling_quietly, note_reasons, own_code, print_compiled, reason_of
from ..core.devices import fit_device, model_device
from ..core.nested_tensors import map_tensors, tensors_of
from ..core.onednn_workarounds import pause_safe_convolutions
from ..core.pickle_as import pickle_as
from ..core.stand_in import running_fits
from ..core.model_copy import is_plain
from .prepared_model import NotPrepared, PredictionCallback, input_key
from .runtimes import BACKENDS, Runtime, check_backend

MAX_MISSES = 3  # batches in a row that the compiled code does not fit; then it is compiled again
MAX_UNUSED = 3  # compilations in a row that fitted no later batch; then the model stays uncompiled


def _plain(args):
    "Inputs without fastai's tensor types, and without inference tensors, which compiled code does not take."
    def _f(t): return torch.as_subclass(t, Tensor) if isinstance(t, TensorBase) else t
    return map_tensors(lambda t: _f(t.clone() if t.is_inference() else t), args)


_compiling = threading.local()  # `.run`: the `FrozenModel` that this thread compiles


def _keep_factors_apart(graph):
    """Put an operation without effect after each transposed convolution with as many input as output channels: PyTorch folds
    a factor per channel, as of a batch norm, into the wrong dimension of its weight (`binary_folding.py`, in 2.15, too)."""
    for n in [*graph.graph.nodes]:
        if not getattr(n.target, '__name__', '').startswith('conv_transpose'): continue
        weight = dict(zip(('input', 'weight'), n.args), **n.kwargs)['weight'].meta['example_value']
        if n.meta['example_value'].shape[1 - weight.dim()] != len(weight): continue
        with graph.graph.inserting_after(n): same = graph.graph.call_function(torch.clamp_min, (n, -math.inf))
        n.replace_all_uses_with(same, delete_user_cb=lambda user: user is not same)
    graph.recompile()


def _backend(graph, inputs): # PyTorch keeps each backend for the life of the process
    run = vars(_compiling).get('run')
    if run is None: raise NotPrepared(CHANGES)  # a later call that the code does not fit
    graphs = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]  # checkpointed layers are graphs in a graph
    constants = [getattr(m, n.target) for m in graphs for n in m.graph.nodes if n.op == 'get_attr']
    run.constants += [o for o in constants if isinstance(o, Tensor)]
    if not run.converted:
        for m in graphs: _keep_factors_apart(m)
        return torch._inductor.compile(graph, inputs)  # its entrance for graphs
    code = Runtime(run.backend, graph, inputs)
    run.any_size = code.any_size
    return code


class FrozenModel:
    """A model compiled for one kind of input, by a runtime for all sizes that PyTorch's guards admit. `.constants` are
    the tensors that the compiled code holds."""
    @pause_safe_convolutions()  # models with convolutions that the mode computes in another way stay uncompiled
    def __init__(self, model, args, kwargs, types, backend): # `types` of the tensors that the model gives uncompiled
        from torch._dynamo import config  # no public name has its limit, or the switch for recurrent layers
        from torch._dynamo.eval_frame import remove_from_cache  # PyTorch keeps compiled code and its constants
        from torch._inductor.codecache import PyCodeCache  # for the life of the process
        if len(types) > 1: raise NotPrepared('its outputs are tensors of several types')
        self.start, self.types, self.backend, self.constants, self.any_size = time.perf_counter(), types, backend, [], False
        def _forward(*args, **kwargs):
            if not torch.compiler.is_compiling(): raise NotPrepared('`torch.compile` is disabled')
            return model(*args, **kwargs)
        forward, n = own_code(_forward), len(PyCodeCache.modules)
        weakref.finalize(forward, remove_from_cache, forward.__code__)
        # the attributes of PyTorch's own modules need no guards: `ModelState` compares them
        options = dict(guard_filter_fn=torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe)
        self.run, self.config, self.sizes = torch.compile(forward, fullgraph=True, dynamic=False, backend=_backend, options=options), config, {()}
        inputs = self._inputs(args, kwargs)
        if self.converted:
            for t in tensors_of(inputs): torch._dynamo.maybe_mark_dynamic(t, [d for d, n in enumerate(t.shape) if n > 1])
        try:
            _compiling.run = self
            # `options` come too late: the weights would be inputs of the compiled code
            with compiling_quietly(), torch._inductor.config.patch(freezing=True), config.patch(allow_rnn=self.converted):
                self._call(*inputs)
        finally:
            _compiling.run = None
            for m in PyCodeCache.modules[n:]: sys.modules.pop(m.__name__, None)
            del PyCodeCache.modules[n:]

    @property
    def converted(self) -> bool: return self.backend != 'inductor'

    def _inputs(self, args, kwargs):
        args = _plain((args, kwargs))
        return map_tensors(lambda t: t.detach().contiguous(), args) if self.converted else args

    def _call(self, args, kwargs):
        try: out = self.run(*args, **kwargs)
        except Exception as e: raise getattr(e, 'inner_exception', e) from None
        return out if self.types <= {Tensor} else map_tensors(lambda t: torch.as_subclass(t, *self.types), out)

    @pause_safe_convolutions()
    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        inputs = self._inputs(args, kwargs)
        sizes = tuple(t.shape for t in tensors_of(inputs)) if self.converted else ()
        if sizes in self.sizes: return self._call(*inputs)
        with compiling_quietly(), self.config.patch(recompile_limit=1): out = self._call(*inputs)  # or an error, in no time
        self.sizes.add(sizes)
        return out


@pickle_as(Callback)
class CompilePredictions(PredictionCallback):
    """Predict with the model compiled, its weights frozen as constants of the compiled code.

    `backend='inductor'`, PyTorch's own, compiles in seconds to minutes and needs a C++ compiler (on GPUs Triton).
    `'openvino'` and `'onnxruntime'` convert in seconds, need no compiler, are often faster on a CPU, and run on CPUs
    only: `pip install openvino`, or `pip install onnx onnxruntime`. Under mixed precision OpenVINO computes in its dtype
    where the CPU has it, otherwise in fp32; ONNX Runtime computes in fp32. Outputs keep their dtypes.

    The first batch that the Learner predicts outside a fit is compiled. Later batches of the same shape run compiled,
    others as without this callback, so that none waits for a compilation. What a runtime has converted serves other
    sizes, each of the first eight after one comparison with the model's output. A batch of one, a batch in another memory
    format, and sizes for which the model runs other operations, are converted apart, up to four times in all. `forget()`
    frees the code. Changes are detected as by `FoldBatchNorm`: the next prediction outside a fit compiles again, and a
    line says so; in a fit, validation runs uncompiled. A private copy is compiled, and its first output compared with the
    model's.

    A model that can't be compiled, keeps state, or draws random numbers of Python or NumPy runs uncompiled, with a warning.
    With a runtime, so does a model that draws random numbers of PyTorch, takes numbers out of tensors, asserts something
    about its input, rounds quotients down, checkpoints layers, takes elements by several indices that may be negative, or
    computes with whole numbers, unless these are indices, counts and small sums or products of them. A batch for which a
    runtime gives infinity or NaN, though not for the first one, runs uncompiled, too. Runtimes may raise no error for a wrong
    index that the model computes. Their results may differ from PyTorch's where the input or an intermediate result is
    infinite or NaN.

    >>> from fastai.vision.all import *; from channelslast import *
    >>> dl = DataLoader([(torch.randn(3, 32, 32), torch.tensor(0))]*8, bs=4)
    >>> learn = Learner(DataLoaders(dl, dl), nn.Sequential(Flatten(), nn.Linear(3072, 2)), CrossEntropyLossFlat(),
    ...                 cbs=CompilePredictions())
    >>> with learn.no_bar(): preds, targs = learn.get_preds() # doctest: +ELLIPSIS
    CompilePredictions: Sequential compiled in ... s, for inputs of (4, 3, 32, 32)."""
    order = math.inf  # after `FoldBatchNorm`, which runs other shapes
    exact = {torch.float64: 1e-6, torch.float32: 1e-4}
    differs = 'its outputs differ when compiled (relative difference {})'
    reason, seconds = '', None  # Why the model is not compiled; seconds that the last compilation took
    backend = 'inductor'  # of subclasses that don't call `__init__`

    def __init__(self, backend: str = 'inductor'): # `'inductor'`, `'openvino'` or `'onnxruntime'`
        check_backend(backend)
        self.backend = backend

    def __setattr__(self, name, value):
        if name == 'learn' and value is not None and self.backend != 'inductor' and fit_device(value).type != 'cpu':
            raise ValueError(f'{BACKENDS[self.backend].name} computes on the CPU only, and this Learner is on {fit_device(value)}')
        super().__setattr__(name, value)

    @property
    def rounding(self) -> float: return 0. if self.backend == 'inductor' else SUM_ERROR # runtimes sum in another order
    @property
    def max_copies(self) -> int: return 1 if self.backend == 'inductor' else 4  # batches of one, other branches on sizes

    @property
    def compiled(self) -> bool:
        "True if predictions of the compiled shape would run compiled now."
        s = self.work.state
        return bool(s and s.model is self.model and s.same_structure() and s.same_program() and s.same_memory()
                    and s.same_values())

    def trust(self):
        if self.work.state: self.work.state.take_values()

    def key(self, args, kwargs) -> tuple:
        tensors, (kind, _) = tensors_of((args, kwargs)), input_key(args, kwargs)
        if self.backend == 'inductor': return (*kind, *((t.shape, t.stride()) for t in tensors)), ()
        # PyTorch's guards tell sizes 0 and 1 apart. Runtimes get contiguous copies, but a model may read the strides of channels last
        alike = ((*(min(n, 2) for n in t.shape), t.stride()[1:2] == (1,)) for t in tensors)
        return (*kind, torch.get_num_threads(), *alike), tuple(t.shape for t in tensors)

    def may_prepare(self) -> bool: return not running_fits.get(self.learn)
    def setting(self): return getattr(getattr(self.learn, 'mixed_precision', None), 'fp32_layers', ())
    def watch(self): return note_reasons(self, self.model, self.work.reasons)

    def prepare(self, copy, truth, args, kwargs):
        state, converted = self.work.state, self.backend != 'inductor'
        if self.work.reasons: raise NotPrepared(self.work.reasons[0])
        if converted and model_device(self.model).type != 'cpu': raise NotPrepared(f'{BACKENDS[self.backend].name} computes on the CPU only')
        for m in copy.model.modules():
            if type(m) is ToTensorBase: m.forward = noop  # the output is cast afterwards
            if converted and isinstance(m, nn.RNNBase): m.cpu()  # finds the copy's weights now, not in its first pass
        run = FrozenModel(copy.model, args, kwargs, {type(t) for t in tensors_of(truth)}, self.backend)
        others = {id(t): t for t in run.constants if t.data_ptr() not in {t.data_ptr() for t in state.watched}}
        run.constants = None
        if not all(map(is_plain, others.values())): raise NotPrepared('it depends on tensors of other types')
        if not (state.same_memory() and state.same_values()): self.work.runs.clear()  # code with other values
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
        how = f'converted by {BACKENDS[self.backend].name}' if run.converted else 'compiled'
        print_compiled(self, self.model, run.start, args, kwargs, again=self.work.again, how=how, more=' and other sizes'*run.any_size)
        if self.work.unused >= MAX_UNUSED + self.max_copies: self.refuse(CHANGES)

    def reason_of(self, e): return str(e) if isinstance(e, NotPrepared) else reason_of(e)

    def warn(self, reason):
        self.reason = reason
        super().warn(f'stays uncompiled: {reason}')
