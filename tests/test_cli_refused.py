"""What the command refuses: in one line that says what is wrong, before anything is written."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import references
from commands import answer, copy_of, elastic_law, printed, refused
from stubs.catalogue import CATALOGUE

# What is called, and a part of what is said. Words in capitals are those of SHORT.
REFUSED = r"""
inspekt                                  | No such command 'inspekt'
inspect                                  | Missing argument 'ARTIFACT|STUB'
inspect gone                             | there is no such folder
inspect aoti                             | artifacts below it: elasticity, promoted
inspect A creep                          | holds the model 'elasticity', not 'creep'
inspect aoti/elasticity_aoti.i creep     | no compiled model 'creep'; there are: elasticity
inspect A --device cuda                  | compiled leaves: cpu/float64
seal A gone                              | there is no such folder
doctor gone.i                            | gone.i
doctor A --device tpu                    | is not a torch device
doctor A --dtype float32                 | compiled leaves: cpu/float64
bench A --rows 1,x                       | is not a list of whole numbers
bench A --rows BIG                       | is not a list of whole numbers from 1 to
bench A --rows 1000000000000000          | takes more memory than there is
bench A --seconds 1e999                  | '1e999' is not a finite number
bench A --points a.npz --driver driver   | and so does --driver
params aoti/promoted --set promoted.E=1e999 --out no   | is not NAME=VALUE with a finite number
params aoti/promoted --set promoted.E=nan --out no     | is not NAME=VALUE with a finite number
params aoti/promoted --set promoted.E=-inf --out no    | is not NAME=VALUE with a finite number
params aoti/promoted --set promoted.E=True --out no    | is not NAME=VALUE with a finite number
params aoti/promoted --set promoted.E=1j --out no      | is not NAME=VALUE with a finite number
params aoti/promoted --set promoted.E= --out no        | is not NAME=VALUE with a finite number

verify A --rtol nan                      | 'nan' is not a finite number
verify A --seed BIG                      | is not in the range
verify A --source-model law              | Give that file as well: --against INPUT.i
verify A --points a.npz --scale strain=1 | and so does --driver or --scale
verify A --golden a --points a.npz       | --golden says which points to take
verify A --against gone.i                | gone.i: no such file. Give the input file that was
verify A --against binary.i              | binary.i
verify A --against elasticity.i --source-model nothing | no block [Models/nothing]; in [Models] there are: elasticity
verify A --against aoti/elasticity_aoti.i              | is compiled itself
verify A --against viscoplasticity.i --source-model hooke | is not what was compiled
verify A --points wrong.npz              | 'strain' has shape (2, 5), expected (rows, 6)
verify A --points other.npz              | has no strain; the model's inputs are strain, and the file has stress
verify A --points text.pt                | is not a file with a tensor per input
verify A --points binary.i               | expected one of .npz, .pt, .safetensors
verify A --scale stress=1                | no input stress
verify aoti/elasticity_aoti.i --driver drivr           | in [Drivers] there are: driver
verify A --plot a.bmp                    | expected one of .png, .svg, .pdf
verify A --plot none/a.png               | cannot be written
verify A --record aoti                   | is a folder
verify aoti/viscoplasticity --golden golden.safetensors   | is of another model ('elasticity'), not of 'viscop
verify A --golden params.safetensors     | is not a golden file
verify A --golden damaged.safetensors    | is not a golden file
verify A --golden gone.safetensors       | cannot be read
verify A --golden aoti                   | cannot be read
verify aoti/viscoplasticity --scale strain=1e200 --rows 2 | converges at none of the 2 points
verify bare/elasticity                   | there is nothing to compare

run STUB nobody                          | no block [Drivers/nobody]; in [Drivers] there are: driver
run gone.i driver                        | no such file
run STUB driver --set E=1                | unknown 'E'
run STUB driver --set promoted.E=stiff   | is not NAME=VALUE with a finite number
run STUB driver --set promoted.E=1 --set promoted.E=2  | is given twice
run STUB driver save_as=x                | is not PATH:=VALUE
run STUB driver --out a.txt              | expected one of .pt, .npz, .csv, .nc
run STUB driver --out none/a.npz         | cannot be written
run STUB driver Drivers/driver/save_as:=none/a.pt      | a.pt: cannot be written
run STUB driver Drivers/driver/save_as:=aoti           | is a folder
run STUB driver "Tensors/times/expr:='Scalar(1/0)'"    | [Drivers/driver]
run law.i driver --set promoted.E=1      | only a compiled model
run law.i driver "Tensors/times/expr:='Scalar(torch.zeros(0))'" "Tensors/strains/expr:=NONE" | has no steps
run names.i driver                       | @time; names that begin with @ are those of the result

