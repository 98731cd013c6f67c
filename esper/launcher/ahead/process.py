"""The launcher's end of the process that is started ahead, and will be torchrun's agent.

    launcher   composes, without torch --- settings -> waits --- makes and locks RUN --- arguments, lock -> supervises
    ahead      imports torch and esper, forks the rank server -> checks ------------------------------> torchrun

Both go on side by side, so a run is ready to start when the slower one is. What needs torch, or code that the settings
name, is checked there, before any rank has data or a device. A process that has torch already (a sweep's, a test's)
checks by itself, and its agents are started when they are needed.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from esper.launcher.ahead.forks import ROOM
from esper.launcher.ahead.torchrun import agent_command, torchrun_environment
from esper.leyline.errors import ConfigError
from esper.nissa.screen import open_closed_streams
from esper.run.environment import Phases, process_began
from esper.run.parent import die_with_parent
from esper.tolaria.ranks.config import WorldConfig
from esper.tolaria.training.config import TrainerConfig

if TYPE_CHECKING:
    from esper.config.tree import EsperConfig

AHEAD = "ahead"  # the word that tells `esper.launcher.agent` to wait for its arguments
LOADED = ("OMP_NUM_THREADS", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")  # read when a process begins


def is_plain_run(words: Sequence[str]) -> bool:
    """Whether a command line seems to be one run, which will need an agent: no flag, and nothing but ``launch=run``."""
    return not any(word.startswith("-") or word in ("launch=plan", "launch=prepare") for word in words)


class Ahead:
    """A process that gets ready while the launcher composes; none until `start`.

    Fields:
        process: what was started; None before, and once it was taken or dismissed.
        phases: of the start that it is for.
    """

    def __init__(self) -> None:
        self.phases = Phases(process_began())
        self.process: subprocess.Popen[bytes] | None = None
        self._line: Connection | None = None

    def __reduce__(self) -> tuple[type["Ahead"], tuple[()]]:
        return Ahead, ()  # where a launcher plugin runs a job in another process, none is there yet

    def start(self) -> None:
        """Starts the process, unless there is one, or this process has loaded torch and can check by itself."""
        if self.process is not None or "torch" in sys.modules:
            return
        open_closed_streams()
        ours, theirs = socket.socketpair()
        self._began = (os.getcwd(), torchrun_environment(WorldConfig(), TrainerConfig()))
        with theirs:
            self.process = subprocess.Popen(
                agent_command([AHEAD, str(theirs.fileno()), ROOM]),
                env={**os.environ, **self._began[1], "ESPER_LAUNCHER_PID": str(os.getpid())},
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on
            )
        self._line = Connection(ours.detach())

    def check(self, plain: dict[str, Any]) -> "EsperConfig":
        """Builds the config from plain data, checked whole as by `build_config`.

        Raises:
            ConfigError: see `build_config`.
        """
        if not self.phases.has("compose"):
            self.phases.end("compose")
        try:
            return self._check(plain)
        finally:
            self.phases.end("check")

    def _check(self, plain: dict[str, Any]) -> "EsperConfig":
        """See `check`."""
        from esper.config.tree import build_config, read_config  # here, so that `start` waits for nothing

        if self.process is None or self._line is None:
            return build_config(plain)
        try:
            self._line.send_bytes(json.dumps({"check": plain}).encode())
            answer = json.loads(self._line.recv_bytes())
        except (EOFError, OSError, TypeError, ValueError):  # it has ended, or the data are not for JSON
            answer = {}
        if answer.get("problems"):
            raise ConfigError(answer["problems"])
        if answer.get("sound"):
            return read_config(plain)
        self.dismiss()  # code of the user ended it, say: what that is like is best seen here
        return build_config(plain)

    def try_parts(self, plain: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any] | None:
        """The verdict of a fork of that process on parts of the user's own; None if there is none, or none came."""
        if self.process is None or self._line is None:
            return None
        try:
            self._line.send_bytes(json.dumps({"try": dict(plain), "environment": dict(environment)}).encode())
            verdict: dict[str, Any] | None = json.loads(self._line.recv_bytes())
        except (EOFError, OSError, TypeError, ValueError):
            return None
        return verdict

    def take(self, environment: Mapping[str, str]) -> "ReadyAgent | None":
        """Hands the process over; None if there is none, or it has begun in other circumstances than the run needs.

        Args:
            environment: the variables of the run's torchrun.
        """
        self.phases = Phases()  # of the next job of a sweep
        if self.process is None or self._line is None:
            return None
        folder, began = self._began
        had, needed = os.environ | began, os.environ | dict(environment)
        same = all(had.get(name) == needed.get(name) for name in LOADED)
        if not same or folder != os.getcwd() or self.process.poll() is not None:
            self.dismiss()
            return None
        ready = ReadyAgent(self.process, self._line)
        self.process = self._line = None
        return ready

    def dismiss(self) -> None:
        """Ends the process, if there is one that nobody has taken."""
        if self.process is not None and self._line is not None:
            self._line.close()
            self.process.kill()
            self.process.wait()
        self.process = self._line = None


