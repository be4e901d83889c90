"""Answers every request of every connection with one octet. A script: its arguments are listening sockets that it inherits."""

from __future__ import annotations

import select
import socket
import sys


def main() -> None:
    """Serves until it is ended."""
    epoll = select.epoll()
    listeners = {number: socket.socket(fileno=number) for number in map(int, sys.argv[1:])}
    open_ones: dict[int, socket.socket] = {}
    for number in listeners:
        epoll.register(number, select.EPOLLIN)
    while True:
        for number, _ in epoll.poll():
            if number in listeners:
                connection, _ = listeners[number].accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                open_ones[connection.fileno()] = connection
                epoll.register(connection, select.EPOLLIN)
                continue
            connection = open_ones[number]
            try:
                request = connection.recv(64)
                if request:
                    connection.send(b"x")
                    continue
            except OSError:
                pass
            del open_ones[number]
            connection.close()


if __name__ == "__main__":
    main()
