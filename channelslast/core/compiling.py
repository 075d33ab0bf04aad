"Compiling: silence meanwhile, functions with code objects of their own, the reason of a failure, the line printed."
import logging
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from types import FunctionType

import torch

from .devices import model_device, unwrap_model
from .memory_format import unique_modules
from .module_hooks import LOCK
from .nested_tensors import tensors_of
from .onednn_workarounds import needs_safe_convolutions, note_rewritten
from .random_state import python_state

# reasons to stay uncompiled
CHANGES = 'its state changes, or it depends on more than its input'
DRAWS = 'it draws random numbers of Python or NumPy'  # another thread may have drawn them
COMPILERS = dict(linux='g++ (such as `apt install g++`)', darwin="Xcode's tools (`xcode-select --install`)",
                 win32="Visual Studio's Build Tools with C++")


@contextmanager
def compiling_quietly():
    "One compilation at a time, without the warnings and log messages that it writes by the page."
    with LOCK, warnings.catch_warnings():
        level = logging.root.manager.disable
        try:
            logging.disable(logging.ERROR)
            warnings.simplefilter('ignore')
            yield
        finally: logging.disable(level)


@contextmanager
def stance(name):
    "`torch.compiler.set_stance`, one block at a time: the process has one stance, and the end of a block sets the one it found."
    with LOCK, torch.compiler.set_stance(name): yield


def own_code(f):
    "A copy of `f` with its own code object, per which PyTorch limits compilations, and its own names."
    return FunctionType(f.__code__.replace(co_name='compiled'), dict(f.__globals__), f.__name__, None, f.__closure__)


@contextmanager
def note_reasons(cb, model, reasons):
    "Append to `reasons` why a callback's model, which runs a pass in this block, must stay uncompiled."
    rewritten, draws = [], python_state()
    unsafe = model_device(model).type == 'cpu' and needs_safe_convolutions(unique_modules(model))
    with note_rewritten(rewritten) if unsafe else nullcontext(): yield  # any mode turns off the fast path of transformers
    if rewritten: reasons.append("oneDNN's kernels compute one of its convolutions wrongly")
    if draws != python_state(): reasons.append(DRAWS)
    if unwrap_model(model) is not model: reasons.append('it is compiled already, or wrapped for several devices')
    if getattr(getattr(cb.learn, 'mixed_precision', None), 'fp32_layers', ()):
        reasons.append('some of its layers are kept in fp32')
    if any('forward' in vars(m) for m in model.modules()): reasons.append('the forward of a module was replaced')


def reason_of(e) -> str:
    "Why a model can't be compiled, in one line."
    e = getattr(e, 'inner_exception', e)
    text = str(e)
    if 'C++ compiler' in text or ('Compiler' in text and 'not found' in text):
        return f"no C++ compiler found: install {COMPILERS.get(sys.platform, 'one')}"
    lines = [o.strip('- ') for o in text.splitlines() if o.strip()] or ['no message']
    line = lines[-1 if text.startswith(('Check ', 'Exception from ')) else 0]  # OpenVINO's own code comes first in its errors
    return f'{type(e).__name__}: {line[:100]}'


def print_compiled(cb, model, start, args, kwargs, again=False, how='compiled', more=''):
    "Record that a callback compiled the model since `start`, and print it unless the callback is quiet."
    cb.reason, cb.seconds = '', time.perf_counter() - start
    shapes = ', '.join(str(tuple(t.shape)) for t in tensors_of((args, kwargs)))
    seconds = f'{cb.seconds:.{0 if how == "compiled" else 1}f}'
    if not cb.quiet: print(f"{type(cb).__name__}: {type(model).__name__} {how} {'again ' if again else ''}in {seconds} s, "
                           f"for inputs of {shapes}{more}.")
