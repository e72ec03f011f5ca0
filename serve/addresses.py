"""Which addresses are of this machine alone: what goes there is seen by nobody else."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it.

    Args:
        host: a name or an address, without a port. Of names only `localhost` is known.
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_of(address: str) -> str:
    """The host of HOST:PORT; of an IPv6 address without its brackets."""
    return address.rpartition(":")[0].removeprefix("[").removesuffix("]")


def bracketed(host: str) -> str:
    """A host as it stands before a colon and a port."""
    return f"[{host}]" if ":" in host else host
