"""The service through HTTP: the protocol, its clients, parameters, failures, and what is answered meanwhile."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
import pytest

from neml2_aoti_plugin import ConvergenceError, Model
from neml2_aoti_plugin._cli.app import LIMITS, serve
from neml2_aoti_plugin.serve import Limits
from serving import Service, artifact, close, encode, infer, reference, same, started, step, strain, tensors

CLIENTS = Path(__file__).with_name("serve_clients.py")
ROOT = Path(__file__).resolve().parent.parent
STUBS = ("elasticity", "viscoplasticity", "promoted")
SERVED = [*STUBS, "calibration", "stiff"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    stiff = Model(artifact("promoted"))
    stiff.set_parameter("promoted.E", 2e5)
    stiff.save_parameters(folder / "stiff.safetensors")
    names = {"calibration": artifact("calibration"), "stiff": artifact("promoted")}
    arguments = [word for name, path in names.items() for word in ("--name", f"{name}={path}")]
    arguments += ["--parameters", f"stiff={folder / 'stiff.safetensors'}"]
    with started(folder, [*map(artifact, STUBS), *arguments]) as running:
        yield running
        assert running.stop() == 0


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    """Some of the same models in this process, as the reference."""
    return {name: Model(artifact(name)) for name in ("viscoplasticity", "promoted")}


# -- the protocol ----------------------------------------------------------------------------------------------------


def test_what_the_service_tells_of_itself(service: Service) -> None:
    told = service.get("/v2")
    assert told["name"] == "neml2-aoti" and "binary_tensor_data" in told["extensions"]
    assert service.get("/v2/health/live") == {"live": True} and service.get("/v2/health/ready") == {"ready": True}
    assert service.get("/v2/models") == {"models": SERVED}
    for path in ("/v2/models/viscoplasticity", "/v2/models/viscoplasticity/versions/1"):
        model = service.get(path)
        assert (model["name"], model["versions"]) == ("viscoplasticity", ["1"])
        shapes = {port["name"]: (port["datatype"], port["shape"]) for port in (*model["inputs"], *model["outputs"])}
        assert shapes["strain~1"] == ("FP64", [-1, 6])
        assert shapes["t"] == shapes["equivalent_plastic_strain"] == ("FP64", [-1])
        assert service.get(path + "/ready") == {"name": "viscoplasticity", "ready": True}
    extended = service.get("/v2/models/calibration")["parameters"]
    assert extended["promoted_parameters"].keys() == {"residual.overstress.sy", "residual.hardening.K"}
    assert list(extended["operations"]) == ["forward", "solve", "jacobian", "jvp", "param_jacobian", "param_vjp"]
    answer = service.infer("elasticity", strain(1), operation="param_vjp")
    assert answer.status == 400 and "expected one of forward, solve, jacobian, jvp for model" in answer.error
    assert "-p PARAMETER" in answer.error


def test_the_openapi_document_is_that_of_the_addresses(service: Service) -> None:
    document = service.get("/openapi.json")
    assert document["openapi"] == "3.1.0"
    for path, methods in document["paths"].items():
        address = path.replace("{model}", "elasticity").replace("{version}", "1")
        for method in ("get", "post"):
            answer = service.request(method.upper(), address, b"{}" if method == "post" else b"")
            # An evaluation of nothing is refused.
            expected = 405 if method not in methods else 400 if address.endswith("/infer") else 200
            assert answer.status == expected, (path, method, answer.body)
    assert document["paths"]["/v2/models/{model}"]["parameters"][0]["schema"]["enum"] == SERVED
    # Each reference leads somewhere.
    for path in re.findall(r'"\$ref": "#/(.*?)"', json.dumps(document)):
        place: Any = document
        for part in path.split("/"):
            place = place[part]


@pytest.mark.parametrize(
    ("method", "path", "status", "allowed", "said"),
    [
        ("GET", "/v2/models/steel", 404, None, "there is no model 'steel'; there are: elasticity,"),
        ("GET", "/v2/models/elasticity/versions/2", 404, None, "no version '2'; it has '1'"),
        ("POST", "/v2/models/steel/infer", 404, None, "there is no model 'steel'"),
        ("GET", "/v2/models/elasticity/infer", 405, {"POST"}, "POST"),
        ("POST", "/v2", 405, {"GET", "HEAD"}, "POST does nothing at '/v2'"),
        ("GET", "/v3", 404, None, "there is nothing at '/v3'"),
    ],
)
def test_addresses_that_there_are_not(
    service: Service, method: str, path: str, status: int, allowed: set[str] | None, said: str
) -> None:
    answer = service.request(method, path)
    assert answer.status == status and said in answer.error
    assert allowed is None or {*answer.headers["allow"].split(", ")} == allowed


@pytest.mark.parametrize("binary", [False, True])
def test_the_request_chooses_outputs_and_their_form(service: Service, binary: bool) -> None:
    outputs = [{"name": name, "parameters": {"binary_data": name != "stress"}} for name in ("stress:strain", "stress")]
    options = {"operation": "jacobian", "binary_data_output": not binary}
    body = encode(strain(2), binary, options, id="seven", outputs=outputs)
    answer = service.request("POST", infer("elasticity"), *body)
    told = answer.document
    assert (told["model_name"], told["model_version"], told["id"]) == ("elasticity", "1", "seven")
    assert [(output["name"], "data" in output) for output in told["outputs"]] == [
        ("stress:strain", False),
        ("stress", True),
    ]
    shapes = {name: array.shape for name, array in answer.arrays.items()}
    assert shapes == {"stress:strain": (2, 6, 6), "stress": (2, 6)}


def test_json_may_be_nested_and_hold_what_is_not_finite(service: Service) -> None:
    tensor: dict[str, Any] = {"name": "strain", "shape": [2, 6], "datatype": "FP64"}
    answer = service.post("elasticity", {"inputs": [{**tensor, "data": [[0.0] * 6, [1] * 6]}]})
    assert answer.status == 200 and answer.arrays["stress"][0].tolist() == [0.0] * 6
    # Python's json writes NaN, which JSON does not have; the answer has null in its place.
    document = {"inputs": [{**tensor, "data": [float("nan")] * 6 + [0.0] * 6}]}
    answer = service.post("elasticity", document)
    assert answer.status == 422 and answer.document["rows"] == [0]
    answer = service.post("elasticity", {**document, "parameters": {"operation": "solve"}})
    assert answer.document["outputs"][0]["data"] == [None] * 6 + [0.0] * 6


def test_requests_have_ids_and_the_log_has_no_tensors(service: Service) -> None:
    body, _ = encode({"strain": np.full((1, 6), 0.123456789)}, binary=False)
    answer = service.request("POST", infer("elasticity"), body, {"X-Request-Id": "of-mine"})
    assert answer.headers["x-request-id"] == "of-mine"
    other = service.request("POST", infer("elasticity"), body)
    assert other.headers["x-request-id"] not in ("", "of-mine")
    time.sleep(0.2)
    line = next(line for line in service.lines("request") if line["id"] == "of-mine")
    assert (line["status"], line["operation"], line["rows"], line["method"]) == (200, "forward", 1, "POST")
    assert line["ms"] > 0 and "0.123456789" not in service.log.read_text(encoding="utf-8")


# -- clients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", ["http", "aio", "kserve"])
def test_clients_of_the_protocol(client: str, service: Service, models: dict[str, Model]) -> None:
    if find_spec(package := "kserve" if client == "kserve" else "tritonclient") is None:
        pytest.skip(f"{package} is not installed")
    inputs, model = step(3), "viscoplasticity"
    text = json.dumps({name: array.tolist() for name, array in inputs.items()})
    command = [sys.executable, str(CLIENTS), client, service.place, model]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["live"] and found["ready"] and all(found["model_ready"]) and not found["absent_ready"]
    if client != "kserve":
        place = f"/v2/models/{model}"
        assert found["server"] == service.get("/v2") and found["model"] == service.get(place)
        assert found["config"] == service.get(f"{place}/config")
        assert [told["name"] for told in found["statistics"]["model_stats"]] == [model]
        assert [told["name"] for told in found["index"]] == SERVED
    wanted = reference(models[model], "solve", inputs)
    for mode in ("json", "binary"):
        assert found[mode]["id"] == "seven"
        close(np.array(found[mode]["stress"]), wanted["stress"])
        same({name: np.array(value, wanted[name].dtype) for name, value in found[mode]["all"].items()}, wanted)
    status, message = found["error"]
    assert status == "400" and "inputs lack 'strain~1', 't'" in message


def test_custom_parameters_are_passed_over(service: Service) -> None:
    """MLServer's clients tell content types with requests, inputs and outputs; others have their own."""
    given = {"name": "strain", "shape": [1, 6], "datatype": "FP64", "data": [1e-3] + [0.0] * 5}
    custom = {
        "inputs": [{**given, "parameters": {"content_type": "np"}}],
        "outputs": [{"name": "stress", "parameters": {"content_type": "np"}}],
        "parameters": {"content_type": "np", "headers": {"a": "b"}, "priority": 1, "timeout": 1000, "sequence_id": 7},
    }
    answer = service.post("elasticity", custom)
    assert answer.status == 200 and answer.document == service.post("elasticity", {"inputs": [given]}).document


