"""Run one redis-server for as long as this process's standard input stays open, then end it.

Started by `EmbeddedRedis` as a script of its own, with the standard library alone, because it must stay small and keep
its promise whatever happens to the parent: a killed parent closes the pipe. Should this process itself be killed, Linux
ends the server with it. Usage: python watcher.py redis-server ARGUMENT...
"""

import ctypes
import os
import select
import signal
import subprocess
import sys

_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def main() -> int:
    on_linux = sys.platform.startswith("linux")
    if on_linux:
        # Loaded before the fork, where nothing can go wrong any more.
        ctypes.CDLL(None)
    # This process has one thread, so code between fork and exec is safe, and the death signal, which belongs to the
    # forking thread, means the whole process. The inherited lock file stays open in the server.
    server = subprocess.Popen(
        sys.argv[1:],
        stdin=subprocess.DEVNULL,
        close_fds=False,
        preexec_fn=_die_with_parent if on_linux else None,
    )
    # SIGCHLD makes the wait below return when the server ends by itself.
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while server.poll() is None:
        ready, _, _ = select.select([sys.stdin.fileno(), wake_read], [], [])
        if sys.stdin.fileno() in ready:
            server.terminate()
            return server.wait()
        os.read(wake_read, 512)
    return server.wait()


if __name__ == "__main__":
    sys.exit(abs(main()))
