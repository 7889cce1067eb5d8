#!/usr/bin/env python3
"""Run the workbook's notebooks in order, then make the report from them.

    python run_notebooks.py                              all notebooks, then report.html and report.pdf
    python run_notebooks.py --profile shipped            tiny, quick, shipped, full, or auto (the default)
    python run_notebooks.py --only 04 -p split=test -p guidance_scale=3
    python run_notebooks.py --report                     only the report, from notebooks that ran before
    python run_notebooks.py --only 06 --sweep preset=tokens,linear-attn seed=0,1,2        every combination
    torchrun --nproc-per-node 8 run_notebooks.py --train -p epochs=50      notebook 03's training, in 8 processes
    LAB6_STUDENT_ID=... LAB6_STUDENT_NAME=... python run_notebooks.py --submission         what the course wants
    python run_notebooks.py --sample "red sphere, cyan cube; gray cylinder" --out FOLDER -p steps=10 -p seed=3
    python run_notebooks.py --sample my.json --out FOLDER                  an image for each label set, and a grid
    python run_notebooks.py --score FOLDER --labels my.json                what evaluator and judge find in 0.png, ...

`-p name=value` sets a variable of the cell tagged `parameters` in every chosen notebook that has it; unknown
names and wrong types are refused before anything runs. Executed notebooks go to
data/runs/notebooks/PROFILE/ (as NN_name.partial.ipynb until all of it ran) with a status.json beside them;
the report goes to the profile's figures folder. The run stops at the first failing notebook.

A sweep runs the chosen notebooks once for each combination, into sweep/ in that folder, makes no report, and continues
past a failing one. Run again, it does what is not done yet; delete a combination's notebook to have it done again.
It runs on dask: on this machine as many at a time as there are GPUs, or as cores and memory allow (--workers), or on
the workers of a scheduler (--scheduler) that see the same folders and have a thread each (dask worker --nthreads 1);
each takes a GPU of its machine. What a worker did when it died is done again.

Exit status: 0 all ran, 1 a notebook failed, 2 a request that cannot be carried out, 130 interrupted.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from lab6.runner.direct import sample_sets, score_folder
from lab6.runner.notebooks import Failed, run_all, run_facts, set_environment
from lab6.runner.parameters import (
    NOTEBOOKS,
    Refused,
    check_values,
    choose_notebooks,
    plan_jobs,
    read_settings,
    settings_with,
)
from lab6.runner.report import make_report
from lab6.runner.submission import LAYOUTS, make_submission
from lab6.runner.sweep import run_sweep


def parse(argv=None):
    """The options of a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="auto", help="tiny, quick, shipped, full, or auto (the default)")
    parser.add_argument("--only", metavar="NN[,NN]", help="run these notebooks only, by number")
    parser.add_argument("-p", dest="assignments", metavar="name=value", action="append", default=[])
    parser.add_argument("--sweep", metavar="name=value,value", nargs="+", help="run once for each combination")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="sweep on the workers of this dask scheduler")
    parser.add_argument("--workers", type=int, metavar="N", help="sweep N notebooks at a time on this machine")
    parser.add_argument("--train", action="store_true", help="run no notebook, train what notebook 03 would")
    parser.add_argument("--settings", type=Path, metavar="FILE", help="train with the settings in this json file, "
                        "such as a run's settings.json; of -p only resume= goes with it")  # fmt: skip
    parser.add_argument("--timeout", type=int, metavar="SECONDS", help="fail when one cell takes longer")
    parser.add_argument("--report", action="store_true", help="run nothing, only make the report again")
    parser.add_argument("--submission", action="store_true", help="run nothing, make the course's zip")
    parser.add_argument("--layout", choices=LAYOUTS,
                        help="what a submission holds: 2026 images in the zip, earlier weights beside it")  # fmt: skip
    parser.add_argument("--sample", metavar="LABELS", help="run no notebook, sample these label sets (a comma between "
                        "labels, a semicolon between sets) or those of a json file; -p as for notebook 04")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where --sample puts the images")
    parser.add_argument("--score", type=Path, metavar="FOLDER", help="run no notebook, score the images 0.png, 1.png, "
                        "... in a folder")  # fmt: skip
    parser.add_argument("--labels", metavar="LABELS", help="what --score compares with: as for --sample; default "
                        "labels.json in the folder")  # fmt: skip
    parser.add_argument("--no-report", action="store_true", help="run notebooks, make no report")
    return parser.parse_args(argv)


