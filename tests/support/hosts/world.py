"""Hosts on one machine, with a network between them that can be slow, cut, deaf on one side, or healed.

    front, e0, e1 ...      a host each: namespaces (namespaces.py), a boot id, a name, /dev/shm, and of /etc,
                           /srv and /var what settings, state and logs need
    switch                 a bridge that all of them are plugged into

    slow    a token bucket at both ends of a host's cable (tbf; where there is no netem there is no latency
            but that of a full bucket)
    cut     the plug is pulled on the switch's side: nobody is told, as by a cable or a switch that broke
    lose    frames of one host for another go to a card that nobody has: lost without a word, one way
    vanish  the plug is pulled, then everything that runs on the host is killed: no FIN and no RST comes out

Owns hosts, addresses and cables. Does not know what runs on hosts.
"""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.hosts.namespaces import Namespaces, require_main_thread, why_not

SUBNET = "10.77.0"
NOWHERE = "02:00:00:00:00:fe"
"""The address of no card."""
CARD = "eth0"
DISKS = ("etc", "srv", "var/lib", "var/log")
"""Each host has its own: what is written there is in its memory, over what the machine has."""
BURST_NBYTES = 64 << 10
QUEUE_MS = 100
"""Of a shaped cable: what is beyond it is dropped, as a switch would."""


@dataclass(frozen=True)
class Traffic:
    """Of a host's card, since it was plugged in; frames with all their headers."""

    sent_nbytes: int
    received_nbytes: int


class Host:
    """One of a :class:`World`. ``number`` is the last part of its address."""

    def __init__(self, name: str, number: int, directory: Path, boot_id: str) -> None:
        """``boot_id``: empty for the machine's own, as two containers of one machine have it."""
        self.name = name
        self.address = f"{SUBNET}.{number}"
        self.card = f"02:00:00:00:00:{number:02x}"
        """Of its card, in every life."""
        self.plug = f"to-{name}"
        """The switch's end of its cable."""
        self.directory = directory
        self._boot_id = boot_id
        self.inside = self._make()

    def _make(self) -> Namespaces:
        inside = Namespaces()
        try:
            script = [
                "set -e",
                f"hostname {self.name}",
                "mount -t sysfs sysfs /sys",  # its cards, for UCX
                "mount -t tmpfs tmpfs /dev/shm",
                "mount -t tmpfs tmpfs /mnt",
                *(
                    f"mkdir -p /mnt/{disk}/up /mnt/{disk}/work && mount -t overlay overlay "
                    f"-o lowerdir=/{disk},upperdir=/mnt/{disk}/up,workdir=/mnt/{disk}/work /{disk}"
                    for disk in DISKS
                ),
                "ip link set lo up",
            ]
            if self._boot_id:
                (self.directory / "boot_id").write_text(f"{self._boot_id}\n")
                script.append(f"mount --bind {self.directory}/boot_id /proc/sys/kernel/random/boot_id")
            inside.do("sh", "-c", "\n".join(script))
        except BaseException:
            inside.end()
            raise
        return inside

    def restart(self) -> None:
        """After :meth:`World.vanish`: a new life, as after a loss of power, not yet plugged in."""
        self._boot_id = self._boot_id and str(uuid.uuid4())
        self.inside = self._make()

    def traffic(self) -> Traffic:
        for line in self.inside.do("cat", "/proc/net/dev").splitlines():
            card, _, counts = line.partition(":")
            if card.strip() == CARD:
                numbers = [int(each) for each in counts.split()]
                return Traffic(sent_nbytes=numbers[8], received_nbytes=numbers[0])
        raise RuntimeError(f"{self.name} has no {CARD}")


