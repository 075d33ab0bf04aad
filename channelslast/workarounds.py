"What PyTorch itself gets wrong in channels last, and the way around it."
from torch import nn

__all__ = ['overruns', 'unstrided', 'replace_forwards']

BLOCK = 16  # channels that oneDNN's kernel takes at a time: 16 with AVX-512, 8 with AVX2


def overruns(m: nn.Module) -> bool:
    """Does this layer's backward pass in channels last, on a CPU, write past its memory?

    oneDNN's gradient of a 1×1 convolution's weights does, with a stride, without padding and with fewer input channels
    than a block: wrong gradients, a crash or a hang (https://github.com/uxlfoundation/oneDNN/issues/6035). The first
    layers of RepVGG-like networks, MobileOne among them, are such."""
    return (isinstance(m, nn.Conv2d) and m.in_channels < BLOCK and m.groups == 1 and set(m.kernel_size) == {1}
            and max(m.stride) > 1 and m.padding in ('valid', (0, 0)))


def unstrided(m: nn.Conv2d, forward):
    """`forward` of a 1×1 convolution, without stride, on the pixels that the stride would have left: the same by a safe
    kernel."""
    def _forward(x, *args, **kwargs):
        h, w = stride = m.stride
        m.stride = 1, 1
        try: return forward(x[..., ::h, ::w], *args, **kwargs)
        finally: m.stride = stride
    return _forward


def replace_forwards(
    modules,
    wrap, # `wrap(module, forward)` makes the new forward
    made: dict, # Keeps them for the next time: to a compiled model, a new function is a reason to compile again
): # A function that puts the old ones back
    "Replace the modules' forwards, on the instances alone."
    replaced = [(vars(m), vars(m).get('forward')) for m in modules]
    for m in modules:
        if (key := (m, m.forward)) not in made: made[key] = wrap(m, m.forward)
        vars(m)['forward'] = made[key]
    def _undo():
        for own, forward in replaced:
            if forward is None: own.pop('forward', None)
            else: own['forward'] = forward
    return _undo
