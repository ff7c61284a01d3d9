"""The page's JavaScript gives Python's numbers, under Node and in a browser, and does what a reader asks of it."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trajshift.experiments.landscape as landscape
from tests.helpers.options import build
from tests.helpers.waiting import PATIENCE
from trajshift import Inner, MetaTrainer
from trajshift.algorithm.methods import resolve
from trajshift.experiments.landscape.himmelblau import Point
from trajshift.experiments.landscape.playground import MOMENTUM, playground_data, playground_html
from trajshift.report.page import Page

NUMERIC = Path(landscape.__file__).with_name("playground.js")
STARTS = [[5.0, 5.0], [1.3, 9.2], [12.0, 2.5], [-3.0, -2.0], [9.0, 13.5]]
DEFAULT: dict[str, Any] = {"horizon": 100, "rounds": 3, "innerLr": 0.05, "metaLr": 0.1}
OTHERS = [
    {"horizon": 30, "rounds": 2, "innerLr": 0.02, "metaLr": 0.3},
    {"horizon": 7, "rounds": 5, "innerLr": 0.01, "metaLr": 0.05},
]
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
DIVERGENT = {"method": "trajectory-shifting", "start": [5.0, 5.0], **DEFAULT, "innerLr": 0.5}


# -- under Node ------------------------------------------------------------------------------------------------

SCRIPT = """
const { Landscape, Run } = require(process.argv[1]);
const { data, runs, points } = JSON.parse(require("fs").readFileSync(0));
const landscapes = {};
for (const name in data.landscapes) landscapes[name] = new Landscape(data.landscapes[name]);
const read = ({ method, variant = "published", ...options }) => {
  const { path, theta, innerSteps, diverged } = new Run(
    landscapes[variant], { ...data.methods[method], ...options }).finish();
  return { path, theta, innerSteps, diverged };
};
const quality = points.map((point) => landscapes.published.quality(point));
console.log(JSON.stringify({ runs: runs.map(read), quality }));
"""


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return playground_data()


@pytest.fixture(scope="module")
def node(data: dict[str, Any]) -> Any:
    found = shutil.which("node")
    if found is None:
        pytest.skip("Node is not installed (Debian's nodejs): the page's numbers are not compared with Python's")

    def call(runs: list[dict[str, Any]], points: Any = ()) -> Any:
        out = subprocess.run(
            [found, "-e", SCRIPT, str(NUMERIC)],
            input=json.dumps({"data": data, "runs": runs, "points": list(points)}),
            capture_output=True, text=True,
        )  # fmt: skip
        assert out.returncode == 0, out.stderr
        return json.loads(out.stdout)

    return call


def python(method: str, starts: list[list[float]], options: dict[str, Any], **more: Any) -> landscape.Run:
    names = {"horizon": "horizon", "rounds": "rounds", "innerLr": "inner_lr", "metaLr": "meta_lr"}
    return landscape.run(method, starts, **{names[name]: options[name] for name in names}, **more)


def trainer(method: str, start: list[float], options: dict[str, Any], variant: str = "published") -> MetaTrainer:
    return build(
        Point, landscape.tasks(variant).as_tasks(), method, shared=("theta",), renew=["optimizer"], batch_size=8,
        inner=Inner(lr=options["innerLr"], options={"momentum": MOMENTUM}), meta_lr=options["metaLr"],
        horizon=options["horizon"], rounds=options["rounds"],
        initialization={"theta": torch.tensor(start, dtype=torch.float64)},
    )  # fmt: skip


@pytest.mark.parametrize("method", landscape.OFFERED)
def test_every_phi_equals_pythons(node: Any, method: str) -> None:
    settings = [DEFAULT, *(one for one in OTHERS if method != "fomaml++" or one["horizon"] != 7)]
    got = node([{"method": method, "start": start, **one} for one in settings for start in STARTS])["runs"]
    for place, one in enumerate(settings):
        expected = python(method, STARTS, one)
        for index, start in enumerate(STARTS):
            run = got[place * len(STARTS) + index]
            assert (run["diverged"] is None) == bool(torch.isfinite(expected.phi[-1, index]).all()), start
            assert run["innerSteps"] == int(expected.inner_steps[-1])
            np.testing.assert_allclose(run["path"], expected.phi[:, index], **CLOSE, err_msg=f"{start} {one}")


@pytest.mark.parametrize("method", landscape.OFFERED)
@pytest.mark.parametrize("variant", ["published", "printed"])
def test_phi_theta_and_inner_steps_equal_those_of_the_loop(node: Any, method: str, variant: str) -> None:
    options = {"horizon": 12, "rounds": 2, "innerLr": 0.02, "metaLr": 0.1}
    if variant == "printed":  # a good deal steeper
        options |= {"innerLr": 0.0002, "metaLr": 0.001}
    made = trainer(method, [3.0, 6.0], options, variant)
    phis = [made.phi[:2].tolist(), *(made.phi[:2].tolist() for event in made if event.meta_updated)]
    (got,) = node([{"method": method, "variant": variant, "start": [3.0, 6.0], **options}])["runs"]
    assert got["diverged"] is None
    assert got["innerSteps"] == made.meta_step.counters.inner_steps
    np.testing.assert_allclose(got["path"], phis, **CLOSE)
    np.testing.assert_allclose(got["theta"], made.theta[:, :2], **CLOSE)


@pytest.mark.parametrize("method", ["trajectory-shifting", "accurate"])
def test_divergence_is_found_where_the_loop_finds_it(node: Any, method: str) -> None:
    options = DIVERGENT | {"method": method, "horizon": 20, "rounds": 1}
    made = trainer(method, options["start"], options)
    for _ in made:
        pass
    (got,) = node([options])["runs"]
    names = landscape.tasks().names
    assert (got["diverged"]["step"], names[got["diverged"]["task"]]) in made.meta_step.counters.first_bad()
    assert np.isfinite(np.array(got["path"], dtype=float)).all()


def test_quality_of_points(node: Any) -> None:
    points = landscape.grid(9)
    got = node([], points.tolist())["quality"]
    np.testing.assert_allclose(got, landscape.quality_map(points, 101, 0.1)[:, 100], rtol=1e-6)


def test_the_cadences_are_those_of_the_presets(data: dict[str, Any]) -> None:
    found = shutil.which("node")
    if found is None:
        pytest.skip("Node is not installed (Debian's nodejs)")
    code = f"""
