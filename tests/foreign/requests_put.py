"""A PUT with requests, and the task's result right after it, as XenServer's sample cbt_vm_metadata_import.py.

Runs with the interpreter of tests/foreign/.venv, apart from the gateway; asked and answering in JSON.
"""

import json
import sys
import xmlrpc.client
from pathlib import Path

import requests  # type: ignore[import-untyped]

asked = json.load(sys.stdin)
with Path(asked["file"]).open("rb") as body:
    answer = requests.put(asked["put"], data=body, verify=asked["authority"], timeout=30)
with xmlrpc.client.ServerProxy(asked["url"]) as proxy:
    task = [
        getattr(proxy.task, name)(asked["session"], asked["task"])["Value"]
        for name in ("get_status", "get_result")
    ]
json.dump({"status": answer.status_code, "task": task}, sys.stdout)
