"A note on `view` errors in channels last: which part of the Learner raised the error, and two ways to fix it."
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
from .preserve_learner import learner_modules

VIEW = re.compile('view size is not compatible|Cannot view a tensor with shape')  # the latter inside `torch.compile`
LIBRARIES = {'torch', 'fastai', 'fastcore', 'channelslast'}


def _learner_part(learn, frame):
    "Description of the part of the Learner that this frame's method or function belongs to; None for any other frame."
    o, model, loss = frame.f_locals.get('self', learn), unwrap_model(learn.model), learn.loss_func
    cls, function = type(o).__name__, getattr(loss, 'func', loss)
    name = next((n for n, m in model.named_modules() if m is o), None)
    if name: return f'module {name!r} ({cls})'
    if o is model or o is learn.model: return f'the model ({cls})'
    if o is loss or any(o is m for m in learner_modules(learn)): return f'loss function {cls}'
    if getattr(function, '__code__', None) is frame.f_code: return f'loss function {function.__name__}'
    if isinstance(o, Metric): return f"metric {getattr(o, 'name', cls)}"
    if o is learn.opt or isinstance(o, (torch.optim.Optimizer, Optimizer, OptimWrapper)): return f'optimizer {cls}'
    return f'callback {cls}' if isinstance(o, Callback) else None


def _user_function(frame):
    "Description of a user's function; None for a library's."
    if frame.f_globals.get('__name__', '').partition('.')[0] in LIBRARIES: return None
    code = frame.f_code
    return 'function ' + code.co_qualname.rpartition('<locals>.')[2]


def _add_note(learn, e):
    "Add the note to an exception, once, if it is a `view` error in channels last."
    if hasattr(e, 'channels_last') or not VIEW.search(str(e)) or not learn._grab_cbs(ChannelsLast): return
    frames = [f for f, _ in walk_tb(e.__traceback__)][::-1]
    if any(f.f_code.co_name in ('__iter__', '__next__') for f in frames): return  # from a loader: contiguous data
    parts, functions = (_learner_part(learn, f) for f in frames), map(_user_function, frames)
    where = next(filter(None, chain(parts, functions)), 'the Learner')
    e.channels_last = True
    e.add_note(f"Raised in {where}. This Learner is in channels last, where `view` can't flatten channels with "
             "height and width: they are not adjacent in memory. Use `reshape` instead of `view` (`nn.Flatten` "
             "instead of fastai's `Flatten`), or call `learn.to_contiguous()`.")


def explain_view_errors(f):
    "Wrap a method of `Learner` so that its `view` errors say where they were raised, and that channels last is why."
    @wraps(f)
    def _f(self, *args, **kwargs):
        try: return f(self, *args, **kwargs)
        except Exception as e:
            _add_note(self, e)
            raise
    return _f