plot other.npz --out a.png               | is not a result
plot other.pt --out a.png                | is not a result
plot other.csv --out a.png               | is not a result
plot text.pt --out a.png                 | is not a result
plot binary.csv --out a.png              | is not a result
plot huge.csv --out a.png                | is not a result
plot gone.npz --out a.png                | cannot be read (No such file or directory)
plot result.npz --out a.bmp              | expected one of .png, .svg, .pdf
plot result.npz --out none/a.png         | cannot be written
plot result.npz --out a.png --y stress.zx     | 'stress.zx' is not in this result: there are @time, @step; and of
plot result.npz --out a.png --y @time.vonmises | '@time.vonmises' is not in this result
plot result.npz --out a.png --y stress[0].xx  | 'stress' has no sites
plot result.npz --out a.png --y stress.       | is not the name of a variable
plot result.npz --out a.png --label heat      | 'heat' is not in this result
plot result.npz --out a.png --row 3           | there is no point 3; the points are 0 to 1
plot result.npz --out a.png --y stress.xx --ylabel a --ylabel b | --ylabel is given 2 times, for 1

serve                                    | give an artifact or a stub
serve gone                               | there is no such folder
serve A --name x                         | 'x' is not NAME=PATH
serve A --name elasticity=A              | two models have the name 'elasticity'
serve --name a=A --name a=aoti/promoted  | 'a' is given twice
serve A --parameters steel=FILE          | there is no model 'steel'; there are elasticity
serve --name a/b=A                       | 'a/b', which no address can have
serve A --request-rows 100000            | Raise queue_rows, or lower request_rows
serve A --body-bytes 300000000           | bodies_bytes (--bodies-bytes) is 268435456
serve A --json                           | --json goes with --check
serve A --host 0.0.0.0                   | 0.0.0.0 is reached from other machines, and there is no token
serve A --host 0.0.0.0 --no-token        | there is no seal of
serve A --host no.such.host.invalid      | is no address of this machine
serve A --host 203.0.113.7 --no-token --allow-unsealed | cannot listen on 203.0.113.7:8080
"""
SHORT = {
    "A": "aoti/elasticity",
    "STUB": "aoti/promoted_aoti.i",
    "BIG": "1" + "0" * 30,
    "NONE": "'SR2(torch.zeros(0, 2, 6))'",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, and files that are right and wrong."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("elasticity", "promoted", "viscoplasticity"):
        copy_of(name, folder / "aoti")
    references.edited(references.case("elasticity"), folder / "bare", lambda metadata: metadata.update(derivatives=[]))
    for name in ("elasticity", "viscoplasticity"):
        shutil.copy(CATALOGUE[name].path, folder)
    elastic_law(folder / "names.i", stress="@time")
    law = elastic_law(folder / "law.i")
    answer("run", law, "driver", "--out", folder / "result.npz")
    np.savez(folder / "wrong.npz", strain=np.zeros((2, 5)))
    np.savez(folder / "other.npz", stress=np.zeros((2, 6)))
    torch.save({"weights": torch.ones(2)}, folder / "other.pt")
    for file, content in (
        ("other.csv", b"a,b\n1,2\n"),
        ("text.pt", b"no tensors"),
        ("binary.csv", b"\xff"),
        # Its last line claims more points than it has, and than there is memory for.
        ("huge.csv", b"@step,@point,t\n0,0,1\n99999,99999,2\n"),
        ("binary.i", b"\x00\xff[Models]\n"),
    ):
        (folder / file).write_bytes(content)
    golden = folder / "golden.safetensors"
    answer("verify", folder / "aoti/elasticity", "--record", golden, "--rows", 2)
    (folder / "damaged.safetensors").write_bytes(golden.read_bytes()[:-8])
    references.case("promoted").model.save_parameters(folder / "params.safetensors")
    return folder


@pytest.mark.parametrize("line", [line for line in REFUSED.splitlines() if line])
def test_wrong_use_is_refused(line: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    call, _, said = line.partition(" | ")
    words = [re.sub(r"\b[A-Z]+$", lambda found: SHORT.get(found[0], found[0]), word) for word in shlex.split(call)]
    before = sorted(place.rglob("*"))
    out, err = printed(*words, status=2)
    assert said.strip() in err and (out == "" or "--json" in words)
    # An error of ours is one line; where the command line itself is wrong, click says how it is used.
    assert len(err.strip().splitlines()) == 1 or err.startswith("Usage:")
    # A service has no document.
    assert words[0] == "serve" or said.strip() in refused(*words)
    assert sorted(place.rglob("*")) == before
