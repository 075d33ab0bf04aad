"""OpenVINO and ONNX Runtime, which compute on CPUs what `torch.compile` has traced.

PyTorch's guards decide which calls the traced graph is right for. Converters get it as TorchScript, for any size: of
PyTorch's two exports this one takes seconds, and both runtimes know it from PyTorch 2.8 to 2.15."""
import io
import os
import sys
import threading
from collections import namedtuple
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from fastcore.basics import noop
from torch import SymInt, Tensor, nn

from ..core.openmp import end_waiting_threads
from .convertible import check_numbers, check_operations, limits_of
from .prepared_model import NotPrepared

Backend = namedtuple('Backend', 'name packages convert')


def missing_packages(backend: str) -> str: # `'pip install …'`, or `''` if nothing is missing
    "How to install what a backend needs and this environment lacks."
    packages = BACKENDS[backend].packages
    return '' if all(map(find_spec, packages)) else f"pip install {' '.join(packages)}"


def check_backend(backend: str):
    "Raise a `ValueError` if there is no such backend, or an `ImportError` if its packages are missing."
    if backend not in [*BACKENDS]:
        raise ValueError(f"CompilePredictions(backend={backend!r}): use {', '.join(map(repr, BACKENDS))}")
    install = missing_packages(backend)
    if install: raise ImportError(f'{BACKENDS[backend].name} is not installed: `{install}`')


class Flat(nn.Module):
    "A traced graph that takes tensors only. Its other inputs are sizes of these."
    def __init__(self, graph):
        super().__init__()
        inputs = [n.meta['example_value'] for n in graph.graph.nodes if n.op == 'placeholder']
        self.net, self.shapes = graph, [tuple(t.shape) for t in inputs if isinstance(t, Tensor)]
        where = {str(n): (i, d) for i, shape in enumerate(self.shapes) for d, n in enumerate(shape)}
        self.sizes = [None if isinstance(o, Tensor) else where[str(o)] for o in inputs]

    def forward(self, *tensors):
        sizes, rest = [o and tensors[o[0]].shape[o[1]] for o in self.sizes], iter(tensors)
        args = [next(rest) if o is None else n for o, n in zip(self.sizes, sizes)]
        return tuple(self.net.forward(*args))  # its `__call__` prints the traceback of an error

    def any_size(self, shape) -> list: return [d for d, n in enumerate(shape) if isinstance(n, SymInt)]


class Runtime:
    """A graph, converted. Outputs are new tensors of the dtypes that PyTorch gives. Under autocast the runtime gets the
    graph in fp32, and is asked for the half precision: OpenVINO uses it where the CPU has it."""
    def __init__(self, backend, graph, inputs):
        tensors = tuple(t.detach() for t in inputs if isinstance(t, Tensor))
        name = BACKENDS[backend].name
        if torch.float64 in {t.dtype for t in (*tensors, *graph.parameters(), *graph.buffers())}:
            raise NotPrepared(f'it computes in float64, and {name} in fp32')
        check_operations(graph, name)
        self.limits, self.finite, flat = limits_of(graph, name), None, Flat(graph).eval()
        half = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else torch.float32
        outs = [n.meta['example_value'] for n in next(n for n in graph.graph.nodes if n.op == 'output').args[0]]
        if not all(isinstance(o, Tensor) for o in outs): raise NotPrepared('it returns sizes of its input')
        self.dtypes, random = [o.dtype for o in outs], torch.get_rng_state()
        with torch.autocast('cpu', enabled=False):  # TorchScript casts by itself
            traced = torch.jit.trace(flat, tensors, check_trace=False, strict=False)
            if not torch.equal(random, torch.get_rng_state()): raise NotPrepared('it draws random numbers')
            self.run, self.any_size = BACKENDS[backend].convert(traced, tensors, flat, half), any(map(flat.any_size, flat.shapes))

    def __call__(self, *args):
        tensors = [t for t in args if isinstance(t, Tensor)]
        for t, limits in zip(tensors, self.limits, strict=True): check_numbers(t, limits)
        end_waiting_threads()
        outs = [*map(torch.from_numpy, self.run([t.numpy() for t in tensors]))]
        finite = all(o.sum().isfinite() or o.isfinite().all() for o in outs)  # the sum is faster
        if self.finite is None: self.finite = finite  # of the outputs that are compared
        if self.finite and not finite: raise NotPrepared('its outputs are infinite or NaN')  # PyTorch's may be finite
        return tuple(o.to(dtype) for o, dtype in zip(outs, self.dtypes, strict=True))


