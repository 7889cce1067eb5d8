"""Shared code of the i-CLEVR diffusion workbook: the one module that notebooks and users import.

Everything that is imported here lives in the rooms of the package lab6/, in the order of the notebooks:

    01  labels, files, dataset           the 24 objects, the course's files, the training images
        holdings                         folders and zips, searched for files
        places                           where the objects of a scene stand in its images
    02  diffusion                        noise schedules, q(x_t | x_0), schedulers and samplers
    03  conditioning, denoiser           how labels enter a U-Net
        autoencoder, distillation        two optional systems: latent diffusion, sampling in few steps
        objective, optimizers            weights of the loss, learning rate; AdamW and Muon
        examples, training               what a training step sees; EMA, checkpoints that resume exactly
        processes, runs                  training on several GPUs; what a run leaves on disk
    04  guidance, pipeline, sampling     how labels steer the sampling; labels in, images out
        layouts                          where objects are to stand
        widgets                          the sliders
    05  evaluators, evaluation           networks that say which objects are in an image; the course's protocol
        evaluator_training, measures     how the evaluators are made; intervals and distances
    06  results, experiments             results.json, its tables and comparisons
    all options, settings, presets       every choice of a run
        figures, machine, storage        what all of them use

The rooms stand on floors, and a room imports only from lower floors: pyproject.toml lists them, and CI checks it. To
add something, enter it in its registry: a schedule in SCHEDULES or a sampler in SAMPLERS (lab6/diffusion.py), a
conditioning in CONDITIONINGS (lab6/conditioning.py), a guidance in GUIDANCES (lab6/guidance.py), a system in PRESETS
(lab6/presets.py). What training sees is opened in lab6/examples.py; a setting is a field in lab6/options.py; a figure
is a plot_ function in lab6/figures.py that is imported here.

Conventions. Images are (B, 3, 64, 64) float32 in [-1, 1]; labels are (B, 24) multi-hot float32 in the order of OBJECTS;
places are (B, 24, 2), x and y in pixels of the 64 x 64 image, nan where nothing is said;
timesteps run from 0 (almost clean) to T - 1 (almost noise). The letters are those of Ho et al. 2020: x_0, x_t, eps, and
alpha_bar for the cumulative product of (1 - beta). Guidance is eps_uncond + s * (eps_cond - eps_uncond): s = 1 is off,
s = 0 ignores the labels. All randomness is derived from the seed and a named stream, so the same settings give the same
result, resumed or not (bit for bit on a CPU, within rounding on a GPU). Importing this module only defines names.
"""

# ruff: noqa: F401, I001 - these imports are here to be passed on, in the order of the notebooks
# fmt: off
import dataclasses

# Saved pipelines name this module, and diffusers looks up here what kind of component each class is: without
# ModelMixin no pipeline loads.
from diffusers import DDPMScheduler, ModelMixin, SchedulerMixin
from torch.nn import functional as F

from lab6.labels import (
    SHAPES, COLOURS, OBJECTS, MANUAL_SET, encode_labels, encode_places, decode_labels, to_float, to_uint8, to_pil,
)
from lab6.files import (
    DataFiles, choose_splits, find_data, read_data, load_renderer, scene_of, held_out_scenes, unseen_sets,
)
from lab6.holdings import open_holding
from lab6.dataset import crowded_scenes, ICLEVRDataset, open_image, training_set
from lab6.places import FIRST_PLACE, place_of_change, find_places, places_by_object
from lab6.diffusion import (
    SCHEDULES, alphas_bar, snr, q_sample, to_x_0, to_eps, make_scheduler, DDIM, SAMPLERS, NOT_WITH_ZERO_SNR,
    make_sampler, set_times,
)
from lab6.conditioning import (
    LinearCondition, MLPCondition, MultiHotCondition, TokenCondition, LayoutCondition, CONDITIONINGS,
)
from lab6.denoiser import Denoiser, make_denoiser, count_flops, describe_denoiser, label_effect, count_parameters
from lab6.autoencoder import (
    make_autoencoder, encode_images, decode_latents, LatentDataset, AutoencoderEpoch, train_autoencoder,
    load_autoencoder,
)
from lab6.distillation import sample_trajectories, Trajectories, load_teacher
from lab6.optimizers import OPTIMIZERS
from lab6.examples import open_examples, training_batch
from lab6.objective import learning_rate, loss_weights, Balance
from lab6.training import Epoch, train
from lab6.processes import should_resume, count_processes, train_in_processes
from lab6.runs import run_folder, load_pipeline
from lab6.guidance import (
    MAX_GUIDANCE_SCALE, Guidance, GUIDANCES, BY_CLASSIFIER, steps_with_guidance, guidance_kind, guidance_record,
    describe_guidance,
)
from lab6.pipeline import ICLEVROutput, ICLEVRPipeline
from lab6.layouts import PLACES, draw_places, gaps
from lab6.sampling import sample, sample_seeds, sample_process, places_of, samplers_for, count_evaluations
from lab6.widgets import guidance_explorer
from lab6.evaluators import Evaluator, count_hits
from lab6.evaluator_training import prepare_evaluator, prepare_judge, train_evaluator
from lab6.evaluation import Evaluation, evaluate, GRADES, grade, print_course_result
from lab6.measures import (
    bootstrap_intervals, paired_test, frechet_distance, nearest_neighbours, frechet_by_halves, mean_by_group, lattice,
    HUES, object_places, placement_errors, spread_of_places, with_interval,
)
from lab6.results import result_record, results_table, load_results, results_of_presets, systems_table, save_result
from lab6.experiments import (
    settings_of, drop_unknown, compare_experiments, comparison_table, plot_accuracy, plot_comparisons,
)
from lab6.settings import Settings, make_settings
from lab6.presets import PROFILES, SMALL_TOKENS, PRESETS, REPORTED
from lab6.figures import (
    save_images, new_figure, plot_image, plot_images, show_figure, save_figure, markdown_table, plot_confusions,
    plot_errors,
)
from lab6.machine import autocast, wait_for, make_generator, headless, progress, format_seconds, commit, device_name
from lab6.storage import ROOT, WEIGHTS, name_of, write_json, load_history, sha256_of, has_folder

__all__ = [name for name in dir() if not name.startswith("_")]
