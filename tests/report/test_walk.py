"""The walk on the sphere: its numbers against the model, and its page in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from spherelm.data.tokenizer import load_tokenizer
from spherelm.models import GPTConfig, NGPTConfig, build
from spherelm.models.decoder import Decoder
from spherelm.report.walk import MAX_TOKENS, Walk, readable, trace_walk, walk_page

SENTENCE = "A </script> sea"
STOPS = 5


def model_of(arm: str) -> Decoder:
    torch.manual_seed(2)
    config = {"gpt": GPTConfig, "ngpt": NGPTConfig}[arm]
    return build(config(vocab_size=257, n_layers=2, d_model=24, n_heads=2, max_seq_len=64)).eval()


def walk_of(arm: str, sentence: str = SENTENCE) -> Walk:
    return trace_walk(model_of(arm), load_tokenizer("bytes"), sentence, f"{arm}-0")


@pytest.mark.parametrize("arm", ["gpt", "ngpt"])
def test_the_last_stop_is_what_the_model_predicts(arm: str) -> None:
    walk, model = walk_of(arm), model_of(arm)
    ids = torch.tensor([load_tokenizer("bytes").encode(SENTENCE)])
    assert walk.tokens == [readable(letter) for letter in SENTENCE]
    assert walk.entries.shape == walk.probabilities.shape == walk.angles.shape == (STOPS, len(SENTENCE), 5)
    chances = model(ids)[0].softmax(-1).topk(5)
    np.testing.assert_allclose(walk.probabilities[-1], chances.values.detach().numpy(), rtol=1e-4)
    assert walk.arm == arm
    assert (abs(walk.lengths - 1) < 1e-5).all() == (arm == "ngpt")


def test_angles_are_those_to_the_output_vectors_and_steps_those_of_the_states() -> None:
    walk, model = walk_of("ngpt"), model_of("ngpt")
    ids = torch.tensor([load_tokenizer("bytes").encode(SENTENCE)])
    start, end = model.embedded(ids)[0], model.trunk(model.embedded(ids))[0]
    rows = model.get_parameter("head.linear.weight").detach().numpy()
    cosine = (end.detach().numpy()[3] * rows[walk.entries[-1, 3, 0]]).sum()
    assert walk.angles[-1, 3, 0] == pytest.approx(np.degrees(np.arccos(cosine)), abs=0.01)
    between = torch.nn.functional.cosine_similarity(start, end, dim=-1).acos().rad2deg().detach().numpy()
    assert (walk.moved.sum(axis=0) >= between - 0.01).all()
    assert walk.map.points.shape == (STOPS * len(SENTENCE), 3)


@pytest.mark.parametrize(
    ("sentence", "said"),
    [("", "the sentence has 0 tokens: give one of 1 to 40"), ("x" * 41, "the sentence has 41 tokens")],
)
def test_a_sentence_that_cannot_be_walked_is_refused(sentence: str, said: str) -> None:
    assert MAX_TOKENS == 40
    with pytest.raises(ValueError, match=said):
        walk_of("ngpt", sentence)


def test_tokens_can_be_read() -> None:
    assert [readable(piece) for piece in (" sea", "\n", "\t", " ", "", "a\x00b")] == ["sea", "↵", "⇥", "␣", "∅", "a·b"]


def test_the_page_stands_alone_and_is_small() -> None:
    page = walk_page([walk_of("gpt"), walk_of("ngpt")], SENTENCE, "index.html")
    assert len(page.encode()) < 500_000
    assert not re.search(r"https?://|@import|<link(?! rel=\"icon\" href=\"data:,\")|\bsrc=", page)
    assert "default-src 'none'" in page
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert json.loads(data[1])["sentence"] == SENTENCE, "what ends a script in the text ends none in the page"


# A real browser -----------------------------------------------------------------------------------------------------

FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --window-size=1200,1000"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium with the page of two tiny models."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no browser here: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="the browser needs selenium: pip install -e '.[dev]'")
    place = tmp_path_factory.mktemp("walk")
    path = place / "walk.html"
    path.write_text(walk_page([walk_of("gpt"), walk_of("ngpt")], SENTENCE, "index.html"), encoding="utf-8")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS.split(), f"--user-data-dir={place / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    found.get("about:blank")
    found.get_log("performance")  # of the browser's own first page
    found.get(path.as_uri())
    yield found
    found.quit()


def find(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def settled(browser: Any) -> None:
    """Wait for two frames: one is asked for, the next comes after it was drawn."""
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def places(browser: Any) -> list[str]:
    """Where the labels stand."""
    settled(browser)
    script = "return [...document.querySelectorAll('.label')].map(l => l.textContent + ' ' + l.style.transform)"
    found: list[str] = browser.execute_script(script)
    return found


def picture(browser: Any) -> str:
    settled(browser)
    image: str = browser.execute_script("return document.getElementById('canvas').toDataURL()")
    return image


def test_labels_say_tokens_and_the_next_one(browser: Any) -> None:
    chosen = find(browser, ".label.chosen").text
    token, _, following = chosen.partition(" → ")
    assert token == find(browser, "#chosen").text
    assert following == find(browser, "#entries td").text
    texts = [label.split(" → ")[0].split(" translate")[0] for label in places(browser)]
    assert texts == [readable(letter) for letter in SENTENCE]


def test_labels_do_not_cover_each_other(browser: Any) -> None:
    script = (
        """return [...document.querySelectorAll('.label:not([hidden])')].map(l => l.getBoundingClientRect().toJSON())"""
    )
    boxes = browser.execute_script(script)
    assert len(boxes) >= len(SENTENCE) // 2
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            apart = (
                a["left"] >= b["right"] or b["left"] >= a["right"] or a["top"] >= b["bottom"] or b["top"] >= a["bottom"]
            )
            assert apart


def test_dragging_turns_the_sphere(browser: Any) -> None:
    from selenium.webdriver import ActionChains

    before = places(browser), picture(browser)
    stage = find(browser, "#stage")
    corner = 15 - stage.size["width"] // 2  # where no label is in the way
    ActionChains(browser).move_to_element_with_offset(stage, corner, 0).click_and_hold().move_by_offset(
        90, -40
    ).release().perform()
    assert places(browser) != before[0]
    assert picture(browser) != before[1]
    find(browser, "#reset").click()
    assert places(browser) == before[0], "turned back to the first view"


@pytest.mark.parametrize("key", ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "+", "-"])
def test_keys_turn_and_zoom(browser: Any, key: str) -> None:
    stage, start = find(browser, "#stage"), places(browser)
    names = {"ArrowLeft": "\ue012", "ArrowUp": "\ue013", "ArrowRight": "\ue014", "ArrowDown": "\ue015"}
    stage.send_keys(names.get(key, key))
    assert places(browser) != start
    stage.send_keys("0")
    assert places(browser) == start


@pytest.mark.row("Inside the models")
def test_the_slider_walks_from_stop_to_stop(browser: Any) -> None:
    slider = find(browser, "#stop")
    assert slider.get_attribute("max") == str(STOPS - 1)
    slider.send_keys("\ue011")  # Home
    assert find(browser, "#where").text == "after embedding, 0 of 4"
    assert "where it starts" in find(browser, "#numbers").text
    start = picture(browser)
    slider.send_keys("\ue014")  # right
    assert find(browser, "#where").text == "after attention of layer 1, 1 of 4"
    assert slider.get_attribute("aria-valuetext") == "after attention of layer 1"
    assert re.search(r"moved \d+\.\d° in this step", find(browser, "#numbers").text)
    assert find(browser, "#path tr.now").text.startswith("attention 1")
    assert picture(browser) != start
    find(browser, "#stage").send_keys("\ue00f")  # page down
    assert find(browser, "#where").text == "after MLP of layer 1, 2 of 4"
    slider.send_keys("\ue010")  # End


def test_space_plays_to_the_end(browser: Any) -> None:
    stage, button = find(browser, "#stage"), find(browser, "#play")
    find(browser, "#stop").send_keys("\ue011")
    stage.send_keys(" ")
    assert button.text == "Pause"
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 60).until(lambda _: button.text == "Play")
    assert find(browser, "#where").text == "after MLP of layer 2, 4 of 4"


def test_a_token_is_followed_and_a_stop_shows_its_numbers(browser: Any) -> None:
    from selenium.webdriver import ActionChains

    tokens = browser.find_elements("css selector", "#tokens button")
    settled(browser)
    depths = browser.execute_script("return run().points[here()].map(point => shape.screen(point)[2])")
    front = int(np.argmax(depths))  # behind the sphere a stop shows no numbers; which are there differs by machine
    tokens[front].click()
    assert find(browser, "#chosen").text == readable(SENTENCE[front])
    assert tokens[front].get_attribute("aria-pressed") == "true"
    settled(browser)
    x, y, _ = browser.execute_script("return shape.screen(place(seen.token))")
    stage = find(browser, "#stage")
    middle = stage.size["width"] / 2, stage.size["height"] / 2
    ActionChains(browser).move_to_element_with_offset(stage, round(x - middle[0]), round(y - middle[1])).perform()
    settled(browser)
    tip = find(browser, "#tip").text
    assert tip.startswith(f"{readable(SENTENCE[front])}, after MLP of layer 2\nmoved ")
    assert re.search(r"drawn \d+\.\d°", tip)
    assert tip.count("→") == 3


def test_the_other_model_says_how_it_is_drawn(browser: Any) -> None:
    first = find(browser, "#how").text
    assert first.startswith("This is an nGPT")
    find(browser, "#runs button:first-child").click()
    assert "each was divided by its length" in find(browser, "#how").text
    assert "drawn as 1" in find(browser, "#numbers").text
    assert re.search(
        r"off by \d+\.\d° on average over the steps, by \d+\.\d° over all pairs", find(browser, "#lost").text
    )
    find(browser, "#runs button:last-child").click()
    assert find(browser, "#how").text == first


def test_it_is_dark_where_wanted(browser: Any) -> None:
    def background() -> str:
        return str(browser.execute_script("return getComputedStyle(document.documentElement).backgroundColor"))

    before, image = background(), picture(browser)
    find(browser, "#theme").click()
    assert background() != before
    assert picture(browser) != image
    find(browser, "#theme").click()
    assert background() == before


FOCUS = """const e = document.activeElement, label = e.labels && e.labels[0] ? e.labels[0].textContent : '';
return [e.id || e.tagName, e.ariaLabel || e.textContent.trim() || label, getComputedStyle(e).outlineStyle]"""


def test_what_takes_the_keyboard_shows_it_and_has_a_name(browser: Any) -> None:
    from selenium.webdriver import ActionChains

    browser.execute_script("document.body.tabIndex = -1; document.body.focus()")
    seen: list[Any] = []
    for _ in range(30):
        ActionChains(browser).send_keys("\ue004").perform()
        now = browser.execute_script(FOCUS)
        if now[0] == "BODY" or now in seen[:1]:
            break
        assert now[1], f"{now[0]} has no name"
        assert now[2] != "none", f"{now[0]} does not show its focus"
        seen.append(now)
    assert find(browser, "header a").get_attribute("href").endswith("/index.html"), "back to where one came from"
    order = [name for name, _, _ in seen if name not in ("BUTTON",)]
    assert order == ["theme", "A", "stage", "in", "out", "reset", "play", "stop"]


DRAWN = "return [canvas.width / devicePixelRatio, canvas.height / devicePixelRatio]"
STAGE = "return [stage.clientWidth, stage.clientHeight]"


def fitted(browser: Any) -> None:
    """Wait until the sphere is drawn in the size that it has now."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 60).until(lambda _: browser.execute_script(DRAWN) == browser.execute_script(STAGE))
    settled(browser)