class World:
    """A context manager; the first host is the front, where who asks a mesh stands. Main thread only."""

    def __init__(
        self,
        directory: Path,
        names: Sequence[str] = ("front", "e0", "e1"),
        *,
        one_kernel: bool = False,
        mtu_nbytes: int = 1500,
        real_frames: bool = False,
    ) -> None:
        """``one_kernel``: hosts have one boot id, as containers of one machine. ``real_frames``: of the MTU;
        else the kernel leaves pieces of up to 64 KiB whole between namespaces. Raises ``RuntimeError`` where
        no hosts can be made."""
        self._real_frames = real_frames
        self._lost: set[tuple[str, str]] = set()
        self._mtu = ["mtu", str(mtu_nbytes)]
        require_main_thread()
        if reason := why_not():
            raise RuntimeError(reason)
        self.hosts: dict[str, Host] = {}
        self._switch = Namespaces()
        try:
            self._switch.ip("link add name trunk type bridge", "link set dev trunk up")
            for number, name in enumerate(names, 1):
                own = directory / f"host-{name}"
                own.mkdir(parents=True)
                boot_id = "" if one_kernel else str(uuid.uuid4())
                self.hosts[name] = Host(name, number, own, boot_id)
                self._plug_in(self.hosts[name])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    @property
    def front(self) -> Host:
        return next(iter(self.hosts.values()))

    def close(self) -> None:
        for host in self.hosts.values():
            host.inside.end()
        self._switch.end()

    def _plug_in(self, host: Host) -> None:
        """A cable: one end is made in the host's network, the other one is the switch's."""
        command = ["ip", "link", "add", "name", host.plug, *self._mtu, "type", "veth"]
        command += ["peer", "name", CARD, *self._mtu]
        with self._switch.joined():  # the network alone: the other one is found by a pid of ours
            subprocess.run([*command, "netns", str(host.inside.first)], check=True)
        self._switch.ip(f"link set dev {host.plug} master trunk up")
        if self._real_frames:
            host.inside.ip(f"link set dev {CARD} gso_max_segs 1 gso_max_size 1500")
        host.inside.ip(
            f"address add {host.address}/24 dev {CARD}", f"link set dev {CARD} address {host.card} up"
        )

    # --- what happens to cables ----------------------------------------------------------------------

    def slow(self, name: str, mbit_s: float) -> None:
        """Both directions of a host's cable; 0: as fast as it can be."""
        host = self.hosts[name]
        for inside, device in ((host.inside, CARD), (self._switch, host.plug)):
            if not mbit_s:
                inside.run("tc", "qdisc", "del", "dev", device, "root")
                continue
            burst = max(BURST_NBYTES, int(mbit_s * 1e6 / 8 / 250))  # a tick of the kernel's clock
            rate = ["rate", f"{mbit_s:g}mbit", "burst", str(burst), "latency", f"{QUEUE_MS}ms"]
            inside.do("tc", "qdisc", "replace", "dev", device, "root", "tbf", *rate)

    def cut(self, name: str) -> None:
        self._switch.ip(f"link set dev {self.hosts[name].plug} down")

    def lose(self, source: str, target: str) -> None:
        """What ``source`` sends to ``target``; the other way stays."""
        self._lost.add((source, target))
        address = self.hosts[target].address
        self.hosts[source].inside.ip(f"neigh replace {address} lladdr {NOWHERE} dev {CARD} nud permanent")

    def heal(self, *names: str) -> None:
        """Plugged in, heard and hearing: every host that is there, or these alone. Rates stay."""
        healed = [name for name in names or self.hosts if not self.hosts[name].inside.has_ended]
        self._switch.ip(*(f"link set dev {self.hosts[name].plug} up" for name in healed))
        for source, target in [pair for pair in self._lost if {*pair} & {*healed}]:
            self._lost.remove((source, target))
            if not self.hosts[source].inside.has_ended:
                self.hosts[source].inside.ip(f"neigh del {self.hosts[target].address} dev {CARD}")

    def vanish(self, name: str) -> None:
        """A loss of power."""
        self.cut(name)
        self.hosts[name].inside.end()

    def come_back(self, name: str) -> None:
        """A host that has vanished starts anew, under its address, with nothing that runs on it."""
        host = self.hosts[name]
        self._switch.run("ip", "link", "del", "dev", host.plug)  # the kernel's own time is later
        self._lost = {pair for pair in self._lost if pair[0] != name}
        host.restart()
        self._plug_in(host)
