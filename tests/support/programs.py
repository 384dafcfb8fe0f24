"""Fast Python programs: forks of a process that has already imported torch and TRL.

The program, its arguments, environment, folder, streams, process id, signals and exit code are those of a normal
start; only the seconds of the imports are saved, also for a sweep's worker processes and the processes of a run.
test_cli.py, the undisturbed sweep of test_sweep.py and others check normal starts and the modules that commands import.
"""

import atexit
import contextlib
import copy
import functools
import gc
import importlib
import inspect
import io
import itertools
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

RANK = "dpo_runner.training.ranks.child"

# The script that a shell runs as `python`: passes on the command and its three streams, and exits with its status.
CLIENT = """\
#!{python} -IS
import json, os, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
told = json.dumps({{"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}).encode()
socket.send_fds(connection, [len(told).to_bytes(8, "big")], [0, 1, 2])
connection.sendall(told)
status = int(connection.makefile().readlines()[1])
sys.exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))
"""


_own_address: str | None = None  # in the server and its forks


@functools.cache
def _start_server() -> str:
    """Start the server, which ends with this process, and return its address."""
    if _own_address is not None:
        return _own_address
    address = str(Path(tempfile.mkdtemp(), "socket"))  # the path of a socket must be short
    command = [sys.executable, __file__, address]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout is not None and server.stdout.readline() == b"ready\n"
    atexit.register(server.communicate)
    return address


_STREAMS = ("p2cread", "c2pwrite", "errwrite")
_PLAIN = subprocess.Popen._execute_child
_ASKED = inspect.signature(_PLAIN)


def _name(given: Sequence[Any]) -> dict[str, Any]:
    """Return the arguments of Popen._execute_child by name."""
    return dict(_ASKED.bind(None, *given).arguments)


def _or_own(stream: int, number: int) -> int:
    return number if stream == -1 else stream


def _close_theirs(process: "subprocess.Popen[Any]", asked: dict[str, Any]) -> None:
    names = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
    process._close_pipe_fds(*(asked[name] for name in names))


class Program(subprocess.Popen[Any]):
    """A Popen whose process the server forks and waits for."""

    _answers: io.RawIOBase | None = None

    def _execute_child(self, *given: Any) -> None:
        asked = _name(given)
        told = {
            "arguments": asked["args"],
            "folder": str(Path(asked["cwd"] or ".").resolve()),
            "environment": dict(os.environ if asked["env"] is None else asked["env"]),
            "own_session": asked["start_new_session"],
            "own_group": asked["process_group"] == 0,
        }
        text = json.dumps(told).encode()
        streams = [_or_own(asked[name], number) for number, name in enumerate(_STREAMS)]
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(_start_server())
            socket.send_fds(connection, [len(text).to_bytes(8, "big")], streams)
            connection.sendall(text)
            self._answers = connection.makefile("rb", buffering=0)  # unbuffered for select
        self.pid = int(self._answers.readline())
        self._child_created = True
        _close_theirs(self, asked)

    def _try_wait(self, flags: int) -> tuple[int, int]:
        if self._answers is None:
            return super()._try_wait(flags)
        if flags & os.WNOHANG and not select.select([self._answers], [], [], 0)[0]:
            return 0, 0
        return self.pid, int(self._answers.readline())

    def _internal_poll(self, *given: Any, **named: Any) -> int | None:
        if self._answers is None:
            return super()._internal_poll(*given, **named)
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self._handle_exitstatus(status)
        return self.returncode


class QuickRanks(Program):
    """A Popen that lets the server fork the processes of a run, and starts everything else as usual."""

    def _execute_child(self, *given: Any) -> None:
        if given[0][:3] == [sys.executable, "-m", RANK]:
            super()._execute_child(given[0][1:], *given[1:])
        else:
            _PLAIN(self, *given)


def start_python(*arguments: str, **settings: Any) -> "subprocess.Popen[str]":
    """Start `python ARGUMENTS`.

    Args:
        arguments: `-m MODULE …`, `-c CODE …` or `SCRIPT …`.
        settings: arguments of Popen: cwd, env, stdin, stdout, stderr, start_new_session.
    """
    return Program(list(arguments), text=True, **settings)


