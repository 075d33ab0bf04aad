"A function in the place of a Learner's model, from the end of `before_batch` to the call of the model."
import sys
import warnings
from types import SimpleNamespace
from weakref import WeakKeyDictionary

from fastai.callback.core import Callback
from torch import nn

from .devices import is_out_of_memory

running_fits = WeakKeyDictionary()  # number of fits that run, by Learner


class StandIn:
    "Puts the user's model back when it is called, before anything else runs."
    def __init__(self, learn, run):
        self.learn, self.run, self.forward, self.model = learn, run, learn.model, model_of(learn)
    def __call__(self, *args, **kwargs):
        self.learn.model = self.model
        return self.run(self.forward, *args, **kwargs)


def model_of(learn) -> nn.Module:
    "The user's model, also while a `StandIn` takes its place."
    return learn.model.model if isinstance(learn.model, StandIn) else learn.model


class Work(SimpleNamespace):
    "What a callback has prepared for its Learner's model. Copies and pickles are None."
    def __reduce__(self): return type(None), ()


class StandInCallback(Callback):
    """Runs `run_model(forward, *args, **kwargs)` instead of the model in the batches that it `takes_part` in. `forward`
    is the model, or what another callback puts in its place. No other callback meets anything but the model."""
    order = sys.float_info.max  # the last one before the model runs
    quiet = False  # True while `format_find` measures
    error_note = ''  # on how the current batch runs

    _work = None

    @property
    def work(self) -> Work:
        if self._work is None: self._work = self.new_work()
        return self._work

    def forget(self):
        "Free what was prepared. Later batches prepare it again."
        self._work = None

    def before_batch(self):
        is_last = self is self.learn._grab_cbs(type(self))[-1]  # of two of a kind, the one that was added last
        if is_last and self.takes_part() and isinstance(model_of(self.learn), nn.Module):
            self.learn.model = StandIn(self.learn, self.run_model)

    def warn(self, message):
        if not self.quiet: warnings.warn(f'{type(self).__name__}: {type(self.model).__name__} {message}.', stacklevel=2)

    def trust(self): "Called after the weights were moved, but not changed."
    def explain(self, e):
        "Add the note, if there is one, to an error of a batch."
        if self.error_note and isinstance(e, RuntimeError) and not is_out_of_memory(e): e.add_note(self.error_note)

    def after_cancel_batch(self): self.learn.model = model_of(self.learn)

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == 'learn' and value is None: self.forget()  # removed from its Learner
