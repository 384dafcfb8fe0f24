"""Commands in a shell, whose `python` need not import torch and TRL first: each is a fork of a process that has.

What is run, its arguments, environment, folder, output and exit code are as without; only the seconds of the imports
are saved. That the commands work from nothing, and what they import, is for test_cli.py and others to say.
"""

import contextlib
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

# What the shell finds as `python`: hands the command and its three streams over, and ends as it ends.
CLIENT = """\
#!{python} -IS
import json, os, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
told = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)])
socket.send_fds(connection, [len(told.encode()).to_bytes(8, "big")], [0, 1, 2])
connection.sendall(told.encode())
sys.exit(int(connection.recv(9) or 70))
"""


@contextlib.contextmanager
def quick_python() -> Iterator[dict[str, str]]:
    """Yield an environment in which `python` of the shell runs modules and scripts of this interpreter."""
    with tempfile.TemporaryDirectory() as folder:  # a socket's path must be short
        address, program = Path(folder, "socket"), Path(folder, "python")
        program.write_text(CLIENT.format(python=sys.executable, address=str(address)))
        program.chmod(0o755)
        server = subprocess.Popen([sys.executable, __file__, str(address)], stdout=subprocess.PIPE)
        try:
            assert server.stdout is not None and server.stdout.readline() == b"ready\n"
            yield {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
        finally:
            server.kill()
            server.wait()


def serve(address: str) -> None:
    """Run one command after another, each in a fork of this process."""
    import torch
    import trl

    from dpo_runner import run as _run

    del torch, trl, _run
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        length, streams, _, _ = socket.recv_fds(connection, 8, 3)
        told = b""
        while len(told) < int.from_bytes(length, "big"):
            told += connection.recv(1 << 20)
        child = os.fork()
        if child == 0:
            os._exit(_perform(streams, *json.loads(told)))
        for stream in streams:
            os.close(stream)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        connection.sendall(str(code if code >= 0 else 128 - code).encode())
        connection.close()


def _perform(streams: list[int], arguments: list[str], folder: str, environment: dict[str, str]) -> int:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    try:
        if arguments[0] == "-m":
            sys.argv, sys.path[0] = arguments[1:], folder
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).resolve().parent)
            runpy.run_path(arguments[0], run_name="__main__")
        code: object = 0
    except SystemExit as stopped:
        code = stopped.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


if __name__ == "__main__":
    serve(sys.argv[1])