def run_python(*arguments: str, typed: str = "", timeout: float = 300, **settings: Any) -> Any:
    """Run `python ARGUMENTS`; same result as subprocess.run with capture_output."""
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with start_python(*arguments, **streams, **settings) as process:
        try:
            out, err = process.communicate(typed, timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess([*arguments], process.returncode, out, err)


@contextlib.contextmanager
def quick_python() -> Iterator[dict[str, str]]:
    """Yield an environment in which the shell's `python` starts such a program."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "python")
        program.write_text(CLIENT.format(python=sys.executable, address=_start_server()))
        program.chmod(0o755)
        yield {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def speed_up_libraries() -> None:
    """Keep what libraries make again and again: Jinja's templates, and the syntax trees of OmegaConf's interpolations.

    Hydra copies its repository of files deeply for each composition, though it replaces the only part that changes.
    """
    import jinja2
    import omegaconf
    from hydra._internal.config_repository import CachingConfigRepository
    from omegaconf import grammar_parser

    jinja2.Template = functools.cache(jinja2.Template)  # PEFT renders a card beside each adapter
    parse = functools.lru_cache(1000)(grammar_parser.parse)
    for module in (omegaconf.base, omegaconf._utils, omegaconf.resolvers.oc):
        module.parse = parse

    def keep(repository: Any, delegate: Any) -> None:
        repository.delegate, repository.cache = copy.copy(delegate), {}

    CachingConfigRepository.__init__ = keep


# The code below runs in the server and its forks.
IMPORTED = (
    *("torch", "trl", "transformers.models.llama.modeling_llama", "peft.tuners.lora.bnb"),
    *("wandb.apis.public", "wandb.cli.cli", "hydra", "optuna", "dpo_runner.train"),
    "dpo_runner.sweep.sweeper",
)


def serve(address: str) -> None:
    """Fork programs until standard input ends, each with another process that waits for it."""
    for module in IMPORTED:
        importlib.import_module(module)
    global MEDIA_TMP, _own_address
    _own_address = address
    from wandb.sdk.data_types._private import MEDIA_TMP

    from dpo_runner.model.card import card

    card.write_plots = lambda folder, events: []  # as in tests/conftest.py
    speed_up_libraries()

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    while sys.stdin not in select.select([sys.stdin, listener], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _attend(connection)
        connection.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    Path(address).unlink()
    Path(address).parent.rmdir()


def _attend(connection: socket.socket) -> NoReturn:
    """Fork one program, and send its process id and exit status; end early if the process that asked for it ends."""
    length, streams, _, _ = socket.recv_fds(connection, 8, 3)
    told = b""
    while len(told) < int.from_bytes(length, "big"):
        told += connection.recv(1 << 20)
    child = os.fork()
    if child == 0:
        connection.close()
        subprocess.Popen = _Popen
        _become(streams, **json.loads(told))
    for stream in streams:
        os.close(stream)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{child}\n".encode())
    ended = os.pidfd_open(child)
    if ended not in select.select([connection, ended], [], [])[0]:
        os._exit(0)  # who asked is gone: a process of a run sees that its parent is
    status = os.waitpid(child, 0)[1]
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{status}\n".encode())
    os._exit(0)


class _Popen(QuickRanks):
    """A Popen that forks a sweep's worker too."""

    def _execute_child(self, *given: Any) -> None:
        asked = _name(given)
        if asked["args"][:3] != [sys.executable, "-m", "dpo_runner.sweep.executor"]:
            super()._execute_child(*given)
            return
        streams = [_or_own(asked[name], number) for number, name in enumerate(_STREAMS)]
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.setpgid(0, asked["process_group"])
            ends = sorted({0, 1, 2, *streams, *asked["pass_fds"], os.sysconf("SC_OPEN_MAX")})
            for end, following in itertools.pairwise(ends):
                os.closerange(end + 1, following)
            _become(streams, asked["args"][1:], str(Path.cwd()), asked["env"])
        self._child_created = True
        _close_theirs(self, asked)


def _become(
    streams: Sequence[int],
    arguments: list[str],
    folder: str,
    environment: dict[str, str],
    own_session: bool = False,
    own_group: bool = False,
) -> NoReturn:
    """Run the program in this forked process."""
    gc.freeze()  # do not collect the parent's objects, which would close its files
    if own_session:
        os.setsid()
    if own_group:
        os.setpgid(0, 0)
    if arguments[1:2] == [RANK]:
        arguments[2] = str(os.getppid())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    MEDIA_TMP._finalizer.detach()  # a folder that W&B creates on import and removes at exit
    MEDIA_TMP.__init__("wandb-media")
    code = _perform(arguments)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)  # skips Python's teardown of the imported modules, which takes two seconds


def _perform(arguments: list[str]) -> int:
    """Do what `python ARGUMENTS` does, and return the exit code, or minus the number of a signal."""
    try:
        for place in reversed(os.environ.get("PYTHONPATH", "").split(os.pathsep)):
            if place and place not in sys.path:
                sys.path.insert(1, place)
                if (site := Path(place, "sitecustomize.py")).exists():
                    runpy.run_path(str(site))
        if arguments[0] == "-m":
            sys.argv, sys.path[0] = arguments[1:], str(Path.cwd())
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            sys.argv, sys.path[0] = ["-c", *arguments[2:]], ""
            sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(arguments[1], "<string>", "exec"), vars(sys.modules["__main__"]))
        else:
            sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).resolve().parent)
            runpy.run_path(arguments[0], run_name="__main__")
        code: object = 0
    except SystemExit as stopped:
        code = stopped.code
    except KeyboardInterrupt:
        traceback.print_exc()
        return -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    return code & 0xFF if isinstance(code, int) else int(code is not None)


if __name__ == "__main__":
    serve(sys.argv[1])