def test_configuration_statistics_and_index(service: Service) -> None:
    """The forms of the protocol's extensions."""
    config = service.get("/v2/models/elasticity/versions/1/config")
    assert config["input"] == [{"name": "strain", "data_type": "TYPE_FP64", "dims": [6]}]
    assert config["output"] == [{"name": "stress", "data_type": "TYPE_FP64", "dims": [6]}]
    assert (config["name"], config["max_batch_size"]) == ("elasticity", 65536)

    def told() -> dict[str, Any]:
        (found,) = service.get("/v2/models/elasticity/stats")["model_stats"]
        return {**found, **found["inference_stats"]}

    before = told()
    assert service.infer("elasticity", strain(3)).status == 200
    assert service.infer("elasticity", {"strain": np.full((2, 6), np.nan)}).status == 422
    assert service.request("POST", infer("elasticity"), b"{").status == 400
    after = told()
    more = {name: after[name]["count"] - before[name]["count"] for name in ("success", "fail", "compute_infer")}
    assert more == {"success": 1, "fail": 2, "compute_infer": 2}
    assert after["inference_count"] - before["inference_count"] == 5
    assert after["success"]["ns"] > before["success"]["ns"]
    assert [found["name"] for found in service.get("/v2/models/stats")["model_stats"]] == SERVED
    index = service.request("POST", "/v2/repository/index", b"{}")
    assert json.loads(index.body) == [{"name": name, "version": "1", "state": "READY"} for name in SERVED]


