"""A real Slurm cluster on one machine while this process lives: unshare ... python -m tests.slurm.cluster BASE NODES.

Every host is a network, hostname and mount namespace of its own, joined by a bridge: ``ctl`` with munged and
slurmctld, ``node1``, ``node2``, ... with a slurmd each. Started under ``unshare -nmpf --mount-proc --kill-child``, so
that the end of that process, however it comes, is the end of every daemon, job and namespace.

It reads requests from stdin and answers each on stdout, one JSON object a line:
    {"words": ["sbatch", ...], "folder": ..., "environment": {...}}  ->  {"code": 0, "out": "...", "err": "..."}
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.support.patience import Patience, load, size_of

NETWORK = "10.231.0"
CONTROLLER = 254

SLURM_CONF = """
ClusterName=esper
SlurmctldHost=ctl({network}.{controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={base}/munge/socket
CredType=cred/munge
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool.%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd.%n.pid
SlurmctldLogFile={base}/slurmctld.log
SlurmdLogFile={base}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
ReturnToService=2
KillWait=60
SlurmdTimeout=120
MinJobAge=3600
UnkillableStepTimeout=60
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
{nodes}
PartitionName=usual Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=90
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def run(*words: str) -> None:
    """One command that must succeed."""
    subprocess.run(words, check=True, timeout=30 * load())


def within(host: str, index: int, base: Path, words: list[str]) -> list[str]:
    """The command line that runs ``words`` on a host."""
    script = 'hostname "$1" && mount --bind "$2" /etc/hosts && mount -t sysfs sysfs /sys && shift 2 && exec "$@"'
    inside = ["unshare", "-m", "-u", "sh", "-c", script, "sh", host, str(base / "hosts"), *words]
    return ["nsenter", f"--net=/run/netns/esper{index}", *inside]


def lay_cables(nodes: int) -> None:
    """Namespace 0 is the controller's and holds the bridge."""
    run("mount", "-t", "tmpfs", "tmpfs", "/run")
    Path("/run/netns").mkdir()
    for index in range(nodes + 1):
        run("ip", "netns", "add", f"esper{index}")
        run("ip", "-n", f"esper{index}", "link", "set", "lo", "up")
    run("ip", "-n", "esper0", "link", "add", "bridge", "type", "bridge")
    run("ip", "-n", "esper0", "addr", "add", f"{NETWORK}.{CONTROLLER}/24", "dev", "bridge")
    run("ip", "-n", "esper0", "link", "set", "bridge", "up")
    for index in range(1, nodes + 1):
        run(
            "ip",
            "link",
            "add",
            "eth0",
            "netns",
            f"esper{index}",
            "type",
            "veth",
            "peer",
            f"v{index}",
            "netns",
            "esper0",
        )
        run("ip", "-n", "esper0", "link", "set", f"v{index}", "master", "bridge", "up")
        run("ip", "-n", f"esper{index}", "addr", "add", f"{NETWORK}.{index}/24", "dev", "eth0")
        run("ip", "-n", f"esper{index}", "link", "set", "eth0", "up")


def configure(base: Path, nodes: int) -> None:
    """Writes what the daemons read."""
    names = [f"node{index}" for index in range(1, nodes + 1)]
    addresses = {name: f"{NETWORK}.{index}" for index, name in enumerate(names, start=1)}
    lines = [f"{address} {name}" for name, address in addresses.items()]
    (base / "hosts").write_text("\n".join(["127.0.0.1 localhost", f"{NETWORK}.{CONTROLLER} ctl", *lines, ""]))
    defined = [f"NodeName={name} NodeAddr={addresses[name]} CPUs=2 RealMemory=4000 State=UNKNOWN" for name in names]
    for folder in ("state", "munge"):
        (base / folder).mkdir(mode=0o755)
    (base / "slurm.conf").write_text(
        SLURM_CONF.format(base=base, network=NETWORK, controller=CONTROLLER, nodes="\n".join(defined))
    )
    (base / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # loaded in any case; nothing here uses one
    key = base / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)


def start(base: Path, nodes: int) -> list["subprocess.Popen[bytes]"]:
    """The daemons.

    Raises:
        RuntimeError: one of them does not come up; with its last words.
    """

    def daemon(name: str, words: list[str]) -> "subprocess.Popen[bytes]":
        with (base / f"{name}.out").open("w") as out:
            return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    munge = base / "munge"
    files = [f"--{what}={munge / what}" for what in ("socket", "pid-file", "seed-file")]
    started = {"munged": daemon("munged", ["munged", "-F", f"--key-file={munge / 'key'}", *files])}

    def wait(ready: object, what: str) -> None:
        patience = Patience(size_of(*(base / f"{name}.out" for name in started)), still_s=60.0)
        while not ready():  # type: ignore[operator]
            dead = [name for name, process in started.items() if process.poll() is not None]
            if dead or not patience.lasts():
                said = (base / f"{(dead or [what])[0]}.out").read_text().strip().splitlines()[-3:]
                raise RuntimeError(f"{(dead or [what])[0]} did not come up: {' | '.join(said)}")
            time.sleep(0.1)

    wait((munge / "socket").exists, "munged")
    started["slurmctld"] = daemon("slurmctld", within("ctl", 0, base, ["slurmctld", "-D", "-i"]))
    for index in range(1, nodes + 1):
        started[f"slurmd{index}"] = daemon(f"slurmd{index}", within(f"node{index}", index, base, ["slurmd", "-D"]))

    def idle() -> bool:
        words = within("ctl", 0, base, ["timeout", "5", "sinfo", "-h", "-N", "-p", "usual", "-t", "idle", "-o", "%n"])
        return len(subprocess.run(words, capture_output=True, text=True).stdout.split()) == nodes

    wait(idle, "slurmctld")
    return list(started.values())


def serve(base: Path) -> None:
    """Answers requests until stdin ends."""
    print(json.dumps({"code": 0, "out": "up", "err": ""}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        words = within("ctl", 0, base, ["timeout", "-k", "5", f"{30 * load():.0f}", *asked["words"]])
        environment = {**os.environ, **asked["environment"]}
        done = subprocess.run(words, capture_output=True, text=True, cwd=asked["folder"], env=environment)
        print(json.dumps({"code": done.returncode, "out": done.stdout, "err": done.stderr}), flush=True)


def main() -> None:
    """Brings the cluster up, serves, and takes it down."""
    base, nodes = Path(sys.argv[1]), int(sys.argv[2])
    os.environ["SLURM_CONF"] = str(base / "slurm.conf")
    try:
        lay_cables(nodes)
        configure(base, nodes)
        daemons = start(base, nodes)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        print(json.dumps({"code": 1, "out": "", "err": str(error)}), flush=True)
        return
    with contextlib.suppress(BrokenPipeError):
        serve(base)
    for process in daemons:
        process.terminate()


if __name__ == "__main__":
    main()