class ReadyAgent:
    """A process that has imported what it needs, to become torchrun's agent.

    Fields:
        process: that process.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", line: Connection) -> None:
        self.process, self._line = process, line

    def go(self, command: Sequence[str], environment: Mapping[str, str], lock: int | None) -> None:
        """Lets it run torchrun; it ends with this process, and tells nothing more.

        Args:
            command: an `agent_command`, as which it goes on.
            environment: variables that are added to its own.
            lock: descriptor of RUN's lock, which it holds from now on, too; None without one.
        """
        words = {"command": list(command), "environment": dict(environment), "locked": lock is not None}
        try:
            self._line.send_bytes(json.dumps({"run": words}).encode())
            if lock is not None:
                with socket.socket(fileno=os.dup(self._line.fileno())) as line:
                    socket.send_fds(line, [b"-"], [lock])
        except BrokenPipeError:
            pass  # it has ended, as its exit code will say
        self._line.close()


def wait_for_word(line: Connection) -> tuple[list[str], dict[str, str]]:
    """In the process that was started ahead: checks settings, tries parts, until its command line and variables come.

    Ends the process when the launcher is gone or has dismissed it. RUN's lock is held until the process ends.
    """
    while True:
        try:
            word: dict[str, Any] = json.loads(line.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)
        if "check" in word:
            line.send_bytes(json.dumps(_checked(word["check"])).encode())
            continue
        if "try" in word:
            line.send_bytes(json.dumps(_tried(word["try"], word["environment"])).encode())
            continue
        run = word["run"]
        if run["locked"]:
            with socket.socket(fileno=os.dup(line.fileno())) as channel:
                _, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
            for descriptor in descriptors:
                os.set_inheritable(descriptor, False)
        line.close()
        return run["command"], run["environment"]


def _checked(plain: Any) -> dict[str, Any]:
    """The answer to settings: ``sound``, their ``problems``, or neither if checking them has raised something else."""
    from esper.config.tree import build_config

    try:
        build_config(plain)
    except ConfigError as error:
        return {"problems": list(error.problems)}
    except Exception:
        return {}
    return {"sound": True}


def _tried(plain: Any, environment: Mapping[str, str]) -> Any:
    """The verdict on parts, from a fork, so that what they leave behind is in no rank; None if it comes to none."""
    from esper.run.fitting.trial import verdict_of

    ours, theirs = os.pipe()
    parent, child = os.getpid(), os.fork()
    if not child:
        try:
            die_with_parent(parent, signal.SIGKILL)
            quiet = os.open(os.devnull, os.O_RDWR)
            for stream in range(3):
                os.dup2(quiet, stream)
            os.environ.update(environment)
            os.write(theirs, json.dumps(verdict_of(plain)).encode())
        finally:
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as said:
        text = said.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else None
