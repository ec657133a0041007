"""Before anything is imported: no connection leaves this machine, and an attempt is seen in the log."""

import ipaddress
import logging
import socket

_connect = socket.socket.connect


def connect(self, address):
    if (
        self.family in (socket.AF_INET, socket.AF_INET6)
        and not ipaddress.ip_address(address[0]).is_loopback
    ):
        logging.error("probe: refused to connect to %s", address)
        raise OSError("the tests run without a network")
    return _connect(self, address)


socket.socket.connect = connect
