"""How many loader processes a machine has room for: cores, shared memory, file handles."""

import os
import shutil

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None

SHARED = "/dev/shm"  # where Linux keeps what processes share; Docker gives 64 MiB
AHEAD = 2  # batches that each worker of torch's DataLoader keeps ready
HANDLES, HANDLES_EACH = 64, 16  # open files of a run, and of each worker


def workers_that_fit(workers: int, batch: int) -> int:
    """At most `workers` processes that load batches of `batch` bytes.

    More processes than cores only slow each other down; the published default is 10 (Q3). A notice
    says if shared memory or file handles allow fewer.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of torchrun on this machine
    workers = min(workers, max(1, (os.cpu_count() or 1) // local))
    if workers and os.path.isdir(SHARED):
        free = shutil.disk_usage(SHARED).free // local
        fit = max(0, (free // max(batch, 1) - 1) // AHEAD)
        if fit < workers:
            print(
                f"notice: {SHARED} has {free / 2**20:,.0f} MiB left, and a batch takes "
                f"{batch / 2**20:,.1f}: {loaders(fit)} instead of {workers}; a container gets more "
                "with --shm-size, e.g. docker run --shm-size 8g"
            )
            workers = fit
    if workers and resource:
        need = HANDLES + HANDLES_EACH * workers
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = need if hard == resource.RLIM_INFINITY else min(need, hard)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        if most < need:
            fit = max(0, (most - HANDLES) // HANDLES_EACH)
            print(
                f"notice: this process may open {hard} files: {loaders(fit)} instead of {workers}; "
                "raise the limit with ulimit -n"
            )
            workers = fit
    return workers


def loaders(workers: int) -> str:
    if not workers:
        return "batches are loaded in this process"
    return f"{workers} loader process{'es' * (workers > 1)}"


def explain(error: Exception) -> str | None:
    """What a failure of torch's loader processes means, or None if it is another error.

    A broken connection counts as one: give only those that come while a batch is fetched.
    """
    said = str(error)
    if "Too many open files" in said:
        return "the loader processes ran out of file handles: raise ulimit -n, or --workers 0"
    memory = "Bus error", "shared memory", "unable to write to file", "No space left on device"
    if any(words in said for words in memory):
        return (
            f"the loader processes ran out of shared memory ({SHARED}): give --workers 0, or the "
            "container more of it, e.g. docker run --shm-size 8g"
        )
    broken = isinstance(error, (ConnectionError, EOFError))
    if broken or ("DataLoader worker" in said and ("killed" in said or "exited" in said)):
        what = (said or type(error).__name__).splitlines()[0]
        return f"a loader process ended ({what}): out of memory? Try fewer --workers"
    return None
