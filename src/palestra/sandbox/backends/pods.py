"""What a cluster is told once: a template of pods with our agent, and a pool of them that wait.

    python -m palestra.sandbox.backends.pods --memory-mb 512 --disk-mb 256 --replicas 20 | kubectl apply -f -

A claim has no limits of its own, so each `Limits` has a pool, whose name says them. Objects are those of agent-sandbox,
`extensions.agents.x-k8s.io/v1beta1`:
https://github.com/kubernetes-sigs/agent-sandbox/blob/main/extensions/api/v1beta1/sandboxtemplate_types.go and
.../sandboxwarmpool_types.go. A pod's processes and its number of files are bounded by the cluster alone: a template has
no field for them.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from palestra.sandbox import agent
from palestra.sandbox.records import Limits

GROUP, VERSION = "extensions.agents.x-k8s.io", "v1beta1"
PORT, HOME, RUNTIME = 7070, "/home/user", "gvisor"
SECRET, KEY = "palestra-agent", "token"
IMAGE = "docker.io/library/python:3.12-slim"
HOST_LABEL = {"palestra-sandboxes": "host"}
_DIRECTORY = "/run/palestra"
_LIMITS = Limits()


def pool_name(limits: Limits) -> str:
    cores = "" if limits.cpus is None else f"-c{round(limits.cpus * 1000)}"
    return f"palestra-m{limits.memory_mb}-d{limits.disk_mb}{cores}"


def manifests(
    limits: Limits = _LIMITS, *, image: str = IMAGE, replicas: int = 1, hosts: tuple[str, ...] = ()
) -> dict[str, Any]:
    """A list of objects to apply. `hosts`: networks (10.0.0.0/8) that may reach the agents; none: pods of the same
    namespace with the label `palestra-sandboxes: host`. Pods reach nobody.
    """
    name = pool_name(limits)
    sources = [{"ipBlock": {"cidr": cidr}} for cidr in hosts] or [{"podSelector": {"matchLabels": HOST_LABEL}}]
    template = {
        "podTemplate": {"metadata": {"labels": {"palestra-sandboxes": "sandbox"}}, "spec": _pod(limits, image, name)},
        "networkPolicyManagement": "Managed",
        "networkPolicy": {"ingress": [{"from": sources, "ports": [{"protocol": "TCP", "port": PORT}]}], "egress": []},
        "envVarsInjectionPolicy": "Disallowed",
        "generatedSecrets": [{"name": SECRET, "data": [{"key": KEY, "lengthBytes": 32}]}],
    }
    source = Path(agent.__file__).read_text(encoding="utf-8")
    extension = f"{GROUP}/{VERSION}"
    pool = {"replicas": replicas, "sandboxTemplateRef": {"name": name}}
    return {
        "apiVersion": "v1",
        "kind": "List",
        "items": [
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"agent.py": source}},
            {"apiVersion": extension, "kind": "SandboxTemplate", "metadata": {"name": name}, "spec": template},
            {"apiVersion": extension, "kind": "SandboxWarmPool", "metadata": {"name": name}, "spec": pool},
        ],
    }


def _pod(limits: Limits, image: str, config: str) -> dict[str, Any]:
    """It never starts again, and has no rights in the cluster."""
    places = {"home": HOME, "tmp": "/tmp"}
    disk = {"medium": "Memory", "sizeLimit": f"{limits.disk_mb}Mi"}
    return {
        "runtimeClassName": RUNTIME,
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 0,
        "hostname": "sandbox",
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "runAsGroup": 1000,
            "fsGroup": 1000,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(limits, image, places)],
        "volumes": [
            {"name": "agent", "configMap": {"name": config}},
            *({"name": name, "emptyDir": disk} for name in places),
        ],
    }


def _container(limits: Limits, image: str, places: dict[str, str]) -> dict[str, Any]:
    """What it writes is in memory, and counts: its bound is that of both together."""
    bounds = {"memory": f"{limits.memory_mb + limits.disk_mb}Mi"}
    if limits.cpus is not None:
        bounds["cpu"] = f"{round(limits.cpus * 1000)}m"
    token = {"secretKeyRef": {"name": SECRET, "key": KEY}}
    return {
        "name": "agent",
        "image": image,
        "command": ["python3", "-I", "-S", f"{_DIRECTORY}/agent.py", "--listen", str(PORT), HOME],
        "workingDir": HOME,
        "env": [{"name": "PALESTRA_TOKEN", "valueFrom": token}, {"name": "TMPDIR", "value": "/tmp"}],
        "ports": [{"containerPort": PORT}],
        "startupProbe": {"tcpSocket": {"port": PORT}, "periodSeconds": 1, "failureThreshold": 120},
        "resources": {"limits": bounds, "requests": bounds},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "agent", "mountPath": _DIRECTORY, "readOnly": True},
            *({"name": name, "mountPath": place} for name, place in places.items()),
        ],
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="palestra.sandbox.backends.pods")
    parser.add_argument("--memory-mb", type=int, default=_LIMITS.memory_mb)
    parser.add_argument("--disk-mb", type=int, default=_LIMITS.disk_mb)
    parser.add_argument("--cpus", type=float)
    parser.add_argument("--image", default=IMAGE)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--hosts", nargs="*", default=[], help="networks that may reach the agents, as 10.0.0.0/8")
    given = parser.parse_args(argv)
    limits = Limits(memory_mb=given.memory_mb, disk_mb=given.disk_mb, cpus=given.cpus)
    listed = manifests(limits, image=given.image, replicas=given.replicas, hosts=tuple(given.hosts))
    sys.stdout.write(json.dumps(listed, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
