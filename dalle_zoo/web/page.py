"""The web page: a form, images that appear row by row, and downloads that contain their settings."""

from __future__ import annotations

import html
import os
import secrets
from functools import partial

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported

import gradio as gr
from fastapi import FastAPI

from dalle_zoo.cards import render_any_card
from dalle_zoo.model_folder import RECORD
from dalle_zoo.pipeline import DallePipeline
from dalle_zoo.results import results_of
from dalle_zoo.web.engine import Engine
from dalle_zoo.web.events import generate, restore
from dalle_zoo.web.generation import Limits

EXAMPLES = (
    "a 3d emoji of a red apple",
    "a blob emoji of a red heart",
    "a flat emoji of a red heart",
    "a 3d emoji of a blue apple",
    "a cartoon emoji of a cat with a red balloon",
)
"""Known things in several styles, and compositions that the bundled model has not seen."""
CSS = """
.gradio-container { max-width: min(1100px, 100vw) !important; margin: auto; }
#images img { image-rendering: pixelated; }
#images .caption-label { inset: auto 0 0 0; max-width: none; white-space: normal; font-size: 10px; }
#files table { table-layout: fixed; }
#files td { overflow-wrap: anywhere; }
#card pre { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24em; overflow-y: auto; }
"""
MAX_UPLOAD = "20mb"
"""Largest file that the page accepts."""


def mount_page(app: FastAPI, engine: Engine, limits: Limits, *, token: str | None = None) -> FastAPI:
    """Adds the page at ``/`` to an application.

    Args:
        app: The application, whose routes come before the page's.
        engine: Runs the requests; the caller closes it.
        limits: What one request may ask for.
        token: Password of the page, for any user name. Defaults to none.
    """
    mounted: FastAPI = gr.mount_gradio_app(
        app,
        create_page(engine, limits),
        path="/",
        footer_links=[],
        auth=None if token is None else lambda _, password: secrets.compare_digest(password.encode(), token.encode()),
        auth_message="The password is the token of this server; the user name may be anything.",
        show_error=False,  # other errors than `gr.Error` are faults, and the log has them
        max_file_size=MAX_UPLOAD,
        ssr_mode=False,
        enable_monitoring=False,
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
    )
    return mounted


def create_page(engine: Engine, limits: Limits) -> gr.Blocks:
    """Returns the page; arguments are those of `mount_page`."""
    pipe = engine.pipe
    # gradio copies the images for downloads; every ten minutes, copies that are older than an hour are removed.
    title = f"dalle-zoo: {pipe.location}"
    page: gr.Blocks = gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 3600))
    with page:
        gr.Markdown("# dalle-zoo\nImages from text.")
        with gr.Row():
            with gr.Column(min_width=300):
                form = Form(pipe, limits)
            with gr.Column(min_width=300):
                status = gr.Textbox("", label="Status", max_lines=3, elem_id="status", interactive=False)
                gallery = gr.Gallery(
                    label="Images", elem_id="images", columns=3, object_fit="contain", height="auto", format="png",
                    buttons=["download", "fullscreen"], interactive=False,
                )  # fmt: skip
                files = gr.Files(label="PNG files, each with its settings inside", elem_id="files", interactive=False)
                with gr.Accordion("About this model", open=False):
                    gr.HTML(f"<pre>{html.escape(card_text(pipe))}</pre>", elem_id="card")
        started = gr.on(
            [form.button.click, form.prompt.submit], partial(generate, engine, limits), form.inputs,
            [gallery, files, status], api_name="generate", concurrency_limit=None, show_progress="hidden",
        )  # fmt: skip
        form.stop.click(lambda: "Stopped.", None, status, cancels=[started], api_visibility="private", queue=False)
        form.restored.upload(partial(restore, pipe), form.restored, form.settings, api_visibility="private")
    page.queue(max_size=engine.max_waiting)
    return page


class Form:
    """The components that a request is made of."""

    def __init__(self, pipe: DallePipeline, limits: Limits) -> None:
        self.prompt = gr.Textbox(
            label="Prompt", lines=2, max_lines=6, max_length=limits.max_prompt, submit_btn=False, elem_id="prompt"
        )
        with gr.Row():
            self.button = gr.Button("Generate", variant="primary", elem_id="generate", min_width=120)
            self.stop = gr.Button("Stop", elem_id="stop", min_width=120)
        gr.Examples([[example] for example in EXAMPLES], [self.prompt], cache_examples=False, api_visibility="private")
        count = gr.Slider(1, limits.max_images, min(8, limits.max_images), step=1, label="Candidates", elem_id="count")
        keep = gr.Slider(
            0, limits.max_images, 0, step=1, label="Keep the best", elem_id="keep", visible=pipe.ranker is not None,
            info="Number of images to keep, ranked by how well they fit the prompt; 0 keeps all, unranked",
        )  # fmt: skip
        seed = gr.Textbox(
            label="Seed", placeholder="random", max_lines=1, elem_id="seed",
            info="The same seed gives the same images",
        )  # fmt: skip
        with gr.Accordion("Sampling", open=False):
            temperature = gr.Slider(0, 2, 1, step=0.05, label="Temperature")
            top_k = gr.Number(None, label="Top k", precision=0, minimum=1, info="Empty: all tokens")
            top_p = gr.Number(None, label="Top p", minimum=0, maximum=1, info="Empty: all tokens")
            guidance = gr.Slider(0, 10, 1, step=0.1, label="Guidance scale", info="1: no guidance")
            negative = gr.Textbox(
                label="Negative prompt", max_length=limits.max_prompt, info="Guidance leads away from this text"
            )
        with gr.Accordion("Keep a part of an image", open=False):
            editor = gr.ImageEditor(
                label="Paint white over what to generate again", type="pil", image_mode="RGBA", format="png",
                sources=["upload", "clipboard"], transforms=[], layers=False, elem_id="editor",
                brush=gr.Brush(default_size=12, colors=["#ffffff"], color_mode="fixed"), buttons=[],
            )  # fmt: skip
        with gr.Accordion("Use the settings of an image", open=False):
            self.restored = gr.File(
                label="A PNG file of dalle-zoo", file_types=[".png"], type="filepath", elem_id="restore"
            )
        self.settings = [self.prompt, count, keep, seed, temperature, top_k, top_p, guidance, negative]
        self.inputs = [*self.settings, editor, self.restored]


def card_text(pipe: DallePipeline) -> str:
    """The card of a model: its README.md, or one rendered from its files, without the metadata for the Hub."""
    folder = pipe.folder
    if folder is None or not (folder / RECORD).is_file():
        return f"{pipe!r}\nThis model has no record of its training."
    if (folder / "README.md").is_file():
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    else:
        text = render_any_card(folder, list(results_of(folder).values()), pipe.location)
    return text.partition("\n---\n")[2] if text.startswith("---\n") else text
