"""Forward process: q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I) (Ho et al. 2020, eq. 4).

Noise schedules, and the schedulers and samplers of diffusers that are made from them. Notebook 02. Stands on options.
"""

from __future__ import annotations

import math

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from lab6.options import System


def _linear(T, reference):
    """beta from 1e-4 to 0.02 (Ho et al. 2020), whatever T is: a small T ends with too little noise."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0)


def _linear_rescaled(T, reference):
    """The same betas times 1000 / T: any T ends at (almost) the noise that T = 1000 has with "linear"."""
    return torch.cumprod(1 - (torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T).clamp(max=0.999), 0)


def _cosine(T, reference):
    """alpha_bar_t = f(t) / f(0), f(t) = cos^2((t / T + s) / (1 + s) * pi / 2), s = 0.008 (Nichol & Dhariwal 2021)."""
    time = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - beta, 0)


def _sigmoid(T, reference):
    """beta follows a sigmoid from 1e-4 to 0.02 (the "sigmoid" of diffusers, after GeoDiff)."""
    beta = torch.sigmoid(torch.linspace(-6, 6, T, dtype=torch.float64)) * (0.02 - 1e-4) + 1e-4
    return torch.cumprod(1 - beta, 0)


def _shifted_cosine(T, reference):
    """The cosine with log-SNR moved by 2 log(reference / 64) (Hoogeboom et al. 2023): below 64, noisier."""
    alpha_bar = _cosine(T, reference)
    return torch.sigmoid(torch.logit(alpha_bar) + 2 * math.log(reference / 64))


#: Add a schedule here and every notebook knows it: name -> function of (T, reference) giving alpha_bar (T,). Only
#: "shifted-cosine" uses `reference`, the resolution at which the cosine would be right.
SCHEDULES = {
    "linear": _linear, "linear-rescaled": _linear_rescaled, "cosine": _cosine, "sigmoid": _sigmoid,
    "shifted-cosine": _shifted_cosine,
}  # fmt: skip


def alphas_bar(schedule: str, T: int = 1000, reference: int = 32, zero_snr: bool = False) -> torch.Tensor:
    """alpha_bar_t for t = 0 ... T-1: (T,) float64, falling from almost 1 towards 0.

    Args:
        schedule: a key of SCHEDULES.
        reference: resolution, for "shifted-cosine".
        zero_snr: shift and scale sqrt(alpha_bar) so that the last is exactly 0 (Lin et al. 2024, algorithm 1).
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r}: choose from {', '.join(SCHEDULES)}")
    alpha_bar = SCHEDULES[schedule](T, reference)
    if alpha_bar.shape != (T,) or not ((alpha_bar > 0) & (alpha_bar < 1)).all() or (alpha_bar.diff() > 0).any():
        raise ValueError(f"schedule={schedule!r}: it must return {T} values of alpha_bar, the share of the image's "
                         "variance that is left, between 0 and 1 and falling (not beta)")  # fmt: skip
    if zero_snr:
        root = alpha_bar.sqrt()
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return alpha_bar


def snr(alpha_bar: torch.Tensor) -> torch.Tensor:
    """Signal-to-noise ratio alpha_bar / (1 - alpha_bar) of x_t, of the same shape."""
    return alpha_bar / (1 - alpha_bar)


