"""Chromium without a window, for the tests of pages; they are skipped where it is missing."""

import shutil

import pytest

pytest.importorskip("selenium", reason="pip install selenium")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("apt install chromium chromium-driver", allow_module_level=True)

from selenium import webdriver  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402


class Browser:
    """Chromium on the page of a server."""

    def __init__(self):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        self.size(1280)

    def size(self, width: int) -> None:
        self.width = width
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def scheme(self, name: str) -> None:
        feature = {"name": "prefers-color-scheme", "value": name}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def open(self, address: str) -> None:
        self.driver.get("about:blank")
        self.driver.get_log("browser")  # that of the test before
        self.driver.get(address)
        self.until(lambda: self.text("#about"))

    def until(self, true):
        """Wait until a function gives something true."""
        return WebDriverWait(self.driver, 30, 0.05).until(lambda _: true())

    def all(self, selector: str):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.js("return document.querySelector(arguments[0]).textContent", selector)

    def js(self, code: str, *args):
        return self.driver.execute_script(code, *args)

    def search(self, query: str, results: int = 12) -> None:
        field = self.one("#query")
        field.clear()
        field.send_keys(query, Keys.ENTER)
        self.until(lambda: query in self.text("#results-heading"))
        assert len(self.all(".card")) == results

    def lit(self) -> list[int]:
        """How many regions are drawn on each image."""
        return self.js(
            "return [...document.querySelectorAll('.card')]"
            ".map(card => card.querySelectorAll('.region').length)"
        )

    def strongest(self) -> list[list[float]]:
        """Left, top, width and height of the strongest region that is drawn on each image."""
        return self.js(
            "return [...document.querySelectorAll('.card')].map(card => {"
            "const box = [...card.querySelectorAll('.region')].at(-1);"
            "return ['x', 'y', 'width', 'height'].map("
            "name => Math.round(10 * box.getAttribute(name)) / 10); })"
        )

    def point_at(self, element) -> None:
        ActionChains(self.driver).move_to_element(element).perform()

    def overflow(self) -> int:
        """By how many pixels the page is wider than the screen; innerWidth would grow with it."""
        return self.js("return document.documentElement.scrollWidth") - self.width

    def errors(self) -> list[str]:
        return [line["message"] for line in self.driver.get_log("browser")]
