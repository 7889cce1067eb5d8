"""A sweep: notebooks once for each combination of parameters, several at a time, on dask's workers.

The workers are processes of this machine, one per GPU, or those of a dask scheduler, perhaps of many machines.
Stands on notebooks, parameters and storage.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time

from lab6.runner.notebooks import PASSED_ON, Failed, environment, execute, read_status, record
from lab6.runner.parameters import Refused
from lab6.storage import ROOT


def run_sweep(jobs, folder, facts, timeout=None, scheduler=None, workers=None):
    """Run notebooks into `folder` on dask's workers, leaving out what was done before with the same parameters.

    Whatever runs on a worker that dies is given to another, and each is entered in status.json once, when it is done.

    Raises Failed at the end, when some did.
    """
    from distributed import as_completed

    folder.mkdir(parents=True, exist_ok=True)
    left = what_is_left(jobs, folder)
    if not left:
        return
    gpus = None if scheduler else visible_gpus()
    failed = []
    with open_cluster(scheduler, min(len(left), workers or how_many(len(gpus or [])))) as client:
        doing = submit(client, left, folder, timeout, gpus)
        for number, future in enumerate(as_completed(doing), 1):
            name = doing[future]
            try:
                seconds, failure = future.result()
            except Exception as error:  # such as a worker that dies again and again
                seconds, failure = 0, f"{type(error).__name__}: {error}"
            print(f"{number} of {len(left)}:", end=" ")
            more = {"error": failure} if failure else {}
            record(folder, name, "failed" if failure else "ok", seconds, left[name][1], **facts, **more)
            if failure:
                failed.append(name)
                print(f"  {failure}", file=sys.stderr)
    if failed:
        raise Failed(f"{len(failed)} of {len(left)} failed: {'; '.join(failed)}")


def what_is_left(jobs, folder):
    """Those of `jobs` that have not run into `folder` with the same parameters; says which have."""
    status, left = read_status(folder), {}
    for name, (path, parameters) in jobs.items():
        before = status.get(name, {})
        same = before.get("state") == "ok" and before.get("parameters") == parameters
        if same and (folder / f"{name}.ipynb").is_file():
            print(f"{name}  done before, at commit {before['commit']}", flush=True)
        else:
            left[name] = path, parameters
    return left


# ── The workers ────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def open_cluster(scheduler, workers):
    """A dask client of the scheduler at an address, or, where that is None, of `workers` workers on this machine."""
    from distributed import Client, LocalCluster

    if scheduler:
        try:
            client = Client(scheduler, timeout=10)
            client.wait_for_workers(1, timeout=60)
        except (OSError, ValueError) as error:  # a time-out is an OSError
            raise Refused(f"--scheduler {scheduler}: no dask scheduler with workers answers there ({error})") from None
        with client:
            if any(worker["nthreads"] > 1 for worker in workers_of(client).values()):
                raise Refused(f"--scheduler {scheduler}: start its workers with --nthreads 1, a notebook each")
            yield client
        return
    threads = str(max(1, count_cores() // workers))  # of each, or they would fight
    names = [name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS") if name not in os.environ]
    # The notebooks' memory is that of their kernels, which dask does not see.
    options = dict(threads_per_worker=1, memory_limit=0, dashboard_address="127.0.0.1:0")
    with (
        environment(dict.fromkeys(names, threads)),
        LocalCluster(n_workers=workers, **options) as cluster,
        Client(cluster) as client,
    ):
        yield client


def workers_of(client):
    """{address: facts} of all workers of a dask client."""
    return client.scheduler_info(n_workers=-1)["workers"]


def how_many(gpus):
    """How many notebooks to run at a time: one per GPU; without, one per core as far as memory allows 4 GB to each."""
    import psutil

    return gpus or max(1, min(count_cores(), psutil.virtual_memory().available // 4_000_000_000))


def count_cores():
    """How many cores this process may use, which can be fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def visible_gpus():
    """Ids of the GPUs that this process sees, as CUDA_VISIBLE_DEVICES would name them."""
    import torch

    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(i) for i in range(count)])[:count]


def places_on_machines(workers, visible):
    """{name: its number among the workers on the same machine, from 0}; workers: as `workers_of` gives them.

    visible: {address: its CUDA_VISIBLE_DEVICES}. Workers of a machine that see different GPUs have been given their own
    (as dask-cuda does), so each takes the first that it sees: number 0.
    """
    by_machine = {}
    for address, worker in sorted(workers.items(), key=lambda item: str(item[1]["name"])):
        by_machine.setdefault(worker["host"], []).append((worker["name"], visible.get(address)))
    places = {}
    for found in by_machine.values():
        pinned = len({gpus for _, gpus in found}) > 1
        places |= {name: 0 if pinned else number for number, (name, _) in enumerate(found)}
    return places


# ── What they do ───────────────────────────────────────────────────────────────────────────────────────


def submit(client, jobs, folder, timeout, gpus):
    """Hand all jobs to the workers; returns {future: name}. Arguments as for `run_sweep` and `run_job`."""
    root = str(ROOT)

    def job(*arguments):  # pickled with its code: it finds this project wherever the worker was started
        if root not in sys.path:
            sys.path.insert(0, root)
        from lab6.runner.sweep import run_job

        return run_job(*arguments)

    variables = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    visible = client.run(lambda: os.environ.get("CUDA_VISIBLE_DEVICES"))
    common = timeout, variables, places_on_machines(workers_of(client), visible), gpus
    return {client.submit(job, path, folder / f"{name}.ipynb", parameters, *common, pure=False): name
            for name, (path, parameters) in jobs.items()}  # fmt: skip


def run_job(path, final, parameters, timeout, variables, places, gpus=None):
    """What a worker does: one notebook. Returns the seconds it took and why it failed, or None.

    variables: of the environment, for the notebook; places: {name of a worker: its number on its machine}; gpus: ids,
    of which each worker of a machine takes its own; None: those that the worker sees.
    """
    from distributed import get_worker

    gpus = visible_gpus() if gpus is None else gpus
    if gpus:
        place = places.get(get_worker().name, os.getpid())  # one that started later takes any
        variables = variables | {"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]}
    start, failure = time.monotonic(), None
    print(f"{final.stem:28}running", flush=True)
    try:
        with environment(variables):
            execute(path, final, parameters, timeout, f"  {final.stem}: ")
    except Failed as error:
        failure = str(error)
    return time.monotonic() - start, failure
