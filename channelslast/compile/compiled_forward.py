"A model's forward, compiled once for one kind of input. It never compiles by itself, and its memory can be freed."
import gc
import logging
import sys
import time
import warnings
import weakref
from contextlib import contextmanager
from types import FunctionType

import torch
from fastai.callback.core import Callback
from fastai.layers import ToTensorBase
from fastai.torch_core import TensorBase
from torch import Tensor, nn
from torch._functorch import config as functorch_config

from ..core.devices import torch_version
from ..core.module_hooks import LOCK
from ..core.nested_tensors import map_tensors, tensors_of
from ..core.onednn_workarounds import is_misread, pads_in_kernel
from ..core.undo import ForwardPatch
from ..fold.fold_trace import foreign_forward
from ..fold.plan_conditions import has_global_hooks, input_key, is_eager

__all__ = ['DEPENDS', 'MISREAD', 'running_fits', 'NotCompiled', 'functorch_config', 'reason_of', 'check_compilable',
           'note_misread', 'kind_of', 'CompiledForward', 'CompileCallback']

COMPILERS = dict(linux='g++ (such as `apt install g++`)', darwin="Xcode's tools (`xcode-select --install`)",
                 win32="Visual Studio's Build Tools with C++")
DEPENDS = 'its state changes, or it depends on more than its input'
MISREAD = "oneDNN's kernels compute one of its convolutions wrongly"
running_fits = weakref.WeakKeyDictionary()  # by Learner: `CompilePredictions` compiles only outside a fit


class NotCompiled(Exception):
    "Raised where the model would run uncompiled, or can't be compiled."


def reason_of(e) -> str:
    "Why the model can't be compiled, in a line."
    if isinstance(e, NotCompiled): return str(e)
    e = getattr(e, 'inner_exception', e)
    text = str(e)
    if 'C++ compiler' in text or ('Compiler' in text and 'not found' in text):
        return f"no C++ compiler found: install {COMPILERS.get(sys.platform, 'one')}"
    line = next((o for o in text.splitlines() if o.strip()), 'no message').strip()
    return f'{type(e).__name__}: {line[:100]}'


def check_compilable(model, modules, fp32_layers):
    "Raise `NotCompiled` for models that would not compute the same."
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise NotCompiled('it is wrapped for several devices')
    if not is_eager(modules): raise NotCompiled('it is compiled or scripted already')
    if any(map(foreign_forward, modules)): raise NotCompiled('the forward of a module was replaced')
    if fp32_layers: raise NotCompiled('some of its layers are kept in fp32')


def _is_eager_forced() -> bool:
    "True within `torch.compiler.set_stance('force_eager')`."
    return torch._dynamo.eval_frame._stance.stance == 'force_eager'


def note_misread(model, misread):
    "Context manager that appends, for each padded convolution that runs, to `misread` whether it `is_misread`."
    def _note(m, forward):
        def _forward(x, *args, **kwargs):
            misread.append(is_misread(m, x, *args, **kwargs))
            return forward(x, *args, **kwargs)
        return _forward
    return ForwardPatch([m for m in model.modules() if pads_in_kernel(m)], _note)


@contextmanager
def _quiet():
    "Hide warnings and log messages, which a compilation writes by the page."
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: yield
        finally: logging.disable(level)


@contextmanager
def _no_finalizers(modules):
    """Skip finalizers of copies that share a module's attributes. PyTorch makes and frees such copies while compiling;
    the finalizer of fastai's U-Net would remove the hooks that its skip connections read."""
    finalizers = {c: vars(c)['__del__'] for m in modules for c in type(m).__mro__ if '__del__' in vars(c)}
    shared = {id(vars(m)) for m in modules}
    def _skipping(finalize): return lambda self: None if id(vars(self)) in shared else finalize(self)
    try:
        for c, f in finalizers.items(): c.__del__ = _skipping(f)
        yield
    finally:
        for c, f in finalizers.items(): c.__del__ = f


def _identity(x): return x


@contextmanager
def _compilable_forwards(modules):
    "Undo this library's changes of forwards, which are new functions in each fit, and fastai's casts to a tensor type."
    patched = [(m, vars(m).pop('forward')) for m in modules if 'forward' in vars(m) and not foreign_forward(m)]
    try:
        with ForwardPatch([m for m in modules if type(m) is ToTensorBase], lambda m, forward: _identity): yield
    finally:
        for m, forward in patched: vars(m)['forward'] = forward