# -- parameters and initial guesses ----------------------------------------------------------------------------------


def test_parameters_out_of_a_file_and_as_text(service: Service, models: dict[str, Model]) -> None:
    given = strain(2)
    told = service.get("/v2/models/stiff")["parameters"]["promoted_parameters"]
    assert told["promoted.E"] == {"shape": [], "value": 2e5}
    wanted = reference(models["promoted"], "forward", given, {"promoted.E": np.array(2e5)})
    same(service.infer("stiff", given).arrays, wanted)
    same(service.infer("promoted", given, parameter_overrides='{"promoted.E": 2e5}').arrays, wanted)


def test_initial_guesses_may_be_given(service: Service, models: dict[str, Model]) -> None:
    given, model = step(2), models["viscoplasticity"]
    told = service.get("/v2/models/viscoplasticity")["parameters"]["operations"]["forward"]["optional_inputs"]
    assert model.initial_guesses and [known["name"] for known in told] == list(model.initial_guesses)
    wanted = reference(model, "solve", given)
    known = {name: wanted[name] for name in model.initial_guesses if name in wanted}
    found = service.infer("viscoplasticity", {**given, **known}, operation="solve").arrays
    assert np.allclose(found["stress"], wanted["stress"], rtol=1e-6)
    assert (found["@iterations"] <= wanted["@iterations"]).all()


