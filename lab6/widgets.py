"""The sliders of notebook 04.

Stands on sampling, pipeline, settings, guidance and labels.
"""

from __future__ import annotations

import io
import time

from PIL import Image

from lab6.guidance import MAX_GUIDANCE_SCALE
from lab6.labels import MANUAL_SET, OBJECTS, decode_labels, encode_labels, to_pil
from lab6.pipeline import ICLEVRPipeline
from lab6.sampling import sample
from lab6.settings import Settings

_NOTHING = "–"


def guidance_explorer(pipe: ICLEVRPipeline, settings: Settings):
    """Sliders and label pickers beside one image that is sampled anew at each change (JupyterLab only)."""
    import ipywidgets as widgets

    pickers, sliders = _controls(widgets, pipe, settings)
    picture = widgets.Image(format="png", width=320, height=320)
    message = widgets.HTML()

    def update(_=None):
        try:
            picture.value, message.value = _sample_png(pipe, settings, pickers, **sliders)
        except ValueError as error:  # a label twice, none, or a network without guidance
            message.value = f"<b>{error}</b>"

    for control in (*pickers, *sliders.values()):
        control.observe(update, "value")
    update()
    return widgets.HBox([picture, widgets.VBox([*pickers, *sliders.values(), message])])


def _controls(widgets, pipe, settings):
    """Three pickers of objects, and {"scale", "steps", "seed"}: a slider each."""
    pickers = [
        widgets.Dropdown(options=(_NOTHING, *OBJECTS), value=value, layout=widgets.Layout(width="150px"))
        for value in MANUAL_SET
    ]
    # A distilled network is fast enough to follow the slider, and has learnt only its own number of steps.
    distilled = pipe.denoiser.config.student_steps > 0
    # Each slider reaches what the notebook was told, which a shorter one would cut off without a word.
    top = MAX_GUIDANCE_SCALE if distilled else max(8.0, settings.guidance_scale)
    scale = widgets.FloatSlider(settings.guidance_scale, min=0.0, max=top, step=0.5, description="guidance s",
                                continuous_update=distilled)  # fmt: skip
    steps = widgets.IntSlider(settings.steps, min=1, max=max(50, settings.steps), description="steps",
                              continuous_update=False, disabled=distilled)  # fmt: skip
    seed = widgets.IntSlider(settings.seed, min=0, max=max(99, settings.seed), description="seed",
                             continuous_update=False)  # fmt: skip
    return pickers, dict(scale=scale, steps=steps, seed=seed)


def _sample_png(pipe, settings, pickers, scale, steps, seed):
    """The image that the controls ask for, as the bytes of a PNG, and a line that describes it."""
    start = time.perf_counter()
    labels = encode_labels([picker.value for picker in pickers if picker.value != _NOTHING])
    options = dict(num_inference_steps=steps.value, guidance_scale=scale.value)
    image = sample(pipe, labels, settings, seed.value, **options)
    buffer = io.BytesIO()
    to_pil(image)[0].resize((320, 320), Image.Resampling.BICUBIC).save(buffer, "png")
    return buffer.getvalue(), f"{', '.join(decode_labels(labels)[0])} · {time.perf_counter() - start:.1f} s"
