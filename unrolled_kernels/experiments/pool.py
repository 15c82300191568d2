"""Independent jobs in worker processes, each of one thread: small models train fastest side by side on a CPU."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures.process import BrokenProcessPool

import torch


def default_workers(device, processes=1):
    """Processes that train at once on ``device`` for each of ``processes`` on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") and device == "cpu" else 1
    return max(1, cores // processes)


def run_jobs(jobs, *, workers, prepare, work, bar):
    """Yield each job with its result as it finishes.

    An interrupt, or an error in one job, raises KeyboardInterrupt in the others, which may save what they have.

    Args:
        jobs: a list, in the order in which they start.
        workers: processes; with 1 everything runs in this process, with torch's threads as they are.
        prepare: ``prepare()`` gives what all jobs of a process share; picklable.
        work: ``work(shared, job, on_progress)`` does one job and calls ``on_progress(count, **shown)`` now and then;
            picklable.
        bar: a tqdm bar that advances by each ``count`` and shows the last ``shown``.
    Raises:
        ChildProcessError: a worker was killed.
    """

    def advance(count, **shown):
        if shown:
            bar.set_postfix(shown, refresh=False)
        bar.update(count)

    if workers <= 1:
        shared = prepare() if jobs else None
        for job in jobs:
            yield job, work(shared, job, advance)
        return
    context = multiprocessing.get_context("spawn")
    progress, stop = context.SimpleQueue(), context.Event()
    start = prepare, work, progress, stop
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, start) as pool:
        try:
            with _interrupts_held():
                job_of = {pool.submit(_work, job): job for job in jobs}
            pending = set(job_of)
            while pending:
                finished, pending = concurrent.futures.wait(pending, 0.2, concurrent.futures.FIRST_COMPLETED)
                while not progress.empty():
                    count, shown = progress.get()
                    advance(count, **shown)
                for future in finished:
                    yield job_of[future], future.result()
        except BrokenProcessPool:
            raise ChildProcessError(
                "a worker process was killed, as happens where memory runs out; give the same command again to "
                "continue from here, with fewer --workers if need be"
            ) from None
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


@contextlib.contextmanager
def _interrupts_held():
    """Until the block is left; for the processes that start in it, until they have a handler of their own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = []
    previous = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    # what starts inherits the mask, and no handler
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, previous)
    if came:
        signal.raise_signal(signal.SIGINT)


# whether a job is at work, whether it was interrupted, and whether no other is to begin
_working = _interrupted = _stopped = False


def _start_worker(prepare, work, progress, stop):
    global _worker
    # a killed run must not leave its workers behind
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    threading.Thread(target=_interrupt_when_set, args=(stop,), daemon=True).start()
    signal.signal(signal.SIGINT, _interrupt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    sys.unraisablehook = _interrupt_again
    torch.set_num_threads(1)
    _worker = prepare(), work, progress


def _exit_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _interrupt_when_set(stop):
    global _stopped
    stop.wait()
    _stopped = True
    _wake()


def _wake():
    # to the main thread, which may be asleep
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def _interrupt(signum, frame):
    # once a job: Ctrl-C reaches every process of a terminal, and the parent passes it on
    global _interrupted
    if _working and not _interrupted:
        _interrupted = True
        raise KeyboardInterrupt


def _interrupt_again(unraisable):
    """Where an interrupt fell into a callback, of a weak reference for instance, the interpreter only prints it."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return

    def again():
        global _interrupted
        _interrupted = False
        _wake()

    # when the callback and this are over: until then the next interrupt would be lost here too
    threading.Timer(0.05, again).start()


def _work(job):
    global _working, _interrupted
    shared, work, progress = _worker
    _working, _interrupted = True, False
    try:
        # the pool hands out one job more than there are workers. Not stop.is_set(): an interrupt in it keeps its lock
        if _stopped:
            raise KeyboardInterrupt
        return work(shared, job, lambda count, **shown: progress.put((count, shown)))
    except Exception:
        if _interrupted:
            # some code that was interrupted, an import for instance, makes another error of it
            raise KeyboardInterrupt from None
        raise
    finally:
        _working = False
