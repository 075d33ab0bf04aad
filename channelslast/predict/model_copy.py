"A private copy of a model: modules of its own, which may be changed, on the memory of the user's tensors."
from copy import deepcopy

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .model_state import ATOMS, INTERNAL, CantCopy, children_of

__all__ = ['ModelCopy']


class ModelCopy:
    """`.model` is a copy whose parameters and buffers are other tensors on the same memory, without gradients.
    It shares all objects that hold no module: a change in a list, a counter in an object, a random generator.
    `.shared` lists these. Raises `CantCopy`."""
    def __init__(self, state): # `ModelState` of the model
        weights = {id(t): t for t in state.weights()}
        copies = {k: t.detach() for k, t in weights.items()}
        copies.update({k: nn.Parameter(t, requires_grad=False) for k, t in copies.items()
                       if isinstance(weights[k], nn.Parameter)})
        self.tensors, self.memo, self.visited = [(copies[k], t) for k, t in weights.items()], copies, {}
        try:
            self._holds_modules(state.model)
            self.model = deepcopy(state.model, self.memo)
        except Exception as e: raise CantCopy(f"it can't be copied ({type(e).__name__}: {e})") from None
        self.shared = [o for o, holds in self.visited.values() if not holds]
        self.modules = [*self.model.modules()]
        for m in self.modules:  # what a finalizer closes or removes is the model's
            if hasattr(m, '__del__'): m.__class__ = type(type(m).__name__, (type(m),), {'__del__': lambda self: None})
        self.memo = self.visited = None

    def _holds_modules(self, o) -> bool:
        "True if an object holds modules or the handle of a hook. All others are shared."
        if isinstance(o, Tensor): self.memo.setdefault(id(o), o)
        if isinstance(o, (*ATOMS, RemovableHandle)): return isinstance(o, RemovableHandle)
        if id(o) not in self.visited:
            self.visited[id(o)] = o, True  # until it is known, for objects that hold themselves
            children = children_of(o)
            if isinstance(o, nn.Module):  # its own dictionaries are copied, their elements may be shared
                own = [v for k, v in vars(o).items() if k in INTERNAL]
                children = [*(v for k, v in vars(o).items() if k not in INTERNAL), *(c for v in own for c in children_of(v))]
            holds = any([self._holds_modules(c) for c in children]) or isinstance(o, nn.Module)
            self.visited[id(o)] = o, holds
            if not holds: self.memo[id(o)] = o
        return self.visited[id(o)][1]

    def follow(self):
        "Use the memory that the user's tensors have now."
        for own, t in self.tensors: own.data = t.detach()
