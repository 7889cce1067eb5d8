"""The pipeline: labels in, images out, in the manner of diffusers. Notebook 04.

Stands on denoiser, autoencoder, guidance, layouts, diffusion, machine and labels.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from lab6.autoencoder import decode_latents
from lab6.denoiser import Denoiser
from lab6.diffusion import SAMPLERS, set_times, to_x_0
from lab6.guidance import GUIDANCES, Step, steps_with_guidance
from lab6.labels import encode_labels, encode_places, to_pil
from lab6.layouts import draw_places
from lab6.machine import make_generator


@dataclasses.dataclass
class ICLEVROutput(BaseOutput):
    """What the pipeline returns: images, a list of PIL images or (B, 3, 64, 64) in [-1, 1]; places, (B, 24, 2), where
    the objects were asked to stand, or None for a network that is not told. With return_process
    also process, x_t before each step and at the end, and guesses, the x_0 that the network predicts from it:
    both (steps + 1, B, 3, 64, 64) on the CPU."""

    images: list | torch.Tensor
    places: torch.Tensor | None = None
    process: torch.Tensor | None = None
    guesses: torch.Tensor | None = None


class ICLEVRPipeline(DiffusionPipeline):
    """Labels in, images out: `pipe(["red sphere", "cyan cube"], places=[(20, 30), (44, 34)]).images[0]`.

    Components: denoiser (`Denoiser`), scheduler (any of diffusers' that fits; see `make_sampler`) and, for diffusion
    of latents, autoencoder. Saved and loaded in diffusers' manner, by save_pretrained and from_pretrained. Guidance by
    a classifier needs the attribute `classifier`, an `Evaluator`, which is not saved.
    """

    _optional_components: typing.ClassVar = ["autoencoder"]

    def __init__(self, denoiser: Denoiser, scheduler: SchedulerMixin, autoencoder: AutoencoderKL | None = None):
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler, autoencoder=autoencoder)
        # Saved folders name the front door, not this room, so that every version of the workbook reads them.
        self.register_to_config(denoiser=("lab6_utils", "Denoiser"))
        self.classifier = None

    @torch.no_grad()
    def __call__(
        self,
        labels,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        guidance: str = "classifier-free",
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        classifier_input: str = "x_0",
        places=None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        return_process: bool = False,
        callback_on_step_end=None,
    ):
        """Sample one image for each label set.

        Args:
            labels: a label set, a list of them, or (B, 24) multi-hot.
            num_inference_steps: steps of the scheduler. A step is one pass of the network (two with sampler="heun");
                `Guidance.evaluations` says what guidance adds.
            guidance_scale: s, the strength of the guidance.
            guidance: a key of GUIDANCES: "none", "classifier-free", "composition", "classifier-1" or "classifier-2".
            guidance_interval: the lowest and highest t / T at which guidance acts (Kynkäänniemi et al. 2024); the other
                steps cost one pass, as without guidance.
            classifier_input: what the classifier sees, "x_0" (as predicted at x_t, with the gradient through the
                network, in the same pass) or "x_t", which it was not trained on.
            places: where the objects stand, for a network that is told (conditioning="layout"): (x, y) in pixels or
                None for each label, or by object (see `encode_places`); or how to draw them (see `draw_places`):
                "natural", the default, "separated" or "none".
            generator: one, or one for each image, which makes an image independent of its batch.
            output_type: "pil" or "pt" ((B, 3, 64, 64) float32 in [-1, 1], on the CPU).
            return_process: also return the states on the way (see `ICLEVROutput`).
            callback_on_step_end: called as f(pipe, step, t, {"x_t": x_t}).
        """
        self._check(num_inference_steps, guidance, guidance_scale, classifier_input, output_type)
        names, labels = labels, labels if isinstance(labels, torch.Tensor) else encode_labels(labels)
        if isinstance(generator, list) and len(generator) != len(labels):
            raise ValueError(f"{len(generator)} generators for {len(labels)} label sets: give one for each")
        places = self._choose_places(places, names, labels, generator)
        objects, labels = int(labels.sum(1).max()), labels.to(self.device)
        set_times(self.scheduler, num_inference_steps)  # on the CPU, where the host reads them without waiting
        given = dict(denoiser=self.denoiser, scheduler=self.scheduler, labels=labels, scale=guidance_scale,
                     objects=objects, decode=self._decode, classifier=self.classifier,
                     classifier_input=classifier_input,
                     places=None if places is None else places.to(self.device))  # fmt: skip
        process, guesses = [], []
        with self.denoiser.expecting(objects):
            for i, (step, prediction, x_t) in enumerate(self._steps(guidance, guidance_interval, generator, given)):
                if return_process:
                    guess = to_x_0(prediction, step.x_t, step.alpha_bar, step.prediction_type)
                    process.append(self._decode(step.x_t).cpu())
                    guesses.append(self._decode(guess).cpu())
                if callback_on_step_end is not None:
                    callback_on_step_end(self, i, step.time, {"x_t": x_t})
        images = self._decode(x_t).clamp(-1, 1).float().cpu()
        states = [torch.stack([*s, images]) for s in (process, guesses)] if return_process else [None, None]
        output = ICLEVROutput(to_pil(images) if output_type == "pil" else images, places, *states)
        return output if return_dict else output.to_tuple()

    def _steps(self, guidance, interval, generator, given):
        """From noise on, yields each `Step`, the guided prediction there, and the state after it."""
        acts = steps_with_guidance(self.scheduler, interval)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if takes_generator else {}
        x_t = self._noise(len(given["labels"]), generator)
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            way = GUIDANCES[guidance if acts[i] else "none"]
            x = self.scheduler.scale_model_input(x_t, t)
            step = Step(time=t, alpha_bar=self._alpha_bar(i, t), x_t=x, **given)
            prediction = way.predict(step)
            x_t = way.adjust(self.scheduler.step(prediction, t, x_t, **extra).prev_sample, step)
            yield step, prediction, x_t

    def _check(self, steps, guidance, scale, classifier_input, output_type):
        for name, value, allowed in (("output_type", output_type, ("pil", "pt")), ("guidance", guidance, GUIDANCES),
                                     ("classifier_input", classifier_input, ("x_0", "x_t"))):  # fmt: skip
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: choose from {', '.join(allowed)}")
        if steps < 1:
            raise ValueError(f"num_inference_steps={steps}: must be at least 1")
        way = GUIDANCES[guidance]
        if way.needs_classifier and self.classifier is None:
            raise ValueError(f"guidance={guidance!r} needs a classifier: set pipe.classifier to an Evaluator")
        if way.samplers and not isinstance(self.scheduler, tuple(SAMPLERS[name][0] for name in way.samplers)):
            raise ValueError(f"guidance={guidance!r} works only with sampler={' or '.join(map(repr, way.samplers))}")
        if guidance not in self.guidances and scale != way.off_scale:
            if way.needs_null:
                self.denoiser.check_null()
            raise ValueError(f"guidance={guidance!r}: a distilled network can be guided by {', '.join(self.guidances)}")

    @property
    def takes_places(self) -> bool:
        """Is its network told where the objects stand?"""
        return self.denoiser.condition.blob_channels > 0

    def _choose_places(self, places, names, labels, generator):
        """(B, 24, 2) on the CPU, or None for a network that is not told."""
        drawn = places is None or isinstance(places, str)
        if not self.takes_places:
            if drawn and places in (None, "none"):
                return None
            raise ValueError('this network is not told where objects stand: use places=None, or preset="layout"')
        own = _for_places(generator)  # also where places are given, so that the noise does not depend on that
        if drawn:
            return draw_places(labels, places or "natural", self.denoiser.condition.layouts, own)
        return encode_places(names, places)

    @property
    def guidances(self) -> tuple[str, ...]:
        """Those of GUIDANCES that fit its network."""
        has_null, distilled = self.denoiser.condition.null is not None, self.denoiser.config.student_steps > 0
        return tuple(kind for kind, way in GUIDANCES.items() if way.fits(has_null, distilled))

    def _noise(self, count, generator):
        channels, size = self.denoiser.config.image_channels, self.denoiser.config.image_size
        noise = randn_tensor((count, channels, size, size), generator=generator, device=self.device)
        return noise * self.scheduler.init_noise_sigma

    def _decode(self, x):
        return decode_latents(self.autoencoder, x)

    def _alpha_bar(self, i, t):
        """alpha_bar of pass i, at time t, (). Between the steps of training only sigma tells it."""
        if t.is_floating_point():
            return 1 / (1 + self.scheduler.sigmas[i] ** 2)
        return self.scheduler.alphas_cumprod[t]


def _for_places(generator):
    """Generators for drawing places, so that an image's own generator gives the same noise however places are chosen.
    One for all images, which may serve several calls, is asked for a seed."""
    if isinstance(generator, list):
        return [make_generator(each.initial_seed(), "places") for each in generator]
    device = generator.device if generator is not None else "cpu"
    return make_generator(torch.randint(2**62, (), generator=generator, device=device).item(), "places")
