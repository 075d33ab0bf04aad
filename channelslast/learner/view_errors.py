"A note on `view` errors in channels last: which part of the Learner raised it, and the two ways out."
import re
from functools import wraps
from itertools import chain
from traceback import walk_tb

import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback
from fastai.learner import Metric
from fastai.optimizer import Optimizer, OptimWrapper


from ..core.devices import unwrap_model
from ..core.exception_note import add_note
from .preserve_learner import learner_modules

__all__ = ['explain_view_errors']

VIEW = re.compile('view size is not compatible|Cannot view a tensor with shape')  # the latter inside `torch.compile`
OPTIMIZERS = torch.optim.Optimizer, Optimizer, OptimWrapper
LIBRARIES = {'torch', 'fastai', 'fastcore', 'channelslast'}


def _part(learn, frame):
    "Description of the part of the Learner whose method or function this is; None for any other."
    o, model, loss = frame.f_locals.get('self', learn), unwrap_model(learn.model), learn.loss_func
    name, function = type(o).__name__, getattr(loss, 'func', loss)
    if at := next((n for n, m in model.named_modules() if m is o), None): return f'module {at!r} ({name})'
    if o is model or o is learn.model: return f'the model ({name})'
    if o is loss or any(o is m for m in learner_modules(learn)): return f'loss function {name}'
    if getattr(function, '__code__', None) is frame.f_code: return f'loss function {function.__name__}'
    if isinstance(o, Metric): return f"metric {getattr(o, 'name', name)}"
    if isinstance(o, Callback): return f'callback {name}'
    return f'optimizer {name}' if o is learn.opt or isinstance(o, OPTIMIZERS) else None


def _function(frame):
    "Name of a user's function; None for those of libraries."
    if frame.f_globals.get('__name__', '').partition('.')[0] in LIBRARIES: return None
    code = frame.f_code
    return 'function ' + getattr(code, 'co_qualname', code.co_name).rpartition('<locals>.')[2]  # Python 3.10 has none


def _add_note(learn, e):
    "Add the note to an exception that needs it and has none yet."
    if hasattr(e, 'channels_last') or not VIEW.search(str(e)) or not learn._grab_cbs(ChannelsLast): return
    frames = [f for f, _ in walk_tb(e.__traceback__)]
    if any(f.f_code.co_name in ('__iter__', '__next__') for f in frames): return  # a loader's, in contiguous memory
    parts, functions = (_part(learn, f) for f in frames[::-1]), map(_function, frames[::-1])
    where = next(filter(None, chain(parts, functions)), 'the Learner')
    note = (f"Raised in {where}. This Learner is in channels last, where `view` can't merge dimensions that lie side "
            "by side in contiguous memory. Use `reshape` in place of `view` there, or call `learn.to_contiguous()`.")
    e.channels_last = True
    add_note(e, note)


def explain_view_errors(f):
    "A method of `Learner` whose `view` errors say that channels last is the cause, and where."
    @wraps(f)
    def _f(self, *args, **kwargs):
        try: return f(self, *args, **kwargs)
        except Exception as e:
            _add_note(self, e)
            raise
    return _f
