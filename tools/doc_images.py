"""Generates the images of README.md and docs/ again with the bundled model: `make images`.

```sh
python -m tools.doc_images
```

Prompts and the seed are fixed, and no image is chosen by hand. The screenshot of the web page needs Playwright and
Chromium; without Chromium it is left as it is, and the command says so.
"""

from __future__ import annotations

import re
import shlex
import threading
import time
from pathlib import Path

from dalle_zoo import DallePipeline
from dalle_zoo.cli.main import main as command
from dalle_zoo.composition import CompositionConfig, Placed, Scene, render
from dalle_zoo.composition.layers import layers
from dalle_zoo.composition.sprites import SIZE
from dalle_zoo.zoo import DEFAULT_MODEL

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs/images"
CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
"""Arguments of Chromium: the image editor of the page needs WebGL."""
GRID = 16
"""Tokens in a row in the figure of layers, as of the bundled model."""
PROMPT = "a purple unicorn"
SECONDS = 300


def sample_command() -> list[str]:
    """Returns the arguments of the first `dalle-zoo generate` of docs/generate/prompts.md."""
    page = (ROOT / "docs/generate/prompts.md").read_text("utf-8").replace("\\\n", "")
    match = re.search(r"^dalle-zoo (generate .+)$", page, re.MULTILINE)
    assert match is not None
    return shlex.split(match.group(1))


def screenshot(out: Path) -> None:
    """Writes a screenshot of the web page after it generated the best 6 of 16 images of a prompt."""
    import uvicorn
    from playwright.sync_api import sync_playwright

    from dalle_zoo.web.engine import Engine
    from dalle_zoo.web.server import create_server

    engine = Engine(DallePipeline.from_pretrained(DEFAULT_MODEL))
    server = uvicorn.Server(uvicorn.Config(create_server(engine), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.05)
        port = server.servers[0].sockets[0].getsockname()[1]
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
            tab = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light")
            tab.set_default_timeout(1000 * SECONDS)
            tab.goto(f"http://127.0.0.1:{port}/")
            for field, value in {"prompt": PROMPT, "count": "16", "keep": "6", "seed": "0"}.items():
                tab.locator(f"#{field} textarea, #{field} input").first.fill(value)
            tab.locator("#generate").click()
            tab.locator("#files a[download]").first.wait_for()
            tab.screenshot(path=out)
            browser.close()
    finally:
        server.should_exit = True
        thread.join(30)
        engine.close()


def plot_layers(out: Path) -> None:
    """Plots composed images, the layer that each of their tokens belongs to, and the layers."""
    import matplotlib.pyplot as plt

    sprites = CompositionConfig.load().open_sprites()
    number = {(sprite.names[0], sprite.style): i for i, sprite in enumerate(sprites.sprites)}
    cat, house = (number[name, "3d"] for name in ("cat", "house"))
    half = SIZE // 2
    beside = tuple(Placed(sprite=s, size=half, left=x, top=half // 2) for s, x in ((cat, 0), (house, half)))
    scenes = (
        Scene(kind="single", items=(Placed(sprite=cat),)),
        Scene(kind="ground", items=(Placed(sprite=cat),), ground="blue"),
        Scene(kind="hue", items=(Placed(sprite=cat, color="purple"),)),
        Scene(kind="pair", items=beside, ground="pink", relation="beside"),
    )
    columns = ["image", f"layer of each of {GRID} x {GRID} tokens", "ground", "first thing", "second thing"]
    figure, axes = plt.subplots(len(scenes), len(columns), figsize=(10, 8.2), layout="constrained")
    for scene, row in zip(scenes, axes, strict=True):
        found = layers(scene, sprites, GRID)
        for axis, shown in zip(row, [render(scene, sprites), found.cells // GRID**2, *found.images], strict=False):
            axis.imshow(shown, cmap="viridis", vmin=0, vmax=2)
        for axis in row:
            axis.set(xticks=[], yticks=[], frame_on=False)
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=9)
    figure.savefig(out, dpi=80, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Generates all images."""
    plot_layers(IMAGES / "layers.png")
    assert command(["demo", "--candidates", "4", "--out", str(IMAGES / "readme.png")]) == 0
    assert command([*sample_command(), "--out", str(IMAGES / "samples.png"), "--overwrite"]) == 0
    if CHROMIUM.exists():
        screenshot(IMAGES / "serve.png")
    else:
        print(f"{IMAGES / 'serve.png'} is left as it is: {CHROMIUM} is not installed (make chromium)")


if __name__ == "__main__":
    main()
