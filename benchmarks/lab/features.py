"""Requirements of a lab: programs, the right to make namespaces, and features of the kernel."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache

PROGRAMS = ("ip", "tc", "unshare", "nsenter", "setpriv")
NEEDED = {
    "veth (CONFIG_VETH)": ("ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1"),
    "bridge (CONFIG_BRIDGE)": ("ip", "link", "add", "v0", "type", "bridge"),
    "tbf (CONFIG_NET_SCH_TBF)":
        ("tc", "qdisc", "add", "dev", "lo", "root", "tbf", "rate", "1mbit", "burst", "16kb", "limit", "1mb"),
}  # fmt: skip
NETEM = ("tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")


class LabError(RuntimeError):
    """This machine can't hold the lab that was asked for; the message names what is missing."""


def program(name: str) -> str:
    """Its path, also where an ordinary user's PATH has no sbin."""
    found = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if found is None:
        raise LabError(f"a lab needs the program {name}; Debian has it in iproute2 (ip, tc) or util-linux (the others)")
    return found


@cache
def unshare() -> tuple[str, ...]:
    """Return the command that starts a program in a network namespace of its own: as root, or in a user namespace."""
    if sys.platform != "linux":
        raise LabError(f"a lab is made of Linux network namespaces; this is {sys.platform}")
    for flags in ("-n", "-rn"):
        command = (program("unshare"), flags)
        if subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    raise LabError(
        "this machine allows no network namespaces: not to this user (CAP_SYS_ADMIN, CONFIG_NET_NS), and not in a user "
        "namespace (CONFIG_USER_NS; the sysctls user.max_user_namespaces, kernel.unprivileged_userns_clone and "
        "kernel.apparmor_restrict_unprivileged_userns may forbid it)"
    )


def works(command: Sequence[str]) -> bool:
    """Return True if a command succeeds in a fresh network namespace, which is gone with it."""
    inside = [program(command[0]), *command[1:]]
    return subprocess.run([*unshare(), *inside], capture_output=True).returncode == 0


def check() -> None:
    """Check that this machine can hold a lab.

    Raises:
        LabError: it can't: a program, a right or a feature of the kernel is missing; all missing features are named.
    """
    for name in PROGRAMS:
        program(name)
    if missing := [feature for feature, command in NEEDED.items() if not works(command)]:
        raise LabError(f"this kernel has no {', no '.join(missing)}; a lab needs a kernel with it")


@cache
def has_netem() -> bool:
    return works(NETEM)
