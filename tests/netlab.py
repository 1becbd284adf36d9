"""Pretend machines on this one: each has its own network, processes, host name, home, /tmp and sshd.

Linux namespaces, no containers and no images: a machine shares this machine's programs and kernel, and nothing else of
what Ray, ssh or a search leave on a machine. All of it lives as long as the lab: the first process of every namespace
dies with the lab or, should that be killed, with the process that made it, and the kernel then ends all others in the
namespace and takes away its mounts and its network.

Every machine has two networks: `eth0` on the private one of the lab, and `eth1`, with the default route, which stands
for the world. Nothing leads from either to this machine's own network.
"""

import os
import pwd
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.live_search import wait_for

PRIVATE, OUTSIDE = "10.77.0.", "192.0.2."  # the second is reserved for examples
SSH_KEY = "~/.ssh/lab"
PROGRAMS = {"ip": "iproute2", "ss": "iproute2", "sshd": "openssh-server", "ssh-keygen": "openssh-client"}
PROGRAMS |= {"ssh": "openssh-client", "rsync": "rsync", "curl": "curl", "mount": "mount"}
PROGRAMS |= dict.fromkeys(("unshare", "nsenter", "setpriv"), "util-linux")
HOME = Path(pwd.getpwuid(os.getuid()).pw_dir)
START_S = 30.0

# What the first process of a machine does in its namespaces, before it becomes the program that keeps them. A machine's
# disk is in memory, so that it goes with the machine. The home and /tmp come last, since what is bound may lie below
# those of this machine.
_FIRST_PROCESS = """
set -eu
hostname {name}
echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6 || true
mount -t tmpfs lab /dev/shm
mount -t tmpfs -o mode=755 lab {disk}
cp -a {image}/. {disk}
mount --bind {disk}/hosts /etc/hosts
test ! -e /etc/resolv.conf || mount --bind {disk}/resolv.conf /etc/resolv.conf
{binds}
mount -t tmpfs lab /run
mkdir /run/sshd
cp {disk}/sshd_config {disk}/hostkey /run/sshd
mount --rbind {disk}/home {home}
mount --rbind {disk}/tmp /tmp
until ip -o address show eth1 up | grep -q {outside}; do sleep 0.05; done
cd {home}
exec env -i HOME={home} PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin {program}
"""
_SSHD_CONFIG = """
Port 22
ListenAddress {address}
HostKey /run/sshd/hostkey
PidFile none
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
MaxStartups 100
"""


def what_is_missing() -> str | None:
    """Why there can be no lab here; None: there can."""
    if os.name != "posix" or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "namespaces with networks of their own need root"
    packages = sorted({package for program, package in PROGRAMS.items() if _program(program) is None})
    if packages:
        return f"not installed: apt-get install {' '.join(packages)}"
    made = subprocess.run(["unshare", "-n", "-m", "-p", "-u", "-f", "true"], capture_output=True, text=True)
    return None if made.returncode == 0 else f"this machine allows no namespaces: {made.stderr.strip()}"


@dataclass(frozen=True)
class Process:
    pid: int  # as this machine sees it
    title: str


