"""The addresses of this machine's network interfaces, as getifaddrs(3) of the C library tells them.

The trap: an interface that is switched off keeps its addresses, and nobody reaches them.
"""

import ctypes
import ipaddress
import os
import socket
import sys
from collections.abc import Iterator
from typing import Final

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_IFF_UP: Final = 0x1
# Where the address begins in sockaddr_in and sockaddr_in6, and how long it is.
_PLACES: Final = {socket.AF_INET: (4, 4), socket.AF_INET6: (8, 16)}


class _Entry(ctypes.Structure):
    """struct ifaddrs, as far as it is looked at."""


_Entry._fields_ = [
    ("next", ctypes.POINTER(_Entry)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
]


def interface_addresses() -> list[IPAddress]:
    """The IP addresses of interfaces that are switched on, in the kernel's order. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    first = ctypes.POINTER(_Entry)()
    if libc.getifaddrs(ctypes.byref(first)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    try:
        return list(_addresses(first))
    finally:
        libc.freeifaddrs(first)


def _addresses(entry: "ctypes._Pointer[_Entry]") -> Iterator[IPAddress]:
    while entry:
        here = entry.contents
        if here.flags & _IFF_UP and here.address:
            family = int.from_bytes(ctypes.string_at(here.address, 2), sys.byteorder)
            if family in _PLACES:
                start, length = _PLACES[socket.AddressFamily(family)]
                yield ipaddress.ip_address(ctypes.string_at(here.address + start, length))
        entry = here.next
