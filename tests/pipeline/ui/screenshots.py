"""Makes the pictures of docs/ui.md and the README from a run of the demo:

python tests/pipeline/ui/screenshots.py http://127.0.0.1:8700/ docs/ui
"""

import json
import sys
from pathlib import Path
from urllib.request import urlopen

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.pipeline.ui.chromium import chromium

SIZE = {"width": 1380, "height": 860}


def main(address: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with urlopen(f"{address}data/rewards.json?mode=train") as answer:
        curve = json.load(answer)
    rollouts = f"{address}rollouts?mode=train&status=succeeded&version={curve['x'][len(curve['x']) // 2]}"
    with chromium() as browser:
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport=SIZE, color_scheme=scheme)

            def shot(name: str, page=page, scheme=scheme) -> None:
                page.mouse.move(5, 5)
                path = folder / f"{name}{'-dark' if scheme == 'dark' else ''}.png"
                page.screenshot(path=path)
                Image.open(path).quantize(128).save(path, optimize=True)  # a third of the size

            page.goto(address)
            page.wait_for_selector(".chart[data-ready]")
            page.wait_for_timeout(500)  # the chart is drawn in the next frame
            shot("overview")
            if scheme == "dark":
                continue
            page.goto(rollouts)
            shot("rollouts")
            first = page.locator("tbody tr:has(a[href*='/groups/'])").nth(2)
            group = first.locator("a[href*='/groups/']").get_attribute("href")
            first.locator("a").first.click()
            page.wait_for_selector(".trace")
            page.locator(".span.k-llm > summary").last.click()
            page.wait_for_selector(".attributes")
            shot("rollout")
            page.locator("a[href$='/training']").first.click()
            page.wait_for_selector(".tokens")
            shot("training")
            page.goto(address.rstrip("/") + str(group))
            shot("group")
            page.goto(f"{address}experiments")
            page.locator("tbody a").first.click()
            page.locator(".chart[data-ready]").nth(1).wait_for()
            shot("experiment")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
