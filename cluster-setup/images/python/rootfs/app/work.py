"""Threads and child processes that count, and an HTTP server that tells what they have counted.

Every thread counts in memory. Every child counts too and sends each number through its pipe; the parent checks that none is
missing and none comes twice. GET / answers with everything as JSON, so that a reader can compare before and after a move.
"""

import http.server
import json
import os
import subprocess
import sys
import threading
import time

THREADS = int(os.environ.get("WORK_THREADS", "4"))
CHILDREN = int(os.environ.get("WORK_CHILDREN", "2"))
PAUSE = float(os.environ.get("WORK_PAUSE", "0.01"))
PORT = int(os.environ.get("WORK_PORT", "8080"))

state = {"pid": os.getpid(), "started": time.time(), "threads": [0] * THREADS, "children": [], "gaps": 0}


def count(index):
    while True:
        state["threads"][index] += 1
        time.sleep(PAUSE)


def child():
    number = 0
    while True:
        number += 1
        print(number, flush=True)
        time.sleep(PAUSE)


def listen(entry, process):
    for line in process.stdout:
        number = int(line)
        if number != entry["last"] + 1:
            state["gaps"] += 1
        entry["last"] = number
    entry["exit"] = process.wait()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps(state).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def main():
    if len(sys.argv) > 1:
        child()
    for index in range(THREADS):
        threading.Thread(target=count, args=(index,), daemon=True).start()
    for _ in range(CHILDREN):
        process = subprocess.Popen([sys.executable, __file__, "child"], stdout=subprocess.PIPE, text=True)
        entry = {"pid": process.pid, "last": 0, "exit": None}
        state["children"].append(entry)
        threading.Thread(target=listen, args=(entry, process), daemon=True).start()
    print("working", flush=True)
    http.server.ThreadingHTTPServer(("", PORT), Handler).serve_forever()


main()