# -- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "outcome"),
    [("strain", np.nan, "diverged"), ("t", 0.0, "diverged"), ("strain", 1e9, "singular Jacobian")],
)
def test_rows_that_fail_are_named_as_in_python(
    name: str, value: float, outcome: str, service: Service, models: dict[str, Model]
) -> None:
    """Not finite, no time, or too far: the words of the model's own error, but for how to get the other rows."""
    given = step(4)
    given[name][[1, 3]] = value
    with pytest.raises(ConvergenceError) as raised:
        models["viscoplasticity"].forward(tensors(given))
    advice = str(raised.value).splitlines()[-1].removesuffix(" Model.solve returns the rows that converge.")
    answer = service.infer("viscoplasticity", given)
    assert answer.status == 422 and raised.value.rows.tolist() == answer.document["rows"] == [1, 3]  # type: ignore[attr-defined]
    assert answer.error.startswith(f"2 of 4 rows failed ({outcome}: 1, 3). {advice} The operation 'solve' answers")
    found = service.infer("calibration", given, operation="solve").arrays
    assert found["@converged"].tolist() == [True, False] * 2 and np.isnan(found["stress"][1]).all()
    words = service.get("/v2/models/calibration")["parameters"]["outcomes"]
    assert [words[code] for code in found["@outcome"]] == ["converged", outcome] * 2


@pytest.mark.parametrize("rows", [1, 4])
def test_results_that_are_not_finite_are_refused(rows: int, service: Service) -> None:
    """Where no solve fails: in a model of explicit segments alone. Its neighbours in the same call are right."""
    given = strain(rows)
    given["strain"][-1, 2] = np.inf
    for operation in ("forward", "jacobian", "jvp", "param_jacobian", "param_vjp"):
        beside = {"jvp": "tangent:strain", "param_vjp": "cotangent:stress"}.get(operation)
        more = {beside: np.ones((rows, 6))} if beside else {}
        answer = service.infer("promoted", {**given, **more}, operation=operation)
        assert answer.status == 422 and answer.document["rows"] == [rows - 1]
        assert f"1 of {rows} rows failed (not finite: {rows - 1}). 'strain' is not finite" in answer.error
    found = service.infer("promoted", given, operation="solve").arrays
    assert found["@outcome"].tolist() == [0] * (rows - 1) + [4] and np.isnan(found["stress"][-1]).all()
    assert np.isfinite(found["stress"][:-1]).all()


def test_others_are_answered_during_a_large_call(service: Service) -> None:
    """Other models between two of them, and what needs no model at once."""
    with ThreadPoolExecutor(3) as pool:
        given, answered = step(30000, 9, 2e-2), 0
        large = [pool.submit(lambda: service.infer("viscoplasticity", given, operation="solve")) for _ in range(12)]
        time.sleep(0.2)
        assert service.infer("elasticity", strain(1)).status == 200
        while not all(call.done() for call in large):
            assert service.request("GET", "/v2/health/ready").status == 200
            answered += 1
        assert answered > 2
        assert {call.result().status for call in large} == {200}


# -- documents and examples ------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "service.md").read_text(encoding="utf-8")


@pytest.mark.skipif(which("curl") is None, reason="there is no curl")
def test_the_examples_of_the_page(service: Service, tmp_path: Path) -> None:
    """Those for curl and for Python run as they stand, but for the port."""
    page = PAGE.replace("127.0.0.1:8080", service.place)
    (python,), shell = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("python", "sh"))
    assert len(shell) == 3
    for program in (*(["bash", "-ec", text] for text in shell), [sys.executable, "-c", python]):
        done = subprocess.run(program, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and (program[0] != "bash" or done.stdout.startswith("{")), (program, done)


def test_options_in_examples_and_documents_are_there() -> None:
    known = {option for parameter in serve.params for option in parameter.opts} | {"--help"}
    for file in ("Dockerfile", "neml2-aoti.service"):
        text = (ROOT / "examples" / "service" / file).read_text(encoding="utf-8").replace("\\\n", " ")
        (start,) = re.findall(r"^(?:ENTRYPOINT|ExecStart).*?serve(.*)$", text, re.MULTILINE)
        assert set(re.findall(r"--[a-z-]+", start)) <= known
    assert set(re.findall(r"`(--[a-z-]+)", PAGE)) <= known
    # The defaults that the help and the page tell are those of the code.
    limits = {f"--{name.replace('_', '-')}": value for name, value in vars(Limits()).items()}
    assert {option: float(*re.findall(r"\[([\d.]+)\]", text)) for option, _, text in LIMITS} == limits
    units = {"": 1, "KiB": 2**10, "MiB": 2**20}
    for option, told, unit in re.findall(r"^\| `(--[a-z-]+)` \|.*\| ([\d.]+)(?: ([KM]iB))? \|$", PAGE, re.MULTILINE):
        assert float(told) * units[unit] == limits[option], option
