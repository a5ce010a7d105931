"""Compile the machine code for no processor in particular: `python -m machine.emit TARGET`.

The build of the package runs this; whoever changes a source runs it too. numba must be there, torch need not. What
comes of it is a file of LLVM's code, with a line before it that says what it is made of.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import llvmlite
import numba
from llvmlite import binding, ir

from neml2_aoti_plugin._solve import code_file

from . import calls, newton

ENTRIES = {"solve_block": newton.solve_block, "call_graph": calls.call_graph}


def emit() -> bytes:
    """The content of the file."""
    whole = None
    for name, function in ENTRIES.items():
        function.compile("int64(int64)")
        (compiled,) = function.overloads.values()
        module = binding.parse_assembly(compiled.library.get_llvm_str())
        module.get_function(compiled.fndesc.llvm_func_name).name = name
        for other in module.functions:
            # The rest is of this module alone, so that nothing unused is left.
            if not other.is_declaration and other.name != name:
                other.linkage = "internal"
        if whole is None:
            whole = module
        else:
            whole.link_in(module)
    assert whole is not None
    power = binding.parse_assembly(str(_power()))
    power.triple, power.data_layout = whole.triple, whole.data_layout
    whole.link_in(power)
    whole.verify()
    builder = binding.create_pass_builder(_any_processor(), binding.create_pipeline_tuning_options(speed_level=0))
    passes = binding.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(whole, builder)
    head = {
        "sources": code_file.sources(),
        "llvm": list(binding.llvm_version_info),
        "numba": numba.__version__,
        "llvmlite": llvmlite.__version__,
    }
    bitcode: bytes = whole.as_bitcode()
    return json.dumps(head).encode() + b"\n" + bitcode


def _power() -> ir.Module:
    """The method of a proxy executor that gives the third tensor what torch's power of the first two is.

    It has the convention of C. Behind the address of its methods the object has those of torch's functions that take a
    power, assign a tensor, and delete one.
    """
    word, number = ir.IntType(64), ir.IntType(32)
    module = ir.Module()
    method = ir.Function(module, ir.FunctionType(ir.VoidType(), [word, number, number, word, number, word]), "power")
    builder = ir.IRBuilder(method.append_basic_block())

    def words(at: Any, first: int) -> list[Any]:
        start = builder.inttoptr(at, word.as_pointer())
        return [builder.load(builder.gep(start, [ir.Constant(word, first + k)])) for k in range(3)]

    def call(at: Any, *arguments: Any) -> Any:
        kind = ir.FunctionType(number, [word] * len(arguments)).as_pointer()
        return builder.call(builder.inttoptr(at, kind), arguments)

    power, assign, delete = words(method.args[0], 1)
    base, exponent, result = words(method.args[5], 0)
    slot = builder.alloca(word)
    failed = call(power, base, exponent, builder.ptrtoint(slot, word))
    # Without a result the graph finds its tensor unset, and fails.
    with builder.if_then(builder.icmp_signed("==", failed, ir.Constant(number, 0))):
        found = builder.load(slot)
        call(assign, found, result)
        call(delete, found)
    builder.ret_void()
    return module


def _any_processor() -> binding.TargetMachine:
    binding.initialize_native_target()
    return binding.Target.from_default_triple().create_target_machine()


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else code_file.PATH).write_bytes(emit())
