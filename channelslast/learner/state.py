"What a step changes in a Learner: attributes, buffers, weights, the optimizer's state. Inside `preserve_learner`."
import torch

from ..core.nested_tensors import tensors_of
from ..core.random_state import generators_of
from ..core.undo import Saved
from .preserve_learner import cpp_attributes, learner_modules, objects_in

SAME = {k for k, v in vars(torch.nn.Module()).items() if isinstance(v, dict)} - {'_buffers'}  # hooks, parameters, modules


def not_finite(named) -> str: # `''` if all are finite
    "First name in pairs `(name, tensor)` whose tensor holds NaN or infinity. None and integers pass."
    named = [(n, t._values() if t.layout is torch.sparse_coo else t) for n, t in named if t is not None]
    named = [(n, t) for n, t in named if t.layout is torch.strided and (t.is_floating_point() or t.is_complex())]
    if not named: return ''
    finite = torch.stack([t.isfinite().all().to(named[0][1].device) for _, t in named])  # synchronize only once
    return '' if finite.all() else named[finite.int().argmin().item()][0]


def buffers_of(learn, callbacks) -> dict:
    "The buffers of the Learner's modules, by module and name. Where a module moves to a device, it gets new ones."
    return {(id(m), k): t for m in learner_modules(learn, callbacks) for k, t in m.named_buffers(recurse=False)}


def _set(t, value):
    if t.shape == value.shape: t.copy_(value)
    else: t.data = value.to(t.device, copy=True)  # a buffer that got its size in a step


class Counters:
    "The numbers in a Learner's attributes, such as `train_iter` and `pct_train`. Callbacks read them."
    def __init__(self, learn):
        self.learn = learn
        self.take()
    def take(self): self.values = {k: v for k, v in vars(self.learn).items() if isinstance(v, (int, float))}
    def restore(self): vars(self.learn).update(self.values)


class ScriptState:
    "What TorchScript holds for a module: its mode and attributes."
    def __init__(self, module):
        self.module = module
        self.take()
    def take(self): self.values = cpp_attributes(self.module)
    def restore(self):
        for k, v in self.values.items(): self.module._c.setattr(k, v)


class State:
    "The state of a Learner from which all candidates start: the current one."
    def __init__(self, learn, callbacks, originals): # Pairs of a tensor and its original values, from `preserve_learner`
        self.learn, self.originals = learn, originals
        state = tensors_of(list(getattr(getattr(learn.opt, 'opt', learn.opt), 'state', {}).values()))
        weights, self.optimizer_had_state = {*map(id, learn.model.parameters()), *map(id, state)}, bool(state)
        self.buffers = [(t, data) for t, data in originals if id(t) not in weights]  # and tensors in attributes
        modules = learner_modules(learn, callbacks)
        self.scripts = [m for m in modules if isinstance(m, torch.jit.ScriptModule)]
        owners = [*modules, learn.loss_func, *callbacks]
        owners = {id(o): o for o in (*owners, *objects_in(owners)) if hasattr(o, '__dict__')}.values()
        self.dicts = [vars(o) for o in owners]
        self.generators = generators_of(v for d in self.dicts for v in d.values())
        names = {id(t): n for n, t in (*learn.model.named_parameters(), *learn.model.named_buffers())}
        finite = [t for t, data in originals if not not_finite([('it', data)])]  # an attention mask may hold infinity
        self.finite = [(names.get(id(t), 'optimizer state'), t) for t in finite]
        self.start = self.take()

    def take(self) -> list:
        "What the modules and callbacks hold now: attributes, not the values of tensors. And the Learner's counters."
        return [Counters(self.learn), *(Saved(d, SAME) for d in self.dicts), *map(ScriptState, self.scripts)]

    @torch.no_grad()
    def restart(self):
        "Restore what modules, buffers, callbacks and random generators held at the start."
        for o in self.start: o.restore()
        for restore, state in self.generators: restore(state)
        for t, value in self.buffers:
            if not torch.equal(t, value.to(t.device)): _set(t, value)  # prepared models notice writes

    @torch.no_grad()
    def restore_tensors(self):
        "Restore the values of weights, buffers and optimizer state, which a step may have filled with NaN."
        for t, data in self.originals: _set(t, data)
        if self.learn.opt is not None and not self.optimizer_had_state: self.learn.opt.clear_state()
        self.learn.model.zero_grad(set_to_none=True)
