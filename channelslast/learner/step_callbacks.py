"Which of a Learner's callbacks a step needs: those that change the batch, the predictions or the loss."
import dis
from types import CodeType, FunctionType

from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback, TrainEvalCallback
from fastai.callback.fp16 import MixedPrecision, NonNativeMixedPrecision
from fastai.learner import CastToTensor

__all__ = ['ESSENTIAL_CALLBACKS', 'changes_step', 'is_part_of_step']

ESSENTIAL_CALLBACKS = TrainEvalCallback, CastToTensor, ChannelsLast, MixedPrecision  # without these, a step is another one
STEP = {'xb', 'yb', 'x', 'y', 'pred', 'loss', 'loss_grad', 'loss_func'}  # of the Learner


def _functions(cb) -> list:
    "The functions of a callback's own classes, and those given to it as `Callback(after_pred=f)`."
    owners = [cb, *(c for c in type(cb).__mro__ if issubclass(c, Callback) and c is not Callback)]
    found = [getattr(f, '__func__', getattr(f, 'fget', f)) for o in owners for f in vars(o).values()]
    return [f for f in found if isinstance(f, FunctionType)]


def _assigns(code: CodeType) -> bool:
    "True if this code assigns one of `STEP` to anything else than `self`, where it would be the callback's own."
    before, me = None, code.co_varnames[:1]
    for ins in dis.get_instructions(code):
        if ins.opname == 'STORE_ATTR' and ins.argval in STEP:
            loaded = before.argval if isinstance(before.argval, tuple) else (before.argval,)
            if not before.opname.startswith(('LOAD_FAST', 'STORE_FAST_LOAD_FAST')) or loaded[-1:] != me: return True
        before = ins
    if 'setattr' in code.co_names and STEP & {*filter(lambda o: isinstance(o, str), code.co_consts)}: return True
    return any(_assigns(o) for o in code.co_consts if isinstance(o, CodeType))


def changes_step(cb) -> bool:
    """True if a callback sets the Learner's batch, predictions or loss: `self.learn.pred = …`. Its code tells, so that
    no callback has to run for it: others log, save, stop or draw."""
    return not isinstance(cb, NonNativeMixedPrecision) and any(_assigns(f.__code__) for f in _functions(cb))


def is_part_of_step(cb, classes=()) -> bool:
    "True if a step without this callback would be another one, or if the callback is of one of these classes."
    return isinstance(cb, (*ESSENTIAL_CALLBACKS, *classes)) or changes_step(cb)
