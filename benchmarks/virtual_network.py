"""Nodes in network namespaces, joined by a switch: latency, packet loss, slow nodes, partitions.

Each node is a namespace with one TUN device. The switch is a thread of this process that passes IP packets
from device to device, so the kernel needs no netem. Needs root, `ip` and /dev/net/tun.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time
from pathlib import Path

CLONE_NEWNET = 0x40000000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
DEVICE = "eth0"
MTU = 9000


def missing() -> str | None:
    """Return what this machine lacks for a virtual network, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the program ip is not installed (Debian package iproute2)"
    if not Path("/dev/net/tun").exists():
        return "/dev/net/tun does not exist"
    return None


def enter(namespace: str) -> None:
    """Move this thread, and those that it starts, into a namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as file:
        if libc.setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")


def bytes_sent() -> int:
    """Return what this process's node has put on the wire, headers included."""
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
        name, _, values = line.partition(":")
        if name.strip() == DEVICE:
            return int(values.split()[8])
    raise RuntimeError(f"this process has no device {DEVICE}: it is not in a namespace of the network")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=30)


class VirtualNetwork:
    """`nodes` namespaces. rate: bits a second that a node sends; latency: seconds one way; loss: share of
    packets. All may be changed while packets flow."""

    def __init__(self, nodes: int, rate: float = 1e9, latency: float = 0.0005, loss: float = 0.0):
        self.namespaces = [f"sw{os.getpid()}-{node}" for node in range(nodes)]
        self.addresses = [f"10.77.0.{node + 1}" for node in range(nodes)]
        self.rates, self.latency, self.loss = [rate] * nodes, latency, loss
        self.groups = [0] * nodes  # nodes of different groups do not reach each other
        self.lost = 0

    def __enter__(self) -> VirtualNetwork:
        self._devices: list[int] = []
        try:
            for node, namespace in enumerate(self.namespaces):
                self._add(node, namespace)
        except BaseException:
            self._remove()
            raise
        self._ends, end = os.pipe()
        self._stop = end
        self._switch = threading.Thread(target=self._pass_packets, daemon=True)
        self._switch.start()
        return self

    def __exit__(self, *_) -> None:
        os.close(self._stop)
        self._switch.join()
        os.close(self._ends)
        self._remove()

    def _add(self, node: int, namespace: str) -> None:
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        self._devices.append(device)
        outside = f"sw{os.getpid()}.{node}"
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", outside.encode(), IFF_TUN | IFF_NO_PI))
        _ip("netns", "add", namespace)
        _ip("link", "set", outside, "netns", namespace, "name", DEVICE)
        _ip("-n", namespace, "addr", "add", f"{self.addresses[node]}/24", "dev", DEVICE)
        _ip("-n", namespace, "link", "set", DEVICE, "mtu", str(MTU), "txqueuelen", "10000", "up")
        _ip("-n", namespace, "link", "set", "lo", "up")

    def _remove(self) -> None:
        for device in self._devices:
            os.close(device)
        for namespace in self.namespaces:
            subprocess.run(["ip", "netns", "del", namespace], stderr=subprocess.DEVNULL, timeout=30)

    def _pass_packets(self) -> None:
        """Deliver each packet after its time on the sender's link and the latency."""
        node_of = {bytes(map(int, address.split("."))): node for node, address in enumerate(self.addresses)}
        free_at, waiting, order = [0.0] * len(self._devices), [], 0
        chance = random.Random(0)
        while True:
            timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
            ready, _, _ = select.select([*self._devices, self._ends], [], [], timeout)
            if self._ends in ready:
                return
            now = time.monotonic()
            for sender, device in enumerate(self._devices):
                if device not in ready:
                    continue
                for _ in range(64):
                    try:
                        packet = os.read(device, MTU + 64)
                    except BlockingIOError:
                        break
                    receiver = node_of.get(packet[16:20]) if packet[0] >> 4 == 4 else None
                    if receiver is None:
                        continue
                    free_at[sender] = max(free_at[sender], now) + 8 * len(packet) / self.rates[sender]
                    if self.groups[sender] != self.groups[receiver] or chance.random() < self.loss:
                        self.lost += 1
                        continue
                    order += 1
                    heapq.heappush(waiting, (free_at[sender] + self.latency, order, receiver, packet))
            now = time.monotonic()
            while waiting and waiting[0][0] <= now:
                _, _, receiver, packet = heapq.heappop(waiting)
                try:
                    os.write(self._devices[receiver], packet)
                except BlockingIOError:  # its queue is full, as a real switch's
                    self.lost += 1
