"""Pictures of the report and the playground for the README, from the results that are there: `make pictures`."""

import re
from pathlib import Path

from pipeline.config.load import load_params
from pipeline.config.workspace import Workspace
from pipeline.report.playground import Playground, serve
from tests.browser import opened

OUT = Path("results/report")


def main() -> None:
    """Photograph the front and its panel, the token view, the sample browser and the playground at work."""
    report = (OUT / "index.html").absolute().as_uri()
    with opened(report, width=1000, height=1180) as browser:
        browser.screenshot(path=OUT / "report.png")
        browser.locator("#tokens-point").select_option(label="p050_c050")
        browser.locator("#tokens-lines .token").nth(3).focus()
        _part(browser, "#tokens", "#tokens-others", "tokens.png")
        _part(browser, "#samples", "#samples-place", "samples.png")
    blocks = serve(Playground(load_params(), Workspace()), port=None, wait=False)
    with opened(blocks.local_url, width=1000, height=800) as browser:
        browser.locator("#alpha-positivity input[type=number]").fill("1")
        browser.locator("#write").click()
        for side in ("#control", "#guided"):
            browser.locator(f"{side} small", has_text="tokens").wait_for(timeout=120_000)
        browser.locator("#least-positivity textarea, #least-positivity input").fill("0.8")
        browser.locator("#choose").click()
        browser.locator("#promise", has_text="on validation prompts").wait_for(timeout=900_000)
        browser.locator("#write").click()
        browser.locator("#guided small", has_text="tokens").wait_for(timeout=120_000)
        browser.locator("#dial-make").click()
        browser.locator("#dial-progress", has_text=re.compile(r" \d\d\d of .* left")).wait_for(timeout=300_000)
        browser.screenshot(path=OUT / "playground.png", full_page=True)
        browser.locator("#dial-cancel").click()
    blocks.close()


def _part(browser, first: str, last: str, name: str) -> None:
    """From the top of one element to the bottom of another."""
    top, bottom = (browser.locator(place).bounding_box() for place in (first, last))
    start = top["y"] + browser.evaluate("window.scrollY")
    height = bottom["y"] + bottom["height"] - top["y"] + 16
    clip = {"x": 0, "y": start - 8, "width": 1000, "height": height}
    browser.screenshot(path=OUT / name, full_page=True, clip=clip)


if __name__ == "__main__":
    main()
