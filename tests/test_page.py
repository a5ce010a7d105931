"""The page at `/`, in a real browser."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import references
from neml2_aoti_plugin.model import Model
from serving import Service, artifact, started

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="there is no Chromium: apt-get install chromium chromium-driver",
    ),
]

# Too few iterations for steps beyond the elastic ones.
FEW = "\n[Solvers]\n  [few]\n    type = Newton\n    max_its = 2\n  []\n[]\n"
TOKEN = "a-token"
# Of the page's numbers against those of the same calls here.
CLOSE = 1e-11


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two artifacts; one of them again with a solver that fails, and also with a driver that has initial values."""
    folder, case = tmp_path_factory.mktemp("page"), references.case("viscoplasticity")
    entry = f"artifact_path = '{case.artifact}'\n    solver = few"
    text = case.file.read_text(encoding="utf-8").replace("artifact_path = 'viscoplasticity'", entry) + FEW
    initial = "ic_Scalar_names = 'equivalent_plastic_strain'\n    ic_Scalar_values = '0.25'\n    type = TransientDriver"
    driven = text.replace("type = TransientDriver", initial)
    assert driven != text
    arguments: list[object] = [artifact("elasticity"), case.artifact]
    for name, content in (("few", text), ("driven", driven)):
        (folder / f"{name}_aoti.i").write_text(content, encoding="utf-8")
        arguments += ["--name", f"{name}={folder / name}_aoti.i"]
    with started(folder / "log", arguments) as found:
        yield found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    profile = f"--user-data-dir={tmp_path_factory.mktemp('profile')}"
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", profile):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, service: Service) -> Any:
    browser.set_window_size(1100, 900)
    browser.get(f"http://{service.place}/")
    browser.get_log("browser")
    assert "steps in" in wait(browser)
    return browser


def wait(browser: Any) -> str:
    """Wait until the page has a result; gives what it tells of it."""
    from selenium.webdriver.support.ui import WebDriverWait

    def told(driver: Any) -> str:
        text: str = driver.execute_script("return document.getElementById('status').textContent")
        return "" if text.endswith("...") else text

    found: str = WebDriverWait(browser, 90).until(told)
    return found


def put(browser: Any, **values: object) -> str:
    """Change fields as a person does, one after the other; gives what the page tells in the end."""
    for name, value in values.items():
        browser.execute_script(
            "document.getElementById('status').textContent = '';"
            "const field = document.getElementById(arguments[0]); field.value = arguments[1];"
            "field.dispatchEvent(new Event('input', {bubbles: true}));",
            name,
            str(value),
        )
        wait(browser)
    return wait(browser)


def curve(browser: Any, name: str, component: int) -> list[list[float]]:
    """Time, driven component and an output of each step, as the page has them."""
    found: list[list[float]] = browser.execute_script(
        "return result.map(step => [...step.point, step.outputs.get(arguments[0])[arguments[1]]])", name, component
    )
    return found


def show(browser: Any, what: str) -> list[float]:
    """Choose what is drawn, and give its values."""
    found: list[float] = browser.execute_script(
        "document.getElementById('shown').value = arguments[0]; draw();"
        "return result.map(step => shown().value(step.outputs))",
        what,
    )
    return found


def text_of(browser: Any, element: str) -> str:
    found: str = browser.find_element("id", element).text
    return found


def stiffness() -> torch.Tensor:
    """Of the elastic model, `(6, 6)`."""
    strain = torch.zeros(1, 6, dtype=torch.float64)
    return Model(artifact("elasticity")).jacobian({"strain": strain}, expand=True)[1]["stress"]["strain"][0]


