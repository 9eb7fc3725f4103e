"""Count the work of a GPU without one: kernels, bytes and FLOPs of code that runs on FakeTensors of cuda:0.

A kernel is an operator of eager PyTorch that is neither a view nor an allocation. Its bytes are those of the tensors it
reads and writes, each counted once. Caches, and copies inside cuBLAS and cuDNN, are not considered.
"""

import collections
import contextlib
import math
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten, sdpa = torch.ops.aten, torch.nn.functional.scaled_dot_product_attention
# The cost model of `Count.seconds`: an H100 (SXM), at the share of its peaks that large kernels usually reach.
BYTES_PER_SECOND, FLOPS_PER_SECOND, SECONDS_PER_KERNEL = 2.7e12, 450e12, 2.5e-6
NO_KERNEL = {"_unsafe_view", "detach", "alias", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty"}
NO_KERNEL |= {"new_empty_strided", "_fused_sdp_choice", "is_same_size", "record_stream", "is_pinned", "device"}
FOREACH_TYPES = [torch.Tensor, torch.nn.Parameter, FakeTensor]
WRITES_ONLY = {"copy_", "fill_", "zero_", "normal_", "uniform_", "exponential_"}


@contextlib.contextmanager
def fake_cuda():
    """Let code use CUDA tensors without data, with or without a GPU."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        mock.patch.object(torch.Tensor, "backward", backward),
        mock.patch("torch.utils._foreach_utils._foreach_supported_types", FOREACH_TYPES),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", _flash_attention),
    ):
        yield torch.device("cuda:0")


def _flash_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """Run attention as a GPU does; without one, PyTorch uses separate operators for FakeTensors."""
    if query.dtype == torch.float32 or attn_mask is not None:
        return sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]


def to_fake(model, device="cuda:0"):
    """Replace parameters and buffers with FakeTensors on the device, inside `fake_cuda`, and return the model."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    is_parameter = isinstance(tensor, torch.nn.Parameter)
                    tensors[name] = torch.nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
    return model


def backward(loss):
    """Run the backward pass in Python, node by node, because autograd's engine calls the CUDA driver."""
    waiting = collections.Counter()  # edges into each node without a gradient yet
    found, todo = {loss.grad_fn}, [loss.grad_fn]
    while todo:
        for child, _ in todo.pop().next_functions:
            if child is not None:
                waiting[child] += 1
                if child not in found:
                    found.add(child)
                    todo.append(child)
    gradients, ready = {loss.grad_fn: {0: torch.ones_like(loss)}}, [loss.grad_fn]
    while ready:
        node = ready.pop()
        inputs = gradients.pop(node, {})
        if hasattr(node, "variable"):
            node.variable.grad = inputs.get(0)
            continue
        call = node if callable(node) else node.apply  # C++ nodes are callable, an autograd.Function is not
        results = call(*(inputs.get(i) for i in range(1 + max(inputs, default=0))))
        results = results if isinstance(results, tuple) else (results,)
        for (child, index), gradient in zip(node.next_functions, results, strict=True):
            if child is None:
                continue
            if gradient is not None:
                metadata = child._input_metadata[index]
                gradient = gradient.sum_to_size(metadata.shape).to(metadata.dtype)  # as the engine does
                known = gradients.setdefault(child, {})
                known[index] = known[index] + gradient if index in known else gradient
            waiting[child] -= 1
            if not waiting[child]:
                ready.append(child)


class Count(TorchDispatchMode):
    """Count the work in a context.

    Attributes:
        kernels, bytes, flops: sums over the operators.
        seconds: estimate; for each kernel the longest of memory, arithmetic and launch time; not calibrated.
        reads: names of the operators at which the host waits for the device.
        by_operator: {name: [kernels, bytes]}.
        tensors: set of (dtype, shape) of all results on the device.
    """

    def __init__(self):
        super().__init__()
        self.kernels = self.bytes = self.flops = 0
        self.seconds = 0.0
        self.reads, self.tensors = [], set()
        self.by_operator = collections.defaultdict(lambda: [0, 0])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if _waits(name, args, kwargs):
            self.reads.append(name)
        result = func(*args, **kwargs)
        outputs = _on_device(result)
        self.tensors.update((tensor.dtype, tuple(tensor.shape)) for tensor in outputs)
        if not func.is_view and name not in NO_KERNEL and (outputs or _on_device((args, kwargs))):
            self._add(func, name, args, kwargs, result)
        return result

    def _add(self, func, name, args, kwargs, result):
        moved = _traffic(func, name, args, kwargs, result)
        count = flop_registry.get(func.overloadpacket)
        flops = count(*args, **kwargs, out_val=result) if count else 0
        self.kernels += 1
        self.bytes += moved
        self.flops += flops
        self.seconds += max(moved / BYTES_PER_SECOND, flops / FLOPS_PER_SECOND, SECONDS_PER_KERNEL)
        self.by_operator[name][0] += 1
        self.by_operator[name][1] += moved


def _waits(name, args, kwargs):
    """Return whether the host waits for the device: it reads a number, or copies without `non_blocking`."""
    if name in ("_local_scalar_dense", "nonzero"):
        return bool(_on_device((args, kwargs)))
    if name == "_to_copy" and not kwargs.get("non_blocking"):
        source, target = args[0].device, kwargs.get("device")
        return target is not None and torch.device(target).type != source.type
    if name == "copy_":
        return args[0].device.type != args[1].device.type and not (args[2:] and args[2]) and args[1].numel() > 1
    return False


def _on_device(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.device.type == "cuda"]


def _num_bytes(tensor):
    """Bytes of memory that hold a tensor; what `expand` repeats is there once."""
    shape_and_strides = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in shape_and_strides if stride) * tensor.element_size()


def _traffic(func, name, args, kwargs, result):
    """Bytes that an operator reads and writes."""
    inputs = _on_device((args, kwargs))
    moved = sum(_num_bytes(tensor) for tensor in {id(tensor): tensor for tensor in inputs}.values())
    values = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    written = [
        values[argument.name]
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write and argument.name in values
    ]
    if written:
        changed = sum(_num_bytes(tensor) for tensor in _on_device(written))
        # `out=` and plain writes do not read the old content.
        moved += 0 if name in WRITES_ONLY or func._schema.overload_name == "out" else changed
    else:
        moved += sum(_num_bytes(tensor) for tensor in _on_device(result))
    if name == "baddbmm" and args[0].numel() < result.numel():  # a bias is first copied into the result, then read
        moved += 2 * _num_bytes(result)
    return moved