def plan(args, notebooks):
    """What is to be done, checked as a whole before anything runs. Raises Refused.

    Returns the settings (of notebook 03 to train, of 04 for a submission, else of the profile), the parameters of that
    notebook, and {name of the executed notebook: (path, parameters)} of all that were chosen.
    """
    check_options(args)
    chosen = choose_notebooks(notebooks, "03" if args.train else "04" if direct(args) else args.only)
    jobs = plan_jobs(chosen, args.assignments, args.sweep or (), by_itself=bool(args.only))
    # After the checks above, since it takes seconds (torch). diffusers loads a pipeline only if this was imported.
    import lab6_utils  # noqa: F401

    check_values(args.profile, jobs)
    given = {}
    if args.train:
        ((_, given),) = jobs.values()
    elif args.submission or direct(args):  # of the system that notebook 04 samples with
        _, given = jobs.get("04_sampling_and_guidance", (None, {}))
    settings = read_settings(args.settings) if args.settings else settings_with(args.profile, given)
    return settings, given, jobs


def direct(args):
    """Is this asked of no notebook, but of sampling or scoring itself?"""
    return args.sample is not None or args.score is not None


def check_options(args):
    """Raise Refused for options that do not go together."""
    if args.train and (args.only or args.sweep):
        raise Refused("--train trains what notebook 03 would: it goes without --only and --sweep")
    fits = args.sweep and (args.workers is None or args.workers > 0)
    if (args.workers is not None or args.scheduler) and (not fits or (args.workers and args.scheduler)):
        raise Refused("--workers N (1 or more) or --scheduler ADDRESS goes with --sweep")
    others = [assignment for assignment in args.assignments if not assignment.startswith("resume=")]
    both = args.sample is not None and args.score is not None
    if (args.out and args.sample is None) or (args.labels and args.score is None) or both:
        raise Refused("--out FOLDER goes with --sample LABELS, --labels LABELS with --score FOLDER")
    if args.layout and not args.submission:
        raise Refused("--layout goes with --submission")
    if direct(args) and (args.only or args.sweep or args.train or args.submission or args.report):
        raise Refused("--sample and --score run no notebook: they go without --only, --sweep, --train and the like")
    if args.settings and (not args.train or others or args.profile != "auto"):
        raise Refused("--settings FILE goes with --train, without --profile, and without -p other than -p resume=...")


def act(args, settings, given, jobs, notebooks):
    """Do what `plan` returned. Raises Refused, or Failed where a notebook did."""
    if args.train:
        train(settings, given.get("resume", "auto"))
        return
    if args.sample is not None:
        sample_sets(settings, given.get("weights", "auto"), args.sample, args.out)
        return
    if args.score is not None:
        score_folder(settings, args.score, args.labels)
        return
    if args.submission:
        make_submission(settings, given.get("weights", "auto"), notebooks, args.layout or next(iter(LAYOUTS)))
        return
    if not args.report:
        folder = settings.runs / "notebooks" / settings.profile / ("sweep" if args.sweep else "")
        jobs = {name: (path, {"profile": settings.profile, **chosen}) for name, (path, chosen) in jobs.items()}
        facts = run_facts(settings)
        if args.sweep:
            run_sweep(jobs, folder, facts, args.timeout, args.scheduler, args.workers)
        else:
            run_all(jobs, folder, facts, args.timeout)
    if not args.no_report and not args.sweep:
        make_report(settings, notebooks)


def train(settings, resume):
    """Train in this process, which may be one of several. Raises Refused: no data, other settings, no memory."""
    from lab6.processes import should_resume, train_here

    try:
        train_here(settings, should_resume(settings, resume))
    except (OSError, ValueError, RuntimeError) as error:
        raise Refused(error) from None


def main(argv=None, notebooks=NOTEBOOKS):
    """Run the command line `argv` on a folder of notebooks; returns the exit status."""
    args = parse(argv)
    for number in (signal.SIGINT, signal.SIGTERM):  # both shut the kernels down; a shell may have had SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    set_environment()
    rank, count = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")  # torchrun's
    speaker = f"rank {rank}: " if rank and count != "1" else ""
    try:
        act(args, *plan(args, notebooks), notebooks)
    except Refused as error:
        print(f"{speaker}{error}", file=sys.stderr)
        return 2
    except Failed as error:
        print(f"  {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{speaker}interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