@contextmanager
def without_telemetry():
    """Import runtimes so that they neither send events nor keep files, as both would from the import on. ONNX Runtime does so
    since version 1.29. A user's own `ORT_DISABLE_TELEMETRY` counts."""
    names = [(sys.modules, 'openvino_telemetry', None), (os.environ, 'ORT_DISABLE_TELEMETRY', '1')]
    new = [(d, name) for d, name, value in names if name not in d and d.setdefault(name, value) == value]
    try: yield
    finally:
        for d, name in new: del d[name]


@cache
def openvino_core():
    """The process's only `openvino.Core`. Each one replaces the stack for signal handlers of the thread that first compiles with
    it. If several end in another order than they began, the stack left is freed memory, which the next signal overwrites."""
    import openvino
    return openvino.Core()


def _to_openvino(traced, tensors, flat, half):
    with without_telemetry(): import openvino
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder  # `convert_model` would send events
    manager = FrontEndManager()  # exists, like the decoder, until the graph is converted
    frontend, decoder = manager.load_by_framework('pytorch'), TorchScriptPythonDecoder(traced, example_input=tensors)
    model = frontend.convert(frontend.load(decoder))
    for o, t, shape in zip(model.inputs, tensors, flat.shapes, strict=True):
        node, dynamic = o.get_node(), flat.any_size(shape)
        node.set_element_type(openvino.Type(t.numpy().dtype))
        node.set_partial_shape(openvino.PartialShape([-1 if d in dynamic else n for d, n in enumerate(t.shape)]))
    model.validate_nodes_and_infer_types()
    hint = {torch.bfloat16: 'bf16', torch.float16: 'f16'}.get(half, 'f32')  # without one it chooses bf16 by itself
    compiled = openvino_core().compile_model(model, 'CPU', dict(INFERENCE_PRECISION_HINT=hint, PERFORMANCE_HINT='LATENCY',
                                                                INFERENCE_NUM_THREADS=torch.get_num_threads()))
    requests = threading.local()  # a request serves one thread at a time
    def _run(arrays):
        requests.own = vars(requests).get('own') or compiled.create_infer_request()
        return [*requests.own.infer(arrays, share_inputs=True).values()]  # copies of its outputs
    return _run


def _to_onnxruntime(traced, tensors, flat, half):
    with without_telemetry(): import onnxruntime
    sizes, file = {f'input_{i}': {d: f'size_{i}_{d}' for d in flat.any_size(o)} for i, o in enumerate(flat.shapes)}, io.BytesIO()
    switch = getattr(torch._C, '_jit_set_onnx_log_enabled', noop)  # PyTorch's exporter always turns its log on, which prints graphs
    switch(False)
    try:
        torch._C._jit_set_onnx_log_enabled = noop
        torch.onnx.export(traced, tensors, file, dynamo=False, input_names=[*sizes], dynamic_axes=sizes)
    finally: torch._C._jit_set_onnx_log_enabled = switch
    @cache
    def _session(shapes): # `()`: for any; a session for one size is up to 10% faster
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4
        options.add_session_config_entry('session.force_spinning_stop', '1')  # when it is done; otherwise Python is slower then
        for names, shape in zip(sizes.values(), shapes):
            for d, name in names.items(): options.add_free_dimension_override_by_name(name, shape[d])
        return onnxruntime.InferenceSession(file.getvalue(), options, providers=['CPUExecutionProvider'])
    first = tuple(tuple(t.shape) for t in tensors)
    used = {o.name for o in _session(first).get_inputs()}
    def _run(arrays):
        session = _session(first if tuple(a.shape for a in arrays) == first else ())
        return session.run(None, {k: a for k, a in zip(sizes, arrays) if k in used})
    return _run


BACKENDS = dict(inductor=Backend('PyTorch', (), None), openvino=Backend('OpenVINO', ('openvino',), _to_openvino),
                onnxruntime=Backend('ONNX Runtime', ('onnx', 'onnxruntime'), _to_onnxruntime))
