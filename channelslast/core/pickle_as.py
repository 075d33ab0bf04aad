"Pickle callbacks as their fastai base classes."
import copyreg
from copy import deepcopy


def pickle_as(base):
    """Class decorator: instances pickle as `base`, fastai's own class, so an exported Learner also loads where this
    library is not installed. Copies keep their class."""
    def _decorate(cls):
        own = [k for c in cls.__mro__[:cls.__mro__.index(base)] for k in vars(c)]
        fit_state = {k for k in own if k.startswith('_') and not k.startswith('__')}  # includes functions
        def __reduce_ex__(self, protocol):
            if type(self) is not cls: return object.__reduce_ex__(self, protocol) # a user's own subclass
            state = object.__getstate__(self) or {}
            state = {k: v for k, v in state.items() if k not in fit_state}
            return copyreg._reconstructor, (base, object, None), state
        def __copy__(self):
            new = type(self).__new__(type(self))
            new.__dict__.update(self.__dict__)
            return new
        def __deepcopy__(self, memo):
            new = memo[id(self)] = type(self).__new__(type(self))
            new.__dict__.update(deepcopy(self.__dict__, memo))
            return new
        cls.__reduce_ex__, cls.__copy__, cls.__deepcopy__ = __reduce_ex__, __copy__, __deepcopy__
        return cls
    return _decorate
