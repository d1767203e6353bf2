"""One request to an agent that ends with its answer, for places that run a command and nothing else.

Consumes: `once.py DIRECTORY HOME MEMORY_BYTES ANSWER REQUEST`; DIRECTORY has `agent.py`, REQUEST is a frame in base 64,
or `@` and the file that it is in, which is removed. Produces: the answer's frame in base 64 as its last line; one that
is long is in the file ANSWER, and the line is `@`. Waits for: the agent, which keeps the request's own deadline.

Self-contained, as the agent is: it runs where nothing of ours is installed.
"""

import base64
import os
import socket
import struct
import subprocess
import sys

_HEAD = struct.Struct("!II")
_MOST_PRINTED = 48 * 1024


def main(argv):
    directory, home, memory, answer_place, request = argv[1:6]
    os.makedirs(home, exist_ok=True)
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-I", "-S", os.path.join(directory, "agent.py"), home, memory]
    with theirs:
        end = theirs.fileno()
        agent = subprocess.Popen(command, stdin=end, stdout=end, stderr=subprocess.DEVNULL)
    with ours:
        _frame(ours)  # it is ready
        ours.sendall(_request(request))
        answer = _frame(ours)
    agent.wait(10)
    if len(answer) <= _MOST_PRINTED:
        print(base64.b64encode(answer).decode())
        return
    with open(answer_place, "wb") as file:
        file.write(answer)
    print("@")


def _request(text):
    if not text.startswith("@"):
        return base64.b64decode(text)
    with open(text[1:], "rb") as file:
        request = file.read()
    os.unlink(text[1:])
    return request


def _frame(link):
    head = _exactly(link, _HEAD.size)
    return head + _exactly(link, sum(_HEAD.unpack(head)))


def _exactly(link, count):
    pieces = []
    while count > 0:
        piece = link.recv(min(count, 262144))
        if not piece:
            raise SystemExit("the agent has ended")
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


if __name__ == "__main__":
    main(sys.argv)
