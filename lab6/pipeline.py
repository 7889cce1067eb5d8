"""Labels in, pictures out, in the manner of diffusers. Notebook 04."""

from __future__ import annotations

import dataclasses
import inspect
import typing

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from lab6.autoencoder import decode
from lab6.denoiser import Denoiser
from lab6.diffusion import to_x_0
from lab6.guidance import BY_CLASSIFIER, GUIDANCES, MAX_GUIDANCE_SCALE, steps_with_guidance
from lab6.labels import OBJECTS, encode_labels, to_pil


@dataclasses.dataclass
class ICLEVROutput(BaseOutput):
    """What the pipeline returns: images, a list of PIL images or (B, 3, 64, 64) in [-1, 1]. With return_process
    also process, x_t before each step and at the end, and guesses, the x_0 that the network would have put in
    its place: both (steps + 1, B, 3, 64, 64) on the CPU."""

    images: list | torch.Tensor
    process: torch.Tensor | None = None
    guesses: torch.Tensor | None = None


class ICLEVRPipeline(DiffusionPipeline):
    """Labels in, pictures out: `pipe(["red sphere", "cyan cube"], guidance_scale=2.0).images[0]`.

    Components: denoiser (`Denoiser`), scheduler (any of diffusers' that fits; see `make_sampler`) and, for diffusion
    of latents, autoencoder. Saved and loaded in diffusers' manner, by save_pretrained and from_pretrained. Whoever
    guides by a classifier sets the attribute `classifier`, an `Evaluator`, which is not saved.
    """

    _optional_components: typing.ClassVar = ["autoencoder"]

    def __init__(self, denoiser: Denoiser, scheduler: SchedulerMixin, autoencoder: AutoencoderKL | None = None):
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler, autoencoder=autoencoder)
        # Saved folders name the front door, not the room: so every version of the workbook reads them.
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
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        return_process: bool = False,
        callback_on_step_end=None,
    ):
        """Draw one picture for each label set.

        Args:
            labels: a label set, a list of them, or (B, 24) multi-hot.
            num_inference_steps: steps of the scheduler. A step is one pass of the network over the batch (two with
                the sampler heun), or over the batch twice (with and without labels, in one pass) when guidance is on;
                a student needs no second one.
            guidance_scale: s, how strong the guidance is.
            guidance: one of GUIDANCES.
                "none": the labelled prediction as it is.
                "classifier-free": eps_uncond + s (eps_cond - eps_uncond) (Ho & Salimans 2022); 1 is off and costs no
                second half, 0 ignores the labels. The same formula serves for v and x_0, which are affine in eps.
                "composition": eps_uncond + s sum_i (eps_i - eps_uncond), where eps_i is told of object i alone (Liu et
                al. 2022); a pass for each object and one without labels.
                "classifier-1", "classifier-2": algorithms 1 and 2 of Dhariwal & Nichol 2021: s times the gradient of
                log p(labels | x_t) moves the mean of an ancestral step, or eps; 0 is off.
            guidance_interval: the steps at which guidance acts, by the lowest and highest t / T (Kynkäänniemi et al.
                2024); the others cost one pass, as without guidance.
            classifier_input: what the classifier is shown, "x_0" (as predicted at x_t, with the gradient through the
                network, in the same pass) or "x_t", which it was not trained on.
            generator: one, or one for each picture, which makes a picture independent of its batch.
            output_type: "pil" or "pt" ((B, 3, 64, 64) float32 in [-1, 1], on the CPU).
            return_process: also return the states on the way (see `ICLEVROutput`).
            callback_on_step_end: called as f(pipe, step, t, {"x_t": x_t}).
        """
        for name, value, allowed in (("output_type", output_type, ("pil", "pt")), ("guidance", guidance, GUIDANCES),
                                     ("classifier_input", classifier_input, ("x_0", "x_t"))):  # fmt: skip
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: choose from {', '.join(allowed)}")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps}: must be at least 1")
        if guidance in BY_CLASSIFIER and self.classifier is None:
            raise ValueError(f"guidance={guidance!r} needs a classifier: set pipe.classifier to an Evaluator")
        if guidance == "classifier-1" and not isinstance(self.scheduler, DDPMScheduler):
            raise ValueError("guidance='classifier-1' moves the mean of ancestral sampling: use sampler='ddpm'")
        labels = labels if isinstance(labels, torch.Tensor) else encode_labels(labels)
        labels = labels.to(self.device)
        if isinstance(generator, list) and len(generator) != len(labels):
            raise ValueError(f"{len(generator)} generators for {len(labels)} label sets: give one for each")
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        channels, size = self.denoiser.config.image_channels, self.denoiser.config.image_size
        x_t = randn_tensor((len(labels), channels, size, size), generator=generator, device=self.device)
        x_t = x_t * self.scheduler.init_noise_sigma
        acts = steps_with_guidance(self.scheduler, guidance_interval)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if takes_generator else {}
        process, guesses, wanted = [], [], guidance
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            guidance = wanted if acts[i] else "none"
            seen = self.scheduler.scale_model_input(x_t, t)  # x_t as the network knows it
            if guidance in BY_CLASSIFIER:
                prediction, gradient = self._classify(seen, t, labels, classifier_input)
                if guidance == "classifier-2":
                    prediction = prediction - guidance_scale * self._eps_to_prediction(gradient, t)
            else:
                prediction, gradient = self._guided(seen, t, labels, guidance, guidance_scale).float(), None
            stepped = self.scheduler.step(prediction, t, x_t, **extra)
            if return_process:
                guess = to_x_0(prediction, seen, self._alpha_bar(t), self.scheduler.config.prediction_type)
                process.append(decode(self.autoencoder, seen).cpu())
                guesses.append(decode(self.autoencoder, guess).cpu())
            x_t = stepped.prev_sample
            if guidance == "classifier-1":
                x_t = x_t + guidance_scale * self._variance(t) * gradient
            if callback_on_step_end is not None:
                callback_on_step_end(self, i, t, {"x_t": x_t})
        images = decode(self.autoencoder, x_t).clamp(-1, 1).float().cpu()
        states = [torch.stack([*s, images]) for s in (process, guesses)] if return_process else [None, None]
        output = ICLEVROutput(to_pil(images) if output_type == "pil" else images, *states)
        return output if return_dict else output.to_tuple()

    @property
    def guidances(self) -> tuple[str, ...]:
        """Those of GUIDANCES that its network can do: a student does without a null condition, and cannot compose."""
        can = {"composition": self.denoiser.condition.null is not None}
        can["classifier-free"] = can["composition"] or self.denoiser.config.student_steps > 0
        return tuple(kind for kind in GUIDANCES if can.get(kind, True))

    @property
    def scales(self) -> list[float]:
        """Scales of classifier-free guidance to look at, up to the highest that its network can be trusted with."""
        if "classifier-free" not in self.guidances:
            return [1.0]
        return [0.0, 1.0, 2.0, 4.0, MAX_GUIDANCE_SCALE if self.denoiser.config.student_steps else 8.0]

    def _guided(self, x_t, t, labels, guidance, scale):
        """The network's prediction, guided by itself."""
        if self.denoiser.config.student_steps and guidance != "composition":
            return self.denoiser(x_t, t, labels, None, scale if guidance == "classifier-free" else 1.0)
        null = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
        if guidance == "composition":
            slots = int(labels.sum(1).max())
            present, index = (v[:, :slots] for v in labels.sort(dim=1, descending=True, stable=True))
            single = F.one_hot(index.T, len(OBJECTS)).to(labels)  # (slots, B, 24)
            every = torch.cat([labels, single.flatten(0, 1)])
            outputs = self.denoiser(x_t.repeat(slots + 1, 1, 1, 1), t, every, torch.cat([~null, null.repeat(slots)]))
            uncond, *parts = outputs.float().chunk(slots + 1)
            there = present.T.view(slots, -1, 1, 1, 1)
            return uncond + scale * (there * (torch.stack(parts) - uncond)).sum(0)
        if guidance != "classifier-free" or scale == 1:
            return self.denoiser(x_t, t, labels, null)
        if scale == 0:
            return self.denoiser(x_t, t, labels, ~null)
        both = self.denoiser(x_t.repeat(2, 1, 1, 1), t, labels.repeat(2, 1), torch.cat([~null, null]))
        uncond, cond = both.float().chunk(2)
        return uncond + scale * (cond - uncond)

    @torch.enable_grad()
    def _classify(self, x_t, t, labels, shown):
        """The network's prediction at x_t and the gradient there of log p(labels | x_t); zero where x_t is noise."""
        x_t = x_t.detach().requires_grad_()
        prediction = self.denoiser(x_t, t, labels).float()
        alpha_bar_t = self._alpha_bar(t)
        x_0 = to_x_0(prediction, x_t, alpha_bar_t, self.scheduler.config.prediction_type)
        pictures = decode(self.autoencoder, x_0).clamp(-1, 1) if shown == "x_0" else decode(self.autoencoder, x_t)
        log_p = self.classifier.log_probability(pictures, labels)
        gradient = torch.autograd.grad(log_p.sum(), x_t)[0]
        return prediction.detach(), gradient * (alpha_bar_t > 1e-4)

    def _alpha_bar(self, t):
        return self.scheduler.alphas_cumprod.to(t.device)[t.round().long()]

    def _eps_to_prediction(self, gradient, t):
        """What a change of eps by sqrt(1 - alpha_bar_t) `gradient` is in what the network predicts."""
        alpha_bar_t = self._alpha_bar(t)
        a, b = alpha_bar_t.sqrt().clamp(min=1e-6), (1 - alpha_bar_t).sqrt()
        factor = {"epsilon": b, "v_prediction": b / a, "sample": -(b**2) / a}
        return factor[self.scheduler.config.prediction_type] * gradient

    def _variance(self, t):
        """Of an ancestral step (Ho et al. 2020, eq. 7)."""
        now, before = self._alpha_bar(t), self.scheduler.previous_timestep(t)
        before = self._alpha_bar(before) if before >= 0 else torch.ones_like(now)
        return (1 - before) / (1 - now) * (1 - now / before)
