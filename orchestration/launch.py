"""Runs a command that does not outlive whoever started it: python launch.py PARENT COMMAND ...

PARENT is that process's number. Linux kills the command as soon as it is gone, however it ended; elsewhere the command
ends by itself, and until then its lock on the run's folder keeps a second one out.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started the worker with &
    if os.getppid() != int(sys.argv[1]):  # it has died before it could be watched
        sys.exit(1)
    os.execv(sys.argv[2], sys.argv[2:])
