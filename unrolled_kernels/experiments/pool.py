"""Independent jobs in worker processes, each of one thread: small models train fastest side by side on a CPU."""

import concurrent.futures
import multiprocessing
import os
import threading

import torch


def default_workers(device, processes=1):
    """Processes that train at once on ``device`` for each of ``processes`` on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") and device == "cpu" else 1
    return max(1, cores // processes)


def run_jobs(jobs, *, workers, prepare, work, bar):
    """Yield the result of each job as it finishes.

    Args:
        jobs: a list, in the order in which they start.
        workers: processes; with 1 everything runs in this process, with torch's threads as they are.
        prepare: ``prepare()`` gives what all jobs of a process share; picklable.
        work: ``work(shared, job, on_progress)`` does one job and calls ``on_progress(count, **shown)`` now and then;
            picklable.
        bar: a tqdm bar that advances by each ``count`` and shows the last ``shown``.
    """

    def advance(count, **shown):
        if shown:
            bar.set_postfix(shown, refresh=False)
        bar.update(count)

    if workers <= 1:
        shared = prepare() if jobs else None
        for job in jobs:
            yield work(shared, job, advance)
        return
    context = multiprocessing.get_context("spawn")
    progress = context.SimpleQueue()
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (prepare, work, progress)) as pool:
        pending = {pool.submit(_work, job) for job in jobs}
        try:
            while pending:
                finished, pending = concurrent.futures.wait(pending, 0.2, concurrent.futures.FIRST_COMPLETED)
                while not progress.empty():
                    count, shown = progress.get()
                    advance(count, **shown)
                for future in finished:
                    yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start_worker(prepare, work, progress):
    global _worker
    # a killed run must not leave its workers behind
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _worker = prepare(), work, progress


def _exit_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(job):
    shared, work, progress = _worker
    return work(shared, job, lambda count, **shown: progress.put((count, shown)))
