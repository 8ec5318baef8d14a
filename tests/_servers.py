"""Private Redis and memcached servers for tests: on a free port, without files, ended by whoever started them.

Where one is not installed its tests are skipped; with ``HYPERNODES_TEST_SERVERS=required`` (as in .ci/run) they fail.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time

import pytest

PATIENCE_S = 20

COMMANDS = {
    "redis": ["redis-server", "--bind", "127.0.0.1", "--port", "{port}", "--save", "", "--appendonly", "no"],
    "memcached": ["memcached", "-l", "127.0.0.1", "-p", "{port}", "-U", "0", "-u", "nobody"],
}


class Server:
    """One server process, which keeps its port when it is started again."""

    def __init__(self, kind):
        self.kind = kind
        self.port = None
        self._process = None

    def start(self):
        """Start it and wait until it answers; again, if another process took the port first."""
        command = COMMANDS[self.kind]
        if shutil.which(command[0]) is None:
            absent = f"{command[0]} is not installed (Debian: apt-get install redis-server memcached)"
            if os.environ.get("HYPERNODES_TEST_SERVERS") == "required":
                pytest.fail(absent)
            pytest.skip(absent)
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            port = self.port or free_port()
            filled = [word.format(port=port) for word in command]
            self._process = subprocess.Popen(filled, stdout=subprocess.DEVNULL, cwd=tempfile.gettempdir())
            while self._process.poll() is None and time.monotonic() < deadline:
                if answers(self.kind, port):
                    self.port = port
                    return self
                time.sleep(0.01)
            self.stop()
        pytest.fail(f"{self.kind} did not start within {PATIENCE_S} s")

    def stop(self):
        """Kill it, frozen or not; it has nothing to save."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self):
        """Let it accept connections and answer nothing."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self):
        self._process.send_signal(signal.SIGCONT)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def answers(kind, port):
    question, answer = {"redis": (b"PING\r\n", b"+PONG"), "memcached": (b"version\r\n", b"VERSION")}[kind]
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as line:
            line.sendall(question)
            return line.recv(100).startswith(answer)
    except OSError:
        return False


class Servers:
    """The servers that a session of tests shares: each is started when a test first needs it."""

    def __init__(self):
        self._running = {}

    def port(self, kind):
        """The port of a server, which runs from now on to the end of the session."""
        if kind not in self._running:
            self._running[kind] = Server(kind).start()
        return self._running[kind].port

    def start_installed(self):
        """Start all that can be started, so that no test is taken for the one that left them running."""
        for kind, command in COMMANDS.items():
            if shutil.which(command[0]) is not None:
                self.port(kind)

    def stop(self):
        for server in self._running.values():
            server.stop()
        self._running.clear()


SHARED = Servers()
