"""The operator that graphs of neml2 call by name, for graphs that are called by their C interface.

A graph calls an operator through a *proxy executor*: a C++ object with a virtual method. Power laws list
`neml2::opaque_pow(base, exponent)`, which is torch's power; the object here has that as machine code, without the
interpreter.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from .c_interface import Unavailable, address, function, libtorch

_CALL = "aoti_torch_proxy_executor_call_function"
_POWER = "aoti_torch_cpu_pow_Tensor_Tensor"
# More entries than the table of the method's class has.
_ENTRIES = 8

_KINDS: tuple[Any, ...] = (
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_void_p,
)
_Method = ctypes.CFUNCTYPE(None, *_KINDS)
# What the machine code and the object lie in; they are needed as long as the process lives.
_kept: list[Any] = []


@cache
def power_executor() -> int:
    """The address of a proxy executor whose only operator is the power."""
    entry = _entry()
    table = (ctypes.c_void_p * _ENTRIES)()
    table[entry] = _machine_code()
    executor = (ctypes.c_void_p * 2)(ctypes.addressof(table))
    _kept.extend((table, executor))
    return ctypes.addressof(executor)


def _entry() -> int:
    """Find out which entry of the table torch calls: each notes what it is called with, which harms nothing."""
    calls: list[tuple[Any, ...]] = []

    def note(entry: int) -> Any:
        return _Method(lambda *arguments: calls.append((entry, *arguments)))

    notes = [note(entry) for entry in range(_ENTRIES)]
    table = (ctypes.c_void_p * _ENTRIES)(*map(address, notes))
    executor = (ctypes.c_void_p * 2)(ctypes.addressof(table))
    call = function(libtorch(), _CALL)
    given = (ctypes.addressof(executor), 7, 3, 0x1000, 5, 0x2000)
    failed = call(*(kind(value) for kind, value in zip(_KINDS, given, strict=True)))
    if failed or len(calls) != 1 or calls[0][1:] != given:
        raise Unavailable("torch does not call a proxy executor as expected")
    return int(calls[0][0])


def _machine_code() -> int:
    """The address of the method: it gives the third tensor what torch's power of the first two is."""
    try:
        from llvmlite import binding, ir
    except Exception as error:
        raise Unavailable(f"llvmlite cannot be imported ({type(error).__name__}: {error})") from None
    power, assign, delete = (
        address(function(libtorch(), name))
        for name in (_POWER, "aoti_torch_assign_tensors", "aoti_torch_delete_tensor_object")
    )
    word, number = ir.IntType(64), ir.IntType(32)
    module = ir.Module()
    method = ir.Function(module, ir.FunctionType(ir.VoidType(), [word, number, number, word, number, word]), "power")
    builder = ir.IRBuilder(method.append_basic_block())
    tensors = builder.inttoptr(method.args[5], word.as_pointer())
    base, exponent, result = (builder.load(builder.gep(tensors, [ir.Constant(word, k)])) for k in range(3))
    slot = builder.alloca(word)

    def call(at: int, *arguments: Any) -> Any:
        kind = ir.FunctionType(number, [word] * len(arguments)).as_pointer()
        return builder.call(builder.inttoptr(ir.Constant(word, at), kind), arguments)

    failed = call(power, base, exponent, builder.ptrtoint(slot, word))
    # Without a result the graph finds its tensor unset, and fails.
    with builder.if_then(builder.icmp_signed("==", failed, ir.Constant(number, 0))):
        found = builder.load(slot)
        call(assign, found, result)
        call(delete, found)
    builder.ret_void()
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    machine = binding.Target.from_default_triple().create_target_machine()
    # Its sections side by side, as in `_solve/machine_code.py`.
    engine = binding.create_mcjit_compiler(parsed, machine, use_lmm=True)
    engine.finalize_object()
    _kept.append(engine)
    return int(engine.get_function_address("power"))
