"""How other machines and ranks reach this node: its name, its interface, its port."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct

from pipeline.doctor.finding import Finding, Level
from pipeline.doctor.limits import Roots
from pipeline.ranks.patience import within

PORT = 29500
"""torchrun's default for several nodes."""
SLOW_NAMES_S = 2.0
"""A name server that takes longer is felt at every connection: torch asks for the name of every address."""
SLOW_MBIT_S = 10_000
"""Below which an interface is slow for activations."""
_ONLY_HERE = ("localhost", "127.", "::1")
"""How addresses begin by which a machine reaches itself."""
_SIOCGIFADDR = 0x8915  # of linux/sockios.h


def network_findings(roots: Roots, nodes: int, port: Finding) -> list[Finding]:
    """One line where all is well; ``port`` stands for itself where it is not.

    Args:
        nodes: of the job.
        port: from :func:`port_finding`.
    """
    network = _network(roots, nodes)
    if network.level is Level.OK and port.level is Level.OK:
        return [Finding("network", Level.OK, f"{network.text}; port {port.text}")]
    return [network, port]


def port_finding(serves: bool, nodes: int = 1) -> Finding:
    """Whether rank 0 can open the store here, in a job of ``nodes``. ``serves``: the launcher has done so already."""
    given = os.environ.get("MASTER_PORT", "")
    port = int(given) if given.isdigit() else PORT
    if serves:
        host = os.environ.get("MASTER_ADDR", "")
        text = f"{port} of {host} is the launcher's"
        if nodes > 1 and host.startswith(_ONLY_HERE) and os.environ.get("GLOO_SOCKET_IFNAME") != "lo":
            fix = "give torchrun the address that they reach: --local-addr, or PET_LOCAL_ADDR"
            return Finding("port", Level.WARNING, f"{text}, and {host} of another machine is that machine itself", fix)
        return Finding("port", Level.OK, text)
    if port_is_free(port):
        return Finding("port", Level.OK, f"{port} is free")
    if given:
        return Finding("port", Level.ERROR, f"MASTER_PORT = {port} is taken", "end the other job, or set another port")
    fix = f"several nodes need another one: --rdzv-endpoint=HOST:{port + 1}"
    return Finding("port", Level.NOTE, f"{port}, torchrun's default, is taken", fix)


def port_is_free(port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _network(roots: Roots, nodes: int) -> Finding:
    name, chosen = socket.gethostname(), os.environ.get("GLOO_SOCKET_IFNAME", "")
    adapters = sorted(path.name for path in (roots.sys / "class/infiniband").glob("*"))
    here = [interface for _, interface in socket.if_nameindex()]
    if chosen and chosen not in here:
        text = f"GLOO_SOCKET_IFNAME = {chosen}: no such interface"
        return Finding("network", Level.ERROR, text, f"this machine has {', '.join(here)}")
    try:
        found = within(SLOW_NAMES_S, lambda: socket.getaddrinfo(name, None, type=socket.SOCK_STREAM))
        address = str(found[0][4][0])
    except TimeoutError:
        text = f"the name of this machine, {name}, is not found within {SLOW_NAMES_S:g} s"
        fix = "write it into /etc/hosts, or set RES_OPTIONS='timeout:1 attempts:1'"
        return Finding("network", Level.WARNING, text, fix)
    except OSError:
        address = "127.0.0.1"  # what gloo takes as well
    interface = chosen or _interface_of(address, here)
    speed = _mbit_s(roots, interface)
    text = f"{name} is {address} on {interface or 'an interface without a name'}"
    text += f" ({speed / 1000:g} Gbit/s)" if speed else ""
    text += f", InfiniBand {', '.join(adapters)}" if adapters else ""
    if nodes > 1 and not chosen and address.startswith(_ONLY_HERE):
        others = [other for other in here if _address_of(other) not in ("", "127.0.0.1")]
        fix = f"set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to {' or '.join(others) or 'one that others reach'}"
        return Finding("network", Level.ERROR, f"{text}, which other machines cannot reach", fix)
    if nodes > 1 and 0 < speed < SLOW_MBIT_S and not adapters:
        faster = [other for other in here if _mbit_s(roots, other) > speed]
        fix = f"set GLOO_SOCKET_IFNAME={faster[0]}" if faster else "let little cross it: localpipe plan --gbit"
        return Finding("network", Level.WARNING, f"{text} is slow for activations", fix)
    return Finding("network", Level.OK, text)


def _interface_of(address: str, interfaces: list[str]) -> str:
    return next((interface for interface in interfaces if _address_of(interface) == address), "")


def _address_of(interface: str) -> str:
    """Its IPv4 address; empty where it has none, or where the system is asked otherwise (macOS)."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        answer = fcntl.ioctl(asked, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        return socket.inet_ntoa(answer[20:24])
    return ""


def _mbit_s(roots: Roots, interface: str) -> int:
    """0 where the driver does not say, as of a virtual interface."""
    with contextlib.suppress(OSError, ValueError):
        return max(int((roots.sys / "class/net" / interface / "speed").read_text()), 0) if interface else 0
    return 0