def _compile(model, args, kwargs, freeze) -> tuple: # A function that never compiles; the output
    """Compile the model's forward for these inputs, with its weights as constants if `freeze`.

    PyTorch keeps compiled code for the life of the process. Here it is freed with the function that is returned."""
    from torch._inductor.codecache import PyCodeCache
    own = {id(t) for t in (*model.parameters(), *model.buffers())}
    def _forward(*args, **kwargs):
        if not torch.compiler.is_compiling(): raise NotCompiled(DEPENDS)  # the compiled code does not fit the call
        return type(model).forward(model, *args, **kwargs)
    # a code object of its own, because PyTorch limits the compilations per code object
    code = _forward.__code__.replace(co_name='compiled_forward')
    names = dict(globals())  # PyTorch adds the compiled code to them
    forward = FunctionType(code, names, 'compiled_forward', None, _forward.__closure__)
    weakref.finalize(forward, torch._dynamo.eval_frame.remove_from_cache, code)
    # frozen weights are compared by `CompilePredictions`: converting the memory format moves them
    def _keep(guards): return [not (g.has_value and id(g.value) in own) for g in guards]
    options = {'guard_filter_fn': _keep} if freeze and torch_version() >= (2, 8) else {}
    # `options={'freezing': True}` comes too late: weights would be inputs of the compiled code, not constants
    freezing = torch._inductor.config.patch(freezing=freeze)
    # compile the backward pass now, not when it first runs (PyTorch 2.6 can't)
    ahead = {'force_non_lazy_backward_lowering': True}
    ahead = functorch_config.patch({k: v for k, v in ahead.items() if hasattr(functorch_config, k)})
    n = len(PyCodeCache.modules)
    try:
        with _quiet(), freezing, ahead, torch.compiler.set_stance('default'):
            out = torch.compile(forward, fullgraph=True, dynamic=False, options=options)(*args, **kwargs)
    except NotCompiled: raise NotCompiled('`torch.compile` is disabled') from None
    finally:
        for m in PyCodeCache.modules[n:]: sys.modules.pop(m.__name__, None)
        del PyCodeCache.modules[n:]
    run = torch._dynamo.run(forward)
    run.uncompiled = forward  # kept alive
    return run, out


def kind_of(args, kwargs) -> tuple: # Dtypes, devices, autocast and strides; shapes
    "Properties of the inputs that the compiled code depends on."
    tensors = tensors_of((args, kwargs))
    return (input_key(args, kwargs)[0], [t.stride() for t in tensors]), [t.shape for t in tensors]


def _plain(args):
    "Inputs without fastai's tensor types, and without inference tensors, which compiled code does not take."
    def _f(t): return torch.as_subclass(t, Tensor) if isinstance(t, TensorBase) else t
    return map_tensors(lambda t: _f(t.clone() if t.is_inference() else t), args)


class CompiledForward:
    """A model's forward for one kind of input. Raises `NotCompiled` for calls that the compiled code does not fit.
    Copies and pickles are None."""
    def __init__(self,
        model, args, kwargs, # The model and an input
        types:set, # The types of tensors that the model gives uncompiled
        freeze:bool, # Make the weights constants of the compiled code?
    ):
        start, self.types = time.perf_counter(), types
        if len(self.types) > 1: raise NotCompiled('its outputs are tensors of several types')
        gc.collect()  # fastai's hooks remove themselves when they are freed, which must not happen while compiling
        self.modules, self.kind, args = [*model.modules()], kind_of(args, kwargs), _plain((args, kwargs))
        with LOCK, _compilable_forwards(self.modules), _no_finalizers(self.modules):
            self.forward, out = _compile(model, *args, freeze)
        self.output, self.seconds = self._typed(out), time.perf_counter() - start

    def __call__(self, *args, **kwargs):
        args, kwargs = _plain((args, kwargs))
        with _compilable_forwards(self.modules): return self._typed(self.forward(*args, **kwargs))

    def _typed(self, out):
        return out if self.types <= {Tensor} else map_tensors(lambda t: torch.as_subclass(t, *self.types), out)

    def __reduce__(self): return type(None), ()
    def __deepcopy__(self, memo): return None


class CompileCallback(Callback):
    "Runs the Learner's model through `run_model(forward, *args, **kwargs)` in the batches that it `takes_part` in."
    order, _patch = 12, ForwardPatch()  # after `FoldBatchNorm`
    measured = False  # True if `to_fastest(compile=True)` added it, so that later calls remove it
    quiet = False  # True while `format_find` measures
    reason, seconds = '', None  # Why the model is not compiled; seconds that the last compilation took

    def trust(self): "Called after the model's weights were moved, but not changed."

    @property
    def fp32_layers(self): return getattr(getattr(self.learn, 'mixed_precision', None), 'fp32_layers', ())

    def before_batch(self):
        self.leave()
        if not self.takes_part() or not isinstance(self.model, nn.Module): return
        def _wrap(m, forward):
            def _forward(*args, **kwargs):
                if has_global_hooks() or _is_eager_forced(): return forward(*args, **kwargs)
                return self.run_model(forward, *args, **kwargs)
            return _forward
        self._patch = ForwardPatch([self.model], _wrap)
        self._patch.apply()

    def after_pred(self): # copies of the model made later in the batch must not hold the patch
        for cb in reversed([*self.learn._grab_cbs(CompileCallback)]): cb._patch.undo()

    def leave(self):
        "Restore the model's own forward."
        self._patch.undo()
        self._patch = ForwardPatch()  # the old one holds the model

    def warn(self, reason):
        self.reason = reason
        if self.quiet: return
        warnings.warn(f'{type(self).__name__}: {type(self.model).__name__} stays uncompiled: {reason}.', stacklevel=3)

    def compiled_in(self, seconds, args, kwargs, again):
        self.seconds = seconds
        if self.quiet: return
        shapes = ', '.join(str(tuple(t.shape)) for t in tensors_of((args, kwargs)))
        print(f"{type(self).__name__}: {type(self.model).__name__} compiled {'again ' if again else ''}in "
              f"{seconds:.0f} s, for inputs of {shapes}.")

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == 'learn' and value is None: self.forget()  # removed from its Learner
