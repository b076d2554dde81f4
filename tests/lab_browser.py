"""Drives JupyterLab: runs the one cell of a notebook and clicks each button of its panel; tells what the page said.

python lab_browser.py BROWSER ADDRESS FOLDER     (in the environment that has playwright)
"""

import json
import sys
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

BUTTONS = {"evaluate": "Evaluate now", "save": "Save now", "pause": "Pause and save"}


def main(browser, address, folder, look=lambda page, name: None):
    with sync_playwright() as playwright:
        chrome = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chrome.new_page(viewport={"width": 1500, "height": 1200})
        try:
            return drive(page, address, look)
        except Exception:
            page.screenshot(path=folder / "failure.png")
            raise
        finally:
            chrome.close()


def drive(page, address, look):
    """Run the cell, click each button as soon as it can be clicked, and wait for its answer."""
    told = {}
    page.goto(address)
    page.locator(".jp-Notebook .jp-CodeCell .cm-content").first.click(timeout=90_000)
    page.keyboard.press("Shift+Enter")
    panel = page.locator(".jp-OutputArea-output .widget-vbox").first
    panel.get_by_text("tokens/s").wait_for(timeout=120_000)
    for wish, name in BUTTONS.items():
        button = panel.get_by_role("button", name=name)
        expect(button).to_be_enabled(timeout=60_000)
        look(page, f"before_{wish}")
        button.click()
        said = {"evaluate": "bits per byte, on request", "save": "saved as", "pause": "Paused:"}[wish]
        answer = panel.get_by_text(said).first
        answer.wait_for(timeout=60_000)
        told[wish] = answer.inner_text()
    page.get_by_text("ended paused").wait_for(timeout=60_000)
    look(page, "end")
    told["output"] = page.locator(".jp-OutputArea-output pre").last.inner_text()
    told["resting"] = panel.locator("button[disabled]").count()
    picture = panel.locator("img").get_attribute("src")
    told["picture"] = page.evaluate("async address => (await (await fetch(address)).blob()).size", picture)
    return told


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))) + "\n")