def q_sample(x_0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (Ho et al. 2020, eq. 4).

    Args:
        x_0, eps: (B, 3, H, W); t: (B,) integers in 0 ... T-1; alpha_bar: (T,).
    """
    a = alpha_bar[t].to(x_0).view(-1, 1, 1, 1)
    return a.sqrt() * x_0 + (1 - a).sqrt() * eps


def to_x_0(output: torch.Tensor, x_t: torch.Tensor, alpha_bar_t: torch.Tensor, prediction: str) -> torch.Tensor:
    """The image that a prediction (epsilon, v_prediction or sample) implies at x_t; alpha_bar_t broadcasts."""
    a, b = alpha_bar_t.sqrt(), (1 - alpha_bar_t).sqrt()
    if prediction == "epsilon":
        return (x_t - b * output) / a
    return a * x_t - b * output if prediction == "v_prediction" else output


def to_eps(output: torch.Tensor, x_t: torch.Tensor, alpha_bar_t: torch.Tensor, prediction: str) -> torch.Tensor:
    """The noise that a prediction (epsilon, v_prediction or sample) implies at x_t; alpha_bar_t broadcasts."""
    a, b = alpha_bar_t.sqrt(), (1 - alpha_bar_t).sqrt()
    if prediction == "sample":
        return (x_t - a * output) / b
    return a * output + b * x_t if prediction == "v_prediction" else output


def make_scheduler(options: System) -> DDPMScheduler:
    """The diffusers scheduler that training and ancestral sampling use, for the schedule of `options`.

    Every schedule goes in as trained_betas. DDPM and DDIM clip pixels of x_0 to [-1, 1] on the way. Sampling times are
    spaced "trailing", so that few-step sampling starts at the noisiest step (Lin et al. 2024).
    """
    reference = options.schedule_reference * 64 // options.image_size  # alphas_bar compares it with 64
    alpha_bar = alphas_bar(options.schedule, options.num_train_timesteps, reference)
    beta = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=alpha_bar.dtype), alpha_bar[:-1]])
    return DDPMScheduler(
        num_train_timesteps=options.num_train_timesteps,
        trained_betas=beta.clamp(max=0.999).tolist(),
        prediction_type=options.prediction,
        rescale_betas_zero_snr=options.zero_snr,
        timestep_spacing="trailing",
        clip_sample=options.space == "pixels" and not options.student_steps,  # x_0 of a distilled step is no image
    )


class DDIM(DDIMScheduler):
    """DDIM (Song et al. 2021, eq. 12), which steps to the next of its own times, and from the last to the clean end.

    The one of diffusers steps from t to t - T // steps. Where T / steps is no whole number it ends before the image is
    clean, the more so the more steps it takes.
    """

    __module__ = "lab6_utils"  # saved pipelines name the front door, not this room

    def step(self, model_output, timestep, sample, eta=0.0, generator=None, return_dict=True):
        """From x_t at `timestep` to the next time, as in diffusers; eta: share of fresh noise, 1 as much as DDPM."""
        later = self.timesteps[self.timesteps < timestep]
        a = self.alphas_cumprod[timestep]
        a_next = self.alphas_cumprod[later[0]] if len(later) else self.final_alpha_cumprod
        x_0, eps = (to(model_output, sample, a, self.config.prediction_type) for to in (to_x_0, to_eps))
        if self.config.clip_sample:
            x_0 = x_0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        fresh = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)).sqrt()
        x_next = a_next.sqrt() * x_0 + (1 - a_next - fresh**2).clamp(min=0).sqrt() * eps
        if eta:
            x_next += fresh * randn_tensor(sample.shape, generator, sample.device, sample.dtype)
        return DDIMSchedulerOutput(prev_sample=x_next, pred_original_sample=x_0) if return_dict else (x_next, x_0)


#: Add a sampler here and every notebook knows it: name -> (scheduler of diffusers, its options).
#: Any other scheduler of diffusers can be put into `pipe.scheduler` as well.
SAMPLERS = {
    "ddpm": (DDPMScheduler, {}),
    "ddim": (DDIM, {}),
    "dpm-solver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "unipc": (UniPCMultistepScheduler, {"solver_order": 2}),
    # Two evaluations of the network a step. Its noise levels are even in log sigma: if they were even in t, the
    # first step, from the cosine's sigma = 20,000 to about 10, would be too long for a second order.
    "heun": (HeunDiscreteScheduler, {"use_exponential_sigmas": True}),
}


#: Samplers that begin at sigma = sqrt(1 / alpha_bar - 1), which zero terminal SNR makes infinite.
NOT_WITH_ZERO_SNR = ("heun",)


def make_sampler(name: str, scheduler: DDPMScheduler):
    """The sampler `name` of SAMPLERS for the noise schedule of `scheduler`."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler={name!r}: choose from {', '.join(SAMPLERS)}")
    if name in NOT_WITH_ZERO_SNR and scheduler.config.get("rescale_betas_zero_snr"):
        raise ValueError(f"sampler={name!r} with zero_snr=True: it would start at infinite noise; use another sampler")
    scheduler_class, options = SAMPLERS[name]
    # Only what describes the noise: diffusers would also hand on the options of the sampler before.
    shared = ("num_train_timesteps", "trained_betas", "prediction_type", "rescale_betas_zero_snr", "timestep_spacing",
              "clip_sample")  # fmt: skip
    noise = {key: scheduler.config[key] for key in shared if key in scheduler.config}
    return scheduler_class.from_config(noise, **options)


def set_times(scheduler, steps: int):
    """Set the times of a scheduler of diffusers, `steps` of them, on the CPU.

    The spacing "trailing" is computed there in floating point: at some step counts (61 of T = 1000) it gives one time
    too many, t = -1, at which the noise schedule would be read at its other end.
    """
    scheduler.set_timesteps(steps)
    if scheduler.timesteps[-1] < 0:
        scheduler.timesteps, scheduler.num_inference_steps = scheduler.timesteps[:-1], steps
        if getattr(scheduler, "sigmas", None) is not None:  # the last of them is the clean end
            scheduler.sigmas = torch.cat([scheduler.sigmas[:-2], scheduler.sigmas[-1:]])
