"Which callbacks a step needs: those that change the batch, predictions or loss. Others log, save, stop or draw."
import dis
from types import CodeType, FunctionType

from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback, TrainEvalCallback
from fastai.callback.fp16 import MixedPrecision, NonNativeMixedPrecision
from fastai.learner import CastToTensor

ESSENTIAL_CALLBACKS = TrainEvalCallback, CastToTensor, ChannelsLast, MixedPrecision  # a step differs without these
STEP = {'xb', 'yb', 'x', 'y', 'pred', 'loss', 'loss_grad', 'loss_func'}  # attributes of the Learner


def _functions(cb) -> list:
    "Functions of a callback's own classes, and those passed as `Callback(after_pred=f)`."
    owners = [cb, *(c for c in type(cb).__mro__ if issubclass(c, Callback) and c is not Callback)]
    functions = [getattr(f, '__func__', getattr(f, 'fget', f)) for o in owners for f in vars(o).values()]
    return [f for f in functions if isinstance(f, FunctionType)]


def _assigns(code: CodeType) -> bool:
    "True if this code sets one of `STEP` on anything except `self`, where it is the callback's own attribute."
    previous, self_name = None, code.co_varnames[:1]
    for ins in dis.get_instructions(code):
        if ins.opname == 'STORE_ATTR' and ins.argval in STEP:
            target = previous.argval if isinstance(previous.argval, tuple) else (previous.argval,)
            is_local = previous.opname.startswith(('LOAD_FAST', 'STORE_FAST_LOAD_FAST'))
            if not is_local or target[-1:] != self_name: return True
        previous = ins
    if 'setattr' in code.co_names and any(isinstance(o, str) and o in STEP for o in code.co_consts): return True
    return any(_assigns(o) for o in code.co_consts if isinstance(o, CodeType))


def changes_step(cb) -> bool:
    "True if a callback's code sets the Learner's batch, predictions or loss: `self.learn.pred = …`."
    return not isinstance(cb, NonNativeMixedPrecision) and any(_assigns(f.__code__) for f in _functions(cb))


def is_part_of_step(cb, classes=()) -> bool:
    "True if a step would differ without this callback, or if the callback belongs to one of these classes."
    return isinstance(cb, (*ESSENTIAL_CALLBACKS, *classes)) or changes_step(cb)
