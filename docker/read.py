"""The demo's reader: declares what a definitions file holds, then prints each message of a queue.

Speaks RabbitMQ's management API, so Python's own library is enough. Good for a look, not for an application: a message
is gone from the queue before it is printed. An application consumes over AMQP and acknowledges what it has done.

Usage: read.py DEFINITIONS QUEUE, with RABBITMQ_API, RABBITMQ_USER and RABBITMQ_PASSWORD set.
"""

import base64
import json
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

PAUSE_SECONDS = 0.5
BATCH = 100


def post(path, content):
    login = f"{os.environ['RABBITMQ_USER']}:{os.environ['RABBITMQ_PASSWORD']}"
    request = urllib.request.Request(
        os.environ["RABBITMQ_API"] + path,
        data=json.dumps(content).encode(),
        headers={
            "Authorization": "Basic " + base64.b64encode(login.encode()).decode(),
            "Content-Type": "application/json",
        },
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        text = answer.read()
    return json.loads(text) if text else None


def declare(path):
    with open(path, encoding="utf-8") as file:
        post("/definitions", json.load(file))


def take(queue):
    wanted = {"count": BATCH, "ackmode": "ack_requeue_false", "encoding": "auto"}
    return post(f"/queues/%2F/{urllib.parse.quote(queue, safe='')}/get", wanted)


def show(message):
    properties = message["properties"] or {}  # an empty one comes as a list
    key = (properties.get("headers") or {}).get("x-outbox-key", "")
    print(
        f"read  {message['routing_key']} {key} "
        f"message_id={properties.get('message_id')} {message['payload']}"
    )


def main():
    definitions, queue = sys.argv[1:]
    declared = False
    while True:
        try:
            if not declared:
                declare(definitions)
                declared = True
                print(f"declared {definitions}, reading {queue}")
            for message in take(queue):
                show(message)
        except (urllib.error.URLError, OSError) as error:
            print(f"RabbitMQ does not answer, trying again: {error}")
            declared = False
            time.sleep(2)
        time.sleep(PAUSE_SECONDS)


if __name__ == "__main__":
    main()
