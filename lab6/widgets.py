"""The sliders of notebook 04."""

from __future__ import annotations

import io
import time
import typing

from PIL import Image

from lab6.guidance import MAX_GUIDANCE_SCALE
from lab6.labels import MANUAL_SET, OBJECTS, decode_labels, encode_labels, to_pil
from lab6.sampling import sample

if typing.TYPE_CHECKING:
    from lab6.pipeline import ICLEVRPipeline
    from lab6.settings import Settings


def guidance_explorer(pipe: ICLEVRPipeline, settings: Settings):
    """Sliders and label pickers around one picture that is drawn anew at each change (JupyterLab only)."""
    import ipywidgets as widgets

    nothing = "–"
    pickers = [
        widgets.Dropdown(options=(nothing, *OBJECTS), value=value, layout=widgets.Layout(width="150px"))
        for value in MANUAL_SET
    ]
    student = pipe.denoiser.config.student_steps > 0  # fast enough to follow the slider, and has learnt its steps alone
    scale = widgets.FloatSlider(
        settings.guidance_scale,
        min=0.0,
        max=MAX_GUIDANCE_SCALE if student else 8.0,
        step=0.5,
        description="guidance s",
        continuous_update=student,
    )
    steps = widgets.IntSlider(
        settings.steps, min=1, max=50, description="steps", continuous_update=False, disabled=student
    )
    seed = widgets.IntSlider(settings.seed, min=0, max=99, description="seed", continuous_update=False)
    picture = widgets.Image(format="png", width=320, height=320)
    message = widgets.HTML()

    def draw(_=None):
        try:
            start = time.perf_counter()
            labels = encode_labels([picker.value for picker in pickers if picker.value != nothing])
            options = dict(num_inference_steps=steps.value, guidance_scale=scale.value)
            image = sample(pipe, labels, settings, seed.value, **options)
        except ValueError as error:  # a label twice, none, or a network that knows no guidance
            message.value = f"<b>{error}</b>"
            return
        buffer = io.BytesIO()
        to_pil(image)[0].resize((320, 320), Image.Resampling.BICUBIC).save(buffer, "png")
        picture.value = buffer.getvalue()
        message.value = f"{', '.join(decode_labels(labels)[0])} · {time.perf_counter() - start:.1f} s"

    for control in (*pickers, scale, steps, seed):
        control.observe(draw, "value")
    draw()
    return widgets.HBox([picture, widgets.VBox([*pickers, scale, steps, seed, message])])
