"Look and measure without leaving a trace on the Learner."
from contextlib import ExitStack, contextmanager
from copy import copy

import torch
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import TrainEvalCallback
from fastai.learner import CastToTensor
from fastai.optimizer import OptimWrapper
from fastcore.foundation import L
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .devices import fit_device, unwrapped
from .precision import keep_autocast
from .reproducible import keep_random_states

__all__ = ['untouched', 'keep_dict', 'learner_modules', 'check_model']

# callbacks without which a step is another one
TAKE_PART = TrainEvalCallback, CastToTensor, ChannelsLast, MixedPrecision


def learner_modules(learn) -> list:
    "Every module of the Learner's model and, if it has any, of its loss."
    roots = [learn.model, learn.loss_func, getattr(learn.loss_func, 'func', None)]
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


def _tensors(tree) -> list: return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _held(modules):
    "What modules hold on to beside tensors and modules: fastai's UNet keeps activations in `Hook` objects."
    held = {id(v): v for m in modules for v in vars(m).values() if type(v).__module__ != 'builtins'}
    return [o for o in held.values() if hasattr(o, '__dict__') and not isinstance(o, (nn.Module, Tensor, type))]


def keep_dict(undo, d):
    "Have `undo` restore a dictionary and, one level down, the dictionaries, lists and sets in it."
    saved, inner = dict(d), [(v, copy(v)) for v in d.values() if isinstance(v, (dict, list, set))]
    def _restore():
        d.clear(); d.update(saved)
        for v, old in inner:
            if isinstance(v, list): v[:] = old
            else: v.clear(); v.update(old)
    undo.callback(_restore)


def _run_on_copies(undo, tensors):
    """Put a copy of its memory behind each tensor until `undo` puts the original back, which nothing can have changed;
    returns the tensors with their originals."""
    originals = []
    for t in {id(t): t for t in tensors}.values():
        def _restore(t=t, data=t.data, grad=t.grad if t.is_leaf else None, needs_grad=t.requires_grad):
            t.grad = None
            t.data = data
            t.requires_grad_(needs_grad).grad = grad
        undo.callback(_restore)
        originals.append((t, t.data))
        t.grad = None
        t.data = t.data.clone()
    return originals


def _keep_optimizer(undo, opt):
    """Have `undo` restore an optimizer, wrapped ones too: what it holds, its hyper-parameters, its state by value;
    returns its state's tensors with their originals."""
    originals = []
    while opt is not None:
        own = vars(opt)
        keep_dict(undo, own)
        for group in (*own.get('param_groups', ()), *own.get('hypers', ())): keep_dict(undo, group)
        for state in getattr(opt, 'state', {}).values():
            if isinstance(state, dict): keep_dict(undo, state)
        originals += _run_on_copies(undo, _tensors([own.get('state'), *map(list, own.get('slow_weights') or ())]))
        inner = own.get('opt', own.get('optimizer'))
        opt = inner if hasattr(inner, 'state') else None
    return originals


@contextmanager
def untouched(learn,
    take_part=TAKE_PART, # Callback classes that stay
    eager=True, # Run compiled models as the modules they were made from?
    loader=None, # That is used inside; None: the training loader
):
    """Context manager: use the Learner as you like inside; afterwards it is bit for bit what it was, however the block
    ended: weights, buffers, gradients, their formats and memory, optimizer, modes, callbacks, recorder, hooks, random
    states, autocast, the loader's shuffling. Costs one copy of the tensors of model and optimizer.

    Gives the tensors with their originals' memory. What a module keeps deeper than in objects among its attributes is
    not known here."""
    try: loader, modules = learn.dls.train if loader is None else loader, learner_modules(learn)
    except IndexError:
        raise ValueError("The Learner's DataLoaders hold no loader: there is nothing to run on.") from None
    with keep_random_states(), keep_autocast(fit_device(learn).type), torch.enable_grad(), ExitStack() as undo:
        if eager: undo.enter_context(torch.compiler.set_stance('force_eager'))
        plain_loss = not isinstance(learn.loss_func, nn.Module) and hasattr(learn.loss_func, '__dict__')
        owners = [*modules, learn.loss_func] if plain_loss else modules
        for o in (learn, *learn.cbs, *[loader]*hasattr(loader, '__dict__'), *owners): keep_dict(undo, vars(o))
        for o in _held(modules): keep_dict(undo, vars(o))
        if hasattr(rng := getattr(loader, 'rng', None), 'getstate'): undo.callback(rng.setstate, rng.getstate())
        for o in loader, getattr(loader, 'sampler', None):  # PyTorch's own loader
            g = getattr(o, 'generator', None)
            if isinstance(g, torch.Generator): undo.callback(g.set_state, g.get_state())
        # parameters, buffers, and tensors that are plain attributes
        originals = _run_on_copies(undo, _tensors([list(vars(o).values()) for o in owners]))
        opt = learn.opt_func if learn.opt is None and isinstance(learn.opt_func, OptimWrapper) else learn.opt
        originals += _keep_optimizer(undo, opt)
        learn.cbs = L(o for o in learn.cbs if isinstance(o, take_part))
        if eager: learn.model = unwrapped(learn.model)
        yield originals