@dataclass(frozen=True)
class Machine:
    """One pretend machine."""

    name: str
    address: str
    outside: str
    keeper: "subprocess.Popen[bytes]"
    first: int  # the process that its namespaces live by
    log: Path  # what that process said

    @property
    def home(self) -> Path:
        """The account's home, as this machine can open it while the other one lives."""
        return Path(f"/proc/{self.first}/root{HOME}")

    @property
    def alive(self) -> bool:
        return self.keeper.poll() is None

    def start(
        self, command: str, *, environment: Mapping[str, str] | None = None, log: int = subprocess.PIPE
    ) -> "subprocess.Popen[str]":
        """Start a shell command on the machine, in its home and with nothing of this process's environment."""
        settings = {"HOME": str(HOME), "PATH": os.defpath, "LANG": "C.UTF-8"} | dict(environment or {})
        variables = [f"{name}={value}" for name, value in settings.items()]
        return subprocess.Popen(
            [*self._enter(), "env", "-i", *variables, "bash", "-c", f"cd {shlex.quote(str(HOME))} && {command}"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(
        self, command: str, *, environment: Mapping[str, str] | None = None, timeout_s: float = 120.0
    ) -> "subprocess.CompletedProcess[str]":
        """The same, to its end; both outputs are in stdout."""
        with self.start(command, environment=environment) as process:
            try:
                output, _ = process.communicate(timeout=timeout_s)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(command, process.returncode, output)

    def owns(self, pid: int) -> bool:
        """Whether a process, by this machine's number, lives on the machine."""
        try:
            return os.readlink(f"/proc/{pid}/ns/pid") == os.readlink(f"/proc/{self.first}/ns/pid")
        except OSError:  # one of them has ended
            return False

    def processes(self) -> list[Process]:
        """All that live on the machine, the first one included."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            if not self.owns(int(folder.name)):
                continue
            try:
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except OSError:  # it ended meanwhile
                continue
            if state not in "ZX":
                found.append(Process(int(folder.name), title))
        return found

    def listeners(self) -> set[tuple[str, int]]:
        """Address and port of everything that waits for TCP connections; the address * is any."""
        lines = subprocess.check_output([*self._enter(), "ss", "-Htln"], text=True).splitlines()
        places = (line.split()[3].rpartition(":") for line in lines)
        return {("*" if host in ("*", "0.0.0.0", "[::]") else host.strip("[]"), int(port)) for host, _, port in places}

    def kill(self) -> None:
        """Pull the plug: all processes at once, and the network with them."""
        if self.alive:
            os.kill(self.first, signal.SIGKILL)
            self.keeper.wait(timeout=START_S)  # it returns when the kernel has ended all of them

    def _enter(self) -> list[str]:
        return ["nsenter", "--target", str(self.first), "--net", "--pid", "--mount", "--uts"]


@dataclass(frozen=True)
class Lab:
    """Machines that reach each other and nothing else, and one more, without sshd, from which a user works."""

    machines: tuple[Machine, ...]
    user: Machine


@dataclass(frozen=True)
class Plan:
    """What every machine of a lab has.

    Args:
        keep: folders of this machine that are seen at their own place though they lie below the home or /tmp.
        binds: place on each machine -> folder of this machine; the places exist.
        shell: what the account's .bashrc says.
    """

    keep: Sequence[Path] = ()
    binds: Mapping[str, Path] = field(default_factory=dict)
    shell: str = ""


@contextmanager
def lab(folder: Path, names: Sequence[str], plan: Plan) -> Iterator[Lab]:
    """Machines of these names with sshd, and the user's, whose key they accept.

    Args:
        folder: for what they start from, and what they say; their disks are in memory.
    """
    with ExitStack() as stack:
        lan = stack.enter_context(kept(["unshare", "--net", "sleep", "infinity"]))
        _until(partial(_has_network, lan.pid), "the private network is there")
        for bridge in ("private", "world"):
            _in_network(lan.pid, f"ip link add {bridge} type bridge", f"ip link set {bridge} up")
        everyone = [*names, "user"]
        addresses = {name: str(11 + number) for number, name in enumerate(everyone)}
        table = "".join(f"{PRIVATE}{address} {name}\n" for name, address in addresses.items())
        key = _new_key(folder / "key")
        found = []
        for name, address in addresses.items():
            _write_image(folder / name / "image", key, PRIVATE + address, f"127.0.0.1 localhost\n{table}", plan.shell)
            program = "sleep infinity" if name == "user" else f"{_program('sshd')} -D -e -f /run/sshd/sshd_config"
            found.append(_machine(stack, lan.pid, folder / name, address, program, plan))
        *machines, user = found
        # Only then is what this process sees of a machine the machine's, and not its own.
        _until(partial(_runs, user.first, "sleep"), "the user's machine has started", user.log)
        for machine in machines:
            _until(partial(_has_sshd, machine), f"sshd of {machine.name} listens", machine.log)
        yield Lab(tuple(machines), user)


def _machine(stack: ExitStack, lan: int, folder: Path, number: str, program: str, plan: Plan) -> Machine:
    name, disk = folder.name, folder / "disk"
    disk.mkdir()
    binds = [f"mount --bind {shlex.quote(str(source))} {place}" for place, source in plan.binds.items()]
    binds += [f"mkdir -p {target}; mount --rbind {path} {target}" for path, target in _kept_places(plan.keep, disk)]
    script = _FIRST_PROCESS.format(
        name=name,
        disk=disk,
        image=folder / "image",
        home=HOME,
        binds="\n".join(binds),
        outside=OUTSIDE + number,
        program=program,
    )
    namespaces = ["--net", "--pid", "--mount", "--uts", "--fork", "--kill-child", "--mount-proc"]
    log = stack.enter_context((folder / "log").open("wb"))
    keeper = stack.enter_context(
        kept(["unshare", *namespaces, "--propagation", "private", "bash", "-c", script], log.fileno())
    )
    children = Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children")
    _until(lambda: children.read_text().split() != [], f"{name} has its namespaces")
    first = int(children.read_text().split()[0])
    _until(partial(_has_network, first), f"{name} has a network")
    for bridge, device, address in (("private", "eth0", PRIVATE + number), ("world", "eth1", OUTSIDE + number)):
        port = f"{bridge}{number}"
        _in_network(
            lan,
            f"ip link add {port} type veth peer name {device} netns {first}",
            f"ip link set {port} master {bridge}",
            f"ip link set {port} up",
        )
        _in_network(first, f"ip address add {address}/24 dev {device}", f"ip link set {device} up")
    _in_network(first, "ip link set lo up", f"ip route add default via {OUTSIDE}1")
    machine = Machine(name, PRIVATE + number, OUTSIDE + number, keeper, first, folder / "log")
    stack.callback(machine.kill)
    return machine


def _runs(process: int, program: str) -> bool:
    return Path(f"/proc/{process}/cmdline").read_bytes().startswith(program.encode())


def _has_sshd(machine: Machine) -> bool:
    return (machine.address, 22) in machine.listeners()


def _kept_places(keep: Sequence[Path], disk: Path) -> list[tuple[Path, Path]]:
    """Folder -> where on the machine's disk it is to be mounted; those that are seen anyway are left out."""
    found = []
    for path in dict.fromkeys(keep):
        for root, own in ((HOME, disk / "home"), (Path("/tmp"), disk / "tmp")):
            if path.is_relative_to(root):
                found.append((path, own / path.relative_to(root)))
    return found


def _write_image(folder: Path, key: Path, address: str, hosts: str, shell: str) -> None:
    """What a machine's disk holds when it starts. All have the key, and let in who has it."""
    ssh = folder / "home/.ssh"
    ssh.mkdir(parents=True)
    ssh.chmod(0o700)
    shutil.copy(key, ssh / Path(SSH_KEY).name)
    shutil.copy(key.with_suffix(".pub"), ssh / "authorized_keys")
    (folder / "home/.bashrc").write_text(shell)
    (folder / "tmp").mkdir()
    (folder / "tmp").chmod(0o1777)
    (folder / "hosts").write_text(hosts)
    (folder / "resolv.conf").write_text("")
    (folder / "sshd_config").write_text(_SSHD_CONFIG.format(address=address))
    shutil.copy(key.with_name("hostkey"), folder / "hostkey")


def _new_key(folder: Path) -> Path:
    folder.mkdir()
    for name in ("lab", "hostkey"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    return folder / "lab"


@contextmanager
def kept(
    command: Sequence[str], log: int = subprocess.DEVNULL, environment: Mapping[str, str] | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that dies with the context, and with this process should that be killed."""
    # The signal at the parent's death is set by a program: Python's hook before exec is not safe beside threads.
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *command],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=environment,
        start_new_session=True,  # Ctrl-C is for the test, which then ends the lab
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _has_network(process: int) -> bool:
    """Of its own, that is: the process has left this machine's."""
    return os.readlink(f"/proc/{process}/ns/net") != os.readlink("/proc/self/ns/net")


def _in_network(process: int, *commands: str) -> None:
    """Run `ip` commands in the network that a process lives in, which is never this machine's."""
    assert _has_network(process)
    batch = "".join(f"{command.removeprefix('ip ')}\n" for command in commands)
    subprocess.run(
        ["nsenter", "--target", str(process), "--net", "ip", "-batch", "-"], input=batch, text=True, check=True
    )


def _program(name: str) -> str | None:
    """Where a program is; administrators' programs are not on every user's path."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def _until(condition: Callable[[], bool], what: str, log: Path | None = None) -> None:
    wait_for(condition, what, START_S, None if log is None else partial(log.read_text, errors="replace"))