const {{ cadence }} = require({json.dumps(str(NUMERIC))});
const all = {json.dumps([one["every"] for one in data["methods"].values()])};
console.log(JSON.stringify(all.map((every) => [1, 7, 10, 100].map((horizon) => cadence(every, horizon)))));
"""
    got = json.loads(subprocess.run([found, "-e", code], capture_output=True, text=True, check=True).stdout)
    assert got == [[resolve(method, horizon=k).meta_every for k in (1, 7, 10, 100)] for method in data["methods"]]


# -- what the page says ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def html() -> str:
    return playground_html()


def _end(method: str, start: list[float], meta_updates: int = 300) -> tuple[float, int, torch.Tensor]:
    """Quality of the last phi, inner steps, and all phi, from one start at the published settings."""
    every = resolve(method, horizon=100).meta_every
    assert every is not None
    run = landscape.run(method, [start], rounds=meta_updates * every // 100)
    quality = landscape.quality_map(run.phi[-1], 101, 0.1)[0, 100]
    return float(quality), int(run.inner_steps[-1]), run.phi[:, 0]


def test_the_stories_are_true() -> None:
    script = NUMERIC.with_name("playground_ui.js").read_text(encoding="utf-8")

    def told(*phrases: str) -> None:
        flat = re.sub(r'" \+\s+"', "", script)
        for phrase in phrases:
            assert phrase in flat, phrase

    told("shifting ends at a loss of 0.06 after 300 inner steps".replace("s", "S", 1), "after 30,000, is", "at 29.5")
    quality, steps, _ = _end("trajectory-shifting", [-4.0, 3.0])
    assert (round(quality, 2), steps) == (0.06, 300)
    quality, steps, stuck = _end("reptile", [-4.0, 3.0])
    assert (round(quality, 1), steps) == (29.5, 30_000)
    quality, steps, held = _end("no-shifting", [-4.0, 3.0])
    assert (round(quality, 1), steps) == (29.5, 300)
    assert math.dist(stuck[-1], held[-1]) < 0.05
    told("shifting ends at 1.22, Reptile at 0.03")
    assert round(_end("trajectory-shifting", [-2.0, 3.0])[0], 2) == 1.22
    assert round(_end("reptile", [-2.0, 3.0])[0], 2) == 0.03
    told(
        "15,150 inner steps", "After 20 moves φ has come 7.3 far and the two are 1.1 apart", "0.26 (shifting) and 0.22"
    )
    shifted, steps, ours = _end("trajectory-shifting", [14.0, 12.0])
    replayed, replays, accurate = _end("accurate", [14.0, 12.0])
    assert (round(shifted, 2), round(replayed, 2), replays) == (0.26, 0.22, 15_150)
    assert round(math.dist(accurate[20], accurate[0]), 1) == 7.3
    assert round(math.dist(ours[20], accurate[20]), 1) == 1.1
    told("shifting diverges in its first round, and Reptile in its second")
    for method, rounds in (("trajectory-shifting", 1), ("reptile", 2)):
        phi = landscape.run(method, [[5.0, 5.0]], rounds=3, inner_lr=0.2).phi[:, 0]
        finite = torch.isfinite(phi).all(1).tolist()
        assert finite.index(False) in (range(1, 101) if method != "reptile" else [rounds])


def test_the_html_closes_no_script_early_and_fetches_nothing(html: str) -> None:
    assert html.count("</script") == 2
    assert "http" not in html


# -- in a browser ------------------------------------------------------------------------------------------------

ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
STATE = "window.trajshiftPlayground"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is not installed (Debian's package): the page is not tried in a browser")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=ARGUMENTS, timeout=1000 * PATIENCE)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(html: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    page = Page("Playground")
    page.markup(html)
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(page.html(), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Any]:
    """Opens the page; at the end nothing may have been logged or asked of a network."""
    pages, faults = [], []

    def open_page(width: int = 1200, height: int = 1000, **options: Any) -> Any:
        page = browser.new_page(viewport={"width": width, "height": height}, **options)
        page.set_default_timeout(1000 * PATIENCE)
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: None if request.url == address else faults.append(request.url))
        page.goto(address)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert faults == []


def finish(page: Any) -> list[dict[str, Any]]:
    page.get_by_role("button", name="To the end").click()
    page.wait_for_function(f"{STATE}.done")
    return page.evaluate(f"{STATE}.runs.map(({{ phi, innerSteps, diverged }}) => ({{ phi, innerSteps, diverged }}))")


def fill(page: Any, **numbers: float) -> None:
    for name, value in numbers.items():
        page.fill(f"[name={name}]", str(value))
        page.press(f"[name={name}]", "Enter")


def drag(page: Any, x: float, y: float) -> list[float]:
    """Drags the start with the mouse to a share of the picture; where it then is."""
    handle, stage = (page.locator(name).bounding_box() for name in (".tsp-start", ".tsp-stage"))
    page.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
    page.mouse.down()
    page.mouse.move(stage["x"] + x * stage["width"], stage["y"] + y * stage["height"], steps=3)
    page.mouse.up()
    page.wait_for_function(f"!{STATE}.dragging")  # a busy page acts on events late
    return page.evaluate(f"{STATE}.settings.start")


def test_a_run_set_up_by_hand_ends_where_pythons_ends(visit: Any) -> None:
    page = visit(reduced_motion="reduce")
    page.select_option("[name=budget]", "rounds")
    options = {"horizon": 40, "rounds": 2, "innerLr": 0.03, "metaLr": 0.2}
    fill(page, **options)
    for place, method in enumerate(landscape.OFFERED):
        page.select_option("[name=method]", method)
        start = drag(page, 0.3 + 0.05 * place, 0.55)
        assert start == pytest.approx([1.0 + place, 4.0], abs=0.06)
        for name, run in zip((method, "reptile"), finish(page), strict=True):
            expected = python(name, [start], options)
            np.testing.assert_allclose(run["phi"], expected.phi[-1, 0], **CLOSE)
            assert run["innerSteps"] == int(expected.inner_steps[-1])
    page.wait_for_function("document.querySelector('.tsp-status').textContent.includes('Leap ends at')")
    assert page.locator(".tsp-numbers tr", has_text="inner steps").inner_text().split()[-2:] == ["80", "80"]
    code = page.locator("[data-out=python]").text_content().splitlines()
    names: dict[str, Any] = {}
    exec(code[0], names)
    for line, run in zip(code[1:], finish(page), strict=True):
        np.testing.assert_allclose(run["phi"], eval(line, names)[0], **CLOSE)


def test_methods_get_as_many_meta_updates(visit: Any) -> None:
    page = visit(reduced_motion="reduce")
    runs = finish(page)
    assert [run["innerSteps"] for run in runs] == [300, 30_000]
    assert page.evaluate(f"{STATE}.runs.map((run) => run.metaUpdates)") == [300, 300]
    for method, run in zip(("trajectory-shifting", "reptile"), runs, strict=True):
        np.testing.assert_allclose(run["phi"], _end(method, [-4.0, 3.0])[2][-1], **CLOSE)


def test_it_plays_pauses_and_steps(visit: Any) -> None:
    page = visit()
    page.fill("[name=speed]", "1")  # ten steps a second: half a minute for what follows, however slow the machine
    page.wait_for_function(f"{STATE}.runs[0].innerSteps > 5")  # by itself, once it is seen
    picture = "document.querySelector('.tsp-view').toDataURL()"
    page.wait_for_function(f"before => {picture} !== before", arg=page.evaluate(picture))  # it is drawn as it runs
    page.get_by_role("button", name="Pause").click()
    page.wait_for_function(f"!{STATE}.playing")
    steps = page.evaluate(f"{STATE}.runs[0].innerSteps")
    page.get_by_role("button", name="Step", exact=True).click()
    page.wait_for_function(f"{STATE}.runs[0].innerSteps > {steps}")
    assert page.evaluate(f"{STATE}.runs[0].innerSteps") == steps + 1
    page.get_by_role("button", name="Restart").click()
    page.wait_for_function(f"{STATE}.runs[0].innerSteps === 0")


def test_arrow_keys_move_the_start(visit: Any) -> None:
    page = visit(reduced_motion="reduce")
    page.focus(".tsp-start")
    for key in ("ArrowRight", "Shift+ArrowUp", "ArrowLeft", "ArrowLeft"):
        page.keyboard.press(key)
    page.wait_for_function(f"String({STATE}.settings.start) === '-4.25,4'")
    page.wait_for_function(f"{STATE}.done")


def test_less_motion_starts_paused(visit: Any) -> None:
    page = visit(reduced_motion="reduce")
    page.wait_for_timeout(300)
    assert page.evaluate(f"{STATE}.runs[0].innerSteps") == 0
    assert "Press Play" in page.inner_text(".tsp-status")


def test_divergence_is_said(visit: Any) -> None:
    page = visit(reduced_motion="reduce")
    page.get_by_role("button", name="Too large a step").click()
    page.wait_for_function(f"{STATE}.done")
    page.wait_for_function("document.querySelector('.tsp-status').textContent.includes('diverged')")
    assert "Trajectory shifting diverged: θ" in page.inner_text(".tsp-status")
    assert "not finite" in page.inner_text(".tsp-numbers")
    assert "NaN" not in page.inner_text(".tsp")


def test_narrow_screens_need_no_sideways_scrolling(visit: Any) -> None:
    page = visit(390, 844, has_touch=True, reduced_motion="reduce")
    for width in (320, 390, 820):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
    stage = page.locator(".tsp-stage").bounding_box()
    page.touchscreen.tap(stage["x"] + 0.5 * stage["width"], stage["y"] + 0.5 * stage["height"])
    page.wait_for_function(f"{STATE}.settings.start[0] > 4")
    assert page.evaluate(f"{STATE}.settings.start") == pytest.approx([5.0, 5.0], abs=0.1)
