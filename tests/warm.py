"""A Python that starts at once: it is forked from a process that has imported torch already.

The suite calls hundreds of programs, each of which imports torch, scipy and nltk for seconds. The
fixture `warm` is a command that is called like python, with a script or -m and a module, and their
arguments. It passes on SIGINT and SIGTERM; if it is killed, so is the program. But the program has
another process id and group, and not the PYTHONPATH of its caller. This file is both ends:

    python warm.py serve SOCKET                 # imports, and forks for each call
    python warm.py call SOCKET SCRIPT [...]     # gives it arguments, folder, streams, ...
"""

import contextlib
import gc
import json
import os
import resource
import select
import signal
import socket
import sys
import threading

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LENGTH = 12  # digits of the length of what is sent
LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]


def call(path: str, words: list[str]) -> None:
    """Let the process at a socket run a script; end as it ends."""
    if words[0] == "-c":
        os.execv(sys.executable, [sys.executable, *words])
    limits = {kind: resource.getrlimit(kind) for kind in LIMITS}
    about = {"argv": words, "cwd": os.getcwd(), "env": dict(os.environ), "limits": limits}
    about = json.dumps(about).encode()
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(path)
        socket.send_fds(line, [f"{len(about):{LENGTH}}".encode()], [0, 1, 2])
        line.sendall(about)
        with line.makefile("rb") as reply:
            pid = int(reply.readline())
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda number, _: os.kill(pid, number))
            code = int(reply.readline())
    sys.exit(code if code >= 0 else 128 - code)


def serve(path: str) -> None:
    """Fork for each call until standard input ends. Returns in the forks, for their program."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
        print("ready", flush=True)
        while server in select.select([server, sys.stdin], [], [])[0]:
            line, _ = server.accept()
            if os.fork() == 0:
                server.close()
                return run_one(line)
            line.close()
    sys.exit()


def run_one(line: socket.socket) -> None:
    """Fork again: one process becomes the program, and one waits for it and says how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, streams, _, _ = socket.recv_fds(line, LENGTH, 3)
    with line.makefile("rb") as rest:
        about = json.loads(rest.read(int(length)))
    pid = os.fork()
    if pid == 0:
        line.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(about["cwd"])
        os.environ.clear()
        os.environ.update(about["env"])
        for kind, limit in about["limits"].items():
            resource.setrlimit(int(kind), limit)
        sys.argv = about["argv"]
        return
    for stream in streams:
        os.close(stream)
    line.sendall(b"%d\n" % pid)
    threading.Thread(target=kill_without_caller, args=(line, pid), daemon=True).start()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    line.sendall(b"%d\n" % code)
    os._exit(0)


def kill_without_caller(line: socket.socket, pid: int) -> None:
    if line.recv(1) == b"":
        os.kill(pid, signal.SIGKILL)


def run() -> None:
    """Be python with the arguments in sys.argv."""
    import runpy

    if sys.argv[0] == "-u":
        sys.stdout.reconfigure(write_through=True)
        del sys.argv[0]
    if sys.argv[0] == "-m":
        sys.path[0] = os.getcwd()
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        return
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    if not f"{sys.path[0]}/".startswith(f"{ROOT}/"):  # a script of a copy of the project
        forget_the_project()
    runpy.run_path(sys.argv[0], run_name="__main__")


def forget_the_project() -> None:
    """Let its modules be imported anew, from elsewhere."""
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None) or ""
        if path.startswith(ROOT + os.sep) and "site-packages" not in path and name != "__main__":
            del sys.modules[name]


if __name__ == "__main__" and sys.argv[1] == "call":
    call(sys.argv[2], sys.argv[3:])
elif __name__ == "__main__":
    import nltk  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch._dynamo  # noqa: F401  (optimizers import it)
    import torch.utils.tensorboard  # noqa: F401
    import tqdm  # noqa: F401

    sys.path[0] = ROOT
    import evaluation  # noqa: F401
    import train  # noqa: F401

    with contextlib.suppress(ImportError):  # fastapi is not there
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    gc.collect()
    gc.freeze()  # a fork's collector would copy all that it looks at
    serve(sys.argv[2])
    run()