@contextmanager
def screen(browser: Any, width: int, height: int, **settings: Any) -> Iterator[None]:
    """A window whose inside is so large, for a while."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False, **settings}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    fitted(browser)
    yield
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    fitted(browser)


@pytest.mark.parametrize("size", [(1366, 768), (1366, 600), (1920, 1080), (900, 700)])
def test_sphere_and_controls_are_on_one_screen(browser: Any, size: tuple[int, int]) -> None:
    with screen(browser, *size):
        assert browser.execute_script("return scrollY") == 0
        assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]
        for part in ("#runs", "#tokens", "#stage", "#zoom", "#play", "#stop", "#where", "#legend"):
            box = browser.execute_script(f"return document.querySelector('{part}').getBoundingClientRect().toJSON()")
            assert 0 <= box["top"] < box["bottom"] <= size[1], part
        assert find(browser, "#stage").size["height"] > 0.4 * size[1]


def test_on_paper_the_sphere_is_as_it_was_drawn_and_light(browser: Any) -> None:
    before = picture(browser)
    record = f"window.printed = (() => {{ {DRAWN} }})().concat(canvas.toDataURL())"
    browser.execute_script(f"addEventListener('beforeprint', () => {{ {record} }}, {{once: true}})")
    find(browser, "#theme").click()
    browser.execute_cdp_cmd("Page.printToPDF", {})
    width, height, dark = browser.execute_script("return window.printed")
    find(browser, "#theme").click()
    fitted(browser)
    assert picture(browser) == before, "back on the screen"
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert browser.execute_script("return canvas.toDataURL()") == dark, "the same from a light page"
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    with screen(browser, 720, 1000):  # paper
        on_paper = browser.execute_script(STAGE)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert on_paper == [width, height]
    assert width == height <= 720


def test_it_fits_a_phone(browser: Any) -> None:
    with screen(browser, 360, 740, deviceScaleFactor=2, mobile=True):
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
        assert find(browser, "#stage").size["width"] > 300


def test_after_all_that_no_error_and_no_request(browser: Any) -> None:
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked, "the page itself"
    assert [url for url in asked if not url.startswith(("file://", "data:"))] == []
    assert len([url for url in asked if url.startswith("file://")]) == 1