def test_an_elastic_ramp_is_a_straight_line(page: Any) -> None:
    assert put(page, model="elasticity", steps=40, amplitude=-2, history="ramp").startswith("40 steps")
    steps = curve(page, "stress", 0)
    assert len(steps) == 40 and steps[-1][1] == pytest.approx(0.01)
    expected = [float(stiffness()[0, 0]) * step[1] for step in steps]
    assert [step[2] for step in steps] == pytest.approx(expected, rel=1e-12)
    points = page.execute_script("return document.querySelector('#response polyline').getAttribute('points')").split()
    first, middle, last = (tuple(map(float, points[i].split(","))) for i in (0, len(points) // 2, -1))
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in ((first, middle), (middle, last))]
    assert slopes[0] < 0 and slopes[0] == pytest.approx(slopes[1], rel=1e-2)
    # An explicit model has no iterations to show.
    assert not page.find_element("id", "iterations").is_displayed()


def test_a_cycle_of_shear_is_the_march_of_the_model(page: Any) -> None:
    put(page, model="viscoplasticity", history="cycle", steps=30, cycles=1, component="xy", rate=-3)
    steps = curve(page, "stress", 5)
    assert max(step[1] for step in steps) == pytest.approx(0.01) and min(s[1] for s in steps) == pytest.approx(-0.01)
    assert steps[-1][1] == pytest.approx(0.0, abs=1e-15)
    model = Model(artifact("viscoplasticity"))
    past = {name: torch.zeros(1, *known.natural_shape, dtype=torch.float64) for name, known in model.inputs.items()}
    for time, shear, stress in steps:
        inputs = {name: past[name] for name in model.inputs if "~" in name}
        inputs["t"] = torch.full((1,), time, dtype=torch.float64)
        inputs["strain"] = torch.zeros(1, 6, dtype=torch.float64)
        # The page takes and shows tensor shears; the model has Mandel's.
        inputs["strain"][0, 5] = shear * math.sqrt(2.0)
        outputs = model.forward(inputs)
        assert stress == pytest.approx(float(outputs["stress"][0, 5]), rel=1e-9, abs=1e-9)
        past = {f"{name}~1": value for name, value in {**inputs, **outputs}.items() if "~" not in name}
    assert page.find_element("id", "iterations").is_displayed()
    assert len(page.find_elements("css selector", "#iterations rect")) == len(steps)
    assert not [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"]


def test_it_begins_as_the_driver_of_the_stub_does(page: Any) -> None:
    put(page, model="driven")
    chosen = page.execute_script("return ['driven', 'component', 'shown'].map(id => document.getElementById(id).value)")
    assert chosen == ["strain", "xx", "stress\n0"]
    settings = page.execute_script("return settings()")
    # The first point of the driver is pulled to 3 % in 30 s.
    assert settings["amplitude"] == pytest.approx(0.03) and settings["rate"] == pytest.approx(0.001)
    assert show(page, "equivalent_plastic_strain\n0")[0] == pytest.approx(0.25)
    assert "driver" in text_of(page, "origin")
    # Of an artifact without its stub, nothing is known.
    put(page, model="viscoplasticity")
    assert "Nothing is known" in text_of(page, "origin")


@pytest.mark.parametrize(("model", "history"), [("elasticity", "ramp"), ("viscoplasticity", "cycle")])
def test_uniaxial_stress(page: Any, model: str, history: str) -> None:
    put(page, model=model, history=history, steps=20)
    confined = max(show(page, "stress\n0"))
    put(page, others="free")
    stresses = page.execute_script("return result.map(step => [...step.outputs.get('stress')])")
    largest = max(stress[0] for stress in stresses)
    assert 0 < largest < 0.8 * confined
    assert all(abs(x) < 1e-7 * largest for stress in stresses for x in stress[1:])
    # In this state of stress, von Mises is the stress itself.
    assert show(page, "stress\nsize") == pytest.approx([abs(stress[0]) for stress in stresses], rel=1e-6)
    lateral, axial = show(page, "strain\n1"), show(page, "strain\n0")
    assert axial == pytest.approx([step[1] for step in curve(page, "stress", 0)], abs=1e-15)
    told = text_of(page, "told")
    assert "(uniaxial stress)" in told and f"yy = {lateral[-1]:#.4g}" in told
    if model == "elasticity":
        compliance = torch.linalg.inv(stiffness())
        assert stresses[-1][0] == pytest.approx(axial[-1] / float(compliance[0, 0]), rel=1e-9)
        assert lateral[-1] == pytest.approx(stresses[-1][0] * float(compliance[1, 0]), rel=1e-9)


def test_uniaxial_stress_is_not_offered_without_its_derivative(page: Any) -> None:
    put(page, model="few")
    assert page.execute_script("return stressOf(drivenPort()).name") == "stress"
    page.execute_script("model.parameters.operations.jacobian.outputs = []; chooseDriven()")
    assert not page.find_element("id", "others").is_displayed()
    assert "neml2-compile ... -d stress:strain" in text_of(page, "others-note")


@pytest.mark.parametrize("kind", ["curl", "python"])
def test_the_last_call_as_a_program(page: Any, kind: str) -> None:
    if kind == "curl" and not shutil.which("curl"):
        pytest.skip("there is no curl")
    put(page, model="viscoplasticity", history="hold", steps=10)
    wanted = page.execute_script("return [...result.at(-1).outputs.get('stress')]")
    page.find_element("id", kind).click()
    program = ["bash" if kind == "curl" else sys.executable, "-c", text_of(page, "code")]
    told = subprocess.run(program, capture_output=True, text=True, check=True, timeout=60).stdout
    if kind == "curl":
        found = {output["name"]: output["data"] for output in json.loads(told)["outputs"]}["stress"]
    else:
        found = json.loads(*re.findall(r"^stress \[1, 6\] (.*)$", told, re.MULTILINE))
    assert found == pytest.approx(wanted, rel=CLOSE, abs=CLOSE)


def test_it_fits_a_phone_and_asks_nobody_else(page: Any, service: Service) -> None:
    page.set_window_size(500, 800)
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        page.refresh()
        assert "steps in" in wait(page)
        width, shown = page.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert width <= shown == 360
        asked = page.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
        assert asked and all(name.startswith(f"http://{service.place}/") for name in asked)
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_step_that_fails_is_told(page: Any) -> None:
    told = put(page, model="few", history="ramp", amplitude=-2)
    assert re.match(r"step \d+ failed: not converged; take more steps", told)
    assert page.find_element("id", "status").get_attribute("class") == "bad"
    # What came before it is shown.
    assert 0 < len(curve(page, "stress", 0)) < 60
    assert re.match(r"step \d+ failed: not converged", put(page, others="free"))
    assert 0 < len(curve(page, "stress", 0)) < 60


def test_the_token(browser: Any, tmp_path: Path) -> None:
    with started(tmp_path, [artifact("elasticity")], variables={"NEML2_AOTI_SERVE_TOKEN": TOKEN}) as service:
        browser.get(f"http://{service.place}/")
        assert "token is needed" in wait(browser)
        browser.execute_script("document.getElementById('status').textContent = ''")
        browser.find_element("id", "token").send_keys(TOKEN, "\n")
        assert "steps in" in wait(browser)
        browser.find_element("id", "curl").click()
        assert TOKEN not in text_of(browser, "code") and "$TOKEN" in text_of(browser, "code")
