"Look and measure without leaving a trace on the Learner."
import random
import traceback
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from fastcore.foundation import L
from torch import Tensor, nn

from ..core.autocast import restore_autocast
from ..core.devices import fit_device, unwrap_model
from ..core.exception_note import add_note
from ..core.memory_format import group_by_memory
from ..core.nested_tensors import tensors_of
from ..core.random_state import restore_random_states
from ..core.undo import restore_dict
from .step_callbacks import changes_step, is_part_of_step

__all__ = ['preserve_learner', 'learner_modules', 'check_model']


def learner_modules(learn, cbs=()) -> list:
    "Every module of the Learner's model and, if they have any, of its loss and of these callbacks."
    roots = [learn.model, learn.loss_func, getattr(learn.loss_func, 'func', None)]
    roots += [v for cb in cbs for v in vars(cb).values()]
    return list({id(m): m for root in roots if isinstance(root, nn.Module) for m in root.modules()}.values())


def check_model(learn):
    "`ValueError` for a model that can't run in a Learner, with what to do."
    params = list(learn.model.parameters())
    if not params:
        raise ValueError("The model has no parameters: fastai reads the device from them, so it can't run this model.")
    if any(nn.parameter.is_lazy(p) for p in params):
        raise ValueError("The model has lazy modules without shapes yet: run one batch through it first, "
                         "`learn.model(learn.dls.one_batch()[0])`.")
    if any(p.is_meta for p in params):
        raise ValueError("The model is on the meta device, it has shapes but no numbers: "
                         "`learn.model.to_empty(device='cpu')`, then load weights.")


def _held(modules):
    "Objects that modules and callbacks hold: fastai's UNet keeps activations in `Hook` objects."
    held = {id(v): v for m in modules for v in vars(m).values() if type(v).__module__ != 'builtins'}
    others = nn.Module, Tensor, type, Learner
    return [o for o in held.values() if hasattr(o, '__dict__') and not isinstance(o, others)]


def _keep_generators(undo, owner):
    "Have `undo` restore the random generators among an object's attributes: Python's, NumPy's and PyTorch's."
    for g in getattr(owner, '__dict__', {}).values():
        if isinstance(g, random.Random): undo.callback(g.setstate, g.getstate())
        elif isinstance(g, torch.Generator): undo.callback(g.set_state, g.get_state())
        elif isinstance(g, np.random.RandomState): undo.callback(g.set_state, g.get_state())
        elif isinstance(g, np.random.Generator): undo.callback(setattr, g.bit_generator, 'state', g.bit_generator.state)


def _name_left_out(e, cbs):
    "Say which callbacks a step that failed ran without."
    names = ', '.join(f'`{type(o).__name__}`' for o in cbs if type(o).__module__.partition('.')[0] != 'fastai')
    if names and any(f.f_code.co_name == 'one_batch' for f, _ in traceback.walk_tb(e.__traceback__)):
        add_note(e, f"The step ran without {names}, so that nothing is logged, saved, stopped or drawn. A callback "
                 "takes part if it assigns `self.learn.xb`, `yb`, `pred`, `loss`, `loss_grad` or `loss_func`.")


def _in_cpp(m) -> dict:
    "Attributes of a scripted module that live in C++: mode, parameters, buffers, plain values."
    if not isinstance(m, torch.jit.ScriptModule): return {}
    return {k: m._c.getattr(k) for k in torch._C.ConcreteModuleType.from_jit_type(m._c._type()).get_attributes()}


def _run_on_copies(undo, tensors):
    """Put a copy of its memory behind each tensor, one copy behind tied ones, until `undo` puts the original back,
    which nothing can have changed; returns the tensors with their originals."""
    originals = []
    for group in group_by_memory(tensors):
        memory = group[0].untyped_storage().clone() if len(group) > 1 else None
        for t in group:
            def _restore(t=t, data=t.data, grad=t.grad if t.is_leaf else None, needs_grad=t.requires_grad):
                t.grad = None
                t.data = data
                t.requires_grad_(needs_grad).grad = grad
            undo.callback(_restore)
            originals.append((t, t.data))
            t.grad = None
            if memory is None: t.data = t.data.clone()
            else: t.data = t.data.new_empty(0).set_(memory, t.storage_offset(), t.shape, t.stride())
    return originals


def _keep_optimizer(undo, opt):
    """Have `undo` restore an optimizer, wrapped ones too: what it holds, its hyper-parameters, its state by value;
    returns its state's tensors with their originals."""
    originals = []
    while opt is not None:
        own = vars(opt)
        restore_dict(undo, own)
        for group in (*own.get('param_groups', ()), *own.get('hypers', ())): restore_dict(undo, group)
        for state in getattr(opt, 'state', {}).values():
            if isinstance(state, dict): restore_dict(undo, state)
        originals += _run_on_copies(undo, tensors_of([own.get('state'), *map(list, own.get('slow_weights') or ())]))
        inner = own.get('opt', own.get('optimizer'))
        opt = inner if hasattr(inner, 'state') else None
    return originals


@contextmanager
def preserve_learner(learn,
    classes=(), # Of callbacks that stay, beside those that a step needs
    eager=True, # Run compiled models as the modules they were made from?
    loader=None, # That is used inside; None: the training loader
):
    """Context manager: use the Learner as you like inside; afterwards it is bit for bit what it was, however the block
    ended: weights, buffers, gradients, their formats and memory, optimizer, modes, callbacks, recorder, hooks, random
    states, autocast, the loader's shuffling. Costs one copy of the tensors of model and optimizer. Callbacks that a
    step does not need are left out; an error of a step names them.

    Gives the tensors with their originals' memory. What a module keeps deeper than in objects among its attributes is
    not known here."""
    stay = [o for o in learn.cbs if is_part_of_step(o, classes)]
    users = [o for o in stay if changes_step(o)]
    try: loader, modules = learn.dls.train if loader is None else loader, learner_modules(learn, users)
    except IndexError:
        raise ValueError("The Learner's DataLoaders hold no loader: there is nothing to run on.") from None
    with restore_random_states(), restore_autocast(fit_device(learn).type), torch.enable_grad(), ExitStack() as undo:
        if eager: undo.enter_context(torch.compiler.set_stance('force_eager'))
        plain_loss = not isinstance(learn.loss_func, nn.Module) and hasattr(learn.loss_func, '__dict__')
        owners = [*modules, learn.loss_func] if plain_loss else modules
        for o in (learn, *learn.cbs, *[loader]*hasattr(loader, '__dict__'), *owners): restore_dict(undo, vars(o))
        for o in _held([*modules, *users]): restore_dict(undo, vars(o))
        for m in modules:
            for k, v in _in_cpp(m).items(): undo.callback(m._c.setattr, k, v)
        for o in (loader, getattr(loader, 'sampler', None), *users): _keep_generators(undo, o)
        # parameters, buffers, and tensors that are plain attributes
        held = [[*vars(o).values(), *_in_cpp(o).values()] for o in (*owners, *users)]
        originals = _run_on_copies(undo, tensors_of(held))
        opt = learn.opt_func if learn.opt is None and isinstance(learn.opt_func, OptimWrapper) else learn.opt
        originals += _keep_optimizer(undo, opt)
        device = fit_device(learn)
        if getattr(learn.dls, 'device', None) not in (None, device):
            undo.callback(setattr, learn.dls, 'device', learn.dls.device)
            learn.dls.device = device
        left_out, learn.cbs = [o for o in learn.cbs if o not in stay], L(stay)
        if eager: learn.model = unwrap_model(learn.model)
        try: yield originals
        except Exception as e:
            _name_left_out(e, left_out)
            raise
