"""A run's manifests for Kubernetes (1.31 or later), on stdout:

    python examples/launch/kubernetes.py CONFIG.yaml section.key=value … --nodes 5 \\
        --serve-nodes 3 --serve-model Qwen3-4B | kubectl apply --filename -

CONFIG.yaml is a path in the image, which has examples/, or below /models, /data or /runs. These are
three claims that all nodes can mount. The servers' key is a secret:

    kubectl create secret generic taopd --from-literal SGLANG_KEY="$(openssl rand -hex 24)"

The same command with `kubectl delete` ends the run, and the servers, which stay when it is done.
Without --serve-nodes the run starts its servers by itself, on the GPUs that the recipe names.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from string import Template

TEMPLATES = Path(__file__).with_name("kubernetes")
FIRST_PORT = 30000


def main(arguments: list[str]) -> int:
    """Print the manifests."""
    given = parse(arguments)
    sets = [
        ("rollout", given.serve_nodes, given.serve_model, given.serve_tp, []),
        ("teacher", given.teach_nodes, given.teach_model, given.teach_tp, ["--hidden-states"]),
    ]
    servers, options, manifests = [], [], []
    for section, nodes, model, tp, more in sets:
        if not nodes:
            continue
        name, ports = f"{given.name}-{section}", given.gpus // tp
        hosts = [f"{name}-{node}.{name}" for node in range(nodes)]
        urls = [f"http://{host}:{FIRST_PORT + port}" for host in hosts for port in range(ports)]
        servers += hosts
        options.append(f"{section}.servers.urls=[{','.join(urls)}]")
        options.append(f"{section}.servers.api_key_env=SGLANG_KEY")
        serve = [f"/models/{model}", "--tp", str(tp), "--host", "0.0.0.0"]
        serve += ["--api-key-env", "SGLANG_KEY", "--logs", "/runs/server-logs/$(POD)", *more]
        manifests.append(
            fill("servers.yaml", given, name=name, nodes=nodes, ports=ports, arguments=serve)
        )
    manifests.append(
        fill(
            "train.yaml",
            given,
            servers=servers,
            arguments=[given.config, *given.overrides, *options],
            alone=not servers,
            backoff=given.restarts * given.nodes,
        )
    )
    print("---\n".join(manifests), end="")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--name", default="taopd", help="of all that is made")
    parser.add_argument("--image", default="taopd", help="the Dockerfile's")
    parser.add_argument("--nodes", type=int, default=1, help="that train")
    parser.add_argument("--gpus", type=int, default=8, help="of a node")
    parser.add_argument("--ranks", type=int, help="of a node that trains; default: one per GPU")
    parser.add_argument("--serve-nodes", type=int, default=0, help="that generate")
    parser.add_argument("--serve-model", help="the student, below the claim of models")
    parser.add_argument("--serve-tp", type=int, default=1, help="GPUs of a server")
    parser.add_argument("--teach-nodes", type=int, default=0, help="that serve the teacher")
    parser.add_argument("--teach-model", help="the teacher, below the claim of models")
    parser.add_argument("--teach-tp", type=int, default=8, help="GPUs of one of its servers")
    for claim in ("models", "data", "runs"):
        parser.add_argument(f"--{claim}", default=claim, help="name of that claim")
    parser.add_argument("--secret", default="taopd", help="with the servers' SGLANG_KEY")
    parser.add_argument(
        "--rdma", default="", metavar="RESOURCE=N", help="of a node, as the device plugin calls it"
    )
    parser.add_argument("--user", type=int, default=1000, help="whom the containers run as")
    parser.add_argument("--restarts", type=int, default=10, help="of all pods that train")
    given = parser.parse_intermixed_args(arguments)
    given.ranks = given.ranks or given.gpus
    for role in ("serve", "teach"):
        nodes, model, tp = (getattr(given, f"{role}_{what}") for what in ("nodes", "model", "tp"))
        if nodes and not model:
            parser.error(f"--{role}-nodes: {nodes} without --{role}-model; name the model")
        if nodes and given.gpus % tp:
            parser.error(f"--{role}-tp: {tp} does not divide --gpus {given.gpus}")
    resource, equals, count = given.rdma.partition("=")
    if given.rdma and not (resource and equals and count.isdigit()):
        parser.error(f"--rdma: {given.rdma}; write RESOURCE=N, such as rdma/hca=8")
    if any("=" not in override for override in given.overrides):
        parser.error(f"{' '.join(given.overrides)}: write section.key=value")
    return given


def fill(template: str, given: argparse.Namespace, **values) -> str:
    """Fill a template in: what is no text becomes JSON, which is YAML as well."""
    limits: dict[str, int] = {"nvidia.com/gpu": given.gpus}
    if given.rdma:
        resource, _, count = given.rdma.partition("=")
        limits[resource] = int(count)
    user = {name: given.user for name in ("runAsUser", "runAsGroup", "fsGroup")}
    user["runAsNonRoot"] = given.user != 0
    values = vars(given) | {"limits": limits, "user": user} | values
    text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}
    return Template((TEMPLATES / template).read_text()).substitute(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
