"""The pages of reports and plans in a real Chromium: they draw, answer, and err nowhere.

`make browser` runs this; it needs a Chromium on the machine (Debian: `apt-get install chromium`).
"""

import shutil
from contextlib import contextmanager

import pytest

from report_runs import write_runs
from tiny_onn.config.read import load_config
from tiny_onn.planning.pictures import write_plan_page
from tiny_onn.planning.plan import plan
from tiny_onn.studies.report import run_report

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("quiet")]

NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def chromium():
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.fail(f"no browser: install one of {', '.join(NAMES)}")
    # `make browser` installs it; the other tests are collected without it.
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 # pyright: ignore

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return run_report([write_runs(tmp_path_factory.mktemp("browser"))])


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.html"
    config = load_config(None, "model-card", ["teacher.dtype=bfloat16"])
    write_plan_page(plan(config, config.teacher.path, "RTX 3060"), path)
    return path


@contextmanager
def opened(chromium, file, *, width=1280, scheme="light", plots=12):
    """The page with all charts drawn; afterwards nothing was said, thrown or asked of a network."""
    context = chromium.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
    )
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(request.url))
    page.on("request", lambda request: wrong.append(request.url) if "://" in request.url else None)
    page.goto(f"file://{file}")
    assert wrong == [f"file://{file}"]
    wrong.clear()
    draw_all(page, plots)
    yield page
    assert wrong == []
    context.close()


def draw_all(page, number_of_plots=12):
    plots = page.locator(".plot")
    assert plots.count() == number_of_plots
    for number in range(plots.count()):
        plots.nth(number).scroll_into_view_if_needed()
        page.wait_for_function(
            "n => document.querySelectorAll('.plot')[n].dataset.drawn", arg=number
        )


def colour(page, selector, field):
    return page.eval_on_selector(selector, f"e => getComputedStyle(e).{field}")


def canvas_of(page, key):
    return page.eval_on_selector(f"[data-chart={key}] canvas", "c => c.toDataURL()")


def test_every_chart_is_drawn_in_light_and_in_dark_and_colours_differ(chromium, file):
    seen = {}
    for scheme in ("light", "dark"):
        with opened(chromium, file, scheme=scheme) as page:
            seen[scheme] = (colour(page, "body", "backgroundColor"), canvas_of(page, "load-0"))
            assert page.locator(".plot svg").count() + page.locator(".plot canvas").count() == 12
    for light, dark in zip(seen["light"], seen["dark"], strict=True):
        assert light != dark


def test_the_button_changes_the_theme_and_draws_again(chromium, file):
    with opened(chromium, file) as page:
        before = canvas_of(page, "load-0")
        page.locator("#theme").click()
        draw_all(page)
        assert canvas_of(page, "load-0") != before
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_scrubbing_shows_another_moment_and_moves_its_twin(chromium, file):
    with opened(chromium, file) as page:
        slider = page.locator("[data-scrubs=load-0]")
        slider.scroll_into_view_if_needed()
        last = page.locator("[data-frame-of=load-0]").inner_text()
        assert last == "After 384 training tokens, on held-out text"
        before = canvas_of(page, "load-0")
        slider.focus()
        slider.press("Home")
        for key in ("load-0", "histogram-0"):
            frame = page.locator(f"[data-frame-of={key}]").inner_text()
            assert frame == "After 0 training tokens, on held-out text"
        page.wait_for_timeout(200)
        assert canvas_of(page, "load-0") != before
        slider.press("End")
        page.wait_for_timeout(200)
        assert canvas_of(page, "load-0") == before
        other = page.locator("[data-scrubs=pairs-0]")
        other.focus()
        other.press("End")
        assert page.locator("[data-frame-of=pairs-0]").inner_text() == "Layer 1"


def test_hovering_a_chart_tells_its_numbers(chromium, file):
    with opened(chromium, file) as page:
        for key, text in (("load-0", "tokens that used the expert"), ("kl", "training tokens")):
            plot = page.locator(f"[data-chart={key}]")
            plot.scroll_into_view_if_needed()
            box = plot.bounding_box()
            assert box is not None
            page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            page.mouse.move(box["x"] + box["width"] / 2 + 3, box["y"] + box["height"] / 2 + 3)
            page.wait_for_selector("#vg-tooltip-element.visible")
            assert text in page.locator("#vg-tooltip-element").inner_text()
            page.mouse.move(1, 1)
            page.wait_for_selector("#vg-tooltip-element.visible", state="detached")


def test_a_token_tells_its_experts_by_pointer_and_by_key(chromium, file):
    with opened(chromium, file) as page:
        tokens = page.locator("#tokens-0 .passage span")
        about = page.locator("#tokens-0 .about")
        picture = "document.querySelector('#tokens-0 canvas').toDataURL()"
        tokens.nth(0).hover()
        assert about.inner_text().startswith("Token 1: ")
        before = page.evaluate(picture)
        tokens.nth(9).hover()
        assert about.inner_text().startswith("Token 10: ")
        assert page.evaluate(picture) != before
        tokens.nth(9).click()
        tokens.nth(9).press("ArrowRight")
        assert about.inner_text().startswith("Token 11: ")


def test_tokens_are_coloured_by_what_is_chosen(chromium, file):
    with opened(chromium, file) as page:

        def weights():
            return page.eval_on_selector_all(
                "#tokens-0 .passage span", "all => all.map(e => e.style.getPropertyValue('--w'))"
            )

        seen = []
        for name in ("active experts", "KL to the teacher", "surprise"):
            page.locator("#tokens-0").get_by_role("radio", name=name).check()
            seen.append(weights())
        assert seen[0] != seen[1] != seen[2]
        assert all("70%" in each for each in seen)


def test_nothing_is_wider_than_a_phone(chromium, file):
    with opened(chromium, file, width=360) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        page.set_viewport_size({"width": 740, "height": 360})
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") == 740


def test_a_plan_is_drawn_in_both_themes_and_tells_its_numbers(chromium, plan_file):
    seen = {}
    for scheme in ("light", "dark"):
        with opened(chromium, plan_file, scheme=scheme, plots=2) as page:
            bar = page.locator("[data-chart=memory] .mark-rect path").first
            seen[scheme] = (colour(page, "body", "backgroundColor"), bar.get_attribute("fill"))
            bar.hover()
            page.wait_for_selector("#vg-tooltip-element.visible")
            assert "GiB" in page.locator("#vg-tooltip-element").inner_text()
    for light, dark in zip(seen["light"], seen["dark"], strict=True):
        assert light != dark


def test_a_plan_fits_a_phone_with_its_legends(chromium, plan_file):
    with opened(chromium, plan_file, width=360, plots=2) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        for svg in page.locator(".plot svg").all():
            box = svg.bounding_box()
            assert box is not None
            for label in svg.locator(".role-legend-label text, .role-axis-label text").all():
                inner = label.bounding_box()
                assert inner is not None
                assert box["x"] <= inner["x"]
                assert inner["x"] + inner["width"] <= box["x"] + box["width"]
