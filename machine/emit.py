"""Compile the machine code for no processor in particular: `python -m machine.emit TARGET`.

The build of the package runs this; whoever changes a source runs it too. numba must be there, torch need not. What
comes of it is a file of LLVM's code, with a line before it that says what it is made of.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import llvmlite
import numba
from llvmlite import binding

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


def _any_processor() -> binding.TargetMachine:
    binding.initialize_native_target()
    return binding.Target.from_default_triple().create_target_machine()


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else code_file.PATH).write_bytes(emit())
